"""experiments/neighbours/: each method against its formula on whole matrices, or peft's own."""

import itertools
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lora
import train
from conftest import ROOT, command, inputs_by_hand, random_gemma, transformers_twin
from data import Example, Row
from experiments import inits, variants
from experiments.neighbours import derta, guardspace, irr, pissa, salora, shared, sift
from experiments.neighbours.averaging import average
from experiments.neighbours.lox import extrapolate
from experiments.neighbours.rosi import harm_direction, inject
from features import load_subspaces, module_bases
from fused import IGNORE
from model import TARGETS, load_model
from run.files import read_json, write_jsonl


# ---- After training ------------------------------------------------------------------------------
@pytest.fixture
def layers(gemma):
    layers = lora.add_lora(gemma, 6, 3, "random", generator=torch.Generator().manual_seed(0))
    for layer in layers.values():
        layer.B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return layers


def test_lox_extrapolates_the_leading_part(gemma, layers):
    before = {name: layer.update.detach().clone() for name, layer in layers.items()}
    extrapolate(gemma, 2, 1.25)
    for name, layer in layers.items():
        U, S, V = torch.linalg.svd(before[name], full_matrices=False)
        wanted = before[name] + 1.25 * U[:, :2] @ (S[:2, None] * V[:2])
        assert (layer.update - wanted).norm() < 1e-5 * wanted.norm()


def test_rosi_adds_the_direction_to_writers_alone(gemma, layers):
    before = {name: value.clone() for name, value in gemma.state_dict().items()}
    s = torch.arange(64.0)
    inject(gemma, s, 0.7)
    for name, value in gemma.state_dict().items():
        W = before[name]
        if name.endswith(("o_proj.base.weight", "down_proj.weight")):
            layer = layers.get(name.removesuffix(".base.weight"))
            whole = W + layer.update if layer else W
            W = W + 0.7 * torch.outer(s / s.norm(), whole.mean(0))
        assert torch.allclose(value, W, atol=1e-6)


def test_harms_direction_and_averages_by_hand(gemma):
    prompts = [[2, 5, 9], [2, 7], [2, 4, 4, 8]]
    last = [gemma.hidden(torch.tensor([ids]), capture=[1])[1][1][0, -1] for ids in prompts]
    direction = harm_direction(gemma, prompts[:2], prompts[2:])
    assert torch.allclose(direction.float(), (last[0] + last[1]) / 2 - last[2], atol=1e-5)
    state, factor = {}, torch.ones(2)
    average(state, [("a", factor)], 0.9)
    factor += 1
    average(state, [("a", factor)], 0.9)
    assert torch.allclose(state["a"], torch.tensor(1.1))


# ---- DeRTa ---------------------------------------------------------------------------------------
def test_derta_is_equation_2_term_by_term(gemma):
    """The packed rows' loss is the two sums, each probability from a forward of its own."""
    q, r, r_hat = [2, 11, 12], [21, 22, 9], [31, 32, 33, 34, 9]
    aligned, unaligned = (Example(q + answer, 3, True) for answer in (r, r_hat))
    helpful = Example([2, 41, 42, 43], 2, False)

    def log_p(context, token):
        hidden, _ = gemma.hidden(torch.tensor([context]))
        logits = 30 * torch.tanh(hidden[0, -1] @ gemma.embed_tokens.weight.T / 30)
        return float(logits.log_softmax(0)[token])

    def answer(context, tokens):
        return sum(log_p(context + tokens[:t], tokens[t]) for t in range(len(tokens)))

    rows = derta.pack_pairs([(aligned, unaligned), (helpful, None)], 24, seed=3, epoch=1)
    loss = sum(float(train.row_loss(gemma, Row(*(part[None] for part in vars(row).values()))))
               for row in rows)
    k = random.Random("3 1 derta").randint(0, 4)
    by_hand = answer(q + r_hat[:k], r) + answer([2, 41], [42, 43])
    by_hand += sum(log_p(q + r_hat[:t], r[0]) for t in range(len(r_hat)))
    assert loss == pytest.approx(-by_hand, rel=1e-4)


def test_derta_draws_each_length_and_none_that_does_not_fit():
    aligned, unaligned = Example([2, 5, 21, 9], 2, True), Example([2, 5, 31, 32, 33, 9], 2, True)
    draw = random.Random(0)
    for length, longest in ((99, 3), (5, 1)):
        examples = [derta.behind_prefix(aligned, unaligned, length, draw) for _ in range(99)]
        assert {example.start for example in examples} == set(range(2, 3 + longest))
        for example in examples:
            assert example.tokens == [2, 5, *[31, 32, 33][:example.start - 2], 21, 9]


def test_derta_s_arms_train_on_both_of_its_terms(world):
    """Steps of the grid have rows whose labels aren't the next tokens: one token at each place."""
    for name in ("derta-own", "derta-paper"):
        rows = list(itertools.chain(*itertools.islice(inits.BATCHES[name](world, 0), 9)))
        refusing = [row for row in rows if not torch.equal(
            row.labels[row.labels != IGNORE], row.tokens.roll(-1)[row.labels != IGNORE])]
        assert 0 < len(refusing) < len(rows)
        for row in refusing:
            inside = row.labels != IGNORE
            for number in row.documents[inside].unique():
                assert len(set(row.labels[inside & (row.documents == number)].tolist())) == 1


# ---- Inits that stay projected -------------------------------------------------------------------
def test_input_moments_by_hand(gemma):
    examples = [Example([2, 5, 9, 7], 1, True), Example([2, 8, 30], 0, True)] * 12
    moments = shared.input_moments(gemma, examples, ("q_proj", "o_proj"))
    assert len(moments) == 8
    for name in ("layers.0.self_attn.q_proj", "layers.3.self_attn.o_proj"):
        X = inputs_by_hand(gemma, name, examples)
        assert (moments[name] - X.T @ X).norm() < 1e-5 * moments[name].norm()


def spread(size, rank, seed):
    """XᵀX (size, size) of `rank` directions of lengths 1, 2, …, and X."""
    X = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed)).double()
    X = torch.linalg.qr(X).Q.T * torch.arange(1, rank + 1)[:, None]
    return X.T @ X, X


def test_salora_writes_nothing_where_refusals_are_written():
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    (safe, X_s), (task, X_t) = spread(5, 2, 1), spread(5, 2, 2)
    start = salora.start(W, safe, task, 2)
    # The outputs on both inputs, in place of their leading left singular vectors: the same spans
    U_c, U_t = (torch.linalg.qr(W.double() @ X.T).Q.float() for X in (X_s, X_t))
    assert torch.allclose(start.left, torch.eye(6) - U_c @ U_c.T, atol=1e-5)
    U, S, V = torch.linalg.svd(W)
    best = U[:, :2] @ S[:2].diag() @ V[:2]
    assert torch.allclose(start.B @ start.A, U_t @ U_t.T @ best, atol=1e-5)
    assert torch.allclose(start.A @ start.A.T, S[:2].diag(), atol=1e-5)


def test_guardspace_begins_at_the_small_components_of_wc():
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    C, X = spread(5, 3, 1)
    start = guardspace.start(W, C, 2)
    damped = C / (C.trace() / 5) + 0.01 * torch.eye(5)
    # What is left of W·C without them is W·C's best approximation of rank 3
    U, S, V = torch.linalg.svd(W.double() @ damped)
    rest = (W - start.B @ start.A).double() @ damped
    assert torch.allclose(rest, U[:, :3] @ S[:3].diag() @ V[:3], atol=1e-4)
    assert torch.allclose(start.right, torch.eye(5) - torch.linalg.pinv(X).float() @ X.float(),
                          atol=1e-5)
    # 1 of 1 + 4 + 9: a share of a tenth of the trace may go too
    assert guardspace.null_projector(C, 0.1).trace() == pytest.approx(3)


@pytest.mark.parametrize("sides", ["left", "right"])
def test_projected_training_is_autograds(gemma, sides):
    """Three steps of AdamW on L·B·A·R, by hooks and by autograd through the projectors."""
    draw = torch.Generator().manual_seed(1)
    name = "layers.1.self_attn.o_proj"
    base = gemma.get_submodule(name)
    out_size, in_size = base.weight.shape
    size = out_size if sides == "left" else in_size
    Q = torch.linalg.qr(torch.randn(size, size // 2, generator=draw)).Q
    start = shared.Start(torch.randn(3, in_size, generator=draw),
                         torch.randn(out_size, 3, generator=draw), **{sides: Q @ Q.T})
    layer = lora.LoRALinear(base, *start.factors(), 0.5)
    x, y = torch.randn(7, in_size, generator=draw), torch.randn(7, out_size, generator=draw)
    assert (layer(x) - base(x)).abs().max() < 1e-4 * base(x).abs().max()

    A, B = (factor.clone().requires_grad_() for factor in (start.A, start.B))
    shared.hold(layer, start)
    ours, theirs = (torch.optim.AdamW(pair, 0.1, weight_decay=0)
                    for pair in ([layer.A, layer.B], [A, B]))
    began = layer.A[3:].detach().clone(), layer.B[:, 3:].detach().clone()
    first = began[1] @ began[0]
    for _ in range(3):
        (layer(x) - y).square().sum().backward()
        whole = start.inside_B(B) @ start.inside_A(A)
        (base(x) + 0.5 * x @ (whole + first).T - y).square().sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        shared.project(layer, start)
        whole = start.inside_B(B) @ start.inside_A(A)
        assert torch.allclose(layer.update, 0.5 * (whole + first), atol=1e-3)
    assert torch.equal(layer.A[3:], began[0]) and torch.equal(layer.B[:, 3:], began[1])
    assert layer.update.norm() > 1


# ---- Inits of the grid against peft's ------------------------------------------------------------
def peft_twin(gemma, init, **options):
    """peft's adapters on transformers' twin: {module: its layer}."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=inits.RANK, lora_alpha=inits.RANK, target_modules=list(TARGETS),
                             init_lora_weights=init, **options)
    twin = peft.get_peft_model(transformers_twin(gemma), config)
    return twin, {name: twin.get_submodule(f"base_model.model.model.{name}")
                  for name in lora.linears(gemma, TARGETS)}


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_factors_and_what_is_left_of_the_weight_are_peft_s(gemma, name):
    _, theirs = peft_twin(gemma, name)
    variants.VARIANTS[name](None, gemma, torch.Generator().manual_seed(0))
    layers = lora.lora_layers(gemma)
    assert layers.keys() == theirs.keys() and len(layers) == 16
    for module, layer in layers.items():
        for ours, their in ((layer.A, theirs[module].lora_A), (layer.B, theirs[module].lora_B)):
            # Singular vectors have no sign of their own
            assert torch.allclose(ours.abs(), their["default"].weight.abs(), atol=1e-4)
        assert torch.allclose(layer.base.weight, theirs[module].base_layer.weight, atol=1e-5)


def test_eva_begins_at_peft_s_incremental_svd(gemma):
    """peft centres what it has seen, and ours doesn't: X and −X are both."""
    pca = pytest.importorskip("peft.utils.incremental_pca")
    draw = torch.Generator().manual_seed(0)
    examples = [Example([2, *torch.randint(3, 300, (30,), generator=draw).tolist()], 4, True)
                for _ in range(2)]
    world = SimpleNamespace(model=random_gemma(), examples=[(each, None) for each in examples])
    inits.eva(world, gemma, draw)
    name = "layers.2.self_attn.v_proj"
    wholes = [Example(example.tokens, 0, True) for example in examples]
    X = inputs_by_hand(world.model, name, wholes)
    # In one batch: of several it keeps no more than the leading part after each
    theirs = pca.IncrementalPCA(n_components=inits.RANK).partial_fit(torch.cat((X, -X)))
    A, V = gemma.get_submodule(name).A, theirs.components_.float()
    assert A.shape == V.shape and torch.allclose((A @ V.T).abs(), torch.eye(len(A)), atol=1e-3)


# ---- Forks of train.py that need no pairs --------------------------------------------------------
def forked(module, mini, out, *more):
    """A run of one step on rows with one answer: its folder's adapter, put on the base model."""
    rows = mini / "one-answer.jsonl"
    write_jsonl(rows, [{"prompt": "how do i pour the tea?", "response": "here you pour the tea."}])
    arguments = [*command(mini, out), "--steps", "1", "--lr", "1e-6", "--data", rows, *more]
    subprocess.run([sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
                   cwd=ROOT, check=True, capture_output=True)
    model = load_model(mini)
    return lora.load_adapter(model, out)


def test_pissa_s_adapter_fits_the_base_model(mini, tmp_path):
    layers = forked("neighbours.pissa", mini, tmp_path / "run", "--init", "pissa")
    for layer in layers.values():
        A, B = pissa.factors(layer.base.weight, 8)
        assert torch.allclose(layer.A[:8], A, atol=1e-4)
        assert torch.allclose(layer.B, torch.cat((B, -B), 1), atol=1e-4)


def test_a_given_subspace_is_where_an_adapter_begins(mini, whole, tmp_path):
    subspaces = load_subspaces(whole.folder / "subspace.safetensors")
    flags = ["--subspace", whole.folder, "--init", "given"]
    layers = forked("given", mini, tmp_path / "run", *flags)
    for name, U in module_bases(load_model(mini), subspaces).items():
        factor = layers[name].B if layers[name].writer else layers[name].A.T
        assert torch.allclose(factor[:, :U.shape[1]], U, atol=1e-4)
    assert read_json(tmp_path / "run/scores.json")["share"]["subspace"] > 0.3


# ---- SIFT ----------------------------------------------------------------------------------------
def test_sift_moves_the_components_of_the_largest_gradients(gemma):
    example = Example([2, 5, 9, 7, 30, 31], 2, True)
    rows = train.pack([example], 8, 0, 0)
    batch = Row(*(part[None] for part in vars(rows[0]).values()))
    named = {name: weight.requires_grad_() for name, weight in gemma.named_parameters()
             if name.endswith(("q_proj.weight", "down_proj.weight"))}
    before = {name: weight.detach().clone() for name, weight in named.items()}
    train.row_loss(gemma, batch).backward()
    largest = {}
    for name, weight in named.items():
        limit = weight.grad.abs().flatten().sort(descending=True).values[weight.numel() // 10]
        largest[name] = weight.grad.abs() >= limit
        weight.grad = None
    sift.masked(gemma, list(named.values()), rows, share=0.1)
    optimizer = torch.optim.AdamW(named.values(), 1e-2, weight_decay=0)
    for _ in range(2):
        train.row_loss(gemma, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in named.items():
        assert torch.equal(weight != before[name], largest[name])
        assert int(largest[name].sum()) == weight.numel() // 10 + 1


# ---- IRR -----------------------------------------------------------------------------------------
def test_irr_removes_opposite_signs_of_large_fisher():
    delta = torch.tensor([[1., -1, 1, 0, -1], [-1, 1, 1, -1, 1]])
    safety = torch.tensor([[1., 1, -1, 1, 1], [1, 1, -1, 1, 1]])
    fisher = torch.tensor([[9., 1, 2, 3, 1], [4, 9, 5, 6, 9]])
    # Opposite: F of 1 2 3 4 5 6, and 1 in the second block; half of each block stays
    assert irr.unsafe(delta, safety, fisher, 0, 4).int().tolist() == [[0, 1, 1, 1, 1],
                                                                      [1, 0, 1, 1, 0]]
    assert irr.unsafe(delta, safety, fisher, 0.5, 4).int().tolist() == [[0, 0, 0, 0, 1],
                                                                        [1, 0, 1, 1, 0]]


def test_irr_mends_by_least_squares():
    """Of each removed column in turn, those after it take over as much of δ·X as they can."""
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(2, 5, generator=draw).double()
    X = torch.randn(5, 9, generator=draw).double()
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    H = X @ X.T
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(5)
    wanted = delta.clone()
    for row, column in mask.nonzero().tolist():
        after = slice(column + 1, 5)
        lost = damped[after, column] * wanted[row, column]
        wanted[row, after] += torch.linalg.solve(damped[after, after], lost)
        wanted[row, column] = 0
    assert torch.allclose(irr.recalibrated(delta, mask, H), wanted)


def test_irr_s_fisher_by_backward(gemma):
    examples = [Example([2, 5, 9, 7], 2, True), Example([2, 8, 30, 31, 9], 1, True)]
    fisher = irr.fisher_of(gemma, examples)
    weight = gemma.get_submodule("layers.1.mlp.up_proj").weight
    wanted = 0
    for example in examples:
        hidden, _ = gemma.hidden(torch.tensor([example.tokens]))
        logits = 30 * torch.tanh(hidden[0] @ gemma.embed_tokens.weight.T / 30)
        answer = torch.tensor(example.tokens[example.start:])
        loss = torch.nn.functional.cross_entropy(logits[example.start - 1:-1], answer)
        wanted = wanted + torch.autograd.grad(loss, weight)[0] ** 2 / 2
    assert torch.allclose(fisher["layers.1.mlp.up_proj"], wanted, rtol=1e-3, atol=1e-9)


def test_irr_leaves_what_agrees_with_safety():
    """What is of δ_s's sign stays and is mended, its opposite goes; norms and embedding stay."""
    aligned, finetuned, unaligned = (random_gemma(seed=seed) for seed in (0, 1, 2))
    before = {name: value.clone() for name, value in finetuned.state_dict().items()}
    examples = [Example([2, 5, 9, 7, 30], 1, True)]
    irr.realign(aligned, finetuned, unaligned, examples, examples)
    for name, value in finetuned.state_dict().items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(value, before[name])
            continue
        base = aligned.state_dict()[name]
        opposite = (before[name] - base).sign() != (base - unaligned.state_dict()[name]).sign()
        assert torch.allclose(value[opposite], base[opposite], atol=1e-6)
        assert not torch.equal(value[~opposite], base[~opposite])
