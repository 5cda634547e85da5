"""run/files.py: what is written is whole, what is read is trusted with nothing."""

import gzip
import json
import os
import resource

import pytest
import safetensors.torch
import torch
from conftest import random_gemma
from gemma_like import gemma_like_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from data import load_tokenizer
from lora import add_lora, load_adapter, lora_layers, save_adapter, trainable_parameters
from model import load_config, load_model, save_model
from run import files
from run.files import InputError
from run.readers import read_items, read_pairs, read_prompts
from run.session import CHECKPOINT, load_checkpoint, save_checkpoint
from sae import SHAPES, load_sae, read_array, save_sae


@pytest.mark.parametrize("write", [
    lambda path: files.write_json(path, {"a": object()}),
    lambda path: files.write_text(path, "\ud800"),
    lambda path: files.write_tensors(path, {"a": torch.zeros(2)}, {"step": 3})])
def test_a_write_replaces_the_name_or_does_nothing(tmp_path, write):
    files.write_text(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "b")  # keeps the old bytes unless they are written over
    with pytest.raises((ValueError, TypeError, AttributeError)):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "b").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def in_child(action):
    """Run action() in a forked process. Its exit code, negative for a signal."""
    if not (child := os.fork()):
        try:
            action()
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_next_write_sweeps_what_a_killed_process_left(tmp_path):
    def killed():
        with files.atomic(tmp_path / "a") as part:
            part.write_text("half")
            os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    assert len(list(tmp_path.iterdir())) == 1 and files.is_new(tmp_path)
    files.write_text(tmp_path / "a", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not files.is_new(tmp_path)


def test_a_full_disk_ends_in_one_line(tmp_path, capfd):
    """A limit on the size of files stands for the full disk."""
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))
        files.run_command(lambda: files.write_tensors(tmp_path / "a", {"a": torch.zeros(9999)}))

    assert in_child(full) == 2
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) == 1
    assert f"{tmp_path / 'a'}: " in printed and "File too large" in printed
    assert not list(tmp_path.iterdir())


def test_tensors_come_back(tmp_path):
    path = tmp_path / "a.safetensors"
    x = torch.randn(37, 5)
    tensors = {"x": x, "same": x, "columns": x.T, "scalar": torch.tensor(3.0), "half": x.half()}
    files.write_tensors(path, tensors, {"step": "3"})
    read, theirs = files.read_tensors(path), safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and torch.equal(theirs[name], tensor)
    assert files.tensor_shapes(path)["columns"] == (5, 37)
    assert files.read_metadata(path) == {"format": "pt", "step": "3"}
    # As readable as other files are: the package writes for the owner alone.
    (tmp_path / "b").write_text("")
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("name, load", [
    ("a.safetensors", files.read_tensors), ("tokenizer.json", load_tokenizer),
    ("a.jsonl.gz", read_pairs), ("a.csv", read_prompts), ("a.parquet", read_pairs),
    ("a.npz", lambda path: read_array(path, "W_enc"))])
def test_a_git_lfs_pointer_is_named(tmp_path, name, load):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(InputError, match=f"{name} is a git-lfs pointer, fetch the file"):
        load(tmp_path / name)


@pytest.mark.parametrize("raised, code, words", [
    (InputError("two\nlines and \033[2J an escape code\x9b"), 2, "two lines and [2J an"),
    (PermissionError(13, "Permission denied", "place"), 2, "place: Permission denied"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 2, "lower --batch-tokens"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "CUDA out of memory. Tried)"),
    # As Triton says it: an Exception of its own, or the compiler's with a line before it
    (Exception("out of resource: shared memory, Required: 114688"), 2, "(out of resource: shared"),
    (RuntimeError("backend raised:\nout of resource: kernel\nmore"), 2, "(out of resource: kern"),
])
def test_a_command_ends_in_one_line(capsys, raised, code, words):
    def main():
        raise raised

    with pytest.raises(SystemExit, match=str(code)):
        files.run_command(main)
    printed = capsys.readouterr().err
    assert words in printed and printed.removesuffix("\n").isprintable()


def test_errors_of_our_own_keep_their_traceback():
    with pytest.raises(RuntimeError):
        files.run_command(lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(SystemExit, match="2"):  # as the CPU's allocator says it
        files.run_command(lambda: torch.empty(1 << 50))


def write_good_files(folder):
    """{file that is damaged: its loader}."""
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: é", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    lines = (json.dumps(pair) + "\n" + json.dumps(pair | {"n": [1.5, None]})).encode()
    (folder / "pairs.jsonl").write_bytes(lines)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "prompts.csv").write_bytes(b'id,prompt\n1,"a ""b"" c"\n2,d\n')
    (folder / "prompts.json").write_bytes(b'[{"prompt": "a", "n": [1, null]}, "b"]')
    spec = gemma_like_spec(registered=True)
    spec["model"]["merges"] = spec["model"]["merges"][-9:]
    (folder / "tokenizer.json").write_text(json.dumps(spec))

    model = random_gemma(num_hidden_layers=1, vocab_size=20)
    save_model(model, folder)
    tensors = {name: torch.rand([{"D": 8, "F": 5}[axis] for axis in axes])
               for name, axes in SHAPES.items()}
    params = save_sae(folder, 0, 9, **tensors)
    add_lora(model, rank=2, alpha=2, init="random")
    save_adapter(model, folder, "toy")
    parameters = trainable_parameters(lora_layers(model))
    optimizer = torch.optim.AdamW(parameter for _, parameter in parameters)
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(folder, 3, parameters, optimizer)

    def adapter(path):
        load_adapter(random_gemma(num_hidden_layers=1, vocab_size=20), folder)

    def checkpoint(path):
        threads = torch.get_num_threads()
        try:
            load_checkpoint(folder, parameters, optimizer)
        finally:
            torch.set_num_threads(threads)  # the header says how many there were

    def same_sae(path):
        sae = load_sae(folder, 0, "5")
        assert all(torch.equal(getattr(sae, name), tensor) for name, tensor in tensors.items())

    return {
        folder / "pairs.jsonl": read_pairs,
        folder / "pairs.jsonl.gz": lambda path: list(read_items(path)),
        folder / "prompts.csv": read_prompts, folder / "prompts.json": read_prompts,
        folder / "tokenizer.json": load_tokenizer,
        folder / "config.json": lambda path: load_config(folder),
        folder / "model.safetensors": lambda path: load_model(folder),
        folder / "adapter_config.json": adapter, folder / "adapter_model.safetensors": adapter,
        folder / CHECKPOINT: checkpoint, params: same_sae}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    loaders = write_good_files(tmp_path_factory.mktemp("good"))
    entries = [(path, path.read_bytes(), load) for path, load in loaders.items()]
    for path, _, load in entries:
        load(path)
    return lambda: entries  # hypothesis prints a fixture, this one in short


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10), st.integers(0, 1 << 20), st.binary(max_size=3), st.integers(0, 4),
       st.sampled_from([0, 0, 300, 1 << 20]))
def test_a_damaged_file_is_read_or_named_in_one_line(good, number, place, new, gone, near):
    """Bytes are exchanged, put in or taken out, or the file is cut; often in its header."""
    path, content, load = good()[number]
    place %= min(near or len(content), len(content))
    end = len(content) if near else place + gone
    try:
        path.write_bytes(content[:place] + new + content[place + gone:max(end, place + gone)])
        load(path)
    except InputError as error:
        assert path.name in str(error) or str(path.parent) in str(error)
        assert len(str(error).splitlines()) == 1
    finally:
        path.write_bytes(content)
