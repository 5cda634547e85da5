"""model.py against transformers, on random models whose sequences outgrow the window and whose softcaps bite."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHAPES, random_gemma, transformers_twin

from fused import attend, softcap
from run.files import InputError, write_json, write_tensors
from lora import add_lora
from model import PRESETS, Config
from model import Cache, Gemma2, RMSNorm, load_model, save_model


def tokens_of(count, length, seed=1):
    return torch.randint(5, 300, (count, length), generator=torch.Generator().manual_seed(seed))


def error(ours, theirs):
    """Largest difference over largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape):
    model = random_gemma(shape)
    twin, tokens = transformers_twin(model), tokens_of(3, 60)
    ours, theirs = model(tokens), twin(tokens).logits
    # Both are 2e-5 from the same in float64: sharp attention in four layers amplifies roundings, of which gelu's differ
    assert ours.dtype == torch.float32 and error(ours, theirs) < 3e-5
    assert theirs.abs().max() > 15                                     # tanh(15/30) is 8 % under 15/30: the cap bites


def test_both_softcaps_bite():
    model, tokens = random_gemma(), tokens_of(2, 60)
    logits = model(tokens)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        other = Gemma2(Config(**vars(model.config) | {cap: None}))
        other.load_state_dict(model.state_dict())
        assert error(other(tokens), logits) > 1e-2, f"{cap} makes no difference to this test's model"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_transformers(side):
    model, tokens, pads = random_gemma(), tokens_of(3, 60), (0, 7, 31)
    twin, mask = transformers_twin(model), torch.ones(3, 60, dtype=torch.long)
    for row, pad in zip(mask, pads):
        row[slice(0, pad) if side == "left" else slice(60 - pad, 60)] = 0
    ours = model(tokens, documents=mask)
    theirs = twin(tokens, attention_mask=mask).logits
    # Their positions count the pads on the left, ours don't: other roundings of the same rotation
    assert error(ours[mask == 1], theirs[mask == 1]) < (1e-5 if side == "right" else 1e-4)


def test_documents_of_a_row_are_alone():
    model, lengths = random_gemma(), (30, 1, 22, 7)
    parts = [tokens_of(1, length, seed=length) for length in lengths]
    documents = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(lengths))[None]
    packed = model(torch.cat(parts, 1), documents)
    alone = torch.cat([model(part) for part in parts], 1)
    assert error(packed, alone) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_generation_equals_transformers(shape):
    model = random_gemma(shape)
    twin, prompts = transformers_twin(model), [tokens_of(1, n, seed=n)[0] for n in (1, 5, 17, 40)]
    ours = model.generate(prompts, max_new_tokens=80)                  # 80 is 64 past the window of 16
    for prompt, row in zip(prompts, ours):
        theirs = twin.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=80, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
        assert row.tolist() == theirs[0, len(prompt):].tolist()


@pytest.mark.parametrize("count", [3, 9])
def test_rows_stop_alone_and_drop_out(count, monkeypatch):
    """Whatever row ends first, and whether or not enough have ended for the cache to drop them."""
    model, prompts = random_gemma(), [tokens_of(1, n, seed=n)[0] for n in range(3, 3 + 2 * count, 2)]
    whole, kept = model.generate(prompts, max_new_tokens=40), []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda cache, rows: (kept.append(int(rows.sum())), keep(cache, rows)))
    for first in range(0, count, 2):
        stops = {row[at].item() for row, at in zip(whole[first:], (10, 20, 25))}
        for row, full in zip(model.generate(prompts, max_new_tokens=40, stop=stops), whole):
            ids = full.tolist()
            assert row.tolist() == ids[:next((at for at, token in enumerate(ids) if token in stops), 40)]
    assert kept and max(kept) <= 3 * count / 4


def test_greedy_takes_the_largest_capped_logit():
    model, prompt = random_gemma(), tokens_of(1, 12)[0]
    assert model.generate([prompt], max_new_tokens=1)[0].item() == model(prompt[None])[0, -1].argmax()


def test_empty_slots_of_the_cache_are_not_seen():
    """A slot holds a token only once it was stored; until the ring is full, and after that the last of each slot."""
    model = random_gemma()
    cache, start = Cache(model.config, model.config.layer_types[0], 2, 100, model.embed_tokens.weight), torch.tensor([0, 4])
    assert cache.visible(6, start)[:, 0, 0].tolist() == [[slot <= 6 for slot in range(16)], [4 <= slot <= 6 for slot in range(16)]]
    assert cache.visible(17, start)[:, 0, 0].tolist() == [[True] * 16, [slot < 2 or slot > 3 for slot in range(16)]]


def test_sampling_follows_the_distribution():
    model, prompt = random_gemma(std=0.1), tokens_of(1, 12)[0]
    wanted = (model(prompt[None])[0, -1] / 2).softmax(-1)
    draws = model.generate([prompt] * 4000, max_new_tokens=1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    seen = torch.stack(draws).flatten().bincount(minlength=300) / 4000
    assert (seen - wanted).abs().sum() < 0.3 and wanted.max() < 0.5   # total variation of 4,000 draws over 300 words: about .2
    again = model.generate([prompt] * 4000, max_new_tokens=1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(draws), torch.stack(again))


def test_cache_is_bounded_by_the_window():
    model = random_gemma()
    caches = [Cache(model.config, kind, 2, 100, model.embed_tokens.weight) for kind in model.config.layer_types]
    assert [cache.pairs.shape[3] for cache in caches] == [16, 100, 16, 100]


def test_captured_residuals_and_early_stop():
    model, tokens = random_gemma(), tokens_of(2, 40)
    theirs = transformers_twin(model)(tokens, output_hidden_states=True).hidden_states
    hidden, residuals = model.hidden(tokens, capture=(0, 2, 3))
    assert error(hidden, theirs[-1]) < 1e-5                            # theirs ends with the final norm's output
    for layer in (0, 2):
        assert error(residuals[layer], theirs[layer + 1]) < 1e-5
    assert error(model.norm(residuals[3]), hidden) < 1e-6
    calls = []
    for number, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    stopped, residuals = model.hidden(tokens, capture=(0, 2), stop_after=2)
    assert calls == [0, 1, 2] and torch.equal(stopped, residuals[2])


def test_bfloat16_is_no_further_from_float32_than_transformers():
    ours = theirs = 0.0
    for seed in range(20):
        model, tokens = random_gemma(seed=seed, std=0.2), tokens_of(2, 60, seed)
        rounded = Gemma2(model.config).requires_grad_(False)
        rounded.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})    # back in float32: the truth
        truth = rounded(tokens)
        twin = transformers_twin(rounded, torch.bfloat16)
        ours += (rounded.to(torch.bfloat16)(tokens) - truth).norm().item() / 20
        theirs += (twin(tokens).logits.float() - truth).norm().item() / 20
    assert ours <= 1.1 * theirs


def test_embedding_scale_is_rounded_first():
    nine = torch.tensor(3584 ** 0.5, dtype=torch.bfloat16)
    assert nine.item() == 59.75
    model = random_gemma((4, 2, 16, 56, 16)).to(torch.bfloat16)
    tokens = tokens_of(1, 4)
    model.layers[0].forward = lambda x, *_: x
    wanted = model.embed_tokens.weight[tokens] * torch.tensor(56 ** 0.5, dtype=torch.bfloat16)
    assert torch.equal(model.hidden(tokens, stop_after=0)[0], wanted)


def test_attention_by_hand():
    """Two keys with scores s = 4 and 0 before the cap of 2: weights are a softmax over 2·tanh(2) and 0."""
    q, k, v = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    out = attend(q, k, v, torch.ones(1, 1, 1, 2, dtype=torch.bool), 1.0, 2.0)
    high = (2 * torch.tensor(2.0).tanh()).exp()
    assert torch.allclose(out.flatten(), torch.tensor([high / (high + 1), 1 / (high + 1)]))
    assert softcap(torch.tensor(1e9), 30.0) == 30 and softcap(torch.tensor(7.0), None) == 7


@pytest.mark.parametrize("name, count, adapter", [("2b", 2_614_341_888, 6_389_760), ("9b", 9_241_705_984, 17_891_328),
                                                  ("27b", 27_227_128_320, 22_609_920)])
def test_parameter_counts(name, count, adapter):
    for suffix in ("", "-it"):
        with torch.device("meta"):
            model = Gemma2(Config.preset(f"google/gemma-2-{name}{suffix}"))
            assert sum(p.numel() for p in model.parameters()) == count
    targets = [m.weight.shape for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
    assert sum(16 * (out + inner) for out, inner in targets) == adapter


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints

def test_checkpoints_go_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = random_gemma((6, 2, 16, 72, 24)), tokens_of(2, 40)
    save_model(model, tmp_path / "ours", max_shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    twin = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert error(model(tokens), twin(tokens).logits.detach()) < 1e-5
    for size, folder in (("5GB", "one"), ("100KB", "sharded")):
        twin.save_pretrained(tmp_path / folder, max_shard_size=size)    # writes config.json in the form of transformers 5
        again = load_model(tmp_path / folder)
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()


def test_older_config():
    """config.json of google/gemma-2-9b as first published: no layer_types, both hidden_act keys, the wrong scalar."""
    old = {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
           "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107], "final_logit_softcapping": 30.0,
           "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
           "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2",
           "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
           "query_pre_attn_scalar": 224, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
           "sliding_window_size": 4096, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 256000}
    assert Config.from_dict(old) == PRESETS["google/gemma-2-9b-it"]


def test_the_wrong_scalar_is_warned_of(capsys):
    config = Config.from_dict(PRESETS["google/gemma-2-9b"].to_dict() | {"query_pre_attn_scalar": 224})
    assert config == PRESETS["google/gemma-2-9b"] and "224" in capsys.readouterr().err


@pytest.mark.parametrize("change, named", [
    ({"model_type": "gemma3"}, "gemma3"), ({"hidden_size": "64"}, "hidden_size"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers"), ({"vocab_size": True}, "vocab_size"), ({"head_dim": 15}, "15"),
    ({"num_key_value_heads": 3}, "key-value"), ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["chunked"] * 4}, "layer_types"), ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"final_logit_softcapping": -1}, "softcapping"), ({"eos_token_id": "1"}, "eos_token_id"), ({"attention_bias": True}, "attention_bias"),
])
def test_bad_configs_are_named(change, named):
    with pytest.raises(InputError, match=named):
        Config.from_dict(random_gemma().config.to_dict() | change)


def damaged(folder, **tensors):
    """A small checkpoint in which some tensors are replaced, or left out where None."""
    model = random_gemma()
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()} | tensors
    write_tensors(folder / "model.safetensors", {name: tensor for name, tensor in state.items() if tensor is not None})
    write_json(folder / "config.json", model.config.to_dict())
    return folder


def test_strict_names_and_shapes(tmp_path):
    for change, words in (({"model.norm.weight": None}, "model.norm.weight is missing"),
                          ({"lm_head.weight": torch.zeros(300, 64)}, "lm_head.weight is not one of"),
                          ({"model.norm.weight": torch.zeros(63)}, r"model.norm.weight has shape \(63,\)"),
                          ({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}, "I64")):
        with pytest.raises(InputError, match=words):
            load_model(damaged(tmp_path, **change))
    with pytest.raises(InputError, match="float16"):
        load_model(damaged(tmp_path), dtype=torch.float16)


def test_damaged_files_are_refused(tmp_path):
    folder = damaged(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(InputError, match="model.safetensors"):
            load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no file model.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is not valid JSON"):
        load_model(folder)


def test_index_must_agree_and_stay_in_its_folder(tmp_path):
    save_model(random_gemma(), tmp_path, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for change in ({"model.norm.weight": "../evil.safetensors"}, {"model.norm.weight": "/etc/passwd"}, {"model.norm.weight": 3},
                   {"model.extra": "model-00001-of-00003.safetensors"}):
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": index["weight_map"] | change})
        with pytest.raises(InputError):
            load_model(tmp_path)


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("files.raw", lambda tensor: 1 / 0)                            # after the header has been written
    with pytest.raises(ZeroDivisionError):
        save_model(random_gemma(), tmp_path)
    assert list(tmp_path.iterdir()) == []


PEAK = """
import sys, torch
from model import load_model
model = load_model(sys.argv[1], dtype=torch.bfloat16)
size = sum(p.nbytes for p in model.parameters())
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(size, peak)
"""


def test_loading_float32_as_bfloat16_needs_little_more_than_the_result(tmp_path):
    config = Config(vocab_size=200_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=4, head_dim=64)
    save_model(Gemma2(config), tmp_path)
    out = subprocess.run([sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    size, peak = map(int, out.split())
    assert size > 400e6 and peak < 1.15 * size + 300 * 2 ** 20, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_norm_s_backward_is_autograd_s():
    draw = torch.Generator().manual_seed(0)
    norm, x, dy = RMSNorm(24, 1e-6), torch.randn(3, 5, 24, generator=draw).requires_grad_(), torch.randn(3, 5, 24, generator=draw)
    norm.weight.data.normal_(0, 0.3, generator=draw)
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
    for ours, wanted in zip(torch.autograd.grad(norm(x), (x, norm.weight), dy), torch.autograd.grad(plain, (x, norm.weight), dy)):
        assert (ours - wanted).norm() < 1e-6 * wanted.norm()


def test_recomputed_blocks_give_the_same_gradients():
    tokens, model = tokens_of(2, 80), random_gemma()                   # 80: long enough for attention in blocks of queries
    documents = torch.arange(80).ge(33).long().expand(2, -1)
    factors = [factor for layer in add_lora(model, 4, 4, "random", generator=torch.Generator().manual_seed(0)).values()
               for factor in (layer.A, torch.nn.init.normal_(layer.B, 0, 0.1))]
    calls = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    out = {}
    for model.recompute in (False, True):
        hidden, residuals = model.hidden(tokens, documents, capture=(1,))
        loss = hidden.sin().sum() + residuals[1].cos().sum()
        kept = len(calls)
        out[model.recompute] = loss, *torch.autograd.grad(loss, factors)
    assert (kept, len(calls)) == (8, 12)                               # the backward called the four blocks once more
    for plain, again in zip(out[False], out[True]):
        assert (plain - again).norm() <= 1e-6 * plain.norm()
    with torch.no_grad():
        model.hidden(tokens)
    assert len(calls) == 16
