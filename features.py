"""The method of SAILS (arXiv 2512.23260, section 3): from pairs of answers to a safety subspace.

    python select.py                                            # on the built-in toy, a few seconds
    python select.py --model google/gemma-2-2b --top-k 20 --tau 0.8     # needs Gemma's licence

A pair is a prompt with an aligned and an unaligned answer, aᵢ the activation of feature i on the
residual stream after an SAE's layer, E the mean over response tokens. Selection `paper`:

    Δᵢ = E_aligned[aᵢ] − E_unaligned[aᵢ]; take the k features of largest |Δᵢ|, or other --score
    M = P·S·Vᵀ, their decoder rows at unit length, (k, D), centred only with --center (PCA)
    U = V[:, :r̂], r̂ the fewest columns that hold a share τ of ΣS², at most the rank

`gradient` is ours. L = NLL(aligned) − NLL(unaligned), per token. G stacks the gradients ∂L/∂W of
the readers that an SAE layer serves, or the (∂L/∂W)ᵀ of the writers. Chosen one after the other:

    w = the decoder row of largest ‖G(I − QQᵀ)w‖² / ‖(I − QQᵀ)w‖², Q the span of those before it
    U = the leading right singular vectors of GQQᵀ, rotated at random

Readers (q, k, v; gate, up) read the residual stream, writers (o, down) write to it. A unit is a
feature (b = 1) or, of a SASA, a block of b features.
Letters: T tokens, D hidden size, F features in K = F/b units, P pairs, r rank.
"""

import random
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import load_examples, load_tokenizer
from model import MODULES, TARGETS, Gemma2, load_model
from run import parallel
from run.estimate import check_adapter
from run.files import InputError, Parser, is_new, read_tensors, write_json, write_tensors
from run.session import limit_threads
from run.settings import add_flags, model_folder, resolve
from sae import SAE, load_saes
from saes import blocks
from saes.blocks import spanning_rows
from saes.gradient import Pairs, candidates, contrast_gradients, greedy, rotated
from saes.words import Peaks, describe_features, features_table

SIDES = ("readers", "writers")
FLAGS = ("model sae layers width l0 format data pairs tokens select score top_k tau center "
         "norm_aware targets rank batch_tokens seed device dtype shard recompute").split()
EPSILON = 1e-6                  # of ρ: the least mean activation that divides


# ---- Statistics ----------------------------------------------------------------------------------
@dataclass
class Statistics:
    """What the units of one SAE do on the answers: float64; rows (2, …) are aligned, unaligned."""
    num_pairs: int
    mean: Tensor          # (2, K) E[a]; of a block, the length of its mean code
    frequency: Tensor     # (2, K) share of the tokens on which the unit fires
    delta: Tensor         # (K,) Δ; of a block, the length of `shift`
    error: Tensor         # (K,) standard error of Δ over pairs; NaN of a single pair
    shift: Tensor         # (K, b) difference of the mean codes
    covariance: Tensor    # (K, b, b) of `shift`, over pairs
    peaks: Peaks                # where each unit fires most

    @property
    def effect(self) -> Tensor:
        """(K,) Δ in its standard errors; NaN where the error is 0 or unknown."""
        known = self.error > 1e-12 * self.delta.abs().max()
        return torch.where(known, self.delta / self.error, torch.nan)

    def score(self, name: str) -> Tensor:
        """(K,) of `--score name`; ρ = Δ / max(E_unaligned|a|, ε), of each unit by itself."""
        if name == "rho":
            return self.delta / self.mean[1].clamp(min=EPSILON)
        return self.delta.abs() if name == "delta" else self.delta


class PairSums:
    """Float64 sums over pairs for one SAE; their size doesn't grow with the number of pairs.

    z = (s_a, n_a, s_u, n_u) of a pair: a unit's code summed over the aligned answer (b numbers),
    its tokens, and both unaligned. Σz gives Δ = Σs_a/Σn_a − Σs_u/Σn_u, Σzzᵀ its standard error.
    """

    def __init__(self, sae: SAE, device):
        K = sae.n_units
        size = 2 * sae.block + 2
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.sae = sae
        self.num_pairs = zeros(())
        self.z = zeros(K, size)
        self.zz = zeros(K, size, size)
        self.fired = zeros(2, K)
        self.peaks = Peaks(K, device)

    def add(self, number, residuals, counted):
        """Take in pair `number`: residual stream (2, T, D), the counted token indices of both."""
        sums = []
        for answer, indices in enumerate(counted):
            indices = torch.tensor(indices, device=residuals.device)            # (n,)
            codes = self.sae.encode(residuals[answer, indices])                 # (n, F)
            activations = self.sae.activations(codes)                           # (n, K)
            self.fired[answer] += (activations > 0).sum(0)
            self.peaks.update(answer, number, activations, indices)
            # A unit's summed code, and beside it the number of tokens
            code_sum = codes.sum(0, dtype=torch.float64)                        # (F,)
            code_sum = code_sum.view(-1, self.sae.block)                        # (K, b)
            sums.append(pad(code_sum, (0, 1), value=len(indices)))
        z = torch.cat(sums, 1)                                                  # (K, 2b+2)
        self.z += z
        self.zz += z[:, :, None] * z[:, None]
        self.num_pairs += 1

    def statistics(self) -> Statistics:
        if parallel.world_size() > 1:
            parallel.sum_tensors(self.z, self.zz, self.fired, self.num_pairs)
            self.peaks.merge(parallel.gather_tensors)
        b = self.sae.block
        z = self.z.unflatten(1, (2, b + 1)).transpose(0, 1)                     # (2, K, b+1)
        num_tokens = z[:, :1, -1:]                                              # (2, 1, 1)
        mean = z[..., :-1] / num_tokens                                         # (2, K, b)
        shift = mean[0] - mean[1]                                               # (K, b)
        # To first order pair p moves Δ by d_p = J·z_p, with J = ∂Δ/∂Σz (delta method)
        eye = torch.eye(b).to(z).expand(2, len(shift), b, b)
        slopes = torch.cat((eye, -mean[..., None]), 3) / num_tokens[..., None]
        J = torch.cat((slopes[0], -slopes[1]), 2)                               # (K, b, 2b+2)
        # Σ d_p = 0, so Cov Δ = P/(P−1) Σ d_p d_pᵀ
        P = int(self.num_pairs)
        correction = P / (P - 1) if P > 1 else torch.nan
        covariance = J @ self.zz @ J.mT * correction                            # (K, b, b)
        if b == 1:
            mean, delta, variance = mean[..., 0], shift[:, 0], covariance[:, 0, 0]
        else:
            mean, delta, variance = blocks.lengths(mean, shift, covariance)
        # Rounding may leave a variance just below 0
        error = variance.clamp(min=0).sqrt()
        frequency = self.fired / num_tokens[..., 0]
        return Statistics(P, mean, frequency, delta, error, shift, covariance, self.peaks)


@torch.no_grad()
def feature_statistics(model: Gemma2, saes: dict[int, SAE], pairs: Pairs, control=(),
                       tokens="response", batch_tokens=4096) -> dict[int, Statistics]:
    """{layer: Statistics} of pairs that are streamed through the model once.

    Ids in `control` (BOS, turn markers) never count; tokens: "response", or "all" for the prompt
    too. Of many processes each takes a share, and all get the same. Raises InputError for no pairs.
    """
    device = model.embed_tokens.weight.device
    layers = sorted(saes)
    sums = {layer: PairSums(saes[layer], device) for layer in layers}
    counted = [[_counted(example, control, tokens) for example in pair] for pair in pairs]
    usable = [number for number in range(len(pairs)) if all(counted[number])]
    batches = _batches(pairs, usable, batch_tokens)
    if not batches:
        raise InputError("no pair has a response token on both sides")
    # A sharded model's forward is one of all processes, so each makes as many
    batches += [[]] * (-len(batches) % parallel.world_size())
    for batch in tqdm(parallel.own_share(batches), "selecting", leave=False, delay=1, disable=None):
        # Pads stand on the right, so no token sees them
        ids = [torch.tensor(example.tokens) for number in batch for example in pairs[number]]
        ids = pad_sequence(ids or [torch.tensor([0])], batch_first=True)
        # Nothing deeper than the last SAE runs
        _, residuals = model.hidden(ids.to(device), capture=layers, stop_after=layers[-1])
        # Rows 2i and 2i + 1 are the two answers of the batch's pair i
        for layer in layers:
            for number, residual in zip(batch, residuals[layer].split(2)):
                sums[layer].add(number, residual, counted[number])
    return {layer: sums[layer].statistics() for layer in layers}


def _counted(example, control, tokens):
    """Indices of an example's tokens that count."""
    indices = range(0 if tokens == "all" else example.start, len(example.tokens))
    return [i for i in indices if example.tokens[i] not in control]


def _batches(pairs, numbers, batch_tokens):
    """Lists of the pairs' `numbers`. Pairs of like length share one, so that few pads are made."""
    def longest(number):
        return max(len(example.tokens) for example in pairs[number])
    numbers = sorted(numbers, key=longest, reverse=True)
    batches = []
    while numbers:
        size = max(1, batch_tokens // (2 * longest(numbers[0])))
        batches.append(numbers[:size])
        numbers = numbers[size:]
    return batches


# ---- Choice and subspace -------------------------------------------------------------------------
def choose_features(statistics: Statistics, top_k: int, score="delta") -> Tensor:
    """Indices (k,) of the units of largest score, in that order; only scores above 0 count."""
    scores = statistics.score(score)
    # A stable sort, so that ties fall alike on every machine
    order = scores.sort(descending=True, stable=True).indices[:top_k]
    return order[scores[order] > 0].cpu()


def subspace(rows: Tensor, tau: float, rank: int, center=False) -> tuple[Tensor, float, str]:
    """(U, explained, limit) of decoder rows (k, D), by PCA. U (D, r̂): orthonormal, float32;
    explained: its share of the squared singular values; limit: "tau" or "rank", what set r̂."""
    if len(rows) <= center:
        raise InputError("no feature differs between the two sides: nothing to span a subspace")
    rows = normalize(rows.double(), dim=1)
    if center:
        rows = rows - rows.mean(0)
    _, S, V = torch.linalg.svd(rows, full_matrices=False)
    power = S.square()
    share = power.cumsum(0) / power.sum()                                       # (k,)
    wanted = int((share < tau - 1e-12).sum()) + 1
    # Rows that depend on each other leave singular values that are rounding alone
    num_independent = int((S > 1e-9 * S[0]).sum())
    r = min(wanted, rank, num_independent)
    limit = "tau" if r == wanted else "rank"
    return V[:r].T.float().contiguous(), share[r - 1].item(), limit


# ---- Which basis serves which module -------------------------------------------------------------
def serving_layer(block: int, writer: bool, layers: Collection[int]) -> int:
    """The SAE layer nearest to the stream that a module reads or writes; on a tie the lower."""
    # A reader sees what the block before it has left
    place = block if writer else block - 1
    return min(sorted(layers), key=lambda layer: abs(layer - place))


def norm_gain(block, name: str) -> Tensor:
    """(D,) 1 + w of the norm between module `name` and the stream; no closer to 0 than 0.01."""
    norm = getattr(block, MODULES[name.split(".")[-1]].norm)
    gain = 1 + norm.weight.float().cpu()
    # A direction is divided by it
    floor = torch.where(gain < 0, -0.01, 0.01)
    return torch.where(gain.abs() < 0.01, floor, gain)


def module_bases(model: Gemma2, subspaces: dict[tuple[int, str], Tensor], norm_aware=False,
                 targets=TARGETS) -> dict[str, Tensor]:
    """{module name: U (D, r̂)} of the `targets` in every block, from {(SAE layer, side): U}.

    With `norm_aware`, directions pass the norms: q sees x/rms(x)·(1 + w), so what reads u of the
    stream itself is u/(1 + w); what writes u is divided alike. QR makes them orthonormal again.
    """
    layers = {layer for layer, _ in subspaces}
    bases = {}
    for number, block in enumerate(model.layers):
        for leaf in targets:
            parent, side, _ = MODULES[leaf]
            layer = serving_layer(number, side == "writers", layers)
            U = subspaces[layer, side]
            # The norm stands before a reader and after a writer; its gain is the same diagonal
            if norm_aware:
                seen = U / norm_gain(block, leaf)[:, None]
                U = torch.linalg.qr(seen.double()).Q.float()
            bases[f"layers.{number}.{parent}.{leaf}"] = U
    return bases


# ---- Selections: (model, saes, pairs, statistics, settings) -> {(layer, side): Choice} -----------
@dataclass
class Choice:
    features: Tensor         # (k,) units, the first choice first
    scores: Tensor           # (k,) what they are chosen by
    U: Tensor                # (D, r̂) orthonormal columns, float32
    explained: float         # share of the rows' squared singular values, or of ‖G‖², along U
    limit: str               # what set r̂: "tau" or "rank"


def paper(model, saes, pairs, statistics, settings):
    """The largest scores and the PCA of their decoder rows, the same for readers and writers."""
    choices = {}
    for layer, sae in saes.items():
        # No pooling over layers: each has its own k features and its own subspace
        features = choose_features(statistics[layer], settings.top_k, settings.score)
        rows = spanning_rows(sae, statistics[layer], features, settings.tau)
        scores = statistics[layer].score(settings.score).cpu()[features]
        space = subspace(rows, settings.tau, settings.rank, settings.center)
        choice = Choice(features, scores, *space)
        choices |= {(layer, side): choice for side in SIDES}
    return choices


def gradient(model, saes, pairs, statistics, settings):
    """Matching pursuit in the gradient of the loss, for readers and writers apart."""
    gradients = contrast_gradients(model, pairs, settings.batch_tokens, settings.recompute,
                                   settings.targets or TARGETS)
    moments = gradient_moments(model, gradients, saes, settings.norm_aware)
    choices = {}
    for seed, (layer, side) in enumerate(moments):
        sae, moment = saes[layer], moments[layer, side]
        # All decoder rows compete
        rows = candidates(sae.unit_rows(range(sae.n_units)), moment)            # (K, D)
        features, scores, U, explained = greedy(rows, moment, settings.top_k, settings.rank)
        choices[layer, side] = Choice(features, scores, rotated(U, seed), explained, "rank")
    return choices


SELECTIONS = {"paper": paper, "gradient": gradient}


def gradient_moments(model, gradients, layers, norm_aware=False) -> dict[tuple, Tensor]:
    """{(SAE layer, side): GᵀG (D, D)}, float64, summed over the modules that the layer serves; with
    `norm_aware` in the stream's coordinates, of which a module sees direction u along u/gain."""
    moments = {}
    for name, G in gradients.items():
        block = int(name.split(".")[1])
        side = MODULES[name.split(".")[-1]].side
        # The residual stream's D is the last dimension: a reader's inputs, a writer's outputs
        G = G.T if side == "writers" else G
        moment = (G.T @ G).double()
        if norm_aware:
            gain = norm_gain(model.layers[block], name).to(moment)
            moment = moment / gain / gain[:, None]
        layer = serving_layer(block, side == "writers", layers)
        moments[layer, side] = moments.get((layer, side), 0) + moment
    return moments


# ---- All of it -----------------------------------------------------------------------------------
def select_features(model: Gemma2, saes: dict[int, SAE], tokenizer, pairs: Pairs, settings):
    """({(SAE layer, side): Choice}, entries of features.json); a table a layer is printed."""
    if settings.select not in SELECTIONS:
        raise InputError(f"--select {settings.select}: known are {', '.join(SELECTIONS)}")
    statistics = feature_statistics(model, saes, pairs, tokenizer.control, settings.tokens,
                                    settings.batch_tokens)
    choices = SELECTIONS[settings.select](model, saes, pairs, statistics, settings)
    score = settings.score if settings.select == "paper" else settings.select
    features = []
    for layer, sae in sorted(saes.items()):
        # A layer that serves no reader, or no writer, has one side
        sides = {side: choices[layer, side] for side in SIDES if (layer, side) in choices}
        for side, choice in sides.items():
            print(f"layer {layer}, {side}: {len(choice.features)} {sae.noun} by {score} span "
                  f"r̂ = {choice.U.shape[1]} directions, which explain {choice.explained:.1%}; "
                  f"{choice.limit} decided")
        entries = describe_features(model, sae, tokenizer, statistics[layer], sides, pairs)
        print(f"{features_table(entries)}\n")
        features += [entry | {"scored_by": score} for entry in entries]
    return choices, features


def sample_pairs(settings, pairs: list) -> list:
    """The --pairs that selection looks at, drawn by --seed; 0: all."""
    if not 0 < settings.pairs < len(pairs):
        return pairs
    return random.Random(settings.seed).sample(pairs, settings.pairs)


def save_selection(folder: str | Path, choices: dict, features: list[dict]):
    """features.json, then subspace.safetensors with layer_N.readers and layer_N.writers (D, r̂)."""
    write_json(f"{folder}/features.json", features)
    tensors = {f"layer_{layer}.{side}": choice.U for (layer, side), choice in choices.items()}
    write_tensors(f"{folder}/subspace.safetensors", tensors)


def load_subspaces(path: str | Path) -> dict[tuple[int, str], Tensor]:
    """{(SAE layer, side): U (D, r̂)} of a subspace.safetensors. Raises InputError."""
    subspaces = {}
    for name, U in read_tensors(path).items():
        key = re.fullmatch(r"layer_(\d+)\.(readers|writers)", name)
        if not key:
            raise InputError(f"{path}: {name} isn't layer_N.readers or .writers: select anew")
        subspaces[int(key[1]), key[2]] = U
    return subspaces


def main():
    parser = Parser(__doc__)
    group = add_flags(parser, FLAGS)
    group.add_argument("--out", help="a new folder (default runs/TIME-select-MODEL)")
    args = parser.parse_args()
    settings, source = resolve(args)
    default = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-select-{Path(settings.model).name}"
    folder = Path(args.out or default).expanduser()
    if not is_new(folder):
        raise InputError(f"{folder} is there and isn't empty: give another --out")
    # What one process can't read ends all of them
    with parallel.agreed():
        place = model_folder(settings.model)
        tokenizer = load_tokenizer(place)
        shard = parallel.shard if settings.shard else None
        model = load_model(place, getattr(torch, settings.dtype), settings.device, shard)
        limit_threads(model)
        check_adapter(settings, model.config)
        saes = load_saes(settings.sae, settings.layers, settings.width, settings.l0,
                         settings.device, model.config)
        pairs, _ = load_examples(settings.data, tokenizer, settings.batch_tokens, settings.format)
    print(*saes.values(), sep="\n")
    pairs = sample_pairs(settings, pairs)
    choices, features = select_features(model, saes, tokenizer, pairs, settings)
    config = {"settings": vars(settings), "source": source}
    parallel.on_rank_zero(write_json, folder / "config.json", config)
    parallel.on_rank_zero(save_selection, folder, choices, features)
    print(f"selection: {folder}")
