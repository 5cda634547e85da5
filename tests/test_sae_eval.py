"""sae_eval.py: figures that must come out of SAEs made by hand, AUROC against counting pairs, the toy's labels, the tables."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from toy import build as toy
from conftest import random_gemma
from data import load_tokenizer
from sae import JumpReLU, SASA
from saes.measure import auroc, batches, concept_report, concepts_table, histogram, letters, logistic, measure, measures_table
from saes.train import encode_item

D = 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    toy.write_tokenizer(folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder)
    model = random_gemma(vocab_size=tokenizer.size, num_hidden_layers=3)
    return model, tokenizer, batches(tokenizer, toy.World(0).corpus(12, "eval"), 96, 500)


def identity(layer):
    """Codes of x and −x, which together give x back."""
    eye = torch.eye(D)
    return JumpReLU(torch.cat((eye, -eye), 1), torch.zeros(2 * D), torch.zeros(2 * D), torch.cat((eye, -eye)), torch.zeros(D), layer=layer)


def test_a_perfect_sae_loses_nothing(world):
    model, tokenizer, rows = world
    clean = measure(model, tokenizer, {1: identity(1)}, rows)[0]
    assert math.isclose(clean["ev"], 1, abs_tol=1e-6) and math.isclose(clean["l0"], D, abs_tol=0.1) and clean["dead"] == 0
    assert math.isclose(clean["ce"]["spliced"], clean["ce"]["clean"], abs_tol=1e-4) and abs(clean["kl"]["spliced"]) < 1e-4
    assert clean["ce_recovered"] == pytest.approx({"zero": 1, "mean": 1}, abs=0.01)
    assert clean["kl_recovered"]["zero"] == pytest.approx(1, abs=0.01)


def test_figures_of_an_sae_that_writes_the_mean(world):
    """x̂ = the mean for every token: EV 0, all units dead, and the loss of mean-ablation, so nothing recovered against it."""
    model, tokenizer, rows = world
    tokens, documents, labels = (torch.cat(part) for part in zip(*rows))
    seen = (documents > 0) & (tokens != tokenizer.bos)
    x = model.hidden(tokens, documents, capture=(1,))[1][1][seen]
    sae = JumpReLU(torch.zeros(D, 5), torch.zeros(5), torch.ones(5), torch.zeros(5, D), x.mean(0), layer=1)
    found = measure(model, tokenizer, {1: sae}, rows)[0]
    assert abs(found["ev"]) < 1e-5 and found["l0"] == 0 and found["dead"] == 1 and found["tokens"] == int(seen.sum())
    assert found["ce_recovered"]["mean"] == pytest.approx(0, abs=1e-3) and found["kl_recovered"]["mean"] == pytest.approx(0, abs=1e-3)
    plain = F.cross_entropy(model(tokens, documents).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert found["ce"]["clean"] == pytest.approx(plain.item(), rel=1e-4)


def test_batches_leave_no_hooks_and_tables_print(world):
    model, tokenizer, rows = world
    W = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q.T
    sasa = SASA(W.T.contiguous(), torch.zeros(D), W, torch.zeros(D), 4, 16, layer=1)  # all blocks stay: perfect
    found = measure(model, tokenizer, {1: sasa}, rows)
    assert found[0]["ev"] == pytest.approx(1, abs=1e-5) and not model.layers[1]._forward_hooks
    assert found[0]["ranks"]["stable"] == pytest.approx([4.0] * 16, abs=1e-3)
    assert "16 blocks of 4" in measures_table(found) and "100.0" in measures_table(found)


def test_auroc_is_the_share_of_pairs_in_order():
    draw = torch.Generator().manual_seed(0)
    values, labels = torch.randint(0, 6, (60, 7), generator=draw).float(), torch.rand(60, generator=draw) > 0.6
    for k in range(7):
        pairs = list(itertools.product(values[labels, k].tolist(), values[~labels, k].tolist()))
        wanted = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert auroc(values, labels)[k] == pytest.approx(wanted, abs=1e-12)


def test_logistic_regression_finds_the_plane():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(800, 5, generator=draw)
    w, b = logistic(x, x @ torch.tensor([1.0, 2, 0, 0, 0]) > 1)
    assert F.cosine_similarity(w, torch.tensor([1.0, 2, 0, 0, 0]), dim=0) > 0.99 and b < 0


def axes(n, draw, features=12):
    """(x, an SAE whose feature i is axis i): non-negative, sparse inputs in 16 dimensions."""
    eye = torch.eye(16)[:features]
    x = torch.zeros(n, 16)
    x[:, :features] = (torch.rand(n, features, generator=draw) < 0.2) * (1 + torch.rand(n, features, generator=draw))
    return x, JumpReLU(eye.T.contiguous(), torch.zeros(features), torch.full((features,), 0.5), eye, torch.zeros(16))


def test_a_concept_in_one_unit_and_one_in_two():
    x, sae = axes(3000, torch.Generator().manual_seed(0))
    one = concept_report(sae, x, x[:, 3] > 0)
    assert one["units"] == 1 and one["main"] == [3] and one["best"] == 3
    assert one["auroc"] > 0.999 and one["f1"] > 0.99 and one["absorbed"] == 0
    two = concept_report(sae, x, (x[:, 3] > 0) | (x[:, 5] > 0))
    assert concept_report(sae, x, (x[:, [3, 5, 7]] > 0).any(1))["units"] == 3
    assert two["units"] == 2 and sorted(two["main"]) == [3, 5] and two["f1"] > 0.99 and 0.6 < two["auroc"] < 0.95


def test_absorption_is_seen():
    """Direction 0 is the concept. On a third of its tokens one of eleven features stands in for feature 0, writing the concept
    and a detail of its own: these tokens, and no others, are absorbed. Each is too rare for a sparse probe to want it."""
    draw = torch.Generator().manual_seed(0)
    n, details = 4000, 11
    concept = torch.arange(n) < n // 2
    x = 0.02 * torch.randn(n, 16, generator=draw)
    x[concept, 0] += 1
    for i in range(details):
        x[60 * i:60 * (i + 1), 1 + i] += 1
    W_enc, W_dec = torch.eye(16)[:, :12].clone(), torch.eye(16)[:12].clone()
    honest = JumpReLU(W_enc, torch.zeros(12), torch.full((12,), 0.5), W_dec, torch.zeros(16))
    W_enc, W_dec = W_enc.clone(), W_dec.clone()
    W_enc[1:12, 0] = -1                                                              # a detail's presence silences feature 0
    W_dec[1:12, 0] = 1                                                               # and what writes the detail writes the concept too
    found = concept_report(JumpReLU(W_enc, torch.zeros(12), torch.full((12,), 0.5), W_dec, torch.zeros(16)), x, concept)
    assert found["main"] == [0]
    assert found["absorbed"] == pytest.approx(0.33, abs=0.04) and found["fraction"] == pytest.approx(0.33, abs=0.04)
    doubled = concept_report(JumpReLU(honest.W_enc, torch.zeros(12), torch.full((12,), 0.5), W_dec, torch.zeros(16)), x, concept)
    assert doubled["main"] == [0] and doubled["absorbed"] < 0.01 and doubled["fraction"] > 0.1   # feature 0 isn't silent
    clean = concept_report(honest, x, concept)
    assert clean["main"] == [0] and clean["absorbed"] < 0.01 and clean["fraction"] < 0.06


def test_blocks_are_measured_as_units():
    """Two planes, the concept is in the second: one block, whatever the direction within it; a random plane does worse."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q.T[:8]
    on = torch.rand(3000, 4, generator=draw) < 0.3
    parts = F.normalize(torch.randn(3000, 4, 2, generator=draw), dim=2) * on[..., None]
    x = parts.flatten(1) @ basis
    sae = SASA(basis.T.contiguous(), torch.zeros(8), basis, torch.zeros(16), 2, 4)
    found = concept_report(sae, x, on[:, 1])
    assert found["best"] == 1 and found["auroc"] > 0.999 and found["auroc"] > found["controls"]["random subspaces"]
    assert set(found["controls"]) == {"random subspaces", "untrained SAE"}
    assert "harm" in concepts_table([{"layer": 1, "concept": "harm"} | found])


def test_labels_of_the_toy_are_where_they_should_be(world):
    _, tokenizer, _ = world
    made = toy.World(0)
    seen = dict.fromkeys(["verb", "noun", "harm verb", "sensitive noun", "harm", "jailbreak", "guard", "refusal"], 0)
    for turns, (ids, marks) in zip(made.corpus(40, "x"), made.labelled(tokenizer, 40, "x")):
        assert encode_item(tokenizer, turns, 10**6) == [ids] and marks.keys() == seen.keys()
        names = [tokenizer.token(i) for i in ids]
        for concept, values in marks.items():
            assert len(values) == len(ids) and set(values) <= {-1, 0, 1}
            seen[concept] += sum(value == 1 for value in values)
        assert {name for name, mark in zip(names, marks["harm verb"]) if mark == 1} <= set(toy.HARM_VERBS)
        assert {name for name, mark in zip(names, marks["noun"]) if mark == 1} <= set(toy.SENSITIVE_NOUNS + toy.PLAIN_NOUNS)
        assert all(mark == -1 or name not in toy.HARM_VERBS + toy.PLAIN_VERBS for name, mark in zip(names, marks["harm"]))
        answers = " ".join(said for who, said in turns if who == "model")
        assert (1 in marks["refusal"]) == any(word in answers for word in ("sorry", "won't assist", "must refuse"))
    assert all(count > 3 for count in seen.values())


def test_letters_and_histogram():
    class Names:
        names = {1: " apple", 2: "bee", 3: " Boat", 4: " 12", 5: " ant"}

        def token(self, i):
            return self.names[i]
    found = letters(Names(), torch.tensor([1, 2, 3, 4, 5]))
    assert {name: labels.tolist() for name, labels in found.items()} == {
        "begins with a": [True, False, False, False, True], "begins with b": [False, False, True, False, False]}
    assert histogram([0.0, 1e-5, 5e-4, 5e-3, 0.05, 0.5, 0.2]) == [1, 1, 1, 1, 1, 2]
