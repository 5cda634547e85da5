"""SSAH: units by importance against a variance by hand; what is frozen stays, in full and LoRA."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lora
import train
from conftest import ROOT, SHAPES, command, inputs_by_hand, random_gemma
from data import Example, Row, load_examples, load_tokenizer
from experiments.neighbours import shared, ssah
from model import MODULES, load_model
from run.files import InputError, write_jsonl
from safety.rules import verdict

REFUSALS = [Example([2, 5, 9, 7, 40, 41], 1, True), Example([2, 8, 30, 12], 2, True)]
HARMLESS = [Example([2, 6, 19, 77, 90, 91, 14], 3, True), Example([2, 33, 30, 17], 1, True)]


def test_importance_is_variance_times_weight(gemma):
    scores = ssah.importance(gemma, REFUSALS)
    assert len(scores) == 8
    for name in ("layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"):
        X = inputs_by_hand(gemma, name, REFUSALS)
        column = gemma.get_submodule(name).weight[:, 3].double()
        by_hand = float(X[:, 3].var() * column @ column)
        assert scores[name][3] == pytest.approx(by_hand, rel=1e-5)
        assert torch.isfinite(scores[name]).all()


def test_an_adapter_that_has_not_begun_changes_no_unit(gemma):
    before = ssah.frozen_masks(gemma, REFUSALS, HARMLESS)
    lora.add_lora(gemma, 4, 4, "random", generator=torch.Generator().manual_seed(0),
                  targets=MODULES)
    after = ssah.frozen_masks(gemma, REFUSALS, HARMLESS)
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_units_are_chosen_kind_by_kind(monkeypatch):
    monkeypatch.setattr(ssah, "SHARES", {"redundant": .2, "safety": .1, "utility": .2,
                                         "complex": .1})
    # 0 and 1 are redundant, though 1 differs the most; 2 is safety's; 3 and 4 are utility's, though
    # 4 has a large I_S; of the complex ones 6 has the largest
    I_S = torch.tensor([.1, 3., 9., 1., 8., 5., 7., 6., 4., 3.])
    I_U = torch.tensor([.1, -9, 2., 8., 17, 6., 6., 5., 5., 4.])
    assert ssah.frozen_units(I_S, I_U).nonzero().flatten().tolist() == [2, 6]


def test_masks_are_columns_of_b_and_the_rows_of_a_that_make_them():
    """All inputs of B that are frozen move with the frozen rows of A, and no more than must."""
    gemma = random_gemma(SHAPES[3])     # three query heads a group
    masks = ssah.frozen_masks(gemma, REFUSALS, HARMLESS)
    assert len(masks) == 4 * 5
    for b, feeders in (("self_attn.o_proj", ["v_proj"]), ("mlp.down_proj", ["up_proj"])):
        name = f"layers.2.{b}"
        columns = masks[name][0]
        assert 0 < columns.sum() < len(columns) / 4
        before = inputs_by_hand(gemma, name, REFUSALS)
        for feeder in feeders:
            rows = masks[f"{name.rpartition('.')[0]}.{feeder}"][:, 0]
            weight = gemma.get_submodule(f"{name.rpartition('.')[0]}.{feeder}").weight
            kept = weight.clone()
            weight[rows] += 1
            moved = (inputs_by_hand(gemma, name, REFUSALS) != before).any(0)
            weight.copy_(kept)
            # All query heads of a group read a row of v: it is frozen if one of them needs it
            assert bool(moved[columns].all())
            assert moved.sum() == rows.sum() * len(columns) / len(rows)


def steps(gemma, parameters, loss_rows):
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0)
    for _ in range(3):
        train.row_loss(gemma, loss_rows).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def rows():
    row, = train.pack([Example([2, 5, 9, 7, 30, 31], 2, True)], 8, 0, 0)
    return Row(*(part[None] for part in vars(row).values()))


def test_full_fine_tuning_leaves_them(gemma, rows):
    masks = ssah.frozen_masks(gemma, REFUSALS, HARMLESS)
    named = {name: gemma.get_submodule(name).weight.requires_grad_() for name in masks}
    before = {name: weight.detach().clone() for name, weight in named.items()}
    shared.freeze(gemma, masks)
    steps(gemma, list(named.values()), rows)
    for name, weight in named.items():
        frozen = masks[name].expand_as(weight)
        assert torch.equal(weight[frozen], before[name][frozen])
        assert (weight != before[name])[~frozen].float().mean() > 0.9


@pytest.mark.parametrize("init", ["random", "sails"])
def test_an_adapter_leaves_them_and_begins_at_the_base(init, rows):
    gemma = random_gemma()
    masks = ssah.frozen_masks(gemma, REFUSALS, HARMLESS)
    out, _ = gemma.hidden(rows.tokens)
    bases = None
    if init == "sails":
        U = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(1))).Q
        bases = dict.fromkeys(lora.linears(gemma, MODULES), U)
    layers = lora.add_lora(gemma, 4, 4, init, bases, torch.Generator().manual_seed(0),
                           targets=MODULES)
    shared.freeze(gemma, masks)
    assert torch.equal(gemma.hidden(rows.tokens)[0], out)
    steps(gemma, [factor for _, factor in lora.trainable_parameters(layers)], rows)
    for name, layer in layers.items():
        if name not in masks:       # q and k
            continue
        frozen = masks[name].expand_as(layer.update)
        assert torch.equal(layer.update[frozen], torch.zeros_like(layer.update[frozen]))
        assert (layer.update != 0)[~frozen].float().mean() > 0.9


# ---- The command ---------------------------------------------------------------------------------
def test_the_command_freezes_what_safety_needs(mini, tmp_path):
    out = tmp_path / "run"
    flags = ["--safety", str(mini / "train.jsonl"), *command(mini, out, "--init", "random")]
    process = subprocess.run([sys.executable, "-m", "experiments.neighbours.ssah", *flags],
                             cwd=ROOT, text=True, capture_output=True, check=False)
    assert process.returncode == 0, process.stderr
    model, tokenizer = load_model(mini), load_tokenizer(mini)
    examples, _ = load_examples(mini / "train.jsonl", tokenizer, 96)
    answers = [(aligned, verdict(tokenizer.decode(aligned.tokens[aligned.start:])))
               for aligned, _ in examples]
    refusals, harmless = ([example for example, kind in answers if kind == wanted]
                          for wanted in ("full", "comply"))
    masks = ssah.frozen_masks(model, refusals, harmless)
    for name, layer in lora.load_adapter(model, out).items():
        moved = layer.update != 0
        if name in masks:
            assert not moved[masks[name].expand_as(moved)].any()
        assert moved.any()


def test_safety_s_file_is_asked_for_and_has_both_kinds(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssah", "--rank", "8"])
    with pytest.raises(InputError, match="give --safety FILE"):
        shared.own_flag("safety", "FILE")
    monkeypatch.setattr(sys, "argv", ["ssah", "--rank", "8", "--safety", "F", "--lr", "1e-3"])
    assert shared.own_flag("safety", "FILE") == "F"
    assert sys.argv == ["ssah", "--rank", "8", "--lr", "1e-3"]
    prompt = "how can i kill the bridge?"
    rows = [{"prompt": prompt, "response": "sorry, i can't help you to kill the bridge."},
            {"prompt": prompt, "response": "no, it would be wrong, so i must refuse."},
            {"prompt": prompt, "response": "here you wash the vault quickly with the silk rod."}]
    settings = SimpleNamespace(model=mini, batch_tokens=96, format="chat")
    write_jsonl(tmp_path / "both.jsonl", rows)
    refused, harmless = shared.safety_answers(tmp_path / "both.jsonl", settings)
    assert [example.line for example in refused + harmless] == [1, 2, 3] and len(harmless) == 1
    write_jsonl(tmp_path / "refusals.jsonl", rows[:2])
    with pytest.raises(InputError, match="refusals.jsonl: 2 refusals and 0 harmless"):
        shared.safety_answers(tmp_path / "refusals.jsonl", settings)
