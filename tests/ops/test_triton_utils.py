"""ops/triton_utils.py: where kernels run, and which configurations are tried."""
import pytest
import torch

from lora_kernels import _forward_kernel
from ops import triton_utils
from ops.triton_utils import can_run, fitting


@pytest.mark.skipif(triton_utils.triton is None, reason="no Triton for this platform")
def test_kernels_run_on_the_current_device_alone(monkeypatch):
    monkeypatch.setattr(triton_utils, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [can_run(torch.device(name)) for name in ("cuda", "cuda:0", "cuda:1", "cpu")] == [True, False, True, False]


@pytest.mark.skipif(triton_utils.triton is None, reason="no Triton for this platform")
def test_registers_are_capped_where_that_lets_two_programs_share_a_multiprocessor(monkeypatch):
    monkeypatch.setattr(triton_utils, "INTERPRETED", False)
    tiles = triton_utils.tile_sizes(("BLOCK_M", "BLOCK_O"), (128, 128, 8, 3, 128), (128, 128, 8, 3))
    configs = triton_utils.tuned(tiles, (), _forward_kernel.fits)(_forward_kernel.fn).configs
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

    configs = [triton_utils.triton.Config({"BLOCK_M": m, "BLOCK_O": o, "BLOCK_I": 64}, num_warps=8) for m, o in
               ((128, 256), (128, 128), (64, 64))]
    assert tiles((9, 0)) == [32768, 16384, 4096] and tiles((8, 0)) == [16384, 4096]
    assert tiles((9, 0), GEGLU=True) == [16384, 4096] and tiles((9, 0), PRECISION="ieee") == [4096]
    assert tiles((8, 0), GEGLU=True, BLOCK_R=128) == [4096]                # nothing fits: the smallest


@pytest.mark.skipif(triton_utils.triton is None, reason="no Triton for this platform")
def test_tuning_is_short_in_tests(monkeypatch):
    asked = {}
    monkeypatch.setattr(triton_utils.triton.testing, "do_bench", lambda call, **options: asked.update(options) or [1.0, 1.0])
    assert triton_utils.milliseconds(lambda: None) == 1.0
    assert asked["warmup"] + asked["rep"] <= 2
