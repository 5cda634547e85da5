"""Along which SAE decoder directions an adapter's update lies, and whether that is more than chance.

    found = shares(model, saes, features, spaces)     # of the LoRA adapter that the model carries; explain.py goes on from here
    probe(adapters, bases)                            # singular values, angle to the subspace: a look while it trains

A direction d of the residual stream is *read* by q, k, v, whose ΔW spends ‖ΔW d‖² on it, and *written* by o, whose ΔW puts
‖dᵀ ΔW‖² there. Decoder directions overlap and one of them always comes first, so a share is held against what random
directions get. These have the decoder's own covariance: what any direction in the busy part of the residual stream would
get proves nothing about a feature. Letters: D hidden size, F features of an SAE, R rows that stand for an update, k a few.
"""

import math
from collections import defaultdict

import torch

import lora
from features import norm_gain, serving_layer, space_of

LEVEL = 0.02       # chance that an update of random directions gets any feature named, in all layers together
LEAST = 1e-3       # of an update: what is smaller isn't worth a name
MOST = 10          # features named of each layer and side
CONTROL = 8192     # random directions of each layer
NEW = 0.1          # of a named direction, squared, must lie outside those named before it: near copies say nothing new


def norm(model):
    """‖ΔW‖_F of all modules together."""
    return math.sqrt(sum(float(update_rows(layer).square().sum()) for layer in lora.lora_layers(model).values()))


def update_rows(layer: lora.LoRALinear, gain: torch.Tensor | None = None) -> torch.Tensor:
    """Rows Z (r, D), float64, that stand for a LoRALinear's update in the residual stream: ‖Z d‖ is ‖ΔW d‖ of a reader and
    ‖dᵀ ΔW‖ of a writer, for every d. ΔW = sBA is never made: with B = QR it is Z = sRA, and with Aᵀ = QR it is sRBᵀ.

    gain (D): the norm's 1 + w between the module and the residual stream. A reader sees gain ∘ x, so in the stream's own
    coordinates its update is ΔW·diag(gain); a writer's is diag(gain)·ΔW.
    """
    A, B = layer.A.detach().double(), layer.B.detach().double()
    mine, other = (B.T, A.T) if layer.writer else (A, B)
    Z = layer.scale * torch.linalg.qr(other).R @ mine
    return Z if gain is None else Z * gain.to(Z)


def random_directions(rows):
    """Random unit directions (CONTROL, D) with the covariance of the unit rows (F, D), not centred."""
    C = (rows.T @ rows).double() / len(rows)
    C += 1e-9 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    draw = torch.randn(CONTROL, len(C), generator=torch.Generator().manual_seed(0)).to(rows)
    return torch.nn.functional.normalize(draw @ torch.linalg.cholesky(C).T.to(rows), dim=1)


def largest_of(shares, count, level):
    """The share that the largest of `count` random directions passes with probability `level`, from those of some of them.

    That is a quantile beyond the sample, so the upper hundredth is taken to go on as it begins: the share in one direction
    of D isotropic ones is Beta(½, (D−1)/2), whose tail is exponential in −log(1 − share).
    """
    x = -torch.log1p(-shares.double().clamp(max=1 - 1e-12))
    top = x.topk(max(2, len(x) // 100)).values
    beyond = math.log(len(top) / len(x) * count / level)
    return -math.expm1(-float(top[-1] + (top[:-1] - top[-1]).mean() * beyond)) if beyond > 0 else float(shares.quantile(1 - level / count))


def span(rows):
    """Orthonormal columns (D, k) that span k rows (k, D)."""
    return torch.linalg.qr(rows.T.double()).Q.to(rows)


class Update:
    """Rows Z (R, D) of an update beside the decoder's unit rows (F, D) and the random directions."""

    def __init__(self, Z, rows, control):
        self.Z = torch.linalg.qr(Z).R.to(rows) if len(Z) > Z.shape[1] else Z.to(rows)
        self.rows, self.control, self.norm2 = rows, control, float(Z.square().sum())
        self.seen = rows @ self.Z.T, control @ self.Z.T                              # (F, R), (CONTROL, R)

    def inside(self, Q):
        """Share of ‖ΔW‖² in the span of orthonormal columns Q (D, k)."""
        return float((self.Z @ Q.to(self.Z)).square().sum()) / self.norm2

    def left(self, named, level):
        """After the features `named` are projected out of ΔW and of all directions: the share of all of ‖ΔW‖² that each
        feature still takes (F), and the share that the largest of F random directions passes with probability `level`."""
        Q = span(self.rows[named])
        rest = self.norm2 * (1 - self.inside(Q))
        if rest < 1e-9 * self.norm2:
            return torch.zeros_like(self.rows[:, 0]), LEAST
        taken = []
        for directions, seen in zip((self.rows, self.control), self.seen):
            along = directions @ Q                                                   # (F, k)
            new = 1 - along.square().sum(1)
            energy = (seen - along @ (self.Z @ Q).T).square().sum(1) / new.clamp(min=NEW)
            taken.append(torch.where(new < NEW, 0, energy))
        limit = largest_of(taken[1] / rest, len(self.rows), level)
        return taken[0] / self.norm2, max(LEAST, limit * rest / self.norm2)

    def name(self, level):
        """[(feature, share that it takes after those before it, what chance could)] of the features clearly used.

        Orthogonal matching pursuit: the feature that takes most is projected out, and so on while the best is above
        chance. After each, those before it are tried again beside the others, since one may have stood for a mixture of
        them: it makes way for one that takes more in its place, and goes where nothing takes more than chance.
        """
        named = []
        for _ in range(3 * MOST):
            taken, limit = self.left(named, level)
            best = int(taken.argmax())
            if len(named) == MOST or taken[best] <= limit:
                break
            named.append(best)
            for feature in named[:-1]:
                others = [other for other in named if other != feature]
                taken, limit = self.left(others, level)
                best = int(taken.argmax())
                if taken[best] > limit:
                    named = [*others, best]
                elif len(self.ordered(others, level)) == len(others):      # they don't hang on the one that goes
                    named = others
        return self.ordered(named, level)

    def ordered(self, named, level):
        """[(feature, share, chance's)] of `named`, each time the one that takes most of what is left, while above chance."""
        order, rest = [], list(named)
        while rest:
            taken, limit = self.left([feature for feature, *_ in order], level)
            best = max(rest, key=lambda feature: taken[feature])
            if taken[best] <= limit:
                break
            order.append((best, float(taken[best]), limit))
            rest.remove(best)
        return order


def shares(model, saes, features=(), spaces=None, norm_aware=False):
    """explain.json's "norm" and "layers"; and some random directions {layer: (2·MOST, D)}.

    features: dicts with layer and index, as in features.json: the chosen ones. spaces: {layer: U (D, r̂)}. One decoder is in
    memory at a time. With norm_aware, updates are taken in the residual stream's own coordinates, where the directions that
    features.module_bases maps into the modules are again the decoder's.
    """
    groups, updates, some = defaultdict(list), defaultdict(list), {}
    for name, layer in lora.lora_layers(model).items():
        block = int(name.split(".")[1])
        key = serving_layer(block, layer.writer, saes), "writers" if layer.writer else "readers"
        groups[key].append(name)
        updates[key].append(update_rows(layer, norm_gain(model.layers[block], layer.writer, ".mlp." in name)[0] if norm_aware else None))
    norm2 = {key: sum(float(Z.square().sum()) for Z in parts) for key, parts in updates.items()}
    level, total, out = LEVEL / max(1, len(groups)), sum(norm2.values()), []
    for layer in sorted({layer for layer, _ in groups}):
        rows = torch.nn.functional.normalize(saes[layer].directions(range(saes[layer].n_units)), dim=1)
        control = random_directions(rows)
        chosen = [feature["index"] for feature in features if feature["layer"] == layer]
        for side in ("readers", "writers"):
            if not norm2.get((layer, side)):
                continue
            update = Update(torch.cat(updates[layer, side]), rows, control)

            def chance(k):                                       # the share in the span of k random directions, on average
                return sum(update.inside(span(control[i * k:(i + 1) * k])) for i in range(8)) / 8 if k else 0.0

            alone, limit = update.left([], level)
            pursuit = {feature: (taken, most) for feature, taken, most in update.name(level)}
            busiest = [i for i in alone.argsort(descending=True).tolist() if i not in chosen and i not in pursuit][:3]
            mean = float(update.seen[1].square().sum(1).mean()) / update.norm2
            listed = [*pursuit, *(i for i in chosen if i not in pursuit), *busiest]
            U = space_of(spaces, layer, side) if spaces else None
            out.append({
                "layer": layer, "side": side, "modules": groups[layer, side], "norm2": norm2[layer, side],
                "share_of_update": norm2[layer, side] / total, "subspace": None if U is None else update.inside(U),
                "subspace_random": None if U is None else chance(U.shape[1]), "dimension": None if U is None else U.shape[1],
                "explained": update.inside(span(rows[list(pursuit)])), "explained_random": chance(len(pursuit)),
                "features": [{"index": i, "chosen": i in chosen, "named": i in pursuit, "share": float(alone[i]), "random": mean,
                              "random_max": limit, "share_left": pursuit.get(i, (None, None))[0],
                              "left_max": pursuit.get(i, (None, None))[1]} for i in listed]})
        some[layer] = control[:2 * MOST].clone()
    return {"norm": math.sqrt(total), "layers": out}, some


@torch.no_grad()
def probe(adapters: dict[str, lora.LoRALinear], bases: dict[str, torch.Tensor] | None = None) -> dict:
    """{"singular_values": of ΔW, root mean square over modules, "angle": degrees}, from {module name: LoRALinear}, in float64 on the CPU.

    angle: between ΔW's leading r̂ directions in the residual stream and the module's basis U (D, r̂) of `bases`, the mean of
    their principal angles (Björck and Golub 1973), over modules; None without bases, and where no update has r̂ directions.
    """
    squares, angles = torch.zeros(max(layer.rank for layer in adapters.values()), dtype=torch.float64), []
    for name, layer in adapters.items():
        A, B = layer.A.detach().cpu().double(), layer.B.detach().cpu().double()
        mine, other = (B, A.T) if layer.writer else (A.T, B)                         # (D, r), (in or out, r)
        Q, R = torch.linalg.qr(mine)
        left, values, _ = torch.linalg.svd(layer.scale * R @ torch.linalg.qr(other).R.T)
        squares[:len(values)] += values.square()
        U = bases.get(name) if bases else None
        if U is not None and len(values) >= U.shape[1] and values[U.shape[1] - 1] > 1e-9 * values[0]:
            cosines = torch.linalg.svdvals(U.double().cpu().T @ (Q @ left[:, :U.shape[1]]))
            angles.append(cosines.clamp(max=1).acos().mean().rad2deg().item())
    return {"singular_values": (squares / len(adapters)).sqrt().tolist(), "angle": sum(angles) / len(angles) if angles else None}
