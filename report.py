"""What a person looks at: the table of a run, and of many runs together.

    python report.py RUN                   # the table that the run ended with
    python report.py RUN RUN RUN …         # runs that differ in their seed alone are one line: mean ± standard deviation
"""

import statistics
from pathlib import Path

import files
import recipe
from files import InputError, read_json


def table(rows, head=(), right=()):
    """Aligned plain text of `rows`, lists of cells; columns whose index is in `right` end flush. None is shown as –."""
    cells = [["–" if cell is None else str(cell) for cell in row] for row in ([list(head)] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    if head:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def settings_table(settings, source):
    """Every setting, its value and where it came from."""
    show = {name: value if value is not None else "–" for name, value in vars(settings).items()}
    return table([[name, " ".join(map(str, value)) if isinstance(value, list) else value, source[name]]
                  for name, value in show.items()], ["setting", "value", "from"])


LABELS = {"harmful": ("safe: harmful prompts", "safe"), "jailbreak": ("safe: harmful, under jailbreak", "safe"),
          "lookalike": ("over-refusal: harmless look-alikes", "over_refusal"), "benign": ("right: benign answers", "correct")}
ASIDE = {"partial": "refused, then gave some of it", "empty": "no word in the answer"}      # shown where there are any


def result_table(scores):
    """The table that a run ends with: base beside adapter, what the adapter costs, and where the time went."""
    def cell(figures, key):
        if not figures or (share := figures.get(key)) is None:
            return None
        return f"{share['rate']:6.1%}  [{share['low']:.1%}, {share['high']:.1%}]"

    rows = []
    for name, (label, key) in LABELS.items():
        base, adapter = (scores["sets"].get(who, {}).get(name) for who in ("base", "adapter"))
        if not adapter:
            rows.append([f"{label} (not measured: give --{name})", None, None, None])
            continue
        if name == "benign" and key not in adapter:
            label, key = "over-refusal: benign prompts", "over_refusal"
        rows.append([label, cell(base, key), cell(adapter, key), adapter["n"]])
        rows += [[f"  {words}", cell(base, kind), cell(adapter, kind), adapter["n"]] for kind, words in ASIDE.items()
                 if any(figures and figures[kind]["count"] for figures in (base, adapter))]
    share = scores.get("share", {})
    if share.get("subspace") is not None:
        rows.append(["update inside the safety subspace", None, f"{share['subspace']:6.1%}", None])
        rows.append(["  inside random bases of that rank", None, f"{share['random']:6.1%}  ± {share['random_sd']:.1%}", None])
    if "trainable" in scores:
        rows.append(["trainable parameters", None, f"{scores['trainable']:,} of {scores['parameters']:,} "
                     f"({scores['trainable'] / scores['parameters']:.4%})", None])
    if "peak_bytes" in scores:
        rows.append(["peak memory", None, f"{scores['peak_bytes'] / 1e6:,.0f} MB", None])
    rows += [[f"seconds: {stage}", None, f"{seconds:6.1f}", None] for stage, seconds in scores.get("seconds", {}).items()]
    return table(rows, ["share of answers, 95 % interval", "base", "adapter", "n"], right=(3,))


def samples(folder):
    """Of each set of a run the first prompt whose verdict has changed, with both answers; the first one if none has."""
    rows = files.read_jsonl(Path(folder) / "judged.jsonl")
    after = {(row["set"], row["line"]): row for row in rows if row["model"] == "adapter"}
    pairs = [(row, after[row["set"], row["line"]]) for row in rows if row["model"] == "base"]
    lines = []
    for name in recipe.SETS:
        here = sorted((pair for pair in pairs if pair[0]["set"] == name), key=lambda pair: pair[0]["verdict"] == pair[1]["verdict"])
        for base, adapter in here[:1]:
            lines.append(f"{name}: {_short(base['prompt'])}")
            lines += [f"  {row['model']:7}  {row['verdict']:7}  {_short(row['completion'])}" for row in (base, adapter)]
    return "\n".join(lines)


def _short(text, most=100):
    """The beginning of a text on one line, with nothing in it that could steer a terminal."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else text[:most - 1] + "…"


def read_scores(folder):
    """A finished run's scores.json. Raises InputError."""
    path = Path(folder) / "scores.json"
    if not path.exists():
        raise InputError(f"{folder} isn't finished: go on with `python train.py --resume {folder}`")
    scores = read_json(path)
    if not all(isinstance(scores.get(key), dict) for key in ("sets", "share", "seconds")):
        raise InputError(f"{path} is not the scores of a run: `python train.py` writes them at its end")
    return scores


def runs_table(runs):
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
                    + [cell([figure(scores, who, name, key) for scores in group]) for name, (_, key) in LABELS.items()]
                    + [cell([scores["share"][key] for scores in group]) if who == "adapter" else None for key in ("subspace", "random")])
    head = ["%, mean ± sd over seeds", "seeds", "safe", "safe, jailbreak", "over-refusal", "benign right", "ΔW in subspace", "in random bases"]
    return table(rows, head, right=range(1, len(head)))


def main():
    parser = files.Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a finished run of train.py")
    runs = [(recipe.saved(folder), read_scores(folder)) for folder in parser.parse_args().runs]
    print(result_table(runs[0][1]) if len(runs) == 1 else runs_table(runs))


if __name__ == "__main__":
    files.run(main)
