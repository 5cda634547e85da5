"""Which of the features that a selection chooses detect harm, or refusals.

    python -m experiments.reading            # worlds 1 to 8, built where they are missing
    python -m experiments.reading --print    # what the lines in results/reading.jsonl say

Harm: the activation at the decision token, a prompt's last, on held-out harmful prompts, with a
jailbreak or without, against harmless ones, look-alikes among them. Refusal: the mean activation
over an answer, refusals against help, on the fine-tuning pairs. A feature detects what its
activation, high or low, tells with an AUROC of at least LEVEL (chosen on world 101).
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from data import prompt_tokens
from experiments import selections
from experiments.ablate import RESULTS, append_lines, read_lines, versions
from experiments.tables import mean_error
from experiments.variants import NUM_GREEDY
from experiments.worlds import LAYERS, RANK, TOP_K, built_world
from features import choose_features
from run.files import InputError, Parser, run_command, table
from saes.gradient import greedy
from experiments.concepts import auroc

LEVEL = 0.8
HARMFUL = ("harmful", "jailbreak")
HARMLESS = ("lookalike", "benign")


@torch.no_grad()
def detection(world) -> dict[int, torch.Tensor]:
    """{layer: (2, F)} AUROC of every feature, for harm and for refusal."""
    # Codes at the decision token of every prompt
    codes, labels = {layer: [] for layer in LAYERS}, []
    for name in HARMFUL + HARMLESS:
        for prompt in world.sets[name]:
            ids = torch.tensor([prompt_tokens(world.tokenizer, prompt.turns)])
            _, residuals = world.model.hidden(ids, capture=LAYERS, stop_after=max(LAYERS))
            labels.append(name in HARMFUL)
            for layer in LAYERS:
                codes[layer].append(world.saes[layer].encode(residuals[layer][0, -1:])[0])
    aurocs = {}
    for layer, sae in world.saes.items():
        harm = auroc(torch.stack(codes[layer]), torch.tensor(labels))
        # Mean codes over every answer, aligned ones first
        aligned, unaligned = ([sae.encode(x.float()).mean(0) for x in answers]
                              for answers in world.residuals[layer])
        refused = torch.arange(len(aligned) + len(unaligned)) < len(aligned)
        refusal = auroc(torch.stack(aligned + unaligned), refused)
        aurocs[layer] = torch.stack((harm, refusal))
    return aurocs


def chosen_features(world) -> dict[tuple[str, str], dict[int, torch.Tensor]]:
    """{(selection, modules): {layer: features}}; "all features" gives the base rate."""
    chosen = {
        ("all features", "all"): {layer: torch.arange(len(world.rows[layer])) for layer in LAYERS},
        ("paper", "all"): {layer: choose_features(world.statistics[layer], TOP_K)
                           for layer in LAYERS},
    }
    # The gradient chooses for readers and writers apart
    for (layer, side), moment in world.moments.items():
        features = greedy(world.rows[layer], moment, NUM_GREEDY, RANK).features
        chosen.setdefault(("gradient", side), {})[layer] = features
    settings = SimpleNamespace(top_k=NUM_GREEDY, rank=RANK, batch_tokens=2048)
    harmless = [prompt_tokens(world.tokenizer, prompt.turns) for prompt in world.harmless]
    for name, options in (("attribution", {"control": world.tokenizer.control}),
                          ("decision", {"harmless": harmless})):
        selection = getattr(selections, name)
        choices = selection(world.model, world.saes, world.examples, None, settings, **options)
        # These two choose the same features for readers and writers
        chosen[name, "all"] = {layer: choices[layer, "readers"].features for layer in LAYERS}
    return chosen


def read(world) -> list[dict]:
    """A line for each selection: how many features, and the shares that detect harm and refusal."""
    aurocs = detection(world)
    lines = []
    for (name, side), chosen in chosen_features(world).items():
        parts = [aurocs[layer][:, features] for layer, features in chosen.items()]
        # An AUROC far below .5 tells as much as one far above
        values = torch.cat(parts, 1)                                         # (2, features)
        detects = values.maximum(1 - values) >= LEVEL
        harm, refusal = detects.double().mean(1).tolist()
        lines.append({"world": world.seed, "selection": name, "side": side,
                      "features": values.shape[1], "level": LEVEL,
                      "harm": harm, "refusal": refusal})
    return lines


def share_cell(shares) -> str:
    mean, error = mean_error(shares)
    return f"{mean:.1%} ± {error:.1%}" if len(shares) > 1 else f"{mean:.1%}"


def reading_table(lines) -> str:
    groups = {}
    for line in lines:
        groups.setdefault((line["selection"], line["side"]), []).append(line)
    rows = []
    for (name, side), group in groups.items():
        num_features = round(sum(line["features"] for line in group) / len(group))
        shares = [share_cell([line[kind] for line in group]) for kind in ("harm", "refusal")]
        rows.append([name, side, len(group), num_features, *shares])
    head = ["selection", "modules", "worlds", "features",
            f"AUROC ≥ {LEVEL} of harm, decision token", "of refusal, over the answer"]
    return table(rows, head, right=range(2, 6))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--worlds", nargs="+", type=int, default=list(range(1, 9)), metavar="SEED",
        help="default 1 to 8")
    add("--out", type=Path, default=RESULTS / "reading.jsonl", metavar="FILE",
        help="lines are added here (default experiments/results/reading.jsonl)")
    add("--print", action="store_true", help="print what the lines say, and stop")
    args = parser.parse_args()
    done = {line["world"] for line in read_lines([args.out])}
    # A world whose lines are there isn't read again
    wanted = [] if args.print else [seed for seed in args.worlds if seed not in done]
    for seed in tqdm(wanted, "worlds", disable=None):
        if world := built_world(seed):
            stamp = {"digest": world.digest} | versions()
            append_lines(args.out, [line | stamp for line in read(world)])
    lines = [line for line in read_lines([args.out]) if line["world"] in args.worlds]
    if not lines:
        raise InputError(f"{args.out}: no lines yet: run python -m experiments.reading first")
    print(reading_table(lines))


if __name__ == "__main__":
    run_command(main)
