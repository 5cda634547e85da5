"""ruff and mypy find nothing, with the settings in pyproject.toml."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("tool", [("ruff", "check", "--output-format", "concise"), ("mypy",)], ids=lambda tool: tool[0])
def test_clean(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
