"""A training step beside transformers + peft: time, memory and the share of what matrix products alone would take.

    pip install -r bench/requirements.txt
    python bench/step.py --quick                                   # config A, bfloat16, under a minute on one core
    python bench/step.py --compile                                 # all rows; about a quarter of an hour
    python bench/step.py --config B --dtype float32 --threads 4

Both sides have the same random weights, LoRA factors (r = 16 on q, k, v, o), tokens, labels, AdamW, thread count and
matrix products, and run in turn in one process, so that whatever else the machine does hits both. Before anything is
timed, loss and gradients must agree. Peak memory (VmHWM) is each side's own, in a fresh process. Results are printed
as one table and written to bench/results/step.json (or --name).

The floor of a step is the time of its matrix products alone, each shape at the rate measured in the same run (floor.py).
"""

import argparse
import itertools
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end, so that `select` stays Python's own

from attention import use_compile
from run.files import write_json
from lora import TARGETS, add_lora, lora_layers
from fused import IGNORE
from model import Config
from model import Gemma2
from run.files import table
from train import fit

COMMON = dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=256, max_position_embeddings=512)
CONFIGS = {
    "A": Config(vocab_size=256000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,    # the head rules
                num_attention_heads=4, num_key_value_heads=2, **COMMON),
    "B": Config(vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,     # the blocks rule
                num_attention_heads=8, num_key_value_heads=4, **COMMON)}
BATCH, LENGTH, RANK, ALPHA, RATE = 4, 512, 16, 32, 1e-4


# ---------------------------------------------------------------------------------------------------------------
# The two sides. Each is (step, parameters): step() trains once and returns the loss, and leaves the last gradients in
# `parameters`, {name: parameter}, under our names

def data(config, labelled):
    """tokens, labels (B, T); labels[t] is token t + 1, on the last half of each row or everywhere."""
    tokens = torch.randint(3, config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(tokens, IGNORE)
    first = LENGTH // 2 if labelled == "half" else 1
    labels[:, first - 1:-1] = tokens[:, first:]
    return tokens, labels


def in_dtype(dtype, build):
    """build(), with parameters of `dtype` from the start: `.to` would need a second copy, and round HF's rotary too."""
    torch.set_default_dtype(dtype)
    model = build()
    torch.set_default_dtype(torch.float32)
    return model


def our_model(config, dtype):
    """With the adapters moved off their start, where one factor's gradient would be zero."""
    draw = torch.Generator().manual_seed(0)
    model = in_dtype(dtype, lambda: Gemma2(config)).init_weights(0.02, draw)
    for layer in add_lora(model, RANK, ALPHA, "random", generator=draw).values():
        torch.nn.init.normal_(layer.B, 0, 0.02, generator=draw)
    return model


def ours(config, dtype, labelled, compiled=False):
    model, (tokens, labels) = our_model(config, dtype), data(config, labelled)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    row = SimpleNamespace(tokens=tokens, documents=torch.ones_like(tokens), labels=labels)
    hidden = torch.compile(lambda *row: model.hidden(*row)[0], dynamic=False) if compiled else None
    optimizer = KeepGradients(parameters.values(), RATE)
    steps = fit(model, optimizer, itertools.repeat([row]), lambda step: RATE, hidden=hidden)

    def step():
        use_compile(compiled)                                                        # of attention's own parts, as train.py does
        return next(steps)["loss"]
    return step, parameters


class KeepGradients(torch.optim.AdamW):
    """AdamW whose gradients live until the next backward, so that they can be compared."""

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.last, p.grad = p.grad, None


def theirs(config, dtype, labelled, compiled=False):
    """transformers' eager Gemma-2 with peft's LoRA and its own loss over shifted labels."""
    import peft
    import transformers
    values = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "model_type")}
    twin, (tokens, labels) = our_model(config, dtype), data(config, labelled)
    settings = transformers.Gemma2Config(**values, attn_implementation="eager")
    model = in_dtype(dtype, lambda: transformers.Gemma2ForCausalLM(settings))
    weights = {f"model.{name.replace('.base.', '.')}": w for name, w in twin.state_dict().items() if not name.endswith((".A", ".B"))}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    parameters = {}
    for name, layer in lora_layers(twin).items():
        module = model.get_submodule(f"base_model.model.model.{name}")
        for letter, factor in (("A", layer.A), ("B", layer.B)):
            parameters[f"{name}.{letter}"] = weight = getattr(module, f"lora_{letter}").default.weight
            weight.data.copy_(factor.data)
    optimizer, forward = KeepGradients(parameters.values(), RATE), torch.compile(model, dynamic=False) if compiled else model
    shifted = torch.cat((torch.full_like(labels[:, :1], IGNORE), labels[:, :-1]), 1)

    def step():
        loss = forward(input_ids=tokens, labels=shifted, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), torch.inf)               # the norm is logged on both sides
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step, parameters


SIDES = {"ours": ours, "ours compiled": lambda *a: ours(*a, compiled=True), "HF + peft": theirs,
         "HF + peft compiled": lambda *a: theirs(*a, compiled=True)}


# ---------------------------------------------------------------------------------------------------------------
# Parity, time, memory

def distance(a, b):
    """Mean over parameters of ‖a − b‖ / ‖b‖, and the largest."""
    each = [float((a[name].last.double() - p.last).norm() / p.last.double().norm()) for name, p in b.items()]
    return statistics.mean(each), max(each)


def parity(built, config, dtype, labelled):
    """Take the first step on each side; loss and gradients must agree. A line that says how well they do.

    In bfloat16 both sides round, so each is held against the same weights in float32 (ours: against theirs it is
    checked in the float32 rows): our gradients may be at most 1.1 times as far from it as theirs are.
    """
    losses = {name: step() for name, (step, _) in built.items()}
    reference, lines = built["HF + peft"][1], []
    if dtype == torch.bfloat16:
        step, truth = ours(config, torch.float32, labelled)
        step()
        theirs_off = distance(reference, truth)[0]
    for name, (_, parameters) in built.items():
        if name.startswith("ours"):
            off = abs(losses[name] / losses["HF + peft"] - 1)
            mean, worst = distance(parameters, reference if dtype == torch.float32 else truth)
            if dtype == torch.float32:
                good, line = off < 1e-5 and worst < 1e-4, f"worst gradient {worst:.1e}"
            else:
                good, line = off < 1e-3 and mean < 1.1 * theirs_off, f"gradients {mean:.2%} from float32, HF's {theirs_off:.2%}"
            lines.append(f"{name}: loss {off:.1e} from HF's, {line}")
            if not good:
                sys.exit(f"no parity, so nothing is timed: {lines[-1]}")
    return "; ".join(lines)


def clock():
    """Seconds: of one thread its own processor time, which neighbours don't stretch; of several, the clock's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(built, rounds):
    """{side: [seconds]}, the sides in turn."""
    times = {name: [] for name in built}
    for _ in range(rounds):
        for name, (step, _) in built.items():
            began = clock()
            step()
            times[name].append(clock() - began)
    return times


def peak(side, name, dtype, labelled, args):
    """Peak resident bytes of a fresh process that takes two steps on one side."""
    command = [sys.executable, __file__, "--alone", side, "--config", name, "--dtype", dtype, "--labels", labelled,
               "--threads", str(args.threads), "--products", args.products]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def alone(side, config, dtype, labelled):
    step, _ = SIDES[side](config, dtype, labelled)
    for _ in range(2):
        step()
    print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))


# ---------------------------------------------------------------------------------------------------------------

SHOWN = {"config": "", "dtype": "", "labels": "", "side": "", "ms": ",.0f", "times ours": ".2f", "tokens/s": ",.0f", "floor": ".0%",
         "GF/s": ",.0f", "peak MB": ",.0f", "ours / peak": ".2f"}                    # a row's columns and their formats


def choose_products(choice):
    """Which library multiplies float32 matrices: PyTorch takes MKL, on this project's machine (AMD) the slower one.

    oneDNN is had by allowing it bfloat16; without AMX it makes no use of that. Where it does, the bench refuses.
    """
    torch.backends.mkldnn.matmul.fp32_precision = {"onednn": "bf16", "mkl": "ieee"}[choice]
    a, b = torch.randn(2, 512, 512).unbind()
    exact = a.double() @ b.double()
    if (a @ b - exact).norm() > 1e-6 * exact.norm():
        sys.exit("here oneDNN rounds float32 matrices to bfloat16: take --products mkl")


def rows_of(name, dtype_name, labelled, rounds, args):
    """Measure one case: a dict for each side, and what was found about parity."""
    from bench.floor import floor                                                          # which takes the shapes from here
    config, dtype = CONFIGS[name], getattr(torch, dtype_name)
    sides = [side for side in SIDES if args.compile or "compiled" not in side]
    memory = {side: peak(side, name, dtype_name, labelled, args) for side in sides}
    built = {side: SIDES[side](config, dtype, labelled) for side in sides}
    agreed = parity(built, config, dtype, labelled)
    print(f"{name} {dtype_name} {labelled}: {agreed}", file=sys.stderr)
    measure(built, 1)                                                                # the second warm-up
    least, flops = map(sum, zip(*floor(config, dtype, labelled).values()))
    times = measure(built, rounds)
    rows = []
    for side in sides:
        took = statistics.median(times[side])
        rows.append(dict(zip(SHOWN, (name, dtype_name, labelled, side, 1e3 * took,
                                     statistics.median(t / o for t, o in zip(times[side], times["ours"])), BATCH * LENGTH / took,
                                     least / took, flops / took / 1e9, memory[side] / 1e6, memory["ours"] / memory[side])))
                    | {"floor ms": 1e3 * least, "parity": agreed})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="shapes (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"], help="of the base")
    parser.add_argument("--labels", nargs="+", choices=("half", "all"), default=["half", "all"], help="what is trained on of each row")
    parser.add_argument("--threads", type=int, default=1, help="of both sides (default: 1)")
    parser.add_argument("--products", choices=("onednn", "mkl"), default="onednn", help="library for float32 matrices, both sides")
    parser.add_argument("--compile", action="store_true", help="also both sides under torch.compile")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and only config A in bfloat16, labels on half")
    parser.add_argument("--name", default="step", help="of the file in bench/results (default: step)")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)            # for `peak`
    args = parser.parse_args()
    if args.quick:
        args.config, args.dtype, args.labels = ["A"], ["bfloat16"], ["half"]
    torch.set_num_threads(args.threads)
    choose_products(args.products)
    cases = list(itertools.product(args.config, args.dtype, args.labels))
    if args.alone:
        return alone(args.alone, CONFIGS[cases[0][0]], getattr(torch, cases[0][1]), cases[0][2])
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    rounds, rows, path = 3 if args.quick else args.rounds, [], Path(__file__).parent / "results" / f"{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    for case in cases:
        rows += rows_of(*case, rounds, args)
        write_json(path, {                                                           # after each case: a stop loses no other
            "date": time.strftime("%Y-%m-%d"), "cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads, "products": args.products, "rounds": rounds, "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "rows": rows})
    print(table([[format(row[key], form) for key, form in SHOWN.items()] for row in rows], SHOWN, right=range(4, len(SHOWN))))
    print(f"\n{cpu}, {args.threads} thread{'s' * (args.threads > 1)}, float32 products by {args.products}; written to {path}")


if __name__ == "__main__":
    main()
