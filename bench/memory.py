"""What a forward pass keeps for its backward: bytes a token, beside transformers + peft.

    pip install -r bench/requirements.txt
    python bench/memory.py                     # a minute on one core, 6 GB of memory

Counts the distinct storages that autograd saves between the first block and the loss, parameters left out, for a row
of 512 tokens in bfloat16 with labels on its last half and LoRA of rank 16 on q, k, v, o. Models of two and of three
layers are run: their difference is what a layer keeps, and the whole follows, since all layers keep the same (but the
first, whose input takes no gradient). With --recompute the whole has one plain layer on top, the one that the backward
is at. Sizes hang on shapes alone, so weights are zeros and no backward is run. Printed as a table and written to
bench/results/memory.json.
"""

import gc
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end, so that `select` stays Python's own

from bench import step
from run.files import write_json
from model import PRESETS
from run.files import table

CONFIGS = step.CONFIGS | {"gemma-2-2b": PRESETS["google/gemma-2-2b"]}
step.BATCH = 1


def ours(config, recompute=False):
    """A forward pass to the loss, with its graph."""
    model, (tokens, labels) = step.our_model(config, torch.bfloat16), step.data(config, "half")
    model.recompute = recompute
    return lambda: model.nll_sum(model.hidden(tokens)[0], labels)[0]


SIDES = {"ours": ours, "ours, --recompute": lambda config: ours(config, True),
         "transformers + peft": lambda config: step.theirs(config, torch.bfloat16, "half")[0]}


def saved_bytes(run):
    """Bytes of the distinct storages that `run` saves for a backward and that hold no parameter."""
    kept, weights = {}, set()

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()                                  # kept alive: no address comes twice
        return tensor

    def note(module, _):
        weights.update(p.untyped_storage().data_ptr() for p in module.parameters())
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    handle.remove()
    return sum(size for address, size in kept.items() if address not in weights)


def formula(config, b=2):
    """Our two sides worked out on paper: bytes a token of (a layer, a recomputed layer).

    Inputs of the four norms and of q, k, v (5 of width D), q, k, v and the attention's output, two of the MLP's
    width (the GELU's input, and what its output is multiplied with); in float32 a number a norm and one a head.
    """
    D, H, K, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return b * (5 * D + 2 * (H + K) * hd + 2 * config.intermediate_size) + 4 * (4 + H), b * D


def main():
    rows = []
    for name, config in CONFIGS.items():
        L, paper = config.num_hidden_layers, dict(zip(SIDES, formula(config)))
        for side, build in SIDES.items():
            sizes = []
            for layers in (2, 3):
                gc.collect()
                shallow = replace(config, num_hidden_layers=layers, layer_types=())
                with mock.patch("torch.Tensor.normal_", lambda weight, *_, **__: weight.zero_()), mock.patch("torch.Tensor.backward"):
                    sizes.append(saved_bytes(build(shallow)) / step.LENGTH)
            layer = sizes[1] - sizes[0]
            again = rows[-1]["layer"] if side == "ours, --recompute" else 0
            rows.append({"config": name, "side": side, "layer": layer, "layer_on_paper": paper.get(side),
                         "rest": sizes[0] - 2 * layer, "all": sizes[0] + (L - 2) * layer + again})
            print(name, side, file=sys.stderr)
            rows[-1]["times_ours"] = rows[-1]["all"] / next(row["all"] for row in rows if row["config"] == name)
    path = Path(__file__).parent / "results" / "memory.json"
    write_json(path, {"date": time.strftime("%Y-%m-%d"), "tokens": step.LENGTH, "dtype": "bfloat16",
                      "versions": {package: version(package) for package in ("torch", "transformers", "peft")}, "rows": rows})
    numbers = ("layer", "layer_on_paper", "rest", "all")
    cells = [[row["config"], row["side"], *(row[key] and f"{row[key]:,.0f}" for key in numbers), f"{row['times_ours']:.2f}"]
             for row in rows]
    print(table(cells, ["bytes a token", "", "a layer", "on paper", "rest", "in all", "times ours"], right=range(2, 7)))
    print(f"\nrest: all but the layers, less what the first doesn't keep; written to {path}")


if __name__ == "__main__":
    main()
