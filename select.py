"""Choose the features of a safety subspace. This file is only a door; see features.py.

    python select.py                                        # the toy, a few seconds
    python select.py --model google/gemma-2-2b --top-k 20   # four SAE layers of Gemma Scope

Python has a standard module `select` too. Where that is a shared library (pyenv, conda,
python.org), a Python that runs in this folder finds this file instead: `import subprocess` and
`python -m venv` would fail. Where it is linked in (Debian, Ubuntu, uv), this file can't be
imported. So nothing is defined here. Run as a script, it hands over to features.py. Imported as
`select`, it puts Python's own module in its place.
"""

import sys
from os.path import exists, join  # every start of Python has loaded it; more could import `select`

if __name__ == "__main__":
    from features import main
    from run.parallel import run
    run(main)
elif __name__ == "select":
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    folders = [folder for folder in sys.path if not exists(join(folder, "select.py"))]
    spec = PathFinder.find_spec("select", folders)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["select"] = module  # the import system returns what it finds here
# A third name, __mp_main__: a worker of `python select.py` imports the main module anew
