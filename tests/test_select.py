"""The door: in the repository's root, every Python of this machine still finds its own module `select`."""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pythons():
    """Every Python >= 3.10 here, each installation once, the running one first."""
    found, seen = [], set()
    folders = os.environ.get("PATH", "").split(os.pathsep) + ["/usr/bin", "/usr/local/bin", "/opt/*/bin"]
    folders += [os.path.expanduser("~/.pyenv/versions/*/bin"), os.path.expanduser("~/.local/share/uv/python/*/bin")]
    names = [sys.executable] + [name for folder in folders for name in sorted(glob.glob(f"{folder}/python3*"))
                                if name.rpartition("python3")[2].removeprefix(".").isdigit() or name.endswith("python3")]
    for name in names:
        resolved = os.path.realpath(name)
        if resolved in seen:
            continue
        seen.add(resolved)
        probe = "import sys; print(*sys.version_info[:2], sys.executable)"
        said = subprocess.run([name, "-c", probe], cwd="/", capture_output=True, text=True, timeout=30)
        words = said.stdout.split(maxsplit=2)
        if said.returncode == 0 and (int(words[0]), int(words[1])) >= (3, 10):
            executable = words[2].strip()  # a shim of pyenv's ends at an executable that may be known already
            if executable == name or os.path.realpath(executable) not in seen:
                seen.add(os.path.realpath(executable))
                found.append(executable)
    return found


PYTHONS = pythons()
each_python = pytest.mark.parametrize("python", PYTHONS)


def check(python, *arguments, cwd=ROOT, **environment):
    """Run a Python in the repository's root; what it printed. Its own user's settings are left out."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=clean | environment, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def can_import(python, module):
    return subprocess.run([python, "-c", f"import {module}"], cwd="/", capture_output=True).returncode == 0


def test_the_running_python_is_among_them():
    assert PYTHONS[0] == sys.executable


@each_python
@pytest.mark.parametrize("path", [None, "{root}", "{root}/.", "{link}", ":"])
def test_imports_find_pythons_own(python, path, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    environment = {} if path is None else {"PYTHONPATH": path.format(root=ROOT, link=tmp_path / "link")}
    code = ("import subprocess, selectors, asyncio, multiprocessing.connection, select; "
            "select.select([], [], [], 0); import select as again; assert again is select is selectors.select; "
            "print(getattr(select, '__file__', 'linked in'))")
    file = check(python, "-c", code, **environment).strip()
    assert Path(file) != ROOT / "select.py"
    assert file == check(python, "-c", "import select; print(getattr(select, '__file__', 'linked in'))", cwd="/").strip()


@each_python
def test_two_clones_on_the_path(python, tmp_path):
    shutil.copy(ROOT / "select.py", tmp_path)
    check(python, "-c", "import subprocess, select; select.select", PYTHONPATH=str(tmp_path))


@each_python
def test_venv_and_pip(python, tmp_path):
    whole = can_import(python, "venv, ensurepip")  # Debian keeps ensurepip in the package python3-venv
    if can_import(python, "venv"):
        check(python, "-m", "venv", *([] if whole else ["--without-pip"]), tmp_path / "venv")
        made = tmp_path / "venv" / "bin" / "python"
        check(made, "-c", "import subprocess")
        if whole:
            assert check(made, "-m", "pip", "--version").startswith("pip ")
    if can_import(python, "pip"):
        assert check(python, "-m", "pip", "--version").startswith("pip ")


@each_python
def test_script_hands_over_to_features(python, tmp_path):
    """A copy of the door with stand-ins for features and parallel; its workers import the main module anew."""
    shutil.copy(ROOT / "select.py", tmp_path)
    (tmp_path / "parallel.py").write_text("def run(main):\n    print('run', main())\n")
    (tmp_path / "features.py").write_text(
        "import multiprocessing, os, select, subprocess, sys\n"
        "def main():\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.map(abs, [-3]) == [3]\n"
        "    select.select([], [], [], 0)\n"
        "    return sys.argv[1], os.path.realpath(sys.path[0])\n")
    said = check(python, tmp_path / "select.py", "--flag", cwd=tmp_path)
    assert said == f"run ('--flag', {os.path.realpath(tmp_path)!r})\n"  # once: not again in the worker


LOADER = """
import sys
from torch.utils.data import DataLoader

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        loader = DataLoader(range(8), batch_size=2, num_workers=2, multiprocessing_context=method)
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]
"""


@pytest.mark.parametrize("python", [python for python in PYTHONS if can_import(python, "torch")])
def test_dataloader_workers(python, tmp_path):
    (tmp_path / "load.py").write_text(LOADER)
    check(python, tmp_path / "load.py", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
