"""generate.py: the calls that answer a query, and a session in the terminal."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import generate as module
from tokenizer import Tokenizer, render


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "tools.json"
    path.write_text(json.dumps([{"name": "get_weather", "description": "Weather", "parameters": {"city": {"type": "str"}}}]))
    return str(path)


def test_the_command_prints_calls_as_json(demo, tools, capsys):
    command = ["--model", str(demo / "model"), "--tools", tools, "--max-new-tokens", "8", "weather in Rome?"]
    assert module.main(module.parse_args(command)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [] and "no call; the model says" in err              # an untrained model
    assert module.main(module.parse_args([*command, "--raw"])) == 0
    assert not capsys.readouterr().err


def test_a_session_goes_on_until_its_input_ends(demo, tools):
    command = [sys.executable, "generate.py", "--model", str(demo / "model"), "--tools", tools, "--max-new-tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input="weather in Rome?\n\nand in Oslo?\n")
    assert done.returncode == 0 and done.stdout.count("model>") == 2, done.stderr


def test_a_session_passes_what_a_tool_returns_back_to_the_model(capsys, monkeypatch):
    typed = iter(["weather in Rome?", '{"degrees": 21}', "thanks", ""])
    said = iter(["<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call><start_function_response>",
                 "It is 21 degrees.<end_of_turn>", "You are welcome.<end_of_turn>"])
    heard: list[list[dict]] = []

    def read_line(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)
    module.session(lambda messages: heard.append([dict(m) for m in messages]) or next(said), [], raw=False)
    out = capsys.readouterr().out
    assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in out and "It is 21 degrees." in out
    assert heard[1][-1] == {"role": "tool", "content": [{"name": "get_weather", "response": {"degrees": 21}}]}
    assert heard[2][-2:] == [{"role": "assistant", "content": "It is 21 degrees."}, {"role": "user", "content": "thanks"}]


@pytest.mark.parametrize(("args", "message"), [
    (["--model", "DEMO", "--tools", "absent.json", "hi"], "absent.json: no such file"),
    (["--model", "DEMO", "--adapter", "absent", "hi"], "absent/adapter_config.json: no such file"),
    (["hi"], "name a model"),
])
def test_errors_name_the_place_and_the_remedy(demo, args, message):
    with pytest.raises((ValueError, OSError), match=message):
        module.main(module.parse_args([str(demo / "model") if arg == "DEMO" else arg for arg in args]))


@pytest.mark.parametrize(("typed", "rendered"), [
    ("[1, 2]", "response:f{value:[1,2]}"), ("[]", "response:f{value:[]}"), ("", "response:f{value:None}"), ("sunny", "response:f{value:<escape>sunny<escape>}"),
    ('{"name": "Bo", "response": "ok"}', "response:f{name:<escape>Bo<escape>,response:<escape>ok<escape>}")])
def test_what_is_pasted_is_one_response_whatever_its_shape(typed, rendered, monkeypatch):
    lines = iter(["go", typed])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    heard: list[list[dict]] = []

    def ask(messages):
        heard.append([dict(m) for m in messages])
        if len(heard) == 2:
            raise EOFError
        return "<start_function_call>call:f{}<end_function_call><start_function_response>"

    module.session(ask, [], raw=False)
    assert render(heard[1]).count("<start_function_response>") == 1 and rendered in render(heard[1])


def test_calls_beside_something_unreadable_are_not_printed(demo, tools, monkeypatch, capsys):
    text = "<start_function_call>call:f{}<end_function_call><start_function_call>call:send{text:<escape>cut off"
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: text)
    assert module.main(module.parse_args(["--model", str(demo / "model"), "--tools", tools, "--max-new-tokens", "1", "hi"])) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == [] and "no closing <escape>" in err


def test_flags_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit):
        module.parse_args(["--model", "x", "--top-p", "0", "hi"])
    assert "--top-p in (0, 1]" in capsys.readouterr().err
