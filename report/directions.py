"""Along which SAE decoder directions an adapter's update lies, beside chance.

    used, random_rows = directions_used(model, saes, features, subspaces)   # explain.py goes on

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
from features import norm_gain, serving_layer
from model import MODULES

FALSE_NAMES = 0.02  # chance that an update of random directions gets any feature named
MIN_SHARE = 1e-3    # of an update: a smaller share isn't worth a name
MAX_NAMED = 10      # features of each layer and side
NUM_RANDOM = 8192   # random directions of each layer
MIN_NEW = 0.1       # of a direction, squared, lies outside those named before it: no near copies


def update_norm(model) -> float:
    """‖ΔW‖_F of all modules together."""
    layers = lora.lora_layers(model).values()
    return math.sqrt(sum(float(update_rows(layer).square().sum()) for layer in layers))


def update_rows(layer: lora.LoRALinear, gain: torch.Tensor | None = None) -> torch.Tensor:
    """Rows Z (r, D), float64, that stand for a layer's update in the residual stream.

    For every d, ‖Z d‖ is ‖ΔW d‖ of a reader and ‖dᵀ ΔW‖ of a writer. ΔW = sBA is never made: with
    B = QR it is Z = sRA, and with Aᵀ = QR it is Z = sRBᵀ.

    gain (D): the norm's 1 + w between the module and the residual stream. A reader sees gain ∘ x,
    so in the stream's own coordinates its update is ΔW·diag(gain). A writer's is diag(gain)·ΔW.
    """
    A, B = layer.A.detach().double(), layer.B.detach().double()
    stream, other = (B.T, A.T) if layer.writer else (A, B)
    Z = layer.scale * torch.linalg.qr(other).R @ stream
    return Z if gain is None else Z * gain.to(Z)


def sae_key(name: str, sae_layers) -> tuple[int, str]:
    """(SAE layer, side) that serves the module `name`."""
    side = MODULES[name.split(".")[-1]].side
    return serving_layer(int(name.split(".")[1]), side == "writers", sae_layers), side


def stream_gain(model, name: str) -> torch.Tensor:
    """1 + w (D) of the norm between the module `name` and the residual stream."""
    return norm_gain(model.layers[int(name.split(".")[1])], name)


def random_directions(decoder: torch.Tensor) -> torch.Tensor:
    """Random unit directions (NUM_RANDOM, D) with the uncentred covariance of unit rows (F, D)."""
    C = (decoder.T @ decoder).double() / len(decoder)
    C += 1e-9 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(NUM_RANDOM, len(C), generator=generator).to(decoder)
    return F.normalize(normal @ torch.linalg.cholesky(C).T.to(decoder), dim=1)


def largest_of(shares: torch.Tensor, count: int, level: float) -> float:
    """The share that the largest of `count` random directions passes with probability `level`.

    `shares` are those of some random directions. The quantile lies beyond them, so their upper
    hundredth is extrapolated: the share in one of D isotropic directions is Beta(½, (D−1)/2), whose
    tail is exponential in −log(1 − share).
    """
    x = -torch.log1p(-shares.double().clamp(max=1 - 1e-12))
    top = x.topk(max(2, len(x) // 100)).values
    beyond = math.log(len(top) / len(x) * count / level)
    return -math.expm1(-float(top[-1] + (top[:-1] - top[-1]).mean() * beyond))


def span(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns (D, k) that span k rows (k, D)."""
    return torch.linalg.qr(rows.T.double()).Q.to(rows)


class Update:
    """Rows Z (R, D) of an update, beside unit rows: decoder (F, D) and random (NUM_RANDOM, D)."""

    def __init__(self, Z, decoder, random_rows):
        self.norm2 = float(Z.square().sum())
        # ‖Z d‖ depends on the R factor of Z alone, which has at most D rows
        self.Z = torch.linalg.qr(Z).R.to(decoder) if len(Z) > Z.shape[1] else Z.to(decoder)
        self.decoder, self.random_rows = decoder, random_rows
        self.decoder_products = decoder @ self.Z.T        # (F, R)
        self.random_products = random_rows @ self.Z.T     # (NUM_RANDOM, R)

    def inside(self, Q: torch.Tensor) -> float:
        """Share of ‖ΔW‖² in the span of orthonormal columns Q (D, k)."""
        return float((self.Z @ Q.to(self.Z)).square().sum()) / self.norm2

    def inside_random(self, k: int) -> float:
        """Share of ‖ΔW‖² in the span of k random directions, the mean of 8 draws."""
        if not k:
            return 0.0
        draws = [self.random_rows[i * k:(i + 1) * k] for i in range(8)]
        return sum(self.inside(span(rows)) for rows in draws) / 8

    def remaining(self, named: list[int], level: float) -> tuple[torch.Tensor, float]:
        """What each feature takes once `named` are projected out of ΔW and of all directions.

        Returns the features' shares of the whole ‖ΔW‖² (F), and the share that the largest of F
        random directions passes with probability `level`.
        """
        Q = span(self.decoder[named])
        rest = self.norm2 * (1 - self.inside(Q))
        if rest < 1e-9 * self.norm2:
            return torch.zeros_like(self.decoder[:, 0]), MIN_SHARE
        energy = self._energy_outside(Q, self.decoder, self.decoder_products)
        random_energy = self._energy_outside(Q, self.random_rows, self.random_products)
        limit = largest_of(random_energy / rest, len(self.decoder), level)
        return energy / self.norm2, max(MIN_SHARE, limit * rest / self.norm2)

    def _energy_outside(self, Q, directions, products):
        """‖Z d‖² / ‖d‖² (N) of the part d of each direction that lies outside the span of Q."""
        along = directions @ Q                        # (N, k)
        new = 1 - along.square().sum(1)
        energy = (products - along @ (self.Z @ Q).T).square().sum(1) / new.clamp(min=MIN_NEW)
        return torch.where(new < MIN_NEW, 0, energy)

    def name(self, level: float) -> dict[int, tuple[float, float]]:
        """{feature: (share that it takes after those before it, chance's limit)}, if clearly used.

        Orthogonal matching pursuit: the feature that takes most is projected out, and so on while
        the best is above chance.
        """
        named = []
        for _ in range(3 * MAX_NAMED):
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

    def describe(self, chosen: list[int], U: torch.Tensor | None, level: float) -> dict:
        """One of explain.json's "layers", less its modules: subspace U (D, r̂) and features."""
        share, limit = self.remaining([], level)
        named = self.name(level)
        random_mean = float(self.random_products.square().sum(1).mean()) / self.norm2
        # Of the features that nobody chose and that aren't named, the three most used are listed
        others = [i for i in share.argsort(descending=True).tolist() if i not in (*chosen, *named)]
        features = []
        for index in dict.fromkeys([*named, *chosen, *others[:3]]):
            share_left, left_max = named.get(index, (None, None))
            features.append({
                "index": index, "chosen": index in chosen, "named": index in named,
                "share": float(share[index]), "random": random_mean, "random_max": limit,
                "share_left": share_left, "left_max": left_max})
        dimension = None if U is None else U.shape[1]
        return {
            "subspace": None if U is None else self.inside(U),
            "subspace_random": None if U is None else self.inside_random(dimension),
            "dimension": dimension, "explained": self.inside(span(self.decoder[list(named)])),
            "explained_random": self.inside_random(len(named)), "features": features}


def directions_used(model, saes, features=(), subspaces=None, norm_aware=False):
    """explain.json's {"norm", "layers"}, and a few random directions {layer: (2·MAX_NAMED, D)}.

    features: dicts with layer and index, as in features.json: those chosen before training.
    subspaces: {(layer, side): U (D, r̂)}. With norm_aware, updates are taken in the residual
    stream's own coordinates, where the directions that features.module_bases maps into the modules
    are again the decoder's.
    """
    # Modules that one SAE serves on one side are one update
    modules, updates = defaultdict(list), defaultdict(list)
    for name, layer in lora.lora_layers(model).items():
        key = sae_key(name, saes)
        modules[key].append(name)
        updates[key].append(update_rows(layer, stream_gain(model, name) if norm_aware else None))
    norm2 = {key: sum(float(Z.square().sum()) for Z in parts) for key, parts in updates.items()}
    total = sum(norm2.values())
    level = FALSE_NAMES / max(1, len(modules))

    described, random_rows = [], {}
    for sae_layer in sorted({sae_layer for sae_layer, _ in modules}):
        # One decoder is in memory at a time
        sae = saes[sae_layer]
        decoder = F.normalize(sae.directions(range(sae.n_units)), dim=1)
        directions = random_directions(decoder)
        random_rows[sae_layer] = directions[:2 * MAX_NAMED].clone()
        chosen = [feature["index"] for feature in features if feature["layer"] == sae_layer]
        for side in ("readers", "writers"):
            key = sae_layer, side
            if norm2.get(key):
                update = Update(torch.cat(updates[key]), decoder, directions)
                described.append({
                    "layer": sae_layer, "side": side, "modules": modules[key],
                    "norm2": norm2[key], "share_of_update": norm2[key] / total,
                    **update.describe(chosen, (subspaces or {}).get(key), level)})
    return {"norm": math.sqrt(total), "layers": described}, random_rows
