"""features.py against brute force, autograd's dense gradients, and a pursuit written down."""

import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_gemma
from torch.nn.functional import normalize

from data import Example
from features import (SIDES, Choice, Statistics, choose_features, contrast_gradients,
                      feature_statistics, gradient_moments, load_subspaces, module_bases,
                      norm_gain, save_selection, select_features, serving_layer, spanning_rows,
                      subspace)
from model import MODULES, TARGETS
from run.files import InputError
from sae import SASA, JumpReLU
from saes import gradient
from saes.gradient import candidates, energy, greedy, rotated

CONTROL = (0, 1, 2, 106, 107)
LAYERS = (1, 2)                 # of 4 blocks, so that each serves some readers and some writers


def unit_rows(count, size, seed):
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_sae(layer, num_features=96):
    W, generator = unit_rows(num_features, 64, layer), torch.Generator().manual_seed(layer)
    bias = torch.randn(num_features, generator=generator) * 0.1
    threshold = torch.rand(num_features, generator=generator) * 4
    return JumpReLU(W.T.contiguous() * 2, bias, threshold, W, torch.zeros(64), layer=layer)


def random_sasa(layer):
    W, bias = unit_rows(72, 64, layer), unit_rows(1, 72, layer)[0]
    return SASA(W.T.contiguous() * 2, bias, W, torch.zeros(64), block=3, active=5, layer=layer)


def random_pairs(count):
    rng = random.Random(0)

    def words(low, high):
        return [rng.choice(range(108, 300)) for _ in range(rng.randint(low, high))]
    pairs = []
    for _ in range(count):
        prompt = [2, 106, *words(2, 20), 107, 108, 106, *words(2, 2)]
        answers = (words(1, 30) + [107] * rng.randint(0, 1) for _ in range(2))
        pairs.append(tuple(Example(prompt + answer, len(prompt), True) for answer in answers))
    return pairs


# ---- Statistics ----------------------------------------------------------------------------------
def code_sums(model, sae, pairs, tokens="response"):
    """Per pair and answer: summed codes (2, P, K, b) and token counts (2, P); firings (2, K);
    and where each unit is strongest: [(activations (K,), answer, pair, places (K,))]."""
    sums, counts, fired, peaks = ([], []), ([], []), [0, 0], []
    for number, pair in enumerate(pairs):
        for answer, example in enumerate(pair):
            ids = torch.tensor([example.tokens])
            _, residuals = model.hidden(ids, capture=(sae.layer,))
            places = [i for i, id in enumerate(example.tokens)
                      if id not in CONTROL and (tokens == "all" or i >= example.start)]
            codes = sae.encode(residuals[sae.layer][0, places])
            blocks = codes.double().unflatten(1, (-1, sae.block))
            sums[answer].append(blocks.sum(0))
            counts[answer].append(len(places))
            fired[answer] = fired[answer] + (blocks != 0).any(2).sum(0)
            top = blocks.norm(dim=2).max(0)
            peaks.append((top.values, answer, number, torch.tensor(places)[top.indices]))
    return (torch.stack([torch.stack(side) for side in sums]), torch.tensor(counts).double(),
            torch.stack(fired), peaks)


@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("make", [random_sae, random_sasa])
def test_statistics_equal_brute_force(gemma, make, tokens):
    """Means, firing, Δ, its covariance over pairs and peaks from their definitions, in float64."""
    pairs, sae = random_pairs(20), make(2)
    s, n, fired, peaks = code_sums(gemma, sae, pairs, tokens)
    mean = s.sum(1) / n.sum(1)[:, None, None]                                           # (2, K, b)
    shift = mean[0] - mean[1]
    moves = (s - n[..., None, None] * mean[:, None]) / n.sum(1)[:, None, None, None]
    moves = moves[0] - moves[1]                                                         # (P, K, b)
    covariance = torch.einsum("pki,pkj->kij", moves, moves) * 20 / 19
    along = torch.sign(shift) if sae.block == 1 else normalize(shift, dim=1)
    variance = torch.einsum("ki,kij,kj->k", along, covariance, along)
    delta = shift[:, 0] if sae.block == 1 else shift.norm(dim=1)
    for batch_tokens in (1, 150, 10_000):
        ours = feature_statistics(gemma, {2: sae}, pairs, CONTROL, tokens, batch_tokens)[2]
        assert ours.num_pairs == 20
        # Padding changes a rounding: an activation at its threshold may cross it
        same = ((ours.frequency - fired / n.sum(1)[:, None]).abs() < 1e-9).all(0)
        assert same.double().mean() > 0.9
        # A prompt's tokens peak alike in both answers
        units = (ours.frequency.sum(0) * same).topk(3).indices.tolist()
        for unit in units if tokens == "response" else ():
            wanted = sorted(((a[unit].item(), answer, number, places[unit].item())
                             for a, answer, number, places in peaks), reverse=True)[:5]
            assert [peak[1:] for peak in ours.peaks.of(unit)] == [peak[1:] for peak in wanted]
            assert ours.peaks.of(unit)[4][0] == pytest.approx(wanted[4][0], rel=1e-4)
        for value, wanted in ((ours.mean, mean.norm(dim=2)), (ours.delta, delta),
                              (ours.covariance, covariance), (ours.error, variance.sqrt())):
            value, wanted = (t.transpose(0, 1) if len(t) == 2 else t for t in (value, wanted))
            assert value.shape == wanted.shape
            assert (value - wanted)[same].abs().max() <= 2e-4 * wanted.abs().max()


def test_few_pairs(gemma):
    good, empty = random_pairs(3), (Example([2, 106, 150, 107], 4, False),
                                    Example([2, 106, 150, 107, 160], 4, False))
    with_empty = feature_statistics(gemma, {1: random_sae(1)}, [empty, *good], CONTROL)[1]
    assert with_empty.num_pairs == 3 and with_empty.delta.isfinite().all()
    with pytest.raises(InputError, match="no pair"):
        feature_statistics(gemma, {1: random_sae(1)}, [empty], CONTROL)
    single = feature_statistics(gemma, {1: random_sae(1)}, good[:1], CONTROL)[1]
    assert single.effect.isnan().all() and single.delta.isfinite().all()


MEMORY = """
import sys
sys.path.append("tests")
from test_features import *
model, saes = random_gemma(), {1: random_sae(1, num_features=4096)}
for count in (10, 110):
    feature_statistics(model, saes, random_pairs(count), CONTROL, batch_tokens=512)
    contrast_gradients(model, random_pairs(count), 512)
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_pairs():
    printed = subprocess.check_output([sys.executable, "-c", MEMORY], cwd=ROOT, text=True)
    small, large = map(int, printed.split())
    assert large < small + 8_000, f"{small} kB for 10 pairs, {large} kB for 110"


# ---- Choice, subspace, bases ---------------------------------------------------------------------
def test_choice_by_each_score():
    """Of five features, one never differs, and the first is silent on unaligned answers."""
    mean = torch.tensor([[0.1, 1.0, 1.0, 10.0, 7.5], [0.0, 4.0, 1.0, 8.0, 5.0]])
    statistics = Statistics(9, mean, None, mean[0] - mean[1], None, None, None, None)
    assert statistics.score("rho").tolist() == pytest.approx([1e5, -3 / 4, 0, 2 / 8, 2.5 / 5])
    for score, wanted in (("delta", [1, 4, 3, 0]), ("signed", [4, 3, 0]), ("rho", [0, 4, 3])):
        assert choose_features(statistics, 5, score).tolist() == wanted, score


def test_subspace_by_hand():
    """Three rows along e1, one along e2: squared singular values 3 and 1."""
    rows = torch.tensor([[2.0, 0, 0], [5.0, 0, 0], [-1.0, 0, 0], [0, 3.0, 0]])
    U, explained, limit = subspace(rows, 0.75, 16)
    assert limit == "tau" and explained == pytest.approx(0.75)
    assert U.abs().flatten().tolist() == pytest.approx([1, 0, 0])
    U, explained, limit = subspace(rows, 0.8, 16)
    assert limit == "tau" and explained == pytest.approx(1) and U.shape == (3, 2)
    assert subspace(rows, 0.8, 1)[2] == "rank"
    # Centred, e1 and e2 differ by one direction
    U = subspace(rows.abs(), 0.8, 16, center=True)[0]
    assert (U.flatten() / U[0]).tolist() == pytest.approx([1, -1, 0])
    for center in (False, True):
        with pytest.raises(InputError, match="no feature differs"):
            subspace(rows[:center], 0.8, 1, center)


def test_directions_of_a_block_are_those_that_carry_the_difference(gemma):
    """At most 1 − τ of what pairs differ by is outside them; one direction fewer leaves more."""
    sae = random_sasa(2)
    statistics = feature_statistics(gemma, {2: sae}, random_pairs(20), CONTROL)[2]
    block = int(statistics.delta.argmax())
    spread = torch.diag(torch.tensor([4.0, 0.0, 0.01])).double()
    statistics.covariance[block] = spread / statistics.num_pairs
    statistics.shift[block] = torch.tensor([0.0, 0.7, 0.0])
    rows = spanning_rows(sae, statistics, torch.tensor([block]), 0.97)
    assert rows.shape == (2, 64) and torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)
    D_k = sae.unit_rows([block])[0]
    root = torch.diag(torch.tensor([2.0, 0.7, 0.1])) @ D_k                              # M^½ D_k
    shares = (root @ rows.T).square().sum(0) / root.square().sum()
    assert shares.sum() >= 0.97 > shares[0]
    assert (rows - rows @ torch.linalg.pinv(D_k) @ D_k).norm() < 1e-4            # in its span
    assert len(spanning_rows(sae, statistics, torch.tensor([block, 0]), 1.0)) == 6


def test_which_sae_serves_which_module():
    layers, blocks = (5, 10, 15, 20), (0, 5, 7, 8, 9, 13, 14, 25)
    assert [serving_layer(b, False, layers) for b in blocks] == [5, 5, 5, 5, 10, 10, 15, 20]
    assert [serving_layer(b, True, layers) for b in blocks] == [5, 5, 5, 10, 10, 15, 15, 20]


def random_subspaces():
    return {(layer, side): torch.linalg.qr(unit_rows(64, 4, layer + 9 * number)).Q
            for layer in LAYERS for number, side in enumerate(SIDES)}


def test_bases_by_side_and_their_file(gemma, tmp_path):
    subspaces = random_subspaces()
    choices = {key: Choice(None, None, U, 1.0, "rank") for key, U in subspaces.items()}
    save_selection(tmp_path, choices, [])
    loaded = load_subspaces(tmp_path / "subspace.safetensors")
    assert loaded.keys() == subspaces.keys()
    bases = module_bases(gemma, loaded, targets=tuple(MODULES))
    assert len(bases) == 4 * len(MODULES)
    for name, U in bases.items():
        side = "writers" if name.endswith(("o_proj", "down_proj")) else "readers"
        layer = serving_layer(int(name.split(".")[1]), side == "writers", LAYERS)
        assert torch.equal(U, subspaces[layer, side]), name


def test_norm_aware_bases_see_the_residual_itself(gemma):
    """Behind its norm, a module reads along its basis what U reads of x/rms(x); writes alike."""
    subspaces = random_subspaces()
    bases = module_bases(gemma, subspaces, norm_aware=True, targets=tuple(MODULES))
    block, x = gemma.layers[2], torch.randn(9, 64)
    before = torch.nn.functional.rms_norm(x, (64,), eps=1e-6)
    readers = {"self_attn.q_proj": block.input_layernorm,
               "mlp.up_proj": block.pre_feedforward_layernorm}
    for name, norm in readers.items():
        read, wanted = norm(x) @ bases[f"layers.2.{name}"], before @ subspaces[1, "readers"]
        turn = torch.linalg.lstsq(wanted, read).solution                                # a rotation
        assert torch.allclose(wanted @ turn, read, atol=1e-4), name
    writers = {"self_attn.o_proj": block.post_attention_layernorm,
               "mlp.down_proj": block.post_feedforward_layernorm}
    for name, norm in writers.items():
        U = subspaces[2, "writers"]
        written = norm(torch.randn(9, 4) @ bases[f"layers.2.{name}"].T)
        assert torch.allclose(written @ U @ U.T, written, atol=1e-4), name
    for basis in bases.values():
        assert (basis.T @ basis - torch.eye(4)).abs().max() < 1e-6
    block.input_layernorm.weight[:3] = torch.tensor([-1.0, -1.001, -0.5])
    assert norm_gain(block, "v_proj")[:3].tolist() == pytest.approx([0.01, -0.01, 0.5])


# ---- Gradients -----------------------------------------------------------------------------------
def contrast_loss(model, pairs):
    """NLL(aligned) − NLL(unaligned) per token from its definition, a forward for each answer."""
    sides = []
    for answers in zip(*pairs):
        total, count = 0, 0
        for answer in answers:
            tokens, start = torch.tensor(answer.tokens), answer.start
            log_p = model(tokens[None])[0].double().log_softmax(-1)[start - 1:-1]
            total = total - log_p.gather(1, tokens[start:, None]).sum()
            count += len(tokens) - start
        sides.append(total / count)
    return sides[0] - sides[1]


def test_gradients_equal_autograds():
    model, pairs = random_gemma(std=0.1).double(), random_pairs(9)
    targets = (*TARGETS, "up_proj", "down_proj")
    ours = contrast_gradients(model, pairs, batch_tokens=100, targets=targets)
    assert not any(weight.requires_grad for weight in model.parameters())
    modules = dict(model.named_modules())
    weights = {name: modules[name].weight.requires_grad_() for name in ours}
    wanted = torch.autograd.grad(contrast_loss(model, pairs), list(weights.values()))
    assert len(ours) == 24 and all(name.endswith(targets) for name in ours)
    for (name, G), dense in zip(ours.items(), wanted):
        assert G.dtype == torch.float64 and (G - dense).norm() < 1e-5 * dense.norm(), name


def test_one_gradient_at_a_time_in_float32_sums(gemma, monkeypatch):
    """With `recompute` too, for which the backward runs each block again."""
    model, seen, calls, take = gemma.bfloat16(), set(), [], gradient._take_gradient

    def watched(total, weight):
        made = [name for name, p in model.named_parameters() if p.grad is not None]
        assert len(made) == 1
        seen.update(made)
        take(total, weight)
    monkeypatch.setattr(gradient, "_take_gradient", watched)
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    sums = contrast_gradients(model, random_pairs(3))
    again = contrast_gradients(model, random_pairs(3), recompute=True)
    assert len(calls) == 4 * 2 * (1 + 2)                    # blocks, rows, forwards
    assert len(seen) == 16 and all(G.dtype == torch.float32 and G.any() for G in sums.values())
    assert all(torch.equal(again[name], G) for name, G in sums.items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("norm_aware", [False, True])
def test_moments_are_of_the_modules_that_a_layer_serves(gemma, norm_aware):
    """uᵀ(GᵀG)u is the sum of ‖G·u‖² over them; norm-aware, along u/(1 + w)."""
    names = [name for name, _ in gemma.named_modules() if name.endswith(TARGETS)]
    gradients = {name: torch.randn(gemma.get_submodule(name).weight.shape) for name in names}
    moments = gradient_moments(gemma, gradients, LAYERS, norm_aware)
    assert moments.keys() == {(layer, side) for layer in LAYERS for side in SIDES}
    u = unit_rows(1, 64, 7)[0]
    for (layer, side), moment in moments.items():
        wanted = 0
        for name, G in gradients.items():
            writer, number = name.endswith("o_proj"), int(name.split(".")[1])
            w = u / norm_gain(gemma.layers[number], name) if norm_aware else u
            if (side == "writers") == writer and serving_layer(number, writer, LAYERS) == layer:
                wanted += (w @ G if writer else G @ w).square().sum().item()
        assert (u.double() @ moment @ u.double()).item() == pytest.approx(wanted, rel=1e-4)


def pursuit_problem(seed, n=40, d=24, num_features=96):
    """G (n, d) whose energy falls off, so that the order of picks matters, and unit rows."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(n, d, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return G @ turn, unit_rows(num_features, d, seed + 100)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_pursuit_written_down(seed):
    G, rows = pursuit_problem(seed)
    ours = greedy(rows, G.T @ G, 12, 6)
    Q, chosen, scores = torch.zeros(24, 0, dtype=torch.float64), [], []
    for _ in range(12):
        outside = rows.double() @ (torch.eye(24, dtype=torch.float64) - Q @ Q.T)
        ratio = (outside @ G.T).square().sum(1) / outside.square().sum(1)
        ratio[chosen] = -1
        chosen.append(int(ratio.argmax()))
        scores.append((ratio.max() / G.square().sum()).item())
        Q = torch.linalg.qr(rows[chosen].double().T).Q
    assert ours.features.tolist() == chosen
    assert ours.scores.tolist() == pytest.approx(scores, rel=1e-4)
    V = torch.linalg.svd(G @ Q @ Q.T).Vh[:6].T
    assert (ours.U @ ours.U.T - V @ V.T).abs().max() < 1e-4
    assert ours.explained == pytest.approx(((G @ V).square().sum() / G.square().sum()).item(), 1e-4)
    # The same span, but G's energy is spread more evenly over the columns
    turned = rotated(ours.U, seed)
    assert (turned @ turned.T - ours.U @ ours.U.T).abs().max() < 1e-5
    assert (G @ turned.double()).abs().sum() > (G @ ours.U.double()).abs().sum()


def test_greedy_takes_no_copy_and_stops_at_the_whole_space():
    G, rows = pursuit_problem(0)
    rows[50] = rows[51] = rows[52]
    ours = greedy(rows, G.T @ G, 96, 24)
    assert len(ours.features) == 24 and len({50, 51, 52} & set(ours.features.tolist())) <= 1
    assert ours.explained == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match="nothing to choose by"):
        greedy(rows, torch.zeros(24, 24, dtype=torch.float64), 4, 2)


def test_candidate_of_a_block_is_what_the_gradient_carries_most():
    G, _ = pursuit_problem(3)
    rows, moment = unit_rows(60, 24, 5).unflatten(0, (20, 3)), G.T @ G
    ours = candidates(rows, moment)
    mix = torch.randn(20, 500, 3, generator=torch.Generator().manual_seed(0))
    for block, others in enumerate(normalize(mix @ rows, dim=-1)):
        best, most = energy(ours[block:block + 1], moment), energy(others, moment).max()
        assert most <= best < 1.1 * most
    assert torch.equal(candidates(rows[:, :1], moment), normalize(rows[:, 0], dim=1))


# ---- Whole selections ---------------------------------------------------------------------------
WORDS = SimpleNamespace(control=CONTROL, token=str)       # a tokenizer of numbers


def selection(model, select, make=random_sae, **more):
    saes = {layer: make(layer) for layer in LAYERS}
    settings = {"score": "delta", "top_k": 8, "tau": 0.8, "center": False, "targets": None,
                "tokens": "response", "rank": 4, "batch_tokens": 256, "norm_aware": False}
    settings = SimpleNamespace(select=select, recompute=True, **settings | more)
    return select_features(model, saes, WORDS, random_pairs(12), settings)


@pytest.mark.parametrize("make", [random_sae, random_sasa])
@pytest.mark.parametrize("select", ["paper", "gradient"])
def test_selections(gemma, select, make, capsys):
    choices, entries = selection(gemma, select, make)
    assert choices.keys() == {(layer, side) for layer in LAYERS for side in SIDES}
    for choice in choices.values():
        r = choice.U.shape[1]
        assert len(choice.features) == len(choice.scores) == 8 and r <= 4
        assert (choice.U.T @ choice.U - torch.eye(r)).abs().max() < 1e-5
    assert (choices[1, "readers"] is choices[1, "writers"]) == (select == "paper")
    assert gemma.recompute == (select == "gradient")        # as the settings say
    # A feature has one entry, with a score for each side that chose it
    assert {"layer", "index", "delta", "effect", "peaks", "promotes"} <= entries[0].keys()
    score = "delta" if select == "paper" else "gradient"
    assert {entry["scored_by"] for entry in entries} == {score}
    assert len({(entry["layer"], entry["index"]) for entry in entries}) == len(entries)
    for (layer, side), choice in choices.items():
        scores = {entry["index"]: entry["scores"][side] for entry in entries
                  if entry["layer"] == layer and side in entry["scores"]}
        assert scores == dict(zip(choice.features.tolist(), choice.scores.tolist()))
    assert f" by {score} span r̂ = " in capsys.readouterr().out


def test_scores_and_centring_reach_the_choice(gemma):
    _, entries = selection(gemma, "paper", score="rho", top_k=3)
    assert {entry["scored_by"] for entry in entries} == {"rho"}
    assert all(entry["scores"]["readers"] == entry["rho"] > 0 for entry in entries)
    choices, entries = selection(gemma, "paper", score="signed", top_k=3, tau=1.0, center=True)
    assert all(entry["scores"]["readers"] == entry["delta"] > 0 for entry in entries)
    assert choices[1, "readers"].U.shape[1] == 2


def test_gradient_selection_follows_the_targets(gemma):
    choices, _ = selection(gemma, "gradient", targets=["down_proj"])
    assert choices.keys() == {(layer, "writers") for layer in LAYERS}
