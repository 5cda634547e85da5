"""What an adapter learned: explain a run's adapter, or anybody's, and write a page of it.

    python -m report RUN               # RUN/explain.json unless there, then RUN/report.html
    python -m report RUN --explain 24  # again, and twice as many features are tested
    python -m report RUN RUN RUN       # a table; runs that differ in their seed alone are one line
    python -m report --adapter DIR --model google/gemma-2-2b --out explained
                                       # any LoRA adapter for Gemma-2 in PEFT's layout

A feature that is tested takes one batched pass over 48 answers, and six more for its side of the
layer. The prompts are answered a dozen times.
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch

import lora
from data import load_tokenizer
from features import load_subspaces
from model import load_config, load_model
from report.effects import NUM_FEATURES
from report.explain import NUM_ANSWERED, explain
from report.page import VERBS, top_tokens, write_page
from run import parallel
from run.files import (ROOT, InputError, Parser, data_file, is_new, positive, read_json,
                       read_tensors, table, write_json)
from run.readers import read_pairs
from run.places import check_places, moved_settings
from run.session import FIRST, limit_threads
from run.settings import (add_flags, base_of, given_settings, model_folder, resolve,
                          saved_settings)
from sae import load_saes
from safety.sets import load_sets

FLAGS = ("model", "sae", "layers", "width", "l0", "data", "sets", "device")


def explain_to(path, adapter, settings, args, trained=(), features=(), subspaces=None):
    """Explain the adapter in a folder, and write explain.json.

    trained: turns of prompts that are not asked.
    """
    # What is small is read first, so that a wrong name ends soon
    folder = model_folder(settings.model)
    config = load_config(folder)
    saes = load_saes(settings.sae, settings.layers, settings.width, settings.l0, settings.device,
                     config)
    tokenizer = load_tokenizer(folder)
    files = settings.sets or {}
    places = {role: (role, file) for role, file in files.items()}
    sets = load_sets(places, trained, settings.eval_prompts)
    model = load_model(folder, getattr(torch, settings.dtype), settings.device)
    limit_threads(model)
    lora.load_adapter(model, adapter)
    about = {"adapter": Path(adapter).name, "model": settings.model, "sae": settings.sae}
    first_step = None
    if (Path(adapter) / FIRST).exists():
        first_step = read_factors(Path(adapter) / FIRST)
    explanation = explain(model, saes, tokenizer, sets, settings, features, subspaces, first_step,
                          args.prompts, args.explain or NUM_FEATURES)
    write_json(path, about | explanation)


def read_factors(adapter) -> dict:
    """{module name: (A, B)} of an adapter of ours."""
    tensors = read_tensors(adapter / lora.WEIGHTS)
    factors = defaultdict(dict)
    for key, tensor in tensors.items():
        name, letter, _ = key.removeprefix(lora.PREFIX).rsplit(".", 2)
        factors[name][letter] = tensor
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in factors.items()}


def explain_run(run, args):
    """Explain a run of train.py, on the prompts that it was evaluated on.

    Flags may say where its model, SAEs, data or sets are now, and the device.
    """
    settings = moved_settings(run, given_settings(args))
    check_places(settings)
    parallel.check_device(settings.device)
    if settings.method == "full":
        raise InputError(f"{run} trained the weights themselves: there is no adapter to explain")
    if not settings.sae:
        raise InputError(f"{run} knows no SAEs: `python -m report --adapter {run} --sae DIR`")
    if not (run / "scores.json").exists():
        raise InputError(f"{run} isn't finished: go on with `python train.py --resume {run}`")
    # Prompts that it was trained on are not asked
    pairs, _ = read_pairs(data_file(settings.data))
    trained = {pair.turns for pair in pairs}
    # A run that chose no features has no such files
    features = ()
    subspaces = None
    if (run / "subspace.safetensors").exists():
        features = read_json(run / "features.json", list)
        subspaces = load_subspaces(run / "subspace.safetensors")
    explain_to(run / "explain.json", run, settings, args, trained, features, subspaces)


def adapter_settings(args):
    """Settings to explain --adapter with: flags, else of the run that it may be, else recipes."""
    given = given_settings(args)
    config = Path(args.adapter).expanduser() / "config.json"
    saved = {}
    if config.is_file() and "settings" in read_json(config):
        saved = vars(saved_settings(args.adapter))
    # The run's layers and widths are those of its own SAEs
    kept = ("model", "sets") if args.sae else ("model", "sae", "layers", "width", "l0", "sets")
    saved = {name: saved[name] for name in kept if saved.get(name) and name not in given}
    if "model" not in saved:
        args.model = args.model or base_of(args.adapter)
    return resolve(args, saved, needed=("sae", "sets"))[0]


def findings(explanation) -> str:
    """What was learned and which features carry it, each beside its control."""
    learned = explanation["learned"]
    gain = f"{learned['gain']['mean']:+.4f}"
    untrained = learned["untrained"]
    name = next(iter(untrained), None)
    control = f"; {name} alone {untrained[name]['mean']:+.4f}" if name else ""
    lines = [f"{learned['prompts']} held-out answers, {learned['answers']}, are likelier by {gain} "
             f"nats each{control}"]
    if not learned["something"]:
        return "\n".join([*lines, "nothing was learned beyond that: no feature is named"])
    named = [entry for entry in explanation["features"] if entry["named"]]
    lines.append(f"features named by effect: {len(named)} of {len(explanation['features'])} tested")
    rows = []
    for entry in named:
        others = entry["untrained"]
        turned = max(value for name, value in others.items() if name.startswith("turned"))
        key = f"{entry['layer']}/{entry['index']}"
        rows.append([f"{VERBS[entry['side']]} {key}", top_tokens(explanation["words"][key], entry),
                     f"{entry['cost']['mean']:.3f}", f"{entry['random']['mean']:.3f}",
                     f"{others.get('first step', math.nan):.3f}", f"{turned:.3f}"])
    head = ["feature", "fires on, promotes", "cost of removing, nats", "random directions",
            "first step", "turned"]
    return "\n".join([*lines, table(rows, head, right=range(2, 6))] if rows else lines)


# ------------------------------------------------------------------------------
# The table of runs

COLUMNS = {"safe": ("harmful", "safe"), "safe, jailbreak": ("jailbreak", "safe"),
           "over-refusal": ("lookalike", "over_refusal"), "benign right": ("benign", "correct")}
ASKED = ("data", "sets", "eval_prompts", "format", "max_new_tokens")    # prompts, and how


def runs_table(runs) -> str:
    """One line for each configuration among runs [(settings, scores)], over its seeds."""
    # What differs between the runs names a line
    first = vars(runs[0][0])
    differing = [name for name in first if name != "seed"
                 and any(getattr(settings, name) != first[name] for settings, _ in runs)]
    asked = [name for name in differing if name in ASKED]
    bases = {}
    groups = defaultdict(list)
    for settings, scores in runs:
        groups[", ".join(values_of(settings, differing)) or "all runs"].append(scores)
        base = [f"base model, {settings.model}", *values_of(settings, asked)]
        bases[", ".join(base)] = scores

    # The base answers the same prompts alike; an adapter's figures are means over seeds
    rows = []
    for label, scores in bases.items():
        rows.append([label, None, *figures([scores], "base"), None, None, None])
    for label, group in groups.items():
        row = [label, len(group), *figures(group, "adapter")]
        for key in ("subspace", "first_step", "random"):
            row.append(mean_and_sd([scores["share"].get(key) for scores in group]))
        rows.append(row)
    head = ["%, mean ± sd over seeds", "seeds", *COLUMNS, "ΔW in subspace", "first step",
            "in random bases"]
    return table(rows, head, right=range(1, len(head)))


def values_of(settings, names):
    """Settings as text, files of this folder by their paths in it."""
    values = []
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, dict):
            value = " ".join(f"{role}={file}" for role, file in value.items())
        text = str(value).replace(f"{ROOT}/", "")
        values.append(f"{name.replace('_', '-')} {text}")
    return values


def figures(group, model):
    """The COLUMNS of one line, over the scores of its runs."""
    cells = []
    for name, key in COLUMNS.values():
        shares = [scores["sets"][model].get(name, {}).get(key) for scores in group]
        cells.append(mean_and_sd([share and share["rate"] for share in shares]))
    return cells


def mean_and_sd(values):
    """Shares in per cent; None where one is missing."""
    if None in values:
        return None
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main():
    parser = Parser(__doc__)
    parser.prog = "python -m report"
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="a run of train.py")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter in PEFT's layout")
    parser.add_argument("--prompts", metavar="N", type=positive, default=NUM_ANSWERED,
                        help=f"prompts of each set (default {NUM_ANSWERED})")
    parser.add_argument("--explain", metavar="N", type=positive,
                        help=f"features that are tested, a pass each (default {NUM_FEATURES})")
    parser.add_argument("--out", metavar="DIR", type=Path, help="with --adapter: a new folder")
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    has_adapter = bool(args.adapter)
    if bool(args.runs) == has_adapter or has_adapter != bool(args.out):
        raise InputError("give folders of finished runs, or --adapter DIR --out DIR")
    if len(args.runs) > 1:
        runs = [(saved_settings(run), read_json(run / "scores.json")) for run in args.runs]
        return print(runs_table(runs))
    folder = args.out or args.runs[0]
    # Anybody's adapter goes into a new folder; a run that is explained is only drawn again
    if args.adapter:
        if not is_new(folder):
            raise InputError(f"{folder} is there and isn't empty: give another --out")
        settings = adapter_settings(args)
        settings.norm_aware = True       # directions as the residual stream has them
        explain_to(folder / "explain.json", args.adapter, settings, args)
    elif args.explain or not (folder / "explain.json").exists():
        explain_run(folder, args)
    explanation = read_json(folder / "explain.json")
    print(findings(explanation))
    print(f"page: {write_page(folder)}")


if __name__ == "__main__":
    parallel.run(main)
