"""ruff and mypy find nothing; how densely the code is written is printed, and fails nothing.

    python -m pytest tests/test_style.py -s        # code tokens, lines, tokens a line, long lines
"""

import io
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT
from test_house import FILES

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}
LINE_START = (None, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@pytest.mark.parametrize("tool", [("ruff", "check", "--output-format", "concise"), ("mypy",)],
                         ids=["ruff", "mypy"])
def test_clean(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def density(text):
    """(code tokens, code lines) of a file, without comments and docstrings."""
    num_tokens, lines, previous = 0, set(), None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and previous in LINE_START
        if token.type not in NO_CODE and not is_docstring:
            num_tokens += 1
            lines.add(token.start[0])
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type
    return num_tokens, len(lines)


def test_density_is_printed():
    product = [name for name in FILES if not name.startswith(("tests/", "bench/", "experiments/"))]
    total_tokens, total_lines = 0, 0
    for name in product:
        num_tokens, num_lines = density((ROOT / name).read_text())
        total_tokens, total_lines = total_tokens + num_tokens, total_lines + num_lines
        print(f"{name:24} {num_tokens:6,} tokens {num_tokens / max(1, num_lines):5.1f} a line")
    print(f"{len(product)} files, {total_tokens:,} tokens, {total_tokens / total_lines:.1f} a line")
