"""report.html: what an adapter learned and did, on one page that opens from disk, made from the JSON files of runs alone.

    write_page(["runs/a"], "runs/a/report.html")
    write_page(["runs/a", "runs/b"], "both.html")        # side by side

A section is a function from runs to markup. Whatever a model, a data set or a file's name says is text there: see markup.py.
"""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

from run import files
from safety.figures import OUTCOMES, paired
SCORED, WHO = ("harmfulness", "low_risk", "high_risk", "violation", "violates"), ("base", "adapter")
from run.files import InputError
from report.markup import (Html, bars, curve, details, document, escape, folded, is_number, join, note, number, percent, probability, strip,
                    table, tag)

FILES = {"config": dict, "scores": dict, "features": list, "explain": dict, "metrics": None, "judged": None,      # None: JSON lines
         "eval": dict, "attacks": None}                                                    # of evaluations, eval.py --out
MAKE = {"config": "train.py --out", "scores": "train.py --resume", "features": "train.py --resume", "metrics": "train.py --resume",
        "explain": "report.py --out explained --adapter", "judged": "eval.py"}


def read_run(folder: str | Path, count: int) -> SimpleNamespace:
    """What a folder's files say, None for each that isn't there; `broken` says which can't be read, and why."""
    folder = Path(folder).expanduser()
    run = SimpleNamespace(folder=folder, name=folder.resolve().name, colour=f"c{(count - 1) % 6 + 1}", key=f"r{count}", broken=[])
    for name, kind in FILES.items():
        path, value = folder / f"{name}.json{'' if kind else 'l'}", None
        try:
            if path.exists():
                value = files.read_json(path, kind) if kind else files.read_jsonl(path)
        except (InputError, OSError) as error:
            run.broken.append(str(error))
        setattr(run, name, value)
    if not run.broken and all(getattr(run, name) is None for name in FILES):
        raise InputError(f"{folder} holds no file of a run ({', '.join(FILES)}): give the folder of a run of train.py")
    for row in run.judged or []:
        row.setdefault("role", row.get("set"))
    run.chosen = [feature for feature in run.features or [] if isinstance(feature, dict)]
    run.words = {key_of(feature): feature for feature in run.chosen}
    words = get(run.explain, "words")
    for key, feature in words.items() if isinstance(words, dict) else ():
        if isinstance(feature, dict):
            run.words[key] = feature | run.words.get(key, {})
    return run


def get(value, *keys):
    """value[key][key]…, or None where there is no such thing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def command(run, name):
    return tag("code", f"python {MAKE[name]} {shlex.quote(str(run.folder))}")


def missing(run, name: str) -> Html:
    """Says that a file isn't there, and what makes it."""
    if run.eval is not None:
        return note(f"{run.name} is not finished: the same command of eval.py goes on with it.")
    if run.config is None and name != "explain":
        return note(f"{run.name} was not trained here: its folder has no {name} file.")
    return note(f"{run.name} holds no {name}.json{'' if FILES[name] else 'l'}: ", command(run, name), " makes it.")


def chip(run, label=None, colour=None) -> Html:
    """A run's name, or another label, behind a dot in its colour."""
    return tag("span", run.name if label is None else label, class_=f"chip {colour or run.colour}")


def who(run, model, label="adapter") -> Html:
    return chip(run, "base", "c0") if model == "base" else chip(run, label)


# ---------------------------------------------------------------------------------------------------------------
# 1 What happened

SETS = {"harmful": "harmful prompts", "jailbreak": "harmful prompts behind a jailbreak", "lookalike": "harmless look-alikes",
        "benign": "benign prompts"}
MAIN = {"safe": "refused in full ↑", "over_refusal": "refused ↓", "correct": "answered right ↑", "low_risk": "rubric 1 or 2 ↑",
        "harmfulness": "mean harmfulness, 1 to 5 ↓", "high_risk": "rubric 5 ↓", "violates": "a violation, says ShieldGemma ↓"}


def change(run, name, key):
    """figures.paired of a run's answers with its base model's, or None."""
    base, adapter = ([row for row in run.judged or [] if (row.get("model"), row.get("set")) == (model, name)]
                     for model in ("base", "adapter"))
    return paired(base, adapter).get(key) if base and adapter and key in (*OUTCOMES.get(adapter[0]["role"], ()), *SCORED) else None


def figure(value, test=None) -> Html:
    """A share or an average with its 95 % interval; below it its change, paired."""
    def interval(found, times, form):
        return f"[{number(times * found['low'], form)}, {number(times * found['high'], form)}]" if is_number(get(found, "low")) else ""

    shares = is_number(get(value, "rate"))
    main = percent(value["rate"]) if shares else number(get(value, "mean"))
    around = interval(value, 100 if shares else 1, ".1f" if shares else ".2f")
    if test and "ratio" in test:
        below = f"× {number(test['ratio'], '.3f')} {interval(test, 1, '.3f')}"
    elif test and "p" in test:
        below = f"{number(100 * test['change'], '+.1f')} {interval(test, 100, '+.1f')}, p {probability(test['p'])}"
    else:
        below = test and f"{number(test['change'], '+.2f')} {interval(test, 1, '+.2f')}"
    return join(main, " ", tag("small", around), tag("div", tag("small", below)) if test else None)


def sentence(run):
    """A run's main figures and the share of its update in the subspace, in words."""
    told = []
    for name, after in (get(run.scores, "sets", "adapter") or {}).items():
        key = next((key for key in OUTCOMES.get(after.get("role", name), ()) if key in after), None)
        if key:
            before, test = get(run.scores, "sets", "base", name, key, "rate"), change(run, name, key)
            told.append(f"{'answers' if key == 'correct' else 'refuses'} {percent(after[key]['rate'])} of {SETS.get(name, name)}"
                        f"{dict(safe=' in full', correct=' right').get(key, '')} (before {percent(before)}"
                        + (", no clear change)" if test and test["p"] >= 0.05 else ")"))
    for name, after in (get(run.scores, "attacks", "adapter") or {}).items():
        base = percent(get(run.scores, "attacks", "base", name, "complied", "rate"))
        told.append(f"complies with {percent(after['complied']['rate'])} of {SETS.get(name, name)} once a suffix is searched for each "
                    f"(the base model {base})")
    for name, found in (get(run.scores, "ability") or {}).items():
        told.append(f"scores {bare(get(found, 'adapter'))} in {name} (before {bare(get(found, 'base'))})")
    share = get(run.scores, "share") or {}
    held = (f" {percent(share['subspace'])} of its update lies in the safety subspace, where random bases of that rank would hold "
            f"{percent(share.get('random'))}.") if is_number(share.get("subspace")) else ""
    words = f"{'; '.join(told)}." if len(told) <= 6 else f"was asked {len(told)} things."       # of many sets the table tells more
    return tag("p", tag("b", run.name), " ", words, held, class_="lead")


def bare(value):
    """A share or an average without its interval."""
    return percent(value["rate"]) if is_number(get(value, "rate")) else number(get(value, "mean"))


def happened(runs):
    scored = [run for run in runs if any(get(run.scores, *keys) for keys in (("sets", "adapter"), ("attacks",), ("ability",)))]
    out: list = [missing(run, "scores") for run in runs if run not in scored]
    if not scored:
        return out

    def before(run):
        """What is told of a run's base model."""
        return [get(run.scores, "sets", "base"), get(run.scores, "attacks", "base"),
                [get(found, "base") for found in (get(run.scores, "ability") or {}).values()]]

    bases = []                                                  # runs whose base model answered as no earlier one's did
    for run in scored:
        if all(before(run) != before(other) for other in bases):
            bases.append(run)
    columns = [(run, "base", "c0", "base" if len(bases) == 1 else f"base of {run.name}") for run in bases]
    columns += [(run, "adapter", run.colour, run.name) for run in scored]

    def names(*path):                                           # of all columns, as they come; WHO is a column's model
        found = (get(run.scores, *(model if key == WHO else key for key in path)) for run, model, *_ in columns)
        return dict.fromkeys(name for one in found for name in one or {})

    def row(label, found, tests, scale=(0, 1)):
        """One figure of all columns: its label, its picture, its cells, n; no row where no column has it."""
        if not any(found):
            return []
        marks = [(get(value, "rate" if "rate" in (value or {}) else "mean"), get(value, "low"), get(value, "high"), colour)
                 for value, (_, _, colour, _) in zip(found, columns)]
        count = next((value["n"] for value in found if get(value, "n")), None)
        return [[label, strip(marks, *scale) if scale else "", *map(figure, found, tests), count]]

    def line(label, name, *keys):
        found = [get(run.scores, "sets", model, name, *keys) for run, model, *_ in columns]
        tests = [None if model == "base" or len(keys) > 1 or not any(found) else change(run, name, keys[0]) for run, model, *_ in columns]
        return row(f"{SETS.get(name, name)}: {label}", found, tests, (1, 5) if keys[0] == "harmfulness" else (0, 1))

    def attacked(label, name, *keys):
        found = [get(run.scores, "attacks", model, name, *keys) for run, model, *_ in columns]
        return row(f"{SETS.get(name, name)} under attack: {label}", found, [None] * len(found))

    def lost(name):
        found = [get(run.scores, "ability", name, model) for run, model, *_ in columns]
        tests = [get(run.scores, "ability", name, "change") if model == "adapter" else None for run, model, *_ in columns]
        return row(name, found, tests, (0, 1) if any(get(value, "rate") is not None for value in found) else None)

    sets = names("sets", WHO)

    head = ["share of answers, 95 % interval", "0 to 100 %", *(chip(run, label, colour) for run, _, colour, label in columns), "n"]
    main = [one for name in sets for key, words in MAIN.items() for one in line(words, name, key)]
    for name in names("attacks", WHO):
        main += [one for most in names("attacks", WHO, name, "steps")
                 for one in attacked(f"complied within {most} steps ↓", name, "steps", most)]
        main += attacked("complied at last ↓", name, "complied") + attacked("and began as the target ↓", name, "reached")
    main += [one for name in names("ability") for one in lost(name)]
    aside = [one for name in sets for key in names("sets", WHO, name) if key not in (*MAIN, "n", "role", "categories", "unread")
             for one in line(key.replace("_", " "), name, key)]
    aside += [one for name in sets for kind in names("sets", WHO, name, "categories") for one in line(kind, name, "categories", kind)]
    out += [sentence(run) for run in scored if len(scored) < 4]
    out += [table(head, main, "results", (0, 1)),
            note("Intervals of shares are Wilson's. Below a figure its change, paired prompt by prompt: of shares in points, with Agresti "
                 "and Min's interval and McNemar's exact p; of averages with the interval of the differences' mean."),
            details("All verdicts, and categories where a set has them", table(head, aside, "all figures", (0, 1))) if aside else None]
    unread = [f"{run.name}, {name}: {count}" for run in scored for name in sets
              if (count := get(run.scores, "sets", "adapter", name, "unread"))]
    out.append(note("Answers that the judge gave no readable score: ", "; ".join(unread)) if unread else None)

    def cost(label, shown, trained=True):
        asked = not trained or any(get(run.scores, "share") for run in scored)
        return [[label, *map(shown, (run.scores for run in scored))]] if asked else []

    costs = [*cost("judge", lambda s: get(s, "judge"), trained=False),
             *cost("update inside the safety subspace", lambda s: percent(get(s, "share", "subspace"))),
             *cost("inside random bases of that rank",
                   lambda s: " ± ".join(percent(get(s, "share", key)) for key in ("random", "random_sd"))),
             *cost("trainable parameters", lambda s: f"{number(get(s, 'trainable'), ',')} of {number(get(s, 'parameters'), ',')}"),
             *cost("peak memory, MB", lambda s: number((get(s, "peak_bytes") or math.nan) / 1e6, ",.0f")),
             *(one for stage in dict.fromkeys(stage for run in scored for stage in get(run.scores, "seconds") or {})
               for one in cost(f"seconds: {stage}", lambda s, stage=stage: number(get(s, "seconds", stage), ".1f")))]
    return [*out, details("What it took" if len(costs) > 1 else "Judge", table(["", *map(chip, scored)], costs, "cost"))]


# ---------------------------------------------------------------------------------------------------------------
# Features and tokens

CONTROL = re.compile("<[a-z_0-9]{1,20}>")


def tokens(text, shade, dim=()) -> Html:
    """Tokens as running text; shade[i] = (0 to 1, title) says how strong a ground token i has; those in `dim` are slanted."""
    text, out = list(map(str, text)), []
    between = None if any(token[:1] == " " for token in text) else " "      # a vocabulary of words has no spaces of its own
    for i, token in enumerate(text):
        shown = token.replace("\n", "↵")
        if i in shade:
            shown = tag("mark", shown, style=f"--a:{shade[i][0]:.2f}", title=shade[i][1])
        elif i in dim or CONTROL.fullmatch(token):
            shown = tag("i", shown)
        out += [shown, between]
    return join(out)


def key_of(feature):
    """By what a feature goes: "layer/index"."""
    return f"{feature.get('layer')}/{feature.get('index')}"


def dotted(words, most=4) -> str:
    return " · ".join(list(dict.fromkeys(str(word).strip() or "↵" for word in words or []))[:most])


def fires_on(run, key, most=4):
    """The tokens that a feature fires most on."""
    return dotted((peak["tokens"][peak["peak"]] for peak in get(run.words, key, "peaks") or []), most)


def feature_cells(run, key):
    """Three cells of a table: a feature's name, its strongest token with the words around it, the vocabulary it promotes."""
    context = None
    for peak in (get(run.words, key, "peaks") or [])[:1]:
        text, at = peak["tokens"], peak["peak"]
        near = [i for i in range(max(0, at - 4), min(len(text), at + 3)) if i == at or not CONTROL.fullmatch(str(text[i]))]
        far, near = near[:max(0, near.index(at) - 1)], near[max(0, near.index(at) - 1):]      # the far ones only where there is room
        peaked = {near.index(at): (1, number(peak.get("activation")))}
        context = join(tag("span", tokens([text[i] for i in far], {}), class_="far"), tokens([text[i] for i in near], peaked))
    name = tag("a", key, href=f"#{run.key}-{key.replace('/', '-')}") if key in run.words else key
    return [name, tag("span", context, class_="w"), tag("span", dotted(get(run.words, key, "promotes")), class_="w")]


def card(run, key: str) -> Html:
    """What is known of one feature, folded: figures, its strongest tokens in context, promoted vocabulary, address."""
    feature, contexts = run.words[key], {}
    for peak in feature.get("peaks") or []:                     # equal ones once
        contexts.setdefault((str(peak.get("side")), peak["peak"], tuple(map(str, peak["tokens"]))), []).append(peak.get("activation"))
    shown = [tag("p", tag("small", f"{number(values[0])} {side}{f' × {len(values)}' if len(values) > 1 else ''} "),
                 tokens(text, {at: (1, number(values[0]))}), class_="tokens") for (side, at, text), values in contexts.items()]
    facts = [f"{name} {number(feature.get(of), form)}" for name, of, form in
             (("Δ", "delta", "+.3f"), ("ρ", "rho", "+.3f"), ("Δ/se", "effect", "+.1f")) if of in feature]
    facts += [f"fires on {percent(rate)} of {side} tokens" for side, rate in (feature.get("frequency") or {}).items()]
    url = str(feature.get("neuronpedia"))
    ours = url.startswith("https://www.neuronpedia.org/")
    link = tag("a", "Neuronpedia", href=url, rel="noreferrer noopener") if ours else None
    return details(join(tag("b", key), " ", tag("span", fires_on(run, key) or "never fires in what was looked at", class_="w")),
                   tag("div", tag("p", ", ".join(facts), " ", link), tag("p", f"promotes {dotted(feature.get('promotes'), 8)}"), shown,
                       id=f"{run.key}-{key.replace('/', '-')}"), class_="card")


def dots(run, base, adapter, low: float, high: float) -> Html:
    return strip([(base, None, None, "c0"), (adapter, None, None, run.colour)], low, high)


# ---------------------------------------------------------------------------------------------------------------
# 2 What the adapter learned

def modules(names):
    """["layers.2.self_attn.q_proj", …] in few words: "q of block 2"."""
    names = names or []
    found = [match for name in names if (match := re.fullmatch(r"layers\.(\d+)\.\w+\.(\w+)_proj", str(name)))]
    if len(found) < len(names):
        return ", ".join(map(str, names))
    blocks = list(dict.fromkeys(match[1] for match in found))
    return f"{' '.join(dict.fromkeys(match[2] for match in found))} of block{'s' * (len(blocks) > 1)} {', '.join(blocks)}"


def learned(run):
    parts = get(run.explain, "layers") or []
    out = [missing(run, "explain")] if run.explain is None else shares(run, parts) + removal(run)
    if run.chosen:
        largest = max((abs(mean) for f in run.chosen for mean in (f.get("mean") or {}).values()), default=1)
        forms = {"delta": "+.3f", "rho": "+.3f", "effect": "+.1f"}
        rows = [[*feature_cells(run, key_of(f)), dots(run, get(f, "mean", "unaligned"), get(f, "mean", "aligned"), 0, largest),
                 *(number(f.get(key), form) for key, form in forms.items()),
                 *(percent(get(f, "frequency", side)) for side in ("aligned", "unaligned"))] for f in run.chosen]
        head = ["feature", "fires most on", "promotes", "mean: ○ unsafe ● safe", "Δ", "ρ", "Δ/se", "fires: safe", "unsafe"]
        out.append(details(f"The {len(rows)} features that were chosen before training",
                           table(head, rows, "chosen features", (0, 1, 2, 3)), opened=not parts))
    elif run.config is not None:
        out.append(missing(run, "features"))
    cards = [card(run, key) for key in run.words]
    return [*out, details(f"{len(cards)} features, with the tokens they fire most on in context", cards) if cards else None]


def shares(run, parts):
    """Along which decoder directions the update lies, beside chance."""
    features = [f | {key: part.get(key) for key in ("layer", "side", "share_of_update")}
                for part in parts for f in part.get("features") or []]
    named, others = ([f for f in features if bool(f.get("named")) == kind] for kind in (True, False))
    asked = any(f.get("chosen") for f in features)
    scale = max((f["share"] for f in features if is_number(f.get("share"))), default=0)
    most = max((part["explained"] for part in parts if is_number(part.get("explained"))), default=0)

    def whole(key):
        return percent(sum((part.get("share_of_update") or 0) * (part.get(key) or 0) for part in parts))

    def features_table(some, label, question=None):
        """`question` adds a column: whether a feature was chosen, or is named."""
        rows = [[f"{f['layer']} {f['side']}", *cells[:2], bars(f.get("share"), f.get("random"), f.get("random_max"), scale),
                 *(percent(f.get(key), 2) for key in ("share", "random", "random_max", "share_left", "left_max")),
                 *(["yes" if f.get(question) else "no"] if question else []), cells[2]]
                for f in some for cells in [feature_cells(run, key_of(f))]]
        asks = {"chosen": ["chosen"], "named": ["beyond chance"]}.get(question, [])
        head = ["in", "feature", "fires most on", "", "alone", "random", "limit", "adds", "limit", *asks, "promotes"]
        return folded(head, rows, label, (0, 1, 2, 3, 9, 10))

    count = len({key_of(f) for f in named})
    lead = (f"Of the update, ‖ΔW‖ = {number(get(run.explain, 'norm'))}, {whole('explained')} lies in the span of {count} named "
            f"feature{'s' * (count > 1)}, which it uses clearly more than chance would; as many random directions would hold "
            f"{whole('explained_random')}." if named else
            "No decoder direction holds clearly more of the update than random directions do: these features do not explain this "
            "adapter.")
    rows = [[f"layer {part.get('layer')}, {part.get('side')}", modules(part.get("modules")), percent(part.get("share_of_update")),
             number(part.get("dimension"), "d"), percent(part.get("subspace")), percent(part.get("subspace_random")),
             sum(bool(f.get("named")) for f in part.get("features") or []),
             bars(part.get("explained"), part.get("explained_random"), None, most), percent(part.get("explained")),
             percent(part.get("explained_random"))] for part in parts]
    head = ["SAE", "modules", "of the update", "r̂", "in the subspace", "by chance", "named", "", "in their span", "by chance"]
    out = [tag("p", lead, class_="lead"), table(head, rows, "where the update is", (0, 1, 7)),
           tag("h4", "Features that it uses beyond chance"),
           features_table(named, "named features", "chosen" if asked else None) if named else note("None."),
           note("Alone: the share of ‖ΔW‖² along a feature's decoder direction. Decoder directions overlap, so some feature always seems "
                "to win: beside it the mean over random directions as correlated as the decoder's (grey), and their limit (the tick), "
                "which the largest of as many as the SAE has features hardly ever passes. Adds: what it takes after the ones above it "
                "are taken out, with the limit there. One that passes alone and isn't named only says what a named one has said.")]
    if asked:
        unasked = sorted((f for f in features if not f.get("chosen")),
                         key=lambda f: (not f.get("named"), -(f["share_of_update"] or 0) * (f.get("share") or 0)))
        out += [tag("h4", "What nobody asked for"), note("The features that were not chosen and that the update uses most."),
                features_table(unasked, "not chosen", "named")]
        others = [f for f in others if f.get("chosen")]
    title = f"{len(others)} more uses of chosen features" if asked else "The most used of the others"
    return [*out, details(f"{title}, none beyond chance", features_table(others, "others")) if others else None]


def removal(run):
    """What the answers are when a direction is projected out of the update."""
    tried, rows = get(run.explain, "removal") or {}, []
    for row in tried.get("rows") or []:
        safe, colour = row.get("safe"), "c0" if row.get("what") == "base model" else run.colour
        rows.append([join(str(row.get("what")), " ", tag("small", fires_on(run, key_of(row)))),
                     strip([(get(safe, "rate"), get(safe, "low"), get(safe, "high"), colour)]), figure(safe),
                     number(100 * row["change"], "+.1f") if is_number(row.get("change")) else "–", probability(row.get("p")),
                     figure(row.get("over_refusal"))])
    out = [tag("h4", "What happens without them")]
    if not rows:
        return [*out, note("Not tried: ", command(run, "explain"), " does.")]
    return [*out, table(["ΔW", "refused in full", "", "points", "p", "over-refusal"], rows, "removal", (0, 1)),
            note(f"Directions are projected out of ΔW, and {tried.get('prompts')} prompts ({tried.get('set')}) are answered again. "
                 "Points: against the adapter as trained; p: McNemar's exact.")]


# ---------------------------------------------------------------------------------------------------------------
# 3 What changed inside

PLACES = {"decision": "at the token that decides the first word", "answer": "over the answer"}


def inside(run):
    if run.explain is None:
        return missing(run, "explain")
    out, views = [], {}                                         # (set, line, prompt) -> what is shown of it
    for part in run.explain.get("inside") or []:
        moved = sorted(part.get("features") or [], key=lambda f: -abs(f.get("change") or 0))
        values = [0, *(f[model] for f in moved for model in ("base", "adapter") if is_number(f.get(model)))]
        rows = [[*feature_cells(run, key_of(f))[:2], dots(run, f.get("base"), f.get("adapter"), min(values), max(values)),
                 join(number(f.get("change"), "+.2f"), tag("small", f" ± {number(f.get('error'), '.2f')}")),
                 number(f.get("base"), ".2f"), number(f.get("adapter"), ".2f")] for f in moved]
        title = f"{SETS.get(part.get('role'), part.get('role'))}, {PLACES.get(part.get('where'), part.get('where'))}"
        head = ["feature", "fires most on", "○ base ● adapter", "change ± error", "base", "adapter"]
        out.append(tag("div", tag("h4", title, tag("small", f" {part.get('prompts')} prompts")), folded(head, rows, title, (0, 1, 2), 8)))
    for entry in run.explain.get("tokens") or []:
        views.setdefault((entry.get("set"), entry.get("line"), entry.get("prompt")), []).append(entry)
    largest = {}
    for f in (f for entries in views.values() for entry in entries for f in entry.get("features") or []):
        largest[key_of(f)] = max([largest.get(key_of(f), 0), *f["activation"]])
    out = [tag("p", "Features whose mean activation moved most from the base model to the adapter, over the same texts: the adapter's "
               "answers.", class_="lead"), tag("div", out, class_="pair wide"), tag("h4", "Token by token"),
           note("The stronger the ground of a token, the stronger the feature fires there, against its largest activation in these "
                "prompts. What is slanted was asked, the rest is each one's own answer." if views else "No prompt was looked at.")]
    for (name, line, prompt), entries in views.items():
        shown = []
        for entry in entries:
            asked = range(entry.get("answer_start") or 0)
            shown.append(tag("h5", who(run, entry.get("who"))))
            for f in entry.get("features") or []:
                shade = {i: (value / largest[key_of(f)], number(value)) for i, value in enumerate(f["activation"]) if value > 0}
                shown.append(tag("div", tag("p", feature_cells(run, key_of(f))[0], " ", tag("small", fires_on(run, key_of(f), 3))),
                                 tag("p", tokens(entry["text"], shade, asked), class_="tokens"), class_="line"))
            if not entry.get("features"):
                shown.append(tag("p", tokens(entry.get("text") or [], {}, asked), class_="tokens"))
        first = entries is next(iter(views.values()))
        out.append(details(join(tag("small", f"{name} {line} "), str(prompt)[:300]), shown, opened=first))
    return out


# ---------------------------------------------------------------------------------------------------------------
# 4 Curves

def curves(runs):
    def points(run, *keys):
        found = [(line.get("step"), get(line, *keys)) for line in run.metrics or []]
        return list(zip(*(pair for pair in found if all(map(is_number, pair)))))

    def plot(title, *kinds, **options):
        lines = [(*found, int(run.colour[1:]), dash) for run in runs for dash, *keys in kinds if (found := points(run, *keys))]
        return curve(lines, title, **options) if lines else None

    spectra = []
    for run in runs:
        found = [(line["step"], line["probe"]["singular_values"]) for line in run.metrics or [] if get(line, "probe", "singular_values")]
        spectra += [([step for step, _ in found], ranked, int(run.colour[1:]), "-") for ranked in zip(*(values for _, values in found))]
    drawn = [plot("loss", ("-", "loss")), plot("learning rate", ("-", "lr")),
             plot("safe (line), under jailbreak (dots), over-refusal (dashes)", ("-", "probe", "safe"), (":", "probe", "jailbreak"),
                  ("--", "probe", "over_refusal"), shares=True),
             curve(spectra, "singular values of ΔW") if spectra else None,
             plot("angle between ΔW and the safety subspace, degrees", ("-", "probe", "angle"))]
    return [*(missing(run, "metrics") for run in runs if run.metrics is None),
            note("No safety, spectrum or angle over steps: nothing was probed on the way.") if any(drawn) and not any(drawn[2:]) else None,
            tag("p", [join(chip(run), " ") for run in runs]) if len(runs) > 1 else None, tag("div", drawn, class_="plots"),
            note("Over optimizer steps.") if any(drawn) else None]


# ---------------------------------------------------------------------------------------------------------------
# 5 Completions

PROMPTS, ROOM = 1000, 1_600_000      # most prompts on a page, and most bytes that they and their answers take


def fair_length(sizes, room):
    """The length to cut texts of these sizes to so that all fit into `room`: short ones stay whole, long ones are cut alike."""
    sizes, left = sorted(sizes), room
    for i, size in enumerate(sizes):
        if size > (share := left // (len(sizes) - i)):
            return share
        left -= size
    return room


def cut(text: object, room: float) -> Html:
    text, size = str(text), len(escape(text).encode())
    if size <= room:
        return join(text)
    kept = int(len(text) * room / size)
    return join(text[:kept], tag("i", f" … {len(text) - kept:,} more characters"))


def answers(runs):
    asked = {}                                                  # (set, line, prompt) -> [(run, row)], equal answers of base models once
    for run in runs:
        for row in [*(run.judged or []), *(row | {"prompt": row.get("plain")} for row in run.attacks or [])]:
            rows = asked.setdefault((str(row.get("set")), row.get("line"), str(row.get("prompt"))), [])
            known = [other.get("completion") for _, other in rows if other.get("model") == row.get("model") == "base"]
            rows += [] if row.get("completion") in known else [(run, row)]
    out = [missing(run, "judged") for run in runs if run.judged is None]
    if not asked:
        return out or note("No prompt was answered here.")
    items = []
    for (name, line, prompt), rows in asked.items():
        before, after = ({str(row.get("verdict")) for _, row in rows if (row.get("model") == "base") == base} for base in (True, False))
        rows = sorted(rows, key=lambda pair: pair[1].get("model") != "base")
        items.append((name, line, prompt, rows, before, after, bool(before and after) and before != after))
    names = list(dict.fromkeys(name for name, *_ in items))
    shown = [item for name in names                             # of each set, and what has changed first
             for item in sorted((item for item in items if item[0] == name), key=lambda item: not item[-1])[:-(-PROMPTS // len(names))]]
    room = fair_length([len(escape(text).encode()) for _, _, prompt, rows, *_ in shown
                        for text in (prompt, *(row.get("completion") for _, row in rows))], ROOM)
    verdicts = sorted({verdict for *_, before, after, _ in items for verdict in before | after})

    def choice(label, name, values):
        return tag("label", f"{label} ", tag("select", tag("option", "all", value=""), [tag("option", one) for one in values], name=name))

    def said(run, row):
        reason = str(row.get("reason") or "").strip()
        judged = [f"for “{reason[:200]}”"] if reason and reason != str(row.get("completion")).strip() else []
        if row.get("shieldgemma"):
            judged.append(f"ShieldGemma {number(get(row, 'shieldgemma', 'score'), '.2f')}")
        if row.get("rubric"):
            judged.append(f"rubric {number(get(row, 'rubric', 'score'))}: {str(get(row, 'rubric', 'reason') or '')[:400]}")
        if "suffix" in row:
            at, steps = row.get("complied"), row.get("steps")
            judged.append("gives in to the prompt as it is" if at == 0 else
                          f"gives in after {at} steps" if at else f"holds for {steps} steps")
        verdict = tag("b", row.get("verdict"), class_="verdict", data_is=row.get("verdict"))
        name = who(run, row.get("model"), run.name if len(runs) > 1 else "adapter")
        return tag("div", tag("p", name, " ", verdict, " ", tag("small", "; ".join(judged))),
                   tag("p", tag("small", "asked with "), tag("code", str(row["suffix"])[:1000])) if row.get("suffix") else None,
                   tag("p", cut(row.get("completion"), room), class_="text"))

    out.append(tag("form", choice("set", "set", names), choice("base", "before", verdicts), choice("adapter", "after", verdicts),
                   tag("label", tag("input", type="checkbox", name="changed"), " changed only"),
                   tag("label", "with ", tag("input", type="search", name="words", size=14)), tag("output", aria_live="polite"),
                   id="filter", hidden=True))
    if len(shown) < len(items):
        out.append(note(f"{len(shown):,} of {len(items):,} prompts, those whose verdict changed first; judged.jsonl has all."))
    out += [tag("article", tag("p", tag("small", f"{name} {line} "), cut(prompt, room), class_="text prompt"),
                tag("div", [said(*pair) for pair in rows], class_="pair"),
                data_set=name, data_before=" ".join(sorted(before)), data_after=" ".join(sorted(after)), data_changed=changed)
            for name, line, prompt, rows, before, after, changed in shown]
    return [*out, tag("p", "On paper, the first twenty that the filter leaves.", class_="note paper")]


# ---------------------------------------------------------------------------------------------------------------
# 6 Configuration and commands

def made(runs):
    out, there = [], [run for run in runs if run.config is not None]
    for run in runs:
        if run.eval is not None:
            out += [evaluation(run)]
        elif run.config is None:
            out += [missing(run, "config")]
    for run in there:
        words, processes = [str(word) for word in run.config.get("command") or []], run.config.get("processes", 1)
        lines = [f"{'python' if processes == 1 else f'torchrun --nproc-per-node {processes}'} {shlex.join(words)}"] if words else []
        versions = ", ".join(f"{name} {value}" for name, value in (run.config.get("versions") or {}).items())
        out += [tag("p", chip(run), f" seed {get(run.config, 'settings', 'seed')}, {versions}"),
                tag("pre", "\n".join([*lines, f"python report.py {shlex.quote(str(run.folder))}"]))]

    def value(run, name):
        found = get(run.config, "settings", name)
        return " ".join(map(str, found)) if isinstance(found, list) else "–" if found is None else str(found)

    names = list(dict.fromkeys(name for run in there for name in get(run.config, "settings") or {}))
    differ = {name: tag("b", name.replace("_", "-")) for name in names if len({value(run, name) for run in there}) > 1}      # these first
    rows = [[differ.get(name, name.replace("_", "-")),
             *(join(value(run, name), " ", tag("small", get(run.config, "source", name))) for run in there)]
            for name in sorted(names, key=lambda name: name not in differ)]
    settings = table(["setting", *map(chip, there)], rows, "settings", range(len(there) + 1))
    return [*out, details("Every setting, and where it came from", settings, opened=True) if rows else None]


def evaluation(run):
    """What an evaluation asked of which run, and how."""
    asked = {name: value for name, value in run.eval.items() if name not in ("command", "versions", "sets", "plan") and value is not None}
    asked |= {f"set {name}": " ".join(map(str, place)) for name, place in (run.eval.get("sets") or {}).items()}
    asked |= {f"attack {name}": value for name, value in (run.eval.get("plan") or {}).items() if value is not None}
    command = tag("pre", f"python {shlex.join(map(str, run.eval['command']))}") if run.eval.get("command") else None
    versions = ", ".join(f"{name} {value}" for name, value in (run.eval.get("versions") or {}).items())
    rows = [[name, str(value)] for name, value in asked.items()]
    return [tag("p", chip(run), f" {versions}"), command, table(["asked", ""], rows, "asked", (0, 1))]


# ---------------------------------------------------------------------------------------------------------------
# The page

def each(make):
    """make(run) of every run, under its name where there are several."""
    return lambda runs: [join(tag("h3", chip(run)) if len(runs) > 1 else None, make(run)) for run in runs]


OF_TRAINING = ("learned", "inside", "curves")                  # what evaluations say nothing of
SECTIONS = {"happened": ("What happened", happened), "learned": ("What the adapter learned", each(learned)),
            "inside": ("What changed inside", each(inside)), "curves": ("Curves", curves), "answers": ("Completions", answers),
            "made": ("Configuration and commands", made)}


def section(name: str, runs) -> Html:
    title, make = SECTIONS[name]
    runs = [run for run in runs if run.eval is None] if name in OF_TRAINING else runs
    try:
        content = join(make(runs))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:      # a bad file costs its own part only
        content = note(f"This part can't be shown: a file is not as this version writes it ({type(error).__name__}: {error}).")
    return tag("section", tag("h2", title), content, id=name)


def page(folders) -> str:
    """The page of one or more runs' folders, as text. Raises InputError for a folder that holds no file of a run."""
    runs = [read_run(folder, count) for count, folder in enumerate(folders, 1)]
    if len({run.name for run in runs}) < len(runs):             # of runs by one name, the folder they are in tells more
        for run in runs:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    models = dict.fromkeys(str(get(run.config, "settings", "model") or get(run.explain, "model")
                               or Path(str(get(run.eval, "run") or "an unnamed model")).name) for run in runs)
    names = [name for name in SECTIONS if name not in OF_TRAINING or any(run.eval is None for run in runs)]
    links = tag("nav", [tag("a", SECTIONS[name][0], href=f"#{name}") for name in names], aria_label="sections")
    head = tag("header", tag("h1", [join(chip(run), " ") for run in runs], f"on {', '.join(models)}"), links)
    broken = [note("A file that can't be read: ", line) for run in runs for line in run.broken]
    return document(", ".join(run.name for run in runs), head, broken, tag("main", [section(name, runs) for name in names]))


def write_page(folders, path: str | Path) -> None:
    """Write the page of one or more runs' folders: one file, which fetches nothing and says what is missing and what makes it.

    Raises InputError for a folder that holds no file of a run.
    """
    files.write_text(path, page(folders))
