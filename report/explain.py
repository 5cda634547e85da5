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
from dataclasses import dataclass

import torch
from tqdm import tqdm

import lora
from data import Example, Prompt, Tokenizer, make_example
from eval import answer
from model import Gemma2
from report.directions import directions_used, sae_key, span, stream_gain, update_norm
from run.files import InputError
from sae import SAE, neuronpedia_url
from saes.words import Peaks, in_context, promoted
from safety.figures import compare, refused, share
from safety.rules import verdict
from safety.sets import HARMFUL, EvalSet

NUM_PROMPTS = 64       # of each set
NUM_SINGLE = 4         # features removed one by one
NUM_MOVED = 5          # features of each layer whose activation moved most
PROMPT_TOKENS = 12     # of a prompt's end that are shown one by one
ANSWER_TOKENS = 60     # and of an answer
SHOWN = 3, 2           # features of a layer shown there: that differ in the prompt, in the answers
SIDES = "readers", "writers"


@dataclass
class Exchange:
    """A prompt of an evaluation set, as tokens with each model's answer to it."""
    set: str
    role: str
    prompt: Prompt
    base: Example
    adapter: Example
    changed: bool       # whether the verdicts on the two answers differ


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
        for name, layer in lora.lora_layers(model).items():
            rows = directions.get(sae_key(name, sae_layers))
            if rows is None:
                continue
            factor = layer.B if layer.writer else layer.A
            before.append((factor, factor.detach().clone()))
            # In the residual stream's coordinates: Z (r, D) becomes Z (1 − QQᵀ)
            gain = stream_gain(model, name) if norm_aware else 1.0
            Q = span(rows.cpu()).double()                                  # (D, k)
            Z = factor.detach().cpu().double()
            Z = (Z.T if layer.writer else Z) * gain
            Z = (Z - Z @ Q @ Q.T) / gain
            factor.copy_(Z.T if layer.writer else Z)
        yield
    finally:
        for factor, value in before:
            factor.copy_(value)


def removal(model, layers, random_rows, saes, subspaces, norm_aware, refusals) -> list[dict]:
    """explain.json's rows of "removal": single features, all named ones, and their controls.

    layers: explain.json's. refusals() -> {"safe": [bool], "over_refusal": [bool]}, one for each
    prompt, of the model as it is at the time. The strongest named features go alone and, up to
    NUM_SINGLE in all, those that the update uses most without clearly needing them.
    """
    uses, named = [], {}
    for part in layers:
        for feature in part["features"]:
            strength = part["share_of_update"] * (feature["share_left"] or feature["share"])
            uses.append((feature["named"], strength, part["layer"], feature["index"]))
            if feature["named"]:
                named.setdefault(part["layer"], {})[feature["index"]] = True
    strongest = dict.fromkeys((layer, index) for *_, layer, index in sorted(uses, reverse=True))

    def without(rows):                                  # {SAE layer: (k, D)}, on both sides
        directions = {(layer, side): rows[layer] for layer in rows for side in SIDES}
        return removed(model, directions, saes, norm_aware)

    def without_features(indices):                      # {SAE layer: features}
        return without({layer: saes[layer].unit_rows(list(units)).flatten(0, 1)
                        for layer, units in indices.items()})

    trials = [("as trained", None, None, nullcontext())]
    for layer, index in list(strongest)[:NUM_SINGLE]:
        what = f"without feature {layer}/{index}"
        trials.append((what, layer, index, without_features({layer: [index]})))
    controls = {}
    if named:
        whole = update_norm(model)
        with without_features(named):
            part = update_norm(model) / whole
        as_many = {layer: random_rows[layer][:len(units)] for layer, units in named.items()}
        controls = {
            "without all named features": without_features(named),
            "without as many random directions": without(as_many),
            f"the whole update × {part:.2f}, as small as without them": lora.scaled(model, part)}
    if subspaces:
        bases = {key: U.T for key, U in subspaces.items()}
        controls["without the subspace"] = removed(model, bases, saes, norm_aware)
    controls["base model"] = lora.scaled(model, 0)
    trials += [(what, None, None, context) for what, context in controls.items()]

    rows, trained = [], None
    for what, layer, index, context in tqdm(trials, "removing", leave=False, disable=None):
        with context:
            flags = refusals()
        # Everything is compared with the adapter as trained, the first row
        trained = trained or flags
        row = {"what": what, "layer": layer, "index": index, "named": index in named.get(layer, ()),
               "safe": None, "over_refusal": None, "change": None, "p": None}
        row |= {key: share(values) for key, values in flags.items()}
        if "safe" in flags:
            paired = compare(trained["safe"], flags["safe"])
            row |= {"change": paired["change"], "p": paired["p"]}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------
# Inside: activations with and without the adapter

class Activity:
    """What one SAE's features do in texts that base and adapter read alike, streamed.

    sums {(role, where): (4, F)}: Σb, Σa, Σ(a−b), Σ(a−b)² over the prompts' mean activations b of
    the base and a of the adapter.
    """

    def __init__(self, num_features, device):
        def zeros():
            return torch.zeros(4, num_features, dtype=torch.float64, device=device)

        self.sums, self.num_prompts = defaultdict(zeros), Counter()
        self.fired, self.num_tokens = torch.zeros(num_features, device=device), 0
        self.peaks = Peaks(num_features, device)

    def add(self, number, role, response_start, positions, base, adapter):
        """Take in text `number`: activations (T, F) of both models at token `positions` (T)."""
        decision = positions == response_start - 1
        for where, here in (("decision", decision), ("answer", positions >= response_start)):
            if here.any():
                b, a = base[here].mean(0).double(), adapter[here].mean(0).double()
                self.sums[role, where] += torch.stack((b, a, a - b, (a - b).square()))
                self.num_prompts[role, where] += 1
        self.fired += (base > 0).sum(0)
        self.num_tokens += len(positions)
        self.peaks.update(0 if role in HARMFUL else 1, number, base, positions)

    def moved(self, role, where) -> list[dict]:
        """The features whose mean moved most, largest first; errors are over prompts."""
        n = self.num_prompts[role, where]
        base, adapter, change, squares = self.sums[role, where]
        error = torch.full_like(change, torch.nan)
        if n > 1:
            error = ((squares - change * change / n).clamp(min=0) / (n - 1) / n).sqrt()
        return [{"index": i, "base": base[i].item() / n, "adapter": adapter[i].item() / n,
                 "change": change[i].item() / n, "error": error[i].item() if n > 1 else None}
                for i in change.abs().topk(min(NUM_MOVED, len(change))).indices.tolist()
                if change[i] != 0]


@torch.no_grad()
def activity(model, saes, texts, control, batch_tokens=4096) -> dict[int, Activity]:
    """{SAE layer: Activity} of texts [(role, data.Example)], read with the adapter and without it.

    Both read the *adapter's* answers, so that a difference is the adapter's and not the text's.
    Control tokens are left out, except the decision token: the prompt's last, behind which the
    first word of the answer is chosen.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    activities = {layer: Activity(saes[layer].n_units, device) for layer in layers}
    control = torch.tensor(sorted(control))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][1].tokens))
    with tqdm(total=len(order), desc="looking inside", leave=False, disable=None) as bar:
        while order:
            # Texts of like length share a batch, so that little of it is padding on the right
            longest = len(texts[order[0]][1].tokens)
            count = max(1, batch_tokens // longest)
            batch, order = order[:count], order[count:]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in zip(ids, batch):
                row[:len(texts[i][1].tokens)] = torch.tensor(texts[i][1].tokens)
            adapter, base = both_residuals(model, ids.to(device), layers)
            # Each text's own tokens, without control tokens
            for row, i in enumerate(batch):
                role, example = texts[i]
                keep = ~torch.isin(torch.tensor(example.tokens), control)
                keep[example.start - 1] = True
                positions = keep.nonzero()[:, 0].to(device)
                for layer in layers:
                    strengths = [saes[layer].strength(residual[layer][row, positions])
                                 for residual in (base, adapter)]
                    activities[layer].add(i, role, example.start, positions, *strengths)
            bar.update(len(batch))
    return activities


def both_residuals(model, ids, layers):
    """Residual streams {layer: (B, T, D)} of ids (B, T) with the adapter, and without it."""
    adapter = model.hidden(ids, capture=layers, stop_after=layers[-1])[1]
    with lora.scaled(model, 0):
        return adapter, model.hidden(ids, capture=layers, stop_after=layers[-1])[1]


@torch.no_grad()
def token_views(model, saes, tokenizer, exchange, mentioned) -> list[dict]:
    """explain.json's "tokens" of one prompt, less what the caller knows: a view of each model.

    Of each layer's features in `mentioned` {SAE layer: [features]} those few are shown whose
    activation differs most between the two at the end of the prompt, and those few others that
    differ most over each model's own answer.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    views, strengths = {}, {}
    for who, example in (("base", exchange.base), ("adapter", exchange.adapter)):
        first = max(0, example.start - PROMPT_TOKENS)
        ids = example.tokens[:example.start + ANSWER_TOKENS]
        residuals = both_residuals(model, torch.tensor([ids], device=device), layers)
        residual = residuals[0 if who == "adapter" else 1]
        strengths[who] = {layer: saes[layer].strength(residual[layer][0, first:])
                          for layer in layers}
        views[who] = {"who": who, "text": [tokenizer.token(i) for i in ids[first:]],
                      "answer_start": example.start - first, "features": []}
    start = views["base"]["answer_start"]
    for layer in layers:
        features = mentioned[layer]
        base, adapter = (strengths[who][layer][:, features] for who in ("base", "adapter"))
        # Base and adapter read the same prompt, and write different answers
        in_prompt = (adapter[:start] - base[:start]).abs().amax(0)         # (k)
        in_answer = (adapter[start:].sum(0) - base[start:].sum(0)).abs()   # (k)
        shown = []
        for difference, most in zip((in_prompt, in_answer), SHOWN):
            order = difference.argsort(descending=True).tolist()
            shown += [j for j in order if j not in shown and difference[j] > 0][:most]
        for who, view in views.items():
            view["features"] += [
                {"layer": layer, "index": features[j],
                 "activation": strengths[who][layer][:, features[j]].tolist()} for j in shown]
    return list(views.values())


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
    if not update_norm(model) > 0:
        raise InputError("the adapter changes nothing: its update is 0 everywhere")
    norm_aware = settings.norm_aware
    explanation, random_rows = directions_used(model, saes, features, subspaces, norm_aware)

    # Some prompts of each set; removal asks the harmful ones and one kind of harmless ones
    questions = []
    for name, eval_set in sets.items():
        count = min(num_prompts, len(eval_set.prompts))
        questions += [(name, eval_set.role, prompt)
                      for prompt in random.Random(0).sample(eval_set.prompts, count)]
    roles = list(dict.fromkeys(role for _, role, _ in questions))
    harmless = [role for role in ("lookalike", "benign") if role in roles][:1]
    tested = [question for question in questions if question[1] in (*HARMFUL, *harmless)]

    def answers(questions, label):
        prompts = [prompt for *_, prompt in questions]
        return answer(model, tokenizer, prompts, settings.max_new_tokens, settings.eval_batch,
                      settings.format, label)

    def refusals():
        flags = defaultdict(list)
        for (_, role, _), text in zip(tested, answers(tested, "removal")):
            flags["safe" if role in HARMFUL else "over_refusal"].append(refused(role, text))
        return flags

    explanation["removal"] = {
        "prompts": len(tested), "set": ", ".join(dict.fromkeys(name for name, *_ in tested)),
        "rows": removal(model, explanation["layers"], random_rows, saes, subspaces, norm_aware,
                        refusals)}

    # Both models' answers; a prompt may be longer than the model's context
    adapter_answers = answers(questions, "adapter")
    with lora.scaled(model, 0):
        base_answers = answers(questions, "base")
    exchanges, longest = [], model.config.max_position_embeddings
    for (name, role, prompt), *texts in zip(questions, base_answers, adapter_answers):
        base, adapter = (make_example(tokenizer, prompt.turns, text, longest, settings.format)
                         for text in texts)
        if adapter:
            changed = verdict(texts[0]) != verdict(texts[1])
            exchanges.append(Exchange(name, role, prompt, base, adapter, changed))

    # Activations where both models read the adapter's answers
    texts = [(exchange.role, exchange.adapter) for exchange in exchanges]
    activities = activity(model, saes, texts, tokenizer.control)
    explanation["inside"] = [
        {"role": role, "where": where, "prompts": activities[min(saes)].num_prompts[role, where],
         "features": [{"layer": layer} | feature for layer, seen in activities.items()
                      for feature in seen.moved(role, where)]}
        for role in roles for where in ("decision", "answer")]

    # Of each set one prompt token by token: the first whose verdict changed, if any
    places = [(part["layer"], feature["index"])
              for part in explanation["layers"] for feature in part["features"]]
    places += [(feature["layer"], feature["index"])
               for part in explanation["inside"] for feature in part["features"]]
    mentioned = {layer: sorted({index for place, index in places if place == layer})
                 for layer in saes}
    explanation["tokens"] = []
    for name in sets:
        of_set = [exchange for exchange in exchanges if exchange.set == name]
        of_set.sort(key=lambda exchange: not exchange.changed)
        for exchange in of_set[:1]:
            prompt = exchange.prompt
            about = {"set": name, "line": prompt.line, "prompt": prompt.turns[-1][1]}
            views = token_views(model, saes, tokenizer, exchange, mentioned)
            explanation["tokens"] += [about | view for view in views]
    explanation["words"] = words(model, saes, tokenizer, features, mentioned, activities, exchanges)
    return explanation


def words(model, saes, tokenizer, features, mentioned, activities, exchanges) -> dict:
    """explain.json's "words" {"layer/index": …} of `mentioned` {SAE layer: [features]}.

    Those that selection chose are described as it did; of the others, what they promote and where
    they fire most in the exchanges' texts, which `activities` have seen.
    """
    described = {}
    for feature in features:
        if feature["index"] in mentioned.get(feature["layer"], ()):
            described[f"{feature['layer']}/{feature['index']}"] = feature
    for layer, sae in saes.items():
        activity = activities[layer]
        others = [i for i in mentioned[layer] if f"{layer}/{i}" not in described]
        for i, vocabulary in zip(others, promoted(model, sae, tokenizer, others)):
            peaks = []
            for value, _, number, token in activity.peaks.of(i):
                exchange = exchanges[number]
                context = in_context(tokenizer, exchange.adapter.tokens, token)
                peaks.append({"activation": value, "side": exchange.role,
                              "line": exchange.prompt.line, **context})
            frequency = activity.fired[i].item() / max(1, activity.num_tokens)
            described[f"{layer}/{i}"] = {
                "layer": layer, "index": i, "promotes": vocabulary, "peaks": peaks,
                "frequency": {"evaluation": frequency},
                "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, i, sae.l0)}
    return described
