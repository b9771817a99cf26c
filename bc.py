"""BC: behaviour cloning (supervised fine-tuning) of Octo on demonstrations, the baseline and start of the RL scripts.

A policy imitates the demonstrated action chunks. Nothing else: no reward, no critic, no interaction.

Losses (--head), all on chunks in units of the demonstrations' spread      where
  consistency   reconstruct the chunk from a random noise level (ConRFT)     consistency_loss
  diffusion     predict the noise that was added, 20 steps (Octo's head)     DiffusionHead.loss
  mse-chunk     squared error of one deterministic chunk (CO-RFT, stage 1)   mse_loss

Commands
  python bc.py --env-id PickCube-v1 --obs-mode state                 # privileged state: minutes on one core
  python bc.py --env-id StackCube-v1 --head diffusion                # RGB, makes its demonstrations on the first run
  python bc.py --env-id PickCube-v1 --obs-mode state --chunk-len 1   # single steps instead of chunks
  python bc.py --resume runs/NAME | --eval-only runs/NAME            # go on after a kill | evaluate the last checkpoint
  python force_octo.py --sft-checkpoint runs/NAME                    # reinforcement learning from here

The last averaged weights (EMA) are evaluated, never the best of several. Measured: docs/bc.md.
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
import tyro
from safetensors.torch import load_file, save
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from backbones.consistency import SIGMA_DATA, ConsistencyActor, karras_sigmas
from backbones.octo import DiffusionHead, OctoError
from backbones.octo_policy import OctoPolicy


# === Arguments =======================================================================================================
@dataclass
class Args:
    # --- experiment ---
    env_id: str = "StackCube-v1"  # ManiSkill task
    seed: int = 1  # seed of networks and batches
    runs: str = "runs"  # folder for runs
    run_name: str | None = None  # name of the run's folder; default: task, head, observation mode, seed and time
    resume: str | None = None  # run folder to go on with; all other flags are taken from its config.json
    eval_only: str | None = None  # run folder to evaluate, without training; takes --eval-episodes too
    track: bool = False  # log to Weights & Biases too (works offline)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto", "cpu" or "cuda"
    torch_threads: int = 0  # CPU threads; 0: one, but OMP_NUM_THREADS or all cores (up to 8) for training with a camera

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
    num_demos: int = 300  # demonstrations to make or to use
    skip_idle: float = 0.0  # leave out their first steps in which the arm moves less (actions reach 1); 0: none
    demo_dir: str = "demos"  # cache for demonstrations
    holdout: float = 0.0  # share of the demonstrations that is kept out of training, for the validation loss

    # --- model ---
    backbone: Literal["octo-compact", "octo-small", "octo-base"] = "octo-compact"  # size of the Octo backbone
    checkpoint: str | None = None  # released Octo weights to start from: a folder, or hf://owner/name[@revision]
    head: Literal["consistency", "diffusion", "mse-chunk"] = "consistency"  # action head
    finetune: Literal["full", "head"] = "full"  # train backbone and head, or the head alone
    hidden_dim: int = 256  # width of the head
    num_layers: int = 2  # hidden layers of the head
    chunk_len: int = 4  # H: actions per decision, executed open loop (1 = single steps)
    action_range: float = 1.5  # the policy's action box as a multiple of the largest demonstrated action, per dimension
    noise_levels: int = 8  # noise levels drawn per sample in the loss (consistency, diffusion)

    # --- training ---
    updates: int = 6000  # gradient steps
    batch_size: int = 64  # transitions per batch
    lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    ema: float = 0.998  # decay of the averaged weights that act
    proprio_noise: float | None = None  # noise on proprio while training; default: 0.1 std with a camera, else 0

    # --- evaluation and logging ---
    eval_episodes: int = 100  # episodes of the last evaluation
    eval_freq: int = 0  # updates between evaluations on the way (0 = none)
    val_freq: int = 500  # updates between validation losses (with --holdout)
    video_episodes: int = 4  # episodes filmed after training (0 = none)
    log_freq: int = 100  # updates between logged rows
    checkpoint_freq: int = 1000  # updates between checkpoints


LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """control_freq num_envs num_demos noise_levels hidden_dim num_layers chunk_len
        updates batch_size eval_episodes val_freq log_freq checkpoint_freq"""),
    "positive": (lambda x: x > 0, "lr action_range max_grad_norm"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "ema holdout skip_idle"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
    "in 0..899 (training and evaluation episodes stay apart)": (lambda x: 0 <= x < 900, "seed"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    check_flags(args, LIMITS)
    check_octo(args)


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


class Chunks:
    """The demonstrations as (observation, action chunk) pairs, split into training and held-out episodes."""

    def __init__(self, demos: Demos, policy: Policy, holdout: float):
        """Chunks that reach past the recording's end are filled up with the action that keeps still."""
        action, ends = policy.normalise(demos.action), demos.starts() + demos.lengths
        action[ends] = [policy.hold_action(action[end - 1]) for end in ends]
        self.action, self.last = torch.from_numpy(action), torch.from_numpy(np.repeat(ends, demos.lengths + 1))
        self.H, rows = policy.H, np.delete(np.arange(len(action)), ends)
        first_held = np.append(demos.starts(), len(action))[len(ends) - math.ceil(holdout * len(ends))]
        self.train, self.held = torch.from_numpy(rows[rows < first_held]), torch.from_numpy(rows[rows >= first_held])

    def chunk(self, rows: Tensor) -> Tensor:
        """Chunks that start at rows [B]: [B, H*A] normalised, time-major."""
        steps = torch.minimum(rows[:, None] + torch.arange(self.H), self.last[rows][:, None])
        return self.action[steps].flatten(1)


# === Networks ========================================================================================================
class MSEHead(nn.Module):
    """Deterministic chunk: an MLP on the feature. Works in units of the spread, as the other heads."""

    def __init__(self, feature_dim: int, unit: Tensor, hidden: int, layers: int):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [D]
        sizes = [feature_dim] + [hidden] * layers
        parts = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.LayerNorm(b, eps=1e-6), nn.Tanh())]
        self.net = nn.Sequential(*parts, nn.Linear(hidden, len(unit)))

    def forward(self, feature: Tensor) -> Tensor:
        """[B, F] -> [B, D] in units of the spread."""
        return self.net(feature)


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


class Policy(TaskPolicy):
    """Octo with one of the heads. The consistency head is the RL scripts' actor, under the same name."""

    def __init__(self, args: Args, demos: Demos):
        super().__init__(args, demos)
        sizes = (self.feature_dim, self.chunk_unit, args.hidden_dim, args.num_layers)
        if args.head == "diffusion":
            # Octo's head: unit variance, actions up to +-5
            self.actor = DiffusionHead(self.feature_dim, self.H, self.action_dim, args.hidden_dim, args.num_layers + 1)
            self.actor.register_buffer("unit", SIGMA_DATA * self.chunk_unit)
        else:
            self.actor = {"consistency": ConsistencyActor, "mse-chunk": MSEHead}[args.head](*sizes)

    def loss(self, feature: Tensor, chunk: Tensor, generator: torch.Generator, n: int) -> Tensor:
        """Features [B, F], chunks [B, H*A] in [-1, 1] -> [B], or a scalar (diffusion)."""
        if isinstance(self.actor, ConsistencyActor):
            return consistency_loss(self.actor, feature, chunk, generator, n)
        if isinstance(self.actor, MSEHead):
            return mse_loss(self.actor(feature), chunk / self.actor.unit)
        chunk = (chunk / self.actor.unit).unflatten(1, (self.H, -1))
        return self.actor.loss(feature.repeat(n, 1), chunk.repeat(n, 1, 1), generator)

    def act(self, feature: Tensor, generator: torch.Generator) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] in [-1, 1]."""
        if isinstance(self.actor, ConsistencyActor):
            chunk = self.actor.sample(feature, 1, generator)[:, 0]
        elif isinstance(self.actor, MSEHead):
            chunk = self.actor.unit * self.actor(feature)
        else:
            chunk = self.actor.unit * self.actor.sample(feature, 1, generator)[:, 0].flatten(1)
        return chunk.clamp(-1, 1).unflatten(1, (self.H, -1)).cpu().numpy()


# === Losses: pure functions ==========================================================================================
def mse_loss(predicted: Tensor, chunk: Tensor) -> Tensor:
    """Mean squared error of a chunk. Shapes: [B, D], [B, D] -> [B]. Source: CO-RFT (arXiv:2508.02219), stage 1."""
    return (predicted - chunk).square().mean(-1)


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


def action_error(predicted: Tensor, chunk: Tensor, spread: Tensor) -> Tensor:
    """Squared error of predicted chunks in units of the demonstrations' variance: 0 perfect, about 1 the mean action.

    Shapes: [B, H, A], [B, H, A], spread [A] (standard deviations) -> [A].
    """
    return ((predicted - chunk) / spread).square().mean((0, 1))


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


class Run:
    """The state of a run that a checkpoint holds."""

    def __init__(self, args: Args, folder: Path, demos: Demos):
        self.args, self.folder, self.demos, self.mark = args, folder, demos, time.time()
        torch.manual_seed(args.seed)
        self.policy = Policy(args, demos).to(args.device)
        self.chunks = Chunks(demos, self.policy, args.holdout)
        self.trained = self.policy if args.finetune == "full" else self.policy.actor
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
        self.average = torch.optim.swa_utils.AveragedModel(self.policy, multi_avg_fn=decay)
        devices = {"batch": "cpu", "update": args.device}
        self.generators = {k: torch.Generator(d).manual_seed(args.seed + i) for i, (k, d) in enumerate(devices.items())}
        self.update, self.evals, self.seconds = 0, [], 0.0

    @property
    def acting(self) -> Policy:
        return self.average.module

    @cached_property
    def env(self):
        return make_env(self.args, self.args.num_envs)

    def save(self) -> None:
        self.seconds, self.mark = self.seconds + time.time() - self.mark, time.time()
        state = {
            "update": self.update, "evals": self.evals, "seconds": self.seconds,
            "generators": {k: g.get_state() for k, g in self.generators.items()},
            "optimizer": self.optimizer.state_dict(), "raw": self.policy.state_dict(),
            "averaged": self.average.n_averaged, "log_size": (self.folder / "metrics.csv").stat().st_size,
        }  # fmt: skip
        save_checkpoint(self.folder, f"update-{self.update}", self.acting.state_dict(), state)

    def load(self) -> None:
        weights, state = load_checkpoint(self.folder)
        load_weights(self.acting, weights, self.folder)
        load_weights(self.policy, state["raw"], self.folder)
        self.update, self.evals, self.seconds = state["update"], state["evals"], state["seconds"]
        if self.args.eval_only:
            return
        self.average.n_averaged.copy_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        os.truncate(self.folder / "metrics.csv", state["log_size"])  # what was logged after that checkpoint goes

    def evaluate(self, logger: Logger, episodes: int) -> None:
        metrics = evaluate(self.env, self.acting, self.args, self.acting.act, episodes)
        logger.log(metrics, 0, self.update)
        self.evals.append({"update": self.update} | metrics)
        once, low, high = (metrics[f"eval/success_once{end}"] for end in ("", "_low", "_high"))
        line = f"update {self.update:6d} | success {once:.2f} [{low:.2f}, {high:.2f}]"
        tqdm.write(f"{line} | steps to success {metrics['eval/episode_len']:.1f}")

    @torch.no_grad()
    def validate(self) -> dict[str, Tensor]:
        """Loss and action error on the held-out demonstrations, with the same noise every time."""
        g, rows = torch.Generator(self.args.device).manual_seed(0), self.chunks.held
        predicted, losses = [], []
        for part in rows.split(256):
            feature = self.acting.feature(self.demos.at(part, self.policy.window))
            chunk = self.chunks.chunk(part).to(self.args.device)
            losses.append(self.acting.loss(feature, chunk, g, 1).mean() * len(part) / len(rows))
            predicted.append(torch.from_numpy(self.acting.act(feature, g)))
        spread = SIGMA_DATA * self.policy.chunk_unit[: self.policy.action_dim].cpu()
        error = action_error(torch.cat(predicted), self.chunks.chunk(rows).unflatten(1, (self.chunks.H, -1)), spread)
        logs = {"val/loss": sum(losses), "val/action_error": error.mean()}
        return logs | {f"val/action_error_{i}": e for i, e in enumerate(error)}


def train(run: Run, logger: Logger) -> None:
    """Gradient steps on random batches; with a frozen backbone, each observation is embedded once."""
    args, policy, chunks, g = run.args, run.policy, run.chunks, run.generators
    if "primary" in run.demos.obs:
        torch.set_num_threads(args.torch_threads or THREADS)
    if args.finetune == "head":
        with torch.no_grad():
            rows = torch.arange(len(chunks.action)).split(256)
            cached = torch.cat([policy.feature(run.demos.at(r, policy.window)).cpu() for r in rows])
    latest, title = "", f"BC, {args.head} head"
    with tqdm(total=args.updates, initial=run.update, desc=title, mininterval=2) as bar:
        while run.update < args.updates:
            done = run.update / args.updates
            rate = min((run.update + 1) / (0.05 * args.updates), 0.5 * (1 + math.cos(math.pi * done)))
            run.optimizer.param_groups[0]["lr"] = args.lr * rate
            rows = chunks.train[torch.randint(len(chunks.train), (args.batch_size,), generator=g["batch"])]
            if args.finetune == "head":
                feature = cached[rows].to(args.device)
            else:
                obs = run.demos.at(rows, policy.window)
                images = {k: random_shift(v, g["batch"]) for k, v in obs.items() if v.dim() == 5}
                feature = policy.feature(obs | images)
            feature = policy.perturb(feature, args.proprio_noise, g["update"])
            loss = policy.loss(feature, chunks.chunk(rows).to(args.device), g["update"], args.noise_levels).mean()
            run.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(run.trained.parameters(), args.max_grad_norm)
            run.optimizer.step()
            run.average.update_parameters(policy)
            run.update += 1
            bar.update()
            if run.update % args.log_freq == 0:
                logger.log({"losses/bc": loss, "grad_norm/bc": norm, "lr/bc": args.lr * rate}, 0, run.update)
            if len(chunks.held) and run.update % args.val_freq == 0:
                logger.log(values := run.validate(), 0, run.update)
                latest = f" | held-out action error {values['val/action_error']:.3f}"
            if args.eval_freq and run.update % args.eval_freq == 0 and run.update < args.updates:
                run.evaluate(logger, args.eval_episodes)
            if run.update % args.checkpoint_freq == 0:
                run.save()
            success = f" | success {run.evals[-1]['eval/success_once']:.2f}" if run.evals else ""
            bar.set_description(title + latest + success, refresh=False)
    torch.set_num_threads(args.torch_threads or 1)


def begin(args: Args) -> Run:
    """A run in a new folder, or one resumed from its last checkpoint."""
    resumed = args.resume or args.eval_only
    if resumed:
        args = stored_args(args, "eval_episodes")
    validate(args)
    torch.set_num_threads(args.torch_threads or 1)
    demos = load_demos(args)
    name = f"{args.env_id}-bc-{args.head}-{args.obs_mode}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(resumed) if resumed else Path(args.runs) / (args.run_name or name)
    if not resumed and (folder / "config.json").exists():
        raise UserError(f"{folder} exists: choose another --run-name, or go on with it by --resume {folder}")
    run = Run(args, folder, demos)
    if not resumed:
        make_env(args, 1).close()  # fails here or not at all
        folder.mkdir(parents=True, exist_ok=True)
        config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "demonstrations": demos.source}
        write_json(folder / "config.json", config | {"weights": run.policy.weights} | provenance())
    if resumed:
        run.load()
    return run


def main(args: Args) -> Path:
    """Train, evaluate and film, or resume; returns the run's folder."""
    # INFRASTRUCTURE: flags, folder, demonstrations, networks
    run = begin(args)
    args, folder = run.args, run.folder
    if args.eval_only:
        metrics = evaluate(run.env, run.acting, args, run.acting.act, args.eval_episodes)
        print(json.dumps(metrics, indent=2))
        return folder
    logger = Logger(folder, args, run.update)

    # ALGORITHM
    train(run, logger)
    run.evaluate(logger, args.eval_episodes)

    # INFRASTRUCTURE: results
    run.save()
    logger.close()
    last = run.evals[-1]
    summary = {
        "success_once": last["eval/success_once"],
        "success_interval": [last["eval/success_once_low"], last["eval/success_once_high"]],
        "success_at_end": last["eval/success_at_end"], "steps_to_success": last["eval/episode_len"],
        "demo_steps_to_success": float((run.demos.steps + run.demos.idle).mean()), "seconds": run.seconds, "evaluations": run.evals,
        "demonstrations": run.demos.source, "env_id": args.env_id, "seed": args.seed,
    }  # fmt: skip
    write_json(folder / "summary.json", summary | provenance())
    if args.video_episodes:
        film(run.acting, args, run.acting.act, folder / "videos")
    run.env.close()
    print(f"done: success {last['eval/success_once']:.2f}, results in {folder}")
    return folder


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
