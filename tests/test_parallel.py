"""Two processes under torchrun against one: the same losses, adapters, statistics and answers."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, SETS, command, start
from test_full import full

from run import session
from run.files import read_json, read_jsonl, read_metadata, read_tensors

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(script, arguments):
    """Start a command under torchrun, in a session of its own, which lasts two minutes at most."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    process = subprocess.Popen([*launcher, str(ROOT / script), *map(str, arguments)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
                               start_new_session=True)

    def kill():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    timer = threading.Timer(120, kill)
    timer.daemon = True
    timer.start()
    return process


def done(process):
    """What a command printed, which must end well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def wait_for(process, line):
    """Wait until the command has printed a line that begins so."""
    for printed in process.stdout:
        if " ".join(printed.split()).startswith(line):
            return
    raise AssertionError(process.stderr.read())


def worker(process, rank):
    """Process id of one of torchrun's children."""
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    for child in children:
        with contextlib.suppress(OSError):
            if f"\0RANK={rank}\0" in open(f"/proc/{child}/environ").read():
                return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def runs(mini, tmp_path_factory):
    """The same run: one process with 4 rows a step; two with 2 each; two that share the weights."""
    folder = tmp_path_factory.mktemp("runs")
    one = [*command(mini, folder / "one", sets=SETS), "--more", "accumulate=4"]
    done(start("train.py", one, env=ENVIRONMENT))
    out = done(torchrun("train.py", command(mini, folder / "two", sets=SETS)))
    (folder / "out").write_text(out)
    done(torchrun("train.py", [*command(mini, folder / "shard", sets=SETS), "--shard"]))
    return folder


def test_full_fine_tuning_split_over_two_equals_one(mini, tmp_path):
    """Weights, copies and moments are split; the checkpoint is whole, and a run goes on from it.

    Answers before and after gather weights too, and leave them as training must find them.
    """
    rate = "--lr", "1e-3"                       # at mini's 1e-2 bfloat16's rounding grows
    arguments = full(mini, tmp_path / "one", *rate, "--more", "accumulate=4")
    done(start("train.py", arguments, env=ENVIRONMENT))
    arguments = full(mini, tmp_path / "split", *rate, "--shard", sets=("harmful",))
    process = torchrun("train.py", arguments)
    wait_for(process, "step 4/7")
    os.kill(worker(process, 0), signal.SIGINT)
    process.communicate(timeout=120)
    assert 4 <= int(read_metadata(tmp_path / "split" / session.CHECKPOINT)["step"]) < 7
    assert "trained" in done(torchrun("train.py", ["--resume", tmp_path / "split"]))
    for ours, theirs in zip(steps(tmp_path / "one"), steps(tmp_path / "split"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-3)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2)
    one, two = (read_tensors(tmp_path / run / "model/model.safetensors")
                for run in ("one", "split"))
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).norm() <= 0.01 * one[name].norm() for name in one)


def steps(folder):
    return [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", ["two", "shard"])
def test_two_processes_equal_one_with_twice_the_accumulation(runs, name):
    assert [line["step"] for line in steps(runs / name)] == [1, 2, 3, 4, 5, 6, 7]
    for ours, theirs in zip(steps(runs / "one"), steps(runs / name), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert theirs["trained_tokens"] == ours["trained_tokens"]
    one, two = (read_tensors(runs / run / "adapter_model.safetensors") for run in ("one", name))
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max() for key in one) < 2e-5
    assert max(two[key].abs().max() for key in two if "q_proj.lora_B" in key) > 1e-2   # it learned


@pytest.mark.parametrize("name", ["two", "shard"])
def test_answers_and_features_are_those_of_one_process(runs, name):
    one, two = runs / "one", runs / name
    assert read_jsonl(one / "completions.jsonl") == read_jsonl(two / "completions.jsonl")
    assert read_json(one / "scores.json")["sets"] == read_json(two / "scores.json")["sets"]
    ours, theirs = (read_json(run / "features.json", list) for run in (one, two))
    for feature, other in zip(ours, theirs, strict=True):
        assert (feature["layer"], feature["index"]) == (other["layer"], other["index"])
        for key in ("delta", "effect", "mean", "frequency"):
            assert other[key] == pytest.approx(feature[key], rel=1e-9)
        activations = [peak["activation"] for peak in feature["peaks"]]
        assert activations == [peak["activation"] for peak in other["peaks"]]


def test_one_process_speaks(runs):
    out = (runs / "out").read_text()
    assert out.count("step 7/7") == 1 and out.count("run: ") == 1 and out.count("pairs: 60") == 1


def test_eval_and_select(runs, mini, tmp_path):
    selection = ["--model", mini, "--sae", mini / "sae", "--data", mini / "train.jsonl",
                 "--rank", "8", "--batch-tokens", "96", "--out", tmp_path / "picked"]
    done(torchrun("select.py", selection))
    done(torchrun("eval.py", [runs / "two", "--set", f"harmful:harmful={mini / 'harmful.jsonl'}",
                              "--out", tmp_path / "more"]))
    rows = read_jsonl(runs / "two" / "completions.jsonl")
    rows = [row for row in rows if row["set"] == "harmful"]
    assert rows and read_jsonl(tmp_path / "more" / "completions.jsonl") == rows
    features = read_json(tmp_path / "picked" / "features.json", list)
    assert features == read_json(runs / "two" / "features.json", list)


# ------------------------------------------------------------------------------
# How runs end

def test_a_signal_to_one_stops_all_after_the_same_step(runs, mini, tmp_path):
    folder = tmp_path / "run"
    process = torchrun("train.py", command(mini, folder, sets=SETS))
    wait_for(process, "step 2/7")
    os.kill(worker(process, 1), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("stopped by SIGTERM") == 1
    assert "go on with `torchrun --nproc-per-node 2 " in err and f"--resume {folder}`" in err
    assert 2 <= int(read_metadata(folder / session.CHECKPOINT)["step"]) < 7
    alone = start("train.py", ["--resume", str(folder)])
    assert "processes 2, not 1" in alone.communicate()[1] and alone.returncode == 2
    done(torchrun("train.py", ["--resume", folder]))
    ours = read_tensors(folder / "adapter_model.safetensors")
    theirs = read_tensors(runs / "two" / "adapter_model.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert len(steps(folder)) == 7


def test_a_killed_process_ends_the_run(mini, tmp_path):
    """Rank 0, the one that writes, at an arbitrary moment."""
    process = torchrun("train.py", [*command(mini, tmp_path / "run"), "--steps", "10000"])
    wait_for(process, "step 4/")
    os.kill(worker(process, 0), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9" in err
    assert err.count("another process has died") == 1 and "RuntimeError" not in err
    assert int(read_metadata(tmp_path / "run" / session.CHECKPOINT)["step"]) >= 3


HANGING = """
import hashlib
import os
from run import parallel, session

def main():
    session.Signals().wait = True
    print("begun", flush=True)
    if os.environ["RANK"] == "1":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 31 - 1)    # hears no signal
    parallel.maximum(0)

parallel.GRACE = 1
parallel.run(main)
"""


def test_a_process_that_hangs_ends_with_a_word(tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)
    process = torchrun(tmp_path / "hanging.py", [])
    wait_for(process, "begun")
    start = time.monotonic()
    os.kill(worker(process, 0), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert err.count("process 1 of 2 didn't end within 1 s of SIGTERM") == 1
    assert time.monotonic() - start < 25


BROKEN = """
import os
import train
from run import parallel
from run.files import InputError

def refuse(*arguments):
    raise InputError("the disk of machine 1 is gone")

if os.environ["RANK"] == "1":
    train.load_tokenizer = refuse
parallel.run(train.main)
"""


def test_what_one_process_cannot_open_ends_all(mini, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    process = torchrun(tmp_path / "broken.py", command(mini, tmp_path / "run"))
    _, err = process.communicate(timeout=60)
    assert err.count("broken.py: error: the disk of machine 1 is gone") == 1
    assert err.count("exitcode  : 2") == 2 and not (tmp_path / "run").exists()
