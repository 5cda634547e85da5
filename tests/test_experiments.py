"""experiments/: every variant begins at the base model, a run's line, and the statistics by hand."""

import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SETS, ended

import lora
from run.files import InputError
from model import load_model


sys.path.append(str(ROOT / "experiments"))

from experiments import ablate
import reading
from experiments import theory
from experiments import variants


@pytest.fixture(scope="module")
def folder(mini, tmp_path_factory):
    """A folder of worlds that holds one, the mini one, as world 7."""
    worlds = tmp_path_factory.mktemp("worlds")
    shutil.copytree(mini, worlds / "7")
    (worlds / "7/data").mkdir()
    for name in ("train", *SETS):
        shutil.move(worlds / f"7/{name}.jsonl", worlds / f"7/data/{name}.jsonl")
    return worlds


@pytest.fixture(scope="module")
def world(folder):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LAYERS": (0, 1), "WIDTH": "96", "RANK": 8, "TOP_K": 6, "STEPS": 4, "LOOKS": (0, 2, 4)}.items():
            for module in (variants, ablate, reading):
                patch.setattr(module, name, value, raising=False)
        patch.setattr(variants.toy, "SAES", {"sasa": variants.toy.Spec("sasa", 96, 12, block=4)})
        patch.setattr(variants.toy, "SAE_LAYERS", (0, 1))
        patch.setattr(variants.toy, "SAE_STEPS", 4)
        yield ablate.world_of(7, str(folder))


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_begins_at_the_base_model(world, name):
    """W + s·B·A is W, whether B·A is 0 or taken out of W; bases are orthonormal, and where a factor begins."""
    model = load_model(world.folder)
    before = {name: module.weight.detach().clone() for name, module in variants.targets(model).items()}
    parameters, bases = variants.VARIANTS[name](world, model, torch.Generator().manual_seed(0))
    layers = lora.lora_layers(model)
    assert len({id(p) for _, p in parameters}) == len(parameters) and (layers or name == "full-fine-tuning")
    for key, layer in layers.items():
        whole = layer.base.weight + layer.update
        assert (whole - before[key]).abs().max() < 1e-5 * before[key].abs().max()
        if bases:
            U, mine = bases[key], layer.B.detach() if layer.writer else layer.A.detach().T
            assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-4 and torch.equal(mine[:, :U.shape[1]], U)
    assert len(layers) in (0, 12) and all(parameter.requires_grad or "frozen" in name for _, parameter in parameters)


def test_variants_differ_and_are_drawn_from_their_seed(world):
    def bases(name, seed):
        return variants.VARIANTS[name](world, load_model(world.folder), torch.Generator().manual_seed(seed))[1]
    key = "layers.1.self_attn.q_proj"
    assert not torch.equal(bases("decoder", 0)[key], bases("decoder", 1)[key])
    assert torch.equal(bases("greedy-rotated", 3)[key], bases("greedy-rotated", 3)[key])
    span = [U @ U.T for U in (bases("greedy", 0)[key], bases("greedy-rotated", 1)[key])]
    assert (span[0] - span[1]).abs().max() < 1e-4


def test_a_line_says_all_and_is_made_again_the_same(world, tmp_path):
    job = (7, "greedy-rotated", 0, 1e-3), str(world.folder.parent), str(tmp_path / "r/out.jsonl"), {"commit": "x"}
    first, again = ablate.one(job), ablate.one(job)
    assert first | {"seconds": 0} == again | {"seconds": 0} and len(first["safe"]) == 3 and first["digest"] == world.digest
    assert 0.9 < first["share"] <= 1 and first["commit"] == "x" and set(first["over_refusal"]) == {"harm verb", "sensitive noun"}
    assert list(ablate.read_lines(tmp_path / "r/out.jsonl")) == [(7, "greedy-rotated", 0, 1e-3)]
    assert json.loads((tmp_path / "r/out.jsonl").read_text().splitlines()[0]) == json.loads(json.dumps(first))


def test_neighbours_act_at_the_end_alone(world):
    own = ablate.measure(world, "lora-own", 1e-3, 0)
    for name in ("lora-lox", "lora-rosi", "lora-average"):
        found = ablate.measure(world, name, 1e-3, 0)
        assert found["trainable"] == own["trainable"] and len(found["safe"]) == 3
    model, kept = load_model(world.folder), {}
    named, _ = variants.VARIANTS["lora-average"](world, model, torch.Generator().manual_seed(0))
    wanted = None
    for metrics in variants.fit(world, model, named, 1e-2, 0):
        new = {name: parameter.detach().clone() for name, parameter in named}
        wanted = new if wanted is None else {name: 0.9 * wanted[name] + 0.1 * new[name] for name in new}
        variants.AFTER["lora-average"](world, model, metrics["step"], kept)
    assert all(torch.allclose(parameter, wanted[name]) for name, parameter in named)
    assert not torch.equal(new[named[1][0]], wanted[named[1][0]])


def test_reading_finds_planted_detectors(world, monkeypatch):
    """A feature that fires on harmful prompts alone, or everywhere else, is found; the base rate is that of all features."""
    told = reading.detection(world)
    assert told[0].shape == (2, 96) and ((told[0] >= 0) & (told[0] <= 1)).all()
    detected = torch.tensor([[0.9, 0.1, *[0.5] * 94], [0.5] * 96])
    monkeypatch.setattr(reading, "detection", lambda world: dict.fromkeys((0, 1), detected))
    lines = list(reading.read(world))
    assert lines[0]["selection"] == "all features" and lines[0]["features"] == 192 and lines[0]["harm"] == pytest.approx(4 / 192)
    found = [(line["selection"], line["side"], line["features"]) for line in lines[1:3]]
    assert found == [("paper", "all", 12), ("gradient", "readers", 32)]
    assert "2.1%" in reading.show(lines)


def test_torn_lines_are_run_again(tmp_path):
    out, keys = tmp_path / "out.jsonl", {"variant": "paper", "seed": 0, "lr": 1e-3}
    ablate.append(out, {"world": 1} | keys)
    with open(out, "a") as file:
        file.write('{"world": 2, "vari')                       # killed while writing
    ablate.append(out, {"world": 3} | keys)
    args = SimpleNamespace(out=out, variants=["paper"], seeds=[0], lrs=[1e-3])
    assert ablate.missing(args, [1, 2, 3]) == [(2, "paper", 0, 1e-3)]


# ---------------------------------------------------------------------------------------------------------------
# Statistics

def line(world, variant, safe, seed=0, lr=1e-3, **more):
    return {"world": world, "variant": variant, "seed": seed, "lr": lr, "looks": [0, 10, 20, 60], "steps": 60, "safe": safe,
            "jailbreak": 0.5, "benign": 1.0, "over_refusal": {"harm verb": 0.0, "sensitive noun": 0.1}, "share": None} | more


def test_area_and_reach_by_hand():
    one = line(1, "a", [0.2, 0.6, 1.0, 1.0])
    assert ablate.area(one) == pytest.approx((10 * 0.4 + 10 * 0.8 + 40) / 60)
    assert ablate.reach(one) == pytest.approx(10 + 10 * 0.35 / 0.4)
    assert ablate.reach(line(1, "a", [0.2, 0.3, 0.9, 0.94])) == 61 and ablate.reach(line(1, "a", [0.95, 0, 0, 0])) == 0


def test_errors_are_clustered_by_world():
    lines = [line(w, "a", [0, 0, 0, v], seed) for w, values in ((1, (0.2, 0.4)), (2, (0.5, 0.7)), (3, (0.9, 0.9)))
             for seed, v in enumerate(values)]
    means = ablate.world_means(ablate.by_run(lines, lambda line: line["safe"][-1])["a"])
    assert means == pytest.approx({1: 0.3, 2: 0.6, 3: 0.9})
    mean, error = ablate.mean_error(means.values())
    assert (mean, error) == pytest.approx((0.6, 0.3 / math.sqrt(3)))
    low, high = ablate.t_interval([0.3, 0.6, 0.9])
    assert (low, high) == pytest.approx((0.6 - 4.303 * error, 0.6 + 4.303 * error), abs=1e-6)
    assert all(map(math.isnan, ablate.t_interval([0.3])))


def test_t_values_and_bootstrap_cover():
    stats = pytest.importorskip("scipy.stats")
    assert ablate.T == pytest.approx([stats.t.ppf(0.975, df) for df in range(1, 16)], abs=1e-3)
    draw, hits = random.Random(0), 0
    for number in range(200):
        low, high = ablate.interval([draw.gauss(1, 2) for _ in range(20)], 2000, number)
        hits += low < 1 < high
    assert 0.88 < hits / 200 < 0.98


def test_pairs_are_of_the_runs_that_both_have():
    values = {("a", 1, 0): 0.9, ("a", 1, 1): 0.7, ("a", 2, 0): 0.8, ("lora-own", 1, 0): 0.5, ("lora-own", 2, 0): 0.2,
              ("lora-own", 2, 1): 0.9, ("lora-own", 3, 0): 0.1}
    found = ablate.by_run([line(w, name, [0, 0, 0, v], seed) for (name, w, seed), v in values.items()], lambda line: line["safe"][-1])
    assert ablate.paired(found, "a", "lora-own") == pytest.approx([0.4, 0.6]) and ablate.paired(found, "a", "nobody") == []


def test_gains_and_best_rates():
    values = {("lora-own", 1e-3): 0.2, ("lora-own", 2e-3): 0.4, ("oracle", 1e-3): 0.6, ("a", 1e-3): 0.5, ("a", 2e-3): 0.3}
    lines = [line(w, name, [0, v, v, v], lr=lr) for w in (1, 2, 101) for (name, lr), v in values.items()]
    lines.append(line(1, "a", [0, 1, 1, 1], seed=1, lr=2e-3))                # a world for reporting has no say in rates
    assert ablate.best_rates(lines) == {"lora-own": 2e-3, "a": 1e-3}
    assert dict(ablate.gains([one for one in lines if one["lr"] == 1e-3])) == pytest.approx({"a": 0.75})


def test_table_and_figure_as_a_command(tmp_path):
    out = tmp_path / "lines.jsonl"
    for w in range(1, 4):
        for seed in range(2):
            for name, v in (("lora-own", 0.5), ("decoder-full", 0.6), ("greedy-rotated", 0.8), ("oracle", 0.9)):
                ablate.append(out, line(w, name, [0.1, v, v + 0.02 * w, v + 0.03 * w + 0.01 * seed], seed))
    text = ended("experiments/ablate.py", ["--table", "--out", out, "--figure", tmp_path / "curves.png"])
    for words in ("mean ± standard error over worlds", "− lora-own", "− decoder-full", "bootstrap 95 %", "t 95 %", "3/3",
                  "share of the oracle's gain", "75%"):
        assert words in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="no lines"):
        ablate.report(SimpleNamespace(results=[tmp_path / "none.jsonl"], worlds=[1], variants=["paper"]))


# ---------------------------------------------------------------------------------------------------------------
# Theory

@pytest.mark.parametrize("r", [4, 16])
def test_the_papers_statement_and_its_edges(r):
    """The difference of means has error √(r − 1); not every direct method has; a trained SAE hardly any; τ and centring their floors."""
    setting = theory.Setting(r=r, samples=30_000)
    W, a, u = theory.world(setting)
    assert theory.error(theory.mean_difference(a, u, r), W, r) == pytest.approx(math.sqrt(r - 1), abs=0.02)
    assert theory.error(theory.covariance_difference(a, u, r), W, r) <= 0.31
    trained, untrained = (theory.SAE(setting, steps, a, u).chosen_rows(a, u, r) for steps in (500, 0))
    assert theory.error(theory.span(trained), W, r) <= 0.15 and theory.error(theory.span(untrained), W, r) > 1.1
    for U, kept in ((theory.subspace(trained, 0.8, 64)[0], {4: 3, 16: 11}), (theory.centred(trained, 0.8), {4: 3, 16: 10})):
        assert U.shape[1] == kept[r] and theory.error(U, W, r) == pytest.approx(math.sqrt(r - kept[r]), abs=0.05)


def test_the_difference_of_means_finds_a_single_feature():
    W, a, u = theory.world(theory.Setting(r=1))
    assert theory.error(theory.mean_difference(a, u, 1), W, 1) <= 0.02
    assert theory.error(theory.centred(W[:1], 0.8), W, 1) == 1                                 # of one row centring leaves nothing


def test_error_is_the_distance_of_projectors():
    W, U = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.eye(12, dtype=torch.float64)[:, :2]
    Q = torch.linalg.qr(W[:3].T).Q
    assert theory.error(U, W, 3) == pytest.approx((Q @ Q.T - U @ U.T).norm().item())
    assert theory.error(Q, W, 3) == pytest.approx(0, abs=1e-6) and theory.error(Q[:, :1], W, 3) == pytest.approx(math.sqrt(2))
