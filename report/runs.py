"""The table of one run, until it is eval.py's."""  # alias until the rooms meet

from pathlib import Path

import figures
from run import settings as recipe
from run.files import printable, read_json, read_jsonl, table


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
        base, adapter = (attacks.get(who, {}).get(name) for who in figures.WHO)
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


def read_scores(folder):
    """The scores.json of a finished run."""
    return read_json(Path(folder) / "scores.json")
