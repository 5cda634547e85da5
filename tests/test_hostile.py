"""Files that nobody honest wrote, by name: each is refused in one line, and no reader does more than read. Drawn ones: fuzz.py."""

import itertools
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import dense
import fuzz
import hypothesis
import numpy as np
import pytest
import torch
from conftest import ROOT, random_gemma
from hypothesis import strategies as st

import data
import datafiles
import files
import lora
import recipe
import sae
import tables
from config import Config
from files import InputError, read_tensors, tensor_shapes, write_json, write_tensors
from model import load_model, save_model


def said(read, *arguments):
    """"right", or the line in which `read` refuses its arguments; in a fork that may take 1 GB more, and 10 s."""
    told, tell = os.pipe()
    if not (child := os.fork()):
        fuzz.bound()
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        try:
            read(*arguments)
            end = "right"
        except InputError as error:
            end = str(error)
        except BaseException as error:
            end = f"not refused\n{error!r}"
        os.write(tell, end.encode(errors="replace")[:9999])
        os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        line = pipe.read()
    assert os.waitpid(child, 0)[1] == 0 and line and "\n" not in line, line
    return line


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


# ---------------------------------------------------------------------------------------------------------------
# safetensors

def stored(header, body=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def entry(first=0, last=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


A = {"a": entry()}
ONE, OTHER = (json.dumps(one).encode() for one in (entry(), entry(dtype="F64", shape=(1,))))
SAFETENSORS = {
    "overlapping offsets": stored(A | {"b": entry()}, bytes(8)),
    "half overlapping offsets": stored(A | {"b": entry(4, 12)}, bytes(12)),
    "offsets after the end": stored({"a": entry(8, 16)}, bytes(8)),
    "an offset far after the end": stored({"a": entry(0, 2**64 - 1)}, bytes(8)),
    "negative offsets": stored({"a": entry(-8, 0)}, bytes(8)),
    "offsets that go back": stored({"a": entry(8, 0)}, bytes(8)),
    "a gap between tensors": stored(A | {"b": entry(12, 20)}, bytes(20)),
    "bytes after the last tensor": stored(A, bytes(9)),
    "a shape of more bytes than offsets": stored({"a": entry(shape=(3,))}, bytes(8)),
    "a negative shape": stored({"a": entry(shape=(-2,))}, bytes(8)),
    "a shape that overflows": stored({"a": entry(0, 0, shape=(2**40, 2**40))}),
    "a shape that wraps to 0": stored({"a": entry(0, 0, shape=(2**32, 2**32))}),
    "a header of no length": stored(A, bytes(8), 0),
    "a header one byte short": stored(A, bytes(8), len(json.dumps(A)) - 1),
    "a header longer than the file": stored(A, bytes(8), 200),
    "a header of 2^63 bytes": stored(A, bytes(8), 2**63),
    "a header of 2^64 - 1 bytes": stored(A, bytes(8), 2**64 - 1),
    "a header that is a list": stored(b"[]"),
    "a header that is a list of pairs": stored(b'[["a", 1], [["b"], 2]]'),
    "a header that is nothing": stored(b""),
    "a header nested 100,000 deep": stored(b'{"a":' + b"[" * 100_000),
    "a header that isn't UTF-8": stored(b'{"\xff": 1}'),
    "7 bytes": bytes(7),
    "a type that isn't": stored({"a": entry(dtype="F33")}, bytes(8)),
    "a type that is a number": stored({"a": entry(dtype=3)}, bytes(8)),
    "a type of half a byte": stored({"a": entry(0, 1, "F4", (1,))}, bytes(1)),
    "a name twice": stored(b'{"a": %s, "a": %s}' % (ONE, OTHER), bytes(8)),
    "a field twice": stored(b'{"a": %s, "dtype": "F64"}}' % ONE[:-1], bytes(8)),
    "metadata twice": stored(b'{"__metadata__": {"a": "b"}, "__metadata__": {}, "a": %s}' % ONE, bytes(8)),
    "metadata that is no text": stored({"__metadata__": {"step": 3}} | A, bytes(8))}


@pytest.mark.parametrize("data", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    for read in (tensor_shapes, read_tensors, files.read_metadata):
        assert str(path) in said(read, path)


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL", "C64", "F8_E4M3"])
def test_safetensors_of_types_that_no_weight_has(tmp_path, dtype):
    size = {"I64": 1, "I32": 2, "C64": 1}.get(dtype, 8)
    (tmp_path / "a.safetensors").write_bytes(stored({"a": entry(dtype=dtype, shape=(size,))}, bytes(8)))
    assert f"dtype {dtype}" in said(tensor_shapes, tmp_path / "a.safetensors")


def test_safetensors_header_of_a_billion_entries(tmp_path):
    path, size = tmp_path / "a.safetensors", 60 * 10**9          # a sparse file, so that there are as many bytes as it says
    path.write_bytes(struct.pack("<Q", size))
    os.truncate(path, size + 8)
    for read in (tensor_shapes, read_tensors):
        assert "a header of 60,000,000,000 bytes" in said(read, path)
    header = {f"{i:x}": entry(0, 0, shape=(0,)) for i in range(16_300)}                     # the longest that is let in
    path.write_bytes(stored(header))
    assert len(json.dumps(header)) > 0.9 * files.HEADER_LIMIT and said(read_tensors, path) == "right" == said(tensor_shapes, path)


# ---------------------------------------------------------------------------------------------------------------
# A model's folder

@pytest.mark.parametrize("name", [
    "../outside.safetensors", "{outside}", "./model-2.safetensors", "sub/../model-2.safetensors", "~/model-2.safetensors", "..", ".", "",
    "model-2.safetensors\0", "model-2.safetensors\n", "..\\outside.safetensors", "a" * 300, None, 3, True, ["model-2.safetensors"],
    {"model-2.safetensors": 1}])
def test_weight_map_that_leads_elsewhere(tmp_path, name):
    """Also where a good file lies there."""
    model, folder, outside = random_gemma(vocab_size=40, num_hidden_layers=1), tmp_path / "model", tmp_path / "outside.safetensors"
    save_model(model, folder)
    weights = read_tensors(folder / "model.safetensors")
    names, half = list(weights), len(weights) // 2
    (folder / "sub").mkdir()
    write_tensors(folder / "model-1.safetensors", {name: weights[name] for name in names[:half]})
    for path in (folder / "model-2.safetensors", outside):
        write_tensors(path, {name: weights[name] for name in names[half:]})

    def mapped(second):
        owner = dict.fromkeys(names[:half], "model-1.safetensors") | dict.fromkeys(names[half:], second)
        write_json(folder / "model.safetensors.index.json", {"weight_map": owner})

    mapped("model-2.safetensors")
    assert said(load_model, folder) == "right"
    mapped(name.format(outside=outside) if isinstance(name, str) else name)
    assert "weight_map must give a plain file name" in said(load_model, folder)


def test_a_tensor_that_two_shards_have(tmp_path):
    save_model(random_gemma(vocab_size=40, num_hidden_layers=1), tmp_path)
    weights = read_tensors(tmp_path / "model.safetensors")
    first, *others = weights
    write_tensors(tmp_path / "model-1.safetensors", {first: weights[first]})
    owner = {first: "model-1.safetensors"} | dict.fromkeys(others, "model.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": owner})
    assert f"tensor {first} stands only in the file" in said(load_model, tmp_path)


VALUES = [-1, 0, 2**31, 2**63, 10**30, 1e308, 0.5, "4", "", True, None, [], [4], {}, {"a": 4}, "sliding_attention",
          ["chunked_attention"] * 4]


@pytest.mark.parametrize("field", [*Config.__dataclass_fields__, "rope_parameters", "rope_scaling", "model_type", "hidden_activation",
                                   "tie_word_embeddings"])
def test_config_of_negative_huge_and_wrongly_typed_values(tmp_path, field):
    """Refused, or a configuration that the weights then have to fit: none of them makes a tensor before that."""
    model = random_gemma(vocab_size=40, num_hidden_layers=1)
    save_model(model, tmp_path)
    good = model.config.to_dict()

    def all_of_them():
        for value in VALUES:
            write_json(tmp_path / "config.json", good | {field: value})
            try:
                load_model(tmp_path)
            except InputError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
            else:
                assert not isinstance(value, str | dict) or field.startswith("rope_") and isinstance(value, dict), value

    assert said(all_of_them) == "right"


def test_config_of_unknown_layer_types():
    good = random_gemma().config.to_dict()
    for types in (["chunked_attention"] * 4, ["sliding_attention"] * 3 + [["full_attention"]], "full_attention", {"0": "full_attention"},
                  [None] * 4, ["full_attention"] * 5, ["sliding_attention"] * 100_000):
        assert "layer_types" in said(Config.from_dict, good | {"layer_types": types})


def test_nothing_is_run_out_of_a_model_s_folder(tmp_path, mini):
    """Modules beside the weights under names that are imported, pickles where others keep weights, a configuration that asks
    for both."""
    mark, folder = tmp_path / "mark", tmp_path / "model"
    folder.mkdir()
    for path in mini.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    for name in ("modeling_gemma2", "configuration_gemma2", "tokenization_gemma2", "torch", "numpy", "sitecustomize", "model", "__init__"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_gemma2.Model", "AutoConfig": "configuration_gemma2.Config"},
            "trust_remote_code": True, "architectures": ["os.system"], "_name_or_path": "evil/repository"}
    write_json(folder / "config.json", files.read_json(folder / "config.json") | code)
    command = [sys.executable, ROOT / "train.py", "--model", ".", "--sae", mini / "sae", "--data", "train.jsonl", "--dry-run"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    load_model(folder)
    (folder / "model.safetensors").unlink()
    assert "holds no file model.safetensors" in said(load_model, folder)                  # and not: take the pickle then
    assert "adapter_config.json" in said(lora.load_adapter, None, folder)
    assert not mark.exists()
    with open(folder / "pytorch_model.bin", "rb") as file:                                # the trap is one
        pickle.load(file).close()
    assert mark.exists()


# ---------------------------------------------------------------------------------------------------------------
# An adapter's folder

CODE = {"base_model_name_or_path": "../../evil", "revision": "evil", "auto_mapping": {"base_model_class": "system", "parent_library": "os"},
        "megatron_config": {"a": 1}, "megatron_core": "os", "custom_module": "evil.py", "peft_version": "99", "tokenizer": "/etc/passwd",
        "runtime_config": {"ephemeral_gpu_offload": True}, "eva_config": {"path": "/etc/passwd"}, "loftq_config": {"a": "b"},
        "path": "/etc/passwd"}


def test_paths_and_code_in_an_adapter_config_are_ignored(tmp_path):
    model = random_gemma()
    adapters = lora.add_lora(model, 2, 2.0, "random", dict.fromkeys(lora._targets(model)), torch.Generator().manual_seed(0))
    lora.save_adapter(model, tmp_path, "toy")
    wanted = {name: layer.A.clone() for name, layer in adapters.items()}
    config = files.read_json(tmp_path / "adapter_config.json")
    for more in [{key: value} for key, value in CODE.items()] + [CODE]:
        write_json(tmp_path / "adapter_config.json", config | more)
        found = lora.load_adapter(random_gemma(), tmp_path)
        assert all(torch.equal(found[name].A, A) for name, A in wanted.items()) and found.keys() == wanted.keys()


@pytest.mark.parametrize("name", ["evil/repository", "../../evil", "/nowhere", ".", "", "~", "~nobody/x", "https://example.com/x", "/\0",
                                  3, None, ["toy"]])
def test_no_model_is_fetched_because_an_adapter_names_it(tmp_path, name):
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": name})
    assert "give --model" in said(recipe.base_of, tmp_path)


def test_known_models_and_folders_are_taken_from_an_adapter(tmp_path):
    for name in ("toy", "google/gemma-2-2b", str(tmp_path)):
        write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": name})
        assert recipe.base_of(tmp_path) == name


# ---------------------------------------------------------------------------------------------------------------
# .npz; more of it in test_sae.py: Fortran order, big-endian, bombs, claims far above the file's size

@pytest.fixture
def params(tmp_path):
    """(folder, the path in it of an SAE's file, its five arrays)."""
    path = sae.save_sae(tmp_path, 1, 3, torch.ones(4, 6), torch.zeros(6), torch.ones(6), torch.ones(6, 4), torch.zeros(4))
    with np.load(path) as arrays:
        return tmp_path, path, dict(arrays)


def test_npz_with_a_pickled_array(tmp_path, params):
    folder, path, arrays = params
    np.savez(path, **arrays | {"b_dec": np.array([Trap(tmp_path / "mark")] * 4, object)})
    assert "nothing is unpickled" in said(sae.load_sae, folder, 1, "6") and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("magic", [b"\x93NUMPX\1\0", b"\x93NUMPY\7\0", b"\x80\4\x95" + bytes(5), b"PK\3\4" + bytes(4), b""], ids=str)
def test_npz_with_an_array_of_the_wrong_magic(params, magic):
    folder, path, _ = params
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, magic + data[8:] if name == "b_dec.npy" else data)
    assert "params.npz" in said(sae.load_sae, folder, 1, "6")


def test_an_sae_that_is_a_pickle(tmp_path, params):
    folder, path, _ = params
    path.write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    assert "not a complete .npz" in said(sae.load_sae, folder, 1, "6") and not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------------------------------------------------
# JSON, and what reaches the screen

DENSE = {"lists": b"[" + b"[]," * (1 << 22) + b"1]", "numbers": b"[" + b"1," * (1 << 22) + b"1]",
         "objects": b"[" + b'{"":{}},' * (1 << 20) + b"1]",
         "deep objects": b'{"a":' * (1 << 20), "deep lists": b"[" * (1 << 22), "one number": b"[" + b"1" * (1 << 22) + b"]",
         "spaces": b" " * (41 << 20)}


@pytest.mark.parametrize("text", DENSE.values(), ids=DENSE)
def test_json_that_would_grow_in_memory(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    assert "a.json" in said(files.read_json, tmp_path / "a.json", list)


def test_the_largest_json_that_is_let_in(tmp_path):
    most = files.VALUES
    for kind, text in ((list, b"[" + b'{"a":1},' * (most // 5) + b"1]"),
                       (list, ("[\"\U0001f600" + "x" * (files.JSON_LIMIT - 99) + '"]').encode()),
                       (dict, b"{" + b",".join(b'"%x":%d' % (i, 2**40 + i) for i in range(most // 4)) + b"}"),
                       (dict, json.dumps({f"{i:60}": i for i in range(most // 2)}).encode())):                  # as dense as text
        (tmp_path / "a.json").write_bytes(text)
        assert said(files.read_json, tmp_path / "a.json", kind) == "right"


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", "1e999", "-1e400", "1" * 400 + ".5", "1" * 641, r'"\ud83d"', r'"\ude00\ud83d"',
                                  r'"\\\ud83d x"', "[1,]"])
def test_json_that_could_not_be_written_again(text):
    with pytest.raises(ValueError):
        files.parse(text)


def test_json_that_can():
    for value in ("\U0001f600", "\\ud83d", 1e308, 10**600, [None, True, {"": [1.5]}]):
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
            assert files.parse(text) == files.parse(b"\xef\xbb\xbf" + text.encode()) == value


def test_values_are_counted():
    deep = files.parse("[" * 900 + "]" * 900)
    assert files.values_in(deep) == 899
    assert [files.values_in(value) for value in (1, "abc", [], {}, [1, [2, 3]], {"a": {"b": [4]}})] == [0, 0, 0, 0, 4, 3]
    assert files.weight('{"a": [1, 2]}') == 6


ROWS = {"a.jsonl": '{"prompt": "%d", "b": 1}', "a.txt": "%d", "a.csv": '"%d",1', "pairs.jsonl": json.dumps(dict.fromkeys(
    ("chosen", "rejected"), "\n\nHuman: %d\n\nAssistant: a" * 2)), "log.jsonl": '{"step": %d, "loss": [1]}'}


@pytest.mark.parametrize("name, cost", list(zip(ROWS, (9, 7, 9, 11, 7))), ids=ROWS)
def test_rows_are_bounded(tmp_path, monkeypatch, name, cost):
    read = {"pairs.jsonl": datafiles.read_pairs, "log.jsonl": files.read_jsonl}.get(name, datafiles.read_prompts)
    module, most = (files, "ITEMS") if name == "log.jsonl" else (datafiles, "ROOM")
    rows = ["prompt,b"] * (name == "a.csv") + [ROWS[name].replace("%d", str(number)) for number in range(9)]
    (tmp_path / name).write_text("".join(f"{row}\n" for row in rows))
    cost -= (tmp_path / name).stat().st_size // (24 if module is files else 128) / 9
    monkeypatch.setattr(module, most, 9 * cost)
    read(tmp_path / name)
    monkeypatch.setattr(module, most, 9 * cost - 1)
    with pytest.raises(InputError, match=rf"{name}:{10 if name == 'a.csv' else 9}: more "):
        read(tmp_path / name)


def test_a_corpus_of_nothing_but_short_rows_or_values(tmp_path, monkeypatch):
    monkeypatch.setattr(datafiles, "SPARE", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 400)
    (tmp_path / "b.jsonl").write_text('{"text": "a", "b": [' + "[], " * 150 + "1]}\n")
    (tmp_path / "c.txt").write_text("abc\n" * 300)
    for name, read in itertools.product(("a.jsonl", "b.jsonl", "c.txt"), (datafiles.read_texts, datafiles.read_items)):
        with pytest.raises(InputError, match="more than a text of that size has"):
            list(read(tmp_path / name))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 60, "b": 1}) + "\n" * 50)
    assert list(datafiles.read_texts(tmp_path / "a.jsonl")) == ["a" * 60]


def test_names_of_many_columns_are_cut(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(f"column{number}" for number in range(10**5)) + "\n")
    (tmp_path / "b.csv").write_text("prompt," + "," * 10**5 + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(map(str, range(10**5)))))
    for name, message in (("a.csv", "no column named"), ("b.csv", "columns; a set"), ("a.jsonl", "no field named")):
        line = said(datafiles.read_prompts, tmp_path / name)
        assert message in line and len(line) < 1000


def test_a_run_s_log_of_one_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_LIMIT", 50)
    (tmp_path / "metrics.jsonl").write_text('{"a": "%s"}' % ("x" * 50))
    with pytest.raises(InputError, match="metrics.jsonl:1: a line of more than 50 bytes"):
        files.read_jsonl(tmp_path / "metrics.jsonl")


def test_a_packed_sae_and_a_zip_of_many_names(tmp_path, monkeypatch):
    monkeypatch.setattr(sae, "UNPACKED", 0)
    place = tmp_path / "layer_1/width_1024/average_l0_9"
    place.mkdir(parents=True)
    weights = {name: torch.randn(shape).bfloat16().float().numpy() for name, shape in
               {"W_enc": (512, 1024), "b_enc": 1024, "W_dec": (1024, 512), "b_dec": 512}.items()} | {"threshold": np.ones(1024, "f4")}
    weights["W_dec"][:200] = 0
    np.savez_compressed(place / "params.npz", **weights)                                   # half a float32 is noise here, half zeros
    assert said(sae.load_sae, tmp_path, 1, "1024") == "right"
    entry, last = dense.directory(2000), (place / "params.npz").read_bytes()
    (place / "params.npz").write_bytes(entry)
    assert "holds many members" in said(sae.load_sae, tmp_path, 1, "1024")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2000, 2000, 2000 * 55, 0)   # the same, as for a file over 4 GB
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 2000 * 55, 1)
    (place / "params.npz").write_bytes(entry[:-22] + record + locator + entry[-22:-10] + bytes(4) + entry[-6:])
    assert "holds many members" in said(sae.load_sae, tmp_path, 1, "1024")
    (place / "params.npz").write_bytes(last)
    assert said(sae.load_sae, tmp_path, 1, "1024") == "right"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_file_of_empty_lines(tmp_path, name):
    (tmp_path / name).write_bytes(b"\n" * (3 << 20))
    assert "take the empty ones out" in said(datafiles.read_prompts, tmp_path / name)


def replaces(old, new, times):
    return {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": old}, "content": new}] * times}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("parts", [
    {"normalizer": replaces("\n", "\n\n", 40)}, {"normalizer": replaces("", "a", 40)}, {"normalizer": replaces("a", "b", 9)},
    {"normalizer": {"type": "Sequence", "normalizers": [replaces("a", "b", 8)] * 8}}, {"normalizer": {"type": "NFKD"}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 99}}, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A"}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}}, {"normalizer": []}, {"decoder": "Fuse"},
    {"decoder": {"type": "Sequence", "decoders": replaces("u", "uu", 40)["normalizers"]}}, {"decoder": {"type": "Replace"}},
    {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(x+x+)+y"}}}, {"normalizer": replaces("e", "ee", 22) | {"type": "Fuse"}},
    {"pre_tokenizer": {"type": "Sequence", "normalizers": [], "pretokenizers": [SPLIT | {"pattern": {"Regex": "(x+x+)+y"}}]}},
    {"decoder": {"type": "Sequence", "normalizers": [], "decoders": replaces("u", "uu", 40)["normalizers"]}},
    {"decoder": {"type": "WordPiece", "pattern": {"String": "u"}, "content": "u" * 999}}, {"pre_tokenizer": {"type": "Replace"}},
    {"normalizer": {"type": "Fuse"}}])
def test_a_tokenizer_that_would_grow_a_text_or_match_for_ever(tmp_path, parts):
    spec = json.loads((ROOT / "toy/tokenizer.json").read_text()) | parts
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert re.search(r"is of no kind that|is not a tokenizer\.json", said(data.load_tokenizer, tmp_path))


def test_a_tokenizer_of_too_many_tokens(tmp_path, monkeypatch):
    spec = json.loads((ROOT / "toy/tokenizer.json").read_text())
    monkeypatch.setattr(data, "TOKENS", len(spec["model"]["vocab"]) + len(spec["added_tokens"]) - 1)
    assert "tokens and merges are more than" in said(data.load_tokenizer, ROOT / "toy")


def test_long_registered_tokens(tmp_path):
    """The package builds an automaton of them, at 80 bytes a character."""
    spec = json.loads((ROOT / "toy/tokenizer.json").read_text())
    spec["added_tokens"] += [spec["added_tokens"][0] | {"content": " " * 300 * n, "id": 500 + n, "special": False} for n in range(1, 30)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert "registered tokens have 130,5" in said(data.load_tokenizer, tmp_path)


def test_many_registered_tokens_take_no_longer_than_others(tmp_path):
    """They were looked for in a set that was built anew for each: hours, for as many as a file can hold."""
    spec = json.loads((ROOT / "toy/tokenizer.json").read_text())
    first, like = 1 + max(spec["model"]["vocab"].values()), spec["added_tokens"][0]
    spec["added_tokens"] += [like | {"id": first + number, "content": f"<s{number}>"} for number in range(100_000)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert said(data.load_tokenizer, tmp_path) == "right"


def test_no_text_steers_the_terminal(capsys):
    def main():
        raise InputError("tensor \x1b]0;owned\7\x1b[2J\x9b31m \u202etxt.exe\u2028 is \r\n unknown")
    with pytest.raises(SystemExit):
        files.run(main)
    for text in (capsys.readouterr().err.removesuffix("\n"), tables.table([["a\x1b[2Jb\x9bc\nd\r"]])):
        assert text.isprintable()


# ---------------------------------------------------------------------------------------------------------------
# What hypothesis draws

@pytest.fixture(scope="module")
def readers():
    torch.set_num_threads(1)
    return fuzz.Readers()


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_any_draw_loads_right_or_is_refused(readers, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")                                              # which a reader sets

    @hypothesis.settings(max_examples=20, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    @hypothesis.given(st.randoms(use_true_random=False))
    def holds(draw):
        with tempfile.TemporaryDirectory(dir=fuzz.WORK) as at:
            end, _ = fuzz.one(readers, name, draw, Path(at))
        assert end in fuzz.GOOD, end

    fuzz.warm(readers, name)
    holds()
