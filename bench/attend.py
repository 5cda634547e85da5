"""Attention alone beside transformers' eager one: forward and backward, time in one process.

    pip install -r bench/requirements.txt
    python bench/attend.py                                         # all rows, two minutes on one core
    python bench/attend.py --dtype bfloat16 --window 256 --rounds 3

Batch 4, 1024 tokens, 8 heads over 4 key-value heads of size 64, softcap 50, window 256 or none; all sides take the same
tensors and run in turn. Before anything is timed, output and gradients are held against the plain form in float64: ours
in blocks may be off by 1e-5 in float32, and in bfloat16 by 1.1 times what transformers is. PyTorch's own
scaled_dot_product_attention, which knows no softcap, is there as a yardstick. Results are printed as one table and
written to bench/results/attend.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end, so that `select` stays Python's own

from bench.step import choose_products

from attention import attend_spans, attention_plain, span_mask, use_compile
from run.files import table

B, T, H, K, hd, CAP = 4, 1024, 8, 4, 64, 50.0
SCALE = hd ** -0.5


def sides(low, dtype):
    """{name: q, k, v -> output}: each with its mask made beforehand, as a model makes it once for many layers."""
    mask = span_mask(low)
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    module = SimpleNamespace(num_key_value_groups=H // K, training=True)

    def spans(compiled):
        def run(q, k, v):
            use_compile(compiled)
            return attend_spans(q, k, v, low, SCALE, CAP)[0]
        return run

    def sdpa(q, k, v):
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        whole = low[0, -1] == 0
        return F.scaled_dot_product_attention(q, k, v, None if whole else mask, is_causal=bool(whole), scale=SCALE)
    return {
        "transformers eager": lambda q, k, v: eager_attention_forward(module, q, k, v, bias, 0.0, SCALE, CAP)[0].transpose(1, 2),
        "ours, plain": lambda q, k, v: attention_plain(q, k, v, mask, SCALE, CAP),
        "ours, blocks": spans(False),
        "ours, blocks, compiled": spans(True),
        "SDPA, no softcap": sdpa}


def results(run, tensors, grad):
    out = run(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def parity(runs, tensors, low, grad):
    """Worst relative distance, over output and gradients, of each side that has the softcap from float64."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = results(lambda *x: attention_plain(*x, span_mask(low), SCALE, CAP), wide, grad.double())
    off = {name: max(((a - b).norm() / b.norm()).item() for a, b in zip(results(run, tensors, grad), truth))
           for name, run in runs.items() if "SDPA" not in name}
    bound = 1e-5 if grad.dtype == torch.float32 else 1.1 * off["transformers eager"]
    for name, distance in off.items():
        if "blocks" in name and distance > bound:
            sys.exit(f"{name}: {distance:.1e} from float64, where {bound:.1e} is allowed")
    return off


def measure(runs, tensors, grad, rounds):
    """Seconds {name: ([forward], [forward and backward])}, in turn, after one round of warm-up."""
    times = {name: ([], []) for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            with torch.no_grad():
                run(*tensors)
            between = time.perf_counter()
            results(run, tensors, grad)
            if turn:
                times[name][0].append(between - began)
                times[name][1].append(time.perf_counter() - between)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--window", nargs="+", type=int, default=[256, T], help=f"keys seen (default: 256 and all {T})")
    parser.add_argument("--threads", type=int, default=1, help="of all sides (default: 1)")
    parser.add_argument("--products", choices=("onednn", "mkl"), default="onednn", help="library for float32 matrices, all sides")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each side (default: 7)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    choose_products(args.products)
    rows = []
    for dtype in args.dtype:
        for window in args.window:
            draw = torch.Generator().manual_seed(0)
            q, k, v, grad = (torch.randn(B, T, heads, hd, generator=draw).to(getattr(torch, dtype)).transpose(1, 2)
                             for heads in (H, K, K, H))
            tensors = [(x * size).requires_grad_() for x, size in ((q, 2), (k, 2), (v, 1))]
            low = (torch.arange(T) - window + 1).clamp(min=0)[None]
            runs = sides(low, grad.dtype)
            off = parity(runs, tensors, low, grad)
            times = measure(runs, tensors, grad, args.rounds)
            theirs = times["transformers eager"]
            rows += [{"dtype": dtype, "window": window, "side": name, "forward ms": 1e3 * statistics.median(forward),
                      "both ms": 1e3 * statistics.median(both), "off": off.get(name),
                      "forward ×": statistics.median(t / o for t, o in zip(theirs[0], forward)),
                      "both ×": statistics.median(t / o for t, o in zip(theirs[1], both))}
                     for name, (forward, both) in times.items()]
    shown = {"dtype": "", "window": "", "side": "", "forward ms": ",.0f", "both ms": ",.0f", "forward ×": ".1f", "both ×": ".1f",
             "off": ".1e"}
    print(table([[None if row[key] is None else format(row[key], form) for key, form in shown.items()] for row in rows],
                shown, right=range(3, len(shown))))
    path = Path(__file__).parent / "results" / "attend.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "products": args.products,
                                "torch": torch.__version__, "rounds": args.rounds, "rows": rows}, indent=1) + "\n")
    print(f"\n×: how many times faster than transformers eager; off: from float64; {args.threads} thread(s); written to {path}")


if __name__ == "__main__":
    main()
