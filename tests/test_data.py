"""data.py: parity with transformers, text that attacks the turns, masks, readers of good and of hostile files, packing."""

import dataclasses
import gzip
import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
import data as datafiles
from data import Example, Tokenizer, load_tokenizer, make_example, pack, prompt_tokens
from data import read_pairs, read_prompts
from run.files import ROOT, InputError

SHARED = ROOT.parent / "shared" / "data"
GEMMA, HH = SHARED / "gemma_tokenizer.json.gz", SHARED / "hh_rlhf_harmless_base_test.jsonl.gz"
needs_shared = pytest.mark.skipif(not GEMMA.exists(), reason="needs ../shared/data")

# Gemma's chat template, as a chat is written down in the model card: roles alternate, contents are trimmed.
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
            "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
NASTY = ["  leading and trailing \n\t", "\n\n\n\nmany\n\n\nlines\n", "a  b   c      d\t\te", "x\r\ny", "日本語とемодзи 🙂👩‍👩‍👧",
         "\u00a0nbsp\u2028sep\u200b",
         "", "▁already▁", "\n \n  \n", "model\nuser\n", "é vs e\u0301", "\x00\x07", "<", "<table><tr><td>x</td></tr></table>",
         "</h1> <b>b</b>", "<0x41>", "0" * 50, "\ufeffbom"]


def chat(*turns):
    return tuple((who, said) for who, said in zip(("user", "model") * len(turns), turns))


def word_spec(extra=()):
    """A word-level tokenizer.json like the toy's."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", *extra, "\n", "user", "model", "how",
             "to", "paint", "the", "vault", "with", "care", "."]
    added = [{"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, w in enumerate(words[:4])]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "post_processor": None,
            "decoder": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"String": at}, "behavior": "Isolated", "invert": False} for at in " \n"]},
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)} | {" ": len(words)}, "unk_token": "<unk>"}}


@pytest.fixture(scope="module")
def words():
    return Tokenizer(word_spec(), "words")


def registered(full):
    """The Gemma tokenizer.json with the turn tokens registered; `full`: with all that Google's own file registers."""
    spec = json.loads(gzip.decompress(GEMMA.read_bytes()))
    content = {i: c for c, i in spec["model"]["vocab"].items()}
    more = [4, 5, 6, *range(7, 106), *range(106, 217), *range(255968, 256000)] if full else [106, 107]
    spec["added_tokens"] += [{"id": i, "content": content[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                              "special": i in (106, 107)} for i in more if i not in range(217, 250)]
    return spec


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "full"])
def gemma(request):
    """(our tokenizer, transformers'): from the file that registers four tokens, and from one that registers all."""
    if not GEMMA.exists():
        pytest.skip("needs ../shared/data")
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    spec = registered(request.param)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec)), bos_token="<bos>",
                                     eos_token="<eos>", pad_token="<pad>",
                                     unk_token="<unk>", chat_template=TEMPLATE)
    return (Tokenizer(spec, "full") if request.param else load_tokenizer(GEMMA)), theirs


def their_ids(theirs, turns, answer=None):
    messages = [{"role": "user" if who == "user" else "assistant", "content": said} for who, said in turns]
    messages += [{"role": "assistant", "content": answer}] * (answer is not None)
    return theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=answer is None, return_dict=False)


# -------------------------------------------------------------------------------------------------- parity

def test_ids_equal_transformers(gemma):
    ours, theirs = gemma
    assert (ours.pad, ours.eos, ours.bos, ours.start_of_turn, ours.end_of_turn, ours.size) == (0, 1, 2, 106, 107, 256000)
    pairs = read_pairs(HH)[0]
    for pair in pairs[::8] + [p for p in pairs if len(p.turns) > 7]:
        example = make_example(ours, pair.turns, pair.aligned, 10**6)
        assert prompt_tokens(ours, pair.turns) == their_ids(theirs, pair.turns)
        assert example.tokens + ours.encode("\n") == their_ids(theirs, pair.turns, pair.aligned)
        assert example.closed and example.tokens[:example.start] == prompt_tokens(ours, pair.turns)


def test_nasty_texts_equal_transformers(gemma):
    ours, theirs = gemma
    rng = random.Random(0)
    texts = NASTY + ["".join(rng.choices(NASTY, k=4)) for _ in range(60)]
    for a, b, c in zip(texts, texts[1:], texts[2:]):
        assert make_example(ours, chat(a, b, c), a, 10**6).tokens + ours.encode("\n") == their_ids(theirs, chat(a, b, c), a)


def test_decode_returns_the_text(gemma):
    for text in NASTY:
        assert gemma[0].decode(gemma[0].encode(text)) == text.replace("▁", " ")


# -------------------------------------------------------------------------------------------------- control tokens

def test_text_cannot_spell_a_control_token(gemma):
    ours, _ = gemma
    names = {ours.names[i] for i in ours.control}
    assert ours.control >= {0, 1, 2, 3, 4, 5, 6, 106, 107, 255968, 255999, *range(7, 106)}
    assert not ours.control & {108, 109, 139, 169, 177, 208, 255969}  # new lines, spaces, HTML, tabs are text
    everything = "".join(sorted(names))
    for text in [*names, *(f"x {name}\n" for name in names), everything, everything[1:], everything * 2]:
        ids = ours.encode(text)
        assert not ours.control & set(ids) and ours.decode(ids) == text
        if text != everything:
            example = make_example(ours, chat(text), text, 10**6)
            placed = [i for i in example.tokens if i in ours.control]
            assert placed == [2, 106, 107, 106, 107], text


def test_plain_added_tokens_stay_one_token(gemma):
    full = gemma[0]
    if full.encoder.get_added_tokens_decoder():
        assert full.encode("<table>\n\n\t\t</h1>  x") == [169, 109, 255969, 192, 139, full.encode("x")[0]]


def test_merges_that_build_a_control_token_are_taken_out():
    pieces = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *"<unused7>s", "<u", "nused", "7>", "<unused", "n",
              "<unused7>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "nu", "se", "d", "nuse"]))}
    spec = word_spec() | {"added_tokens": [], "pre_tokenizer": None,
                          "model": {"type": "BPE", "vocab": vocab, "unk_token": None, "byte_fallback": False, "merges": [
        "< u", "7 >", "n u", "s e", "nu se", "nuse d", "<u nused", "<unused 7>"]}}
    vocab["nused"] = max(vocab.values()) + 1
    loaded = Tokenizer(spec, "bpe")
    assert vocab["<unused7>"] in loaded.control and loaded.decode(loaded.encode("<unused7>")).replace(" ", "") == "<unused7>"
    assert vocab["<unused7>"] not in loaded.encode("<unused7>")


def test_word_level_tokenizer(words):
    assert words.control == {0, 1, 2, 4, 5, 6} and words.encode("<bos>") == [3] == words.encode("<end_of_turn>") == words.encode("<unk>")
    assert words.decode([2, 5] + words.encode("paint") + [6, 1, 0]) == "paint"
    assert words.token(5) == "<start_of_turn>" and words.token(10**6) == "<1000000>"
    assert words.decode(torch.tensor(words.encode("paint"))) == "paint"
    spec = word_spec(["<|tool|>"])
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 7, "content": "<|tool|>", "special": False})
    loaded = Tokenizer(spec, "tool")  # an added token of an unknown kind is a control token
    assert 7 in loaded.control and loaded.encode("<|tool|>") == [3]


@pytest.mark.parametrize("damage", [
    lambda s: s.pop("model"), lambda s: s.pop("added_tokens"), lambda s: s["model"].update(type="Unigram"),
    lambda s: s["model"]["vocab"].pop("<bos>") and s["added_tokens"].clear(),
    lambda s: s["model"].update(vocab=[1, 2]), lambda s: s["model"]["vocab"].update(user="x"),
    lambda s: s["model"]["vocab"].update(user=-1), lambda s: s["model"]["vocab"].update(user=2),
    lambda s: s.update(pre_tokenizer={"type": "Nope"}),
    lambda s: s["model"]["vocab"].pop("<unk>"), lambda s: s["added_tokens"].append(3),
    lambda s: s["added_tokens"].append({**s["added_tokens"][0], "id": 99, "content": "\n\n", "special": False}),
    lambda s: s.update(decoder={"type": "Strip", "content": "ab"}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
    lambda s: s.update(model="BPE"),
    lambda s: s["added_tokens"][0].update(content=None), lambda s: s["model"].update(type="BPE", merges=["a b c"]),
    lambda s: s["model"].update(type="BPE", merges=["how zz"]),
    lambda s: s["model"]["vocab"].update({"<unk>": 2})])  # unknown words would be <bos>, though <unk> is registered as 3
def test_tokenizer_that_cannot_serve(tmp_path, damage):
    spec = word_spec()
    damage(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@needs_shared
def test_gemma_s_tokenizer_as_transformers_writes_it_anew(tmp_path):
    """Its merges as lists, indented: 34 MB, where Google's file has 17. What bounds hostile files lets it in."""
    spec, path = json.loads(gzip.decompress(GEMMA.read_bytes())), tmp_path / "tokenizer.json"
    spec["model"]["merges"] = [pair.split(" ") for pair in spec["model"]["merges"]]
    path.write_text(json.dumps(spec, indent=2, ensure_ascii=False))
    assert path.stat().st_size > 34_000_000 and load_tokenizer(path).encode(NASTY[3]) == load_tokenizer(GEMMA).encode(NASTY[3])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b'"\\ud800"'])
def test_tokenizer_file_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "none")


# -------------------------------------------------------------------------------------------------- masks

def test_mask_by_hand(words):
    spec = word_spec()["model"]["vocab"]
    nl, user, model, how, paint = (spec[w] for w in ("\n", "user", "model", "how", "paint"))
    example = make_example(words, chat(" how\n"), "paint", 99)
    assert example == Example([2, 5, user, nl, how, 6, nl, 5, model, nl, paint, 6], 10, True)
    (row,) = pack([example], 14, 0, 0)
    assert row.tokens.tolist() == example.tokens + [0, 0]
    assert row.labels.tolist() == [-100] * 9 + [paint, 6] + [-100] * 3
    assert row.documents.tolist() == [1] * 12 + [0, 0]
    assert {t.dtype for t in (row.tokens, row.labels, row.documents)} == {torch.int64}
    plain = make_example(words, chat("how"), "paint", 99, "plain")
    assert plain.tokens[0] == 2 and plain.tokens.count(2) == 1 and plain.closed and plain.tokens[plain.start:] == [spec[" "], paint, 1]
    assert data.closing(words) == 6 and data.closing(words, "plain") == 1


def test_long_examples_are_cut_at_the_end_of_the_answer(words):
    whole = make_example(words, chat("how"), "paint the vault", 99)
    for length in range(1, len(whole.tokens) + 3):
        example = make_example(words, chat("how"), "paint the vault", length)
        if length <= whole.start:
            assert example is None
        else:
            assert example == Example(whole.tokens[:length], whole.start, length >= len(whole.tokens))


def test_plain_format_is_text_after_one_bos(gemma):
    gemma, _ = gemma
    example = make_example(gemma, chat("hi", "<eos>hello ", "bye"), " ok\n", 99, "plain")
    assert example.tokens[0] == 2 and example.tokens[-1] == 1 and len([i for i in example.tokens if i in gemma.control]) == 2
    assert gemma.decode(example.tokens) == "\n\nHuman: hi\n\nAssistant: <eos>hello\n\nHuman: bye\n\nAssistant: ok"
    assert gemma.decode(example.tokens[example.start:]) == " ok"


# -------------------------------------------------------------------------------------------------- readers

@needs_shared
def test_every_pair_of_hh_rlhf_is_kept_or_dropped_with_a_reason():
    pairs, counts = read_pairs(HH)
    assert (counts.read, counts.kept, len(pairs)) == (2312, 2299, 2299)
    assert sorted(counts.dropped.values()) == [4, 4, 5] and counts.dropped["with an empty answer"] == 4
    assert "2,312 read, 2,299 kept, 13 dropped (5 " in str(counts)
    for pair in pairs:
        assert [who for who, _ in pair.turns] == (["user", "model"] * len(pair.turns))[:len(pair.turns)] and pair.turns[-1][0] == "user"
        assert pair.aligned and pair.unaligned and pair.aligned == pair.aligned.strip()
    with gzip.open(HH, "rt") as file:
        row = json.loads(list(file)[pairs[700].line - 1])
    text = "".join(f"\n\n{'Human' if who == 'user' else 'Assistant'}: {said}"
                   for who, said in (*pairs[700].turns, ("model", pairs[700].aligned)))
    assert text.split() == row["chosen"].split()


@needs_shared
@pytest.mark.parametrize("name, read, kept, column", [
    ("advbench.csv", 520, 520, "target"), ("harmbench_test.csv", 320, 317, "SemanticCategory"),
    ("harmless_val.json", 6264, 6264, "category"),
    ("jailbreakbench.csv", 100, 100, "Behavior"), ("malicious_instruct.txt", 100, 100, None),
    ("xstest_prompts.csv", 450, 450, "label"), (HH.name, 2312, 2302, None)])
def test_prompt_sets_load_as_they_are(name, read, kept, column):
    prompts, counts = read_prompts(SHARED / name)
    assert (counts.read, counts.kept, len(prompts)) == (read, kept, kept) and sum(counts.dropped.values()) == read - kept
    assert all((column in p.fields) if column else not p.fields for p in prompts) and all(p.turns[-1][1] for p in prompts)


def pair_line(chosen="\n\nHuman: hi\n\nAssistant: yes", rejected="\n\nHuman: hi\n\nAssistant: no", **more):
    return json.dumps({"chosen": chosen, "rejected": rejected} | more)


def test_pairs_by_hand(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join([
        pair_line(), "", pair_line("\n\nHuman: a\n\nAssistant: b\n\nHuman: c d \n\nAssistant: e\n\nf",
                                   "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant: g", category="x"),
        pair_line(rejected="\n\nHuman: ho\n\nAssistant: no"), pair_line(chosen="\n\nHuman: hi\n\nAssistant:"),
        pair_line(rejected="\n\nHuman: hi\n\nAssistant: "), pair_line(chosen=None), '{"chosen": "x"}', "{}",
        pair_line("\n\nHuman: hi\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nHuman: hi\n\nAssistant: b"),
        pair_line("\n\nAssistant: a", "\n\nAssistant: b"),
        pair_line("hello", "hello you"), pair_line("hello\n\nHuman: hi\n\nAssistant: yes", "hello\n\nHuman: hi\n\nAssistant: no"),
        pair_line("\n\nHuman: hi", "\n\nHuman: hi")]))
    pairs, counts = read_pairs(file)
    assert pairs == [datafiles.Pair(chat("hi"), "yes", "no", 1), datafiles.Pair(chat("a", "b", "c d"), "e\n\nf", "g", 3)]
    assert (counts.read, counts.kept) == (13, 2)
    assert counts.dropped == {"whose sides don't share a prompt": 1, "with an empty answer": 2, "without both sides": 3,
                              "whose Human and Assistant turns don't alternate": 5}


def test_prompts_by_hand(tmp_path):
    rows = ["one", "two", "one", " ", "three"]
    texts = {"a.txt": "one\ntwo\n\none\n\n three \n", "b.jsonl": "\n".join(map(json.dumps,
                                                                               [{"Prompt": "one", "goal": "g"}, "two",
                                                                                {"GOAL": "one"}, {"prompt": " "}, {"behavior": "three"}])),
             "c.json": json.dumps([{"Instruction": r, "n": i} for i, r in enumerate(rows)]),
             "d.csv": '\ufeffid,Goal,Prompt\r\n1,g,one\r\n2,g,two\r\n3,g,one\r\n4,g,\r\n5,g,"three"\r\n'}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8", newline="") as file:
            file.write(text)
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            prompts, counts = read_prompts(path)
            assert [p.turns for p in prompts] == [chat("one"), chat("two"), chat("three")], name
            assert counts.dropped["with a prompt seen before"] == 1 and counts.read == 5 - (name == "a.txt")
    assert read_prompts(tmp_path / "d.csv")[0][0].fields == {"id": "1", "Goal": "g"} and read_prompts(tmp_path / "d.csv")[0][2].line == 6
    assert read_prompts(tmp_path / "c.json")[0][1].fields == {"n": 1}
    other = pair_line("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", kind="k")
    (tmp_path / "e.jsonl").write_text("\n".join([pair_line(), other, pair_line()]))
    prompts, counts = read_prompts(tmp_path / "e.jsonl")
    assert [(p.turns, p.fields, p.line) for p in prompts] == [(chat("hi"), {}, 1), (chat("a", "b", "c"), {"kind": "k"}, 2)]
    assert counts.read == 3


BAD_PAIRS = {
    b"": "empty", b"\n\n": "empty", b"{": ":1: not valid JSON", b"[]": ":1: expected a JSON object", b"3": ":1: ",
    pair_line().encode() + b"\n{]": ":2: not valid JSON", b'{"chosen": 3, "rejected": "x"}': ":1: 'chosen' is a int",
    b'{"chosen": "x"}': "no pair with both sides: 1 read", b"\xff\xfe": ":1: not UTF-8", b"[" * 10**5: ":1: not valid JSON",
    b'{"a": NaN}': "not valid JSON", b'{"chosen": "\\ud800"}': "not valid JSON",
    b"9" * 5000: "not valid JSON", b'{"a": 1e999}': "not valid JSON"}


@pytest.mark.parametrize("content, message", BAD_PAIRS.items(), ids=range(len(BAD_PAIRS)))
def test_bad_pairs_name_file_and_line(tmp_path, content, message):
    for name in ("x.jsonl", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(InputError) as error:
            read_pairs(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and message in str(error.value)


@pytest.mark.parametrize("name, content, message", [
    ("x.csv", b"a,b\n1,2\n", ":1: no column named prompt"), ("x.csv", b"prompt,b\n1,2\n1\n", ":3: 1 columns"),
    ("x.csv", b'prompt\n"abc', "not valid CSV"), ("x.csv", b"", "empty"), ("x.csv", b"prompt\n", "empty"),
    ("x.csv", b"prompt\n" + b"a" * 200_000, "not valid CSV"), ("x.json", b"{}", "not a list"), ("x.json", b"[3]", ":1: a prompt is"),
    ("x.json", b'["a", {"b": "c"}]', ":2: no field"), ("x.json", b"[]", "empty"), ("x.json", b"", "empty"),
    ("x.jsonl", b'{"prompt": ["a"]}', ":1: 'prompt' is a list"), ("x.jsonl", b"{}", ":1: no field"), ("x.txt", b"\n", "empty"),
    ("x.json", b'[""]', "no usable prompt"), ("x.xlsx", b"", ".csv"), ("x.txt.gz", b"plain", "can't be read"),
    ("x.txt.gz", gzip.compress(b"a" * 999)[:-9], "can't be read"), ("x.txt", b"a\nb\n\xc3", ":3: not UTF-8")])
def test_bad_prompts_name_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and message in str(error.value)


def test_missing_file_and_folder_and_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datafiles, "LINE_LIMIT", 50)
    (tmp_path / "long.txt").write_text("a" * 51)
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "long.txt"):
        with pytest.raises(InputError):
            read_pairs(path)
    with pytest.raises(InputError, match="more than 50 bytes"):
        read_prompts(tmp_path / "long.txt")


SEEDS = {"s.jsonl": (pair_line() + "\n" + pair_line(n=1.5)).encode(), "s.csv": b'id,prompt\n1,"a ""b"" c"\n2,d\n',
         "s.json": b'[{"prompt": "a", "n": [1, null]}, "b"]', "s.txt": "é\nb\n".encode(),
         "s.jsonl.gz": gzip.compress(pair_line().encode()), "tokenizer.json": json.dumps(word_spec()).encode()}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SEEDS)),
       st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(min_size=1, max_size=4)), max_size=4), st.integers(0, 4000))
def test_only_input_errors_escape(tmp_path_factory, name, edits, end):
    content = bytearray(SEEDS[name])
    for at, kind, piece in edits:
        at %= len(content) + 1
        content[at:at + (len(piece) if kind == 0 else 0 if kind == 1 else at % 7)] = piece if kind < 2 else b""
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(bytes(content[:end] if end % 3 == 0 else content))
    for reader in (load_tokenizer,) if name == "tokenizer.json" else (read_pairs, read_prompts):
        try:
            result = reader(path)
        except InputError as error:
            assert name in str(error)
        else:
            if name != "tokenizer.json":
                json.dumps([dataclasses.asdict(item) for item in result[0]], allow_nan=False, ensure_ascii=False).encode()


# -------------------------------------------------------------------------------------------------- packing

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=40), st.integers(50, 80), st.integers(0, 3))
def test_packing_keeps_every_example_whole(sizes, length, seed):
    ids = iter(range(1, 10**6))  # every token is its own, so that each can be found again
    examples = [Example([next(ids) for _ in range(a + b)], a, True) for a, b in sizes]
    rows = pack(examples, length, seed, 1)
    found = []
    for row in rows:
        assert row.tokens.shape == row.documents.shape == row.labels.shape == (length,)
        used = int((row.documents > 0).sum())
        assert (row.documents[used:] == 0).all() and (row.labels[used:] == -100).all() and row.documents[:used].diff().ge(0).all()
        for number in range(1, int(row.documents.max()) + 1):
            place = row.documents == number
            tokens, labels = row.tokens[place].tolist(), row.labels[place].tolist()
            (example,) = [e for e in examples if e.tokens == tokens]
            assert labels == [-100] * (example.start - 1) + tokens[example.start:] + [-100]
            found.append(tokens)
    assert sorted(found) == sorted(e.tokens for e in examples)
    again = pack(examples, length, seed, 1)
    assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) for a, b in zip(rows, again, strict=True))


def test_packing_is_full_shuffled_and_refuses_what_does_not_fit():
    rng = random.Random(0)
    examples = [Example([i + 1] * rng.randint(20, 300), 10, True) for i in range(500)]
    rows = [pack(examples, 1024, *key) for key in ((0, 0), (0, 1), (1, 0))]
    assert all(sum(len(e.tokens) for e in examples) / (1024 * len(r)) > 0.97 for r in rows)
    orders = [torch.cat([row.tokens for row in r]).unique_consecutive().tolist() for r in rows]
    assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != sorted(orders[0])
    company = [{frozenset(row.tokens.unique().tolist()) for row in r} for r in rows]
    assert len(company[0] & company[1]) < len(rows[0]) // 4  # other examples share a row in the next epoch
    emptiest = [min(range(len(r)), key=lambda i: r[i].documents.count_nonzero())
                for r in (pack(examples, 1024, 0, epoch) for epoch in range(12))]
    assert min(emptiest) < len(rows[0]) // 2  # not what was opened last comes last
    with pytest.raises(InputError, match="300 tokens"):
        pack([Example([1] * 300, 1, True)], 299, 0, 0)
    assert len(pack([Example([1] * 300, 1, True)], 300, 0, 0)) == 1 and pack([], 10, 0, 0) == []


# -------------------------------------------------------------------------------------------------- seeing it

def test_show_as_a_person_runs_it(tmp_path):
    def show(*arguments):
        return subprocess.run([sys.executable, ROOT / "data.py", *map(str, arguments)], capture_output=True, text=True,
                              encoding="utf-8", timeout=60)

    (tmp_path / "tokenizer.json").write_text(json.dumps(word_spec()))
    pair = pair_line("\n\nHuman: how\n\nAssistant: paint", "\n\nHuman: how\n\nAssistant: care")
    (tmp_path / "x.jsonl").write_text(pair + "\n" + pair_line(rejected=""))
    done = show(tmp_path / "x.jsonl", "--show", 1, "--tokenizer", tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "\033[32mpaint\033[0m\033[1;7;32m<end_of_turn>\033[0m" in done.stdout and "\033[36m<bos><start_of_turn>\033[0m" in done.stdout
    assert "2 read, 1 kept, 1 dropped (1 without both sides)" in done.stdout and "12, of which 2 trained on" in done.stdout
    assert done.stdout.count("──") == 1
    done = show(tmp_path / "none.txt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.txt" in done.stderr and not done.stdout


def test_show_cuts_prompts_help_and_bad_flags(tmp_path, monkeypatch, capsys):
    def show(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        data.main()
        return " ".join(capsys.readouterr().out.split())

    (tmp_path / "tokenizer.json").write_text(json.dumps(word_spec()))
    (tmp_path / "x.jsonl").write_text(pair_line("\n\nHuman: how\n\nAssistant: paint", "\n\nHuman: how\n\nAssistant: care"))
    (tmp_path / "x.txt").write_text("how to paint\nhow\n")
    flags = ("--tokenizer", tmp_path, "--show")
    assert "1 of them cut to fit; 0 left out" in show(tmp_path / "x.jsonl", *flags, 0, "--max-length", 11)
    assert "1 left out" in show(tmp_path / "x.jsonl", *flags, 0, "--max-length", 10)
    said = show(tmp_path / "x.txt", *flags, 1)
    assert "x.txt:1 · 14 tokens, 0 trained on" in said and "x.txt:2" not in said and "2 read, 2 kept, 0 dropped" in said
    with pytest.raises(InputError, match="--max-length"):
        show(tmp_path / "x.txt", *flags, 0, "--max-length", 1)
    with pytest.raises(InputError, match="none"):
        show(tmp_path / "x.txt", "--tokenizer", tmp_path / "none")
    with pytest.raises(SystemExit):
        show("--help")
    assert "cut at the end of the answer" in " ".join(capsys.readouterr().out.split())


def test_escape_codes_of_a_file_do_not_reach_the_terminal(gemma):
    gemma, _ = gemma
    example = make_example(gemma, chat("\033[2Jhi\x9b1m"), "\033]0;x\x07y", 99)
    text = data.colored(gemma, example.tokens, example.start)
    assert "␛]0;x␇y" in text and "\033[2J" not in text and "\x9b" not in text and "\x07" not in text
