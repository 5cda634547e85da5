"""Variants without a selection: inits of LoRA, full fine-tuning, and changes after training.

Each is a variant as in variants.py. AFTER[name](world, model, step, state) is called after each
training step of the variant of that name; `state` is a dict to keep things in. BATCHES[name](world,
seed) are its batches, where they aren't those of the aligned answers, and LOSSES[name](world, seed)
is its loss, where it isn't train.row_loss.
Letters: r rank, in and out the widths of W.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.nn.functional import normalize

import lora
from experiments import selections
from experiments.neighbours import averaging, derta
from experiments.neighbours.lox import extrapolate
from experiments.neighbours.pissa import factors
from experiments.neighbours.rosi import harm_direction, inject
from experiments.neighbours.shared import harmful_only, input_moments
from experiments.neighbours.sift import masked
from experiments.neighbours.sspu import forget_and_keep, objective, relevant
from experiments.variants import begin, paper_bases, top, variant
from experiments.worlds import LAYERS, RANK, STEPS, batches_of, full_parameters
from model import TARGETS

ROSI_ALPHA = 3.0               # chosen on world 101, like LoX's k and factor:
LOX = (6, 0.25)                # its own factor, 1.25, makes the toy refuse everything


# -------------------------------------------------------------------------------------------------
# LoRA's own

@variant
def lora_own(world, model, generator):
    """LoRA's own init: A uniform, B zero, in readers and writers."""
    return begin(model, generator, init="random")


@variant
def lora_unit(world, model, generator):
    """LoRA's own with the rows of A scaled to unit length."""
    def unit_rows(*arguments):
        A, B = lora.random(*arguments)
        return normalize(A, dim=1), B
    return begin(model, generator, init=unit_rows)


@variant
def orthonormal(world, model, generator):
    """Random orthonormal directions, in A of readers and B of writers."""
    return begin(model, generator, init="orthonormal")


# -------------------------------------------------------------------------------------------------
# Other inits, and no adapter at all

def begin_within(model, generator, factors_of):
    """Begin at B·A other than 0, and take s·B·A out of the base weight."""
    parameters, _ = begin(model, generator, init="random")
    for layer in lora.lora_layers(model).values():
        A, B = factors_of(layer.base.weight)
        layer.A.data, layer.B.data = A.contiguous(), B.contiguous()
        layer.base.weight.data = layer.base.weight.data - layer.scale * B @ A
    return parameters, None


@variant
def pissa(world, model, generator):
    """PiSSA (arXiv 2404.02948): A and B leading singular triplets of W, W less B·A."""
    return begin_within(model, generator, lambda weight: factors(weight, RANK))


@variant
def olora(world, model, generator):
    """OLoRA (arXiv 2406.01775): W = QR, B columns of Q, A rows of R, W less B·A."""
    def leading(weight):
        Q, R = torch.linalg.qr(weight)
        return R[:RANK], Q[:, :RANK]
    return begin_within(model, generator, leading)


@variant
def eva(world, model, generator):
    """EVA (arXiv 2410.07170): A the leading right singular vectors of a module's input, B zero."""
    parameters, _ = begin(model, generator, init="random")
    wholes = [replace(aligned, start=0) for aligned, _ in world.examples]
    moments = input_moments(world.model, wholes, TARGETS)
    for name, layer in lora.lora_layers(model).items():
        layer.A.data = top(moments[name]).T.contiguous()
    return parameters, None


@variant
def full_fine_tuning(world, model, generator):
    """All of q, k, v, o and nothing else, no adapter."""
    return full_parameters(model), None


@variant
def sift(world, model, generator):
    """SIFT: the 1 % of q, k, v, o whose gradient is largest on the first batch of seed 0."""
    parameters = full_parameters(model)
    rows = next(batches_of([aligned for aligned, _ in world.examples], 0))
    masked(model, [weight for _, weight in parameters], rows)
    return parameters, None


# -------------------------------------------------------------------------------------------------
# Other batches, and another loss

def batches_by(pack):
    """An entry of BATCHES, by a `pack` of pairs."""
    return lambda world, seed: batches_of(harmful_only(world.tokenizer, world.examples), seed, pack)


@variant
def derta_own(world, model, generator):
    """DeRTa's rows, LoRA's own init."""
    return begin(model, generator, init="random")


@variant
def derta_paper(world, model, generator):
    """DeRTa's rows, SAILS' init."""
    return begin(model, generator, paper_bases(world, model))


WRITERS = ("o_proj", "down_proj")


def sspu_spaces(world):
    """{side: U (D, r)}: the span of the relevant features, and (readers) of the irrelevant ones."""
    layer = LAYERS[1]
    choices = relevant(None, {layer: world.saes[layer]}, None, world.statistics,
                       SimpleNamespace(rank=RANK))
    return {side: choice.U for (_, side), choice in choices.items()}


@variant
def sspu(world, model, generator):
    """SSPU: harmful answers are unlearned, within the span of their features."""
    bases = dict.fromkeys(lora.linears(model, WRITERS), sspu_spaces(world)["writers"])
    parameters, _ = begin(model, generator, bases, freeze_basis=True, targets=WRITERS)
    return parameters[:len(WRITERS) * (LAYERS[1] + 1)], bases       # later blocks have no part


BATCHES = {"derta-own": batches_by(derta.pack_pairs), "derta-paper": batches_by(derta.pack_pairs),
           "sspu": batches_by(forget_and_keep)}
LOSSES = {"sspu": lambda world, seed: objective(LAYERS[1], sspu_spaces(world)["readers"], seed)}


# -------------------------------------------------------------------------------------------------
# LoRA's own init with what others do to a model after training

AFTER = {}


def after_training(change):
    """Register `change` under "lora-" and its name, and a variant that begins at LoRA's own."""
    def run(world, model, generator):
        return begin(model, generator, init="random")
    run.__name__, run.__doc__ = f"lora_{change.__name__}", f"LoRA's own, then {change.__doc__}"
    variant(run)
    AFTER[f"lora-{change.__name__}"] = change
    return change


@after_training
def lox(world, model, step, state):
    """LoX: the 6 leading directions of each update, a quarter longer."""
    if step == STEPS:
        extrapolate(model, *LOX)


@after_training
def rosi(world, model, step, state):
    """ROSI: a rank-one step along harm's direction in all that writes the residual stream."""
    if step == STEPS:
        prompts = selections.decision_prompts(world.tokenizer, world.examples, world.harmless)
        direction = harm_direction(world.model, *prompts)
        inject(model, direction, ROSI_ALPHA)


@after_training
def average(world, model, step, state):
    """weight averaging: at the end the moving average of the factors, β = 0.9."""
    parameters = lora.trainable_parameters(lora.lora_layers(model))
    averaging.average(state, parameters)
    if step == STEPS:
        averaging.end_at_average(state, parameters)
