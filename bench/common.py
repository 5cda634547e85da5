"""What the benches share: two sides that take turns, the models, the flags, the results file."""

import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from model import Gemma2
from run.files import ROOT, table, write_json


# -------------------------------------------------------------------------------------------------
# Time

def clock() -> float:
    """Seconds: of one thread processor time, which neighbours don't stretch, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(sides: dict, rounds: int) -> dict[str, list[float]]:
    """{side: [seconds of each round]} of {side: function}. The sides take turns."""
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    return times


def ratio(times: list[float], own: list[float]) -> float:
    """Median over rounds of a side's time divided by ours."""
    return statistics.median(t / o for t, o in zip(times, own))


def race(sides: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """{side: (median seconds, its time over ours)}. Call each side once before: the warm-up."""
    times = measure(sides, rounds)
    return {name: (statistics.median(took), ratio(took, times["ours"]))
            for name, took in times.items()}


def median_seconds(run, repeats=1, rounds=7) -> float:
    """Median seconds of one call, after a warm-up."""
    run()
    times = []
    for _ in range(rounds):
        began = clock()
        for _ in range(repeats):
            run()
        times.append((clock() - began) / repeats)
    return statistics.median(times)


def peak_memory(*command) -> int:
    """Peak resident bytes that `python -m command` prints last, in a fresh process."""
    words = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def print_peak_memory() -> None:
    """Print this process's peak resident bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            print(int(line.split()[1]) * 1024)


# -------------------------------------------------------------------------------------------------
# Models

def in_dtype(dtype: torch.dtype, build):
    """build(), its parameters in `dtype` from the start.

    `.to` would need a second copy, and would round transformers' rotary tables too.
    """
    torch.set_default_dtype(dtype)
    model = build()
    torch.set_default_dtype(torch.float32)
    return model


def theirs_of(config, dtype: torch.dtype):
    """transformers' eager Gemma-2 in our config, its weights not drawn yet."""
    import transformers
    values = config.to_dict()
    del values["architectures"], values["model_type"]
    settings = transformers.Gemma2Config(**values, attn_implementation="eager")
    return in_dtype(dtype, lambda: transformers.Gemma2ForCausalLM(settings))


def models(config, dtype: torch.dtype):
    """Our model with random weights, and transformers' eager Gemma-2 on the same tensors."""
    ours = in_dtype(dtype, lambda: Gemma2(config))
    ours.init_weights(0.02, torch.Generator().manual_seed(0)).requires_grad_(False)
    theirs = theirs_of(config, dtype)
    weights = {f"model.{name}": weight for name, weight in ours.state_dict().items()}
    missing, extra = theirs.load_state_dict(weights, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not extra      # the head is the embedding
    theirs.tie_weights()
    return ours, theirs.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# Flags and results

def add_flags(parser, dtypes=("bfloat16", "float32"), rounds=5) -> None:
    """Flags that most benches have; empty `dtypes` leaves --dtype out."""
    add = parser.add_argument
    if dtypes:
        add("--dtype", nargs="+", choices=("bfloat16", "float32"), default=list(dtypes),
            help=f"of the base (default: {' '.join(dtypes)})")
    add("--threads", type=int, default=1, metavar="N", help="of all sides (default: 1)")
    add("--rounds", type=int, default=rounds, metavar="N",
        help=f"timed runs of each side (default: {rounds})")


def choose_products() -> str:
    """Choose which library multiplies float32 matrices, and return its name.

    PyTorch takes MKL, on AMD the slower one. oneDNN is chosen by allowing it bfloat16, of which
    it makes no use without AMX. Where it does, MKL stays: both sides must multiply in float32.
    """
    a, b = torch.randn(2, 512, 512).unbind()
    exact = a.double() @ b.double()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if (a @ b - exact).norm() < 1e-6 * exact.norm():
        return "onednn"
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    return "mkl"


def prepare(args) -> None:
    """Set the threads, and choose a library for float32 products."""
    torch.set_num_threads(args.threads)
    args.products = choose_products()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def write_results(name: str, rows: list[dict], args, *packages: str) -> Path:
    """Write rows with machine, settings and versions to bench/results/NAME.json."""
    path = ROOT / "bench/results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "settings": vars(args),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
        "rows": rows,
    })
    return path


def publish(name: str, rows: list[dict], shown: dict[str, str], args, *packages: str) -> None:
    """Print the columns `shown` {column: format} as a table, and write bench/results/NAME.json."""
    cells = []
    for row in rows:
        values = [(row[column], form) for column, form in shown.items()]
        cells.append([None if value is None else format(value, form) for value, form in values])
    print(table(cells, shown, right=range(2, len(shown))))
    path = write_results(name, rows, args, *packages)
    print(f"\n{cpu_name()}, threads {args.threads}, float32 products by {args.products}")
    print(f"written to {path.relative_to(ROOT)}")
