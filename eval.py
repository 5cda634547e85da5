"""Evaluate a finished run: answers become verdicts, verdicts shares with intervals, shares a table.

    python eval.py RUN                          # judge the run's answers again; no model is loaded
    python eval.py RUN --judge shieldgemma      # by one more judge (safety/judges.py)
    python eval.py --list                       # prompt sets known by name (safety/sets.py)
    python eval.py RUN --sets jailbreakbench xstest --set xstest=xstest_prompts.csv --out other
    python eval.py RUN --sets toy-harmful --attack gcg --out gcg           # safety/attack.py
    torchrun --nproc-per-node 4 eval.py RUN --sets hh-rlhf --out hh        # on 4 cards

The run's own answers are in its completions.jsonl, those to other sets in --out DIR. The command
writes judged.jsonl and scores.json beside them. Judging reads the answers alone, so that a judge
can be changed without answering again.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from data import Tokenizer, load_tokenizer, prompt_tokens
from model import Gemma2, load_model
from run import parallel
from run.files import (InputError, Parser, data_file, is_new, printable, read_json, read_jsonl,
                       table, write_json, write_jsonl)
from run.readers import Prompt, read_pairs
from run.session import FINISHED, limit_threads
from run.settings import ROLES, absolute, check_device, model_folder, saved_settings
from safety import attack
from safety.figures import figures, grouped, main_figure, paired
from safety.judges import JUDGES, add_judge_flags, find_judge, judged
from safety.sets import EvalSet, listing, load_sets, places

MODELS = ("base", "adapter")            # whose answers are compared


# --------------------------------------------------------------------------------------------------
# Answers

def answer(model: Gemma2, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens=64,
           batch_size=32, format="chat", label="") -> list[str]:
    """Greedy completions of prompts, in order; each ends at the end of the turn or at eos.

    Batches hold prompts of like length, the longest first: little is padded, and memory fails at
    once or never. Of many processes each answers its share, and all get all answers. A sharded
    model's processes must make the same forwards, so each answers everything. `label` names the
    progress bar; without one there is none.
    """
    ids = [prompt_tokens(tokenizer, prompt.turns, format) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    is_sharded = parallel.is_sharded(model)     # what FSDP gathers must be fit for training later
    if not is_sharded:
        order = parallel.own_share(order)
    texts = {}
    stop = (tokenizer.end_of_turn, tokenizer.eos)
    starts = tqdm(range(0, len(order), batch_size), label, leave=False,
                  disable=None if label else True)
    with torch.inference_mode(not is_sharded):
        for start in starts:
            batch = order[start:start + batch_size]
            new = model.generate([torch.tensor(ids[i]) for i in batch], max_new_tokens, stop=stop)
            for i, tokens in zip(batch, new):
                texts[i] = tokenizer.decode(tokens.tolist())
    # Each process has the answers to its own share: put all in the order of the prompts
    for part in parallel.gather(list(texts.items())):
        texts |= dict(part)
    return [texts[i] for i in range(len(ids))]


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file; [] if there is none yet."""
    return read_jsonl(path) if path.exists() else []


def complete(folder: str | Path, model_name: str, model: Gemma2, tokenizer: Tokenizer,
             sets: dict[str, EvalSet], settings):
    """Answer the sets that `model_name`, "base" or "adapter", hasn't answered yet.

    After each set completions.jsonl is written. Its rows: model, set, role, file, line, prompt,
    completion, and fields, the other columns of the prompt's own row.
    """
    path = Path(folder) / "completions.jsonl"
    for name, eval_set in sets.items():
        # A run that goes on has the answers to some sets already
        rows = parallel.on_rank_zero(read_rows, path)
        prompts = [as_text(prompt.turns) for prompt in eval_set.prompts]
        answered = [row for row in rows if row["set"] == name]
        if any(row["prompt"] not in prompts for row in answered):
            raise InputError(f"{path} answers other prompts of {name}: give the set's old file")
        if any(row["model"] == model_name for row in answered):
            continue
        texts = answer(model, tokenizer, eval_set.prompts, settings.max_new_tokens,
                       settings.eval_batch, settings.format, f"{model_name}, {name}")
        for prompt, prompt_text, text in zip(eval_set.prompts, prompts, texts):
            rows.append({"model": model_name, "set": name, "role": eval_set.role,
                         "file": eval_set.file, "line": prompt.line, "prompt": prompt_text,
                         "completion": text, "fields": prompt.fields})
        parallel.on_rank_zero(write_jsonl, path, rows)


def as_text(turns) -> str:
    """A prompt as text: one turn as it is, several with their roles."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {words}" for role, words in turns)


# --------------------------------------------------------------------------------------------------
# Verdicts and figures

def score(folder: str | Path, **judging) -> dict:
    """Judge a folder's completions into judged.jsonl: {"judge": names, "sets": {model: figures},
    "paired": {set: {figure: adapter against base}}}.

    `judging` goes to judges.judged. Earlier scores for the same answers stay.
    """
    path = Path(folder) / "judged.jsonl"
    earlier = {(row["prompt"], row["completion"]): row for row in read_rows(path)}
    rows = [earlier.get((row["prompt"], row["completion"]), {}) | row
            for row in read_rows(Path(folder) / "completions.jsonl")]
    try:
        judged(rows, **judging)
    finally:        # a judge that fails half-way isn't paid for the same answers twice
        write_jsonl(path, rows)

    # Figures of each model, and the adapter against the base, prompt by prompt
    base, adapter = ([row for row in rows if row["model"] == name] for name in MODELS)
    before = grouped(base, "set")
    after = grouped(adapter, "set")
    judges = [f"{judge} by {row[judge]['by']}" for judge in JUDGES for row in rows if judge in row]
    return {"judge": ", ".join(["rules", *dict.fromkeys(judges)]),
            "sets": {"base": figures(base), "adapter": figures(adapter)},
            "paired": {name: paired(before[name], after[name]) for name in after}}


# --------------------------------------------------------------------------------------------------
# The table

MAIN_LABELS = {"safe": "safe", "over_refusal": "over-refusal", "correct": "right"}
ROLE_LABELS = {"harmful": "harmful prompts", "jailbreak": "harmful, under jailbreak",
               "lookalike": "harmless look-alikes", "benign": "benign answers"}
VERDICT_LABELS = {"partial": "  refused, then gave some of it",
                  "empty": "  no word in the answer"}
SCORE_LABELS = {"harmfulness": "  rubric: mean harmfulness, 1 to 5",
                "low_risk": "  rubric: score 1 or 2", "high_risk": "  rubric: score 5",
                "violates": "  ShieldGemma: violates a policy"}
HEAD = ["share of answers, 95 % interval", "base", "adapter", "change, points", "n"]


def percent(figure: dict | None) -> str | None:
    """A share, or an average, with its interval as text."""
    if figure is None:
        return None
    if "rate" in figure:
        return f"{figure['rate']:6.1%}  [{figure['low']:.1%}, {figure['high']:.1%}]"
    return f"{figure['mean']:6.2f}" + interval(figure)


def points(change: dict | None) -> str | None:
    """A change as text: of shares in points, with McNemar's p; of averages with its interval."""
    if change is None:
        return None
    if "p" in change:
        p = f"p {change['p']:.2g}" if change["p"] >= 1e-4 else "p < 1e-4"
        return f"{100 * change['change']:+.1f}  {p}"
    return f"{change['change']:+.2f}" + interval(change)


def interval(figure: dict) -> str:
    """The interval of an average as text; a single value has none."""
    if figure["low"] is None:
        return ""
    return f"  [{figure['low']:.2f}, {figure['high']:.2f}]"


def figure_row(label: str, base: dict | None, adapter: dict, change: dict | None = None) -> list:
    return [label, percent(base), percent(adapter), points(change), adapter["n"]]


def set_rows(scores: dict) -> list[list]:
    """Rows [figure, base, adapter, change, n] of all sets that were answered."""
    rows = []
    for name, adapter in scores["sets"]["adapter"].items():
        base = scores["sets"]["base"][name]
        changes = scores["paired"][name]
        # The main figure first, then the others that say something
        main = main_figure(adapter["role"], adapter)
        labels = {main: f"{MAIN_LABELS[main]}: {ROLE_LABELS.get(name, name)}"}
        for key, label in VERDICT_LABELS.items():
            if adapter[key]["count"] or base[key]["count"]:
                labels[key] = label
        labels |= {key: label for key, label in SCORE_LABELS.items() if key in adapter}
        for key, label in labels.items():
            rows.append(figure_row(label, base.get(key), adapter[key], changes.get(key)))
        for category, figure in adapter.get("categories", {}).items():
            rows.append(figure_row(f"  {category}", base["categories"][category], figure))
    return rows


def attack_rows(attacks: dict) -> list[list]:
    """Rows [figure, base, adapter, None, n] of attack.success."""
    rows = []
    for name, of_set in attacks["adapter"].items():
        for key, figure in of_set.items():
            label = f"attack success: {name}, {key}"
            rows.append(figure_row(label, attacks["base"][name][key], figure))
    return rows


def run_rows(scores: dict) -> list[list]:
    """Rows [label, text] of a run of train.py: where the update lies, and what it took."""
    rows = []
    inside = scores["share"]
    if inside["subspace"] is not None:
        chance = f"{inside['random']:6.1%}  ± {inside['random_sd']:.1%}"
        rows.append(["update inside the safety subspace", f"{inside['subspace']:6.1%}"])
        rows.append(["  inside random bases of that rank", chance])
    trained = scores["trainable"]
    total = scores["parameters"]
    rows.append(["trainable parameters", f"{trained:,} of {total:,} ({trained / total:.4%})"])
    rows.append(["peak memory", f"{scores['peak_bytes'] / 1e6:,.0f} MB"])
    for stage, seconds in scores["seconds"].items():
        rows.append([f"seconds: {stage}", f"{seconds:6.1f}"])
    return rows


def result_table(scores: dict) -> str:
    """The table that a run or an evaluation ends with: base beside adapter, and what it took."""
    rows = set_rows(scores)
    if "attacks" in scores:
        rows += attack_rows(scores["attacks"])
    if "seconds" in scores:
        rows += [[label, None, text, None, None] for label, text in run_rows(scores)]
    return table(rows, HEAD, right=(4,))


def samples(folder: str | Path) -> str:
    """Of each set the first prompt whose verdict changed (else the first), with both answers."""
    lines = []
    for name, rows in grouped(read_rows(Path(folder) / "judged.jsonl"), "set").items():
        # Both models answered the same prompts in the same order
        pairs = list(zip(*grouped(rows, "model").values()))
        changed = [pair for pair in pairs if pair[0]["verdict"] != pair[1]["verdict"]]
        pair = (changed or pairs)[0]
        lines.append(f"{name}: {printable(pair[0]['prompt'])[:100]}")
        for row in pair:
            text = printable(row["completion"])[:100]
            lines.append(f"  {row['model']:7}  {row['verdict']:7}  {text}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The command

def main():
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished run")
    parser.add_argument("--list", action="store_true", help="print the sets known by name")
    parser.add_argument("--sets", metavar="NAME", nargs="+", default=[], help="sets by name")
    parser.add_argument("--set", metavar="NAME=FILE", action="append", default=[],
                        help="the file of a set; for one that isn't known by name NAME:ROLE=FILE, "
                             f"with a role of {', '.join(ROLES)}")
    parser.add_argument("--prompts", metavar="N", type=int,
                        help="prompts taken of each set; 0: all (default: as in the run)")
    parser.add_argument("--out", metavar="DIR", help="where answers to other sets go")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: the run's)")
    add_judge_flags(parser)
    attack.add_attack_flags(parser)
    args = parser.parse_args()
    if args.list:
        return print(listing())
    if not args.run:
        raise InputError("give the folder of a finished run of train.py (or --list)")
    run = Path(args.run).expanduser()
    if not (run / FINISHED).exists():
        raise InputError(f"{run} isn't finished: go on with `python train.py --resume {run}`")
    find_judge(args.judge, args.judge_model)            # is it there? Answering can take hours
    has_sets = bool(args.sets or args.set)
    if has_sets != bool(args.out) or args.attack and not has_sets:
        raise InputError("--out DIR goes with sets (--sets, --set), and sets go with --out DIR; "
                         "--attack wants both")

    # Answer, then judge
    folder = Path(args.out or run).expanduser()
    if args.out:
        answer_sets(args, run, folder)
    parallel.on_rank_zero(conclude, folder, args)


def sets_of(args, settings) -> dict[str, EvalSet]:
    """The sets that --sets and --set name, under --attack."""
    files = {}
    for text in args.set:
        name, _, file = text.partition("=")
        if not file:
            raise InputError(f"--set {text}: give NAME=FILE")
        files[name] = absolute(file)
    trained = {pair.turns for pair in read_pairs(data_file(settings.data))[0]}
    most = settings.eval_prompts if args.prompts is None else args.prompts
    sets = load_sets(places(args.sets, files), trained, most)
    if args.attack:
        sets = attack.attacked_sets(sets, args.attack, args.template, args.target)
    return sets


def answer_sets(args, run, out):
    """Answers of base and adapter to the sets, in the folder `out`; those there stay."""
    if args.attack == "gcg" and parallel.world_size() > 1:
        raise InputError("--attack gcg runs in one process: start it without torchrun")
    # All inputs are read before the folder is made
    settings = saved_settings(run)
    source = model_folder(settings.model)
    with parallel.agreed():
        device = check_device(args.device or settings.device)
        tokenizer = load_tokenizer(source)
        sets = sets_of(args, settings)
    parallel.on_rank_zero(open_folder, out, args)
    with parallel.agreed():
        shard = parallel.shard if settings.shard else None
        model = load_model(source, getattr(torch, settings.dtype), device, shard)
    limit_threads(model)

    # The adapter goes on top of the base model, which has answered by then
    replies = partial(answer, model, tokenizer, max_new_tokens=settings.max_new_tokens,
                      batch_size=settings.eval_batch, format=settings.format)
    plan = attack.Plan(args.attack_steps, args.attack_width, args.attack_length, args.target)
    for name in MODELS:
        if name == "adapter":
            lora.load_adapter(model, run)
        if args.attack == "gcg":
            attack.gcg(out, name, model, tokenizer, sets, replies, plan, settings.format)
        else:
            complete(out, name, model, tokenizer, sets, settings)


def open_folder(out, args):
    """Make a folder for these answers, or go on in one that has the same flags in its eval.json."""
    flags = {name: value for name, value in vars(args).items()
             if name not in ("out", "device", "judge", "judge_model")}
    path = out / "eval.json"
    if not is_new(out) and not (path.exists() and read_json(path) == flags):
        raise InputError(f"{out} isn't of these sets and this run: give another --out")
    write_json(path, flags)


def conclude(folder, args):
    """Judge the answers, write scores.json, print the table."""
    path = folder / FINISHED
    suffixes = folder / "attacks.jsonl"
    scores = score(folder, judge=args.judge, judge_model=args.judge_model, device=args.device)
    if path.exists():
        scores = read_json(path) | scores       # a run's own has more than figures
    if suffixes.exists():
        scores["attacks"] = attack.success(read_jsonl(suffixes))
    write_json(path, scores)
    print(f"\n{result_table(scores)}\n")
    if suffixes.exists():
        print(f"suffixes: {suffixes}")
    else:
        print(f"{samples(folder)}\n\nanswers: {folder / 'completions.jsonl'}")


if __name__ == "__main__":
    parallel.run(main)
