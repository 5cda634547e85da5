"""One SAE in training: a step on a batch of inputs, its gradients written out.

    trainer = Trainer(Spec(architecture="sasa", width=512, block=4, l0=12), mean, generator)
    metrics = trainer.step(x, done=0.1)          # x (N, D) of power 1 about `mean`; at a tenth of the training
    arrays = trainer.arrays(scale)               # what sae.py saves, for inputs `scale` times as large

Letters: N tokens of a batch, D width of the residual stream, F features, r features of a block, K = F/r units.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sae import strongest


@dataclass(frozen=True)
class Spec:
    """What is trained, and how."""
    architecture: str = "batchtopk"
    width: int = 512              # F
    l0: int = 12                  # coefficients a token: a target for jumprelu, a mean for batchtopk, exact for sasa and topk
    block: int = 1                # r; sasa only
    nuclear: float = 0.0          # λ of mean_k ‖D_k‖_*, in units of the input's power; sasa only
    lr: float = 2e-3              # peak of Adam's
    warmup: float = 0.05          # share of the steps over which the rate rises; jumprelu's L0 penalty rises over 5 times that
    decay: float = 0.5            # share of the steps, the last ones, over which it falls to 0
    sparsity: float = 1.0         # jumprelu: weight of (L0/target − 1)²
    bandwidth: float = 0.2        # jumprelu: ε of the straight-through estimator, in units of the input's root power
    dead_after: int = 80_000      # tokens of silence after which a unit is dead
    revival: float = 1 / 32       # weight of the auxiliary loss, which has dead units explain what the others leave

    @property
    def active(self):
        return max(1, self.l0 // self.block)


class Trainer:
    """Trains one SAE, a batch at a time, on inputs of mean 0-centred power 1. Gradients are written out: five products
    of matrices a step, where autograd would make six and keep a copy of every (N, F) tensor.

    W_enc (D, F), b_enc (F), W_dec (F, D) with rows of unit length, b_dec (D), log_theta (F) for jumprelu.
    """

    def __init__(self, spec, mean, draw):
        """mean (D): of the inputs, where b_dec begins; draw: the generator of the weights."""
        self.spec, device = spec, mean.device
        D, n = len(mean), spec.width
        if spec.block > 1:       # blocks that begin orthonormal, and the encoder as the decoder's transpose
            W_dec = torch.linalg.qr(torch.randn(n // spec.block, D, spec.block, generator=draw)).Q.mT.reshape(n, D)
        else:
            W_dec = F.normalize(torch.randn(n, D, generator=draw), dim=1)
        self.parameters = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(n), "W_dec": W_dec, "b_dec": mean.float().clone()}
        if spec.architecture == "jumprelu":  # of D numbers of power 1, one in ten or so lies above
            self.parameters["log_theta"] = torch.full((n,), math.log(1.3 / D ** 0.5))
        self.parameters = {name: value.to(device) for name, value in self.parameters.items()}
        # Thresholds are logarithms, and have further to go than weights
        groups = [{"params": [value], "factor": 10.0 if name == "log_theta" else 1.0} for name, value in self.parameters.items()]
        self.optimizer = torch.optim.Adam(groups, lr=spec.lr, betas=(0.9, 0.99), fused=True)
        self.silent = torch.zeros(n // spec.block, device=device)      # tokens since each unit was last active
        self.threshold = torch.zeros((), device=device)                # batchtopk: running mean of the least that stays
        self.mean = {}                                                 # running means of the metrics

    @torch.no_grad()
    def step(self, x: torch.Tensor, done: float) -> dict:
        """One step on x (N, D), at the share `done` of training. {"ev", "l0", "dead"} as tensors."""
        loss, error, f, gradients = self.gradients(x, done)
        W_dec = self.parameters["W_dec"]
        g = gradients["W_dec"]
        g.addcmul_(W_dec, (g * W_dec).sum(1, keepdim=True), value=-1)  # what would only change a row's length
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        spec = self.spec
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * spec.lr * min(1.0, (done + 1e-3) / max(spec.warmup, 1e-3), (1 - done) / max(spec.decay, 1e-9))
        self.optimizer.step()
        W_dec.copy_(F.normalize(W_dec, dim=1))
        active = (f != 0).unflatten(1, (-1, spec.block)).any(2) if spec.block > 1 else f != 0      # (N, K)
        self.silent = torch.where(active.any(0), 0, self.silent + len(x))
        power = (x - x.mean(0)).square().sum()
        metrics = {"loss": loss, "ev": 1 - error.square().sum() / power, "l0": (f != 0).sum() / len(x),
                   "dead": (self.silent >= spec.dead_after).float().mean()}
        self.mean = {name: 0.95 * self.mean.get(name, value) + 0.05 * value for name, value in metrics.items()}
        return metrics

    @torch.no_grad()
    def gradients(self, x, done=0.5):
        """(loss, error x̂ − x (N, D), codes (N, F), {parameter: gradient}) for a batch x (N, D)."""
        spec, p = self.spec, self.parameters
        W_enc, W_dec, N = p["W_enc"], p["W_dec"], len(x)
        h = torch.addmm(p["b_enc"] - p["b_dec"] @ W_enc, x, W_enc)                   # (N, F), with no copy of x − b_dec
        dead = self._dead()
        h_dead = h[:, dead] if len(dead) else None                                  # h becomes the codes below
        if spec.architecture == "jumprelu":
            theta = p["log_theta"].exp()
            near = ((h - theta).abs_() < spec.bandwidth / 2)                        # where the estimator's kernel is 1/ε
        keep = self._gate(h)                                                         # (N, F), 0 or 1
        f = h.mul_(keep)
        error = torch.addmm(p["b_dec"], f, W_dec).sub_(x)
        loss = error.square().sum() / N
        g = error * (2 / N)
        grad = {"W_dec": f.T @ g, "b_dec": g.sum(0)}
        dh = g @ W_dec.T                                                             # (N, F): of the codes
        if spec.architecture == "jumprelu":
            weight = spec.sparsity * min(1.0, done / (5 * spec.warmup + 1e-9))
            l0 = (f != 0).sum() / N
            pull = 2 * weight * (l0 / spec.l0 - 1) / spec.l0 / N                     # of the loss by each unit of Σ 1[h > θ]
            loss = loss + weight * (l0 / spec.l0 - 1) ** 2
            # d f/dθ = −θ/ε and d 1[h > θ]/dθ = −1/ε where |h − θ| < ε/2, and θ = exp(log θ)
            grad["log_theta"] = -(near * (dh * theta + pull)).sum(0) * theta / spec.bandwidth
        dh *= keep
        grad["W_enc"], grad["b_enc"] = x.T @ dh, dh.sum(0)
        if len(dead):
            loss = loss + self._revive(x, error, h_dead, dead, grad)
        grad["W_enc"] -= torch.outer(p["b_dec"], grad["b_enc"])                      # the encoder sees x − b_dec
        grad["b_dec"] -= W_enc @ grad["b_enc"]
        if spec.nuclear:
            value, slope = nuclear_norm(W_dec.unflatten(0, (-1, spec.block)))
            scale = spec.nuclear / len(value)
            loss = loss + scale * value.sum()
            grad["W_dec"] += scale * slope.flatten(0, 1)
        return loss, error, f, grad

    def _gate(self, h):
        """(N, F) float: 1 where h stays."""
        spec = self.spec
        if spec.architecture == "jumprelu":
            return (h > self.parameters["log_theta"].exp()).to(h.dtype)
        if spec.architecture == "sasa":
            return strongest(h.unflatten(1, (-1, spec.block)), spec.active).repeat_interleave(spec.block, 1)
        if spec.architecture == "topk":
            return strongest(h.clamp(min=0)[..., None], spec.l0) * (h > 0)
        least = least_kept(h, spec.l0 * len(h), self.threshold)
        self.threshold = torch.where(self.threshold > 0, 0.98 * self.threshold + 0.02 * least, least)
        return (h >= least).to(h.dtype)

    def _dead(self):
        """Features (n) of dead units, those silent longest first, at most F/4 of them."""
        spec = self.spec
        units = self.silent.sort(descending=True, stable=True)
        count = min(int((units.values >= spec.dead_after).sum()), max(1, len(self.silent) // 4))
        return (units.indices[:count, None] * spec.block + torch.arange(spec.block, device=units.indices.device)).flatten()

    def _revive(self, x, error, h, dead, grad):
        """Auxiliary loss α‖(x − x̂) − ẑ‖² with ẑ made by the strongest dead units of each token, h (N, n); adds to `grad`."""
        spec, N = self.spec, len(x)
        W = self.parameters["W_dec"][dead]                                           # (n, D)
        p = h.unflatten(1, (-1, spec.block))
        p = p.clamp(min=0) if spec.architecture != "sasa" else p
        keep = strongest(p, min(p.shape[1], max(spec.active, len(error[0]) // (4 * spec.block)))).repeat_interleave(spec.block, 1)
        z = p.flatten(1) * keep
        miss = torch.addmm(error, z, W)                                              # x̂ + ẑ − x
        g = miss * (2 * spec.revival / N)
        dz = (g @ W.T).mul_(z != 0)
        grad["W_dec"].index_add_(0, dead, z.T @ g)
        grad["W_enc"].index_add_(1, dead, x.T @ dz)
        grad["b_enc"].index_add_(0, dead, dz.sum(0))
        return spec.revival * miss.square().sum() / N

    def arrays(self, scale):
        """The arrays of sae.py, for inputs `scale` times those seen here: b_dec and the scale folded in, W_dec unit."""
        p = self.parameters
        out = {"W_enc": p["W_enc"], "W_dec": p["W_dec"], "b_dec": scale * p["b_dec"],
               "b_enc": scale * (p["b_enc"] - p["b_dec"] @ p["W_enc"])}
        if self.spec.architecture == "jumprelu":
            out["threshold"] = scale * p["log_theta"].exp()
        elif self.spec.architecture == "batchtopk":
            out["threshold"] = (scale * self.threshold.clamp(min=0)).expand(self.spec.width).clone()
        return {name: value.detach().clone() for name, value in out.items()}

    def state(self):
        """Every tensor that the next step depends on."""
        out = {"silent": self.silent, "threshold": self.threshold} | {f"mean.{name}": value for name, value in self.mean.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            out |= {name: parameter} | {f"{name}.{moment}": moments[moment] for moment in moments}
        return out

    def restore(self, tensors):
        """Put back what `state` gave."""
        device = self.silent.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.silent, self.threshold = tensors["silent"], tensors["threshold"]
        self.mean = {name.removeprefix("mean."): value for name, value in tensors.items() if name.startswith("mean.")}
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            self.optimizer.state[parameter] = {moment: tensors[f"{name}.{moment}"] for moment in ("step", "exp_avg", "exp_avg_sq")}


def least_kept(h, count, guess):
    """The `count`-th largest value of h, at least 1e-12. Only what lies above half of `guess`, the last such value, is
    sorted, where that is enough: of a wide batch, a hundredth of all."""
    flat = h.flatten()
    if guess > 0:
        above = flat[flat > guess / 2]
        flat = above if len(above) >= count else flat
    return flat.topk(min(count, len(flat)), sorted=False).values.min().clamp(min=1e-12)


def nuclear_norm(blocks: torch.Tensor, ridge=1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """(‖D_k‖_* (K), its gradient (K, r, D)) of blocks D_k (K, r, D), r ≤ D, through the r × r matrices D_k·D_kᵀ.

    With D Dᵀ = V Λ Vᵀ the norm is Σ √λ and the gradient, the polar factor, V Λ^(−1/2) Vᵀ D; the ridge is added to Λ, so that
    both are those of Σ √(λ + ridge) exactly, and finite where a block has lost rank.
    """
    values, V = torch.linalg.eigh(blocks @ blocks.mT)
    root = (values.clamp(min=0) + ridge).sqrt()                                      # (K, r)
    return root.sum(1), (V / root[:, None]) @ (V.mT @ blocks)


def ranks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(stable rank ‖D‖_F²/‖D‖₂², effective rank exp H(σ²/Σσ²)) of each block (K, r, D): 1 to r."""
    power = torch.linalg.eigvalsh(blocks @ blocks.mT).clamp(min=0)
    share = power / power.sum(1, keepdim=True)
    return power.sum(1) / power[:, -1], torch.exp(-torch.special.xlogy(share, share).sum(1))
