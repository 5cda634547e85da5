"""attention.py: spans against their definition, blocks of queries and flex_attention against the plain form."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_gemma
from hypothesis import given, settings
from hypothesis import strategies as st

import fused as attention
from fused import (
    BLOCK, attend, attend_flex, attend_spans, attend_spans_backward, document_starts, span_blocks, span_mask, use_compile, visible)

CAP = 50.0


@pytest.fixture(autouse=True)
def eager():
    use_compile(False)
    yield
    use_compile(False)


def case(B=2, T=300, window=None, lengths=None, H=4, K=2, hd=16, size=3.0, dtype=torch.float32, seed=0):
    """q, k, v, low and an upstream gradient; scores are about ±size²·√hd before the scale, so that the cap bites.

    `lengths` are those of the documents in the last row; the first is one document.
    """
    draw = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(B, T, heads, hd, generator=draw).to(dtype).transpose(1, 2) for heads in (H, K, K, H))
    documents = torch.ones(B, T, dtype=torch.long)
    if lengths is not None:
        documents[-1] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    low = document_starts(documents, None if lengths is None else documents)
    low = low.maximum(torch.arange(T) - (window or T) + 1)
    return [(x * s).requires_grad_() for x, s in ((q, size), (k, size), (v, 1))], low, grad


def results(form, tensors, seen, grad, scale=0.25, cap=CAP):
    """Output and the gradients of q, k and v."""
    out = form(*tensors, seen, scale, cap)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def spans(*inputs):
    return attend_spans(*inputs)[0]


def distance(ours, truth):
    return [((a.double() - b).norm() / b.double().norm().clamp(min=1e-2)).item() for a, b in zip(ours, truth)]


def check(inputs, bound=1e-5):
    tensors, low, grad = inputs
    ours, plain = results(spans, tensors, low, grad), results(attend, tensors, span_mask(low), grad)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(ours, plain))
    # Held to the plain form in float64. Where P is all but one-hot, dQ and dK are differences of nearly equal numbers, and the
    # plain form in float32 is itself further off than the bound: there three times its distance will do.
    truth = results(attend, [x.detach().double().requires_grad_() for x in tensors], span_mask(low), grad.double())
    for mine, theirs in zip(distance(ours, truth), distance(plain, truth)):
        assert mine < max(bound, 3 * theirs), (distance(ours, truth), distance(plain, truth))


# ---------------------------------------------------------------------------------------------------------------
# Spans

def test_spans_by_their_definition():
    """Visible: the same run of equal numbers, not in the future, and at most window − 1 tokens back."""
    documents = torch.tensor([[3, 3, 3, 1, 1, 3, 3, 0], [0, 1, 1, 1, 1, 1, 1, 2]])
    starts = document_starts(documents, documents)
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5, 5, 7], [0, 1, 1, 1, 1, 1, 1, 7]]
    mask = span_mask(starts.maximum(torch.arange(8) - 3 + 1))[:, 0]
    for b in range(2):
        for i in range(8):
            for j in range(8):
                together = j <= i and len(set(documents[b, j:i + 1].tolist())) == 1
                assert mask[b, i, j] == (together and i - j < 3)


def test_the_form_follows_the_row():
    low = torch.zeros(1, attention.SHORT + 1, dtype=torch.long)
    assert visible(low, CAP) is low
    assert visible(low[:, :-1], CAP).dtype == visible(low, None).dtype == visible(low, 61.0).dtype == torch.bool


# ---------------------------------------------------------------------------------------------------------------
# Blocks against the plain form

@pytest.mark.parametrize("T", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("window", [None, 1, 40, BLOCK])
def test_lengths_and_windows(T, window):
    check(case(T=T, window=window))


@pytest.mark.parametrize("H, K, hd", [(1, 1, 8), (4, 4, 8), (8, 1, 4), (6, 2, 24)])
def test_heads(H, K, hd):
    check(case(H=H, K=K, hd=hd, T=200, window=70, lengths=[90, 110]))


@given(st.integers(1, 3), st.lists(st.integers(1, 200), min_size=1, max_size=6), st.none() | st.integers(1, 300),
       st.sampled_from([(2, 1), (2, 2), (4, 2)]), st.floats(0.1, 8), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_documents_and_window(B, lengths, window, heads, size, seed):
    check(case(B, sum(lengths), window, lengths, *heads, hd=8, size=size, seed=seed))


def test_strided_inputs_and_gradients():
    """As model.py has them: heads are a transposed view, and o_proj's gradient comes back as one."""
    tensors, low, grad = case(T=150, window=60)
    plain = results(attend, tensors, span_mask(low), grad)
    copies = [x.detach().contiguous().requires_grad_() for x in tensors]
    assert max(distance(results(spans, copies, low, grad.contiguous()), plain)) < 1e-5
    one = grad[:, :, :1, :1].expand_as(grad)                           # of out.sum(): no stride at all
    assert max(distance(results(spans, tensors, low, one), results(attend, tensors, span_mask(low), one))) < 1e-5


def test_padding_is_a_document():
    """Whatever stands in the padding, output and gradients of the real tokens are those of the row without it."""
    (q, k, v), low, grad = case(B=1, T=220, lengths=[170, 50], window=90)
    grad[:, :, 170:] = 0
    alone = [x[:, :, :170].detach().requires_grad_() for x in (q, k, v)]
    short = results(spans, alone, low[:, :170], grad[:, :, :170])
    padded = results(spans, (q, k, v), low, grad)
    assert max(distance([x[:, :, :170] for x in padded], short)) < 1e-6
    assert all(x[:, :, 170:].abs().max() == 0 for x in padded[1:])


def test_scores_at_the_cap_do_not_overflow():
    for sign in (1, -1):
        q = torch.full((1, 2, 130, 4), 100.0, requires_grad=True)
        k, v = (sign * q).detach().requires_grad_(), torch.randn(1, 2, 130, 4, requires_grad=True)
        low = torch.zeros(1, 130, dtype=torch.long)
        ours = results(lambda *x: spans(*x), (q, k, v), low, torch.ones_like(q), cap=60.0)
        assert torch.allclose(ours[0][0, :, -1], v[0].mean(1), atol=1e-5) and all(x.isfinite().all() for x in ours)


def test_gradients_in_float64(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    tensors, low, _ = case(B=2, T=9, window=5, lengths=[3, 6], H=2, K=1, hd=2, size=2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: spans(*x, low, 0.7, 5.0), tensors)
    check(case(T=300, window=99, dtype=torch.float64), 1e-13)


def test_bfloat16_is_no_further_from_the_truth_than_the_plain_form():
    ours, plain = torch.zeros(4), torch.zeros(4)
    for seed in range(20):
        tensors, low, grad = case(B=1, T=260, window=(None, 70)[seed % 2], lengths=[200, 60], dtype=torch.bfloat16, size=2.0, seed=seed)
        truth = results(attend, [x.detach().double().requires_grad_() for x in tensors], span_mask(low), grad.double())
        ours += torch.tensor(distance(results(spans, tensors, low, grad), truth)) / 20
        plain += torch.tensor(distance(results(attend, tensors, span_mask(low), grad), truth)) / 20
    assert (ours <= 1.1 * plain).all() and (plain > 1e-3).all(), (ours, plain)


def test_what_is_kept_for_the_backward_is_linear_in_the_length():
    kept = []
    tensors, low, _ = case(B=1, T=1024)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        spans(*tensors, low, 0.25, CAP)
    assert max(x.numel() for x in kept) == tensors[0].numel() and len(kept) == 5


# ---------------------------------------------------------------------------------------------------------------
# Whole models

def gradients(model, tokens, documents, hidden=None):
    model.requires_grad_(True).zero_grad()
    out = (hidden or (lambda *row: model.hidden(*row)[0]))(tokens, documents)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def rows(T=300):
    tokens = torch.randint(5, 300, (2, T), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([[1] * T, [1] * 120 + [2] * (T - 160) + [0] * 40])


def test_model_takes_the_same_steps_in_either_form(monkeypatch):
    model, row = random_gemma(sliding_window=50, std=0.2), rows()
    ours = gradients(model, *row)
    monkeypatch.setattr(attention, "SHORT", 10 ** 9)
    assert max(distance(ours, gradients(model, *row))) < 1e-4          # four layers of sharp attention amplify rounding


def test_prompts_longer_than_short_are_continued_as_before(monkeypatch):
    model = random_gemma()
    prompts = [torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 90, 200)]
    ours = model.generate(prompts, max_new_tokens=20)
    monkeypatch.setattr(attention, "SHORT", 10 ** 9)
    assert all(torch.equal(a, b) for a, b in zip(ours, model.generate(prompts, max_new_tokens=20)))


def test_operators_are_what_they_tell_the_compiler():
    """Shapes, strides, no aliases, nothing overwritten: torch.compile plans memory by what the fake operators say."""
    tensors, low, grad = case(T=140, window=90)
    torch.library.opcheck(attend_spans, (*tensors, low, 0.25, CAP))
    q, k, v = (x.detach() for x in tensors)
    totals = attend_spans(q, k, v, low, 0.25, CAP)[1]
    torch.library.opcheck(attend_spans_backward, (grad, q, k, v, low, totals, 0.25, CAP), test_utils=("test_schema", "test_faketensor"))


def test_compiled_model_is_one_graph():
    model, row = random_gemma(sliding_window=50, std=0.2, num_hidden_layers=2), rows()
    plain = gradients(model, *row)
    # inductor would take half a minute to compile the same graphs
    compiled = torch.compile(lambda *row: model.hidden(*row)[0], fullgraph=True, dynamic=False, backend="aot_eager")
    assert max(distance(gradients(model, *row, compiled), plain)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------
# Compiled point-wise parts

def test_compiled_parts_equal_the_plain_form():
    if not use_compile():
        pytest.skip("torch.compile finds no compiler here")
    for T, window, lengths in ((1, None, None), (129, None, None), (300, 90, [100, 200]), (128, 128, None)):
        check(case(T=T, window=window, lengths=lengths))
    check(case(T=200, dtype=torch.bfloat16), 0.02)


def test_one_warning_without_a_compiler():
    script = ("import torch, attention; assert not attention.use_compile() and not attention.use_compile();"
              "x, low = torch.ones(1, 2, 130, 4), torch.zeros(1, 130, dtype=torch.long)\n"
              "print(attention.attend_spans(x, x, x, low, 1.0, 50.0)[0].mean().sub(1).abs() < 1e-6)")
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0 and run.stdout.strip() == "tensor(True)", run.stderr
    assert run.stderr.count("warning: torch.compile fails here") == 1


# ---------------------------------------------------------------------------------------------------------------
# flex_attention, whose forward runs on a CPU too

@pytest.mark.parametrize("T, window, lengths, H, K", [(130, None, None, 2, 2), (300, 90, [100, 150, 50], 4, 2), (256, 128, [1, 255], 4, 1)])
def test_flex_sees_and_caps_the_same(T, window, lengths, H, K):
    (q, k, v), low, _ = case(T=T, window=window, lengths=lengths, H=H, K=K)
    with torch.no_grad():
        q, k, v = q.detach(), k.detach(), v.detach()                   # flex_attention asks for it on a CPU
        assert max(distance([attend_flex(q, k, v, span_blocks(low), 0.25, CAP)], [attend(q, k, v, span_mask(low), 0.25, CAP)])) < 1e-5


def test_flex_skips_the_blocks_that_nobody_sees():
    """1024 tokens, window 128: a block of 128 queries sees its own keys and those of the block before."""
    low = (torch.arange(1024) - 127).clamp(min=0)[None]
    assert span_blocks(low).kv_num_blocks.flatten().tolist() == [1] + [2] * 7
