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
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from data import load_tokenizer, read_items
from model import load_model
from run.files import InputError, Parser, data_file, is_new, read_json, run_command, write_json
from run.session import (Log, Signals, Stopped, limit_threads, read_checkpoint, run_folder,
                         write_checkpoint)
from run.settings import RECIPES, check_device, model_folder
from sae import save_sae, save_sasa
from saes.step import Spec, Trainer
from saes.stream import Stream

# --------------------------------------------------------------------------------------------------
# Training

class Training:
    """Trains one SAE for each layer of a stream, all on the same tokens.

        training = Training(stream, spec, steps=500, batch=2048, seed=0)
        for metrics in training: ...       # {layer: {"loss", "ev", "l0", "dead"}} after each step
    """
    POSITION = ("step", "cursor", "chunk", "offset")  # of the next step: see __init__

    def __init__(self, stream, spec, steps, batch, seed):
        self.stream, self.spec, self.steps, self.batch, self.seed = stream, spec, steps, batch, seed
        # Steps done; documents before this buffer, the buffer's number, batches taken of it
        self.step, self.cursor, self.chunk, self.offset = 0, 0, 0, 0
        self.trainers, self.scale = {}, {}

    def __iter__(self):
        while self.step < self.steps:
            after, activations = self.stream(self.cursor)
            size = len(next(iter(activations.values())))
            if size < self.batch:
                raise InputError(f"a buffer of {size:,} tokens holds no batch of {self.batch:,}: "
                                 "raise --buffer")
            if not self.trainers:
                self._begin(activations)
            # Deal the shuffled buffer
            draw = torch.Generator().manual_seed(1000003 * self.seed + self.chunk)
            order = torch.randperm(size, generator=draw)
            while self.offset < size // self.batch:
                rows = order[self.offset * self.batch:(self.offset + 1) * self.batch]
                metrics = {}
                for layer, x in activations.items():
                    x = x[rows.to(x.device)].float() / self.scale[layer]
                    metrics[layer] = self.trainers[layer].step(x, self.step / self.steps)
                self.step, self.offset = self.step + 1, self.offset + 1
                yield metrics
                if self.step == self.steps:
                    return
            self.cursor, self.chunk, self.offset = after, self.chunk + 1, 0

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
            for name, tensor in (trainer.state() | {"scale": self.scale[layer]}).items():
                if not tensor.isfinite().all():
                    raise InputError(f"step {self.step}, layer {layer}: {name} isn't finite; the "
                                     f"checkpoint before stays in {folder}: give a lower --lr")
                tensors[f"{layer}.{name}"] = tensor
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
        states: dict[int, dict] = {}
        for name, tensor in tensors.items():
            layer, _, key = name.partition(".")
            states.setdefault(int(layer), {})[key] = tensor.to(device)
        for layer, state in sorted(states.items()):
            self.scale[layer] = state.pop("scale")
            self.trainers[layer] = self._trainer(state["b_dec"])
            self.trainers[layer].restore(state)

    def write(self, folder):
        """Write the SAEs in sae.py's layout. {layer: path}."""
        spec, paths = self.spec, {}
        for layer, trainer in self.trainers.items():
            arrays = trainer.arrays(self.scale[layer])
            if spec.architecture == "sasa":
                paths[layer] = save_sasa(folder, layer, **arrays, block=spec.block,
                                         active=spec.active, about={"nuclear": spec.nuclear})
            else:
                is_mean = spec.architecture == "jumprelu"
                l0 = trainer.mean["l0"].item() if is_mean else spec.l0
                paths[layer] = save_sae(folder, layer, l0, **arrays)
        return paths


# --------------------------------------------------------------------------------------------------
# Settings

TOY_DATA = Path(model_folder("toy")) / "data"
SETTINGS = {  # name: (default, the toy's default, help)
    "model": ("toy", None, "toy, a hub repository, or a folder (default toy)"),
    "layers": (None, [1, 2, 3], "blocks after which the residual stream is read (toy: 1 2 3)"),
    "data": (None, str(TOY_DATA / "sae_train.jsonl.gz"), 'text (.txt, a document a line; .jsonl '
             'with "text"), pairs ("chosen" and "rejected") or chats ("prompt" and "response", or '
             '"messages"), plain or .gz, also hf://datasets/OWNER/NAME/PATH (toy: its own chats)'),
    "token_count": (2e8, 1e6, "tokens to train on; the data come again where they have fewer"),
    "context": (1024, 96, "tokens of a row; longer documents are split"),
    "buffer": (1 << 18, 1 << 17, "tokens whose activations are shuffled at once"),
    "architecture": ("batchtopk", None, "see above (default batchtopk)"),
    "width": (16384, 512, "features F"),
    "l0": (80, 12, "coefficients a token that stay, on average; sasa: exactly"),
    "block": (None, None, "sasa: features of a block (default 4)"),
    "nuclear": (0.0, None, "sasa: weight of mean ‖D_k‖_*, relative to the input's power; 0: none"),
    "batch": (4096, 2048, "tokens of a step"),
    "lr": (None, None, "peak learning rate of Adam (default 2e-3·√(512/F), for sasa twice that)"),
    "save_every": (1000, None, "steps between checkpoints"),
    "seed": (0, None, "of weights and order"),
    "device": (None, None, "cpu, cuda, … (default: cuda where there is one)"),
    "dtype": (None, None, "of the model (default: float32 on a CPU, else bfloat16)"),
}
KINDS = {  # of those that their default doesn't show
    "layers": {"type": int, "nargs": "+", "metavar": "N"},
    "architecture": {"choices": ("batchtopk", "jumprelu", "sasa")},
    "block": {"type": int, "metavar": "N"}, "lr": {"type": float, "metavar": "LR"},
    "dtype": {"choices": ("float32", "bfloat16")},
}


def add_flags(parser, names=tuple(SETTINGS)):
    """The flags of some settings, without argparse's defaults: a toy's differ from the others."""
    for name in names:
        default, toy, text = SETTINGS[name]
        kind = KINDS.get(name, {})
        if isinstance(default, int | float):
            kind = {"type": type(default), "metavar": "N"}
            toys = f"; toy {toy:,.9g}" if toy else ""
            text += f" (default {default:,.9g}{toys})"
        parser.add_argument("--" + name.replace("_", "-"), help=text, **kind)


def resolve(args) -> SimpleNamespace:
    """The settings, checked: flags, else the toy's or the recipe's values, else the defaults."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    model = given.get("model", "toy")
    recipe = {name: RECIPES[model][name] for name in ("layers", "data") if model in RECIPES}
    values = {}
    for name, (default, toy, _) in SETTINGS.items():
        default = toy if model == "toy" and toy else recipe.get(name, default)
        values[name] = given.get(name, default)
    settings = SimpleNamespace(**values)
    if not settings.layers or not settings.data:
        raise InputError(f"{model}: give --layers and --data")
    choose_machine(settings)

    # Blocks are SASA's; the others have blocks of one
    is_sasa = settings.architecture == "sasa"
    if not is_sasa and (settings.block or settings.nuclear):
        raise InputError("--block and --nuclear belong to --architecture sasa")
    settings.block = (settings.block or 4) if is_sasa else 1
    width, l0, block = settings.width, settings.l0, settings.block
    if width % block or l0 % block or not block <= l0 <= width:
        raise InputError(f"--l0 {l0}: give 1 to --width {width}; --block {block} must divide both")
    settings.token_count = int(settings.token_count)
    if settings.token_count < settings.batch:
        raise InputError(f"--token-count {settings.token_count}: give --batch or more")
    if settings.lr is None:
        settings.lr = 2e-3 * (2 if is_sasa else 1) * math.sqrt(512 / width)
    return settings


def choose_machine(settings):
    """Fill in device and dtype where they aren't given. Raises InputError."""
    if settings.device is None:
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(settings.device)
    if settings.dtype is None:
        settings.dtype = "float32" if settings.device == "cpu" else "bfloat16"


# --------------------------------------------------------------------------------------------------
# The command

def open_folder(folder, settings, spec):
    """Write the config.json of a new training, or check that an unfinished one has its settings."""
    path = folder / "config.json"
    if not path.exists():
        if not is_new(folder):
            raise InputError(f"{folder} is there and holds no run: give another --out")
        write_json(path, {"settings": vars(settings), "spec": asdict(spec)})
        return
    last_file = "sasa.json" if settings.architecture == "sasa" else "params.npz"
    if all(any(folder.glob(f"layer_{layer}/*/*/{last_file}")) for layer in settings.layers):
        raise InputError(f"{folder} holds finished SAEs, which are never overwritten: give another "
                         "--out")
    for name, value in read_json(path)["settings"].items():
        if value != getattr(settings, name):
            raise InputError(f"{folder} holds an unfinished run with another "
                             f"--{name.replace('_', '-')}: give another --out")


def train(settings, model, tokenizer, folder, signals):
    """Train the SAEs of the settings in `folder`, from where it stands, and write them."""
    spec = Spec(settings.architecture, settings.width, settings.l0, settings.block,
                settings.nuclear, settings.lr,
                warmup=0.2 if settings.architecture == "sasa" else 0.05,
                dead_after=max(20 * settings.batch, min(10_000_000, settings.token_count // 12)))
    open_folder(folder, settings, spec)
    items = functools.partial(read_items, data_file(settings.data))
    stream = Stream(model, tokenizer, items, settings.layers, settings.buffer, settings.context)
    batch, steps = settings.batch, settings.token_count // settings.batch
    training = Training(stream, spec, steps, batch, settings.seed)
    training.load(folder, settings.device)
    if training.step:
        print(f"going on at step {training.step:,} of {steps:,}")
    log = Log(folder / "metrics.jsonl")
    log.keep(training.step)

    bar = tqdm(total=steps * batch, initial=training.step * batch, unit=" tokens", unit_scale=True,
               leave=False, disable=None)
    signals.wait = True
    for metrics in training:
        bar.update(batch)
        step, stop = training.step, signals.caught
        # Reading metrics waits for the device, so only now and then
        if step % max(1, min(50, steps // 100)) == 0 or step == steps:
            layers = {}
            for layer, values in metrics.items():
                layers[layer] = {name: value.item() for name, value in values.items()}
            log.add({"step": step, "layers": layers})
            bar.set_postfix_str("; ".join(progress(*item) for item in layers.items()))
        if step % settings.save_every == 0 or step == steps or stop:
            training.save(folder)
        if stop:
            raise Stopped(stop)
    bar.close()
    for layer, path in training.write(folder).items():
        print(f"{progress(layer, training.trainers[layer].mean)}: {path}")


def progress(layer, metrics):
    ev, l0, dead = (float(metrics[name]) for name in ("ev", "l0", "dead"))
    return f"layer {layer}: EV {ev:.3f}, L0 {l0:.1f}, dead {dead:.1%}"


def main():
    parser = Parser(__doc__)
    add_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write (default runs/TIME-sae-MODEL);"
                        " an unfinished training of the same settings there goes on")
    args = parser.parse_args()
    settings = resolve(args)
    source = model_folder(settings.model)
    model = load_model(source, getattr(torch, settings.dtype), settings.device)
    last_layer = model.config.num_hidden_layers - 1
    if not 0 <= min(settings.layers) <= max(settings.layers) <= last_layer:
        raise InputError(f"--layers {settings.layers}: the model's are 0 to {last_layer}")
    limit_threads(sum(parameter.numel() for parameter in model.parameters()))
    tokenizer = load_tokenizer(source)
    folder = run_folder(args.out, f"sae-{Path(settings.model).name}")
    try:
        train(settings, model, tokenizer, folder, Signals())
    except Stopped as stop:
        print(f"\nstopped by {signal.Signals(stop.args[0]).name}: the same command with "
              f"--out {folder} goes on", file=sys.stderr)
        return 128 + stop.args[0]


if __name__ == "__main__":
    run_command(main)
