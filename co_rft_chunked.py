"""CO-RFT: chunked offline reinforced fine-tuning of vision-language-action policies (arXiv:2508.02219).

A deterministic chunk policy is cloned from a few demonstrations (stage 1), then improved by offline reinforcement
learning on the same demonstrations (stage 2): a causal transformer scores all prefixes of an action chunk in one pass,
is trained by Cal-QL with an N-step target per prefix, and the policy follows the mean of these scores (TD3).
No environment step is taken for training.

Equations (numbers of the paper)                                           where
  (1-2)  Cal-QL: TD + alpha * (max(Q(s, pi), V_mu) - Q(data))              calql_gap, update_critic
  (3-5)  N-step returns within a chunk, bootstrapped by the whole chunk    ChunkData.gather, td_target
  (6)    squared error of every prefix against its target                  td_loss
  (7)    stage 1: squared error of the chunk                               mse_loss
  (8)    (6) with Cal-QL's regulariser, for every prefix                   update_critic
  (9)    actor: minus the mean Q over prefixes                             q_loss, update_actor

Commands
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --num-demos 50   # minutes on one core
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state --spawn fixed    # one object position
  python co_rft_chunked.py --eval-only runs/NAME --eval-spawn ood                 # positions that were never seen
  python co_rft_chunked.py --preset paper --env-id PickCube-v1                    # the paper's reading
  python co_rft_chunked.py --sft-checkpoint runs/NAME                             # a run of bc.py --head mse-chunk
  python co_rft_chunked.py --resume runs/NAME | --eval-only runs/NAME             # go on after a kill | evaluate

Where the default differs from the paper (--preset paper: without 4, 6, 8 and --return-mix; see docs/co_rft.md)
  1 backbone: Octo instead of RoboVLMs with Kosmos-2 and its history head; frozen in stage 2, so that an observation is
    embedded once (the paper trains everything)
  2 Eq. (6) read as an i-step target for prefix i (--target literal: one H-step target for all)
  3 Eq. (8)'s expectation over the policy: its chunk and noisy copies of it; noise and Eq. (7)'s error in units of the
    actions' spread (a quarter of the action box at most), the box being that of the demonstrations (--action-range)
  4 the actor keeps imitating (--bc-weight), its Q loss is divided by the mean |Q|, and it starts after the critics
    (--critic-first), at a rate of its own (--actor-lr)
  5 part of the critic's target is the Monte-Carlo return (--return-mix); targets stay within possible returns, prefixes
    that reach past a termination are trained, and target critics move at every critic step (TD3: with the actor)
  6 a tenth of the demonstrations is held out, to see and to select against over-training
  7 proprio has no velocities, and is noisy in updates beside a camera (--proprio-noise)
  8 reward upsampling: the standing still at the end is for the critics, as an actor may learn from it to stop just
    short of success (--actor-until); the last success counts for ever (--lasting), or standing there loses value
Measured: docs/co_rft.md (CPU)
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import gc
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from backbones.consistency import SIGMA_DATA
from backbones.octo import OctoError
from backbones.octo_policy import OctoPolicy


# === Arguments =======================================================================================================
@dataclass
class Args:
    # --- experiment ---
    env_id: str = "StackCube-v1"  # ManiSkill task
    seed: int = 1  # seed of networks and batches
    preset: Literal["default", "paper"] = "default"  # "paper": the paper's choices; other flags still win
    runs: str = "runs"  # folder for runs
    run_name: str | None = None  # name of the run's folder; default: task, observation mode, seed and time
    resume: str | None = None  # run folder to go on with; all other flags are taken from its config.json
    eval_only: str | None = None  # run folder to evaluate; takes --eval-spawn, --select and --eval-episodes beside it
    track: bool = False  # log to Weights & Biases too (works offline)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto", "cpu" or "cuda"
    torch_threads: int = 0  # CPU threads; 0: one, but OMP_NUM_THREADS or all cores (up to 8) for stage 1 with a camera

    # --- environment ---
    obs_mode: Literal["rgb", "state"] = "rgb"  # camera + proprio, or privileged state (fast)
    control_mode: str = "pd_ee_delta_pos"  # ManiSkill controller
    control_freq: int = 10  # control steps per second (ManiSkill's default is 20)
    max_episode_steps: int | None = None  # time limit in control steps; default: per task, see TASKS
    robot_uids: str = "panda"  # robot model
    cameras: Literal["primary", "both"] | None = None  # looks at the table; on panda's hand too (default in rgb)
    image_size: int | None = None  # pixels a side (hand: half of it, from 64 on); default: 64, released weights: 256
    sim_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"  # physx_cuda: all in one GPU batch
    num_envs: int | None = None  # environments side by side (physx_cpu: a process each); default: 2 for rgb, else 1

    # --- demonstrations ---
    demo_path: str | None = None  # ManiSkill .h5 (with its .json); default: made by its planner
    num_demos: int = 300  # demonstrations to make or to use (the paper: 30 to 60)
    skip_idle: float = 0.0  # leave out their first steps in which the arm moves less (actions reach 1); 0: none
    demo_dir: str = "demos"  # cache for demonstrations
    spawn: Literal["random", "fixed", "ood"] = "random"  # where objects start: task's rectangle, one place, outside it
    upsample_steps: int = 8  # reward upsampling: control steps recorded, and rewarded, after the first success
    lasting: bool = True  # the last of them counts as success for ever (1 in all); --no-lasting: each is worth 1
    actor_until: Literal["success", "rest", "end"] = "rest"  # its decisions end at success, at rest after it, or never
    holdout: float = 0.1  # share of the demonstrations kept out of training, for val/* and --select

    # --- model ---
    backbone: Literal["octo-compact", "octo-small", "octo-base"] = "octo-compact"  # size of the Octo backbone
    checkpoint: str | None = None  # released Octo weights to start from: a folder, or hf://owner/name[@revision]
    hidden_dim: int = 256  # width of the actor
    num_layers: int = 2  # hidden layers of the actor
    chunk_len: int = 4  # H: actions per decision, executed open loop
    action_range: float = 1.5  # the policy's action box as a multiple of the largest demonstrated action, per dimension
    critic_len: int | None = None  # actions that the critic scores; default: all H; 1: single-step TD (ablation)
    critic_dim: int = 64  # width of the critic's transformer
    critic_layers: int = 2  # its blocks

    # --- stage 1: behaviour cloning ---
    sft_checkpoint: str | None = None  # run folder of bc.py --head mse-chunk to start from in the place of stage 1
    sft_updates: int = 6000  # updates of backbone and head
    sft_lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    sft_batch_size: int = 64  # transitions per batch
    proprio_noise: float | None = None  # noise on proprio in every update; default: 0.1 std with a camera, else 0

    # --- stage 2: chunked offline reinforcement learning ---
    critic_first: int = 500  # updates that train the critics alone, before the actor moves
    offline_updates: int = 500  # actor updates, beside the critics'
    gamma: float = 0.98  # discount per control step
    reinforce_lr: float = 3e-4  # learning rate of the critics (Adam, constant)
    actor_lr: float = 1e-4  # learning rate of the actor in stage 2 (Adam, constant)
    batch_size: int = 128  # decisions per batch
    tau: float = 0.01  # Polyak step of the target networks
    critic_updates: int = 2  # critic updates per actor update (TD3's delay)
    target: Literal["prefix", "literal"] = "prefix"  # Eq. (6): an i-step target for prefix i, or one H-step target
    return_mix: float = 0.5  # share of the Monte-Carlo return in the critic's target (0 = the paper's TD)
    target_noise: float = 0.2  # noise on target actions and on the copies in Eq. (8), in standard deviations of actions
    cql_alpha: float = 0.005  # alpha of Eq. (8)
    cql_samples: int = 2  # chunks in Eq. (8)'s expectation: the policy's own and noisy copies of it
    calibrate: bool = True  # --no-calibrate: CQL without the Monte-Carlo bound (ablation)
    q_weight: float = 1.0  # weight of the Q loss
    bc_weight: float = 1.0  # weight of imitation beside it (0 = the paper's Eq. 9)
    q_normalize: bool = True  # divide the Q loss by the batch mean of |Q|
    select: Literal["last", "td-error", "sft"] = "last"  # policy that counts: last, of least val/td_error, stage 1's

    # --- evaluation and logging ---
    eval_spawn: Literal["data", "random", "fixed", "ood"] = "data"  # where objects start in evaluation; data: --spawn
    eval_elsewhere: bool = False  # evaluate outside the task's rectangle ("ood") as well; eval/*_ood
    eval_episodes: int = 100  # episodes of each evaluation
    eval_freq: int = 0  # updates between evaluations in stage 2 (0 = none)
    val_freq: int = 100  # updates of stage 2 between rows on the held-out demonstrations
    video_episodes: int = 4  # episodes filmed after training (0 = none)
    log_freq: int = 100  # updates between logged rows
    checkpoint_freq: int = 1000  # updates between checkpoints

    def place(self, env: gym.Env) -> gym.Env:
        """The shared blocks call this on each environment that they make."""
        return place_objects(env, self.env_id, self.spawn)


PAPER = dict(
    bc_weight=0.0, q_normalize=False, cql_alpha=0.1, return_mix=0.0, holdout=0.0, num_demos=30, tau=0.005, gamma=0.99,
    batch_size=256, sft_lr=3e-4, critic_first=0, actor_lr=3e-4, offline_updates=20_000, lasting=False,
    actor_until="end",
)  # fmt: skip

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """control_freq num_envs num_demos hidden_dim num_layers chunk_len critic_len
        critic_layers sft_batch_size batch_size critic_updates cql_samples eval_episodes val_freq log_freq
        checkpoint_freq"""),
    "positive": (lambda x: x > 0, "sft_lr reinforce_lr actor_lr action_range"),
    "within [0, 1]": (lambda x: 0 <= x <= 1, "tau return_mix"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma holdout skip_idle"),
    "a multiple of 4": (lambda x: x > 0 and x % 4 == 0, "critic_dim"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
    "in 0..899 (training and evaluation episodes stay apart)": (lambda x: 0 <= x < 900, "seed"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    check_flags(args, LIMITS)
    check_octo(args)
    args.critic_len, args.eval_spawn = args.critic_len or args.chunk_len, args.eval_spawn.replace("data", args.spawn)
    if args.critic_len > args.chunk_len:
        raise UserError(f"--critic-len must be at most --chunk-len {args.chunk_len}, got {args.critic_len}")
    if ({args.spawn, args.eval_spawn} != {"random"} or args.eval_elsewhere) and args.env_id not in SPAWN:
        raise UserError(f"--spawn, --eval-spawn and --eval-elsewhere know {', '.join(SPAWN)}, not {args.env_id}")
    if args.demo_path and args.spawn != "random":
        raise UserError("--spawn moves objects in demonstrations made here; with --demo-path the file decides")
    if args.holdout and math.ceil(args.holdout * args.num_demos) >= args.num_demos:
        raise UserError(f"--holdout {args.holdout} leaves none of --num-demos {args.num_demos} to train on")
    if args.select == "td-error" and not args.holdout:
        raise UserError("--select td-error needs held-out demonstrations: give --holdout")
    if args.sft_checkpoint:
        args.sft_updates = 0
        if not (args.resume or args.eval_only):
            held = ["holdout", "num_demos", "demo_path"] if args.holdout else []  # else it knows what is held out here
            also = {name: getattr(args, name) for name in held}
            check_origin(args, Path(args.sft_checkpoint), head="mse-chunk", **also)


# --- shared: origin ---
def check_origin(args: Args, folder: Path, **also) -> None:
    """A run of bc.py can only start one on the same task, seen and controlled alike; `also`: its other flags.

    Raises: UserError.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        script, have = config["script"], {"cameras": "primary"} | config["args"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--sft-checkpoint {folder} is no run folder of bc.py ({error})") from error
    if script != "bc.py":
        raise UserError(f"--sft-checkpoint {folder} is a run of {script}, not of bc.py")
    names = "env_id robot_uids obs_mode cameras image_size backbone control_mode control_freq chunk_len".split()
    for name, want in ({name: getattr(args, name) for name in names} | also).items():
        if have.get(name) != want:
            flag = f"--{name.replace('_', '-')} {have.get(name)}"
            raise UserError(f"--sft-checkpoint {folder} was trained with {flag}, not {want}")


# --- end shared ---


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


# --- shared: flags ---
THREADS = min(torch.get_num_threads(), 8)  # torch's own choice: OMP_NUM_THREADS, or the cores


def check_flags(args: Args, limits: dict) -> None:
    """Check the flags that all scripts have, and fill in what depends on the task or the machine.

    `limits` holds {what a number must be: (test, flags)}; other numbers must be at least 0. Raises: UserError.
    """
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.utils.registration import REGISTERED_ENVS

    if args.env_id not in REGISTERED_ENVS:
        known = ", ".join(TASKS)
        raise UserError(f"--env-id {args.env_id} is no ManiSkill task; with a camera and defaults here: {known}")
    rules = {name: (meaning, test) for meaning, (test, names) in limits.items() for name in names.split()}
    for name, value in vars(args).items():
        meaning, test = rules.get(name, ("at least 0", lambda x: x >= 0))
        if isinstance(value, int | float) and not test(value):
            raise UserError(f"--{name.replace('_', '-')} must be {meaning}, got {value}")
    if args.max_episode_steps is None:
        seconds = TASKS.get(args.env_id, Task()).seconds or REGISTERED_ENVS[args.env_id].max_episode_steps / 10
        args.max_episode_steps = round(seconds * args.control_freq)
    if args.max_episode_steps < args.chunk_len:
        raise UserError(f"--max-episode-steps {args.max_episode_steps} is shorter than --chunk-len {args.chunk_len}")
    camera = args.obs_mode == "rgb"
    args.image_size = args.image_size or (64 if args.backbone.endswith("compact") else 256)
    args.proprio_noise = (0.1 if camera else 0.0) if args.proprio_noise is None else args.proprio_noise
    args.num_envs = args.num_envs or (2 if camera else 1)
    args.cameras = args.cameras or ("both" if camera else "primary")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "cuda" in args.device + args.sim_backend and not torch.cuda.is_available():
        raise UserError("no CUDA device found: use --device cpu --sim-backend physx_cpu")


# --- end shared ---


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


# --- shared: vector environment ---
def make_env(args: Args, num_envs: int, render: bool = False):
    """num_envs environments without auto-reset, the same for every backend.

    reset(seed=[num_envs integers]) -> obs, {};  step(action [num_envs, A] in the controller's units) -> obs, success
    [num_envs], unused, unused, {"ended": terminated by success or failure [num_envs]}. Seeds decide the initial states.
    """
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    if args.sim_backend == "physx_cuda":
        return make_maniskill(args, num_envs, render)
    make, mode = [lambda: CPUGymWrapper(make_maniskill(args, 1, render))] * num_envs, gym.vector.AutoresetMode.DISABLED
    if num_envs == 1:
        return gym.vector.SyncVectorEnv(make, autoreset_mode=mode)
    return gym.vector.AsyncVectorEnv(make, context="spawn", autoreset_mode=mode)


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
# --- shared: demonstrations ---
@dataclass
class Demos:
    """Successful demonstrations as this project's environment sees them; an episode of T steps has T + 1 rows."""

    obs: dict[str, np.ndarray]  # "proprio" [M, P] float32, cameras [M, H, H, 3] uint8
    action: np.ndarray  # [M, A] float32, controller's units; the row of an episode's last observation is unused
    lengths: np.ndarray  # [episodes] T of each, to the end of the recording
    steps: np.ndarray  # [episodes] steps to the first success: reinforcement learning episodes end there
    source: str
    success: np.ndarray | None = None  # [M] bool after each action; the reward of CO-RFT's longer recordings
    idle: np.ndarray | int = 0  # [episodes] steps that --skip-idle left out before the first

    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths + 1)[:-1]])

    def at(self, rows: Tensor, window: int) -> dict[str, Tensor]:
        """Observations at rows [B], with what was seen in the steps before, as `OctoPolicy.feature` wants them."""
        first = torch.from_numpy(np.repeat(self.starts(), self.lengths + 1))[rows][:, None]
        step = rows[:, None] + torch.arange(1 - window, 1)  # [B, W]
        seen = {k: torch.from_numpy(v)[step.maximum(first)] for k, v in self.obs.items() if k != "proprio"}
        return {"proprio": torch.from_numpy(self.obs["proprio"])[rows], "real": step >= first} | seen


def load_demos(args: Args) -> Demos:
    """The demonstrations that the flags ask for: those of an earlier run, or of make_demos.py, a program of its own.

    Raises: UserError; SystemExit where make_demos.py has said what is wrong.
    """
    flags = dict(
        env_id=args.env_id, robot_uids=args.robot_uids, control_mode=args.control_mode, control_freq=args.control_freq,
        obs_mode=args.obs_mode, image_size=args.image_size, sim_backend=args.sim_backend, num_demos=args.num_demos,
        demo_path=args.demo_path, cameras=args.cameras, skip_idle=args.skip_idle,
        **{k: getattr(args, k) for k in ("spawn", "upsample_steps") if hasattr(args, k)},
    )  # fmt: skip
    content = [flags, TASKS.get(args.env_id), "layout 4"]
    if args.demo_path and os.path.exists(args.demo_path):
        content += [os.path.getsize(args.demo_path), os.path.getmtime(args.demo_path)]
    cache = Path(args.demo_dir) / f"{args.env_id}-{hashlib.sha1(repr(content).encode()).hexdigest()[:12]}.npz"
    if not cache.exists():
        flags |= {"out": cache, "demo_dir": args.demo_dir}
        tool = [sys.executable, str(Path(__file__).resolve().with_name("make_demos.py"))]
        tool += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
        if (code := subprocess.run(tool).returncode) > 0:
            sys.exit(code)
        if code < 0:
            raise UserError(f"make_demos.py was ended by signal {-code} (out of memory?); start again")
    data = np.load(cache)
    if str(data["task"]) != repr(TASKS.get(args.env_id)):
        cache.unlink()
        raise UserError("make_demos.py has another camera or instruction for this task: give both the same TASKS")
    obs = {name.removeprefix("obs_"): data[name] for name in data.files if name.startswith("obs_")}
    rest = {name: data[name] for name in ("action", "lengths", "steps", "success", "idle")}
    return Demos(obs, source=str(data["source"]), **rest)


# --- end shared ---


# === Data ============================================================================================================
@dataclass
class Batch:
    """B decisions with the K prefixes that the critic scores (K' = K, or 1 for --target literal)."""

    feature: Tensor  # [B, F] embedding and normalised proprio at t
    chunk: Tensor  # [B, H*A] actions t..t+H-1, normalised to [-1, 1], time-major
    valid: Tensor  # [B, K] 1 if prefix i has a target: it lies within the episode, or nothing counts after its end
    reward: Tensor  # [B, K'] sum over j < i of gamma^j * r_{t+j}
    bootstrap: Tensor  # [B, K'] gamma^i, or 0 if the episode terminated by t + i (not: was truncated)
    next_feature: Tensor  # [B, K', F] at t + i, or where the episode ends before
    mc_return: Tensor  # [B] discounted return from t on; of a truncated episode a lower bound of it
    terminated: Tensor  # [B] whether the episode ends in success


class ChunkData:
    """The demonstrations, one row per observation; chunks and their prefixes are put together when they are drawn.

    An episode ends `upsample_steps` after its first success (reward upsampling). Each successful step until then is
    rewarded by 1, so that standing still at the goal is worth less with every step; or (`lasting`) by 1 - gamma and the
    last one by 1, what going on like that would earn, so that success is worth 1 all along. An episode that ends in
    success is terminated, any other one is truncated. A prefix that reaches past a termination is worth what was earned
    before, so that bootstrap values, which are whole chunks', are trained up to the end; one that reaches past a
    truncation has no target. `actor_until`: the actor's decisions end with the one that succeeds, the last that moves
    or the last recorded.
    """

    def __init__(self, demos: Demos, agent: Agent, args: Args):
        starts, ends = demos.starts(), demos.starts() + demos.lengths
        action, M = agent.normalise(demos.action), len(demos.action)
        action[ends] = [agent.hold_action(action[end - 1]) for end in ends]  # fills up chunks past the recording
        final = starts + np.minimum(demos.steps + args.upsample_steps, demos.lengths)  # where the episodes end
        reward, mc_return = np.zeros((2, M), np.float32)
        reward[starts + demos.steps - 1] = 1
        if args.upsample_steps:
            reward = demos.success.astype(np.float32)
        terminated = reward[final - 1] > 0
        if args.upsample_steps and args.lasting:
            reward *= 1 - args.gamma
            reward[final[terminated] - 1] = 1
        for start, end in zip(starts, final):
            for t in reversed(range(start, end)):  # nothing is earned after a truncation: the bound of reward 0
                mc_return[t] = reward[t] + args.gamma * (mc_return[t + 1] if t + 1 < end else 0)
        row, episode = np.arange(M), np.repeat(np.arange(len(ends)), demos.lengths + 1)
        per_row = dict(last=ends[episode], final=final[episode], terminated=terminated[episode])
        success, rest = starts + demos.steps, ends.copy()  # from `rest` on, the arm stands still after the success
        for i in range(len(ends)):
            while rest[i] > success[i] and (action[rest[i] - 1] == agent.hold_action(action[rest[i] - 2])).all():
                rest[i] -= 1
        shown = row < dict(success=success, rest=rest, end=ends)[args.actor_until][episode]
        arrays = per_row | dict(action=action, reward=reward, mc_return=mc_return, shown=shown)
        self.data = {k: torch.from_numpy(v) for k, v in arrays.items()}
        self.H, self.K, self.gamma, self.literal = agent.H, args.critic_len, args.gamma, args.target == "literal"
        held = episode >= len(ends) - math.ceil(args.holdout * len(ends))
        counts = row < final[episode]
        kinds = dict(clone=shown & ~held, actor=shown & counts & ~held, critic=counts & ~held, held=counts & held)
        self.rows = {k: torch.from_numpy(np.flatnonzero(v)) for k, v in kinds.items()}  # rows that chunks start from

    def draw(self, kind: str, size: int, generator: torch.Generator) -> Tensor:
        """Rows of `size` decisions, uniform with replacement: [size] int64."""
        return self.rows[kind][torch.randint(len(self.rows[kind]), (size,), generator=generator)]

    def chunk(self, t: Tensor) -> Tensor:
        """The chunks recorded from rows t [B] on: [B, H*A]."""
        steps = torch.minimum(t[:, None] + torch.arange(self.H), self.data["last"][t][:, None])
        return self.data["action"][steps].flatten(1)

    def gather(self, t: Tensor, device: str = "cpu") -> Batch:
        """The decisions at rows t [B], which lie before their episodes' ends."""
        d, i = self.data, torch.arange(1, self.K + 1)
        end = d["final"][t][:, None]
        within, terminated = t[:, None] + i <= end, d["terminated"][t][:, None]
        reached = torch.minimum(t[:, None] + i, end)  # [B, K] rows at which prefixes lead
        reward = (d["reward"][reached - 1] * within * self.gamma ** (i - 1)).cumsum(1)  # Eq. (3)
        bootstrap = self.gamma ** (reached - t[:, None]) * ~(terminated & (reached == end))
        which = slice(self.K - 1, None) if self.literal else slice(None)  # Eq. (6) as printed: the longest one for all
        batch = dict(
            feature=d["feature"][t], chunk=self.chunk(t), valid=(within | terminated).float(), reward=reward[:, which],
            bootstrap=bootstrap[:, which], next_feature=d["feature"][reached[:, which]], mc_return=d["mc_return"][t],
            terminated=terminated[:, 0],
        )  # fmt: skip
        return Batch(**{k: x.to(device) for k, x in batch.items()})


# === Networks ========================================================================================================
class ChunkActor(nn.Module):
    """Deterministic chunk: an MLP on the feature, in units of the demonstrations' spread (bc.py --head mse-chunk)."""

    def __init__(self, feature_dim: int, unit: Tensor, hidden: int, layers: int):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [H*A]
        sizes = [feature_dim] + [hidden] * layers
        parts = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.LayerNorm(b, eps=1e-6), nn.Tanh())]
        self.net = nn.Sequential(*parts, nn.Linear(hidden, len(unit)))

    def forward(self, feature: Tensor) -> Tensor:
        """[B, F] -> [B, H*A] in [-1, 1]."""
        return (self.unit * self.net(feature)).clamp(-1, 1)

    def noisy(self, chunk: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        """TD3's smoothing per action dimension, in standard deviations of the demonstrations (TD3: 0.2, up to 0.5)."""
        z = torch.randn(chunk.shape, generator=generator, device=chunk.device).clamp(-2.5, 2.5)
        return (chunk + noise * SIGMA_DATA * self.unit * z).clamp(-1, 1)


class Dense(nn.Module):
    """A linear layer of each critic, as one batched product."""

    def __init__(self, num: int, fan_in: int, out: int, std: float = 0.02):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(num, fan_in, out))
        self.bias = nn.Parameter(torch.zeros(num, 1, out))

    def forward(self, x: Tensor) -> Tensor:
        """[E, N, in] -> [E, N, out], by the first E critics."""
        return torch.baddbmm(self.bias[: len(x)], x, self.weight[: len(x)])


class ChunkCritic(nn.Module):
    """Twin causal transformers over K + 1 tokens, the state and its actions: output i is Q(s, a_1..a_i)."""

    def __init__(self, feature_dim: int, unit: Tensor, dim: int, layers: int, heads: int = 4, num: int = 2):
        super().__init__()
        self.heads = heads
        self.register_buffer("unit", unit.clone())  # [K, A]
        self.state_in = Dense(num, feature_dim, dim)
        self.action_in = Dense(num, unit.shape[-1], dim)
        self.position = nn.Parameter(0.02 * torch.randn(num, 1, len(unit) + 1, dim))
        self.blocks, self.out = nn.ModuleList(), Dense(num, dim, 1)
        for _ in range(layers):  # pre-norm GPT blocks; the norms' gains are left to the layers behind them
            sizes = dict(qkv=(dim, 3 * dim), mix=(dim, dim), up=(dim, 4 * dim), down=(4 * dim, dim))
            self.blocks.append(nn.ModuleDict({k: Dense(num, *s) for k, s in sizes.items()}))

    def forward(self, feature: Tensor, chunk: Tensor, num: int = 2) -> Tensor:
        """Q of all prefixes by the first `num` critics: feature [B, F], chunk [B, N, H*A] -> [num, B, N, K]."""
        (B, N), (K, A), width = chunk.shape[:2], self.unit.shape, self.position.shape[-1:]
        action = (chunk[..., : K * A].unflatten(-1, (K, A)) / self.unit).reshape(1, B * N * K, A).expand(num, -1, -1)
        state = self.state_in(feature.expand(num, -1, -1))[:, :, None].expand(-1, -1, N, -1)  # [E, B, N, d]
        tokens = [state.reshape(num, B * N, 1, -1), self.action_in(action).view(num, B * N, K, -1)]
        x = (torch.cat(tokens, 2) + self.position[:num]).flatten(1, 2)  # [E, B*N*(K+1), d]
        for block in self.blocks:
            heads = block["qkv"](F.layer_norm(x, width)).view(num * B * N, K + 1, 3, self.heads, -1)
            q, k, v = heads.permute(2, 0, 3, 1, 4)  # [.., K + 1, d/heads] each
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["mix"](mixed.transpose(1, 2).reshape(x.shape))
            x = x + block["down"](F.gelu(block["up"](F.layer_norm(x, width))))
        return self.out(F.layer_norm(x, width)).view(num, B, N, K + 1)[..., 1:]


# --- shared: octo ---
def check_octo(args: Args) -> None:
    """Check the flags of the backbone. Raises: UserError."""
    released = args.backbone != "octo-compact"
    if released != bool(args.checkpoint):
        raise UserError("--backbone octo-small or octo-base and --checkpoint FOLDER or hf://owner/name need each other")
    if released and args.obs_mode != "rgb":
        raise UserError("released Octo weights need --obs-mode rgb: they know cameras only")
    if released and args.image_size != 256:
        raise UserError(f"released Octo weights see 256 pixels (on the hand: 128), not --image-size {args.image_size}")


class TaskPolicy(OctoPolicy):
    """Octo for the flags of a run and its demonstrations."""

    def __init__(self, args: Args, demos: Demos):
        """Raises: UserError if the weights of --checkpoint can't be had."""
        action = np.delete(demos.action, demos.starts() + demos.lengths, axis=0)  # without the unused rows
        try:
            super().__init__(
                args.backbone, args.checkpoint, bool(args.resume or args.eval_only), demos.obs, action, args.chunk_len,
                relative="delta" in args.control_mode, action_range=args.action_range,
                instruction=TASKS.get(args.env_id, Task()).instruction,
            )  # fmt: skip
        except OctoError as error:
            raise UserError(str(error)) from error


# --- end shared ---


class Agent(TaskPolicy):
    """Everything that is learned; `cloned` is the policy after stage 1, `selected` the choice of --select td-error."""

    def __init__(self, args: Args, demos: Demos):
        super().__init__(args, demos)
        sizes = (self.feature_dim, self.chunk_unit, args.hidden_dim, args.num_layers)
        self.actor, self.target_actor, self.selected, self.cloned = (ChunkActor(*sizes) for _ in range(4))
        unit = self.chunk_unit.view(self.H, -1)[: args.critic_len]
        sizes = (self.feature_dim, unit, args.critic_dim, args.critic_layers)
        self.critic, self.target_critic = ChunkCritic(*sizes), ChunkCritic(*sizes)
        self.target_critic.load_state_dict(self.critic.state_dict())
        for copy in (self.target_actor, self.selected, self.cloned, self.target_critic):
            copy.requires_grad_(False)

    def act(self, feature: Tensor, select: str, generator: torch.Generator) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] in [-1, 1]. Deterministic: the generator isn't used."""
        actor = {"last": self.actor, "td-error": self.selected, "sft": self.cloned}[select]
        return actor(feature).unflatten(1, (self.H, -1)).cpu().numpy()


# === Losses: pure functions ==========================================================================================
def mse_loss(predicted: Tensor, chunk: Tensor, unit: Tensor) -> Tensor:
    """Eq. (7): mean squared error of a chunk, in units of the spread. Shapes: [B, D], [B, D], [D] -> scalar."""
    return ((predicted - chunk) / unit).square().mean()


def td_target(batch: Batch, next_q: Tensor, return_mix: float, highest: float) -> Tensor:
    """y_i = sum over j < i of gamma^j r_{t+j} + gamma^i * min_k Q'_k(s_{t+i}, a'), kept within the returns that exist.

    return_mix > 0 moves that share of the target to the Monte-Carlo return, where the episode has one (it terminates):
    TD would need thousands of updates to carry it back through the episode.
    Shapes: next_q [2, B, K'] -> [B, K'].
    Source: Eqs. (3) and (5); the bootstrap value is the whole chunk's (the paper is silent); return_mix: ours.
    """
    target = batch.reward + batch.bootstrap * next_q.min(0).values
    share = return_mix * batch.terminated[:, None]
    return torch.lerp(target, batch.mc_return[:, None].expand_as(target), share.expand_as(target)).clamp(0, highest)


def td_loss(q: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Eq. (6): mean over critics and valid prefixes. Shapes: q [2, B, K], target [B, K'], valid [B, K] -> scalar."""
    return (valid * (q - target).square()).sum() / (len(q) * valid.sum())


def calql_gap(q_data: Tensor, q_policy: Tensor, mc_return: Tensor, valid: Tensor, calibrate: bool) -> Tensor:
    """The regulariser of Eqs. (2) and (8): E_pi max(Q, V_mu) - E_data Q, averaged over prefixes and critics.

    Shapes: q_data [2, B, K], q_policy [2, B, n, K], mc_return [B], valid [B, K] -> scalar.
    """
    bounded = torch.maximum(q_policy, mc_return[:, None, None]) if calibrate else q_policy
    return bounded.mean() - (valid * q_data).sum() / (len(q_data) * valid.sum())


def q_loss(q: Tensor, normalise: bool) -> Tensor:
    """Eq. (9): minus the mean Q over prefixes, optionally over the mean |Q| (as TD3+BC). Shapes: q [B, K] -> scalar."""
    return -q.mean() / (q.abs().mean().detach() + 1e-6 if normalise else 1.0)


# === Updates =========================================================================================================
def batch_target(agent: Agent, batch: Batch, args: Args, noise: float, generator: torch.Generator) -> Tensor:
    """Targets [B, K'] of a batch from the target networks, with TD3's smoothing by `noise`."""
    feature = batch.next_feature.flatten(0, 1)  # [B*K', F]
    chunk = agent.actor.noisy(agent.target_actor(feature), noise, generator)
    next_q = agent.target_critic(feature, chunk[:, None])[:, :, 0, -1]  # [2, B*K']
    highest = 1.0 if args.lasting else sum(args.gamma**i for i in range(args.upsample_steps + 1))
    return td_target(batch, next_q.view(2, *batch.reward.shape), args.return_mix, highest)


def update_critic(agent: Agent, optimizer, batch: Batch, args: Args, generator) -> dict[str, Tensor]:
    """One step on Eq. (8), and the Polyak step of the target critics."""
    with torch.no_grad():
        target = batch_target(agent, batch, args, args.target_noise, generator)
        own = agent.actor(batch.feature)[:, None]  # [B, 1, D]
        copies = agent.actor.noisy(own.expand(-1, args.cql_samples - 1, -1), args.target_noise, generator)
    q = agent.critic(batch.feature, torch.cat([batch.chunk[:, None], own, copies], 1))  # [2, B, 1 + n, K]
    q_data, q_policy = q[:, :, 0], q[:, :, 1:]
    loss_td = td_loss(q_data, target, batch.valid)
    loss_cql = calql_gap(q_data, q_policy, batch.mc_return, batch.valid, args.calibrate)
    loss = loss_td + args.cql_alpha * loss_cql
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.critic, agent.target_critic, args.tau)
    return {
        "losses/td": loss_td, "losses/calql": loss_cql, "losses/critic": loss, "values/q_data": q_data.mean(),
        "values/q_policy": q_policy.mean(), "values/td_target": target.mean(), "values/mc_return": batch.mc_return.mean(),
        "calib/bound_rate": (q_policy < batch.mc_return[:, None, None]).float().mean(),
    }  # fmt: skip


def update_actor(agent: Agent, optimizer, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step on Eq. (9) and on imitation, and the Polyak step of the target actor."""
    chunk = agent.actor(batch.feature)
    agent.critic.requires_grad_(False)
    q = agent.critic(batch.feature, chunk[:, None], num=1)[0, :, 0]  # [B, K], critic 1 as in TD3
    agent.critic.requires_grad_(True)
    loss_q, loss_bc = q_loss(q, args.q_normalize), mse_loss(chunk, batch.chunk, agent.actor.unit)
    loss = args.q_weight * loss_q + args.bc_weight * loss_bc
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.actor, agent.target_actor, args.tau)
    return {"losses/q": loss_q, "losses/bc": loss_bc, "losses/actor": loss}


# --- shared: polyak ---
@torch.no_grad()
def polyak_update(source: nn.Module, target: nn.Module, tau: float) -> None:
    """target <- (1 - tau) * target + tau * source, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# --- end shared ---


# === Rollouts and evaluation =========================================================================================
# --- shared: rollouts ---
EVAL_SEED, TRAIN_SEED = 1_000_000_000, 100_000_000  # demonstrations use seeds from 0; the three never meet


@dataclass
class Episode:
    """T steps; demonstrations may have more features and actions than that: what was recorded after the success."""

    feature: Tensor  # [T+1, F], empty if not asked for
    action: np.ndarray  # [T, A] normalised
    success: np.ndarray  # [T] at each step
    terminated: bool  # at T


@torch.no_grad()
def rollout(env, agent, args: Args, act, seeds, training: bool, frames: list | None = None) -> list[Episode]:
    """One episode per environment, side by side; act(feature [N, F]) -> normalised chunk [N, H, A], asked once a chunk.

    training=True ends an episode at success or failure and keeps features; otherwise episodes run to the time limit,
    so that success at the end can be told from success on the way. `frames` collects the first environment's video.
    """
    N, H = len(seeds), agent.H
    every = 1 if training or agent.window > 1 else H  # replay stores each step's observation
    seen, ended = [env.reset(seed=list(seeds), options={"every": every})[0]], np.zeros(N, dtype=bool)
    length, features, actions, successes = np.full(N, args.max_episode_steps), [], [], []
    for t in range(args.max_episode_steps):
        if t % every == 0:
            features.append(agent.feature(agent.recent(seen)))
        if t % H == 0:
            chunk = act(features[-1])
        actions.append(chunk[:, t % H])
        obs, success, _, _, info = env.step(agent.denormalise(actions[-1]))
        seen = [*seen, obs][-agent.window :]
        successes.append(success > 0)
        if frames is not None:
            frames.append(env.call("render")[0])
        if training:
            length[info["ended"] & ~ended] = t + 1
            ended |= info["ended"]
            if ended.all():
                break
    stacked = torch.stack([*features, agent.feature(agent.recent(seen))], 1).cpu() if training else torch.empty(N, 0)
    action, success = np.stack(actions, 1), np.stack(successes, 1)  # [N, T, A], [N, T]
    return [Episode(stacked[i, : n + 1], action[i, :n], success[i, :n], bool(ended[i])) for i, n in enumerate(length)]


# --- end shared ---


# --- shared: evaluation ---
def evaluate(env, agent, args: Args, act, episodes: int, rewards: tuple[float, float] = (0.0, 1.0)) -> dict[str, float]:
    """Success over the fixed evaluation episodes: the same initial states and policy noise every time.

    act(feature, generator) gives chunks; `rewards` of a failing step and of success make up the return. Uses a
    generator of its own and leaves torch's global one alone, so training doesn't depend on when it is called.
    Returns: both success rates, Wilson's 95 % interval, mean env steps to success (over successes), return.
    """
    start, flags, act = time.time(), [], partial(act, generator=torch.Generator(args.device).manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        for first in range(EVAL_SEED, EVAL_SEED + episodes, args.num_envs):
            seeds = range(first, first + args.num_envs)
            flags += [e.success for e in rollout(env, agent, args, act, seeds, training=False)]
    flags = np.stack(flags[:episodes])  # [episodes, time limit]
    once, first, (fail, success) = flags.any(1), flags.argmax(1), rewards
    low, high = binomtest(int(once.sum()), episodes).proportion_ci(method="wilson")
    metrics = {
        "eval/success_once": once.mean(), "eval/success_once_low": low, "eval/success_once_high": high,
        "eval/success_at_end": flags[:, -1].mean(), "eval/num_episodes": episodes, "time/eval_s": time.time() - start,
        "eval/episode_len": first[once].mean() + 1 if once.any() else args.max_episode_steps,
        "eval/return": np.where(once, success + fail * first, fail * args.max_episode_steps).mean(),
    }  # fmt: skip
    return {name: float(value) for name, value in metrics.items()}


def film(agent, args: Args, act, folder: Path) -> None:
    """Film the first evaluation episodes to folder/episode-I-{success,failure}.mp4."""
    import imageio

    args = dataclasses.replace(args, sim_backend="physx_cpu")  # one episode at a time
    env, act = make_env(args, 1, render=True), partial(act, generator=torch.Generator(args.device).manual_seed(0))
    folder.mkdir(exist_ok=True)
    for i in range(args.video_episodes):
        (episode,) = rollout(env, agent, args, act, [EVAL_SEED + i], training=False, frames=(frames := []))
        name = f"episode-{i}-{'success' if episode.success.any() else 'failure'}.mp4"
        imageio.mimsave(folder / name, frames, fps=args.control_freq, macro_block_size=1)
    env.close()


# --- end shared ---


# === Logging and checkpoints =========================================================================================
# --- shared: logging ---
class Logger:
    """The same rows to metrics.csv (global_step, update_step, name, value), TensorBoard and, if asked, wandb."""

    def __init__(self, folder: Path, args: Args, update_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.file, self.wandb = (folder / "metrics.csv").open("a", newline="", buffering=1), None  # flushed by line
        if not self.file.tell():
            csv.writer(self.file).writerow(["global_step", "update_step", "name", "value"])
        self.board = SummaryWriter(folder / "tensorboard", purge_step=update_step + 1)
        if args.track:
            import wandb

            names = dict(project="vla-rl", name=folder.name, id=folder.name)
            self.wandb = wandb.init(**names, resume="allow", dir=str(folder), config=dataclasses.asdict(args))

    def log(self, values: dict, global_step: int, update_step: int) -> None:
        values = {name: x.item() if isinstance(x, Tensor) else float(x) for name, x in values.items()}
        csv.writer(self.file).writerows([global_step, update_step, name, f"{x:.6g}"] for name, x in values.items())
        for name, value in (values | {"time/global_step": global_step}).items():
            self.board.add_scalar(name, value, update_step)
        if self.wandb:
            self.wandb.log(values | {"global_step": global_step, "update_step": update_step})

    def close(self) -> None:
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def write_json(path: Path, content: dict) -> None:
    """Atomic: the file is the old one or the new one, never half of it."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def provenance() -> dict:
    """Git commit, package versions and machine, for config.json and summary.json."""
    git = f"git -C '{Path(__file__).parent}' describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null"
    commit = subprocess.getoutput(git) or "unknown"
    packages = {name: version(name) for name in ("torch", "mani_skill", "sapien", "numpy", "gymnasium")}
    machine = {"cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    return {"git_commit": commit, "python": sys.version.split()[0], "packages": packages} | machine


# --- end shared ---


# --- shared: checkpoints ---
def save_checkpoint(folder: Path, name: str, weights: dict[str, Tensor], state: dict) -> None:
    """Write folder/checkpoints/NAME, point `latest` at it, then drop the older ones; each step is atomic."""
    root = folder / "checkpoints"
    while (root / name).exists():  # never in the place of the only good one
        name += "+"
    temporary, final = root / f".{name}.tmp", root / name
    temporary.mkdir(parents=True, exist_ok=True)  # it may be there, left half-written by a kill
    try:
        # Through memory: the libraries' own writers hide that a disk is full.
        weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        (temporary / "weights.safetensors").write_bytes(save(weights))
        torch.save(state, buffer := io.BytesIO())
        (temporary / "training.pt").write_bytes(buffer.getbuffer())
        os.replace(temporary, final)
        (root / "latest.tmp").write_text(name)
        os.replace(root / "latest.tmp", root / "latest")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk the last complete checkpoint stays
    for old in root.iterdir():
        if old.is_dir() and old != final:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and training state of the last checkpoint. Raises: UserError if the folder holds no readable one."""
    try:
        here = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
        state = torch.load(here / "training.pt", map_location="cpu", weights_only=True)
        return load_file(here / "weights.safetensors"), state
    except Exception as error:  # the readers raise all sorts
        hint = "a run that died before its first one has to be started again, under another --run-name"
        raise UserError(f"{folder} holds no readable checkpoint; {hint} ({error})") from error


def load_weights(agent: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Strict load. Raises: UserError that begins with the misfits (another task, observation mode or network size)."""
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{source} is a checkpoint of another task or network: {str(error)[:300]}") from error


def load_config(cls, folder: Path):
    """The flags a run was started with. Raises: UserError if `folder` isn't a run of this script."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["script"] != Path(__file__).name:
            raise UserError(f"{folder} is a run of {config['script']}, not of {Path(__file__).name}")
        flags = {"cameras": "primary"} | config["args"]  # runs from before --cameras had one
        if gone := sorted(flags.keys() - {f.name for f in dataclasses.fields(cls)}):
            raise UserError(f"{folder} was begun by a version with {gone[0]}: go on with that one, see config.json")
        return cls(**flags)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no run folder of {Path(__file__).name} (config.json: {error})") from error


def stored_args(args, beside: str):
    """The flags of the run that --resume or --eval-only names, with its folder there.

    --resume goes on where the run was begun; --eval-only takes --device, and the flags of `beside` that were given.
    Raises: UserError if it isn't a run of this script, or was begun on another device or by a version with fewer flags.
    """
    if args.resume and args.eval_only:
        raise UserError("--resume and --eval-only exclude each other")
    folder = Path(args.resume or args.eval_only)
    stored, places = load_config(type(args), folder), dict(resume=args.resume, eval_only=args.eval_only)
    if args.resume and args.device not in ("auto", stored.device):
        raise UserError(f"{folder} was begun with --device {stored.device}: its losses can't go on alike on another")
    known = json.loads((folder / "config.json").read_text())["args"]
    if args.resume and (new := [f.name for f in dataclasses.fields(stored) if f.name not in known]):
        raise UserError(f"{folder} was begun by a version without {new[0]}: go on with that one, see config.json")
    if args.eval_only:
        words = {word.split("=")[0] for word in sys.argv}  # a default that was asked for counts too
        asked = [n for n in beside.split() if f"--{n}".replace("_", "-") in words]
        asked += ["device"] + [n for n in beside.split() if getattr(args, n) != getattr(type(args), n)]
        places |= {name: getattr(args, name) for name in asked}
    return dataclasses.replace(stored, **places)


# --- end shared ---


# === Training ========================================================================================================
# --- shared: random shift ---
def random_shift(image: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each sample's W images by up to `pad` pixels, edges repeated. Shapes: [B, W, H, H, 3] uint8 -> same."""
    B, W, side = image.shape[:3]
    shift = torch.randint(-pad, pad + 1, (2, B, 1), generator=generator)
    rows, cols = (torch.arange(side) + shift).clamp(0, side - 1).to(image.device)[:, :, None]  # [B, 1, H] each
    sample, step = torch.arange(B, device=image.device), torch.arange(W, device=image.device)
    return image[sample[:, None, None, None], step[:, None, None], rows[..., None], cols[:, :, None]]


# --- end shared ---


STAGES = ("sft", "offline", "done")


class Run:
    """The state of a run that a checkpoint holds, and the bookkeeping between updates."""

    def __init__(self, args: Args, folder: Path, demos: Demos):
        self.args, self.folder, self.demos, self.mark = args, folder, demos, time.time()
        torch.manual_seed(args.seed)
        self.agent = Agent(args, demos).to(args.device)
        if args.sft_checkpoint and not (args.resume or args.eval_only):
            weights = load_checkpoint(Path(args.sft_checkpoint))[0]  # backbone, actor and units; not the critics
            load_weights(self.agent, self.agent.state_dict() | weights, Path(args.sft_checkpoint))
        self.chunks = ChunkData(demos, self.agent, args)
        devices = {"clone": "cpu", "critic": "cpu", "actor": "cpu", "update": args.device}
        self.generators = {k: torch.Generator(d).manual_seed(args.seed + i) for i, (k, d) in enumerate(devices.items())}
        self.count = {"stage": "sft", "stage_update": 0, "update_step": 0}
        self.best = {"td_error": math.inf, "update": 0}  # of --select td-error
        self.evals: list[dict] = []  # one entry per evaluation: stage, update, policy and the metrics
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    @cached_property
    def envs(self) -> dict:
        """Environments to evaluate in, by where objects start; the first is the one that counts."""
        places = dict.fromkeys([self.args.eval_spawn, *["ood"] * self.args.eval_elsewhere])
        return {place: make_env(dataclasses.replace(self.args, spawn=place), self.args.num_envs) for place in places}

    def enter(self, stage: str) -> bool:
        """True if `stage` is still to be done; if it begins here, the one before is saved and optimizers are new."""
        if STAGES.index(self.count["stage"]) > STAGES.index(stage):
            return False
        if self.count["stage"] != stage or not self.optimizers:
            self.clock()
            self.count |= {"stage": stage, "stage_update": 0}
            self.make_optimizers()
            if stage == "offline":
                self.embed()
            if self.count["update_step"]:
                self.save()
        return True

    def make_optimizers(self) -> None:
        """Those of the present stage, and stage 1's averaged weights."""
        args, agent = self.args, self.agent
        self.average = None
        if self.count["stage"] == "sft":
            self.trained = nn.ModuleList([agent.backbone, agent.actor])
            self.optimizers = {"sft": torch.optim.AdamW(self.trained.parameters(), lr=args.sft_lr, weight_decay=1e-4)}
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
            self.average = torch.optim.swa_utils.AveragedModel(self.trained, multi_avg_fn=decay)
        else:
            nets = {"critic": agent.critic, "actor": agent.actor}
            rates = {"critic": args.reinforce_lr, "actor": args.actor_lr}
            self.optimizers = {k: torch.optim.Adam(net.parameters(), lr=rates[k]) for k, net in nets.items()}

    @torch.no_grad()
    def embed(self) -> None:
        """Each observation once: the backbone is frozen from here on."""
        rows = torch.arange(len(self.demos.action)).split(256)
        features = [self.agent.feature(self.demos.at(r, self.agent.window)).cpu() for r in rows]
        self.chunks.data["feature"] = torch.cat(features)

    def batch(self, kind: str) -> Batch:
        """A batch of decisions for the critics or the actor, proprio noisy beside a camera."""
        rows = self.chunks.draw(kind, self.args.batch_size, self.generators[kind])
        batch = self.chunks.gather(rows, self.args.device)
        for name in ("feature", "next_feature"):
            x = getattr(batch, name)
            noisy = self.agent.perturb(x.flatten(0, -2), self.args.proprio_noise, self.generators["update"])
            setattr(batch, name, noisy.view_as(x))
        return batch

    @torch.no_grad()
    def held_out(self) -> dict[str, Tensor]:
        """TD error, Q against Monte-Carlo returns and imitation error on demonstrations that nothing was trained on."""
        agent, args, found = self.agent, self.args, []
        for rows in self.chunks.rows["held"].split(256):
            batch = self.chunks.gather(rows, args.device)
            chunk = agent.actor(batch.feature)
            q = agent.critic(batch.feature, torch.stack([batch.chunk, chunk], 1))  # [2, B, 2, K]
            error = q[:, :, 0] - batch_target(agent, batch, args, 0.0, torch.Generator(args.device))
            bc = ((chunk - batch.chunk) / agent.actor.unit).square().mean(-1)[self.chunks.data["shown"][rows]]
            found.append([error.square().mean(0), batch.valid, *q.mean(0)[..., -1].unbind(1), batch.mc_return, bc])
        error, valid, q_data, q_policy, mc_return, bc = (torch.cat(x) for x in zip(*found))
        gap, correlation = q_data - mc_return, torch.corrcoef(torch.stack([q_data, mc_return]))[0, 1]
        return {
            "val/td_error": (error * valid).sum() / valid.sum(), "val/q_data": q_data.mean(),
            "val/q_policy": q_policy.mean(), "val/mc_return": mc_return.mean(), "val/bc": bc.mean(),
            "calib/q_minus_return": gap.mean(), "calib/abs_error": gap.abs().mean(), "calib/correlation": correlation,
        }  # fmt: skip

    def evaluate(self, logger: Logger, select: str) -> None:
        """Evaluate a policy wherever the run is evaluated; logs it, and adds to `evals`."""
        stage, update, args = self.count["stage"], self.count["update_step"], self.args
        for place, env in self.envs.items():
            metrics = evaluate(env, self.agent, args, partial(self.agent.act, select=select), args.eval_episodes)
            suffix = ("_selected" if select != "last" else "") + (f"_{place}" if place != args.eval_spawn else "")
            logger.log({name + suffix: value for name, value in metrics.items()}, 0, update)
            self.evals.append({"stage": stage, "update": update, "select": select, "spawn": place} | metrics)
            once, low, high = (metrics[f"eval/success_once{end}"] for end in ("", "_low", "_high"))
            line = f"{stage:>8} {select} {place} | update {update:6d} | success {once:.2f} [{low:.2f}, {high:.2f}]"
            tqdm.write(f"{line} | steps to success {metrics['eval/episode_len']:.1f}")

    def tick(self, logs: dict, logger: Logger) -> int:
        """After each update: count it, log now and then. Returns the stage's updates so far."""
        self.count["stage_update"] += 1
        self.count["update_step"] += 1
        if self.count["update_step"] % self.args.log_freq == 0:
            logger.log(logs, 0, self.count["update_step"])
        return self.count["stage_update"]

    def clock(self) -> None:
        """Book the time since the last call on the present stage."""
        self.seconds[self.count["stage"]] += time.time() - self.mark
        self.mark = time.time()

    def save(self) -> None:
        self.clock()
        state = {name: getattr(self, name) for name in ("count", "best", "evals", "seconds")} | {
            "generators": {k: g.get_state() for k, g in self.generators.items()},
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "average": self.average and self.average.state_dict(),
            "log_size": (self.folder / "metrics.csv").stat().st_size,
        }
        save_checkpoint(self.folder, f"update-{self.count['update_step']}", self.agent.state_dict(), state)

    def load(self) -> None:
        weights, state = load_checkpoint(self.folder)
        load_weights(self.agent, weights, self.folder)
        self.count, self.best, self.evals, self.seconds = (state[k] for k in ("count", "best", "evals", "seconds"))
        if self.args.eval_only:
            return
        self.chunks = ChunkData(self.demos, self.agent, self.args)  # in the units of the loaded policy
        self.make_optimizers()
        if self.count["stage"] != "sft":
            self.embed()
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.average:
            self.average.load_state_dict(state["average"])
        os.truncate(self.folder / "metrics.csv", state["log_size"])  # what was logged after that checkpoint goes


def train_sft(run: Run, logger: Logger) -> None:
    """Stage 1: behaviour cloning of backbone and head; ends with the averaged weights."""
    args, agent, total = run.args, run.agent, run.args.sft_updates
    optimizer, params = run.optimizers["sft"], run.optimizers["sft"].param_groups[0]["params"]
    if "primary" in run.demos.obs:
        torch.set_num_threads(args.torch_threads or THREADS)
    with tqdm(total=total, initial=run.count["stage_update"], desc="[1/2] SFT", mininterval=2) as bar:
        while (step := run.count["stage_update"]) < total:
            rate = min((step + 1) / (0.05 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
            optimizer.param_groups[0]["lr"] = args.sft_lr * rate
            t = run.chunks.draw("clone", args.sft_batch_size, run.generators["clone"])
            obs = run.demos.at(t, agent.window)
            images = {k: random_shift(v, run.generators["clone"]) for k, v in obs.items() if v.dim() == 5}
            feature = agent.feature(obs | images)
            feature = agent.perturb(feature, args.proprio_noise, run.generators["update"])
            loss = mse_loss(agent.actor(feature), run.chunks.chunk(t).to(args.device), agent.actor.unit)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            run.average.update_parameters(run.trained)
            logs = {"losses/bc": loss, "grad_norm/sft": norm, "lr/sft": args.sft_lr * rate}
            if run.tick(logs, logger) % args.checkpoint_freq == 0:
                run.save()
            bar.update()
    run.trained.load_state_dict(run.average.module.state_dict())
    for copy in (agent.target_actor, agent.selected, agent.cloned):
        copy.load_state_dict(agent.actor.state_dict())
    torch.set_num_threads(args.torch_threads or 1)


def train_offline(run: Run, logger: Logger) -> None:
    """Stage 2: `critic_updates` critic steps and one actor step per update, on the demonstrations alone.

    In the first `critic_first` updates the actor stays the cloned one.
    """
    args, agent, count, total = run.args, run.agent, run.count, run.args.critic_first + run.args.offline_updates
    optimizers, noise = run.optimizers, run.generators["update"]
    with tqdm(total=total, initial=count["stage_update"], desc="[2/2] CO-RFT", mininterval=2) as bar:
        while count["stage_update"] < total:
            for _ in range(args.critic_updates):
                logs = update_critic(agent, optimizers["critic"], run.batch("critic"), args, noise)
            if moves := count["stage_update"] >= args.critic_first:
                logs |= update_actor(agent, optimizers["actor"], run.batch("actor"), args)
            step = run.tick(logs, logger)
            if args.holdout and step % args.val_freq == 0:
                logger.log(values := run.held_out(), 0, count["update_step"])
                bar.set_description(f"[2/2] CO-RFT | held-out TD error {values['val/td_error']:.3f}", refresh=False)
                if moves and values["val/td_error"] < run.best["td_error"]:
                    run.best = {"td_error": values["val/td_error"].item(), "update": count["update_step"]}
                    agent.selected.load_state_dict(agent.actor.state_dict())
            if args.eval_freq and moves and step % args.eval_freq == 0 and step < total:
                run.evaluate(logger, "last")
            if step % args.checkpoint_freq == 0:
                run.save()
            bar.update()


def summarise(run: Run) -> dict:
    """summary.json: what happened, from the recorded evaluations."""
    once, steps, interval = "eval/success_once", "eval/episode_len", ("eval/success_once_low", "eval/success_once_high")
    first, own = run.evals[0], [e for e in run.evals if e["spawn"] == run.args.eval_spawn]
    ends = {e["select"]: e for e in own} | {"sft": first}
    last = ends.get(run.args.select, first)  # before the first held-out row, td-error selects the cloned policy
    return {
        "success_once": last[once], "success_interval": [last[k] for k in interval],
        "success_at_end": last["eval/success_at_end"], "steps_to_success": last[steps],
        "demo_steps_to_success": float((run.demos.steps + run.demos.idle).mean()), "sft_success_once": first[once],
        "sft_success_interval": [first[k] for k in interval], "sft_steps_to_success": first[steps],
        "success_per_selection": {k: e[once] for k, e in ends.items()}, "selected_update": run.best["update"],
        "spawn": run.args.spawn, "eval_spawn": run.args.eval_spawn, "seconds_per_stage": run.seconds,
        "seconds": sum(run.seconds.values()), "evaluations": run.evals, "demonstrations": run.demos.source,
        "env_id": run.args.env_id, "seed": run.args.seed,
    }  # fmt: skip


def begin(args: Args) -> Run:
    """A run in a new folder, or one resumed from its last checkpoint."""
    resumed = args.resume or args.eval_only
    if resumed:
        args = stored_args(args, "eval_episodes eval_spawn select")
    validate(args)
    torch.set_num_threads(args.torch_threads or 1)
    started = time.time()
    demos = load_demos(args)
    name = f"{args.env_id}-co_rft_chunked-{args.obs_mode}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(resumed) if resumed else Path(args.runs) / (args.run_name or name)
    if not resumed and (folder / "config.json").exists():
        raise UserError(f"{folder} exists: choose another --run-name, or go on with it by --resume {folder}")
    run = Run(args, folder, demos)
    if not resumed:
        make_env(args, 1).close()  # fails here or not at all
        folder.mkdir(parents=True, exist_ok=True)
        config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "demonstrations": demos.source}
        write_json(
            folder / "config.json", config | {"weights": args.sft_checkpoint or run.agent.weights} | provenance()
        )
    if resumed:
        run.load()
    run.seconds.setdefault("demonstrations", time.time() - started)
    return run


def main(args: Args) -> Path:
    """Run or resume both stages; returns the run's folder."""
    # INFRASTRUCTURE: flags, folder, demonstrations, networks
    run = begin(args)
    args, count, folder = run.args, run.count, run.folder
    if args.eval_only:
        env, act = run.envs[args.eval_spawn], partial(run.agent.act, select=args.select)
        metrics = evaluate(env, run.agent, args, act, args.eval_episodes)
        print(json.dumps(metrics, indent=2))
        return folder
    logger = Logger(folder, args, count["update_step"])

    # ALGORITHM: stage 1
    if run.enter("sft"):
        train_sft(run, logger)
        run.evaluate(logger, "last")
    # ALGORITHM: stage 2
    if run.enter("offline"):
        train_offline(run, logger)
        run.evaluate(logger, "last")
        if run.best["update"]:
            run.evaluate(logger, "td-error")

    # INFRASTRUCTURE: results
    run.clock()
    count["stage"] = "done"
    run.save()
    logger.close()
    write_json(folder / "summary.json", (summary := summarise(run)) | provenance())
    if args.video_episodes:
        placed, act = dataclasses.replace(args, spawn=args.eval_spawn), partial(run.agent.act, select=args.select)
        film(run.agent, placed, act, folder / "videos")
    for env in run.envs.values():
        env.close()
    print(f"done: success {summary['success_once']:.2f}, results in {folder}")
    return folder


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the chosen preset."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.preset == "paper":
        args = tyro.cli(Args, args=argv, description=__doc__, default=dataclasses.replace(Args(), **PAPER))
    return args


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
