"""CO-RFT: chunked offline reinforced fine-tuning of vision-language-action policies (arXiv:2508.02219).

A deterministic chunk policy is cloned from a few demonstrations (stage 1), then improved by offline reinforcement
learning on the same demonstrations (stage 2): a causal transformer scores all prefixes of an action chunk in one pass,
is trained by Cal-QL with an N-step target per prefix, and the policy follows the mean of these scores (TD3).
No environment step is taken for training.

Equations (numbers of the paper)                                             where
  (1-2)   Cal-QL: TD + alpha * (max(Q(s, pi), V_mu) - Q(data))                 calql_gap, critic_loss
  (3-5)   N-step returns within a chunk, bootstrapped by the whole chunk       ChunkData.gather, td_target
  (6)     squared error of every prefix against its target                     td_loss
  (7)     stage 1: squared error of the chunk                                  mse_loss
  (8)     (6) with Cal-QL's regulariser, for every prefix                      critic_loss
  (9)     actor: minus the mean Q over prefixes                                q_loss, actor_loss

Commands
  python co_rft_chunked.py --env-id PickCube-v1 --obs-mode state                 # privileged state: minutes on one core
  python co_rft_chunked.py --env-id PushCube-v1 --obs-mode state --spawn fixed   # one object position
  python co_rft_chunked.py --preset paper --env-id PickCube-v1    # the paper's reading, where it is known
  python co_rft_chunked.py --sft-checkpoint runs/NAME             # start from a run of bc.py --head mse-chunk
  python co_rft_chunked.py --resume runs/NAME                     # go on after a kill, with the same next losses
  python co_rft_chunked.py --eval-only runs/NAME --eval-elsewhere # evaluate the last checkpoint

Where the default differs from the paper (--preset paper: without 4, 6, 8 and --return-mix); docs/co_rft.md has more
  1 backbone: Octo instead of RoboVLMs with Kosmos-2 and its history head; frozen in stage 2, so that an observation is
    embedded once (the paper trains everything)
  2 Eq. (6) read as an i-step target for prefix i (as printed: one H-step target for all)
  3 Eq. (8)'s expectation over the policy: its chunk and noisy copies of it; noise and Eq. (7)'s error in units of the
    actions' spread, the action box being 1.5 times as large as the demonstrations'
  4 the actor keeps imitating (--bc-weight), its Q loss is divided by the mean |Q|, and it starts after the critics
    (--critic-first), at a rate of its own (--actor-lr)
  5 part of the critic's target is the Monte-Carlo return (--return-mix); targets stay within possible returns, prefixes
    that reach past a termination are trained, and target critics move at every critic step (TD3: with the actor)
  6 a tenth of the demonstrations is held out, to see over-training (--holdout)
  7 proprio has no velocities, and is noisy in updates beside a camera (--proprio-noise)
  8 reward upsampling: the standing still at the end is for the critics, as an actor may learn from it to stop just
    short of success (--actor-until); the last success counts for ever (--lasting), or standing there loses value
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
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.octo_policy import OctoPolicy, check_octo, random_shift
from backbones.units import SIGMA_DATA, adamw, set_lr
from plumbing import (
    FILM,
    SPAWN,
    Demos,
    Evaluator,
    ObsWrapper,
    Run,
    RunArgs,
    Slots,
    Spawn,
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
    control_mode: str = "pd_ee_delta_pos"  # ManiSkill controller
    control_freq: int = 10  # control steps per second (ManiSkill's default is 20)
    max_episode_steps: int | None = None  # time limit in control steps; default: per task, see plumbing/tasks.py
    robot_uids: str = "panda"  # robot model
    cameras: Literal["primary", "both"] = "both"  # one that looks at the table, or one on panda's hand too (rgb)
    image_size: int = 64  # pixels a side (hand: half of it, from 64 on); released weights need 256
    full_meshes: bool = False  # draw the arm with all of its triangles: three times as long without a GPU
    sim_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"  # physx_cuda: all in one GPU batch
    num_envs: int = 2  # environments side by side (physx_cpu: a process each)

    # --- demonstrations ---
    spawn: Literal["random", "fixed", "ood"] = "random"  # where objects start: task's rectangle, one place, outside it
    upsample_steps: int = 8  # reward upsampling: control steps recorded, and rewarded, after the first success
    lasting: bool = True  # the last of them counts as success for ever (1 in all); --no-lasting: each is worth 1
    actor_until: Literal["success", "rest", "end"] = "rest"  # its decisions end at success, at rest after it, or never
    holdout: float = 0.1  # share of the demonstrations that is kept out of training, for the validation loss

    # --- model ---
    backbone: Literal["octo-compact", "octo-small", "octo-base"] = "octo-compact"  # size of the Octo backbone
    checkpoint: str | None = None  # released Octo weights to start from: a folder, or hf://owner/name[@revision]
    hidden_dim: int = 256  # width of the actor
    chunk_len: int = 4  # H: actions per decision, executed open loop
    critic_len: int | None = None  # actions that the critic scores; default: all H; 1: single-step TD (ablation)
    critic_dim: int = 64  # width of the critic's transformer
    critic_layers: int = 2  # its blocks

    # --- stage 1: behaviour cloning ---
    sft_checkpoint: str | None = None  # run folder of bc.py --head mse-chunk to start from in the place of stage 1
    sft_updates: int = 6000  # updates of backbone and head
    sft_lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    sft_batch_size: int = 64  # transitions per batch
    weight_decay: float = 1e-4  # of matrices and kernels
    proprio_noise: float = 0.1  # noise on proprio in every update, in standard deviations of the demonstrations

    # --- stage 2: chunked offline reinforcement learning ---
    preset: Literal["default", "paper"] = "default"  # "paper": the paper's choices; other flags still win
    critic_first: int = 500  # updates that train the critics alone, before the actor moves
    offline_updates: int = 500  # actor updates, beside the critics'
    gamma: float = 0.98  # discount per control step
    reinforce_lr: float = 3e-4  # learning rate of the critics (Adam, constant)
    actor_lr: float = 1e-4  # learning rate of the actor in stage 2 (Adam, constant)
    batch_size: int = 128  # transitions per batch
    tau: float = 0.01  # Polyak step of the target networks
    critic_updates: int = 2  # critic updates per actor update (TD3's delay)
    return_mix: float = 0.5  # share of the Monte-Carlo return in the critic's target (0 = the paper's TD)
    target_noise: float = 0.2  # noise on target actions and on the copies in Eq. (8), in standard deviations of actions
    cql_alpha: float = 0.005  # alpha of Eq. (8)
    cql_samples: int = 2  # chunks in Eq. (8)'s expectation: the policy's own and noisy copies of it
    calibrate: bool = True  # --no-calibrate: CQL without the Monte-Carlo bound (ablation)
    q_weight: float = 1.0  # weight of the Q loss
    bc_weight: float = 1.0  # weight of imitation beside it (0 = the paper's Eq. 9)
    q_normalize: bool = True  # divide the Q loss by the batch mean of |Q|

    # --- evaluation ---
    eval_elsewhere: bool = False  # evaluate where no demonstration starts as well (--spawn ood): eval/*_ood
    val_freq: int = 100  # updates between validation losses (with --holdout)


# The defaults above are for cameras. What else a choice changes; flags on the command line always win.
BY_OBS_MODE = {"state": dict(num_envs=1, proprio_noise=0.0, weight_decay=1.0)}
PUSH = dict(actor_until="success")  # there is nothing to learn after it: the object only has to arrive
BY_TASK = {("PushCube-v1", "state"): PUSH, ("PullCube-v1", "state"): PUSH}  # as in the benchmark
BY_PRESET = {
    "paper": dict(
        bc_weight=0.0, q_normalize=False, cql_alpha=0.1, return_mix=0.0, holdout=0.0, num_demos=30, tau=0.005,
        gamma=0.99, batch_size=256, sft_lr=3e-4, critic_first=0, actor_lr=3e-4, offline_updates=20_000, lasting=False,
        actor_until="end", weight_decay=1e-4,
    ),
}  # fmt: skip
TABLES = {"obs_mode": BY_OBS_MODE, "env_id obs_mode": BY_TASK, "preset": BY_PRESET}

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, """control_freq hidden_dim chunk_len critic_len critic_layers sft_batch_size
        batch_size critic_updates cql_samples val_freq"""),
    "positive": (lambda x: x > 0, "sft_lr reinforce_lr actor_lr"),
    "within [0, 1]": (lambda x: 0 <= x <= 1, "tau return_mix"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "gamma holdout"),
    "a multiple of 4": (lambda x: x > 0 and x % 4 == 0, "critic_dim"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
}  # fmt: skip


def validate(args: Args) -> None:
    """Fill in and check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    if args.critic_len is None:
        args.critic_len = args.chunk_len
    check_flags(args, LIMITS)
    check_octo(args)
    if args.critic_len > args.chunk_len:
        raise UserError(f"--critic-len must be at most --chunk-len {args.chunk_len}, got {args.critic_len}")
    if (args.spawn != "random" or args.eval_elsewhere) and args.env_id not in SPAWN:
        raise UserError(f"--spawn and --eval-elsewhere know {', '.join(SPAWN)}, not {args.env_id}")
    if args.demo_path and args.spawn != "random":
        raise UserError("--spawn moves objects in demonstrations made here; with --demo-path the file decides")
    check_sft(args, head="mse-chunk")


def held_demos(share: float, num_demos: int) -> int:
    """How many demonstrations, the last ones, are kept out of training."""
    return math.ceil(share * num_demos)


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
    return ObsWrapper(Spawn(env, args.env_id, args.spawn))


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


# === Replay ==========================================================================================================
@dataclass
class Batch:
    """B decisions with the K prefixes of their chunks that the critic scores."""

    feature: Tensor  # [B, F] embedding and normalised proprio at t
    chunk: Tensor  # [B, H*A] actions t..t+H-1, normalised to [-1, 1], time-major
    valid: Tensor  # [B, K] 1 if prefix i has a target: it lies within the episode, or nothing counts after its end
    reward: Tensor  # [B, K] sum over j < i of gamma^j * r_{t+j}
    bootstrap: Tensor  # [B, K] gamma^i, or 0 if the episode terminated by t + i (not: was truncated)
    next_feature: Tensor  # [B, K, F] at t + i, or where the episode ends before
    mc_return: Tensor  # [B] discounted return from t on; of a truncated episode a lower bound of it
    terminated: Tensor  # [B] whether the episode ends in success


def step_rewards(demos: Demos, final: np.ndarray, args: Args):
    """Reward of each recorded step [M], and which episodes terminate [episodes]; they end before the rows `final`.

    Each successful step until then is rewarded by 1, so that standing still at the goal is worth less with every step;
    or (`lasting`) by 1 - gamma and the last one by 1, what going on like that would earn, so that success is worth 1
    all along. An episode that ends in success is terminated, any other one is truncated.
    """
    if not args.upsample_steps:
        reward = np.zeros(len(demos.action), np.float32)
        reward[final - 1] = 1
        return reward, np.ones(len(final), dtype=bool)
    reward = demos.success.astype(np.float32)
    terminated = demos.success[final - 1]
    if args.lasting:
        reward *= 1 - args.gamma
        reward[final[terminated] - 1] = 1
    return reward, terminated


def mc_returns(reward: np.ndarray, gamma: float) -> np.ndarray:
    """Returns-to-go of an episode [T]; nothing is earned after a truncation: the lower bound of the reward 0."""
    value = 0.0
    returns = np.empty_like(reward)
    for t in reversed(range(len(reward))):
        returns[t] = reward[t] + gamma * value
        value = returns[t]
    return returns


def at_rest(action: np.ndarray, agent: Agent) -> int:
    """The step from which on a recording [T, A] only keeps still."""
    for step in reversed(range(1, len(action))):
        hold = agent.hold_action(action[step - 1])
        if (action[step] != hold).any():
            return step + 1
    return 1


class ChunkData:
    """The demonstrations, one row per observation; chunks and their prefixes are put together when they are drawn.

    An episode ends `upsample_steps` after its first success (reward upsampling). A prefix that reaches past a
    termination is worth what was earned before, so that bootstrap values, which are whole chunks', are trained up to
    the end; one that reaches past a truncation has no target. `actor_until`: the actor's decisions end with the one
    that succeeds, the last that moves or the last recorded.
    """

    def __init__(self, demos: Demos, agent: Agent, args: Args):
        self.H = agent.H
        self.K = args.critic_len
        self.gamma = args.gamma
        starts = demos.starts()
        ends = starts + demos.lengths  # rows of the last observations
        successes = starts + demos.steps
        finals = np.minimum(successes + args.upsample_steps, ends)  # where the episodes end
        reward, terminated = step_rewards(demos, finals, args)
        action = agent.normalise(demos.action)
        mc_return = np.zeros_like(reward)
        stops = []  # where the actor's decisions end
        for start, success, final, end in zip(starts, successes, finals, ends):
            action[end] = agent.hold_action(action[end - 1])  # fills up chunks past the recording
            until = slice(start, final)
            mc_return[until] = mc_returns(reward[until], args.gamma)
            rest = start + at_rest(action[start:end], agent)
            stop = {"success": success, "rest": max(rest, success), "end": end}
            stops.append(stop[args.actor_until])

        def rows(of_episode: np.ndarray) -> np.ndarray:
            return np.repeat(of_episode, demos.lengths + 1)

        def kept(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(args.device)

        self.feature = torch.empty(len(action), agent.feature_dim, device=args.device)  # by `embed_demonstrations`
        self.action = kept(action)
        self.reward = kept(reward)
        self.mc_return = kept(mc_return)
        self.terminated = kept(rows(terminated))
        self.final = kept(rows(finals))
        self.last = kept(rows(ends))

        # Rows from which chunks are drawn
        row = np.arange(len(action))
        shown = row < rows(np.array(stops))
        counts = row < rows(finals)
        trained = np.ones(len(ends), dtype=bool)
        first_held = len(ends) - held_demos(args.holdout, len(ends))
        trained[first_held:] = False
        trained = rows(trained)
        self.shown = kept(shown)
        self.cloned_rows = kept(row[shown & trained])
        self.actor_rows = kept(row[shown & counts & trained])
        self.critic_rows = kept(row[counts & trained])
        self.held_rows = kept(row[counts & ~trained])

    def draw(self, rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """`size` of the rows, uniform with replacement: [size] int64."""
        chosen = torch.randint(len(rows), (size,), generator=generator, device=rows.device)
        return rows[chosen]

    def chunk(self, rows: Tensor) -> Tensor:
        """The chunks recorded from rows [B] on: [B, H*A]."""
        last = self.last[rows][:, None]
        offsets = torch.arange(self.H, device=rows.device)
        steps = rows[:, None] + offsets
        steps = torch.minimum(steps, last)
        return self.action[steps].flatten(1)

    def gather(self, rows: Tensor) -> Batch:
        """The decisions at rows [B], which lie before their episodes' ends."""
        i = torch.arange(1, self.K + 1, device=rows.device)
        start = rows[:, None]
        end = self.final[rows][:, None]
        terminated = self.terminated[rows][:, None]
        within = start + i <= end
        reached = torch.minimum(start + i, end)  # [B, K] rows to which prefixes lead
        over = terminated & (reached == end)
        reward = self.reward[reached - 1] * within
        discounted = reward * self.gamma ** (i - 1)
        return Batch(
            feature=self.feature[rows],
            chunk=self.chunk(rows),
            valid=(within | terminated).float(),
            reward=discounted.cumsum(1),  # Eq. (3)
            bootstrap=self.gamma ** (reached - start) * ~over,
            next_feature=self.feature[reached],
            mc_return=self.mc_return[rows],
            terminated=self.terminated[rows],
        )


# === Networks ========================================================================================================
class ChunkActor(nn.Module):
    """Deterministic chunk: an MLP on the feature, in units of the demonstrations' spread (bc.py --head mse-chunk)."""

    def __init__(self, feature_dim: int, unit: Tensor, hidden: int):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [D]
        self.net = nn.Sequential(
            nn.Linear(feature_dim, hidden),
            nn.LayerNorm(hidden, eps=1e-6),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden, eps=1e-6),
            nn.Tanh(),
            nn.Linear(hidden, len(unit)),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[B, F] -> [B, D] in [-1, 1]."""
        return (self.unit * self.net(feature)).clamp(-1, 1)

    def noisy(self, chunk: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        """TD3's smoothing per action dimension, in standard deviations of the demonstrations (TD3: 0.2, up to 0.5)."""
        z = torch.randn(chunk.shape, generator=generator, device=chunk.device)
        spread = noise * SIGMA_DATA * self.unit
        return (chunk + spread * z.clamp(-2.5, 2.5)).clamp(-1, 1)


class Dense(nn.Module):
    """A linear layer of each critic, as one batched product."""

    def __init__(self, num: int, fan_in: int, out: int):
        super().__init__()
        weight = torch.randn(num, fan_in, out)
        self.weight = nn.Parameter(0.02 * weight)
        self.bias = nn.Parameter(torch.zeros(num, 1, out))

    def forward(self, x: Tensor) -> Tensor:
        """[E, .., in] -> [E, .., out], by the first E critics."""
        E = len(x)
        bias = self.bias[:E]
        weight = self.weight[:E]
        y = torch.baddbmm(bias, x.flatten(1, -2), weight)
        return y.view(*x.shape[:-1], -1)


def normed(x: Tensor) -> Tensor:
    """Layer norm; its gains are left to the layers behind it."""
    return F.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """A causal pre-norm GPT block of each critic."""

    def __init__(self, num: int, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Dense(num, dim, 3 * dim)
        self.mix = Dense(num, dim, dim)
        self.up = Dense(num, dim, 4 * dim)
        self.down = Dense(num, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[E, S, T, d], S sequences of T tokens -> same."""
        qkv = self.qkv(normed(x)).flatten(0, 1)  # [E*S, T, 3*d]
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [E*S, heads, T, d/heads] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        x = x + self.mix(mixed)
        hidden = F.gelu(self.up(normed(x)))
        return x + self.down(hidden)


class ChunkCritic(nn.Module):
    """Twin causal transformers over K + 1 tokens, the state and its actions: output i is Q(s, a_1..a_i)."""

    def __init__(self, feature_dim: int, unit: Tensor, dim: int, layers: int, heads: int = 4, num: int = 2):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [K, A]
        self.state_in = Dense(num, feature_dim, dim)
        self.action_in = Dense(num, unit.shape[-1], dim)
        position = torch.randn(num, 1, len(unit) + 1, dim)
        self.position = nn.Parameter(0.02 * position)
        self.out = Dense(num, dim, 1)
        blocks = [Block(num, dim, heads) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, feature: Tensor, chunk: Tensor, num: int = 2) -> Tensor:
        """Q of all prefixes by the first `num` critics: feature [B, F], chunk [B, N, H*A] -> [num, B, N, K]."""
        N = chunk.shape[1]
        K, A = self.unit.shape
        scored = chunk[..., : K * A]
        action = scored.unflatten(-1, (K, A)) / self.unit
        action = action.flatten(0, 1)  # [B*N, K, A]
        action = self.action_in(action.expand(num, -1, -1, -1))  # [E, B*N, K, d]
        state = self.state_in(feature.expand(num, -1, -1))  # [E, B, d]
        state = state.unsqueeze(2).expand(-1, -1, N, -1)
        state = state.flatten(1, 2).unsqueeze(2)  # [E, B*N, 1, d]
        tokens = torch.cat([state, action], 2)  # [E, B*N, K+1, d]
        x = tokens + self.position[:num]
        for block in self.blocks:
            x = block(x)
        q = self.out(normed(x))[:, :, 1:, 0]  # [E, B*N, K]
        return q.unflatten(1, (-1, N))


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
        self.actor = ChunkActor(self.feature_dim, self.chunk_unit, args.hidden_dim)
        self.target_actor = ChunkActor(self.feature_dim, self.chunk_unit, args.hidden_dim)
        for _ in range(2):  # drawn and dropped: so the critics of a seed begin as those of benchmark/results
            ChunkActor(self.feature_dim, self.chunk_unit, args.hidden_dim)
        unit = self.chunk_unit.view(self.H, -1)  # [H, A]
        unit = unit[: args.critic_len]
        sizes = (self.feature_dim, unit, args.critic_dim, args.critic_layers)
        self.critic = ChunkCritic(*sizes)
        self.target_critic = ChunkCritic(*sizes)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_actor.requires_grad_(False)
        self.target_critic.requires_grad_(False)

    def act(self, feature: Tensor) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] normalised."""
        chunk = self.actor(feature)
        return chunk.unflatten(1, (self.H, -1)).cpu().numpy()


# === Losses: pure functions ==========================================================================================
def mse_loss(predicted: Tensor, chunk: Tensor, unit: Tensor) -> Tensor:
    """Eq. (7): mean squared error of a chunk, in units of the spread. Shapes: [B, D], [B, D], [D] -> scalar."""
    return ((predicted - chunk) / unit).square().mean()


def td_target(batch: Batch, next_q: Tensor, return_mix: float, high: float) -> Tensor:
    """y_i = sum over j < i of gamma^j r_{t+j} + gamma^i * min_k Q'_k(s_{t+i}, a'), kept within the returns that exist.

    return_mix > 0 moves that share of the target to the Monte-Carlo return, where the episode has one (it terminates):
    TD would need thousands of updates to carry it back through the episode.
    Shapes: next_q [2, B, K] -> [B, K].
    Source: Eqs. (3) and (5); the bootstrap value is the whole chunk's (the paper is silent); return_mix: ours.
    """
    target = batch.reward + batch.bootstrap * next_q.min(0).values
    share = return_mix * batch.terminated[:, None]
    mc_return = batch.mc_return[:, None].expand_as(target)
    return torch.lerp(target, mc_return, share.expand_as(target)).clamp(0, high)


def td_loss(q: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Eq. (6): mean over critics and valid prefixes. Shapes: q [2, B, K], target [B, K], valid [B, K] -> scalar."""
    error = valid * (q - target).square()
    return error.sum() / (len(q) * mean_over_ranks(valid.sum()))


def calql_gap(q_data: Tensor, q_policy: Tensor, mc_return: Tensor, valid: Tensor, calibrate: bool) -> Tensor:
    """The regulariser of Eqs. (2) and (8): E_pi max(Q, V_mu) - E_data Q, averaged over prefixes and critics.

    Shapes: q_data [2, B, K], q_policy [2, B, n, K], mc_return [B], valid [B, K] -> scalar.
    """
    if calibrate:
        q_policy = torch.maximum(q_policy, mc_return[:, None, None])
    on_data = (valid * q_data).sum()
    count = len(q_data) * mean_over_ranks(valid.sum())
    return q_policy.mean() - on_data / count


def q_loss(q: Tensor, normalise: bool) -> Tensor:
    """Eq. (9): minus the mean Q over prefixes, optionally over the mean |Q| (as TD3+BC). q [.., K] -> scalar."""
    scale = mean_over_ranks(q.abs().mean().detach()) + 1e-6 if normalise else 1.0
    return -q.mean() / scale


# === Updates =========================================================================================================
def highest_return(args: Args) -> float:
    if args.lasting:
        return 1.0
    rewarded = range(args.upsample_steps + 1)
    return sum(args.gamma**i for i in rewarded)


def batch_target(agent: Agent, batch: Batch, args: Args, noise: float, generator: torch.Generator) -> Tensor:
    """Targets [B, K] of a batch from the target networks, with TD3's smoothing by `noise`."""
    feature = batch.next_feature.flatten(0, 1)  # [B*K, F]
    chunk = agent.actor.noisy(agent.target_actor(feature), noise, generator)
    next_q = agent.target_critic(feature, chunk[:, None])  # [2, B*K, 1, K]
    next_q = next_q[..., -1].view(2, *batch.reward.shape)  # of whole chunks
    return td_target(batch, next_q, args.return_mix, highest_return(args))


@compiled
def critic_loss(agent: Agent, batch: Batch, args: Args, generator) -> tuple[Tensor, dict]:
    """Eq. (8)."""
    with torch.no_grad():
        target = batch_target(agent, batch, args, args.target_noise, generator)
        own = agent.actor(batch.feature)[:, None]  # [B, 1, D]
        copies = own.expand(-1, args.cql_samples - 1, -1)
        copies = agent.actor.noisy(copies, args.target_noise, generator)
    chunks = torch.cat([batch.chunk[:, None], own, copies], 1)
    q = agent.critic(batch.feature, chunks)  # [2, B, 1 + n, K]
    q_data = q[:, :, 0]
    q_policy = q[:, :, 1:]
    loss_td = td_loss(q_data, target, batch.valid)  # Eq. (6)
    loss_cql = calql_gap(q_data, q_policy, batch.mc_return, batch.valid, args.calibrate)
    loss = loss_td + args.cql_alpha * loss_cql  # Eq. (8)
    below = q_policy < batch.mc_return[:, None, None]
    return loss, {
        "losses/td": loss_td,
        "losses/calql": loss_cql,
        "losses/critic": loss,
        "values/q_data": q_data.mean(),
        "values/q_policy": q_policy.mean(),
        "values/td_target": target.mean(),
        "values/mc_return": batch.mc_return.mean(),
        "calib/bound_rate": below.float().mean(),
    }


def update_critic(agent: Agent, optimizer, batch: Batch, args: Args, generator) -> dict[str, Tensor]:
    """One step on Eq. (8), and the Polyak step of the target critics."""
    loss, logs = critic_loss(agent, batch, args, generator)
    descend(optimizer, loss)
    polyak_update(agent.critic, agent.target_critic, args.tau)
    return logs


@compiled
def actor_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict]:
    """Eq. (9), and imitation."""
    chunk = agent.actor(batch.feature)
    q = fixed(agent.critic)(batch.feature, chunk[:, None], 1)  # [1, B, 1, K], critic 1 as in TD3
    loss_q = q_loss(q, args.q_normalize)  # Eq. (9)
    loss_bc = mse_loss(chunk, batch.chunk, agent.actor.unit)
    loss = args.q_weight * loss_q + args.bc_weight * loss_bc
    return loss, {"losses/q": loss_q, "losses/bc": loss_bc, "losses/actor": loss}


def update_actor(agent: Agent, optimizer, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step on `actor_loss`, and the Polyak step of the target actor."""
    loss, logs = actor_loss(agent, batch, args)
    descend(optimizer, loss)
    polyak_update(agent.actor, agent.target_actor, args.tau)
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
    """One chunk for each of n episodes, by what was seen last: [n, H, A] normalised."""
    return agent.act(agent.feature(obs))


def rollout(env, agent: Agent, args: Args, seeds, whole: bool = True, frames=None) -> list[np.ndarray]:
    """Success at each step [T] of episodes with these seeds.

    whole    an episode goes on after a success, to the time limit, to see whether it lasts
    frames   collects the first environment's video
    """
    slots = Slots(env, agent, args, partial(decide, agent), whole=whole, frames=frames)
    return slots.successes(seeds)


def evaluate(env, agent: Agent, args: Args, whole: bool = True) -> dict[str, float]:
    """Success where objects start as in the demonstrations, and where none does so (--eval-elsewhere): eval/*_ood."""
    metrics = evaluate_place(env, agent, args, whole)
    if args.eval_elsewhere:
        elsewhere = make_env(replace(args, spawn="ood"), args.num_envs)
        unseen = evaluate_place(elsewhere, agent, args, whole)
        elsewhere.close()
        metrics |= {f"{name}_ood": value for name, value in unseen.items()}
    return metrics


def evaluate_place(env, agent: Agent, args: Args, whole: bool) -> dict[str, float]:
    """Success over the fixed evaluation episodes: the same initial states every time.

    It leaves torch's global generator and those of training alone, so training doesn't depend on when it is called.
    """
    seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
    with torch.random.fork_rng(devices=[]):
        success = rollout(env, agent, args, seeds, whole)
    return success_metrics(success, args.max_episode_steps)


@torch.no_grad()
def embed_demonstrations(data: ChunkData, demos: Demos, agent: Agent) -> None:
    """Each observation of the demonstrations goes through the backbone once: it is frozen from here on."""
    for rows in torch.arange(len(demos.action)).split(256):
        obs = demos.at(rows, agent.window)
        data.feature[rows] = agent.feature(obs)


def draw(data: ChunkData, rows: Tensor, agent: Agent, args: Args, generator, noise: torch.Generator) -> Batch:
    """A batch of decisions at some of the rows, proprio noisy beside a camera."""
    chosen = data.draw(rows, per_rank(args.batch_size), generator)
    batch = data.gather(chosen)
    batch.feature = agent.perturb(batch.feature, args.proprio_noise, noise)
    after = batch.next_feature.flatten(0, 1)  # [B*K, F]
    after = agent.perturb(after, args.proprio_noise, noise)
    batch.next_feature = after.view_as(batch.next_feature)
    return batch


@torch.no_grad()
def held_out(data: ChunkData, agent: Agent, args: Args) -> dict[str, Tensor]:
    """TD error, Q against Monte-Carlo returns and imitation error on demonstrations that nothing was trained on."""
    batch = data.gather(data.held_rows)
    chunk = agent.actor(batch.feature)
    chunks = torch.stack([batch.chunk, chunk], 1)
    q = agent.critic(batch.feature, chunks)  # [2, B, 2, K]
    target = batch_target(agent, batch, args, 0.0, torch.Generator(args.device))
    of_chunks = q.mean(0)[..., -1]  # [B, 2]
    shown = data.shown[data.held_rows]
    return {
        "val/td_error": td_loss(q[:, :, 0], target, batch.valid),
        "val/q_data": of_chunks[:, 0].mean(),
        "val/q_policy": of_chunks[:, 1].mean(),
        "val/mc_return": batch.mc_return.mean(),
        "val/bc": mse_loss(chunk[shown], batch.chunk[shown], agent.actor.unit),
    }


# === Training ========================================================================================================
def main(args: Args) -> Path:
    """Run or resume both stages; returns the run's folder."""
    args = stored_args(args, __file__, beside="eval_episodes eval_seed eval_elsewhere")
    validate(args)
    demos = load_demos(args, make_env)
    torch.manual_seed(args.seed)
    agent = Agent(args, demos).to(args.device)
    if args.sft_checkpoint:
        held = {}
        if args.holdout:  # the policy must not have seen what is held out here
            held = dict(holdout=args.holdout, num_demos=args.num_demos, demo_path=args.demo_path)
        load_sft_weights(agent, args, head="mse-chunk", **held)
    cloned = nn.ModuleList([agent.backbone, agent.actor])
    sft_optimizer = adamw(cloned, args.sft_lr, args.weight_decay)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(cloned, multi_avg_fn=average)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.reinforce_lr, fused=True)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.actor_lr, fused=True)

    about = {"method": "CO-RFT", "weights": agent.weights, "demonstrations": demos.sha256()}
    evaluator = Evaluator(args, make_env, evaluate, agent)
    generators = ("batch", "critic", "actor", "update")
    run = Run(args, __file__, ("sft", "offline"), about, evaluator, generators)
    run.keep(  # what a checkpoint holds; a resumed run loads it here
        agent, critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer, sft_optimizer=sft_optimizer,
        averaged=averaged,
    )  # fmt: skip
    noise = run.rng["update"]
    if args.eval_only:
        env = make_env(args, args.num_envs)
        print(json.dumps(evaluate(env, agent, args), indent=2))
        return run.folder
    data = ChunkData(demos, agent, args)  # in the units of the loaded policy

    # Stage 1: behaviour cloning of backbone and head, Eq. (7)
    if run.enter("sft"):
        with threads(args, many="primary" in demos.obs):
            for step in run.updates_until(args.sft_updates, "[1/2] SFT"):
                lr = args.sft_lr * warmup_cosine(step, args.sft_updates)
                set_lr(sft_optimizer, lr)
                size = per_rank(args.sft_batch_size)
                rows = data.draw(data.cloned_rows, size, run.rng["batch"])
                obs = random_shift(demos.at(rows, agent.window), run.rng["batch"])
                feature = agent.perturb(agent.feature(obs), args.proprio_noise, noise)
                chunk = data.chunk(rows)
                loss = mse_loss(agent.actor(feature), chunk, agent.actor.unit)
                grad_norm = descend(sft_optimizer, loss, max_norm=1.0)
                averaged.update_parameters(cloned)
                run.tick({"losses/bc": loss, "grad_norm/sft": grad_norm, "lr/sft": lr})
            if args.sft_updates:
                cloned.load_state_dict(averaged.module.state_dict())
            agent.target_actor.load_state_dict(agent.actor.state_dict())
        run.drop("sft_optimizer", "averaged")
        run.evaluate(whole=True)

    # Stage 2: Cal-QL over the prefixes of chunks, and the actor that follows it, Eqs. (3-6), (8) and (9)
    if run.enter("offline"):
        embed_demonstrations(data, demos, agent)
        for step in run.updates_until(args.critic_first + args.offline_updates, "[2/2] CO-RFT"):
            for _ in range(args.critic_updates):
                batch = draw(data, data.critic_rows, agent, args, run.rng["critic"], noise)
                logs = update_critic(agent, critic_optimizer, batch, args, noise)
            if step >= args.critic_first:  # until then the actor stays the cloned one
                batch = draw(data, data.actor_rows, agent, args, run.rng["actor"], noise)
                logs |= update_actor(agent, actor_optimizer, batch, args)
            run.tick(logs, may_save=False)
            if args.holdout and run.stage_updates % args.val_freq == 0:
                run.log(held_out(data, agent, args))
            run.save_if_due()
        run.evaluate(whole=True)

    run.finish(spawn=args.spawn, **demos.summary())
    film_policy(agent, args, run.folder)
    return run.folder


def warmup_cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: linear over the first 5 %, then a cosine to zero."""
    warmup = (step + 1) / (0.05 * total)
    angle = math.pi * step / total
    cosine = (1 + math.cos(angle)) / 2
    return min(warmup, cosine)


def film_policy(agent: Agent, args: Args, folder: Path) -> None:
    """The first evaluation episodes as videos."""
    alone = replace(args, num_envs=1)

    def play(env, seed: int, frames: list) -> bool:
        (success,) = rollout(env, agent, alone, [seed], frames=frames)
        return bool(success.any())

    film(args, make_env, folder / "videos", play)


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, TABLES))
