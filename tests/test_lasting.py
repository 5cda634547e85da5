"""experiments/lasting: what arms and defences train, the runs, and the table of their lines."""

import copy
import sys

import pytest
import torch

import lora
from experiments import after, lasting, tables, worlds
from model import TARGETS
from run.files import InputError, read_jsonl


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(after, "COUNT", 100)


def rows_of(world):
    rows = after.toy_rows(lasting.Words(world.seed))["benign"][:20]
    return [world.example((("user", row["prompt"]),), row["response"]) for row in rows]


def trained(world, defence):
    """(the model before and after two steps, its adapters) under a defence."""
    model = copy.deepcopy(world.model)
    rows = rows_of(world)
    generator = torch.Generator().manual_seed(0)
    parameters, after_step = lasting.DEFENCES[defence](world, model, rows, generator)
    for metrics in worlds.fit(world, model, parameters, 1e-2, 0, worlds.batches_of(rows, 0), 2):
        after_step(metrics["step"])
    return model, lora.lora_layers(model)


@pytest.mark.parametrize("defence, bases_of", [
    ("paper", lasting.variants.paper), ("greedy", lasting.variants.greedy),
    ("random", lasting.random_bases)])
def test_a_kept_subspace_is_neither_read_nor_written(world, defence, bases_of):
    generator = torch.Generator().manual_seed(0)
    for module in lora.linears(world.model, TARGETS).values():      # the factors are drawn first
        lora.random(module.weight, None, lasting.RANK, False, generator)
    bases = bases_of(world, world.model, generator)
    _, layers = trained(world, defence)
    for name, layer in layers.items():
        touched = bases[name].T @ layer.update if layer.writer else layer.update @ bases[name]
        assert layer.update.norm() > 1e-4 and touched.norm() < 1e-5 * layer.update.norm()
    _, layers = trained(world, "none")
    assert all(lora.update_share(layer, bases[name]) > 1e-3 for name, layer in layers.items())


def test_as_many_random_directions_as_the_gradient_chooses(world):
    greedy, drawn = (bases_of(world, world.model, torch.Generator().manual_seed(0))
                     for bases_of in (lasting.variants.greedy, lasting.random_bases))
    assert {name: U.shape for name, U in drawn.items()} == {n: U.shape for n, U in greedy.items()}
    # One for each layer and side, which the modules there share
    assert len({U.sum().item() for U in drawn.values()}) == 2 * len(lasting.LAYERS)
    assert all((U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-5 for U in drawn.values())


@pytest.mark.parametrize("defence", ["salora", "guardspace"])
def test_a_start_changes_nothing_before_the_first_step(world, defence):
    model = copy.deepcopy(world.model)
    generator = torch.Generator().manual_seed(0)
    lasting.DEFENCES[defence](world, model, rows_of(world), generator)
    assert all(layer.update.norm() < 1e-5 for layer in lora.lora_layers(model).values())
    _, layers = trained(world, defence)
    assert all(layer.update.norm() > 1e-5 for layer in layers.values())


def test_frozen_units_stay(world):
    _, layers = trained(world, "ssah")
    frozen = {name: (layer.update == 0).all(1).sum() for name, layer in layers.items()}
    assert all((count > 0) == name.endswith("v_proj") for name, count in frozen.items())


def test_averaged_factors_by_hand(world, monkeypatch):
    monkeypatch.setattr(lasting, "LATER", 2)
    model, generator = copy.deepcopy(world.model), torch.Generator().manual_seed(0)
    parameters, after_step = lasting.averaged(world, model, rows_of(world), generator)
    first = [parameter.detach().clone() for _, parameter in parameters]
    for step in (1, 2):
        for _, parameter in parameters:
            parameter.data += step
        after_step(step)
    for (_, parameter), begun in zip(parameters, first):
        # .9·(.9·x + .1·(x + 1)) + .1·(x + 3)
        assert torch.allclose(parameter, begun + 0.39)


def test_mending_is_the_last_step(world, monkeypatch):
    monkeypatch.setattr(lasting, "LATER", 2)
    seen = []
    monkeypatch.setitem(lasting.DEFENCES, "mended",
                        lasting.mended(lambda *models: seen.append(models)))
    model, layers = trained(world, "mended")
    (aligned, tuned, unaligned, refusals, task), = seen
    assert tuned is model and not layers and unaligned is world.model and refusals and task
    for name, module in lora.linears(model, TARGETS).items():
        before = aligned.get_submodule(name).weight
        assert torch.equal(before, world.model.get_submodule(name).weight)
        assert not torch.equal(before, module.weight)


def test_an_arm_is_aligned_at_its_rate(world):
    name = "layers.0.self_attn.q_proj"
    slow, fast = (lasting.aligned_model(world, "full-fine-tuning", rate, 0).get_submodule(name)
                  for rate in (1e-4, 1e-3))
    before = world.model.get_submodule(name).weight
    moved = [(model.weight - before).abs().max().item() for model in (slow, fast)]
    # AdamW's first steps have the rate's size
    assert moved[1] == pytest.approx(10 * moved[0], rel=0.2)


def test_runs_are_lines_and_are_not_done_again(world, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lasting, "LATER", 1)
    short = ["--worlds", "7", "--seeds", "0", "--rows", "benign", "--out", f"{tmp_path}/out.jsonl"]

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lasting", *short, *arguments])
        lasting.main()
        return read_jsonl(tmp_path / "out.jsonl")

    monkeypatch.setitem(lasting.ARMS, "lora-own", ["none", "irr", "lssf"])
    monkeypatch.setattr(world, "sets", {name: rows[:1] + rows[-1:]
                                       for name, rows in world.sets.items()})
    arms = ["derta-paper", "sift", "steering-by-features", "lora-own"]
    lines = command("--arms", *arms)
    labels = [lasting.label(line) for line in lines]
    assert labels == ["derta-paper", "sift", "steering-by-features", "lora-own",
                      "lora-own, then irr", "lora-own, then lssf"]
    best = tables.best_rates(read_jsonl(lasting.RESULTS / "standing.jsonl"))
    assert [line["lr"] for line in lines[3:]] == 3 * [best["lora-own"]]
    assert command("--arms", *arms) == lines
    more = command("--arms", "lora-own", "--defences", "none", "--lr", "4e-3")
    assert more[:-1] == lines and more[-1]["lr"] == 4e-3 != best["lora-own"]
    capsys.readouterr()
    command("--print", "--arms", *arms, "--figure", f"{tmp_path}/out.png")
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(lines)
    with pytest.raises(InputError, match="no lines of 'identity'"):
        command("--print", "--rows", "identity")


def test_the_lead_is_paired_over_worlds():
    def line(world, variant, jailbreak, lost):
        before = {"harmful": 1.0, "jailbreak": jailbreak + lost, "benign": 1.0,
                  "over_refusal": {"harm verb": 0.2, "sensitive noun": 0.4}}
        return {"world": world, "seed": 0, "variant": variant, "defence": "none",
                "before": before, "after": {"benign": before | {"jailbreak": jailbreak}}}

    lines = [line(1, "lora-own", 0.5, 0.1), line(2, "lora-own", 0.7, 0.1),
             line(1, "paper", 0.6, 0.04), line(2, "paper", 0.9, 0.08)]
    row = lasting.results(lines, "benign").splitlines()[3]
    low, high = tables.t_interval([0.1, 0.2])
    assert row.split()[0] == "paper" and f"+15.0 [{100 * low:+.1f}, {100 * high:+.1f}]" in row
    low, high = tables.t_interval([-0.06, -0.02])
    assert f" -4.0 [{100 * low:+.1f}, {100 * high:+.1f}]" in row
    assert " 81.0 ± 2" in row and " 75.0 ± 1" in row and " 30.0 " in row
