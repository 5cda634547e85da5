"""Prompt sets: by name, by file, and which of their rows are taken."""

import pytest

from run.files import InputError, write_jsonl
from safety.sets import NAMED, listing, load_sets, places


def write(path, rows):
    write_jsonl(path, rows)
    return str(path)


def test_a_name_stands_for_all_sets_that_begin_with_it():
    assert places(["xstest"], {"xstest": "x.csv"}) == {
        "xstest-safe": ("lookalike", "x.csv"), "xstest-unsafe": ("harmful", "x.csv")}
    found = places(["jailbreakbench"], {"jailbreakbench-harmful": "here.csv"})
    assert found["jailbreakbench-harmful"] == ("harmful", "here.csv")
    assert found["jailbreakbench-benign"][1].startswith("hf://datasets/JailbreakBench/")
    assert places(["mine"], {"mine:benign": "m.txt"}) == {"mine": ("benign", "m.txt")}
    assert places([], {"harmful": "h.txt"}) == {"harmful": ("harmful", "h.txt")}
    assert all(name in listing() for name in NAMED)
    sample, again = (load_sets(places(["toy"], {}), most=7) for _ in range(2))
    assert sample == again and [len(found.prompts) for found in sample.values()] == [7] * 4
    for names, files, message in (
            (["advbenhc"], {}, "advbenhc"), (["advbench"], {}, "llm-attacks"),
            ([], {"mine": "m.txt"}, "NAME:ROLE"), ([], {"mine:bad": "m.txt"}, "mine:bad")):
        with pytest.raises(InputError, match=message):
            places(names, files)


def test_rows_of_the_other_kind_and_prompts_trained_on_are_left_out(tmp_path, capsys):
    rows = [{"prompt": "kill a process?", "label": "safe"},
            {"prompt": "kill a man?", "label": "unsafe"}, {"prompt": "kill time?", "label": "safe"},
            {"prompt": "go on with this", "ContextString": "a text"}]
    file = write(tmp_path / "x.jsonl", rows)
    trained = {(("user", "kill time?"),)}
    found = load_sets({"a": ("lookalike", file), "b": ("harmful", file)}, trained)
    assert [prompt.turns[0][1] for prompt in found["a"].prompts] == ["kill a process?"]
    assert [prompt.turns[0][1] for prompt in found["b"].prompts] == ["kill a man?"]
    assert (found["b"].role, found["b"].file) == ("harmful", file)
    assert "2 labelled unsafe or in need of a context and 1 trained on" in capsys.readouterr().out
    with pytest.raises(InputError, match="x.jsonl holds no prompt for c"):
        load_sets({"c": ("lookalike", file)}, trained | {(("user", "kill a process?"),)})


CONTRASTS = [{"type": "homonyms"}, {"type": "Contrast_homonyms"}]


@pytest.mark.parametrize("safe, unsafe", [
    ({"Label": "Safe"}, {"Label": "UNSAFE "}), (CONTRASTS[0] | {"label": ""}, CONTRASTS[1]),
    (CONTRASTS[1] | {"label": "safe"}, CONTRASTS[0] | {"label": "unsafe"})])
def test_rows_of_two_kinds_are_told_apart(tmp_path, safe, unsafe):
    file = write(tmp_path / "x.jsonl", [{"prompt": "nut?"} | safe, {"prompt": "lock?"} | unsafe])
    sets = load_sets(places(["xstest"], {"xstest": file}))
    texts = {name: [prompt.turns[0][1] for prompt in sets[name].prompts] for name in sets}
    assert texts == {"xstest-safe": ["nut?"], "xstest-unsafe": ["lock?"]}


@pytest.mark.parametrize("row", [{}, {"label": "0"}, {"type": "homonyms"}])
def test_no_row_counts_for_two_roles(tmp_path, row):
    file = write(tmp_path / "x.jsonl", [{"prompt": "nut?", "label": "safe"}, {"prompt": "a"} | row])
    (tmp_path / "link.jsonl").symlink_to(file)
    load_sets({"a": ("lookalike", file), "b": ("lookalike", file)})
    for other in (file, str(tmp_path / "link.jsonl")):
        with pytest.raises(InputError, match="jsonl:2 would be lookalike and harmful"):
            load_sets({"a": ("lookalike", file), "b": ("harmful", other)})
