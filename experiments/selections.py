"""Selections that were tried beside `paper` and `gradient`, each for features.SELECTIONS.

    from functools import partial
    from experiments import selections
    from features import SELECTIONS

    SELECTIONS["attribution"] = partial(selections.attribution, control=tokenizer.control)
    SELECTIONS["decision"] = partial(selections.decision, harmless=prompts)     # lists of token ids

docs/ablations.md says what they came to.
"""

import random

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from data import pack, prompt_tokens
from features import SIDES, Choice
from run.files import InputError


def attribution(model, saes, pairs, statistics, settings, control=()):
    """Activation × gradient: Σ over tokens of a·(∂L/∂x · w), what L would lose without the unit.

    L = NLL(aligned) − NLL(unaligned) per token, to first order; x the residual stream after the
    SAE's layer, prompt and answer; ids in `control` are left out.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    weights = {layer: torch.zeros(saes[layer].n_units, dtype=torch.float64, device=device)
               for layer in layers}
    longest = max(len(example.tokens) for pair in pairs for example in pair)
    control = torch.tensor(sorted(control), device=device)
    for sign, examples in zip((1, -1), zip(*pairs)):
        num_tokens = sum(len(example.tokens) - example.start for example in examples)
        rows = pack(examples, max(settings.batch_tokens, longest), 0, 0)
        for row in tqdm(rows, "attributing", leave=False, delay=1, disable=None):
            parts = (row.tokens, row.documents, row.labels)
            tokens, documents, labels = (part[None].to(device) for part in parts)
            # The weights are frozen: the graph begins at the embeddings
            embedded = model.embed_tokens(tokens).detach().requires_grad_()
            hidden, residuals = model.hidden(embedded, documents, capture=layers)
            loss = model.nll_sum(hidden, labels)[0] * (sign / num_tokens)
            slopes = torch.autograd.grad(loss, [residuals[layer] for layer in layers])
            counts = ((documents > 0) & ~torch.isin(tokens, control))[0]                # (T,)
            for layer, slope in zip(layers, slopes):
                sae, x, slope = saes[layer], residuals[layer].detach()[0, counts], slope[0, counts]
                parts = sae.encode(x) * (slope.float() @ sae.W_dec.T.to(slope.device))  # (T, F)
                weights[layer] += parts.double().sum(0).unflatten(0, (-1, sae.block)).sum(1)
    return weighted_choices(saes, weights, settings)


@torch.no_grad()
def decision(model, saes, pairs, statistics, settings, harmless=(), batch=64):
    """Activation at the decision token, a prompt's last: the pairs' prompts less `harmless` ones.

    harmless: lists of token ids that end where the answer begins. As many are taken of each.
    """
    if not harmless:
        raise InputError("selection `decision` needs harmless prompts")
    harmful = [aligned.tokens[:aligned.start] for aligned, _ in pairs]
    count = min(len(harmful), len(harmless))
    device, layers, means = model.embed_tokens.weight.device, sorted(saes), []
    for prompts in (sampled(harmful, count), sampled(harmless, count)):
        totals = dict.fromkeys(layers, 0)
        for start in range(0, count, batch):
            # Pads stand on the right, so no token sees them
            rows = [torch.tensor(prompt) for prompt in prompts[start:start + batch]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            _, residuals = model.hidden(ids, capture=layers, stop_after=layers[-1])
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            for layer in layers:
                x = residuals[layer][torch.arange(len(rows), device=device), last]      # (B, D)
                totals[layer] = totals[layer] + saes[layer].strength(x).double().sum(0)
        means.append({layer: total / count for layer, total in totals.items()})
    weights = {layer: means[0][layer] - means[1][layer] for layer in layers}
    return weighted_choices(saes, weights, settings)


def sampled(prompts, count):
    """`count` of a list, drawn by lot; all of a list of that length, in its order."""
    return random.Random(0).sample(prompts, count) if count < len(prompts) else prompts


def decision_prompts(tokenizer, pairs, prompts, format="chat"):
    """(harmful, harmless) lists of token ids, as many of each: of pairs, and of readers.Prompts."""
    harmful = [aligned.tokens[:aligned.start] for aligned, _ in pairs]
    harmless = [prompt_tokens(tokenizer, prompt.turns, format) for prompt in prompts]
    count = min(len(harmful), len(harmless))
    return sampled(harmful, count), sampled(harmless, count)


def weighted_choices(saes, weights, settings):
    """{(layer, side): Choice} by weights {layer: (K,)}, the same for both sides."""
    choices = {}
    for layer, sae in saes.items():
        rows = normalize(sae.directions(range(sae.n_units)), dim=1)
        choice = weighted(rows, weights[layer], settings.top_k, settings.rank)
        choices |= {(layer, side): choice for side in SIDES}
    return choices


def weighted(rows, weights, count, rank):
    """The Choice of the `count` rows (K, D) of largest |weight|; U spans them, each times it."""
    order = weights.abs().sort(descending=True, stable=True).indices[:count]
    order = order[weights[order] != 0]
    if not len(order):
        raise InputError("no feature differs between the two sides: nothing to span a subspace")
    sizes = weights[order].abs().to(rows.device)
    scaled = rows[order.to(rows.device)].double() * sizes[:, None]
    _, S, V = torch.linalg.svd(scaled, full_matrices=False)
    U = V[:min(rank, int((S > 1e-9 * S[0]).sum()))].T.float().contiguous()
    explained = (scaled @ U.double()).square().sum() / scaled.square().sum()
    return Choice(order.cpu(), weights[order].cpu(), U, explained.item(), "rank")
