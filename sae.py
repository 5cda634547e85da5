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

from run.files import InputError, atomic, locate, read_json, read_tensors, write_json, write_tensors

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
SHAPES = {"W_enc": "DF", "b_enc": "F", "threshold": "F", "W_dec": "FD", "b_dec": "D"}


class SAE:
    """What both kinds share: h = x·W_enc + b_enc, of which codes f stay, and x̂ = f·W_dec + b_dec.

    W_enc (D, F), b_enc (F), W_dec (F, D), b_dec (D): float32, frozen, row-vector convention. W_dec
    may be the path of an .npz file. Then it is read when it is first needed.
    """

    kind, block = "", 1

    def __init__(self, W_enc, b_enc, W_dec, b_dec, source="", layer=None, width=None, l0=None):
        self.W_enc, self.b_enc, self._W_dec, self.b_dec = W_enc, b_enc, W_dec, b_dec
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
        if self.block == 1:
            return rows[:, 0]
        return torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]

    def __str__(self):
        name = f"{Path(self.source).name} layer {self.layer}, width {self.width}, L0 {self.l0}"
        place = f"residual stream after block {self.layer}"
        return f"{name}: {place} (d_model {self.d_model}, {self.kind}), BOS left out"


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

    def activations(self, codes):
        """(..., F) of codes: themselves."""
        return codes


class SASA(SAE):
    """Features that are subspaces (arXiv 2606.06333).

    h consists of K blocks p_k of r signed numbers. A token keeps the `active` blocks of largest
    ‖p_k‖₂. x̂ = Σ_k p_k·D_k + b_dec, where D_k (r, D) are the rows k·r to k·r + r − 1 of W_dec. The
    paper subtracts b_dec from x first; here that is folded into b_enc.
    """

    def __init__(self, W_enc, b_enc, W_dec, b_dec, block, active, **place):
        super().__init__(W_enc, b_enc, W_dec, b_dec, **place)
        self.block, self.active = block, active
        self.kind = f"{self.n_units} blocks of {block}, {active} a token"

    def encode(self, x):
        """Codes (..., F) float32 of x (..., D): signed, 0 outside the blocks that stay."""
        h = F.linear(x.to(self.W_enc.dtype), self.W_enc.T, self.b_enc)
        mask = strongest(h.detach().unflatten(-1, (-1, self.block)), self.active)  # (..., K)
        return h.unflatten(-1, (-1, self.block)).mul_(mask[..., None]).flatten(-2)

    def activations(self, codes):
        """(..., K) of codes (..., F): the norm of each block."""
        return codes.unflatten(-1, (-1, self.block)).norm(dim=-1)


def strongest(p: torch.Tensor, active: int) -> torch.Tensor:
    """Mask (..., K) float: 1 for the `active` blocks of largest norm of p (..., K, r), else 0."""
    power = p.square().sum(-1)
    return torch.zeros_like(power).scatter_(-1, power.topk(active, sorted=False).indices, 1)


# --------------------------------------------------------------------------------------------------
# Reading


def load_sae(
    source: str | Path, layer: int, width: str | int = "16k", l0: int | None = None, device="cpu"
) -> SAE:
    """The SAE of `layer` from a folder or a hub repository in Gemma Scope's layout.

    width: "16k", "65k", "131k", ... or a plain number of features ("512"). l0: the X of
    average_l0_X; None takes the canonical one of a known repository, or the only one in a folder.
    Raises InputError where the file is missing (and lists what is there), is damaged, or holds
    another width than its name says.
    """
    width = str(width)
    if width not in WIDTHS and not re.fullmatch(r"[1-9]\d{0,8}", width):
        raise InputError(f"width {width}: known are {', '.join(WIDTHS)}, or a number of features")
    if Path(source).name.endswith(("-att", "-mlp", "-transcoders")):
        raise InputError(f"{source}: not SAEs of the residual stream; take the one ending in -res")
    folder = Path(source).expanduser()
    if folder.is_dir():
        l0 = l0_in_folder(folder, layer, width, l0)
    elif l0 is None:
        l0 = canonical_l0(str(source), layer, width)
    place = f"layer_{layer}/width_{width}/average_l0_{l0}"

    # A folder with a sasa.json holds a SASA, every other one a JumpReLU
    is_sasa = (folder / place / "sasa.json").is_file()
    if is_sasa:
        about = read_json(folder / place / "sasa.json")
        path = locate(folder, f"{place}/sasa.safetensors")
        tensors = {name: tensor.float() for name, tensor in read_tensors(path).items()}
        if tensors.keys() != SHAPES.keys() - {"threshold"}:
            raise InputError(f"{path} holds {', '.join(tensors)}: not a SASA's tensors")
    else:
        path = locate(source, f"{place}/params.npz")
        tensors = {name: read_array(path, name) for name in SHAPES if name != "W_dec"}
    num_features = WIDTHS.get(width) or int(width)
    check_tensors(path, tensors, tensors["b_dec"].numel(), num_features)

    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    where = {"source": source, "layer": layer, "width": width, "l0": l0}
    if is_sasa:
        return SASA(**tensors, block=about["block"], active=about["active"], **where)
    return JumpReLU(**tensors, W_dec=Path(path), **where)


def load_saes(source, layers, width, l0, device, config) -> dict[int, SAE]:
    """{layer: SAE} of the layers, for a model of this Config.

    Raises InputError where an SAE doesn't fit the model's number of blocks or hidden_size.
    """
    saes = {}
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise InputError(f"{source}: no layer {layer} in the model; its layers are 0 to {last}")
        sae = load_sae(source, layer, width, l0, device)
        if sae.d_model != config.hidden_size:
            raise InputError(
                f"{source} layer {layer}: an SAE of d_model {sae.d_model}, but the model has "
                f"hidden_size {config.hidden_size}: take SAEs that were trained on this model"
            )
        saes[layer] = sae
    return saes


def read_array(path, name):
    """Array `name` of an .npz file as a float32 tensor on the CPU. Nothing is unpickled."""
    try:
        with np.load(path) as arrays:
            values = arrays[name]
    except KeyError:
        raise InputError(f"{path} lacks {name}; an SAE has {', '.join(SHAPES)}") from None
    except Exception as error:  # a damaged file raises any of a dozen kinds
        raise InputError(f"{path}: {name} can't be read ({error}): fetch it again") from None
    if values.dtype.kind != "f":
        raise InputError(f"{path}: {name} has dtype {values.dtype}; an SAE holds floats")
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def check_tensors(path, tensors, d_model, num_features):
    """Raise InputError unless the tensors have the shapes of D and F, and finite values."""
    sizes = {"D": d_model, "F": num_features}
    for name, tensor in tensors.items():
        shape = tuple(sizes[letter] for letter in SHAPES[name])
        if tuple(tensor.shape) != shape or not tensor.numel():
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, not {shape}")
        # The least and the largest are NaN if any value is. This needs no mask of F·D booleans
        low, high = torch.aminmax(tensor)
        if not (low.isfinite() and high.isfinite()):
            raise InputError(f"{path}: {name} has values that aren't finite float32 numbers")
        if name == "threshold" and low < 0:
            raise InputError(f"{path}: threshold has values below 0; a JumpReLU's are 0 or more")


def canonical_l0(repository, layer, width):
    """The average L0 of the canonical SAE. Raises InputError where none is known."""
    table = CANONICAL_L0.get((repository, width))
    if table is None:
        known = [known_width for name, known_width in CANONICAL_L0 if name == repository]
        if known:
            problem = f"no canonical L0 known for width {width}, only for {', '.join(known)}"
        else:
            problem = "no such folder here, and no canonical L0 known on the hub"
        raise InputError(f"{repository}: {problem}: say the L0")
    if layer not in table:
        layers = ", ".join(map(str, table))
        raise InputError(f"{repository}: no canonical SAE of layer {layer}; layers are {layers}")
    return table[layer]


def l0_in_folder(folder, layer, width, l0):
    """The average L0 to take. Where one of the three levels is missing, lists what there is."""
    for level, wanted in (("layer", layer), ("width", width), ("average_l0", l0)):
        names = [path.name.removeprefix(f"{level}_") for path in folder.glob(f"{level}_*")]
        names = sorted(filter(re.compile(r"\d+[km]?").fullmatch, names), key=lambda n: (len(n), n))
        if not names:
            layout = "layer_N/width_W/average_l0_X/params.npz"
            raise InputError(f"{folder} holds no {level}_X: an SAE is {layout}")
        if wanted is None and len(names) == 1:
            wanted = names[0]
        if str(wanted) not in names:
            problem = f"several {level}_X" if wanted is None else f"no {level}_{wanted}"
            raise InputError(f"{folder} holds {problem}: X is one of {', '.join(names)}")
        folder = folder / f"{level}_{wanted}"
    return int(wanted)


def neuronpedia_url(source, layer: int, width: str, index: int, l0=None) -> str | None:
    """Address of the page of feature `index`. None for SAEs that aren't canonical, and folders."""
    canonical = CANONICAL_L0.get((str(source), str(width)), {}).get(layer)
    if canonical is None or l0 not in (None, canonical):
        return None
    *_, size, kind, _ = str(source).split("-")  # google/gemma-scope-2b-pt-res
    model = f"gemma-2-{size}-it" if kind == "it" else f"gemma-2-{size}"
    return f"https://www.neuronpedia.org/{model}/{layer}-gemmascope-res-{width}/{index}"


# --------------------------------------------------------------------------------------------------
# Writing


def save_sae(folder, layer: int, l0: float, W_enc, b_enc, threshold, W_dec, b_dec) -> Path:
    """Write folder/layer_N/width_W/average_l0_X/params.npz (float32). Returns its path.

    X is l0, rounded. W is the published name of a power of two (16384: 16k), else the number.
    """
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "threshold": threshold}
    tensors |= {"W_dec": W_dec, "b_dec": b_dec}
    arrays = {}
    for name, tensor in tensors.items():
        arrays[name] = tensor.detach().float().cpu().contiguous().numpy()
    path = sae_folder(folder, layer, W_enc.shape[1], l0) / "params.npz"
    with atomic(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)
    return path


def save_sasa(folder, layer: int, W_enc, b_enc, W_dec, b_dec, block, active, about=None) -> Path:
    """Write a SASA as sasa.safetensors and sasa.json (block, active, what the dict `about` says).

    The folder is that of `save_sae` with X = active · block. Returns the path of the JSON file.
    """
    place = sae_folder(folder, layer, W_enc.shape[1], active * block)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    write_tensors(place / "sasa.safetensors", tensors)
    about = {"architecture": "sasa", "block": block, "active": active} | (about or {})
    write_json(place / "sasa.json", about)
    return place / "sasa.json"


def sae_folder(folder, layer, num_features, l0):
    """folder/layer_N/width_W/average_l0_X."""
    names = {number: name for name, number in WIDTHS.items()}
    width = names.get(num_features, num_features)
    return Path(folder) / f"layer_{layer}" / f"width_{width}" / f"average_l0_{round(l0)}"
