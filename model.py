"""Gemma-2 in plain PyTorch: configuration, forward pass, generation, checkpoints.

    model = load_model("google/gemma-2-2b", dtype=torch.bfloat16, device="cuda")  # or a folder
    logits = model(tokens)                                        # (B, T) -> (B, T, V)
    hidden, residuals = model.hidden(tokens, capture=(5, 10))     # {layer: (B, T, D)}
    ids = model.generate(prompts, max_new_tokens=64)

What differs from Llama (google/gemma_pytorch, gemma/model.py): norms stand before AND after
attention and MLP, and a stored w means a gain of 1 + w; embeddings are scaled by √D; the head is
the embedding; tanh softcaps bound attention scores and logits; even layers have a window.
B batch, T tokens, S keys, D hidden size, H query and K key-value heads of size hd, V vocabulary.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fused
from attention import FULL, SLIDING, attention, visible_keys
from fused import document_starts, geglu, rms_norm, rotary, rotate, softcap
from run import generation, parallel
from run.files import InputError, locate, read_json, write_json, write_tensors
from run.weights import INDEX, find_weights, read_weight


# --------------------------------------------------------------------------------------------------
# Configuration

@dataclass(frozen=True)
class Config:
    """The fields of config.json that the forward pass depends on, under Hugging Face's names."""
    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256             # not hidden_size / heads: 27b has 4608 and 32 heads of 128
    query_pre_attn_scalar: float = 256  # scores are divided by its square root; 144 in 27b
    sliding_window: int = 4096      # keys that a sliding layer sees, the query's own among them
    layer_types: tuple = ()         # SLIDING or FULL for each layer; empty: even layers slide
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple = 1

    def __post_init__(self):
        if not self.layer_types:
            pattern = (SLIDING, FULL) * self.num_hidden_layers
            object.__setattr__(self, "layer_types", pattern[:self.num_hidden_layers])

    @classmethod
    def from_dict(cls, values: dict, where="config.json") -> "Config":
        """Read the object in a config.json of transformers 4 or 5. InputError if not Gemma-2's."""
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # transformers 5
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"{where}: {rope}: Gemma-2 has the default rotary embedding")
        values = {"rope_theta": rope.get("rope_theta", 10000.0), "model_type": None} | values
        # null is the default's, but switches a softcap off
        values = {key: value for key, value in values.items()
                  if value is not None or key.endswith("softcapping") or key == "model_type"}
        for key, expected in FIXED.items():
            # Whether the head is the embedding all the same is for the weights to say
            if values.get(key, expected) != expected and key != "tie_word_embeddings":
                raise InputError(f"{where}: {key} is {values[key]!r}; Gemma-2's is {expected!r}")
        own: dict = {}
        for key in values.keys() & {field.name for field in fields(cls)}:
            value = values[key]
            if isinstance(value, str | dict):
                raise InputError(f"{where}: {key} is {value!r}, not a number")
            own[key] = tuple(value) if isinstance(value, list) else value
        config = cls(**own)
        if config.num_hidden_layers == 42 and config.query_pre_attn_scalar == 224:  # 9b, at first
            print(f"warning: {where}: using query_pre_attn_scalar 256, not 224", file=sys.stderr)
            config = replace(config, query_pre_attn_scalar=256)
        return config

    def to_dict(self) -> dict:
        """config.json as transformers 4 and 5 read it."""
        values = {"architectures": ["Gemma2ForCausalLM"]} | FIXED | asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


FIXED = {"model_type": "gemma2", "attention_bias": False, "tie_word_embeddings": True,
         "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

PRESETS = {
    "google/gemma-2-2b": Config(),
    "google/gemma-2-9b": Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                                num_attention_heads=16, num_key_value_heads=8),
    "google/gemma-2-27b": Config(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
                                 num_attention_heads=32, num_key_value_heads=16, head_dim=128,
                                 query_pre_attn_scalar=144),
}
PRESETS |= {f"{name}-it": replace(base, eos_token_id=(1, 107)) for name, base in PRESETS.items()}


def load_config(source: str | Path) -> Config:
    """The Config of a folder or hub repository."""
    path = locate(source, "config.json")
    return Config.from_dict(read_json(path), path)


class Module(NamedTuple):
    """Where a linear module of a block stands."""
    parent: str  # "self_attn" or "mlp"
    side: str    # "readers" read the residual stream, "writers" write to it
    norm: str    # the block's norm between the module and the residual stream


MODULES = {
    "q_proj": Module("self_attn", "readers", "input_layernorm"),
    "k_proj": Module("self_attn", "readers", "input_layernorm"),
    "v_proj": Module("self_attn", "readers", "input_layernorm"),
    "o_proj": Module("self_attn", "writers", "post_attention_layernorm"),
    "gate_proj": Module("mlp", "readers", "pre_feedforward_layernorm"),
    "up_proj": Module("mlp", "readers", "pre_feedforward_layernorm"),
    "down_proj": Module("mlp", "writers", "post_feedforward_layernorm"),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # what an adapter trains by default


# --------------------------------------------------------------------------------------------------
# Forward pass

class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        D, hd = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * hd, bias=False)
        self.k_proj = nn.Linear(D, K * hd, bias=False)
        self.v_proj = nn.Linear(D, K * hd, bias=False)
        self.o_proj = nn.Linear(H * hd, D, bias=False)
        self.kind, self.head_dim = kind, hd
        self.scale = config.query_pre_attn_scalar ** -0.5
        self.cap = config.attn_logit_softcapping

    def forward(self, x, rope, visible, cache=None):
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H·hd or K·hd)
        q, k, v = (rearrange(y, "b t (h hd) -> b h t hd", hd=self.head_dim) for y in projected)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v)                               # (B, K, S, hd)
        out = attention(q, k, v, visible[self.kind], self.scale, self.cap)
        return self.o_proj(rearrange(out, "b h t hd -> b t (h hd)"))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, kind), MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.pre_feedforward_layernorm = RMSNorm(config)
        self.post_feedforward_layernorm = RMSNorm(config)

    def forward(self, x, rope, visible, cache=None):
        attended = self.self_attn(self.input_layernorm(x), rope, visible, cache)
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed)


class Gemma2(nn.Module):
    """Gemma-2. Parameter names are those of a checkpoint without its leading "model."."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # Given its weight: nn.Embedding's own init takes seconds to import on the meta device
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config)
        self.recompute = False  # blocks keep only their input, and the backward runs them again

    @torch.no_grad()
    def init_weights(self, std=0.02, generator=None) -> "Gemma2":
        """For training from scratch: matrices from N(0, std²), norms to 0, which is a gain of 1."""
        for weight in self.parameters():
            if weight.dim() > 1:
                weight.normal_(0, std, generator=generator)
            else:
                weight.zero_()
        return self

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), float32, of int64 tokens (B, T). `documents` as in `hidden`."""
        return self.unembed(self.hidden(tokens, documents)[0])

    def hidden(self, tokens: Tensor, documents: Tensor | None = None,
               capture: Collection[int] = (), stop_after: int | None = None,
               caches: Sequence | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states (B, T, D), and the residual stream {layer: (B, T, D)} after `capture`.

        tokens (B, T) int64, or embeddings (B, T, D). documents (B, T): positions restart, and keys
        are seen, within runs of equal numbers; None is one run. Hidden states are past the final
        norm or, with `stop_after`, that block's output. `caches` (run/generation.py), one a layer,
        are filled.
        """
        index = torch.arange(tokens.shape[1], device=tokens.device)
        starts = document_starts(tokens, documents)                 # (B or 1, T)
        # The first key that each token sees, in layers of either kind
        lows = {FULL: starts, SLIDING: starts.maximum(index - self.config.sliding_window + 1)}
        cap = self.config.attn_logit_softcapping
        visible = {kind: visible_keys(low, cap) for kind, low in lows.items()}
        return self.run_blocks(tokens, index - starts, visible, caches, capture, stop_after)

    def run_blocks(self, tokens, positions, visible, caches=None, capture=(), stop_after=None):
        """As `hidden`, of positions (B or 1, T) and the {kind: visible keys} that it works out."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        # √D is rounded to the weights' dtype before it multiplies: to 59.75 in the 9b's bfloat16
        x = x * torch.tensor(self.config.hidden_size ** 0.5, dtype=self.embed_tokens.weight.dtype)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        rope = cos[:, None], sin[:, None]                           # each (B or 1, 1, T, hd/2)
        residuals = {}
        for layer, block in enumerate(self.layers):
            inputs = x, rope, visible, caches and caches[layer]
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
            if layer in capture:
                residuals[layer] = x
            if layer == stop_after:
                return x, residuals
        return self.norm(x), residuals

    def unembed(self, hidden: Tensor) -> Tensor:
        """Softcapped logits (…, V), float32, of hidden states (…, D) after the final norm."""
        logits = (hidden @ self.embed_tokens.weight.T).float()
        return softcap(logits, self.config.final_logit_softcapping)

    def nll_sum(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of labels (B, T) and their number, as fused.nll_sum."""
        cap = self.config.final_logit_softcapping
        return fused.nll_sum(hidden, labels, self.embed_tokens.weight, cap)

    def generate(self, prompts: Sequence[Tensor], max_new_tokens=64, temperature=0.0,
                 stop: Collection[int] = (), generator=None) -> list[Tensor]:
        """Continue int64 prompts (1-D, of any lengths) as one batch: new tokens, 1-D, on the CPU.

        temperature 0 is greedy; above, tokens are drawn from softmax(logits / temperature) with
        `generator` (torch.Generator; on CUDA one of the CPU makes each step wait). An answer ends
        before its first token in `stop`.
        """
        return generation.generate(self, prompts, max_new_tokens, temperature, stop, generator)


# --------------------------------------------------------------------------------------------------
# Checkpoints in Hugging Face's layout: config.json and model.safetensors, or shards and their index

def load_model(source: str | Path, dtype: torch.dtype | None = None, device="cpu",
               shard: Callable | None = None) -> Gemma2:
    """Load a Gemma-2 from a folder or hub repository, frozen.

    dtype None is float32 on a CPU, else bfloat16; float16 overflows. `shard` (model, device) splits
    weights over processes before they are read. InputError for what isn't a whole Gemma-2.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    with torch.device("meta"):
        model = Gemma2(load_config(source)).to(dtype).requires_grad_(False)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    places = find_weights(source, shapes, dtype)
    if shard:
        shard(model, device)
    weights = model.to_empty(device=device).state_dict()
    for name in tqdm(places, f"loading {source}", leave=False, delay=2, disable=None):
        read_weight(places[name], weights[name])
    return model


def save_model(model: Gemma2, folder: str | Path, max_shard_bytes=5 << 30):
    """Write the weights, in shards, and config.json, in all processes; fold adapters in first."""
    from huggingface_hub import split_torch_state_dict_into_shards  # takes a second to import
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    sizes = {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: parallel.whole(weights[name]) for name in names}
        parallel.on_rank_zero(write_tensors, f"{folder}/{file}", tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        parallel.on_rank_zero(write_json, f"{folder}/{INDEX}", index)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    values = model.config.to_dict() | {"torch_dtype": dtype}
    parallel.on_rank_zero(write_json, f"{folder}/config.json", values)
