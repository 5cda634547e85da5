"""Readers of data sets: pairs of answers (HH-RLHF), sets of prompts, and texts for SAEs.

Each file may be gzipped (.gz). A malformed line raises InputError, which names file and line.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from run.files import InputError, json_lines, read_json, text_lines

# HH-RLHF's own, and what is left of it where white space was cleaned.
HH_MARKERS = (re.compile(r"\n\n(Human|Assistant):"), re.compile(r"\n[ \t]*(Human|Assistant):"))
ROLES = {"human": "user", "user": "user", "assistant": "model", "model": "model"}
# The first of these that a row has is its prompt. Alpaca's and Dolly's instructions go with a text.
PROMPT_KEYS = ("prompt", "goal", "behavior", "instruction", "forbidden_prompt", "question", "text")
INPUT_KEYS = ("input", "context")
PAIR_FORMS = ("wanted: chosen and rejected, each a text Human: … Assistant: …, or messages of role "
              "and content, or an answer to the row's prompt")
PROMPT_FORMS = f"wanted: texts, or objects with {', '.join(PROMPT_KEYS)}, or chosen and rejected"

Turn = tuple[str, str]  # ("user" | "model", text)


@dataclass(slots=True)
class Pair:
    turns: tuple[Turn, ...]   # ends with a user turn
    aligned: str              # the chosen answer
    unaligned: str            # the rejected answer
    line: int                 # in its file


@dataclass(slots=True)
class Prompt:
    turns: tuple[Turn, ...]   # ends with a user turn
    fields: dict              # the row's other columns
    line: int                 # in its file; the item's number in a .json list


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
    """The pairs of a file of objects with "chosen" and "rejected".

    Both are conversations (HH-RLHF's text, or messages of role and content), or answers to the
    row's prompt. The last assistant turn is the answer, the turns before it are the prompt.
    Unusable rows are counted by reason. Raises InputError for a malformed line, and if no pair is left.
    """
    def make_pair(row, place, line):
        chosen = _conversation(row, "chosen", place)
        rejected = _conversation(row, "rejected", place)
        # A pair is one prompt with two answers.
        if not (chosen and rejected):
            raise _Dropped("without both sides")
        if chosen[:-1] != rejected[:-1]:
            raise _Dropped("whose sides don't share a prompt")
        prompt, aligned = _split_answer(chosen)
        _, unaligned = _split_answer(rejected)
        if not (aligned and unaligned):
            raise _Dropped("with an empty answer")
        return Pair(prompt, aligned, unaligned, line)

    return _collect(json_lines(path), make_pair, path, "usable pair", PAIR_FORMS)


def read_prompts(path: str | Path) -> tuple[list[Prompt], Counts]:
    """The prompts of a file; one that occurs again is dropped and counted.

    .txt: one a line. .csv: a column named as in PROMPT_KEYS, in any case. .jsonl, .json (a list):
    objects with such a key, strings, or HH-RLHF's objects, whose chosen side gives the prompt.
    Raises InputError for a malformed line, and if no prompt is left.
    """
    seen = set()

    def make_prompt(row, place, line):
        # The prompt is a string, a named field, or what a conversation begins with.
        row = {"prompt": row} if isinstance(row, str) else row
        key, prompt = _prompt(row, place)
        if "rejected" in row:
            turns = _conversation(row, "chosen", place)
        elif isinstance(prompt, list):
            turns = (*_messages(prompt, place), ("model", ""))
        elif key is not None:
            # Here a text that looks like turns stays one text.
            turns = (("user", prompt.strip()), ("model", ""))
        else:
            raise InputError(f"{place}: no prompt; {PROMPT_FORMS}")
        turns, _ = _split_answer(turns)
        if turns in seen:
            raise _Dropped("with a prompt seen before")
        seen.add(turns)
        # The other columns stay with the prompt: categories, right answers, targets of an attack.
        used = (key, "chosen", "rejected")
        return Prompt(turns, {key: row[key] for key in row if key not in used}, line)

    suffix = Path(str(path).removesuffix(".gz")).suffix.lower()
    if suffix == ".json":
        rows = enumerate(read_json(path, list), 1)
    elif suffix in (".txt", ".csv", ".jsonl"):
        rows = {".txt": text_lines, ".csv": _csv_rows, ".jsonl": json_lines}[suffix](path)
    else:
        raise InputError(f"{path}: prompts are a .txt, .csv, .jsonl or .json file, or one with .gz")
    return _collect(rows, make_prompt, path, "usable prompt", PROMPT_FORMS)


def read_items(path: str | Path) -> Iterator[str | tuple[Turn, ...]]:
    """The documents that SAEs are trained on, one at a time: texts, or conversations as turns.

    .txt: a text a line. .jsonl: objects with "chosen" and "rejected" (both are taken), "prompt" and
    "response", "messages" (of role user or assistant), or "text". Conversations whose turns don't
    alternate are left out. Raises InputError for a malformed line.
    """
    if ".txt" in Path(path).suffixes:
        yield from (text.strip() for _, text in text_lines(path))
        return
    for line, row in json_lines(path):
        # The keys tell which kind of row it is.
        place = f"{path}:{line}"
        keys = row.keys() if isinstance(row, dict) else ()
        if "chosen" in keys and "rejected" in keys:
            conversations = [_conversation(row, key, place) for key in ("chosen", "rejected")]
        elif "prompt" in keys and "response" in keys:
            prompt, response = _text(row, "prompt", place), _text(row, "response", place)
            conversations = [(("user", prompt), ("model", response))]
        elif "messages" in keys:
            conversations = [_messages(row["messages"], place)]
        elif "text" in keys:
            yield _text(row, "text", place)
            continue
        else:
            raise InputError(f"{place}: no chosen, prompt and response, messages, or text")
        yield from filter(_alternate, conversations)


def _collect(rows, make, path, kind, wanted):
    """(what `make` makes of the rows, Counts)."""
    items, counts = [], Counts()
    for line, row in rows:
        # An unusable row is counted; a malformed one ends the reading with an InputError.
        counts.read += 1
        try:
            items.append(make(row, f"{path}:{line}", line))
        except _Dropped as reason:
            counts.dropped[str(reason)] += 1
    counts.kept = len(items)
    if not items:
        raise InputError(f"{path} holds no {kind}: {counts}; {wanted}")
    return items, counts


def _prompt(row, place):
    """(its key, text or messages) of a row's prompt; (None, "") if it has none."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: neither text nor an object")
    keys = {key.strip().lower(): key for key in row}
    name = next(filter(keys.__contains__, PROMPT_KEYS), None)
    key = keys.get(name)
    if isinstance(row.get(key), list):
        return key, row[key]
    texts = [_text(row, key, place).strip()]
    # Rows that differ in their input alone are different prompts.
    if name == "instruction":
        texts += [_text(row, keys.get(key), place).strip() for key in INPUT_KEYS]
    return key, "\n\n".join(filter(None, texts))


def _text(row, key, place):
    """A row's text, "" if it has none."""
    if not isinstance(row, dict) or not isinstance(row.get(key), str | None):
        raise InputError(f"{place}: expected an object whose {key!r} is text")
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
    """Turns of messages, of "\\n\\nHuman: …\\n\\nAssistant: …", or of a text that `role` says.

    Text before the first marker has no role.
    """
    if isinstance(value, list):
        return _messages(value, place)
    if not isinstance(value, str | None):
        raise InputError(f"{place}: neither text nor messages; {PAIR_FORMS}")
    text = re.sub(r"\r\n?", "\n", value or "").strip()
    turns = [(role, text)] if text else []
    for marker in HH_MARKERS:
        before, *pieces = marker.split(f"\n\n{text}")
        if not pieces:
            break
        turns = [("", before.strip())] if before.strip() else []
        for name, piece in zip(pieces[::2], pieces[1::2]):
            turns.append((ROLES[name.lower()], piece.strip()))
        # A prompt may end with the user.
        if _alternate(turns) or _alternate(turns[:-1]):
            break
    return tuple(turns)


def _messages(messages, place):
    """Turns of a list of {"role": …, "content": …}."""
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        role = ROLES.get(_text(message, "role", place).lower(), "other")
        turns.append((role, _text(message, "content", place).strip()))
    return tuple(turns)


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


def _csv_rows(path):
    """(number of the line, {column: text}) of a CSV file with a header, one at a time."""
    rows = csv.reader((line for _, line in text_lines(path, blank=True)), strict=True)
    try:
        # An empty line is no row. A row of another width means broken quotes.
        header = next(rows, [])
        for row in filter(None, rows):
            if len(row) != len(header):
                raise InputError(f"{path}:{rows.line_num}: {len(row)} columns, "
                                 f"where the header has {len(header)}")
            yield rows.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not valid CSV: {error}") from None
