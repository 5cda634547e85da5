"""Gemma-2's configuration: the fields that the forward pass depends on, the published sizes, and config.json read without trust."""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from files import InputError, locate, read_json

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
