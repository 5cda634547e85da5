"""experiments/concepts.py and experiments/sasa_demo.py: what they count on inputs made by hand."""

import itertools

import pytest
import torch

from data import load_tokenizer
from experiments import sasa_demo
from experiments.concepts import auroc, concept_report, labelled
from run.settings import TOY
from sae import JumpReLU
from saes.step import Spec, Trainer
from toy.world import HARM_VERBS, SENSITIVE_NOUNS, World


def test_auroc_is_the_share_of_pairs_in_order():
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (60, 3), generator=draw).float()
    labels = torch.rand(60, generator=draw) > 0.6
    for k in range(3):
        pairs = [*itertools.product(values[labels, k].tolist(), values[~labels, k].tolist())]
        wanted = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert auroc(values, labels)[k] == pytest.approx(wanted, abs=1e-12)


def test_a_concept_in_one_unit_and_one_in_two():
    """An SAE whose feature i is axis i, on sparse inputs."""
    draw, eye = torch.Generator().manual_seed(0), torch.eye(16)[:12]
    x = torch.zeros(3000, 16)
    present = torch.rand(3000, 12, generator=draw) < 0.2
    x[:, :12] = present * (1 + torch.rand(3000, 12, generator=draw))
    theta = torch.full((12,), 0.5)
    sae = JumpReLU(eye.T.contiguous(), torch.zeros(12), theta, eye, torch.zeros(16))
    single = concept_report(sae, x, x[:, 3] > 0)
    assert single["main"] == [3] and single["best"] == 3
    assert single["auroc"] > 0.999 and single["f1"] > 0.99
    split = concept_report(sae, x, (x[:, 3] > 0) | (x[:, 5] > 0))
    assert sorted(split["main"]) == [3, 5] and split["f1"] > 0.99 and 0.6 < split["auroc"] < 0.95


def test_the_toys_labels_name_the_words_and_the_answers():
    tokenizer = load_tokenizer(TOY)
    for example in labelled(World(0), tokenizer, 20):
        words = [tokenizer.token(token) for token in example["tokens"]]
        assert {len(letters) for letters in example["labels"].values()} == {len(words)}
        for concept, listed in (("harm verb", HARM_VERBS), ("sensitive noun", SENSITIVE_NOUNS)):
            for word, letter in zip(words, example["labels"][concept]):
                assert letter == "-" or (letter == "1") == (word in listed), word
        refusals = example["labels"]["refusal"]
        for i, word in enumerate(words):
            if refusals[i] != "-" and words[i - 2:i] == ["model", "\n"]:
                assert (refusals[i] == "1") == (word in ("sorry", "i", "no")), words


def test_the_demonstration_credits_what_holds_a_feature():
    """Blocks that are the planted planes hold all; rows swapped between two blocks split two."""
    world = sasa_demo.World({"circle": 4, "sphere": 4, "torus": 2}, 0)
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=draw)).Q.T
    world.bases = [basis[4 * i:4 * i + sasa_demo.DIMENSION[kind]]
                   for i, kind in enumerate(world.kinds)]
    swapped = basis[:48].clone()
    swapped[[18, 22]] = basis[[22, 18]]  # of the first two spheres a row each
    trainer = Trainer(Spec("sasa", 48, 8, block=4), torch.zeros(64), torch.Generator())
    for W_dec, held, units in ((basis[:48], 10, 1), (swapped, 8, 1.2)):
        trainer.parameters |= {"W_dec": W_dec, "W_enc": W_dec.T.contiguous()}
        figures = sasa_demo.recovered(trainer, torch.tensor(2.0), world, 2000)
        assert figures["held"] == held and figures["units"] == pytest.approx(units)
        assert max(figures["angles"]) < 0.5
        row = sasa_demo.summary([{("planted", "sasa", 2000, 0.0): figures}] * 2).splitlines()[-1]
        assert f"{held} to {held} of 10" in row
