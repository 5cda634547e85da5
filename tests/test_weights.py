"""run/weights.py against transformers: names, heads, buffers and shards as writers have them.

Each case is a checkpoint of ours, changed in a line or two as its writer would have it.
"""

import json

import pytest
import torch
from conftest import random_gemma
from safetensors.torch import load_file, save_file

from model import Config, load_model, save_model
from run.files import InputError, read_json, write_json

TOKENS = torch.randint(5, 300, (2, 30), generator=torch.Generator().manual_seed(1))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_model(random_gemma(num_hidden_layers=2), folder)
    return load_file(folder / "model.safetensors"), read_json(folder / "config.json")


def write(folder, tensors, config, shards=1):
    """Write a checkpoint in `shards` files; more than one have an index."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in files if files[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def assert_as_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert (load_model(folder)(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_head(tensors):
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def head_alone(tensors):
    """As safetensors' own save_model and FSDP savers leave one of two names for one tensor."""
    tensors = with_head(tensors)
    del tensors[EMBEDDING]
    return tensors


def with_frequencies(tensors):
    frequencies = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    names = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    return tensors | {name: frequencies.clone() for name in names}


def with_value_head(tensors):
    return tensors | {"v_head.summary.weight": torch.ones(1, 64), "score.weight": torch.ones(2, 64)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("change, config", [
    (with_head, {}), (with_head, {"tie_word_embeddings": False}), (head_alone, {}),
    (without_prefix, {"architectures": ["Gemma2Model"]}),
    (lambda t: without_prefix(with_head(t)), {"tie_word_embeddings": False}),
    (with_frequencies, {"pad_token_id": None}), (with_value_head, {})])
def test_what_transformers_loads_gives_the_same_logits(plain, tmp_path, change, config, shards):
    tensors, values = plain
    write(tmp_path, change(tensors), values | config, shards)
    assert_as_transformers(tmp_path)


def test_a_single_file_wins_over_an_index(plain, tmp_path):
    """Whether the old shards are there or gone. A shard that is needed and gone is named."""
    tensors, config = plain
    old = {name: 2 * tensor for name, tensor in tensors.items()}
    write(tmp_path, old, config, shards=2)
    write(tmp_path, tensors, config)
    assert_as_transformers(tmp_path)
    (tmp_path / "model-0.safetensors").unlink()
    assert_as_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no file model-0.safetensors"):
        load_model(tmp_path)


def test_what_no_part_of_the_model_asks_for_is_told(plain, tmp_path, capsys):
    tensors, config = plain
    write(tmp_path, with_value_head(tensors), config)
    load_model(tmp_path)
    assert "left out, as it is no part of Gemma-2: score.weight, v_head" in capsys.readouterr().err


@pytest.mark.parametrize("change, config, message", [
    (lambda t: with_head(t) | {HEAD: t[EMBEDDING] + 1e-3}, {}, "untied head: lm_head"),
    (lambda t: with_head(t) | {HEAD: t[EMBEDDING][:-1].clone()}, {}, "untied head"),
    (lambda t: t, {"tie_word_embeddings": False}, "untied head.* no lm_head"),
    (head_alone, {"tie_word_embeddings": False}, "embed_tokens.weight has shape None"),
    (lambda t: {f"_orig_mod.{name}": tensor for name, tensor in t.items()}, {},
     "embed_tokens.weight has shape None.*; it has _orig_mod.model"),
    (lambda t: t | {"model.layers.0.mlp.up_proj.bias": torch.ones(96)}, {}, "up_proj.bias"),
    (lambda t: t, {"num_hidden_layers": 1, "layer_types": []}, r"layers.1.\S+ has shape"),
    (lambda t: t | {EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}, {}, "dtype F8_E4M3"),
])
def test_what_would_compute_something_else_is_refused(plain, tmp_path, change, config, message):
    tensors, values = plain
    write(tmp_path, change(tensors), values | config)
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": ["b"]}, {"a": "../evil.safetensors"}])
def test_an_index_names_plain_files(plain, tmp_path, weight_map):
    write(tmp_path, plain[0], plain[1], shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="plain file name"):
        load_model(tmp_path)


def test_pickled_weights_are_named(plain, tmp_path):
    write_json(tmp_path / "config.json", plain[1])
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no file model.safetensors; its .bin is a pickle"):
        load_model(tmp_path)


def test_null_in_a_config_is_the_default():
    config = random_gemma().config
    values = config.to_dict() | {"pad_token_id": None, "final_logit_softcapping": None}
    assert Config.from_dict(values).pad_token_id == 0
    assert Config.from_dict(values).final_logit_softcapping is None
