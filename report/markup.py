"""A page that can be trusted with strangers' text: markup that escapes by itself, small pictures, and the document around.

    document("a title", tag("p", "2 < 3 ", tag("b", "as everybody knows")))

Strings become part of a page only through `join` and `tag`, which escape all that isn't Html already, and the document's
policy lets no script run but its own and nothing be fetched.
"""

import base64
import hashlib
import html
import io
import math
import re

# Characters that steer instead of showing: controls, direction overrides, invisible ones, halves of pairs. Joiners (200C,
# 200D) stay: scripts and emoji need them.
STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
                      "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]")
VOID = {"meta", "link", "input"}


class Html(str):
    """What is markup already. Every other string is escaped on its way into a page."""


def escape(value: object) -> str:
    """Any value as text for an element or a quoted attribute; a character that steers shows as its number, ⟨U+202E⟩."""
    return html.escape(STEERING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(value).replace("\r\n", "\n")))


def join(*parts) -> Html:
    """Html of strings and numbers (escaped), Html (as it is), and lists of these; None is nothing."""
    return Html("".join(part if isinstance(part, Html) else "" if part is None else escape(part)
                        if isinstance(part, (str, int, float)) else join(*part) for part in parts))


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element; class_ and data_x stand for class and data-x, True for an attribute alone, None and False for none."""
    written = "".join(f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
                      for key, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{name}{written}>" + ("" if name in VOID else f"{join(*inside)}</{name}>"))


def table(head, rows, label: str, text=(0,)) -> Html:
    """A table in a box that scrolls by itself; columns whose index is in `text` are flush left, the others numbers."""
    def line(kind, cells, **attributes):
        return [tag(kind, cell, class_="t" if i in text else None, **attributes) for i, cell in cells]

    body = [tag("tr", line("th", [(0, row[0])], scope="row"), line("td", list(enumerate(row))[1:])) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", line("th", enumerate(head), scope="col"))), tag("tbody", body)),
               class_="scroll", role="region", tabindex=0, aria_label=label)


def folded(head, rows, label: str, text=(0,), most=10) -> Html:
    """A table of the first `most` rows, and a second one, folded, of those that are more."""
    more = rows[most:]
    hidden = details(f"{len(more)} more", table(head, more, f"{label}, more", text)) if more else None
    return join(table(head, rows[:most], label, text), hidden)


def details(summary: object, /, *inside: object, opened=False, **attributes: object) -> Html:
    return tag("details", tag("summary", summary), *inside, open=opened, **attributes)


def note(*words: object) -> Html:
    return tag("p", *words, class_="note")


# ---------------------------------------------------------------------------------------------------------------
# Numbers; what isn't one shows as –

def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value, form=".3g") -> str:
    return format(value, form).replace("-", "−") if is_number(value) else "–"


def percent(value, digits=1) -> str:
    return f"{100 * value:.{digits}f}\u202f%" if is_number(value) else "–"


def probability(p) -> str:
    return "–" if not is_number(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


# ---------------------------------------------------------------------------------------------------------------
# Small pictures, in the page's own colours: c0 the base model, c1, c2, … the runs

def strip(marks, low=0.0, high=1.0) -> Html:
    """Marks (value, low, high of its interval, colour), one below the other on one scale; the base's are hollow."""
    def x(value):
        return f"{4 + 132 * (min(max(value, low), high) - low) / ((high - low) or 1):.1f}"

    end = 8 * len(marks) + 1
    drawn = [tag("line", x1=4, x2=136, y1=end, y2=end, class_="axis")]
    for i, (value, first, last, colour) in enumerate(marks):
        y = 8 * i + 5
        if is_number(value):
            if is_number(first) and is_number(last):
                drawn.append(tag("line", x1=x(first), x2=x(last), y1=y, y2=y, class_=colour))
            drawn.append(tag("circle", cx=x(value), cy=y, r=3, class_=colour))
    return tag("svg", drawn, width=140, height=end + 2, aria_hidden="true")


def bars(share, chance, limit, scale) -> Html:
    """A share as a bar, what chance makes of it as a grey one below, and a tick where chance ends."""
    def width(value):
        return f"{120 * min(value, scale) / scale if is_number(value) and scale else 0:.1f}"

    tick = tag("line", x1=width(limit), x2=width(limit), y1=0, y2=13, class_="tick") if is_number(limit) else None
    drawn = tag("rect", y=1, width=width(share), height=6, class_="share"), tag("rect", y=8, width=width(chance), height=4, class_="chance")
    return tag("svg", drawn, tick, width=122, height=14, aria_hidden="true")


def curve(lines, title: str, shares=False) -> Html:
    """A small plot of lines (xs, ys, colour number, dash) as SVG; `shares` are drawn from 0 to 100 %. Ours is all text in it."""
    import matplotlib                                           # takes a while, and only plots need it
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        axes = (figure := Figure((4.2, 2.4))).add_axes((0.13, 0.13, 0.84, 0.82))
        for xs, ys, colour, dash in lines:
            size = -(-len(xs) // 300)                           # a long run's steps, as means of a few
            xs, ys = ([sum(some) / len(some) for some in (values[i:i + size] for i in range(0, len(values), size))] for values in (xs, ys))
            axes.plot(xs, ys, color=f"#c0de{colour:02x}", linestyle=dash, linewidth=1.3)
        axes.tick_params(length=0, labelsize=8, labelcolor="#c0deff")
        axes.grid(axis="y", color="#c0defe", linewidth=0.7)
        axes.spines[:].set_visible(False)
        axes.locator_params(nbins=5)
        if shares:
            axes.set_ylim(-0.02, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        else:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
            axes.yaxis.set_major_formatter("{x:.3g}")
        figure.savefig(out := io.StringIO(), format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = out.getvalue()[out.getvalue().index("<svg"):]
    for pattern, new in (
            (r"(?s)<defs>.*?</defs>", ""), (r' (id|clip-path|xlink:href|xmlns:xlink)="[^"]*"', ""), (r' transform="rotate\(-?0 [^"]*"', ""),
            (r'<svg width="\S+" height="\S+"', f'<svg role="img" aria-label="{escape(title)}"'), (r"font-family: [^;]*; ", ""),
            ("#c0deff", "var(--soft)"), ("#c0defe", "var(--line)"), ("#c0de(..)", lambda found: f"var(--c{int(found[1], 16)})"),
            (r"(\d\.\d)\d+(?=[^<>]*>)", r"\1"), (r"\s+", " ")):
        drawn = re.sub(pattern, new, drawn)
    return tag("figure", tag("figcaption", title), Html(drawn))


# ---------------------------------------------------------------------------------------------------------------
# The document

def document(title: str, *body: object) -> str:
    """A whole HTML document as text, its style and script in it: it fetches nothing, and opens from disk."""
    script = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", name="referrer", content="no-referrer"),
               tag("title", title), tag("link", rel="icon", href="data:,"), tag("style", Html(CSS)))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body, tag('script', Html(JS))), lang='en')}\n"


CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --soft: #5c6672; --line: #e1e5ea; --wash: #f5f6f8;
  --hot: #f5a524; --link: #1f5fbf; --c0: #6b7580; --c1: #1f6fd1; --c2: #b8500c; --c3: #17805a; --c4: #8b45b5; --c5: #b3355a;
  --c6: #6d6a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --soft: #9aa5b1; --line: #2c323a; --wash: #1d2227; --hot: #94600c; --link: #86b6ff;
    --c0: #98a3ae; --c1: #6eaaff; --c2: #f29a55; --c3: #54c99b; --c4: #cc94ee; --c5: #f58aa8; --c6: #c9c44b; }
}
* { box-sizing: border-box; } html { scroll-padding-top: 3rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 82rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; letter-spacing: -.01em; } h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1.4rem 0 .3rem; } h5 { font-size: .85rem; margin: .8rem 0 .2rem; } header p { margin: .2rem 0; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; padding-top: 1.4rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: .7rem; font-size: .87rem; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px; }
small { font-size: .82em; color: var(--soft); font-weight: 400; }
code, pre { font: .87em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
code, pre { background: var(--wash); border-radius: 4px; } code { padding: .1em .3em; }
pre { padding: .6rem .8rem; white-space: pre-wrap; margin: .4rem 0; }
.lead { font-size: 1.05rem; max-width: 62rem; margin: .3rem 0 .8rem; }
.note { color: var(--soft); font-size: .87rem; max-width: 62rem; margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .5rem 0 .8rem; } .scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .22rem .7rem .22rem 0; text-align: right; vertical-align: baseline; white-space: nowrap;
  overflow-wrap: normal; }
.t { text-align: left; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 500; } tbody tr { border-bottom: 1px solid var(--line); } td svg { vertical-align: middle; }
#made td, #made tbody th, #happened tbody th { white-space: normal; } #happened tbody th { min-width: 11rem; }
#made td { overflow-wrap: anywhere; min-width: 9rem; }
.w { display: inline-block; max-width: 15rem; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom;
  unicode-bidi: isolate; }
details { margin: .35rem 0; } summary { cursor: pointer; padding: .15rem 0; } details > :not(summary) { margin-left: 1.05rem; }
.card { border-bottom: 1px solid var(--line); margin: 0; font-size: .87rem; } .card p { margin: .15rem 0; }
.card .w { max-width: 100%; white-space: normal; } .card :target { background: var(--wash); }
.tokens { margin: .1rem 0 .4rem; font-size: .9rem; line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; }
.tokens i { color: var(--soft); }
.line { display: grid; grid-template-columns: 9rem 1fr; gap: 0 1rem; border-bottom: 1px solid var(--line); padding: .2rem 0;
  font-size: .87rem; }
.line p { margin: 0; }
@media (max-width: 40rem) {
  .line { display: block; } .w { max-width: 9.5rem; } .far { display: none; } tbody th { white-space: normal; }
  #learned tbody th { min-width: 7rem; }
}
mark { color: inherit; border-radius: 3px; padding: .05em .1em;
  background: color-mix(in srgb, var(--hot) calc(15% + 75% * var(--a)), transparent); -webkit-print-color-adjust: exact;
  print-color-adjust: exact; }
svg { overflow: visible; } .axis { stroke: var(--line); } .tick { stroke: var(--ink); stroke-width: 1.5; }
.share { fill: var(--c1); } .chance { fill: var(--c0); opacity: .55; } .c0 { --c: var(--c0); } .c1 { --c: var(--c1); }
.c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
line[class^=c], circle { stroke: var(--c); stroke-width: 1.5; } circle { fill: var(--c); } circle.c0 { fill: var(--paper); }
.chip { font-weight: 600; white-space: normal; }
.chip::before { content: ""; display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .35em;
  background: var(--c); -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.chip.c0::before { background: none; border: 2px solid var(--c); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: .8rem 1.6rem; }
figure { margin: 0; } figcaption { font-size: .87rem; font-weight: 500; }
.plots svg { width: 100%; height: auto; font-family: inherit; stroke-linejoin: round; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .2rem 1.8rem; }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); } .pair > * { min-width: 0; }
.wide .far { display: none; } .wide .w { max-width: 11rem; } .wide th, .wide td { padding-right: .45rem; }
#filter:not([hidden]) { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1rem;
  align-items: center; padding: .5rem 0; margin-bottom: .6rem; background: var(--paper); border-bottom: 1px solid var(--ink);
  font-size: .87rem; }
select, input { font: inherit; max-width: 9rem; } output { color: var(--soft); margin-left: auto; }
article { border-bottom: 1px solid var(--line); padding: .55rem 0; content-visibility: auto; contain-intrinsic-size: auto 7rem;
  font-size: .92rem; }
article p { margin: .1rem 0; }
.text { white-space: pre-wrap; overflow: hidden; unicode-bidi: plaintext; max-height: 24rem; overflow-y: auto; }
.prompt { font-weight: 500; margin-bottom: .3rem; }
.verdict { font-size: .78rem; font-weight: 600; padding: .05em .5em; border-radius: 9px; border: 1px solid var(--soft); }
.verdict[data-is=full] { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.verdict[data-is=partial] { background: var(--line); } .verdict[data-is=empty] { border-style: dashed; }
.paper { display: none; }
@media print {
  body { font-size: 9.5pt; padding: 0; max-width: none; } nav, #filter:not([hidden]) { display: none; }
  .scroll { overflow: visible; } table { font-size: 8pt; } th, td { padding-right: .45rem; white-space: normal; }
  h2, h3, h4 { break-after: avoid; } tr, figure, article { break-inside: avoid; } article { content-visibility: visible; }
  .text { max-height: none; } a { color: inherit; text-decoration: none; } .paper { display: block; }
  article .pair { grid-template-columns: 1fr 1fr; }
  #answers article:nth-child(n + 21 of article:not([hidden])) { display: none; }
}
"""

JS = """
const form = document.getElementById('filter');
if (form) {
  const all = [...document.querySelectorAll('#answers article')];
  const show = () => {
    const want = name => form.elements[name].value, words = want('words').toLowerCase();
    let count = 0;
    for (const one of all) {
      const data = one.dataset, holds = (name, value) => !value || (data[name] || '').split(' ').includes(value);
      one.hidden = !((!want('set') || data.set === want('set')) && holds('before', want('before')) && holds('after', want('after'))
        && (!form.elements.changed.checked || 'changed' in data) && (!words || one.textContent.toLowerCase().includes(words)));
      count += !one.hidden;
    }
    form.querySelector('output').textContent = count + ' of ' + all.length + ' prompts';
  };
  form.hidden = false;
  form.addEventListener('input', show);
  form.addEventListener('submit', event => event.preventDefault());
  show();
}
"""
