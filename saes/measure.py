"""What SAEs are worth: reconstruction, loss with the SAE spliced in, units that carry concepts.

    python -m saes.measure toy/sae                                       # half a minute on one core
    python -m saes.measure DIR --model google/gemma-2-2b --data FILE --out figures.json

Concepts are those of --concepts FILE, labelled tokens. The AUROC of the best unit stands beside two
controls, which often do as well: random subspaces of the same dimension, and an untrained SAE.

Letters: n tokens, D width of the residual stream, F features, K units (features, or blocks of r).
"""

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
from sae import SAE, load_saes
from saes.concepts import concept_report
from saes.step import ranks
from saes.stream import encode_item
from saes.train import TOY_DATA, add_flags, choose_machine


def batches(tokenizer, items, context, count, seed=0):
    """[(tokens, documents, labels)], each (B, T), of as many documents as hold `count` tokens."""
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
    """Figures of each layer of saes {layer: sae} on the `batches`.

    ev: 1 − Σ‖x − x̂‖²/Σ‖x − mean‖²; l0; dead: share of units that no token activates. ce: nats a
    token with the clean residual stream and with x̂, zeros or the mean in its place; rise: of x̂
    over clean; kl: of x̂ from clean; zero, mean: (ablated − spliced)/(ablated − clean), the share
    recovered of what this ablation loses. stable, effective: mean ranks of blocks. BOS and padding
    are left as they are, and out of every mean but the losses'.
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
        row = {"layer": layer, "kind": sae.kind, "tokens": n,
               "ev": (1 - total["ee"] / power).item(), "l0": total["l0"].item() / n,
               "dead": (total["fired"] == 0).double().mean().item()}
        row |= spliced(model, tokenizer, sae, layer, mean.float(), rows)
        if sae.block > 1:
            stable, effective = ranks(sae.W_dec.unflatten(0, (-1, sae.block)))
            row |= {"stable": stable.mean().item(), "effective": effective.mean().item()}
        figures.append(row)
    return figures


def spliced(model, tokenizer, sae, layer, mean, rows):
    """measure's ce, rise, kl, zero and mean of one layer."""
    device = model.embed_tokens.weight.device
    replacements = {"clean": None, "spliced": lambda x: sae.decode(sae.encode(x)),
                    "zero": torch.zeros_like, "mean": lambda x: mean.expand_as(x)}
    ce, kl, count = dict.fromkeys(replacements, 0.0), 0.0, 0
    title = f"splicing, layer {layer}"
    for tokens, documents, labels in tqdm(rows, title, leave=False, disable=None, delay=2):
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
            kl += F.kl_div(log_p["spliced"], log_p["clean"], reduction="sum",
                           log_target=True).item()
        count += len(labels)
    ce = {name: total / count for name, total in ce.items()}
    figures = {"ce": ce, "rise": ce["spliced"] - ce["clean"], "kl": kl / count}
    for name in ("zero", "mean"):
        figures[name] = (ce[name] - ce["spliced"]) / (ce[name] - ce["clean"])
    return figures


def hidden_with(model, layer, replace, tokens, documents, counted):
    """Hidden states (B, T, D) where `replace` changes the output of a block at counted tokens."""
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

@torch.no_grad()
def concepts_of(model, saes, examples, count=20_000):
    """[{layer, concept, ... of concept_report}] on the first `count` tokens of the examples.

    examples: {"tokens": ids, "labels": {concept: a letter a token, 1, 0, or - for no question}}.
    Concepts of less than 1 % of the tokens are left out.
    """
    device, layers = model.embed_tokens.weight.device, sorted(saes)
    residuals, marks, num_tokens = {layer: [] for layer in layers}, {}, 0
    for example in examples:
        batch = torch.tensor([example["tokens"]], device=device)
        _, captured = model.hidden(batch, None, layers, layers[-1])
        for layer in layers:
            residuals[layer].append(captured[layer][0, 1:].float())
        for concept, text in example["labels"].items():
            marks[concept] = marks.get(concept, "") + text[1:]
        num_tokens += batch.shape[1] - 1
        if num_tokens >= count:
            break

    reports = []
    for layer in layers:
        x = torch.cat(residuals[layer])
        for concept, text in tqdm(marks.items(), f"concepts, layer {layer}", leave=False,
                                  disable=None, delay=2):
            asked = torch.tensor([mark != "-" for mark in text], device=device)
            labels = torch.tensor([mark == "1" for mark in text], device=device)[asked]
            if labels.double().mean() >= 0.01:
                report = concept_report(saes[layer], x[asked], labels)
                reports.append({"layer": layer, "concept": concept} | report)
    return reports


# --------------------------------------------------------------------------------------------------
# Tables and the command

MEASURES = {  # head: (figure, format)
    "layer": ("layer", ""), "SAE": ("kind", ""), "EV": ("ev", ".3f"), "L0": ("l0", ".1f"),
    "dead": ("dead", ".1%"), "ΔCE": ("rise", "+.3f"), "KL": ("kl", ".3f"),
    "recovered: zero": ("zero", ".1%"), "mean": ("mean", ".1%"),
    "stable rank": ("stable", ".2f"), "effective": ("effective", ".2f")}
CONCEPTS = {
    "layer": ("layer", ""), "concept": ("concept", ""), "of tokens": ("positive", ".0%"),
    "units": ("units", ""), "F1": ("f1", ".2f"), "F1 of probe": ("probe", ".2f"),
    "best AUROC": ("auroc", ".3f"), "random subspaces": ("random", ".3f"),
    "untrained SAE": ("untrained", ".3f")}


def figures_table(rows, columns):
    """Some figures of `measure` or `concepts_of` as text."""
    lines = []
    for row in rows:
        cells = [(row.get(name), form) for name, form in columns.values()]
        lines.append([None if value is None else format(value, form) for value, form in cells])
    return table(lines, columns, right=[0, *range(2, len(columns))])


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
    if args.model in (None, "toy"):
        defaults = {"model": "toy", "data": TOY_DATA / "sae_test.jsonl.gz", "context": 96,
                    "concepts": TOY_DATA / "concepts.jsonl"}
    else:
        defaults = {"data": RECIPES.get(args.model, {}).get("data"), "context": 1024}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not args.data:
        raise InputError(f"{args.model}: give --data")

    sizes, source, path = sizes_in(args.folder), model_folder(args.model), data_file(args.data)
    model = load_model(source, getattr(torch, args.dtype), args.device)
    limit_threads(sum(parameter.numel() for parameter in model.parameters()))
    tokenizer = load_tokenizer(source)
    rows = batches(tokenizer, read_items(path), args.context, 100_000)
    measures, concepts = [], []
    for (width, l0), layers in sizes.items():
        saes = load_saes(args.folder, layers, width, l0, args.device, model.config)
        measures += measure(model, tokenizer, saes, rows)
        if args.concepts:
            concepts += concepts_of(model, saes, read_jsonl(args.concepts))
    print(f"{args.folder}: {measures[0]['tokens']:,} tokens, BOS and padding left out\n\n"
          f"{figures_table(measures, MEASURES)}\n")
    if concepts:
        print(figures_table(concepts, CONCEPTS))
    if args.out:
        write_json(args.out, {"measures": measures, "concepts": concepts})


if __name__ == "__main__":
    run_command(main)
