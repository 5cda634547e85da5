"""Planted subspaces, and what each kind of SAE makes of them. No language model is needed.

    python -m experiments.sasa_demo            # about two minutes on 2 idle cores

A world has features of intrinsic dimension 1 to 4, each in a random subspace of ℝ⁶⁴ of its own:
rays (1), circles (2), spheres and helices (3), tori (4). A sample is the sum of two features, each
at a random point and of random size. The subspaces overlap, since they have more dimensions
together than the space. All SAEs have as many parameters, and as many coefficients a token.

Letters: n samples, D = 64, K units of r features.
"""

import itertools
import math
import multiprocessing
import statistics
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from run.files import Parser, run_command, table, write_json
from saes.step import Spec
from saes.train import Training

D, BLOCK, ACTIVE, SAMPLES = 64, 4, 2, 80_000
PURE, MIXED = "dimensions 3, 4", "dimensions 1 to 4"
WORLDS = {PURE: {"sphere": 8, "helix": 7, "torus": 7},
          MIXED: {"ray": 8, "circle": 8, "sphere": 6, "helix": 5, "torus": 5}}
DIMENSION = {"ray": 1, "circle": 2, "sphere": 3, "helix": 3, "torus": 4}
HOLDS = 0.8  # share of a feature's signal that a unit must write to hold it
STEPS, BATCH, LR, STARTS = 1000, 256, 5e-3, 2
VECTORS = ("topk", "batchtopk", "jumprelu")
SIZES, LAMBDAS, LAMBDA = (8_000, 16_000), (0.0, 1e-2, 1e-1), 1e-3


def points(kind, n, draw):
    """(n, dimension) random points of a shape, of mean square norm 1."""
    a, b = 2 * math.pi * torch.rand(2, n, generator=draw)
    if kind == "sphere":
        return F.normalize(torch.randn(n, 3, generator=draw), dim=1)
    columns = {"ray": [torch.ones(n)], "circle": [a.cos(), a.sin()],
               "helix": [(2 * a).cos(), (2 * a).sin(), (a / math.pi - 1) * 3**0.5],  # two turns
               "torus": [a.cos(), a.sin(), b.cos(), b.sin()]}[kind]
    return torch.stack(columns, 1) / (2**0.5 if kind in ("helix", "torus") else 1)


class World:
    def __init__(self, kinds, seed):
        self.draw = torch.Generator().manual_seed(seed)
        self.kinds = [kind for kind, count in kinds.items() for _ in range(count)]
        self.bases = []  # (dimension, D) each, orthonormal rows
        for kind in self.kinds:
            start = torch.randn(D, DIMENSION[kind], generator=self.draw)
            self.bases.append(torch.linalg.qr(start).Q.T)

    def sample(self, n):
        """(x (n, D), which features are in it (n, ACTIVE), their parts (n, ACTIVE, D))."""
        which = torch.rand(n, len(self.kinds), generator=self.draw).topk(ACTIVE).indices
        parts = torch.zeros(n, ACTIVE, D)
        for i, (kind, basis) in enumerate(zip(self.kinds, self.bases)):
            place = which == i
            count = int(place.sum())
            size = 0.5 + torch.rand(count, 1, generator=self.draw)
            parts[place] = size * points(kind, count, self.draw) @ basis
        return parts.sum(1), which, parts


def fit(x, architecture, num_features, seed, nuclear):
    """(Trainer, scale) of the best training by EV on x (n, D): of STARTS of a SASA, else of one."""
    is_sasa = architecture == "sasa"
    spec = Spec(architecture, 3 * num_features * BLOCK, ACTIVE * BLOCK, BLOCK if is_sasa else 1,
                nuclear, LR, decay=0.3, bandwidth=0.2, dead_after=20 * BATCH)
    trainings = []
    for start in range(STARTS if is_sasa else 1):
        training = Training(lambda cursor: itertools.repeat((cursor, {0: x})), spec, STEPS, BATCH,
                            100 * seed + start)
        for _ in training:
            pass
        trainings.append(training)
    best = max(trainings, key=lambda training: training.trainers[0].mean["ev"])
    return best.trainers[0], best.scale[0]


@torch.no_grad()
def recovered(trainer, scale, world, n=10_000):
    """What a trained SAE makes of a world, on n new samples.

    Which unit holds which feature is read off the signal: the share of the feature's own part of
    the input that a unit writes. The energy inside its subspace would count what else is active. A
    unit holds a feature if it writes HOLDS of its signal and holds no other. "units" write 90 % of
    what is written of a feature. "angles" (degrees) are the largest between the subspace of a
    feature and the span of what its unit writes.
    """
    x, which, parts = world.sample(n)
    x, parts, block = x / scale, parts / scale, trainer.spec.block
    _, error, codes, _ = trainer.gradients(x)
    W_dec = trainer.parameters["W_dec"].unflatten(0, (-1, block))  # (K, r, D)
    codes = codes.unflatten(1, (-1, block))  # (n, K, r)
    units, owners, angles = [], {}, {}
    for i, basis in enumerate(world.bases):
        # The share of the signal that each unit writes
        row, slot = (which == i).nonzero(as_tuple=True)
        signal, f = parts[row, slot], codes[row]  # (m, D), (m, K, r)
        if world.kinds[i] != "ray":  # what is written whatever the point is no signal
            signal, f = signal - signal.mean(0), f - f.mean(0)
        along = (signal @ W_dec.flatten(0, 1).T).view_as(f)
        share = (f * along).sum((0, 2)) / signal.square().sum()  # (K)
        order = share.clamp(min=0).sort(descending=True)
        units.append(int((order.values.cumsum(0) < 0.9 * order.values.sum()).sum()) + 1)
        # The unit that holds the feature, if there is one, and the angle between their subspaces
        if order.values[0] >= HOLDS:
            unit = order.indices[0].item()
            owners.setdefault(unit, []).append(i)
            written = codes[row, unit] @ W_dec[unit]
            written = written[written.abs().sum(1) > 0]
            span = torch.linalg.svd(written, full_matrices=False).Vh[:len(basis)]
            is_whole = len(span) == len(basis)
            cosine = torch.linalg.svdvals(span @ basis.T)[-1].clamp(max=1) if is_whole else 0
            angles[i] = math.degrees(math.acos(cosine))
    own = [features[0] for features in owners.values() if len(features) == 1]
    ev = 1 - error.square().sum() / (x - x.mean(0)).square().sum()
    return {"ev": ev.item(), "l0": (codes != 0).sum().item() / n, "held": len(own),
            "features": len(world.bases), "units": statistics.fmean(units),
            "angles": [angles[i] for i in own],
            "stable": stable_ranks(W_dec).mean().item() if block > 1 else None}


def stable_ranks(blocks):
    """Stable rank ‖D‖_F²/‖D‖₂² (K) of the blocks D (K, r, D): 1 to r."""
    power = torch.linalg.eigvalsh(blocks @ blocks.mT).clamp(min=0)
    return power.sum(1) / power[:, -1]


def trials():
    """(world, architecture, samples, λ) of what one seed trains."""
    yield PURE, "sasa", SAMPLES, LAMBDA
    for architecture in VECTORS:
        yield PURE, architecture, SAMPLES, 0.0
    for size in SIZES:
        yield PURE, "sasa", size, LAMBDA
        yield PURE, "topk", size, 0.0
    for nuclear in LAMBDAS:
        yield PURE, "sasa", SAMPLES, nuclear
    yield MIXED, "sasa", SAMPLES, LAMBDA
    yield MIXED, "topk", SAMPLES, 0.0


def one_seed(seed):
    """{trial: figures} of one seed."""
    torch.set_num_threads(1)
    worlds = {PURE: World(WORLDS[PURE], seed), MIXED: World(WORLDS[MIXED], 1000 + seed)}
    samples = {name: world.sample(SAMPLES)[0] for name, world in worlds.items()}
    figures = {}
    for trial in trials():
        name, architecture, size, nuclear = trial
        world, x = worlds[name], samples[name][:size]
        trained = fit(x, architecture, len(world.kinds), seed, nuclear)
        figures[trial] = recovered(*trained, world)
    return figures


def summary(seeds):
    """One line a trial, mean over seeds; seeds: what `one_seed` gave for each."""
    lines = []
    for trial in seeds[0]:
        world, architecture, size, nuclear = trial
        rows = [figures[trial] for figures in seeds]
        ev, l0, units = ([row[name] for row in rows] for name in ("ev", "l0", "units"))
        held, angles = [row["held"] for row in rows], sum((row["angles"] for row in rows), [])
        spread = statistics.stdev(ev) if len(ev) > 1 else 0.0
        is_sasa = architecture == "sasa"
        lines.append([
            world, architecture, f"{size:,}", f"{nuclear:g}" if is_sasa else None,
            f"{statistics.fmean(ev):.3f} ± {spread:.3f}", f"{statistics.fmean(l0):.1f}",
            f"{min(held)} to {max(held)} of {rows[0]['features']}",
            f"{statistics.fmean(units):.1f}",
            f"{statistics.median(angles):.1f} / {max(angles):.1f}" if angles else None,
            f"{statistics.fmean(row['stable'] for row in rows):.2f}" if is_sasa else None])
    head = ["world", "SAE", "samples", "λ", "EV", "L0", "held", "units", "angle °, largest",
            "stable rank"]
    return table(lines, head, right=(2, 3, 5, 7, 8, 9))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, default=6, help="worlds of each kind (default 6)")
    parser.add_argument("--out", metavar="FILE", help="write all figures there, as JSON")
    args = parser.parse_args()
    start, seeds = time.perf_counter(), []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.imap(one_seed, range(args.seeds))
        for figures in tqdm(results, "seeds", args.seeds, leave=False, disable=None):
            seeds.append(figures)
    print(f"{summary(seeds)}\n\n{time.perf_counter() - start:.0f} s")
    if args.out:
        write_json(args.out, [{"seed": seed, "trial": trial} | row
                              for seed, figures in enumerate(seeds)
                              for trial, row in figures.items()])


if __name__ == "__main__":
    run_command(main)
