"""experiments/neighbours/: each method against its formula on whole matrices, or peft's own."""

import random

import pytest
import torch

import lora
import train
from data import Example, Row
from experiments.neighbours import derta
from experiments.neighbours.averaging import average
from experiments.neighbours.lox import extrapolate
from experiments.neighbours.rosi import harm_direction, inject


# ---- After training ------------------------------------------------------------------------------
@pytest.fixture
def layers(gemma):
    layers = lora.add_lora(gemma, 6, 3, "random", generator=torch.Generator().manual_seed(0))
    for layer in layers.values():
        layer.B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return layers


def test_lox_extrapolates_the_leading_part(gemma, layers):
    before = {name: layer.update.detach().clone() for name, layer in layers.items()}
    extrapolate(gemma, 2, 1.25)
    for name, layer in layers.items():
        U, S, V = torch.linalg.svd(before[name], full_matrices=False)
        wanted = before[name] + 1.25 * U[:, :2] @ (S[:2, None] * V[:2])
        assert (layer.update - wanted).norm() < 1e-5 * wanted.norm()


def test_rosi_adds_the_direction_to_writers_alone(gemma, layers):
    before = {name: value.clone() for name, value in gemma.state_dict().items()}
    s = torch.arange(64.0)
    inject(gemma, s, 0.7)
    for name, value in gemma.state_dict().items():
        W = before[name]
        if name.endswith(("o_proj.base.weight", "down_proj.weight")):
            layer = layers.get(name.removesuffix(".base.weight"))
            whole = W + layer.update if layer else W
            W = W + 0.7 * torch.outer(s / s.norm(), whole.mean(0))
        assert torch.allclose(value, W, atol=1e-6)


def test_harms_direction_and_averages_by_hand(gemma):
    prompts = [[2, 5, 9], [2, 7], [2, 4, 4, 8]]
    last = [gemma.hidden(torch.tensor([ids]), capture=[1])[1][1][0, -1] for ids in prompts]
    direction = harm_direction(gemma, prompts[:2], prompts[2:])
    assert torch.allclose(direction.float(), (last[0] + last[1]) / 2 - last[2], atol=1e-5)
    state, factor = {}, torch.ones(2)
    average(state, [("a", factor)], 0.9)
    factor += 1
    average(state, [("a", factor)], 0.9)
    assert torch.allclose(state["a"], torch.tensor(1.1))


# ---- DeRTa ---------------------------------------------------------------------------------------
def test_derta_is_equation_2_term_by_term(gemma):
    """The packed rows' loss is the two sums, each probability from a forward of its own."""
    q, r, r_hat = [2, 11, 12], [21, 22, 9], [31, 32, 33, 34, 9]
    aligned, unaligned = (Example(q + answer, 3, True) for answer in (r, r_hat))
    helpful = Example([2, 41, 42, 43], 2, False)

    def log_p(context, token):
        hidden, _ = gemma.hidden(torch.tensor([context]))
        logits = 30 * torch.tanh(hidden[0, -1] @ gemma.embed_tokens.weight.T / 30)
        return float(logits.log_softmax(0)[token])

    def answer(context, tokens):
        return sum(log_p(context + tokens[:t], tokens[t]) for t in range(len(tokens)))

    rows = derta.pack_pairs([(aligned, unaligned), (helpful, None)], 24, seed=3, epoch=1)
    loss = sum(float(train.row_loss(gemma, Row(*(part[None] for part in vars(row).values()))))
               for row in rows)
    k = random.Random("3 1 derta").randint(0, 4)
    by_hand = answer(q + r_hat[:k], r) + answer([2, 41], [42, 43])
    by_hand += sum(log_p(q + r_hat[:t], r[0]) for t in range(len(r_hat)))
    assert loss == pytest.approx(-by_hand, rel=1e-4)


def test_derta_draws_each_length_and_none_that_does_not_fit():
    aligned, unaligned = Example([2, 5, 21, 9], 2, True), Example([2, 5, 31, 32, 33, 9], 2, True)
    draw = random.Random(0)
    for length, longest in ((99, 3), (5, 1)):
        examples = [derta.behind_prefix(aligned, unaligned, length, draw) for _ in range(99)]
        assert {example.start for example in examples} == set(range(2, 3 + longest))
        for example in examples:
            assert example.tokens == [2, 5, *[31, 32, 33][:example.start - 2], 21, 9]
