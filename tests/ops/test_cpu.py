"""ops/cpu/build.py and its C++: what is compiled and for which CPUs, and each function against the definition's own rounding.

Attention's is tested beside its other ways, in test_ops/attention.py.
"""
import os
import shutil

import pytest
import test_cross_entropy
import test_geglu
import test_rms_norm
import torch
from conftest import NEEDS_CPP

import model
from ops.attention import attention
from ops.attention_tables import plan
from ops.cpu import build
from ops.cpu.build import compiled, weight_gradient
from ops.cross_entropy import IGNORE, linear_cross_entropy
from ops.geglu import geglu
from ops.rms_norm import rms_norm

NEEDS_GXX = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="SKIPPED: no g++")


@pytest.fixture
def cpp(monkeypatch, tmp_path):
    """A small C++ file, on a CPU that passes for one with AVX512-BF16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
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


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_tile"])
def test_cpp_is_for_cpus_that_gain_by_it(cpp, monkeypatch, feature):
    monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda: feature == "amx_tile", raising=False)
    assert compiled(cpp) is None


@NEEDS_CPP
@pytest.mark.parametrize("M", [0, 1, 2, 37, 1024, 1025, 2500])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (64, 32), (80, 48), (208, 640)])
def test_a_weights_gradient_is_summed_in_fp32(M, outputs, inputs, generator, poisoned):
    dy, x = (torch.randn(M, width, generator=generator).bfloat16() for width in (outputs, inputs))
    exact = dy.double().T @ x.double()
    torch.testing.assert_close(weight_gradient(dy, x).double(), exact, rtol=1e-4, atol=1e-4)
    into = torch.randn(outputs, inputs, generator=generator)
    before = into.double()
    assert weight_gradient(dy, x, into, add=True) is into
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
    frozen(x).backward(dy[:, 48:])
    assert called == ["weight_gradient"] * 2


NORMS = ["plain", "residual", "returned", "rotated", "one-head", "one-row"]


@NEEDS_CPP
@pytest.mark.parametrize("T", [2, 37, 600])
@pytest.mark.parametrize("kind", NORMS)
def test_the_norm_is_as_accurate_as_its_definition(kind, T, generator, poisoned, called):
    given = test_rms_norm.operands(kind, generator, torch.bfloat16, "cpu", T)
    for trained in (True, False):
        assert test_rms_norm.faults(test_rms_norm.by(False), given, trained) == []
    assert called == ["norm_forward", "norm_backward"] * 2


@NEEDS_CPP
def test_the_gradients_of_both_uses_of_x_are_added_in_fp32_and_rounded_once(generator, poisoned, called):
    test_rms_norm.test_the_gradients_of_both_uses_of_x_are_added_in_fp32_and_rounded_once("cpu", torch.bfloat16, False, generator)
    assert called == ["norm_forward", "norm_backward"]                  # of bf16; fp32 goes through PyTorch


@NEEDS_CPP
@pytest.mark.parametrize(("M", "F", "halves"), [(1, 64, False), (7, 80, True), (33, 2048, True)])
def test_the_gate_is_as_accurate_as_its_definition(M, F, halves, generator, poisoned, called):
    assert test_geglu.faults(geglu, M, F, halves, torch.bfloat16, "cpu", generator) == []
    assert called == ["geglu", "geglu"]


@NEEDS_CPP
def test_the_gate_bears_large_numbers():
    gate = torch.tensor([-300.0, -30, -10, -1e-30, 0, 1e-30, 10, 30, 300, 1e5, -1e5, 5, 6, 7, 8, 9]).bfloat16()[None].requires_grad_()
    h = geglu(gate, torch.ones(1, 16).bfloat16())
    h.backward(torch.ones(1, 16).bfloat16())
    torch.testing.assert_close(h.detach(), torch.nn.functional.gelu(gate.detach(), approximate="tanh"), rtol=0.01, atol=1e-4)
    torch.testing.assert_close(gate.grad, (gate.detach() > 1).bfloat16() + 0.5 * (gate.detach().abs() < 1).bfloat16(), rtol=0.01, atol=1e-2)


@NEEDS_CPP
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 32, 16), (13, 64, 4096), (600, 32, 4096 + 176)])
def test_the_loss_is_as_accurate_as_the_reference(tokens, width, vocabulary, generator, poisoned, called):
    hidden, weight, targets = test_cross_entropy.draw(tokens, width, vocabulary, generator, torch.bfloat16, share=1)
    assert test_cross_entropy.faults(linear_cross_entropy, hidden, weight, targets) == []
    chunks = -(-tokens // 252)
    assert called == ["loss_logits", "loss_gradient", "weight_gradient"] * chunks
    weight, into = weight.float(), torch.zeros(vocabulary, width)           # fp32 masters, and a sum over passes
    exact = test_cross_entropy.gradients(linear_cross_entropy, hidden.double(), weight.double(), targets)[2]
    for _ in range(2):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets, into=into).backward()
    assert (into - 8 * exact).norm() < 0.02 * (8 * exact).norm()            # that of test_cross_entropy is of a quarter of the loss


@NEEDS_CPP
def test_large_logits_and_rows_without_loss(generator, poisoned):
    hidden, weight, targets = test_cross_entropy.draw(20, 32, 512, generator, torch.bfloat16, share=1)
    hidden *= 50
    targets[::3] = IGNORE
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, targets)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, every_row=True)
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
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    hidden[7, 3], weight[300, 0] = 1, torch.nan                             # a word that is no target
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    x, gate = some(9, 64), some(9, 64)
    x[4, 5] = gate[4, 5] = torch.nan
    assert torch.equal(rms_norm(x, torch.ones(64), 1e-6).isnan().any(dim=1), torch.arange(9) == 4)
    assert torch.equal(geglu(gate, some(9, 64)).isnan(), gate.isnan())
    q, k, v = some(30, 4, 32), some(30, 1, 32), some(30, 1, 32)
    k[20, 0, 1] = torch.nan
    table = plan([10, 20], 8, torch.bfloat16, torch.device("cpu"), (4, 1, 32))
    for others in ((q.float(), k, v), (q, k, v.expand(30, 2, 32)), (q[..., :16], k[..., :16], v[..., :16])):
        with pytest.raises(ValueError, match="takes bf16 on a CPU"):
            attention(*others, 0.3, table)
    out = attention(q, k, v, 0.3, table)
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
        found |= set(test_rms_norm.faults(test_rms_norm.by(False), test_rms_norm.operands(kind, generator, torch.bfloat16, "cpu", 600)))
    found |= set(test_geglu.faults(geglu, 33, 80, True, torch.bfloat16, "cpu", generator))
    hidden, weight, targets = test_cross_entropy.draw(1100, 32, 512, generator, torch.bfloat16, share=1)
    found |= set(test_cross_entropy.faults(linear_cross_entropy, hidden, weight, targets))
    if "dweight" in wrong:
        dy, x = (torch.randn(1100, 32, generator=generator).bfloat16() for _ in range(2))
        found |= set() if torch.allclose(weight_gradient(dy, x), dy.float().T @ x.float(), rtol=1e-3, atol=1e-3) else {"dweight"}
    assert wrong <= found
