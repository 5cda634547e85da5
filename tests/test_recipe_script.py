"""experiments/recipe.sh: on the toy in short form, gone on with, and its commands on Gemma, each held against its verb's flags."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import eval as evaluation
import features
import lora
from run import settings as recipe
from report import runs as report
from safety import sets
import train
from run.files import InputError
from model import load_model

SHORT = {"SEEDS": "0", "ARMS": "lora gradient", "PROMPTS": "4", "ATTACKED": "1", "CHOOSE": "--pairs 24",
         "TRAIN": "--steps 2 --looks 0 --explain 0 --max-new-tokens 8"}


def script(folder, *arguments, record=False, **env):
    """Run the script with what it writes in `folder`. With `record` hf, curl and python are stand-ins: {tool: [its arguments]}."""
    tools, log = folder / "venv/bin", folder / "commands"
    tools.mkdir(parents=True, exist_ok=True)
    python = f'exec "{sys.executable}" "$@"\n'
    noted = f'exec "{sys.executable}" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$(basename "$0")" "$@" >> "{log}"\n'
    for name in ("python", "hf", "curl"):
        text = noted if record else python
        (tools / name).write_text("#!/bin/sh\n" + (f'[ "$1" = -c ] && {python}' if name == "python" else "") + text)
        (tools / name).chmod(0o755)
    env = os.environ | {"VENV": str(folder / "venv"), "OUT": str(folder / "out"), "FILES": str(folder / "files")} | env
    done = subprocess.run(["bash", ROOT / "experiments/recipe.sh", *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {"python": [], "hf": [], "curl": []}
    for tool, *rest in map(json.loads, log.read_text().splitlines()) if record else ():
        found[tool].append(rest)
    return found


def test_the_toy_goes_all_the_way_and_isnt_done_twice(tmp_path):
    script(tmp_path, "toy", **SHORT)
    out = tmp_path / "out"
    for arm in ("lora", "gradient"):
        scores = json.loads((out / f"asked/{arm}-0/scores.json").read_text())
        assert set(scores["sets"]["adapter"]) == {"toy-harmful", "toy-jailbreak", "toy-lookalike", "toy-benign"}
        assert set(scores["ability"]) == {"perplexity of benign text", "multiple choice", "multiple choice, per character"}
        assert json.loads((out / f"attacked/{arm}-0/scores.json").read_text())["attacks"]["adapter"]["toy-harmful"]["n"] == 1
    assert {side for _, side in features.load_subspaces(out / "select-gradient/subspace.safetensors")} == {"readers", "writers"}
    assert (out / "select-paper/features.json").exists() and load_model(out / "merged").config.hidden_size == 64
    assert "init random" in (out / "runs.txt").read_text() and "gradient-0" in (out / "asked-0.txt").read_text()
    assert all((out / page).stat().st_size > 5000 for page in ("runs.html", "asked-0.html", "attacked.html"))
    # Where all is there, only the look ahead and the reports are made again
    again = [rest[0] for rest in script(tmp_path, "toy", record=True, **SHORT)["python"]]
    assert again == ["train.py", "report.py", "report.py", "report.py"]


@pytest.mark.parametrize("model", ["google/gemma-2-2b", "google/gemma-2-9b-it"])
def test_gemmas_commands_are_ones_that_the_verbs_take(model, tmp_path, monkeypatch):
    judged = "--judge rubric --judge-model google/gemma-2-9b-it"
    tools = script(tmp_path, model, record=True, JUDGE=judged, TRAIN="--epochs 2 --lr 1e-4 --recompute", CHOOSE="--pairs 500 --top-k 32")
    of = recipe.RECIPES[model]
    assert tools["hf"][0][:2] == ["download", model] and tools["hf"][1][1] == of["sae"] and len(tools["hf"][1]) == 2 + len(of["layers"])
    assert all(f"layer_{layer}/width_16k/" in file for layer, file in zip(of["layers"], tools["hf"][1][2:]))
    assert len(tools["curl"]) == 6 and all(rest[-1].startswith("https://raw.githubusercontent.com/") for rest in tools["curl"])
    commands = {}
    for verb, *rest in tools["python"]:
        commands.setdefault(verb, []).append(rest)
    assert {verb: len(rest) for verb, rest in commands.items()} == {
        "train.py": 10, "select.py": 2, "eval.py": 12, "report.py": 5, "lora.py": 1}

    class Taken(Exception):
        pass

    def taken(*_, **__):
        raise Taken

    def run(main, rest):
        monkeypatch.setattr(sys, "argv", ["x.py", *rest])
        main()

    for rest in commands["train.py"]:
        run(train.main, [*rest, "--dry-run"])
    monkeypatch.setattr(features, "load_model", taken)
    for rest in commands["select.py"]:
        with pytest.raises(Taken):
            run(features.main, rest)
    saved = SimpleNamespace(**dict.fromkeys(recipe.NAMES) | {"model": model})
    monkeypatch.setattr(evaluation.recipe, "saved", lambda run: saved)
    monkeypatch.setattr(evaluation, "read_scores", lambda run: None)
    asked = []
    monkeypatch.setattr(evaluation, "ask", lambda out, folder, settings, places, *rest: asked.append(set(places)))
    monkeypatch.setattr(evaluation, "conclude", lambda out, judging: None)
    for rest in commands["eval.py"]:
        run(evaluation.main, rest)
    known = {name for name in sets.NAMED if not name.startswith(("toy-", "hex-phi", "malicious-instruct"))}
    assert asked == [known] * 9 + [{"advbench"}] * 3 and len(known) == 8
    for main, verb in ((report.main, "report.py"), (lora.main, "lora.py")):
        for rest in commands[verb]:
            with pytest.raises(InputError) as error:                                         # there is no such run
                run(main, rest)
            assert "--help" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_unknown_model_or_arm_is_refused_before_anything_is_done(tmp_path):
    for arguments, env, word in ((["google/gemma-7b"], {}, "no recipe"), (["toy"], {"ARMS": "pissa"}, "none of")):
        with pytest.raises(AssertionError, match=word):
            script(tmp_path, *arguments, record=True, **env)
