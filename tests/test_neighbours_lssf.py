"""LSSF: entropy, rank and projector on spectra worked out by hand; the fused weight by an SVD."""

import math

import pytest
import torch

from conftest import random_gemma
from data import Example
from experiments.neighbours import lssf

REFUSALS = [Example([2, 5, 9, 7, 40, 41], 1, True), Example([2, 8, 30, 12], 2, True)]


def with_spectrum(values):
    """Z·Zᵀ with these σ, and the u_i."""
    size = len(values)
    U = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0))).Q
    U = U.double()
    return U @ torch.tensor(values, dtype=torch.float64).square().diag() @ U.T, U


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.8, 0.97, 1.0])
def test_rank_is_the_smallest_that_keeps_the_entropy(eta):
    values = [4.0, 2.0, 2.0, 1.0, 0.5, 0.0]
    ZZ, U = with_spectrum(values)
    powers = [value ** 2 / sum(each ** 2 for each in values) for value in values]
    terms = [-p * math.log(p) if p else 0 for p in powers]
    r = next(r for r in range(1, 7) if sum(terms[:r]) >= eta * sum(terms) - 1e-12)
    P = lssf.weighted_projector(ZZ, eta, 1.0)
    assert round(float(P.trace())) == r
    if r != 2:      # the second and third direction aren't told apart
        assert torch.allclose(P, U[:, :r] @ U[:, :r].T, atol=1e-9)


def test_directions_weigh_by_their_singular_values():
    ZZ, U = with_spectrum([5.0, 3.0, 2.0, 0.1])
    # r = 3: α_i = 1 + 2·(σ_i − 2)/(5 − 2), and U'·U'ᵀ has its square
    P = lssf.weighted_projector(ZZ, 0.99, 3.0)
    weights = torch.tensor([3.0, 1 + 2 / 3, 1.0], dtype=torch.float64)
    assert torch.allclose(P, U[:, :3] @ weights.square().diag() @ U[:, :3].T, atol=1e-9)
    # One direction alone has α_1
    ZZ, U = with_spectrum([5.0, 0.0, 0.0])
    wanted = 9 * torch.outer(U[:, 0], U[:, 0])
    assert torch.allclose(lssf.weighted_projector(ZZ, 0.9, 3.0), wanted, atol=1e-9)


def test_the_safety_vector_s_part_is_added_to_each_matrix():
    aligned, finetuned, unaligned = (random_gemma(seed=seed) for seed in (0, 1, 2))
    before = {name: value.clone() for name, value in finetuned.state_dict().items()}
    kept = {}
    hooks = [aligned.get_submodule(name).register_forward_pre_hook(
        lambda _, x, name=name: kept.setdefault(name, []).append(x[0][0].double()))
        for name in ("layers.1.self_attn.q_proj", "layers.2.mlp.down_proj")]
    for example in REFUSALS:
        aligned.hidden(torch.tensor([example.tokens]))
    for hook in hooks:
        hook.remove()
    lssf.fuse(aligned, finetuned, unaligned, REFUSALS, eta=0.6, alpha=0.5)
    for name, inputs in kept.items():
        X = torch.cat([x[example.start:] for x, example in zip(inputs, REFUSALS)]).T    # (in, n)
        safe, unsafe = (model.get_submodule(name).weight.double() for model in (aligned, unaligned))
        U, S, _ = torch.linalg.svd(safe @ X, full_matrices=False)
        p = S ** 2 / (S ** 2).sum()
        terms = -p * p.log()
        r = next(r for r in range(1, 8) if terms[:r].sum() >= 0.6 * terms.sum())
        assert 1 < r < len(S)
        step = 0.5 * U[:, :r] @ U[:, :r].T @ (safe - unsafe)
        wanted = before[f"{name}.weight"] + step
        assert torch.allclose(finetuned.get_submodule(name).weight.double(), wanted, atol=1e-5)
    for name, value in finetuned.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith("_proj.weight")
