"""SIFT (arXiv 2312.11875): full fine-tuning of the few components with the largest gradients.

    python -m experiments.neighbours.sift --method full --out runs/sift
    python -m experiments.neighbours.sift --method full --targets q_proj v_proj --out runs/sift

With G the first gradient of a weight W, its mask and each step's gradient are

    M = |G| among the ⌊x·|W|⌋ + 1 largest of W,   ∂L/∂W ← M ∘ ∂L/∂W

so that all but a share x of each weight stays what it is. The formula is that of the code at
github.com/song-wx/SIFT, sift/sift.py; the paper's number for it couldn't be looked up.
Ours: G is the gradient of the first step's whole batch, which is trained on as well (there of its
last micro-batch, which isn't); the masked components are not stored sparsely, so no memory is
saved; embedding and norms are masked too, unless --targets names what is trained (there q, k, v, o,
gate, up and down).
"""

from functools import partial

import torch

import train
from data import Row
from run import parallel
from run.files import InputError

SHARE = 0.01                    # x


def mask_of(gradient, share):
    """True at the ⌊share·n⌋ + 1 components of largest size."""
    count = min(int(share * gradient.numel()) + 1, gradient.numel())
    mask = torch.zeros(gradient.numel(), dtype=torch.bool, device=gradient.device)
    mask[gradient.abs().flatten().topk(count).indices] = True
    return mask.view_as(gradient)


def masked(model, weights, rows, share=SHARE):
    """Let gradients reach only what is largest in that of `rows`, data.Row with tensors (T)."""
    device = model.embed_tokens.weight.device
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for row in rows:
        batch = Row(*(part[None].to(device) for part in vars(row).values()))
        gradients = torch.autograd.grad(train.row_loss(model, batch), weights)
        for total, gradient in zip(totals, gradients):
            total += gradient
    for weight, total in zip(weights, totals):
        weight.register_hook(partial(torch.mul, mask_of(total, share)))


def main():
    fit = train.train

    def fit_masked(settings, model, named, bases, examples, *rest):
        if settings.method != "full":
            raise InputError(f"--method {settings.method}: SIFT trains weights: give --method full")
        # From the base's weights, so that a run that goes on has the same masks
        rows = next(train.batches_of([pair[0] for pair in examples], settings))
        masked(model, [weight for _, weight in named], rows)
        fit(settings, model, named, bases, examples, *rest)

    train.train = fit_masked
    return train.main()


if __name__ == "__main__":
    parallel.run(main)
