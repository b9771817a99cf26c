"""ConRFT: reinforced fine-tuning of a vision-language-action policy by a consistency head (arXiv:2502.05450).

A policy is cloned from demonstrations (stage 0; the paper starts from a released VLA). Offline, Cal-ConRFT trains the
head and a critic on the same data (stage I); online, HIL-ConRFT goes on with a plain critic, while an operator may take
over (stage II). The Octo backbone is trained in stage 0 only; afterwards an observation is embedded once.

Equations (numbers of the paper)                                             where
  (1)     stage I critic: TD + alpha * (LSE over max(Q, V_mu) - Q(data))       td_target, calql_loss, critic_loss
  (3)     stage I actor: beta * BC + eta * L_Q                                 consistency_loss, q_loss, actor_loss
  (4)     stage II critic: plain TD, on demonstrations and replay by halves    td_target, critic_loss, draw
  (5)     stage II actor: as (3), with other weights                           actor_loss
  intervention: the operator's action in the place of the policy's             WatchedEnv, collect, add_intervention

Commands
  python conrft.py --env-id PickCube-v1 --obs-mode state                          # no operator (FORCE's baseline)
  python conrft.py --env-id PickCube-v1 --obs-mode state --intervention oracle    # the motion planner helps
  python conrft.py --env-id PickCube-v1 --intervention gamepad --record-demos pick.h5
  python conrft.py --sft-checkpoint runs/NAME                                     # start from a run of bc.py
  python conrft.py --online-steps 0 --fresh-head --bc-weight-offline 0 --q-weight-offline 1    # Cal-QL alone
  python conrft.py --resume runs/NAME                                             # go on after a kill
  python conrft.py --eval-only runs/NAME                                          # evaluate the last checkpoint

Where the default differs from the paper (--preset paper: without 1, 2 and 9; --preset code: as the official code, which
differs from the paper in the weights, in what the return bounds, and at time limits; docs/conrft.md)
  1 position control, chunks of 4 actions with chunked TD, reward 0/1, more demonstrations, small budgets
  2 the head of stage 0 is kept (--fresh-head: stage I starts with a new one, as with a released VLA)
  3 the critic reads the frozen backbone's embedding and proprio; the paper's is a ResNet on the images
  4 truncated episodes bootstrap, and TD targets stay within possible returns (--truncation terminal: as in the code)
  5 BC is the code's weighted squared error, in units of the actions' spread; the paper writes a plain distance
  6 actor and learner take turns, an episode and --utd-ratio updates per step of it; the paper runs them side by side
  7 proprio has no velocities, and is noisy in updates beside a camera (--proprio-noise)
  8 actions stay within 1.5 times the demonstrations' largest, random ones of the conservative term too
  9 the online Q loss weighs 0.1 (pushing from state: 0.3), not 1, by which success falls here (docs/tuning.md)
Flags, run folders, checkpoints, logs and demonstration files are in plumbing/, operators in operators/; neither holds a
part of the algorithm.
"""

from __future__ import annotations

import plumbing  # noqa: F401  first: it sets how OpenMP's threads wait, which torch reads once

# isort: split
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.octo_policy import OctoPolicy, check_octo, random_shift
from backbones.units import SIGMA_DATA, adamw, gaussian, set_lr, tanh_
from operators.devices import DEVICES, Gone
from operators.interventions import Interventions, check_recording, write_demonstrations
from operators.planner import Oracle, check_planner
from plumbing import (
    FILM,
    Demos,
    Evaluator,
    ObsWrapper,
    Played,
    Run,
    RunArgs,
    Slots,
    Table,
    UserError,
    camera_configs,
    check_flags,
    check_sft,
    compiled,
    film,
    fixed,
    lighten,
    load_demos,
    load_sft_weights,
    mean_over_ranks,
    or_robot,
    parse_flags,
    per_rank,
    prepare_process,
    run_script,
    simulator_errors,
    stored_args,
    success_metrics,
    task_of,
    threads,
)  # fmt: skip


# === Arguments =======================================================================================================
@dataclass
class Args(RunArgs):
    # --- environment ---
    obs_mode: Literal["rgb", "state"] = "rgb"  # camera + proprio, or privileged state (fast)
    control_mode: str = "pd_ee_delta_pos"  # ManiSkill controller; the paper uses pd_ee_delta_pose
    control_freq: int = 10  # control steps per second (ManiSkill's default is 20, the paper's robot runs at 10)
    max_episode_steps: int | None = None  # time limit in control steps; default: per task, see plumbing/tasks.py
    robot_uids: str = "panda"  # robot model
    cameras: Literal["primary", "both"] = "both"  # one that looks at the table, or one on panda's hand too (rgb)
    image_size: int = 64  # pixels a side (hand: half of it, from 64 on); released weights need 256
    full_meshes: bool = False  # draw the arm with all of its triangles: three times as long without a GPU
    reward: Literal["binary", "conrft"] = "binary"  # 1 or 0 a step; ConRFT: +10 or -0.05
    sim_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"  # physx_cuda: all in one GPU batch
    num_envs: int = 2  # environments side by side (physx_cpu: a process each)

    # --- model ---
    backbone: Literal["octo-compact", "octo-small", "octo-base"] = "octo-compact"  # size of the Octo backbone
    checkpoint: str | None = None  # released Octo weights to start from: a folder, or hf://owner/name[@revision]
    hidden_dim: int = 256  # width of actor and critic
    num_critics: int = 2  # critics in the ensemble; TD targets take the minimum of two random ones
    noise_levels: int = 8  # noise levels drawn per sample in the policy's loss
    chunk_len: int = 4  # H: actions per decision, executed open loop (1 = the paper's)

    # --- stage 0: supervised fine-tuning ---
    sft_checkpoint: str | None = None  # run folder of bc.py (consistency head) to start from in the place of stage 0
    sft_updates: int = 6000  # updates of stage 0
    sft_lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    sft_batch_size: int = 64  # transitions per batch
    weight_decay: float = 1e-4  # of matrices and kernels (stage 0)
    proprio_noise: float = 0.1  # noise on proprio in every update, in standard deviations of the demonstrations
    fresh_head: bool = False  # stage I starts with a new head on the backbone of stage 0

    # --- stages I (offline) and II (online) ---
    preset: Literal["default", "paper", "code"] = "default"  # the paper's or the official code's choices; flags win
    gamma: float = 0.98  # discount per control step
    reinforce_lr: float = 3e-4  # learning rate of actor and critic after stage 0 (Adam, constant)
    batch_size: int = 128  # transitions per batch; stage II: half demonstrations, half replay
    tau: float = 0.01  # Polyak step of the target critics
    critic_updates: int = 2  # critic updates per actor update
    offline_updates: int = 1000  # stage I: actor updates; after so many the critic is calibrated
    online_steps: int = 10_000  # stage II: control steps, summed over environments
    eval_freq: int = 2000  # stage II: control steps between evaluations
    utd_ratio: float = 0.5  # stage II: actor updates per control step
    truncation: Literal["bootstrap", "terminal"] = "bootstrap"  # what a time limit means for targets and returns
    cql_weight: float = 0.02  # alpha: weight of the conservative term in stage I
    cql_weight_online: float = 0.0  # the same in stage II (in neither paper nor code)
    cql_samples: int = 2  # sampled actions of each kind in the conservative term (random, pi(s), pi(s'))
    calibrate: bool = True  # --no-calibrate: CQL without the Monte-Carlo bound
    bound_random: bool = False  # bound the random actions by the Monte-Carlo return too (the code's)
    bc_weight_offline: float = 1.0  # beta: weight of BC in stage I (0: Cal-QL alone)
    bc_weight_online: float = 0.5  # the same in stage II
    q_weight_offline: float = 0.1  # eta: weight of the Q loss in stage I
    q_weight_online: float = 0.1  # the same in stage II
    q_scale: Literal["raw", "mean-abs"] = "raw"  # mean-abs divides the Q loss by the batch mean of |Q| (not in ConRFT)
    onestep_mse: float = 0.0  # weight of the squared error of one-step samples within BC (in neither paper nor code)
    bc_demo_only: bool = False  # stage II: BC on the demonstrations' half of the batch only (in neither paper nor code)

    # --- human in the loop ---
    intervention: Literal["none", "oracle", "keyboard", "gamepad", "spacemouse"] = "none"  # who may take over
    takeover_after: int | None = None  # oracle: takes over after so many steps; default: the slowest demonstration's
    device_speed: float = 0.3  # full deflection of a device, as a share of the controller's box
    record_demos: str | None = None  # write successful episodes with interventions to this .h5, for --demo-path


# The defaults above are for cameras. What else a choice changes; flags on the command line always win.
BY_OBS_MODE = {"state": dict(num_envs=1, proprio_noise=0.0, weight_decay=1.0, online_steps=25_000)}
PUSH = dict(online_steps=8000, q_weight_online=0.3)  # pushing stands more of the Q loss (docs/tuning.md)
BY_TASK = {  # as many control steps as FORCE
    ("PushCube-v1", "state"): PUSH,
    ("PullCube-v1", "state"): PUSH,
    ("PickCube-v1", "state"): dict(online_steps=15_000),
}
PAPER = dict(
    control_mode="pd_ee_delta_pose", reward="conrft", tau=0.005, batch_size=256, chunk_len=1,
    noise_levels=1, cql_samples=10, offline_updates=20_000, online_steps=10_000, utd_ratio=1.0, num_demos=30,
    fresh_head=True, q_weight_online=1.0, weight_decay=1e-4,
)  # fmt: skip
CODE = dict(cql_weight=0.1, bound_random=True, q_weight_offline=0.0, bc_weight_online=0.1, truncation="terminal")
BY_PRESET = {"paper": PAPER, "code": PAPER | CODE}
BY_OPERATOR = dict.fromkeys(["oracle", *DEVICES], dict(num_envs=1))  # he can't be everywhere
TABLES = {
    "obs_mode": BY_OBS_MODE, "env_id obs_mode": BY_TASK, "preset": BY_PRESET, "intervention": BY_OPERATOR,
}  # fmt: skip

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """control_freq noise_levels hidden_dim num_critics chunk_len sft_batch_size
        critic_updates cql_samples eval_freq"""),
    "at least 2": (lambda x: x >= 2, "batch_size"),
    "positive": (lambda x: x > 0, "sft_lr reinforce_lr"),
    "within [0, 1]": (lambda x: 0 <= x <= 1, "tau device_speed"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Fill in and check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    check_flags(args, LIMITS)
    check_octo(args)
    if args.intervention == "oracle":
        check_planner(args.env_id)
    one = args.num_envs == 1 and args.sim_backend == "physx_cpu"
    if args.intervention != "none" and not (one and "ee_delta" in args.control_mode):
        raise UserError("--intervention needs --num-envs 1, --sim-backend physx_cpu and a pd_ee_delta controller")
    if args.record_demos and not args.eval_only:
        check_recording(args)
    check_sft(args, head="consistency")
    if args.intervention in DEVICES and not args.eval_only:
        DEVICES[args.intervention].check(args)


# === Environment =====================================================================================================
def make_maniskill(args: Args, num_envs: int = 1, render: bool = False) -> ObsWrapper:
    """A batch of ManiSkill environments in this process (physx_cpu: of one). Raises: UserError."""
    prepare_process(args)
    on_gpu = args.sim_backend == "physx_cuda"
    with simulator_errors(args.env_id):
        env = gym.make(
            args.env_id,
            num_envs=num_envs,
            obs_mode="rgb" if args.obs_mode == "rgb" else "state_dict",
            control_mode=args.control_mode,
            robot_uids=args.robot_uids,
            sensor_configs=camera_configs(args),
            sim_config=dict(control_freq=args.control_freq),
            sim_backend=args.sim_backend,
            render_backend="gpu" if on_gpu else "cpu",
            render_mode=FILM[args.obs_mode] if render else None,
            human_render_camera_configs=dict(width=256, height=256),
            reward_mode="none",
            max_episode_steps=1_000_000,  # `rollout` keeps the time limit
            reconfiguration_freq=0 if on_gpu else 1,  # PhysX on the CPU remembers contacts across resets
        )
    if args.obs_mode == "rgb" and not (on_gpu or args.full_meshes):
        env = lighten(env)
    return ObsWrapper(env)


@or_robot
def make_env(args: Args, num_envs: int, render: bool = False):
    """num_envs environments without auto-reset, the same for every backend. Seeds decide the initial states.

    reset(seed=[num_envs integers]) -> obs, {}
    step(action [num_envs, A] in the controller's units) -> obs, success [num_envs], unused, unused, {"ended": ...}
    """
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    if args.sim_backend == "physx_cuda":
        return make_maniskill(args, num_envs, render)
    make = [lambda: CPUGymWrapper(make_maniskill(args, 1, render))] * num_envs
    never = gym.vector.AutoresetMode.DISABLED
    if num_envs == 1:
        return gym.vector.SyncVectorEnv(make, autoreset_mode=never)
    return gym.vector.AsyncVectorEnv(make, context="spawn", autoreset_mode=never)


class WatchedEnv:
    """The environment of training episodes, with an operator who may take over; keeps what `rollout` doesn't.

    Since its last reset: taken [T] says where the operator acted, and executed [T, A] what the first environment did, in
    controller units.
    """

    def __init__(self, env, operator):
        self.env = env
        self.operator = operator  # None, or one of operators/; it needs an environment of one

    def reset(self, seed, options):
        found = self.env.reset(seed=seed, options=options)
        if self.operator:
            self.operator.start(seed[0])
        self.taken = []
        self.executed = []
        return found

    def step(self, action: np.ndarray):
        """action [N, A] of the policy, in controller units; the operator's takes its place."""
        own = None
        if self.operator:
            own = self.operator(len(self.taken), action[0])
        if own is not None:
            action = own[None]
        self.taken.append(own is not None)
        self.executed.append(action[0])
        return self.env.step(action)


# === Replay ==========================================================================================================
@dataclass
class Batch:
    """Transitions between decisions. B samples, F features, H-step chunks of A-dimensional actions."""

    feature: Tensor  # [B, F] embedding and normalised proprio at t
    chunk: Tensor  # [B, H*A] actions t..t+H-1, normalised to [-1, 1], time-major
    reward: Tensor  # [B] sum over i < n of gamma^i * r_{t+i};  n = H, or fewer where the episode ends
    bootstrap: Tensor  # [B] gamma^n, or 0 if the episode terminated at t + n (not: was truncated)
    next_feature: Tensor  # [B, F] at t + n
    mc_return: Tensor  # [B] discounted return from t on
    expert: Tensor  # [B] bool: from the demo buffer

    def cat(self, other: Batch) -> Batch:
        pairs = zip(vars(self).values(), vars(other).values())
        return Batch(*map(torch.cat, pairs))


class Reward(NamedTuple):
    """Of a control step, by whether it succeeds."""

    fail: float
    success: float


REWARDS = {"binary": Reward(0.0, 1.0), "conrft": Reward(-0.05, 10.0)}


def mc_returns(reward: np.ndarray, terminated: bool, gamma: float, reward_failure: float) -> np.ndarray:
    """Monte-Carlo returns-to-go, with the lower bound r_fail / (1 - gamma) standing for what follows a truncation.

    Shapes: reward [T] -> [T]. Source: Cal-QL's rule for sparse rewards, extended to every truncation.
    """
    value = 0.0 if terminated else reward_failure / (1 - gamma)
    returns = np.empty_like(reward)
    for t in reversed(range(len(reward))):
        value = returns[t] = reward[t] + gamma * value
    return returns


@dataclass
class Episode:
    """T steps; more actions than that are what was recorded, or planned, after its end."""

    feature: Tensor  # [T+1, F], empty if not asked for
    action: np.ndarray  # [L, A] normalised, L >= T
    success: np.ndarray  # [T] at each step
    terminated: bool  # at T


class ReplayBuffer:
    """Whole episodes, one row per observation; chunked transitions are put together when they are drawn."""

    def __init__(self, agent: Agent, args: Args, expert: bool):
        self.expert = expert
        self.chunk_len = args.chunk_len
        self.gamma = args.gamma
        self.steps = Table({
            "feature": torch.empty(0, agent.feature_dim),
            "action": torch.empty(0, agent.action_dim),
            "reward": torch.empty(0),  # of the chunk that starts here
            "bootstrap": torch.empty(0),
            "mc_return": torch.empty(0),
            "next": torch.empty(0, dtype=torch.long),  # row at which that chunk ends
            "last": torch.empty(0, dtype=torch.long),  # row of the episode's last observation
        }, args.device)  # fmt: skip
        self.starts = Table({"row": torch.empty(0, dtype=torch.long)}, args.device)  # from which a chunk may be drawn
        self.tables = {"steps": self.steps, "starts": self.starts}  # what a checkpoint holds

    def add(self, episode: Episode, reward: Reward, hold: np.ndarray, own: np.ndarray | None = None) -> None:
        """Append one episode of T steps. Chunks that a time limit cuts short are left out.

        The L >= T actions (recorded or planned past the end) fill up its last chunks; `hold` [A], the action that keeps
        still, fills up after those. `own` [T] bool: where a chunk may start; by default everywhere.
        """
        T = len(episode.success)
        L = len(episode.action)
        H = self.chunk_len
        row = self.steps.rows + np.arange(L + 1)

        # Rows 0..T-1: chunks of n steps, n = H or fewer at the end.
        earned = np.where(episode.success, reward.success, reward.fail)
        n = np.minimum(H, T - np.arange(T))
        padded = np.pad(earned, (0, H - 1))
        discounts = self.gamma ** np.arange(H)
        chunk_reward = np.lib.stride_tricks.sliding_window_view(padded, H) @ discounts
        ends_here = episode.terminated & (np.arange(T) + n == T)
        bootstrap = np.where(ends_here, 0.0, self.gamma**n)
        returns = mc_returns(earned, episode.terminated, self.gamma, reward.fail)

        past = np.zeros(L + 1 - T)  # rows T..L, recorded past the end: never drawn
        self.steps.append(
            L + 1,
            feature=episode.feature,
            action=np.concatenate([episode.action, hold[None]]),
            reward=np.append(chunk_reward, past),
            bootstrap=np.append(bootstrap, past),
            mc_return=np.append(returns, past),
            next=np.append(row[:T] + n, row[T:]),
            last=row[-1:],
        )
        whole = T
        if not episode.terminated:
            whole = max(T - H + 1, 0)
        start = row[:whole]
        if own is not None:
            start = start[own[:whole]]
        self.starts.append(len(start), row=start)

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows of `size` decisions, uniform with replacement: [size] int64."""
        rows = self.starts["row"]
        chosen = torch.randint(len(rows), (size,), generator=generator, device=rows.device)
        return rows[chosen]

    def gather(self, rows: Tensor) -> Batch:
        """The transitions that start at rows [B]."""
        steps = self.steps
        offsets = torch.arange(self.chunk_len, device=rows.device)
        ahead = rows[:, None] + offsets  # [B, H]
        last = steps["last"][rows][:, None]
        following = steps["next"][rows]
        return Batch(
            feature=steps["feature"][rows],
            chunk=steps["action"][ahead.minimum(last)].flatten(1),
            reward=steps["reward"][rows],
            bootstrap=steps["bootstrap"][rows],
            next_feature=steps["feature"][following],
            mc_return=steps["mc_return"][rows],
            expert=torch.full((len(rows),), self.expert, device=rows.device),
        )


# === Networks ========================================================================================================
SIGMA_MIN = 0.002  # ConRFT, as EDM; SIGMA_DATA: the spread of actions
SIGMA_MAX = 80.0
RHO = 7.0
NUM_SIGMAS = 40


def karras_sigmas(device: torch.device | str = "cpu") -> Tensor:
    """The 40 noise levels, descending from 80 to 0.002."""
    i = torch.arange(NUM_SIGMAS, device=device) / (NUM_SIGMAS - 1)
    high = SIGMA_MAX ** (1 / RHO)
    low = SIGMA_MIN ** (1 / RHO)
    return (high + i * (low - high)) ** RHO


class ConsistencyActor(nn.Module):
    """One-step consistency policy over action chunks (ConRFT): f(x, sigma | feature) is the denoised chunk.

    It works in its own units, in which each dimension's standard deviation is SIGMA_DATA: chunk in [-1, 1] = unit * x.
    The part of the first layer that reads the feature is computed once per state and shared by its N samples.
    """

    def __init__(self, feature_dim: int, unit: Tensor, hidden: int, time_dim: int = 16):
        super().__init__()
        self.chunk_dim = len(unit)
        self.time_dim = time_dim
        self.register_buffer("unit", unit.clone())  # [D]
        widen = nn.Linear(time_dim, 2 * time_dim)
        narrow = nn.Linear(2 * time_dim, time_dim)
        self.time = nn.Sequential(widen, nn.Tanh(), narrow)
        self.feature_in = nn.Linear(feature_dim, hidden)
        self.sample_in = nn.Linear(self.chunk_dim + time_dim, hidden, bias=False)
        norms = [nn.LayerNorm(hidden, eps=1e-6) for _ in range(2)]
        self.norms = nn.ModuleList(norms)
        self.hidden = nn.ModuleList([nn.Linear(hidden, hidden)])
        self.out = nn.Linear(hidden, self.chunk_dim)

    def denoise(self, feature: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Shapes: feature [B, F], x [B, N, D], sigma [B or 1, N or 1] -> [B, N, D] within the action box, own units."""
        sigma = sigma[..., None]  # [B, N, 1]
        # Scalings with f(x, sigma_min) = x exactly.
        above = sigma - SIGMA_MIN
        both = (sigma**2 + SIGMA_DATA**2).sqrt()
        c_skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
        c_out = above * SIGMA_DATA / both
        c_in = 1 / both

        half = self.time_dim // 2
        steps = torch.arange(half, device=x.device)
        decay = -math.log(10_000) / (half - 1)
        frequency = torch.exp(decay * steps)
        angle = 250 * torch.log(sigma + 1e-44) * frequency
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        time = self.time(waves)
        time = time.expand(*x.shape[:-1], -1)

        sample = torch.cat([c_in * x, time], -1)
        h = self.feature_in(feature)[:, None] + self.sample_in(sample)  # [B, N, hidden]
        layers = [*self.hidden, self.out]
        for norm, layer in zip(self.norms, layers):
            h = layer(tanh_(norm(h)))
        box = 1 / self.unit
        return (c_out * h + c_skip * x).clamp(-box, box)

    def sample(self, feature: Tensor, n: int, generator) -> Tensor:
        """Draw n chunks per state, in one step: [B, n, D] in [-1, 1]."""
        noise = gaussian((len(feature), n, self.chunk_dim), feature, generator)
        sigma = noise.new_full((1, 1), SIGMA_MAX)
        x = self.denoise(feature, SIGMA_MAX * noise, sigma)
        return self.unit * x


class QNetwork(nn.Module):
    """Q(s, chunk). What the first layer makes of the feature is computed once per state, for all its chunks."""

    def __init__(self, feature_dim: int, chunk_dim: int, hidden: int):
        super().__init__()
        self.sizes = [feature_dim, chunk_dim]
        self.first = nn.Linear(sum(self.sizes), hidden)
        norms = [nn.LayerNorm(hidden, eps=1e-6) for _ in range(2)]
        self.norms = nn.ModuleList(norms)
        middle = nn.Linear(hidden, hidden)
        last = nn.Linear(hidden, 1)
        self.layers = nn.ModuleList([middle, last])
        for layer in (self.first, *self.layers):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor, chunk: Tensor) -> Tensor:
        """Shapes: feature [B, F], chunk [B, N, D] in the actor's units -> [B, N]."""
        of_feature, of_chunk = self.first.weight.split(self.sizes, 1)
        h = F.linear(feature, of_feature, self.first.bias)[:, None]
        h = h + F.linear(chunk, of_chunk)  # [B, N, hidden]
        for norm, layer in zip(self.norms, self.layers):
            h = layer(tanh_(norm(h)))
        return h[..., 0]


class EnsembleCritic(nn.Module):
    """E critics."""

    def __init__(self, num_critics: int, feature_dim: int, unit: Tensor, hidden: int):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [D], as the actor's
        critics = [QNetwork(feature_dim, len(unit), hidden) for _ in range(num_critics)]
        self.critics = nn.ModuleList(critics)

    def forward(self, feature: Tensor, chunk: Tensor) -> Tensor:
        """Shapes: feature [B, F], chunk [B, D] or [B, N, D] in [-1, 1] -> Q [E, B] or [E, B, N]."""
        scaled = chunk / self.unit
        chunks = scaled.reshape(len(chunk), -1, chunk.shape[-1])
        q = torch.stack([critic(feature, chunks) for critic in self.critics])
        return q.view(-1, *chunk.shape[:-1])


class Agent(OctoPolicy):
    """Everything that is learned."""

    def __init__(self, args: Args, demos: Demos):
        """Raises: UserError if the weights of --checkpoint can't be had."""
        resumed = bool(args.resume or args.eval_only)
        super().__init__(
            args.backbone, args.checkpoint, resumed, demos.obs, demos.taken(), args.chunk_len,
            relative="delta" in args.control_mode, gripper=demos.gripper,
            instruction=task_of(args.env_id).instruction,
        )  # fmt: skip
        sizes = (self.feature_dim, self.chunk_unit, args.hidden_dim)
        self.actor = ConsistencyActor(*sizes)
        self.critic = EnsembleCritic(args.num_critics, *sizes)
        self.target_critic = EnsembleCritic(args.num_critics, *sizes)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)

    def act(self, feature: Tensor, generator: torch.Generator) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] normalised."""
        chunk = self.actor.sample(feature, 1, generator)[:, 0]
        return chunk.unflatten(1, (self.H, -1)).cpu().numpy()

    def clip(self, action: np.ndarray) -> np.ndarray:
        """An operator's action [A], kept within the policy's box, so that what is stored is what was done."""
        return self.denormalise(self.normalise(action)).astype(np.float32)


# === Losses: pure functions ==========================================================================================
def td_target(batch: Batch, next_q: Tensor, low: float, high: float) -> Tensor:
    """y = sum gamma^i r_i + gamma^n * min_k Q'_k(s', a'), a' ~ pi(.|s'), kept within the returns that exist.

    Shapes: next_q [critics in the minimum, B] -> [B].
    Source: B Q of Eq. (4), for chunks as in Q-chunking (arXiv:2507.07969); the bounds are ours.
    """
    target = batch.reward + batch.bootstrap * next_q.min(0).values
    return target.clamp(low, high)


def calql_loss(
    q_data: Tensor, q_random: Tensor, q_policy: Tensor, mc_return: Tensor, bound_random: bool
) -> tuple[Tensor, Tensor]:
    """The conservative term of Eq. (1): LSE over sampled actions of max(Q, Monte-Carlo return), minus Q(data).

    Without importance sampling, since a consistency policy has no density; the data action belongs to the LSE, which
    bounds the push on it. The constant log(n + m + 1) leaves gradients alone and makes equal values give zero.
    Shapes: q_data [E, B], q_random [E, B, n], q_policy [E, B, m], mc_return [B] -> scalar, and the share of q_policy
    below its bound.
    Source: Cal-QL (arXiv:2303.05479), in ConRFT's form; the paper bounds the policy's actions, the code all of them.
    """
    bound = mc_return[None, :, None]
    bounded = torch.maximum(q_policy, bound)
    if bound_random:
        q_random = torch.maximum(q_random, bound)
    entries = torch.cat([q_random, bounded, q_data[..., None]], -1)
    lse = torch.logsumexp(entries, -1)  # over actions, never over the batch
    gap = lse - math.log(entries.shape[-1]) - q_data
    return gap.mean(), (q_policy < bound).float().mean()


def consistency_loss(actor: ConsistencyActor, feature: Tensor, chunk: Tensor, generator, n: int = 1) -> Tensor:
    """The policy's surrogate of -log pi(chunk|s): weighted reconstruction of the chunk from n random noise levels.

    Shapes: feature [B, F], chunk [B, D] in [-1, 1] -> [B].
    Source: ConRFT's L_BC (there n = 1; more share the feature, which is what costs time while the backbone is trained);
    w(sigma) = sigma^-2 + sigma_data^-2 makes it flat in the raw network output.
    """
    B, D = chunk.shape
    device = chunk.device
    sigmas = karras_sigmas(device)[:-1]  # sigma_min itself is the identity
    level = torch.randint(len(sigmas), (B, n), generator=generator, device=device)
    sigma = sigmas[level]  # [B, n]
    clean = (chunk / actor.unit)[:, None]  # [B, 1, D]
    noise = gaussian((B, n, D), chunk, generator)
    noisy = clean + sigma[..., None] * noise
    denoised = actor.denoise(feature, noisy, sigma)  # [B, n, D]
    error = (denoised - clean).square().mean(-1)  # [B, n]
    weight = sigma**-2 + SIGMA_DATA**-2
    return (weight * error).mean(-1)


def q_loss(q: Tensor, scale: str) -> Tensor:
    """L_Q of Eqs. (3) and (5): - mean Q(s, pi(s)) over critics and batch; "mean-abs": over the mean |Q|.

    Shapes: q [E, B] -> scalar.
    """
    size = 1.0
    if scale == "mean-abs":
        size = mean_over_ranks(q.abs().mean().detach()) + 1e-6
    return -q.mean() / size


# === Updates =========================================================================================================
def update_clone(agent: Agent, optimizer, feature: Tensor, chunk: Tensor, args: Args, generator) -> dict:
    """Stage 0: one step of behaviour cloning. Shapes: feature [B, F], chunk [B, D]."""
    feature = agent.perturb(feature, args.proprio_noise, generator)
    loss = consistency_loss(agent.actor, feature, chunk, generator, args.noise_levels).mean()
    grad_norm = descend(optimizer, loss, max_norm=1.0)
    return {"losses/bc": loss, "grad_norm/sft": grad_norm, "lr/sft": optimizer.param_groups[0]["lr"]}


@compiled
def critic_loss(agent: Agent, batch: Batch, args: Args, cql_weight: float, generator) -> tuple[Tensor, dict]:
    """Eq. (1), or Eq. (4) with cql_weight = 0."""
    n = args.cql_samples
    device = batch.chunk.device
    with torch.no_grad():
        next_chunks = agent.actor.sample(batch.next_feature, n if cql_weight else 1, generator)  # [B, n, D]
        two = torch.randperm(args.num_critics, generator=generator, device=device)[:2]
        next_q = agent.target_critic(batch.next_feature, next_chunks[:, 0])[two]
        reward = REWARDS[args.reward]
        lowest = reward.fail / (1 - args.gamma)
        target = td_target(batch, next_q, lowest, reward.success)
    q_data = agent.critic(batch.feature, batch.chunk)  # [E, B]
    loss_td = (q_data - target).square().mean()
    loss = loss_td
    logs = {
        "losses/td": loss_td,
        "values/q_data": q_data.mean(),
        "values/td_target": target.mean(),
        "values/mc_return": batch.mc_return.mean(),
        "values/critic_std": q_data.std(0, correction=0).mean(),
    }
    if cql_weight:
        with torch.no_grad():
            shape = (len(batch.chunk), n, batch.chunk.shape[1])
            uniform = torch.rand(shape, generator=generator, device=device)
            current = agent.actor.sample(batch.feature, n, generator)
        sampled = torch.cat([uniform * 2 - 1, current, next_chunks], 1)  # [B, 3n, D], all evaluated at s
        q_sampled = agent.critic(batch.feature, sampled)
        q_random, q_policy = q_sampled.split([n, 2 * n], -1)
        bound = batch.mc_return
        if not args.calibrate:
            bound = torch.full_like(bound, -torch.inf)
        loss_cql, bound_rate = calql_loss(q_data, q_random, q_policy, bound, args.bound_random)
        logs["calib/bound_rate"] = bound_rate
        logs["losses/calql"] = loss_cql
        loss = loss_td + cql_weight * loss_cql  # Eq. (1)
    logs["losses/critic"] = loss
    return loss, logs


def update_critic(agent: Agent, optimizer, batch: Batch, args: Args, cql_weight: float, generator) -> dict:
    """One step on Eq. (1) or (4), and the Polyak step of the targets."""
    loss, logs = critic_loss(agent, batch, args, cql_weight, generator)
    descend(optimizer, loss)
    polyak_update(agent.critic, agent.target_critic, args.tau)
    return logs


@compiled
def actor_loss(
    agent: Agent, batch: Batch, args: Args, generator, bc_weight: float, q_weight: float
) -> tuple[Tensor, dict]:
    """bc_weight * BC + q_weight * L_Q, Eq. (3) or (5)."""
    bc = consistency_loss(agent.actor, batch.feature, batch.chunk, generator, args.noise_levels)  # [B]
    logs = {}
    if q_weight or args.onestep_mse:
        own = agent.actor.sample(batch.feature, 1, generator)[:, 0]  # [B, D]
    if args.onestep_mse:
        error = (own - batch.chunk) / agent.actor.unit
        error = error.square().mean(-1)  # [B]
        bc = bc + args.onestep_mse * error
        logs["losses/onestep"] = error.mean()
    imitated = batch.expert if args.bc_demo_only else torch.ones_like(batch.expert)
    loss_bc = (imitated * bc).sum() / mean_over_ranks(imitated.sum())
    loss = bc_weight * loss_bc
    if q_weight:
        q = fixed(agent.critic)(batch.feature, own)  # [E, B]
        loss_q = q_loss(q, args.q_scale)
        loss = loss + q_weight * loss_q
        logs["losses/q"] = loss_q
        logs["values/q_policy"] = q.mean()
    logs["losses/bc"] = loss_bc
    logs["losses/actor"] = loss
    return loss, logs


def update_actor(
    agent: Agent, optimizer, batch: Batch, args: Args, generator, bc_weight: float, q_weight: float
) -> dict[str, Tensor]:
    """One step on `actor_loss`."""
    loss, logs = actor_loss(agent, batch, args, generator, bc_weight, q_weight)
    descend(optimizer, loss)
    return logs


def descend(optimizer, loss: Tensor, max_norm: float | None = None) -> Tensor | None:
    """One step down the loss. Returns the norm of the gradient, if it is to be cut to max_norm."""
    grad_norm = None
    optimizer.zero_grad()
    loss.backward()
    if max_norm is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(weights, max_norm)
    optimizer.step()
    return grad_norm


@torch.no_grad()
def polyak_update(source: nn.Module, target: nn.Module, tau: float) -> None:
    """target <- (1 - tau) * target + tau * source, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# === Episodes and buffers ============================================================================================
@torch.inference_mode()
def decide(agent: Agent, obs: dict, noise: list) -> np.ndarray:
    """One chunk for each of n episodes, by what was seen last and a generator for each: [n, H, A] normalised."""
    return agent.act(agent.feature(obs), noise)


def rollout(env, agent: Agent, args: Args, seeds, whole: bool = True, frames=None) -> list[np.ndarray]:
    """Success at each step [T] of episodes with these seeds.

    whole    an episode goes on after a success, to the time limit, to see whether it lasts
    frames   collects the first environment's video
    """
    slots = Slots(env, agent, args, partial(decide, agent), whole=whole, frames=frames)
    return slots.successes(seeds)


def evaluate(env, agent: Agent, args: Args, whole: bool = True) -> dict[str, float]:
    """Success over the fixed evaluation episodes: the same initial states and policy noise every time.

    It leaves torch's global generator and those of training alone, so training doesn't depend on when it is called.
    """
    seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
    with torch.random.fork_rng(devices=[]):
        success = rollout(env, agent, args, seeds, whole)
    return success_metrics(success, args.max_episode_steps, *REWARDS[args.reward])


@torch.inference_mode()
def embedded(played: Played, agent: Agent) -> Episode:
    """A training episode with the features of all its steps."""
    features = map(agent.feature, played.batches(agent.window))
    feature = torch.cat(list(features))
    return Episode(feature, played.action, played.success, played.terminated)


def add_episode(buffer: ReplayBuffer, episode: Episode, agent: Agent, args: Args, own=None) -> None:
    hold = agent.hold_action(episode.action[-1])
    if args.truncation == "terminal":
        episode = replace(episode, terminated=True)
    buffer.add(episode, REWARDS[args.reward], hold, own)


def add_demonstrations(buffer: ReplayBuffer, demos: Demos, agent: Agent, args: Args) -> None:
    """One row per observation, the same rows as in `demos`; features come with `embed_demonstrations`."""
    for start, length, steps in zip(demos.starts(), demos.lengths, demos.steps):
        episode = Episode(
            feature=torch.zeros(length + 1, agent.feature_dim),
            action=agent.normalise(demos.action[start : start + length]),
            success=np.arange(1, steps + 1) == steps,
            terminated=True,
        )
        add_episode(buffer, episode, agent, args)


@torch.no_grad()
def embed_demonstrations(buffer: ReplayBuffer, demos: Demos, agent: Agent) -> None:
    """Each observation of the demonstrations goes through the backbone once, into the demo buffer."""
    features = []
    for rows in torch.arange(len(demos.action)).split(256):
        feature = agent.feature(demos.at(rows, agent.window))
        features.append(feature)
    buffer.steps.rewrite("feature", torch.cat(features))


def add_intervention(demo: ReplayBuffer, episode: Episode, taken: np.ndarray, agent: Agent, args: Args) -> None:
    """An episode with interventions, of which the demo buffer draws the chunks that are all the operator's.

    Shapes: taken [T] bool. Source: the paper, whose chunks are of one action.
    """
    past = np.ones(args.chunk_len - 1, dtype=bool)
    steps = np.append(taken, past)
    chunks = np.lib.stride_tricks.sliding_window_view(steps, args.chunk_len)  # [T, H]
    add_episode(demo, episode, agent, args, own=chunks.all(1))


def as_executed(episode: Episode, taken: np.ndarray, executed: np.ndarray, agent: Agent) -> Episode:
    """The operator's actions in the place of the policy's, whose plan for after the end then no longer holds.

    Shapes: taken [T] bool, executed [T, A] in controller units.
    """
    T = len(taken)
    action = episode.action.copy()
    action[:T][taken] = agent.normalise(executed[taken])
    decision = (T - 1) // agent.H * agent.H  # the last one
    if taken[decision:].any():
        action = action[:T]
    return replace(episode, action=action)


def make_operator(env, agent: Agent, demos: Demos, args: Args):
    """Who may take over in training episodes; evaluation is always without."""
    if args.intervention == "none" or args.eval_only:
        return None
    if args.intervention == "oracle":
        return Oracle(env, args, agent.clip, slowest=int(demos.steps.max()))
    return DEVICES[args.intervention](env, args, agent.clip)


def collect(
    slots: Slots, agent: Agent, args: Args, run: Run, demo: ReplayBuffer, replay: ReplayBuffer, helped: Interventions,
    most: int | None,
) -> int:  # fmt: skip
    """A turn of the slots; no episode begins once the run has had `most`. Returns control steps.

    What ends goes into the replay buffer, the operator's part into the demo buffer too.
    Raises: UserError when the operator has gone, after a checkpoint.
    """
    watched = slots.env
    try:
        ended = slots.turn(run.next_seeds(slots, most))
    except Gone as reason:  # in the middle of an episode, which is begun again
        run.save()
        raise UserError(f"{reason}; go on with --resume {run.folder}") from reason
    failed = watched.operator.failed if watched.operator else 0
    for played in ended:
        episode = embedded(played, agent)
        T = len(episode.success)
        taken = np.zeros(T, dtype=bool)
        if watched.operator:  # then this is the only environment
            taken = np.array(watched.taken)
        if taken.any():
            executed = np.stack(watched.executed)
            episode = as_executed(episode, taken, executed, agent)
            add_intervention(demo, episode, taken, agent, args)
            if args.record_demos and episode.success.any():
                helped.record(played.seed, executed)
        add_episode(replay, episode, agent, args)
        helped.ended(taken, failed)
    return run.played(slots, ended)


def draw(demo: ReplayBuffer, replay: ReplayBuffer, agent: Agent, args: Args, rng: dict) -> Batch:
    """Half demo buffer, half replay buffer; the demo buffer only while there are no rollouts."""
    size = per_rank(args.batch_size)
    own = size // 2 if replay.starts.rows else 0
    rows = demo.draw(size - own, rng["batch"])
    batch = demo.gather(rows)
    if own:
        rows = replay.draw(own, rng["batch"])
        batch = batch.cat(replay.gather(rows))
    batch.feature = agent.perturb(batch.feature, args.proprio_noise, rng["update"])
    batch.next_feature = agent.perturb(batch.next_feature, args.proprio_noise, rng["update"])
    return batch


def update_critics(agent: Agent, optimizer, next_batch, args: Args, generator, cql_weight: float) -> tuple[Batch, dict]:
    """The critic's updates before one of the actor, which takes the last batch."""
    for _ in range(args.critic_updates):
        batch = next_batch()
        logs = update_critic(agent, optimizer, batch, args, cql_weight, generator)
    return batch, logs


# === Training ========================================================================================================
def main(args: Args) -> Path:
    """Run or resume all stages; returns the run's folder."""
    args = stored_args(args, __file__)
    validate(args)
    demos = load_demos(args, make_env)
    env = make_env(args, args.num_envs, render=args.intervention in DEVICES)
    torch.manual_seed(args.seed)
    agent = Agent(args, demos).to(args.device)
    load_sft_weights(agent, args, head="consistency")
    watched = WatchedEnv(env, make_operator(env, agent, demos, args))
    slots = Slots(watched, agent, args, partial(decide, agent), training=True)
    helped = Interventions()
    demo = ReplayBuffer(agent, args, expert=True)  # demonstrations, and what the operator did
    replay = ReplayBuffer(agent, args, expert=False)  # all rollouts
    add_demonstrations(demo, demos, agent, args)
    cloned = nn.ModuleList([agent.backbone, agent.actor])
    sft_optimizer = adamw(cloned, args.sft_lr, args.weight_decay)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(cloned, multi_avg_fn=average)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.reinforce_lr, fused=True)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.reinforce_lr, fused=True)

    stages = ("sft", "offline", "online")
    about = {"method": "ConRFT", "weights": agent.weights, "demonstrations": demos.sha256()}
    run = Run(args, __file__, stages, about, Evaluator(args, make_env, evaluate, agent))
    run.keep(  # what a checkpoint holds; a resumed run loads it here
        agent, demo=demo, replay=replay, helped=helped, critic_optimizer=critic_optimizer,
        actor_optimizer=actor_optimizer, sft_optimizer=sft_optimizer, averaged=averaged,
    )  # fmt: skip
    noise = run.rng["update"]
    next_batch = partial(draw, demo, replay, agent, args, run.rng)
    if args.eval_only:
        print(json.dumps(evaluate(env, agent, args), indent=2))
        return run.folder

    # Stage 0: behaviour cloning of backbone and head
    if run.enter("sft"):
        with threads(args, many="primary" in demos.obs):
            for step in run.updates_until(args.sft_updates, "[0/2] SFT"):
                lr = args.sft_lr * warmup_cosine(step, args.sft_updates)
                set_lr(sft_optimizer, lr)
                rows = demos.draw(per_rank(args.sft_batch_size), run.rng["batch"])
                batch = demo.gather(rows)
                obs = random_shift(demos.at(rows, agent.window), run.rng["batch"])
                feature = agent.feature(obs)
                logs = update_clone(agent, sft_optimizer, feature, batch.chunk, args, noise)
                averaged.update_parameters(cloned)
                run.tick(logs)
            if args.sft_updates:
                cloned.load_state_dict(averaged.module.state_dict())
            embed_demonstrations(demo, demos, agent)
        run.drop("sft_optimizer", "averaged")
        run.evaluate()  # each episode ends at its first success
        if args.fresh_head:
            torch.manual_seed(args.seed)
            reset(agent.actor)

    # Stage I: Cal-ConRFT on the demonstrations, Eqs. (1) and (3)
    if run.enter("offline"):
        for _ in run.updates_until(args.offline_updates, "[1/2] Cal-ConRFT"):
            batch, logs = update_critics(agent, critic_optimizer, next_batch, args, noise, args.cql_weight)
            logs |= update_actor(
                agent, actor_optimizer, batch, args, noise,
                bc_weight=args.bc_weight_offline, q_weight=args.q_weight_offline,
            )  # fmt: skip
            run.tick(logs)
        forget(critic_optimizer, actor_optimizer)  # ConRFT starts each stage with a fresh Adam
        run.evaluate(whole=True)  # each goes on to the time limit

    # Stage II: HIL-ConRFT on demonstrations, interventions and rollouts, Eqs. (4) and (5). Decisions of all environments
    # (of one: whole episodes) and updates take turns. A simulator can't be saved in the middle of an episode: checkpoints
    # lie where none is under way.
    if run.enter("online"):
        bar = run.bar("[2/2] HIL-ConRFT", args.online_steps, run.stage_env_steps)
        while slots.busy or run.stage_env_steps < args.online_steps:
            if not slots.busy:
                run.evaluate_if_due()
            known = run.episodes
            most = 0 if slots.busy and run.rest_due(args.online_steps) else None
            bar.update(collect(slots, agent, args, run, demo, replay, helped, most))
            for _ in run.updates_until(int(args.utd_ratio * run.stage_env_steps)):
                batch, logs = update_critics(agent, critic_optimizer, next_batch, args, noise, args.cql_weight_online)
                logs |= update_actor(
                    agent, actor_optimizer, batch, args, noise,
                    bc_weight=args.bc_weight_online, q_weight=args.q_weight_online,
                )  # fmt: skip
                run.tick(logs, may_save=False)
            if run.episodes > known:
                run.log(run.recent_episodes() | {"buffer/size": replay.steps.rows})
                run.log(helped.metrics())
            if not slots.busy:
                run.save_if_due()
        if args.online_steps:
            run.evaluate(whole=True)

    run.finish(**demos.summary(), episodes=run.episodes, **helped.summary())
    if helped.recorded:
        write_demonstrations(args, helped.recorded)
    film_policy(agent, args, run.folder)
    env.close()
    return run.folder


def warmup_cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: linear over the first 5 %, then a cosine to zero."""
    warmup = (step + 1) / (0.05 * total)
    angle = math.pi * step / total
    cosine = (1 + math.cos(angle)) / 2
    return min(warmup, cosine)


def forget(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.state.clear()


def reset(net: nn.Module) -> None:
    """New weights, drawn from torch's global generator."""
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()


def film_policy(agent: Agent, args: Args, folder: Path) -> None:
    """The first evaluation episodes as videos."""
    alone = replace(args, num_envs=1)

    def play(env, seed: int, frames: list) -> bool:
        (success,) = rollout(env, agent, alone, [seed], frames=frames)
        return bool(success.any())

    film(args, make_env, folder / "videos", play)


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, TABLES))
