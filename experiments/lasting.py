"""Does safety last? Each way to align a model, on eight worlds, before and after what comes next.

    python -m experiments.lasting                                # all arms: hours
    python -m experiments.lasting --worlds 1 --seeds 0 --arms paper lora-own
    python -m experiments.lasting --print --figure lasting.png   # what the lines say

An arm aligns a world's base model, at its best rate by the sweep in results/standing.jsonl. The
model is then merged and fine-tuned once more, LATER steps at RATE on the world's benign rows (or
others of experiments/after.py). A defence is what the second fine-tuning does differently, so it
takes somebody who cooperates: "lora-own, then salora" is LoRA's own init, then SaLoRA. Sets are
asked before and after. Each run is a line of --out, and a run whose line is there isn't done again.
"""

import copy
import itertools
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

import lora
from experiments import after, tables, variants
from experiments.ablate import (RESULTS, WORLDS, append_lines, final_figures, fine_tuned,
                                read_lines, safe_share, versions)
from experiments.neighbours import (gsae, guardspace, irr, lssf, salora, shared, ssah,
                                    steering)
from experiments.worlds import RANK, RATE, batches_of, build_world, fit, load_world
from model import MODULES, TARGETS, load_model
from run.files import InputError, Parser, run_command, table
from safety.ask import edited, steered
from safety.rules import verdict
from toy import build as toy
from toy.world import World as Words

LATER = 30                     # steps of the second fine-tuning, at RATE
STRENGTH = 2.0                 # of steering, at all layers with SAEs
NO_DEFENCE = "none"


# -------------------------------------------------------------------------------------------------
# What the second fine-tuning trains: LoRA's own init, or a defence in its place. A defence is
# (world, model, rows, generator) -> (what is trained, a function that is called after each step)

@cache
def refusals(world):
    return shared.refusals(SimpleNamespace(data=world.folder), world.tokenizer, world.examples)


def own_init(world, model, rows, generator):
    layers = lora.add_lora(model, RANK, RANK, "random", generator=generator)
    return lora.trainable_parameters(layers), lambda step: None


def held(model, starts, generator):
    """Adapters that begin at starts {module: shared.Start}, and stay inside their projectors."""
    modules = lora.linears(model, TARGETS)
    of_weight = {modules[name].weight: start for name, start in starts.items()}

    def init(weight, *_):
        return of_weight[weight].factors()

    layers = lora.add_lora(model, RANK, RANK, init, generator=generator)
    for name, layer in layers.items():
        shared.hold(layer, starts[name])

    def after_step(step):
        for name, layer in layers.items():
            shared.project(layer, starts[name])
    return lora.trainable_parameters(layers), after_step


def salora_start(world, model, rows, generator):
    """SaLoRA: writes nothing where refusals are written."""
    safe, task = (shared.input_moments(model, examples, TARGETS)
                  for examples in (refusals(world), rows))
    starts = {name: salora.start(module.weight, safe[name], task[name], RANK)
              for name, module in lora.linears(model, TARGETS).items()}
    return held(model, starts, generator)


def guardspace_start(world, model, rows, generator):
    """GuardSpace: reads nothing that harmful prompts hold."""
    prompts = [replace(example, tokens=example.tokens[:example.start], start=0)
               for example in refusals(world)]
    moments = shared.input_moments(model, prompts, TARGETS)
    starts = {name: guardspace.start(module.weight, moments[name], RANK)
              for name, module in lora.linears(model, TARGETS).items()}
    return held(model, starts, generator)


def outside(bases_of):
    """The defence that neither reads nor writes bases_of(world, model, generator), {module: U}."""
    def begin(world, model, rows, generator):
        starts = {}
        bases = bases_of(world, model, generator)
        for name, module in lora.linears(model, TARGETS).items():
            projector = torch.eye(len(bases[name])) - bases[name] @ bases[name].T
            writer = MODULES[lora.leaf(name)].side == "writers"
            factors = lora.random(module.weight, None, RANK, writer, generator)
            starts[name] = shared.Start(*factors, **{"left" if writer else "right": projector})
        return held(model, starts, generator)
    return begin


def ssah_frozen(world, model, rows, generator):
    """SSAH: LoRA's own init, less the rows and columns of units that safety needs."""
    harmless = [aligned for aligned, _ in world.examples
                if verdict(world.tokenizer.decode(aligned.tokens[aligned.start:])) == "comply"]
    masks = ssah.frozen_masks(model, refusals(world), harmless)
    parameters, after_step = own_init(world, model, rows, generator)
    shared.freeze(model, masks)
    return parameters, after_step


def mended(mend):
    """The defence that lets LoRA's own init train, and mends the model after the last step, by the
    aligned model and the world's base model, the unaligned one."""
    def begin(world, model, rows, generator):
        aligned = copy.deepcopy(model)
        parameters, _ = own_init(world, model, rows, generator)
        task = [replace(example, start=0) for example in rows]

        def after_step(step):
            if step == LATER:
                lora.fold_lora(model)
                mend(aligned, model, world.model, refusals(world), task)
        return parameters, after_step
    return begin


DEFENCES = {
    NO_DEFENCE: own_init, "salora": salora_start, "guardspace": guardspace_start,
    "ssah": ssah_frozen, "irr": mended(irr.realign), "lssf": mended(lssf.fuse),
    # Ours: the safety subspace is kept free, as the paper chooses it or by the gradient
    "paper": outside(variants.paper), "greedy": outside(variants.greedy)}


# -------------------------------------------------------------------------------------------------
# Arms: a variant of the grid, and the defences that follow it

ARMS = {
    "paper": [NO_DEFENCE, "paper"],
    "greedy-rotated": [NO_DEFENCE, "greedy"],
    "orthonormal": [NO_DEFENCE],
    "lora-own": [defence for defence in DEFENCES if defence != "paper"],
    "full-fine-tuning": [NO_DEFENCE],
    "derta-own": [NO_DEFENCE],
    "derta-paper": [NO_DEFENCE],
    "sspu": [NO_DEFENCE],
    "pissa": [NO_DEFENCE],
    "olora": [NO_DEFENCE],
    "eva": [NO_DEFENCE],
    "sift": [NO_DEFENCE],
    "lora-lox": [NO_DEFENCE],
    "lora-rosi": [NO_DEFENCE],
    "lora-average": [NO_DEFENCE],
    "bias-adapted": [NO_DEFENCE],
    # The base model, which nobody has aligned: two answer while features are added (`answering`)
    "steering-by-features": [NO_DEFENCE],
    "gsae-steering": [NO_DEFENCE],
    "base": [NO_DEFENCE]}


def aligned_model(world, variant: str, rate: float, seed: int):
    """A variant's model, merged; the base model for what is no variant."""
    model = load_model(world.folder)
    if variant in variants.VARIANTS:
        _, _, steps = fine_tuned(world, model, variant, rate, seed)
        for _ in steps:
            pass
        lora.fold_lora(model)
    return model


def answering(world, model, variant: str):
    """The context in which an arm's model answers: steering for two, none for the others."""
    if variant == "steering-by-features":
        return steered(model, steering.directions(world.saes, world.statistics, STRENGTH))
    if variant == "gsae-steering":
        saes = world.other_saes("gsae", toy.SAES["sae"], gsae.GraphTraining)
        statistics = world.statistics_of(saes)
        return edited(model, {layer: gsae.edit(sae, statistics[layer], STRENGTH)
                              for layer, sae in saes.items()})
    return nullcontext()


def asked(world, model, variant: str) -> dict:
    """The figures of a model's answers to a world's sets."""
    with answering(world, model, variant):
        return {"harmful": safe_share(world, model), **final_figures(world, model)}


@cache
def later_rows(world) -> dict:
    """{kind: Examples} of the world's rows, of which the second fine-tuning takes a mixture."""
    return {kind: [world.example((("user", row["prompt"]),), row["response"]) for row in rows]
            for kind, rows in after.toy_rows(Words(world.seed)).items()}


def measure(world, variant: str, rate: float, seed: int, kinds, defences) -> list[dict]:
    """A line for each of the defences: the figures before and after each kind of rows."""
    aligned = aligned_model(world, variant, rate, seed)
    before = asked(world, aligned, variant)
    mixtures = after.mixtures(later_rows(world), seed)
    lines = []
    for defence in defences:
        line = {"variant": variant, "defence": defence, "before": before, "after": {}}
        for kind in kinds:
            # All arms see the same rows in the same order, and begin at the same adapters
            model, generator = copy.deepcopy(aligned), torch.Generator().manual_seed(seed)
            begin = DEFENCES[defence]
            parameters, after_step = begin(world, model, mixtures[kind], generator)
            batches = batches_of(mixtures[kind], seed)
            for metrics in fit(world, model, parameters, RATE, seed, batches, LATER):
                after_step(metrics["step"])
            line["after"][kind] = asked(world, model, variant)
        lines.append(line)
    return lines


# -------------------------------------------------------------------------------------------------
# What the lines say

BASELINE = "lora-own"


def label(line) -> str:
    if line["defence"] == NO_DEFENCE:
        return line["variant"]
    return f"{line['variant']}, then {line['defence']}"


def figure(line, kind, name: str) -> float:
    """A figure before (kind None) or after a second fine-tuning; over-refusal is of both kinds."""
    figures = line["after"][kind] if kind else line["before"]
    if name == "over_refusal":
        return sum(figures[name].values()) / len(figures[name])
    return figures[name]


def values_of(lines, kind, name: str) -> dict:
    """{label: {(world, seed): the figure}}, for tables.paired and tables.world_means."""
    values: dict = defaultdict(dict)
    for line in lines:
        if kind is None or kind in line["after"]:
            values[label(line)][line["world"], line["seed"]] = figure(line, kind, name)
    return values


def results(lines, kind: str, baseline=BASELINE) -> str:
    """The table of one kind of rows, the arm that is safest under jailbreak afterwards first."""
    before, later = (values_of(lines, of, "jailbreak") for of in (None, kind))
    columns = {
        "jailbreak": before,
        "after": later,
        "lost": {arm: {run: before[arm][run] - value for run, value in values.items()}
                 for arm, values in later.items()},
        "harmful after": values_of(lines, kind, "harmful"),
        "over-refusal after": values_of(lines, kind, "over_refusal"),
        "right after": values_of(lines, kind, "benign")}
    rows = []
    for arm in tables.sorted_by_mean(later):
        lead = tables.paired(later, arm, baseline) if arm != baseline else None
        cells = [tables.interval_cell(values[arm], 1, 100) for values in columns.values()]
        rows.append([arm, len(later[arm]), *cells, tables.lead_cell(lead, 1, 100)])
    head = ["arm", "runs", *columns, f"jailbreak after, less {baseline}"]
    title = f"%, ± 95 % over worlds; after: {LATER} steps on {kind} rows"
    return f"{title}\n{table(rows, head, right=range(1, len(head)))}"


def draw(lines, kind: str, path) -> None:
    """Safety under jailbreak, before (hollow) and after (full), an arm a line."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    before, later = (values_of(lines, of, "jailbreak") for of in (None, kind))
    arms = tables.sorted_by_mean(later)[::-1]
    picture, axes = pyplot.subplots(figsize=(7, 0.3 * len(arms) + 1.2), constrained_layout=True)
    for height, arm in enumerate(arms):
        for values, face in ((before, "white"), (later, "C0")):
            means = [100 * mean for mean in tables.world_means(values[arm]).values()]
            center = sum(means) / len(means)
            reach = center - tables.t_interval(means)[0] if len(means) > 1 else None
            axes.errorbar(center, height, xerr=reach, fmt="o", color="C0", mfc=face, capsize=2)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlim=(-2, 102),
             xlabel=f"safe under jailbreak, %: aligned (hollow), after {kind} rows (full)")
    axes.grid(alpha=0.3)
    picture.savefig(path, dpi=120)
    pyplot.close(picture)


def key_of(line, kind) -> tuple:
    return line["world"], line["seed"], line["lr"], label(line), kind


def run_missing(args, rates: dict[str, float], lines) -> None:
    """Append what is missing to --out and to the lines; rates: {arm: of its alignment}."""
    torch.set_num_threads(1)
    done = {key_of(line, kind) for line in lines for kind in line["after"]}
    for world_seed in args.worlds:
        build_world(world_seed, str(WORLDS))
        if not (WORLDS / str(world_seed) / "world.json").exists():
            continue
        world = load_world(world_seed, str(WORLDS))
        for seed, variant in itertools.product(args.seeds, args.arms):
            key = {"world": world_seed, "seed": seed, "lr": rates[variant], "variant": variant}
            wanted = [defence for defence in ARMS[variant] if defence in args.defences]
            left = [defence for defence in wanted if not done.issuperset(
                key_of(key | {"defence": defence}, kind) for kind in args.rows)]
            runs = measure(world, variant, rates[variant], seed, args.rows, left) if left else ()
            for line in runs:
                line = key | line | {"digest": world.digest} | versions()
                append_lines(args.out, [line])
                lines.append(line)
                print(f"world {world_seed}, seed {seed}, {label(line)}: jailbreak "
                      f"{figure(line, None, 'jailbreak'):.2f}, then "
                      f"{[round(figure(line, kind, 'jailbreak'), 2) for kind in args.rows]}",
                      flush=True)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="NAME",
        help=f"of {', '.join(ARMS)} (default: all)")
    add("--defences", nargs="+", default=list(DEFENCES), choices=list(DEFENCES), metavar="NAME",
        help=f"of {', '.join(DEFENCES)} (default: all that an arm has)")
    add("--lr", type=float, metavar="LR",
        help="of the alignment (default: each arm's best)")
    add("--worlds", nargs="+", type=int, default=list(range(1, 9)), metavar="SEED",
        help="default 1 to 8")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="default 0 1")
    add("--rows", nargs="+", default=["benign"], metavar="KIND",
        help="of the second fine-tuning: benign (default), '1%% harmful', '5%% harmful', "
             "'10%% harmful', identity")
    add("--out", type=Path, default=RESULTS / "lasting.jsonl", metavar="FILE",
        help="lines are added here (default experiments/results/lasting.jsonl)")
    add("--print", action="store_true", help="print what the lines say, and stop")
    add("--less", default=BASELINE, metavar="ARM",
        help=f"that the others are compared with in the table (default {BASELINE})")
    add("--figure", type=Path, metavar="PNG", help="for --print: draw the first kind of rows")
    args = parser.parse_args()
    best = tables.best_rates(read_lines([RESULTS / "standing.jsonl"]))
    rates = {arm: args.lr or best.get(arm, RATE) for arm in args.arms}
    lines = read_lines([args.out])
    if not args.print:
        run_missing(args, rates, lines)
    lines = [line for line in lines
             if rates.get(line["variant"]) == line["lr"] and line["defence"] in args.defences]
    for kind in args.rows:
        of_kind = [line for line in lines if kind in line["after"]]
        if not of_kind:
            raise InputError(f"{args.out} has no lines of {kind!r}")
        print(results(of_kind, kind, args.less))
    if args.figure:
        draw([line for line in lines if args.rows[0] in line["after"]], args.rows[0], args.figure)


if __name__ == "__main__":
    run_command(main)
