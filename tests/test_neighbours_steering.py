"""experiments/neighbours/steering.py: the direction and where it is added, by hand."""

import pytest
import torch
from conftest import random_gemma

from data import Example
from experiments.neighbours import steering
from features import feature_statistics
from run.files import InputError
from sae import SASA, JumpReLU
from safety.ask import steered


def example(start, seed):
    draw = torch.Generator().manual_seed(seed)
    return Example(torch.randint(5, 300, (12,), generator=draw).tolist(), start, True)


@pytest.fixture
def pairs():
    return [(example(4, 2 * i), example(4, 2 * i + 1)) for i in range(5)]


def sae_of(kind, seed=0):
    draw = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(shape, generator=draw) for shape in ((64, 32), (32, 64)))
    zeros = torch.zeros(32), torch.zeros(64)
    if kind == "sasa":
        return SASA(W_enc, zeros[0], W_dec, zeros[1], block=4, active=2)
    return JumpReLU(W_enc, zeros[0], torch.full((32,), 5.0), W_dec, zeros[1])


@pytest.mark.parametrize("kind", ["jumprelu", "sasa"])
def test_the_direction_is_the_decoded_difference_of_the_chosen_features(kind, pairs):
    model, sae = random_gemma(), sae_of(kind)
    # All response tokens of a side in one pile
    means = []
    for side in (0, 1):
        codes = []
        for pair in pairs:
            _, residuals = model.hidden(torch.tensor([pair[side].tokens]), capture=[1])
            codes.append(sae.encode(residuals[1][0, 4:]))
        means.append(torch.cat(codes).mean(0))
    delta = means[0] - means[1]                                       # (F)
    blocks = delta.view(-1, sae.block)
    chosen = blocks.norm(dim=1).topk(3).indices
    kept = torch.zeros_like(blocks)
    kept[chosen] = blocks[chosen]
    wanted = -1.5 * kept.flatten() @ sae.W_dec
    statistics = feature_statistics(model, {1: sae}, pairs)
    found = steering.directions({1: sae}, statistics, -1.5, top_k=3)
    assert found.keys() == {1} and wanted.norm() > 0
    torch.testing.assert_close(found[1], wanted, rtol=1e-3, atol=1e-3)
    assert 0 < (kept != 0).any(1).sum() < len(blocks)


def test_layers_are_steered_at_once_and_restored(pairs):
    model = random_gemma()
    tokens = torch.tensor([pairs[0][0].tokens])
    steps = {1: torch.full((64,), 2.0), 3: torch.arange(64.0)}
    plain = model(tokens)
    with steered(model, steps):
        logits = model(tokens)
    hooks = [model.layers[layer].register_forward_hook(lambda _, inputs, x, step=step: x + step)
             for layer, step in steps.items()]
    torch.testing.assert_close(logits, model(tokens))
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(tokens), plain) and (logits - plain).abs().max() > 0.1


def test_a_layer_without_an_sae_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["steering", "--layers", "7"])
    with pytest.raises(InputError, match="--layers"):
        steering.main()
