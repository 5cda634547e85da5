"""Every reader against files that nobody honest wrote: each loads right, or raises InputError, within a second and 1 GB.

    python tests/fuzz.py --cases 2000                            # of each reader; a million in all with 60000
    python tests/fuzz.py --reader npz --first 1234 --cases 1     # one case again
    python tests/fuzz.py --commands 300                          # cases through the command that reads them
    python tests/fuzz.py --atheris 60                            # seconds a reader, what is drawn led by coverage

A case is made from its reader's name and its number alone: a good file whose values, keys, shapes, bytes or lengths were
changed a few times (hostile.py). Cases run in forks whose address space is bounded, so that a crash or a greedy one is found
and named. Prints cases, how many were refused, and every failure; exits with 1 where there is one. fuzz.json has all that
were run by --json tests/fuzz.json so far, and which; the failures in it have been mended.
"""

import argparse
import inspect
import json
import mmap
import os
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
import conftest
import numpy as np
import torch
from conftest import ROOT, random_gemma
from hostile import bitten, document, lines, npz, packed, tensor_file
from hypothesis.errors import StopTest

import ability
import attack
import data
import datafiles
import features
import figures
import files
import judge
import lora
import page
import recipe
import report
import sae
import session
import toy
import train
from model import save_model

SECONDS, MEMORY = 1.0, 1 << 30
GOOD = ("right", "refused")
WORK = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Readers:
    """A method a reader: writes a file that `draw` has changed into the folder `at`, and reads it with the product's own function."""

    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            self.model = random_gemma(vocab_size=40, num_hidden_layers=1)
            save_model(self.model, folder)
            self.config = json.loads((folder / "config.json").read_text())
            self.weights = files.read_tensors(folder / "model.safetensors")
            toy.write_tokenizer(folder / "tokenizer.json")
            self.tokenizer_spec = json.loads((folder / "tokenizer.json").read_text())
            bases = dict.fromkeys(lora._targets(self.model))
            adapters = lora.add_lora(self.model, 2, 2.0, "random", bases, torch.Generator().manual_seed(0))
            lora.save_adapter(self.model, folder, "toy")
            self.adapter_config = json.loads((folder / "adapter_config.json").read_text())
            self.adapter = files.read_tensors(folder / "adapter_model.safetensors")
            self.adapters, self.bare = adapters, random_gemma(vocab_size=40, num_hidden_layers=1)
        spec = self.tokenizer_spec
        added = [token["content"] for token in spec["added_tokens"]]
        vocab = {text: number for number, text in enumerate([*added, "<unk>"] if "<unk>" not in added else added)}
        for text in ["▁", *"abcdehlorw", "he", "ll", "hell", *(f"<0x{byte:02X}>" for byte in range(256))]:
            vocab.setdefault(text, len(vocab))
        self.bpe = spec | {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": None,
                           "added_tokens": [token | {"id": vocab[token["content"]]} for token in spec["added_tokens"]],
                           "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
                           "model": {"type": "BPE", "vocab": vocab, "merges": [["h", "e"], ["l", "l"], ["he", "ll"]], "unk_token": "<unk>",
                                     "byte_fallback": True, "fuse_unk": True, "dropout": None, "continuing_subword_prefix": None,
                                     "end_of_word_suffix": None}}
        world = toy.World(0)
        self.pairs = [dict(row) for row in world.pairs(4)]
        self.prompts = [dict(row) for row in world.prompts(3)["benign"]]
        rng = np.random.default_rng(0)
        self.arrays = {"W_enc": rng.normal(size=(4, 6)), "b_enc": rng.normal(size=6), "threshold": np.ones(6),
                       "W_dec": rng.normal(size=(6, 4)), "b_dec": rng.normal(size=4)}
        figure = {"count": 1, "n": 2, "rate": 0.5, "low": 0.1, "high": 0.9}
        kinds = ("full", "partial", "empty", "safe", "attack", "over_refusal", "correct", "right")
        sets = {name: {"role": name, "n": 2, **dict.fromkeys(kinds, figure), "categories": {"a": figure}} for name in recipe.SETS}
        self.scores = {"judge": "rules", "sets": {"base": sets, "adapter": sets},
                       "paired": {name: {"safe": {"change": 0.5, "p": 0.1, "low": 0.1, "high": 0.9, "n": 2}} for name in sets},
                       "trainable": 3, "parameters": 100, "rank": 2, "share": {"subspace": 0.5, "random": 0.1, "random_sd": 0.1},
                       "seconds": {"loading": 1.0}, "seed": 0, "peak_bytes": 10**6}
        self.settings = dict(vars(recipe.resolve(SimpleNamespace(resume=None), None)[0]))
        self.row = {"model": "base", "set": "harmful", "role": "harmful", "file": "f", "line": 1, "prompt": "a", "completion": "b",
                    "fields": {}}
        self.log = [{"stage": "loading", "seconds": 1.0},
                    {"step": 0, "probe": {"safe": 0.5, "n": 2, "singular_values": [1.0], "angle": 3.0}},
                    {"step": 1, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "trained_tokens": 3, "tokens": 5, "seconds": 0.1}]
        self.feature = {"layer": 1, "index": 3, "delta": 0.5, "rho": 0.1, "effect": 0.2, "mean": [1.0, 0.5], "frequency": [0.1, 0.2],
                        "promotes": ["a"], "peaks": [{"activation": 1.0, "side": "aligned", "line": 1, "peak": 1, "tokens": ["a", "b"]}],
                        "neuronpedia": None}

    def safetensors(self, draw, at):
        (at / "a.safetensors").write_bytes(tensor_file(self.adapter, draw))
        shapes = files.tensor_shapes(at / "a.safetensors")
        tensors = files.read_tensors(at / "a.safetensors")
        assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert files.read_metadata(at / "a.safetensors") is not None

    def config_json(self, draw, at):
        (at / "config.json").write_bytes(document(self.config, draw))
        train.load_config(at)

    def model_folder(self, draw, at):
        (at / "config.json").write_bytes(document(self.config, draw) if draw.random() < 0.5 else json.dumps(self.config).encode())
        names = list(self.weights)
        index = {"metadata": {"total_size": 1}, "weight_map": {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}}
        if draw.random() < 0.5:
            (at / "model.safetensors.index.json").write_bytes(document(index, draw))
        else:
            (at / "model.safetensors.index.json").unlink(missing_ok=True)
        for path, share in (("model-1.safetensors", names[::2]), ("model-2.safetensors", names[1::2]), ("model.safetensors", names)):
            tensors = {name: self.weights[name] for name in share}
            if draw.random() < 0.3:
                (at / path).write_bytes(tensor_file(tensors, draw))
            else:
                files.write_tensors(at / path, tensors)
        train.load_model(at)

    def npz(self, draw, at):
        place = at / "layer_1/width_6/average_l0_3"
        place.mkdir(parents=True, exist_ok=True)
        (place / "params.npz").write_bytes(npz(self.arrays, draw))
        found = sae.load_sae(at, 1, "6")
        assert found.W_enc.shape == (4, 6) and found.W_enc.isfinite().all()
        assert found.decoder_rows([5, 0]).shape == (2, 4) and found.W_dec.shape == (6, 4)

    def sasa(self, draw, at):
        place = at / "layer_1/width_6/average_l0_3"
        place.mkdir(parents=True, exist_ok=True)
        told = document({"architecture": "sasa", "block": 2, "active": 1}, draw) if draw.random() < 0.5 else b'{"block": 2, "active": 1}'
        (place / "sasa.json").write_bytes(told)
        tensors = {name: torch.tensor(array) for name, array in self.arrays.items() if name != "threshold"}
        (place / "sasa.safetensors").write_bytes(tensor_file(tensors, draw))
        assert sae.load_sae(at, 1, "6").W_dec.shape == (6, 4)

    def tokenizer(self, draw, at):
        (at / "tokenizer.json").write_bytes(document(draw.choice([self.tokenizer_spec, self.bpe]), draw))
        found = data.load_tokenizer(at)
        ids = found.encode("hello <bos> <start_of_turn>user <end_of_turn> world <pad><unused5>")
        assert found.control.isdisjoint(ids) and isinstance(found.decode(ids), str)

    def adapter_folder(self, draw, at):
        told = document(self.adapter_config, draw) if draw.random() < 0.6 else json.dumps(self.adapter_config).encode()
        (at / "adapter_config.json").write_bytes(told)
        (at / "adapter_model.safetensors").write_bytes(tensor_file(self.adapter, draw))
        try:
            lora.load_adapter(self.bare, at)
        finally:
            if lora.lora_layers(self.bare):
                self.bare = random_gemma(vocab_size=40, num_hidden_layers=1)

    def hh_rlhf(self, draw, at):
        rows = [{key: text.replace("Human", draw.choice(["Human"] * 9 + ["Humans", "Assistant", ""])) if isinstance(text, str) else text
                 for key, text in row.items()} for row in self.pairs]
        datafiles.read_pairs(packed(at / "pairs.jsonl", lines(rows, draw), draw))

    def prompt_files(self, draw, at):
        kind = draw.choice([".txt", ".csv", ".json", ".jsonl", ".xml"])
        if kind == ".csv":
            odd = ["safe", "a,b", chr(34), chr(0), "x" * 200_000]
            rows = [f'"{row.get("prompt", "a")}",{draw.choice(odd)}' for row in self.prompts]
            whole = "\n".join(["prompt,label", *rows]).encode()
            whole = bitten(whole, draw) if draw.random() < 0.6 else whole
        else:
            whole = {".txt": lambda: bitten(b"a\nb\nc\n", draw), ".json": lambda: document(self.prompts, draw)}.get(
                kind, lambda: lines(self.prompts, draw))()
        datafiles.read_prompts(packed(at / f"prompts{kind}", whole, draw))

    def texts(self, draw, at):
        kind = draw.choice([".txt", ".jsonl"])
        list(datafiles.read_texts(packed(at / f"texts{kind}", lines([{"text": "abc"}, {"text": "d"}], draw), draw)))

    def questions(self, draw, at):
        rows = [{"question": "a", "choices": ["b", "c"], "answer": 1}, {"ctx": "a", "endings": ["b", "c"], "label": "0"}]
        (at / "q.jsonl").write_bytes(lines(rows, draw))
        ability.read_questions(at / "q.jsonl")

    def templates(self, draw, at):
        (at / "t.txt").write_bytes(bitten(b"Say {prompt} now\nand {prompt} then, {target}\n---\nx {prompt}\n", draw))
        attack.read_templates(at / "t.txt")

    def judgements(self, draw, at):
        os.environ["XDG_CACHE_HOME"] = str(at)
        judge.cache_file("rubric").parent.mkdir(exist_ok=True)
        good = {"key": "k", "judgement": {"score": 1, "reason": "a"}, "check": judge._hash("k", {"score": 1, "reason": "a"})}
        judge.cache_file("rubric").write_bytes(lines([good, good], draw))
        with judge._notebook("rubric", {"k"}) as (known, remember):
            assert known in ({}, {"k": good["judgement"]})
            remember("k", good["judgement"])
        with judge._notebook("rubric", {"k"}) as (known, _):
            assert known == {"k": good["judgement"]}

    def run_config(self, draw, at):
        (at / "config.json").write_bytes(document({"settings": self.settings, "source": {}, "processes": 1}, draw))
        settings, _ = recipe.resolve(SimpleNamespace(resume=str(at)), vars(recipe.saved(at)))
        assert isinstance(settings.rank, int)

    def run_scores(self, draw, at):
        (at / "scores.json").write_bytes(document(self.scores, draw))
        report.result_table(report.read_scores(at))

    def run_page(self, draw, at):
        good = {"config": {"settings": self.settings, "source": {}}, "scores": self.scores, "features": [self.feature],
                "explain": {"layers": [], "words": {"1/3": self.feature}}}
        for name, value in good.items():
            (at / f"{name}.json").write_bytes(document(value, draw) if draw.random() < 0.4 else json.dumps(value).encode())
        (at / "metrics.jsonl").write_bytes(lines(self.log, draw))
        (at / "judged.jsonl").write_bytes(lines([self.row | {"verdict": "full", "reason": "a"}], draw))
        page.write_page([at], at / "report.html")

    def run_answers(self, draw, at):
        (at / "completions.jsonl").write_bytes(lines([self.row, self.row | {"model": "adapter"}], draw))
        (at / "judged.jsonl").write_bytes(lines([self.row | {"verdict": "full"}], draw))
        figures.score(at)

    def run_log(self, draw, at):
        (at / "metrics.jsonl").write_bytes(lines(self.log, draw))
        log = session.Log(at / "metrics.jsonl")
        log.keep(1)
        log.add({"step": 2})
        assert session.Log(at / "metrics.jsonl").lines == [*log.lines, {"step": 2}] and log.seconds() is not None

    def checkpoint(self, draw, at):
        named = session.adapter_parameters(self.adapters)
        tensors = {f"{name}{part}": parameter.detach() for name, parameter in named for part in ("", ".exp_avg", ".exp_avg_sq")}
        (at / "checkpoint").mkdir(exist_ok=True)
        said = {"step": draw.choice(["3", "0", "x", "-1", "9" * 50]), "threads": draw.choice(["1", "999999999", ""])}
        (at / session.CHECKPOINT).write_bytes(tensor_file(tensors, draw, said))
        before = torch.get_num_threads()
        try:
            session.load_checkpoint(at, self.adapters, torch.optim.AdamW([parameter for _, parameter in named]))
        finally:
            torch.set_num_threads(before)

    def subspace(self, draw, at):
        (at / "subspace.safetensors").write_bytes(tensor_file({"layer_1": torch.eye(4)[:, :2], "layer_2.readers": torch.eye(4)}, draw))
        assert all(U.dim() == 2 for U in features.load_subspaces(at / "subspace.safetensors").values())


NAMES = [name for name in vars(Readers) if not name.startswith("_")]


# ---------------------------------------------------------------------------------------------------------------
# The runner

def one(readers, name, draw, at):
    """("right", "refused" or what went wrong with a case, the seconds it took)."""
    began = time.process_time()
    try:
        getattr(readers, name)(draw, at)
        end = "right"
    except files.InputError as error:
        end = "refused" if str(error).strip() else "an empty line"
    except StopTest:                                                # hypothesis has drawn enough
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        end = f"{type(error).__name__}: {str(error)[:120]} ({Path(where.filename).name}:{where.lineno})"
    took = time.process_time() - began
    return end if took < SECONDS or end not in GOOD else f"{took:.1f} s", took


def drawn(name, number):
    """What makes a case."""
    return random.Random(f"{name} {number}")


def warm(readers, name):
    """What is imported or compiled at its first use is no reader's time."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-20, 0):
            one(readers, name, drawn(name, number), Path(folder))


def bound():
    """1 GB more than now, no word on the screen, and one thread: those of the process that forked aren't here to wait for."""
    torch.set_num_threads(1)
    size = 1024 * int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def fuzz(readers, name, first, count, chunk=500):
    """(a reader's figures, [(number, what went wrong)])."""
    shared, wrong, number = mmap.mmap(-1, 64), [], first
    found = {"numbers": [f"{first}:{first + count}"], "cases": count, "refused": 0, "failures": 0, "slowest_s": 0.0, "peak_MB": 0}
    while number < first + count:
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            bound()
            resource.setrlimit(resource.RLIMIT_CPU, (int(chunk * SECONDS) + 60,) * 2)
            with tempfile.TemporaryDirectory(dir=WORK) as at, open(tell, "w") as report_:
                refused, slowest = 0, 0.0
                for case in range(number, min(number + chunk, first + count)):
                    shared[:8] = struct.pack("<Q", case)
                    end, took = one(readers, name, drawn(name, case), Path(at))
                    refused, slowest = refused + (end == "refused"), max(slowest, took)
                    if end not in GOOD:
                        report_.write(json.dumps([case, end]) + "\n")
                        report_.flush()
                report_.write(json.dumps([-1, [refused, slowest]]) + "\n")
            os._exit(0)
        os.close(tell)
        with open(told) as report_:
            for line in report_:
                case, end = json.loads(line)
                if case < 0:
                    found["refused"] += end[0]
                    found["slowest_s"] = max(found["slowest_s"], round(end[1], 3))
                else:
                    wrong.append((case, end))
        _, code, usage = os.wait4(child, 0)
        code, found["peak_MB"] = os.waitstatus_to_exitcode(code), max(found["peak_MB"], usage.ru_maxrss // 1000)
        if code:
            case = struct.unpack("<Q", shared[:8])[0]
            wrong.append((case, f"the process ended with {code}"))
            number = case + 1
        else:
            number += chunk
    return found | {"failures": len(wrong)}, wrong


def all_cases(readers, names, first, count, path):
    """Failures of `count` cases of each reader; the figures are added to those in the JSON file `path`."""
    told = {}
    for name in names:
        warm(readers, name)
        began = time.monotonic()
        told[name], wrong = fuzz(readers, name, first, count)
        print(f"{name:16} {count:>9,} cases  {told[name]['refused']:>9,} refused  {len(wrong):>5} failures  "
              f"slowest {told[name]['slowest_s']:.2f} s  {told[name]['peak_MB']:>4} MB  {time.monotonic() - began:6.1f} s", flush=True)
        for case, end in {end: (case, end) for case, end in reversed(wrong)}.values():
            print(f"    case {case}: {end}", flush=True)
        if path:
            known = json.loads(path.read_text()) if path.exists() else {}
            known[name] = joined(known[name], told[name]) if name in known else told[name]
            files.write_json(path, known)
    print(total(told))
    return sum(found["failures"] for found in told.values())


def joined(one, other):
    """The figures of two runs of one reader as those of one."""
    return {key: max(one[key], other[key]) if key in ("slowest_s", "peak_MB") else one[key] + other[key] for key in one}


def total(told):
    cases, failures, slowest, peak = ([found[key] for found in told.values()] for key in ("cases", "failures", "slowest_s", "peak_MB"))
    return f"{sum(cases):,} cases, {sum(failures):,} failures; the slowest {max(slowest):.2f} s, at most {max(peak)} MB"


# ---------------------------------------------------------------------------------------------------------------
# Through the command line

RUN = ("run_config", "run_scores", "run_page", "run_answers", "run_log", "checkpoint", "subspace")      # readers of a run's folder


def arguments(name, at, good):
    """The command that reads what the reader `name` left in `at`; `good` has all else that it needs."""
    mini, run, out = good / "mini", good / "run", at / "out"
    file = next((path for path in at.iterdir() if path.name.startswith(("pairs", "prompts", "texts", "q.", "t.txt"))), None)
    data_flags = ["--sae", mini / "sae", "--data", mini / "train.jsonl"]
    return {"config_json": ["train.py", "--model", at, *data_flags, "--dry-run"],
            "model_folder": ["merge.py", good / "adapter", "--model", at, "--out", out],
            "adapter_folder": ["merge.py", at, "--model", good / "model", "--out", out],
            "npz": ["select.py", "--model", mini, "--sae", at, "--data", mini / "train.jsonl", "--out", out],
            "sasa": ["train.py", "--model", mini, "--sae", at, "--data", mini / "train.jsonl", "--dry-run"],
            "tokenizer": ["data.py", mini / "train.jsonl", "--tokenizer", at, "--show", 1],
            "hh_rlhf": ["train.py", "--model", mini, "--sae", mini / "sae", "--data", file, "--dry-run"],
            "prompt_files": ["eval.py", run, "--harmful", file, "--prompts", 2, "--out", out],
            "texts": ["sae_train.py", "--model", mini, "--layers", 1, "--data", file, "--width", 16, "--l0", 2, "--token-count", 64,
                      "--context", 8, "--buffer", 64, "--batch", 32, "--out", out],
            "questions": ["eval.py", run, "--choices", file, "--out", out],
            "templates": ["eval.py", run, "--benign", mini / "benign.jsonl", "--harmful", mini / "harmful.jsonl", "--prompts", 1,
                          "--attack", "template", "--template", file, "--out", out],
            **dict.fromkeys(("run_config", "run_answers"), ["eval.py", at]), **dict.fromkeys(("run_scores", "run_page"), ["report.py", at]),
            **dict.fromkeys(("run_log", "checkpoint", "subspace"), ["train.py", "--resume", at])}[name]


def command(readers, name, number, good, fresh):
    """(exit code, what it wrote to stderr) of the command that reads a case: in a fork that has imported all, unless `fresh`."""
    with tempfile.TemporaryDirectory(dir=WORK) as at, tempfile.TemporaryFile("w+") as said:
        at = Path(at)
        if name in RUN:
            shutil.copytree(good / "run", at, dirs_exist_ok=True)
        if name in ("run_log", "checkpoint", "subspace"):           # unfinished
            for path in ("report.html", "scores.json", "adapter_model.safetensors"):
                (at / path).unlink()
        child = os.fork()
        if not child:
            os.chdir(at)
            one(readers, name, drawn(name, number), at)
            script, *flags = map(str, arguments(name, at, good))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            signal.alarm(120)
            sys.argv = [str(ROOT / script), *flags]
            if fresh:
                os.execv(sys.executable, [sys.executable, *sys.argv])
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


def commands(readers, names, first, count):
    """Failures of `count` cases, a reader after the other, through the command line: exit code 0, or 2 and one line."""
    ends, failures = {}, 0
    with tempfile.TemporaryDirectory(dir=WORK) as good:
        good = Path(good)
        for name in ("mini", "model", "adapter"):
            (good / name).mkdir()
        conftest.write_mini(good / "mini")
        conftest.ended("train.py", conftest.command(good / "mini", good / "run", sets=conftest.SETS))
        files.write_json(good / "model/config.json", readers.config)
        files.write_tensors(good / "model/model.safetensors", readers.weights)
        files.write_json(good / "adapter/adapter_config.json", readers.adapter_config)
        files.write_tensors(good / "adapter/adapter_model.safetensors", readers.adapter)
        names = [name for name in names if name not in ("safetensors", "judgements")]       # which no command reads alone
        for number in range(first, first + count):
            name = names[number % len(names)]
            code, said = command(readers, name, number, good, fresh=number % 10 == 0)
            ends[code] = ends.get(code, 0) + 1
            if "Traceback" in said or code not in (0, 2) or code == 2 and not re.fullmatch(r"\w+\.py: error: [^\n]+\n", said):
                failures += 1
                print(f"{name}, case {number}: exit code {code}, {said[-2000:]!r}", flush=True)
    print(f"{count:,} commands, {failures} failures; exit codes {', '.join(f'{code}: {n:,}' for code, n in sorted(ends.items()))}")
    return failures


# ---------------------------------------------------------------------------------------------------------------
# Led by coverage

class Steered(random.Random):
    """Draws that bytes decide, zeros after their end."""

    def __init__(self, told):
        super().__init__(0)
        self.told, self.at = told, 0

    def getrandbits(self, k):
        self.at += (size := (k + 7) // 8)
        return int.from_bytes(self.told[self.at - size:self.at], "little") & ((1 << k) - 1)

    def random(self):
        return self.getrandbits(16) / (1 << 16)


def led(readers, names, seconds):
    """Failures of cases whose draws atheris (pip install atheris) changes towards code that none has reached; seconds a reader."""
    import atheris
    for module in [module for path in ROOT.glob("*.py") if (module := sys.modules.get(path.stem))]:
        for _, thing in inspect.getmembers(module, lambda thing: getattr(thing, "__module__", None) == module.__name__):
            for function in [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]:
                if inspect.isfunction(function := inspect.unwrap(getattr(function, "__func__", function))):
                    atheris.instrument_func(function)
    failures = 0
    for name in names:
        warm(readers, name)
        with tempfile.TemporaryDirectory(dir=WORK) as at:
            child = os.fork()
            if not child:
                bound()
                os.dup2(os.open(f"{at}/said", os.O_WRONLY | os.O_CREAT), 2)

                def case(told, name=name, at=Path(at)):
                    (at / "files").mkdir(exist_ok=True)
                    end, _ = one(readers, name, Steered(told), at / "files")
                    assert end in GOOD, f"{end}, draws {told.hex()}"

                atheris.Setup([name, f"-max_total_time={seconds}", "-max_len=512", "-len_control=0", f"-artifact_prefix={at}/"], case)
                atheris.Fuzz()
            os.waitpid(child, 0)
            said = Path(at, "said").read_text(errors="replace")
        done = re.findall(r"#(\d+)\s+DONE\s+cov: (\d+)", said)
        failures += not done
        print(f"{name:16} {int(done[0][0]):>9,} cases  {int(done[0][1]):>6,} branches" if done else f"{name}: {said[-2000:]}", flush=True)
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="of each reader")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to those in this file")
    parser.add_argument("--commands", type=int, metavar="N", help="instead: so many cases, through the command line")
    parser.add_argument("--atheris", type=int, metavar="SECONDS", help="instead: each reader for so long, led by coverage")
    args = parser.parse_args()
    torch.set_num_threads(1)
    readers = Readers()
    if args.commands:
        return commands(readers, args.reader, args.first, args.commands) > 0
    if args.atheris:
        return led(readers, args.reader, args.atheris) > 0
    return all_cases(readers, args.reader, args.first, args.cases, args.json) > 0


if __name__ == "__main__":
    sys.exit(main())
