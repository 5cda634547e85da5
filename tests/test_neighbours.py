"""neighbours.py against the formulas written down on whole matrices."""

import torch
import lora
from experiments import neighbours


def adapted(model):
    layers = lora.add_lora(model, 6, 3, "random", generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.B.data.normal_(0, 0.1, generator=draw)
    return layers


def test_lox_extrapolates_the_leading_part(gemma):
    layers = adapted(gemma)
    before = {name: layer.update.detach().clone() for name, layer in layers.items()}
    neighbours.lox(gemma, 2, 1.25)
    for name, layer in layers.items():
        U, S, V = torch.linalg.svd(before[name], full_matrices=False)
        wanted = before[name] + 1.25 * U[:, :2] @ (S[:2, None] * V[:2])
        assert (layer.update - wanted).norm() < 1e-5 * wanted.norm() and layer.rank == 6


def test_rosi_adds_the_direction_to_writers_alone(gemma):
    layers = adapted(gemma)
    before = {name: value.clone() for name, value in gemma.state_dict().items()}
    s = torch.randn(64, generator=torch.Generator().manual_seed(2)) * 3
    neighbours.rosi(gemma, s, 0.7)
    for name, value in gemma.state_dict().items():
        W = before[name]
        writes = name.endswith(("o_proj.base.weight", "down_proj.weight"))
        whole = W + layers[name.removesuffix(".base.weight")].update if "o_proj.base" in name else W
        wanted = W + 0.7 * torch.outer(s / s.norm(), whole.mean(0)) if writes else W
        assert torch.allclose(value, wanted, atol=1e-6) and torch.equal(value, W) != writes


def test_harms_direction_is_a_difference_of_means(gemma):
    harmful, harmless = [[2, 5, 9], [2, 7]], [[2, 4, 4, 8]]
    last = [gemma.hidden(torch.tensor([ids]), capture=[1])[1][1][0, -1] for ids in harmful + harmless]
    assert gemma.config.num_hidden_layers // 2 - 1 == 1
    found = neighbours.harm_direction(gemma, harmful, harmless)
    assert torch.allclose(found.float(), (last[0] + last[1]) / 2 - last[2], atol=1e-5)


def test_average_by_hand():
    factors = [("a", torch.ones(2, 3)), ("b", torch.zeros(4))]
    kept = {}
    neighbours.average(kept, factors, 0.9)
    for _, factor in factors:
        factor += 1
    neighbours.average(kept, factors, 0.9)
    assert torch.allclose(kept["a"], torch.tensor(1.1)) and torch.allclose(kept["b"], torch.tensor(0.1))
