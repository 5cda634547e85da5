"""From conversations to rows of token ids with labels: tokenizer, chat turns, loss masks, packing.

Look at what a file trains on, with the toy's tokenizer or with Gemma's own:

    python data.py toy/data/train.jsonl --show 3
    python data.py harmless-base.jsonl.gz --show 5 --tokenizer google/gemma-2-2b --max-length 1024 | less -R

Files are HH-RLHF JSON lines (chosen, rejected: the chosen answer is what is trained on), or prompts as .txt, .csv, .jsonl or
.json, all also as .gz.

A conversation becomes  <bos> <start_of_turn> user\\n{x} <end_of_turn> \\n <start_of_turn> model\\n{y} <end_of_turn>
and the loss sees only y and the <end_of_turn> that closes it. The five control tokens of that line are put in by id;
the text in between is encoded by a tokenizer that doesn't know them, so no text can forge a turn.

Readers of data sets: HH-RLHF pairs, sets of prompts, texts and conversations, as .jsonl, .json, .csv or .txt, all also as .gz.

A stranger's file either reads right or raises InputError with one line that names the file, the line and what to do: lines,
what they unpack to, their values and their number are bounded by what honest files have.
"""

import contextlib
import csv
import gzip
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from run import files
from run.files import InputError
import bisect
import json
import random
from collections.abc import Iterable, Sequence
import tokenizers
import torch

LINE_LIMIT = files.JSON_LIMIT  # bytes; a longer line is a wrong or hostile file
ROOM = 900_000                 # for rows, as `_collect` counts: all of HH-RLHF takes 2.0 million, and may take 3.3
SPARE = 1 << 17                # lines, and values in JSON lines, that a file may have beyond one in 32 bytes
MARKER, SPEAKERS = re.compile(r"\n\n(Human|Assistant):"), {"Human": "user", "Assistant": "model"}
PROMPT_KEYS = ("prompt", "goal", "behavior", "instruction", "forbidden_prompt")  # the first that a row has holds its prompt

Turn = tuple[str, str]  # ("user" | "model", text)


@dataclass(slots=True)
class Pair:
    turns: tuple[Turn, ...]   # ends with a user turn
    aligned: str              # the chosen answer
    unaligned: str            # the rejected one
    line: int                 # where it stands in its file


@dataclass(slots=True)
class Prompt:
    turns: tuple[Turn, ...]   # ends with a user turn
    fields: dict              # the row's other columns
    line: int                 # line in its file; in a .json list, the item's number


@dataclass
class Counts:
    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows

    def __str__(self):
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.most_common())
        return f"{self.read:,} read, {self.kept:,} kept, {self.read - self.kept:,} dropped" + (f" ({reasons})" if reasons else "")


class _Dropped(Exception):
    """Why a well-formed row can't be used."""


def read_pairs(path: str | Path) -> tuple[list[Pair], Counts]:
    """(list[Pair], Counts) of HH-RLHF JSON lines, plain or .gz: objects with "chosen" and "rejected" conversations.

    The last assistant turn is the answer, what comes before is the prompt. Rows that are no pair are dropped and
    counted by reason. Raises InputError, with the line, for what isn't such a file, and where no pair is left.
    """
    def pair(row, where, line):
        sides = [_text(row, key, where) for key in ("chosen", "rejected")]
        if not all(sides):
            raise _Dropped("without both sides")
        chosen, rejected = map(_split, sides)
        if chosen[:-1] != rejected[:-1]:
            raise _Dropped("whose sides don't share a prompt")
        (prompt, aligned), (_, unaligned) = map(_answered, (chosen, rejected))
        if not (aligned and unaligned):
            raise _Dropped("with an empty answer")
        return Pair(prompt, aligned, unaligned, line)

    return _collect(json_lines(path), pair, path, "pair with both sides")


def read_prompts(path: str | Path) -> tuple[list[Prompt], Counts]:
    """(list[Prompt], Counts) of a set of prompts, plain or .gz; a prompt that occurs again is dropped and counted.

    .txt: one a line; .csv: a column named prompt, goal, behavior, instruction or forbidden_prompt, the first of these in any case;
    .jsonl, .json (a list): objects with such a key, or strings, or HH-RLHF's objects, whose chosen side gives the
    prompt. Raises InputError, with the line, for what isn't such a file, and where no prompt is left.
    """
    seen = set()

    def prompt(row, where, line):
        fields, turns = {}, ()
        if isinstance(row, dict):
            names = {key.lower(): key for key in row}
            key = next((names[key] for key in PROMPT_KEYS if key in names), None)
            fields = {k: v for k, v in row.items() if k not in (key, "chosen", "rejected")}
            if key is not None:
                row = _text(row, key, where)
            elif "chosen" in row:
                turns, _ = _answered(_split(_text(row, "chosen", where)))
            else:
                raise InputError(f"{where}: no field named {', '.join(PROMPT_KEYS)} or chosen, only: {_some(row) or 'nothing'}")
        elif not isinstance(row, str):
            raise InputError(f"{where}: a prompt is a string or an object, not a {type(row).__name__}")
        turns = turns or _answered((("user", row.strip()), ("model", "")))[0]
        if turns in seen:
            raise _Dropped("with a prompt seen before")
        seen.add(turns)
        return Prompt(turns, fields, line)

    readers = {".txt": _text_lines, ".csv": _csv_rows, ".jsonl": json_lines, ".json": _json_items}
    suffix = Path(Path(path).name.removesuffix(".gz")).suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: a set of prompts is a {', '.join(readers)} file (or one of these with .gz)")
    return _collect(readers[suffix](path), prompt, path, "usable prompt")


def read_texts(path: str | Path) -> Iterator[str]:
    """The documents (str) of a text file, one at a time: .jsonl objects with a "text", or .txt with empty lines between them;
    plain or .gz. Raises InputError, with the line, for what isn't such a file."""
    suffix = Path(Path(path).name.removesuffix(".gz")).suffix.lower()
    if suffix == ".jsonl":
        for line, row in json_lines(path):
            if text := _text(row, "text", f"{path}:{line}").strip():
                yield text
    elif suffix == ".txt":
        for filled, lines in itertools.groupby(_lines(path), key=lambda item: bool(item[1].strip())):
            if filled:
                yield "".join(text for _, text in lines).strip()
    else:
        raise InputError(f"{path}: texts are a .jsonl file of objects with a \"text\", or .txt (or one of these with .gz)")


def read_items(path: str | Path) -> Iterator:
    """The documents of a file, plain or .gz, one at a time: conversations as tuples of turns, or texts.

    .txt: a text a line. .jsonl: objects with "chosen" and "rejected" (HH-RLHF; both sides are taken), "prompt" and
    "response" (chat pairs), "messages" (chat, roles user and assistant), or "text". Conversations whose turns don't
    alternate are left out. Raises InputError.
    """
    if ".txt" in Path(path).suffixes:
        yield from (line.strip() for _, line in _text_lines(path))
        return
    for number, row in json_lines(path):
        keys = set(row) if isinstance(row, dict) else set()
        if {"chosen", "rejected"} <= keys:
            for side in ("chosen", "rejected"):
                turns = _split(_text(row, side, f"{path}:{number}"))
                if len(turns) > 1 and [who for who, _ in turns] == ["user", "model"] * (len(turns) // 2):
                    yield turns
        elif {"prompt", "response"} <= keys:
            yield tuple((who, _text(row, key, f"{path}:{number}")) for who, key in (("user", "prompt"), ("model", "response")))
        elif "messages" in keys:
            turns = _chat(row["messages"], f"{path}:{number}")
            if [who for who, _ in turns] == ["user", "model"] * (len(turns) // 2):
                yield turns
        elif "text" in keys:
            yield _text(row, "text", f"{path}:{number}")
        else:
            raise InputError(f'{path}:{number}: none of "chosen" and "rejected", "prompt" and "response", "messages", '
                             '"text"')


def _chat(messages, where):
    """Turns of a list of {"role": "user" or "assistant", "content": text}."""
    roles = {"user": "user", "assistant": "model"}
    try:
        return tuple((roles[message["role"]], message["content"].strip()) for message in messages)
    except (TypeError, KeyError, AttributeError):
        raise InputError(f'{where}: "messages" are objects with a "role", user or assistant, and a "content"') from None


def _collect(rows, make, path, what):
    """All rows of a file, as `make` has them. A row costs six, each value in it and each turn one: of 900,000, and as many
    more as honest files hold, one in 128 bytes."""
    items, counts = [], Counts()
    room = ROOM + _size(path) * (4 if str(path).endswith(".gz") else 1) // 128
    for line, row in rows:
        counts.read += 1
        room -= 6 + files.values_in(row)
        try:
            items.append(item := make(row, f"{path}:{line}", line))
            room -= len(item.turns)
        except _Dropped as reason:
            counts.dropped[str(reason)] += 1
        if room < 0:
            raise InputError(f"{path}:{line}: more rows and columns than are read here: split the file, or keep the columns that count")
    counts.kept = len(items)
    if not items:
        raise InputError(f"{path} holds no {what}: {counts if counts.read else 'it is empty'}")
    return items, counts


def _text(row, key, where):
    """A row's text, "" if it has none."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with {key!r}, found a {type(row).__name__}")
    value = row.get(key)
    if not isinstance(value, str | None):
        raise InputError(f"{where}: {key!r} is a {type(value).__name__}, not text")
    return value or ""


def _split(text):
    """Turns of "\\n\\nHuman: …\\n\\nAssistant: …", trimmed; text before the first marker is a turn of nobody's."""
    before, *parts = MARKER.split(text)
    turns = tuple([(SPEAKERS[who], said.strip()) for who, said in zip(parts[::2], parts[1::2])])
    return (("", before.strip()), *turns) if before.strip() else turns


def _answered(turns):
    """(prompt, answer) of turns that alternate, from the user's first to the model's last."""
    if not turns or [who for who, _ in turns] != ["user", "model"] * (len(turns) // 2):
        raise _Dropped("whose Human and Assistant turns don't alternate")
    if not turns[-2][1]:
        raise _Dropped("with an empty prompt")
    return turns[:-1], turns[-1][1]


def _size(path):
    """Bytes of a file; 0 where there is none, which whoever opens it will say."""
    return Path(path).stat().st_size if Path(path).is_file() else 0


def _some(names):
    """The first of what can be very many names, and long."""
    return ", ".join(name[:40] for name in itertools.islice(names, 20))


@contextlib.contextmanager
def _opened(path):
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises
        raise InputError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _lines(path):
    """(number, line) of a UTF-8 text file, plain or gzip, one at a time."""
    number, spare, left = 1, SPARE, (64 << 20) + 20 * _size(path)
    with _opened(path) as file:
        while line := file.readline(LINE_LIMIT + 1):
            if len(line) > LINE_LIMIT:
                raise InputError(f"{path}:{number}: a line of more than {LINE_LIMIT:,} bytes")
            if (left := left - len(line)) < 0:
                raise InputError(f"{path}:{number}: unpacks to more than 20 times its size, as no text does: unpack it yourself")
            if (spare := spare + len(line) / 32 - 1) < 0:
                raise InputError(f"{path}:{number}: {SPARE:,} lines more than a text of that size has: take the empty ones out")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
            yield number, text.removeprefix("\ufeff") if number == 1 else text  # Excel's byte order mark
            number += 1


def _json(text, where, most=files.VALUES):
    try:
        return files.parse(text, most)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _whole(path):
    with _opened(path) as file:
        text = file.read(files.JSON_LIMIT + 1)
    if len(text) > files.JSON_LIMIT:
        raise InputError(f"{path} is more than {files.JSON_LIMIT:,} bytes long: as one JSON value that is too much; use .jsonl")
    return text


def json_file(path: str | Path, most=files.VALUES) -> object:
    """The JSON value that a file is, plain or .gz; `most` as in files.parse. Raises InputError."""
    return _json(_whole(path), path, most)


def _text_lines(path):
    return ((number, text) for number, text in _lines(path) if text.strip())


def json_lines(path: str | Path) -> Iterator[tuple[int, object]]:
    """(number, value) of a JSON lines file, plain or .gz, one at a time. Raises InputError, with the line."""
    spare = SPARE
    for number, text in _text_lines(path):
        yield number, (row := _json(text, f"{path}:{number}"))
        if (spare := spare + len(text) / 32 - files.values_in(row)) < 0:
            raise InputError(f"{path}:{number}: {SPARE:,} values more than a text of that size has: keep the columns that count")


def _json_items(path):
    items = _json(_whole(path) or b"[]", path)
    if not isinstance(items, list):
        raise InputError(f"{path} holds a JSON {type(items).__name__}, not a list of prompts")
    return enumerate(items, 1)


def _csv_rows(path):
    rows = csv.reader((text for _, text in _lines(path)), strict=True)
    try:
        header = next(rows, [])
        if header and not {name.lower() for name in header} & set(PROMPT_KEYS):
            raise InputError(f"{path}:1: no column named {', '.join(PROMPT_KEYS)}, only: {_some(header)}")
        if len(header) > 1000:
            raise InputError(f"{path}:1: {len(header):,} columns; a set of prompts has at most 1,000")
        for row in filter(None, rows):
            if len(row) != len(header):
                raise InputError(f"{path}:{rows.line_num}: {len(row)} columns, where the header has {len(header)}")
            yield rows.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not valid CSV: {error}") from None


FORMATS = ("chat", "plain")
TOKENIZER_VALUES = 4 << 20  # as files.weight counts in a tokenizer.json; Gemma's has 2.8 million where its merges are written as lists
TOKENS = 1 << 20  # tokens and merges of one; Gemma's has 840,000
REGISTERED = 1 << 16  # characters of its registered tokens that are plain text, which take 80 bytes each; Gemma's has 700

# ---------------------------------------------------------------------------------------------------------------
# Tokenizer

NEEDED = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "start_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"}
# Control tokens by name, since some copies of Gemma's tokenizer.json leave them in the vocabulary without registering them.
CONTROL = re.compile(r"<(pad|eos|bos|unk|mask|2mass|unused\d+|(start|end)_of_\w+)>|\[(@BOS@|toxicity=0)\]")
# Added tokens that are plain text all the same: Gemma registers runs of white space, HTML tags (and its bytes).
PLAIN = re.compile(r"[\s▁]+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[bius]|su[bp]|code)>|<0x[0-9A-F]{2}>")
TOY_WORDS = r"\n|[^\w\s']"  # where the toy's tokenizer splits a text, besides spaces


PARTS = {"normalizer": {"Sequence": {"normalizers"}, "Replace": {"pattern", "content"}, "Lowercase": set()},
         "pre_tokenizer": {"Sequence": {"pretokenizers"}, "Split": {"pattern", "behavior", "invert"}},
         "decoder": {"Sequence": {"decoders"}, "Replace": {"pattern", "content"}, "ByteFallback": set(), "Fuse": set(),
                     "WordPiece": {"prefix", "cleanup"}}}


def bounded(kind: str, part: dict | None) -> bool:
    """Whether a tokenizer's normalizer, pre-tokenizer or decoder is one that Gemma's or the toy's has, or a few of these. Others
    could make three letters fill the memory (a Replace by something longer, thirty times over), or match for ever (a Regex)."""
    if part is None:
        return True
    type, fields = part["type"], PARTS[kind].get(part["type"])
    if fields is None or not part.keys() <= fields | {"type"}:   # what doesn't fit its type, the package reads as another
        return False
    if type == "Sequence":
        parts = part[next(iter(fields))]
        return len(parts) <= 8 and all(one["type"] != "Sequence" and bounded(kind, one) for one in parts)
    if type == "Replace":
        return "String" in part["pattern"] and len(part["content"]) <= len(part["pattern"]["String"])
    return type != "Split" or part["pattern"].get("Regex", TOY_WORDS) == TOY_WORDS


class Tokenizer:
    """Text to ids and back. `control` holds the ids that steer the model; `encode` never gives one, whatever the text.

    The tokenizers package looks for registered tokens in the text, and its `encode_special_tokens` turns that off
    only for those marked special (<unused5> and <mask> aren't). So control tokens are taken out of the file itself,
    out of the registered tokens, the vocabulary and the merges, before the encoder is built from it.
    """
    pad: int
    eos: int
    bos: int
    start_of_turn: int
    end_of_turn: int

    def __init__(self, spec: dict, name: str | Path):
        """spec: the parsed tokenizer.json; name: what to call it in errors. Raises InputError if it can't serve."""
        try:
            model, added = spec["model"], spec["added_tokens"]
            if model["type"] not in ("BPE", "WordLevel"):
                raise InputError(f"{name}: the tokenizer's model is {model['type']}; BPE (Gemma's) and WordLevel (the toy's) are supported")
            if not all(bounded(kind, spec.get(kind)) for kind in PARTS):
                raise InputError(f"{name}: its normalizer, pre-tokenizer or decoder is of no kind that Gemma's tokenizer or the toy's has")
            if (size := len(model["vocab"]) + len(model.get("merges", ())) + len(added)) > TOKENS:
                raise InputError(f"{name}: {size:,} tokens and merges are more than {TOKENS:,}; Gemma's tokenizer has 840,000")
            ids = dict(model["vocab"])
            for token in added:
                if ids.setdefault(token["content"], token["id"]) != token["id"]:  # text could be read as either
                    raise InputError(f"{name}: the token {token['content']!r} has two ids, {ids[token['content']]} and {token['id']}")
            if any(type(i) is not int or not 0 <= i < 1 << 31 for i in ids.values()):
                raise InputError(f"{name}: a token's id is not a number from 0 to 2^31 - 1")
            self.names = {i: content for content, i in ids.items()}
            if len(self.names) < len(ids):  # text for the one would be read as the other
                raise InputError(f"{name}: {len(ids):,} tokens share {len(self.names):,} ids")
            for attribute, content in NEEDED.items():
                if content not in ids:
                    raise InputError(f"{name} has no token {content}: give a Gemma tokenizer, or the toy's")
                setattr(self, attribute, ids[content])
            control = {token["content"] for token in added if token["special"] or not PLAIN.fullmatch(token["content"])}
            control |= {content for content in ids if CONTROL.fullmatch(content)}
            # <unk> is a control token where bytes can spell any text; elsewhere unknown words need it.
            unk = model.get("unk_token")
            spelled = (f"<0x{byte:02X}>" in ids or byte < 128 and chr(byte) in ids for byte in range(256))
            if model.get("byte_fallback") and all(spelled):
                model["unk_token"] = None
            else:
                control.discard(unk)
                if model["type"] == "WordLevel" and unk not in model["vocab"]:
                    raise InputError(f"{name}: the vocabulary has no unknown-word token ({unk})")
            self.control = frozenset(ids[content] for content in control)
            self.size = max(ids.values()) + 1

            gone = control | {unk}
            kept = [token for token in added if token["content"] not in gone]
            if (size := sum(len(token["content"]) for token in kept)) > REGISTERED:
                raise InputError(f"{name}: its registered tokens have {size:,} characters, more than {REGISTERED:,}")
            model["vocab"] = {content: i for content, i in model["vocab"].items() if content not in control}
            if model["type"] == "BPE":
                pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
                model["merges"] = [[a, b] for a, b in pairs if control.isdisjoint((a, b, a + b))]
                model["dropout"] = None
            spec |= {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{name} is not a tokenizer.json of the tokenizers package ({type(error).__name__}: {error})") from None
        try:
            self.encoder = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.decode(self.encode("user\nmodel\n "))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the package raises bare Exception, and a Rust panic isn't even that
            raise InputError(f"{name} can't be used as a tokenizer: {error}") from None
        for token in kept:  # one that isn't in the vocabulary is numbered anew, after those that are
            if self.encoder.token_to_id(token["content"]) != token["id"]:
                raise InputError(f"{name}: id {token['id']} of the added token {token['content']!r} doesn't follow the vocabulary")

    def encode(self, text: str) -> list[int]:
        return self.encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` (a list or 1-D tensor), control tokens left out: the encoder doesn't know them."""
        return self.encoder.decode(list(map(int, ids)), skip_special_tokens=False)

    def token(self, id: int) -> str:
        """One token as readable text."""
        return self.names.get(id, f"<{id}>").replace("▁", " ")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Tokenizer of a folder or hub repository that holds tokenizer.json, or of such a file itself (plain or .gz)."""
    path = Path(source).expanduser()
    if not path.is_file():
        path = files.locate(source, "tokenizer.json")
    spec = json_file(path, TOKENIZER_VALUES)
    if not isinstance(spec, dict):
        raise InputError(f"{path} holds a JSON {type(spec).__name__}, not a tokenizer")
    return Tokenizer(spec, path)


# ---------------------------------------------------------------------------------------------------------------
# Ids and labels

def prompt_tokens(tokenizer: Tokenizer, turns: Sequence[Turn], format="chat") -> list[int]:
    """Ids that generation continues. chat: <bos>, the turns, <start_of_turn>model\\n; plain: <bos>, "\\n\\nHuman: …\\n\\nAssistant:".

    Each text is encoded by itself. That gives the ids of the whole, since no token of Gemma's joins "\\n" to a letter.
    """
    t = tokenizer
    if format == "plain":
        names = {"user": "Human", "model": "Assistant"}
        return [t.bos] + t.encode("".join(f"\n\n{names[who]}: {said.strip()}" for who, said in turns) + "\n\nAssistant:")
    newline, ids = t.encode("\n"), [t.bos]
    for who, said in turns:
        ids += [t.start_of_turn, *t.encode(f"{who}\n"), *t.encode(said.strip()), t.end_of_turn, *newline]
    return ids + [t.start_of_turn, *t.encode("model\n")]


def closing(tokenizer: Tokenizer, format="chat") -> int:
    """The id that ends an answer: where generation stops."""
    return tokenizer.eos if format == "plain" else tokenizer.end_of_turn


@dataclass
class Example:
    tokens: list[int]
    start: int     # tokens[start:] is the response: what the loss sees
    closed: bool   # whether it ends with the token that closes it
    line: int = 0  # where it stands in its file


def make_example(tokenizer: Tokenizer, turns: Sequence[Turn], response: str, max_length: int, format="chat") -> Example | None:
    """Example of at most `max_length` tokens, cut at the response's end (then not closed); None if the prompt fills it."""
    tokens = prompt_tokens(tokenizer, turns, format)
    start = len(tokens)
    tokens += tokenizer.encode(" " * (format == "plain") + response.strip()) + [closing(tokenizer, format)]
    if start >= max_length:
        return None
    return Example(tokens[:max_length], start, len(tokens) <= max_length)


@dataclass
class Row:
    tokens: torch.Tensor     # (T) int64
    documents: torch.Tensor  # (T) int64: 1, 2, … numbers the row's examples, 0 is padding
    labels: torch.Tensor     # (T) int64: the id of token t+1 where it is trained on, else -100


def pack(examples: Sequence[Example], length: int, seed: int, epoch: int) -> list[Row]:
    """Shuffle by (seed, epoch) and pack whole examples into rows of `length` tokens: list[Row].

    Each example goes to the fullest row that still has room for it (best fit).
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(examples)))
    rng.shuffle(order)
    rows, rooms = [], []  # rooms: sorted (tokens free, row)
    for i in order:
        size = len(examples[i].tokens)
        if size > length:
            raise InputError(f"an example of {size:,} tokens doesn't fit in a row of {length:,}: shorten examples or lengthen rows")
        at = bisect.bisect_left(rooms, (size, 0))
        free, row = rooms.pop(at) if at < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(examples[i])
        bisect.insort(rooms, (free - size, row))
    rng.shuffle(rows)  # as they come, the last rows would hold little but long examples
    return [_row(row, length) for row in rows]


def _row(examples, length):
    tokens = torch.zeros(length, dtype=torch.int64)  # any id serves as padding: document 0 is seen by nobody
    documents, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    offset = 0
    for number, example in enumerate(examples, 1):
        end, ids = offset + len(example.tokens), torch.tensor(example.tokens)
        tokens[offset:end], documents[offset:end] = ids, number
        labels[offset + example.start - 1:end - 1] = ids[example.start:]
        offset = end
    return Row(tokens, documents, labels)


# ---------------------------------------------------------------------------------------------------------------
# Seeing it

TRAINED, TRAINED_CONTROL, CONTEXT, CONTEXT_CONTROL, RESET = "\033[32m", "\033[1;7;32m", "\033[2m", "\033[36m", "\033[0m"


def colored(tokenizer: Tokenizer, tokens: Sequence[int], start: int) -> str:
    """The tokens as text in ANSI colours: context dim, its control tokens cyan, what is trained on (from `start`) green."""
    def style(place):
        control = tokens[place] in tokenizer.control
        return (TRAINED, TRAINED_CONTROL)[control] if place >= start else (CONTEXT, CONTEXT_CONTROL)[control]

    text = ""
    for color, places in itertools.groupby(range(len(tokens)), style):
        ids = [tokens[place] for place in places]
        said = tokenizer.decode(ids) or "".join(map(tokenizer.token, ids))
        # A file's own escape codes must not reach the terminal: they are shown as ␛ and its like.
        said = re.sub(r"[\0-\x08\x0b-\x1f]", lambda code: chr(0x2400 + ord(code[0])), re.sub(r"[\x7f-\x9f]", "�", said))
        text += color + said + RESET
    return text


def main():
    parser = files.Parser(__doc__)
    parser.add_argument("file", help="the data file")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="examples to print (default 3; 0: only the counts)")
    parser.add_argument("--tokenizer", default=files.ROOT / "toy", metavar="SOURCE",
                        help="folder, hub repository, or tokenizer.json[.gz] file (default: the toy's)")
    parser.add_argument("--max-length", type=int, default=1024, metavar="TOKENS",
                        help="longer examples are cut at the end of the answer (default 1024)")
    parser.add_argument("--format", choices=FORMATS, default="chat",
                        help="chat: Gemma's turns, closed by <end_of_turn>; plain: Human:/Assistant: text, closed by <eos> (default chat)")
    args = parser.parse_args()
    if args.show < 0 or args.max_length < 2:
        raise InputError("--show must be at least 0 and --max-length at least 2")
    first = next(json_lines(args.file), (0, None))[1] if ".jsonl" in Path(args.file).suffixes else None
    paired = isinstance(first, dict) and not first.keys().isdisjoint(("chosen", "rejected"))
    tokenizer = load_tokenizer(args.tokenizer)
    if paired:
        pairs, counts = read_pairs(args.file)
        made = [(pair.line, make_example(tokenizer, pair.turns, pair.aligned, args.max_length, args.format)) for pair in pairs]
        examples = [(line, example) for line, example in made if example]
    else:  # nothing to train on: the whole prompt is context
        prompts, counts = read_prompts(args.file)
        turns = ((prompt.line, prompt_tokens(tokenizer, prompt.turns, args.format)) for prompt in prompts)
        examples = [(line, Example(tokens, len(tokens), True)) for line, tokens in turns if len(tokens) < args.max_length]

    print(f"{TRAINED}trained on{RESET}  {TRAINED_CONTROL}trained control token{RESET}  "
          f"{CONTEXT}context{RESET}  {CONTEXT_CONTROL}control token{RESET}")
    for line, example in examples[:args.show]:
        size, cut = len(example.tokens), "" if example.closed else ", cut to fit"
        print(f"\n── {args.file}:{line} · {size:,} tokens, {size - example.start:,} trained on{cut}")
        print(colored(tokenizer, example.tokens, example.start))
    total = sum(len(example.tokens) for _, example in examples)
    trained = total - sum(example.start for _, example in examples)
    print(f"\nrows      {counts}")
    cut = sum(not example.closed for _, example in examples)
    print(f"examples  {len(examples):,} of at most {args.max_length:,} tokens, {cut:,} of them cut to fit; "
          f"{counts.kept - len(examples):,} left out, since the prompt leaves no room")
    print(f"tokens    {total:,}, of which {trained:,} trained on ({trained / max(total, 1):.1%})")
    if examples:
        packed = len(pack([example for _, example in examples], args.max_length, seed=0, epoch=0))
        print(f"packed    {packed:,} rows of {args.max_length:,}, {total / (packed * args.max_length):.1%} full")


if __name__ == "__main__":
    files.run_command(main)
