"""What an adapter has learned, in SAE features: which of them its update is made of, what becomes of its answers without
them, and which fire differently for it.

    found = explain(model, saes, tokenizer, sets, features, spaces)     # of the LoRA adapter that the model carries

`features` and `spaces` are what selection made; without them, any other LoRA adapter for the model is explained too.
Letters: D hidden size, F features of an SAE, T tokens, k a few.
"""

import random
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext

import torch
from tqdm import tqdm

import lora
from data import Tokenizer, make_example
from report.directions import norm, shares, span
from features import Peaks, in_context, norm_gain, promoted, serving_layer, space_of
from eval import answer
from safety.figures import compare, refused, share
from safety.sets import HARMFUL
from run.files import InputError
from model import Gemma2
from safety.rules import verdict
from sae import SAE, neuronpedia_url
from safety.sets import EvalSet

SINGLE = 4             # features removed one by one
MOVED = 5              # features of each layer whose activation moved most
TAIL, LONGEST = 12, 60 # tokens of a prompt's end and of its answer that are shown one by one
SHOWN = 3, 2           # features of each layer shown there: that differ in the prompt, and in the answers


# ---------------------------------------------------------------------------------------------------------------
# Removal

@contextmanager
@torch.no_grad()
def removed(model, directions, layers, norm_aware=False):
    """Within, no update reads or writes the span of the rows {SAE layer: (k, D)}; afterwards the factors are what they were,
    bit for bit. `layers` are those of all SAEs, of which each module has its nearest."""
    kept = []
    try:
        for name, layer in lora.lora_layers(model).items():
            block = int(name.split(".")[1])
            rows = space_of(directions, serving_layer(block, layer.writer, layers), "writers" if layer.writer else "readers")
            if rows is None or not len(rows):
                continue
            factor = layer.B if layer.writer else layer.A
            gain = norm_gain(model.layers[block], layer.writer, ".mlp." in name)[0] if norm_aware else 1.0
            kept.append((factor, factor.detach().clone()))
            Q, mine = span(rows.cpu()).double(), factor.detach().cpu().double()
            mine = (mine.T if layer.writer else mine) * gain                         # (r, D), in the stream's coordinates
            mine = (mine - mine @ Q @ Q.T) / gain
            factor.copy_(mine.T if layer.writer else mine)
        yield
    finally:
        for factor, value in kept:
            factor.copy_(value)


def removal(model, found, random_rows, saes, spaces, norm_aware, ask):
    """explain.json's rows of "removal": single named features, all of them, and what they are held against.

    ask() -> {"safe": [bool], "over_refusal": [bool]}, one for each prompt, of the model as it is at the time. Alone go the
    strongest of the named features and, up to SINGLE in all, those that the update uses most without clearly needing them.
    """
    uses = [(feature["named"], layer["share_of_update"] * (feature["share_left"] or feature["share"]), layer["layer"], feature["index"])
            for layer in found["layers"] for feature in layer["features"]]
    named = {layer: list(dict.fromkeys(i for yes, _, at, i in uses if yes and at == layer)) for _, _, layer, _ in uses}
    single = list(dict.fromkeys((layer, i) for _, _, layer, i in sorted(uses, reverse=True)))[:SINGLE]

    def without(indices):
        return removed(model, {layer: saes[layer].unit_rows(some).flatten(0, 1) for layer, some in indices.items()}, saes, norm_aware)

    trials = [(f"without feature {layer}/{i}", layer, i, without({layer: [i]})) for layer, i in single]
    if any(named.values()):
        whole = norm(model)
        with without(named):
            part = norm(model) / whole
        trials += [("without all named features", None, None, without(named)),
                   ("without as many random directions", None, None,
                    removed(model, {layer: random_rows[layer][:len(some)] for layer, some in named.items()}, saes, norm_aware)),
                   (f"the whole update × {part:.2f}, as small as without them", None, None, lora.scaled(model, part))]
    if spaces:
        trials.append(("without the subspace", None, None, removed(model, {key: U.T for key, U in spaces.items()}, saes, norm_aware)))
    trials.append(("base model", None, None, lora.scaled(model, 0)))
    trained, rows = ask(), []
    for what, layer, index, changed in tqdm([("as trained", None, None, nullcontext()), *trials], "removing", leave=False, disable=None):
        with changed:
            told = ask() if rows else trained
        paired = {key: compare(trained[key], flags) for key, flags in told.items()}
        rows.append({"what": what, "layer": layer, "index": index, "named": index in named.get(layer, ()),
                     "safe": None, "over_refusal": None, "change": None, "p": None}
                    | {key: share(flags) for key, flags in told.items()}
                    | {key: paired["safe"][key] for key in ("change", "p") if "safe" in paired})
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Inside

class Activity:
    """What one SAE's features do in texts that base and adapter read alike, streamed: {(role, where): sums over prompts}."""

    def __init__(self, features, device):
        self.sums = defaultdict(lambda: torch.zeros(4, features, dtype=torch.float64, device=device))    # Σb, Σa, Σ(a−b), Σ(a−b)²
        self.prompts, self.tokens, self.fired = Counter(), 0, torch.zeros(features, device=device)
        self.peaks = Peaks(features, device)

    def add(self, number, role, start, place, base, adapter):
        """Take in text `number`, whose answer begins at token `start`: activations (T, F) at token indices `place` (T)."""
        for where, here in (("decision", place == start - 1), ("answer", place >= start)):
            if here.any():
                b, a = (activations[here].mean(0).double() for activations in (base, adapter))
                self.sums[role, where] += torch.stack((b, a, a - b, (a - b).square()))
                self.prompts[role, where] += 1
        self.fired += (base > 0).sum(0)
        self.tokens += len(place)
        self.peaks.update(0 if role in HARMFUL else 1, number, base, place)

    def moved(self, key):
        """The features whose mean moved most at `key` = (role, where), largest first."""
        n, (b, a, d, dd) = self.prompts[key], self.sums[key]
        error = ((dd - d * d / n).clamp(min=0) / (n - 1) / n).sqrt() if n > 1 else torch.full_like(d, torch.nan)
        return [{"index": i, "base": b[i].item() / n, "adapter": a[i].item() / n, "change": d[i].item() / n,
                 "error": error[i].item() if n > 1 else None} for i in d.abs().topk(min(MOVED, len(d))).indices.tolist() if d[i] != 0]


@torch.no_grad()
def activity(model, saes, texts, control, batch_tokens=4096):
    """{layer: Activity} of texts [(role, data.Example)], each read by the model with its adapter and with it switched off.

    Both read the *adapter's* answers, so that a difference is the adapter's and not the text's. Control tokens are left out
    but for the decision token, the prompt's last, behind which the first word of the answer is chosen.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    found, control = {layer: Activity(saes[layer].n_units, device) for layer in layers}, torch.tensor(sorted(control))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][1].tokens))        # long ones first, little padding
    with tqdm(total=len(order), desc="looking inside", unit="prompt", leave=False, disable=None) as bar:
        while order:
            longest = len(texts[order[0]][1].tokens)
            batch, order = order[:max(1, batch_tokens // longest)], order[max(1, batch_tokens // longest):]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)                 # pads on the right: never seen
            for row, i in zip(ids, batch):
                row[:len(texts[i][1].tokens)] = torch.tensor(texts[i][1].tokens)
            adapter, base = both(model, ids.to(device), layers)
            for row, i in enumerate(batch):
                role, example = texts[i]
                place = torch.tensor(example.tokens)
                keep = ~torch.isin(place, control)
                keep[example.start - 1] = True
                place = keep.nonzero()[:, 0].to(device)
                for layer in layers:
                    found[layer].add(i, role, example.start, place, *(saes[layer].strength(x[layer][row, place]) for x in (base, adapter)))
            bar.update(len(batch))
    return found


def both(model, ids, layers):
    """Residual streams {layer: (B, T, D)} of ids (B, T) with the adapter, and without."""
    with_adapter = model.hidden(ids, capture=layers, stop_after=layers[-1])[1]
    with lora.scaled(model, 0):
        return with_adapter, model.hidden(ids, capture=layers, stop_after=layers[-1])[1]


@torch.no_grad()
def token_view(model, saes, tokenizer, examples, wanted):
    """explain.json's "tokens" of one prompt, less what the caller knows: examples {who: Example} with each one's own answer.

    wanted {layer: [features]}: of these, of each layer those few are shown whose activation differs most between the two where
    they read the same, in the prompt's last TAIL tokens, and those few others that differ most over their answers.
    """
    device, layers, views, active = model.embed_tokens.weight.device, sorted(saes), {}, {}
    for who, example in examples.items():
        first = max(0, example.start - TAIL)
        ids = example.tokens[:example.start + LONGEST]
        x = both(model, torch.tensor([ids], device=device), layers)[who == "base"]
        views[who] = {"who": who, "text": [tokenizer.token(i) for i in ids[first:]], "answer_start": example.start - first, "features": []}
        active[who] = {layer: saes[layer].strength(x[layer][0, first:]) for layer in layers if wanted.get(layer)}
    for layer in (layer for layer in layers if wanted.get(layer)):
        base, adapter = (active[who][layer][:, wanted[layer]] for who in ("base", "adapter"))
        here = views["base"]["answer_start"]
        shown = []
        prompt, answers = (adapter[:here] - base[:here]).abs().amax(0), (adapter[here:].sum(0) - base[here:].sum(0)).abs()
        for difference, few in zip((prompt, answers), SHOWN):
            shown += [j for j in difference.argsort(descending=True).tolist() if j not in shown and difference[j] > 0][:few]
        for i in (wanted[layer][j] for j in shown):
            for who in views:
                views[who]["features"].append({"layer": layer, "index": i, "activation": active[who][layer][:, i].tolist()})
    return list(views.values())


# ---------------------------------------------------------------------------------------------------------------
# All of it

def explain(model: Gemma2, saes: dict[int, SAE], tokenizer: Tokenizer, sets: dict[str, EvalSet], features=(), spaces: dict | None = None,
            norm_aware=False, format="chat", max_new_tokens=64, batch_size=32, prompts=64) -> dict:
    """explain.json of the LoRA adapter that the model carries, whoever trained it: a dict that JSON can hold.

    saes {layer: sae}; sets {name: sets.EvalSet}, of each of which `prompts` are drawn, always the same; features (dicts with
    layer and index, as in features.json) and spaces {layer: U (D, r̂)} as selection left them, none for an adapter of another
    origin. norm_aware: see directions.shares. Of many processes all must call it, and all get the same. Raises InputError for
    an adapter whose update is 0.
    """
    if not norm(model) > 0:
        raise InputError("the adapter changes nothing: its update is 0 everywhere")
    found, random_rows = shares(model, saes, features, spaces, norm_aware)
    asked = [(name, one.role, prompt) for name, one in sets.items()
             for prompt in random.Random(0).sample(one.prompts, min(prompts, len(one.prompts)))]
    roles = [role for _, role, _ in asked]
    harmless = next((role for role in ("lookalike", "benign") if role in roles), None)
    tried = [i for i, role in enumerate(roles) if role in (*HARMFUL, harmless)]

    def answers(places, label):
        return answer(model, tokenizer, [asked[i][2] for i in places], max_new_tokens, batch_size, format, label)

    def ask():
        told = {"safe": [], "over_refusal": []}
        for i, text in zip(tried, answers(tried, "removal")):
            told["safe" if roles[i] in HARMFUL else "over_refusal"].append(refused(roles[i], text))
        return {key: flags for key, flags in told.items() if flags}

    said = {"adapter": answers(range(len(asked)), "adapter")}
    with lora.scaled(model, 0):
        said["base"] = answers(range(len(asked)), "base")
    found["removal"] = {"prompts": len(tried), "set": ", ".join(dict.fromkeys(asked[i][0] for i in tried)),
                        "rows": removal(model, found, random_rows, saes, spaces, norm_aware, ask)}

    longest = model.config.max_position_embeddings
    examples = {who: {i: example for i, ((_, _, prompt), text) in enumerate(zip(asked, texts))
                      if (example := make_example(tokenizer, prompt.turns, text, longest, format))} for who, texts in said.items()}
    fitting = list(examples["base"])                            # a prompt may be longer than the model's context
    inside = activity(model, saes, [(roles[i], examples["adapter"][i]) for i in fitting], tokenizer.control)
    found["inside"] = [{"role": role, "where": where, "prompts": inside[min(saes)].prompts[role, where],
                        "features": [{"layer": layer} | feature for layer, seen in inside.items() for feature in seen.moved((role, where))]}
                       for role in dict.fromkeys(roles) for where in ("decision", "answer")]

    places = [(part["layer"], feature["index"]) for part in found["layers"] for feature in part["features"]]
    places += [(feature["layer"], feature["index"]) for part in found["inside"] for feature in part["features"]]
    mentioned = {layer: sorted({i for at, i in places if at == layer}) for layer in saes}
    found["tokens"] = []
    for name in sets:
        here = [i for i in fitting if asked[i][0] == name]
        changed = [i for i in here if verdict(said["base"][i]) != verdict(said["adapter"][i])]
        for i in (changed or here)[:1]:
            views = token_view(model, saes, tokenizer, {who: examples[who][i] for who in ("base", "adapter")}, mentioned)
            found["tokens"] += [{"set": name, "line": asked[i][2].line, "prompt": asked[i][2].turns[-1][1]} | view for view in views]
    texts = [(roles[i], asked[i][2].line, examples["adapter"][i].tokens) for i in fitting]
    found["words"] = words(model, saes, tokenizer, features, mentioned, inside, texts)
    return found


def words(model, saes, tokenizer, features, mentioned, inside, texts):
    """explain.json's "words" of the features `mentioned` {layer: [indices]}: as selection describes those that it chose; of the
    others what they promote, and where they fire most in `texts` [(role, line, token ids)], which `inside` has seen."""
    chosen = {(feature["layer"], feature["index"]): feature for feature in features}
    out = {f"{layer}/{i}": chosen[layer, i] for layer, i in chosen if i in mentioned.get(layer, ())}
    for layer, sae in saes.items():
        seen, others = inside[layer], [i for i in mentioned[layer] if (layer, i) not in chosen]
        for i, vocabulary in zip(others, promoted(model, sae, tokenizer, others)):
            peaks = [{"activation": value, "side": role, "line": line, **in_context(tokenizer, ids, token)}
                     for value, _, number, token in seen.peaks.of(i) for role, line, ids in (texts[number],)]
            out[f"{layer}/{i}"] = {"layer": layer, "index": i, "promotes": vocabulary, "peaks": peaks,
                                   "frequency": {"evaluation": seen.fired[i].item() / max(1, seen.tokens)},
                                   "neuronpedia": neuronpedia_url(sae.source, sae.layer, sae.width, i, sae.l0)}
    return out
