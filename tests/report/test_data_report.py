"""report/data_report.py: the page on rows and the section in a run's report show a survey's figures as they are."""
from html_page import Page

from report import write_data_report
from report.data_report import data_section, length_histogram, sample_rows

EMPTY = {"rows": 2, "kept": 0, "dropped": {"missing column": {"rows": 2, "first": "rows.jsonl:1: <b>"}}}
KEPT = {
    "kept": 5,
    "histogram": {"from": 100, "width": 50, "rows": [4, 0, 1]},
    "samples": [{"source": "rows.jsonl:7", "tokens": 12, "runs": [["<ask>", False], ["<answer>", True]]}],
}


def test_rows_that_are_all_dropped_leave_the_figures_alone(tmp_path):
    page = Page(write_data_report(tmp_path / "new", "a<b", EMPTY).read_text(encoding="utf-8"))
    assert page.headings == ["In figures"] and "a<b" in page.text and "No row can be trained on" in page.text
    assert "dropped: missing column 2; the first: rows.jsonl:1: <b>" in page.text and not page.all("b")
    assert length_histogram(EMPTY) == sample_rows(EMPTY) == ""


def test_a_run_without_a_survey_has_no_section():
    assert data_section({}) == ""


def test_the_histogram_has_a_bar_for_each_range_as_long_as_its_count():
    page = Page(length_histogram(KEPT))
    assert page.text.split() == "100 – 149 4 150 – 199 0 200 – 249 1".split()
    assert [rect["width"] for rect in page.all("rect")] == ["100.00", "0.00", "25.00"]


def test_samples_mark_what_carries_loss():
    page = Page(sample_rows(KEPT))
    assert "rows.jsonl:7 · 12 tokens" in page.text and "<ask><answer>" in page.text
    [mark] = [i for i, (tag, _) in enumerate(page.tags) if tag == "mark"]
    assert page.between(mark) == "<answer>"
