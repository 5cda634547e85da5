"""Judge the answers of a finished run again, or answer and judge other prompts with its base model and its adapter.

    python eval.py runs/20260101-120000-toy                                        # judge what is answered; no model is loaded
    python eval.py RUN --judge shieldgemma                                         # by another judge too
    python eval.py --list                                                          # the sets that are known by name
    python eval.py RUN --sets jailbreakbench xstest --set xstest=FILE --out other  # other sets, into a folder of their own
    python eval.py RUN --sets advbench --set … --attack gcg --out gcg              # under attack: attack.py
    python eval.py RUN --perplexity FILE --choices FILE --out lost                 # what it has cost: likelihoods
    torchrun --nproc-per-node 4 eval.py RUN --sets hh-rlhf --out hh                # each process answers its share

Answers are in completions.jsonl, one a line, and judging reads only that file: a changed judge needs no new answers.
"""

import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch

from safety import attack
import lora
from run import parallel
from run import settings as recipe
from safety import sets
from data import load_tokenizer
from data import read_pairs, read_texts
from figures import HARMFUL, WHO, complete, score
from run.files import InputError, Parser, data_file, is_new, read_json, sweep, write_json
from safety.judges import add_judge_flags
from safety.judges import settle as settle_judge
from model import load_model
from report.page import write_page
from report.runs import read_scores, result_table, samples
from run.session import Lock

LIKELIHOODS = {"perplexity": "benign text, .txt or .jsonl: perplexity before and after",
               "choices": "multiple-choice questions, JSON lines: accuracy before and after"}

PLAN = {"steps": "gcg: steps of the search for one prompt, at most", "width": "gcg: candidates a step",
        "top": "gcg: tokens drawn from at each place", "length": "gcg: tokens of a suffix",
        "check": "gcg: steps between looks at the answer", "batch": "gcg: candidates of one forward"}


def named_file(text):
    """NAME=FILE of --set, as a pair."""
    name, equal, file = text.partition("=")
    if not (name and equal and file):
        raise InputError(f"--set {text}: say NAME=FILE")
    return name, recipe.absolute(file)


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a finished run of train.py")
    parser.add_argument("--list", action="store_true", help="print the sets that are known by name, and stop")
    parser.add_argument("--sets", metavar="NAME", nargs="+", default=[], help="sets by name: see --list")
    parser.add_argument("--set", metavar="NAME=FILE", action="append", default=[], help="the file of a set; NAME:ROLE=FILE for one "
                        f"that isn't known, of one role: {', '.join(recipe.SETS)}")
    for name, what in LIKELIHOODS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=what)
    for name, what in recipe.SETS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=f"short for --set {name}:{name}=FILE ({what})")
    parser.add_argument("--prompts", metavar="N", type=int, help="prompts taken of each set; 0: all (default: as in the run)")
    add_judge_flags(parser)
    group = parser.add_argument_group("attacks on the harmful prompts among those asked (attack.py)")
    group.add_argument("--attack", choices=("prefix", "template", "gcg"), help="prefix: ask for an answer that begins with the target; "
                       "template: put prompts into those of --template; gcg: search each prompt a suffix")
    group.add_argument("--template", metavar="FILE", help="texts with {prompt} and, where wanted, {target}; one a line, or separated "
                       "by lines of ---")
    group.add_argument("--target", metavar="TEXT", help="what the answer is to begin with; {prompt} and a row's {field} are put in "
                       f"(default: the row's own target, else {attack.TARGET!r})")
    for name, what in PLAN.items():
        group.add_argument(f"--attack-{name}", type=int, metavar="N", help=f"{what} (default {getattr(attack.Plan(), name)})")
    parser.add_argument("--out", metavar="DIR", help="where answers to other sets go; the run's own are never touched")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: where the run was made)")
    args = parser.parse_args()
    if args.list:
        return print(sets.listing())
    if not args.run:
        raise InputError("give the folder of a finished run of train.py (or --list)")
    folder, settings = Path(args.run).expanduser(), recipe.saved(args.run)
    read_scores(folder)                                                              # is it finished?
    judging = {"judge": args.judge, "judge_model": args.judge_model, "device": args.device, "parallel": args.judge_parallel}
    settle_judge(args.judge, args.judge_model, args.judge_parallel)
    short = {f"{name}:{name}": recipe.absolute(getattr(args, name)) for name in recipe.SETS if getattr(args, name)}
    places = sets.places(args.sets, dict(map(named_file, args.set)) | short)
    likelihoods = {name: recipe.absolute(getattr(args, name)) for name in LIKELIHOODS if getattr(args, name)}
    if bool(places or likelihoods) != bool(args.out):
        raise InputError("--out DIR goes with something to answer (--sets, --set, --perplexity, --choices), and these with it")
    out = Path(args.out).expanduser() if args.out else folder
    planned = {name: value for name in PLAN if (value := getattr(args, f"attack_{name}")) is not None}
    plan = attack.Plan(**planned, target=args.target)
    if planned and args.attack != "gcg":
        raise InputError(f"--attack-{next(iter(planned))} goes with --attack gcg")
    if args.target is not None and not args.attack:
        raise InputError("--target goes with --attack")
    if args.attack and not args.out:
        raise InputError("--attack goes with sets of harmful prompts (--sets, --set) and --out DIR")
    if args.prompts is not None and args.prompts < 0:
        raise InputError(f"--prompts {args.prompts}: give a number, or 0 for all")
    if bool(args.template) != (args.attack == "template"):
        raise InputError("--template FILE goes with --attack template, and it with that")
    if args.out:
        this = {"run": str(folder.absolute()), "sets": {name: list(place) for name, place in places.items()}, "prompts": args.prompts}
        this |= likelihoods
        if args.attack:
            this |= {"attack": args.attack, "template": args.template and recipe.absolute(args.template), "plan": vars(plan)}
        ask(out, folder, settings, places, likelihoods, args, plan, this)
    parallel.on_rank_zero(conclude, out, judging)


def settle(out, this):
    """Make the folder for other sets, with its eval.json, or find it with the answers to the same ones, to go on with. Its Lock."""
    out.mkdir(parents=True, exist_ok=True)
    held = Lock(out)
    path, made = out / "eval.json", {"command": sys.argv, "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    if not is_new(out) and (not path.is_file() or {name: value for name, value in read_json(path).items() if name not in made} != this):
        raise InputError(f"{out} is there and isn't of these sets and this run: give another --out")
    sweep(out)
    write_json(path, this | made)
    return held


def ask(out, folder, settings, places, likelihoods, args, plan, this):
    """Answer the sets and read the likelihoods, first with the base model, then with the adapter on it; found answers stay.
    The folder is made, with `this` in it, once all that is asked could be read."""
    source = recipe.folder(settings.model)
    with parallel.agreed():
        device = recipe.check_device(args.device or settings.device)
        tokenizer = load_tokenizer(source)
        most = settings.eval_prompts if args.prompts is None else args.prompts
        asked = sets.load(places, {pair.turns for pair in read_pairs(data_file(settings.data))[0]}, most)
        if args.attack:
            asked = attacked(asked, args)
        texts = list(read_texts(data_file(likelihoods["perplexity"]))) if "perplexity" in likelihoods else []
        questions = ability.read_questions(data_file(likelihoods["choices"])) if "choices" in likelihoods else []
        if "perplexity" in likelihoods and not texts:
            raise InputError(f"{likelihoods['perplexity']} holds no text")
    with parallel.agreed():
        held = settle(out, this) if parallel.rank() == 0 else None                  # noqa: F841
    with parallel.agreed():
        model = load_model(source, getattr(torch, settings.dtype), device, parallel.shard if settings.shard else None)
    for who in WHO:
        if who == "adapter":
            with parallel.agreed():
                lora.load_adapter(model, folder)
        if args.attack == "gcg":
            attack.gcg(out, who, model, tokenizer, asked, settings, plan)
        else:
            complete(out, who, model, tokenizer, asked, settings)
        path = out / f"likelihoods-{who}.json"
        if likelihoods and not parallel.on_rank_zero(path.exists):
            told = {"perplexity": ability.perplexity(model, tokenizer, texts, f"{who}, perplexity"),
                    "choices": ability.choices(model, tokenizer, questions, f"{who}, choices")}
            parallel.on_rank_zero(write_json, path, told)


def attacked(asked, args):
    """What of the sets is attacked, those of harmful prompts; in templates where the attack is one, each a set of its own."""
    asked = {name: one for name, one in asked.items() if one.role in HARMFUL}
    if not asked:
        raise InputError("--attack: none of the sets is of harmful prompts")
    if args.attack == "gcg":
        return asked
    templates = attack.read_templates(args.template) if args.template else [attack.PREFIX]
    return {f"{name}+{args.attack}{number if len(templates) > 1 else ''}":
                replace(one, prompts=attack.wrapped(one.prompts, template, args.target))
            for name, one in asked.items() for number, template in enumerate(templates, 1)}


def conclude(out, judging):
    """Judge the answers, write scores.json and report.html, print the table."""
    held = Lock(out)                                                                 # noqa: F841
    path = out / "scores.json"
    scores = (read_json(path) if path.exists() else {}) | score(out, **judging)
    if found := attack.success(attack.attacks(out)):
        scores["attacks"] = found
    write_json(path, scores)
    write_page([out], out / "report.html")
    print(f"\n{result_table(scores, categories=True)}\n")
    if shown := samples(out):
        print(f"{shown}\n")
    for what, file in (("answers", "completions.jsonl"), ("suffixes", "attacks.jsonl"), ("page", "report.html")):
        if (out / file).exists():
            print(f"{what}: {out / file}")


if __name__ == "__main__":
    parallel.run(main)
