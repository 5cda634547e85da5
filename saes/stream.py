"""Activations of a model's residual stream, document after document: what SAEs are trained on."""

import itertools

import torch

from data import Example, Row, Tokenizer, pack, prompt_tokens
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
    # Each part begins with BOS, since the model has never seen text without it
    starts = range(0, len(ids), context - 1)
    return [[tokenizer.bos, *ids[start:start + context - 1]] for start in starts]


def take(tokenizer, items, context, count):
    """(documents, examples, tokens): as many of the iterator's documents as hold `count` tokens.

    Fewer where the iterator ends. BOS isn't counted.
    """
    examples = []
    num_documents = 0
    num_tokens = 0
    for item in items:
        num_documents += 1
        for ids in encode_item(tokenizer, item, context):
            examples.append(Example(ids, 1, True))
            num_tokens += len(ids) - 1
        if num_tokens >= count:
            break
    return num_documents, examples, num_tokens


def batches(examples, context, seed, batch_tokens):
    """Rows of tensors (B, T) of the packed examples, of about `batch_tokens` tokens each."""
    rows = pack(examples, context, 0, seed)
    size = max(1, batch_tokens // context)
    for start in range(0, len(rows), size):
        yield stack(rows[start:start + size])


def stack(rows):
    """One Row of tensors (B, T) from B rows of (T)."""
    return Row(
        torch.stack([row.tokens for row in rows]),
        torch.stack([row.documents for row in rows]),
        torch.stack([row.labels for row in rows]),
    )


def stream(model, tokenizer, items, layers, buffer, context, cursor):
    """Buffers of activations without end: (cursor after it, {layer: (n, D)}).

    items(): an iterator over the documents, once through; after the last one the first comes again.
    The cursor is the number of documents before; buffer and context (of a row) are in tokens. A
    buffer depends on the cursor alone.
    """
    # Without text the loop below would have no end
    if not any(encode_item(tokenizer, item, context) for item in items()):
        raise InputError("the data hold no document with text")
    # Go to the cursor, from the beginning
    endless = itertools.chain.from_iterable(items() for _ in itertools.count())
    documents = itertools.islice(endless, cursor, None)
    while True:
        num_documents, examples, num_tokens = take(tokenizer, documents, context, buffer)
        # The cursor seeds the packing, so that a buffer is the same after a stop
        rows = batches(examples, context, cursor, FORWARD_TOKENS)
        cursor += num_documents
        yield cursor, activations(model, tokenizer, layers, rows, num_tokens)


@torch.no_grad()
def activations(model, tokenizer, layers, rows, num_tokens):
    """{layer: (num_tokens, D)} at all tokens of the rows but BOS and padding.

    The model stops at the deepest layer.
    """
    weight = model.embed_tokens.weight
    layers = sorted(layers)
    out = {layer: weight.new_empty(num_tokens, weight.shape[1]) for layer in layers}
    filled = 0
    # Written in place: a list of parts would need twice the memory when it is joined
    for row in rows:
        tokens = row.tokens.to(weight.device)
        documents = row.documents.to(weight.device)
        _, residuals = model.hidden(tokens, documents, layers, layers[-1])
        # SAEs aren't trained on BOS, whose norm is many times that of other tokens
        counted = (documents > 0) & (tokens != tokenizer.bos)
        for layer in layers:
            part = residuals[layer][counted]
            out[layer][filled:filled + len(part)] = part
        filled += len(part)
    return {layer: values[:filled] for layer, values in out.items()}
