"""PiSSA (arXiv 2404.02948): begin at the leading part of each weight.

    python -m experiments.neighbours.pissa --init pissa --out runs/pissa

With U·S·Vᵀ the singular values and vectors of a weight W, and r of the largest,

    B = U_r·√S_r,   A = √S_r·V_rᵀ,   W − B·A in the place of W

so the first step begins at the base model. A and B are trained; −B·A of the beginning is a second,
frozen half of the adapter (`shared.Start`), whose file so fits the base model. No answers are
compared, so --data may have one answer a row.
Ours: alpha = rank, where s = 1; the SVD is a whole one.
"""

import torch

import lora
from experiments.neighbours import shared
from run import parallel


def factors(weight, rank):
    """(A (r, in), B (out, r)) of a weight (out, in)."""
    U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def starts(settings, model, tokenizer, examples):
    modules = lora.linears(model, settings.targets)
    return {name: shared.Start(*factors(module.weight, settings.rank))
            for name, module in modules.items()}


if __name__ == "__main__":
    parallel.run(lambda: shared.main("pissa", starts))
