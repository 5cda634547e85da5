"""The units of a SASA: blocks of b features, which differ by a vector and write a whole subspace.

features.py and saes/gradient.py call this where b > 1 (docs/saes.md). Of a single feature the same
is one signed number and one decoder row.
Letters: K units, k chosen ones, b features of a block, D hidden size.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def lengths(mean: Tensor, shift: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(‖mean‖ (2, K), Δ = ‖shift‖ (K), variance of Δ (K)), the last along `shift`.

    mean (2, K, b): mean codes; shift (K, b): their difference; covariance (K, b, b) of `shift`.
    """
    along = normalize(shift, dim=1)
    variance = torch.einsum("ki,kij,kj->k", along, covariance, along)
    return mean.norm(dim=2), shift.norm(dim=1), variance


def carrying_rows(M: Tensor, rows: Tensor, tau: float) -> Tensor:
    """(m, D) directions: the leading right singular vectors of M^½·D_k, in float32.

    Of each block the fewest that hold a share `tau` of the squared singular values. M (k, b, b):
    second moments of the codes; rows D_k (k, b, D).
    """
    values, V = torch.linalg.eigh(M)
    scale = values.clamp(min=0).sqrt()                                          # (k, b)
    root = (V * scale[:, None]).mT                                              # (k, b, b)
    _, S, directions = torch.linalg.svd(root @ rows, full_matrices=False)
    power = S.square()
    total = power.sum(1, keepdim=True).clamp(min=1e-300)
    share = power.cumsum(1) / total
    wanted = (share < tau - 1e-12).sum(1, keepdim=True) + 1                     # (k, 1)
    is_wanted = torch.arange(S.shape[1]) < wanted                               # (k, b)
    return directions[is_wanted].float()


def spanning_rows(sae, statistics, units, tau: float) -> Tensor:
    """Directions (m, D) that `units` of an SAE bring into the span: of a feature its decoder row.

    Of a block with rows D_k (b, D): the leading right singular vectors of M^½·D_k, the fewest that
    hold a share `tau`. M = ΔΔᵀ + P·Cov Δ is the second moment of what pairs differ by, from its
    features.Statistics.
    """
    if sae.block == 1:
        return sae.decoder_rows(units)
    shift = statistics.shift[units].cpu()
    spread = statistics.num_pairs * statistics.covariance[units].cpu()
    outer = shift[:, :, None] * shift[:, None]
    M = outer + spread.nan_to_num()                                             # (k, b, b)
    rows = sae.unit_rows(units).double().cpu()                                  # (k, b, D)
    return carrying_rows(M, rows, tau)


def strongest_directions(rows: Tensor, moment: Tensor) -> Tensor:
    """(K, D) unit directions in the spans of rows (K, b, D) that G carries most, by GᵀG (D, D)."""
    basis = torch.linalg.svd(rows.double(), full_matrices=False).Vh             # (K, b, D)
    inside = basis @ moment @ basis.mT                                          # (K, b, b)
    along = torch.linalg.eigh(inside).eigenvectors[..., -1]                     # (K, b)
    directions = along[:, None] @ basis                                         # (K, 1, D)
    return directions[:, 0].float()
