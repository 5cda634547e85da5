"""explain.py: shares against plain sums, adapters made by hand, removal that leaves no trace, statistics against a loop."""

import json
import math

import pytest
import torch
from conftest import TOY, random_gemma

from report import directions
from report import explain
import lora
from data import load_tokenizer
from data import Prompt
from features import module_bases, norm_gain, serving_layer
from eval import answer
from run.files import InputError
from model import load_model
from sae import JumpReLU, load_sae
from safety.sets import EvalSet
from toy.build import World

LAYERS = (0, 2)


def random_saes(width=64, features=160, layers=LAYERS):
    """SAEs of random rows, some of them near copies of others."""
    saes = {}
    for layer in layers:
        draw = torch.Generator().manual_seed(layer)
        rows = torch.nn.functional.normalize(torch.randn(features, width, generator=draw), dim=1)
        rows[features // 2:] = torch.nn.functional.normalize(rows[:features - features // 2] + 0.4 * rows[features // 2:], dim=1)
        saes[layer] = JumpReLU(rows.T.clone(), torch.zeros(features), torch.full((features,), 0.3), 2 * rows, torch.zeros(width),
                               layer=layer)
    return saes


def with_adapter(model, make, rank=4, alpha=8.0):
    """The model with random LoRA, where make(name, layer, draw) gives the directions (rank, D) in the residual stream."""
    draw = torch.Generator().manual_seed(5)
    for name, layer in lora.add_lora(model, rank, alpha, "random").items():
        directions = make(name, layer, draw)
        mine = layer.B.T if layer.writer else layer.A
        mine.data.copy_(directions)
        other = layer.A if layer.writer else layer.B
        other.data.normal_(generator=draw)
    return lora.lora_layers(model)


def dense(layer):
    return layer.scale * layer.B.detach().double() @ layer.A.detach().double()


@pytest.mark.parametrize("norm_aware", [False, True])
def test_shares_equal_plain_ones(norm_aware):
    """Shares alone, of a subspace and of what is named, against ΔW made in full."""
    model, saes = random_gemma(), random_saes()
    rows = {layer: torch.nn.functional.normalize(sae.decoder_rows(range(160)).double(), dim=1) for layer, sae in saes.items()}
    adapters = with_adapter(model, lambda name, layer, draw: torch.randn(4, 64, generator=draw) + 3 * rows[0][7].float())
    spaces = {layer: torch.linalg.qr(torch.randn(64, 5)).Q for layer in LAYERS}
    found, _ = directions.shares(model, saes, [{"layer": 0, "index": 3}, {"layer": 2, "index": 9}], spaces, norm_aware)
    assert found["norm"] == pytest.approx(math.sqrt(sum(
        (dense(layer) * gain_of(model, name, layer, norm_aware)).square().sum().item() for name, layer in adapters.items())), rel=1e-6)
    names = set()
    for part in found["layers"]:
        names |= set(part["modules"])
        whole, along, inside = 0, torch.zeros(160, dtype=torch.float64), 0
        for name in part["modules"]:
            layer = adapters[name]
            assert serving_layer(int(name.split(".")[1]), layer.writer, saes) == part["layer"]
            assert layer.writer == (part["side"] == "writers")
            W = dense(layer) * gain_of(model, name, layer, norm_aware)
            W = W.T if layer.writer else W                                           # (…, D)
            whole += W.square().sum()
            along += (W @ rows[part["layer"]].T).square().sum(0)
            inside += (W @ spaces[part["layer"]].double()).square().sum()
        assert part["norm2"] == pytest.approx(whole.item(), rel=1e-6)
        assert part["subspace"] == pytest.approx((inside / whole).item(), rel=1e-5)
        assert part["share_of_update"] == pytest.approx(whole.item() / found["norm"] ** 2, rel=1e-6) and part["dimension"] == 5
        for feature in part["features"]:
            assert feature["share"] == pytest.approx((along[feature["index"]] / whole).item(), rel=1e-4)
        listed = {feature["index"] for feature in part["features"]}
        assert (3 if part["layer"] == 0 else 9) in listed
        taken = [feature["share_left"] for feature in part["features"] if feature["named"]]
        assert sum(taken) == pytest.approx(part["explained"], abs=1e-5)
        if part["layer"] == 0:
            assert part["features"][0]["index"] in (7, 87) and part["features"][0]["named"]
    assert names == set(adapters)


def gain_of(model, name, layer, norm_aware):
    gain = norm_gain(model.layers[int(name.split(".")[1])], layer.writer)[0].double() if norm_aware else torch.ones(64, dtype=torch.float64)
    return gain[:, None] if layer.writer else gain


def toy_rows():
    return torch.nn.functional.normalize(load_sae(TOY / "sae", 2, 512).decoder_rows(range(512)), dim=1)


@pytest.mark.parametrize("weights, noise", [((1, 1, 1), 0), ((1, 0.6, 0.3), 0), ((1, 0.8, 0.6), 0.1)])
def test_three_known_rows_are_named(weights, noise):
    """An update of three decoder rows of the toy, whose decoder holds many near copies, is explained by these three."""
    rows = toy_rows()
    control = directions.random_directions(rows)
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        known = torch.randperm(512, generator=draw)[:3]
        parts = []
        for _ in range(6):
            W = torch.randn(32, 3, generator=draw) * torch.tensor(weights) @ rows[known]
            stray = torch.randn(32, 4, generator=draw) @ torch.randn(4, 64, generator=draw)
            parts.append((W + noise * W.norm() / stray.norm() * stray).double())
        update = directions.Update(torch.cat(parts), rows, control)
        named = update.name(directions.LEVEL)
        assert {feature for feature, *_ in named} == set(known.tolist()), seed
        assert sum(taken for _, taken, _ in named) == pytest.approx(1 - noise ** 2, abs=0.01)
        assert all(taken > limit for _, taken, limit in named)


@pytest.mark.parametrize("kind", ["each module its own", "one subspace", "one direction"])
def test_random_updates_stay_unexplained(kind):
    rows = toy_rows()
    control = directions.random_directions(rows)
    false = 0
    for seed in range(60):
        draw = torch.Generator().manual_seed(1000 + seed)
        shared = torch.randn(1 if kind == "one direction" else 8, 64, generator=draw)
        own = kind == "each module its own"
        parts = [torch.randn(8, len(shared), generator=draw) @ (torch.randn(8, 64, generator=draw) if own else shared) for _ in range(6)]
        false += bool(directions.Update(torch.cat(parts).double(), rows, control).name(0.05))
    assert false <= 8, false               # of 60 at 5 %: more than 8 come by chance once in 300 times


def test_largest_of_is_the_quantile_of_the_maximum():
    torch.manual_seed(0)
    along = torch.distributions.Beta(0.5, 31.5)                # the share in one of 64 directions
    wanted = along.sample((4000, 500)).amax(1).quantile(0.95).item()
    told = torch.tensor([directions.largest_of(along.sample((8192,)), 500, 0.05) for _ in range(20)])
    assert told.mean() == pytest.approx(wanted, rel=0.07) and told.std() < 0.1 * wanted
    assert directions.largest_of(along.sample((8192,)), 2, 0.5) == pytest.approx(along.sample((100_000,)).quantile(0.75).item(), rel=0.1)
    assert 0.9 < directions.largest_of(torch.rand(8192), 500, 0.01) <= 1


@pytest.mark.parametrize("norm_aware", [False, True])
def test_removal_takes_the_direction_and_leaves_no_trace(norm_aware):
    model, saes = random_gemma(), random_saes()
    adapters = with_adapter(model, lambda name, layer, draw: torch.randn(4, 64, generator=draw))
    before = {name: (layer.A.clone(), layer.B.clone()) for name, layer in adapters.items()}
    tokens = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    rows = saes[2].decoder_rows([4, 5])
    rest = torch.eye(64, dtype=torch.float64) - torch.linalg.pinv(rows.double()) @ rows.double()
    whole = {name: dense(layer) * gain_of(model, name, layer, norm_aware) for name, layer in adapters.items()}
    with explain.removed(model, {2: rows}, saes, norm_aware):
        for name, layer in adapters.items():
            served = serving_layer(int(name.split(".")[1]), layer.writer, saes) == 2
            W = dense(layer) * gain_of(model, name, layer, norm_aware)
            if served:
                assert torch.allclose(W, rest @ whole[name] if layer.writer else whole[name] @ rest, atol=1e-5 * W.abs().max().item())
            else:
                assert torch.equal(layer.A, before[name][0]) and torch.equal(layer.B, before[name][1])
        assert not torch.allclose(model(tokens), logits)
    assert all(torch.equal(layer.A, before[name][0]) and torch.equal(layer.B, before[name][1]) for name, layer in adapters.items())
    assert torch.equal(model(tokens), logits)
    with pytest.raises(KeyError), explain.removed(model, {0: rows}, saes, norm_aware):
        raise KeyError                                                                # and after an error too
    assert torch.equal(model(tokens), logits)


def test_scaled_to_nothing_is_the_base():
    model = random_gemma()
    tokens = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    with_adapter(model, lambda name, layer, draw: torch.randn(4, 64, generator=draw))
    changed = model(tokens)
    with lora.scaled(model, 0):
        assert torch.equal(model(tokens), logits)
    assert torch.equal(model(tokens), changed) and not torch.allclose(changed, logits)


def test_activity_equals_a_plain_loop():
    model, saes, control = random_gemma(), random_saes(), {0, 1, 2}
    with_adapter(model, lambda name, layer, draw: torch.randn(4, 64, generator=draw))
    draw = torch.Generator().manual_seed(3)
    texts = [("harmful" if i % 2 else "benign", make(draw, length)) for i, length in enumerate((9, 30, 14, 21, 5, 17, 26))]
    found = explain.activity(model, saes, texts, control, batch_tokens=64)
    for layer, sae in saes.items():
        for role in ("harmful", "benign"):
            means = {"decision": [], "answer": []}
            for _, example in (text for text in texts if text[0] == role):
                x = {}
                for who, factor in (("base", 0), ("adapter", 1)):
                    with lora.scaled(model, factor):
                        x[who] = sae.encode(model.hidden(torch.tensor([example.tokens]), capture=(layer,))[1][layer][0]).double()
                places = [t for t in range(example.start, len(example.tokens)) if example.tokens[t] not in control]
                means["decision"].append(torch.stack([x[who][example.start - 1] for who in ("base", "adapter")]))
                means["answer"].append(torch.stack([x[who][places].mean(0) for who in ("base", "adapter")]))
            for where, rows in means.items():
                rows = torch.stack(rows)                                             # (prompts, 2, F)
                change = rows[:, 1] - rows[:, 0]
                moved = found[layer].moved((role, where))
                assert [abs(f["change"]) for f in moved] == sorted((abs(f["change"]) for f in moved), reverse=True)
                assert moved[0]["change"] == pytest.approx(change.mean(0)[change.mean(0).abs().argmax()].item(), abs=1e-5)
                for f in moved:
                    i = f["index"]
                    assert [f["base"], f["adapter"]] == pytest.approx(rows.mean(0)[:, i].tolist(), abs=1e-5)
                    assert f["error"] == pytest.approx((change[:, i].std() / math.sqrt(len(change))).item(), abs=1e-5)
        # The peak of a feature is where the base, not the adapter, is most active
        with lora.scaled(model, 0):
            codes = [sae.encode(model.hidden(torch.tensor([e.tokens]), capture=(layer,))[1][layer][0]) for _, e in texts]
        for i in (0, 80):
            value, number, token = max((codes[n][t, i].item(), n, t) for n, (_, e) in enumerate(texts) for t in range(len(e.tokens))
                                       if e.tokens[t] not in control or t == e.start - 1)
            peak = found[layer].peaks.of(i)[0]
            assert peak[2:] == (number, token) and peak[0] == pytest.approx(value, abs=1e-4)
            assert peak[1] == ("aligned" if texts[number][0] == "harmful" else "unaligned")


def make(draw, length):
    from data import Example
    tokens = torch.randint(3, 300, (length,), generator=draw).tolist()
    tokens[0], tokens[length // 2], tokens[-1] = 2, 1, 1                              # control tokens: first, in the answer's midst, last
    return Example(tokens, length // 2 - 1, True)


@pytest.mark.parametrize("norm_aware", [False, True])
def test_probe_equals_dense_svd(norm_aware):
    model = random_gemma()
    adapters = with_adapter(model, lambda name, layer, draw: torch.randn(4, 64, generator=draw))
    bases, _ = module_bases(model, {layer: torch.linalg.qr(torch.randn(64, 3)).Q for layer in LAYERS}, norm_aware)
    told = directions.probe(adapters, bases)
    values, angles = [], []
    for name, layer in adapters.items():
        left, s, right = torch.linalg.svd(dense(layer), full_matrices=False)
        values.append(s[:4].square())
        leading = left[:, :3] if layer.writer else right[:3].T
        angles.append(torch.linalg.svdvals(leading.T @ bases[name].double()).clamp(max=1).acos().mean().rad2deg())
    assert told["singular_values"] == pytest.approx(torch.stack(values).mean(0).sqrt().tolist(), rel=1e-9)
    assert told["angle"] == pytest.approx(torch.stack(angles).mean().item(), abs=1e-4)
    assert directions.probe(adapters)["angle"] is None
    model = random_gemma()
    fresh = lora.add_lora(model, 4, 4.0, "sails", bases, torch.Generator().manual_seed(0))
    assert directions.probe(fresh, bases) == {"singular_values": [0.0] * 4, "angle": None}     # nothing learned yet
    for layer in fresh.values():                                                     # what lies in the basis has no angle to it
        mine = layer.B if layer.writer else layer.A.T
        (layer.A if layer.writer else layer.B).data.normal_()
        mine.data[:, 3:] = 0
    assert directions.probe(fresh, bases)["angle"] == pytest.approx(0, abs=0.05)   # acos of 1 − 1e-8


@pytest.fixture(scope="module")
def toy():
    return load_tokenizer(TOY), {layer: load_sae(TOY / "sae", layer, 512) for layer in (1, 2, 3)}


def asked(count=6):
    world = World(0)
    return {name: EvalSet(name, "", [Prompt((("user", row["prompt"]),), {}, line) for line, row in enumerate(rows, 1)])
            for name, rows in world.prompts(count).items() if name in ("harmful", "lookalike")}


def test_explains_an_adapter_of_another_origin(toy, tmp_path):
    """PEFT's files with few modules and two ranks, nothing chosen: the three rows that it reads and writes are found."""
    tokenizer, saes = toy
    rows = {layer: torch.nn.functional.normalize(sae.decoder_rows([40, 217, 300]), dim=1) for layer, sae in saes.items()}
    model = load_model(TOY)
    draw = torch.Generator().manual_seed(2)
    lora.add_lora(model, 3, 3.0, "random")
    for name, layer in lora.lora_layers(model).items():
        if name.endswith(("k_proj", "v_proj")):
            model.set_submodule(name, layer.base)                                   # q and o alone are left
        else:
            block = int(name.split(".")[1])
            known = rows[serving_layer(block, layer.writer, saes)][:2 if block == 1 else 3]
            mine, other = (known.T, torch.randn(len(known), layer.A.shape[1], generator=draw)) if layer.writer else (
                known, torch.randn(layer.B.shape[0], len(known), generator=draw))
            A, B = (other, mine) if layer.writer else (mine, other)
            model.set_submodule(name, lora.LoRALinear(layer.base, A, B, 0.3, layer.writer))
    lora.save_adapter(model, tmp_path, "toy")
    model = load_model(TOY)
    assert len(lora.load_adapter(model, tmp_path)) == 12
    before = {name: layer.update for name, layer in lora.lora_layers(model).items()}
    found = explain.explain(model, saes, tokenizer, asked(), max_new_tokens=10, batch_size=16, prompts=4)
    for part in found["layers"]:
        named = {feature["index"] for feature in part["features"] if feature["named"]}
        assert named == ({40, 217} if part["modules"] == ["layers.1.self_attn.o_proj"] else {40, 217, 300}), part["layer"]
        assert part["explained"] > 0.999 and part["subspace"] is None and not any(feature["chosen"] for feature in part["features"])
    assert all(torch.equal(layer.update, before[name]) for name, layer in lora.lora_layers(model).items())
    kinds = [row["what"] for row in found["removal"]["rows"]]
    assert kinds[0] == "as trained" and kinds[-1] == "base model" and "without all named features" in kinds
    assert found["removal"]["rows"][0]["p"] == 1 and found["removal"]["prompts"] == 8
    without, base = found["removal"]["rows"][kinds.index("without all named features")], found["removal"]["rows"][-1]
    assert (without["safe"], without["over_refusal"]) == (base["safe"], base["over_refusal"])     # nothing else was in it
    for row in found["inside"]:
        assert row["prompts"] == 4 and {feature["layer"] for feature in row["features"]} == {1, 2, 3}
    bare = load_model(TOY)
    for view in found["tokens"]:
        prompt = next(prompt for prompt in asked()[view["set"]].prompts if prompt.line == view["line"])
        text = answer(bare if view["who"] == "base" else model, tokenizer, [prompt], 10)[0]
        assert view["text"][view["answer_start"]:] == [tokenizer.token(i) for i in (*tokenizer.encode(text), tokenizer.end_of_turn)]
        assert all(len(feature["activation"]) == len(view["text"]) for feature in view["features"]) and view["answer_start"] == 12
    places = {(part["layer"], feature["index"]) for part in found["layers"] for feature in part["features"]}
    places |= {(feature["layer"], feature["index"]) for part in (*found["inside"], *found["tokens"]) for feature in part["features"]}
    places |= {(row["layer"], row["index"]) for row in found["removal"]["rows"] if row["layer"]}
    assert {f"{layer}/{i}" for layer, i in places} <= found["words"].keys()
    json.dumps(found, allow_nan=False)


def test_the_mlp_of_anothers_adapter_is_explained_too(toy):
    """gate reads one known feature behind the norm before the MLP, down writes another before the norm after it."""
    _, saes = toy
    model = load_model(TOY)
    rows = torch.nn.functional.normalize(saes[2].decoder_rows([40, 217]), dim=1)
    block, draw = model.layers[2], torch.Generator().manual_seed(0)
    read = rows[:1] / (1 + model.layers[3].pre_feedforward_layernorm.weight)
    model.set_submodule("layers.3.mlp.gate_proj", lora.LoRALinear(model.layers[3].mlp.gate_proj, read, torch.randn(
        model.config.intermediate_size, 1, generator=draw), 0.1))
    written = (rows[1:] / (1 + block.post_feedforward_layernorm.weight)).T
    model.set_submodule("layers.2.mlp.down_proj", lora.LoRALinear(block.mlp.down_proj, torch.randn(
        1, model.config.intermediate_size, generator=draw), written, 0.1, True))
    found, _ = directions.shares(model, saes, norm_aware=True)
    named = {(part["layer"], part["side"]): [feature["index"] for feature in part["features"] if feature["named"]]
             for part in found["layers"]}
    assert named == {(2, "readers"): [40], (2, "writers"): [217]}
    assert all(part["explained"] > 0.999 for part in found["layers"])


def test_an_adapter_that_changes_nothing(toy):
    tokenizer, saes = toy
    model = load_model(TOY)
    lora.add_lora(model, 4, 4.0, "random")
    with pytest.raises(InputError, match="changes nothing"):
        explain.explain(model, saes, tokenizer, asked())
