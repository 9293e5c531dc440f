"""Gemma 3, text only, from scratch: the model behind FunctionGemma (270M), and its larger siblings by their
config.

Rows of any length are packed one after another into a single sequence of T tokens; `documents` says which row
each token belongs to, and attention never leaves a row. There is no padding and no (T, T) mask.

Letters for shapes, here and in every other file:
    B batch   T tokens of all documents   D width   N query heads   K key/value heads   H head dim
    F MLP width   V vocabulary   R LoRA rank

Parameter names equal the published checkpoint's, so loading is a strict `load_state_dict`
(storage/pretrained.py). LoRA is wrapped around the linears from outside (lora.py); nothing here knows of it.

Source: "Gemma 3 Technical Report" (arXiv 2503.19786) and the published config.json; tests/test_model.py
compares with transformers, and `python tests/compare_layers.py MODEL` does so layer by layer.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ops.attention import attention
from ops.attention_tables import Tables, Tile, plan
from ops.backend import Backends, choose_backends
from ops.cross_entropy import linear_cross_entropy
from ops.geglu import geglu
from ops.rms_norm import rms_norm
from ops.transfer import to_device_async
from ops.weight_grad import weight_grad


@dataclass(frozen=True)
class GemmaConfig:
    """What of config.json decides the computation. Defaults are Gemma 3 270M's."""

    vocab_size: int = 262_144               # V
    hidden_size: int = 640                  # D
    intermediate_size: int = 2_048          # F
    num_hidden_layers: int = 18
    num_attention_heads: int = 4            # N
    num_key_value_heads: int = 1            # K
    head_dim: int = 256                     # H
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256.0    # attention scores are scaled by its -1/2 power
    sliding_window: int = 512               # tokens a local layer sees, itself included
    rope_theta: float = 1e6                 # of global layers
    rope_local_base_freq: float = 1e4       # of local layers
    rope_factor: float = 1.0  # positions of global layers are divided by it (8 for Gemma 3 4B and up)
    layer_types: tuple[str, ...] = field(default=())    # "sliding_attention" or "full_attention", one a layer

    def __post_init__(self) -> None:
        if not self.layer_types:
            types = ("full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
                     for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", tuple(types))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The tokens that each layer sees; None: all."""
        return tuple(self.sliding_window if kind == "sliding_attention" else None
                     for kind in self.layer_types)

    @property
    def heads(self) -> tuple[int, int, int]:
        """N, K and H."""
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim


# ------------------------------------------------------------------------------------------------------------
# Leaves


def rope_tables(positions: Tensor, head_dim: int, theta: float, factor: float,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's rotation angles, (T, 1, H) each: H/2 frequencies, twice.

    positions (T).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * (theta ** -exponents / factor)       # (T, H/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _TiedEmbedding(torch.autograd.Function):
    """The words' rows of the embedding, and the embedding itself for the head that is tied to it.

    Both uses get one gradient of (V, D): autograd would make a second one for the rows, nearly all of it
    zeros. With `weight_grad_out` that of the rows is added there.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor, weight_grad_out: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.weight_grad_out = weight.shape, weight_grad_out
        ctx.set_materialize_grads(False)
        return F.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, dwords: Tensor | None, dhead: Tensor | None) -> tuple[Tensor | None, None, None]:
        [tokens] = ctx.saved_tensors
        total = dhead if ctx.weight_grad_out is None else ctx.weight_grad_out
        if dwords is not None:
            total = dwords.new_zeros(ctx.shape) if total is None else total
            if total.is_cuda:
                # sorts the words; index_add_ there is a race
                total.index_put_((tokens,), dwords, accumulate=True)
            else:
                total.index_add_(0, tokens, dwords)
        return total if ctx.weight_grad_out is None else None, None, None


class _LinearOfMasters(torch.autograd.Function):
    """y = x Wᵀ in x's dtype, of W in fp32, whose gradient is summed in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, weight_grad(dy, x, backend=ctx.backend), None


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


# What `attention` needs to know, by the window of a layer.
Plans = dict[int | None, Sequence[Tile] | Tables]

# What a layer asks for its attention: (q (T, N, H), k (T, K, H), v (T, K, H), scale of the scores) -> (T, N,
# H).
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


# ------------------------------------------------------------------------------------------------------------
# Modules


class Linear(nn.Linear):
    """y = x Wᵀ without bias, computed in x's dtype whatever the dtype W is kept in (fp32 masters, bf16
    compute).
    """

    backends = Backends()       # replaced by `Gemma3.set_backends`

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        backend, weight = self.backends.weight_grad, self.weight
        if backend != "torch" and weight.requires_grad and weight.dtype == torch.float32:
            return _LinearOfMasters.apply(x, weight, backend)
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    backends = Backends()       # replaced by `Gemma3.set_backends`

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None,
                return_input: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x over its last axis, added to `residual` or turned by `rope`.

        With return_input x, too (`rms_norm`).
        """
        return rms_norm(x, self.weight, self.eps, residual, rope, return_input, self.backends.rms_norm)


class Attention(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, N, K, H = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim, self.scale = H, config.query_pre_attn_scalar ** -0.5
        self.q_proj, self.k_proj, self.v_proj = Linear(D, N * H), Linear(D, K * H), Linear(D, K * H)
        self.o_proj = Linear(N * H, D)
        self.q_norm, self.k_norm = RMSNorm(H, config.rms_norm_eps), RMSNorm(H, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend,
                rows: Tensor | None = None) -> Tensor:
        T = len(x)
        q, k, v = (part.view(T, -1, self.head_dim) for part in self.project(x))
        q, k = self.q_norm(q, rope=rope), self.k_norm(k, rope=rope)             # (T, N, H), (T, K, H)
        return self.o_proj(select(attend(q, k, v, self.scale).reshape(T, -1), rows))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q (T, N·H), k and v (T, K·H): in one place, for they share x."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    backends = Backends()       # replaced by `Gemma3.set_backends`

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = Linear(D, F_), Linear(D, F_), Linear(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), self.backends.geglu))


class Block(nn.Module):
    """One layer: attention and MLP, each with a norm before and after it, each added to the residual stream.
    """

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend,
                rows: Tensor | None = None) -> Tensor:
        """x (T, D) → (T, D), or those of its tokens that `rows` names.

        After attention a token stands alone.
        """
        # A norm gives back the x that it reads: its backward pass then adds the gradient of the residual
        # stream, too.
        normed, x = self.input_layernorm(x, return_input=True)
        x = self.post_attention_layernorm(self.self_attn(normed, rope, attend, rows), residual=select(x,
                                                                                                      rows))
        normed, x = self.pre_feedforward_layernorm(x, return_input=True)
        return self.post_feedforward_layernorm(self.mlp(normed), residual=x)


class Gemma3(nn.Module):
    """The language model. `forward` gives hidden states, or the loss, which projects the few rows it needs.

    backends: who computes each operation; by default the fastest for PyTorch's default device. A model that
    is built for one device and moved to another needs `set_backends`.
    """

    def __init__(self, config: GemmaConfig, compute_dtype: torch.dtype = torch.float32,
                 backends: Backends | None = None) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        # keep only what enters each layer, and compute the layer again in the backward pass
        self.checkpoint_activations = False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.set_backends(backends or choose_backends(torch.get_default_device(), compute_dtype, config))

    def set_backends(self, backends: Backends) -> None:
        """From now on each operation is computed by the backend that is named here, in adapters too."""
        self.backends = backends
        for module in self.modules():
            if isinstance(module, Linear | RMSNorm | MLP):
                module.backends = backends

    @property
    def head(self) -> Tensor:
        """The last projection, tied to the embedding: (V, D), in the dtype it is kept in."""
        return self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor, rows: Tensor | None = None,
                targets: Tensor | None = None, weight_grad_out: Tensor | None = None,
                plans: Plans | None = None) -> Tensor:
        """Hidden states after the last norm, of all tokens or of those that `rows` names; with `targets`
        their summed loss.

        tokens (T) int64; documents (T), one value for each document, its tokens side by side; positions (T),
        each document counting from 0. A document that counts from n > 0 continues the first n tokens of the
        last one that counts from 0, and is computed as if it held them. Positions and documents that are kept
        on the CPU cost no device synchronisation. rows (M) int64, each once. targets, (T) or (M): as for
        `linear_cross_entropy`, but each of those that `rows` names carries loss. weight_grad_out (V, D): as
        for `linear_cross_entropy`, of the tied embedding. plans: of `plans` for these documents. Returns (T,
        D), or (M, D), in `compute_dtype`; with targets an fp32 scalar in nats.
        """
        plans = self.plans(positions, documents, tokens.device) if plans is None else plans
        words, head = _TiedEmbedding.apply(self.head, tokens, weight_grad_out)
        attend = [partial(attention, plan=plans[window], backend=self.backends.attention)
                  for window in self.config.windows]
        hidden = self._layers(words, to_device_async(positions, tokens.device), attend, rows)
        if targets is None:
            return hidden
        return linear_cross_entropy(hidden, head, targets, every_row=rows is not None,
                                    weight_grad_out=weight_grad_out, backend=self.backends.cross_entropy)

    def plans(self, positions: Tensor, documents: Tensor, device: torch.device) -> Plans:
        """What attention needs to know of documents, for each window; arguments as for `forward`."""
        lengths = torch.unique_consecutive(documents, return_counts=True)[1]
        starts = positions[(lengths.cumsum(0) - lengths).to(positions.device)].tolist()
        return {window: plan(lengths.tolist(), window, self.compute_dtype, device, self.config.heads, starts,
                             backend=self.backends.attention)
                for window in set(self.config.windows)}

    def run(self, tokens: Tensor, positions: Tensor, attend: Sequence[Attend],
            rows: Tensor | None = None) -> Tensor:
        """The hidden states with each layer's attention given: training packs documents, decoding keeps keys
        and values.

        tokens and positions (T); attend: one for each layer. The last layer goes on with `rows` alone after
        its attention, for nothing looks at the others any more. Returns (T, D) or (M, D) in `compute_dtype`.
        """
        return self._layers(F.embedding(tokens, self.head), positions, attend, rows)

    def _layers(self, words: Tensor, positions: Tensor, attend: Sequence[Attend],
                rows: Tensor | None) -> Tensor:
        config, dtype = self.config, self.compute_dtype
        x = words.to(dtype) * torch.tensor(config.hidden_size ** 0.5, dtype=dtype)
        ropes = {"sliding_attention": rope_tables(positions, config.head_dim, config.rope_local_base_freq,
                                                  1.0, dtype),
                 "full_attention": rope_tables(positions, config.head_dim, config.rope_theta,
                                               config.rope_factor, dtype)}
        recompute = None  # no layer draws from a generator: its state need not be kept
        if self.checkpoint_activations and torch.is_grad_enabled():
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        last = self.model.layers[-1]
        for block, kind, attend_layer in zip(self.model.layers, config.layer_types, attend, strict=True):
            inputs = x, ropes[kind], attend_layer, rows if block is last else None
            x = recompute(block, *inputs) if recompute else block(*inputs)
        return self.model.norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        """Next-token scores for every position, (B, T, V): for looking at, not for training.

        ids (B, T), no padding.
        """
        rows, length = ids.shape
        positions = torch.arange(length, device=ids.device).repeat(rows)
        documents = torch.arange(rows).repeat_interleave(length)
        hidden = self(ids.reshape(-1), positions, documents)
        return F.linear(hidden, self.head.to(hidden.dtype)).view(rows, length, -1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights for training from nothing.

        Normal, 1/√fan-in for linears, so that activations start near 1.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.zero_()                    # norms scale by 1 + weight
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
