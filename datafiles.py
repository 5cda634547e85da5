"""Readers of data sets: HH-RLHF pairs, sets of prompts, texts and conversations, as .jsonl, .json, .csv or .txt, all also as .gz.

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

import files
from files import InputError

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
    "response" (chat pairs), or "text". Conversations whose turns don't alternate are left out. Raises InputError.
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
        elif "text" in keys:
            yield _text(row, "text", f"{path}:{number}")
        else:
            raise InputError(f'{path}:{number}: neither "chosen" and "rejected", nor "prompt" and "response", nor "text"')


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
