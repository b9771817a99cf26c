"""pi0 (arXiv:2410.24164) and pi0.5 as the body of a policy: from observations to rows that heads and critics read, and
pi0's own flow head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.pi0 import PRESETS, ActionExpert, Pi0, Pi0Config, Prefix, choose_trainable
from backbones.pi0_weights import check_pi0_weights, load_pi0
from backbones.units import SIGMA_DATA, Units, action_box, gaussian
from plumbing.flags import UserError

CAMERAS = ("primary", "wrist")  # of the observations, in the order of the model's
FLOW_STEPS = 10  # Euler steps of a sample, as pi0


class Context(NamedTuple):
    """What the action expert reads of N states; P prefix tokens."""

    cache: Tensor  # [N, depth, 2, P, kv_heads, head_dim], as in `Prefix`
    valid: Tensor  # [N, P] bool
    state: Tensor  # [N, state_dim]: normalised proprio and zeros


@dataclass
class Seen:
    """N observations after their pass through the backbone."""

    prefix: Prefix
    proprio: Tensor  # [N, P] normalised
    state_dim: int
    flow_reads: bool  # the policy is the flow head, which reads the cache

    @property
    def context(self) -> Context:
        missing = self.state_dim - self.proprio.shape[1]
        return Context(self.prefix.cache, self.prefix.valid, F.pad(self.proprio, (0, missing)))

    @property
    def feature(self) -> Tensor:
        """What is kept of each state, [N, F]: embedding and proprio; before them the cache, if the policy reads it."""
        tail = [self.prefix.embedding, self.proprio]
        if not self.flow_reads:
            return torch.cat(tail, -1)
        cache = self.prefix.cache.flatten(1).float()
        return torch.cat([cache, self.prefix.valid.float(), *tail], -1)


class MicroBatch(NamedTuple):
    """A part of a batch of B: b states, their chunks [b, D], and the share b / B."""

    obs: dict[str, Tensor]
    chunk: Tensor
    share: float

    def mean(self, loss: Tensor) -> Tensor:
        """What losses [b] add to the mean over the batch."""
        return self.share * loss.mean()


def micro_batches(obs: dict[str, Tensor], chunk: Tensor, size: int) -> Iterator[MicroBatch]:
    """The rows of a batch, `size` at a time, the last ones fewer; 0: all at once."""
    B = len(chunk)
    size = size or B
    for first in range(0, B, size):
        rows = slice(first, first + size)
        part = {name: value[rows] for name, value in obs.items()}
        yield MicroBatch(part, chunk[rows], len(chunk[rows]) / B)


def accumulate(losses: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add up the gradients of micro-batches' losses, each a share of the batch's. Returns the losses' sums.

    `losses` computes them one micro-batch after another, so that one graph at a time exists.
    """
    sums = {}
    for part in losses:
        sum(part.values()).backward()
        for name, loss in part.items():
            sums[name] = sums.get(name, 0) + loss.detach()
    return sums


def trained(part: nn.Module) -> list[nn.Parameter]:
    """Its weights but for frozen ones."""
    return [weight for weight in part.parameters() if weight.requires_grad]


class FlowActor(nn.Module):
    """pi0's action expert as a policy over action chunks: noise flows to a chunk along the predicted velocity.

    It works in its own units, in which chunks have mean 0 and standard deviation 1: chunk in [-1, 1] = mean + unit * x.
    What it reads of a state is a `Context`, computed once and shared by its N samples. A released model's further
    action dimensions are zeros in training, and cut off.
    """

    def __init__(self, expert: ActionExpert, mean: Tensor, unit: Tensor, tail: tuple[int, int], H: int):
        super().__init__()
        self.expert = expert
        self.H = H
        self.tail = tail  # width of embedding and of proprio, at the end of a row
        self.register_buffer("mean", mean.clone())  # [D]
        self.register_buffer("unit", unit.clone())  # [D]

    def unpack(self, feature: Tensor) -> Context:
        """The context in rows [B, F] of `Seen.feature`."""
        c = self.expert.config
        numbers = 2 * c.depth * c.kv_heads * c.head_dim  # of a token's cache
        tokens = (feature.shape[1] - sum(self.tail)) // (numbers + 1)
        cache, valid, _, proprio = feature.split([numbers * tokens, tokens, *self.tail], 1)
        cache = cache.reshape(-1, c.depth, 2, tokens, c.kv_heads, c.head_dim)
        return Context(cache, valid > 0, F.pad(proprio, (0, c.state_dim - proprio.shape[1])))

    def path(self, chunk: Tensor, n: int, generator) -> tuple[Tensor, Tensor, Tensor]:
        """Points on the way from noise (t = 1) to a chunk (t = 0), at n random times, and the velocity there.

        Shapes: chunk [B, D] in [-1, 1] -> points [B, n, H, action_dim], t [B, n], velocity like the points.
        """
        B = len(chunk)
        dims = self.expert.config.action_dim
        clean = ((chunk - self.mean) / self.unit).unflatten(1, (self.H, -1))  # [B, H, A]
        clean = F.pad(clean, (0, dims - clean.shape[-1]))[:, None]
        noise = torch.randn((B, n, self.H, dims), generator=generator, device=chunk.device)
        uniform = torch.rand((B, n), generator=generator, device=chunk.device)
        t = 0.001 + 0.999 * uniform ** (1 / 1.5)  # Beta(1.5, 1)
        time = t[..., None, None]
        return time * noise + (1 - time) * clean, t, noise - clean

    def flow(self, context: Context, n: int, generator) -> Tensor:
        """Draw n chunks per state: [B, n, D] in [-1, 1]."""
        shape = (len(context[0]), n, self.H, self.expert.config.action_dim)
        noise = gaussian(shape, self.unit, generator)
        x = self.expert.sample(*context, noise, FLOW_STEPS)
        A = len(self.unit) // self.H
        return (self.mean + self.unit * x[..., :A].flatten(2)).clamp(-1, 1)

    def sample(self, feature: Tensor, n: int, generator, second_sigma: float = 0.0) -> Tensor:
        """Draw n chunks per state [B, F]: [B, n, D] in [-1, 1]. They spread by themselves: no second step."""
        return self.flow(self.unpack(feature), n, generator)


class Teacher(nn.Module):
    """What pi0's flow does in each demonstrated state, for a one-step head to learn: two chunks a row, in [-1, 1]."""

    def __init__(self, unit: Tensor, rows: int):
        """unit [D] of chunks; as many rows as the demonstrations have, or 0: nothing is to be taught."""
        super().__init__()
        self.register_buffer("chunk", unit.new_zeros(rows, 2, len(unit)))

    def watch(self, rows: Tensor, flow: FlowActor, context: Context, generator) -> None:
        """Let the flow act in the states of rows [B]."""
        if len(self.chunk):
            self.chunk[rows] = flow.flow(context, 2, generator)

    def draw(self, rows: Tensor, generator) -> Tensor:
        """One of its two chunks for each of rows [B]: [B, D]."""
        which = torch.randint(2, rows.shape, generator=generator)
        return self.chunk[rows, which]


class Pi0Policy(Units):
    """pi0 and the units of what goes in and out; scripts add the heads and `act`.

    `flow` holds pi0's own policy. A script that has it as its `actor` takes it out, and rows then hold the cache.
    """

    window = 1  # observation steps that it sees

    def __init__(
        self, preset: str, checkpoint: str | None, resumed: bool, obs: dict[str, np.ndarray], action: np.ndarray,
        chunk_len: int, relative: bool, instruction: str, finetune: str, bf16: bool, gripper: bool = True,
    ):  # fmt: skip
        """A policy for what demonstrations look like, with the instruction of the task.

        preset, checkpoint   one of pi0.PRESETS, and the source of released weights for `load_pi0`; None: random
        resumed              the weights are yet to be loaded from a run's own checkpoint
        obs, action          of the demonstrations: "proprio" [N, P], cameras [N, H, H, 3]; [M, A] in controller units
        chunk_len            H, actions per decision
        relative             the controller takes differences, within [-1, 1]
        finetune             what is trained, for `choose_trainable`
        bf16                 as in `Pi0Config`
        gripper              the last number of an action is a gripper's command

        Raises: UserError, one line, if the weights or the tokenizer can't be had, or are too small.
        """
        super().__init__(obs["proprio"], action, relative, gripper)
        self.H = chunk_len
        self.instruction = instruction
        self.prompts: dict[torch.device, tuple[Tensor, Tensor]] = {}  # pi0's
        low, high = np.quantile(obs["proprio"], (0.01, 0.99), axis=0)  # what pi0.5's digits span
        self.register_buffer("proprio_low", torch.as_tensor(low, dtype=torch.float32))
        self.register_buffer("proprio_high", torch.as_tensor(high, dtype=torch.float32))
        centre, scale = action_box(action, relative)  # as `normalise`, which needs more than shapes
        box = np.clip((action - centre) / scale, -1, 1)
        mean = torch.as_tensor(box.mean(0), dtype=torch.float32).repeat(self.H)  # [H*A]
        spread = torch.as_tensor(box.std(0), dtype=torch.float32).repeat(self.H)
        # At most a quarter of the box: the gripper's two positions have to count for more than their spread says.
        spread = spread.clamp(0.02, 0.25)
        self.chunk_unit = spread / SIGMA_DATA  # [H*A]; networks see chunk / unit
        config = dataclasses.replace(PRESETS[preset], bf16=bf16)
        model = self.build(config, None if resumed else checkpoint, obs)
        choose_trainable(model, finetune)
        self.backbone = model.prefix
        tail = (model.config.embedding_dim, self.proprio_dim)
        self.flow = nn.ModuleList([FlowActor(model.expert, mean, spread, tail, self.H)])
        self.tail_dim = sum(tail)  # the end of each row, which critic and one-step head read

    def build(self, config: Pi0Config, checkpoint: str | None, obs: dict[str, np.ndarray]) -> Pi0:
        """The model for these observations. Raises: UserError if it can't be had."""
        P = self.proprio_dim
        A = self.action_dim
        seen = tuple(name for name in CAMERAS if name in obs)
        if config.text == "hash":
            side = obs["primary"].shape[1] if seen else config.image_size
            sizes = dict(cameras=seen, lowdim_dim=0 if seen else P, action_dim=A, state_dim=P, image_size=side)
            config = dataclasses.replace(config, **sizes)
        else:
            config = dataclasses.replace(config, cameras=config.cameras[: len(seen)])  # leaving out is masking
        if P > config.state_dim or A > config.action_dim:
            room = f"{config.state_dim} numbers of proprio and {config.action_dim} of actions"
            raise UserError(f"this model has room for {room}; this robot and task have {P} and {A}")
        self.weights = "random"
        if checkpoint:
            loaded = load_pi0(checkpoint, config)
            model = loaded.model
            self.weights = f"{checkpoint}, sha256 {loaded.sha256}"
        else:
            model = Pi0(config)
        if not self.proprio_mean.is_meta:  # with shapes alone, nothing is tokenised
            model.prefix.prompt(self.instruction, torch.zeros(1, P))  # fails here or not at all
        return model

    @property
    def flow_policy(self) -> FlowActor:
        """pi0's own policy: the flow head, or the one-step head's teacher."""
        return self.flow[0] if len(self.flow) else self.actor

    def cloned_weights(self) -> list[nn.Parameter]:
        """What stage 0 trains: of the vision-language model, of pi0's flow beside a one-step head, and of the actor."""
        parts = (self.backbone, *self.flow, self.actor)
        return [weight for part in parts for weight in trained(part)]

    def blocks(self) -> dict[nn.Module, str]:
        """Of stage 0's weights, what is computed as a whole, inner before outer, and the method that does it."""
        expert = self.flow_policy.expert
        stacks = [*self.backbone.layers, self.backbone.embed_tokens, *expert.layers]
        if self.backbone.config.cameras:
            stacks += self.backbone.vision.layers
        found = dict.fromkeys([*stacks, self.backbone, expert], "forward")
        if len(self.flow):
            found[self.actor] = "denoise"  # a one-step head
        return found

    @cached_property
    def feature_dim(self) -> int:
        """F: from one observation."""
        side = self.backbone.config.image_size
        image = np.zeros((1, 1, side, side, 3), np.uint8)
        proprio = self.proprio_mean.cpu().numpy()[None]
        with torch.no_grad():
            return self.feature({"proprio": proprio} | dict.fromkeys(CAMERAS, image)).shape[1]

    def observe(self, obs: dict[str, np.ndarray], noise: float = 0.0, generator=None) -> Seen:
        """The backbone's pass over observations of N states; their proprio is noisy if asked for, as in `perturb`."""
        obs = {name: torch.as_tensor(value, device=self.proprio_mean.device) for name, value in obs.items()}
        proprio = self.perturb(self.normalise_proprio(obs["proprio"]), noise, generator)  # [N, P]
        span = (self.proprio_high - self.proprio_low).clamp_min(1e-6)
        metres = proprio * self.proprio_std + self.proprio_mean
        digits = 2 * (metres - self.proprio_low) / span - 1  # for pi0.5
        ids, valid = self.prompt(digits)
        names = zip(self.backbone.config.cameras, CAMERAS, strict=False)  # the model's and ours
        images = {camera: obs[name].flatten(0, -4) for camera, name in names}  # W = 1
        prefix = self.backbone(images, ids, valid, lowdim=None if images else proprio)
        return Seen(prefix, proprio, self.backbone.config.state_dim, flow_reads=not len(self.flow))

    def prompt(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the instruction, as `Prefix.prompt`: pi0's are the same in all states, and stay on the device."""
        if self.backbone.config.pi05:
            return self.backbone.prompt(self.instruction, digits)
        if digits.device not in self.prompts:
            with torch.inference_mode(False):  # backward passes keep it
                self.prompts[digits.device] = self.backbone.prompt(self.instruction)
        return self.prompts[digits.device]

    def feature(self, obs: dict[str, np.ndarray]) -> Tensor:
        """Observations of N states to rows [N, F]."""
        return self.observe(obs).feature

    def recent(self, seen: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The last observation of running episodes, as `observe` wants it: a window of one step."""
        return {k: v if k == "proprio" else v[:, None] for k, v in seen[-1].items()}


def check_pi0(args) -> None:
    """Check the flags of the backbone, and that its weights can be had, before anything is made. Raises: UserError."""
    check_sizes(args)
    if args.backbone.endswith("compact"):
        return
    if not (args.checkpoint or args.sft_checkpoint):
        weights = f"hf://lerobot/{args.backbone}_base"
        raise UserError(f"--backbone {args.backbone} needs its weights: --checkpoint {weights} or a local folder")
    if args.checkpoint and not (args.resume or args.eval_only or args.sft_checkpoint):
        check_pi0_weights(args.checkpoint, PRESETS[args.backbone])


def check_sizes(args) -> None:
    """Check the flags of the backbone as far as they don't need its weights. Raises: UserError."""
    name = args.backbone
    released = not name.endswith("compact")
    if args.checkpoint and not released:
        raise UserError(f"--checkpoint has released weights, and --backbone {name} none: give --backbone pi0 or pi05")
    if released and args.obs_mode == "state":
        raise UserError(f"--backbone {name} needs --obs-mode rgb: privileged state is for compact models")
    if released and args.image_size < 224:
        raise UserError(f"--backbone {name} sees 224 pixels: give --image-size 224, not {args.image_size}")
    if args.bf16 and not released:
        raise UserError("--bf16 needs a released model: --backbone pi0 or pi05")
