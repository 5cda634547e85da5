"""Which units of an SAE carry a concept: AUROC beside two controls, and feature splitting.

    python -m experiments.concepts toy/sae                    # half a minute on one core
    python -m experiments.concepts DIR --model google/gemma-2-2b --concepts FILE

The AUROC of the best unit stands beside two controls, which often do as well: random subspaces of
the same dimension, and an untrained SAE. Definitions follow SAEBench (arXiv 2503.09532).

Letters: n tokens, D width of the residual stream, F features, K units (features, or blocks of r).
"""

import torch
from tqdm import tqdm

from data import load_tokenizer, prompt_tokens
from model import load_model
from run.files import InputError, Parser, read_json, read_jsonl, run_command, table, write_json
from run.session import limit_threads
from run.settings import TOY, model_folder
from sae import SASA, JumpReLU, load_saes, saes_in
from saes.step import Spec, Trainer
from saes.train import add_machine
from toy.world import HARM_VERBS, NOUNS, PREAMBLES, REFUSE, SENSITIVE_NOUNS, VERBS, World

NUM_TOKENS = 20_000
MAX_UNITS, MIN_RISE = 10, 0.03  # of a sparse probe, and the rise in F1 that adds a unit


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
    """(w (d), b) of a logistic regression on x (n, d), by Newton's method; classes weigh alike."""
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

    main, units: the units that a sparse probe needs (more than one: feature splitting), and their
    number; f1: its F1; probe: F1 of a dense probe; auroc, best: of the best single unit; random,
    untrained: the best AUROC of as many random subspaces of r dimensions, of an untrained SAE.
    Probes learn on half of the tokens, all figures are of the other half.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    learn, test = order[:len(x) // 2].to(x.device), order[len(x) // 2:].to(x.device)
    x = x.float()
    centred = x - x.mean(0)
    codes = sae.encode(x)
    activations = sae.activations(codes)[test]
    w, b = logistic(centred[learn], labels[learn])
    main, score = sparse_probe(sae, codes, labels, learn, test)

    # The controls draw in this order
    areas = auroc(activations, labels[test])
    random = auroc(random_subspaces(centred, sae, draw)[test], labels[test])
    fresh = auroc(untrained(x, sae, draw)[test], labels[test])
    return {"positive": labels.double().mean().item(), "main": main.tolist(), "units": len(main),
            "f1": score, "probe": f1(centred[test] @ w + b > 0, labels[test]),
            "auroc": areas.max().item(), "best": areas.argmax().item(),
            "random": random.max().item(), "untrained": fresh.max().item()}


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


# --------------------------------------------------------------------------------------------------
# The toy's concepts

CONCEPTS = ("verb", "noun", "harm verb", "sensitive noun", "harm", "jailbreak", "guard", "refusal")


def labelled(world, tokenizer, count=400):
    """{"tokens": ids from BOS on, "labels": {concept: a letter for each token}} of `count` chats.

    Letters are 1, 0, and - where the concept makes no sense. "verb" and "noun" are labelled in
    requests, their kinds at these words alone, harm and preambles from the noun to the last token
    before the answer, and refusals in answers.
    """
    for turns in world.corpus(count, "concepts"):
        tokens = prompt_tokens(tokenizer, turns[:-1])
        tokens += [*tokenizer.encode(turns[-1][1]), tokenizer.end_of_turn]
        labels = {concept: ["-"] * len(tokens) for concept in CONCEPTS}
        for i in range(0, len(turns), 2):
            # The answer begins where the prompt ends
            start = len(prompt_tokens(tokenizer, turns[:i + 1]))
            label_request(labels, tokenizer, turns[i][1], start)
            reply = turns[i + 1][1]
            is_refusal = reply.startswith(tuple(text.split("{")[0] for text in REFUSE))
            mark(labels["refusal"], start, start + len(tokenizer.encode(reply)) + 1, is_refusal)
        yield {"tokens": tokens, "labels": {k: "".join(v) for k, v in labels.items()}}


def label_request(labels, tokenizer, request, end):
    """Label the request whose answer begins at token `end`."""
    ids = tokenizer.encode(request)
    words = [tokenizer.token(token) for token in ids]
    # Between request and answer are <end_of_turn>, newline, <start_of_turn>, "model", newline
    start = end - 5 - len(ids)
    # "safe" is a noun, except in the preamble "be safe", so the last one counts
    verb = max(i for i, word in enumerate(words) if word in VERBS)
    noun = max(i for i, word in enumerate(words) if word in NOUNS)
    is_harm_verb = words[verb] in HARM_VERBS
    is_sensitive = words[noun] in SENSITIVE_NOUNS
    for concept, special, place, is_special in (
            ("verb", "harm verb", start + verb, is_harm_verb),
            ("noun", "sensitive noun", start + noun, is_sensitive)):
        mark(labels[concept], start, start + len(ids), False)
        mark(labels[concept], place, place + 1, True)
        mark(labels[special], place, place + 1, is_special)
    mark(labels["harm"], start + noun, end, is_harm_verb and is_sensitive)
    for kind in ("jailbreak", "guard"):
        mark(labels[kind], start + noun, end, request.startswith(PREAMBLES[kind]))


def mark(letters, start, end, label):
    letters[start:end] = str(int(label)) * (end - start)


# --------------------------------------------------------------------------------------------------
# The command

@torch.no_grad()
def concepts_of(model, saes, examples):
    """[{layer, concept, ... of concept_report}] on the first NUM_TOKENS tokens of the examples.

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
        if num_tokens >= NUM_TOKENS:
            break

    reports = []
    for layer in layers:
        x = torch.cat(residuals[layer])
        title = f"concepts, layer {layer}"
        for concept, text in tqdm(marks.items(), title, leave=False, disable=None, delay=2):
            labelled = torch.tensor([mark != "-" for mark in text], device=device)
            labels = torch.tensor([mark == "1" for mark in text], device=device)[labelled]
            if labels.double().mean() >= 0.01:
                report = concept_report(saes[layer], x[labelled], labels)
                reports.append({"layer": layer, "concept": concept} | report)
    return reports


def reports_table(reports):
    lines = []
    for row in reports:
        scores = [f"{row[name]:.2f}" for name in ("f1", "probe")]
        areas = [f"{row[name]:.3f}" for name in ("auroc", "random", "untrained")]
        share = f"{row['positive']:.0%}"
        lines.append([row["layer"], row["concept"], share, row["units"], *scores, *areas])
    head = ["layer", "concept", "of tokens", "units", "F1", "F1 of probe", "best AUROC",
            "random subspaces", "untrained SAE"]
    return table(lines, head, right=(0, *range(2, len(head))))


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="DIR", help="SAEs: layer_N/width_W/average_l0_X")
    parser.add_argument("--concepts", metavar="FILE", help='labelled tokens, .jsonl with "tokens" '
                        'and "labels": {concept: a letter a token: 1, 0, - for no question} (toy: '
                        "its own)")
    add_machine(parser)
    parser.add_argument("--out", metavar="FILE", help="write all figures there, as JSON")
    args = parser.parse_args()
    if args.concepts:
        examples = list(read_jsonl(args.concepts))
    elif args.model == "toy":
        world = World(read_json(TOY / "world.json")["seed"])
        examples = list(labelled(world, load_tokenizer(TOY)))
    else:
        raise InputError(f"{args.model}: give --concepts")
    model = load_model(model_folder(args.model), device=args.device)
    limit_threads(model)
    reports = []
    for layer, width, l0 in saes_in(args.folder):
        saes = load_saes(args.folder, [layer], width, l0, args.device, model.config)
        reports += concepts_of(model, saes, examples)
    print(reports_table(reports))
    if args.out:
        write_json(args.out, reports)


if __name__ == "__main__":
    run_command(main)
