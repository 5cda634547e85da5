"""What a grid compares: inits and selections, one function each.

A variant is (world, model, generator) -> (parameters, bases). It puts LoRA on a world's base model
and returns what is trained, [(name, parameter)], and {module name: U (d, r)}, the bases that it
began at, or None. Most only choose bases: these are functions (world, model, generator) -> bases,
and `basis` or `rotated_basis` makes a variant of them. VARIANTS has all variants by name.
Letters: D hidden size, F features of an SAE, G (n, D) gradients, GᵀG their moment, r rank.
"""

from types import SimpleNamespace

import torch

import lora
from data import prompt_tokens
from experiments import selections
from experiments.neighbours.bias_adaptation import BiasTraining
from experiments.worlds import LAYERS, RANK, TAU, TOP_K, WIDTH, targets
from features import (SELECTIONS, SIDES, choose_features, contrast_gradients, gradient_moments,
                      module_bases, serving_layer, subspace)
from saes import gradient
from saes.step import Spec
from toy.build import L0

NUM_GREEDY = 2 * RANK          # features that the gradient selections choose

# {name: variant}
VARIANTS = {}


def variant(function):
    """Register a variant under its name."""
    VARIANTS[function.__name__.replace("_", "-")] = function
    return function


def basis(choose):
    """Register the variant that begins at the bases that choose(world, model, generator) gives."""
    def run(world, model, generator):
        return begin(model, generator, choose(world, model, generator))
    run.__name__, run.__doc__ = choose.__name__, choose.__doc__
    variant(run)
    return choose


def rotated_basis(choose, name=None):
    """The same with each module's basis rotated at random: the same spans."""
    def run(world, model, generator):
        # Adam's first steps are of equal size along every direction of a basis. A rotation spreads
        # what matters over all of them
        bases = {}
        for module, U in choose(world, model, generator).items():
            seed = int(torch.randint(1 << 30, (), generator=generator))
            bases[module] = gradient.rotated(U, seed)
        return begin(model, generator, bases)
    run.__name__, run.__doc__ = name or choose.__name__, f"{choose.__doc__} Rotated."
    variant(run)
    return choose


def begin(model, generator, bases=None, init="sails", **options):
    """Put LoRA on the model: (what is trained, bases)."""
    layers = lora.add_lora(model, RANK, RANK, init, bases, generator, **options)
    return lora.trainable_parameters(layers), bases


def both_sides(spaces):
    """{(layer, side): U} of {layer: U}."""
    return {(layer, side): U for layer, U in spaces.items() for side in SIDES}


def top(M):
    """Eigenvectors of the RANK largest |eigenvalues| of a symmetric M (D, D): (D, RANK)."""
    # By size: differences of covariances have negative eigenvalues that matter as much
    values, vectors = torch.linalg.eigh(M)
    order = values.abs().argsort(descending=True)[:RANK]
    return vectors[:, order].float().contiguous()


# -------------------------------------------------------------------------------------------------
# The paper's selection, and random rows in its place

def paper_bases(world, model, saes=None, norm_aware=False):
    """The paper's bases, by the world's own or other SAEs."""
    statistics = world.statistics_of(saes) if saes else world.statistics
    settings = SimpleNamespace(top_k=TOP_K, score="delta", tau=TAU, rank=RANK, center=False)
    choices = SELECTIONS["paper"](model, saes or world.saes, world.examples, statistics, settings)
    return module_bases(model, {key: choice.U for key, choice in choices.items()}, norm_aware)


@basis
def paper(world, model, generator):
    """SAILS: the k features of largest |Δ|, τ, at most rank directions."""
    return paper_bases(world, model)


@basis
def paper_norm_aware(world, model, generator):
    """SAILS with directions mapped through the norms' gains."""
    return paper_bases(world, model, norm_aware=True)


@variant
def paper_frozen(world, model, generator):
    """SAILS with the basis frozen: the update stays in the subspace."""
    return begin(model, generator, paper_bases(world, model), freeze_basis=True)


@rotated_basis
def paper_full(world, model, generator):
    """The paper's scores, twice the rank features no τ: as `greedy` but for the scores."""
    spaces = {}
    for layer in LAYERS:
        features = choose_features(world.statistics[layer], NUM_GREEDY)
        spaces[layer] = subspace(world.rows[layer][features], 1.0, RANK)[0]
    return module_bases(model, both_sides(spaces))


@basis
def sasa(world, model, generator):
    """SAILS with a SASA's blocks for features."""
    return paper_bases(world, model, world.sasas)


@basis
def bias_adapted(world, model, generator):
    """SAILS with SAEs whose biases hold features to target frequencies (arXiv 2506.14002)."""
    spec = Spec("jumprelu", int(WIDTH), L0)
    return paper_bases(world, model, world.other_saes("bias-adapted", spec, BiasTraining))


def random_features(world, layer, count, generator):
    """`count` features, each among the 8 nearest in firing frequency to one of the paper's."""
    # Rare features have other directions than common ones, so frequencies are matched
    frequency = world.statistics[layer].frequency.mean(0)        # (F,)
    features = []
    for feature in choose_features(world.statistics[layer], count).tolist():
        nearest = (frequency - frequency[feature]).abs().argsort().tolist()
        nearest = [i for i in nearest if i not in features and i != feature][:8]
        features.append(nearest[int(torch.randint(len(nearest), (), generator=generator))])
    return torch.tensor(features)


def random_row_bases(world, model, count, tau, generator):
    spaces = {}
    for layer in LAYERS:
        features = random_features(world, layer, count, generator)
        spaces[layer] = subspace(world.rows[layer][features], tau, RANK)[0]
    return module_bases(model, both_sides(spaces))


@basis
def decoder(world, model, generator):
    """Random decoder rows of the paper's firing frequencies, treated as the paper's (k, τ)."""
    return random_row_bases(world, model, TOP_K, TAU, generator)


@rotated_basis
def decoder_full(world, model, generator):
    """As many random decoder rows as `greedy` picks, no τ."""
    return random_row_bases(world, model, NUM_GREEDY, 1.0, generator)


@rotated_basis
def decoder_gradient(world, model, generator):
    """As many random decoder rows, then the gradient's best directions in their span."""
    spaces = {}
    for (layer, side), moment in world.moments.items():
        # The span is random, the directions inside it are the gradient's
        features = random_features(world, layer, NUM_GREEDY, generator)
        Q = torch.linalg.qr(world.rows[layer][features].T.double()).Q       # (D, k)
        spaces[layer, side] = (Q @ top(Q.T @ moment @ Q).double()).float()
    return module_bases(model, spaces)


# -------------------------------------------------------------------------------------------------
# Selections by the gradient of the contrast

def greedy_spaces(world, moments):
    """{(layer, side): U}, rows by matching pursuit."""
    return {(layer, side): gradient.greedy(world.rows[layer], moment, NUM_GREEDY, RANK).U
            for (layer, side), moment in moments.items()}


@basis
def score(world, model, generator):
    """Rows by ‖Gw‖², pooled over the modules that an SAE serves."""
    spaces = {}
    for (layer, side), moment in world.moments.items():
        rows = world.rows[layer]
        choice = selections.weighted(rows, gradient.energy(rows, moment), NUM_GREEDY, RANK)
        spaces[layer, side] = choice.U
    return module_bases(model, spaces)


@basis
def greedy(world, model, generator):
    """Rows by matching pursuit, pooled over the modules that an SAE serves."""
    return module_bases(model, greedy_spaces(world, world.moments))


# What train.py --select gradient does
rotated_basis(greedy, "greedy-rotated")


@rotated_basis
def greedy_guarded(world, model, generator):
    """`greedy-rotated` on the moment less that of refusing harmless prompts, at equal trace."""
    # The pairs' own answers, to harmless prompts
    decode = world.tokenizer.decode
    pairs = []
    for number, prompt in enumerate(world.harmless):
        answers = world.examples[number % len(world.examples)]
        pairs.append(tuple(world.example(prompt.turns, decode(answer.tokens[answer.start:]))
                           for answer in answers))
    # At equal trace, so that neither moment decides by its size alone
    guard = gradient_moments(world.model, contrast_gradients(world.model, pairs), LAYERS)
    moments = {key: moment / moment.trace() - guard[key] / guard[key].trace()
               for key, moment in world.moments.items()}
    return module_bases(model, greedy_spaces(world, moments))


@rotated_basis
def greedy_norm_aware(world, model, generator):
    """`greedy-rotated` in the residual stream's coordinates, mapped through the norms' gains."""
    moments = gradient_moments(world.model, world.gradients, LAYERS, norm_aware=True)
    return module_bases(model, greedy_spaces(world, moments), norm_aware=True)


def singular_vectors(layer, moment):
    """The leading right singular vectors of G, with no SAE."""
    return top(moment)


def block_bases(model, gradients, basis_of=singular_vectors):
    """{module name: U}: one basis for each block's readers and one for its writer.

    basis_of(SAE layer, moment) -> U, with GᵀG of that block's q, k and v, or of its o.
    """
    # features.gradient_moments pools the blocks of an SAE layer; these stay apart
    moments = {}
    for name in targets(model):
        block, writer = int(name.split(".")[1]), name.endswith("o_proj")
        G = gradients[name].T if writer else gradients[name]
        moments[block, writer] = moments.get((block, writer), 0) + (G.T @ G).double()
    spaces = {(block, writer): basis_of(serving_layer(block, writer, LAYERS), moment)
              for (block, writer), moment in moments.items()}
    return {name: spaces[int(name.split(".")[1]), name.endswith("o_proj")]
            for name in targets(model)}


@basis
def greedy_block(world, model, generator):
    """`greedy` with a choice for each block's readers and each block's writer."""
    def pursue(layer, moment):
        return gradient.greedy(world.rows[layer], moment, NUM_GREEDY, RANK).U
    return block_bases(model, world.gradients, pursue)


@basis
def gradient_svd(world, model, generator):
    """The leading right singular vectors of each block's G, with no SAE."""
    return block_bases(model, world.gradients)


@basis
def oracle(world, model, generator):
    """Singular vectors of ΔW of full fine-tuning of q, k, v, o, each block's readers together."""
    return block_bases(model, world.full_update)


rotated_basis(greedy_block, "greedy-block-rotated")
rotated_basis(gradient_svd, "gradient-svd-rotated")
rotated_basis(oracle, "oracle-rotated")


# -------------------------------------------------------------------------------------------------
# Other selections, with or without an SAE

def weighted_bases(world, model, selection, **options):
    """Bases by one of experiments/selections.py."""
    settings = SimpleNamespace(top_k=NUM_GREEDY, rank=RANK, batch_tokens=2048)
    choices = selection(world.model, world.saes, world.examples, None, settings, **options)
    return module_bases(model, {key: choice.U for key, choice in choices.items()})


@rotated_basis
def attribution(world, model, generator):
    """Activation × gradient, rows weighted by it."""
    control = world.tokenizer.control
    return weighted_bases(world, model, selections.attribution, control=control)


@rotated_basis
def decision(world, model, generator):
    """Harmful less harmless prompts at the decision token, rows weighted by it."""
    harmless = [prompt_tokens(world.tokenizer, prompt.turns) for prompt in world.harmless]
    return weighted_bases(world, model, selections.decision, harmless=harmless)


def residual_bases(world, model, moment_of):
    """Leading eigenvectors of a moment of the residual stream at response tokens."""
    spaces = {layer: top(moment_of(*parts)) for layer, parts in world.residuals.items()}
    return module_bases(model, both_sides(spaces))


@basis
def activation_pca(world, model, generator):
    """PCA of the residual stream at response tokens, centred."""
    def covariance(aligned, unaligned):
        return torch.cov(torch.cat([*aligned, *unaligned]).T)
    return residual_bases(world, model, covariance)


@basis
def mean_difference(world, model, generator):
    """PCA of the pairs' differences of means, uncentred: the first is about the one of all."""
    def second_moment(aligned, unaligned):
        d = torch.stack([a.mean(0) - u.mean(0) for a, u in zip(aligned, unaligned)])
        return d.T @ d
    return residual_bases(world, model, second_moment)


@basis
def covariance_difference(world, model, generator):
    """Eigenvectors of the difference of the two sides' covariances."""
    def difference(aligned, unaligned):
        return torch.cov(torch.cat(aligned).T) - torch.cov(torch.cat(unaligned).T)
    return residual_bases(world, model, difference)
