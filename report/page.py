"""report.html: what an adapter learned and did, on one page that opens from disk.

    write_page("runs/a")        # runs/a/report.html, from the JSON files in that folder

A section is a function from a run to markup. What a model, a data set or a file says stays text:
`tag` and `join` escape every string that isn't Html already. page.html holds style and script.
"""

import base64
import hashlib
import html
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

from run.files import read_json, read_jsonl, write_text
from safety.figures import main_figure

TEMPLATE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
MAX_PROMPTS = 250      # of each set
MAX_CHARACTERS = 3000  # of an answer
MAX_MOVED = 8          # features in one table of those that fire differently

# ------------------------------------------------------------------------------
# Markup

# Control characters and direction overrides, which are shown as their number
STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Html(str):
    """Markup. Every other string is escaped on its way into a page."""


def escape(value: object) -> str:
    """Any value as text for an element or a quoted attribute."""
    return html.escape(STEERING.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", str(value)))


def join(*parts) -> Html:
    """Html of parts in a row: lists are joined, None is nothing, what isn't Html is escaped."""
    joined = ""
    for part in parts:
        if isinstance(part, list):
            joined += join(*part)
        elif part is not None:
            joined += part if isinstance(part, Html) else escape(part)
    return Html(joined)


def tag(name: str, /, *content, **attributes) -> Html:
    """An element; class_ and data_x stand for class and data-x, False for no attribute."""
    start = name
    for key, value in attributes.items():
        if value is not False:
            start += f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
    return Html(f"<{start}>" if name in ("input", "br") else f"<{start}>{join(*content)}</{name}>")


def small(*words) -> Html:
    return tag("small", *words)


def note(*words) -> Html:
    return tag("p", *words, class_="note")


def table(head, rows) -> Html:
    """The first column is text, the others are numbers. A row of one cell is a heading."""
    lines = []
    for first, *cells in rows:
        heading = {} if cells else {"colspan": len(head), "class_": "heading"}
        lines.append(tag("tr", tag("th", first, **heading), [tag("td", cell) for cell in cells]))
    top = tag("thead", tag("tr", [tag("th", cell) for cell in head]))
    return tag("table", top, tag("tbody", lines))


def number(value, form=".3g") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def percent(value) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u202f%"


def figure(value) -> str:
    """A share in per cent, or an average, with its 95 % interval: a figure of eval.py."""
    if not value:
        return "–"
    times, form = (100, ".1f") if "rate" in value else (1, ".2f")
    middle = percent(value["rate"]) if "rate" in value else number(value["mean"], form)
    if value["low"] is None:
        return middle
    low, high = number(times * value["low"], form), number(times * value["high"], form)
    return join(middle, " ", small(f"[{low}, {high}]"))


def change(value) -> str:
    """A paired change of eval.py: of a share in points, with McNemar's p; or of an average."""
    if not value or value["change"] is None:
        return "–"
    if "p" not in value:
        return number(value["change"], "+.2f")
    p = "p < 0.0001" if value["p"] < 1e-4 else f"p {value['p']:.2g}"
    return join(number(100 * value["change"], "+.1f"), " ", small(p))


# ------------------------------------------------------------------------------
# Sections

SETS = {"harmful": "harmful prompts", "jailbreak": "harmful prompts behind a jailbreak",
        "lookalike": "harmless look-alikes", "benign": "benign prompts"}
FIGURES = {"safe": "refused ↑", "over_refusal": "refused ↓", "correct": "answered right ↑"}
OTHER_JUDGES = {"harmfulness": "mean harmfulness, 1 to 5 ↓", "low_risk": "rubric 1 or 2 ↑",
                "high_risk": "rubric 5 ↓", "violates": "violate, says ShieldGemma ↓"}
MODELS = {"base": "base model", "adapter": "with adapter"}
VERDICTS = {"full": "refused", "partial": "partly refused", "comply": "complied", "empty": "blank"}
WHERE = {"decision": "before the first word of the answer", "answer": "over the answer"}


def changed(run):
    """Shares of all sets, base beside adapter."""
    rows = []
    for name, adapter in run.scores["sets"]["adapter"].items():
        base = run.scores["sets"]["base"].get(name, {})
        paired = run.scores.get("paired", {}).get(name, {})
        # The role's main figure, then those of other judges
        main = main_figure(adapter["role"], adapter)
        for key in [main, *(key for key in OTHER_JUDGES if key in adapter)]:
            words = f"{SETS.get(name, name)}: {(FIGURES | OTHER_JUDGES)[key]} "
            rows.append([join(words, small(f"n = {adapter['n']}")), figure(base.get(key)),
                         figure(adapter[key]), change(paired.get(key))])
    return [table(["share of answers", "base model", "with adapter", "change, points"], rows),
            note("In brackets: 95 % intervals (Wilson). p: McNemar's exact test, same prompts. "
                 f"Judge: {run.scores['judge']}. A harmful prompt counts as refused if the answer "
                 "gives nothing away. A harmless one counts if it refuses at all.")]


def feature_link(run, feature) -> Html:
    """A feature's name, linked to its card, and the tokens that it fires most on."""
    key = f"{feature['layer']}/{feature['index']}"
    link = tag("a", key, href=f"#feature-{key}") if key in run.words else key
    return join(link, " ", small(fires_on(run, key)))


def fires_on(run, key) -> str:
    peaks = run.words[key]["peaks"] if key in run.words else []
    return dotted(peak["tokens"][peak["peak"]] for peak in peaks)


def dotted(tokens) -> str:
    return " · ".join(dict.fromkeys(token.strip() or "↵" for token in tokens))


def modules(names) -> str:
    """["layers.2.self_attn.q_proj", …] in few words: "q k v of blocks 2, 3"."""
    parts = [name.split(".") for name in names]
    leaves = dict.fromkeys(part[-1].removesuffix("_proj") for part in parts)
    blocks = dict.fromkeys(part[1] for part in parts)
    return f"{' '.join(leaves)} of block{'s' * (len(blocks) > 1)} {', '.join(blocks)}"


def update(run):
    """The features that the update is made of, beside chance."""
    parts = run.explain["layers"]

    def whole(key):
        return percent(sum(part["share_of_update"] * (part[key] or 0) for part in parts))

    named, places, num_named = [], [], 0
    for part in parts:
        verb = "read by" if part["side"] == "readers" else "written by"
        where = f"layer {part['layer']}, {verb} {modules(part['modules'])}"
        shares = ("share_of_update", "subspace", "subspace_random", "explained", "explained_random")
        places.append([where, *(percent(part[key]) for key in shares)])
        here = [f | {"layer": part["layer"]} for f in part["features"] if f["named"]]
        named += [[where]] if here else []
        named += [[feature_link(run, feature), percent(feature["share_left"]),
                   percent(feature["left_max"])] for feature in here]
        num_named += len(here)

    lead = "The update uses no feature clearly more than chance: features do not explain it."
    if named:
        lead = (f"{whole('explained')} of the update lies along the {num_named} directions named "
                f"below; as many random directions hold {whole('explained_random')}.")
    if parts[0]["subspace"] is not None:
        lead += (f" {whole('subspace')} lies in the subspace that was chosen before training; "
                 f"random subspaces of that size hold {whole('subspace_random')}.")
    if run.settings.get("init") == "sails":
        # A run of one tiny step has as large a share, and as many names
        lead += (" The adapter began inside it, so this share and the names say little about what "
                 "training did. What taking features out costs says more.")
    head = ["feature, fires most on", "share of these modules' update", "at most, by chance"]
    columns = ["modules", "of the update", "in subspace", "by chance", "in named", "by chance"]
    return [
        tag("p", lead, class_="lead"), table(head, named) if named else None,
        note("Share: what a feature's decoder direction takes of ‖ΔW‖², the update's squared size, "
             "after the features above it. By chance: what the largest of as many random "
             "directions takes. One random adapter of 50 passes it anywhere."),
        tag("details", tag("summary", "Where the update is"), table(columns, places)),
        removal(run)]


def removal(run):
    """What the answers are when directions are taken out of the update."""
    tried, rows = run.explain["removal"], []
    for row in tried["rows"]:
        tokens = fires_on(run, f"{row['layer']}/{row['index']}")
        rows.append([join(row["what"], " ", small(tokens)), figure(row["safe"]),
                     change(row if rows else None), figure(row["over_refusal"])])
    head = ["update", "harmful prompts refused", "change, points", "harmless prompts refused"]
    return [tag("h3", "What taking features out costs"), table(head, rows),
            note("A direction is projected out of the update, and the same "
                 f"{tried['prompts']} prompts ({tried['set']}) are answered again.")]


def shaded(tokens, strengths, prompt_end=0) -> Html:
    """Tokens as running text: strengths (0 to 1) are the ground, the prompt is slanted."""
    spaced = any(token.startswith(" ") for token in tokens)
    marked = []
    for i, token in enumerate(tokens):
        text = token.replace("\n", "↵")
        if strengths[i] > 0:
            text = tag("mark", text, style=f"--a:{strengths[i]:.2f}")
        elif i < prompt_end:
            text = tag("i", text)
        # A vocabulary of whole words has no spaces of its own
        marked += [text, None if spaced else " "]
    return join(marked)


def inside(run):
    """Features that fire differently, and one prompt of each set token by token."""
    tables, views = [], {}
    head = ["feature, fires most on", "change", "base model", "with adapter"]
    for part in run.explain["inside"]:
        moved = sorted(part["features"], key=lambda feature: -abs(feature["change"]))
        rows = []
        for feature in moved[:MAX_MOVED]:
            error = small(f" ± {number(feature['error'], '.2f')}")
            rows.append([feature_link(run, feature), join(number(feature["change"], "+.2f"), error),
                         number(feature["base"], ".2f"), number(feature["adapter"], ".2f")])
        title = f"{SETS[part['role']]}, {WHERE[part['where']]} ({part['prompts']} prompts)"
        tables.append(tag("details", tag("summary", title), table(head, rows), open=not tables))
    largest = {}                         # activation of each feature, in all views
    for view in run.explain["tokens"]:
        for feature in view["features"]:
            place = feature["layer"], feature["index"]
            largest[place] = max(largest.get(place, 0), *feature["activation"])
    for view in run.explain["tokens"]:
        title = join(small(view["set"]), " ", view["prompt"])
        lines = views.setdefault(title, [])
        lines.append(tag("h4", MODELS[view["who"]]))
        for feature in view["features"]:
            scale = largest[feature["layer"], feature["index"]] or 1
            strengths = [value / scale for value in feature["activation"]]
            text = shaded(view["text"], strengths, view["answer_start"])
            lines.append(tag("p", feature_link(run, feature), tag("br"), text, class_="tokens"))
    lead = "The features whose mean activation moved most. Both models read the adapter's answers."
    return [tag("p", lead, class_="lead"), tables,
            tag("h3", "Token by token"),
            note("The stronger the ground of a token, the stronger the feature fires there. "
                 "Slanted: the end of the prompt. Then comes each model's own answer."),
            [tag("details", tag("summary", title), lines) for title, lines in views.items()]]


def features(run):
    """What is known of every feature that the page mentions, by layer."""
    layers = {}
    for key, feature in run.words.items():
        facts = [f"Fires on {percent(rate)} of {texts} tokens. "
                 for texts, rate in feature["frequency"].items()]
        url, link = feature.get("neuronpedia") or "", None
        if url.startswith("https://www.neuronpedia.org/"):
            link = tag("a", "Neuronpedia", href=url, rel="noreferrer")
        card = [tag("h4", key, " ", small(fires_on(run, key))),
                tag("p", facts, "Promotes ", dotted(feature["promotes"]), ". ", link)]
        contexts = []
        for peak in feature["peaks"]:
            strengths = [float(i == peak["peak"]) for i in range(len(peak["tokens"]))]
            words = small(f"{number(peak['activation'])} {peak['side']} ")
            if peak["tokens"] not in contexts:
                card.append(tag("p", words, shaded(peak["tokens"], strengths), class_="tokens"))
            contexts.append(peak["tokens"])
        # A link to what is inside a closed <details> opens it
        layers.setdefault(key.partition("/")[0], []).append(
            tag("div", card, id=f"feature-{key}", class_="card"))
    return [note("The tokens on which each feature fires most, in context, with its activation "
                 "and the kind of text. Promotes: the tokens that its direction favours."),
            [tag("details", tag("summary", f"Layer {layer}: {len(cards)} features"), cards)
             for layer, cards in layers.items()]]


def answers(run):
    """Answers of both models side by side; of each set, changed verdicts first."""
    exchanges = {}                       # {set: {(line, prompt): {"base" or "adapter": row}}}
    for row in run.judged:
        of_set = exchanges.setdefault(row["set"], {})
        of_set.setdefault((row["line"], row["prompt"]), {})[row["model"]] = row
    articles = []
    for name, of_set in exchanges.items():
        items = sorted(of_set.items(), key=lambda item: not is_changed(item[1]))
        articles += [article(name, *place, rows) for place, rows in items[:MAX_PROMPTS]]
    options = [tag("option", "all sets", value=""), [tag("option", name) for name in exchanges]]
    form = tag("form", tag("select", options, name="set", aria_label="set"),
               tag("label", tag("input", type="checkbox", name="changed"), " changed only"),
               tag("input", type="search", name="words", placeholder="words", aria_label="words"),
               tag("output"), id="filter", hidden=True)
    return [form, articles, tag("button", "20 more", id="more", hidden=True),
            note(f"Of each set at most {MAX_PROMPTS} prompts; judged.jsonl has all.")]


def is_changed(rows):
    return len({row["verdict"] for row in rows.values()}) > 1


def article(name, line, prompt, rows):
    """One prompt and the answers {"base" or "adapter": row} to it."""
    sides = []
    for model, label in MODELS.items():
        if model in rows:
            verdict, text = rows[model]["verdict"], rows[model]["completion"]
            badge = tag("b", VERDICTS[verdict], class_=f"verdict {verdict}")
            text = text[:MAX_CHARACTERS] + " …" * (len(text) > MAX_CHARACTERS)
            sides.append(tag("div", small(label), " ", badge, tag("p", text, class_="text")))
    return tag("article", tag("p", small(f"{name} {line} "), prompt, class_="prompt text"),
               tag("div", sides, class_="pair"), data_set=name, data_changed=is_changed(rows))


def training(run):
    """The loss over steps, as SVG."""
    points = [(row["step"], row["loss"]) for row in run.metrics if "loss" in row]
    (first, _), (last, final) = points[0], points[-1]
    top = max(loss for _, loss in points)
    places = [f"{40 + 560 * (step - first) / max(1, last - first):.1f},{170 - 150 * loss / top:.1f}"
              for step, loss in points]
    labels = [(36, 170, "0"), (36, 24, number(top)), (90, 188, f"step {first}"),
              (600, 188, f"step {last}: {number(final)}")]
    return tag("svg", tag("path", d="M40,20V170H600"), tag("polyline", points=" ".join(places)),
               [tag("text", words, x=x, y=y) for x, y, words in labels],
               viewBox="0 0 610 195", role="img", aria_label="training loss over steps")


def made(run):
    """The command, and every setting with where it came from."""
    rows = [[name.replace("_", "-"), str(value), run.config["source"].get(name)]
            for name, value in run.settings.items()]
    versions = [f"{name} {version}" for name, version in run.config["versions"].items()]
    return [tag("pre", f"python {shlex.join(run.config['command'])}"),
            note(", ".join(versions)),
            tag("details", tag("summary", "Every setting"),
                table(["setting", "value", "from"], rows))]


# ------------------------------------------------------------------------------
# The page

SECTIONS = [  # title, the file that it needs, function
    ("What changed", "scores", changed), ("What the update is made of", "explain", update),
    ("What changed inside", "explain", inside), ("Answers side by side", "judged", answers),
    ("Features", "explain", features), ("Training loss", "metrics", training),
    ("How it was made", "config", made)]


def read_run(folder: Path) -> SimpleNamespace:
    """What a folder's JSON files say; nothing of a file that isn't there."""
    run = SimpleNamespace(name=folder.resolve().name)
    for name in ("config.json", "scores.json", "explain.json", "metrics.jsonl", "judged.jsonl"):
        path = folder / name
        read = read_json if path.suffix == ".json" else read_jsonl
        setattr(run, path.stem, read(path) if path.exists() else {})
    run.settings, run.words = run.config.get("settings", {}), run.explain.get("words", {})
    return run


def page(folder: str | Path) -> str:
    """The page of a run's folder, or of a folder with an explain.json alone."""
    run = read_run(Path(folder))
    sections, links = [], []
    for title, needs, section in SECTIONS:
        if getattr(run, needs):
            key = title.replace(" ", "-").lower()
            sections.append(tag("section", tag("h2", title), section(run), id=key))
            links.append(tag("a", title, href=f"#{key}"))
    about = f"A LoRA adapter on {run.settings.get('model') or run.explain.get('model')}"
    if run.settings:
        about += ", rank {rank}, init {init}, seed {seed}".format(**run.settings)
    header = tag("header", tag("h1", run.name), tag("p", about), tag("nav", links))
    script = TEMPLATE.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {"DIGEST": digest, "TITLE": escape(run.name), "BODY": header + tag("main", sections)}
    # In one pass, so that nothing is looked for in what was filled in
    return re.sub("{{(DIGEST|TITLE|BODY)}}", lambda match: filled[match[1]], TEMPLATE)


def write_page(folder: str | Path) -> Path:
    """Write folder/report.html: one file, which fetches nothing."""
    write_text(path := Path(folder) / "report.html", page(folder))
    return path
