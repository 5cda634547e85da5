"""experiments/neighbours/sspu.py: features, rows, objective and update, each by hand."""

import copy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lora
from conftest import command
from data import Example, Row
from experiments import ablate
from experiments.neighbours import sspu
from features import load_subspaces
from fused import IGNORE
from model import load_model
from run.files import ROOT
from sae import JumpReLU

FORGET = [Example([2, 5, 9, 7, 11], 2, True), Example([2, 8, 30, 31], 1, True)]
KEEP = [Example([2, 5, 9, 40, 41, 42], 2, True), Example([2, 6, 12], 1, True)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(model, example, layer):
    return model.hidden(torch.tensor([example.tokens]), capture=[layer])[1][layer][0].detach()


def test_features_at_both_ends_of_the_order():
    sae = JumpReLU(random(6, 5), torch.zeros(5), torch.zeros(5), random(5, 6, seed=1),
                   torch.zeros(6))
    delta = torch.tensor([0.1, -3, 2, -1, 0], dtype=torch.float64)
    choices = sspu.relevant(None, {4: sae}, None, {4: SimpleNamespace(delta=delta)},
                            SimpleNamespace(rank=2))
    assert choices[4, "writers"].features.tolist() == [1, 3]
    assert choices[4, "writers"].scores.tolist() == [3, 1]
    assert set(choices[4, "readers"].features.tolist()) == {0, 2}
    for choice in choices.values():
        rows = sae.W_dec[choice.features]
        assert torch.allclose(choice.U.T @ choice.U, torch.eye(2), atol=1e-6)
        assert torch.allclose(rows @ choice.U @ choice.U.T, rows, atol=1e-5)


def test_the_objective_token_by_token(gemma):
    """Rows by turns; at an update, each token's two streams come from forwards of their own."""
    pairs = [(KEEP[0], FORGET[0]), (KEEP[1], None), (KEEP[0], FORGET[1])]
    rows = sspu.forget_and_keep(pairs, 16, seed=0, epoch=0)
    kinds = [row.labels[row.labels != IGNORE].unique().tolist() for row in rows]
    assert kinds == [[1], [0]] * (len(rows) // 2)
    base = copy.deepcopy(gemma)
    lora.add_lora(gemma, 4, 4, "random", generator=torch.Generator().manual_seed(0))
    for layer in lora.lora_layers(gemma).values():
        layer.B.data = random(*layer.B.shape)
    U_N = torch.linalg.qr(random(gemma.config.hidden_size, 3)).Q
    loss = sspu.objective(1, U_N, seed=5)
    c = U_N @ U_N.T @ random(len(U_N), seed=5)
    total = sum(loss(gemma, Row(*(part[None] for part in vars(row).values()))).item()
                for row in rows)
    # As train.row_loss counts: the places before an answer's tokens
    by_hand = 0.0
    for example in (*FORGET, KEEP[0], KEEP[1], KEEP[0]):
        h, h_0 = (stream(model, example, 1) for model in (gemma, base))
        for t in range(example.start - 1, len(example.tokens) - 1):
            length = h_0[t].norm()
            target = length * c / c.norm() if example in FORGET else h_0[t]
            by_hand += float(((h[t] - target) / length).square().sum())
    assert total == pytest.approx(by_hand, rel=1e-4)


def test_an_update_stays_in_the_features_span(world):
    model = copy.deepcopy(world.model)
    _, bases, steps = ablate.fine_tuned(world, model, "sspu", 1e-2, 0)
    assert len(list(steps)) == 2
    for name, layer in lora.lora_layers(model).items():
        late = int(name.split(".")[1]) > 1
        assert late == (layer.update.norm() == 0) and name.endswith(("o_proj", "down_proj"))
        assert late or lora.update_share(layer, bases[name]) == pytest.approx(1, abs=1e-5)


def test_the_command_unlearns_with_writers_alone(mini, tmp_path):
    """Blocks up to the SAE's get an adapter inside the span that subspace.safetensors holds."""
    def forked(*flags):
        words = [sys.executable, "-m", "experiments.neighbours.sspu", *command(mini, tmp_path),
                 "--steps", "1", "--lr", "1e-2", "--select", "relevant", "--freeze-basis", *flags]
        return subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)

    error = forked().stderr
    assert "give --select relevant --freeze-basis --targets o_proj down_proj" in error
    shutil.rmtree(tmp_path)
    done = forked("--targets", "o_proj", "down_proj")
    assert done.returncode == 0, done.stderr
    layers = lora.load_adapter(load_model(mini), tmp_path)
    U_R = load_subspaces(tmp_path / "subspace.safetensors")[0, "writers"]
    moved = {name for name, layer in layers.items() if layer.update.norm() > 0}
    assert moved == {"layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"}
    for name in moved:
        assert lora.update_share(layers[name], U_R) == pytest.approx(1, abs=1e-5)
