"""SSAH (arXiv 2410.10862): freeze the units that safety needs while a model is fine-tuned again.

    python -m experiments.neighbours.ssah --safety FILE --model ALIGNED --init random
    python -m experiments.neighbours.ssah --safety FILE --model ALIGNED --method full

MLP and attention are B·σ(A·X). Unit j is input j of B: B's column j and the rows of A that make it.
With X_nj this input at token n of N, its importance is

    I_j = 1/(N − 1) · Σ_n (X_nj − X̄_j)² · ‖W_B,j‖²,   I_S over refusals, I_U over harmless answers

The smallest I_S + I_U are redundant. Of the rest the largest I_S − I_U are exclusive to safety and
the smallest to utility; others are complex. Frozen are exclusive safety and top complex units.
Formulas and SHARES (Llama-2-7B's) are as github.com/zhaoyang97/Paper-Notes, docs/ICLR2026, tells
the paper, which couldn't be looked up; its code wasn't read. Ours: the shares hold in each module;
"top" is the largest I_S; n runs over answers' tokens; units of attention are o's inputs, with rows
of v, and q and k stay free. A LoRA freezes rows (of B) and columns (of A), and no single weight.
"""

import math

import torch

import train
from experiments.neighbours import shared
from lora import leaf
from run import parallel

FEEDERS = {"o_proj": ("v_proj",), "down_proj": ("gate_proj", "up_proj")}        # B: A
SHARES = {"redundant": .148, "safety": .013, "utility": .133, "complex": .06}


def importance(model, examples):
    """{name of B: I (units,) float64}."""
    modules = {name: module for name, module in model.named_modules() if leaf(name) in FEEDERS}
    sums = shared.input_sums(model, examples, modules, lambda X: torch.stack(
        (torch.ones_like(X), X, X.square())).sum(1))
    for name, (N, total, squares) in sums.items():
        W_B = getattr(modules[name], "base", modules[name]).weight.double()     # (out, units)
        sums[name] = (squares - total.square() / N) / (N - 1) * W_B.square().sum(0)
    return sums


def frozen_units(I_S, I_U):
    """(units,) True at the exclusive safety units and the top complex ones."""
    scores = {"redundant": -I_S - I_U, "safety": I_S - I_U, "utility": I_U - I_S, "complex": I_S}
    taken, frozen = torch.zeros(2, len(I_S), dtype=torch.bool, device=I_S.device)
    for kind, share in SHARES.items():
        count = math.ceil(share * len(I_S))
        chosen = scores[kind].masked_fill(taken, -math.inf).topk(count).indices
        taken[chosen] = True
        frozen[chosen] = kind in ("safety", "complex")
    return frozen


def frozen_masks(model, refusals, harmless) -> dict:
    """{module: mask}: (1, in) of a B's columns or (out, 1) of an A's rows, True where frozen."""
    I_S, I_U = importance(model, refusals), importance(model, harmless)
    heads, masks = model.config.num_key_value_heads, {}
    for name in I_S:
        rows = columns = frozen_units(I_S[name], I_U[name])
        if leaf(name) == "o_proj":      # a row of v serves all query heads of its group
            rows = columns.view(heads, -1, model.config.head_dim).any(1).flatten()
        masks[name] = columns[None]
        masks |= {name.replace(leaf(name), A): rows[:, None] for A in FEEDERS[leaf(name)]}
    return masks


def main():
    safety, fit = shared.own_flag("safety", "FILE, refusals and harmless answers"), train.train

    def fit_frozen(settings, model, *rest):
        # At the base's weights: a run that goes on freezes the same
        shared.freeze(model, frozen_masks(model, *shared.safety_answers(safety, settings)))
        fit(settings, model, *rest)
    train.train = fit_frozen
    return train.main()


if __name__ == "__main__":
    parallel.run(main)
