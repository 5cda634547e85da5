"""What the benches of generation and of selection share."""

import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # at the end, so that `select` stays Python's own

from bench.step import in_dtype, measure

from run.files import write_json
from model import Gemma2
from run.files import table


def models(config, dtype):
    """Our model with random weights, and transformers' eager Gemma-2 on the same tensors."""
    import transformers
    ours = in_dtype(dtype, lambda: Gemma2(config)).init_weights(0.02, torch.Generator().manual_seed(0)).requires_grad_(False)
    values = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "model_type")}
    settings = transformers.Gemma2Config(**values, attn_implementation="eager")
    theirs = in_dtype(dtype, lambda: transformers.Gemma2ForCausalLM(settings))
    theirs.load_state_dict({f"model.{name}": w for name, w in ours.state_dict().items()}, strict=False, assign=True)
    theirs.tie_weights()
    return ours, theirs.eval().requires_grad_(False)


def race(sides, rounds):
    """{side: (median seconds, median over rounds of its time over ours)}, the sides in turn, after their warm-up."""
    times = measure({name: (run, None) for name, run in sides.items()}, rounds)
    return {name: (statistics.median(took), statistics.median(t / o for t, o in zip(took, times["ours"])))
            for name, took in times.items()}


def publish(name, rows, shown, args, *packages):
    """Print rows as one table, of the columns `shown` {name: format}, and write them to bench/results/name.json."""
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())
    print(table([[format(row[key], form) for key, form in shown.items()] for row in rows], shown, right=range(2, len(shown))))
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(),
        "settings": vars(args), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)}, "rows": rows})
    print(f"\n{cpu}, {args.threads} thread{'s' * (args.threads > 1)}, float32 products by {args.products}; written to {path}")
