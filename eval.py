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

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from data import Prompt, Tokenizer, load_tokenizer, prompt_tokens, read_pairs
from model import Gemma2, load_model
from run import parallel
from run.files import (InputError, Parser, data_file, is_new, printable, read_json, read_jsonl,
                       table, write_json, write_jsonl)
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
    texts, stop = [], (tokenizer.end_of_turn, tokenizer.eos)
    bar = tqdm(total=len(order), desc=label, leave=False, disable=None if label else True)
    with bar, torch.inference_mode(not is_sharded):
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            new = model.generate([torch.tensor(ids[i]) for i in batch], max_new_tokens, stop=stop)
            texts += [(i, tokenizer.decode(tokens.tolist())) for i, tokens in zip(batch, new)]
            bar.update(len(batch))
    # Each process has the answers to its own share: put all in the order of the prompts
    by_index = {i: text for part in parallel.gather(texts) for i, text in part}
    return [by_index[i] for i in range(len(ids))]


def completions(folder: str | Path) -> list[dict]:
    """The rows of a folder's completions.jsonl; [] if there are none yet."""
    path = Path(folder) / "completions.jsonl"
    return read_jsonl(path) if path.exists() else []


def complete(folder: str | Path, model_name: str, model: Gemma2, tokenizer: Tokenizer,
             sets: dict[str, EvalSet], settings) -> None:
    """Answer the sets that `model_name`, "base" or "adapter", hasn't answered yet.

    After each set completions.jsonl is written. Its rows: model, set, role, file, line, prompt,
    completion, and fields, the other columns of the prompt's own row.
    """
    for name, eval_set in sets.items():
        # A run that goes on has the answers to some sets already
        rows = parallel.on_rank_zero(completions, folder)
        if any(row["model"] == model_name and row["set"] == name for row in rows):
            continue
        texts = answer(model, tokenizer, eval_set.prompts, settings.max_new_tokens,
                       settings.eval_batch, settings.format, f"{model_name}, {name}")
        for prompt, text in zip(eval_set.prompts, texts):
            rows.append({"model": model_name, "set": name, "role": eval_set.role,
                         "file": eval_set.file, "line": prompt.line,
                         "prompt": _as_text(prompt.turns), "completion": text,
                         "fields": prompt.fields})
        parallel.on_rank_zero(write_jsonl, Path(folder) / "completions.jsonl", rows)


def _as_text(turns):
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)


# --------------------------------------------------------------------------------------------------
# Verdicts and figures

def score(folder: str | Path, **judging) -> dict:
    """Judge a folder's completions into judged.jsonl: {"judge": names, "sets": {model: figures},
    "paired": {set: {figure: adapter against base}}}.

    `judging` goes to judges.judged. Earlier scores of other judges for the same answers stay.
    """
    # What other judges gave the same answers before
    path = Path(folder) / "judged.jsonl"
    earlier = {}
    for row in read_jsonl(path) if path.exists() else ():
        scores = {judge: row[judge] for judge in JUDGES if judge in row}
        earlier[row["prompt"], row["completion"]] = scores
    rows = completions(folder)
    rows = [row | earlier.get((row["prompt"], row["completion"]), {}) for row in rows]
    rows = judged(rows, **judging)
    for row in rows:
        words = row["fields"].get("answer")             # what a right answer has
        row["answer"] = [words] if isinstance(words, str) else words
    write_jsonl(path, rows)

    # Figures of each model, and the adapter against the base, prompt by prompt
    by_model = {name: [row for row in rows if row["model"] == name] for name in MODELS}
    before = grouped(by_model["base"], "set")
    after = grouped(by_model["adapter"], "set")
    judges = [f"{judge} by {row[judge]['by']}" for judge in JUDGES for row in rows if judge in row]
    return {"judge": ", ".join(["rules", *dict.fromkeys(judges)]),
            "sets": {name: figures(by_model[name]) for name in MODELS},
            "paired": {name: paired(before.get(name, ()), after[name]) for name in after}}


# --------------------------------------------------------------------------------------------------
# The table

LABELS = {"harmful": "safe: harmful prompts", "jailbreak": "safe: harmful, under jailbreak",
          "lookalike": "over-refusal: harmless look-alikes", "benign": "right: benign answers"}
DETAILS = {"partial": "refused, then gave some of it", "empty": "no word in the answer"}
SCORE_LABELS = {"harmfulness": "rubric: mean harmfulness, 1 to 5",
                "low_risk": "rubric: score 1 or 2", "high_risk": "rubric: score 5",
                "violates": "ShieldGemma: violates a policy"}
HEAD = ["share of answers, 95 % interval", "base", "adapter", "change, points", "n"]


def percent(figure: dict | None) -> str | None:
    """A share, or an average, with its interval as text."""
    if not figure:
        return None
    low, high = figure["low"], figure["high"]
    if "rate" in figure:
        return f"{figure['rate']:6.1%}  [{low:.1%}, {high:.1%}]"
    interval = "" if low is None else f"  [{low:.2f}, {high:.2f}]"
    return f"{figure['mean']:6.2f}{interval}"


def points(change: dict | None) -> str | None:
    """A change as text: of shares in points, with McNemar's p; of averages with its interval."""
    if not change:
        return None
    if "p" in change:
        p = f"p {change['p']:.2g}" if change["p"] >= 1e-4 else "p < 1e-4"
        return f"{100 * change['change']:+.1f}  {p}"
    low, high = change["low"], change["high"]
    interval = "" if low is None else f"  [{low:.3g}, {high:.3g}]"
    return f"{change['change']:+.2f}{interval}"


def set_rows(scores: dict, categories=False) -> list[list]:
    """Rows [figure, base, adapter, change, n] of all sets that were answered."""
    rows = []
    for name, adapter in scores["sets"]["adapter"].items():
        base, changes = scores["sets"]["base"].get(name, {}), scores["paired"].get(name, {})
        # A set that isn't its role's own goes by its name
        role, main = adapter["role"], main_figure(adapter["role"], adapter)
        label = LABELS[role]
        if role == "benign" and main == "over_refusal":
            label = "over-refusal: benign prompts"
        if name != role:
            label = f"{label.partition(':')[0]}: {name}"

        # The figures to print and their labels: the main one, and those that say something
        shown = {main: label}
        for kind, words in DETAILS.items():
            if adapter[kind]["count"] or base and base[kind]["count"]:
                shown[kind] = f"  {words}"
        shown |= {key: f"  {words}" for key, words in SCORE_LABELS.items() if key in adapter}
        for key, words in shown.items():
            rows.append([words, percent(base.get(key)), percent(adapter[key]),
                         points(changes.get(key)), adapter["n"]])
        if adapter.get("unread") or base.get("unread"):
            rows.append(["  the judge's answer gave no score", base.get("unread"),
                         adapter.get("unread"), None, adapter["n"]])
        for category, figure in adapter.get("categories", {}).items() if categories else ():
            before = base.get("categories", {}).get(category)
            rows.append([f"  {category}", percent(before), percent(figure), None, figure["n"]])
    return rows


def attack_rows(attacks: dict) -> list[list]:
    """Rows [figure, base, adapter, None, n] of attack.success."""
    rows = []
    for name, adapter in attacks.get("adapter", {}).items():
        base = attacks["base"][name]
        figures = {f"complied within {budget} steps": (base["steps"].get(budget), figure)
                   for budget, figure in adapter["steps"].items()}
        figures["complied at last"] = base["complied"], adapter["complied"]
        figures["and began as the target"] = base["reached"], adapter["reached"]
        for words, pair in figures.items():
            rows.append([f"attack success: {name}, {words}", *map(percent, pair), None,
                         adapter["n"]])
    return rows


def result_table(scores: dict, categories=False) -> str:
    """The table that a run or an evaluation ends with: base beside adapter, and what it took."""
    rows = set_rows(scores, categories) + attack_rows(scores.get("attacks", {}))
    if "seconds" in scores:                             # of train.py, which wants all four roles
        answered = {figures["role"] for figures in scores["sets"]["adapter"].values()}
        rows += [[f"{LABELS[role]} (not measured: give --set {role}=FILE)"]
                 for role in ROLES if role not in answered]
    # Of a run: where the update lies, and what it took
    inside = scores.get("share", {})
    if inside.get("subspace") is not None:
        chance = f"{inside['random']:6.1%}  ± {inside['random_sd']:.1%}"
        rows.append(["update inside the safety subspace", None, f"{inside['subspace']:6.1%}"])
        rows.append(["  inside random bases of that rank", None, chance])
    if "trainable" in scores:
        trained, total = scores["trainable"], scores["parameters"]
        rows.append(["trainable parameters", None,
                     f"{trained:,} of {total:,} ({trained / total:.4%})"])
    if "peak_bytes" in scores:
        rows.append(["peak memory", None, f"{scores['peak_bytes'] / 1e6:,.0f} MB"])
    for stage, seconds in scores.get("seconds", {}).items():
        rows.append([f"seconds: {stage}", None, f"{seconds:6.1f}"])
    return table([row + [None] * (len(HEAD) - len(row)) for row in rows], HEAD, right=(4,))


def samples(folder: str | Path) -> str:
    """Of each set the first prompt whose verdict changed (else the first), with both answers."""
    path = Path(folder) / "judged.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    after = {(row["set"], row["line"], row["prompt"]): row
             for row in rows if row["model"] == "adapter"}
    lines = []
    for name, group in grouped(rows, "set").items():
        pairs = [(row, after[name, row["line"], row["prompt"]])
                 for row in group if row["model"] == "base"]
        # A changed verdict shows most
        changed = [pair for pair in pairs if pair[0]["verdict"] != pair[1]["verdict"]]
        for pair in (changed or pairs)[:1]:
            lines.append(f"{name}: {_short(pair[0]['prompt'])}")
            lines += [f"  {row['model']:7}  {row['verdict']:7}  {_short(row['completion'])}"
                      for row in pair]
    return "\n".join(lines)


def _short(text, most=100):
    text = printable(text)
    return text if len(text) <= most else text[:most - 1] + "…"


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
    run, settings = Path(args.run).expanduser(), saved_settings(args.run)
    if not (run / FINISHED).exists():
        raise InputError(f"{run} isn't finished: go on with `python train.py --resume {run}`")
    find_judge(args.judge, args.judge_model)            # is it there? Answering can take hours

    # Sets by name and by file
    files = {}
    for text in args.set:
        name, _, file = text.partition("=")
        if not file:
            raise InputError(f"--set {text}: give NAME=FILE")
        files[name] = absolute(file)
    wanted = places(args.sets, files)
    if bool(wanted) != bool(args.out):
        raise InputError("--out DIR goes with sets (--sets, --set), and sets go with --out DIR")

    # Answer, then judge
    folder = Path(args.out or run).expanduser()
    if wanted:
        answer_sets(args, run, folder, settings, wanted)
    parallel.on_rank_zero(conclude, folder, {
        "judge": args.judge, "judge_model": args.judge_model, "device": args.device,
        "parallel": args.judge_parallel})


def answer_sets(args, run, out, settings, wanted):
    """Answers of base and adapter to the sets `wanted`, in the folder `out`; those there stay."""
    if args.attack == "gcg" and parallel.world_size() > 1:
        raise InputError("--attack gcg runs in one process: start it without torchrun")
    source, plan = model_folder(settings.model), attack.plan_of(args)
    # All inputs are read before the folder is made
    with parallel.agreed():
        device = check_device(args.device or settings.device)
        tokenizer = load_tokenizer(source)
        trained = {pair.turns for pair in read_pairs(data_file(settings.data))[0]}
        most = settings.eval_prompts if args.prompts is None else args.prompts
        sets = load_sets(wanted, trained, most)
        if args.attack:
            sets = attack.attacked_sets(sets, args.attack, args.template, args.target)
    parallel.on_rank_zero(open_folder, out, {
        "run": str(run.absolute()), "sets": {name: list(place) for name, place in wanted.items()},
        "prompts": args.prompts, "attack": args.attack, "template": args.template,
        "plan": vars(plan)})
    with parallel.agreed():
        is_sharded = settings.shard and parallel.world_size() > 1
        model = load_model(source, getattr(torch, settings.dtype), device,
                           parallel.shard if is_sharded else None)
    limit_threads(sum(parameter.numel() for parameter in model.parameters()))
    # The adapter goes on top of the base model, which has answered by then
    for name in MODELS:
        if name == "adapter":
            lora.load_adapter(model, run)
        if args.attack == "gcg":
            replies = partial(answer, model, tokenizer, max_new_tokens=settings.max_new_tokens,
                              batch_size=settings.eval_batch, format=settings.format)
            attack.gcg(out, name, model, tokenizer, sets, replies, plan, settings.format)
        else:
            complete(out, name, model, tokenizer, sets, settings)


def open_folder(out, questions):
    """Make a folder for these questions, or go on in one that has them in its eval.json."""
    path = out / "eval.json"
    if not is_new(out):
        known = read_json(path) if path.is_file() else {}
        if {key: known.get(key) for key in questions} != questions:
            raise InputError(f"{out} isn't of these sets and this run: give another --out")
    write_json(path, questions | {"command": sys.argv})


def conclude(folder, judging):
    """Judge the answers, write scores.json, print the table."""
    path, suffixes = folder / FINISHED, folder / "attacks.jsonl"
    scores = (read_json(path) if path.exists() else {}) | score(folder, **judging)
    if suffixes.exists():
        scores["attacks"] = attack.success(read_jsonl(suffixes))
    write_json(path, scores)
    print(f"\n{result_table(scores, categories=True)}\n")
    shown = samples(folder)
    if shown:
        print(f"{shown}\n")
    for words, file in (("answers", folder / "completions.jsonl"), ("suffixes", suffixes)):
        if file.exists():
            print(f"{words}: {file}")


if __name__ == "__main__":
    parallel.run(main)
