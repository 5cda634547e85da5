"""IRR (arXiv 2412.11041): take out of a fine-tuning what speaks against safety, and mend the rest.

    python -m experiments.neighbours.irr ALIGNED FINETUNED UNALIGNED --data F --safety F --out DIR

The three are whole models (lora.py merges a run). Per weight, with δ = θ_finetuned − θ_aligned, the
safety vector δ_s = θ_aligned − θ_unaligned, F the mean of (∂ NLL/∂θ_aligned)² over refusals:

    identify      opposite = sign δ ≠ sign δ_s
    remove        of these, in each 128 columns, all but the share KEEP (0: all) of smallest F
    recalibrate   column by column, of each removed δ_m: δ_j ← δ_j − δ_m·[H⁻¹]_mj / [H⁻¹]_mm,
                  j > m, H = X·Xᵀ + 0.01·mean(diag)·I of the inputs on --data, from column m on

The formulas are those of the code at github.com/pikepokenew/IRR, IRR/sparsegpt.py and src/; the
paper's numbers couldn't be looked up. As there, H of a block sees the earlier blocks mended.
Ours: all of q, k, v, o, gate, up and down, those of a block at once; NLL is an answer's mean.
"""

import torch

import train
from data import Row, pack
from experiments.neighbours import checkpoints, shared
from lora import linears
from model import MODULES
from run.files import run_command

KEEP = 0.0


def unsafe(delta, safety, fisher, keep, block=128):
    """True where δ is removed: of opposite sign, less the share `keep` of least F in each block."""
    mask = torch.zeros_like(delta, dtype=torch.bool)
    for first in range(0, delta.shape[1], block):
        part = slice(first, first + block)
        rows, columns = (delta[:, part].sign() != safety[:, part].sign()).nonzero(as_tuple=True)
        order = fisher[rows, columns + first].argsort(stable=True)[int(keep * len(rows)):]
        mask[rows[order], columns[order] + first] = True
    return mask


def recalibrated(delta, mask, H):
    """δ (out, in) without what `mask` says, the rest moved so that δ·X changes least."""
    delta, dead = delta.to(H, copy=True), H.diagonal() == 0
    H = H + torch.diag(dead + 0.01 * (H.diagonal() + dead).mean())
    delta[:, dead] = 0
    R = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for i in range(len(H)):
        error = torch.where(mask[:, i], delta[:, i], 0) / R[i, i]
        delta[:, i:] -= torch.outer(error, R[i, i:])
    return delta


def fisher_of(model, examples):
    """{module: F}: the mean over examples of the squared gradient of their NLL."""
    weights = {name: module.weight.requires_grad_()
               for name, module in linears(model, MODULES).items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for example in examples:
        row, = pack([example], len(example.tokens), 0, 0)
        total = train.row_loss(model, Row(*(part[None] for part in vars(row).values())))
        loss = total / (len(example.tokens) - example.start)
        for name, gradient in zip(sums, torch.autograd.grad(loss, list(weights.values()))):
            sums[name] += gradient.square() / len(examples)
    return sums


def realign(aligned, finetuned, unaligned, refusals, task, keep=KEEP):
    """The three steps on the fine-tuned model's weights, in place, block after block."""
    fisher = fisher_of(aligned, refusals)
    for block, part in enumerate(finetuned.layers):
        for leaf, H in shared.input_moments(finetuned, task, MODULES, part).items():
            name = f"layers.{block}.{leaf}"
            weight, base, other = (model.get_submodule(name).weight.data
                                   for model in (finetuned, aligned, unaligned))
            mask = unsafe(weight - base, base - other, fisher[name], keep)
            weight.copy_(base + recalibrated(weight - base, mask, H))


if __name__ == "__main__":
    run_command(lambda: checkpoints.main(__doc__, realign))
