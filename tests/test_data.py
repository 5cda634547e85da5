"""data.py and run/readers.py: ids as transformers has them, no text that steers, masks, packing."""

import gzip
import html
import json
import random
import sys
import unicodedata

import pytest
from conftest import SHARED, TOY
from gemma_like import gemma_like_spec
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import (Example, Tokenizer, load_examples, load_tokenizer, make_example, pack,
                  prompt_tokens)
from run.files import InputError
from run.readers import Pair, Prompt, read_items, read_pairs, read_prompts
from safety.judges import shieldgemma_tokens
from saes.stream import encode_item

GEMMA, HH = SHARED / "gemma_tokenizer.json.gz", SHARED / "hh_rlhf_harmless_base_test.jsonl.gz"
needs_shared = pytest.mark.skipif(not GEMMA.exists(), reason="needs ../shared/data")
NASTY = ["  leading and trailing \n\t", "\n\n\n\nmany\n\n\nlines\n", "a  b   c      d\t\te",
         "x\r\ny", "\u00a0nbsp\u2028sep\u200b", "", "▁already▁", "\n \n  \n", "model\nuser\n",
         "é vs e\u0301", "\x00\x07", "<", "<table><tr><td>x</td></tr></table>", "</h1> <b>b</b>",
         "<0x41>", "0" * 50, "\ufeffbom", "日本語とемодзи 🙂👩‍👩‍👧"]


def chat(*texts):
    return tuple(zip(("user", "model") * len(texts), texts))


def toy_spec():
    """A word-level tokenizer.json, all lower case."""
    return json.loads((TOY / "tokenizer.json").read_text())


def other_spec():
    """The toy's with other parts; <|tool|> is a control token, for it is no white space or HTML."""
    spec = toy_spec() | {"normalizer": {"type": "NFKC"}}
    spec["added_tokens"] += [spec["added_tokens"][0] | {"id": id, "content": text, "special": False}
                             for id, text in ((998, "<|tool|>"), (999, "\n\n"))]
    return spec


SPECS = {"bare": gemma_like_spec, "registered": lambda: gemma_like_spec(registered=True),
         "toy": toy_spec, "other": other_spec}
TOKENIZERS = {name: Tokenizer(make_spec(), name) for name, make_spec in SPECS.items()}
# Gemma's chat template, as its model card has it: roles alternate, contents are trimmed.
TEMPLATE = """{{ bos_token }}{% for m in messages %}<start_of_turn>\
{{ 'model' if m.role == 'assistant' else 'user' }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


@pytest.mark.parametrize("name", ["bare", "registered", pytest.param("gemma", marks=needs_shared)])
def test_ids_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    make_spec = SPECS.get(name, lambda: json.loads(gzip.decompress(GEMMA.read_bytes())))
    spec = make_spec()
    added = list(spec["added_tokens"])
    if name != "registered":  # transformers finds in its text only what is registered
        added += [added[0] | {"id": spec["model"]["vocab"][token], "content": token}
                  for token in ("<start_of_turn>", "<end_of_turn>")]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(write(tmp_path / "tokenizer.json", spec | {"added_tokens": added})),
        bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE)
    ours = Tokenizer(spec, name)
    assert [ours.eos, ours.bos, ours.start_of_turn, ours.end_of_turn] == [1, 2, 106, 107]
    assert ours.control >= {*range(108)}
    assert ours.control.isdisjoint(range(108, 473))  # new lines, spaces, HTML, bytes

    conversations = [random.Random(seed).choices(NASTY, k=4) for seed in range(60)]
    if HH.exists():
        conversations += [[*(text for _, text in pair.turns), pair.aligned]
                          for pair in read_pairs(HH)[0][::20]]
    for *texts, answer in conversations:
        messages = [{"role": role.replace("model", "assistant"), "content": text}
                    for role, text in chat(*texts, answer)]
        example = make_example(ours, chat(*texts), answer, 10**6)
        prompt, ids = example.tokens[:example.start], example.tokens + ours.encode("\n")
        assert prompt == prompt_tokens(ours, chat(*texts)) == theirs.apply_chat_template(
            messages[:-1], return_dict=False, add_generation_prompt=True)
        assert example.closed and ids == theirs.apply_chat_template(messages, return_dict=False)
    for text in NASTY:
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


def disguised(name):
    """A control token's name in the forms that a reader or a normalizer could take for it."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)
    forms = [name, name[:5], name[5:], f"<{name}bos>", f"▁{name}▁", wide, name[::-1], name.upper(),
             f"{name[0]}\u200b{name[1:]}", html.escape(name), f"<0x3C>{name[1:]}"]
    return forms + [unicodedata.normalize("NFKC", form) for form in forms]


CONTROL = {name for tokenizer in TOKENIZERS.values()
           for name in map(tokenizer.names.get, tokenizer.control)}
PIECES = st.sampled_from([form for name in sorted(CONTROL) for form in disguised(name)] + NASTY)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=8).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(TEXTS, TEXTS)
def test_no_text_becomes_a_control_token(tokenizer, a, b):
    """Also not two texts that are a name together: each is encoded by itself."""
    def placed(ids):
        return [tokenizer.names[id] for id in ids if id in tokenizer.control]

    bos, start, end, eos = "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"
    assert not any(map(tokenizer.encoder.token_to_id, map(tokenizer.token, tokenizer.control)))
    assert tokenizer.control.isdisjoint(tokenizer.encode(a + b))
    assert placed(prompt_tokens(tokenizer, chat(a, b, a))) == [bos, *[start, end] * 3, start]
    assert placed(make_example(tokenizer, chat(a), b, 10**6).tokens) == [bos, *[start, end] * 2]
    assert placed(make_example(tokenizer, chat(a), b, 10**6, "plain").tokens) == [bos, eos]
    assert placed(encode_item(tokenizer, chat(a, b), 10**6)[0]) == [bos, *[start, end] * 2]
    assert placed(sum(encode_item(tokenizer, a + b + ".", 10**6), [])) == [bos]
    question = shieldgemma_tokens(tokenizer, a, b, "Hate Speech")
    assert placed(question) == [bos, *[start, end] * 2]
    # What a model said is text without its control tokens.
    ids = tokenizer.encode(a)
    assert tokenizer.decode([*tokenizer.control, *ids, tokenizer.eos]) == tokenizer.decode(ids)


def test_merges_that_build_a_control_token_are_taken_out():
    spec = gemma_like_spec()
    for left, right in (("<", "u"), ("<u", "n"), ("<un", "used7>"), ("<unused7", ">")):
        spec["model"]["merges"].append([left, right])
        spec["model"]["vocab"].setdefault(left, 800 + len(left))
        spec["model"]["vocab"].setdefault(right, 820 + len(right))
    assert 14 not in Tokenizer(spec, "merges").encode("<unused7>")
    assert 998 in TOKENIZERS["other"].control and 999 in TOKENIZERS["other"].encode("a\n\n")


@pytest.mark.parametrize("damage", [
    lambda spec, model: spec.pop("model"), lambda spec, model: model.update(type="Unigram"),
    lambda spec, model: model.update(type="BPE", merges=["how zz"]),
    lambda spec, model: model.pop("unk_token"), lambda spec, model: model.update(unk_token="<eos>"),
    lambda spec, model: model["vocab"].update(how=2),
    lambda spec, model: model["vocab"].update({"<unk>": 2})])  # registered as 3
def test_tokenizers_that_cannot_serve(tmp_path, damage):
    spec = toy_spec()
    spec["added_tokens"].pop(2)  # <bos>
    load_tokenizer(write(tmp_path / "tokenizer.json", spec))
    damage(spec, spec["model"])
    write(tmp_path / "tokenizer.json", spec)
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_ids_that_no_text_gives_need_no_embedding(tmp_path):
    """Fillers of many kinds. A word beyond the embedding ends the loading."""
    spec = gemma_like_spec()
    rows = Tokenizer(spec, "plain").rows
    assert rows > 500
    spec = gemma_like_spec()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    pad = {"id": rows, "content": "[PAD]", "special": True, **flags}
    spec["added_tokens"].append(pad)
    spec["model"]["vocab"] |= {"<unused999>": rows + 1, "filler_0": rows + 2, "[extra]": rows + 3}
    write(tmp_path / "tokenizer.json", spec)
    write(tmp_path / "config.json", {"vocab_size": rows, "max_position_embeddings": 40})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.size == rows + 4 and max(tokenizer.encode("filler_0 [extra] [PAD]")) < rows

    # What is longer than the positions of the model is cut, with a word
    write(tmp_path / "pairs.json", [{"prompt": "a", "chosen": "b" * 99, "rejected": "c"}])
    (pair,), _ = load_examples(tmp_path / "pairs.json", tokenizer, 2048)
    assert [len(example.tokens) for example in pair] == [40, pair[1].start + 2]

    spec["model"]["vocab"]["qz"] = rows + 4
    spec["model"]["merges"].append(["q", "z"])
    write(tmp_path / "tokenizer.json", spec)
    with pytest.raises(InputError, match=f"ids up to {rows + 4}, .* {rows} embeddings"):
        load_tokenizer(tmp_path)


def test_mask_by_hand():
    toy = TOKENIZERS["toy"]
    nl, user, model, how, paint = toy.encode("\n user model how paint")
    example = make_example(toy, chat(" how\n"), "paint", 99)
    start, end = toy.start_of_turn, toy.end_of_turn
    tokens = [2, start, user, nl, how, end, nl, start, model, nl, paint, end]
    assert example == Example(tokens, 10, True)
    (row,) = pack([example], 14, 0, 0)
    assert row.tokens.tolist() == tokens + [0, 0]
    assert row.labels.tolist() == [-100] * 9 + [paint, end] + [-100] * 3
    assert row.documents.tolist() == [1] * 12 + [0, 0]
    assert [data.closing(toy), data.closing(toy, "plain")] == [end, 1]
    # Long examples are cut at the end of the answer, and dropped if the prompt fills them.
    for length in range(1, 14):
        cut = make_example(toy, chat("how"), "paint", length)
        assert cut == (Example(tokens[:length], 10, length >= 12) if length > 10 else None)


def test_plain_format_is_text_after_one_bos():
    ours = TOKENIZERS["registered"]
    example = make_example(ours, chat("hi", "<eos>hello ", "bye"), " ok\n", 99, "plain")
    text = "\n\nHuman: hi\n\nAssistant: <eos>hello\n\nHuman: bye\n\nAssistant:"
    assert example.tokens == [2, *ours.encode(text), *ours.encode(" ok"), 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=40))
def test_packing_keeps_every_example_whole(sizes):
    ids = iter(range(1, 10**6))  # each token is another one
    examples = [Example([next(ids) for _ in range(a + b)], a, True) for a, b in sizes]
    packed = []
    for row in pack(examples, 60, seed=0, epoch=1):
        used = row.documents > 0
        assert (row.labels[~used] == -100).all() and row.documents[used].diff().ge(0).all()
        for number in range(1, int(row.documents.max()) + 1):
            tokens = row.tokens[row.documents == number].tolist()
            example, = [example for example in examples if example.tokens == tokens]
            labels = [-100] * (example.start - 1) + tokens[example.start:] + [-100]
            assert row.labels[row.documents == number].tolist() == labels
            packed.append(tokens)
    assert sorted(packed) == sorted(example.tokens for example in examples)


def test_packing_order_is_what_it_was():
    """Numbers of the examples in each row, from commit 07df2e9: a run's rows never change."""
    sizes = [30, 12, 7, 25, 40, 3, 18, 22, 9, 33, 15, 5]
    examples = [Example([number + 1] * size, 1, True) for number, size in enumerate(sizes)]
    rows = [pack(examples, 50, seed=0, epoch=epoch) for epoch in (0, 1)]
    order = [[list(filter(None, row.tokens.unique_consecutive().tolist())) for row in epoch]
             for epoch in rows]
    assert order == [[[4, 9, 2], [10], [5], [7, 8, 3, 6], [1, 11, 12]],
                     [[10, 9, 3], [5, 12, 6], [11, 2, 8], [1, 7], [4]]]


HI = "\n\nHuman: hi\n\nAssistant: "


def pair(chosen=HI + "yes", rejected=HI + "no", **more):
    return {"chosen": chosen, "rejected": rejected} | more


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_pairs_by_hand(tmp_path):
    two = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d \n\nAssistant: "
    pairs, counts = read_pairs(write(
        tmp_path / "p.jsonl", pair(), "", pair(two + "e\n\nf", two + "g", category="x"),
        pair(rejected="\n\nHuman: ho\n\nAssistant: no"), pair(chosen="\n\nHuman: hi\n\nAssistant:"),
        pair(chosen=None), {"chosen": "x"}, {}, pair("\n\nAssistant: a", "\n\nAssistant: b"),
        pair("hello", "hello you"), pair("\n\nHuman: hi", "\n\nHuman: hi")))
    assert pairs == [Pair(chat("hi"), "yes", "no", 1),
                     Pair(chat("a", "b", "c d"), "e\n\nf", "g", 3)]
    assert str(counts) == (
        "10 read, 2 kept, 4 dropped with a system turn, or turns that don't alternate, 2 dropped "
        "without an aligned answer, 1 dropped whose sides don't share a prompt, 1 dropped with an "
        "empty answer")


def messages(*texts, first=0):
    roles = ("user", "assistant", "user", "assistant")[first:]
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def sides(make):
    return {"chosen": make("e\n\nf"), "rejected": make("g")}


ABC = messages("a", "b", "c")
HH_PROMPT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
FORMS = {
    "answers as texts": {"prompt": ABC} | sides(str),
    "conversations": {"prompt": "a"} | sides(lambda text: messages("a", "b", "c", text)),
    "a prompt of HH-RLHF's": {"prompt": HH_PROMPT} | sides(str),
    "a prompt without Assistant:": {"prompt": HH_PROMPT[:-12]} | sides(str),
    "stripped": sides(lambda text: f"{HH_PROMPT.strip()} {text}"),
    "single new lines": sides(lambda text: HH_PROMPT.replace("\n\n", "\n") + text),
    "single and double": sides(lambda text: HH_PROMPT.replace("\n\nA", "\nA") + text),
    "CRLF": sides(lambda text: f"{HH_PROMPT}{text}".replace("\n", "\r\n"))}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_forms_of_a_pair(tmp_path, row):
    path = write(tmp_path / "p.jsonl", row | {"n": 3})
    assert read_pairs(path)[0] == [Pair(chat("a", "b", "c"), "e\n\nf", "g", 1)]
    assert read_prompts(path)[0] == [Prompt(chat("a", "b", "c"), {"n": 3}, 1)]
    assert list(read_items(path)) == [chat("a", "b", "c", "e\n\nf"), chat("a", "b", "c", "g")]


ALONE = {
    "prompt and response": ({"prompt": "a", "response": "b"}, ("a", "b")),
    "an instruction with an input": ({"instruction": "mend", "input": "c", "output": "d"},
                                     ("mend\n\nc", "d")),
    "an empty input": ({"Instruction": "mend", "Input": "", "Output": "d"}, ("mend", "d")),
    "a context, and other columns": ({"instruction": "say", "context": "c", "response": "d",
                                      "category": "x"}, ("say\n\nc", "d")),
    "messages": ({"messages": messages("a", "b", "c", "d")}, ("a", "b", "c", "d")),
    "messages beside their prompt": ({"prompt": "a", "messages": messages("a", "b")}, ("a", "b")),
    "chosen alone": ({"chosen": HI + "yes"}, ("hi", "yes")),
    "chosen and no rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, ("a", "b"))}


@pytest.mark.parametrize("row, texts", ALONE.values(), ids=ALONE)
def test_rows_without_an_unaligned_answer(tmp_path, row, texts):
    """Each form is the turns that it says, and trains on its last answer alone."""
    *turns, answer = texts
    path = write(tmp_path / "p.jsonl", row)
    assert read_pairs(path)[0] == [Pair(chat(*turns), answer, "", 1)]
    tokenizer = TOKENIZERS["toy"]
    ((aligned, unaligned),), _ = load_examples(path, tokenizer, 99, paired=False)
    closed = [*tokenizer.encode(answer), tokenizer.end_of_turn]
    assert unaligned is None and aligned.tokens[aligned.start:] == closed


def test_mixed_rows_are_named_where_pairs_are_needed(tmp_path, capsys):
    alone = {"messages": messages("s", "t")}
    path = write(tmp_path / "p.jsonl", pair(), alone, {"messages": messages("s")}, pair(), alone)
    with pytest.raises(InputError, match=f"{path}:2: no unaligned answer .* --init random"):
        load_examples(path, TOKENIZERS["toy"], 99)
    examples, _ = load_examples(path, TOKENIZERS["toy"], 99, paired=False)
    assert [unaligned is None for _, unaligned in examples] == [False, True, False, True]
    assert "pairs: 2 without an unaligned answer" in capsys.readouterr().out


def test_prompts_by_hand(tmp_path):
    texts = {
        "a.txt": "one\ntwo\n\none\n\n three \n",
        "b.jsonl": '{"Prompt": "one", "goal": "g"}\n"two"\n{"GOAL": "one"}\n{"behavior": "three"}',
        "c.json": json.dumps([{"Instruction": text} for text in ("one", "two", "one", "three")]),
        "d.csv": '\ufeffid,Goal,Prompt\r\n1,g,one\r\n2,g,two\r\n3,g,one\r\n5,g,"three"\r\n'}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            prompts, counts = read_prompts(path)
            assert [prompt.turns for prompt in prompts] == [chat("one"), chat("two"), chat("three")]
            assert counts.dropped == {"with a prompt seen before": 1}
    assert read_prompts(tmp_path / "d.csv")[0][-1].fields == {"id": "5", "goal": "g"}


def test_what_is_one_prompt(tmp_path):
    text = f"go on:{HI}x\nHuman: y"
    path = write(tmp_path / "p.jsonl", {"prompt": "write", "chosen": text, "rejected": "no"})
    assert read_pairs(path)[0] == [Pair(chat("write"), text, "no", 1)]
    rows = [{"instruction": "mend", "input": text} for text in ("a ", "b", "", None)]
    rows += [{"prompt": HI + "sure"}, {"prompt": ABC}, {"Instruction": "mend", "Context": "c"}]
    path = write(tmp_path / "q.jsonl", *rows)
    texts = [prompt.turns[-1][1] for prompt in read_prompts(path)[0]]
    assert texts == ["mend\n\na", "mend\n\nb", "mend", (HI + "sure").strip(), "c", "mend\n\nc"]


def test_a_folder_of_csv_files_without_headers(tmp_path):
    """As HEx-PHI is published: a file for each category."""
    (tmp_path / "b 1.csv").write_bytes('\ufeff"how, do i ""x""?"\r\n\r\nhow do i y\r\n'.encode())
    write(tmp_path / "a.csv", "prompt", "z")
    assert read_prompts(tmp_path)[0] == [
        Prompt(chat("z"), {"category": "a"}, 2),
        Prompt(chat('how, do i "x"?'), {"category": "b 1"}, 1),
        Prompt(chat("how do i y"), {"category": "b 1"}, 3)]


def test_items_for_saes(tmp_path):
    path = write(tmp_path / "i.jsonl", pair(), {"prompt": "p", "response": "r"}, {"text": "t"},
                 {"messages": messages("a ", "b")}, {"messages": messages("s")})
    assert list(read_items(path)) == [chat("hi", "yes"), chat("hi", "no"), chat("p", "r"), "t",
                                      chat("a", "b")]
    assert list(read_items(write(tmp_path / "i.txt", "x ", "", "y"))) == ["x", "y"]


def test_parquet_and_lists_and_lines_of_json(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"prompt": ABC} | sides(lambda text: messages(text, first=1))
    parquet.write_table(pyarrow.Table.from_pylist([row | {"n": b"\xff"}]), tmp_path / "p.parquet")
    write(tmp_path / "p.json", row, {"chosen": "a"})
    write(tmp_path / "list.jsonl", json.dumps([row, {"chosen": "a"}], indent=1))
    for name in ("p.parquet", "p.json", "list.jsonl"):
        assert read_pairs(tmp_path / name)[0] == [Pair(chat("a", "b", "c"), "e\n\nf", "g", 1)]
    assert read_prompts(tmp_path / "p.parquet")[0][0].fields == {"n": "b'\\xff'"}
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="p.parquet: parquet needs .* JSON lines"):
        read_pairs(tmp_path / "p.parquet")


@pytest.mark.parametrize("name, content, message", [
    ("pairs.jsonl", b'{"chosen": 3}', ":1: expected text, or an object whose 'role' is text"),
    ("pairs.jsonl", b'{"prompt": "p", "response_0": "a"}', "no usable pair (chosen and"),
    ("x.jsonl", b'"a"\n{]', ":2: not valid JSON"),
    ("x.jsonl", b'{"prompt": "\\ud800"}', ":1: not valid JSON"),
    ("x.txt", b"a\n\xc3", ":2: not UTF-8"), ("x.txt", b"\n", "0 read"), ("x.xlsx", b"", ".csv"),
    ("x.jsonl", b"[" * 10**5, "not valid JSON"), ("x.jsonl", b"9" * 5000, ":1: not valid JSON"),
    ("x.csv", b"a,b\n1,2\n", ":2: no usable prompt"), ("x.csv", b'prompt\n"abc', "CSV"),
    ("x.csv", b"prompt,b\n1,2\n1\n", ":3: 1 columns"), ("x.csv", b"prompt\n", "0 read"),
    ("x.json", b'["a", 3]', ":2: "), ("x.csv", b"Topic\nb\n", ":2: no usable prompt"),
    ("x.parquet", b"PAR1", "not a complete parquet"), ("x.json", b'[""]', "with an empty prompt"),
    ("x.txt.gz", gzip.compress(b"a" * 999, mtime=0)[:-9], "can't be read")])
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        (read_pairs if name == "pairs.jsonl" else read_prompts)(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and message in str(error.value)


def test_show(tmp_path, monkeypatch, capsys):
    how = "\n\nHuman: how\n\nAssistant: "
    long = "\n\nHuman: the vault the vault\n\nAssistant: "
    path = write(tmp_path / "x.jsonl", pair(how + "paint", how + "paint the vault"),
                 pair(how + "vault", how + "paint"), pair(long, long),
                 pair(long + "how", long + "paint"))
    monkeypatch.setattr(sys, "argv", ["data.py", str(path), "--show", "1"])
    data.main()
    load_examples(path, TOKENIZERS["toy"], 12)
    out = capsys.readouterr().out
    assert "\033[32mpaint\033[0m\033[32m\033[7m<end_of_turn>\033[0m" in out
    assert "\033[2m\033[7m<bos><start_of_turn>\033[0m" in out
    for line in ("pairs: 4 read, 3 kept, 1 dropped with an empty answer",
                 "pairs: 1 more dropped, whose prompt fills 12 tokens",
                 "pairs: 1 answers cut to fit 12 tokens", f"── {path}:1 · 12 tokens",
                 "3 examples of 39 tokens, 6 trained on"):
        assert line in out.splitlines()
    assert out.count("──") == 1
    # A file's own escape codes don't reach the terminal.
    tokenizer = TOKENIZERS["bare"]
    text = data.colored(tokenizer, tokenizer.encode("\033[2J a\x9b1m \033]0;x\x07y\n"), 5)
    assert " ]0;x y\n" in text and "\033[2J" not in text and "\x9b" not in text
    with pytest.raises(InputError, match="each prompt fills 10 tokens"):
        load_examples(path, TOKENIZERS["toy"], 10)
