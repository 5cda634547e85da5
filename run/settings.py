"""Settings: each declared once, recipes by exact model name, and where a run's values came from.

A value comes from the command line, else from the run that goes on, else from the model's recipe,
else from its default here. SAILS states no top-k, learning rate, batch, number of steps or alpha:
those are our choice (docs/method.md).
"""

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from run import parallel
from run.files import BEHIND, ROOT, InputError, locate, moved_place, read_json, table

TOY = ROOT / "toy"
HH_RLHF = "hf://datasets/Anthropic/hh-rlhf/harmless-base"
HELPFUL = "hf://datasets/Anthropic/hh-rlhf/helpful-base"
JBB = "hf://datasets/JailbreakBench/JBB-Behaviors/data"
TOP_K = 20
ROLES = {  # what a set of prompts is asked for
    "harmful": "harmful prompts: the safety rate",
    "jailbreak": "harmful prompts behind a jailbreak",
    "lookalike": "harmless prompts that look harmful: over-refusal",
    "benign": 'harmless prompts; rows with "answer": [words] are checked for them',
}


# The hub holds no plain file of jailbroken prompts
GEMMA = {"data": f"{HH_RLHF}/train.jsonl.gz",
         "sets": {"harmful": f"{HH_RLHF}/test.jsonl.gz",
                  "jailbreak": f"{BEHIND}{JBB}/harmful-behaviors.csv",
                  "lookalike": f"{JBB}/benign-behaviors.csv",
                  "benign": f"{HELPFUL}/test.jsonl.gz"}, "width": "16k", "compile": True}
SCOPE_2B = {"sae": "google/gemma-scope-2b-pt-res", "layers": [5, 10, 15, 20]}
SCOPE_9B = {"sae": "google/gemma-scope-9b-pt-res", "layers": [10, 15, 20, 25, 30]}
SCOPE_9B_IT = {"sae": "google/gemma-scope-9b-it-res", "layers": [9, 20, 31]}
SCOPE_27B = {"sae": "google/gemma-scope-27b-pt-res", "layers": [10, 22, 34], "width": "131k"}
RECIPES: dict[str, dict] = {
    "toy": {"sae": str(TOY / "sae"), "layers": [1, 2, 3],
            "data": str(TOY / "data/train.jsonl"),
            "sets": {role: str(TOY / f"data/{role}.jsonl") for role in ROLES},
            "lr": 1e-3, "steps": 100, "batch_tokens": 512, "accumulate": 2, "max_new_tokens": 24,
            "eval_prompts": 0, "eval_batch": 256},
    "google/gemma-2-2b": GEMMA | SCOPE_2B,
    "google/gemma-2-2b-it": GEMMA | SCOPE_2B,
    "google/gemma-2-9b": GEMMA | SCOPE_9B,
    "google/gemma-2-9b-it": GEMMA | SCOPE_9B_IT,
    "google/gemma-2-27b": GEMMA | SCOPE_27B,
    "google/gemma-2-27b-it": GEMMA | SCOPE_27B,
}


@dataclass(frozen=True)
class Setting:
    """One setting of a run, with the range of its numbers."""
    name: str
    default: object
    kind: type                                     # list: of whole numbers; dict: {role: file}
    help: str
    choices: tuple[str, ...] = ()
    low: float = 0


GROUPS = {
    "model and SAEs": [
        Setting("model", "toy", str, f"{', '.join(RECIPES)}, another hub repository, or a folder"),
        Setting("sae", None, str, "hub repository or folder in Gemma Scope's layout"),
        Setting("layers", None, list, "SAE layers (default: the recipe's, or all of a folder)"),
    ],
    "data and selection (SAILS section 3)": [
        Setting("data", None, str, 'pairs, rows with "chosen" and "rejected" (conversations, or '
                "answers to a prompt); or, where nothing is selected, one answer a row (chosen, "
                "response, output, messages); .jsonl, .json, .csv or .parquet, plain or .gz; "
                "hf://datasets/OWNER/NAME/PATH is fetched"),
        Setting("format", "chat", str, "chat: Gemma's turns, put in by id; plain: Human: and "
                "Assistant: as text", choices=("chat", "plain")),
        Setting("select", "paper", str, "paper: the features of largest |Δ|, the difference of "
                "mean activations; gradient: by the gradients of the loss on the two answers"),
        Setting("score", "delta", str, "what --select paper ranks by, the largest first; delta: "
                "|Δ|, as version 2 of the paper; signed: Δ, so that only features are chosen that "
                "fire more on aligned answers; rho: Δ / max(E_unaligned|a|, ε), as version 1, "
                "where we take each feature's own E and ε = 1e-6 (with the maximum over all "
                "features instead it would choose as signed does)",
                choices=("delta", "signed", "rho")),
        Setting("top_k", None, int, f"features kept of each SAE layer (default {TOP_K}; with "
                "--select gradient twice the rank)", low=1),
        Setting("tau", 0.8, float, "share of the squared singular values of the chosen decoder "
                "directions that the subspace keeps, at most --rank directions", low=1e-9),
        Setting("center", False, bool, "subtract the mean of the chosen decoder directions before "
                "the PCA: U then spans what they differ by"),
        Setting("tokens", "response", str, "tokens whose activations are averaged: the response's, "
                "or all with the prompt", choices=("response", "all")),
        Setting("norm_aware", False, bool, "map directions through Gemma-2's norm gains on their "
                "way into the adapter"),
    ],
    "method": [
        Setting("method", "lora", str, "lora: adapters; full: the weights themselves, without SAEs "
                "and adapters (the paper's full fine-tuning)", choices=("lora", "full")),
        Setting("targets", None, tuple, "modules to train, as q_proj, down_proj, embed_tokens "
                "(default: q, k, v, o with lora, every weight with full)"),
    ],
    "adapter": [
        Setting("rank", 16, int, "rank of the adapters on q, k, v, o of every layer", low=1),
        Setting("alpha", None, float, "the update is alpha/rank · B·A (default: the rank)",
                low=1e-6),
        Setting("init", "sails", str, "how A and B begin; sails: in the safety subspace, random: "
                "LoRA's own, orthonormal: a random basis"),
        Setting("freeze_basis", False, bool, "train only the factor that isn't the basis: the "
                "update can't leave the subspace"),
    ],
    "training": [
        Setting("steps", None, int, "optimizer steps (default: the recipe's, or one pass over the "
                "data)", low=1),
        Setting("lr", 2e-4, float, "peak learning rate of AdamW: linear warm-up, then cosine to 0; "
                "--method full takes a tenth of the default", low=1e-12),
        Setting("batch_tokens", 2048, int, "tokens of one packed row, the longest example too; in "
                "selection, of one batch", low=2),
    ],
    "evaluation, before and after": [
        Setting("sets", None, dict, "a file of prompts (.txt, .csv, .jsonl, .json, .parquet, .gz) "
                "and its role: " + ", ".join(ROLES) + "; jailbreak=prefix:FILE asks for a yes"),
        Setting("eval_prompts", 200, int, "prompts taken of each set, always the same; 0: all"),
    ],
    "machine and run": [
        Setting("seed", 0, int, "of the data's order, of samples and of random inits"),
        Setting("device", None, str, "cpu, cuda, cuda:1, … (default: cuda where there is one)"),
        # Gemma-2's residual stream outgrows float16's 65504
        Setting("dtype", None, str, "of the frozen model (default: float32 on a CPU, else "
                "bfloat16)", choices=("float32", "bfloat16")),
        Setting("shard", False, bool, "under torchrun, split the model's weights over the "
                "processes: for one that no card can hold; turns --compile off"),
        Setting("compile", False, bool, "torch.compile the step; needs a C++ compiler, Python.h"),
        Setting("recompute", None, bool, "run each block again in the backward: less memory for a "
                "third more time (default: on for --shard of a 27b)"),
        Setting("log", None, str, "tensorboard: write scalars there too", choices=("tensorboard",)),
    ],
}
# These have no flags of their own: --more NAME=VALUE sets them
MORE = [
    Setting("width", None, str, "SAE width as Gemma Scope names it: 16k, 65k, … (default: the "
            "folder's only one, or 16k)"),
    Setting("l0", None, int, "average L0 in the SAE's folder name (default: the canonical)"),
    Setting("pairs", 2000, int, "pairs that selection looks at, at most, drawn by the seed; "
            "0: all"),
    Setting("warmup", 0.1, float, "share of the steps that warm up"),
    Setting("clip", 1.0, float, "largest norm of a step's gradient; 0: no clipping"),
    Setting("accumulate", 8, int, "packed rows in a step; of each process under torchrun",
            low=1),
    Setting("save_every", 50, int, "steps between checkpoints", low=1),
    Setting("eval_batch", 32, int, "prompts answered at once; on a GPU so many of 512 tokens, "
            "answers included, or more of shorter ones", low=1),
    Setting("max_new_tokens", 128, int, "longest answer", low=1),
]
RARE = {setting.name: setting for setting in MORE}
SETTINGS = {setting.name: setting for group in GROUPS.values() for setting in group} | RARE
PLACES = ("model", "sae", "data", "sets")          # may move between two sessions of a run


# ------------------------------------------------------------------------------
# Flags

def flag(name: str) -> str:
    """How the command line gives a setting."""
    if name == "sets":
        return "--set"
    return ("--more " if name in RARE else "--") + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, names=tuple(SETTINGS)):
    """Add the flags of the settings `names`, and --more for the rare ones among them.

    No flag has a default of argparse's own, so that a value that was given can be told from one
    that was not. Returns the last group, "machine and run", for a command's own flags.
    """
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for setting in settings:
            if setting.name in names:
                name = flag(setting.name)
                group.add_argument(name, dest=setting.name, **_argument(setting))
    lines = [[setting.name.replace("_", "-"), setting.help + _default(setting)]
             for setting in MORE if setting.name in names]
    parser.epilog = f"settings of --more, which are rarely changed:\n{table(lines)}"
    group.add_argument("--more", metavar="NAME=VALUE", nargs="+", action="extend",
                       help="settings that are rarely changed, listed below")
    return group


def _default(setting):
    return "" if setting.default in (None, False) else f" (default {setting.default})"


def _argument(setting):
    """How argparse is to read one setting."""
    arguments = {"help": setting.help + _default(setting), **ARGUMENTS[setting.kind]}
    if setting.choices:
        arguments |= {"choices": setting.choices, "metavar": None}
    return arguments


def _role_and_file(text):
    role, _, file = text.partition("=")
    if role not in ROLES or not file:
        raise argparse.ArgumentTypeError(f"{text}: give ROLE=FILE, a role of {', '.join(ROLES)}")
    return role, file


ARGUMENTS: dict[type, dict] = {
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"metavar": "NAME"},
    list: {"type": int, "nargs": "+", "metavar": "N"},
    tuple: {"nargs": "+", "metavar": "MODULE"},
    dict: {"type": _role_and_file, "action": "append", "metavar": "ROLE=FILE"},
}


def given_settings(args: argparse.Namespace) -> dict:
    """{name: value} of the settings that the command line names. Raises InputError."""
    given = {name: value for name, value in vars(args).items()
             if name in SETTINGS and value is not None}
    for item in args.more or ():
        key, _, text = item.partition("=")
        setting = RARE.get(key.replace("-", "_"))
        if setting is None:
            raise InputError(f"--more {item}: known are {', '.join(RARE).replace('_', '-')}")
        try:
            given[setting.name] = setting.kind(text)
        except ValueError:
            raise InputError(f"--more {item}: {key} is {setting.kind.__name__}") from None
    if "sets" in given:
        given["sets"] = {role: absolute(file) for role, file in given["sets"]}
    for name in given.keys() & {"model", "sae", "data"}:
        given[name] = absolute(given[name])
    return given


def absolute(place: str) -> str:
    """A file or folder here by its absolute path, so that a run can go on from elsewhere."""
    if place.startswith(BEHIND):
        return BEHIND + absolute(place.removeprefix(BEHIND))
    path = Path(place).expanduser()
    return str(path.absolute()) if place not in RECIPES and path.exists() else str(place)


# ------------------------------------------------------------------------------
# From flags, a saved run, recipe and defaults to the settings of a run

def resolve(args: argparse.Namespace, saved: dict | None = None, needed=("sae", "data")
            ) -> tuple[SimpleNamespace, dict[str, str]]:
    """Settings of a run and {name: where it came from}.

    `saved` are the settings of the run that goes on. Only its places and its device may change.
    Raises InputError for a flag that contradicts it, a missing setting, a value out of range.
    """
    given = given_settings(args)
    saved = saved or {}
    for name in given.keys() & saved.keys() - {"device", *PLACES}:
        if given[name] != saved[name]:
            raise InputError(f"{flag(name)} {given[name]} contradicts the run, which has "
                             f"{saved[name]}: leave it out, or start a new run with another --out")
    model = given.get("model") or saved.get("model") or "toy"
    values: dict = {name: setting.default for name, setting in SETTINGS.items()}
    source = dict.fromkeys(SETTINGS, "default")
    recipe = RECIPES.get(model, {})
    for origin, layer in ((f"recipe {model}", recipe), ("the run", saved), ("flag", given)):
        sets = {**(values["sets"] or {}), **(layer.get("sets") or {})}
        values |= layer | {"sets": sets}
        source |= dict.fromkeys(layer, origin)
    # No other init looks at features
    if values["init"] != "sails" or values["method"] == "full":
        needed = [name for name in needed if name != "sae"]
    if missing := [flag(name) for name in needed if not values[name]]:
        raise InputError(f"{model} has no recipe: give {' and '.join(missing)}. Recipes are for "
                         f"{', '.join(RECIPES)}; another name is a hub repository or a folder")
    _leave_to_folder(values, source)
    _derive(values, source)
    _check(values)
    return SimpleNamespace(**values), source


def _leave_to_folder(values, source):
    """Drop the recipe's SAE layers and width where a folder of SAEs holds others."""
    folder = Path(values["sae"] or "").expanduser()
    if not values["sae"] or not folder.is_dir():
        return
    layers = [folder / f"layer_{layer}" for layer in values["layers"] or ()]
    widths = folder.glob(f"layer_*/width_{values['width']}")
    for name, is_there in (("layers", all(map(Path.is_dir, layers))), ("width", any(widths))):
        if source[name].startswith("recipe") and not is_there:
            values[name], source[name] = None, "the folder"


# What full fine-tuning has no use for
ADAPTER = """sae layers width l0 pairs select top_k tau tokens norm_aware rank alpha init
    freeze_basis score center""".split()


def _derive(values, source):
    """Fill in the values that hang on others."""
    device = values["device"] or parallel.default_device()
    by_gradient = values["select"] == "gradient"
    derived = {
        "device": device,
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "alpha": float(values["rank"] or 0),
        "top_k": 2 * values["rank"] if by_gradient else TOP_K,
        # Under --shard by the model's size: run/estimate.py
        "recompute": None if values["shard"] else False,
    }
    for name, value in derived.items():
        if values[name] is None:
            values[name], source[name] = value, "derived"
    if values["method"] == "full":
        _derive_full(values, source)


def _derive_full(values, source):
    """Drop what only adapters have, and lower a learning rate that nobody gave."""
    for name in ADAPTER:
        if source[name] == "flag":
            raise InputError(f"{flag(name)} belongs to --method lora: leave it out")
        values[name], source[name] = None, "--method full"
    if source["lr"] not in ("flag", "the run"):
        values["lr"], source["lr"] = values["lr"] / 10, "--method full"


def _check(values):
    for name, setting in SETTINGS.items():
        value = values[name]
        if isinstance(value, int | float) and not value >= setting.low:
            raise InputError(f"{flag(name)} {value}: give at least {setting.low:g}")
    if max(values["tau"] or 0, values["warmup"]) > 1:
        raise InputError("--tau and --more warmup are shares: give at most 1")
    if values["freeze_basis"] and values["init"] == "random":
        raise InputError("--freeze-basis needs a basis, and --init random has none: take sails")
    if values["shard"] and parallel.world_size() == 1:
        raise InputError("--shard splits the model over processes: start them with "
                         "`torchrun --nproc-per-node N`")
    if values["shard"] and values["select"] == "gradient":
        raise InputError("--select gradient needs whole weights on each card: leave --shard out")
    if values["select"] not in ("paper", None) and (values["score"] != "delta" or values["center"]):
        raise InputError("--score and --center belong to --select paper")
    if values["log"] and find_spec("tensorboard") is None:
        raise InputError("--log tensorboard: `pip install tensorboard` first")
    parallel.check_device(values["device"])


def saved_settings(run: str | Path) -> SimpleNamespace:
    """Settings of a run, from its config.json; defaults for those that came after it.

    A place that its recipe named is the recipe's of today, so that this folder may move; another
    place may have moved together with the run.
    Raises InputError where the folder holds no run.
    """
    path = Path(run).expanduser() / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "settings" not in config:
        raise InputError(f"{run} holds no run (no config.json with settings)")
    saved = config["settings"]
    source = config.get("source", {})
    recipe = RECIPES.get(saved.get("model"), {})
    moved = {name: moved_place(saved.get(name), config.get("folder"), run) for name in PLACES}
    moved |= {name: recipe[name] for name in PLACES
              if name in recipe and source.get(name, "").startswith("recipe")}
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    known = {name: value for name, value in saved.items() if name in SETTINGS}
    return SimpleNamespace(**defaults | known | moved)


def settings_table(settings: SimpleNamespace, source: dict[str, str]) -> str:
    """Every setting, its value and where it came from."""
    rows = []
    for name, value in vars(settings).items():
        if isinstance(value, dict):
            rows += [[f"set {role}", file, source[name]] for role, file in value.items()]
        else:
            rows.append([name, value, source[name]])
    return table(rows, ["setting", "value", "from"])


def model_folder(model: str | Path) -> str | Path:
    """Where a model's files are: the toy's folder, or the name itself (a folder or repository)."""
    return TOY if model == "toy" else model


def base_of(adapter: str | Path) -> str:
    """The base model that an adapter names: a recipe's, or a folder here by its whole path.

    Nothing is fetched from the hub because a file says so. Raises InputError.
    """
    name = read_json(locate(adapter, "adapter_config.json")).get("base_model_name_or_path")
    name = str(name)
    if name not in RECIPES and not (name.startswith("/") and Path(name).is_dir()):
        raise InputError(f"{adapter} names {name[:80]!r} as its base model: give --model")
    return name
