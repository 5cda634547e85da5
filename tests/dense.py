"""The slowest and the greediest files that readers let in, beside honest ones of the same size.

    python tests/dense.py                     # all; a table and, where a bound doesn't hold, exit code 1

Every file is read in a fork of its own. What must hold of a file made to be slow: a second more of processor time than an
honest file of its size takes, or than it takes to refuse it; at most 1 GB of memory besides its own size. Honest ones are
conversations, texts, a run's log, and a vocabulary and merges as many as Gemma's.
"""

import gzip
import io
import itertools
import json
import os
import re
import struct
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from conftest import ROOT, random_gemma  # puts the product on the path

import data
import datafiles
import files
import sae
from model import load_model, save_model
from tables import table

SECONDS, MEMORY = 1.0, 10**9
MB = 10**6
SAID = "How do I tie a knot so that it holds, and can be undone later on? "


def rows(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def fill(make, size):
    """Lines make(0), make(1), … until they have `size` bytes."""
    out, have = [], 0
    for number in itertools.count():
        out.append(make(number))
        have += len(out[-1]) + 1
        if have >= size:
            return rows(*out)


def array(*items):
    return b'{"a":[' + b",".join(items) + b"]}"


def document(size):
    """An honest JSON object, of texts."""
    return json.dumps({"rows": [{"prompt": SAID * 4, "category": "knots"}] * (size // 320)}).encode()


def pair(turns):
    return json.dumps({"chosen": turns, "rejected": turns})


def conversation(number):
    return pair(f"\n\nHuman: {SAID * 3}{number}\n\nAssistant: {SAID * 4}\n\nHuman: {SAID}\n\nAssistant: {SAID * 7}")


def prompt(number):
    return f"{SAID * 2}{number}"


def step(number):
    return json.dumps({"step": number, "loss": 1 / (3 + number), "lr": 0.001, "grad_norm": 0.7 + number * 1e-9, "tokens": 2048,
                       "trained_tokens": 900, "seconds": 0.12345})


def tokenizer(letters=25, tokens=240_000, merges=580_000, added=(), **changed):
    """A tokenizer.json of that many letters, words of up to all lengths, and merges: every way to make a word of two."""
    spec = json.loads((ROOT / "toy/tokenizer.json").read_text()) | {"normalizer": None, "pre_tokenizer": None, "decoder": None}
    control = [token["content"] for token in spec["added_tokens"]]
    words = itertools.chain.from_iterable(map("".join, itertools.product(map(chr, range(101, 101 + letters)), repeat=n))
                                          for n in itertools.count(1))
    words = list(itertools.islice(words, tokens))
    known = set(words)
    ways = ([word[:at], word[at:]] for word in words for at in range(1, len(word)) if word[:at] in known and word[at:] in known)
    vocab = {word: number for number, word in enumerate(dict.fromkeys([*control, "<unk>", *words, *added]))}
    model = {"type": "BPE", "vocab": vocab, "merges": list(itertools.islice(ways, merges)), "unk_token": "<unk>", "byte_fallback": False,
             "fuse_unk": True, "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    like = spec["added_tokens"][0] | {"special": False}
    added = [token | {"id": vocab[token["content"]]} for token in [*spec["added_tokens"], *(like | {"content": text} for text in added)]]
    return json.dumps(spec | {"model": model, "added_tokens": added} | changed, ensure_ascii=False).encode()


def words_alone(count):
    """A tokenizer.json of words alone."""
    spec = json.loads((ROOT / "toy/tokenizer.json").read_text())
    first = 1 + max(spec["model"]["vocab"].values())
    spec["model"]["vocab"] |= {f"w{number}": first + number for number in range(count)}
    return json.dumps(spec).encode()


def deepest(folder):
    """The bytes of a checkpoint of as many layers as config.json may ask for, as small as they get; its config stays in `folder`."""
    save_model(random_gemma((1, 1, 2, 8, 2.0), num_hidden_layers=128, intermediate_size=8, vocab_size=8), folder)
    return (folder / "model.safetensors").read_bytes()


def many_tensors(folder, count):
    files.write_tensors(folder / "many", {f"{number:x}": torch.zeros(1) for number in range(count)})
    return (folder / "many").read_bytes()


def directory(count):
    """A zip of nothing but names."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0) + b"W_enc.npy"
    entries, last = entry * count, entry[:32] + struct.pack("<H", 60_000) + entry[34:] + b"c" * 60_000       # with a long comment
    entries += last * 5 * (count > 10_000)
    return entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, min(count, 65535), min(count, 65535), len(entries), 0, 0)


def params(features, compressed=False):
    arrays = {"W_enc": (256, features), "b_enc": features, "threshold": features, "W_dec": (features, 256), "b_dec": 256}
    out, save = io.BytesIO(), np.savez_compressed if compressed else np.savez
    save(out, **{name: np.zeros(shape, "f4") if compressed else np.random.default_rng(0).normal(size=shape).astype("f4")
                 for name, shape in arrays.items()})
    return out.getvalue()


def whole_sae(path):
    for array in sae.read_params(path).values():
        array.read()


def cases(folder):
    """(reader, what is read, name of the file, [(honest?, what it is, bytes)])"""
    half = files.VALUES - 8
    yield "JSON object", files.read_json, "a.json", [
        (False, "keys", b"{" + b",".join(b'"%d":1' % i for i in range(half // 4)) + b"}"),
        (False, "keys, spread", b"{" + b",".join(b'"%-90d":1' % i for i in range(400_000)) + b"}"),
        (False, "numbers", array(*[b"1.5e-300"] * half)),
        (False, "numbers, spread", array(*[b"0.12345678901234567890123456789012"] * 1_150_000)),
        (False, "numbers of 640 digits", array(*[b"9" * 640] * 64_000)),
        (False, "empty lists", array(*[b"[]"] * (half // 2))),
        (False, "one text", b'{"a":"' + b"x" * (files.JSON_LIMIT - 20) + b'"}'),
        (False, "one text of escapes", b'{"a":"' + b"\\n" * (files.JSON_LIMIT // 2 - 20) + b'"}'),
        (True, "texts", document(3 * MB)), (True, "texts", document(40 * MB))]
    yield "JSON lines of a run", files.read_jsonl, "a.jsonl", [
        (False, "keys", fill(lambda i: "{" + ",".join(f'"{i}.{j}":1' for j in range(10)) + "}", 40 * MB)),
        (False, "numbers", fill(lambda i: '{"a":[' + ",".join(["1.5e-300"] * 1000) + "]}", 40 * MB)),
        (False, "lists", fill(lambda i: '{"a":[' + ",".join(["[]"] * 1000) + "]}", 40 * MB)),
        (False, "empty objects", rows(*["{}"] * 10 * MB)),
        (False, "one line", json.dumps({"a": "x" * 150 * MB + "\U0001f600"}, ensure_ascii=False).encode()),
        (True, "a log", fill(step, 20 * MB))]
    yield "pairs", datafiles.read_pairs, "a.jsonl", [
        (False, "short", fill(lambda i: pair(f"\n\nHuman: {i}\n\nAssistant: a"), 80 * MB)),
        (False, "turns", fill(lambda i: pair(f"\n\nHuman:{i}\n\nAssistant:a" * 1000), 80 * MB)),
        (False, "columns", fill(lambda i: conversation(i)[:-1] + "".join(f', "c{j}": []' for j in range(400)) + "}", 80 * MB)),
        (False, "not pairs", fill(lambda i: '{"chosen":"","rejected":""}', 80 * MB)),
        (True, "conversations", fill(conversation, 80 * MB))]
    yield "prompts", datafiles.read_prompts, "a.jsonl", [
        (False, "short", fill(lambda i: f'{{"prompt":"{i}"}}', 40 * MB)),
        (False, "texts", fill(lambda i: f'"{i}"', 40 * MB)),
        (False, "columns", fill(lambda i: f'{{"prompt":"{i}",' + ",".join(f'"{i}{j}":[]' for j in range(30)) + "}", 40 * MB)),
        (False, "nested", fill(lambda i: f'{{"prompt":"{i}","a":[' + ",".join(["[[]]"] * 300) + "]}", 40 * MB)),
        (True, "prompts", fill(lambda i: json.dumps({"prompt": prompt(i), "category": "knots"}), 20 * MB))]
    for what, reader in (("texts", datafiles.read_texts), ("items", datafiles.read_items)):
        yield what, lambda path, reader=reader: list(reader(path)), "a.jsonl", [
            (False, "short", fill(lambda i: f'{{"text":"{i}"}}', 40 * MB)),
            (False, "values", fill(lambda i: f'{{"text":"{i}","a":[' + ",".join(["[]"] * 1000) + "]}", 40 * MB)),
            (True, "texts", fill(lambda i: json.dumps({"text": SAID * 12}), 40 * MB))]
    yield "texts, plain", lambda path: list(datafiles.read_texts(path)), "a.txt", [
        (False, "one of short lines", fill(lambda i: "abcdefghijk", 60 * MB)), (False, "one of lines", fill(lambda i: SAID[:31], 60 * MB)),
        (True, "texts", fill(lambda i: SAID * 3 + "\n", 60 * MB))]
    yield "prompts as text", datafiles.read_prompts, "a.txt", [
        (False, "short", fill(str, 40 * MB)), (False, "empty", b"\n" * 40 * MB), (True, "prompts", fill(prompt, 20 * MB))]
    yield "prompts as table", datafiles.read_prompts, "a.csv", [
        (False, "short", b"prompt\n" + fill(str, 40 * MB)),
        (False, "columns", b"prompt" + b",a" * 999 + b"\n" + fill(lambda i: f"{i}" + ",b1" * 999, 40 * MB)),
        (False, "many columns", b"prompt" + b"," * 10 * MB + b"\n" + (b"a" + b"," * 10 * MB + b"\n") * 2),
        (False, "no prompt", b",".join(b"%d" % i for i in range(5 * MB)) + b"\n"),
        (True, "prompts", b"prompt,category\n" + fill(lambda i: f'"{prompt(i)}",knots', 15 * MB))]
    yield "prompts as list", datafiles.read_prompts, "a.json", [
        (False, "short", ("[" + ",".join(f'"{i}"' for i in range(half)) + "]").encode()),
        (False, "empty", b"\n" * 40 * MB),
        (False, "spread", ("[" + ",".join(f'"{i:<50}"' for i in range(700_000)) + "]").encode()),
        (True, "prompts", json.dumps([prompt(i) for i in range(20 * MB // 160)]).encode())]
    yield "compressed", datafiles.read_prompts, "a.txt.gz", [
        (False, "a long line", gzip.compress(b"x" * 200 * MB, 1)), (False, "lines", gzip.compress(fill(lambda i: "x" * 70, 200 * MB), 1)),
        (False, "empty", gzip.compress(b"\n" * 200 * MB, 1)), (True, "prompts", gzip.compress(fill(prompt, 12 * MB), 1))]
    yield "tokenizer.json", data.load_tokenizer, "tokenizer.json", [
        (False, "words", words_alone(1_000_000)), (False, "too many words", words_alone(1_500_000)),
        (False, "many merges", tokenizer(2, 60_000, 900_000)),
        (False, "special tokens", tokenizer(2, 100, 100, added=[f"<s{i}>" for i in range(100_000)])),
        (False, "runs of white space", tokenizer(2, 100, 100, added=[
            "".join(" \t\n\u2581"[i >> 2 * j & 3] for j in range(9)) for i in range(7_000)])),
        (False, "long ones", tokenizer(2, 100, 100, added=[" " * (1 + i % 2000) + "\t" * (i // 2000) for i in range(10_000)])),
        (False, "grows", tokenizer(normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}] * 40})),
        (False, "matches for ever", tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(e+e+)+y"}, "behavior": "Isolated",
                                                             "invert": False})),
        (True, "as large as Gemma's", tokenizer())]
    yield "checkpoint", lambda path: load_model(path.parent), "model.safetensors", [(False, "128 layers", deepest(folder))]
    yield "adapter", files.read_tensors, "a.safetensors", [(False, "many tensors", many_tensors(folder, 12_000))]
    yield "params.npz", whole_sae, "params.npz", [
        (False, "many members", directory(1_000_000)), (False, "zeros, packed", params(32_000, True)),
        (False, "more of them", params(64_000, True)), (True, "random numbers", params(32_000))]


def read(reader, path):
    """(how it ended, processor seconds, bytes that the peak of memory grew by) of reading a file, in a fork."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        def peak():
            return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        Path("/proc/self/clear_refs").write_text("5")
        before, began = peak(), time.process_time()
        try:
            found, end = reader(path), "right"
            if isinstance(found, data.Tokenizer):
                found.encode("e" * 60)
        except files.InputError as error:
            end = f"refused: {str(error).replace(str(path), '')}"
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
        os.write(tell, json.dumps([end[:90], time.process_time() - began, peak() - before]).encode())
        os._exit(0)
    os.close(tell)
    with open(told) as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else ["the process died", 0.0, 0]


def main():
    lines, failed = [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for what, reader, name, made in cases(Path(folder)):
            path, speeds = Path(folder) / name, []
            for honest, kind, whole in sorted(made, key=lambda case: not case[0]):
                path.write_bytes(whole)
                end, seconds, memory = read(reader, path)
                path.unlink()
                if honest:
                    speeds.append(seconds / len(whole))
                allowed = SECONDS + min(speeds, default=0) * len(whole)
                good = end == "right" if honest else (end == "right" or end.startswith("refused")) and seconds <= allowed
                holds = good and memory <= MEMORY + len(whole)
                failed += not holds
                lines.append([what, kind, f"{len(whole) / MB:.0f}", f"{seconds:.2f}", "honest" if honest else f"{allowed:.2f}",
                              f"{memory / MB:,.0f}", "" if holds else "✗", end])
                print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    print(table(lines, ["reader", "made of", "MB", "seconds", "allowed", "memory, MB", "", "ends"], right=(2, 3, 4, 5)))
    return failed > 0


if __name__ == "__main__":
    files.run(main)
