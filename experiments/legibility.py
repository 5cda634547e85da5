"""What each way to fine-tune leaves to be named: SAILS, LoRA, a random basis, full fine-tuning.

    python -m experiments.legibility                           # worlds 1 to 8, seeds 0 and 1: hours
    python -m experiments.legibility --worlds toy --seeds 0 1  # the toy alone
    python -m experiments.legibility --print                   # the table of the lines in --out

Of each trained model, features are named by effect (report/effects.py), by one rule: random
directions are those of the SAEs' decoders, whatever the init. Full fine-tuning, of q, k, v and o,
is explained as an adapter of full rank. Columns of the table, means ± half a 95 % interval over
worlds:

    gain        of the log-likelihood of held-out aligned answers, nats an answer
    named       features
    carried     share of the gain that is lost without all named features
    refusals    share of the gained refusals that is lost without them
    agreement   of the names of two seeds of a world: Jaccard
    harm, refusal   share of the names that tell harm verbs, or refusals, from the rest: AUROC ≥ .9
"""

import itertools
import statistics
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch

import lora
from data import make_example
from eval import answer
from experiments import tables
from experiments.ablate import RESULTS, append_lines, read_lines, versions
from experiments.concepts import auroc, labelled
from experiments.variants import VARIANTS
from experiments.worlds import RATE, World, built_world, fit
from model import MODULES, TARGETS, load_model
from report.effects import likelihoods, named_by_effect, removed
from run.files import ROOT, Parser, run_command, table
from safety.figures import refused
from toy.world import World as Words

FULL = "full-fine-tuning"
ARMS = {"paper": "SAILS, the paper's choice", "greedy-rotated": "SAILS, by gradient",
        "lora-own": "LoRA's own init", "orthonormal": "a random basis", FULL: "full fine-tuning"}
SETS = ("harmful", "jailbreak")
NUM_EXAMPLES = 24           # of each set, whose likelihood is measured
NUM_ANSWERED = 64           # of each set, that are answered
DETECTS = 0.9               # AUROC of a feature that tells a concept from the rest


def full_rank(name: str, update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of full rank with B·A = ΔW (out, in): the identity stands at the residual stream."""
    if MODULES[name.rpartition(".")[2]].side == "writers":
        return update, torch.eye(len(update))
    return torch.eye(update.shape[1]), update


def updates(model, base) -> dict:
    """{module name: (A, B)} of what full fine-tuning has made of the base's weights."""
    weights = {name: module.weight for name, module in lora.linears(base, TARGETS).items()}
    return {name: full_rank(name, (module.weight - weights[name]).detach().clone())
            for name, module in lora.linears(model, TARGETS).items()}


def trained(world: World, variant: str, seed: int):
    """(the model with its adapters, their factors after the first step)."""
    model = load_model(world.folder)
    generator = torch.Generator().manual_seed(1000 * world.seed + seed)
    parameters, _ = VARIANTS[variant](world, model, generator)
    first = {}
    for metrics in fit(world, model, parameters, RATE, seed):
        if metrics["step"] == 1 and variant == FULL:
            first = updates(model, world.model)
        elif metrics["step"] == 1:
            first = {name: (layer.A.detach().clone(), layer.B.detach().clone())
                     for name, layer in lora.lora_layers(model).items()}
    if variant != FULL:
        return model, first
    factors = updates(model, world.model)
    model = load_model(world.folder)
    layers = {}
    for name, linear in lora.linears(model, TARGETS).items():
        writer = MODULES[name.rpartition(".")[2]].side == "writers"
        layers[name] = lora.LoRALinear(linear, *factors[name], 1.0, writer)
    lora.place_layers(model, layers)
    return model, first


def measure(world: World, variant: str, seed: int) -> dict:
    """One line: the names of one trained model, and what they carry."""
    model, first = trained(world, variant, seed)
    examples = []
    for name in SETS:
        for prompt in world.sets[name][:NUM_EXAMPLES]:
            examples.append(make_example(world.tokenizer, prompt.turns, prompt.aligned, 512))
    examples.sort(key=lambda example: len(example.tokens))
    found = named_by_effect(model, examples, world.saes, first_step=first)
    named = [(entry, row) for entry, row in zip(found["features"], found["directions"])
             if entry["named"]]
    rows = defaultdict(list)
    for entry, row in named:
        rows[entry["layer"], entry["side"]].append(row)
    directions = {key: torch.stack(of_part) for key, of_part in rows.items()}

    def refusal_rate(context):
        with context:
            prompts = [prompt for name in SETS for prompt in world.sets[name][:NUM_ANSWERED]]
            texts = answer(model, world.tokenizer, prompts, 24, batch_size=128)
        return sum(map(refused, texts)) / len(texts)

    whole = likelihoods(model, examples).mean()
    with removed(model, directions, world.saes):
        without = likelihoods(model, examples).mean()
    return {
        "gain": found["learned"]["gain"]["mean"],
        "named": [[e["layer"], e["side"], e["index"], e["cost"]["mean"]] for e, _ in named],
        "lost": float(whole - without),
        "refused": {"base": refusal_rate(lora.scaled(model, 0)),
                    "trained": refusal_rate(nullcontext()),
                    "without": refusal_rate(removed(model, directions, world.saes))},
        "detects": detected(world, {(e["layer"], e["index"]) for e, _ in named})}


@torch.no_grad()
def detected(world: World, features) -> dict:
    """{"layer/index": {concept: AUROC}} at the tokens where the concept makes sense."""
    chats = list(itertools.islice(labelled(Words(world.seed), world.tokenizer), 100))
    values, letters = defaultdict(list), defaultdict(str)
    layers = sorted(world.saes)
    for chat in chats:
        _, residuals = world.model.hidden(torch.tensor([chat["tokens"]]), capture=layers)
        for layer, index in features:
            strength = world.saes[layer].strength(residuals[layer][0])
            values[layer, index].append(strength[:, index])
        for concept in ("harm verb", "refusal"):
            letters[concept] += chat["labels"][concept]
    areas: dict = {}
    for layer, index in sorted(features):
        of_feature = torch.cat(values[layer, index])
        areas[f"{layer}/{index}"] = {}
        for concept, marks in letters.items():
            known = torch.tensor([mark != "-" for mark in marks])
            is_there = torch.tensor([mark == "1" for mark in marks])[known]
            area = float(auroc(of_feature[known][:, None], is_there)[0])
            areas[f"{layer}/{index}"][concept] = area
    return areas


# --------------------------------------------------------------------------------------------------
# The table

BASELINE = "lora-own"
DIGITS = {"gain": 2, "named": 1, "carried": 2, "refusals": 2, "agreement": 2, "harm verb": 2,
          "refusal": 2}
COMPARED = ("named", "carried", "refusals", "agreement")


def figures_of(line) -> dict:
    """The columns of one run: {name: number}, less those that it can't have."""
    figures = {"gain": line["gain"], "named": len(line["named"]),
               "carried": line["lost"] / line["gain"]}
    rate = line["refused"]
    gained = rate["trained"] - rate["base"]
    if gained > 0:
        figures["refusals"] = (rate["trained"] - rate["without"]) / gained
    for concept in ("harm verb", "refusal"):
        told = [areas[concept] >= DETECTS for areas in line["detects"].values()]
        if told:
            figures[concept] = sum(told) / len(told)
    return figures


def agreements(lines) -> dict:
    """{(world, 0): Jaccard of the names of its two seeds}; of two empty lists there is none."""
    sets = defaultdict(list)
    for line in lines:
        sets[line["world"]].append({tuple(name[:3]) for name in line["named"]})
    shares = {}
    for world, names in sets.items():
        pairs = [pair for pair in itertools.combinations(names, 2) if pair[0] | pair[1]]
        if pairs:
            shares[world, 0] = statistics.mean(len(a & b) / len(a | b) for a, b in pairs)
    return shares


def results(lines, baseline=BASELINE) -> str:
    """Means ± 95 % over worlds, and how far each arm lies from the baseline."""
    values: dict = {name: defaultdict(dict) for name in DIGITS}
    for line in lines:
        for name, value in figures_of(line).items():
            values[name][line["variant"]][line["world"], line["seed"]] = value
    for variant in ARMS:
        runs = agreements([line for line in lines if line["variant"] == variant])
        values["agreement"][variant] = runs
    means, leads = [], []
    for variant, label in ARMS.items():
        num_runs = sum(line["variant"] == variant for line in lines)
        if num_runs:
            means.append([label, num_runs, *(
                tables.interval_cell(of_name[variant], DIGITS[name])
                for name, of_name in values.items())])
        if num_runs and variant != baseline:
            leads.append([label, *(
                tables.lead_cell(tables.paired(values[name], variant, baseline), DIGITS[name])
                for name in COMPARED)])
    head = ["", "runs", "gain", "named", "carried", "refusals", "agreement", "harm", "refusal"]
    less = [f"less {ARMS[baseline]}", *COMPARED]
    return "\n\n".join((table(means, head, right=range(1, 9)),
                        table(leads, less, right=range(1, 5))))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--worlds", nargs="+", default=list("12345678"),
                        help="numbers, built where they aren't there, or toy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "legibility.jsonl")
    parser.add_argument("--print", action="store_true", help="the table of --worlds alone")
    parser.add_argument("--less", default=BASELINE, choices=list(ARMS),
                        help=f"what the others are compared with (default {BASELINE})")
    args = parser.parse_args()
    done = read_lines([args.out])
    jobs = [] if args.print else list(itertools.product(args.worlds, args.seeds, args.variants))
    torch.set_num_threads(1)
    for name, seed, variant in jobs:
        key = {"world": name, "seed": seed, "variant": variant}
        if any(key.items() <= line.items() for line in done):
            continue
        world = World(0, ROOT / "toy") if name == "toy" else built_world(int(name))
        if not world:
            continue
        line = key | measure(world, variant, seed) | {"versions": versions()}
        append_lines(args.out, [line])
        done.append(line)
        print(f"world {name}, seed {seed}, {variant}: {len(line['named'])} named")
    print(results([line for line in done if line["world"] in args.worlds], args.less))


if __name__ == "__main__":
    run_command(main)
