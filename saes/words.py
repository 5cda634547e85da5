"""Words for the units of an SAE: where they fire most, and which vocabulary they promote.

The entries of features.json are made here. Letters: T tokens, K units, D hidden size.
"""

import math
from collections.abc import Sequence

import torch

from data import Example, Tokenizer
from model import Gemma2
from run.files import table
from sae import SAE, neuronpedia_url

ANSWERS = ("aligned", "unaligned")
NUM_PEAKS = 5            # strongest examples that are kept of a unit, for each answer
BEFORE, AFTER = 10, 5    # tokens shown around a peak


class Peaks:
    """The NUM_PEAKS examples on which each unit is most active: (2, NUM_PEAKS, K) tensors."""

    def __init__(self, num_units: int, device):
        shape = (2, NUM_PEAKS, num_units)
        self.value = torch.zeros(shape, device=device)
        self.example = torch.full(shape, -1, device=device)
        self.token = torch.zeros(shape, dtype=torch.long, device=device)

    def update(self, answer: int, example: int, activations: torch.Tensor, tokens: torch.Tensor):
        """Take in activations (T, K) of example number `example` at token indices `tokens` (T)."""
        value, position = activations.max(0)
        lowest, slot = self.value[answer].min(0, keepdim=True)
        news = (value, torch.full_like(position, example), tokens[position])
        # The new peak takes the slot of the lowest that is kept, if it is higher
        for peaks, new in zip((self.value, self.example, self.token), news):
            old = peaks[answer].gather(0, slot)
            peaks[answer].scatter_(0, slot, torch.where(value > lowest, new, old))

    def merge(self, gather):
        """Keep the strongest of all processes' peaks; gather(tensor) lists theirs."""
        tensors = (self.value, self.example, self.token)
        value, example, token = (torch.cat(gather(tensor), 1) for tensor in tensors)
        self.value, best = value.topk(NUM_PEAKS, 1)
        self.example, self.token = example.gather(1, best), token.gather(1, best)

    def of(self, unit: int) -> list[tuple[float, str, int, int]]:
        """[(activation, answer, example, token)] of one unit, strongest first."""
        rows = []
        for number, answer in enumerate(ANSWERS):
            columns = (t[number, :, unit].tolist() for t in (self.value, self.example, self.token))
            rows += [(value, answer, example, token) for value, example, token in zip(*columns)]
        return sorted((row for row in rows if row[2] >= 0), key=lambda row: -row[0])[:NUM_PEAKS]


def promoted(model: Gemma2, sae: SAE, tokenizer: Tokenizer, units, most=8,
             directions: torch.Tensor | None = None) -> list[list[str]]:
    """The `most` tokens that each of `units` promotes: the largest logits of its direction.

    The direction is the unit's decoder row unless `directions` (k, D) says otherwise. It passes the
    final norm's gain and the unembedding; normaliser and softcap don't change the order.
    """
    if directions is None:
        directions = sae.directions(units)
    gain = 1 + model.norm.weight.float()
    embedding = model.embed_tokens.weight
    logits = (directions.to(gain.device) * gain).to(embedding.dtype) @ embedding.T     # (k, V)
    best = logits.float().topk(most).indices.tolist()
    return [[tokenizer.token(i) for i in ids] for ids in best]


def in_context(tokenizer: Tokenizer, ids: Sequence[int], token: int) -> dict:
    """{"peak", "tokens"}: tokens around index `token` of `ids`, and its index among them."""
    first = max(0, token - BEFORE)
    shown = ids[first:token + AFTER + 1]
    return {"peak": token - first, "tokens": [tokenizer.token(i) for i in shown]}


def describe_features(model: Gemma2, sae: SAE, tokenizer: Tokenizer, statistics, choices: dict,
                      pairs: Sequence[tuple[Example, Example]], with_scores=True) -> list[dict]:
    """Entries of features.json for one SAE: a dict a chosen feature, strongest score first.

    statistics: its features.Statistics; choices {side: features.Choice}.
    """
    scores, directions = {}, None                       # {feature: {side: score}}
    for side, choice in choices.items():
        for feature, score in zip(choice.features.tolist(), choice.scores.tolist()):
            scores.setdefault(feature, {})[side] = score
    features = sorted(scores, key=lambda feature: -max(map(abs, scores[feature].values())))
    # A block promotes what the difference of its mean codes writes
    if sae.block > 1:
        shift = statistics.shift[features].float().to(sae.W_enc.device)
        directions = torch.einsum("kb,kbd->kd", shift, sae.unit_rows(features))
    vocabulary = promoted(model, sae, tokenizer, features, directions=directions)
    entries = []
    for feature, promotes in zip(features, vocabulary):
        peaks = []
        for activation, answer, number, token in statistics.peaks.of(feature):
            example = pairs[number][ANSWERS.index(answer)]
            peak = {"activation": activation, "side": answer, "line": example.line}
            peaks.append(peak | in_context(tokenizer, example.tokens, token))
        effect = statistics.effect[feature].item()
        entry = {
            "layer": statistics.layer, "index": feature,
            "delta": statistics.delta[feature].item(), "rho": statistics.rho[feature].item(),
            "effect": effect if math.isfinite(effect) else None,
            "mean": dict(zip(ANSWERS, statistics.mean[:, feature].tolist())),
            "frequency": dict(zip(ANSWERS, statistics.frequency[:, feature].tolist())),
            "peaks": peaks, "promotes": promotes,
            "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, feature, sae.l0)}
        if sae.block > 1:
            entry |= {"block": sae.block, "shift": statistics.shift[feature].tolist()}
        if with_scores:
            entry["scores"] = scores[feature]
        entries.append(entry)
    return entries


def features_table(features: list[dict], most=10) -> str:
    """The first `most` entries of a layer, one a line; with "scores", the largest of each."""
    head = ["Δ", "ρ", "Δ/se", "fires safe", "unsafe", "fires most on", "promotes"]
    rows = []
    for entry in features[:most]:
        peaks = dict.fromkeys(peak["tokens"][peak["peak"]].strip() for peak in entry["peaks"])
        effect = "" if entry["effect"] is None else f"{entry['effect']:+.1f}"
        rows.append([f"{entry['delta']:+.3f}", f"{entry['rho']:+.3f}", effect,
                     *(f"{share:.1%}" for share in entry["frequency"].values()), " ".join(peaks),
                     " ".join(word.strip() for word in entry["promotes"][:5])])
    if features and "scores" in features[0]:
        head.insert(0, "score")
        for row, entry in zip(rows, features):
            row.insert(0, f"{max(entry['scores'].values(), key=abs):.3f}")
    unit = "block" if features and "block" in features[0] else "feature"
    rows = [[entry["index"], *row] for entry, row in zip(features, rows)]
    return table(rows, [unit, *head], right=range(len(head) - 1))
