"""What a run would take: parameters and memory, worked out from the model's configuration alone."""

from collections.abc import Collection
from types import SimpleNamespace

import torch

from model import PRESETS, Config, Gemma2, load_config
from run import parallel
from run.settings import model_folder

LARGE = 4000    # hidden size: the 9b has 3584, the 27b 4608


def derive_recompute(settings: SimpleNamespace, source: dict[str, str]):
    """Where --recompute wasn't given: on for a large model under --shard, so that 27b fits 40 GB.

    A row of 2,048 tokens keeps 21 GB there, beside 18 GB of weights on each of four cards.
    """
    if settings.recompute is None:
        config = PRESETS.get(settings.model) or load_config(model_folder(settings.model))
        settings.recompute = settings.shard and config.hidden_size > LARGE
        source["recompute"] = "the model's size"


def size_rows(settings: SimpleNamespace, config: Config, targets: Collection[str]
              ) -> list[list[str]]:
    """Rows [what, size] of a table: parameters, those that are trained, and memory."""
    with torch.device("meta"):
        model = Gemma2(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    shapes = [layer.weight.shape for name, layer in model.named_modules()
              if name.endswith(tuple(targets))]
    num_trained = sum(settings.rank * (rows + columns) for rows, columns in shapes)
    at_most = ", at most" if settings.freeze_basis else ""
    num_held = parameters_held(settings, config, num_parameters)
    itemsize = getattr(torch, settings.dtype).itemsize
    memory = {"weights": itemsize * num_held, "adapter, gradient, AdamW": 16 * num_trained,
              "activations of a row, about": activation_bytes(settings, config)}
    return [["parameters", f"{num_parameters:,}"],
            [f"trainable{at_most}", f"{num_trained:,} ({num_trained / num_parameters:.4%})"],
            *([f"memory: {name}", f"{size / 1e6:,.0f} MB"] for name, size in memory.items())]


def parameters_held(settings, config, num_parameters):
    """Parameters that one process holds; with --shard its share of the blocks, and two blocks."""
    if not settings.shard:
        return num_parameters
    in_blocks = num_parameters - config.vocab_size * config.hidden_size
    whole = num_parameters - in_blocks
    return whole + in_blocks / parallel.world_size() + 2 * in_blocks / config.num_hidden_layers


def activation_bytes(settings, config):
    """Bytes that one row keeps for its backward; `python -m bench.memory` measures the same."""
    D = config.hidden_size
    T = settings.batch_tokens
    L = config.num_hidden_layers
    H = config.num_attention_heads
    K = config.num_key_value_heads
    itemsize = getattr(torch, settings.dtype).itemsize
    # Of a block: the inputs of four norms and of q, k, v; q, k, v and attention's output; two of
    # the MLP's width; a float32 number for each norm and head
    block = itemsize * (5 * D + 2 * (H + K) * config.head_dim + 2 * config.intermediate_size)
    block += 4 * (4 + H)
    if settings.recompute:                      # each block's input alone, and one block whole
        return T * (L * itemsize * D + block)
    return T * L * block
