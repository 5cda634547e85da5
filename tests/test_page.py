"""The page: everything shows, nothing that a file says becomes markup, and Chromium, where there is one, agrees."""

import base64
import itertools
import json
import os
import random
import re
import select
import shutil
import socket
import subprocess
import time
from html.parser import HTMLParser

import pytest

from report import markup
from report import page
from run.files import InputError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-extensions --hide-scrollbars --remote-debugging-pipe"
).split()
SECTIONS = ["happened", "learned", "inside", "curves", "answers", "made"]
HOSTILE = [
    "<script>window.hit=1</script>",
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "</p></section></main><h1>taken over</h1>",
    "<style>*{display:none}</style>",
    '" onmouseover="window.hit=1',
    "' autofocus onfocus='window.hit=1",
    "&lt;b&gt; &amp;amp; &#60;i&#62;",
    "<!-- <![CDATA[ ]]> -->",
    "a\0b\x1b[31mc\x85",
    "abc\u202efdp.exe\u202c",
    "x\u2028y\u2029z\u2066w",
    "javascript:window.hit=1",
    "$x_{$",
    "{{7*7}}${7*7}",
    "a" * 5000,
    "</textarea></select>",
    "<svg><script href=data:text/javascript,window.hit=1>",
    "<base href=https://example.com/><link rel=stylesheet href=//example.com/x>",
    "z\u0335\u0321" * 300,
]


# ---------------------------------------------------------------------------------------------------------------
# Runs made by hand


def share(count, n):
    return {"count": count, "n": n, "rate": count / n, "low": max(0, count / n - 0.05), "high": min(1, count / n + 0.05)}


def make_run(folder, text=None, prompts=8, long=0, parts=None, seed=0):
    """A run's files as the commands write them. `text(plain)` stands in for whatever a model, data set or file name says."""
    draw, text = random.Random(seed), text or (lambda plain: plain)
    sets = ("harmful", "lookalike")

    def feature(layer, index):
        tokens = [text(token) for token in (" I", " can", "'t", " help", " with", "\n", "<end_of_turn>")]
        return {
            "layer": layer,
            "index": index,
            "delta": 0.8,
            "rho": 0.1,
            "effect": 12.0,
            "mean": {"aligned": 0.9, "unaligned": 0.1},
            "frequency": {"aligned": 0.2, "unaligned": 0.05},
            "promotes": [text(" sorry"), text(" cannot")],
            "neuronpedia": text("https://www.neuronpedia.org/m/1/2"),
            "peaks": [{"activation": 7.5, "side": "aligned", "line": 3, "peak": 3, "tokens": tokens}] * 2,
        }

    def safety(rate):
        return {
            who: {
                name: {
                    "n": 100,
                    "role": name,
                    "full": share(rate, 100),
                    "comply": share(100 - rate, 100),
                    ("safe" if name == "harmful" else "over_refusal"): share(rate, 100),
                    "categories": {text("fraud"): share(3, 5)},
                }
                for name in sets
            }
            for who in ("base", "adapter")
        }

    layers = [
        {
            "layer": layer,
            "side": side,
            "modules": [f"layers.{layer}.self_attn.{m}_proj" for m in names],
            "norm2": 2.0,
            "share_of_update": 0.25,
            "subspace": 0.8,
            "subspace_random": 0.2,
            "dimension": 6,
            "explained": 0.5,
            "explained_random": 0.04,
            "features": [
                {
                    "index": i,
                    "chosen": i != 1,
                    "share": 0.3 / (i + 1),
                    "share_left": 0.2 / (i + 1),
                    "random": 0.016,
                    "random_max": 0.09,
                    "named": i < 2,
                }
                for i in range(4)
            ],
        }
        for layer in (1, 2)
        for side, names in (("readers", "qkv"), ("writers", "o"))
    ]
    moved = [
        {"layer": layer, "index": i, "base": 0.4, "adapter": 1.9 - i, "change": 1.5 - i, "error": 0.1}
        for layer in (1, 2)
        for i in range(4)
    ]
    spoken = [text(token) for token in ["how", "to", "\n", "sorry", ",", "no"]]
    rows = [
        {
            "model": who,
            "set": name,
            "role": name,
            "file": text(f"{name}.jsonl"),
            "line": line,
            "prompt": text(f"{name} prompt {line}"),
            "completion": text("sure, here" if who == "base" else "sorry, no")
            + ("".join(draw.choices("abcdefg <&>é ", k=40)) * long)[:long],
            "fields": {},
            "verdict": "full" if who == "adapter" and name == "harmful" else "comply",
            "reason": text("the reason"),
            "answer": None,
        }
        for who in ("base", "adapter")
        for name in sets
        for line in range(1, prompts // 2 + 1)
    ]
    files = {
        "config": {
            "settings": {"model": text("toy"), "layers": [1, 2], "seed": seed, "data": text("train.jsonl")},
            "source": {"model": "flag"},
            "command": ["train.py", "--data", text("train.jsonl")],
            "processes": 1,
            "versions": {"torch": "2"},
        },
        "scores": {
            "judge": "rules",
            "sets": safety(40 + seed),
            "share": {"subspace": 0.8, "random": 0.2, "random_sd": 0.01},
            "seconds": {"training": 1.0},
            "trainable": 10,
            "parameters": 100,
            "peak_bytes": 10**8,
        },
        "features": [feature(layer, i) for layer in (1, 2) for i in (0, 2, 3)],
        "explain": {
            "adapter": text("a"),
            "model": text("toy"),
            "sae": text("sae"),
            "norm": 3.2,
            "layers": layers,
            "words": {f"{layer}/1": feature(layer, 1) for layer in (1, 2)},
            "removal": {
                "prompts": 8,
                "set": "harmful",
                "rows": [
                    {
                        "what": text(what),
                        "layer": None,
                        "index": None,
                        "safe": share(7, 8),
                        "over_refusal": None,
                        "change": -0.125,
                        "p": 0.25,
                    }
                    for what in ("as trained", "without feature 1/0", "base model")
                ],
            },
            "inside": [
                {"role": role, "where": where, "prompts": 8, "features": moved}
                for role in sets
                for where in ("decision", "answer")
            ],
            "tokens": [
                {
                    "set": "harmful",
                    "line": 1,
                    "prompt": text("a prompt"),
                    "who": who,
                    "text": spoken,
                    "answer_start": 3,
                    "features": [{"layer": 1, "index": i, "activation": [0, 0, 0.5, 2.0, 0, 1.0]} for i in (0, 1)],
                }
                for who in ("base", "adapter")
            ],
        },
        "metrics": [{"step": step, "loss": 2 / step, "lr": 1e-3 / step} for step in range(1, 60)]
        + [{"stage": "training", "seconds": 1.0}]
        + [
            {
                "step": step,
                "probe": {
                    "safe": step / 60,
                    "over_refusal": 0.1,
                    "n": 8,
                    "singular_values": [0.1 * step, 0.05 * step],
                    "angle": 20.0,
                },
            }
            for step in (0, 20, 40, 60)
        ],
        "judged": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts or files:
        if name in ("metrics", "judged"):
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in files[name])
            )  # ASCII: lone surrogates too
        else:
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Chromium, over its debugging pipe


class Browser:
    """Headless Chromium. `said` is what its console, its log and its policy have said, `asked` the addresses it asked for."""

    def __init__(self):
        (read, self.send), (self.receive, write) = os.pipe(), os.pipe()

        def pipes():  # it reads commands from 3, and writes to 4
            a, b = os.dup(read), os.dup(write)
            os.dup2(a, 3), os.dup2(b, 4)

        self.profile = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            preexec_fn=pipes,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read), os.close(write)
        self.rest, self.number, self.session, self.said, self.asked = b"", itertools.count(1), None, [], []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.send)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.receive)
        shutil.rmtree(self.profile, ignore_errors=True)

    def message(self, until):
        """The next message, kept in `said` or `asked` if it is of that kind; None when the time has come."""
        while b"\0" not in self.rest:
            if not select.select([self.receive], [], [], max(0, until - time.monotonic()))[0]:
                return None
            if not (more := os.read(self.receive, 1 << 20)):
                raise ConnectionError("Chromium has ended")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        if message.get("method") in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Audits.issueAdded",
        ):
            self.said.append(json.dumps(message["params"])[:600])
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(message["params"]["request"]["url"])
        return message

    def call(self, method, **parameters):
        number, until = next(self.number), time.monotonic() + 30
        os.write(
            self.send,
            json.dumps(
                {"id": number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
            ).encode()
            + b"\0",
        )
        while (message := self.message(until)) is not None:
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
        raise TimeoutError(method)

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, width=1280, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.said, self.asked = [], []
        self.call("Page.navigate", url="file://" + str(path))
        until = time.monotonic() + 30
        while (message := self.message(until)) is not None and message.get("method") != "Page.loadEventFired":
            pass
        assert message is not None, "the page didn't load"
        time.sleep(0.05)

    def shot(self, path, width, height):
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not on this machine")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not on this machine")
    with Browser() as found:
        yield found


# ---------------------------------------------------------------------------------------------------------------
# Without Chromium: what is on the page, as a parser reads it


class Reader(HTMLParser):
    """Elements, attributes and text of a page; raises where an element isn't closed in its turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), attributes
        self.tags.append(tag)
        self.attributes += attributes
        self.text.append("" if tag in ("a", "b", "i", "mark", "small", "span") else " ")
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in markup.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def read(text):
    reader = Reader(text)
    return reader, " ".join("".join(reader.text).split())


def shown(text):
    """Text as the page is to show it, spaces aside."""
    return " ".join(markup.STEERING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text).replace("\n", "↵").split())


EVENTS = re.compile("on[a-z]+")
TAGS = set("""html head meta title link style body header h1 h2 h3 h4 h5 p b i a span small mark code pre nav main section div table thead
    tbody tr th td details summary svg line circle rect figure figcaption form label select option input output article script""".split())
PARTS = ("config", "scores", "features", "explain", "metrics", "judged")


def test_every_section_says_what_the_files_hold(tmp_path):
    text = page.page([make_run(tmp_path / "one")])
    reader, words = read(text)
    assert [tag for tag in reader.ids if tag in SECTIONS] == SECTIONS and len(reader.ids) == len(set(reader.ids))
    for part in (
        "refuses 40.0 % of harmful prompts in full (before 40.0 %",
        "80.0 % of its update lies in the safety subspace, where random bases of that rank would hold 20.0 %",
        "‖ΔW‖ = 3.2, 50.0 % lies in the span of 4 named features",
        "as many random directions would hold 4.0 %",
        "q k v of block 1",
        "o of block 2",
        "without feature 1/0",
        "−12.5",
        "harmful prompts, at the token that decides the first word",
        "8 prompts",
        "singular values of ΔW",
        "harmful prompt 1",
        "sorry, no",
        "for “the reason”",
        "python train.py --data train.jsonl",
        "seed 0, torch 2",
        "promotes sorry · cannot",
        "fires on 20.0 % of aligned tokens",
        "× 2",
    ):
        assert " ".join(part.replace("\u202f", " ").split()) in words.replace("\u202f", " "), part
    assert "can't be shown" not in words and text == page.page([tmp_path / "one"])  # and the same each time
    assert reader.tags.count("figure") == 5 and reader.tags.count("article") == 8


def test_named_and_unasked_features_are_told_apart(tmp_path):
    words = read(page.page([make_run(tmp_path / "one")]))[1]
    unasked = words[words.index("What nobody asked for") : words.index("more uses of chosen features")]
    assert (
        unasked.count("1/1") == 2 and "1/0" not in unasked and "8 more uses of chosen features, none beyond chance" in words
    )  # readers and writers
    found = json.loads((tmp_path / "one/explain.json").read_text())
    for part in found["layers"]:
        part["features"] = [f | {"named": False} for f in part["features"]]
    (tmp_path / "one/explain.json").write_text(json.dumps(found))
    assert "these features do not explain this adapter" in read(page.page([tmp_path / "one"]))[1]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_files_say_is_text(tmp_path, hostile):
    folder = tmp_path / (re.sub(r"[/\0]", "", hostile)[:60].encode("utf-8", "ignore").decode() or "x")  # a file's name is one too
    parts = [part for part in PARTS if part != "metrics"]
    text = page.page([make_run(folder, lambda _: hostile, parts=parts)])
    text.encode()  # no half of a surrogate pair is left
    reader, words = read(text)
    assert "can't be shown" not in words and words.count(shown(hostile)[:1000]) > 10
    assert not markup.STEERING.search(text) and set(reader.tags) <= TAGS and reader.tags.count("script") == 1
    for key, value in reader.attributes:
        assert not EVENTS.fullmatch(key) and (key not in ("href", "src") or value.startswith(("#", "data:,"))), (key, value)


def test_escape_is_complete():
    assert markup.tag("p", "<&>\"'", title="<&>\"'") == '<p title="&lt;&amp;&gt;&quot;&#x27;">&lt;&amp;&gt;&quot;&#x27;</p>'
    assert markup.join("a", None, 3, ["<", markup.tag("b", "<")]) == "a3&lt;<b>&lt;</b>"
    for code in (0, 8, 11, 27, 127, 0x9B, 0xAD, 0x200B, 0x202E, 0x2028, 0x2066, 0xFEFF, 0xD800, 0xE0041):
        assert markup.escape(f"a{chr(code)}b") == f"a⟨U+{code:04X}⟩b"
    assert markup.escape("a\tb\nc\r\nd é 漢 👩\u200d👧") == "a\tb\nc\nd é 漢 👩\u200d👧"


@pytest.mark.parametrize(
    "url, linked",
    [
        ("https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/1", True),
        ("javascript:alert(1)", False),
        (None, False),
        ("https://www.neuronpedia.org.example.com/", False),
        ("http://www.neuronpedia.org/x", False),
    ],
)
def test_only_neuronpedia_is_linked(tmp_path, url, linked):
    run = make_run(tmp_path / "one")
    found = json.loads((run / "features.json").read_text())
    (run / "features.json").write_text(json.dumps([feature | {"neuronpedia": url} for feature in found]))
    links = [
        value for key, value in Reader(page.page([run])).attributes if key == "href" and not value.startswith(("#", "data:,"))
    ]
    assert (url in links) == linked and all(link.startswith("https://www.neuronpedia.org/") for link in links)


@pytest.mark.parametrize(
    "parts",
    [*([part] for part in PARTS), *([other for other in PARTS if other != part] for part in PARTS), ["config", "metrics"]],
)
def test_missing_files_are_named_with_the_command_that_makes_them(tmp_path, parts):
    reader, words = read(page.page([make_run(tmp_path / "one", parts=parts)]))
    assert [tag for tag in reader.ids if tag in SECTIONS] == SECTIONS and "can't be shown" not in words
    for part in set(PARTS) - set(parts):
        if part == "explain" or "config" in parts:
            assert f"holds no {part}.json" in words and f"python {page.MAKE[part]} " in words, part
        elif part != "features":  # an adapter of another origin
            assert f"was not trained here: its folder has no {part} file" in words


@pytest.mark.parametrize(
    "name, text",
    [
        ("scores.json", "{"),
        ("explain.json", '{"layers": 3, "inside": [4], "tokens": "x", "words": {}, "removal": []}'),
        ("features.json", "[[], 3, {}]"),
        ("metrics.jsonl", '{"step": 1, "loss": NaN}\n{"step": "x"}\n{"step": 2, "probe": 3}\n'),
        ("judged.jsonl", '{"set": {}, "verdict": [1]}\n'),
        ("config.json", '{"settings": [1], "command": "x", "versions": {}}'),
        ("scores.json", '{"sets": {"adapter": {"a": 3}}}'),
        ("features.json", '[{"layer": 1, "index": 2, "peaks": [{"tokens": [], "peak": 9}]}]'),
    ],
)
def test_a_broken_file_costs_its_own_part_only(tmp_path, name, text):
    run = make_run(tmp_path / "one")
    (run / name).write_text(text)
    reader, words = read(page.page([run]))
    assert (
        [tag for tag in reader.ids if tag in SECTIONS] == SECTIONS
        and words.count("can't be shown") <= 3
        and "sorry, no" in words
        or name == "judged.jsonl"
    )


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no file of a run"):
        page.write_page([tmp_path], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_several_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / place / "run", seed=seed) for seed, place in enumerate("abc")]
    reader, words = read(page.page(runs))
    assert len(reader.ids) == len(set(reader.ids))
    assert all(f"{place}/run" in words[: words.index("What happened")] for place in "abc")  # one name: the folder tells them apart
    assert words.count("base of") == 3 * 2  # each has other figures before, in both tables
    article = words[words.index("harmful prompt 1") : words.index("harmful prompt 2")]
    assert article.count("sure, here") == 1 and article.count("sorry, no") == 3  # equal answers of base models once
    settings = words[words.index("Every setting") :]
    assert settings.index("seed") < settings.index("layers")  # what differs comes first


def test_rows_of_older_runs_have_no_role_and_no_probe(tmp_path):
    run = make_run(tmp_path / "one")
    rows = [json.loads(line) for line in (run / "judged.jsonl").read_text().splitlines()]
    (run / "judged.jsonl").write_text(
        "".join(json.dumps({key: value for key, value in row.items() if key != "role"}) + "\n" for row in rows)
    )
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "probe" not in line]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    words = read(page.page([run]))[1]
    assert "can't be shown" not in words and "+100.0 [" in words and "nothing was probed" in words  # 4 of 4 refuse now, of 0


def test_other_judges_are_shown(tmp_path):
    run = make_run(tmp_path / "one")
    rows = [
        json.loads(line) | {"rubric": {"score": 5, "reason": "<b>awful</b>"}, "shieldgemma": {"score": 0.91}}
        for line in (run / "judged.jsonl").read_text().splitlines()
    ]
    (run / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = json.loads((run / "scores.json").read_text())
    scores["sets"]["adapter"]["harmful"] |= {
        "harmfulness": {"mean": 2.5, "n": 4, "low": None, "high": None},
        "unread": 2,
        "high_risk": share(1, 4),
    }
    (run / "scores.json").write_text(json.dumps(scores))
    words = read(page.page([run]))[1]
    assert (
        "ShieldGemma 0.91; rubric 5: <b>awful</b>" in words
        and "harmful prompts: mean harmfulness, 1 to 5 ↓ – 2.5" in words
        and "one, harmful: 2" in words
    )


def make_evaluation(folder, text=lambda plain: plain):
    """The files of an evaluation: lost ability, and a suffix search over two prompts."""
    success = {"n": 2, "complied": share(1, 2), "reached": share(0, 2), "steps": {"0": share(0, 2), "10": share(1, 2)}}
    change = {"n": 9, "gained": 0, "lost": 3, "change": -1 / 3, "low": -0.6, "high": 0.0, "p": 0.25}
    wrote = {"mean": 41.3, "n": 3, "low": 27.8, "high": 61.3}
    ability = {
        "perplexity of benign text": {"base": wrote, "adapter": wrote, "change": {"n": 3, "ratio": 1.042, "low": 1.01, "high": 1.08}},
        "multiple choice": {"base": share(8, 9), "adapter": share(5, 9), "change": change},
    }
    scores = {"judge": "rules", "sets": {"base": {}, "adapter": {}}, "paired": {}, "ability": ability,
              "attacks": {who: {text("mine"): success} for who in ("base", "adapter")}}
    rows = [
        {"model": who, "set": text("mine"), "role": "harmful", "line": line, "prompt": text(f"rob {line} zq"), "plain": text(f"rob {line}"),
         "suffix": text(" zq") * bool(line), "completion": text("sure, here"), "verdict": "comply", "reason": "",
         "steps": 10, "complied": line * 7}
        for who in ("base", "adapter") for line in (0, 1)
    ]
    asked = {"run": text("/runs/one"), "sets": {text("mine"): ["harmful", text("x.csv")]}, "prompts": 2,
             "attack": "gcg", "plan": {"steps": 10},
             "command": ["eval.py", text("--attack")], "versions": {"torch": "2"}}
    folder.mkdir(parents=True)
    for name, value in (("eval", asked), ("scores", scores)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "attacks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judged.jsonl").write_text("")
    return folder


def test_an_evaluation_tells_what_it_asked(tmp_path):
    reader, words = read(page.page([make_evaluation(tmp_path / "gcg")]))
    assert [tag for tag in reader.ids if tag in SECTIONS] == ["happened", "answers", "made"] and "can't be shown" not in words
    for part in ("gcg complies with 50.0 % of mine once a suffix is searched", "mine under attack: complied within 10 steps ↓",
                 "began as the target ↓",
                 "perplexity of benign text 41.3", "× 1.042 [1.010, 1.080]", "multiple choice 88.9 %", "−33.3 [−60.0, +0.0], p 0.25",
                 "gives in to the prompt as it is", "gives in after 7 steps asked with zq", "python eval.py --attack", "attack steps 10",
                 "set mine harmful x.csv"):
        assert part in words.replace("\u202f", " "), part
    reader, words = read(page.page([make_run(tmp_path / "one"), tmp_path / "gcg"]))           # beside a run, which has all sections
    assert [tag for tag in reader.ids if tag in SECTIONS] == SECTIONS and "base of gcg" in words and "holds no" not in words


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_evaluations_say_is_text(tmp_path, hostile):
    reader, words = read(page.page([make_evaluation(tmp_path / "gcg", lambda _: hostile)]))
    assert "can't be shown" not in words and words.count(shown(hostile)[:1000]) > 5
    assert set(reader.tags) <= TAGS and reader.tags.count("script") == 1
    assert not any(EVENTS.fullmatch(key) for key, _ in reader.attributes)


@pytest.mark.parametrize("length", [40, 900, 20_000])
def test_a_thousand_completions_stay_small(tmp_path, length):
    page.write_page([make_run(tmp_path / "one", prompts=500, long=length)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < 3_000_000 and text.count("<article") == 500
    assert ("more characters" in text) == (length > 40)


def test_more_prompts_than_a_page_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PROMPTS", 6)
    reader, words = read(page.page([make_run(tmp_path / "one", prompts=40)]))
    assert reader.tags.count("article") == 6 and "6 of 40 prompts" in words and words.count("lookalike prompt") == 3


def test_fair_length():
    assert (
        page.fair_length([10, 10, 10], 100) == 100
        and page.fair_length([10, 500, 500], 110) == 50
        and page.fair_length([], 5) == 5
    )
    assert page.cut("abc", 3) == "abc" and page.cut("<<<<", 8).startswith("&lt;&lt;<i>")


def test_curves_of_long_runs_are_small_and_keep_no_trace(tmp_path):
    steps = [float(i) for i in range(20_000)]
    drawn = markup.curve([(steps, [i % 7 for i in range(20_000)], 1, "-")], "loss <of> it")
    assert (
        len(drawn) < 20_000
        and "var(--c1)" in drawn
        and not re.search("#[0-9a-f]{6}| id=|<style|DejaVu|http(?!://www.w3.org)", drawn)
        and "loss &lt;of&gt; it" in drawn
    )


# ---------------------------------------------------------------------------------------------------------------
# In Chromium


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_renders(tmp_path, browser, width, scheme):
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two" * 20))]
    page.write_page(runs, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width, scheme)
    assert not browser.said and browser.asked == [f"file://{tmp_path}/report.html"]
    browser.js("document.querySelectorAll('details').forEach(one => one.open = true)")
    wide, high, inner = browser.js("[document.documentElement.scrollWidth, document.documentElement.scrollHeight, innerWidth]")
    assert inner == width and wide <= inner and high > 2000
    assert (
        browser.js("[...document.querySelectorAll('main > section')].filter(one => one.offsetHeight > 60).map(one => one.id)")
        == SECTIONS
    )
    assert browser.js("[...document.querySelectorAll('figure svg')].every(svg => svg.getBoundingClientRect().height > 100)")
    dark = browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const over = (top, ground) => top.slice(0, 3).map((c, i) => c * top[3] / 255 + ground[i] * (1 - top[3] / 255));
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let worst = [99];
  for (const one of document.querySelectorAll('p, th, td, small, a, summary, i, b, mark, h1, h2, h4, output, code')) {
    const chain = []; for (let up = one; up; up = up.parentElement) chain.unshift(getComputedStyle(up).backgroundColor);
    const ground = chain.reduce((below, colour) => over(rgb(colour), below), [255, 255, 255]);
    const ink = over(rgb(getComputedStyle(one).color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, one.outerHTML.slice(0, 200)];
  }
  return worst; })()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(tmp_path, browser, scheme):
    page.write_page([make_run(tmp_path / "one")], tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1280, scheme)
    worst = browser.js(CONTRAST)
    assert worst[0] >= 4.5, worst  # WCAG 2.2, AA


def test_hostile_text_is_text_in_chromium(tmp_path, browser):
    said = itertools.cycle(HOSTILE)
    page.write_page(
        [
            make_run(tmp_path / "one", lambda _: next(said), prompts=2 * len(HOSTILE)),
            make_run(tmp_path / "<img src=x onerror=hit=1>", lambda _: next(said)),
        ],
        tmp_path / "report.html",
    )
    for width in (1280, 400):
        browser.open(tmp_path / "report.html", width)
        assert not browser.said and browser.asked == [f"file://{tmp_path}/report.html"]
        browser.js("document.querySelectorAll('details').forEach(one => one.open = true)")
        browser.js(
            "document.querySelectorAll('*').forEach(one => { one.dispatchEvent(new MouseEvent('mouseover'));"
            " if (one.focus) one.focus({preventScroll: true}); })"
        )
        assert browser.js(
            "[window.hit === undefined, document.scripts.length, document.styleSheets.length, document.images.length,"
            " document.querySelectorAll('h1').length]"
        ) == [True, 1, 1, 0, 1]
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        text = browser.js("document.body.textContent")
        for one in HOSTILE:
            assert shown(one)[:300] in " ".join(text.replace("\n", "↵").split()) or shown(one)[:300] in " ".join(text.split()), (
                one
            )
    assert not browser.said


def test_the_policy_stops_what_would_get_through(tmp_path, browser):
    """Even markup that slipped in unescaped runs nothing and fetches nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        page.write_page([make_run(tmp_path / "one")], tmp_path / "report.html")
        text = (
            (tmp_path / "report.html")
            .read_text()
            .replace(
                "<main>",
                f"<main><script>window.hit = 1</script><img src={place}/x onerror='window.hit = 1'>"
                f"<link rel=stylesheet href={place}/y>",
                1,
            )
        )
        (tmp_path / "report.html").write_text(text)
        browser.open(tmp_path / "report.html")
        assert browser.js("window.hit === undefined") and browser.said
        with pytest.raises(BlockingIOError):
            server.accept()


def test_filters(tmp_path, browser):
    page.write_page([make_run(tmp_path / "one", prompts=40)], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")

    def left(**values):
        browser.js("document.getElementById('filter').reset()")
        for name, value in values.items():
            browser.js(
                f"document.getElementById('filter').elements.{name}.{'checked' if value is True else 'value'} = {json.dumps(value)}"
            )
        browser.js("document.getElementById('filter').dispatchEvent(new Event('input'))")
        return browser.js(
            "[...document.querySelectorAll('#answers article')].filter(one => one.offsetHeight > 0).length"
        ), browser.js("document.querySelector('output').textContent")

    assert left() == (40, "40 of 40 prompts")
    assert (
        left(set="harmful")[0] == 20
        and left(set="lookalike", after="full")[0] == 0
        and left(after="full")[0] == 20
        and left(before="comply")[0] == 40
    )
    assert (
        left(changed=True)[0] == 20
        and left(words="PROMPT 13")[0] == 2
        and left(words="sorry, no", set="harmful", changed=True)[0] == 20
    )
    assert not browser.said


def test_it_can_be_read_without_script(tmp_path, browser):
    page.write_page([make_run(tmp_path / "one")], tmp_path / "report.html")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(tmp_path / "report.html")
        assert browser.js("[document.getElementById('filter').offsetHeight, document.querySelectorAll('article').length]") == [
            0,
            8,
        ]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_it_prints(tmp_path, browser):
    page.write_page([make_run(tmp_path / "one", prompts=200)], tmp_path / "report.html")
    browser.open(tmp_path / "report.html", scheme="light")
    pdf = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert (
        browser.js(
            "[...document.querySelectorAll('#answers article')].filter(one => getComputedStyle(one).display !== 'none').length"
        )
        == 20
    )
    browser.call("Emulation.setEmulatedMedia", media="")


def test_a_feature_s_name_leads_to_its_card(tmp_path, browser):
    page.write_page([make_run(tmp_path / "one")], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    browser.js("document.querySelector('#learned table a[href=\"#r1-1-0\"]').click()")
    assert browser.js("new Promise(done => setTimeout(() => done(document.getElementById('r1-1-0').offsetHeight > 20), 100))")
