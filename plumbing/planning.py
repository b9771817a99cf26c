"""Recorded episodes: ManiSkill's motion planner makes them, a ManiSkill .h5 holds them, its replay tool converts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
from tqdm import tqdm

from plumbing.flags import UserError
from plumbing.tasks import simulator_errors
from plumbing.wrappers import Spawn


def can_plan(env_id: str) -> bool:
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    return env_id in MP_SOLUTIONS


def plan(flags, path: Path, seed: int, count: int) -> None:
    """Let ManiSkill's motion planner solve `count` episodes from `seed` on; writes them to `path` (joint positions).

    Raises: UserError where it fails on too many.
    """
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS
    from mani_skill.utils.wrappers.record import RecordEpisode

    with simulator_errors(flags.env_id):
        env = gym.make(
            flags.env_id,
            obs_mode="none",
            control_mode="pd_joint_pos",
            robot_uids=flags.robot_uids,
            reward_mode="sparse",
            sim_backend="physx_cpu",
            render_backend="cpu",
            sim_config=dict(control_freq=flags.control_freq),
        )
    env = Spawn(env, flags.env_id, flags.spawn)
    env = RecordEpisode(env, str(path.parent), trajectory_name=path.stem, save_video=False, save_on_reset=False)
    last = seed + 3 * count + 50
    bar = tqdm(total=count, desc=f"planning {path.stem}", mininterval=2)
    while bar.n < count and seed < last:
        try:
            result = MP_SOLUTIONS[flags.env_id](env, seed=seed, debug=False, vis=False)
            solved = result != -1 and result[-1]["success"].item()
        except Exception:  # the solutions raise all sorts where no plan exists; the next seed is as good
            solved = False
        env.flush_trajectory(save=solved)
        bar.update(solved)
        seed += 1
    env.close()
    if bar.n < count:
        raise UserError(f"the motion planner fails on {flags.env_id}: {bar.n} of {count} episodes up to seed {last}")
    path.with_suffix(".done").touch()  # a killed run leaves no half file


def open_recording(flags, path: Path) -> tuple[Path, list[dict]]:
    """A trajectory file that fits the flags, converted to their controller if need be, and its list of episodes.

    Raises: UserError, which says what doesn't fit.
    """
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        episodes = meta["episodes"]
        env_id = meta["env_info"]["env_id"]
        kwargs = meta["env_info"]["env_kwargs"]
        control_freq = (kwargs.get("sim_config") or {}).get("control_freq", 20)  # ManiSkill's default
        robot = kwargs.get("robot_uids") or flags.robot_uids
        with h5py.File(path, "r") as file:
            missing = sum(f"traj_{e['episode_id']}/actions" not in file for e in episodes)
    except FileNotFoundError as error:
        raise UserError(f"no demonstrations: {error.filename} doesn't exist (a .h5 has a .json beside it)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no complete ManiSkill trajectory file ({error}); make or copy it again") from error
    if missing:
        raise UserError(f"{path} is truncated: {missing} of the listed episodes are not stored; make or copy it again")
    recorded = dict(env_id=env_id, control_freq=control_freq, robot_uids=robot)
    for name, have in recorded.items():
        want = getattr(flags, name)
        if have != want:
            raise UserError(f"{path} was recorded with --{name.replace('_', '-')} {have}, not {want}")
    if path == Path(flags.demo_path or "") and len(episodes) < flags.num_demos:
        raise UserError(f"{path} holds {len(episodes)} episodes; --num-demos asks for {flags.num_demos}")
    control_mode = kwargs.get("control_mode")
    if control_mode == flags.control_mode:
        return path, episodes
    if control_mode != "pd_joint_pos":
        what = f"only pd_joint_pos can be converted to {flags.control_mode}"
        raise UserError(f"{path} has actions for {control_mode}; {what}")
    return open_recording(flags, convert(flags, path))


def convert(flags, path: Path) -> Path:
    """The episodes of `path` for the flags' controller: an earlier conversion, or one by ManiSkill's replay tool."""
    target = path.with_name(f"{path.stem}.none.{flags.control_mode}.physx_cpu.h5")
    done = target.with_suffix(".done")
    if done.exists() and done.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return target
    command = [sys.executable, "-m", "mani_skill.trajectory.replay_trajectory", "--traj-path", str(path)]
    command += ["--save-traj", "-c", flags.control_mode, "-o", "none", "--num-envs", "1"]
    if flags.spawn != "random":  # the tool resets by seed, and knows nothing of --spawn
        command += ["--use-first-env-state"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    tool = subprocess.run(command, capture_output=True, errors="replace", env=one_thread)
    if tool.returncode or not target.exists():
        raise UserError(f"ManiSkill can't convert {path} to {flags.control_mode}: {tool.stderr[-300:]}")
    done.touch()
    return target
