"""A training step beside transformers + peft: time, memory, and the share of its products.

    pip install -r bench/requirements.txt
    python -m bench.step --quick                     # A, bfloat16: under a minute on one core
    python -m bench.step --compile                   # all rows: about a quarter of an hour
    python -m bench.step --config B --dtype float32 --threads 4

Both sides have the same random weights, LoRA factors (r = 16 on q, k, v, o), tokens, labels,
AdamW, threads and matrix products. They take turns in one process, so that whatever else the
machine does hits both. Loss and gradients must agree before anything is timed. Peak memory
(VmHWM) is each side's own, in a fresh process. The table is printed and written to
bench/results/step.json (or --name). The floor of a step is the time of its matrix products
alone, each shape at the rate measured in the same run (shapes.py).
"""

import argparse
import itertools
import statistics
import sys
from types import SimpleNamespace

import torch

from attention import use_compile
from bench.common import (add_flags, in_dtype, measure, peak_memory, prepare, print_peak_memory,
                          publish, ratio, theirs_of, write_results)
from bench.shapes import ALPHA, BATCH, CONFIGS, LENGTH, RANK, RATE, data, floor
from fused import IGNORE
from lora import TARGETS, add_lora, lora_layers
from model import Gemma2
from run.files import Parser
from train import fit

SHOWN = {"config": "", "dtype": "", "labels": "", "side": "", "ms": ",.0f", "times ours": ".2f",
         "tokens/s": ",.0f", "floor": ".0%", "GF/s": ",.0f", "peak MB": ",.0f",
         "ours / peak": ".2f"}


# -------------------------------------------------------------------------------------------------
# The two sides. Each gives (step, parameters): step() trains once and returns the loss, and leaves
# the last gradients in `parameters`, {our name: parameter}

class KeepGradients(torch.optim.AdamW):
    """AdamW whose gradients live until the next backward, so that they can be compared."""

    def zero_grad(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.last, parameter.grad = parameter.grad, None


def our_model(config, dtype):
    """A random model with adapters off their start, where one factor's gradient would be zero."""
    draw = torch.Generator().manual_seed(0)
    model = in_dtype(dtype, lambda: Gemma2(config)).init_weights(0.02, draw)
    for layer in add_lora(model, RANK, ALPHA, "random", generator=draw).values():
        torch.nn.init.normal_(layer.B, 0, 0.02, generator=draw)
    return model


def ours(config, dtype, labelled, compiled=False):
    model = our_model(config, dtype)
    tokens, labels = data(config, labelled)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    row = SimpleNamespace(tokens=tokens, documents=torch.ones_like(tokens), labels=labels)
    hidden = lambda tokens, documents: model.hidden(tokens, documents)[0]
    if compiled:
        hidden = torch.compile(hidden, dynamic=False)

    def loss(model, row):
        return model.nll_sum(hidden(row.tokens, row.documents), row.labels)[0]

    optimizer = KeepGradients(parameters.values(), RATE)
    steps = fit(model, optimizer, itertools.repeat([row]), lambda step: RATE, loss=loss)

    def step():
        use_compile(compiled)        # of attention's own parts, as train.py does
        return next(steps)["loss"]
    return step, parameters


def theirs(config, dtype, labelled, compiled=False, batch=BATCH):
    """transformers' eager Gemma-2 with peft's LoRA and its own loss over shifted labels."""
    import peft
    twin, model = our_model(config, dtype), theirs_of(config, dtype)
    tokens, labels = data(config, labelled, batch)
    # The same weights and factors as ours
    weights = {f"model.{name.replace('.base.', '.')}": weight
               for name, weight in twin.state_dict().items() if not name.endswith((".A", ".B"))}
    missing, extra = model.load_state_dict(weights, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not extra      # the head is the embedding
    model.tie_weights()
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    model = peft.get_peft_model(model, settings)
    parameters = {}
    for name, layer in lora_layers(twin).items():
        module = model.get_submodule(f"base_model.model.model.{name}")
        for letter, factor in (("A", layer.A), ("B", layer.B)):
            weight = getattr(module, f"lora_{letter}").default.weight
            weight.data.copy_(factor.data)
            parameters[f"{name}.{letter}"] = weight
    optimizer = KeepGradients(parameters.values(), RATE)
    forward = torch.compile(model, dynamic=False) if compiled else model
    shifted = torch.cat((torch.full_like(labels[:, :1], IGNORE), labels[:, :-1]), 1)

    def step():
        loss = forward(input_ids=tokens, labels=shifted, use_cache=False).loss
        loss.backward()
        # The norm is logged on both sides
        torch.nn.utils.clip_grad_norm_(parameters.values(), torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step, parameters


SIDES = {
    "ours": ours,
    "ours compiled": lambda *case: ours(*case, compiled=True),
    "HF + peft": theirs,
    "HF + peft compiled": lambda *case: theirs(*case, compiled=True),
}


# -------------------------------------------------------------------------------------------------
# Parity, then time

def distance(a, b):
    """Mean over parameters of the gradients' ‖a − b‖ / ‖b‖, and the largest."""
    each = []
    for name, parameter in b.items():
        wanted = parameter.last.double()
        each.append(float((a[name].last.double() - wanted).norm() / wanted.norm()))
    return statistics.mean(each), max(each)


def parity(built, config, dtype, labelled) -> str:
    """Take the first step on each side; loss and gradients must agree. A line of how well they do.

    In bfloat16 both sides round. So each is held against the same weights in float32: ours,
    which the float32 rows hold against theirs. Our gradients may be at most 1.1 times as far
    from it as theirs are.
    """
    losses = {name: step() for name, (step, _) in built.items()}
    reference = built["HF + peft"][1]
    if dtype == torch.bfloat16:
        step, truth = ours(config, torch.float32, labelled)
        step()
        their_distance = distance(reference, truth)[0]
    lines = []
    for name, (_, parameters) in built.items():
        if not name.startswith("ours"):
            continue
        off = abs(losses[name] / losses["HF + peft"] - 1)
        if dtype == torch.float32:
            _, worst = distance(parameters, reference)
            good = off < 1e-5 and worst < 1e-4
            gradients = f"worst gradient {worst:.1e}"
        else:
            mean, _ = distance(parameters, truth)
            good = off < 1e-3 and mean < 1.1 * their_distance
            gradients = f"gradients {mean:.2%} from float32, HF's {their_distance:.2%}"
        lines.append(f"{name}: loss {off:.1e} from HF's, {gradients}")
        if not good:
            sys.exit(f"no parity, so nothing is timed: {lines[-1]}")
    return "; ".join(lines)


def rows_of(name, dtype_name, labelled, args):
    """Measure one case: a row for each side."""
    config, dtype = CONFIGS[name], getattr(torch, dtype_name)
    sides = [side for side in SIDES if args.compile or "compiled" not in side]
    memory = {}
    for side in sides:
        memory[side] = peak_memory("bench.step", "--alone", side, "--config", name, "--dtype",
                                   dtype_name, "--labels", labelled, "--threads", args.threads)
    built = {side: SIDES[side](config, dtype, labelled) for side in sides}
    agreement = parity(built, config, dtype, labelled)
    print(f"{name} {dtype_name} {labelled}: {agreement}", file=sys.stderr)
    steps = {side: step for side, (step, _) in built.items()}
    measure(steps, 1)                # the second warm-up
    parts = floor(config, dtype, labelled).values()
    least = sum(seconds for seconds, _ in parts)
    flops = sum(done for _, done in parts)
    times = measure(steps, args.rounds)
    rows = []
    for side in sides:
        took = statistics.median(times[side])
        rows.append({
            "config": name, "dtype": dtype_name, "labels": labelled, "side": side,
            "ms": 1e3 * took,
            "times ours": ratio(times[side], times["ours"]),
            "tokens/s": BATCH * LENGTH / took,
            "floor": least / took,
            "GF/s": flops / took / 1e9,
            "peak MB": memory[side] / 1e6,
            "ours / peak": memory["ours"] / memory[side],
            "floor ms": 1e3 * least,
            "parity": agreement,
        })
    return rows


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="shapes (default: all)")
    add("--labels", nargs="+", choices=("half", "all"), default=["half", "all"],
        help="what is trained on of each row (default: both)")
    add_flags(parser)
    add("--compile", action="store_true", help="also both sides under torch.compile")
    add("--quick", action="store_true", help="3 rounds of A, bfloat16, labels on half")
    add("--name", default="step", help="of the file in bench/results (default: step)")
    add("--alone", choices=SIDES, help=argparse.SUPPRESS)      # one side, for its peak memory
    args = parser.parse_args()
    if args.quick:
        args.config, args.dtype, args.labels, args.rounds = ["A"], ["bfloat16"], ["half"], 3
    prepare(args)
    cases = list(itertools.product(args.config, args.dtype, args.labels))
    if args.alone:
        name, dtype, labelled = cases[0]
        step, _ = SIDES[args.alone](CONFIGS[name], getattr(torch, dtype), labelled)
        step()
        step()
        return print_peak_memory()
    rows = []
    for case in cases:
        rows += rows_of(*case, args)
        # After each case, so that a stop loses no other
        write_results(args.name, rows, args, "peft")
    publish(args.name, rows, SHOWN, args, "peft")


if __name__ == "__main__":
    main()
