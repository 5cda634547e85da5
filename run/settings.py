"""Settings: recipes by exact model name, the flags that the verbs share, and where each value came from.

A value comes from the command line, else from the run that is resumed, else from the model's recipe, else from the
common defaults. What SAILS doesn't state (top-k, learning rate, batch, epochs, alpha) is our choice; README lists these.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch

from run import parallel
from run.files import ROOT, InputError, locate, read_json
from lora import INITS

HH = "hf://datasets/Anthropic/hh-rlhf/harmless-base"
TOY = ROOT / "toy"
SETS = {  # the evaluation sets, each a file of prompts
    "harmful": "harmful prompts: the safety rate", "jailbreak": "harmful prompts behind a jailbreak",
    "lookalike": "harmless prompts that look harmful: over-refusal",
    "benign": 'harmless prompts; rows with "answer": [words] are checked for them'}
BY_LOSS = ("gradient", "decision", "attribution")     # selections of contrast.py
TOP_K = 20

COMMON: dict = {
    "width": None, "l0": None, "tokens": "response", "select": "paper", "harmless": None, "top_k": None, "tau": 0.8, "norm_aware": False,
    "pairs": 0, "rank": 16, "alpha": None, "init": "sails", "freeze_basis": False, "steps": None, "epochs": 1.0,
    "lr": 2e-4, "warmup": 0.1, "clip": 1.0, "weight_decay": 0.0, "ema": 0.0, "batch_tokens": 2048, "accumulate": 8, "save_every": 50,
    "format": "chat", "max_new_tokens": 128, "eval_prompts": 200, "eval_batch": 32, "looks": 8, "explain": 64, "seed": 0, "device": None,
    "dtype": None, "shard": False, "compile": False, "recompute": False, **dict.fromkeys(SETS)}

GEMMA = {"data": f"{HH}/train.jsonl.gz", "harmful": f"{HH}/test.jsonl.gz", "pairs": 2000, "width": "16k", "compile": True}
RECIPES: dict[str, dict] = {
    "toy": {"sae": TOY / "sae", "layers": (1, 2, 3), "data": TOY / "data/train.jsonl",
            **{name: TOY / f"data/{name}.jsonl" for name in SETS},
            "lr": 1e-3, "steps": 100, "batch_tokens": 512, "accumulate": 2, "max_new_tokens": 24, "eval_prompts": 0,
            "eval_batch": 256},
    "google/gemma-2-2b": {**GEMMA, "sae": "google/gemma-scope-2b-pt-res", "layers": (5, 10, 15, 20)},
    "google/gemma-2-2b-it": {**GEMMA, "sae": "google/gemma-scope-2b-pt-res", "layers": (5, 10, 15, 20)},
    "google/gemma-2-9b": {**GEMMA, "sae": "google/gemma-scope-9b-pt-res", "layers": (10, 15, 20, 25, 30)},
    "google/gemma-2-9b-it": {**GEMMA, "sae": "google/gemma-scope-9b-it-res", "layers": (9, 20, 31)},
    "google/gemma-2-27b": {**GEMMA, "sae": "google/gemma-scope-27b-pt-res", "layers": (10, 22, 34), "width": "131k"},
    "google/gemma-2-27b-it": {**GEMMA, "sae": "google/gemma-scope-27b-pt-res", "layers": (10, 22, 34), "width": "131k"},
}


def add_flags(parser, verb="train"):
    """The flags of `train.py`, "select" those of `select.py`, "explain" those of `report.py --adapter`. None of them has a
    default of argparse's own, so that what was said can be told from what wasn't."""
    def flag(group, name, help, **kind):
        default = COMMON.get(name.replace("-", "_"))
        if default is not None and default is not False:
            help += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
        group.add_argument(f"--{name}", help=help, default=None, **kind)

    on = {"action": argparse.BooleanOptionalAction}
    train, explain = verb == "train", verb == "explain"
    group = parser.add_argument_group("model and SAEs")
    flag(group, "model", f"{', '.join(RECIPES)}, another hub repository, or a folder "
         f"(default {'what the adapter names' if explain else 'toy'})", metavar="NAME|DIR")
    flag(group, "sae", "hub repository or folder in Gemma Scope's layout; its files say whether JumpReLU or SASA", metavar="REPO|DIR")
    flag(group, "layers", "SAE layers; of a folder, all that it holds unless told", type=int, nargs="+", metavar="N")
    flag(group, "width", "SAE width as Gemma Scope names it: 16k, 65k, 131k, …, or a plain number", metavar="W")
    flag(group, "l0", "average L0 in the SAE's folder name; the canonical one unless told", type=int, metavar="L0")
    flag(group, "format", "chat: Gemma's turns, put in by id; plain: Human:/Assistant: as text", choices=("chat", "plain"))

    if not explain:
        group = parser.add_argument_group("data and selection (SAILS section 3)")
        flag(group, "data", 'pairs, JSON lines with "chosen" and "rejected", plain or .gz; hf://datasets/OWNER/NAME/PATH is fetched',
             metavar="FILE")
        flag(group, "pairs", "pairs that selection looks at, drawn by --seed; 0: all", type=int, metavar="P")
        flag(group, "tokens", "tokens whose activations are averaged: those of the response, or all with the prompt",
             choices=("response", "all"))
        flag(group, "select", "how features are chosen; paper: by |Δ|, the difference of mean activations; variance: by how much "
             "that differs from pair to pair; gradient: by the gradients of the loss on the two answers, for readers and writers apart; "
             "attribution: activation × gradient; decision: harmful against harmless prompts, where the answer begins",
             choices=("paper", "variance", *BY_LOSS))
        flag(group, "harmless", "harmless prompts, for --select decision (not those of the evaluation)", metavar="FILE")
        flag(group, "top-k", f"features kept of each SAE layer (default {TOP_K}; with --select {', '.join(BY_LOSS)} twice the rank)",
             type=int, metavar="K")
        flag(group, "tau", "share of the squared singular values of the chosen decoder rows that the subspace keeps, at most "
             f"--rank directions; {', '.join(BY_LOSS)} keep --rank directions", type=float, metavar="T")
        flag(group, "norm-aware", "map directions through Gemma-2's norm gains on their way into the adapter; --select gradient "
             "chooses with them too", **on)
        flag(group, "rank", "rank of the adapters on q, k, v, o of every layer", type=int, metavar="R")
        flag(group, "batch-tokens", "tokens of one packed row, the longest example too; in selection, of one batch", type=int, metavar="N")
    if train:
        group = parser.add_argument_group("adapter")
        flag(group, "alpha", "the update is alpha/rank · B·A (default: the rank, so that the scale is 1)", type=float, metavar="α")
        flag(group, "init", "how A and B begin; sails: in the safety subspace, random: LoRA's own, orthonormal: a random basis",
             choices=tuple(INITS))
        flag(group, "freeze-basis", "train only the factor that isn't the basis: the update can't leave the subspace", **on)

        group = parser.add_argument_group("training")
        flag(group, "steps", "optimizer steps; without it, --epochs decides", type=int, metavar="N")
        flag(group, "epochs", "passes over the data, where --steps isn't given", type=float, metavar="E")
        flag(group, "lr", "peak learning rate of AdamW: linear warm-up, then cosine to 0", type=float, metavar="LR")
        flag(group, "warmup", "share of the steps that warm up; 0: none", type=float, metavar="S")
        flag(group, "weight-decay", "AdamW's, on A and B; 0: none", type=float, metavar="W")
        flag(group, "clip", "largest norm of a step's gradient; 0: no clipping", type=float, metavar="G")
        flag(group, "ema", "weight averaging: what is saved is the exponential moving average of the factors with this β; 0: the last "
             "ones", type=float, metavar="β")
        flag(group, "accumulate", "packed rows in a step, one forward and backward each; of each process under torchrun",
             type=int, metavar="N")
        flag(group, "save-every", "steps between checkpoints; the last step is always saved", type=int, metavar="N")
        flag(group, "looks", "times on the way that a few prompts of each set are answered, for the curves of the report; 0: never",
             type=int, metavar="N")

    if train or explain:
        group = parser.add_argument_group("evaluation (prompt files: .txt, .csv, .json, .jsonl)" if explain else
                                          "evaluation, before and after (prompt files: .txt, .csv, .json, .jsonl)")
        for name, what in SETS.items():
            flag(group, name, what, metavar="FILE")
        flag(group, "eval-prompts", "prompts taken of each set, always the same; 0: all", type=int, metavar="N")
        flag(group, "eval-batch", "prompts answered at once", type=int, metavar="N")
        flag(group, "max-new-tokens", "longest answer, tokens", type=int, metavar="N")
        flag(group, "explain", "prompts of each set on which the report explains what was learned; 0: no explanation",
             type=int, metavar="N")

    group = parser.add_argument_group("machine and run")
    if not explain:
        flag(group, "seed", "of the data's order, of samples and of random inits", type=int, metavar="N")
        flag(group, "shard", "under torchrun, split the model's weights over the processes: for one that no card can hold; turns "
             "--compile off", **on)
    flag(group, "device", "cpu, cuda, cuda:1, … (default: cuda where there is one)", metavar="D")
    flag(group, "dtype", "of the frozen model: float32 or bfloat16 (default: float32 on a CPU, else bfloat16)", metavar="T")
    if train:
        flag(group, "compile", "torch.compile the forward and backward; needs a C++ compiler and Python.h", **on)
        flag(group, "recompute", "run each block again in the backward instead of keeping what it needs: the activations of one "
             "block at a time, for about a third more time", **on)
    group.add_argument("--out", metavar="DIR", help="the run's folder (default runs/TIME-MODEL); an unfinished run of the same settings "
                       "in it goes on" if train else "a new folder" if explain else "a new folder (default runs/TIME-select-MODEL)")


def resolve(args, saved: dict | None = None, needed=("sae", "data")) -> tuple[SimpleNamespace, dict[str, str]]:
    """Settings of a run and {name: where it came from}, from parsed flags and the settings of the run it resumes.

    Raises InputError for a flag that contradicts the resumed run, a missing one (by name), or a value out of range.
    """
    given = {name: value for name, value in vars(args).items() if value is not None and name in NAMES}
    given |= {name: absolute(given[name]) for name in given.keys() & set(PLACES)}
    saved = saved or {}
    if given.get("steps") and given.get("epochs"):
        raise InputError("--steps and --epochs: give one of them")
    for name in given.keys() & saved.keys() - {"device"}:
        if jsonable(given[name]) != saved[name]:
            raise InputError(f"--{name.replace('_', '-')} {given[name]} contradicts the run in {args.resume}, which has "
                             f"{saved[name]}: leave it out, or start a new run with another --out")
    model = given.get("model") or saved.get("model") or "toy"
    for name, value in saved.items():
        _check_kind(name, value)
    values: dict = {}
    source: dict[str, str] = {}
    for origin, layer in (("default", COMMON | {"model": "toy", "sae": None, "data": None}), (f"recipe {model}", RECIPES.get(model, {})),
                          ("resumed run", saved), ("flag", given)):
        values |= layer
        source |= dict.fromkeys(layer, origin)
    if given.get("epochs"):                                     # what was said outweighs the recipe's number of steps
        values["steps"] = None
    missing = [name for name in needed if not values.get(name)]
    if missing:
        known = model in RECIPES or Path(model).expanduser().is_dir()
        raise InputError(f"{model} has no recipe: give {' and '.join('--' + name for name in missing)}"
                         + ("" if known else f". Recipes are for {', '.join(RECIPES)}; another name is a hub repository, or a folder"))
    if not values.get("layers"):
        values["layers"], source["layers"] = _layers_in(values["sae"]), "SAE folder"
    if not values["width"]:
        values["width"], source["width"] = _width_in(values["sae"], values["layers"]), "SAE folder"
    if values["device"] is None:
        values["device"], source["device"] = "cuda" if torch.cuda.is_available() else "cpu", "this machine"
    if values["dtype"] is None:
        values["dtype"] = "float32" if values["device"] == "cpu" else "bfloat16"
        source["dtype"] = f"{values['device']}'s"
    if values["alpha"] is None:
        values["alpha"], source["alpha"] = float(values["rank"]), "the rank"
    if values["top_k"] is None:
        by_loss = values["select"] in BY_LOSS
        values["top_k"], source["top_k"] = (2 * values["rank"], "twice the rank") if by_loss else (TOP_K, "default")
    values = jsonable({name: values[name] for name in NAMES})
    _check(values)
    return SimpleNamespace(**values), {name: source[name] for name in NAMES}


def folder(model: str | Path) -> str | Path:
    """Where a model's files are: the toy's folder beside this file, or the name itself, a folder or hub repository."""
    return TOY if model == "toy" else model


def base_of(adapter: str | Path) -> str:
    """The base model that an adapter's own configuration names, where it is in RECIPES or a folder here by its whole path:
    nothing is fetched from the hub because a file says so. Raises InputError."""
    named = read_json(locate(adapter, "adapter_config.json")).get("base_model_name_or_path")
    if not isinstance(named, str) or named not in RECIPES and not (named.startswith("/") and Path(named).is_dir()):
        raise InputError(f"{adapter} names {f'{named[:80]!r} as its' if isinstance(named, str) else 'no'} base model: give --model")
    return named


NAMES = ("model", "sae", "layers", "data", *COMMON)
PLACES = ("model", "sae", "data", "harmless", *SETS)


def absolute(place):
    """A file or folder here by its absolute path, so that a run can be resumed from elsewhere; other names as they are."""
    path = Path(place).expanduser()
    return str(path.absolute()) if place and place not in RECIPES and path.exists() else place


def saved(run: str | Path) -> SimpleNamespace:
    """The settings of a run, from its config.json. Raises InputError if the folder holds none."""
    path = Path(run).expanduser() / "config.json"
    if not path.is_file():
        raise InputError(f"{run} holds no run (no config.json)")
    settings = read_json(path).get("settings")
    if not isinstance(settings, dict) or settings.keys() != set(NAMES):
        raise InputError(f"{path} is not the configuration of a run of this version")
    return SimpleNamespace(**settings)


def jsonable(value):
    """The same value as it reads back from config.json."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _layers_in(source):
    folder = Path(source).expanduser()
    layers = sorted(int(path.name[6:]) for path in folder.glob("layer_*") if path.name[6:].isdecimal())
    if not layers:
        raise InputError(f"{source}: say --layers" + (": it has no layer_N folder" if folder.is_dir() else
                         ", or give a folder with layer_N/width_W/average_l0_X/params.npz"))
    return layers


def _width_in(source, layers):
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(f"{source}: say --width (16k, 65k, 131k, …)")
    for layer in layers:
        if not (folder / f"layer_{layer}").is_dir():
            raise InputError(f"--layers {layer}: {source} holds layers {', '.join(map(str, _layers_in(source)))}")
    widths = sorted(path.name[6:] for path in (folder / f"layer_{layers[0]}").glob("width_*"))
    if len(widths) != 1:
        raise InputError(f"{source}: say --width" + (f", one of {', '.join(widths)}" if widths else ": it has no width_W folder"))
    return widths[0]


LIMITS = {  # smallest and largest value that makes sense
    "rank": (1, 1 << 20), "top_k": (1, 1 << 24), "tau": (1e-9, 1), "pairs": (0, 1e12), "alpha": (1e-6, 1e6), "steps": (1, 1e12),
    "epochs": (1e-6, 1e6), "lr": (1e-12, 1e3), "warmup": (0, 1), "clip": (0, 1e9), "weight_decay": (0, 1e3), "ema": (0, 0.999999),
    "batch_tokens": (2, 1 << 24), "accumulate": (1, 1 << 20), "save_every": (1, 1e12), "max_new_tokens": (1, 8192),
    "eval_prompts": (0, 1e12), "eval_batch": (1, 1 << 20), "looks": (0, 1000), "explain": (0, 1 << 20), "seed": (0, 2**63 - 1)}
FRACTIONS = ("tau", "alpha", "epochs", "lr", "warmup", "clip", "weight_decay", "ema")
SWITCHES = ("norm_aware", "freeze_basis", "compile", "shard", "recompute")


def _check_kind(name, value):
    """Raise InputError for a setting of the wrong kind: out of an edited config.json."""
    kind = (int, float) if name in FRACTIONS else int if name in (*LIMITS, "l0") else bool if name in SWITCHES else \
        list if name == "layers" else str
    if value is None and name in ("l0", "steps", "data", "harmless", *SETS):
        return
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise InputError(f"--{name.replace('_', '-')} {str(value)[:80]} is of the wrong kind")


def _check(values):
    for name, value in values.items():
        _check_kind(name, value)
    if not all(isinstance(layer, int) and 0 <= layer < 1000 for layer in values["layers"]):
        raise InputError(f"--layers {values['layers']}: give numbers of blocks, from 0")
    for name, (low, high) in LIMITS.items():
        if values[name] is not None and not low <= values[name] <= high:
            raise InputError(f"--{name.replace('_', '-')} {values[name]}: give a value from {low:g} to {high:g}")
    if values["freeze_basis"] and values["init"] == "random":
        raise InputError("--freeze-basis keeps the update in the basis that --init puts in; random puts in none: take sails or orthonormal")
    if values["dtype"] not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {values['dtype']}: Gemma-2's residual stream outgrows float16's 65504; use bfloat16 or float32"
                         if values["dtype"] in ("float16", "fp16", "half") else
                         f"--dtype {values['dtype']}: give float32 or bfloat16")
    if values["shard"] and parallel.world_size() == 1:
        raise InputError("--shard splits the model over processes: start them with `torchrun --nproc-per-node N`")
    if parallel.world_size() > 1 and values["device"].startswith("cuda:"):
        raise InputError(f"--device {values['device']}: each process of torchrun has a card of its own; give cuda or cpu")
    check_device(values["device"])


def check_device(name: str) -> str:
    """The device's name, if this machine has it. Raises InputError."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise InputError(f"--device {name}: give cpu or cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
