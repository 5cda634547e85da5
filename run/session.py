"""A run's folder and what keeps it whole: its settings, log and checkpoints, its lock, and the signals that end a session.

A run may take many sessions. Whatever ends one, the next finds in the folder all that is needed to go on to the same numbers.
"""

import fcntl
import itertools
import json
import os
import platform
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from run import files
from run import parallel
from run import settings as recipe
from run.files import InputError, read_tensors, write_json, write_tensors


FINISHED = "report.html"                         # the last file of a run


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; carries the signal's number."""


class Signals:
    """Ctrl-C and SIGTERM raise Stopped at once or, while `wait` is set, leave their number in `caught`, for the loop to
    finish its step and save. A second one doesn't wait; of many processes it means nothing, since torchrun passes on
    what the terminal has sent to all, and 30 s later ends what is left."""

    def __init__(self):
        self.wait, self.caught = False, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.caught and parallel.world_size() > 1:
            return
        waited, self.caught = self.wait and not self.caught, number
        if not waited:
            raise Stopped(number)


def run_folder(out: str | Path | None, name: str) -> Path:
    """The folder `out`, there or made; without one, a new folder of the time and a name."""
    if not out:
        return own_folder(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def settle(folder, settings, source):
    """Whether the run in a folder, which is locked, is new: given its config.json; else found unfinished and of the same settings."""
    if (folder / FINISHED).exists():
        raise InputError(f"{folder} holds a finished run, which is never overwritten: give another --out "
                         f"(`python eval.py {folder}` shows its figures)")
    if (folder / "config.json").exists():
        if (processes := files.read_json(folder / "config.json").get("processes", 1)) != parallel.world_size():
            raise InputError(f"{folder} holds an unfinished run of {processes} processes, not {parallel.world_size()}: start as many, "
                             "by torchrun")
        there = vars(recipe.saved(folder))
        for name, value in vars(settings).items():
            if there.get(name) != value and name != "device":
                raise InputError(f"{folder} holds an unfinished run of another configuration (--{name.replace('_', '-')} "
                                 f"{there.get(name)}, not {value}): give another --out, or go on with it by `--resume {folder}` alone")
        print(f"going on with the unfinished run in {folder}\n")
        files.sweep(folder)
        return False
    if not files.is_new(folder):
        raise InputError(f"{folder} is there and holds no run: give another --out")
    files.sweep(folder)
    write_json(folder / "config.json", {"settings": vars(settings), "source": source, "command": sys.argv,
                                        "processes": parallel.world_size(), "versions":
                                        {"python": platform.python_version(), "torch": torch.__version__}})
    return True


def own_folder(name):
    """Make a folder that nobody else has, even where two runs begin in one second: name, name-2, name-3, …"""
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


class Lock:
    """Keeps other processes out of a folder until it is forgotten. Raises InputError where one is in it.

    On the folder itself, which nobody replaces as files are, so that two that begin in an empty one can't both have it."""

    def __init__(self, folder):
        self.handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is at work on this run: wait for it, or give another --out") from None

    def __del__(self):
        if hasattr(self, "handle"):
            os.close(self.handle)


class Log:
    """metrics.jsonl: a line a training step and a line a stage, flushed as they come. A line cut short is dropped.
    Rank 0 keeps it; to others it is a list. Of this session's steps, which can be many, nothing is held in memory."""

    def __init__(self, path):
        self.path, self.lines, self.kept = path, [], parallel.rank() == 0
        found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in found:
            try:
                value = files.parse(line)
            except (ValueError, RecursionError):
                break
            if not (line.endswith(b"\n") and isinstance(value, dict) and isinstance(value.get("step", 0), int)
                    and isinstance(value.get("stage", ""), str)
                    and isinstance(value.get("seconds", None if "stage" in value else 0), float | int)):
                break
            self.lines.append(value)
        if self.kept and len(self.lines) < len(found):           # or the next line would be glued to what is left of the cut one
            files.write_jsonl(path, self.lines)

    def keep(self, steps):
        """Forget the lines of steps after `steps`, which are about to be made again. To be called before the first is."""
        self.lines = [line for line in self.lines if line.get("step", 0) <= steps]
        if self.kept:
            files.write_jsonl(self.path, self.lines)

    def add(self, line):
        if "step" not in line:
            self.lines.append(line)
        if not self.kept:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:                                 # a full disk names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    @contextmanager
    def stage(self, name):
        began = time.perf_counter()
        try:
            yield
        finally:                                                 # stopped by Ctrl-C too: the next session adds its own
            if self.path.parent.exists():
                self.add({"stage": name, "seconds": time.perf_counter() - began})

    def seconds(self):
        """{stage: seconds}, summed over the sessions of a run."""
        stages = [line for line in self.lines if "stage" in line]
        return {name: sum(line["seconds"] for line in stages if line["stage"] == name)
                for name in dict.fromkeys(line["stage"] for line in stages)}


CHECKPOINT = "checkpoint/state.safetensors"      # one file, so that it is all of one step
PREVIOUS = "checkpoint/previous.safetensors"     # the one before it, for the case that the disk spoils one


def save_checkpoint(folder: Path, step: int, adapters: dict, optimizer: torch.optim.Optimizer, average: dict) -> None:
    """Adapters, AdamW's moments and the moving average, empty without one, as tensors; step and thread count, on which sums
    depend, in the file's header."""
    tensors = {}
    for name, parameter in adapter_parameters(adapters):
        tensors[name] = parameter
        tensors |= {f"{name}.{moment}": optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
    tensors |= {f"{name}.average": tensor for name, tensor in average.items()}
    write_checkpoint(folder, tensors, {"step": str(step), "threads": str(torch.get_num_threads())})


def write_checkpoint(folder: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Put a checkpoint in the place of the last one, which becomes the one before it."""
    new = folder / "checkpoint/next.safetensors"
    write_tensors(new, tensors, metadata)
    if (folder / CHECKPOINT).exists():
        os.replace(folder / CHECKPOINT, folder / PREVIOUS)
    os.replace(new, folder / CHECKPOINT)


def mend_checkpoint(folder):
    """Where the last checkpoint is damaged, or a crash came in between two renames, put the one before it in its place."""
    path, previous = folder / CHECKPOINT, folder / PREVIOUS
    try:
        if path.exists():
            return read_tensors(path) and None
    except InputError as error:
        if not previous.exists():
            raise
        read_tensors(previous)
        print(f"{error}\ngoing on from the checkpoint before it, of step {files.read_metadata(previous).get('step')}", file=sys.stderr)
    if previous.exists():
        os.replace(previous, path)


def load_checkpoint(folder: Path, adapters: dict, optimizer: torch.optim.Optimizer, average: dict | None = None) -> int:
    """Put a checkpoint back, if there is one, also into the dict `average` where one is kept. The number of steps done."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path), files.read_metadata(path)
    wanted = {f"{name}{part}": parameter.shape for name, parameter in adapter_parameters(adapters)
              for part in ("", ".exp_avg", ".exp_avg_sq", *[".average"] * (average is not None))}
    numbers = [metadata.get(name, "") for name in ("step", "threads")]
    if ({name: tensor.shape for name, tensor in tensors.items()} != wanted
            or not all(re.fullmatch(r"[1-9]\d{0,8}", text) for text in numbers)):
        raise InputError(f"{path} is not a checkpoint of this run's adapters: remove the file to train from the start")
    step, threads = map(int, numbers)
    torch.set_num_threads(min(threads, 1024))
    with torch.no_grad():
        for name, parameter in adapter_parameters(adapters):
            parameter.copy_(tensors[name])
            optimizer.state[parameter] = {"step": torch.tensor(float(step))} | {
                moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
            if average is not None:
                average[name] = tensors[f"{name}.average"].to(parameter.device)
    return step


@torch.no_grad()
def put(named, values):
    """Copy values {name: tensor} into parameters [(name, parameter)]."""
    for name, parameter in named:
        parameter.copy_(values[name])


def adapter_parameters(adapters: dict) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of all factors that are trained."""
    return [(f"{name}.{factor}", getattr(layer, factor)) for name, layer in adapters.items() for factor in ("A", "B")
            if getattr(layer, factor).requires_grad]
