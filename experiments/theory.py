"""The paper's statement about superposed features, reproduced, and where it ends: `python experiments/theory.py`, under three minutes.

    python experiments/theory.py                                  # the table, and experiments/results/theory.png
    python experiments/theory.py --seed 1 --no-figure             # another draw
    python experiments/theory.py --p 0.02 --no-figure             # twice as many features active

n sparse features have unit directions in d < n dimensions; x is the sum of those that are active, each with probability p and a
size uniform in [0.5, 1.5]. In the aligned half, r of them are active more often (p to p + shift), and nothing else differs.
What is wanted is their span; the error of an estimate is ‖P − P̂‖_F of the two projectors, √(r + r̂ − 2 tr PP̂).

The paper (arXiv 2512.23260) holds that a method which looks at activations directly has an error of at least √(r − 1), and an SAE
none. The floor is that of the difference of means, which is one direction. It isn't one of every direct method: the
difference of the two covariances is of rank r. An SAE must be well trained, on features sparse enough: its encoder is one linear map,
and what other active features add to a code tilts the decoder's rows; longer training hardly mends it. Centring the chosen rows, or τ,
costs directions: r̂ of r leave √(r − r̂), whatever the SAE.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))                       # at the end: `select` must stay Python's own

import torch

from features import subspace
from run.files import run_command
from run.files import table

CHUNK = 50_000               # samples whose codes are held at once


@dataclass(frozen=True)
class Setting:
    d: int = 64              # dimensions
    n: int = 128             # features
    r: int = 4               # shifted ones
    p: float = 0.01          # chance that a feature is active
    shift: float = 0.2       # what is added to it for the shifted ones, in the aligned half
    samples: int = 500_000   # of each half
    seed: int = 0


def world(s):
    """Directions (n, d), the shifted features (the first r), and the two halves (samples, d), aligned first."""
    draw = torch.Generator().manual_seed(s.seed)
    W = torch.nn.functional.normalize(torch.randn(s.n, s.d, generator=draw), dim=1)

    def half(shift):
        chance, x = torch.full((s.n,), s.p), torch.empty(s.samples, s.d)
        chance[:s.r] += shift
        for part in x.split(CHUNK):
            active = torch.rand(len(part), s.n, generator=draw) < chance
            torch.mm(active * (0.5 + torch.rand(len(part), s.n, generator=draw)), W, out=part)
        return x
    return W, half(s.shift), half(0.0)


def error(U, W, r):
    """‖P − P̂‖_F of the span of orthonormal columns U (d, r̂) and that of the first r directions."""
    Q = torch.linalg.qr(W[:r].T.double()).Q
    return math.sqrt(max(0.0, r + U.shape[1] - 2 * float((Q.T @ U.double()).square().sum())))


# ---------------------------------------------------------------------------------------------------------------
# Estimates: (aligned, unaligned, r) -> U (d, r̂)

def mean_difference(a, u, r):
    """The difference of means: one direction, whatever r."""
    return torch.nn.functional.normalize(a.mean(0) - u.mean(0), dim=0)[:, None]


def pca_of_differences(a, u, r):
    """The leading r singular vectors of differences of random pairs, uncentred."""
    d = (a - u).double()
    return torch.linalg.eigh(d.T @ d).eigenvectors[:, -r:]


def covariance_difference(a, u, r):
    """Eigenvectors of the r largest eigenvalues of the difference of covariances."""
    return torch.linalg.eigh(torch.cov(a.T.double()) - torch.cov(u.T.double())).eigenvectors[:, -r:]


class SAE:
    """A small SAE, trained on both halves: of a batch the largest of ReLU(x·W_enc + b) stay, as many as features are active
    (BatchTopK; afterwards those above the threshold that this came to), x̂ their sum of unit decoder rows, and b_dec; Adam, the
    rate falling to 0 over the second half of the steps."""

    def __init__(self, s, steps, a, u, batch=1024, rate=5e-3):
        draw = torch.Generator().manual_seed(s.seed + 1)
        self.active, self.threshold = s.n * s.p + s.r * s.shift / 2, 0.0
        self.W_dec = torch.nn.functional.normalize(torch.randn(s.n, s.d, generator=draw), dim=1).requires_grad_()
        self.W_enc, self.b = self.W_dec.detach().T.clone().requires_grad_(), torch.zeros(s.n, requires_grad=True)
        self.b_dec = torch.zeros(s.d, requires_grad=True)
        optimizer = torch.optim.Adam([self.W_enc, self.b, self.W_dec, self.b_dec], rate, betas=(0.9, 0.99))
        for step in range(steps):
            x = torch.cat([half[torch.randint(len(half), (batch // 2,), generator=draw)] for half in (a, u)])
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            h = (x @ self.W_enc + self.b).relu()
            least = h.detach().flatten().topk(round(self.active * batch)).values[-1]
            self.threshold += (1 if step == 0 else 0.02) * (least.item() - self.threshold)
            loss = ((h * (h >= least)) @ self.W_dec + self.b_dec - x).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def codes(self, x):
        h = (x @ self.W_enc + self.b).relu()
        return h * (h >= self.threshold)

    @torch.no_grad()
    def chosen_rows(self, a, u, k):
        """Decoder rows (k, d) of the features whose mean code differs most between the halves."""
        a, u = (sum(self.codes(part).sum(0) for part in half.split(CHUNK)) / len(half) for half in (a, u))
        return self.W_dec[(a - u).abs().topk(k).indices]


def span(rows):
    return torch.linalg.qr(rows.T.double()).Q


def centred(rows, tau):
    """PCA with centring of rows (k, d): the fewest directions with a share `tau` of the squared singular values; of one row none."""
    _, size, V = torch.linalg.svd((rows - rows.mean(0)).double(), full_matrices=False)
    share = size.square().cumsum(0) / size.square().sum()
    return V[:int((share < tau - 1e-12).sum()) + 1].T if len(rows) > 1 else V[:0].T


DIRECT = {"difference of means": mean_difference, "PCA of differences": pca_of_differences,
          "difference of covariances": covariance_difference}
UNDER, WELL = 30, 1000       # steps of an undertrained SAE and of a well-trained one
COUNTS = (1, 4, 8, 16)


def errors(s, steps=(UNDER, WELL), tau=0.8):
    """{estimate: error} of one setting."""
    W, a, u = world(s)
    found = {name: error(estimate(a, u, s.r), W, s.r) for name, estimate in DIRECT.items()}
    for count in steps:
        rows = SAE(s, count, a, u).chosen_rows(a, u, s.r)
        found[f"SAE, {count} steps"] = error(span(rows), W, s.r)
    for name, U in (("uncentred", subspace(rows, tau, s.d)[0]), ("centred", centred(rows, tau))):
        found[f"  its PCA, {name}, τ = {tau:g}"] = error(U, W, s.r)
        found[f"    {name}, √(r − r̂)"] = math.sqrt(s.r - U.shape[1])
    return found


def report(args):
    base = Setting(seed=args.seed, p=args.p)
    found = [errors(Setting(**vars(base) | {"r": r})) for r in COUNTS]
    lines = [[name, *(f"{one[name]:.3f}" for one in found)] for name in found[0]]
    lines.insert(1, ["  √(r − 1), the paper's floor", *(f"{math.sqrt(r - 1):.3f}" for r in COUNTS)])
    print(f"error ‖P − P̂‖_F: d {base.d}, n {base.n}, p {base.p}, shift {base.shift}, {base.samples:,} samples a half, seed {base.seed}\n")
    print(table(lines, ["estimate", *(f"r = {r}" for r in COUNTS)], right=range(1, 5)))
    if not args.no_figure:
        figure(base, args.figure)
        print(f"\nfigure: {os.path.relpath(args.figure)}")


def figure(base, path):
    """Error against samples, sparsity, the SAE's steps (r = 4) and τ (r = 16)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def setting(**changes):
        return Setting(**vars(base) | {"samples": 50_000} | changes)

    picture, panels = pyplot.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    trained = f"SAE, {WELL} steps"
    for axes, title, label, values, key in (
            (panels[0], "samples", "samples of each half", (300, 1000, 3000, 10_000, 30_000, 100_000), "samples"),
            (panels[1], "sparsity", "chance p that a feature is active", (0.0025, 0.005, 0.01, 0.02, 0.04), "p")):
        found = [errors(setting(**{key: value}), (WELL,)) for value in values]
        for name in (*DIRECT, trained):
            axes.plot(values, [one[name] for one in found], "o-", ms=4, label=name)
        axes.set(title=f"{title}, r = {base.r}", xlabel=label, xscale="log", yscale="log", ylim=(0.01, 5))
        axes.set_xticks(values, [f"{value:g}" if value < 1000 else f"{value // 1000}k" for value in values])
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel("error ‖P − P̂‖_F")
    s, steps = setting(), (1, 10, 30, 100, 300, 1000, 3000)
    W, a, u = world(s)
    found = [error(span(SAE(s, count, a, u).chosen_rows(a, u, s.r)), W, s.r) for count in steps]
    panels[2].plot(steps, found, "o-", ms=4, color="C3", label="SAE")
    panels[2].set(title=f"SAE quality, r = {base.r}", xlabel="steps of the SAE's training", xscale="log", yscale="log", ylim=(0.01, 5))
    s = setting(r=16)
    W, a, u = world(s)
    rows, taus = SAE(s, WELL, a, u).chosen_rows(a, u, s.r), torch.linspace(0.3, 1, 71).tolist()
    for name, color, estimate in (("uncentred", "C3", lambda tau: subspace(rows, tau, s.d)[0]),
                                  ("centred", "C4", lambda tau: centred(rows, tau))):
        panels[3].plot(taus, [error(estimate(tau), W, s.r) for tau in taus], color=color, label=f"{trained}, {name} PCA")
        panels[3].plot(taus, [math.sqrt(s.r - estimate(tau).shape[1]) for tau in taus], ":", color="black", lw=1.2,
                       label="√(r − r̂)" if name == "centred" else None)
    panels[3].set(title=f"τ, r = {s.r}", xlabel="τ, share of the squared singular values that is kept", ylim=(0, None))
    for axes, r in zip(panels, (*[base.r] * 3, s.r)):
        axes.axhline(math.sqrt(r - 1), color="grey", lw=1, ls="--", label="√(r − 1), the paper's floor")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    pyplot.close(picture)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the world and of the SAE (default 0)")
    parser.add_argument("--p", type=float, default=Setting.p, metavar="P", help=f"chance that a feature is active (default {Setting.p})")
    parser.add_argument("--no-figure", action="store_true", help="the table alone")
    parser.add_argument("--figure", type=Path, default=ROOT / "experiments/results/theory.png", metavar="PNG")
    torch.set_num_threads(1)
    report(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
