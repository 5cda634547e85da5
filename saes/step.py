"""One SAE in training: the objectives of JumpReLU, BatchTopK and SASA, and a step on a batch.

    trainer = Trainer(Spec("sasa", width=512, l0=12, block=4), mean, generator)
    metrics = trainer.step(x, done=0.1)      # x (N, D) of power 1 about `mean`; a tenth is trained
    arrays = trainer.arrays(scale)           # what sae.py saves, for inputs `scale` times as large

Letters: N tokens of a batch, D width of the residual stream, F features, r features of a block,
K = F/r units.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sae import strongest

REVIVAL = 1 / 32      # weight α of the auxiliary loss, which revives dead units
SASA_REVIVAL = 1.0    # the same, as SASA's authors have it
SASA_NUCLEAR = 0.01   # λ of saes/train.py


@dataclass(frozen=True)
class Spec:
    """What is trained, and how."""
    architecture: str = "batchtopk"  # or jumprelu, sasa, topk
    width: int = 512          # F
    l0: int = 12              # coefficients a token: jumprelu a target, batchtopk a mean
    block: int = 1            # r; sasa only
    nuclear: float = 0.0      # λ of mean_k ‖D_k‖_*, in units of the input's power; sasa only
    lr: float = 2e-3          # peak learning rate of Adam
    warmup: float = 0.05      # share of the steps that warm up, for jumprelu's L0 penalty ×5
    decay: float = 0.5        # share of the steps, the last ones, in which the rate falls to 0
    bandwidth: float = 0.2    # jumprelu: ε of the straight-through estimator, for inputs of power 1
    dead_after: int = 80_000  # tokens of silence after which a unit is dead

    @property
    def revival(self):
        return SASA_REVIVAL if self.architecture == "sasa" else REVIVAL

    @property
    def active(self):
        """Units that a token keeps."""
        return self.l0 // self.block


class Trainer:
    """Trains one SAE, a batch at a time, on inputs of power 1 about their mean.

    The loss is the mean over tokens of ‖x − x̂‖², where h = (x − b_dec)·W_enc + b_enc,
    f = gate(h) · h and x̂ = f·W_dec + b_dec. The architectures differ in the gate:

        jumprelu   h > θ, θ by a straight-through estimator; adds (L0/target − 1)² (2407.14435)
        batchtopk  h is among the N·l0 largest of the batch (2412.06410)
        topk       h is among the l0 largest of its token (2406.04093)
        sasa       its block is among the `active` strongest; adds λ·mean ‖D_k‖_* (2606.06333)

    Gradients are written out: five products of matrices a step, where autograd would make six and
    keep a copy of every (N, F) tensor.

    parameters: W_enc (D, F), b_enc (F), W_dec (F, D) with rows of unit length, b_dec (D), and
    log_theta (F) for jumprelu. A SASA's columns of W_enc have unit length too.
    """

    def __init__(self, spec, mean, draw):
        """mean (D): of the inputs, where b_dec begins; draw: the generator of the weights."""
        self.spec = spec
        device = mean.device
        D = len(mean)
        num_features = spec.width
        num_units = num_features // spec.block
        W_dec = F.normalize(torch.randn(num_features, D, generator=draw), dim=1)
        # The encoder begins as the decoder's transpose: a unit then finds what it writes
        parameters = {
            "W_enc": W_dec.T.contiguous(),
            "b_enc": torch.zeros(num_features),
            "W_dec": W_dec,
            "b_dec": mean.float().clone()}
        # About a tenth of the features begins above θ, for inputs of D numbers and power 1
        if spec.architecture == "jumprelu":
            parameters["log_theta"] = torch.full((num_features,), math.log(1.3 / D ** 0.5))
        self.parameters = {name: value.to(device) for name, value in parameters.items()}
        # Whose vectors have unit length, and along which dimension they lie
        self.unit_length = {"W_dec": 1}
        if spec.architecture == "sasa":
            self.unit_length["W_enc"] = 0

        # Thresholds are logarithms, and have further to go than weights
        groups = []
        for name, parameter in self.parameters.items():
            rate = spec.lr * (10 if name == "log_theta" else 1)
            groups.append({"params": [parameter], "peak": rate})
        self.optimizer = torch.optim.Adam(groups, lr=spec.lr, betas=(0.9, 0.99), fused=True)
        self.silent = torch.zeros(num_units, device=device)  # tokens since a unit was last active
        self.threshold = torch.zeros((), device=device)      # batchtopk: mean least h to stay
        self.mean = {}                                       # running means of the metrics

    @torch.no_grad()
    def step(self, x: torch.Tensor, done: float) -> dict:
        """One step on x (N, D), at the share `done` of training.

        Returns scalar tensors "loss", "ev" (explained variance), "l0" and "dead" (share of units).
        """
        spec = self.spec
        loss, error, codes, gradients = self.gradients(x, done)

        # Take out the part of the gradient that would only change the length
        for name, dim in self.unit_length.items():
            W = self.parameters[name]
            along = (gradients[name] * W).sum(dim, keepdim=True)
            gradients[name].addcmul_(W, along, value=-1)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]

        # The rate rises over the first steps, and falls to 0 over the last
        warmup = (done + 1e-3) / spec.warmup
        decay = (1 - done) / spec.decay
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, warmup, decay)
        self.optimizer.step()
        # A step along the sphere leaves it a little
        for name, dim in self.unit_length.items():
            W = self.parameters[name]
            W.copy_(F.normalize(W, dim=dim))

        # Metrics are of the weights before the step
        fires = codes != 0
        if spec.block > 1:
            fires = fires.unflatten(1, (-1, spec.block)).any(2)  # (N, K)
        self.silent = torch.where(fires.any(0), 0, self.silent + len(x))
        power = (x - x.mean(0)).square().sum()
        metrics = {
            "loss": loss,
            "ev": 1 - error.square().sum() / power,
            "l0": (codes != 0).sum() / len(x),
            "dead": (self.silent >= spec.dead_after).float().mean()}
        # A batch's figures are noisy: what is reported at the end is a running mean
        for name, value in metrics.items():
            self.mean[name] = 0.95 * self.mean.get(name, value) + 0.05 * value
        return metrics

    @torch.no_grad()
    def gradients(self, x, done=0.5):
        """(loss, error x̂ − x (N, D), codes (N, F), {parameter: gradient}) for a batch x (N, D)."""
        spec = self.spec
        p = self.parameters
        W_enc = p["W_enc"]
        W_dec = p["W_dec"]
        N = len(x)
        # b_dec goes through the encoder apart from x, which spares a copy of x − b_dec
        h = torch.addmm(p["b_enc"] - p["b_dec"] @ W_enc, x, W_enc)  # (N, F)

        # What needs h is taken now, since h becomes the codes in place
        dead = self._dead_features()
        h_dead = h[:, dead]
        if spec.architecture == "jumprelu":
            theta = p["log_theta"].exp()
            near = (h - theta).abs_() < spec.bandwidth / 2  # where the estimator's kernel is 1/ε

        # Forward
        gate = self._gate(h)  # (N, F), 0 or 1
        codes = h.mul_(gate)
        error = torch.addmm(p["b_dec"], codes, W_dec).sub_(x)
        loss = error.square().sum() / N

        # Backward, from x̂ to the codes
        d_x_hat = error * (2 / N)
        grad = {}
        grad["W_dec"] = codes.T @ d_x_hat
        grad["b_dec"] = d_x_hat.sum(0)
        d_codes = d_x_hat @ W_dec.T  # (N, F)
        if spec.architecture == "jumprelu":
            weight = min(1.0, done / (5 * spec.warmup + 1e-9))
            miss = (codes != 0).sum() / N / spec.l0 - 1
            loss = loss + weight * miss ** 2
            # d f/dθ = −θ/ε and d 1[h > θ]/dθ = −1/ε where |h − θ| < ε/2, and θ = exp(log θ)
            d_count = 2 * weight * miss / spec.l0 / N  # of the loss by Σ 1[h > θ]
            d_theta = -(near * (d_codes * theta + d_count)).sum(0)
            grad["log_theta"] = d_theta * theta / spec.bandwidth

        # From the codes to the encoder
        d_codes *= gate
        grad["W_enc"] = x.T @ d_codes
        grad["b_enc"] = d_codes.sum(0)
        # Units that have gone silent get no gradient above: they learn the error that is left
        if len(dead):
            loss = loss + self._revive(x, error, h_dead, dead, grad)
        # The encoder sees x − b_dec
        grad["W_enc"] -= torch.outer(p["b_dec"], grad["b_enc"])
        grad["b_dec"] -= W_enc @ grad["b_enc"]
        # The penalty on blocks that spread over more dimensions than they need
        if spec.nuclear:
            norms, slope = nuclear_norm(W_dec.unflatten(0, (-1, spec.block)))
            scale = spec.nuclear / len(norms)
            loss = loss + scale * norms.sum()
            grad["W_dec"] += scale * slope.flatten(0, 1)
        return loss, error, codes, grad

    def _gate(self, h):
        """(N, F) float: 1 where h stays."""
        spec = self.spec
        if spec.architecture == "jumprelu":
            return (h > self.parameters["log_theta"].exp()).to(h.dtype)
        if spec.architecture == "sasa":
            blocks = strongest(h.unflatten(1, (-1, spec.block)), spec.active)
            return blocks.repeat_interleave(spec.block, 1)
        if spec.architecture == "topk":
            return strongest(h.clamp(min=0)[..., None], spec.l0) * (h > 0)
        # The threshold of the SAE that is written is the running mean of the batches' own
        least = least_kept(h, spec.l0 * len(h), self.threshold)
        average = 0.98 * self.threshold + 0.02 * least
        self.threshold = torch.where(self.threshold > 0, average, least)
        return (h >= least).to(h.dtype)

    def _dead_features(self):
        """Features (n) of dead units, those silent longest first, of at most a quarter of all."""
        spec = self.spec
        # A stable order makes a resumed training choose the same among equals
        units = self.silent.sort(descending=True, stable=True)
        num_dead = int((units.values >= spec.dead_after).sum())
        num_dead = min(num_dead, max(1, len(self.silent) // 4))
        within = torch.arange(spec.block, device=units.indices.device)
        return (units.indices[:num_dead, None] * spec.block + within).flatten()

    def _revive(self, x, error, h, dead, grad):
        """The auxiliary loss α‖(x − x̂) − ẑ‖², so that dead units learn what the others leave.

        ẑ is made by the strongest dead units of each token, h (N, n) is of the dead features, and
        the error is a constant. Adds to `grad`. (arXiv 2406.04093, appendix A.2)
        """
        spec = self.spec
        N, D = x.shape
        W_dec = self.parameters["W_dec"][dead]  # (n, D)
        p = h.unflatten(1, (-1, spec.block))
        if spec.architecture != "sasa":
            p = p.clamp(min=0)
        # Many more may be active than in training: the error is dense
        num_active = min(p.shape[1], max(spec.active, D // (4 * spec.block)))
        z = p.flatten(1) * strongest(p, num_active).repeat_interleave(spec.block, 1)
        miss = torch.addmm(error, z, W_dec)  # x̂ + ẑ − x
        # The backward of the same, added where the dead rows and columns lie
        d_miss = miss * (2 * spec.revival / N)
        d_z = (d_miss @ W_dec.T).mul_(z != 0)
        grad["W_dec"].index_add_(0, dead, z.T @ d_miss)
        grad["W_enc"].index_add_(1, dead, x.T @ d_z)
        grad["b_enc"].index_add_(0, dead, d_z.sum(0))
        return spec.revival * miss.square().sum() / N

    def arrays(self, scale):
        """The tensors of sae.py for inputs `scale` times those seen here; b_dec is folded in."""
        p = self.parameters
        arrays = {
            "W_enc": p["W_enc"],
            "b_enc": scale * (p["b_enc"] - p["b_dec"] @ p["W_enc"]),
            "W_dec": p["W_dec"],
            "b_dec": scale * p["b_dec"]}
        if self.spec.architecture == "jumprelu":
            arrays["threshold"] = scale * p["log_theta"].exp()
        elif self.spec.architecture == "batchtopk":
            arrays["threshold"] = (scale * self.threshold.clamp(min=0)).expand(self.spec.width)
        return {name: value.clone() for name, value in arrays.items()}

    def state(self):
        """{name: tensor} of all that the next step depends on."""
        state = {"silent": self.silent, "threshold": self.threshold}
        state |= {f"mean.{name}": value for name, value in self.mean.items()}
        for name, parameter in self.parameters.items():
            state[name] = parameter
            for moment, value in self.optimizer.state[parameter].items():
                state[f"{name}.{moment}"] = value
        return state

    def restore(self, state):
        """Put back what `state` gave."""
        self.silent = state["silent"]
        self.threshold = state["threshold"]
        for name in ("loss", "ev", "l0", "dead"):
            self.mean[name] = state[f"mean.{name}"]
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
            moments = {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = moments


def least_kept(h, count, guess):
    """The `count`-th largest value of h, at least 1e-12.

    Sorts only what lies above half of `guess`, the last such value, where that is enough: a
    hundredth of a wide batch.
    """
    values = h.flatten()
    if guess > 0:
        above = values[values > guess / 2]
        values = above if len(above) >= count else values
    count = min(count, len(values))
    largest = values.topk(count, sorted=False).values
    return largest.min().clamp(min=1e-12)


def nuclear_norm(blocks: torch.Tensor, ridge=1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """(‖D_k‖_* (K), its gradient (K, r, D)) of blocks D_k (K, r, D), r ≤ D.

    With D·Dᵀ = V Λ Vᵀ (r, r) the norm is Σ √λ, and its gradient the polar factor V Λ^(−1/2) Vᵀ D.
    The ridge is added to Λ: both are then those of Σ √(λ + ridge) exactly, and finite where a block
    has lost rank.
    """
    values, V = torch.linalg.eigh(blocks @ blocks.mT)
    root = (values.clamp(min=0) + ridge).sqrt()  # (K, r)
    return root.sum(1), (V / root[:, None]) @ (V.mT @ blocks)
