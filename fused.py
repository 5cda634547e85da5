"""The fused operations of a training step: a backward by hand, each beside its plain form.

    rotate(x, cos, sin)               rotary embedding
    rms_norm(x, w, eps)               x / rms(x) · (1 + w)
    geglu(gate, up)                   gelu(gate) · up
    lora_linear(x, W, A, B, scale)    x·Wᵀ + scale · (x·Aᵀ)·Bᵀ
    nll_sum(hidden, labels, E, cap)   softcapped head and cross-entropy

Autograd would keep every intermediate result for the backward. The functions here keep their inputs
or less, and make the rest again. `rms_norm_plain` and the like say the same in plain PyTorch: tests
compare values and gradients. Softcapped attention has a file of its own, attention.py.

Letters: B batch, T tokens, D hidden size, hd head size, N labelled tokens, V vocabulary, r rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100   # the label of a token without loss
LOG2E = 1.4426950408889634  # exp(x) = 2^(x·log₂e), and exp2 is four times as fast on a CPU

# Products of bfloat16 sum in float32 here; by default CUDA may round partial sums
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap): close to x when small, bounded by ±cap. None leaves x as it is."""
    return x if cap is None else torch.tanh(x / cap) * cap


# --------------------------------------------------------------------------------------------------
# Rotary embedding

def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (…, T, hd/2), float32, of the rotary embedding at integer positions (…, T)."""
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** (-pair / head_dim)                          # radians a token, (hd/2,)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def document_starts(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Index (B or 1, T) of the first token of each token's document.

    A document is a run of equal numbers in `documents` (B, T); None is one document a row.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    if documents is None:
        return torch.zeros_like(index)[None]
    is_first = documents[:, 1:] != documents[:, :-1]
    return F.pad(is_first * index[1:], (1, 0)).cummax(1).values


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, hd) by cos and sin (B or 1, 1, T, hd/2).

    Entry i of a head's first half pairs with entry i of its second half.
    """
    return Rotated.apply(x, cos, sin)


def rotate_plain(x, cos, sin):
    """As `rotate`, for autograd."""
    x1, x2 = x.to(wide_dtype(x)).chunk(2, -1)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), -1).to(x.dtype)


class Rotated(torch.autograd.Function):
    """y = (x₁ cos − x₂ sin, x₂ cos + x₁ sin), in float32 and cast last.

    The gradient turns dy the other way: dx = (dy₁ cos + dy₂ sin, dy₂ cos − dy₁ sin).
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, -sin), None, None


def turn(x, cos, sin):
    """y = x ∘ (cos, cos) + (x₂, x₁) ∘ (−sin, sin): two passes, where the plain form makes six."""
    h = x.to(wide_dtype(x))
    h1, h2 = h.chunk(2, -1)
    y = h * torch.cat((cos, cos), -1)
    swapped = torch.cat((h2, h1), -1)
    y.addcmul_(swapped, torch.cat((-sin, sin), -1))
    return y.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# RMSNorm

def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x / rms(x) · (1 + w), x (…, D). All of it in float32, cast last (gemma_pytorch, RMSNorm)."""
    return Normed.apply(x, w, eps)


def rms_norm_plain(x, w, eps):
    """As `rms_norm`, for autograd."""
    h = x.to(wide_dtype(x))
    mean_square = h.square().mean(-1, keepdim=True)
    y = h * torch.rsqrt(mean_square + eps) * (1 + w)
    return y.to(x.dtype)


class Normed(torch.autograd.Function):
    """y = x·r·(1 + w), r = 1 / √(mean x² + eps).

        dx = r·(g − x·r²·mean(g·x)),  g = dy·(1 + w)        dw = Σ dy·x·r

    Only x and r (…, 1) are kept: autograd would keep three float32 copies of x.
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        h = x.to(wide_dtype(x))
        mean_square = h.square().mean(-1, keepdim=True)
        r = torch.rsqrt(mean_square + eps)                           # (…, 1)
        ctx.save_for_backward(x, w, r)
        y = (h * r).mul_(1 + w.to(h.dtype))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        h = x.to(r.dtype)
        dy = dy.to(r.dtype)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * h * r).flatten(0, -2).sum(0).to(w.dtype)
        g = dy * (1 + w.to(r.dtype))
        # Along x the norm doesn't change: that part of g is taken out
        shift = (g * h).mean(-1, keepdim=True).mul_(r * r)           # r²·mean(g·x), (…, 1)
        dx = torch.addcmul(g, h, shift, value=-1).mul_(r)
        return dx.to(x.dtype), dw, None


# --------------------------------------------------------------------------------------------------
# GeGLU, the middle of the MLP

LINEAR = (8 / math.pi) ** 0.5
CUBIC = 0.044715 * LINEAR
PIECE = 1 << 16  # entries: 256 kB in float32 stay in a CPU's cache


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, both (…, inner), with the tanh form of gelu."""
    return Gated.apply(gate, up)


def geglu_plain(gate, up):
    """As `geglu`, for autograd."""
    return F.gelu(gate, approximate="tanh") * up


class Gated(torch.autograd.Function):
    """h = gelu(g)·u, with gelu(g) = g·σ, σ = sigmoid(√(8/π) (g + 0.044715 g³)).

        du = dh·g·σ        dg = dh·u·σ (1 + (1 − σ) g·k),  k = √(8/π) (1 + 3 · 0.044715 g²)

    Only g and u are kept; autograd would keep gelu(g) too, and PyTorch's gelu calls tanh, which is
    slow on a CPU. Computed in float32, one piece that the cache holds at a time.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(up)
        for g, u, h in pieces(gate, up, out):
            g = g.to(wide_dtype(g))
            gelu = gelu_sigmoid(g).mul_(g)
            h.copy_(gelu.mul_(u))
        return out

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        for g, u, dh, dg, du in pieces(gate, up, d_out, d_gate, d_up):
            g = g.to(wide_dtype(g))
            sigma = gelu_sigmoid(g)
            k = torch.mul(g, g).mul_(3 * CUBIC).add_(LINEAR)
            slope = k.mul_(g)
            slope.addcmul_(slope, sigma, value=-1)                        # (1 − σ) g·k
            d_sigma = sigma.mul_(dh)                                      # dh·σ
            du.copy_(d_sigma.mul(g))
            d_sigma.mul_(u)                                               # dh·u·σ
            dg.copy_(d_sigma.addcmul_(d_sigma, slope))
        return d_gate, d_up


def gelu_sigmoid(g):
    """The σ with gelu(g) = g·σ."""
    exponent = torch.mul(g, g).mul_(CUBIC).add_(LINEAR).mul_(g)
    return exponent.sigmoid_()


def pieces(*tensors):
    """Tensors of one shape in flat pieces of PIECE entries; whole where that doesn't pay.

    A compiler fuses the operations itself, and a GPU needs all entries at once to be busy.
    """
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return [tensors]
    return zip(*(tensor.reshape(-1).split(PIECE) for tensor in tensors))


# --------------------------------------------------------------------------------------------------
# LoRA's addition

def lora_linear(x: Tensor, W: Tensor,
                A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x·Wᵀ + scale · (x·Aᵀ)·Bᵀ of x (…, in), frozen W (out, in), A (r, in) and B (out, r)."""
    return AddedLowRank.apply(x, W, A, B, scale)


def lora_linear_plain(x, W, A, B, scale):
    """The same as peft computes it: the update in A's dtype, float32."""
    update = scale * (x.to(A.dtype) @ A.T) @ B.T
    return F.linear(x, W) + update.to(x.dtype)


class AddedLowRank(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ with W frozen.

        dx = dy·W + s·(dy·B)·A        dA = s·(dy·B)ᵀ·x        dB = s·dyᵀ·(x·Aᵀ)

    Only x is kept, which q, k and v share: to make x·Aᵀ again is cheaper than to read it back.
    A and B are rounded to x's dtype, so that no float32 copy of x is made (peft makes one: 15 GB at
    16k tokens of the 2b). Products sum in float32, and so do gradients over micro-batches.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, s):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        flat = x.flatten(0, -2)                             # (N, in)
        y = F.linear(flat, W)                               # (N, out)
        low = flat @ A.to(x.dtype).T                        # (N, r)
        y.addmm_(low, B.to(x.dtype).T, alpha=s)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        x_needs, _, A_needs, B_needs, _ = ctx.needs_input_grad
        flat = x.flatten(0, -2)                             # (N, in)
        dy = dy.flatten(0, -2)                              # (N, out)
        A_rounded = A.to(x.dtype)
        dx = dA = dB = None
        if x_needs or A_needs:
            d_low = dy @ (ctx.s * B).to(x.dtype)            # s·dy·B, (N, r)
        # The first block's x needs none, and a frozen A or B neither
        if x_needs:
            dx = (dy @ W).addmm_(d_low, A_rounded).view_as(x)
        if A_needs:
            dA = (d_low.T @ flat).to(A.dtype)
        if B_needs:
            low = flat @ A_rounded.T                        # x·Aᵀ, (N, r)
            dB = (dy.T @ low).to(B.dtype).mul_(ctx.s)
        return dx, None, dA, dB, None


# --------------------------------------------------------------------------------------------------
# Head, softcap and cross-entropy

SCRATCH = {"cpu": 1 << 19}  # tokens × tile of the vocabulary: 2 MB in float32 stay in a CPU's cache
LARGE = 1 << 25             # other devices need more to be busy
TILE = 256                  # no tile is smaller


def nll_sum(hidden: Tensor, labels: Tensor,
            embedding: Tensor, cap: float | None) -> tuple[Tensor, int]:
    """Summed negative log-likelihood, nats, a float32 scalar, and the number of labelled tokens.

    hidden (B, T, D) after the final norm; labels (B, T) int64, the id that comes next or IGNORE;
    embedding (V, D), which is Gemma's head too. Divide once by the count of a whole step: a mean of
    the means of micro-batches would give tokens of short ones more weight.
    """
    labelled = labels != IGNORE
    h = hidden[labelled]                                    # (N, D)
    targets = labels[labelled]                              # (N,)
    # exp(88) is float32's largest
    bounded = cap is not None and 2 * cap + math.log(len(embedding)) <= 88
    form = FusedNLL.apply if bounded else nll_sum_plain
    return form(h, embedding, targets, cap), len(targets)


def nll_sum_plain(h, E, targets, cap):
    """The sum for h (N, D), E (V, D) and targets (N,), with all logits (N, V) at once."""
    logits = h @ E.T
    capped = softcap(logits.to(wide_dtype(logits)), cap)
    return F.cross_entropy(capped, targets, reduction="sum")


class FusedNLL(torch.autograd.Function):
    """Σ −log softmax(c·tanh(h·Eᵀ/c))[y] of h (N, D), E (V, D), targets y (N,).

    Gemma-2 has 256,000 logits a token, 1 MiB in float32, of which the plain loss holds several
    copies. Here the vocabulary comes in tiles that a cache holds. With l = h·Eᵀ, t = tanh(l/c) and
    z = c·t:

        loss     = log Σ_v exp(z_v) − z_y
        dloss/dh = (Σ_v exp(z_v) (1 − t_v²) E_v) / Σ_v exp(z_v) − (1 − t_y²) E_y

    |z| <= c = 30, so exp can't overflow float32, no running maximum is needed, and one pass makes
    both sums. Where E is frozen, dloss/dh is all that the backward needs, so the forward makes it.
    A trained E needs Σ exp(z) before its own gradient: the backward makes the tiles once more.

        dloss/dE_v = Σ_n (exp(z_nv) / Σ_v exp(z_nv) − [v = y_n]) (1 − t_nv²) h_n

    tanh is slow, the logistic function is not. With s = 1 / (1 + exp(−2l/c)), t = 2s − 1, so that
    exp(z) = exp(2cs) / exp(c) and 1 − t² = 4 (s − s²). exp(−c) and 4 come in at the end.
    """

    @staticmethod
    def forward(ctx, h, E, targets, cap):
        N = len(h)
        dtype = wide_dtype(h)
        total = h.new_zeros(N, dtype=dtype)                          # Σ exp(2cs)
        pull = h.new_zeros(h.shape, dtype=dtype)                     # Σ exp(2cs) (s − s²) E
        # Buffers are taken once, since fresh memory is slow; products are made in h's own dtype
        size = tile_size(h, E)
        buffers = h.new_empty(2, N * size, dtype=dtype)
        products = buffers[0] if h.dtype == dtype else h.new_empty(N * size)
        for tile in E.split(size):
            entries = N * len(tile)
            s, exp = buffers[:, :entries].view(2, N, len(tile))      # (N, V') each
            product = products[:entries].view(N, len(tile))
            # s = sigmoid(2l/c), and this tile's part of Σ exp(2cs)
            torch.addmm(h.new_zeros(()), h, tile.T, beta=0, alpha=2 / cap, out=product)
            s.copy_(product).sigmoid_()
            torch.mul(s, 2 * cap * LOG2E, out=exp).exp2_()
            total += exp.sum(1)
            if ctx.needs_input_grad[0]:
                slope = s.addcmul_(s, s, value=-1)                   # s − s²
                product.copy_(slope.mul_(exp))
                pull += product @ tile
        # The target's own term
        rows = E[targets].to(dtype)                                  # (N, D)
        t = (h * rows).sum(1).div_(cap).tanh_()                      # (N,)
        slope = 1 - t.square()[:, None]
        grad = pull.mul_(4 / total[:, None]).addcmul_(slope, rows, value=-1)
        ctx.save_for_backward(grad.to(h.dtype), h, E, targets, total, slope)
        ctx.cap = cap
        return (total.log() - cap * (1 + t)).sum()

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, h, E, targets, total, slope = ctx.saved_tensors
        dE = None
        if ctx.needs_input_grad[1]:
            dE = torch.empty_like(E)
            size = tile_size(h, E)
            for first, tile, d_tile in zip(range(0, len(E), size), E.split(size), dE.split(size)):
                s = (h @ tile.T).to(total.dtype).mul_(2 / ctx.cap).sigmoid_()
                exp = torch.exp2(s * (2 * ctx.cap * LOG2E))
                d_logits = s.addcmul_(s, s, value=-1)                # s − s²
                d_logits.mul_(exp).mul_(4 / total[:, None])
                # Targets in this tile. (A mask would wait for the GPU)
                row = targets - first
                inside = (row >= 0) & (row < len(tile))
                row = row.clamp(0, len(tile) - 1)
                d_logits.scatter_add_(1, row[:, None], -slope * inside[:, None])
                d_logits = d_logits.mul_(d_loss).to(h.dtype)
                torch.mm(d_logits.T, h, out=d_tile)
        return d_loss * d_hidden, dE, None, None


def tile_size(h, E):
    """Rows of E that make one tile of logits for h (N, D)."""
    size = max(TILE, SCRATCH.get(h.device.type, LARGE) // max(1, len(h)))
    return min(len(E), size)
