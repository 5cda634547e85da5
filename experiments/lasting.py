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
from experiments.ablate import (RESULTS, append_lines, final_figures, fine_tuned, read_lines,
                                safe_share, versions)
from experiments.neighbours import (averaging, gsae, guardspace, irr, lssf, salora, shared, ssah,
                                    steering)
from experiments.worlds import LAYERS, RANK, RATE, batches_of, built_world, fit
from features import SIDES, module_bases
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
    return held(model, salora.starts(model, refusals(world), rows, TARGETS, RANK), generator)


def guardspace_start(world, model, rows, generator):
    """GuardSpace: reads nothing that harmful prompts hold."""
    return held(model, guardspace.starts(model, refusals(world), TARGETS, RANK), generator)


def outside(bases_of):
    """The defence that neither reads nor writes bases_of(world, model, generator), {module: U}."""
    def begin(world, model, rows, generator):
        modules, starts = lora.linears(model, TARGETS), {}
        # Drawn before the bases, so that all begin at the same factors
        factors = {name: lora.random(module.weight, None, RANK, False, generator)
                   for name, module in modules.items()}
        for name, U in bases_of(world, model, generator).items():
            side = "left" if MODULES[lora.leaf(name)].side == "writers" else "right"
            starts[name] = shared.Start(*factors[name], **{side: torch.eye(len(U)) - U @ U.T})
        return held(model, starts, generator)
    return begin


def random_bases(world, model, generator):
    """As many directions as the gradient chooses for each layer and side, but random ones."""
    shape = model.config.hidden_size, RANK
    spaces = {(layer, side): torch.linalg.qr(torch.randn(shape, generator=generator)).Q
              for layer in LAYERS for side in SIDES}
    return module_bases(model, spaces)


def ssah_frozen(world, model, rows, generator):
    """SSAH: LoRA's own init, less the rows and columns of units that safety needs."""
    harmless = [aligned for aligned, _ in world.examples
                if verdict(world.tokenizer.decode(aligned.tokens[aligned.start:])) == "comply"]
    masks = ssah.frozen_masks(model, refusals(world), harmless)
    parameters, after_step = own_init(world, model, rows, generator)
    shared.freeze(model, masks)
    return parameters, after_step


def averaged(world, model, rows, generator):
    """Weight averaging: at the end the moving average of the factors from the beginning on."""
    parameters, _ = own_init(world, model, rows, generator)
    state: dict = {}
    averaging.average(state, parameters)

    def after_step(step):
        averaging.average(state, parameters)
        if step == LATER:
            averaging.end_at_average(state, parameters)
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
    "averaging": averaged,
    # Ours: the safety subspace is kept free, as the paper or the gradient chooses it; a random one
    "paper": outside(variants.paper), "greedy": outside(variants.greedy),
    "random": outside(random_bases)}


# -------------------------------------------------------------------------------------------------
# Arms: a variant of the grid, or the base model: as it is, or steered while it answers

STEERED = ["steering-by-features", "gsae-steering"]

# The table: {arm: the defences that follow it}
ARMS = dict.fromkeys(["paper", "orthonormal", "full-fine-tuning", "pissa", "olora", "eva",
                      "lora-lox", "lora-rosi", "derta-own", "sift", "sspu", "bias-adapted",
                      *STEERED], [NO_DEFENCE])
ARMS |= {"greedy-rotated": [NO_DEFENCE, "greedy"],
         "lora-own": [defence for defence in DEFENCES if defence != "paper"]}


def aligned_model(world, variant: str, rate: float, seed: int):
    """A variant's model, merged, or the base model."""
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
    lost = {arm: {run: before[arm][run] - value for run, value in values.items()}
            for arm, values in later.items()}
    columns = {
        "jailbreak before": before, "jailbreak after": later,
        "over-refusal": values_of(lines, kind, "over_refusal"),
        "plain harm": values_of(lines, kind, "harmful"),
        "benign right": values_of(lines, kind, "benign")}
    rows = []
    for arm in tables.sorted_by_mean(later):
        cells = [tables.interval_cell(values[arm], 1, 100) for values in columns.values()]
        leads = [tables.paired(values, arm, baseline) if arm != baseline else None
                 for values in (lost, later)]
        rows.append([arm, len(later[arm]), *cells,
                     *(tables.lead_cell(lead, 1, 100) for lead in leads)])
    head = ["arm", "runs", *columns, "lost, less " + baseline, "after, less " + baseline]
    title = f"%, ± 95 % over worlds; all but the first: after {LATER} steps on {kind} rows"
    return f"{title}\n{table(rows, head, right=range(1, len(head)))}"


def draw(lines, kinds, path) -> None:
    """Safety under jailbreak, before (hollow) and after (full): an arm a line, a kind a panel."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    before = values_of(lines, None, "jailbreak")
    arms = tables.sorted_by_mean(values_of(lines, kinds[0], "jailbreak"))[::-1]
    heights = {arm: height for height, arm in enumerate(arms)}
    picture, panels = pyplot.subplots(1, len(kinds), sharey=True, squeeze=False,
                                      figsize=(3 + 3.5 * len(kinds), 0.3 * len(arms) + 1.2),
                                      constrained_layout=True)
    for kind, axes in zip(kinds, panels[0]):
        later = values_of(lines, kind, "jailbreak")
        for values, color, face, shift in (before, "0.6", "white", 0.2), (later, "C0", "C0", -0.2):
            for arm in heights.keys() & values.keys():
                means = [100 * mean for mean in tables.world_means(values[arm]).values()]
                center, height = sum(means) / len(means), heights[arm] + shift
                axes.plot(tables.t_interval(means), [height, height], color=color)
                axes.plot(center, height, "o", color=color, mfc=face, ms=5)
        axes.set(xlim=(-2, 102), title=f"{kind} rows")
        axes.grid(alpha=0.3)
    panels[0, 0].set_yticks(range(len(arms)), arms)
    picture.supxlabel("safe under jailbreak, %: aligned (hollow), fine-tuned again (full)")
    picture.savefig(path, dpi=120)
    pyplot.close(picture)


def key_of(line, kind) -> tuple:
    return line["world"], line["seed"], line["lr"], label(line), kind


def run_missing(args, rates: dict[str, float], defences: dict[str, list], lines) -> None:
    """Append what is missing to --out and to the lines; {arm: rate of its alignment}."""
    torch.set_num_threads(1)
    done = {key_of(line, kind) for line in lines for kind in line["after"]}
    for world_seed in args.worlds:
        world = built_world(world_seed)
        if not world:
            continue
        for seed, variant in itertools.product(args.seeds, args.arms):
            key = {"world": world_seed, "seed": seed, "lr": rates[variant], "variant": variant}
            left = [defence for defence in defences[variant] if not done.issuperset(
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
    add("--arms", nargs="+", default=list(ARMS), metavar="NAME",
        choices=[*variants.VARIANTS, *STEERED, "base"],
        help="base, a way to steer it, or a variant of experiments.ablate (default: those of the "
             f"table: {', '.join(ARMS)})")
    add("--defences", nargs="+", choices=list(DEFENCES), metavar="NAME",
        help=f"of {', '.join(DEFENCES)} (default: an arm's in the table, or none)")
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
    add("--figure", type=Path, metavar="PNG", help="for --print: draw it")
    args = parser.parse_args()
    best = tables.best_rates(read_lines([RESULTS / "standing.jsonl"]))
    rates = {arm: args.lr or best.get(arm, RATE) for arm in args.arms}
    defences = {arm: args.defences or ARMS.get(arm, [NO_DEFENCE]) for arm in args.arms}
    lines = read_lines([args.out])
    if not args.print:
        run_missing(args, rates, defences, lines)
    lines = [line for line in lines if rates.get(line["variant"]) == line["lr"]
             and line["defence"] in defences[line["variant"]]]
    for kind in args.rows:
        of_kind = [line for line in lines if kind in line["after"]]
        if not of_kind:
            raise InputError(f"{args.out} has no lines of {kind!r}")
        print(results(of_kind, kind, args.less))
    if args.figure:
        draw(lines, args.rows, args.figure)


if __name__ == "__main__":
    run_command(main)
