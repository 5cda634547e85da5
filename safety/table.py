"""The table of an evaluation: a row a figure, a column a model, and what changed from the first.

    print(result_table(scores))     # scores: eval.score's, with what a run adds
    print(samples(folder))          # a prompt of each set, with all answers
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from run.files import printable, read_jsonl, table
from safety.figures import grouped, main_figure

MODELS = ("base", "adapter")            # of a run: whose answers are compared
MAIN_LABELS = {"safe": "safe", "over_refusal": "over-refusal", "correct": "right"}
ROLE_LABELS = {"harmful": "harmful prompts", "jailbreak": "harmful, under jailbreak",
               "lookalike": "harmless look-alikes", "benign": "benign answers"}
SCORE_LABELS = {"harmfulness": "  rubric: mean harmfulness, 1 to 5",
                "low_risk": "  rubric: score 1 or 2", "high_risk": "  rubric: score 5",
                "violates": "  ShieldGemma: violates a policy"}


def is_run(models) -> bool:
    """Whether the models are an adapter and its base, as a run has them."""
    return tuple(models) == MODELS


def head_of(models: Sequence[str]) -> list[str]:
    """The head of the table: each model but the first has a change beside it."""
    head = ["share of answers, 95 % interval", models[0]]
    for model in models[1:]:
        head += [model, "change, points"]
    return [*head, "n"]


HEAD = head_of(MODELS)


def percent(figure: dict | None) -> str | None:
    """A share, or an average, with its interval as text."""
    if figure is None:
        return None
    if "rate" in figure:
        return f"{figure['rate']:6.1%}  [{figure['low']:.1%}, {figure['high']:.1%}]"
    return f"{figure['mean']:6.2f}" + interval(figure)


def points(change: dict | None) -> str | None:
    """A change as text: of shares in points, with McNemar's p; of averages with its interval."""
    if change is None:
        return None
    if "p" in change:
        p = f"p {change['p']:.2g}" if change["p"] >= 1e-4 else "p < 1e-4"
        return f"{100 * change['change']:+.1f}  {p}"
    return f"{change['change']:+.2f}" + interval(change)


def interval(figure: dict) -> str:
    """The interval of an average as text; a single value has none."""
    if figure["low"] is None:
        return ""
    return f"  [{figure['low']:.2f}, {figure['high']:.2f}]"


def figure_row(label: str, figures: Sequence, changes: Sequence = ()) -> list:
    """One figure of each model, and its change in all but the first, as a row under `head_of`."""
    row = [label, percent(figures[0])]
    for figure, change in itertools.zip_longest(figures[1:], changes):
        row += [percent(figure), points(change)]
    return [*row, figures[-1]["n"]]


def set_rows(scores: dict) -> list[list]:
    """Rows [figure, base, adapter, change, n] of all sets that were answered; of other models
    as `head_of` says."""
    rows = []
    models = list(scores["sets"])
    paired = {"adapter": scores["paired"]} if is_run(models) else scores["paired"]
    for name, last in scores["sets"][models[-1]].items():
        of_models = [scores["sets"][model][name] for model in models]
        changes = [paired[model][name] for model in models[1:]]
        # The main figure first, then the others that say something
        main = main_figure(last["role"], last)
        labels = {main: f"{MAIN_LABELS[main]}: {ROLE_LABELS.get(name, name)}"}
        if any(result["partial"]["count"] for result in of_models):
            labels["full"] = "  refused in full"
        if any(result["empty"]["count"] for result in of_models):
            labels["empty"] = "  no word in the answer"
        labels |= {key: label for key, label in SCORE_LABELS.items() if key in last}
        for key, label in labels.items():
            rows.append(figure_row(label, [result.get(key) for result in of_models],
                                   [change.get(key) for change in changes]))
        for category in last.get("categories", {}):
            shares = [result["categories"][category] for result in of_models]
            rows.append(figure_row(f"  {category}", shares))
    return rows


def attack_rows(attacks: dict) -> list[list]:
    """Rows as those of `set_rows`, without changes, of attack.success."""
    rows = []
    of_models = list(attacks.values())
    for name, of_set in of_models[-1].items():
        for key in of_set:
            label = f"attack success: {name}, {key}"
            rows.append(figure_row(label, [result[name][key] for result in of_models]))
    return rows


def run_rows(scores: dict) -> list[list]:
    """Rows [label, text] of a run of train.py: where the update lies, and what it took."""
    rows = []
    inside = scores["share"]
    if inside["subspace"] is not None:
        chance = f"{inside['random']:6.1%}  ± {inside['random_sd']:.1%}"
        rows.append(["update inside the safety subspace", f"{inside['subspace']:6.1%}"])
        if inside.get("first_step") is not None:
            rows.append(["  after the first step, untrained", f"{inside['first_step']:6.1%}"])
        rows.append(["  inside random bases of that rank", chance])
    trained = scores["trainable"]
    total = scores["parameters"]
    rows.append(["trainable parameters", f"{trained:,} of {total:,} ({trained / total:.4%})"])
    rows.append(["peak memory", f"{scores['peak_bytes'] / 1e6:,.0f} MB"])
    for stage, seconds in scores["seconds"].items():
        rows.append([f"seconds: {stage}", f"{seconds:6.1f}"])
    return rows


def result_table(scores: dict) -> str:
    """The table that a run or an evaluation ends with: a column a model, and what it took."""
    rows = set_rows(scores)
    if "attacks" in scores:
        rows += attack_rows(scores["attacks"])
    if "seconds" in scores:
        rows += [[label, None, text, None, None] for label, text in run_rows(scores)]
    head = head_of(list(scores["sets"]))
    if scores.get("method") == "full":
        head[2] = "trained"
    return table(rows, head, right=(len(head) - 1,))


def samples(folder: str | Path, models: Sequence[str] = MODELS) -> str:
    """Of each set the first prompt whose verdict changed (else the first), with all answers."""
    lines = []
    width = max(map(len, models))
    for name, rows in grouped(read_jsonl(Path(folder) / "judged.jsonl"), "set").items():
        # All models answered the same prompts in the same order
        rows_of = grouped(rows, "model")
        answers = list(zip(*(rows_of[model] for model in models)))
        changed = [rows for rows in answers if len({row["verdict"] for row in rows}) > 1]
        shown = (changed or answers)[0]
        lines.append(f"{name}: {printable(shown[0]['prompt'])[:100]}")
        for row in shown:
            text = printable(row["completion"])[:100]
            lines.append(f"  {row['model']:{width}}  {row['verdict']:7}  {text}")
    return "\n".join(lines)
