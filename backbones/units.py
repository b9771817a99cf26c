"""The units of what goes into a policy and comes out of it, from demonstrations; base of the policies here."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

SIGMA_DATA = 0.5  # standard deviation of actions in the units of the heads, as EDM and ConRFT assume it
ACTION_RANGE = 1.5  # the policy's action box as a multiple of the largest demonstrated action, per dimension


def gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """Standard normal noise on the device of `like`; from a list, each of the rows is of a generator of its own (CPU)."""
    if isinstance(generator, list):
        rows = [torch.randn(shape[1:], generator=one) for one in generator]
        return torch.stack(rows).to(like.device)
    return torch.randn(shape, generator=generator, device=like.device)


class FastTanh(torch.autograd.Function):
    """tanh x = 2 sigmoid(2x) - 1, in the memory of x: a third of torch.tanh's time on a CPU, equal to rounding."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """[..] -> [..], the same memory."""
        y = x.mul_(2).sigmoid_().mul_(2).sub_(1)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The gradient towards x [..]."""
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, y)


def tanh_(x: Tensor) -> Tensor:
    """torch.tanh [..], on a CPU written over x, which no one else may need: a LayerNorm doesn't need its own result."""
    if x.device.type != "cpu":
        return torch.tanh(x)
    if torch.compiler.is_compiling():
        return 2 * torch.sigmoid(2 * x) - 1
    return FastTanh.apply(x)


def action_box(action: np.ndarray, relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half the side, [A] each, of the box around demonstrated actions [M, A] that a policy acts within.

    It is ACTION_RANGE times as large as what was demonstrated; that of a relative controller has its centre at 0.
    """
    centre = np.zeros(action.shape[1]) if relative else (action.max(0) + action.min(0)) / 2
    return centre, np.maximum(ACTION_RANGE * np.abs(action - centre).max(0), 1e-3)


class Units(nn.Module):
    """Actions in a box [-1, 1], proprio in standard deviations; both from demonstrations, and kept in the state_dict."""

    def __init__(self, proprio: np.ndarray, action: np.ndarray, relative: bool, gripper: bool = True):
        """Proprio [N, P] and actions [M, A] of demonstrations.

        relative   an action of zeros keeps the robot still, whatever the gripper does
        gripper    the last number of an action is a gripper's command
        """
        super().__init__()
        self.gripper = gripper
        self.relative = relative
        self.proprio_dim = proprio.shape[1]
        self.action_dim = action.shape[1]
        centre, scale = action_box(action, relative)
        units = dict(proprio_mean=proprio.mean(0), proprio_std=proprio.std(0) + 0.01)  # 0.01: metres, radians
        for name, value in (units | dict(action_centre=centre, action_scale=scale)).items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def normalise_proprio(self, proprio: Tensor) -> Tensor:
        """[N, P] to standard deviations of the demonstrations, within 5."""
        return ((proprio - self.proprio_mean) / self.proprio_std).clamp(-5, 5)

    def perturb(self, feature: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        """Gaussian noise on the proprio within features [B, F], in standard deviations of the demonstrations.

        The joint angles at the start give a demonstration away to a few digits, and a policy that recognises it needs
        no image. With noise it has to look.
        """
        if not noise:
            return feature
        noise = noise * torch.randn((len(feature), self.proprio_dim), generator=generator, device=feature.device)
        return torch.cat([feature[:, : -self.proprio_dim], feature[:, -self.proprio_dim :] + noise], -1)

    def normalise(self, action: np.ndarray) -> np.ndarray:
        """Controller units [.., A] to the policy's box [-1, 1]."""
        centre, scale = self.action_centre.cpu().numpy(), self.action_scale.cpu().numpy()
        return np.clip((action - centre) / scale, -1, 1).astype(np.float32)

    def denormalise(self, action: np.ndarray) -> np.ndarray:
        """The policy's box to controller units, clipped to the controller's own box if it is [-1, 1]."""
        action = action * self.action_scale.cpu().numpy() + self.action_centre.cpu().numpy()
        return np.clip(action, -1, 1) if self.relative else action

    def hold_action(self, last: np.ndarray) -> np.ndarray:
        """The normalised action that keeps still, gripper (if there is one) as in `last` [A]."""
        hold = np.zeros_like(last) if self.relative else last.copy()
        if self.gripper:
            hold[-1] = last[-1]
        return hold


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels, not biases and norms, as Octo's training does."""
    matrices = [weight for weight in module.parameters() if weight.dim() > 1]
    others = [weight for weight in module.parameters() if weight.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
