"""experiments/: variants begin at the base model, statistics by hand, the recipe."""

import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from statsmodels.stats.proportion import proportion_confint

import lora
import train
from data import Row
from experiments import ablate, inits, legibility, reading, tables, theory, variants, worlds
from experiments.paper_table import paper_table
from fused import IGNORE
from model import load_model
from run.files import InputError, read_jsonl, write_jsonl
from run.settings import RECIPES

# One variant of each kind of code
SAMPLE = ("paper-frozen", "decoder-gradient", "greedy-rotated", "greedy-block", "oracle",
          "attribution", "decision", "mean-difference", "pissa", "olora", "eva", "lora-unit",
          "full-fine-tuning")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_variant_begins_at_the_base_model(world, name):
    """W + s·B·A is W. Bases are orthonormal, and a factor begins there."""
    model = load_model(world.folder)
    draw = torch.Generator().manual_seed(0)
    parameters, bases = variants.VARIANTS[name](world, model, draw)
    assert parameters and all(parameter.requires_grad for _, parameter in parameters)
    base = dict(world.model.named_modules())
    for key, layer in lora.lora_layers(model).items():
        whole, before = layer.base.weight + layer.update, base[key].weight
        assert (whole - before).abs().max() < 1e-5 * before.abs().max()
        if bases:
            U = bases[key]
            factor = layer.B if layer.writer else layer.A.T
            assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-4
            assert torch.equal(factor[:, :U.shape[1]], U)


def test_a_run_is_a_line_and_repeats(world, tmp_path):
    job = 7, "greedy-rotated", 0, 1e-3
    line, again = ablate.run_one(job), ablate.run_one(job)
    assert line | {"seconds": 0} == again | {"seconds": 0}
    assert len(line["safe"]) == 2 and 0.9 < line["share"] <= 1
    assert set(line["over_refusal"]) == {"harm verb", "sensitive noun"}
    out = tmp_path / "results/out.jsonl"
    ablate.append_lines(out, [line])
    args = SimpleNamespace(out=out, variants=["greedy-rotated", "paper"], seeds=[0], lrs=[1e-3])
    assert ablate.missing_runs(args, [7]) == [(7, "paper", 0, 1e-3)]


def test_a_world_that_misses_a_gate_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(worlds, "WORLDS", tmp_path)
    monkeypatch.setattr(worlds.toy, "build", lambda seed, folder, kinds: f"gates of {seed}")
    monkeypatch.setattr(worlds.toy, "misses", lambda gates: gates)
    monkeypatch.setattr(worlds.toy, "gates_table", str)
    assert ablate.prepare((91, ["paper"])) is False
    assert capsys.readouterr().err == "world 91 is left out:\ngates of 91\n"
    monkeypatch.setattr(sys, "argv", ["reading", "--worlds", "92", "--out", f"{tmp_path}/out"])
    with pytest.raises(InputError, match="no lines yet"):
        reading.main()


@pytest.mark.parametrize("name", ["lora-own", "sspu"])
def test_a_step_is_the_mean_of_a_variant_s_own_loss_over_all_its_rows(world, name):
    """At the first step the update is still 0, so the base model has the same loss."""
    _, _, steps = ablate.fine_tuned(world, load_model(world.folder), name, 1e-3, 0)
    metrics = next(steps)
    batches, loss = worlds.batches_of([pair[0] for pair in world.examples], 0), train.row_loss
    if name == "sspu":
        batches, loss = inits.BATCHES[name](world, 0), inits.LOSSES[name](world, 0)
    rows = [Row(*(part[None] for part in vars(row).values())) for row in next(batches)]
    counts = [int((row.labels != IGNORE).sum()) for row in rows]
    assert len(rows) == worlds.ACCUMULATE and metrics["trained_tokens"] == sum(counts)
    total = sum(loss(world.model, row).item() for row in rows)
    assert metrics["loss"] == pytest.approx(total / sum(counts), rel=1e-4)


def test_reading_finds_planted_detectors(world, monkeypatch):
    """A feature that fires on harmful prompts alone, or everywhere else, detects harm."""
    aurocs = reading.detection(world)
    assert aurocs[0].shape == (2, 96) and ((aurocs[0] >= 0) & (aurocs[0] <= 1)).all()
    planted = torch.full((2, 96), 0.5)
    planted[0, :2] = torch.tensor([0.9, 0.1])
    monkeypatch.setattr(reading, "detection", lambda world: {0: planted, 1: planted})
    lines = reading.read(world)
    assert lines[0]["selection"] == "all features" and lines[0]["harm"] == pytest.approx(4 / 192)
    assert [line["features"] for line in lines] == [192, 12, 32, 32, 32, 32]
    assert "2.1%" in reading.reading_table(lines)


# ---- Statistics ----------------------------------------------------------------------------------
def line_of(world, variant, safe, seed=0, lr=1e-3):
    return {"world": world, "variant": variant, "seed": seed, "lr": lr, "safe": safe, "steps": 60,
            "looks": [0, 10, 20, 60], "jailbreak": 0.5, "benign": 1.0, "share": None,
            "over_refusal": {"harm verb": 0.0, "sensitive noun": 0.1}}


def test_area_and_steps_by_hand():
    line = line_of(1, "a", [0.2, 0.6, 1.0, 1.0])
    assert tables.area(line) == pytest.approx((10 * 0.4 + 10 * 0.8 + 40) / 60)
    assert tables.steps_to(line) == pytest.approx(10 + 10 * 0.35 / 0.4)
    assert tables.steps_to(line_of(1, "a", [0.2, 0.3, 0.9, 0.94])) == 61
    assert tables.steps_to(line_of(1, "a", [0.95, 0, 0, 0])) == 0


def test_errors_are_over_worlds_and_intervals_cover():
    values = {(1, 0): 0.2, (1, 1): 0.4, (2, 0): 0.5, (2, 1): 0.7, (3, 0): 0.9}
    means = tables.world_means(values)
    assert means == pytest.approx({1: 0.3, 2: 0.6, 3: 0.9})
    mean, error = tables.mean_error(means.values())
    assert (mean, error) == pytest.approx((0.6, 0.3 / math.sqrt(3)))
    assert tables.t_interval([0.3, 0.6, 0.9])[1] == pytest.approx(0.6 + 4.303 * error)
    draw = random.Random(0)
    intervals = [tables.bootstrap_interval([draw.gauss(1, 2) for _ in range(20)], 1000, number)
                 for number in range(100)]
    assert 85 < sum(low < 1 < high for low, high in intervals) < 100


def test_pairs_gains_and_best_rates():
    values = {("lora-own", 1e-3): 0.2, ("lora-own", 2e-3): 0.4, ("oracle", 1e-3): 0.6,
              ("a", 1e-3): 0.5, ("a", 2e-3): 0.3}
    lines = [line_of(world, name, [0, v, v, v], lr=lr)
             for world in (1, 2, 101) for (name, lr), v in values.items()]
    # A world for reporting has no say in rates, and a run without its other half none in pairs
    lines.append(line_of(1, "a", [0, 1, 1, 1], seed=1, lr=2e-3))
    assert tables.best_rates(lines) == {"lora-own": 2e-3, "a": 1e-3}
    common = [line for line in lines if line["lr"] == 1e-3]
    assert dict(tables.gains(common)) == pytest.approx({"a": 0.75})
    finals = tables.by_run([*common, line_of(3, "a", [0, 0, 0, 1])], lambda line: line["safe"][-1])
    assert tables.paired(finals, "a", "lora-own") == pytest.approx([0.3] * 3)


def test_the_tables_print_the_committed_lines(capsys, monkeypatch):
    """RESULTS.md has what `--print means` prints."""
    monkeypatch.setattr(sys, "argv", ["ablate", "--print", "means"])
    ablate.main()
    results = (ROOT / "experiments/RESULTS.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in results
    few = "ablate --print --variants paper lora-own --worlds 1 2".split()
    monkeypatch.setattr(sys, "argv", few)
    ablate.main()
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("area, less lora-own", "t 95 %", "2/2"))


# ---- Theory --------------------------------------------------------------------------------------
def test_the_papers_statement_and_its_edges():
    """The difference of means errs by √(r − 1), not every direct method does, an SAE hardly."""
    setting = theory.Setting(samples=20_000)
    errors = theory.errors(setting, steps=(300,))
    assert errors["difference of means"] == pytest.approx(math.sqrt(setting.r - 1), abs=0.02)
    assert max(errors["difference of covariances"], errors["SAE, 300 steps"]) <= 0.15
    for name in ("uncentred", "centred"):
        floor = errors[f"    {name}, √(r − r̂)"]
        assert floor == 1 and errors[f"  its PCA, {name}, τ = 0.8"] == pytest.approx(1, abs=0.05)


# ---- experiments/recipe.sh -----------------------------------------------------------------------
def recipe(folder, model, record=(), **settings):
    """Run the script in `folder`. Tools in `record` only note their words: lists of these."""
    tools, log = folder / "venv/bin", folder / "commands"
    tools.mkdir(parents=True, exist_ok=True)
    for name in ("python", "hf", "curl", "lm_eval"):
        run, note = f'exec "{sys.executable}" "$@"', f'printf "%s\\t" {name} "$@" >> "{log}"'
        # What prints the SAEs' files is run all the same
        lines = [f'[ "$1" = -c ] && {run}', note, f'echo >> "{log}"'] if name in record else [run]
        (tools / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
        (tools / name).chmod(0o755)
    env = os.environ | {"VENV": str(folder / "venv"), "OUT": str(folder / "out"),
                        "FILES": str(folder / "files")} | settings
    done = subprocess.run(["bash", ROOT / "experiments/recipe.sh", model], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split("\t")[:-1] for line in lines]


def test_the_recipe_goes_all_the_way_on_the_toy(tmp_path):
    short = {"SEEDS": "0", "ARMS": "base full gradient it", "PROMPTS": "2", "ATTACKED": "1",
             "CHOOSE": "--more pairs=8", "AFTER": "--lrs 1e-3 --looks 0 1 --prompts 2"}
    short |= dict.fromkeys(("FULL", "TRAIN"), "--steps 1 --eval-prompts 2 --more max-new-tokens=4")
    recipe(tmp_path, "toy", **short)
    out = tmp_path / "out"
    assert (out / "select-gradient/features.json").exists()
    assert (out / "gradient-0/report.html").exists()
    rows = [line.split() for line in (out / "table.txt").read_text().splitlines()]
    for name in ("toy-harmful", "toy-jailbreak", "toy-lookalike", "toy-benign"):
        assert [row[1] for row in rows if row[:1] == [name]] == ["toy", "full", "gradient"]
    assert len([row for row in rows if row[:2] == ["full", "toy-harmful"]]) == 4    # GCG's budgets
    assert len(read_jsonl(out / "after.jsonl")) == 3 * 5             # three models, five mixtures
    # Where all is there, the look ahead, what lasts and the table are made again
    again = recipe(tmp_path, "toy", ("python",), **short)
    assert [words[1] for words in again] == ["train.py", "-m", "-m"]


def test_the_recipe_on_gemma(tmp_path):
    """Which files it fetches and which commands it runs: nothing is loaded."""
    model = "google/gemma-2-9b"
    commands = recipe(tmp_path, model, record=("python", "hf", "curl", "lm_eval"))
    downloads = [words[2:] for words in commands if words[:2] == ["hf", "download"]]
    assert [words[0] for words in downloads[:2]] == [model, f"{model}-it"]
    assert downloads[2][0] == RECIPES[model]["sae"] and len(downloads[2]) == 6
    counts = Counter(words[1] for words in commands if words[0] == "python")
    assert counts == {"train.py": 14, "select.py": 2, "-m": 5, "eval.py": 2}
    asked = next(words for words in commands if words[1] == "eval.py")
    assert asked[2] == model and f"{model}-it" in asked and "hex-phi" in asked
    assert len([word for word in asked if word.startswith(str(tmp_path / "out"))]) == 12 + 1
    assert Counter(words[0] for words in commands)["lm_eval"] == 6
    with pytest.raises(AssertionError, match="no recipe"):
        recipe(tmp_path, "google/gemma-7b", record=("python",))


def test_the_paper_s_table_by_hand(tmp_path):
    """Two seeds of an arm, two prompts: means over seeds, Wilson's interval over prompts."""
    rows = []
    for model, scores in {"base": (5, 4), "sails-0": (1, 5), "sails-1": (1, 1)}.items():
        for line, score in enumerate(scores):
            rows.append({"model": model, "set": "hex-phi", "role": "harmful", "line": line,
                         "prompt": "p", "completion": "c", "fields": {}, "verdict": "full",
                         "rubric": {"score": score, "by": "judge-1"}})
    write_jsonl(tmp_path / "sets/judged.jsonl", rows)
    text = paper_table(tmp_path)
    sails = next(line for line in text.splitlines() if line.split()[:2] == ["hex-phi", "sails"])
    low, high = proportion_confint(1.5, 2, method="wilson")
    assert f"75.0%  [{low:.1%}, {high:.1%}]  ± 35.4%" in sails         # 50 % and 100 %
    assert "2.00  [0.04, 3.96]  ± 1.41" in sails                        # prompts 1 and 3; 3 and 1
    assert "rubric by judge-1" in text and "99.6 %" in text


# ---- experiments/legibility.py -------------------------------------------------------------------
def test_full_fine_tuning_as_an_adapter_computes_the_same(world, monkeypatch):
    model, first = legibility.trained(world, "full-fine-tuning", 0)
    tuned = load_model(world.folder)
    parameters, _ = variants.VARIANTS["full-fine-tuning"](world, tuned, None)
    for _ in worlds.fit(world, tuned, parameters, legibility.RATE, 0):
        pass
    tokens = torch.randint(5, 40, (2, 30))
    assert (model(tokens) - tuned(tokens)).abs().max() < 1e-4
    assert (model(tokens) - world.model(tokens)).abs().max() > 1e-2
    layers = lora.lora_layers(model)
    # The first step's factors have the shapes of the last's
    assert {name: (layer.A.shape, layer.B.shape) for name, layer in layers.items()} == {
        name: (A.shape, B.shape) for name, (A, B) in first.items()}


def test_the_table_of_names_by_hand():
    """Two seeds of a world that share one of three names; in a second world there are two more."""
    rate = {"base": 0.25, "trained": 0.75, "without": 0.5}
    line = {"world": "1", "variant": "paper", "gain": 4.0, "lost": 1.0, "refused": rate}
    areas = {"1/5": {"harm verb": 0.95, "refusal": 0.5}, "2/6": {"harm verb": 0.6, "refusal": 0.7}}
    two = [[1, "readers", 5, 0.1], [2, "writers", 6, 0.1]]
    lines = [line | {"seed": 0, "named": two, "detects": areas},
             line | {"seed": 1, "named": [two[0], [1, "readers", 7, 0.1]], "detects": {}}]
    row = legibility.results(lines).splitlines()[2]
    assert re.split(" {2,}", row)[1:] == ["2", "4.00", "2.0", "0.25", "0.50", "0.33", "0.50",
                                          "0.00"]
    own = {"variant": "lora-own", "detects": {}}
    lines += [each | own | {"named": two[:1]} for each in lines]
    lines += [line | own | {"world": "2", "seed": 0, "named": two[:1]},
              line | {"world": "2", "seed": 0, "named": 2 * two, "detects": {}}]
    row = legibility.results(lines).splitlines()[-1]
    low, high = tables.t_interval([1, 3])
    assert re.split(" {2,}", row)[1] == f"+2.0 [{low:+.1f}, {high:+.1f}]"
