"""files.py: what is written is whole, what is read is trusted with nothing."""

import os

import pytest
import torch

from run import files
from run.files import InputError


def test_writing_replaces_the_name_and_never_the_bytes(tmp_path):
    """A second name of the old file keeps the old bytes: the new ones came by a rename, not by writing over them."""
    files.write_text(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "b")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "b").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("write", [lambda path: files.write_json(path, {"a": float("nan")}),
                                   lambda path: files.write_json(path, {"a": object()}),
                                   lambda path: files.write_tensors(path, {"a": "no tensor"})])
def test_a_failed_write_leaves_the_old_file(tmp_path, write):
    files.write_text(tmp_path / "a", "old")
    with pytest.raises((ValueError, TypeError, AttributeError)):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_files_are_as_readable_as_others(tmp_path):
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_tensors_come_back_by_blocks(tmp_path):
    tensors = {"x": torch.randn(37, 5), "scalar": torch.tensor(3.0), "half": torch.randn(4, 2).half()}
    files.write_tensors(tmp_path / "a.safetensors", tensors, {"step": "3"})
    assert files.tensor_shapes(tmp_path / "a.safetensors") == {"x": (37, 5), "scalar": (), "half": (4, 2)}
    assert files.read_metadata(tmp_path / "a.safetensors")["step"] == "3"
    for block in (1, 64, 64 << 20):
        places = {name: (torch.empty(tensor.shape), 0) for name, tensor in tensors.items()} | {"half": (torch.empty(2, 2), 1)}
        assert sum(files.read_into(tmp_path / "a.safetensors", places, block)) == 37 * 5 + 1 + 4
        wanted = tensors | {"half": tensors["half"][1:3]}
        assert all(torch.equal(out, wanted[name].float()) for name, (out, _) in places.items())


def test_a_file_is_mapped_once_for_many_small_tensors(tmp_path, monkeypatch):
    """It was mapped and its header read for each: minutes, for the many layers that a config.json may ask for."""
    tensors = {f"{number}": torch.full((2, 3), float(number)) for number in range(100)} | {"empty": torch.zeros(0, 3)}
    files.write_tensors(tmp_path / "a.safetensors", tensors)
    opened, times = files._opened, []
    monkeypatch.setattr(files, "_opened", lambda path: times.append(1) or opened(path))
    places = {name: (torch.empty(tensor.shape), 0) for name, tensor in tensors.items()}
    assert sum(files.read_into(tmp_path / "a.safetensors", places)) == 600 and len(times) == 1
    assert all(torch.equal(places[name][0], tensor) for name, tensor in tensors.items())
    files.verify(tmp_path / "a.safetensors")
    assert len(times) == 3
    del times[:]
    assert sum(files.read_into(tmp_path / "a.safetensors", places, block=620)) == 600 and len(times) == 4   # 25 of 24 bytes each


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../x", "owner/..", "https://huggingface.co/google/gemma-2-2b", "owner/na me", ""])
def test_places_that_are_neither_folder_nor_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        files.locate(source, "config.json")


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[1]", "list"), ("\xff", "JSON"), ("[" * 100_000, "JSON")])
def test_bad_json(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=words):
        files.read_json(tmp_path / "a.json")


def test_plain_names():
    assert files.is_file_name("model-00001-of-00002.safetensors")
    assert not any(map(files.is_file_name, ["../a", "/a", "a/b", "..", ".hidden", "", None, 3, "a\n", "a\\b"]))


@pytest.mark.parametrize("raised, code, words", [
    (InputError("two\nlines"), 2, "two lines"), (PermissionError(13, "Permission denied", "place"), 2, "place: Permission denied"),
    (OSError(28, "No space left on device"), 2, "No space left"), (KeyboardInterrupt(), 130, "interrupted")])
def test_run_ends_in_one_line(capsys, raised, code, words):
    def main():
        raise raised
    with pytest.raises(SystemExit) as end:
        files.run_command(main)
    err = capsys.readouterr().err
    assert end.value.code == code and words in err and len(err.splitlines()) == 1
