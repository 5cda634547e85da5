"""Lost ability: what a model still knows once it has been made safe, from likelihoods alone, with nothing generated.

    perplexity(model, tokenizer, texts)        # nats and tokens of each text: exp of their ratio is the perplexity
    choices(model, tokenizer, questions)       # of each question, whether the right answer is the likeliest

Both run a model as it is, base or adapted. For the suites of the field, lm_eval opens a base model with our adapter (README).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from data import Tokenizer
from files import InputError, read_jsonl
from loss import IGNORE, nll_sum
from model import Gemma2

LENGTH = 1024       # tokens of context, at most: a longer text is read in windows of so many
BATCH = 8192        # tokens of one forward


@dataclass
class Question:
    """What is asked, the answers to choose from, and the index of the right one."""
    context: str
    answers: list[str]
    right: int


def read_questions(path: str | Path) -> list[Question]:
    """Multiple choice from JSON lines: {"question" or "prompt" or "ctx": str, "choices" or "endings": [str, …], "answer" or "label":
    index or letter}. A "question" is asked as "Question: …\\nAnswer:", the others stand as they are. Raises InputError, with the line."""
    questions = []
    for line, row in enumerate(read_jsonl(path), 1):
        asked = next((row[key] for key in ("question", "prompt", "ctx") if isinstance(row.get(key), str)), "")
        answers = row.get("choices", row.get("endings"))
        right = row.get("answer", row.get("label"))
        if isinstance(right, str):
            right = int(right[:9]) if right.isdecimal() else ord(right) - ord("A") if len(right) == 1 else None
        if not (asked.strip() and isinstance(answers, list) and len(answers) > 1 and type(right) is int and 0 <= right < len(answers)
                and all(isinstance(answer, str) and answer.strip() for answer in answers)):
            raise InputError(f'{path}:{line}: a question is {{"question": text, "choices": [two texts or more], '
                             '"answer": index or letter}')
        asked = f"Question: {asked.strip()}\nAnswer:" if "question" in row else asked.rstrip()
        questions.append(Question(asked, [answer.strip() for answer in answers], right))
    if not questions:
        raise InputError(f"{path} holds no question")
    return questions


def nlls(model, spans, label):
    """Summed −log p (nats) over the last tokens of each of `spans`, [(ids, first)]: of ids[first:], given what stands before.

    Right-padded batches of like length, the longest first; only the tokens that count reach the head. Of many processes each
    takes its share, and all get all sums.
    """
    device = model.embed_tokens.weight.device
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i][0]))
    in_step = parallel.in_step(model)
    order, sums = order if in_step else parallel.mine(order), {}
    with tqdm(total=len(order), desc=label, leave=False, delay=1, disable=None) as bar, torch.inference_mode(not in_step):
        while order:
            longest = len(spans[order[0]][0])
            batch, order = order[:max(1, BATCH // longest)], order[max(1, BATCH // longest):]
            tokens = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(tokens, IGNORE)
            for row, target, i in zip(tokens, labels, batch):
                ids, first = spans[i]
                row[:len(ids)] = torch.tensor(ids)
                target[first - 1:len(ids) - 1] = row[first:len(ids)]
            hidden = model.hidden(tokens.to(device))[0]
            for i, row, target in zip(batch, hidden, labels.to(device)):
                sums[i] = nll_sum(model, row[None], target[None])[0].item()
            bar.update(len(batch))
    sums = {i: value for part in parallel.gather(list(sums.items())) for i, value in part}
    return [sums[i] for i in range(len(spans))]


def perplexity(model: Gemma2, tokenizer: Tokenizer, texts: Sequence[str], label="perplexity") -> list[tuple[float, int]]:
    """[(nats, tokens)] of each text: −log p of all its tokens, each window of a long one on its own, behind one BOS."""
    windows = []                                                # (text, ids): each window begins with the last token of the one before
    for number, text in enumerate(texts):
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        windows += [(number, ids[start:start + LENGTH + 1]) for start in range(0, len(ids) - 1, LENGTH)]
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for (number, ids), value in zip(windows, nlls(model, [(ids, 1) for _, ids in windows], label)):
        nats[number] += value
        tokens[number] += len(ids) - 1
    return list(zip(nats, tokens))


def choices(model: Gemma2, tokenizer: Tokenizer, questions: Sequence[Question], label="choices") -> list[tuple[bool, bool]]:
    """Of each question, whether the right answer has the largest log p, and whether it has per character of its text:
    [(bool, bool)], what lm_eval calls acc and acc_norm. An answer follows its context after one space."""
    spans = []
    for question in questions:
        context = [tokenizer.bos, *tokenizer.encode(question.context)]
        for answer in question.answers:
            spans.append((context + tokenizer.encode(f" {answer}"), len(context)))
    values, told = iter(nlls(model, spans, label)), []
    for question in questions:
        nats = [next(values) for _ in question.answers]
        each = [value / len(answer) for value, answer in zip(nats, question.answers)]
        told.append((nats.index(min(nats)) == question.right, each.index(min(each)) == question.right))
    return told


def perplexity_figure(told: Sequence[tuple[float, int]]) -> dict:
    """{"mean": perplexity over all tokens, "n": texts, "low", "high"}: its 95 % interval, from the spread over texts."""
    told = [text for text in told if text[1]]
    if not told:
        return {"mean": None, "n": 0, "low": None, "high": None}
    nats, tokens = (math.fsum(column) for column in zip(*told))
    mean, n = nats / tokens, len(told)
    # The ratio of two sums, linearised around itself
    error = math.sqrt(n / (n - 1) * math.fsum((a - mean * b) ** 2 for a, b in told)) / tokens if n > 1 else math.nan
    low, high = (math.exp(mean + sign * 1.959964 * error) if n > 1 else None for sign in (-1, 1))
    return {"mean": math.exp(mean), "n": n, "low": low, "high": high}


def perplexity_change(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> dict:
    """{"n", "ratio", "low", "high"}: by what two models' perplexity of the same texts differs, paired text by text."""
    found = perplexity_figure([(a - b, tokens) for (b, tokens), (a, _) in zip(before, after, strict=True)])
    return {"n": found["n"], "ratio": found["mean"], "low": found["low"], "high": found["high"]}
