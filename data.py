"""From conversations to rows of token ids with labels: tokenizer, turns, loss mask, packing.

See what a file trains on, with the toy's tokenizer or with Gemma's own:

    python data.py toy/data/train.jsonl --show 3
    python data.py harmless.jsonl.gz --tokenizer google/gemma-2-2b | less -R

A conversation becomes
    <bos><start_of_turn>user\\n{x}<end_of_turn>\\n<start_of_turn>model\\n{y}<end_of_turn>
and the loss sees only y and the <end_of_turn> after it. Control tokens are put in by id. The text
between them is encoded by a tokenizer that doesn't know them, so no text can forge a turn.
"""

import bisect
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from fused import IGNORE
from run.files import ROOT, InputError, Parser, data_file, locate, printable, read_json, run_command
from run.readers import Pair, Turn, read_pairs

# ----------------------------------------------------------------- Tokenizer

NEEDED = ("pad", "eos", "bos", "start_of_turn", "end_of_turn")  # attributes of a Tokenizer
# By name, since some copies of Gemma's tokenizer.json don't register all of them.
CONTROL = re.compile(r"<(pad|eos|bos|unk|mask|2mass|unused\d+|(start|end)_of_\w+)>"
                     r"|\[(@BOS@|toxicity=0)\]")
# Registered tokens that are text all the same: white space, HTML tags and bytes.
PLAIN = re.compile(r"[\s▁]+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong"
                   r"|em|[bius]|su[bp]|code)>|<0x[0-9A-F]{2}>")


class Tokenizer:
    """Text to ids and back. `encode` never gives an id in `control`, whatever the text.

    The tokenizers package finds registered tokens in a text, and can't be kept from those that
    aren't marked special (<unused5>, <mask>). So control tokens are taken out of the registered
    tokens, the vocabulary and the merges before the encoder is built.
    """
    pad: int
    eos: int
    bos: int
    start_of_turn: int
    end_of_turn: int
    size: int                # largest id + 1
    rows: int                # that an embedding needs: largest id of a text or a turn + 1
    control: frozenset[int]  # ids that steer the model
    positions = sys.maxsize  # that the model beside it knows

    def __init__(self, spec: dict, name: str | Path):
        """spec: the parsed tokenizer.json, which is changed. name: what errors call it.

        Raises InputError if it isn't a BPE or word-level tokenizer with Gemma's turn tokens.
        """
        # A stranger's file can lack any key, so whatever goes wrong here is the file's fault.
        try:
            ids = _token_ids(spec)
            for attribute in NEEDED:
                setattr(self, attribute, ids[f"<{attribute}>"])
            control = _take_control_tokens_out(spec, ids)
            needed = [ids[f"<{attribute}>"] for attribute in NEEDED]
            self.rows = max(*needed, *_text_ids(spec["model"], spec["added_tokens"])) + 1
            self.encoder = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.decode(self.encode("user\nmodel\n "))
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise InputError(f"{name} is no Gemma tokenizer that can be used here "
                             f"({type(error).__name__}: {error})") from None
        self.control = frozenset(ids[token] for token in control)
        self.size = max(ids.values()) + 1
        self.names = {id: token for token, id in ids.items()}

    def encode(self, text: str) -> list[int]:
        return self.encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` (a list or 1-D tensor). Control tokens leave no trace in it."""
        return self.encoder.decode(list(map(int, ids)), skip_special_tokens=False)

    def token(self, id: int) -> str:
        """One token as readable text."""
        return self.names.get(id, f"<{id}>").replace("▁", " ")


def _token_ids(spec):
    """{token: id} of a tokenizer.json's vocabulary and registered tokens."""
    if spec["model"]["type"] not in ("BPE", "WordLevel"):  # Gemma's and the toy's
        raise ValueError(f"of type {spec['model']['type']}")
    ids = dict(spec["model"]["vocab"])
    for token in spec["added_tokens"]:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise ValueError(f"{token['content']!r} has two ids")
    # Text for one of two tokens with one id would be read as the other, perhaps a control token.
    numbers = {id for id in ids.values() if type(id) is int and id >= 0}
    if len(numbers) < len(ids):
        raise ValueError("the ids of its tokens are not different whole numbers")
    return ids


def _take_control_tokens_out(spec, ids):
    """Change a parsed tokenizer.json so that no text gives a control token. Returns their names."""
    model = spec["model"]
    added = spec["added_tokens"]
    control = {token for token in ids if CONTROL.fullmatch(token)}
    for token in added:
        if token["special"] or not PLAIN.fullmatch(token["content"]):
            control.add(token["content"])

    # Where bytes can spell any text, <unk> is a control token. Elsewhere unknown words need it.
    unk = model.get("unk_token")
    spelled = [f"<0x{byte:02X}>" in ids or byte < 128 and chr(byte) in ids for byte in range(256)]
    if model.get("byte_fallback") and all(spelled):
        model["unk_token"] = None
    else:
        control.discard(unk)
        if unk in map("<{}>".format, NEEDED) or model["type"] == "WordLevel" and unk not in ids:
            raise ValueError(f"unknown words can't be read as {unk}")

    # The package numbers registered tokens anew unless the vocabulary has them.
    spec["added_tokens"] = [token for token in added if token["content"] not in control | {unk}]
    vocab = model["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    model["vocab"] = {token: id for token, id in vocab.items() if token not in control}
    if model["type"] == "BPE":
        model["dropout"] = None
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [[a, b] for a, b in merges
                           if control.isdisjoint((a, b, a + b))]
    spec.update(post_processor=None, truncation=None, padding=None)
    return control


def _text_ids(model, added):
    """Ids that a text can give. BPE makes no token of several characters but by a merge."""
    vocab = model["vocab"]
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        made = {a + b for a, b in model["merges"]} | {token["content"] for token in added}
        made.add(model.get("unk_token"))
        vocab = {token: id for token, id in vocab.items()
                 if len(token) == 1 or token in made or PLAIN.fullmatch(token)}
    return vocab.values()


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Tokenizer of a folder or hub repository with a tokenizer.json, or of such a file (or .gz).

    Raises InputError where it gives ids that the model beside it has no embedding for.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Tokenizer(read_json(path), path)
    path = locate(source, "tokenizer.json")
    tokenizer = Tokenizer(read_json(path), path)
    config = locate(source, "config.json", optional=True)
    values = read_json(config) if config else {}
    rows = values.get("vocab_size")
    if isinstance(rows, int) and tokenizer.rows > rows:
        raise InputError(f"{path} gives ids up to {tokenizer.rows - 1:,}, but the model beside it "
                         f"has {rows:,} embeddings (vocab_size): give it the tokenizer of its own")
    tokenizer.positions = values.get("max_position_embeddings") or sys.maxsize
    return tokenizer


# ----------------------------------------------------------------- Ids and loss mask

def prompt_tokens(tokenizer: Tokenizer, turns: Sequence[Turn], format="chat") -> list[int]:
    """Ids of a prompt, which generation continues.

    chat: <bos>, the turns, <start_of_turn>model\\n. plain: <bos>, "\\n\\nHuman: …\\n\\nAssistant:".
    """
    if format == "plain":
        names = {"user": "Human", "model": "Assistant"}
        text = "".join(f"\n\n{names[role]}: {content.strip()}" for role, content in turns)
        return [tokenizer.bos] + tokenizer.encode(text + "\n\nAssistant:")
    # Each text is encoded by itself. No token of Gemma's joins "\n" to a letter, so that gives
    # the ids of the whole.
    ids = [tokenizer.bos]
    for role, content in turns:
        ids += [tokenizer.start_of_turn, *tokenizer.encode(f"{role}\n")]
        ids += tokenizer.encode(content.strip())
        ids += [tokenizer.end_of_turn, *tokenizer.encode("\n")]
    return ids + [tokenizer.start_of_turn, *tokenizer.encode("model\n")]


def closing(tokenizer: Tokenizer, format="chat") -> int:
    """The id that ends an answer: where generation stops."""
    return tokenizer.eos if format == "plain" else tokenizer.end_of_turn


@dataclass
class Example:
    tokens: list[int]
    start: int     # tokens[start:] is the response, which the loss sees
    closed: bool   # whether the token that closes the response is still there
    line: int = 0  # in its file


def make_example(tokenizer: Tokenizer, turns: Sequence[Turn], response: str, max_length: int,
                 format="chat") -> Example | None:
    """An Example of at most `max_length` tokens, cut at its end. None if the prompt fills it."""
    # The response starts where the prompt ends.
    tokens = prompt_tokens(tokenizer, turns, format)
    start = len(tokens)
    if start >= max_length:
        return None
    space = " " if format == "plain" else ""
    tokens += tokenizer.encode(space + response.strip()) + [closing(tokenizer, format)]
    return Example(tokens[:max_length], start, closed=len(tokens) <= max_length)


def load_examples(path: str | Path, tokenizer: Tokenizer, max_length: int, format="chat",
                  paired=True) -> tuple[list[tuple], list[Pair]]:
    """A file's pairs as [(aligned Example, unaligned Example)], and as read.

    A row without an unaligned answer gives (aligned, None), and InputError where all must be
    `paired`. `path` may be hf://datasets/…. Prints what was dropped or cut: what is longer than
    `max_length` or the model's positions. Raises InputError if nothing is left.
    """
    max_length = min(max_length, tokenizer.positions)
    pairs, counts = read_pairs(data_file(path))
    print(f"pairs: {counts}")
    alone = [pair.line for pair in pairs if not pair.unaligned]
    if alone and paired:
        raise InputError(f"{path}:{alone[0]}: no unaligned answer (rejected), which selection "
                         "needs: take --init random or orthonormal, or --method full")
    if alone:
        print(f"pairs: {len(alone):,} without an unaligned answer, which selection would need")
    examples = []
    for pair in pairs:
        aligned = make_example(tokenizer, pair.turns, pair.aligned, max_length, format)
        unaligned = None
        if pair.unaligned:
            unaligned = make_example(tokenizer, pair.turns, pair.unaligned, max_length, format)
        # The prompt is the same, so both sides fit or neither
        if aligned:
            for example in filter(None, (aligned, unaligned)):
                example.line = pair.line
            examples.append((aligned, unaligned))
    if num_long := len(pairs) - len(examples):
        print(f"pairs: {num_long:,} more dropped, whose prompt fills {max_length} tokens")
    if not examples:
        raise InputError(f"{path}: each prompt fills {max_length} tokens: raise --batch-tokens")
    if num_cut := sum(not side.closed for pair in examples for side in filter(None, pair)):
        print(f"pairs: {num_cut:,} answers cut to fit {max_length} tokens")
    return examples, pairs


# ----------------------------------------------------------------- Packing

@dataclass
class Row:
    tokens: torch.Tensor     # (T) int64
    documents: torch.Tensor  # (T) int64: 1, 2, … numbers the row's examples, 0 is padding
    labels: torch.Tensor     # (T) int64: the id of token t+1 where it is trained on, else IGNORE


def pack(examples: Sequence[Example], length: int, seed: int, epoch: int) -> list[Row]:
    """Shuffle by (seed, epoch), and pack whole examples into rows of `length` tokens.

    Each example goes to the fullest row that has room for it (best fit).
    """
    rng = random.Random(f"{seed} {epoch}")
    shuffled = list(examples)
    rng.shuffle(shuffled)
    rows = []
    rooms = []  # rooms: sorted (free tokens, index of the row)
    for example in shuffled:
        size = len(example.tokens)
        if size > length:
            raise InputError(f"an example of {size:,} tokens doesn't fit in a row of {length:,}")
        # The first row with enough room is the fullest one.
        place = bisect.bisect_left(rooms, (size, 0))
        if place < len(rooms):
            free, row = rooms.pop(place)
        else:
            free = length
            row = len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(rooms, (free - size, row))
    rng.shuffle(rows)  # else the last rows would hold little but long examples
    return [_make_row(row, length) for row in rows]


def _make_row(examples, length):
    tokens = torch.zeros(length, dtype=torch.int64)  # nobody sees document 0: any id will do there
    documents = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORE)
    begin = 0
    for number, example in enumerate(examples, 1):
        ids = torch.tensor(example.tokens)
        end = begin + len(ids)
        tokens[begin:end] = ids
        documents[begin:end] = number
        # A label stands at the token before it.
        labels[begin + example.start - 1:end - 1] = ids[example.start:]
        begin = end
    return Row(tokens, documents, labels)


# ----------------------------------------------------------------- Seeing the loss mask

CONTEXT = "\033[2m"
TRAINED = "\033[32m"
REVERSED = "\033[7m"
RESET = "\033[0m"


def colored(tokenizer: Tokenizer, tokens: Sequence[int], start: int) -> str:
    """Tokens as text: the context dim, what is trained on (from `start`) green.

    Control tokens are shown by their names, in reverse video.
    """
    def style(position):
        return position >= start, tokens[position] in tokenizer.control

    text = ""
    for (trained, control), positions in itertools.groupby(range(len(tokens)), style):
        ids = [tokens[position] for position in positions]
        text += TRAINED if trained else CONTEXT
        if control:
            text += REVERSED + "".join(map(tokenizer.token, ids))
        else:
            # A file's own escape codes must not reach the terminal.
            text += "\n".join(map(printable, tokenizer.decode(ids).split("\n")))
        text += RESET
    return text


def main():
    parser = Parser(__doc__)
    parser.add_argument("file", help="pairs as HH-RLHF has them, or rows with one answer")
    parser.add_argument("--show", type=int, default=3, metavar="N",
                        help="examples to print (default 3)")
    parser.add_argument("--tokenizer", default=ROOT / "toy", metavar="SOURCE",
                        help="folder, hub repository or tokenizer.json[.gz] (default: the toy's)")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    pairs, _ = load_examples(args.file, tokenizer, max_length=1024, paired=False)
    examples = [aligned for aligned, _ in pairs]

    print(f"{CONTEXT}context{RESET}  {TRAINED}trained on{RESET}  {REVERSED}control{RESET}")
    for example in examples[:args.show]:
        print(f"\n── {args.file}:{example.line} · {len(example.tokens):,} tokens")
        print(colored(tokenizer, example.tokens, example.start))
    num_tokens = sum(len(example.tokens) for example in examples)
    num_trained = num_tokens - sum(example.start for example in examples)
    print(f"\n{len(examples):,} examples of {num_tokens:,} tokens, {num_trained:,} trained on")


if __name__ == "__main__":
    run_command(main)
