"""What an SAE is worth: reconstruction, loss spliced in, which units carry which concept. `python sae_train.py --evaluate DIR`.

    rows = measure(model, tokenizer, saes, items)       # one dict a layer
    found = concept_report(sae, x, labels)              # one dict a concept

Concepts are the toy world's where the model is the toy, else the first letter of a word, as in SAEBench. The AUROC of one
unit always stands beside those of random subspaces of the same dimension and of an untrained SAE, which often do as well.

Letters: n tokens, D width of the residual stream, F features, K units (features, or blocks of r).
"""

import functools
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from run import settings as recipe
from data import Tokenizer, load_tokenizer
from data import read_items
from run.files import InputError, data_file, read_json, write_json
from model import Gemma2, load_model
from sae import SAE, SASA, JumpReLU, load_sae
from saes.step import Spec, Trainer, ranks
from saes.train import encode_item
from run.files import table

BINS = 0, 1e-4, 1e-3, 1e-2, 1e-1                   # lower ends of the classes of the density histogram, above "never"


def batches(tokenizer, items, context, count, seed=0):
    """Stacked rows (tokens, documents, labels), each (B, T), of the first `count` tokens of documents."""
    examples, seen = [], 0
    for item in items:
        for ids in encode_item(tokenizer, item, context):
            examples.append(data.Example(ids, 1, True))
            seen += len(ids) - 1
        if seen >= count:
            break
    if not examples:
        raise InputError("the data hold no document to measure on")
    rows = data.pack(examples, context, seed, 0)
    size = max(1, 4096 // context)
    return [tuple(torch.stack([getattr(row, name) for row in rows[at:at + size]]) for name in ("tokens", "documents", "labels"))
            for at in range(0, len(rows), size)]


@torch.no_grad()
def measure(model: Gemma2, tokenizer: Tokenizer, saes: dict[int, SAE], rows) -> list[dict]:
    """One dict a layer of saes {layer: sae}, on the `batches`:

    "ev" 1 − Σ‖x − x̂‖²/Σ‖x − mean‖²; "l0"; "dead" share of units that no token activates; "density" (K) share of tokens
    that activate each; "ce" and "kl" {"clean", "spliced", "zero", "mean"} nats a token, KL from the clean model's;
    "ce_recovered", "kl_recovered": {"zero", "mean"}, (ablated − spliced)/(ablated − clean) against that ablation; "ranks".
    BOS and padding are left as they are, and out of every mean but the loss's, which sees all that is predicted.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    sums: dict[int, dict] = {layer: dict.fromkeys(("n", "x", "xx", "ee", "l0", "fired"), 0) for layer in layers}
    for tokens, documents, _ in tqdm(rows, "reconstruction", leave=False, disable=None, delay=2):
        tokens, documents = tokens.to(device), documents.to(device)
        seen = (documents > 0) & (tokens != tokenizer.bos)
        _, residuals = model.hidden(tokens, documents, capture=layers, stop_after=layers[-1])
        for layer in layers:
            sae, total, x = saes[layer], sums[layer], residuals[layer][seen].float()
            f = sae.encode(x)
            error = (sae.decode(f) - x).double()
            new = {"n": len(x), "x": x.double().sum(0), "xx": x.double().square().sum(), "ee": error.square().sum(),
                   "l0": (f != 0).sum(), "fired": (sae.activations(f) > 0).sum(0)}
            sums[layer] = {name: total[name] + value for name, value in new.items()}
    out = []
    for layer in layers:
        sae, s = saes[layer], sums[layer]
        mean, density = s["x"] / s["n"], s["fired"].double() / s["n"]
        row = {"layer": layer, "kind": sae.kind, "tokens": s["n"], "ev": (1 - s["ee"] / (s["xx"] - s["n"] * mean.square().sum())).item(),
               "l0": s["l0"].item() / s["n"], "dead": (density == 0).double().mean().item(), "density": density.tolist()}
        row |= spliced(model, tokenizer, sae, layer, mean.float(), rows)
        if sae.block > 1:
            stable, effective = ranks(sae.W_dec.unflatten(0, (-1, sae.block)))
            row["ranks"] = {"stable": stable.tolist(), "effective": effective.tolist()}
        out.append(row)
    return out


def spliced(model, tokenizer, sae, layer, mean, rows):
    """measure's "ce", "kl" and what is recovered, of one layer."""
    device, total, count = model.embed_tokens.weight.device, dict.fromkeys(("clean", "spliced", "zero", "mean"), 0.0), 0
    kl = dict(total)
    swaps = {"spliced": lambda x: sae.decode(sae.encode(x)), "zero": torch.zeros_like, "mean": lambda x: mean.expand_as(x)}
    for tokens, documents, labels in tqdm(rows, f"splicing, layer {layer}", leave=False, disable=None, delay=2):
        tokens, documents, labels = tokens.to(device), documents.to(device), labels.to(device)
        seen, predicted = (documents > 0) & (tokens != tokenizer.bos), labels != -100

        def hidden(swap=None):
            def hook(block, args, out):
                return torch.where(seen[..., None], swap(out).to(out.dtype), out)
            handle = model.layers[layer].register_forward_hook(hook) if swap else None
            try:
                return model.hidden(tokens, documents)[0][predicted]
            finally:
                handle and handle.remove()
        finals = {"clean": hidden()} | {name: hidden(swap) for name, swap in swaps.items()}
        for at in range(0, int(predicted.sum()), 512):                               # logits of 512 tokens at a time
            answer = labels[predicted][at:at + 512]
            log_p = {name: model.unembed(h[at:at + 512]).log_softmax(-1) for name, h in finals.items()}
            for name, value in log_p.items():
                total[name] += F.nll_loss(value, answer, reduction="sum").item()
                kl[name] += F.kl_div(value, log_p["clean"], reduction="sum", log_target=True).item()
        count += int(predicted.sum())
    ce, kl = ({name: value / count for name, value in one.items()} for one in (total, kl))

    def recovered(of):
        return {name: (of[name] - of["spliced"]) / (of[name] - of["clean"]) if of[name] != of["clean"] else None
                for name in ("zero", "mean")}
    return {"ce": ce, "kl": kl, "ce_recovered": recovered(ce), "kl_recovered": recovered(kl)}


# ---------------------------------------------------------------------------------------------------------------
# Concepts

def auroc(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(K) area under the ROC curve of each column of values (n, K) for labels (n) bool; equal values count half."""
    values, positive = values.T.contiguous(), labels.double()                        # (K, n)
    ordered = values.sort(dim=1).values
    rank = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)      # twice the rank, from 0
    p, n = positive.sum(), len(labels)
    return ((rank.double() @ positive) / 2 - p * p / 2) / (p * (n - p))


def logistic(x, labels, weight_decay=1e-3):
    """(w (d), b) of a logistic regression on x (n, d), by Newton's method; classes weigh the same."""
    x1 = torch.cat((x, torch.ones_like(x[:, :1])), 1).double()
    y = labels.double()
    balance = torch.where(labels, 0.5 / y.mean(), 0.5 / (1 - y.mean())) / len(y)
    w = torch.zeros(x1.shape[1], dtype=torch.float64, device=x.device)
    ridge = weight_decay * torch.eye(len(w), dtype=torch.float64, device=x.device) * x1.square().mean(0).clamp(min=1e-12).diag()
    for _ in range(12):
        p = torch.sigmoid(x1 @ w)
        slope = x1.T @ (balance * (p - y)) + ridge @ w
        w -= torch.linalg.solve(x1.T @ (x1 * (balance * (p * (1 - p)).clamp(min=1e-4))[:, None]) + ridge, slope)
    return w[:-1].to(x.dtype), w[-1].to(x.dtype)


def f1(predicted, labels):
    hit = (predicted & labels).sum()
    return (2 * hit / (predicted.sum() + labels.sum()).clamp(min=1)).item()


MOST, JUMP = 10, 0.03            # latents that a concept may be split over, and the rise in F1 that another one must bring
FULL_COS, FULL_SHARE, PART_COS, ABSORBERS = 0.025, 0.4, 0.1, 3


@torch.no_grad()
def concept_report(sae, x, labels, seed=0):
    """How an SAE holds one concept, on residuals x (n, D) with labels (n) bool; after SAEBench's definitions.

    "units": how many units a sparse probe wants, k growing while F1 rises by 0.03 or more (feature splitting); "f1" of it
    and of the dense "probe"; "absorbed": of the tokens that the probe rightly fires on, the share where those main units
    are silent and one other unit, within 0.025 of cosine of the probe, carries 0.4 of its projection; "fraction": the mean
    share of the projection that at most 3 others (cosine 0.1 or more) carry, of what they and the main units do; "auroc"
    of the best single unit, and of the "controls": as many random subspaces of r dimensions, an untrained SAE.
    Probes learn on half of the tokens, all figures are of the other half.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    learn, test = order[:len(x) // 2].to(x.device), order[len(x) // 2:].to(x.device)
    x, r = x.float(), sae.block
    f = sae.encode(x)
    a = sae.activations(f)                                                           # (n, K)
    w, b = logistic(x[learn] - x.mean(0), labels[learn])
    fires = ((x - x.mean(0))[test] @ w + b > 0) & labels[test]

    # Units by how much more they are active where the concept is, blocks by how differently, in units of the code's spread
    gap = f[learn][labels[learn]].mean(0) - f[learn][~labels[learn]].mean(0)
    gap = (gap / f[learn].std(0).clamp(min=1e-6)).unflatten(0, (-1, r))
    strength = gap[:, 0] if r == 1 else gap.norm(dim=1)
    best = strength.topk(min(MOST, len(strength))).indices
    scores = []
    for k in range(1, len(best) + 1):
        columns = (best[:k, None] * r + torch.arange(r, device=x.device)).flatten()
        u, c = logistic(f[learn][:, columns], labels[learn])
        scores.append(f1(f[test][:, columns] @ u + c > 0, labels[test]))
        if k > 1 and scores[-1] - scores[-2] < JUMP:
            break
    k = max(1, len(scores) - (len(scores) > 1 and scores[-1] - scores[-2] < JUMP))
    main = best[:k]

    # each unit's share in the projection of x onto the probe, and the cosine of what it writes with it
    unit = F.normalize(w, dim=0)
    along = f[test] * (sae.W_dec @ unit)
    along = along.unflatten(1, (-1, r)).sum(2)                                       # (n', K)
    cosine = along / _lengths(sae, f[test]).clamp(min=1e-9)
    projection = ((x[test] - x.mean(0)) @ unit)
    others = along.clone()
    others[:, main] = -math.inf
    top, which = others.max(1)
    silent = (a[test][:, main] <= 1e-6).all(1)
    full = fires & silent & (cosine.gather(1, which[:, None])[:, 0] >= FULL_COS) & (top >= FULL_SHARE * projection)
    part = torch.where(cosine >= PART_COS, others, 0).clamp(min=0).topk(min(ABSORBERS, others.shape[1]), 1).values.sum(1)
    fraction = part / (part + along[:, main].sum(1).clamp(min=0)).clamp(min=1e-9)
    areas = auroc(a[test], labels[test])
    return {"units": k, "f1": scores[k - 1], "probe": f1((x - x.mean(0))[test] @ w + b > 0, labels[test]),
            "absorbed": (full.sum() / fires.sum().clamp(min=1)).item(), "fraction": fraction[fires].mean().nan_to_num().item(),
            "auroc": areas.max().item(), "best": areas.argmax().item(), "main": main.tolist(), "positive": labels.double().mean().item(),
            "controls": {"random subspaces": auroc(_random_subspaces(x, sae, draw)[test], labels[test]).max().item(),
                         "untrained SAE": auroc(_untrained(x, sae, draw)[test], labels[test]).max().item()}}


def _lengths(sae, f):
    """(n, K) length of what each unit writes for codes f (n, F)."""
    if sae.block == 1:
        return f.abs() * sae.W_dec.norm(dim=1)
    blocks, p = sae.W_dec.unflatten(0, (-1, sae.block)), f.unflatten(1, (-1, sae.block))
    return torch.einsum("nkr,krs,nks->nk", p, blocks @ blocks.mT, p).clamp(min=0).sqrt()


def _random_subspaces(x, sae, draw):
    """(n, K) length of x − mean in each of K random subspaces of r dimensions; along a direction, with its sign."""
    Q = torch.linalg.qr(torch.randn(sae.n_units, x.shape[1], sae.block, generator=draw)).Q.to(x.device)
    parts = torch.einsum("nd,kdr->nkr", x - x.mean(0), Q)
    return parts[..., 0] if sae.block == 1 else parts.norm(dim=2)


def _untrained(x, sae, draw):
    """(n, K) activations of an SAE of the same kind and L0 before its first step."""
    scale = (x - x.mean(0)).square().sum(1).mean().sqrt()
    kind = {"architecture": "sasa", "block": sae.block, "l0": sae.block * sae.active} if isinstance(sae, SASA) else {
        "l0": max(1, round((sae.encode(x) > 0).sum().item() / len(x)))}
    trainer = Trainer(Spec(width=sae.n_features, **kind), x.mean(0) / scale, draw)
    trainer.gradients(x / scale)                                                     # sets the threshold, changes no weight
    arrays = trainer.arrays(scale)
    fresh = SASA(**arrays, block=sae.block, active=sae.active) if isinstance(sae, SASA) else JumpReLU(**arrays)
    return fresh.activations(fresh.encode(x))


def letters(tokenizer, tokens):
    """{letter: labels (n) bool}: does the token begin a word with it? Of tokens (n); only letters of 1 % or more."""
    names = [tokenizer.token(i) for i in tokens.tolist()]
    first = [name.strip()[:1].lower() if name.startswith(" ") and name.strip().isalpha() else "" for name in names]
    found = {letter: torch.tensor([one == letter for one in first]) for letter in "abcdefghijklmnopqrstuvwxyz"}
    return {f"begins with {letter}": labels for letter, labels in found.items() if labels.double().mean() >= 0.01}


# ---------------------------------------------------------------------------------------------------------------
# The command

def layers_of(folder):
    """[(layer, width, l0)] of the SAEs in a folder."""
    places = sorted(Path(folder).expanduser().glob("layer_*/width_*/average_l0_*"))
    if not places:
        raise InputError(f"{folder} holds no SAE: layer_N/width_W/average_l0_X/")
    return [tuple(part.split("_")[-1] for part in place.parts[-3:]) for place in places]


@torch.no_grad()
def concepts_of(model, tokenizer, saes, settings, count=20_000):
    """[{"layer", "concept", …concept_report}] of all layers."""
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    if settings["model"] == "toy":
        from toy import build as toy
        examples = toy.World(read_json(recipe.TOY / "world.json")["seed"]).labelled(tokenizer, 400, "concepts")
    else:
        examples = ((ids, None) for item in read_items(data_file(settings["data"]))
                    for ids in encode_item(tokenizer, item, settings["context"]))
    residuals, labels, ids, seen = {layer: [] for layer in layers}, {}, [], 0
    for tokens, marks in examples:
        captured = model.hidden(torch.tensor([tokens], device=device), capture=layers, stop_after=layers[-1])[1]
        for layer in layers:
            residuals[layer].append(captured[layer][0, 1:].float())
        ids += tokens[1:]
        for name, values in (marks or {}).items():
            labels.setdefault(name, []).extend(values[1:])
        seen += len(tokens) - 1
        if seen >= count:
            break
    labels = {name: torch.tensor(values) for name, values in labels.items()} or letters(tokenizer, torch.tensor(ids))
    out = []
    for layer, (name, marks) in tqdm([*itertools.product(layers, labels.items())], "concepts", leave=False, disable=None, delay=2):
        marks = marks.to(device)
        asked = marks >= 0 if marks.dtype != torch.bool else torch.ones_like(marks)  # −1: of no interest
        if (marks[asked] > 0).sum() >= 10:
            found = concept_report(saes[layer], torch.cat(residuals[layer])[asked], marks[asked] > 0)
            out.append({"layer": layer, "concept": name} | found)
    return out


def histogram(density):
    """Units that are never active, below 10⁻⁴, …, 10⁻¹ of tokens, and above."""
    edges = torch.tensor(BINS)
    where = torch.bucketize(torch.tensor(density), edges.double())                   # 0: never
    return torch.bincount(where, minlength=len(BINS) + 1).tolist()


def measures_table(rows):
    """measure's rows as a table."""
    def share(value):
        return "–" if value is None else f"{100 * value:.1f}"
    lines = [[r["layer"], r["kind"], f"{r['ev']:.3f}", f"{r['l0']:.1f}", share(r["dead"]), f"{r['ce']['spliced'] - r['ce']['clean']:+.3f}",
              f"{r['kl']['spliced']:.3f}", share(r["ce_recovered"]["zero"]), share(r["ce_recovered"]["mean"]),
              share(r["kl_recovered"]["zero"]),
              *([f"{torch.tensor(r['ranks'][name]).mean():.2f}" for name in ("stable", "effective")] if "ranks" in r else "––"),
              " ".join(map(str, histogram(r["density"])))] for r in rows]
    head = ["layer", "SAE", "EV", "L0", "dead %", "ΔCE", "KL", "CE rec. % zero", "mean", "KL rec. %", "stable rank", "effective",
            "never ≤-4 ≤-3 ≤-2 ≤-1 more"]
    return table(lines, head, right=[0, *range(2, 12)])


def concepts_table(rows):
    lines = [[r["layer"], r["concept"], f"{100 * r['positive']:.0f}", r["units"], f"{r['f1']:.2f}", f"{r['probe']:.2f}",
              f"{100 * r['absorbed']:.1f}", f"{100 * r['fraction']:.1f}", f"{r['auroc']:.3f}",
              *(f"{value:.3f}" for value in r["controls"].values())] for r in rows]
    head = ["layer", "concept", "% of tokens", "units", "F1", "F1 of probe", "absorbed %", "fraction %", "best AUROC",
            "random subspaces", "untrained SAE"]
    return table(lines, head, right=[0, *range(2, 11)])


def main(folder, settings, out=None):
    """Measure the SAEs in a folder, print two tables, and write all figures to the JSON file `out`, if one is given."""
    found = layers_of(folder)
    model = load_model(recipe.folder(settings["model"]), getattr(torch, settings["dtype"]), settings["device"])
    tokenizer = load_tokenizer(recipe.folder(settings["model"]))
    rows = []
    if settings["data"] is None:
        from toy import build as toy
        items = functools.partial(toy.World(read_json(recipe.TOY / "world.json")["seed"]).corpus, 600, "held out")
    else:
        items = functools.partial(read_items, data_file(settings["data"]))
    held = batches(tokenizer, items(), settings["context"], 100_000)
    concepts = []
    for width, l0 in dict.fromkeys((width, l0) for _, width, l0 in found):           # several widths: each by itself
        saes = {int(layer): load_sae(folder, int(layer), width, int(l0), settings["device"])
                for layer, w, x in found if (w, x) == (width, l0)}
        rows += measure(model, tokenizer, saes, held)
        concepts += concepts_of(model, tokenizer, saes, settings)
    print(f"{folder}: {rows[0]['tokens']:,} tokens, BOS and padding left out\n\n{measures_table(rows)}\n\n{concepts_table(concepts)}")
    if out:
        write_json(out, {"measures": rows, "concepts": concepts})
