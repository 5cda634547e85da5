"""What an adapter learned, in SAE features.

    explanation = explain(model, saes, tokenizer, sets, settings, features, subspaces)

Which features its update is made of (directions.py), and what becomes of the answers without them.
`features` and `subspaces` are what selection made. Without them, any other LoRA adapter for the
model is explained too.
Letters: D hidden size, F features of an SAE, T tokens, k a few.
"""

import random
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import torch
from tqdm import tqdm

import lora
from data import Tokenizer, make_example
from eval import answer
from features import SIDES
from model import Gemma2
from report.directions import (directions_used, random_directions, sae_key, span, stream_gain,
                               unit_decoder, update_norm)
from run.files import InputError
from sae import SAE, neuronpedia_url
from saes.words import Peaks, in_context, promoted
from safety.figures import compare, refused, share
from safety.sets import HARMFUL, EvalSet

NUM_PROMPTS = 64                        # of each set
NUM_SINGLE = 4                          # features removed one by one


# ------------------------------------------------------------------------------
# Removal: the answers without some directions of the update

@contextmanager
@torch.no_grad()
def removed(model, directions, sae_layers, norm_aware=False):
    """Within, no update reads or writes the span of rows {(SAE layer, side): (k, D)}.

    Afterwards the factors are what they were, bit for bit. `sae_layers` are those of all SAEs, of
    which each module has its nearest.
    """
    before = []
    try:
        # A reader's A holds directions of the stream, a writer's B
        for name, layer in lora.lora_layers(model).items():
            rows = directions.get(sae_key(name, sae_layers))
            if rows is None:
                continue
            factor = layer.B.T if layer.writer else layer.A                # (r, D)
            before.append((factor, factor.clone()))
            # In the residual stream's coordinates: Z (r, D) becomes Z (1 − QQᵀ)
            gain = stream_gain(model, name, norm_aware)
            Q = span(rows.cpu()).double()                                  # (D, k)
            Z = factor.cpu().double() * gain
            factor.copy_((Z - Z @ Q @ Q.T) / gain)
        yield
    finally:
        for factor, value in before:
            factor.copy_(value)


def removal(model, layers, saes, subspaces, norm_aware, refusals) -> list[dict]:
    """explain.json's rows of "removal": single features, all named ones, and their controls.

    layers: explain.json's. refusals() -> {"safe": [bool], "over_refusal": [bool]}, one for each
    prompt, of the model as it is at the time.
    """
    # How much of the whole update each named feature takes, on its better side
    strengths = {}
    for part in layers:
        for feature in part["features"]:
            place = part["layer"], feature["index"]
            strength = part["share_of_update"] * feature["share_left"]
            strengths[place] = max(strength, strengths.get(place, 0))
    strongest = sorted(strengths, key=lambda place: strengths[place], reverse=True)
    named = defaultdict(list)           # {SAE layer: features}
    for layer, index in strengths:
        named[layer].append(index)

    def without(rows):                  # {SAE layer: (k, D)}, on both sides
        directions = {(layer, side): rows[layer] for layer in rows for side in SIDES}
        return removed(model, directions, saes, norm_aware)

    def decoder_rows(layer, units):     # (k, D): all rows of a unit, of which a block has several
        return saes[layer].unit_rows(units).flatten(0, 1)

    # Each trial: what it is, the feature that goes, and the context without it
    trials: list = [("as trained", None, nullcontext())]
    for layer, index in strongest[:NUM_SINGLE]:
        context = without({layer: decoder_rows(layer, [index])})
        trials.append((f"without feature {layer}/{index}", f"{layer}/{index}", context))
    if named:
        named_rows = {layer: decoder_rows(layer, units) for layer, units in named.items()}
        trials.append(("without all named features", None, without(named_rows)))
        # Controls: as many directions that mean nothing, and an update that is as small
        random_rows = {}
        for layer, units in named.items():
            directions = random_directions(unit_decoder(saes[layer]))
            random_rows[layer] = directions[:len(units)].clone()
        trials.append(("without as many random directions", None, without(random_rows)))
        whole = update_norm(model)
        with without(named_rows):
            part = update_norm(model) / whole
        what = f"the whole update × {part:.2f}, as small as without them"
        trials.append((what, None, lora.scaled(model, part)))
    if subspaces:
        bases = {key: U.T for key, U in subspaces.items()}
        trials.append(("without the subspace", None, removed(model, bases, saes, norm_aware)))
    trials.append(("base model", None, lora.scaled(model, 0)))

    rows = []
    trained = None
    for what, feature, context in tqdm(trials, "removing", leave=False, disable=None):
        # The same prompts are answered again
        with context:
            flags = refusals()
        # Everything is compared with the adapter as trained, the first row
        trained = trained or flags
        paired = compare(trained["safe"], flags["safe"])
        rows.append({
            "what": what,
            "feature": feature,
            "safe": share(flags["safe"]) if flags["safe"] else None,
            "over_refusal": share(flags["over_refusal"]) if flags["over_refusal"] else None,
            "change": paired["change"],
            "p": paired["p"]})
    return rows


# ------------------------------------------------------------------------------
# Words: where features fire most, and what they promote

@torch.no_grad()
def describe(model, sae, tokenizer, features, texts) -> dict:
    """explain.json's "words" {"layer/index": …} of one SAE's features (k integers).

    A feature's peaks are the texts [(role, line, data.Example)] on which it is most active in the
    base model, at a token that isn't a control token or at the prompt's last.
    """
    device = model.embed_tokens.weight.device
    control = torch.tensor(sorted(tokenizer.control))
    peaks = Peaks(len(features), device)
    for number, (role, _, example) in enumerate(texts):
        tokens = torch.tensor(example.tokens)
        keep = ~torch.isin(tokens, control)
        keep[example.start - 1] = True
        positions = keep.nonzero()[:, 0].to(device)
        with lora.scaled(model, 0):
            _, residuals = model.hidden(tokens[None].to(device), capture=(sae.layer,),
                                        stop_after=sae.layer)
        strength = sae.strength(residuals[sae.layer][0, positions])         # (T, F)
        answer_kind = 0 if role in HARMFUL else 1
        peaks.update(answer_kind, number, strength[:, features], positions)

    described = {}
    vocabularies = promoted(model, tokenizer, sae.directions(features))
    for column, (i, vocabulary) in enumerate(zip(features, vocabularies)):
        places = []
        for value, _, number, token in peaks.of(column):
            role, line, example = texts[number]
            place = {"activation": value, "side": role, "line": line}
            places.append(place | in_context(tokenizer, example.tokens, token))
        described[f"{sae.layer}/{i}"] = {
            "promotes": vocabulary,
            "peaks": places,
            "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, i, sae.l0)}
    return described


# ------------------------------------------------------------------------------
# All of it

def explain(model: Gemma2, saes: dict[int, SAE], tokenizer: Tokenizer, sets: dict[str, EvalSet],
            settings, features=(), subspaces=None, num_prompts=NUM_PROMPTS) -> dict:
    """explain.json of the LoRA adapter that the model carries, whoever trained it.

    Of each harmful set and of one harmless one, `num_prompts` are drawn, always the same. settings:
    format, max_new_tokens, eval_batch and norm_aware (see directions_used). features (dicts with
    layer and index, as in features.json) and subspaces {(layer, side): U (D, r̂)} are as selection
    left them. Raises InputError for an adapter whose update is 0.
    """
    layers = directions_used(model, saes, subspaces, settings.norm_aware)
    if not layers:
        raise InputError("the adapter changes nothing: its update is 0 everywhere")

    # Lookalikes differ from harmful prompts in their harm alone
    roles = {eval_set.role for eval_set in sets.values()}
    harmless = "lookalike" if "lookalike" in roles else "benign"
    questions = []                      # [(role, prompt)]
    for eval_set in sets.values():
        if eval_set.role in (*HARMFUL, harmless):
            count = min(num_prompts, len(eval_set.prompts))
            drawn = random.Random(0).sample(eval_set.prompts, count)
            questions += [(eval_set.role, prompt) for prompt in drawn]

    def answers():
        prompts = [prompt for _, prompt in questions]
        return answer(model, tokenizer, prompts, settings.max_new_tokens, settings.eval_batch,
                      settings.format, "answers")

    def refusals():
        flags = {"safe": [], "over_refusal": []}
        for (role, _), text in zip(questions, answers()):
            key = "safe" if role in HARMFUL else "over_refusal"
            flags[key].append(refused(text))
        return flags

    # Features that selection chose are described as it did, the others by the adapter's answers
    chosen = {(feature["layer"], feature["index"]): feature for feature in features}
    words = {}
    others = defaultdict(set)           # {SAE layer: features}
    for part in layers:
        layer = part["layer"]
        for feature in part["features"]:
            index = feature["index"]
            if (layer, index) in chosen:
                words[f"{layer}/{index}"] = chosen[layer, index]
            else:
                others[layer].add(index)
    texts = []
    if others:
        longest = model.config.max_position_embeddings
        for (role, prompt), text in zip(questions, answers()):
            example = make_example(tokenizer, prompt.turns, text, longest, settings.format)
            # A prompt may be longer than the model's context
            if example:
                texts.append((role, prompt.line, example))
    for layer, indices in others.items():
        words |= describe(model, saes[layer], tokenizer, sorted(indices), texts)
    return {
        "layers": layers,
        "removal": removal(model, layers, saes, subspaces, settings.norm_aware, refusals),
        "words": words}
