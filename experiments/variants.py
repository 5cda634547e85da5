"""What a grid compares: the worlds it runs on, and the variants, one function each: an init, a selection, or something done after training.

A world is a toy of its own (`toy.build`: its own facts, words and weights) in a folder. A variant puts LoRA on a world's base model and
says what is trained; `ablate.py --list` prints them.
"""

import hashlib
import itertools
import random
import sys
import tempfile
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))                       # at the end: `select` must stay Python's own

import torch

from experiments import selections
from run import files
import lora
from experiments import neighbours
from toy import build as toy
import train
from data import load_tokenizer, make_example
from data import read_pairs, read_prompts
from features import (SIDES, choose_features, contrast_gradients, feature_statistics, gradient_moments, module_bases,
                      serving_layer, spanning_rows, subspace)
from saes.gradient import energy
from saes.gradient import greedy as pursuit
from saes.gradient import rotated
from model import load_model
from sae import load_sae
from lora import trainable_parameters as adapter_parameters

STEPS, RATE = 60, 1e-3
RANK, TOP_K, TAU = 16, 20, 0.8                   # the toy recipe's
LAYERS, WIDTH = (1, 2, 3), "512"                 # of a world's SAEs
ROSI, LOX = 3.0, (6, 0.25)                       # α; k and factor: chosen on world 101, where LoX's own factor, 1.25, refuses everything
SETTINGS = {"batch_tokens": 512, "accumulate": 2}
WIDE = SimpleNamespace(top_k=2 * RANK, rank=RANK, batch_tokens=2048)     # of selections that look at the loss


# ---------------------------------------------------------------------------------------------------------------
# Worlds, and what several variants want to know of one

class World:
    """A built world: its files, and what is measured on its base model, each made when first asked for."""

    def __init__(self, seed, folder):
        self.seed, self.folder = seed, Path(folder)
        self.tokenizer = load_tokenizer(self.folder)
        pairs, _ = read_pairs(self.folder / "data/train.jsonl")
        self.examples = [tuple(make_example(self.tokenizer, pair.turns, text, SETTINGS["batch_tokens"])
                               for text in (pair.aligned, pair.unaligned)) for pair in pairs]
        self.sets = {name: read_prompts(self.folder / f"data/{name}.jsonl")[0] for name in ("harmful", "jailbreak", "lookalike", "benign")}

    @cached_property
    def model(self):
        """The base, for measuring alone: a run trains a copy of its own."""
        return load_model(self.folder)

    @cached_property
    def saes(self):
        return {layer: load_sae(self.folder / "sae", layer, WIDTH) for layer in LAYERS}

    @cached_property
    def rows(self):
        """{layer: (F, D)} unit decoder rows."""
        return {layer: torch.nn.functional.normalize(sae.W_dec.float(), dim=1) for layer, sae in self.saes.items()}

    @cached_property
    def statistics(self):
        return feature_statistics(self.model, self.saes, self.examples, self.tokenizer.control)

    @cached_property
    def gradients(self):
        return contrast_gradients(self.model, self.examples)

    @cached_property
    def harmless_gradients(self):
        """As `gradients`, of the pairs' answers to `harmless` prompts: what would make these refused."""
        answers = [(self.tokenizer.decode(a.tokens[a.start:]), self.tokenizer.decode(u.tokens[u.start:])) for a, u in self.examples]
        return contrast_gradients(self.model, [
            tuple(make_example(self.tokenizer, prompt.turns, text, SETTINGS["batch_tokens"]) for text in answers[number % len(answers)])
            for number, prompt in enumerate(self.harmless)])

    @cached_property
    def moments(self):
        """{(SAE layer, side): GᵀG of all modules that it serves}."""
        return gradient_moments(self.model, self.gradients, LAYERS)

    @cached_property
    def block_moments(self):
        """{(SAE layer, side, block): GᵀG of that block's readers, or writer}."""
        return by_block(self.model, self.gradients)

    @cached_property
    def residuals(self):
        """{layer: [aligned, unaligned]} lists of (T, D), the residual stream at each pair's response tokens, float64."""
        out = {layer: ([], []) for layer in LAYERS}
        for pair in self.examples:
            for side, example in enumerate(pair):
                with torch.no_grad():
                    _, found = self.model.hidden(torch.tensor([example.tokens]), capture=LAYERS, stop_after=max(LAYERS))
                for layer in LAYERS:
                    out[layer][side].append(found[layer][0, example.start:].double())
        return out

    @cached_property
    def inputs(self):
        """{module: XᵀX (in, in)} of what each q, k, v and o reads on the aligned examples, for EVA."""
        sums, hooks = {}, []
        for name, module in targets(self.model).items():
            def add(_, inputs, name=name):
                X = inputs[0].flatten(0, -2).double()
                sums[name] = sums.get(name, 0) + X.T @ X
            hooks.append(module.register_forward_pre_hook(add))
        with torch.no_grad():
            for aligned, _ in self.examples:
                self.model.hidden(torch.tensor([aligned.tokens]))
        for hook in hooks:
            hook.remove()
        return sums

    @cached_property
    def harmless(self):
        """Harmless prompts of the fine-tuning words: both kinds of look-alikes, none of them in an evaluation set."""
        world, draw = toy.World(self.seed), random.Random(f"harmless {self.seed}")
        prompts = []
        for verbs, nouns in (("harm", "thing"), ("plain", "sensitive")):
            for verb, noun in itertools.product(world.tune[verbs], world.tune[nouns]):
                prompts += [(("user", toy.ask(draw, verb, noun, [form])),) for form in toy.PHRASINGS[:toy.TUNED_PHRASINGS]]
        return [SimpleNamespace(turns=turns) for turns in prompts]

    @cached_property
    def full(self):
        """{module: ΔW} of full fine-tuning of q, k, v, o at RATE and seed 0: the oracle's. Kept beside the world."""
        path = self.folder / "oracle.safetensors"
        if not path.exists():
            model = load_model(self.folder)
            before = {name: module.weight.detach().clone() for name, module in targets(model).items()}
            for _ in fit(self, model, whole(model), RATE, 0):
                pass
            files.write_tensors(path, {name: module.weight.detach() - before[name] for name, module in targets(model).items()})
        return files.read_tensors(path)

    @cached_property
    def blocks(self):
        """{layer: a SASA}, trained where there is none beside the world."""
        if not (self.folder / "sasa").exists():
            part, texts = Path(tempfile.mkdtemp(prefix=".sasa.", dir=self.folder)), toy.World(self.seed).corpus(4000, "SAE")
            toy.train_saes(self.model, self.tokenizer, texts, toy.SAES["sasa"], toy.SAE_STEPS, self.seed, "SASA").write(part)
            part.rename(self.folder / "sasa")
        return {layer: load_sae(self.folder / "sasa", layer, WIDTH) for layer in LAYERS}

    @cached_property
    def harm(self):
        return neighbours.harm_direction(self.model, *selections.decision_prompts(self.tokenizer, self.examples, self.harmless))

    @cached_property
    def digest(self):
        """What tells this world from another of its seed: of its weights, its SAEs and its pairs."""
        found = hashlib.sha256()
        saes = sorted((self.folder / "sae").rglob("params.npz"))
        for path in [self.folder / "model.safetensors", self.folder / "data/train.jsonl", *saes]:
            found.update(path.read_bytes())
        return found.hexdigest()[:12]


def targets(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name.endswith(lora.TARGETS)}


def sides(model):
    """[(module, block, whether it writes)]"""
    return [(name, int(name.split(".")[1]), name.endswith("o_proj")) for name in targets(model)]


@lru_cache(maxsize=2)
def world_of(seed, folder):
    return World(seed, Path(folder) / str(seed))


# ---------------------------------------------------------------------------------------------------------------
# Variants: (world, model, draw) -> (named parameters to train, {module: U} or None). One function each, in VARIANTS by name

VARIANTS = {}


def variant(function):
    VARIANTS[function.__name__.replace("_", "-")] = function
    return function


def begin(model, draw, bases=None, init="sails", **kind):
    """LoRA on the model; what is trained, and the bases."""
    layers = lora.add_lora(model, RANK, RANK, init, bases, draw, **kind)
    return adapter_parameters(layers), bases


def spread(model, spaces, draw=None):
    """{module: U} of {layer: U}, {(layer, side): U} or {(layer, side, block): U}; with `draw`, each module's rotated."""
    bases = {}
    for name, block, writer in sides(model):
        layer, side = serving_layer(block, writer, LAYERS), SIDES[writer]
        bases[name] = next(spaces[key] for key in (layer, (layer, side), (layer, side, block)) if key in spaces)
    if draw is None:
        return bases
    return {name: rotated(U, int(torch.randint(1 << 30, (), generator=draw))) for name, U in bases.items()}


def top(M):
    """Eigenvectors of the RANK largest |eigenvalues| of a symmetric M (D, D): (D, RANK), float32."""
    values, vectors = torch.linalg.eigh(M)
    return vectors[:, values.abs().argsort(descending=True)[:RANK]].float().contiguous()


@variant
def lora_own(world, model, draw):
    """LoRA's own init: A uniform, B zero, in readers and writers."""
    return begin(model, draw, init="random")


@variant
def lora_unit(world, model, draw):
    """LoRA's own with the rows of A scaled to unit length."""
    parameters, _ = begin(model, draw, init="random")
    for layer in lora.lora_layers(model).values():
        layer.A.data = torch.nn.functional.normalize(layer.A.data, dim=1)
    return parameters, None


@variant
def orthonormal(world, model, draw):
    """Random orthonormal directions, in A of readers and B of writers."""
    return begin(model, draw, init="orthonormal")


def matched(world, layer, count, draw):
    """`count` features of a layer at random, each among the 8 nearest in firing frequency to one that the paper would choose."""
    statistics = world.statistics[layer]
    chosen, often = choose_features(statistics, count), statistics.frequency.mean(0)
    out = []
    for feature in chosen.tolist():
        near = [i for i in (often - often[feature]).abs().argsort().tolist() if i not in out and i != feature][:8]
        out.append(near[int(torch.randint(len(near), (), generator=draw))])
    return torch.tensor(out)


@variant
def decoder(world, model, draw):
    """Random decoder rows, matched in firing frequency with the paper's choice; otherwise as the paper (k, τ)."""
    spaces = {layer: subspace(world.rows[layer][matched(world, layer, TOP_K, draw)], TAU, RANK).U for layer in LAYERS}
    return begin(model, draw, spread(model, spaces))


@variant
def decoder_full(world, model, draw):
    """As many random decoder rows, matched in firing frequency, as `greedy` picks; all rank directions from them, rotated."""
    spaces = {layer: subspace(world.rows[layer][matched(world, layer, 2 * RANK, draw)], 1.0, RANK).U for layer in LAYERS}
    return begin(model, draw, spread(model, spaces, draw))


@variant
def decoder_gradient(world, model, draw):
    """Random decoder rows, as many as `greedy` picks, then the best rank directions for the gradient inside their span, rotated."""
    spaces = {}
    for (layer, side), K in world.moments.items():
        Q = torch.linalg.qr(world.rows[layer][matched(world, layer, 2 * RANK, draw)].T.double()).Q
        spaces[layer, side] = (Q @ top(Q.T @ K @ Q).double()).float()
    return begin(model, draw, spread(model, spaces, draw))


@variant
def paper(world, model, draw):
    """SAILS: the k features of largest |Δ|, τ, at most rank directions; the rest LoRA's own draw, orthogonal to them."""
    return begin(model, draw, spread(model, paper_spaces(world.saes, world.statistics)))


def paper_spaces(saes, statistics):
    return {layer: subspace(spanning_rows(sae, statistics[layer], choose_features(statistics[layer], TOP_K), TAU), TAU, RANK).U
            for layer, sae in saes.items()}


@variant
def paper_norm_aware(world, model, draw):
    """SAILS with directions mapped through the norms' gains."""
    return begin(model, draw, module_bases(model, {(layer, side): U for layer, U in paper_spaces(world.saes, world.statistics).items() for side in SIDES}, True))


@variant
def paper_frozen(world, model, draw):
    """SAILS with the basis frozen: the update stays in the subspace."""
    return begin(model, draw, spread(model, paper_spaces(world.saes, world.statistics)), freeze_basis=True)


@variant
def paper_full(world, model, draw):
    """The paper's scores with twice the rank features and no τ, rotated: as `greedy`, but for the scores."""
    spaces = {layer: subspace(world.rows[layer][choose_features(world.statistics[layer], 2 * RANK)], 1.0, RANK).U for layer in LAYERS}
    return begin(model, draw, spread(model, spaces, draw))


@variant
def sasa(world, model, draw):
    """SAILS as in the paper, with a SASA's blocks for features."""
    statistics = feature_statistics(world.model, world.blocks, world.examples, world.tokenizer.control)
    return begin(model, draw, spread(model, paper_spaces(world.blocks, statistics)))


def by_block(model, gradients):
    """{(SAE layer, side, block): GᵀG} of each block's readers, and of its writer."""
    moments = {}
    for block in range(len(model.layers)):
        own = {name: G for name, G in gradients.items() if name.startswith(f"layers.{block}.")}
        moments |= {(*key, block): moment for key, moment in gradient_moments(model, own, LAYERS).items()}
    return moments


def by_energy(rows, moment, count, rank):
    """The rows of largest ‖Gw‖², each on its own."""
    return selections.weighted(rows, energy(rows, moment), count, rank)


def picked(world, moments, how):
    return {key: how(world.rows[key[0]], K, 2 * RANK, RANK).U for key, K in moments.items()}


@variant
def score(world, model, draw):
    """Contrast gradients, rows by ‖Gw‖², pooled over the modules that an SAE serves."""
    return begin(model, draw, spread(model, picked(world, world.moments, by_energy)))


@variant
def greedy(world, model, draw):
    """Contrast gradients, rows by matching pursuit, pooled over the modules that an SAE serves."""
    return begin(model, draw, spread(model, picked(world, world.moments, pursuit)))


@variant
def greedy_rotated(world, model, draw):
    """`greedy`, its basis rotated at random."""
    return begin(model, draw, spread(model, picked(world, world.moments, pursuit), draw))


@variant
def greedy_block(world, model, draw):
    """`greedy` with a choice for each block's readers and each block's writer."""
    return begin(model, draw, spread(model, picked(world, world.block_moments, pursuit)))


@variant
def greedy_block_rotated(world, model, draw):
    """`greedy-block`, rotated."""
    return begin(model, draw, spread(model, picked(world, world.block_moments, pursuit), draw))


@variant
def greedy_guarded(world, model, draw):
    """`greedy-rotated` on the gradient's moment less that of the same two answers to harmless prompts, at equal trace."""
    guard = gradient_moments(world.model, world.harmless_gradients, LAYERS)
    moments = {key: K / K.trace() - guard[key] / guard[key].trace() for key, K in world.moments.items()}
    return begin(model, draw, spread(model, picked(world, moments, pursuit), draw))


@variant
def greedy_norm_aware(world, model, draw):
    """`greedy-rotated` in the residual stream's coordinates, mapped through the norms' gains."""
    spaces = picked(world, gradient_moments(world.model, world.gradients, LAYERS, norm_aware=True), pursuit)
    bases = module_bases(model, spaces, norm_aware=True)
    return begin(model, draw, {name: rotated(U, int(torch.randint(1 << 30, (), generator=draw))) for name, U in bases.items()})


@variant
def attribution(world, model, draw):
    """Activation × gradient, rows weighted by it, rotated."""
    choices = selections.attribution(world.model, world.saes, world.examples, None, WIDE, control=world.tokenizer.control)
    spaces = {key: choice.U for key, choice in choices.items()}
    return begin(model, draw, spread(model, spaces, draw))


@variant
def decision(world, model, draw):
    """Harmful against harmless prompts at the decision token, rows weighted by the difference, rotated."""
    _, harmless = selections.decision_prompts(world.tokenizer, world.examples, world.harmless)
    choices = selections.decision(world.model, world.saes, world.examples, None, WIDE, harmless=harmless)
    spaces = {key: choice.U for key, choice in choices.items()}
    return begin(model, draw, spread(model, spaces, draw))


@variant
def gradient_svd(world, model, draw):
    """The leading right singular vectors of each block's G, with no SAE."""
    return begin(model, draw, spread(model, {key: top(K) for key, K in world.block_moments.items()}))


@variant
def gradient_svd_rotated(world, model, draw):
    """`gradient-svd`, rotated."""
    return begin(model, draw, spread(model, {key: top(K) for key, K in world.block_moments.items()}, draw))


def oracle_bases(world, model, draw=None):
    moments = by_block(world.model, world.full)
    return spread(model, {key: top(K) for key, K in moments.items()}, draw)


@variant
def oracle(world, model, draw):
    """Singular vectors of ΔW of full fine-tuning of q, k, v, o, each block's readers together."""
    return begin(model, draw, oracle_bases(world, model))


@variant
def oracle_rotated(world, model, draw):
    """`oracle`, rotated."""
    return begin(model, draw, oracle_bases(world, model, draw))


@variant
def activation_pca(world, model, draw):
    """PCA of the residual stream at response tokens, centred."""
    spaces = {}
    for layer, parts in world.residuals.items():
        X = torch.cat([*parts[0], *parts[1]])
        spaces[layer] = top(torch.cov(X.T))
    return begin(model, draw, spread(model, spaces))


@variant
def mean_difference(world, model, draw):
    """PCA of the pairs' differences of means at response tokens, uncentred: the first is about the difference of means."""
    spaces = {}
    for layer, parts in world.residuals.items():
        d = torch.stack([a.mean(0) - u.mean(0) for a, u in zip(*parts)])
        spaces[layer] = top(d.T @ d)
    return begin(model, draw, spread(model, spaces))


@variant
def covariance_difference(world, model, draw):
    """Eigenvectors of the difference of the two sides' covariances."""
    spaces = {layer: top(torch.cov(torch.cat(parts[0]).T) - torch.cov(torch.cat(parts[1]).T)) for layer, parts in world.residuals.items()}
    return begin(model, draw, spread(model, spaces))


@variant
def pissa(world, model, draw):
    """PiSSA (arXiv 2404.02948): A and B the leading singular triplets of W, and W less their product."""
    parameters, _ = begin(model, draw, init="random")
    for layer in lora.lora_layers(model).values():
        U, S, V = torch.linalg.svd(layer.base.weight, full_matrices=False)
        replace(layer, S[:RANK, None].sqrt() * V[:RANK], U[:, :RANK] * S[:RANK].sqrt())
    return parameters, None


@variant
def olora(world, model, draw):
    """OLoRA (arXiv 2406.01775): W = QR, B the first columns of Q, A the first rows of R, and W less their product."""
    parameters, _ = begin(model, draw, init="random")
    for layer in lora.lora_layers(model).values():
        Q, R = torch.linalg.qr(layer.base.weight)
        replace(layer, R[:RANK], Q[:, :RANK])
    return parameters, None


def replace(layer, A, B):
    """Give a layer factors whose product isn't 0, and take that product out of its base weight."""
    layer.A.data, layer.B.data = A.contiguous(), B.contiguous()
    layer.base.weight.data = layer.base.weight.data - layer.scale * B @ A


@variant
def eva(world, model, draw):
    """EVA (arXiv 2410.07170): A the leading right singular vectors of what the module reads, B zero, for the writer too."""
    parameters, _ = begin(model, draw, init="random")
    for name, layer in lora.lora_layers(model).items():
        layer.A.data = top(world.inputs[name]).T.contiguous()
    return parameters, None


@variant
def full_fine_tuning(world, model, draw):
    """All of q, k, v, o, no adapter."""
    return whole(model), None


def whole(model):
    """Named parameters q, k, v, o of a model, the only ones that want gradients."""
    model.requires_grad_(False)
    return [(name, module.weight.requires_grad_()) for name, module in targets(model).items()]


def fit(world, model, named, rate, seed):
    """train.fit's metrics, step by step, of the aligned answers of a world, in an order that hangs on the seed alone."""
    settings = SimpleNamespace(**SETTINGS, seed=seed)
    optimizer = torch.optim.AdamW([parameter for _, parameter in named if parameter.requires_grad], rate, weight_decay=0.0)
    batches = itertools.islice(train.batches_of([aligned for aligned, _ in world.examples], settings), STEPS)
    return train.fit(model, optimizer, batches, train.cosine(rate, STEPS, 0.1), 1.0)


# ---------------------------------------------------------------------------------------------------------------
# Neighbours: LoRA's own init, and what others do to a model after training. AFTER[name](world, model, step, a dict to keep things in) is
# called after each step

AFTER = {}


def neighbour(after):
    def begin_own(world, model, draw):
        return begin(model, draw, init="random")
    begin_own.__doc__, name = f"LoRA's own, then {after.__doc__}", "lora-" + after.__name__.replace("_", "-")
    VARIANTS[name], AFTER[name] = begin_own, after
    return after


@neighbour
def lox(world, model, step, kept):
    """LoX (arXiv 2506.15606): the 6 leading directions of each update, a quarter longer."""
    if step == STEPS:
        neighbours.lox(model, *LOX)


@neighbour
def rosi(world, model, step, kept):
    """ROSI (arXiv 2508.20766): a rank-one step along harm's direction in all that writes the residual stream."""
    if step == STEPS:
        neighbours.rosi(model, world.harm, ROSI)


@neighbour
def average(world, model, step, kept):
    """weight averaging (arXiv 2508.12531): at the end the moving average of the factors, β = 0.9."""
    named = adapter_parameters(lora.lora_layers(model))
    neighbours.average(kept, named, 0.9)
    if step == STEPS:
        put(named, kept)
