"""Readers of data sets: pairs of answers (HH-RLHF), sets of prompts, and texts for SAEs.

A file is .jsonl, .json, .csv (with a header), .txt (a text a line) or .parquet, and may be gzipped
(.gz). A malformed row raises InputError, which names file and line.
"""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from run.files import InputError, json_lines, opened, read_json, text_lines

# HH-RLHF's own, and what is left of it where white space was cleaned.
HH_MARKERS = (re.compile(r"\n\n(Human|Assistant):"), re.compile(r"\n[ \t]*(Human|Assistant):"))
ROLES = {"human": "user", "user": "user", "assistant": "model", "model": "model"}
# The first of these that a row has is its prompt. Alpaca's and Dolly's instructions go with a text.
PROMPT_KEYS = ("prompt", "goal", "behavior", "instruction", "forbidden_prompt", "question", "text")
INPUT_KEYS = ("input", "context")
# The keys of a conversation, or of an answer to the row's prompt.
ANSWER_KEYS = ("chosen", "rejected", "response", "output", "messages")
ALIGNED_KEYS = tuple(key for key in ANSWER_KEYS if key != "rejected")
# What messages say that a file lacks.
PAIR = (f"usable pair (chosen and rejected, or {' or '.join(ALIGNED_KEYS)} alone; each \"Human: … "
        "Assistant: …\", messages of role and content, or an answer to the row's prompt)")
PROMPT = f"usable prompt (a column or key {', '.join(PROMPT_KEYS)}, or chosen and rejected)"

Turn = tuple[str, str]  # ("user" | "model", text)


@dataclass(slots=True)
class Pair:
    turns: tuple[Turn, ...]   # ends with a user turn
    aligned: str              # the chosen answer
    unaligned: str            # the rejected answer, "" where the row has none
    line: int                 # in its file


@dataclass(slots=True)
class Prompt:
    turns: tuple[Turn, ...]   # ends with a user turn
    fields: dict              # the row's other columns, by names in lower case
    line: int                 # in its file; the item's number in a .json list
    aligned: str = field(default="", compare=False)     # the chosen answer, where the row has one


@dataclass
class Counts:
    read: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)  # {reason: rows}

    def __str__(self):
        reasons = [f"{count:,} dropped {reason}" for reason, count in self.dropped.most_common()]
        return ", ".join([f"{self.read:,} read", f"{self.kept:,} kept", *reasons])


class _Dropped(Exception):
    """Why a well-formed row can't be used."""


def read_pairs(path: str | Path) -> tuple[list[Pair], Counts]:
    """The pairs of a file of objects with "chosen" and "rejected", or with one of ALIGNED_KEYS.

    Each is a conversation (HH-RLHF's text, or messages of role and content), or an answer to the
    row's prompt. The last assistant turn is the answer, the turns before it are the prompt.
    Unusable rows are counted by reason. Raises InputError for a malformed line, and if no pair is
    left.
    """
    def make_pair(row, place, line):
        key = next(filter(row.get, ALIGNED_KEYS), "chosen")
        chosen = _conversation(row, key, place)
        if not chosen:
            raise _Dropped("without an aligned answer")
        # A pair is one prompt with two answers; fine-tuning data have one.
        rejected = _conversation(row, "rejected", place) or (*chosen[:-1], ("model", None))
        if chosen[:-1] != rejected[:-1]:
            raise _Dropped("whose sides don't share a prompt")
        prompt, aligned = _split_answer(chosen)
        _, unaligned = _split_answer(rejected)
        if "" in (aligned, unaligned):
            raise _Dropped("with an empty answer")
        return Pair(prompt, aligned, unaligned or "", line)

    return _collect(path, make_pair, PAIR)


def read_prompts(path: str | Path) -> tuple[list[Prompt], Counts]:
    """The prompts of a file; one that occurs again is dropped and counted.

    The prompt is a row's text, a field named as in PROMPT_KEYS (text or messages), or
    what the conversations "chosen" and "rejected" begin with. Raises InputError for a malformed
    line, and if no prompt is left.
    """
    seen = set()

    def make_prompt(row, place, line):
        key, prompt = _prompt(row, place)
        if "chosen" in row or "rejected" in row:
            turns = _conversation(row, "chosen", place)
        elif key is not None:
            # Here a text that looks like turns stays one text.
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            turns = (*_turns(prompt, "user", place), ("model", ""))
        else:
            raise InputError(f"{place}: no {PROMPT}")
        turns, aligned = _split_answer(turns)
        if turns in seen:
            raise _Dropped("with a prompt seen before")
        seen.add(turns)
        # The other columns stay with the prompt: categories, right answers, targets of an attack.
        used = (key, "chosen", "rejected")
        fields = {key: row[key] for key in row if key not in used}
        return Prompt(turns, fields, line, aligned)

    return _collect(path, make_prompt, PROMPT)


def read_items(path: str | Path) -> Iterator[str | tuple[Turn, ...]]:
    """The documents that SAEs are trained on, one at a time: texts, or conversations as turns.

    A row has "chosen" and "rejected" (both are taken), another of ANSWER_KEYS, or "text".
    Conversations whose turns don't alternate are left out. Raises InputError for a malformed line.
    """
    for place, _, row in _read_rows(path):
        keys = [key for key in (*ANSWER_KEYS, "text") if key in row]
        if not keys:
            raise InputError(f"{place}: no {', '.join(ANSWER_KEYS)}, or text")
        # Other columns repeat an answer, or hold its conversation as text.
        for key in keys[:1 + ("rejected" in row)]:
            if key == "text":
                yield _text(row, key, place)
            elif _alternate(turns := _conversation(row, key, place)):
                yield turns


def _collect(path, make, kind):
    """(what `make` makes of the rows, Counts)."""
    items = []
    counts = Counts()
    for place, number, row in _read_rows(path):
        # An unusable row is counted; a malformed one ends the reading with an InputError.
        counts.read += 1
        try:
            items.append(make(row, place, number))
        except _Dropped as reason:
            counts.dropped[str(reason)] += 1
    counts.kept = len(items)
    if not items:
        raise InputError(f"{path} holds no {kind}: {counts}")
    return items, counts


def _prompt(row, place):
    """(its key, text or messages) of a row's prompt; (None, "") if it has none."""
    key = next(filter(row.__contains__, PROMPT_KEYS), None)
    if isinstance(row.get(key), list):
        return key, row[key]
    # Rows that differ in their input alone are different prompts.
    keys = (key, *INPUT_KEYS) if key == "instruction" else (key,)
    texts = [_text(row, key, place).strip() for key in keys]
    return key, "\n\n".join(filter(None, texts))


def _text(row, key, place):
    """A row's text, "" if it has none."""
    if not isinstance(row, dict) or not isinstance(row.get(key), str | None):
        raise InputError(f"{place}: expected text, or an object whose {key!r} is text")
    return row.get(key) or ""


def _conversation(row, key, place):
    """Turns of one side of a pair, () without an answer. An answer alone comes after the prompt."""
    answer = _turns(row.get(key), "model", place)
    if not answer or answer[0][0] != "model":
        return answer
    # A prompt may end with "Assistant:", which is no turn yet.
    _, prompt = _prompt(row, place)
    before = [turn for turn in _turns(prompt, "user", place) if turn[1]]
    return (*before, *answer)


def _turns(value, role, place):
    """Turns of messages, of "Human: …\\n\\nAssistant: …", or of another text, which `role` says."""
    if not isinstance(value, str | None):
        messages = value if isinstance(value, list) else [value]
        return tuple(_message(message, place) for message in messages)
    text = re.sub(r"\r\n?", "\n", value or "").strip()
    turns = [(role, text)] if text else []
    for marker in HH_MARKERS:
        before, *pieces = marker.split(f"\n\n{text}")
        if before.strip():
            break
        names = [ROLES[name.lower()] for name in pieces[::2]]
        turns = list(zip(names, map(str.strip, pieces[1::2])))
        # A prompt may end with the user.
        if _alternate(turns) or _alternate(turns[:-1]):
            break
    return tuple(turns)


def _message(message, place):
    """A turn of {"role": …, "content": …}."""
    role = ROLES.get(_text(message, "role", place).lower(), "other")
    return role, _text(message, "content", place).strip()


def _alternate(turns):
    """Whether turns go user, model, user, … and end with the model's."""
    roles = [role for role, _ in turns]
    return len(roles) > 0 and roles == ["user", "model"] * (len(roles) // 2)


def _split_answer(turns):
    """(turns before the last, text of the last, which is the model's)."""
    if not _alternate(turns):
        raise _Dropped("with a system turn, or turns that don't alternate")
    if not turns[-2][1]:
        raise _Dropped("with an empty prompt")
    return turns[:-1], turns[-1][1]


# ----------------------------------------------------------------- Rows of a file

def _read_rows(path):
    """("file:number", number, {column in lower case: value}) of each row of a file, one at a time.

    A folder stands for its .csv files, each of which is a category (as HEx-PHI is published).
    """
    path = Path(path)
    for file in sorted(path.glob("*.csv")) or [path]:
        suffix = Path(file.name.lower().removesuffix(".gz")).suffix
        if suffix not in READERS:
            raise InputError(f"{path}: rows are in a {', '.join(READERS)} file, or one with .gz, "
                             "or in a folder's .csv files")
        for number, row in READERS[suffix](file):
            place = f"{file}:{number}"
            row = {"text": row.strip()} if isinstance(row, str) else row
            if not isinstance(row, dict):
                raise InputError(f"{place}: neither text nor an object")
            category = {} if file == path else {"category": file.stem}
            columns = {name.strip().lower(): value for name, value in row.items()}
            yield place, number, category | columns


def _json_rows(path):
    """The items of a list, or a value a line: both kinds of file are named .json."""
    _, start = next(text_lines(path), (0, ""))
    if start.lstrip().startswith("["):
        return enumerate(read_json(path, list), 1)
    return json_lines(path)


def _csv_rows(path):
    """(line, row) of a CSV file with a header. A single column of prompts may go without."""
    reader = csv.reader((line for _, line in text_lines(path, blank=True)), strict=True)
    rows = filter(None, reader)  # an empty line is no row
    try:
        header = next(rows, [])
        # Two words may be a header, three are a prompt.
        if len(header) == 1 and len(header[0].split()) > 2:
            rows = itertools.chain([header], rows)
            header = ["prompt"]
        # A row of another width means broken quotes.
        for row in rows:
            if len(row) != len(header):
                raise InputError(f"{path}:{reader.line_num}: {len(row)} columns, "
                                 f"where the header has {len(header)}")
            yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet_rows(path):
    """(number, row) of a parquet file, which is how the hub holds most sets."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: parquet needs `pip install pyarrow`; or write the rows as JSON "
                         "lines (.jsonl)") from None
    try:
        with opened(path) as file:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            # Dates and the like become text, as they would be in JSON.
            texts = (json.dumps(row, default=str) for batch in batches for row in batch.to_pylist())
            yield from enumerate(map(json.loads, texts), 1)
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path} is not a complete parquet file: {error}") from None


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".txt": text_lines,
           ".parquet": _parquet_rows}
