"""experiments/neighbours/gsae.py: graph, penalty and its gradient, steering, each by hand."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import same_when_resumed
from experiments.neighbours import gsae
from run.files import InputError
from sae import JumpReLU, load_sae
from saes.step import Spec, Trainer

SPEC = Spec("batchtopk", 24, 4, lr=5e-3, dead_after=10_000)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplacian_by_hand(rows, threshold):
    """Entry by entry."""
    m = len(rows)
    A = np.zeros((m, m))
    for i, j in itertools.permutations(range(m), 2):
        cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        A[i, j] = cosine if cosine >= threshold else 0
    L = np.eye(m)
    for i, j in zip(*A.nonzero()):
        L[i, j] -= A[i, j] / math.sqrt(A[i].sum() * A[j].sum())
    return L


def test_the_laplacian_entry_by_entry():
    """Of 12 rows, some joined, some opposite, one alone; its constant vector is D^½·1."""
    rows = torch.cat((random(3, 5).repeat(3, 1) + 0.3 * random(9, 5, seed=1), -random(2, 5),
                      torch.tensor([[0.0, 0, 0, 0, 9]])))
    L = gsae.laplacian(rows, 0.6)
    wanted = laplacian_by_hand(rows.double().numpy(), 0.6)
    assert np.allclose(L, wanted, atol=1e-5)
    assert (L != 0).sum() > 40 and torch.equal(L[-1], torch.eye(12)[-1])
    assert torch.linalg.eigvalsh(L)[0] == pytest.approx(0, abs=1e-5)


def texts(seed, size=640):
    """Inputs whose coordinates 0 and 1, and 2 and 3, share a mean over each text."""
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(size // 64, 1, 4, generator=draw)[..., [0, 0, 1, 1, 2, 3]]
    return (means + torch.randn(size // 64, 64, 6, generator=draw)).flatten(0, 1)


def training(steps=40):
    def buffers(cursor):
        return ((i + 1, {0: texts(i)}) for i in itertools.count(cursor))
    return gsae.GraphTraining(buffers, SPEC, steps, 32, 3)


def test_the_graph_is_of_the_means_of_64_tokens():
    run = training(1)
    list(run)
    x = texts(0).double()
    H = torch.stack([x[start:start + 64].mean(0) for start in range(0, 640, 64)])
    wanted = laplacian_by_hand(H.T.numpy(), 0.6)
    assert np.allclose(run.trainers[0].laplacian, wanted, atol=1e-4)
    # Single tokens join nothing, since there the noise outweighs what a text shares
    assert np.count_nonzero(wanted) >= 10
    assert np.count_nonzero(laplacian_by_hand(x.T.numpy(), 0.6)) == 6


def test_the_penalty_s_gradient_is_autograd_s(monkeypatch):
    monkeypatch.setattr(gsae, "WEIGHT", 0.7)
    mean, draw = torch.zeros(6), torch.Generator()
    plain = Trainer(SPEC, mean, draw.manual_seed(0))
    trainer = gsae.GraphTrainer(SPEC, mean, draw.manual_seed(0))
    L = trainer.laplacian = gsae.laplacian(random(6, 5), 0.1)
    x = random(20, 6, seed=2)
    loss, *_, grad = trainer.gradients(x)
    plain_loss, *_, plain_grad = plain.gradients(x)
    W = trainer.parameters["W_dec"].clone().requires_grad_()
    penalty = 0.7 * sum(w @ L @ w for w in W) / 24
    penalty.backward()
    assert torch.allclose(loss - plain_loss, penalty, atol=1e-5)
    assert torch.allclose(grad["W_dec"] - plain_grad["W_dec"], W.grad, atol=1e-5)
    assert W.grad.norm() > 0.1
    assert all(torch.equal(grad[name], plain_grad[name]) for name in ("W_enc", "b_enc", "b_dec"))


def test_training_smooths_the_decoder(monkeypatch, tmp_path):
    energies = []
    for weight in (0.0, 30.0):
        monkeypatch.setattr(gsae, "WEIGHT", weight)
        run = training()
        list(run)
        W, L = run.trainers[0].parameters["W_dec"], run.trainers[0].laplacian
        energies.append(float(torch.einsum("fi,ij,fj->f", W, L, W).mean()))
    assert energies[1] < 0.8 * energies[0]
    run.write(tmp_path)
    assert torch.allclose(load_sae(tmp_path, 0).W_dec, W)


def test_a_resumed_training_is_the_same(tmp_path):
    again = same_when_resumed(training, tmp_path, 23)
    assert "laplacian" in again.trainers[0].state()


def test_inputs_without_a_graph_are_refused():
    run = gsae.GraphTraining(lambda cursor: iter([(1, {5: random(640, 6)})]), SPEC, 9, 32, 0)
    with pytest.raises(InputError, match="--layers 5"):
        list(run)


@pytest.mark.parametrize("joined", [True, False])
def test_steering_is_the_sum_over_features(joined):
    """The formula token by token, of the five features of largest |Δ|."""
    W_dec = 3 * (random(1, 8) + random(9, 8, seed=1)) if joined else 2 * torch.eye(9, 8)
    sae = JumpReLU(torch.zeros(8, 9), torch.zeros(9), torch.zeros(9), W_dec, torch.zeros(8))
    delta = torch.tensor([0.1, -2, 0.3, 4, -5, 0.2, 1, -0.05, 0]).double()
    statistics = SimpleNamespace(delta=delta, score=lambda name: delta.abs())
    chosen = [4, 3, 1, 6, 2]
    V = [W_dec[f].double().numpy() / np.linalg.norm(W_dec[f]) for f in chosen]
    values, U = np.linalg.eigh(laplacian_by_hand(np.stack(V), 0.4))
    low = [j for j in range(5) if values[j] <= sorted(values)[2]]
    e = [sum(U[i, j] ** 2 for j in low) for i in range(5)]
    s = np.array([e[i] * abs(float(delta[f])) for i, f in enumerate(chosen)])
    s /= s.sum()
    x = random(2, 3, 8, seed=4)
    wanted = x.double().numpy().copy()
    for b, t in itertools.product(range(2), range(3)):
        token = x[b, t].double().numpy()
        for weight, v in zip(s, V):
            cosine = token @ v / np.linalg.norm(token)
            wanted[b, t] += 2.5 * np.linalg.norm(token) * weight * cosine * v
    found = gsae.edit(sae, statistics, 2.5, top_k=5)(x)
    assert np.allclose(found, wanted, atol=1e-4)
    assert (len(low) == 3) == joined
