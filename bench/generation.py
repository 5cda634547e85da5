"""Greedy generation beside transformers' `generate`: tokens a second.

    pip install -r bench/requirements.txt
    python bench/generation.py --quick                             # bfloat16, under a minute on one core
    python bench/generation.py                                     # all rows; three minutes

Config B of step.py with random weights; 16 prompts of 32 to 128 tokens, padded on the left into one batch, 128 new
tokens each. transformers runs with its default cache, which grows by a copy each step, and with its static one. Sides
take turns in one process. Before anything is timed, float32 tokens must be the same on all sides; in bfloat16, where
near ties fall either way, the share that is the same is shown. Written to bench/results/generation.json.
"""

import argparse
import sys

import torch
from bench.common import models, publish, race
from bench.step import CONFIGS, choose_products

SHOWN = {"dtype": "", "side": "", "s": ".2f", "tokens/s": ",.0f", "times ours": ".2f", "ms a step": ".1f", "same tokens": ".1%"}


def sides(config, dtype, args):
    """({side: () -> new tokens (B, N)}, {side: () -> the first one})."""
    ours, theirs = models(config, dtype)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, config.vocab_size, (length,), generator=draw)
               for length in torch.linspace(32, 128, args.batch).long().tolist()]
    P = max(map(len, prompts))
    tokens, mask = torch.zeros(2, args.batch, P, dtype=torch.long).unbind()
    for i, prompt in enumerate(prompts):
        tokens[i, P - len(prompt):], mask[i, P - len(prompt):] = prompt, 1

    def hf(new, **cache):
        return theirs.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None,
                               pad_token_id=0, **cache)[:, P:]
    by_length = {"ours": lambda new: torch.stack(ours.generate(prompts, new)), "HF": hf,
                 "HF, static cache": lambda new: hf(new, cache_implementation="static")}
    return [{name: lambda run=run, new=new: run(new) for name, run in by_length.items()} for new in (args.new, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=16, help="prompts (default: 16)")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each (default: 128)")
    parser.add_argument("--threads", type=int, default=1, help="of all sides (default: 1)")
    parser.add_argument("--products", choices=("onednn", "mkl"), default="onednn", help="library for float32 matrices, all sides")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and only bfloat16")
    args = parser.parse_args()
    if args.quick:
        args.dtype, args.rounds = ["bfloat16"], 3
    torch.set_num_threads(args.threads)
    choose_products(args.products)
    rows = []
    for dtype in args.dtype:
        whole, first = sides(CONFIGS["B"], getattr(torch, dtype), args)
        new = {name: run() for name, run in whole.items()}                           # the warm-up
        same = {name: (tokens == new["HF"]).float().mean().item() for name, tokens in new.items()}
        if dtype == "float32" and min(same.values()) < 1:
            sys.exit(f"no parity, so nothing is timed: tokens equal to HF's {same}")
        prompt = race(first, args.rounds)                                            # what the prompts take, and one token
        for name, (took, ratio) in race(whole, args.rounds).items():
            values = (dtype, name, took, args.batch * args.new / took, ratio, 1e3 * (took - prompt[name][0]) / (args.new - 1), same[name])
            rows.append(dict(zip(SHOWN, values)))
    publish("generation", rows, SHOWN, args)


if __name__ == "__main__":
    main()
