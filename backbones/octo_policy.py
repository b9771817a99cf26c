"""Octo (arXiv:2405.12213) as the body of a policy: from observations to features that action heads and critics read."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from backbones.octo import PRESETS, Octo
from backbones.octo_weights import load_octo
from backbones.units import SIGMA_DATA, Units
from plumbing.flags import UserError


class OctoPolicy(Units):
    """Octo and the units of what goes in and out; scripts add the heads and `act`."""

    def __init__(
        self, preset: str, checkpoint: str | None, resumed: bool, obs: dict[str, np.ndarray], action: np.ndarray,
        chunk_len: int, relative: bool, instruction: str, gripper: bool = True,
    ):  # fmt: skip
        """A policy for what demonstrations look like, with the instruction of the task.

        preset, checkpoint   one of octo.PRESETS, and the source of released weights for `load_octo`; None: random
        resumed              the weights are yet to be loaded from a run's own checkpoint, which has the language too
        obs, action          of the demonstrations: "proprio" [N, P], cameras [N, H, H, 3]; [M, A] in controller units
        chunk_len            H, actions per decision
        relative             the controller takes differences, within [-1, 1]
        gripper              the last number of an action is a gripper's command

        Raises: UserError, one line, if the weights or the tokenizer can't be had.
        """
        super().__init__(obs["proprio"], action, relative, gripper)
        self.H = chunk_len
        self.instruction = instruction
        images = tuple((k, v.shape[1]) for k, v in obs.items() if k != "proprio")
        # Privileged state goes through the transformer; beside a camera, proprio goes to the heads only, as in Octo 1.5.
        config = dataclasses.replace(PRESETS[preset], image_sizes=images, lowdim_dim=0 if images else self.proprio_dim)
        self.window = config.window
        self.feature_dim = config.embedding_dim + self.proprio_dim
        self.backbone = Octo(config)
        self.weights = "random"
        if checkpoint and not resumed:
            loaded = load_octo(checkpoint, config)
            self.backbone = loaded.model
            self.weights = f"{checkpoint}, sha256 {loaded.sha256}"
            self.register_buffer("language", self.backbone.encode_text([instruction]))
        elif checkpoint:
            self.register_buffer("language", torch.zeros(1, config.language_tokens, config.language_dim))
        if checkpoint:
            del self.backbone.text  # frozen, and needed once
        # At most a quarter of the box: the gripper's two positions have to count for more than their spread says.
        spread = self.normalise(action).std(0).clip(0.02, 0.25)
        self.chunk_unit = torch.as_tensor(spread / SIGMA_DATA).repeat(self.H)  # [H*A]; networks see chunk / unit

    def feature(self, obs: dict[str, np.ndarray]) -> Tensor:
        """Observations of N states to [N, F]: the backbone's embedding beside the normalised proprio.

        obs: "proprio" [N, P]; cameras [N, W, H, H, 3] uint8, the last W steps; "real" [N, W], False for steps before
        the start of the episode. `recent` makes them.
        """
        obs = {k: torch.as_tensor(v, device=self.proprio_mean.device) for k, v in obs.items()}
        proprio = self.normalise_proprio(obs.pop("proprio"))  # [N, P]
        real = obs.pop("real", None)  # [N, W]
        language = self.language if hasattr(self, "language") else self.backbone.encode_text([self.instruction])
        embedding = self.backbone(obs, language, None if obs else proprio[:, None], real if self.window > 1 else None)
        return torch.cat([embedding, proprio], -1)

    def recent(self, seen: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The last observations of running episodes, as `feature` wants them; the first one stands in for missing."""
        missing = max(self.window - len(seen), 0)
        steps = [seen[0]] * missing + seen[-self.window :]
        images = {k: np.stack([step[k] for step in steps], 1) for k in seen[0] if k != "proprio"}
        real = np.broadcast_to(np.arange(self.window) >= missing, (len(seen[0]["proprio"]), self.window))
        return {"proprio": seen[-1]["proprio"], "real": real.copy()} | images


def check_octo(args) -> None:
    """Check the flags of the backbone, and that its weights can be had, before anything is made. Raises: UserError."""
    released = args.backbone != "octo-compact"
    if released != bool(args.checkpoint):
        raise UserError("--backbone octo-small or octo-base and --checkpoint FOLDER or hf://owner/name need each other")
    if released and args.obs_mode != "rgb":
        raise UserError("released Octo weights need --obs-mode rgb: they know cameras only")
    if released and args.image_size != 256:
        raise UserError(f"released Octo weights see 256 pixels (on the hand: 128), not --image-size {args.image_size}")
    if released and not (args.resume or args.eval_only):
        found = load_octo(args.checkpoint).model.config.token_dim
        needed = PRESETS[args.backbone].token_dim
        if found != needed:
            raise UserError(f"{args.checkpoint} has token width {found}; --backbone {args.backbone} has {needed}")


def random_shift(obs: dict[str, Tensor], generator: torch.Generator, pad: int = 4) -> dict[str, Tensor]:
    """Shift each sample's W images by up to `pad` pixels, edges repeated. Shapes: cameras [B, W, H, H, 3] -> same."""
    return {name: shift(value, generator, pad) if value.dim() == 5 else value for name, value in obs.items()}


def shift(image: Tensor, generator: torch.Generator, pad: int) -> Tensor:
    B, W, side = image.shape[:3]
    offset = torch.randint(-pad, pad + 1, (2, B, 1), generator=generator, device=image.device)
    rows, cols = (torch.arange(side, device=image.device) + offset).clamp(0, side - 1)[:, :, None]  # [B, 1, H] each
    sample = torch.arange(B, device=image.device)[:, None, None, None]
    step = torch.arange(W, device=image.device)[:, None, None]
    return image[sample, step, rows[..., None], cols[:, :, None]]
