"""lora_kernels.py against float64, by the reference's own rounding: PyTorch's way, and the kernels (interpreted without a GPU)."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GPU, INTERPRETED, INTERPRETER

import lora_kernels
from lora_kernels import (
    BY_PYTORCH,
    BY_TRITON,
    PackedWeight,
    lora_linear,
    lora_linear_reference,
    lora_linears,
    lora_mlp,
    lora_mlp_reference,
)
from ops import dropout as dropout_module
from ops.dropout import Dropout
from ops.onednn import pack_onednn_weight

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Where, in what dtype, by what: bf16 products are garbage under the interpreter, so there the kernels take fp16.
WAYS = [pytest.param("cpu", dtype, BY_PYTORCH, id=f"pytorch-{name}") for name, dtype in (("fp32", FP32), ("bf16", BF16))]
WAYS += [pytest.param("cpu", BF16, "packed", id="pytorch-in-blocks-bf16", marks=pytest.mark.skipif(
    pack_onednn_weight(torch.zeros(1, 1, dtype=BF16)) is None, reason="this CPU or PyTorch has no products in oneDNN's blocks"))]
WAYS += [pytest.param(*INTERPRETER.values, dtype, BY_TRITON, id=f"interpreted-{name}", marks=INTERPRETER.marks)
         for name, dtype in (("fp32", FP32), ("fp16", FP16))]
WAYS += [pytest.param(*GPU.values, dtype, choice, id=f"cuda-{way}-{name}", marks=GPU.marks) for way, choice in
         (("pytorch", BY_PYTORCH), ("triton", BY_TRITON)) for name, dtype in (("fp32", FP32), ("fp16", FP16), ("bf16", BF16))]

# M, I, the parts' outputs, R: full tiles and ragged ones, one to three parts, several tiles and several splits of the tokens.
LINEARS = {"one-row": (1, 64, (32,), 6), "ragged": (33, 70, (50,), 5), "qkv": (130, 640, (256, 64, 64), 16), "odd": (77, 40, (24, 9, 130), 3),
           "splits": (530, 96, (300, 280), 40), "wide-rank": (65, 72, (48, 40), 128)}
MLPS = {"one-row": (1, 64, 80, 6), "ragged": (35, 70, 90, 5), "tiles": (150, 64, 320, 16), "splits": (520, 40, 56, 17)}


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def linears_operands(M, I, outputs, R, generator, dtype, device):
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    x, linears = draw(M, I).to(dtype), [((draw(O, I) / I**0.5).to(dtype), draw(R, I) / I**0.5, draw(O, R) / R**0.5) for O in outputs]
    return x, linears, [draw(M, O).to(dtype) for O in outputs]


def mlp_operands(M, D, F, R, generator, dtype, device):
    x, linears, _ = linears_operands(M, D, (F, F), R, generator, dtype, device)
    _, down, dys = linears_operands(M, F, (D,), R, generator, dtype, device)
    return x, linears + down, dys


def outputs_and_gradients(function, x, linears, dys):
    x = x.detach().clone().requires_grad_()
    linears = [(weight, a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()) for weight, a, b in linears]
    ys = function(x, linears)
    torch.autograd.backward(ys, dys)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
    for i, (_, a, b) in enumerate(linears):
        found |= {f"da{i}": a.grad, f"db{i}": b.grad}
    return found


def faults(function, reference, x, linears, dys):
    """The names of outputs further from float64 than twice the reference's own error and one rounding, all zero, or of another dtype."""
    doubled = x.double(), [tuple(t.double() for t in linear) for linear in linears], [dy.double() for dy in dys]
    exact, naive = outputs_and_gradients(reference, *doubled), outputs_and_gradients(reference, x, linears, dys)
    ours = outputs_and_gradients(function, x, linears, dys)
    return [name for name in exact if not ours[name].norm() > 0 or ours[name].dtype != naive[name].dtype
            or not error(ours[name], exact[name]) <= 2 * error(naive[name], exact[name]) + torch.finfo(x.dtype).eps / 2]


def reference_linears(x, linears, dropout=None):
    return [lora_linear_reference(x, *linear, 1.5, dropout) for linear in linears]


def reference_mlp(x, linears, dropouts=(None, None)):
    return [lora_mlp_reference(x, *linears, 1.5, dropouts)]


def by(choice, module=lora_kernels):
    """(our linears, our MLP) with one choice for all; "packed": by PyTorch, each group's weights in oneDNN's layout."""
    def chosen(linears):
        return replace(BY_PYTORCH, packed=PackedWeight.of([weight for weight, *_ in linears])) if choice == "packed" else choice

    def mlp(x, linears, dropouts=(None, None)):
        return [module.lora_mlp(x, *linears, 1.5, dropouts, (chosen(linears[:2]), chosen(linears[2:])))]
    return lambda x, linears, dropout=None: module.lora_linears(x, linears, 1.5, dropout, chosen(linears)), mlp


def drawn(share, M, features, generator, device="cpu"):
    tokens, *rest = (torch.randint(-2**31, 2**31, (n,), generator=generator).int().to(device) | 1 for n in (M, *features))
    return [Dropout(share, tokens, numbers) for numbers in rest]


@pytest.mark.parametrize(("device", "dtype", "choice"), WAYS)
@pytest.mark.parametrize("case", LINEARS)
def test_lora_linears_and_their_gradients_are_as_accurate_as_the_reference(case, device, dtype, choice, generator):
    operands = linears_operands(*LINEARS[case], generator, dtype, device)
    assert faults(by(choice)[0], reference_linears, *operands) == []


@pytest.mark.parametrize(("device", "dtype", "choice"), WAYS)
@pytest.mark.parametrize("case", MLPS)
def test_the_lora_mlp_and_its_gradients_are_as_accurate_as_the_reference(case, device, dtype, choice, generator):
    operands = mlp_operands(*MLPS[case], generator, dtype, device)
    assert faults(by(choice)[1], reference_mlp, *operands) == []


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize("rank", [1, 2, 7, 16, 31, 64, 127, 128])
def test_any_rank_from_1_to_128_will_do(rank, device, generator):
    operands = linears_operands(20, 48, (33, 16), rank, generator, FP32, device)
    assert faults(by(BY_TRITON)[0], reference_linears, *operands) == []


@pytest.mark.parametrize("part", ["forward", "input_gradient", "sums"])
@pytest.mark.parametrize("device", [INTERPRETER, GPU])
def test_kernel_and_pytorch_may_share_the_work(part, device, generator):
    operands = mlp_operands(20, 24, 40, 4, generator, FP32, device)
    for dropouts in ((None, None), drawn(0.3, 20, (24, 40), generator, device)):
        for choice in (replace(BY_TRITON, **{part: False}), replace(BY_PYTORCH, **{part: True})):
            assert faults(partial(by(choice)[1], dropouts=dropouts), partial(reference_mlp, dropouts=dropouts), *operands) == []


@pytest.mark.parametrize("choice", [BY_PYTORCH, pytest.param(BY_TRITON, marks=INTERPRETER.marks)], ids=["pytorch", "interpreted"])
def test_no_rows_give_empty_outputs_and_zero_gradients(choice, generator):
    for operands, function in ((linears_operands(0, 24, (40, 8), 4, generator, FP32, "cpu"), by(choice)[0]),
                               (mlp_operands(0, 24, 40, 4, generator, FP32, "cpu"), by(choice)[1])):
        found = outputs_and_gradients(function, *operands)
        assert all(found[name].numel() == 0 if name[0] in "yd" and name[1] not in "ab" else not found[name].any() for name in found)


@pytest.mark.parametrize("choice", [BY_PYTORCH, pytest.param(BY_TRITON, marks=INTERPRETER.marks)], ids=["pytorch", "interpreted"])
def test_the_first_layer_needs_no_gradient_of_its_input(choice, generator):
    for operands, function in ((linears_operands(20, 24, (40, 8), 4, generator, FP32, "cpu"), by(choice)[0]),
                               (mlp_operands(20, 24, 40, 4, generator, FP32, "cpu"), by(choice)[1])):
        x, linears, dys = operands
        expected = outputs_and_gradients(function, x, linears, dys)
        linears = [(weight, a.requires_grad_(), b.requires_grad_()) for weight, a, b in linears]
        torch.autograd.backward(function(x, linears), dys)
        for i, (_, a, b) in enumerate(linears):
            torch.testing.assert_close([a.grad, b.grad], [expected[f"da{i}"], expected[f"db{i}"]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
def test_kernels_give_the_same_bits_each_time(device, generator):
    operands = mlp_operands(520, 40, 56, 17, generator, FP16, device)
    once, again = (outputs_and_gradients(by(BY_TRITON)[1], *operands) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize(("A", "B", "splits_a", "splits_b"), [
    (300, 900, 37, 5), (900, 300, 1, 16), (257, 1, 2, 40)])
@pytest.mark.parametrize("add", [True, False])
def test_the_sums_of_splits_are_added_up_each_at_its_place(A, B, splits_a, splits_b, add, device, generator):
    a, b, gradient = (torch.randn(*shape, generator=generator).to(device)
                      for shape in ((splits_a, A), (splits_b, B), (A + B,)))
    exact = torch.cat((a.double().sum(0), b.double().sum(0))) + (gradient.double() if add else 0)
    partial = torch.cat((a.flatten(), b.flatten()))
    lora_kernels._add_splits_kernel[(-(-(A + B) // 256),)](
        partial, gradient, splits_a, splits_b, A=A, B=B, ADD=add, BLOCK_S=16, BLOCK=256)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)


# Mutations: what the checks above are worth.


@pytest.mark.parametrize("broken", ["dx", "da0", "db1"])
def test_a_zeroed_halved_or_flipped_gradient_is_caught(broken, generator):
    operands = linears_operands(33, 64, (32, 48), 4, generator, FP32, "cpu")
    for damage in (lambda g: g * 0, lambda g: g * 0.5, lambda g: g.flip(0)):
        def function(x, linears, damage=damage):
            named = {"dx": x} | {f"da{i}": a for i, (_, a, _) in enumerate(linears)} | {f"db{i}": b for i, (_, _, b) in enumerate(linears)}
            named[broken].register_hook(damage)
            return lora_linears(x, linears, 1.5)
        assert faults(function, reference_linears, *operands) == [broken]


@INTERPRETED
@pytest.mark.parametrize(("sound", "broken", "where"), [
    ("low_rank = (low_rank * scale).to(dtype)", "low_rank = low_rank.to(dtype)", {"y0", "db0"}),
    ("low_rank = (low_rank * scale).to(dy.dtype.element_ty)", "low_rank = low_rank.to(dy.dtype.element_ty)", {"dx", "da0"}),
    ("sums = tl.dot(low_rank, b_tile, sums,", "sums = tl.dot(low_rank * 0, b_tile, sums,", {"y0"}),
    ("a + (part * R + ranks)[None, :] * I", "a + ranks[None, :] * I", {"y1", "db1"}),
    ("    if tile == 0:\n        _store_low_rank(s, low_rank", "    if tile == 1:\n        _store_low_rank(s, low_rank", {"db0"}),
    ("for i in range(0, I, BLOCK_I):", "for i in range(0, I - BLOCK_I, BLOCK_I):", {"y0", "y1"}),
    ("for o in range(0, LAST - FIRST, BLOCK_O):", "for o in range(BLOCK_O, LAST - FIRST, BLOCK_O):", {"dx", "da0"}),
    ("    if P > 1:\n", "    if P > 2:\n", {"dx", "da1"}),
    ("start * LOW_RANK + rows", "rows", {"da0", "db0"}),
    ("m + rows < count", "m + rows < count - 1", {"da0", "db0"}),
    ("rows[:, None] < count[None, :]", "rows[:, None] < count[None, :] - 1", {"da0", "db0"}),
    ("splits_a * A + places - A", "splits_a * A + places - A + 1", {"db0"}),
    ("(sums * gelu(gate))", "(sums * gate)", {"dx", "da1"}),
    ("sums * up * gelu_slope(gate)", "sums * up * gelu(gate)", {"dx", "da0"}),
    ("gelu(sums.to(tl.float32)) * up_sums", "gelu(up_sums.to(tl.float32)) * sums", {"y0"}),
    ("up_low_rank = tl.dot(dropped, a_tile, up_low_rank", "up_low_rank = tl.dot(dropped, a_tile, low_rank", {"y0", "db1"}),
])
def test_a_broken_kernel_is_caught(sound, broken, where, generator, mutant):
    broken_module = mutant(lora_kernels, sound, broken)
    linears, mlp = by(broken_module.BY_TRITON, broken_module)
    found = set(faults(linears, reference_linears, *linears_operands(530, 96, (150, 140), 5, generator, FP32, "cpu")))
    found |= set(faults(mlp, reference_mlp, *mlp_operands(70, 64, 140, 5, generator, FP32, "cpu")))
    assert where <= found


# Derivatives by finite differences


def tiny(dtype):
    generator = torch.Generator().manual_seed(0)
    x, linears, _ = mlp_operands(3, 5, 4, 2, generator, dtype, "cpu")
    return x.requires_grad_(), [(weight, a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()) for weight, a, b in linears]


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("function", [lambda x, linears, dropouts: lora_linears(x, linears[:2], 0.7, dropouts[0]),
                                      lambda x, linears, dropouts: lora_mlp(x, *linears, 0.7, dropouts)], ids=["linears", "mlp"])
def test_gradcheck(function, share, generator):
    x, linears = tiny(torch.float64)
    dropouts = drawn(share, 3, (5, 4), generator) if share else (None, None)
    adapters = [t for _, *adapter in linears for t in adapter]
    assert torch.autograd.gradcheck(lambda x, *adapters: function(x, [(weight, *adapters[2 * i:2 * i + 2]) for i, (weight, *_) in
                                                                        enumerate(linears)], dropouts), (x, *adapters))


@INTERPRETED
def test_the_kernels_gradients_are_the_differences_of_their_outputs():
    """In fp32, so by wide central differences of a random sum of the outputs."""
    x, linears = tiny(FP32)
    dy = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    leaves = [x, *(t for _, *adapter in linears for t in adapter)]

    def value():
        return (lora_mlp(x, *linears, 0.7, choices=(BY_TRITON, BY_TRITON)) * dy).sum()

    value().backward()
    for leaf in leaves:
        for i in range(0, leaf.numel(), 3):
            with torch.no_grad():
                kept = leaf.view(-1)[i].item()
                sides = []
                for step in (0.02, -0.02):
                    leaf.view(-1)[i] = kept + step
                    sides.append(value().item())
                leaf.view(-1)[i] = kept
            assert leaf.grad.view(-1)[i].item() == pytest.approx((sides[0] - sides[1]) / 0.04, rel=1e-2, abs=2e-3)


# Dropout


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("device", "dtype", "choice"), WAYS)
def test_an_element_is_dropped_where_the_product_of_its_numbers_is_among_the_lowest(device, dtype, choice, share, generator):
    """By Python's own integers; what an adapter saw is read off one that copies x."""
    M, I = 40, 16
    [dropout], eye = drawn(share, M, (I,), generator, device), torch.eye(I, device=device)
    kept = [[(t * f + 2**31) % 2**32 >= round(share * 2**32) for f in dropout.features.tolist()] for t in dropout.tokens.tolist()]
    copy = torch.zeros(I, I, dtype=dtype, device=device), eye, eye * (1 - share) / 1.5
    for y in by(choice)[0](torch.ones(M, I, dtype=dtype, device=device), [copy, copy], dropout):
        assert y.gt(0.5).tolist() == kept
        torch.testing.assert_close(y, y.gt(0.5).to(dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("device", "dtype", "choice"), WAYS)
@pytest.mark.parametrize("case", ["ragged", "odd", "splits"])
def test_with_dropout_the_linears_are_as_accurate_as_the_reference(case, device, dtype, choice, generator):
    M, I, outputs, R = LINEARS[case]
    [dropout] = drawn(0.3, M, (I,), generator, device)
    assert faults(partial(by(choice)[0], dropout=dropout), partial(reference_linears, dropout=dropout),
                  *linears_operands(M, I, outputs, R, generator, dtype, device)) == []


@pytest.mark.parametrize(("device", "dtype", "choice"), WAYS)
@pytest.mark.parametrize("case", ["ragged", "splits"])
def test_with_dropout_the_mlp_is_as_accurate_as_the_reference(case, device, dtype, choice, generator):
    M, D, F, R = MLPS[case]
    dropouts = drawn(0.3, M, (D, F), generator, device)
    assert faults(partial(by(choice)[1], dropouts=dropouts), partial(reference_mlp, dropouts=dropouts),
                  *mlp_operands(M, D, F, R, generator, dtype, device)) == []


@INTERPRETED
@pytest.mark.parametrize(("sound", "broken", "where"), [
    ("load_tile(features + i + ins, inside, EVEN_I)", "load_tile(features + ins, ins < I, EVEN_I)", {"y0", "db1"}),
    ("dropped = apply_dropout(x_tile, token_hashes", "dropped = apply_dropout(x_tile, 3 * token_hashes", {"y0", "y1", "db0"}),
    ("apply_dropout(adapter, token_hashes,", "apply_dropout(adapter, 3 * token_hashes,", {"dx"}),
    ("tl.load(tokens + start + m + rows", "tl.load(tokens + m + rows", {"da0", "da1"}),
])
def test_a_broken_dropout_of_a_kernel_is_caught(sound, broken, where, generator, mutant):
    [dropout] = drawn(0.4, 530, (96,), generator)
    broken_linears, _ = by(BY_TRITON, mutant(lora_kernels, sound, broken))
    assert where <= set(faults(partial(broken_linears, dropout=dropout), partial(reference_linears, dropout=dropout),
                               *linears_operands(530, 96, (30, 40), 5, generator, FP32, "cpu")))


@INTERPRETED
def test_a_broken_mask_of_the_kernels_is_caught(generator, mutant, monkeypatch):
    broken = mutant(dropout_module, "feature_hashes[None, :] < threshold", "feature_hashes[None, :] > threshold")
    monkeypatch.setattr(lora_kernels, "apply_dropout", broken.apply_dropout)
    [dropout] = drawn(0.4, 530, (96,), generator)
    found = faults(partial(by(BY_TRITON)[0], dropout=dropout), partial(reference_linears, dropout=dropout),
                   *linears_operands(530, 96, (30, 40), 5, generator, FP32, "cpu"))
    assert {"y0", "y1", "dx", "da0", "da1", "db0"} <= set(found)


@pytest.mark.parametrize(("change", "message"), [
    ({"p": 1.0}, r"0 ≤ p < 1; got 1\.0"), ({"p": -0.1}, "0 ≤ p < 1"),
    ({"tokens": torch.ones(5, dtype=torch.int32)}, r"tokens must be \(6,\) int32 on cpu, contiguous; got shape \(5,\)"),
    ({"tokens": torch.ones(6, dtype=torch.int64)}, r"tokens must be .* torch\.int64"),
    ({"features": torch.ones(1, dtype=torch.int32).expand(8)}, r"features must be \(8,\) .* strides \(0,\)")])
def test_a_dropout_that_does_not_fit_is_refused(change, message, generator):
    [dropout] = drawn(0.5, 6, (8,), generator)
    with pytest.raises(ValueError, match=f"LoRA dropout.*{message}"):
        lora_linear(torch.randn(6, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), 1.0, replace(dropout, **change))


# Operands that do not fit


@pytest.mark.parametrize(("change", "message"), [
    (lambda x, w, a, b: (x.T.contiguous().T, w, a, b), r"x must be \(M, I\) and contiguous; got shape \(6, 8\), strides \(1, 6\)"),
    (lambda x, w, a, b: (x[None], w, a, b), r"x must be \(M, I\)"),
    (lambda x, w, a, b: (x, w.T.contiguous().T, a, b), "weight must be .* contiguous"),
    (lambda x, w, a, b: (x, w[:, :7].contiguous(), a, b), r"weight must be \(5, 8\) for 8 inputs.* got shape \(5, 7\)"),
    (lambda x, w, a, b: (x, w, a[:, ::2], b), "lora_a must be"),
    (lambda x, w, a, b: (x, w, a, b[:, :1]), "lora_b must be"),
    (lambda x, w, a, b: (x.half(), w, a, b), "weight is torch.float32, x torch.float16"),
    (lambda x, w, a, b: (x, w.requires_grad_(), a, b), "weight is frozen here"),
])
def test_operands_that_do_not_fit_are_named(change, message):
    operands = change(torch.randn(6, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2))
    with pytest.raises(ValueError, match=message):
        lora_linear(*operands, 1.0)


def test_calls_that_cannot_be_are_refused(monkeypatch):
    x, linear = torch.randn(6, 8), (torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2))
    with pytest.raises(ValueError, match="one to three linears share x; got 4"):
        lora_linears(x, [linear] * 4, 1.0)
    with pytest.raises(ValueError, match="equally many outputs; got 5 and 4"):
        lora_mlp(x, linear, (linear[0][:4], linear[1], linear[2][:4]), linear, 1.0)
    with pytest.raises(ValueError, match=r"ranks 1 to 128 .* got rank 129"):
        lora_linear(x, linear[0], torch.randn(129, 8), torch.randn(5, 129), 1.0, choice=BY_TRITON)
    with pytest.raises(ValueError, match=r"fp32, bf16, fp16; got rank 2, torch\.float64"):
        lora_linear(*(t.double() for t in (x, *linear)), 1.0, choice=BY_TRITON)
    monkeypatch.setattr("ops.triton_utils.INTERPRETED", False)
    with pytest.raises(ValueError, match="run on a CUDA device, x is on cpu"):
        lora_linear(x, *linear, 1.0, choice=BY_TRITON)


def test_weights_below_each_other_are_seen_as_one_and_others_are_copied():
    together = torch.randn(7, 4)
    parts = together.split((2, 4, 1))
    seen = lora_kernels._fused_weight(parts)
    assert torch.equal(seen, together) and seen.data_ptr() == together.data_ptr()
    for parts in ([together[2:6], together[:2]], [together[:2], together[3:]], [torch.randn(2, 4), torch.randn(3, 4)]):
        assert torch.equal(lora_kernels._fused_weight(parts), torch.cat(parts))


# On a GPU


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("M", [16_896, 1_000])
def test_the_models_own_shapes_in_bf16(M, device, generator):
    for outputs, inputs in (((1024, 256, 256), 640), ((640,), 1024)):
        operands = linears_operands(M, inputs, outputs, 16, generator, BF16, device)
        assert faults(by(BY_TRITON)[0], reference_linears, *operands) == []
    assert faults(by(BY_TRITON)[1], reference_mlp, *mlp_operands(M, 640, 2048, 16, generator, BF16, device)) == []


@pytest.mark.parametrize("device", [GPU])
def test_outputs_of_more_than_two_to_the_31_numbers(device):
    M, I, O, R = 2**21 + 5, 16, 1024, 4
    x = torch.randn(M, I, dtype=BF16, device=device, requires_grad=True)
    weight, a, b = torch.randn(O, I, device=device).to(BF16), torch.randn(R, I, device=device), torch.randn(O, R, device=device)
    y = lora_linear(x, weight, a.requires_grad_(), b.requires_grad_(), 1.0, choice=BY_TRITON)
    last = slice(M - 300, M)
    expected = lora_linear_reference(x[last].detach().float(), weight.float(), a.detach(), b.detach(), 1.0)
    assert error(y[last].detach(), expected.double()) < 1e-2
    dy = torch.zeros_like(y)
    dy[last] = torch.randn(300, O, device=device).to(BF16)
    y.backward(dy)
    assert error(x.grad[last], (dy[last].float() @ (weight.float() + b.detach() @ a.detach())).double()) < 2e-2
    assert error(b.grad, (dy[last].float().T @ (x[last].detach().float() @ a.detach().T)).double()) < 2e-2


@pytest.mark.parametrize("device", [GPU])
def test_auto_compares_and_remembers(device, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_FUNCTIONGEMMA_CACHE", str(tmp_path))
    first, times = lora_kernels.choose("auto", 512, 640, (1024, 256, 256), 16, BF16, torch.device(device))
    assert set(times) == {"forward", "input_gradient", "sums"} and all(ms > 0 for pair in times.values() for ms in pair)
    monkeypatch.setattr(lora_kernels, "milliseconds", lambda call: pytest.fail("compared again"))
    assert lora_kernels.choose("auto", 512, 640, (1024, 256, 256), 16, BF16, torch.device(device)) == (first, times)
