"""GuardSpace (arXiv 2510.14301): leave unchanged what harmful prompts give.

    python -m experiments.neighbours.guardspace --init guardspace --out runs/guardspace

X (in, n) is what a module of weight W reads on harmful prompts, C = X·Xᵀ. The small singular values
of W·C belong to what those prompts don't use; from r of them the adapter begins:

    W·C = U·S·Vᵀ,   B = U_r·√S_r,   A = √S_r·V_rᵀ·C⁻¹,   r of the smallest singular values
    y = (W − B₀·A₀·P)·x + B·A·P·x,   P = N·Nᵀ,   N the null space of C

so the first step begins at the base model, and no step changes what W answers to X. A and B are
trained. The formulas are those of the code at github.com/zhangNopainsNogains/GuardSpace,
cordalib/decomposition_Null.py; the paper's numbers for them couldn't be looked up. As there, C in
the first line is C + d·mean(diag C)·I, d = 0.01; its doubling of d, where C⁻¹ is too inexact in
single precision, falls away in double.
Ours: C is divided by mean(diag C), which shares S between A and B as unit inputs do (there each
prompt's X is divided by its largest value). N are the eigenvectors of C that together hold a share
NULL of its trace (there those of at most 1e-6 of the largest eigenvalue, which a small model may
not have). Both lines take the prompts that --data refuses (there the second
has prompts of its own). Its place is fine-tuning after alignment: give an aligned --model.
"""

from dataclasses import replace

import torch

import lora
from experiments.neighbours import shared
from run import parallel

DAMP, NULL = 0.01, 0.01


def null_projector(C, share=NULL):
    """P (in, in) float32: onto the eigenvectors whose eigenvalues sum to at most share·trace(C)."""
    values, vectors = torch.linalg.eigh(C)
    N = vectors[:, values.clamp(min=0).cumsum(0) <= share * C.trace()]
    return (N @ N.T).float()


def start(weight, C, rank) -> shared.Start:
    """A module's Start, of its weight and C (in, in) float64."""
    damped = C / C.diagonal().mean() + DAMP * torch.eye(len(C)).to(C)
    U, S, V = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    root = S[-rank:].sqrt()
    A = root[:, None] * torch.linalg.solve(damped, V[-rank:].T).T
    B = U[:, -rank:] * root
    return shared.Start(A.float(), B.float(), right=null_projector(C))


def starts(model, refusals, targets, rank):
    """{module: Start} of all targets, by the prompts that are refused."""
    prompts = [replace(example, tokens=example.tokens[:example.start], start=0)
               for example in refusals]
    moments = shared.input_moments(model, prompts, targets)
    return {name: start(module.weight, moments[name], rank)
            for name, module in lora.linears(model, targets).items()}


def from_settings(settings, model, tokenizer, examples):
    refusals = shared.refusals(settings, tokenizer, examples)
    return starts(model, refusals, settings.targets, settings.rank)


if __name__ == "__main__":
    parallel.run(lambda: shared.main("guardspace", from_settings))
