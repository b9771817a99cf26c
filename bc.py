"""BC: behaviour cloning (supervised fine-tuning) of Octo on demonstrations, the baseline and start of the RL scripts.

A policy imitates the demonstrated action chunks. Nothing else: no reward, no critic, no interaction.

Losses (--head), all on chunks in units of the demonstrations' spread          where
  consistency   reconstruct the chunk from a random noise level (ConRFT)         consistency_loss
  diffusion     predict the noise that was added, 20 steps (Octo's own head)     backbones.octo.DiffusionHead.loss
  mse-chunk     squared error of one deterministic chunk (CO-RFT, stage 1)       mse_loss

Commands
  python bc.py --env-id PickCube-v1 --obs-mode state                 # privileged state: minutes on one core
  python bc.py --env-id StackCube-v1 --head diffusion                # RGB, makes its demonstrations on the first run
  python bc.py --env-id PickCube-v1 --obs-mode state --chunk-len 1   # single steps instead of chunks
  python bc.py --resume runs/NAME                                    # go on after a kill, with the same next losses
  python bc.py --eval-only runs/NAME                                 # evaluate the last checkpoint
  python force_octo.py --sft-checkpoint runs/NAME                    # reinforcement learning from here

The last averaged weights (EMA) are evaluated, never the best of several. Measured: docs/bc.md.
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
from torch import Tensor, nn

from backbones.octo import DiffusionHead
from backbones.octo_policy import OctoPolicy, check_octo, random_shift
from backbones.units import SIGMA_DATA, adamw, gaussian, set_lr, tanh_
from plumbing import (
    FILM,
    Demos,
    Evaluator,
    ObsWrapper,
    Run,
    RunArgs,
    Slots,
    camera_configs,
    check_flags,
    film,
    lighten,
    load_demos,
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
    sim_backend: Literal["physx_cpu", "physx_cuda"] = "physx_cpu"  # physx_cuda: all in one GPU batch
    num_envs: int = 2  # environments side by side (physx_cpu: a process each)

    # --- demonstrations ---
    holdout: float = 0.0  # share of the demonstrations that is kept out of training, for the validation loss

    # --- model ---
    backbone: Literal["octo-compact", "octo-small", "octo-base"] = "octo-compact"  # size of the Octo backbone
    checkpoint: str | None = None  # released Octo weights to start from: a folder, or hf://owner/name[@revision]
    head: Literal["consistency", "diffusion", "mse-chunk"] = "consistency"  # action head
    hidden_dim: int = 256  # width of the head
    noise_levels: int = 8  # noise levels drawn per sample in the policy's loss
    chunk_len: int = 4  # H: actions per decision, executed open loop (1 = the paper's)

    # --- training ---
    updates: int = 6000  # gradient steps
    finetune: Literal["full", "head"] = "full"  # train backbone and head, or the head alone
    lr: float = 2e-3  # peak learning rate, cosine decay after 5 % warm-up
    batch_size: int = 64  # transitions per batch
    weight_decay: float = 1e-4  # of matrices and kernels
    proprio_noise: float = 0.1  # noise on proprio in every update, in standard deviations of the demonstrations

    # --- evaluation and logging ---
    val_freq: int = 500  # updates between validation losses (with --holdout)


# The defaults above are for cameras. What else a choice changes; flags on the command line always win.
BY_OBS_MODE = {"state": dict(num_envs=1, proprio_noise=0.0, weight_decay=1.0)}
TABLES = {"obs_mode": BY_OBS_MODE}

LIMITS = {  # what a number must be: the test for it, and the flags; all other numbers must be at least 0
    "at least 1": (lambda x: x >= 1, "control_freq noise_levels hidden_dim chunk_len updates batch_size val_freq"),
    "positive": (lambda x: x > 0, "lr"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "holdout"),
    "a multiple of 32": (lambda x: x > 0 and x % 32 == 0, "image_size"),
}


def validate(args: Args) -> None:
    """Fill in and check the flags before anything is built. Raises: UserError naming the flag and what it may be."""
    check_flags(args, LIMITS)
    check_octo(args)


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


# === Replay ==========================================================================================================
class Chunks:
    """The demonstrations as (observation, action chunk) pairs, split into training and held-out episodes."""

    def __init__(self, demos: Demos, agent: Agent, holdout: float):
        """The last episodes are held out: a share `holdout` of all, rounded up."""
        starts = demos.starts()
        ends = starts + demos.lengths  # the row of an episode's last observation, which has no action
        action = agent.normalise(demos.action)
        for end in ends:  # chunks that reach past the recording's end are filled up with the action that keeps still
            action[end] = agent.hold_action(action[end - 1])
        self.H = agent.H
        last = np.repeat(ends, demos.lengths + 1)
        self.action = torch.from_numpy(action).to(demos.device)  # [M, A] normalised
        self.last = torch.from_numpy(last).to(demos.device)  # [M]
        held = math.ceil(holdout * len(ends))  # episodes
        first_held = starts[-held] if held else len(action)
        rows = np.delete(np.arange(len(action)), ends)
        rows = torch.from_numpy(rows).to(demos.device)
        self.train = rows[rows < first_held]
        self.held = rows[rows >= first_held]

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows of `size` training pairs, uniform with replacement: [size] int64."""
        rows = self.train
        chosen = torch.randint(len(rows), (size,), generator=generator, device=rows.device)
        return rows[chosen]

    def at(self, rows: Tensor) -> Tensor:
        """Chunks that start at rows [B]: [B, H*A] normalised, time-major."""
        offsets = torch.arange(self.H, device=rows.device)
        steps = rows[:, None] + offsets  # [B, H]
        steps = torch.minimum(steps, self.last[rows][:, None])
        return self.action[steps].flatten(1)


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


class MSEHead(nn.Module):
    """Deterministic chunk: an MLP on the feature. Works in units of the spread, as the other heads."""

    def __init__(self, feature_dim: int, unit: Tensor, hidden: int):
        super().__init__()
        self.register_buffer("unit", unit.clone())  # [D]
        layers = []
        for fan_in in (feature_dim, hidden):
            layers.append(nn.Linear(fan_in, hidden))
            layers.append(nn.LayerNorm(hidden, eps=1e-6))
            layers.append(nn.Tanh())
        layers.append(nn.Linear(hidden, len(unit)))
        self.net = nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, F] -> [B, D] in units of the spread."""
        return self.net(feature)


class Agent(OctoPolicy):
    """Octo with one of the heads. The consistency head is the RL scripts' actor, under the same name."""

    def __init__(self, args: Args, demos: Demos):
        """Raises: UserError if the weights of --checkpoint can't be had."""
        resumed = bool(args.resume or args.eval_only)
        super().__init__(
            args.backbone, args.checkpoint, resumed, demos.obs, demos.taken(), args.chunk_len,
            relative="delta" in args.control_mode, gripper=demos.gripper,
            instruction=task_of(args.env_id).instruction,
        )  # fmt: skip
        self.head = args.head
        if self.head == "consistency":
            self.actor = ConsistencyActor(self.feature_dim, self.chunk_unit, args.hidden_dim)
        elif self.head == "mse-chunk":
            self.actor = MSEHead(self.feature_dim, self.chunk_unit, args.hidden_dim)
        else:
            self.actor = DiffusionHead(self.feature_dim, self.H, self.action_dim, args.hidden_dim)
            unit = SIGMA_DATA * self.chunk_unit  # Octo's head takes unit variance, actions up to +-5
            self.actor.register_buffer("unit", unit)

    def act(self, feature: Tensor, generator: torch.Generator) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] normalised."""
        if self.head == "consistency":
            chunk = self.actor.sample(feature, 1, generator)  # [N, 1, H*A]
        elif self.head == "mse-chunk":
            chunk = self.actor.unit * self.actor(feature)
        else:
            units = self.actor.sample(feature, 1, generator)  # [N, 1, H, A]
            chunk = self.actor.unit * units.flatten(1)
        chunk = chunk.reshape(len(feature), self.H, -1)
        return chunk.clamp(-1, 1).cpu().numpy()


# === Losses: pure functions ==========================================================================================
def mse_loss(predicted: Tensor, chunk: Tensor) -> Tensor:
    """Mean squared error of a chunk. Shapes: [B, D], [B, D] -> [B]. Source: CO-RFT (arXiv:2508.02219), stage 1."""
    return (predicted - chunk).square().mean(-1)


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


def bc_loss(agent: Agent, feature: Tensor, chunk: Tensor, generator: torch.Generator, n: int) -> Tensor:
    """The loss of the agent's head, with n noise levels per sample where it has any.

    Shapes: feature [B, F], chunk [B, H*A] in [-1, 1] -> scalar.
    """
    actor = agent.actor
    if agent.head == "consistency":
        return consistency_loss(actor, feature, chunk, generator, n).mean()
    if agent.head == "mse-chunk":
        return mse_loss(actor(feature), chunk / actor.unit).mean()
    clean = (chunk / actor.unit).unflatten(1, (agent.H, -1))  # [B, H, A]
    return actor.loss(feature.repeat(n, 1), clean.repeat(n, 1, 1), generator)


def action_error(predicted: Tensor, chunk: Tensor, spread: Tensor) -> Tensor:
    """Squared error of predicted chunks in units of the demonstrations' variance: 0 perfect, about 1 the mean action.

    Shapes: [B, H, A], [B, H, A], spread [A] (standard deviations) -> [A].
    """
    return ((predicted - chunk) / spread).square().mean((0, 1))


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
    return success_metrics(success, args.max_episode_steps)


@torch.no_grad()
def held_out(agent: Agent, demos: Demos, chunks: Chunks) -> dict[str, Tensor]:
    """Loss and action error on the held-out demonstrations, with the same noise every time."""
    generator = torch.Generator(demos.device).manual_seed(0)
    loss = 0.0
    predicted = []
    for rows in chunks.held.split(256):
        feature = agent.feature(demos.at(rows, agent.window))
        part = bc_loss(agent, feature, chunks.at(rows), generator, n=1)
        loss += part * len(rows) / len(chunks.held)
        action = agent.act(feature, generator)
        predicted.append(torch.from_numpy(action))
    shown = chunks.at(chunks.held).cpu()
    chunk = shown.unflatten(1, (agent.H, -1))  # [B, H, A]
    spread = SIGMA_DATA * agent.chunk_unit[: agent.action_dim].cpu()
    error = action_error(torch.cat(predicted), chunk, spread)
    logs = {"val/loss": loss, "val/action_error": error.mean()}
    return logs | {f"val/action_error_{i}": e for i, e in enumerate(error)}


@torch.no_grad()
def embed_demonstrations(demos: Demos, agent: Agent) -> Tensor:
    """Each observation of the demonstrations goes through the backbone once: [M, F]."""
    features = []
    for rows in torch.arange(len(demos.action)).split(256):
        obs = demos.at(rows, agent.window)
        features.append(agent.feature(obs))
    return torch.cat(features)


# === Training ========================================================================================================
def main(args: Args) -> Path:
    """Run or resume; returns the run's folder."""
    args = stored_args(args, __file__)
    validate(args)
    demos = load_demos(args, make_env)
    torch.manual_seed(args.seed)
    agent = Agent(args, demos).to(args.device)
    chunks = Chunks(demos, agent, args.holdout)
    trained = agent if args.finetune == "full" else agent.actor
    optimizer = adamw(trained, args.lr, args.weight_decay)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(agent, multi_avg_fn=average)
    acting = averaged.module  # what is evaluated, and what other scripts start from

    about = {"method": f"BC, {args.head} head", "weights": agent.weights, "demonstrations": demos.sha256()}
    evaluator = Evaluator(args, make_env, evaluate, acting)
    run = Run(args, __file__, ("bc",), about, evaluator)
    run.keep(acting, raw=agent, averaged=averaged, optimizer=optimizer)  # a resumed run loads it here
    noise = run.rng["update"]
    if args.eval_only:
        env = make_env(args, args.num_envs)
        print(json.dumps(evaluate(env, acting, args), indent=2))
        return run.folder

    if run.enter("bc"):
        if args.finetune == "head":
            cached = embed_demonstrations(demos, agent)
        with threads(args, many="primary" in demos.obs):
            for step in run.updates_until(args.updates, f"BC, {args.head} head"):
                lr = args.lr * warmup_cosine(step, args.updates)
                set_lr(optimizer, lr)
                rows = chunks.draw(per_rank(args.batch_size), run.rng["batch"])
                if args.finetune == "full":
                    obs = random_shift(demos.at(rows, agent.window), run.rng["batch"])
                    feature = agent.feature(obs)
                else:
                    feature = cached[rows]
                feature = agent.perturb(feature, args.proprio_noise, noise)
                chunk = chunks.at(rows)
                loss = bc_loss(agent, feature, chunk, noise, args.noise_levels)
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
                averaged.update_parameters(agent)
                run.tick({"losses/bc": loss, "grad_norm/bc": grad_norm, "lr/bc": lr}, may_save=False)
                if len(chunks.held) and run.updates % args.val_freq == 0:
                    run.log(held_out(acting, demos, chunks))
                run.save_if_due()
        run.evaluate(whole=True)

    run.finish(**demos.summary())
    film_policy(acting, args, run.folder)
    return run.folder


def warmup_cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: linear over the first 5 %, then a cosine to zero."""
    warmup = (step + 1) / (0.05 * total)
    progress = step / total
    cosine = (1 + math.cos(math.pi * progress)) / 2
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
