"""The fused loss against the plain one, in float64 and float32, over shapes that don't fit its tiles."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_gemma

import fused as loss
from fused import FusedNLL, nll_sum


def plain(h, E, targets, cap):
    return F.cross_entropy(torch.tanh(h @ E.T / cap) * cap, targets, reduction="sum")


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("N, D, V, tile, size", [(1, 8, 11, 4, 1), (7, 16, 100, 33, 3), (5, 8, 4096, 4096, 1), (3, 8, 4097, 4096, 6),
                                                 (64, 32, 1000, 999, 10)])
def test_equals_the_plain_loss(monkeypatch, N, D, V, tile, size):
    monkeypatch.setattr(loss, "TILE", tile)
    monkeypatch.setitem(loss.SCRATCH, "cpu", 0)
    draw = torch.Generator().manual_seed(N)
    h, E = torch.randn(N, D, generator=draw) * size, torch.randn(V, D, generator=draw)
    targets = torch.randint(0, V, (N,), generator=draw)
    truth_h = h.double().requires_grad_()
    truth = plain(truth_h, E.double(), targets, 30.0)
    truth.backward()
    ours_h = h.clone().requires_grad_()
    ours = FusedNLL.apply(ours_h, E, targets, 30.0)
    (3 * ours).backward()
    assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
    assert relative(ours_h.grad / 3, truth_h.grad) < 1e-5


def test_logits_at_the_cap_do_not_overflow():
    h, E = torch.full((2, 4), 100.0, requires_grad=True), torch.ones(300_000, 4)
    E[7] = -1
    value = FusedNLL.apply(h, E, torch.tensor([0, 7]), 30.0)
    value.backward()
    assert value.item() == pytest.approx(2 * torch.tensor(299_999.0).log().item() + 60, rel=1e-5) and h.grad.isfinite().all()


def test_bfloat16_is_no_further_from_the_truth_than_the_plain_loss():
    ours = theirs = 0.0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        h, E = torch.randn(32, 64, generator=draw).bfloat16(), torch.randn(5000, 64, generator=draw).bfloat16()
        targets = torch.randint(0, 5000, (32,), generator=draw)
        grads = []
        for f, dtype in ((plain, torch.float64), (lambda *a: FusedNLL.apply(*a), torch.bfloat16), (plain, torch.bfloat16)):
            x = h.to(dtype).requires_grad_()
            f(x, E.to(dtype), targets, 30.0).backward()
            grads.append(x.grad.double())
        ours, theirs = ours + (grads[1] - grads[0]).norm(), theirs + (grads[2] - grads[0]).norm()
    assert ours <= 1.1 * theirs


def test_only_labelled_tokens_reach_the_head(monkeypatch):
    model, seen = random_gemma(), []
    monkeypatch.setattr(FusedNLL, "apply", lambda h, *rest: (seen.append(len(h)), torch.zeros(()))[1])
    labels = torch.full((2, 9), -100)
    labels[0, 3] = labels[1, 8] = 5
    assert nll_sum(model, torch.randn(2, 9, 64), labels)[1] == 2 and seen == [2]


def test_no_label_at_all():
    value, count = nll_sum(random_gemma(), torch.randn(1, 3, 64), torch.full((1, 3), -100))
    assert value.item() == 0 and count == 0


def test_embedding_that_learns_takes_the_plain_loss():
    model = random_gemma()
    hidden, labels = torch.randn(1, 4, 64), torch.tensor([[5, -100, 6, 7]])
    fused = nll_sum(model, hidden, labels)[0]
    model.embed_tokens.weight.requires_grad_()
    value = nll_sum(model, hidden, labels)[0]
    value.backward()
    assert value.item() == pytest.approx(fused.item(), rel=1e-5) and model.embed_tokens.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="embedding"):
        FusedNLL.apply(hidden[0], model.embed_tokens.weight, torch.tensor([5, 1, 6, 7]), 30.0)


@pytest.mark.parametrize("cap", [None, 200.0])
def test_softcaps_that_bound_nothing_take_the_plain_loss(cap):
    model = SimpleNamespace(config=SimpleNamespace(final_logit_softcapping=cap), embed_tokens=SimpleNamespace(weight=torch.randn(50, 8)))
    model.unembed = lambda h: h @ model.embed_tokens.weight.T * 100
    value, _ = nll_sum(model, torch.randn(1, 4, 8), torch.tensor([[5, -100, 6, 7]]))
    assert value.isfinite()
