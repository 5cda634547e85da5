"""ability.py: likelihoods against plain full-logit sums and against transformers, readers, intervals."""

import json
import math
import random

import pytest
import tokenizers
import torch
from conftest import random_gemma, transformers_twin

import ability
import lora
from ability import Question, choices, perplexity, perplexity_change, perplexity_figure, read_questions
from files import InputError
from merge import merge
from model import save_model


class Letters:
    """A tokenizer of single characters, BOS 2."""
    bos = 2

    def encode(self, text):
        return [3 + ord(c) % 250 for c in text]


def plain(model, ids, first):
    """−Σ log p of ids[first:], from all logits at once."""
    logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    return -sum(logp[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_sums_are_those_of_full_logits_whatever_the_batch(gemma, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    spans = [(torch.randint(3, 300, (length,), generator=draw).tolist(), first)
             for length, first in ((5, 1), (40, 7), (2, 1), (17, 16), (40, 39))]
    wanted = [plain(gemma, *span) for span in spans]
    for batch in (8192, 1, 80):
        monkeypatch.setattr(ability, "BATCH", batch)
        assert ability.nlls(gemma, spans, "") == pytest.approx(wanted, rel=1e-5)


def test_perplexity_is_transformers_loss(gemma):
    texts, twin = ["a walk in the park", "b", "the quick brown fox " * 3], transformers_twin(random_gemma())
    told = perplexity(gemma, Letters(), texts)
    for text, (nats, tokens) in zip(texts, told):
        ids = torch.tensor([[2, *Letters().encode(text)]])
        assert tokens == len(text) and nats / tokens == pytest.approx(twin(ids, labels=ids).loss.item(), rel=1e-5)


def test_long_texts_are_read_in_windows(gemma, monkeypatch):
    monkeypatch.setattr(ability, "LENGTH", 10)
    ids = [2, *Letters().encode("x" * 7 + "y" * 18)]
    (nats, tokens), empty = perplexity(gemma, Letters(), ["x" * 7 + "y" * 18, ""])
    assert tokens == 25 and empty == (0.0, 0)
    assert nats == pytest.approx(sum(plain(gemma, ids[start:start + 11], 1) for start in (0, 10, 20)), rel=1e-5)


def test_perplexity_interval_by_hand():
    # 3 nats over 2 tokens and 1 over 2: mean 1, deviations ±1, error √(2·(1+1))/4 = 1/2
    figure = perplexity_figure([(3.0, 2), (1.0, 2), (0.0, 0)])
    assert figure["n"] == 2 and figure["mean"] == pytest.approx(math.e)
    assert (figure["low"], figure["high"]) == pytest.approx((math.exp(1 - 0.979982), math.exp(1 + 0.979982)))
    assert perplexity_figure([(2.0, 4)]) == {"mean": math.exp(0.5), "n": 1, "low": None, "high": None}
    assert perplexity_figure([(0.0, 0)])["mean"] is None


def test_the_change_of_perplexity_is_that_of_the_same_texts():
    """Against the same by brute force: the ratio, and its spread when texts are drawn again."""
    draw = random.Random(0)
    before = [(tokens * draw.gauss(3, 0.5), tokens) for tokens in draw.choices(range(20, 60), k=200)]
    after = [(nats + tokens * draw.gauss(0.1, 0.1), tokens) for nats, tokens in before]

    def ratio(rows):
        tokens = sum(before[i][1] for i in rows)
        return math.exp(sum(after[i][0] for i in rows) / tokens) / math.exp(sum(before[i][0] for i in rows) / tokens)

    found = perplexity_change(before, after)
    assert found["n"] == 200 and found["ratio"] == pytest.approx(ratio(range(200)))
    again = sorted(ratio(draw.choices(range(200), k=200)) for _ in range(2000))
    assert (found["low"], found["high"]) == pytest.approx((again[50], again[1950]), abs=2e-3)
    assert perplexity_change(before[:1], after[:1])["low"] is None and perplexity_change([(0.0, 0)], [(0.0, 0)])["ratio"] is None


def test_choices_take_the_likeliest(gemma):
    questions = [Question("Which one? Answer:", ["a", "a long answer", "c"], 0), Question("tell me", ["no", "yes it is"], 1)]
    for question, (right, per_character) in zip(questions, choices(gemma, Letters(), questions)):
        context = [2, *Letters().encode(question.context)]
        nats = [plain(gemma, context + Letters().encode(" " + answer), len(context)) for answer in question.answers]
        each = [value / len(answer) for value, answer in zip(nats, question.answers)]
        assert right == (min(nats) == nats[question.right]) and per_character == (min(each) == each[question.right])


def test_questions_of_either_layout(tmp_path):
    rows = [{"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}, {"ctx": "A man sits ", "endings": ["down.", "up."], "label": "0"},
            {"prompt": "Sky is", "choices": ["blue", "red"], "answer": 0}]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(path) == [Question("Question: 2 + 2?\nAnswer:", ["3", "4"], 1), Question("A man sits", ["down.", "up."], 0),
                                    Question("Sky is", ["blue", "red"], 0)]


@pytest.mark.parametrize("row", [{}, {"question": "a", "choices": ["b"], "answer": 0},
                                 {"question": "a", "choices": ["b", "c"], "answer": 2},
                                 {"question": "a", "choices": ["b", "c"], "answer": "D"},
                                 {"question": " ", "choices": ["b", "c"], "answer": 0},
                                 {"question": "a", "choices": ["b", 3], "answer": 0},
                                 {"question": "a", "choices": ["b", "c"], "answer": True},
                                 {"question": "a", "choices": ["b", "c"], "answer": "AB"},
                                 {"question": "a", "choices": ["b", "c"], "answer": -1}])
def test_wrong_questions_are_told_by_line(tmp_path, row):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n' + json.dumps(row))
    with pytest.raises(InputError, match="q.jsonl:2"):
        read_questions(path)


def test_the_harness_reads_the_same_likelihoods(tmp_path):
    """lm_eval's own Hugging Face model, on a base with our adapter folder (README's line), and on the merged checkpoint."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    transformers = pytest.importorskip("transformers")
    model = random_gemma(vocab_size=256)
    save_model(model, tmp_path / "base")
    for layer in lora.add_lora(model, 4, 8, "random", generator=torch.Generator().manual_seed(0)).values():
        torch.nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(1))
    lora.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"<{i}>": i for i in range(256)}, unk_token="<3>"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", bos_token="<2>", eos_token="<1>")
    theirs.save_pretrained(tmp_path / "words")
    spans = [([2, 9, 8, 7, 30, 31], 3), ([2, 100, 101, 102], 1)]
    ours = ability.nlls(model, spans, "")
    for arguments in ({"pretrained": str(tmp_path / "base"), "peft": str(tmp_path / "adapter")}, {"pretrained": str(tmp_path / "merged")}):
        theirs = harness.HFLM(**arguments, tokenizer=str(tmp_path / "words"), device="cpu", dtype="float32", batch_size=2)
        told = theirs._loglikelihood_tokens([(("", ""), ids[:first], ids[first:]) for ids, first in spans], disable_tqdm=True)
        assert [-value for value, _ in told] == pytest.approx(ours, rel=1e-4)
