"""The loop, whole runs, runs that break off and go on, and commands that can't be carried out."""

import functools
import os
import shutil
import signal
import sys

import huggingface_hub
import pytest
import torch
from conftest import SETS, command, random_gemma, start
from huggingface_hub.errors import GatedRepoError

import eval as evaluate
import lora
import train
from data import Row, load_tokenizer
from model import load_model
from report import __main__ as report
from run import session, settings
from run.files import (InputError, read_json, read_jsonl, read_metadata, read_tensors, run_command,
                       write_json, write_jsonl)


def call(main, arguments, monkeypatch):
    """A command's main in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main() or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(arguments, monkeypatch, capsys, main=train.main):
    """The one line on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: call(main, arguments, monkeypatch))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def adapter(folder):
    """Every bit of an adapter. (The file's header has no fixed order.)"""
    tensors = read_tensors(folder / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def logged_steps(folder):
    return [line["step"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


# ------------------------------------------------------------------------------
# The loop

def one_step(rows, **options):
    """Metrics of a step of rate 1, the update of one weight, and the model before."""
    model = random_gemma()
    weight = model.layers[0].self_attn.q_proj.weight.requires_grad_()
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    metrics = list(train.fit(model, optimizer, [rows], lambda step: 1.0, **options))
    update = before - weight.detach()
    weight.data.copy_(before)
    return metrics, update, model


def make_row(num_labels, seed=0):
    tokens, labels = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(seed))
    labels[num_labels:] = -100
    return Row(tokens, torch.ones(12, dtype=torch.long), labels)


def test_loss_is_a_mean_over_all_trained_tokens_of_a_step():
    """Micro-batches of unequal label counts make the gradient of their union."""
    rows = [make_row(1, 1), make_row(9, 2), make_row(0, 3)]
    (metrics,), update, model = one_step(rows)
    logits = model(torch.stack([row.tokens for row in rows])).flatten(0, 1)
    labels = torch.stack([row.labels for row in rows]).flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    weight = model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["trained_tokens"] == 10
    assert torch.allclose(update, gradient, atol=1e-6 * gradient.abs().max())


def test_a_step_without_labels_is_left_out(capsys):
    assert one_step([make_row(0)])[0] == []
    assert "step 1: a micro-batch without a trained token" in capsys.readouterr().err


def test_clipping_bounds_the_step():
    (metrics,), update, _ = one_step([make_row(12)], clip=1e-3)
    assert metrics["grad_norm"] > 1e-2 and update.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_schedule():
    rate = train.cosine(2.0, 100, 0.1)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(99) < 0.01 and rate(54) == pytest.approx(1.0, abs=0.03)
    assert all(rate(step) >= rate(step + 1) for step in range(9, 99))
    assert train.cosine(1.0, 1, 0.0)(0) == 1.0


# ------------------------------------------------------------------------------
# Whole runs

def test_a_run_leaves_what_it_says(whole, mini):
    assert {path.name for path in whole.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "features.json", "subspace.safetensors", "checkpoint",
        "adapter_config.json", "adapter_model.safetensors", "completions.jsonl", "judged.jsonl",
        "scores.json", "README.md", "first_step"}
    assert logged_steps(whole.folder) == [1, 2, 3, 4, 5, 6, 7]
    scores = read_json(whole.folder / "scores.json")
    assert scores["sets"]["adapter"]["harmful"]["n"] == 8
    assert scores["trainable"] == 3 * (4 * 8 * 64 + 8 * (64 + 32 + 32 + 64))
    share = scores["share"]
    assert share["first_step"] > share["subspace"] > 0.5 > share["random"]
    for words in ("safe: harmful prompts", "under jailbreak", "over-refusal", "right: benign",
                  "safety subspace", "trainable parameters", "seconds: training",
                  f"run: {whole.folder}", f"python -m report {whole.folder}"):
        assert words in whole.out
    encode = load_tokenizer(mini).encode
    rows = read_jsonl(whole.folder / "completions.jsonl")
    lengths = [len(encode(row["completion"])) for row in rows]
    assert len(lengths) == 2 * 4 * 8 and max(lengths) == 4


def test_frozen_basis_keeps_the_update_inside(mini, tmp_path, monkeypatch):
    arguments = ["--freeze-basis", "--tau", "0.3", *command(mini, tmp_path / "run")]
    assert call(train.main, arguments, monkeypatch) == 0
    share = read_json(tmp_path / "run" / "scores.json")["share"]
    assert share["subspace"] == pytest.approx(1, abs=1e-5) and share["random"] < 0.3


def test_random_init_needs_no_sae(mini, tmp_path, monkeypatch):
    arguments = ["--model", mini, "--data", mini / "train.jsonl", "--init", "random",
                 "--steps", "2", "--batch-tokens", "96", "--out", tmp_path / "run"]
    assert call(train.main, arguments, monkeypatch) == 0
    assert not (tmp_path / "run" / "features.json").exists()
    assert read_json(tmp_path / "run" / "scores.json")["share"]["subspace"] is None


@pytest.mark.parametrize("flags", [["--init", "random"], ["--init", "orthonormal"],
                                   ["--method", "full"]], ids=" ".join)
def test_training_needs_no_unaligned_answers(mini, tmp_path, monkeypatch, flags):
    """A recipe with SAEs trains on mixed rows to what the same rows give without their pairs."""
    rows = read_jsonl(mini / "train.jsonl")
    alone = [{"chosen": row["chosen"]} for row in rows]
    monkeypatch.setitem(settings.RECIPES, str(mini), {"sae": str(mini / "sae"), "layers": [0, 1]})
    shared = [*flags, "--model", mini, "--steps", "2", "--batch-tokens", "96"]
    for name, mixed in (("alone", alone), ("mixed", [*rows[:30], *alone[30:]])):
        write_jsonl(tmp_path / f"{name}.jsonl", mixed)
        arguments = [*shared, "--data", tmp_path / f"{name}.jsonl", "--out", tmp_path / name]
        assert call(train.main, arguments, monkeypatch) == 0
        assert read_json(tmp_path / name / "scores.json")["share"]["subspace"] is None
    losses = [[line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl")
               if "loss" in line] for name in ("alone", "mixed")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_dry_run_writes_nothing_and_needs_no_hub(mini, tmp_path, monkeypatch, capsys):
    assert call(train.main, ["--dry-run", *command(mini, tmp_path / "run")], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "7 of 2 × 96 tokens" in out and "flag" in out and not (tmp_path / "run").exists()
    assert "\nnot measured: harmful, jailbreak, lookalike, benign (" in out
    assert call(train.main, ["--model", "google/gemma-2-9b", "--dry-run"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "9,241,705,984" in out and "17,891,328 (0.1936%)" in out
    assert "google/gemma-scope-9b-pt-res" in out and "unknown" in out
    assert "\nnot measured" not in out and "prefix:hf://datasets/JailbreakBench" in out
    assert call(train.main, ["--dry-run"], monkeypatch) == 0
    assert "not measured" not in capsys.readouterr().out


def test_help_has_few_flags(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(train.main, ["--help"], monkeypatch)
    assert 20 < capsys.readouterr().out.count("\n  --") <= 34


def test_settings_of_an_older_run_get_defaults(whole, tmp_path):
    config = read_json(whole.folder / "config.json")
    del config["settings"]["norm_aware"]
    write_json(tmp_path / "config.json", config)
    saved = settings.saved_settings(tmp_path)
    assert saved.norm_aware is False and saved.rank == 8


# ------------------------------------------------------------------------------
# Runs that break off

@pytest.mark.parametrize("line, number", [
    ("layer 1", signal.SIGKILL), ("step 5/7", signal.SIGKILL), ("step 2/7", signal.SIGINT)])
def test_a_stopped_run_goes_on(whole, mini, tmp_path, monkeypatch, capsys, line, number):
    """Stopped once it printed a line that begins so; a kill may cut the log's last line."""
    folder = tmp_path / "run"
    again = arguments = command(mini, folder, sets=SETS)
    process = start("train.py", arguments)
    next(printed for printed in process.stdout if printed.startswith(line))
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130 and f"train.py --resume {folder}`" in err
        assert 2 <= int(read_metadata(folder / session.CHECKPOINT)["step"]) < 7
        again = ["--resume", folder]
    else:
        assert process.returncode == -number
        with open(folder / "metrics.jsonl", "a") as log:
            log.write('{"step": 6, "lo')
    assert call(train.main, again, monkeypatch) == 0
    assert "going on with the unfinished run" in capsys.readouterr().out
    assert adapter(folder) == adapter(whole.folder)
    answers = (folder / "completions.jsonl").read_bytes()
    assert answers == (whole.folder / "completions.jsonl").read_bytes()
    assert logged_steps(folder) == [1, 2, 3, 4, 5, 6, 7] and (folder / "scores.json").exists()


def test_a_crash_at_any_write_goes_on_to_the_same_adapter(whole, mini, tmp_path, monkeypatch):
    """The run dies just before each rename in turn, which is when a file comes to be."""
    folder, replace = tmp_path / "run", os.replace
    for survived in range(40):
        renames = iter(range(survived))

        def dies(source, target, renames=renames):
            if next(renames, None) is None:
                raise KeyboardInterrupt
            replace(source, target)
        monkeypatch.setattr(os, "replace", dies)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            call(train.main, command(mini, folder), monkeypatch)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
            assert call(train.main, command(mini, folder), monkeypatch) == 0
        assert adapter(folder) == adapter(whole.folder)
    assert survived > 8


def test_compiled_runs_resume_to_the_same_bits(mini, tmp_path, monkeypatch):
    """Rows hold examples of many lengths but have one shape, so one graph serves all of them.

    Traced, but not compiled to C++, which takes a minute: `train.py --compile` by hand does that.
    """
    def save_and_copy(folder, *state):
        session.save_checkpoint(folder, *state)
        if folder.name == "whole" and not (tmp_path / "broken").exists():
            shutil.copytree(folder, tmp_path / "broken")            # as if it had died here

    monkeypatch.setattr(train, "save_checkpoint", save_and_copy)
    monkeypatch.setattr(train, "use_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments = ["--compile", *command(mini, tmp_path / "whole"), "--steps", "5"]
    assert call(train.main, arguments, monkeypatch) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert read_metadata(tmp_path / "broken" / session.CHECKPOINT)["step"] == "3"
    assert call(train.main, ["--resume", tmp_path / "broken"], monkeypatch) == 0
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "broken")

    # A fork's loss is taken, compiled or not
    monkeypatch.setattr(train, "row_loss", lambda model, row, plain=train.row_loss:
                        2 * plain(model, row))
    arguments = ["--compile", *command(mini, tmp_path / "fork"), "--steps", "1"]
    assert call(train.main, arguments, monkeypatch) == 0
    losses = [line["loss"] for run in ("whole", "fork")
              for line in read_jsonl(tmp_path / run / "metrics.jsonl") if line.get("step") == 1]
    assert losses[1] == pytest.approx(2 * losses[0])


def test_a_diverged_run_keeps_the_weights_of_the_step_before(mini, tmp_path, monkeypatch, capsys):
    losses = iter([train.row_loss] * 8)             # two micro-batches a step: four steps

    def loss(model, row):
        return next(losses, lambda *row: torch.tensor(float("nan"), requires_grad=True))(model, row)

    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda *arguments: fit(*arguments[:-1], loss))
    assert "step 5: loss nan" in refused(command(mini, tmp_path / "run"), monkeypatch, capsys)
    assert read_metadata(tmp_path / "run" / session.CHECKPOINT)["step"] == "4"


def unfinished(whole, folder):
    """A copy of the whole run that lacks its last file."""
    shutil.copytree(whole.folder, folder)
    (folder / "scores.json").unlink()
    return folder


def test_a_run_whose_folders_moved_goes_on(whole, mini, tmp_path, monkeypatch):
    folder = unfinished(whole, tmp_path / "run")
    moved = shutil.copytree(mini, tmp_path / "moved")
    places = ["--model", moved, "--sae", moved / "sae", "--data", moved / "train.jsonl"]
    assert call(train.main, ["--resume", folder, *places], monkeypatch) == 0


@pytest.mark.parametrize("flag, file", [
    ("data", "train.jsonl"), ("model", "model.safetensors"),
    ("sae", "layer_1/width_96/average_l0_9/params.npz")])
def test_a_run_does_not_go_on_with_other_files(whole, mini, tmp_path, monkeypatch, capsys, flag,
                                               file):
    """Of the same shape, and after all selection and training is done."""
    folder = unfinished(whole, tmp_path / "run")
    source = {"data": mini / "train.jsonl", "model": mini, "sae": mini / "sae"}[flag]
    other = tmp_path / source.name
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, other)
    path = other / file if other.is_dir() else other
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    before = (folder / "config.json").read_bytes()
    line = refused(["--resume", folder, f"--{flag}", other], monkeypatch, capsys)
    assert f"{flag} of SHA-256" in line and (folder / "config.json").read_bytes() == before


def test_a_run_that_moved_together_with_its_inputs_goes_on(mini, tmp_path, monkeypatch, capsys):
    """No flag says where they are. Explained and asked, too."""
    old = tmp_path / "old"
    shutil.copytree(mini, old / "mini")
    arguments = command(old / "mini", old / "runs/a", sets=["harmful"])
    assert call(train.main, [*arguments, "--steps", "1"], monkeypatch) == 0
    new = old.rename(tmp_path / "new")
    scores = (new / "runs/a/scores.json").rename(tmp_path / "scores.json")
    assert call(train.main, ["--resume", new / "runs/a"], monkeypatch) == 0
    harmful = f"mine:harmful={new / 'mini/harmful.jsonl'}"
    asked = [new / "runs/a", "--set", harmful, "--out", tmp_path / "asked"]
    assert call(evaluate.main, asked, monkeypatch) == 0
    explained = [new / "runs/a", "--prompts", "2"]
    assert call(report.main, explained, monkeypatch) == 0

    # What didn't move along is asked for, and must be what it was
    apart = (new / "mini").rename(tmp_path / "apart")
    for name in ("explain.json", "report.html"):
        (new / "runs/a" / name).unlink()
    gone = refused(explained, monkeypatch, capsys, report.main)
    assert "no such file or folder: --model says where it is now" in gone
    asked[-1] = tmp_path / "again"
    asked[2] = f"mine:harmful={apart / 'harmful.jsonl'}"
    assert "--model" in refused(asked, monkeypatch, capsys, evaluate.main)
    now = ["--model", apart, "--data", apart / "train.jsonl"]
    assert call(evaluate.main, [*asked, *now], monkeypatch) == 0
    now += ["--sae", apart / "sae", "--set", f"harmful={apart / 'harmful.jsonl'}"]
    assert call(report.main, [*explained, *now], monkeypatch) == 0
    (new / "runs/a/explain.json").unlink()
    line = refused([*explained, *now, "--data", apart / "harmful.jsonl"], monkeypatch, capsys,
                   report.main)
    assert "--data" in line and "something else" in line and scores.exists()


def test_a_finished_run_is_never_overwritten(whole, mini, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}
    for arguments in (command(mini, whole.folder, sets=SETS), ["--resume", whole.folder]):
        assert "finished run" in refused(arguments, monkeypatch, capsys)
    assert before == {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.time, "strftime", lambda form: "now")
    names = [session.run_folder(None, "toy").name for _ in range(3)]
    assert names == ["now-toy", "now-toy-2", "now-toy-3"]


def test_a_small_model_takes_one_thread(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with torch.device("meta"):
        small, large = torch.nn.Linear(10, 10), torch.nn.Linear(10**4, 10**4)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    session.limit_threads(small)
    monkeypatch.delenv("OMP_NUM_THREADS")
    session.limit_threads(large)
    assert chosen == []
    session.limit_threads(small)
    assert chosen == [1]


# ------------------------------------------------------------------------------
# Wrong commands: one line that names the thing, exit code 2, nothing left behind

@pytest.mark.parametrize("flags, words", [
    (["--model", "nosuchmodel"], ["nosuchmodel", "no such folder"]),
    (["--model", "owner/.."], ["owner/.."]),
    (["--model", "https://huggingface.co/google/gemma-2-2b"], ["https://huggingface.co"]),
    (["--data", "nosuch.jsonl"], ["nosuch.jsonl", "no such file"]),
    (["--sae", "nosuchsae"], ["nosuchsae"]),
    (["--layers", "0", "7"], ["layer 7", "layer_0/", "layer_1/"]),
    (["--more", "width=16k"], ["16k", "96"]),
    (["--more", "nosuch=1"], ["nosuch", "accumulate"]),
    (["--batch-token", "96"], ["--batch-token "]),
    (["--rank", "65"], ["--rank 65", "64"]),
    (["--targets", "q_proj", "norm"], ["--targets norm", "down_proj"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--dtype", "float16"], ["float16", "bfloat16"]),
    (["--device", "tpu9"], ["tpu9"]),
    (["--top-k", "97"], ["--top-k 97", "fewer features"]),
    (["--tau", "1.5"], ["--tau", "at most 1"]),
    (["--log", "tensorboard"], ["pip install tensorboard"]),
    (["--freeze-basis", "--init", "random"], ["--freeze-basis"]),
    (["--shard"], ["--shard", "torchrun"]),
    (["--batch-tokens", "8"], ["train.jsonl", "raise --batch-tokens"]),
    (["--set", "nosuch.txt"], ["ROLE=FILE", "harmful"]),
])
def test_wrong_flags(mini, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    line = refused([*command(mini, tmp_path / "run"), *flags], monkeypatch, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


SAE = "sae/layer_1/width_96/average_l0_9/params.npz"


@pytest.mark.parametrize("name, change, words", [
    ("config.json", lambda b: b.replace(b"gemma2", b"llama"), ["config.json", "llama"]),
    ("config.json", lambda b: b.replace(b'size": 96', b'size": 95'), ["shape"]),
    ("config.json", lambda b: b.replace(b'size": 200', b'size": 190'), ["199", "190 embeddings"]),
    ("model.safetensors", lambda b: b[:-100], ["model.safetensors"]),
    ("model.safetensors", lambda b: b.replace(b"l.norm.w", b"l.nope.w"), ["model.nope.weight"]),
    (SAE, lambda b: None, ["params.npz"]),
    ("train.jsonl", lambda b: b"", ["train.jsonl", "no "]),
    ("train.jsonl", lambda b: b + b'{"chosen": \n', ["train.jsonl:61"]),
    ("train.jsonl", lambda b: b + b'{"prompt": "a", "response": "b"}\n',
     ["train.jsonl:61", "no unaligned answer", "--init random", "--method full"]),
])
def test_broken_files(mini, tmp_path, monkeypatch, capsys, name, change, words):
    folder = shutil.copytree(mini, tmp_path / "broken")
    path = folder / name
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    line = refused(command(folder, tmp_path / "run"), monkeypatch, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_missing_flags_are_asked_for_by_name(mini, monkeypatch, capsys):
    assert "--sae and --data" in refused(["--model", mini, "--rank", "8"], monkeypatch, capsys)
    arguments = ["--model", mini, "--sae", "someone/saes", "--data", mini / "train.jsonl"]
    assert "--layers" in refused(arguments, monkeypatch, capsys)


def test_no_network(mini, tmp_path, monkeypatch, capsys):
    arguments = ["--model", "google/gemma-2-2b", "--data", mini / "train.jsonl"]
    line = refused([*arguments, "--out", tmp_path / "run"], monkeypatch, capsys)
    assert "google/gemma-2-2b" in line and "hub" in line and not (tmp_path / "run").exists()


def test_gated_repositories(monkeypatch):
    def gated(*arguments, **more):
        raise GatedRepoError("403", response=None)
    monkeypatch.setattr(GatedRepoError, "__init__", lambda *arguments, **more: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    page = "https://huggingface.co/google/gemma-2-2b"
    with pytest.raises(InputError, match=f"gemma-2-2b is gated: accept its licence at {page}"):
        load_model("google/gemma-2-2b")


def test_output_folders(whole, mini, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(command(mini, tmp_path / "file" / "run"), monkeypatch, capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("my only copy")
    assert "full" in refused(command(mini, tmp_path / "full"), monkeypatch, capsys)
    folder = unfinished(whole, tmp_path / "unfinished")
    other_lr = [*command(mini, folder, sets=SETS), "--lr", "2e-2"]
    assert "--lr 0.01, not 0.02" in refused(other_lr, monkeypatch, capsys)
    assert "--lr" in refused(["--resume", folder, "--lr", "2e-2"], monkeypatch, capsys)
    assert "nosuch" in refused(["--resume", tmp_path / "nosuch"], monkeypatch, capsys)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"command": ["fork.py"]})
    assert "script fork.py, not" in refused(["--resume", folder], monkeypatch, capsys)
    assert "--out" in refused(["--resume", folder, "--out", tmp_path], monkeypatch, capsys)


# ------------------------------------------------------------------------------
# Real inputs

def test_real_pairs_and_prompts(shared, mini, tmp_path, monkeypatch):
    """HH-RLHF pairs and XSTest prompts as they are published, to an adapter that loads again."""
    arguments = [*command(mini, tmp_path / "run"), "pairs=16", "eval-batch=8", "--steps", "3",
                 "--batch-tokens", "512", "--data", shared / "hh_rlhf_harmless_base_test.jsonl.gz",
                 "--set", f"lookalike={shared / 'xstest_prompts.csv'}", "--eval-prompts", "3"]
    assert call(train.main, arguments, monkeypatch) == 0
    assert len(lora.load_adapter(load_model(mini), tmp_path / "run")) == 12
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert len(rows) == 6 and all(row["fields"]["label"] == "safe" for row in rows)
