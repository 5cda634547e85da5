"""lora.py: what must not change doesn't, the inits, peft both ways with logits and gradients, and bad adapters."""

import json
import random

import pytest
import torch

from run.files import InputError
from fused import AddedLowRank
from lora import (INITS, TARGETS, LoRALinear, add_lora, load_adapter, lora_layers, merge_lora, save_adapter,
                  unmerge_lora, update_share)
from model import PRESETS, Config
from model import Gemma2, load_model, save_model

SMALL = Config(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
               head_dim=10, query_pre_attn_scalar=10, sliding_window=8, max_position_embeddings=64)  # 12: layers 1 and 11
RANK, ALPHA = 5, 8
TOKENS = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(5))


def base_model(dtype=torch.float32, std=0.15, config=SMALL):
    return Gemma2(config).init_weights(std, torch.Generator().manual_seed(0)).to(dtype).requires_grad_(False)


def some_bases(sizes=(RANK,), config=SMALL):
    """A basis for each module; their sizes r̂ go round `sizes`."""
    g, names = torch.Generator().manual_seed(1), [f"layers.{n}.self_attn.{t}" for n in range(config.num_hidden_layers) for t in TARGETS]
    return {name: torch.linalg.qr(torch.randn(config.hidden_size, sizes[i % len(sizes)], generator=g)).Q for i, name in enumerate(names)}


def perturbed(model, std=0.1):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for factor in (layer.A, layer.B):
                factor += std * torch.randn(factor.shape, generator=g)
    return model


def close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# ---------------------------------------------------------------------------------------------------------------
# What must not change

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_step_0_is_the_base_bit_for_bit(init, dtype):
    model = base_model(dtype)
    before = model(TOKENS)
    layers = add_lora(model, RANK, ALPHA, init, some_bases((RANK, 3)))
    assert len(layers) == 48 and all(layer.A.dtype == layer.B.dtype == torch.float32 for layer in layers.values())
    assert torch.equal(model(TOKENS), before)


def test_training_moves_both_factors_and_no_base_weight():
    model = base_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = add_lora(model, RANK, ALPHA, "sails", some_bases((RANK, 3)), torch.Generator().manual_seed(0))
    start = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in layers.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 96
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # in the first step one factor has no gradient yet: the other is zero
        optimizer.zero_grad()
        model(TOKENS).logsumexp(-1).sum().backward()
        optimizer.step()
    for name, weight in model.state_dict().items():
        if not name.endswith((".A", ".B")):
            assert torch.equal(weight, before[name.replace(".base.", ".")]), name
    assert all((now != then).any() for name, layer in layers.items() for now, then in zip((layer.A, layer.B), start[name]))


def test_merged_equals_unmerged_and_unmerging_restores_every_bit():
    model = perturbed(base_model())
    add_lora(model, RANK, ALPHA, "random")
    perturbed(model)
    weights = {name: layer.base.weight.clone() for name, layer in lora_layers(model).items()}
    before = model(TOKENS)
    merge_lora(model)
    merge_lora(model)  # a second time changes nothing
    close(model(TOKENS), before, 1e-5)
    layer = lora_layers(model)["layers.1.self_attn.q_proj"]
    close(layer.base.weight - weights["layers.1.self_attn.q_proj"], ALPHA / RANK * layer.B @ layer.A, 1e-5)
    unmerge_lora(model)
    assert all(torch.equal(layer.base.weight, weights[name]) for name, layer in lora_layers(model).items())
    assert torch.equal(model(TOKENS), before)


def test_merging_in_bf16_rounds_once():
    layer = LoRALinear(torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16), torch.randn(2, 8).bfloat16(), torch.randn(8, 2), 2.0)
    assert layer.A.dtype == torch.float32
    wanted = (layer.base.weight.float() + 2 * layer.B @ layer.A).bfloat16()
    layer.merge()
    assert layer.base.weight.dtype == torch.bfloat16 and torch.equal(layer.base.weight, wanted)


def test_bf16_is_as_near_to_the_exact_output_as_peft_s_float32_path():
    """For an update a tenth as large as the weight, where fine-tuning ends; the base's own rounding is most of the error."""
    g = torch.Generator().manual_seed(0)
    W, A, B, x = (torch.randn(shape, generator=g) for shape in ((256, 256), (16, 256), (256, 16), (500, 256)))
    base = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    base.weight.data, x = W.bfloat16(), x.bfloat16()
    layer = LoRALinear(base, A, B, 0.1 / 4)
    exact = x.double() @ (base.weight.double() + layer.update.double()).T
    float32 = (base(x) + layer.scale * (x.float() @ layer.A.T) @ layer.B.T).bfloat16()
    assert float(layer.update.detach().norm()) == pytest.approx(0.1 * float(W.norm()), rel=0.1)
    assert (layer(x).double() - exact).norm() < 1.05 * (float32.double() - exact).norm()


# ---------------------------------------------------------------------------------------------------------------
# The backward by hand

def layer_and_input(dtype, shape=(3, 7, 24), out=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.nn.Linear(shape[-1], out, bias=False, dtype=dtype)
    base.weight.data = torch.randn(out, shape[-1], generator=g).to(dtype)
    layer = LoRALinear(base, torch.randn(RANK, shape[-1], generator=g), 0.3 * torch.randn(out, RANK, generator=g), 1.7)
    return layer, torch.randn(shape, generator=g).to(dtype).requires_grad_(), torch.randn(*shape[:-1], out, generator=g).to(dtype)


def gradients(function, layer, x, dy):
    """y, dx, dA, dB; None where there is no gradient."""
    for tensor in (x, layer.A, layer.B):
        tensor.grad = None
    y = function(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.A.grad, layer.B.grad


@pytest.mark.parametrize("shape", [(24,), (1, 1, 24), (3, 7, 24), (0, 5, 24)])
def test_by_hand_equals_the_plain_form(shape):
    layer, x, dy = layer_and_input(torch.float32, (1, *shape) if len(shape) == 1 else shape)
    for ours, plain in zip(gradients(layer, layer, x, dy), gradients(layer.plain, layer, x, dy)):
        assert ours.shape == plain.shape and (ours - plain).norm() <= 1e-6 * plain.norm()


def test_gradcheck():
    layer, x, _ = layer_and_input(torch.float64, (2, 3, 6), 5)
    A, B = (factor.detach().double().requires_grad_() for factor in (layer.A, layer.B))
    assert torch.autograd.gradcheck(lambda *inputs: AddedLowRank.apply(inputs[0], layer.base.weight, *inputs[1:], 1.7), (x, A, B))


def test_bf16_gradients_are_as_near_to_the_exact_ones_as_peft_s():
    """For an update a tenth as large as the weight, as above. x, dy and W are bf16 numbers; mean over 20 seeds."""
    ours_off, plain_off, s = [], [], 0.1 / (0.3 * RANK ** 0.5)
    for seed in range(20):
        layer, x, dy = layer_and_input(torch.bfloat16, (4, 64, 96), 80, seed)
        layer.scale = s
        ours, plain = gradients(layer, layer, x, dy), gradients(layer.plain, layer, x, dy)
        W, A, B, x, dy = (t.detach().flatten(0, -2).double() for t in (layer.base.weight, layer.A, layer.B, x, dy))
        exact = (x @ W.T + s * (x @ A.T) @ B.T, dy @ W + s * (dy @ B) @ A, s * (dy @ B).T @ x, s * dy.T @ (x @ A.T))
        for off, found in ((ours_off, ours), (plain_off, plain)):
            off.append([float((t.flatten(0, -2).double() - e).norm() / e.norm()) for t, e in zip(found, exact)])
        assert ours[2].dtype == ours[3].dtype == torch.float32
    ours, plain = (torch.tensor(off).mean(0) for off in (ours_off, plain_off))
    assert (ours[:2] < 1.1 * plain[:2]).all(), (ours, plain)   # y and dx
    assert (ours[2:] < 4e-3).all(), ours                       # dA and dB: a bf16 rounding or two, far below what x and dy carry


@pytest.mark.parametrize("frozen", ["A", "B", "AB", "x", "xA"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen):
    from torch.utils.flop_counter import FlopCounterMode
    layer, x, dy = layer_and_input(torch.float32)
    whole, flops = gradients(layer, layer, x, dy), {}
    for name in ("", frozen):
        for letter in name:
            (x if letter == "x" else getattr(layer, letter)).requires_grad_(False)
        y = layer(x)
        with FlopCounterMode(display=False) as counter:
            found = torch.autograd.grad(y, [t for t in (x, layer.A, layer.B) if t.requires_grad], dy)
        flops[name] = counter.get_total_flops()
    wanted = [g for letter, g in zip("xAB", whole[1:]) if letter not in frozen]
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    tokens, inner, out = 21, 24, 20
    saved = {"A": RANK * inner, "B": RANK * (out + inner), "AB": RANK * (3 * inner + 2 * out) - RANK * inner - RANK * out,
             "x": inner * out,
             "xA": inner * out + RANK * (out + inner)}  # and in · r, which is added in place, where the counter doesn't look
    assert flops[""] - flops[frozen] == 2 * tokens * saved[frozen]


def test_only_x_and_the_weights_are_kept():
    layer, x, _ = layer_and_input(torch.bfloat16)
    kept = {t.data_ptr() for t in layer(x).grad_fn.saved_tensors}
    assert kept == {t.data_ptr() for t in (x, layer.base.weight, layer.A, layer.B)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    layer, x, dy = layer_and_input(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(gradients(compiled, layer, x, dy), gradients(layer, layer, x, dy)):
        assert (ours - plain).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * plain.norm()


# ---------------------------------------------------------------------------------------------------------------
# Inits

def test_sails_holds_the_basis_and_the_rest_is_orthogonal_to_it():
    bases = some_bases((RANK, 3))
    for name, layer in add_lora(base_model(), RANK, ALPHA, "sails", bases).items():
        U, writer = bases[name], name.endswith("o_proj")
        directions, zero = (layer.B, layer.A) if writer else (layer.A.T, layer.B)
        assert layer.writer == writer and not zero.any() and directions.shape == (32, RANK)
        assert torch.equal(directions[:, :U.shape[1]], U)
        rest = directions[:, U.shape[1]:]
        assert (U.T @ rest).abs().max() < 1e-7 if rest.numel() else True
        assert rest.norm(dim=0).gt(0.2).all()  # and it isn't zero: uniform within ±1/√32 has a norm near 0.58


def test_random_is_peft_s_init():
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 16, bias=False)})
    torch.manual_seed(7)
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), torch.nn.ModuleDict(model))["q_proj"]
    torch.manual_seed(7)
    torch.nn.Linear(32, 4, bias=False), torch.nn.Linear(4, 16, bias=False)  # peft makes its two layers, then draws A anew
    A, B = INITS["random"](model["q_proj"].weight, None, 4, False, None)
    assert torch.equal(A, wrapped.lora_A["default"].weight) and torch.equal(B, wrapped.lora_B["default"].weight)


def test_orthonormal():
    for name, layer in add_lora(base_model(), RANK, ALPHA, "orthonormal").items():
        directions, zero = (layer.B, layer.A) if name.endswith("o_proj") else (layer.A.T, layer.B)
        assert not zero.any() and (directions.T @ directions - torch.eye(RANK)).abs().max() < 1e-6


def test_draws_follow_the_generator():
    first, again, other = (add_lora(base_model(), RANK, ALPHA, "random", generator=torch.Generator().manual_seed(seed))
                           for seed in (1, 1, 2))
    name = "layers.3.self_attn.v_proj"
    assert torch.equal(first[name].A, again[name].A) and not torch.equal(first[name].A, other[name].A)


@pytest.mark.parametrize("init", ["sails", "orthonormal", "random"])
def test_freeze_basis_trains_one_factor_and_stays_inside(init):
    bases, model = some_bases((RANK, 3)), base_model()
    layers = add_lora(model, RANK, ALPHA, init, bases, freeze_basis=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS).logsumexp(-1).sum().backward()
    optimizer.step()
    for name, layer in layers.items():
        assert layer.rank == bases[name].shape[1] and layer.scale == ALPHA / RANK
        assert layer.A.requires_grad != layer.B.requires_grad and layer.A.any() and layer.B.any()
        if init == "sails":
            assert update_share(layer, bases[name]) == pytest.approx(1, abs=1e-6)


def test_update_share_is_the_projection_s():
    bases, model = some_bases((3,)), base_model()
    add_lora(model, RANK, ALPHA, "sails", bases)
    for name, layer in lora_layers(model).items():
        assert update_share(layer, bases[name]) != update_share(layer, bases[name])  # 0 / 0 is nan
    perturbed(model)
    for name, layer in lora_layers(model).items():
        P, W = bases[name] @ bases[name].T, layer.update.detach()
        kept = P @ W if name.endswith("o_proj") else W @ P
        assert update_share(layer, bases[name]) == pytest.approx(float((kept.norm() / W.norm()) ** 2), rel=1e-4)


@pytest.mark.parametrize("change, wanted", [
    (dict(rank=0), "--rank 0"), (dict(rank=-3), "--rank -3"), (dict(rank=33), "1 to 32"), (dict(alpha=0), "--alpha 0"),
    (dict(alpha=float("nan")), "--alpha"), (dict(init="pissa"), "known are sails, random, orthonormal"), (dict(bases=None), "has no basis"),
    (dict(rank=4), "shape"), (dict(bases={"layers.0.self_attn.q_proj": torch.eye(31)[:, :3]}), "shape"),
    (dict(bases={"layers.0.self_attn.q_proj": torch.ones(32, 3)}), "orthonormal"),
])
def test_bad_arguments_leave_the_model_alone(change, wanted):
    model = base_model()
    with pytest.raises(InputError, match=wanted):
        add_lora(model, **dict(rank=RANK, alpha=ALPHA, init="sails", bases=some_bases()) | change)
    assert not lora_layers(model)


@pytest.mark.parametrize("name, count", [("google/gemma-2-2b", 6_389_760), ("google/gemma-2-9b", 17_891_328),
                                         ("google/gemma-2-27b", 22_609_920)])
def test_parameter_counts_at_rank_16(name, count):
    with torch.device("meta"):
        model = Gemma2(PRESETS[name])
    add_lora(model, 16, 32, "random")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# ---------------------------------------------------------------------------------------------------------------
# PEFT, both ways

@pytest.fixture
def twin(tmp_path):
    """Our base model's folder, and transformers' model of the same weights."""
    transformers = pytest.importorskip("transformers")
    save_model(base_model(), tmp_path / "base")
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    return tmp_path, theirs.eval()


@pytest.mark.parametrize("sizes, freeze", [((RANK,), False), ((RANK, RANK, 3, 2, 1), True)])
def test_peft_opens_what_is_saved_here(twin, sizes, freeze):
    """With freeze, ranks differ by module and layer (48 modules, five sizes in turn), so 1 taken for 11 shows."""
    peft, (folder, theirs) = pytest.importorskip("peft"), twin
    model = base_model()
    add_lora(model, RANK, ALPHA, "sails", some_bases(sizes), freeze_basis=freeze)
    plain = perturbed(model)(TOKENS)
    save_adapter(model, folder / "adapter", "google/gemma-2-2b")
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter")
    with torch.no_grad():
        close(plain, theirs(TOKENS).logits)
    again = base_model()
    load_adapter(again, folder / "adapter")
    close(again(TOKENS), plain, 1e-5) if freeze else None  # alpha / rank may be an ulp off the scale
    assert freeze or torch.equal(again(TOKENS), plain)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/gemma-2-2b" and config["target_modules"] == sorted(TARGETS)
    assert bool(config["rank_pattern"]) == freeze


@pytest.mark.parametrize("options", [
    dict(target_modules=list(TARGETS)),
    dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
    dict(target_modules=["o_proj", "k_proj"], rank_pattern={"layers.1.self_attn.k_proj": 2, "model.layers.11.self_attn.o_proj": 7},
         alpha_pattern={"layers.1.self_attn.k_proj": 3, "o_proj": 20.5}),
    dict(target_modules=["q_proj"], layers_to_transform=[1, 3]),
    dict(target_modules="all-linear"),
    dict(target_modules=["down_proj", "up_proj", "o_proj"]),
    dict(target_modules=["model.layers.1.self_attn.q_proj", "11.self_attn.o_proj"], init_lora_weights="gaussian"),
])
def test_what_peft_saved_opens_here(twin, options):
    peft, (folder, theirs) = pytest.importorskip("peft"), twin
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        wanted = theirs(TOKENS).logits
    theirs.save_pretrained(folder / "peft")
    model = load_model(folder / "base")
    bare = model(TOKENS)
    layers = load_adapter(model, folder / "peft")
    assert len(layers) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    close(model(TOKENS), wanted)
    assert (bare - wanted).abs().max() > 0.01 * wanted.abs().max()  # the adapter says something
    save_adapter(model, folder / "again", "x")  # and a subset of modules, or of layers, survives our own writer
    again = load_model(folder / "base")
    load_adapter(again, folder / "again")
    close(again(TOKENS), model(TOKENS), 1e-6)


def test_gradients_are_peft_s(twin):
    peft, (folder, theirs) = pytest.importorskip("peft"), twin
    model = perturbed(add_lora(base := base_model(), RANK, ALPHA, "random") and base)
    save_adapter(model, folder / "adapter", "x")
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter", is_trainable=True)
    model(TOKENS).logsumexp(-1).sum().backward()
    theirs(TOKENS).logits.logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(grads) == 96
    for name, layer in lora_layers(model).items():
        for letter, factor in (("A", layer.A), ("B", layer.B)):
            wanted = grads[f"base_model.model.model.{name}.lora_{letter}.default.weight"]
            assert (factor.grad - wanted).norm() <= 1e-4 * wanted.norm(), name


# ---------------------------------------------------------------------------------------------------------------
# Bad adapters

SOME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
TWO = Config(**{**SMALL.__dict__, "num_hidden_layers": 2, "layer_types": SMALL.layer_types[:2]})


@pytest.fixture
def adapter(tmp_path):
    """A good adapter's folder, its config and its tensors, on two layers."""
    from safetensors.torch import load_file
    model = base_model(config=TWO)
    add_lora(model, RANK, ALPHA, "random")
    save_adapter(model, tmp_path, "x")
    return tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")


def refused(folder, wanted=""):
    model = base_model(config=TWO)
    with pytest.raises(InputError, match=wanted) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value) and not lora_layers(model)


@pytest.mark.parametrize("change, wanted", [
    (dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias is 'all'"), (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out"), (dict(peft_type="IA3"), "IA3"), (dict(peft_type=None), "peft_type is 'None'"),
    (dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4"), (dict(r=4), "shape"), (dict(r=0), "r is '0'"), (dict(r=True), "r is"),
    (dict(r="5"), "r is"), (dict(r=10**400), "r is"), (dict(lora_alpha=-1), "lora_alpha"), (dict(lora_alpha=None), "lora_alpha"),
    (dict(lora_alpha=float("nan")), "not valid JSON"), (dict(target_modules=".*q_proj"), "target_modules"),
    (dict(target_modules=None), "target_modules"),
    (dict(target_modules=["q_proj"]), "tensors, but is not named"), (dict(target_modules=[["q_proj"]]), "target_modules"),
    (dict(target_modules=["(a+)+b"]), "target_modules"), (dict(layers_to_transform=0), "tensors, but is not named"),
    (dict(layers_to_transform="x"), "layers_to_transform"), (dict(rank_pattern={"q_proj": 3}), "shape"),
    (dict(rank_pattern={"q_proj": "3"}), "rank_pattern"),
    (dict(rank_pattern=["abc"]), "rank_pattern"), (dict(rank_pattern={".*": 5}), "rank_pattern"),
    (dict(alpha_pattern={"q_proj": 0}), "alpha_pattern"),
    (dict(use_rslora="no"), "use_rslora"), (dict(lora_bias=True), "lora_bias"), (dict(trainable_token_indices=[1]), "trainable"),
])
def test_bad_configs(adapter, change, wanted):
    folder, config, _ = adapter
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    refused(folder, wanted)


@pytest.mark.parametrize("change, wanted", [
    (dict.clear, "no tensors"),
    (lambda t: t.pop(SOME), "is missing"),
    (lambda t: [t.pop(SOME.replace("lora_A", "lora_" + x)) for x in "AB"], "has no tensors, but is named"),
    (lambda t: t.update({SOME.replace("layers.1", "layers.7"): torch.zeros(RANK, 32)}), "belongs to no"),
    (lambda t: t.update({SOME.replace("self_attn.q_proj", "mlp.up_norm"): torch.zeros(RANK, 32)}), "belongs to no"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(3)}), "belongs to no"),
    (lambda t: t.update({SOME: torch.zeros(32, RANK)}), "shape"),
    (lambda t: t.update({SOME: torch.zeros(RANK, 31)}), "shape"),
    (lambda t: t.update({SOME: torch.zeros(RANK * 32)}), "shape"),
    (lambda t: t.update({SOME: torch.zeros(RANK, 32, dtype=torch.int32)}), "dtype"),
    (lambda t: t.update({SOME: torch.full((RANK, 32), torch.nan)}), "finite"),
    (lambda t: t.update({SOME: torch.full((RANK, 32), 1e300, dtype=torch.float64)}), "finite"),
])
def test_bad_tensors(adapter, change, wanted):
    from safetensors.torch import save_file
    folder, _, tensors = adapter
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, wanted)


def test_bf16_adapters_open_as_float32(adapter):
    from safetensors.torch import save_file
    folder, _, tensors = adapter
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    assert all(layer.A.dtype == torch.float32 for layer in load_adapter(base_model(config=TWO), folder).values())


def test_missing_and_damaged_files(adapter):
    folder, draw = adapter[0], random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    refused(folder / "nothing", "no such folder")
    for name, data in whole.items():
        (folder / name).unlink()
        refused(folder, f"holds no file {name}")
        (folder / name).write_bytes(data)
    for _ in range(200):  # damage in either file: refused, or (a flipped digit or weight) something well-formed
        for name, data in whole.items():
            data = bytearray(data)
            for _ in range(draw.choice([1, 1, 3, 30])):
                data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
            (folder / name).write_bytes(data[:draw.choice([len(data), len(data), draw.randrange(len(data))])])
        try:
            assert len(load_adapter(base_model(config=TWO), folder)) > 0
        except InputError as error:
            assert "\n" not in str(error)
