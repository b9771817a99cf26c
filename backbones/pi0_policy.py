"""pi0 (arXiv:2410.24164) and pi0.5 as the body of a policy: from observations to rows that heads and critics read, and
the flow head.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.consistency import SIGMA_DATA
from backbones.pi0 import PRESETS, ActionExpert, Pi0, Pi0Error, Prefix, choose_trainable, load_pi0
from backbones.units import Units, action_box

CAMERAS = ("primary", "wrist")  # of the observations, in the order of the model's


class FlowActor(nn.Module):
    """pi0's action expert as a policy over action chunks: noise flows to a chunk along the predicted velocity.

    It works in its own units, with mean 0 and standard deviation 1 as the flow assumes: chunk in [-1, 1] = mean + unit * x.
    What it reads of a state is a context (cache, valid, state), computed once and shared by its N samples; a released
    model's further action dimensions are zeros in training, and cut off.
    """

    def __init__(self, expert: ActionExpert, mean: Tensor, unit: Tensor, tail: tuple[int, int], H: int, steps: int):
        super().__init__()
        self.expert, self.H, self.tail, self.steps = expert, H, tail, steps
        self.register_buffer("mean", mean.clone())  # [D]
        self.register_buffer("unit", unit.clone())  # [D]

    def context(self, cache: Tensor, valid: Tensor, proprio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: cache, valid as in `Prefix`, proprio [B, P] -> cache, valid, state [B, state_dim]."""
        return cache, valid, F.pad(proprio, (0, self.expert.config.state_dim - proprio.shape[1]))

    def unpack(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The context in rows [B, F] that `Pi0Policy.row` packed: cache, valid, and the tail: embedding, proprio."""
        c = self.expert.config
        numbers = 2 * c.depth * c.kv_heads * c.head_dim  # of a token's cache
        P = (feature.shape[1] - sum(self.tail)) // (numbers + 1)  # prefix tokens
        cache, valid, _, proprio = feature.split([numbers * P, P, *self.tail], 1)
        return self.context(cache.reshape(-1, c.depth, 2, P, c.kv_heads, c.head_dim), valid > 0, proprio)

    def flow(self, context: tuple[Tensor, Tensor, Tensor], n: int, generator) -> Tensor:
        """Draw n chunks per state: [B, n, D] in [-1, 1]."""
        shape = (len(context[0]), n, self.H, self.expert.config.action_dim)
        x = self.expert.sample(*context, torch.randn(shape, generator=generator, device=self.unit.device), self.steps)
        return (self.mean + self.unit * x[..., : len(self.unit) // self.H].flatten(2)).clamp(-1, 1)

    def sample(self, feature: Tensor, n: int, generator, second_sigma: float = 0.0) -> Tensor:
        """As `ConsistencyActor.sample`. Samples of a flow spread by themselves: `second_sigma` has no use here."""
        return self.flow(self.unpack(feature), n, generator)


class Pi0Policy(Units):
    """pi0 and the units of what goes in and out; scripts add the heads and `act`.

    `flow` holds pi0's own policy. A script that has it as its `actor` empties `flow`, and rows then hold the cache.
    """

    window = 1  # observation steps that it sees

    def __init__(
        self, preset: str, checkpoint: str | None, obs: dict[str, np.ndarray], action: np.ndarray, chunk_len: int,
        relative: bool, action_range: float, instruction: str, finetune: str, bf16: bool, flow_steps: int,
    ):  # fmt: skip
        """A policy for what demonstrations look like, with the instruction of the task.

        preset, checkpoint   one of pi0.PRESETS, and the source of released weights for `load_pi0`; None: random
        obs, action          of the demonstrations: "proprio" [N, P], cameras [N, H, H, 3]; [M, A] in controller units
        chunk_len            H, actions per decision
        relative             the controller takes differences, within [-1, 1]
        action_range         the action box as a multiple of the largest demonstrated action, per dimension
        finetune             what is trained, for `choose_trainable`
        bf16                 the vision-language model in bfloat16
        flow_steps           Euler steps from noise to actions

        Raises: Pi0Error, one line, if the weights or the tokenizer can't be had, or are too small.
        """
        super().__init__(obs["proprio"], action, relative, action_range)
        self.H, self.instruction = chunk_len, instruction
        low, high = np.quantile(obs["proprio"], (0.01, 0.99), axis=0)  # what pi0.5's digits span
        self.register_buffer("proprio_low", torch.as_tensor(low, dtype=torch.float32))
        self.register_buffer("proprio_high", torch.as_tensor(high, dtype=torch.float32))
        centre, scale = action_box(action, relative, action_range)  # as `normalise`, which needs more than shapes
        box = np.clip((action - centre) / scale, -1, 1)
        mean, spread = (torch.as_tensor(x, dtype=torch.float32).repeat(self.H) for x in (box.mean(0), box.std(0)))
        # At most a quarter of the box: the gripper's two positions have to count for more than their spread says.
        spread = spread.clamp(0.02, 0.25)
        self.chunk_unit = spread / SIGMA_DATA  # [H*A]; networks see chunk / unit
        model = self.build(preset, checkpoint, obs)
        choose_trainable(model, finetune)
        self.backbone = model.prefix.bfloat16() if bf16 else model.prefix
        tail = (model.config.embedding_dim, self.proprio_dim)
        self.flow = nn.ModuleList([FlowActor(model.expert, mean, spread, tail, self.H, flow_steps)])
        self.tail_dim = sum(tail)  # the end of each row, which critic and one-step head read

    def build(self, preset: str, checkpoint: str | None, obs: dict[str, np.ndarray]) -> Pi0:
        """The model for these observations. Raises: Pi0Error if it can't be had."""
        config, P, A = PRESETS[preset], self.proprio_dim, self.action_dim
        seen = tuple(name for name in CAMERAS if name in obs)
        if config.text == "hash":
            side = obs["primary"].shape[1] if "primary" in obs else config.image_size
            sizes = dict(cameras=seen, lowdim_dim=0 if seen else P, action_dim=A, state_dim=P, image_size=side)
            config = dataclasses.replace(config, **sizes)
        else:
            config = dataclasses.replace(config, cameras=config.cameras[: len(seen)])  # leaving out is masking
        if P > config.state_dim or A > config.action_dim:
            room = f"{config.state_dim} numbers of proprio and {config.action_dim} of actions"
            raise Pi0Error(f"{preset} has room for {room}; this robot and task have {P} and {A}")
        self.weights = {"weights": checkpoint or "random"}
        if checkpoint:
            loaded = load_pi0(checkpoint, config)
            model, self.weights = loaded.model, self.weights | {"weights_sha256": loaded.sha256}
        else:
            model = Pi0(config)
        if not self.proprio_mean.is_meta:  # with shapes alone, nothing is tokenised
            model.prefix.prompt(self.instruction, torch.zeros(1, P))  # fails here or not at all
        return model

    @property
    def flow_policy(self) -> FlowActor:
        """pi0's own policy: the flow head, or the one-step head's teacher."""
        return self.flow[0] if len(self.flow) else self.actor

    @cached_property
    def feature_dim(self) -> int:
        """F: from one observation."""
        side, proprio = self.backbone.config.image_size, self.proprio_mean.cpu().numpy()[None]
        images = {name: np.zeros((1, 1, side, side, 3), np.uint8) for name in CAMERAS}
        with torch.no_grad():
            return self.feature({"proprio": proprio} | images).shape[1]

    def observe(self, obs: dict[str, np.ndarray], noise: float = 0.0, generator=None) -> tuple[Prefix, Tensor]:
        """The backbone's pass over observations of N states, and their normalised proprio [N, P], noisy if asked for."""
        obs = {k: torch.as_tensor(v, device=self.proprio_mean.device) for k, v in obs.items()}
        proprio = self.perturb(self.normalise_proprio(obs["proprio"]), noise, generator)  # [N, P]
        span = (self.proprio_high - self.proprio_low).clamp_min(1e-6)
        digits = 2 * (proprio * self.proprio_std + self.proprio_mean - self.proprio_low) / span - 1  # for pi0.5
        ids, valid = self.backbone.prompt(self.instruction, digits)
        names = zip(self.backbone.config.cameras, CAMERAS, strict=False)  # the model's and ours
        images = {camera: obs[name].flatten(0, -4) for camera, name in names}  # W = 1
        return self.backbone(images, ids, valid, lowdim=None if images else proprio), proprio

    def row(self, prefix: Prefix, proprio: Tensor) -> Tensor:
        """What is kept of a state, [N, F]: embedding and proprio; in front of them the cache, if the policy reads it."""
        parts = [prefix.embedding, proprio]
        if not len(self.flow):
            parts = [prefix.cache.flatten(1).float(), prefix.valid.float(), *parts]
        return torch.cat(parts, -1)

    def feature(self, obs: dict[str, np.ndarray]) -> Tensor:
        """Observations of N states to rows [N, F]."""
        return self.row(*self.observe(obs))

    def recent(self, seen: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The last observation of running episodes, as `observe` wants it: a window of one step."""
        return {k: v if k == "proprio" else v[:, None] for k, v in seen[-1].items()}
