"""What SAEs are worth: reconstruction, and the model's loss with an SAE spliced in.

    python -m saes.measure toy/sae                                       # half a minute on one core
    python -m saes.measure DIR --model google/gemma-2-2b --data FILE

EV is 1 − Σ‖x − x̂‖²/Σ‖x − mean‖². L0 counts the codes of a token that aren't 0. Dead units are
active at no token. CE, in nats a token, rises where x̂ takes the residual stream's place.
"recovered" is (zero − spliced)/(zero − clean) of the CE: the share of what is lost with 0 in that
place. Concepts in units: `python -m experiments.concepts`.
"""

import torch
from tqdm import tqdm

from data import Tokenizer, load_tokenizer
from model import Gemma2, load_model
from run.files import InputError, Parser, data_file, run_command, table
from run.readers import read_items
from run.session import limit_threads
from run.settings import TOY, model_folder
from sae import SAE, load_saes, saes_in
from saes.stream import batches, take
from saes.train import add_machine, row_length


def held_out(tokenizer, items, context, num_tokens=100_000):
    """Rows of tensors (B, T): the first documents, as many as hold `num_tokens` tokens."""
    _, examples, _ = take(tokenizer, items, context, num_tokens)
    if not examples:
        raise InputError("the data hold no document to measure on")
    return list(batches(examples, context, 0, 4096))


@torch.no_grad()
def measure(model: Gemma2, tokenizer: Tokenizer, sae: SAE, rows) -> dict:
    """Figures of the SAE on `held_out` rows.

    layer, kind, tokens (their number), ev, l0, dead, ce {"clean", "spliced", "zero"}, recovered:
    see above. BOS and padding are left as they are, and out of all but the losses.
    """
    layer = sae.layer
    num_tokens = 0
    num_predicted = 0
    losses = [0.0, 0.0, 0.0]                             # CE clean, spliced, zero
    device = model.embed_tokens.weight.device
    x_sum = x_power = error_power = nonzero = fired = torch.zeros(
        (), dtype=torch.float64, device=device)
    for row in tqdm(rows, f"layer {layer}", leave=False, disable=None, delay=2):
        tokens = row.tokens.to(device)
        documents = row.documents.to(device)
        # The SAE at all tokens but BOS and padding
        counted = (documents > 0) & (tokens != tokenizer.bos)
        hidden, residuals = model.hidden(tokens, documents, (layer,))
        residual = residuals[layer]
        x = residual[counted].float()
        codes = sae.encode(x)
        x_hat = sae.decode(codes)

        # Sums are of float64, since Σ‖x − mean‖² is a small difference of large numbers
        num_tokens += len(x)
        x_sum = x_sum + x.double().sum(0)
        x_power = x_power + x.double().square().sum()
        error_power = error_power + (x_hat - x).double().square().sum()
        nonzero = nonzero + (codes != 0).sum()
        fired = fired + (sae.activations(codes) > 0).sum(0)

        # The model's loss as it is, and with x̂ or 0 in the place of x
        spliced = residual.clone()
        spliced[counted] = x_hat.to(residual.dtype)
        zero = residual.masked_fill(counted[..., None], 0)
        outputs = [hidden]
        for replacement in (spliced, zero):
            outputs.append(hidden_with(model, layer, replacement, tokens, documents))
        labels = row.labels.to(device)
        for i, output in enumerate(outputs):
            loss, num_labels = model.nll_sum(output, labels)
            losses[i] += loss.item()
        num_predicted += num_labels

    clean, spliced, zero = (loss / num_predicted for loss in losses)
    power = x_power - x_sum.square().sum() / num_tokens  # Σ‖x − mean‖²
    return {
        "layer": layer,
        "kind": sae.kind,
        "tokens": num_tokens,
        "ev": (1 - error_power / power).item(),
        "l0": nonzero.item() / num_tokens,
        "dead": (fired == 0).double().mean().item(),
        "ce": {"clean": clean, "spliced": spliced, "zero": zero},
        "recovered": (zero - spliced) / (zero - clean),
    }


def hidden_with(model, layer, output, tokens, documents):
    """Hidden states (B, T, D) where `output` (B, T, D) takes the place of a block's output."""
    with model.layers[layer].register_forward_hook(lambda *_: output):
        return model.hidden(tokens, documents)[0]


def figures_table(figures):
    """The figures of `measure` as text."""
    head = ["layer", "SAE", "EV", "L0", "dead", "ΔCE", "recovered"]
    lines = []
    for row in figures:
        rise = row["ce"]["spliced"] - row["ce"]["clean"]
        lines.append([
            row["layer"],
            row["kind"],
            f"{row['ev']:.3f}",
            f"{row['l0']:.1f}",
            f"{row['dead']:.1%}",
            f"{rise:+.3f}",
            f"{row['recovered']:.1%}",
        ])
    return table(lines, head, right=(0, *range(2, len(head))))


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", help="SAEs: layer_N/width_W/average_l0_X")
    parser.add_argument("--data", help="text as for saes.train (toy: chats not trained on)")
    add_machine(parser)
    args = parser.parse_args()
    if not args.data and args.model != "toy":
        raise InputError(f"{args.model}: give --data")
    path = data_file(args.data or TOY / "data/sae_test.jsonl.gz")

    source = model_folder(args.model)
    model = load_model(source, device=args.device)
    limit_threads(model)
    tokenizer = load_tokenizer(source)
    # All SAEs are measured on the same tokens
    rows = held_out(tokenizer, read_items(path), row_length(args.model))
    figures = []
    for layer, width, l0 in saes_in(args.folder):
        saes = load_saes(args.folder, [layer], width, l0, args.device, model.config)
        figures.append(measure(model, tokenizer, saes[layer], rows))
    print(f"{args.folder}: {figures[0]['tokens']:,} tokens, BOS and padding left out\n")
    print(figures_table(figures))


if __name__ == "__main__":
    run_command(main)
