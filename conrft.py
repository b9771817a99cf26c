"""ConRFT: reinforced fine-tuning of a vision-language-action policy by a consistency head (arXiv:2502.05450).

A policy is cloned from demonstrations (stage 0; the paper starts from a released VLA). Offline, Cal-ConRFT trains a
consistency head and a critic on the demonstrations; online, HIL-ConRFT goes on with a plain critic, while an operator
may take over. The Octo backbone is trained in stage 0 only; afterwards an observation is embedded once.

Losses (the paper's symbols)                                                       where
  stage I critic    TD + alpha * (LSE over max(Q(s, a), V_mu(s)) - Q(data))        td_target, calql_loss
  stage I actor     beta * BC + eta * Q loss (Eq. 3)                               consistency_loss, q_loss, update_actor
  stage II critic   plain TD on demonstrations and replay, half and half (Eq. 4)   td_target, update_critic
  stage II actor    the same as stage I, with other weights                        update_actor
  intervention      the operator's action in the place of the policy's, kept in both buffers    WatchedEnv, Run.collect

Commands
  python conrft.py --env-id PickCube-v1 --obs-mode state                          # no operator (FORCE's baseline)
  python conrft.py --env-id PickCube-v1 --obs-mode state --intervention oracle    # the motion planner helps
  python conrft.py --env-id PickCube-v1 --intervention gamepad --record-demos pick.h5
  python conrft.py --sft-checkpoint runs/NAME                                     # start from a run of bc.py
  python conrft.py --obs-mode state --online-steps 0 --fresh-head --bc-weight-offline 0 --q-weight-offline 1  # Cal-QL alone
  python conrft.py --resume runs/NAME | --eval-only runs/NAME

Where the default differs from the paper (--preset paper: without 1-2; --preset code: the official code's other choices)
  1 position control, chunks of 4 actions with chunked TD, reward 0/1, four critics, more demonstrations (300; paper: 20
    to 30), and smaller budgets (PAPER)
  2 the head of stage 0 is kept (--fresh-head: stage I starts with a new one, as with a released VLA)
  3 the critic reads the frozen backbone's embedding and proprio (--critic-encoder cnn or resnet: the table camera)
  4 truncated episodes bootstrap, and TD targets stay within possible returns (--truncation terminal: as in the code)
  5 BC is the code's weighted squared error, in units of the actions' spread; the paper writes a plain distance
  6 actor and learner take turns, an episode and --utd-ratio updates per step of it; the paper runs them side by side
  7 proprio has no velocities, and is noisy in updates beside a camera (--proprio-noise)
  8 actions stay within 1.5 times the demonstrations' largest (--action-range), random ones of the conservative term too
The code against the paper (--preset code): alpha 0.1 against 0.02 (0.01 with half a TD error), no Q loss offline, BC
weight 0.1 against 0.5 online, random actions bounded by the return too, time limits terminal. In neither of them, and
off: --q-scale mean-abs, --onestep-mse, --bc-demo-only, --cql-weight-online.
Measured: docs/conrft.md (CPU)
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import gc
import hashlib
import importlib
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

from backbones.consistency import SIGMA_DATA, ConsistencyActor, karras_sigmas
from backbones.octo import OctoError
from backbones.octo_policy import OctoPolicy


# === Arguments =======================================================================================================
@dataclass
class Args:
    # --- experiment ---
    env_id: str = "StackCube-v1"  # ManiSkill task
    seed: int = 1  # seed of networks, batches, exploration and training episodes
    preset: Literal["default", "paper", "code"] = "default"  # the paper's or the official code's choices; flags win
    runs: str = "runs"  # folder for runs
    run_name: str | None = None  # name of the run's folder; default: task, observation mode, seed and time
    resume: str | None = None  # run folder to go on with; all other flags are taken from its config.json
    eval_only: str | None = None  # run folder to evaluate, without training; takes --eval-episodes too
    track: bool = False  # log to Weights & Biases too (works offline)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto", "cpu" or "cuda"
    torch_threads: int = 0  # CPU threads; 0: one, but OMP_NUM_THREADS or all cores (up to 8) for stage 0 with a camera

    # --- environment ---
    obs_mode: Literal["rgb", "state"] = "rgb"  # camera + proprio, or privileged state (fast)
    control_mode: str = "pd_ee_delta_pos"  # ManiSkill controller; the paper uses pd_ee_delta_pose
    control_freq: int = 10  # control steps per second (ManiSkill's default is 20, the paper's robot runs at 10)
    max_episode_steps: int | None = None  # time limit in control steps; default: per task, see TASKS
    robot_uids: str = "panda"  # robot model
    cameras: Literal["primary", "both"] | None = None  # looks at the table; on panda's hand too (default in rgb)
    image_size: int | None = None  # pixels a side (hand: half of it, from 64 on); default: 64, released weights: 256
    reward: Literal["binary", "conrft"] = "binary"  # 1 or 0 a step; ConRFT: +10 or -0.05
    sim_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"  # physx_cuda: all in one GPU batch
    num_envs: int | None = None  # environments side by side (physx_cpu: a process each); default: 2 for rgb, else 1

    # --- demonstrations ---
    demo_path: str | None = None  # ManiSkill .h5 (with its .json); default: made by its planner
    num_demos: int = 300  # demonstrations to make or to use
    skip_idle: float = 0.0  # leave out their first steps in which the arm moves less (actions reach 1); 0: none
    demo_dir: str = "demos"  # cache for demonstrations

    # --- model ---
    backbone: Literal["octo-compact", "octo-small", "octo-base"] = "octo-compact"  # size of the Octo backbone
    checkpoint: str | None = None  # released Octo weights to start from: a folder, or hf://owner/name[@revision]
    hidden_dim: int = 256  # width of actor and critic
    num_layers: int = 2  # hidden layers of actor and critic
    num_critics: int = 4  # critics in the ensemble; TD targets take the minimum of two random ones
    noise_levels: int = 8  # noise levels drawn per sample in the policy's loss
    chunk_len: int = 4  # H: actions per decision, executed open loop (1 = the paper's)
    action_range: float = 1.5  # the policy's action box as a multiple of the largest demonstrated action, per dimension
    critic_encoder: Literal["embedding", "cnn", "resnet"] = "embedding"  # what the critic sees: embedding or images
    critic_weights: str | None = None  # ResNet-18 weights (.safetensors) for --critic-encoder resnet, kept frozen

    # --- stage 0: supervised fine-tuning ---
    sft_checkpoint: str | None = None  # run folder of bc.py (consistency head) to start from in the place of stage 0
    sft_updates: int = 6000  # updates of backbone and head
    sft_lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    sft_batch_size: int = 64  # transitions per batch
    proprio_noise: float | None = None  # noise on proprio in every update; default: 0.1 std with a camera, else 0
    fresh_head: bool = False  # stage I starts with a new head on the backbone of stage 0

    # --- stages I (offline) and II (online) ---
    gamma: float = 0.98  # discount per control step
    reinforce_lr: float = 3e-4  # learning rate of actor and critic after stage 0 (Adam, constant)
    batch_size: int = 128  # transitions per batch; stage II: half demonstrations, half replay
    tau: float = 0.01  # Polyak step of the target critics
    critic_updates: int = 2  # critic updates per actor update
    offline_updates: int = 300  # stage I: actor updates
    online_steps: int = 10_000  # stage II: control steps, summed over environments
    utd_ratio: float = 0.5  # stage II: actor updates per control step
    truncation: Literal["bootstrap", "terminal"] = "bootstrap"  # what a time limit means for targets and returns
    cql_weight: float = 0.02  # alpha: weight of the conservative term in stage I
    cql_weight_online: float = 0.0  # the same in stage II (in neither paper nor code)
    cql_samples: int = 2  # sampled actions of each kind in the conservative term (random, pi(s), pi(s'))
    bound_random: bool = False  # bound the random actions by the Monte-Carlo return too (the code's)
    bc_weight_offline: float = 1.0  # beta: weight of BC in stage I (0: Cal-QL alone)
    bc_weight_online: float = 0.5  # the same in stage II
    q_weight_offline: float = 0.1  # eta: weight of the Q loss in stage I
    q_weight_online: float = 1.0  # the same in stage II
    q_scale: Literal["raw", "mean-abs"] = "raw"  # mean-abs divides the Q loss by the batch mean of |Q| (not in ConRFT)
    onestep_mse: float = 0.0  # weight of the squared error of one-step samples within BC (in neither paper nor code)
    bc_demo_only: bool = False  # stage II: BC on the demonstrations' half of the batch only (in neither paper nor code)

    # --- human in the loop ---
    intervention: Literal["none", "oracle", "keyboard", "gamepad", "spacemouse"] = "none"  # who may take over
    patience: int = 15  # oracle: takes over if nothing has moved by more than --progress for so many steps
    progress: float = 0.02  # oracle: metres
    takeover_after: int | None = None  # oracle: takes over after so many steps; default: the slowest demonstration's
    takeover_steps: int = 0  # oracle: steps until the policy has another try (0 = to the end of the episode)
    device_speed: float = 0.3  # full deflection of a device, as a share of the controller's box
    record_demos: str | None = None  # write successful episodes with interventions to this .h5, for --demo-path

    # --- evaluation and logging ---
    eval_episodes: int = 100  # episodes of an evaluation
    eval_freq: int = 2000  # control steps between evaluations in stage II
    video_episodes: int = 4  # episodes filmed after training (0 = none)
    log_freq: int = 100  # updates between logged rows
    checkpoint_freq: int = 1000  # updates between checkpoints (also written at the end of each stage and evaluation)


PAPER = dict(
    control_mode="pd_ee_delta_pose", reward="conrft", tau=0.005, batch_size=256, chunk_len=1, num_critics=2,
    noise_levels=1, cql_samples=10, offline_updates=20_000, utd_ratio=1.0, num_demos=30, fresh_head=True,
)  # fmt: skip
CODE = PAPER | dict(
    cql_weight=0.1, bound_random=True, q_weight_offline=0.0, bc_weight_online=0.1, truncation="terminal",
)  # fmt: skip
DEVICES = {"keyboard": ("pygame",), "gamepad": ("pygame",), "spacemouse": ("pygame", "pyspacemouse")}

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """control_freq num_envs num_demos noise_levels hidden_dim num_layers num_critics
        chunk_len sft_batch_size critic_updates cql_samples patience eval_episodes eval_freq
        log_freq checkpoint_freq"""),
    "at least 2": (lambda x: x >= 2, "batch_size"),
    "positive": (lambda x: x > 0, "sft_lr reinforce_lr action_range"),
    "within [0, 1]": (lambda x: 0 <= x <= 1, "tau device_speed"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma skip_idle"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
    "in 0..899 (training and evaluation episodes stay apart)": (lambda x: 0 <= x < 900, "seed"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    hil, who = args.intervention != "none", f"--intervention {args.intervention}"
    args.num_envs = 1 if hil and args.num_envs is None else args.num_envs
    check_flags(args, LIMITS)
    check_octo(args)
    if args.intervention == "oracle":
        from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

        if args.env_id not in MP_SOLUTIONS:
            raise UserError(f"{who}: ManiSkill has no motion planner for {args.env_id}")
    if hil and (args.num_envs > 1 or args.sim_backend != "physx_cpu" or "ee_delta" not in args.control_mode):
        raise UserError(f"{who} needs --num-envs 1, --sim-backend physx_cpu and a pd_ee_delta controller")
    if args.record_demos and (not hil or Path(args.record_demos).suffix != ".h5"):
        raise UserError(f"--record-demos {args.record_demos} must end with .h5, and needs an --intervention to record")
    if args.record_demos and Path(args.record_demos).exists() and not (args.resume or args.eval_only):
        raise UserError(f"--record-demos {args.record_demos} exists: choose another name, or move it away")
    if args.critic_encoder != "embedding" and args.obs_mode != "rgb":
        raise UserError(f"--critic-encoder {args.critic_encoder} needs --obs-mode rgb")
    if (args.critic_encoder == "resnet") != bool(args.critic_weights):
        raise UserError("--critic-encoder resnet and --critic-weights FILE.safetensors (ResNet-18) go together")
    devices = () if args.eval_only else DEVICES.get(args.intervention, ())
    for module in (*devices, *["torchvision"] * bool(args.critic_weights)):
        optional(module)
    if args.sft_checkpoint:
        args.sft_updates = 0
        if not (args.resume or args.eval_only):
            check_origin(args, Path(args.sft_checkpoint), head="consistency")


def optional(module: str):
    """Import a package that only some flags need. Raises: UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library behind the package may be missing, too
        package = {"pygame": "pygame-ce", "pyspacemouse": "'pyspacemouse>=2.1'"}.get(module, module)
        raise UserError(f"these flags need {module}: pip install {package} ({error})") from error


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


# === Human in the loop ===============================================================================================
class WatchedEnv:
    """The training environment with an operator who may take over; keeps what `rollout` doesn't.

    `taken` [T] says where the operator acted and `own` [T, A] is what was executed there, `images` [T+1] of [N, H, H, 3].
    """

    def __init__(self, env, operator):
        self.env, self.operator = env, operator

    def reset(self, seed, options):
        obs, info = self.env.reset(seed=seed, options=options)
        if self.operator:
            self.operator.start(seed[0])
        self.taken, self.own, self.images = [], [], [obs.get("primary")]
        return obs, info

    def step(self, action):
        own = self.operator(len(self.taken), action[0]) if self.operator else None
        self.taken.append(own is not None)
        self.own.append(action[0] if own is None else own)
        obs, *rest = self.env.step(action if own is None else own[None])
        self.images.append(obs.get("primary"))
        return obs, *rest


def bare_env(args: Args, control_mode: str) -> gym.Env:
    """The task without observations, for plans and recordings."""
    return gym.make(
        args.env_id, obs_mode="none", control_mode=control_mode, robot_uids=args.robot_uids, reward_mode="sparse",
        sim_backend="physx_cpu", render_backend="cpu", sim_config=dict(control_freq=args.control_freq),
        reconfiguration_freq=1, max_episode_steps=1_000_000,
    )  # fmt: skip


class Solved(Exception):
    """The planner has reached the goal."""


class Oracle(gym.Wrapper):
    """An operator without a person: ManiSkill's motion planner solves the task from the present state.

    It takes over where a person would, without a look at the reward: when nothing moves (`stalled`), or when the
    episode takes longer than the demonstrations. The plan is made in a simulator of its own (this wrapper's), whose
    state becomes that of the training environment each time the solution asks for a reset. It is joint targets; the
    hand poses that they aim at are then followed in closed loop through the training environment's controller.
    """

    def __init__(self, env, args: Args, clip, slowest: int):
        from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

        super().__init__(bare_env(args, "pd_joint_pos"))
        self.real, self.args, self.clip, self.solve = env, args, clip, MP_SOLUTIONS[args.env_id]
        self.latest = slowest if args.takeover_after is None else args.takeover_after

    def start(self, seed: int) -> None:
        self.seed, self.path, self.begin, self.past, self.failed, self.limit = seed, None, None, [], 0, self.latest

    def __call__(self, t: int, action: np.ndarray) -> np.ndarray | None:
        """The operator's action at step t, or None to let the policy act."""
        real, args = self.real.envs[0].unwrapped, self.args
        state = real.get_state_dict()
        places = [real.agent.tcp.pose.p[0], *(x[0, :3] for x in state["actors"].values())]
        self.past.append(torch.stack(places).numpy())
        if self.path and self.at > len(self.path) + 10:  # done, and the task isn't: plan again
            self.path = None
        if self.path is None and not self.failed:
            if self.begin is None and t < self.limit and not stalled(np.stack(self.past), args.patience, args.progress):
                return None
            self.path, self.at, self.begin = self.plan(state), 0, t if self.begin is None else self.begin
            self.failed += self.path is None
        if self.path is None:
            return None
        target, gripper = self.path[min(self.at, len(self.path) - 1)]
        wanted = self.towards(real.agent.controller.controllers["arm"], target, gripper)
        action = self.clip(wanted)
        self.at += np.abs(action - wanted).max() < 0.01  # waits for a hand that is behind
        if t + 1 - self.begin == args.takeover_steps:
            self.path, self.begin, self.past, self.limit = None, None, [], max(self.limit, t + args.patience)
        return action

    @staticmethod
    def towards(arm, target, gripper: float) -> np.ndarray:
        """The controller's action [A] from the present hand pose to `target`."""
        import sapien
        from mani_skill.trajectory.utils.actions.conversion import delta_pose_to_pd_ee_delta

        hand, positions = arm.ee_link.pose.sp, arm.config.frame == "root_translation"
        delta = sapien.Pose(target.p - hand.p, (hand * target.inv()).q)  # ManiSkill's convention for delta rotations
        return np.append(delta_pose_to_pd_ee_delta(arm, delta, positions), gripper).astype(np.float32)

    def plan(self, state: dict) -> list | None:
        """Hand poses and gripper commands that solve the task from `state`, or None.

        ManiSkill's solutions begin by opening the hand, whatever it holds. What it holds now it keeps until the solution
        has closed it, and then goes straight to where a stretch of one gripper command ends, the last one that will do.
        """
        self.state, agent = state, self.real.envs[0].unwrapped.agent
        held = any(bool(agent.is_grasping(actor)) for actor in agent.scene.actors.values())
        for self.held in [True, False] if held else [False]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the planner reports each path it doesn't find
                    self.solve(self, seed=self.seed, debug=False, vis=False)
                    self.settle()
            except Solved:
                return self.shortest(self.aims, np.stack(self.moves)) if self.held else self.aims
            except Exception:  # the solutions raise all sorts where no plan exists
                continue
        return None

    def shortest(self, plan: list, moves: np.ndarray) -> list:
        """`plan`, or without its beginning; moves [T, A] are its joint targets and gripper commands."""
        speed = np.abs(np.diff(moves[:, :-1], axis=0)).max(initial=0.02)  # rad per step, the plan's own
        for end in [len(moves) - 1, *np.flatnonzero(np.diff(moves[:, -1]))[::-1]]:
            self.reset(seed=self.seed)
            joints = self.unwrapped.agent.robot.get_qpos()[0].numpy()[: moves.shape[1] - 1]
            n = int(np.abs(moves[end, :-1] - joints).max() / speed) + 1
            line = np.linspace(joints, moves[end, :-1], n + 1)[1:]
            try:
                for move in [*np.column_stack([line, [moves[end, -1]] * n]), *moves[end + 1 :]]:
                    self.step(move)
                self.settle()
            except Solved:
                return self.aims
        return plan

    def settle(self) -> None:
        """Things may have to come to rest."""
        for _ in range(10):
            self.step(self.moves[-1])

    def reset(self, *, seed=None, options=None):
        result, here = self.env.reset(seed=seed), self.unwrapped
        here.set_state_dict(self.state)
        here.agent.controller.reset()
        self.aims, self.moves, self.model = [], [], here.agent.robot.create_pinocchio_model()
        self.keep = self.held
        return result

    def step(self, action):
        self.keep &= action[-1] > 0  # until the solution closes the hand itself
        action = np.append(action[:-1], -1) if self.keep else action
        robot, result = self.unwrapped.agent.robot, self.env.step(action)
        joints = robot.get_qpos()[0].numpy().copy()
        joints[: len(action) - 1] = action[:-1]
        self.model.compute_forward_kinematics(joints)
        self.moves.append(action)
        self.aims.append((robot.pose.sp * self.model.get_link_pose(self.unwrapped.agent.tcp.index), action[-1]))
        if result[4]["success"].item():
            raise Solved
        return result


def stalled(past: np.ndarray, patience: int, distance: float) -> bool:
    """Whether no place in past [T, places, 3] is farther than `distance` from where it was `patience` steps ago."""
    return len(past) > patience and np.linalg.norm(past[-1] - past[-1 - patience], axis=-1).max() < distance


class Device:
    """A person with a keyboard, gamepad or SpaceMouse, who sees the camera in a window. Mapping: docs/conrft.md.

    The person acts as long as something is deflected or the hold button is down. The gripper begins as the policy has
    it and is toggled by a button.
    """

    KEYS = dict(w=(0, 1), s=(0, -1), a=(1, 1), d=(1, -1), r=(2, 1), f=(2, -1))  # key: axis and sign

    def __init__(self, env, args: Args, clip):
        self.kind, self.env, self.args, self.clip, self.pg = args.intervention, env, args, clip, optional("pygame")
        self.pg.init()
        self.window, self.clock = self.pg.display.set_mode((512, 512)), self.pg.time.Clock()
        if self.kind == "gamepad":
            if not self.pg.joystick.get_count():
                raise UserError("--intervention gamepad: no gamepad found")
            self.stick = self.pg.joystick.Joystick(0)
        if self.kind == "spacemouse":
            try:
                self.mouse = optional("pyspacemouse").open(axis_convention="ros")  # x forward, y left, z up
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"--intervention spacemouse: {error} (on Linux it needs a udev rule)") from error

    def start(self, seed: int) -> None:
        self.gripper, self.down, self.failed = None, False, 0
        self.pg.event.clear([self.pg.KEYDOWN, self.pg.JOYBUTTONDOWN])  # of before: updates and evaluations take minutes

    def read(self) -> tuple[np.ndarray, bool, bool]:
        """Motion [3] in [-1, 1] (forward, left, up as the robot sees it), gripper toggled, hold button down."""
        pg, toggled = self.pg, False
        for event in pg.event.get():
            if event.type == pg.QUIT:
                raise KeyboardInterrupt("window closed")
            toggled |= self.kind == "keyboard" and event.type == pg.KEYDOWN and event.key == pg.K_SPACE
            toggled |= self.kind == "gamepad" and event.type == pg.JOYBUTTONDOWN and event.button == 0
        if self.kind == "keyboard":
            pressed, motion = pg.key.get_pressed(), np.zeros(3)
            for key, (axis, sign) in self.KEYS.items():
                motion[axis] += sign * bool(pressed[getattr(pg, f"K_{key}")])
            return motion, toggled, bool(pressed[pg.K_LSHIFT])
        if self.kind == "gamepad":
            axes, hold = [-self.stick.get_axis(i) for i in (1, 0, 4)], self.stick.get_button(5)
        else:
            seen = -1.0
            while (state := self.mouse.read()).t > seen:  # a report at a time; the last one counts
                seen = state.t
            axes, hold = [state.x, state.y, state.z], state.buttons[1]
            toggled, self.down = bool(state.buttons[0]) and not self.down, bool(state.buttons[0])
        motion = np.array(axes, float)
        return np.where(np.abs(motion) < 0.1, 0.0, motion), toggled, bool(hold)

    def __call__(self, t: int, action: np.ndarray) -> np.ndarray | None:
        """The person's action at step t, or None to let the policy act. Keeps to the robot's pace."""
        frame = self.pg.surfarray.make_surface(self.env.call("render")[0].swapaxes(0, 1))
        self.window.blit(self.pg.transform.scale(frame, (512, 512)), (0, 0))
        self.pg.display.flip()
        self.clock.tick(self.args.control_freq)
        motion, toggled, hold = self.read()
        if not (motion.any() or toggled or hold):
            self.gripper = None
            return None
        self.gripper = np.where(action[-1] >= 0, 1.0, -1.0) if self.gripper is None else self.gripper
        self.gripper = -self.gripper if toggled else self.gripper
        own = np.zeros_like(action)
        own[:3], own[-1] = self.args.device_speed * motion, self.gripper
        return self.clip(own)


def record(args: Args, episodes: list[tuple[int, Tensor]]) -> None:
    """Write episodes (seed, actions [T, A]) to --record-demos as ManiSkill does, by doing them once more."""
    from mani_skill.utils.wrappers.record import RecordEpisode

    path, env = Path(args.record_demos), bare_env(args, args.control_mode)
    env = RecordEpisode(env, str(path.parent), trajectory_name=path.stem, save_video=False, save_on_reset=False)
    for seed, actions in episodes:
        env.reset(seed=seed)
        success = [env.step(action)[4]["success"].item() for action in actions.numpy()]
        env.flush_trajectory(save=any(success))
    env.close()


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


# === Replay ==========================================================================================================
# --- shared: replay ---
@dataclass
class Batch:
    """Transitions between decisions. B samples, F features, H-step chunks of A-dimensional actions."""

    feature: Tensor  # [B, F] embedding and normalised proprio at t
    chunk: Tensor  # [B, H*A] actions t..t+H-1, normalised to [-1, 1], time-major
    reward: Tensor  # [B] sum over i < n of gamma^i * r_{t+i};  n = H, or fewer where the episode ends
    bootstrap: Tensor  # [B] gamma^n, or 0 if the episode terminated at t + n (not: was truncated)
    next_feature: Tensor  # [B, F] at t + n
    mc_return: Tensor  # [B] discounted return from t on
    success: Tensor  # [B] 1 if the whole trajectory succeeded

    def cat(self, other: Batch) -> Batch:
        return Batch(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in dataclasses.fields(self)))


def mc_returns(reward: np.ndarray, terminated: bool, gamma: float, reward_failure: float) -> np.ndarray:
    """Monte-Carlo returns-to-go, with the lower bound r_fail / (1 - gamma) standing for what follows a truncation.

    Shapes: reward [T] -> [T]. Source: Cal-QL's rule for sparse rewards, extended to every truncation.
    """
    value, out = (0.0 if terminated else reward_failure / (1 - gamma)), np.empty_like(reward)
    for t in reversed(range(len(reward))):
        value = out[t] = reward[t] + gamma * value
    return out


class ReplayBuffer:
    """Whole episodes, one row per observation; chunked transitions are put together when they are drawn."""

    def __init__(self, feature_dim: int, action_dim: int, chunk_len: int, gamma: float):
        self.chunk_len, self.gamma, self.rows = chunk_len, gamma, 0
        shapes = dict(feature=(feature_dim,), action=(action_dim,), reward=(), bootstrap=(), mc_return=(), success=())
        self.data = {k: torch.empty(0, *shape) for k, shape in shapes.items()}
        self.data |= {k: torch.empty(0, dtype=torch.long) for k in ("next", "last")}
        self.starts = torch.empty(0, dtype=torch.long)  # rows from which a chunk may be drawn

    def add(self, feature: Tensor, action: np.ndarray, reward: np.ndarray, terminated: bool, success: bool,
            reward_failure: float, hold: np.ndarray, stay: int = 0) -> None:  # fmt: skip
        """Append one episode of T steps. Chunks that a time limit cuts short are left out.

        Of what was recorded past the success the first `stay` steps are episodes of their own: of one step, successful.

        Shapes: feature [L+1, F], action [L, A] normalised, L >= T (actions recorded past the end of the episode fill
        up its last chunks), reward [T], hold [A] the action that keeps still and fills up after those.
        """
        T, L, H, g = len(reward), len(action), self.chunk_len, self.gamma
        steps = np.minimum(H, T - np.arange(T))  # n of each row
        padded = np.concatenate([reward, np.zeros(H - 1, np.float32)])
        chunk_reward = np.lib.stride_tricks.sliding_window_view(padded, H) @ (g ** np.arange(H)).astype(np.float32)
        ends = terminated & (np.arange(T) + steps == T)
        row, fill = np.arange(L + 1) + self.rows, np.zeros(L + 1 - T, np.float32)
        again = np.append(np.full(stay, reward[-1]), fill[stay:])
        new = dict(
            feature=feature, action=np.concatenate([action, hold[None]]), reward=np.append(chunk_reward, again),
            bootstrap=np.append(np.where(ends, 0.0, g**steps), fill), success=np.full(L + 1, success),
            mc_return=np.append(mc_returns(reward, terminated, g, reward_failure), again),
            next=np.append(row[:T] + steps, row[T:]), last=np.full(L + 1, row[-1]),
        )  # fmt: skip
        starts = row[: T + stay] if terminated else row[: max(T - H + 1, 0)]
        end = self.rows + L + 1
        if end > len(self.data["reward"]):  # grow by doubling
            size = max(end, 2 * len(self.data["reward"]), 1024)
            self.data = {k: torch.cat([v, v.new_zeros(size - len(v), *v.shape[1:])]) for k, v in self.data.items()}
        for key, value in new.items():
            self.data[key][self.rows : end] = torch.as_tensor(value)
        self.starts, self.rows = torch.cat([self.starts, torch.as_tensor(starts)]), end

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows of `size` decisions, uniform with replacement: [size] int64."""
        return self.starts[torch.randint(len(self.starts), (size,), generator=generator)]

    def gather(self, t: Tensor, device: str = "cpu") -> Batch:
        """The transitions that start at rows t [B]."""
        d = self.data
        steps = torch.minimum(t[:, None] + torch.arange(self.chunk_len), d["last"][t][:, None])  # [B, H]
        same = {k: d[k][t] for k in ("feature", "reward", "bootstrap", "mc_return", "success")}
        batch = same | {"chunk": d["action"][steps].flatten(1), "next_feature": d["feature"][d["next"][t]]}
        return Batch(**{k: x.to(device) for k, x in batch.items()})

    def state_dict(self) -> dict[str, Tensor]:
        return {k: v[: self.rows].clone() for k, v in self.data.items()} | {"starts": self.starts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.starts, self.data = state["starts"], {k: state[k] for k in self.data}
        self.rows = len(self.data["reward"])


# --- end shared ---


class ImageReplay(ReplayBuffer):
    """A replay buffer that also keeps the camera's images, for a critic with an encoder of its own."""

    def add(self, *episode, images: np.ndarray | None = None) -> None:
        """As ReplayBuffer.add; images [L+1, H, H, 3] uint8."""
        if images is not None and "image" not in self.data:
            self.data["image"] = torch.empty(len(self.data["reward"]), *images.shape[1:], dtype=torch.uint8)
        start = self.rows
        super().add(*episode)
        if images is not None:
            self.data["image"][start : self.rows] = torch.as_tensor(images)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.data |= {k: v for k, v in state.items() if k == "image"}
        super().load_state_dict(state)


# === Networks ========================================================================================================
# --- shared: ensemble critic ---
class EnsembleCritic(nn.Module):
    """E critics Q(s, chunk) as one batched network; states are projected once, whatever the number of chunks."""

    def __init__(self, num_critics: int, feature_dim: int, unit: Tensor, hidden: int, layers: int):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [D], as the actor's

        def weight(fan_in: int, out: int) -> nn.Parameter:
            bound = math.sqrt(6 / (fan_in + out))  # Xavier
            return nn.Parameter(torch.empty(num_critics, fan_in, out).uniform_(-bound, bound))

        joint = weight(feature_dim + len(unit), hidden).data
        self.feature_in = nn.Parameter(joint[:, :feature_dim].clone())
        self.chunk_in = nn.Parameter(joint[:, feature_dim:].clone())
        self.hidden = nn.ParameterList([weight(hidden, hidden) for _ in range(layers - 1)] + [weight(hidden, 1)])
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(num_critics, 1, n)) for n in [hidden] * layers + [1])
        self.gain = nn.ParameterList(nn.Parameter(torch.ones(num_critics, 1, hidden)) for _ in range(layers))
        self.shift = nn.ParameterList(nn.Parameter(torch.zeros(num_critics, 1, hidden)) for _ in range(layers))

    def forward(self, feature: Tensor, chunk: Tensor) -> Tensor:
        """Shapes: feature [B, F], chunk [B, D] or [B, N, D] in [-1, 1] -> Q [E, B] or [E, B, N]."""
        B, N = len(feature), 1 if chunk.dim() == 2 else chunk.shape[1]
        h = ((chunk / self.unit).reshape(B * N, -1) @ self.chunk_in).unflatten(1, (B, N))
        h = h + (feature @ self.feature_in + self.bias[0])[:, :, None]  # [E, B, N, hidden]
        h = h.flatten(1, 2)  # [E, B*N, hidden]
        for layer, (weight, bias) in enumerate(zip(self.hidden, list(self.bias)[1:])):
            h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
            h = torch.tanh(torch.addcmul(self.shift[layer], h, self.gain[layer]))
            h = torch.baddbmm(bias, h, weight)
        return h.view(-1, B) if chunk.dim() == 2 else h.view(-1, B, N)


# --- end shared ---


class ImageEncoder(nn.Module):
    """A code of 256 numbers per image: convolutions (cnn) or frozen ResNet maps, learned spatial weights, bottleneck.

    Source: ConRFT's critic encoder (learned spatial embeddings, Linear, LayerNorm, tanh); the small CNN is ours.
    """

    def __init__(self, channels: int, side: int, convolutions: bool):
        super().__init__()
        layers = []
        if convolutions:
            for out in (32, 64, 64):
                layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
                channels, side = out, (side + 1) // 2
        self.layers, self.spatial = nn.Sequential(*layers), nn.Parameter(torch.randn(channels, side**2, 8) / side)
        self.code = nn.Sequential(nn.Linear(8 * channels, 256), nn.LayerNorm(256, eps=1e-6), nn.Tanh())

    def forward(self, maps: Tensor) -> Tensor:
        """Shapes: [B, C, side, side] -> [B, 256]."""
        return self.code(torch.einsum("bcp,cpk->bck", self.layers(maps).flatten(2), self.spatial).flatten(1))


class Critic(EnsembleCritic):
    """The ensemble on the backbone's embedding, or on its own view of the image; proprio in both cases."""

    def __init__(self, args: Args, feature_dim: int, proprio_dim: int, unit: Tensor):
        encoder, width = None, feature_dim
        if args.critic_encoder != "embedding":
            small, width = args.critic_encoder == "cnn", 256 + proprio_dim
            channels, side = (3, args.image_size) if small else (512, -(-args.image_size // 32))
            encoder = ImageEncoder(channels, side, small)
        super().__init__(args.num_critics, width, unit, args.hidden_dim, args.num_layers)
        self.encoder, self.proprio_dim = encoder, proprio_dim

    def state(self, feature: Tensor, maps: Tensor | None) -> Tensor:
        """What Q is a function of, beside the chunk: [B, F] and [B, C, h, h] -> [B, F or 256 + P]."""
        if self.encoder is None:
            return feature
        return torch.cat([self.encoder(maps), feature[:, -self.proprio_dim :]], -1)


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
    """Everything that is learned, and the frozen ResNet."""

    def __init__(self, args: Args, demos: Demos):
        super().__init__(args, demos)
        self.actor = ConsistencyActor(self.feature_dim, self.chunk_unit, args.hidden_dim, args.num_layers)
        sizes = (args, self.feature_dim, self.proprio_dim, self.chunk_unit)
        self.critic, self.target_critic = Critic(*sizes), Critic(*sizes).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.trunk = None
        if args.critic_encoder == "resnet":
            net = optional("torchvision").models.resnet18()
            try:
                if not (args.resume or args.eval_only):  # else the checkpoint has them
                    net.load_state_dict(load_file(args.critic_weights))
            except Exception as error:  # the readers raise all sorts
                raise UserError(
                    f"--critic-weights {args.critic_weights}: no ResNet-18 weights in .safetensors ({error})"
                ) from error
            self.trunk = nn.Sequential(*list(net.children())[:-2]).eval().requires_grad_(False)

    def maps(self, image: Tensor) -> Tensor:
        """What the critic's encoder reads: [B, H, H, 3] uint8 -> the image, or the ResNet's maps, [B, C, h, h]."""
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=image.device)  # ImageNet's
        pixels = ((image / 255 - mean) / std).permute(0, 3, 1, 2)
        return self.trunk(pixels) if self.trunk else pixels

    def act(self, feature: Tensor, generator: torch.Generator) -> np.ndarray:
        """One sample per state: [N, F] -> [N, H, A] normalised."""
        return self.actor.sample(feature, 1, generator)[:, 0].unflatten(1, (self.H, -1)).cpu().numpy()

    def clip(self, action: np.ndarray) -> np.ndarray:
        """Controller units, kept within the policy's box, so that what is stored is what was done."""
        return self.denormalise(self.normalise(action)).astype(np.float32)


# === Losses: pure functions ==========================================================================================
def td_target(batch: Batch, next_q: Tensor, low: float, high: float) -> Tensor:
    """y = sum gamma^i r_i + gamma^n * min_k Q'_k(s', a'), a' ~ pi(.|s'), kept within the returns that exist.

    Shapes: next_q [critics in the minimum, B] -> [B]. Source: B Q of Eq. (4); the bounds are ours.
    """
    return (batch.reward + batch.bootstrap * next_q.min(0).values).clamp(low, high)


def calql_loss(q_data: Tensor, q_random: Tensor, q_policy: Tensor, mc_return: Tensor, bound_random: bool):
    """LSE over sampled actions of max(Q, Monte-Carlo return), minus Q(data): stage I's conservative term.

    Without importance sampling, since a consistency policy has no density; the data action belongs to the LSE, which
    bounds the push on it. The constant log(entries) leaves gradients alone and makes equal values give zero.
    Shapes: q_data [E, B], q_random [E, B, n], q_policy [E, B, m], mc_return [B] -> scalar, and the share of q_policy
    below its bound. Source: Cal-QL in ConRFT's form; the paper bounds the policy's actions, the code all of them.
    """
    bound = mc_return[None, :, None]
    random = torch.maximum(q_random, bound) if bound_random else q_random
    entries = torch.cat([random, torch.maximum(q_policy, bound), q_data[..., None]], -1)
    gap = torch.logsumexp(entries, -1) - math.log(entries.shape[-1]) - q_data  # over actions, never over the batch
    return gap.mean(), (q_policy < bound).float().mean()


# --- shared: consistency loss ---
def consistency_loss(
    actor: ConsistencyActor, feature: Tensor, chunk: Tensor, generator: torch.Generator, n: int = 1
) -> Tensor:
    """The policy's surrogate of -log pi(chunk|s): weighted reconstruction of the chunk from n random noise levels.

    Shapes: feature [B, F], chunk [B, D] in [-1, 1] -> [B].
    Source: ConRFT's L_BC (there n = 1; more share the feature, which is what costs time while the backbone is trained);
    w(sigma) = sigma^-2 + sigma_data^-2 makes it flat in the raw network output.
    """
    sigmas = karras_sigmas()[:-1].to(chunk.device)  # sigma_min itself is the identity
    sigma = sigmas[torch.randint(len(sigmas), (len(chunk), n), generator=generator, device=chunk.device)]  # [B, n]
    clean = (chunk / actor.unit)[:, None]  # [B, 1, D]
    noise = torch.randn((len(chunk), n, chunk.shape[1]), generator=generator, device=chunk.device)
    denoised = actor.denoise(feature, clean + sigma[..., None] * noise, sigma)  # [B, n, D]
    return ((sigma**-2 + SIGMA_DATA**-2) * (denoised - clean).square().mean(-1)).mean(-1)


# --- end shared ---


def q_loss(q: Tensor, scale: str) -> Tensor:
    """- mean Q(s, pi(s)) over critics and batch; "mean-abs": over the mean |Q|. Shapes: q [E, B] -> scalar. Eq. (3)."""
    return -q.mean() / (q.abs().mean().detach() + 1e-6 if scale == "mean-abs" else 1.0)


# === Updates =========================================================================================================
def return_bounds(args: Args) -> tuple[float, float, float, float]:
    """reward of a failing step, reward of success, lowest and highest return."""
    fail, success = (0.0, 1.0) if args.reward == "binary" else (-0.05, 10.0)
    return fail, success, fail / (1 - args.gamma), success


def update_critic(agent: Agent, optimizer, batch: Batch, maps, args: Args, cql_weight: float, generator) -> dict:
    """One step on TD, with the conservative term if it has a weight, and the Polyak step of the targets."""
    B, D = batch.chunk.shape
    n = args.cql_samples if cql_weight else 0
    with torch.no_grad():
        next_chunks = agent.actor.sample(batch.next_feature, max(n, 1), generator)  # [B, n, D], the online actor
        two = torch.randperm(args.num_critics, generator=generator, device=batch.chunk.device)[:2]
        target = agent.target_critic
        next_q = target(target.state(batch.next_feature, maps[1]), next_chunks[:, 0])[two]
        y = td_target(batch, next_q, *return_bounds(args)[2:])
    state = agent.critic.state(batch.feature, maps[0])
    q_data = agent.critic(state, batch.chunk)  # [E, B]
    loss = loss_td = (q_data - y).square().mean()  # Eq. (4)
    logs = {"losses/td": loss_td, "values/q_data": q_data.mean(), "values/td_target": y.mean()}
    logs |= {"values/mc_return": batch.mc_return.mean(), "values/critic_std": q_data.std(0, correction=0).mean()}
    if cql_weight:
        with torch.no_grad():
            random = torch.rand((B, n, D), generator=generator, device=batch.chunk.device) * 2 - 1
            current = agent.actor.sample(batch.feature, n, generator)
        q = agent.critic(state, torch.cat([random, current, next_chunks], 1))  # all evaluated at s
        gap, logs["calib/bound_rate"] = calql_loss(q_data, q[..., :n], q[..., n:], batch.mc_return, args.bound_random)
        logs["losses/calql"], loss = gap, loss + cql_weight * gap
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.critic, agent.target_critic, args.tau)
    return logs | {"losses/critic": loss}


def update_actor(agent: Agent, optimizer, batch: Batch, maps, demo: Tensor, args: Args, online: bool, generator):
    """One step on beta * BC + eta * Q loss, Eq. (3). demo [B] bool: sample comes from the demo buffer."""
    weight_bc = args.bc_weight_online if online else args.bc_weight_offline
    weight_q = args.q_weight_online if online else args.q_weight_offline
    bc = consistency_loss(agent.actor, batch.feature, batch.chunk, generator, args.noise_levels)  # [B]
    logs = {}
    if weight_q or args.onestep_mse:
        sample = agent.actor.sample(batch.feature, 1, generator)[:, 0]  # [B, D]
    if args.onestep_mse:
        error = ((sample - batch.chunk) / agent.actor.unit).square().mean(-1)
        logs["losses/onestep"], bc = error.mean(), bc + args.onestep_mse * error
    loss_bc = bc[demo].mean() if online and args.bc_demo_only else bc.mean()
    loss = weight_bc * loss_bc
    if weight_q:
        agent.critic.requires_grad_(False)
        q = agent.critic(agent.critic.state(batch.feature, maps[0]), sample)  # [E, B]
        agent.critic.requires_grad_(True)
        logs |= {"losses/q": (loss_q := q_loss(q, args.q_scale)), "values/q_policy": q.mean()}
        loss = loss + weight_q * loss_q
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logs | {"losses/bc": loss_bc, "losses/actor": loss}


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
STAGES = ("sft", "offline", "online", "done")


class Run:
    """The state of a run that a checkpoint holds, and the bookkeeping between updates."""

    def __init__(self, args: Args, folder: Path, demos: Demos):
        self.args, self.folder, self.demos, self.mark = args, folder, demos, time.time()
        torch.manual_seed(args.seed)
        self.agent = Agent(args, demos).to(args.device)
        if args.sft_checkpoint and not (args.resume or args.eval_only):
            weights = load_checkpoint(Path(args.sft_checkpoint))[0]  # backbone, actor and units; not the critics
            load_weights(self.agent, self.agent.state_dict() | weights, Path(args.sft_checkpoint))
        sizes = (self.agent.feature_dim, self.agent.action_dim, args.chunk_len, args.gamma)
        self.demo, self.replay = ImageReplay(*sizes), ImageReplay(*sizes)
        devices = {"batch": "cpu", "update": args.device, "rollout": args.device}
        self.generators = {k: torch.Generator(d).manual_seed(args.seed + i) for i, (k, d) in enumerate(devices.items())}
        self.count = {"stage": "sft", "stage_update": 0, "update_step": 0, "global_step": 0, "episodes": 0, "due": 0.0}
        self.count |= {"interventions": 0, "intervention_steps": 0, "planner_failures": 0}
        self.evals: list[dict] = []  # one entry per evaluation: stage, global_step and the metrics
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.recent: list[tuple] = []  # success, length, intervention rate and count of the last training episodes
        self.recorded: list[tuple[int, Tensor]] = []  # seed and actions of episodes for --record-demos
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for start, length, steps in zip(demos.starts(), demos.lengths, demos.steps):  # the same rows as in `demos`
            action = self.agent.normalise(demos.action[start : start + length])
            empty = torch.zeros(length + 1, self.agent.feature_dim)  # embeddings come after stage 0
            images = demos.obs["primary"][start : start + length + 1] if "primary" in demos.obs else None
            self.add_episode(self.demo, Episode(empty, action, np.arange(1, steps + 1) == steps, True), images)
        self.num_demo_rows = self.demo.rows

    @cached_property
    def env(self):
        return make_env(self.args, self.args.num_envs, render=self.args.intervention in DEVICES)

    @cached_property
    def watched(self) -> WatchedEnv:
        """The environment of training episodes, with the operator."""
        args, operator = self.args, None
        if args.intervention == "oracle":
            operator = Oracle(self.env, args, self.agent.clip, int(self.demos.steps.max()))
        elif args.intervention != "none":
            operator = Device(self.env, args, self.agent.clip)
        return WatchedEnv(self.env, operator)

    def add_episode(self, buffer: ImageReplay, episode: Episode, images: np.ndarray | None) -> None:
        fail, success, _, _ = return_bounds(self.args)
        reward = np.where(episode.success, success, fail).astype(np.float32)
        hold, ended = self.agent.hold_action(episode.action[-1]), episode.terminated
        images = None if self.args.critic_encoder == "embedding" else images
        buffer.add(
            episode.feature, episode.action, reward, ended or self.args.truncation == "terminal",
            bool(episode.success.any()), fail, hold, images=images,
        )  # fmt: skip

    def collect(self) -> int:
        """An episode per environment into the replay buffer, intervened steps into the demo buffer too. Returns steps."""
        args, first, watched = self.args, TRAIN_SEED + 1_000_000 * self.args.seed + self.count["episodes"], self.watched
        act = partial(self.agent.act, generator=self.generators["rollout"])
        episodes = rollout(watched, self.agent, args, act, range(first, first + args.num_envs), training=True)
        for i, episode in enumerate(episodes):
            T = len(episode.action)
            taken, own = np.array(watched.taken[:T]), np.stack(watched.own[:T])  # an operator means one environment
            images = None if watched.images[0] is None else np.stack([x[i] for x in watched.images[: T + 1]])
            if taken.any():
                episode.action[taken] = self.agent.normalise(own[taken])
                old, row = self.demo.starts, self.demo.rows
                self.add_episode(self.demo, episode, images)
                new = self.demo.starts[len(old) :]  # of these, the chunks that are all the operator's
                own_chunk = [taken[t : t + args.chunk_len].all() for t in (new - row).tolist()]
                self.demo.starts = torch.cat([old, new[torch.tensor(own_chunk, dtype=torch.bool)]])
                if args.record_demos and episode.success.any():
                    self.recorded.append((first, torch.from_numpy(own)))
            self.add_episode(self.replay, episode, images)
            begun = int((np.diff(taken.astype(int), prepend=0) == 1).sum())
            self.recent = [*self.recent, (float(episode.success.any()), T, float(taken.mean()), begun)][-20:]
            self.count["interventions"] += begun
            self.count["intervention_steps"] += int(taken.sum())
        self.count["planner_failures"] += watched.operator.failed if watched.operator else 0
        steps = sum(len(episode.action) for episode in episodes)
        self.count["episodes"] += args.num_envs
        self.count["global_step"] += steps
        return steps

    def batch(self) -> tuple[Batch, tuple, Tensor]:
        """A batch, the critic's view at t and t + n, and which of it is from the demo buffer (stage II: half)."""
        agent, size, g, device = self.agent, self.args.batch_size, self.generators["batch"], self.args.device
        own = 0 if self.count["stage"] == "offline" or not len(self.replay.starts) else size - size // 2
        parts = [(self.demo, self.demo.draw(size - own, g))]
        parts += [(self.replay, self.replay.draw(own, g))] if own else []
        batch, *others = [buffer.gather(t, device) for buffer, t in parts]
        for other in others:
            batch = batch.cat(other)
        batch.feature = agent.perturb(batch.feature, self.args.proprio_noise, self.generators["update"])
        batch.next_feature = agent.perturb(batch.next_feature, self.args.proprio_noise, self.generators["update"])
        maps = (None, None)
        if agent.critic.encoder is not None:
            here = torch.cat([buffer.data["image"][t] for buffer, t in parts])
            after = torch.cat([buffer.data["image"][buffer.data["next"][t]] for buffer, t in parts])
            maps = tuple(agent.maps(random_shift(image[:, None], g)[:, 0].to(device)) for image in (here, after))
        return batch, maps, torch.arange(size, device=device) < size - own

    def update(self, cql_weight: float) -> dict[str, Tensor]:
        """`critic_updates` critic steps on fresh batches and one actor step on the last of them."""
        agent, args, g, logs = self.agent, self.args, self.generators["update"], {}
        for _ in range(args.critic_updates):
            batch, maps, demo = self.batch()
            logs |= update_critic(agent, self.optimizers["critic"], batch, maps, args, cql_weight, g)
        online = self.count["stage"] == "online"
        logs |= update_actor(agent, self.optimizers["actor"], batch, maps, demo, args, online, g)
        return logs | {"buffer/demo_fraction": demo.float().mean()}

    def enter(self, stage: str) -> bool:
        """True if `stage` is still to be done; if it begins here, the one before is saved and optimizers are new."""
        if STAGES.index(self.count["stage"]) > STAGES.index(stage):
            return False
        if self.count["stage"] != stage or not self.optimizers:
            self.clock()
            self.count |= {"stage": stage, "stage_update": 0}
            if stage == "offline" and self.args.fresh_head:
                torch.manual_seed(self.args.seed)
                for layer in self.agent.actor.modules():
                    getattr(layer, "reset_parameters", lambda: None)()
            self.make_optimizers()
            if self.count["update_step"]:
                self.save()
        return True

    def make_optimizers(self) -> None:
        """Those of the present stage (ConRFT starts each stage with a fresh Adam), and stage 0's averaged weights."""
        args, agent = self.args, self.agent
        self.average = None
        if self.count["stage"] == "sft":
            self.trained = nn.ModuleList([agent.backbone, agent.actor])
            self.optimizers = {"sft": torch.optim.AdamW(self.trained.parameters(), lr=args.sft_lr, weight_decay=1e-4)}
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
            self.average = torch.optim.swa_utils.AveragedModel(self.trained, multi_avg_fn=decay)
        else:
            nets = {"critic": agent.critic, "actor": agent.actor}
            self.optimizers = {k: torch.optim.Adam(net.parameters(), lr=args.reinforce_lr) for k, net in nets.items()}

    def tick(self, logs: dict, logger: Logger) -> None:
        """After each update: count it, log now and then, write a checkpoint now and then."""
        self.count["stage_update"] += 1
        self.count["update_step"] += 1
        if self.count["update_step"] % self.args.log_freq == 0:
            logger.log(logs, self.count["global_step"], self.count["update_step"])
        # Stage II saves between episodes instead: a simulator can't be saved in the middle of one.
        if self.count["stage_update"] % self.args.checkpoint_freq == 0 and self.count["stage"] != "online":
            self.save()

    def evaluate(self, logger: Logger, episodes: int) -> None:
        act, bounds = self.agent.act, return_bounds(self.args)[:2]
        metrics = evaluate(self.env, self.agent, self.args, act, episodes, bounds)
        logger.log(metrics, self.count["global_step"], self.count["update_step"])
        self.evals.append({k: self.count[k] for k in ("stage", "global_step")} | metrics)
        once, low, high = (metrics[f"eval/success_once{end}"] for end in ("", "_low", "_high"))
        line = f"{self.count['stage']:>8} | env steps {self.count['global_step']:6d} | success {once:.2f} "
        tqdm.write(f"{line}[{low:.2f}, {high:.2f}] | steps to success {metrics['eval/episode_len']:.1f}")

    def bar(self, title: str, total: int, done: int) -> tqdm:
        """Progress of a stage; the title carries the latest evaluation."""
        latest = f" | success {self.evals[-1]['eval/success_once']:.2f}" if self.evals else ""
        return tqdm(total=total, initial=done, desc=title + latest, mininterval=2, disable=not total)

    def clock(self) -> None:
        """Book the time since the last call on the present stage."""
        self.seconds[self.count["stage"]] += time.time() - self.mark
        self.mark = time.time()

    PLAIN, PARTS = ("count", "evals", "seconds", "recent", "recorded"), ("average", "demo", "replay")

    def save(self) -> None:
        self.clock()
        state = {name: getattr(self, name) for name in self.PLAIN} | {
            "generators": {k: g.get_state() for k, g in self.generators.items()},
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "log_size": (self.folder / "metrics.csv").stat().st_size,
        }
        state |= {name: part.state_dict() for name in self.PARTS if (part := getattr(self, name)) is not None}
        save_checkpoint(self.folder, f"update-{self.count['update_step']}", self.agent.state_dict(), state)

    def load(self) -> None:
        weights, state = load_checkpoint(self.folder)
        load_weights(self.agent, weights, self.folder)
        for name in self.PLAIN:
            setattr(self, name, state[name])
        if self.args.eval_only:
            return
        self.make_optimizers()
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name in self.PARTS:
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        os.truncate(self.folder / "metrics.csv", state["log_size"])  # what was logged after that checkpoint goes


# --- shared: random shift ---
def random_shift(image: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each sample's W images by up to `pad` pixels, edges repeated. Shapes: [B, W, H, H, 3] uint8 -> same."""
    B, W, side = image.shape[:3]
    shift = torch.randint(-pad, pad + 1, (2, B, 1), generator=generator)
    rows, cols = (torch.arange(side) + shift).clamp(0, side - 1).to(image.device)[:, :, None]  # [B, 1, H] each
    sample, step = torch.arange(B, device=image.device), torch.arange(W, device=image.device)
    return image[sample[:, None, None, None], step[:, None, None], rows[..., None], cols[:, :, None]]


# --- end shared ---


def train_sft(run: Run, logger: Logger) -> None:
    """Stage 0: behaviour cloning of backbone and head; then each observation is embedded, once."""
    args, agent, total = run.args, run.agent, run.args.sft_updates
    optimizer, g = run.optimizers["sft"], run.generators
    if "primary" in run.demos.obs:
        torch.set_num_threads(args.torch_threads or THREADS)
    last = run.demos.starts() + run.demos.lengths
    rows = torch.from_numpy(np.delete(np.arange(run.num_demo_rows), last))  # all that have an action
    with run.bar("[0/2] SFT", total, run.count["stage_update"]) as bar:
        while (step := run.count["stage_update"]) < total:
            rate = min((step + 1) / (0.05 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
            optimizer.param_groups[0]["lr"] = args.sft_lr * rate
            t = rows[torch.randint(len(rows), (args.sft_batch_size,), generator=g["batch"])]
            chunk = run.demo.gather(t, args.device).chunk
            obs = run.demos.at(t, agent.window)
            images = {k: random_shift(v, g["batch"]) for k, v in obs.items() if v.dim() == 5}
            feature = agent.feature(obs | images)
            feature = agent.perturb(feature, args.proprio_noise, g["update"])
            loss = consistency_loss(agent.actor, feature, chunk, g["update"], args.noise_levels).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(run.trained.parameters(), 1.0)
            optimizer.step()
            run.average.update_parameters(run.trained)
            run.tick({"losses/bc": loss, "grad_norm/sft": norm, "lr/sft": args.sft_lr * rate}, logger)
            bar.update()
    if total:
        run.trained.load_state_dict(run.average.module.state_dict())
    with torch.no_grad():
        parts = torch.arange(run.num_demo_rows).split(256)
        features = [agent.feature(run.demos.at(p, agent.window)).cpu() for p in parts]
    run.demo.data["feature"][: run.num_demo_rows] = torch.cat(features)
    torch.set_num_threads(args.torch_threads or 1)


def train_offline(run: Run, logger: Logger) -> None:
    """Stage I, Cal-ConRFT: updates on the demonstrations."""
    total = run.args.offline_updates
    with run.bar("[1/2] Cal-ConRFT", total, run.count["stage_update"]) as bar:
        while run.count["stage_update"] < total:
            run.tick(run.update(run.args.cql_weight), logger)
            bar.update()


def train_online(run: Run, logger: Logger) -> None:
    """Stage II, HIL-ConRFT: an episode per environment, then utd_ratio actor updates per step of it."""
    args, count = run.args, run.count
    done = count["global_step"] - count["online_start"]
    with run.bar("[2/2] HIL-ConRFT", args.online_steps, done) as bar:
        while done < args.online_steps:
            before, start, saved = done, time.time(), count["stage_update"] // args.checkpoint_freq
            steps = run.collect()
            done, collected = before + steps, time.time()
            bar.update(steps)
            count["due"] += args.utd_ratio * steps
            while count["due"] >= 1:
                count["due"] -= 1
                run.tick(run.update(args.cql_weight_online), logger)
            success, length, rate, begun = np.mean(run.recent, 0)
            logs = {
                "train/success_once": success, "train/episode_len": length, "intervention/rate": rate,
                "intervention/count": begun, "intervention/planner_failures": count["planner_failures"],
                "buffer/size": run.replay.rows, "time/rollout_s": collected - start,
                "time/update_s": time.time() - collected, "time/env_steps_per_s": steps / (collected - start),
            }  # fmt: skip
            logger.log(logs, count["global_step"], count["update_step"])
            bar.set_postfix(train=f"{success:.2f}", length=f"{length:.0f}", intervened=f"{rate:.2f}")
            if done // args.eval_freq > before // args.eval_freq and done < args.online_steps:
                run.evaluate(logger, args.eval_episodes)
                run.save()
            elif count["stage_update"] // args.checkpoint_freq > saved:
                run.save()


# --- shared: summary ---
def summarise(run: Run) -> dict:
    """summary.json: what happened, from the recorded evaluations."""
    online = [e for e in run.evals if e["stage"] in ("online", "done")]
    first, handover, last, start = run.evals[0], online[0], run.evals[-1], run.count.get("online_start", 0)
    once, interval = "eval/success_once", ("eval/success_once_low", "eval/success_once_high")
    steady = [a["global_step"] - start for a, b in zip(online, online[1:]) if min(a[once], b[once]) >= 0.8]
    return {
        "success_once": last[once], "success_interval": [last[k] for k in interval],
        "success_at_end": last["eval/success_at_end"], "steps_to_success": last["eval/episode_len"],
        "demo_steps_to_success": float((run.demos.steps + run.demos.idle).mean()),
        "sft_success_once": first[once], "sft_success_interval": [first[k] for k in interval],
        "handover_success_once": handover[once], "largest_drop": max(handover[once] - e[once] for e in online),
        "online_env_steps": run.count["global_step"] - start, "env_steps": run.count["global_step"],
        "online_env_steps_at_80": steady[0] if steady else None, "seconds_per_stage": run.seconds,
        "seconds": sum(run.seconds.values()), "evaluations": run.evals, "demonstrations": run.demos.source,
    }  # fmt: skip


# --- end shared ---


def begin(args: Args) -> Run:
    """A run in a new folder, or one resumed from its last checkpoint."""
    resumed = args.resume or args.eval_only
    if resumed:
        args = stored_args(args, "eval_episodes")
    validate(args)
    torch.set_num_threads(args.torch_threads or 1)
    started, demos = time.time(), load_demos(args)
    name = args.run_name or f"{args.env_id}-conrft-{args.obs_mode}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(resumed) if resumed else Path(args.runs) / name
    if not resumed and (folder / "config.json").exists():
        raise UserError(f"{folder} exists: choose another --run-name, or go on with it by --resume {folder}")
    run = Run(args, folder, demos)
    if resumed:
        run.load()
    else:
        make_env(args, 1).close()  # fails here or not at all
        operator = None if args.intervention == "none" else type(run.watched.operator).__name__  # a device likewise
        folder.mkdir(parents=True, exist_ok=True)
        config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "demonstrations": demos.source}
        config |= {"operator": operator, "weights": args.sft_checkpoint or run.agent.weights}
        write_json(folder / "config.json", config | provenance())
    run.seconds.setdefault("demonstrations", time.time() - started)
    return run


def main(args: Args) -> Path:
    """Run or resume all stages; returns the run's folder."""
    # INFRASTRUCTURE: flags, folder, demonstrations, networks
    run = begin(args)
    args, count, folder = run.args, run.count, run.folder
    if args.eval_only:
        metrics = evaluate(run.env, run.agent, args, run.agent.act, args.eval_episodes, return_bounds(args)[:2])
        print(json.dumps(metrics, indent=2))
        return folder
    logger = Logger(folder, args, count["update_step"])

    # ALGORITHM: stage 0
    if run.enter("sft"):
        train_sft(run, logger)
        run.evaluate(logger, args.eval_episodes)
    # ALGORITHM: stage I
    if run.enter("offline"):
        train_offline(run, logger)
    # ALGORITHM: stage II
    if run.enter("online"):
        if "online_start" not in count:
            count["online_start"] = count["global_step"]
            run.evaluate(logger, args.eval_episodes)
            run.save()
        train_online(run, logger)
        if args.online_steps:
            run.evaluate(logger, args.eval_episodes)

    # INFRASTRUCTURE: results
    run.clock()
    count["stage"] = "done"
    run.save()
    logger.close()
    if run.recorded:
        record(args, run.recorded)
    names = ("episodes", "interventions", "intervention_steps", "planner_failures")
    summary = summarise(run) | {k: count[k] for k in names} | {"env_id": args.env_id, "seed": args.seed}
    write_json(folder / "summary.json", summary | provenance())
    if args.video_episodes:
        film(run.agent, args, run.agent.act, folder / "videos")
    run.env.close()
    print(f"done: success {run.evals[-1]['eval/success_once']:.2f}, results in {folder}")
    return folder


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the chosen preset."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.preset != "default":
        default = dataclasses.replace(Args(), **(PAPER if args.preset == "paper" else CODE))
        args = tyro.cli(Args, args=argv, description=__doc__, default=default)
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
