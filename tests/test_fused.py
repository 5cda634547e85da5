"""fused.py and attention.py against their plain forms and autograd; whole steps against peft."""

from functools import cache, partial

import pytest
import torch
from conftest import random_gemma, transformers_twin
from hypothesis import given, settings
from hypothesis import strategies as st

import attention
import fused
from attention import (BLOCK, attend_flex, attend_spans, attention_plain, span_blocks, span_mask,
                       use_compile)
from fused import IGNORE, FusedNLL, document_starts
from lora import add_lora, lora_layers
from model import TARGETS, Config, Gemma2

CAP = 50.0


@pytest.fixture(autouse=True)
def eager():
    use_compile(False)
    yield
    use_compile(False)


def distances(ours, truth):
    """‖a − b‖ / ‖b‖ of each pair of tensors."""
    return [((a.double() - b).norm() / b.double().norm().clamp(min=1e-2)).item()
            for a, b in zip(ours, truth, strict=True)]


def results(form, inputs, d_out):
    """Output of form(*inputs), and the gradients of the inputs that want one."""
    out = form(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], d_out)]


def cast(inputs, dtype):
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]


# --------------------------------------------------------------------------------------------------
# Each operation beside its plain form

def operation(name, seed=0):
    """Fused form, plain form, their float64 inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0, grad=True):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        return x.requires_grad_(grad)
    if name == "rotate":
        angle = normal(1, 1, 5, 4, grad=False)
        return fused.rotate, fused.rotate_plain, [normal(2, 3, 5, 8), angle.cos(), angle.sin()]
    if name == "rms_norm":
        inputs = [normal(3, 5, 24, size=3), normal(24, size=0.3)]
        return partial(fused.rms_norm, eps=1e-6), partial(fused.rms_norm_plain, eps=1e-6), inputs
    if name == "geglu":                                              # three pieces
        inputs = [normal(2, 50, 1400, size=4), normal(2, 50, 1400, size=4)]
        return fused.geglu, fused.geglu_plain, inputs
    if name == "lora_linear":
        inputs = [normal(2, 7, 12), normal(10, 12, grad=False), normal(3, 12), normal(10, 3)]
        form, plain = fused.lora_linear, fused.lora_linear_plain
        return partial(form, scale=1.7), partial(plain, scale=1.7), inputs
    targets = torch.randint(0, 700, (9,), generator=generator)       # tiles of 256 don't divide 700
    return (lambda h, E: FusedNLL.apply(h, E, targets, 30.0),
            lambda h, E: fused.nll_sum_plain(h, E, targets, 30.0),
            [normal(9, 64, size=2), normal(700, 64, grad=name == "trained head")])


@pytest.mark.parametrize("name", ["rotate", "rms_norm", "geglu", "lora_linear", "nll_sum",
                                  "trained head"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_the_plain_form(name, dtype, bound, monkeypatch):
    monkeypatch.setitem(fused.SCRATCH, "cpu", 0)                     # the smallest tiles
    form, plain, inputs = operation(name)
    d_out = torch.randn_like(plain(*inputs))
    truth = results(plain, inputs, d_out)
    ours = results(form, cast(inputs, dtype), d_out.to(dtype))
    assert max(distances(ours, truth)) < bound and all(x.dtype == dtype for x in ours)


def test_logits_at_the_cap_do_not_overflow():
    h, E = torch.full((2, 4), 100.0, requires_grad=True), torch.ones(300_000, 4)
    E[7] = -1
    value = FusedNLL.apply(h, E, torch.tensor([0, 7]), 30.0)
    value.backward()
    expected = 2 * torch.tensor(299_999.0).log().item() + 60
    assert value.item() == pytest.approx(expected, rel=1e-5) and h.grad.isfinite().all()


def test_unbounded_logits_take_the_plain_loss():
    hidden, labels = torch.randn(1, 4, 8), torch.tensor([[5, IGNORE, 6, 7]])
    E = (100 * torch.randn(50, 8)).requires_grad_()
    for cap in (None, 30.0, 200.0):
        value, _ = fused.nll_sum(hidden, labels, E, cap)
        plain = fused.nll_sum_plain(hidden[labels != IGNORE], E, labels[labels != IGNORE], cap)
        gradient, expected = (torch.autograd.grad(loss, E)[0] for loss in (value, plain))
        assert value.isfinite() and value.item() == pytest.approx(plain.item(), rel=1e-4)
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


# --------------------------------------------------------------------------------------------------
# Attention

def attention_case(B=2, T=300, window=None, lengths=None, H=4, K=2, hd=16, size=3.0, seed=0):
    """q, k, v in float64, low, d_out. `lengths` are the documents of the last row.

    Scores are about ±size²·√hd before the scale, so that the cap bites.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v, d_out = (torch.randn(B, T, heads, hd, generator=generator).double().transpose(1, 2)
                      for heads in (H, K, K, H))
    documents = torch.ones(B, T, dtype=torch.long)
    if lengths is not None:
        numbers = torch.arange(len(lengths))
        documents[-1] = torch.repeat_interleave(numbers, torch.tensor(lengths))
    low = document_starts(documents, documents).maximum(torch.arange(T) - (window or T) + 1)
    return [x.requires_grad_() for x in (q * size, k * size, v)], low, d_out


def forms(low, scale=0.25, cap=CAP):
    """attend_spans and attention_plain as functions of q, k, v."""
    return (lambda *qkv: attend_spans(*qkv, low, scale, cap)[0],
            lambda *qkv: attention_plain(*qkv, span_mask(low), scale, cap))


def check_attention(case, dtype=torch.float32, bound=1e-5):
    inputs, low, d_out = case
    spans, plain = forms(low)
    inputs, d_out = cast(inputs, dtype), d_out.to(dtype)
    truth = results(plain, cast(inputs, torch.float64), d_out.double())
    ours, theirs = results(spans, inputs, d_out), results(plain, inputs, d_out)
    # Where P is all but one-hot, dQ and dK are differences of nearly equal numbers, and the plain
    # form in float32 is further off than the bound: there three times its distance will do
    for mine, other in zip(distances(ours, truth), distances(theirs, truth)):
        assert mine < max(bound, 3 * other)
    assert all(x.dtype == dtype for x in ours)


@pytest.mark.parametrize("T", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("window", [None, 1, 40, BLOCK])
def test_lengths_and_windows(T, window):
    check_attention(attention_case(T=T, window=window))


@given(st.integers(1, 3), st.lists(st.integers(1, 200), min_size=1, max_size=6),
       st.none() | st.integers(1, 300), st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2)]),
       st.floats(0.1, 8), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_documents_and_window(B, lengths, window, heads, size, seed):
    check_attention(attention_case(B, sum(lengths), window, lengths, *heads, 8, size, seed))


def test_attention_in_float64_and_by_finite_differences(monkeypatch):
    check_attention(attention_case(window=99), torch.float64, 1e-13)
    monkeypatch.setattr(attention, "BLOCK", 4)
    inputs, low, _ = attention_case(T=9, window=5, lengths=[3, 6], H=2, K=1, hd=2, size=2.0)
    assert torch.autograd.gradcheck(forms(low, 0.7, 5.0)[0], inputs)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_at_the_cap_do_not_overflow(sign):
    q, v = torch.full((1, 2, 130, 4), 100.0), torch.randn(1, 2, 130, 4)
    inputs = [x.requires_grad_() for x in (q, sign * q, v)]
    spans, _ = forms(torch.zeros(1, 130, dtype=torch.long), cap=60.0)
    out, *gradients = results(spans, inputs, torch.ones_like(q))
    assert torch.allclose(out[0, :, -1], v[0].mean(1), atol=1e-5)
    assert all(x.isfinite().all() for x in gradients)


def test_compiled_parts_equal_the_plain_form():
    if not use_compile():
        pytest.skip("torch.compile finds no compiler here")
    for T, window, lengths in ((129, None, None), (300, 90, [100, 200])):
        check_attention(attention_case(T=T, window=window, lengths=lengths))
    check_attention(attention_case(T=200), torch.bfloat16, 0.02)


def test_one_warning_without_a_compiler(monkeypatch, capsys):
    def fails(*_, **options):
        raise RuntimeError("no C++ compiler")
    monkeypatch.setattr(attention, "compile_once", fails)
    monkeypatch.setattr(attention, "_compiler_works", cache(attention._compiler_works.__wrapped__))
    assert not use_compile() and not use_compile()
    assert capsys.readouterr().err.count("warning: torch.compile fails here") == 1


@pytest.mark.parametrize("T, window, lengths, H, K", [
    (130, None, None, 2, 2), (300, 90, [100, 150, 50], 4, 2), (256, 128, [1, 255], 4, 1)])
def test_flex_sees_and_caps_the_same(T, window, lengths, H, K):
    """flex_attention's forward runs on a CPU too."""
    inputs, low, _ = attention_case(T=T, window=window, lengths=lengths, H=H, K=K)
    q, k, v = (x.detach().float() for x in inputs)
    ours = attend_flex(q, k, v, span_blocks(low), 0.25, CAP)
    assert max(distances([ours], [forms(low)[1](q, k, v)])) < 1e-5


# --------------------------------------------------------------------------------------------------
# A whole step: hidden states, LoRA and loss

RANK, ALPHA = 4, 8


def with_lora(model, seed=0):
    """Adapters away from their start, where one factor's gradient would be zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in add_lora(model, RANK, ALPHA, "random", generator=generator).values():
        torch.nn.init.normal_(layer.B, 0, 0.05, generator=generator)
    return model


def factors(model):
    return {f"{name}.{letter}": getattr(layer, letter)
            for name, layer in lora_layers(model).items() for letter in "AB"}


def step(model, row, hidden=None):
    """Loss a token of row (tokens, documents, labels), and {factor: gradient}."""
    tokens, documents, labels = row
    hidden = hidden or (lambda *row: model.hidden(*row)[0])
    total, count = model.nll_sum(hidden(tokens, documents), labels)
    loss, parameters = total / max(count, 1), factors(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, gradients))


def plain_step(model, row):
    """The same with every operation in its plain form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHORT", 10 ** 9)
        for name in ("model.rotate", "model.rms_norm", "model.geglu", "lora.lora_linear"):
            patch.setattr(name, getattr(fused, name.split(".")[1] + "_plain"))
        patch.setattr(FusedNLL, "apply", fused.nll_sum_plain)
        return step(model, row)


def peft_step(model, row):
    """transformers' eager Gemma-2 with peft's LoRA and its own loss, on the weights of ours."""
    peft = pytest.importorskip("peft")
    base = Gemma2(model.config)
    base.load_state_dict({name.replace(".base.", "."): weight
                          for name, weight in model.state_dict().items() if name[-2] != "."})
    twin = transformers_twin(base, model.embed_tokens.weight.dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    twin, theirs = peft.get_peft_model(twin, config), {}
    for name, factor in factors(model).items():
        module, _, letter = name.rpartition(".")
        pair = getattr(twin.get_submodule(f"base_model.model.model.{module}"), f"lora_{letter}")
        pair.default.weight.data = factor.detach().clone()
        theirs[name] = pair.default.weight
    tokens, _, labels = row
    loss = twin(input_ids=tokens, labels=labels.roll(1, 1), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in theirs.items()}


def compare(ours, theirs, bound):
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
    scale = max(g.norm() for g in their_gradients.values()) * 1e-3
    for name, gradient in their_gradients.items():
        assert (gradients[name] - gradient).norm() <= bound * gradient.norm().clamp(min=scale), name


def make_row(T, seed=1, B=1, unlabelled=0.5):
    tokens = torch.randint(5, 300, (B, T), generator=torch.Generator().manual_seed(seed))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[:, :int(T * unlabelled)] = IGNORE
    return tokens, torch.ones_like(tokens), labels


@pytest.mark.parametrize("form", ["eager", "recompute", "compiled parts", "one graph"])
def test_a_step_is_that_of_transformers_and_peft(form):
    model = with_lora(random_gemma(std=0.2, sliding_window=50, num_hidden_layers=3))
    model.recompute, hidden = form == "recompute", None
    if form == "compiled parts" and not use_compile():
        pytest.skip("torch.compile finds no compiler here")
    if form == "one graph":                                          # inductor would take a minute
        hidden = torch.compile(lambda *row: model.hidden(*row)[0], fullgraph=True, dynamic=False,
                               backend="aot_eager")
    row = make_row(200, B=2)
    compare(step(model, row, hidden), peft_step(model, row), 1e-4)


def test_bfloat16_gradients_are_no_further_from_the_truth_than_peft_s():
    off = torch.zeros(2)
    for seed in range(8):
        model = random_gemma(seed=seed, std=0.15, sliding_window=50, num_hidden_layers=2)
        model = with_lora(model.to(torch.bfloat16), seed)
        row = make_row(120, seed)
        candidates = step(model, row)[1], peft_step(model, row)[1]
        _, truth = plain_step(model.float(), row)
        for i, gradients in enumerate(candidates):
            off[i] += sum(distances(gradients.values(), truth.values()))
    assert off[0] <= 1.1 * off[1]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.integers(1, 120),
       st.sampled_from([(2, 1), (2, 2), (4, 2), (3, 1)]), st.integers(2, 2000),
       st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_any_shape(lengths, window, heads, vocab_size, unlabelled, seed):
    """Documents, windows, GQA, one token, no label: the fast step against the plain one."""
    config = Config(vocab_size=vocab_size, hidden_size=24, intermediate_size=40,
                    num_hidden_layers=2, num_attention_heads=heads[0], head_dim=8,
                    num_key_value_heads=heads[1], query_pre_attn_scalar=8, sliding_window=window)
    generator = torch.Generator().manual_seed(seed)
    model = with_lora(Gemma2(config).init_weights(0.3, generator), seed)
    tokens, _, labels = make_row(sum(lengths), seed, unlabelled=unlabelled)
    labels = torch.where(labels == IGNORE, labels, labels % vocab_size)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    row = tokens % vocab_size, documents, labels
    compare(step(model, row), plain_step(model, row), 1e-3)
