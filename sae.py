"""Sparse autoencoders (SAEs) of the residual stream: JumpReLU in Gemma Scope's layout, and SASA.

    sae = load_sae("google/gemma-scope-2b-pt-res", layer=20)  # or a folder; width 16k, canonical L0
    codes = sae.encode(x)                                     # (..., D) -> (..., F)
    x_hat = sae.decode(codes)                                 # (..., F) -> (..., D)
    strengths = sae.activations(codes)                        # (..., F) -> (..., K)

A unit is what the method chooses and names: a feature (JumpReLU), a block of r features (SASA).
Files: layer_N/width_W/average_l0_X/params.npz for a JumpReLU; a SASA has sasa.safetensors and
sasa.json in the same folder, and `load_sae` tells from the files which kind it is.

The SAE of layer N reads the residual stream *after* block N, `model.hidden(tokens, capture=(N,))`.
The input is not normalised, and b_dec is not subtracted from it. Gemma Scope left BOS out of its
training data, so codes at BOS mean nothing: leave BOS and padding out of every mean.

Letters: D width of the residual stream, F features, r features of a block (JumpReLU: 1),
K = F/r units.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from run.files import (
    InputError, atomic, locate, read_json, read_tensors, refuse_pointer, write_json, write_tensors)

# A layer has several SAEs. The canonical one has a mean L0 near 100; papers and Neuronpedia use it.
# Source: SAELens, pretrained_saes.yaml. {(repository, width): {layer: average L0}}
CANONICAL_L0 = {
    ("google/gemma-scope-2b-pt-res", "16k"): dict(enumerate([
        105, 102, 141, 59, 124, 68, 70, 69, 71, 73, 77, 80, 82, 84, 84, 78, 78, 77, 74, 73, 71, 70,
        72, 75, 73, 116])),
    ("google/gemma-scope-9b-pt-res", "16k"): dict(enumerate([
        129, 69, 67, 90, 91, 77, 93, 92, 99, 100, 113, 118, 130, 132, 67, 131, 75, 73, 71, 132, 68,
        129, 123, 120, 114, 114, 116, 118, 119, 119, 120, 114, 111, 114, 114, 120, 120, 124, 128,
        131, 125, 113])),
    ("google/gemma-scope-9b-it-res", "16k"): {9: 88, 20: 91, 31: 76},
    ("google/gemma-scope-9b-it-res", "131k"): {9: 121, 20: 81, 31: 109},
    ("google/gemma-scope-27b-pt-res", "131k"): {10: 106, 22: 82, 34: 72},
}
WIDTHS = {f"{2**n // 1000}k": 2**n for n in range(12, 20)} | {"1m": 2**20}  # 4k, 8k, 16k, ...
PLACE = re.compile(r"layer_(\d+)/width_(\w+)/average_l0_(\d+)$")
SHAPES = {
    "W_enc": "DF",
    "b_enc": "F",
    "threshold": "F",
    "W_dec": "FD",
    "b_dec": "D",
}


class SAE:
    """What both kinds share: h = x·W_enc + b_enc, of which codes f stay, and x̂ = f·W_dec + b_dec.

    W_enc (D, F), b_enc (F), W_dec (F, D), b_dec (D): float32, frozen, row-vector convention. W_dec
    may be the path of an .npz file. Then it is read when it is first needed.
    """

    kind = ""
    block = 1

    def __init__(self, W_enc, b_enc, W_dec, b_dec, source="", layer=None, width=None, l0=None):
        self.W_enc = W_enc
        self.b_enc = b_enc
        self._W_dec = W_dec
        self.b_dec = b_dec
        self.d_model, self.n_features = W_enc.shape

        # Where it comes from
        self.source = str(source)
        self.layer = layer
        self.width = width
        self.l0 = l0

    @property
    def n_units(self):
        return self.n_features // self.block

    @property
    def noun(self):
        """What its units are called."""
        return "features" if self.block == 1 else "blocks"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes f (..., F) float32 of residuals x (..., D), any float dtype."""
        raise NotImplementedError

    def activations(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) of codes (..., F): how active each unit is. For a JumpReLU this is the code
        itself."""
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Reconstruction x̂ (..., D) float32 of codes (..., F)."""
        return F.linear(codes.to(self.W_dec.dtype), self.W_dec.T, self.b_dec)

    def strength(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) how active each unit is at residuals x (..., D)."""
        return self.activations(self.encode(x))

    def stored_decoder(self) -> torch.Tensor:
        """W_dec where it lies: read onto the CPU, moved to the device when `W_dec` is used."""
        if isinstance(self._W_dec, Path):
            W_dec = read_array(self._W_dec, "W_dec")
            check_tensors(self._W_dec, {"W_dec": W_dec}, self.d_model, self.n_features)
            self._W_dec = W_dec
        return self._W_dec

    @property
    def W_dec(self) -> torch.Tensor:
        self._W_dec = self.stored_decoder().to(self.W_enc.device)
        return self._W_dec

    def decoder_rows(self, indices) -> torch.Tensor:
        """Decoder directions (k, D) float32 of the features `indices` (k integers)."""
        # A few rows are read where the decoder lies, so that it needs no room on the device
        decoder = self.stored_decoder()
        indices = torch.as_tensor(indices, dtype=torch.int64, device=decoder.device).reshape(-1)
        return decoder[indices].to(self.W_enc.device)

    def unit_rows(self, units) -> torch.Tensor:
        """Decoder rows (k, r, D) of the units (k integers)."""
        units = torch.as_tensor(units, dtype=torch.int64, device="cpu").reshape(-1, 1)
        rows = self.decoder_rows(units * self.block + torch.arange(self.block))  # (k·r, D)
        return rows.unflatten(0, (-1, self.block))

    def directions(self, units) -> torch.Tensor:
        """One direction (k, D) for each unit: its decoder row; of a block, the leading right
        singular vector of its rows."""
        rows = self.unit_rows(units)
        # The SVD of one row is that row, up to its sign and length
        if self.block == 1:
            return rows[:, 0]
        return torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]

    def __str__(self):
        name = Path(self.source).name
        return (f"{name} layer {self.layer}, width {self.width}, L0 {self.l0}: residual stream "
                f"after block {self.layer} (d_model {self.d_model}, {self.kind}), BOS left out")


class JumpReLU(SAE):
    """f = h · 1[h > θ], threshold θ (F) (Rajamanoharan et al., arXiv 2407.14435)."""

    def __init__(self, W_enc, b_enc, threshold, W_dec, b_dec, **place):
        super().__init__(W_enc, b_enc, W_dec, b_dec, **place)
        self.threshold = threshold
        self.kind = f"{self.n_features} features"

    def encode(self, x):
        """Codes f (..., F) float32 of x (..., D). Gradients pass where features fire."""
        h = F.linear(x.to(self.W_enc.dtype), self.W_enc.T, self.b_enc)  # (..., F)
        # In place, since h is the largest tensor here. h <= θ is false for NaN, so NaN stays NaN
        return h.masked_fill_(h <= self.threshold, 0)


class SASA(SAE):
    """Features that are subspaces (arXiv 2606.06333).

    h consists of K blocks p_k of r signed numbers. A token keeps the `active` blocks of largest
    ‖p_k‖₂. x̂ = Σ_k p_k·D_k + b_dec, where D_k (r, D) are the rows k·r to k·r + r − 1 of W_dec. The
    paper subtracts b_dec from x first; here that is folded into b_enc.
    """

    def __init__(self, W_enc, b_enc, W_dec, b_dec, block, active, **place):
        super().__init__(W_enc, b_enc, W_dec, b_dec, **place)
        self.block = block
        self.active = active
        self.kind = f"{self.n_units} blocks of {block}, {active} a token"

    def encode(self, x):
        """Codes (..., F) float32 of x (..., D): signed, 0 outside the blocks that stay."""
        h = F.linear(x.to(self.W_enc.dtype), self.W_enc.T, self.b_enc)
        # The choice of blocks has no gradient
        blocks = h.unflatten(-1, (-1, self.block))                              # (..., K, b)
        mask = strongest(blocks.detach(), self.active)                          # (..., K)
        return blocks.mul_(mask[..., None]).flatten(-2)

    def activations(self, codes):
        """(..., K) of codes (..., F): the norm of each block."""
        return codes.unflatten(-1, (-1, self.block)).norm(dim=-1)


def strongest(p: torch.Tensor, active: int) -> torch.Tensor:
    """Mask (..., K) float: 1 for the `active` blocks of largest norm of p (..., K, r), else 0."""
    power = p.square().sum(-1)
    return torch.zeros_like(power).scatter_(-1, power.topk(active, sorted=False).indices, 1)


# --------------------------------------------------------------------------------------------------
# Reading


def load_sae(source: str | Path, layer: int, width: str | int | None = None,
             l0: int | None = None, device="cpu") -> SAE:
    """The SAE of `layer` from a folder or a hub repository in Gemma Scope's layout.

    width: "16k", "65k", "131k", ... or a plain number of features ("512"). l0: the X of
    average_l0_X. None takes the only ones in a folder; of a repository 16k and the canonical L0.
    Raises InputError where the file is missing (and lists what is there), is damaged, or holds
    another width than its name says.
    """
    path, width, l0 = find_sae(source, layer, width, l0)
    where = {"source": source, "layer": layer, "width": width, "l0": l0}
    is_sasa = path.name != "params.npz"
    if is_sasa:
        tensors = {name: tensor.float() for name, tensor in read_tensors(path).items()}
        if tensors.keys() != SHAPES.keys() - {"threshold"}:
            raise InputError(f"{path} holds {', '.join(tensors)}: not a SASA's tensors")
    else:
        tensors = {name: read_array(path, name) for name in SHAPES if name != "W_dec"}
    # A folder's name may be another than Gemma Scope's: width_24k
    num_features = named_width(width) or tensors["b_enc"].numel()
    if is_sasa:
        where |= read_sizes(path.with_name("sasa.json"), num_features)
    # D is what b_dec says. A JumpReLU's W_dec is checked when it is read
    check_tensors(path, tensors, tensors["b_dec"].numel(), num_features)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    if is_sasa:
        return SASA(**tensors, **where)
    # The decoder is half of the file, and encoding doesn't need it
    return JumpReLU(**tensors, W_dec=path, **where)


def find_sae(source, layer, width=None, l0=None) -> tuple[Path, str, int]:
    """(params.npz or sasa.safetensors, width, average L0) of the SAE that `load_sae` reads."""
    folder = Path(source).expanduser()
    if folder.exists():
        place, width, l0 = place_in_folder(folder, layer, width, l0)
        # A folder with a sasa.json holds a SASA, every other one a JumpReLU
        is_sasa = (place / "sasa.json").is_file()
        return locate(place, "sasa.safetensors" if is_sasa else "params.npz"), width, l0
    width = str(width or "16k")
    l0 = canonical_l0(str(source), layer, width) if l0 is None else l0
    if not named_width(width):
        raise InputError(f"width {width}: known are {', '.join(WIDTHS)}, or a number of features")
    name = f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"
    return locate(source, name), width, l0


def named_width(width: str) -> int:
    """The number of features that a width names; 0 where it isn't known."""
    return WIDTHS.get(width) or int(width if width.isdecimal() else 0)


def read_sizes(path, num_features):
    """{"block", "active"} of a sasa.json, which must fit the width."""
    about = read_json(path)
    block = about.get("block")
    active = about.get("active")
    whole = type(block) is type(active) is int
    if not whole or not 0 < block * active <= num_features or num_features % block:
        raise InputError(f"{path}: block {block} and active {active} don't fit the SAE's width")
    return {"block": block, "active": active}


def load_saes(source, layers, width, l0, device, config) -> dict[int, SAE]:
    """{layer: SAE} of the layers, or of all in a folder where `layers` is None.

    Raises InputError where one doesn't fit the model's Config.
    """
    saes = {layer: load_sae(source, layer, width, l0, device)
            for layer in layers or layers_in(source)}
    for layer, sae in saes.items():
        if layer >= config.num_hidden_layers or sae.d_model != config.hidden_size:
            raise InputError(
                f"{source}: an SAE of layer {layer}, d_model {sae.d_model}, but the model has "
                f"{config.num_hidden_layers} layers, hidden_size {config.hidden_size}: take SAEs "
                "that were trained on this model")
    return saes


def read_array(path, name):
    """Array `name` of an .npz file as a float32 tensor on the CPU. Nothing is unpickled."""
    refuse_pointer(path)
    try:
        with np.load(path) as arrays:
            values = arrays[name]
    except Exception as error:  # a damaged file raises any of a dozen kinds
        raise InputError(f"{path}: {name} can't be read ({error}): fetch it again") from None
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def check_tensors(path, tensors, d_model, num_features):
    """Raise InputError unless the tensors have the shapes of D and F, and finite values."""
    sizes = {"D": d_model, "F": num_features}
    for name, tensor in tensors.items():
        shape = tuple(sizes[letter] for letter in SHAPES[name])
        if tuple(tensor.shape) != shape or not tensor.numel():
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, not {shape}")
        if not tensor.sum().isfinite():
            raise InputError(f"{path}: {name} has values that aren't finite")


def canonical_l0(repository, layer, width):
    """The average L0 of the canonical SAE. Raises InputError where none is known."""
    table = CANONICAL_L0.get((repository, width), {})
    if layer not in table:
        layers = ", ".join(map(str, table)) or "none"
        raise InputError(f"{repository}: no folder here, and no canonical SAE of layer {layer}, "
                         f"width {width} (layers known: {layers}): give --more l0=N")
    return table[layer]


def saes_in(folder) -> dict[tuple[int, str, int], Path]:
    """{(layer, width, average L0): its folder} of all SAEs in a folder, sorted.

    The folder may also be that of a layer, of a width, or of one SAE, or an SAE's file. Raises
    InputError without any.
    """
    top = Path(folder).expanduser().absolute()
    top = top.parent if top.is_file() else top
    steps = ["layer_*", "width_*", "average_l0_*"]
    places = {}
    for path in (top, *(path for i in range(3) for path in top.glob("/".join(steps[i:])))):
        if match := PLACE.search(path.as_posix()):
            places[int(match[1]), match[2], int(match[3])] = path
    if not places and [*top.glob("cfg.json"), *top.glob("*/cfg.json")]:
        raise InputError(f"{folder} is in SAELens' layout (cfg.json), which isn't read: convert it "
                         "by sae.save_sae to layer_N/width_W/average_l0_X/params.npz")
    if not places:
        raise InputError(f"{folder}: give --layers of a repository, or a folder that holds "
                         "layer_N/width_W/average_l0_X/params.npz")
    return dict(sorted(places.items()))


def layers_in(folder) -> list[int]:
    """The layers that a folder has SAEs of."""
    return sorted({layer for layer, _, _ in saes_in(folder)})


def place_in_folder(folder, layer, width, l0):
    """(folder, width, average L0) of the SAE to take. Raises InputError that lists all if it isn't
    one."""
    places = saes_in(folder)
    matches = [place for place in places if place[0] == layer
               and (width is None or place[1] == str(width))
               and (l0 is None or place[2] == l0)]
    if len(matches) != 1:
        listing = ", ".join("layer_{}/width_{}/average_l0_{}".format(*place) for place in places)
        problem = "several SAEs" if matches else "no SAE"
        raise InputError(f"{folder} holds {problem} of layer {layer}, width {width or 'any'}, "
                         f"L0 {l0 or 'any'}; there are {listing}")
    return places[matches[0]], *matches[0][1:]


def neuronpedia_url(source: str, layer: int, width: str, index: int, l0=None) -> str | None:
    """Address of the page of feature `index`. None for SAEs that aren't canonical, and folders."""
    canonical = CANONICAL_L0.get((source, width), {}).get(layer)
    if canonical is None or l0 not in (None, canonical):
        return None
    # google/gemma-scope-2b-pt-res reads gemma-2-2b
    model = source.removesuffix("-res").removesuffix("-pt")
    model = model.replace("google/gemma-scope", "gemma-2")
    return f"https://www.neuronpedia.org/{model}/{layer}-gemmascope-res-{width}/{index}"


# --------------------------------------------------------------------------------------------------
# Writing


def save_sae(folder, layer: int, l0: float, W_enc, b_enc, threshold, W_dec, b_dec) -> Path:
    """Write folder/layer_N/width_W/average_l0_X/params.npz (float32). Returns its path.

    X is l0, rounded. W is the published name of a power of two (16384: 16k), else the number.
    """
    tensors = [W_enc, b_enc, threshold, W_dec, b_dec]
    arrays = [tensor.detach().float().cpu().contiguous().numpy() for tensor in tensors]
    path = sae_folder(folder, layer, W_enc.shape[1], l0) / "params.npz"
    # np.savez appends .npz to a name that lacks it, but not to an open file
    with atomic(path) as part, open(part, "wb") as file:
        np.savez(file, **dict(zip(SHAPES, arrays)))
    return path


def save_sasa(folder, layer: int, W_enc, b_enc, W_dec, b_dec, block, active, **about) -> Path:
    """Write a SASA as sasa.safetensors and sasa.json (block, active, what `about` says).

    The folder is that of `save_sae` with X = active · block. Returns the path of the JSON file.
    """
    place = sae_folder(folder, layer, W_enc.shape[1], active * block)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    write_tensors(place / "sasa.safetensors", tensors)
    sizes = {"architecture": "sasa", "block": block, "active": active}
    write_json(place / "sasa.json", sizes | about)
    return place / "sasa.json"


def sae_folder(folder, layer, num_features, l0):
    """folder/layer_N/width_W/average_l0_X."""
    names = {number: name for name, number in WIDTHS.items()}
    width = names.get(num_features, num_features)
    return Path(folder) / f"layer_{layer}" / f"width_{width}" / f"average_l0_{round(l0)}"
