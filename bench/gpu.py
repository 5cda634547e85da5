"""The first thing to run on a GPU: a training step by each form of attention that CUDA has.

    python -m bench.gpu                                  # four layers of the 2b: a few minutes
    python -m bench.gpu --model google/gemma-2-27b --layers 2
    python -m bench.gpu --device cpu --layers 1 --tokens 256           # only that the script works

Random weights in a Gemma-2's shapes, fewer layers and 8,192 words; one packed row of two documents,
a window of half a row, LoRA of rank 16 on q, k, v, o. Each form takes the same step in bfloat16.
`loss off` is against the plain form in float32, `gradients off` the mean ‖a − b‖ / ‖b‖ against its
gradients. Rounding alone puts the plain form in bfloat16 some percent off; the command fails where
another form is 1.2 times as far. Time is the median of ten steps.
"""

import statistics
import sys
import time
from dataclasses import replace
from unittest import mock

import torch

from attention import span_mask, visible_keys
from lora import add_lora, trainable_parameters
from model import PRESETS, Gemma2
from run.files import Parser, table

FORMS = {"plain, float32": torch.float32, "plain": torch.bfloat16, "flex": torch.bfloat16,
         "flex, --compile": torch.bfloat16}


def make_model(config, dtype, device):
    """A random model with adapters away from their start, the same for each dtype."""
    generator = torch.Generator().manual_seed(0)
    model = Gemma2(config).init_weights(0.02, generator).requires_grad_(False)
    model.to(device, dtype)
    layers = add_lora(model, 16, 16.0, "random", generator=generator)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.02)
    return model, [parameter for _, parameter in trainable_parameters(layers)]


def measure(form, config, tokens, device):
    """(loss a token, gradients on the CPU, seconds a step, peak bytes) of one form."""
    model, parameters = make_model(config, FORMS[form], device)
    length = tokens.shape[1]
    documents = (torch.arange(length, device=device) > length // 3).long()[None]
    forward = lambda tokens, documents: model.hidden(tokens, documents)[0]
    if "compile" in form:
        forward = torch.compile(forward, dynamic=False)
    spans = visible_keys if "flex" in form else lambda low, cap: span_mask(low)
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with mock.patch("model.visible_keys", spans):
        # Two steps of warm-up
        for _ in range(12):
            began = time.perf_counter()
            total, count = model.nll_sum(forward(tokens, documents), tokens.roll(-1, 1))
            gradients = torch.autograd.grad(total / count, parameters)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    gradients = [gradient.double().cpu() for gradient in gradients]
    return (total / count).item(), gradients, statistics.median(seconds[2:]), peak_bytes


def main():
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=PRESETS, default="google/gemma-2-2b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", type=torch.device, default="cuda")
    args = parser.parse_args()
    if args.device.type == "cuda":
        card = torch.cuda.get_device_properties(args.device)
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} of "
              f"them; torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    config = replace(PRESETS[args.model], num_hidden_layers=args.layers, layer_types=(),
                     vocab_size=8192, sliding_window=args.tokens // 2)
    tokens = torch.randint(3, 8192, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(args.device)
    rows, distances = [], {}
    for form in FORMS:
        loss, gradients, seconds, peak_bytes = measure(form, config, tokens, args.device)
        if not rows:                                     # the plain form in float32 comes first
            true_loss, truth = loss, gradients
        distances[form] = statistics.mean(((ours - true).norm() / true.norm()).item()
                                          for ours, true in zip(gradients, truth))
        rows.append([form, f"{loss:.5f}", f"{abs(loss / true_loss - 1):.1e}",
                     f"{distances[form]:.2%}", f"{1000 * seconds:.1f}",
                     f"{args.tokens / seconds:,.0f}", f"{peak_bytes / 1e9:.2f}"])
    head = ["form", "loss", "loss off", "gradients off", "ms", "tokens/s", "peak GB"]
    print(table(rows, head, right=range(1, 7)))
    far = [form for form, off in distances.items() if off > 1.2 * distances["plain"]]
    if far:
        sys.exit(f"\nno parity: {'; '.join(far)}")
    print("\nparity: every form is as close to float32 as the plain one")


if __name__ == "__main__":
    main()
