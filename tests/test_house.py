"""The house as README draws it: imports point one way, files are short, nothing is unpickled."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
FILES = [name for name in TRACKED.stdout.split() if (ROOT / name).exists()]
PRODUCT = [name for name in FILES if not name.startswith("tests/")]


def order():
    """{room: level} of README's line "run/files ← …", the floor first."""
    text = (ROOT / "README.md").read_text()
    lines = re.search(r"```\n(run/files ←.*?)```", text, re.S)[1]
    levels = [re.findall(r"[\w/]+", level) for level in lines.split("←")]
    return {room: number for number, rooms in enumerate(levels) for room in rooms}


ORDER = order()


def room_of(name):
    """The room that a file belongs to: itself, or its folder."""
    path = name.removesuffix(".py")
    return path if path in ORDER else path.split("/")[0]


def imported(name):
    """Our own files that a file imports, wherever in it the import stands."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {module.replace(".", "/") + ".py" for module in modules}
    return sorted(paths & set(PRODUCT))


@pytest.mark.parametrize("name", PRODUCT)
def test_imports_point_down(name):
    for other in imported(name):
        above, below = ORDER[room_of(name)], ORDER[room_of(other)]
        assert below <= above, f"{name} imports {other}, which stands above it"


def test_no_circles():
    graph = {name: set(imported(name)) - {name} for name in PRODUCT}
    while graph:
        leaves = [name for name, others in graph.items() if not others & graph.keys()]
        assert leaves, f"a circle among {', '.join(sorted(graph))}"
        for name in leaves:
            del graph[name]


def test_nine_files_on_top():
    top = sorted(name for name in PRODUCT if "/" not in name)
    method = {"model.py", "fused.py", "sae.py", "data.py", "features.py", "select.py", "lora.py",
              "train.py", "eval.py"}
    assert method <= set(top) and set(top) - method <= {"attention.py"}   # what fused.py can't hold


@pytest.mark.parametrize("name", PRODUCT)
def test_at_most_400_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= 400


FLAGS = {"allow_pickle", "trust_remote_code", "shell"}
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}


@pytest.mark.parametrize("name", PRODUCT)
def test_nothing_is_unpickled_or_executed(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.keyword) and node.arg in FLAGS:
            assert ast.unparse(node.value) == "False", f"{name}:{node.value.lineno}"
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            assert function.id not in FORBIDDEN, f"{name}:{node.lineno}"
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            place = function.value.id, function.attr
            assert place not in FORBIDDEN_ATTRIBUTES, f"{name}:{node.lineno}"
