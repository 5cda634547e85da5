"""Small random models for the tests, and where to find the real inputs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"   # read once, when huggingface_hub is imported
sys.path.append(str(ROOT))  # at the end, so that `select` stays Python's own

from model import Config
from model import Gemma2

hypothesis.settings.register_profile("same each time", derandomize=True)
hypothesis.settings.load_profile("same each time")
SHARED = ROOT.parent / "shared" / "data"
TOY = ROOT / "toy"
SHAPES = [  # heads, key-value heads, head_dim, hidden_size, query_pre_attn_scalar; the last two as odd as the 27b's
    (4, 2, 16, 64, 16), (4, 1, 16, 48, 16), (8, 8, 8, 64, 9), (6, 2, 16, 72, 24)]


def random_gemma(shape=SHAPES[0], seed=0, std=0.4, **changes):
    """A random Gemma-2 whose weights are large enough that both softcaps bite; 4 layers, window 16, 300 tokens."""
    heads, kv, head_dim, hidden, scalar = shape
    config = Config(**{"vocab_size": 300, "hidden_size": hidden, "intermediate_size": 96, "num_hidden_layers": 4,
                       "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim,
                       "query_pre_attn_scalar": scalar, "sliding_window": 16} | changes)
    draw = torch.Generator().manual_seed(seed)
    model = Gemma2(config).init_weights(std, draw)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(0, 0.3, generator=draw)
        # A small embedding, so that what comes next hangs on the context and not on the last token alone; the final
        # norm's gain makes up for it in the logits
        model.embed_tokens.weight /= 8
        model.norm.weight += 12
    return model.requires_grad_(False)


def transformers_twin(model, dtype=torch.float32):
    """transformers' Gemma-2, eager, with the weights of ours."""
    transformers = pytest.importorskip("transformers")
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "model_type")}
    twin = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**values, attn_implementation="eager")).eval()
    missing, extra = twin.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
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


def write_mini(folder):
    """Fill a folder like toy/, in a second: random weights and SAEs, the toy world's tokenizer and texts."""
    from toy import build as toy
    from data import load_tokenizer
    from run.files import write_jsonl
    from model import save_model
    from sae import save_sae

    toy.write_tokenizer(folder / "tokenizer.json")
    model = random_gemma(vocab_size=load_tokenizer(folder).size, num_hidden_layers=3, std=0.1)
    save_model(model, folder)
    for layer in (0, 1):
        draw = torch.Generator().manual_seed(layer)
        W = torch.nn.functional.normalize(torch.randn(96, 64, generator=draw), dim=1)
        save_sae(folder / "sae", layer, 9, W_enc=W.T, b_enc=torch.zeros(96), threshold=torch.full((96,), 0.5), W_dec=W,
                 b_dec=torch.zeros(64))
    world = toy.World(0)
    write_jsonl(folder / "train.jsonl", world.pairs(60))
    for name, rows in world.prompts(8).items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    return write_mini(tmp_path_factory.mktemp("mini"))


# ---------------------------------------------------------------------------------------------------------------
# Commands as a person runs them, on the mini folder

STEPS = ("--steps", "7", "--batch-tokens", "96", "--lr", "1e-2",
         "--more", "save-every=3", "accumulate=2", "max-new-tokens=4")
SETS = ("harmful", "jailbreak", "lookalike", "benign")


def command(mini, out, *more, sets=()):
    arguments = ["--model", mini, "--sae", mini / "sae", "--data", mini / "train.jsonl", "--rank", "8", "--out", out,
                 *STEPS, *more]
    for name in sets:
        arguments += ["--set", f"{name}={mini / name}.jsonl"]
    return list(map(str, arguments))


def start(script, arguments, **kind):
    return subprocess.Popen([sys.executable, ROOT / script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kind)


def ended(script, arguments):
    """Run a command to its end, which must be a good one. What it printed."""
    process = start(script, list(map(str, arguments)))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="session")
def whole(mini, tmp_path_factory):
    """An unbroken run with all sets."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start("train.py", command(mini, folder, sets=SETS))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return SimpleNamespace(folder=folder, out=out)
