"""Small random models for the tests, a folder like toy/, and commands as a person runs them."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small, and tests run side by side

import hypothesis
import pytest
import torch

from data import load_tokenizer
from model import Config, Gemma2, save_model
from run.files import write_jsonl
from sae import save_sae
from toy import world as toy

ROOT = Path(__file__).resolve().parent.parent
TOY, SHARED = ROOT / "toy", ROOT.parent / "shared" / "data"
hypothesis.settings.register_profile("same each time", derandomize=True)
hypothesis.settings.load_profile("same each time")

# Heads, key-value heads, head_dim, hidden_size, query_pre_attn_scalar; the last two odd, as 27b's
SHAPES = [(4, 2, 16, 64, 16), (4, 1, 16, 48, 16), (8, 8, 8, 64, 9), (6, 2, 16, 72, 24)]


def random_gemma(shape=SHAPES[0], seed=0, std=0.4, **changes):
    """A random Gemma-2 with 4 layers, window 16, 300 tokens; both softcaps bite."""
    heads, kv_heads, head_dim, hidden_size, scalar = shape
    settings = dict(vocab_size=300, hidden_size=hidden_size, intermediate_size=96,
                    num_hidden_layers=4, num_attention_heads=heads, num_key_value_heads=kv_heads,
                    head_dim=head_dim, query_pre_attn_scalar=scalar, sliding_window=16)
    draw = torch.Generator().manual_seed(seed)
    model = Gemma2(Config(**settings | changes)).init_weights(std, draw).requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.normal_(0, 0.3, generator=draw)
    # A small embedding, so that the context decides the next token; the norm's gain makes up for it
    model.embed_tokens.weight /= 8
    model.norm.weight += 12
    return model


def transformers_twin(model, dtype=torch.float32):
    """transformers' Gemma-2, eager, with the weights of ours."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config.from_dict(model.config.to_dict())
    config._attn_implementation = "eager"
    twin = transformers.Gemma2ForCausalLM(config).eval()
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    missing, extra = twin.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not extra  # tied
    twin.tie_weights()
    return twin.to(dtype).requires_grad_(False)


@pytest.fixture
def gemma():
    return random_gemma()


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip("the folder of real inputs, ../shared/data, is not here")
    return SHARED


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A folder like toy/, made in a second: random weights and SAEs, the toy's words and texts."""
    folder = tmp_path_factory.mktemp("mini")
    toy.write_tokenizer(folder / "tokenizer.json")
    size = load_tokenizer(folder).size
    save_model(random_gemma(vocab_size=size, num_hidden_layers=3, std=0.1), folder)
    for layer in (0, 1):
        W = torch.randn(96, 64, generator=torch.Generator().manual_seed(layer))
        W /= W.norm(dim=1, keepdim=True)
        save_sae(folder / "sae", layer, 9, W_enc=W.T, b_enc=torch.zeros(96), W_dec=W,
                 b_dec=torch.zeros(64), threshold=torch.full((96,), 0.5))
    world = toy.World(0)
    write_jsonl(folder / "train.jsonl", world.pairs(60))
    for name, rows in world.prompts(8).items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


# Commands as a person runs them, on the mini folder
STEPS = ("--steps", "7", "--batch-tokens", "96", "--lr", "1e-2",
         "--more", "save-every=3", "accumulate=2", "max-new-tokens=4")
SETS = ("harmful", "jailbreak", "lookalike", "benign")


def command(mini, out, *more, sets=()):
    arguments = ["--model", mini, "--sae", mini / "sae", "--data", mini / "train.jsonl",
                 "--rank", "8", "--out", out, *STEPS, *more]
    files = [f"--set={name}={mini / name}.jsonl" for name in sets]
    return list(map(str, arguments + files))


def start(script, arguments, **options):
    return subprocess.Popen([sys.executable, ROOT / script, *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ended(script, arguments):
    """What a command printed, which must end well."""
    process = start(script, list(map(str, arguments)))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="session")
def whole(mini, tmp_path_factory):
    """An unbroken run with all sets."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return SimpleNamespace(folder=folder, out=ended("train.py", command(mini, folder, sets=SETS)))


@pytest.fixture(scope="module")
def world(mini, tmp_path_factory):
    """World 7 of experiments/: the mini folder, and sizes that fit it."""
    from experiments import ablate, inits, lasting, reading, variants, worlds
    folder = tmp_path_factory.mktemp("worlds") / "7"
    shutil.copytree(mini, folder)
    (folder / "data").mkdir()
    for name in ("train", *SETS):
        shutil.move(folder / f"{name}.jsonl", folder / "data")
    (folder / "world.json").touch()
    small = {"WORLDS": folder.parent, "LAYERS": (0, 1), "WIDTH": "96", "RANK": 8, "TOP_K": 6,
             "STEPS": 2, "NUM_GREEDY": 16, "LOOKS": (0, 2)}
    worlds.built_world.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (worlds, variants, inits, ablate, reading, lasting):
            for name, value in small.items():
                patch.setattr(module, name, value, raising=False)
        yield worlds.built_world(7)


def inputs_by_hand(model, name, examples):
    """X (n, in) float64 of what a module reads at the answers' tokens, from whole forwards."""
    kept = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: kept.append(x[0][0]))
    for example in examples:
        model.hidden(torch.tensor([example.tokens]))
    hook.remove()
    return torch.cat([x[example.start:] for x, example in zip(kept, examples)]).double()


def same_when_resumed(make, folder, steps):
    """SAE trainings: one saved after `steps` and taken up ends as one that ran through."""
    whole, part, again = make(), make(), make()
    list(whole)
    for _ in itertools.islice(part, steps):
        pass
    part.save(folder)
    again.load(folder)
    assert again.step == steps
    list(again)
    for layer, trainer in whole.trainers.items():
        wanted, state = trainer.state(), again.trainers[layer].state()
        assert wanted.keys() == state.keys()
        for key in wanted:
            assert torch.equal(wanted[key], state[key]), key
    return again
