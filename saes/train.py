"""Train sparse autoencoders on the residual stream of any Gemma-2, measure them, and see what they can and can't recover.

    python sae_train.py                                                   # the toy's layers 1 2 3, about a minute on 2 cores
    python sae_train.py --architecture sasa --block 4 --l0 12             # features that are subspaces, in blocks of 4
    python sae_train.py --model google/gemma-2-2b --layers 12 --data FILE --token-count 2e8    # needs a GPU
    python sae_train.py --evaluate toy/sae                                # explained variance, loss spliced in, absorption, ...
    python sae_train.py --demo                                            # planted subspaces, under three minutes

jumprelu    a threshold a feature, learned through a straight-through estimator; L0 pulled to --l0  (arXiv 2407.14435)
batchtopk   the --l0 · batch largest activations of a batch stay; written as a JumpReLU               (arXiv 2412.06410)
sasa        signed blocks of --block features, the --l0 / --block strongest of a token stay           (arXiv 2606.06333)

Writes DIR/layer_N/width_W/average_l0_X/params.npz (Gemma Scope's layout; sasa.safetensors and sasa.json for sasa), so
`train.py --sae DIR` takes what comes out. Ctrl-C or a crash costs at most the steps since the last checkpoint: the same
command with the same --out goes on to the same numbers, bit by bit on a CPU.
"""

import functools
import itertools
import math
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import data
from run import settings as recipe
from data import Tokenizer, load_tokenizer
from data import read_items
from run.files import InputError, Parser, data_file, is_new, read_json, read_metadata, read_tensors, run_command, sweep, write_json
from model import load_model
from sae import save_sae, save_sasa
from saes.step import Spec, Trainer
from run.session import CHECKPOINT, Lock, Log, Signals, Stopped, mend_checkpoint, run_folder, write_checkpoint

# ---------------------------------------------------------------------------------------------------------------
# Activations, streamed

def encode_item(tokenizer: Tokenizer, item, context: int) -> list[list[int]]:
    """Token lists of at most `context` tokens, BOS first: one, or several where the document is longer."""
    if isinstance(item, str):
        ids = tokenizer.encode(item)
    else:
        ids = data.prompt_tokens(tokenizer, item[:-1])[1:] + tokenizer.encode(item[-1][1].strip()) + [tokenizer.end_of_turn]
    return [[tokenizer.bos, *ids[at:at + context - 1]] for at in range(0, len(ids), context - 1)]


class Stream:
    """Activations of as many documents as fill a buffer: stream(cursor) -> (cursor after them, {layer: (n, D)}), a pure
    function of the cursor, the number of documents taken before. Its model stops at the deepest layer; BOS and pad are out.
    """

    def __init__(self, model, tokenizer, items, layers, buffer, context):
        """items(): an iterator over the documents, once through; buffer: tokens; context: tokens of a row."""
        self.model, self.tokenizer, self.items, self.layers = model, tokenizer, items, sorted(layers)
        self.buffer, self.context, self.at, self.rest = buffer, context, 0, None

    def _endless(self):
        while True:
            empty = True
            for item in self.items():
                empty = False
                yield item
            if empty:
                raise InputError("the data hold no document to train on")

    @torch.no_grad()
    def __call__(self, cursor):
        if self.rest is None or self.at != cursor:                                   # go there, from the beginning
            self.rest, self.at = itertools.islice(self._endless(), cursor, None), cursor
        examples, count = [], 0
        while count < self.buffer:
            for ids in encode_item(self.tokenizer, next(self.rest), self.context):
                examples.append(data.Example(ids, 1, True))
                count += len(ids) - 1
            self.at += 1
            if self.at - cursor > 100 + 100 * self.buffer:
                raise InputError("the data hold documents without text only")
        weight = self.model.embed_tokens.weight
        out = {layer: torch.empty(count, weight.shape[1], dtype=weight.dtype, device=weight.device) for layer in self.layers}
        rows, size, filled = data.pack(examples, self.context, 0, cursor), max(1, FORWARD_TOKENS // self.context), 0
        for first in tqdm(range(0, len(rows), size), "activations", leave=False, disable=None, delay=2):
            batch = rows[first:first + size]
            tokens, documents = (torch.stack([getattr(row, name) for row in batch]).to(weight.device) for name in ("tokens", "documents"))
            _, residuals = self.model.hidden(tokens, documents, capture=self.layers, stop_after=self.layers[-1])
            seen = (documents > 0) & (tokens != self.tokenizer.bos)
            for layer in self.layers:
                part = residuals[layer][seen]
                out[layer][filled:filled + len(part)] = part
            filled += len(part)
        return self.at, {layer: values[:filled] for layer, values in out.items()}


FORWARD_TOKENS = 8192        # of one forward pass


class Training:
    """Trains one SAE for each layer of a stream, all on the same tokens.

        training = Training(stream, spec, steps=500, batch=2048, seed=0)
        for metrics in training: ...       # {layer: {"ev", "l0", "dead", "loss"}} after each step
    """

    def __init__(self, stream, spec, steps, batch, seed):
        self.stream, self.spec, self.steps, self.batch, self.seed = stream, spec, steps, batch, seed
        self.step, self.cursor, self.chunk, self.offset = 0, 0, 0, 0                 # where the next step stands
        self.trainers, self.scale = {}, {}

    def __iter__(self):
        while self.step < self.steps:
            after, chunk = self.stream(self.cursor)
            size = len(next(iter(chunk.values())))
            if size < self.batch:
                raise InputError(f"a buffer of {size:,} tokens holds no batch of {self.batch:,}: raise --buffer")
            for layer, x in chunk.items() if not self.trainers else ():
                self._begin(layer, x)
            order = torch.randperm(size, generator=torch.Generator().manual_seed(1000003 * self.seed + self.chunk))
            for self.offset in range(self.offset, size // self.batch):
                rows, metrics = order[self.offset * self.batch:(self.offset + 1) * self.batch], {}
                for layer, x in chunk.items():
                    metrics[layer] = self.trainers[layer].step(x[rows.to(x.device)].float() / self.scale[layer], self.step / self.steps)
                self.step, self.offset = self.step + 1, self.offset + 1
                yield metrics
                if self.step == self.steps:
                    return
            self.cursor, self.chunk, self.offset = after, self.chunk + 1, 0

    def _begin(self, layer, x):
        x = x.float()
        mean = x.mean(0)
        self.scale[layer] = (x - mean).square().sum(1).mean().sqrt()                 # inputs of power 1 about their mean
        self.trainers[layer] = Trainer(self.spec, mean / self.scale[layer], torch.Generator().manual_seed(self.seed))

    def save(self, folder):
        """Write all that the next step depends on as the folder's checkpoint. Raises InputError where training has diverged."""
        tensors = {f"{layer}.{name}": tensor for layer, trainer in self.trainers.items()
                   for name, tensor in (trainer.state() | {"scale": self.scale[layer]}).items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise InputError(f"step {self.step}: {name} holds values that are no numbers; the checkpoint before stays in "
                                 f"{folder}: give a lower --lr, and another --out")
        write_checkpoint(folder, tensors, {"threads": str(torch.get_num_threads())} | {
            name: str(getattr(self, name)) for name in ("step", "cursor", "chunk", "offset")})

    def load(self, folder, device="cpu"):
        """Put back what `save` wrote."""
        path = folder / CHECKPOINT
        tensors, where = read_tensors(path, device), read_metadata(path)
        self.step, self.cursor, self.chunk, self.offset = (int(where[name]) for name in ("step", "cursor", "chunk", "offset"))
        torch.set_num_threads(int(where["threads"]))
        for layer in sorted({int(name.split(".")[0]) for name in tensors}):
            own = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
            self.scale[layer] = own.pop("scale")
            self.trainers[layer] = Trainer(self.spec, own["b_dec"], torch.Generator().manual_seed(self.seed))
            self.trainers[layer].restore(own)

    def write(self, folder):
        """Write the SAEs in sae.py's layout. {layer: path}."""
        paths = {}
        for layer, trainer in self.trainers.items():
            arrays, spec = trainer.arrays(self.scale[layer]), self.spec
            if spec.architecture == "sasa":
                paths[layer] = save_sasa(folder, layer, **arrays, block=spec.block, active=spec.active, about={"nuclear": spec.nuclear})
            else:
                l0 = trainer.mean["l0"].item() if spec.architecture == "jumprelu" else spec.l0
                paths[layer] = save_sae(folder, layer, l0, **arrays)
        return paths


# ---------------------------------------------------------------------------------------------------------------
# The command

ARCHITECTURES = ("batchtopk", "jumprelu", "sasa")
COMMON = {"architecture": "batchtopk", "width": 16384, "l0": 80, "block": None, "nuclear": 0.0, "token_count": 200_000_000,
          "batch": 4096, "buffer": 1 << 18, "context": 1024, "lr": None, "save_every": 1000, "seed": 0}
TOY = {"layers": [1, 2, 3], "width": 512, "l0": 12, "token_count": 1_000_000, "batch": 2048, "buffer": 1 << 17, "context": 96}


def add_flags(parser):
    def flag(group, name, help, default=None, **kind):
        default = COMMON.get(name.replace("-", "_"))
        toy = TOY.get(name.replace("-", "_"))
        if default is not None:
            shown = default if isinstance(default, str) else f"{default:g}" if isinstance(default, float) else f"{default:,}"
            help += f" (default {shown}; toy {toy:,})" if toy else f" (default {shown})"
        group.add_argument(f"--{name}", help=help, default=None, **kind)

    group = parser.add_argument_group("what to train on")
    flag(group, "model", "toy, a hub repository, or a folder (default toy)", metavar="NAME|DIR")
    flag(group, "layers", "blocks after which the residual stream is read (toy: 1 2 3)", type=int, nargs="+", metavar="N")
    flag(group, "data", "text (.txt, a document a line; .jsonl with \"text\"), HH-RLHF pairs, or chat pairs (.jsonl with \"prompt\" and "
         "\"response\"), also .gz and hf://datasets/OWNER/NAME/PATH (toy: its world's own conversations)", metavar="FILE")
    flag(group, "token-count", "tokens to train on; the file is read again where it has fewer", type=float, metavar="N")
    flag(group, "context", "tokens of a row; longer documents are split", type=int, metavar="T")
    flag(group, "buffer", "tokens whose activations are held and shuffled at once", type=int, metavar="N")
    group = parser.add_argument_group("the SAE")
    flag(group, "architecture", "see above", choices=ARCHITECTURES)
    flag(group, "width", "features", type=int, metavar="F")
    flag(group, "l0", "coefficients a token that stay, on average; sasa: exactly, L0/r blocks of r", type=int, metavar="L0")
    flag(group, "block", "sasa: features r of a block (default 4)", type=int, metavar="R")
    flag(group, "nuclear", "sasa: weight λ of mean ‖D_k‖_*, relative to the input's power; 0: none", type=float, metavar="λ")
    group = parser.add_argument_group("training")
    flag(group, "batch", "tokens of a step", type=int, metavar="N")
    flag(group, "lr", "peak learning rate of Adam (default 2e-3·√(512/F), for sasa twice that)", type=float, metavar="LR")
    flag(group, "save-every", "steps between checkpoints", type=int, metavar="N")
    flag(group, "seed", "of weights and order", type=int, metavar="N")
    group = parser.add_argument_group("machine and run")
    group.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="of the model; the SAE is float32 (default: float32 on a CPU, else bfloat16)")
    group.add_argument("--out", metavar="DIR", help="where to write; an unfinished training of the same settings there goes on (default "
                       "runs/TIME-sae-MODEL); with --evaluate a file for the figures, JSON")
    group = parser.add_argument_group("instead of training")
    group.add_argument("--evaluate", metavar="DIR", help="measure the SAEs in this folder (--model, --layers, --data as above)")
    group.add_argument("--demo", action="store_true", help="planted subspaces: what each architecture recovers, as a table and a figure")


def resolve(args):
    """The settings as a dict, checked. Raises InputError."""
    given = {name: value for name, value in vars(args).items() if value is not None and name not in ("out", "demo", "evaluate")}
    model = given.get("model", "toy")
    settings = {"model": model, "layers": None, "data": None} | COMMON | (TOY if model == "toy" else {}) | given
    settings["device"] = recipe.check_device(settings.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings["dtype"] = settings.get("dtype") or ("float32" if settings["device"] == "cpu" else "bfloat16")
    settings["token_count"] = int(settings["token_count"])
    settings["layers"] = settings["layers"] or list(recipe.RECIPES.get(model, {}).get("layers", ()))
    if settings["data"] is None and model != "toy":
        settings["data"] = recipe.RECIPES.get(model, {}).get("data")
    for name in ("layers", "data") if model != "toy" else ():
        if not settings[name]:
            raise InputError(f"{model}: give --{name}")
    sasa = settings["architecture"] == "sasa"
    settings["block"] = (settings["block"] or 4) if sasa else 1
    if not sasa and (args.block or args.nuclear):
        raise InputError("--block and --nuclear belong to --architecture sasa")
    for name, low in (("width", 1), ("l0", 1), ("block", 1), ("batch", 2), ("buffer", 2), ("context", 2), ("save_every", 1),
                      ("token_count", settings["batch"]), ("nuclear", 0), ("seed", 0)):
        if not low <= settings[name] < 1 << 50:
            raise InputError(f"--{name.replace('_', '-')} {settings[name]}: give {low} or more")
    width, l0, block = settings["width"], settings["l0"], settings["block"]
    if width % block or l0 % block or not block <= l0 <= width:
        raise InputError(f"--block {block}: it must divide --width {width} and --l0 {l0}, which is at most the width")
    settings["lr"] = settings["lr"] or 2e-3 * (2 if sasa else 1) * math.sqrt(512 / settings["width"])
    return settings


def stream_of(settings, model, tokenizer):
    """The Stream of the settings' data."""
    if settings["data"] is None:
        from toy import build as toy
        world = toy.World(read_json(recipe.TOY / "world.json")["seed"])
        items = functools.partial(world.corpus, 4000, "SAE")
    else:
        items = functools.partial(read_items, data_file(settings["data"]))
    return Stream(model, tokenizer, items, settings["layers"], settings["buffer"], settings["context"])


def main():
    parser = Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    if args.demo:
        from experiments import sasa_demo as sae_demo
        return sae_demo.main(args.out)
    settings = resolve(args)
    if args.evaluate:
        from saes import measure as sae_eval
        return sae_eval.main(args.evaluate, settings, args.out)
    signals, folder = Signals(), None
    try:
        folder = run_folder(args.out, f"sae-{Path(settings['model']).name}")
        return train(settings, folder, signals)
    except Stopped as stop:
        where = f": the same command with --out {folder} goes on" if folder and (folder / CHECKPOINT).exists() else ""
        print(f"\nstopped by {signal.Signals(stop.args[0]).name}{where}", file=sys.stderr)
        return 128 + stop.args[0]
    finally:
        if folder:
            with suppress(OSError):
                folder.rmdir()                                                       # empty: nothing was begun in it


def train(settings, folder, signals):
    """Train the SAEs of the settings in `folder`, from where it stands, and write them."""
    held = Lock(folder)                                                              # noqa: F841
    config, last = folder / "config.json", "sasa.json" if settings["architecture"] == "sasa" else "params.npz"
    if config.exists():
        if all(any(folder.glob(f"layer_{layer}/*/*/{last}")) for layer in settings["layers"]):
            raise InputError(f"{folder} holds finished SAEs, which are never overwritten: give another --out")
        there = read_json(config).get("settings")
        if there != settings:
            odd = next((name for name in settings if not isinstance(there, dict) or there.get(name) != settings[name]), "settings")
            raise InputError(f"{folder} holds an unfinished run of other settings (--{odd.replace('_', '-')}): give another --out")
    elif not is_new(folder):
        raise InputError(f"{folder} is there and holds no run: give another --out")
    model = load_model(recipe.folder(settings["model"]), getattr(torch, settings["dtype"]), settings["device"])
    if not 0 <= min(settings["layers"]) <= max(settings["layers"]) < model.config.num_hidden_layers:
        raise InputError(f"--layers {settings['layers']}: the model's are 0 to {model.config.num_hidden_layers - 1}")
    tokenizer = load_tokenizer(recipe.folder(settings["model"]))
    spec = Spec(warmup=0.2 if settings["architecture"] == "sasa" else 0.05,
                dead_after=max(20 * settings["batch"], min(10_000_000, settings["token_count"] // 12)),
                **{name: settings[name] for name in ("architecture", "width", "l0", "block", "nuclear", "lr")})
    sweep(folder)
    write_json(config, {"settings": settings, "spec": asdict(spec)})
    mend_checkpoint(folder)
    log, steps, batch = Log(folder / "metrics.jsonl"), settings["token_count"] // settings["batch"], settings["batch"]
    training = Training(stream_of(settings, model, tokenizer), spec, steps, batch, settings["seed"])
    if (folder / CHECKPOINT).exists():
        training.load(folder, settings["device"])
        print(f"going on at step {training.step:,} of {steps:,}")
    log.keep(training.step)
    bar = tqdm(total=steps * batch, initial=training.step * batch, unit=" tokens", unit_scale=True, leave=False, disable=None)
    signals.wait = True
    for metrics in training:
        bar.update(batch)
        step, stop = training.step, signals.caught
        if step % max(1, min(50, steps // 100)) == 0 or step == steps:
            shown = {layer: {name: value.item() for name, value in one.items()} for layer, one in metrics.items()}
            log.add({"step": step, "layers": shown})
            bar.set_postfix_str("  ".join(f"layer {layer}: EV {m['ev']:.3f} L0 {m['l0']:.1f} dead {m['dead']:.1%}"
                                          for layer, m in shown.items()))
        if step % settings["save_every"] == 0 or step == steps or stop:
            training.save(folder)
        if stop:
            raise Stopped(stop)
    bar.close()
    for layer, path in training.write(folder).items():
        mean = training.trainers[layer].mean
        print(f"layer {layer}: EV {mean['ev'].item():.3f}, L0 {mean['l0'].item():.1f}, dead {mean['dead'].item():.1%}: {path}")


if __name__ == "__main__":
    run_command(main)
