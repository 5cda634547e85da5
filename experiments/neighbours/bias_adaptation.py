"""Group bias adaptation (arXiv 2506.14002): SAEs whose features fire as often as they are meant to.

    python -m experiments.neighbours.bias_adaptation --architecture jumprelu --out runs/gba

x̂ = Σ_m a_m·φ(y_m)·w_m + b_pre, y_m = w_m·(x − b_pre) + b_m. Gradients of ‖x̂ − x‖² move w, a and
b_pre. Feature m is of a group k with a target frequency p_k, geometric in k. Of a buffer of tokens
q_m is the share with y_m > 0, r_m = max(max y_m, 0), r̄_k its mean where above 0 (algorithm 2):

    b_m ← max(b_m − γ·r_m, −1) where q_m > p_k,    b_m ← min(b_m + γ·r̄_k, 0) where q_m < ε

From the authors' page, github.com/Y-Agent/Y-Agent.github.io at 38c2477, taming-sae-gba/. It prints
max in the second line too, which would lift each silent b to 0 at once. γ is papernotes.org's.
Ours: φ(y) = (y − b)·1[y > 0], Gemma Scope's JumpReLU at θ = −b (there no formula); ‖w‖ = 1; one
scale for all inputs (there each is normalised); ε; Σ p = --l0, p falling by 100 as there (.1 to
.001); the buffer is one batch (there 50), which wants a --batch above 1/min p.
"""

import torch

from run.files import InputError, run_command
from saes import train
from saes.step import Trainer

GROUPS, RATIO, GAMMA, EPSILON = 10, 100, 0.01, 1e-6


def adapted(b, y, member, p):
    """b (F) after algorithm 2: y (N, F) of a buffer, member (F, K) 1 or 0, targets p (K)."""
    q = (y > 0).float().mean(0)
    r = y.amax(0).clamp(min=0)
    mean_r = r @ member / ((r > 0).float() @ member).clamp(min=1)       # (K)
    higher = torch.where(q < EPSILON, (b + GAMMA * member @ mean_r).clamp(max=0), b)
    return torch.where(q > member @ p, (b - GAMMA * r).clamp(min=-1), higher)


class BiasTrainer(Trainer):
    """parameters: W_dec (F, D) is w, b_dec (D) b_pre, b_enc (F) b, and there is `a` (F)."""
    def __init__(self, spec, mean, draw):
        if spec.architecture != "jumprelu":
            raise InputError(f"--architecture {spec.architecture}: this SAE is a jumprelu")
        super().__init__(spec, mean, draw)
        kept = {name: self.parameters[name] for name in ("W_dec", "b_dec", "b_enc")}
        self.parameters = kept | {"a": torch.ones_like(kept["b_enc"])}
        rates = [{"params": [value], "peak": spec.lr} for value in self.parameters.values()]
        self.optimizer = torch.optim.Adam(rates, lr=spec.lr, betas=(0.9, 0.99), fused=True)
        self.member = torch.eye(GROUPS).to(mean)[torch.arange(spec.width) * GROUPS // spec.width]
        fall = RATIO ** (-torch.arange(GROUPS).to(mean) / (GROUPS - 1))
        self.p = spec.l0 * fall / (self.member @ fall).sum()

    def step(self, x, done):
        metrics, b = super().step(x, done), self.parameters["b_enc"]
        b.copy_(adapted(b, self.y, self.member, self.p))
        return metrics

    @torch.enable_grad()
    def gradients(self, x, done=0.5):
        p = {name: value.clone().requires_grad_() for name, value in self.parameters.items()}
        along = (x - p["b_dec"]) @ p["W_dec"].T                         # (N, F), y − b
        self.y = along.detach() + self.parameters["b_enc"]
        codes = p["a"] * along * (self.y > 0)
        error = codes @ p["W_dec"] + p["b_dec"] - x                     # (N, D)
        loss = error.square().sum() / len(x)
        grad = torch.autograd.grad(loss, list(p.values()), materialize_grads=True)  # b's is 0
        return loss.detach(), error.detach(), codes.detach(), dict(zip(p, grad))

    def arrays(self, scale):
        w, b_pre, b, a = self.parameters.values()
        W_enc = w.T * a.abs()                       # in the encoder, so that decoder rows stay unit
        return {"W_enc": W_enc, "b_enc": -scale * b_pre @ W_enc, "threshold": -scale * b * a.abs(),
                "W_dec": w * torch.where(a < 0, -1, 1)[:, None], "b_dec": scale * b_pre}


class BiasTraining(train.Training):
    def _trainer(self, mean):
        return BiasTrainer(self.spec, mean, torch.Generator().manual_seed(self.seed))


if __name__ == "__main__":
    train.Training = BiasTraining       # type: ignore[misc]
    run_command(train.main)
