"""README's Python runs as it stands there, and its figures are the ones that come out."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
FORKS = {"t_score": ["--select", "t-score"], "pca": ["--init", "pca"], "first_token_loss": [],
         "refusal_strings": []}


def run(code, arguments, tmp_path):
    """Run a snippet as a file that stands beside train.py; what it printed."""
    path = tmp_path / "fork.py"
    path.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path, *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_snippet(tmp_path):
    code = SNIPPETS[0] + "print(features.shape, len(layers), int((features > 0).sum()) > 0)\n"
    assert run(code, [], tmp_path) == "torch.Size([1, 4, 512]) 24 True\n"


@pytest.mark.parametrize("name", FORKS)
def test_forks(name, tmp_path):
    (code,) = [snippet for snippet in SNIPPETS if f"def {name}(" in snippet]
    imports = ("import", "from")
    own_lines = [line for line in code.splitlines() if line and not line.startswith(imports)]
    assert len(own_lines) <= 11                        # ten, and the line that starts the command
    short = ["--steps", "2", "--eval-prompts", "2", "--out", tmp_path / "run"]
    out = run(code, [*FORKS[name], *short], tmp_path)
    assert "step 2/2" in out and f"run: {tmp_path / 'run'}" in out
    if name == "refusal_strings":
        adapter = (tmp_path / "run" / "adapter_config.json").read_text()
        assert "gate_proj" in adapter
        assert "substring match" in (tmp_path / "run" / "judged.jsonl").read_text()


def test_unknown_names_are_refused_at_once(tmp_path):
    for flag in ("--select", "--init"):
        done = subprocess.run([sys.executable, "train.py", flag, "nosuch"], cwd=ROOT, text=True,
                              capture_output=True)
        assert done.returncode == 2 and "nosuch" in done.stderr and "known are" in done.stderr


def test_links_and_length():
    assert len(README.splitlines()) <= 200
    for link in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / link).exists(), link
    for command in re.findall(r"python (?:-m )?([\w/.]+)", README):
        path = command if command.endswith(".py") else command.replace(".", "/")
        known = [ROOT / path, ROOT / f"{path}.py", ROOT / path / "__main__.py"]
        ours = command not in ("fork.py", "pytest")
        assert not ours or any(place.exists() for place in known), command


@pytest.mark.skipif(shutil.which("git") is None, reason="git tells which files there are")
def test_every_room_stands_in_the_tree():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    rooms = {name.split("/")[0] + "/" * ("/" in name) for name in tracked.split()}
    rooms = {room for room in rooms if room.endswith((".py", "/")) and not room.startswith(".")}
    tree = re.search(r"```\n(model\.py.*?)```", README, re.S)[1]
    missing = [room for room in rooms - {"tests/"} if room not in tree]
    assert not missing
