"""SSPU (arXiv 2505.24428): unlearn harmful answers, within the SAE features that are theirs.

    python -m experiments.neighbours.sspu --select relevant --freeze-basis \\
        --targets o_proj down_proj --out runs/sspu

R are the --rank features of one SAE, the first of --layers, that are most active on what is to be
forgotten, less on what is to be kept, and N the last in that order. With h the residual stream at
that layer, h_0 the base model's, and u ~ N(0, I),

    U_R, U_N = Q of the QR of the decoder rows of R, of N
    c = U_N·U_Nᵀ·u, the control signal
    L = ‖h − c‖² at tokens to forget, ‖h − h_0‖² at tokens to keep,   ΔW = U_R·U_Rᵀ·ΔW

An account of the paper tells these steps in words; it and its code couldn't be looked up. Ours:
forgotten are answers that comply where the aligned one refuses, kept all aligned ones; ordered by
−Δ; c is as long as h_0, and L is divided by ‖h_0‖²; u is drawn once; ΔW = U_R·A of a LoRA.
"""

import torch
from torch.nn.functional import normalize

import features
import lora
import train
from data import pack
from experiments.neighbours import shared
from fused import IGNORE
from run import parallel
from run.files import InputError


def relevant(model, saes, pairs, statistics, settings):
    """{(layer, side): Choice}: U_R for writers, and U_N where readers would have theirs."""
    layer, k, choices = min(saes), settings.rank, {}
    delta = statistics[layer].delta.cpu()
    order = delta.argsort(stable=True)              # so that ties fall alike on every machine
    for side, units in (("writers", order[:k]), ("readers", order[-k:])):
        U = torch.linalg.qr(saes[layer].directions(units).float().cpu().T).Q.contiguous()
        choices[layer, side] = features.Choice(units, -delta[units], U, 1.0, "rank")
    return choices


def forget_and_keep(pairs, length, seed, epoch):
    """Rows to forget (labels 1) and to keep (0) by turns, of pairs (aligned, unaligned or None)."""
    forget = pack([unaligned for _, unaligned in pairs if unaligned], length, seed, epoch)
    keep = pack([aligned for aligned, _ in pairs], length, seed, epoch)
    for rows, label in ((forget, 1), (keep, 0)):
        for row in rows:
            row.labels[row.labels != IGNORE] = label
    return [row for both in zip(forget, keep) for row in both]


def objective(layer, U_N, seed):
    """L in the place of train.row_loss: summed over a row's labelled tokens."""
    u = torch.randn(len(U_N), generator=torch.Generator().manual_seed(seed))
    direction = normalize(U_N @ (U_N.T @ u), dim=0)

    def loss(model, row):
        h = model.hidden(row.tokens, row.documents, stop_after=layer)[0].float()
        with torch.no_grad(), lora.scaled(model, 0):
            base = model.hidden(row.tokens, row.documents, stop_after=layer)[0].float()
        length = base.norm(dim=-1, keepdim=True)                                # (B, T, 1)
        target = torch.where(row.labels[..., None] == 1, length * direction.to(base), base)
        return ((h - target) / length).square().sum(-1)[row.labels != IGNORE].sum()
    return loss


def prepare(settings, named, folder):
    writers = set(settings.targets) <= {"o_proj", "down_proj"}
    if settings.select != "relevant" or not settings.freeze_basis or not writers:
        raise InputError("give --select relevant --freeze-basis --targets o_proj down_proj")
    (layer, _), U_N = min(features.load_subspaces(folder / "subspace.safetensors").items())
    train.row_loss = objective(layer, U_N, settings.seed)
    # Later blocks have no part in h
    return [(name, part) for name, part in named if int(name.split(".")[1]) <= layer]


if __name__ == "__main__":
    features.SELECTIONS["relevant"] = relevant
    parallel.run(lambda: shared.main_of_pairs(forget_and_keep, prepare))
