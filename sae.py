"""Sparse autoencoders: JumpReLU in Gemma Scope's layout, layer_N/width_W/average_l0_X/params.npz, and SASA, whose features
are subspaces, as sasa.safetensors and sasa.json in the same folders. `load_sae` tells from the files which it has.

    sae = load_sae("google/gemma-scope-2b-pt-res", layer=20)   # or a folder; width 16k, canonical L0 unless told
    codes = sae.encode(x); x_hat = sae.decode(codes)           # (..., D) -> (..., F) -> (..., D)
    sae.activations(codes)                                     # (..., F) -> (..., K) how strongly each unit is active

A unit is what is chosen and named: a feature of JumpReLU, a block of r features of SASA.

Where an SAE of layer N reads: the residual stream *after* block N, `model.hidden(tokens, capture=(N,))`, as it is: no
normalisation, b_dec isn't subtracted. Gemma Scope left BOS out of the training data, so codes at BOS mean nothing:
leave it out of every mean, and padding too.

Letters: D width of the residual stream, F number of features, r features of a block (JumpReLU: 1), K = F/r units.
"""

import contextlib
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from run.files import InputError, atomic, locate, read_json, read_tensors, write_json, write_tensors

# Of the SAEs of a layer, the one with mean L0 near 100 that papers use and Neuronpedia shows: SAELens's "canonical"
# list (pretrained_saes.yaml), with its later corrections. {(repository, width): {layer: average L0}}
CANONICAL_L0 = {
    ("google/gemma-scope-2b-pt-res", "16k"): dict(enumerate([
        105, 102, 141, 59, 124, 68, 70, 69, 71, 73, 77, 80, 82, 84, 84, 78, 78, 77, 74, 73, 71, 70, 72, 75, 73,
        116])),
    ("google/gemma-scope-9b-pt-res", "16k"): dict(enumerate([
        129, 69, 67, 90, 91, 77, 93, 92, 99, 100, 113, 118, 130, 132, 67, 131, 75, 73, 71, 132, 68, 129, 123, 120,
        114, 114, 116, 118, 119, 119, 120, 114, 111, 114, 114, 120, 120, 124, 128, 131, 125, 113])),
    ("google/gemma-scope-9b-it-res", "16k"): {9: 88, 20: 91, 31: 76},
    ("google/gemma-scope-9b-it-res", "131k"): {9: 121, 20: 81, 31: 109},
    ("google/gemma-scope-27b-pt-res", "131k"): {10: 106, 22: 82, 34: 72},
}
WIDTHS = {f"{2**n // 1000}k": 2**n for n in range(12, 20)} | {"1m": 2**20}  # 4k, 8k, 16k, 32k, 65k, 131k, 262k, …
ARRAYS = {"W_enc": "DF", "b_enc": "F", "threshold": "F", "W_dec": "FD", "b_dec": "D"}  # name: shape


class SAE:
    """What all SAEs share: h = x·W_enc + b_enc, of which some stay as codes f, and x̂ = f·W_dec + b_dec.

    W_enc (D, F), b_enc (F), W_dec (F, D), b_dec (D): float32, frozen, row-vector convention. W_dec may be an `Array`
    that still lies in its file: `decoder_rows` reads single rows of it, `decode` all of it, once.
    """
    kind, block = "", 1

    def __init__(self, W_enc, b_enc, W_dec, b_dec, source, layer, width, l0):
        self.W_enc, self.b_enc, self.b_dec = W_enc, b_enc, b_dec
        self._W_dec = W_dec
        self.source, self.layer, self.width, self.l0 = str(source), layer, width, l0
        self.d_model, self.n_features = W_enc.shape

    @property
    def n_units(self) -> int:
        return self.n_features // self.block

    @property
    def noun(self) -> str:
        """What its units are called."""
        return "features" if self.block == 1 else "blocks"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes f (..., F) float32 of residuals x (..., D), any float dtype."""
        raise NotImplementedError

    def activations(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) of codes (..., F): how active each unit is."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Reconstruction x̂ (..., D) float32 of codes (..., F)."""
        return F.linear(codes.to(self.W_dec.dtype), self.W_dec.T, self.b_dec)

    def strength(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) how active each unit is at residuals x (..., D)."""
        return self.activations(self.encode(x))

    @property
    def W_dec(self) -> torch.Tensor:
        if isinstance(self._W_dec, Array):
            self._W_dec = self._W_dec.read().to(self.W_enc.device)
        return self._W_dec

    def decoder_rows(self, indices) -> torch.Tensor:
        """Rows of W_dec (k, D), float32: the directions that the features `indices` (k integers) write."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu").reshape(-1)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.n_features:
            raise IndexError(f"features {indices.tolist()[:9]}: the SAE has {self.n_features}")
        if isinstance(self._W_dec, Array):
            return self._W_dec.rows(indices.numpy()).to(self.W_enc.device)
        return self._W_dec[indices.to(self._W_dec.device)]

    def unit_rows(self, units) -> torch.Tensor:
        """Decoder rows (k, r, D) of the units (k integers)."""
        units = torch.as_tensor(units, dtype=torch.int64, device="cpu").reshape(-1, 1)
        return self.decoder_rows(units * self.block + torch.arange(self.block)).unflatten(0, (-1, self.block))

    def directions(self, units) -> torch.Tensor:
        """(k, D) one direction for each of the units: its decoder row; of a block, the leading singular one of its rows."""
        rows = self.unit_rows(units)
        return rows[:, 0] if self.block == 1 else torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]

    def check(self, d_model: int, num_layers: int) -> None:
        """Raise InputError where this SAE can't belong to a model of `num_layers` blocks and width `d_model`."""
        if self.d_model != d_model:
            raise InputError(f"{self.source} layer {self.layer}: an SAE of d_model {self.d_model}, but the model has "
                             f"hidden_size {d_model}: take SAEs that were trained on this model")
        if not 0 <= self.layer < num_layers:
            raise InputError(f"{self.source}: no layer {self.layer} in the model; its layers are 0 to {num_layers - 1}")

    def __str__(self):
        return (f"{Path(self.source).name} layer {self.layer}, width {self.width}, L0 {self.l0}: residual stream after "
                f"block {self.layer} (d_model {self.d_model}, {self.kind}), BOS left out")


class JumpReLU(SAE):
    """f = h · 1[h > θ], threshold θ (F) (Rajamanoharan et al., arXiv 2407.14435)."""

    def __init__(self, W_enc, b_enc, threshold, W_dec, b_dec, source="", layer=None, width=None, l0=None):
        super().__init__(W_enc, b_enc, W_dec, b_dec, source, layer, width, l0)
        self.threshold, self.kind = threshold, f"{self.n_features} features"

    def encode(self, x):
        """Codes f (..., F) float32 of residuals x (..., D), any float dtype; gradients pass where features fire."""
        h = F.linear(x.to(self.W_enc.dtype), self.W_enc.T, self.b_enc)  # (..., F)
        return h.masked_fill_(h <= self.threshold, 0)  # in place: h is the largest tensor here; NaN stays NaN

    def activations(self, codes):
        """(..., F) of codes: themselves."""
        return codes


class SASA(SAE):
    """Features that are subspaces (arXiv 2606.06333): h in K blocks p_k of r signed numbers, of which a token keeps the
    `active` ones of largest ‖p_k‖₂; x̂ = Σ_k p_k·D_k + b_dec, D_k (r, D) the rows k·r to k·r + r − 1 of W_dec. The
    paper subtracts b_dec from x first; here that is folded into b_enc.
    """

    def __init__(self, W_enc, b_enc, W_dec, b_dec, block, active, source="", layer=None, width=None, l0=None):
        super().__init__(W_enc, b_enc, W_dec, b_dec, source, layer, width, l0)
        self.block, self.active, self.kind = block, active, f"{self.n_features // block} blocks of {block}, {active} a token"

    def encode(self, x):
        """Codes (..., F) float32 of residuals x (..., D): signed, 0 outside the blocks that stay."""
        h = F.linear(x.to(self.W_enc.dtype), self.W_enc.T, self.b_enc)
        kept = strongest(h.detach().unflatten(-1, (-1, self.block)), self.active)
        return h.unflatten(-1, (-1, self.block)).mul_(kept[..., None]).flatten(-2)

    def activations(self, codes):
        """(..., K) of codes (..., F): the norm of each block."""
        return codes.unflatten(-1, (-1, self.block)).norm(dim=-1)


def strongest(p: torch.Tensor, active: int) -> torch.Tensor:
    """(..., K) float: 1 for the `active` blocks of largest norm of p (..., K, r), else 0."""
    power = p.square().sum(-1)
    return torch.zeros_like(power).scatter_(-1, power.topk(active, sorted=False).indices, 1)


def load_sae(source: str | Path, layer: int, width: str | int = "16k", l0: int | None = None, device="cpu") -> SAE:
    """The SAE of `layer` from a folder or a hub repository in Gemma Scope's layout: a JumpReLU, its decoder left in the
    file, or a SASA where the folder holds a sasa.json.

    width: "16k", "65k", "131k", … or a plain number of features ("512"). l0: the X of average_l0_X; None takes the
    canonical one of a known repository, or the only one in a folder. Raises InputError where the file isn't there (it
    lists what is), isn't a whole .npz of the five float arrays (a whole SASA), or holds another width than its name says.
    """
    width = str(width)
    features = WIDTHS.get(width) or (int(width) if re.fullmatch(r"[1-9]\d{0,8}", width) else None)
    if features is None:
        raise InputError(f"--width {width}: known are {', '.join(WIDTHS)}, or a plain number of features")
    if Path(source).name.endswith(("-att", "-mlp", "-transcoders")):
        raise InputError(f"{source}: not SAEs of the residual stream; take the repository that ends in -res")
    folder = Path(source).expanduser()
    l0 = _in_folder(folder, layer, width, l0) if folder.is_dir() else _on_hub(str(source), layer, width, l0)
    place = f"layer_{layer}/width_{width}/average_l0_{l0}"
    if (folder / place / "sasa.json").is_file():
        return _load_sasa(folder / place, features, device, source=source, layer=layer, width=width, l0=l0)
    path = locate(source, f"{place}/params.npz")
    arrays = read_params(path)
    if arrays["W_enc"].shape[1] != features:
        raise InputError(f"{path}: width_{width} means {features} features, the file holds {arrays['W_enc'].shape[1]}")
    tensors = {name: array.read().to(device) for name, array in arrays.items() if name != "W_dec"}
    if tensors["threshold"].min() < 0:
        raise InputError(f"{path}: threshold has values below 0; a JumpReLU's are 0 or more")
    return JumpReLU(**tensors, W_dec=arrays["W_dec"], source=source, layer=layer, width=width, l0=l0)


def save_sae(folder: str | Path, layer: int, l0: float, W_enc, b_enc, threshold, W_dec, b_dec) -> Path:
    """Write the five tensors as folder/layer_N/width_W/average_l0_X/params.npz (float32) and return that path.

    l0 is rounded to a whole number; W is the published name of a power of two (16384: 16k), else the plain number.
    """
    given = dict(W_enc=W_enc, b_enc=b_enc, threshold=threshold, W_dec=W_dec, b_dec=b_dec)
    path = _place(folder, layer, W_enc.shape[1], l0) / "params.npz"
    _check_shapes(path, {name: tuple(tensor.shape) for name, tensor in given.items()})
    with atomic(path) as part, open(part, "wb") as file:
        np.savez(file, **{name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in given.items()})
    return path


def _place(folder, layer, features, l0):
    width = {features: name for name, features in WIDTHS.items()}.get(features, str(features))
    return Path(folder) / f"layer_{layer}" / f"width_{width}" / f"average_l0_{round(l0)}"


def save_sasa(folder: str | Path, layer: int, W_enc, b_enc, W_dec, b_dec, block: int, active: int,
              about: dict | None = None) -> Path:
    """Write a SASA as sasa.safetensors and sasa.json ({"block", "active"} and what `about` says of its training) into
    folder/layer_N/width_W/average_l0_X, X = active · block coefficients, and return the JSON's path."""
    place = _place(folder, layer, W_enc.shape[1], active * block)
    write_tensors(place / "sasa.safetensors", dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec))
    write_json(place / "sasa.json", {"architecture": "sasa", "block": block, "active": active} | (about or {}))
    return place / "sasa.json"


def _load_sasa(place, features, device, **where):
    path, about = place / "sasa.safetensors", read_json(place / "sasa.json")
    if not path.is_file():
        raise InputError(f"{place} holds sasa.json but no sasa.safetensors: write the SAE again")
    block, active = about.get("block"), about.get("active")
    if type(block) is not int or type(active) is not int or not (1 <= block <= features and features % block == 0
                                                                 and 1 <= active <= features // block):
        raise InputError(f"{place}/sasa.json: block {block!r}, active {active!r}: two whole numbers, block a divisor of the "
                         f"{features} features, active at most their number of blocks")
    tensors = read_tensors(path)
    names = {name: letters for name, letters in ARRAYS.items() if name != "threshold"}
    if tensors.keys() != names.keys():
        raise InputError(f"{path} holds {', '.join(sorted(tensors))[:80]}; a SASA has {', '.join(names)}")
    _check_shapes(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if tensors["W_enc"].shape[1] != features:
        raise InputError(f"{path}: {place.parent.name} means {features} features, the file holds {tensors['W_enc'].shape[1]}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{path}: {name} has values that aren't finite floats")
    return SASA(**{name: tensor.float().to(device) for name, tensor in tensors.items()}, block=block, active=active, **where)


def neuronpedia_url(source: str | Path, layer: int, width: str, index: int, l0: int | None = None) -> str | None:
    """Address of feature `index`'s page, or None where there is none: folders, and all but the canonical SAEs."""
    canonical = CANONICAL_L0.get((str(source), str(width)), {}).get(layer)
    if canonical is None or l0 not in (None, canonical):
        return None
    *_, size, kind, _ = str(source).split("-")                                       # google/gemma-scope-2b-pt-res
    model = f"gemma-2-{size}{'-it' if kind == 'it' else ''}"
    return f"https://www.neuronpedia.org/{model}/{layer}-gemmascope-res-{width}/{index}"


# ---------------------------------------------------------------------------------------------------------------
# Which file

def _on_hub(repo, layer, width, l0):
    if l0 is not None:
        return l0
    table = CANONICAL_L0.get((repo, width))
    if table is None:
        widths = [w for r, w in CANONICAL_L0 if r == repo]
        raise InputError(f"{repo}: no canonical L0 known for width {width}, only for {', '.join(widths)}: say --l0"
                         if widths else f"{repo}: no such folder here, and no canonical L0 known on the hub: say --l0")
    if layer not in table:
        raise InputError(f"{repo} has no canonical SAE of layer {layer}, width {width}: layers are {_listed(table)}")
    return table[layer]


def _in_folder(folder, layer, width, l0):
    """The L0 to take. Walks down the three levels and, where one lacks what was asked for, lists what it has."""
    for prefix, wanted, flag in (("layer_", layer, "--layers"), ("width_", width, "--width"),
                                 ("average_l0_", l0, "--l0")):
        found = _names(folder, prefix)
        if wanted is None and len(found) == 1:
            wanted = found[0]
        if not found:
            raise InputError(f"{folder} holds no {prefix}X: an SAE is layer_N/width_W/average_l0_X/params.npz")
        if str(wanted) not in found:
            problem = "several SAEs" if wanted is None else f"no {prefix}{wanted}"
            raise InputError(f"{folder} holds {problem}: {flag} is one of {_listed(found)}")
        folder = folder / f"{prefix}{wanted}"
    return int(wanted)


def _names(folder, prefix):
    """The X of the folders `prefix`X in `folder`, in order."""
    found = (p.name.removeprefix(prefix) for p in folder.glob(prefix + "*") if p.is_dir())
    found = (name for name in found if re.fullmatch(r"(0|[1-9]\d{0,8})[km]?", name))
    return sorted(found, key=lambda name: WIDTHS.get(name) or int(name.strip("km")))


def _listed(names):
    first, last = list(names)[0], list(names)[-1]
    whole = len(names) > 4 and list(map(str, names)) == [str(n) for n in range(len(names))]
    return f"{first} to {last}" if whole else ", ".join(map(str, names))


# ---------------------------------------------------------------------------------------------------------------
# The .npz format: a zip whose members are .npy files. Read here without numpy's loader: nothing is unpickled or
# evaluated, nothing is allocated that the file doesn't hold, and single rows are read in place.

@dataclass(frozen=True)
class Array:
    """One array of an .npz: what its header says, and where its bytes are."""
    path: Path
    member: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple
    fortran: bool  # column by column: what numpy writes for a transposed array
    start: int  # of the values within the member, bytes

    def read(self) -> torch.Tensor:
        """All values, a float32 tensor."""
        buffer = np.empty(math.prod(self.shape) * self.dtype.itemsize, np.uint8)
        with _archive(self.path) as archive, archive.open(self.member) as stream:
            stream.read(self.start)
            done = 0
            while n := stream.readinto(buffer.data[done:done + (1 << 20)]):
                done += n
            if done < len(buffer) or stream.read(1):  # to the end: that is what checks the sum over the bytes
                raise zipfile.BadZipFile(f"{self.member.filename} ends early or late")
        return self._finite(buffer.view(self.dtype).reshape(self.shape, order="F" if self.fortran else "C"))

    def rows(self, indices: np.ndarray) -> torch.Tensor:
        """The rows `indices` (numpy, k integers) as float32 (k, columns): in place, or streamed where compressed."""
        wanted, order = np.unique(indices, return_inverse=True)
        with _archive(self.path) as archive, archive.open(self.member) as stream:
            if self.member.compress_type == zipfile.ZIP_STORED:
                with open(self.path, "rb") as file:  # after the local header and its name and extra field
                    file.seek(self.member.header_offset + 26)
                    name, extra = np.frombuffer(file.read(4), "<u2").tolist()
                begin = self.member.header_offset + 30 + name + extra + self.start
                rows = np.memmap(self.path, self.dtype, "r", begin, self.shape, "F" if self.fortran else "C")[wanted]
            elif self.fortran:
                rows = self.read()[wanted].numpy()
            else:
                rows = np.empty((len(wanted), self.shape[1]), self.dtype)
                for row, index in zip(rows, wanted.tolist()):
                    stream.seek(self.start + index * rows.strides[0])
                    row[:] = np.frombuffer(stream.read(rows.strides[0]), self.dtype)
        return self._finite(rows)[order]

    def _finite(self, values):
        with np.errstate(over="ignore"):
            tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        # least and largest are NaN if any is, and need no mask of F·D booleans
        if tensor.numel() and not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):
            raise InputError(f"{self.path}: {self.member.filename[:-4]} has values that aren't finite float32 numbers")
        return tensor


@contextlib.contextmanager
def _archive(path):
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except PermissionError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a complete .npz file ({error}): fetch or write it again") from None


UNPACKED = 64 << 20  # bytes that an .npz may always claim


def _directory(path):
    """Bytes of a zip's directory, by the records that can end it: PK56, and for more than 4 GB one 76 bytes before that."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 100))
        end = b"\0" * 76 + file.read()
    sizes = [0]
    for at in (match.start() for match in re.finditer(b"PK\5\6", end)):
        sizes.append(int.from_bytes(end[at + 12:at + 16], "little"))
        if end[at - 20:at - 16] == b"PK\6\7":
            sizes[-1] = int.from_bytes(end[at - 36:at - 28], "little")
    return max(sizes)


def read_params(path: Path) -> dict[str, Array]:
    """{name: Array} of an SAE's params.npz, by its headers alone: five float arrays that agree, else InputError."""
    arrays = {}
    if _directory(path) > 64 << 10:                             # of a million members, which takes zipfile seconds
        raise InputError(f"{path} holds many members; an SAE has {', '.join(ARRAYS)}, each once")
    with _archive(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays or name not in ARRAYS or name == member.filename:
                raise InputError(f"{path} holds {member.filename[:40]!r}; an SAE has {', '.join(ARRAYS)}, each once")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path}: {name} is compressed as numpy never does: write it with numpy.savez")
            with archive.open(member) as stream:
                arrays[name] = _read_header(path, name, member, stream)
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise InputError(f"{path} lacks {', '.join(missing)}; an SAE has {', '.join(ARRAYS)}")
    claimed = sum(array.member.file_size for array in arrays.values())
    held = sum(array.member.compress_size for array in arrays.values())
    if held > Path(path).stat().st_size or claimed > max(UNPACKED, 4 * held):  # weights compress to a half at best
        raise InputError(f"{path} claims {claimed:,} bytes, more than it can hold: fetch or write it again")
    _check_shapes(path, {name: array.shape for name, array in arrays.items()})
    return arrays


HEADER = re.compile(r"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(True|False),"
                    r"\s*'shape':\s*\(([\d, ]*)\),?\s*\}\s*")


def _read_header(path, name, member, stream):
    """The Array that a .npy stream begins with (numpy.lib.format): magic, version, length, a Python dict as text."""
    magic = stream.read(8)
    width = 2 if magic[6:7] == b"\1" else 4
    length = int.from_bytes(stream.read(width), "little")
    header = HEADER.fullmatch(stream.read(min(length, 4096)).decode("latin1"))
    if magic[:6] != b"\x93NUMPY" or header is None:
        raise InputError(f"{path}: {name} is not a plain numpy array: write it with numpy.savez")
    descr, fortran, shape = header.groups()
    if descr not in [order + size for order in "<>" for size in ("f2", "f4", "f8")]:
        raise InputError(f"{path}: {name} has dtype {descr[:40]!r}; only floats are read, nothing is unpickled")
    dtype, shape, start = np.dtype(descr), tuple(map(int, re.findall(r"\d+", shape))), 8 + width + length
    size = member.compress_size if member.compress_type == zipfile.ZIP_STORED else member.file_size
    if not start + math.prod(shape) * dtype.itemsize == member.file_size == size:
        raise InputError(f"{path}: {name} claims {str(shape)[:40]}, which isn't what the file holds: fetch it again")
    return Array(Path(path), member, dtype, shape, fortran == "True", start)


def _check_shapes(path, shapes):
    """Raise InputError unless the shapes agree on one D and one F, none of them 0."""
    sizes = dict(zip("DF", shapes["W_enc"]))
    for name, shape in shapes.items():
        wanted = tuple(sizes.get(letter) for letter in ARRAYS[name])
        if shape != wanted or not all(wanted):
            raise InputError(f"{path}: {name} has shape {shape}, which doesn't agree with W_enc's {shapes['W_enc']}")
