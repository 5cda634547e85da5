"""The paper's statement about superposed features, reproduced, and where it ends.

    python -m experiments.theory                     # the table: under three minutes
    python -m experiments.theory --figure theory.png
    python -m experiments.theory --seed 1            # another draw
    python -m experiments.theory --p 0.02            # twice as many features active

n sparse features have unit directions in d < n dimensions. x is the sum of those that are active,
each with probability p and a size uniform in [0.5, 1.5]. In the aligned half, r of them are active
more often (p to p + shift), and nothing else differs. What is wanted is their span. The error of
an estimate is ‖P − P̂‖_F of the two projectors, √(r + r̂ − 2 tr PP̂).

The paper (arXiv 2512.23260) holds that a method which looks at activations directly has an error
of at least √(r − 1), and an SAE none. That floor is the difference of means', which is one
direction. It is not one of every direct method: the difference of the two covariances has rank r.
An SAE must be well trained, on features sparse enough: its encoder is one linear map, and other
active features tilt the decoder's rows. Centring the chosen rows, or τ, costs directions: r̂ of r
leave √(r − r̂), whatever the SAE.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import normalize

from features import subspace
from run.files import Parser, run_command, table

CHUNK = 50_000               # samples whose codes are held at once
UNDER, WELL = 30, 1000       # steps of an undertrained SAE and of a well-trained one
RANKS = (1, 4, 8, 16)
TAU = 0.8


@dataclass(frozen=True)
class Setting:
    d: int = 64              # dimensions
    n: int = 128             # features
    r: int = 4               # shifted ones
    p: float = 0.01          # chance that a feature is active
    shift: float = 0.2       # added to it for the shifted ones, in the aligned half
    samples: int = 500_000   # of each half
    seed: int = 0


def sample(s: Setting):
    """Directions W (n, d), the shifted ones first, and the halves (samples, d), aligned first."""
    generator = torch.Generator().manual_seed(s.seed)
    W = normalize(torch.randn(s.n, s.d, generator=generator), dim=1)
    halves = []
    for shift in (s.shift, 0.0):
        chance = torch.full((s.n,), s.p)
        chance[:s.r] += shift
        x = torch.empty(s.samples, s.d)
        for part in x.split(CHUNK):
            active = torch.rand(len(part), s.n, generator=generator) < chance
            sizes = 0.5 + torch.rand(len(part), s.n, generator=generator)
            torch.mm(active * sizes, W, out=part)
        halves.append(x)
    return W, *halves


def error(U, W, r: int) -> float:
    """‖P − P̂‖_F of the span of orthonormal columns U (d, r̂) and that of W's first r rows."""
    Q = torch.linalg.qr(W[:r].T.double()).Q
    overlap = float((Q.T @ U.double()).square().sum())
    return math.sqrt(max(0.0, r + U.shape[1] - 2 * overlap))


# -------------------------------------------------------------------------------------------------
# Direct estimates: (aligned, unaligned, r) -> U (d, r̂)

def mean_difference(a, u, r):
    """The difference of means: one direction, whatever r."""
    return normalize(a.mean(0) - u.mean(0), dim=0)[:, None]


def pca_of_differences(a, u, r):
    """The leading r singular vectors of differences of random pairs, uncentred."""
    d = (a - u).double()
    return torch.linalg.eigh(d.T @ d).eigenvectors[:, -r:]


def covariance_difference(a, u, r):
    """Eigenvectors of the r largest eigenvalues of the difference of covariances."""
    difference = torch.cov(a.T.double()) - torch.cov(u.T.double())
    return torch.linalg.eigh(difference).eigenvectors[:, -r:]


DIRECT = {"difference of means": mean_difference,
          "PCA of differences": pca_of_differences,
          "difference of covariances": covariance_difference}


# -------------------------------------------------------------------------------------------------
# The estimate by an SAE

class SAE:
    """A small BatchTopK SAE, trained on both halves.

    Of a batch the largest of ReLU(x·W_enc + b) stay, as many as features are active, and
    x̂ = code·W_dec + b_dec with unit rows of W_dec. Afterwards those above the mean threshold
    stay. Adam, with a rate that falls to 0 over the second half of the steps.
    """

    def __init__(self, s: Setting, steps: int, a, u, batch=1024, rate=5e-3):
        generator = torch.Generator().manual_seed(s.seed + 1)
        num_active = s.n * s.p + s.r * s.shift / 2
        self.threshold = 0.0
        W = normalize(torch.randn(s.n, s.d, generator=generator), dim=1)
        self.W_dec = W.requires_grad_()
        self.W_enc = W.detach().T.clone().requires_grad_()
        self.b = torch.zeros(s.n, requires_grad=True)
        self.b_dec = torch.zeros(s.d, requires_grad=True)
        parameters = [self.W_enc, self.b, self.W_dec, self.b_dec]
        optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99))
        for step in range(steps):
            # Half of a batch from each half of the samples
            picks = [torch.randint(len(half), (batch // 2,), generator=generator)
                     for half in (a, u)]
            x = torch.cat([a[picks[0]], u[picks[1]]])
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            # The threshold follows the smallest code that stays
            h = (x @ self.W_enc + self.b).relu()
            least = h.detach().flatten().topk(round(num_active * batch)).values[-1]
            weight = 1 if step == 0 else 0.02
            self.threshold += weight * (least.item() - self.threshold)
            x_hat = (h * (h >= least)) @ self.W_dec + self.b_dec
            loss = (x_hat - x).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Unit rows: a code's size means the same for every feature
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def mean_code(self, x):
        """(n,) mean code over samples x."""
        total = 0
        for part in x.split(CHUNK):
            h = (part @ self.W_enc + self.b).relu()
            total = total + (h * (h >= self.threshold)).sum(0)
        return total / len(x)

    @torch.no_grad()
    def chosen_rows(self, a, u, k: int):
        """Decoder rows (k, d) of the features whose mean code differs most between the halves."""
        delta = self.mean_code(a) - self.mean_code(u)
        return self.W_dec[delta.abs().topk(k).indices]


def span(rows):
    return torch.linalg.qr(rows.T.double()).Q


def centred(rows, tau: float):
    """PCA with centring of rows (k, d): the fewest directions with a share τ; none of one row."""
    _, S, V = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    if len(rows) == 1:
        return V[:0].T
    share = S.square().cumsum(0) / S.square().sum()
    return V[:int((share < tau - 1e-12).sum()) + 1].T


# -------------------------------------------------------------------------------------------------
# The table and the figure

def errors(s: Setting, steps=(UNDER, WELL)) -> dict[str, float]:
    """{estimate: error} of one setting."""
    W, a, u = sample(s)
    by_name = {name: error(estimate(a, u, s.r), W, s.r) for name, estimate in DIRECT.items()}
    for count in steps:
        rows = SAE(s, count, a, u).chosen_rows(a, u, s.r)
        by_name[f"SAE, {count} steps"] = error(span(rows), W, s.r)
    bases = {"uncentred": subspace(rows, TAU, s.d)[0], "centred": centred(rows, TAU)}
    for name, U in bases.items():
        by_name[f"  its PCA, {name}, τ = {TAU:g}"] = error(U, W, s.r)
        by_name[f"    {name}, √(r − r̂)"] = math.sqrt(s.r - U.shape[1])
    return by_name


def print_table(base: Setting) -> None:
    columns = [errors(replace(base, r=r)) for r in RANKS]
    rows = [[name, *(f"{column[name]:.3f}" for column in columns)] for name in columns[0]]
    floors = [f"{math.sqrt(r - 1):.3f}" for r in RANKS]
    rows.insert(1, ["  √(r − 1), the paper's floor", *floors])
    print(f"error ‖P − P̂‖_F: d {base.d}, n {base.n}, p {base.p}, shift {base.shift}, "
          f"{base.samples:,} samples a half, seed {base.seed}\n")
    print(table(rows, ["estimate", *(f"r = {r}" for r in RANKS)], right=range(1, 5)))


def draw_figure(base: Setting, path: Path) -> None:
    """Error against samples, sparsity, the SAE's steps (r = 4) and τ (r = 16)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = replace(base, samples=50_000)
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    trained = f"SAE, {WELL} steps"
    log = dict(xscale="log", yscale="log", ylim=(0.01, 5))

    # Samples and sparsity
    samples = (300, 1000, 3000, 10_000, 30_000, 100_000)
    chances = (0.0025, 0.005, 0.01, 0.02, 0.04)
    for panel, key, values in ((axes[0], "samples", samples), (axes[1], "p", chances)):
        points = [errors(replace(base, **{key: value}), (WELL,)) for value in values]
        for name in (*DIRECT, trained):
            panel.plot(values, [point[name] for point in points], "o-", ms=4, label=name)
        panel.set(title=f"{key}, r = {base.r}", xlabel=key, **log)
    axes[0].set_ylabel("error ‖P − P̂‖_F")

    # How long the SAE trains
    steps = (1, 10, 30, 100, 300, 1000, 3000)
    W, a, u = sample(base)
    points = []
    for count in steps:
        rows = SAE(base, count, a, u).chosen_rows(a, u, base.r)
        points.append(error(span(rows), W, base.r))
    axes[2].plot(steps, points, "o-", ms=4, color="C3", label="SAE")
    axes[2].set(title=f"SAE quality, r = {base.r}", xlabel="steps of the SAE's training", **log)

    # What τ cuts off
    wide = replace(base, r=16)
    W, a, u = sample(wide)
    rows = SAE(wide, WELL, a, u).chosen_rows(a, u, wide.r)
    taus = torch.linspace(0.3, 1, 71).tolist()
    for name, pca in (("uncentred", lambda tau: subspace(rows, tau, wide.d)[0]),
                      ("centred", lambda tau: centred(rows, tau))):
        bases = [pca(tau) for tau in taus]
        axes[3].plot(taus, [error(U, W, wide.r) for U in bases], label=f"{trained}, {name} PCA")
        floors = [math.sqrt(wide.r - U.shape[1]) for U in bases]
        axes[3].plot(taus, floors, ":", color="black", lw=1.2)
    axes[3].set(title=f"τ, r = {wide.r} (dotted: √(r − r̂))", xlabel="τ", ylim=(0, None))

    for panel, r in zip(axes, (base.r, base.r, base.r, wide.r)):
        panel.axhline(math.sqrt(r - 1), color="grey", lw=1, ls="--", label="√(r − 1)")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="N", help="of the world and of the SAE (default 0)")
    add("--p", type=float, default=Setting.p, metavar="P",
        help=f"chance that a feature is active (default {Setting.p})")
    add("--figure", type=Path, metavar="PNG", help="draw errors too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = Setting(seed=args.seed, p=args.p)
    print_table(base)
    if args.figure:
        draw_figure(base, args.figure)
        print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    run_command(main)
