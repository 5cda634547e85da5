"""Do the features that a selection chooses read as something? Which of them detect harm, or refusals, beside all features of their SAEs.

    python experiments/reading.py             # worlds 1 to 8, built where they are missing; a line a world and selection
    python experiments/reading.py --table     # what the lines say

Harm: activation at the decision token, the last of a prompt, on held-out harmful prompts, with a jailbreak or without, against
harmless ones, look-alikes among them. Refusal: mean activation over an answer, refusals against help, on the fine-tuning pairs
themselves. A feature detects what its activation, high or low, tells with an AUROC of at least LEVEL (chosen on world 101).
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.variants import LAYERS, RANK, ROOT, TOP_K, WIDE, world_of  # first: it puts the product on the path

from run import files
from experiments.ablate import RESULTS, append, build, mean_error, versions
from data import prompt_tokens
from experiments import selections as tried
from features import choose_features
from saes.gradient import greedy
from run.files import InputError
from saes.measure import auroc
from run.files import table

LEVEL = 0.8


@torch.no_grad()
def detection(world):
    """{layer: (2, F) AUROC of every feature, for harm and for refusal}."""
    codes, labels = {layer: [] for layer in LAYERS}, []
    for name in ("harmful", "jailbreak", "lookalike", "benign"):
        for prompt in world.sets[name]:
            ids = prompt_tokens(world.tokenizer, prompt.turns)
            _, found = world.model.hidden(torch.tensor([ids]), capture=LAYERS, stop_after=max(LAYERS))
            labels.append(name in ("harmful", "jailbreak"))
            for layer in LAYERS:
                codes[layer].append(world.saes[layer].encode(found[layer][0, -1:])[0])
    out = {}
    for layer, sae in world.saes.items():
        sides = [torch.stack([sae.encode(x.float()).mean(0) for x in part]) for part in world.residuals[layer]]
        refused = torch.arange(sum(map(len, sides))) < len(sides[0])
        out[layer] = torch.stack((auroc(torch.stack(codes[layer]), torch.tensor(labels)), auroc(torch.cat(sides), refused)))
    return out


def selections(world):
    """{(selection, side): {layer: chosen features}}; "all features" for the base rate."""
    found = {("all features", "all"): {layer: torch.arange(len(world.rows[layer])) for layer in LAYERS},
             ("paper", "all"): {layer: choose_features(world.statistics[layer], TOP_K) for layer in LAYERS}}
    for (layer, side), moment in world.moments.items():
        found.setdefault(("gradient", side), {})[layer] = greedy(world.rows[layer], moment, 2 * RANK, RANK).features
    _, harmless = tried.decision_prompts(world.tokenizer, world.examples, world.harmless)
    inputs = world.model, world.saes, world.examples, world.statistics, WIDE
    choices = {"attribution": tried.attribution(*inputs, control=world.tokenizer.control),
               "decision": tried.decision(*inputs, harmless=harmless)}
    for name, choice in choices.items():
        found[name, "all"] = {layer: choice[layer, "readers"].features for layer in LAYERS}
    return found


def read(world):
    """A line for each selection and side: how many features, and the shares of them that detect harm and refusal."""
    told = detection(world)
    for (name, side), chosen in selections(world).items():
        values = torch.cat([told[layer][:, features] for layer, features in chosen.items()], 1)            # (2, features)
        harm, refusal = (values.maximum(1 - values) >= LEVEL).double().mean(1).tolist()
        yield {"world": world.seed, "selection": name, "side": side, "features": values.shape[1], "level": LEVEL,
               "harm": harm, "refusal": refusal}


def told(shares):
    mean, error = mean_error(shares)
    return f"{mean:.1%}" + f" ± {error:.1%}" * (len(shares) > 1)


def show(lines):
    rows = []
    for name, side in dict.fromkeys((line["selection"], line["side"]) for line in lines):
        mine = [line for line in lines if (line["selection"], line["side"]) == (name, side)]
        shares = [told([line[what] for line in mine]) for what in ("harm", "refusal")]
        rows.append([name, side, len(mine), round(sum(line["features"] for line in mine) / len(mine)), *shares])
    head = ["selection", "modules", "worlds", "features", f"AUROC ≥ {LEVEL} of harm, decision token", "of refusal, over the answer"]
    return table(rows, head, right=range(2, 6))


def main():
    parser = files.Parser(__doc__)
    parser.add_argument("--worlds", nargs="+", type=int, default=list(range(1, 9)), metavar="SEED", help="default 1 to 8")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/worlds", metavar="DIR",
                        help="where worlds are built (default runs/worlds)")
    parser.add_argument("--out", type=Path, default=RESULTS / "reading.jsonl", metavar="FILE",
                        help="lines are added here (default experiments/results/reading.jsonl)")
    parser.add_argument("--table", action="store_true", help="print what the lines say, and stop")
    args = parser.parse_args()
    lines = [json.loads(text) for text in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        stamp, done = versions(), {line["world"] for line in lines}
        for seed in tqdm([seed for seed in args.worlds if seed not in done], "worlds", disable=None):
            build((seed, args.folder, ()))
            world = world_of(seed, str(args.folder))
            new = [line | {"digest": world.digest} | stamp for line in read(world)]
            append(args.out, *new)
            lines += new
    lines = [line for line in lines if line["world"] in args.worlds]
    if not lines:
        raise InputError(f"{args.out}: no lines yet: run experiments/reading.py first")
    print(show(lines))


if __name__ == "__main__":
    files.run_command(main)
