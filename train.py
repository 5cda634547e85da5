"""Fine-tune Gemma-2 with LoRA whose initial directions are the safety subspace that SAE features span.

    python train.py --rank 16                              # the built-in toy, about a minute on 2 cores
    python train.py --model google/gemma-2-2b --rank 16    # the paper's recipe; needs a GPU and Gemma's licence
    python train.py --model DIR --sae DIR --data FILE --rank 16 --steps 100
    python train.py --model google/gemma-2-9b --dry-run    # what would run, and what it would take
    torchrun --nproc-per-node 4 train.py --model google/gemma-2-9b      # on 4 cards; --shard where one holds no 27b

Answers the evaluation prompts, selects features, trains on the aligned answers, answers again, and prints one table.
Each stage leaves its files in the run's folder, and a stage whose files are there isn't done again: Ctrl-C or a crash
costs at most the steps since the last checkpoint. `python train.py --resume DIR` goes on to the same numbers, bit by
bit on a CPU.
"""

import itertools
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

import fused as attention
from run import files
import lora
from experiments import neighbours
from run import parallel
from run import settings as recipe
from safety import sets
from data import Example, Row, load_tokenizer, pack
from report.directions import probe
from features import harmless_prompts, load_examples, load_saes, load_subspaces, module_bases, sample_pairs, save_selection, select_features
from report.explain import explain
from figures import answer, complete, refused, score
from run.files import InputError, write_json
from fused import IGNORE
from model import PRESETS, Config, load_config
from model import Gemma2, load_model
from report.page import write_page
from report.runs import model_card, result_table, samples, settings_table
from run.session import (CHECKPOINT, FINISHED, Lock, Log, Signals, Stopped, adapter_parameters, load_checkpoint, mend_checkpoint, put,
                     run_folder, save_checkpoint, settle)
from run.files import table


# ---------------------------------------------------------------------------------------------------------------
# The loop

class Diverged(InputError):
    """A step, numbered from 1, whose loss or gradient is no number, and its rows. The weights are those of the step before."""

    def __init__(self, step, rows, loss, norm):
        super().__init__(f"step {step}: loss {loss}, gradient norm {norm}: the weights of the step before are untouched; try a lower --lr")
        self.step, self.rows = step, rows


SPIKE = 1000                       # times --clip: a gradient norm that is told of


def fit(model: Gemma2, optimizer: torch.optim.Optimizer, batches: Iterable[list[Row]], schedule: Callable[[int], float], clip=0.0, first=0,
        hidden: Callable | None = None, spike: Callable | None = None) -> Iterator[dict]:
    """Optimise, one step an item of `batches`, and yield each step's metrics after it.

    batches: lists of micro-batches (data.Row, its tensors (T) or (B, T)). The loss is summed over the labelled tokens
    of all micro-batches and divided by their count, known before the first forward. schedule(step) is the learning
    rate, steps counted from 0, `first` the number of the first. `hidden` stands in for the model's own (compiled).
    spike(step, rows, norm), steps counted from 1, is called before a step whose gradient norm is more than SPIKE · clip.
    Of many processes, each has the same lists and takes its share of each; gradients are summed, steps are the same.
    """
    device = model.embed_tokens.weight.device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    hidden = hidden or (lambda tokens, documents: model.hidden(tokens, documents)[0])
    for step, rows in enumerate(batches, first):
        began = time.perf_counter()
        counts = [int((row.labels != IGNORE).sum()) for row in rows]
        loss = torch.zeros((), device=device)
        if 0 in counts:
            print(f"step {step + 1}: a micro-batch without a trained token", file=sys.stderr)
        for row in parallel.own_share(rows) if sum(counts) else ():
            tokens, documents, labels = (torch.atleast_2d(t).to(device) for t in (row.tokens, row.documents, row.labels))
            part = model.nll_sum(hidden(tokens, documents), labels)[0] / sum(counts)
            part.backward()
            loss += part.detach()
        if sum(counts):
            parallel.sum_gradients(parameters, loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise Diverged(step + 1, rows, loss.item(), norm.item())
            if spike and clip and norm > SPIKE * clip:
                spike(step + 1, rows, norm.item())
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            optimizer.step()
            optimizer.zero_grad()
            yield {"step": step + 1, "loss": loss.item(), "lr": schedule(step), "grad_norm": norm.item(),
                   "trained_tokens": sum(counts), "tokens": sum(int((row.documents > 0).sum()) for row in rows),
                   "seconds": time.perf_counter() - began}


def cosine(peak: float, steps: int, warmup: float) -> Callable[[int], float]:
    """Learning rate over steps counted from 0: linear over the first share `warmup`, then half a cosine to 0."""
    warm = max(1, round(warmup * steps))
    return lambda step: peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step + 1 - warm) / max(1, steps - warm + 1))))


def batches_of(examples, settings):
    """Lists of --accumulate packed rows for each process, of the aligned answers, epoch after epoch, without end: a pure
    function of data, seed and number of processes."""
    rows = itertools.chain.from_iterable(pack(examples, settings.batch_tokens, settings.seed, epoch) for epoch in itertools.count())
    while True:
        yield list(itertools.islice(rows, settings.accumulate * parallel.world_size()))


def count_steps(examples: Sequence[Example], settings) -> int:
    """Optimizer steps: --steps, else those that --epochs make."""
    if settings.steps:
        return settings.steps
    rows = len(pack(examples, settings.batch_tokens, settings.seed, 0))
    return max(1, round(rows * settings.epochs / (settings.accumulate * parallel.world_size())))


# ---------------------------------------------------------------------------------------------------------------
# Stages

def asked_sets(settings, pairs):
    """The evaluation sets that the settings name, {name: sets.Asked}, less the prompts of the training `pairs`."""
    places = {name: (name, getattr(settings, name)) for name in recipe.SETS if getattr(settings, name)}
    return sets.load(places, {pair.turns for pair in pairs}, settings.eval_prompts)


def select(settings, model, saes, tokenizer, examples, folder):
    """features.json and subspace.safetensors, made or found. {layer: U (D, r̂)}."""
    path = folder / "subspace.safetensors"
    if not path.exists():
        spaces, found = select_features(model, saes, tokenizer, sample_pairs(settings, examples), settings.top_k, settings.tau,
                                        settings.rank, settings.tokens, settings.batch_tokens, settings.select,
                                        settings.norm_aware, harmless_prompts(settings), settings.format)
        parallel.on_rank_zero(save_selection, folder, spaces, found)
    return load_subspaces(path)


PROBED = {"harmful": "safe", "jailbreak": "jailbreak", "lookalike": "over_refusal"}     # what is asked on the way
PROMPTS = 32                                                                            # and how many of each


def look(settings, model, tokenizer, asked, adapters, bases):
    """How far the adapters are, on the way: shares of a few prompts that are refused, and the shape of ΔW (directions.probe)."""
    shares = {}
    for name, key in PROBED.items():
        if name in asked:
            texts = answer(model, tokenizer, asked[name].prompts[:PROMPTS], settings.max_new_tokens, settings.eval_batch,
                           settings.format, f"looking: {name}")
            shares |= {key: sum(refused(name, text) for text in texts) / len(texts), "n": len(texts)}
    return shares | probe(adapters, bases)


def train(settings, model, tokenizer, adapters, bases, examples, asked, folder, log, signals):
    """Train the adapters on the aligned answers, from where the folder's checkpoint stands, and save them."""
    examples = [aligned for aligned, _ in examples]
    steps, named = count_steps(examples, settings), adapter_parameters(adapters)
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], settings.lr, weight_decay=settings.weight_decay)
    average = {}                                                       # of the factors, with --ema
    parallel.broadcast([parameter for _, parameter in named])    # for the case that their machines draw differently
    parallel.on_rank_zero(mend_checkpoint, folder)
    with parallel.agreed():
        first = load_checkpoint(folder, adapters, optimizer, average if settings.ema else None)
    log.keep(first)
    # One graph for rows of one shape, so that what is compiled doesn't depend on which rows come first
    model.recompute = settings.recompute
    compiled = settings.compile and not settings.shard and attention.use_compile()
    hidden = torch.compile(lambda *row: model.hidden(*row)[0], dynamic=False) if compiled else None
    batches = itertools.islice(batches_of(examples, settings), first, steps)
    looks = {round(steps * part / settings.looks) for part in range(1, settings.looks + 1)}
    if settings.looks and not any("probe" in line for line in log.lines):
        log.add({"step": 0, "probe": look(settings, model, tokenizer, asked, adapters, bases)})

    def keep(what, step, rows):
        return parallel.on_rank_zero(keep_step, folder, what, step, rows, adapters, optimizer, average)

    def spike(step, rows, norm):
        print(f"step {step}: gradient norm {norm:.3g}, clipped to {settings.clip:g}; what went in is in {keep('spike', step, rows)}, the "
              f"weights before it in {folder / CHECKPOINT}", file=sys.stderr)

    signals.wait = True
    try:
        for metrics in fit(model, optimizer, batches, cosine(settings.lr, steps, settings.warmup), settings.clip, first, hidden, spike):
            log.add(metrics)
            if settings.ema:
                neighbours.average(average, named, settings.ema)
            step, seconds = metrics["step"], metrics["seconds"]
            if step in looks:                                      # before the checkpoint: a session that ends in between looks again
                log.add({"step": step, "probe": look(settings, model, tokenizer, asked, adapters, bases)})
            print(f"step {step:>{len(str(steps))}}/{steps} {step / steps:4.0%}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
                  f"grad {metrics['grad_norm']:.2f}  {1000 * seconds:6.0f} ms  {metrics['tokens'] / seconds:7,.0f} tokens/s  "
                  f"{(steps - step) * seconds:5.0f} s left", flush=True)
            stop = parallel.maximum(signals.caught or 0)       # a signal to one process stops all, after the same step
            if step % settings.save_every == 0 or step == steps or stop:
                parallel.on_rank_zero(save_checkpoint, folder, step, adapters, optimizer, average)
            if stop:
                raise Stopped(stop)
    except Diverged as error:
        error.args = (f"{error}; what went in is in {keep('diverged', error.step, error.rows)}",)
        raise
    signals.wait = False
    if settings.ema:
        put(named, average)
    parallel.on_rank_zero(lora.save_adapter, model, folder, settings.model)


def keep_step(folder, what, step, rows, adapters, optimizer, average):
    """Keep what goes into a step that is odd, for a look at it, and the weights before it. The path of the one."""
    path = folder / f"checkpoint/{what}-step-{step}.safetensors"
    files.write_tensors(path, {f"{number}.{name}": tensor for number, row in enumerate(rows) for name, tensor in vars(row).items()
                               if isinstance(tensor, torch.Tensor)})
    if step > 1:
        save_checkpoint(folder, step - 1, adapters, optimizer, average)
    return path


def adapt(settings, model, saes, tokenizer, examples, asked, folder, log, signals):
    """Selection and training, each made or found; the model carries the trained adapter afterwards. {layer: U}."""
    with log.stage("selection"):
        spaces = select(settings, model, saes, tokenizer, examples, folder)
        saes.clear()                                             # their memory is the training's now
    if (folder / "adapter_model.safetensors").exists():
        lora.load_adapter(model, folder)
        return spaces
    with log.stage("training"):
        bases, clamped = module_bases(model, spaces, settings.norm_aware)
        if clamped:
            print(f"norm-aware: {clamped} gains |1 + w| under 0.01 were taken as 0.01")
        adapters = lora.add_lora(model, settings.rank, settings.alpha, settings.init, bases,
                                 torch.Generator().manual_seed(settings.seed), settings.freeze_basis)
        train(settings, model, tokenizer, adapters, bases, examples, asked, folder, log, signals)
    return spaces


def subspace_share(model, spaces, settings, draws=8):
    """Share of ‖ΔW‖², summed over modules, inside each module's safety basis; and of random bases of equal rank."""
    layers = lora.lora_layers(model)
    bases, _ = module_bases(model, spaces, settings.norm_aware)
    weight = torch.tensor([layer.update.square().sum().item() for layer in layers.values()], dtype=torch.float64)
    if not weight.sum() > 0:
        return {"subspace": None, "random": None, "random_sd": None}
    draw = torch.Generator().manual_seed(settings.seed)

    def share(basis_of):
        parts = torch.tensor([lora.update_share(layer, basis_of(bases[name])) for name, layer in layers.items()], dtype=torch.float64)
        return (weight * parts.nan_to_num()).sum().item() / weight.sum().item()

    chance = torch.tensor([share(lambda U: torch.linalg.qr(torch.randn(U.shape, generator=draw)).Q) for _ in range(draws)])
    return {"subspace": share(lambda U: U), "random": chance.mean().item(), "random_sd": chance.std().item()}


# ---------------------------------------------------------------------------------------------------------------
# What it would take

def dry_run(settings):
    """Print parameter counts, steps and an estimate of memory, and stop. Loads no weights."""
    config = Config.preset(settings.model) if settings.model in PRESETS else load_config(recipe.folder(settings.model))
    check_rank(settings, config)
    if Path(settings.sae).is_dir():
        print(*load_saes(settings, config).values(), sep="\n")
    with torch.device("meta"):
        model = Gemma2(config)
    whole = sum(p.numel() for p in model.parameters())
    sizes = [layer.weight.shape for name, layer in model.named_modules() if name.endswith(lora.TARGETS)]
    trained = sum(settings.rank * (out + inner) for out, inner in sizes)
    D, T, L, b = config.hidden_size, settings.batch_tokens, config.num_hidden_layers, getattr(torch, settings.dtype).itemsize
    blocks = whole - config.vocab_size * D
    held = whole - blocks * (1 - 1 / parallel.world_size()) * settings.shard + 2 * blocks / L * settings.shard
    # What a block keeps for its backward (bench/memory.py measures the same): the inputs of its four norms and of q, k, v; q, k, v
    # and the attention's output; two of the MLP's width; in float32 a number a norm and a head. With --recompute its
    # input alone, and all of one block at a time.
    H, K = config.num_attention_heads, config.num_key_value_heads
    block = b * (5 * D + 2 * (H + K) * config.head_dim + 2 * config.intermediate_size) + 4 * (4 + H)
    kept = T * (L * b * D + block if settings.recompute else L * block)
    rows = [["parameters", f"{whole:,}"], ["trainable" + ", at most" * settings.freeze_basis, f"{trained:,} ({trained / whole:.4%})"]]
    rows += [[f"memory: {name}", f"{size / 1e6:,.0f} MB"] for name, size in (
        ("weights", held * b), ("adapter, gradient, AdamW", trained * 16), ("activations of a row, about", kept))]
    try:
        tokenizer = load_tokenizer(recipe.folder(settings.model))
        examples, pairs = load_examples(settings, tokenizer)
        asked_sets(settings, pairs)
        steps = count_steps([aligned for aligned, _ in examples], settings)
        rows += [["steps", f"{steps:,} of {settings.accumulate * parallel.world_size()} × {T:,} tokens"]]
    except InputError as error:
        rows += [["steps", f"{settings.steps:,}" if settings.steps else f"unknown: {error}"]]
    print(table(rows))


def check_rank(settings, config):
    if settings.rank > config.hidden_size:
        raise InputError(f"--rank {settings.rank}: the residual stream of {settings.model} has {config.hidden_size} dimensions; "
                         f"give 1 to {config.hidden_size}")


def main():
    parser = files.Parser(__doc__)
    recipe.add_flags(parser)
    parser.add_argument("--resume", metavar="DIR", help="go on with the unfinished run in this folder, with its settings")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, sizes, steps and memory, and stop")
    args = parser.parse_args()
    if args.resume and args.out:
        raise InputError("--resume DIR goes on in that folder: leave --out away")
    settings, source = recipe.resolve(args, vars(recipe.saved(args.resume)) if args.resume else None)
    print(settings_table(settings, source), "\n")
    if args.dry_run:
        return dry_run(settings)
    signals, folder = Signals(), None
    try:
        folder = Path(parallel.on_rank_zero(run_folder, args.resume or args.out, Path(settings.model).name))
        with parallel.agreed():
            held = Lock(folder) if parallel.rank() == 0 else None    # noqa: F841
        new = parallel.on_rank_zero(settle, folder, settings, source)
        return run(settings, folder, new, signals)
    except Stopped as stop:
        start = "python" if parallel.world_size() == 1 else f"torchrun --nproc-per-node {parallel.world_size()}"
        how = f": go on with `{start} train.py --resume {folder}`" if folder and folder.exists() else ""
        if parallel.last_word():
            print(f"\nstopped by {signal.Signals(stop.args[0]).name}{how}", file=sys.stderr)
        return 128 + stop.args[0]


def run(settings, folder, new, signals):
    """All stages of a run, in its folder. Where what was given can't be loaded, a new folder goes again."""
    log = Log(folder / "metrics.jsonl")
    torch.manual_seed(settings.seed)
    try:
        with log.stage("loading"), parallel.agreed():
            import matplotlib.backends.backend_svg                 # noqa: F401  the page's: if it can't be had, say so now
            config = load_config(recipe.folder(settings.model))
            check_rank(settings, config)
            saes = load_saes(settings, config)
            print(*saes.values(), sep="\n")
            tokenizer = load_tokenizer(recipe.folder(settings.model))
            examples, pairs = load_examples(settings, tokenizer)
            asked = asked_sets(settings, pairs)
            harmless_prompts(settings)                             # is it there?
            model = load_model(recipe.folder(settings.model), getattr(torch, settings.dtype), settings.device, settings.shard)
    except BaseException:
        if new and parallel.rank() == 0:
            shutil.rmtree(folder)
        raise
    with log.stage("answers before"):
        complete(folder, "base", model, tokenizer, asked, settings)
    spaces = adapt(settings, model, saes, tokenizer, examples, asked, folder, log, signals)
    with log.stage("answers after"):
        complete(folder, "adapter", model, tokenizer, asked, settings)
    if settings.explain and not parallel.on_rank_zero((folder / "explain.json").exists):
        with log.stage("explaining"):
            found = explain(model, load_saes(settings, config), tokenizer, asked, files.read_json(folder / "features.json", list), spaces,
                            settings.norm_aware, settings.format, settings.max_new_tokens, settings.eval_batch, settings.explain)
            named = {"adapter": folder.name, "model": settings.model, "sae": settings.sae}
            parallel.on_rank_zero(write_json, folder / "explain.json", named | found)
    parallel.on_rank_zero(conclude, settings, folder, model, spaces, log)


def conclude(settings, folder, model, spaces, log):
    """Judge the answers, write scores.json, the model card and the page, the last file of a run, and print the table."""
    adapters = lora.lora_layers(model)
    own = sum(layer.A.numel() + layer.B.numel() for layer in adapters.values())
    # With a frozen basis only the factor that isn't it: B of readers, A of writers
    trained = own if not settings.freeze_basis else sum((layer.A if layer.writer else layer.B).numel() for layer in adapters.values())
    scores = score(folder) | {
        "trainable": trained, "parameters": sum(p.numel() for p in model.parameters()) - own, "rank": settings.rank,
        "share": subspace_share(model, spaces, settings), "seconds": log.seconds(), "seed": settings.seed,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else
                      1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}     # on a CPU of the whole process
    write_json(folder / "scores.json", scores)
    files.write_text(folder / "README.md", model_card(settings, scores))
    write_page([folder], folder / FINISHED)
    print(f"\n{result_table(scores)}\n")
    if scores["sets"]["adapter"]:
        print(f"{samples(folder)}\n")
    print(f"run: {folder}\npage: {folder / FINISHED}")


if __name__ == "__main__":
    parallel.run(main)
