"""Gemma-2's attention: a softcap c bounds the scores, and every query sees one span of keys.

    u = scale · q·k,   s = c·tanh(u/c),   P = softmax(s) over low_i <= j <= i,   o = P v

low_i is the first key that query i sees: the start of its document or, on a sliding layer, the
first key of its window, whichever comes later. There are three forms:

    attention_plain    any mask, all scores at once; on CUDA whatever needs no gradient
    attend_spans       on a CPU: blocks of 128 queries, whose scores a cache holds
    attend_flex        on CUDA with gradients: PyTorch's flex_attention

Letters: B batch, T queries, S keys, H query heads, K key-value heads, G = H/K, hd head size,
n queries of a block.
"""

import math
import sys
from collections.abc import Callable
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fused import LOG2E, softcap, wide_dtype

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers, as config.json says
BLOCK = 128    # queries
SHORT = 64     # rows up to this length take the plain form, which is as fast there
SAFE_CAP = 60  # T·exp(60) is far from float32's largest number, exp(88)
BLOCK_SIZES = ("fwd_BLOCK_M", "fwd_BLOCK_N",  # flex_attention's kernel options
               "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")


# --------------------------------------------------------------------------------------------------
# Which query sees which keys

def span_mask(low: Tensor) -> Tensor:
    """Mask (B or 1, 1, T, T) of the keys from low (B or 1, T) to the query itself."""
    key = torch.arange(low.shape[1], device=low.device)
    query = key[:, None]
    return ((key >= low[..., None]) & (key <= query))[:, None]


def span_blocks(low: Tensor) -> BlockMask:
    """The same spans as flex_attention's block mask."""
    B, T = low.shape

    def in_span(b, h, i, j):
        return (low[b % B, i] <= j) & (j <= i)  # one row of spans may stand for all
    return create_block_mask(in_span, B, None, T, T, device=low.device)


def visible_keys(low: Tensor, cap: float | None) -> Tensor | BlockMask:
    """The spans low (B or 1, T) as `attention` takes them: a BlockMask, low itself, or a mask."""
    T = low.shape[1]
    # Flex is for a backward, which would keep T × T scores. It compiles anew for lengths of
    # prompts, and PyTorch 2.13 gives rows under 128 to a kernel that refuses some shapes
    if low.is_cuda and T >= BLOCK and torch.is_grad_enabled():
        return span_blocks(low)
    bounded = cap is not None and cap <= SAFE_CAP
    if low.is_cpu and T > SHORT and bounded:
        return low
    return span_mask(low)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | BlockMask,
              scale: float, cap: float | None) -> Tensor:
    """Attention (B, H, T, hd) of q (B, H, T, hd) to k and v (B, K, S, hd).

    `visible` is what `visible_keys` returned, or a mask (B or 1, 1, T, S).
    """
    if isinstance(visible, BlockMask):
        return attend_flex(q, k, v, visible, scale, cap)
    if visible.dtype == torch.bool:
        return attention_plain(q, k, v, visible, scale, cap)
    return attend_spans(q, k, v, visible, scale, cap)[0]


# --------------------------------------------------------------------------------------------------
# The plain form

def attention_plain(q: Tensor, k: Tensor, v: Tensor,
                    mask: Tensor,
                    scale: float, cap: float | None) -> Tensor:
    """q (B, H, T, hd), k and v (B, K, S, hd), mask (B or 1, 1, T, S) -> (B, H, T, hd).

    The query heads of one key-value head are stacked as further rows, so keys and values are never
    repeated. Scores are capped and normalised in float32.
    """
    K, T = k.shape[1], q.shape[2]
    stacked = rearrange(q, "b (k g) t hd -> b k (g t) hd", k=K)
    scores = stacked @ k.mT                                                       # (B, K, G·T, S)
    scores = softcap(scores.to(wide_dtype(scores)) * scale, cap)
    scores = scores.unflatten(2, (-1, T))                                         # (B, K, G, T, S)
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)
    weights = weights.to(v.dtype).flatten(2, 3)                                   # (B, K, G·T, S)
    out = weights @ v                                                             # (B, K, G·T, hd)
    return rearrange(out, "b k (g t) hd -> b (k g) t hd", t=T)


# --------------------------------------------------------------------------------------------------
# Blocks of queries, for a CPU
#
# Each block of n queries takes only the S keys from its first low to its last query. Per head:
#
#     scores  = 2u/c                               (n, S), one product: 2 · scale/c · Q Kᵀ
#     sigma   = sigmoid(scores)                    s = c·tanh(u/c) = c (2·sigma − 1)
#     exp     = 2^(offset + 2c·log₂e·sigma)        exp(s), or 0 where the query doesn't see the key
#     total   = rowsum(exp)                        (n, 1), kept for the backward
#     weights = exp / total                        P
#
# PyTorch's sigmoid is several times faster than its tanh. |s| <= c = 50, so exp can't overflow
# float32 and no running maximum is needed. The backward makes sigma and weights again:
#
#     d_weights = 4 · scale · dO Vᵀ                4 · scale · dP
#     d_capped  = weights ∘ (d_weights − rowsum(weights ∘ d_weights))      4 · scale · dS
#     slope     = sigma − sigma²                   ds/du / 4, since ds/du = 1 − (s/c)²
#     d_scores  = d_capped ∘ slope                 scale · dU
#     dQ = d_scores K,   dK += d_scoresᵀ Q,   dV += weightsᵀ dO
#
# FlashAttention takes rowsum(dO ∘ O) for rowsum(P ∘ dP). With an O rounded to bfloat16 that makes
# dQ and dK a fifth less exact, and O would have to be kept.
#
# These are operators of their own, so that torch.compile takes a model as one graph.

@torch.library.custom_op("sails::attend_spans", mutates_args=())
def attend_spans(q: Tensor, k: Tensor, v: Tensor,
                 low: Tensor,
                 scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, hd) of q to k and v (B, K, T, hd), and row sums (B, H, T, 1) of exp(s).

    low (B or 1, T) int64 may not decrease along a row; cap is at most SAFE_CAP. Scores are float32
    for float32 and bfloat16.
    """
    B, H, T, hd = q.shape
    K = k.shape[1]
    k = k.contiguous()
    v = v.contiguous()
    out = empty_queries(q)
    totals = q.new_empty(B, H, T, 1, dtype=wide_dtype(q))
    scratch = q.new_empty(H * BLOCK * T)
    for queries, keys, offset in query_blocks(low, B, cap):
        # 2u/c = 2 · scale/c · Q Kᵀ, in the dtype of q
        Q = stack_heads(q[queries], K)                                            # (K, G·n, hd)
        k_span = k[keys]                                                          # (K, S, hd)
        v_span = v[keys]
        scores = scaled_product(Q, k_span.mT, offset, scratch, 2 * scale / cap)   # (H, n, S)
        weights, totals[queries] = pointwise(capped_softmax)(scores, offset, cap)
        weights = stack_heads(weights, K)                                         # (K, G·n, S)
        block_out = weights @ v_span                                              # (K, G·n, hd)
        out[queries] = block_out.view(H, -1, hd)
    return out, totals


@torch.library.custom_op("sails::attend_spans_backward", mutates_args=())
def attend_spans_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor,
                          low: Tensor, totals: Tensor,
                          scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the output (B, H, T, hd)."""
    B, H, T, hd = q.shape
    K = k.shape[1]
    k = k.contiguous()
    v = v.contiguous()
    dq = empty_queries(q)
    # Sums over blocks, so they are kept in float32; in memory (B, K, hd, T)
    dk = torch.zeros(B, K, hd, T, dtype=wide_dtype(q)).mT
    dv = torch.zeros_like(dk)
    scratch = q.new_empty(2, H * BLOCK * T)
    for queries, keys, offset in query_blocks(low, B, cap):
        Q = stack_heads(q[queries], K)                                            # (K, G·n, hd)
        dO = stack_heads(grad[queries], K)
        k_span = k[keys]                                                          # (K, S, hd)
        v_span = v[keys]
        scores = scaled_product(Q, k_span.mT, offset, scratch[0], 2 * scale / cap)
        d_weights = scaled_product(dO, v_span.mT, offset, scratch[1], 4 * scale)
        total = totals[queries].clone()                                           # (H, n, 1)
        backward = pointwise(capped_softmax_backward)
        weights, d_scores = backward(scores, d_weights, offset, total, cap)       # (H, n, S)
        weights = stack_heads(weights, K)                                         # (K, G·n, S)
        d_scores = stack_heads(d_scores, K)
        # Keys and values add up over the query heads that share them, and over blocks
        block_dq = d_scores @ k_span                                              # (K, G·n, hd)
        dq[queries] = block_dq.view(H, -1, hd)
        dk[keys] += (Q.mT @ d_scores).mT
        dv[keys] += (dO.mT @ weights).mT
    dk = k.new_empty(k.shape).copy_(dk)
    dv = v.new_empty(v.shape).copy_(dv)
    return dq, dk, dv


def query_blocks(low, batch, cap):
    """For each row b and block: indices of its queries in q and of its keys in k, and `offset`."""
    heads = slice(None)
    for b in range(batch):
        # The last block first: a compiler takes sizes that are equal at first for always equal
        for begin in reversed(range(0, low.shape[1], BLOCK)):
            own_low = low[b % len(low), begin:begin + BLOCK]                      # (n,)
            first = own_low[0].item()
            end = begin + len(own_low)
            offset = exponent_offset(own_low, first, end, cap)
            queries = b, heads, slice(begin, end)
            keys = b, heads, slice(first, end)
            yield queries, keys, offset


def exponent_offset(low, first, end, cap):
    """offset (n, S) of queries with low (n,) and keys first, ..., end − 1, the queries' own last.

    It is −c·log₂e where a query sees a key, else −∞.
    """
    n = len(low)
    offset = torch.full((n, end - first), -cap * LOG2E)
    # No query sees a later one
    future = torch.ones(n, n, dtype=torch.bool).triu_(1)
    offset[:, -n:].masked_fill_(future, -torch.inf)
    # Later queries may see fewer of the first keys
    last_low = low[-1].item()
    if last_low > first:
        unseen = torch.arange(first, last_low) < low[:, None]
        offset[:, :last_low - first].masked_fill_(unseen, -torch.inf)
    return offset


def empty_queries(q):
    """Room like q (B, H, T, hd), laid out as (B, T, H, hd), which o_proj reads without a copy."""
    B, H, T, hd = q.shape
    return q.new_empty(B, T, H, hd).transpose(1, 2)


def stack_heads(x, K):
    """(H, n, hd) -> (K, G·n, hd): the query heads of one key-value head as rows of one matrix."""
    return x.reshape(K, -1, x.shape[2])


def scaled_product(rows, columns, offset, scratch, factor):
    """factor · rows (K, G·n, hd) @ columns (K, hd, S), as (H, n, S) like offset (n, S).

    It is written to `scratch`: fresh pages would cost as much as the product.
    """
    shape = *rows.shape[:2], columns.shape[2]                                     # (K, G·n, S)
    out = scratch[:math.prod(shape)].view(shape)
    nothing = rows.new_zeros(())
    torch.baddbmm(nothing, rows, columns, beta=0, alpha=factor, out=out)
    return out.view(-1, *offset.shape)


def capped_softmax(scores, offset, cap):
    """`weights` in the dtype of scores (H, n, S), and `total` (H, n, 1)."""
    sigma = scores.to(wide_dtype(scores), copy=True).sigmoid_()
    exp = torch.add(offset, sigma, alpha=2 * cap * LOG2E, out=sigma).exp2_()
    total = exp.sum(-1, keepdim=True)
    return exp.div_(total).to(scores.dtype), total


def capped_softmax_backward(scores, d_weights, offset, total, cap):
    """`weights` and `d_scores`, both in the dtype of scores and d_weights (H, n, S)."""
    sigma = scores.to(wide_dtype(scores), copy=True).sigmoid_()
    weights = torch.add(offset, sigma, alpha=2 * cap * LOG2E).exp2_().div_(total)
    slope = torch.addcmul(sigma, sigma, sigma, value=-1, out=sigma)
    d_weights = d_weights.to(weights.dtype)
    d_capped = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    return weights.to(scores.dtype), d_capped.mul_(slope).to(scores.dtype)


# What torch.compile needs to know of the operators: shapes, strides and the backward

@attend_spans.register_fake
def _(q, k, v, low, scale, cap):
    B, H, T, _ = q.shape
    return empty_queries(q), q.new_empty(B, H, T, 1, dtype=wide_dtype(q))


@attend_spans_backward.register_fake
def _(grad, q, k, v, low, totals, scale, cap):
    return empty_queries(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(*tensors, output[1])  # the row sums


def _backward(ctx, grad, _):
    gradients = attend_spans_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.cap)
    return *gradients, None, None, None


attend_spans.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------
# Compiling what stands between the matrix products

compiled = False  # whether `pointwise` compiles
compile_once: Callable = cache(torch.compile)  # the same function is compiled once


def use_compile(on=True) -> bool:
    """Compile the pointwise parts, or stop doing so. Returns whether they are compiled now.

    Where there is no working compiler it warns once on stderr and returns False.
    """
    global compiled
    compiled = on and _compiler_works()
    return compiled


def pointwise(function):
    """`function`, compiled for tensors of any size after `use_compile()`."""
    return compile_once(function, dynamic=True) if compiled else function


@cache
def _compiler_works():
    """Compile the pointwise parts by one step."""
    global compiled
    compiled = True
    torch.compiler.assume_constant_result(is_small_card)  # so that a graph doesn't break there
    # Unequal sizes: the first block has n = 32 and S = 160
    x = torch.zeros(1, 6, 160, 8, requires_grad=True)
    low = torch.zeros(1, 160, dtype=torch.long)
    try:
        attention(x, x, x, low, scale=1.0, cap=50.0).sum().backward()
    except Exception as error:  # no compiler, no Python.h, ...
        reason = str(error).strip().splitlines()[0]
        print(f"warning: torch.compile fails here, running without it: {reason}", file=sys.stderr)
        return False
    return True


# --------------------------------------------------------------------------------------------------
# CUDA

def is_small_card(device):
    """Whether flex_attention's own blocks don't fit: up to 148 KiB at a head size of 256.

    An A100 has 163 KiB of shared memory for a block, an L40S or RTX 40 has 99.
    """
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", math.inf) < 160 << 10


def attend_flex(q, k, v, spans, scale, cap):
    """flex_attention with softcapped scores, shapes as in `attention`, `spans` from `span_blocks`.

    On a CPU tests check its uncompiled forward; it has no backward there. No GPU has run it yet.
    """
    capped = lambda score, *_: softcap(score, cap)  # the score comes scaled
    # Uncompiled it would hold T × T scores, so it is compiled whether or not the model is
    flex = compile_once(flex_attention) if q.is_cuda else flex_attention
    options = None
    if q.is_cuda and is_small_card(q.device):  # these blocks take about 70 KiB
        options = dict.fromkeys(BLOCK_SIZES, 64 // q.element_size()) | {"num_stages": 1}
    return flex(q, k, v, score_mod=capped, block_mask=spans, scale=scale, enable_gqa=True,
                kernel_options=options)
