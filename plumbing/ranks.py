"""One run in several processes, its ranks: `torchrun --nproc-per-node N force_octo.py ...`.

Each rank has its own environments, replay buffers and random generators, and draws its share of each batch. Gradients
are averaged over ranks at the end of a backward pass, so all have the same weights at all times. Ranks count control
steps and episodes together, and go through stages and updates in lock-step. Rank 0 alone writes, evaluates and films.

Without torchrun there is one rank, and nothing in here does anything. The process group is gloo's for tensors on the
CPU, and NCCL's for those on GPUs, of which each rank has one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from plumbing import stop
from plumbing.errors import UserError

FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=7)  # others wait while rank 0 makes demonstrations; that one has died is seen at once
LOST = "gloo|NCCL|Connection (closed|reset)|Broken pipe|Socket|TCPStore|process group"

RANK = 0
WORLD = 1


def rank() -> int:
    return RANK


def world() -> int:
    """How many ranks there are."""
    return WORLD


# --- the beginning and the end ---
def join() -> None:
    """Become the rank that torchrun's environment variables say. Raises: UserError if they don't fit each other."""
    global RANK, WORLD
    if WORLD > 1 or not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return
    missing = [name for name in FROM_TORCHRUN if not os.environ.get(name)]
    if missing:
        what = f"{' and '.join(missing)} missing beside RANK or WORLD_SIZE"
        raise UserError(f"{what}: start ranks with torchrun --nproc-per-node N, or unset these variables")
    try:
        number = int(os.environ["RANK"])
        count = int(os.environ["WORLD_SIZE"])
        local = int(os.environ["LOCAL_RANK"])
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK must be numbers: start ranks with torchrun ({error})") from error
    if not 0 <= number < count:
        raise UserError(f"RANK={number} must be in 0..{count - 1} with WORLD_SIZE={count}: start ranks with torchrun")
    if count == 1:
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())  # "cuda" is this one from here on
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    RANK = number
    WORLD = count
    stop.echo = 2.0


def check(args) -> None:
    """Can several ranks do what the flags say? Raises: UserError."""
    if WORLD == 1:
        return
    if args.eval_only:
        raise UserError("--eval-only is the work of one process: leave torchrun out")
    if args.compile != "off":
        raise UserError("--compile is for one process: leave it out, or torchrun")
    if args.robot != "maniskill":
        raise UserError(f"--robot {args.robot} is one arm, and needs one rank: leave torchrun out")
    if args.sim_backend != "physx_cpu":
        raise UserError(f"--sim-backend {args.sim_backend} fills a GPU from one process: leave torchrun out")
    if getattr(args, "intervention", "none") != "none":
        raise UserError(f"--intervention {args.intervention} is one operator, and needs one rank: leave torchrun out")
    for name in ("batch_size", "sft_batch_size"):
        size = getattr(args, name, 2 * WORLD)
        if size % WORLD or size < 2 * WORLD:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {size} is shared by {WORLD} ranks: give a multiple, at least {2 * WORLD}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.device == "cuda" and local > torch.cuda.device_count():
        raise UserError(f"{local} ranks need a GPU each, and there are {torch.cuda.device_count()}: start fewer here")


def leave() -> None:
    """At the end of a program that went well."""
    global RANK, WORLD
    if WORLD > 1:
        dist.destroy_process_group()
        RANK = 0
        WORLD = 1


def lost(error: BaseException) -> bool:
    """Did this come of the end of another rank, however that ended?"""
    return WORLD > 1 and isinstance(error, RuntimeError) and bool(re.search(LOST, str(error)))


def speaks_for_all() -> bool:
    """Of the ranks that end by a fault, the first to ask says why: the others would tell of it once more."""
    if WORLD == 1:
        return int(os.environ.get("LOCAL_RANK") or 0) == 0 or "WORLD_SIZE" not in os.environ
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("ended by a fault", 1) == 1
    except (RuntimeError, ValueError):  # the store has ended too
        return True


def exit_now(code: int) -> None:
    """The end by a fault, of one rank among others: without the end of its connections, which waits for theirs."""
    if not dist.is_initialized():
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(line: str) -> None:
    """A line of news on standard error, from rank 0 alone."""
    if RANK == 0:
        print(line, file=sys.stderr)


# --- together ---
def per_rank(size: int) -> int:
    """A rank's share of a batch; `check` has seen that it is a whole number."""
    return size // WORLD


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor that each rank has, without gradient: the denominator of a loss that is no plain mean.

    Ranks average gradients. So a loss that is a sum over this rank's samples, divided by the mean over ranks of what
    counts, has on average the gradient of the whole batch.
    """
    if WORLD == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / WORLD


def means(logs: dict) -> dict:
    """Logged values of the ranks' shares of a batch: those of the whole batch. All ranks log the same names."""
    if WORLD == 1:
        return logs
    own = torch.tensor([torch.as_tensor(value).item() for value in logs.values()], dtype=torch.float64)
    return dict(zip(logs, mean_over_ranks(own).unbind()))


def largest(number: int) -> int:
    """Of the ranks' numbers."""
    if WORLD == 1:
        return int(number)
    found = torch.tensor(int(number))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_all(value) -> list:
    """What each rank has, in their order."""
    if WORLD == 1:
        return [value]
    found = [None] * WORLD
    dist.all_gather_object(found, value)
    return found


def from_first(value):
    """What rank 0 has."""
    return from_all(value)[0]


def wait() -> None:
    """Until all ranks are here."""
    if WORLD > 1:
        largest(0)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 does what is within; then the others do, and find what it left."""
    if RANK:
        wait()
    yield
    if RANK == 0:
        wait()


# --- weights ---
def same_weights(weights: Iterable[Tensor]) -> None:
    """Rank 0's numbers, in all ranks' tensors."""
    if WORLD == 1:
        return
    for weight in weights:
        content = weight.detach()
        if content.dtype is torch.bool:
            content = content.view(torch.uint8)
        dist.broadcast(content, 0)


def average_gradients(weights: Iterable[Tensor]) -> None:
    """From now on, a backward pass ends with gradients that are means over ranks.

    All of a pass go over in one piece, after the last of them: a hundred small ones would take much longer. Passes that
    reach the same weights come in the same order on all ranks. With one rank there are no hooks.
    """
    if WORLD == 1:
        return
    learned = list({id(weight): weight for weight in weights}.values())
    reached = set()  # places in `learned`, in the pass under way

    def average() -> None:
        gradients = [learned[place].grad for place in sorted(reached)]
        reached.clear()
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= WORLD
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts):
            gradient.copy_(part.view_as(gradient))

    def arrived(place: int) -> None:
        if not reached:
            Variable._execution_engine.queue_callback(average)  # as FSDP does: once the pass is over
        reached.add(place)

    for place, weight in enumerate(learned):
        weight.register_post_accumulate_grad_hook(lambda weight, place=place: arrived(place))
