"""A short run of train.py, or of any other command, in a fork that can be watched, killed and refused; for faults.py.

    place = Place(folder)                                       # a small random model, and an unbroken run
    code, err = run(place.arguments("a"), place.out("a"), after=0.5)       # kill -9 after half a second of its own time
    place.goes_on("a", "killed")                                # the same command ends well, to the same numbers

Forks of a process that has imported everything: what is killed is a command's main(), and a run takes a second.
"""

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from conftest import command, write_mini

import files
import train

SETS = ("harmful", "lookalike")
STEPS = ("--steps", "6", "--looks", "2", "--explain", "2")
failures = []


def check(holds, what):
    if not holds:
        failures.append(what)
        print(f"FAILED: {what}", flush=True)
    return bool(holds)


def one_line(code, err, what, words=""):
    """Whether a command has ended as it must where something can't be had."""
    said = code == 2 and "Traceback" not in err and ".py: error: " in err.strip().splitlines()[-1] and words in err
    return check(said, f"{what}: exit code {code}: {err[-400:]}")


# ---------------------------------------------------------------------------------------------------------------
# Forks

def begin(arguments, out, before=None, main=train.main):
    """The process id of a fork in which a command's `main` runs with `arguments`, after `before`. What it says is in {out}.err."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(f"{out}.out", "w") as told, open(f"{out}.err", "w") as complained:
            os.dup2(told.fileno(), 1)
            os.dup2(complained.fileno(), 2)
        sys.argv = [f"{main.__module__}.py", *map(str, arguments)]
        if before:
            before()
        files.run(main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child):
    """Exit code of a fork, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def used(process):
    """Seconds of processor time that a process has had; infinitely many once it has ended."""
    with suppress(OSError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        if state[0] != "Z":
            return (int(state[11]) + int(state[12])) / os.sysconf("SC_CLK_TCK")
    return float("inf")


def run(arguments, out, before=None, after=None, number=signal.SIGKILL, main=train.main):
    """(exit code, stderr) of a fork. After `after` seconds of its own time, however busy the machine is, it gets the signal `number`."""
    child = begin(arguments, out, before, main)
    while after is not None:
        if used(child) >= after:
            os.kill(child, number)
            break
        time.sleep(0.003)
    return ended(child), Path(f"{out}.err").read_text()


class Writes:
    """Counts what a fork does to a folder: files opened to be written, renames, removals, folders made. Before each it calls
    before(count, (file that is being written, its size before) or None); from the `last` on each is refused with `error`.

    To be called in the fork. By Python's audit hook, so that no code of the product knows of it."""

    def __init__(self, folder, last=None, error=None, before=None):
        self.folder, self.last, self.error, self.before, self.count, self.open = str(folder), last, error, before, 0, None

    def __call__(self):
        sys.addaudithook(self.see)

    def see(self, event, told):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") or not str(told[0]).startswith(self.folder):
            return
        if event == "open" and not told[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path, self.count = str(told[0]), self.count + 1
        if self.before:
            self.before(self.count, self.open)
        if self.last is not None and self.count >= self.last:
            raise OSError(self.error, os.strerror(self.error), path)
        if event == "open" and told[2] & (os.O_TRUNC | os.O_APPEND):
            self.open = path, os.path.getsize(path) if os.path.exists(path) and told[2] & os.O_APPEND else 0
        elif event == "os.rename":
            self.open = None


# ---------------------------------------------------------------------------------------------------------------
# What they leave

def contents(folder):
    """{name: what is in it} of a folder that a command left, checkpoints, times and peak memory put aside."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.parent.name == "checkpoint" or name == "report.html" and (folder / "metrics.jsonl").exists():   # that page tells seconds
            continue
        found[name] = path.read_bytes().replace(str(folder).encode(), b"RUN")            # pages tell the command
        if name == "metrics.jsonl":
            lines = [line for line in files.read_jsonl(path) if "stage" not in line]
            found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
        elif name in ("scores.json", "config.json", "eval.json"):
            found[name] = {key: value for key, value in files.read_json(path).items() if key not in ("seconds", "peak_bytes", "command")}
    return found


def left(folder):
    """Temporary files in a folder."""
    return [path for path in folder.rglob("*") if path.name.endswith(".part") or path.name == "next.safetensors"]


class Place:
    """A folder with the small model, and an unbroken run that others are held against."""

    def __init__(self, folder):
        (folder / "mini").mkdir()
        self.folder, self.mini = folder, write_mini(folder / "mini")
        count, seen = Writes(self.out("whole")), folder / "seen"

        def counted():
            leave = os._exit

            def tell(code):
                seen.write_text(json.dumps([count.count, sorted(sys.modules)]))
                leave(code)
            os._exit = tell
            count()

        for _ in range(2):                                      # the second one takes as long as all others
            shutil.rmtree(self.out("whole"), ignore_errors=True)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            code, err = run(self.arguments("whole"), self.out("whole"), counted)
            if code:
                sys.exit(err)
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.writes, modules = json.loads(seen.read_text())
            for name in modules:                                # what a run imports on its way, this process has from now on
                with suppress(Exception):
                    importlib.import_module(name)
        self.seconds = spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime
        self.whole = contents(self.out("whole"))
        print(f"an unbroken run: {self.seconds:.1f} s of processor time, {self.writes} writes, renames and removals", flush=True)

    def out(self, name):                                        # the folder's own name stands in explain.json
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name / "run"

    def arguments(self, name):
        return command(self.mini, self.out(name), *STEPS, sets=SETS)

    def goes_on(self, name, what):
        """Whether the same command now ends well, to the same numbers, and leaves no temporary file."""
        return self.same(what, self.out(name), self.whole, *run(self.arguments(name), self.out(name)))

    def same(self, what, out, whole, code, err):
        """Whether what ended so holds all that an unbroken one does; if it did so before, it was told that it has finished."""
        told = code == 0 or code == 2 and ("finished" in err or "is there" in err)
        if not check(told, f"{what}: the same command ends with {code}: {err[-300:]}"):
            return False
        found = contents(out)
        odd = [key for key in found.keys() | whole.keys() if found.get(key) != whole.get(key)]
        good = check(not odd, f"{what}: other {', '.join(odd)}") and check(not left(out), f"{what}: leaves {left(out)}")
        if good:
            shutil.rmtree(out.parent)
        return good
