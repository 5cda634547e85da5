"""LoRA: low-rank layers beside frozen ones, their inits, merging, and PEFT's files both ways.

    layers = add_lora(model, rank=16, alpha=32, init="sails", bases=bases)    # {module name: LoRALinear}
    save_adapter(model, folder, "google/gemma-2-2b")                          # peft.PeftModel.from_pretrained opens it
    load_adapter(model, folder)                                               # and peft's save_pretrained wrote this

y = W·x + s · B·(A·x), with s = alpha / rank. q, k and v *read* the residual stream, so the rows of A are directions in
it; o *writes* to it, so the columns of B are. A basis U (d, r̂) therefore enters A of readers and B of writers.

Letters: d width of the residual stream, r rank, r̂ number of directions in a basis, in and out a layer's own widths.
"""

import json
import operator
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fused import lora_linear
from model import TARGETS                                      # what we train; adapters of others may have the MLP's too
from run.files import InputError, locate, read_json, read_metadata, read_tensors, tensor_shapes, write_json, write_tensors

LOADED = TARGETS + ("gate_proj", "up_proj", "down_proj")
WRITERS = {"o_proj", "down_proj"}


class LoRALinear(nn.Module):
    """A frozen nn.Linear `base` plus s · B·A: A (r, in) and B (out, r), float32 parameters whatever the base's dtype."""

    def __init__(self, base, A, B, scale, writer=False):
        super().__init__()
        self.base, self.scale, self.writer = base.requires_grad_(False), scale, writer
        self.A, self.B = (nn.Parameter(factor.detach().to(base.weight.device, torch.float32, copy=True).contiguous())
                          for factor in (A, B))
        self._kept = None  # the base's own weight while merged; in a tuple, so that it isn't registered a second time

    @property
    def rank(self):
        return self.A.shape[0]

    @property
    def update(self):
        """ΔW = s · B·A (out, in), float32: what merging adds to the base weight."""
        return self.scale * (self.B @ self.A)

    def forward(self, x):
        if self._kept is not None:
            return self.base(x)
        return lora_linear(x, self.base.weight, self.A, self.B, self.scale)

    def plain(self, x):
        """The same as one would write it down, in float32 around the base, as peft does: what tests hold it against."""
        return self.base(x) + (self.scale * (x.to(self.A.dtype) @ self.A.T) @ self.B.T).to(x.dtype)

    @torch.no_grad()
    def merge(self):
        """Put W + ΔW, summed in float32 and rounded to W's dtype, in W's place. W itself is kept for `unmerge`."""
        if self._kept is None:
            self._kept = (self.base.weight,)
            merged = (self.base.weight.float() + self.update).to(self.base.weight.dtype)
            self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self):
        """Put the very W back: subtracting ΔW would leave rounding errors in it."""
        if self._kept is not None:
            (self.base.weight,), self._kept = self._kept, None


# ---------------------------------------------------------------------------------------------------------------
# Inits: (W (out, in), basis U (d, r̂) or None, rank, writer, generator) -> A (rank, in), B (out, rank), B·A = 0

def ordinary(rows, columns, generator):
    """LoRA's own draw of a factor (microsoft/LoRA, layers.py): uniform within ±1/√columns."""
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=5 ** 0.5, generator=generator)


def random(weight, basis, rank, writer, generator):
    """LoRA's own init: A ordinary, B zero, for readers and writers alike."""
    return ordinary(rank, weight.shape[1], generator), torch.zeros(weight.shape[0], rank)


def orthonormal(weight, basis, rank, writer, generator):
    """Random orthonormal directions where `sails` has its basis: the control for "any subspace will do"."""
    d = weight.shape[0 if writer else 1]
    return _place(weight, torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q, writer)


def sails(weight, basis, rank, writer, generator):
    """The safety basis; where it has fewer directions than rank, the others get the ordinary draw orthogonal to it."""
    d, found = basis.shape
    rest = ordinary(rank - found, d, generator).T if rank > found else basis[:, :0]
    for _ in range(2):  # the second pass takes away what the first one's rounding left
        rest = rest - basis @ (basis.T @ rest)
    return _place(weight, torch.cat((basis, rest), 1), writer)


def _place(weight, directions, writer):
    """Directions (d, rank) of the residual stream as A of a reader or B of a writer; the other factor is zero."""
    out, inner = weight.shape
    if writer:
        return torch.zeros(directions.shape[1], inner), directions
    return directions.T, torch.zeros(out, directions.shape[1])


INITS = {"sails": sails, "random": random, "orthonormal": orthonormal}


# ---------------------------------------------------------------------------------------------------------------
# Adding, finding, merging

def add_lora(model: nn.Module, rank: int, alpha: float, init: str, bases: dict[str, torch.Tensor] | None = None,
             generator: torch.Generator | None = None, freeze_basis=False) -> dict[str, LoRALinear]:
    """Freeze the model and put a LoRALinear in the place of every q, k, v and o projection: {module name: LoRALinear}.

    bases: {module name: U (d, r̂) with orthonormal columns, r̂ <= rank}, needed by "sails". With freeze_basis, the rank
    of a module is its r̂ and only the factor that starts at zero is trained, so that the update can't leave the
    subspace; the scale stays alpha / rank. Draws are made on the CPU, the same for every device. Raises InputError for
    an unknown init, a rank that isn't 1 to d, an alpha that isn't above 0, and bases that are missing or don't fit.
    """
    if init not in INITS:
        raise InputError(f"--init {init}: known are {', '.join(INITS)}")
    if not 0 < alpha < 1e9:
        raise InputError(f"--alpha {alpha}: must be above 0 (0 would train nothing)")
    targets = _targets(model)
    bases, plan = bases or {}, {}
    for name, base in targets.items():
        writer = _leaf(name) in WRITERS
        d = base.weight.shape[0 if writer else 1]
        if not 1 <= rank <= d:
            raise InputError(f"--rank {rank}: must be 1 to {d}, the width of the residual stream at {name}")
        basis, own = bases.get(name), rank
        if basis is None and (init == "sails" or freeze_basis):
            raise InputError(f"{name} has no basis: --init sails and --freeze-basis need one for each module")
        if basis is not None:
            basis = basis.detach().to("cpu", torch.float32)
            if basis.dim() != 2 or basis.shape[0] != d or not 1 <= basis.shape[1] <= rank:
                raise InputError(f"{name}: its basis has shape {tuple(basis.shape)}, not ({d}, 1 to {rank})")
            if not (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-4:
                raise InputError(f"{name}: the columns of its basis aren't orthonormal")
            own = basis.shape[1] if freeze_basis else rank
        plan[name] = base, *INITS[init](base.weight, basis, own, writer, generator), writer
    model.requires_grad_(False)
    for name, (base, A, B, writer) in plan.items():
        layer = LoRALinear(base, A, B, alpha / rank, writer)
        if freeze_basis:
            (layer.B if B.any() else layer.A).requires_grad_(False)
        _replace(model, name, layer)
    return lora_layers(model)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{module name: LoRALinear} of the model, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Add every update into its base weight, in place. Costs a second copy of those weights until `unmerge_lora`."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: the base weights are again what they were, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def fold_lora(model: nn.Module) -> None:
    """Merge for good: the layers are plain nn.Linear again, with W + ΔW, as `save_model` wants them."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        _replace(model, name, layer.base)


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Within, every update of the model is `factor` times what it is: with 0, the model answers as its base, to the bit."""
    scales = {layer: layer.scale for layer in lora_layers(model).values()}
    try:
        for layer, scale in scales.items():
            layer.scale = factor * scale
        yield
    finally:
        for layer, scale in scales.items():
            layer.scale = scale


@torch.no_grad()
def update_share(layer: LoRALinear, basis: torch.Tensor) -> float:
    """The share of a layer's update that lies in span(U), basis U (d, r̂) with orthonormal columns: a float in [0, 1].

    ‖ΔW·UUᵀ‖² / ‖ΔW‖² for readers, ‖UUᵀ·ΔW‖² / ‖ΔW‖² for writers; NaN where ΔW is 0. In float64, from r × r products
    (‖BA‖² = Σ (BᵀB) ∘ (AAᵀ)), without making ΔW.
    """
    A, B = layer.A.double(), layer.B.double()
    basis = basis.to(A)
    inside, other = (basis.T @ B, A.T) if layer.writer else (basis.T @ A.T, B)             # (r̂, r), (in or out, r)
    whole = B if layer.writer else A.T                                                     # (d, r)
    gram = other.T @ other
    return float((inside.T @ inside * gram).sum() / (whole.T @ whole * gram).sum())


def subspace_share(model: nn.Module, bases: dict[str, torch.Tensor], seed: int, draws=8) -> dict:
    """{"subspace", "random", "random_sd"}: share of ‖ΔW‖², summed over modules, that lies in their bases.

    Beside it the mean and standard deviation of the same share for `draws` random bases of equal
    rank. bases {module name: U (d, r̂)}; None where there is no basis or no update.
    """
    layers = lora_layers(model)
    norms = [layer.update.square().sum().item() for layer in layers.values()]
    norms = torch.tensor(norms, dtype=torch.float64)
    if not bases or not norms.sum() > 0:
        return {"subspace": None, "random": None, "random_sd": None}

    def share(bases):
        parts = [update_share(layer, bases[name]) for name, layer in layers.items()]
        parts = torch.tensor(parts, dtype=torch.float64).nan_to_num()
        return (norms * parts).sum().item() / norms.sum().item()

    def random_bases():
        return {name: torch.linalg.qr(torch.randn(bases[name].shape, generator=generator)).Q
                for name in layers}

    generator = torch.Generator().manual_seed(seed)
    chance = torch.tensor([share(random_bases()) for _ in range(draws)])
    return {"subspace": share(bases), "random": chance.mean().item(),
            "random_sd": chance.std().item()}


def trainable_parameters(layers: dict[str, LoRALinear]) -> list[tuple[str, nn.Parameter]]:
    """[(name, parameter)] of all factors that are trained."""
    factors = [(f"{name}.{letter}", getattr(layer, letter))
               for name, layer in layers.items() for letter in "AB"]
    return [(name, factor) for name, factor in factors if factor.requires_grad]


def _leaf(name):
    return name.rpartition(".")[2]


def _targets(model, leaves=TARGETS):
    if lora_layers(model):
        raise ValueError("the model carries LoRA layers already")
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _leaf(name) in leaves}


def _replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# ---------------------------------------------------------------------------------------------------------------
# PEFT's layout: adapter_config.json and adapter_model.safetensors

KEY = re.compile(r"base_model\.model\.model\.([\w.]+)\.lora_([AB])\.weight")  # Hugging Face's names: ours after "model."


def save_adapter(model: nn.Module, folder: str | Path, base_model_name: str) -> None:
    """Write the model's adapter to `folder` as PEFT does; ranks and alphas other than the most common go by module."""
    layers, folder = lora_layers(model), Path(folder)
    alphas = {name: layer.scale * layer.rank for name, layer in layers.items()}            # PEFT: scale = alpha / rank
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    (rank, alpha), _ = Counter((layer.rank, alphas[name]) for name, layer in layers.items()).most_common(1)[0]
    leaves = {_leaf(name) for name in layers}
    whole = not any(isinstance(module, nn.Linear) and _leaf(name) in leaves for name, module in model.named_modules())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model_name),
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True, "modules_to_save": None,
        "target_modules": sorted(leaves) if whole else list(layers), "layers_to_transform": None,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: alphas[name] for name in layers if alphas[name] != alpha}}
    write_json(folder / "adapter_config.json", config)
    # Last, since a folder with the tensors is taken to be a whole adapter
    write_tensors(folder / "adapter_model.safetensors", {
        f"base_model.model.model.{name}.lora_{letter}.weight": factor
        for name, layer in layers.items() for letter, factor in (("A", layer.A), ("B", layer.B))}, {"scale": _scale(config)})


def load_adapter(model: nn.Module, source: str | Path) -> dict[str, LoRALinear]:
    """Put the LoRA adapter in a folder or hub repository, in PEFT's layout, on a model: {module name: LoRALinear}.

    Raises InputError, and leaves the model as it was, for anything that W + s·B·A on projections of attention and MLP
    isn't (DoRA, biases, whole modules, ...), and for tensors that are missing, unknown, misshapen or not finite.
    """
    where = locate(source, "adapter_config.json")
    config, file = _read_config(where), locate(source, "adapter_model.safetensors")
    shapes, modules, factors = tensor_shapes(file), _targets(model, LOADED), {}
    for key in shapes:
        match = KEY.fullmatch(key)
        if not match or match[1] not in modules:
            raise InputError(f"{file}: tensor {key[:99]!r} belongs to no {', '.join(LOADED)} of this model")
        factors.setdefault(match[1], {})[match[2]] = key
    named = {name for name in modules if _is_named(name, config["target_modules"], config["layers_to_transform"])}
    for name in sorted(named ^ factors.keys()):
        raise InputError(f"{file}: {name} has {'no tensors, but is' if name in named else 'tensors, but is not'} named "
                         "by target_modules and layers_to_transform in adapter_config.json")
    if not factors:
        raise InputError(f"{file} holds no LoRA tensors")
    for name, keys in factors.items():
        rank, (out, inner) = _pattern(config["rank_pattern"], name, config["r"]), modules[name].weight.shape
        for letter, wanted in (("A", (rank, inner)), ("B", (out, rank))):
            if (shape := shapes.get(keys.get(letter))) != wanted:
                raise InputError(f"{file}: lora_{letter} of {name} {f'has shape {shape}' if shape else 'is missing'}; "
                                 f"the config and the model ask for {wanted}")
    if read_metadata(file).get("scale", _scale(config)) != _scale(config):
        raise InputError(f"{where}: {_scale(config)} isn't what it was written with: put back {read_metadata(file)['scale'][:200]!r}")
    tensors = {key: tensor.float() for key, tensor in read_tensors(file).items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{file}: tensor {key} has values that aren't finite")
    model.requires_grad_(False)
    for name, keys in factors.items():
        A, B = tensors[keys["A"]], tensors[keys["B"]]
        divisor = A.shape[0] ** 0.5 if config["use_rslora"] else A.shape[0]
        scale = _pattern(config["alpha_pattern"], name, config["lora_alpha"]) / divisor
        _replace(model, name, LoRALinear(modules[name], A, B, scale, _leaf(name) in WRITERS))
    return lora_layers(model)


def _scale(config):
    """The fields on which s = alpha / rank hangs, as text: kept beside the tensors, since no shape tells of them."""
    return json.dumps({field: config[field] for field in ("lora_alpha", "alpha_pattern", "use_rslora")}, sort_keys=True)


def _number(kind, high):
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and 0 < value < high


def _plain(names):  # to peft they are regular expressions; out of a file, only plain names are taken
    return all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in names)


def _pattern_of(good):
    return lambda value: isinstance(value, dict) and _plain(value) and all(map(good, value.values()))


# What each field may say for the adapter to be W + s·B·A on whole modules of the model as it is. The inits that are
# left out (pissa, olora, ...) change the base weights at the start.
FIELDS = {
    "peft_type": lambda value: value == "LORA",
    "bias": lambda value: value == "none",
    "init_lora_weights": lambda value: value in (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "r": _number(int, 1 << 24), "rank_pattern": _pattern_of(_number(int, 1 << 24)),
    "lora_alpha": _number((int, float), 1e9), "alpha_pattern": _pattern_of(_number((int, float), 1e9)),
    "use_rslora": lambda value: isinstance(value, bool),
    "target_modules": lambda value: isinstance(value, list),
    "layers_to_transform": lambda value: isinstance(value, list | None),
} | dict.fromkeys((
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layers_pattern", "exclude_modules",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"), operator.not_)


def _read_config(path):
    """An adapter_config.json that asks for no more than `load_adapter` does. Paths and code in it are never used."""
    config = read_json(path)
    for field, default in {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}.items():
        config[field] = config.get(field) or default
    layers = config.get("layers_to_transform")
    config["layers_to_transform"] = [layers] if isinstance(layers, int) else layers
    for field, good in FIELDS.items():
        if not good(config.get(field)):
            raise InputError(f"{path}: {field} is {str(config.get(field))[:80]!r}, but only plain LoRA on modules listed "
                             "by name is read: merge the adapter with peft, and load the result as a model")
    return config


def _is_named(name, targets, layers):
    """PEFT's rule: a target is a module's name or its end, from a dot on; layers_to_transform are block numbers."""
    return any(map(f".model.{name}".endswith, (f".{target}" for target in targets))) and (
        not layers or int(name.split(".")[1]) in layers)


def _pattern(pattern, name, default):
    """The first value whose key is a module's name or its end, from a dot on: "layers.1.…" isn't "layers.11.…"."""
    return next((value for key, value in pattern.items() if f".model.{name}".endswith(f".{key}")), default)
