"""Fine-tune Gemma-2 with LoRA that begins in the safety subspace which SAE features span.

    python train.py --rank 16                              # the built-in toy, about a minute
    python train.py --model google/gemma-2-2b --rank 16    # the paper's; a GPU and Gemma's licence
    python train.py --method full                          # every weight instead of adapters
    python train.py --model google/gemma-2-9b --dry-run    # what would run, and what it would take
    torchrun --nproc-per-node 4 train.py --model google/gemma-2-9b

It answers the evaluation prompts, selects features, trains on the aligned answers, answers again,
and prints one table. Each stage leaves its files in the run's folder, and a stage whose files are
there isn't done again. Ctrl-C or a crash costs at most the steps since the last checkpoint:
`python train.py --resume DIR` goes on to the same numbers, bit for bit on a CPU.
"""

import itertools
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import lora
from attention import use_compile
from data import Example, Row, load_examples, load_tokenizer, pack
from eval import complete, score
from features import (SELECTIONS, load_subspaces, module_bases, sample_pairs, save_selection,
                      select_features)
from fused import IGNORE
from model import PRESETS, TARGETS, Gemma2, load_config, load_model, save_model
from run import parallel
from run.estimate import check_adapter, derive_recompute, size_rows
from run.files import InputError, Parser, table, write_json, write_text
from run.masters import master_copies, round_weights, trained_weights
from run.places import contents
from run.session import (FINISHED, FIRST, Log, Signals, Stopped, limit_threads, load_checkpoint,
                         model_card, open_run, progress_line, run_folder, save_checkpoint)
from run.settings import ROLES, add_flags, model_folder, resolve, saved_settings, settings_table
from run.weights import copy_beside
from sae import load_saes
from safety.sets import load_sets
from safety.table import result_table, samples


# ------------------------------------------------------------------------------
# The loop

class Diverged(InputError):
    """A loss or gradient that is no number. The weights are those of the step before."""


def row_loss(model: Gemma2, row: Row) -> torch.Tensor:
    """Summed negative log-likelihood, in nats, of a row's labelled tokens: the loss of training.

    row: tokens, documents and labels, each (B, T). An ablation puts another function in its place.
    """
    hidden, _ = model.hidden(row.tokens, row.documents)
    return model.nll_sum(hidden, row.labels)[0]


def fit(model: Gemma2, optimizer: torch.optim.Optimizer, batches: Iterable[list[Row]],
        schedule: Callable[[int], float], clip=0.0, first=0, loss=row_loss) -> Iterator[dict]:
    """Optimise, one step an item of `batches`, and yield each step's metrics after it.

    batches: lists of micro-batches, data.Row with tensors (T) or (B, T). The loss is summed over
    the labelled tokens of all of them and divided by their count, which is known before the first
    forward: a mean of micro-batch means would weigh a token by the company it keeps.
    schedule(step) is the learning rate, steps counted from 0; `first` is the number of the first.
    Of many processes each takes its share of every list, and gradients are summed.
    Raises Diverged.
    """
    device = model.embed_tokens.weight.device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, rows in enumerate(batches, first):
        start = time.perf_counter()
        label_counts = [int((row.labels != IGNORE).sum()) for row in rows]
        num_trained = sum(label_counts)
        if 0 in label_counts:
            print(f"step {step + 1}: a micro-batch without a trained token", file=sys.stderr)
        if num_trained == 0:
            continue

        # Forward and backward, a micro-batch at a time
        total = torch.zeros((), device=device)
        for row in parallel.own_share(rows):
            tensors = (row.tokens, row.documents, row.labels)
            batch = Row(*(torch.atleast_2d(tensor).to(device) for tensor in tensors))
            part = loss(model, batch) / num_trained
            part.backward()
            total += part.detach()
        parallel.sum_gradients(parameters, total)

        # A step that is no number is never taken
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
        norm = parallel.whole(norm).item()
        mean_loss = total.item()
        if not math.isfinite(mean_loss) or not math.isfinite(norm):
            raise Diverged(f"step {step + 1}: loss {mean_loss}, gradient norm {norm}: the weights "
                           "of the step before are untouched; try a lower --lr")
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        yield {"step": step + 1, "loss": mean_loss, "lr": schedule(step), "grad_norm": norm,
               "trained_tokens": num_trained,
               "tokens": sum(int((row.documents > 0).sum()) for row in rows),
               "seconds": time.perf_counter() - start}


def cosine(peak: float, steps: int, warmup: float) -> Callable[[int], float]:
    """Learning rate over steps from 0: linear over the first share `warmup`, then cosine to 0."""
    num_warm = max(1, round(warmup * steps))

    def rate(step):
        progress = max(0, step + 1 - num_warm) / max(1, steps - num_warm + 1)
        warm_share = (step + 1) / num_warm
        return peak * min(warm_share, 0.5 * (1 + math.cos(math.pi * progress)))
    return rate


def batches_of(examples: Sequence[Example], settings, pack=pack) -> Iterator[list[Row]]:
    """Lists of packed rows, a list a step, without end. An ablation may pack otherwise.

    A pure function of data, seed and number of processes, so that a resumed run sees the same.
    """
    epochs = (pack(examples, settings.batch_tokens, settings.seed, epoch)
              for epoch in itertools.count())
    rows = itertools.chain.from_iterable(epochs)
    while True:
        yield list(itertools.islice(rows, settings.accumulate * parallel.world_size()))


def count_steps(examples: Sequence[Example], settings) -> int:
    """Optimizer steps: --steps, or those that one pass over the data makes."""
    if settings.steps:
        return settings.steps
    num_rows = len(pack(examples, settings.batch_tokens, settings.seed, 0))
    return max(1, round(num_rows / (settings.accumulate * parallel.world_size())))


# ------------------------------------------------------------------------------
# A run's stages, each made or found in its folder

def load(settings, source):
    """The model in a folder or repository; --method full will want its gradients."""
    is_full = settings.method == "full"
    shard = partial(parallel.shard, everything=is_full) if settings.shard else None
    model = load_model(source, getattr(torch, settings.dtype), settings.device, shard)
    if is_full:
        trained_weights(model, settings.targets)
    return model


def evaluation_sets(settings, pairs):
    """{role: EvalSet} of the settings' files, less the prompts of the training pairs."""
    places = {role: (role, file) for role, file in settings.sets.items()}
    return load_sets(places, {pair.turns for pair in pairs}, settings.eval_prompts)


def select(settings, model, saes, tokenizer, examples, folder):
    """features.json and subspace.safetensors: {(layer, side): U (D, r̂)}."""
    path = folder / "subspace.safetensors"
    if not path.exists():
        pairs = sample_pairs(settings, examples)
        choices, features = select_features(model, saes, tokenizer, pairs, settings)
        parallel.on_rank_zero(save_selection, folder, choices, features)
    return load_subspaces(path)


def train(settings, model, named, bases, examples, folder, log, signals):
    """Train weights [(name, weight)] on the aligned answers, from the folder's checkpoint on."""
    aligned = [pair[0] for pair in examples]
    steps = count_steps(aligned, settings)
    weights = [weight for _, weight in named]
    named = master_copies(named)
    parameters = [parameter for _, parameter in named]
    # The fused form has no temporary copy of all moments. On a CPU it would change the last bits
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=0.0,
                                  fused=parameters[0].device.type == "cuda")
    optimizer.register_step_post_hook(lambda *_: round_weights(weights, parameters))
    if settings.method == "lora":
        parallel.broadcast(parameters)          # in case their machines draw differently
    with parallel.agreed():
        first = load_checkpoint(folder, named, optimizer)
    round_weights(weights, parameters)
    log.keep(first)

    model.recompute = settings.recompute
    is_compiled = settings.compile and not settings.shard and use_compile()
    if is_compiled:
        # One graph for rows of one shape: what is compiled doesn't hang on which rows come first
        model.hidden = torch.compile(model.hidden, dynamic=False)
    batches = itertools.islice(batches_of(aligned, settings), first, steps)
    schedule = cosine(settings.lr, steps, settings.warmup)
    done = first
    signals.wait = True
    try:
        for metrics in fit(model, optimizer, batches, schedule, settings.clip, first, row_loss):
            done = metrics["step"]
            # What the first gradient makes of the init, which all later figures stand beside
            if done == 1 and settings.method == "lora":
                share = lora.subspace_share(model, bases, settings.seed)
                metrics["share"] = share["subspace"]
                parallel.on_rank_zero(lora.save_adapter, model, folder / FIRST, settings.model)
            log.add(metrics)
            print(progress_line(metrics, steps), flush=True)
            # A signal to one process stops all of them, after the same step
            stop = parallel.maximum(signals.caught or 0)
            if done % settings.save_every == 0 or done == steps or stop:
                save_checkpoint(folder, done, named, optimizer)
            if stop:
                raise Stopped(stop)
    except Diverged:
        if done:
            save_checkpoint(folder, done, named, optimizer)
        raise
    finally:
        if is_compiled:
            del model.hidden                    # generation runs uncompiled
    signals.wait = False


def adapt(settings, model, saes, tokenizer, examples, folder, log, signals):
    """Selection and training; the model carries the trained adapter afterwards.

    Returns the safety basis of each module, {module name: U (D, r̂)}: none without SAEs.
    """
    bases = {}
    if saes:
        with log.stage("selection"):
            subspaces = select(settings, model, saes, tokenizer, examples, folder)
            bases = module_bases(model, subspaces, settings.norm_aware, settings.targets)
            saes.clear()                        # their memory is the training's now
    if (folder / "adapter_model.safetensors").exists():
        layers = lora.load_adapter(model, folder)
        for layer in layers.values() if settings.freeze_basis else ():
            lora.basis_factor(layer).requires_grad_(False)
        return bases
    with log.stage("training"):
        generator = torch.Generator().manual_seed(settings.seed)
        layers = lora.add_lora(model, settings.rank, settings.alpha, settings.init, bases,
                               generator, settings.freeze_basis, settings.targets)
        named = lora.trainable_parameters(layers)
        train(settings, model, named, bases, examples, folder, log, signals)
        parallel.on_rank_zero(lora.save_adapter, model, folder, settings.model)
    return bases


def tune(settings, model, examples, folder, log, signals):
    """Full fine-tuning: the model itself, trained, which is written to the folder's model/."""
    checkpoint = folder / "model"
    if (checkpoint / "config.json").exists():
        return load(settings, checkpoint)
    with log.stage("training"):
        named = trained_weights(model, settings.targets)
        train(settings, model, named, {}, examples, folder, log, signals)
        parallel.on_rank_zero(copy_beside, model_folder(settings.model), checkpoint)
        save_model(model, checkpoint)           # config.json last: then the checkpoint is whole
        parallel.on_rank_zero(shutil.rmtree, folder / "checkpoint")     # six times as large
    return model


# ------------------------------------------------------------------------------
# The command

def dry_run(settings):
    """Print sizes, memory and steps, and stop. Loads no weights."""
    config = PRESETS.get(settings.model) or load_config(model_folder(settings.model))
    check_adapter(settings, config)
    rows = size_rows(settings, config, settings.targets or ())
    try:
        tokenizer = load_tokenizer(model_folder(settings.model))
        examples, pairs = load_examples(settings.data, tokenizer, settings.batch_tokens,
                                        settings.format, paired=settings.init == "sails")
        evaluation_sets(settings, pairs)
        steps = count_steps([pair[0] for pair in examples], settings)
        row_counts = f"{settings.accumulate * parallel.world_size()} × {settings.batch_tokens:,}"
        rows.append(["steps", f"{steps:,} of {row_counts} tokens"])
    except InputError as error:                 # the data may lie on a hub that can't be reached
        rows.append(["steps", f"{settings.steps or 'unknown'}: {error}"])
    print(table(rows))


def main():
    parser = Parser(__doc__)
    group = add_flags(parser)
    group.add_argument("--out", metavar="DIR", help="the run's folder (default runs/TIME-MODEL); "
                       "an unfinished run of the same settings in it goes on")
    group.add_argument("--resume", metavar="DIR", help="go on with the unfinished run there")
    group.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    args = parser.parse_args()
    if args.resume and args.out:
        raise InputError("--resume DIR goes on in that folder: leave --out away")
    saved = vars(saved_settings(args.resume)) if args.resume else None
    settings, source = resolve(args, saved)
    derive_recompute(settings, source)
    if settings.method == "lora":
        settings.targets = settings.targets or list(TARGETS)
    for name, known in ((settings.select, SELECTIONS), (settings.init, lora.INITS)):
        if name and name not in known:
            raise InputError(f"{name} is unknown: known are {', '.join(known)}")
    print(settings_table(settings, source), "\n")
    if unmeasured := [role for role in ROLES if role not in settings.sets]:
        print(f"not measured: {', '.join(unmeasured)} (--set ROLE=FILE gives prompts)\n")
    if args.dry_run:
        return dry_run(settings)
    signals = Signals()
    folder = None
    try:
        # What can be known before a folder is made
        with parallel.agreed():
            tokenizer = load_tokenizer(model_folder(settings.model))
            hashes = contents(settings)
        name = Path(settings.model).name
        folder = Path(parallel.on_rank_zero(run_folder, args.resume or args.out, name))
        is_new = parallel.on_rank_zero(open_run, folder, settings, source, hashes)
        run(settings, tokenizer, folder, is_new, signals)
    except Stopped as stop:
        processes = parallel.world_size()
        start = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
        go_on = ""
        if folder and folder.exists():
            go_on = f": go on with `{start} {sys.argv[0]} --resume {folder}`"
        if parallel.last_word():
            print(f"\nstopped by {signal.Signals(stop.args[0]).name}{go_on}", file=sys.stderr)
        return 128 + stop.args[0]


def run(settings, tokenizer, folder, is_new, signals):
    """All stages of a run, in its folder. A new folder goes again where an input can't be read."""
    log = Log(folder / "metrics.jsonl", settings.log == "tensorboard")
    torch.manual_seed(settings.seed)
    source = model_folder(settings.model)
    try:
        with log.stage("loading"), parallel.agreed():
            config = load_config(source)
            examples, pairs = load_examples(settings.data, tokenizer, settings.batch_tokens,
                                            settings.format, paired=settings.init == "sails")
            saes = {}
            if settings.sae and all(unaligned for _, unaligned in examples):
                saes = load_saes(settings.sae, settings.layers, settings.width, settings.l0,
                                 settings.device, config)
            check_adapter(settings, config)
            if any(settings.top_k > sae.n_units for sae in saes.values()):
                raise InputError(f"--top-k {settings.top_k}: an SAE here has fewer features")
            print(*saes.values(), sep="\n")
            sets = evaluation_sets(settings, pairs)
            model = load(settings, source)
            limit_threads(model)
    except BaseException:
        if is_new and parallel.rank() == 0:
            shutil.rmtree(folder)
        raise
    with log.stage("answers before"):
        complete(folder, "base", model, tokenizer, sets, settings)
    bases = {}
    if settings.method == "full":
        model = tune(settings, model, examples, folder, log, signals)
    else:
        bases = adapt(settings, model, saes, tokenizer, examples, folder, log, signals)
    with log.stage("answers after"):
        complete(folder, "adapter", model, tokenizer, sets, settings)
    parallel.on_rank_zero(conclude, settings, folder, model, bases, log)


def conclude(settings, folder, model, bases, log):
    """Judge the answers, write the model card and scores.json, and print the table."""
    layers = lora.lora_layers(model).values()
    num_adapter = sum(layer.A.numel() + layer.B.numel() for layer in layers)
    num_parameters = sum(parameter.numel() for parameter in model.parameters()) - num_adapter
    num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if torch.cuda.is_initialized():
        peak_bytes = torch.cuda.max_memory_allocated()
    else:                                       # of the whole process
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    share = lora.subspace_share(model, bases, settings.seed)
    share["first_step"] = next((line["share"] for line in log.lines if "share" in line), None)
    scores = score(folder) | {
        "trainable": num_trained, "parameters": num_parameters, "rank": settings.rank,
        "share": share, "seconds": log.seconds(), "peak_bytes": peak_bytes,
        "seed": settings.seed, "method": settings.method}
    write_text(folder / "README.md", model_card(settings, scores, result_table(scores)))
    write_json(folder / FINISHED, scores)
    print(f"\n{result_table(scores)}\n")
    if scores["sets"]["adapter"]:
        print(f"{samples(folder)}\n")
    print(f"run: {folder}")
    if layers:
        print(f"what it learned, as a page: python -m report {folder}")
    print(f"ask it more:                python eval.py {folder} --sets NAME --out more\n"
          "names of sets:              python eval.py --list")


if __name__ == "__main__":
    parallel.run(main)
