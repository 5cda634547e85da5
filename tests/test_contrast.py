"""contrast.py against autograd's dense gradients, a matching pursuit written down, and one example at a time."""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SETS, command, ended, random_gemma
from test_features import CONTROL, random_pairs, random_sae

import contrast
from data import load_tokenizer, make_example, prompt_tokens
from data import Prompt
from features import Subspace, choose_by_loss, gradient_moments, load_subspaces, module_bases, norm_gain, save_selection, serving_layer
from features import main as choose
from run.files import InputError, read_json

LAYERS = (1, 2)                 # of 4 blocks, so that each serves some readers


def plain_loss(model, pairs):
    """L straight from its definition: a forward for each answer, log softmax of all logits."""
    sides = []
    for side in range(2):
        total, count = 0, 0
        for pair in pairs:
            tokens, start = torch.tensor(pair[side].tokens), pair[side].start
            told = model(tokens[None])[0].double().log_softmax(-1)[start - 1:-1]
            total, count = total - told.gather(1, tokens[start:, None]).sum(), count + len(tokens) - start
        sides.append(total / count)
    return sides[0] - sides[1]


def modules(model):
    return {name: module for name, module in model.named_modules() if name.endswith(contrast.TARGETS)}


def unit(count, size, seed):
    return torch.nn.functional.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_gradients_equal_autograds(batch_tokens):
    model, pairs = random_gemma(std=0.1).double(), random_pairs(9)
    found = contrast.contrast_gradients(model, pairs, batch_tokens)
    weights = {name: module.weight.requires_grad_() for name, module in modules(model).items()}
    dense = torch.autograd.grad(plain_loss(model, pairs), list(weights.values()))
    assert found.keys() == weights.keys() and len(found) == 16
    for (name, G), wanted in zip(found.items(), dense):
        assert G.dtype == torch.float64 and (G - wanted).norm() < 1e-5 * wanted.norm(), name         # norms are in float32


def test_float32_sums_and_files(gemma, tmp_path):
    """Sums of a bfloat16 model are float32; those that lie in files are the same numbers, and nothing stays behind."""
    pairs = random_pairs(5)
    assert all(G.dtype == torch.float32 for G in contrast.contrast_gradients(gemma.bfloat16(), pairs, 64).values())
    plain, mapped = contrast.contrast_gradients(gemma.float(), pairs, 64), contrast.contrast_gradients(gemma, pairs, 64, tmp_path)
    assert all(torch.equal(plain[name], mapped[name]) for name in plain) and plain["layers.0.self_attn.q_proj"].any()
    assert not list(tmp_path.iterdir())


def test_sums_that_dont_fit_choose_the_same_from_files(gemma, tmp_path, monkeypatch):
    saes, found, zeros, folders = {layer: random_sae(layer) for layer in LAYERS}, [], contrast._zeros, []
    monkeypatch.setattr(contrast.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(contrast, "_zeros", lambda like, folder: folders.append(folder) or zeros(like, folder))
    for fit in (True, False):
        monkeypatch.setattr(contrast, "fits", lambda model, fit=fit: fit)
        found.append(choose_by_loss(gemma, saes, None, random_pairs(4), 6, 3, 64, "gradient"))
    assert folders[:16] == [None] * 16 and all(folder.startswith(str(tmp_path)) for folder in folders[16:]) and len(folders) == 32
    assert not list(tmp_path.iterdir())
    for key, choice in found[0].items():
        assert torch.equal(choice.chosen, found[1][key].chosen) and torch.equal(choice.U, found[1][key].U)


def test_a_disk_too_small_for_the_sums_is_said_before_the_first_row(gemma, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(contrast.os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device.*TMPDIR"):
        contrast.contrast_gradients(gemma, random_pairs(3), 64, str(tmp_path))


def test_no_other_gradient_is_made_and_one_at_a_time(gemma, monkeypatch):
    for parameter in gemma.layers[0].mlp.parameters():                        # as it may be found
        parameter.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in gemma.named_parameters()}
    seen, into = set(), contrast._into

    def watched(total):
        add = into(total)

        def hook(weight):
            held = [name for name, parameter in gemma.named_parameters() if parameter.grad is not None]
            assert len(held) == 1 and held[0].endswith(tuple(f"{name}.weight" for name in contrast.TARGETS))
            seen.add(held[0])
            add(weight)
        return hook
    monkeypatch.setattr(contrast, "_into", watched)
    contrast.contrast_gradients(gemma, random_pairs(3))
    assert len(seen) == 16 and all(parameter.grad is None for parameter in gemma.parameters())
    assert before == {name: parameter.requires_grad for name, parameter in gemma.named_parameters()}
    contrast.contrast_gradients(gemma, random_pairs(3))
    assert all(not module.weight._post_accumulate_grad_hooks for module in modules(gemma).values())


MEMORY = """
import sys
sys.path.append("tests")
from conftest import random_gemma
from test_contrast import contrast, random_pairs
for count in (10, 100):
    contrast.contrast_gradients(random_gemma(), random_pairs(count), 512)
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_pairs():
    small, large = map(int, subprocess.check_output([sys.executable, "-c", MEMORY], cwd=ROOT, text=True).split())
    assert large < small + 20_000, f"{small} kB for 10 pairs, {large} kB for 100"


def test_decision_asks_for_harmless_prompts(mini, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", list(map(str, ["select.py", "--model", mini, "--sae", mini / "sae", "--data", mini / "train.jsonl",
                                                    "--select", "decision", "--out", tmp_path / "s"])))
    with pytest.raises(InputError, match="--harmless FILE"):
        choose()


def test_nothing_to_contrast(gemma):
    with pytest.raises(InputError, match="no pairs"):
        contrast.contrast_gradients(gemma, [])
    with pytest.raises(InputError, match="nothing to choose by"):
        contrast.greedy(unit(20, 8, 0), torch.zeros(8, 8, dtype=torch.float64), 4, 2)
    with pytest.raises(InputError, match="no feature differs"):
        contrast.weighted(unit(20, 8, 0), torch.zeros(20), 4, 2)


# ---------------------------------------------------------------------------------------------------------------
# From gradients to features

def problem(seed, n=40, d=24, features=96):
    """Gradients whose energy falls off, so that the picks matter, and unit rows."""
    draw = torch.Generator().manual_seed(seed)
    G = torch.randn(n, d, generator=draw, dtype=torch.float64) * 0.8 ** torch.arange(d)
    return G @ torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q, unit(features, d, seed + 100)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_the_pursuit_written_down(seed):
    G, rows = problem(seed)
    found = contrast.greedy(rows, contrast.gram([G[:25], G[25:]]), 12, 6)
    Q, chosen, scores = torch.zeros(24, 0, dtype=torch.float64), [], []
    for _ in range(12):
        P = torch.eye(24, dtype=torch.float64) - Q @ Q.T
        values = [((G @ P @ w).square().sum() / (P @ w).square().sum()).item() if i not in chosen else -1
                  for i, w in enumerate(rows.double())]
        chosen.append(max(range(96), key=values.__getitem__))
        scores.append(values[chosen[-1]] / G.square().sum().item())
        Q = torch.linalg.qr(rows[chosen].double().T).Q
    assert found.chosen.tolist() == chosen and found.scores.tolist() == pytest.approx(scores, rel=1e-4)
    wanted = torch.linalg.svd(G @ Q @ Q.T).Vh[:6].T
    assert (found.U.T @ found.U - torch.eye(6)).abs().max() < 1e-5
    assert (found.U @ found.U.T - wanted @ wanted.T).abs().max() < 1e-4
    assert found.explained == pytest.approx(((G @ wanted).square().sum() / G.square().sum()).item(), rel=1e-4)


def test_greedy_takes_no_copy_and_stops_at_the_whole_space():
    G, rows = problem(0)
    rows[50] = rows[51] = rows[52]
    found = contrast.greedy(rows, contrast.gram([G]), 96, 24)
    assert len(found.chosen) == 24 and len({50, 51, 52} & set(found.chosen.tolist())) <= 1
    assert found.explained == pytest.approx(1, abs=1e-6)


def test_score_by_hand():
    G, rows = problem(1)
    found = contrast.score(rows, contrast.gram([G]), 10, 4)
    c = (G @ rows.double().T).square().sum(0)
    chosen = c.topk(10).indices
    assert found.chosen.tolist() == chosen.tolist()
    assert found.scores.tolist() == pytest.approx((c[chosen] / G.square().sum()).tolist(), rel=1e-5)
    wanted = torch.linalg.svd(c[chosen, None] * rows[chosen].double()).Vh[:4].T
    assert (found.U @ found.U.T - wanted @ wanted.T).abs().max() < 1e-4


def test_rotation_keeps_the_span_and_evens_the_columns():
    G, rows = problem(2)
    U = contrast.greedy(rows, contrast.gram([G]), 16, 8).U
    turned = contrast.rotated(U, 3)
    assert (turned @ turned.T - U @ U.T).abs().max() < 1e-5 and (turned.T @ turned - torch.eye(8)).abs().max() < 1e-5
    assert (G @ turned.double()).abs().sum() > (G @ U.double()).abs().sum() and torch.equal(turned, contrast.rotated(U, 3))


def test_candidate_of_a_block_is_what_the_gradient_carries_most():
    G, _ = problem(3)
    rows, moment = unit(60, 24, 5).unflatten(0, (20, 3)), contrast.gram([G])
    found = contrast.candidates(rows, moment)
    draws = torch.nn.functional.normalize(torch.randn(20, 500, 3, generator=torch.Generator().manual_seed(0)) @ rows, dim=-1)
    assert (found.norm(dim=1) - 1).abs().max() < 1e-5
    for block in range(20):
        best, others = contrast.energy(found[block:block + 1], moment), contrast.energy(draws[block], moment)
        assert best >= others.max() and best < 1.1 * others.max()
    assert torch.equal(contrast.candidates(rows[:, :1], moment), torch.nn.functional.normalize(rows[:, 0], dim=1))


# ---------------------------------------------------------------------------------------------------------------
# Modules, sides, norms

def test_moments_are_of_the_modules_that_a_layer_serves(gemma):
    gradients = {name: torch.randn(module.weight.shape) for name, module in modules(gemma).items()}
    found = gradient_moments(gemma, gradients, LAYERS)
    w = unit(1, 64, 7)[0]
    for (layer, side), moment in found.items():
        wanted = 0
        for name, G in gradients.items():
            writer = name.endswith("o_proj")
            if (side == "writers") == writer and serving_layer(int(name.split(".")[1]), writer, LAYERS) == layer:
                wanted += ((w @ G) if writer else (G @ w)).square().sum().item()
        assert (w.double() @ moment @ w.double()).item() == pytest.approx(wanted, rel=1e-4)
    assert found.keys() == {(layer, side) for layer in LAYERS for side in ("readers", "writers")}
    blocks = gradient_moments(gemma, gradients, LAYERS, by_block=True)
    assert len(blocks) == 8 and torch.allclose(sum(K for key, K in blocks.items() if key[:2] == (1, "readers")), found[1, "readers"])


def test_norm_aware_moments_are_of_the_mapped_directions(gemma):
    """What u is worth in the residual stream's coordinates is what the module gains along u/(1 + w), for each block."""
    gradients = {name: torch.randn(module.weight.shape, dtype=torch.float64) for name, module in modules(gemma).items()}
    found, u = gradient_moments(gemma, gradients, LAYERS, norm_aware=True, by_block=True), unit(1, 64, 8)[0].double()
    for (_, side, number), moment in found.items():
        writer = side == "writers"
        mapped = u / norm_gain(gemma.layers[number], writer)[0].double()
        wanted = sum(((mapped @ G) if writer else (G @ mapped)).square().sum() for name, G in gradients.items()
                     if name.startswith(f"layers.{number}.") and name.endswith("o_proj") == writer)
        assert (u @ moment @ u).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_bases_by_side_and_their_file(gemma, tmp_path):
    spaces = {key: unit(6, 64, i).T for i, key in enumerate(itertools.product(LAYERS, ("readers", "writers")))}
    spaces = {key: torch.linalg.qr(U).Q for key, U in spaces.items()}
    save_selection(tmp_path, {key: Subspace(U, 1.0, "rank") for key, U in spaces.items()}, [])
    back = load_subspaces(tmp_path / "subspace.safetensors")
    assert back.keys() == spaces.keys()
    bases, _ = module_bases(gemma, back)
    for name, U in bases.items():
        writer = name.endswith("o_proj")
        layer = serving_layer(int(name.split(".")[1]), writer, LAYERS)
        assert torch.equal(U, spaces[layer, "writers" if writer else "readers"])


# ---------------------------------------------------------------------------------------------------------------
# Activation × gradient, decision token

def test_attribution_is_the_slope_of_silencing_a_unit():
    """Against autograd through a spliced strength s of all units: x + Σ (s_f − 1) a_f w_f, ∂L/∂s_f at 1, an example at a time."""
    model, pairs, sae = random_gemma(std=0.1), random_pairs(4), random_sae(1)
    found = contrast.attribution(model, {1: sae}, pairs, CONTROL, 100)[1]
    wanted, counts = 0, [sum(len(pair[side].tokens) - pair[side].start for pair in pairs) for side in range(2)]
    for pair in pairs:
        for side, (sign, example) in enumerate(zip((1, -1), pair)):
            tokens, strength = torch.tensor(example.tokens), torch.ones(96, requires_grad=True)
            kept = torch.tensor([[id not in CONTROL] for id in example.tokens])
            forward = model.layers[1].forward

            def spliced(*inputs, forward=forward, kept=kept, strength=strength):
                x = forward(*inputs)
                return x + kept * ((strength - 1) * sae.encode(x).detach()) @ sae.W_dec
            model.layers[1].forward = spliced
            told = model(tokens[None])[0].log_softmax(-1)[example.start - 1:-1]
            model.layers[1].forward = forward
            loss = -sign * told.gather(1, tokens[example.start:, None]).sum() / counts[side]
            wanted = wanted + torch.autograd.grad(loss, strength)[0].double()
    assert (found - wanted).norm() < 1e-3 * wanted.norm() and wanted.norm() > 0


def test_decision_is_the_difference_at_the_last_token(gemma):
    class Words:                                                         # a tokenizer of numbers
        start_of_turn, end_of_turn, bos = 106, 107, 2

        def encode(self, text):
            return [ord(c) % 100 + 150 for c in text]
    sae, pairs = random_sae(3), random_pairs(7)
    harmless = [Prompt((("user", text),), {}, 1) for text in ("clean the vault", "kill a process", "hi")]
    harmful, others = contrast.decision_prompts(Words(), pairs, harmless)
    assert len(harmful) == len(others) == 3 and all(ids in [pair[0].tokens[:pair[0].start] for pair in pairs] for ids in harmful)
    found = contrast.decision(gemma, {3: sae}, harmful, others, batch=2)[3]
    ends = [torch.stack([sae.encode(gemma.hidden(torch.tensor([ids]), capture=(3,))[1][3][0, -1]) for ids in side]).mean(0)
            for side in (harmful, others)]
    assert torch.allclose(found, (ends[0] - ends[1]).double(), atol=1e-4) and found.abs().max() > 0.1
    with pytest.raises(InputError, match="harmless"):
        contrast.decision(gemma, {3: sae}, harmful, [])


def test_harmless_prompts_have_the_form_of_the_pairs(gemma, mini, monkeypatch):
    tokenizer, told = load_tokenizer(mini), []
    monkeypatch.setattr(contrast, "decision", lambda model, saes, harmful, harmless: told.append((harmful, harmless)) or {})
    user = (("user", "how"),)
    for format in ("chat", "plain"):
        pair = [make_example(tokenizer, user, answer, 99, format) for answer in ("no", "yes")]
        choose_by_loss(gemma, {}, tokenizer, [pair], 1, 1, 99, "decision", harmless=[Prompt(user, {}, 1)], format=format)
        assert told[-1] == ([prompt_tokens(tokenizer, user, format)],) * 2


# ---------------------------------------------------------------------------------------------------------------
# As a person runs it

def test_a_run_with_the_gradient_selection(mini, tmp_path):
    out = ended("train.py", command(mini, tmp_path / "run", "--select", "gradient", "--explain", "4", sets=SETS))
    features, spaces = read_json(tmp_path / "run/features.json", list), load_subspaces(tmp_path / "run/subspace.safetensors")
    assert "twice the rank" in out and spaces.keys() == {(layer, side) for layer in (0, 1) for side in ("readers", "writers")}
    for layer in (0, 1):
        for side in ("readers", "writers"):
            scores = [feature["scores"][side] for feature in features if feature["layer"] == layer and side in feature["scores"]]
            assert len(scores) == 16 and all(value > 0 for value in scores) and sum(scores) <= 1
    assert len({(feature["layer"], feature["index"]) for feature in features}) == len(features)
    assert read_json(tmp_path / "run/scores.json")["share"]["subspace"] > 0.9
    for part in read_json(tmp_path / "run/explain.json")["layers"]:
        assert part["dimension"] == 8 and part["subspace"] > 0.9


@pytest.mark.parametrize("select", ["decision", "attribution"])
def test_other_selections_as_commands(mini, tmp_path, select, monkeypatch, capsys):
    arguments = ["--model", mini, "--sae", mini / "sae", "--data", mini / "train.jsonl", "--rank", "4", "--select", select,
                 "--out", tmp_path / "s", *(["--harmless", mini / "benign.jsonl"] if select == "decision" else [])]
    monkeypatch.setattr(sys, "argv", ["select.py", *map(str, arguments)])
    choose()
    assert "8 features span r̂ = 4 directions" in capsys.readouterr().out
    features, spaces = read_json(tmp_path / "s/features.json", list), load_subspaces(tmp_path / "s/subspace.safetensors")
    assert spaces.keys() == {0, 1} and len(features) == 16 and all(feature["scores"]["all"] for feature in features)
    for U in spaces.values():
        assert U.shape == (64, 4) and (U.T @ U - torch.eye(4)).abs().max() < 1e-5
