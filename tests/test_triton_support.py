"""triton_support.py: what is remembered on disk, and which configurations are tried."""
import json

import pytest
import torch

import triton_support
from lora_kernels import _forward_kernel
from triton_support import can_run, fitting, remembered


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


@pytest.mark.skipif(triton_support.triton is None, reason="no Triton for this platform")
def test_kernels_run_on_the_current_device_alone(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [can_run(torch.device(name)) for name in ("cuda", "cuda:0", "cuda:1", "cpu")] == [True, False, True, False]


@pytest.mark.skipif(triton_support.triton is None, reason="no Triton for this platform")
def test_registers_are_capped_where_that_lets_two_programs_share_a_multiprocessor(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    tiles = triton_support.tile_sizes(("BLOCK_M", "BLOCK_O"), (128, 128, 8, 3, 128), (128, 128, 8, 3))
    configs = triton_support.tuned(tiles, (), _forward_kernel.fits)(_forward_kernel.fn).configs
    usual = {"BLOCK_R": 16, "GEGLU": False, "DROPOUT": False, "PRECISION": "tf32"}

    def caps(capability, **arguments):
        fit = fitting(configs, _forward_kernel.fits, usual | arguments, capability)
        return [config.all_kwargs().get("maxnreg") for config in fit]
    assert caps((9, 0)) == [128, None] and caps((8, 0)) == [None]
    for more in ({"BLOCK_R": 32}, {"DROPOUT": True}, {"GEGLU": True}):
        assert caps((9, 0), **more) == [None]


def test_large_tiles_are_left_out_where_registers_are_few():
    def tiles(capability, **arguments):
        usual = {"BLOCK_R": 16, "GEGLU": False, "DROPOUT": False, "PRECISION": "tf32"}
        return [config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_O"] for config in
                fitting(configs, _forward_kernel.fits, usual | arguments, capability)]

    configs = [triton_support.triton.Config({"BLOCK_M": m, "BLOCK_O": o, "BLOCK_I": 64}, num_warps=8) for m, o in
               ((128, 256), (128, 128), (64, 64))]
    assert tiles((9, 0)) == [32768, 16384, 4096] and tiles((8, 0)) == [16384, 4096]
    assert tiles((9, 0), GEGLU=True) == [16384, 4096] and tiles((9, 0), PRECISION="ieee") == [4096]
    assert tiles((8, 0), GEGLU=True, BLOCK_R=128) == [4096]                # nothing fits: the smallest


@pytest.mark.skipif(triton_support.triton is None, reason="no Triton for this platform")
def test_tuning_is_short_in_tests(monkeypatch):
    asked = {}
    monkeypatch.setattr(triton_support.triton.testing, "do_bench", lambda call, **options: asked.update(options) or [1.0, 1.0])
    assert triton_support.milliseconds(lambda: None) == 1.0
    assert asked["warmup"] + asked["rep"] <= 2
