"""sae_step.py and sae_train.py: gradients against float64, what a step keeps true, the stream, resuming, the layout, the command."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_gemma

from saes import train as sae_train
from data import load_tokenizer
from data import read_items
from run.files import InputError, read_json, write_jsonl
from sae import SASA, JumpReLU, load_sae, strongest
from saes.step import Spec, Trainer, least_kept, nuclear_norm, ranks
from saes.train import CHECKPOINT, Stream, Training, encode_item

D, WIDTH = 12, 24
SPECS = {"batchtopk": Spec("batchtopk", WIDTH, 6), "topk": Spec("topk", WIDTH, 6), "jumprelu": Spec("jumprelu", WIDTH, 6, bandwidth=0.4),
         "sasa": Spec("sasa", WIDTH, 6, block=3, nuclear=0.3)}


def trainer_of(spec, seed=0, dtype=torch.float64):
    """A Trainer in float64 with weights that are in no special position."""
    draw = torch.Generator().manual_seed(seed)
    trainer = Trainer(spec, torch.zeros(D), draw)
    for name, value in trainer.parameters.items():
        noise = 0.2 * torch.randn(value.shape, generator=draw, dtype=dtype)
        trainer.parameters[name] = (F.normalize(value.to(dtype) + noise, dim=1) if name == "W_dec" else value.to(dtype) + noise)
    return trainer


def inputs(n=40, seed=1, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_loss(trainer, x, keep):
    """The loss as the papers write it, which units stay given by `keep` (N, F); differentiable in all weights but θ."""
    p, spec = trainer.parameters, trainer.spec
    f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * keep
    loss = (x - (f @ p["W_dec"] + p["b_dec"])).square().sum(1).mean()
    if spec.nuclear:
        blocks = p["W_dec"].unflatten(0, (-1, spec.block))
        loss = loss + spec.nuclear * torch.linalg.svdvals(blocks).sum(1).mean()
    return loss


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_the_loss(name):
    """Against autograd on the plain formula, and one number of each tensor against central differences."""
    trainer, x = trainer_of(SPECS[name]), inputs()
    loss, _, f, grad = trainer.gradients(x.clone(), done=0.0)                       # no L0 penalty yet
    keep = (f != 0).double()
    assert 0.15 < keep.mean() < 0.6
    p = trainer.parameters
    names = [n for n in p if n != "log_theta"]
    for n in names:
        p[n].requires_grad_()
    wanted = plain_loss(trainer, x, keep)
    assert torch.allclose(loss, wanted, rtol=1e-5)
    for n, g in zip(names, torch.autograd.grad(wanted, [p[n] for n in names])):
        assert torch.allclose(grad[n], g, rtol=1e-5, atol=1e-6), n
    with torch.no_grad():
        for n in names:
            at = (3,) * p[n].dim()
            sides = []
            for sign in (1, -1):
                p[n][at] += sign * 1e-5
                sides.append(plain_loss(trainer, x, keep))
                p[n][at] -= sign * 1e-5
            assert math.isclose((sides[0] - sides[1]) / 2e-5, grad[n][at], rel_tol=1e-4, abs_tol=1e-6), n


def test_the_thresholds_estimator_is_the_gradient_of_the_smoothed_step():
    """1[h > θ] smoothed to H = clamp((h − θ)/ε + ½, 0, 1) has dH/dθ = −1/ε in |h − θ| < ε/2; finite differences of the
    loss in H, the codes θ·H inside the band (that is where f jumps by θ), must give the estimator."""
    spec = Spec("jumprelu", WIDTH, 6, bandwidth=0.4, sparsity=0.7, warmup=0.1)
    trainer, x = trainer_of(spec), inputs()
    p = trainer.parameters
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    theta = p["log_theta"].exp()
    f = h * (h > theta)
    g = 2 / len(x) * (f @ p["W_dec"] + p["b_dec"] - x)                               # of the loss by x̂
    l0, slope = (f != 0).sum() / len(x), g @ p["W_dec"].T

    def smoothed(log_theta):
        """The loss to first order in the codes' and L0's change, both through H."""
        H = ((h - log_theta.exp()) / spec.bandwidth + 0.5).clamp(0, 1)
        codes, count = theta * H, H.sum() / len(x)
        return (slope * codes).sum() + 2 * spec.sparsity * (l0 / spec.l0 - 1) / spec.l0 * count

    *_, grad = trainer.gradients(x.clone(), done=1.0)
    for i in range(WIDTH):
        e = torch.zeros(WIDTH, dtype=torch.float64)
        e[i] = 1e-7
        wanted = (smoothed(p["log_theta"] + e) - smoothed(p["log_theta"] - e)) / 2e-7
        assert math.isclose(grad["log_theta"][i], wanted, rel_tol=1e-4, abs_tol=1e-6), i
    assert grad["log_theta"].abs().max() > 0.01


@pytest.mark.parametrize("name", SPECS)
def test_dead_units_learn_what_the_others_leave(name):
    """The auxiliary loss against autograd: its target is the error, a constant."""
    trainer, x = trainer_of(SPECS[name]), inputs()
    p, spec, r = trainer.parameters, trainer.spec, trainer.spec.block
    *_, without = trainer.gradients(x.clone(), done=0.0)
    trainer.silent[2:4] = 1e9                                                        # two dead units
    _, error, _, grad = trainer.gradients(x.clone(), done=0.0)
    dead = torch.arange(2 * r, 4 * r)
    for n in ("W_enc", "b_enc", "W_dec", "b_dec"):
        p[n].requires_grad_()
    h = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])[:, dead]
    z = h if name == "sasa" else h.clamp(min=0)
    kept = max(spec.active, D // (4 * r))
    if kept < 2:                                                                     # of the two dead units the stronger
        z = z * strongest(z.detach().unflatten(1, (-1, r)), 1).repeat_interleave(r, 1)
    aux = spec.revival * (error + z @ p["W_dec"][dead]).square().sum(1).mean()
    for n, g in zip(("W_enc", "b_enc", "W_dec", "b_dec"), torch.autograd.grad(aux, [p[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")])):
        assert torch.allclose(grad[n] - without[n], g, rtol=1e-5, atol=1e-7), n
    assert (grad["W_dec"] - without["W_dec"])[dead].abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------------
# Nuclear norm

def test_nuclear_norm_and_its_gradient():
    """Against the singular values, against finite differences, and on a matrix worked out by hand."""
    blocks = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, slope = nuclear_norm(blocks, ridge=0)
    assert torch.allclose(value, torch.linalg.svdvals(blocks).sum(1), rtol=1e-12)
    U, _, V = torch.linalg.svd(blocks, full_matrices=False)
    assert torch.allclose(slope, U @ V, atol=1e-10)                                  # the polar factor
    value, slope = nuclear_norm(blocks)
    for at in [(0, 0, 0), (3, 2, 5), (4, 1, 7)]:
        e = torch.zeros_like(blocks)
        e[at] = 1e-6
        wanted = (nuclear_norm(blocks + e)[0].sum() - nuclear_norm(blocks - e)[0].sum()) / 2e-6
        assert math.isclose(slope[at], wanted, rel_tol=1e-6, abs_tol=1e-9)
    value, slope = nuclear_norm(torch.tensor([[[3.0, 0, 0], [0, 4, 0]]], dtype=torch.float64), ridge=0)
    assert math.isclose(value.item(), 7) and torch.allclose(slope[0], torch.eye(3, dtype=torch.float64)[:2])


def test_nuclear_norm_of_blocks_that_lost_rank_is_finite():
    blocks = torch.zeros(2, 3, 8)
    blocks[0] = F.normalize(torch.arange(8.0), dim=0)
    value, slope = nuclear_norm(blocks)
    assert slope.isfinite().all() and abs(value[0] - 3 ** 0.5) < 0.01 and value[1] < 0.01


def test_ranks_of_known_blocks():
    one = F.normalize(torch.arange(1.0, 9), dim=0)
    stable, effective = ranks(torch.stack([torch.eye(8)[:4], one.expand(4, 8), torch.diag(torch.tensor([2.0, 1, 1, 1, 0, 0, 0, 0]))[:4]]))
    assert torch.allclose(stable, torch.tensor([4.0, 1, 7 / 4]), atol=1e-4)
    assert torch.allclose(effective[:2], torch.tensor([4.0, 1]), atol=1e-3) and 1 < effective[2] < 4


# ---------------------------------------------------------------------------------------------------------------
# A step

@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 50.0])
def test_least_kept_is_exact_whatever_the_guess(guess):
    h = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for count in (1, 7, 300, 900):
        assert least_kept(h, count, torch.tensor(guess)) == h.flatten().sort(descending=True).values[count - 1].clamp(min=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_sparsity_and_unit_rows(name):
    spec = SPECS[name]
    trainer, x = Trainer(spec, torch.zeros(D), torch.Generator().manual_seed(0)), inputs(400, dtype=torch.float32)
    for step in range(20):
        before, metrics = trainer.parameters["W_dec"].clone(), trainer.step(x, step / 20)
    W = trainer.parameters["W_dec"]
    assert torch.allclose(W.norm(dim=1), torch.ones(WIDTH), atol=1e-6) and not torch.equal(W, before)
    *_, f, _ = trainer.gradients(x)
    counts = (f != 0).sum(1)
    if name == "sasa":
        assert (counts == 6).all() and ((f != 0).unflatten(1, (-1, 3)).sum(2) % 3 == 0).all() and (f < 0).any()
    elif name == "topk":
        assert (counts == 6).all() and (f >= 0).all()
    elif name == "batchtopk":
        assert counts.sum() == 6 * 400 and counts.min() < 6 < counts.max() and (f >= 0).all()
    assert math.isclose(metrics["l0"], counts.float().mean(), rel_tol=0.1)


def test_the_gradient_along_a_decoder_row_is_removed(monkeypatch):
    trainer, x = Trainer(SPECS["batchtopk"], torch.zeros(D), torch.Generator().manual_seed(0)), inputs(400, dtype=torch.float32)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    trainer.step(x, 0.5)
    g, W = trainer.parameters["W_dec"].grad, trainer.parameters["W_dec"]
    assert (g * W).sum(1).abs().max() < 1e-6 * g.norm() and g.norm() > 0.01


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "sasa"])
def test_folded_arrays_give_the_codes_of_training(name):
    """Scale and b_dec folded in: codes and reconstruction of x·c are c times those of x."""
    spec, c = SPECS[name], 37.0
    trainer, x = Trainer(spec, torch.full((D,), 0.3), torch.Generator().manual_seed(0)), inputs(400, dtype=torch.float32) + 0.3
    for step in range(60):
        trainer.step(x, step / 60)
    arrays = trainer.arrays(torch.tensor(c))
    sae = SASA(**arrays, block=spec.block, active=spec.active) if name == "sasa" else JumpReLU(**arrays)
    _, error, f, _ = trainer.gradients(x.clone())
    codes = sae.encode(c * x)
    if name == "batchtopk":                                                          # training's threshold is the batch's own
        assert abs((codes > 0).sum() / (f > 0).sum() - 1) < 0.15
        both = (codes > 0) & (f > 0)
        assert torch.allclose(codes[both], c * f[both], rtol=1e-3, atol=1e-3)
    else:
        assert torch.allclose(codes, c * f, rtol=1e-3, atol=1e-3)
        assert torch.allclose(sae.decode(codes) - c * x, c * error, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu"])
def test_parity_with_sae_lens_from_the_written_arrays(name, tmp_path):
    lens = pytest.importorskip("sae_lens")
    training = Training(lambda cursor: (cursor, {2: inputs(800, dtype=torch.float32) * 5 + 1}), SPECS[name], 80, 200, 0)
    for _ in training:
        pass
    path = training.write(tmp_path)[2]
    sae = load_sae(tmp_path, 2, WIDTH)
    theirs = lens.JumpReLUSAE(lens.JumpReLUSAEConfig(d_in=D, d_sae=WIDTH, apply_b_dec_to_input=False))
    import numpy as np
    with np.load(path) as file:
        theirs.load_state_dict({key: torch.from_numpy(file[key]) for key in file})
    x = inputs(100, seed=5, dtype=torch.float32) * 5 + 1
    with torch.no_grad():
        wanted = theirs.encode(x)
        assert 0.1 < (wanted > 0).float().mean() < 0.6
        assert (sae.encode(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert torch.allclose(sae.decode(wanted), theirs.decode(wanted), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Directions set by hand

@pytest.mark.parametrize("name", ["batchtopk", "jumprelu"])
def test_an_sae_finds_directions_set_by_hand(name):
    """Eight orthogonal directions, two active at a time, far from the origin: what training, the threshold, the fold
    of b_dec and that of the scale must get right together."""
    draw = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0][:8]
    which = torch.rand(4000, 8, generator=draw).topk(2).indices
    x = torch.zeros(4000, 8).scatter(1, which, 1 + 2 * torch.rand(4000, 2, generator=draw)) @ directions + 5
    training = Training(lambda cursor: (cursor, {0: x}), Spec(name, 16, 2, lr=5e-3), 600, 512, 0)
    for _ in training:
        pass
    arrays = training.trainers[0].arrays(training.scale[0])
    sae = JumpReLU(**arrays)
    assert (arrays["W_dec"] @ directions.T).max(0).values.min() > 0.9
    f = sae.encode(x)
    assert abs((f > 0).sum(1).float().mean() - 2) < 0.4
    assert (sae.decode(f) - x).square().sum() / (x - x.mean(0)).square().sum() < 0.1


def test_sasa_finds_planes_set_by_hand():
    draw = torch.Generator().manual_seed(0)
    planes = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0].reshape(8, 2, 16)[:6]
    which = torch.rand(4000, 6, generator=draw).topk(2).indices
    parts = torch.randn(4000, 6, 2, generator=draw) * torch.zeros(4000, 6).scatter(1, which, 1)[..., None]
    x = torch.einsum("nkr,krd->nd", parts, planes)
    training = Training(lambda cursor: (cursor, {0: x}), Spec("sasa", 24, 4, block=2, lr=1e-2), 600, 512, 0)
    *_, metrics = training
    assert metrics[0]["ev"] > 0.9
    D_k = torch.linalg.qr(training.trainers[0].parameters["W_dec"].unflatten(0, (-1, 2)).mT).Q      # (12, 16, 2)
    cosines = torch.linalg.svdvals(torch.einsum("krd,jds->kjrs", planes, D_k))[..., -1]            # the smallest: of planes
    assert cosines.max(1).values.min() > 0.95


# ---------------------------------------------------------------------------------------------------------------
# The stream

@pytest.fixture
def tokenizer(mini):
    return load_tokenizer(mini)


def conversations(count):
    return [(("user", f"how can i {verb} the vault?"), ("model", "sorry, i can't help you."))
            for verb in ("steal", "paint", "break")] * count


def test_activations_are_the_models_own_without_bos_and_pad(tokenizer):
    model = random_gemma(vocab_size=tokenizer.size)
    items = conversations(4)
    after, out = Stream(model, tokenizer, lambda: iter(items), (2, 0), 100, 40)(0)
    lengths = [len(encode_item(tokenizer, item, 40)[0]) - 1 for item in items]
    taken = next(i for i in range(12) if sum(lengths[:i]) >= 100)
    assert after == taken and out[0].shape == out[2].shape == (sum(lengths[:taken]), 64)
    wanted = torch.cat([model.hidden(torch.tensor(encode_item(tokenizer, item, 40)), capture=(2,))[1][2][0, 1:] for item in items[:taken]])
    order = lambda rows: rows[rows[:, 0].argsort()]
    assert torch.allclose(order(out[2]), order(wanted), atol=1e-4)


def test_the_stream_is_a_function_of_its_cursor_and_stops_at_the_deepest_layer(tokenizer):
    model = random_gemma(vocab_size=tokenizer.size)
    items = conversations(5)
    model.layers[2].register_forward_hook(lambda *_: pytest.fail("block 2 ran"))
    stream = Stream(model, tokenizer, lambda: iter(items), (1,), 100, 40)
    cursor, _ = stream(0)
    cursor, second = stream(cursor)
    assert torch.equal(Stream(model, tokenizer, lambda: iter(items), (1,), 100, 40)(stream(0)[0])[1][1], second[1])
    for _ in range(6):                                                               # past the file's end: from its beginning
        cursor, more = stream(cursor)
    assert cursor > len(items) and len(more[1]) >= 100


def test_long_documents_are_split_and_every_part_begins_with_bos(tokenizer):
    text = "steal the vault " * 20
    parts = encode_item(tokenizer, text, 16)
    assert all(part[0] == tokenizer.bos and len(part) <= 16 for part in parts) and len(parts) == 4
    assert sum((part[1:] for part in parts), []) == tokenizer.encode(text)


def test_read_items(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nHuman: a\n\nHuman: b"}, {"prompt": "p", "response": "r"}, {"text": "t"}])
    assert list(read_items(tmp_path / "x.jsonl")) == [(("user", "a"), ("model", "b")), (("user", "a"), ("model", "c")),
                                                      (("user", "p"), ("model", "r")), "t"]
    (tmp_path / "y.txt").write_text("one\n\n two \n")
    assert list(read_items(tmp_path / "y.txt")) == ["one", "two"]
    write_jsonl(tmp_path / "z.jsonl", [{"what": 1}])
    with pytest.raises(InputError, match="z.jsonl:1"):
        list(read_items(tmp_path / "z.jsonl"))
    assert path is None


def test_data_without_text_is_an_error(tokenizer):
    model = random_gemma(vocab_size=tokenizer.size)
    for items in ([], ["", ""]):
        with pytest.raises(InputError, match="document"):
            Stream(model, tokenizer, lambda: iter(items), (0,), 10, 40)(0)


# ---------------------------------------------------------------------------------------------------------------
# Resuming, and the command

@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "sasa"])
def test_a_resumed_training_is_the_same_bit_for_bit(name, tmp_path, tokenizer):
    model, items = random_gemma(vocab_size=tokenizer.size), conversations(9)

    def make():
        stream = Stream(model, tokenizer, lambda: iter(items), (0, 1), 150, 40)
        return Training(stream, Spec(name, 48, 6, block=3 if name == "sasa" else 1, dead_after=100), 20, 40, 3)
    whole, part = make(), make()
    for _ in whole:
        pass
    for _ in part:
        if part.step == 11:
            break
    part.save(tmp_path)
    again = make()
    again.load(tmp_path)
    for _ in again:
        pass
    for layer in (0, 1):
        wanted, found = whole.trainers[layer].state(), again.trainers[layer].state()
        assert wanted.keys() == found.keys()
        for key in wanted:
            assert torch.equal(wanted[key], found[key]), key


def command(*words, cwd, timeout=120):
    return subprocess.run([sys.executable, ROOT / "sae_train.py", *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_command_trains_resumes_and_refuses(mini, tmp_path, monkeypatch, capsys):
    """In this process, so that importing PyTorch is paid once; the signal is one that arrives during the tenth step."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sae_train.py", "--model", str(mini), "--layers", "0", "1", "--data", str(mini / "train.jsonl"),
                                          "--width", "96", "--l0", "8", "--token-count", "6000", "--batch", "200", "--buffer", "1500",
                                          "--context", "64", *map(str, words)])
        return sae_train.main()
    assert not run("--out", tmp_path / "a", "--architecture", "sasa")
    assert load_sae(tmp_path / "a", 1, 96).active == 2
    with pytest.raises(InputError, match="finished"):
        run("--out", tmp_path / "a", "--architecture", "sasa")
    assert not run("--evaluate", tmp_path / "a", "--out", tmp_path / "figures.json")
    assert "24 blocks of 4, 2 a token" in capsys.readouterr().out
    assert [row["layer"] for row in read_json(tmp_path / "figures.json")["measures"]] == [0, 1]
    with pytest.raises(InputError, match="holds no SAE"):
        run("--evaluate", tmp_path)
    assert json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[-1])["step"] == 30

    class Later(sae_train.Signals):
        caught = property(lambda self: self.count() == 10 and 15, lambda self, value: None)

        def count(self):
            self.seen = getattr(self, "seen", 0) + 1
            return self.seen
    with monkeypatch.context() as patch:
        patch.setattr(sae_train, "Signals", Later)
        assert run("--out", tmp_path / "b") == 128 + 15
    with pytest.raises(InputError, match="other settings"):
        run("--out", tmp_path / "b", "--seed", 1)
    assert not run("--out", tmp_path / "b") and not run("--out", tmp_path / "c")
    assert "going on at step 10" in capsys.readouterr().out
    b, c = (load_sae(tmp_path / name, 0, 96) for name in "bc")
    assert torch.equal(b.W_enc, c.W_enc) and torch.equal(b.threshold, c.threshold)
    (one,) = (tmp_path / "c/layer_1").rglob("params.npz")                            # killed between the SAEs of two layers
    whole = one.read_bytes()
    one.unlink()
    assert not run("--out", tmp_path / "c") and one.read_bytes() == whole


def test_a_training_that_diverges_leaves_its_checkpoint(tmp_path, tokenizer):
    model, items = random_gemma(vocab_size=tokenizer.size), conversations(9)
    training = Training(Stream(model, tokenizer, lambda: iter(items), (0,), 150, 40), Spec("batchtopk", 48, 6), 20, 40, 3)
    for _ in training:
        if training.step == 3:
            break
    training.save(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    training.trainers[0].parameters["b_dec"][0] = float("nan")
    with pytest.raises(InputError, match="step 3: 0.b_dec holds values that are no numbers"):
        training.save(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("words, says", [
    (["--block", "4"], "--architecture sasa"), (["--architecture", "sasa", "--block", "5"], "--block 5"), (["--l0", "0"], "--l0 0"),
    (["--model", "nobody/nothing"], "--layers"), (["--layers", "9"], "--layers"), (["--architecture", "sasa", "--l0", "2"], "--block 4")])
def test_what_cannot_be_is_said(words, says, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sae_train.py", *words, "--out", str(tmp_path / "x")])
    with pytest.raises(InputError, match=says):
        sae_train.main()


def test_help_teaches(tmp_path):
    shown = command("--help", cwd=tmp_path)
    assert shown.returncode == 0 and not shown.stderr
    for word in ("jumprelu", "batchtopk", "sasa", "--nuclear", "--evaluate", "--demo", "toy 512"):
        assert word in shown.stdout


# ---------------------------------------------------------------------------------------------------------------
# The demo

@pytest.fixture(scope="module")
def planted():
    """A world of planes that share no direction, and the SASA that holds each in one block, by construction."""
    from experiments import sasa_demo as sae_demo
    world = sae_demo.World({"circle": 4, "sphere": 4, "torus": 2}, 0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q.T
    world.bases = [basis[4 * i:4 * i + sae_demo.DIMENSION[kind]] for i, kind in enumerate(world.kinds)]
    trainer = Trainer(Spec("sasa", 48, 8, block=4), torch.zeros(64), torch.Generator().manual_seed(0))
    W = basis[:48].clone()
    trainer.parameters |= {"W_dec": W, "W_enc": W.T.contiguous(), "b_enc": torch.zeros(48), "b_dec": torch.zeros(64)}
    return sae_demo, world, trainer


def test_the_demo_credits_what_holds_every_feature(planted):
    demo, world, trainer = planted
    found = demo.recovered(trainer, torch.tensor(2.0), world, 2000)
    assert found["ev"] > 0.999 and found["held"] == found["features"] == 10 and found["units"] == [1] * 10
    assert max(found["angles"]) < 0.5 and found["stable"] == pytest.approx(4, abs=1e-3) and found["l0"] == pytest.approx(8, abs=0.01)


def test_the_demo_denies_what_is_split_or_merged(planted):
    """Rows swapped between two blocks split two features; two circles in one block are held by no block of their own."""
    demo, world, trainer = planted
    W = trainer.parameters["W_dec"]
    split = W.clone()
    split[[18, 22]] = W[[22, 18]]                                                    # the spheres 4 and 5, a row each
    trainer.parameters |= {"W_dec": split, "W_enc": split.T.contiguous()}
    found = demo.recovered(trainer, torch.tensor(2.0), world, 2000)
    assert found["held"] == 8 and found["units"][4] == found["units"][5] == 2
    merged = W.clone()
    merged[[2, 3, 4, 5]] = W[[4, 5, 2, 3]]                                           # circles 0 and 1 in one block
    trainer.parameters |= {"W_dec": merged, "W_enc": merged.T.contiguous()}
    found = demo.recovered(trainer, torch.tensor(2.0), world, 2000)
    assert found["held"] == 8 and found["units"] == [1] * 10
    trainer.parameters |= {"W_dec": W, "W_enc": W.T.contiguous()}


def test_shapes_of_the_demo_have_mean_square_norm_one_and_their_dimension(planted):
    demo, *_ = planted
    draw = torch.Generator().manual_seed(0)
    for kind, dimension in demo.DIMENSION.items():
        x = demo.points(kind, 4000, draw)
        assert x.shape == (4000, dimension) and x.square().sum(1).mean() == pytest.approx(1, abs=0.05)
        assert torch.linalg.svdvals(x)[-1] > 0.3 * torch.linalg.svdvals(x)[0]


def test_the_demo_runs_end_to_end(planted, monkeypatch, tmp_path):
    demo, *_ = planted
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "SAMPLES", 700)
    monkeypatch.setattr(demo, "SIZES", (520, 600, 700))
    monkeypatch.setattr(demo, "INITS", 2)
    rows = [row | {"seed": seed} for seed in range(2) for row in demo.one_seed(0)[:12]]
    assert len(demo.gates(rows)) == 7 and not all(holds for *_, holds in demo.gates(rows))
    assert len(demo.summary(rows).splitlines()) == 2 + 12 and "22" in demo.summary(rows)
    demo.figure(rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
