"""Where the time of a training step goes: the floor of its products, and what is beside them.

    python -m bench.floor                            # A and B, bfloat16: two minutes on one core
    python -m bench.floor --config B --dtype float32

The floor is the time of a step's matrix products alone (shapes.py): every product with a frozen
weight once forward and once backward, those of each adapter, attention over the visible pairs of
query and key, and two of the labelled tokens with the embedding. What an implementation computes
twice doesn't count. Beside it stand the bytes of all weights over the bandwidth measured for a
copy: what reading them twice takes. The step's own time is a profile's, by kind of operator. The
table is printed and written to bench/results/floor.json.
"""

import torch

from bench.common import add_flags, median_seconds, prepare, write_results
from bench.shapes import CONFIGS, floor
from bench.step import ours
from model import Gemma2
from run.files import Parser, table

KINDS = {
    "matrix products": "mm bmm addmm addmm_ baddbmm",
    "exp, sigmoid, softmax": "exp2_ exp_ sigmoid_ _softmax_backward_data",
    "copies and casts": "copy_ cat fill_ clone",
    "other point-wise, sums":
        "mul mul_ add add_ sub sub_ div div_ addcmul addcmul_ sum mean pow neg masked_fill_ rsqrt "
        "_foreach_add_ _fused_adamw_ index embedding",
}
KIND_OF = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names.split()}


def profile(run) -> dict[str, float]:
    """{kind of operator: seconds} of one step; "the rest" is what Python and dispatch take."""
    with torch.profiler.profile() as profiler:
        run()
    seconds = dict.fromkeys((*KINDS, "the rest"), 0.0)
    for event in profiler.key_averages():
        seconds[KIND_OF.get(event.key, "the rest")] += event.self_cpu_time_total / 1e6
    return seconds


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = torch.zeros(2, 1 << 26).unbind()          # 256 MB each
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def measure_case(name: str, dtype_name: str, labelled: str, bandwidth: float) -> dict:
    config, dtype = CONFIGS[name], getattr(torch, dtype_name)
    # Counted without memory
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in Gemma2(config).parameters())
    # Two steps of warm-up
    step, _ = ours(config, dtype, labelled)
    step()
    step()
    parts = floor(config, dtype, labelled)
    return {
        "config": name, "dtype": dtype_name,
        "step_seconds": median_seconds(step),
        "floor_seconds": sum(seconds for seconds, _ in parts.values()),
        "flops": sum(flops for _, flops in parts.values()),
        "weight_bytes": dtype.itemsize * num_weights,
        "reading_seconds": 2 * dtype.itemsize * num_weights / bandwidth,
        "floor": {part: seconds for part, (seconds, _) in parts.items()},
        "profile": profile(step),
    }


def cells_of(row: dict) -> list[list[str]]:
    times = {"step": row["step_seconds"], "floor": row["floor_seconds"]}
    times |= {f"  {part}": seconds for part, seconds in row["floor"].items()}
    times["reading the weights twice"] = row["reading_seconds"]
    times["profile"] = sum(row["profile"].values())
    times |= {f"  {kind}": seconds for kind, seconds in row["profile"].items()}
    whole = row["step_seconds"]
    return [[row["config"], row["dtype"], name, f"{1e3 * seconds:,.0f}", f"{seconds / whole:.0%}"]
            for name, seconds in times.items()]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS),
                        help="shapes (default: all)")
    parser.add_argument("--labels", choices=("half", "all"), default="half",
                        help="what is trained on of each row (default: half)")
    add_flags(parser, dtypes=("bfloat16",))
    args = parser.parse_args()
    prepare(args)
    bandwidth = copy_bandwidth()
    rows, cells = [], []
    for name in args.config:
        for dtype in args.dtype:
            row = measure_case(name, dtype, args.labels, bandwidth)
            rows.append({"bytes_per_second": bandwidth} | row)
            cells += cells_of(row)
    print(table(cells, ["", "", "", "ms", "of the step"], right=(3, 4)))
    write_results("floor", rows, args)
    print(f"\n{bandwidth / 1e9:.1f} GB/s copied; written to bench/results/floor.json")


if __name__ == "__main__":
    main()
