"""Many processes as one: what those that `torchrun` started say to each other.

    torchrun --nproc-per-node 4 train.py --model google/gemma-2-9b            # as one process with 4 times --accumulate
    torchrun --nproc-per-node 8 train.py --model google/gemma-2-27b --shard   # the frozen weights split over 8 cards

Each process runs the whole program and takes its share: micro-batches of a training step, batches of pairs, prompts.
Rank 0 alone speaks and writes; the run's folder must be one that all processes see. Started in any other way there is
one process and no group, and each function below hands back at once what it was given.

Not DistributedDataParallel: what is trained is a few MB, so one sum of one buffer a step is all there is to say. DDP
would average gradients where a sum is wanted, wrap the model whose `hidden` is called, and want `no_sync` around all
micro-batches but the last, which is more to read and nothing won.

A process that dies takes the others with it: torchrun's agent ends them (SIGTERM, 30 s later SIGKILL), and a sum that
waits for it fails at once on a CPU. The first one to know why says it, the others are silent.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist

from run import files
from run.files import InputError

PATIENCE = timedelta(minutes=10)       # with a process that lives but doesn't answer: longer than the longest stage's
store = None                           # uneven ends. Held by torchrun's agent, so that it outlives every process


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def run(main):
    """files.run_command(main), in each of the processes that torchrun started or in the only one."""
    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        files.run_command(main)
    try:
        files.run_command(lambda: _one_of_many(main))
    except SystemExit as end:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(end.code or 0)) # Python's own way out now and then aborts over a thread of gloo's that is still at work


def _one_of_many(main):
    global store
    card, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    store, me, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    if me:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        if cards:
            if card >= cards:
                raise InputError(f"--nproc-per-node asks for more processes than this machine's {cards} GPUs "
                                 "(CUDA_VISIBLE_DEVICES= hides them, to run on the CPU)")
            torch.cuda.set_device(card)                    # from now on "cuda" is this card
        dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", store=store, rank=me, world_size=size, timeout=PATIENCE)
        code = main()
        if not code:
            maximum(0)                                     # all have come this far
            dist.destroy_process_group()
        return code
    except (InputError, OSError, KeyboardInterrupt):
        if not last_word():
            sys.exit(2)
        raise
    except Exception:
        sys.stderr = sys.__stderr__                        # something unforeseen is for everybody to tell
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):     # the agent's, once the first process has ended: we are ending
            signal.signal(number, signal.SIG_IGN)


def last_word() -> bool:
    """Whether this process is the first that wants to say why the run ends; its stderr is open then, if it was not."""
    try:
        first = store is None or store.add("last word", 1) == 1
    except RuntimeError:                                   # the agent is gone
        first = True
    if first:
        sys.stderr = sys.__stderr__ if store else sys.stderr
    return first


def _all(operation):
    """What is to be done by all processes, its failure told as what it means."""
    @wraps(operation)
    def told(*args, **kwargs):
        try:
            return operation(*args, **kwargs)
        except RuntimeError as error:
            raise ConnectionError(errno.ECONNRESET, "another process has died, or didn't answer for 10 minutes: the run goes "
                                  "on from its last checkpoint by --resume", f"process {rank()} of {world_size()}") from error
    return told


# ---------------------------------------------------------------------------------------------------------------
# Shares, and what becomes of them

def own_share(items: Sequence) -> Sequence:
    """This process's share of a list that all have: every world_size()-th."""
    return items[rank()::world_size()]


@_all
def gather(value):
    """The values of all processes, a list by rank: what JSON can say, and paths as text. (PyTorch's own would pickle.)"""
    if world_size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8)
    size = maximum(len(text))
    padded = torch.nn.functional.pad(text, (0, size - len(text)), value=ord(" "))
    return [json.loads(bytes(part.tolist())) for part in gather_tensors(padded)]


@_all
def gather_tensors(tensor):
    """The tensors, of one shape, of all processes, a list by rank."""
    parts = [torch.empty_like(tensor) for _ in range(world_size())] if world_size() > 1 else [tensor]
    if world_size() > 1:
        dist.all_gather(parts, tensor.contiguous())
    return parts


@contextmanager
def agreed():
    """A block that every process runs, and that holds no collective. InputError or OSError in one is raised by all."""
    if world_size() == 1:
        yield
        return
    error = None
    try:
        yield
    except (InputError, OSError) as found:
        error = found
    if errors := [other for other in gather(str(error) if error else None) if other]:
        raise error or InputError(errors[0])


def on_rank_zero(action: Callable, *arguments):
    """What action(*arguments) returns on rank 0, which alone calls it; what it raises, all raise. The others wait."""
    result = None
    with agreed():
        if rank() == 0:
            result = action(*arguments)
    return gather(result)[0]


@_all
def maximum(number: float) -> float:
    """The largest of the processes' integers."""
    if world_size() > 1:
        dist.all_reduce(number := torch.tensor(number), dist.ReduceOp.MAX)
    return int(number)


@_all
def sum_tensors(*tensors: torch.Tensor) -> None:
    """Sum each tensor over the processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_gradients(parameters, *more):
    """Sum the parameters' gradients, and the float32 tensors `more`, over the processes, in place: one buffer, one sum."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    tensors = [parameter.grad for parameter in parameters] + list(more)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    sum_tensors(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


@_all
@torch.no_grad()
def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Put rank 0's values into all processes' tensors."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# ---------------------------------------------------------------------------------------------------------------
# A frozen base that doesn't fit on one card

def shard(model, device):
    """Split the matrices of a Gemma2's blocks over the processes, by rows (FSDP2); embedding and norms stay whole.

    A block is gathered when it runs, forward and backward, and let go after it: a card holds its share, the embedding,
    and about two blocks. The model may lie on the meta device: model.load_model then reads only this process's rows.
    Adapters are put in afterwards (lora.add_lora), so FSDP doesn't know them: they are whole everywhere, and their
    gradients are summed like any others. Each forward is now one of all processes together: `is_sharded` says so.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    whole = {weight for weight in model.parameters() if weight.dim() == 1 or weight is model.embed_tokens.weight}
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "hidden")          # what we call in the place of `forward`
    return model


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the model is sharded, so that all processes must make the same number of forwards."""
    return hasattr(model, "set_requires_gradient_sync")    # a method of FSDPModule, whose import takes a second


def own_rows(weight):
    """(this process's rows of a weight, as a plain tensor, and the number of the first); all of them if it isn't split."""
    if not hasattr(weight, "to_local"):
        return weight, 0
    rows = -(-weight.shape[0] // world_size())                  # FSDP cuts as torch.chunk does
    return weight.to_local(), min(rank() * rows, weight.shape[0])
