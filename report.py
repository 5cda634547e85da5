"""What a person looks at: tables."""


def table(rows, head=(), right=()):
    """Aligned plain text of `rows`, lists of cells; columns whose index is in `right` end flush. None is shown as –."""
    cells = [["–" if cell is None else str(cell) for cell in row] for row in ([list(head)] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    if head:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


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
