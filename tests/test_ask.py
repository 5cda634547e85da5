"""eval.py --ask: answers and activations of two models, and steering against transformers."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import random_gemma, transformers_twin

import eval
import lora
from data import load_tokenizer, prompt_tokens
from eval import answer
from model import load_model
from run.files import InputError
from run.readers import Prompt
from safety.ask import parse_steer, steered, strengths
from sae import load_sae


def test_steering_is_a_sum_after_a_block():
    """Logits are transformers' with a hook; generation with its caches takes the same tokens."""
    model = random_gemma()
    twin = transformers_twin(model)
    tokens = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    direction = 3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    plain = model(tokens)
    twin.model.layers[1].register_forward_hook(
        lambda block, inputs, output: output + direction if torch.is_tensor(output)
        else (output[0] + direction, *output[1:]))
    with steered(model, {1: direction}):
        logits = model(tokens)
        _, residuals = model.hidden(tokens, capture=(1,))
        (new,) = model.generate([tokens[0]], max_new_tokens=8)
        ids = tokens[:1]
        for _ in range(8):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    torch.testing.assert_close(logits, twin(tokens).logits, atol=2e-4, rtol=1e-4)
    assert new.tolist() == ids[0, 24:].tolist() and (logits - plain).abs().max() > 0.1
    assert torch.equal(model(tokens), plain)
    torch.testing.assert_close(residuals[1] - model.hidden(tokens, capture=(1,))[1][1],
                               direction.expand(2, 24, 64), atol=1e-3, rtol=0)


def test_strengths_are_the_sae_s_at_the_last_token(mini):
    model, sae = load_model(mini), load_sae(mini / "sae", 1)
    tokens = torch.tensor([2, 9, 11, 30, 7])
    states = transformers_twin(model)(tokens[None], output_hidden_states=True).hidden_states
    h = states[2][0, -1] @ sae.W_enc + sae.b_enc
    found = strengths(model, tokens, {1: sae})[1]
    torch.testing.assert_close(found, torch.where(h > sae.threshold, h, 0), atol=1e-3, rtol=1e-4)
    assert found.count_nonzero() and strengths(model, tokens, {}) == {}


QUESTION = "how do i break the vault?"


def test_the_command(whole, mini, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in whole.folder.iterdir() if path.is_file()}
    monkeypatch.setattr("sys.argv", ["eval.py", str(whole.folder), "--ask", QUESTION,
                                     "--steer", "1/5", "-40"])
    eval.main()
    lines = capsys.readouterr().out.splitlines()
    assert before == {path: path.read_bytes() for path in whole.folder.iterdir() if path.is_file()}
    assert lines[1] == QUESTION
    cells = [re.split(" {2,}", line.strip()) for line in lines[3:] if line]
    answers = {label: text for label, _, text in cells[:3]}

    # The same by other functions
    model, tokenizer = load_model(mini), load_tokenizer(mini)
    sae = load_sae(mini / "sae", 1)
    prompts = [Prompt((("user", QUESTION),), {}, 1)]
    tokens = torch.tensor(prompt_tokens(tokenizer, prompts[0].turns))
    expected, fires = {"base": answer(model, tokenizer, prompts, 4)[0]}, {}
    with steered(model, {1: -40 * sae.W_dec[5]}):
        expected["base + -40 × 1/5"] = answer(model, tokenizer, prompts, 4)[0]
    fires["base"] = strengths(model, tokens, {1: sae})[1]
    lora.load_adapter(model, whole.folder)
    expected["adapter"] = answer(model, tokenizer, prompts, 4)[0]
    fires["adapter"] = strengths(model, tokens, {1: sae})[1]
    assert answers == expected and len(set(answers.values())) == 3

    # Each model's five strongest are there, with both activations
    assert cells[3] == ["fires before the answer", "base", "adapter", "promotes"]
    rows = {row[0]: row[1:3] for row in cells[5:] if row[0].startswith("1/")}
    for values in fires.values():
        assert rows.keys() >= {f"1/{unit}" for unit in values.topk(5).indices.tolist()}
    for place, shown in rows.items():
        unit = int(place.removeprefix("1/"))
        assert shown == [f"{values[unit]:.2f}" for values in fires.values()]
    assert {row[0].split("/")[0] for row in cells[5:]} == {"0", "1"}


def test_what_is_refused(whole, monkeypatch):
    saes = {1: SimpleNamespace(n_units=96)}
    assert parse_steer(("1/95", "-.5"), saes) == (1, 95, -0.5)
    for steer in (("1/96", "4"), ("0/1", "4"), ("feature", "4"), ("1/5", "much")):
        with pytest.raises(InputError, match=f"--steer {steer[0]}"):
            parse_steer(steer, saes)
    with pytest.raises(InputError, match="no SAEs are known"):
        parse_steer(("1/5", "4"), {})
    monkeypatch.setattr("sys.argv", ["eval.py", str(whole.folder), "--steer", "1/5", "4"])
    with pytest.raises(InputError, match="--ask TEXT"):
        eval.main()
