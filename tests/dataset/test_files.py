"""dataset/files.py: JSONL, arrays and gzip give the same rows; what is broken is named; sources and their weights."""
import gzip
import json

import pytest
from sample_rows import row

from dataset.files import parse_weight
from dataset.rows import read_rows, read_sources
from storage import hub


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_jsonl_and_arrays_plain_and_gzipped_give_the_same_rows(tmp_path, array, packed):
    rows = [row(query=f"query {i}\u2028 ünï") for i in range(5)]
    text = json.dumps(rows, indent=1, ensure_ascii=False) if array else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    file = tmp_path / "rows"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = list(read_rows([file]))
    assert [c.query for c in found] == [r["query"] for r in rows]
    lines = [int(c.source.partition(":")[2].partition(" ")[0]) for c in found]
    assert lines == [i for i, line in enumerate(text.split("\n"), start=1) if line.startswith(" {" if array else "{")]


def test_files_that_are_not_there_not_whole_or_not_utf8_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_rows([tmp_path / "nowhere"]))
    with pytest.raises(FileNotFoundError, match=r"no \.json"):
        list(read_rows([tmp_path]))
    good = json.dumps(row()).encode()
    for name, content, said in (("a", b'[{"query": "x', "a:1: the file ends inside row 1 of the array"), ("b", good + b'\n\n"\xff"', "b:3: the row's byte 1 is not UTF-8"),
                                ("d", b"[\n" + good + b',\n"\xff"]', r"d:3 \(row 2\): the row\'s byte 1 is not UTF-8"), ("e", b"[" + good + b"]\n[]", "after the array's end"),
                                ("f", b"[" + good + b"\n" + good + b"]", r"f:1 \(row 1\): the row is not valid JSON \(Extra data: line 2"), ("g", b"[" + good + b",]", r"g:1 \(row 2\): the row is not valid JSON"),
                                ("h", gzip.compress(b"x" * 5000)[:-30] + b"\0" * 30, "gzip|CRC|invalid|ended|h:"),
                                ("c", gzip.compress(b"x" * 5000)[:30], "broken|end-of-stream|ended")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            list(read_rows([tmp_path / name]))


def test_every_real_row_is_read(shared):
    counts = {name: sum(1 for _ in read_rows([shared / "data" / f"{name}.jsonl"])) for name in ("seal", "toolrl")}
    assert counts == {"seal": 1337, "toolrl": 322}


# Sources


@pytest.mark.parametrize(("name", "found"), [("Salesforce/xlam-function-calling-60k", True), ("nowhere/rows.jsonl", False), ("../models", False),
                                           ("./x", False), ("tests/x", False), ("rows.jsonl", False), ("a/b/c", False)])
def test_a_mistyped_path_is_not_taken_for_a_name_on_the_hub(name, found):
    assert (hub.parse(name) is not None) == found


@pytest.mark.parametrize(("source", "name", "weight"), [("a.jsonl", "a.jsonl", 1), ("a.jsonl*2", "a.jsonl", 2), ("o/n*0.5", "o/n", 0.5),
                                                       ("a*b*.25", "a*b", 0.25), ("rows/*.jsonl", "rows/*.jsonl", 1)])
def test_a_source_may_have_a_weight(source, name, weight):
    assert parse_weight(source) == (name, weight)


@pytest.mark.parametrize("source", ["a.jsonl*", "a.jsonl*0", "a.jsonl*0.0", "a.jsonl*1.2.3", "a.jsonl*.", "a.jsonl*1000000"])
def test_a_weight_that_is_none_is_refused(source):
    with pytest.raises(ValueError, match=r"a weight is a number above 0, 1000 at most, as in a\.jsonl\*2 or a\.jsonl\*0\.5"):
        list(read_sources([source]))


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="comma too many"):
        list(read_sources(["", "x"]))
