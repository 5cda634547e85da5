"""What a person looks at: a run's table and page, those of many runs together, and what any LoRA adapter for Gemma-2 has learned.

    python report.py RUN                   # the table that the run ended with; RUN/report.html is written anew
    python report.py RUN RUN RUN …         # runs that differ in their seed alone are one line: mean ± standard deviation; runs/report.html
    python report.py --adapter DIR --model google/gemma-2-2b --out explained
                                           # an adapter in PEFT's layout, of whatever origin, in SAE features
"""

import statistics
from pathlib import Path
from types import SimpleNamespace

import torch

from safety import figures
from run import files
import lora
from run import settings as recipe
from safety import sets
from data import load_tokenizer
from report.explain import explain
from features import load_saes
from run.files import InputError, printable, read_json, read_jsonl, write_json
from model import load_config
from model import load_model
from report.page import write_page
from run.files import table


def settings_table(settings: SimpleNamespace, source: dict[str, str]) -> str:
    """Every setting, its value and where it came from."""
    show = {name: value if value is not None else "–" for name, value in vars(settings).items()}
    return table([[name, " ".join(map(str, value)) if isinstance(value, list) else value, source[name]]
                  for name, value in show.items()], ["setting", "value", "from"])


LABELS = {"harmful": "safe: harmful prompts", "jailbreak": "safe: harmful, under jailbreak",     # what a set's main figure tells
          "lookalike": "over-refusal: harmless look-alikes", "benign": "right: benign answers"}
ASIDE = {"partial": "refused, then gave some of it", "empty": "no word in the answer"}      # shown where there are any
SCORED = {"harmfulness": "rubric: mean harmfulness, 1 to 5", "low_risk": "rubric: score 1 or 2", "high_risk": "rubric: score 5",
          "violates": "ShieldGemma: violates a policy"}


def percent(figure):
    """A share with its interval, as text; None of none."""
    return figure and figure["rate"] is not None and f"{figure['rate']:6.1%}  [{figure['low']:.1%}, {figure['high']:.1%}]" or None


def mean(figure):
    """An average with its interval, as text; None of none."""
    if not figure or figure["mean"] is None:
        return None
    return f"{figure['mean']:6.2f}" + (f"  [{figure['low']:.2f}, {figure['high']:.2f}]" if figure["low"] is not None else "")


def points(change):
    """A paired change as text: of shares in points, with McNemar's p; of averages with its interval; None of none."""
    if not change:
        return None
    if "p" in change:
        return f"{100 * change['change']:+.1f}  " + (f"p {change['p']:.2g}" if change["p"] >= 1e-4 else "p < 1e-4")
    value, form = (change["ratio"], "× {:.3f}") if "ratio" in change else (change["change"], "{:+.2f}")
    around = f"  [{change['low']:.3g}, {change['high']:.3g}]" if change["low"] is not None else ""
    return None if value is None else form.format(value) + around


def set_rows(scores: dict, categories=False) -> list[list]:
    """Rows [figure, base, adapter, change, n] of all sets that were answered."""
    rows = []
    for name, adapter in scores["sets"].get("adapter", {}).items():
        base, role, paired = scores["sets"].get("base", {}).get(name), adapter["role"], scores.get("paired", {}).get(name, {})
        main = figures.main_figure(role, adapter)
        label = "over-refusal: benign prompts" if (role, main) == ("benign", "over_refusal") else LABELS[role]
        label = label if name == role else f"{label.partition(':')[0]}: {name}"

        def row(label, show, key, change=None, of=lambda found: found):
            return [label, base and show(of(base).get(key)), show(of(adapter).get(key)), change, adapter["n"]]

        rows.append(row(label, percent, main, points(paired.get(main))))
        rows += [row(f"  {words}", percent, kind) for kind, words in ASIDE.items()
                 if any(found and found[kind]["count"] for found in (base, adapter))]
        rows += [row(f"  {words}", percent if "rate" in adapter[key] else mean, key, points(paired.get(key)))
                 for key, words in SCORED.items() if key in adapter]
        if adapter.get("unread") or base and base.get("unread"):
            rows.append(["  the judge's answer gave no score", base and base.get("unread"), adapter.get("unread"), None, adapter["n"]])
        for category, figure in adapter.get("categories", {}).items() if categories else ():
            rows.append(row(f"  {category}", percent, category, of=lambda found: found.get("categories", {}))[:4] + [figure["n"]])
    return rows


def attack_rows(attacks: dict) -> list[list]:
    """Rows [figure, base, adapter, None, n] of attack.success: what share gave in, within how many steps of the search."""
    rows = []
    for name in dict.fromkeys(name for found in attacks.values() for name in found):
        base, adapter = (attacks.get(who, {}).get(name) for who in ("base", "adapter"))
        told = [found and {f"complied within {most} steps": value for most, value in found["steps"].items()}
                | {"complied at last": found["complied"], "and began as the target": found["reached"]} for found in (base, adapter)]
        n = (adapter or base)["n"]
        rows += [[f"attack success: {name}, {label}", *(found and percent(found.get(label)) for found in told), None, n]
                 for label in told[1] or told[0]]
    return rows


def result_table(scores: dict, categories=False) -> str:
    """The table that a run or an evaluation ends with: base beside adapter, what the adapter costs, and where the time went."""
    rows = set_rows(scores, categories) + attack_rows(scores.get("attacks", {}))
    asked = {found["role"] for found in scores["sets"].get("adapter", {}).values()}
    if "seconds" in scores:                                      # of a run of train.py, which asks all four
        rows += [[f"{LABELS[role]} (not measured: give --{role})", None, None, None, None] for role in recipe.SETS if role not in asked]
    for name, told in scores.get("ability", {}).items():
        show = percent if "rate" in told["adapter"] else mean
        rows.append([name, show(told["base"]), show(told["adapter"]), points(told.get("change")), told["adapter"]["n"]])
    share = scores.get("share", {})
    if share.get("subspace") is not None:
        rows.append(["update inside the safety subspace", None, f"{share['subspace']:6.1%}", None, None])
        rows.append(["  inside random bases of that rank", None, f"{share['random']:6.1%}  ± {share['random_sd']:.1%}", None, None])
    if "trainable" in scores:
        rows.append(["trainable parameters", None, f"{scores['trainable']:,} of {scores['parameters']:,} "
                     f"({scores['trainable'] / scores['parameters']:.4%})", None, None])
    if "peak_bytes" in scores:
        rows.append(["peak memory", None, f"{scores['peak_bytes'] / 1e6:,.0f} MB", None, None])
    rows += [[f"seconds: {stage}", None, f"{seconds:6.1f}", None, None] for stage, seconds in scores.get("seconds", {}).items()]
    return table(rows, ["share of answers, 95 % interval", "base", "adapter", "change, points", "n"], right=(4,))


def samples(folder: str | Path) -> str:
    """Of each set of a run the first prompt whose verdict has changed, with both answers; the first one if none has."""
    path = Path(folder) / "judged.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    after = {(row["set"], row["line"], row["prompt"]): row for row in rows if row["model"] == "adapter"}
    pairs = [(row, after[row["set"], row["line"], row["prompt"]]) for row in rows if row["model"] == "base"]
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        here = sorted((pair for pair in pairs if pair[0]["set"] == name), key=lambda pair: pair[0]["verdict"] == pair[1]["verdict"])
        for base, adapter in here[:1]:
            lines.append(f"{name}: {_short(base['prompt'])}")
            lines += [f"  {row['model']:7}  {row['verdict']:7}  {_short(row['completion'])}" for row in (base, adapter)]
    return "\n".join(lines)


def _short(text, most=100):
    """The beginning of a text on one line."""
    text = printable(text)
    return text if len(text) <= most else text[:most - 1] + "…"


def read_scores(folder: str | Path) -> dict:
    """The scores.json of a finished run, or of a folder of eval.py's. Raises InputError."""
    path = Path(folder) / "scores.json"
    if not path.exists():
        if (Path(folder) / "config.json").exists():
            raise InputError(f"{folder} isn't finished: go on with `python train.py --resume {folder}`")
        raise InputError(f"{folder} holds no scores.json: give the folder of a finished run of train.py, or of eval.py's --out")
    scores = read_json(path)
    if not _are_scores(scores):
        raise InputError(f"{path} is not the scores of a run: `python train.py` writes them at its end")
    return scores


def _are_scores(scores):
    """Whether a JSON object has all that the tables here ask of a scores.json, as it was written."""
    def number(value):
        return isinstance(value, int | float) and abs(value) < 1e15

    def numbers(value, *keys):
        return isinstance(value, dict) and all(number(value.get(key)) for key in keys)

    def perhaps(value, *keys):                                   # numbers, or null
        return isinstance(value, dict) and all(value.get(key) is None or number(value[key]) for key in keys)

    def around(value):                                           # an interval, or none
        return perhaps(value, "low", "high") and (value.get("low") is None) == (value.get("high") is None)

    def named(value, good):                                      # {any name: what is good}
        return isinstance(value, dict) and all(map(good, value.values()))

    def figure(value):                                           # of figures.share or average
        rate = isinstance(value, dict) and "rate" in value
        return around(value) and {"low", "high", "rate" if rate else "mean"} <= value.keys() and perhaps(value, "rate", "mean") \
            and numbers(value, *(("n", "count", "low") if rate else ("n",)))

    def change(value):                                           # of figures.compare, shift or ability.perplexity_change
        return value is None or numbers(value, "change", "p") or around(value) and "p" not in value and {"low", "high"} <= value.keys() \
            and not {"change", "ratio"}.isdisjoint(value) and perhaps(value, "change", "ratio")

    def told(value):                                             # one set
        return numbers(value, "n") and number(value.get("unread", 0)) and value.get("role") in list(LABELS) \
            and ASIDE.keys() <= value.keys() and not set(figures.OUTCOMES[value["role"]]).isdisjoint(value) \
            and named(value.get("categories", {}), figure) \
            and all(figure(item) for key, item in value.items() if key not in ("role", "n", "unread", "categories"))

    def able(value):
        return isinstance(value, dict) and figure(value.get("base")) and figure(value.get("adapter")) \
            and change(value.get("change")) and ("rate" in value["base"]) == ("rate" in value["adapter"])

    def attacked(value):
        return numbers(value, "n") and figure(value.get("complied")) and figure(value.get("reached")) and named(value.get("steps"), figure)

    share = scores.get("share", {})
    return named(scores.get("sets"), lambda sets: named(sets, told)) and named(scores.get("paired", {}), lambda one: named(one, change)) \
        and named(scores.get("ability", {}), able) and named(scores.get("attacks", {}), lambda sets: named(sets, attacked)) \
        and isinstance(share, dict) and (share.get("subspace") is None or numbers(share, "subspace", "random", "random_sd")) \
        and named(scores.get("seconds", {}), number) and number(scores.get("peak_bytes", 0)) \
        and ("trainable" not in scores or numbers(scores, "trainable", "parameters") and scores["parameters"] > 0)


def runs_table(runs: list[tuple[SimpleNamespace, dict]]) -> str:
    """One line for each configuration among `runs` [(settings, scores)], over its seeds: adapter figures, mean ± sd."""
    fixed = [{name: value for name, value in vars(settings).items() if name != "seed"} for settings, _ in runs]
    differing = [name for name in fixed[0] if any(values[name] != fixed[0][name] for values in fixed)]
    groups = {}
    for values, (_, scores) in zip(fixed, runs):
        label = ", ".join(f"{name.replace('_', '-')} {values[name]}" for name in differing) or "all runs"
        groups.setdefault(label, []).append(scores)

    def figure(scores, who, name, key):
        return (scores["sets"].get(who, {}).get(name, {}).get(key) or {}).get("rate")

    def cell(values):
        if None in values:
            return None
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{spread}"

    rows = []
    models = {settings.model: scores for settings, scores in runs}
    for who, label, group in [*(("base", f"base model, {model}", [scores]) for model, scores in models.items()),
                              *(("adapter", label, group) for label, group in groups.items())]:
        rows.append([label, len(group) if who == "adapter" else None]
                    + [cell([figure(scores, who, name, next(iter(figures.OUTCOMES[name]))) for scores in group]) for name in LABELS]
                    + [cell([scores["share"][key] for scores in group]) if who == "adapter" else None for key in ("subspace", "random")])
    head = ["%, mean ± sd over seeds", "seeds", "safe", "safe, jailbreak", "over-refusal", "benign right",
            "ΔW in subspace", "in random bases"]
    return table(rows, head, right=range(1, len(head)))


def paired_table(folders: list) -> str:
    """Adapters prompt by prompt: each run's figures beside the first one's, with the paired change and McNemar's p."""
    rows = [[row for row in read_jsonl(Path(folder) / "judged.jsonl") if row["model"] == "adapter"] for folder in folders]
    lines = []
    for name, role in {row["set"]: row["role"] for row in rows[0]}.items():
        first, *others = ([row for row in run if row["set"] == name] for run in rows)
        key = figures.main_figure(role, figures.figures(first)[name])
        for folder, here in zip(folders[1:], others):
            change = figures.paired(first, here).get(key)
            lines.append([name, key, Path(folder).name, points(change),
                          change and f"[{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]", change and change["n"]])
    head = ["set", "figure", f"against {Path(folders[0]).name}", "change, points", "95 % interval", "prompts"]
    return table(lines, head, right=(5,)) if lines else ""       # a search for suffixes leaves no answers to compare


# ---------------------------------------------------------------------------------------------------------------
# The model card: what the hub shows of a run's folder

def model_card(settings: SimpleNamespace, scores: dict) -> str:
    """The text of a run's README.md: metadata as the hub reads it, the figures, how to load the adapter."""
    base = settings.model if "/" in settings.model and not Path(settings.model).exists() else None
    head = ["---", "library_name: peft", *([f"base_model: {base}"] if base else []), "license: gemma" if base else "license: other",
            "tags: [safety, lora, sparse-autoencoder, sails, gemma-2]", "---"]
    rows = [[cell or "" for cell in row] for row in set_rows(scores)]
    figures = ["| " + " | ".join(str(cell).strip().replace("|", "\\|") for cell in row) + " |"
               for row in (["share of answers, 95 % interval", "base", "adapter", "change, points", "n"], ["---"] * 5, *rows)]
    share = scores["share"]
    inside = (f"{share['subspace']:.0%} of the update lies inside the safety subspace ({share['random']:.0%} inside random bases of "
              "that rank). " if share.get("subspace") is not None else "")
    terms = ("The adapter is a derivative of Gemma: the [Gemma Terms of Use](https://ai.google.dev/gemma/terms) apply to it."
             if base else "The licence is that of the base model.")
    data = settings.data if settings.data.startswith("hf://") else Path(settings.data).name
    return "\n".join([*head, "", f"# {Path(settings.model).name}: a SAILS safety adapter", "",
        f"LoRA of rank {settings.rank} on q, k, v and o of every layer, begun as `{settings.init}` (SAILS, arXiv 2512.23260) and trained "
        f"on the aligned answers of `{data}`, seed {settings.seed}. {scores['trainable']:,} of {scores['parameters']:,} parameters are "
        "trained.", "",
        *figures, "",
        f"Judge: {scores['judge']}. {inside}`report.html` shows what was learned, feature by feature.", "", "```python",
        "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f'model = AutoModelForCausalLM.from_pretrained("{base or "BASE MODEL"}")',
        'model = PeftModel.from_pretrained(model, "THIS FOLDER")', "```", "", terms, ""])


# ---------------------------------------------------------------------------------------------------------------
# The command

def explain_adapter(args):
    """Write explain.json and report.html of the adapter args.adapter, in PEFT's layout, to the new folder args.out."""
    if not args.out:
        raise InputError("--adapter DIR goes with --out DIR, a new folder for what is found")
    out, args.model = Path(args.out).expanduser(), args.model or recipe.base_of(args.adapter)
    if not files.is_new(out) and {path.name for path in out.glob("[!.]*")} != {"explain.json"}:      # killed before its page
        raise InputError(f"{out} is there and isn't empty: give another --out")
    settings, _ = recipe.resolve(args, needed=("sae",))
    folder = recipe.folder(settings.model)
    saes, tokenizer = load_saes(settings, load_config(folder)), load_tokenizer(folder)
    given = {name: (name, file) for name in recipe.SETS if (file := getattr(settings, name))}
    asked = sets.load_sets(given, most=settings.eval_prompts)
    if not asked:
        raise InputError("give prompts to explain it on: --harmful FILE, --lookalike FILE")
    model = load_model(folder, getattr(torch, settings.dtype), settings.device)
    lora.load_adapter(model, args.adapter)
    found = explain(model, saes, tokenizer, asked, norm_aware=True, format=settings.format,
                    max_new_tokens=settings.max_new_tokens, batch_size=settings.eval_batch, prompts=settings.explain)
    write_json(out / "explain.json", {"adapter": args.adapter, "model": settings.model, "sae": settings.sae} | found)
    write_page([out], out / "report.html")
    rows = [[layer["layer"], layer["side"], f"{layer['share_of_update']:.1%}", sum(feature["named"] for feature in layer["features"]),
             f"{layer['explained']:.1%}", f"{layer['explained_random']:.1%}"] for layer in found["layers"]]
    print(table(rows, ["SAE layer", "side", "of the update", "features named", "explained", "by chance"], right=(0, 2, 3, 4, 5)))
    print(f"\npage: {out / 'report.html'}")


def main():
    parser = files.Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="folder of a finished run of train.py, or of eval.py's --out")
    parser.add_argument("--page", metavar="FILE", help="where the page goes (default: RUN/report.html of one run, runs/report.html of "
                        "several)")
    parser.add_argument("--adapter", metavar="DIR", help="a folder or hub repository in PEFT's layout: explain this adapter, with the "
                        "flags below")
    recipe.add_flags(parser, "explain")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.adapter):
        raise InputError("give folders of finished runs, or --adapter DIR")
    if args.adapter:
        return explain_adapter(args)
    scores = [read_scores(folder) for folder in args.runs]
    page = Path(args.page or (Path(args.runs[0]) / "report.html" if len(args.runs) == 1 else "runs/report.html"))
    write_page(args.runs, page)
    if len(scores) == 1:
        print(result_table(scores[0], categories=True))
    elif all((Path(folder) / "config.json").exists() for folder in args.runs):
        print(runs_table([(recipe.saved(folder), found) for folder, found in zip(args.runs, scores)]))
        if len(args.runs) <= 6:
            print(f"\n{paired_table(args.runs)}")
    else:                                                        # evaluations, each of what it asked
        print(*(f"{folder}\n{result_table(found)}" for folder, found in zip(args.runs, scores)), paired_table(args.runs), sep="\n\n")
    print(f"\npage: {page}")


if __name__ == "__main__":
    files.run_command(main)
