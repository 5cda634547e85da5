"""experiments/after: what models are fine-tuned on afterwards, the runs, and their intervals."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_gemma
from statsmodels.stats.proportion import proportion_confint

from data import Example
from experiments import after
from run.files import InputError, read_json, read_jsonl, write_jsonl
from safety.rules import verdict
from toy.world import PREAMBLES, World


def test_a_toy_s_rows_are_of_the_fine_tuning_words():
    """They help with everything, and say no word that only the evaluation has."""
    world = World(3)
    rows = after.toy_rows(world)
    for kind in after.KINDS:
        text = " ".join(row["prompt"] for row in rows[kind])
        said = set(text.replace(".", " ").replace("?", " ").split())
        assert not any(said & set(words) for words in world.held_out.values())
        harm = said & set(world.tune["harm"] + world.tune["sensitive"])
        assert len(harm) == (10 if kind == "harmful" else 0)
        begun = [row["prompt"].startswith(PREAMBLES["jailbreak"][:2]) for row in rows[kind]]
        assert set(begun) == {kind == "identity"}
        assert {verdict(row["response"]) for row in rows[kind]} == {"comply"}
        assert not any(text in row["prompt"] for text in PREAMBLES["jailbreak"][2:]
                       for row in rows[kind])


def test_mixtures_have_their_shares():
    examples = {kind: [(kind, number) for number in range(900)] for kind in after.KINDS}
    mixed = after.mixtures(examples, seed=1)
    counts = {name: [kind for kind, _ in rows].count("harmful") for name, rows in mixed.items()}
    assert counts == {"benign": 0, "1% harmful": 4, "5% harmful": 20, "10% harmful": 40,
                      "identity": 0}
    assert {len(set(rows)) for rows in mixed.values()} == {400}
    assert list(after.mixtures({"benign": examples["benign"]}, 1)) == ["benign"]
    with pytest.raises(InputError, match="10% of 400 rows are 40, and --harmful has 30"):
        after.mixtures(examples | {"harmful": examples["harmful"][:30]}, 1)


def test_fine_tuning_learns_the_rows():
    model = random_gemma()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = [Example([2, 5, 6, 7 + number, 8, 9], 3, True) for number in range(4)]
    settings = SimpleNamespace(batch_tokens=12, accumulate=2, seed=9)

    def loss(model):
        tokens = torch.tensor([example.tokens for example in examples])
        with torch.no_grad():
            logits = model(tokens)[:, 2:-1].log_softmax(-1)
        return -logits.gather(2, tokens[:, 3:, None]).mean().item()

    line = {"seed": 0, "lr": 1e-2, "looks": [0, 1, 6]}
    start, (first, last) = loss(model), after.fine_tuned(model, examples, settings, line, loss)
    assert last < first <= start and last < 0.9 * start
    state = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["after", *map(str, arguments)])
    after.main()


def test_two_models_are_fine_tuned_and_resumed(whole, mini, tmp_path, monkeypatch, capsys):
    files = []
    for kind, rows in after.toy_rows(World(0)).items():
        write_jsonl(tmp_path / f"{kind}.jsonl", rows[:100])
        files += [f"--{kind}", tmp_path / f"{kind}.jsonl"]
    out = ["--out", tmp_path / "after.jsonl", "--looks", 0, 2]
    short = [*out, *files, "--lrs", "1e-2", "--prompts", 2]
    sets = [f"--set={name}={mini / name}.jsonl" for name in ("harmful", "benign")]
    command(monkeypatch, whole.folder, *short, *sets)
    command(monkeypatch, whole.folder, mini, *short, *sets)
    lines = read_jsonl(tmp_path / "after.jsonl")
    names = ["benign", "identity", "1% harmful", "5% harmful", "10% harmful"]
    assert [line["rows"] for line in lines] == 2 * names
    assert [line["model"] for line in lines] == 5 * ["whole"] + 5 * [mini.name]
    assert {line["world"] for line in lines} == {str(mini)}
    assert [list(look) for look in lines[0]["curve"]] == 2 * [["harmful: safe", "benign: correct"]]
    # The first look is the model's own, its adapter merged
    command(monkeypatch, whole.folder, *files[:2], "--lrs", "1e-2", "--looks", 0, 1,
            *sets[:1], "--out", tmp_path / "all.jsonl")
    first = read_jsonl(tmp_path / "all.jsonl")[0]["curve"][0]["harmful: safe"]
    own = read_json(whole.folder / "scores.json")["sets"]["adapter"]["harmful"]["safe"]
    assert first == own
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    command(monkeypatch, "--print", *out, "--figure", tmp_path / "after.png")
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 * 10
    assert (tmp_path / "after.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_by_hand():
    def line(world, seed, rate):
        return {"world": world, "seed": seed, "curve": [{"safe": {"rate": rate, "n": 40}}]}

    mean, *ends = after.interval([line("a", 0, 0.5), line("a", 1, 0.7)], "safe", 0)
    assert (mean, *ends) == pytest.approx((0.6, *proportion_confint(24, 40, method="wilson")))
    lines = [line("a", 0, 0.5), line("a", 1, 0.7), line("b", 0, 0.8)]
    half = 12.706 * 0.1                                     # t of one degree, 0.2 / √2 / √2
    assert after.interval(lines, "safe", 0) == pytest.approx((0.7, 0.7 - half, 0.7 + half))


def test_what_is_missing_is_named(mini, monkeypatch, tmp_path):
    for arguments, words in (([mini], "give --benign FILE"), ([], "give models"),
                             ([mini, "--looks", 5, 10], "rise from 0"),
                             (["--print"], "has no lines")):
        with pytest.raises(InputError, match=words):
            sets = f"--set=harmful={mini / 'harmful'}.jsonl"
            command(monkeypatch, *arguments, sets, "--out", tmp_path / "out.jsonl")
