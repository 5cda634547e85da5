"""The door: in the repository's root, every Python here finds its own module `select`."""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (*os.environ["PATH"].split(":"), "/usr/bin", "/usr/local/bin", "/opt/*/bin",
           *map(os.path.expanduser, ("~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin")))


def pythons():
    """Every Python >= 3.10 here, each installation once, the running one first."""
    names = [sys.executable]
    for folder in FOLDERS:
        names += glob.glob(f"{folder}/python3") + glob.glob(f"{folder}/python3.[0-9]*[0-9]")
    probe = "import sys; print(sys.executable) if sys.version_info >= (3, 10) else sys.exit(1)"
    executables = {}
    for name in names:
        try:
            done = subprocess.run([name, "-c", probe], cwd="/", capture_output=True, text=True,
                                  timeout=30)
        except OSError:                                    # not a program
            continue
        if done.returncode == 0:                           # a shim of pyenv's names the real one
            executable = done.stdout.strip()
            executables.setdefault(os.path.realpath(executable), executable)
    return list(executables.values())


PYTHONS = pythons()
each_python = pytest.mark.parametrize("python", PYTHONS)


def check(python, *arguments, cwd=ROOT, **environment):
    """Run a Python in the repository's root, without its user's settings. What it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=clean | environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def can_import(python, module):
    command = [python, "-c", f"import {module}"]
    return subprocess.run(command, cwd="/", capture_output=True).returncode == 0


@each_python
@pytest.mark.parametrize("path", [None, str(ROOT)])
def test_imports_find_pythons_own(python, path):
    environment = {"PYTHONPATH": path} if path else {}
    code = ("import subprocess, selectors, asyncio, select; select.select([], [], [], 0);"
            "print(getattr(select, '__file__', 'linked in'))")
    file = check(python, "-c", code, **environment)
    assert file == check(python, "-c", code, cwd="/") != f"{ROOT}/select.py\n"


@each_python
def test_venv_and_pip(python, tmp_path):
    if can_import(python, "venv, ensurepip"):              # Debian has ensurepip in python3-venv
        check(python, "-m", "venv", "--without-pip", tmp_path / "venv")
        check(tmp_path / "venv/bin/python", "-c", "import subprocess")
    if can_import(python, "pip"):
        assert check(python, "-m", "pip", "--version").startswith("pip ")


def test_commands_of_the_root():
    assert "--top-k" in check(sys.executable, "select.py", "--help")
    assert "--layers" in check(sys.executable, "-m", "saes.train", "--help")


def test_dataloader_workers(tmp_path):
    """Spawned workers import the main module anew, under another name."""
    shutil.copy(ROOT / "select.py", tmp_path)
    (tmp_path / "features.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "def main():\n"
        "    for method in ('fork', 'spawn'):\n"
        "        loader = DataLoader(range(4), num_workers=2, multiprocessing_context=method)\n"
        "        print([int(batch) for batch in loader])\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/parallel.py").write_text("def run(main):\n    main()\n")
    printed = check(sys.executable, tmp_path / "select.py", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert printed == "[0, 1, 2, 3]\n" * 2                 # once each: not again in the workers
