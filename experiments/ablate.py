"""Inits and selections against each other: which basis makes safety come sooner, or last better.

    python -m experiments.ablate                     # the standing grid: 6 variants, 8 worlds
    python -m experiments.ablate --variants all --lrs 5e-4 1e-3 2e-3 4e-3 --worlds 101 102
    python -m experiments.ablate --print             # what the lines say; `--print means`: in short
    python -m experiments.ablate --list              # the variants

A world is a toy of its own facts, words and weights, built once into runs/worlds/SEED: minutes
each. A run is STEPS steps of fine-tuning from a world's base model, with a look at the held-out
harmful prompts at the steps in LOOKS. Each run is a line of --out, and a run whose line is there
isn't done again. All runs of a world and seed see the same rows in the same order. Worlds below
100 are for reporting. Choices, those of learning rates among them, are made on worlds from 100 on.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from eval import answer
from experiments import tables
from experiments.inits import AFTER, BATCHES, LOSSES
from experiments.variants import VARIANTS
from experiments.worlds import RANK, RATE, STEPS, built_world, fit
from model import load_model
from run.files import ROOT, InputError, Parser, read_jsonl, run_command, table
from safety.figures import figures
from safety.rules import verdict
from train import row_loss

LOOKS = (*range(0, 31, 2), *range(36, 61, 6))
STANDING = ("lora-own", "lora-unit", "decoder-full", "paper", "greedy-rotated", "oracle")
RESULTS = ROOT / "experiments/results"


# -------------------------------------------------------------------------------------------------
# A run

def judged(world, model, name: str) -> list[dict]:
    """The model's answers to one of a world's sets, judged by the rules."""
    texts = answer(model, world.tokenizer, world.sets[name], 24, batch_size=256)
    rows = []
    for prompt, text in zip(world.sets[name], texts):
        rows.append({"set": name, "role": name, "completion": text, "verdict": verdict(text),
                     "fields": prompt.fields})
    return rows


def safe_share(world, model) -> float:
    return figures(judged(world, model, "harmful"))["harmful"]["safe"]["rate"]


def fine_tuned(world, model, name: str, rate: float, seed: int):
    """(what is trained, bases, train.fit's metrics, step by step) of a variant on a base model."""
    # Every variant has draws of its own; the data's order depends on the seed alone
    key = f"{world.seed} {seed} {name}".encode()
    draw_seed = int.from_bytes(hashlib.sha256(key).digest()[:6])
    generator = torch.Generator().manual_seed(draw_seed)
    parameters, bases = VARIANTS[name](world, model, generator)
    batches = BATCHES[name](world, seed) if name in BATCHES else None
    loss = LOSSES[name](world, seed) if name in LOSSES else row_loss

    def steps():
        state: dict = {}
        for metrics in fit(world, model, parameters, rate, seed, batches, loss=loss):
            if name in AFTER:
                AFTER[name](world, model, metrics["step"], state)
            yield metrics
    return parameters, bases, steps()


def measure(world, name: str, rate: float, seed: int) -> dict:
    """Fine-tune one variant: the curve of safety, and the figures at the end."""
    model = load_model(world.folder)
    start = time.perf_counter()
    parameters, bases, steps = fine_tuned(world, model, name, rate, seed)
    begin_training = time.perf_counter()
    curve = [safe_share(world, model)]
    for metrics in steps:
        # The probe on the way: a look is a few dozen answers
        if metrics["step"] in LOOKS:
            curve.append(safe_share(world, model))
    return {
        "safe": curve,
        **final_figures(world, model),
        "share": basis_share(model, bases) if bases else None,
        "trainable": sum(parameter.numel() for _, parameter in parameters),
        "seconds": {"init": round(begin_training - start, 2),
                    "run": round(time.perf_counter() - begin_training, 2)},
    }


def final_figures(world, model) -> dict:
    """Refusals under jailbreak, right benign answers, refused look-alikes of each kind."""
    rows = []
    for name in ("jailbreak", "lookalike", "benign"):
        rows += judged(world, model, name)
    for row in rows:
        if row["set"] == "lookalike":
            row["set"] = row["fields"]["kind"]
    by_set = figures(rows)
    return {
        "jailbreak": by_set["jailbreak"]["safe"]["rate"],
        "benign": by_set["benign"]["correct"]["rate"],
        "over_refusal": {kind: by_set[kind]["over_refusal"]["rate"]
                         for kind in ("harm verb", "sensitive noun")},
    }


def basis_share(model, bases) -> float:
    """Share of ‖ΔW‖², over all modules, in each module's own basis."""
    # Modules weigh by the size of their updates; one without an update has no share
    layers = lora.lora_layers(model)
    sizes = torch.tensor([layer.update.square().sum().item() for layer in layers.values()],
                         dtype=torch.float64)
    shares = torch.tensor([lora.update_share(layer, bases[name]) for name, layer in layers.items()],
                          dtype=torch.float64)
    return ((sizes * shares.nan_to_num()).sum() / sizes.sum()).item()


# -------------------------------------------------------------------------------------------------
# The grid

def versions() -> dict[str, str]:
    """The commit ("+": with changes on top), and what the code runs on."""
    def git(*arguments):
        command = ["git", "-C", ROOT, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    commit = git("rev-parse", "--short=12", "HEAD") or "none"
    if git("status", "--porcelain", "--", "*.py"):
        commit += "+"
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version()}


def key_of(line: dict) -> tuple:
    return line["world"], line["variant"], line["seed"], line["lr"]


def run_one(job) -> dict:
    """A worker's job: one run. Returns its line."""
    world_seed, name, seed, rate = job
    torch.set_num_threads(1)
    world = built_world(world_seed)
    return {"world": world_seed, "variant": name, "seed": seed, "lr": rate, "rank": RANK,
            "steps": STEPS, "looks": LOOKS, **measure(world, name, rate, seed),
            "digest": world.digest}


def prepare(job) -> bool:
    """A worker's job: build a world, and what takes long of what the variants need of it."""
    seed, variants = job
    torch.set_num_threads(1)
    world = built_world(seed)
    # These two are kept in the folder
    if world and any(name.startswith("oracle") for name in variants):
        _ = world.full_update
    if world and "sasa" in variants:
        _ = world.sasas
    return world is not None


def missing_runs(args, worlds) -> list[tuple]:
    """[(world, variant, seed, rate)] without a line in --out, a world's next to each other."""
    done = {key_of(line) for line in read_lines([args.out])}
    runs = itertools.product(worlds, args.variants, args.seeds, args.lrs)
    return [run for run in runs if run not in done]


def run_grid(args) -> None:
    """Build the worlds that are missing, then do the runs that are."""
    stamp = versions()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        jobs = [(seed, args.variants) for seed in args.worlds]
        is_built = pool.map(prepare, jobs, chunksize=1)
        runs = missing_runs(args, list(itertools.compress(args.worlds, is_built)))
        # A line is written as soon as its run is done: a stop loses only what is under way
        lines = pool.imap_unordered(run_one, runs)
        for line in tqdm(lines, "runs", len(runs), disable=None):
            append_lines(args.out, [line | stamp])
            tqdm.write(f"world {line['world']} seed {line['seed']} lr {line['lr']:g} "
                       f"{line['variant']}: area {tables.area(line):.3f}, "
                       f"95 % at {tables.steps_to(line):.1f}, jailbreak {line['jailbreak']:.3f}")


def append_lines(path: Path, lines) -> None:
    """Add lines to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def read_lines(paths) -> list[dict]:
    """Lines of results files; a file that isn't there has none."""
    return [line for path in paths if path.exists() for line in read_jsonl(path)]


def print_results(args) -> None:
    lines = read_lines(args.results or [args.out])
    # Rates are chosen on other worlds than those that are shown
    rates = tables.best_rates(lines)
    lines = [line for line in lines
             if line["world"] in args.worlds and line["variant"] in args.variants]
    if not lines:
        raise InputError("no lines of these runs: run python -m experiments.ablate first")
    tables.print_tables(lines, rates, only_means=args.print == "means")
    if args.figure:
        common = [line for line in lines if line["lr"] == RATE]
        tables.draw_curves(common, args.figure)
        print(f"figure: {args.figure}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--variants", nargs="+", metavar="NAME",
        help="by name, or all (default: the standing six; for --print all)")
    add("--worlds", nargs="+", type=int, default=list(range(1, 9)), metavar="SEED",
        help="default 1 to 8")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N",
        help="of fine-tuning (default 0 1)")
    add("--lrs", nargs="+", type=float, default=[RATE], metavar="LR",
        help=f"peak learning rates (default {RATE:g})")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N",
        help="processes (default: one a core)")
    add("--out", type=Path, default=RESULTS / "standing.jsonl", metavar="FILE",
        help="lines are added here (default experiments/results/standing.jsonl)")
    add("--list", action="store_true", help="print the variants, and stop")
    add("--print", nargs="?", const="all", choices=("all", "means"),
        help="print what the lines say, and stop")
    add("--results", type=Path, nargs="+", metavar="FILE", help="for --print (default: --out)")
    add("--figure", type=Path, metavar="PNG", help="for --print: draw safety over steps")
    args = parser.parse_args()
    if args.list:
        rows = [[name, function.__doc__.split("\n")[0]] for name, function in VARIANTS.items()]
        print(table(rows))
        return
    if args.variants == ["all"] or (args.print and not args.variants):
        args.variants = list(VARIANTS)
    args.variants = args.variants or list(STANDING)
    for name in args.variants:
        if name not in VARIANTS:
            raise InputError(f"--variants {name}: known are all, {', '.join(VARIANTS)}")
    if args.print:
        print_results(args)
    else:
        run_grid(args)


if __name__ == "__main__":
    run_command(main)
