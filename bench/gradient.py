"""What the gradient selection costs, in training steps on as many pairs as a step's batch holds.

    python -m bench.gradient     # the toy, and config B of step.py with random SAEs; two minutes

Processor seconds of one thread from pairs to bases, medians over rounds in which both sides take
turns. Peak memory of a process that does only the one side, less what it held when the model was
loaded, beside the float32 gradients of q, k, v and o. Written to bench/results/gradient.json.
"""

import argparse
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

import lora
import train
from bench.common import publish
from bench.selection import random_pairs, random_saes
from bench.shapes import CONFIGS
from data import load_examples, load_tokenizer
from features import contrast_gradients, gradient_moments
from model import TARGETS, Gemma2, load_model
from run.files import ROOT
from sae import load_sae
from saes.gradient import greedy

RANK = 16
SHOWN = {"config": "", "pairs": ",", "step, s": ".2f", "selection, s": ".2f", "steps": ".2f",
         "step, MB": ",.0f", "selection, MB": ",.0f", "gradients, MB": ",.0f"}


def load_case(name):
    """(model, {layer: unit decoder rows}, pairs of Examples, settings of a step)."""
    if name == "toy":
        toy = ROOT / "toy"
        model = load_model(toy)
        pairs, _ = load_examples(toy / "data/train.jsonl", load_tokenizer(toy), 512)
        saes = {layer: load_sae(toy / "sae", layer, "512") for layer in (1, 2, 3)}
        settings = SimpleNamespace(batch_tokens=512, accumulate=2, seed=0)
    else:
        generator = torch.Generator().manual_seed(0)
        model = Gemma2(CONFIGS[name]).init_weights(0.02, generator).requires_grad_(False)
        pairs, saes = random_pairs(CONFIGS[name].vocab_size, 64), random_saes(model, 4096)
        settings = SimpleNamespace(batch_tokens=512, accumulate=4, seed=0)
    rows = {layer: torch.nn.functional.normalize(sae.W_dec, dim=1) for layer, sae in saes.items()}
    return model, rows, pairs, settings


def make_sides(name):
    """{side: a function that does it once}, and the number of pairs whose answers fill a step."""
    model, rows, pairs, settings = load_case(name)
    batch = next(train.batches_of([aligned for aligned, _ in pairs], settings))
    pairs = pairs[:sum(int(row.documents.max()) for row in batch)]

    def select():
        gradients = contrast_gradients(model, pairs, settings.batch_tokens)
        for (layer, _), moment in gradient_moments(model, gradients, rows).items():
            greedy(rows[layer], moment, 2 * RANK, RANK)

    # The steps have a model of their own: LoRA is on it
    adapted, steps = load_case(name)[0], []

    def step():
        if not steps:
            generator = torch.Generator().manual_seed(0)
            layers = lora.add_lora(adapted, RANK, RANK, "random", generator=generator)
            parameters = [parameter for _, parameter in lora.trainable_parameters(layers)]
            optimizer = torch.optim.AdamW(parameters)
            batches = iter(lambda: batch, None)
            steps.append(train.fit(adapted, optimizer, batches, lambda step: 1e-4, clip=1.0))
        next(steps[0])

    own = sum(module.weight.numel() for key, module in model.named_modules()
              if key.endswith(TARGETS))
    return {"selection": select, "step": step}, len(pairs), own * 4e-6


def memory(key):
    """Megabytes of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as file:
        return int(file.read().split(f"{key}:")[1].split()[0]) / 1e3


def print_peak(name, side):
    """Peak megabytes of one side above what was held before it."""
    sides, _, _ = make_sides(name)
    before = memory("VmRSS")
    for _ in range(2):
        sides[side]()
    print(memory("VmHWM") - before)


def measure(name, rounds):
    """The row of a config: seconds and peak megabytes of both sides."""
    sides, num_pairs, gradients_mb = make_sides(name)
    times = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, run in sides.items():
            start = time.process_time()
            run()
            if number:                                     # the first round warms up
                times[side].append(time.process_time() - start)
    row = {"config": name, "pairs": num_pairs, "gradients, MB": gradients_mb}
    for side in sides:
        command = [sys.executable, "-m", "bench.gradient", "--alone", name, side]
        row[f"{side}, s"] = statistics.median(times[side])
        printed = subprocess.check_output(command, text=True, cwd=ROOT)
        row[f"{side}, MB"] = float(printed.split()[-1])
    return row | {"steps": row["selection, s"] / row["step, s"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["toy", "B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", nargs=2, metavar=("CONFIG", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.alone:
        return print_peak(*args.alone)
    rows = [measure(name, args.rounds) for name in args.configs]
    about = SimpleNamespace(threads=1, products="default", configs=args.configs, rounds=args.rounds)
    publish("gradient", rows, SHOWN, about)


if __name__ == "__main__":
    main()
