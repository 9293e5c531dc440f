"""ops/disk_cache.py: what is remembered from one start to the next."""
import json

import pytest
import torch

from ops.disk_cache import remembered


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A graphics card by name alone, and a folder to remember in."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setenv("NANO_FUNCTIONGEMMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_value_is_made_once_for_a_key_and_a_card(card, monkeypatch):
    made = []

    def ask(*key):
        return remembered("times", torch.device("cuda"), key, lambda: made.append(key) or {"ms": [len(made), 0.5]})

    assert ask(1, "bf16") == ask(1, "bf16") == {"ms": [1, 0.5]}
    assert ask(2, "bf16") == {"ms": [2, 0.5]} and len(made) == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    assert ask(1, "bf16") == {"ms": [3, 0.5]}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"for": "something else", "value": {}}'])
def test_a_torn_or_foreign_file_is_made_anew(card, content):
    def ask():
        return remembered("times", torch.device("cuda"), [1], lambda: {"ms": 1})
    ask()
    [file] = card.glob("*.json")
    file.write_text(content)
    assert ask() == {"ms": 1} and json.loads(file.read_text())["value"] == {"ms": 1}


def test_a_folder_that_cannot_be_written_costs_time_alone(card):
    card.parent.joinpath("cache").write_text("a file in the folder's place")
    assert remembered("times", torch.device("cuda"), [1], lambda: {"ms": 1}) == {"ms": 1}
