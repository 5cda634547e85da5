"""The command of a method that mends a fine-tuned model by an aligned and an unaligned one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from data import load_examples, load_tokenizer
from experiments.neighbours import shared
from model import load_model, save_model
from run.files import Parser
from run.settings import model_folder
from run.weights import copy_beside


def main(description, mend):
    """mend(aligned, finetuned, unaligned, refusals, task) changes the fine-tuned model in place.

    refusals and task are Examples; those of the task start at their first token.
    """
    parser = Parser(description)
    for name in ("aligned", "finetuned", "unaligned"):
        parser.add_argument(name, metavar=name.upper(), help="folder or repository")
    parser.add_argument("--data", metavar="FILE", required=True, help="what was fine-tuned on")
    parser.add_argument("--safety", metavar="FILE", required=True, help="pairs with refusals")
    parser.add_argument("--out", metavar="DIR", required=True)
    args = parser.parse_args()
    sources = [model_folder(name) for name in (args.aligned, args.finetuned, args.unaligned)]
    tokenizer = load_tokenizer(sources[1])
    task, pairs = (load_examples(path, tokenizer, 1024, paired=False)[0]
                   for path in (args.data, args.safety))
    refusals = shared.refusals(SimpleNamespace(data=args.safety), tokenizer, pairs)
    models = [load_model(source) for source in sources]
    mend(*models, refusals, [replace(aligned, start=0) for aligned, _ in task])
    copy_beside(sources[1], Path(args.out))
    save_model(models[1], Path(args.out))
