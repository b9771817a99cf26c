"""FORCE on Octo: value-calibrated warm-up and self-distillation for vision-language-action policies (arXiv:2606.26006).

A policy is cloned from demonstrations (stage 0), a conservative critic is trained on the same data (stage 1), both are
re-calibrated on the policy's own rollouts (stage 2), and then the policy learns online from the better half of its own
proposals (stage 3, VGPD). The Octo backbone is trained in stage 0 only; afterwards an observation is embedded once.

Equations (numbers of the paper)                                             where
  (1)     critic: TD + alpha * (LSE over sampled actions - Q(data)), Cal-QL    td_target, calql_loss
  (2-4)   stage 1 actor: bc_weight * BC + offline_q_weight * L_Q               consistency_loss, q_loss, update_actor
  (5-7)   stage 2 actor: BC on successful trajectories only (1{y=1} / rho)     success_weighted_bc
  (8)     stage 3 critic: plain TD                                             td_target, update_critic
  (9)     stage 3 actor: q_weight * L_Q + distill_weight * L_distill           update_actor
  (10-11) pi* ~ pi_old exp(Q / temperature), projected by weighted BC          vgpd_target, update_actor
  (12)    expert half of the batch: BC                                         --expert-filter bc
  (13-15) mean baseline, gate zeta, candidate weights                          vgpd_target

Commands
  python force_octo.py --env-id StackCube-v1 --K 20                  # RGB, makes its demonstrations on the first run
  python force_octo.py --env-id PushCube-v1 --obs-mode state         # privileged state: minutes on one core
  python force_octo.py --preset paper --env-id PickCube-v1           # the paper's reading, where it is known
  python force_octo.py --sft-checkpoint runs/NAME                    # start from a run of bc.py
  python force_octo.py --backbone octo-small --checkpoint hf://rail-berkeley/octo-small-1.5
  python force_octo.py --resume runs/NAME | --eval-only runs/NAME    # go on after a kill | evaluate the last checkpoint

Where the default differs from the paper (--preset paper: without 2-10; reasons and measurements: docs/force.md)
  1 the critic reads the frozen backbone's embedding and proprio, not images; TD targets stay within possible returns;
    the networks see actions in units of their spread; beside a camera, proprio is noisy while networks train
  2 10 Hz position control, chunks of 4 actions with chunked TD     5 temperature in units of the candidates' Q spread
  3 reward 0/1, discount 0.98 per step                              6 candidates re-noised and pushed, episodes pushed
  4 half of the critic's target is the Monte-Carlo return           7 Q loss normalised, small, and in stage 3 only
  9 with a camera, in stage 3: no Q loss, and distillation on         8 pi_old is an averaged actor; it acts, too
    successful trajectories only                                     10 --stay: demonstrations go on past the success
  and in budgets and step sizes (PAPER below): demonstrations, updates, batch, tau, sampled actions, number of critics,
  noise levels per sample
Measured: docs/force.md (CPU)
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

from backbones.consistency import SIGMA_DATA, ConsistencyActor, karras_sigmas
from backbones.octo import OctoError
from backbones.octo_policy import OctoPolicy


# === Arguments =======================================================================================================
@dataclass
class Args:
    # --- experiment ---
    env_id: str = "StackCube-v1"  # ManiSkill task
    seed: int = 1  # seed of networks, batches, exploration and training episodes
    K: int = 20  # K: candidate action chunks per state in VGPD
    preset: Literal["default", "paper"] = "default"  # "paper": the paper's choices; other flags still win
    runs: str = "runs"  # folder for runs
    run_name: str | None = None  # name of the run's folder; default: task, observation mode, seed and time
    resume: str | None = None  # run folder to go on with; all other flags are taken from its config.json
    eval_only: str | None = None  # run folder to evaluate, without training; takes --eval-episodes and --select too
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

    # --- stage 0: supervised fine-tuning ---
    sft_checkpoint: str | None = None  # run folder of bc.py (consistency head) to start from in the place of stage 0
    sft_updates: int | None = None  # updates of stage 0; default: rgb 1000, state 6000
    finetune: Literal["full", "head"] = "full"  # stage 0: train backbone and head, or the head alone
    sft_lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    sft_batch_size: int = 64  # transitions per batch
    proprio_noise: float | None = None  # noise on proprio in every update; default: 0.1 std with a camera, else 0

    # --- stages 1 to 3 ---
    gamma: float = 0.98  # discount per control step
    reinforce_lr: float = 3e-4  # learning rate of actor and critic after stage 0 (Adam, constant)
    batch_size: int = 128  # transitions per batch; stages 2 and 3: half expert, half policy buffer
    stay: bool = True  # each step that demonstrations record past the success is a success too: learn to stay there
    return_mix: float = 0.5  # share of the Monte-Carlo return in the critic's target (0 = the paper's TD)
    tau: float = 0.01  # Polyak step of the target critics
    critic_updates: int = 2  # critic updates per actor update
    offline_updates: int = 300  # stage 1: actor updates
    warmup_episodes: int = 30  # stage 2: rollouts of the current policy
    warmup_updates: int = 400  # stage 2: actor updates; the first half trains the critic only
    warmup_train_actor: bool = True  # stage 2: train the actor by Eqs. (5-7); otherwise the critic only
    warmup: bool = True  # --no-warmup skips stage 2 (the paper's ablation "w/o Pre-Cal")
    online_steps: int | None = None  # stage 3: control steps, summed over environments; default: rgb 15000, state 10000
    utd_ratio: float = 0.5  # stage 3: actor updates per control step
    cql_alpha: float = 0.1  # weight of the conservative term in stages 1 and 2
    online_cql_alpha: float = 0.0  # the same in stage 3 (0 = the paper's Eq. 8)
    cql_samples: int = 2  # sampled actions of each kind in the conservative term (random, pi(s), pi(s'))
    bc_weight: float = 1.0  # weight of BC in stages 1 and 2
    distill_weight: float = 1.0  # stage 3: weight of the distillation loss
    q_weight: float | None = None  # stage 3: weight of the Q loss (more: faster, less safe); default: rgb 0, state 0.02
    q_weight_end: float | None = None  # the same at the end of stage 3, reached evenly; default: --q-weight throughout
    offline_q_weight: float = 0.0  # the same in stages 1 and 2, where the critic isn't calibrated yet
    q_normalize: bool = True  # divide the Q loss by the batch mean of |Q|
    vgpd: bool = True  # --no-vgpd replaces distillation by BC on both halves (the paper's ablation)
    temperature: float = 1.0  # tau of Eq. (15), in units of reward or (adaptive) of the candidates' Q spread
    temperature_adaptive: bool = True  # scale the temperature by the standard deviation of Q over a state's candidates
    success_filter: bool | None = None  # stage 3: learn from successful trajectories only; default: VGPD with a camera
    expert_filter: Literal["bc", "filter"] = "bc"  # expert half: plain BC (Eq. 12) or gated (Eq. 14)
    candidate_sigma: float = 0.3  # noise level of the second denoising step for candidates (0 = one-step candidates)
    candidate_noise: float = 0.02  # Gaussian push on candidates, in units of the action box
    explore_noise: float | None = None  # the same push on the chunks of training episodes; default: rgb 0, state 0.02
    actor_ema: float | None = None  # decay of pi_old, which acts and proposes (0: off); default: rgb 0.999, state 0.995
    select: Literal["sample", "best-of-k"] = "sample"  # best of K by the critic isn't in the paper

    # --- evaluation and logging ---
    eval_episodes: int = 100  # episodes of an evaluation
    eval_freq: int = 2000  # control steps between evaluations in stage 3
    video_episodes: int = 4  # episodes filmed after training (0 = none)
    log_freq: int = 100  # updates between logged rows
    checkpoint_freq: int = 1000  # updates between checkpoints (also written at the end of each stage and evaluation)


PAPER = dict(
    control_mode="pd_ee_delta_pose", reward="conrft", return_mix=0.0, tau=0.005, batch_size=256, gamma=0.99,
    chunk_len=1, num_critics=2, noise_levels=1, sft_lr=3e-4, q_weight=1.0, offline_q_weight=0.1, q_normalize=False,
    distill_weight=0.5, temperature=0.1, temperature_adaptive=False, candidate_sigma=0.0, candidate_noise=0.0,
    explore_noise=0.0, actor_ema=0.0, success_filter=False, cql_samples=10, offline_updates=20_000, warmup_updates=4000,
    online_steps=30_000, utd_ratio=1.0, num_demos=50, stay=False, sft_updates=6000,
)  # fmt: skip

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """K control_freq num_envs num_demos noise_levels hidden_dim num_layers
        num_critics chunk_len sft_batch_size critic_updates cql_samples eval_episodes eval_freq
        log_freq checkpoint_freq"""),
    "at least 2": (lambda x: x >= 2, "batch_size"),
    "positive": (lambda x: x > 0, "sft_lr reinforce_lr temperature action_range"),
    "within [0, 1]": (lambda x: 0 <= x <= 1, "tau return_mix"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma actor_ema skip_idle"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
    "in 0..899 (training and evaluation episodes stay apart)": (lambda x: 0 <= x < 900, "seed"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    check_flags(args, LIMITS)
    check_octo(args)
    # What depends on the camera. There, an update of stage 0 costs more than a step, and a critic on features of images
    # is worth less, so the policy leaves what it knows more slowly (docs/force.md, log).
    defaults = dict(sft_updates=(1000, 6000), online_steps=(15_000, 10_000), q_weight=(0.0, 0.02))
    defaults |= dict(actor_ema=(0.999, 0.995), explore_noise=(0.0, 0.02))
    for name, (rgb, state) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, rgb if args.obs_mode == "rgb" else state)
    if args.success_filter is None:
        args.success_filter = args.obs_mode == "rgb" and args.vgpd
    if args.warmup and args.warmup_updates and not args.warmup_episodes:
        raise UserError("--warmup-updates needs rollouts: give --warmup-episodes, or leave stage 2 out by --no-warmup")
    if args.sft_checkpoint:
        args.sft_updates = 0
        if not (args.resume or args.eval_only):
            check_origin(args, Path(args.sft_checkpoint), head="consistency")
    if args.select == "best-of-k" and args.K < 2:
        raise UserError(f"--select best-of-k needs --K of at least 2, got {args.K}")


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
    """Everything that is learned."""

    def __init__(self, args: Args, demos: Demos):
        super().__init__(args, demos)
        actor = (self.feature_dim, self.chunk_unit, args.hidden_dim, args.num_layers)
        self.actor, self.actor_ema = ConsistencyActor(*actor), ConsistencyActor(*actor)
        self.critic, self.target_critic = (EnsembleCritic(args.num_critics, *actor) for _ in range(2))
        self.target_critic.load_state_dict(self.critic.state_dict())
        for copy in (self.actor_ema, self.target_critic):
            copy.requires_grad_(False)

    def act(self, feature: Tensor, actor: ConsistencyActor, args: Args, generator, explore: float = 0.0) -> np.ndarray:
        """One chunk per state, pushed by `explore`: [N, F] -> [N, H, A] normalised.

        It is a sample, or the best of K candidates by the critic.
        """
        if args.select == "sample":
            chunk = actor.sample(feature, 1, generator)[:, 0]
        else:
            chunk = self.candidates(feature, actor, args, generator)
            chunk = chunk[torch.arange(len(chunk)), self.critic(feature, chunk).mean(0).argmax(-1)]
        return self.push(chunk, explore, generator).unflatten(1, (self.H, -1)).cpu().numpy()

    def candidates(self, feature: Tensor, actor: ConsistencyActor, args: Args, generator) -> Tensor:
        """K proposals per state: [N, F] -> [N, K, H*A] normalised."""
        return self.push(
            actor.sample(feature, args.K, generator, args.candidate_sigma), args.candidate_noise, generator
        )

    def push(self, chunk: Tensor, size: float, generator) -> Tensor:
        """Add Gaussian noise that is the same for all steps of a chunk [.., H*A], `size` in units of the action box.

        The arm then moves off its path, where independent noise would merely make it shake: more to learn from.
        """
        if not size:
            return chunk
        noise = torch.randn((*chunk.shape[:-1], 1, self.action_dim), generator=generator, device=chunk.device)
        return (chunk.unflatten(-1, (self.H, -1)) + size * noise).clamp(-1, 1).flatten(-2)


# === Losses: pure functions ==========================================================================================
def td_target(batch: Batch, next_q: Tensor, return_mix: float, low: float, high: float) -> Tensor:
    """y = sum gamma^i r_i + gamma^n * min_k Q'_k(s', a'), a' ~ pi(.|s'), kept within the returns that exist.

    return_mix > 0 moves that share of the target to the Monte-Carlo return, which carries a failure back through the
    episode at once, where bootstrapping takes thousands of updates.
    Shapes: next_q [critics in the minimum, B] -> [B].
    Source: B Qbar of Eq. (1) and Eq. (8), for chunks as in Q-chunking (arXiv:2507.07969); return_mix: ours.
    """
    target = batch.reward + batch.bootstrap * next_q.min(0).values
    return torch.lerp(target, batch.mc_return, return_mix).clamp(low, high)


def calql_loss(q_data: Tensor, q_sampled: Tensor, mc_return: Tensor) -> tuple[Tensor, Tensor]:
    """The conservative term of Eq. (1): LSE over sampled actions of max(Q, Monte-Carlo return), minus Q(data).

    Without importance sampling, since a consistency policy has no density; the data action belongs to the LSE, which
    bounds the push on it. The constant log(n + 1) leaves gradients alone and makes equal values give zero.
    Shapes: q_data [E, B], q_sampled [E, B, n], mc_return [B] -> scalar, and the share of q_sampled below its bound.
    Source: Cal-QL (arXiv:2303.05479), in ConRFT's form (every sampled action is bounded).
    """
    bounded = torch.maximum(q_sampled, mc_return[None, :, None])
    entries = torch.cat([bounded, q_data[..., None]], -1)
    gap = torch.logsumexp(entries, -1) - math.log(entries.shape[-1]) - q_data  # over actions, never over the batch
    return gap.mean(), (q_sampled < mc_return[None, :, None]).float().mean()


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


def success_weighted_bc(bc: Tensor, success: Tensor) -> Tensor:
    """Eqs. (5-7): (1/rho) * mean(1{y=1} * bc), rho the share of successes: the mean over successful samples.

    Shapes: bc [B], success [B] in {0, 1} -> scalar, 0 if nothing succeeded.
    """
    return (success * bc).sum() / success.sum().clamp_min(1.0)


def q_loss(q: Tensor, normalise: bool) -> Tensor:
    """- mean Q(s, pi(s)) over critics and batch, optionally over the mean |Q| (as TD3+BC). Shapes: q [E, B] -> scalar."""
    return -q.mean() / (q.abs().mean().detach() + 1e-6 if normalise else 1.0)


def vgpd_target(q: Tensor, q_buffer: Tensor, temperature: float, adaptive: bool) -> tuple[Tensor, Tensor]:
    """Weights of a state's K candidates and the gate between them and the buffer action.

    w_k ~ 1{Q_k >= mean Q} exp(Q_k / tau)                                    Eq. (15)
    zeta = 1{mean Q > Q(s, a_buffer)}                                        Eq. (14)
    With `adaptive` the temperature is in units of the state's own standard deviation of Q over candidates.
    Shapes: q [B, K], q_buffer [B] -> w [B, K] summing to 1, zeta [B] in {0, 1}.
    """
    mean = q.mean(-1, keepdim=True).minimum(q.amax(-1, keepdim=True))  # Eq. (13); rounding may lift it past equal Q
    scale = q.std(-1, keepdim=True, correction=0).clamp_min(1e-6) if adaptive else torch.ones_like(mean)
    logits = (q / (temperature * scale)).masked_fill(q < mean, -torch.inf)  # the best candidate always passes
    return torch.softmax(logits, -1), (mean[:, 0] > q_buffer).float()


# === Updates =========================================================================================================
def return_bounds(args: Args) -> tuple[float, float, float, float]:
    """reward of a failing step, reward of success, lowest and highest return."""
    fail, success = (0.0, 1.0) if args.reward == "binary" else (-0.05, 10.0)
    return fail, success, fail / (1 - args.gamma), success


def update_critic(agent: Agent, optimizer, batch: Batch, args: Args, cql_alpha: float, generator) -> dict[str, Tensor]:
    """One step on Eq. (1), or on Eq. (8) with cql_alpha = 0, and the Polyak step of the targets."""
    B, D = batch.chunk.shape
    n = args.cql_samples if cql_alpha else 0
    with torch.no_grad():
        next_chunks = agent.actor.sample(batch.next_feature, max(n, 1), generator)  # [B, n, D], the online actor
        two = torch.randperm(args.num_critics, generator=generator, device=batch.chunk.device)[:2]
        next_q = agent.target_critic(batch.next_feature, next_chunks[:, 0])[two]
        _, _, low, high = return_bounds(args)
        target = td_target(batch, next_q, args.return_mix, low, high)
    q_data = agent.critic(batch.feature, batch.chunk)  # [E, B]
    loss_td = (q_data - target).square().mean()
    logs = {"losses/td": loss_td, "values/q_data": q_data.mean(), "values/td_target": target.mean()}
    logs |= {"values/mc_return": batch.mc_return.mean(), "values/critic_std": q_data.std(0, correction=0).mean()}
    loss = loss_td
    if cql_alpha:
        with torch.no_grad():
            random = torch.rand((B, n, D), generator=generator, device=batch.chunk.device) * 2 - 1
            current = agent.actor.sample(batch.feature, n, generator)
        q_sampled = agent.critic(batch.feature, torch.cat([random, current, next_chunks], 1))  # all evaluated at s
        loss_cql, logs["calib/bound_rate"] = calql_loss(q_data, q_sampled, batch.mc_return)
        logs["losses/calql"], loss = loss_cql, loss + cql_alpha * loss_cql
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.critic, agent.target_critic, args.tau)
    return logs | {"losses/critic": loss}


def update_actor(agent: Agent, optimizer, batch: Batch, expert: Tensor, args: Args, stage: str, generator) -> dict:
    """One step on the actor's loss of `stage`. expert [B] bool: sample comes from the expert buffer."""
    logs, target = {}, batch.chunk
    if stage == "online" and args.vgpd:
        with torch.no_grad():
            rows = (~expert | (args.expert_filter == "filter")).nonzero()[:, 0]
            feature, chunk = batch.feature[rows], batch.chunk[rows]
            candidates = agent.candidates(feature, agent.actor_ema, args, generator)  # a_k ~ pi_old
            q = agent.critic(feature, candidates).mean(0)  # [B', K]
            q_buffer = agent.critic(feature, chunk).mean(0)  # [B']
            weight, zeta = vgpd_target(q, q_buffer, args.temperature, args.temperature_adaptive)
            # Eq. (14) asks for the w-weighted sum of losses; one k ~ w per state has the same expected gradient.
            k = torch.multinomial(weight, 1, generator=generator)[:, 0]
            chosen = candidates[torch.arange(len(rows), device=rows.device), k]  # [B', D]
            target = batch.chunk.clone()
            target[rows] = torch.where(zeta[:, None] > 0, chosen, chunk)
            own = ~expert[rows]
            logs |= {
                "vgpd/zeta": zeta[own].mean(), "vgpd/pass_rate": (weight > 0).float().mean(),
                "vgpd/candidate_std": candidates.std(1, correction=0).mean(),
                "vgpd/ess": (1 / weight.square().sum(-1)).mean(), "values/q_std": q.std(-1, correction=0).mean(),
            }  # fmt: skip
            if args.expert_filter == "filter":
                logs["vgpd/zeta_expert"] = zeta[expert].mean()
    bc = consistency_loss(agent.actor, batch.feature, target, generator, args.noise_levels)  # [B]
    successes = stage == "warmup" or (stage == "online" and args.success_filter)
    loss_bc = success_weighted_bc(bc, batch.success) if successes else bc.mean()
    weight_bc = args.distill_weight if stage == "online" else args.bc_weight
    weight_q = args.q_weight if stage == "online" else args.offline_q_weight
    loss = weight_bc * loss_bc
    if weight_q:
        agent.critic.requires_grad_(False)
        q_policy = agent.critic(batch.feature, agent.actor.sample(batch.feature, 1, generator)[:, 0])  # [E, B]
        agent.critic.requires_grad_(True)
        logs |= {"losses/q": (loss_q := q_loss(q_policy, args.q_normalize)), "values/q_policy": q_policy.mean()}
        loss = loss + weight_q * loss_q  # Eq. (4), (7), (9)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    polyak_update(agent.actor, agent.actor_ema, 1 - args.actor_ema)
    return logs | {"losses/distill" if stage == "online" else "losses/bc": loss_bc, "losses/actor": loss}


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
STAGES = ("sft", "offline", "warmup", "online", "done")


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
        self.expert, self.policy = ReplayBuffer(*sizes), ReplayBuffer(*sizes)
        devices = {"batch": "cpu", "update": args.device, "rollout": args.device}
        self.generators = {k: torch.Generator(d).manual_seed(args.seed + i) for i, (k, d) in enumerate(devices.items())}
        self.count = {"stage": "sft", "stage_update": 0, "update_step": 0, "global_step": 0, "episodes": 0, "due": 0.0}
        self.evals: list[dict] = []  # one entry per evaluation: stage, global_step and the metrics
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.recent: list[tuple[float, int]] = []  # success and length of the last training episodes
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for start, length, steps in zip(demos.starts(), demos.lengths, demos.steps):  # the same rows as in `demos`
            action = self.agent.normalise(demos.action[start : start + length])
            empty = torch.zeros(length + 1, self.agent.feature_dim)  # embeddings come after stage 0
            past = demos.success[start + steps : start + length] if args.stay and length > steps else np.zeros(0)
            first = np.arange(1, steps + 1) == steps
            self.add_episode(self.expert, Episode(empty, action, first, True), stay=int(past.cumprod().sum()))
        self.num_demo_rows = self.expert.rows

    @cached_property
    def env(self):
        return make_env(self.args, self.args.num_envs)

    def act(self, feature: Tensor, generator: torch.Generator, explore: float = 0.0) -> np.ndarray:
        """`Agent.act` with the actor that stands for the policy: after stage 0 the averaged one."""
        sft, args = self.count["stage"] == "sft", self.args
        actor = self.agent.actor_ema if args.actor_ema and not sft else self.agent.actor
        args = dataclasses.replace(args, select="sample") if sft else args  # there is no critic yet
        return self.agent.act(feature, actor, args, generator, explore)

    def add_episode(self, buffer: ReplayBuffer, episode: Episode, stay: int = 0) -> None:
        fail, success, _, _ = return_bounds(self.args)
        reward = np.where(episode.success, success, fail).astype(np.float32)
        ended, succeeded, hold = episode.terminated, episode.success.any(), self.agent.hold_action(episode.action[-1])
        buffer.add(episode.feature, episode.action, reward, ended, bool(succeeded), fail, hold, stay)

    def collect(self) -> int:
        """An episode per environment into the policy buffer, successes into the expert buffer too. Returns steps."""
        args, first = self.args, TRAIN_SEED + 1_000_000 * self.args.seed + self.count["episodes"]
        act = partial(self.act, generator=self.generators["rollout"], explore=args.explore_noise)
        episodes = rollout(self.env, self.agent, args, act, range(first, first + args.num_envs), training=True)
        for episode in episodes:
            self.add_episode(self.policy, episode)
            if episode.success.any():
                self.add_episode(self.expert, episode)
            self.recent = [*self.recent, (float(episode.success.any()), len(episode.action))][-20:]
        steps = sum(len(episode.action) for episode in episodes)
        self.count["episodes"] += args.num_envs
        self.count["global_step"] += steps
        return steps

    def batch(self) -> tuple[Batch, Tensor]:
        """A batch and which of it is expert data: demonstrations only (stage 1), or half and half (Eqs. 5-9)."""
        size, g, device = self.args.batch_size, self.generators["batch"], self.args.device
        own = 0 if self.count["stage"] == "offline" or not len(self.policy.starts) else size - size // 2
        batch = self.expert.gather(self.expert.draw(size - own, g), device)
        if own:
            batch = batch.cat(self.policy.gather(self.policy.draw(own, g), device))
        return batch, torch.arange(size, device=device) < size - own

    def update(self, cql_alpha: float, train_actor: bool = True) -> dict[str, Tensor]:
        """`critic_updates` critic steps on fresh batches and one actor step on the last of them."""
        agent, args, g, logs = self.agent, self.args, self.generators["update"], {}
        for _ in range(args.critic_updates):
            batch, expert = self.batch()
            batch.feature = agent.perturb(batch.feature, args.proprio_noise, g)
            batch.next_feature = agent.perturb(batch.next_feature, args.proprio_noise, g)
            logs |= update_critic(agent, self.optimizers["critic"], batch, args, cql_alpha, g)
        if train_actor:
            now = dataclasses.replace(args, q_weight=self.q_weight())
            logs |= update_actor(agent, self.optimizers["actor"], batch, expert, now, self.count["stage"], g)
        return logs | {"buffer/policy_ratio": 1 - expert.float().mean()}

    def q_weight(self) -> float:
        """The present weight of stage 3's Q loss: on the line from --q-weight to --q-weight-end over --online-steps."""
        args, count = self.args, self.count
        done = count["global_step"] - count.get("online_start", count["global_step"])
        end = args.q_weight if args.q_weight_end is None else args.q_weight_end
        return args.q_weight + min(done / max(args.online_steps, 1), 1.0) * (end - args.q_weight)

    def enter(self, stage: str) -> bool:
        """True if `stage` is still to be done; if it begins here, the one before is saved and optimizers are new."""
        if STAGES.index(self.count["stage"]) > STAGES.index(stage):
            return False
        if self.count["stage"] != stage or not self.optimizers:
            self.clock()
            self.count |= {"stage": stage, "stage_update": 0}
            self.make_optimizers()
            if self.count["update_step"]:
                self.save()
        return True

    def make_optimizers(self) -> None:
        """Those of the present stage (ConRFT starts each stage with a fresh Adam), and stage 0's averaged weights."""
        args, agent, stage = self.args, self.agent, self.count["stage"]
        self.average = None
        if stage == "sft":
            self.trained = nn.ModuleList([agent.backbone, agent.actor] if args.finetune == "full" else [agent.actor])
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
        # Stage 3 saves between episodes instead: a simulator can't be saved in the middle of one.
        if self.count["stage_update"] % self.args.checkpoint_freq == 0 and self.count["stage"] != "online":
            self.save()

    def evaluate(self, logger: Logger, episodes: int) -> None:
        stage, step = self.count["stage"], self.count["global_step"]
        metrics = evaluate(self.env, self.agent, self.args, self.act, episodes, return_bounds(self.args)[:2])
        logger.log(metrics, step, self.count["update_step"])
        self.evals.append({"stage": stage, "global_step": step} | metrics)
        once, low, high = (metrics[f"eval/success_once{end}"] for end in ("", "_low", "_high"))
        line = f"{stage:>8} | env steps {step:6d} | success {once:.2f} [{low:.2f}, {high:.2f}]"
        tqdm.write(f"{line} | steps to success {metrics['eval/episode_len']:.1f}")

    def bar(self, title: str, total: int, done: int = 0) -> tqdm:
        """Progress of a stage; the title carries the latest evaluation."""
        latest = f" | success {self.evals[-1]['eval/success_once']:.2f}" if self.evals else ""
        title = f"[{STAGES.index(self.count['stage'])}/3] {title}{latest}"
        return tqdm(total=total, initial=done, desc=title, mininterval=2, disable=not total)

    def clock(self) -> None:
        """Book the time since the last call on the present stage."""
        self.seconds[self.count["stage"]] += time.time() - self.mark
        self.mark = time.time()

    def save(self) -> None:
        self.clock()
        state = {name: getattr(self, name) for name in ("count", "evals", "seconds", "recent")} | {
            "generators": {k: g.get_state() for k, g in self.generators.items()},
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "average": self.average and self.average.state_dict(),
            "expert": self.expert.state_dict(),
            "policy": self.policy.state_dict(),
            "log_size": (self.folder / "metrics.csv").stat().st_size,
        }
        save_checkpoint(self.folder, f"update-{self.count['update_step']}", self.agent.state_dict(), state)

    def load(self) -> None:
        weights, state = load_checkpoint(self.folder)
        load_weights(self.agent, weights, self.folder)
        self.count, self.evals, self.seconds, self.recent = (state[k] for k in ("count", "evals", "seconds", "recent"))
        if self.args.eval_only:
            return
        self.make_optimizers()
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name in ("average", "expert", "policy"):
            if getattr(self, name) is not None:
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
    """Stage 0: behaviour cloning of backbone and head, or of the head on cached embeddings; ends with averaged weights."""
    args, agent, full, total = run.args, run.agent, run.args.finetune == "full", run.args.sft_updates
    optimizer, params = run.optimizers["sft"], run.optimizers["sft"].param_groups[0]["params"]
    if full and "primary" in run.demos.obs:
        torch.set_num_threads(args.torch_threads or THREADS)
    if not full:
        embed_demos(run)
    last = run.demos.starts() + run.demos.lengths
    rows = torch.from_numpy(np.delete(np.arange(run.num_demo_rows), last))  # all that have an action
    with run.bar("SFT", total, run.count["stage_update"]) as bar:
        while (step := run.count["stage_update"]) < total:
            rate = min((step + 1) / (0.05 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
            optimizer.param_groups[0]["lr"] = args.sft_lr * rate
            t = rows[torch.randint(len(rows), (args.sft_batch_size,), generator=run.generators["batch"])]
            batch = run.expert.gather(t, args.device)
            feature = batch.feature
            if full:
                obs = run.demos.at(t, agent.window)
                images = {k: random_shift(v, run.generators["batch"]) for k, v in obs.items() if v.dim() == 5}
                feature = agent.feature(obs | images)
            feature = agent.perturb(feature, args.proprio_noise, run.generators["update"])
            bc = consistency_loss(agent.actor, feature, batch.chunk, run.generators["update"], args.noise_levels)
            loss = bc.mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            run.average.update_parameters(run.trained)
            run.tick({"losses/bc": loss, "grad_norm/sft": norm, "lr/sft": args.sft_lr * rate}, logger)
            bar.update()
    run.trained.load_state_dict(run.average.module.state_dict())
    agent.actor_ema.load_state_dict(agent.actor.state_dict())
    if full:
        embed_demos(run)
    torch.set_num_threads(args.torch_threads or 1)


@torch.no_grad()
def embed_demos(run: Run) -> None:
    """Embed each observation of the demonstrations once, into the expert buffer."""
    rows = torch.arange(run.num_demo_rows).split(256)
    features = [run.agent.feature(run.demos.at(r, run.agent.window)).cpu() for r in rows]
    run.expert.data["feature"][: run.num_demo_rows] = torch.cat(features)


def train_updates(run: Run, logger: Logger, stage: str, total: int) -> None:
    """Stages 1 and 2: `total` actor updates with their critic updates, on data that is there."""
    with run.bar("offline Cal-QL" if stage == "offline" else "warm-up", total, run.count["stage_update"]) as bar:
        while (step := run.count["stage_update"]) < total:
            actor = stage == "offline" or (run.args.warmup_train_actor and step >= total // 2)
            run.tick(run.update(run.args.cql_alpha, actor), logger)
            bar.update()


def train_online(run: Run, logger: Logger) -> None:
    """Stage 3: an episode per environment, then utd_ratio actor updates per step of it."""
    args, count = run.args, run.count
    done = count["global_step"] - count["online_start"]
    with run.bar("online VGPD", args.online_steps, done) as bar:
        while done < args.online_steps:
            before, start, saved = done, time.time(), count["stage_update"] // args.checkpoint_freq
            steps = run.collect()
            done, collected = before + steps, time.time()
            bar.update(steps)
            count["due"] += args.utd_ratio * steps
            while count["due"] >= 1:
                count["due"] -= 1
                run.tick(run.update(args.online_cql_alpha), logger)
            success, length = np.mean(run.recent, 0)
            logs = {
                "train/success_once": success, "train/episode_len": length, "buffer/size": run.policy.rows,
                "time/rollout_s": collected - start, "time/update_s": time.time() - collected,
                "time/env_steps_per_s": steps / (collected - start),
            }  # fmt: skip
            logger.log(logs, count["global_step"], count["update_step"])
            bar.set_postfix(train=f"{success:.2f}", length=f"{length:.0f}")
            if done // args.eval_freq > before // args.eval_freq and done < args.online_steps:
                run.evaluate(logger, args.eval_episodes)
                bar.set_description(f"[3/3] online VGPD | success {run.evals[-1]['eval/success_once']:.2f}")
                run.save()
            elif count["stage_update"] // args.checkpoint_freq > saved:
                run.save()


def calibration(run: Run) -> dict[str, float]:
    """Q of the rollouts' decisions against the returns that followed: the gap that warm-up is meant to close."""
    if not len(run.policy.starts):
        return {}
    with torch.no_grad():
        batch = run.policy.gather(run.policy.starts, run.args.device)
        q = run.agent.critic(batch.feature, batch.chunk).mean(0)
    gap, correlation = q - batch.mc_return, torch.corrcoef(torch.stack([q, batch.mc_return]))[0, 1]
    return {"calib/q_minus_return": gap.mean(), "calib/abs_error": gap.abs().mean(), "calib/correlation": correlation}


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
        args = stored_args(args, "eval_episodes select")
    validate(args)
    torch.set_num_threads(args.torch_threads or 1)
    started = time.time()
    demos = load_demos(args)
    name = args.run_name or f"{args.env_id}-force_octo-{args.obs_mode}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(resumed) if resumed else Path(args.runs) / name
    if not resumed and (folder / "config.json").exists():
        raise UserError(f"{folder} exists: choose another --run-name, or go on with it by --resume {folder}")
    run = Run(args, folder, demos)
    if not resumed:
        make_env(args, 1).close()  # fails here or not at all
        folder.mkdir(parents=True, exist_ok=True)
        config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "demonstrations": demos.source}
        config["weights"] = args.sft_checkpoint or run.agent.weights
        write_json(folder / "config.json", config | provenance())
    if resumed:
        run.load()
    run.seconds.setdefault("demonstrations", time.time() - started)
    return run


def main(args: Args) -> Path:
    """Run or resume all stages; returns the run's folder."""
    # INFRASTRUCTURE: flags, folder, demonstrations, networks
    run = begin(args)
    args, count, folder = run.args, run.count, run.folder
    if args.eval_only:
        metrics = evaluate(run.env, run.agent, args, run.act, args.eval_episodes, return_bounds(args)[:2])
        print(json.dumps(metrics, indent=2))
        return folder
    logger = Logger(folder, args, count["update_step"])

    # ALGORITHM: stage 0
    if run.enter("sft"):
        train_sft(run, logger)
        run.evaluate(logger, args.eval_episodes)
    # ALGORITHM: stage 1
    if run.enter("offline"):
        train_updates(run, logger, "offline", args.offline_updates)
        run.evaluate(logger, args.eval_episodes)
    # ALGORITHM: stage 2
    if args.warmup and run.enter("warmup"):
        with run.bar("warm-up rollouts", args.warmup_episodes, count["episodes"]) as bar:
            while count["episodes"] < args.warmup_episodes:
                run.collect()
                bar.update(args.num_envs)
        if not count["stage_update"]:
            logger.log(calibration(run), count["global_step"], count["update_step"])
        train_updates(run, logger, "warmup", args.warmup_updates)
        logger.log(calibration(run), count["global_step"], count["update_step"])
    # ALGORITHM: stage 3
    if run.enter("online"):
        if "online_start" not in count:
            count["online_start"] = count["global_step"]
            run.evaluate(logger, args.eval_episodes)
            run.save()
        train_online(run, logger)
        run.evaluate(logger, args.eval_episodes)

    # INFRASTRUCTURE: results
    run.clock()
    count["stage"] = "done"
    run.save()
    logger.close()
    write_json(folder / "summary.json", summarise(run) | {"env_id": args.env_id, "seed": args.seed} | provenance())
    if args.video_episodes:
        film(run.agent, args, run.act, folder / "videos")
    run.env.close()
    print(f"done: success {run.evals[-1]['eval/success_once']:.2f}, results in {folder}")
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
