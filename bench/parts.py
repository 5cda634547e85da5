"""What two parts of a step are worth by themselves: the fused loss, and packing.

    pip install -r bench/requirements.txt
    python bench/parts.py                                          # two minutes on one core

loss: forward and backward of the head on 1,024 labelled rows, config A's 256,000 × 256 embedding, against full logits
over the same rows, as one writes it with torch alone (product, softcap in float32, cross-entropy).

packing: one epoch of examples trained with config B, packed by data.pack into rows of 512 tokens and 4 rows a batch,
against our own padded batches of 8 examples in random order, each as long as its longest; same model, same fast path.
Lengths are those of HH-RLHF's aligned sides under Gemma's tokenizer, of at most 512 tokens, where ../shared/data is at
hand, else drawn from a log-normal with the same median (about 90) and spread. Written to bench/results/parts.json.
"""

import argparse
import random
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bench.common import publish, race
from bench.step import CONFIGS, RATE, ROOT, KeepGradients, choose_products, our_model

from data import Example, load_tokenizer, make_example, pack
from data import read_pairs
from fused import IGNORE, FusedNLL
from train import fit

SHOWN = {"part": "", "dtype": "", "side": "", "ms": ",.0f", "times ours": ".2f", "tokens": ",", "places": ",", "off": ".1e"}
DATA, LENGTH, BATCH, COUNT = ROOT.parent / "shared" / "data", 512, 8, 64


def losses(dtype, rounds):
    """Rows of the table: the head alone."""
    config, draw = CONFIGS["A"], torch.Generator().manual_seed(0)
    V, D, N, cap = config.vocab_size, config.hidden_size, 1024, config.final_logit_softcapping
    E, h = torch.randn(V, D, generator=draw).mul_(0.3).to(dtype), torch.randn(N, D, generator=draw).to(dtype)
    targets = torch.randint(0, V, (N,), generator=draw)

    def full(h, E, targets, cap):
        return F.cross_entropy(torch.tanh((h @ E.T).float() / cap) * cap, targets, reduction="sum")

    def both(form):
        x = h.clone().requires_grad_()
        value = form(x, E, targets, cap)
        value.backward()
        return value.item(), x.grad
    sides = {"ours": lambda: both(FusedNLL.apply), "full logits": lambda: both(full)}
    (ours, g), (theirs, wanted) = (side() for side in sides.values())                # the warm-up
    off = ((g - wanted).float().norm() / wanted.float().norm()).item()
    if abs(ours / theirs - 1) > 1e-4 or off > (1e-5 if dtype == torch.float32 else 0.02):
        sys.exit(f"no parity, so nothing is timed: losses {ours} and {theirs}, gradients {off:.1e} apart")
    return [("loss", name, took, ratio, N, N, off) for name, (took, ratio) in race(sides, rounds).items()]


def examples():
    """(COUNT examples of at most LENGTH tokens, where their lengths are from). Ids are random: only lengths matter."""
    draw, tokens = random.Random(0), torch.Generator().manual_seed(0)
    try:
        tokenizer = load_tokenizer(DATA / "gemma_tokenizer.json.gz")
        pairs, _ = read_pairs(DATA / "hh_rlhf_harmless_base_test.jsonl.gz")
        made = (make_example(tokenizer, pair.turns, pair.aligned, LENGTH) for pair in draw.sample(pairs, 2 * COUNT))
        sizes, source = [(len(e.tokens), e.start) for e in made if e][:COUNT], "HH-RLHF"
    except Exception as error:                                                       # not at hand
        print(f"lengths are drawn: {error}", file=sys.stderr)
        sizes = [(min(LENGTH, max(8, int(draw.lognormvariate(4.5, 0.8)))),) * 2 for _ in range(COUNT)]
        sizes, source = [(size, size // 2) for size, _ in sizes], "log-normal"
    vocabulary = CONFIGS["B"].vocab_size
    return [Example(torch.randint(5, vocabulary, (size,), generator=tokens).tolist(), start, True) for size, start in sizes], source


def padded(examples):
    """Batches of BATCH examples in the order they come, each as long as its longest, as data.Row's fields (B, T)."""
    for at in range(0, len(examples), BATCH):
        batch = examples[at:at + BATCH]
        tokens, documents = torch.zeros(2, len(batch), max(len(e.tokens) for e in batch), dtype=torch.long).unbind()
        labels = torch.full_like(tokens, IGNORE)
        for i, e in enumerate(batch):
            ids = torch.tensor(e.tokens)
            tokens[i, :len(ids)], documents[i, :len(ids)], labels[i, e.start - 1:len(ids) - 1] = ids, 1, ids[e.start:]
        yield SimpleNamespace(tokens=tokens, documents=documents, labels=labels)


def packing(dtype, rounds):
    """Rows of the table: an epoch, one optimizer step over all its batches, so that both sides must find the same gradients."""
    given, source = examples()
    random.Random(1).shuffle(given)
    rows = pack(given, LENGTH, 0, 0)
    batches = {"ours": [SimpleNamespace(**{key: torch.stack([getattr(row, key) for row in rows[at:at + 4]]) for key in
                                           ("tokens", "documents", "labels")}) for at in range(0, len(rows), 4)],
               "padded": list(padded(given))}
    sides, found = {}, {}
    for name, batch in batches.items():
        model = our_model(CONFIGS["B"], dtype)
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps = fit(model, KeepGradients(parameters, RATE), iter([batch] * (rounds + 1)), lambda step: 0.0)
        sides[name] = lambda steps=steps: next(steps)["loss"]
        found[name] = sides[name](), [p.last.clone() for p in parameters]            # the warm-up
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(found["ours"][1], found["padded"][1]))
    if abs(found["ours"][0] / found["padded"][0] - 1) > 1e-3 or off > (1e-4 if dtype == torch.float32 else 0.1):
        sys.exit(f"no parity, so nothing is timed: losses {[loss for loss, _ in found.values()]}, gradients {off:.1e} apart")
    real = sum(len(e.tokens) for e in given)
    return [(f"packing, {source}", name, took, ratio, real, sum(b.tokens.numel() for b in batches[name]), off)
            for name, (took, ratio) in race(sides, rounds).items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of all sides (default: 1)")
    parser.add_argument("--products", choices=("onednn", "mkl"), default="onednn", help="library for float32 matrices, all sides")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    choose_products(args.products)
    rows = []
    for dtype in args.dtype:
        for measured in (losses, packing):
            rows += [dict(zip(SHOWN, (part, dtype, side, 1e3 * took, ratio, tokens, places, off)))
                     for part, side, took, ratio, tokens, places, off in measured(getattr(torch, dtype), args.rounds)]
    publish("parts", rows, SHOWN, args)


if __name__ == "__main__":
    main()
