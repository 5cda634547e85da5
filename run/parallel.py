"""Many processes as one: what those that `torchrun` started say to each other.

    torchrun --nproc-per-node 4 train.py --model google/gemma-2-9b
    torchrun --nproc-per-node 8 train.py --model google/gemma-2-27b --shard

Each process runs the whole program and takes its share: micro-batches of a step, batches of pairs,
prompts. Rank 0 alone speaks and writes; all processes must see the run's folder. Started in any
other way there is one process, and each function below returns what it was given.

Why not DistributedDataParallel: the adapters are a few MB, so one sum of one buffer a step is all
there is to say. DDP would average where a sum is wanted, and wrap the model.

A process that dies takes the others with it: torchrun ends them. The first that knows why says it.
"""

import errno
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from run.files import InputError, run_command

LARGE = 1 << 22                    # entries: 16 MB, summed over the processes by itself
DRIVER = Path("/proc/driver/nvidia/version")     # is there if a driver of NVIDIA's is loaded
GRACE = 20                         # seconds that a process has after SIGTERM
PATIENCE = timedelta(minutes=30)   # with a process that lives and doesn't answer
store = None                       # held by torchrun's agent, so it outlives every process


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def run(main: Callable):
    """run_command(main), in each process that torchrun started or in the only one."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        run_command(main)
    try:
        run_command(lambda: _one_of_many(main))
    except SystemExit as end:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        # Python's own way out now and then aborts over a thread of gloo's that is still at work
        os._exit(int(end.code or 0))


def _one_of_many(main):
    global store
    store, process, processes = next(dist.rendezvous("env://", timeout=PATIENCE))
    if process > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        backend = _take_card()
        dist.init_process_group(backend, store=store, rank=process, world_size=processes,
                                timeout=PATIENCE)
        _watch_over()
        code = main()
        if not code:
            maximum(0)                             # wait until all have come this far
            dist.destroy_process_group()
        return code
    except (InputError, OSError, KeyboardInterrupt):
        if not last_word():
            sys.exit(2)
        raise
    except Exception:
        sys.stderr = sys.__stderr__                # a traceback is for everybody to print
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the agent's, once the first process has ended


def _watch_over():
    """After SIGTERM, end within GRACE, also where the main thread hangs in a collective.

    torchrun sends it when another process has died, and kills without a word 30 s later. Python's
    own handlers wait for the main thread; this one reads what the interpreter writes at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def watch():
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(GRACE)
        if last_word():
            print(f"process {rank()} of {world_size()} didn't end within {GRACE} s of SIGTERM. "
                  "torchrun sends it when another process has died. The run goes on from its last "
                  "checkpoint by --resume", file=sys.stderr)
        os._exit(2)
    threading.Thread(target=watch, daemon=True).start()


def _take_card():
    """Make "cuda" this process's own card, where there are cards; the backend to talk by."""
    cards = torch.cuda.device_count()
    card = int(os.environ["LOCAL_RANK"])
    if not cards:
        return "gloo"
    if card >= cards:
        raise InputError(f"--nproc-per-node asks for more processes than there are GPUs, {cards} "
                         "(CUDA_VISIBLE_DEVICES= hides them, to run on the CPU)")
    torch.cuda.set_device(card)
    return "cpu:gloo,cuda:nccl"


def default_device() -> str:
    """cuda where PyTorch can use it, else cpu; says on stderr where its driver is too old."""
    if torch.cuda.is_available():
        return "cuda"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if torch.version.cuda and DRIVER.exists() and not is_hidden:
        print(f"warning: PyTorch can't use this machine's GPU, so the CPU is taken: it needs a "
              f"driver for CUDA {torch.version.cuda} (nvidia-smi names the driver's), or a PyTorch "
              "for an older CUDA", file=sys.stderr)
    return "cpu"


def check_device(name: str) -> str:
    """The device's name, if this machine has it. Raises InputError."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def last_word() -> bool:
    """Whether this process is the first that says why the run ends; opens its stderr then."""
    try:
        is_first = store is None or store.add("last word", 1) == 1
    except RuntimeError:                           # the agent is gone
        is_first = True
    if is_first and store is not None:
        sys.stderr = sys.__stderr__
    return is_first


# ------------------------------------------------------------------------------
# Shares, and what becomes of them

def _collective(operation):
    """An operation of all processes; its failure means that one of them has died."""
    @wraps(operation)
    def guarded(*args, **kwargs):
        try:
            return operation(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise
            message = ("another process has died, or didn't answer for 30 minutes: the run goes on "
                       "from its last checkpoint by --resume")
            place = f"process {rank()} of {world_size()}"
            raise ConnectionError(errno.ECONNRESET, message, place) from error
    return guarded


def own_share(items: Sequence) -> Sequence:
    """This process's share of a list that all have: every world_size()-th item."""
    return items[rank()::world_size()]


@_collective
def gather(value):
    """The JSON-able values of all processes, a list by rank. (torch's own gather would pickle.)"""
    if world_size() == 1:
        return [value]
    text = json.dumps(value, default=str).encode()
    size = maximum(len(text))
    padded = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in gather_tensors(padded)]


@_collective
def gather_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, of one shape, of all processes, a list by rank."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


@contextmanager
def agreed() -> Iterator[None]:
    """A block of all processes, without collectives: an InputError or OSError in one ends all."""
    if world_size() == 1:
        yield
        return
    own_error = None
    try:
        yield
    except (InputError, OSError) as error:
        own_error = error
    errors = [message for message in gather(own_error and str(own_error)) if message]
    if errors:
        raise own_error or InputError(errors[0])


def on_rank_zero(action: Callable, *arguments):
    """action(*arguments), called by rank 0 alone: all return its value or raise its error."""
    result = None
    with agreed():
        if rank() == 0:
            result = action(*arguments)
    return gather(result)[0]


@_collective
def maximum(number: int) -> int:
    """The largest of the processes' integers."""
    if world_size() == 1:
        return int(number)
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@_collective
def sum_tensors(*tensors: torch.Tensor):
    """Sum each tensor over the processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_gradients(parameters: Sequence[torch.Tensor], *more: torch.Tensor):
    """Sum the parameters' gradients, and the tensors `more`, in place. FSDP2 has summed its own."""
    if world_size() == 1:
        return
    tensors = list(more)
    for parameter in parameters:
        if is_split(parameter):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        tensors.append(parameter.grad)
    # Small ones are summed in one buffer: an adapter has hundreds
    small = [tensor for tensor in tensors if tensor.numel() < LARGE]
    flat = torch.cat([tensor.flatten() for tensor in small])
    sum_tensors(flat, *(tensor for tensor in tensors if tensor.numel() >= LARGE))
    for tensor, part in zip(small, flat.split([tensor.numel() for tensor in small])):
        tensor.copy_(part.view_as(tensor))


@_collective
@torch.no_grad()
def broadcast(tensors: Iterable[torch.Tensor]):
    """Put rank 0's values into all processes' tensors."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# ------------------------------------------------------------------------------
# A model that doesn't fit on one card

def shard(model, device: torch.device, everything=False):
    """Split the matrices of a Gemma2's blocks over the processes, by rows (FSDP2).

    A block is gathered when it runs, forward and backward, so a card holds its share and about two
    blocks. Embedding and norms stay whole, or are split too with `everything`, for full
    fine-tuning. The model may lie on the meta device: load_model then reads only this process's
    rows. Adapters come in afterwards, so FSDP doesn't know them: they are whole everywhere. Every
    forward is now one of all processes (is_sharded). One process alone keeps the model whole.
    """
    if world_size() == 1:
        return
    # half a second to import, which every command would pay
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    whole = {weight for weight in model.parameters()
             if weight.dim() == 1 or weight is model.embed_tokens.weight}
    # Gradients of a step are summed, not averaged, and in float32
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy,
                    ignored_params=set() if everything else whole)
        module.set_gradient_divide_factor(1)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")  # what we call in the place of `forward`


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the model is sharded, so that all processes must make the same forwards."""
    return hasattr(model, "set_requires_gradient_sync")         # a method of FSDPModule


def is_split(tensor: Any) -> bool:
    """Whether FSDP2 has split a tensor, so that this process holds some of its rows."""
    return hasattr(tensor, "full_tensor")                       # a method of DTensor


def whole(tensor: Any) -> torch.Tensor:
    """All rows of a tensor that may be split: all processes must ask for it."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def own_rows(tensor: Any) -> tuple[torch.Tensor, int]:
    """(the rows of a tensor that lie here, the number of the first). FSDP2 cuts as torch.chunk."""
    if not is_split(tensor):
        return tensor, 0
    mesh = tensor.device_mesh
    most = math.ceil(len(tensor) / mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * most, len(tensor))
