"""The door: in the repository's root, every Python here finds its own module `select`."""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("/usr/bin", "/usr/local/bin", "/opt/*/bin",
           *map(os.path.expanduser, ("~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin")))
# Each installation once, the running one by its own name
FOUND = [name for folder in FOLDERS for name in glob.glob(f"{folder}/python3.1[0-9]")]
PYTHONS = list({os.path.realpath(name): name for name in (*FOUND, sys.executable)}.values())


def check(python, *arguments, cwd=ROOT, **environment):
    """Run a Python in the repository's root, without its user's settings. What it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=clean | environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("path", [None, str(ROOT)])
def test_imports_find_pythons_own(python, path, tmp_path):
    environment = {"PYTHONPATH": path} if path else {}
    code = ("import subprocess, selectors, asyncio, select; select.select([], [], [], 0);"
            "print(getattr(select, '__file__', 'linked in'))")
    file = check(python, "-c", code, **environment)
    assert file == check(python, "-c", code, cwd="/") != f"{ROOT}/select.py\n"
    check(python, "-m", "venv", "--without-pip", tmp_path / "venv", **environment)


def test_dataloader_workers(tmp_path):
    """Spawned workers import the main module anew, under another name."""
    shutil.copy(ROOT / "select.py", tmp_path)
    (tmp_path / "features.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "def main():\n"
        "    for method in ('fork', 'spawn'):\n"
        "        loader = DataLoader(range(4), num_workers=1, multiprocessing_context=method)\n"
        "        print([int(batch) for batch in loader])\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/parallel.py").write_text("def run(main):\n    main()\n")
    printed = check(sys.executable, tmp_path / "select.py", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert printed == "[0, 1, 2, 3]\n" * 2                 # once each: not again in the workers
