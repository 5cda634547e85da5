"""LSSF (arXiv 2602.00038): add the safety vector's part in a low-rank subspace, afterwards.

    python -m experiments.neighbours.lssf ALIGNED FINETUNED UNALIGNED --data F --safety F --out DIR

The three are whole models (lora.py merges a run); UNALIGNED is ALIGNED trained on harmful answers.
Of each weight W (out, in), with X what its module reads on refusals:

    δ_safe = θ_aligned − θ_unaligned                                              (equation 1)
    W_aligned·X = U·S·Vᵀ,   p_i = σ_i² / Σ_j σ_j²                                       (4, 5)
    H_ρ = −Σ_{i≤ρ} p_i·log p_i,   r the smallest ρ with H_ρ ≥ η·H_n                     (6, 7)
    P = U'·U'ᵀ,   u'_i = α_i·u_i for i ≤ r,
    α_i = 1 + (α_1 − 1)·(σ_i − σ_r) / (σ_1 − σ_r)                                     (8 to 11)
    θ = θ_finetuned + α·P·δ_safe                                                          (13)

Formulas and numbers are as github.com/Lexsi-Labs/SafeTune, interventions/recover/lssf.py, tells the
paper, which couldn't be looked up; that file itself takes U and S of δ_safe.
Ours: X isn't normalised (there it is; how couldn't be read. One factor for all of X changes
nothing); X at the answers' tokens; all of q, k, v, o, gate, up and down; η of the range told, α and
α_1 of 1, where P is a projector. --data isn't used: the command asks for it for other methods.
"""

import torch

from experiments.neighbours import checkpoints, shared
from model import MODULES
from run.files import run_command

ETA, ALPHA, ALPHA_1 = 0.85, 1.0, 1.0


def weighted_projector(ZZ, eta=ETA, alpha_1=ALPHA_1):
    """P (out, out) of Z·Zᵀ (out, out) float64, whose eigenvalues are Z's σ²."""
    power, U = torch.linalg.eigh(ZZ)
    power, U = power.flip(0), U.flip(1)
    # What is rounding alone has an entropy too
    power = power.masked_fill(power < 1e-12 * power[0], 0)
    entropy = torch.special.entr(power / power.sum()).cumsum(0)                 # H_1 … H_n
    r = int((entropy < eta * entropy[-1]).sum()) + 1
    S = power[:r].sqrt()
    # At r = 1 it is 0/0, and α_1
    height = ((S - S[-1]) / (S[0] - S[-1])).nan_to_num(nan=1.0)
    weighted = U[:, :r] * (1 + (alpha_1 - 1) * height)
    return weighted @ weighted.T


@torch.no_grad()
def fuse(aligned, finetuned, unaligned, refusals, _=None, eta=ETA, alpha=ALPHA, alpha_1=ALPHA_1):
    """Change the fine-tuned model's weights, in place."""
    moments = shared.input_moments(aligned, refusals, MODULES)
    for name, XX in moments.items():
        weight, safe, unsafe = (model.get_submodule(name).weight
                                for model in (finetuned, aligned, unaligned))
        W = safe.double()
        P = weighted_projector(W @ XX @ W.T, eta, alpha_1)
        weight += (alpha * P @ (W - unsafe.double())).to(weight.dtype)


if __name__ == "__main__":
    run_command(lambda: checkpoints.main(__doc__, fuse))
