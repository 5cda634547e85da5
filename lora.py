"""LoRA: low-rank layers beside frozen ones, their inits, PEFT's files both ways, and merging.

    layers = add_lora(model, rank=16, alpha=32, init="sails", bases=bases)   # {name: LoRALinear}
    save_adapter(model, folder, "google/gemma-2-2b")     # peft.PeftModel.from_pretrained opens it
    load_adapter(model, folder)                          # opens what peft's save_pretrained wrote

    python lora.py runs/20260101-120000-toy --out merged      # base and adapter as one checkpoint

The layer is y = W·x + s·B·(A·x) with s = alpha / rank. Readers (q, k, v, gate, up) read the
residual stream: the rows of A are directions in it. Writers (o, down) write to it: the columns of
B are. A basis U (d, r̂) therefore enters A of readers and B of writers.
Letters: d width of the residual stream, r rank, r̂ directions in a basis, in and out widths of W.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fused import lora_linear
from model import MODULES, TARGETS, load_model, save_model
from run.files import (InputError, Parser, is_new, locate, read_json, read_tensors, run_command,
                       write_json, write_tensors)
from run.settings import base_of, model_folder
from run.weights import copy_beside


class LoRALinear(nn.Module):
    """A frozen nn.Linear `base` plus s·B·A. A (r, in) and B (out, r) are float32 parameters."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float, writer=False):
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        A = A.detach().to(device, torch.float32, copy=True)
        B = B.detach().to(device, torch.float32, copy=True)
        self.A = nn.Parameter(A.contiguous())
        self.B = nn.Parameter(B.contiguous())
        self.rank = len(A)
        self.scale = scale
        self.writer = writer

    @property
    def update(self):
        """ΔW = s·B·A (out, in) in float32, which merging adds to W."""
        return self.scale * (self.B @ self.A)

    def forward(self, x):
        return lora_linear(x, self.base.weight, self.A, self.B, self.scale)


# --------------------------------------------------------------------------------------------------
# Inits: (W, U (d, r̂) or None, rank, writer, generator) -> A (rank, in), B (out, rank), B·A = 0

def kaiming(rows, columns, generator):
    """LoRA's own draw of a factor: uniform within ±1/√columns (microsoft/LoRA, layers.py)."""
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=5 ** 0.5, generator=generator)


def place(weight, directions, writer):
    """Directions (d, rank) as A of a reader or B of a writer. The other factor is zero."""
    rank = directions.shape[1]
    if writer:
        return torch.zeros(rank, weight.shape[1]), directions
    return directions.T, torch.zeros(weight.shape[0], rank)


def random(weight, basis, rank, writer, generator):
    """LoRA's own init: A is drawn and B is zero, for readers and writers alike."""
    return kaiming(rank, weight.shape[1], generator), torch.zeros(weight.shape[0], rank)


def orthonormal(weight, basis, rank, writer, generator):
    """Random orthonormal directions instead of U: the control for "any subspace will do"."""
    d = weight.shape[0 if writer else 1]
    return place(weight, torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q, writer)


def sails(weight, basis, rank, writer, generator):
    """U, then LoRA's draw made orthogonal to U for the rank - r̂ directions that U lacks."""
    d, size = basis.shape
    if size == rank:
        return place(weight, basis, writer)
    rest = kaiming(rank - size, d, generator).T
    # The second pass removes what rounding left in the first
    for _ in range(2):
        rest = rest - basis @ (basis.T @ rest)
    return place(weight, torch.cat((basis, rest), 1), writer)


INITS = {"sails": sails, "random": random, "orthonormal": orthonormal}


def add_lora(model: nn.Module, rank: int, alpha: float, init: str | Callable,
             bases: dict[str, Tensor] | None = None, generator: torch.Generator | None = None,
             freeze_basis=False, targets: Collection[str] = TARGETS) -> dict[str, LoRALinear]:
    """Freeze the model and replace the target modules by LoRALinears: {module name: LoRALinear}.

    init: a name in INITS, or a function like those there. Draws are made on the CPU.
    bases: {module name: U (d, r̂)} with orthonormal columns and r̂ <= rank; "sails" needs them.
    freeze_basis: a module's rank is its r̂ and only the factor that starts at zero is trained, so
    that ΔW stays in the subspace. The scale is alpha / rank all the same.
    Raises InputError for unknown targets and for bases that don't fit.
    """
    if unknown := set(targets) - set(MODULES):
        raise InputError(f"no modules are named {unknown}: known are {', '.join(MODULES)}")
    make_factors = INITS[init] if isinstance(init, str) else init
    layers = {}
    for name, base in linears(model, targets).items():
        writer = MODULES[leaf(name)].side == "writers"
        d = base.weight.shape[0 if writer else 1]
        basis = None
        module_rank = rank
        # A basis that doesn't fit, or isn't orthonormal, would start elsewhere unnoticed
        if bases:
            basis = bases[name].detach().to("cpu", torch.float32)
            rows, size = basis.shape
            is_orthonormal = torch.allclose(basis.T @ basis, torch.eye(size), atol=1e-4)
            if rows != d or size > rank or not is_orthonormal:
                raise InputError(f"the basis of {name}, {rows} x {size}, isn't 1 to {rank} "
                                 f"orthonormal columns of {d} values")
            module_rank = size if freeze_basis else rank

        A, B = make_factors(base.weight, basis, module_rank, writer, generator)
        layers[name] = LoRALinear(base, A, B, alpha / rank, writer)
        if freeze_basis:
            basis_factor(layers[name]).requires_grad_(False)
    return place_layers(model, layers)


def basis_factor(layer: LoRALinear) -> nn.Parameter:
    """The factor that holds a basis of the residual stream: A of a reader, B of a writer."""
    return layer.B if layer.writer else layer.A


def place_layers(model, layers):
    """Freeze the model, then put the layers {module name: LoRALinear} in."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def leaf(name):
    return name.rpartition(".")[2]


def linears(model, leaves):
    """{name: nn.Linear} of the modules with these leaf names that carry no adapter."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and leaf(name) in leaves}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{module name: LoRALinear} in the model's order."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def trainable_parameters(layers: dict[str, LoRALinear]) -> list[tuple[str, nn.Parameter]]:
    """[(name, parameter)] of the factors that are trained."""
    return [(f"{name}.{letter}", factor) for name, layer in layers.items()
            for letter, factor in layer.named_parameters(recurse=False) if factor.requires_grad]


@torch.no_grad()
def fold_lora(model: nn.Module):
    """Merge: each layer becomes an nn.Linear with W + ΔW, summed in float32 and rounded once."""
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        merged = (weight.float() + layer.update).to(weight.dtype)
        layer.base.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, layer.base)


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply every update by `factor` within. With 0 the outputs are the base's, bit for bit."""
    scales = {layer: layer.scale for layer in lora_layers(model).values()}
    for layer, scale in scales.items():
        layer.scale = factor * scale
    try:
        yield
    finally:
        for layer, scale in scales.items():
            layer.scale = scale


@torch.no_grad()
def update_share(layer: LoRALinear, basis: Tensor) -> float:
    """The share of ΔW in span(U), U (d, r̂) with orthonormal columns: 0 to 1, or NaN if ΔW = 0.

    ‖ΔW·UUᵀ‖² / ‖ΔW‖² for readers, ‖UUᵀ·ΔW‖² / ‖ΔW‖² for writers, in float64. ΔW itself is not
    made: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), from r × r products.
    """
    A = layer.A.double()
    B = layer.B.double()
    stream, other = (B, A.T) if layer.writer else (A.T, B)    # (d, r), (in or out, r)
    inside = basis.to(stream).T @ stream                      # (r̂, r)
    gram = other.T @ other                                    # (r, r)
    inside_norm = (inside.T @ inside * gram).sum()
    return float(inside_norm / (stream.T @ stream * gram).sum())


@torch.no_grad()
def subspace_share(model: nn.Module, bases: dict[str, Tensor], seed: int, draws=8) -> dict:
    """{"subspace", "random", "random_sd"}: share of ‖ΔW‖², over all modules, in {name: basis}, and
    in random bases of equal rank (mean and deviation of `draws`). None without bases or update."""
    layers = lora_layers(model)
    norms = {name: float(layer.update.square().sum())
             for name, layer in layers.items()}
    # A module without an update has no share of its own, and adds nothing
    changed = [name for name in layers if norms[name] > 0]
    if not bases or not changed:
        return dict.fromkeys(("subspace", "random", "random_sd"))

    def share(bases):
        inside = [norms[name] * update_share(layers[name], bases[name]) for name in changed]
        return sum(inside) / sum(norms.values())

    generator = torch.Generator().manual_seed(seed)
    chance = torch.zeros(draws)
    for i in range(draws):
        noise = {name: torch.randn(bases[name].shape, generator=generator) for name in layers}
        random_bases = {name: torch.linalg.qr(draw).Q for name, draw in noise.items()}
        chance[i] = share(random_bases)
    return {"subspace": share(bases), "random": float(chance.mean()),
            "random_sd": float(chance.std())}


# --------------------------------------------------------------------------------------------------
# PEFT's files. Its module names are ours after "model."

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model."
# What some writers leave in a name: the adapter's own, peft's wrappers, torch.compile's and FSDP's
AROUND = re.compile(r"\b(default|base_layer|original_module|modules_to_save|_orig_mod|"
                    r"_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Other values make an adapter more than W + s·B·A. Other inits (PiSSA, OLoRA) change W itself
PLAIN = {"peft_type": ("LORA",),
         "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica")}
# So do these, unless they are null, false or empty
EXTRAS = """use_dora lora_bias layer_replication target_parameters trainable_token_indices
    alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config
    velora_config""".split()


def save_adapter(model: nn.Module, folder: str | Path, base_model_name: str):
    """Write the adapter as PEFT does. Patterns give ranks and alphas unlike the first module's."""
    layers = lora_layers(model)
    folder = Path(folder)
    ranks = {name: layer.rank for name, layer in layers.items()}
    # Rounding gives the whole number back that alpha / rank came from
    alphas = {name: round(layer.scale * layer.rank, 6) for name, layer in layers.items()}
    first = next(iter(layers))
    # A leaf name stands for all modules of its kind, so list whole names where some have no layer
    leaves = sorted({leaf(name) for name in layers})
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_name),
        "r": ranks[first], "lora_alpha": alphas[first],
        "target_modules": list(layers) if linears(model, leaves) else leaves,
        "rank_pattern": {name: r for name, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alphas[first]}})

    # The tensors come last, since a folder that has them is taken for a whole adapter
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.B
    write_tensors(folder / WEIGHTS, tensors)


def load_adapter(model: nn.Module, source: str | Path) -> dict[str, LoRALinear]:
    """Put an adapter in PEFT's layout, a folder or hub repository, on a model: {name: LoRALinear}.

    Names and shapes of the tensors give modules and ranks, the config gives the scale. Weights of
    the base model that the file carries along must be as they are here. Raises InputError, and
    leaves the model as it was, for what isn't W + s·B·A on MODULES.
    """
    config = read_config(locate(source, CONFIG))
    path = locate(source, WEIGHTS)
    factors = {}
    weights = dict(model.named_parameters())
    for key, tensor in read_tensors(path).items():
        # AutoModel's adapters have one "model." less
        name = AROUND.sub("", key).removeprefix("base_model.model.").removeprefix("model.")
        if ".lora_" in name:
            factors[name] = tensor
        elif not is_same(weights.get(name.replace("lm_head", "embed_tokens")), tensor):
            raise InputError(f"{path}: {key} is not the base model's, so this is more than plain "
                             "LoRA: merge the adapter with peft and load the result as a model")

    layers = {}
    for name, base in linears(model, MODULES).items():
        keys = [f"{name}.lora_{letter}.weight" for letter in "AB"]
        if not all(key in factors for key in keys):
            continue
        A, B = (factors.pop(key) for key in keys)
        rank = len(A) if A.dim() else 0
        fits = A.shape == (rank, base.in_features) and B.shape == (base.out_features, rank)
        try:
            scale = read_scale(config, name, rank)
        except (re.error, AttributeError, TypeError, ArithmeticError) as error:
            raise InputError(f"{source}: {CONFIG} gives {name} no scale: {error}") from None
        if not fits or not (scale * A).isfinite().all() or not B.isfinite().all():
            raise InputError(f"{path}: A and B of {name} don't fit {base}, or aren't finite")
        writer = MODULES[leaf(name)].side == "writers"
        layers[name] = LoRALinear(base, A, B, scale, writer)
    # What is left belongs to other modules, or is half a pair
    if factors or not layers:
        raise InputError(f"{path} holds A and B of {len(layers)} modules here, and tensors of "
                         f"no {', '.join(MODULES)}: {list(factors)[:1]}")
    return place_layers(model, layers)


def is_same(weight, tensor):
    """Whether a weight of the model is `tensor`, in the dtype of either."""
    if weight is None or weight.shape != tensor.shape:
        return False
    tensor = tensor.to(weight.device)
    return (torch.equal(weight, tensor.to(weight.dtype))
            or torch.equal(weight.to(tensor.dtype), tensor))


def read_config(path):
    """An adapter_config.json, whose adapter must be W + s·B·A."""
    config = read_json(path)
    for field in (*PLAIN, *EXTRAS):
        value = config.get(field)
        if value not in PLAIN.get(field, (None, False, [], {})):
            raise InputError(f"{path}: {field} is {str(value)[:80]!r}, not plain LoRA: "
                             "merge the adapter with peft and load the result as a model")
    return config


def read_scale(config, name, rank):
    """A module's s. The keys of alpha_pattern are regular expressions for the end of its name."""
    patterns = config.get("alpha_pattern") or {}
    # The first that matches counts, as in peft; 8 is peft's default
    alphas = [alpha for pattern, alpha in patterns.items()
              if re.match(rf"(.*\.)?({pattern})$", f"model.{name}")]
    alpha = [*alphas, config.get("lora_alpha", 8)][0]
    # Rank-stabilized LoRA (arXiv 2312.03732)
    return alpha / (rank ** 0.5 if config.get("use_rslora") else rank)


# --------------------------------------------------------------------------------------------------
# Merging

def merge(adapter: str | Path, base: str | Path, out: str | Path, dtype: str | None = None):
    """Write `base` with `adapter` merged to the new folder `out`, and what lies beside it.

    dtype: "float32" or "bfloat16", else the base's.
    """
    out = Path(out).expanduser()
    source = model_folder(base)
    if not is_new(out):
        raise InputError(f"{out} is there and isn't empty: give another --out")
    config = read_json(locate(source, "config.json"))
    dtype = dtype or config.get("dtype") or config.get("torch_dtype")
    model = load_model(source, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    load_adapter(model, adapter)
    fold_lora(model)

    copy_beside(source, out)
    # Writes config.json last: without it the folder isn't a checkpoint
    save_model(model, out)


def main():
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="RUN|ADAPTER", help="a run, or files in PEFT's layout")
    parser.add_argument("--model", metavar="NAME|DIR", help="default: the one the adapter names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the base's own")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    args = parser.parse_args()
    base = args.model or base_of(args.adapter)
    merge(args.adapter, base, args.out, args.dtype)
    print(f"merged: {args.out}")


if __name__ == "__main__":
    run_command(main)
