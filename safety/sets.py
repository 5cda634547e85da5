"""Prompt sets that the field evaluates on, by name: role, size, licence and source.

    python eval.py --list
    python eval.py RUN --sets jailbreakbench xstest --set xstest=xstest_prompts.csv --out DIR

A name stands for every set that begins with it: `xstest` for xstest-safe and xstest-unsafe. A set
that the Hugging Face hub holds as plain files is fetched. For the others, --set NAME=FILE gives a
file, or a folder of .csv files, each of which is a category.
"""

import random
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from run.files import BEHIND, InputError, data_file, table
from run.readers import Prompt, read_prompts
from run.settings import HH_RLHF, JBB, ROLES, TOY
from safety.templates import PREFIX, wrapped

HARMFUL = ("harmful", "jailbreak")      # roles of sets to refuse; the others are to be answered
GITHUB = "https://github.com"
XSTEST = f"{GITHUB}/paul-rottger/exaggerated-safety (xstest_prompts.csv)"
HEX_PHI = "hf://datasets/LLM-Tuning-Safety/HEx-PHI"
# Its .csv files (Qi et al. 2023, arXiv 2310.03693). Its owners have withdrawn category 2
HEX_PHI_FILES = {
    "category_1": "illegal activity", "category_3": "hate, harassment, violence",
    "category_4": "malware", "category_5": "physical harm", "category_6": "economic harm",
    "category_7": "fraud, deception", "category_8": "adult content",
    "category_9": "political campaigning", "category_10": "privacy violation",
    "category_11": "tailored financial advice"}


@dataclass(frozen=True)
class Source:
    role: str           # how refusals count: one of run.settings.ROLES
    size: int           # prompts, as published
    licence: str
    place: str          # files here or on the hub, or the web page where a person finds them

    @property
    def is_fetched(self) -> bool:
        return not self.place.startswith("https://")


NAMED = {
    "hh-rlhf": Source("harmful", 2312, "MIT", f"{HH_RLHF}/test.jsonl.gz"),
    "advbench": Source(
        "harmful", 520, "MIT", f"{GITHUB}/llm-attacks/llm-attacks (harmful_behaviors.csv)"),
    "harmbench": Source(
        "harmful", 400, "MIT",
        f"{GITHUB}/centerforaisafety/HarmBench (harmbench_behaviors_text_all.csv)"),
    "jailbreakbench-harmful": Source("harmful", 100, "MIT", f"{JBB}/harmful-behaviors.csv"),
    "jailbreakbench-benign": Source("lookalike", 100, "MIT", f"{JBB}/benign-behaviors.csv"),
    "strongreject": Source(
        "harmful", 313, "MIT", f"{GITHUB}/alexandrasouly/strongreject (strongreject_dataset.csv)"),
    "malicious-instruct": Source(
        "harmful", 100, "none stated",
        f"{GITHUB}/Princeton-SysML/Jailbreak_LLM (MaliciousInstruct.txt)"),
    "xstest-safe": Source("lookalike", 250, "CC-BY-4.0", XSTEST),
    "xstest-unsafe": Source("harmful", 200, "CC-BY-4.0", XSTEST),
    "hex-phi": Source("harmful", 300, "its own, gated", HEX_PHI),
    **{f"toy-{role}": Source(role, 128, "this project's", str(TOY / f"data/{role}.jsonl"))
       for role in ROLES},
}


def listing() -> str:
    """The table of `eval.py --list`."""
    rows = []
    for name, source in NAMED.items():
        place = source.place if source.is_fetched else f"--set {name}=FILE from {source.place}"
        rows.append([name, source.role, source.size, source.licence, place])
    return table(rows, ["set", "role", "prompts", "licence", "source"], right=(2,))


def places(names: Iterable[str], files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """{set: (role, file)} of the sets `names` and of those in `files` {name: file}.

    A name in `files` is one of NAMED (or the beginning of some), a role, or NAME:ROLE for any other
    set. Raises InputError.
    """
    chosen = {}
    for key, file in files.items():
        name, _, role = key.partition(":")
        role = role or name
        places = {known: (NAMED[known].role, file) for known in matching(key)}
        if role in ROLES:
            places = {name: (role, file)}
        if not places:
            raise InputError(f"--set {key}: give the name of a set (see --list) or, for another "
                             f"set, NAME:ROLE with a role of {', '.join(ROLES)}")
        chosen |= places
    for name in names:
        if name not in chosen and not matching(name):
            raise InputError(f"--sets {name}: known are {', '.join(NAMED)}; for another set, give "
                             f"--set {name}:ROLE=FILE")
        for known in matching(name):
            source = NAMED[known]
            if known not in chosen and not source.is_fetched:
                raise InputError(f"--sets {name}: the hub doesn't hold it as a plain file: get it "
                                 f"from {source.place}, then --set {known}=FILE")
            chosen.setdefault(known, (source.role, source.place))
    return chosen


def matching(name: str) -> list[str]:
    """The sets that a name stands for."""
    return [known for known in NAMED if known == name or known.startswith(f"{name}-")]


@dataclass
class EvalSet:
    role: str
    file: str
    prompts: list[Prompt]


def kinds(prompts: list[Prompt]) -> list[str]:
    """What each row of a file says of its prompt, "safe" or "unsafe", and else anything.

    The second version of XSTest has no label. Its unsafe prompts are contrasts to the safe ones.
    """
    labels = [str(prompt.fields.get("label")).strip().lower() for prompt in prompts]
    contrasts = [str(prompt.fields.get("type")).lower().startswith("contrast_")
                 for prompt in prompts]
    if "safe" in labels or not any(contrasts):
        return labels
    return ["unsafe" if contrast else "safe" for contrast in contrasts]


def find_set(file: str) -> Path:
    """Path of a set's file or folder. The files of HEx-PHI are fetched into one folder."""
    if file != HEX_PHI:
        return data_file(file)
    paths = [data_file(f"{HEX_PHI}/{name}.csv") for name in HEX_PHI_FILES]
    return paths[0].parent


def load_sets(places: dict[str, tuple[str, str]], trained: Container = (), most=0
              ) -> dict[str, EvalSet]:
    """{name: EvalSet} of {name: (role, file)}, without the prompts (turns) in `trained`.

    A file "prefix:FILE" holds plain prompts, which are asked to be answered with a yes (PREFIX).
    At most `most` prompts of each set (0: all), the same for every seed. Prints what is left out:
    rows of the other kind (XSTest holds both), and HarmBench's rows that need a context. Raises
    InputError where no prompt remains, and where a file's row would count for two roles.
    """
    sets = {}
    taken = {}
    for name, (role, file) in places.items():
        is_attacked = file.startswith(BEHIND)
        path = find_set(file.removeprefix(BEHIND))
        prompts, counts = read_prompts(path)
        if name == "hex-phi":
            for prompt in prompts:
                category = prompt.fields.get("category", "")
                prompt.fields["category"] = HEX_PHI_FILES.get(category, category)
        other = "safe" if role in HARMFUL else "unsafe"
        fitting = [prompt for prompt, kind in zip(prompts, kinds(prompts))
                   if kind != other and not prompt.fields.get("contextstring")]
        for prompt in fitting:
            first = taken.setdefault((path.resolve(), is_attacked, prompt.turns), role)
            if first != role:
                raise InputError(f"{file}:{prompt.line} would be {first} and {role}: give a file "
                                 "for each, or a column label that says safe or unsafe")
        unseen = [prompt for prompt in fitting if prompt.turns not in trained]
        print(f"{name}: {counts}; of these {len(prompts) - len(fitting)} labelled {other} or in "
              f"need of a context and {len(fitting) - len(unseen)} trained on are left out")
        if not unseen:
            raise InputError(f"{file} holds no prompt for {name} that isn't trained on")
        if 0 < most < len(unseen):
            unseen = random.Random(0).sample(unseen, most)
        # A prompt is known by its text as it was
        sets[name] = EvalSet(role, file, wrapped(unseen, PREFIX) if is_attacked else unseen)
    return sets
