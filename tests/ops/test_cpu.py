"""ops/cpu/build.py and its C++: what is compiled and for which CPUs, and each function against the definition's own rounding.

Attention's is tested beside its other ways, in test_ops/attention.py.
"""
import os
import shutil
from functools import partial

import pytest
import test_cross_entropy
import test_geglu
import test_rms_norm
import torch
from conftest import NEEDS_CPP

import model
from ops.attention import attention
from ops.attention_tables import plan
from ops.backend import Backends
from ops.cpu import build
from ops.cpu.build import compiled
from ops.cross_entropy import IGNORE, linear_cross_entropy
from ops.geglu import geglu
from ops.rms_norm import rms_norm
from ops.weight_grad import weight_grad, weight_grad_reference

gate_by_cpp = partial(geglu, backend="cpp")
loss_by_cpp = partial(linear_cross_entropy, backend="cpp")
NEEDS_GXX = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="SKIPPED: no g++")


@pytest.fixture
def cpp(monkeypatch, tmp_path):
    """A small C++ file, on a CPU that passes for one with AVX512-BF16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setenv("NANO_FUNCTIONGEMMA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    return source


@NEEDS_GXX
def test_a_cpp_file_is_compiled_once(cpp, monkeypatch):
    assert compiled(cpp).twice(21) == 42
    [library] = (cpp.parent / "cache").iterdir()
    made = library.stat().st_mtime_ns
    assert compiled(cpp).twice(4) == 8 and library.stat().st_mtime_ns == made
    cpp.write_text(cpp.read_text().replace("2 *", "3 *"))
    assert compiled(cpp).twice(4) == 12 and len(list((cpp.parent / "cache").iterdir())) == 2


@NEEDS_GXX
@pytest.mark.parametrize("how", ["another's", "others may write it"])
def test_a_library_that_another_may_have_written_is_not_run(cpp, monkeypatch, how):
    compiled(cpp)
    [library] = (cpp.parent / "cache").iterdir()
    library.unlink()
    library.write_bytes(b"foreign")
    library.chmod(0o700)
    if how == "another's":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        library.chmod(0o720)
    assert compiled(cpp).twice(21) == 42 and library.stat().st_mode & 0o777 == 0o700


@NEEDS_GXX
def test_a_cpp_file_that_cannot_be_compiled_or_kept_is_left_out_with_a_warning(cpp):
    cpp.write_text("no C++")
    with pytest.warns(UserWarning, match=r"small\.cpp is left out, .*: .*error: "):
        assert compiled(cpp) is None
    assert not list((cpp.parent / "cache").iterdir())
    cpp.write_text("int sound;")
    (cpp.parent / "cache").rmdir()
    (cpp.parent / "cache").write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match="cache"):
        assert compiled(cpp) is None


def test_a_missing_compiler_is_told_of(cpp, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="it needs g\\+\\+, or \\$CXX.*no-such-compiler"):
        assert compiled(cpp) is None


def test_cpp_is_only_for_cpus_that_have_its_instructions(cpp, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert compiled(cpp) is None


@pytest.mark.parametrize("library", [None, "a library"])
@pytest.mark.parametrize("amx", [True, False])
def test_cpp_is_preferred_where_it_is_available_and_there_is_no_amx(monkeypatch, amx, library):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(build, "library", lambda: library)
    assert build.is_preferred() == (not amx and library is not None)


def test_without_a_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(build, "library", lambda: None)
    with pytest.raises(ValueError, match=r"needs a CPU with AVX512-BF16, and g\+\+ or \$CXX; use backend \"torch\""):
        geglu(*torch.zeros(2, 3, 16).bfloat16(), "cpp")


REFUSED = {
    "dtype": lambda: geglu(*torch.zeros(2, 3, 16), "cpp"),
    "width": lambda: geglu(*torch.zeros(2, 3, 24).bfloat16(), "cpp"),
    "strides": lambda: geglu(*torch.zeros(2, 16, 3).bfloat16().mT, "cpp"),
    "norm's width": lambda: rms_norm(torch.zeros(3, 48).bfloat16(), torch.zeros(48), 1e-6, backend="cpp"),
    "norm's residual": lambda: rms_norm(torch.zeros(3, 32).bfloat16(), torch.zeros(32), 1e-6, torch.zeros(3, 32), backend="cpp"),
    "vocabulary": lambda: linear_cross_entropy(torch.zeros(3, 32).bfloat16(), torch.zeros(24, 32), torch.zeros(3).long(), backend="cpp"),
    "weight's gradient": lambda: weight_grad(torch.zeros(3, 24).bfloat16(), torch.zeros(3, 16).bfloat16(), backend="cpp"),
    "its place": lambda: weight_grad(*torch.zeros(2, 3, 16).bfloat16(), torch.zeros(16, 16).bfloat16(), backend="cpp")}


@pytest.mark.parametrize("name", REFUSED)
def test_operands_that_cpp_does_not_take_are_refused_with_what_it_takes(name):
    with pytest.raises(ValueError, match=r'backend "cpp" takes bf16 on a CPU, .*; got torch\.'):
        REFUSED[name]()


@NEEDS_CPP
@pytest.mark.parametrize("M", [0, 1, 2, 37, 1024, 1025, 2500])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (64, 32), (80, 48), (208, 640)])
def test_a_weights_gradient_is_summed_in_fp32(M, outputs, inputs, generator, poisoned):
    dy, x = (torch.randn(M, width, generator=generator).bfloat16() for width in (outputs, inputs))
    exact = dy.double().T @ x.double()
    torch.testing.assert_close(weight_grad(dy, x, backend="cpp").double(), exact, rtol=1e-4, atol=1e-4)
    into = torch.randn(outputs, inputs, generator=generator)
    before = into.double()
    assert weight_grad(dy, x, into, add=True, backend="cpp") is into
    torch.testing.assert_close(into.double(), before + exact, rtol=1e-4, atol=1e-4)


@pytest.fixture
def called(monkeypatch):
    """The names of the functions that were called."""
    names, call = [], build.call
    monkeypatch.setattr(build, "call", lambda name, *operands: names.append(name) or call(name, *operands))
    return names


@NEEDS_CPP
def test_a_linear_of_fp32_masters_has_fp32s_gradient(generator, poisoned, called):
    linear = model.Linear(32, 48)
    linear.backends = Backends(weight_grad="cpp")
    wide, dy = (torch.randn(2700, width, generator=generator).bfloat16() for width in (40, 96))
    x = wide[:, :32].requires_grad_()
    linear(x).backward(dy[:, 48:])                                          # a part of a wider row, as the gate's half is
    exact = dy[:, 48:].double().T @ x.detach().double()
    assert called == ["weight_gradient"] and linear.weight.grad.dtype == torch.float32
    assert (linear.weight.grad - exact).norm() < 1e-5 * exact.norm()
    torch.testing.assert_close(x.grad, dy[:, 48:] @ linear.weight.detach().bfloat16())
    linear.weight.grad = None
    linear(x).sum().backward()                                              # an expanded number
    torch.testing.assert_close(linear.weight.grad, x.detach().float().sum(0).expand(48, 32), rtol=1e-4, atol=1e-3)
    frozen = model.Linear(32, 48).requires_grad_(False)
    frozen.backends = linear.backends
    frozen(x).backward(dy[:, 48:])
    assert called == ["weight_gradient"] * 2


NORMS = ["plain", "residual", "returned", "rotated", "one-head", "one-row"]


@NEEDS_CPP
@pytest.mark.parametrize("T", [2, 37, 600])
@pytest.mark.parametrize("kind", NORMS)
def test_the_norm_is_as_accurate_as_its_definition(kind, T, generator, poisoned, called):
    given = test_rms_norm.operands(kind, generator, torch.bfloat16, "cpu", T)
    for trained in (True, False):
        assert test_rms_norm.faults(test_rms_norm.by("cpp"), given, trained) == []
    assert called == ["norm_forward", "norm_backward"] * 2


@NEEDS_CPP
def test_the_gradients_of_both_uses_of_x_are_added_in_fp32_and_rounded_once(generator, poisoned, called):
    test_rms_norm.test_the_gradients_of_both_uses_of_x_are_added_in_fp32_and_rounded_once("cpu", torch.bfloat16, "cpp", generator)
    assert called == ["norm_forward", "norm_backward"]                  # of bf16


@NEEDS_CPP
@pytest.mark.parametrize(("M", "F", "halves"), [(1, 64, False), (7, 80, True), (33, 2048, True)])
def test_the_gate_is_as_accurate_as_its_definition(M, F, halves, generator, poisoned, called):
    assert test_geglu.faults(gate_by_cpp, M, F, halves, torch.bfloat16, "cpu", generator) == []
    assert called == ["geglu", "geglu"]


@NEEDS_CPP
def test_the_gate_bears_large_numbers():
    gate = torch.tensor([-300.0, -30, -10, -1e-30, 0, 1e-30, 10, 30, 300, 1e5, -1e5, 5, 6, 7, 8, 9]).bfloat16()[None].requires_grad_()
    h = gate_by_cpp(gate, torch.ones(1, 16).bfloat16())
    h.backward(torch.ones(1, 16).bfloat16())
    torch.testing.assert_close(h.detach(), torch.nn.functional.gelu(gate.detach(), approximate="tanh"), rtol=0.01, atol=1e-4)
    torch.testing.assert_close(gate.grad, (gate.detach() > 1).bfloat16() + 0.5 * (gate.detach().abs() < 1).bfloat16(), rtol=0.01, atol=1e-2)


@NEEDS_CPP
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 32, 16), (13, 64, 4096), (600, 32, 4096 + 176)])
def test_the_loss_is_as_accurate_as_the_reference(tokens, width, vocabulary, generator, poisoned, called):
    hidden, weight, targets = test_cross_entropy.draw(tokens, width, vocabulary, generator, torch.bfloat16, share=1)
    assert test_cross_entropy.faults(loss_by_cpp, hidden, weight, targets) == []
    chunks = -(-tokens // 252)
    assert called == ["loss_logits", "loss_gradient", "weight_gradient"] * chunks
    weight, into = weight.float(), torch.zeros(vocabulary, width)           # fp32 masters, and a sum over passes
    exact = test_cross_entropy.gradients(linear_cross_entropy, hidden.double(), weight.double(), targets)[2]
    for _ in range(2):
        loss_by_cpp(hidden, weight.requires_grad_(), targets, weight_grad_out=into).backward()
    assert (into - 8 * exact).norm() < 0.02 * (8 * exact).norm()            # that of test_cross_entropy is of a quarter of the loss


@NEEDS_CPP
def test_large_logits_and_rows_without_loss(generator, poisoned):
    hidden, weight, targets = test_cross_entropy.draw(20, 32, 512, generator, torch.bfloat16, share=1)
    hidden *= 50
    targets[::3] = IGNORE
    with torch.no_grad():
        alone = loss_by_cpp(hidden, weight, targets)
    hidden.requires_grad_()
    loss = loss_by_cpp(hidden, weight, targets, every_row=True)
    loss.backward()
    exact = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden.detach(), weight).float(), targets, ignore_index=IGNORE, reduction="sum")
    assert loss.item() == alone.item() == pytest.approx(exact.item(), rel=1e-5)
    assert not hidden.grad[::3].any() and hidden.grad[1::3].isfinite().all() and hidden.grad[1::3].any(dim=1).all()


@NEEDS_CPP
def test_what_is_not_a_number_stays_none(generator):
    def some(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    hidden, weight, targets = some(20, 32), some(512, 32), torch.arange(20)
    hidden[7, 3] = torch.nan
    assert loss_by_cpp(hidden, weight, targets).isnan()
    hidden[7, 3], weight[300, 0] = 1, torch.nan                             # a word that is no target
    assert loss_by_cpp(hidden, weight, targets).isnan()
    x, gate = some(9, 64), some(9, 64)
    x[4, 5] = gate[4, 5] = torch.nan
    assert torch.equal(rms_norm(x, torch.ones(64), 1e-6, backend="cpp").isnan().any(dim=1), torch.arange(9) == 4)
    assert torch.equal(gate_by_cpp(gate, some(9, 64)).isnan(), gate.isnan())
    q, k, v = some(30, 4, 32), some(30, 1, 32), some(30, 1, 32)
    k[20, 0, 1] = torch.nan
    table = plan([10, 20], 8, torch.bfloat16, torch.device("cpu"), (4, 1, 32), backend="cpp")
    for others in ((q.float(), k, v), (q, k, v.expand(30, 2, 32)), (q[..., :16], k[..., :16], v[..., :16])):
        with pytest.raises(ValueError, match="takes bf16 on a CPU"):
            attention(*others, 0.3, table, "cpp")
    out = attention(q, k, v, 0.3, table, "cpp")
    seen = (torch.arange(30) >= 20) & (torch.arange(30) < 28)
    assert torch.equal(out.isnan().all(dim=(1, 2)), seen) and torch.equal(out.isnan().any(dim=(1, 2)), seen)


@NEEDS_CPP
@pytest.mark.parametrize(("sound", "broken", "wrong"), [
    ("/ D + eps)", "/ D + 1)", {"y"}), ("_mm512_fmsub_ps(low, load(c + i), _mm512_mul_ps(high, load(s + i)))", "low", {"y"}),
    ("load(residual + row * D + i)) : normed(i)", "load(residual + i)) : normed(i)", {"y"}), ("dw[i] += shares[part * D + i]", "dw[i] = shares[part * D + i]", {"dw"}),
    ("_mm512_reduce_add_ps(along) / D", "_mm512_reduce_add_ps(along)", {"dx"}), ("bf16* d = dy + row * D;", "bf16* d = dy + row / 2 * D;", {"dx"}),
    ("load(dskip + row * D + i)) : d", "load(dskip + i)) : d", {"dx"}),
    ("load(up + row * up_row + i)", "load(up + row * F + i)", {"h", "dgate"}), ("(_mm512_set1_ps(3), bent, one)", "(_mm512_set1_ps(2), bent, one)", {"dgate"}),
    ("made + row * 2 * F + F + i, _mm512_mul_ps(d, value)", "made + row * 2 * F + F + i, value", {"dup"}),
    ("sum = sum * std::exp2(highest - higher)", "sum = sum", {"loss"}), ("std::expm1(logit - log_sums[r])", "std::exp(logit - log_sums[r])", {"dhidden", "dweight"}),
    ("_mm512_sub_ps(load(row + word), _mm512_set1_ps(log_sums[r]))", "load(row + word)", {"dhidden"}), ("first + 2 * r) * stride", "2 * r) * stride", {"dweight"}),
    ("2 * r + 1 < count ? from + stride : nullptr", "nullptr", {"dweight"})])
def test_broken_cpp_is_caught(sound, broken, wrong, generator, poisoned, mutant_cpp):
    mutant_cpp(sound, broken)
    found = set()
    for kind in NORMS:
        found |= set(test_rms_norm.faults(test_rms_norm.by("cpp"), test_rms_norm.operands(kind, generator, torch.bfloat16, "cpu", 600)))
    found |= set(test_geglu.faults(gate_by_cpp, 33, 80, True, torch.bfloat16, "cpu", generator))
    hidden, weight, targets = test_cross_entropy.draw(1100, 32, 512, generator, torch.bfloat16, share=1)
    found |= set(test_cross_entropy.faults(loss_by_cpp, hidden, weight, targets))
    if "dweight" in wrong:
        dy, x = (torch.randn(1100, 32, generator=generator).bfloat16() for _ in range(2))
        found |= set() if torch.allclose(weight_grad(dy, x, backend="cpp"), weight_grad_reference(dy, x), rtol=1e-3, atol=1e-3) else {"dweight"}
    assert wrong <= found
