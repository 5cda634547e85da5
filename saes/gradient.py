"""The mechanics of `--select gradient` (features.py): gradients summed over rows of text, and
matching pursuit, which finds the decoder rows of an SAE that carry most of a matrix G (n, D).

G is known by its moment GᵀG (D, D).
Letters: T tokens, D hidden size, K units of b features, k chosen ones, r rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from data import Row
from model import TARGETS, Gemma2
from run.files import InputError

NEW = 1e-3      # of a unit row, squared: what must lie outside the span so far for it to be chosen


def summed_gradients(model: Gemma2, rows: Sequence[tuple[float, Row]]) -> dict[str, torch.Tensor]:
    """{module name: Σ scale · ∂NLL/∂W (out, in)} over rows [(scale, data.Row)], at least float32.

    Of the q, k, v and o of a frozen model. Each gradient joins its sum as soon as the backward has
    made it, so that one is held at a time.
    """
    device, modules = model.embed_tokens.weight.device, dict(model.named_modules())
    weights = {name: modules[name].weight for name in modules if name.endswith(TARGETS)}
    sums, hooks = {}, []
    for name, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sums[name] = torch.zeros(weight.shape, dtype=dtype, device=device)
        weight.requires_grad_(True)
        hook = partial(_take_gradient, sums[name])
        hooks.append(weight.register_post_accumulate_grad_hook(hook))
    for scale, row in tqdm(rows, "contrasting", unit="row", leave=False, delay=1, disable=None):
        parts = (row.tokens, row.documents, row.labels)
        tokens, documents, labels = (part[None].to(device) for part in parts)          # (1, T)
        hidden, _ = model.hidden(tokens, documents)
        (scale * model.nll_sum(hidden, labels)[0]).backward()
    # The model is frozen again, as it came
    for hook, weight in zip(hooks, weights.values()):
        hook.remove()
        weight.requires_grad_(False)
    return sums


def _take_gradient(total, weight):
    total.add_(weight.grad)
    weight.grad = None


class Pursuit(NamedTuple):
    features: torch.Tensor   # (k,) rows, the first choice first
    scores: torch.Tensor     # (k,) share of ‖G‖² that each adds
    U: torch.Tensor          # (D, r) orthonormal columns, float32
    explained: float         # share of ‖G‖² along U


def candidates(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(K, D) unit directions of decoder rows (K, b, D): in a block's span, what G carries most."""
    if rows.shape[1] == 1:
        return normalize(rows[:, 0].float(), dim=1)
    basis = torch.linalg.svd(rows.double(), full_matrices=False).Vh                 # (K, b, D)
    along = torch.linalg.eigh(basis @ moment @ basis.mT).eigenvectors[..., -1]      # (K, b)
    return (along[:, None] @ basis)[:, 0].float()


def energy(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(K,) ‖G·w‖² of rows w (K, D), float64."""
    return ((rows @ moment.to(rows.dtype)) * rows).sum(1).double()


def greedy(rows: torch.Tensor, moment: torch.Tensor, count: int, rank: int) -> Pursuit:
    """Pick `count` of the unit rows w (K, D), each the best after those before it, with span Q:

        argmax ‖G(I − QQᵀ)w‖² / ‖(I − QQᵀ)w‖²;  U = leading right singular vectors of GQQᵀ

    In the order-recursive form (Rebollo-Neira and Lowe 2002): with q the new direction, numerator
    and denominator of all rows follow from a = w·q and b = (GᵀGq)·(I − QQᵀ)w, two products a pick.
    """
    outside = energy(rows, moment)                                                  # (K,)
    norm = torch.ones_like(outside)                                                 # (K,)
    Q, features, scores = moment.new_zeros(len(moment), 0), [], []
    for _ in range(min(count, len(rows), len(moment))):
        ratio = torch.where(norm > NEW, outside / norm.clamp(min=NEW), -1.0)
        best = int(ratio.argmax())
        if ratio[best] <= 0:
            break
        # The second projection takes away what rounding has left of the first
        q = rows[best].double()
        for _ in range(2):
            q = normalize(q - Q @ (Q.T @ q), dim=0)
        v = moment @ q
        products = rows @ torch.stack((q, v - Q @ (Q.T @ v)), 1).to(rows.dtype)     # (K, 2)
        a, b = products.double().unbind(1)
        outside, norm = outside - 2 * a * b + a * a * (q @ v), norm - a * a
        Q = torch.cat((Q, q[:, None]), 1)
        features.append(best)
        scores.append((q @ v / moment.trace()).item())
    if not features:
        raise InputError("the two sides of the pairs have the same gradients: nothing to choose by")
    V = Q @ torch.linalg.eigh(Q.T @ moment @ Q).eigenvectors.flip(1)                # (D, k)
    U = V[:, :rank].float().contiguous()
    explained = ((moment @ U.double()) * U.double()).sum() / moment.trace()
    return Pursuit(torch.tensor(features), torch.tensor(scores, dtype=torch.float64), U,
                   explained.item())


def rotated(U: torch.Tensor, seed: int) -> torch.Tensor:
    """U·R with a random rotation R: the same span.

    Singular vectors put most of G into few columns. AdamW steps by signs, so its first step lowers
    the loss by about lr·‖GU‖₁, which is larger where the columns are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(U.shape[1], U.shape[1], generator=generator)).Q
    return (U @ R.to(U)).contiguous()
