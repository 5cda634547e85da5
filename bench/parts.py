"""What two parts of a step are worth by themselves: the fused loss, and packing.

    pip install -r bench/requirements.txt
    python -m bench.parts                            # two minutes on one core
    python -m bench.parts --quick                    # the loss alone, 2 rounds

loss: forward and backward of the head on 1,024 labelled rows, config A's 256,000 × 256 embedding,
against full logits over the same rows, as one writes it with torch alone (product, softcap in
float32, cross-entropy).

packing: one epoch of examples trained with config B, packed by data.pack into rows of 512 tokens
and 4 rows a batch, against our own padded batches of 8 examples in random order, each as long as
its longest; same model, same fast path. Lengths are those of HH-RLHF's aligned sides under
Gemma's tokenizer, of at most 512 tokens, where ../shared/data has them. Else they are drawn from
a log-normal with the same median (about 90) and spread. Written to bench/results/parts.json.
"""

import random
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.common import add_flags, prepare, publish, race
from bench.shapes import CONFIGS, RATE
from bench.step import KeepGradients, our_model
from data import Example, load_tokenizer, make_example, pack
from fused import IGNORE, nll_sum
from run.files import ROOT, Parser
from run.readers import read_pairs
from train import fit

SHOWN = {"part": "", "dtype": "", "side": "", "ms": ",.0f", "times ours": ".2f", "tokens": ",",
         "places": ",", "off": ".1e"}
DATA = ROOT.parent / "shared" / "data"
LENGTH, BATCH, COUNT = 512, 8, 64


def row_of(part, dtype_name, side, timed, tokens, places, off) -> dict:
    took, times_ours = timed
    return {"part": part, "dtype": dtype_name, "side": side, "ms": 1e3 * took,
            "times ours": times_ours, "tokens": tokens, "places": places, "off": off}


# -------------------------------------------------------------------------------------------------
# The loss

def full_logits(h, targets, E, cap):
    """h (N, D), E (V, D): Σ −log softmax(softcap(h·Eᵀ))[target]."""
    logits = torch.tanh((h @ E.T).float() / cap) * cap
    return F.cross_entropy(logits, targets, reduction="sum")


def loss_rows(dtype_name: str, rounds: int) -> list[dict]:
    config, dtype = CONFIGS["A"], getattr(torch, dtype_name)
    draw = torch.Generator().manual_seed(0)
    V, D, N = config.vocab_size, config.hidden_size, 1024
    cap = config.final_logit_softcapping
    E = torch.randn(V, D, generator=draw).mul_(0.3).to(dtype)
    h = torch.randn(N, D, generator=draw).to(dtype)
    targets = torch.randint(0, V, (N,), generator=draw)

    def both_passes(loss):
        x = h.clone().requires_grad_()
        value = loss(x)
        value.backward()
        return value.item(), x.grad

    sides = {
        "ours": lambda: both_passes(lambda x: nll_sum(x[None], targets[None], E, cap)[0]),
        "full logits": lambda: both_passes(lambda x: full_logits(x, targets, E, cap)),
    }
    # The warm-up, and parity
    (ours, gradient), (theirs, wanted) = (run() for run in sides.values())
    off = ((gradient - wanted).float().norm() / wanted.float().norm()).item()
    if abs(ours / theirs - 1) > 1e-4 or off > (1e-5 if dtype == torch.float32 else 0.02):
        sys.exit(f"no parity, so nothing is timed: losses {ours}, {theirs}, gradients {off:.1e}")
    return [row_of("loss", dtype_name, side, timed, N, N, off)
            for side, timed in race(sides, rounds).items()]


# -------------------------------------------------------------------------------------------------
# Packing

def example_sizes() -> tuple[list[tuple[int, int]], str]:
    """[(tokens, start of the response)] of COUNT examples, and where they are from."""
    draw = random.Random(0)
    tokenizer_file = DATA / "gemma_tokenizer.json.gz"
    if not tokenizer_file.exists():
        lengths = [draw.lognormvariate(4.5, 0.8) for _ in range(COUNT)]
        sizes = [min(LENGTH, max(8, int(length))) for length in lengths]
        return [(size, size // 2) for size in sizes], "log-normal"
    tokenizer = load_tokenizer(tokenizer_file)
    pairs, _ = read_pairs(DATA / "hh_rlhf_harmless_base_test.jsonl.gz")
    made = [make_example(tokenizer, pair.turns, pair.aligned, LENGTH)
            for pair in draw.sample(pairs, 2 * COUNT)]
    return [(len(e.tokens), e.start) for e in made if e][:COUNT], "HH-RLHF"


def padded(examples):
    """Batches of BATCH examples in the order they come, as long as their longest: data.Row's
    fields, (B, T)."""
    for at in range(0, len(examples), BATCH):
        batch = examples[at:at + BATCH]
        longest = max(len(e.tokens) for e in batch)
        tokens, documents = torch.zeros(2, len(batch), longest, dtype=torch.long).unbind()
        labels = torch.full_like(tokens, IGNORE)
        for i, e in enumerate(batch):
            ids = torch.tensor(e.tokens)
            tokens[i, :len(ids)] = ids
            documents[i, :len(ids)] = 1
            labels[i, e.start - 1:len(ids) - 1] = ids[e.start:]
        yield SimpleNamespace(tokens=tokens, documents=documents, labels=labels)


def stacked(rows, size=4):
    """Packed rows, `size` a batch."""
    for at in range(0, len(rows), size):
        part = rows[at:at + size]
        yield SimpleNamespace(tokens=torch.stack([row.tokens for row in part]),
                              documents=torch.stack([row.documents for row in part]),
                              labels=torch.stack([row.labels for row in part]))


def packing_rows(dtype_name: str, rounds: int) -> list[dict]:
    """An epoch as one optimizer step over all its batches: both sides must find one gradient."""
    dtype = getattr(torch, dtype_name)
    sizes, source = example_sizes()
    draw = torch.Generator().manual_seed(0)
    examples = []
    for size, start in sizes:        # random ids: only lengths matter
        ids = torch.randint(5, CONFIGS["B"].vocab_size, (size,), generator=draw).tolist()
        examples.append(Example(ids, start, True))
    random.Random(1).shuffle(examples)
    batches = {"ours": list(stacked(pack(examples, LENGTH, 0, 0))),
               "padded": list(padded(examples))}
    sides, losses, gradients = {}, {}, {}
    for name, batch in batches.items():
        model = our_model(CONFIGS["B"], dtype)
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps = fit(model, KeepGradients(parameters, RATE), iter([batch] * (rounds + 1)),
                    lambda step: 0.0)
        sides[name] = lambda steps=steps: next(steps)["loss"]
        losses[name] = sides[name]()         # the warm-up
        gradients[name] = [p.last.clone() for p in parameters]
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(*gradients.values()))
    loss_off = abs(losses["ours"] / losses["padded"] - 1)
    if loss_off > 1e-3 or off > (1e-4 if dtype == torch.float32 else 0.1):
        sys.exit(f"no parity, so nothing is timed: losses {losses}, gradients {off:.1e} apart")
    num_tokens = sum(len(e.tokens) for e in examples)
    rows = []
    for side, timed in race(sides, rounds).items():
        places = sum(batch.tokens.numel() for batch in batches[side])
        rows.append(row_of(f"packing, {source}", dtype_name, side, timed, num_tokens, places, off))
    return rows


def main():
    parser = Parser(__doc__)
    add_flags(parser, dtypes=("bfloat16",))
    parser.add_argument("--quick", action="store_true", help="the loss alone, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 2
    prepare(args)
    rows = []
    for dtype in args.dtype:
        rows += loss_rows(dtype, args.rounds)
        if not args.quick:
            rows += packing_rows(dtype, args.rounds)
    publish("parts", rows, SHOWN, args)


if __name__ == "__main__":
    main()
