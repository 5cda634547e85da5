"""Feature statistics beside a loop of transformers and sae-lens: tokens a second.

    pip install -r bench/requirements.txt
    python bench/selection.py --quick                              # SAEs of 4,096 features, under a minute on one core
    python bench/selection.py                                      # and of 16,384

Config B of step.py, float32, random weights, JumpReLU SAEs after blocks 2 and 5 of 8 on whose features 2 % of tokens
fire, and random pairs: prompts of 16 to 96 tokens, responses of 16 to 160. The other side is what one would write:
batches of 8 examples in the order they come, padded; output_hidden_states, without the head; the SAE's encoder on all
response tokens of the batch; sums, firing counts and squares of each example's sum. Ours also keeps the peaks. Both
take up to about 2,048 tokens at once, and must find the same Δ before anything is timed. Results are written to
bench/results/selection.json.
"""

import argparse
import sys

import torch
from bench.common import models, prepare, publish, race
from bench.shapes import CONFIGS

from data import Example
from features import feature_statistics
from sae import JumpReLU

SHOWN = {"features": ",", "side": "", "s": ".2f", "tokens/s": ",.0f", "times ours": ".2f", "Δ off": ".1e"}
LAYERS, BATCH = (2, 5), 8


def random_pairs(vocabulary, count):
    """[(aligned, unaligned)]; the answers of the two sides come from overlapping parts of the vocabulary."""
    draw = torch.Generator().manual_seed(1)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    def text(low, high, length):
        return torch.randint(low, high, (length,), generator=draw).tolist()
    pairs = []
    for _ in range(count):
        prompt = text(5, vocabulary, number(16, 97))
        pairs.append(tuple(Example(prompt + text(low, low + vocabulary // 2, number(16, 161)), len(prompt), True)
                           for low in (5, vocabulary // 4)))
    return pairs


def random_saes(model, features):
    """{layer: SAE}; nearly all of the gate is in b_enc, so that rounding moves no activation by much."""
    tokens, saes = torch.randint(5, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(2)), {}
    for layer, residual in model.hidden(tokens, capture=LAYERS)[1].items():
        W = torch.nn.functional.normalize(torch.randn(model.config.hidden_size, features,
                                                      generator=torch.Generator().manual_seed(layer)), dim=0)
        gate = (residual[:, 1:].flatten(0, 1) @ W).flatten()[::7].kthvalue(int(0.98 * (254 * features // 7))).values.item()
        saes[layer] = JumpReLU(W, torch.full((features,), -gate), torch.full((features,), 1e-3 * gate), W.T.contiguous(),
                               torch.zeros(len(W)))
    return saes


def lens(sae):
    """The same SAE in sae-lens."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    twin = JumpReLUSAE(JumpReLUSAEConfig(d_in=sae.d_model, d_sae=sae.n_features, apply_b_dec_to_input=False))
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        getattr(twin, name).data = getattr(sae, name)
    return twin.requires_grad_(False)


@torch.no_grad()
def loop(model, saes, pairs):
    """{layer: Δ (F,)} by transformers and sae-lens, with the firing shares and squared sums that ours has too."""
    examples = [example for pair in pairs for example in pair]
    sums = {layer: torch.zeros(3, 2, sae.cfg.d_sae, dtype=torch.float64) for layer, sae in saes.items()}
    counts = torch.tensor([[len(e.tokens) - e.start for e in pair] for pair in pairs]).sum(0)
    for at in range(0, len(examples), BATCH):
        batch = examples[at:at + BATCH]
        tokens, mask, counted = torch.zeros(3, len(batch), max(len(e.tokens) for e in batch), dtype=torch.long).unbind()
        for i, e in enumerate(batch):
            tokens[i, :len(e.tokens)], mask[i, :len(e.tokens)] = torch.tensor(e.tokens), 1
            counted[i, e.start:len(e.tokens)] = 1
        states = model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        for layer, sae in saes.items():
            codes = sae.encode(states[layer + 1][counted == 1])                      # [n + 1] is the output of block n
            for i, a in enumerate(codes.split(counted.sum(1).tolist())):
                total = a.sum(0).double()
                sums[layer][:, i % 2] += torch.stack((total, total.square(), (a > 0).sum(0).double()))
    return {layer: s[0, 0] / counts[0] - s[0, 1] / counts[1] for layer, s in sums.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs="+", type=int, default=[4096, 16384], help="of each SAE (default: 4096 16384)")
    parser.add_argument("--pairs", type=int, default=32, help="pairs (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="of both sides (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and only 4,096 features")
    args = parser.parse_args()
    if args.quick:
        args.features, args.rounds = [4096], 3
    prepare(args)
    model, twin = models(CONFIGS["B"], torch.float32)
    pairs, rows = random_pairs(model.config.vocab_size, args.pairs), []
    tokens = sum(len(example.tokens) for pair in pairs for example in pair)
    for features in args.features:
        saes = random_saes(model, features)
        twins = {layer: lens(sae) for layer, sae in saes.items()}
        sides = {"ours": lambda: {layer: found.delta for layer, found in
                                  feature_statistics(model, saes, pairs, batch_tokens=2048).items()},
                 "HF + sae-lens": lambda: loop(twin.model, twins, pairs)}
        found = {name: run() for name, run in sides.items()}                         # the warm-up
        off = max(((found["ours"][layer] - delta).abs().max() / delta.abs().max()).item()
                  for layer, delta in found["HF + sae-lens"].items())
        if off > 1e-4:
            sys.exit(f"no parity, so nothing is timed: Δ is off by {off:.1e} of its largest")
        rows += [dict(zip(SHOWN, (features, name, took, tokens / took, ratio, off)))
                 for name, (took, ratio) in race(sides, args.rounds).items()]
    publish("selection", rows, SHOWN, args, "sae-lens")


if __name__ == "__main__":
    main()
