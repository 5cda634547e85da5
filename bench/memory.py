"""What a forward pass keeps for its backward: bytes a token, beside transformers + peft.

    pip install -r bench/requirements.txt
    python -m bench.memory                           # a minute on one core, 6 GB of memory

Counts the distinct storages that autograd saves between the first block and the loss, parameters
left out, for a row of 512 tokens in bfloat16, labels on its last half, LoRA of rank 16 on q, k,
v, o. Models of two and of three layers are run. Their difference is what a layer keeps, and the
whole follows, since all layers but the first keep the same. With --recompute the whole has one
plain layer on top: the one that the backward is at. Sizes depend on shapes alone, so weights are
zeros and no backward is run. Printed as a table and written to bench/results/memory.json.
"""

import argparse
import gc
import sys
from dataclasses import replace
from unittest import mock

import torch

from bench.common import write_results
from bench.shapes import CONFIGS, LENGTH, data
from bench.step import our_model
from bench.step import theirs as their_step
from model import PRESETS
from run.files import Parser, table

ALL_CONFIGS = CONFIGS | {"gemma-2-2b": PRESETS["google/gemma-2-2b"]}


def ours(config, recompute=False):
    """A function that runs a forward pass to the loss."""
    model = our_model(config, torch.bfloat16)
    model.recompute = recompute
    tokens, labels = data(config, "half", batch=1)
    return lambda: model.nll_sum(model.hidden(tokens)[0], labels)[0]


def theirs(config):
    step, _ = their_step(config, torch.bfloat16, "half", batch=1)
    return step


SIDES = {
    "ours": ours,
    "ours, --recompute": lambda config: ours(config, recompute=True),
    "transformers + peft": theirs,
}


def saved_bytes(run) -> int:
    """Bytes of the distinct storages that `run` saves for a backward and that hold no parameter."""
    # By address: a storage that two operations save counts once
    sizes, weights, alive = {}, set(), []

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)         # so that no address comes twice
        return tensor

    def note_weights(module, _):
        weights.update(p.untyped_storage().data_ptr() for p in module.parameters())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note_weights)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    hook.remove()
    return sum(size for address, size in sizes.items() if address not in weights)


def on_paper(config) -> dict[str, int]:
    """{side: bytes a token that a layer keeps}, in bfloat16, worked out by hand for ours.

    A layer keeps the inputs of its four norms and of q, k, v (5 of width D), q, k, v and the
    attention's output, and two of the MLP's width: the GELU's input, and its output's factor.
    In float32 it keeps a number a norm and one a head. A recomputed layer keeps its input.
    """
    D, inner, hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = 2 * (5 * D + 2 * (H + K) * hd + 2 * inner) + 4 * (4 + H)
    return {"ours": layer, "ours, --recompute": 2 * D}


def shallow_bytes(build, config, layers: int) -> float:
    """Saved bytes a token of a model with that many layers."""
    # What an earlier model left would keep its addresses
    gc.collect()
    shallow = replace(config, num_hidden_layers=layers, layer_types=())
    zeros = mock.patch("torch.Tensor.normal_", lambda weight, *_, **__: weight.zero_())
    with zeros, mock.patch("torch.Tensor.backward"):
        return saved_bytes(build(shallow)) / LENGTH


def main():
    Parser(__doc__).parse_args()
    rows = []
    for name, config in ALL_CONFIGS.items():
        plain_layer = 0
        for side, build in SIDES.items():
            print(name, side, file=sys.stderr)
            # All layers but the first keep the same
            two = shallow_bytes(build, config, 2)
            layer = shallow_bytes(build, config, 3) - two
            whole = two + (config.num_hidden_layers - 2) * layer
            if side == "ours":
                plain_layer, our_whole = layer, whole
            if side == "ours, --recompute":
                whole += plain_layer
            rows.append({
                "config": name, "side": side, "layer": layer,
                "layer_on_paper": on_paper(config).get(side),
                "rest": two - 2 * layer, "all": whole, "times_ours": whole / our_whole,
            })
    # The table
    cells = []
    for row in rows:
        numbers = [row[key] for key in ("layer", "layer_on_paper", "rest", "all")]
        cells.append([row["config"], row["side"],
                      *(None if number is None else f"{number:,.0f}" for number in numbers),
                      f"{row['times_ours']:.2f}"])
    head = ["bytes a token", "", "a layer", "on paper", "rest", "in all", "times ours"]
    print(table(cells, head, right=range(2, 7)))
    settings = argparse.Namespace(tokens=LENGTH, dtype="bfloat16")
    path = write_results("memory", rows, settings, "peft")
    print(f"\nrest: all but the layers, less what the first doesn't keep; written to {path}")


if __name__ == "__main__":
    main()
