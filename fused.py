"""The head, fused: final hidden states to loss in one pass over the vocabulary, with the backward made on the way.

Gemma-2 has 256,000 logits a token: 1 MiB each in float32, of which the usual loss holds several copies. Here only
labelled tokens reach the head, and it is walked in tiles of the vocabulary that a cache holds. With the logits
l = h·Eᵀ softcapped to z = c·tanh(l/c), t = tanh(l/c), y the token that comes next:

    loss   = log Σ_v exp(z_v) − z_y
    dl_v   = (p_v − 1[v = y]) (1 − t_v²),  p_v = exp(z_v) / Σ exp(z)
    dloss/dh = (Σ_v exp(z_v) (1 − t_v²) E_v) / Σ_v exp(z_v) − (1 − t_y²) E_y

|z| <= c = 30, so exp can't overflow float32 and no running maximum is kept: both sums come out of one pass, and since
the head is frozen dloss/dh is all that a backward will ask for.

tanh is slow, the logistic function is not: with s = 1 / (1 + exp(−2l/c)), t = 2s − 1, so that exp(z) = exp(2cs) / exp(c)
and 1 − t² = 4 (s − s²). The sums below leave the constants exp(−c) and 4 to the end.

Attention of Gemma-2, where a softcap c bounds the scores and every query sees one span of keys.

    u = scale · q·k,   s = c·tanh(u/c),   P = softmax(s) over low_i <= j <= i,   o = P v

low_i is the first key that query i sees: the start of its document or, on a sliding layer, the first of its window,
whichever comes later. Two forms, and a third for CUDA:

`attend` is the plain form: any mask, all scores at once. It is what the others are tested against.

`attend_spans` is the form for a CPU: blocks of 128 queries against the keys from their first low to their last query,
so that neither the whole matrix of scores is ever held nor what no query sees computed. |s| <= c = 50, so exp can't
overflow float32: no running maximum, one pass. Row sums of exp(s) are kept, scores are made again for the backward,
which for one block of queries is

    dV += Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − rowsum(P ∘ dP)),   dU = dS ∘ (1 − (s/c)²),
    dQ = scale · dU K,   dK += scale · dUᵀ Q

The usual rowsum(dO ∘ O) is the same number, but with an O rounded to bfloat16 it makes dQ and dK a fifth less exact, and
O would have to be kept. The code has tanh(x) = 2σ − 1 and 1 − tanh² = 4σ(1 − σ) with σ = sigmoid(2x), since PyTorch's
sigmoid is several times faster than its tanh.

`attend_flex` is PyTorch's flex_attention with the same scores and spans.

Letters: B batch, T queries, S keys, H query heads, K key-value heads, G = H/K, hd head size, n queries of a block.
"""

import sys
from functools import cache
import torch
from einops import rearrange
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
import math
import torch.nn.functional as F

BLOCK = 128                                                                          # queries
SHORT = 64           # rows up to this length take the plain form: forwards break even there, with the backward at 128
SAFE_CAP = 60        # T·exp(60) is far from float32's largest, exp(88)
LOG2E = 1.4426950408889634         # exp(x) = 2^(x·log₂e), and exp2 is four times as fast on a CPU


def softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap · tanh(x / cap): close to x when small, bounded by ±cap. None leaves x as it is."""
    return x if cap is None else torch.tanh(x / cap) * cap


def rotary(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (…, T, hd/2), float32, of the rotary embedding at integer positions (…, T)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, heads, T, hd) by cos and sin (B or 1, 1, T, hd/2): entry i of the first half pairs with entry i of the second."""
    return Rotated.apply(x, cos, sin)


class Rotated(torch.autograd.Function):
    """y = (x₁ cos − x₂ sin, x₂ cos + x₁ sin), in float32 and cast last; the backward turns dy the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, -sin), None, None


def turn(x, cos, sin):
    wider = x.to(wide(x))
    first, second = wider.chunk(2, -1)
    turned = (wider * torch.cat((cos, cos), -1)).addcmul_(torch.cat((second, first), -1), torch.cat((-sin, sin), -1))
    return turned.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Who sees whom

def document_starts(tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """Index (B or 1, T) of the first token of each token's document: a run of equal numbers in documents (B, T)."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    if documents is None:
        return torch.zeros_like(index)[None]
    new = documents[:, 1:] != documents[:, :-1]
    return torch.nn.functional.pad(new * index[1:], (1, 0)).cummax(1).values


def span_mask(low):
    """Mask (B or 1, 1, T, T) of the keys from low (B or 1, T) to the query itself."""
    index = torch.arange(low.shape[1], device=low.device)
    return ((index >= low[..., None]) & (index <= index[:, None]))[:, None]


def span_blocks(low):
    """flex_attention's block mask of the same spans."""
    def visible(b, h, i, j):
        return (low[b if len(low) > 1 else 0, i] <= j) & (j <= i)
    return create_block_mask(visible, len(low), None, low.shape[1], low.shape[1], device=low.device)


def visible_keys(low, cap):
    """The spans low (B or 1, T) in the form that `attention` is to use: a BlockMask, low itself, or a mask."""
    if low.is_cuda and compiled:
        return span_blocks(low)
    if low.device.type == "cpu" and low.shape[1] > SHORT and cap is not None and cap <= SAFE_CAP:
        return low
    return span_mask(low)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen, scale: float, cap: float | None) -> torch.Tensor:
    """Attention (B, H, T, hd) of q (B, H, T, hd) to k and v (B, K, S, hd), `seen` being what `visible_keys` gave, or a mask."""
    if isinstance(seen, BlockMask):
        return attend_flex(q, k, v, seen, scale, cap)
    if seen.dtype == torch.bool:
        return attend(q, k, v, seen, scale, cap)
    return attend_spans(q, k, v, seen, scale, cap)[0]


# ---------------------------------------------------------------------------------------------------------------
# The plain form

def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """Softmax attention with softcapped scores: q (B, H, T, hd), k and v (B, K, S, hd), mask (B or 1, 1, T, S).

    The query heads of one key-value head are stacked as further rows, so keys and values are never repeated.
    Scores are capped and normalised in float32.
    """
    K, T = k.shape[1], q.shape[2]
    scores = rearrange(q, "b (k g) t hd -> b k (g t) hd", k=K) @ k.mT                # (B, K, G·T, S)
    scores = softcap(scores.to(wide(scores)) * scale, cap).unflatten(2, (-1, T))     # (B, K, G, T, S)
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(v.dtype)
    return rearrange(weights.flatten(2, 3) @ v, "b k (g t) hd -> b (k g) t hd", t=T)


def wide(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# Blocks of queries, for a CPU. Operators of their own, so that torch.compile takes a model whole and leaves them be

@torch.library.custom_op("sails::attend_spans", mutates_args=())
def attend_spans(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, low: torch.Tensor, scale: float, cap: float
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q (B, H, T, hd) to k and v (B, K, T, hd), and row sums (B, H, T, 1) of exp(s); low (B or 1, T) int64.

    low may not decrease along a row. Works in float32 and bfloat16, where scores are float32, and in float64.
    """
    (B, H, T, hd), K, k, v = q.shape, k.shape[1], k.contiguous(), v.contiguous()
    out = q.new_empty(B, T, H, hd).transpose(1, 2)             # as o_proj reads it: its input needs no copy of its own
    totals, scratch = q.new_empty(B, H, T, 1, dtype=wide(q)), q.new_empty(H * BLOCK * T)
    for b, rows, keys, start in blocks(low, B, cap):
        scores = product(stack(q[b, :, rows], K), k[b, :, keys].mT, start, scratch, 2 * scale / cap)    # (H, n, S)
        weights, totals[b, :, rows] = pointwise[0](scores, start, cap)
        out[b, :, rows] = (weights.view(K, -1, start.shape[1]) @ v[b, :, keys]).view(H, -1, hd)
    return out, totals


@torch.library.custom_op("sails::attend_spans_backward", mutates_args=())
def attend_spans_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, low: torch.Tensor,
                          totals: torch.Tensor, scale: float, cap: float
                          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    (B, H, T, hd), K, k, v = q.shape, k.shape[1], k.contiguous(), v.contiguous()
    dq = q.new_empty(B, T, H, hd).transpose(1, 2)
    dk, dv = (torch.zeros(B, K, hd, T, dtype=wide(q)) for _ in "kv")                 # sums over blocks: kept wide
    scratch = q.new_empty(2, H * BLOCK * T)
    for b, rows, keys, start in blocks(low, B, cap):
        Q, dO, k_span = stack(q[b, :, rows], K), stack(grad[b, :, rows], K), k[b, :, keys]
        scores = product(Q, k_span.mT, start, scratch[0], 2 * scale / cap)
        d_weights = product(dO, v[b, :, keys].mT, start, scratch[1], 4 * scale)      # four times the slope is 1 − (s/c)²
        weights, d_scores = (x.view(K, -1, start.shape[1]) for x in pointwise[1](
            scores, d_weights, start, totals[b, :, rows].clone(), cap))
        dq[b, :, rows] = (d_scores @ k_span).view(H, -1, hd)
        dk[b, :, :, keys] += Q.mT @ d_scores
        dv[b, :, :, keys] += dO.mT @ weights
    return dq, k.new_empty(k.shape).copy_(dk.mT), v.new_empty(v.shape).copy_(dv.mT)


def blocks(low, B, cap):
    """For each row b and block: b, the slice of its queries, that of the keys they see, and what exponents begin from.

    That is `start` (n, S), −c·log₂e where the query sees the key and −∞ elsewhere.
    """
    T = low.shape[1]
    firsts = low.expand(B, T)[:, ::BLOCK].tolist()
    for b in range(B):
        # The last block first: sizes that are equal the first time would be compiled as always equal
        for i, first in reversed([*zip(range(0, T, BLOCK), firsts[b])]):
            rows, keys = slice(i, min(i + BLOCK, T)), slice(first, min(i + BLOCK, T))
            own = low[b % len(low), rows]
            start = torch.full((rows.stop - i, keys.stop - first), -cap * LOG2E)
            start[:, i - first:].masked_fill_(torch.ones(len(own), len(own), dtype=torch.bool).triu_(1), -torch.inf)
            if (edge := own[-1].item() - first) > 0:                                 # some see less than the first does
                start[:, :edge].masked_fill_(torch.arange(first, first + edge) < own[:, None], -torch.inf)
            yield b, rows, keys, start


def stack(x, K):
    """(H, n, hd) -> (K, G·n, hd): the query heads of one key-value head as rows of one matrix."""
    return x.reshape(K, -1, x.shape[2])


def product(rows, columns, start, scratch, factor):
    """factor · rows (K, G·n, hd) @ columns (K, hd, S) as (H, n, S), written to `scratch`: fresh pages cost as much as the product."""
    out = scratch[:rows.shape[0] * rows.shape[1] * columns.shape[2]].view(-1, *start.shape)
    torch.baddbmm(rows.new_zeros(()), rows, columns, beta=0, alpha=factor, out=out.view(len(rows), -1, columns.shape[2]))
    return out


def _weigh(scores, start, cap):
    """P, in the dtype of scores (H, n, S) = 2u/c, and the row sums (H, n, 1) of exp(s)."""
    sigma = scores.to(wide(scores), copy=True).sigmoid_()
    e = torch.add(start, sigma, alpha=2 * cap * LOG2E, out=sigma).exp2_()            # s = c (2σ − 1)
    total = e.sum(-1, keepdim=True)
    return e.div_(total).to(scores.dtype), total


def _weigh_backward(scores, d_weights, start, total, cap):
    """P and dP's pull on u, both in the dtype of scores = 2u/c and dP (H, n, S); total as from `_weigh`.

    The slope lacks the factor 4 that 1 − (s/c)² = 4 (σ − σ²) has: give it to dP.
    """
    sigma = scores.to(wide(scores), copy=True).sigmoid_()
    weights = torch.add(start, sigma, alpha=2 * cap * LOG2E).exp2_().div_(total)
    slope = torch.addcmul(sigma, sigma, sigma, value=-1, out=sigma)
    d_capped = torch._softmax_backward_data(d_weights.to(wide(scores)), weights, -1, weights.dtype)  # P ∘ (dP − Σ P ∘ dP)
    return weights.to(scores.dtype), d_capped.mul_(slope).to(scores.dtype)


pointwise, compiled = (_weigh, _weigh_backward), False


@cache
def _compiled():
    """The two functions above, compiled for any shape, or None with a warning where PyTorch finds no way to compile."""
    global pointwise
    pointwise = torch.compile(_weigh, dynamic=True), torch.compile(_weigh_backward, dynamic=True)
    try:
        with torch.enable_grad():
            x = torch.zeros(1, 6, 160, 8, requires_grad=True)                        # the first block: n = 32, S = 160
            attend_spans(x, x, x, torch.zeros(1, 160, dtype=torch.long), 1.0, 50.0)[0].sum().backward()
        return pointwise
    except Exception as error:                                                       # no compiler, no Python.h, …
        print(f"warning: torch.compile fails here, running without it: {str(error).strip().splitlines()[0]}", file=sys.stderr)


def use_compile(asked=True) -> bool:
    """Compile what stands between the matrix products, or stop doing so; returns whether it is compiled from now on."""
    global pointwise, compiled
    functions = _compiled() if asked else None
    pointwise, compiled = functions or (_weigh, _weigh_backward), functions is not None
    return compiled


@attend_spans.register_fake
def _(q, k, v, low, scale, cap):
    B, H, T, hd = q.shape
    return q.new_empty(B, T, H, hd).transpose(1, 2), q.new_empty(B, H, T, 1, dtype=wide(q))


@attend_spans_backward.register_fake
def _(grad, q, k, v, low, totals, scale, cap):
    B, H, T, hd = q.shape
    return q.new_empty(B, T, H, hd).transpose(1, 2), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad, _):
    return *attend_spans_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.cap), None, None, None


attend_spans.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------------
# CUDA

@cache
def _flex():
    return torch.compile(flex_attention)                                             # importing the compiler takes seconds


def attend_flex(q, k, v, spans, scale, cap):
    """flex_attention with softcapped scores, `spans` being what `span_blocks` gave. Compiled on CUDA, where it belongs.

    On a CPU it has no backward; the tests check spans and scores with its uncompiled forward. No GPU has run this yet.
    """
    def capped(score, b, h, i, j):                                                   # score comes scaled
        return softcap(score, cap)
    flex = _flex() if q.is_cuda else flex_attention
    return flex(q, k, v, score_mod=capped, block_mask=spans, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


IGNORE = -100
SCRATCH = {"cpu": 1 << 19}  # tokens × tile of the vocabulary: 2 MB in float32 stay in a CPU's cache;
LARGE = 1 << 25             # elsewhere it takes more to fill the device
TILE = 256                  # and no tile is smaller


def nll_sum(hidden: torch.Tensor, labels: torch.Tensor, embedding: torch.Tensor, cap: float | None
            ) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood, nats, a float32 scalar, and the count of labelled tokens.

    hidden (B, T, D) after the final norm; labels (B, T) int64, the id that comes next, or -100 where there is no loss.
    The sum is what gets divided once by the count of a whole step: a mean of micro-batch means would weigh a token by
    the company it keeps.
    """
    labelled = labels != IGNORE
    h, targets = hidden[labelled], labels[labelled]                                  # (N, D), (N,)
    if embedding.requires_grad or cap is None or 2 * cap + math.log(len(embedding)) > 88:  # exp(88) is float32's largest
        logits = softcap((h @ embedding.T).float(), cap)
        return F.cross_entropy(logits, targets, reduction="sum"), len(targets)
    return FusedNLL.apply(h, embedding, targets, cap), len(targets)


class FusedNLL(torch.autograd.Function):
    """Σ −log softmax(c·tanh(h·Eᵀ/c))[y] of h (N, D), frozen E (V, D) and targets (N,); the plain form is in `nll_sum`."""

    @staticmethod
    def forward(ctx, h, E, targets, cap):
        if ctx.needs_input_grad[1]:
            raise ValueError("the fused loss makes no gradient for the embedding: freeze it, or take the plain loss")
        N = len(h)
        tile = min(len(E), max(TILE, SCRATCH.get(h.device.type, LARGE) // max(1, N)))
        total = torch.zeros(N, device=h.device)                                      # (N,) Σ exp(2cs)
        pull = torch.zeros(h.shape, device=h.device)                                 # (N, D) Σ exp(2cs) (s − s²) E
        scratch = torch.empty(2, N * tile, device=h.device)                          # taken once: fresh memory is slow
        low = scratch[0] if h.dtype == scratch.dtype else h.new_empty(N * tile)      # what matrix products read and write
        for rows in E.split(tile):
            s, e, l = (buffer[:N * len(rows)].view(N, len(rows)) for buffer in (*scratch, low))
            torch.addmm(h.new_zeros(()), h, rows.T, beta=0, alpha=2 / cap, out=l)    # 2l/c
            s.copy_(l).sigmoid_()
            total += torch.mul(s, 2 * cap * LOG2E, out=e).exp2_().sum(1)
            if ctx.needs_input_grad[0]:
                pull += l.copy_(s.addcmul_(s, s, value=-1).mul_(e)) @ rows
        rows = E[targets].float()                                                    # (N, D)
        t = (h * rows).sum(1).div_(cap).tanh_()                                      # (N,)
        if ctx.needs_input_grad[0]:
            grad = pull.mul_(4 / total[:, None]).addcmul_(1 - t.square()[:, None], rows, value=-1)
            ctx.save_for_backward(grad.to(h.dtype))
        return (total.log() - cap * (1 + t)).sum()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None, None


# ---------------------------------------------------------------------------------------------------------------

def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return Normed.apply(x, w, eps)


class Normed(torch.autograd.Function):
    """y = x·r·(1 + w), r = 1 / √(mean x² + eps), x (…, D). Only x and r (…, 1) are kept: autograd would keep three float32 x.

        dx = r·(g − x·r²·mean(g·x)), g = dy·(1 + w)        dw = Σ dy·x·r
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        h = x.float()
        r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, r)
        return (h * r).mul_(1 + w.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        h, g = x.float(), dy.float()
        dw = (g * h * r).flatten(0, -2).sum(0).to(w.dtype) if ctx.needs_input_grad[1] else None
        g = g * (1 + w.float())
        shift = (g * h).mean(-1, keepdim=True).mul_(r * r)
        return torch.addcmul(g, h, shift, value=-1).mul_(r).to(x.dtype), dw, None


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return Gated.apply(gate, up)


class Gated(torch.autograd.Function):
    """h = gelu(g)·u, g and u (…, inner), with the tanh form of gelu: g·σ, σ = sigmoid(√(8/π) (g + 0.044715 g³)).

        du = dh·g·σ        dg = dh·u·σ (1 + (1 − σ) g·k),  k = √(8/π) (1 + 3 · 0.044715 g²)

    Only g and u are kept; autograd would keep gelu(g) too, and PyTorch's gelu, which calls tanh, is slow on a CPU.
    Computed in float32, a piece that the cache holds at a time.
    """

    @staticmethod
    def forward(ctx, g, u):
        ctx.save_for_backward(g, u)
        h = torch.empty_like(u)
        for g, u, h_piece in pieces(g, u, h):
            g = g.to(wide(g))
            h_piece.copy_(gate(g).mul_(g).mul_(u))
        return h

    @staticmethod
    def backward(ctx, dh):
        g, u = ctx.saved_tensors
        dg, du = torch.empty_like(g), torch.empty_like(u)
        for g, u, dh, dg_piece, du_piece in pieces(g, u, dh, dg, du):
            g = g.to(wide(g))
            sigma, slope = gate(g), torch.mul(g, g).mul_(3 * CUBIC).add_(LINEAR).mul_(g)        # g·k
            slope.addcmul_(slope, sigma, value=-1)
            du_piece.copy_(sigma.mul_(dh).mul(g))
            dg_piece.copy_(sigma.mul_(u).addcmul_(sigma, slope))
        return dg, du


LINEAR = (8 / math.pi) ** 0.5
CUBIC, PIECE = 0.044715 * LINEAR, 1 << 16                                            # entries: 256 kB in float32


def gate(g):
    return torch.mul(g, g).mul_(CUBIC).add_(LINEAR).mul_(g).sigmoid_()


def pieces(*tensors):
    """Tensors of one shape in flat pieces of PIECE entries; whole where a compiler fuses, or a GPU is to be filled."""
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return [tensors]
    return zip(*(tensor.reshape(-1).split(PIECE) for tensor in tensors))


def lora_linear(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """x·Wᵀ + scale·(x·Aᵀ)·Bᵀ, W frozen."""
    return AddedLowRank.apply(x, W, A, B, scale)


class AddedLowRank(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ with W frozen, and its backward by hand: x (…, in), W (out, in), A (r, in), B (out, r).

        dx = dy·W + s·(dy·B)·A        dA = s·(dy·B)ᵀ·x        dB = s·dyᵀ·(x·Aᵀ)

    All that is kept is x, which q, k and v share: x·Aᵀ is cheaper made again than read back. Both low-rank terms are
    added in the product that makes them. A and B are rounded to x's dtype, so that no float32 copy of x is made
    (peft's way: 15 GB at 16k tokens of the 2b); products sum in float32, and gradients add up in it over micro-batches.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, s):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        flat = x.flatten(0, -2)                                                            # (N, in)
        y = F.linear(flat, W)
        y.addmm_(flat @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=s)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        for_x, _, for_A, for_B, _ = ctx.needs_input_grad
        flat, dy = x.flatten(0, -2), dy.flatten(0, -2)                                     # (N, in), (N, out)
        low, dx, dA, dB = A.to(x.dtype), None, None, None
        if for_x or for_A:
            dlow = dy @ (ctx.s * B).to(x.dtype)                                            # (N, r)
        if for_x:
            dx = (dy @ W).addmm_(dlow, low).view_as(x)
        if for_A:
            dA = (dlow.T @ flat).to(A.dtype)
        if for_B:
            dB = (dy.T @ (flat @ low.T)).to(B.dtype).mul_(ctx.s)
        return dx, None, dA, dB, None
