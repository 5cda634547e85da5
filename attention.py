"""Gemma-2's attention: a softcap c bounds the scores, and every query sees one span of keys.

    u = scale · q·k,   s = c·tanh(u/c),   P = softmax(s) over low_i <= j <= i,   o = P v

low_i is the first key that query i sees: the start of its document or, on a sliding layer, the
first key of its window, whichever comes later. There are three forms:

`attention_plain` takes any mask and makes all scores at once. Tests compare the others with it.

`attend_spans` is the form for a CPU. It takes blocks of 128 queries, and for each block only the
keys from the block's first low to its last query. |s| <= c = 50, so exp can't overflow float32: no
running maximum is needed. The row sums of exp(s) are kept, and the backward makes the scores again:

    dV += Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − rowsum(P ∘ dP)),   dU = dS ∘ (1 − (s/c)²),
    dQ = scale · dU K,   dK += scale · dUᵀ Q

FlashAttention takes rowsum(dO ∘ O) for rowsum(P ∘ dP). With an O rounded to bfloat16 that makes dQ
and dK a fifth less exact, and O would have to be kept. The code writes tanh(x) = 2σ − 1 and
1 − tanh² = 4σ(1 − σ) with σ = sigmoid(2x): PyTorch's sigmoid is several times faster than its tanh.

`attend_flex` is the form for CUDA: PyTorch's flex_attention with the same scores and spans.

Letters: B batch, T queries, S keys, H query heads, K key-value heads, G = H/K, hd head size,
n queries of a block.
"""

import sys
from collections.abc import Iterator
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fused import LOG2E, softcap, wide_dtype

BLOCK = 128    # queries
SHORT = 64     # rows up to this length take the plain form, which is as fast there
SAFE_CAP = 60  # T·exp(60) is far from float32's largest number, exp(88)


# --------------------------------------------------------------------------------------------------
# Which query sees which keys

def document_starts(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Index (B or 1, T) of the first token of each token's document.

    A document is a run of equal numbers in `documents` (B, T); None is one document a row.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    if documents is None:
        return torch.zeros_like(index)[None]
    is_first = documents[:, 1:] != documents[:, :-1]
    return torch.nn.functional.pad(is_first * index[1:], (1, 0)).cummax(1).values


def span_mask(low: Tensor) -> Tensor:
    """Mask (B or 1, 1, T, T) of the keys from low (B or 1, T) to the query itself."""
    index = torch.arange(low.shape[1], device=low.device)
    return ((index >= low[..., None]) & (index <= index[:, None]))[:, None]


def span_blocks(low: Tensor) -> BlockMask:
    """The same spans as flex_attention's block mask."""
    rows, length = low.shape

    def in_span(b, h, i, j):
        return (low[b if rows > 1 else 0, i] <= j) & (j <= i)
    return create_block_mask(in_span, rows, None, length, length, device=low.device)


def visible_keys(low: Tensor, cap: float | None) -> Tensor | BlockMask:
    """The spans low (B or 1, T) as `attention` takes them: a BlockMask, low itself, or a mask."""
    if low.is_cuda and compiled:
        return span_blocks(low)
    if low.device.type == "cpu" and low.shape[1] > SHORT and cap is not None and cap <= SAFE_CAP:
        return low
    return span_mask(low)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | BlockMask, scale: float,
              cap: float | None) -> Tensor:
    """Attention (B, H, T, hd) of q (B, H, T, hd) to k and v (B, K, S, hd).

    `visible` is what `visible_keys` returned, or a mask (B or 1, 1, T, S).
    """
    if isinstance(visible, BlockMask):
        return attend_flex(q, k, v, visible, scale, cap)
    if visible.dtype == torch.bool:
        return attention_plain(q, k, v, visible, scale, cap)
    return attend_spans(q, k, v, visible, scale, cap)[0]


class Cache:
    """Keys and values of one layer for generation: a ring, token `index` in slot index mod S.

    pairs: zeros (2, B, K, S, hd), since unseen slots get weight 0 and 0 · NaN is NaN. S is the
    whole length, or the window on a sliding layer. A step attends to all S slots: bmm copies what
    isn't contiguous, so the filled part alone would cost more.
    """

    def __init__(self, pairs: Tensor):
        self.pairs = pairs
        self.length = 0  # tokens seen

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, hd) of the next T tokens; return those to attend to.

        The first call takes the prompt, which attends to itself. Each later call takes one token.
        """
        slots, T = self.pairs.shape[3], k.shape[2]
        if self.length == 0:
            slot = torch.arange(T)[-slots:] % slots
            keys, values = k, v
        else:
            slot = slice(self.length % slots, self.length % slots + 1)
            keys, values = self.pairs.unbind()
        self.pairs[0, :, :, slot] = k[:, :, -slots:]
        self.pairs[1, :, :, slot] = v[:, :, -slots:]
        self.length += T
        return keys, values

    def visible(self, index: int, start: Tensor) -> Tensor:
        """Mask (B, 1, 1, S) of the slots that token `index`, stored, sees: from `start` (B,) on."""
        slots = torch.arange(self.pairs.shape[3], device=start.device)
        # The index of each slot's token; negative where there is none yet
        stored = index - (index - slots) % len(slots)
        return (stored >= start[:, None])[:, None, None]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but those of the bool mask `rows` (B,)."""
        self.pairs = self.pairs[:, rows]


# --------------------------------------------------------------------------------------------------
# The plain form

def attention_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float,
                    cap: float | None) -> Tensor:
    """q (B, H, T, hd), k and v (B, K, S, hd), mask (B or 1, 1, T, S) -> (B, H, T, hd).

    The query heads of one key-value head are stacked as further rows, so keys and values are never
    repeated. Scores are capped and normalised in float32.
    """
    K, T = k.shape[1], q.shape[2]
    scores = rearrange(q, "b (k g) t hd -> b k (g t) hd", k=K) @ k.mT             # (B, K, G·T, S)
    scores = softcap(scores.to(wide_dtype(scores)) * scale, cap).unflatten(2, (-1, T))
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)       # (B, K, G, T, S)
    out = weights.to(v.dtype).flatten(2, 3) @ v                                   # (B, K, G·T, hd)
    return rearrange(out, "b k (g t) hd -> b (k g) t hd", t=T)


# --------------------------------------------------------------------------------------------------
# Blocks of queries, for a CPU. These are operators of their own, so that torch.compile takes a
# model in one graph and leaves them alone

@torch.library.custom_op("sails::attend_spans", mutates_args=())
def attend_spans(q: Tensor, k: Tensor, v: Tensor, low: Tensor, scale: float, cap: float
                 ) -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, hd) of q to k and v (B, K, T, hd), and row sums (B, H, T, 1) of exp(s).

    low (B or 1, T) int64 may not decrease along a row. Scores are float32 for float32 and bfloat16.
    """
    (B, H, T, hd), K = q.shape, k.shape[1]
    k, v = k.contiguous(), v.contiguous()
    out = q.new_empty(B, T, H, hd).transpose(1, 2)  # o_proj reads (B, T, H·hd): no copy there
    totals = q.new_empty(B, H, T, 1, dtype=wide_dtype(q))
    scratch = q.new_empty(H * BLOCK * T)
    for b, rows, keys, start in query_blocks(low, B, cap):
        Q, k_span, v_span = stack_heads(q[b, :, rows], K), k[b, :, keys], v[b, :, keys]
        scores = scaled_product(Q, k_span.mT, start, scratch, 2 * scale / cap)    # (H, n, S)
        weights, totals[b, :, rows] = pointwise[0](scores, start, cap)
        out[b, :, rows] = (weights.view(K, -1, start.shape[1]) @ v_span).view(H, -1, hd)
    return out, totals


@torch.library.custom_op("sails::attend_spans_backward", mutates_args=())
def attend_spans_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, low: Tensor,
                          totals: Tensor, scale: float, cap: float
                          ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the output (B, H, T, hd)."""
    (B, H, T, hd), K = q.shape, k.shape[1]
    k, v = k.contiguous(), v.contiguous()
    dq = q.new_empty(B, T, H, hd).transpose(1, 2)
    # Sums over blocks, so they are kept in float32
    dk = torch.zeros(B, K, hd, T, dtype=wide_dtype(q))
    dv = torch.zeros(B, K, hd, T, dtype=wide_dtype(q))
    scratch = q.new_empty(2, H * BLOCK * T)
    for b, rows, keys, start in query_blocks(low, B, cap):
        Q, dO = stack_heads(q[b, :, rows], K), stack_heads(grad[b, :, rows], K)
        k_span, v_span = k[b, :, keys], v[b, :, keys]
        # 4 · scale: the slope that comes with dP lacks the factor 4 of 1 − (s/c)² = 4 (σ − σ²)
        scores = scaled_product(Q, k_span.mT, start, scratch[0], 2 * scale / cap)
        d_weights = scaled_product(dO, v_span.mT, start, scratch[1], 4 * scale)
        total = totals[b, :, rows].clone()
        weights, d_scores = pointwise[1](scores, d_weights, start, total, cap)
        weights = weights.view(K, -1, start.shape[1])                             # (K, G·n, S)
        d_scores = d_scores.view(K, -1, start.shape[1])
        dq[b, :, rows] = (d_scores @ k_span).view(H, -1, hd)
        dk[b, :, :, keys] += Q.mT @ d_scores
        dv[b, :, :, keys] += dO.mT @ weights
    return dq, k.new_empty(k.shape).copy_(dk.mT), v.new_empty(v.shape).copy_(dv.mT)


def query_blocks(low: Tensor, batch: int, cap: float) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """For each row b and block: b, the slice of its queries, that of their keys, and `start`.

    start (n, S) is what the exponents begin from: −c·log₂e where the query sees the key, else −∞.
    """
    T = low.shape[1]
    firsts = low.expand(batch, T)[:, ::BLOCK].tolist()
    for b in range(batch):
        # The last block first: a compiler takes sizes that are equal at first for always equal
        for i, first in reversed(list(zip(range(0, T, BLOCK), firsts[b]))):
            stop = min(i + BLOCK, T)
            own_low = low[b % len(low), i:stop]                                   # (n,)
            start = torch.full((stop - i, stop - first), -cap * LOG2E)
            # No query sees a later one
            future = torch.ones(stop - i, stop - i, dtype=torch.bool).triu_(1)
            start[:, i - first:].masked_fill_(future, -torch.inf)
            # Later queries may see fewer of the first keys
            edge = own_low[-1].item() - first
            if edge > 0:
                unseen = torch.arange(first, first + edge) < own_low[:, None]
                start[:, :edge].masked_fill_(unseen, -torch.inf)
            yield b, slice(i, stop), slice(first, stop), start


def stack_heads(x: Tensor, K: int) -> Tensor:
    """(H, n, hd) -> (K, G·n, hd): the query heads of one key-value head as rows of one matrix."""
    return x.reshape(K, -1, x.shape[2])


def scaled_product(rows, columns, start, scratch, factor):
    """factor · rows (K, G·n, hd) @ columns (K, hd, S) as (H, n, S).

    It is written to `scratch`: fresh pages would cost as much as the product.
    """
    K, S = len(rows), columns.shape[2]
    out = scratch[:rows.shape[0] * rows.shape[1] * S].view(K, -1, S)
    torch.baddbmm(rows.new_zeros(()), rows, columns, beta=0, alpha=factor, out=out)
    return out.view(-1, *start.shape)


def capped_softmax(scores, start, cap):
    """P in the dtype of scores (H, n, S) = 2u/c, and the row sums (H, n, 1) of exp(s)."""
    sigma = scores.to(wide_dtype(scores), copy=True).sigmoid_()
    # s = c (2σ − 1), and start holds −c
    exp = torch.add(start, sigma, alpha=2 * cap * LOG2E, out=sigma).exp2_()
    total = exp.sum(-1, keepdim=True)
    return exp.div_(total).to(scores.dtype), total


def capped_softmax_backward(scores, d_weights, start, total, cap):
    """P and dU, both in the dtype of scores = 2u/c and d_weights = 4·dP (H, n, S)."""
    sigma = scores.to(wide_dtype(scores), copy=True).sigmoid_()
    weights = torch.add(start, sigma, alpha=2 * cap * LOG2E).exp2_().div_(total)
    slope = torch.addcmul(sigma, sigma, sigma, value=-1, out=sigma)
    d_weights = d_weights.to(wide_dtype(scores))
    # P ∘ (dP − rowsum(P ∘ dP))
    d_capped = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    return weights.to(scores.dtype), d_capped.mul_(slope).to(scores.dtype)


# What torch.compile needs to know of the operators: shapes, strides and the backward

@attend_spans.register_fake
def _(q, k, v, low, scale, cap):
    B, H, T, hd = q.shape
    out = q.new_empty(B, T, H, hd).transpose(1, 2)
    return out, q.new_empty(B, H, T, 1, dtype=wide_dtype(q))


@attend_spans_backward.register_fake
def _(grad, q, k, v, low, totals, scale, cap):
    B, H, T, hd = q.shape
    dq = q.new_empty(B, T, H, hd).transpose(1, 2)
    return dq, k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad, _):
    gradients = attend_spans_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.cap)
    return *gradients, None, None, None


attend_spans.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------
# Compiling what stands between the matrix products

EAGER = capped_softmax, capped_softmax_backward
pointwise: tuple = EAGER  # what the operators call
compiled = False   # whether these are compiled, and attention on CUDA is flex_attention


def use_compile(on=True) -> bool:
    """Compile the pointwise parts, or stop doing so. Returns whether they are compiled now."""
    global pointwise, compiled
    functions = _compiled_pointwise() if on else None
    pointwise, compiled = functions or EAGER, functions is not None
    return compiled


@cache
def _compiled_pointwise():
    """The two functions compiled for any shape, or None with a warning where that fails."""
    global pointwise
    pointwise = tuple(torch.compile(function, dynamic=True) for function in EAGER)
    try:
        # One step with unequal sizes: the first block has n = 32 and S = 160
        with torch.enable_grad():
            x = torch.zeros(1, 6, 160, 8, requires_grad=True)
            low = torch.zeros(1, 160, dtype=torch.long)
            attend_spans(x, x, x, low, 1.0, 50.0)[0].sum().backward()
        return pointwise
    except Exception as error:  # no compiler, no Python.h, ...
        reason = str(error).strip().splitlines()[0]
        print(f"warning: torch.compile fails here, running without it: {reason}", file=sys.stderr)
        return None


# --------------------------------------------------------------------------------------------------
# CUDA

@cache
def _compiled_flex():
    return torch.compile(flex_attention)  # on first use: importing the compiler takes seconds


def attend_flex(q, k, v, spans, scale, cap):
    """flex_attention with softcapped scores; `spans` from `span_blocks`. Compiled on CUDA.

    On a CPU it has no backward: there, tests check scores and spans with its uncompiled forward.
    No GPU has run this yet.
    """
    def capped(score, b, h, i, j):  # the score comes scaled
        return softcap(score, cap)
    flex = _compiled_flex() if q.is_cuda else flex_attention
    grouped = q.shape[1] != k.shape[1]
    return flex(q, k, v, score_mod=capped, block_mask=spans, scale=scale, enable_gqa=grouped)
