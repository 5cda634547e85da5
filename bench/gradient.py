"""What the gradient selection costs, in training steps: over as many pairs as a step's batch holds, from pairs to bases.

    python bench/gradient.py              # the toy, and config B of step.py with random SAEs; one thread, about two minutes

Processor seconds of one thread, medians over rounds in which both sides take turns; peak memory of a process that does
only the one side, less what it held when the model was loaded, beside the float32 gradients of q, k, v, o. Results are
written to bench/results/gradient.json.
"""

import argparse
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from bench.common import publish
from bench.selection import random_pairs, random_saes
from bench.step import CONFIGS

import lora
from run import settings as recipe
import train
from data import load_tokenizer, make_example
from data import read_pairs
from features import contrast_gradients, gradient_moments
from saes.gradient import greedy
from model import Gemma2, load_model
from sae import load_sae
from lora import trainable_parameters as adapter_parameters

SHOWN = {"config": "", "pairs": ",", "step, s": ".2f", "selection, s": ".2f", "steps": ".2f",
         "step, MB": ",.0f", "selection, MB": ",.0f", "gradients, MB": ",.0f"}


def case(name):
    """(model, {layer: unit decoder rows}, examples, settings)."""
    if name == "toy":
        model, tokenizer = load_model(recipe.TOY), load_tokenizer(recipe.TOY)
        examples = [tuple(make_example(tokenizer, pair.turns, text, 512) for text in (pair.aligned, pair.unaligned))
                    for pair in read_pairs(recipe.TOY / "data/train.jsonl")[0]]
        saes = {layer: load_sae(recipe.TOY / "sae", layer, "512") for layer in (1, 2, 3)}
        settings = SimpleNamespace(batch_tokens=512, accumulate=2, seed=0)
    else:
        model = Gemma2(CONFIGS[name]).init_weights(0.02, torch.Generator().manual_seed(0)).requires_grad_(False)
        examples, settings = random_pairs(CONFIGS[name].vocab_size, 64), SimpleNamespace(batch_tokens=512, accumulate=4, seed=0)
        saes = random_saes(model, 4096)
    return model, {layer: torch.nn.functional.normalize(sae.W_dec, dim=1) for layer, sae in saes.items()}, examples, settings


def sides(model, rows, examples, settings, rank=16):
    """{side: what does it once}, and the number of pairs whose aligned answers fill a step."""
    batches = train.batches_of([aligned for aligned, _ in examples], settings)
    batch = next(batches)
    pairs = examples[:sum(int(row.documents.max()) for row in batch)]
    begun = []                                                           # the steps, once LoRA is on the model

    def select():
        gradients = contrast_gradients(model, pairs, settings.batch_tokens)
        for (layer, _), moment in gradient_moments(model, gradients, rows).items():
            greedy(rows[layer], moment, 2 * rank, rank)

    def step():
        if not begun:
            layers = lora.add_lora(model, rank, rank, "random", generator=torch.Generator().manual_seed(0))
            parameters = [parameter for _, parameter in adapter_parameters(layers)]
            begun.append(train.fit(model, torch.optim.AdamW(parameters), iter(lambda: batch, None), lambda step: 1e-4, 1.0))
        next(begun[0])
    return {"selection": select, "step": step}, len(pairs)


def memory(key):
    with open("/proc/self/status") as file:
        return int(file.read().split(f"{key}:")[1].split()[0]) / 1e3


def alone(name, side):
    """Peak megabytes of one side above what was held before it."""
    model, rows, examples, settings = case(name)
    does, _ = sides(model, rows, examples, settings)
    before = memory("VmRSS")
    for _ in range(2):
        does[side]()
    print(memory("VmHWM") - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["toy", "B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", nargs=2, metavar=("CONFIG", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.alone:
        return alone(*args.alone)
    out = []
    for name in args.configs:
        took = {"selection": [], "step": []}
        model, rows, examples, settings = case(name)
        does, pairs = sides(model, rows, examples, settings)
        plain, _ = sides(case(name)[0], rows, examples, settings)        # LoRA is on this one's model alone
        does["step"] = plain["step"]
        for number in range(args.rounds + 1):
            for side, run in does.items():
                began = time.process_time()
                run()
                if number:                                                # the first warms up
                    took[side].append(time.process_time() - began)
        peak = {side: float(subprocess.check_output([sys.executable, __file__, "--alone", name, side], text=True)) for side in took}
        seconds = {side: statistics.median(times) for side, times in took.items()}
        own = sum(module.weight.numel() for key, module in model.named_modules() if key.endswith(lora.TARGETS)) * 4e-6
        out.append({"config": name, "pairs": pairs, "step, s": seconds["step"], "selection, s": seconds["selection"],
                    "steps": seconds["selection"] / seconds["step"],
                    "step, MB": peak["step"], "selection, MB": peak["selection"], "gradients, MB": own})
    publish("gradient", out, SHOWN, SimpleNamespace(threads=1, products="default", configs=args.configs, rounds=args.rounds))


if __name__ == "__main__":
    main()
