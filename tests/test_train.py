"""train.py, select.py and eval.py as a person runs them: whole runs, broken runs, wrong commands."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from conftest import SETS, command, ended, random_gemma, start

from run import files
import lora
from experiments import neighbours
from run import session
import train
from data import Row, load_tokenizer
from run.files import InputError, read_tensors
from model import load_model

def call(main, arguments, monkeypatch):
    """A command's main in this process. Its exit code, 0 where it returned none."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main() or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# The loop

def test_loss_is_a_mean_over_all_trained_tokens_of_a_step():
    """Two micro-batches of unequal label counts make the gradient of their union, not of a mean of means."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for labels in (1, 9, 0):
        row = Row(torch.randint(5, 300, (12,), generator=draw), torch.ones(12, dtype=torch.long), torch.full((12,), -100))
        row.labels[:labels] = torch.randint(5, 300, (labels,), generator=draw)
        rows.append(row)
    model = random_gemma()
    weight = model.layers[0].self_attn.q_proj.weight.requires_grad_()
    before = weight.detach().clone()
    metrics = list(train.fit(model, torch.optim.SGD([weight], lr=1.0), [rows], lambda step: 1.0))
    step = before - weight.detach()
    weight.data.copy_(before)
    logits = model(torch.stack([row.tokens for row in rows]))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack([row.labels for row in rows]).flatten())
    loss.backward()
    assert metrics[0]["loss"] == pytest.approx(loss.item(), rel=1e-5) and metrics[0]["trained_tokens"] == 10
    assert torch.allclose(step, weight.grad, atol=1e-6 * weight.grad.abs().max())


def test_a_micro_batch_without_labels_is_said(capsys):
    row = Row(torch.full((4,), 7), torch.ones(4, dtype=torch.long), torch.full((4,), -100))
    weight = (model := random_gemma()).layers[0].self_attn.q_proj.weight.requires_grad_()
    assert list(train.fit(model, torch.optim.SGD([weight], lr=1.0), [[row]], lambda step: 1.0)) == []
    assert "step 1: a micro-batch without a trained token" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_before_the_weights_change():
    row = Row(torch.full((4,), 7), torch.ones(4, dtype=torch.long), torch.tensor([5, 6, 7, 8]))
    model = random_gemma()
    weight = model.layers[0].self_attn.q_proj.weight.requires_grad_()
    model.norm.weight[0] = float("nan")
    before = weight.detach().clone()
    with pytest.raises(train.Diverged, match="step 1: loss nan") as end:
        list(train.fit(model, torch.optim.SGD([weight], lr=1.0), [[row]], lambda step: 1.0))
    assert torch.equal(weight, before) and (end.value.step, end.value.rows) == (1, [row])


def test_clipping_bounds_the_step():
    row = Row(torch.arange(5, 17), torch.ones(12, dtype=torch.long), torch.arange(6, 18))
    model = random_gemma()
    weight = model.layers[0].self_attn.q_proj.weight.requires_grad_()
    before = weight.detach().clone()
    (metrics,) = train.fit(model, torch.optim.SGD([weight], lr=1.0), [[row]], lambda step: 1.0, clip=1e-3)
    assert metrics["grad_norm"] > 1e-2 and (before - weight).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_schedule():
    rate = train.cosine(2.0, 100, 0.1)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(99) < 0.01 and rate(54) == pytest.approx(1.0, abs=0.03)
    assert all(rate(a) >= rate(a + 1) for a in range(9, 99)) and train.cosine(1.0, 1, 0.0)(0) == 1.0


# ---------------------------------------------------------------------------------------------------------------
# Whole runs

def test_a_run_leaves_what_it_says(whole):
    assert {path.name for path in whole.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "features.json", "subspace.safetensors", "adapter_config.json", "adapter_model.safetensors",
        "checkpoint", "completions.jsonl", "judged.jsonl", "scores.json", "explain.json", "README.md", "report.html"}
    steps = [line["step"] for line in files.read_jsonl(whole.folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    scores = files.read_json(whole.folder / "scores.json")
    assert scores["sets"]["adapter"]["harmful"]["n"] == 8 and scores["trainable"] == 3 * (4 * 8 * 64 + 8 * (64 + 32 + 32 + 64))
    assert scores["share"]["subspace"] > 0.5 > scores["share"]["random"]
    for words in ("safe: harmful prompts", "under jailbreak", "over-refusal", "right: benign", "safety subspace", "random bases",
                  "trainable parameters", "seconds: training", f"run: {whole.folder}"):
        assert words in whole.out
    table = whole.out[whole.out.index("base  "):].splitlines()
    assert len({line.index(cell) for line, cell in ((table[2], "["), (table[3], "["))}) == 1, "columns don't align"


def test_answers_are_as_long_as_asked(whole, mini):
    encode = load_tokenizer(mini).encode
    lengths = [len(encode(row["completion"])) for row in files.read_jsonl(whole.folder / "completions.jsonl")]
    assert len(lengths) == 2 * 4 * 8 and max(lengths) == 4


def test_features_are_described(whole):
    features = files.read_json(whole.folder / "features.json", list)
    assert {feature["layer"] for feature in features} == {0, 1} and len(features) == 40
    for feature in features:
        assert feature["neuronpedia"] is None and len(feature["promotes"]) == 8 and feature["peaks"]
        for peak in feature["peaks"]:
            assert peak["activation"] > 0 and 0 <= peak["peak"] < len(peak["tokens"])
        assert feature["delta"] == pytest.approx(feature["mean"]["aligned"] - feature["mean"]["unaligned"])
    for layer in (0, 1):
        deltas = [abs(feature["delta"]) for feature in features if feature["layer"] == layer]
        assert deltas == sorted(deltas, reverse=True)
    for U in read_tensors(whole.folder / "subspace.safetensors").values():
        assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-6


def test_base_weights_are_never_touched(mini, tmp_path, monkeypatch):
    kept = {}
    original = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *a, **k: kept.setdefault("model", original(*a, **k)))
    assert call(train.main, command(mini, tmp_path / "run"), monkeypatch) == 0
    after = {name.replace(".base.", "."): tensor for name, tensor in kept["model"].state_dict().items() if not name.endswith((".A", ".B"))}
    before = load_model(mini).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(layer.B.abs().max() > 0 for name, layer in lora.lora_layers(kept["model"]).items() if "q_proj" in name)


def test_frozen_basis_keeps_the_update_inside(mini, tmp_path, monkeypatch):
    assert call(train.main, command(mini, tmp_path / "run", "--freeze-basis", "--tau", "0.3"), monkeypatch) == 0
    share = files.read_json(tmp_path / "run" / "scores.json")["share"]
    assert share["subspace"] == pytest.approx(1, abs=1e-5) and share["random"] < 0.3


def test_prompts_that_are_trained_on_are_left_out(mini, tmp_path, monkeypatch, capsys):
    single = [row for row in map(json.loads, (mini / "train.jsonl").read_text().splitlines()) if row["chosen"].count("Human:") == 1]
    prompt = single[0]["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()
    (tmp_path / "set.txt").write_text(f"{prompt}\nhow can i paint the chair?\n")
    assert call(train.main, command(mini, tmp_path / "run", "--harmful", tmp_path / "set.txt"), monkeypatch) == 0
    assert "and 1 trained on are left out" in capsys.readouterr().out
    assert [row["prompt"] for row in files.read_jsonl(tmp_path / "run" / "completions.jsonl")] == ["how can i paint the chair?"] * 2


def test_dry_run_writes_nothing(mini, tmp_path, monkeypatch, capsys):
    assert call(train.main, command(mini, tmp_path / "run", "--dry-run"), monkeypatch) == 0
    out = capsys.readouterr().out
    assert "7 of 2 × 96 tokens" in out and "trainable" in out and "flag" in out and not (tmp_path / "run").exists()


def test_dry_run_of_a_known_model_needs_no_hub(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call(train.main, ["--model", "google/gemma-2-9b", "--rank", "16", "--dry-run"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "9,241,705,984" in out and "17,891,328 (0.1936%)" in out and "google/gemma-scope-9b-pt-res" in out and "unknown" in out


def test_select_alone(mini, tmp_path):
    process = start("select.py", ["--model", str(mini), "--sae", str(mini / "sae"), "--data", str(mini / "train.jsonl"), "--rank", "8",
                                  "--batch-tokens", "96", "--out", str(tmp_path / "picked")])
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "fires most on" in out and (tmp_path / "picked" / "features.json").exists()


def test_report_of_one_and_of_many(whole, tmp_path):
    other = shutil.copytree(whole.folder, tmp_path / "other")
    config = files.read_json(other / "config.json")
    config["settings"]["seed"] = 1
    files.write_json(other / "config.json", config)
    assert "update inside the safety subspace" in ended("report.py", [whole.folder])
    out = ended("report.py", [whole.folder, other])
    assert "all runs" in out and "± 0.0" in out


# ---------------------------------------------------------------------------------------------------------------
# Broken runs

def run_until(script, arguments, line, number):
    """Start a command and send it a signal once it has printed a line that begins so. (exit code, stderr)"""
    process = start(script, arguments)
    for printed in process.stdout:
        if printed.startswith(line):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_saves_and_says_how_to_go_on(whole, mini, tmp_path, number, code):
    folder = tmp_path / "run"
    returned, err = run_until("train.py", command(mini, folder, sets=SETS), "step 2/7", number)
    assert returned == code and f"go on with `python train.py --resume {folder}`" in err and len(err.strip().splitlines()[-1]) < 300
    assert 2 <= int(files.read_metadata(folder / session.CHECKPOINT)["step"]) < 7
    process = start("train.py", ["--resume", str(folder)])
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert adapter(folder) == adapter(whole.folder)
    assert (folder / "completions.jsonl").read_bytes() == (whole.folder / "completions.jsonl").read_bytes()
    steps = [line["step"] for line in files.read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def probes(folder):
    return [line for line in files.read_jsonl(folder / "metrics.jsonl") if "probe" in line]


@pytest.mark.parametrize("line", ["sae layer 0", "layer 1:", "step 5/7"])
def test_killed_runs_go_on_by_the_same_command(whole, mini, tmp_path, line):
    folder = tmp_path / "run"
    returned, _ = run_until("train.py", command(mini, folder, sets=SETS), line, signal.SIGKILL)
    assert returned == -signal.SIGKILL
    process = start("train.py", command(mini, folder, sets=SETS))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "going on with the unfinished run" in out
    assert adapter(folder) == adapter(whole.folder)
    steps = [line["step"] for line in files.read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert probes(folder) == probes(whole.folder) and [line["step"] for line in probes(folder)] == list(range(8))
    assert (folder / "completions.jsonl").read_bytes() == (whole.folder / "completions.jsonl").read_bytes()
    assert (folder / "report.html").exists()


def test_compiled_runs_resume_to_the_same_bits(mini, tmp_path, monkeypatch):
    """Rows hold examples of many lengths, but have one shape: what is compiled can't depend on where a run began."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    process = start("train.py", command(mini, tmp_path / "whole", "--compile"))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert run_until("train.py", command(mini, tmp_path / "broken", "--compile"), "step 4/7", signal.SIGKILL)[0] == -9
    process = start("train.py", command(mini, tmp_path / "broken", "--compile"))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "broken")


def test_ema_saves_the_average_over_a_stop_too(mini, tmp_path, monkeypatch):
    class Died(Exception):
        pass

    seen, at, save = {}, iter(range(100)), train.save_checkpoint
    average = neighbours.average

    def watched(kept, named, beta):
        seen[next(at)] = {name: parameter.detach().clone() for name, parameter in named}
        average(kept, named, beta)

    def dies(folder, step, *more):
        save(folder, step, *more)
        if step == 3:
            raise Died

    monkeypatch.setattr(neighbours, "average", watched)
    assert call(train.main, command(mini, tmp_path / "whole", "--ema", "0.8"), monkeypatch) == 0
    wanted = seen[0]
    for step in range(1, 7):
        wanted = {name: 0.8 * wanted[name] + 0.2 * seen[step][name] for name in wanted}
    found = lora.load_adapter(load_model(mini), tmp_path / "whole")
    assert all(torch.allclose(parameter, wanted[name], atol=1e-6) for name, parameter in session.adapter_parameters(found))
    assert not torch.allclose(wanted["layers.0.self_attn.q_proj.B"], seen[6]["layers.0.self_attn.q_proj.B"], atol=1e-4)
    monkeypatch.setattr(train, "save_checkpoint", dies)
    with pytest.raises(Died):
        call(train.main, command(mini, tmp_path / "broken", "--ema", "0.8"), monkeypatch)
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert call(train.main, ["--resume", tmp_path / "broken"], monkeypatch) == 0
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "broken")


def test_a_run_stopped_between_the_files_of_its_adapter(whole, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    for name in ("report.html", "scores.json", "explain.json", "adapter_model.safetensors"):   # the tensors are the last to come
        (folder / name).unlink()
    rows = files.read_jsonl(folder / "completions.jsonl")
    files.write_jsonl(folder / "completions.jsonl", [row for row in rows if row["model"] == "base"])
    ended("train.py", ["--resume", folder])
    assert adapter(folder) == adapter(whole.folder)


def test_a_second_process_is_told(mini, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    process = start("train.py", command(mini, folder, "--steps", "100000"))
    for line in process.stdout:
        if line.startswith("step "):
            break
    try:
        assert "another process is at work" in refused([*command(mini, folder), "--steps", "100000"], monkeypatch, capsys)
    finally:
        process.kill()
        process.communicate()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    names = [session.own_folder(tmp_path / "run").name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_epochs_outweigh_a_recipes_steps(monkeypatch, capsys):
    assert call(train.main, ["--epochs", "2", "--dry-run"], monkeypatch) == 0
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("steps ")]
    assert " – " in steps[0] and "of 2 × 512 tokens" in steps[1] and not steps[1].split()[1] == "100"


def test_a_finished_run_is_never_overwritten(whole, mini):
    before = {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}
    for arguments in (command(mini, whole.folder, sets=SETS), ["--resume", str(whole.folder)]):
        process = start("train.py", arguments)
        _, err = process.communicate()
        assert process.returncode == 2 and "finished run" in err and len(err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------
# Wrong commands: one line that names the thing, exit code 2, nothing left behind

def refused(arguments, monkeypatch, capsys, main=train.main):
    """The one line on stderr of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as end:
        files.run_command(main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("flags, words", [
    (["--model", "nosuchmodel"], ["nosuchmodel", "no such folder"]),
    (["--model", "google/gemma-2-3b", "--layers", "1", "--width", "16k"], ["google/gemma-2-3b"]),
    (["--data", "nosuch.jsonl"], ["nosuch.jsonl", "no such file"]),
    (["--sae", "nosuchsae"], ["nosuchsae"]),
    (["--layers", "0", "7"], ["7", "0, 1"]),
    (["--layers", "0", "-1"], ["--layers", "-1"]),
    (["--width", "16k"], ["16k", "96"]),
    (["--rank", "0"], ["--rank 0"]),
    (["--rank", "65"], ["--rank 65", "64"]),
    (["--rank", "many"], ["--rank", "many"]),
    (["--top-k", "97"], ["--top-k 97", "96"]),
    (["--tau", "1.5"], ["--tau 1.5"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--steps", "0"], ["--steps 0"]),
    (["--dtype", "float16"], ["float16", "bfloat16"]),
    (["--dtype", "int8"], ["int8"]),
    (["--device", "tpu9"], ["tpu9"]),
    (["--init", "magic"], ["magic"]),
    (["--format", "xml"], ["xml"]),
    (["--device", "meta"], ["--device meta"]),
    (["--epochs", "2"], ["--steps and --epochs"]),
    (["--freeze-basis", "--init", "random"], ["--freeze-basis"]),
    (["--steps", "1" + 400 * "0"], ["--steps 1000"]),
    (["--shard"], ["--shard", "torchrun"]),
    (["--nosuchflag"], ["--nosuchflag"]),
    (["--batch-tokens", "8"], ["--batch-tokens 8"]),
    (["--harmful", "nosuch.txt"], ["nosuch.txt"]),
])
def test_wrong_flags(mini, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused([*command(mini, tmp_path / "run"), *flags], monkeypatch, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def broken(mini, tmp_path, name, change):
    """A copy of the mini folder in which one file is changed: bytes -> bytes, or None to take it away."""
    folder = shutil.copytree(mini, tmp_path / "broken")
    path = folder / name
    data = change(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    return folder


SAE = "sae/layer_1/width_96/average_l0_9/params.npz"


@pytest.mark.parametrize("name, change, words", [
    ("config.json", lambda b: None, ["config.json"]),
    ("config.json", lambda b: b.replace(b"gemma2", b"llama"), ["config.json", "llama"]),
    ("config.json", lambda b: b.replace(b'"intermediate_size": 96', b'"intermediate_size": 95'), ["shape"]),
    ("model.safetensors", lambda b: b[:-100], ["model.safetensors"]),
    ("model.safetensors", lambda b: b.replace(b"model.norm.weight", b"model.nope.weight"), ["model.nope.weight"]),
    ("tokenizer.json", lambda b: b[:-100], ["tokenizer.json"]),
    ("tokenizer.json", lambda b: None, ["tokenizer.json"]),
    (SAE, lambda b: b[:-100], ["params.npz"]),
    (SAE, lambda b: None, ["params.npz"]),
    ("train.jsonl", lambda b: b"", ["train.jsonl", "empty"]),
    ("train.jsonl", lambda b: b + b'{"chosen": \n', ["train.jsonl:61"]),
    ("train.jsonl", lambda b: b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}\n', ["no pair with both sides"]),
    ("train.jsonl", lambda b: b'{"chosen": 3, "rejected": 4}\n', ["train.jsonl:1"]),
])
def test_broken_files(mini, tmp_path, monkeypatch, capsys, name, change, words):
    line = refused(command(broken(mini, tmp_path, name, change), tmp_path / "run"), monkeypatch, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_sae_of_another_model(mini, tmp_path, monkeypatch, capsys):
    from sae import save_sae
    zeros = torch.zeros
    save_sae(tmp_path / "sae", 1, 9, W_enc=zeros(48, 96), b_enc=zeros(96), threshold=zeros(96), W_dec=zeros(96, 48), b_dec=zeros(48))
    line = refused([*command(mini, tmp_path / "run"), "--sae", tmp_path / "sae"], monkeypatch, capsys)
    assert "d_model 48" in line and "64" in line


def test_missing_flags_are_asked_for_by_name(mini, monkeypatch, capsys):
    line = refused(["--model", mini, "--rank", "8"], monkeypatch, capsys)
    assert "--sae and --data" in line
    line = refused(["--model", "someone/gemma", "--sae", "someone/saes", "--data", mini / "train.jsonl"], monkeypatch, capsys)
    assert "--layers" in line


def test_no_network(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused(["--model", "google/gemma-2-2b", "--data", mini / "train.jsonl", "--out", tmp_path / "run"], monkeypatch, capsys)
    assert "google/gemma-2-2b" in line and "hub" in line and not (tmp_path / "run").exists()


def test_gated_repositories(monkeypatch):
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*args, **kwargs):
        raise GatedRepoError("403", response=httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co")))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    with pytest.raises(InputError, match="google/gemma-2-2b is gated: accept its licence at https://huggingface.co/google/gemma-2-2b"):
        load_model("google/gemma-2-2b")


def test_output_folders(whole, mini, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(command(mini, tmp_path / "file" / "run"), monkeypatch, capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("my only copy")
    assert "full" in refused(command(mini, tmp_path / "full"), monkeypatch, capsys)
    folder = shutil.copytree(whole.folder, tmp_path / "unfinished")
    (folder / "report.html").unlink()
    assert "--lr 0.01, not 0.02" in refused([*command(mini, folder, sets=SETS), "--lr", "2e-2"], monkeypatch, capsys)
    assert "--lr" in refused(["--resume", folder, "--lr", "2e-2"], monkeypatch, capsys)
    assert "nosuch" in refused(["--resume", tmp_path / "nosuch"], monkeypatch, capsys)
    assert "--out" in refused(["--resume", folder, "--out", tmp_path / "other"], monkeypatch, capsys)
    config = files.read_json(folder / "config.json")
    for name, value in (("rank", "many"), ("rank", None), ("rank", 8.5), ("layers", 3), ("layers", ["1"]), ("lr", True),
                        ("compile", "yes"), ("data", 5)):
        files.write_json(folder / "config.json", config | {"settings": config["settings"] | {name: value}})
        assert f"--{name}" in refused(["--resume", folder], monkeypatch, capsys)


def test_by_hand_without_traceback(tmp_path):
    """The same through the command line itself."""
    process = start("train.py", ["--model", "nosuch", "--sae", "a", "--data", "b"], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, err = process.communicate()
    assert process.returncode == 2 and err.startswith("train.py: error: ") and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------
# Real inputs

def test_real_pairs_and_tokenizer_on_a_full_vocabulary(shared, tmp_path, monkeypatch):
    """HH-RLHF pairs, Gemma's tokenizer, 256,000 words, sharded weights, random SAEs: to an adapter that loads again."""
    import gzip

    from model import save_model
    from sae import save_sae
    folder = tmp_path / "model"
    save_model(random_gemma(vocab_size=256_000, num_hidden_layers=2, std=0.05), folder, max_shard_bytes=40 << 20)
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "tokenizer.json").write_bytes(gzip.decompress((shared / "gemma_tokenizer.json.gz").read_bytes()))
    W = torch.nn.functional.normalize(torch.randn(16384, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    zeros = torch.zeros(16384)
    save_sae(tmp_path / "sae", 0, 70, W_enc=W.T, b_enc=zeros, threshold=zeros + 2, W_dec=W, b_dec=torch.zeros(64))
    arguments = ["--model", folder, "--sae", tmp_path / "sae", "--data", shared / "hh_rlhf_harmless_base_test.jsonl.gz", "--rank", "16",
                 "--steps", "3", "--pairs", "16", "--batch-tokens", "256", "--accumulate", "1", "--out", tmp_path / "run",
                 "--lookalike", shared / "xstest_prompts.csv", "--eval-prompts", "3", "--max-new-tokens", "4"]
    assert call(train.main, arguments, monkeypatch) == 0
    model = load_model(folder)
    assert len(lora.load_adapter(model, tmp_path / "run")) == 8
    rows = files.read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert len(rows) == 6 and all(row["fields"]["label"] == "safe" for row in rows)
