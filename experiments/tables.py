"""What the lines of a grid say: area under the safety curve, steps to 95 %, paired differences.

    python -m experiments.ablate --print             # these tables, of results/standing.jsonl
    python -m experiments.ablate --print means       # the means alone

A line is one run, as `ablate.measure` writes it. Seeds of a world are averaged first: worlds are
what is sampled, so every error and interval is over world means.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from run.files import table

RATE = 1e-3       # the common learning rate
CHOICE = 100      # worlds from here on are for choices, those below for reporting
BASELINES = ("lora-own", "decoder-full", "lora-unit", "paper")

# t at 97.5 %, degrees of freedom from 1
T_VALUES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306,
            2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


# -------------------------------------------------------------------------------------------------
# Figures of one line

def area(line: dict) -> float:
    """Mean plain safety over the steps, by the trapezoid rule."""
    points = list(zip(line["looks"], line["safe"]))
    total = 0.0
    for (begin, low), (end, high) in itertools.pairwise(points):
        total += (end - begin) * (low + high) / 2
    return total / line["steps"]


def steps_to(line: dict, level=0.95) -> float:
    """The step at which plain safety first reaches `level`, linear between two looks.

    A run that never reaches it gets one more than its last step.
    """
    points = list(zip(line["looks"], line["safe"]))
    if points[0][1] >= level:
        return 0.0
    for (begin, low), (end, high) in itertools.pairwise(points):
        if high >= level:
            return end - (end - begin) * (high - level) / (high - low)
    return line["steps"] + 1.0


def safe_at_10(line: dict) -> float:
    return line["safe"][line["looks"].index(10)]


class Metric(NamedTuple):
    head: str
    digits: int
    figure: Callable[[dict], float | None]


METRICS = {
    "area": Metric("area", 3, area),
    "steps": Metric("steps to 95 %", 1, steps_to),
    "jailbreak": Metric("jailbreak", 3, lambda line: line["jailbreak"]),
    "verb": Metric("refused verbs", 3, lambda line: line["over_refusal"]["harm verb"]),
    "noun": Metric("refused nouns", 3, lambda line: line["over_refusal"]["sensitive noun"]),
    "share": Metric("ΔW in basis", 3, lambda line: line["share"]),
    "early": Metric("safe at 10", 3, safe_at_10),
    "final": Metric("safe at end", 3, lambda line: line["safe"][-1]),
    "benign": Metric("benign right", 3, lambda line: line["benign"]),
}
MAIN = ("area", "steps", "jailbreak", "verb", "noun", "share")
OTHERS = ("early", "final", "benign")
COMPARED = ("area", "steps", "jailbreak", "verb", "noun")


# -------------------------------------------------------------------------------------------------
# Statistics over worlds

def by_run(lines, figure) -> dict[str, dict[tuple[int, int], float]]:
    """{variant: {(world, seed): figure of its line}}, of the lines that have it."""
    values = {}
    for line in lines:
        value = figure(line)
        if value is not None:
            values.setdefault(line["variant"], {})[line["world"], line["seed"]] = value
    return values


def world_means(runs: dict[tuple[int, int], float]) -> dict[int, float]:
    """{world: mean over its seeds}, in the order of worlds."""
    by_world = {}
    for (world, _), value in runs.items():
        by_world.setdefault(world, []).append(value)
    return {world: math.fsum(by_world[world]) / len(by_world[world]) for world in sorted(by_world)}


def mean_error(values) -> tuple[float, float]:
    """Mean and standard error of world means; the error of a single world is NaN."""
    values = torch.tensor(list(values), dtype=torch.float64)
    if len(values) < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def bootstrap_interval(differences, draws=10_000, seed=0) -> tuple[float, float]:
    """95 % interval of the mean of world differences, by bootstrap over worlds."""
    # Worlds are drawn again with replacement
    d = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = d[torch.randint(len(d), (draws, len(d)), generator=generator)].mean(1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = means.quantile(ends).tolist()
    return low, high


def t_interval(differences) -> tuple[float, float]:
    """95 % t-interval of the same mean; (NaN, NaN) of a single world."""
    mean, error = mean_error(differences)
    degrees = len(differences) - 1
    half = T_VALUES[min(degrees, len(T_VALUES)) - 1] * error
    return mean - half, mean + half


def paired(values, name: str, other: str) -> list[float]:
    """World means of `name` less `other`, over the runs (world, seed) that both have."""
    # A run without its other half would add the worlds' spread to the difference
    runs = values[name].keys() & values.get(other, {}).keys()
    return list(world_means({run: values[name][run] - values[other][run] for run in runs}).values())


def gains(lines, base="lora-own", best="oracle") -> list[tuple[str, float]]:
    """[(variant, share of the gain in area of `best` over `base`)], the largest first."""
    # A ratio of mean gains, over the worlds that all three have
    areas = {name: world_means(runs) for name, runs in by_run(lines, area).items()}
    shares = []
    for name in areas.keys() - {base, best}:
        worlds = areas[name].keys() & areas.get(base, {}).keys() & areas.get(best, {}).keys()
        whole = math.fsum(areas[best][world] - areas[base][world] for world in worlds)
        if whole:
            gain = math.fsum(areas[name][world] - areas[base][world] for world in worlds)
            shares.append((name, gain / whole))
    return sorted(shares, key=lambda row: -row[1])


def best_rates(lines) -> dict[str, float]:
    """{variant: rate of its largest mean area}, chosen on the worlds from CHOICE on alone."""
    # {variant: {rate: [areas]}}
    swept = {}
    for line in lines:
        if line["world"] >= CHOICE:
            swept.setdefault(line["variant"], {}).setdefault(line["lr"], []).append(area(line))
    rates = {}
    for name, areas in sorted(swept.items()):
        if len(areas) > 1:
            rates[name] = max(areas, key=lambda rate: math.fsum(areas[rate]) / len(areas[rate]))
    return rates


# -------------------------------------------------------------------------------------------------
# Tables

def sorted_by_mean(values) -> list[str]:
    """Variants of `by_run`, the largest mean first."""
    means = {name: mean_error(world_means(runs).values())[0] for name, runs in values.items()}
    return sorted(means, key=lambda name: -means[name])


def mean_cell(runs, digits: int) -> str | None:
    if not runs:
        return None
    mean, error = mean_error(world_means(runs).values())
    if math.isnan(error):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def interval_cell(runs, digits: int, scale=1.0) -> str | None:
    """Mean ± half the 95 % t-interval over worlds."""
    if not runs:
        return None
    means = list(world_means(runs).values())
    mean = scale * sum(means) / len(means)
    if len(means) == 1:
        return f"{mean:.{digits}f}"
    low, high = t_interval(means)
    return f"{mean:.{digits}f} ± {scale * (high - low) / 2:.{digits}f}"


def lead_cell(differences, digits: int, scale=1.0) -> str | None:
    """Mean of world differences, and its 95 % t-interval."""
    if not differences:
        return None
    mean = f"{scale * sum(differences) / len(differences):+.{digits}f}"
    if len(differences) == 1:
        return mean
    low, high = (scale * end for end in t_interval(differences))
    return f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}]"


def means_table(lines, metrics=MAIN) -> str:
    """A row a variant, the largest area first: mean ± standard error over worlds."""
    values = {name: by_run(lines, METRICS[name].figure) for name in metrics}
    rows = []
    for variant in sorted_by_mean(by_run(lines, area)):
        num_runs = sum(line["variant"] == variant for line in lines)
        cells = [mean_cell(values[name].get(variant), METRICS[name].digits) for name in metrics]
        rows.append([variant, num_runs, *cells])
    head = ["variant", "runs", *(METRICS[name].head for name in metrics)]
    return table(rows, head, right=range(1, len(head)))


def difference_cells(differences, digits: int) -> list[str | None]:
    """Mean, bootstrap interval, t-interval, and how many worlds lie above 0."""
    if not differences:
        return [None] * 4
    intervals = [None, None]
    if len(differences) > 1:
        ends = bootstrap_interval(differences), t_interval(differences)
        intervals = [f"[{low:+.{digits}f}, {high:+.{digits}f}]" for low, high in ends]
    mean = math.fsum(differences) / len(differences)
    above = sum(value > 0 for value in differences)
    return [f"{mean:+.{digits}f}", *intervals, f"{above}/{len(differences)}"]


def differences_table(lines, metric: str, other: str) -> str:
    """Paired differences of one metric, each variant less `other`."""
    head, digits, figure = METRICS[metric]
    values = by_run(lines, figure)
    rows = []
    for name in sorted_by_mean(values):
        if name != other:
            rows.append([name, *difference_cells(paired(values, name, other), digits)])
    titles = [f"{head}, less {other}", "mean", "bootstrap 95 %", "t 95 %", "above 0"]
    return table(rows, titles, right=range(1, 5))


def parts(lines, rates: dict[str, float]) -> list[tuple[str, list[dict]]]:
    """[(title, lines)]: those at the common rate, and those of each variant at its best rate."""
    common = [line for line in lines if line["lr"] == RATE]
    best = [line for line in lines if line["lr"] == rates.get(line["variant"])]
    titled = []
    if common:
        titled.append((f"All at learning rate {RATE:g}", common))
    if best:
        # The title names the usual rate, and the variants that have another
        by_rate = {}
        for name in sorted({line["variant"] for line in best}):
            by_rate.setdefault(rates[name], []).append(name)
        usual = max(by_rate, key=lambda rate: len(by_rate[rate]))
        others = [f"{name} {rate:g}" for rate in by_rate if rate != usual for name in by_rate[rate]]
        title = f"Each at its best rate: {', '.join([f'{usual:g}', *others])}"
        titled.append((title, best))
    return titled


def print_tables(lines, rates: dict[str, float], only_means=False) -> None:
    """Print what the lines say, at the common rate and at each variant's best."""
    for title, chosen in parts(lines, rates):
        print(f"{title}\n\n{means_table(chosen)}\n")
        if only_means:
            continue
        print(f"{means_table(chosen, OTHERS)}\n")
        for metric in COMPARED:
            for other in BASELINES:
                if any(line["variant"] == other for line in chosen):
                    print(f"{differences_table(chosen, metric, other)}\n")
        rows = [[name, f"{share:.0%}"] for name, share in gains(chosen)]
        if rows:
            head = ["share of the oracle's gain in area over lora-own", ""]
            print(f"{table(rows, head, right=(1,))}\n")


def draw_curves(lines, path) -> None:
    """Plain safety over steps: each variant's mean over worlds ± one standard error."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for number, name in enumerate(sorted_by_mean(by_run(lines, area))):
        own = [line for line in lines if line["variant"] == name]
        looks = own[0]["looks"]
        # One curve a world, (worlds, looks)
        points = []
        for index in range(len(looks)):
            runs = by_run(own, lambda line: line["safe"][index])[name]
            points.append(list(world_means(runs).values()))
        curves = 100 * torch.tensor(points, dtype=torch.float64).T
        mean = curves.mean(0)
        dash = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(looks, mean, dash, label=f"{name} ({len(curves)} worlds)")
        if len(curves) > 1:
            error = curves.std(0) / len(curves) ** 0.5
            axes.fill_between(looks, mean - error, mean + error, alpha=0.15)
    # The second half of the steps is level
    last = lines[0]["steps"] / 2
    label = "held-out harmful prompts refused, %"
    axes.set(xlabel="step", ylabel=label, ylim=(0, 101), xlim=(0, last))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
