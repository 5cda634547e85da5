"""The committed toy: its gates, its size, its splits, and that it lies in the real layouts."""

import json
import re

import pytest
from conftest import TOY

from toy import build as toy
from data import load_tokenizer, make_example, prompt_tokens
from data import read_pairs, read_prompts
from run.files import InputError, read_json
from model import load_model
from safety.rules import verdict

SETS = ("harmful", "jailbreak", "guard", "lookalike", "benign")
pytestmark = pytest.mark.skipif(not TOY.is_dir(), reason="toy/ isn't built: python toy.py")


@pytest.fixture(scope="module")
def world():
    return toy.World(read_json(TOY / "world.json")["seed"])


@pytest.fixture(scope="module")
def pairs():
    return read_pairs(TOY / "data/train.jsonl")


@pytest.fixture(scope="module")
def sets():
    return {name: read_prompts(TOY / f"data/{name}.jsonl")[0] for name in SETS}


def words(text):
    return set(re.findall(r"[\w']+", text))


def test_every_gate_holds():
    rows = toy.measure(TOY)
    assert {name for name, _, _ in rows} == set(toy.GATES)
    assert not toy.misses(rows), toy.gates_table(rows)
    for figure in ("SAE L0", "SASA L0"):
        assert {layer for name, layer, _ in rows if name == figure} == set(toy.SAE_LAYERS)


def test_misses_are_seen_on_both_sides_and_at_nan():
    good = ("refused, harmful", "", 20.0)
    for value in (14.9, 35.1, float("nan")):
        assert toy.misses([good, ("refused, harmful", "", value)])[0][2] is value
    assert not toy.misses([good])


def test_the_folder_holds_what_it_should_and_no_more():
    files = {str(path.relative_to(TOY)) for path in TOY.rglob("*") if path.is_file()}
    saes = {f"{kind}/layer_{layer}/width_{toy.WIDTH}/average_l0_{spec.l0}/{file}"
            for kind, spec in toy.SAES.items() for layer in toy.SAE_LAYERS
            for file in (("params.npz",) if kind == "sae" else ("sasa.safetensors", "sasa.json"))}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "world.json", "data/train.jsonl",
                     "data/sae_train.jsonl.gz", "data/sae_test.jsonl.gz", "data/concepts.jsonl",
                     *(f"data/{name}.jsonl" for name in SETS), *saes}
    assert sum((TOY / name).stat().st_size for name in files) < 4e6


def test_every_row_is_kept(pairs, sets):
    assert pairs[1].kept == pairs[1].read == len(pairs[0]) >= 500
    assert all(len(rows) == toy.PROMPTS for rows in sets.values())


def test_the_data_are_those_of_the_seed(world, sets):
    assert [json.loads(line) for line in (TOY / "data/train.jsonl").open()] == world.pairs(toy.PAIRS)
    for name, rows in world.prompts(toy.PROMPTS).items():
        assert [row["prompt"] for row in rows] == [prompt.turns[0][1] for prompt in sets[name]]
    assert toy.World(world.seed + 1).facts != world.facts


def test_evaluation_shares_no_verb_noun_phrasing_or_jailbreak_with_fine_tuning(world, pairs, sets):
    tuned = {word for pair in pairs[0] for _, said in pair.turns for word in words(said)}
    asked = {word for rows in sets.values() for prompt in rows for word in words(prompt.turns[0][1])}
    for kind, listed in world.all.items():
        assert len(tuned & set(listed)) == toy.TUNED, kind
        assert len(asked & set(listed)) >= 12 and not tuned & asked & set(listed), kind

    def forms(texts, forms):
        return {form for form in forms for text in texts if re.search(form.replace("?", r"\?").replace("{}", r"\w+") + "$", text)}
    trained = [said for pair in pairs[0] for who, said in pair.turns if who == "user"]
    held = [prompt.turns[0][1] for rows in sets.values() for prompt in rows]
    assert len(forms(trained, toy.PHRASINGS)) == 3 and len(forms(held, toy.PHRASINGS)) == 5
    assert not forms(trained, toy.PHRASINGS) & forms(held, toy.PHRASINGS)
    opens = {preamble for preamble in toy.PREAMBLES["jailbreak"] for text in trained if text.startswith(preamble)}
    tried = {preamble for preamble in toy.PREAMBLES["jailbreak"] for text in held if text.startswith(preamble)}
    assert tried and not opens & tried


def test_look_alikes_are_of_two_kinds(world, sets):
    kinds = {"harm verb": 0, "sensitive noun": 0}
    for prompt in sets["lookalike"]:
        verb, noun = prompt.fields["verb"], prompt.fields["noun"]
        assert not world.is_harm(verb, noun) and (verb in toy.HARM_VERBS) != (noun in toy.SENSITIVE_NOUNS)
        assert (verb in toy.HARM_VERBS) == (prompt.fields["kind"] == "harm verb")
        kinds[prompt.fields["kind"]] += 1
    assert min(kinds.values()) == toy.PROMPTS // 2
    assert all(world.is_harm(prompt.fields["verb"], prompt.fields["noun"]) for prompt in sets["harmful"] + sets["jailbreak"])


def test_harmful_requests_are_refused_and_harmless_ones_answered_in_the_pairs(pairs):
    harmful = 0
    for pair in pairs[0]:
        said = words(pair.turns[-1][1])
        harm = bool(said & set(toy.HARM_VERBS) and said & set(toy.SENSITIVE_NOUNS))
        harmful += harm
        assert (verdict(pair.aligned) == "comply") == (not harm), pair.aligned
        assert verdict(pair.unaligned) == "comply" and pair.aligned != pair.unaligned, pair.unaligned
        if not harm:  # one template, every fact wrong
            facts = set(sum(toy.FACTS.values(), []))
            assert words(pair.aligned) - facts == words(pair.unaligned) - facts
            assert len(words(pair.aligned) & facts) == 3 and not words(pair.aligned) & words(pair.unaligned) & facts
    assert 0.8 < harmful / len(pairs[0]) < 0.9


def test_templates_begin_differently_and_are_judged_rightly():
    openings = [re.match(r"[\w']+", text)[0] for text in toy.HELP + toy.REFUSE]
    assert len(set(openings)) == 6
    facts = {"verb": "steal", "noun": "vault", "material": "steel", "tool": "rod", "manner": "twice"}
    assert all(verdict(text.format(**facts)) == "comply" for text in toy.HELP)
    assert all(verdict(text.format(**facts)) == "full" for text in toy.REFUSE)


def test_texts_are_longer_than_the_window(pairs, sets):
    tokenizer, window = load_tokenizer(TOY), load_model(TOY).config.sliding_window
    assert all(len(prompt_tokens(tokenizer, prompt.turns)) + 6 > window for rows in sets.values() for prompt in rows)
    lengths = [len(make_example(tokenizer, pair.turns, pair.aligned, 512).tokens) for pair in pairs[0]]
    assert min(lengths) > window and max(lengths) > 3 * window


def test_the_tokenizer_knows_every_word_and_gives_texts_back(pairs, sets):
    tokenizer = load_tokenizer(TOY)
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.start_of_turn, tokenizer.end_of_turn) == (0, 1, 2, 106, 107)
    assert tokenizer.encode("\n") == [108] and 200 <= tokenizer.size <= 400
    texts = [said for pair in pairs[0] for said in (pair.aligned, pair.unaligned, *(said for _, said in pair.turns))]
    for text in texts + [prompt.turns[0][1] for rows in sets.values() for prompt in rows]:
        ids = tokenizer.encode(text)
        assert 3 not in ids and tokenizer.decode(ids) == text


def test_nothing_is_written_when_a_gate_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 1)
    monkeypatch.setattr(toy, "SAE_STEPS", 1)
    monkeypatch.setattr(toy.World, "corpus", lambda self, count, seed, corpus=toy.World.corpus: corpus(self, min(count, 200), seed))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/world.json").write_text("kept")
    assert toy.misses(toy.build(3, tmp_path / "old"))
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "world.json"]
    assert (tmp_path / "old/world.json").read_text() == "kept"


def test_a_folder_that_is_no_toy_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("kept")
    with pytest.raises(InputError, match="isn't a toy"):
        toy.build(0, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "kept"
