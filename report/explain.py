"""What an adapter learned, in SAE features.

    explanation = explain(model, saes, tokenizer, sets, settings, features, subspaces)

Which features carry what was learned (effects.py), where the update lies, and what becomes of the
answers without some of it. `features` and `subspaces` are what selection made. Without them, any
other LoRA adapter for the model is explained too.
Letters: D hidden size, F features of an SAE, T tokens, k a few.
"""

import random
from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import lora
from data import Example, Tokenizer, make_example
from eval import answer
from model import Gemma2
from report.directions import (inside, norm2, parts_of, random_mixtures, span, unit_decoder,
                               update_norm)
from report.effects import (BATCH, NUM_FEATURES, NUM_PROMPTS, carrying, named_by_effect, removed,
                            turned)
from report.heads import heads_moved
from run.files import InputError
from sae import SAE, neuronpedia_url
from saes.words import Peaks, in_context, promoted
from safety.figures import compare, refused, share
from safety.sets import HARMFUL, EvalSet

NUM_ANSWERED = 64                       # prompts of each set that are answered
NUM_SINGLE = 4                          # features removed one by one


# ------------------------------------------------------------------------------
# Where the update lies

@contextmanager
def untrained(model, first_step):
    """Within, the model carries an untrained adapter as large as its own: its first step scaled up
    where that is known, else its own with the far side turned."""
    size = update_norm(model)
    with carrying(model, first_step or turned(model, 0)):
        with lora.scaled(model, size / update_norm(model)):
            yield


def shares(model, saes, subspaces, norm_aware, first_step) -> list[dict]:
    """explain.json's "layers": how much of ‖ΔW‖² each part has, and of that the share inside the
    subspace, beside the share after the first step and in random subspaces of that size."""
    parts = parts_of(model, saes, norm_aware)
    total = sum(map(norm2, parts.values()))
    rows = []
    for (layer, side), Z in parts.items():
        row = {"layer": layer, "side": side, "share_of_update": norm2(Z) / total}
        if subspaces:
            U = subspaces[layer, side]
            # Eight draws, from the whole of the residual stream
            draws = random_mixtures(torch.eye(len(U)))[:8 * U.shape[1]].split(U.shape[1])
            chance = [inside(Z, span(rows)) for rows in draws]
            row |= {"subspace": inside(Z, U), "subspace_random": sum(chance) / len(chance)}
        rows.append(row)
    if first_step and subspaces:
        with carrying(model, first_step):
            early = parts_of(model, saes, norm_aware)
        for key, row in zip(parts, rows):
            row["subspace_first"] = inside(early[key], subspaces[key])
    return rows


# ------------------------------------------------------------------------------
# Removal: the answers without some directions of the update

def removal(model, named, saes, subspaces, norm_aware, first_step, trained, refusals) -> list[dict]:
    """explain.json's rows of "removal": single features, all named ones, and their controls.

    named: entries of explain.json's "features". refusals() -> {"safe": [bool], "over_refusal":
    [bool]}, one for each prompt, of the model as it is at the time; trained: of the model itself.
    """
    def without(directions):            # {(SAE layer, side): rows (k, D)}
        return removed(model, directions, saes, norm_aware)

    rows_of = defaultdict(list)         # {(SAE layer, side): features}
    for entry in named:
        rows_of[entry["layer"], entry["side"]].append(entry["index"])
    decoders = {layer: unit_decoder(saes[layer]) for layer, _ in rows_of}

    # Each trial: what it is, the feature that goes, and the context without it
    trials: list = []
    for entry in sorted(named, key=lambda entry: -entry["cost"]["mean"])[:NUM_SINGLE]:
        key = entry["layer"], entry["side"]
        verb = "read" if entry["side"] == "readers" else "written"
        feature = f"{entry['layer']}/{entry['index']}"
        context = without({key: decoders[key[0]][[entry["index"]]]})
        trials.append((f"without {feature} being {verb}", feature, context))
    if named:
        rows = {key: decoders[key[0]][features] for key, features in rows_of.items()}
        trials.append(("without all named features", None, without(rows)))
        # Controls: as many directions of the same subspaces
        chance = {}
        for key, features in rows_of.items():
            given = decoders[key[0]] if subspaces is None else subspaces[key].T
            chance[key] = random_mixtures(given)[:len(features)]
        trials.append(("without as many random directions", None, without(chance)))
    if subspaces:
        bases = {key: U.T for key, U in subspaces.items()}
        trials.append(("without the subspace", None, without(bases)))
    if first_step:
        trials.append(("after the first step", None, carrying(model, first_step)))
    trials.append(("base model", None, lora.scaled(model, 0)))

    def row(what, feature, flags):
        # Everything is compared with the adapter as trained
        paired = compare(trained["safe"], flags["safe"])
        return {
            "what": what,
            "feature": feature,
            "safe": share(flags["safe"]) if flags["safe"] else None,
            "over_refusal": share(flags["over_refusal"]) if flags["over_refusal"] else None,
            "change": paired["change"],
            "p": paired["p"]}

    rows = [row("as trained", None, trained)]
    for what, feature, context in tqdm(trials, "removing", leave=False, disable=None):
        # The same prompts are answered again
        with context:
            rows.append(row(what, feature, refusals()))
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
    for start in range(0, len(texts), BATCH):
        batch = texts[start:start + BATCH]
        # Pads stand on the right, so no token sees them
        ids = [torch.tensor(example.tokens) for *_, example in batch]
        tokens = pad_sequence(ids, batch_first=True).to(device)
        with lora.scaled(model, 0):
            _, residuals = model.hidden(tokens, capture=(sae.layer,), stop_after=sae.layer)
        for row, (role, _, example) in enumerate(batch):
            keep = ~torch.isin(ids[row], control)
            keep[example.start - 1] = True
            positions = keep.nonzero()[:, 0].to(device)
            strength = sae.strength(residuals[sae.layer][row, positions])   # (T, F)
            answer_kind = 0 if role in HARMFUL else 1
            peaks.update(answer_kind, start + row, strength[:, features], positions)

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
            settings, features=(), subspaces=None, first_step=None, num_answered=NUM_ANSWERED,
            num_features=NUM_FEATURES) -> dict:
    """explain.json of the LoRA adapter that the model carries, whoever trained it.

    Of each harmful set and of one harmless one, `num_answered` prompts are drawn, always the same.
    settings: format, max_new_tokens, eval_batch and norm_aware (see parts_of). features (dicts with
    layer and index, as in features.json) and subspaces {(layer, side): U (D, r̂)} are as selection
    left them, first_step as in named_by_effect. Raises InputError for an update of 0.
    """
    if not parts_of(model, saes):
        raise InputError("the adapter changes nothing: its update is 0 everywhere")

    # Lookalikes differ from harmful prompts in their harm alone
    roles = {eval_set.role for eval_set in sets.values()}
    harmless = "lookalike" if "lookalike" in roles else "benign"
    questions = []                      # [(role, prompt)]
    for eval_set in sets.values():
        if eval_set.role in (*HARMFUL, harmless):
            count = min(num_answered, len(eval_set.prompts))
            drawn = random.Random(0).sample(eval_set.prompts, count)
            questions += [(eval_set.role, prompt) for prompt in drawn]

    def answers():
        prompts = [prompt for _, prompt in questions]
        return answer(model, tokenizer, prompts, settings.max_new_tokens, settings.eval_batch,
                      settings.format, "answers")

    def refusals(replies):
        flags = {"safe": [], "over_refusal": []}
        for (role, _), text in zip(questions, replies):
            key = "safe" if role in HARMFUL else "over_refusal"
            flags[key].append(refused(text))
        return flags

    # The adapter's own answers, and aligned ones where the prompts' files have them
    replies = answers()
    longest = model.config.max_position_embeddings
    texts = []
    aligned: dict[str, list[Example]] = defaultdict(list)       # {role: examples}
    for (role, prompt), text in zip(questions, replies):
        example = make_example(tokenizer, prompt.turns, text, longest, settings.format)
        # A prompt may be longer than the model's context
        if example is None:
            continue
        texts.append((role, prompt.line, example))
        if role in HARMFUL:
            wanted = make_example(tokenizer, prompt.turns, prompt.aligned or text, longest,
                                  settings.format)
            aligned[role] += [wanted] if wanted else []
    examples = [example for role in aligned for example in aligned[role][:NUM_PROMPTS]]
    if not examples:
        raise InputError("no harmful prompt to ask: give --set harmful=FILE")
    examples.sort(key=lambda example: len(example.tokens))      # little is padded
    found = named_by_effect(model, examples, saes, subspaces, settings.norm_aware, first_step,
                            num_features)
    found["learned"]["answers"] = ("the file's" if all(prompt.aligned for role, prompt in questions
                                   if role in HARMFUL) else "the adapter's own")
    named = [entry for entry in found["features"] if entry["named"]]
    control = partial(untrained, model, first_step)
    for entry, direction in zip(found["features"], found.pop("directions")):
        if entry["named"]:
            entry["heads"] = heads_moved(model, entry, direction, examples, tokenizer, saes,
                                         settings.norm_aware, control)

    # Features that selection chose are described as it did, the others by the adapter's answers
    chosen = {(feature["layer"], feature["index"]): feature for feature in features}
    words = {}
    others = defaultdict(set)           # {SAE layer: features}
    for entry in named:
        place = entry["layer"], entry["index"]
        if place in chosen:
            words[f"{place[0]}/{place[1]}"] = chosen[place]
        else:
            others[place[0]].add(place[1])
    for layer, indices in others.items():
        words |= describe(model, saes[layer], tokenizer, sorted(indices), texts)
    return found | {
        "layers": shares(model, saes, subspaces, settings.norm_aware, first_step),
        "removal": removal(model, named, saes, subspaces, settings.norm_aware, first_step,
                           refusals(replies), lambda: refusals(answers())),
        "words": words}
