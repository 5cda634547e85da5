"""Train sparse autoencoders on the residual stream of any Gemma-2.

    python -m saes.train                                        # the toy's layers 1 2 3, a minute
    python -m saes.train --architecture sasa --block 4 --l0 12  # features that are subspaces
    python -m saes.train --model google/gemma-2-2b --layers 12 --data FILE --token-count 2e8
    python -m saes.measure DIR                                  # what came out is worth

jumprelu    a threshold a feature; L0 is pulled to --l0                        (arXiv 2407.14435)
batchtopk   the --l0 · batch largest of a batch stay; written as a JumpReLU    (arXiv 2412.06410)
sasa        signed blocks; the --l0 / --block strongest of a token stay        (arXiv 2606.06333)

Writes DIR/layer_N/width_W/average_l0_X/params.npz in Gemma Scope's layout (sasa.safetensors and
sasa.json for sasa); `train.py --sae DIR` takes them. Ctrl-C or a crash costs at most the steps
since the last checkpoint: the same command with the same --out goes on to the same numbers, bit for
bit on a CPU.
"""

import functools
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import load_tokenizer
from model import load_model
from run import parallel
from run.files import (InputError, Parser, data_file, is_new, read_json, run_command,
                       write_json)
from run.readers import read_items
from run.session import (Log, Signals, Stopped, limit_threads, read_checkpoint, run_folder,
                         write_checkpoint)
from run.settings import TOY, model_folder
from sae import save_sae, save_sasa
from saes.step import SASA_NUCLEAR, Spec, Trainer
from saes.stream import stream

SAVE_EVERY = 1000  # steps between checkpoints
LOG_EVERY = 10     # steps between lines of metrics.jsonl
BUFFER = 64        # batches whose activations are shuffled at once
TOY_DEFAULTS = {
    "layers": [1, 2, 3],
    "data": str(TOY / "data/sae_train.jsonl.gz"),
    "token_count": 1e6,
    "width": 512,
    "l0": 12,
    "batch": 2048,
}


# --------------------------------------------------------------------------------------------------
# Training

class Training:
    """Trains one SAE for each layer of a stream, all on the same tokens.

        training = Training(buffers, spec, steps=500, batch=2048, seed=0)
        for metrics in training: ...       # {layer: {"loss", "ev", "l0", "dead"}} after each step

    buffers(cursor): an iterator of (cursor after it, {layer: activations (n, D)}), as `stream`.
    """
    POSITION = ("step", "cursor", "chunk", "offset")  # of the next step: see __init__

    def __init__(self, buffers, spec, steps, batch, seed):
        self.buffers = buffers
        self.spec = spec
        self.steps = steps
        self.batch = batch
        self.seed = seed
        self.step = 0    # steps done
        self.cursor = 0  # documents before this buffer
        self.chunk = 0   # the buffer's number
        self.offset = 0  # batches taken of it
        self.trainers = {}  # one of each layer, and the scale of its inputs
        self.scale = {}

    def __iter__(self):
        for after, activations in self.buffers(self.cursor):
            if not self.trainers:
                self._begin(activations)

            # Deal the shuffled buffer; what is left of it after the last whole batch is dropped
            size = len(next(iter(activations.values())))
            # The order hangs on seed and buffer alone, so that a resumed training has the same
            draw = torch.Generator().manual_seed(1000003 * self.seed + self.chunk)
            order = torch.randperm(size, generator=draw)
            while self.step < self.steps and self.offset < size // self.batch:
                start = self.offset * self.batch
                rows = order[start:start + self.batch]
                metrics = {}
                for layer, x in activations.items():
                    x = x[rows.to(x.device)].float() / self.scale[layer]
                    metrics[layer] = self.trainers[layer].step(x, self.step / self.steps)
                self.step += 1
                self.offset += 1
                yield metrics
            if self.step == self.steps:
                return
            self.cursor = after
            self.chunk += 1
            self.offset = 0

    def _begin(self, activations):
        """Make the trainers, for inputs scaled to power 1 about their mean."""
        for layer, x in activations.items():
            x = x.float()
            mean = x.mean(0)
            self.scale[layer] = (x - mean).square().sum(1).mean().sqrt()
            self.trainers[layer] = self._trainer(mean / self.scale[layer])

    def _trainer(self, mean):
        return Trainer(self.spec, mean, torch.Generator().manual_seed(self.seed))

    def save(self, folder):
        """Write all that the next step depends on as the folder's checkpoint.

        Raises InputError where training has diverged; the checkpoint before stays.
        """
        tensors = {}
        for layer, trainer in self.trainers.items():
            tensors[f"{layer}.scale"] = self.scale[layer]
            for name, tensor in trainer.state().items():
                tensors[f"{layer}.{name}"] = tensor
        # A checkpoint with NaN would overwrite the last one that can still be trained on
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise InputError(f"step {self.step}: training has diverged: give a lower --lr; the "
                             f"checkpoint before stays in {folder}")
        metadata = {name: str(getattr(self, name)) for name in self.POSITION}
        metadata["threads"] = str(torch.get_num_threads())  # on which sums depend
        write_checkpoint(folder, tensors, metadata)

    def load(self, folder, device="cpu"):
        """Put back what `save` wrote, if it did."""
        checkpoint = read_checkpoint(folder)
        if checkpoint is None:
            return
        tensors, metadata = checkpoint
        for name in self.POSITION:
            setattr(self, name, int(metadata[name]))
        torch.set_num_threads(int(metadata["threads"]))
        # Names are LAYER.NAME
        states: dict[int, dict] = {}
        for name, tensor in tensors.items():
            layer, _, key = name.partition(".")
            states.setdefault(int(layer), {})[key] = tensor.to(device)
        # Trainers are made anew, and their beginnings overwritten
        for layer, state in sorted(states.items()):
            self.scale[layer] = state.pop("scale")
            self.trainers[layer] = self._trainer(state["b_dec"])
            self.trainers[layer].restore(state)

    def write(self, folder):
        """Write the SAEs in sae.py's layout."""
        spec = self.spec
        for layer, trainer in self.trainers.items():
            arrays = trainer.arrays(self.scale[layer])
            if spec.architecture == "sasa":
                save_sasa(folder, layer, **arrays, block=spec.block, active=spec.active,
                          nuclear=spec.nuclear)
            else:
                # The L0 of a JumpReLU is near its target; the others' is given
                l0 = trainer.mean["l0"].item() if spec.architecture == "jumprelu" else spec.l0
                save_sae(folder, layer, l0, **arrays)


# --------------------------------------------------------------------------------------------------
# Settings

def row_length(model):
    """Tokens of a row, in training and measuring; longer documents are split."""
    return 96 if model == "toy" else 1024


def add_machine(parser):
    """--model and --device."""
    device = parallel.default_device()
    parser.add_argument("--model", default="toy",
                        help="toy, a hub repository, or a folder (default toy)")
    parser.add_argument("--device", type=parallel.check_device, default=device,
                        help="cpu, cuda, … (default: cuda where there is one)")


def parse_settings():
    """(settings, --out), checked: flags, else defaults. Raises InputError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add_machine(parser)
    add("--layers", type=int, nargs="+",
        help="blocks after which the residual stream is read (toy: 1 2 3)")
    add("--data", help='text (.txt, a document a line; .jsonl with "text"), pairs ("chosen" and '
        '"rejected") or chats ("prompt" and "response", or "messages"), plain or .gz, also '
        "hf://datasets/OWNER/NAME/PATH (toy: its own chats)")
    add("--token-count", type=float, default=2e8,
        help="tokens to train on; the data come again where they have fewer (default 2e8; toy 1e6)")
    add("--architecture", choices=("batchtopk", "jumprelu", "sasa"), default="batchtopk",
        help="see above (default batchtopk)")
    add("--width", type=int, default=16384, help="features F (default 16384; toy 512)")
    add("--l0", type=int, default=80,
        help="coefficients a token that stay, on average; sasa: exactly (default 80; toy 12)")
    add("--block", type=int, help="sasa: features of a block (default 4)")
    add("--nuclear", type=float, help="sasa: weight λ of mean ‖D_k‖_*, relative to the input's "
        f"power E‖x − mean‖² (default {SASA_NUCLEAR}; the authors' 100 is for GPT-2's, absolute; "
        "0: none)")
    add("--batch", type=int, default=4096,
        help="tokens of a step (default 4096; toy 2048)")
    add("--lr", type=float,
        help="peak learning rate of Adam (default 2e-3·√(512/F), for sasa twice that)")
    add("--seed", type=int, default=0, help="of weights and order (default 0)")
    add("--out", help="where to write (default runs/TIME-sae-MODEL); an unfinished "
        "training of the same settings there goes on")

    # The model is parsed first, since other defaults hang on it
    args, _ = parser.parse_known_args()
    if args.model == "toy":
        parser.set_defaults(**TOY_DEFAULTS)
    settings = parser.parse_args()
    out = vars(settings).pop("out")
    if not settings.layers or not settings.data:
        raise InputError(f"{settings.model}: give --layers and --data")
    # Blocks are SASA's; the others have blocks of one
    is_sasa = settings.architecture == "sasa"
    if not is_sasa and (settings.block or settings.nuclear):
        raise InputError("--block and --nuclear belong to --architecture sasa")
    settings.block = (settings.block or 4) if is_sasa else 1
    if settings.nuclear is None:
        settings.nuclear = SASA_NUCLEAR if is_sasa else 0.0
    width = settings.width
    l0 = settings.l0
    block = settings.block
    if width % block or l0 % block or not block <= l0 <= width:
        raise InputError(f"--l0 {l0}: give 1 to --width {width}; --block {block} must divide both")
    # Wider SAEs need smaller steps: the rate falls with the root of the width
    if settings.lr is None:
        settings.lr = 2e-3 * (2 if is_sasa else 1) * math.sqrt(512 / width)
    return settings, out


# --------------------------------------------------------------------------------------------------
# The command

def open_folder(folder, settings):
    """Write the config.json of a new training, or check that an unfinished one has its settings."""
    path = folder / "config.json"
    if is_new(folder):
        write_json(path, {"settings": vars(settings)})
    # Other settings would go on to numbers that no unbroken training has
    if not path.exists() or read_json(path).get("settings") != vars(settings):
        raise InputError(f"{folder} holds no training of these settings: give another --out")


def train(settings, model, tokenizer, folder, signals):
    """Train the SAEs of the settings in `folder`, from where it stands, and write them."""
    is_sasa = settings.architecture == "sasa"
    batch = settings.batch
    steps = max(1, int(settings.token_count / batch))
    dead_after = max(20 * batch, min(10_000_000, int(settings.token_count / 12)))
    spec = Spec(settings.architecture, settings.width, settings.l0, settings.block,
                settings.nuclear, settings.lr, warmup=0.2 if is_sasa else 0.05,
                dead_after=dead_after)
    open_folder(folder, settings)

    # The documents, their activations, and the training where the last session left it
    items = functools.partial(read_items, data_file(settings.data))
    buffers = functools.partial(stream, model, tokenizer, items, settings.layers, BUFFER * batch,
                                row_length(settings.model))
    training = Training(buffers, spec, steps, batch, settings.seed)
    training.load(folder, settings.device)
    if training.step:
        print(f"going on at step {training.step:,} of {steps:,}")
    log = Log(folder / "metrics.jsonl")
    log.keep(training.step)

    # From here on Ctrl-C waits for the end of a step
    bar = tqdm(total=steps * batch, initial=training.step * batch, unit=" tokens", unit_scale=True,
               leave=False, disable=None)
    signals.wait = True
    for metrics in training:
        bar.update(batch)
        step = training.step
        stop = signals.caught
        # Reading metrics waits for the device, so only now and then
        if step % LOG_EVERY == 0 or step == steps:
            layers = {}
            for layer, values in metrics.items():
                layers[layer] = {name: value.item() for name, value in values.items()}
            log.add({"step": step, "layers": layers})
        if step % SAVE_EVERY == 0 or step == steps or stop:
            training.save(folder)
        if stop:
            raise Stopped(stop)
    bar.close()

    # The SAEs are written last: a folder that holds them is finished
    training.write(folder)
    print(f"wrote {folder}: `python -m saes.measure` shows what the SAEs are worth")


def main():
    settings, out = parse_settings()
    source = model_folder(settings.model)
    model = load_model(source, device=settings.device)
    num_layers = model.config.num_hidden_layers
    if not set(settings.layers) <= set(range(num_layers)):
        raise InputError(f"--layers {settings.layers}: the model's are 0 to {num_layers - 1}")
    # Small matrices are slower on several threads
    limit_threads(model)
    tokenizer = load_tokenizer(source)
    folder = run_folder(out, f"sae-{Path(settings.model).name}")
    try:
        train(settings, model, tokenizer, folder, Signals())
    except Stopped as stop:
        print(f"\nstopped: the same command with --out {folder} goes on", file=sys.stderr)
        return 128 + stop.args[0]


if __name__ == "__main__":
    run_command(main)
