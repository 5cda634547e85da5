"""The CUDA path, as far as a CPU can know it: no GPU has run it yet.

Which form of attention it takes, one graph, what it keeps for the backward, whole runs and
generation on a pretended card.
"""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import SETS, command, random_gemma
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import attention
import eval as evaluation
import train
from data import load_tokenizer
from lora import add_lora
from model import PRESETS, Gemma2, load_model
from run import generation, parallel
from run.estimate import activation_bytes


class SaysCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a card."""
    is_cuda, is_cpu = True, False


def low(T):
    """Spans of two rows, each one document."""
    return torch.zeros(2, T, dtype=torch.long).as_subclass(SaysCuda)


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
    q = torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16).as_subclass(SaysCuda)
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


# --------------------------------------------------------------------------------------------------
# Memory

class Flex(torch.autograd.Function):
    """What flex_attention keeps: q, k, v, its output, and a number a head and query."""

    @staticmethod
    def forward(ctx, q, k, v, *_):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def kept_bytes(config, layers, recompute, method):
    """Bytes that a row's forward to the last hidden state keeps, weights aside; device "meta"."""
    with torch.device("meta"):
        model = Gemma2(replace(config, num_hidden_layers=layers, layer_types=())).bfloat16()
        if method == "lora":
            add_lora(model, 16, 16.0, "random")
    model.recompute = recompute
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage              # held, so that no address comes twice
        return tensor
    row = torch.zeros(1, 2048, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(row, row)
    for weight in model.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["2b", "9b", "27b"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dry_run_tells_what_cuda_keeps(method, name, recompute, monkeypatch):
    monkeypatch.setattr("model.attention", Flex.apply)
    config = PRESETS[f"google/gemma-2-{name}"]
    two, three = (kept_bytes(config, layers, recompute, method) for layers in (2, 3))
    kept = two + (config.num_hidden_layers - 2) * (three - two)
    if recompute:                                   # the backward makes one block again, whole
        kept += kept_bytes(config, 3, False, method) - kept_bytes(config, 2, False, method)
    row = SimpleNamespace(batch_tokens=2048, dtype="bfloat16", recompute=recompute, method=method)
    assert activation_bytes(row, config) == pytest.approx(kept, rel=0.03)


def test_full_fine_tuning_of_2b_in_bfloat16_fits_80_gb(monkeypatch, capsys):
    arguments = ["--model", "google/gemma-2-2b", "--method", "full", "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments, "--device", "cpu", "--dry-run"])
    train.main()
    rows = re.findall(r"memory: (.*?)  +([\d,]+) MB", capsys.readouterr().out)
    memory = {what: int(size.replace(",", "")) for what, size in rows}
    total = memory.pop("in all, about")
    assert total == pytest.approx(sum(memory.values()), abs=5) and total < 80_000
    # Per parameter two bytes of weight, four of its copy, four of gradient, eight of moments
    count = 2_614_341_888
    assert sum(memory.values()) > 18 * count / 1e6
    assert memory["AdamW's two moments"] == pytest.approx(8 * count / 1e6, abs=1)


@pytest.mark.parametrize("name, flags, recompute", [
    ("27b", ["--shard"], True), ("9b", ["--shard"], False),
    ("27b", ["--shard", "--no-recompute"], False)])
def test_shard_of_a_large_model_recomputes(name, flags, recompute, monkeypatch, capsys):
    monkeypatch.setattr("run.parallel.world_size", lambda: 4)
    model = f"google/gemma-2-{name}"
    monkeypatch.setattr("sys.argv", ["train.py", "--model", model, "--dry-run", *flags])
    train.main()
    assert re.search(rf"^recompute +{recompute} ", capsys.readouterr().out, re.M)


# --------------------------------------------------------------------------------------------------
# A driver that this PyTorch can't use

@pytest.mark.parametrize("cuda, driver, visible, warns", [
    ("12.8", "/", None, True), ("12.8", "/", "", False), ("12.8", "/none", None, False),
    (None, "/", None, False)])
def test_an_old_driver_is_named(cuda, driver, visible, warns, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "DRIVER", Path(driver))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert parallel.default_device() == "cpu"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warns and all("CUDA 12.8" in line for line in lines)


# --------------------------------------------------------------------------------------------------
# A pretended card
#
# A tensor on it is a wrapper around one of the CPU, which does the work. Below Python the wrapper
# is a "meta" tensor, since autograd wants a device that this PyTorch was built with.

CARD = torch.device("cuda:0")
TAKE_BOTH = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_")


class Card(torch.Tensor):
    """A tensor of the pretended card. `twin` holds its values, on the CPU."""
    device = property(lambda self: CARD)
    is_cuda, is_cpu, is_meta = True, False, False
    tolist = lambda self: self.twin.tolist()

    @staticmethod
    def __new__(cls, twin):
        card = cls._make_wrapper_subclass(cls, twin.size(), twin.stride(), twin.storage_offset(),
                                          dtype=twin.dtype, device="meta")
        card.twin = twin
        return card

    @classmethod
    def __torch_dispatch__(cls, *call):
        return PretendedCard().__torch_dispatch__(*call)


def unwrap(x):
    return x.twin if isinstance(x, Card) else x


class PretendedCard(TorchDispatchMode):
    """The operator's result on the CPU, wrapped if CUDA would have it on the card.

    Raises AssertionError where CUDA would refuse to mix devices.
    """
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator.name(), kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        wraps = on_card = any(isinstance(x, Card) for x in tensors)
        device = kwargs.get("device")
        if device is not None:
            # A move to "meta" is autograd's or C++'s name for the wrapper's own device
            moves_back = device.type == "meta" and (on_card or name == "aten::_to_copy")
            wraps = device.type == "cuda" or moves_back
            kwargs = kwargs | {"device": torch.device("cpu") if wraps else device}
        if wraps and name not in TAKE_BOTH:
            mixes = on_card and any(not isinstance(x, Card) and x.dim() for x in tensors)
            assert not mixes, f"{name} mixes the card with the CPU"
            assert not kwargs.get("generator"), f"{name} draws on the card by the CPU's generator"
        if name in TAKE_BOTH[2:]:
            assert isinstance(args[0], Card) or not on_card, f"{name} of the CPU by the card's"
        result = operator(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if not wraps or name == "aten::copy_" and not isinstance(args[0], Card):
            return result
        wrap = lambda x: Card(x) if type(x) is torch.Tensor else x
        return return_and_correct_aliasing(operator, args, kwargs, tree_map(wrap, result))


class Recording(TorchDispatchMode):
    """Operators with the tensors that they took and made, as a CUDA graph has them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        self.calls.append((operator, args, kwargs or {}, result))
        return result


def replayed(step, device):
    """generation.captured for the pretended card: of Python, a replay runs nothing again."""
    assert device.type == "cuda"
    with Recording() as recording:
        hidden = step()

    def replay():
        for operator, args, kwargs, old in recording.calls:
            new = operator(*args, **kwargs)
            # A graph writes to the memory that it wrote to at first
            if isinstance(old, torch.Tensor) and not operator.is_view:
                old.copy_(new)
        return hidden
    return replay


@pytest.fixture
def card(monkeypatch):
    """Device "cuda:0", for the length of a test."""
    make, choose = torch.tensor, torch.where

    # Two functions whose C++ makes tensors past every mode
    def tensor(*args, device=None, **kwargs):
        return make(*tree_map(unwrap, args), **kwargs).to(device or "cpu")

    def where(condition, *values):
        like = next(value for value in values if isinstance(value, torch.Tensor))
        tensors = (torch.as_tensor(value, dtype=like.dtype).to(like.device) for value in values)
        return choose(condition, *tensors)
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "where", where)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    # Inference mode hands over whole functions such as `to`, not the operators that they call
    monkeypatch.setattr(torch, "inference_mode", lambda _=True: torch.no_grad())
    # Flex can't be compiled here: the plain form stands in
    monkeypatch.setattr(attention, "span_blocks", attention.span_mask)
    monkeypatch.setattr(generation, "captured", replayed)
    with PretendedCard():
        yield CARD


def test_the_card_refuses_what_cuda_refuses(card):
    x = torch.ones(3, 3, device=card)
    assert torch.equal((2 * x @ x).cpu(), torch.full((3, 3), 6.0))
    for words, mistake in (("mixes", lambda: x + torch.ones(3)),
                           ("by the card's", lambda: torch.ones(3)[x[0].long()]),
                           ("generator", lambda: x.bernoulli(generator=torch.Generator()))):
        with pytest.raises(AssertionError, match=words):
            mistake()


def test_a_run_on_the_card_is_that_on_the_cpu(mini, tmp_path, monkeypatch, card):
    for device in ("cuda:0", "cpu"):
        arguments = command(mini, tmp_path / device[:3], "--device", device, "--dtype", "float32",
                            "--batch-tokens", "160", "--steps", "2", "--select", "gradient",
                            "--recompute", sets=SETS[:1])
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        assert not train.main()
    ours, truth = (load_file(tmp_path / name / "adapter_model.safetensors")
                   for name in ("cud", "cpu"))
    # AdamW's first steps follow the sign of a gradient, also of one that is noise
    entries = torch.cat([(ours[name] - truth[name]).abs().flatten() for name in truth])
    assert (entries > 1e-4).float().mean() < 0.01


def test_a_cpu_s_generator_samples_on_the_card(gemma, card):
    prompts = [torch.arange(5, 15)] * 4
    draws = [model.generate(prompts, 6, 1.0, generator=torch.Generator().manual_seed(0))
             for model in (gemma, gemma.to(card))]
    assert torch.equal(*map(torch.stack, draws))


WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class Waits(TorchDispatchMode):
    """Counts the operators that make CUDA wait for a value; on the pretended card, tolist apart."""
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        moves = operator.name() == "aten::_to_copy" and isinstance(args[0], Card)
        self.count += moves and (kwargs or {}).get("device") == torch.device("cpu")
        self.count += operator.name() in WAITS
        return operator(*args, **kwargs or {})


def test_the_card_s_replayed_step_gives_the_cpu_s_tokens(card, monkeypatch):
    """Ragged prompts, one past the window of 16; rows that stop at once, later and never."""
    monkeypatch.setattr(generation, "CHECK_EVERY", 4)
    model = random_gemma(num_hidden_layers=2)
    draw = torch.Generator().manual_seed(0)
    for layer in add_lora(model, 4, 4.0, "orthonormal", generator=draw).values():
        torch.nn.init.normal_((layer.A if layer.writer else layer.B).data, std=0.1, generator=draw)
    prompts = [torch.arange(5, 5 + n) for n in (3, 40, 1, 12)]
    free = model.generate(prompts, 14)
    stop = {int(free[0][0]), int(free[1][6])}
    stopped = model.generate(prompts, 14, stop=stop)
    assert len(stopped[0]) == 0 and len({len(answer) for answer in stopped}) > 2

    captures, looks = [], []
    monkeypatch.setattr(generation, "captured",
                        lambda *step: captures.append(step) or replayed(*step))
    monkeypatch.setattr(Card, "tolist", lambda tensor: looks.append(1) or tensor.twin.tolist())
    model.to(card)
    with Waits() as waits:
        answers = model.generate(prompts, 14)
    assert all(map(torch.equal, answers, free))
    # After 4, 8, 12 and 14 tokens
    assert (len(looks), waits.count, len(captures)) == (4, 0, 1)
    assert all(map(torch.equal, model.generate(prompts, 14, stop=stop), stopped))
    # Rows dropped out, so the step is recorded again
    assert len(captures) > 2
    # A sharded model's step is never recorded, and what it gathered is let go
    monkeypatch.setattr(generation, "is_sharded", lambda _: True)
    monkeypatch.setattr(model, "reshard", Mock(), raising=False)
    captures.clear()
    assert all(map(torch.equal, model.generate(prompts, 2), [row[:2] for row in free]))
    assert not captures and model.reshard.called


@pytest.mark.parametrize("device, sizes", [("cpu", [3, 3, 2]), ("cuda:0", [2, 6])])
def test_a_card_s_batches_are_filled_with_tokens(device, sizes, mini, monkeypatch, request):
    """Two prompts of 40 tokens and six of 8, with answers of 4, in room for 3 of 32."""
    if device != "cpu":
        request.getfixturevalue("card")
    model, tokenizer = load_model(mini).to(device), load_tokenizer(mini)
    lengths = [8, 40, 8, 8, 40, 8, 8, 8]
    monkeypatch.setattr(evaluation, "ROOM", 32)
    monkeypatch.setattr(evaluation, "prompt_tokens", lambda _, turns, *more: [5] * lengths[turns])
    model.generate = Mock(wraps=model.generate)
    prompts = [SimpleNamespace(turns=i) for i in range(8)]
    answers = evaluation.answer(model, tokenizer, prompts, 4, batch_size=3)
    assert len({answers[1], answers[4]}) == len({*answers[2:4], *answers[5:], answers[0]}) == 1
    calls = model.generate.call_args_list
    assert [len(call.args[0]) for call in calls] == sizes
