"""Linear cross-entropy: the last projection and the loss in one, on trained rows only. Full logits never exist.

    l = h Wᵀ      loss = Σ over rows of log Σ_v exp(l_v) − l_target
    p = softmax(l)      dl = p − onehot(target)      dh = dl W      dW = dlᵀ h

One row of logits is V = 262,144 numbers, so 16,896 tokens of them would take 8.9 GB in bf16. Only 3 to 22 % of the
tokens carry loss; their hidden states are gathered and projected a chunk at a time, and the gradient of a chunk's
logits is turned into the gradient of its hidden states while it is still there. Nothing is skipped, however unlikely.

Both gradients are finished in the forward pass and only scaled in the backward pass. On a GPU a chunk is these steps:

    logits kernel            tiles of h Wᵀ in registers; of each span of the vocabulary a row's log-sum-exp is written
    torch.logsumexp          of the spans, less the target's logit: the loss. No two programs write to one place
    logits kernel again      the same tiles, turned into p in registers and written in h's dtype; torch puts p − 1 at the targets
    torch.bmm                dh = dl W, of each of 16 parts of the vocabulary in fp32, and their sum
    a kernel                 dW += dlᵀ h in fp32, where the head is trained

The logits are multiplied out twice. Kept from the first pass they would have to be in 16 bits to fit, where one of 20 is off
by up to 0.06 and its probability by 6 %; multiplying again takes no memory and leaves dl with one rounding. dl itself is
written, 512 rows at a time (0.27 GB): the 640 sums of dh of a tile of rows do not fit the registers of the program that
has their dl, and a plain product over the whole vocabulary is what PyTorch's are for.

    N trained rows   V vocabulary   D width      h (N, D)   W (V, D)   all row-major

In this order: definition, Triton kernels, the chunks (by kernel, C++ or PyTorch), autograd function, public function.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu import build
from ops.triton_utils import can_run, cdiv, jit, load_tile, next_power_of_2, precision, tile_sizes, tl, tuned

IGNORE = -100        # target of a token that carries no loss
CHUNK_ROWS = 252     # rows of logits alive at once otherwise: 252 · V · 2 bytes = 0.13 GB, and 21 strips of ops/cpu/kernels.cpp
CPU_ROWS = 4         # of these in fp32 on a CPU: 4 · V · 4 bytes = 4 MB
CHUNK_WORDS = 1 << 14        # words whose weight gradient PyTorch multiplies out at once: 16,384 · D · 2 bytes = 0.02 GB
KERNEL_ROWS = 512    # rows of logits' gradients alive at once by the kernels: 512 · V · 2 bytes = 0.27 GB
SPAN = 1024          # words of the vocabulary that a program goes through; a multiple of every tile's
PARTS = 16           # of the vocabulary in dl W: 20 tiles of its (512, 640) times 16 occupy a GPU


# ---------------------------------------------------------------------------------------------------------------------
# The definition


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ over rows with target ≥ 0 of −log softmax(hidden Wᵀ)[target].  The definition; what follows must equal it."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# The kernels.  Products are of h's dtype and add up in fp32; logits are never rounded.


@tuned(tile_sizes(("BLOCK_M", "BLOCK_V", "BLOCK_D"), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 64, 32, 8, 3)),
       key=("M_BUCKET", "V", "D", "GRADIENT"),
       fits=lambda BLOCK_M, BLOCK_V, PRECISION, num_warps, CAPABILITY, **_:        # fp32 does without tensor cores: the smallest
           PRECISION == "tf32" and BLOCK_M * BLOCK_V / (32 * num_warps) <= (64 if CAPABILITY < 90 else 128))
@jit
def _logits_kernel(h, w, log_sums, dlogits, M, M_BUCKET, V: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, GRADIENT: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of l = h Wᵀ: log Σ exp(l) over each span of SPAN words;  with GRADIENT p = exp(l − log Σ exp(l)).

    h (M, D), w (V, D). Written is log_sums (spans, M), fp32; with GRADIENT log_sums (M) is read, that of the whole vocabulary,
    and written is dlogits (M, V), h's dtype. A program owns BLOCK_M rows and one span, and goes through it by tiles of BLOCK_V
    words, the largest logit and the sum of exponentials beside it kept as they grow. Programs that share a span run side
    by side, so that w comes from memory once. Flattened, the two loops are one: the next tile is copied while one ends.
    """
    EVEN: tl.constexpr = V % SPAN == 0 and D % BLOCK_D == 0
    blocks = tl.cdiv(M, BLOCK_M)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M
    span = (tl.program_id(0) // blocks).to(tl.int64)
    rows, words, ins = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    mine, size = first + rows < M, tl.minimum(V - span * SPAN, SPAN).to(tl.int32)
    h_tiles = h + first * D + rows[:, None] * D + ins[None, :]
    w_tiles = w + span * SPAN * D + words[None, :] * D + ins[:, None]
    if GRADIENT:
        log_sum = tl.load(log_sums + first + rows, mask=mine, other=0.0)
        out = dlogits + first * V + span * SPAN + rows[:, None] * V + words[None, :]
    highest, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for v in tl.range(0, size, BLOCK_V, flatten=True):
        inside = v + words < size
        logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for d in range(0, D, BLOCK_D):
            h_tile = tl.load(h_tiles + d, mask=mine[:, None] & (d + ins < D)[None, :], other=0.0)
            w_tile = load_tile(w_tiles + v * D + d, (d + ins < D)[:, None] & inside[None, :], EVEN)
            logits = tl.dot(h_tile, w_tile, logits, input_precision=PRECISION)
        if GRADIENT:
            p = tl.exp(logits - log_sum[:, None])
            tl.store(out + v, p.to(dlogits.dtype.element_ty), mask=mine[:, None] & inside[None, :])
        else:
            logits = tl.where(inside[None, :], logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
            highest = higher
    if not GRADIENT:
        tl.store(log_sums + span * M + first + rows, highest + tl.log(total), mask=mine)


@jit
def _weight_gradient_kernel(dlogits, h, dw, M, V: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """dW = dlᵀ h, or with ADD dW += dlᵀ h.  dlogits (M, V), h (M, D) of one dtype, dw (V, D) fp32.

    A program owns BLOCK_V words and BLOCK_D columns.
    """
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    start = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_V
    rows, words, ins = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = start + words < V
    dl_tiles = dlogits + start + rows[:, None].to(tl.int64) * V + words[None, :]
    h_tiles = h + rows[:, None] * D + ins[None, :]
    sums = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for m in range(0, M, BLOCK_M):
        mine = m + rows < M
        dl_tile = tl.load(dl_tiles, mask=mine[:, None] & inside[None, :], other=0.0)
        h_tile = tl.load(h_tiles, mask=mine[:, None] & (ins < D)[None, :], other=0.0)
        sums = tl.dot(tl.trans(dl_tile), h_tile, sums, input_precision=PRECISION)
        dl_tiles += BLOCK_M * V
        h_tiles += BLOCK_M * D
    out = dw + start * D + words[:, None] * D + ins[None, :]
    mine = inside[:, None] & (ins < D)[None, :]
    if ADD:
        sums += tl.load(out, mask=mine, other=0.0)
    tl.store(out, sums, mask=mine)


# ---------------------------------------------------------------------------------------------------------------------
# The chunks, by kernel or by PyTorch


def _chunk_by_triton(hidden: Tensor, matrix: Tensor, target: Tensor, dlogits: Tensor | None) -> Tensor:
    """Loss of a chunk's rows, fp32 (); fills dlogits (rows, V) where it is given. Rows of `IGNORE` give zeros."""
    M, (V, D) = len(hidden), matrix.shape
    spans = cdiv(V, SPAN)
    sizes = {"M": M, "M_BUCKET": max(64, next_power_of_2(M)), "V": V, "D": D, "SPAN": SPAN, "PRECISION": precision(hidden.dtype)}

    def grid(tile: dict) -> tuple[int]:
        return (cdiv(M, tile["BLOCK_M"]) * spans,)

    log_sums = torch.empty(spans, M, dtype=torch.float32, device=hidden.device)
    _logits_kernel[grid](hidden, matrix, log_sums, None, **sizes, GRADIENT=False)
    log_sum, nothing, word = log_sums.logsumexp(dim=0), target < 0, target.clamp_min(0)
    losses = (log_sum - (hidden.float() * matrix[word].float()).sum(1)).clamp_min(0).masked_fill_(nothing, 0)     # never below 0
    if dlogits is not None:
        _logits_kernel[grid](hidden, matrix, log_sum.masked_fill_(nothing, math.inf), dlogits, **sizes, GRADIENT=True)
        dlogits.scatter_(1, word[:, None], torch.expm1(-losses)[:, None].to(dlogits.dtype))     # p − 1, exact where p is nearly 1
    return losses.sum()


def _chunk_by_pytorch(hidden: Tensor, matrix: Tensor, target: Tensor, dlogits: Tensor | None) -> Tensor:
    """As `_chunk_by_triton`.  The logits are rounded to h's dtype, and then few rows at a time in fp32, which a CPU's cache holds."""
    whole = torch.mm(hidden, matrix.T, out=dlogits)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    at_once = CPU_ROWS if hidden.device.type == "cpu" else len(hidden)
    for rounded, wanted in zip(whole.split(at_once), target[:, None].split(at_once), strict=True):
        logits = rounded.float()
        log_sum, nothing, word = logits.logsumexp(dim=-1, keepdim=True), wanted < 0, wanted.clamp_min(0)
        loss += (log_sum - logits.gather(1, word)).masked_fill_(nothing, 0).sum()
        if dlogits is not None:                                                 # in the logits' place
            log_sum.masked_fill_(nothing, math.inf)
            rounded.copy_(logits.sub_(log_sum).exp_().scatter_add_(1, word, nothing.float() - 1))
    return loss


def _takes_cpp(hidden: Tensor, matrix: Tensor) -> bool:
    (V, D) = matrix.shape
    return V % 16 == D % 32 == 0 and matrix.is_contiguous() and build.takes(hidden, matrix)


def _chunk_by_cpp(hidden: Tensor, matrix: Tensor, target: Tensor, dlogits: Tensor | None) -> Tensor:
    """As `_chunk_by_triton`.  The logits are rounded to bf16 once; their sums and the gradient follow from those."""
    M, (V, D) = len(hidden), matrix.shape
    logits, log_sum = hidden.new_empty(M, V) if dlogits is None else dlogits, hidden.new_empty(M, dtype=torch.float32)
    build.call("loss_logits", hidden.contiguous(), matrix, logits, log_sum, M, V, D)
    losses = (log_sum - logits.gather(1, target[:, None].clamp_min(0))[:, 0]).clamp_min(0).masked_fill_(target < 0, 0)
    if dlogits is not None:
        build.call("loss_gradient", logits, log_sum, target.long().contiguous(), M, V)
    return losses.sum()


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


def _weight_gradient(dweight: Tensor, dlogits: Tensor, hidden: Tensor, add: bool, by_triton: bool) -> None:
    """dweight (V, D) fp32 = dlogitsᵀ hidden, or += where `add`."""
    if not by_triton:
        if dweight.dtype == torch.float32 and dweight.is_contiguous() and build.multiplies_to_fp32(hidden, len(dweight)):
            build.weight_gradient(dlogits, hidden, dweight, add)
            return
        for words in range(0, len(dweight), CHUNK_WORDS):                       # the product is in 16 bits at first
            part = slice(words, words + CHUNK_WORDS)
            made = dlogits[:, part].T @ hidden
            dweight[part].add_(made) if add else dweight[part].copy_(made)
        return
    (V, D), (BLOCK_M, BLOCK_V, BLOCK_D) = dweight.shape, (32, 32, 32) if hidden.dtype == torch.float32 else (64, 64, 128)
    _weight_gradient_kernel[(cdiv(V, BLOCK_V) * cdiv(D, BLOCK_D),)](
        dlogits, hidden, dweight, len(hidden), V=V, D=D, ADD=add, PRECISION=precision(hidden.dtype),
        BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D)


# ---------------------------------------------------------------------------------------------------------------------
# The autograd function


_rooms: dict[str, Tensor] = {}


def _room(name: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory of (rows, columns) for one forward pass, of the dtype and on the device of `like`.

    On a CPU it is the same for every pass: half a gigabyte of new pages takes longer than what is done with it (docs/log.md).
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    if name not in _rooms or _rooms[name].dtype != like.dtype or _rooms[name].numel() < rows * columns:
        _rooms[name] = like.new_empty(rows * columns)
    return _rooms[name][:rows * columns].view(rows, columns)


class _LinearCrossEntropy(torch.autograd.Function):
    """Saved are the finished gradients, of a loss of which one nat counts one."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, by_triton: bool, into: Tensor | None) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        matrix = weight if weight.dtype == hidden.dtype else _room("head", *weight.shape, like=hidden).copy_(weight)
        if by_triton:
            chunk_loss, chunk_rows = _chunk_by_triton, KERNEL_ROWS
        else:
            chunk_loss, chunk_rows = _chunk_by_cpp if _takes_cpp(hidden, matrix) else _chunk_by_pytorch, CHUNK_ROWS
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = into
        if need_weight and into is None:
            dweight = (torch.empty_like if len(hidden) else torch.zeros_like)(weight, dtype=torch.float32)
        room = _room("logits", min(len(hidden), chunk_rows), len(weight), like=hidden) if need_hidden or need_weight else None
        parts = PARTS if hidden.is_cuda else 1
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            dlogits = None if room is None else room[:len(hidden) - start]
            total += chunk_loss(hidden[rows], matrix, targets[rows], dlogits)
            if need_hidden:
                _hidden_gradient(dhidden[rows], dlogits, matrix, parts)
            if need_weight:
                _weight_gradient(dweight, dlogits, hidden[rows], start > 0 or into is not None, by_triton)
        ctx.save_for_backward(dhidden)
        ctx.dweight, ctx.weight_dtype, ctx.added = dweight, weight.dtype, into is not None
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        [dhidden], dweight, ctx.dweight = ctx.saved_tensors, ctx.dweight, None
        if ctx.added:
            if grad != 1:
                raise RuntimeError(f"linear cross-entropy has added its weight's gradient already, and so cannot be scaled by {grad:.3g}")
            return dhidden, None, None, None, None
        if ctx.needs_input_grad[1] and dweight is None:
            raise RuntimeError("linear cross-entropy gives its weight's gradient away in the first backward pass, and so has no second one")
        return (None if dhidden is None else (dhidden * grad[None]).to(dhidden.dtype),     # [None]: a scalar would be rounded to bf16 first
                None if dweight is None else dweight.mul_(grad).to(ctx.weight_dtype), None, None, None)       # in place: 0.67 GB


# ---------------------------------------------------------------------------------------------------------------------
# The public function


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, by_triton: bool | None = None, every_row: bool = False,
                         into: Tensor | None = None) -> Tensor:
    """Cross-entropy of the next token, summed over the rows that carry loss, in nats.

    hidden (T, D); weight (V, D), the tied embedding; targets (T) int64, `IGNORE` where there is no loss. by_triton: whether
    kernels compute it (default: on a CUDA device). every_row: all rows are computed, for it is known that they carry loss (one
    of `IGNORE` still carries none); finding those that do makes the host wait for the device. into (V, D) fp32: where weight's
    gradient is added at once instead of being given back by the backward pass, which must begin at this very scalar; for sums
    over several passes. Returns an fp32 scalar, 0 where no row carries loss.
    """
    takes = hidden.dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.is_contiguous()
    if by_triton is None:
        by_triton = hidden.is_cuda and can_run(hidden.device) and takes
    if by_triton and not takes:
        raise ValueError(f"linear cross-entropy by kernels takes fp32, bf16, fp16 and a contiguous weight; got {hidden.dtype}, strides "
                         f"{weight.stride()}")
    if not every_row:
        rows = (targets != IGNORE).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    if not torch.is_grad_enabled():          # or the forward pass would work out a gradient that nobody takes
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, by_triton, into)
