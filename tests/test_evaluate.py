"""evaluate.py: a model's answers to many rows, and the command."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import torchrun
from sample_rows import BOOKING_TOOLS as TOOLS
from sample_rows import call

import evaluate as module
import train
from dataset.rows import parse_row, read_rows
from evaluate import evaluate
from storage.pretrained import load_model
from tokenizer import Tokenizer, render


@pytest.fixture
def rows(demo):
    return list(read_rows([demo / "rows.jsonl"]))[:12]


@pytest.fixture
def parrot(monkeypatch, demo):
    """Lets every row's prompt be answered by a given text."""
    tokenizer = Tokenizer.load(demo / "model")

    def install(texts):
        def stream(_model, prompts, *_args, **_options):
            for i in reversed(range(len(prompts))):
                yield i, tokenizer.encode(texts[i], control=True)
        monkeypatch.setattr(module, "stream", stream)
        return tokenizer
    return install


def wanted_text(row) -> str:
    whole, prompt = ("".join(s.text for s in segments) for segments in (row.segments(), row.prompt()))
    return whole[len(prompt):]


def test_saying_what_is_wanted_scores_one_and_saying_nothing_zero(parrot, rows):
    tokenizer = parrot([wanted_text(row) for row in rows])
    good = evaluate(None, tokenizer, rows)
    assert good["exact_match"] == good["ast_match"] == good["name_accuracy"] == good["argument_recall"] == 1.0 and not good["causes"]
    assert [a["source"] for a in good["answers"]] == [row.source for row in rows] and all(a["given"] == a["expected"] for a in good["answers"])
    parrot(["<end_of_turn>"] * len(rows))
    bad = evaluate(None, tokenizer, rows)
    assert bad["exact_match"] == bad["name_accuracy"] == 0.0 and bad["causes"] == {"no call": len(rows)} and bad["argument_precision"] is None


def test_files_are_told_apart(parrot, rows):
    rows = [replace(row, source=f"{'a' if i < 4 else 'b'}.jsonl:{i}") for i, row in enumerate(rows)]
    tokenizer = parrot([wanted_text(row) if i < 4 else "<eos>" for i, row in enumerate(rows)])
    got = evaluate(None, tokenizer, rows)
    assert got["files"]["a.jsonl"]["exact_match"] == 1.0 and got["files"]["b.jsonl"]["exact_match"] == 0.0
    assert got["files"]["b.jsonl"]["rows"] == len(rows) - 4 and 0 < got["exact_match"] < 1


def test_garbage_of_an_untrained_model_is_no_crash(demo, rows):
    model, tokenizer = load_model(demo / "model", torch.float32), Tokenizer.load(demo / "model")
    got = evaluate(model, tokenizer, rows, max_new_tokens=20)
    assert got["rows"] == len(rows) and got["exact_match"] == 0.0 and sum(got["causes"].values()) == len(rows)


def test_rows_without_tools_and_rows_without_calls(demo):
    rows = [parse_row({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, "a:1"),
            parse_row({"query": "hi", "tools": [], "answers": []}, "a:2")]
    got = evaluate(load_model(demo / "model", torch.float32), Tokenizer.load(demo / "model"), rows, max_new_tokens=4)
    assert got["no_call_rows"] == 2 and got["correct_silence"] == 1.0


def conversation(*turns):
    """A conversation of texts, which the user and the model say in turn, and of calls (dicts), which are answered."""
    messages = []
    for turn in turns:
        if isinstance(turn, dict):
            messages += [{"role": "assistant", "tool_calls": [{"function": turn}]}, {"role": "tool", "name": turn["name"], "content": {"ok": True}}]
        else:
            messages.append({"role": "user" if not messages or messages[-1]["role"] == "assistant" else "assistant", "content": turn})
    return parse_row({"messages": messages, "tools": TOOLS}, "a.jsonl:7")


def test_every_turn_with_calls_is_asked_after_what_was_truly_said(monkeypatch, demo):
    tokenizer, seen = Tokenizer.load(demo / "model"), []
    row = conversation("Rome?", call(city="Rome"), call("cancel"), "Done.", "Oslo?", call(city="Oslo"), "Booked.")
    said = [answer(call(city="Rome")), answer(call("cancel")), answer(call(city="Rom"))]

    def stream(_model, prompts, _limits, **_options):
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return ((i, tokenizer.encode(text, control=True)) for i, text in enumerate(said))
    monkeypatch.setattr(module, "stream", stream)
    got = evaluate(None, tokenizer, [row])
    whole = render(row.messages, row.tools)
    assert all(whole.startswith(prompt) for prompt in seen) and [whole[len(prompt):].split("{")[0] for prompt in seen] == [
        f"<start_function_call>call:{name}" for name in ("book", "cancel", "book")]
    assert [a["source"] for a in got["answers"]] == ["a.jsonl:7", "a.jsonl:7, turn 2", "a.jsonl:7, turn 4"]
    assert [(a["query"], a["exact"]) for a in got["answers"]] == [("Rome?", True), ("Rome?", True), ("Oslo?", False)]
    assert got["rows"] == 3 and got["causes"] == {"wrong argument": 1} and "files" not in got


def answer(given):
    text = render([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": given}]}])
    return text.split("<start_of_turn>model\n")[1]


def test_a_row_that_wants_a_text_or_silence_is_right_without_a_call(parrot):
    rows = [parse_row({"query": "hi", "tools": TOOLS, "answers": answers}, f"a:{i}") for i, answers in enumerate(("I book rooms.", "I book rooms.", [], []))]
    tokenizer = parrot(["I book rooms.<end_of_turn>", answer(call(city="Rome")), "<end_of_turn>", "Sorry?<end_of_turn>"])
    got = evaluate(None, tokenizer, rows)
    assert [a["exact"] for a in got["answers"]] == [True, False, True, True]
    assert got["correct_silence"] == 0.75 and got["no_call_rows"] == 4 and got["causes"] == {"unwanted call": 1}


def test_xlam_columns_may_accept_several_values(parrot):
    rows = [parse_row({"query": "go", "tools": TOOLS, "ground_truth": [{"book": {"city": ["New York", "NYC"], "nights": [2, ""]}}]}, f"a:{i}") for i in range(3)]
    got = evaluate(None, parrot([answer(call(city="NYC")), answer(call(city="New York", nights=2)), answer(call(city="LA"))]), rows)
    assert [a["exact"] for a in got["answers"]] == [True, True, False]


def test_the_command_writes_its_figures(demo, tmp_path, capsys):
    command = ["--model", str(demo / "model"), "--data", str(demo / "rows.jsonl"), "--limit", "3", "--held-out", "0.5", "--json",
               str(tmp_path / "new" / "result.json")]
    assert module.main(module.parse_args(command)) == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["rows"] == 3 and {"exact_match", "ast_match", "name_accuracy", "parse_failures"} <= set(result)
    assert "exact match" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of its 600 rows is left to evaluate on"):
        module.main(module.parse_args([*command[:4], "--held-out", "1e-9"]))
    with pytest.raises(ValueError, match="is a folder; --json names a file"):
        module.main(module.parse_args([*command[:4], "--json", str(tmp_path)]))
    with pytest.raises(SystemExit):
        module.parse_args([*command[:4], "--held-out", "5"])


def test_the_rows_held_out_are_those_that_training_leaves_out(demo, tmp_path, capsys):
    """evaluate --held-out F and train.py --eval-fraction F part the rows at the same place."""
    train.main(train.parse_args(["--model", str(demo / "model"), "--data", str(demo / "rows.jsonl"), "--eval-fraction", "0.1", "--data-cache", "", "--steps", "0",
                                 "--out", str(tmp_path / "run")]))
    held_out = int(capsys.readouterr().out.split(" rows to train on, ")[1].split()[0])
    module.main(module.parse_args(["--model", str(demo / "model"), "--data", str(demo / "rows.jsonl"), "--held-out", "0.1", "--max-new-tokens",
                                   "1", "--json", str(tmp_path / "result.json")]))
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == held_out


def test_several_processes_share_the_rows_and_find_what_one_finds(demo, tmp_path):
    flags = ["--model", str(demo / "model"), "--data", str(demo / "rows.jsonl"), "--limit", "5", "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "8"]
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    assert module.main(module.parse_args([*flags, "--json", str(alone)])) == 0
    done = torchrun(2, "evaluate.py", *flags, "--json", together)
    assert done.returncode == 0 and done.stdout.count("exact match") == 1, done.stderr
    mine, theirs = (json.loads(path.read_text()) for path in (alone, together))
    assert len(mine["answers"]) == 5 and mine["answers"] == theirs["answers"]
    assert all(mine[key] == theirs[key] for key in ("exact_match", "causes", "generated_tokens", "prompt_tokens"))
