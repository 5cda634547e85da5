"""Feature statistics beside a loop of transformers and sae-lens: tokens a second.

    pip install -r bench/requirements.txt
    python -m bench.selection --quick      # SAEs of 4,096 features, under a minute on one core
    python -m bench.selection              # and of 16,384

Config B of bench/shapes.py, float32, random weights. JumpReLU SAEs after blocks 2 and 5 of 8, whose
features fire on 2 % of tokens. Random pairs: prompts of 16 to 96 tokens, responses of 16 to 160.
The other side is what one would write: batches of 8 examples in the order they come, padded;
output_hidden_states, without the head; the SAE's encoder on all response tokens of the batch; sums,
firing counts and squares of each example's sum. Ours also keeps the peaks. Both take up to about
2,048 tokens at once, and must find the same Δ before anything is timed. Results are written to
bench/results/selection.json.
"""

import argparse
import sys

import torch

from bench.common import add_flags, models, prepare, publish, race
from bench.shapes import CONFIGS
from data import Example
from features import feature_statistics
from sae import JumpReLU

SHOWN = {"features": ",", "side": "", "s": ".2f", "tokens/s": ",.0f", "times ours": ".2f",
         "Δ off": ".1e"}
LAYERS, BATCH = (2, 5), 8


def random_pairs(vocabulary, count):
    """[(aligned, unaligned)] of random tokens.

    The answers of the two sides come from overlapping parts of the vocabulary.
    """
    generator = torch.Generator().manual_seed(1)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def text(low, high, length):
        return torch.randint(low, high, (length,), generator=generator).tolist()

    pairs = []
    for _ in range(count):
        prompt, pair = text(5, vocabulary, number(16, 97)), []
        for low in (5, vocabulary // 4):
            answer = text(low, low + vocabulary // 2, number(16, 161))
            pair.append(Example(prompt + answer, len(prompt), True))
        pairs.append(tuple(pair))
    return pairs


def random_saes(model, num_features):
    """{layer: SAE}; most of the gate is in b_enc, so that rounding moves no activation much."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, model.config.vocab_size, (2, 128), generator=generator)
    saes, D = {}, model.config.hidden_size
    for layer, residual in model.hidden(tokens, capture=LAYERS)[1].items():
        W = torch.randn(D, num_features, generator=torch.Generator().manual_seed(layer))
        W = torch.nn.functional.normalize(W, dim=0)
        sample = (residual[:, 1:].flatten(0, 1) @ W).flatten()[::7]
        gate = sample.kthvalue(int(0.98 * (254 * num_features // 7))).values.item()
        bias = torch.full((num_features,), -gate)
        saes[layer] = JumpReLU(W, bias, -1e-3 * bias, W.T.contiguous(), torch.zeros(D))
    return saes


def twin_of(sae):
    """The same SAE in sae-lens."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    config = JumpReLUSAEConfig(d_in=sae.d_model, d_sae=sae.n_features, apply_b_dec_to_input=False)
    twin = JumpReLUSAE(config)
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        getattr(twin, name).data = getattr(sae, name)
    return twin.requires_grad_(False)


@torch.no_grad()
def loop(model, saes, pairs):
    """{layer: Δ (F,)} by transformers and sae-lens, with the other sums that ours has too."""
    examples = [example for pair in pairs for example in pair]
    sums = {layer: torch.zeros(3, 2, sae.cfg.d_sae, dtype=torch.float64)
            for layer, sae in saes.items()}
    counts = torch.tensor([[len(e.tokens) - e.start for e in pair] for pair in pairs]).sum(0)
    for first in range(0, len(examples), BATCH):
        batch = examples[first:first + BATCH]
        shape = len(batch), max(len(example.tokens) for example in batch)
        tokens, mask, counted = torch.zeros(3, *shape, dtype=torch.long).unbind()
        for i, example in enumerate(batch):
            length = len(example.tokens)
            tokens[i, :length], mask[i, :length] = torch.tensor(example.tokens), 1
            counted[i, example.start:length] = 1
        states = model(tokens, attention_mask=mask, output_hidden_states=True,
                       use_cache=False).hidden_states
        for layer, sae in saes.items():
            codes = sae.encode(states[layer + 1][counted == 1])     # [n + 1]: output of block n
            for i, a in enumerate(codes.split(counted.sum(1).tolist())):
                total, fired = a.sum(0).double(), (a > 0).sum(0).double()
                sums[layer][:, i % 2] += torch.stack((total, total.square(), fired))
    return {layer: s[0, 0] / counts[0] - s[0, 1] / counts[1] for layer, s in sums.items()}


def rows_of(num_features, model, twin, pairs, rounds):
    """The rows of one SAE size, a row a side. Ends the program where the sides disagree."""
    saes = random_saes(model, num_features)
    twins = {layer: twin_of(sae) for layer, sae in saes.items()}

    def ours():
        statistics = feature_statistics(model, saes, pairs, batch_tokens=2048)
        return {layer: statistics[layer].delta for layer in saes}

    sides = {"ours": ours, "HF + sae-lens": lambda: loop(twin.model, twins, pairs)}
    # The first calls warm up, too
    deltas, wanted = (run() for run in sides.values())
    off = max(((deltas[layer] - delta).abs().max() / delta.abs().max()).item()
              for layer, delta in wanted.items())
    if off > 1e-4:
        sys.exit(f"no parity, so nothing is timed: Δ is off by {off:.1e} of its largest")
    num_tokens = sum(len(example.tokens) for pair in pairs for example in pair)
    return [{"features": num_features, "side": name, "s": seconds,
             "tokens/s": num_tokens / seconds, "times ours": ratio, "Δ off": off}
            for name, (seconds, ratio) in race(sides, rounds).items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs="+", type=int, default=[4096, 16384],
                        help="of each SAE (default: 4096 16384)")
    parser.add_argument("--pairs", type=int, default=32, help="pairs (default: 32)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and only 4,096 features")
    add_flags(parser, dtypes=())
    args = parser.parse_args()
    if args.quick:
        args.features, args.rounds = [4096], 3
    prepare(args)
    model, twin = models(CONFIGS["B"], torch.float32)
    pairs, rows = random_pairs(model.config.vocab_size, args.pairs), []
    for num_features in args.features:
        rows += rows_of(num_features, model, twin, pairs, args.rounds)
    publish("selection", rows, SHOWN, args, "sae-lens")


if __name__ == "__main__":
    main()
