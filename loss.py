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
"""

import math

import torch
import torch.nn.functional as F

from attention import LOG2E

IGNORE = -100
SCRATCH = {"cpu": 1 << 19}  # tokens × tile of the vocabulary: 2 MB in float32 stay in a CPU's cache;
LARGE = 1 << 25             # elsewhere it takes more to fill the device
TILE = 256                  # and no tile is smaller


def nll_sum(model, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood, nats, a float32 scalar, and the count of labelled tokens.

    hidden (B, T, D) after the final norm; labels (B, T) int64, the id that comes next, or -100 where there is no loss.
    The sum is what gets divided once by the count of a whole step: a mean of micro-batch means would weigh a token by
    the company it keeps.
    """
    labelled = labels != IGNORE
    h, targets = hidden[labelled], labels[labelled]                                  # (N, D), (N,)
    embedding, cap = model.embed_tokens.weight, model.config.final_logit_softcapping
    if embedding.requires_grad or cap is None or 2 * cap + math.log(len(embedding)) > 88:  # exp(88) is float32's largest
        return F.cross_entropy(model.unembed(h), targets, reduction="sum"), len(targets)
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
