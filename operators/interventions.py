"""What an operator did in a run: counts, running means, and episodes to write as demonstrations."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from operators.planner import bare_env
from plumbing.flags import UserError


@dataclass
class Interventions:
    """A part of checkpoints."""

    number: int = 0  # of take-overs
    steps: int = 0  # of the operator
    planner_failures: int = 0  # episodes in which the planner was asked and had no plan
    recent: list[tuple[float, int]] = field(default_factory=list)  # share of steps, take-overs; last 20 episodes
    recorded: dict[int, Tensor] = field(default_factory=dict)  # seed: actions [T, A] of a success with help

    def ended(self, taken: np.ndarray, planner_failures: int) -> None:
        """A training episode is over; taken [T] bool: steps at which the operator acted."""
        onsets = np.diff(taken.astype(int), prepend=0) == 1
        number = int(onsets.sum())
        self.number += number
        self.steps += int(taken.sum())
        self.planner_failures += planner_failures
        self.recent = [*self.recent, (float(taken.mean()), number)][-20:]

    def record(self, seed: int, executed: np.ndarray) -> None:
        self.recorded[seed] = torch.from_numpy(executed)

    def metrics(self) -> dict[str, float]:
        """Means over the last 20 training episodes, and failures so far."""
        rate, number = np.mean(self.recent, 0)
        return {
            "intervention/rate": rate,
            "intervention/count": number,
            "intervention/planner_failures": self.planner_failures,
        }

    def summary(self) -> dict[str, int]:
        return {
            "interventions": self.number,
            "intervention_steps": self.steps,
            "planner_failures": self.planner_failures,
        }

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def check_recording(args) -> None:
    """Check --record-demos: a file that can be written there, and isn't yet. Raises: UserError."""
    path = Path(args.record_demos)
    if args.intervention == "none" or path.suffix != ".h5":
        raise UserError(f"--record-demos {path} must end with .h5, and needs an --intervention to record")
    probe = path.with_name(path.name + ".tmp")
    try:
        there = path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--record-demos {path} can't be written: {error}") from error
    if there and not args.resume:
        raise UserError(f"--record-demos {path} exists: choose another name, or move it away")


def write_demonstrations(args, episodes: dict[int, Tensor]) -> None:
    """Write episodes (seed: actions [T, A]) to --record-demos as ManiSkill does, by doing them once more."""
    from mani_skill.utils.wrappers.record import RecordEpisode

    path = Path(args.record_demos)
    env = bare_env(args, args.control_mode)
    env = RecordEpisode(env, str(path.parent), trajectory_name=path.stem, save_video=False, save_on_reset=False)
    for seed, actions in episodes.items():
        env.reset(seed=seed)
        success = False
        for action in actions.numpy():
            info = env.step(action)[4]
            success |= info["success"].item()
        env.flush_trajectory(save=success)
    env.close()
