"""Write a base model with an adapter merged into it, as a checkpoint of its own: any tool that opens Gemma-2 opens it.

    python merge.py runs/20260101-120000-toy --out merged               # a run of train.py
    python merge.py someone/their-lora --model google/gemma-2-2b --out merged
    python merge.py RUN --lox 6 1.25 --out extrapolated
    python merge.py RUN --rosi 0.5 --harmful FILE --harmless FILE --out injected

W + s·B·A is summed in float32 and rounded once to the checkpoint's dtype. The adapter alone opens in peft as it is.
Two methods from elsewhere change weights after training, and are done on the way: LoX and ROSI (neighbours.py).
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import lora
from experiments import neighbours
from run import settings as recipe
from data import load_tokenizer, prompt_tokens
from data import read_prompts
from run.files import InputError, Parser, atomic, locate, read_json, run_command
from model import Gemma2, load_model, save_model
from run.session import Lock

BESIDE = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def merge(adapter: str | Path, base: str | Path, out: str | Path, dtype: str | None = None,
          change: Callable[[Gemma2], None] = lambda model: None) -> int:
    """Write `base` with `adapter` merged to the folder `out`, weights in `dtype` (default: the checkpoint's own); before, do to
    the model that carries the adapter what `change` does. The number of modules."""
    out, source = Path(out).expanduser(), recipe.folder(base)
    if (out / "config.json").exists() or out.exists() and not out.is_dir():      # config.json is written last
        raise InputError(f"{out} is there: give another --out")
    if dtype is None:
        config = read_json(locate(source, "config.json"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: give float32 or bfloat16")
    model = load_model(source, getattr(torch, dtype))
    layers = lora.load_adapter(model, adapter)
    change(model)
    lora.fold_lora(model)
    out.mkdir(parents=True, exist_ok=True)
    held = Lock(out)                                                             # noqa: F841
    for name in BESIDE:
        if found := locate(source, name, optional=True):
            with atomic(out / name) as part:
                shutil.copyfile(found, part)
    save_model(model, out)
    return len(layers)


def read_ids(base, *paths):
    """A list of prompts, as token ids in the chat's form, of each prompt file; as many of each as of the shortest."""
    tokenizer = load_tokenizer(recipe.folder(base))
    found = [[prompt_tokens(tokenizer, prompt.turns) for prompt in read_prompts(path)[0]] for path in paths]
    return [ids[:min(map(len, found))] for ids in found]


def main():
    parser = Parser(__doc__)
    parser.add_argument("adapter", metavar="RUN|ADAPTER", help="folder of a finished run, or a folder or hub repository in PEFT's layout")
    parser.add_argument("--model", metavar="NAME|DIR", help="base model (default: the one that the adapter names)")
    parser.add_argument("--lox", type=float, nargs=2, metavar=("K", "FACTOR"),
                        help="the K leading directions of each update times 1 + FACTOR (theirs: 6 1.25)")
    parser.add_argument("--rosi", type=float, metavar="α",
                        help="W + α·ŝ·w̄ᵀ of all that writes the residual stream, ŝ harm's direction; needs the next two")
    parser.add_argument("--harmful", metavar="FILE", help="harmful prompts, for --rosi")
    parser.add_argument("--harmless", metavar="FILE", help="harmless prompts, for --rosi")
    parser.add_argument("--dtype", metavar="T", help="of the merged weights: float32 or bfloat16 (default: the base checkpoint's)")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    args = parser.parse_args()
    base = args.model or recipe.base_of(args.adapter)
    if args.rosi is not None and not (args.harmful and args.harmless):
        raise InputError("--rosi needs prompts that tell harm apart: give --harmful and --harmless")
    if args.lox and not (args.lox[0] >= 1 and args.lox[0] % 1 == 0):
        raise InputError(f"--lox {args.lox[0]:g}: K is a number of directions, from 1")
    prompts = args.rosi is not None and read_ids(base, args.harmful, args.harmless)

    def change(model):
        if args.lox:
            neighbours.lox(model, int(args.lox[0]), args.lox[1])
        if prompts:
            neighbours.rosi(model, neighbours.harm_direction(model, *prompts), args.rosi)

    count = merge(args.adapter, base, args.out, args.dtype, change)
    print(f"merged {count} modules into {args.out}")


if __name__ == "__main__":
    run_command(main)
