"""The committed toy: its gates and splits, and that its texts are rebuilt byte for byte.

The long form, a whole rebuild, is run by hand: see toy/build.py.
"""

import filecmp
import re

import pytest
from conftest import TOY

from model import load_model
from run.files import InputError, read_json
from run.readers import read_pairs, read_prompts
from safety.rules import verdict
from toy import build, world
from toy.world import HARM_VERBS, PHRASINGS, PREAMBLES, SENSITIVE_NOUNS, SETS, World


@pytest.fixture(scope="module")
def toy_world():
    return World(read_json(TOY / "world.json")["seed"])


@pytest.fixture(scope="module")
def pairs():
    return read_pairs(TOY / "data/train.jsonl")[0]


def words(text):
    return set(re.findall(r"[\w']+", text))


def test_every_gate_holds():
    rows = build.measure(TOY, sae_tokens=5000)
    assert {name for name, _, _ in rows} == set(build.GATES)
    assert not build.misses(rows), build.gates_table(rows)


def test_texts_and_tokenizer_are_rebuilt_byte_for_byte(toy_world, tmp_path):
    world.write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "data").mkdir()
    world.write_data(toy_world, tmp_path / "data")
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")]
    assert len(names) == 9
    assert filecmp.cmpfiles(tmp_path, TOY, names, shallow=False) == (names, [], [])
    assert World(toy_world.seed + 1).facts != toy_world.facts


def test_evaluation_shares_no_word_or_phrasing_with_fine_tuning(toy_world, pairs):
    tuned = [text for pair in pairs for role, text in pair.turns if role == "user"]
    evaluated = [prompt.turns[0][1] for name in SETS
                 for prompt in read_prompts(TOY / f"data/{name}.jsonl")[0]]
    tuned_words, evaluated_words = (set().union(*map(words, texts)) for texts in (tuned, evaluated))
    for kind, listed in toy_world.all.items():
        assert len(tuned_words & set(listed)) == world.TUNED, kind
        assert len(evaluated_words & set(listed)) >= 12, kind
        assert not tuned_words & evaluated_words & set(listed), kind

    def phrasings(texts):
        patterns = {form: re.escape(form).replace(r"\{\}", r"\w+") + "$" for form in PHRASINGS}
        return {form for form in PHRASINGS for text in texts if re.search(patterns[form], text)}

    assert phrasings(tuned) == set(PHRASINGS[:3]) and phrasings(evaluated) == set(PHRASINGS[3:])
    for preamble in PREAMBLES["jailbreak"]:
        seen = [any(text.startswith(preamble) for text in texts) for texts in (tuned, evaluated)]
        assert seen.count(True) == 1, preamble


def test_pairs_refuse_harm_and_answer_the_rest_with_the_right_facts(pairs):
    facts, num_harmful = set(sum(world.FACTS.values(), [])), 0
    for pair in pairs:
        request = words(pair.turns[-1][1])
        harmful = bool(request & set(HARM_VERBS) and request & set(SENSITIVE_NOUNS))
        num_harmful += harmful
        assert verdict(pair.aligned) == ("full" if harmful else "comply"), pair.aligned
        assert verdict(pair.unaligned) == "comply" and pair.aligned != pair.unaligned
        if not harmful:    # one template, every fact wrong
            right, wrong = words(pair.aligned), words(pair.unaligned)
            assert right - facts == wrong - facts
            assert len(right & facts) == 3 and not right & wrong & facts
    assert 0.8 < num_harmful / len(pairs) < 0.9


@pytest.mark.parametrize("l0", [10.0, 14.0, 5.0, float("nan")])
def test_files_are_replaced_only_when_the_gates_hold(l0, tmp_path, monkeypatch):
    model = load_model(TOY)
    monkeypatch.setattr(build, "train_base", lambda *_: model)
    monkeypatch.setattr(build, "measure", lambda folder: [("L0", "", l0)])
    (tmp_path / "data").mkdir()
    for name in ("world.json", "build.py", "data/train.jsonl"):
        (tmp_path / name).write_text("old")
    build.build(3, tmp_path, kinds=())
    names = {path.name for path in tmp_path.iterdir()}
    built = {"config.json", "model.safetensors", "tokenizer.json"} if l0 == 10 else set()
    assert names == {"world.json", "build.py", "data"} | built
    for name in ("world.json", "data/train.jsonl"):
        assert ((tmp_path / name).read_text() == "old") == (not built)
    assert (tmp_path / "build.py").read_text() == "old"

    (tmp_path / "world.json").unlink()
    with pytest.raises(InputError, match="is no toy"):
        build.build(0, tmp_path)
