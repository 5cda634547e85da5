"""Full fine-tuning: the weights that are trained, and float32 copies of bfloat16 ones.

AdamW's steps are smaller than bfloat16 resolves, 1/256 of a weight, and would be lost. They are
taken on float32 copies, which are rounded into the weights after each step.
"""

from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from run.files import InputError

Named = list[tuple[str, nn.Parameter]]


def trained_weights(model: nn.Module, targets: Collection[str] | None) -> Named:
    """[(name, weight)] of the modules with these leaf names, or of all, which want gradients then.

    Raises InputError for a name that no module has.
    """
    leaves = {name.split(".")[-2] for name, _ in model.named_parameters()}
    if unknown := set(targets or ()) - leaves:
        raise InputError(f"--targets {' '.join(sorted(unknown))}: known are "
                         f"{', '.join(sorted(leaves))}")
    named = [(name, weight) for name, weight in model.named_parameters()
             if not targets or name.split(".")[-2] in targets]
    for _, weight in named:
        weight.requires_grad_()
    return named


def master_copies(named: Named) -> Named:
    """[(name, float32 copy)] of weights [(name, weight)]; a float32 weight is its own copy.

    A gradient goes to the copy as soon as the backward has made it, so that micro-batches sum in
    float32 and no bfloat16 gradient is kept.
    """
    copies = []
    for name, weight in named:
        master = weight
        if weight.dtype != torch.float32:
            master = nn.Parameter(weight.detach().float())
            weight.register_post_accumulate_grad_hook(partial(move_gradient, master))
        copies.append((name, master))
    return copies


def move_gradient(master, weight):
    gradient = weight.grad.float()
    weight.grad = None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)


@torch.no_grad()
def round_weights(weights: Iterable[Tensor], masters: Iterable[Tensor]):
    """Put the masters' values, rounded, into the weights, in place."""
    for weight, master in zip(weights, masters):
        if weight is not master:
            weight.copy_(master)
