"""A run's folder and what keeps it whole: settings, log, checkpoint, and the end of a session.

A run may take many sessions. Whatever ends one, the next finds in the folder all that it needs to
go on to the same numbers.
"""

import json
import math
import os
import platform
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from run import parallel
from run.files import (InputError, is_new, read_json, read_metadata, read_tensors, tensor_shapes,
                       write_json, write_jsonl, write_tensors)
from run.settings import PLACES, flag
from run.weights import read_weight

FINISHED = "scores.json"                        # the last file of a run
FIRST = "first_step"                            # the adapter after one step, which learned little
CHECKPOINT = "checkpoint/state.safetensors"     # one file, so that all of it is of one step
MOMENTS = ("exp_avg", "exp_avg_sq")             # AdamW's
Parameters = Sequence[tuple[str, torch.nn.Parameter]]


# ------------------------------------------------------------------------------
# Ends of a session

class Stopped(BaseException):
    """Ctrl-C or SIGTERM; carries the signal's number."""


class Signals:
    """Ctrl-C and SIGTERM raise Stopped at once or, while `wait` is set, are left in `caught`.

    The training loop sets `wait`: it finishes its step and saves. A second signal does not wait.
    Of many processes a second one means nothing: torchrun passes on what the terminal has sent to
    all, and kills what is left after 30 s.
    """

    def __init__(self):
        self.wait = False
        self.caught = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.caught and parallel.world_size() > 1:
            return
        waits = self.wait and not self.caught
        self.caught = number
        if not waits:
            raise Stopped(number)


def limit_threads(model: torch.nn.Module):
    """Use one thread for a small model on a CPU, unless OMP_NUM_THREADS says otherwise.

    Its matrices are too small to share: threads that wait for each other cost more than they
    bring, many times more where other work is on the machine.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters < 3e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------
# The folder

def run_folder(out: str | Path | None, name: str) -> Path:
    """The folder `out`, made unless there; without one, a new folder runs/TIME-name."""
    if out:
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stem = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder = Path(stem)
    number = 1
    while folder.exists():                          # two runs may begin in one second
        number += 1
        folder = Path(f"{stem}-{number}")
    folder.mkdir(parents=True)
    return folder


def open_run(folder: Path, settings: SimpleNamespace, source: dict[str, str],
             contents: dict[str, str]) -> bool:
    """Write the config.json of a new run, or check that an unfinished one has the same settings.

    contents: {place: SHA-256 of what it holds}. Returns whether the run is new. Folders may move
    between two sessions; what they hold may not change. Raises InputError for a finished run,
    another configuration, other weights, SAEs or data.
    """
    path = folder / "config.json"
    if (folder / FINISHED).exists():
        raise InputError(f"{folder} holds a finished run, which is never overwritten: give another "
                         f"--out (`python -m report {folder}` shows it)")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    config = {"settings": vars(settings), "source": source, "command": sys.argv,
              "contents": contents, "folder": str(folder.absolute()),
              "processes": parallel.world_size(), "versions": versions}
    if not path.exists():
        if not is_new(folder):
            raise InputError(f"{folder} is there and holds no run: give another --out")
        write_json(path, config)
        return True
    old = read_json(path)
    if not old.keys() >= {"settings", "source", "command", "processes"}:
        raise InputError(f"{folder} is there and holds no run: give another --out")
    saved = _fixed(old)
    for name, value in _fixed(config).items():
        if saved.get(name, value) != value:
            raise InputError(f"{folder} holds an unfinished run with {name} {saved[name]}, not "
                             f"{value}: give another --out, or only `--resume {folder}`")
    # Places may have moved
    flags = {name: origin for name, origin in source.items() if origin == "flag"}
    write_json(path, old | {"settings": vars(settings), "source": old["source"] | flags,
                            "folder": config["folder"]})
    print(f"going on with the unfinished run in {folder}\n")
    return False


def _fixed(config):
    """{name: value} of what may not change between two sessions of a run."""
    fixed = {flag(name): value for name, value in config["settings"].items()
             if name not in ("device", "log", *PLACES)}
    # A fork's run goes on with the fork
    script = Path(config["command"][0]).name
    for place, value in config.get("contents", {}).items():
        fixed[f"{place} of SHA-256"] = value
    return fixed | {"script": script, "processes": config["processes"]}


class Log:
    """metrics.jsonl: a line a training step and a line a stage, written as they come.

    The first process writes it. With `tensorboard`, steps go there too. A line that a crash cut
    short is dropped.
    """

    def __init__(self, path: Path, tensorboard=False):
        self.path = path
        self.writes = parallel.rank() == 0
        self.lines = []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                self.lines.append(json.loads(line))
            except ValueError:                      # or the next line would be glued to it
                self.keep(math.inf)
                break
        self.board = None
        if tensorboard and self.writes:
            from torch.utils.tensorboard import SummaryWriter   # optional, and slow to import
            self.board = SummaryWriter(path.parent)

    def keep(self, steps: float):
        """Forget the steps after `steps`, which are about to be made again."""
        self.lines = [line for line in self.lines if line.get("step", 0) <= steps]
        if self.writes:
            write_jsonl(self.path, self.lines)

    def add(self, line: dict):
        self.lines.append(line)
        if not self.writes:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board and "step" in line:
            for name in ("loss", "lr", "grad_norm"):
                self.board.add_scalar(name, line[name], line["step"])
            self.board.flush()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, also one that Ctrl-C ends: the next session adds its own seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.path.parent.exists():
                self.add({"stage": name, "seconds": time.perf_counter() - start})

    def seconds(self) -> dict[str, float]:
        """{stage: seconds}, summed over the sessions of a run."""
        total: dict[str, float] = defaultdict(float)
        for line in self.lines:
            if "stage" in line:
                total[line["stage"]] += line["seconds"]
        return total


def progress_line(metrics: dict, steps: int) -> str:
    """The line that a training step prints."""
    step = metrics["step"]
    seconds = metrics["seconds"]
    return (f"step {step:>{len(str(steps))}}/{steps} {step / steps:4.0%}  "
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  grad {metrics['grad_norm']:.2f}  "
            f"{1000 * seconds:6.0f} ms  {metrics['tokens'] / seconds:7,.0f} tokens/s  "
            f"{(steps - step) * seconds:5.0f} s left")


# ------------------------------------------------------------------------------
# Checkpoints

def write_checkpoint(folder: Path, tensors: dict, metadata: dict[str, str]):
    """Put a checkpoint in the place of the last one."""
    write_tensors(folder / CHECKPOINT, tensors, metadata)


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, str]] | None:
    """(tensors, metadata) of the folder's checkpoint; None where there is none yet."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    return read_tensors(path), read_metadata(path)


def save_checkpoint(folder: Path, step: int, parameters: Parameters,
                    optimizer: torch.optim.Optimizer):
    """Parameters and AdamW's moments as tensors; step and number of threads in the file's header.

    Sums depend on the number of threads, so the next session takes the same. All processes call
    it, since each may hold its rows alone, and the first one writes.
    """
    tensors = {}
    for name, parameter in parameters:
        moments = optimizer.state[parameter]
        for key, value in ((name, parameter), *((f"{name}.{m}", moments[m]) for m in MOMENTS)):
            rows = parallel.whole(value.detach())
            if parallel.rank() == 0:
                tensors[key] = rows.cpu()
    metadata = {"step": str(step), "threads": str(torch.get_num_threads())}
    parallel.on_rank_zero(write_checkpoint, folder, tensors, metadata)


@torch.no_grad()
def load_checkpoint(folder: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> int:
    """Put the folder's checkpoint back, if there is one: the number of steps done."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    try:
        metadata = read_metadata(path)
        step = int(metadata["step"])
        torch.set_num_threads(int(metadata["threads"]))
        shapes = tensor_shapes(path)
        for name, parameter in parameters:
            # A fused AdamW counts its steps on the card
            place = parameter.device if optimizer.defaults["fused"] else "cpu"
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            for key, tensor in ((name, parameter), *((f"{name}.{m}", state[m]) for m in MOMENTS)):
                if shapes[key] != tuple(tensor.shape):
                    raise ValueError(f"{key} has shape {shapes[key]}")
                read_weight((path, key), tensor)
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device=place)} | state
    except (KeyError, ValueError) as error:       # other names, numbers or shapes
        raise InputError(f"{path} is not of this run's weights: remove the file to train from the "
                         f"start ({error})") from None
    return step


# ------------------------------------------------------------------------------
# The model card

CARD = """---
library_name: {library}
license: {license}
tags: [safety, sails, gemma-2]
---

# {base}: {title}

{method_text}, trained on the aligned answers of `{data}`, seed {seed}. {trainable:,} of
{parameters:,} parameters are trained.

```
{results}
```

Judge: {judge}.

```python
{loading}
```

{terms}
"""
LORA_CARD = {
    "library": "peft", "title": "a SAILS safety adapter",
    "method_text": "LoRA of rank {rank} on {modules} of every layer, begun as `{init}` (SAILS, "
                   "arXiv 2512.23260)",
    "loading": """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")      # or where the base model lies
model = PeftModel.from_pretrained(model, "THIS FOLDER")"""}
FULL_CARD = {
    "library": "transformers", "title": "fine-tuned for safety",
    "method_text": "Full fine-tuning of {modules}, the baseline of SAILS (arXiv 2512.23260)",
    "loading": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER/model")"""}
GEMMA_TERMS = ("This is a derivative of Gemma: the "
               "[Gemma Terms of Use](https://ai.google.dev/gemma/terms) apply to it.")


def model_card(settings: SimpleNamespace, scores: dict, results: str) -> str:
    """The text of a run's README.md: metadata as the hub reads it, the figures, how to load it."""
    on_hub = "/" in settings.model and not Path(settings.model).exists()
    license = "other"
    terms = "The licence is that of the base model."
    if on_hub:
        license = f"gemma\nbase_model: {settings.model}"
        terms = GEMMA_TERMS
    # A path here says nothing elsewhere
    base = settings.model if on_hub else Path(settings.model).name
    data = settings.data if settings.data.startswith("hf://") else Path(settings.data).name
    is_full = settings.method == "full"
    modules = ", ".join(settings.targets or ["all weights"])
    values = vars(settings) | scores
    values |= {"base": base, "data": data, "results": results, "license": license, "terms": terms,
               "modules": modules}
    texts = FULL_CARD if is_full else LORA_CARD
    values |= {name: text.format_map(values) for name, text in texts.items()}
    return CARD.format_map(values)
