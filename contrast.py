"""Selection by what moves the loss: which decoder directions an adapter would gain most from, were they in its basis.

    gradients = contrast_gradients(model, pairs)                 # {module: ∂L/∂W}, L = NLL(aligned | prompt) − NLL(unaligned | prompt)
    moment = gram(gradients[name] for name in modules)           # GᵀG (D, D) of the modules that an SAE serves
    choice = greedy(sae.decoder_rows(...), moment, 32, 16)       # features, their scores, a basis U (D, r)

The safe and the unsafe answer share their prompt, so their activations are equal up to the first token of the answer, and a
difference of activations is zero exactly where the decision falls. Their gradients differ there. With G = [∂L/∂W_q; ∂L/∂W_k; ∂L/∂W_v]
of readers, (∂L/∂W_o)ᵀ of writers, n × D, ‖G·w‖² is how fast L falls for a unit of what an adapter can write or read along w: a
factor that begins at the basis U gives the other one the gradient G·U.

`features.py` says which modules go together and gives the result names. Letters: D hidden size, F features, k chosen ones, r rank.
"""

import os
import random
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from run import parallel
from data import Example, Tokenizer, pack, prompt_tokens
from data import Prompt
from run.files import InputError
from lora import TARGETS
from model import Gemma2
from sae import SAE

NEW = 1e-3       # of a unit row, squared: what must lie outside the chosen ones' span for it to be chosen


# ---------------------------------------------------------------------------------------------------------------
# Gradients

def contrast_gradients(model: Gemma2, pairs: Sequence[tuple[Example, Example]], batch_tokens=2048,
                       folder: str | None = None) -> dict[str, torch.Tensor]:
    """{module name: ∂L/∂W (out, in)}, float32, of every q, k, v and o, on the model as it is.

    L = mean −log p(token) over the aligned answers less that over the unaligned ones, the turn's end included, as in training.
    pairs [(aligned Example, unaligned Example)], packed by sides into rows of at least `batch_tokens` tokens, a forward and a
    backward each. No other gradient is made, and of these one at a time: each is added to its float32 sum as the
    backward comes by. With `folder` the sums are files there, mapped and nameless, that the system writes out as it must.
    Of many processes each takes its share of rows, and all get the sum. Raises InputError for no pairs, and a sharded model.
    """
    if not pairs:
        raise InputError("no pairs: nothing to contrast")
    if parallel.is_sharded(model):
        raise InputError("--select gradient needs whole weights on each card: leave --shard out of selection")
    device = model.embed_tokens.weight.device
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(TARGETS)}
    sums = {name: _zeros(weight, folder) for name, weight in weights.items()}
    batch_tokens = max(batch_tokens, *(len(example.tokens) for pair in pairs for example in pair))
    rows = [(sign / sum(len(pair[side].tokens) - pair[side].start for pair in pairs), row) for side, sign in ((0, 1), (1, -1))
            for row in pack([pair[side] for pair in pairs], batch_tokens, 0, 0)]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    hooks = [weight.requires_grad_().register_post_accumulate_grad_hook(_into(sums[name])) for name, weight in weights.items()]
    try:
        for weight, row in tqdm(parallel.own_share(rows), "contrasting", unit="row", leave=False, delay=1, disable=None):
            tokens, documents, labels = (part[None].to(device) for part in (row.tokens, row.documents, row.labels))
            with torch.enable_grad():
                (weight * model.nll_sum(model.hidden(tokens, documents)[0], labels)[0]).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    parallel.sum_tensors(*sums.values())
    return sums


def _into(total):
    """A hook that adds a weight's gradient to `total` and lets go of it."""
    def add(weight):
        total.add_(weight.grad.to(total.device, total.dtype))
        weight.grad = None
    return add


def _zeros(like, folder):
    """Zeros of a weight's shape in float32 (float64 of a float64 model): on its device or, with a folder, in a file."""
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    if folder is None:
        return torch.zeros(like.shape, dtype=kind, device=like.device)
    with tempfile.NamedTemporaryFile(dir=folder) as file:        # the mapping outlives the name, the disk is free after it
        try:
            os.posix_fallocate(file.fileno(), 0, like.numel() * kind.itemsize)       # or a full disk were a SIGBUS in the backward
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}: the gradients of q, k, v and o don't fit there (set TMPDIR)") from None
        return torch.from_file(file.name, shared=True, size=like.numel(), dtype=kind).view(like.shape)


def fits(model: Gemma2) -> bool:
    """Whether the float32 gradients of q, k, v and o take less than half of what memory the model's device has left, in all processes."""
    weights = [module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(TARGETS)]
    if weights[0].device.type == "cuda":
        free = torch.cuda.mem_get_info(weights[0].device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return not parallel.maximum(int(4 * sum(weight.numel() for weight in weights) >= free / 2))


def gram(parts):
    """Σ GᵀG (D, D), float64, of matrices G (n, D)."""
    return sum((G.T @ G).double() for G in parts)


# ---------------------------------------------------------------------------------------------------------------
# From gradients to features and a basis

@dataclass
class Choice:
    chosen: torch.Tensor     # (k,) features, the first first
    scores: torch.Tensor     # (k,) why: shares of ‖G‖² (score, greedy), or what they were weighted by
    U: torch.Tensor          # (D, r̂) orthonormal columns, float32
    explained: float         # share of ‖G‖² along U; without gradients, of the rows' squared singular values


def candidates(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(K, D) unit directions of rows (K, b, D): a feature's decoder row; of a block of b, the direction in its span that G carries most."""
    if rows.shape[1] == 1:
        return nn.functional.normalize(rows[:, 0].float(), dim=1)
    Q = torch.linalg.svd(rows.double(), full_matrices=False).Vh                      # (K, b, D)
    within = torch.linalg.eigh(Q @ moment @ Q.mT).eigenvectors[..., -1]
    return (within[:, None] @ Q)[:, 0].float()


def energy(rows, moment):
    """(F,) ‖G·w‖² of rows w (F, D), from GᵀG, float64."""
    return ((rows @ moment.to(rows.dtype)) * rows).sum(1).double()


def score(rows: torch.Tensor, moment: torch.Tensor, count: int, rank: int) -> Choice:
    """The `count` unit rows of largest c = ‖G·w‖²; U the leading right singular vectors of those rows, each times its c."""
    c = energy(rows, moment)
    chosen = c.topk(min(count, len(rows))).indices
    U = weighted_span(rows[chosen], c[chosen], rank)
    return Choice(chosen, c[chosen] / moment.trace(), U, _share(U, moment))


def greedy(rows: torch.Tensor, moment: torch.Tensor, count: int, rank: int) -> Choice:
    """Pick `count` unit rows, each the one that takes most of what those before it leave of G: with Q their span, the argmax of

        ‖G(I − QQᵀ)w‖² / ‖(I − QQᵀ)w‖²

    U is the leading right singular vectors of GQQᵀ. Matching pursuit in the order-recursive form (Rebollo-Neira and Lowe
    2002): with q the new direction, both norms change by what a = w·q and b = (GᵀG q)·(I − QQᵀ)w say, two products a pick.
    """
    c, n = energy(rows, moment), torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    Q, chosen, scores = moment.new_zeros(len(moment), 0), [], []
    for _ in range(min(count, len(rows), len(moment))):
        ratio = torch.where(n > NEW, c / n.clamp(min=NEW), -1.0)
        ratio[chosen] = -1.0
        best = int(ratio.argmax())
        if ratio[best] <= 0:
            break
        q = rows[best].double()
        for _ in range(2):                                       # the second time takes away what rounding left
            q = nn.functional.normalize(q - Q @ (Q.T @ q), dim=0)
        v = moment @ q
        a, b = (rows @ torch.stack((q, v - Q @ (Q.T @ v)), 1).to(rows.dtype)).double().unbind(1)
        c, n = c - 2 * a * b + a * a * (q @ v), n - a * a
        Q = torch.cat((Q, q[:, None]), 1)
        chosen.append(best)
        scores.append((q @ v / moment.trace()).item())
    if not chosen:
        raise InputError("the two sides of the pairs have the same gradients: nothing to choose by")
    U = (Q @ torch.linalg.eigh(Q.T @ moment @ Q).eigenvectors.flip(1))[:, :rank].float().contiguous()
    return Choice(torch.tensor(chosen), torch.tensor(scores, dtype=torch.float64), U, _share(U, moment))


def weighted(rows: torch.Tensor, weight: torch.Tensor, count: int, rank: int) -> Choice:
    """The `count` rows of largest |weight|, and the span of them, each times its |weight|."""
    order = weight.abs().sort(descending=True, stable=True).indices[:count]
    order = order[weight[order] != 0]
    if not len(order):
        raise InputError("no feature differs between the two sides: nothing to span a subspace")
    rows, size = rows[order.to(rows.device)], weight[order].abs()
    U = weighted_span(rows, size, rank)
    scaled = rows.double() * size.to(rows.device)[:, None]
    return Choice(order.cpu(), weight[order].cpu(), U, float((scaled @ U.double()).square().sum() / scaled.square().sum()))


def weighted_span(rows, weight, rank):
    """(D, r̂) the leading right singular vectors of rows (k, D), each times its weight (k,), at most `rank`."""
    _, size, V = torch.linalg.svd(rows.double() * weight.to(rows.device, torch.float64)[:, None], full_matrices=False)
    return V[:min(rank, int((size > 1e-9 * size[0]).sum()))].T.float().contiguous()


def _share(U, moment):
    """Share of ‖G‖² along orthonormal columns U."""
    return float(((moment @ U.double()) * U.double()).sum() / moment.trace())


def rotated(U: torch.Tensor, seed: int) -> torch.Tensor:
    """U·R with a random orthogonal R: the same span. Singular vectors put most of G in few columns; AdamW steps by signs,
    so that its first step lowers the loss by about lr·‖GU‖₁, which is larger where the columns are alike."""
    R = torch.linalg.qr(torch.randn(U.shape[1], U.shape[1], generator=torch.Generator().manual_seed(seed))).Q
    return (U @ R.to(U)).contiguous()


# ---------------------------------------------------------------------------------------------------------------
# Without weights' gradients: activation × gradient, and the decision token

def attribution(model: Gemma2, saes: dict[int, SAE], pairs: Sequence[tuple[Example, Example]], control: Collection[int] = (),
                batch_tokens=2048) -> dict[int, torch.Tensor]:
    """{layer: (K,)} Σ over tokens of a·(∂L/∂x · w), float64: what L would lose, to first order, were the unit silent.

    L as in `contrast_gradients`, x the residual stream after the SAE's layer, prompt and answer; ids in `control` left out.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    total = {layer: torch.zeros(saes[layer].n_units, dtype=torch.float64, device=device) for layer in layers}
    batch_tokens = max(batch_tokens, *(len(example.tokens) for pair in pairs for example in pair))
    control = torch.tensor(sorted(control), device=device)
    for side, sign in ((0, 1), (1, -1)):
        examples = [pair[side] for pair in pairs]
        count = sum(len(example.tokens) - example.start for example in examples)
        for row in tqdm(parallel.own_share(pack(examples, batch_tokens, 0, 0)), "attributing", unit="row", leave=False, delay=1, disable=None):
            tokens, documents, labels = (part[None].to(device) for part in (row.tokens, row.documents, row.labels))
            with torch.enable_grad():                            # the weights are frozen: the graph begins at the embeddings
                hidden, residuals = model.hidden(model.embed_tokens(tokens).detach().requires_grad_(), documents, capture=layers)
                loss = model.nll_sum(hidden, labels)[0] * (sign / count)
                slopes = torch.autograd.grad(loss, [residuals[layer] for layer in layers])
            kept = ((documents > 0) & ~torch.isin(tokens, control))[0]
            for layer, slope in zip(layers, slopes):
                sae, x, g = saes[layer], residuals[layer].detach()[0, kept], slope[0, kept].float()
                part = sae.encode(x) * (g @ sae.W_dec.T.to(g))                           # (T, F)
                total[layer] += part.double().sum(0).unflatten(0, (-1, sae.block)).sum(1)
    parallel.sum_tensors(*total.values())
    return total


@torch.no_grad()
def decision(model: Gemma2, saes: dict[int, SAE], harmful: list[list[int]], harmless: list[list[int]],
             batch=64) -> dict[int, torch.Tensor]:
    """{layer: (K,)} mean activation at the decision token, the prompt's last, over harmful less harmless prompts, float64.

    Both are lists of token ids, which end where the answer begins.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    means = []
    for prompts in (harmful, harmless):
        if not prompts:
            raise InputError("--select decision contrasts harmful prompts with harmless ones, and there are none on one side")
        total = {layer: torch.zeros(saes[layer].n_units, dtype=torch.float64, device=device) for layer in layers}
        for start in range(0, len(prompts), batch):
            part = prompts[start:start + batch]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)          # pads on the right: never seen
            for row, prompt in zip(ids, part):
                row[:len(prompt)] = torch.tensor(prompt)
            _, residuals = model.hidden(ids.to(device), capture=layers, stop_after=layers[-1])
            last = torch.tensor([len(prompt) - 1 for prompt in part], device=device)
            for layer in layers:
                total[layer] += saes[layer].strength(residuals[layer][torch.arange(len(part), device=device), last]).double().sum(0)
        means.append({layer: sums / len(prompts) for layer, sums in total.items()})
    return {layer: means[0][layer] - means[1][layer] for layer in layers}


def balanced(prompts, count, seed=0):
    """At most `count` of a list, drawn by lot."""
    return random.Random(seed).sample(prompts, count) if count < len(prompts) else prompts


def decision_prompts(tokenizer: Tokenizer, pairs: Sequence[tuple[Example, Example]], prompts: Sequence[Prompt],
                     format="chat") -> tuple[list[list[int]], list[list[int]]]:
    """Token ids (harmful, harmless): the pairs' own prompts, and those of `prompts` (datafiles.Prompt), as many of each at most."""
    harmful = [example.tokens[:example.start] for example, _ in pairs]
    harmless = [prompt_tokens(tokenizer, prompt.turns, format) for prompt in prompts]
    count = min(len(harmful), len(harmless))
    return balanced(harmful, count), balanced(harmless, count)
