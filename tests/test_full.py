"""Full fine-tuning: steps against transformers and AdamW, float32 copies, whole runs."""

import re
import shutil

import pytest
import torch
from conftest import SETS, command, random_gemma, transformers_twin
from test_fused import compare, make_row
from test_train import call, refused

import eval
import report.__main__ as report
import train
from data import Row
from model import load_model
from run import session
from run.files import InputError, read_json, read_jsonl, read_tensors
from run.masters import master_copies, round_weights, trained_weights


def loss_and_gradients(model, loss, weights):
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in weights}


def test_a_step_is_that_of_transformers_and_adamw():
    model = random_gemma(std=0.2, sliding_window=50, num_hidden_layers=3)
    twin = transformers_twin(model).requires_grad_()
    tokens, documents, labels = row = make_row(200, B=2)
    theirs = [(name.removeprefix("model."), weight) for name, weight in twin.named_parameters()]
    ours = trained_weights(model, None)
    assert [name for name, _ in ours] == [name for name, _ in theirs]

    # The loss and every gradient, the embedding's among them
    total, count = model.nll_sum(model.hidden(tokens, documents)[0], labels)
    truth = twin(input_ids=tokens, labels=labels.roll(1, 1), use_cache=False).loss
    compare(loss_and_gradients(model, total / count, ours),
            loss_and_gradients(twin, truth, theirs), 1e-4)

    # AdamW's step. A large eps keeps the noise of tiny gradients from deciding its direction
    optimizers = [torch.optim.AdamW([weight for _, weight in named], eps=1e-2, weight_decay=0.0)
                  for named in (ours, theirs)]
    model.zero_grad()
    before = [weight.detach().clone() for _, weight in ours]
    next(train.fit(model, optimizers[0], [[Row(*row)]], lambda step: 1e-3))
    optimizers[1].step()
    for (name, weight), (_, other), old in zip(ours, theirs, before, strict=True):
        assert (weight - other).norm() <= 1e-4 * (other - old).norm(), name


def test_steps_too_small_for_bfloat16_add_up():
    """The copies take the same steps as float32 weights whose gradients a bfloat16 model makes."""
    model = random_gemma(std=0.2, num_hidden_layers=2).bfloat16()
    named = trained_weights(model, None)
    weights = [weight for _, weight in named]
    before = [weight.detach().clone() for weight in weights]
    masters = [master for _, master in master_copies(named)]
    optimizer = torch.optim.AdamW(masters, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: round_weights(weights, masters))
    rows = [Row(*make_row(60, seed)) for seed in (1, 2)]
    unchanged = []
    for _ in train.fit(model, optimizer, [rows] * 12, lambda step: 1e-4):
        pairs = list(zip(weights, before))
        unchanged.append(sum(int((new == old).sum()) for new, old in pairs))
        assert all(weight.grad is None for weight in weights)
        assert all(torch.equal(w, m.bfloat16()) for w, m in zip(weights, masters))
    assert unchanged[0] > 1.5 * unchanged[-1]       # what one step can't move, twelve do

    # Gradients of two micro-batches sum in float32
    model.zero_grad()
    sums = [torch.zeros_like(master) for master in masters]
    for row in rows:
        loss = train.row_loss(model, row)
        parts = torch.autograd.grad(loss, weights)
        sums = [total + part.float() for total, part in zip(sums, parts)]
        train.row_loss(model, row).backward()
    assert all(torch.equal(total, master.grad) for total, master in zip(sums, masters))


def full(mini, out, *more, sets=()):
    """The arguments of `command` that full fine-tuning has, in bfloat16."""
    arguments = command(mini, out, *more, sets=sets)
    for flag in ("--sae", "--rank"):
        place = arguments.index(flag)
        del arguments[place:place + 2]
    return ["--method", "full", "--dtype", "bfloat16", *arguments]


def test_a_run_leaves_a_checkpoint_and_resumes_to_the_same_bits(mini, tmp_path, monkeypatch):
    def save_and_copy(folder, *state):
        session.save_checkpoint(folder, *state)
        if folder.name == "whole" and not (tmp_path / "broken").exists():
            shutil.copytree(folder, tmp_path / "broken")            # as if it had died here

    monkeypatch.setattr(train, "save_checkpoint", save_and_copy)
    assert call(train.main, full(mini, tmp_path / "whole", sets=SETS), monkeypatch) == 0
    assert call(train.main, ["--resume", tmp_path / "broken"], monkeypatch) == 0
    whole, broken = (tmp_path / run for run in ("whole", "broken"))
    name = "model/model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    completions = [(run / "completions.jsonl").read_bytes() for run in (whole, broken)]
    assert completions[0] == completions[1]
    scores = read_json(whole / "scores.json")
    assert scores["trainable"] == scores["parameters"] and scores["share"]["subspace"] is None
    assert (whole / "model/tokenizer.json").exists()
    assert "Full fine-tuning of all weights" in (whole / "README.md").read_text()

    # transformers opens it
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole / "model").float()
    ours = load_model(whole / "model", torch.float32)
    tokens = make_row(40)[0] % ours.config.vocab_size
    assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4
    base = load_model(mini, torch.float32)
    assert all((new != old).any() for new, old in zip(ours.parameters(), base.parameters()))


def test_targets_train_nothing_else(mini, tmp_path, monkeypatch):
    arguments = full(mini, tmp_path / "run", "--targets", "q_proj", "norm")
    assert call(train.main, arguments, monkeypatch) == 0
    folders = mini, tmp_path / "run/model"
    old, new = (read_tensors(folder / "model.safetensors") for folder in folders)
    changed = {name for name in old if not torch.equal(old[name].bfloat16(), new[name])}
    assert changed == {name for name in old if "q_proj" in name or name == "model.norm.weight"}


@pytest.mark.parametrize("flags, words", [
    (["--rank", "8"], "--rank belongs to --method lora"),
    (["--targets", "head"], "--targets head: known are down_proj, embed_tokens")])
def test_flags_that_do_not_go_together(flags, words, mini, tmp_path, monkeypatch, capsys):
    assert words in refused([*full(mini, tmp_path / "run"), *flags], monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_asked_and_tabled(mini, tmp_path, monkeypatch, capsys):
    """Alone against its base, beside others in a column, and in no report of an adapter."""
    run, sets = tmp_path / "run", ["--set", f"harmful={mini}/harmful.jsonl"]
    assert call(train.main, full(mini, run, sets=SETS), monkeypatch) == 0
    assert re.search("base +trained +change, points", capsys.readouterr().out)
    answers = {}
    for name, models in (("alone", [run]), ("beside", [mini, run])):
        arguments = [*models, *sets, "--out", tmp_path / name]
        assert call(eval.main, arguments, monkeypatch) == 0
        rows = read_jsonl(tmp_path / name / "completions.jsonl")
        answers[name] = [row["completion"] for row in rows]
    assert answers["alone"] == answers["beside"]
    own = [row["completion"] for row in read_jsonl(run / "completions.jsonl")
           if row["set"] == "harmful"]
    assert answers["alone"] == own
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    with pytest.raises(InputError, match="trained the weights themselves"):
        report.main()
