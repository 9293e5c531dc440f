"""ops/cross_entropy.py against float64, by the reference's own rounding: PyTorch's way, and the kernels (interpreted without a GPU)."""
import functools

import pytest
import torch
from conftest import GPU, INTERPRETED, INTERPRETER

from ops import cross_entropy as cross_entropy_module
from ops.cross_entropy import (
    BACKENDS,
    CHUNK_ROWS,
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Where, in what dtype: bf16 products are garbage under the interpreter, so there the kernels take fp16.
WAYS = [pytest.param("cpu", dtype, id=f"interpreted-{name}", marks=INTERPRETED) for name, dtype in (("fp32", FP32), ("fp16", FP16))]
WAYS += [pytest.param("cuda", dtype, id=f"cuda-{name}", marks=GPU.marks) for name, dtype in (("fp32", FP32), ("fp16", FP16), ("bf16", BF16))]

# Tokens, D, V: full tiles and ragged ones, several tiles of rows, several spans of the vocabulary, and less than one tile of each.
CASES = {"one-row": (1, 64, 1024), "tiny": (5, 7, 11), "ragged": (150, 70, 2500), "full": (256, 128, 2048)}


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def draw(tokens, width, vocabulary, generator, dtype=torch.float32, share=0.5, device="cpu"):
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.3).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) > share] = IGNORE
    return hidden.to(device), weight.to(device), targets.to(device)


def gradients(function, hidden, weight, targets):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, targets)
    (loss * 0.25).backward()
    return loss.detach(), hidden.grad, weight.grad


by_triton = functools.partial(linear_cross_entropy, backend="triton")


def faults(function, hidden, weight, targets):
    """The names of results further from float64 than twice the reference's own error and one rounding, all zero, or of another dtype.

    One rounding is at least 1e-6: in fp32 a loss is the difference of two sums of the logits' size.
    """
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    naive, ours = (gradients(f, hidden, weight, targets) for f in (linear_cross_entropy_reference, function))
    room = [max(torch.finfo(t.dtype).eps / 2, 1e-6) for t in naive]
    return [name for name, got, reference, truth, r in zip(("loss", "dhidden", "dweight"), ours, naive, exact, room, strict=True)
            if not got.norm() > 0 or got.dtype != reference.dtype or not error(got, truth) <= 2 * error(reference, truth) + r]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 3 * CHUNK_ROWS + 5])
def test_loss_and_gradients_are_as_accurate_as_the_reference(tokens, dtype, generator):
    hidden, weight, targets = draw(tokens, 32, 500, generator, dtype)
    targets[0] = 3
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    naive = gradients(linear_cross_entropy_reference, hidden, weight, targets)
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    for mine, reference, truth in zip(ours, naive, exact, strict=True):
        assert truth.norm() > 0 and mine.norm() > 0
        assert error(mine, truth) <= 2 * error(reference, truth) + 1e-7


def test_a_frozen_head_gets_no_gradient(generator):
    hidden, weight, targets = draw(20, 16, 50, generator)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None and hidden.grad.norm() > 0


def test_rows_without_loss_get_exactly_zero_gradient(generator):
    hidden, weight, targets = draw(20, 16, 50, generator)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert (hidden.grad[targets == IGNORE] == 0).all() and (hidden.grad[targets != IGNORE] != 0).any(dim=1).all()


def test_no_trained_row_gives_loss_zero(generator):
    hidden, weight, targets = draw(9, 16, 50, generator, share=-1)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.norm() == 0


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("words, parts", [(512, 1), (512, 16), (500, 16), (512, 4)])
def test_the_hidden_gradient_by_parts_of_the_words_is_rounded_once(words, parts, dtype, device, generator):
    """The parts' products are large and nearly cancel out: rounded to 16 bits before, their sum is off."""
    dlogits, matrix = torch.randn(30, words, generator=generator), torch.randn(words, 24, generator=generator)
    half = words // 2
    matrix[half:] = matrix[:half]
    dlogits[:, half:] = dlogits[:, half:] / 64 - dlogits[:, :half]
    dlogits, matrix = dlogits.to(device, dtype), matrix.to(device, dtype)
    rows = torch.full((32, 24), torch.nan, dtype=dtype, device=device)
    cross_entropy_module._hidden_gradient(rows[1:31], dlogits, matrix, parts)
    exact = dlogits.double() @ matrix.double()
    assert rows[[0, 31]].isnan().all() and error(rows[1:31], exact) < max(torch.finfo(dtype).eps / 2, 1e-4)
    if words % parts == 0 and parts > 1 and dtype != FP32:
        pieces = zip(dlogits.chunk(parts, 1), matrix.chunk(parts), strict=True)
        assert error(sum((left @ right).double() for left, right in pieces), exact) > torch.finfo(dtype).eps


def test_full_precision_masters_get_full_precision_gradients(generator):
    hidden, weight, targets = draw(40, 16, 50, generator)
    weight.requires_grad_()
    linear_cross_entropy(hidden.bfloat16(), weight, targets).backward()
    assert weight.grad.dtype == torch.float32
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.detach().double(), targets)[2]
    assert error(weight.grad * 0.25, exact) < 2e-2


@pytest.mark.parametrize("way", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_a_share_of_the_loss_scales_the_gradient_without_rounding_the_share(way, generator):
    """1/3717 in bf16 is off by 0.04 %."""
    hidden, weight, targets = draw(40, 16, 50, generator, FP16 if way == "triton" else BF16, share=1)
    whole, share = (torch.autograd.grad(linear_cross_entropy(h := hidden.requires_grad_(), weight, targets, backend=way) / parts, h)[0] for parts in (1, 3717))
    assert torch.equal(share, (whole.float() * (torch.tensor(1.0) / 3717)).to(hidden.dtype))


def test_gradients_are_finite_differences(generator):
    hidden, weight, targets = draw(5, 4, 7, generator)
    for given in (hidden, weight):
        grad = torch.autograd.grad(linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets), given)[0]
        for place in range(given.numel()):
            with torch.no_grad():
                there, back = (given.detach().clone() for _ in range(2))
                there.view(-1)[place] += 1e-2
                back.view(-1)[place] -= 1e-2
                up, down = (linear_cross_entropy(*((x, weight) if given is hidden else (hidden, x)), targets) for x in (there, back))
            assert grad.view(-1)[place].item() == pytest.approx(((up - down) / 2e-2).item(), abs=1e-2)


def test_the_weights_gradient_is_given_once_and_a_second_pass_is_told_so(generator):
    hidden, weight, targets = draw(5, 4, 7, generator)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second one"):
        loss.backward()


@pytest.mark.parametrize("way", ["torch", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("dtype", [torch.float32, FP16])
def test_the_weights_gradient_is_added_where_it_is_wanted(way, dtype, generator):
    """Over two passes, one of more rows than are taken at once, and to what is there already."""
    passes = [draw(tokens, 32, 500, generator, dtype, share=1) for tokens in ((520, 7) if way == "triton" else (3 * CHUNK_ROWS + 5, 7))]
    weight = passes[0][1].float().requires_grad_()
    into, wanted = torch.ones_like(weight), torch.ones_like(weight)
    for hidden, _, targets in passes:
        hidden.requires_grad_()
        loss = linear_cross_entropy(hidden, weight, targets, backend=way)
        dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
        wanted += dweight
        again = linear_cross_entropy(hidden, weight, targets, backend=way, weight_grad_out=into)
        again.backward()
        assert torch.equal(again, loss) and torch.equal(hidden.grad, dhidden) and weight.grad is None
    torch.testing.assert_close(into, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-5)
    assert not torch.equal(into, torch.ones_like(into))


def test_a_gradient_that_was_added_already_is_not_scaled_afterwards(generator):
    hidden, weight, targets = draw(5, 4, 7, generator)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets, weight_grad_out=torch.zeros_like(weight))
    with pytest.raises(RuntimeError, match="cannot be scaled"):
        (loss / 2).backward()


# The kernels


@pytest.mark.parametrize(("device", "dtype"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_as_accurate_as_the_reference(case, device, dtype, generator):
    hidden, weight, targets = draw(*CASES[case], generator, dtype, share=0.9, device=device)
    targets[0] = 3
    assert faults(by_triton, hidden, weight, targets) == []


@pytest.mark.parametrize(("device", "dtype"), WAYS)
def test_chunks_of_rows_add_up(device, dtype, generator, monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(chunk_rows=70))
    assert faults(by_triton, *draw(150, 40, 1100, generator, dtype, share=1, device=device)) == []


@pytest.mark.parametrize(("device", "dtype"), WAYS)
@pytest.mark.parametrize("vocabulary", [1024, 1025, 1279, 2047])
def test_targets_may_be_at_both_ends_of_the_vocabulary(vocabulary, device, dtype, generator):
    hidden, weight, targets = draw(6, 24, vocabulary, generator, dtype, device=device)
    targets[:] = torch.tensor([0, vocabulary - 1, 1023, IGNORE, 0, vocabulary - 1])
    assert faults(by_triton, hidden, weight, targets) == []


@pytest.mark.parametrize(("device", "dtype"), WAYS)
def test_very_large_logits_neither_overflow_nor_make_a_loss_below_zero(device, dtype, generator):
    hidden, weight, targets = draw(40, 32, 1100, generator, dtype, share=1, device=device)
    hidden = hidden * 200                                              # logits of hundreds to thousands
    loss, dhidden, dweight = gradients(by_triton, hidden, weight, targets)
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    assert all(error(got, truth) < 5e-3 for got, truth in zip((loss, dhidden, dweight), exact, strict=True))
    best = (hidden.double() @ weight.double().T).argmax(1)
    for row in range(40):
        assert 0 <= by_triton(hidden[row:row + 1], weight, best[row:row + 1]) < 1


@pytest.mark.parametrize(("device", "dtype"), WAYS)
def test_a_nearly_certain_target_keeps_its_gradient(device, dtype, generator):
    """Where p is 0.99, the small p − 1 is rounded, not p."""
    hidden, weight, _ = draw(30, 64, 1100, generator, dtype, device=device)
    for scale in (1.0, 2.0, 3.0, 4.0):
        scaled, best = hidden * scale, (hidden.double() @ weight.double().T).argmax(1)
        exact, naive, ours = (gradients(function, scaled.to(kind), weight.to(kind), best) for function, kind in
                              ((linear_cross_entropy_reference, torch.float64), (linear_cross_entropy_reference, dtype), (by_triton, dtype)))
        for got, reference, truth in zip(ours[1:], naive[1:], exact[1:], strict=True):
            assert error(got, truth) <= min(2 * error(reference, truth), torch.finfo(dtype).eps) + 1e-4


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize("tokens", [0, 9])
def test_no_trained_row_gives_the_kernels_nothing_to_do(tokens, device, generator):
    loss, dhidden, dweight = gradients(by_triton, *draw(tokens, 16, 50, generator, share=-1, device=device))
    assert loss.item() == 0 and dhidden.shape == (tokens, 16) and not dhidden.any() and dweight.shape == (50, 16) and not dweight.any()


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
def test_the_kernels_work_out_only_the_gradients_that_are_wanted(device, generator, monkeypatch):
    hidden, weight, targets = draw(20, 16, 1100, generator, device=device)
    expected, dhidden, dweight = gradients(by_triton, hidden, weight, targets)
    given, chunk = [], BACKENDS["triton"].chunk
    noted = BACKENDS["triton"]._replace(chunk=lambda *operands: given.append(operands[-1]) or chunk(*operands))
    monkeypatch.setitem(BACKENDS, "triton", noted)
    frozen = hidden.clone().requires_grad_()
    (by_triton(frozen, weight, targets) * 0.25).backward()
    assert torch.equal(frozen.grad, dhidden) and weight.grad is None and given.pop() is not None
    head = weight.clone().requires_grad_()
    (by_triton(hidden, head, targets) * 0.25).backward()
    assert torch.equal(head.grad, dweight) and given.pop() is not None
    with torch.no_grad():
        assert torch.equal(by_triton(frozen, head, targets), expected) and given.pop() is None


@pytest.mark.parametrize(("device", "dtype"), [way for way in WAYS if FP32 not in way.values])
def test_full_precision_masters_are_rounded_once_for_the_kernels(device, dtype, generator):
    hidden, weight, targets = draw(60, 40, 1100, generator, device=device)
    assert faults(lambda h, w, t: by_triton(h, w.to(FP32), t), hidden.to(dtype), weight.to(dtype), targets) == []
    dweight = gradients(by_triton, hidden.to(dtype), weight, targets)[2]
    exact = gradients(linear_cross_entropy_reference, hidden.to(dtype).double(), weight.to(dtype).double(), targets)[2]
    assert dweight.dtype == FP32 and error(dweight, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
def test_the_kernels_give_the_same_bits_each_time(device, generator):
    operands = draw(150, 70, 2500, generator, FP16, device=device)
    assert all(torch.equal(*pair) for pair in zip(*(gradients(by_triton, *operands) for _ in range(2)), strict=True))


def test_operands_that_the_kernels_do_not_take_are_named(generator):
    hidden, weight, targets = draw(9, 16, 50, generator)
    with pytest.raises(ValueError, match=r"fp32, bf16, fp16 .* got torch\.float64"):
        by_triton(hidden.double(), weight, targets)
    with pytest.raises(ValueError, match=r"contiguous weight; got torch\.float32 on .*, strides \(1, 50\)"):
        by_triton(hidden, weight.T.contiguous().T, targets)


@INTERPRETED
@pytest.mark.parametrize(("sound", "broken", "where"), [
    ("total * tl.exp(highest - higher)", "total", {"loss", "dhidden", "dweight"}),
    ("highest + tl.log(total)", "highest", {"loss"}),
    ("logits = tl.where(inside[None, :], logits, float(\"-inf\"))", "pass", {"loss"}),
    ("w_tiles + v * D + d", "w_tiles + d", {"loss", "dhidden"}),
    ("w + span * SPAN * D", "w", {"loss", "dhidden"}),
    ("h + first * D", "h", {"loss", "dhidden"}),
    ("log_sums + span * M + first + rows", "log_sums + first + rows", {"loss"}),
    ("tl.minimum(V - span * SPAN, SPAN)", "tl.minimum(V - span * SPAN, SPAN - 1)", {"loss", "dhidden"}),
    ("for d in range(0, D, BLOCK_D):", "for d in range(0, D - BLOCK_D, BLOCK_D):", {"loss"}),
    ("p = tl.exp(logits - log_sum[:, None])", "p = tl.exp(logits)", {"dhidden", "dweight"}),
    ("first * V + span * SPAN", "first * V", {"dhidden", "dweight"}),
    ("tl.store(out + v,", "tl.store(out,", {"dhidden", "dweight"}),
    ("torch.expm1(-losses)", "torch.exp(-losses)", {"dhidden", "dweight"}),
    ("matrix[word].float()).sum(1)", "matrix[word - 1].float()).sum(1)", {"loss", "dhidden"}),
    ("sums += tl.load(out, mask=mask, other=0.0)", "pass", {"dweight"}),
    ("start > 0 or weight_grad_out is not None", "weight_grad_out is not None", {"dweight"}),
    ("for m in range(0, M, BLOCK_M):", "for m in range(BLOCK_M, M, BLOCK_M):", {"dweight"}),
    ("h_tiles += BLOCK_M * D", "h_tiles += 0", {"dweight"}),
    ("tl.program_id(0) % tiles * BLOCK_D", "0 * BLOCK_D", {"dweight"}),
])
def test_a_broken_kernel_is_caught(sound, broken, where, generator, mutant):
    broken_module = mutant(cross_entropy_module, sound, broken)
    broken_module.BACKENDS["triton"] = broken_module.BACKENDS["triton"]._replace(chunk_rows=140)
    operands = draw(180, 70, 1300, generator, share=1)
    assert where <= set(faults(functools.partial(broken_module.linear_cross_entropy, backend="triton"), *operands))


# On a GPU, with the real vocabulary


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("rows", [37, 700])
def test_the_models_own_head_in_bf16(rows, device, generator):
    hidden, weight, targets = draw(rows, 640, 262_144, generator, BF16, share=1, device=device)
    assert faults(by_triton, hidden, weight * 0.25, targets) == []


@pytest.mark.parametrize("device", [GPU])
def test_a_step_takes_less_than_600_megabytes(device):
    """16,896 tokens of which 22 % carry loss, the head frozen."""
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(16_896, 640, dtype=BF16, device=device, requires_grad=True)
    weight = torch.randn(262_144, 640, device=device).mul_(0.05).to(BF16)
    targets = torch.randint(262_144, (16_896,), device=device)
    targets[torch.rand(16_896, device=device) > 0.22] = IGNORE
    by_triton(hidden, weight, targets).backward()          # compiles and tunes
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    by_triton(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 600e6


@pytest.mark.parametrize("device", [GPU])
def test_nothing_but_finding_the_trained_rows_waits_for_the_gpu(device):
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(600, 640, dtype=BF16, device=device, requires_grad=True)
    weight = torch.randn(4096, 640, dtype=BF16, device=device).requires_grad_()
    targets = torch.randint(4096, (600,), device=device)
    for mode in ("default", "error"):                                  # at first it compiles and tunes
        torch.cuda.set_sync_debug_mode(mode)
        try:
            by_triton(hidden, weight, targets, every_row=True).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [GPU])
def test_a_chunk_of_more_than_two_to_the_31_logits(device, monkeypatch):
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(9_000, 64, dtype=BF16, device=device)
    weight = torch.randn(262_144, 64, device=device).mul_(0.2).to(BF16)
    targets = torch.randint(262_144, (9_000,), device=device)
    expected = gradients(by_triton, hidden, weight, targets)
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(chunk_rows=9_000))
    at_once = gradients(by_triton, hidden, weight, targets)
    assert all(error(got, one.double()) < 1e-2 for got, one in zip(at_once, expected, strict=True))
