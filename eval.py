"""Evaluate models: answers become verdicts, verdicts shares with intervals, shares a table.

    python eval.py RUN                          # judge the run's answers again; no model is loaded
    python eval.py RUN --judge shieldgemma      # by one more judge (safety/judges.py)
    python eval.py --list                       # prompt sets known by name (safety/sets.py)
    python eval.py RUN --sets jailbreakbench xstest --set xstest=xstest_prompts.csv --out other
    python eval.py toy RUN ADAPTER FOLDER --sets toy --out all     # a column each (safety/arms.py)
    python eval.py google/gemma-2-9b google/gemma-2-9b-it RUN --sets hex-phi --out hex
    python eval.py RUN --sets toy-harmful --attack gcg --out gcg           # safety/attack.py
    python eval.py RUN --ask "how do i break the vault?" --steer 1/174 4   # safety/ask.py
    torchrun --nproc-per-node 4 eval.py RUN --sets hh-rlhf --out hh        # on 4 cards

A run or an adapter by itself is compared with its base. Of several models each is compared with the
first, prompt by prompt. A run's own answers are in its completions.jsonl, all others in --out DIR.
The command writes judged.jsonl and scores.json beside them. Judging reads the answers alone, so
that a judge can be changed without answering again.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import Tokenizer, prompt_tokens
from model import Gemma2
from run import parallel
from run.files import (InputError, Parser, data_file, is_new, read_json, read_jsonl, write_json,
                       write_jsonl)
from run.readers import Prompt, read_pairs
from run.session import FINISHED
from run.settings import ROLES, absolute
from safety import attack
from safety.ask import add_ask_flags, ask
from safety.arms import find_arms, loaded, shared_settings, tokenizers_of
from safety.figures import figures, grouped, paired
from safety.judges import JUDGES, add_judge_flags, find_judge, judged
from safety.sets import EvalSet, listing, load_sets, places
from safety.table import MODELS, is_run, result_table, samples

ROOM = 512      # tokens of a prompt and its answer, so many as eval_batch counts with on a GPU


# --------------------------------------------------------------------------------------------------
# Answers

def answer(model: Gemma2, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens=64,
           batch_size=32, format="chat", label="") -> list[str]:
    """Greedy completions of prompts, in order; each ends at the end of the turn or at eos.

    Batches hold prompts of like length, the longest first: little is padded, and memory fails at
    once or never. A GPU decodes many rows as fast as few, so there `batch_size` prompts mean room
    for batch_size · ROOM tokens, and shorter ones fill it. Of many processes each answers its
    share, and all get all answers. A sharded model's processes must make the same forwards, so each
    answers everything. `label` names the progress bar; without one there is none.
    """
    ids = [prompt_tokens(tokenizer, prompt.turns, format) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    num_positions = model.config.max_position_embeddings
    if num_long := sum(len(tokens) + max_new_tokens > num_positions for tokens in ids):
        print(f"warning: {label or 'answers'}: {num_long:,} prompts with their answers may be "
              f"longer than the {num_positions:,} positions that the model knows", file=sys.stderr)
    is_sharded = parallel.is_sharded(model)     # what FSDP gathers must be fit for training later
    if not is_sharded:
        order = parallel.own_share(order)
    texts = {}
    stop = (tokenizer.end_of_turn, tokenizer.eos)
    on_card = model.embed_tokens.weight.device.type == "cuda"
    progress = tqdm(total=len(order), desc=label, leave=False, disable=None if label else True)
    with progress, torch.inference_mode(not is_sharded):
        while order:
            size = batch_size
            if on_card:
                longest = len(ids[order[0]]) + max_new_tokens
                size = max(1, batch_size * ROOM // longest)
            batch, order = order[:size], order[size:]
            new = model.generate([torch.tensor(ids[i]) for i in batch], max_new_tokens, stop=stop)
            for i, tokens in zip(batch, new):
                texts[i] = tokenizer.decode(tokens.tolist())
            progress.update(len(batch))
    # Each process has the answers to its own share: put all in the order of the prompts
    for part in parallel.gather(list(texts.items())):
        texts |= dict(part)
    return [texts[i] for i in range(len(ids))]


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file; [] if there is none yet."""
    return read_jsonl(path) if path.exists() else []


def complete(folder: str | Path, model_name: str, model: Gemma2, tokenizer: Tokenizer,
             sets: dict[str, EvalSet], settings):
    """Answer the sets that `model_name`, as "base" or "adapter", hasn't answered yet.

    After each set completions.jsonl is written. Its rows: model, set, role, file, line, prompt,
    completion, and fields, the other columns of the prompt's own row.
    """
    path = Path(folder) / "completions.jsonl"
    for name in unanswered(path, model_name, sets):
        eval_set = sets[name]
        texts = answer(model, tokenizer, eval_set.prompts, settings.max_new_tokens,
                       settings.eval_batch, settings.format, f"{model_name}, {name}")
        rows = parallel.on_rank_zero(read_rows, path)
        for prompt, text in zip(eval_set.prompts, texts):
            rows.append({"model": model_name, "set": name, "role": eval_set.role,
                         "file": eval_set.file, "line": prompt.line,
                         "prompt": as_text(prompt.turns), "completion": text,
                         "fields": prompt.fields})
        parallel.on_rank_zero(write_jsonl, path, rows)


def unanswered(path: Path, model_name: str, sets: dict[str, EvalSet]) -> list[str]:
    """The names of the sets that a model has no answers to in completions.jsonl."""
    rows = parallel.on_rank_zero(read_rows, path)
    names = []
    for name, eval_set in sets.items():
        prompts = {as_text(prompt.turns) for prompt in eval_set.prompts}
        answered = [row for row in rows if row["set"] == name]
        if answered and {row["prompt"] for row in answered} != prompts:
            raise InputError(f"{path} answers other prompts of {name}: give the set's old file, "
                             "or another --out")
        if all(row["model"] != model_name for row in answered):
            names.append(name)
    return names


def as_text(turns) -> str:
    """A prompt as text: one turn as it is, several with their roles."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {words}" for role, words in turns)


# --------------------------------------------------------------------------------------------------
# Verdicts and figures

def score(folder: str | Path, models: Sequence[str] = MODELS, **judging) -> dict:
    """Judge a folder's completions into judged.jsonl: {"judge": names, "sets": {model: figures},
    "paired": {set: {figure: adapter against base}}}.

    Of other `models` "paired" is {model: {set: {figure: against the first}}}. `judging` goes to
    judges.judged. Earlier scores for the same answers stay.
    """
    path = Path(folder) / "judged.jsonl"
    earlier = {(row["prompt"], row["completion"]): row for row in read_rows(path)}
    rows = [earlier.get((row["prompt"], row["completion"]), {}) | row
            for row in read_rows(Path(folder) / "completions.jsonl")]
    try:
        judged(rows, **judging)
    finally:        # a judge that fails half-way isn't paid for the same answers twice
        write_jsonl(path, rows)

    # Figures of each model, and each against the first, prompt by prompt
    rows_of = {model: [row for row in rows if row["model"] == model] for model in models}
    before, *others = (grouped(rows_of[model], "set") for model in models)
    changes = [{name: paired(before[name], after[name]) for name in after} for after in others]
    judges = [f"{judge} by {row[judge]['by']}" for judge in JUDGES for row in rows if judge in row]
    return {"judge": ", ".join(["rules", *dict.fromkeys(judges)]),
            "sets": {model: figures(rows_of[model]) for model in models},
            "paired": changes[0] if is_run(models) else dict(zip(models[1:], changes))}


# --------------------------------------------------------------------------------------------------
# The command

def main():
    parser = Parser(__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="*",
                        help="a finished run, a folder with an adapter in PEFT's layout or with a "
                             "checkpoint, or a name on the hub")
    parser.add_argument("--model", metavar="NAME|DIR",
                        help="the base of adapters (default: the one that they name), and of a "
                             "run whose model has moved")
    parser.add_argument("--data", metavar="FILE", help="what a run was trained on, if it has moved")
    parser.add_argument("--list", action="store_true", help="print the sets known by name")
    parser.add_argument("--sets", metavar="NAME", nargs="+", default=[], help="sets by name")
    parser.add_argument("--set", metavar="NAME=FILE", action="append", default=[],
                        help="the file of a set; for one that isn't known by name NAME:ROLE=FILE, "
                             f"with a role of {', '.join(ROLES)} (without --sets and --set: the "
                             "first run's sets, or those of the recipe for a model of this size)")
    parser.add_argument("--prompts", metavar="N", type=int,
                        help="prompts taken of each set; 0: all (default: as in the run)")
    parser.add_argument("--out", metavar="DIR", help="where answers to other sets go")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: the run's)")
    add_judge_flags(parser)
    attack.add_attack_flags(parser)
    add_ask_flags(parser)
    args = parser.parse_args()
    if args.list:
        return print(listing())
    if not args.models:
        raise InputError("give a finished run of train.py, an adapter or a model (or --list)")
    with parallel.agreed():
        arms = find_arms(args.models, args.model, args.data)
    if args.ask:
        return ask(arms, shared_settings(arms, args.device), args.ask, args.steer)
    if args.steer:
        raise InputError("--steer goes with --ask TEXT")
    find_judge(args.judge, args.judge_model)            # is it there? Answering can take hours

    # Answer, then judge
    folder = Path(args.out or args.models[0]).expanduser()
    if args.out:
        answer_sets(args, arms, folder)
    elif len(args.models) > 1 or not arms[-1].run or args.sets or args.set or args.attack:
        raise InputError("give --out DIR, where the answers go: only a run has its own")
    parallel.on_rank_zero(conclude, folder, [arm.name for arm in arms], args)


def sets_of(args, arms, settings) -> dict[str, EvalSet]:
    """The sets that --sets and --set name, else those of the settings, under --attack."""
    files = {}
    for text in args.set:
        name, _, file = text.partition("=")
        if not file:
            raise InputError(f"--set {text}: give NAME=FILE")
        files[name] = absolute(file)
    found = places(args.sets, files)
    if not found:
        found = {role: (role, file) for role, file in (settings.sets or {}).items()}
    if not found:
        raise InputError(f"no recipe is for models of this size ({arms[0].base}): give --sets or "
                         "--set")
    # What some of these runs were trained on is no test of the others either
    trained = {pair.turns for data in {arm.run.data for arm in arms if arm.run}
               for pair in read_pairs(data_file(data))[0]}
    most = settings.eval_prompts if args.prompts is None else args.prompts
    sets = load_sets(found, trained, most)
    if args.attack:
        sets = attack.attacked_sets(sets, args.attack, args.template, args.target)
    return sets


def answer_sets(args, arms, out):
    """Answers of all models to the sets, in the folder `out`; those there stay."""
    if args.attack == "gcg" and parallel.world_size() > 1:
        raise InputError("--attack gcg runs in one process: start it without torchrun")
    # All inputs are read before the folder is made
    with parallel.agreed():
        settings = shared_settings(arms, args.device)
        tokenizers = tokenizers_of(arms)
        sets = sets_of(args, arms, settings)
    parallel.on_rank_zero(open_folder, out, args, arms)

    if args.attack != "gcg":
        path = out / "completions.jsonl"
        arms = [arm for arm in arms if unanswered(path, arm.name, sets)]
    plan = attack.Plan(args.attack_steps, args.attack_width, args.attack_length, args.target)
    for arm, model in loaded(arms, settings):
        tokenizer = tokenizers[arm.base]
        if args.attack == "gcg":
            replies = partial(answer, model, tokenizer, max_new_tokens=settings.max_new_tokens,
                              batch_size=settings.eval_batch, format=settings.format)
            attack.gcg(out, arm.name, model, tokenizer, sets, replies, plan, settings.format)
        else:
            complete(out, arm.name, model, tokenizer, sets, settings)


# Flags that answers hang on, beside the models
ASKED = ("model", "sets", "set", "prompts", "attack", "template", "target", "attack_steps",
         "attack_width", "attack_length")


def open_folder(out, args, arms):
    """Make a folder for these answers, or go on in one whose eval.json has the same flags.

    More models may join those that have answered there; a name stays one model's.
    """
    flags = {name: getattr(args, name) for name in ASKED}
    models = {arm.name: arm.place for arm in arms}
    path = out / "eval.json"
    if not is_new(out):
        old = read_json(path) if path.exists() else {}
        known = old.pop("models", {})
        models = known | models
        if old != flags or not known.items() <= models.items():
            raise InputError(f"{out} isn't of these sets and models: give another --out")
    write_json(path, flags | {"models": models})


def conclude(folder, models, args):
    """Judge the answers, write scores.json, print the table."""
    path = folder / FINISHED
    suffixes = folder / "attacks.jsonl"
    scores = score(folder, models, judge=args.judge, judge_model=args.judge_model,
                   device=args.device)
    if path.exists():
        scores = read_json(path) | scores       # a run's own has more than figures
    if suffixes.exists():
        success = attack.success(read_jsonl(suffixes))
        scores["attacks"] = {model: success[model] for model in models}
    write_json(path, scores)
    print(f"\n{result_table(scores)}\n")
    if suffixes.exists():
        print(f"suffixes: {suffixes}")
    else:
        print(f"{samples(folder, models)}\n\nanswers: {folder / 'completions.jsonl'}")


if __name__ == "__main__":
    parallel.run(main)
