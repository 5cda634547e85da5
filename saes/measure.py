"""What SAEs are worth: reconstruction, loss with the SAE spliced in, which units carry a concept.

    python -m saes.measure toy/sae                                       # half a minute on one core
    python -m saes.measure DIR --model google/gemma-2-2b --data FILE --out figures.json   # a GPU

Concepts are those of --concepts FILE, else the first letter of a word, as in SAEBench. The AUROC of
the best unit stands beside two controls, which often do as well: random subspaces of the same
dimension, and an untrained SAE.

Letters: n tokens, D width of the residual stream, F features, K units (features, or blocks of r).
"""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Example, Tokenizer, load_tokenizer, pack, read_items
from fused import IGNORE
from model import Gemma2, load_model
from run.files import InputError, Parser, data_file, read_jsonl, run_command, table, write_json
from run.session import limit_threads
from run.settings import RECIPES, model_folder
from sae import SAE, SASA, JumpReLU, load_saes
from saes.step import Spec, Trainer, ranks
from saes.stream import encode_item
from saes.train import SETTINGS, TOY_DATA, add_flags, choose_machine

DENSITIES = 0, 1e-4, 1e-3, 1e-2, 1e-1  # of the density histogram: never, up to 1e-4, ..., more
MAX_UNITS, MIN_RISE = 10, 0.03         # units of a sparse probe, and the rise in F1 that adds one
# Absorption: cosine with the probe and share of its projection of the one unit that absorbs; cosine
# and number of the units that absorb a part
FULL_COSINE, FULL_SHARE, PART_COSINE, PART_UNITS = 0.025, 0.4, 0.1, 3


def batches(tokenizer, items, context, count, seed=0):
    """[(tokens, documents, labels)], each (B, T), of documents of at least `count` tokens in all."""
    examples, num_tokens = [], 0
    for item in items:
        for ids in encode_item(tokenizer, item, context):
            examples.append(Example(ids, 1, True))
            num_tokens += len(ids) - 1
        if num_tokens >= count:
            break
    if not examples:
        raise InputError("the data hold no document to measure on")
    rows, size = pack(examples, context, seed, 0), max(1, 4096 // context)
    out = []
    for start in range(0, len(rows), size):
        batch = rows[start:start + size]
        out.append(tuple(torch.stack([getattr(row, name) for row in batch])
                         for name in ("tokens", "documents", "labels")))
    return out


# --------------------------------------------------------------------------------------------------
# Reconstruction

@torch.no_grad()
def measure(model: Gemma2, tokenizer: Tokenizer, saes: dict[int, SAE], rows) -> list[dict]:
    """Figures of each layer of saes {layer: sae} on the `batches`, in nats a token where losses:

    ev 1 − Σ‖x − x̂‖²/Σ‖x − mean‖²; l0; dead share of units that no token activates; density (K) share
    of tokens that activate each; ce and kl (from the clean model) {clean, spliced, zero, mean};
    ce_recovered and kl_recovered {zero, mean}, (ablated − spliced)/(ablated − clean); ranks of
    blocks. BOS and padding are left as they are, and out of every mean but the losses'.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    sums: dict[int, dict] = {layer: {} for layer in layers}
    for tokens, documents, _ in tqdm(rows, "reconstruction", leave=False, disable=None, delay=2):
        tokens, documents = tokens.to(device), documents.to(device)
        counted = (documents > 0) & (tokens != tokenizer.bos)
        _, residuals = model.hidden(tokens, documents, layers, layers[-1])
        for layer in layers:
            sae, total, x = saes[layer], sums[layer], residuals[layer][counted].float()
            codes = sae.encode(x)
            error = (sae.decode(codes) - x).double()
            new = {"n": len(x), "x": x.double().sum(0), "xx": x.double().square().sum(),
                   "ee": error.square().sum(), "l0": (codes != 0).sum(),
                   "fired": (sae.activations(codes) > 0).sum(0)}
            sums[layer] = {name: total.get(name, 0) + value for name, value in new.items()}

    figures = []
    for layer in layers:
        sae, total = saes[layer], sums[layer]
        n, mean = total["n"], total["x"] / total["n"]
        power = total["xx"] - n * mean.square().sum()  # Σ‖x − mean‖²
        density = total["fired"].double() / n
        row = {"layer": layer, "kind": sae.kind, "tokens": n,
               "ev": (1 - total["ee"] / power).item(), "l0": total["l0"].item() / n,
               "dead": (density == 0).double().mean().item(), "density": density.tolist()}
        row |= spliced(model, tokenizer, sae, layer, mean.float(), rows)
        if sae.block > 1:
            stable, effective = ranks(sae.W_dec.unflatten(0, (-1, sae.block)))
            row["ranks"] = {"stable": stable.tolist(), "effective": effective.tolist()}
        figures.append(row)
    return figures


def spliced(model, tokenizer, sae, layer, mean, rows):
    """ce, kl and what is recovered of them: the residual stream after one block is replaced by the
    SAE's reconstruction, by zeros, by its mean."""
    device = model.embed_tokens.weight.device
    replacements = {"clean": None, "spliced": lambda x: sae.decode(sae.encode(x)),
                    "zero": torch.zeros_like, "mean": lambda x: mean.expand_as(x)}
    ce, kl, count = dict.fromkeys(replacements, 0.0), dict.fromkeys(replacements, 0.0), 0
    name = f"splicing, layer {layer}"
    for tokens, documents, labels in tqdm(rows, name, leave=False, disable=None, delay=2):
        tokens, documents, labels = tokens.to(device), documents.to(device), labels.to(device)
        counted = (documents > 0) & (tokens != tokenizer.bos)
        predicted = labels != IGNORE
        hidden = {name: hidden_with(model, layer, replace, tokens, documents, counted)[predicted]
                  for name, replace in replacements.items()}
        labels = labels[predicted]
        for start in range(0, len(labels), 512):  # logits of 512 tokens at a time
            part = slice(start, start + 512)
            log_p = {name: model.unembed(h[part]).log_softmax(-1) for name, h in hidden.items()}
            for name, value in log_p.items():
                ce[name] += F.nll_loss(value, labels[part], reduction="sum").item()
                kl[name] += F.kl_div(value, log_p["clean"], reduction="sum", log_target=True).item()
        count += len(labels)

    figures = {}
    for name, losses in (("ce", ce), ("kl", kl)):
        losses = {key: value / count for key, value in losses.items()}
        clean, with_sae = losses["clean"], losses["spliced"]
        figures[name] = losses
        figures[f"{name}_recovered"] = {key: (losses[key] - with_sae) / (losses[key] - clean)
                                        for key in ("zero", "mean")}
    return figures


def hidden_with(model, layer, replace, tokens, documents, counted):
    """Final hidden states (B, T, D) where `replace` makes the output of a block at counted tokens."""
    if replace is None:
        return model.hidden(tokens, documents)[0]
    handle = model.layers[layer].register_forward_hook(
        lambda block, inputs, x: torch.where(counted[..., None], replace(x).to(x.dtype), x))
    try:
        return model.hidden(tokens, documents)[0]
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------------------
# Concepts

def auroc(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(K) area under the ROC curve of each column of values (n, K) for labels (n) bool.

    Equal values count half: the rank of a value is the mean of the first and last it could have.
    """
    values, positive = values.T.contiguous(), labels.double()  # (K, n)
    ordered = values.sort(dim=1).values
    first, last = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    p, n = positive.sum(), len(labels)
    return (((first + last).double() @ positive) / 2 - p * p / 2) / (p * (n - p))


def logistic(x, labels, weight_decay=1e-3):
    """(w (d), b) of a logistic regression on x (n, d), by Newton's method; classes weigh the same."""
    x1 = torch.cat((x, torch.ones_like(x[:, :1])), 1).double()
    y = labels.double()
    balance = torch.where(labels, 0.5 / y.mean(), 0.5 / (1 - y.mean())) / len(y)
    w = torch.zeros(x1.shape[1], dtype=torch.float64, device=x.device)
    identity = torch.eye(len(w), dtype=torch.float64, device=x.device)
    ridge = weight_decay * identity * x1.square().mean(0).clamp(min=1e-12).diag()
    for _ in range(12):
        p = torch.sigmoid(x1 @ w)
        slope = x1.T @ (balance * (p - y)) + ridge @ w
        curvature = balance * (p * (1 - p)).clamp(min=1e-4)
        w -= torch.linalg.solve(x1.T @ (x1 * curvature[:, None]) + ridge, slope)
    return w[:-1].to(x.dtype), w[-1].to(x.dtype)


def f1(predicted, labels):
    hits = (predicted & labels).sum()
    return (2 * hits / (predicted.sum() + labels.sum()).clamp(min=1)).item()


@torch.no_grad()
def concept_report(sae, x, labels, seed=0):
    """How an SAE carries one concept, on residuals x (n, D) with labels (n) bool.

    units: how many units a sparse probe needs (feature splitting), main: which, f1: its F1; probe: F1
    of a dense probe; absorbed, fraction: see `absorption`; auroc, best: of the best single unit;
    controls: the best of as many random subspaces of r dimensions, and of an untrained SAE.
    Probes learn on half of the tokens, all figures are of the other half. After SAEBench's
    definitions (arXiv 2503.09532).
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    learn, test = order[:len(x) // 2].to(x.device), order[len(x) // 2:].to(x.device)
    x = x.float()
    centred = x - x.mean(0)
    codes = sae.encode(x)
    activations = sae.activations(codes)[test]
    w, b = logistic(centred[learn], labels[learn])
    predicted = centred[test] @ w + b > 0
    main, score = sparse_probe(sae, codes, labels, learn, test)
    absorbed, fraction = absorption(sae, codes[test], activations, centred[test],
                                    F.normalize(w, dim=0), main, predicted & labels[test])
    areas = auroc(activations, labels[test])
    controls = {"random subspaces": random_subspaces(centred, sae, draw),
                "untrained SAE": untrained(x, sae, draw)}
    return {"units": len(main), "f1": score, "probe": f1(predicted, labels[test]),
            "absorbed": absorbed, "fraction": fraction,
            "auroc": areas.max().item(), "best": areas.argmax().item(), "main": main.tolist(),
            "positive": labels.double().mean().item(),
            "controls": {name: auroc(values[test], labels[test]).max().item()
                         for name, values in controls.items()}}


def sparse_probe(sae, codes, labels, learn, test):
    """(main units (k), F1): k grows while another unit lifts the probe's F1 by MIN_RISE or more."""
    # Units by how much their mean code differs where the concept is, in units of the code's spread
    gap = codes[learn][labels[learn]].mean(0) - codes[learn][~labels[learn]].mean(0)
    gap = (gap / codes[learn].std(0).clamp(min=1e-6)).unflatten(0, (-1, sae.block))
    strength = gap[:, 0] if sae.block == 1 else gap.norm(dim=1)
    best = strength.topk(min(MAX_UNITS, len(strength))).indices

    within, previous = torch.arange(sae.block, device=codes.device), None
    for k in range(1, len(best) + 1):
        columns = (best[:k, None] * sae.block + within).flatten()
        w, b = logistic(codes[learn][:, columns], labels[learn])
        score = f1(codes[test][:, columns] @ w + b > 0, labels[test])
        if previous is not None and score - previous < MIN_RISE:
            return best[:k - 1], previous
        previous = score
    return best, previous


def absorption(sae, codes, activations, centred, probe, main, fires):
    """(absorbed, fraction) of the tokens that the probe, a unit vector, rightly fires on.

    absorbed: share of tokens where the main units are silent and one other unit, its cosine with the
    probe FULL_COSINE or more, carries FULL_SHARE of the projection. fraction: mean share that at
    most PART_UNITS others, of cosine PART_COSINE or more, carry of what they and the main units do.
    """
    # What each unit writes along the probe, and its cosine with the probe
    along = codes * (sae.W_dec @ probe)
    along = along.unflatten(1, (-1, sae.block)).sum(2)  # (n, K)
    cosine = along / written_lengths(sae, codes).clamp(min=1e-9)
    others = along.clone()
    others[:, main] = -math.inf

    top, unit = others.max(1)
    silent = (activations[:, main] <= 1e-6).all(1)
    aligned = cosine.gather(1, unit[:, None])[:, 0] >= FULL_COSINE
    full = fires & silent & aligned & (top >= FULL_SHARE * (centred @ probe))
    absorbed = full.sum() / fires.sum().clamp(min=1)

    part = torch.where(cosine >= PART_COSINE, others, 0).clamp(min=0)
    part = part.topk(min(PART_UNITS, part.shape[1]), 1).values.sum(1)
    by_main = along[:, main].sum(1).clamp(min=0)
    fraction = part / (part + by_main).clamp(min=1e-9)
    return absorbed.item(), fraction[fires].mean().nan_to_num().item()


def written_lengths(sae, codes):
    """(n, K) length of what each unit writes for codes (n, F)."""
    if sae.block == 1:
        return codes.abs() * sae.W_dec.norm(dim=1)
    blocks, p = sae.W_dec.unflatten(0, (-1, sae.block)), codes.unflatten(1, (-1, sae.block))
    return torch.einsum("nkr,krs,nks->nk", p, blocks @ blocks.mT, p).clamp(min=0).sqrt()


def random_subspaces(centred, sae, draw):
    """(n, K) length of x − mean in each of K random subspaces of r dimensions; signed for r = 1."""
    shape = (sae.n_units, centred.shape[1], sae.block)
    Q = torch.linalg.qr(torch.randn(shape, generator=draw)).Q.to(centred.device)
    parts = torch.einsum("nd,kdr->nkr", centred, Q)
    return parts[..., 0] if sae.block == 1 else parts.norm(dim=2)


def untrained(x, sae, draw):
    """(n, K) activations of an SAE of the same kind and L0 before its first step."""
    scale = (x - x.mean(0)).square().sum(1).mean().sqrt()
    if isinstance(sae, SASA):
        spec = Spec("sasa", sae.n_features, sae.block * sae.active, sae.block)
    else:
        l0 = max(1, round((sae.encode(x) > 0).sum().item() / len(x)))
        spec = Spec("batchtopk", sae.n_features, l0)
    trainer = Trainer(spec, x.mean(0) / scale, draw)
    trainer.gradients(x / scale)  # sets the threshold, changes no weight
    arrays = trainer.arrays(scale)
    if isinstance(sae, SASA):
        return SASA(**arrays, block=sae.block, active=sae.active).strength(x)
    return JumpReLU(**arrays).strength(x)


def letters(tokenizer, tokens):
    """{"begins with a": labels (n) bool} of tokens (n): letters that begin 1 % or more of them."""
    initials = []
    for token in tokens.tolist():
        name = tokenizer.token(token)
        begins_word = name.startswith(" ") and name.strip().isalpha()
        initials.append(name.strip()[0].lower() if begins_word else "")
    labels = {}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        is_letter = torch.tensor([initial == letter for initial in initials])
        if is_letter.double().mean() >= 0.01:
            labels[f"begins with {letter}"] = is_letter
    return labels


@torch.no_grad()
def concepts_of(model, tokenizer, saes, examples, count=20_000):
    """[{layer, concept, ... of concept_report}] on the first `count` tokens of the examples.

    examples: (token ids, {concept: a letter a token: 1, 0, or - where it makes no sense to ask}).
    Where there are no concepts, those of `letters`.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    residuals, marks, ids = {layer: [] for layer in layers}, {}, []
    for tokens, labels in examples:
        batch = torch.tensor([tokens], device=device)
        _, captured = model.hidden(batch, None, layers, layers[-1])
        for layer in layers:
            residuals[layer].append(captured[layer][0, 1:].float())
        ids += tokens[1:]
        for concept, letters_of_tokens in labels.items():
            marks[concept] = marks.get(concept, "") + letters_of_tokens[1:]
        if len(ids) >= count:
            break

    concepts = letters(tokenizer, torch.tensor(ids))
    if marks:
        concepts = {name: torch.tensor([mark == "1" for mark in text])
                    for name, text in marks.items()}
    reports = []
    pairs = [*itertools.product(layers, concepts)]
    for layer, name in tqdm(pairs, "concepts", leave=False, disable=None, delay=2):
        x, labels = torch.cat(residuals[layer]), concepts[name].to(device)
        if marks:
            asked = torch.tensor([mark != "-" for mark in marks[name]], device=device)
            x, labels = x[asked], labels[asked]
        if labels.sum() >= 10:
            reports.append({"layer": layer, "concept": name} | concept_report(saes[layer], x, labels))
    return reports


# --------------------------------------------------------------------------------------------------
# Tables and the command

def histogram(density):
    """Numbers of units that are never active, on up to 10⁻⁴, ..., 10⁻¹ of the tokens, and on more."""
    classes = torch.bucketize(torch.tensor(density), torch.tensor(DENSITIES).double())
    return torch.bincount(classes, minlength=len(DENSITIES) + 1).tolist()


def measures_table(rows):
    """measure's rows as text."""
    lines = []
    for row in rows:
        ce, kl = row["ce"], row["kl"]
        recovered = (*row["ce_recovered"].values(), row["kl_recovered"]["zero"])
        mean_ranks = [None, None]
        if "ranks" in row:
            mean_ranks = [f"{sum(values) / len(values):.2f}" for values in row["ranks"].values()]
        lines.append([row["layer"], row["kind"], f"{row['ev']:.3f}", f"{row['l0']:.1f}",
                      f"{100 * row['dead']:.1f}", f"{ce['spliced'] - ce['clean']:+.3f}",
                      f"{kl['spliced']:.3f}", *(f"{100 * value:.1f}" for value in recovered),
                      *mean_ranks, " ".join(map(str, histogram(row["density"])))])
    head = ["layer", "SAE", "EV", "L0", "dead %", "ΔCE", "KL", "CE rec. % zero", "mean",
            "KL rec. %", "stable rank", "effective", "never ≤-4 ≤-3 ≤-2 ≤-1 more"]
    return table(lines, head, right=[0, *range(2, 12)])


def concepts_table(rows):
    """concepts_of's rows as text."""
    lines = []
    for row in rows:
        areas = (row["auroc"], *row["controls"].values())
        lines.append([row["layer"], row["concept"], f"{100 * row['positive']:.0f}", row["units"],
                      f"{row['f1']:.2f}", f"{row['probe']:.2f}", f"{100 * row['absorbed']:.1f}",
                      f"{100 * row['fraction']:.1f}", *(f"{area:.3f}" for area in areas)])
    head = ["layer", "concept", "% of tokens", "units", "F1", "F1 of probe", "absorbed %",
            "fraction %", "best AUROC", "random subspaces", "untrained SAE"]
    return table(lines, head, right=[0, *range(2, 11)])


def sizes_in(folder):
    """{(width, L0): layers} of the SAEs in a folder."""
    sizes: dict[tuple, list] = {}
    for path in sorted(Path(folder).expanduser().glob("layer_*/width_*/average_l0_*")):
        layer, width, l0 = (part.split("_")[-1] for part in path.parts[-3:])
        sizes.setdefault((width, int(l0)), []).append(int(layer))
    if not sizes:
        raise InputError(f"{folder} holds no SAE: layer_N/width_W/average_l0_X/")
    return sizes


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="DIR", help="SAEs: layer_N/width_W/average_l0_X")
    add_flags(parser, ("model", "data", "context", "device", "dtype"))
    parser.add_argument("--concepts", metavar="FILE", help='labelled tokens, .jsonl with "tokens" '
                        'and "labels": {concept: a letter a token: 1, 0, - for no question}')
    parser.add_argument("--out", metavar="FILE", help="write all figures there, as JSON")
    args = parser.parse_args()
    choose_machine(args)
    args.model = args.model or "toy"
    default_context, toy_context, _ = SETTINGS["context"]
    if args.model == "toy":
        if not args.data:
            args.concepts = args.concepts or TOY_DATA / "concepts.jsonl"
        args.data = args.data or TOY_DATA / "sae_test.jsonl.gz"
        default_context = toy_context
    args.data = args.data or RECIPES.get(args.model, {}).get("data")
    if not args.data:
        raise InputError(f"{args.model}: give --data")

    sizes = sizes_in(args.folder)
    source, context = model_folder(args.model), args.context or default_context
    model = load_model(source, getattr(torch, args.dtype), args.device)
    limit_threads(sum(parameter.numel() for parameter in model.parameters()))
    tokenizer, path = load_tokenizer(source), data_file(args.data)
    rows = batches(tokenizer, read_items(path), context, 100_000)
    examples = [(row["tokens"], row["labels"]) for row in read_jsonl(args.concepts)] \
        if args.concepts else []
    measures, concepts = [], []
    for (width, l0), layers in sizes.items():
        saes = load_saes(args.folder, layers, width, l0, args.device, model.config)
        measures += measure(model, tokenizer, saes, rows)
        documents = ((ids, {}) for item in read_items(path)
                     for ids in encode_item(tokenizer, item, context))
        concepts += concepts_of(model, tokenizer, saes, examples or documents)
    print(f"{args.folder}: {measures[0]['tokens']:,} tokens, BOS and padding left out\n\n"
          f"{measures_table(measures)}\n\n{concepts_table(concepts)}")
    if args.out:
        write_json(args.out, {"measures": measures, "concepts": concepts})


if __name__ == "__main__":
    run_command(main)
