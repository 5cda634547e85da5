"""What each way to fine-tune leaves to be named: SAILS, LoRA, a random basis, full fine-tuning.

    python -m experiments.legibility                           # worlds 1 to 8, seeds 0 and 1: hours
    python -m experiments.legibility --worlds toy --seeds 0 1  # the toy alone
    python -m experiments.legibility --print                   # the table of the lines in --out

Of each trained model, features are named by effect (report/effects.py), by one rule: random
directions are those of the SAEs' decoders, whatever the init. Full fine-tuning, of q, k, v and o,
is explained as an adapter of full rank. Columns of the table, means ± deviations over runs:

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
from experiments.ablate import RESULTS, WORLDS, append_lines, read_lines, versions
from experiments.concepts import auroc, labelled
from experiments.variants import VARIANTS
from experiments.worlds import RATE, World, build_world, fit, load_world
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

def spread(values) -> str | None:
    """Mean ± standard deviation of the numbers among the values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{deviation}"


def agreements(lines) -> list[float]:
    """Jaccard of the names of each two seeds of a world; of two empty lists there is none."""
    sets = defaultdict(list)
    for line in lines:
        sets[line["world"]].append({tuple(name[:3]) for name in line["named"]})
    pairs = [pair for names in sets.values() for pair in itertools.combinations(names, 2)]
    return [len(one & other) / len(one | other) for one, other in pairs if one | other]


def results(lines) -> str:
    rows = []
    for variant, label in ARMS.items():
        runs = [line for line in lines if line["variant"] == variant]
        if not runs:
            continue
        carried, refusals, told = [], [], defaultdict(list)
        for run in runs:
            carried.append(run["lost"] / run["gain"])
            rate = run["refused"]
            gained = rate["trained"] - rate["base"]
            refusals.append((rate["trained"] - rate["without"]) / gained if gained > 0 else None)
            for areas in run["detects"].values():
                for concept, area in areas.items():
                    told[concept].append(float(area >= DETECTS))
        rows.append([label, len(runs), spread([run["gain"] for run in runs]),
                     spread([len(run["named"]) for run in runs]), spread(carried),
                     spread(refusals), spread(agreements(runs)),
                     *(f"{statistics.mean(told[c]):.2f}" if told[c] else None
                       for c in ("harm verb", "refusal"))])
    head = ["", "runs", "gain", "named", "carried", "refusals", "agreement", "harm", "refusal"]
    return table(rows, head)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--worlds", nargs="+", default=list("12345678"),
                        help="numbers, built where they aren't there, or toy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "legibility.jsonl")
    parser.add_argument("--print", action="store_true", help="the table alone")
    args = parser.parse_args()
    done = read_lines([args.out])
    jobs = [] if args.print else list(itertools.product(args.worlds, args.seeds, args.variants))
    torch.set_num_threads(1)
    for name, seed, variant in jobs:
        key = {"world": name, "seed": seed, "variant": variant}
        if any(key.items() <= line.items() for line in done):
            continue
        if name != "toy":
            build_world(int(name), WORLDS)
        world = World(0, ROOT / "toy") if name == "toy" else load_world(int(name), WORLDS)
        line = key | measure(world, variant, seed) | {"versions": versions()}
        append_lines(args.out, [line])
        done.append(line)
        print(f"world {name}, seed {seed}, {variant}: {len(line['named'])} named")
    print(results(done))


if __name__ == "__main__":
    run_command(main)
