"""Judge the answers of a finished run again, or answer and judge other prompts with its base model and its adapter.

    python eval.py runs/20260101-120000-toy                                        # judge what is answered; no model is loaded
    python eval.py RUN --lookalike xstest_prompts.csv --out xstest                 # other sets, into a folder of their own
    torchrun --nproc-per-node 4 eval.py RUN --harmful advbench.csv --out advbench  # each process answers its share

Answers are in completions.jsonl, one a line, and judging reads only that file: a changed judge needs no new answers.
"""

from pathlib import Path

import torch

import lora
import parallel
import recipe
from data import load_tokenizer, read_pairs
from figures import complete, load_sets, score
from files import InputError, Parser, data_file, read_json, write_json
from model import load_model
from report import read_scores, result_table, samples


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run of train.py")
    for name, what in recipe.SETS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=what)
    parser.add_argument("--out", metavar="DIR", help="where answers to other sets go; the run's own are never touched")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: where the run was made)")
    args = parser.parse_args()
    folder, settings = Path(args.run).expanduser(), recipe.saved(args.run)
    read_scores(folder)                                                              # is it finished?
    sets = {name: recipe.absolute(getattr(args, name)) for name in recipe.SETS if getattr(args, name)}
    if bool(sets) != bool(args.out):
        raise InputError("--out DIR goes with sets to answer (--harmful FILE, …), and these with it")
    out = Path(args.out).expanduser() if args.out else folder
    if sets:
        parallel.first(settle, out, folder, sets)
        for name in recipe.SETS:
            setattr(settings, name, sets.get(name))
        source = recipe.folder(settings.model)
        with parallel.agreed():
            device = recipe.check_device(args.device or settings.device)
            tokenizer = load_tokenizer(source)
            prompts = load_sets(settings, read_pairs(data_file(settings.data))[0])
            model = load_model(source, getattr(torch, settings.dtype), device, settings.shard)
        complete(out, "base", model, tokenizer, prompts, settings)
        with parallel.agreed():
            lora.load_adapter(model, folder)
        complete(out, "adapter", model, tokenizer, prompts, settings)
    parallel.first(conclude, out)


def settle(out, folder, sets):
    """Make the folder for other sets, or find it with the answers to the same ones, to go on with."""
    this, path = {"run": str(folder.absolute()), "sets": sets}, out / "eval.json"
    if out.exists() and (not path.is_file() or read_json(path) != this):
        raise InputError(f"{out} is there and isn't of these sets and this run: give another --out")
    write_json(path, this)


def conclude(out):
    """Judge the answers, write scores.json, print its table."""
    path = out / "scores.json"
    scores = (read_json(path) if path.exists() else {}) | score(out)
    write_json(path, scores)
    print(f"\n{result_table(scores)}\n\n{samples(out)}\n\nanswers: {out / 'completions.jsonl'}")


if __name__ == "__main__":
    parallel.run(main)
