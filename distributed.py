"""One process among those that torchrun started, or the only one: who it is, and what all of them do together.

Processes agree through PyTorch's own engine: NCCL between GPUs, gloo between CPUs. With one process every function here
does what it says without any exchange.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError
from startup import cores

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # to wait while the first decodes a catalogue; one that died is noticed at once


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes, draws and speaks for all."""
    return rank() == 0


def local_rank() -> int:
    """Which of this machine's processes this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def restarted() -> bool:
    """Whether torchrun has started these processes anew after one failed (`--max-restarts`).

    All processes are asked: torchrun may not count the restart on a machine whose own processes did not fail.
    """
    return any_of(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)


def may_restart() -> bool:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def share_cores() -> None:
    """Let torchrun's processes on a CPU compute with all cores: it gives each a single thread."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, cores() // processes))


@contextlib.contextmanager
def joined() -> Iterator[torch.device]:
    """While entered, this process belongs to torchrun's group, if that started it; yields the device to work on.

    Only the first process's standard output is shown.

    Raises:
        UserError: the machine has GPUs, but fewer than processes.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver too old for torch counts its own
    alone = "TORCHELASTIC_RUN_ID" not in os.environ
    if gpus and local_rank() >= gpus:
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes share {gpus} GPUs: --nproc-per-node {gpus}")
    device = torch.device("cuda", local_rank()) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    share_cores()
    if alone:
        yield device
        return
    _start("cpu:gloo,cuda:nccl" if gpus else "gloo")  # gloo too, for tensors on the CPU
    try:
        with contextlib.ExitStack() as quiet:
            if not first():
                nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8", errors="surrogateescape"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
            yield device
    finally:
        if sys.exc_info()[0] is None:  # otherwise the others are not there to end the group with
            dist.destroy_process_group()


def _start(backend: str) -> None:
    """Meet the other processes.

    The addresses in torchrun's store outlive a restart and then still name the processes that are gone
    (pytorch/pytorch#135712). On one machine a prefix with the count of restarts tells them apart; on several the count
    may differ.
    """
    if may_restart() and os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        raise UserError(
            "torchrun --max-restarts on several machines needs the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or processes started anew would look for those that are gone"
        )
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)


def decided(decide: Callable[[], T]) -> T:
    """Run `decide()` in the first process; all get its result. If it raises there, torchrun ends the others."""
    box = [decide() if first() else None]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def agree(fact: object, what: str) -> None:
    """Raise a `UserError` if this process's `fact` is not the first one's: machines may see different files."""
    if decided(lambda: fact) != fact:
        raise UserError(f"the {what} of this machine is not the one of the first process; make them alike")


def in_turn(make: Callable[[], T]) -> T:
    """`make()` in the first process, then in the first of each other machine, then in all others.

    So the others find what the first leaves on a disk, such as decoded pictures.
    """
    turn = 0 if first() else 1 if local_rank() == 0 else 2
    for now in range(3):
        if now == turn:
            made = make()
        wait_for_all()
    return made


def any_of(flag: bool) -> bool:
    """Whether the flag is true in any of the processes."""
    raised = torch.tensor(int(flag))
    if world() > 1:
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def wait_for_all() -> None:
    """Return once all processes have come here."""
    any_of(False)


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(rows: T) -> T:
    """This process's part of a sequence: every `world`-th item."""
    return rows[rank() :: world()]


def unshared(part: Tensor, count: int) -> Tensor:
    """The inverse of `share`: the first `count` rows in order, from parts that were padded to equal length."""
    if world() == 1:
        return part[:count]
    parts = [torch.empty_like(part) for _ in range(world())]
    dist.all_gather(parts, part.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


def in_step(model: nn.Module) -> nn.Module:
    """Wrap the model for `exchange`. Only what is trained has gradients, so only adapters and heads are exchanged.

    `find_unused_parameters` is set although all are used: without it, DDP reorders gradients after a process's first
    step. From three processes on, their sum depends on that order, and a run would not be the same after a restart.
    """
    if world() == 1:
        return model
    for buffer in model.buffers():  # an int8 base: it never changes, so it is sent this once
        dist.broadcast(buffer, 0)
    with warnings.catch_warnings():  # torch 2.14 calls it `forward_sync_buffers`, which older ones do not know
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)


def exchange(model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """A context whose backward pass exchanges gradients `now`, with those of earlier passes, or keeps them for a later
    one.

    Args:
        model: from `in_step`.
    """
    return contextlib.nullcontext() if now or world() == 1 else model.no_sync()
