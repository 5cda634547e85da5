"""The mechanics of `--select gradient` (features.py): the gradient of the loss, and matching
pursuit, which finds the decoder rows of an SAE that carry most of a matrix G (n, D).

G is known by its moment GᵀG (D, D).
Letters: T tokens, D hidden size, K units of b features, k chosen ones, r rank.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from data import Example, pack
from model import TARGETS, Gemma2
from run import parallel
from run.files import InputError
from saes.blocks import strongest_directions

Pairs = Sequence[tuple[Example, Example]]     # (aligned, unaligned)
NEW = 1e-3      # of a unit row, squared: what must lie outside the span so far for it to be chosen


def contrast_gradients(model: Gemma2, pairs: Pairs, batch_tokens=2048, recompute=False,
                       targets: Collection[str] = TARGETS) -> dict[str, Tensor]:
    """{module name: ∂L/∂W (out, in)} of a frozen model's `targets`, at least float32.

    L = NLL(aligned) − NLL(unaligned), per token; it counts the turn's end, as in training. Rows
    have `batch_tokens` tokens, or those of the longest example; of many processes each takes a
    share. `recompute` as in Gemma2. Raises InputError for a sharded model.
    """
    length = max(batch_tokens, *(len(example.tokens) for pair in pairs for example in pair))
    rows = []
    for sign, examples in zip((1, -1), zip(*pairs)):
        num_tokens = sum(len(example.tokens) - example.start for example in examples)
        rows += [(sign / num_tokens, row) for row in pack(examples, length, 0, 0)]
    model.recompute = recompute
    # Each gradient joins its sum as soon as the backward has made it, so that one is held at a time
    sums = {}
    hooks = []
    weights = {name: module.weight for name, module in model.named_modules()
               if name.endswith(tuple(targets))}
    for name, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sums[name] = torch.zeros_like(weight, dtype=dtype)
        weight.requires_grad_(True)
        hook = partial(_take_gradient, sums[name])
        hooks.append(weight.register_post_accumulate_grad_hook(hook))
    device = model.embed_tokens.weight.device
    own_rows = parallel.own_share(rows)
    for scale, row in tqdm(own_rows, "contrasting", leave=False, delay=1, disable=None):
        parts = (row.tokens, row.documents, row.labels)
        tokens, documents, labels = (part[None].to(device) for part in parts)          # (1, T)
        hidden, _ = model.hidden(tokens, documents)
        nll, _ = model.nll_sum(hidden, labels)
        (scale * nll).backward()
    # The model is frozen again, as it came
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    parallel.sum_tensors(*sums.values())
    return sums


def _take_gradient(total, weight):
    total.add_(weight.grad)
    weight.grad = None


class Pursuit(NamedTuple):
    features: Tensor   # (k,) rows, the first choice first
    scores: Tensor     # (k,) share of ‖G‖² that each adds
    U: Tensor          # (D, r) orthonormal columns, float32
    explained: float         # share of ‖G‖² along U


def candidates(rows: Tensor, moment: Tensor) -> Tensor:
    """(K, D) unit directions of decoder rows (K, b, D): in a block's span, what G carries most."""
    if rows.shape[1] == 1:
        return normalize(rows[:, 0].float(), dim=1)
    return strongest_directions(rows, moment)


def energy(rows: Tensor, moment: Tensor) -> Tensor:
    """(K,) ‖G·w‖² of rows w (K, D), float64."""
    return ((rows @ moment.to(rows.dtype)) * rows).sum(1).double()


def greedy(rows: Tensor, moment: Tensor, count: int, rank: int) -> Pursuit:
    """Pick `count` of the unit rows w (K, D), each the best after those before it, with span Q:

        argmax ‖G(I − QQᵀ)w‖² / ‖(I − QQᵀ)w‖²;  U = leading right singular vectors of GQQᵀ

    In the order-recursive form (Rebollo-Neira and Lowe 2002): with q the new direction, numerator
    and denominator of all rows follow from a = w·q and b = (GᵀGq)·(I − QQᵀ)w, two products a pick.
    """
    numerator = energy(rows, moment)                                                # (K,)
    denominator = torch.ones_like(numerator)                                        # (K,)
    Q = moment.new_zeros(len(moment), 0)
    features = []
    scores = []
    for _ in range(min(count, len(rows), len(moment))):
        ratio = numerator / denominator.clamp(min=NEW)
        ratio = torch.where(denominator > NEW, ratio, -1.0)
        best = int(ratio.argmax())
        if ratio[best] <= 0:
            break
        # The second projection takes away what rounding has left of the first
        q = rows[best].double()
        for _ in range(2):
            q = normalize(q - Q @ (Q.T @ q), dim=0)
        # Take the new direction out of all rows
        v = moment @ q                                                              # (D,)
        pair = torch.stack((q, v - Q @ (Q.T @ v)), 1)                               # (D, 2)
        a, b = (rows @ pair.to(rows.dtype)).double().unbind(1)                      # (K,) each
        numerator = numerator - 2 * a * b + a * a * (q @ v)
        denominator = denominator - a * a
        Q = torch.cat((Q, q[:, None]), 1)
        features.append(best)
        scores.append((q @ v / moment.trace()).item())
    if not features:
        raise InputError("the two sides of the pairs have the same gradients: nothing to choose by")
    # Of G's part in the span, the leading right singular vectors
    V = Q @ torch.linalg.eigh(Q.T @ moment @ Q).eigenvectors.flip(1)                # (D, k)
    U = V[:, :rank].float().contiguous()
    along = U.double()
    explained = ((moment @ along) * along).sum() / moment.trace()
    return Pursuit(torch.tensor(features), torch.tensor(scores, dtype=torch.float64), U,
                   explained.item())


def rotated(U: Tensor, seed: int) -> Tensor:
    """U·R with a random rotation R: the same span.

    Singular vectors put most of G into few columns. AdamW steps by signs, so its first step lowers
    the loss by about lr·‖GU‖₁, which is larger where the columns are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    r = U.shape[1]
    noise = torch.randn(r, r, generator=generator)
    R = torch.linalg.qr(noise).Q
    return (U @ R.to(U)).contiguous()
