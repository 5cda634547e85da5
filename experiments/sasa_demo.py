"""Planted subspaces, and what each kind of SAE makes of them: `python sae_train.py --demo`. No language model needed.

A world has features of intrinsic dimension 1 to 4, each in its own random subspace of ℝ⁶⁴: rays (1), circles (2), spheres and
helices (3), tori (4). A sample is the sum of two of them, each at a random point and of random size, and the subspaces
overlap, since they have more dimensions together than the space. All SAEs have as many parameters and as many
coefficients a token. Which unit holds which feature is read off the *signal*, the share of the feature's own part of the
input that a unit writes: the energy inside its subspace would count what else is active.
"""

import math
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from run.files import write_json
from run.files import table
from saes.step import Spec, ranks
from saes.train import Training

D, BLOCK, ACTIVE, SAMPLES = 64, 4, 2, 80_000
WORLDS = {"dimensions 3 and 4": {"sphere": 8, "helix": 7, "torus": 7},
          "dimensions 1 to 4": {"ray": 8, "circle": 8, "sphere": 6, "helix": 5, "torus": 5}}
DIMENSION = {"ray": 1, "circle": 2, "sphere": 3, "helix": 3, "torus": 4}
HELD = 0.8                       # of a feature's signal: then one unit holds it
SEEDS, STEPS, BATCH, LR, INITS = 6, 1000, 256, 5e-3, 2
VECTORS = ("topk", "batchtopk", "jumprelu")
SIZES, LAMBDAS, LAMBDA = (8_000, 16_000, SAMPLES), (0.0, 1e-3, 1e-2, 1e-1), 1e-3


def points(kind, n, draw):
    """(n, dimension) random points of a shape, of mean square norm 1."""
    angle = 2 * math.pi * torch.rand(2, n, generator=draw)
    if kind == "ray":
        return torch.ones(n, 1)
    if kind == "circle":
        return torch.stack((angle[0].cos(), angle[0].sin()), 1)
    if kind == "sphere":
        return F.normalize(torch.randn(n, 3, generator=draw), dim=1)
    if kind == "helix":          # two turns
        return torch.stack(((2 * angle[0]).cos(), (2 * angle[0]).sin(), (angle[0] / math.pi - 1) * 3 ** 0.5), 1) / 2 ** 0.5
    return torch.stack((angle[0].cos(), angle[0].sin(), angle[1].cos(), angle[1].sin()), 1) / 2 ** 0.5


class World:
    def __init__(self, kinds, seed):
        self.draw = torch.Generator().manual_seed(seed)
        self.kinds = [kind for kind, count in kinds.items() for _ in range(count)]
        self.bases = [torch.linalg.qr(torch.randn(D, DIMENSION[kind], generator=self.draw)).Q.T for kind in self.kinds]

    def sample(self, n):
        """(x (n, D), which features are in it (n, ACTIVE), their parts (n, ACTIVE, D))."""
        which = torch.rand(n, len(self.kinds), generator=self.draw).topk(ACTIVE).indices
        parts = torch.zeros(n, ACTIVE, D)
        for i, (kind, basis) in enumerate(zip(self.kinds, self.bases)):
            at = which == i
            count = int(at.sum())
            size = 0.5 + torch.rand(count, 1, generator=self.draw)
            parts[at] = size * points(kind, count, self.draw) @ basis
        return parts.sum(1), which, parts


def fit(x, architecture, features, seed, nuclear=0.0, inits=1):
    """The Trainer of the best of `inits` trainings by EV, on x (n, D), read again and again."""
    sasa, best = architecture == "sasa", None
    spec = Spec(architecture, 3 * features * BLOCK, ACTIVE * BLOCK, block=BLOCK if sasa else 1, nuclear=nuclear, lr=LR, decay=0.3,
                bandwidth=0.2, dead_after=20 * BATCH)
    for init in range(inits):
        training = Training(lambda cursor: (cursor, {0: x}), spec, STEPS, BATCH, 100 * seed + init)
        for _ in training:
            pass
        trainer = training.trainers[0]
        if best is None or trainer.mean["ev"] > best[0].mean["ev"]:
            best = trainer, training.scale[0]
    return best


@torch.no_grad()
def recovered(trainer, scale, world, n=10_000):
    """What a trained SAE makes of a world, on n new samples: {"ev", "l0", "held": features that one unit of their own holds,
    "features", "units": those that make up 90 % of what is written of a feature, "angles": degrees, "stable": rank of blocks}.

    A unit holds a feature if it writes HELD of its signal, and no other feature is held by it. The angle is the largest
    between the feature's plane and the span of what the unit writes where the feature is active.
    """
    x, which, parts = world.sample(n)
    x, parts, spec = x / scale, parts / scale, trainer.spec
    _, error, f, _ = trainer.gradients(x)
    W = trainer.parameters["W_dec"].unflatten(0, (-1, spec.block))                   # (K, r, D)
    f = f.unflatten(1, (-1, spec.block))                                             # (n, K, r)
    units, owner, angles = [], {}, {}
    for i, basis in enumerate(world.bases):
        row, slot = (which == i).nonzero(as_tuple=True)
        signal = parts[row, slot]                                                    # (m, D)
        codes = f[row]                                                               # (m, K, r)
        if world.kinds[i] != "ray":
            signal, codes = signal - signal.mean(0), codes - codes.mean(0)           # what is written whatever the point is no signal
        share = (codes * (signal @ W.flatten(0, 1).T).view_as(codes)).sum((0, 2)) / signal.square().sum()        # (K)
        order = share.clamp(min=0).sort(descending=True)
        units.append(int((order.values.cumsum(0) < 0.9 * order.values.sum()).sum()) + 1)
        if order.values[0] >= HELD:
            k = order.indices[0].item()
            owner.setdefault(k, []).append(i)
            written = f[row, k] @ W[k]
            mine = torch.linalg.svd(written[written.abs().sum(1) > 0], full_matrices=False).Vh[:len(basis)]
            cosine = torch.linalg.svdvals(mine @ basis.T)[-1].clamp(max=1) if len(mine) == len(basis) else torch.tensor(0.0)
            angles[i] = math.degrees(math.acos(cosine))
    own = [i for held in owner.values() if len(held) == 1 for i in held]
    return {"ev": (1 - error.square().sum() / (x - x.mean(0)).square().sum()).item(), "l0": (f != 0).sum().item() / n,
            "held": len(own), "features": len(world.bases), "units": units, "angles": [angles[i] for i in own],
            "stable": ranks(W)[0].mean().item() if spec.block > 1 else None}


def one_seed(seed):
    """All that one seed contributes: [{"world", "architecture", "samples", "nuclear", ...recovered}]."""
    torch.set_num_threads(1)
    out = []

    def add(name, world, x, architecture, nuclear=0.0):
        trainer, scale = fit(x, architecture, len(world.kinds), seed, nuclear, INITS if architecture == "sasa" else 1)
        out.append({"seed": seed, "world": name, "architecture": architecture, "samples": len(x), "nuclear": nuclear}
                   | recovered(trainer, scale, world))

    pure, mixed = WORLDS
    world = World(WORLDS[pure], seed)
    x = world.sample(SAMPLES)[0]
    add(pure, world, x, "sasa", LAMBDA)
    for architecture in VECTORS:
        add(pure, world, x, architecture)
    for size in SIZES[:-1]:
        add(pure, world, x[:size], "sasa", LAMBDA)
        add(pure, world, x[:size], "topk")
    for nuclear in LAMBDAS:
        if nuclear != LAMBDA:
            add(pure, world, x, "sasa", nuclear)
    world = World(WORLDS[mixed], 1000 + seed)
    x = world.sample(SAMPLES)[0]
    add(mixed, world, x, "sasa", LAMBDA)
    add(mixed, world, x, "topk")
    return out


def mean(rows, value):
    """Mean over rows of a field, or of what a function makes of a row."""
    return statistics.fmean(value(row) if callable(value) else row[value] for row in rows)


def pick(rows, world=0, architecture="sasa", samples=None, nuclear=None):
    """The rows of one setting; worlds by number."""
    nuclear = (LAMBDA if architecture == "sasa" else 0.0) if nuclear is None else nuclear
    wanted = {"world": list(WORLDS)[world], "architecture": architecture, "samples": samples or SAMPLES, "nuclear": nuclear}
    return [row for row in rows if wanted.items() <= row.items()]


def units(row):
    return statistics.fmean(row["units"])


def gates(rows):
    """[(what must hold, what came out, whether it holds)]."""
    pure, mixed = WORLDS
    sasa, both = pick(rows), pick(rows, 1)
    whole, need = sum(row["held"] == row["features"] for row in sasa), math.ceil(len(sasa) * 5 / 6)
    vectors = {name: mean(pick(rows, 0, name), units) for name in VECTORS}
    few, more = mean(pick(rows, 0, "sasa", SIZES[0]), "ev"), mean(pick(rows, 0, "topk", SIZES[1]), "ev")
    angle = statistics.median([angle for row in both for angle in row["angles"]] or [90.0])
    strong, weak = (mean(pick(rows, nuclear=nuclear), "stable") for nuclear in (0.1, 1e-3))
    return [
        (f"{pure}: every feature in a block of its own, in {need} of {len(sasa)} seeds", f"{whole}", whole >= need),
        ("  EV .95", f"{mean(sasa, 'ev'):.3f}", mean(sasa, "ev") >= 0.95),
        ("  vector SAEs: 5 units a feature", ", ".join(f"{name} {n:.1f}" for name, n in vectors.items()), min(vectors.values()) >= 5),
        ("  SASA's EV on 8k samples above TopK's on 16k", f"{few:.3f}, {more:.3f}", few > more),
        (f"{mixed}: 22 of 32 features in each seed", ", ".join(str(row["held"]) for row in both), min(row["held"] for row in both) >= 22),
        ("  median angle under 3°", f"{angle:.1f}°", angle < 3),
        ("mean stable rank at most 1.5 at λ = .1, at least 2.2 at .001", f"{strong:.2f}, {weak:.2f}", strong <= 1.5 and weak >= 2.2)]


def summary(rows):
    """One line a setting, mean over seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row["world"], row["architecture"], row["samples"], row["nuclear"]), []).append(row)
    lines = []
    for (world, architecture, samples, nuclear), some in groups.items():
        angles = [angle for row in some for angle in row["angles"]]
        held = [row["held"] for row in some]
        lines.append([
            world, architecture, f"{samples:,}", f"{nuclear:g}" if architecture == "sasa" else None,
            f"{mean(some, 'ev'):.3f} ± {deviation(some):.3f}", f"{mean(some, 'l0'):.1f}",
            f"{min(held)} to {max(held)} of {some[0]['features']}", f"{mean(some, units):.1f}",
            f"{statistics.median(angles):.1f} / {max(angles):.1f}" if angles else None,
            None if some[0]["stable"] is None else f"{mean(some, 'stable'):.2f}"])
    head = ["world", "SAE", "samples", "λ", "EV", "L0", "held by a unit of their own", "units a feature",
            "angle, median / largest °", "stable rank"]
    return table(lines, head, right=(2, 3, 5, 7, 8, 9))


def deviation(rows):
    """Standard deviation of EV over seeds."""
    return statistics.stdev(row["ev"] for row in rows) if len(rows) > 1 else 0.0


def figure(rows, path):
    """Units a feature, EV over samples, λ: three panels."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    counts, samples, nuclear = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")[1]
    for architecture in ("sasa", *VECTORS):
        values = sorted(n for row in pick(rows, 0, architecture) for n in row["units"])
        counts.plot(values, torch.linspace(0, 1, len(values)), label=architecture)
    counts.set(xlabel="units that write 90 % of a feature", ylabel="share of features", title="units a feature")
    for architecture in ("sasa", "topk"):
        some = [pick(rows, 0, architecture, size) for size in SIZES]
        samples.errorbar(SIZES, [mean(part, "ev") for part in some], [deviation(part) for part in some], label=architecture, marker="o")
    samples.set(xscale="log", xlabel="training samples", ylabel="EV", title="samples",
                xticks=SIZES, xticklabels=[f"{n // 1000}k" for n in SIZES])
    samples.minorticks_off()
    some, at = [pick(rows, nuclear=value) for value in LAMBDAS], [max(value, 1e-4) for value in LAMBDAS]
    held = [BLOCK * mean(part, lambda row: row["held"] / row["features"]) for part in some]
    nuclear.plot(at, [mean(part, "stable") for part in some], marker="o", label="mean stable rank")
    nuclear.plot(at, held, marker="o", label="share of features held × 4")
    nuclear.set(xscale="log", xlabel="λ, of the input's power (leftmost: 0)", title="nuclear norm")
    for panel in (counts, samples, nuclear):
        panel.legend()
    pyplot.savefig(path, dpi=130)
    pyplot.close()


def main(out=None, seeds=SEEDS, workers=2):
    """Run all seeds, print the table and the gates, write demo.json and demo.png. 1 where a gate is missed."""
    out = Path(out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sae-demo").expanduser()
    out.mkdir(parents=True, exist_ok=True)
    began, rows = time.perf_counter(), []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for part in tqdm(pool.imap(one_seed, range(seeds)), "seeds", seeds, leave=False, disable=None):
            rows += part
    held = gates(rows)
    print(f"{summary(rows)}\n\n{table([[what, found, '' if holds else 'MISSED'] for what, found, holds in held], ['gate', 'found', ''])}\n")
    figure(rows, out / "demo.png")
    write_json(out / "demo.json", {"gates": [{"gate": what, "found": found, "holds": holds} for what, found, holds in held], "rows": rows,
                                   "seconds": time.perf_counter() - began})
    print(f"{time.perf_counter() - began:.0f} s; {out}/demo.png")
    return 0 if all(holds for *_, holds in held) else 1
