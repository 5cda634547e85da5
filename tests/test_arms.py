"""Which models eval.py asks, one after the other, and their table, as a person makes it."""

import re
import shutil

import pytest
from conftest import ROOT, ended

import eval
import lora
from run.files import InputError, read_json, read_jsonl, write_json
from safety import arms
from safety.arms import Arm, find_arms, loaded, shared_settings


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
    eval.main()


@pytest.fixture
def four(whole, mini, tmp_path):
    """A base, a run on it, the same adapter as a PEFT folder, and both as one checkpoint."""
    adapter = tmp_path / "adapter-only"
    adapter.mkdir()
    for name in (lora.CONFIG, lora.WEIGHTS):
        shutil.copy(whole.folder / name, adapter)
    lora.merge(adapter, mini, tmp_path / "merged")
    return [mini, whole.folder, adapter, tmp_path / "merged"]


def test_four_models_in_one_table(four, mini, tmp_path):
    out = tmp_path / "out"
    sets = ["--set", f"harmful={mini}/harmful.jsonl", "--set", f"benign={mini}/benign.jsonl"]
    text = ended("eval.py", [*four, *sets, "--out", out])
    names = [place.name for place in four]
    head = re.split(" {2,}", next(line for line in text.splitlines() if line.startswith("share")))
    changed = [cell for name in names[1:] for cell in (name, "change, points")]
    assert head == ["share of answers, 95 % interval", names[0], *changed, "n"]

    # One adapter in three forms answers alike, and is compared with the first alike
    rows = read_jsonl(out / "completions.jsonl")
    texts = {name: [row["completion"] for row in rows if row["model"] == name] for name in names}
    assert len(texts[names[0]]) == 16 and texts[names[0]] != texts["whole"]
    assert texts["whole"] == texts["adapter-only"] == texts["merged"]
    scores = read_json(out / "scores.json")
    assert list(scores["sets"]) == names and list(scores["paired"]) == names[1:]
    assert scores["paired"]["merged"] == scores["paired"]["whole"]
    assert scores["paired"]["whole"]["harmful"]["safe"]["n"] == 8
    own = read_json(four[1] / "scores.json")
    assert scores["sets"]["whole"]["harmful"] == own["sets"]["adapter"]["harmful"]
    assert scores["paired"]["whole"]["harmful"] == own["paired"]["harmful"]


def test_what_is_answered_is_not_asked_again(four, mini, tmp_path, monkeypatch, capsys):
    tail = ["--set", f"harmful={mini}/harmful.jsonl", "--prompts", "2", "--out", tmp_path / "out"]
    command(monkeypatch, four[0], four[1], *tail)
    asked = []
    answer = eval.answer
    monkeypatch.setattr(eval, "answer", lambda *args: asked.append(args[-1]) or answer(*args))
    command(monkeypatch, four[3], four[0], *tail)           # one more, another first
    assert asked == ["merged, harmful"]
    scores = read_json(tmp_path / "out/scores.json")
    assert list(scores["sets"]) == ["merged", four[0].name]
    other = shutil.copytree(four[3], tmp_path / "elsewhere/merged")
    with pytest.raises(InputError, match="these sets and models"):
        command(monkeypatch, other, *tail)


def test_one_model_has_weights_at_a_time(four, mini, monkeypatch):
    models = []
    load_model = arms.load_model

    def load(*args):
        assert all(model.norm.weight.is_meta for model in models)
        models.append(load_model(*args))
        return models[-1]

    monkeypatch.setattr(arms, "load_model", load)
    base, run, adapter, merged = find_arms(list(map(str, four)))
    order = [base, run, adapter, merged, base]
    settings = shared_settings(order)
    carried = [len(lora.lora_layers(model)) for _, model in loaded(order, settings)]
    assert carried == [0, 12, 12, 0, 0] and len(models) == 4        # the run stood on the base


def test_a_checkpoint_has_the_sets_of_its_size(tmp_path, monkeypatch, capsys):
    command(monkeypatch, ROOT / "toy", "--prompts", "2", "--out", tmp_path / "out")
    text = capsys.readouterr().out
    scores = read_json(tmp_path / "out/scores.json")
    assert {name: found["n"] for name, found in scores["sets"]["toy"].items()} == dict.fromkeys(
        ("harmful", "jailbreak", "lookalike", "benign"), 2)
    assert scores["paired"] == {} and "change" not in text
    settings = shared_settings([Arm("it", "google/gemma-2-9b-it")])
    assert settings.sets["harmful"].startswith("hf://datasets/Anthropic/hh-rlhf")


def test_names_and_bases(whole, mini, tmp_path, monkeypatch):
    assert find_arms(["toy", "google/gemma-2-9b-it"]) == [
        Arm("toy", "toy"), Arm("gemma-2-9b-it", "google/gemma-2-9b-it")]
    base, adapter = find_arms([str(whole.folder)])
    assert (base.name, base.base, base.adapter) == ("base", str(mini), None)
    assert (adapter.name, adapter.adapter) == ("adapter", str(whole.folder))
    twin = shutil.copytree(whole.folder, tmp_path / "b/whole")
    pair = [str(whole.folder), str(twin)]
    assert [arm.name for arm in find_arms(pair)] == pair
    # On the hub an adapter's repository has no config.json
    monkeypatch.setattr(arms, "locate", lambda name, file, optional: name == "me/merged" or None)
    assert find_arms(["me/merged"]) == [Arm("merged", "me/merged")]
    found = find_arms(["toy", "me/adapter"], model="toy")
    assert found[1] == Arm("adapter", "toy", "me/adapter")

    config = read_json(twin / "config.json")
    config["settings"]["format"] = "plain"
    write_json(twin / "config.json", config)
    with pytest.raises(InputError, match="one by one"):
        shared_settings(find_arms(pair))


def test_what_is_refused(whole, mini, tmp_path, monkeypatch):
    for arguments, message in (
            ([], "finished run"), ([mini], "--out DIR"), ([whole.folder, mini], "--out DIR"),
            ([mini, "--out", tmp_path / "out"], "--sets or --set"),
            ([tmp_path], "--out DIR"), ([tmp_path, "--out", "out"], "no file config.json")):
        with pytest.raises(InputError, match=message):
            command(monkeypatch, *arguments)
    assert not (tmp_path / "out").exists()
