"""What counts as a right call, why an answer is none, and the figures over many."""
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import torchrun

import evaluate as module
import train
from checkpoint import load_model
from dataset.rows import parse_row, read_rows
from evaluate import accepted_values, accepts, evaluate, interval, score, table
from tokenizer import Tokenizer, parse_calls, render

TOOLS = [{"type": "function", "function": {"name": "book", "description": "", "parameters": {
    "type": "object", "required": ["city"],
    "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}, "price": {"type": "number"}, "pets": {"type": "boolean"},
                   "tags": {"type": "array", "items": {"type": "string"}}, "area": {"type": "array", "items": {"type": "number"}},
                   "guest": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "number"}}}}}}},
         {"type": "function", "function": {"name": "cancel", "description": "", "parameters": {"type": "object", "properties": {}}}}]


def call(name="book", /, **arguments):
    return {"name": name, "arguments": arguments}


def judged(wanted, given, unread=()):
    return score([accepted_values(w) if "arguments" in w else w for w in wanted], given, TOOLS, unread)


@pytest.mark.parametrize(("wanted", "given", "exact", "ast"), [
    (call(city="Rome"), call(city="Rome"), True, True),
    (call(city="New York"), call(city="new-york"), False, True),               # case, space, punctuation
    (call(city="it's"), call(city='it"s'), False, True),
    (call(city="Rome"), call(city="Rom"), False, False),
    (call(city="a", price=5), call(city="a", price=5.0), False, True),         # an int and a declared float
    (call(city="a", price=5.0), call(city="a", price=5), False, True),
    (call(city="a", nights=5), call(city="a", nights=5.0), False, False),      # but not the other way round
    (call(city="a", nights=5), call(city="a", nights="5"), False, False),
    (call(city="a", nights="5"), call(city="a", nights="5"), True, True),      # a row that breaks its own declaration
    (call(city="a", pets=True), call(city="a", pets=1), False, False),
    (call(city="a", nights=1), call(city="a", nights=True), False, False),
    (call(city="a", pets=True), call(city="a", pets=True), True, True),
    (call(city="a", tags=["x", "y"]), call(city="a", tags=["X", "y"]), False, True),
    (call(city="a", tags=["x", "y"]), call(city="a", tags=["y", "x"]), False, False),
    (call(city="a", tags=["x"]), call(city="a", tags=["x", "x"]), False, False),
    (call(city="a", area=[1, 2.5]), call(city="a", area=[1.0, 2.5]), False, True),
    (call(city="a", guest={"name": "Bo", "age": 3}), call(city="a", guest={"age": 3.0, "name": "bo"}), False, True),
    (call(city="a", guest={"name": "Bo"}), call(city="a", guest={"name": "Bo", "age": 1}), False, False),
    (call(city="a", guest={"name": "Bo", "age": 1}), call(city="a", guest={"name": "Bo"}), False, False),
    (call(city="a", guest={"name": "Bo"}), call(city="a", guest="Bo"), False, False),
    (call(city="a", nights=None), call(city="a", nights=None), True, True),
    (call(city="a", undeclared=1), call(city="a", undeclared=1), True, True),
    (call(city=""), call(city=""), True, True),
    (call("cancel"), call("cancel"), True, True),
    (call("cancel"), call("Cancel"), False, False),                            # a name is a name
    (call(city="a", price=10 ** 400), call(city="a", price=10 ** 400), True, True),
    (call(city="a", price=1e20), call(city="a", price=1e20), True, True),
    (call(city="a", price=0.0), call(city="a", price=-0.0), True, True),
])
def test_a_call_is_right_by_the_letter_or_by_the_leaderboard_s_rules(wanted, given, exact, ast):
    got = judged([wanted], [given])
    assert (got.exact, got.ast) == (exact, ast)
    assert (got.fault is None) == ast


@pytest.mark.parametrize(("wanted", "given", "unread", "cause", "detail"), [
    ([call(city="Rome")], [], [], "no call", ""),
    ([call(city="Rome")], [], ["call at character 0: …"], "unparsable", "character 0"),
    ([call(city="Rome")], [call(city="Rome")], ["call at character 90: …"], "unparsable", "character 90"),
    ([call(city="Rome")], [call("cancel")], [], "wrong function", "cancel, wanted book"),
    ([call(city="Rome")], [call(nights=2)], [], "missing argument", "city"),
    ([call(city="Rome", nights=2)], [call(city="Rome")], [], "missing argument", "nights"),
    ([call(city="Rome")], [call(city="Rome", nights=2)], [], "extra argument", "nights is 2"),
    ([call(city="Rome")], [call(city="Rome", colour="red")], [], "extra argument", "colour"),
    ([call(city="Rome")], [call(city=3)], [], "wrong type", 'city is 3, wanted "Rome"'),
    ([call(city="Rome")], [call(city="Oslo")], [], "wrong argument", 'city is "Oslo", wanted "Rome"'),
    ([call(city="Rome")], [call(city="Rome")] * 2, [], "wrong count", "2 calls, wanted 1"),
    ([call(city="Rome")], [call(city="Rome")] * 2, ["call at character 90: …"], "wrong count", "2 calls, wanted 1"),
    ([], [call("cancel")], [], "unwanted call", "cancel"),
    ([], [], ["call at character 0: …"], "unparsable", "character 0"),
])
def test_every_miss_has_a_cause(wanted, given, unread, cause, detail):
    got = judged(wanted, given, unread)
    assert not got.ast and not got.exact and got.fault.cause == cause and detail in got.fault.detail
    assert cause in module.CAUSES


def test_parallel_calls_match_in_any_order_but_none_twice():
    a, b = call(city="Rome"), call(city="Oslo")
    assert judged([a, b], [b, a]).exact
    assert judged([a, a], [a, b]).fault.cause == "wrong argument"
    assert judged([a, b, a], [a, a, b]).exact


def test_pairs_are_found_where_taking_the_first_that_fits_fails():
    loose, strict = {"book": {"city": ["Rome", "Oslo"]}}, {"book": {"city": ["Rome"]}}
    assert judged([loose, strict], [call(city="Rome"), call(city="Oslo")]).exact


def test_several_accepted_values_and_arguments_that_may_be_left_out():
    truth = {"book": {"city": ["New York", "NYC"], "nights": [2, ""], "guest": [{"name": ["Bo", "Bob"], "age": [3, ""]}, ""]}}
    for given, right in ((call(city="NYC"), True), (call(city="nyc", nights=2), True), (call(city="LA"), False), (call(nights=2), False),
                         (call(city="NYC", nights=3), False), (call(city="NYC", guest={"name": "Bob"}), True),
                         (call(city="NYC", guest={"name": "Al"}), False), (call(city="NYC", guest={"age": 3}), False)):
        assert judged([truth], [given]).ast == right, given


@pytest.mark.parametrize("given", ["", "-", "abc"])
def test_an_empty_text_among_other_values_says_only_that_it_may_be_left_out(given):
    truth = {"book": {"city": ["Rome"], "nights": [2, ""]}}
    got = judged([truth], [call(city="Rome", nights=given)])
    assert not got.ast and not got.exact and got.fault.cause == "wrong type"
    assert judged([{"book": {"city": ["Rome", ""]}}], [call(city="")]).ast         # among texts it is one of them


def test_recall_counts_an_optional_argument_where_it_was_given():
    with_optional = judged([{"book": {"city": ["Rome"], "nights": [2, ""]}}], [call(city="Rome", nights=2)])
    missing = judged([call(city="Rome")], [call()])
    got = module.summary([with_optional, missing])
    assert got["argument_recall"] == 2 / 3 and got["argument_precision"] == 1.0


def test_a_required_argument_must_be_there_even_where_the_answer_does_not_ask_for_it():
    assert judged([{"book": {"city": ["Rome", ""]}}], [call()]).fault.cause == "missing argument"


def test_silence_is_right_where_no_call_is_wanted():
    assert judged([], []).exact and judged([], []).ast and judged([], []).names


def test_arguments_are_counted_call_by_call():
    got = judged([call(city="Rome", nights=2), call("cancel")], [call(city="Rome", nights=3, pets=True)])
    assert (got.right_arguments, got.given_arguments, got.wanted_arguments) == (1, 3, 2)
    assert not got.names


def test_what_was_written_by_the_template_is_an_exact_match_when_read_back():
    """Whatever a row wants, saying just that is right."""
    for value in ("x", "", "É ü", 3, -1, 2.5, 1e20, -0.0, True, None, [], [1, [2]], {}, {"a": {"b": [None, False]}}, 10 ** 30):
        wanted = call("f", p=value)
        text = render([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": wanted}]}])
        calls = parse_calls(text)
        assert score([accepted_values(wanted)], calls, [], calls.unread).exact, value


def test_hostile_declarations_are_no_crash():
    for parameters in ({}, {"properties": None}, {"properties": {"p": None}}, {"properties": {"p": {"type": ["string", "null"]}}},
                       {"properties": {"p": {"type": "array", "items": "string"}}}, {"required": "p"}, {"required": [["p"]]}, {"required": ["q"]}):
        tools = [{"function": {"name": "f", "parameters": parameters}}]
        assert score([accepted_values(call("f", p=["x"]))], [call("f", p=["x"])], tools).ast
    assert not accepts({"a": [1]}, {"b": 1}, {"properties": 3}, exact=False)
    assert not accepts(float("nan"), float("nan"), {}, exact=True)


# ---------------------------------------------------------------------------------------------------------------------
# Over many rows


def test_figures_over_rows_are_the_shares_counted_by_hand():
    scores = [judged([call(city="Rome")], [call(city="Rome")]), judged([call(city="Rome")], [call(city="rome")]),
              judged([call(city="Rome")], [call(city="Oslo")]), judged([call(city="Rome")], [], ["?"]), judged([], []), judged([], [call("cancel")])]
    got = module.summary(scores)
    assert got["rows"] == 6 and got["counts"] == {"exact_match": 2, "ast_match": 3, "name_accuracy": 4}
    assert got["exact_match"] == 2 / 6 and got["ast_match"] == 3 / 6 and got["name_accuracy"] == 4 / 6
    assert got["parse_failures"] == 1 / 6 and got["no_call_rows"] == 2 and got["correct_silence"] == 1 / 2
    assert got["argument_precision"] == 2 / 3 and got["argument_recall"] == 2 / 4
    assert got["causes"] == {"unparsable": 1, "wrong argument": 1, "unwanted call": 1}
    assert "33.3%" in table({"all": got}) and "missed: wrong argument" in table({"all": got})


def test_the_interval_holds_the_share_and_shrinks_with_the_rows():
    few, many = interval([True] * 5 + [False] * 5), interval([True] * 500 + [False] * 500)
    assert few[0] < 0.5 < few[1] and many[0] < 0.5 < many[1]
    assert math.isclose(many[1] - many[0], 2 * 1.96 * 0.5 / math.sqrt(1000), rel_tol=0.1)
    assert interval([]) is None and interval([True] * 3) == [1.0, 1.0]


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


def test_types_in_capitals_are_the_same_types():
    parameters = {"type": "OBJECT", "properties": {"price": {"type": "NUMBER"}}, "required": ["price"]}
    row = parse_row({"query": "go", "tools": [{"function": {"name": "f", "parameters": parameters}}], "answers": [call("f", price=5)]}, "a:1")
    assert score([accepted_values(call("f", price=5.0))], [call("f", price=5)], row.tools).ast


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
