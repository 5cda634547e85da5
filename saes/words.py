"""Words for the units of an SAE: where they fire most, and which vocabulary they promote.

The entries of features.json are made here. Letters: T tokens, K units, D hidden size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data import Example, Tokenizer
from model import Gemma2
from run.files import table
from sae import SAE, neuronpedia_url

ANSWERS = ("aligned", "unaligned")
NUM_PEAKS = 5            # strongest examples that are kept of a unit, for each answer
BEFORE = 10
AFTER = 5    # tokens shown around a peak


class Peaks:
    """The NUM_PEAKS examples on which each unit is most active, for each of two answers.

    tensors (2, NUM_PEAKS, K) each: the activation, the example's number (−1: none), its token.
    """

    def __init__(self, num_units: int, device):
        value = torch.zeros(2, NUM_PEAKS, num_units, device=device)
        token = torch.zeros_like(value, dtype=torch.long)
        self.tensors = [value, token - 1, token]

    def update(self, answer: int, example: int, activations: Tensor, tokens: Tensor):
        """Take in activations (T, K) of example number `example` at token indices `tokens` (T)."""
        value, position = activations.max(0)                                        # (K,)
        lowest, slot = self.tensors[0][answer].min(0, keepdim=True)                 # (1, K)
        # The new peak takes the slot of the lowest that is kept, if it is higher
        is_higher = value > lowest
        news = (value, torch.full_like(position, example), tokens[position])
        for peaks, new in zip(self.tensors, news):
            old = peaks[answer].gather(0, slot)
            peaks[answer].scatter_(0, slot, torch.where(is_higher, new, old))

    def merge(self, gather):
        """Keep the strongest of all processes' peaks; gather(tensor) lists theirs."""
        merged = [torch.cat(gather(tensor), 1) for tensor in self.tensors]
        best = merged[0].topk(NUM_PEAKS, 1).indices
        self.tensors = [tensor.gather(1, best) for tensor in merged]

    def of(self, unit: int) -> list[tuple[float, int, int, int]]:
        """[(activation, answer 0 or 1, example, token)] of one unit, strongest first."""
        rows = []
        for answer in (0, 1):
            columns = [peaks[answer, :, unit].tolist() for peaks in self.tensors]
            for value, example, token in zip(*columns):
                if example >= 0:
                    rows.append((value, answer, example, token))
        rows.sort(key=lambda row: -row[0])
        return rows[:NUM_PEAKS]


def promoted(model: Gemma2, tokenizer: Tokenizer, directions: Tensor, most=8
             ) -> list[list[str]]:
    """The `most` tokens that each direction (k, D) of the residual stream promotes, by its logits.

    It passes the final norm's gain and the unembedding; normaliser and softcap keep the order.
    """
    gain = 1 + model.norm.weight.float()
    embedding = model.embed_tokens.weight
    scaled = directions.to(gain.device) * gain
    logits = scaled.to(embedding.dtype) @ embedding.T                               # (k, V)
    best = logits.float().topk(most).indices.tolist()
    return [[tokenizer.token(i) for i in ids] for ids in best]


def in_context(tokenizer: Tokenizer, ids: Sequence[int], token: int) -> dict:
    """{"peak", "tokens"}: tokens around index `token` of `ids`, and its index among them."""
    first = max(0, token - BEFORE)
    shown = ids[first:token + AFTER + 1]
    return {"peak": token - first, "tokens": [tokenizer.token(i) for i in shown]}


def describe_features(model: Gemma2, sae: SAE, tokenizer: Tokenizer, statistics, choices: dict,
                      pairs: Sequence[tuple[Example, Example]]) -> list[dict]:
    """Entries of features.json for one SAE: a dict a chosen feature, strongest score first.

    statistics: its features.Statistics; choices {side: features.Choice}.
    """
    scores = {}                                         # {unit: {side: score}}
    for side, choice in choices.items():
        for unit, score in zip(choice.features.tolist(), choice.scores.tolist()):
            scores.setdefault(unit, {})[side] = score
    strength = {unit: max(map(abs, sides.values())) for unit, sides in scores.items()}
    units = sorted(scores, key=lambda unit: -strength[unit])
    # A feature promotes what its decoder row writes; a block, what its mean codes differ by
    directions = sae.directions(units)
    if sae.block > 1:
        shift = statistics.shift[units].float().to(sae.W_enc.device)
        directions = torch.einsum("kb,kbd->kd", shift, sae.unit_rows(units))
    rho = statistics.score("rho")                                                   # (K,)
    vocabulary = promoted(model, tokenizer, directions)
    entries = []
    for unit, words in zip(units, vocabulary):
        peaks = []
        for activation, answer, number, token in statistics.peaks.of(unit):
            example = pairs[number][answer]
            peak = {"activation": activation, "side": ANSWERS[answer], "line": example.line}
            peaks.append(peak | in_context(tokenizer, example.tokens, token))
        # JSON has no NaN
        effect = statistics.effect[unit].item()
        entry = {
            "layer": sae.layer,
            "index": unit,
            "scores": scores[unit],
            "delta": statistics.delta[unit].item(),
            "rho": rho[unit].item(),
            "effect": effect if math.isfinite(effect) else None,
            "mean": dict(zip(ANSWERS, statistics.mean[:, unit].tolist())),
            "frequency": dict(zip(ANSWERS, statistics.frequency[:, unit].tolist())),
            "peaks": peaks,
            "promotes": words,
            "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, unit, sae.l0)}
        if sae.block > 1:
            entry |= {"block": sae.block, "shift": statistics.shift[unit].tolist()}
        entries.append(entry)
    return entries


def features_table(entries: list[dict], most=10) -> str:
    """The first `most` entries of a layer, one a line; the score is the largest of both sides."""
    head = ["unit", "score", "Δ", "fires safe", "unsafe", "fires most on", "promotes"]
    rows = []
    for entry in entries[:most]:
        peaks = [peak["tokens"][peak["peak"]].strip() for peak in entry["peaks"]]
        words = [word.strip() for word in entry["promotes"][:5]]
        rows.append([
            entry["index"],
            f"{max(entry['scores'].values(), key=abs):.3f}",
            f"{entry['delta']:+.3f}",
            *(f"{share:.1%}" for share in entry["frequency"].values()),
            " ".join(dict.fromkeys(peaks)),
            " ".join(words)])
    return table(rows, head, right=range(5))
