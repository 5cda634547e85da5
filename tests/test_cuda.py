"""The CUDA path, as far as a CPU can know it: no GPU has run it yet.

Which form of attention it takes, one graph, what it keeps for the backward, and whole runs on a
pretended card.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_gemma
from torch.nn.attention.flex_attention import BlockMask

import attention
from lora import add_lora


class OnCard(torch.Tensor):
    """A tensor of the CPU that says it is on a card."""
    is_cuda = True
    is_cpu = False


def low(T):
    """Spans of two rows, each one document."""
    return torch.zeros(2, T, dtype=torch.long).as_subclass(OnCard)


# --------------------------------------------------------------------------------------------------
# Flex attention: when, how compiled, which blocks

def test_flex_only_for_a_backward(monkeypatch):
    """A forward without gradients, as in generation, never meets flex's decoding kernel."""
    monkeypatch.setattr(attention, "span_blocks", lambda low: BlockMask)
    forms = {T: attention.visible_keys(low(T), 50.0) for T in (16, 65, 110, 127, 128, 2048)}
    assert [T for T, form in forms.items() if form is BlockMask] == [128, 2048]
    # Whether or not `--compile` is on
    for compiled in (False, True):
        monkeypatch.setattr(attention, "compiled", compiled)
        assert attention.visible_keys(low(300), 50.0) is BlockMask
        with torch.no_grad():
            assert all(attention.visible_keys(low(T), 50.0).dtype == torch.bool for T in forms)


@pytest.mark.parametrize("kib, is_small", [(227, False), (163, False), (99, True)])
def test_one_compiled_flex_with_blocks_that_fit_the_card(kib, is_small, monkeypatch):
    card = SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    compiled = []
    once = attention.cache(lambda function: compiled.append(function) or function)
    monkeypatch.setattr(attention, "compile_once", once)
    monkeypatch.setattr(attention, "flex_attention", lambda *_, **named: named["kernel_options"])
    q = torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16).as_subclass(OnCard)
    for _ in range(2):
        options = attention.attend_flex(q, q, q, None, 1.0, 50.0)
    assert compiled == [attention.flex_attention] and bool(options) == is_small
    for name, rows in (options or {}).items():
        # A backward holds four blocks in bfloat16, at a head size of 256
        assert name == "num_stages" or 4 * rows * 256 * 2 <= kib << 10


def test_one_graph(monkeypatch):
    """`--compile` traces CUDA's form without a break. (A CPU has flex's forward alone.)"""
    model = random_gemma(num_hidden_layers=3, sliding_window=100)
    add_lora(model, 4, 4.0, "orthonormal", generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("model.visible_keys", lambda low, cap: attention.span_blocks(low))
    tokens = torch.zeros(1, 256, dtype=torch.long)
    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(lambda *row: model.hidden(*row)[0])(tokens, tokens)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    names = [str(node.target) for node in explained.graphs[0].graph.nodes]
    assert sum("flex_attention" in name for name in names) >= 3
