"""Weights that the ranks of a run share out between them, by torch's FSDP2.

Each rank holds a part of every tensor, of its gradient, of what Adam keeps of it, and of its average. A block's whole
tensors are together only while it is computed. With one rank nothing in here does anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def shared_out(model: nn.Module, blocks: Callable[[nn.Module], dict[nn.Module, str]]) -> nn.Module:
    """`model` with one rank; with more, a copy of which this rank holds a part.

    blocks  of a model: what is computed as a whole, inner before outer, and the method that does it
    """
    if not dist.is_initialized():
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    part = copy.deepcopy(model)
    device = next(part.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block, method in blocks(part).items():
        fully_shard(block, mesh=mesh)
        if method != "forward":
            register_fsdp_forward_method(block, method)
    return part


def is_part(x) -> bool:
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part."""
    return x.full_tensor() if is_part(x) else x


def own(x):
    """This rank's part of it."""
    return x.to_local() if is_part(x) else x


class Cloning(NamedTuple):
    """What is cloned."""

    weights: nn.ParameterList
    optimizer: torch.optim.Optimizer
    averaged: torch.optim.swa_utils.AveragedModel  # of the weights: cloning ends with it

    def end(self, weights: list[nn.Parameter]) -> None:
        """Into `weights`, the whole ones that these came from, goes their average, if there was an update."""
        if not self.averaged.n_averaged:
            return
        for weight, mean in zip(weights, self.averaged.module, strict=True):
            weight.data.copy_(whole(mean.detach()))

    def parts(self, name: str) -> dict:
        """What a checkpoint holds of it, beside the agent's weights."""
        if any(map(is_part, self.weights)):
            return {f"{name}_shards": Shards(self)}
        return {f"{name}_optimizer": self.optimizer, f"{name}_averaged": self.averaged}


class Shards:
    """A rank's own part of a cloning, in its checkpoint. Another number of ranks can't go on with it."""

    def __init__(self, cloning: Cloning):
        self.cloning = cloning

    def state_dict(self) -> dict:
        return {name: tree_map(own, part.state_dict()) for name, part in self.cloning._asdict().items()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("weights", "averaged"):
            held = getattr(self.cloning, name).state_dict()
            for key, value in state[name].items():
                own(held[key]).copy_(value)
        moments = {
            i: {name: like(value, self.cloning.weights[i]) for name, value in of_weight.items()}
            for i, of_weight in state["optimizer"]["state"].items()
        }
        self.cloning.optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def like(x: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a tensor, one again with the others' as those of `weight` are. A number stays as it is."""
    from torch.distributed.tensor import DTensor

    if not x.ndim:
        return x
    sizes = dict(shape=weight.shape, stride=weight.stride())
    return DTensor.from_local(x, weight.device_mesh, weight.placements, run_check=False, **sizes)
