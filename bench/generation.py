"""Greedy generation beside transformers' `generate`: tokens a second.

    pip install -r bench/requirements.txt
    python -m bench.generation --quick               # bfloat16: under a minute on one core
    python -m bench.generation                       # all rows: three minutes

Config B of shapes.py with random weights; 16 prompts of 32 to 128 tokens, padded on the left into
one batch, 128 new tokens each. transformers runs with its default cache, which grows by a copy
each step, and with its static one. Sides take turns in one process. Before anything is timed,
float32 tokens must be the same on all sides. In bfloat16 near ties fall either way: there the
share of equal tokens is shown. Written to bench/results/generation.json.
"""

import sys

import torch

from bench.common import add_flags, models, prepare, publish, race
from bench.shapes import CONFIGS
from run.files import Parser

SHOWN = {"dtype": "", "side": "", "s": ".2f", "tokens/s": ",.0f", "times ours": ".2f",
         "ms a step": ".1f", "same tokens": ".1%"}


def generators(config, dtype, num_prompts: int) -> dict:
    """{side: new -> (prompts, new) tokens}."""
    ours, theirs = models(config, dtype)
    draw = torch.Generator().manual_seed(1)
    lengths = torch.linspace(32, 128, num_prompts).long().tolist()
    prompts = [torch.randint(3, config.vocab_size, (n,), generator=draw) for n in lengths]
    # Their batch is padded on the left
    longest = max(lengths)
    tokens, mask = torch.zeros(2, num_prompts, longest, dtype=torch.long).unbind()
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt):] = prompt
        mask[i, longest - len(prompt):] = 1

    def hf(new, **cache):
        whole = theirs.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False,
                                eos_token_id=None, pad_token_id=0, **cache)
        return whole[:, longest:]

    return {
        "ours": lambda new: torch.stack(ours.generate(prompts, new)),
        "HF": hf,
        "HF, static cache": lambda new: hf(new, cache_implementation="static"),
    }


def rows_of(dtype_name: str, args) -> list[dict]:
    sides = generators(CONFIGS["B"], getattr(torch, dtype_name), args.batch)
    # The warm-up, and parity
    tokens = {name: run(args.new) for name, run in sides.items()}
    same = {name: (new == tokens["HF"]).float().mean().item() for name, new in tokens.items()}
    if dtype_name == "float32" and min(same.values()) < 1:
        sys.exit(f"no parity, so nothing is timed: tokens equal to HF's {same}")
    # What the prompts take with one token each is no part of a step
    first = race({name: lambda run=run: run(1) for name, run in sides.items()}, args.rounds)
    whole = race({name: lambda run=run: run(args.new) for name, run in sides.items()}, args.rounds)
    rows = []
    for name, (took, times_ours) in whole.items():
        rows.append({
            "dtype": dtype_name, "side": name, "s": took,
            "tokens/s": args.batch * args.new / took,
            "times ours": times_ours,
            "ms a step": 1e3 * (took - first[name][0]) / (args.new - 1),
            "same tokens": same[name],
        })
    return rows


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=16, metavar="N", help="prompts (default: 16)")
    add("--new", type=int, default=128, metavar="N", help="new tokens of each (default: 128)")
    add_flags(parser)
    add("--quick", action="store_true", help="3 rounds, and only bfloat16")
    args = parser.parse_args()
    if args.quick:
        args.dtype, args.rounds = ["bfloat16"], 3
    prepare(args)
    rows = []
    for dtype in args.dtype:
        rows += rows_of(dtype, args)
    publish("generation", rows, SHOWN, args)


if __name__ == "__main__":
    main()
