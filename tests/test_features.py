"""features.py against a brute-force float64 reference, and the subspace by hand."""

import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from data import Example
from features import choose_features, feature_statistics, module_bases, serving_layer, spanning_rows, subspace
from run.files import InputError
from sae import SASA, JumpReLU

CONTROL = (0, 1, 2, 106, 107)


def random_sae(layer, seed=0, features=96, d=64):
    draw = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(features, d, generator=draw), dim=1)
    return JumpReLU(W.T.contiguous() * 2, torch.randn(features, generator=draw) * 0.1, torch.rand(features, generator=draw) * 4,
                    W, torch.zeros(d), source="random", layer=layer, width=str(features), l0=1)


def random_pairs(count, seed=0):
    draw = random.Random(seed)

    def words(low, high):
        return [draw.choice(range(108, 300)) for _ in range(draw.randint(low, high))]

    pairs = []
    for _ in range(count):
        prompt = [2, 106, *words(2, 20), 107, 108, 106, *words(2, 2)]
        pairs.append(tuple(Example(prompt + words(1, 30) + [107] * draw.randint(0, 1), len(prompt), True) for _ in range(2)))
    return pairs


def reference(model, sae, pairs, tokens):
    """Means, firing shares, Δ and its error straight from the definitions, in float64, one example at a time."""
    W, b, threshold = sae.W_enc.double(), sae.b_enc.double(), sae.threshold.double()
    sums, fired, counts, doubtful = [[], []], [0, 0], [[], []], 0
    for pair in pairs:
        for side, example in enumerate(pair):
            _, captured = model.hidden(torch.tensor([example.tokens]), capture=(sae.layer,))
            keep = [i for i, id in enumerate(example.tokens) if id not in CONTROL and (tokens == "all" or i >= example.start)]
            h = captured[sae.layer][0, keep].double() @ W + b
            doubtful += int(((h - threshold).abs() < 1e-4).sum())
            a = torch.where(h > threshold, h, 0)
            sums[side].append(a.sum(0))
            fired[side] = fired[side] + (a > 0).sum(0)
            counts[side].append(len(keep))
    s, n = [torch.stack(side) for side in sums], [torch.tensor(side).double() for side in counts]
    mean = [s[i].sum(0) / n[i].sum() for i in range(2)]
    moves = sum(sign * (s[i] - n[i][:, None] * mean[i]) / n[i].sum() for i, sign in ((0, 1), (1, -1)))      # (P, F)
    error = (moves.square().sum(0) * len(pairs) / (len(pairs) - 1)).sqrt()
    return torch.stack(mean), torch.stack([fired[i] / n[i].sum() for i in range(2)]), mean[0] - mean[1], error, doubtful


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_statistics_equal_brute_force(gemma, tokens):
    pairs, saes = random_pairs(24), {1: random_sae(1), 3: random_sae(3, seed=1)}
    for batch_tokens in (1, 150, 10_000):
        found = feature_statistics(gemma, saes, pairs, CONTROL, tokens, batch_tokens)
        for layer, sae in saes.items():
            mean, frequency, delta, error, doubtful = reference(gemma, sae, pairs, tokens)
            scale = delta.abs().max()
            crossed = (found[layer].frequency - frequency).abs() > 1e-9     # a rounding took it over its threshold
            print(f"layer {layer}: {int(crossed.any(0).sum())} features crossed their threshold by rounding")
            assert crossed.sum() <= doubtful, f"{crossed.sum()} features crossed, {doubtful} activations are near a threshold"
            sure = ~crossed.any(0)
            assert sure.sum() >= 90
            for ours, theirs in ((found[layer].mean, mean), (found[layer].delta, delta), (found[layer].error, error)):
                assert ((ours - theirs).abs().max(0).values if ours.dim() > 1 else (ours - theirs).abs())[sure].max() <= 1e-5 * scale
            assert found[layer].num_pairs == 24


def test_errors_match_a_resampling_of_pairs(gemma):
    """The linearised standard error is what Δ's spread over bootstrap samples of the pairs says it is."""
    pairs, sae = random_pairs(60), random_sae(1)
    found = feature_statistics(gemma, {1: sae}, pairs, CONTROL)[1]
    draw, deltas = random.Random(0), []
    single = [feature_statistics(gemma, {1: sae}, [pair], CONTROL)[1] for pair in pairs]
    totals = torch.stack([stat.mean * stat.num_tokens[:, None] for stat in single])                              # (P, 2, F)
    tokens = torch.stack([stat.num_tokens for stat in single])
    for _ in range(400):
        rows = [draw.randrange(60) for _ in range(60)]
        mean = totals[rows].sum(0) / tokens[rows].sum(0)[:, None]
        deltas.append(mean[0] - mean[1])
    active = found.frequency.min(0).values > 0.02
    ratio = found.error[active] / torch.stack(deltas).std(0)[active]
    assert active.sum() > 30 and 0.9 < ratio.median() < 1.1


def test_pairs_without_a_response_are_left_out(gemma):
    good, empty = random_pairs(3), (Example([2, 106, 150, 107], 4, False), Example([2, 106, 150, 107, 160], 4, False))
    with_it = feature_statistics(gemma, {1: random_sae(1)}, [empty, *good], CONTROL)[1]
    assert with_it.num_pairs == 3 and torch.allclose(with_it.delta, feature_statistics(gemma, {1: random_sae(1)}, good, CONTROL)[1].delta)
    with pytest.raises(InputError, match="no pair"):
        feature_statistics(gemma, {1: random_sae(1)}, [empty], CONTROL)


def test_one_pair_has_no_error(gemma):
    statistics = feature_statistics(gemma, {1: random_sae(1)}, random_pairs(1), CONTROL)[1]
    assert statistics.error.isnan().all() and statistics.effect.isnan().all() and statistics.delta.isfinite().all()


def test_peaks_are_the_strongest_examples(gemma):
    pairs, sae = random_pairs(20), random_sae(2)
    found = feature_statistics(gemma, {2: sae}, pairs, CONTROL, batch_tokens=200)[2]
    peaks = found.peaks
    for feature in found.frequency.sum(0).topk(3).indices.tolist():
        best = []
        for number, pair in enumerate(pairs):
            for side, example in zip(("aligned", "unaligned"), pair):
                _, captured = gemma.hidden(torch.tensor([example.tokens]), capture=(2,))
                a = sae.encode(captured[2][0])[:, feature]
                places = [i for i in range(example.start, len(example.tokens)) if example.tokens[i] not in CONTROL]
                top = max(places, key=lambda i: a[i])
                best.append((a[top].item(), side, number, top))
        wanted = [row for row in sorted(best, key=lambda row: -row[0])[:5] if row[0] > 0]
        strongest = peaks.of(feature)
        assert [row[1:] for row in strongest] == [row[1:] for row in wanted] and len(wanted) == 5
        assert strongest[0][0] == pytest.approx(wanted[0][0], rel=1e-4)
        for number, side in enumerate(("aligned", "unaligned")):        # all five of each side, the weakest too
            top = sorted((row[0] for row in best if row[1] == side), reverse=True)[:5]
            assert sorted(peaks.value[number, :, feature].tolist(), reverse=True) == pytest.approx(top, rel=1e-4)


MEMORY = """
import sys
sys.path.append("tests")
from conftest import random_gemma
from test_features import CONTROL, feature_statistics, random_pairs, random_sae
feature_statistics(random_gemma(), {1: random_sae(1, features=4096)}, random_pairs(int(sys.argv[1])), CONTROL, batch_tokens=512)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_pairs():
    small, large = (int(subprocess.run([sys.executable, "-c", MEMORY, count], cwd=ROOT, capture_output=True, text=True,
                                       check=True).stdout) for count in ("100", "1000"))
    assert large < small + 20_000, f"{small} kB for 100 pairs, {large} kB for 1,000"    # the pairs themselves: some MB


def test_choice_is_by_size_of_the_difference(gemma):
    statistics = feature_statistics(gemma, {1: random_sae(1)}, random_pairs(5), CONTROL)[1]
    statistics.delta = torch.tensor([0.1, -3.0, 0.0, 2.0, 2.5])
    assert choose_features(statistics, 3).tolist() == [1, 4, 3]
    assert choose_features(statistics, 5).tolist() == [1, 4, 3, 0]      # a feature that never differs is no choice
    with pytest.raises(InputError, match="--top-k 6"):
        choose_features(statistics, 6)


def test_subspace_by_hand():
    """Three rows along e1 and one along e2: squared singular values 3 and 1, so e1 alone explains three quarters."""
    rows = torch.tensor([[2.0, 0, 0], [5.0, 0, 0], [-1.0, 0, 0], [0, 3.0, 0]])
    one = subspace(rows, 0.75, 16)
    assert one.limit == "tau" and one.explained == pytest.approx(0.75) and one.U.abs().flatten().tolist() == pytest.approx([1, 0, 0])
    two = subspace(rows, 0.8, 16)
    assert two.limit == "tau" and two.U.shape == (3, 2) and two.explained == pytest.approx(1)
    assert subspace(rows, 0.8, 1).limit == "rank"
    with pytest.raises(InputError, match="--tau 0"):
        subspace(rows, 0, 1)


def test_subspace_is_orthonormal_and_holds_the_directions():
    rows = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    space = subspace(rows, 1.0, 64)
    assert space.U.shape == (300, 20) and (space.U.T @ space.U - torch.eye(20)).abs().max() < 1e-6
    assert torch.allclose(space.U @ (space.U.T @ rows.T), rows.T, atol=1e-4)
    part = subspace(rows, 0.8, 64)
    values = torch.linalg.svdvals(torch.nn.functional.normalize(rows, dim=1)).square()
    assert values[:part.U.shape[1]].sum() >= 0.8 * values.sum() > values[:part.U.shape[1] - 1].sum()


def test_which_sae_serves_which_module():
    assert [serving_layer(block, False, (5, 10, 15, 20)) for block in (0, 6, 8, 9, 13, 14, 25)] == [5, 5, 5, 10, 10, 15, 20]
    assert [serving_layer(block, True, (5, 10, 15, 20)) for block in (0, 5, 7, 8, 12, 13, 25)] == [5, 5, 5, 10, 10, 15, 20]


def test_norm_aware_bases_see_the_residual_itself(gemma):
    """What q reads along A = Uᵀ behind the norm is, with the map, a rotation of what U reads of the residual before it."""
    U = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(0))).Q
    spaces = {(1, "readers"): U, (1, "writers"): U}
    bases = module_bases(gemma, spaces, norm_aware=True)
    block, x = gemma.layers[2], torch.randn(9, 64)
    read = block.input_layernorm(x) @ bases["layers.2.self_attn.q_proj"]
    before = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() @ U
    turn = torch.linalg.lstsq(before, read).solution
    assert torch.allclose(before @ turn, read, atol=1e-4)
    written = torch.randn(9, 4) @ bases["layers.2.self_attn.o_proj"].T       # what o adds, before the post-norm
    after = block.post_attention_layernorm(written)
    assert torch.allclose(after @ U @ U.T, after, atol=1e-4)
    for basis in bases.values():
        assert (basis.T @ basis - torch.eye(4)).abs().max() < 1e-6
    plain = module_bases(gemma, spaces)
    assert torch.equal(plain["layers.0.self_attn.v_proj"], U)


# ---------------------------------------------------------------------------------------------------------------
# Blocks: features that are subspaces

def random_sasa(layer, seed=0, blocks=24, block=3, d=64):
    draw = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(blocks * block, d, generator=draw), dim=1)
    return SASA(W.T.contiguous() * 2, torch.randn(blocks * block, generator=draw) * 0.1, W, torch.zeros(d), block, 5, source="random",
                layer=layer, width=str(blocks * block), l0=15)


def test_block_statistics_equal_brute_force(gemma):
    """Δ of a block is the length of its mean code's difference; shift, covariance and error over pairs, in float64."""
    pairs, sae = random_pairs(20), random_sasa(2)
    found = feature_statistics(gemma, {2: sae}, pairs, CONTROL, batch_tokens=150)[2]
    sums, fired, counts = [[], []], [0, 0], [[], []]
    for pair in pairs:
        for side, example in enumerate(pair):
            _, captured = gemma.hidden(torch.tensor([example.tokens]), capture=(2,))
            keep = [i for i, id in enumerate(example.tokens) if id not in CONTROL and i >= example.start]
            codes = sae.encode(captured[2][0, keep]).double().unflatten(1, (-1, 3))
            sums[side].append(codes.sum(0))
            fired[side] = fired[side] + (codes != 0).any(2).sum(0)
            counts[side].append(len(keep))
    s, n = [torch.stack(side) for side in sums], [torch.tensor(side).double() for side in counts]            # (P, K, r)
    mean = [s[i].sum(0) / n[i].sum() for i in range(2)]
    shift = mean[0] - mean[1]
    moves = sum(sign * (s[i] - n[i][:, None, None] * mean[i]) / n[i].sum() for i, sign in ((0, 1), (1, -1)))
    covariance = torch.einsum("pki,pkj->kij", moves, moves) * 20 / 19
    along = shift / shift.norm(dim=1, keepdim=True)
    for ours, theirs in ((found.shift, shift), (found.delta, shift.norm(dim=1)), (found.mean, torch.stack(mean).norm(dim=2)),
                         (found.covariance, covariance), (found.error.square(), torch.einsum("ki,kij,kj->k", along, covariance, along)),
                         (found.frequency[1], fired[1] / n[1].sum())):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()
    assert choose_features(found, 5).tolist() == shift.norm(dim=1).topk(5).indices.tolist()
    assert sum(value > 0 for value, *_ in found.peaks.of(int(found.frequency.sum(0).argmax()))) == 5


def test_the_directions_of_a_block_are_those_that_carry_the_difference(gemma):
    """Against the pairs' own differences: their energy outside the directions is at most 1 − τ, and one fewer leaves more."""
    sae = random_sasa(2)
    found = feature_statistics(gemma, {2: sae}, random_pairs(20), CONTROL)[2]
    block = int(found.delta.argmax())
    found.covariance[block] = torch.diag(torch.tensor([4.0, 0.0, 0.01])).double() / found.num_pairs
    found.shift[block] = torch.tensor([0.0, 0.7, 0.0])
    rows = spanning_rows(sae, found, torch.tensor([block]), 0.97)
    assert rows.shape == (2, 64) and torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)
    D_k = sae.unit_rows([block])[0]
    spread = torch.diag(torch.tensor([2.0, 0.7, 0.1])) @ D_k                                # M^½ D
    inside = (spread @ rows.T).square().sum() / spread.square().sum()
    assert inside >= 0.97 and (spread @ rows[0]).square().sum() / spread.square().sum() < 0.97
    assert (rows - rows @ torch.linalg.pinv(D_k) @ D_k).norm() < 1e-4                                        # in the block's span
    assert len(spanning_rows(sae, found, torch.tensor([block, 0]), 1.0)) == 6
    plain = random_sae(1)
    assert torch.equal(spanning_rows(plain, None, [3, 1], 0.8), plain.decoder_rows([3, 1]))
