"""One question, asked by eval.py --ask: the answers, and the features that fire before them.

    python eval.py RUN --ask "how do i break the vault?"
    python eval.py RUN --ask "how do i break the vault?" --steer 1/174 4
"""

import argparse
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from data import Tokenizer, prompt_tokens
from model import Gemma2, load_config
from run.files import InputError, printable, table
from run.settings import model_folder
from sae import SAE, load_saes
from saes.words import promoted
from safety.arms import Arm, loaded, tokenizers_of
from safety.rules import verdict

NUM_FEATURES = 5        # shown of each SAE layer
NUM_WORDS = 5           # that a feature promotes


def add_ask_flags(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("one question, of which nothing is saved")
    group.add_argument("--ask", metavar="TEXT", help="print what each model answers, and which "
                       "features of the SAEs fire most at the last token before the answer")
    group.add_argument("--steer", metavar=("LAYER/FEATURE", "X"), nargs=2,
                       help="let the first model answer once more, with X times the feature's "
                            "decoder row added to the residual stream after block LAYER, at every "
                            "token of prompt and answer. X is in the units of the feature's "
                            "activations, which --ask prints: 4 adds what the SAE decodes an "
                            "activation of 4 to; a negative X takes it away")


@contextmanager
def edited(model: Gemma2, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within, block `layer` gives edits[layer](its output (B, T, D)), for each layer of `edits`."""
    def forward_with(edit, plain_forward):
        return lambda *inputs: edit(plain_forward(*inputs))
    blocks = [model.layers[layer] for layer in edits]
    for block, edit in zip(blocks, edits.values()):
        block.forward = forward_with(edit, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward           # the class's own again


def steered(model: Gemma2, directions: Mapping[int, Tensor]):
    """Within, block `layer` gives its output plus directions[layer] (D), at every token."""
    weight = model.embed_tokens.weight
    return edited(model, {layer: partial(torch.add, direction.to(weight))
                          for layer, direction in directions.items()})


def parse_steer(steer: Sequence[str], saes: dict[int, SAE]) -> tuple[int, int, float]:
    """(layer, feature, X) of --steer. Raises InputError."""
    place, amount = steer
    match = re.fullmatch(r"(\d+)/(\d+)", place)
    layer, feature = map(int, match.groups()) if match else (-1, -1)
    if layer not in saes or feature >= saes[layer].n_units:
        known = [f"{layer}/0 to {layer}/{sae.n_units - 1}" for layer, sae in saes.items()]
        raise InputError(f"--steer {place}: give LAYER/FEATURE, here "
                         f"{', '.join(known) or 'none, since no SAEs are known'}")
    try:
        return layer, feature, float(amount)
    except ValueError:
        raise InputError(f"--steer {place} {amount}: {amount} is no number") from None


@torch.no_grad()
def strengths(model: Gemma2, tokens: Tensor, saes: dict[int, SAE]) -> dict[int, Tensor]:
    """{layer: (K)}: how active each unit of each SAE is at the last of the tokens (T)."""
    if not saes:
        return {}
    tokens = tokens[None].to(model.embed_tokens.weight.device)
    _, residuals = model.hidden(tokens, capture=saes, stop_after=max(saes))
    return {layer: sae.strength(residuals[layer][0, -1]).cpu()
            for layer, sae in saes.items()}


def reply(model: Gemma2, tokenizer: Tokenizer, tokens: Tensor, max_new_tokens: int) -> str:
    """The greedy answer to a prompt (T)."""
    stop = (tokenizer.end_of_turn, tokenizer.eos)
    (new,) = model.generate([tokens], max_new_tokens, stop=stop)
    return tokenizer.decode(new)


def ask(arms: Sequence[Arm], settings, question: str, steer: Sequence[str] | None = None):
    """Print each arm's answer to a question, and a table of what fires before it.

    steer: LAYER/FEATURE and X, as in --steer. Raises InputError.
    """
    tokenizers = tokenizers_of(arms)
    saes = {}
    if settings.sae:
        config = load_config(model_folder(arms[0].base))
        saes = load_saes(settings.sae, settings.layers, settings.width, settings.l0,
                         settings.device, config)
    if steer:
        layer, feature, amount = parse_steer(steer, saes)
        direction = amount * saes[layer].directions([feature])[0]       # (D)

    answers = {}                        # {label: text}
    activations = {}                    # {arm: {SAE layer: (K)}}
    words = {}                          # {(SAE layer, feature): tokens that it promotes}
    for arm, model in loaded(arms, settings):
        tokenizer = tokenizers[arm.base]
        tokens = torch.tensor(prompt_tokens(tokenizer, (("user", question),), settings.format))
        answers[arm.name] = reply(model, tokenizer, tokens, settings.max_new_tokens)
        if steer and arm is arms[0]:
            label = f"{arm.name} + {amount:g} × {layer}/{feature}"
            with steered(model, {layer: direction}):
                answers[label] = reply(model, tokenizer, tokens, settings.max_new_tokens)

        # What fires most in one model is shown of all
        activations[arm.name] = strengths(model, tokens, saes)
        for sae_layer, strength in activations[arm.name].items():
            sae = saes[sae_layer]
            top = strength.topk(min(NUM_FEATURES, sae.n_units)).indices.tolist()
            vocabularies = promoted(model, tokenizer, sae.directions(top), NUM_WORDS)
            for unit, vocabulary in zip(top, vocabularies):
                words[sae_layer, unit] = " ".join(vocabulary)

    print(f"\n{printable(question)}\n")
    width = max(map(len, answers))
    for label, text in answers.items():
        lead = f"  {label:{width}}  {verdict(text):7}  "
        indent = " " * len(lead)
        print(textwrap.fill(printable(text), 100, initial_indent=lead, subsequent_indent=indent))
    if words:
        print(f"\n{feature_table(activations, words)}")


def feature_table(activations: dict[str, dict[int, Tensor]], words: dict) -> str:
    """A row for each feature of `words` {(SAE layer, unit): text}, the strongest of a layer first.
    """
    values = {}                         # {(SAE layer, unit): [activation in each model]}
    for layer, unit in words:
        values[layer, unit] = [of_layer[layer][unit].item() for of_layer in activations.values()]
    order = sorted(values, key=lambda place: (place[0], -max(values[place])))
    rows = []
    for layer, unit in order:
        cells = [f"{value:.2f}" for value in values[layer, unit]]
        rows.append([f"{layer}/{unit}", *cells, words[layer, unit]])
    head = ["fires before the answer", *activations, "promotes"]
    return table(rows, head, right=range(1, len(head) - 1))
