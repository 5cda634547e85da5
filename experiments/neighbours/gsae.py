"""GSAE (arXiv 2512.06655): decoder rows smooth over the graph of what is active together.

    python -m experiments.neighbours.gsae --out runs/gsae       # saes.train's flags

H (n, D) has a row for each text, the mean of its residual stream. A_ij is the cosine of H's columns
i and j where that is at least .6, else 0, as A_ii. R = diag(A's row sums), w_f (D) a decoder row:

    L = I − R^(−½)·A·R^(−½),   loss + λ·mean_f w_f·L·w_fᵀ

Some features steer: x ← x + α·Σ_f s_f·cos(x, v_f)·v_f, v_f = w_f/‖w_f‖, Σ s = 1, s_f ∝ e_f times
f's importance, e_f = Σ_j U_fj² of the lower eigenvectors U of such an L of the v, joined from .4.

From the code at github.com/Jeybird248/GraphSAE, gsae.py at 9f24719; the paper's numbers couldn't be
looked up. Ours: a text is a run of 64 tokens; the loss is saes.train's (there ReLU, ℓ1 and a
classifier of harm), λ = .1 (there .001, which moves nothing on the toy); the paper's selection,
importance |Δ| (there both by classifiers); α in units of ‖x‖; all tokens are steered (there
detectors of harm say when, and begin the answer with "Sorry").
"""

import torch
from torch.nn.functional import normalize

from features import choose_features
from run.files import InputError, run_command
from saes import train
from saes.step import Trainer

WEIGHT, TEXT = 0.1, 64          # λ, tokens of a text


def laplacian(rows, threshold):
    """L (m, m) of the graph that joins rows (m, n) whose cosine is at least the threshold."""
    cosine = normalize(rows, dim=1) @ normalize(rows, dim=1).T
    A = torch.where(cosine >= threshold, cosine, 0).fill_diagonal_(0)
    root = A.sum(1).clamp(min=1e-8).rsqrt()
    return torch.eye(len(A)).to(A) - root[:, None] * A * root


class GraphTrainer(Trainer):
    def gradients(self, x, done=0.5):
        loss, error, codes, grad = super().gradients(x, done)
        W = self.parameters["W_dec"]
        slope = WEIGHT / len(W) * W @ self.laplacian                    # (F, D)
        grad["W_dec"] += 2 * slope
        return loss + (W * slope).sum(), error, codes, grad

    def state(self):
        return super().state() | {"laplacian": self.laplacian}

    def restore(self, state):
        self.laplacian = state["laplacian"]
        super().restore(state)


class GraphTraining(train.Training):
    def _trainer(self, mean):
        return GraphTrainer(self.spec, mean, torch.Generator().manual_seed(self.seed))

    def _begin(self, activations):
        super()._begin(activations)
        for layer, x in activations.items():
            texts = x[:len(x) // TEXT * TEXT].float().unflatten(0, (-1, TEXT)).mean(1)
            self.trainers[layer].laplacian = L = laplacian(texts.T, 0.6)
            if L.count_nonzero() == len(L):
                raise InputError(f"--layers {layer}: no two coordinates are active together")


def edit(sae, statistics, strength, top_k=20):
    """x (B, T, D) -> steered x, α = strength: `with safety.ask.edited(model, {layer: edit(…)})`."""
    features = choose_features(statistics, top_k)
    V = normalize(sae.directions(features), dim=1)                      # (k, D)
    values, U = torch.linalg.eigh(laplacian(V, 0.4))
    s = U[:, values <= values.median()].square().sum(1) * statistics.delta.abs().to(V)[features]
    M = strength / s.sum() * V.T @ (s[:, None] * V)                     # (D, D)
    return lambda x: x + x @ M.to(x)


if __name__ == "__main__":
    train.Training = GraphTraining      # type: ignore[misc]
    run_command(train.main)
