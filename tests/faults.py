"""What can happen to a machine happens to a short run, which then goes on by the same command to the same numbers.

    python tests/faults.py --kills 100 --signals 20 --crashes 1 --limits --damage --together --ranks 12   # 20 minutes on a quiet core
    python tests/faults.py --long 20000                                 # memory and step time over a long run
    python tests/faults.py --kills 2 --signals 2 --crashes 31           # what pytest runs: every 31st write

Prints what was tried, and exits with 1 where anything didn't hold. How a run is watched and killed: forks.py.
"""

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from forks import SETS, STEPS, Place, Writes, begin, check, contents, ended, failures, left, one_line, run, used    # first: it sets threads
from conftest import command
import torch

import eval as evaluate
import features
import files
import merge
import report
import sae_train
import session
import train


def kills(place, count):
    """kill -9 at random moments; after every other kill another one, before the run may end."""
    draw, survived, done = random.Random(0), 0, 0
    while done < count:
        name, killed = f"kill{done}", 0
        while done < count:
            code, _ = run(place.arguments(name), place.out(name), after=draw.uniform(0, place.seconds))
            done, killed = done + 1, killed + 1
            if code != -signal.SIGKILL or draw.random() < 0.5:
                break
        if code == 0:                                           # it was faster, and is finished: that is no kill
            done, killed = done - 1, killed - 1
            shutil.rmtree(place.folder / name)
            survived += killed
            continue
        survived += killed * place.goes_on(name, f"{killed} kills, the last number {done}")
    print(f"kill -9: {survived} survived of {done}", flush=True)


def signals(place, count):
    """Ctrl-C and SIGTERM at random moments: the run ends with 130 or 143, having saved the last step, and says what goes on."""
    draw, good, done = random.Random(1), 0, 0
    while done < count:
        name, number = f"signal{done}", (signal.SIGINT, signal.SIGTERM)[done % 2]
        out = place.out(name)
        code, err = run(place.arguments(name), out, after=draw.uniform(0.06, place.seconds), number=number)
        if code == 0:                                           # it was faster
            shutil.rmtree(place.folder / name)
            continue
        done += 1
        said = f"go on with `python train.py --resume {out}`" in err or not out.exists()
        steps = [line["step"] for line in (files.read_jsonl(out / "metrics.jsonl") if out.exists() else []) if "loss" in line]
        saved = not steps or files.read_metadata(out / session.CHECKPOINT)["step"] == str(steps[-1])
        good += (check(code == 128 + number and said, f"{name}: {code}: {err[-300:]}")
                 and check(saved, f"{name}: step {steps[-1:]} isn't saved") and place.goes_on(name, name))
    print(f"Ctrl-C and SIGTERM: {good} of {done} saved, said how to go on, and went on", flush=True)


def commands(place):
    """{command: (main, arguments for a folder, the folder it begins with or None)}: each that writes."""
    mini, whole = place.mini, place.out("whole")
    texts, questions = place.folder / "texts.txt", place.folder / "questions.jsonl"
    texts.write_text("the lamp is on\nthe door is open\n")
    files.write_jsonl(questions, [{"question": "is the lamp on?", "choices": ["yes", "no"], "answer": 0}])
    model, data, harmful = ("--model", mini, "--sae", mini / "sae"), ("--data", mini / "train.jsonl"), ("--harmful", mini / "harmful.jsonl")
    few, ask = (*harmful, "--max-new-tokens", "4", "--explain", "2"), (whole, *harmful, "--prompts", "2")
    gcg = ("--attack", "gcg", "--attack-steps", "1", "--attack-width", "4", "--attack-length", "2", "--attack-check", "1")
    saes = ("--model", mini, *data, "--layers", "0", "1", "--width", "32", "--l0", "4", "--token-count", "1200", "--batch", "200",
            "--buffer", "700", "--context", "64", "--save-every", "2")
    return {
        "train.py": (train.main, lambda out: command(mini, out, *STEPS, sets=SETS), None),
        "select.py": (features.main, lambda out: (*model, *data, "--rank", "8", "--pairs", "8", "--out", out), None),
        "eval.py RUN": (evaluate.main, lambda out: (out,), whole),
        "eval.py --out": (evaluate.main, lambda out: (*ask, "--perplexity", texts, "--choices", questions, "--out", out), None),
        "eval.py --attack gcg": (evaluate.main, lambda out: (*ask, *gcg, "--out", out), None),
        "report.py RUN": (report.main, lambda out: (out,), whole),
        "report.py --adapter": (report.main, lambda out: ("--adapter", whole, *model, *few, "--out", out), None),
        "sae_train.py": (sae_train.main, lambda out: (*saes, "--out", out), None),
        "sae_train.py, sasa": (sae_train.main, lambda out: (*saes, "--architecture", "sasa", "--out", out), None),
        "merge.py": (merge.main, lambda out: (whole, "--model", mini, "--out", out), None)}


def crashes(place, stride, first=0):
    """A crash before every stride-th write, from number `first` on, of train.py and each other command, with what was being
    written whole and cut in half. What a crash leaves is the folder as it is at that moment: one run gives all of them."""
    tried = survived = 0
    for number, (name, (main, arguments, start)) in enumerate(commands(place).items()):
        out, crashed = place.out("unbroken"), place.folder / "crashed"
        if start:
            shutil.copytree(start, out)
        crashed.mkdir()
        code, err = run(arguments(out), out, Writes(out, before=images(out, crashed, stride, first + 5 * number)), main=main)
        check(code == 0, f"{name}: {code}: {err[-400:]}")
        whole, good, found = contents(out), 0, sorted(crashed.iterdir())
        for image in found:
            there = image / "run"
            good += place.same(f"{name}, crash at write {image.name}", there, whole, *run(arguments(there), there, main=main))
        print(f"crashes at a write, rename or removal, {name}: {good} survived of {len(found)}", flush=True)
        tried, survived = tried + len(found), survived + good
        shutil.rmtree(out.parent)
        shutil.rmtree(crashed)
    print(f"crashes in all: {survived} survived of {tried}", flush=True)


def images(out, place, stride, first):
    """before(…) of Writes: copies the folder `out` as it is into place/NUMBER/run, and to place/NUMBERcut/run with what is being
    written cut in half; of all that makes every stride-th."""
    seen = 0

    def before(number, opened):
        nonlocal seen
        torn = opened and os.path.exists(opened[0]) and os.path.getsize(opened[0]) > opened[1]
        for cut in (False, True)[:1 + bool(torn)]:
            seen += 1
            if seen % stride != first % stride:
                continue
            image = place / f"{number}{'cut' * cut}/run"
            image.parent.mkdir()
            if out.exists():
                shutil.copytree(out, image)
            if cut:
                os.truncate(image / Path(opened[0]).relative_to(out), (opened[1] + os.path.getsize(opened[0])) // 2)
    return before


def limits(place, stride=4):
    """A disk that fills up, a folder that turns read-only, no more file descriptors, no more memory."""
    counts = {}

    def count(kind, good, code):
        counts[kind] = [old + new for old, new in zip(counts.get(kind, [0, 0, 0]), (1, good, code == 2))]

    def tried(kind, name, before, words=""):
        code, err = run(place.arguments(name), place.out(name), before)
        count(kind, (code == 0 or one_line(code, err, name, words)) and place.goes_on(name, name), code)

    def mounted(kind, name, size, before=None, words=""):
        """A run in a tmpfs of `size` bytes, which goes on once there is room and leave to write."""
        out = place.out(name)
        out.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", out], capture_output=True).returncode:
            print(f"{kind}: not tried, since mount isn't allowed here")
            return
        try:
            code, err = run(place.arguments(name), out, before)
            good = one_line(code, err, name, words)
            if (out / session.CHECKPOINT).exists():
                files.read_tensors(out / session.CHECKPOINT)
            subprocess.run(["mount", "-o", "remount,rw,size=64m", out], check=True)
            again, err = run(place.arguments(name), out)
            good = good and check(again == 0, f"{name}: goes on with {again}: {err[-300:]}")
            count(kind, good and check(contents(out) == place.whole and not left(out), f"{name}: other results"), code)
        finally:
            subprocess.run(["umount", out], check=True)

    def refuse_writes(out, most):
        """Make the tmpfs read-only once it holds more than `most` bytes."""
        turned = False

        def see(event, told):
            nonlocal turned
            if not turned and event == "open" and str(told[0]).startswith(str(out)) \
                    and sum(path.stat().st_size for path in out.rglob("*")) > most:
                turned = subprocess.run(["mount", "-o", "remount,ro", out]).returncode == 0
        sys.addaudithook(see)

    def limited(kind, most):
        return lambda: resource.setrlimit(kind, (most, most))

    for last in range(2, place.writes, max(1, place.writes // stride)):
        for error in (errno.EROFS, errno.ENOSPC):
            name = f"{errno.errorcode[error]}{last}"
            tried("writes refused", name, Writes(place.out(name), last, error), str(place.out(name)))
    whole = sum(path.stat().st_size for path in place.out("whole").rglob("*"))
    for part in range(1, stride):
        some = whole * part // stride // 4096 * 4096
        mounted("disk full (tmpfs)", f"full{part}", some, words="No space left on device")
        name, out = f"readonly{part}", place.out(f"readonly{part}")
        mounted("folder that turns read-only (tmpfs)", name, 64 << 20, lambda out=out, most=some: refuse_writes(out, most),
                "Read-only file system")
    held = len(os.listdir("/proc/self/fd"))
    for more in range(0, 4 * stride, 2):
        tried("file descriptors", f"descriptors{more}", limited(resource.RLIMIT_NOFILE, held + more))
    size = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
    for part in range(1, 2 * stride):
        tried("address space", f"memory{part}", limited(resource.RLIMIT_AS, size + (part * 24 << 20) // stride))
    for kind, (every, good, stopped) in counts.items():
        print(f"{kind}: {good} of {every} went on ({stopped} were stopped with one line)", flush=True)


def at_step(last):
    """Let the run die once it has logged a step."""
    add = session.Log.add

    def see(self, line):
        add(self, line)
        if line.get("step") == last and "loss" in line:
            os._exit(137)
    session.Log.add = see


def dies(*told):
    os._exit(137)


def bad(path, where):
    """Cut a file at a share of its length between a half and all of it; at another flip a bit there."""
    data = bytearray(path.read_bytes())
    at = int(len(data) * where)
    path.write_bytes(data[:at] if 0.5 < where < 0.99 else data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])


def damage(place):
    """Files of an unfinished run that are cut short or have a flipped bit; a loss that is no number, a gradient spike."""
    tried = held = 0

    def counted(good):
        nonlocal tried, held
        tried, held = tried + 1, held + bool(good)

    def stopped(step):                                          # after saving a checkpoint of `step`
        save = session.save_checkpoint
        train.save_checkpoint = lambda folder, number, *more: (save(folder, number, *more), number == step and os._exit(137))

    def until_figures(name):
        """Run until all is there but judgements and scores."""
        run(place.arguments(name), place.out(name), lambda: setattr(train, "conclude", dies))

    main, words, _ = commands(place)["sae_train.py"]
    run(words(place.out("saes")), place.out("saes"), main=main)
    saes = contents(place.out("saes"))
    for where in (0.001, 0.4, 0.7, 0.9999):
        name = f"checkpoint{where}"
        run(place.arguments(name), place.out(name), lambda: stopped(6))
        bad(place.out(name) / session.CHECKPOINT, where)
        counted(place.goes_on(name, name))
        for file in ("features.json", "subspace.safetensors", "adapter_model.safetensors"):
            name, path = f"{file}{where}", place.out(f"{file}{where}") / file
            until_figures(name)
            bad(path, where)
            good = one_line(*run(place.arguments(name), place.out(name)), name, str(path))
            (path if "adapter" in file else path.with_name("subspace.safetensors")).unlink(missing_ok=True)
            counted(good and place.goes_on(name, name))
        name = f"weights{where}"                                # that save_model wrote
        weights = shutil.copytree(place.mini, place.folder / name / "model") / "model.safetensors"
        bad(weights, where)
        good = one_line(*run([*place.arguments(name), "--model", weights.parent], place.out(name)), name, str(weights.parent))
        counted(good and check(not place.out(name).exists(), f"{name}: leaves a folder"))
        name, out = f"sae{where}", place.out(f"sae{where}")
        run(words(out), out, lambda: setattr(sae_train.Training, "write", dies), main=main)
        bad(out / session.CHECKPOINT, where)
        code, err = run(words(out), out, main=main)
        told = "checkpoint before it" in err or where == 0.001  # which is in the checksum's own name: no harm done
        counted(check(told, f"{name}: {code}: {err}") and place.same(name, out, saes, code, err))
    until_figures("scale")                                      # of an adapter: a number in a file of text
    config = place.out("scale") / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    good = one_line(*run(place.arguments("scale"), place.out("scale")), "scale", str(config))
    config.write_text(text)
    counted(good and place.goes_on("scale", "scale"))

    def spoil(factor, first, last=10 ** 9):
        """Multiply the loss of the rows first to last, two a step."""
        real, calls = train.nll_sum, []

        def nll_sum(*given):
            calls.append(given)
            loss, *more = real(*given)
            return loss * factor if first <= len(calls) <= last else loss, *more
        train.nll_sum = nll_sum

    def kept(name, what):
        rows = files.read_tensors(place.out(name) / f"checkpoint/{what}-step-5.safetensors")
        return (check(rows["0.tokens"].shape == (96,) and len(rows) == 6, f"{name}: rows {rows.keys()}")
                and check(files.read_metadata(place.out(name) / session.CHECKPOINT)["step"] == "4", f"{name}: the last good step"))

    for name, factor in (("nan", float("nan")), ("infinity", float("inf")), ("overflow", 1e25)):
        ending = run(place.arguments(name), place.out(name), lambda factor=factor: spoil(factor, 9))
        counted(one_line(*ending, name, "step 5: loss") and kept(name, "diverged") and place.goes_on(name, name))
    code, err = run([*place.arguments("spike"), "--save-every", "100"], place.out("spike"), lambda: (spoil(1e9, 9, 10), at_step(6)))
    counted(check(code == 137 and "step 5: gradient norm" in err and "clipped to 1" in err, f"spike: {code}: {err[-300:]}")
            and kept("spike", "spike"))
    print(f"damaged files, a loss that is no number, a spike: {held} of {tried} refused by name, or mended, and gone on", flush=True)


def together(place, count=3):
    """Two runs in one second, two processes that resume one run, a clock that goes back."""
    tried = held = 0
    stamp, now, mains, here = time.strftime, time.time, commands(place), place.out("here").parent

    def same_second():
        os.chdir(here)
        time.strftime = lambda *told: "20260101-120000"

    for name in ("train.py", "select.py", "sae_train.py"):
        main, arguments, _ = mains[name]
        words = [str(word) for word in arguments(place.out("whole"))]
        at = words.index("--out")
        del words[at:at + 2]                                    # so it goes into runs/TIME-…
        codes = [ended(child) for child in [begin(words, here / f"{name}{number}", same_second, main) for number in range(2)]]
        one, two = map(contents, (here / "runs").iterdir())
        same = all(one[key] == two[key] for key in one.keys() | two.keys() if key != "explain.json")       # which tells the folder
        tried, held = tried + 1, held + check(codes == [0, 0] and same, f"{name}, twice in a second: {codes}")
        shutil.rmtree(here / "runs")
    for number in range(count):
        for name in ("train.py", "eval.py --out", "sae_train.py"):
            (main, arguments, _), what, out = mains[name], f"{name}, two at once, {number}", place.out(f"two{number}")
            if name == "train.py":
                run(arguments(out), out, lambda step=2 + number: at_step(step), main=main)
            both = [begin(arguments(out), out.parent / which, None, main) for which in "ab"]
            ends = sorted((ended(child), (out.parent / f"{which}.err").read_text()) for child, which in zip(both, "ab"))
            (one, _), (two, err) = ends
            told = two == 2 and ("another process is at work" in err or "finished" in err) or two == 0 and name.startswith("eval")
            good = check(one == 0 and told, f"{what}: {ends}") and check(not left(out), f"{what}: {left(out)}")
            good = good and (name != "train.py" or place.same(what, out, place.whole, 0, ""))
            shutil.rmtree(out.parent, ignore_errors=True)
            tried, held = tried + 1, held + good

    def an_hour_earlier():
        time.time, time.strftime = lambda: now() - 3600, lambda form, *given: stamp(form, time.gmtime(now() - 3600))

    run(place.arguments("clock"), place.out("clock"), lambda: at_step(4))
    for path in place.out("clock").rglob("*"):
        os.utime(path, (now() + 86400, now() + 86400))          # written tomorrow
    ending = run(place.arguments("clock"), place.out("clock"), an_hour_earlier)
    tried, held = tried + 1, held + place.same("clock", place.out("clock"), place.whole, *ending)
    print(f"two runs in one second, two that resume one, a clock that goes back: {held} of {tried}", flush=True)


BROKEN = """
import os, sys
import parallel, train
left = int(os.environ["REFUSED"])

def see(event, told):
    global left
    if event == "open" and str(told[0]).startswith(os.environ["PLACE"]) and not told[2] & (os.O_WRONLY | os.O_RDWR):
        left -= 1
        if not left:
            raise PermissionError(13, "Permission denied", str(told[0]))

if os.environ["RANK"] == os.environ["WHO"]:
    sys.addaudithook(see)
parallel.run(train.main)
"""


def ranks(place, count):
    """Under torchrun: one of two processes is killed, gets a signal, or can't open a file, at a random moment. All end within
    100 seconds, with one line, and the same command goes on to the same numbers."""
    from test_parallel import ENVIRONMENT, torchrun, workers
    draw, good, slowest = random.Random(2), 0, 0
    (place.folder / "broken.py").write_text(BROKEN)
    torchrun("train.py", place.arguments("two ranks")).communicate(timeout=100)
    whole = contents(place.out("two ranks"))
    for number in range(count):
        name, who, how = f"ranks{number}", draw.randrange(2), ("SIGKILL", "open", "SIGTERM")[number % 3]
        what, out = f"{name}, {how} of rank {who}", place.out(name)
        if how == "open":
            ENVIRONMENT.update(WHO=str(who), REFUSED=str(draw.randint(1, 60)), PLACE=str(place.folder))
            process = torchrun(place.folder / "broken.py", place.arguments(name))
            next((line for line in process.stdout if line.startswith("setting ")), None)
        else:
            process, after = torchrun("train.py", place.arguments(name)), draw.uniform(0.2, 1.5 * place.seconds)
            next((line for line in process.stdout if line.startswith("setting ")), None)           # it has begun
            child = workers(process)[who]
            after += used(child)
            while used(child) < after:
                time.sleep(0.003)
            with suppress(ProcessLookupError):
                os.kill(child, signal.Signals[how])
        began = time.monotonic()
        _, err = process.communicate(timeout=100)
        slowest = max(slowest, time.monotonic() - began)
        lines = [line for line in err.splitlines() if ": error: " in line or "stopped by" in line]
        told = process.returncode == 0 or len(lines) == 1 or how == "SIGKILL" and not lines       # nobody was there to say it
        ok = check(told and "RuntimeError" not in err, f"{what}: {process.returncode}: {err[-1500:]}")
        process = torchrun("train.py", place.arguments(name))
        _, err = process.communicate(timeout=100)
        good += ok and place.same(what, out, whole, 0 if process.returncode == 0 else 2 if "finished" in err else 1, err)
    print(f"torchrun, a process killed, stopped or refused a file: {good} of {count} ended and went on, the slowest end after "
          f"{slowest:.0f} s", flush=True)


def long(place, steps):
    """Memory and step time (the processor's, whatever else the machine does) of a run of many steps, a checkpoint every 50."""
    seen, out = place.folder / "seen", place.out("long")

    def watch():
        add, file, before = session.Log.add, open(seen, "w"), time.process_time()

        def see(self, line):
            nonlocal before
            add(self, line)
            if "loss" in line:
                pages, now = int(open("/proc/self/statm").read().split()[1]), time.process_time()
                file.write(json.dumps([line["step"], pages * resource.getpagesize() / 1e6, 1000 * (now - before)]) + "\n")
                file.flush()
                before = now
        session.Log.add = see

    code, err = run(command(place.mini, out, "--steps", str(steps), "--save-every", "50", "--batch-tokens", "32", "--accumulate", "1",
                            "--lr", "1e-4", "--looks", "0", "--explain", "0"), out, watch)
    check(code == 0, f"long: {code} {err[-300:]}")
    step, memory, ms = torch.tensor([json.loads(line) for line in seen.read_text().splitlines()], dtype=torch.float64).T
    late = step > steps / 10

    def slope(values):
        x, y = step[late] - step[late].mean(), values[late]
        return (x @ (y - y.mean()) / (x @ x)).item() * 1000

    thirds, times = [values.mean().item() for values in memory[late].chunk(3)], ms[late].chunk(3)
    print(f"{len(step):,} steps, {steps // 50:,} checkpoints: memory {memory[late][0]:.1f} to {memory[-1]:.1f} MB, thirds "
          f"{thirds[0]:.1f}, {thirds[1]:.1f}, {thirds[2]:.1f}, slope {slope(memory):+.4f} MB per 1,000 steps; median step "
          f"{ms[late].median():.2f} ms, first third {times[0].median():.2f}, last {times[2].median():.2f}, slope "
          f"{slope(ms.clamp(max=3 * ms.median())):+.5f} ms per 1,000 steps", flush=True)
    check(slope(memory) < 0.1, "long: memory grows")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill -9 at N random moments")
    parser.add_argument("--signals", type=int, default=0, metavar="N", help="Ctrl-C and SIGTERM at N random moments")
    parser.add_argument("--crashes", type=int, nargs="+", default=[], metavar=("S", "FIRST"),
                        help="crash at every S-th write, rename and removal of each command, from the FIRST on")
    parser.add_argument("--limits", type=int, nargs="?", const=4, default=0, metavar="N",
                        help="disk, folder, descriptors and memory that give out; N: how finely")
    parser.add_argument("--damage", action="store_true", help="damaged files, a loss that is no number, a gradient spike")
    parser.add_argument("--together", action="store_true", help="two runs at once, and a clock that goes back")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="under torchrun, N times one of two processes goes")
    parser.add_argument("--long", type=int, default=0, metavar="STEPS", help="a long run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for action, amount in ((kills, [args.kills]), (signals, [args.signals]), (crashes, args.crashes), (limits, [args.limits]),
                               (ranks, [args.ranks]), (long, [args.long])):
            if any(amount):
                action(place, *amount)
        for action, wanted in ((damage, args.damage), (together, args.together)):
            if wanted:
                action(place)
    print(f"peak memory of a run: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3:,.0f} MB; {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
