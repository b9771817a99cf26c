"""FORCE on Octo: value-calibrated warm-up and self-distillation for vision-language-action policies (arXiv:2606.26006).

A policy is cloned from demonstrations (stage 0), a conservative critic is trained on the same data (stage 1), both are
re-calibrated on the policy's own rollouts (stage 2), and then the policy learns online from its proposals of
above-average value, in states where the average proposal beats what it did (stage 3, VGPD). Critic and actor read fixed
embeddings of the Octo backbone. From state, and for pushing, stage 3 trains the backbone too (--online-finetune full),
in rounds, and embeds the buffers anew after each.

Equations (numbers of the paper)                                             where
  (1)     critic: TD + alpha * (LSE over sampled actions - Q(data)), Cal-QL    td_target, calql_loss
  (2-4)   stage 1 actor: bc_weight * BC + offline_q_weight * L_Q               consistency_loss, q_loss, actor_loss
  (5-7)   stage 2 actor: BC on successful trajectories only (1{y=1} / rho)     success_weighted_bc
  (8)     stage 3 critic: TD (and returns)                                      td_target, critic_loss
  (9)     stage 3 actor: q_weight * L_Q + distill_weight * L_distill           actor_loss
  (10-11) pi* ~ pi_old exp(Q / temperature), projected by weighted BC          vgpd_target, self_distilled
  (12)    expert half of the batch: BC                                         self_distilled
  (13-15) mean baseline, gate zeta, candidate weights                          vgpd_target

Commands
  python force_octo.py --env-id StackCube-v1 --K 20                  # RGB, makes its demonstrations on the first run
  python force_octo.py --env-id PushCube-v1 --obs-mode state         # privileged state: minutes on one core
  python force_octo.py --preset paper --env-id PickCube-v1           # the paper's settings, where stated
  python force_octo.py --sft-checkpoint runs/NAME                    # start from a run of bc.py
  python force_octo.py --backbone octo-small --checkpoint hf://rail-berkeley/octo-small-1.5 --image-size 256
  python force_octo.py --resume runs/NAME                            # go on after a kill, with the same next losses
  python force_octo.py --eval-only runs/NAME                         # evaluate the last checkpoint

The default differs from the paper in 18 points; docs/force.md lists them, with the measurements behind each.
Flags, run folders, checkpoints, logs and demonstration files are in plumbing/, and hold no part of the algorithm.
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
    cut,
    drawn,
    film,
    fixed,
    joined,
    lighten,
    load_demos,
    load_sft_weights,
    mean_over_ranks,
    moving,
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
    windows,
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
    sft_updates: int = 1000  # updates of stage 0
    finetune: Literal["full", "head"] = "full"  # stage 0: train backbone and head, or the head alone
    sft_lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    sft_batch_size: int = 64  # transitions per batch
    weight_decay: float = 1e-4  # of matrices and kernels (stages 0 and 3)
    proprio_noise: float = 0.1  # noise on proprio in every update, in standard deviations of the demonstrations

    # --- stages 1 to 3 ---
    K: int = 20  # K: candidate action chunks per state in VGPD
    preset: Literal["default", "paper"] = "default"  # "paper": the paper's choices; other flags still win
    gamma: float = 0.98  # discount per control step
    reinforce_lr: float = 3e-4  # learning rate after stage 0 (Adam, constant): critic, and actor up to stage 2
    batch_size: int = 128  # transitions per batch; stages 2 and 3: half expert, half policy buffer
    stay: bool = True  # each step that demonstrations record past the success is a success too: learn to stay there
    return_mix: float = 0.5  # share of the Monte-Carlo return in the critic's target (0 = the paper's TD)
    tau: float = 0.01  # Polyak step of the target critics
    critic_updates: int = 2  # critic updates per actor update
    offline_updates: int = 1000  # stage 1: actor updates
    warmup: bool = True  # --no-warmup skips stage 2 (the paper's ablation "w/o Pre-Cal")
    warmup_episodes: int = 30  # stage 2: rollouts of the current policy
    warmup_updates: int = 400  # stage 2: actor updates; the first half trains the critic only
    online_steps: int = 15_000  # stage 3: control steps, summed over environments
    eval_freq: int = 2500  # stage 3: evaluate after the first round past each multiple of so many control steps
    online_finetune: Literal["head", "full"] = "head"  # stage 3: train the head, as in the paper, or the backbone too
    round_steps: int = 1  # stage 3: control steps of pi_old between updates; 1: a decision (alone: an episode)
    online_lr: float = 3e-4  # stage 3: learning rate of the actor; in longer rounds their peak
    utd_ratio: float = 0.3  # stage 3: actor updates per control step
    cql_alpha: float = 0.1  # weight of the conservative term in stages 1 and 2
    cql_samples: int = 2  # sampled actions of each kind in the conservative term (random, pi(s), pi(s'))
    bc_weight: float = 1.0  # weight of BC in stages 1 and 2
    offline_q_weight: float = 0.0  # weight of the Q loss in stages 1 and 2, where the critic isn't calibrated yet
    distill_weight: float = 1.0  # stage 3: weight of the distillation loss
    q_weight: float = 0.0  # stage 3: weight of the Q loss (more: faster, less safe)
    q_growth: float = 1.0  # stage 3: --q-weight grows evenly, to so many times its value at the end
    q_normalize: bool = True  # divide the Q loss by the batch mean of |Q|
    vgpd: bool = True  # --no-vgpd replaces distillation by BC on both halves (the paper's ablation)
    by_chance: bool = False  # --by-chance: VGPD's candidates by chance, not by Q: the control for what the critic adds
    temperature: float = 1.0  # temperature of Eq. (15), in units of reward or (adaptive) of the candidates' Q spread
    temperature_adaptive: bool = True  # scale the temperature by the standard deviation of Q over a state's candidates
    success_filter: bool = True  # stage 3: the actor learns from successful trajectories only
    candidate_sigma: float = 0.3  # noise level of the second denoising step for candidates (0 = one-step candidates)
    candidate_noise: float = 0.02  # Gaussian push on candidates, in units of the action box
    explore_noise: float = 0.0  # the same push on the chunks of training episodes
    actor_ema: float = 0.999  # decay of pi_old, which acts and proposes (0: pi itself); in stage 3 of `full`: none


# Flags of all scripts (num_demos, drop_idle, ...) and their defaults are in RunArgs, plumbing/flags.py.
# The defaults above are for cameras, "rgb" aside. Other values that go with the flags of a key, and with --preset. Later
# tables win over earlier ones, and the command line over all.
BY_OBS_MODE = {  # without a camera updates are cheap; with one, these budgets are minutes
    "rgb": dict(batch_size=64, online_steps=7500),
    "state": dict(
        num_envs=1, proprio_noise=0.0, weight_decay=1.0, sft_updates=6000, online_steps=25_000, actor_ema=0.995,
        online_finetune="full", round_steps=2500, online_lr=1e-3, utd_ratio=0.16,
    ),
}  # fmt: skip
PUSH = dict(  # pushing can be done faster than it was shown: a pull to higher Q, in ten rounds of the whole network
    online_finetune="full", online_lr=1e-3, utd_ratio=0.16, online_steps=8000, round_steps=800,
    q_weight=0.25, q_growth=6.0, explore_noise=0.1, candidate_noise=0.1,
)  # fmt: skip
PUSH_STATE = PUSH | dict(utd_ratio=0.32)
BY_TASK = {
    ("PushCube-v1", "rgb"): PUSH,
    ("PullCube-v1", "rgb"): PUSH,
    ("PushCube-v1", "state"): PUSH_STATE,
    ("PullCube-v1", "state"): PUSH_STATE,
    ("PickCube-v1", "state"): dict(online_steps=15_000, round_steps=1500),
}
BY_PRESET = {
    "paper": dict(
        control_mode="pd_ee_delta_pose", reward="conrft", return_mix=0.0, tau=0.005, batch_size=256, gamma=0.99,
        chunk_len=1, noise_levels=1, sft_lr=3e-4, q_weight=1.0, q_growth=1.0, offline_q_weight=0.1,
        q_normalize=False, distill_weight=0.5, temperature=0.1, temperature_adaptive=False, candidate_sigma=0.0,
        candidate_noise=0.0, explore_noise=0.0, actor_ema=0.0, success_filter=False, cql_samples=10,
        offline_updates=20_000, warmup_updates=4000, online_steps=30_000, utd_ratio=1.0, num_demos=50, stay=False,
        sft_updates=6000, online_finetune="head", round_steps=1, online_lr=3e-4, drop_idle=0.0, weight_decay=1e-4,
    ),
}  # fmt: skip
TABLES = {"obs_mode": BY_OBS_MODE, "env_id obs_mode": BY_TASK, "preset": BY_PRESET}

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """K control_freq noise_levels hidden_dim num_critics chunk_len
        sft_batch_size critic_updates cql_samples eval_freq round_steps"""),
    "at least 2": (lambda x: x >= 2, "batch_size"),
    "positive": (lambda x: x > 0, "sft_lr reinforce_lr temperature"),
    "within [0, 1]": (lambda x: 0 <= x <= 1, "tau return_mix"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma actor_ema"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Fill in and check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    check_flags(args, LIMITS)
    check_octo(args)
    if args.warmup and args.warmup_updates and not args.warmup_episodes:
        raise UserError("--warmup-updates needs rollouts: give --warmup-episodes, or leave stage 2 out by --no-warmup")
    if args.online_finetune == "full" and args.round_steps == 1:
        raise UserError("--online-finetune full embeds all buffers after each round: give more than --round-steps 1")
    check_sft(args, head="consistency")


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
    Success, and "ended" [num_envs], by success or by failure, are the task's own; `rollout` keeps the time limit.
    """
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    if args.sim_backend == "physx_cuda":
        return make_maniskill(args, num_envs, render)
    make = [lambda: CPUGymWrapper(make_maniskill(args, 1, render))] * num_envs
    never = gym.vector.AutoresetMode.DISABLED
    if num_envs == 1:
        return gym.vector.SyncVectorEnv(make, autoreset_mode=never)
    return gym.vector.AsyncVectorEnv(make, context="spawn", autoreset_mode=never)


# === Replay ==========================================================================================================
@dataclass
class Batch:
    """Transitions between decisions. B samples, F features, H-step chunks of A-dimensional actions."""

    feature: Tensor  # [B, F] embedding and normalised proprio at t
    chunk: Tensor  # [B, H*A] actions t..t+H-1, normalised to [-1, 1], time-major
    reward: Tensor  # [B] sum over i < n of gamma^i * r_{t+i};  n = H, or fewer where the episode terminated
    bootstrap: Tensor  # [B] gamma^n, or 0 if the episode terminated at t + n (not: was truncated)
    next_feature: Tensor  # [B, F] at t + n
    mc_return: Tensor  # [B] discounted return from t on
    success: Tensor  # [B] 1 if the whole trajectory succeeded
    row: Tensor  # [B] of that buffer

    def cat(self, other: Batch) -> Batch:
        pairs = zip(vars(self).values(), vars(other).values())
        return Batch(*map(torch.cat, pairs))


class Reward(NamedTuple):
    """Of a control step, by whether it succeeds. Bounds of TD targets and of returns follow from it."""

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

    feature: Tensor  # [T+1, F], empty if not asked for; [L+1, F] where it was recorded after the end, too
    obs: dict[str, Tensor]  # [T+1, ...] what was seen; or [L+1, ...]
    action: np.ndarray  # [L, A] normalised, L >= T
    success: np.ndarray  # [T] at each step
    terminated: bool  # at T


class ReplayBuffer:
    """Whole episodes, one row per observation; chunked transitions are put together when they are drawn."""

    def __init__(self, agent: Agent, args: Args, obs: dict[str, Tensor]):
        """`obs` [0, ...]: what rows keep of their observations beside the features; {}: nothing."""
        self.chunk_len = args.chunk_len
        self.window = agent.window
        self.gamma = args.gamma
        self.seen = Table(obs, args.device)
        self.steps = Table({
            "feature": torch.empty(0, agent.feature_dim),
            "action": torch.empty(0, agent.action_dim),
            "reward": torch.empty(0),  # of the chunk that starts here
            "bootstrap": torch.empty(0),
            "mc_return": torch.empty(0),
            "success": torch.empty(0),
            "next": torch.empty(0, dtype=torch.long),  # row at which that chunk ends
            "first": torch.empty(0, dtype=torch.long),  # row of the episode's first observation
            "last": torch.empty(0, dtype=torch.long),  # last row of the episode
        }, args.device)  # fmt: skip
        self.starts = Table({"row": torch.empty(0, dtype=torch.long)}, args.device)  # from which a chunk may be drawn
        self.tables = {"steps": self.steps, "seen": self.seen, "starts": self.starts}  # what a checkpoint holds

    def add(self, episode: Episode, reward: Reward, hold: np.ndarray, stay: int = 0) -> None:
        """Append one episode of T steps. Chunks that a time limit cuts short are never drawn.

        The L >= T actions (recorded or planned past the end) fill up its last chunks; `hold` [A], the action that keeps
        still, fills up after those. Of what was recorded past the success the first `stay` steps are episodes of their
        own: of one step, successful.
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

        # Rows T..L: recorded past the end. The first `stay` are successes, the others are never drawn.
        past = np.zeros(L + 1 - T)
        past_reward = past.copy()
        past_reward[:stay] = reward.success
        self.steps.append(
            L + 1,
            feature=episode.feature,
            action=np.concatenate([episode.action, hold[None]]),
            reward=np.append(chunk_reward, past_reward),
            bootstrap=np.append(bootstrap, past),
            mc_return=np.append(returns, past_reward),
            success=[episode.success.any()],
            next=np.append(row[:T] + n, row[T:]),
            first=row[:1],
            last=row[-1:],
        )
        self.seen.append(L + 1, **episode.obs)
        whole = T + stay
        if not episode.terminated:
            whole = max(T - H + 1, 0)
        self.starts.append(whole, row=row[:whole])

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
            success=steps["success"][rows],
            row=rows,
        )

    def observations(self, rows: Tensor) -> dict[str, Tensor]:
        """What was seen at rows [B] and in the steps before, as `Agent.feature` wants it."""
        first = self.steps["first"][rows]
        return windows(self.seen.columns, rows, first, self.window)


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

    def sample(self, feature: Tensor, n: int, generator, second_sigma: float = 0.0) -> Tensor:
        """Draw n chunks per state: [B, n, D] in [-1, 1].

        One-step samples lie very close together (the denoiser at sigma 80 nearly ignores its input). With
        second_sigma > 0 each one is re-noised to that level and denoised once more, which spreads them over what
        the policy knows; the first step is then shared by all n.
        """
        first = 1 if second_sigma else n
        noise = gaussian((len(feature), first, self.chunk_dim), feature, generator)
        sigma = noise.new_full((1, 1), SIGMA_MAX)
        x = self.denoise(feature, SIGMA_MAX * noise, sigma)
        if second_sigma:
            noise = gaussian((len(feature), n, self.chunk_dim), feature, generator)
            sigma = noise.new_full((1, 1), second_sigma)
            x = self.denoise(feature, x + second_sigma * noise, sigma)
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
        self.actor_ema = ConsistencyActor(*sizes)  # pi_old of Eq. (10): acts and proposes
        self.critic = EnsembleCritic(args.num_critics, *sizes)
        self.target_critic = EnsembleCritic(args.num_critics, *sizes)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_ema.requires_grad_(False)
        self.target_critic.requires_grad_(False)

    def act(self, feature: Tensor, generator: torch.Generator, push: float = 0.0) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] normalised."""
        chunk = self.actor_ema.sample(feature, 1, generator)[:, 0]
        chunk = self.push(chunk, push, generator)
        return chunk.unflatten(1, (self.H, -1)).cpu().numpy()

    def candidates(self, feature: Tensor, args: Args, generator: torch.Generator) -> Tensor:
        """a_k ~ pi_old, K per state: [N, F] -> [N, K, H*A] normalised."""
        chunks = self.actor_ema.sample(feature, args.K, generator, args.candidate_sigma)
        return self.push(chunks, args.candidate_noise, generator)

    def push(self, chunk: Tensor, size: float, generator: torch.Generator) -> Tensor:
        """Add Gaussian noise that is the same for all steps of a chunk [.., H*A], `size` in units of the action box.

        A constant offset moves the arm off its path, which teaches more; independent noise would only make it shake.
        """
        if not size:
            return chunk
        shape = (*chunk.shape[:-1], 1, self.action_dim)
        noise = gaussian(shape, chunk, generator)
        steps = chunk.unflatten(-1, (self.H, -1))  # [.., H, A]
        return (steps + size * noise).clamp(-1, 1).flatten(-2)


# === Losses: pure functions ==========================================================================================
def td_target(batch: Batch, next_q: Tensor, return_mix: float, low: float, high: float) -> Tensor:
    """sum gamma^i r_i + gamma^n * min Q'(s', a'), a' ~ pi_old(.|s'), mixed with the return, within [low, high].

    The minimum is that of two random target critics; low and high are the least and the largest return that exist.

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
    bound = mc_return[None, :, None]
    bounded = torch.maximum(q_sampled, bound)
    entries = torch.cat([bounded, q_data[..., None]], -1)
    lse = torch.logsumexp(entries, -1)  # over actions, never over the batch
    gap = lse - math.log(entries.shape[-1]) - q_data
    return gap.mean(), (q_sampled < bound).float().mean()


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


def success_weighted_bc(bc: Tensor, success: Tensor) -> Tensor:
    """Eqs. (5-7): (1/rho) * mean(1{y=1} * bc), rho the share of successes: the mean over successful samples.

    Shapes: bc [B], success [B] in {0, 1} -> scalar, 0 if nothing succeeded.
    """
    successes = mean_over_ranks(success.sum())
    return (success * bc).sum() / successes.clamp_min(1e-6)


def q_loss(q: Tensor, normalise: bool) -> Tensor:
    """- mean Q(s, pi(s)) over critics and batch, optionally over mean |Q| (as TD3+BC). Shapes: q [E, B] -> scalar."""
    scale = mean_over_ranks(q.abs().mean().detach()) + 1e-6 if normalise else 1.0
    return -q.mean() / scale


def vgpd_target(q: Tensor, q_buffer: Tensor, temperature: float, adaptive: bool) -> tuple[Tensor, Tensor]:
    """Weights of a state's K candidates and the gate between them and the buffer action.

    w_k ~ 1{Q_k >= mean Q} exp(Q_k / temperature)                                    Eq. (15)
    zeta = 1{mean Q > Q(s, a_buffer)}                                        gate of Eq. (14)
    Q is the online critics' mean; mean Q is that of all K candidates.
    With `adaptive` the temperature is in units of the state's own standard deviation of Q over candidates.
    Shapes: q [B, K], q_buffer [B] -> w [B, K] summing to 1, zeta [B] bool.
    """
    best = q.amax(-1, keepdim=True)
    mean = q.mean(-1, keepdim=True).minimum(best)  # Eq. (13); rounding may lift it past equal Q
    if adaptive:
        temperature = temperature * q.std(-1, keepdim=True, correction=0).clamp_min(1e-6)
    logits = (q / temperature).masked_fill(q < mean, -torch.inf)  # the best candidate always passes
    return torch.softmax(logits, -1), mean[:, 0] > q_buffer


# === Updates =========================================================================================================
def update_clone(agent: Agent, optimizer, feature: Tensor, chunk: Tensor, args: Args, generator) -> dict:
    """Stage 0: one step of behaviour cloning. Shapes: feature [B, F], chunk [B, D]."""
    feature = agent.perturb(feature, args.proprio_noise, generator)
    loss = consistency_loss(agent.actor, feature, chunk, generator, args.noise_levels).mean()
    grad_norm = descend(optimizer, loss, max_norm=1.0)
    return {"losses/bc": loss, "grad_norm/sft": grad_norm, "lr/sft": optimizer.param_groups[0]["lr"]}


@compiled
def critic_loss(agent: Agent, batch: Batch, args: Args, cql_alpha: float, generator) -> tuple[Tensor, dict]:
    """Eq. (1), or Eq. (8) with cql_alpha = 0."""
    n = args.cql_samples
    device = batch.chunk.device
    with torch.no_grad():
        next_chunks = agent.actor_ema.sample(batch.next_feature, n if cql_alpha else 1, generator)  # [B, n, D]
        two = torch.randperm(args.num_critics, generator=generator, device=device)[:2]
        next_q = agent.target_critic(batch.next_feature, next_chunks[:, 0])[two]
        reward = REWARDS[args.reward]
        lowest = reward.fail / (1 - args.gamma)
        target = td_target(batch, next_q, args.return_mix, lowest, reward.success)
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
    if cql_alpha:
        with torch.no_grad():
            shape = (len(batch.chunk), n, batch.chunk.shape[1])
            uniform = torch.rand(shape, generator=generator, device=device)
            current = agent.actor_ema.sample(batch.feature, n, generator)
        sampled = torch.cat([uniform * 2 - 1, current, next_chunks], 1)  # [B, 3n, D], all evaluated at s
        q_sampled = agent.critic(batch.feature, sampled)
        loss_cql, logs["calib/bound_rate"] = calql_loss(q_data, q_sampled, batch.mc_return)
        logs["losses/calql"] = loss_cql
        loss = loss_td + cql_alpha * loss_cql  # Eq. (1)
    logs["losses/critic"] = loss
    return loss, logs


def update_critic(agent: Agent, optimizer, batch: Batch, args: Args, cql_alpha: float, generator) -> dict:
    """One step on Eq. (1) or (8), and the Polyak step of the targets."""
    loss, logs = critic_loss(agent, batch, args, cql_alpha, generator)
    descend(optimizer, loss)
    polyak_update(agent.critic, agent.target_critic, args.tau)
    return logs


@torch.no_grad()
@compiled
def self_distilled(agent: Agent, batch: Batch, args: Args, generator) -> tuple[Tensor, dict]:
    """What the actor imitates in stage 3: [B, D].

    The expert half imitates its own actions, Eq. (12). The policy's half imitates one of its K proposals, or what it
    did, by the gate of Eq. (14). With --success-filter, `update_actor` then leaves out failed episodes of both.
    """
    own = len(batch.chunk) // 2  # the policy's, and last
    feature = batch.feature[-own:]
    chunk = batch.chunk[-own:]
    candidates = agent.candidates(feature, args, generator)  # [B', K, D]
    q = agent.critic(feature, candidates).mean(0)  # [B', K]
    q_buffer = agent.critic(feature, chunk).mean(0)  # [B']
    weight, zeta = vgpd_target(q, q_buffer, args.temperature, args.temperature_adaptive)
    if args.by_chance:
        weight = torch.full_like(weight, 1 / args.K)
    # Eq. (14)'s target is the w-weighted sum of candidates; one k ~ w per state has the same expected gradient.
    k = drawn(weight, generator)
    chosen = candidates.take_along_dim(k[:, None, None], 1)[:, 0]  # [B', D]
    distilled = torch.where(zeta[:, None], chosen, chunk)
    logs = {
        "vgpd/zeta": zeta.float().mean(),
        "vgpd/pass_rate": (weight > 0).float().mean(),
        "vgpd/candidate_std": candidates.std(1, correction=0).mean(),
        "vgpd/ess": (1 / weight.square().sum(-1)).mean(),
        "values/q_std": q.std(-1, correction=0).mean(),
    }
    return torch.cat([batch.chunk[:-own], distilled]), logs


@compiled
def actor_loss(
    agent: Agent, batch: Batch, feature: Tensor, target: Tensor, args: Args, generator,
    bc_weight: float, q_weight: float, successes_only: bool,
) -> tuple[Tensor, dict]:  # fmt: skip
    """bc_weight * BC(target [B, D]) + q_weight * L_Q: Eqs. (2-4), (5-7) or (9).

    feature [B, F] is the actor's: batch.feature, or that of a backbone that learns too. The critic sees batch.feature.
    successes_only filters BC, not L_Q.
    """
    bc = consistency_loss(agent.actor, feature, target, generator, args.noise_levels)  # [B]
    loss_bc = success_weighted_bc(bc, batch.success) if successes_only else bc.mean()
    loss = bc_weight * loss_bc
    logs = {"losses/bc": loss_bc}
    if q_weight:
        own = agent.actor.sample(feature, 1, generator)[:, 0]  # [B, D]
        q = fixed(agent.critic)(batch.feature, own)  # [E, B]
        loss_q = q_loss(q, args.q_normalize)
        loss = loss + q_weight * loss_q
        logs["losses/q"] = loss_q
        logs["values/q_policy"] = q.mean()
    logs["losses/actor"] = loss
    return loss, logs


def update_actor(
    agent: Agent, optimizer, batch: Batch, feature: Tensor, target: Tensor, args: Args, generator,
    bc_weight: float, q_weight: float, ema: float, successes_only: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """One step on `actor_loss`, and on pi_old's average."""
    loss, logs = actor_loss(
        agent, batch, feature, target, args, generator,
        bc_weight=bc_weight, q_weight=q_weight, successes_only=successes_only,
    )  # fmt: skip
    grad_norm = descend(optimizer, loss, max_norm=1.0)
    polyak_update(agent.actor, agent.actor_ema, 1 - ema)
    return logs | {"grad_norm/actor": grad_norm}


def update_online(
    agent: Agent, optimizer, batch: Batch, observed, args: Args, generator, q_weight: float
) -> dict[str, Tensor]:
    """Stage 3: one step of the actor on Eq. (9), of its backbone too with --online-finetune full."""
    target = batch.chunk
    found = {}
    if args.vgpd:
        target, found = self_distilled(agent, batch, args, generator)
    feature = batch.feature
    ema = args.actor_ema  # head: pi_old follows each update
    if args.online_finetune == "full":
        feature = agent.feature(observed(batch))
        feature = agent.perturb(feature, args.proprio_noise, generator)
        ema = 1.0  # full: pi_old stays as it is until the end of the round
    logs = update_actor(
        agent, optimizer, batch, feature, target, args, generator,
        bc_weight=args.distill_weight, q_weight=q_weight, ema=ema, successes_only=args.success_filter,
    )  # fmt: skip
    return found | logs


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
def decide(agent: Agent, push: float, obs: dict, noise: list) -> np.ndarray:
    """One chunk for each of n episodes, by what was seen last and a generator for each: [n, H, A] normalised."""
    return agent.act(agent.feature(obs), noise, push)


def rollout(env, agent: Agent, args: Args, seeds, whole: bool = True, frames=None) -> list[np.ndarray]:
    """Success at each step [T] of episodes with these seeds, without noise on the actions.

    whole    an episode goes on after a success, to the time limit, to see whether it lasts
    frames   collects the first environment's video
    """
    act = partial(decide, agent, 0.0)
    slots = Slots(env, agent, args, act, whole=whole, frames=frames)
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
    return Episode(feature, played.obs, played.action, played.success, played.terminated)


def add_episode(buffer: ReplayBuffer, episode: Episode, agent: Agent, args: Args, stay: int = 0) -> None:
    hold = agent.hold_action(episode.action[-1])
    buffer.add(episode, REWARDS[args.reward], hold, stay)


def add_demonstrations(buffer: ReplayBuffer, demos: Demos, agent: Agent, args: Args) -> None:
    """One row per observation, the same rows as in `demos`; features come with `embed`."""
    for start, length, steps in zip(demos.starts(), demos.lengths, demos.steps):
        episode = Episode(
            feature=torch.zeros(length + 1, agent.feature_dim),
            obs=cut(demos.obs, slice(start, start + length + 1)),
            action=agent.normalise(demos.action[start : start + length]),
            success=np.arange(1, steps + 1) == steps,
            terminated=True,
        )
        stay = 0
        if args.stay:  # the recorded steps past the success, as long as it lasts
            past = demos.success[start + steps : start + length]
            stay = int(past.cumprod().sum())
        add_episode(buffer, episode, agent, args, stay)


@torch.no_grad()
def embed(buffer: ReplayBuffer, observations, count: int, agent: Agent) -> None:
    """Features of a buffer's first `count` rows, anew; observations(rows [B]) is what was seen there."""
    features = []
    for some in torch.arange(count).split(256):
        feature = agent.feature(observations(some))
        features.append(feature)
    buffer.steps.rewrite("feature", torch.cat(features))


def collect(
    slots: Slots, agent: Agent, args: Args, run: Run, expert: ReplayBuffer, policy: ReplayBuffer, most: int | None
) -> int:
    """A turn of the slots; no episode begins once the run has had `most`. Returns control steps.

    What ends goes into the policy buffer, successes into the expert buffer too.
    """
    ended = slots.turn(run.next_seeds(slots, most))
    for played in ended:
        episode = embedded(played, agent)
        add_episode(policy, episode, agent, args)
        if episode.success.any():
            add_episode(expert, without_idle(episode, agent, args), agent, args)
    return run.played(slots, ended)


def collect_round(
    slots: Slots, agent: Agent, args: Args, run: Run, expert: ReplayBuffer, policy: ReplayBuffer, bar
) -> int:
    """Play the steps of a round, and its episodes to their end; with --round-steps 1 a turn of the slots.

    Returns: the number of episodes that have ended.
    """
    known = run.episodes
    if args.round_steps == 1:
        most = 0 if slots.busy and run.rest_due(args.online_steps) else None
        bar.update(collect(slots, agent, args, run, expert, policy, most))
        return run.episodes - known
    rounds = run.stage_env_steps // args.round_steps  # so far; episodes overshoot, and yet the last one is whole
    goal = min((rounds + 1) * args.round_steps, args.online_steps)
    while slots.busy or run.stage_env_steps < goal:
        most = None if run.stage_env_steps < goal else 0
        bar.update(collect(slots, agent, args, run, expert, policy, most))
    return run.episodes - known


def without_idle(episode: Episode, agent: Agent, args: Args) -> Episode:
    """An episode to imitate: without idle steps (arm below --drop-idle, gripper still), as in the demonstrations."""
    T = len(episode.success)
    action = agent.denormalise(episode.action)
    keep = moving(action, args.drop_idle, agent.relative, agent.gripper)
    keep[T - 1 :] = True
    seen = np.append(keep[:T], True)  # [T+1]
    return Episode(
        feature=episode.feature[seen],
        obs=cut(episode.obs, seen),
        action=episode.action[keep],
        success=episode.success[keep[:T]],
        terminated=episode.terminated,
    )


def draw(expert: ReplayBuffer, policy: ReplayBuffer, agent: Agent, args: Args, rng: dict) -> Batch:
    """Half expert, half policy buffer; demonstrations only while there are no rollouts."""
    size = per_rank(args.batch_size)
    own = size // 2 if policy.starts.rows else 0
    rows = expert.draw(size - own, rng["batch"])
    batch = expert.gather(rows)
    if own:
        rows = policy.draw(own, rng["batch"])
        batch = batch.cat(policy.gather(rows))
    batch.feature = agent.perturb(batch.feature, args.proprio_noise, rng["update"])
    batch.next_feature = agent.perturb(batch.next_feature, args.proprio_noise, rng["update"])
    return batch


def update_critics(agent: Agent, optimizer, next_batch, args: Args, generator, cql_alpha: float) -> tuple[Batch, dict]:
    """The critic's updates before one of the actor, which takes the last batch."""
    for _ in range(args.critic_updates):
        batch = next_batch()
        logs = update_critic(agent, optimizer, batch, args, cql_alpha, generator)
    return batch, logs


def look(expert: ReplayBuffer, policy: ReplayBuffer, generator, batch: Batch) -> dict[str, Tensor]:
    """What was seen where a batch's samples start, for a backbone that learns: images are shifted as in stage 0."""
    own = len(batch.row) // 2
    shown = expert.observations(batch.row[:-own])
    visited = policy.observations(batch.row[-own:])
    return random_shift(joined(shown, visited), generator)


@torch.no_grad()
def calibration(agent: Agent, policy: ReplayBuffer, args: Args) -> dict[str, Tensor]:
    """Q of the rollouts' decisions against the returns that followed: the gap that warm-up is meant to close."""
    if not policy.starts.rows:
        return {}
    batch = policy.gather(policy.starts["row"])
    q = agent.critic(batch.feature, batch.chunk).mean(0)
    gap = q - batch.mc_return
    return {
        "calib/q_minus_return": gap.mean(),
        "calib/abs_error": gap.abs().mean(),
        "calib/correlation": torch.corrcoef(torch.stack([q, batch.mc_return]))[0, 1],
    }


# === Training ========================================================================================================
def main(args: Args) -> Path:
    """Run or resume all stages; returns the run's folder."""
    args = stored_args(args, __file__)
    validate(args)
    demos = load_demos(args, make_env)
    env = make_env(args, args.num_envs)
    torch.manual_seed(args.seed)
    agent = Agent(args, demos).to(args.device)
    load_sft_weights(agent, args, head="consistency")
    kept = demos.empty_obs() if args.online_finetune == "full" else {}
    expert = ReplayBuffer(agent, args, kept)  # demonstrations; later successful rollouts too
    policy = ReplayBuffer(agent, args, kept)  # all rollouts
    add_demonstrations(expert, demos, agent, args)
    slots = Slots(env, agent, args, partial(decide, agent, args.explore_noise), training=True)
    cloned = nn.ModuleList([agent.actor])
    if args.finetune == "full":
        cloned.insert(0, agent.backbone)
    sft_optimizer = adamw(cloned, args.sft_lr, args.weight_decay)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(cloned, multi_avg_fn=average)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.reinforce_lr, fused=True)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.reinforce_lr, fused=True)
    learns = nn.ModuleList([agent.actor])
    if args.online_finetune == "full":
        learns.append(agent.backbone)
    online_optimizer = adamw(learns, args.online_lr, args.weight_decay)

    stages = ("sft", "offline", "warmup", "online")
    about = {"method": "FORCE", "weights": agent.weights, "demonstrations": demos.sha256()}
    run = Run(args, __file__, stages, about, Evaluator(args, make_env, evaluate, agent))
    # A checkpoint (runs/NAME/checkpoints, the last two, every --checkpoint-freq updates and between stages) holds this,
    # beside counters and the states of the random generators. A resumed run loads it here.
    run.keep(
        agent, expert=expert, policy=policy, critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer,
        online_optimizer=online_optimizer, sft_optimizer=sft_optimizer, averaged=averaged,
    )  # fmt: skip
    noise = run.rng["update"]
    demos_at = partial(demos.at, window=agent.window)
    next_batch = partial(draw, expert, policy, agent, args, run.rng)
    observed = partial(look, expert, policy, run.rng["batch"])
    if args.eval_only:
        print(json.dumps(evaluate(env, agent, args), indent=2))
        return run.folder

    # Stage 0: behaviour cloning of backbone and head, or of the head on cached embeddings
    if run.enter("sft"):
        if args.finetune == "head":
            embed(expert, demos_at, len(demos.action), agent)
        with threads(args, many="primary" in demos.obs):
            for step in run.updates_until(args.sft_updates, "[0/3] SFT"):
                lr = args.sft_lr * warmup_cosine(step, args.sft_updates)
                set_lr(sft_optimizer, lr)
                rows = demos.draw(per_rank(args.sft_batch_size), run.rng["batch"])
                batch = expert.gather(rows)
                feature = batch.feature
                if args.finetune == "full":
                    obs = random_shift(demos.at(rows, agent.window), run.rng["batch"])
                    feature = agent.feature(obs)
                logs = update_clone(agent, sft_optimizer, feature, batch.chunk, args, noise)
                averaged.update_parameters(cloned)
                run.tick(logs)
            if args.sft_updates:
                cloned.load_state_dict(averaged.module.state_dict())
            agent.actor_ema.load_state_dict(agent.actor.state_dict())
            embed(expert, demos_at, len(demos.action), agent)
        run.drop("sft_optimizer", "averaged")
        run.evaluate()  # each episode ends at its first success

    # Stage 1: Cal-QL and BC on demonstrations, Eqs. (1-4)
    if run.enter("offline"):
        for _ in run.updates_until(args.offline_updates, "[1/3] offline Cal-QL"):
            batch, logs = update_critics(agent, critic_optimizer, next_batch, args, noise, args.cql_alpha)
            logs |= update_actor(
                agent, actor_optimizer, batch, batch.feature, batch.chunk, args, noise,
                bc_weight=args.bc_weight, q_weight=args.offline_q_weight, ema=args.actor_ema,
            )  # fmt: skip
            run.tick(logs)
        forget(critic_optimizer, actor_optimizer)  # ConRFT starts each stage with a fresh Adam
        run.evaluate()

    # Stage 2: value-calibrated warm-up on the policy's own rollouts, Eqs. (1) and (5-7)
    if args.warmup and run.enter("warmup"):
        while run.episodes < args.warmup_episodes:
            collect(slots, agent, args, run, expert, policy, args.warmup_episodes)
        if not run.stage_updates:
            run.log(calibration(agent, policy, args))
        for step in run.updates_until(args.warmup_updates, "[2/3] warm-up"):
            batch, logs = update_critics(agent, critic_optimizer, next_batch, args, noise, args.cql_alpha)
            if step >= args.warmup_updates // 2:  # the first half trains the critic only
                logs |= update_actor(
                    agent, actor_optimizer, batch, batch.feature, batch.chunk, args, noise,
                    bc_weight=args.bc_weight, q_weight=args.offline_q_weight, ema=args.actor_ema, successes_only=True,
                )  # fmt: skip
            run.tick(logs)
        run.log(calibration(agent, policy, args))
        forget(critic_optimizer, actor_optimizer)
        run.evaluate(whole=True)  # each goes on to the time limit

    # Stage 3: TD, and self-distillation online, Eqs. (8-15): a round, then its updates. No checkpoint within an episode
    if run.enter("online"):
        bar = run.bar("[3/3] online VGPD", args.online_steps, run.stage_env_steps)
        while slots.busy or run.stage_env_steps < args.online_steps:
            if not slots.busy:
                run.evaluate_if_due()
            ended = collect_round(slots, agent, args, run, expert, policy, bar)
            done = min(run.stage_env_steps / args.online_steps, 1.0)
            q_weight = args.q_weight * (1 + done * (args.q_growth - 1))
            first = run.stage_updates
            last = int(args.utd_ratio * run.stage_env_steps) if policy.starts.rows else 0  # 0: no episode yet
            with threads(args, many="primary" in kept):
                for step in run.updates_until(last):
                    lr = online_lr(step - first, last - first, args)
                    set_lr(online_optimizer, lr)
                    batch, logs = update_critics(agent, critic_optimizer, next_batch, args, noise, 0.0)
                    logs |= update_online(agent, online_optimizer, batch, observed, args, noise, q_weight)
                    run.tick(logs, may_save=False)
            if args.online_finetune == "full":  # pi_old <- pi, and what the critic reads is embedded by its backbone
                agent.actor_ema.load_state_dict(agent.actor.state_dict())
                embed(expert, expert.observations, expert.steps.rows, agent)
                embed(policy, policy.observations, policy.steps.rows, agent)
            if ended:
                run.log(run.recent_episodes() | {"buffer/size": policy.steps.rows})
            if not slots.busy:
                run.save_if_due()
        run.evaluate(whole=True)

    run.finish(**demos.summary())
    film_policy(agent, args, run.folder)
    env.close()
    return run.folder


def warmup_cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: linear over the first 5 %, then a cosine to zero."""
    warmup = (step + 1) / (0.05 * total)
    angle = math.pi * step / total
    cosine = (1 + math.cos(angle)) / 2
    return min(warmup, cosine)


def online_lr(step: int, total: int, args: Args) -> float:
    """Constant where rounds are episodes; else each round warms up and anneals, as cloning does."""
    if args.round_steps == 1:
        return args.online_lr
    return args.online_lr * warmup_cosine(step, total)


def forget(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.state.clear()


def film_policy(agent: Agent, args: Args, folder: Path) -> None:
    """The first evaluation episodes as videos."""
    alone = replace(args, num_envs=1)

    def play(env, seed: int, frames: list) -> bool:
        (success,) = rollout(env, agent, alone, [seed], frames=frames)
        return bool(success.any())

    film(args, make_env, folder / "videos", play)


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, TABLES))
