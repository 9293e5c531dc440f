"""Linear cross-entropy: the last projection and the loss in one, only on rows that carry loss. Full logits
never exist.

    l = h Wᵀ      loss = Σ over rows of log Σ_v exp(l_v) − l_target
    p = softmax(l)      dl = p − onehot(target)      dh = dl W      dW = dlᵀ h

One row of logits is V = 262,144 numbers, so 16,896 tokens of them would take 8.9 GB in bf16. Only 3 to 22 %
of the tokens carry loss; their hidden states are gathered and projected a chunk at a time, and the gradient
of a chunk's logits is turned into the gradient of its hidden states at once. No probability is skipped,
however small.

Both gradients are finished in the forward pass and only scaled in the backward pass. On a GPU a chunk takes
these steps:

    logits kernel          tiles of h Wᵀ in registers; writes a row's log-sum-exp of each vocabulary span
    torch.logsumexp        over the spans, less the target's logit: the loss; no program adds to another's
    logits kernel again    the same tiles, turned into p in registers, written in h's dtype
    torch.scatter_         p − 1 at the targets
    torch.bmm              dh = dl W, of each of 16 parts of the vocabulary in fp32, and their sum
    a kernel               dW += dlᵀ h in fp32, where the head is trained

The logits are computed twice. Kept from the first pass they would have to be in 16 bits to fit, where one of
20 is off by up to 0.06 and its probability by 6 %; computing them again takes no memory and leaves dl with
one rounding. dl itself is written, 512 rows at a time (0.27 GB): the 640 sums of dh of a tile of rows do not
fit the registers of the program that has their dl, and PyTorch's own product over the whole vocabulary is
fast.

    N rows that carry loss   V vocabulary   D width      h (N, D)   W (V, D)   all row-major
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.backend import TRITON_DTYPES, pick
from ops.cpu import build
from ops.triton_utils import can_run, cdiv, jit, load_tile, next_power_of_2, precision, tile_sizes, tl, tuned
from ops.weight_grad import weight_grad

IGNORE = -100        # target of a token that carries no loss
CHUNK_ROWS = 252     # rows of logits at once otherwise: 252 · V · 2 bytes = 0.13 GB; 21 strips of kernels.cpp
FP32_ROWS = 4        # of these in fp32 on a CPU: 4 · V · 4 bytes = 4 MB
KERNEL_ROWS = 512    # rows of logits' gradients at once by the kernels: 512 · V · 2 bytes = 0.27 GB
SPAN = 1024          # words of the vocabulary that a program goes through; a multiple of every tile's
PARTS = 16           # of the vocabulary in dl W: 20 tiles of its (512, 640) times 16 occupy a GPU


# ----------------------------------------------------------------------------------------------------------
# The reference

def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ over rows with target ≥ 0 of −log softmax(hidden Wᵀ)[target].  The definition; what follows must
    equal it."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


# ----------------------------------------------------------------------------------------------------------
# The kernels.  Products are of h's dtype and add up in fp32; logits are never rounded.


def _logits_fit(BLOCK_M: int, BLOCK_V: int, PRECISION: str, num_warps: int, CAPABILITY: int, **_) -> bool:
    """Whether a tile leaves enough registers.  fp32 does without tensor cores and takes the smallest tile."""
    return PRECISION == "tf32" and BLOCK_M * BLOCK_V / (32 * num_warps) <= (64 if CAPABILITY < 90 else 128)


@tuned(tile_sizes(("BLOCK_M", "BLOCK_V", "BLOCK_D"), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3),
                  (128, 128, 64, 4, 3), (64, 64, 32, 8, 3)),
       key=("M_BUCKET", "V", "D", "GRADIENT"), fits=_logits_fit)
@jit
def _logits_kernel(h, w, log_sums, dlogits, M, M_BUCKET, V: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr,
                   GRADIENT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of l = h Wᵀ: log Σ exp(l) over each span of SPAN words;  with GRADIENT p = exp(l − log Σ exp(l)).

    h (M, D), w (V, D). Writes log_sums (spans, M), fp32; with GRADIENT it reads log_sums (M), of the whole
    vocabulary, and writes dlogits (M, V), h's dtype. A program owns BLOCK_M rows and one span, and goes
    through it in tiles of BLOCK_V words, keeping the largest logit and the sum of exponentials so far.
    Programs that share a span run side by side, so that w is read from memory once. Flattened, the two loops
    are one: the next tile is copied while one ends.
    """
    EVEN: tl.constexpr = V % SPAN == 0 and D % BLOCK_D == 0
    blocks = tl.cdiv(M, BLOCK_M)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M
    span = (tl.program_id(0) // blocks).to(tl.int64)
    rows, words, ins = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    row_mask, size = first + rows < M, tl.minimum(V - span * SPAN, SPAN).to(tl.int32)
    h_tiles = h + first * D + rows[:, None] * D + ins[None, :]
    w_tiles = w + span * SPAN * D + words[None, :] * D + ins[:, None]
    if GRADIENT:
        log_sum = tl.load(log_sums + first + rows, mask=row_mask, other=0.0)
        out = dlogits + first * V + span * SPAN + rows[:, None] * V + words[None, :]
    highest, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for v in tl.range(0, size, BLOCK_V, flatten=True):
        inside = v + words < size
        logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            h_tile = tl.load(h_tiles + d, mask=row_mask[:, None] & (d + ins < D)[None, :], other=0.0)
            w_tile = load_tile(w_tiles + v * D + d, (d + ins < D)[:, None] & inside[None, :], EVEN)
            logits = tl.dot(h_tile, w_tile, logits, input_precision=PRECISION)
        if GRADIENT:
            p = tl.exp(logits - log_sum[:, None])
            tl.store(out + v, p.to(dlogits.dtype.element_ty), mask=row_mask[:, None] & inside[None, :])
        else:
            logits = tl.where(inside[None, :], logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
            highest = higher
    if not GRADIENT:
        tl.store(log_sums + span * M + first + rows, highest + tl.log(total), mask=row_mask)


@jit
def _weight_gradient_kernel(dlogits, h, dw, M, V: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr,
                            PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
                            BLOCK_D: tl.constexpr):
    """dW = dlᵀ h, or with ADD dW += dlᵀ h.  dlogits (M, V), h (M, D) of one dtype, dw (V, D) fp32.

    A program owns BLOCK_V words and BLOCK_D columns.
    """
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    start = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_V
    rows, words = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    ins = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = start + words < V
    dl_tiles = dlogits + start + rows[:, None].to(tl.int64) * V + words[None, :]
    h_tiles = h + rows[:, None] * D + ins[None, :]
    sums = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for m in range(0, M, BLOCK_M):
        row_mask = m + rows < M
        dl_tile = tl.load(dl_tiles, mask=row_mask[:, None] & inside[None, :], other=0.0)
        h_tile = tl.load(h_tiles, mask=row_mask[:, None] & (ins < D)[None, :], other=0.0)
        sums = tl.dot(tl.trans(dl_tile), h_tile, sums, input_precision=PRECISION)
        dl_tiles += BLOCK_M * V
        h_tiles += BLOCK_M * D
    out = dw + start * D + words[:, None] * D + ins[None, :]
    mask = inside[:, None] & (ins < D)[None, :]
    if ADD:
        sums += tl.load(out, mask=mask, other=0.0)
    tl.store(out, sums, mask=mask)


# ----------------------------------------------------------------------------------------------------------
# The chunks by each backend: the loss of its rows, fp32 (), and, where it is given, their dlogits (rows, V).
# Rows of target `IGNORE` give zeros.


def _chunk_by_triton(hidden: Tensor, matrix: Tensor, targets: Tensor, dlogits: Tensor | None) -> Tensor:
    M, (V, D) = len(hidden), matrix.shape
    spans = cdiv(V, SPAN)
    sizes = {"M": M, "M_BUCKET": max(64, next_power_of_2(M)), "V": V, "D": D, "SPAN": SPAN,
             "PRECISION": precision(hidden.dtype)}

    def grid(tile: dict) -> tuple[int]:
        return (cdiv(M, tile["BLOCK_M"]) * spans,)

    log_sums = torch.empty(spans, M, dtype=torch.float32, device=hidden.device)
    _logits_kernel[grid](hidden, matrix, log_sums, None, **sizes, GRADIENT=False)
    log_sum, ignored, word = log_sums.logsumexp(dim=0), targets < 0, targets.clamp_min(0)
    target_logit = (hidden.float() * matrix[word].float()).sum(1)
    losses = (log_sum - target_logit).clamp_min(0).masked_fill_(ignored, 0)             # never below 0
    if dlogits is not None:
        log_sum.masked_fill_(ignored, math.inf)
        _logits_kernel[grid](hidden, matrix, log_sum, dlogits, **sizes, GRADIENT=True)
        at_target = torch.expm1(-losses)            # p − 1, exact where p is nearly 1
        dlogits.scatter_(1, word[:, None], at_target[:, None].to(dlogits.dtype))
    return losses.sum()


def _chunk_by_cpp(hidden: Tensor, matrix: Tensor, targets: Tensor, dlogits: Tensor | None) -> Tensor:
    """The logits are rounded to bf16 once; their sums and the gradient follow from those."""
    M, (V, D) = len(hidden), matrix.shape
    logits = hidden.new_empty(M, V) if dlogits is None else dlogits
    log_sum = hidden.new_empty(M, dtype=torch.float32)
    build.call("loss_logits", hidden.contiguous(), matrix, logits, log_sum, M, V, D)
    target_logit = logits.gather(1, targets[:, None].clamp_min(0))[:, 0]
    losses = (log_sum - target_logit).clamp_min(0).masked_fill_(targets < 0, 0)
    if dlogits is not None:
        build.call("loss_gradient", logits, log_sum, targets.long().contiguous(), M, V)
    return losses.sum()


def _chunk_by_torch(hidden: Tensor, matrix: Tensor, targets: Tensor, dlogits: Tensor | None) -> Tensor:
    """The logits are rounded to h's dtype, and then in fp32 a few rows at a time, which fit a CPU's cache."""
    all_logits = torch.mm(hidden, matrix.T, out=dlogits)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    at_once = FP32_ROWS if hidden.device.type == "cpu" else len(hidden)
    for rounded, target in zip(all_logits.split(at_once), targets[:, None].split(at_once), strict=True):
        logits = rounded.float()
        log_sum, ignored, word = logits.logsumexp(dim=-1, keepdim=True), target < 0, target.clamp_min(0)
        loss += (log_sum - logits.gather(1, word)).masked_fill_(ignored, 0).sum()
        if dlogits is not None:                                                 # in the logits' place
            log_sum.masked_fill_(ignored, math.inf)
            rounded.copy_(logits.sub_(log_sum).exp_().scatter_add_(1, word, ignored.float() - 1))
    return loss


def _hidden_gradient(dhidden: Tensor, dlogits: Tensor, matrix: Tensor, parts: int) -> None:
    """dhidden (rows, D) = dlogits (rows, V) matrix (V, D), the products of so many parts of V added in fp32.

    Sums over V = 262,144 that make just 512 × 640 numbers keep few of a GPU's processors busy, unless they
    are cut into parts. Left alone (parts=1), `torch.mm` may cut them too, and then add what was rounded to 16
    bits; here the whole is rounded, once. Which is faster has not been measured. Parts must divide V; where
    they do not, there is one.
    """
    (rows, V), D = dlogits.shape, matrix.shape[1]
    if parts == 1 or V % parts:
        torch.mm(dlogits, matrix, out=dhidden)
        return
    left, right = dlogits.view(rows, parts, V // parts).transpose(0, 1), matrix.view(parts, V // parts, D)
    dhidden.copy_(_products_in_fp32(left, right).sum(0))


def _products_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left (P, M, K) right (P, K, N) → (P, M, N) fp32, never rounded to less."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _weight_gradient_by_triton(dlogits: Tensor, hidden: Tensor, out: Tensor, add: bool) -> None:
    """out (V, D) fp32 = dlogitsᵀ hidden, or += where `add`."""
    V, D = out.shape
    BLOCK_M, BLOCK_V, BLOCK_D = (32, 32, 32) if hidden.dtype == torch.float32 else (64, 64, 128)
    _weight_gradient_kernel[(cdiv(V, BLOCK_V) * cdiv(D, BLOCK_D),)](
        dlogits, hidden, out, len(hidden), V=V, D=D, ADD=add, PRECISION=precision(hidden.dtype),
        BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D)


def _check_triton(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype not in TRITON_DTYPES or not weight.is_contiguous() or not can_run(hidden.device):
        raise ValueError('linear cross-entropy\'s backend "triton" takes fp32, bf16, fp16 on the current '
                         f"CUDA device, and a contiguous weight; got {hidden.dtype} on {hidden.device}, "
                         f"strides {weight.stride()}")


def _check_cpp(hidden: Tensor, weight: Tensor) -> None:
    fits = weight.shape[0] % 16 == weight.shape[1] % 32 == 0 and weight.is_contiguous()
    build.check("V a multiple of 16 and D of 32, and a contiguous weight", fits, hidden)


class Backend(NamedTuple):
    check: Callable[[Tensor, Tensor], None]     # (hidden, weight): raises ValueError if it does not take them
    chunk: Callable[..., Tensor]                # (hidden, matrix, targets, dlogits) → loss
    weight_gradient: Callable[..., object]      # (dlogits, hidden, out, add)
    chunk_rows: int


BACKENDS = {
    "triton": Backend(_check_triton, _chunk_by_triton, _weight_gradient_by_triton, KERNEL_ROWS),
    "cpp": Backend(_check_cpp, _chunk_by_cpp, partial(weight_grad, backend="cpp"), CHUNK_ROWS),
    "torch": Backend(lambda hidden, weight: None, _chunk_by_torch, weight_grad, CHUNK_ROWS),
}


# ----------------------------------------------------------------------------------------------------------
# The autograd function


_buffers: dict[str, Tensor] = {}


def _buffer(name: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory of (rows, columns) for one forward pass, of the dtype and on the device of `like`.

    On a CPU all passes use the same: half a gigabyte of new pages takes longer than the work in it
    (docs/log.md).
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    if name not in _buffers or _buffers[name].dtype != like.dtype or _buffers[name].numel() < rows * columns:
        _buffers[name] = like.new_empty(rows * columns)
    return _buffers[name][:rows * columns].view(rows, columns)


class _LinearCrossEntropy(torch.autograd.Function):
    """Saved are the finished gradients of the loss in nats."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, backend: Backend,
                weight_grad_out: Tensor | None) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        matrix = weight
        if weight.dtype != hidden.dtype:
            matrix = _buffer("head", *weight.shape, like=hidden).copy_(weight)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = weight_grad_out
        if need_weight and weight_grad_out is None:
            dweight = (torch.empty_like if len(hidden) else torch.zeros_like)(weight, dtype=torch.float32)
        buffer = None
        if need_hidden or need_weight:
            buffer = _buffer("logits", min(len(hidden), backend.chunk_rows), len(weight), like=hidden)
        parts = PARTS if hidden.is_cuda else 1
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), backend.chunk_rows):
            rows = slice(start, start + backend.chunk_rows)
            dlogits = None if buffer is None else buffer[:len(hidden) - start]
            loss += backend.chunk(hidden[rows], matrix, targets[rows], dlogits)
            if need_hidden:
                _hidden_gradient(dhidden[rows], dlogits, matrix, parts)
            if need_weight:
                add = start > 0 or weight_grad_out is not None
                backend.weight_gradient(dlogits, hidden[rows], dweight, add)
        ctx.save_for_backward(dhidden)
        ctx.dweight, ctx.weight_dtype, ctx.added = dweight, weight.dtype, weight_grad_out is not None
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        [dhidden], dweight, ctx.dweight = ctx.saved_tensors, ctx.dweight, None
        if ctx.added:
            if grad != 1:
                raise RuntimeError("linear cross-entropy has added its weight's gradient already, and so "
                                   f"cannot be scaled by {grad:.3g}")
            return dhidden, None, None, None, None
        if ctx.needs_input_grad[1] and dweight is None:
            raise RuntimeError("linear cross-entropy gives its weight's gradient away in the first backward "
                               "pass, and so has no second one")
        if dhidden is not None:
            dhidden = (dhidden * grad[None]).to(dhidden.dtype)      # [None]: a scalar would be rounded first
        if dweight is not None:
            dweight = dweight.mul_(grad).to(ctx.weight_dtype)       # in place: 0.67 GB
        return dhidden, dweight, None, None, None


# ----------------------------------------------------------------------------------------------------------
# The public function


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, every_row: bool = False,
                         weight_grad_out: Tensor | None = None, backend: str = "torch") -> Tensor:
    """Cross-entropy of the next token, summed over the rows that carry loss, in nats.

    hidden (T, D); weight (V, D), the tied embedding; targets (T) int64, `IGNORE` where there is no loss.
    every_row: all rows are computed, as they are known to carry loss (one of `IGNORE` still carries none);
    finding those that do makes the host wait for the device. weight_grad_out (V, D) fp32: where weight's
    gradient is added at once instead of being returned by the backward pass, which must begin at this very
    scalar; for sums over micro-batches. backend: of `BACKENDS`. Returns an fp32 scalar, 0 where no row
    carries loss.

    Raises ValueError for operands that the backend does not take.
    """
    implementation = pick(BACKENDS, backend)
    implementation.check(hidden, weight)
    if not every_row:
        rows = (targets != IGNORE).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    if not torch.is_grad_enabled():          # or the forward pass would compute a gradient that nobody takes
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, implementation, weight_grad_out)
