"""Weights of a Gemma-2 checkpoint, as its many writers name and split them.

What transformers loads is loaded, to the same logits: from AutoModel (names without "model."), from
mergekit and FSDP savers (a copy of the embedding as the head, or the head alone), from versions of
transformers that stored the rotary frequencies. What would compute something else is refused.
"""

import math
import shutil
import sys
from pathlib import Path

import torch

from run import parallel
from run.files import (InputError, is_file_name, locate, open_tensors, read_json, refuse_pointer,
                       tensor_shapes)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
BACKBONE = ("embed_tokens.", "layers.", "norm.")    # the names of what the forward pass consists of
# The files beside the weights of a repository on the hub that a model made from it needs too
BESIDE = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    chat_template.jinja generation_config.json added_tokens.json LICENSE""".split()
# Of a folder here all files go along, but for weights, code, and what is said of these weights
NOT_BESIDE = """*.safetensors *.bin *.pt *.pth *.gguf *.npz *.h5 *.msgpack *.index.json config.json
    *.py *.md""".split()
READ_VALUES = 4 << 20  # of a checkpoint at once: 16 MB in float32

Place = tuple[Path, str]  # a tensor's file, and its name there


def weight_files(source: str | Path) -> list[Path]:
    """The files of a checkpoint: model.safetensors, else the shards that its index names.

    An index beside a single file was left there by an earlier save (transformers decides likewise).
    """
    index = None
    if not locate(source, SINGLE, optional=True):
        index = locate(source, INDEX, optional=True)
    names = [SINGLE]
    if index:
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(map(is_file_name, names)):
            raise InputError(f"{index}: weight_map must give a plain file name for each tensor")
    return [locate(source, name) for name in sorted(set(names))]


def find_weights(source: str | Path, shapes: dict[str, tuple], dtype: torch.dtype
                 ) -> dict[str, Place]:
    """{name: Place} of the tensors that `shapes` {name without "model.": shape} asks for.

    Raises InputError where one is missing or misshapen, where the files hold more of a model than
    that, and where their head, as `dtype`, isn't the embedding. Warns of what else they hold.
    """
    places = {}
    found = {}
    for path in weight_files(source):
        for key, shape in tensor_shapes(path).items():
            name = key.removeprefix("model.")
            if "rotary_emb." not in name:           # derived from the configuration
                places[name] = path, key
                found[name] = shape
    _unite_head(source, places, found, dtype)

    extra = sorted(found.keys() - shapes)
    for name in sorted(shapes) + [name for name in extra if name.startswith(BACKBONE)]:
        if found.get(name) != shapes.get(name):
            problem = (f"{source}: {name} has shape {found.get(name)}, not {shapes.get(name)} as "
                       "config.json says (None: no such tensor)")
            if extra:
                problem += f"; it has {places[extra[0]][1]}"
            raise InputError(problem)
    if extra:
        print(f"warning: {source}: left out, as it is no part of Gemma-2: {', '.join(extra)[:200]}",
              file=sys.stderr)
    return {name: places[name] for name in found if name in shapes}


def _unite_head(source, places, found, dtype):
    """Take the head out of the tensors found: it must be the embedding, or stand for it."""
    tied = read_json(locate(source, "config.json")).get("tie_word_embeddings", True)
    if tied and HEAD in found and EMBEDDING not in found:
        places[EMBEDDING], found[EMBEDDING] = places[HEAD], found[HEAD]
    if HEAD not in found and not tied:
        raise InputError(f"{source}: an untied head, says config.json (tie_word_embeddings), but "
                         f"there is no {HEAD}")
    head = places.pop(HEAD, None)
    shape = found.pop(HEAD, None)
    if head and EMBEDDING in found:
        embedding = places[EMBEDDING]
        if found[EMBEDDING] != shape or not _are_equal(head, embedding, dtype):
            raise InputError(f"{source}: an untied head: {HEAD} is not {embedding[1]}, as it is in "
                             "Gemma-2")


def _are_equal(a, b, dtype):
    """Whether the tensors at two places, of one shape, have the same values as `dtype`."""
    if a == b:
        return True
    with open_tensors(a[0]) as file_a, open_tensors(b[0]) as file_b:
        slices = file_a.get_slice(a[1]), file_b.get_slice(b[1])
        rows, *columns = slices[0].get_shape()
        step = _rows_at_once(columns)
        parts = ([part[first:first + step].to(dtype) for part in slices]
                 for first in range(0, rows, step))
        return all(torch.equal(*pair) for pair in parts)


def _rows_at_once(columns):
    return math.ceil(READ_VALUES / max(1, math.prod(columns)))


def read_weight(place: Place, weight):
    """Copy the tensor at a place to `weight`, or to the rows that a shard of FSDP2 holds."""
    path, name = place
    weight, first = parallel.own_rows(weight)
    for rows in weight.split(_rows_at_once(weight.shape[1:])):
        # Opened anew each time: what is read stays in memory until the file is closed
        with open_tensors(path) as file:
            rows.copy_(file.get_slice(name)[first:first + len(rows)])
        first += len(rows)


def copy_beside(source: str | Path, out: Path):
    """Copy a checkpoint's files beside its weights to the folder `out`, made unless there."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(source).expanduser()
    names = BESIDE
    if folder.is_dir():
        names = [path.name for path in folder.iterdir()
                 if path.is_file() and not any(map(path.match, NOT_BESIDE))]
    for name in names:
        if path := locate(source, name, optional=True):
            refuse_pointer(path)
            shutil.copyfile(path, out / name)
