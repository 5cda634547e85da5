"""An adapter's update in the residual stream, and the SAE decoder directions it is made of.

A direction d of the residual stream is *read* by q, k and v: their ΔW spends ‖ΔW d‖² on it. It is
*written* by o, whose ΔW puts ‖dᵀ ΔW‖² there. Such shares are what the init gave as much as what
was learned: effects.py says which directions carry something.

Letters: D hidden size, F features of an SAE, R rows that stand for an update, k a few.
"""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F

import lora
from features import SIDES, norm_gain, serving_layer
from model import MODULES

MIN_SHARE = 0.1     # of a part of the update: what takes less isn't one of its main directions
NUM_RANDOM = 4096   # random directions of each layer and side
MIN_NEW = 0.3       # of a direction, squared, lies outside those above it: no near copies


def update_norm(model) -> float:
    """‖ΔW‖_F of all modules together."""
    layers = lora.lora_layers(model).values()
    return math.sqrt(sum(norm2(update_rows(layer)) for layer in layers))


def norm2(Z: torch.Tensor) -> float:
    """‖Z‖_F²."""
    return float(Z.square().sum())


def stream_factor(layer: lora.LoRALinear) -> torch.Tensor:
    """The factor (r, D) whose rows are directions of the stream: A of a reader, Bᵀ of a writer."""
    return layer.B.T if layer.writer else layer.A


def update_rows(layer: lora.LoRALinear, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Rows Z (r, D), float64, that stand for a layer's update in the residual stream.

    For every d, ‖Z d‖ is ‖ΔW d‖ of a reader and ‖dᵀ ΔW‖ of a writer. ΔW = sBA is never made: with
    B = QR it is Z = sRA, and with Aᵀ = QR it is Z = sRBᵀ.

    gain (D): the norm's 1 + w between the module and the residual stream. A reader sees gain ∘ x,
    so in the stream's own coordinates its update is ΔW·diag(gain). A writer's is diag(gain)·ΔW.
    """
    A = layer.A.detach().cpu().double()
    B = layer.B.detach().cpu().double()
    stream, other = (B.T, A.T) if layer.writer else (A, B)
    R = torch.linalg.qr(other).R
    return layer.scale * R @ stream * gain


def sae_key(name: str, sae_layers) -> tuple[int, str]:
    """(SAE layer, side) that serves the module `name`."""
    _, block, _, leaf = name.split(".")
    side = MODULES[leaf].side
    return serving_layer(int(block), side == "writers", sae_layers), side


def stream_gain(model, name: str, norm_aware: bool) -> torch.Tensor | float:
    """1 + w (D), float64, of the norm between module `name` and the residual stream, or 1.0."""
    if not norm_aware:
        return 1.0
    block = int(name.split(".")[1])
    return norm_gain(model.layers[block], name).double()


def unit_decoder(sae) -> torch.Tensor:
    """Each feature's decoder direction, as unit rows (F, D)."""
    return F.normalize(sae.directions(range(sae.n_units)), dim=1).cpu()


def random_directions(decoder: torch.Tensor) -> torch.Tensor:
    """Random unit directions (NUM_RANDOM, D) with the uncentred covariance of unit rows (F, D)."""
    C = (decoder.T @ decoder).double() / len(decoder)
    # A small ridge, so that directions which the decoder doesn't span do no harm
    identity = torch.eye(len(C)).to(C)
    C += 1e-9 * C.diagonal().mean() * identity
    return random_mixtures(torch.linalg.cholesky(C).T.to(decoder))


def random_mixtures(rows: torch.Tensor) -> torch.Tensor:
    """Random unit directions (NUM_RANDOM, D): normal mixtures of rows (k, D)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NUM_RANDOM, len(rows), generator=generator).to(rows)
    return F.normalize(weights @ rows, dim=1)


def span(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns (D, k) that span k rows (k, D)."""
    Q = torch.linalg.qr(rows.T.double()).Q
    return Q.to(rows)


def outside(directions: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Unit rows (N, D): the parts of unit directions outside the span of Q (D, k). A direction with
    less than MIN_NEW of it there becomes 0."""
    rest = directions - directions @ Q @ Q.T
    is_new = rest.square().sum(1, keepdim=True) >= MIN_NEW
    return F.normalize(rest, dim=1) * is_new


def main_features(Z: torch.Tensor, decoder: torch.Tensor) -> list[int]:
    """Features that each take MIN_SHARE of ‖Z‖² or more, Z (R, D), beside the others: orthogonal
    matching pursuit over unit rows (F, D)."""
    def best_beside(others):
        rows = outside(decoder, span(decoder[others]))
        shares = (rows @ Z.T.to(rows)).square().sum(1) / norm2(Z)
        best = int(shares.argmax())
        return best, float(shares[best])

    chosen: list[int] = []
    best, share = best_beside(chosen)
    while share >= MIN_SHARE:
        chosen.append(best)
        # An earlier one may have stood for a mixture of later ones: each is sought again
        for feature in chosen[:-1]:
            others = [other for other in chosen if other != feature]
            chosen = [*others, best_beside(others)[0]]
        best, share = best_beside(chosen)
    return chosen


def inside(Z: torch.Tensor, Q: torch.Tensor) -> float:
    """Share of ‖Z‖² in the span of orthonormal columns Q (D, k)."""
    return norm2(Z @ Q.to(Z)) / norm2(Z)


def parts_of(model, sae_layers, norm_aware=False) -> dict[tuple[int, str], torch.Tensor]:
    """{(SAE layer, side): Z (R, D)}: the modules that one SAE serves on one side are one update.

    With norm_aware, updates are taken in the residual stream's own coordinates, where the
    directions that features.module_bases maps into the modules are again the decoder's. Parts whose
    update is 0 are left out.
    """
    rows = defaultdict(list)
    for name, layer in lora.lora_layers(model).items():
        gain = stream_gain(model, name, norm_aware)
        rows[sae_key(name, sae_layers)].append(update_rows(layer, gain))
    parts = {}
    for key in sorted(rows, key=lambda key: (key[0], SIDES.index(key[1]))):
        Z = torch.cat(rows[key])
        # ‖Z d‖ depends on the R factor of Z alone, which has at most D rows
        if len(Z) > Z.shape[1]:
            Z = torch.linalg.qr(Z).R
        if norm2(Z) > 0:
            parts[key] = Z
    return parts
