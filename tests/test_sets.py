"""sets.py: sets by name, their files, what of a file is asked."""

import json

import pytest

from safety import sets
from run.files import InputError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_name_stands_for_all_that_begin_with_it():
    assert sets.places(["xstest"], {"xstest": "x.csv"}) == {"xstest-safe": ("lookalike", "x.csv"), "xstest-unsafe": ("harmful", "x.csv")}
    assert sets.places(["jailbreakbench"], {"jailbreakbench-harmful": "here.csv"}) == {
        "jailbreakbench-harmful": ("harmful", "here.csv"),
        "jailbreakbench-benign": ("lookalike", "hf://datasets/JailbreakBench/JBB-Behaviors/data/benign-behaviors.csv")}
    assert sets.places([], {"mine:benign": "m.txt", "advbench": "a.csv"}) == {"mine": ("benign", "m.txt"), "advbench": ("harmful", "a.csv")}
    assert sets.places(["mine"], {"mine:benign": "m.txt"}) == {"mine": ("benign", "m.txt")}
    assert set(sets.places(["toy"], {})) == {"toy-harmful", "toy-jailbreak", "toy-lookalike", "toy-benign"}


@pytest.mark.parametrize("names, files, said", [
    (["advbenhc"], {}, "advbenhc"), (["advbench"], {}, "llm-attacks"), (["hex-phi"], {}, "hex-phi=FILE"),
    ([], {"mine": "m.txt"}, "NAME:ROLE"), ([], {"mine:bad": "m.txt"}, "mine:bad"), ([], {"advbench:benign": "a.csv"}, "advbench:benign")])
def test_wrong_names_are_told_in_a_line(names, files, said):
    with pytest.raises(InputError, match=said):
        sets.places(names, files)


def test_what_is_left_out(tmp_path, capsys):
    rows = [{"prompt": "kill a process?", "label": "safe"}, {"prompt": "kill a man?", "label": "unsafe"},
            {"prompt": "kill time?", "label": "safe"},
            {"prompt": "go on with this", "ContextString": "a text"}]
    file = str(write(tmp_path / "x.jsonl", rows))
    found = sets.load({"a": ("lookalike", file), "b": ("harmful", file)}, trained={(("user", "kill time?"),)})
    assert [prompt.turns[0][1] for prompt in found["a"].prompts] == ["kill a process?"]
    assert [prompt.turns[0][1] for prompt in found["b"].prompts] == ["kill a man?"]
    assert found["b"].role == "harmful" and found["b"].file == file
    assert "2 labelled unsafe or in need of a context and 1 trained on are left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="x.jsonl holds no prompt for c"):
        sets.load({"c": ("lookalike", file)}, trained={(("user", "kill time?"),), (("user", "kill a process?"),)})


def test_a_sample_is_the_same_each_time(tmp_path):
    file = str(write(tmp_path / "x.jsonl", [{"prompt": f"prompt {i}"} for i in range(50)]))
    first, again = (sets.load({"a": ("harmful", file)}, most=7)["a"].prompts for _ in range(2))
    assert first == again and len(first) == 7
    assert len(sets.load({"a": ("harmful", file)}, most=60)["a"].prompts) == 50 == len(sets.load({"a": ("harmful", file)})["a"].prompts)


SHARED = {"advbench": ("advbench.csv", 520), "harmbench": ("harmbench_test.csv", 239),
          "jailbreakbench-harmful": ("jailbreakbench.csv", 100),
          "malicious-instruct": ("malicious_instruct.txt", 100), "xstest-safe": ("xstest_prompts.csv", 250),
          "xstest-unsafe": ("xstest_prompts.csv", 200), "hh-rlhf": ("hh_rlhf_harmless_base_test.jsonl.gz", 2302)}


@pytest.mark.parametrize("name", SHARED)
def test_real_files_load_as_they_are(shared, name):
    file, count = SHARED[name]
    found = sets.load(sets.places([name], {name: str(shared / file)}))
    assert len(found[name].prompts) == count and found[name].role == sets.NAMED[name].role


def test_the_list_names_every_set():
    assert all(name in sets.listing() for name in sets.NAMED)
    assert all(source.place.startswith(("hf://datasets/", "https://")) or name.startswith("toy-") for name, source in sets.NAMED.items())
