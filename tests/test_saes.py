"""saes/: gradients, what a step keeps true, the stream, exact resume, the commands, measuring."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_gemma

from data import load_tokenizer
from run.files import InputError, read_json, read_jsonl, write_json, write_jsonl
from run.session import CHECKPOINT
from sae import SASA, JumpReLU, load_sae, strongest
from saes import measure as saes_measure
from saes import train as saes_train
from saes.concepts import auroc, concept_report, logistic
from saes.measure import batches, letters, measure, measures_table
from saes.step import Spec, Trainer, least_kept, nuclear_norm, ranks
from saes.stream import Stream, encode_item
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


def trained(spec, x, steps, batch):
    """A Training that is done, on the same buffer x again and again."""
    training = Training(lambda cursor: (cursor, {0: x}), spec, steps, batch, 0)
    for _ in training:
        pass
    return training


# --------------------------------------------------------------------------------------------------
# Gradients

@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_the_loss(name):
    """Against autograd on the loss as the papers write it, with the gate held constant."""
    trainer, x, spec = trainer_of(name), inputs().double(), SPECS[name]
    p = trainer.parameters
    loss, _, codes, grad = trainer.gradients(x, done=0.0)  # no L0 penalty yet
    gate = (codes != 0).double()
    assert 0.15 < gate.mean() < 0.6
    for key in WEIGHTS:
        p[key].requires_grad_()
    f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * gate
    wanted = (x - (f @ p["W_dec"] + p["b_dec"])).square().sum(1).mean()
    if spec.nuclear:
        singular_values = torch.linalg.svdvals(p["W_dec"].unflatten(0, (-1, spec.block)))
        wanted = wanted + spec.nuclear * singular_values.sum(1).mean()
    assert torch.allclose(loss, wanted, rtol=1e-5)
    for key, g in zip(WEIGHTS, torch.autograd.grad(wanted, [p[key] for key in WEIGHTS])):
        assert torch.allclose(grad[key], g, rtol=1e-5, atol=1e-6), key


def test_the_thresholds_estimator_is_the_gradient_of_the_smoothed_step():
    """1[h > θ] smoothed to H = clamp((h − θ)/ε + ½, 0, 1), which has dH/dθ = −1/ε where |h − θ| < ε/2.

    Inside the band the codes are θ·H, since f jumps by θ there. Central differences of the loss, to
    first order in the codes and in L0, must give the estimator.
    """
    trainer, x = trainer_of("jumprelu"), inputs().double()
    spec, p = trainer.spec, trainer.parameters
    h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    theta = p["log_theta"].exp()
    f = h * (h > theta)
    slope = 2 / len(x) * (f @ p["W_dec"] + p["b_dec"] - x) @ p["W_dec"].T  # of the loss by f
    l0 = (f != 0).sum() / len(x)

    def smoothed(log_theta):
        H = ((h - log_theta.exp()) / spec.bandwidth + 0.5).clamp(0, 1)
        penalty = 2 * spec.sparsity * (l0 / spec.l0 - 1) / spec.l0 * H.sum() / len(x)
        return (slope * theta * H).sum() + penalty
    *_, grad = trainer.gradients(x, done=1.0)
    for step in 1e-7 * torch.eye(WIDTH).double():
        wanted = (smoothed(p["log_theta"] + step) - smoothed(p["log_theta"] - step)) / 2e-7
        i = step.argmax()
        assert math.isclose(grad["log_theta"][i], wanted, rel_tol=1e-4, abs_tol=1e-6), i


@pytest.mark.parametrize("name", SPECS)
def test_dead_units_learn_what_the_others_leave(name):
    """The auxiliary loss against autograd: its target is the error, a constant."""
    trainer, x = trainer_of(name), inputs().double()
    p, spec, r = trainer.parameters, trainer.spec, trainer.spec.block
    *_, without = trainer.gradients(x, done=0.0)
    trainer.silent[2:4] = 1e9  # two dead units
    _, error, _, grad = trainer.gradients(x, done=0.0)
    dead = torch.arange(2 * r, 4 * r)
    for key in WEIGHTS:
        p[key].requires_grad_()
    z = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])[:, dead]
    if name != "sasa":
        z = z.clamp(min=0)
    if max(spec.active, D // (4 * r)) < 2:  # of the two dead units the stronger
        z = z * strongest(z.detach().unflatten(1, (-1, r)), 1).repeat_interleave(r, 1)
    loss = spec.revival * (error + z @ p["W_dec"][dead]).square().sum(1).mean()
    for key, g in zip(WEIGHTS, torch.autograd.grad(loss, [p[key] for key in WEIGHTS])):
        assert torch.allclose(grad[key] - without[key], g, rtol=1e-5, atol=1e-7), key
    assert (grad["W_dec"] - without["W_dec"])[dead].abs().max() > 1e-4


def test_nuclear_norm():
    """Against the singular values, on a matrix worked out by hand, and where rank is lost."""
    blocks = random(5, 3, 8).double()
    norms, slope = nuclear_norm(blocks, ridge=0)
    U, singular_values, Vh = torch.linalg.svd(blocks, full_matrices=False)
    assert torch.allclose(norms, singular_values.sum(1), rtol=1e-12)
    assert torch.allclose(slope, U @ Vh, atol=1e-10)  # the polar factor
    norms, slope = nuclear_norm(torch.tensor([[[3.0, 0, 0], [0, 4, 0]]]).double(), ridge=0)
    assert math.isclose(norms.item(), 7)
    assert torch.allclose(slope[0], torch.eye(3).double()[:2])
    norms, slope = nuclear_norm(torch.zeros(2, 3, 8))
    assert slope.isfinite().all() and norms.max() < 0.01


def test_ranks_of_known_blocks():
    repeated = F.normalize(torch.arange(1.0, 9), dim=0).expand(4, 8)
    uneven = torch.diag(torch.tensor([2.0, 1, 1, 1, 0, 0, 0, 0]))[:4]
    stable, effective = ranks(torch.stack([torch.eye(8)[:4], repeated, uneven]))
    assert torch.allclose(stable, torch.tensor([4.0, 1, 7 / 4]), atol=1e-4)
    assert torch.allclose(effective[:2], torch.tensor([4.0, 1]), atol=1e-3)
    assert 1 < effective[2] < 4


# --------------------------------------------------------------------------------------------------
# A step

def test_least_kept_is_exact_whatever_the_guess():
    h = random(50, 40)
    ordered = h.flatten().sort(descending=True).values
    for guess, count in itertools.product((0.0, 0.5, 50.0), (1, 300, 900)):
        least = least_kept(h, count, torch.tensor(guess))
        assert least == ordered[count - 1].clamp(min=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_what_a_step_keeps_true(name):
    """L0, signs and blocks of the codes, rows of unit length, no gradient along them."""
    trainer, x = Trainer(SPECS[name], torch.zeros(D), torch.Generator().manual_seed(0)), inputs(400)
    for step in range(20):
        before = trainer.parameters["W_dec"].clone()
        metrics = trainer.step(x, step / 20)
    W_dec = trainer.parameters["W_dec"]
    assert torch.allclose(W_dec.norm(dim=1), torch.ones(WIDTH), atol=1e-6)
    assert not torch.equal(W_dec, before)
    assert (W_dec.grad * before).sum(1).abs().max() < 1e-6 * W_dec.grad.norm()
    *_, codes, _ = trainer.gradients(x)
    counts = (codes != 0).sum(1)
    if name == "sasa":
        assert (counts == 6).all() and (codes < 0).any()
        assert ((codes != 0).unflatten(1, (-1, 3)).sum(2) % 3 == 0).all()
    elif name == "topk":
        assert (counts == 6).all() and (codes >= 0).all()
    elif name == "batchtopk":
        assert counts.sum() == 6 * 400 and counts.min() < 6 < counts.max() and (codes >= 0).all()
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


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu"])
def test_directions_set_by_hand_are_found(name):
    """Eight orthogonal directions, two at a time, far from the origin: training, threshold and the
    folds of b_dec and scale must be right together."""
    draw = torch.Generator().manual_seed(2)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0][:8]
    which = torch.rand(4000, 8, generator=draw).topk(2).indices
    sizes = 1 + 2 * torch.rand(4000, 2, generator=draw)
    x = torch.zeros(4000, 8).scatter(1, which, sizes) @ directions + 5
    training = trained(Spec(name, 16, 2, lr=5e-3), x, 600, 512)
    sae = JumpReLU(**training.trainers[0].arrays(training.scale[0]))
    assert (sae.W_dec @ directions.T).max(0).values.min() > 0.9
    codes = sae.encode(x)
    assert abs((codes > 0).sum(1).float().mean() - 2) < 0.4
    assert (sae.decode(codes) - x).square().sum() / (x - x.mean(0)).square().sum() < 0.1


def test_planes_set_by_hand_are_found():
    draw = torch.Generator().manual_seed(0)
    planes = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0].reshape(8, 2, 16)[:6]
    which = torch.rand(4000, 6, generator=draw).topk(2).indices
    parts = torch.randn(4000, 6, 2, generator=draw)
    parts = parts * torch.zeros(4000, 6).scatter(1, which, 1)[..., None]
    x = torch.einsum("nkr,krd->nd", parts, planes)
    trainer = trained(Spec("sasa", 24, 4, block=2, lr=1e-2), x, 600, 512).trainers[0]
    assert trainer.mean["ev"] > 0.9
    blocks = torch.linalg.qr(trainer.parameters["W_dec"].unflatten(0, (-1, 2)).mT).Q  # (12, 16, 2)
    cosines = torch.linalg.svdvals(torch.einsum("krd,jds->kjrs", planes, blocks))[..., -1]
    assert cosines.max(1).values.min() > 0.95  # each plane has a block, by its largest angle


# --------------------------------------------------------------------------------------------------
# The stream

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of three layers, the toy's tokenizer, and conversations."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    toy.write_tokenizer(path)
    tokenizer = load_tokenizer(path.parent)
    items = [(("user", f"how can i {verb} the vault?"), ("model", "sorry, i can't help you."))
             for verb in ("steal", "paint", "break")] * 5
    model = random_gemma(vocab_size=tokenizer.size, num_hidden_layers=3)
    return SimpleNamespace(model=model, tokenizer=tokenizer, items=items)


def stream_of(small, layers, buffer=100, items=None):
    items = small.items if items is None else items
    return Stream(small.model, small.tokenizer, lambda: iter(items), layers, buffer, 40)


def test_activations_are_the_models_own_without_bos_and_padding(small):
    cursor, activations = stream_of(small, (2, 0))(0)
    tokens = [encode_item(small.tokenizer, item, 40)[0] for item in small.items[:cursor]]
    assert sum(len(ids) - 1 for ids in tokens) == len(activations[0]) == len(activations[2]) >= 100
    wanted = [small.model.hidden(torch.tensor([ids]), capture=(2,))[1][2][0, 1:] for ids in tokens]
    wanted, found = torch.cat(wanted), activations[2]
    assert torch.allclose(found[found[:, 0].argsort()], wanted[wanted[:, 0].argsort()], atol=1e-4)


def test_the_stream_is_a_function_of_its_cursor_and_stops_at_the_deepest_layer(small):
    handle = small.model.layers[2].register_forward_hook(lambda *_: pytest.fail("block 2 ran"))
    stream = stream_of(small, (1,))
    first, _ = stream(0)
    cursor, second = stream(first)
    assert torch.equal(stream_of(small, (1,))(first)[1][1], second[1])
    for _ in range(6):  # past the end: from the beginning
        cursor, more = stream(cursor)
    assert cursor > len(small.items) and len(more[1]) >= 100
    handle.remove()


def test_long_documents_are_split_and_every_part_begins_with_bos(small):
    text = "steal the vault " * 20
    parts = encode_item(small.tokenizer, text, 16)
    assert all(part[0] == small.tokenizer.bos and len(part) <= 16 for part in parts)
    assert sum((part[1:] for part in parts), []) == small.tokenizer.encode(text)


def test_data_without_text_are_refused(small):
    for items in ([], ["", ""]):
        with pytest.raises(InputError, match="no document with text"):
            stream_of(small, (0,), items=items)(0)


# --------------------------------------------------------------------------------------------------
# Resuming, and the commands

@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "sasa"])
def test_a_resumed_training_is_the_same_bit_for_bit(name, tmp_path, small):
    def make():
        spec = Spec(name, 48, 6, block=3 if name == "sasa" else 1, dead_after=100)
        return Training(stream_of(small, (0, 1), buffer=150), spec, 20, 40, 3)
    whole, part, again = make(), make(), make()
    list(whole)
    for _ in itertools.islice(part, 11):
        pass
    part.save(tmp_path)
    again.load(tmp_path)
    assert again.step == 11
    list(again)
    for layer in (0, 1):
        wanted, state = whole.trainers[layer].state(), again.trainers[layer].state()
        assert wanted.keys() == state.keys()
        for key in wanted:
            assert torch.equal(wanted[key], state[key]), key

    # One that has diverged leaves the checkpoint as it was
    before = (tmp_path / CHECKPOINT).read_bytes()
    again.trainers[0].parameters["b_dec"][0] = torch.nan
    with pytest.raises(InputError, match="step 20, layer 0: b_dec"):
        again.save(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_the_commands_train_resume_measure_and_refuse(mini, tmp_path, monkeypatch, capsys):
    """In this process, so that importing PyTorch is paid once; SIGTERM arrives in the tenth step."""
    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["saes", "--model", *map(str, (mini, *words))])
        return main()

    def train(name, *words):
        return run(saes_train.main, "--layers", 0, 1, "--data", mini / "train.jsonl", "--width", 96,
                   "--l0", 8, "--token-count", 6000, "--batch", 200, "--buffer", 1500, "--context",
                   64, "--out", tmp_path / name, *words)
    assert not train("a", "--architecture", "sasa")
    assert load_sae(tmp_path / "a", 1, 96).active == 2
    assert read_jsonl(tmp_path / "a/metrics.jsonl")[-1]["step"] == 30
    with pytest.raises(InputError, match="finished"):
        train("a", "--architecture", "sasa")
    measured = ("--data", mini / "train.jsonl", "--context", 64, "--out", tmp_path / "figures.json")
    write_jsonl(tmp_path / "concepts.jsonl", [
        {"tokens": [2, *range(110, 140)], "labels": {"even": "-" + "10" * 15}}])
    assert not run(saes_measure.main, tmp_path / "a", *measured, "--concepts",
                   tmp_path / "concepts.jsonl")
    assert "24 blocks of 4, 2 a token" in capsys.readouterr().out
    figures = read_json(tmp_path / "figures.json")
    assert [row["layer"] for row in figures["measures"]] == [0, 1]
    assert [row["positive"] for row in figures["concepts"]] == [0.5, 0.5]

    # Stopped and resumed against unbroken
    class Later(saes_train.Signals):
        count = 0

        @property
        def caught(self):
            self.count += 1
            return 15 if self.count == 10 else None

        @caught.setter
        def caught(self, value):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(saes_train, "Signals", Later)
        assert train("b") == 128 + 15
    with pytest.raises(InputError, match="another --seed"):
        train("b", "--seed", 1)
    assert not train("b") and not train("c")
    assert "going on at step 10 of 30" in capsys.readouterr().out
    b, c = (load_sae(tmp_path / name, 0, 96) for name in "bc")
    assert torch.equal(b.W_enc, c.W_enc) and torch.equal(b.threshold, c.threshold)


@pytest.mark.parametrize("words, message", [
    (["--block", "4"], "--architecture sasa"), (["--l0", "0"], "--l0 0"),
    (["--architecture", "sasa", "--block", "5"], "--block 5"), (["--layers", "9"], "0 to 5"),
    (["--model", "nobody/nothing"], "--layers and --data"), (["--token-count", "9"], "--batch")])
def test_flags_that_do_not_fit_are_refused(words, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["saes.train", *words, "--out", str(tmp_path / "x")])
    with pytest.raises(InputError, match=message):
        saes_train.main()
    write_json(tmp_path / "y.json", {})
    monkeypatch.setattr(sys, "argv", ["saes.measure", str(tmp_path)])
    with pytest.raises(InputError, match="holds no SAE"):
        saes_measure.main()


# --------------------------------------------------------------------------------------------------
# Measuring

@pytest.fixture(scope="module")
def rows(small):
    return batches(small.tokenizer, toy.World(0).corpus(12, "eval"), 96, 500)


def test_perfect_saes_lose_nothing(small, rows):
    """Codes of x and −x, which together give x back; and a SASA all of whose blocks stay."""
    eye = torch.eye(64)
    pair = JumpReLU(torch.cat((eye, -eye), 1), torch.zeros(128), torch.zeros(128),
                    torch.cat((eye, -eye)), torch.zeros(64), layer=1)
    W = torch.linalg.qr(random(64, 64)).Q.T
    sasa = SASA(W.T.contiguous(), torch.zeros(64), W, torch.zeros(64), 4, 16, layer=1)
    for sae, l0 in ((pair, 64), (sasa, 64)):
        row = measure(small.model, small.tokenizer, {1: sae}, rows)[0]
        assert row["ev"] == pytest.approx(1, abs=1e-5) and row["l0"] == pytest.approx(l0, abs=0.1)
        assert row["dead"] == 0 and abs(row["kl"]) < 1e-4
        assert row["ce"]["spliced"] == pytest.approx(row["ce"]["clean"], abs=1e-4)
        assert row["recovered"] == pytest.approx({"zero": 1, "mean": 1}, abs=0.01)
        assert not small.model.layers[1]._forward_hooks
    assert row["stable"] == pytest.approx(4, abs=1e-3)
    assert "16 blocks of 4" in measures_table([row])


def test_an_sae_that_writes_the_mean_recovers_nothing_against_it(small, rows):
    tokens, documents, labels = (torch.cat(part) for part in zip(*rows))
    counted = (documents > 0) & (tokens != small.tokenizer.bos)
    x = small.model.hidden(tokens, documents, capture=(1,))[1][1][counted]
    sae = JumpReLU(torch.zeros(64, 5), torch.zeros(5), torch.ones(5), torch.zeros(5, 64), x.mean(0))
    row = measure(small.model, small.tokenizer, {1: sae}, rows)[0]
    assert abs(row["ev"]) < 1e-5 and row["l0"] == 0 and row["dead"] == 1
    assert row["tokens"] == int(counted.sum())
    assert row["recovered"]["mean"] == pytest.approx(0, abs=1e-3)
    logits = small.model(tokens, documents).flatten(0, 1)
    plain = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    assert row["ce"]["clean"] == pytest.approx(plain.item(), rel=1e-4)


def test_auroc_is_the_share_of_pairs_in_order():
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (60, 3), generator=draw).float()
    labels = torch.rand(60, generator=draw) > 0.6
    for k in range(3):
        pairs = [*itertools.product(values[labels, k].tolist(), values[~labels, k].tolist())]
        wanted = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert auroc(values, labels)[k] == pytest.approx(wanted, abs=1e-12)


def test_logistic_regression_finds_the_plane():
    x, normal = random(800, 5), torch.tensor([1.0, 2, 0, 0, 0])
    w, b = logistic(x, x @ normal > 1)
    assert F.cosine_similarity(w, normal, dim=0) > 0.99 and b < 0


def test_a_concept_in_one_unit_and_one_in_two():
    """An SAE whose feature i is axis i, on sparse inputs."""
    draw, eye = torch.Generator().manual_seed(0), torch.eye(16)[:12]
    x = torch.zeros(3000, 16)
    x[:, :12] = (torch.rand(3000, 12, generator=draw) < 0.2) * (1 + torch.rand(3000, 12, generator=draw))
    sae = JumpReLU(eye.T.contiguous(), torch.zeros(12), torch.full((12,), 0.5), eye, torch.zeros(16))
    single = concept_report(sae, x, x[:, 3] > 0)
    assert single["main"] == [3] and single["best"] == 3 and single["absorbed"] == 0
    assert single["auroc"] > 0.999 and single["f1"] > 0.99
    split = concept_report(sae, x, (x[:, 3] > 0) | (x[:, 5] > 0))
    assert sorted(split["main"]) == [3, 5] and split["f1"] > 0.99 and 0.6 < split["auroc"] < 0.95


def test_absorption_is_seen():
    """Direction 0 is the concept. On a third of its tokens one of eleven features stands in for
    feature 0 and writes the concept with a detail of its own: these tokens are absorbed."""
    concept = torch.arange(4000) < 2000
    x = 0.02 * random(4000, 16)
    x[concept, 0] += 1
    for i in range(11):
        x[60 * i:60 * (i + 1), 1 + i] += 1
    W_enc, W_dec = torch.eye(16)[:, :12].clone(), torch.eye(16)[:12].clone()

    def report():
        theta = torch.full((12,), 0.5)
        return concept_report(JumpReLU(W_enc, torch.zeros(12), theta, W_dec, torch.zeros(16)), x, concept)
    honest = report()
    assert honest["main"] == [0] and honest["absorbed"] < 0.01
    W_dec[1:12, 0] = 1  # what writes a detail writes the concept too, but feature 0 isn't silent
    assert report()["absorbed"] < 0.01
    W_enc[1:12, 0] = -1  # a detail's presence silences feature 0
    absorbing = report()
    assert absorbing["main"] == [0] and absorbing["absorbed"] == pytest.approx(0.33, abs=0.04)


def test_blocks_are_measured_as_units():
    """Four planes, the concept is in the second: one block holds it, whatever the direction."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q.T[:8]
    present = torch.rand(3000, 4, generator=draw) < 0.3
    parts = F.normalize(torch.randn(3000, 4, 2, generator=draw), dim=2) * present[..., None]
    sae = SASA(basis.T.contiguous(), torch.zeros(8), basis, torch.zeros(16), 2, 4)
    report = concept_report(sae, parts.flatten(1) @ basis, present[:, 1])
    assert report["best"] == 1 and report["auroc"] > 0.999
    assert report["auroc"] > report["random"] and 0 < report["untrained"] <= 1


def test_letters():
    names = {1: " apple", 2: "bee", 3: " Boat", 4: " 12", 5: " ant"}
    tokenizer = SimpleNamespace(token=names.get)
    labels = letters(tokenizer, [1, 2, 3, 4, 5])
    assert labels["begins with a"] == "10001" and labels["begins with b"] == "00100"
