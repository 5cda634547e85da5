"""Greedy coordinate gradient: a search for the suffix that makes a model give in.

Zou et al. 2023, arXiv 2307.15043, Algorithm 1. With a target y such as "Sure, here is …" and a
suffix s of n tokens after the user's text x:

    L(s) = −1/|y| log p(y | x, s)
    G = ∂L / ∂ one-hot(s)           (n, V): how L would change with each token
    width times: draw a position i of n, and one of the top tokens of −G_i
    the candidate with the lowest L becomes s

The search is exact, and computes nothing twice. The prompt up to the suffix runs once per prompt.
The suffix up to the position where a candidate differs runs once per step, in the gradient's own
forward. Only target tokens reach the head. Candidates are texts that a user could type: printable
ASCII without control tokens, whose ids come back when the text is encoded in its place.

Letters: C candidates, n suffix tokens, P tokens before them, T tokens fed, t target tokens,
B rows, D hidden size, V vocabulary, K key-value heads, hd head size.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Tokenizer, prompt_tokens
from model import FULL, SLIDING, Gemma2
from run.files import InputError
from run.readers import Prompt
from safety.rules import judge

TOP = 256                   # tokens that a position of the suffix draws from
CHECK = 10                  # steps between looks at what the model answers
BATCH = 64                  # candidates of one forward: their logits are what memory goes to


@dataclass(frozen=True)
class Plan:
    """Settings of a suffix search. The defaults are Zou's."""
    steps: int = 500
    width: int = 512            # candidates of a step
    length: int = 20            # tokens of the suffix
    target: str | None = None   # see templates.target_of
    seed: int = 0


# --------------------------------------------------------------------------------------------------
# Suffixes as text

class Slot:
    """The place of a suffix in the last turn: ids `before` it, and `after` it up to the answer."""

    def __init__(self, tokenizer: Tokenizer, turns, format="chat"):
        self.tokenizer = tokenizer
        self.turns = turns
        self.format = format
        self.text = turns[-1][1].strip()
        ids = self.encode(self.text)
        if format == "plain":
            num_after = len(tokenizer.encode("\n\nAssistant:"))
        else:
            num_after = 1 + ids[::-1].index(tokenizer.end_of_turn)
        self.before = ids[:-num_after]
        self.after = ids[-num_after:]

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt whose last turn is `text`."""
        return prompt_tokens(self.tokenizer, self.turns_with(text), self.format)

    def turns_with(self, text: str):
        """The turns, of which the last is `text`."""
        return (*self.turns[:-1], ("user", text))

    def attacked(self, suffix: list[int]) -> str:
        """The user's text with a suffix. It is decoded behind the text's last token, which says
        whether a space stands between them."""
        last = self.before[-1:]
        skip = len(self.tokenizer.decode(last))
        return self.text + self.tokenizer.decode(last + suffix)[skip:]

    def is_typable(self, suffix: list[int]) -> bool:
        """Whether a suffix, as text in its place, is encoded into the same ids again."""
        return self.encode(self.attacked(suffix)) == self.before + suffix + self.after

    def start(self, length: int) -> list[int]:
        """The suffix that a search begins with: "! ! ! …" as Zou's, or another sign."""
        for sign in "!.x":
            ids = self.encode(self.text + f" {sign}" * length)
            suffix = ids[len(self.before):-len(self.after)]
            if len(suffix) == length and self.is_typable(suffix):
                return suffix
        raise InputError(f"no sign of ! . x makes a suffix of {length} tokens after "
                         f"{self.text[-40:]!r}: attack other prompts")


def vocabulary(tokenizer: Tokenizer, size: int) -> Tensor:
    """Mask (size,) of the tokens that a suffix may have: printable ASCII that encodes to itself."""
    mask = torch.zeros(size, dtype=torch.bool)
    for i in range(min(tokenizer.size, size)):
        text = tokenizer.decode([i])
        is_plain = text.isascii() and text.isprintable() and text.strip() != ""
        mask[i] = is_plain and tokenizer.encode(text) == [i]
    return mask


# --------------------------------------------------------------------------------------------------
# Losses behind a shared beginning

class SharedCache:
    """Keys and values of one layer, `pair` (2, 1, K, P, hd), of P tokens that all rows share.

    It stands in for generation.Cache. With `keep`, `pair` becomes that of all tokens seen.
    """

    def __init__(self, pair: Tensor | None = None, keep=False):
        self.pair = pair
        self.keep = keep

    def update(self, keys, values):
        pair = torch.stack((keys, values))                                  # (2, B, K, T, hd)
        if self.pair is not None:
            shared = self.pair.expand(-1, len(keys), -1, -1, -1)
            pair = torch.cat((shared, pair), 3)
        if self.keep:
            self.pair = pair.detach()
        return pair


def hidden_after(model, caches, tokens, first):
    """Final hidden states (B, T, D) of tokens (B, T), or of embeddings (B, T, D), behind the
    `first` tokens that `caches` hold."""
    index = torch.arange(first + tokens.shape[1], device=tokens.device)
    distance = index[first:, None] - index                                  # (T, first + T)
    full = (distance >= 0)[None, None]
    visible = {FULL: full, SLIDING: full & (distance < model.config.sliding_window)}
    return model.run_blocks(tokens, index[None, first:], visible, caches)[0]


def target_loss(model, hidden, target):
    """−log p, nats a token, (B,) of target (t,), which the last t of hidden (B, T, D) predict."""
    logits = model.unembed(hidden[:, -len(target):])                        # (B, t, V)
    labels = target.expand(len(hidden), -1)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def gradient(model, prefix, suffix, rest, target):
    """∂L/∂one-hot (n, V) of suffix (n,), and the keys and values of all tokens.

    prefix: keys and values of the tokens before the suffix; rest: the tokens after it, the target
    without its last among them.
    """
    caches = [SharedCache(pair, keep=True) for pair in prefix]
    first = prefix[0].shape[3]
    with torch.enable_grad():
        x = model.embed_tokens(torch.cat((suffix, rest))).detach()[None].requires_grad_()
        loss = target_loss(model, hidden_after(model, caches, x, first), target).sum()
        (slope,) = torch.autograd.grad(loss, x)                             # (1, n + rest, D)
    one_hot_slope = slope[0, :len(suffix)] @ model.embed_tokens.weight.T
    return one_hot_slope, [cache.pair for cache in caches]


@torch.no_grad()
def candidate_losses(model, pairs, candidates, positions, rest, target, first):
    """L (C,) of candidates (C, n). Each differs from the suffix that `pairs` hold at its position
    of positions (C,), ascending; `first` tokens stand before the suffix."""
    losses = []
    for rows, where in zip(candidates.split(BATCH), positions.split(BATCH)):
        same = int(where[0])                    # so many suffix tokens are as in `pairs`
        tokens = torch.cat((rows[:, same:], rest.expand(len(rows), -1)), 1)
        caches = [SharedCache(pair[..., :first + same, :]) for pair in pairs]
        hidden = hidden_after(model, caches, tokens, first + same)
        losses.append(target_loss(model, hidden, target))
    return torch.cat(losses)


# --------------------------------------------------------------------------------------------------
# The search

def draw(slope, suffix, allowed, plan, slot, generator):
    """Candidates (C, n) with one token of suffix (n,) exchanged, and where (C,), ascending.

    C is plan.width, or less where so many can't be had: what was drawn before, or isn't text, is
    drawn again.
    """
    num_top = min(TOP, int(allowed.sum()))
    top = (-slope).masked_fill(~allowed, -torch.inf).topk(num_top).indices.tolist()
    old = suffix.tolist()
    tried = set()
    chosen = []
    for _ in range(8):      # rounds are few: short suffixes have no more than so many exchanges
        positions = torch.randint(len(old), (plan.width,), generator=generator).tolist()
        ranks = torch.randint(num_top, (plan.width,), generator=generator).tolist()
        for i, rank in zip(positions, ranks):
            new = [*old[:i], top[i][rank], *old[i + 1:]]
            exchange = (i, new)
            if (i, rank) not in tried and slot.is_typable(exchange[1]):
                chosen.append(exchange)
            tried.add((i, rank))
        if len(chosen) >= plan.width:
            break
    chosen = sorted(chosen[:plan.width])
    candidates = suffix.new_tensor([ids for _, ids in chosen])
    positions = suffix.new_tensor([i for i, _ in chosen])
    return candidates, positions


def outcome(suffix: str, ids: list[int], completion: str) -> dict:
    """The fields of a suffix and of the answer to it."""
    verdict, reason = judge(completion)
    return {"suffix": suffix, "ids": ids, "completion": completion, "verdict": verdict,
            "reason": reason}


def search(model: Gemma2, tokenizer: Tokenizer, allowed: Tensor, prompt: Prompt, plain_answer: str,
           wanted: str, plan: Plan, answer: Callable[[list[Prompt]], list[str]], format="chat"
           ) -> dict:
    """Search a suffix for one prompt, after which the answer begins with the text `wanted`.

    answer(prompts) gives the model's greedy answers, plain_answer the one to the prompt without a
    suffix; allowed (V,) is a `vocabulary`. The search ends when an answer complies and begins with
    the target. Returns this answer, else the last that complies, else the last:

        suffix, ids, target    text and ids of the suffix, and `wanted`
        losses                 L of each step's best candidate, nats a token
        complied, reached      the step at which an answer first complied, and began with the
                               target too; null if none did, 0 if the plain prompt is answered
        completion, verdict, reason    the answer, judged by the rules
    """
    losses: list[float] = []
    result = outcome("", [], plain_answer)
    result |= {"target": wanted, "losses": losses, "complied": None, "reached": None}
    # A model that answers the plain prompt needs no suffix
    if result["verdict"] == "comply":
        return result | {"complied": 0, "reached": 0}

    # Ids of the suffix, of the target, and of what is fed behind the suffix
    slot = Slot(tokenizer, prompt.turns, format)
    target_ids = tokenizer.encode(" " * (format == "plain") + wanted)
    best = slot.start(plan.length)
    device = model.embed_tokens.weight.device
    suffix = torch.tensor(best, device=device)
    target = torch.tensor(target_ids, device=device)
    rest = torch.tensor(slot.after + target_ids[:-1], device=device)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{plan.seed} {prompt.turns}".encode()))

    # Keys and values of the prompt up to the suffix, once
    caches: list = [SharedCache(keep=True) for _ in model.layers]
    with torch.no_grad():
        model.hidden(torch.tensor([slot.before], device=device), caches=caches)
    prefix = [cache.pair for cache in caches]

    for step in range(1, plan.steps + 1):
        # The best of many exchanges of one token becomes the suffix, even where the loss rises
        slope, pairs = gradient(model, prefix, suffix, rest, target)
        candidates, positions = draw(slope, suffix, allowed, plan, slot, generator)
        values = candidate_losses(model, pairs, candidates, positions, rest, target,
                                  len(slot.before))
        suffix = candidates[values.argmin()]
        losses.append(values.min().item())
        if losses[-1] < min(losses[:-1], default=torch.inf):
            best = suffix.tolist()

        # Every few steps: how does the model answer to the best suffix?
        if step % CHECK and step < plan.steps:
            continue
        text = slot.attacked(best)
        (completion,) = answer([replace(prompt, turns=slot.turns_with(text))])
        tried = outcome(text[len(slot.text):], best, completion)
        # An answer that complies outweighs later ones that don't
        if tried["verdict"] == "comply":
            result |= tried | {"complied": result["complied"] or step}
            if normal(completion).startswith(normal(wanted)):
                return result | {"reached": step}
        elif result["complied"] is None:
            result |= tried
    return result


def normal(text: str) -> str:
    return " ".join(text.split()).casefold()
