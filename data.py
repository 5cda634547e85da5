"""From conversations to rows of token ids with labels: tokenizer, chat turns, loss masks, packing.

Look at what a file trains on, with the toy's tokenizer or with Gemma's own:

    python data.py toy/data/train.jsonl --show 3
    python data.py harmless-base.jsonl.gz --show 5 --tokenizer google/gemma-2-2b --max-length 1024 | less -R

Files are HH-RLHF JSON lines (chosen, rejected: the chosen answer is what is trained on), or prompts as .txt, .csv, .jsonl or
.json, all also as .gz.

A conversation becomes  <bos> <start_of_turn> user\\n{x} <end_of_turn> \\n <start_of_turn> model\\n{y} <end_of_turn>
and the loss sees only y and the <end_of_turn> that closes it. The five control tokens of that line are put in by id;
the text in between is encoded by a tokenizer that doesn't know them, so no text can forge a turn.
"""

import bisect
import itertools
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

import files
from datafiles import Turn, json_file, json_lines, read_pairs, read_prompts
from files import InputError

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
    parser.add_argument("--tokenizer", default=files.HERE / "toy", metavar="SOURCE",
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
    files.run(main)
