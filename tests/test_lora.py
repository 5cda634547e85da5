"""lora.py: what must not change, the inits, peft both ways, adapters that are refused, merging."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from lora import (INITS, add_lora, fold_lora, load_adapter, lora_layers, save_adapter, scaled,
                  subspace_share, trainable_parameters, update_share)
from model import MODULES, TARGETS, Config, Gemma2, load_model, save_model
from run.files import InputError, read_json, write_json

# Twelve layers, so that a pattern for layer 1 could be taken for layer 11's
SMALL = Config(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=12,
               num_attention_heads=4, num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=10,
               sliding_window=8, max_position_embeddings=64)
TWO = Config(**{**vars(SMALL), "num_hidden_layers": 2, "layer_types": SMALL.layer_types[:2]})
RANK, ALPHA = 5, 8
TOKENS = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(5))
Q1 = "layers.1.self_attn.q_proj"
KEY = f"base_model.model.model.{Q1}.lora_A.weight"
EMBEDDING = "model.embed_tokens.weight"


def base_model(config=SMALL, dtype=torch.float32):
    model = Gemma2(config).init_weights(0.15, torch.Generator().manual_seed(0))
    return model.to(dtype).requires_grad_(False)


def random_bases(model, sizes=(RANK,)):
    """An orthonormal basis for each linear module; their sizes r̂ cycle through `sizes`."""
    draw = torch.Generator().manual_seed(1)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    return {name: torch.linalg.qr(torch.randn(32, sizes[i % len(sizes)], generator=draw)).Q
            for i, name in enumerate(names)}


@torch.no_grad()
def perturbed(model):
    """The model with noise on every A and B, as training leaves them."""
    draw = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        for factor in (layer.A, layer.B):
            factor += 0.1 * torch.randn(factor.shape, generator=draw)
    return model


def adapted(config=SMALL, **options):
    """A model with a trained adapter."""
    model = base_model(config)
    add_lora(model, RANK, ALPHA, "random", generator=torch.Generator().manual_seed(0), **options)
    return perturbed(model)


def close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def train(model, parameters, steps=2):
    # In the first step one factor has no gradient yet, since the other is zero
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).logsumexp(-1).sum().backward()
        optimizer.step()


# What must not change

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_step_0_is_the_base_bit_for_bit(init, dtype):
    model = base_model(TWO, dtype)
    before = model(TOKENS)
    layers = add_lora(model, RANK, ALPHA, init, random_bases(model, (RANK, 3)), targets=MODULES)
    assert len(layers) == 14 and layers[Q1].A.dtype == torch.float32
    assert torch.equal(model(TOKENS), before)


def test_folding_changes_no_output_and_scaling_by_0_is_the_base():
    model = adapted(targets=MODULES)
    layer, before = lora_layers(model)[Q1], model(TOKENS)
    weight = layer.base.weight.clone()
    with scaled(model, 0):
        assert torch.equal(model(TOKENS), base_model()(TOKENS))
    assert torch.equal(model(TOKENS), before)
    fold_lora(model)
    assert not lora_layers(model) and model.state_dict().keys() == base_model().state_dict().keys()
    close(model.get_submodule(Q1).weight - weight, ALPHA / RANK * layer.B @ layer.A, 1e-5)
    close(model(TOKENS), before, 1e-5)


# Inits

def directions(layer):
    """(d, r) of the factor that lies in the residual stream; the other one must be zero."""
    stream, other = (layer.B, layer.A) if layer.writer else (layer.A.T, layer.B)
    assert not other.any()
    return stream.detach()


def test_sails_starts_with_the_basis_and_the_rest_is_orthogonal_to_it():
    model = base_model(TWO)
    bases = random_bases(model, (RANK, 3))
    for name, layer in add_lora(model, RANK, ALPHA, "sails", bases, targets=MODULES).items():
        U, start = bases[name], directions(layer)
        assert layer.writer == name.endswith(("o_proj", "down_proj"))
        assert start.shape == (32, RANK) and torch.equal(start[:, :U.shape[1]], U)
        rest = start[:, U.shape[1]:]
        # Drawn uniformly within ±1/√32: a norm near 0.58
        assert ((U.T @ rest).abs() < 1e-7).all() and (rest.norm(dim=0) > 0.2).all()


def test_random_is_peft_s_init():
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(32, 16, bias=False)
    torch.manual_seed(7)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]),
                                          torch.nn.ModuleDict({"q_proj": linear}))["q_proj"]
    # peft makes its two layers with PyTorch's init, then draws A anew
    torch.manual_seed(7)
    torch.nn.Linear(32, 4, bias=False), torch.nn.Linear(4, 16, bias=False)
    A, B = INITS["random"](linear.weight, None, 4, False, None)
    assert torch.equal(A, theirs.lora_A["default"].weight)
    assert torch.equal(B, theirs.lora_B["default"].weight)


@pytest.mark.parametrize("init", ["sails", "orthonormal"])
def test_freeze_basis_trains_one_factor_and_stays_in_the_subspace(init):
    model = base_model(TWO)
    bases = random_bases(model, (RANK, 3))
    layers = add_lora(model, RANK, ALPHA, init, bases, freeze_basis=True)
    parameters = trainable_parameters(layers)
    assert len(parameters) == 8    # one of A and B for each of 2 × 4 modules
    for layer in layers.values():
        close(directions(layer).T @ directions(layer), torch.eye(layer.rank), 1e-6)
    train(model, [parameter for _, parameter in parameters])
    for name, layer in layers.items():
        assert layer.rank == bases[name].shape[1] and layer.scale == ALPHA / RANK
        assert layer.A.any() and layer.B.any()
        if init == "sails":
            assert update_share(layer, bases[name]) == pytest.approx(1, abs=1e-6)


def test_subspace_share_stands_beside_random_bases():
    model = base_model(TWO)
    bases = random_bases(model)
    layers = add_lora(model, RANK, ALPHA, "sails", bases)
    assert set(subspace_share(model, bases, seed=0).values()) == {None}
    train(model, [p for p in model.parameters() if p.requires_grad])
    shares = subspace_share(model, bases, seed=0)
    # 5 of 32 directions
    assert shares["subspace"] > 0.5 and shares["random"] == pytest.approx(5 / 32, abs=0.08)
    assert 0 < shares["random_sd"] < 0.1
    for name, layer in layers.items():
        P, update = bases[name] @ bases[name].T, layer.update.detach()
        inside = P @ update if layer.writer else update @ P
        expected = float((inside.norm() / update.norm()) ** 2)
        assert update_share(layer, bases[name]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape, change, message", [
    ((32, 3), {}, "orthonormal"), ((31, 3), {}, "of 32 values"), ((32, 9), {}, "1 to 5"),
    (None, dict(targets=["lm_head"]), "named {'lm_head'}: known are q_proj, .*, down_proj"),
])
def test_bad_arguments_leave_the_model_alone(shape, change, message):
    model = base_model(TWO)
    bases = random_bases(model)
    if shape:
        bases[Q1] = torch.ones(shape)
    with pytest.raises(InputError, match=message):
        add_lora(model, RANK, ALPHA, "sails", bases, **change)
    assert not lora_layers(model)


# PEFT, both ways

@pytest.fixture
def twin(tmp_path):
    """(folder of our base model, transformers' model of the same weights)."""
    save_model(base_model(), tmp_path / "base")
    return tmp_path / "base", opened(tmp_path / "base")


def opened(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.Gemma2ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize("sizes, freeze", [((RANK,), False), ((RANK, RANK, 3, 2, 1), True)])
def test_peft_opens_what_is_saved_here(twin, tmp_path, sizes, freeze):
    """The same logits and gradients. With freeze, ranks differ by module."""
    peft = pytest.importorskip("peft")
    model = base_model()
    add_lora(model, RANK, ALPHA, "sails", random_bases(model, sizes), freeze_basis=freeze)
    ours = perturbed(model.requires_grad_(False))(TOKENS)
    save_adapter(model, tmp_path / "adapter", "google/gemma-2-2b")
    theirs = peft.PeftModel.from_pretrained(twin[1], tmp_path / "adapter", is_trainable=True)
    close(ours, theirs(TOKENS).logits.detach())
    again = base_model()
    layers = load_adapter(again, tmp_path / "adapter")
    close(again(TOKENS).detach(), ours, 1e-5)
    config = read_json(tmp_path / "adapter/adapter_config.json")
    assert config["target_modules"] == sorted(TARGETS) and bool(config["rank_pattern"]) == freeze

    again(TOKENS).logsumexp(-1).sum().backward()
    theirs(TOKENS).logits.logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == 96
    for name, layer in layers.items():
        for letter, factor in (("A", layer.A), ("B", layer.B)):
            expected = gradients[f"base_model.model.model.{name}.lora_{letter}.default.weight"]
            assert (factor.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("options", [
    dict(target_modules="all-linear"),
    dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
    dict(target_modules=["o_proj", "k_proj"],
         rank_pattern={"layers.1.self_attn.k_proj": 2, "model.layers.11.self_attn.o_proj": 7},
         alpha_pattern={"layers.1.self_attn.k_proj": 3, "o_proj": 20.5}),
    dict(target_modules=r".*\.self_attn\.(q|v)_proj", alpha_pattern={r"layers\.\d.*v_proj": 3}),
    dict(target_modules=["q_proj"], layers_to_transform=[1, 3], layers_pattern="layers"),
    dict(target_modules=["q_proj", "down_proj"], exclude_modules=[Q1]),
    dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], bias="all"),
    dict(target_modules="all-linear", modules_to_save=["lm_head"], exclude_modules=r".*mlp.*"),
    dict(target_modules=["up_proj"], fan_in_fan_out=True, rank_pattern={r"layers\.[13].*": 2},
         alpha_pattern={r"\d\.mlp\.up_proj": 3, "up_proj": 2}),
    dict(target_modules=[f"model.{Q1}", "11.self_attn.o_proj"], init_lora_weights="gaussian"),
])
def test_what_peft_saved_opens_here(twin, tmp_path, options):
    peft, (folder, theirs) = pytest.importorskip("peft"), twin
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(theirs, config)
    factors = [(name, p) for name, p in theirs.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for name, factor in factors:
            draw = torch.Generator().manual_seed(len(name))
            factor += 0.1 * torch.randn(factor.shape, generator=draw)
        expected = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path / "peft")
    model = load_model(folder)
    assert (model(TOKENS) - expected).abs().max() > 0.01 * expected.abs().max()
    assert 2 * len(load_adapter(model, tmp_path / "peft")) == len(factors)
    close(model(TOKENS), expected)
    # A subset of modules or layers survives our own writer
    save_adapter(model, tmp_path / "again", "x")
    again = load_model(folder)
    load_adapter(again, tmp_path / "again")
    close(again(TOKENS), model(TOKENS), 1e-6)


# Adapters as others write them, and those that are refused

@pytest.fixture
def saved(tmp_path):
    """(folder of a base, folder of an adapter, the model that carries it)."""
    save_model(base_model(TWO), tmp_path / "base", max_shard_bytes=1 << 14)
    model = adapted(TWO)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    return tmp_path / "base", tmp_path / "adapter", model


def test_names_and_dtypes_of_other_writers_load(saved):
    _, folder, trained = saved
    tensors, expected = load_file(folder / lora.WEIGHTS), trained(TOKENS)
    raw = {"base_model.model.lm_head.weight": trained.embed_tokens.weight.clone(),
           KEY.replace("lora_A", "base_layer"): trained.get_submodule(Q1).base.weight.clone()}
    for old, new in ((".weight", ".default.weight"), ("model.layers", "layers"),
                     ("base_model.model.", ""), (".layers.", "._orig_mod.layers."),
                     (".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn")):
        renamed = {key.replace(old, new): tensor for key, tensor in (tensors | raw).items()}
        save_file(renamed, folder / lora.WEIGHTS)
        model = base_model(TWO)
        load_adapter(model, folder)
        assert torch.equal(model(TOKENS), expected), new
    save_file({key: t.bfloat16() for key, t in tensors.items()}, folder / lora.WEIGHTS)
    assert load_adapter(base_model(TWO), folder)[Q1].A.dtype == torch.float32


def refused(folder, message):
    model = base_model(TWO)
    with pytest.raises(InputError, match=message) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value) and not lora_layers(model)


@pytest.mark.parametrize("change, message", [
    (dict(use_dora=True), "use_dora"), (dict(peft_type="IA3"), "IA3"),
    (dict(init_lora_weights="pissa_niter_4"), "pissa"), (dict(alpha_pattern={"(": 2}), "no scale"),
    (dict.clear, "of 0 modules"), (lambda t: t.pop(KEY), "no q_proj, .*q_proj.lora_B"),
    (lambda t: t.update({KEY.replace("layers.1", "layers.7"): torch.zeros(5, 32)}), "no q_proj"),
    (lambda t: t.update({KEY: torch.zeros(32, RANK)}), "don't fit"),
    (lambda t: t.update({KEY: torch.tensor(1.0)}), "no scale"),
    (lambda t: t.update({f"base_model.model.{EMBEDDING}": torch.zeros(90, 32)}), "embed_tokens"),
    (lambda t: t.update({f"base_model.model.{EMBEDDING}": torch.zeros(91, 32)}), "embed_tokens"),
    (lambda t: t.update({KEY.replace("lora_A.weight", "bias"): torch.zeros(40)}), "q_proj.bias"),
    (lambda t: t.update({KEY.replace("A.weight", "magnitude_vector"): torch.ones(40)}), "magnit"),
    (lambda t: t.update({KEY: torch.full((RANK, 32), torch.nan)}), "finite"),
])
def test_what_is_not_plain_lora_or_fits_no_module_is_refused(saved, change, message):
    _, folder, _ = saved
    if callable(change):
        tensors = load_file(folder / lora.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / lora.WEIGHTS)
    else:
        write_json(folder / lora.CONFIG, read_json(folder / lora.CONFIG) | change)
    refused(folder, message)


def test_missing_and_pickled_files_end_in_a_line(saved):
    folder = saved[1]
    refused(folder / "nothing", "no such folder")
    (folder / lora.WEIGHTS).rename(folder / "adapter_model.bin")    # a pickle's name
    refused(folder, f"no file {lora.WEIGHTS}")


# Merging

def test_merged_and_adapter_have_the_same_logits_in_transformers_and_peft(saved, tmp_path):
    peft, (base, adapter, model) = pytest.importorskip("peft"), saved
    lora.merge(adapter, base, tmp_path / "merged")
    ours = model(TOKENS).detach()
    close(load_model(tmp_path / "merged")(TOKENS), ours)
    close(opened(tmp_path / "merged")(TOKENS).logits, ours)
    close(peft.PeftModel.from_pretrained(opened(base), adapter)(TOKENS).logits, ours)


def test_the_command_takes_along_everything_beside_the_weights(saved, tmp_path, monkeypatch):
    base, adapter, _ = saved
    beside = {"chat_template.jinja", "tokenizer_config.json", "generation_config.json", "LICENSE",
              "vocab.extra"}
    for name in [*beside, "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json",
                 "modeling.py"]:
        (base / name).write_text(name)
    (base / "original").mkdir()
    monkeypatch.setattr(sys, "argv", ["lora.py", str(adapter), "--dtype", "bfloat16",
                                      "--out", str(tmp_path / "merged")])
    lora.main()
    with pytest.raises(InputError, match="is there"):
        lora.main()
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == beside | {"config.json", "model.safetensors"}
    assert all((tmp_path / "merged" / name).read_text() == name for name in beside)
    # Summed in float32 on what bfloat16 leaves of W, and rounded once
    assert read_json(tmp_path / "merged/config.json")["torch_dtype"] == "bfloat16"
    layer = load_adapter(load_model(base, torch.bfloat16), adapter)[Q1]
    expected = (layer.base.weight.float() + layer.update).bfloat16()
    merged = load_model(tmp_path / "merged", torch.bfloat16)
    assert torch.equal(merged.get_submodule(Q1).weight, expected)


def test_lm_eval_reads_the_same_log_likelihoods(saved, tmp_path):
    harness = pytest.importorskip("lm_eval.models.huggingface")
    import tokenizers
    import transformers

    base, adapter, model = saved
    lora.merge(adapter, base, tmp_path / "merged")
    vocabulary = {f"<{i}>": i for i in range(90)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<3>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", bos_token="<2>",
                                         eos_token="<1>").save_pretrained(tmp_path / "words")
    context, answer = [2, 9, 8], [7, 30, 31]
    log_p = model(torch.tensor([context + answer]))[0].log_softmax(-1)
    ours = sum(float(log_p[2 + i, token]) for i, token in enumerate(answer))
    theirs = harness.HFLM(pretrained=str(tmp_path / "merged"), tokenizer=str(tmp_path / "words"),
                          device="cpu", dtype="float32", batch_size=1)
    [(log_likelihood, _)] = theirs._loglikelihood_tokens(
        [(("", ""), context, answer)], disable_tqdm=True)
    assert log_likelihood == pytest.approx(ours, rel=1e-4)
