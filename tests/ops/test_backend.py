"""ops/backend.py: which backend is chosen for which device, dtype and sizes, and that a model passes it on."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora import LoRAConfig, LoRAMLP, wrap
from model import MLP, Gemma3, GemmaConfig, Linear, RMSNorm
from ops import attention, cross_entropy, geglu, rms_norm, weight_grad
from ops.backend import Backends, choose_backends
from storage.pretrained import load_model
from training.distributed import decoding_copy

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALL_CPP = Backends("cpp", "cpp", "cpp", "cpp", "cpp")
TRITON = Backends("triton", "triton", "triton", "triton")
SMALL = GemmaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=32)


@pytest.fixture
def card(monkeypatch):
    """From now on there is a card that Triton runs on, with this much shared memory, in KiB."""
    def make(shared_kib=227):
        monkeypatch.setattr("ops.backend.can_run", lambda device: device.index == 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=shared_kib * 1024))
    return make


@pytest.fixture
def cpp(monkeypatch):
    """From now on the C++ is preferred."""
    monkeypatch.setattr("ops.cpu.build.is_preferred", lambda: True)


@pytest.mark.parametrize(("dtype", "attends"), [(torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "torch")])
def test_a_card_computes_by_triton(card, dtype, attends):
    card()
    assert choose_backends(CUDA, dtype, GemmaConfig()) == replace(TRITON, attention=attends)
    assert choose_backends(CUDA, dtype, GemmaConfig(), compiled=True) == replace(TRITON, attention=attends)


@pytest.mark.parametrize("sizes", [{"head_dim": 24}, {"head_dim": 512}, {"num_attention_heads": 3}, {"num_attention_heads": 16}])
def test_attention_of_other_heads_is_pytorchs(card, sizes):
    card()
    assert choose_backends(CUDA, torch.bfloat16, GemmaConfig(**sizes)) == replace(TRITON, attention="torch")


def test_attention_needs_shared_memory(card):
    for shared_kib, attends in ((163, "triton"), (162, "torch")):
        card(shared_kib)
        assert choose_backends(CUDA, torch.bfloat16, GemmaConfig()).attention == attends


def test_pytorch_computes_where_triton_cannot(card):
    card()
    assert choose_backends(torch.device("cuda", 1), torch.bfloat16, GemmaConfig()) == Backends()
    assert choose_backends(CUDA, torch.float64, GemmaConfig()) == Backends()
    assert choose_backends(torch.device("meta"), torch.bfloat16, GemmaConfig()) == Backends()


@pytest.mark.parametrize(("dtype", "preferred", "compiled", "backends"), [
    (torch.float32, True, False, Backends()), (torch.bfloat16, False, False, Backends()), (torch.bfloat16, True, False, ALL_CPP),
    (torch.bfloat16, True, True, ALL_CPP), (torch.bfloat16, False, True, Backends(rms_norm="compiled", geglu="compiled")),
    (torch.float32, True, True, Backends(rms_norm="compiled", geglu="compiled"))])
def test_a_cpu_computes_bf16_by_cpp_where_that_is_preferred_and_the_rest_by_pytorch(monkeypatch, dtype, preferred, compiled, backends):
    monkeypatch.setattr("ops.cpu.build.is_preferred", lambda: preferred)
    assert choose_backends(CPU, dtype, GemmaConfig(), compiled) == backends


@pytest.mark.parametrize(("sizes", "by_pytorch"), [
    ({"head_dim": 16}, {"attention", "rms_norm"}), ({"hidden_size": 48}, {"rms_norm", "cross_entropy"}), ({"vocab_size": 100}, {"cross_entropy"}),
    ({"intermediate_size": 40}, {"geglu", "weight_grad"}), ({"head_dim": 72, "num_attention_heads": 2}, {"attention", "rms_norm", "weight_grad"})])
def test_cpp_computes_what_its_vectors_divide(cpp, sizes, by_pytorch):
    backends = choose_backends(CPU, torch.bfloat16, replace(SMALL, **sizes))
    assert backends == replace(ALL_CPP, **dict.fromkeys(by_pytorch, "torch"))


@pytest.mark.parametrize("module", [attention, cross_entropy, geglu, rms_norm, weight_grad])
def test_every_name_that_is_chosen_is_in_the_operations_table(module):
    name = module.__name__.removeprefix("ops.")
    for backends in (Backends(), ALL_CPP, TRITON, Backends(rms_norm="compiled", geglu="compiled")):
        assert getattr(backends, name) in module.BACKENDS


def test_an_unknown_backend_is_refused():
    x = torch.zeros(3, 32)
    for call in (lambda: rms_norm.rms_norm(x, x[0], 1e-6, backend="numpy"), lambda: geglu.geglu(x, x, "numpy"), lambda: weight_grad.weight_grad(x, x, backend="numpy"),
                 lambda: cross_entropy.linear_cross_entropy(x, x, torch.zeros(3).long(), backend="numpy")):
        with pytest.raises(ValueError, match=r"no backend 'numpy' for this operation; it has .*cpp, .*torch"):
            call()


def test_a_model_is_built_for_the_default_device_or_as_it_is_told(cpp):
    assert Gemma3(SMALL, torch.bfloat16).backends == ALL_CPP and Gemma3(SMALL).backends == Backends()
    with torch.device("meta"):
        assert Gemma3(SMALL, torch.bfloat16).backends == Backends()
        assert Gemma3(SMALL, torch.bfloat16, TRITON).backends == TRITON


def test_each_module_of_a_model_has_its_backends(cpp):
    model = Gemma3(SMALL, torch.bfloat16)
    for backends in (ALL_CPP, TRITON):
        model.set_backends(backends)
        modules = [module for module in model.modules() if isinstance(module, RMSNorm | MLP | Linear)]
        assert len(modules) == 2 * (6 + 1 + 7) + 1 and all(module.backends == backends for module in modules)
    wrap(model, LoRAConfig(rank=2))
    gates = [module for module in model.modules() if isinstance(module, LoRAMLP)]
    assert len(gates) == 2 and all(gate.backends == TRITON for gate in gates)
    model.set_backends(Backends())
    assert all(gate.backends == Backends() for gate in gates) and copy.deepcopy(model).backends == Backends()


def test_a_loaded_model_and_its_copy_for_decoding_have_the_devices_backends(demo, monkeypatch):
    asked = []
    monkeypatch.setattr("storage.pretrained.choose_backends", lambda *what: asked.append(what) or TRITON)
    model = load_model(demo / "model", torch.bfloat16, compiled=True)
    assert asked == [(CPU, torch.bfloat16, model.config, True)]
    assert model.backends == TRITON and decoding_copy(model).backends == TRITON
