"""Inits and selections against each other, over worlds and seeds: which basis of an adapter makes safety come sooner, or hold better.

    python experiments/ablate.py                                    # the standing grid: 6 variants, 8 worlds, 2 seeds, one rate
    python experiments/ablate.py --variants all --worlds 1 2 3 --lrs 5e-4 1e-3 2e-3 4e-3 --out experiments/results/full.jsonl
    python experiments/ablate.py --table [--figure curves.png]      # what the lines say
    python experiments/ablate.py --list                             # the variants

A world is a toy of its own (`toy.build`: its own facts, words and weights), built once into runs/worlds/SEED: minutes each.
A run is STEPS steps of fine-tuning from a world's base model, with a look at the held-out harmful prompts at LOOKS; each run
is one line of --out, and runs whose line is there aren't done again. All runs of a world and seed see the same rows in the
same order. Worlds below 100 are for reporting; choices, those of learning rates among them, are made on worlds from 100 on.
"""

import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.variants import AFTER, RANK, RATE, ROOT, STEPS, VARIANTS, fit, world_of  # first: it puts the product on the path

from run import files
import lora
from toy import build as toy
from eval import answer, figures
from run.files import InputError
from model import load_model
from safety.rules import verdict
from run.files import table

LOOKS = (*range(0, 31, 2), *range(36, 61, 6))
CHOICE = 100                                     # worlds from here on are for choices, those below for reporting
STANDING = ("lora-own", "lora-unit", "decoder-full", "paper", "greedy-rotated", "oracle")
RESULTS = ROOT / "experiments/results"


# ---------------------------------------------------------------------------------------------------------------
# A run

def judged(world, model, name):
    """Judged answers to one of a world's sets, as figures.figures reads them."""
    texts = answer(model, world.tokenizer, world.sets[name], max_new_tokens=24, batch_size=256, label=name)
    return [{"set": name, "role": name, "completion": text, "verdict": verdict(text), "fields": prompt.fields,
             "answer": prompt.fields.get("answer")} for prompt, text in zip(world.sets[name], texts)]


def safety(world, model):
    return figures(judged(world, model, "harmful"))["harmful"]["safe"]["rate"]


def measure(world, name, rate, seed):
    """One run: what it was and what came out, as a JSON-able dict."""
    began = time.perf_counter()
    model = load_model(world.folder)
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{world.seed} {seed} {name}".encode()).digest()[:6]))
    named, bases = VARIANTS[name](world, model, draw)
    began, prepared = time.perf_counter(), time.perf_counter() - began
    curve, losses, kept = [safety(world, model)], [], {}
    for metrics in fit(world, model, named, rate, seed):
        losses.append(metrics["loss"])
        if name in AFTER:
            AFTER[name](world, model, metrics["step"], kept)
        if metrics["step"] in LOOKS:
            curve.append(safety(world, model))
    rows = [row for kind in ("jailbreak", "lookalike", "benign") for row in judged(world, model, kind)]
    for row in rows:
        row["set"] = f"lookalike: {row['fields']['kind']}" if row["set"] == "lookalike" else row["set"]
    found = figures(rows)
    return {"safe": curve, "loss": losses, "jailbreak": found["jailbreak"]["safe"]["rate"], "benign": found["benign"]["correct"]["rate"],
            "over_refusal": {kind: found[f"lookalike: {kind}"]["over_refusal"]["rate"] for kind in ("harm verb", "sensitive noun")},
            "share": share(model, bases), "trainable": sum(p.numel() for _, p in named if p.requires_grad),
            "seconds": {"init": round(prepared, 2), "run": round(time.perf_counter() - began, 2)}}


def share(model, bases):
    """Share of ‖ΔW‖², over all modules, in each module's own basis; None without bases."""
    if not bases:
        return None
    layers = lora.lora_layers(model)
    weight = torch.tensor([layer.update.square().sum().item() for layer in layers.values()], dtype=torch.float64)
    parts = torch.tensor([lora.update_share(layer, bases[name]) for name, layer in layers.items()], dtype=torch.float64)
    return ((weight * parts.nan_to_num()).sum() / weight.sum()).item()


def versions():
    """The commit, "+" where files differ from it, of the code, and of what it runs on."""
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    return {"commit": (git("rev-parse", "--short=12", "HEAD") or "none") + "+" * bool(git("status", "--porcelain", "--", "*.py")),
            "torch": torch.__version__, "python": platform.python_version()}


def one(job):
    """A worker's job: run it and append its line, whole."""
    (seed, name, run_seed, rate), folder, out, stamp = job
    torch.set_num_threads(1)
    world = world_of(seed, folder)
    line = {"world": seed, "variant": name, "seed": run_seed, "lr": rate, "rank": RANK, "steps": STEPS, "looks": LOOKS,
            **measure(world, name, rate, run_seed), "digest": world.digest, **stamp}
    append(out, line)
    return line


def append(path, *lines):
    """Add lines to a file that others add to too: locked, and a torn last line of a killed process is closed first."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def key_of(line):
    return line["world"], line["variant"], line["seed"], line["lr"]


def read_lines(path):
    """Lines of a results file by (world, variant, seed, rate); what a kill has torn is skipped, to be run again."""
    found = {}
    for text in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        try:
            line = json.loads(text)
            found[key_of(line)] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def build(job):
    """A worker's job: a world's folder, built where it isn't there, and what takes long of what the variants want of it."""
    seed, folder, variants = job
    torch.set_num_threads(1)
    out = Path(folder) / str(seed)
    if not (out / "world.json").is_file() and toy.misses(rows := toy.build(seed, out)):
        print(f"world {seed} misses its gates and is left out:\n{toy.gates_table(toy.misses(rows))}", file=sys.stderr)
        return
    world = world_of(seed, str(folder))
    if any(name.startswith("oracle") for name in variants):
        _ = world.full                                          # kept in the folder
    if "sasa" in variants:
        _ = world.blocks


def missing(args, worlds):
    """[(world, variant, seed, rate)] that --out has no line of; a world's together, so that a worker measures it once."""
    done = read_lines(args.out)
    return [job for job in itertools.product(worlds, args.variants, args.seeds, args.lrs) if job not in done]


def run(args):
    """Build the worlds that are missing, then the runs that are."""
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        list(pool.imap_unordered(build, [(seed, args.folder, args.variants) for seed in args.worlds]))
        worlds = [seed for seed in args.worlds if (args.folder / str(seed) / "world.json").is_file()]
        jobs, stamp = missing(args, worlds), versions()
        todo = [(job, str(args.folder), str(args.out), stamp) for job in jobs]
        for line in tqdm(pool.imap_unordered(one, todo), "runs", len(jobs), disable=None):
            tqdm.write(f"world {line['world']} seed {line['seed']} lr {line['lr']:g} {line['variant']}: AUC {area(line):.3f}, "
                       f"95 % at {reach(line):.1f}, jailbreak {line['jailbreak']:.3f}")


# ---------------------------------------------------------------------------------------------------------------
# What the lines say

def area(line):
    """Mean plain safety over the steps, trapezoid."""
    points = list(zip(line["looks"], line["safe"]))
    return sum((b - a) * (low + high) / 2 for (a, low), (b, high) in itertools.pairwise(points)) / line["steps"]


def reach(line, level=0.95):
    """The step at which plain safety first reaches `level`, linear between looks; never is one more than the last step."""
    points = list(zip(line["looks"], line["safe"]))
    if points[0][1] >= level:
        return 0.0
    return next((b - (b - a) * (high - level) / (high - low) for (a, low), (b, high) in itertools.pairwise(points) if high >= level),
                line["steps"] + 1.0)


METRICS = {  # name: (head, figure of a line, digits)
    "area": ("area under curve", area, 3), "reach": ("steps to 95 %", reach, 1),
    "early": ("safe at 10", lambda line: line["safe"][line["looks"].index(10)], 3),
    "final": ("safe at end", lambda line: line["safe"][-1], 3),
    "jailbreak": ("jailbreak", lambda line: line["jailbreak"], 3),
    "harm verb": ("over-refusal, verb", lambda line: line["over_refusal"]["harm verb"], 3),
    "sensitive noun": ("over-refusal, noun", lambda line: line["over_refusal"]["sensitive noun"], 3),
    "benign": ("benign right", lambda line: line["benign"], 3), "share": ("ΔW in basis", lambda line: line["share"], 3)}


def by_run(lines, figure):
    """{variant: {(world, seed): a figure of its line}}, of the lines that have it."""
    found = {}
    for line in lines:
        if (value := figure(line)) is not None:
            found.setdefault(line["variant"], {})[line["world"], line["seed"]] = value
    return found


def world_means(runs):
    """{world: mean over seeds} of {(world, seed): value}, by world."""
    return {world: math.fsum(values := [value for (at, _), value in runs.items() if at == world]) / len(values)
            for world in sorted({at for at, _ in runs})}


def mean_error(values):
    """Mean and standard error of world means; the error is NaN of one."""
    values = torch.tensor(list(values), dtype=torch.float64)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def interval(differences, draws=10_000, seed=0):
    """95 % interval (low, high) of the mean of world differences, by bootstrap over worlds."""
    d = torch.tensor(differences, dtype=torch.float64)
    means = d[torch.randint(len(d), (draws, len(d)), generator=torch.Generator().manual_seed(seed))].mean(1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)   # t at 97.5 %, df from 1


def t_interval(differences):
    """95 % t-interval of the same; (NaN, NaN) of one world."""
    mean, error = mean_error(differences)
    half = T[min(len(differences) - 1, len(T)) - 1] * error if len(differences) > 1 else math.nan
    return mean - half, mean + half


def paired(found, name, against):
    """World means of the differences name − against, of the runs (world, seed) that both have."""
    runs = found[name].keys() & found.get(against, {}).keys()
    return list(world_means({run: found[name][run] - found[against][run] for run in runs}).values())


def means_table(lines):
    rows = []
    found = {metric: {name: world_means(runs) for name, runs in by_run(lines, figure).items()}
             for metric, (_, figure, _) in METRICS.items()}
    order = sorted(found["area"], key=lambda name: -mean_error(found["area"][name].values())[0])
    for name in order:
        row = [name, len(found["area"][name]), sum(line["variant"] == name for line in lines)]
        for metric, (_, _, digits) in METRICS.items():
            values = found[metric].get(name)
            mean, error = mean_error(values.values()) if values else (None, None)
            row.append(None if mean is None else f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else ""))
        rows.append(row)
    head = ["mean ± standard error over worlds", "worlds", "runs", *(head for head, *_ in METRICS.values())]
    return table(rows, head, right=range(1, 12))


def differences_table(lines, metric, against):
    """Paired differences of a metric against some variants: mean, bootstrap interval, t-interval, how many worlds are above 0."""
    head, figure, digits = METRICS[metric]
    found, rows = by_run(lines, figure), []
    for name in sorted(found, key=lambda name: -mean_error(world_means(found[name]).values())[0]):
        row = [name]
        for other in against:
            d = paired(found, name, other) if name != other else []
            if not d:
                row += [None, None, None, None]
                continue
            ends = [f"[{low:+.{digits}f}, {high:+.{digits}f}]" if len(d) > 1 else None for low, high in (interval(d), t_interval(d))]
            row += [f"{math.fsum(d) / len(d):+.{digits}f}", *ends,
                    f"{sum(value > 0 for value in d)}/{len(d)}"]
        rows.append(row)
    return table(rows, [head, *itertools.chain.from_iterable((f"− {other}", "bootstrap 95 %", "t 95 %", "above") for other in against)],
                 right=range(1, 4 * len(against) + 1))


def gains(lines, base="lora-own", best="oracle"):
    """[(variant, share of `best`'s gain in area over `base`)]: ratio of mean gains over the worlds that all three have."""
    found = {name: world_means(runs) for name, runs in by_run(lines, area).items()}
    out = []
    for name in found:
        worlds = found[name].keys() & found.get(base, {}).keys() & found.get(best, {}).keys()
        whole = math.fsum(found[best][w] - found[base][w] for w in worlds)
        if worlds and name not in (base, best) and whole:
            out.append((name, math.fsum(found[name][w] - found[base][w] for w in worlds) / whole))
    return sorted(out, key=lambda row: -row[1])


def best_rates(lines):
    """{variant: the rate of its largest mean area}, over the lines of the worlds that choices are made on: a table of others is fair."""
    rates = {}
    for name in sorted({line["variant"] for line in lines}):
        swept = {}
        for line in lines:
            if line["variant"] == name and line["world"] >= CHOICE:
                swept.setdefault(line["lr"], []).append(area(line))
        if len(swept) > 1:
            rates[name] = max(swept, key=lambda rate: math.fsum(swept[rate]) / len(swept[rate]))
    return rates


def report(args):
    lines = [line for path in args.results for line in read_lines(path).values()]
    rates = best_rates(lines)
    lines = [line for line in lines if line["world"] in args.worlds and line["variant"] in args.variants]
    if not lines:
        raise InputError(f"{', '.join(map(str, args.results))}: no lines of runs yet: run experiments/ablate.py first")
    against = [name for name in ("lora-own", "decoder-full", "lora-unit", "paper") if any(line["variant"] == name for line in lines)]
    common = [line for line in lines if line["lr"] == RATE]
    parts = [(f"all at learning rate {RATE:g}", common)] if common else []
    if best := [line for line in lines if line["lr"] == rates.get(line["variant"])]:
        told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if any(line["variant"] == name for line in best))
        parts.append((f"each at its own best rate, chosen on worlds from {CHOICE} on: {told}", best))
    for title, part in parts:
        print(f"\n{title}\n\n{means_table(part)}\n")
        for metric in ("area", "reach", "jailbreak", "harm verb", "sensitive noun") if not args.brief else ("area", "reach"):
            for other in (against[:2], against[2:]):
                if other:
                    print(f"{differences_table(part, metric, other)}\n")
        if told := gains(part):
            head = ["share of the oracle's gain in area over LoRA's own", ""]
            print(table([[name, f"{value:.0%}"] for name, value in told], head, right=(1,)) + "\n")
    if args.figure:
        draw(common or lines, args.figure)
        print(f"figure: {args.figure}")


def draw(lines, path):
    """Plain safety over steps: the mean over worlds of each variant, with a band of one standard error."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    areas = {name: world_means(runs) for name, runs in by_run(lines, area).items()}
    for number, name in enumerate(sorted(areas, key=lambda name: -mean_error(areas[name].values())[0])):
        mine = [line for line in lines if line["variant"] == name]
        curves = torch.tensor([list(world_means(by_run(mine, lambda line: line["safe"][i])[name]).values())
                               for i in range(len(mine[0]["safe"]))], dtype=torch.float64).T
        steps, mean = mine[0]["looks"], 100 * curves.mean(0)
        axes.plot(steps, mean, ("-", "--", ":", "-.")[number // 10 % 4], label=f"{name} ({len(curves)} worlds)")
        if len(curves) > 1:
            error = 100 * curves.std(0) / len(curves) ** 0.5
            axes.fill_between(steps, mean - error, mean + error, alpha=0.15)
    axes.set(xlabel="step", ylabel="held-out harmful prompts refused in full, %", ylim=(0, 101), xlim=(0, STEPS / 2))   # the rest is level
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    parser = files.Parser(__doc__)
    parser.add_argument("--variants", nargs="+", metavar="NAME",
                        help="by name (--list), or all (default: the standing six; for --table all)")
    parser.add_argument("--worlds", nargs="+", type=int, default=None, metavar="SEED", help="default 1 to 8")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="of fine-tuning (default 0 1)")
    parser.add_argument("--lrs", nargs="+", type=float, default=[RATE], metavar="LR", help=f"peak learning rates (default {RATE:g})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/worlds", metavar="DIR",
                        help="where worlds are built (default runs/worlds)")
    parser.add_argument("--out", type=Path, default=RESULTS / "standing.jsonl", metavar="FILE",
                        help="lines are added here (default experiments/results/standing.jsonl)")
    parser.add_argument("--list", action="store_true", help="print the variants, and stop")
    parser.add_argument("--table", action="store_true", help="print what the lines of --results say, and stop")
    parser.add_argument("--results", type=Path, nargs="+", default=None, metavar="FILE", help="for --table (default: --out)")
    parser.add_argument("--brief", action="store_true", help="for --table: differences in speed alone")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="for --table: safety over steps")
    args = parser.parse_args()
    if args.list:
        return print(table([[name, (function.__doc__ or "").split("\n")[0]] for name, function in VARIANTS.items()]))
    args.variants = list(VARIANTS) if args.variants == ["all"] or args.table and not args.variants else args.variants or list(STANDING)
    for name in args.variants:
        if name not in VARIANTS:
            raise InputError(f"--variants {name}: known are all, {', '.join(VARIANTS)}")
    args.worlds, args.results = args.worlds or list(range(1, 9)), args.results or [args.out]
    return report(args) if args.table else run(args)


if __name__ == "__main__":
    files.run_command(main)
