"""report.html: what an adapter learned and did, on one page that opens from disk.

    write_page("runs/a")        # runs/a/report.html, from the JSON files in that folder

A section is a function from a run to markup. What a model, a data set or a file says stays text:
`tag` and `join` escape every string that isn't Html already. page.html holds style and script.
"""

import html
import re
from pathlib import Path
from types import SimpleNamespace

from run.files import read_json, read_jsonl, write_text
from safety.table import HEAD, percent, points, set_rows

TEMPLATE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
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
    """The first column is text, the others are numbers. A row of one cell is a heading."""
    lines = []
    for first, *cells in rows:
        heading = {} if cells else {"colspan": len(head), "class_": "heading"}
        row = [tag("th", first, **heading)]
        row += [tag("td", "–" if cell is None else cell) for cell in cells]
        lines.append(tag("tr", row))
    top = tag("tr", [tag("th", cell) for cell in head])
    return tag("table", tag("thead", top), tag("tbody", lines))


# ------------------------------------------------------------------------------
# Features

def feature_link(run, key) -> Html:
    """The name of feature "layer/index", linked to its card, and the tokens it fires most on."""
    link = tag("a", key, href=f"#feature-{key}")
    return join(link, " ", small(fires_on(run.words[key])))


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
# The update

def update(run):
    """The features that the update is made of, beside chance."""
    parts = run.explain["layers"]
    rows = []
    for part in parts:
        verb = "read from" if part["side"] == "readers" else "written to"
        where = f"{verb} layer {part['layer']}: {part['share_of_update']:.1%} of the update"
        if not part["features"]:
            where += ", no feature beyond chance"
        rows.append([where])
        for feature in part["features"]:
            link = feature_link(run, f"{part['layer']}/{feature['index']}")
            rows.append([link, f"{feature['share_left']:.1%}", f"{feature['left_max']:.1%}"])

    # Parts add up by their size
    def whole(key):
        shares = [part["share_of_update"] * part[key] for part in parts]
        return f"{sum(shares):.1%}"

    lead = "The update uses no feature clearly more than chance: features do not explain it."
    num_named = sum(len(part["features"]) for part in parts)
    if num_named:
        lead = (f"{whole('explained')} of the update lies along the {num_named} directions named "
                f"below; as many random directions hold {whole('explained_random')}.")
    if "subspace" in parts[0]:
        lead += (f" {whole('subspace')} lies in the subspace that was chosen before training; "
                 f"random subspaces of that size hold {whole('subspace_random')}.")
    if run.settings.get("init") == "sails":
        # A run of one tiny step has as large a share, and as many names
        lead += (" The adapter began inside it, so this share and the names say little about what "
                 "training did. What taking features out costs says more.")
    head = ["feature, fires most on", "share of that part", "at most, by chance"]
    return [
        tag("p", lead, class_="lead"),
        table(head, rows),
        note("Share: what a feature's decoder direction takes of ‖ΔW‖², the update's squared size, "
             "after the features above it. By chance: what the largest of as many random "
             "directions takes. One random adapter of 50 passes it anywhere."),
        tag("h3", "What taking features out costs"),
        removal(run)]


def removal(run):
    """What the answers are when directions are taken out of the update."""
    rows = []
    for trial in run.explain["removal"]:
        key = trial["feature"]
        tokens = small(" ", fires_on(run.words[key])) if key else None
        # The first row is what the others are compared with
        change = points(trial) if trial["safe"] and rows else None
        rows.append([
            join(trial["what"], tokens),
            percent(trial["safe"]),
            change,
            percent(trial["over_refusal"])])
    head = ["update", "harmful prompts refused", "change, points", "harmless prompts refused"]
    return [table(head, rows),
            note("A direction is projected out of the update, and the same prompts, plain and "
                 "behind a jailbreak, are answered again.")]


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
    return [form, tag("div", articles, class_="answers")]


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
    ("What changed", "scores", changed),
    ("What the update is made of", "explain", update),
    ("Answers side by side", "judged", answers),
    ("Training loss", "metrics", training),
    ("Features", "explain", features)]


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
