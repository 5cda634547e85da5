"""A whole step: hidden states, LoRA and fused loss together. Packed against padded, against transformers + peft, in bf16, any shape."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, random_gemma, transformers_twin
from hypothesis import given, settings
from hypothesis import strategies as st

import fused as attention
from data import Example, pack
from lora import TARGETS, add_lora, lora_layers
from fused import IGNORE, nll_sum
from model import Config
from model import MLP, Gated, Gemma2

RANK, ALPHA = 4, 8


def with_lora(model, seed=0):
    """Adapters off their start, where one factor's gradient would be zero."""
    draw = torch.Generator().manual_seed(seed)
    for layer in add_lora(model, RANK, ALPHA, "random", generator=draw).values():
        torch.nn.init.normal_(layer.B, 0, 0.05, generator=draw)
    return model


def factors(model):
    return {f"{name}.{letter}": getattr(layer, letter) for name, layer in lora_layers(model).items() for letter in "AB"}


def step(model, rows, hidden=None):
    """Loss of rows (tokens, documents, labels), summed over labels and divided by their count, and {factor: gradient}."""
    for factor in factors(model).values():
        factor.grad = None
    hidden, count = hidden or (lambda *row: model.hidden(*row)[0]), sum(int((labels != IGNORE).sum()) for *_, labels in rows)
    total = 0.0
    for tokens, documents, labels in rows:
        part = model.nll_sum(hidden(tokens, documents), labels)[0] / max(count, 1)
        part.backward()
        total += part.item()
    return total, {name: factor.grad for name, factor in factors(model).items()}


def plain_step(model, rows):
    """The same with no part of the fast path: plain attention, LoRA as peft writes it, all logits, torch's own cross-entropy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHORT", 10 ** 9)
        patch.setattr("lora.LoRALinear.forward", lambda layer, x: layer.plain(x))
        patch.setattr(MLP, "forward", lambda mlp, x: mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x)))
        patch.setattr("test_step.nll_sum", lambda model, hidden, labels: (
            F.cross_entropy(model.unembed(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"), 0))
        return step(model, rows)


def apart(ours, theirs):
    """Largest ‖a − b‖ / ‖b‖ over the gradients."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name].double() - b.double()).norm() / b.double().norm()).item() for name, b in theirs.items())


def row(T, seed=1, B=1, unlabelled=0.5):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 300, (B, T), generator=draw)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[:, :int(T * unlabelled)] = IGNORE
    return tokens, torch.ones_like(tokens), labels


# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_packed_gradients_equal_padded_ones(shape):
    """Examples that data.pack lays into rows of 200 tokens, against one padded row for each."""
    draw, examples = torch.Generator().manual_seed(3), []
    for size in (150, 90, 61, 40, 33, 9, 2):
        examples.append(Example(torch.randint(5, 300, (size,), generator=draw).tolist(), size // 2, True))
    packed = [tuple(t[None] for t in (r.tokens, r.documents, r.labels)) for r in pack(examples, 200, 0, 0)]
    assert len(packed) < 4 and max(int(documents.max()) for _, documents, _ in packed) >= 3
    padded = [tuple(t[None] for t in (r.tokens, r.documents, r.labels)) for e in examples for r in pack([e], 200, 0, 0)]
    model = with_lora(random_gemma(shape, std=0.15, sliding_window=50))
    (ours, gradients), (alone, wanted) = step(model, packed), step(model, padded)
    assert ours == pytest.approx(alone, rel=1e-6) and apart(gradients, wanted) < 1e-5


def peft_step(model, rows):
    """transformers' eager Gemma-2 with peft's LoRA and its own loss, on the weights and factors of ours."""
    peft = pytest.importorskip("peft")
    base = Gemma2(model.config)
    base.load_state_dict({name.replace(".base.", "."): w for name, w in model.state_dict().items() if not name.endswith((".A", ".B"))})
    dtype = model.embed_tokens.weight.dtype
    twin = peft.get_peft_model(transformers_twin(base, dtype), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    theirs = {}
    for name, layer in lora_layers(model).items():
        module = twin.get_submodule(f"base_model.model.model.{name}")
        for letter in "AB":
            theirs[f"{name}.{letter}"] = weight = getattr(module, f"lora_{letter}").default.weight
            weight.data = getattr(layer, letter).detach().clone()
    (tokens, _, labels), = rows
    loss = twin(input_ids=tokens, labels=labels.roll(1, 1), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in theirs.items()}


@pytest.mark.parametrize("form", ["eager", "compiled parts", "recompute", "one graph"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(form):
    model, rows = with_lora(random_gemma(std=0.2, sliding_window=50, num_hidden_layers=3)), [row(200, B=2)]
    model.recompute, hidden = form == "recompute", None
    if form == "compiled parts" and not attention.use_compile():
        pytest.skip("torch.compile finds no compiler here")
    if form == "one graph":                                            # traced and differentiated as a whole; inductor would take a minute
        hidden = torch.compile(lambda *row: model.hidden(*row)[0], fullgraph=True, dynamic=False, backend="aot_eager")
    try:
        (ours, gradients), (theirs, wanted) = step(model, rows, hidden), peft_step(model, rows)
    finally:
        attention.use_compile(False)
    assert ours == pytest.approx(theirs, rel=1e-5) and apart(gradients, wanted) < 1e-4


def test_inductor_makes_the_same_step():
    if not attention.use_compile():
        pytest.skip("torch.compile finds no compiler here")
    model, rows = with_lora(random_gemma(std=0.2, sliding_window=50, num_hidden_layers=1)), [row(150)]
    try:
        ours, gradients = step(model, rows, torch.compile(lambda *row: model.hidden(*row)[0], dynamic=False))
    finally:
        attention.use_compile(False)
    theirs, wanted = peft_step(model, rows)
    assert ours == pytest.approx(theirs, rel=1e-5) and apart(gradients, wanted) < 1e-4


def test_bfloat16_gradients_are_no_further_from_the_truth_than_peft_s():
    """The truth: the same rounded weights in float32. Mean over 20 seeds of the mean over factors."""
    off = torch.zeros(2)
    for seed in range(20):
        model = with_lora(random_gemma(seed=seed, std=0.15, sliding_window=50, num_hidden_layers=2), seed).to(torch.bfloat16)
        for factor in factors(model).values():
            factor.data = factor.data.float()
        rows = [row(120, seed)]
        found = step(model, rows)[1], peft_step(model, rows)[1]
        for weight in model.parameters():
            weight.data = weight.data.float()
        _, truth = plain_step(model, rows)
        off += torch.tensor([sum((g[name] - t).norm() / t.norm() for name, t in truth.items()) / len(truth) for g in found]) / 20
    assert off[0] <= 1.1 * off[1] and off[1] > 1e-3, off


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.integers(1, 120), st.sampled_from([(2, 1), (2, 2), (4, 2), (3, 1)]),
       st.integers(2, 2000), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_any_shape(lengths, window, heads, vocabulary, unlabelled, seed):
    """Documents, windows, GQA, one token, no label, a vocabulary that no tile divides: the fast path against the plain one."""
    config = Config(vocab_size=vocabulary, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=heads[0],
                    num_key_value_heads=heads[1], head_dim=8, query_pre_attn_scalar=8, sliding_window=window)
    model = with_lora(Gemma2(config).init_weights(0.3, torch.Generator().manual_seed(seed)), seed)
    tokens, _, labels = row(sum(lengths), seed, unlabelled=unlabelled)
    labels = torch.where(labels == IGNORE, labels, labels % vocabulary)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    rows = [(tokens % vocabulary, documents, labels)]
    (ours, gradients), (plain, wanted) = step(model, rows), plain_step(model, rows)
    assert ours == pytest.approx(plain, rel=1e-5, abs=1e-6)
    scale = max(g.norm() for g in wanted.values())
    assert max((gradients[name] - g).norm() for name, g in wanted.items()) <= 1e-5 * scale


# ---------------------------------------------------------------------------------------------------------------
# The MLP's middle, by hand

@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 50, 1400), (0, 3)])  # the second takes three pieces
def test_gated_equals_the_plain_form(shape, dtype, bound):
    draw = torch.Generator().manual_seed(0)
    g, u, dh = (torch.randn(shape, generator=draw, dtype=torch.float64).mul(4).to(dtype) for _ in range(3))
    ours = Gated.apply(g.requires_grad_(), u.requires_grad_())
    assert {x.data_ptr() for x in ours.grad_fn.saved_tensors} == {g.data_ptr(), u.data_ptr()}
    wide = [x.detach().double().requires_grad_() for x in (g, u)]
    truth = F.gelu(wide[0], approximate="tanh") * wide[1]
    for mine, exact in zip((ours, *torch.autograd.grad(ours, (g, u), dh)), (truth, *torch.autograd.grad(truth, wide, dh.double()))):
        assert mine.dtype == dtype and (mine.double() - exact).norm() <= bound * exact.norm()


def test_gelu_at_its_ends():
    g = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], requires_grad=True)
    h = Gated.apply(g, torch.ones(5))
    h.sum().backward()
    assert h.tolist() == [0, 0, 0, 30, 1e4] and g.grad.tolist() == [0, 0, 0.5, 1, 1]
