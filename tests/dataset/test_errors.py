"""dataset/errors.py: an error says where, what and the remedy; skipped rows are counted by cause."""
from dataset.errors import BadRow, RowError, SkippedRows


def test_the_error_of_a_bad_row_names_its_place_its_fault_and_the_remedy():
    error = BadRow("rows.jsonl:7", "not JSON", "the row is not valid JSON (why)").error()
    assert isinstance(error, RowError) and isinstance(error, ValueError) and error.cause == "not JSON"
    assert str(error) == "rows.jsonl:7: the row is not valid JSON (why); fix the row or pass --skip-invalid"


def test_skipped_rows_are_counted_by_cause_with_the_first_of_each():
    skipped = SkippedRows()
    assert not skipped and skipped.total == 0 and skipped.lines() == []
    skipped.add("not JSON", "a:1: x")
    skipped.add("bad call", "a:2: y", rows=3)
    skipped.add("not JSON", "b:1: z", rows=2)
    assert skipped == {"not JSON": {"rows": 3, "first": "a:1: x"}, "bad call": {"rows": 3, "first": "a:2: y"}} and skipped.total == 6
    assert skipped.lines() == ["3 rows skipped: not JSON; the first: a:1: x", "3 rows skipped: bad call; the first: a:2: y"]
