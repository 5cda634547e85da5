"""The shapes that are timed, and the floor of a training step: its matrix products alone.

Letters: B batch, T tokens, D hidden size, H heads, K key-value heads, hd head size, r rank.
"""

import torch

from bench.common import median_seconds
from fused import IGNORE
from model import SLIDING, Config

COMMON = dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=256,
              max_position_embeddings=512)
CONFIGS = {
    # The head takes most of a step
    "A": Config(vocab_size=256000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, **COMMON),
    # The blocks take most of it
    "B": Config(vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                num_attention_heads=8, num_key_value_heads=4, **COMMON),
}
BATCH, LENGTH = 4, 512
RANK, ALPHA, RATE = 16, 32, 1e-4
QUERY_BLOCK = 128      # rows of queries that our attention takes at once


def data(config, labelled: str, batch=BATCH):
    """tokens, labels (B, T): labels[t] is token t + 1, on the last half of each row or on all."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, config.vocab_size, (batch, LENGTH), generator=draw)
    labels = torch.full_like(tokens, IGNORE)
    first = LENGTH // 2 if labelled == "half" else 1
    labels[:, first - 1:-1] = tokens[:, first:]
    return tokens, labels


# -------------------------------------------------------------------------------------------------
# The floor

def adapter_shapes(N: int, inputs: int, outputs: int, first: bool):
    """(M, K, N) of an adapter's products; the first block's readers send no gradient down."""
    forward = [(N, inputs, RANK), (N, RANK, outputs)]            # x·Aᵀ, then ·Bᵀ
    backward = [(N, outputs, RANK), (RANK, N, inputs), (outputs, N, RANK)]       # dy·B, dA, dB
    if not first:
        backward.append((N, RANK, inputs))                       # ·A
    return forward + backward


def products(config, labelled: str):
    """[(part, flops of a step, (batch, M, K, N))]: each product, and the shape it is timed in."""
    D, inner, hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    N, T = BATCH * LENGTH, LENGTH
    parts = []

    def add(part, m, k, n):
        parts.append((part, 2 * m * k * n, (1, m, k, n)))

    widths = {"q": (D, H * hd), "k": (D, K * hd), "v": (D, K * hd), "o": (H * hd, D)}
    for layer, kind in enumerate(config.layer_types):
        # A frozen weight takes part once forward and once backward: it needs no gradient itself.
        # Nothing trains below the first block, so its q, k and v send none down.
        for name, (inputs, outputs) in widths.items():
            first = layer == 0 and name != "o"
            add("q, k, v, o", N, inputs, outputs)
            if not first:
                add("q, k, v, o", N, outputs, inputs)
            for shape in adapter_shapes(N, inputs, outputs, first):
                add("adapters", *shape)
        # Gate, up and down
        for inputs, outputs in ((D, inner), (D, inner), (inner, D)):
            add("MLP", N, inputs, outputs)
            add("MLP", N, outputs, inputs)
        # Attention over visible pairs: 2 products forward, 4 backward
        seen = min(T, config.sliding_window) if kind == SLIDING else T
        pairs = BATCH * H * (seen * (seen + 1) / 2 + (T - seen) * seen)
        parts.append(("attention", 6 * 2 * pairs * hd, (BATCH * K, H // K * QUERY_BLOCK, hd, seen)))
    # The head, on labelled tokens, forward and backward
    labels = int((data(config, labelled)[1] != IGNORE).sum())
    for shape in ((1, labels, D, 4096), (1, labels, 4096, D)):
        parts.append(("head", 2 * labels * D * config.vocab_size, shape))
    return parts


def floor(config, dtype: torch.dtype, labelled: str) -> dict[str, tuple[float, float]]:
    """{part: (seconds, flops)} of a step's products, each shape at the rate measured for it."""
    parts, rates = {}, {}
    for part, flops, shape in products(config, labelled):
        if shape not in rates:
            rates[shape] = flops_per_second(*shape, dtype)
        seconds, done = parts.get(part, (0.0, 0))
        parts[part] = seconds + flops / rates[shape], done + flops
    return parts


def flops_per_second(batch: int, m: int, k: int, n: int, dtype: torch.dtype) -> float:
    x = torch.randn(batch, m, k, dtype=dtype)
    w = torch.randn(batch, n, k, dtype=dtype).mT
    run = (lambda: x @ w) if batch > 1 else (lambda: x[0] @ w[0])
    size = m * k * n * batch
    return 2 * size / median_seconds(run, max(1, int(5e7 / size)))
