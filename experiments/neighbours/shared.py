"""What several neighbours need: refusals, what a module reads, updates kept frozen or projected.

Letters: r rank, in and out the widths of W, X (n, in) what a module reads at n tokens.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook

import lora
import train
from data import Example, load_examples, load_tokenizer
from run.files import InputError
from run.settings import model_folder
from safety.rules import verdict

BATCH = 16                        # examples


def refuses(tokenizer, aligned: Example, unaligned: Example | None) -> bool:
    """Whether the first answer is a refusal of what the second complies with."""
    answers = [example.tokens[example.start:] for example in (aligned, unaligned) if example]
    return [verdict(tokenizer.decode(answer)) for answer in answers] == ["full", "comply"]


def refusals(settings, tokenizer, examples) -> list[Example]:
    """The aligned answers that refuse. Raises InputError if there is none."""
    found = [pair[0] for pair in examples if refuses(tokenizer, *pair)]
    if not found:
        raise InputError(f"--data {settings.data}: no pair refuses what the other answer complies "
                         "with, and this method is built on refusals")
    return found


def harmful_only(tokenizer, examples):
    """Pairs of which only those that refuse keep their unaligned answer; the others get None."""
    return [pair if refuses(tokenizer, *pair) else (pair[0], None) for pair in examples]


def own_flag(name: str, what: str) -> str | None:
    """The value of --NAME, a flag that is taken out of the command line for train.main()."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", dest="value")
    own, sys.argv[1:] = parser.parse_known_args()
    if not own.value and not {"-h", "--help"} & set(sys.argv):
        raise InputError(f"give --{name} {what}")
    return own.value


def safety_answers(path, settings) -> tuple[list[Example], list[Example]]:
    """(refusals, harmless answers): the aligned answers of a file, told apart by our rules."""
    tokenizer = load_tokenizer(model_folder(settings.model))
    examples, _ = load_examples(path, tokenizer, settings.batch_tokens, settings.format, False)
    of_verdict: dict[str, list] = {"full": [], "comply": []}
    for aligned, _ in examples:
        answer = tokenizer.decode(aligned.tokens[aligned.start:])
        of_verdict.setdefault(verdict(answer), []).append(aligned)
    refused, harmless = of_verdict["full"], of_verdict["comply"]
    if not refused or not harmless:
        raise InputError(f"--safety {path}: {len(refused)} refusals and {len(harmless)} harmless "
                         "answers: give a file with both")
    return refused, harmless


@torch.no_grad()
def input_sums(model, examples, modules, of_input) -> dict[str, Tensor]:
    """{name: sum of of_input(X (n, in) float64)} of the modules {name: module}, X what a module
    reads at an example's tokens from its start on."""
    sums, hooks, counted = {}, [], None
    for name, module in modules.items():
        def add(_, inputs, name=name):
            sums[name] = sums.get(name, 0) + of_input(inputs[0][counted].double())
        hooks.append(module.register_forward_pre_hook(add))
    # Rows of like length, padded on the right, where no token sees it
    examples = sorted(examples, key=lambda example: len(example.tokens))
    for first in range(0, len(examples), BATCH):
        batch = examples[first:first + BATCH]
        ids = pad_sequence([torch.tensor(example.tokens) for example in batch], batch_first=True)
        place = torch.arange(ids.shape[1])
        counted = torch.stack([(place >= example.start) & (place < len(example.tokens))
                               for example in batch])                       # (B, T)
        model.hidden(ids.to(model.embed_tokens.weight.device))
    for hook in hooks:
        hook.remove()
    return sums


def input_moments(model, examples, targets, part=None) -> dict[str, Tensor]:
    """{module: XᵀX (in, in) float64}, over the tokens of the examples from their start on.

    part: a part of the model, whose modules alone are looked at.
    """
    modules = lora.linears(part or model, targets)
    return input_sums(model, examples, modules, lambda X: X.T @ X)


def freeze(model, masks: dict[str, Tensor]):
    """Keep rows, True in a mask (out, 1), or columns, in one (1, in), of weights as they are.

    masks: {module: mask}. A weight's gradient is 0 there. Of an adapter, the rows of B or columns
    of A are 0 for good, and so are those of ΔW. It must be B·A = 0 still.
    """
    for name, mask in masks.items():
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if isinstance(module, lora.LoRALinear):
            weight = module.B if mask.shape[1] == 1 else module.A
            weight.data.masked_fill_(mask, 0)
        if weight.requires_grad:
            weight.register_hook(partial(torch.Tensor.masked_fill, mask=mask, value=0))


@dataclass
class Start:
    """Where a module's adapter begins: ΔW = s·(L·B·A·R − B₀·A₀), B₀·A₀ = L·B·A·R at the first step.

    L (out, out) and R (in, in) are projectors, or None. The base weight isn't touched, so that the
    adapter's file fits the base model: −B₀ and A₀ are its second half, which is never trained.
    """
    A: Tensor                     # (r, in)
    B: Tensor                     # (out, r)
    left: Tensor | None = None
    right: Tensor | None = None

    def factors(self):
        """(A, B) of rank 2r with B·A = 0."""
        A = self.inside_A(self.A)
        B = self.inside_B(self.B)
        return torch.cat((A, A)), torch.cat((B, -B), 1)

    def inside_A(self, A):
        return A if self.right is None else A @ self.right.to(A)

    def inside_B(self, B):
        return B if self.left is None else self.left.to(B) @ B


def hold(layer: lora.LoRALinear, start: Start):
    """Gradients of A and B in L·B·A·R for the layer's first half, none for its second."""
    r = len(start.A)
    layer.A.register_hook(lambda G: torch.cat((start.inside_A(G[:r]), 0 * G[r:])))
    layer.B.register_hook(lambda G: torch.cat((start.inside_B(G[:, :r]), 0 * G[:, r:]), 1))


@torch.no_grad()
def project(layer: lora.LoRALinear, start: Start):
    """L·B and A·R of the first half: AdamW's step of a projected gradient leaves the span."""
    r = len(start.A)
    layer.A[:r] = start.inside_A(layer.A[:r])
    layer.B[:, :r] = start.inside_B(layer.B[:, :r])


def main_of_pairs(pack, prepare=None):
    """train.main() with `pack` in the place of data.pack, for the pairs of `harmful_only`.

    prepare(settings, named, folder) -> what is trained of `named`, [(name, parameter)].
    """
    fit = train.train

    def fit_pairs(settings, model, named, bases, examples, folder, *rest):
        tokenizer = load_tokenizer(model_folder(settings.model))
        pairs = harmful_only(tokenizer, examples)
        refusals(settings, tokenizer, pairs)    # raises where there is none
        named = prepare(settings, named, folder) if prepare else named
        # train() takes the first of each tuple: here that is the pair itself
        fit(settings, model, named, bases, [(pair,) for pair in pairs], folder, *rest)

    train.train, train.pack = fit_pairs, pack
    train.batches_of = partial(train.batches_of, pack=pack)
    return train.main()


def main(name, starts_of):
    """train.main() with `--init NAME`.

    starts_of(settings, model, tokenizer, examples) -> {module name: Start}.
    """
    adapt, fit = train.adapt, train.train
    starts: dict[Tensor, Start] = {}              # by the module's weight

    def init(weight, *_):
        return starts[weight].factors()

    def adapt_from_starts(settings, model, saes, tokenizer, examples, *rest):
        if settings.init != name:
            raise InputError(f"--init {settings.init}: give --init {name}")
        modules = lora.linears(model, settings.targets)
        named = starts_of(settings, model, tokenizer, examples)
        starts.update({modules[module].weight: start for module, start in named.items()})
        return adapt(settings, model, saes, tokenizer, examples, *rest)

    def fit_projected(settings, model, *rest):
        layers = lora.lora_layers(model).values()
        for layer in layers:
            hold(layer, starts[layer.base.weight])

        def after_step(*_):
            for layer in layers:
                project(layer, starts[layer.base.weight])

        handle = register_optimizer_step_post_hook(after_step)
        try:
            fit(settings, model, *rest)
        finally:
            handle.remove()

    lora.INITS[name] = init
    train.adapt, train.train = adapt_from_starts, fit_projected
    return train.main()
