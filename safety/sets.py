"""Prompt sets that the field evaluates on, by name: what each holds, where it comes from, and under which licence.

    python eval.py --list
    python eval.py RUN --sets jailbreakbench xstest --set xstest=xstest_prompts.csv --out DIR

A name stands for every set that begins with it: `xstest` for xstest-safe and xstest-unsafe. What the Hugging Face hub holds as a plain
file is fetched; the others are files that `--set NAME=FILE` says.
"""

import random
from collections.abc import Container, Iterable
from dataclasses import dataclass

from data import Prompt, read_prompts
from run.files import InputError, data_file
from run.settings import HH, SETS as ROLES, TOY
from run.files import table

JBB = "hf://datasets/JailbreakBench/JBB-Behaviors/data"


@dataclass(frozen=True)
class Source:
    role: str           # what a refusal means there: one of recipe.SETS
    size: int           # prompts, as published
    licence: str
    place: str          # a file here or on the hub; else where a person finds it

    @property
    def fetched(self):
        return not self.place.startswith("https://")


NAMED = {
    "hh-rlhf": Source("harmful", 2312, "MIT", f"{HH}/test.jsonl.gz"),
    "advbench": Source("harmful", 520, "MIT", "https://github.com/llm-attacks/llm-attacks (harmful_behaviors.csv)"),
    "harmbench": Source("harmful", 400, "MIT", "https://github.com/centerforaisafety/HarmBench (harmbench_behaviors_text_all.csv)"),
    "jailbreakbench-harmful": Source("harmful", 100, "MIT", f"{JBB}/harmful-behaviors.csv"),
    "jailbreakbench-benign": Source("lookalike", 100, "MIT", f"{JBB}/benign-behaviors.csv"),
    "strongreject": Source("harmful", 313, "MIT", "https://github.com/alexandrasouly/strongreject (strongreject_dataset.csv)"),
    "malicious-instruct": Source("harmful", 100, "none stated", "https://github.com/Princeton-SysML/Jailbreak_LLM (MaliciousInstruct.txt)"),
    "xstest-safe": Source("lookalike", 250, "CC-BY-4.0", "https://github.com/paul-rottger/exaggerated-safety (xstest_prompts.csv)"),
    "xstest-unsafe": Source("harmful", 200, "CC-BY-4.0", "https://github.com/paul-rottger/exaggerated-safety (xstest_prompts.csv)"),
    "hex-phi": Source("harmful", 330, "gated, its own",
                      "https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI (ask there, then one file of all)"),
    **{f"toy-{role}": Source(role, 128, "this project's", str(TOY / f"data/{role}.jsonl")) for role in ROLES},
}


def listing() -> str:
    """The table of `eval.py --list`."""
    rows = [[name, source.role, source.size, source.licence, source.place if source.fetched else f"--set {name}=FILE from {source.place}"]
            for name, source in NAMED.items()]
    return table(rows, ["set", "role", "prompts", "licence", "source"], right=(2,))


def places(names: Iterable[str], files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """{set: (role, file)} of the sets `names`, and of those in `files` {name: file}. Raises InputError.

    NAME:ROLE in `files` is a set that isn't known here, of the prompts of one role.
    """
    found = {}
    for key, file in files.items():
        name, _, role = key.partition(":")
        fitting = [known for known in NAMED if known == name or known.startswith(f"{name}-")]
        if role not in ("", *ROLES) or not (fitting or role) or fitting and role:
            raise InputError(f"--set {key}: the name of a set (see --list) or, of another one, NAME:ROLE with a role of {', '.join(ROLES)}")
        found |= {known: (NAMED[known].role, file) for known in fitting} if fitting else {name: (role, file)}
    for name in names:
        fitting = [known for known in NAMED if known == name or known.startswith(f"{name}-")]
        if not fitting and name not in found:
            raise InputError(f"--sets {name}: known are {', '.join(NAMED)}; of another one say --set {name}:ROLE=FILE")
        for known in fitting:
            source = NAMED[known]
            if known not in found and not source.fetched:
                raise InputError(f"--sets {name}: the hub doesn't hold it as a plain file: get it from {source.place}, "
                                 f"then --set {known}=FILE")
            found.setdefault(known, (source.role, source.place))
    return found


@dataclass
class Asked:
    """An evaluation set as it is asked: its role, the file, and the prompts that are left of it."""
    role: str
    file: str
    prompts: list[Prompt]


def load(places: dict[str, tuple[str, str]], trained: Container = (), most=0) -> dict[str, Asked]:
    """{name: Asked} of {name: (role, file)}, less the prompts (turns) in `trained`; at most `most` prompts each, 0: all.

    Which ones are drawn doesn't hang on a run's seed. XSTest and its like hold both kinds, and a column `label` says which:
    rows of the other kind than the role's are left out, and so are HarmBench's that make sense only with their context.
    What is left out is printed. Raises InputError.
    """
    sets = {}
    for name, (role, file) in places.items():
        prompts, counts = read_prompts(data_file(file))
        other = "unsafe" if role in ("lookalike", "benign") else "safe"
        fitting = [prompt for prompt in prompts if prompt.fields.get("label") != other and not prompt.fields.get("ContextString")]
        kept = [prompt for prompt in fitting if prompt.turns not in trained]
        print(f"{name}: {counts}; of these {len(prompts) - len(fitting)} labelled {other} or in need of a "
              f"context and {len(fitting) - len(kept)} trained on are left out")
        if not kept:
            raise InputError(f"{file} holds no prompt for {name} that isn't trained on")
        sets[name] = Asked(role, str(file), random.Random(0).sample(kept, most) if 0 < most < len(kept) else kept)
    return sets
