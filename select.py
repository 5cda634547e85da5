"""Choose the features of a safety subspace: `python select.py --help`. This file is only a door; see features.py.

    python select.py                                        # the toy, a few seconds
    python select.py --model google/gemma-2-2b --top-k 20   # four SAE layers of Gemma Scope

Python has a standard module `select` too. Where it is a shared library (pyenv, conda, python.org), a Python that
runs in this folder finds this file in its stead, and `import subprocess` fails, `python -m venv` with it. Where it
is linked in (Debian, Ubuntu, uv), this file can't be imported at all. Hence nothing is defined here:
run as a script, it hands over to features.py; imported as `select`, it puts Python's own module in its place.
"""

import sys
from os.path import exists, join  # loaded by every start of Python; anything more could import `select` before it is there

if __name__ == "__main__":
    from features import main
    from run.parallel import run
    run(main)
elif __name__ == "select":
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    spec = PathFinder.find_spec("select", [folder for folder in sys.path if not exists(join(folder, "select.py"))])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["select"] = module  # the import system returns what it finds here, not the module that ran
# A third name, __mp_main__: a worker started by `python select.py` imports the main module anew, and wants nothing.
