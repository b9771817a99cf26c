"""Demonstrations: let ManiSkill's motion planner solve a task, or read a ManiSkill .h5, and record what policies will see.

The scripts call this program for the demonstrations that they need and haven't got; nothing is downloaded.

  1 plan     ManiSkill's planner solves episodes in joint positions       plan_demos    demo_dir/TASK-ROBOT-.../*.h5
  2 convert  ManiSkill's replay tool turns them into the controller's     open_demos    ... .CONTROLLER.physx_cpu.h5
  3 observe  the actions are replayed in the policies' environment        observe       out (.npz)

Commands
  python make_demos.py --env-id StackCube-v1 --num-demos 300 --out stack.npz
  python make_demos.py --env-id PushCube-v1 --demo-path trajectory.h5 --out push.npz    # any ManiSkill .h5 + .json

Parts that a killed call has planned to their end are used by the next one. Arrays of the .npz: see `Demos` in any script.
"""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm


# === Arguments =======================================================================================================
@dataclass
class Args:
    env_id: str = "StackCube-v1"  # ManiSkill task
    out: str = "demos.npz"  # file to write
    demo_path: str | None = None  # ManiSkill .h5 (with its .json); default: made by its planner
    num_demos: int = 300  # demonstrations to make or to use
    demo_dir: str = "demos"  # folder for what the planner finds
    robot_uids: str = "panda"  # robot model
    cameras: Literal["primary", "both"] = "primary"  # one that looks at the table, or one on the panda's hand too
    control_mode: str = "pd_ee_delta_pos"  # ManiSkill controller
    control_freq: int = 10  # control steps per second
    obs_mode: Literal["rgb", "state"] = "rgb"  # camera + proprio, or privileged state
    image_size: int = 64  # pixels a side (hand: half of it, from 64 on)
    sim_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"  # of the recorded replay; planning is on the CPU
    spawn: Literal["random", "fixed", "ood"] = "random"  # where objects start: task's rectangle, one place, outside it
    upsample_steps: int = 0  # control steps recorded, keeping still, after the first success
    skip_idle: float = 0.0  # leave out the first steps in which the arm moves less (actions reach 1); 0: none
    torch_threads: int = 1  # CPU threads of a worker

    def place(self, env: gym.Env) -> gym.Env:
        """The shared blocks call this on each environment that they make."""
        return place_objects(env, self.env_id, self.spawn)


# --- shared: tasks ---
class UserError(Exception):
    """Something the user can put right; the message says what to do. Ends the program with exit code 2."""


@dataclass(frozen=True)
class Task:
    """What a task needs beyond ManiSkill's registration: instruction, time limit in seconds, camera."""

    instruction: str = "do the task"
    seconds: float = 0.0  # 0: ManiSkill's time limit
    eye: tuple[float, float, float] = (0.32, 0.0, 0.42)
    target: tuple[float, float, float] = (0.0, 0.0, 0.06)
    fov: float = 0.95


TASKS = {
    "PushCube-v1": Task("push the cube onto the round target", 5.0, (0.5, 0.0, 0.5), (0.05, 0.0, 0.0)),
    "PullCube-v1": Task("pull the cube onto the round target", 5.0, (0.5, 0.0, 0.5), (-0.05, 0.0, 0.0)),
    "PickCube-v1": Task("pick up the red cube and hold it at the goal position", 8.0),
    "StackCube-v1": Task("stack the red cube on the green cube", 10.0, (0.42, 0.0, 0.48), (-0.02, 0.0, 0.04)),
    "PlaceSphere-v1": Task("place the blue sphere into the bin", 10.0, (0.42, 0.0, 0.48)),
    "PullCubeTool-v1": Task("pull the cube closer with the hook", 12.0, (0.7, 0.0, 0.7)),
    "LiftPegUpright-v1": Task("lift the peg upright", 10.0, (0.5, 0.0, 0.5)),
}


# --- end shared ---


def check_task(args: Args) -> None:
    """Check task, robot, and that ManiSkill has their files. Raises: UserError."""
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.agents.registration import REGISTERED_AGENTS
    from mani_skill.utils.assets import DATA_GROUPS, DATA_SOURCES, is_data_source_downloaded
    from mani_skill.utils.registration import REGISTERED_ENVS

    if args.env_id not in REGISTERED_ENVS:
        known = ", ".join(TASKS)
        raise UserError(f"--env-id {args.env_id} is no ManiSkill task; with a camera and defaults here: {known}")
    task = REGISTERED_ENVS[args.env_id]
    if args.robot_uids not in REGISTERED_AGENTS:
        fitting = ", ".join(uid for uid in getattr(task.cls, "SUPPORTED_ROBOTS", []) if isinstance(uid, str))
        raise UserError(f"--robot-uids {args.robot_uids} is no ManiSkill robot; {args.env_id} is made for: {fitting}")
    needed = {*task.asset_download_ids, *REGISTERED_AGENTS[args.robot_uids].asset_download_ids}
    while needed - DATA_SOURCES.keys():  # groups of groups
        needed = {part for uid in needed for part in ([uid] if uid in DATA_SOURCES else DATA_GROUPS[uid])}
    if missing := sorted(uid for uid in needed if not is_data_source_downloaded(uid)):
        tools = "; ".join(f"python -m mani_skill.utils.download_asset {uid}" for uid in missing)
        raise UserError(f"{args.env_id} with {args.robot_uids} needs files of ManiSkill's: {tools}")


# === Environment =====================================================================================================
# --- shared: environment ---
class ObsWrapper(gym.Wrapper):
    """ManiSkill observations as {"proprio": [N, P] float32, "primary": [N, H, H, 3] uint8 (rgb only)}, numpy.

    --cameras both, or a robot with a camera on its hand, adds "wrist" [N, W, W, 3].

    Proprio is joint positions, gripper pose, and what the task adds (PickCube's goal position); in state mode the task
    adds its privileged state. Joint velocities are left out: a policy that sees them learns to go on with what it is
    doing, and stops for good once it has slowed down (docs/force.md). The reward is the success flag. Episodes never
    end here: `rollout` looks at info["ended"] and keeps the time limit, so that it can also run past a success.
    After reset(options={"every": n}) only each n-th step is observed, and the others repeat what was seen last: most
    of a step's time is rendering, and a policy that acts in chunks needs no image within one.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.mode, self.every, self.steps = env.unwrapped.obs_mode, 1, 0
        self.seen = self.observation(env.unwrapped._init_raw_obs)
        env.unwrapped.update_obs_space(self.seen)

    def observation(self, raw: dict) -> dict[str, np.ndarray]:
        from mani_skill.utils.common import flatten_state_dict

        agent = {k: v for k, v in raw["agent"].items() if k != "qvel"}
        proprio = flatten_state_dict({"agent": agent, "extra": raw["extra"]}, use_torch=True)
        obs = {"proprio": proprio.float().cpu().numpy()}
        for name, data in raw.get("sensor_data", {}).items():
            obs["wrist" if "hand" in name else "primary"] = data["rgb"].cpu().numpy()
        return obs

    def reset(self, *, seed=None, options=None):
        self.every, self.steps, self.unwrapped._obs_mode = (options or {}).get("every", 1), 0, self.mode
        self.seen = self.observation(self.env.reset(seed=seed)[0])
        return self.seen, {}

    def step(self, action):
        self.steps += 1
        look = self.steps % self.every == 0
        self.unwrapped._obs_mode = self.mode if look else "none"
        raw, _, terminated, _, info = self.env.step(action)
        self.seen = self.observation(raw) if look else self.seen
        success = info.get("success", torch.zeros_like(terminated)).bool().cpu().numpy()
        never = np.zeros_like(success)
        return self.seen, success, never, never, {"ended": terminated.cpu().numpy()}


def hand_camera(robot) -> list:
    """A camera on Panda's hand that sees both fingertips; `panda_wristcam`'s housing makes rendering much slower."""
    from mani_skill.sensors.camera import CameraConfig
    from mani_skill.utils.sapien_utils import look_at

    pose, link = look_at([0.07, 0.0, 0.02], [0.0, 0.0, 0.12]), robot.robot.links_map["panda_hand"]  # metres, hand frame
    return [CameraConfig("hand_camera", pose, 128, 128, fov=1.4, near=0.01, far=10.0, mount=link)]


def make_maniskill(args: Args, num_envs: int = 1, render: bool = False) -> ObsWrapper:
    """A batch of ManiSkill environments in this process (physx_cpu: of one).

    Raises: UserError if the simulator can't start, which nearly always means Vulkan, or refuses the flags.
    """
    import mani_skill.envs  # registers the tasks
    from mani_skill.agents.robots.panda.panda import Panda
    from mani_skill.utils import sapien_utils

    torch.set_num_threads(args.torch_threads or 1)  # this may be a fresh worker process
    mani_skill.logger.setLevel("ERROR")  # some tasks warn at every reset
    if not gc.get_freeze_count():  # ManiSkill collects garbage at every reset: spare it all that stands by now
        gc.freeze()
    task, gpu, side = TASKS.get(args.env_id, Task()), args.sim_backend == "physx_cuda", args.image_size
    cameras = dict(base_camera=dict(pose=sapien_utils.look_at(task.eye, task.target), fov=task.fov))
    # Panda itself has no camera; the class is where ManiSkill looks for a robot's.
    both, small = args.obs_mode == "rgb" and args.cameras == "both", min(side, max(side // 2, 64))
    Panda._sensor_configs = property(hand_camera if both else lambda robot: [])
    if "wristcam" in args.robot_uids or both and args.robot_uids == "panda":
        cameras["hand_camera"] = dict(width=small, height=small)
    try:
        env = gym.make(
            args.env_id, num_envs=num_envs, obs_mode="rgb" if args.obs_mode == "rgb" else "state_dict",
            control_mode=args.control_mode, robot_uids=args.robot_uids, render_mode="rgb_array" if render else None,
            sim_backend=args.sim_backend, render_backend="gpu" if gpu else "cpu", max_episode_steps=1_000_000,
            reconfiguration_freq=0 if gpu else 1,  # PhysX on the CPU remembers contacts across resets
            sensor_configs=dict(width=side, height=side, shader_pack="minimal", **cameras), reward_mode="none",
            human_render_camera_configs=dict(width=256, height=256), sim_config=dict(control_freq=args.control_freq),
        )  # fmt: skip
    except (KeyError, AssertionError, NotImplementedError) as error:  # how ManiSkill refuses robots and controllers
        raise UserError(f"{args.env_id} refuses these settings (robot, controller or camera): {error!r}") from error
    except RuntimeError as error:
        raise UserError(f"the simulator can't start ({error}); run setup.sh, which installs and checks it") from error
    return ObsWrapper(args.place(env) if hasattr(args, "place") else env)  # some move objects


# --- end shared ---


# --- shared: object positions ---
# Objects that --spawn moves: half the sides of the rectangle that the task draws from (centre 0), the fixed place, two
# corners of a rectangle outside it, all x and y in metres; then what moves along.
SPAWN = {
    "PushCube-v1": {"obj": ((0.1, 0.1), (0.0, 0.0), ((-0.1, 0.11), (0.1, 0.18)), "goal_region")},
    "PickCube-v1": {"cube": ((0.1, 0.1), (0.0, 0.0), ((-0.1, 0.11), (0.1, 0.18)), None)},
    "StackCube-v1": {
        "cubeA": ((0.2, 0.3), (0.0, 0.1), ((-0.32, -0.2), (-0.26, 0.2)), None),
        "cubeB": ((0.2, 0.3), (0.0, -0.1), None, None),  # what the robot picks up decides about in or out
    },
}


def place_objects(env: gym.Env, env_id: str, spawn: str) -> gym.Env:
    """Make each reset put the task's objects at one place ("fixed") or outside the task's rectangle ("ood").

    The positions that the task has drawn are mapped, so the episode's seed still decides everything, and orientations
    stay as drawn.
    """
    if spawn == "random":
        return env
    from mani_skill.utils.structs import Pose

    base, task_initialises = env.unwrapped, env.unwrapped._initialize_episode

    def initialise(env_idx: Tensor, options: dict) -> None:
        task_initialises(env_idx, options)
        for name, (half, fixed, unseen, follower) in SPAWN[env_id].items():
            drawn = getattr(base, name).pose.p[env_idx]  # [n, 3]
            low, high = torch.tensor([fixed, fixed] if spawn == "fixed" else unseen or [[-x for x in half], half])
            share = (drawn[:, :2].cpu() / torch.tensor(half) + 1) / 2  # [n, 2] within [0, 1]
            move = torch.zeros_like(drawn)
            move[:, :2] = (low + share * (high - low)).to(drawn.device) - drawn[:, :2]
            for actor in [getattr(base, name)] + ([getattr(base, follower)] if follower else []):
                actor.set_pose(Pose.create_from_pq(actor.pose.p[env_idx] + move, actor.pose.q[env_idx]))

    base._initialize_episode = initialise
    return env


# --- end shared ---


# === Demonstrations ==================================================================================================
def plan_demos(args: Args, path: Path, seed: int, count: int) -> None:
    """Let ManiSkill's motion planner solve `count` episodes from `seed` on; writes them to `path` (joint positions)."""
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS
    from mani_skill.utils.wrappers.record import RecordEpisode

    make_maniskill(args).close()  # says what is wrong with the simulator or the flags
    env = gym.make(
        args.env_id, obs_mode="none", control_mode="pd_joint_pos", robot_uids=args.robot_uids, reward_mode="sparse",
        sim_backend="physx_cpu", render_backend="cpu", sim_config=dict(control_freq=args.control_freq),
    )  # fmt: skip
    env = args.place(env)
    env = RecordEpisode(env, str(path.parent), trajectory_name=path.stem, save_video=False, save_on_reset=False)
    last, bar = seed + 3 * count + 50, tqdm(total=count, desc=f"planning {path.stem}", mininterval=2)
    while bar.n < count and seed < last:
        try:
            result = MP_SOLUTIONS[args.env_id](env, seed=seed, debug=False, vis=False)
            solved = result != -1 and result[-1]["success"].item()
        except Exception:  # the solutions raise all sorts where no plan exists; the next seed is as good
            solved = False
        env.flush_trajectory(save=solved)
        bar.update(solved)
        seed += 1
    env.close()
    if bar.n < count:
        raise UserError(f"the motion planner fails on {args.env_id}: {bar.n} of {count} episodes up to seed {last}")
    path.with_suffix(".done").touch()  # a killed run leaves no half file


def open_demos(args: Args, path: Path) -> tuple[Path, list[dict]]:
    """A trajectory file that fits the flags, replayed under their controller if need be, and its list of episodes."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        episodes, env_id, kwargs = meta["episodes"], meta["env_info"]["env_id"], meta["env_info"]["env_kwargs"]
        freq, robot = (kwargs.get("sim_config") or {}).get("control_freq", 20), kwargs.get("robot_uids")
        with h5py.File(path, "r") as file:
            missing = sum(f"traj_{e['episode_id']}/actions" not in file for e in episodes)
    except FileNotFoundError as error:
        raise UserError(f"no demonstrations: {error.filename} doesn't exist (a .h5 has a .json beside it)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no complete ManiSkill trajectory file ({error}); make or copy it again") from error
    if missing:
        raise UserError(f"{path} is truncated: {missing} of the listed episodes are not stored; make or copy it again")
    for flag, have in dict(env_id=env_id, control_freq=freq, robot_uids=robot or args.robot_uids).items():
        if have != getattr(args, flag):
            raise UserError(f"{path} was recorded with --{flag.replace('_', '-')} {have}, not {getattr(args, flag)}")
    if path == Path(args.demo_path or "") and len(episodes) < args.num_demos:
        raise UserError(f"{path} holds {len(episodes)} episodes; --num-demos asks for {args.num_demos}")
    if (mode := kwargs.get("control_mode")) == args.control_mode:
        return path, episodes
    if mode != "pd_joint_pos":
        raise UserError(f"{path} has actions for {mode}; only pd_joint_pos can be converted to {args.control_mode}")
    target = path.with_name(f"{path.stem}.none.{args.control_mode}.physx_cpu.h5")
    done = target.with_suffix(".done")
    if not done.exists() or done.stat().st_mtime_ns < path.stat().st_mtime_ns:
        command = [sys.executable, "-m", "mani_skill.trajectory.replay_trajectory", "--traj-path", str(path)]
        command += ["--save-traj", "-c", args.control_mode, "-o", "none", "--num-envs", "1"]
        command += ["--use-first-env-state"] if args.spawn != "random" else []
        tool = subprocess.run(command, capture_output=True, errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"})
        if tool.returncode or not target.exists():
            raise UserError(f"ManiSkill can't convert {path} to {args.control_mode}: {tool.stderr[-300:]}")
        done.touch()
    return open_demos(args, target)


def observe(args: Args, path: Path, part: int, parts: int) -> list[dict[str, np.ndarray]]:
    """One worker's episodes: planned (if `path` is a folder) or read, then replayed to see what the policy will see."""
    count, planned = len(range(part, args.num_demos, parts)), path.is_dir()
    if planned:
        path = path / f"part{part}of{parts}.h5"
        if not path.with_suffix(".done").exists():  # spares, because a few fail when replayed
            plan_demos(args, path, 100_000 * part, count + 3 + count // 10)
    path, episodes = open_demos(args, path)
    episodes = episodes if planned else np.array_split(episodes, parts)[part]
    env, found = make_maniskill(args), []
    with h5py.File(path, "r") as file:
        for episode in tqdm(episodes, f"replaying {path.stem} {part + 1}/{parts}", mininterval=2):
            action = file[f"traj_{episode['episode_id']}/actions"][:].astype(np.float32)
            idle = int((np.abs(action[:, :-1]).max(1) >= args.skip_idle).argmax())
            action = action[idle:]
            first = env.reset(seed=episode["reset_kwargs"].get("seed", episode["episode_seed"]))[0]
            steps = [env.step(a) for a in action]
            success = [bool(step[1]) for step in steps]
            if any(success):
                still = action[-1] * np.append(np.full(action.shape[1] - 1, "delta" not in args.control_mode), 1)
                for _ in range(success.index(True) + 1 + args.upsample_steps - len(steps)):
                    steps.append(env.step(still.astype(np.float32)))
                success = [bool(step[1]) for step in steps]
                obs = {f"obs_{k}": np.concatenate([first[k], *(step[0][k] for step in steps)]) for k in first}
                action = np.stack([*action, *[still] * (len(steps) - len(action)), 0 * still]).astype(np.float32)
                counts = {"lengths": [len(steps)], "steps": [success.index(True) + 1], "idle": [idle]}
                found.append(obs | counts | {"action": action, "success": [*success, False]})
            if len(found) == count:
                break
    env.close()
    if not found:
        raise UserError(f"no demonstration of {path} succeeds when replayed: recorded with other settings?")
    return found


def main(args: Args) -> None:
    """Write the demonstrations to `out`. Raises: UserError, with nothing written there."""
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    for name, least in dict(num_demos=1, control_freq=1, image_size=1, upsample_steps=0).items():
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.spawn != "random" and (args.env_id not in SPAWN or args.demo_path):
        raise UserError(f"--spawn moves the objects of {', '.join(SPAWN)} where demonstrations are made, not read")
    if not 0 <= args.skip_idle < 1 or (args.skip_idle and "delta" not in args.control_mode):
        raise UserError(f"--skip-idle is below 1 and for controllers of differences, not {args.control_mode}")
    check_task(args)
    path = source = args.demo_path
    if path:
        open_demos(args, path := Path(path))  # checked and converted here, before there are workers
    elif args.env_id in MP_SOLUTIONS:
        spawn = "" if args.spawn == "random" else f"-{args.spawn}"
        source = f"{args.env_id}-{args.robot_uids}-{args.control_freq}hz-{args.num_demos}{spawn}"
        path = Path(args.demo_dir) / source
        path.mkdir(parents=True, exist_ok=True)
    else:
        raise UserError(f"ManiSkill has no motion planner for {args.env_id}: give demonstrations by --demo-path FILE")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} can't be written: name a file in a folder that you may write to")
    workers = min(os.cpu_count() or 1, 8, args.num_demos)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(partial(observe, args, path, parts=workers), range(workers)))
    found = [episode for part in parts for episode in part]
    about = {"source": source, "task": repr(TASKS.get(args.env_id))}
    temporary = out.with_suffix(f".tmp{os.getpid()}.npz")  # renamed when complete: a kill leaves no half file
    try:
        np.savez(temporary, **about, **{k: np.concatenate([episode[k] for episode in found]) for k in found[0]})
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    failed = "" if len(found) == args.num_demos else f"; the others of the {args.num_demos} fail when replayed"
    print(f"{len(found)} demonstrations in {out}{failed}", file=sys.stderr)


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the defaults."""
    return tyro.cli(Args, args=argv, description=__doc__)


# --- shared: entry ---
if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full; free space, then start again or --resume RUN_DIR ({error})", file=sys.stderr)
        sys.exit(2)
# --- end shared ---
