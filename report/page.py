"""report.html: what an adapter learned and did, on one page that opens from disk.

    write_page("runs/a")        # runs/a/report.html, from the JSON files in that folder

A section is a function from a run to markup. What a model, a data set or a file says stays text:
`tag` and `join` escape every string that isn't Html already. page.html holds style and script.
"""

import html
import re
from pathlib import Path
from types import SimpleNamespace

from report.effects import SCALED
from run.files import read_json, read_jsonl, write_text
from safety.table import HEAD, percent, points, set_rows

TEMPLATE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
VERBS = {"readers": "reads", "writers": "writes"}
VERDICTS = {"full": "refused", "partial": "partly refused", "comply": "complied", "empty": "blank"}

# ------------------------------------------------------------------------------
# Markup

class Html(str):
    """Markup. Every other string is escaped on its way into a page."""


def escape(value: object) -> str:
    """Any value as text for an element or a quoted attribute."""
    return html.escape(str(value))


def join(*parts) -> Html:
    """Html of parts in a row: lists are joined, None is nothing, what isn't Html is escaped."""
    joined = ""
    for part in parts:
        if isinstance(part, list):
            joined += join(*part)
        elif isinstance(part, Html):
            joined += part
        elif part is not None:
            joined += escape(part)
    return Html(joined)


def tag(name: str, /, *content, **attributes) -> Html:
    """An element; class_ and data_x stand for class and data-x, False for no attribute."""
    start = name
    for key, value in attributes.items():
        if value is not False:
            key = key.rstrip("_").replace("_", "-")
            start += f' {key}="{escape(value)}"'
    if name == "input":
        return Html(f"<{start}>")
    return Html(f"<{start}>{join(*content)}</{name}>")


def small(*words) -> Html:
    return tag("small", *words)


def note(*words) -> Html:
    return tag("p", *words, class_="note")


def table(head, rows) -> Html:
    """The first column is text, the others are numbers."""
    lines = []
    for first, *cells in rows:
        row = [tag("th", first)]
        # On a phone each number has its column's name beside it
        row += [tag("td", "–" if cell is None else cell, data_head=name)
                for name, cell in zip(head[1:], cells)]
        lines.append(tag("tr", row))
    top = tag("tr", [tag("th", cell) for cell in head])
    return tag("table", tag("thead", top), tag("tbody", lines))


# ------------------------------------------------------------------------------
# Features

def used_for(run, entry) -> Html:
    """A named feature: its verb, its number with a link to its card, and its top tokens."""
    key = f"{entry['layer']}/{entry['index']}"
    link = tag("a", key, href=f"#feature-{key}")
    return join(VERBS[entry["side"]], " ", link, " ", small(top_tokens(run.words[key], entry)))


def top_tokens(feature, entry) -> str:
    """Where a feature that is read fires most; what one that is written promotes."""
    return fires_on(feature) if entry["side"] == "readers" else dotted(feature["promotes"][:4])


def fires_on(feature) -> str:
    """The tokens at a feature's peaks."""
    return dotted(peak["tokens"][peak["peak"]] for peak in feature["peaks"])


def dotted(tokens) -> str:
    return " · ".join(dict.fromkeys(token.strip() or "↵" for token in tokens))


def in_context(peak) -> Html:
    """The text around a peak, with the token marked on which the feature fires."""
    words = [token.replace("\n", "↵") for token in peak["tokens"]]
    i = peak["peak"]
    words[i] = tag("mark", words[i])
    # A vocabulary of whole words has no spaces of its own
    if not any(token.startswith(" ") for token in peak["tokens"]):
        words = [[word, " "] for word in words]
    activation = small(f"{peak['activation']:.3g} {peak['side']} ")
    return tag("p", activation, words, class_="tokens")


def features(run):
    """What is known of every feature that the page mentions."""
    cards = []
    for key, feature in run.words.items():
        link = None
        url = feature["neuronpedia"]
        if url and url.startswith("https://www.neuronpedia.org/"):
            link = tag("a", "Neuronpedia", href=url, rel="noreferrer")
        # Many peaks may lie in one sentence
        contexts = {}
        for peak in feature["peaks"]:
            contexts.setdefault(tuple(peak["tokens"]), peak)
        cards.append(tag(
            "div",
            tag("h4", key, " ", small(fires_on(feature))),
            tag("p", "Promotes ", dotted(feature["promotes"]), ". ", link),
            [in_context(peak) for peak in contexts.values()],
            id=f"feature-{key}",
            class_="card"))
    return [note("The tokens on which each feature fires most, in context, with its activation "
                 "and the kind of text. Promotes: the tokens that its direction favours."),
            cards]


# ------------------------------------------------------------------------------
# What was learned

def in_short(run):
    """The answer in three sentences, each with its control."""
    rows = {row["what"]: row for row in run.explain["removal"]}
    learned = run.explain["learned"]
    named = [entry for entry in run.explain["features"] if entry["named"]]

    def refused(what):
        return f"{rows[what]['safe']['rate']:.1%}"

    # One of our own runs knows its first step; of another adapter the far side is turned
    controls = learned["untrained"]
    control = ""
    for name, words in (("turned 0", "turned at random it makes"),
                        ("first step", "the first step alone made")):
        if name in controls:
            control = f"; {words} them {controls[name]['mean']:+.4f}"
    first_step = ""
    if "after the first step" in rows:
        first_step = f", the adapter after its first step {refused('after the first step')}"
    gain = learned["gain"]
    sentences = [
        f"The adapter refuses {refused('as trained')} of {rows['as trained']['safe']['n']} harmful "
        f"prompts; the base model refuses {refused('base model')}{first_step}.",
        f"It makes {learned['prompts']} answers to held-out harmful prompts ({learned['answers']}) "
        f"{gain['mean']:+.3f} nats likelier [{gain['low']:.3f}, {gain['high']:.3f}]{control}."]
    if not learned["something"]:
        sentences.append("Nothing was learned beyond that, so no feature is named.")
    elif not named:
        sentences.append("No single feature carries more of it than random directions of the same "
                         "subspace do.")
    else:
        sentences.append(
            f"Part of it is carried by named features, {len(named)} of them: without them "
            f"{refused('without all named features')} are refused, without as many random "
            f"directions {refused('without as many random directions')}.")
    return tag("ul", [tag("li", sentence) for sentence in sentences], class_="lead")


def named_features(run):
    """What each named feature is used for, and its cost beside the costs of its controls."""
    rows = []
    for entry in run.explain["features"]:
        if entry["named"]:
            cost = entry["cost"]
            others = entry["untrained"]
            first = others.get("first step")
            scaled = others.get(SCALED)
            turned = max(value for name, value in others.items() if name.startswith("turned"))
            rows.append([
                used_for(run, entry),
                join(f"{cost['mean']:.3f}", small(f" [{cost['low']:.3f}, {cost['high']:.3f}]")),
                join(f"{entry['random']['mean']:.3f}",
                     small(f" most {entry['random']['most']:.3f}")),
                f"{turned:.3f}",
                None if first is None else f"{first:.4f}",
                None if scaled is None else f"{scaled:.3f}"])
    head = ["reads: fires on; writes: promotes", "cost of removing", "random directions",
            "nothing learned", "first step", "first step × size"]
    num_tested = len(run.explain["features"])
    return [
        table(head, rows) if rows else tag("p", f"None of {num_tested} that were tested."),
        note("Cost: how much less likely the answers become, in nats an answer, when the adapter "
             "no longer reads, or writes, along the feature's decoder direction. Beside it the "
             "cost of random directions of the same subspace; of this direction in adapters of "
             "that size whose far side is turned at random, which learned nothing (the most of "
             f"three); and in the adapter after its first step. {num_tested} features were tested. "
             "A name means a cost above all of these (Holm's correction at 5 %). Scaled up to the "
             "trained size the first step has learned to refuse, and is no control.")]


def heads(run):
    """The heads that a named direction moves, where they move more than in an untrained adapter."""
    rows = []
    for entry in run.explain["features"]:
        for head in entry.get("heads", ()):
            rows.append([
                join(used_for(run, entry), f": block {head['block']}, head {head['head']} ",
                     small(dotted(head["tokens"]))),
                *(join(f"{head[what]:.1%}", small(f" untrained {head[f'{what}_untrained']:.1%}"))
                  for what in ("attention", "output"))])
    if not rows:
        return [tag("p", "No head moves more than in an untrained adapter.")]
    return [table(["feature, head, where it looks less without it", "attention moved",
                   "output moved"], rows),
            note("At the token before the answer, when the adapter loses the direction: the share "
                 "of a head's attention that goes elsewhere, and of its output that changes. "
                 "Untrained: an adapter of the same size (the first step scaled up, or turned at "
                 "random). Heads that don't move more than there are left out.")]


def lies(run):
    """The shares of the update, which the init gives."""
    parts = run.explain["layers"]
    columns = {"share_of_update": "share of the update", "subspace": "of it in the chosen subspace",
               "subspace_first": "after the first step", "subspace_random": "in random subspaces"}
    known = [key for key in columns if key in parts[0]]
    rows = []
    for part in parts:
        verb = "read from" if part["side"] == "readers" else "written to"
        shares = [f"{part[key]:.1%}" for key in known]
        rows.append([f"{verb} layer {part['layer']}", *shares])
    return [table(["part", *(columns[key] for key in known)], rows),
            note("A share that the first step has too is the init's, and says nothing about what "
                 "was learned.")]


def removal(run):
    """What the answers are when directions are taken out of the update."""
    rows = []
    for trial in run.explain["removal"]:
        # The first row is what the others are compared with
        change = points(trial) if trial["safe"] and rows else None
        rows.append([
            trial["what"],
            percent(trial["safe"]),
            change,
            percent(trial["over_refusal"])])
    head = ["update", "harmful prompts refused", "change, points", "harmless prompts refused"]
    return [table(head, rows),
            note("A direction is projected out of the update, and the same prompts, plain and "
                 "behind a jailbreak, are answered again. The base model stands last.")]


# ------------------------------------------------------------------------------
# Answers and training

def changed(run):
    """Shares of all sets, base beside adapter: the table that the run ended with."""
    return [table(HEAD, set_rows(run.scores)),
            note("In brackets: 95 % intervals (Wilson). p: McNemar's exact test, same prompts. "
                 f"Judge: {run.scores['judge']}. A prompt counts as refused if the "
                 "answer refuses, in full or in part.")]


def answers(run):
    """Answers of both models side by side; of each set, changed verdicts first."""
    exchanges = {}                       # {set: {(line, prompt): [base's row, adapter's row]}}
    for row in run.judged:
        of_set = exchanges.setdefault(row["set"], {})
        of_set.setdefault((row["line"], row["prompt"]), []).append(row)
    # A changed verdict shows most
    articles = []
    for of_set in exchanges.values():
        of_set = sorted(of_set.values(), key=is_changed, reverse=True)
        articles += [article(rows) for rows in of_set]
    options = [tag("option", "all sets", value="")]
    options += [tag("option", name) for name in exchanges]
    form = tag(
        "form",
        tag("select", options, name="set", aria_label="set"),
        tag("label", tag("input", type="checkbox", name="changed"), " changed only"),
        tag("output"),
        id="filter")
    return [form, *articles, tag("button", "20 more", id="more", type="button")]


def is_changed(rows) -> bool:
    return len({row["verdict"] for row in rows}) > 1


def article(rows):
    """One prompt, and each model's answer to it."""
    sides = []
    for row in rows:
        verdict = row["verdict"]
        badge = tag("b", VERDICTS[verdict], class_=f"verdict {verdict}")
        text = tag("p", row["completion"], class_="text")
        sides.append(tag("div", small(row["model"]), " ", badge, text))
    place = small(f"{row['set']} {row['line']} ")
    return tag(
        "article",
        tag("p", place, row["prompt"], class_="prompt text"),
        tag("div", sides, class_="pair"),
        data_set=row["set"],
        data_changed=is_changed(rows))


def training(run):
    """The loss over steps, as SVG."""
    steps = [row["step"] for row in run.metrics if "loss" in row]
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    length = max(1, steps[-1] - steps[0])
    # Loss 0 is at y = 170, the largest at y = 20
    line = ""
    for step, loss in zip(steps, losses):
        x = 40 + 560 * (step - steps[0]) / length
        y = 170 - 150 * loss / max(losses)
        line += f"{x:.1f},{y:.1f} "
    return tag(
        "svg",
        tag("path", d="M40,20V170H600"),
        tag("polyline", points=line),
        tag("text", f"{max(losses):.3g}", x=36, y=24),
        tag("text", "0", x=36, y=170),
        tag("text", f"step {steps[0]}", x=90, y=188),
        tag("text", f"step {steps[-1]}: {losses[-1]:.3g}", x=600, y=188),
        viewBox="0 0 610 195", role="img", aria_label="training loss over steps")


# ------------------------------------------------------------------------------
# The page

SECTIONS = [  # title, the file that it needs, function
    ("In short", "explain", in_short),
    ("Named features", "explain", named_features),
    ("Without them", "explain", removal),
    ("Heads that they move", "explain", heads),
    ("What changed", "scores", changed),
    ("Answers side by side", "judged", answers),
    ("Each feature", "words", features),
    ("Where the update lies", "explain", lies),
    ("Training loss", "metrics", training)]


def read_run(folder: Path) -> SimpleNamespace:
    """What a folder's JSON files say; nothing of a file that isn't there."""
    run = SimpleNamespace(name=folder.resolve().name)
    for name in ("config.json", "scores.json", "explain.json", "metrics.jsonl", "judged.jsonl"):
        path = folder / name
        read = read_json if path.suffix == ".json" else read_jsonl
        setattr(run, path.stem, read(path) if path.exists() else {})
    run.settings = run.config.get("settings", {})
    run.words = run.explain.get("words", {})
    return run


def page(folder: str | Path) -> str:
    """The page of a run's folder, or of a folder with an explain.json alone."""
    run = read_run(Path(folder))
    # What a folder doesn't hold has no section
    sections = []
    links = []
    for title, needs, section in SECTIONS:
        if getattr(run, needs):
            key = title.replace(" ", "-").lower()
            heading = tag("h2", title)
            sections.append(tag("section", heading, section(run), id=key))
            links.append(tag("a", title, href=f"#{key}"))

    # A run says how it was made, an adapter of another origin which model it is for
    about = f"A LoRA adapter on {run.settings.get('model') or run.explain.get('model')}"
    if run.config:
        about += ", rank {rank}, init {init}, seed {seed}".format(**run.settings)
    header = tag("header", tag("h1", run.name), tag("p", about), tag("nav", links))
    filled = {"TITLE": escape(run.name), "BODY": join(header, tag("main", sections))}
    # In one pass, so that nothing is looked for in what was filled in
    return re.sub("{{(TITLE|BODY)}}", lambda match: filled[match[1]], TEMPLATE)


def write_page(folder: str | Path) -> Path:
    """Write folder/report.html: one file, which fetches nothing."""
    path = Path(folder) / "report.html"
    write_text(path, page(folder))
    return path
