"""Recorded episodes: ManiSkill's motion planner makes them, a .h5 holds them, its replay tool converts them."""

from __future__ import annotations

import contextlib
import io
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import h5py
import numpy as np

from plumbing.flags import UserError
from plumbing.tasks import allow_no_reward, simulator_errors
from plumbing.wrappers import Spawn


@dataclass(frozen=True)
class Recording:
    """Episodes of a ManiSkill .h5, or some of them."""

    path: Path  # of the .h5; its .json is beside it
    control_mode: str
    numbers: tuple[int, ...]  # N of each episode's traj_N
    seeds: tuple[int | None, ...]  # with which each was reset


class Episode(NamedTuple):
    action: np.ndarray  # [T, A] float32
    seed: int | None
    state: dict | None  # the simulator's at the start, as its get_state_dict: arrays [1, ...]


# === Reading =========================================================================================================
def read_recording(flags, path: Path) -> Recording:
    """The episodes of a trajectory file that fits the flags but for its controller. Raises: UserError."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        env_id = meta["env_info"]["env_id"]
        kwargs = meta["env_info"]["env_kwargs"]
        control_freq = (kwargs.get("sim_config") or {}).get("control_freq", 20)  # ManiSkill's default
        robot = kwargs.get("robot_uids") or flags.robot_uids
        numbers = tuple(int(entry["episode_id"]) for entry in meta["episodes"])
        seeds = tuple(seed_of(entry) for entry in meta["episodes"])
        with h5py.File(path, "r") as file:
            missing = sum(f"traj_{number}/actions" not in file for number in numbers)
    except FileNotFoundError as error:
        raise UserError(f"no demonstrations: {error.filename} doesn't exist (a .h5 has a .json beside it)") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no complete ManiSkill trajectory file ({error}); make or copy it again") from error
    if missing:
        raise UserError(f"{path} is truncated: {missing} of the listed episodes are not stored; make or copy it again")
    recorded = {
        "env-id": (env_id, flags.env_id.split(":")[-1]),
        "control-freq": (control_freq, flags.control_freq),
        "robot-uids": (robot, flags.robot_uids),
    }
    for flag, (have, want) in recorded.items():
        if have != want:
            raise UserError(f"{path} was recorded with --{flag} {have}, not {want}")
    return Recording(path, kwargs.get("control_mode"), numbers, seeds)


def seed_of(entry: dict) -> int | None:
    """The seed that an episode was reset with. `episode_seed` won't do: without one it is that of an earlier reset.

    Raises: ValueError for what no seed can be.
    """
    seed = (entry.get("reset_kwargs") or {}).get("seed")
    if isinstance(seed, list):
        (seed,) = seed
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"an episode's seed is {seed!r}")
    return seed


def read_episodes(recording: Recording) -> Iterator[Episode]:
    """What is needed to replay them. Raises: UserError, which names the first episode that can't be."""
    with h5py.File(recording.path, "r") as file:
        for number, seed in zip(recording.numbers, recording.seeds):
            name = f"traj_{number} of {recording.path}"
            stored = file[f"traj_{number}"]
            try:
                action = stored["actions"][:].astype(np.float32)
                state = first_rows(stored["env_states"]) if "env_states" in stored else None
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{name} can't be read ({error}); make or copy it again") from error
            if action.ndim != 2 or not action.size:
                raise UserError(f"{name} has actions of the shape {action.shape}, and not steps x numbers")
            if not np.isfinite(action).all():
                raise UserError(f"{name} has actions that aren't finite numbers; make or copy it again")
            if state is not None and not finite(state):
                raise UserError(f"{name} has a stored state that isn't finite numbers; make or copy it again")
            if seed is None and state is None:
                raise UserError(f"{name} has neither a seed nor a stored state to start from: record it with either")
            yield Episode(action, seed, state)


def first_rows(stored) -> dict | np.ndarray:
    """The first row of each array in a nested group, as arrays [1, ...]."""
    if isinstance(stored, h5py.Dataset):
        return stored[:1]
    return {name: first_rows(part) for name, part in stored.items()}


def finite(state) -> bool:
    """Are all numbers of a nested state finite?"""
    if isinstance(state, dict):
        return all(finite(part) for part in state.values())
    return bool(np.isfinite(state).all())


def blocks_of(recording: Recording, size: int) -> Iterator[Recording]:
    """A recording in parts of `size` episodes."""
    for first in range(0, len(recording.numbers), size):
        part = slice(first, first + size)
        yield replace(recording, numbers=recording.numbers[part], seeds=recording.seeds[part])


# === Planning ========================================================================================================
def can_plan(env_id: str) -> bool:
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    return env_id in MP_SOLUTIONS


def no_planner(env_id: str) -> str:
    """What to say where there is no solution."""
    if ":" in env_id:
        return f"MP_SOLUTIONS has no {env_id!r}: enter its solution there (docs/new-task.md), or"
    return f"ManiSkill has no motion planner for {env_id}:"


def bare_env(flags, control_mode: str, **more) -> gym.Env:
    """The task without observations, for plans and recordings. Raises: UserError."""
    allow_no_reward(flags.env_id)
    with simulator_errors(flags.env_id):
        env = gym.make(
            flags.env_id,
            obs_mode="none",
            control_mode=control_mode,
            robot_uids=flags.robot_uids,
            reward_mode="none",
            sim_backend="physx_cpu",
            render_backend="cpu",
            sim_config=dict(control_freq=flags.control_freq),
            reconfiguration_freq=1,  # PhysX remembers contacts across resets
            **more,
        )
    return Spawn(env, flags.env_id, flags.spawn)


def plan(flags, path: Path, seeds: range) -> None:
    """Let ManiSkill's motion planner try these seeds; its successes are in `path` then (joint positions).

    They depend on nothing but flags and seeds. A .done beside it says that the file is complete, and holds what the
    solution raised last, if it did.
    """
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS
    from mani_skill.utils.wrappers.record import RecordEpisode

    env = bare_env(flags, "pd_joint_pos")
    env = RecordEpisode(env, str(path.parent), trajectory_name=path.stem, save_video=False, save_on_reset=False)
    problem = ""
    for seed in seeds:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the planner reports each path that it doesn't find
                result = MP_SOLUTIONS[flags.env_id](env, seed=seed, debug=False, vis=False)
            solved = result != -1 and result[-1]["success"].item()
        except Exception as error:  # the solutions raise all sorts where no plan exists; the next seed is as good
            solved = False
            problem = described(error)
        if env._trajectory_buffer is not None:  # none where the solution gave up before its first reset
            env.flush_trajectory(save=solved)
    env.close()
    path.with_suffix(".done").write_text(problem)  # a killed run leaves no half file


def described(error: Exception) -> str:
    """What a solution raised, and where: in its own file, if that is where it began, not in a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames[1:] if "site-packages" not in frame.filename] or frames)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


# === Converting ======================================================================================================
def check_convertible(recording: Recording, control_mode: str) -> None:
    """Raises: UserError."""
    if recording.control_mode not in (control_mode, "pd_joint_pos"):
        what = f"only pd_joint_pos can be converted to {control_mode}"
        raise UserError(f"{recording.path} has actions for {recording.control_mode}; {what}")


def episodes_for(flags, recording: Recording, folder: Path) -> list[Episode]:
    """The episodes with actions for the flags' controller; in `folder` a conversion is kept. Raises: UserError."""
    episodes = list(read_episodes(recording))
    if recording.control_mode == flags.control_mode or not episodes:
        return episodes
    by_number = dict(zip(recording.numbers, episodes))
    converted = convert(flags, recording, folder, stored=all(episode.state for episode in episodes))
    meta = json.loads(converted.with_suffix(".json").read_text())
    found = []
    with h5py.File(converted, "r") as file:
        for entry in meta["episodes"]:
            action = file[f"traj_{entry['episode_id']}/actions"][:].astype(np.float32)
            number = entry["reset_kwargs"]["options"]["number"]
            found.append(by_number[number]._replace(action=action))  # the tool stores a later state as the first one
    return found


def convert(flags, recording: Recording, folder: Path, stored: bool) -> Path:
    """ManiSkill's replay tool makes a .h5 for the flags' controller; episodes that fail with it are left out.

    It takes a .h5 with its .json, and writes beside it: `folder` gets a link to the one, and a .json that says no more
    than the tool needs. `stored`: it starts from the stored states. Raises: UserError.
    """
    from mani_skill.trajectory import replay_trajectory

    target = folder / f"episodes.none.{flags.control_mode}.physx_cpu.h5"
    done = target.with_suffix(".done")
    if done.exists():
        return target
    allow_no_reward(flags.env_id)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "episodes.h5"
    link.unlink(missing_ok=True)
    link.symlink_to(recording.path.resolve())
    link.with_suffix(".json").write_text(json.dumps(for_the_tool(flags, recording)))
    tool = replay_trajectory.Args(
        str(link),
        obs_mode="none",
        target_control_mode=flags.control_mode,
        save_traj=True,
        use_first_env_state=stored,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            replay_trajectory.main(tool)
    except Exception as error:  # the tool raises all sorts
        what = f"ManiSkill can't convert {recording.path} to {flags.control_mode}"
        raise UserError(f"{what} ({type(error).__name__}: {str(error)[:200]})") from error
    done.touch()
    return target


def for_the_tool(flags, recording: Recording) -> dict:
    """What ManiSkill's replay tool wants to know; an episode's number comes back with the converted one."""
    kwargs = dict(
        obs_mode="none",
        control_mode=recording.control_mode,
        robot_uids=flags.robot_uids,
        reward_mode="none",
        sim_backend="physx_cpu",
        render_backend="cpu",
        sim_config=dict(control_freq=flags.control_freq),
        reconfiguration_freq=1,
    )
    episodes = []
    for number, seed in zip(recording.numbers, recording.seeds):
        reset = dict(seed=seed or 0, options=dict(number=number))
        entry = dict(episode_id=number, episode_seed=seed or 0, control_mode=recording.control_mode, reset_kwargs=reset)
        episodes.append(entry)
    info = dict(env_id=flags.env_id, env_kwargs=kwargs, max_episode_steps=None)
    return {"env_info": info, "episodes": episodes}
