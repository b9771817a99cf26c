"""Evaluation in a process beside training: a snapshot of the weights goes there, the metrics come back later."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import pickle
import signal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from plumbing import stop
from plumbing.flags import UserError

DIED = "the process that evaluates has died (out of memory?); go on with --resume"


class Evaluator:
    """Calls a script's `evaluate(env, agent, args, whole)` there, on environments of its own; same weights, same result.

    One evaluation at a time: `submit` waits for the one before. The process starts at the first one.
    """

    def __init__(self, args, make_env, evaluate, agent: nn.Module):
        self.work = (args, make_env, evaluate, agent)  # the agent's structure; weights follow
        self.process = None
        self.done = None  # metrics of an evaluation in this process

    def submit(self, weights: dict[str, Tensor], whole: bool) -> None:
        """Start on these weights; `whole`: episodes go on to the time limit after a success."""
        if self.work[0].robot != "maniskill":
            self.done = self.here(weights, whole)
            return
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, there = context.Pipe()
            self.process = context.Process(target=serve, args=(there,))
            with stop.deaf_children():
                self.process.start()
            atexit.register(self.process.terminate)  # where the program ends before `close`
            there.close()
            self.send(pickle.dumps(self.work))
        contiguous = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        self.send(save(contiguous))
        self.send(pickle.dumps(whole))

    def send(self, message: bytes) -> None:
        """Raises: UserError where the process is gone."""
        try:
            self.pipe.send_bytes(message)
        except ConnectionError as error:
            raise UserError(DIED) from error

    def here(self, weights: dict[str, Tensor], whole: bool) -> dict[str, float]:
        """With a robot: there is one arm, and training waits for it."""
        args, make_env, evaluate, agent = self.work
        evaluated = copy.deepcopy(agent)
        evaluated.load_state_dict(weights)
        return evaluate(make_env(args, args.num_envs), evaluated, args, whole)

    def ready(self, seconds: float = 0.0) -> bool:
        """Is the result there, now or within so many seconds?"""
        return self.done is not None or self.pipe.poll(seconds)

    def result(self) -> dict[str, float]:
        """Metrics of the evaluation that was submitted; waits for them. Raises: UserError."""
        if self.done is not None:
            metrics = self.done
            self.done = None
            return metrics
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(DIED) from error
        if isinstance(result, str):
            raise UserError(result)
        return result

    def close(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join()
            atexit.unregister(self.process.terminate)


def serve(pipe) -> None:
    """The process: evaluates until the pipe is closed."""
    signal.signal(signal.SIGTERM, stop.leave)
    stop.follow_parent()
    torch.set_num_threads(1)
    try:
        args, make_env, evaluate, agent = pickle.loads(pipe.recv_bytes())
    except EOFError:  # the program has ended in between
        return
    env = None
    while True:
        try:
            weights = load(pipe.recv_bytes())
            whole = pipe.recv()
        except EOFError:
            break
        try:
            if env is None:
                env = make_env(args, args.num_envs)
            agent.load_state_dict(weights)
            pipe.send(evaluate(env, agent, args, whole))
        except UserError as error:
            pipe.send(str(error))
        except (EOFError, OSError, MemoryError) as error:
            pipe.send(f"the evaluation has failed (out of memory?): {error!r}; go on with --resume")
    if env is not None:
        env.close()
