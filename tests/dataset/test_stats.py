"""dataset/stats.py: its statistics are those counted by hand, of however many rows; the page and the console say them."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from html_page import HOSTILE, Page

import data
import report
import train
from dataset import stats, token_cache
from dataset.errors import SkippedRows
from dataset.examples import tokenize
from dataset.rows import read_rows
from dataset.stats import console, describe, headlines
from tokenizer import Tokenizer

TOOL = {"name": "f", "description": "", "parameters": {"x": {"type": "str"}, "when": {"type": "datetime"}, "type": {"type": "str"}}}
PLAIN = {"name": "g", "description": "A tool", "parameters": {"n": {"type": "int"}}}


def row(query, *answers, tools=(PLAIN,)):
    return {"query": query, "tools": list(tools), "answers": answers[0] if answers and isinstance(answers[0], str) else list(answers)}


def call(name="g", /, **arguments):
    return {"name": name, "arguments": arguments}


TURNS = {"tools": [PLAIN], "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "tool_calls": [{"function": call(n=1)}]},
                                        {"role": "tool", "name": "g", "content": {"n": 1}}, {"role": "assistant", "tool_calls": [{"function": call(n=2)}]}]}
ROWS = [row("one", call(n=1)),                                           # line 1
        row("two", call(n=1), call(n=2)),
        row("one", {"arguments": {"n": 1}, "name": "g"}),                 # 3: as 1
        row("two", call(n=2), call(n=1)),                                # 4: as 2, in another order
        row("one", call(n=2)),                                           # 5: asks as 1
        row("one", tools=[TOOL]),                                        # 6: silence, and other tools
        row("say", "I say.", tools=[TOOL, PLAIN]),                       # 7: a text
        {"query": "no more"}, "{", "[",                                  # 8 to 10
        row("long " * 500, call(n=1)),                                   # 11
        row("both", call(n=1), tools=[TOOL, PLAIN]),                     # 12
        row("both", call(n=1), tools=[PLAIN, TOOL]),                     # 13: as 12, the tools in another order
        TURNS]                                                           # 14: asks as 1, and goes on


@pytest.fixture(scope="module")
def tokenizer(demo):
    return Tokenizer.load(demo / "model")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in ROWS))
    return path


def statistics_of(file, tokenizer, max_tokens=1000):
    rows = token_cache.read_tokens([str(file)], Path("no model"), tokenizer, None, 10, skip_invalid=True)
    return stats.statistics(rows, tokenizer, max_tokens, data.shared_prefix_fraction)


def test_statistics_are_those_counted_by_hand(file, tokenizer):
    found = statistics_of(file, tokenizer)
    assert console(json.loads(json.dumps(found))) == console(found) and found["rows"] == 14 and found["kept"] == 10
    assert {cause: entry["rows"] for cause, entry in found["dropped"].items()} == {"longer than 1,000 tokens": 1, "missing column": 1, "not JSON": 2}
    assert found["dropped"]["longer than 1,000 tokens"]["first"] == "rows.jsonl:11"
    assert found["dropped"]["not JSON"]["first"].startswith("rows.jsonl:9: the row is not valid JSON")
    assert found["tools_a_row"] == [(1, 7), (2, 3)] and found["calls_a_row"] == [(0, 2), (1, 5), (2, 3)]
    assert found["answers_a_row"] == [(1, 9), (2, 1)]
    assert found["duplicates"] == {"rows": 3, "first": "rows.jsonl:3, as rows.jsonl:1"}
    assert found["conflicts"] == {"rows": 2, "first": "rows.jsonl:5, as rows.jsonl:1"}
    assert found["silent"] == {"rows": 1, "first": "rows.jsonl:6"} and found["text"] == {"rows": 1, "first": "rows.jsonl:7"}
    assert found["hidden_parameters"] == {"rows": 4, "first": "rows.jsonl:6"}
    assert found["unknown_types"] == {"rows": 4, "first": "rows.jsonl:6"} and found["types"] == [("datetime", 4)]


def test_tokens_are_those_of_the_examples(file, tokenizer):
    found = statistics_of(file, tokenizer)
    examples = [tokenize(c, tokenizer) for c in read_rows([file], SkippedRows())]
    examples = [example for example in examples if len(example) < 1000]
    lengths = [len(example) for example in examples]
    assert found["tokens"] == sum(lengths) and found["trained_tokens"] == sum(int(example.loss_mask.sum()) for example in examples)
    assert found["tokens_a_row"]["least"] == min(lengths) and found["tokens_a_row"]["most"] == max(lengths) == found["longest"][0][1]
    assert found["longest"][0][0] == examples[int(np.argmax(lengths))].source and len(found["longest"]) == 5
    assert [sample["source"] for sample in found["samples"]] == ["rows.jsonl:1", "rows.jsonl:6", "rows.jsonl:14"]
    for sample in found["samples"]:
        example = next(example for example in examples if example.source == sample["source"])
        assert "".join(text for text, _ in sample["runs"]) == tokenizer.decode(example.ids.tolist())
        assert "".join(text for text, carries_loss in sample["runs"] if carries_loss) == tokenizer.decode(example.ids[example.loss_mask].tolist())
    assert sum(found["histogram"]["rows"]) == len(lengths)


@pytest.mark.parametrize("lengths", [[5], [1, 1], [99, 100, 101], [3, 4_000], list(range(1, 1000)), [10**6, 10**6 + 3]])
def test_a_histogram_has_few_bins_with_round_borders_and_every_row_in_its_own(lengths):
    found = stats.histogram(np.array(lengths))
    counts, start, width = found["rows"], found["from"], found["width"]
    assert len(counts) <= stats.MAX_BINS and start % width == 0 and str(width).strip("0") in ("1", "2", "5")
    assert counts == [sum(start + i * width <= n < start + (i + 1) * width for n in lengths) for i in range(len(counts))]
    assert counts[0] and counts[-1]


def test_micro_batches_are_as_full_as_steps_of_so_many_tokens(demo, tokenizer, monkeypatch):
    monkeypatch.setattr(stats, "MICRO_TOKENS", 1000)
    found = statistics_of(demo / "rows.jsonl", tokenizer)
    assert found["packing"]["pass_tokens"] == 1000 and found["packing"]["full"] == found["tokens"] / (1000 * found["packing"]["passes"])
    assert 0.8 < found["packing"]["full"] <= 1


def test_shared_prefixes_are_what_a_step_saves(tmp_path, tokenizer):
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    tools = [{"name": f"tool_{i}", "description": "d " * 20, "parameters": {}} for i in range(8)]
    same.write_text("".join(json.dumps(row(f"query {i}", tools=tools)) + "\n" for i in range(64)))
    other.write_text("".join(json.dumps(row(f"query {i}", tools=[tools[i % 8] | {"name": f"{i} tool"}])) + "\n" for i in range(64)))
    assert statistics_of(same, tokenizer)["shared_prefixes"]["shared"] > 0.9
    assert statistics_of(other, tokenizer)["shared_prefixes"]["shared"] < 0.5


def test_rows_of_which_none_is_left_are_described(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"query": 1}\n')
    found = statistics_of(tmp_path / "bad.jsonl", tokenizer)
    assert describe(found) == [("rows to train on", "0; 1 dropped"), ("dropped: missing column", f"1; the first: {found['dropped']['missing column']['first']}")]
    assert "missing column" in console(found)
    page = Page(report.write_data_report(tmp_path / "out", "bad.jsonl", found).read_text(encoding="utf-8"))
    assert page.headings == ["In figures"] and "No row can be trained on" in page.text


# In words


def test_the_command_says_and_writes_it_all_and_trains_nothing(demo, file, tmp_path, capsys):
    flags = ["--model", str(demo / "model"), "--data", str(file), "--survey", "--max-tokens", "1000", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert train.main(train.parse_args(flags)) == 0
    said = capsys.readouterr().out
    for words in ("10; 4 dropped", "dropped: not JSON", "2; the first: rows.jsonl:9: the row is not valid JSON", "3; the first: rows.jsonl:3, as rows.jsonl:1",
                  "rows: 2 with 0, 5 with 1, 3 with 2", "datetime (4)", "\033[32m<start_function_call>call:g{n:1}", f"report {tmp_path / 'run' / 'data.html'}"):
        assert words in said, words
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data.html"]
    page = Page((tmp_path / "run" / "data.html").read_text(encoding="utf-8"))
    assert page.headings == ["In figures", "Rows by their tokens", "Samples"] and "10 of 14 rows can be trained on" in page.text
    assert [mark["class"] for mark in page.all("mark")] == ["wanted"] * len(page.all("mark")) and len(page.all("article")) == 3
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page.source) and not page.all("script")


def test_training_says_in_a_few_lines_what_is_remarkable_and_its_report_has_it_all(demo, file, tmp_path, capsys):
    lines = (demo / "rows.jsonl").read_text().splitlines()[:40]
    (tmp_path / "more.jsonl").write_text("\n".join([*lines, *lines[:2]]) + "\n")
    flags = ["--model", str(demo / "model"), "--data", f"{file},{tmp_path / 'more.jsonl'}", "--skip-invalid", "--max-tokens", "1000", "--device", "cpu",
             "--eval-fraction", "0", "--batch-rows", "2", "--steps", "1", "--out", str(tmp_path / "run")]
    assert train.main(train.parse_args(flags)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data ")]
    for line in ("data   1 rows skipped: missing column; the first: rows.jsonl:8: no column 'tools', 'answers'", "data   5 rows are the same as an earlier row;",
                 "data   1 training rows dropped: longer than 1000 tokens (--max-tokens); the first: rows.jsonl:11",
                 "data   2 rows have the prompt of an earlier row and another answer; the first: rows.jsonl:5, as rows.jsonl:1"):
        assert any(found.startswith(line) for found in said), line
    assert len(said) <= 13
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "Data" in page.headings and "5; the first: rows.jsonl:3, as rows.jsonl:1" in page.text and "4 dropped" in page.text
    assert page.text.count("Rows by their tokens") == 1


def test_rows_with_nothing_remarkable_get_one_line(demo, tokenizer):
    [line] = headlines(statistics_of(demo / "rows.jsonl", tokenizer))
    assert re.fullmatch(r"longest row rows\.jsonl:\d+, \d+ tokens; rows in steps of 32 share \d+% of their tokens as prefixes", line)


def test_statistics_in_the_data_json_of_an_older_run_are_still_described(demo, tokenizer):
    found = statistics_of(demo / "rows.jsonl", tokenizer)
    older = {"beginnings" if key == "shared_prefixes" else key: value for key, value in found.items()}
    assert "beginnings" in older and describe(older) == describe(found) and headlines(older) == headlines(found)


def test_hostile_rows_get_into_the_page_as_text(tmp_path, tokenizer):
    hostile = HOSTILE.replace("\ud83d", "")                            # half a character makes a row unreadable
    tool = {"name": hostile, "description": hostile, "parameters": {hostile: {"type": hostile}}}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (row(hostile, call(hostile), tools=[tool]), {hostile: 1},
                                                                                      row("x", call(hostile + "y"), tools=[tool]))))
    found = statistics_of(tmp_path / "rows.jsonl", tokenizer, 100_000)
    page = Page(report.write_data_report(tmp_path, hostile, found).read_text(encoding="utf-8"))
    assert found["kept"] == 1 and not {"script", "img"} & {tag for tag, _ in page.tags} and not [a for _, a in page.tags if "onerror" in a]
    assert not set("\u202e\x00\x1b") & set(page.source) and "<script>alert(1)</script>" in page.text
