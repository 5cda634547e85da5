"""LoRA: low-rank layers beside frozen ones, their inits, PEFT's files both ways, and merging.

    layers = add_lora(model, rank=16, alpha=32, init="sails", bases=bases)   # {name: LoRALinear}
    save_adapter(model, folder, "google/gemma-2-2b")     # peft.PeftModel.from_pretrained opens it
    load_adapter(model, folder)                          # opens what peft's save_pretrained wrote

    python lora.py runs/20260101-120000-toy --out merged      # base and adapter as one checkpoint

The layer is y = W·x + s·B·(A·x) with s = alpha / rank. Readers (q, k, v, gate, up) read the
residual stream, so the rows of A are directions in it. Writers (o, down) write to it, so the
columns of B are. A basis U (d, r̂) therefore enters A of readers and B of writers.
Letters: d width of the residual stream, r rank, r̂ directions in a basis, in and out widths of W.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fused import lora_linear
from model import MODULES, TARGETS, load_model, save_model
from run.files import (InputError, Parser, atomic, locate, read_json, read_tensors, run_command,
                       write_json, write_tensors)
from run.settings import base_of, model_folder


class LoRALinear(nn.Module):
    """A frozen nn.Linear `base` plus s·B·A. A (r, in) and B (out, r) are float32 parameters."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float, writer=False):
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(A.detach().to(device, torch.float32, copy=True).contiguous())
        self.B = nn.Parameter(B.detach().to(device, torch.float32, copy=True).contiguous())
        self.rank, self.scale, self.writer = len(A), scale, writer
        # Holds W while merged: in a tuple, so that it isn't registered as a second parameter
        self.unmerged: tuple = ()

    @property
    def update(self):
        """ΔW = s·B·A (out, in) in float32, which merging adds to W."""
        return self.scale * (self.B @ self.A)

    def forward(self, x):
        if self.unmerged:
            return self.base(x)
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
    Raises InputError for unknown names, a bad rank or alpha, and bases that don't fit.
    """
    if lora_layers(model):
        raise ValueError("the model carries LoRA layers already")
    if isinstance(init, str) and init not in INITS:
        raise InputError(f"--init {init}: known are {', '.join(INITS)}")
    if unknown := set(targets) - MODULES.keys():
        raise InputError(f"targets {', '.join(sorted(unknown))}: known are {', '.join(MODULES)}")
    if not alpha > 0:
        raise InputError(f"--alpha {alpha}: must be above 0 (0 would train nothing)")
    make_factors = INITS[init] if isinstance(init, str) else init
    layers = {}
    for name, base in linears(model, targets).items():
        writer = MODULES[leaf(name)].side == "writers"
        d = base.weight.shape[0 if writer else 1]
        if not 1 <= rank <= d:
            raise InputError(f"--rank {rank}: must be 1 to {d}, the width at {name}")
        basis = (bases or {}).get(name)
        if basis is not None:
            basis = basis.detach().to("cpu", torch.float32)
            rows, size = basis.shape
            if rows != d or not 1 <= size <= rank:
                raise InputError(f"{name}: its basis is ({rows}, {size}), not ({d}, 1 to {rank})")
            if not (basis.T @ basis - torch.eye(size)).abs().max() < 1e-4:
                raise InputError(f"{name}: the columns of its basis aren't orthonormal")
        elif make_factors is sails or freeze_basis:
            raise InputError(f"{name} has no basis: --init sails and --freeze-basis need one")
        module_rank = size if freeze_basis else rank
        A, B = make_factors(base.weight, basis, module_rank, writer, generator)
        layers[name] = LoRALinear(base, A, B, alpha / rank, writer)
        if freeze_basis:
            (layers[name].B if B.any() else layers[name].A).requires_grad_(False)
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
def merge_lora(model: nn.Module) -> None:
    """Replace each W by W + ΔW, summed in float32 and rounded once to W's dtype."""
    for layer in lora_layers(model).values():
        if not layer.unmerged:
            weight = layer.base.weight
            merged = (weight.float() + layer.update).to(weight.dtype)
            layer.base.weight = nn.Parameter(merged, requires_grad=False)
            layer.unmerged = (weight,)


def unmerge_lora(model: nn.Module) -> None:
    """Put each W itself back. Subtracting ΔW would leave rounding errors in it."""
    for layer in lora_layers(model).values():
        if layer.unmerged:
            (layer.base.weight,) = layer.unmerged
            layer.unmerged = ()


def fold_lora(model: nn.Module) -> None:
    """Merge for good: each layer becomes a plain nn.Linear with W + ΔW, as `save_model` wants."""
    merge_lora(model)
    for name, layer in lora_layers(model).items():
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
    A, B = layer.A.double(), layer.B.double()
    stream, other = (B, A.T) if layer.writer else (A.T, B)    # (d, r), (in or out, r)
    inside = basis.to(stream).T @ stream                      # (r̂, r)
    gram = other.T @ other                                    # (r, r)
    return float((inside.T @ inside * gram).sum() / (stream.T @ stream * gram).sum())


def subspace_share(model: nn.Module, bases: dict[str, Tensor], seed: int, draws=8) -> dict:
    """{"subspace", "random", "random_sd"}: share of ‖ΔW‖², over all modules, in {name: basis}, and
    in random bases of equal rank (mean and deviation of `draws`). None without bases or update."""
    layers = lora_layers(model)
    norms = torch.tensor([float(layer.update.square().sum()) for layer in layers.values()]).double()
    if not bases or not norms.sum() > 0:
        return dict.fromkeys(("subspace", "random", "random_sd"))

    def share(bases):
        shares = [update_share(layer, bases[name]) for name, layer in layers.items()]
        shares = torch.tensor(shares, dtype=torch.float64).nan_to_num()
        return float((norms * shares).sum() / norms.sum())

    generator = torch.Generator().manual_seed(seed)
    chance = torch.zeros(draws)
    for i in range(draws):
        noise = {name: torch.randn(bases[name].shape, generator=generator) for name in layers}
        chance[i] = share({name: torch.linalg.qr(draw).Q for name, draw in noise.items()})
    return {"subspace": share(bases), "random": chance.mean().item(),
            "random_sd": chance.std().item()}


# --------------------------------------------------------------------------------------------------
# PEFT's files. Its module names are ours after "model."

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.model\.([\w.]+)\.lora_([AB])(?:\.default)?\.weight")
EMBEDDINGS = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")

# Other values make an adapter more than W + s·B·A. Other init_lora_weights change W at the start
PLAIN = {
    "peft_type": ("LORA",), "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    **dict.fromkeys((
        "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication",
        "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
        "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
    ), (None, False, [], {}))}


def save_adapter(model: nn.Module, folder: str | Path, base_model_name: str) -> None:
    """Write the adapter as PEFT does. Ranks and alphas unlike the most common go into patterns."""
    layers, folder = lora_layers(model), Path(folder)
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in layers.items()}
    alphas = {name: int(a) if a == int(a) else a for name, a in alphas.items()}
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in layers).most_common(1)[0]
    # Leaf names stand for all modules of their kind, so list the layers where some have none
    leaves = sorted({leaf(name) for name in layers})
    target_modules = list(layers) if linears(model, leaves) else leaves
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_name),
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "modules_to_save": None, "target_modules": target_modules,
        "layers_to_transform": None,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha}})
    # Last, since a folder with the tensors is taken for a whole adapter
    write_tensors(folder / WEIGHTS, {
        f"base_model.model.model.{name}.lora_{letter}.weight": factor
        for name, layer in layers.items()
        for letter, factor in layer.named_parameters(recurse=False)})


def load_adapter(model: nn.Module, source: str | Path) -> dict[str, LoRALinear]:
    """Put an adapter in PEFT's layout, a folder or hub repository, on a model: {name: LoRALinear}.

    The tensors' names and shapes give modules and ranks; the config gives the scale. Raises
    InputError, and leaves the model as it was, for what isn't W + s·B·A on MODULES and for tensors
    that are missing, unknown, misshapen or not finite.
    """
    config_path = locate(source, CONFIG)
    config = read_json(config_path)
    for field, values in PLAIN.items():
        value = config.get(field)
        if value not in values:
            raise InputError(f"{config_path}: {field} is {str(value)[:80]!r}, not plain LoRA: "
                             "merge the adapter with peft and load the result as a model")
    path = locate(source, WEIGHTS, optional=True)
    if path is None:
        raise InputError(f"{source} holds no {WEIGHTS} (an adapter_model.bin is a pickle, which "
                         "is never opened: save the adapter again with a newer peft)")
    modules = linears(model, MODULES)
    layers = {}
    for name, pair in read_factors(path, modules, model.embed_tokens.weight).items():
        base = modules[name]
        rank, scale = rank_and_scale(config, name, config_path)
        shapes = {letter: tuple(factor.shape) for letter, factor in pair.items()}
        expected = {"A": (rank, base.in_features), "B": (base.out_features, rank)}
        if shapes != expected:
            raise InputError(f"{path}: {name} has {shapes}; config and model ask for {expected}")
        if not all(factor.isfinite().all() for factor in pair.values()):
            raise InputError(f"{path}: {name} has values that aren't finite")
        writer = MODULES[leaf(name)].side == "writers"
        layers[name] = LoRALinear(base, pair["A"], pair["B"], scale, writer)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return lora_layers(model)


def read_factors(path, modules, embedding):
    """{module name: {"A": (r, in), "B": (out, r)}} in float32."""
    factors = {}
    for key, tensor in read_tensors(path).items():
        # peft carries the embedding along when the adapter was saved with it
        if key in EMBEDDINGS and torch.equal(tensor.to(embedding), embedding):
            continue
        match = KEY.fullmatch(key)
        if not match or match[1] not in modules:
            raise InputError(f"{path}: tensor {key[:99]!r} belongs to no {', '.join(MODULES)} here")
        factors.setdefault(match[1], {})[match[2]] = tensor.float()
    if not factors:
        raise InputError(f"{path} holds no LoRA tensors")
    return factors


def rank_and_scale(config, name, path):
    """A module's rank and s. Keys of the patterns are regular expressions for a name's end."""
    def own(field, pattern):
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", f"model.{name}"):
                return value
        return config.get(field, 8)    # peft's default

    try:
        rank = own("r", "rank_pattern")
        alpha = own("lora_alpha", "alpha_pattern")
        return rank, alpha / (rank ** 0.5 if config.get("use_rslora") else rank)
    except (re.error, AttributeError, TypeError, ArithmeticError) as error:
        raise InputError(f"{path}: rank and scale of {name} can't be read ({error})") from None


# --------------------------------------------------------------------------------------------------
# Merging

FETCHED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
           "chat_template.jinja", "generation_config.json")
LEFT_OUT = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".py")


def merge(adapter: str | Path, base: str | Path, out: str | Path, dtype: str | None = None) -> int:
    """Write `base` with `adapter` merged to the folder `out`. Returns the number of merged modules.

    Files beside the weights come along, but code. dtype: "float32", "bfloat16" (None: base's own)
    """
    out, source = Path(out).expanduser(), model_folder(base)
    if (out / "config.json").exists():
        raise InputError(f"{out} is there: give another --out")
    config = read_json(locate(source, "config.json"))
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    model = load_model(source, getattr(torch, dtype))
    layers = load_adapter(model, adapter)
    fold_lora(model)
    # The hub's files are here only once they were asked for
    for name in FETCHED:
        locate(source, name, optional=True)
    out.mkdir(parents=True, exist_ok=True)
    for path in locate(source, "config.json").parent.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(LEFT_OUT):
            with atomic(out / path.name) as part:
                shutil.copyfile(path, part)
    save_model(model, out)    # config.json last: without it the folder isn't a checkpoint
    return len(layers)


def main():
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="RUN|ADAPTER", help="a run, or files in PEFT's layout")
    parser.add_argument("--model", metavar="NAME|DIR", help="default: the one the adapter names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the base's own")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    args = parser.parse_args()
    base = args.model or base_of(args.adapter)
    print(f"merged {merge(args.adapter, base, args.out, args.dtype)} modules into {args.out}")


if __name__ == "__main__":
    run_command(main)
