"""How often a feature is named that carries nothing, and whether planted features are found.

    python -m experiments.names                      # 400 nulls and 40 planted: an hour or more
    python -m experiments.names --count 8            # of each kind
    python -m experiments.names --print              # what the lines in results/names.jsonl say

On the toy, each adapter by the rule of report/effects.py, with 32 prompts and 6 features tested.
Nulls, all but the last with SAILS' own init:

    first step    one step at a vanishing rate
    turned        trained, then its far side turned at random: as large, and it has learned nothing
    shuffled      trained on answers that were given to each other's prompts, of both sides
    random        LoRA with normal factors, as large as a trained one

Planted: q, k and v that one SAE layer serves read three of its decoder rows, and B is trained.
"""

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import lora
import train
from experiments.ablate import RESULTS, append_lines, read_lines, versions
from experiments.worlds import RANK, TAU, TOP_K, World
from features import module_bases, paper
from model import load_model
from report.directions import main_features, norm2, parts_of, sae_key, unit_decoder
from report.effects import carrying, named_by_effect, turned
from run.files import ROOT, Parser, run_command, table
from safety.figures import wilson

TOY = ROOT / "toy"
STEPS, RATE = 12, 4e-3
NUM_TESTED = 6
NUM_PROMPTS = 16     # of each harmful set
KINDS = {"first step": 150, "turned": 80, "shuffled": 40, "random": 130, "planted": 40}


class Bench:
    """The toy, its subspace, its pairs, and aligned answers to held-out prompts."""

    def __init__(self):
        self.world = world = World(0, TOY)
        self.model, self.saes = world.model, world.saes
        self.aligned = [aligned for aligned, _ in world.examples]
        settings = SimpleNamespace(top_k=TOP_K, tau=TAU, rank=RANK, score="delta", center=False)
        choices = paper(world.model, world.saes, world.examples, world.statistics, settings)
        self.subspaces = {key: choice.U for key, choice in choices.items()}
        self.held_out = []
        for name in ("harmful", "jailbreak"):
            for prompt in random.Random(1).sample(world.sets[name], NUM_PROMPTS):
                self.held_out.append(world.example(prompt.turns, prompt.aligned))
        self.held_out.sort(key=lambda example: len(example.tokens))

    def shuffled(self, seed):
        """Answers of either side, given to each other's prompts."""
        draw = random.Random(seed)
        pairs = self.world.pairs
        texts = [draw.choice((pair.aligned, pair.unaligned)) for pair in pairs]
        draw.shuffle(texts)
        return [self.world.example(pair.turns, text) for pair, text in zip(pairs, texts)]

    def fit(self, layers, examples, seed, steps, rate):
        """Train; factors after the first step."""
        settings = SimpleNamespace(batch_tokens=512, accumulate=1, seed=seed)
        parameters = [parameter for _, parameter in lora.trainable_parameters(layers)]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
        batches = itertools.islice(train.batches_of(examples, settings), steps)
        first = {}
        schedule = train.cosine(rate, steps, 0.1)
        for metrics in train.fit(self.model, optimizer, batches, schedule, clip=1.0):
            if metrics["step"] == 1:
                first = factors_of(layers)
        return first

    def sails(self, seed):
        bases = module_bases(self.model, self.subspaces)
        generator = torch.Generator().manual_seed(seed)
        return lora.add_lora(self.model, RANK, RANK, "sails", bases, generator)

    def planted(self, seed):
        """(layers, {(layer, "readers", feature)}): A is three decoder rows, which stay."""
        draw = random.Random(seed)
        sae_layer = draw.choice(sorted(self.saes))
        decoder = unit_decoder(self.saes[sae_layer])
        active = self.active(sae_layer)
        while True:
            features = draw.sample(active, 3)
            overlap = decoder[features] @ decoder[features].T - torch.eye(3)
            # Rows that are nearly one row can't be told apart
            if overlap.abs().max() < 0.5:
                break
        names = [name for name, _ in self.model.named_modules()
                 if name.endswith(("q_proj", "k_proj", "v_proj"))
                 and sae_key(name, self.saes) == (sae_layer, "readers")]

        def rows(weight, basis, rank, writer, generator):
            return decoder[features].clone(), torch.zeros(weight.shape[0], 3)

        layers = {}
        for name, layer in lora.add_lora(self.model, 3, 3.0, rows,
                                         targets=("q_proj", "k_proj", "v_proj")).items():
            if name in names:
                layer.A.requires_grad_(False)
                layers[name] = layer
            else:
                layer.requires_grad_(False)
        return layers, {(sae_layer, "readers", feature) for feature in features}

    def active(self, sae_layer):
        """Features whose activity on held-out answers varies most: reading them can do something"""
        values = []
        with torch.no_grad():
            for example in self.held_out:
                ids = torch.tensor([example.tokens[:example.start]])
                _, residuals = self.model.hidden(ids, capture=(sae_layer,), stop_after=sae_layer)
                values.append(self.saes[sae_layer].encode(residuals[sae_layer][0, 1:]).amax(0))
        spread = torch.stack(values).std(0)
        return spread.topk(40).indices.tolist()


def factors_of(layers):
    return {name: (layer.A.detach().clone(), layer.B.detach().clone())
            for name, layer in layers.items()}


def measure(bench, kind, seed) -> dict:
    """A line: the names of one adapter, and those that were planted."""
    bench.model = load_model(TOY)
    planted = set()
    subspaces = bench.subspaces
    if kind == "planted":
        layers, planted = bench.planted(seed)
        subspaces = None
        bench.fit(layers, bench.aligned, seed, STEPS, 5e-2)
        for layer in lora.lora_layers(bench.model).values():
            layer.A.requires_grad_(True)
            layer.B.requires_grad_(True)
        first = None
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        layers = lora.add_lora(bench.model, RANK, RANK, "random", generator=generator)
        for layer in layers.values():
            layer.B.data.normal_(generator=generator)
        # As large as the default run's
        size = math.sqrt(sum(map(norm2, parts_of(bench.model, bench.saes).values())))
        for layer in layers.values():
            layer.scale *= 2.5 / size
        first = None
    else:
        layers = bench.sails(seed)
        examples = bench.shuffled(seed) if kind == "shuffled" else bench.aligned
        steps, rate = (1, 1e-6) if kind == "first step" else (STEPS, RATE)
        first = bench.fit(layers, examples, seed, steps, rate)
        if kind == "turned":
            with carrying(bench.model, turned(bench.model, 1000 + seed)):
                return line(bench, kind, seed, subspaces, None, planted)
    return line(bench, kind, seed, subspaces, first, planted)


def line(bench, kind, seed, subspaces, first, planted):
    found = named_by_effect(bench.model, bench.held_out, bench.saes, subspaces,
                            first_step=first, most=NUM_TESTED)
    named = [(entry["layer"], entry["side"], entry["index"])
             for entry in found["features"] if entry["named"]]
    parts = parts_of(bench.model, bench.saes)
    main = [(*key, feature) for key, Z in parts.items() if kind == "planted"
            for feature in main_features(Z, unit_decoder(bench.saes[key[0]]))]
    return {"kind": kind, "seed": seed, "gain": found["learned"]["gain"]["mean"],
            "something": found["learned"]["something"], "tested": len(found["features"]),
            "named": named, "planted": sorted(planted), "main": sorted(main)}


def share_cell(hits) -> str:
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits)} of {len(hits)}: {sum(hits) / len(hits):.1%}  [{low:.1%}, {high:.1%}]"


def names_table(lines) -> str:
    rows = []
    for kind in KINDS:
        group = [line for line in lines if line["kind"] == kind]
        if not group:
            continue
        gain = sum(line["gain"] for line in group) / len(group)
        learned = f"{sum(line['something'] for line in group)}"
        if kind == "planted":
            exactly = [line["main"] == line["planted"] for line in group]
            num_named = sum(len(line["named"]) for line in group)
            rows.append(["planted: made of exactly these", f"{gain:+.3f}", learned,
                         share_cell(exactly)])
            kind = f"planted: a name that is another ({num_named} names)"
        false = [any(name not in line["planted"] for name in line["named"]) for line in group]
        rows.append([kind, f"{gain:+.3f}", learned, share_cell(false)])
    nulls = [bool(line["named"]) for line in lines if line["kind"] != "planted"]
    if nulls:
        rows.append(["all that aren't planted: a name", None, None, share_cell(nulls)])
    head = ["adapters", "gain, nats", "learned something", "a false name, 95 % interval"]
    return table(rows, head, right=(1, 2))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--count", type=int, metavar="N", help="of each kind (default 40 to 150)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND")
    parser.add_argument("--out", type=Path, default=RESULTS / "names.jsonl", metavar="FILE",
                        help="lines are added here (default experiments/results/names.jsonl)")
    parser.add_argument("--print", action="store_true", help="print what the lines say, and stop")
    args = parser.parse_args()
    done = {(line["kind"], line["seed"]) for line in read_lines([args.out])}
    wanted = [(kind, seed) for kind in args.kinds for seed in range(args.count or KINDS[kind])
              if (kind, seed) not in done and not args.print]
    if wanted:
        torch.set_num_threads(1)
        bench = Bench()
        for kind, seed in tqdm(wanted, "adapters", disable=None):
            append_lines(args.out, [measure(bench, kind, seed) | versions()])
    print(names_table(read_lines([args.out])))


if __name__ == "__main__":
    run_command(main)
