"""Which features carry what an adapter has learned: named by effect, beside four controls.

What was learned is the gain in log-likelihood of aligned answers to held-out harmful prompts. The
cost of a direction is what of it is lost, in nats an answer, when the direction is taken out of ΔW
on one side of one SAE layer. A feature is named where its cost

    1. is above that of random directions of the same subspace: p is the larger of two, the share of
       NUM_RANDOM random directions that cost as much, and a paired test over prompts; Holm's
       correction over all features that are tested;
    2. is above the cost of the same direction in untrained adapters, also paired: the adapter
       after its first step, and the trained one whose far side is turned at random. That has the
       size of the trained one, and the same share along every direction, but has learned nothing;
    3. is at least MIN_COST. Where the adapter as a whole hasn't gained that much, and more than
       the luck of turned ones, nothing is named.

Letters: P prompts, D hidden size, F features of an SAE, R rows that stand for an update, k a few.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import lora
from data import Example
from report.directions import (inside, main_features, norm2, outside, parts_of, random_directions,
                               random_mixtures, sae_key, span, stream_factor, stream_gain,
                               unit_decoder, update_norm)
from safety.figures import average

NUM_FEATURES = 12   # that are tested, unless --explain says otherwise
NUM_PROMPTS = 24    # of each harmful set
NUM_REMOVED = 6     # random directions of each part that are removed
NUM_TURNED = 3      # turned adapters
T_TURNED = 4.303    # the 97.5 % point of Student's t with NUM_TURNED − 1 degrees of freedom
MIN_SCORE = 1.0     # deviations above random directions to first order, or it isn't tested
MIN_COST = 0.01     # nats an answer: 1 % of its probability
LEVEL = 0.05        # chance that any feature is named which does no more than random directions
BATCH = 32          # prompts
SCALED = "first step, scaled up"    # to the trained adapter's size


# ------------------------------------------------------------------------------
# Log-likelihoods

def likelihood_batches(model, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
    """Log-likelihoods (b,) of the answers of examples, BATCH at a time, in order."""
    device = model.embed_tokens.weight.device
    for start in range(0, len(examples), BATCH):
        batch = examples[start:start + BATCH]
        # Pads stand on the right, so no token sees them
        ids = [torch.tensor(example.tokens) for example in batch]
        tokens = pad_sequence(ids, batch_first=True).to(device)
        hidden, _ = model.hidden(tokens)
        sums = []
        for row, example in enumerate(batch):
            end = len(example.tokens)
            logits = model.unembed(hidden[row, example.start - 1:end - 1])
            answer = tokens[row, example.start:end]
            sums.append(-F.cross_entropy(logits, answer, reduction="sum"))
        yield torch.stack(sums)


@torch.no_grad()
def likelihoods(model, examples) -> torch.Tensor:
    """Log-likelihood of each example's answer in nats, (P,) float64."""
    return torch.cat(list(likelihood_batches(model, examples))).cpu().double()


def first_order(model, examples, sae_layers, norm_aware=False) -> dict:
    """{(SAE layer, side): S (D, D)}: qᵀSq is what taking unit q out of ΔW costs, to first order.

    Without q the factor Z of the stream is Z − Zqqᵀ, so with G the gradient of the mean
    log-likelihood an answer loses (Zq)·(Gq): S = ZᵀG, summed over the modules of a part.
    """
    for batch in likelihood_batches(model, examples):
        (batch.sum() / len(examples)).backward()
    S = {}
    for name, layer in lora.lora_layers(model).items():
        factor = stream_factor(layer)
        gradient = (layer.B if layer.writer else layer.A).grad
        assert gradient is not None
        gradient = gradient.T if layer.writer else gradient
        gain = stream_gain(model, name, norm_aware)
        Z = factor.detach().cpu().double() * gain
        G = gradient.cpu().double() / gain
        key = sae_key(name, sae_layers)
        S[key] = S.get(key, 0) + Z.T @ G
        layer.A.grad = layer.B.grad = None
    return S


def quadratic(rows: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """qᵀSq of rows q (N, D)."""
    return ((rows @ S.to(rows)) * rows).sum(1)


# ------------------------------------------------------------------------------
# Other updates in the place of the trained one

@contextmanager
@torch.no_grad()
def removed(model, directions, sae_layers, norm_aware=False):
    """Within, no update reads or writes the span of rows {(SAE layer, side): (k, D)}.

    Afterwards the factors are what they were, bit for bit. `sae_layers` are those of all SAEs, of
    which each module has its nearest.
    """
    before = []
    try:
        for name, layer in lora.lora_layers(model).items():
            rows = directions.get(sae_key(name, sae_layers))
            if rows is None:
                continue
            factor = stream_factor(layer)                                  # (r, D)
            before.append((factor, factor.clone()))
            # In the residual stream's coordinates: Z (r, D) becomes Z (1 − QQᵀ)
            gain = stream_gain(model, name, norm_aware)
            Q = span(rows.cpu()).double()                                  # (D, k)
            Z = factor.cpu().double() * gain
            factor.copy_((Z - Z @ Q @ Q.T) / gain)
        yield
    finally:
        for factor, value in before:
            factor.copy_(value)


@contextmanager
@torch.no_grad()
def carrying(model, factors):
    """Within, the layers carry other factors {module name: (A, B)} of the same shapes."""
    own = []
    try:
        for name, layer in lora.lora_layers(model).items():
            own.append((layer, layer.A.clone(), layer.B.clone()))
            layer.A.copy_(factors[name][0])
            layer.B.copy_(factors[name][1])
        yield
    finally:
        for layer, A, B in own:
            layer.A.copy_(A)
            layer.B.copy_(B)


@torch.no_grad()
def turned(model, seed: int) -> dict:
    """Factors whose far side is shuffled, each row or column with a random sign.

    That is ΔW times an orthogonal matrix from the side away from the stream: ‖ΔW d‖ stays what it
    is for every d, and what was learned to be done with d is gone.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in lora.lora_layers(model).items():
        size = layer.A.shape[1] if layer.writer else len(layer.B)
        order = torch.randperm(size, generator=generator)
        signs = 2.0 * torch.randint(2, (size,), generator=generator) - 1
        order, signs = order.to(layer.A.device), signs.to(layer.A.device)
        if layer.writer:
            factors[name] = layer.A[:, order] * signs, layer.B.clone()
        else:
            factors[name] = layer.A.clone(), layer.B[order] * signs[:, None]
    return factors


# ------------------------------------------------------------------------------
# Which features are tested

class Part:
    """The update of the modules that one SAE serves on one side, and its features to be tested."""

    def __init__(self, key, Z, S, decoder, subspace):
        self.layer, self.side = self.key = key
        self.Z = Z
        self.S = S
        self.decoder = decoder
        # Of the subspace that the adapter was given; else wherever decoder rows are
        self.randoms = (random_directions(decoder) if subspace is None
                        else random_mixtures(subspace.T.to(decoder)))
        self.expected = quadratic(self.randoms, S)                         # (NUM_RANDOM,)
        self.features: list[int] = []
        self.rows = decoder[:0]                                            # (k, D), of these
        # What the update is mostly made of stands first: other features are what lies outside it
        self.basis = decoder[:0]
        for feature in main_features(Z, decoder):
            self.add(feature, self.scores()[feature] > MIN_SCORE)

    def scores(self) -> torch.Tensor:
        """(F,) first-order costs of features above random directions' mean, in their deviations.

        A feature counts as far as its direction lies outside those above it.
        """
        rows = outside(self.decoder, span(self.basis))
        return (quadratic(rows, self.S) - self.expected.mean()) / self.expected.std()

    def add(self, feature: int, is_tested=True):
        row = outside(self.decoder[[feature]], span(self.basis))
        self.basis = torch.cat((self.basis, row))
        if is_tested:
            self.features.append(feature)
            self.rows = torch.cat((self.rows, row))


def tested_parts(model, examples, saes, subspaces, norm_aware, most) -> list[Part]:
    """Parts with `most` features in all: the main ones by share, then the strongest to first order.

    A feature stands for the part of its direction outside those above it on its side: costs add up.
    """
    S = first_order(model, examples, saes, norm_aware)
    decoders = {layer: unit_decoder(sae) for layer, sae in saes.items()}
    parts = [Part(key, Z, S[key], decoders[key[0]], subspaces and subspaces[key])
             for key, Z in parts_of(model, saes, norm_aware).items()]
    for part in parts:
        del part.features[most:]
        part.rows = part.rows[:most]
    scores = {part.key: part.scores() for part in parts}
    while sum(len(part.features) for part in parts) < most:
        part = max(parts, key=lambda part: float(scores[part.key].max()))
        # Nothing is left that costs more than random directions
        if scores[part.key].max() <= MIN_SCORE:
            break
        part.add(int(scores[part.key].argmax()))
        scores[part.key] = part.scores()
    return parts


# ------------------------------------------------------------------------------
# Names

def tail(values: torch.Tensor) -> float:
    """One-sided p of a mean above 0, by the normal distribution, over prompts."""
    error = values.std() / len(values) ** 0.5
    if not error > 0:
        return float(values.mean() <= 0)
    return 1 - NormalDist().cdf(float(values.mean() / error))


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses fall, with a chance of `level` that any falls wrongly (Holm 1979)."""
    falls = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        falls[i] = True
    return falls


def named_by_effect(model, examples, saes, subspaces=None, norm_aware=False, first_step=None,
                    most=NUM_FEATURES) -> dict:
    """explain.json's "learned" and "features": what was gained, and the features that carry it;
    beside them the features' "directions" (D,), each as far as it was taken out.

    examples: aligned answers to held-out prompts. subspaces {(layer, side): U (D, r̂)} as selection
    left them. first_step: factors {module name: (A, B)} after the first step, where they are known.
    One batched pass a feature, and NUM_REMOVED more for each part that has one.
    """
    def cost_of(part, direction):
        """Of taking a direction (D,) out of the update as it is at the time, (P,)."""
        with removed(model, {part.key: direction[None]}, saes, norm_aware):
            return likelihoods(model, examples)

    with lora.scaled(model, 0):
        base = likelihoods(model, examples)
    trained = likelihoods(model, examples)

    # Untrained adapters: how much likelier each makes the answers, and later what features cost
    controls = {}
    gains = {}
    learned: dict = {"prompts": len(examples), "gain": average((trained - base).tolist()),
                     "untrained": {}}

    def add_control(name, factors, factor=1.0):
        controls[name] = factors, factor
        with carrying(model, factors), lora.scaled(model, factor):
            gains[name] = likelihoods(model, examples)
        learned["untrained"][name] = average((gains[name] - base).tolist())

    rest = trained - base
    if first_step:
        add_control("first step", first_step)
        rest = trained - gains["first step"]
    learned["something"] = tail(rest) < LEVEL / 2 and float(rest.mean()) >= MIN_COST
    if not learned["something"]:
        return {"learned": learned, "features": [], "directions": []}
    if first_step:
        with carrying(model, first_step):
            small = update_norm(model)
        add_control(SCALED, first_step, update_norm(model) / small)
    for seed in range(NUM_TURNED):
        add_control(f"turned {seed}", turned(model, seed))
    # Some turned adapters help by luck: the trained one must be no draw of theirs (Student's t)
    luck = torch.stack([gains[f"turned {seed}"].mean() for seed in range(NUM_TURNED)])
    limit = luck.mean() + T_TURNED * luck.std() * (1 + 1 / NUM_TURNED) ** 0.5
    learned["something"] = bool(trained.mean() > limit)
    if not learned["something"]:
        return {"learned": learned, "features": [], "directions": []}

    # Costs of features, beside those of random directions
    parts = tested_parts(model, examples, saes, subspaces, norm_aware, most)
    sizes = {part.key: norm2(part.Z) for part in parts}
    tested = []
    for part in tqdm(parts, "testing features", leave=False, disable=None):
        if not part.features:
            continue
        randoms = torch.stack([trained - cost_of(part, row) for row in part.randoms[:NUM_REMOVED]])
        means = randoms.mean(1)                                            # (NUM_REMOVED,)
        # Random directions' costs to first order, on the scale of those that were removed
        scale = means.abs().sum() / part.expected[:NUM_REMOVED].abs().sum()
        chance = scale * part.expected.abs().double()
        for feature, row in zip(part.features, part.rows):
            cost = trained - cost_of(part, row)
            as_large = int((chance >= cost.mean()).sum())
            p_direction = (1 + as_large) / (1 + len(chance))
            entry = {
                "layer": part.layer, "side": part.side, "index": feature,
                "share": inside(part.Z, row[:, None].double()),
                "share_of_update": sizes[part.key] / sum(sizes.values()),
                "cost": average(cost.tolist()),
                "random": {"mean": float(means.mean()), "most": float(means.max())},
                "p": max(p_direction, tail(cost - randoms.mean(0))), "untrained": {}}
            tested.append((entry, part, row, cost))
    falls = holm([entry["p"] for entry, *_ in tested], LEVEL)
    for (entry, *_), fell in zip(tested, falls):
        entry["named"] = fell and entry["cost"]["mean"] >= MIN_COST

    # The same directions in untrained adapters
    left = [row for row in tested if row[0]["named"]]
    others: dict[str, list] = {name: [] for name in controls}
    for name, (factors, factor) in controls.items():
        with carrying(model, factors), lora.scaled(model, factor):
            others[name] = [gains[name] - cost_of(part, row) for _, part, row, _ in left]
    for i, (entry, _, _, cost) in enumerate(left):
        entry["untrained"] = {name: float(others[name][i].mean()) for name in controls}
        # Scaled up, the first step has learned: it refuses, and is no control
        means = [entry["untrained"][name] for name in controls if name != SCALED]
        entry["named"] = float(cost.mean()) > max(means)
        turns = torch.stack([others[f"turned {seed}"][i] for seed in range(NUM_TURNED)])
        first = [others["first step"][i]] if first_step else []
        for other in (turns.mean(0), *first):
            entry["named"] &= tail(cost - other) < LEVEL / 2
    return {"learned": learned, "features": [entry for entry, *_ in tested],
            "directions": [row for _, _, row, _ in tested]}
