"""Generation: the key-value cache, the step of one token a row, and the loop around it.

    ids = model.generate(prompts, max_new_tokens=64)         # a Gemma2 calls `generate` below

A step of the 2b is some 1,900 kernels, and a GPU runs them faster than Python starts them. So
whatever a step reads or writes keeps its place in memory while a batch lasts, and its size too.
CUDA records the step once, as a graph, and replays it; the CPU reads the tokens only every
CHECK_EVERY steps. On a CPU the same step is called as it is.

B rows of a batch, T tokens of the longest prompt, S slots of a cache, D hidden size, K key-value
heads of size hd.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import FULL, SLIDING
from run.parallel import is_sharded

CHECK_EVERY = 16    # steps on CUDA between two looks at which rows have stopped: a look waits


class Cache:
    """Keys and values of one layer: a ring, token `index` in slot index mod S.

    pairs: zeros (2, B, K, S, hd), since unseen slots get weight 0 and 0 · NaN is NaN. S is the
    whole length, or the window on a sliding layer. A step attends to all S slots: bmm copies what
    isn't contiguous, so the filled part alone would cost more.
    """

    def __init__(self, pairs: Tensor):
        self.pairs = pairs
        self.slot: Tensor | None = None     # of the next token, (1,); None: the prompt comes

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, hd) of the next T tokens; return those to attend to.

        The first call takes the prompt, which attends to itself. Each later call takes one token.
        """
        keys, values = self.pairs.unbind()                                        # (B, K, S, hd)
        if self.slot is not None:
            keys.index_copy_(2, self.slot, k)
            values.index_copy_(2, self.slot, v)
            return keys, values
        S = keys.shape[2]
        slots = torch.arange(k.shape[2], device=k.device)[-S:] % S
        # Of a prompt longer than the window, only the last S tokens
        keys[:, :, slots] = k[:, :, -S:]
        values[:, :, slots] = v[:, :, -S:]
        return k, v


class Batch:
    """The rows of a batch, in tensors that keep their place until rows are dropped.

    start (B,) is the index of each row's first token; what stands before it is padding.
    """

    def __init__(self, model, start: Tensor, length: int):
        self.model = model
        self.start = start
        self.tokens = torch.zeros_like(start)   # the newest of each row, (B,)
        self.index = start.new_zeros(())        # and its index, the same in all rows
        config = model.config
        self.slots = {FULL: length, SLIDING: min(length, config.sliding_window)}
        self.caches = []
        for kind in config.layer_types:
            shape = 2, len(start), config.num_key_value_heads, self.slots[kind], config.head_dim
            # (new_zeros of a weight that FSDP2 has split would be split too)
            pairs = torch.zeros(shape, dtype=model.embed_tokens.weight.dtype, device=start.device)
            self.caches.append(Cache(pairs))

    def step(self) -> Tensor:
        """Hidden states (B, D) of `tokens` at `index`, stored in the caches.

        It changes nothing but the tokens' own slots, so that to call it twice is to call it once.
        """
        slot, visible = {}, {}
        for kind, S in self.slots.items():
            slot[kind] = self.index[None] % S
            slots = torch.arange(S, device=self.index.device)
            # The index of each slot's token; negative where there is none yet
            stored = self.index - (self.index - slots) % S
            visible[kind] = (stored >= self.start[:, None])[:, None, None]        # (B, 1, 1, S)
        for kind, cache in zip(self.model.config.layer_types, self.caches):
            cache.slot = slot[kind]
        positions = (self.index - self.start)[:, None]                            # (B, 1)
        x, _ = self.model.run_blocks(self.tokens[:, None], positions, visible, self.caches)
        return x[:, -1]

    def keep(self, rows: Tensor):
        """Drop all rows but those of the indices `rows`."""
        self.start = self.start[rows]
        self.tokens = self.tokens[rows]
        for cache in self.caches:
            cache.pairs = cache.pairs[:, rows]


def captured(step: Callable, device: torch.device) -> Callable:
    """`step` as one CUDA graph: a call replays it and returns the tensor that the graph fills.

    No GPU has run it yet.
    """
    step()  # libraries load their kernels and make their handles, which a recording can't hold
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread may go on talking to CUDA meanwhile
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        hidden = step()

    def replay():
        graph.replay()
        return hidden
    return replay


def next_tokens(model, hidden, temperature, generator):
    """Tokens (B,) that follow hidden states (B, D)."""
    if temperature == 0:    # a softcap keeps the order
        return (hidden @ model.embed_tokens.weight.T).float().argmax(-1)
    probabilities = (model.unembed(hidden) / temperature).softmax(-1)
    if generator:           # PyTorch draws only where the generator is
        probabilities = probabilities.to(generator.device)
    # The first of V exponential waiting times. multinomial does this too, but makes CUDA wait
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waits).argmax(-1).to(hidden.device)


@torch.no_grad()
def generate(model, prompts: Sequence[Tensor], max_new_tokens=64, temperature=0.0,
             stop: Collection[int] = (), generator=None) -> list[Tensor]:
    """As Gemma2.generate, of a Gemma2."""
    device = model.embed_tokens.weight.device
    on_card = device.type == "cuda"
    # Pad on the left; the padding is a document of its own
    tokens = pad_sequence(list(prompts), batch_first=True, padding_side="left",
                          padding_value=model.config.pad_token_id).to(device)
    B, T = tokens.shape
    start = torch.tensor([T - len(prompt) for prompt in prompts], device=device)
    documents = torch.arange(T, device=device) >= start[:, None]
    end = T + max_new_tokens
    batch = Batch(model, start, end)
    x, _ = model.hidden(tokens, documents, caches=batch.caches)
    hidden = x[:, -1]
    step = None
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(B))   # the prompt of each row that is still in the batch
    running = set(rows)     # the prompts that haven't stopped
    unread = []             # the last steps' tokens, (B,) each
    for index in range(T, end):
        new = next_tokens(model, hidden, temperature, generator)
        unread.append(new)
        is_last = index == end - 1
        if is_last or not on_card or len(unread) == CHECK_EVERY:
            for row, row_tokens in zip(rows, torch.stack(unread, 1).tolist()):
                for token in row_tokens:
                    if token in stop:
                        running.discard(row)
                    if row in running:
                        answers[row].append(token)
            unread = []
        if is_last or not running:
            break
        # Drop finished rows a quarter at a time, since each drop copies the caches
        if len(running) <= 0.75 * len(rows):
            kept = [place for place, row in enumerate(rows) if row in running]
            unfinished = torch.tensor(kept, device=device)
            rows = sorted(running)
            new = new[unfinished]
            batch.keep(unfinished)
            step = None
        batch.tokens.copy_(new)
        batch.index.fill_(index)
        if step is None:
            # FSDP gathers a block's weights anew in each forward, which no graph can hold
            is_captured = on_card and not is_sharded(model)
            step = captured(batch.step, device) if is_captured else batch.step
        hidden = step()
    if is_sharded(model):
        model.reshard()     # the embedding, which FSDP2 leaves whole after a forward
    return [torch.tensor(answer, dtype=torch.long) for answer in answers]
