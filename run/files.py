"""Every file passes here: found in a folder or on the hub, read without trust, written whole or not at all.

A reader either returns what the file says or raises InputError with one line that names the file, the value and
what to do; `run_command` turns that line into exit code 2. Nothing is ever unpickled. Writers write to a temporary name,
flush it to the disk and rename it, so that a name holds the old bytes or the new ones, never a part. Tensors carry a
checksum, which `read_tensors` and `verify` hold them against.
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import safetensors
import torch

ROOT = Path(__file__).resolve().parent.parent
UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)
sys.set_int_max_str_digits(640)  # a longer number in a file is an error, and not seconds of work
JSON_LIMIT = 40 << 20    # bytes; Gemma's tokenizer.json has 17 MB, written anew by transformers 34 MB
VALUES = 1 << 20         # in a JSON text, as `weight` counts: half a second to read
ITEMS = 1 << 20          # in a file of JSON lines, where a line counts for four and each of its values for one
HEADER_LIMIT = 1 << 20   # bytes of a safetensors header; a shard of 27b has 40,000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of weights
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all errors here, and which takes no flag for another."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message} (--help explains all flags)")


class InputError(Exception):
    """Something a user gave can't be used: one line that names it and says what to do."""


NO_MEMORY = "out of memory|not enough memory|[Cc]an(no|')t allocate|failed to map segment|can't start new thread"


def run_command(main):
    """Run a command's `main`; what the user can mend ends in one line on stderr and exit code 2, no traceback."""
    try:
        code = main()
    except InputError as error:
        line = " ".join(str(error)[:2000].split())               # what it names can be a stranger's, and long
    except BrokenPipeError:  # the reader of our output has gone (`| head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a folder that can't be written: the system's words, and the file's name
        line = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError, ImportError) as error:  # PyTorch's own class for it is a RuntimeError, on a CPU a plain one
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        line = f"out of memory ({str(error).splitlines()[0] if str(error) else 'no more to be had'}): lower --batch-tokens or --eval-batch"
    else:
        sys.exit(code)
    print(f"{Path(sys.argv[0]).name}: error: {printable(line)}", file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """A text on one line, with nothing in it that could steer a terminal: it may be a stranger's."""
    return "".join(c if c.isprintable() else " " for c in text)


# ---------------------------------------------------------------------------------------------------------------
# Finding a file: a folder here, or a repository on the hub

def locate(source: str | Path, name: str, optional=False, repo_type="model"):
    """Path of file `name` of `source`: a folder, or a hub repository "owner/name" (downloaded once, then cached).

    With `optional`, a file that isn't there gives None. Raises InputError where the folder or repository lacks the
    file, doesn't exist, is gated and not logged in to, or can't be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / name).is_file():
            return folder / name
        if optional:
            return None
        raise InputError(f"{folder} holds no file {name}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise InputError(f"{source}: no such folder, and not the name of a hub repository (owner/name)")
    return _download(str(source), name, optional, repo_type)


def data_file(spec: str | Path) -> str | Path:
    """Path of a data file: one here, or hf://datasets/OWNER/NAME/PATH/IN/IT, fetched from the hub."""
    if match := re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", str(spec)):
        return locate(match[1], match[2], repo_type="dataset")
    path = Path(spec).expanduser()
    if not path.is_file():
        raise InputError(f"{spec}: no such file")
    return path


def _download(repo, name, optional, repo_type):
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(logging.ERROR)  # its retries would print a line each
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    try:
        return Path(hf_hub_download(repo, name, repo_type=repo_type))
    except errors.GatedRepoError:
        raise InputError(f"{repo} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{repo}: no such folder here, and no such repository on the hub (a private one needs `hf auth login`)") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{repo}/{name}: no such folder here, not in the cache, and the hub can't be reached: check the network, "
                         "or give a local folder") from None
    except errors.EntryNotFoundError:
        if optional:
            return None
        raise InputError(f"{repo} on the hub holds no file {name}") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, ConnectionError) as error:
        raise InputError(f"{repo}/{name} can't be fetched from the hub: {str(error).splitlines()[0]}") from None


def is_file_name(name: object) -> bool:
    """Whether `name`, read out of a file, is a plain name that can't lead out of its folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) is not None and len(name.encode()) < 256


# ---------------------------------------------------------------------------------------------------------------
# Reading

def weight(text: str) -> int:
    """How many values a JSON text holds, by its punctuation. A key counts for four: it takes as long, and as much memory."""
    return sum(map(text.count, ",[{")) + 3 * text.count(":")


def _finite(text):
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _constant(text):
    raise ValueError(f"{text} is no number")


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_constant)


def parse(text: str | bytes, most=VALUES):
    """The JSON value in a text. Raises ValueError or RecursionError, also for what couldn't be written again (NaN, half a
    surrogate pair), and where it weighs more than `most` + 1 in 24 characters."""
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if (found := weight(text)) > most + len(text) // 24:
        raise ValueError(f"{found:,} values in {len(text):,} characters are more than are read at once")
    value = DECODER.decode(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # a surrogate: are all in pairs?
        json.dumps(value, ensure_ascii=False).encode()
    return value


def values_in(value) -> int:
    """How many values a list or object holds, those within others too; 0 for a text or a number."""
    found, left = 0, [value]
    while left:
        value = left.pop()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found += len(parts)
        left += [part for part in parts if part and isinstance(part, (dict, list))]
    return found


def read_json(path: str | Path, kind: type = dict):
    """The JSON value in a file, which must be of type `kind`."""
    if (size := Path(path).stat().st_size) > JSON_LIMIT:
        raise InputError(f"{path}: {size:,} bytes are more than JSON files here have ({JSON_LIMIT:,})")
    try:
        value = parse(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not a {kind.__name__}")
    return value


def read_jsonl(path: str | Path) -> list[dict]:
    """The JSON objects in a file that `write_jsonl` wrote, a line each."""
    rows, room, number = [], ITEMS + Path(path).stat().st_size // 24, 0
    with open(path, "rb") as file:
        while line := file.readline(JSON_LIMIT + 1):
            number += 1
            if len(line) > JSON_LIMIT:
                raise InputError(f"{path}:{number}: a line of more than {JSON_LIMIT:,} bytes")
            try:
                rows.append(parse(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number} is not valid JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise InputError(f"{path}:{number} is no JSON object")
            if (room := room - 4 - values_in(rows[-1])) < 0:
                raise InputError(f"{path}:{number}: more lines and values than are read here: split the file")
    return rows


@contextlib.contextmanager
def _opened(path):
    with open(path, "rb") as file:                              # first by us: what the system refuses is an OSError then
        if (size := int.from_bytes(file.read(8), "little")) > HEADER_LIMIT:
            raise InputError(f"{path} is not a safetensors file of ours: a header of {size:,} bytes")
        try:                                                    # the package takes the last of two that have one name
            pairs = json.loads(file.read(size), object_pairs_hook=list)
            twice = len({name for name, _ in pairs}) < len(pairs)
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{path} is not a safetensors file: its header is no JSON object") from None
        if twice:
            raise InputError(f"{path} is not a safetensors file of ours: two tensors have one name")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}): fetch or write it again") from None


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file's tensors, from its header alone. Raises InputError unless all are floats."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        for name, part in slices.items():
            if part.get_dtype() not in DTYPES:
                raise InputError(f"{path}: tensor {name} has dtype {part.get_dtype()}; weights are {', '.join(DTYPES)}")
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def _blocks(path, wanted, block=64 << 20):
    """Yield (name, place, rows) of tensors of a safetensors file; wanted: {name: (shape, first row)}. Of each, as many rows as
    its shape has come in pieces of at most `block` bytes, `place` a piece's slice of it; one of no dimension whole. After so
    many bytes the file is mapped anew: only what was read since is resident."""
    with contextlib.ExitStack() as mapped:
        room, file = block, mapped.enter_context(_opened(path))
        for name, (shape, first) in wanted.items():
            count, width = (shape[0], 4 * math.prod(shape[1:])) if shape else (1, 4)
            rows = max(1, block // max(1, width))
            for start in range(0, max(1, count), rows):
                stop = min(start + rows, count)
                if (size := (stop - start) * width) > room:
                    mapped.close()
                    room, file = block, mapped.enter_context(_opened(path))
                room -= size
                if shape:
                    yield name, slice(start, stop), file.get_slice(name)[first + start:first + stop]
                else:
                    yield name, ..., file.get_tensor(name)


def read_into(path: str | Path, places: dict[str, tuple[torch.Tensor, int]], block=64 << 20) -> Iterator[int]:
    """Copy tensors of a safetensors file into {name: (tensor, first row)}: as many rows as each has (any float dtype, any
    device), by pieces of at most `block` bytes. Yields how many values a piece had; whoever doesn't iterate copies nothing."""
    for name, place, rows in _blocks(path, {name: (out.shape, first) for name, (out, first) in places.items()}, block):
        places[name][0][place].copy_(rows)
        yield rows.numel()


def verify(path: str | Path) -> None:
    """Raise InputError where a safetensors file carries our checksum and isn't what was written: for weights, which
    `read_into` takes in piece by piece. What others wrote has no checksum, and isn't read."""
    with _opened(path) as file:
        if "sha256" in (metadata := file.metadata() or {}):     # the tensors are mapped: a piece at a time is read
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            pieces = _blocks(path, {name: (tensor.shape, 0) for name, tensor in tensors.items()})
            _compare(path, tensors, metadata, ((name, rows) for name, _, rows in pieces))


def read_tensors(path: str | Path, device="cpu") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, {name: tensor}. For files that fit in memory: adapters, checkpoints.

    Raises InputError where the file is cut short, or where it carries our checksum and isn't what was written."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        _compare(path, tensors, file.metadata() or {})
        return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def _compare(path, tensors, metadata, pieces=None):
    if "sha256" in metadata and metadata["sha256"] != checksum(tensors, metadata, pieces):
        raise InputError(f"{path} is damaged: its checksum isn't that of what was written; take the file away, or write it again")


def hash_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(tensors, metadata, pieces=None):
    """SHA-256 over all names, dtypes, shapes and bytes of tensors on the CPU, and over the other metadata. `pieces`: (name,
    rows) of all tensors, names in order, where they aren't to be in memory at once."""
    total = hashlib.sha256(json.dumps({key: text for key, text in metadata.items() if key != "sha256"}, sort_keys=True).encode())
    for name, parts in itertools.groupby(pieces or sorted(tensors.items()), key=lambda piece: piece[0]):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        for _, part in parts:
            total.update(raw(part.contiguous()))
    return total.hexdigest()


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings {name: text} in a safetensors file's header."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


# ---------------------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed onto it when the block ends well, removed when it doesn't. With it go those
    of the same name that processes of this machine left when they were killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)           # is it alive?
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):    # no file of ours, or another user's process
            pass
    try:
        yield part
        part.chmod(0o666 & ~UMASK)  # safetensors gives what it writes to its owner alone
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:                                    # a full disk names no file
        name = str(error.filename or part)
        raise OSError(error.errno, error.strerror or str(error), str(path) if name == str(part) else name) from None
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Remove what processes that were killed left half written in a folder. For who holds its lock."""
    for part in Path(folder).rglob(".*.part"):
        part.unlink(missing_ok=True)


def is_new(folder: str | Path) -> bool:
    """Whether a folder isn't there, or holds nothing but what a killed process left half written."""
    folder = Path(folder)
    return not folder.exists() or folder.is_dir() and all(re.fullmatch(r"\..+\.part", path.name) for path in folder.iterdir())


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write {name: tensor} as safetensors; metadata {"format": "pt"} is what transformers and peft look for.

    By hand, and not by the package: same tensors, same bytes (it shuffles the metadata), and a full disk is an OSError."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | (metadata or {})
    header, end = {"__metadata__": metadata | {"sha256": checksum(tensors, metadata)}}, 0
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))     # so each is aligned to its items
    for name, tensor in tensors.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(raw(tensor))


def raw(tensor):
    """The bytes of a contiguous tensor on the CPU, as numpy has them, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def table(rows: Iterable, head: Iterable[str] = (), right: Container[int] = ()) -> str:
    """Aligned plain text of `rows`, lists of cells; columns whose index is in `right` end flush. None is shown as –."""
    cells = [["–" if cell is None else printable(str(cell)) for cell in row] for row in ([list(head)] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    if head:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
