"""Attention alone beside transformers' eager one: forward and backward, in one process.

    pip install -r bench/requirements.txt
    python -m bench.attend                           # all rows: two minutes on one core
    python -m bench.attend --dtype bfloat16 --window 256 --rounds 3

Batch 4, 1024 tokens, 8 heads over 4 key-value heads of size 64, softcap 50, window 256 or none.
All sides take the same tensors, in turns. Before anything is timed, output and gradients are held
against the plain form in float64: ours may be off by 1e-5 in float32, and in bfloat16 by 1.1
times what transformers is. PyTorch's scaled_dot_product_attention, which knows no softcap, is a
yardstick. The table is printed and written to bench/results/attend.json.
"""

import statistics
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from attention import attention, attention_plain, span_mask, use_compile, visible_keys
from bench.common import add_flags, prepare, publish, ratio
from run.files import Parser

B, T, H, K, hd, CAP = 4, 1024, 8, 4, 64, 50.0
SCALE = hd ** -0.5
SHOWN = {"dtype": "", "window": "", "side": "", "forward ms": ",.0f", "both ms": ",.0f",
         "forward ×": ".1f", "both ×": ".1f", "off": ".1e"}


def sides(low, dtype):
    """{name: (q, k, v) -> output}. Masks are made once, as a model makes them for its layers."""
    mask = span_mask(low)
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    module = SimpleNamespace(num_key_value_groups=H // K, training=True)
    visible = visible_keys(low, CAP)
    no_window = bool(low[0, -1] == 0)

    def eager(q, k, v):
        output, _ = eager_attention_forward(module, q, k, v, bias, 0.0, SCALE, CAP)
        return output.transpose(1, 2)

    def ours(q, k, v, compiled=False):
        use_compile(compiled)
        return attention(q, k, v, visible, SCALE, CAP)

    def sdpa(q, k, v):
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        seen = None if no_window else mask
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=no_window, scale=SCALE)

    return {
        "transformers eager": eager,
        "ours": ours,
        "ours, compiled": lambda q, k, v: ours(q, k, v, compiled=True),
        "SDPA, no softcap": sdpa,
    }


def results(run, tensors, grad):
    """Output and the gradients of q, k and v."""
    output = run(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def parity(runs, tensors, low, grad) -> dict[str, float]:
    """{side: worst relative distance from float64, over output and gradients}."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    mask = span_mask(low)
    truth = results(lambda q, k, v: attention_plain(q, k, v, mask, SCALE, CAP), wide, grad.double())
    # SDPA knows no softcap, so it can't agree
    off = {}
    for name, run in runs.items():
        if "SDPA" not in name:
            pairs = zip(results(run, tensors, grad), truth)
            off[name] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    # In bfloat16 everybody rounds: we may be hardly farther off than they are
    bound = 1e-5 if grad.dtype == torch.float32 else 1.1 * off["transformers eager"]
    for name, distance in off.items():
        if name.startswith("ours") and distance > bound:
            sys.exit(f"{name}: {distance:.1e} from float64, where {bound:.1e} is allowed")
    return off


def measure_both(runs, tensors, grad, rounds: int):
    """{side: ([seconds forward], [forward and backward])}, in turns, after a round of warm-up."""
    # The first turn warms up, and compiles
    times = {name: ([], []) for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            with torch.no_grad():
                run(*tensors)
            between = time.perf_counter()
            results(run, tensors, grad)
            if turn > 0:
                times[name][0].append(between - began)
                times[name][1].append(time.perf_counter() - between)
    return times


def rows_of(dtype_name: str, window: int, rounds: int) -> list[dict]:
    # Scores of a few units, where the softcap bites
    draw = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype_name)
    # Laid out (B, T, heads, hd), as a projection leaves them
    q, k, v, grad = (torch.randn(B, T, heads, hd, generator=draw).to(dtype).transpose(1, 2)
                     for heads in (H, K, K, H))
    tensors = [(2 * q).requires_grad_(), (2 * k).requires_grad_(), v.requires_grad_()]
    low = (torch.arange(T) - window + 1).clamp(min=0)[None]
    runs = sides(low, dtype)
    off = parity(runs, tensors, low, grad)
    times = measure_both(runs, tensors, grad, rounds)
    their_forward, their_both = times["transformers eager"]
    rows = []
    for name, (forward, both) in times.items():
        rows.append({
            "dtype": dtype_name, "window": window, "side": name,
            "forward ms": 1e3 * statistics.median(forward),
            "both ms": 1e3 * statistics.median(both),
            "forward ×": ratio(their_forward, forward),
            "both ×": ratio(their_both, both),
            "off": off.get(name),
        })
    return rows


def main():
    parser = Parser(__doc__)
    parser.add_argument("--window", nargs="+", type=int, default=[256, T], metavar="N",
                        help=f"keys seen (default: 256 and all {T})")
    add_flags(parser, rounds=7)
    args = parser.parse_args()
    prepare(args)
    rows = []
    for dtype in args.dtype:
        for window in args.window:
            rows += rows_of(dtype, window, args.rounds)
    publish("attend", rows, SHOWN, args)
    print("×: how many times faster than transformers eager; off: from float64")


if __name__ == "__main__":
    main()
