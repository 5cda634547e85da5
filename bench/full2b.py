"""A full-size 2B on a small machine: random weights in gemma-2-2b's exact shapes.

    python -m bench.full2b           # some minutes on 2 free cores; 7 GB of disk while it runs

Writes a sharded bfloat16 checkpoint, four random 16k-wide SAEs in Gemma Scope's layout, the real
tokenizer and real HH-RLHF pairs into a temporary folder. Then it runs each stage as a user would,
in a process of its own, and measures its wall time, its processor time (of all threads, which is
what counts where others share the machine) and its peak resident memory (of all pages, mapped
files too), which must stay under 9 GB. The folder is removed at the end. Figures go to
bench/results/full2b.json. Random weights change neither time nor memory, but what is selected and
the loss mean nothing.
"""

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.common import write_results
from model import PRESETS, Gemma2, load_model, save_model
from run.files import ROOT, Parser, table
from sae import CANONICAL_L0, save_sae

DATA = ROOT.parent / "shared" / "data"
GIVEN = {"gemma_tokenizer.json.gz": "tokenizer.json",
         "hh_rlhf_harmless_base_test.jsonl.gz": "pairs.jsonl"}
LAYERS, WIDTH = (5, 10, 15, 20), 16384
MEMORY_LIMIT, DISK = 9e9, 8e9


def write_inputs(folder: Path) -> None:
    """Write everything that the stages read."""
    config = PRESETS["google/gemma-2-2b"]
    for given, name in GIVEN.items():
        with gzip.open(DATA / given) as source, open(folder / name, "wb") as out:
            shutil.copyfileobj(source, out)
    for layer in LAYERS:
        D = config.hidden_size
        W_dec = torch.nn.functional.normalize(torch.randn(WIDTH, D), dim=1)
        # The residual's entries have a variance near 1 + 2 · blocks, as each block adds two
        # outputs of a norm of gain 1. At 2.5 standard deviations about 100 features fire, as
        # many as Gemma Scope's.
        threshold = torch.full((WIDTH,), 2.5 * (1 + 2 * (layer + 1)) ** 0.5)
        l0 = CANONICAL_L0["google/gemma-scope-2b-pt-res", "16k"][layer]
        save_sae(folder / "sae", layer, l0, W_enc=W_dec.T, b_enc=torch.zeros(WIDTH),
                 threshold=threshold, W_dec=W_dec, b_dec=torch.zeros(D))
    with torch.device("meta"):
        model = Gemma2(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").init_weights()
    save_model(model, folder, max_shard_bytes=1 << 30)


def run_stage(*command):
    """Run `python command`, its output shown: (row of figures, output)."""
    began = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(f"    {line}", end="", flush=True)
        lines.append(line)
    _, status, usage = os.wait4(process.pid, 0)          # ru_maxrss is the child's VmHWM
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words[1:3])} ended with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }, "".join(lines)


def run_stages(folder: Path):
    """(rows, seconds of the training steps, bytes of the checkpoint)."""
    model = ("--model", folder, "--sae", folder / "sae", "--data", folder / "pairs.jsonl",
             "--layers", *LAYERS, "--dtype", "bfloat16", "--more", "width=16k", "pairs=4")
    stages = {
        "write": ("-m", "bench.full2b", "--write", folder),
        "load": ("-m", "bench.full2b", "--load", folder),
        "select, 4 pairs": ("select.py", *model, "--out", folder / "selection"),
        "train, 2 × 512 tokens": ("train.py", *model, "accumulate=1", "--steps", 2,
                                  "--batch-tokens", 512, "--out", folder / "run"),
    }
    rows, steps = [], []
    for name, command in stages.items():
        print(f"{name}:", flush=True)
        row, output = run_stage(*command)
        rows.append({"stage": name} | row)
        steps += [int(ms) / 1e3 for ms in re.findall(r"^step .* (\d+) ms", output, re.M)]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return rows, steps, size


def main():
    parser = Parser(__doc__)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)      # a stage
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)       # another
    args = parser.parse_args()
    if args.write:
        return write_inputs(args.write)
    if args.load:
        load_model(args.load, dtype=torch.bfloat16)
        return
    if not DATA.is_dir():
        sys.exit(f"skipped: {DATA}, with the real tokenizer and HH-RLHF pairs, is not here")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < DISK:
        sys.exit(f"skipped: {tempfile.gettempdir()} has {free / 1e9:.1f} GB free of the "
                 f"{DISK / 1e9:.0f} GB needed (set TMPDIR)")
    with tempfile.TemporaryDirectory(prefix="full2b-") as folder:
        rows, steps, size = run_stages(Path(folder))
    cells = []
    for row in rows:
        cells.append([row["stage"], f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}",
                      f"{row['peak_bytes'] / 1e9:.2f}"])
    print(table(cells, ["stage", "seconds", "of processor", "peak GB"], right=(1, 2, 3)))
    settings = argparse.Namespace(threads=torch.get_num_threads(), checkpoint_bytes=size,
                                  step_seconds=steps)
    write_results("full2b", rows, settings)
    print(f"\ncheckpoint {size / 1e9:.2f} GB; training steps took "
          f"{' and '.join(f'{seconds:.1f}' for seconds in steps)} s")
    over = [row["stage"] for row in rows[1:] if row["peak_bytes"] > MEMORY_LIMIT]
    if over:
        sys.exit(f"over {MEMORY_LIMIT / 1e9:.0f} GB: {', '.join(over)}")


if __name__ == "__main__":
    main()
