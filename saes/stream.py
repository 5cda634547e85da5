"""Activations of a model's residual stream, document after document: what SAEs are trained on."""

import itertools

import torch
from tqdm import tqdm

from data import Example, Tokenizer, pack, prompt_tokens
from run.files import InputError

FORWARD_TOKENS = 8192  # of one forward pass


def encode_item(tokenizer: Tokenizer, item, context: int) -> list[list[int]]:
    """Token lists of a text or conversation, at most `context` tokens each, BOS first.

    One list, or several where the document is longer.
    """
    if isinstance(item, str):
        ids = tokenizer.encode(item)
    else:
        response = tokenizer.encode(item[-1][1].strip())
        ids = prompt_tokens(tokenizer, item[:-1])[1:] + response + [tokenizer.end_of_turn]
    starts = range(0, len(ids), context - 1)
    return [[tokenizer.bos, *ids[start:start + context - 1]] for start in starts]


class Stream:
    """Activations of as many documents as fill a buffer.

    stream(cursor) -> (next cursor, {layer: (n, D)}), a pure function of the cursor, which is the
    number of documents before. The model stops at the deepest layer; BOS and padding are left out.
    """

    def __init__(self, model, tokenizer, items, layers, buffer, context):
        """items(): an iterator over the documents, once through; buffer, context (row): tokens."""
        self.model, self.tokenizer, self.items = model, tokenizer, items
        self.layers, self.buffer, self.context = sorted(layers), buffer, context
        self.position, self.rest = 0, None  # documents taken, and an iterator over those after

    def __call__(self, cursor):
        examples = self._documents(cursor)
        return self.position, self._activations(examples, cursor)

    def _documents(self, cursor):
        """Examples of the documents from the cursor on, until the buffer is full."""
        if self.rest is None or self.position != cursor:
            # Go there, from the beginning; after the last document the first one comes again
            if not any(encode_item(self.tokenizer, item, self.context) for item in self.items()):
                raise InputError("the data hold no document with text")
            endless = itertools.chain.from_iterable(self.items() for _ in itertools.count())
            self.rest, self.position = itertools.islice(endless, cursor, None), cursor
        examples, num_tokens = [], 0
        while num_tokens < self.buffer:
            for ids in encode_item(self.tokenizer, next(self.rest), self.context):
                examples.append(Example(ids, 1, True))
                num_tokens += len(ids) - 1
            self.position += 1
        return examples

    @torch.no_grad()
    def _activations(self, examples, seed):
        """{layer: (n, D)} at all tokens of the examples but BOS, in the order of packing."""
        weight = self.model.embed_tokens.weight
        rows = pack(examples, self.context, 0, seed)
        num_tokens = sum(len(example.tokens) - 1 for example in examples)
        out = {layer: weight.new_empty(num_tokens, weight.shape[1]) for layer in self.layers}
        size, filled = max(1, FORWARD_TOKENS // self.context), 0
        starts = range(0, len(rows), size)
        for start in tqdm(starts, "activations", leave=False, disable=None, delay=2):
            batch = rows[start:start + size]
            tokens = torch.stack([row.tokens for row in batch]).to(weight.device)
            documents = torch.stack([row.documents for row in batch]).to(weight.device)
            _, residuals = self.model.hidden(tokens, documents, self.layers, self.layers[-1])
            counted = (documents > 0) & (tokens != self.tokenizer.bos)
            for layer in self.layers:
                part = residuals[layer][counted]
                out[layer][filled:filled + len(part)] = part
            filled += len(part)
        return {layer: values[:filled] for layer, values in out.items()}
