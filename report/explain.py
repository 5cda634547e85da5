"""What an adapter learned, in SAE features.

    explanation = explain(model, saes, tokenizer, sets, settings, features, subspaces)

Which features its update is made of (directions.py), what becomes of the answers without them, and
which features fire differently for it. `features` and `subspaces` are what selection made. Without
them, any other LoRA adapter for the model is explained too.
Letters: D hidden size, F features of an SAE, B texts, T tokens, k a few.
"""

import random
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext

import torch
from tqdm import tqdm

import lora
from data import Tokenizer, make_example
from eval import answer
from model import Gemma2
from report.directions import (SIDES, directions_used, random_directions, sae_key, span,
                               stream_gain, unit_decoder, update_norm)
from run.files import InputError
from sae import SAE, neuronpedia_url
from saes.words import Peaks, in_context, promoted
from safety.figures import compare, refused, share
from safety.sets import HARMFUL, EvalSet

NUM_PROMPTS = 64                        # of each set
NUM_SINGLE = 4                          # features removed one by one
NUM_MOVED = 5                           # features of each layer whose activation moved most
MOVED_ROLES = "harmful", "lookalike"    # prompts that differ in their harm alone


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
            factor = layer.B if layer.writer else layer.A
            before.append((factor, factor.detach().clone()))
            # In the residual stream's coordinates: Z (r, D) becomes Z (1 − QQᵀ)
            gain = stream_gain(model, name, norm_aware)
            Q = span(rows.cpu()).double()                                  # (D, k)
            Z = factor.detach().cpu().double()
            Z = (Z.T if layer.writer else Z) * gain
            Z = (Z - Z @ Q @ Q.T) / gain
            factor.copy_(Z.T if layer.writer else Z)
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

    def without_features(indices):      # {SAE layer: features}
        rows = {}
        for layer, units in indices.items():
            # All rows of a unit, of which a block has several
            rows[layer] = saes[layer].unit_rows(units).flatten(0, 1)
        return without(rows)

    # Each trial: what it is, the feature that goes, and the context without it
    trials: list = [("as trained", None, nullcontext())]
    for layer, index in strongest[:NUM_SINGLE]:
        context = without_features({layer: [index]})
        trials.append((f"without feature {layer}/{index}", f"{layer}/{index}", context))
    if named:
        trials.append(("without all named features", None, without_features(named)))
        # Controls: as many directions that mean nothing, and an update that is as small
        random_rows = {}
        for layer, units in named.items():
            directions = random_directions(unit_decoder(saes[layer]))
            random_rows[layer] = directions[:len(units)].clone()
        trials.append(("without as many random directions", None, without(random_rows)))
        whole = update_norm(model)
        with without_features(named):
            part = update_norm(model) / whole
        what = f"the whole update × {part:.2f}, as small as without them"
        trials.append((what, None, lora.scaled(model, part)))
    if subspaces:
        bases = {key: U.T for key, U in subspaces.items()}
        trials.append(("without the subspace", None, removed(model, bases, saes, norm_aware)))
    trials.append(("base model", None, lora.scaled(model, 0)))

    rows, trained = [], None
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
# Inside: activations with and without the adapter

class Activity:
    """What one SAE's features do in texts that base and adapter read alike, streamed.

    sums {role: (4, F)}: Σb, Σa, Σ(a−b), Σ(a−b)² over the prompts' activations at the token before
    the answer, b of the base and a of the adapter.
    """

    def __init__(self, num_features, device):
        zeros = torch.zeros(4, num_features, dtype=torch.float64, device=device)
        self.sums = {role: zeros.clone() for role in MOVED_ROLES}
        self.peaks = Peaks(num_features, device)

    def add(self, number, role, positions, decision, base, adapter):
        """Take in text `number`: activations (T, F) of both models at token `positions` (T).

        decision (T): true for the token before the answer.
        """
        if role in MOVED_ROLES:
            b = base[decision][0].double()
            a = adapter[decision][0].double()
            change = a - b
            self.sums[role] += torch.stack((b, a, change, change.square()))
        self.peaks.update(0 if role in HARMFUL else 1, number, base, positions)

    def moved(self, role, n) -> list[dict]:
        """The features whose mean over n prompts moved most, largest first, with its error."""
        base, adapter, change, squares = self.sums[role]
        variance = (squares - change * change / n).clamp(min=0) / max(1, n - 1)
        error = (variance / n).sqrt()
        features = []
        count = min(NUM_MOVED, len(change))
        largest = change.abs().topk(count).indices
        for i in largest.tolist():
            features.append({
                "index": i,
                "base": base[i].item() / n,
                "adapter": adapter[i].item() / n,
                "change": change[i].item() / n,
                "error": error[i].item()})
        return features


@torch.no_grad()
def activity(model, saes, texts, control, batch_tokens=4096) -> dict[int, Activity]:
    """{SAE layer: Activity} of texts [(role, data.Example)], read with the adapter and without it.

    Both read the *adapter's* answers, so that a difference is the adapter's and not the text's.
    Control tokens are left out, except the decision token: the prompt's last, behind which the
    first word of the answer is chosen.
    """
    device = model.embed_tokens.weight.device
    layers = sorted(saes)
    activities = {layer: Activity(saes[layer].n_units, device) for layer in layers}
    control = torch.tensor(sorted(control))
    # Texts of like length share a batch, so that little of it is padding on the right
    lengths = [len(example.tokens) for _, example in texts]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), desc="looking inside", leave=False, disable=None) as bar:
        while order:
            longest = lengths[order[0]]
            count = max(1, batch_tokens // longest)
            batch = order[:count]
            order = order[count:]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in zip(ids, batch):
                tokens = texts[i][1].tokens
                row[:len(tokens)] = torch.tensor(tokens)

            # Residual streams {layer: (B, T, D)}
            ids = ids.to(device)
            _, adapter = model.hidden(ids, capture=layers, stop_after=layers[-1])
            with lora.scaled(model, 0):
                _, base = model.hidden(ids, capture=layers, stop_after=layers[-1])

            # Each text's own tokens, without control tokens
            for row, i in enumerate(batch):
                role, example = texts[i]
                keep = ~torch.isin(torch.tensor(example.tokens), control)
                keep[example.start - 1] = True
                positions = keep.nonzero()[:, 0].to(device)
                decision = positions == example.start - 1
                for layer in layers:
                    strengths = [saes[layer].strength(residual[layer][row, positions])
                                 for residual in (base, adapter)]
                    activities[layer].add(i, role, positions, decision, *strengths)
            bar.update(len(batch))
    return activities


# ------------------------------------------------------------------------------
# All of it

def explain(model: Gemma2, saes: dict[int, SAE], tokenizer: Tokenizer, sets: dict[str, EvalSet],
            settings, features=(), subspaces=None, num_prompts=NUM_PROMPTS) -> dict:
    """explain.json of the LoRA adapter that the model carries, whoever trained it.

    Of each set, `num_prompts` are drawn, always the same. settings: format, max_new_tokens,
    eval_batch and norm_aware (see directions_used). features (dicts with layer and index, as in
    features.json) and subspaces {(layer, side): U (D, r̂)} are as selection left them. Raises
    InputError for an adapter whose update is 0.
    """
    layers = directions_used(model, saes, subspaces, settings.norm_aware)
    if not layers:
        raise InputError("the adapter changes nothing: its update is 0 everywhere")

    # Some prompts of each set; removal asks the harmful ones and one kind of harmless ones
    questions = []                      # [(role, prompt)]
    for eval_set in sets.values():
        count = min(num_prompts, len(eval_set.prompts))
        drawn = random.Random(0).sample(eval_set.prompts, count)
        questions += [(eval_set.role, prompt) for prompt in drawn]
    roles = {role for role, _ in questions}
    harmless = "lookalike" if "lookalike" in roles else "benign"
    tested = [question for question in questions if question[0] in (*HARMFUL, harmless)]

    def answers(questions, label):
        prompts = [prompt for _, prompt in questions]
        return answer(model, tokenizer, prompts, settings.max_new_tokens, settings.eval_batch,
                      settings.format, label)

    def refusals():
        flags = {"safe": [], "over_refusal": []}
        for (role, _), text in zip(tested, answers(tested, "removal")):
            key = "safe" if role in HARMFUL else "over_refusal"
            flags[key].append(refused(role, text))
        return flags

    # The adapter's answers as texts; a prompt may be longer than the model's context
    texts, lines = [], []
    longest = model.config.max_position_embeddings
    for (role, prompt), text in zip(questions, answers(questions, "adapter")):
        example = make_example(tokenizer, prompt.turns, text, longest, settings.format)
        if example:
            texts.append((role, example))
            lines.append(prompt.line)

    # Activations where both models read the adapter's answers
    activities = activity(model, saes, texts, tokenizer.control)
    num_texts = Counter(role for role, _ in texts)
    mentioned = defaultdict(set)        # {SAE layer: features on the page}
    for part in layers:
        mentioned[part["layer"]].update(feature["index"] for feature in part["features"])
    inside = []
    for role in MOVED_ROLES:
        if not num_texts[role]:
            continue
        moved = []
        for layer, seen in activities.items():
            for feature in seen.moved(role, num_texts[role]):
                moved.append({"layer": layer} | feature)
                mentioned[layer].add(feature["index"])
        inside.append({"role": role, "prompts": num_texts[role], "features": moved})

    # Features that selection chose are described as it did, and the others here
    words = {}
    for feature in features:
        layer, i = feature["layer"], feature["index"]
        if i in mentioned[layer]:
            words[f"{layer}/{i}"] = feature
            mentioned[layer].remove(i)
    for layer in saes:
        others = sorted(mentioned[layer])
        peaks = activities[layer].peaks
        words |= describe(model, saes[layer], tokenizer, layer, others, peaks, texts, lines)
    return {
        "layers": layers,
        "removal": removal(model, layers, saes, subspaces, settings.norm_aware, refusals),
        "inside": inside,
        "words": words}


def describe(model, sae, tokenizer, layer, features, peaks, texts, lines) -> dict:
    """explain.json's "words" {"layer/index": …}: what features promote and where they fire most.

    The `peaks` are places in the texts [(role, Example)], whose prompts stood in `lines`.
    """
    described = {}
    vocabularies = promoted(model, tokenizer, sae.directions(features))
    for i, vocabulary in zip(features, vocabularies):
        places = []
        for value, _, number, token in peaks.of(i):
            role, example = texts[number]
            place = {"activation": value, "side": role, "line": lines[number]}
            places.append(place | in_context(tokenizer, example.tokens, token))
        described[f"{layer}/{i}"] = {
            "promotes": vocabulary,
            "peaks": places,
            "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, i, sae.l0)}
    return described
