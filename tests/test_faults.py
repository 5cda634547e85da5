"""Short forms of faults.py and fuzz.py, and what the product must not call."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_gemma

import files
import session
import train
from data import Row
from files import InputError


def script(name, *arguments):
    process = subprocess.run([sys.executable, ROOT / "tests" / name, *arguments], capture_output=True, text=True, timeout=300,
                             env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0 and "FAILED" not in process.stdout, process.stdout + process.stderr
    return process.stdout


def test_killed_and_crashed_runs_go_on():
    out = script("faults.py", "--kills", "2", "--signals", "2", "--crashes", "31")
    assert "2 survived of 2" in out and "2 of 2 saved" in out and " 0 failures" in out


def test_hostile_files():
    assert re.search(r"\d+ cases, 0 failures", script("fuzz.py", "--cases", "60"))


def test_hostile_files_through_the_command_line():
    assert "6 commands, 0 failures" in script("fuzz.py", "--commands", "6", "--first", "10")


# ---------------------------------------------------------------------------------------------------------------
# Checksums, and the checkpoint before the last

def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "z": torch.tensor(2.0), "empty": torch.zeros(0, 3), "n": torch.arange(5),
               "é\"": torch.ones(2) > 0}
    files.write_tensors(tmp_path / "a", tensors, {"step": "3"})
    whole = (tmp_path / "a").read_bytes()
    files.write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"step": "3"})
    assert (tmp_path / "b").read_bytes() == whole
    for bit in range(3, 8 * len(whole), 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(data)
        try:
            found = files.read_tensors(tmp_path / "a")
        except InputError as error:
            assert str(tmp_path / "a") in str(error)
        else:
            assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    for size in range(0, len(whole), 7):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(InputError):
            files.read_tensors(tmp_path / "a")


def test_other_packages_read_what_is_written(tmp_path):
    import safetensors.torch
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).double(), "n": torch.arange(5), "t": torch.ones(3, 2).T}
    files.write_tensors(tmp_path / "a", tensors)
    found = safetensors.torch.load_file(tmp_path / "a")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_weights_that_we_wrote_are_summed_by_blocks(tmp_path, gemma):
    """And those of others, who write no checksum, are taken as they are."""
    from safetensors.torch import load_file, save_file

    from model import load_model, save_model
    save_model(gemma, tmp_path)
    path = tmp_path / "model.safetensors"
    with files._opened(path) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert metadata["sha256"] == files.checksum(tensors, metadata) == files.checksum(
        tensors, metadata, ((name, rows) for name, _, rows in files._blocks(
            path, {name: (tensors[name].shape, 0) for name in sorted(tensors)}, block=30_000)))
    load_model(tmp_path)
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(InputError, match="model.safetensors is damaged"):
            load_model(tmp_path)
    save_file(load_file(path), path)
    load_model(tmp_path)


def test_an_adapter_s_scale_is_held_against_its_tensors(tmp_path):
    import lora
    model = random_gemma()
    lora.add_lora(model, 4, 8, "random", generator=torch.Generator().manual_seed(0))
    lora.save_adapter(model, tmp_path, "toy")
    config = files.read_json(tmp_path / "adapter_config.json")
    files.write_json(tmp_path / "adapter_config.json", config | {"base_model_name_or_path": "elsewhere"})
    assert lora.load_adapter(random_gemma(), tmp_path)
    for changed in ({"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.self_attn.q_proj": 9}}):
        files.write_json(tmp_path / "adapter_config.json", config | changed)
        with pytest.raises(InputError, match="adapter_config.json: .* isn't what it was written with"):
            lora.load_adapter(random_gemma(), tmp_path)


def test_a_gradient_spike_is_told_before_its_step(monkeypatch):
    """By number, with its rows and the weights before it; then it is clipped, and training goes on."""
    rows = [Row(torch.arange(5, 17), torch.ones(12, dtype=torch.long), torch.arange(6, 18)) for _ in range(3)]
    model = random_gemma()
    weight = model.layers[0].self_attn.q_proj.weight.requires_grad_()
    real, told, before = train.nll_sum, [], []
    monkeypatch.setattr(train, "nll_sum", lambda *given: (real(*given)[0] * (1e6 if len(before) == 1 else 1),))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in train.fit(model, optimizer, [[row] for row in rows], lambda step: 1.0, clip=1.0,
                       spike=lambda *what: told.append((*what, weight.detach().clone()))):
        before.append(weight.detach().clone())
    (step, what, norm, kept), = told
    assert step == 2 and what == [rows[1]] and norm > 1000 and torch.equal(kept, before[0])
    assert (before[1] - before[0]).norm().item() == pytest.approx(1, rel=1e-3) and len(before) == 3


@pytest.mark.parametrize("at", ["damaged", "missing", "both damaged"])
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(tmp_path, capsys, at):
    path, previous = tmp_path / session.CHECKPOINT, tmp_path / session.PREVIOUS
    files.write_tensors(previous, {"a": torch.ones(2)}, {"step": "3", "threads": "1"})
    files.write_tensors(path, {"a": torch.zeros(2)}, {"step": "6", "threads": "1"})
    session.mend_checkpoint(tmp_path)
    assert files.read_metadata(path)["step"] == "6" and previous.exists()
    for damaged in [path] * (at != "missing") + [previous] * (at == "both damaged"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\7")
    if at == "missing":
        path.unlink()
    if at == "both damaged":
        with pytest.raises(InputError, match="damaged"):
            session.mend_checkpoint(tmp_path)
        return
    session.mend_checkpoint(tmp_path)
    assert files.read_metadata(path)["step"] == "3" and not previous.exists()
    assert ("of step 3" in capsys.readouterr().err) == (at == "damaged")


# ---------------------------------------------------------------------------------------------------------------
# A run's folder

def test_a_cut_line_of_the_log_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = session.Log(path)
    log.add({"step": 2, "loss": 1.0})
    assert log.lines == [{"step": 1, "loss": 2.0}]              # a session's own steps aren't held, and there can be many
    assert files.read_jsonl(path) == session.Log(path).lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_two_that_begin_in_one_empty_folder(tmp_path):
    held = session.Lock(tmp_path)
    with pytest.raises(InputError, match="another process"):
        session.Lock(tmp_path)
    del held
    session.Lock(tmp_path)


def test_two_that_answer_into_one_folder(tmp_path):
    import eval as evaluate
    held = evaluate.settle(tmp_path, {"run": "a"})
    with pytest.raises(InputError, match="another process"):
        evaluate.settle(tmp_path, {"run": "a"})
    with pytest.raises(InputError, match="another process"):
        evaluate.conclude(tmp_path, {})
    del held
    evaluate.settle(tmp_path, {"run": "a"})


def test_what_a_killed_process_left_goes_with_the_next_write_of_the_name(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    others = {f".a.{os.getppid()}.part", f".b.{child.pid}.part", ".a.x.part", f".a.{10 ** 30}.part"}
    for name in {f".a.{child.pid}.part"} | others:
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a"} | others


def test_a_selection_that_was_killed_is_made_again(mini, tmp_path, monkeypatch, capsys):
    import features

    def select(*more):
        monkeypatch.setattr("sys.argv", ["select.py", "--model", str(mini), "--sae", str(mini / "sae"), "--data", str(mini / "train.jsonl"),
                                         "--rank", "8", "--pairs", "4", "--out", str(tmp_path / "out"), *more])
        return features.main()
    with monkeypatch.context() as patch:
        patch.setattr(features, "save_selection", lambda *told: (tmp_path / "out/.features.json.1.part").write_text("half"))
        select()
    with pytest.raises(InputError, match="isn't empty"):
        select("--tau", "0.5")
    select()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "features.json", "subspace.safetensors"}
    with pytest.raises(InputError, match="isn't empty"):
        select()


def test_only_what_is_half_written_is_swept(tmp_path):
    for name in (".config.json.123.part", "thesis.part", ".hidden"):
        (tmp_path / name).write_text("")
    assert not files.is_new(tmp_path)
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.part", ".hidden"}
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.config.json.123.part").write_text("")
    assert files.is_new(tmp_path / "new") and files.is_new(tmp_path / "nowhere") and not files.is_new(tmp_path / ".hidden")


def test_a_text_that_unpacks_to_too_much_is_refused(tmp_path):
    import gzip

    from data import read_pairs, read_prompts
    line = json.dumps({"chosen": "a" * 100_000, "rejected": "b"}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 1000, 1))
    with pytest.raises(InputError, match="unpacks to more than 20 times its size"):
        read_pairs(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[\n" + (b"[]," * 3000 + b"\n") * 5000 + b"[]]", 1))
    with pytest.raises(InputError, match="as one JSON value that is too much"):
        read_prompts(tmp_path / "a.json.gz")


# ---------------------------------------------------------------------------------------------------------------
# Where something has gone wrong in one process, it waits for no other

COLLECTIVES = {"first", "agreed", "gather", "gather_tensors", "largest", "add", "add_gradients", "copy_from_first",
               "all_reduce", "all_gather", "broadcast", "barrier"}


def waits(node):
    """The calls within a piece of code that need every process."""
    names = [named(call.func).partition(".") for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [name for module, _, name in names if module in ("parallel", "dist") and name in COLLECTIVES]


def test_no_handler_waits_in_a_collective():
    """Neither an `except`, a `finally`, what a signal calls, nor what is called at an object's end. (train.py keeps the rows of a
    step that diverged by a function of its own: Diverged comes out of the summed gradient, to all at once.)"""
    handlers = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                handlers += [(path.name, part) for part in [*node.handlers, *node.finalbody]]
            elif isinstance(node, ast.FunctionDef) and node.name in ("catch", "__del__", "__exit__"):
                handlers.append((path.name, node))
    assert len(handlers) > 50
    assert [(name, part.lineno, waits(part)) for name, part in handlers if waits(part)] == []


# ---------------------------------------------------------------------------------------------------------------
# What no file here may do: run what a file says, or speak to the network from anywhere but where it is meant to

CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "torch.load", "torch.save", "np.load", "numpy.load", "os.system",
         "os.popen", "yaml.load", "torch.hub.load", "torch.jit.load", "torch.package"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "socket", "ssl", "urllib", "http", "requests",
           "httpx", "httpx2", "aiohttp", "ftplib", "smtplib", "telnetlib", "websockets", "xmlrpc", "webbrowser", "subprocess", "ctypes",
           "importlib", "transformers", "huggingface_hub"}
MEANT = {("files.py", "huggingface_hub"), ("select.py", "importlib"),
         *(("endpoint.py", name) for name in ("httpx2", "huggingface_hub", "socket"))}
PRODUCT = sorted(path for path in ROOT.glob("*.py"))


def named(node):
    """a.b.c of a chain of attributes."""
    return f"{named(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_nothing_is_unpickled_evaluated_or_fetched(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert named(node.func) not in CALLS, f"{path.name}:{node.lineno}: {named(node.func)}"
            words = {word.arg for word in node.keywords}
            assert words.isdisjoint(("trust_remote_code", "allow_pickle", "shell")), f"{path.name}:{node.lineno}"
        imported = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in imported:
            root = module.partition(".")[0]
            assert root not in MODULES or (path.name, root) in MEANT, f"{path.name}:{node.lineno}: import {module}"
