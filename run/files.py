"""Files: find them in a folder or on the hub, read them, write them whole or not at all.

A reader returns what the file says, or raises InputError: one line that names the file and what is
wrong with it. `run_command` prints that line and exits with code 2. Nothing is ever unpickled.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from tqdm import tqdm

BEHIND = "prefix:"      # before a file of plain prompts: they are put behind a jailbreak
ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------
# Commands: their flags, their errors, their tables

class InputError(Exception):
    """The user gave something that can't be used. The message is one line and says what to do."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which doesn't accept abbreviated flags."""

    def __init__(self, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message} (--help explains all flags)")


def positive(text: str) -> int:
    """A flag's whole number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return number


def run_command(main):
    """Run a command's `main`. An error that the user can mend ends in one line and exit code 2."""
    try:
        sys.exit(main())
    except InputError as error:
        line = str(error)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a folder that can't be written to
        line = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # A plain RuntimeError on a CPU. "out of resource" is a kernel's, of any class, on a small
        # GPU; the compiler may put lines of its own before it.
        found = re.search(".*(out of memory|can't allocate memory|out of resource).*", str(error))
        if not (found or isinstance(error, MemoryError)):
            raise
        message = found[0] if found else ""
        line = f"out of memory ({message}): lower --batch-tokens or --eval-batch"
    line = " ".join(printable(line).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """The text with spaces for its control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def table(rows: Iterable, head: Iterable[str] = (), right: Container[int] = ()) -> str:
    """Aligned text of `rows`, lists of cells; None is shown as –.

    Columns whose index is in `right` are flush right.
    """
    rows = [list(head), *rows] if head else list(rows)
    cells = [["–" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    # Numbers are flush right, so that their digits stand under each other.
    lines = []
    for row in cells:
        padded = [cell.rjust(width) if column in right else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(padded).rstrip())
    if head:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Finding a file: in a folder, or in a repository on the hub

def locate(source: str | Path, name: str, optional=False, repo_type="model"):
    """Path of file `name` in `source`: a folder, or a hub repository "owner/name".

    The hub's files are downloaded once and then cached. A file that isn't there, or isn't cached
    while the hub is out of reach, gives None if `optional`, else InputError; so does a repository
    that is missing or gated.
    """
    # A folder here wins over a repository of the same name.
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        if optional:
            return None
        problem = f"{folder} holds no file {name}"
        if any(folder.glob("*model*.bin")):
            problem += "; its .bin is a pickle, which is never loaded: save it as safetensors"
        raise InputError(problem)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise InputError(f"{source}: no such folder, and not a hub repository (owner/name)")
    return _download(str(source), name, optional, repo_type)


def _download(repo, name, optional, repo_type):
    from huggingface_hub import errors, hf_hub_download  # takes a second to import
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # no line for each of its retries
    try:
        return Path(hf_hub_download(repo, name, repo_type=repo_type))
    except errors.GatedRepoError:
        kind = "datasets/" if repo_type == "dataset" else ""
        problem = (f"is gated: accept its licence at https://huggingface.co/{kind}{repo}, "
                   "then log in with `hf auth login` or set HF_TOKEN")
    except errors.RepositoryNotFoundError:
        problem = "is no folder here and no repository on the hub (private: `hf auth login`)"
    except errors.LocalEntryNotFoundError:
        if optional:
            return None
        problem = "is no folder here, isn't in the cache, and the hub can't be reached"
    except errors.EntryNotFoundError:
        if optional:
            return None
        problem = f"on the hub holds no file {name}"
    except (errors.HfHubHTTPError, errors.HFValidationError, ConnectionError) as error:
        problem = f"can't be fetched from the hub: {str(error).splitlines()[0]}"
    raise InputError(f"{repo} {problem}")


def data_file(spec: str | Path) -> Path:
    """Path of a data file: hf://datasets/OWNER/NAME/FILE from the hub, or a file or folder here."""
    if match := re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", str(spec)):
        return locate(match[1], match[2], repo_type="dataset")
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"{spec}: no such file")
    return path


def moved_place(place, old: str | None, new: str | Path):
    """A place that a run in the folder `old` names: where it is if both have moved together.

    A place is a file, folder or hub name, or {role: file}.
    """
    if isinstance(place, dict):
        return {role: moved_place(file, old, new) for role, file in place.items()}
    if place and place.startswith(BEHIND):
        return BEHIND + moved_place(place.removeprefix(BEHIND), old, new)
    if not old or not place or not os.path.isabs(place) or os.path.exists(place):
        return place
    beside = os.path.join(Path(new).expanduser(), os.path.relpath(place, old))
    return os.path.abspath(beside) if os.path.exists(beside) else place


def is_file_name(name: object) -> bool:
    """Whether `name`, read from a file, is a plain name, which can't lead out of its folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) is not None


# ---------------------------------------------------------------------------------------------
# Reading. A file whose name ends in .gz is unpacked.

def parse_json(text: str | bytes, place: object):
    """The JSON value in `text`. Raises InputError, which names `place`."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
        # JSON can escape half a surrogate pair ("\ud800"), which no tokenizer and no file takes.
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON: {error}") from None
    return value


def refuse_pointer(path: str | Path):
    """Raise InputError if a file is what git leaves in its place where git-lfs isn't installed."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/"):
            raise InputError(f"{path} is a git-lfs pointer, fetch the file: `git lfs pull`")


def content_hash(paths: Iterable[Path], sampled=True) -> str:
    """SHA-256 of files' bytes. Where `sampled`, 4 KB in each part of a file larger than 16 MB.

    There are 4,096 parts, so that a change of weights is seen in every matrix, and 54 GB of them
    cost seconds. A change of single rows of data would not be seen.
    """
    digest = hashlib.sha256()
    for path in tqdm(list(paths), "comparing files", leave=False, delay=2, disable=None):
        size = os.path.getsize(path)
        step = max(1, size // (1 << 24) if sampled else 1) << 12
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """A file's bytes as a stream, unpacked if it ends in .gz. Errors name the file."""
    try:
        refuse_pointer(path)
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} can't be read: {reason}") from None


def read_json(path: str | Path, kind: type = dict):
    """The JSON value in a file, which must be of type `kind`."""
    with opened(path) as file:
        value = parse_json(file.read(), path)
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not a {kind.__name__}")
    return value


def text_lines(path: str | Path, blank=False) -> Iterator[tuple[int, str]]:
    """(number, line) of a UTF-8 text file, one at a time; lines of white space only if `blank`."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                # Excel begins a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            if blank or text.strip():
                yield number, text


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of a file with a JSON value a line, one at a time."""
    for number, line in text_lines(path):
        yield number, parse_json(line, f"{path}:{number}")


def read_jsonl(path: str | Path) -> list[dict]:
    """The JSON objects in a file, one a line."""
    rows = []
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        rows.append(row)
    return rows


@contextmanager
def open_tensors(path: str | Path) -> Iterator[safetensors.safe_open]:
    """An open safetensors file, with keys(), get_tensor(name), get_slice(name)[rows], metadata().

    Only what is asked for is read. Raises InputError if the file is damaged.
    """
    refuse_pointer(path)  # a missing file becomes an OSError that has the file's name
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file: {error}") from None


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file, from its header. InputError unless all are floats."""
    shapes = {}
    with open_tensors(path) as file:
        for name in file.keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise InputError(f"{path}: tensor {name} has dtype {entry.get_dtype()}")
            shapes[name] = tuple(entry.get_shape())
    return shapes


def read_tensors(path: str | Path, device="cpu") -> dict[str, torch.Tensor]:
    """{name: tensor} of a safetensors file that fits in memory: an adapter, a checkpoint."""
    with open_tensors(path) as file:
        # A copy: mapped tensors lie at odd addresses, on which the last bit of a sum can depend.
        return {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings {name: text} in a safetensors file's header."""
    with open_tensors(path) as file:
        return dict(file.metadata() or {})


# ---------------------------------------------------------------------------------------------
# Writing

@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well, and removed when it doesn't.

    So `path` holds the old bytes or the new ones, never a part. The file is written in a hidden
    folder beside it. The next write removes what a killed process left there.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder / path.name
        # On the disk before it has the name, or a power cut could leave the name without bytes.
        with open(folder / path.name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    except OSError as error:
        # A full disk names no file, other errors may name the hidden folder.
        if str(error.filename or folder).startswith(str(folder)):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_new(folder: str | Path) -> bool:
    """Whether a folder is missing, or holds nothing but what a killed process left of a write."""
    folder = Path(folder)
    if not folder.exists():
        return True
    return folder.is_dir() and all(re.fullmatch(r"\..+\.part", p.name) for p in folder.iterdir())


def write_text(path: str | Path, text: str):
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor],
                  metadata: dict[str, str] | None = None):
    """Write {name: tensor} as safetensors. transformers and peft look for format "pt"."""
    plain = {}
    addresses = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # The package refuses two names for one memory.
        plain[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    with atomic(path) as part:
        try:
            save_file(plain, part, {"format": "pt"} | (metadata or {}))
        except safetensors.SafetensorError as error:
            raise OSError(None, str(error), str(path)) from None
        part.chmod(part.parent.stat().st_mode & 0o666)  # the package lets only the owner read it
