"""Recorded episodes, replayed by worker processes in the calling script's environment."""

from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.flags import UserError
from plumbing.planning import (
    Episode,
    Recording,
    blocks_of,
    can_plan,
    check_convertible,
    episodes_for,
    no_planner,
    plan,
    read_episodes,
    read_recording,
)
from plumbing.stop import follow_parent
from plumbing.tasks import check_robot, source_of
from plumbing.wrappers import SPAWN

BLOCK = 5  # episodes that a worker plans or reads at a time
HOPELESS = 50  # plans without a success, after which no more are made


def check_source(flags) -> None:
    """Can demonstrations be had with these flags? Raises: UserError."""
    if flags.spawn != "random" and (flags.env_id not in SPAWN or flags.demo_path):
        raise UserError(f"--spawn moves the objects of {', '.join(SPAWN)} where demonstrations are made, not read")
    if flags.demo_columns:
        raise UserError("--demo-columns names columns of a LeRobotDataset: give its folder by --demo-path")
    check_robot(flags.env_id, flags.robot_uids)
    if flags.demo_path:
        recording = read_recording(flags, Path(flags.demo_path))
        stored = len(recording.numbers)
        if stored < flags.num_demos:
            raise UserError(f"{flags.demo_path} holds {stored} episodes; --num-demos asks for {flags.num_demos}")
        check_convertible(recording, flags.control_mode)
        for _ in read_episodes(recording):
            pass
    elif not can_plan(flags.env_id):
        raise UserError(f"{no_planner(flags.env_id)} give demonstrations by --demo-path FILE")


def make_episodes(args, make_env, flags) -> tuple[str, list[dict[str, np.ndarray]]]:
    """Where they are from, and the first --num-demos episodes that succeed (fewer, where a file hasn't got as many).

    Raises: UserError.
    """
    if flags.demo_path:
        source = flags.demo_path
        jobs = recorded_jobs(args, make_env, flags)
    else:
        spawn = "" if flags.spawn == "random" else f"-{flags.spawn}"
        source = f"{flags.env_id}-{flags.robot_uids}-{flags.control_freq}hz{spawn}"
        folder = Path(args.demo_dir) / f"{source}{source_of(flags.env_id)}"
        jobs = planned_jobs(args, make_env, flags, folder)
        problem = f"the planner's solution fails on {flags.env_id}, or what it plans does when replayed"
        if flags.control_mode == "pd_ee_delta_pos":
            problem += " (if the hand has to turn: --control-mode pd_ee_delta_pose)"
    found = []
    tried = 0
    processes = min(os.cpu_count() or 1, 8, math.ceil(flags.num_demos / BLOCK))
    bar = tqdm(total=flags.num_demos, desc=f"demonstrations of {flags.env_id}", mininterval=2)
    with bar, worker_processes(processes) as pool:
        while len(found) < flags.num_demos and (found or flags.demo_path or tried < HOPELESS):
            wanted = math.ceil((flags.num_demos - len(found)) / BLOCK)
            running = [pool.submit(job) for job in islice(jobs, wanted)]
            if not running:
                break
            tried += len(running) * BLOCK
            for block in running:
                found += block.result()
                bar.update(min(len(found), flags.num_demos) - bar.n)
    if not flags.demo_path and len(found) < flags.num_demos:
        raised = (folder / "seeds-000000.done").read_text()
        why = f"it raised {raised}" if raised else "it raised nothing: is the task's success ever reached?"
        raise UserError(f"{problem}: {len(found)} of {flags.num_demos} succeed; {why}")
    if not found:
        raise UserError(f"no demonstration of {source} succeeds when replayed: recorded with other settings?")
    return source, found[: flags.num_demos]


def planned_jobs(args, make_env, flags, folder: Path) -> Iterator[Callable]:
    """Blocks of seeds from 0 on, until it is clear that the planner can't do it."""
    for first in range(0, 3 * flags.num_demos + 50, BLOCK):
        yield partial(plan_and_observe, args, make_env, flags, folder, first)


def recorded_jobs(args, make_env, flags) -> Iterator[Callable]:
    """Blocks of a file's episodes; a folder of the cache has what is converted of it."""
    path = Path(flags.demo_path)
    status = path.stat()
    content = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    folder = Path(args.demo_dir) / f"{path.stem}-{hashlib.sha1(content.encode()).hexdigest()[:12]}"
    for block in blocks_of(read_recording(flags, path), BLOCK):
        yield partial(observe, args, make_env, flags, block, folder / f"episodes-{block.numbers[0]:06d}")


@contextlib.contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """They end with this process, and at once where something goes wrong. Raises: UserError if one of them dies."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        yield pool
    except BaseException as error:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            numpy2 = int(np.__version__.split(".")[0]) >= 2
            reason = "the planner crashes with numpy 2: install numpy 1.26" if numpy2 else "out of memory?"
            raise UserError(f"a process that makes demonstrations has died ({reason}); start again") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# === In a worker process =============================================================================================
def plan_and_observe(args, make_env, flags, folder: Path, first: int) -> list[dict[str, np.ndarray]]:
    path = folder / f"seeds-{first:06d}.h5"
    if not path.with_suffix(".done").exists():
        make_env(args, 1).close()  # says what is wrong with the flags before the planner's work
        folder.mkdir(parents=True, exist_ok=True)
        plan(flags, path, range(first, first + BLOCK))
    return observe(args, make_env, flags, read_recording(flags, path), folder / path.stem)


def observe(args, make_env, flags, recording: Recording, folder: Path) -> list[dict[str, np.ndarray]]:
    """What the policy sees of those episodes that succeed. Raises: UserError."""
    env = make_env(args, 1)
    episodes = episodes_for(flags, recording, folder.with_suffix(f".{flags.control_mode}"))
    found = []
    for episode in episodes:
        try:
            seen = replay(env, flags, episode)
        except KeyError as error:
            raise UserError(f"{recording.path} has a stored state of another version of the task: {error}") from error
        if seen:
            found.append(seen)
    env.close()
    return found


def replay(env, flags, episode: Episode) -> dict[str, np.ndarray] | None:
    """What the policy sees when the episode's actions are taken from where it began; None without a success."""
    base = getattr(env, "envs", [env])[0].unwrapped
    space = base.single_action_space
    width = episode.action.shape[1]
    if space.shape != (width,):
        raise UserError(
            f"{flags.demo_path} has actions of {width} numbers; {flags.control_mode} takes {space.shape[0]}"
        )
    gripper = has_gripper(base)
    limited = (space.low == -1) & (space.high == 1)  # where the controller cuts actions off
    beyond = (limited & (np.abs(episode.action) > 1.001)).any(1)
    action = np.where(limited, episode.action.clip(-1, 1), episode.action)
    first, _ = env.reset(seed=[episode.seed or 0], options={"state": episode.state})
    seen = [first]
    success = []

    def step(a: np.ndarray) -> None:
        obs, reached, _, _, _ = env.step(a[None])
        seen.append(obs)
        success.append(bool(reached[0]))

    for a in action:
        step(a)
    if not any(success):
        return None
    absolute = np.full(width, "delta" not in flags.control_mode)
    absolute[-1] |= gripper
    still = action[-1] * absolute
    until = success.index(True) + 1 + flags.upsample_steps
    while len(success) < until:
        step(still)
        action = np.concatenate([action, still[None]])
    unused = 0 * still
    row = {f"obs_{name}": np.concatenate([obs[name] for obs in seen]) for name in first}
    row["action"] = np.concatenate([action, unused[None]])
    row["success"] = np.array([*success, False])
    row["lengths"] = np.array([len(success)])
    row["steps"] = np.array([success.index(True) + 1])
    row["beyond"] = np.array([beyond.sum()])
    row["gripper"] = np.array([gripper])
    return row


def has_gripper(base) -> bool:
    """Does the last number of an action command a gripper?"""
    parts = getattr(base.agent.controller, "action_mapping", {})  # name of each part: where it begins and ends
    width = base.single_action_space.shape[0]
    return any("gripper" in name and end == width for name, (_, end) in parts.items())
