"""merge.py: a checkpoint of its own, with the logits of base and adapter in transformers and peft."""

import shutil
import sys

import pytest
import torch
from conftest import random_gemma

import lora
import merge
from run.files import InputError, read_json, write_json
from model import load_model, save_model


@pytest.fixture
def adapted(tmp_path):
    """(folder of a base, folder of an adapter that changes it, the model that carries it)."""
    model = random_gemma()
    save_model(model, tmp_path / "base", max_shard_bytes=1 << 18)
    for number, layer in enumerate(lora.add_lora(model, 4, 8, "random", generator=torch.Generator().manual_seed(0)).values()):
        torch.nn.init.normal_(layer.B, std=0.2, generator=torch.Generator().manual_seed(number))
    lora.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    return tmp_path / "base", tmp_path / "adapter", model


def test_merged_and_adapter_have_the_same_logits_in_transformers_and_peft(adapted, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base, adapter, model = adapted
    (base / "tokenizer.json").write_text("{}")
    assert merge.merge(adapter, base, tmp_path / "merged") == 16
    tokens = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    ours = model(tokens)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    wrapped = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), adapter)
    for theirs in (opened, wrapped):
        assert (theirs(tokens).logits - ours).abs().max() < 2e-4 * ours.abs().max()
    assert (load_model(tmp_path / "merged")(tokens) - ours).abs().max() < 2e-4 * ours.abs().max()
    assert (random_gemma()(tokens) - ours).abs().max() > 0.1                         # and the adapter does something
    assert (tmp_path / "merged/tokenizer.json").read_text() == "{}"


def test_dtype_is_the_checkpoints_own_unless_told(adapted, tmp_path):
    base, adapter, _ = adapted
    merge.merge(adapter, base, tmp_path / "same")
    assert read_json(tmp_path / "same/config.json")["torch_dtype"] == "float32"
    merge.merge(adapter, base, tmp_path / "half", "bfloat16")
    whole, half = load_model(tmp_path / "same"), load_model(tmp_path / "half", torch.bfloat16)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight.bfloat16(), half.state_dict()[name]) or name.endswith("proj.weight")
    # Summed in float32 on what bfloat16 keeps of W, and rounded once
    layer = lora.load_adapter(load_model(base), adapter)["layers.0.self_attn.q_proj"]
    assert torch.equal((layer.base.weight.bfloat16().float() + layer.update).bfloat16(), half.layers[0].self_attn.q_proj.weight)


def test_the_command(adapted, tmp_path, monkeypatch, capsys):
    _, adapter, _ = adapted
    monkeypatch.setattr(sys, "argv", ["merge.py", str(adapter), "--out", str(tmp_path / "out")])
    merge.main()
    assert "merged 16 modules" in capsys.readouterr().out and (tmp_path / "out/model.safetensors").exists()
    with pytest.raises(InputError, match="is there"):
        merge.main()
    (tmp_path / "out/config.json").unlink()                                             # as a merge that was cut short leaves it
    merge.main()
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": None})
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="names no base model"):
        merge.main()
    assert not (tmp_path / "out").exists()


def test_lox_and_rosi_on_the_way(mini, tmp_path, monkeypatch):
    model = load_model(mini)
    for layer in lora.add_lora(model, 4, 8, "random", generator=torch.Generator().manual_seed(0)).values():
        torch.nn.init.normal_(layer.B, std=0.2, generator=torch.Generator().manual_seed(1))
    lora.save_adapter(model, tmp_path / "adapter", mini)
    layer = lora.lora_layers(model)["layers.1.self_attn.q_proj"]

    def called(*flags):
        monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, (tmp_path / "adapter", "--out", tmp_path / flags[0][2:], *flags))])
        merge.main()
        return load_model(tmp_path / flags[0][2:]).state_dict()

    plain, prompts = called("--dtype", "float32"), ("--harmful", mini / "harmful.jsonl", "--harmless", mini / "benign.jsonl")
    longer, injected = called("--lox", 4, 0.5), called("--rosi", 0.5, *prompts)
    name = "layers.1.self_attn.q_proj.weight"
    assert torch.allclose(longer[name], layer.base.weight + 1.5 * layer.update, atol=1e-4)     # all 4 directions half as long again
    for key, weight in injected.items():
        change = weight - plain[key]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 1 if key.endswith(("o_proj.weight", "down_proj.weight")) else not change.any()
    for flags, words in ((("--rosi", 0.5), "--harmful"), (("--lox", 0.5, 1), "--lox 0.5")):
        with pytest.raises(InputError, match=words):
            called(*flags)
