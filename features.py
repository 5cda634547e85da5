"""The method of SAILS (arXiv 2512.23260, section 3): which SAE features tell a safe answer from an unsafe one, and
the subspace that their decoder directions span.

    statistics = feature_statistics(model, saes, pairs)      # stream the pairs through model and SAEs
    chosen = choose_features(statistics[layer], top_k=20)    # largest |Δ|, Δ = E_aligned[a] − E_unaligned[a]
    space = subspace(sae.decoder_rows(chosen), tau=0.8, rank=16)

Scoring, choosing and spanning are separate, so that each can be exchanged alone. `python select.py` is the command.
Of a SASA, whose features are subspaces, a block of b signed features is scored, chosen and named as one: Δ is then the
length of its mean code's difference, and it brings into the span those directions of its rows that carry the difference.
Letters: D hidden size, F features of an SAE in K units (b = 1: K = F), P pairs, r rank.
"""

import math
import random
import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import contrast
from run import parallel
from run import settings as recipe
from model import Config
from data import Example, Prompt, Tokenizer, load_examples, load_tokenizer
from data import read_prompts
from run.files import (InputError, Parser, data_file, hash_of, is_new, read_json, read_metadata, read_tensors, sweep, tensor_shapes, write_json,
                   write_tensors)
from model import Gemma2, load_model
import sae as sae_module
from sae import SAE, neuronpedia_url
from run.session import Lock, run_folder
from run.files import table

SIDES = ("aligned", "unaligned")
MODULES = {"readers": ("q_proj", "k_proj", "v_proj"), "writers": ("o_proj",)}
CONTEXT = 10, 5        # tokens shown before and after a feature's peak
PEAKS = 5              # examples kept for each feature and side


# ---------------------------------------------------------------------------------------------------------------
# Statistics

@dataclass
class Statistics:
    """What one SAE's units do on the two sides of the pairs; every array (K,), float64, rows in the order of SIDES."""
    layer: int
    pairs: int
    tokens: torch.Tensor            # (2,) tokens seen
    mean: torch.Tensor              # (2, K) mean activation over tokens; of a block, the length of its mean code
    frequency: torch.Tensor         # (2, K) share of tokens on which the unit fires
    delta: torch.Tensor             # (K,) Δ, mean aligned minus mean unaligned; of a block, the length of that difference
    error: torch.Tensor             # (K,) standard error of Δ over pairs; NaN where there is one pair only
    peaks: "Peaks"                  # where each unit fires most
    shift: torch.Tensor             # (K, b) difference of the mean codes
    covariance: torch.Tensor        # (K, b, b) of `shift` over pairs: P times that is what single pairs differ by

    @property
    def rho(self) -> torch.Tensor:
        """Δ over the largest mean on the unaligned side: the paper's relative score. Orders features as Δ does."""
        return self.delta / self.mean[1].abs().max().clamp(min=1e-30)

    @property
    def effect(self) -> torch.Tensor:
        """Δ in its standard errors; NaN where there is no error to speak of."""
        return torch.where(self.error > 1e-12 * self.delta.abs().max(), self.delta / self.error, torch.nan)

    @property
    def variance(self) -> torch.Tensor:
        """(K,) of the difference over pairs, summed over a block's features."""
        return self.pairs * self.covariance.diagonal(dim1=1, dim2=2).sum(1)


class Peaks:
    """The PEAKS examples on which each feature is most active: activation, example and token, each (PEAKS, F) a side."""

    def __init__(self, features, device):
        self.value = torch.zeros(2, PEAKS, features, device=device)
        self.example = torch.full((2, PEAKS, features), -1, device=device)
        self.token = torch.zeros(2, PEAKS, features, dtype=torch.long, device=device)

    def update(self, side, example, activations, tokens):
        """Take in one example's activations (T, F) at token indices `tokens` (T,)."""
        value, where = activations.max(0)
        lowest, slot = self.value[side].min(0)
        better = value > lowest
        for held, new in ((self.value, value), (self.example, torch.full_like(where, example)), (self.token, tokens[where])):
            held[side].scatter_(0, slot[None], torch.where(better, new, held[side].gather(0, slot[None])[0])[None])

    def merge(self):
        """Take in the peaks of all processes."""
        value, example, token = (torch.cat(parts, 1) for parts in map(parallel.gather_tensors, (self.value, self.example, self.token)))
        self.value, best = value.topk(PEAKS, 1)
        self.example, self.token = example.gather(1, best), token.gather(1, best)

    def of(self, feature):
        """[(activation, side, example, token)] of one feature, strongest first."""
        rows = [(self.value[s, i, feature].item(), SIDES[s], self.example[s, i, feature].item(),
                 self.token[s, i, feature].item()) for s in range(2) for i in range(PEAKS)]
        return sorted((row for row in rows if row[2] >= 0), key=lambda row: -row[0])[:PEAKS]


class Sums:
    """Streamed sums of one SAE, float64. For a pair let z = (s_a, n_a, s_u, n_u), a unit's summed codes (b numbers) and
    the token count on each side; keeping Σ z and Σ z zᵀ is enough for Δ = Σs_a/Σn_a − Σs_u/Σn_u and for its error.
    """

    def __init__(self, units, block, device):
        self.block, size = block, 2 * block + 2
        self.z = torch.zeros(units, size, dtype=torch.float64, device=device)
        self.zz = torch.zeros(units, size, size, dtype=torch.float64, device=device)
        self.fired = torch.zeros(2, units, dtype=torch.float64, device=device)
        self.peaks, self.pairs = Peaks(units, device), 0

    def add(self, z):
        self.z += z
        self.zz += z[:, :, None] * z[:, None]
        self.pairs += 1

    def merge(self):
        """Add up what all processes have streamed."""
        if parallel.world_size() > 1:
            pairs = torch.tensor(self.pairs)
            parallel.sum_tensors(self.z, self.zz, self.fired, pairs)
            self.pairs = int(pairs)
            self.peaks.merge()
        return self

    def statistics(self, layer):
        b, (units, size) = self.block, self.z.shape
        tokens, total = self.z[0, [b, -1]], torch.stack((self.z[:, :b], self.z[:, b + 1:-1]))      # (2,), (2, K, b)
        mean = total / tokens[:, None, None]
        # Linearised around the means, pair p moves Δ by d_p = C·z_p with C below; Σ d_p = 0, Cov Δ = P/(P−1) Σ d_p d_pᵀ.
        C, each = self.z.new_zeros(units, b, size), torch.arange(b)
        C[:, each, each], C[:, each, b] = 1 / tokens[0], -mean[0] / tokens[0]
        C[:, each, b + 1 + each], C[:, each, -1] = -1 / tokens[1], mean[1] / tokens[1]
        covariance = C @ self.zz @ C.mT * (self.pairs / (self.pairs - 1) if self.pairs > 1 else torch.nan)
        shift = mean[0] - mean[1]                                                    # (K, b)
        if b == 1:
            mean, delta, error = mean[..., 0], shift[:, 0], covariance[:, 0, 0].clamp(min=0).sqrt()
        else:
            mean, delta, along = mean.norm(dim=2), shift.norm(dim=1), torch.nn.functional.normalize(shift, dim=1)
            error = torch.einsum("ki,kij,kj->k", along, covariance, along).clamp(min=0).sqrt()
        return Statistics(layer, self.pairs, tokens, mean, self.fired / tokens[:, None], delta, error, self.peaks, shift, covariance)


@torch.no_grad()
def feature_statistics(model: Gemma2, saes: dict[int, SAE], pairs: Sequence[tuple[Example, Example]], control: Collection[int] = (),
                       tokens="response", batch_tokens=4096) -> dict[int, Statistics]:
    """Stream pairs through the model, once, and the SAEs of all layers. {layer: Statistics}.

    saes {layer: sae}; pairs [(aligned Example, unaligned Example)]; `control` are the ids that never count (BOS, turn
    markers). tokens: "response", or "all" to count the prompt too. Memory doesn't grow with the number of pairs: the
    forward stops at the deepest SAE, and one example's activations are summed before the next one's are made.
    Of many processes each takes every so-many-th batch, and all get the same statistics.
    Raises InputError if no pair has a token to count on both sides.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    sums = {layer: Sums(saes[layer].n_units, saes[layer].block, device) for layer in layers}
    control = torch.tensor(sorted(control), dtype=torch.long)
    counted = []                                                                     # pairs with tokens on both sides
    for number, pair in enumerate(pairs):
        places = [_counted(example, control, tokens) for example in pair]
        if all(len(place) for place in places):
            counted.append((number, pair, places))
    if not counted:
        raise InputError("no pair has a response token on both sides")
    counted.sort(key=lambda item: -max(len(example.tokens) for example in item[1]))  # long ones first, little padding
    batches = []
    while counted:
        longest = max(len(example.tokens) for example in counted[0][1])
        size = max(1, batch_tokens // (2 * longest))
        batches.append((longest, counted[:size]))
        counted = counted[size:]
    if parallel.is_sharded(model):                                                      # as many forwards for each process
        batches += [(1, [])] * (-len(batches) % parallel.world_size())
    batches = parallel.own_share(batches)
    progress = tqdm(total=sum(len(batch) for _, batch in batches), desc="selecting", unit="pair", leave=False, delay=1, disable=None)
    for longest, batch in batches:
        ids = torch.zeros(max(1, 2 * len(batch)), longest, dtype=torch.long)         # pads on the right: never seen
        for row, example in zip(ids, (example for _, pair, _ in batch for example in pair)):
            row[:len(example.tokens)] = torch.tensor(example.tokens)
        _, residuals = model.hidden(ids.to(device), capture=layers, stop_after=layers[-1])
        for layer in layers:
            sae, running = saes[layer], sums[layer]
            for i, (number, _, places) in enumerate(batch):
                z = torch.empty_like(running.z)
                for side, place in enumerate(places):
                    place, first = place.to(device), side * (sae.block + 1)
                    codes = sae.encode(residuals[layer][2 * i + side, place])        # (T, F)
                    a = sae.activations(codes)                                       # (T, K)
                    z[:, first:first + sae.block] = codes.sum(0, dtype=torch.float64).unflatten(0, (-1, sae.block))
                    z[:, first + sae.block] = len(place)
                    running.fired[side] += (a > 0).sum(0)
                    running.peaks.update(side, number, a, place)
                running.add(z)
        progress.update(len(batch))
    progress.close()
    return {layer: sums[layer].merge().statistics(layer) for layer in layers}


def _counted(example, control, tokens):
    """Indices of the tokens of an example that count: not control ids, and of the response unless `tokens` is "all"."""
    ids = torch.tensor(example.tokens)
    place = (~torch.isin(ids, control)).nonzero()[:, 0]
    return place if tokens == "all" else place[place >= example.start]


# ---------------------------------------------------------------------------------------------------------------
# Choice and subspace

def choose_features(statistics: Statistics, top_k: int, select="paper") -> torch.Tensor:
    """Indices (k,) of the units with the largest |Δ| (select "paper") or variance of the difference over pairs
    ("variance"), strongest first; ones that never differ are left out."""
    strength = statistics.delta.abs() if select == "paper" else statistics.variance.nan_to_num()
    if not 1 <= top_k <= len(strength):
        raise InputError(f"--top-k {top_k}: this SAE has {len(strength)} features; give 1 to {len(strength)}")
    order = strength.sort(descending=True, stable=True).indices[:top_k]
    return order[strength[order] > 0].cpu()


def spanning_rows(sae: SAE, statistics: Statistics, chosen: torch.Tensor, tau: float) -> torch.Tensor:
    """Directions (m, D) that the chosen units bring into the span: of a feature its decoder row; of a block, the fewest
    orthonormal ones inside the span of its rows that carry a share `tau` of the difference.

    A pair's difference of codes d writes d·D_k. Over pairs d has second moment M = ΔΔᵀ + Cov; the directions are the leading
    right singular vectors of M^½·D_k, and their squared singular values are the shares.
    """
    if sae.block == 1:
        return sae.decoder_rows(chosen)
    shift, covariance = statistics.shift[chosen].cpu(), statistics.covariance[chosen].cpu()
    moment = shift[:, :, None] * shift[:, None] + (statistics.pairs * covariance).nan_to_num()
    values, V = torch.linalg.eigh(moment)
    rows = (V * values.clamp(min=0).sqrt()[:, None]).mT @ sae.unit_rows(chosen).double().cpu()     # (k, b, D)
    _, size, directions = torch.linalg.svd(rows, full_matrices=False)
    share = size.square().cumsum(1) / size.square().sum(1, keepdim=True).clamp(min=1e-300)
    kept = (share < tau - 1e-12).sum(1) + 1
    return torch.cat([one[:count] for one, count in zip(directions, kept)]).float() if len(kept) else rows.flatten(0, 1).float()


@dataclass
class Subspace:
    U: torch.Tensor          # (D, r̂) orthonormal columns, float32
    explained: float         # their share of the squared singular values
    limit: str               # what set r̂: "tau", or "rank" where tau would have asked for more


def subspace(rows: torch.Tensor, tau: float, rank: int) -> Subspace:
    """The span of decoder rows (k, D) by PCA without centring: the leading right singular vectors of the unit rows up
    to a share `tau` of the squared singular values, at most `rank` of them. (The paper's QR after it changes nothing.)
    """
    if not 0 < tau <= 1:
        raise InputError(f"--tau {tau}: a share of variance, above 0 and at most 1")
    if len(rows) == 0:
        raise InputError("no feature differs between the two sides: nothing to span a subspace")
    _, values, directions = torch.linalg.svd(torch.nn.functional.normalize(rows.double(), dim=1), full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum()
    wanted = int((share < tau - 1e-12).sum()) + 1
    kept = min(wanted, rank, int((values > 1e-9 * values[0]).sum()))
    return Subspace(directions[:kept].T.float().contiguous(), share[kept - 1].item(), "tau" if kept == wanted else "rank")


def serving_layer(block: int, writer: bool, layers: Collection[int]) -> int:
    """The SAE layer that serves a module of `block`: readers see the residual after the block before, the writer makes
    the one after its own; the nearest SAE, the lower one on a tie."""
    return min(sorted(layers), key=lambda layer: abs(layer - (block if writer else block - 1)))


def space_of(spaces: dict, layer: int, side: str, block: int | None = None):
    """What `spaces` hold for modules: by SAE layer, by (layer, side), or by (layer, side, block); None where nothing."""
    return next((spaces[key] for key in (layer, (layer, side), (layer, side, block)) if key in spaces), None)


def module_bases(model: Gemma2, spaces: dict, norm_aware=False) -> tuple[dict[str, torch.Tensor], int]:
    """{module name: U (D, r̂)} for q, k, v and o of every block, from {layer: U}, or one U for each side of a layer
    (`space_of`); and how many gains were clamped.

    With `norm_aware`: q, k, v see x/rms(x)·(1 + w), so what reads direction u of the residual itself is u/(1 + w); o's
    output passes the post-attention norm, so what writes u is u/(1 + w_post). Each is made orthonormal again by QR.
    """
    bases, clamped = {}, 0
    layers = {key[0] if isinstance(key, tuple) else key for key in spaces}
    for number, block in enumerate(model.layers):
        for side, names in MODULES.items():
            writer = side == "writers"
            U = space_of(spaces, serving_layer(number, writer, layers), side, number)
            if norm_aware:
                gain, small = norm_gain(block, writer)
                clamped += small
                U = torch.linalg.qr((U / gain[:, None]).double()).Q.float()
            bases |= {f"layers.{number}.self_attn.{name}": U for name in names}
    return bases, clamped


def norm_gain(block, writer: bool, mlp=False) -> tuple[torch.Tensor, int]:
    """1 + w (D), float32, of the norm between a block's residual stream and its q, k, v or, of a `writer`, after its o (of its
    `mlp`: before gate and up, after down); no closer to 0 than 0.01; and how many would have been."""
    if mlp:
        norm = block.post_feedforward_layernorm if writer else block.pre_feedforward_layernorm
    else:
        norm = block.post_attention_layernorm if writer else block.input_layernorm
    gain = 1 + norm.weight.float().cpu()
    small = gain.abs() < 0.01
    return torch.where(small, torch.where(gain < 0, -0.01, 0.01), gain), int(small.sum())


def gradient_moments(model, gradients, layers, norm_aware=False, by_block=False):
    """{(SAE layer, side): GᵀG (D, D)}, float64, summed over the modules of that side which the layer serves; with `by_block`
    one for each block, by (layer, side, block). gradients {module: (out, in)} as contrast.contrast_gradients makes them.

    With `norm_aware` in the residual stream's coordinates: what direction u of it is worth there, a module sees along u/gain.
    """
    moments = {}
    for number, block in enumerate(model.layers):
        for side, names in MODULES.items():
            writer = side == "writers"
            key = (serving_layer(number, writer, layers), side, *[number] * by_block)
            for name in names:
                G = gradients[f"layers.{number}.self_attn.{name}"].to(model.embed_tokens.weight.device)   # out of its file, if in one
                moment = contrast.gram([G.T if writer else G])
                if norm_aware:
                    gain = norm_gain(block, writer)[0].to(moment)
                    moment = moment / gain / gain[:, None]
                moments[key] = moments.get(key, 0) + moment
    return moments


# ---------------------------------------------------------------------------------------------------------------
# Words for features

def describe_features(model, sae, tokenizer, statistics, chosen, pairs):
    """One JSON-able dict a chosen feature: figures, top activating tokens in context, promoted vocabulary, address."""
    # A block promotes what the difference of its mean codes writes
    directions = None
    if sae.block > 1:
        shift = statistics.shift[chosen].float().to(sae.W_enc.device)
        directions = torch.einsum("kb,kbd->kd", shift, sae.unit_rows(chosen))
    out = []
    for feature, words in zip(chosen.tolist(), promoted(model, sae, tokenizer, chosen, directions=directions)):
        peaks, effect = [], statistics.effect[feature].item()
        for value, side, number, token in statistics.peaks.of(feature):
            example = pairs[number][SIDES.index(side)]
            peaks.append({"activation": value, "side": side, "line": example.line, **in_context(tokenizer, example.tokens, token)})
        out.append({
            "layer": statistics.layer, "index": feature, "delta": statistics.delta[feature].item(),
            "rho": statistics.rho[feature].item(), "effect": effect if math.isfinite(effect) else None,
            "mean": dict(zip(SIDES, statistics.mean[:, feature].tolist())),
            "frequency": dict(zip(SIDES, statistics.frequency[:, feature].tolist())), "peaks": peaks,
            "promotes": words,
            "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, feature, sae.l0)}
            | ({"block": sae.block, "shift": statistics.shift[feature].tolist()} if sae.block > 1 else {}))
    return out


def promoted(model: Gemma2, sae: SAE, tokenizer: Tokenizer, features, most=8, directions: torch.Tensor | None = None) -> list[list[str]]:
    """The vocabulary that each of `features` promotes, lists of `most` strings: the largest logits of its decoder direction
    (or of `directions` (k, D)) through the final norm's gain and the unembedding, normaliser and softcap left out (neither
    changes the order)."""
    gain = 1 + model.norm.weight.float()
    directions = (sae.directions(features) if directions is None else directions).to(gain.device) * gain
    embedding = model.embed_tokens.weight
    best = (directions.to(embedding.dtype) @ embedding.T).float().topk(most).indices.tolist()    # (k, most)
    return [[tokenizer.token(i) for i in words] for words in best]


def in_context(tokenizer: Tokenizer, ids: Sequence[int], token: int) -> dict:
    """{"tokens": those around index `token` of `ids` as text, "peak": its index among them}."""
    first = max(0, token - CONTEXT[0])
    return {"peak": token - first, "tokens": [tokenizer.token(i) for i in ids[first:token + CONTEXT[1] + 1]]}


def features_table(features: list[dict], most=10) -> str:
    """The strongest features of a layer, one a line."""
    # By what they were chosen, where it isn't Δ: the largest, over readers and writers
    scores = [[f"{max(f['scores'].values(), key=abs):.3f}"] if "scores" in f else [] for f in features]
    rows = [[f["index"], *score, f"{f['delta']:+.3f}", f"{f['rho']:+.3f}", None if f["effect"] is None else f"{f['effect']:+.1f}",
             f"{f['frequency']['aligned']:.1%}", f"{f['frequency']['unaligned']:.1%}",
             " ".join(dict.fromkeys(p["tokens"][p["peak"]].strip() for p in f["peaks"])),
             " ".join(word.strip() for word in f["promotes"][:5])] for f, score in zip(features[:most], scores)]
    head = ["block" if features and "block" in features[0] else "feature", *["score"] * bool(scores and scores[0]),
            "Δ", "ρ", "Δ/se", "fires safe", "unsafe", "fires most on", "promotes"]
    return table(rows, head, right=range(len(head) - 2))


def choose_by_loss(model, saes, tokenizer, pairs, top_k, rank, batch_tokens, select, norm_aware=False, harmless=(), format="chat"):
    """{(SAE layer, side) or SAE layer: contrast.Choice} of the selections that look at the loss or at the decision token.

    gradient: for each SAE layer the readers that it serves, all together, have a choice and a basis of their own, and so have
    the writers. decision and attribution: one for both. harmless: the data.Prompts that `decision` needs, `format` the pairs'.
    """
    def rows(layer, moment=None):
        sae = saes[layer]
        if sae.block == 1 or moment is None:
            return torch.nn.functional.normalize(sae.directions(range(sae.n_units)), dim=1)
        return contrast.candidates(sae.unit_rows(range(sae.n_units)), moment)

    if select == "gradient":
        with tempfile.TemporaryDirectory() as folder:
            gradients = contrast.contrast_gradients(model, pairs, batch_tokens, None if contrast.fits(model) else folder)
            moments = gradient_moments(model, gradients, saes, norm_aware)
        choices = {key: contrast.greedy(rows(key[0], moment), moment, top_k, rank) for key, moment in moments.items()}
        for number, choice in enumerate(choices.values()):
            choice.U = contrast.rotated(choice.U, number)
        return choices
    if select == "attribution":
        found = contrast.attribution(model, saes, pairs, tokenizer.control, batch_tokens)
    else:
        found = contrast.decision(model, saes, *contrast.decision_prompts(tokenizer, pairs, harmless, format))
    return {layer: contrast.weighted(rows(layer), weight, top_k, rank) for layer, weight in sorted(found.items())}


def select_by_loss(model, saes, tokenizer, statistics, pairs, choices):
    """({key: Subspace}, [feature dicts]) of `choose_by_loss`'s choices, tables printed. A feature is named once, with a score
    for each side that chose it: its share of ‖G‖² for "gradient", else the difference that it was weighted by."""
    features = []
    for layer, sae in sorted(saes.items()):
        scores = {}
        for key, choice in choices.items():
            at, side = key if isinstance(key, tuple) else (key, "all")
            if at != layer:
                continue
            print(f"layer {layer}, {side}: {len(choice.chosen)} {sae.noun} span r̂ = {choice.U.shape[1]} directions, which hold "
                  f"{choice.explained:.1%} of {'the gradient' if isinstance(key, tuple) else 'their squared singular values'}")
            for feature, value in zip(choice.chosen.tolist(), choice.scores.tolist()):
                scores.setdefault(feature, {})[side] = value
        order = sorted(scores, key=lambda feature: -max(map(abs, scores[feature].values())))
        found = describe_features(model, sae, tokenizer, statistics[layer], torch.tensor(order, dtype=torch.long), pairs)
        features += [feature | {"scores": scores[feature["index"]]} for feature in found]
        print(f"{features_table(found)}\n")
    return {key: Subspace(choice.U, choice.explained, "rank") for key, choice in choices.items()}, features


def select_features(model: Gemma2, saes: dict[int, SAE], tokenizer: Tokenizer, pairs: Sequence[tuple[Example, Example]], top_k: int,
                    tau: float, rank: int, tokens="response", batch_tokens=4096, select="paper", norm_aware=False,
                    harmless: Sequence[Prompt] = (), format="chat") -> tuple[dict, list[dict]]:
    """The whole of a selection, its tables printed. pairs of Examples -> ({key: Subspace}, [feature dicts]), keys as
    `space_of` knows them."""
    statistics = feature_statistics(model, saes, pairs, tokenizer.control, tokens, batch_tokens)
    if select in recipe.BY_LOSS:
        choices = choose_by_loss(model, saes, tokenizer, pairs, top_k, rank, batch_tokens, select, norm_aware, harmless, format)
        return select_by_loss(model, saes, tokenizer, statistics, pairs, choices)
    spaces, features = {}, []
    for layer, sae in sorted(saes.items()):
        chosen = choose_features(statistics[layer], top_k, select)
        spaces[layer] = subspace(spanning_rows(sae, statistics[layer], chosen, tau), tau, rank)
        found = describe_features(model, sae, tokenizer, statistics[layer], chosen, pairs)
        space = spaces[layer]
        print(f"layer {layer}: {len(chosen)} {sae.noun} span r̂ = {space.U.shape[1]} directions, which hold {space.explained:.1%} "
              f"of their squared singular values; {space.limit} decided\n{features_table(found)}\n")
        features += found
    return spaces, features


def save_selection(folder: str | Path, spaces: dict, features: list[dict]) -> None:
    """features.json, and subspace.safetensors with a tensor layer_N (D, r̂) an SAE layer, or layer_N.readers and
    layer_N.writers: the last to be written."""
    write_json(f"{folder}/features.json", features)
    names = {key: ".".join(map(str, key)) if isinstance(key, tuple) else key for key in spaces}
    write_tensors(f"{folder}/subspace.safetensors", {f"layer_{names[key]}": space.U for key, space in spaces.items()},
                  {"features.json": hash_of(f"{folder}/features.json")})


def load_subspaces(path: str | Path) -> dict:
    """{layer or (layer, side): U (D, r̂)} of a subspace.safetensors. Raises InputError, also where the features.json beside it
    isn't the one that was written with it."""
    keys = {name: key for name in tensor_shapes(path) if (key := re.fullmatch(r"layer_(\d{1,4})(?:\.(readers|writers))?", name))}
    tensors, said = read_tensors(path), read_metadata(path).get("features.json")
    if not tensors or keys.keys() != tensors.keys() or not all(U.dim() == 2 and U.isfinite().all() for U in tensors.values()):
        raise InputError(f"{path} is not the subspaces of a selection: take the file away to select anew")
    features = Path(path).with_name("features.json")
    if said and (not features.is_file() or hash_of(features) != said):
        raise InputError(f"{features} is not what the selection wrote: take {path} away to select anew")
    return {(int(key[1]), key[2]) if key[2] else int(key[1]): tensors[name] for name, key in keys.items()}


# ---------------------------------------------------------------------------------------------------------------
# The command

def load_saes(settings, config: Config) -> dict[int, SAE]:  # alias until the rooms meet
    saes = sae_module.load_saes(settings.sae, settings.layers, settings.width, settings.l0, settings.device, config)
    for sae in saes.values():
        if settings.top_k > sae.n_units:
            raise InputError(f"--top-k {settings.top_k}: the SAE of layer {sae.layer} has {sae.n_units} {sae.noun}")
    return saes


def harmless_prompts(settings) -> list[Prompt]:
    """The prompts of --harmless, which `--select decision` needs; none without it."""
    if settings.select == "decision" and not settings.harmless:
        raise InputError("--select decision holds the pairs' prompts against harmless ones: give --harmless FILE")
    return read_prompts(data_file(settings.harmless))[0] if settings.harmless else []


def sample_pairs(settings, examples: list) -> list:
    """The --pairs that selection looks at."""
    few = 0 < settings.pairs < len(examples)
    return random.Random(settings.seed).sample(examples, settings.pairs) if few else examples


SELECT = """Choose the SAE features that tell safe answers from unsafe ones, and span the safety subspace.

    python select.py                                                     # the built-in toy
    python select.py --model google/gemma-2-2b --top-k 20 --tau 0.8      # needs Gemma's licence
    python select.py --model DIR --sae DIR --layers 5 10 --data pairs.jsonl

Prints the strongest features of each layer and writes features.json and subspace.safetensors. train.py does the same
on its way; this is for looking."""


def check_unfinished(out, settings):
    """Raise InputError where the folder `out` holds anything but an unfinished selection of these settings."""
    config = out / "config.json"
    if not is_new(out) and ((out / "subspace.safetensors").exists() or not config.is_file()
                            or read_json(config).get("settings") != vars(settings)):
        raise InputError(f"{out} is there and isn't empty: give another --out")


def begin(out, settings, source):
    check_unfinished(out, settings)                             # nobody has been faster?
    sweep(out)
    write_json(out / "config.json", {"settings": vars(settings), "source": source})


def main():
    parser = Parser(SELECT)
    recipe.add_flags(parser)
    parser.add_argument("--out")
    args = parser.parse_args()
    settings, source = recipe.resolve(args)
    with parallel.agreed():
        if args.out:
            check_unfinished(Path(args.out).expanduser(), settings)
        model = load_model(recipe.folder(settings.model), getattr(torch, settings.dtype), settings.device, parallel.shard if settings.shard else None)
        saes = load_saes(settings, model.config)
        for sae in saes.values():
            print(sae)
        tokenizer = load_tokenizer(recipe.folder(settings.model))
        examples, _ = load_examples(settings.data, tokenizer, settings.batch_tokens, settings.format)
        harmless = harmless_prompts(settings)
    out = Path(parallel.on_rank_zero(run_folder, args.out, f"select-{Path(settings.model).name}"))
    with parallel.agreed():
        held = Lock(out) if parallel.rank() == 0 else None      # noqa: F841
    parallel.on_rank_zero(begin, out, settings, source)
    spaces, features = select_features(
        model, saes, tokenizer, sample_pairs(settings, examples), settings.top_k, settings.tau, settings.rank, settings.tokens,
        settings.batch_tokens, settings.select, settings.norm_aware, harmless, settings.format)
    parallel.on_rank_zero(save_selection, out, spaces, features)
    print(f"selection: {out}")
