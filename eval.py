"""Answer the evaluation prompts with a run's base model and with its adapter, judge the answers, print the figures.

    python eval.py runs/20260101-120000-toy                        # judge again; answer only what isn't answered yet
    python eval.py RUN --lookalike xstest_prompts.csv              # another file for a set, or a set that had none

Answers are in RUN/completions.jsonl, one a line, and judging reads only that file: a changed judge needs no new answers.
"""

from pathlib import Path

import torch

import files
import lora
import recipe
from data import load_tokenizer, read_pairs
from figures import complete, load_sets, missing, score
from files import InputError, data_file, read_json, write_json
from model import load_model
from report import result_table


def main():
    parser = recipe.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run of train.py")
    for name, what in recipe.SETS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=what)
    args = parser.parse_args()
    folder = Path(args.run).expanduser()
    settings = recipe.saved(folder)
    if not (folder / "adapter_model.safetensors").exists():
        raise InputError(f"{folder} has no adapter yet: finish the run with `python train.py --resume {folder}`")
    for name in recipe.SETS:
        setattr(settings, name, getattr(args, name) or getattr(settings, name))
    pairs, _ = read_pairs(data_file(settings.data))
    sets = load_sets(settings, pairs)
    if missing(folder, sets, settings):
        source = recipe.folder(settings.model)
        tokenizer = load_tokenizer(source)
        model = load_model(source, getattr(torch, settings.dtype), settings.device)
        complete(folder, "base", model, tokenizer, sets, settings)
        lora.load_adapter(model, folder)
        complete(folder, "adapter", model, tokenizer, sets, settings)
    path = folder / "scores.json"
    scores = (read_json(path) if path.exists() else {}) | score(folder)
    write_json(path, scores)
    print(result_table(scores))


if __name__ == "__main__":
    files.run(main)
