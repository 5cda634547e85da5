"""saes/: gradients, what a step keeps true, the stream, exact resume, the commands, measuring."""

import functools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import same_when_resumed
from data import load_tokenizer
from experiments import concepts
from model import load_model
from run.files import InputError, read_json, read_jsonl, write_jsonl
from run.session import CHECKPOINT
from sae import SASA, JumpReLU, load_sae, strongest
from saes import measure as saes_measure
from saes import train as saes_train
from saes.measure import held_out, measure
from saes.step import REVIVAL, SASA_NUCLEAR, Spec, Trainer, nuclear_norm
from saes.stream import encode_item, stream
from saes.train import Training
from toy import world as toy

D, WIDTH = 12, 24
SPECS = {"batchtopk": Spec("batchtopk", WIDTH, 6), "topk": Spec("topk", WIDTH, 6),
         "jumprelu": Spec("jumprelu", WIDTH, 6, bandwidth=0.4),
         "sasa": Spec("sasa", WIDTH, 6, block=3, nuclear=0.3)}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n=40):
    return random(n, D, seed=1)


def trainer_of(name):
    """A trainer in float64 whose weights are in no special position."""
    trainer = Trainer(SPECS[name], torch.zeros(D), torch.Generator().manual_seed(0))
    for seed, (key, value) in enumerate(trainer.parameters.items()):
        value = value.double() + 0.2 * random(*value.shape, seed=seed).double()
        trainer.parameters[key] = F.normalize(value, dim=1) if key == "W_dec" else value
    return trainer


# Gradients
@pytest.mark.parametrize("dead", [[], [2, 3]])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_the_loss(name, dead):
    """Against autograd on the loss as the papers write it, with the gate held constant. Units that
    are dead learn what the others leave: the target of the auxiliary loss is the error."""
    trainer, x, spec = trainer_of(name), inputs().double(), SPECS[name]
    p, r = trainer.parameters, spec.block
    trainer.silent[dead] = 1e9
    loss, error, codes, grad = trainer.gradients(x, done=0.0)  # no L0 penalty yet
    gate = (codes != 0).double()
    assert 0.15 < gate.mean() < 0.6
    for key in WEIGHTS:
        p[key].requires_grad_()
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    wanted = (x - (h * gate @ p["W_dec"] + p["b_dec"])).square().sum(1).mean()
    if spec.nuclear:
        singular_values = torch.linalg.svdvals(p["W_dec"].unflatten(0, (-1, r)))
        wanted = wanted + spec.nuclear * singular_values.sum(1).mean()
    if dead:
        z = h[:, 2 * r:4 * r] if name == "sasa" else h[:, 2:4].clamp(min=0)
        if max(spec.active, D // (4 * r)) < 2:  # of the two dead units the stronger
            z = z * strongest(z.detach().unflatten(1, (-1, r)), 1).repeat_interleave(r, 1)
        left = error + z @ p["W_dec"][2 * r:4 * r]
        wanted = wanted + (1 if name == "sasa" else REVIVAL) * left.square().sum(1).mean()
    assert torch.allclose(loss, wanted, rtol=1e-5)
    for key, g in zip(WEIGHTS, torch.autograd.grad(wanted, [p[key] for key in WEIGHTS])):
        assert torch.allclose(grad[key], g, rtol=1e-5, atol=1e-6), key


def test_the_thresholds_estimator_is_the_gradient_of_the_smoothed_step():
    """1[h > θ] is smoothed to H = clamp((h − θ)/ε + ½, 0, 1). In the band the codes are θ·H, since
    f jumps by θ there. Central differences of the loss, to first order in H, are the estimator."""
    trainer, x = trainer_of("jumprelu"), inputs().double()
    spec, p = trainer.spec, trainer.parameters
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    theta = p["log_theta"].exp()
    f = h * (h > theta)
    slope = 2 / len(x) * (f @ p["W_dec"] + p["b_dec"] - x) @ p["W_dec"].T  # of the loss by f
    l0 = (f != 0).sum() / len(x)

    def smoothed(log_theta):
        H = ((h - log_theta.exp()) / spec.bandwidth + 0.5).clamp(0, 1)
        penalty = 2 * (l0 / spec.l0 - 1) / spec.l0 * H.sum() / len(x)
        return (slope * theta * H).sum() + penalty
    *_, grad = trainer.gradients(x, done=1.0)
    for step in 1e-7 * torch.eye(WIDTH).double():
        wanted = (smoothed(p["log_theta"] + step) - smoothed(p["log_theta"] - step)) / 2e-7
        i = step.argmax()
        assert math.isclose(grad["log_theta"][i], wanted, rel_tol=1e-4, abs_tol=1e-6), i


def test_nuclear_norm_where_rank_is_lost():
    norms, slope = nuclear_norm(torch.zeros(2, 3, 8))
    assert slope.isfinite().all() and norms.max() < 0.01


# A step
@pytest.mark.parametrize("name", SPECS)
def test_what_a_step_keeps_true(name):
    """L0, signs and blocks of the codes; vectors of unit length, no gradient along them."""
    trainer, x = Trainer(SPECS[name], torch.zeros(D), torch.Generator().manual_seed(0)), inputs(400)
    for step in range(20):
        before = {key: value.clone() for key, value in trainer.parameters.items()}
        metrics = trainer.step(x, step / 20)
    for key, dim in (("W_dec", 1), ("W_enc", 0)):
        W = trainer.parameters[key]
        has_unit_length = torch.allclose(W.norm(dim=dim), torch.ones(WIDTH), atol=1e-6)
        has_slope_along = (W.grad * before[key]).sum(dim).abs().max() > 1e-6 * W.grad.norm()
        is_held = key == "W_dec" or name == "sasa"
        assert has_unit_length == is_held != has_slope_along
        assert not torch.equal(W, before[key])
    *_, codes, _ = trainer.gradients(x)
    counts = (codes != 0).sum(1)
    assert (codes < 0).any() == (name == "sasa")
    if name in ("sasa", "topk"):
        assert (counts == 6).all()
    elif name == "batchtopk":
        assert counts.sum() == 6 * 400 and counts.min() < 6 < counts.max()
    in_blocks = (codes != 0).unflatten(1, (-1, SPECS[name].block))
    assert torch.equal(in_blocks.any(2), in_blocks.all(2))
    assert math.isclose(metrics["l0"], counts.float().mean(), rel_tol=0.1)


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "sasa"])
def test_folded_arrays_give_the_codes_of_training(name):
    """Scale and b_dec folded in: codes and reconstruction of x·c are c times those of x."""
    spec, c, x = SPECS[name], 37.0, inputs(400) + 0.3
    trainer = Trainer(spec, torch.full((D,), 0.3), torch.Generator().manual_seed(0))
    for step in range(60):
        trainer.step(x, step / 60)
    arrays = trainer.arrays(torch.tensor(c))
    sae = SASA(**arrays, block=3, active=2) if name == "sasa" else JumpReLU(**arrays)
    _, error, f, _ = trainer.gradients(x)
    codes = sae.encode(c * x)
    if name == "batchtopk":  # the threshold of training is the batch's own
        assert abs((codes > 0).sum() / (f > 0).sum() - 1) < 0.15
        both = (codes > 0) & (f > 0)
        assert torch.allclose(codes[both], c * f[both], rtol=1e-3, atol=1e-3)
    else:
        assert torch.allclose(codes, c * f, rtol=1e-3, atol=1e-3)
        assert torch.allclose(sae.decode(codes) - c * x, c * error, rtol=1e-3, atol=2e-3)


# The stream
@pytest.fixture(scope="module")
def small(mini):
    """A random model of three layers, the toy's tokenizer, and conversations."""
    items = [(("user", f"how can i {verb} the vault?"), ("model", "sorry, i can't help you."))
             for verb in ("steal", "paint", "break")] * 5
    return SimpleNamespace(model=load_model(mini), tokenizer=load_tokenizer(mini), items=items)


def stream_of(small, layers, buffer=100):
    return functools.partial(stream, small.model, small.tokenizer, lambda: iter(small.items),
                             layers, buffer, 40)


def test_activations_are_the_models_own_without_bos_and_padding(small):
    cursor, activations = next(stream_of(small, (2, 0))(0))
    tokens = [encode_item(small.tokenizer, item, 40)[0] for item in small.items[:cursor]]
    assert sum(len(ids) - 1 for ids in tokens) == len(activations[0]) == len(activations[2]) >= 100
    wanted = [small.model.hidden(torch.tensor([ids]), capture=(2,))[1][2][0, 1:] for ids in tokens]
    wanted, found = torch.cat(wanted), activations[2]
    assert torch.allclose(found[found[:, 0].argsort()], wanted[wanted[:, 0].argsort()], atol=1e-4)


def test_the_stream_is_a_function_of_its_cursor_and_stops_at_the_deepest_layer(small):
    handle = small.model.layers[2].register_forward_hook(lambda *_: pytest.fail("block 2 ran"))
    buffers = stream_of(small, (1,))(0)
    first, _ = next(buffers)
    cursor, second = next(buffers)
    assert torch.equal(next(stream_of(small, (1,))(first))[1][1], second[1])
    for _ in range(6):  # past the end: from the beginning
        cursor, more = next(buffers)
    assert cursor > len(small.items) and len(more[1]) >= 100
    handle.remove()
    for items in ([], ["", ""]):
        with pytest.raises(InputError, match="no document with text"):
            next(stream_of(SimpleNamespace(**vars(small) | {"items": items}), (0,))(0))


# Resuming, and the commands
@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "sasa"])
def test_a_resumed_training_is_the_same_bit_for_bit(name, tmp_path, small):
    def make():
        spec = Spec(name, 48, 6, block=3 if name == "sasa" else 1, dead_after=100)
        return Training(stream_of(small, (0, 1), buffer=150), spec, 20, 40, 3)
    again = same_when_resumed(make, tmp_path, 11)

    # One that has diverged leaves the checkpoint as it was
    before = (tmp_path / CHECKPOINT).read_bytes()
    again.trainers[0].parameters["b_dec"][0] = torch.nan
    with pytest.raises(InputError, match="step 20: training has diverged"):
        again.save(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_the_commands_train_resume_measure_and_refuse(mini, tmp_path, monkeypatch, capsys):
    """In this process, so that PyTorch is imported once; SIGTERM arrives in the tenth step."""
    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["saes", "--model", *map(str, (mini, *words))])
        return main()

    def train(name, *words):
        return run(saes_train.main, "--layers", 0, 1, "--data", mini / "train.jsonl", "--width", 96,
                   "--l0", 8, "--token-count", 6000, "--batch", 200,
                   "--out", tmp_path / name, *words)
    assert not train("a", "--architecture", "sasa")
    sasa = load_sae(tmp_path / "a", 1, 96)
    assert sasa.active == 2 and torch.allclose(sasa.W_enc.norm(dim=0), torch.ones(96))
    about = read_json(tmp_path / "a/layer_1/width_96/average_l0_8/sasa.json")
    assert about["nuclear"] == SASA_NUCLEAR > 0
    assert read_jsonl(tmp_path / "a/metrics.jsonl")[-1]["step"] == 30

    for words, message in ((["--block", 4], "--architecture sasa"), (["--l0", 0], "--l0 0"),
                           (["--architecture", "sasa", "--block", 5], "--block 5"),
                           (["--layers", 9], "0 to 2")):
        with pytest.raises(InputError, match=message):
            train("x", *words)

    # Measure them
    out = tmp_path / "figures.json"
    assert not run(saes_measure.main, tmp_path / "a", "--data", mini / "train.jsonl")
    assert capsys.readouterr().out.count("24 blocks of 4, 2 a token") == 2
    write_jsonl(tmp_path / "concepts.jsonl", [
        {"tokens": [2, *range(110, 140)], "labels": {"even": "-" + "10" * 15}}])
    words = ("--concepts", tmp_path / "concepts.jsonl", "--out", out)
    assert not run(concepts.main, tmp_path / "a", *words)
    assert [row["positive"] for row in read_json(out, list)] == [0.5, 0.5]

    # Stopped and resumed against unbroken
    signals = iter([None] * 9 + [15])

    class Later:
        caught = property(lambda self: next(signals, None))
    with monkeypatch.context() as patch:
        patch.setattr(saes_train, "Signals", Later)
        assert train("b") == 128 + 15
    with pytest.raises(InputError, match="no training of these settings"):
        train("b", "--seed", 1)
    assert not train("b") and not train("c")
    assert "going on at step 10 of 30" in capsys.readouterr().out
    b, c = (load_sae(tmp_path / name, 0, 96) for name in "bc")
    assert torch.equal(b.W_enc, c.W_enc) and torch.equal(b.threshold, c.threshold)


# Measuring
@pytest.fixture(scope="module")
def rows(small):
    return held_out(small.tokenizer, toy.World(0).corpus(12, "eval"), 96, 500)


def test_perfect_saes_lose_nothing(small, rows):
    """Codes of x and −x, which together give x back; and a SASA all of whose blocks stay."""
    eye = torch.eye(64)
    pair = JumpReLU(torch.cat((eye, -eye), 1), torch.zeros(128), torch.zeros(128),
                    torch.cat((eye, -eye)), torch.zeros(64), layer=1)
    W = torch.linalg.qr(random(64, 64)).Q.T
    sasa = SASA(W.T.contiguous(), torch.zeros(64), W, torch.zeros(64), 4, 16, layer=1)
    for sae, l0 in ((pair, 64), (sasa, 64)):
        row = measure(small.model, small.tokenizer, sae, rows)
        assert row["ev"] == pytest.approx(1, abs=1e-5) and row["l0"] == pytest.approx(l0, abs=0.1)
        assert row["dead"] == 0
        assert row["ce"]["spliced"] == pytest.approx(row["ce"]["clean"], abs=1e-4)
        assert row["recovered"] == pytest.approx(1, abs=0.01)
        assert not small.model.layers[1]._forward_hooks


def test_an_sae_that_writes_the_mean_explains_nothing(small, rows):
    tokens, documents, labels = (torch.cat([getattr(row, name) for row in rows])
                                 for name in ("tokens", "documents", "labels"))
    counted = (documents > 0) & (tokens != small.tokenizer.bos)
    x = small.model.hidden(tokens, documents, capture=(1,))[1][1][counted]
    sae = JumpReLU(torch.zeros(64, 5), torch.zeros(5), torch.ones(5), torch.zeros(5, 64), x.mean(0),
                   layer=1)
    row = measure(small.model, small.tokenizer, sae, rows)
    assert abs(row["ev"]) < 1e-5 and row["l0"] == 0 and row["dead"] == 1
    assert row["tokens"] == int(counted.sum())
    logits = small.model(tokens, documents).flatten(0, 1)
    plain = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    assert row["ce"]["clean"] == pytest.approx(plain.item(), rel=1e-4)
