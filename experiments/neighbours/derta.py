"""DeRTa (arXiv 2407.09121): refuse at any place of an answer, not only at its first token.

    python -m experiments.neighbours.derta --init random --out runs/derta
    python eval.py runs/derta --sets toy-harmful --attack prefix --out prefix

With q a prompt, r its aligned and r̂ its unaligned answer, the loss is (equation 2)

    − E log P(r | q, r̂_<k)  −  E Σ_t log P(sorry | q, r̂_<t),   t = 1 … |r̂|,   k from 0 to |r̂|

Ours: k is drawn anew in each epoch, r̂_<k never holds the token that closes r̂ (the authors' data
doesn't either) and is cut where r wouldn't fit; "sorry", one word in the paper, is the first token
of the pair's own r; a pair of which our rules don't read r as a refusal of what r̂ complies with is
trained on r alone, as the paper's helpful answers are; each trained token weighs the same.
"""

import random

from data import Example, pack
from experiments.neighbours import shared
from fused import IGNORE
from run import parallel


def behind_prefix(aligned: Example, unaligned: Example, length: int, draw: random.Random):
    """The aligned answer behind the first k tokens of the unaligned one, k at random."""
    answer = unaligned.tokens[unaligned.start:len(unaligned.tokens) - unaligned.closed]
    k = draw.randint(0, min(len(answer), length - len(aligned.tokens)))
    tokens = aligned.tokens[:aligned.start] + answer[:k] + aligned.tokens[aligned.start:]
    return Example(tokens, aligned.start + k, aligned.closed, aligned.line)


def transitions(pairs, length, seed, epoch):
    """Rows of the unaligned answers, each of whose labels is the first token of the refusal."""
    refusals = {tuple(unaligned.tokens): aligned.tokens[aligned.start]
                for aligned, unaligned in pairs}
    rows = pack([unaligned for _, unaligned in pairs], length, seed, epoch)
    for row in rows:
        for number in range(1, int(row.documents.max()) + 1):
            inside = row.documents == number
            key = tuple(row.tokens[inside].tolist())
            row.labels[inside & (row.labels != IGNORE)] = refusals[key]
    return rows


def pack_pairs(pairs, length, seed, epoch):
    """Rows of both terms in the place of data.pack's, for pairs (aligned, unaligned or None)."""
    draw = random.Random(f"{seed} {epoch} derta")
    harmful = [pair for pair in pairs if pair[1]]
    answers = [behind_prefix(*pair, length, draw) if pair[1] else pair[0] for pair in pairs]
    rows = pack(answers, length, seed, epoch) + transitions(harmful, length, seed, epoch)
    draw.shuffle(rows)
    return rows


if __name__ == "__main__":
    parallel.run(lambda: shared.main_of_pairs(pack_pairs))
