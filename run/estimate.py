"""What a run would take: parameters and memory, worked out from the model's configuration alone."""

from collections.abc import Collection
from types import SimpleNamespace

import torch

from model import MODULES, PRESETS, Config, Gemma2, load_config
from run import parallel
from run.files import InputError
from run.masters import trained_weights
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


def check_adapter(settings: SimpleNamespace, config: Config):
    """Raise InputError for a rank that the residual stream doesn't hold, or targets of no adapter.

    (Of full fine-tuning masters.trained_weights checks the targets.)
    """
    unknown = set(settings.targets or ()) - set(MODULES)
    if unknown and settings.method != "full":
        raise InputError(f"--targets {' '.join(sorted(unknown))}: known are {', '.join(MODULES)}")
    if settings.rank and settings.rank > config.hidden_size:
        raise InputError(f"--rank {settings.rank}: the residual stream of {settings.model} has "
                         f"{config.hidden_size} dimensions; give 1 to {config.hidden_size}")


def size_rows(settings: SimpleNamespace, config: Config, targets: Collection[str]
              ) -> list[list[str]]:
    """Rows [what, size] of a table: parameters, those that are trained, and memory by its use.

    targets: the modules that are trained; empty for all weights.
    """
    with torch.device("meta"):
        model = Gemma2(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = [weight for _, weight in trained_weights(model, targets)]
    num_trained = sum(weight.numel() for weight in weights)
    if settings.method == "lora":
        num_trained = sum(settings.rank * sum(weight.shape) for weight in weights)
    at_most = ", at most" if settings.freeze_basis else ""
    itemsize = getattr(torch, settings.dtype).itemsize
    memory = {"weights": itemsize * parameters_held(settings, config, num_parameters)}
    memory |= trained_bytes(settings, config, num_trained, itemsize)
    memory["activations of a row, about"] = activation_bytes(settings, config)
    memory["in all, about"] = sum(memory.values())
    return [["parameters", f"{num_parameters:,}"],
            [f"trainable{at_most}", f"{num_trained:,} ({num_trained / num_parameters:.4%})"],
            *([f"memory: {name}", f"{size / 1e6:,.0f} MB"] for name, size in memory.items())]


def parameters_held(settings, config, num_parameters):
    """Parameters that one process holds. With --shard its share, the embedding, and two blocks."""
    if not settings.shard:
        return num_parameters
    embedding = config.vocab_size * config.hidden_size
    in_blocks = num_parameters - embedding
    held = embedding + in_blocks / parallel.world_size() + 2 * in_blocks / config.num_hidden_layers
    if settings.method == "full":               # its share of the embedding, and all of it gathered
        held += embedding / parallel.world_size()
    return held


def trained_bytes(settings, config, num_trained, itemsize):
    """{what: bytes} that the trained numbers take beside the weights."""
    if settings.method == "lora":
        return {"adapter, gradient, AdamW": 16 * num_trained}
    share = num_trained / (parallel.world_size() if settings.shard else 1)
    # Of float32 weights AdamW needs no copy. The embedding's gradient is made twice, as the head's
    # and as the input's, before it is added up
    copies = {"float32 copies of the weights": 4 * share} if itemsize < 4 else {}
    embedding = 2 * itemsize * config.vocab_size * config.hidden_size
    if settings.shard:                          # and summed over the processes in float32
        embedding += 4 * config.vocab_size * config.hidden_size
    return copies | {"float32 gradients": 4 * share, "AdamW's two moments": 8 * share,
                     "the embedding's gradients": embedding}


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
    if settings.method == "full":               # and the inputs of gate and up, and of down
        block += itemsize * (D + config.intermediate_size)
    if settings.recompute:                      # each block's input alone, and one block whole
        return T * (L * itemsize * D + block)
    return T * L * block
