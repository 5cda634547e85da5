"""The method of SAILS (arXiv 2512.23260, section 3): from pairs of answers to a safety subspace.

    python select.py                                            # on the built-in toy, a few seconds
    python select.py --model google/gemma-2-2b --top-k 20 --tau 0.8     # needs Gemma's licence

A pair is a prompt with an aligned and an unaligned answer, aᵢ the activation of feature i on the
residual stream after an SAE's layer, E the mean over response tokens. Selection `paper`:

    Δᵢ = E_aligned[aᵢ] − E_unaligned[aᵢ]; take the k features of largest |Δᵢ|
    M = P·S·Vᵀ, their decoder rows at unit length, (k, D), not centred (PCA)
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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Example, load_examples, load_tokenizer, pack
from model import MODULES, TARGETS, Gemma2, load_model
from run import parallel
from run.files import InputError, Parser, is_new, read_tensors, write_json, write_tensors
from run.settings import add_flags, model_folder, resolve
from sae import SAE, load_saes
from saes.gradient import candidates, greedy, rotated, summed_gradients
from saes.words import Peaks, describe_features, features_table

SIDES = ("readers", "writers")
FLAGS = ("model", "sae", "layers", "width", "l0", "format", "data", "pairs", "tokens", "select",
         "top_k", "tau", "norm_aware", "rank", "batch_tokens", "seed", "device", "dtype", "shard")
Pairs = Sequence[tuple[Example, Example]]     # (aligned, unaligned)


# ---- Statistics ----------------------------------------------------------------------------------
@dataclass
class Statistics:
    """What the units of one SAE do on the answers: float64; rows (2, …) are aligned, unaligned."""
    layer: int
    num_pairs: int
    num_tokens: torch.Tensor    # (2,) response tokens
    mean: torch.Tensor          # (2, K) E[a]; of a block, the length of its mean code
    frequency: torch.Tensor     # (2, K) share of the tokens on which the unit fires
    delta: torch.Tensor         # (K,) Δ; of a block, the length of `shift`
    error: torch.Tensor         # (K,) standard error of Δ over pairs; NaN of a single pair
    shift: torch.Tensor         # (K, b) difference of the mean codes
    covariance: torch.Tensor    # (K, b, b) of `shift`, over pairs
    peaks: Peaks                # where each unit fires most

    @property
    def rho(self) -> torch.Tensor:
        """(K,) Δ over the largest unaligned mean; version 1 of the paper ranks by it."""
        return self.delta / self.mean[1].abs().max().clamp(min=1e-30)

    @property
    def effect(self) -> torch.Tensor:
        """(K,) Δ in its standard errors; NaN where the error is 0 or unknown."""
        known = self.error > 1e-12 * self.delta.abs().max()
        return torch.where(known, self.delta / self.error, torch.nan)


class PairSums:
    """Float64 sums over pairs for one SAE; their size doesn't grow with the number of pairs.

    z = (s_a, n_a, s_u, n_u) of a pair: a unit's code summed over the aligned answer (b numbers),
    its tokens, and both unaligned. Σz gives Δ = Σs_a/Σn_a − Σs_u/Σn_u, Σzzᵀ its standard error.
    """

    def __init__(self, sae: SAE, device):
        K, size = sae.n_units, 2 * sae.block + 2
        self.z = torch.zeros(K, size, dtype=torch.float64, device=device)
        self.zz = torch.zeros(K, size, size, dtype=torch.float64, device=device)
        self.fired = torch.zeros(2, K, dtype=torch.float64, device=device)
        self.num_pairs = torch.tensor(0, device=device)
        self.sae, self.peaks = sae, Peaks(K, device)

    def add(self, number, residuals, places):
        """Take in pair `number`: residual stream (2, T, D), token indices (n,) of each answer."""
        z = torch.empty_like(self.z).unflatten(1, (2, -1))                          # (K, 2, b+1)
        for answer, place in enumerate(places):
            codes = self.sae.encode(residuals[answer, place])                       # (n, F)
            activations = self.sae.activations(codes)                               # (n, K)
            code_sum = codes.sum(0, dtype=torch.float64)                            # (F,)
            z[:, answer, :-1] = code_sum.view(-1, self.sae.block)
            z[:, answer, -1] = len(place)
            self.fired[answer] += (activations > 0).sum(0)
            self.peaks.update(answer, number, activations, place)
        z = z.flatten(1)
        self.z += z
        self.zz += z[:, :, None] * z[:, None]
        self.num_pairs += 1

    def statistics(self) -> Statistics:
        if parallel.world_size() > 1:
            parallel.sum_tensors(self.z, self.zz, self.fired, self.num_pairs)
            self.peaks.merge(parallel.gather_tensors)
        b, P = self.sae.block, int(self.num_pairs)
        z = self.z.unflatten(1, (2, b + 1)).transpose(0, 1)                         # (2, K, b+1)
        num_tokens = z[:, 0, -1]                                                    # (2,)
        mean = z[..., :-1] / num_tokens[:, None, None]                              # (2, K, b)
        # To first order pair p moves Δ by d_p = J·z_p, Σ d_p = 0, so Cov Δ = P/(P−1) Σ d_p d_pᵀ
        J, each = self.z.new_zeros(len(self.z), b, 2, b + 1), torch.arange(b)
        for answer, sign in enumerate((1, -1)):
            J[:, each, answer, each] = sign / num_tokens[answer]
            J[:, each, answer, -1] = -sign * mean[answer] / num_tokens[answer]
        J = J.flatten(2)                                                            # (K, b, 2b+2)
        covariance = J @ self.zz @ J.mT * (P / (P - 1) if P > 1 else torch.nan)     # (K, b, b)
        shift = mean[0] - mean[1]                                                   # (K, b)
        if b == 1:
            mean, delta, variance = mean[..., 0], shift[:, 0], covariance[:, 0, 0]
        else:
            mean, delta, along = mean.norm(dim=2), shift.norm(dim=1), normalize(shift, dim=1)
            variance = torch.einsum("ki,kij,kj->k", along, covariance, along)
        return Statistics(self.sae.layer, P, num_tokens, mean, self.fired / num_tokens[:, None],
                          delta, variance.clamp(min=0).sqrt(), shift, covariance, self.peaks)


@torch.no_grad()
def feature_statistics(model: Gemma2, saes: dict[int, SAE], pairs: Pairs, control=(),
                       tokens="response", batch_tokens=4096) -> dict[int, Statistics]:
    """{layer: Statistics} of pairs that are streamed through the model once.

    Ids in `control` (BOS, turn markers) never count; tokens: "response", or "all" for the prompt
    too. Of many processes each takes a share, and all get the same. Raises InputError for no pairs.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    sums = {layer: PairSums(saes[layer], device) for layer in layers}
    batches = _batches(pairs, control, tokens, batch_tokens)
    # A sharded model's forward is one of all processes, so each makes as many
    if parallel.is_sharded(model):
        batches += [[]] * (-len(batches) % parallel.world_size())
    for batch in tqdm(parallel.own_share(batches), "selecting", leave=False, delay=1, disable=None):
        # Pads stand on the right, so no token sees them; nothing deeper than the last SAE runs
        ids = [torch.tensor(example.tokens) for _, pair, _ in batch for example in pair]
        ids = pad_sequence(ids or [torch.zeros(1, dtype=torch.long)], batch_first=True)
        _, residuals = model.hidden(ids.to(device), capture=layers, stop_after=layers[-1])
        for layer in layers:
            for i, (number, _, places) in enumerate(batch):
                here = [place.to(device) for place in places]
                sums[layer].add(number, residuals[layer][2 * i:2 * i + 2], here)
    return {layer: sums[layer].statistics() for layer in layers}


def _batches(pairs, control, tokens, batch_tokens):
    """Lists of (pair's number, pair, [token indices that count] of its answers), long first."""
    control = torch.tensor(sorted(control), dtype=torch.long)
    counted, batches = [], []
    for number, pair in enumerate(pairs):
        places = []
        for example in pair:
            place = (~torch.isin(torch.tensor(example.tokens), control)).nonzero()[:, 0]
            places.append(place if tokens == "all" else place[place >= example.start])
        if all(map(len, places)):
            longest = max(len(example.tokens) for example in pair)
            counted.append((longest, number, pair, places))
    if not counted:
        raise InputError("no pair has a response token on both sides")
    # Pairs of like length share a batch, so that few pads are computed
    counted.sort(key=lambda item: -item[0])
    while counted:
        size = max(1, batch_tokens // (2 * counted[0][0]))
        batches.append([item[1:] for item in counted[:size]])
        counted = counted[size:]
    return batches


# ---- Choice and subspace -------------------------------------------------------------------------
def choose_features(statistics: Statistics, top_k: int) -> torch.Tensor:
    """Indices (k,) of the units of largest |Δ|, in that order; those with Δ = 0 are left out."""
    strength = statistics.delta.abs()
    if not 1 <= top_k <= len(strength):
        raise InputError(f"--top-k {top_k}: this SAE has {len(strength)} units")
    order = strength.sort(descending=True, stable=True).indices[:top_k]
    return order[strength[order] > 0].cpu()


def spanning_rows(sae: SAE, statistics: Statistics, units, tau: float) -> torch.Tensor:
    """Directions (m, D) that `units` bring into the span: of a feature its decoder row.

    Of a block with rows D_k (b, D): what pairs differ by has the second moment M = ΔΔᵀ + P·Cov Δ;
    the leading right singular vectors of M^½·D_k, the fewest that hold a share `tau`.
    """
    if sae.block == 1:
        return sae.decoder_rows(units)
    shift, covariance = statistics.shift[units].cpu(), statistics.covariance[units].cpu()
    spread = (statistics.num_pairs * covariance).nan_to_num()
    values, V = torch.linalg.eigh(shift[:, :, None] * shift[:, None] + spread)
    root = (V * values.clamp(min=0).sqrt()[:, None]).mT                             # (k, b, b)
    rows = root @ sae.unit_rows(units).double().cpu()                               # (k, b, D)
    _, S, directions = torch.linalg.svd(rows, full_matrices=False)
    share = S.square().cumsum(1) / S.square().sum(1, keepdim=True).clamp(min=1e-300)
    keep = torch.arange(sae.block) <= (share < tau - 1e-12).sum(1, keepdim=True)    # (k, b)
    return directions[keep].float()


def subspace(rows: torch.Tensor, tau: float, rank: int) -> tuple[torch.Tensor, float, str]:
    """(U, explained, limit) of decoder rows (k, D), by PCA. U (D, r̂): orthonormal, float32;
    explained: its share of the squared singular values; limit: "tau" or "rank", what set r̂."""
    if not 0 < tau <= 1:
        raise InputError(f"--tau {tau}: a share of variance, above 0 and at most 1")
    if len(rows) == 0:
        raise InputError("no feature differs between the two sides: nothing to span a subspace")
    _, S, V = torch.linalg.svd(normalize(rows.double(), dim=1), full_matrices=False)
    share = S.square().cumsum(0) / S.square().sum()
    wanted = int((share < tau - 1e-12).sum()) + 1
    r = min(wanted, rank, int((S > 1e-9 * S[0]).sum()))
    limit = "tau" if r == wanted else "rank"
    return V[:r].T.float().contiguous(), share[r - 1].item(), limit


# ---- Which basis serves which module -------------------------------------------------------------
def serving_layer(block: int, writer: bool, layers: Collection[int]) -> int:
    """The SAE layer nearest to the stream that a module reads or writes; on a tie the lower."""
    place = block if writer else block - 1          # readers see what the block before has left
    return min(sorted(layers), key=lambda layer: abs(layer - place))


def norm_gain(block, name: str) -> torch.Tensor:
    """(D,) 1 + w of the norm between module `name` and the stream; no closer to 0 than 0.01."""
    gain = 1 + getattr(block, MODULES[name.split(".")[-1]].norm).weight.float().cpu()
    return torch.where(gain.abs() < 0.01, torch.where(gain < 0, -0.01, 0.01), gain)


def module_bases(model: Gemma2, subspaces: dict[tuple[int, str], torch.Tensor], norm_aware=False,
                 targets=TARGETS) -> dict[str, torch.Tensor]:
    """{module name: U (D, r̂)} of the `targets` in every block, from {(SAE layer, side): U}.

    With `norm_aware`, directions pass the norms: q sees x/rms(x)·(1 + w), so what reads u of the
    stream itself is u/(1 + w); what writes u is divided alike. QR makes them orthonormal again.
    """
    layers, bases = {layer for layer, _ in subspaces}, {}
    for number, block in enumerate(model.layers):
        for leaf in targets:
            parent, side, _ = MODULES[leaf]
            U = subspaces[serving_layer(number, side == "writers", layers), side]
            if norm_aware:
                U = torch.linalg.qr((U / norm_gain(block, leaf)[:, None]).double()).Q.float()
            bases[f"layers.{number}.{parent}.{leaf}"] = U
    return bases


# ---- Selections: (model, saes, pairs, statistics, settings) -> {(layer, side): Choice} -----------
@dataclass
class Choice:
    features: torch.Tensor   # (k,) units, the first choice first
    scores: torch.Tensor     # (k,) what they are chosen by
    U: torch.Tensor          # (D, r̂) orthonormal columns, float32
    explained: float         # share of the rows' squared singular values, or of ‖G‖², along U
    limit: str               # what set r̂: "tau" or "rank"


def paper(model, saes, pairs, statistics, settings) -> dict[tuple[int, str], Choice]:
    """The largest |Δ| and the PCA of their decoder rows, the same for readers and writers."""
    choices = {}
    for layer, sae in saes.items():
        features = choose_features(statistics[layer], settings.top_k)
        rows = spanning_rows(sae, statistics[layer], features, settings.tau)
        scores = statistics[layer].delta.abs().cpu()[features]
        choice = Choice(features, scores, *subspace(rows, settings.tau, settings.rank))
        choices |= {(layer, side): choice for side in SIDES}
    return choices


def gradient(model, saes, pairs, statistics, settings) -> dict[tuple[int, str], Choice]:
    """Matching pursuit in the gradient of the loss, for readers and writers apart."""
    gradients = contrast_gradients(model, pairs, settings.batch_tokens)
    choices, moments = {}, gradient_moments(model, gradients, saes, settings.norm_aware)
    for seed, ((layer, side), moment) in enumerate(moments.items()):
        rows = candidates(saes[layer].unit_rows(range(saes[layer].n_units)), moment)
        features, scores, U, explained = greedy(rows, moment, settings.top_k, settings.rank)
        choices[layer, side] = Choice(features, scores, rotated(U, seed), explained, "rank")
    return choices


SELECTIONS = {"paper": paper, "gradient": gradient}


def contrast_gradients(model: Gemma2, pairs: Pairs, batch_tokens=2048) -> dict[str, torch.Tensor]:
    """{module name: ∂L/∂W (out, in)} of the q, k, v and o of a frozen model, at least float32.

    Rows have `batch_tokens` tokens, or those of the longest example; of many processes each takes a
    share. The loss counts the turn's end, as in training. Raises InputError for a sharded model.
    """
    if parallel.is_sharded(model):
        raise InputError("--select gradient needs whole weights on each card: leave --shard out")
    length = max(batch_tokens, *(len(example.tokens) for pair in pairs for example in pair))
    rows = []
    for sign, examples in zip((1, -1), zip(*pairs)):
        num_tokens = sum(len(example.tokens) - example.start for example in examples)
        rows += [(sign / num_tokens, row) for row in pack(examples, length, 0, 0)]
    sums = summed_gradients(model, parallel.own_share(rows))
    parallel.sum_tensors(*sums.values())
    return sums


def gradient_moments(model, gradients, layers, norm_aware=False) -> dict[tuple, torch.Tensor]:
    """{(SAE layer, side): GᵀG (D, D)}, float64, summed over the modules that the layer serves; with
    `norm_aware` in the stream's coordinates, of which a module sees direction u along u/gain."""
    moments = {}
    for name, G in gradients.items():
        block, side = int(name.split(".")[1]), MODULES[name.split(".")[-1]].side
        G = G.T if side == "writers" else G
        moment = (G.T @ G).double()
        if norm_aware:
            gain = norm_gain(model.layers[block], name).to(moment)
            moment = moment / gain / gain[:, None]
        key = serving_layer(block, side == "writers", layers), side
        moments[key] = moments.get(key, 0) + moment
    return moments


# ---- All of it -----------------------------------------------------------------------------------
def select_features(model: Gemma2, saes: dict[int, SAE], tokenizer, pairs: Pairs, settings):
    """({(SAE layer, side): Choice}, entries of features.json); a table a layer is printed."""
    if settings.select not in SELECTIONS:
        raise InputError(f"--select {settings.select}: known are {', '.join(SELECTIONS)}")
    statistics = feature_statistics(model, saes, pairs, tokenizer.control, settings.tokens,
                                    settings.batch_tokens)
    choices, features = SELECTIONS[settings.select](model, saes, pairs, statistics, settings), []
    for layer, sae in sorted(saes.items()):
        sides = {side: choices[layer, side] for side in SIDES if (layer, side) in choices}
        for side, choice in sides.items():
            print(f"layer {layer}, {side}: {len(choice.features)} {sae.noun} span r̂ = "
                  f"{choice.U.shape[1]} directions, which explain {choice.explained:.1%}; "
                  f"{choice.limit} decided")
        # The paper's score is |Δ|, which an entry holds anyway
        entries = describe_features(model, sae, tokenizer, statistics[layer], sides, pairs,
                                    with_scores=settings.select != "paper")
        print(f"{features_table(entries)}\n")
        features += entries
    return choices, features


def sample_pairs(settings, pairs: list) -> list:
    """The --pairs that selection looks at, drawn by --seed; 0: all."""
    few = 0 < settings.pairs < len(pairs)
    return random.Random(settings.seed).sample(pairs, settings.pairs) if few else pairs


def save_selection(folder: str | Path, choices: dict, features: list[dict]) -> None:
    """features.json, then subspace.safetensors with layer_N.readers and layer_N.writers (D, r̂)."""
    write_json(f"{folder}/features.json", features)
    tensors = {f"layer_{layer}.{side}": choice.U for (layer, side), choice in choices.items()}
    write_tensors(f"{folder}/subspace.safetensors", tensors)


def load_subspaces(path: str | Path) -> dict[tuple[int, str], torch.Tensor]:
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
    add_flags(parser, FLAGS).add_argument("--out", metavar="DIR", help="a new folder (default "
                                          "runs/TIME-select-MODEL)")
    args = parser.parse_args()
    settings, source = resolve(args)
    default = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-select-{Path(settings.model).name}"
    folder = Path(args.out or default).expanduser()
    if not is_new(folder):
        raise InputError(f"{folder} is there and isn't empty: give another --out")
    with parallel.agreed():
        model_source, dtype = model_folder(settings.model), getattr(torch, settings.dtype)
        shard = parallel.shard if settings.shard else None
        model = load_model(model_source, dtype, settings.device, shard)
        saes = load_saes(settings.sae, settings.layers, settings.width, settings.l0,
                         settings.device, model.config)
        tokenizer = load_tokenizer(model_source)
        pairs, _ = load_examples(settings.data, tokenizer, settings.batch_tokens, settings.format)
    print(*saes.values(), sep="\n")
    sample = sample_pairs(settings, pairs)
    choices, features = select_features(model, saes, tokenizer, sample, settings)
    config = {"settings": vars(settings), "source": source}
    parallel.on_rank_zero(write_json, folder / "config.json", config)
    parallel.on_rank_zero(save_selection, folder, choices, features)
    print(f"selection: {folder}")
