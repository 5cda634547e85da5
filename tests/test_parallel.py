"""Two processes under torchrun against one: the same losses, adapters, statistics and answers; and how runs end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, SETS, command, start

from run import files
from run import session
from run.files import read_jsonl, read_tensors

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def torchrun(script, arguments, processes=2):
    """Start a command under torchrun, in a session of its own, which lasts two minutes at most."""
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
                                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
                                str(ROOT / script), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=ENVIRONMENT, start_new_session=True)
    timer = threading.Timer(120, lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return process


def workers(process):
    """Process ids of torchrun's children, by rank."""
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    ranks = {}
    for child in children:
        with contextlib.suppress(OSError):
            values = dict(line.split("=", 1) for line in open(f"/proc/{child}/environ").read().split("\0") if "=" in line)
            if "RANK" in values:
                ranks[int(values["RANK"])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def done(process, seconds=60):
    """(stdout, stderr) of a command that must end well."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def runs(mini, tmp_path_factory):
    """The same run: one process and 4 rows a step, two with 2 each, and two that share the base's weights."""
    folder = tmp_path_factory.mktemp("runs")
    done(start("train.py", command(mini, folder / "one", "--accumulate", "4", sets=SETS), env=ENVIRONMENT))
    two = done(torchrun("train.py", command(mini, folder / "two", sets=SETS)))
    done(torchrun("train.py", command(mini, folder / "shard", "--shard", sets=SETS)))
    (folder / "out").write_text(two[0])
    return folder


def steps(folder):
    return [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", ["two", "shard"])
def test_two_processes_equal_one_with_twice_the_accumulation(runs, name):
    one, two = steps(runs / "one"), steps(runs / name)
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6, 7]
    for ours, theirs in zip(one, two):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5) and theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert theirs["tokens"] == ours["tokens"] and theirs["trained_tokens"] == ours["trained_tokens"]
    one, two = (read_tensors(runs / which / "adapter_model.safetensors") for which in ("one", name))
    assert one.keys() == two.keys() and max((one[key] - two[key]).abs().max() for key in one) < 1e-5
    assert max(tensor.abs().max() for key, tensor in two.items() if "q_proj.lora_B" in key) > 1e-2   # it did learn


@pytest.mark.parametrize("name", ["two", "shard"])
def test_answers_and_figures_are_those_of_one_process(runs, name):
    assert read_jsonl(runs / "one" / "completions.jsonl") == read_jsonl(runs / name / "completions.jsonl")
    one, two = (files.read_json(runs / which / "scores.json") for which in ("one", name))
    assert one["sets"] == two["sets"] and one["parameters"] == two["parameters"] and one["trainable"] == two["trainable"]


@pytest.mark.parametrize("name", ["two", "shard"])
def test_selection_is_that_of_one_process(runs, name):
    one, two = (files.read_json(runs / which / "features.json", list) for which in ("one", name))
    assert [(f["layer"], f["index"]) for f in one] == [(f["layer"], f["index"]) for f in two]
    for ours, theirs in zip(one, two):
        for key in ("delta", "rho", "effect", "mean", "frequency"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-9)
        values = [peak["activation"] for peak in ours["peaks"]]
        assert values == [peak["activation"] for peak in theirs["peaks"]]
        for ours, theirs in zip(ours["peaks"], theirs["peaks"]):        # of equal ones, any may have been taken
            assert theirs == ours or values.count(ours["activation"]) > 1 or ours["activation"] == values[-1]


def test_one_process_speaks(runs):
    out = (runs / "out").read_text()
    assert out.count("step 7/7") == 1 and out.count("run: ") == 1 and out.count("pairs: 60") == 1


def test_eval_and_select(runs, mini, tmp_path):
    selecting = torchrun("select.py", ["--model", mini, "--sae", mini / "sae", "--data", mini / "train.jsonl", "--rank", "8",
                                       "--batch-tokens", "96", "--out", tmp_path / "picked"])
    done(torchrun("eval.py", [runs / "two", "--harmful", mini / "harmful.jsonl", "--benign", mini / "benign.jsonl",
                              "--out", tmp_path / "more"]))
    done(selecting)
    rows = [row for row in read_jsonl(runs / "two" / "completions.jsonl") if row["set"] in ("harmful", "benign")]
    assert rows and read_jsonl(tmp_path / "more" / "completions.jsonl") == rows
    assert files.read_json(tmp_path / "picked" / "features.json", list) == files.read_json(runs / "two" / "features.json", list)


# ---------------------------------------------------------------------------------------------------------------
# How runs end

def after(process, line):
    """Wait until the command has printed a line that begins so."""
    for printed in process.stdout:
        if " ".join(printed.split()).startswith(line):
            return
    raise AssertionError(process.stderr.read())


def left(folder):
    return [path for path in folder.rglob("*") if ".part" in path.name]


@pytest.mark.parametrize("who", ["agent", "rank 1"])
def test_a_signal_stops_all_after_the_same_step(runs, mini, tmp_path, who):
    process = torchrun("train.py", command(mini, tmp_path / "run", "--save-every", "100", sets=SETS))
    after(process, "step 2/7")
    os.kill(process.pid if who == "agent" else workers(process)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("stopped by SIGTERM") == 1
    assert f"go on with `torchrun --nproc-per-node 2 train.py --resume {tmp_path / 'run'}`" in err and "train.py: error" not in err
    assert 2 <= int(files.read_metadata(tmp_path / "run" / session.CHECKPOINT)["step"]) < 7 and not left(tmp_path)
    if who == "agent":
        return
    process = start("train.py", ["--resume", str(tmp_path / "run")])
    assert "of 2 processes, not 1" in process.communicate()[1] and process.returncode == 2
    done(torchrun("train.py", ["--resume", tmp_path / "run"]))
    ours, theirs = ((folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "run", runs / "two"))
    assert ours == theirs and len(steps(tmp_path / "run")) == 7


def test_a_killed_process_ends_the_run(mini, tmp_path):
    """Rank 0, the one that writes, at an arbitrary moment."""
    process = torchrun("train.py", command(mini, tmp_path / "run", "--steps", "10000"))
    after(process, "step 4/")
    began = time.monotonic()
    os.kill(workers(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 60 and "Signal 9" in err
    assert err.count("another process has died") == 1 and "RuntimeError" not in err
    read_tensors(tmp_path / "run" / session.CHECKPOINT)   # whole; and json lines are whole but for the last
    assert int(files.read_metadata(tmp_path / "run" / session.CHECKPOINT)["step"]) >= 3


def test_compiled_processes_take_the_same_steps(runs, mini, tmp_path):
    done(torchrun("train.py", command(mini, tmp_path / "run", "--compile")), 110)
    for compiled, eager in zip(steps(tmp_path / "run"), steps(runs / "two"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_a_second_start_in_the_same_folder_is_told(mini, tmp_path):
    first = torchrun("train.py", command(mini, tmp_path / "run", "--steps", "10000"))
    after(first, "step 2/")
    try:
        second = torchrun("train.py", command(mini, tmp_path / "run", "--steps", "10000"))
        _, err = second.communicate(timeout=60)
        assert second.returncode != 0 and err.count("another process is at work") == 1
        assert first.poll() is None                                    # and the one at work isn't disturbed
    finally:
        first.terminate()
        first.communicate(timeout=60)


BROKEN = """
import os, sys
import files, parallel, train
if os.environ["RANK"] == "1":
    def refuse(*arguments):
        raise files.InputError("the disk of machine 1 is gone")
    train.load_tokenizer = refuse
parallel.run(train.main)
"""


def test_what_one_process_cannot_open_ends_all(mini, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    process = torchrun(tmp_path / "broken.py", command(mini, tmp_path / "run"))
    _, err = process.communicate(timeout=60)
    assert err.count("broken.py: error: the disk of machine 1 is gone") == 1
    assert err.count("exitcode  : 2") == 2 and "Error: " not in err.replace("ChildFailedError: ", "")
    assert not (tmp_path / "run").exists()


def test_wrong_flags_are_told_once(runs, mini, tmp_path):
    process = torchrun("train.py", command(mini, tmp_path / "run", "--rank", "65"))
    other = start("train.py", ["--resume", str(runs / "shard")])
    _, err = process.communicate(timeout=60)
    assert err.count("train.py: error: --rank 65") == 1 and not (tmp_path / "run").exists()
    assert "torchrun" in other.communicate()[1] and other.returncode == 2
