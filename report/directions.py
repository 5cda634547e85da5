"""Along which SAE decoder directions an adapter's update lies, beside chance.

    used = directions_used(model, saes, subspaces)      # explain.py goes on

A direction d of the residual stream is *read* by q, k and v: their ΔW spends ‖ΔW d‖² on it. It is
*written* by o, whose ΔW puts ‖dᵀ ΔW‖² there. Decoder directions overlap, and one of them always
comes first. So a feature's share is compared with the shares of random directions that have the
decoder's own covariance: what any direction in the busy part of the residual stream would get
proves nothing about a feature.

Letters: D hidden size, F features of an SAE, R rows that stand for an update, k a few.
"""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F

import lora
from features import SIDES, norm_gain, serving_layer
from model import MODULES

FALSE_NAMES = 0.02  # chance that an update of random directions gets any feature named
MIN_SHARE = 1e-3    # of an update: a smaller share isn't worth a name
MAX_NAMED = 10      # features of each layer and side
NUM_RANDOM = 8192   # random directions of each layer
MIN_NEW = 0.1       # of a direction, squared, lies outside those named before it: no near copies


def update_norm(model) -> float:
    """‖ΔW‖_F of all modules together."""
    layers = lora.lora_layers(model).values()
    return math.sqrt(sum(norm2(update_rows(layer)) for layer in layers))


def norm2(Z: torch.Tensor) -> float:
    """‖Z‖_F²."""
    return float(Z.square().sum())


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
    return F.normalize(sae.directions(range(sae.n_units)), dim=1)


def random_directions(decoder: torch.Tensor) -> torch.Tensor:
    """Random unit directions (NUM_RANDOM, D) with the uncentred covariance of unit rows (F, D)."""
    C = (decoder.T @ decoder).double() / len(decoder)
    # A small ridge, so that directions which the decoder doesn't span do no harm
    identity = torch.eye(len(C)).to(C)
    C += 1e-9 * C.diagonal().mean() * identity
    factor = torch.linalg.cholesky(C).T.to(decoder)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(NUM_RANDOM, len(C), generator=generator).to(decoder)
    return F.normalize(normal @ factor, dim=1)


def largest_of(shares: torch.Tensor, count: int, level: float) -> float:
    """The share that the largest of `count` random directions passes with probability `level`.

    `shares` are those of some random directions. The quantile lies beyond them, so their upper
    hundredth is extrapolated: the share in one of D isotropic directions is Beta(½, (D−1)/2), whose
    tail is exponential in −log(1 − share).
    """
    x = -torch.log1p(-shares.double().clamp(max=1 - 1e-12))
    top = x.topk(max(2, len(x) // 100)).values
    # The tail's scale is the mean excess over its threshold
    threshold = top[-1]
    scale = (top[:-1] - threshold).mean()
    beyond = math.log(len(top) / len(x) * count / level)
    return -math.expm1(-float(threshold + scale * beyond))


def span(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns (D, k) that span k rows (k, D)."""
    Q = torch.linalg.qr(rows.T.double()).Q
    return Q.to(rows)


class Update:
    """Rows Z (R, D) of an update, beside unit rows: decoder (F, D) and random (NUM_RANDOM, D)."""

    def __init__(self, Z, decoder, random_rows):
        self.norm2 = norm2(Z)
        # ‖Z d‖ depends on the R factor of Z alone, which has at most D rows
        if len(Z) > Z.shape[1]:
            Z = torch.linalg.qr(Z).R
        self.Z = Z.to(decoder)
        self.decoder = decoder
        self.random_rows = random_rows
        self.decoder_products = decoder @ self.Z.T        # (F, R)
        self.random_products = random_rows @ self.Z.T     # (NUM_RANDOM, R)

    def inside(self, Q: torch.Tensor) -> float:
        """Share of ‖ΔW‖² in the span of orthonormal columns Q (D, k)."""
        return norm2(self.Z @ Q.to(self.Z)) / self.norm2

    def inside_random(self, k: int) -> float:
        """Share of ‖ΔW‖² in the span of k random directions, the mean of 8 draws."""
        if k == 0:
            return 0.0
        draws = self.random_rows[:8 * k].split(k)
        return sum(self.inside(span(rows)) for rows in draws) / 8

    def remaining(self, named: list[int], level: float) -> tuple[torch.Tensor, float]:
        """What each feature takes once `named` are projected out of ΔW and of all directions.

        Returns the features' shares of the whole ‖ΔW‖² (F), and the share that the largest of F
        random directions passes with probability `level`.
        """
        Q = span(self.decoder[named])
        # What rounding leaves of an update that is wholly explained is nothing
        rest = self.norm2 * (1 - self.inside(Q))
        if rest < 1e-9 * self.norm2:
            return torch.zeros_like(self.decoder[:, 0]), MIN_SHARE
        energy = self._energy_outside(Q, self.decoder, self.decoder_products)
        random_energy = self._energy_outside(Q, self.random_rows, self.random_products)
        limit = largest_of(random_energy / rest, len(self.decoder), level)
        return energy / self.norm2, max(MIN_SHARE, limit * rest / self.norm2)

    def _energy_outside(self, Q, directions, products):
        """‖Z d‖² / ‖d‖² (N) of the part d of each direction that lies outside the span of Q."""
        # d − QQᵀd, without making it
        along = directions @ Q                        # (N, k)
        outside = products - along @ (self.Z @ Q).T   # (N, R)
        # A direction that is nearly in the span would divide noise by noise
        new = 1 - along.square().sum(1)
        energy = outside.square().sum(1) / new.clamp(min=MIN_NEW)
        return torch.where(new < MIN_NEW, 0, energy)

    def name(self, level: float) -> dict[int, tuple[float, float]]:
        """{feature: (share that it takes after those before it, chance's limit)}, if clearly used.

        Orthogonal matching pursuit: the feature that takes most is projected out, and so on while
        the best is above chance.
        """
        named = []
        for _ in range(3 * MAX_NAMED):
            # The feature that takes most of what the others leave
            share, limit = self.remaining(named, level)
            best = int(share.argmax())
            if len(named) == MAX_NAMED or share[best] <= limit:
                break
            named.append(best)
            # An earlier feature may have stood for a mixture of later ones: each is tried again
            # beside the others. It makes way for one that takes more, and goes if none does.
            for feature in named[:-1]:
                others = [other for other in named if other != feature]
                share, limit = self.remaining(others, level)
                best = int(share.argmax())
                if share[best] > limit:
                    named = [*others, best]
                elif len(self._ordered(others, level)) == len(others):
                    named = others
        return self._ordered(named, level)

    def _ordered(self, named, level):
        """`named` again, each time the one that takes most of what is left, while above chance."""
        ordered = {}
        while len(ordered) < len(named):
            share, limit = self.remaining(list(ordered), level)
            left = [feature for feature in named if feature not in ordered]
            best = max(left, key=lambda feature: share[feature])
            if share[best] <= limit:
                break
            ordered[best] = float(share[best]), limit
        return ordered


def directions_used(model, saes, subspaces=None, norm_aware=False) -> list[dict]:
    """explain.json's "layers": the update of the modules that one SAE serves, on each side.

    subspaces: {(layer, side): U (D, r̂)}. With norm_aware, updates are taken in the residual
    stream's own coordinates, where the directions that features.module_bases maps into the modules
    are again the decoder's.
    """
    # Modules that one SAE serves on one side are one update
    updates = defaultdict(list)
    for name, layer in lora.lora_layers(model).items():
        gain = stream_gain(model, name, norm_aware)
        updates[sae_key(name, saes)].append(update_rows(layer, gain))
    sizes = {key: sum(map(norm2, rows)) for key, rows in updates.items()}
    level = FALSE_NAMES / len(updates)

    parts = []
    for sae_layer in sorted(saes):
        # One decoder is in memory at a time
        decoder = unit_decoder(saes[sae_layer])
        random_rows = random_directions(decoder)
        for side in SIDES:
            key = sae_layer, side
            # A LoRA that was never trained has B = 0
            if sizes.get(key, 0) == 0:
                continue
            update = Update(torch.cat(updates[key]), decoder, random_rows)
            named = update.name(level)
            part = {
                "layer": sae_layer,
                "side": side,
                "share_of_update": sizes[key] / sum(sizes.values()),
                "explained": update.inside(span(decoder[list(named)])),
                "explained_random": update.inside_random(len(named)),
                "features": [{"index": index, "share_left": share, "left_max": limit}
                             for index, (share, limit) in named.items()]}
            if subspaces:
                part["subspace"] = update.inside(subspaces[key])
                part["subspace_random"] = update.inside_random(subspaces[key].shape[1])
            parts.append(part)
    return parts
