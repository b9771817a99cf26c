"""Successes of a finished run as a ManiSkill recording: to start from, to clone into another backbone, to give away.

  python -m plumbing.record runs/NAME --episodes 100 --out successes.h5
  python bc.py --env-id PickCube-v1 --obs-mode state --demo-path successes.h5 --num-demos 100

The run's last policy acts as in an evaluation, but from seeds that neither training nor evaluation uses. An episode
ends at its success. What it did is then done once more under ManiSkill's own recorder, which writes actions and the
simulator's states. The .json beside the .h5 says which run it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from plumbing.demos import DemoFlags
from plumbing.flags import UserError, run_script
from plumbing.planning import bare_env
from plumbing.policy import load_policy
from plumbing.scripts import load_script
from plumbing.storage import write_json

RECORD_SEED = 2_000_000_000  # of the first episode


class Watched:
    """An environment that keeps what was done in its successful episodes."""

    def __init__(self, env, limit: int):
        self.env = env
        self.limit = limit  # control steps of an episode
        self.found: dict[int, np.ndarray] = {}  # seed: actions [T, A] up to the success

    def reset(self, seed: list[int], options: dict):
        begun = options.get("reset_mask", np.ones(len(seed), dtype=bool))
        if begun.all():
            self.actions = [[] for _ in seed]
        for i in np.flatnonzero(begun):
            self.actions[i] = []
        self.seeds = seed
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray):
        result = self.env.step(action)
        for i, success in enumerate(result[1]):
            own = self.actions[i]
            own.append(np.array(action[i], np.float32))
            if success > 0 and len(own) <= self.limit and self.seeds[i] not in self.found:
                self.found[self.seeds[i]] = np.stack(own)
        return result


def successes(module, agent, args, count: int) -> dict[int, np.ndarray]:
    """Seeds and actions [T, A] of `count` successful episodes; fewer, where hardly any succeeds."""
    env = Watched(module.make_env(args, args.num_envs), args.max_episode_steps)
    tried = 0
    most = 3 * count + 50
    while len(env.found) < count and tried < most:
        missing = count - len(env.found)
        episodes = min(max(missing, args.num_envs), most - tried)
        others = replace(args, eval_episodes=episodes, eval_seed=RECORD_SEED + tried)
        module.evaluate(env, agent, others, whole=False)
        tried += episodes
        print(f"{len(env.found)} of {tried} episodes succeed", file=sys.stderr)
    env.env.close()
    kept = sorted(env.found)[:count]
    return {seed: env.found[seed] for seed in kept}


def write_recording(args, episodes: dict[int, np.ndarray], out: Path, about: dict) -> int:
    """Do the episodes once more, recorded to out and its .json: how many succeed again. Raises: UserError."""
    from mani_skill.utils.wrappers.record import RecordEpisode

    env = bare_env(DemoFlags.of(args), args.control_mode, max_episode_steps=args.max_episode_steps)
    origin = f"{about['script']}, {args.env_id}"
    names = dict(trajectory_name=out.stem, source_type="rl", source_desc=origin)
    env = RecordEpisode(env, str(out.parent), save_video=False, save_on_reset=False, **names)
    saved = 0
    for seed, actions in episodes.items():
        env.reset(seed=seed)
        success = False
        for action in actions:
            info = env.step(action)[4]
            success |= info["success"].item()
        env.flush_trajectory(save=success)
        saved += success
    env.close()
    meta = json.loads(out.with_suffix(".json").read_text())
    write_json(out.with_suffix(".json"), meta | {"run": about})
    return saved


def check_out(out: Path, suffix: str) -> None:
    """Raises: UserError unless a file can be written there that isn't yet."""
    new = out.suffix == suffix and not out.exists()
    if not new or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} can't be written: name a new {suffix} in a folder that you may write to")


def main(words: list[str]) -> None:
    """Raises: UserError."""
    parser = argparse.ArgumentParser(prog="plumbing.record", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="folder of a finished run, or an exported policy")
    parser.add_argument("--episodes", type=int, default=100, help="successes to record (100)")
    parser.add_argument("--out", type=Path, required=True, help="a new .h5; its .json comes beside it")
    parser.add_argument("--device", default="cpu", help="where the policy's networks live (cpu)")
    own = parser.parse_args(words)
    if own.episodes < 1:
        raise UserError(f"--episodes must be at least 1, got {own.episodes}")
    check_out(own.out, ".h5")
    policy = load_policy(own.run, own.device)
    side_by_side = min(policy.args.num_envs, os.cpu_count() or 1)
    args = replace(policy.args, sim_backend="physx_cpu", num_envs=side_by_side)
    if getattr(args, "eval_elsewhere", False):
        args = replace(args, eval_elsewhere=False)
    module = load_script(Path(policy.script))
    found = successes(module, policy.agent, args, own.episodes)
    if not found:
        raise UserError(f"{own.run} has no success to record: train it longer, or record another run")
    flags = vars(policy.args) | {"eval_only": None}
    about = {"script": policy.script, "args": flags, "run": own.run}
    saved = write_recording(args, found, own.out, about)
    if saved < own.episodes:
        print(f"fewer than asked for: {len(found)} succeeded, {saved} of them when done once more", file=sys.stderr)
    print(f"{saved} successes in {own.out}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
