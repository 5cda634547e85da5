"""A full-size 2B on a small machine: random weights in gemma-2-2b's exact shapes, loaded, selected with and trained.

    python bench/full2b.py                     # some minutes on 2 free cores; 7 GB of disk while it runs

Writes a sharded bfloat16 checkpoint, four random 16k-wide SAEs in Gemma Scope's layout, the real tokenizer and real
HH-RLHF pairs into a temporary folder, and runs each stage there as a user would, in a process of its own: its wall time,
its processor time (of all threads, which is what counts where others share the machine) and its peak resident memory
(of all pages, those of mapped files too), which must stay under 9 GB. The folder is
removed at the end, whatever happened. Figures go to bench/results/full2b.json. Random weights have no effect on either,
but what is selected and the loss mean nothing.
"""

import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end, so that `select` stays Python's own

from run.files import write_json
from model import PRESETS
from model import Gemma2, load_model, save_model
from run.files import table
from sae import CANONICAL_L0, save_sae

DATA = ROOT.parent / "shared" / "data"
GIVEN = {"gemma_tokenizer.json.gz": "tokenizer.json", "hh_rlhf_harmless_base_test.jsonl.gz": "pairs.jsonl"}
LAYERS, WIDTH, LIMIT, DISK = (5, 10, 15, 20), 16384, 9e9, 8e9


def write(folder):
    """Everything that the stages read. Draws with torch's default generator; the model is the largest thing held."""
    config = PRESETS["google/gemma-2-2b"]
    for given, name in GIVEN.items():
        with gzip.open(DATA / given) as source, open(folder / name, "wb") as out:
            shutil.copyfileobj(source, out)
    for layer in LAYERS:
        D = config.hidden_size
        W_dec = torch.nn.functional.normalize(torch.randn(WIDTH, D), dim=1)
        # The residual's entries have a variance near 1 + 2 · blocks: each block adds two outputs of a norm of gain 1.
        # 2.5 standard deviations let about 100 features fire, as many as Gemma Scope's
        threshold = torch.full((WIDTH,), 2.5 * (1 + 2 * (layer + 1)) ** 0.5)
        l0 = CANONICAL_L0["google/gemma-scope-2b-pt-res", "16k"][layer]
        save_sae(folder / "sae", layer, l0, W_enc=W_dec.T, b_enc=torch.zeros(WIDTH), threshold=threshold, W_dec=W_dec,
                 b_dec=torch.zeros(D))
    with torch.device("meta"):
        model = Gemma2(config).to(torch.bfloat16)
    save_model(model.to_empty(device="cpu").init_weights(), folder, max_shard_bytes=1 << 30)


def stage(*command):
    """Run `python command` from the root, its output shown and kept: (wall and processor seconds, peak resident bytes, output)."""
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, (sys.executable, *command))), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(f"    {line}", end="", flush=True)
        lines.append(line)
    _, status, usage = os.wait4(process.pid, 0)                                      # ru_maxrss is the child's VmHWM
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command[:2]))} ended with {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, "".join(lines)


def main():
    if not DATA.is_dir():
        sys.exit(f"skipped: {DATA}, which holds the real tokenizer and the HH-RLHF pairs, is not here")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < DISK:
        sys.exit(f"skipped: {tempfile.gettempdir()} has {free / 1e9:.1f} GB free of the {DISK / 1e9:.0f} GB needed: set TMPDIR")
    with tempfile.TemporaryDirectory(prefix="full2b-") as name:
        folder, rows, steps = Path(name), [], []
        common = ("--model", folder, "--sae", folder / "sae", "--data", folder / "pairs.jsonl", "--layers", *LAYERS,
                  "--width", "16k", "--dtype", "bfloat16", "--pairs", 4)
        stages = {
            "write": (__file__, "--write", folder),
            "load": (__file__, "--load", folder),
            "select, 4 pairs": (ROOT / "select.py", *common, "--out", folder / "selection"),
            "train, 2 × 512 tokens": (ROOT / "train.py", *common, "--steps", 2, "--batch-tokens", 512, "--accumulate", 1,
                                      "--out", folder / "run")}
        for stage_name, command in stages.items():
            print(f"{stage_name}:", flush=True)
            seconds, busy, peak, output = stage(*command)
            rows.append({"stage": stage_name, "seconds": round(seconds, 1), "processor_seconds": round(busy, 1),
                         "peak_bytes": peak})
            steps += [int(ms) / 1e3 for ms in re.findall(r"^step .* (\d+) ms", output, re.M)]
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(Path(__file__).parent / "results" / "full2b.json", {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": platform.machine(),
        "threads": torch.get_num_threads(), "checkpoint_bytes": size, "step_seconds": steps, "stages": rows})
    cells = [[row["stage"], f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"] for row in rows]
    print("", table(cells, ["stage", "seconds", "of processor", "peak GB"], right=(1, 2, 3)), sep="\n")
    print(f"\ncheckpoint {size / 1e9:.2f} GB; training steps took {' and '.join(f'{s:.1f}' for s in steps)} s; "
          f"{torch.get_num_threads()} threads")
    if over := [row["stage"] for row in rows[1:] if row["peak_bytes"] > LIMIT]:
        sys.exit(f"over {LIMIT / 1e9:.0f} GB: {', '.join(over)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--load"]:
        load_model(sys.argv[2], dtype=torch.bfloat16)
    else:
        main()
