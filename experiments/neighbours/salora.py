"""SaLoRA (arXiv 2501.01765): an adapter that can't write where refusals are written.

    python -m experiments.neighbours.salora --init salora --out runs/salora

Over harmful prompts and their refusals a module of weight W writes W·X_s. It gets

    ΔW = C·B·A,   C = I − U_c·U_cᵀ,   U_c (out, r_s) the leading left singular vectors of W·X_s

and begins at the task's own part of the weight: with U_r·S_r·V_rᵀ the leading part of W, and U_t
(out, r_t) the leading left singular vectors of W·X_t, X_t the inputs on the data trained on,

    B = U_t·U_tᵀ·U_r·√S_r,   A = √S_r·V_rᵀ,   W − C·B·A in the place of W,

so that the first step begins at the base model (`shared.Start` holds −C·B·A of the beginning as a
second half of the adapter). A and B are trained, C never is. The formulas are
those of the code at github.com/homles11/SaLoRA, lora_train_act.py; the paper's numbers for them
couldn't be looked up.
Ours: r_s = r_t = r (there 32, 32 and 16); o as well as q, k, v (there q and v); X are the inputs at
the answers' tokens, as there; X_s are the refusals of --data, X_t all of its aligned answers. Its
place is fine-tuning after alignment: give an aligned --model, and data that holds both.
"""

import torch

import lora
from experiments.neighbours import shared
from run import parallel


def leading(M, count):
    """Eigenvectors of the `count` largest eigenvalues of a symmetric M (out, out), float32."""
    return torch.linalg.eigh(M).eigenvectors[:, -count:].float()


def start(weight, safe, task, rank) -> shared.Start:
    """A module's Start, of its weight and the moments X_s·X_sᵀ and X_t·X_tᵀ (in, in)."""
    W = weight.double()
    U_c = leading(W @ safe @ W.T, rank)
    U_t = leading(W @ task @ W.T, rank)
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
    root = S[:rank].sqrt()
    B = U_t @ U_t.T @ (U[:, :rank] * root)
    A = root[:, None] * V[:rank]
    return shared.Start(A, B, left=torch.eye(len(W), device=W.device) - U_c @ U_c.T)


def starts(model, refusals, answers, targets, rank):
    """{module: Start} of all targets, by the refusals and the answers of the task."""
    safe = shared.input_moments(model, refusals, targets)
    task = shared.input_moments(model, answers, targets)
    return {name: start(module.weight, safe[name], task[name], rank)
            for name, module in lora.linears(model, targets).items()}


def from_settings(settings, model, tokenizer, examples):
    refusals = shared.refusals(settings, tokenizer, examples)
    answers = [pair[0] for pair in examples]
    return starts(model, refusals, answers, settings.targets, settings.rank)


if __name__ == "__main__":
    parallel.run(lambda: shared.main("salora", from_settings))
