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


def result_table(scores):
    """The table that a run ends with: base beside adapter, what the adapter costs, and where the time went."""
    def cell(figures, key):
        if figures is None or figures.get(key) is None:
            return None
        share = figures[key]
        return f"{share['rate']:6.1%}  [{share['low']:.1%}, {share['high']:.1%}]"

    sets, rows = scores["sets"], []
    for name, (label, key) in LABELS.items():
        figures = {who: sets.get(who, {}).get(name) for who in ("base", "adapter")}
        if name == "benign" and figures["adapter"] and figures["adapter"].get(key) is None:
            label, key = "over-refusal: benign prompts", "over_refusal"
        n = figures["adapter"]["n"] if figures["adapter"] else None
        rows.append([label if n else f"{label} (not measured: give --{name})",
                     cell(figures["base"], key), cell(figures["adapter"], key), n])
    share = scores.get("share", {})
    if share.get("subspace") is not None:
        rows.append(["update inside the safety subspace", None, f"{share['subspace']:6.1%}", None])
        rows.append(["  inside random bases of that rank", None, f"{share['random']:6.1%}  ± {share['random_sd']:.1%}", None])
    if "trainable" in scores:
        rows.append(["trainable parameters", None, f"{scores['trainable']:,} of {scores['parameters']:,} "
                     f"({scores['trainable'] / scores['parameters']:.4%})", None])
    rows += [[f"seconds: {stage}", None, f"{seconds:6.1f}", None] for stage, seconds in scores.get("seconds", {}).items()]
    return table(rows, ["", "base", "adapter", "n"], right=(3,))


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
    for who, label, group in [("base", "base model", [runs[0][1]]),
                              *(("adapter", label, group) for label, group in groups.items())]:
        rows.append([label, len(group)] + [cell([figure(scores, who, name, key) for scores in group]) for name, (_, key) in LABELS.items()]
                    + [cell([scores["share"][key] for scores in group]) if who == "adapter" else None for key in ("subspace", "random")])
    head = ["%, mean ± sd over seeds", "seeds", "safe", "safe, jailbreak", "over-refusal", "benign right", "ΔW in subspace", "in random bases"]
    return table(rows, head, right=range(1, len(head)))


def main():
    parser = recipe.Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a finished run of train.py")
    runs = []
    for folder in parser.parse_args().runs:
        settings, path = recipe.saved(folder), Path(folder) / "scores.json"
        if not path.exists():
            raise InputError(f"{folder} isn't finished: go on with `python train.py --resume {folder}`")
        runs.append((settings, read_json(path)))
    print(result_table(runs[0][1]) if len(runs) == 1 else runs_table(runs))


if __name__ == "__main__":
    files.run(main)
