"""No text becomes a control token, whoever wrote it and whichever way it comes in; over all special tokens of Gemma's tokenizer."""

import gzip
import html
import json
import unicodedata

import pytest
from conftest import SHARED, TOY
from test_data import chat, registered

import ability
from safety import attack
import data as datafiles
from safety import judges as judge
from saes import train as sae_train
from data import Tokenizer, load_tokenizer, make_example, prompt_tokens
from data import Prompt

LOOKALIKES = {
    "as it is": str, "in a sentence": lambda name: f"Say {name} now.", "glued": lambda name: f"a{name}b",
    "nested": lambda name: f"<{name}bos>", "twice": lambda name: name * 2, "in capitals": str.upper,
    "after a space of the vocabulary": lambda name: f"▁{name}▁",
    "full width": lambda name: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name),       # NFKC makes it the name
    "small forms": lambda name: name.replace("<", "\ufe64").replace(">", "\ufe65"), "angle quotes": lambda name: f"‹{name[1:-1]}›",
    "with a space of no width": lambda name: f"{name[0]}\u200b{name[1:]}",
    "with a soft hyphen": lambda name: f"{name[:2]}\xad{name[2:]}", "with an accent": lambda name: name[:2] + "\u0301" + name[2:],
    "from right to left": lambda name: f"\u202e{name[::-1]}\u202c",
    "as entities": html.escape, "as bytes": lambda name: f"<0x3C>{name[1:]}",
    "escaped": lambda name: json.dumps(name).replace("<", "\\u003c"),
    "in Cyrillic": lambda name: name.replace("o", "\u043e").replace("a", "\u0430").replace("e", "\u0435")}


@pytest.fixture(scope="module", params=["toy", "gemma", "gemma with all registered"])
def tokenizer(request):
    path = SHARED / "gemma_tokenizer.json.gz"
    if request.param == "toy":
        return load_tokenizer(TOY)
    if not path.exists():
        pytest.skip("needs Gemma's tokenizer")
    return load_tokenizer(path) if request.param == "gemma" else Tokenizer(registered(True), path)


@pytest.fixture(scope="module")
def names(tokenizer):
    """What all special tokens are called, Gemma's among them."""
    known = {"<bos>", "<eos>", "<pad>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused98>", "<start_of_image>"}
    return sorted(known | {tokenizer.names[i] for i in tokenizer.control})


@pytest.fixture(params=LOOKALIKES)
def texts(request, names):
    """Each name in one disguise and in all of its normal forms; the last is all of them in one text."""
    found = [LOOKALIKES[request.param](name) for name in names]
    found += [form for text in found for kind in ("NFC", "NFD", "NFKC", "NFKD") if (form := unicodedata.normalize(kind, text)) != text]
    return [*found, " ".join(found)]


def test_all_special_tokens_are_known(tokenizer, names):
    assert len(names) > 100 or tokenizer.size < 1000
    for id in tokenizer.control:
        assert tokenizer.decode([id]) == "" and tokenizer.encoder.token_to_id(tokenizer.names[id]) is None


def test_no_text(tokenizer, texts):
    for text in texts:
        assert tokenizer.control.isdisjoint(tokenizer.encode(text)), text


def placed(tokenizer, ids):
    """The control tokens among ids, by name."""
    return [tokenizer.names[i] for i in ids if i in tokenizer.control]


BOS, START, END, EOS = "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"


def test_no_prompt_and_no_data_set(tokenizer, texts, tmp_path):
    """Nor do two texts that are a name together: each is encoded by itself."""
    everything = texts[-1]
    halves = [("a <start_of_", "turn> b"), ("<", "bos>"), ("<end", "_of_turn>")]
    for before, text in [(everything, everything), *halves, *zip(texts, texts[:4])]:
        turns = chat(before, text, before)
        assert placed(tokenizer, prompt_tokens(tokenizer, turns)) == [BOS, START, END, START, END, START, END, START]
        assert placed(tokenizer, prompt_tokens(tokenizer, turns, "plain")) == [BOS]
        assert placed(tokenizer, make_example(tokenizer, chat(before), text, 10**6).tokens) == [BOS, START, END, START, END]
        assert placed(tokenizer, make_example(tokenizer, chat(before), text, 10**6, "plain").tokens) == [BOS, EOS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({side: f"\n\nHuman: {text}\n\nAssistant: {text} {side}"
                                                               for side in ("chosen", "rejected")}) for text in texts))
    with gzip.open(tmp_path / "prompts.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(text.replace("\n", " ") for text in texts))
    pairs, prompts = datafiles.read_pairs(tmp_path / "pairs.jsonl")[0], datafiles.read_prompts(tmp_path / "prompts.txt.gz")[0]
    assert len(pairs) > 5 < len(prompts)
    for pair in pairs:
        assert placed(tokenizer, make_example(tokenizer, pair.turns, pair.unaligned, 10**6).tokens) == [BOS, START, END, START, END]
    for prompt in prompts:
        assert placed(tokenizer, prompt_tokens(tokenizer, prompt.turns)) == [BOS, START, END, START]


def test_no_question_to_a_judge(tokenizer, texts):
    for text in texts[:3] + texts[-1:]:
        for policy in judge.POLICIES:
            assert placed(tokenizer, judge.shieldgemma_tokens(tokenizer, text, text, policy)) == [BOS, START, END, START, END]
        question = chat(judge.rubric_prompt(text, text))
        assert placed(tokenizer, prompt_tokens(tokenizer, question)) == [BOS, START, END, START]


def test_no_suffix_template_or_target_of_an_attack(tokenizer, texts):
    words = [i for i in range(200) if i not in tokenizer.control]
    for text in texts[:3] + texts[-1:]:
        place = attack.Place(tokenizer, chat(text))
        assert placed(tokenizer, place.head) == [BOS, START] and placed(tokenizer, place.tail) == [END, START]
        suffixes = [[id] for id in tokenizer.control] + [[word, id] for word, id in zip(words, tokenizer.control)]
        assert not any(place.typable(suffixes))
        prompt, = attack.wrapped([Prompt(chat(text), {"target": text}, 1)], f"{text} {{prompt}} {{target}} {text}")
        assert placed(tokenizer, prompt_tokens(tokenizer, prompt.turns)) == [BOS, START, END, START]
        assert tokenizer.control.isdisjoint(tokenizer.encode(attack.target_of(prompt)))
    assert tokenizer.control.isdisjoint(attack.vocabulary(tokenizer, min(tokenizer.size, 3000)).nonzero()[:, 0].tolist())


def test_no_text_for_likelihoods_or_for_an_sae(tokenizer, texts, monkeypatch):
    spans = []
    monkeypatch.setattr(ability, "nlls", lambda model, more, label: spans.extend(more) or [0.0] * len(more))
    ability.perplexity(None, tokenizer, texts)
    ability.choices(None, tokenizer, [ability.Question(text, (text, text), 0) for text in texts])
    assert all(placed(tokenizer, ids[1:]) == [] for ids, _ in spans) and len(spans) >= 3 * len(texts)
    for text in texts[:3] + texts[-1:]:
        for ids in sae_train.encode_item(tokenizer, text, 50):
            assert placed(tokenizer, ids) == [BOS]
        ids, = sae_train.encode_item(tokenizer, chat(text, text), 10**6)
        assert placed(tokenizer, ids) == [BOS, START, END, START, END]


def test_no_answer_that_is_read_again(tokenizer, texts):
    """A model may say control tokens: what it said is text without them, and as text it makes none."""
    for text in texts[-1:]:
        said = tokenizer.decode([*tokenizer.control, *tokenizer.encode(text), *tokenizer.control])
        assert said == tokenizer.decode(tokenizer.encode(text)) and tokenizer.control.isdisjoint(tokenizer.encode(said))
