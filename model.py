"""Gemma-2 in plain PyTorch: forward pass, generation, checkpoints. (Its configuration: config.py.)

    model = load_model("google/gemma-2-2b", dtype=torch.bfloat16, device="cuda")      # or a folder
    logits = model(tokens)                                                              # (B, T) -> (B, T, V)
    hidden, residuals = model.hidden(tokens, capture=(5, 10))                           # {layer: (B, T, D)}
    ids = model.generate(prompts, max_new_tokens=64)

Letters in shape comments: B batch, T tokens, S keys, D hidden size, H query heads, K key-value heads, G = H/K,
hd head size, V vocabulary. What differs from Llama, with the file of google/gemma_pytorch or of transformers that
says so: norms before AND after attention and MLP, weights stored as w and used as 1 + w; embeddings scaled by √D;
tanh softcaps on attention scores (50) and logits (30); even layers see a window of 4096 tokens; the head is the
embedding (gemma/model.py, gemma/config.py; models/gemma2/modeling_gemma2.py).

Gemma-2's configuration: the fields that the forward pass depends on, the published sizes, and config.json read without trust."""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from run.files import InputError, locate, read_json
from collections.abc import Collection, Sequence
from typing import NamedTuple, Self
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from run import parallel
import fused
from fused import attention, document_starts, geglu, rms_norm, rotary, rotate, softcap, visible_keys
from run.files import is_file_name, read_into, tensor_shapes, verify, write_json, write_tensors

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Config:
    """The fields of a Gemma-2 config.json that the forward pass depends on, under their Hugging Face names."""
    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256                    # not hidden_size / heads: 27b has 4608 and 32 heads of 128
    query_pre_attn_scalar: float = 256     # scores are divided by its square root; 144 in 27b, where head_dim is 128
    sliding_window: int = 4096             # keys seen by a local layer, the query's own among them
    layer_types: tuple = ()                # SLIDING or FULL for each layer; empty: even layers slide
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
            kinds = tuple(SLIDING if layer % 2 == 0 else FULL for layer in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", kinds)

    @classmethod
    def preset(cls, name: str) -> "Config":
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, values: dict, where="config.json") -> "Config":
        """Read a config.json's object, in the older form or in that of transformers 5. Raises InputError."""
        values = dict(values)
        rope = next((values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None), {})
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"{where}: rope_parameters {rope!r}: only the default rotary embedding is Gemma-2's")
        values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        fixed = {"model_type": "gemma2", "tie_word_embeddings": True, "attention_bias": False,
                 "use_bidirectional_attention": False, "hidden_act": "gelu_pytorch_tanh",
                 "hidden_activation": "gelu_pytorch_tanh"}
        for key, wanted in fixed.items():
            if values.get(key, wanted) not in (wanted, None):
                raise InputError(f"{where}: {key} is {values[key]!r}, where Gemma-2 has {wanted!r}")
        if "model_type" not in values:
            raise InputError(f"{where} has no model_type: not a Hugging Face configuration")
        config = {field.name: _checked(field.name, values[field.name], where)
                  for field in fields(cls) if field.name in values}
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim"):
            if key not in config:
                raise InputError(f"{where} has no {key}")
        config = cls(**config)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise InputError(f"{where}: {config.num_attention_heads} heads over {config.num_key_value_heads} key-value "
                             f"heads of size {config.head_dim}: heads must divide, the size must be even")
        if len(config.layer_types) != config.num_hidden_layers:
            raise InputError(f"{where}: {len(config.layer_types)} layer_types for {config.num_hidden_layers} layers")
        if (config.hidden_size, config.num_hidden_layers, config.query_pre_attn_scalar) == (3584, 42, 224):
            print(f"warning: {where} says query_pre_attn_scalar 224, first published for the 9b by mistake: using 256",
                  file=sys.stderr)
            config = cls(**asdict(config) | {"query_pre_attn_scalar": 256})
        return config

    def to_dict(self) -> dict:
        """config.json as transformers 4 and 5 read it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0,
                "tie_word_embeddings": True} | values


def _checked(key, value, where):
    def number(kind, low, high):
        return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    if key == "layer_types":
        good = value is None or isinstance(value, list) and len(value) <= 256 and set(map(str, value)) <= {SLIDING, FULL}
        value = tuple(value or ()) if good else value
    elif key == "eos_token_id":
        ids = value if isinstance(value, list) else [value]
        good = bool(ids) and all(isinstance(i, int) and 0 <= i < 1 << 24 for i in ids)
        value = tuple(ids) if isinstance(value, list) and good else value
    elif key.endswith("token_id"):
        good = number(int, 0, 1 << 24)
    elif key.endswith("softcapping"):
        good = value is None or number((int, float), 1e-3, 1e9)
    elif key in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar"):
        good = number((int, float), 0 if key == "rms_norm_eps" else 1e-3, 1e12)
    else:
        good = number(int, 1, 128 if key == "num_hidden_layers" else 1 << 24)
    if not good:
        raise InputError(f"{where}: {key} is {value!r}, which no Gemma-2 has")
    return value


class Module(NamedTuple):
    """A linear module of a block: its parent, which side of the residual stream it is on, and the norm in between."""
    parent: str    # "self_attn" or "mlp"
    side: str      # "readers" read the residual stream, "writers" write to it
    norm: str      # name of the block's norm between the module and the residual stream


MODULES = {
    "q_proj": Module("self_attn", "readers", "input_layernorm"),
    "k_proj": Module("self_attn", "readers", "input_layernorm"),
    "v_proj": Module("self_attn", "readers", "input_layernorm"),
    "o_proj": Module("self_attn", "writers", "post_attention_layernorm"),
    "gate_proj": Module("mlp", "readers", "pre_feedforward_layernorm"),
    "up_proj": Module("mlp", "readers", "pre_feedforward_layernorm"),
    "down_proj": Module("mlp", "writers", "post_feedforward_layernorm"),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")   # what an adapter trains unless told otherwise

PRESETS = {
    "google/gemma-2-2b": Config(),
    "google/gemma-2-9b": Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                                num_attention_heads=16, num_key_value_heads=8),
    "google/gemma-2-27b": Config(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, head_dim=128,
                                 num_attention_heads=32, num_key_value_heads=16, query_pre_attn_scalar=144),
}
PRESETS |= {f"{name}-it": Config(**asdict(config) | {"eos_token_id": (1, 107)}) for name, config in PRESETS.items()}


def load_config(source: str | Path) -> Config:
    """The Config of a folder or hub repository. Raises InputError."""
    path = locate(source, "config.json")
    return Config.from_dict(read_json(path), path)


# ---------------------------------------------------------------------------------------------------------------
# Forward pass

class RMSNorm(nn.Module):
    """x / rms(x) · (1 + w). All of it in float32, the product too, and cast last (gemma_pytorch, RMSNorm)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        D, H, K, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * hd, bias=False)
        self.k_proj = nn.Linear(D, K * hd, bias=False)
        self.v_proj = nn.Linear(D, K * hd, bias=False)
        self.o_proj = nn.Linear(H * hd, D, bias=False)
        self.head_dim, self.kind, self.cap = hd, kind, config.attn_logit_softcapping
        self.scale = config.query_pre_attn_scalar ** -0.5

    def forward(self, x, rope, seen, cache=None):
        q, k, v = (rearrange(proj(x), "b t (h hd) -> b h t hd", hd=self.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v)
        out = attention(q, k, v, seen[self.kind], self.scale, self.cap)
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
    """x += post_attention_norm(attention(input_norm(x))); x += post_mlp_norm(mlp(pre_mlp_norm(x)))."""

    def __init__(self, config, kind):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, kind), MLP(config)
        self.input_layernorm, self.post_attention_layernorm, self.pre_feedforward_layernorm, \
            self.post_feedforward_layernorm = (RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(4))

    def forward(self, x, rope, seen, cache=None):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, seen, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(nn.Module):
    """Gemma-2. Parameter names are a checkpoint's without its leading "model."."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False             # blocks keep their input alone, and the backward runs each of them again

    def init_weights(self, std=0.02, generator: torch.Generator | None = None) -> Self:
        """Matrices and embedding from N(0, std²); norms to 0, where their gain 1 + w is one. For training from scratch."""
        with torch.no_grad():
            for weight in self.parameters():
                weight.normal_(0, std, generator=generator) if weight.dim() > 1 else weight.zero_()
        return self

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), float32, of int64 tokens (B, T). `documents` as in `hidden`."""
        return self.unembed(self.hidden(tokens, documents)[0])

    def hidden(self, tokens: Tensor, documents: Tensor | None = None, capture: Collection[int] = (), stop_after: int | None = None,
               caches=None) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states (B, T, D) and the residual stream {layer: (B, T, D)} after each block of `capture`.

        documents (B, T) int64: tokens see only keys of their own document, a run of equal numbers, and positions
        restart with it; None is one document a row. The hidden state is the one after the final norm or, with
        `stop_after`, the residual stream after that block, the last that is computed. `caches` are filled for generation.
        """
        index = torch.arange(tokens.shape[1], device=tokens.device)
        starts = document_starts(tokens, documents)                                  # (B or 1, T)
        lows = {FULL: starts, SLIDING: starts.maximum(index - self.config.sliding_window + 1)}
        seen = {kind: visible_keys(low, self.config.attn_logit_softcapping) for kind, low in lows.items()}
        return self._blocks(tokens, index - starts, seen, caches, capture, stop_after)

    def _blocks(self, tokens, positions, seen, caches=None, capture=(), stop_after=None):
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        rope = cos[:, None], sin[:, None]                                            # (B or 1, 1, T, hd/2)
        # √D is rounded to the weights' dtype before it multiplies: 59.75 for 59.87 in the 9b's bf16
        scale = torch.tensor(self.config.hidden_size ** 0.5, dtype=self.embed_tokens.weight.dtype)
        x, residuals = (tokens if tokens.is_floating_point() else self.embed_tokens(tokens)) * scale, {}  # or embeddings (B, T, D)
        for layer, block in enumerate(self.layers):
            inputs = x, rope, seen, caches and caches[layer]
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False) if again else block(*inputs)
            if layer in capture:
                residuals[layer] = x
            if layer == stop_after:
                return x, residuals
        return self.norm(x), residuals

    def unembed(self, hidden: Tensor) -> Tensor:
        """Softcapped logits (…, V), float32, of hidden states (…, D) after the final norm."""
        return softcap((hidden @ self.embed_tokens.weight.T).float(), self.config.final_logit_softcapping)

    def nll_sum(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of `labels` (B, T), and their count: fused.nll_sum with this model's head."""
        return fused.nll_sum(hidden, labels, self.embed_tokens.weight, self.config.final_logit_softcapping)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tensor], max_new_tokens=64, temperature=0.0, stop: Collection[int] = (),
                 generator: torch.Generator | None = None) -> list[Tensor]:
        """Continue int64 prompts (1-D, of any lengths) as one batch; a list of 1-D tensors of new tokens, on the CPU.

        temperature 0 is greedy; above, tokens are drawn from softmax(logits / temperature) with `generator`. A row ends
        before its first token in `stop`. Prompts are padded on the left, and pads are a document of their own.
        """
        device, B, P = self.embed_tokens.weight.device, len(prompts), max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise InputError("a prompt to generate from has no token: begin it with BOS")
        tokens = torch.full((B, P), self.config.pad_token_id, device=device)
        for row, prompt in zip(tokens, prompts):
            row[P - len(prompt):] = torch.as_tensor(prompt)
        start = P - torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,) index of the first real token
        documents = (torch.arange(P, device=device) >= start[:, None]).long()
        caches = [Cache(self.config, kind, B, P + max_new_tokens, self.embed_tokens.weight)
                  for kind in self.config.layer_types]
        stop = torch.tensor(sorted(stop), device=device, dtype=torch.long)
        out = torch.full((B, max_new_tokens), -1, device=device)
        rows, going = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
        x, _ = self.hidden(tokens, documents, caches=caches)
        for length in range(P, P + max_new_tokens):
            new = self._next(x[:, -1], temperature, generator)                       # (rows,)
            going &= ~torch.isin(new, stop)
            out[rows, length - P] = torch.where(going, new, -1)
            left = int(going.sum())
            if not left or length == P + max_new_tokens - 1:
                break
            if 4 * left <= 3 * len(rows):                                            # each drop copies the caches: drop
                rows, new, start = rows[going], new[going], start[going]             # finished rows by quarters
                for cache in caches:
                    cache.keep(going)
                going = going[going]
            seen = {kind: cache.visible(length, start)
                    for kind, cache in dict(zip(self.config.layer_types, caches)).items()}
            x, _ = self._blocks(new[:, None], (length - start)[:, None], seen, caches)
        return [row[row >= 0] for row in out.cpu()]

    def _next(self, hidden, temperature, generator):
        """Tokens (B,) that follow hidden states (B, D)."""
        if temperature > 0:
            return torch.multinomial((self.unembed(hidden) / temperature).softmax(-1), 1, generator=generator)[:, 0]
        return (hidden @ self.embed_tokens.weight.T).float().argmax(-1)              # the softcap keeps the order


class Cache:
    """Keys and values of one layer in one tensor (2, B, K, S, hd): a ring in which token `index` has slot index mod S.

    S is the whole length on a full layer and at most the window on a sliding one. A step attends to all of S: bmm
    copies what isn't contiguous, so the filled part alone would cost more.
    """

    def __init__(self, config, kind, batch, length, like):
        slots = min(length, config.sliding_window) if kind == SLIDING else length
        self.pairs = like.new_zeros(2, batch, config.num_key_value_heads, slots, config.head_dim)  # weight 0 · NaN is NaN
        self.length = 0                                                              # tokens seen

    def update(self, k, v):
        """Store keys and values (B, K, T, hd) of the next T tokens; the ones that these tokens attend to.

        At first any number of tokens, which attend to themselves; then one at a time.
        """
        slots, first, T = self.pairs.shape[3], self.length == 0, k.shape[2]
        slot = torch.arange(max(0, T - slots), T) % slots if first else slice(self.length % slots, self.length % slots + 1)
        self.length += T
        self.pairs[0, :, :, slot], self.pairs[1, :, :, slot] = k[:, :, -slots:], v[:, :, -slots:]
        return (k, v) if first else self.pairs.unbind()

    def visible(self, index, start):
        """Mask (B, 1, 1, S) of the slots that token `index` sees, itself stored: those from its row's `start` on."""
        slots = self.pairs.shape[3]
        held = index - (index - torch.arange(slots, device=start.device)) % slots   # index of the token in each slot,
        return (held >= start[:, None])[:, None, None]                              # negative where there is none yet

    def keep(self, rows):
        """Drop all rows of the batch but those of the bool mask `rows` (B,)."""
        self.pairs = self.pairs[:, rows]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints, in Hugging Face's layout: config.json and model.safetensors, or its shards and their index

INDEX = "model.safetensors.index.json"


def load_model(source: str | Path, dtype: torch.dtype | None = None, device="cpu", shard=False) -> Gemma2:
    """Load a Gemma-2 from a folder or a hub repository, frozen, in bfloat16 or float32 (default: float32 on a CPU).

    Weights are read by blocks of rows and cast on the way, so a float32 checkpoint needs little more memory than the
    bfloat16 model it becomes. With `shard`, each process of torchrun reads and holds its own rows of the blocks' weights
    (parallel.shard). Raises InputError for a configuration that isn't Gemma-2's, for a missing, extra or
    misshapen tensor, a damaged file, a repository that can't be had, and for float16.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"dtype {dtype}: Gemma-2's residual stream outgrows float16's 65504; use bfloat16 or float32")
    config = load_config(source)
    files = weight_files(source)
    shapes = {name: shape for file, names in files.items() for name, shape in names.items()}
    with torch.device("meta"):
        model = Gemma2(config).to(dtype)
    wanted = {f"model.{name}": tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if shapes.get(name) != wanted.get(name):
            problem = ("is missing" if name not in shapes else "is not one of Gemma-2's" if name not in wanted else
                       f"has shape {shapes[name]}, where config.json asks for {wanted[name]}")
            raise InputError(f"{source}: tensor {name} {problem}")
    model.requires_grad_(False)
    if shard and parallel.world_size() > 1:
        parallel.shard(model, device)
    model.to_empty(device=device)
    weights = model.state_dict()
    progress = tqdm(total=sum(parallel.own_rows(weight)[0].numel() for weight in weights.values()), desc=f"loading {source}", delay=2,
                    unit="", unit_scale=True, leave=False, disable=None)
    for file, names in files.items():
        if parallel.rank() == 0:                                 # of many processes, one reads all of it
            verify(file)
        places = {name: parallel.own_rows(weights[name.removeprefix("model.")]) for name in names}
        for count in read_into(file, places):
            progress.update(count)
    progress.close()
    return model


def weight_files(source: str | Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """{path: {tensor name: shape}} of a checkpoint's files."""
    index = locate(source, INDEX, optional=True)
    if index is None:
        file = locate(source, "model.safetensors")
        return {file: tensor_shapes(file)}
    owner = read_json(index).get("weight_map")
    if not isinstance(owner, dict) or not owner or not all(map(is_file_name, owner.values())):
        raise InputError(f"{index}: weight_map must give a plain file name for each tensor")
    shards, files = {}, {}
    for name, shard in owner.items():
        shards.setdefault(shard, set()).add(name)
    for shard, expected in sorted(shards.items()):
        path = locate(source, shard)
        files[path] = tensor_shapes(path)
        if files[path].keys() != expected:
            odd = sorted(files[path].keys() ^ expected)[0]
            raise InputError(f"{path}: tensor {odd} stands only {'in the file' if odd in files[path] else 'in the index'}")
    return files


def save_model(model: Gemma2, folder: str | Path, max_shard_bytes=5 << 30) -> None:
    """Write config.json and the weights, in shards of at most `max_shard_bytes`, as transformers opens them.

    Adapters must have been merged (lora.py): only a plain Gemma-2's tensors have a place in a checkpoint.
    """
    shards, size = [{}], 0
    for name, weight in model.state_dict().items():
        if shards[-1] and size + weight.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][f"model.{name}"] = weight
        size += weight.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards):
        write_tensors(f"{folder}/{name}", tensors)
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in model.state_dict().values())
        owner = {tensor: name for name, tensors in zip(names, shards) for tensor in tensors}
        write_json(f"{folder}/{INDEX}", {"metadata": {"total_size": total}, "weight_map": owner})
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_json(f"{folder}/config.json", model.config.to_dict() | {"torch_dtype": dtype})
