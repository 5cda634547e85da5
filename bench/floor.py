"""Where the time of a training step goes: the floor of its matrix products, and what our step spends beside them.

    python bench/floor.py                                          # configs A and B, bfloat16; two minutes on one core
    python bench/floor.py --config B --dtype float32

The floor is the time of a step's matrix products alone, each shape at the rate measured for it in the same run: every
product with a frozen weight once forward and once backward (no gradient for the weight, none at all below the first
adapter), the six of each adapter, attention over the visible pairs of query and key alone (2 products forward, 4
backward), and two of the labelled tokens with the embedding. What an implementation computes twice doesn't count. Next
to it stand the bytes of all weights over the bandwidth measured for a copy: what merely reading them twice takes. The
step's own time is a profile's, by kind of operator. Printed, and written to bench/results/floor.json.
"""

import argparse
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end, so that `select` stays Python's own

from bench.step import BATCH, CONFIGS, LENGTH, RANK, choose_products, clock, data, ours

from run.files import write_json
from fused import IGNORE
from model import SLIDING
from model import Gemma2
from run.files import table

KINDS = {"matrix products": ("mm", "bmm", "addmm", "addmm_", "baddbmm"),
         "exp, sigmoid, softmax": ("exp2_", "exp_", "sigmoid_", "_softmax_backward_data"),
         "copies and casts": ("copy_", "cat", "fill_", "clone"),
         "other point-wise, sums": ("mul", "mul_", "add", "add_", "sub", "sub_", "div", "div_", "addcmul", "addcmul_", "sum", "mean", "pow",
                                    "neg", "masked_fill_", "rsqrt", "_foreach_add_", "_fused_adamw_", "index", "embedding")}


def products(config, labelled):
    """[(part, flops of a step, (batch, M, K, N))]: a product of a step, and the shape at which its rate is measured."""
    D, inner, L, hd = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim
    H, K, N, T = config.num_attention_heads, config.num_key_value_heads, BATCH * LENGTH, LENGTH
    out, widths = [], {"q": (D, H * hd), "k": (D, K * hd), "v": (D, K * hd), "o": (H * hd, D)}

    def add(part, count, m, k, n):
        out.append((part, count * 2 * m * k * n, (1, m, k, n)))
    for name, (a, b) in widths.items():
        below = L if name == "o" else L - 1                                          # nothing to train below layer 0
        add("q, k, v, o", L, N, a, b), add("q, k, v, o", below, N, b, a)
        add("adapters", L, N, a, RANK), add("adapters", L, N, RANK, b), add("adapters", L, N, b, RANK)     # x·Aᵀ, ·Bᵀ, dy·B
        add("adapters", below, N, RANK, a), add("adapters", L, RANK, N, a), add("adapters", L, b, N, RANK)  # ·A, dA, dB
    add("MLP", 2 * L, N, D, inner), add("MLP", 2 * L, N, inner, D)                   # gate and up, and their backward
    add("MLP", L, N, inner, D), add("MLP", L, N, D, inner)
    for kind in set(config.layer_types):
        seen = min(T, config.sliding_window) if kind == SLIDING else T
        pairs = BATCH * H * (seen * (seen + 1) / 2 + (T - seen) * seen) * config.layer_types.count(kind)
        out.append(("attention", 6 * 2 * pairs * hd, (BATCH * K, H // K * 128, hd, seen)))   # query blocks of 128 rows
    labels = int((data(config, labelled)[1] != IGNORE).sum())
    out += [("head", 2 * labels * D * config.vocab_size, shape) for shape in ((1, labels, D, 4096), (1, labels, 4096, D))]
    return out


def floor(config, dtype, labelled):
    """{part: (seconds, flops)} of all products of a step."""
    parts, rates = {}, {}
    for part, flops, (b, m, k, n) in products(config, labelled):
        if (b, m, k, n) not in rates:
            x, w = torch.randn(b, m, k, dtype=dtype), torch.randn(b, n, k, dtype=dtype).mT
            run = (lambda: x @ w) if b > 1 else (lambda: x[0] @ w[0])
            rates[b, m, k, n] = 2 * b * m * k * n / median_seconds(run, max(1, int(5e7 / (m * k * n * b))))
        seconds, done = parts.get(part, (0.0, 0))
        parts[part] = seconds + flops / rates[b, m, k, n], done + flops
    return parts


def median_seconds(run, reps=1):
    run()
    took = []
    for _ in range(7):
        began = clock()
        for _ in range(reps):
            run()
        took.append((clock() - began) / reps)
    return statistics.median(took)


def spent(run):
    """{kind of operator: seconds} of one step; what Python and dispatch take is "the rest"."""
    with torch.profiler.profile() as profile:
        run()
    kinds = dict.fromkeys((*KINDS, "the rest"), 0.0)
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::")
        kinds[next((kind for kind, names in KINDS.items() if name in names), "the rest")] += event.self_cpu_time_total / 1e6
    return kinds


def copying():
    """Bytes a second that a copy reads and writes."""
    source, target = torch.zeros(2, 1 << 26).unbind()                                # 256 MB each
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="shapes (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"], help="of the base")
    parser.add_argument("--labels", choices=("half", "all"), default="half", help="what is trained on of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--products", choices=("onednn", "mkl"), default="onednn", help="library for float32 matrices")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    choose_products(args.products)
    bandwidth = copying()
    results, cells = [], []
    for name in args.config:
        for dtype in args.dtype:
            config, kind = CONFIGS[name], getattr(torch, dtype)
            with torch.device("meta"):
                weights = kind.itemsize * sum(p.numel() for p in Gemma2(config).parameters())
            step, _ = ours(config, kind, args.labels)
            step(), step()
            whole, parts, kinds = median_seconds(step), floor(config, kind, args.labels), spent(step)
            least, flops = map(sum, zip(*parts.values()))
            reading = 2 * weights / bandwidth
            results.append({"config": name, "dtype": dtype, "step_seconds": whole, "floor_seconds": least, "flops": flops,
                            "weight_bytes": weights, "reading_seconds": reading, "floor": {k: v[0] for k, v in parts.items()},
                            "profile": kinds})
            rows = [("step", whole), ("floor", least), *((f"  {part}", s) for part, (s, _) in parts.items()),
                    ("reading the weights twice", reading), ("profile", sum(kinds.values())), *((f"  {k}", s) for k, s in kinds.items())]
            cells += [[name, dtype, what, f"{1e3 * s:,.0f}", f"{s / whole:.0%}"] for what, s in rows]
    print(table(cells, ["", "", "", "ms", "of the step"], right=(3, 4)))
    path = Path(__file__).parent / "results" / "floor.json"
    write_json(path, {"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "products": args.products, "labels": args.labels,
                      "bytes_per_second": bandwidth, "torch": version("torch"), "rows": results})
    print(f"\n{bandwidth / 1e9:.1f} GB/s copied; {args.threads} thread{'s' * (args.threads > 1)}; written to {path}")


if __name__ == "__main__":
    main()
