"""report/run_report.py: one page with nothing to fetch, whatever the rows say and whatever is missing."""
import json
import os
import re

import pytest
from html_page import HOSTILE, Page

from report import write_run_report
from report.answers import MAX_HITS, MAX_MISSES
from report.charts import MAX_POINTS

FLAGS = {"model": "base", "data": "rows.jsonl", "steps": 40, "lr": 0.0003}
HEADER = {"flags": FLAGS, "commit": "abc1234", "python": "3.11.7", "torch": "2.13.0", "device": "CPU (2 threads)", "resumed_at": None}
STEPS = [{"step": i, "loss": 8 / i, "grad_norm": 1.0, "lr": 0.0003, "tokens": 100, "trained_tokens": 10, "seconds": 6.0,
          "tokens_per_second": 900 + i, "peak_gib": 1.5} for i in range(1, 41)]
HELD_OUT = [{"step": 0, "eval_loss": 7.98}, {"step": 40, "eval_loss": 0.215}]
ROME = {"name": "get_weather", "arguments": {"city": "Rome", "day": "today"}}
NO_NUMBER = re.compile(r"\b(nan|inf|None)\b")


def answer(source, cause=None, given=(ROME,), **more):
    return {"source": source, "query": f"weather for {source}", "expected": [ROME], "given": list(given), "text": "call:get_weather{…}",
            "cause": cause, "detail": "detail" if cause else None, "exact": cause is None, "ast": cause is None} | more


def evaluation(share, answers=(), **more):
    return {"rows": 200, "exact_match": share, "ast_match": share + 0.01, "name_accuracy": share + 0.02, "argument_precision": share,
            "argument_recall": share, "parse_failures": 0.005, "no_call_rows": 0, "correct_silence": None, "intervals": {
                "exact_match": [share - 0.013, share + 0.011], "ast_match": [share - 0.01, share + 0.02]},
            "causes": {"wrong argument": 4, "no call": 1}, "answers": list(answers)} | more


BEFORE = evaluation(0.02, [answer("a:1", "no call", [], text="nap nap nap"), answer("a:2", "no call", [], text="hum hum")])
AFTER = evaluation(0.965, [answer("a:1"), answer("a:3", "wrong argument", [ROME | {"arguments": {"city": "Rom", "year": 7}}])],
                   files={"a.jsonl": {"rows": 77, "exact_match": 0.911}})


@pytest.fixture
def run(tmp_path):
    """Write a run's folder and its report; returns the page."""
    def make(log=(HEADER, *STEPS, *HELD_OUT), calls=None, config=FLAGS, tail=b""):
        folder = tmp_path / "mine"
        (folder / "calls").mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in log).encode() + tail)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for step, value in ({0: BEFORE, 40: AFTER} if calls is None else calls).items():
            (folder / "calls" / f"step-{step:06d}.json").write_text(json.dumps(value))
        assert write_run_report(folder) == folder / "report.html"
        return Page((folder / "report.html").read_text(encoding="utf-8"))
    return make


def test_the_report_is_one_well_formed_page_that_fits_a_phone(run):
    page = run()
    assert page.source.startswith("<!DOCTYPE html>") and {"charset": "utf-8"}.items() <= page.all("meta")[0].items()
    assert page.all("meta")[1]["name"] == "viewport" and "width=device-width" in page.all("meta")[1]["content"] and "mine" in page.text
    assert page.headings == ["Accuracy", "By file", "Training", "Causes of misses", "Answers", "Flags and versions"]


def test_the_report_needs_no_network_and_no_script(run):
    page = run()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page.source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "use", "image"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key in ("src", "href")]


def test_hostile_text_is_shown_and_does_nothing(run):
    call = {"name": HOSTILE, "arguments": {HOSTILE: [HOSTILE, {"x": HOSTILE}]}}
    bad = answer(HOSTILE, HOSTILE, [call], query=HOSTILE, text=HOSTILE, detail=HOSTILE)
    value = evaluation(0.5, [bad, bad | {"given": [], "expected": [call]}], causes={HOSTILE: 2}, files={HOSTILE: {"exact_match": 0.1}})
    page = run(log=[HEADER | {"device": HOSTILE, "commit": HOSTILE}, *STEPS], calls={0: value, 40: value}, config={HOSTILE: HOSTILE})
    assert not {"script", "img"} & {tag for tag, _ in page.tags} and not [a for _, a in page.tags if "onerror" in a]
    assert "<script>alert(1)</script><img src=x onerror=" in page.text and "ça 日本 😀" in page.text and "&amp;'" in page.text
    assert not set("\u202e\x00\x1b\ud83d") & set(page.source) and r"\u202e\u0000\u001b[31m" in page.text and r"\ud83d" in page.text
    assert "xxxx … (9,0" in page.text and "x" * 5000 not in page.source


@pytest.mark.parametrize("name", ["a&b<i>", os.fsdecode(b"caf\xe9")])
def test_a_folder_of_any_name_can_be_reported_on(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps(STEPS[0]))
    page = Page(write_run_report(folder).read_text(encoding="utf-8"))
    assert page.all("h1") and not page.all("i")


def test_the_numbers_shown_are_the_inputs(run):
    page = run()
    assert ("Exact match 2.0 % → 96.5 % (95 % interval 95.2–97.6 %) on 200 held-out queries, 40 steps, 4.0 minutes, CPU (2 threads)"
            in page.text)
    for shown in ("4 of 200", "193 of 200", "0.7–3.1 %", "97.5 %", "98.5 %", "+94.5", "0.5 %", "1 of 200", "91.1 %", "77 rows",
                  "Held-out loss is lowest, 0.215, at step 40", "Median 920 tokens/s", "1.5 GiB", "abc1234", "0.0003"):
        assert shown in page.text, shown
    assert page.all("rect")[0]["width"] == "100.00" and page.all("rect")[2]["width"] == "25.00"


@pytest.mark.parametrize("value", [None, float("nan"), "text", [[1, "x", None]], {"x": 10**400}, -1])
def test_an_evaluation_may_lack_any_key_or_have_nonsense_there(run, value):
    for broken in (dict.fromkeys(AFTER, value), *(AFTER | {key: value} for key in AFTER)):
        for calls in ({0: BEFORE, 40: broken}, {0: broken, 40: AFTER}):
            assert not NO_NUMBER.search("".join(re.findall(r"<svg.*?</svg>", run(calls=calls).source, re.S)))


@pytest.mark.parametrize("value", [None, 7, {"name": None}, [None, {"name": 3, "arguments": "x"}, {"arguments": ["y"]}]])
def test_an_answer_may_lack_any_key_or_have_nonsense_there(run, value):
    for key in answer("a:1"):
        assert run(calls={0: BEFORE, 40: evaluation(0.5, [answer("a:1", "no call") | {key: value}])}).all("article")


def test_what_is_absent_leaves_no_heading(run, tmp_path):
    assert run(calls={}).headings == ["Training", "Flags and versions"]
    assert "Held-out loss 7.98 → 0.215, 40 steps" in run(calls={}).text
    assert run(log=STEPS[:1], calls={}, config={}).headings == ["Training"]
    only = run(log=[], calls={40: evaluation(0.5, causes={})}, config={})
    assert only.headings == ["Accuracy"] and not only.all("svg") and "before" not in only.text and "change" not in only.text
    assert "Exact match 50.0" in only.text and "→" not in only.text


def test_older_logs_give_their_exact_matches(run):
    page = run(log=[HEADER, {"step": 0, "exact_match": 0.0, "rows": 150}, *STEPS, {"step": 40, "exact_match": 0.9, "rows": 150}], calls={})
    assert "Exact match 0.0 % → 90.0 % on 150 held-out queries" in page.text and "135 of 150" in page.text
    assert [svg["aria-label"].split()[0] for svg in page.all("svg", "chart")] == ["Accuracy", "Loss", "Learning", "Speed"]


def test_a_torn_line_and_a_resumption_are_read_past(run):
    log = [HEADER, *STEPS[:20], HEADER | {"resumed_at": 20, "device": "Other GPU"}, *STEPS[20:39], [1], 5, {"step": True, "loss": 1}]
    page = run(log=log, tail=b'{"step": 39, "loss": 0.0\n' + json.dumps(STEPS[39]).encode() + b'\n{"step": 41, "loss": "\xe6')
    assert "40 steps, 4.0 minutes, Other GPU" in page.text and "Resumed at step 20" in page.text and "Started" in page.text
    assert [path["d"] for path in page.all("path", "line")] == [path["d"] for path in run(log=[HEADER, *STEPS]).all("path", "line")]


def test_flags_come_from_the_header_where_there_is_no_config(run):
    assert "rows.jsonl" in run(config=None).text
    assert "40 of 80 steps" in run(config={"steps": 80}).text


def test_losses_that_are_not_finite_leave_a_gap(run):
    log = [HEADER, *STEPS[:10], *({"step": i, "loss": bad} for i, bad in ((11, float("nan")), (12, float("inf")), (13, None), (14, 10**400))),
           *STEPS[14:], {"step": 20, "eval_loss": float("nan")}, *HELD_OUT]
    page = run(log=log, calls={})
    assert "4 of 40 steps had no finite loss, the first of them step 11" in page.text
    assert page.all("path", "line")[0]["d"].count("M") == 2 and len(page.all("circle")) == 2
    assert not NO_NUMBER.search("".join(re.findall(r"<svg.*?</svg>", page.source, re.S)))


@pytest.mark.parametrize("losses", [[0.0] * 5, [2.0] * 5, [1e-9, 1, 1e9], [-3.0, 5.0], [float("nan")] * 3, [1e99, 1e-99], [7.0]])
def test_any_losses_can_be_drawn_within_the_frame(run, losses):
    page = run(log=[{"step": i, "loss": loss} for i, loss in enumerate(losses)], calls={})
    for path in page.all("path", "line"):
        numbers = [float(part) for part in re.findall(r"-?[\d.]+(?:e[-+]?\d+)?", path["d"].replace("h0", ""))]
        assert all(0 <= x <= 420 for x in numbers[::2]) and all(0 <= y <= 252 for y in numbers[1::2])


def test_a_long_run_is_drawn_with_few_points_and_keeps_its_spike(run):
    steps = [{"step": i, "loss": 50.0 if i == 6_543 else 2.0, "lr": 1e-4, "tokens_per_second": 100 + i % 7} for i in range(1, 20_001)]
    page = run(log=steps, calls={})
    lines = [path["d"] for path in page.all("path", "line")]
    assert lines and all(len(re.findall("[ML]", line)) <= MAX_POINTS for line in lines)
    heights = [float(y) for y in re.findall(r",([\d.]+)", lines[0])]
    assert heights.count(min(heights)) == 1 and sorted(heights)[1] > min(heights) + 50


def test_every_chart_names_itself_and_its_lines(run):
    page = run()
    assert [svg["aria-label"] for svg in page.all("svg", "chart")] == [
        "Accuracy against step, % of held-out queries: exact, AST, names", "Loss against step, nats a trained token (log scale): train, held-out",
        "Learning rate against step", "Speed against step, tokens/s"]
    heights = [float(label["y"]) for label in page.all("text", "label")[:3]]
    assert all(abs(a - b) >= 13 for i, a in enumerate(heights) for b in heights[i + 1:])


def test_causes_stand_in_the_order_of_what_is_left_with_their_sum(run):
    page = run(calls={0: evaluation(0.1, causes={"rare": 9, "often": 1}), 40: evaluation(0.5, causes={"often": 3, "seldom": 2})})
    assert "often 1 3 seldom 0 2 rare 9 0 all 10 5" in page.text


def test_misses_come_first_by_cause_each_cause_gets_its_turn_then_hits(run):
    many = [answer(f"b:{i}") for i in range(50)] + [answer(f"a:{i}", "wrong argument", []) for i in range(100)] + [answer("c:1", "rare", [])]
    many[0]["exact"] = False
    page = run(calls={40: evaluation(0.5, many)})
    titles = [page.between(i) for i, (tag, _) in enumerate(page.tags) if tag == "h3"]
    assert titles[3:7] == ["Missed: wrong argument", "Missed: not to the letter", "Missed: rare", "Right"]
    assert "22 of 100" in page.text and "6 of 49" in page.text and len(page.all("article")) == MAX_MISSES + MAX_HITS


def test_an_earlier_answer_to_the_same_row_stands_beside_the_last(run):
    page = run()
    assert "given, step 40" in page.text and "nap nap nap" in page.text and "hum hum" not in page.text and page.text.count("before, step 0") == 2       # a panel and its raw text
    unnamed = run(calls={0: evaluation(0.1, [answer(None, text="nap nap nap")]), 40: evaluation(0.5, [answer(None)])})
    assert "nap nap nap" not in unnamed.text


def test_a_run_with_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl: no such file; give the folder of a run"):
        write_run_report(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps(HEADER))
    with pytest.raises(ValueError, match="no step and no evaluation"):
        write_run_report(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps(STEPS[0]))
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "step-000001.json").write_text("{")
    with pytest.raises(ValueError, match=r"step-000001\.json: not valid JSON"):
        write_run_report(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["calls", "log.jsonl"]
