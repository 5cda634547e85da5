"""experiments/neighbours/: each method against its formula on whole matrices, or peft's own."""

import pytest
import torch

import lora
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
