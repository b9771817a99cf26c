"""--compile: each loss as one program, by torch.compile; and what losses need so that they can be."""

from __future__ import annotations

import functools
import os
import shutil

import torch
from torch import Tensor, nn

from plumbing.errors import UserError

mode = "off"  # --compile, in this process


def use(wanted: str, device: str) -> None:
    """--compile, and TF32 on a GPU, before the first update. Raises: UserError where there is nothing to compile with."""
    global mode
    compiler = os.environ.get("CXX") or "g++"
    if wanted != "off" and device == "cpu" and not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and {compiler} isn't there: install it, or leave it out")
    mode = wanted
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32


def compiled(loss):
    """Of a function that returns a loss and what to log of it: compiled as a whole, at its first call with --compile.

    Noise is drawn as without it, so the losses are the same up to rounding; generators must be None, torch's own.
    """

    def detached(*args, **kwargs):
        found, logs = loss(*args, **kwargs)
        return found, {name: value.detach() for name, value in logs.items()}

    @functools.wraps(loss)
    def call(*args, **kwargs):
        run = detached if mode == "off" else program(mode)
        return run(*args, **kwargs)

    @functools.cache
    def program(mode: str):
        options = {"fallback_random": True, "triton.cudagraphs": mode == "graphs"}
        return torch.compile(detached, fullgraph=True, options=options)

    return call


def next_update() -> None:
    """CUDA graphs may use the memory of what the last update returned again."""
    if mode == "graphs":
        torch.compiler.cudagraph_mark_step_begin()


def fixed(net: nn.Module):
    """The same function of its inputs, without gradients for its weights."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}

    def call(*inputs):
        return torch.func.functional_call(net, weights, inputs)

    return call


def drawn(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index by the weights of its row: [B, K] -> [B]. It doesn't wait for a GPU, as torch.multinomial does."""
    waited = torch.empty_like(weight).exponential_(generator=generator)
    return (weight / waited).argmax(-1)
