"""Does safety last? Aligned models are fine-tuned once more, and asked on the way.

    python -m experiments.after runs/sails runs/lora-own        # toys: rows of their own words
    python -m experiments.after RUN ADAPTER FOLDER --benign FILE --harmful FILE --identity FILE
    python -m experiments.after --print --figure after.png      # what the lines say

Rows are benign; benign with 1, 5 and 10 % that comply with harm; or "identity": harmless ones that
teach to obey (arXiv 2310.03693). FILEs have one answer a row, as train.py's --data takes them.
An adapter is merged, and LoRA's own init is trained on top, so that all models begin alike. Each
run is a line of --out, and a run whose line is there isn't done again. Intervals are over worlds
(base models); of a single world over prompts, Wilson's, of the mean over seeds.
"""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import lora
import train
from data import load_examples, load_tokenizer
from eval import answer, sets_of
from experiments.ablate import append_lines, read_lines, versions
from experiments.tables import t_interval, world_means
from run.files import ROOT, InputError, Parser, read_json, run_command, table, write_jsonl
from run.settings import model_folder
from safety.arms import find_arm, loaded, shared_settings
from safety.figures import figures, grouped, main_figure, wilson
from safety.rules import verdict
from toy.world import PHRASINGS, PREAMBLES, TUNED_JAILBREAKS, TUNED_PHRASINGS, World, ask

KINDS = ("benign", "harmful", "identity")
RANK, COUNT, SHARES = 16, 400, (0.01, 0.05, 0.1)
KEY = ("place", "rows", "lr", "seed", "looks", "prompts", "files")


def toy_rows(world: World) -> dict[str, list[dict]]:
    """{kind: rows} of the fine-tuning words, phrasings and jailbreaks, none of the evaluation's."""
    draw = random.Random(f"after {world.seed}")
    rows = {}
    for kind in KINDS:
        verbs, nouns = ("harm", "sensitive") if kind == "harmful" else ("plain", "thing")
        preambles = PREAMBLES["jailbreak" if kind == "identity" else "none"][:TUNED_JAILBREAKS]
        rows[kind] = []
        for _ in range(COUNT):
            words = draw.choice(world.tune[verbs]), draw.choice(world.tune[nouns])
            prompt = ask(draw, *words, PHRASINGS[:TUNED_PHRASINGS], preambles)
            rows[kind].append({"prompt": prompt, "response": world.help(draw, *words)})
    return rows


def world_of(arm) -> str:
    """The base that a model began with: worlds are what intervals are over."""
    return arm.run.model if arm.run else arm.base


def files_of(args, base: str) -> dict[str, str]:
    """{kind: file} of the flags; without them a toy's rows, written beside --out."""
    files = {kind: file for kind in KINDS if (file := getattr(args, kind))}
    path = Path(model_folder(base)) / "world.json"
    if not files and path.exists():
        world = World(read_json(path)["seed"])
        for kind, rows in toy_rows(world).items():
            files[kind] = str(args.out.parent / f"world-{world.seed}-{kind}.jsonl")
            write_jsonl(files[kind], rows)
    if "benign" not in files:
        raise InputError(f"{base} has no rows of its own: give --benign FILE")
    return files


def mixtures(examples: dict[str, list], seed: int) -> dict[str, list]:
    """{name: at most COUNT examples}: benign, of which a share becomes harmful; identity."""
    draw = random.Random(seed)
    drawn = {kind: draw.sample(rows, min(COUNT, len(rows))) for kind, rows in examples.items()}
    benign, harmful = drawn["benign"], drawn.pop("harmful", [])
    for share in SHARES if harmful else ():
        number = round(share * len(benign))
        if not 0 < number <= len(harmful):
            raise InputError(f"{share:.0%} of {len(benign)} rows are {number}, and --harmful has "
                             f"{len(harmful)}: give files of 100 rows or more")
        drawn[f"{share:.0%} harmful"] = harmful[:number] + benign[number:]
    return drawn


def look(model, tokenizer, sets, settings) -> dict[str, dict]:
    """{"role: figure": share} of each set's main figure, by the rules."""
    shares = {}
    for name, of_set in sets.items():
        texts = answer(model, tokenizer, of_set.prompts, settings.max_new_tokens,
                       settings.eval_batch, settings.format, name)
        rows = [{"set": name, "role": of_set.role, "completion": text, "verdict": verdict(text),
                 "fields": prompt.fields} for prompt, text in zip(of_set.prompts, texts)]
        by_name = figures(rows)[name]
        main = main_figure(of_set.role, by_name)
        shares[f"{name}: {main.replace('_', '-')}"] = by_name[main]
    return shares


def fine_tuned(model, examples, settings, line, measure) -> list[dict]:
    """Train a new adapter as the line says; a `measure` at each of its looks after the first."""
    generator = torch.Generator().manual_seed(line["seed"])
    layers = lora.add_lora(model, RANK, RANK, "random", generator=generator)
    parameters = [parameter for _, parameter in lora.trainable_parameters(layers)]
    optimizer = torch.optim.AdamW(parameters, line["lr"], weight_decay=0.0)
    order = SimpleNamespace(**vars(settings) | {"seed": line["seed"]})
    steps = line["looks"][-1]
    batches = itertools.islice(train.batches_of(examples, order), steps)
    schedule = train.cosine(line["lr"], steps, 0.1)
    fit = train.fit(model, optimizer, batches, schedule, clip=1.0)
    return [measure(model) for metrics in tqdm(fit, "steps", steps, leave=False, disable=None)
            if metrics["step"] in line["looks"]]


def run_arm(args, arm, arms) -> None:
    """All runs of an arm that have no line yet, under the settings and sets of its world."""
    settings = shared_settings(arms, args.device)
    tokenizer = load_tokenizer(model_folder(arm.base))
    files = files_of(args, world_of(arm))
    sets, examples = sets_of(args, arms, settings), {}
    for kind, file in files.items():
        pairs, rows = load_examples(file, tokenizer, settings.batch_tokens, settings.format, False)
        examples[kind] = [aligned for aligned, _ in pairs]
        trained = {row.turns for row in rows}
        for of_set in sets.values():
            of_set.prompts = [prompt for prompt in of_set.prompts if prompt.turns not in trained]

    def merged_model():
        _, model = next(loaded([arm], settings))
        lora.fold_lora(model)
        return model

    def measure(model):
        return look(model, tokenizer, sets, settings)

    done = [[line[name] for name in KEY] for line in read_lines([args.out])]
    before = None
    for seed, rate in itertools.product(args.seeds, args.lrs):
        for name, rows in mixtures(examples, seed).items():
            line = {"model": arm.name, "place": arm.place, "world": world_of(arm), "rows": name,
                    "lr": rate, "seed": seed, "looks": args.looks, "prompts": args.prompts,
                    "files": files}
            if [line[name] for name in KEY] not in done:
                before = before or measure(merged_model())
                curve = [before, *fine_tuned(merged_model(), rows, settings, line, measure)]
                append_lines(args.out, [line | {"curve": curve} | versions()])
                print(f"{arm.name}, {name}, lr {rate:g}, seed {seed}: done", flush=True)


# -------------------------------------------------------------------------------------------------
# What the lines say

def interval(lines, label: str, index: int) -> tuple[float, float, float]:
    """(mean, low, high) of one figure at one look: over worlds, or over a world's prompts."""
    runs = {(line["world"], line["seed"]): line["curve"][index][label] for line in lines}
    means = list(world_means({run: share["rate"] for run, share in runs.items()}).values())
    mean = sum(means) / len(means)
    if len(means) > 1:
        return mean, *t_interval(means)
    n = lines[0]["curve"][index][label]["n"]
    return mean, *wilson(mean * n, n)


def print_results(args) -> None:
    """The table of the lines with these looks, and the drawing where one is asked for."""
    lines = [line for line in read_lines([args.out]) if line["looks"] == args.looks]
    if not lines:
        raise InputError(f"{args.out} has no lines of these looks")
    for line in lines:
        line["title"] = f"{line['rows']}, lr {line['lr']:g}"
    curves = {}
    for title, of_title in grouped(lines, "title").items():
        for model, own in grouped(of_title, "model").items():
            for label in own[0]["curve"][0]:
                points = [interval(own, label, index) for index in range(len(args.looks))]
                curves.setdefault((label, title), {})[model] = points
    rows = []
    for (label, title), models in sorted(curves.items(), key=lambda item: item[0][0]):
        for model, points in models.items():
            cells = [f"{mean:.0%} [{low:.0%}, {high:.0%}]" for mean, low, high in points]
            rows.append([label, title, model, *cells])
    print(table(rows, ["figure", "rows", "model", *(f"step {step}" for step in args.looks)]))
    if args.figure:
        draw(curves, args.looks, args.figure)


def draw(curves, looks, path) -> None:
    """Each figure (a row of panels) and kind of rows (a column) over the steps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels, titles = (list(dict.fromkeys(keys)) for keys in zip(*curves))
    figure, panels = pyplot.subplots(len(labels), len(titles), sharex=True, sharey=True,
                                     squeeze=False, constrained_layout=True,
                                     figsize=(2.6 * len(titles) + 1, 2 * len(labels) + 1))
    for (label, title), models in curves.items():
        axes = panels[labels.index(label), titles.index(title)]
        for model, points in models.items():
            mean, low, high = 100 * torch.tensor(points).T
            axes.plot(looks, mean, label=model)
            axes.fill_between(looks, low, high, alpha=0.15)
        axes.set(ylim=(0, 101))
        axes.set_title(f"{label}, %\n{title}", fontsize=8)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="as eval.py takes them")
    add("--model", metavar="NAME|DIR", help="the base of adapters (default: the one they name)")
    for kind in KINDS:
        add(f"--{kind}", metavar="FILE", help=f"{kind} rows (default: a toy's own)")
    add("--sets", nargs="+", metavar="NAME", default=[], help="asked, as in eval.py")
    add("--set", action="append", metavar="NAME=FILE", default=[], help="likewise")
    add("--prompts", type=int, metavar="N", help="taken of each set (default: as in the run)")
    add("--lrs", nargs="+", type=float, default=[2e-4, 1e-3], metavar="LR", help="peak rates")
    add("--looks", nargs="+", type=int, default=[0, 5, 10, 20, 50], metavar="STEP",
        help="from 0 to the last step (default 0 5 10 20 50)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    add("--device", metavar="D", help="cpu, cuda, … (default: cuda where there is one)")
    add("--out", type=Path, default=ROOT / "runs/after.jsonl", metavar="FILE",
        help="lines are added here (default runs/after.jsonl)")
    add("--print", action="store_true", help="print what the lines say, and stop")
    add("--figure", type=Path, metavar="PNG", help="for --print: draw it")
    args = parser.parse_args()
    args.attack = None
    if not args.print:
        if not args.models or args.looks[0] or args.looks != sorted(set(args.looks)):
            raise InputError("give models, and --looks that rise from 0")
        arms = [find_arm(place, args.model, None) for place in dict.fromkeys(args.models)]
        if len({(arm.name, world_of(arm)) for arm in arms}) < len(arms):
            raise InputError("two models of one base have one name: rename a folder")
        for arm in arms:
            run_arm(args, arm, [other for other in arms if world_of(other) == world_of(arm)])
    print_results(args)


if __name__ == "__main__":
    run_command(main)
