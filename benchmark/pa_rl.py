"""PA-RL (arXiv:2412.06685), a baseline: the policy imitates actions that the critic has improved.

  python benchmark/pa_rl.py --env-id PickCube-v1 --obs-mode state
  python benchmark/pa_rl.py --env-id PickCube-v1 --obs-mode state --sft-checkpoint runs/NAME     # a run of bc.py
  python benchmark/pa_rl.py --env-id PickCube-v1 --obs-mode state --proposals 32 --kept 10 --climb-steps 10 --climb-rate 0.03

Environment, buffers, networks and cloning are conrft.py's. What is PA-RL's own stands here:

  global    proposals of the policy, of which those of the highest Q are kept                      improved
  local     these climb Q's gradient, and each stops at the best point of its way                  climb
  acting    the best of them                                                                       Agent.act
  critic    Cal-QL offline and online, with the best of them at s'                                 critic_loss
  policy    imitates one of them, by softmax of Q, online alone; the recorded action is            update_actor
            one of those that climb

Where it differs from the paper and its code (github.com/MaxSobolMark/PolicyAgnosticRL):
  1 the policy is conrft.py's one-step head, whose proposals are spread by a second denoising step
  2 the critic is conrft.py's; theirs is distributional, with ten members
  3 of 16 proposals 4 are kept, for 5 steps; theirs: of 32 ten, for 10 steps half as long. It is what takes time on a CPU
  4 returns lie in [0, 1], theirs in [-100, 0]: a step is 100 times theirs, and the softmax has a temperature of 0.01
  5 the conservative term has no chunks of the policy at s (theirs can leave them out too)
  6 data are half demonstrations, half replay; in theirs the policy's are mixed by how many there are
Flags of conrft.py that weigh its losses, and those of an operator, are refused.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conrft  # noqa: E402
from backbones.octo_policy import random_shift  # noqa: E402
from backbones.units import gaussian  # noqa: E402
from operators.interventions import Interventions  # noqa: E402
from plumbing import (  # noqa: E402
    Demos,
    Evaluator,
    Run,
    Slots,
    UserError,
    drawn,
    fixed,
    load_demos,
    load_sft_weights,
    parse_flags,
    per_rank,
    run_script,
    stored_args,
    threads,
)

TABLES = {
    "obs_mode": conrft.BY_OBS_MODE,
    "env_id obs_mode": {key: dict(online_steps=value["online_steps"]) for key, value in conrft.BY_TASK.items()},
}

CONRFTS_OWN = """preset fresh_head calibrate cql_weight_online bc_weight_offline bc_weight_online q_weight_offline
    q_weight_online q_scale onestep_mse bc_demo_only intervention takeover_after device_speed record_demos""".split()


@dataclass
class Args(conrft.Args):
    # --- PA-RL ---
    proposals: int = 16  # chunks that the policy proposes for a state; theirs: 32
    kept: int = 4  # of which so many climb, those of the highest Q; theirs: 10
    climb_steps: int = 5  # gradient steps; theirs: 10
    climb_rate: float = 0.06  # size of a step, for Q within [0, 1]; theirs: 3e-4 for Q within [-100, 0]
    spread: float = 0.3  # noise level of the second denoising step, which spreads the proposals
    temperature: float = 0.01  # of the softmax over Q; theirs: 1 for Q within [-100, 0]


def validate(args: Args) -> None:
    """Raises: UserError naming the flag and what it may be."""
    conrft.validate(args)
    if not 1 <= args.kept <= args.proposals:
        raise UserError(f"--kept {args.kept} must be at least 1 and at most --proposals {args.proposals}")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature} must be positive")
    defaults = Args()
    for name in CONRFTS_OWN:
        if getattr(args, name) != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} is conrft.py's own: pa_rl.py has no use for it")


# === Action optimisation =============================================================================================
class Agent(conrft.Agent):
    """conrft.py's networks. They act by pi_opt, the policy's best improved proposal, once a critic has learned."""

    def __init__(self, args: Args, demos: Demos):
        super().__init__(args, demos)
        self.args = args
        self.register_buffer("improves", torch.tensor(False))

    def act(self, feature: Tensor, generator: torch.Generator) -> np.ndarray:
        """One chunk per state: [N, F] -> [N, H, A] normalised."""
        if not self.improves:
            return super().act(feature, generator)
        chunk = best(*improved(self, feature, self.args, generator))
        return chunk.unflatten(1, (self.H, -1)).cpu().numpy()


def proposed(agent: Agent, feature: Tensor, args: Args, generator) -> Tensor:
    """Chunks of the policy: [B, F] -> [B, proposals, D] in [-1, 1]."""
    actor = agent.actor
    first = actor.sample(feature, 1, generator) / actor.unit
    noise = gaussian((len(feature), args.proposals, actor.chunk_dim), feature, generator)
    sigma = noise.new_full((1, 1), args.spread)
    return actor.unit * actor.denoise(feature, first + args.spread * noise, sigma)


@torch.no_grad()
def improved(
    agent: Agent, feature: Tensor, args: Args, generator, recorded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Global, then local optimisation: chunks [B, kept, D] and their Q [B, kept], the mean of the critics.

    recorded   chunk [B, D] that climbs in the place of the worst
    """
    chunks = proposed(agent, feature, args, generator)
    q = agent.critic(feature, chunks).mean(0)  # [B, proposals]
    kept = q.topk(args.kept).indices  # the best first
    chunks = chunks.take_along_dim(kept[..., None], 1)
    if recorded is not None:
        chunks = torch.cat([chunks[:, :-1], recorded[:, None]], 1)
    return climb(fixed(agent.critic), feature, chunks, args.climb_steps, args.climb_rate)


@torch.inference_mode(False)
@torch.enable_grad()
def climb(critic, feature: Tensor, chunk: Tensor, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Steps up the gradient of mean Q, within the box; each chunk stops at the best point of its way.

    Shapes: critic(feature [B, F], chunk [B, N, D]) -> [E, B, N]; returns chunk [B, N, D] and its Q [B, N].
    """
    feature = feature.clone()  # while acting they are inference tensors
    here = chunk.clone()
    way = []
    height = []
    for _ in range(steps):
        here.requires_grad_()
        q = critic(feature, here).mean(0)
        (slope,) = torch.autograd.grad(q.sum(), here)
        here = here.detach()
        way.append(here)
        height.append(q.detach())
        here = (here + rate * slope).clamp(-1, 1)
    way.append(here)
    height.append(critic(feature, here).mean(0))
    highest, where = torch.stack(height).max(0)  # [B, N]
    return torch.stack(way).take_along_dim(where[None, ..., None], 0)[0], highest


def best(chunks: Tensor, q: Tensor) -> Tensor:
    """The chunk of the highest Q: [B, N, D], [B, N] -> [B, D]."""
    where = q.argmax(-1)
    return chunks.take_along_dim(where[:, None, None], 1)[:, 0]


# === Updates =========================================================================================================
def critic_loss(agent: Agent, batch: conrft.Batch, args: Args, generator) -> tuple[Tensor, dict]:
    """Cal-QL. pi_opt acts at s', for the target; the conservative term has the same chunk, and random ones."""
    n = args.cql_samples
    device = batch.chunk.device
    following = best(*improved(agent, batch.next_feature, args, generator))  # [B, D]
    with torch.no_grad():
        two = torch.randperm(args.num_critics, generator=generator, device=device)[:2]
        next_q = agent.target_critic(batch.next_feature, following)[two]
        reward = conrft.REWARDS[args.reward]
        target = conrft.td_target(batch, next_q, reward.fail / (1 - args.gamma), reward.success)
        shape = (len(batch.chunk), n, batch.chunk.shape[1])
        uniform = torch.rand(shape, generator=generator, device=device)
    q_data = agent.critic(batch.feature, batch.chunk)  # [E, B]
    sampled = torch.cat([uniform * 2 - 1, following[:, None]], 1)  # [B, n + 1, D], all evaluated at s
    q_random, q_policy = agent.critic(batch.feature, sampled).split([n, 1], -1)
    loss_td = (q_data - target).square().mean()
    loss_cql, bound_rate = conrft.calql_loss(q_data, q_random, q_policy, batch.mc_return, args.bound_random)
    loss = loss_td + args.cql_weight * loss_cql
    logs = {
        "losses/td": loss_td,
        "losses/calql": loss_cql,
        "losses/critic": loss,
        "calib/bound_rate": bound_rate,
        "values/q_data": q_data.mean(),
        "values/q_policy": q_policy.mean(),
        "values/td_target": target.mean(),
        "values/mc_return": batch.mc_return.mean(),
    }
    return loss, logs


def update_critics(agent: Agent, optimizer, next_batch, args: Args, generator) -> tuple[conrft.Batch, dict]:
    """The critic's updates before one of the actor, which takes the last batch."""
    for _ in range(args.critic_updates):
        batch = next_batch()
        loss, logs = critic_loss(agent, batch, args, generator)
        conrft.descend(optimizer, loss)
        conrft.polyak_update(agent.critic, agent.target_critic, args.tau)
    return batch, logs


def update_actor(agent: Agent, optimizer, batch: conrft.Batch, args: Args, generator) -> dict[str, Tensor]:
    """Distillation: the actor clones one of its improved proposals, or the improved recorded chunk."""
    chunks, q = improved(agent, batch.feature, args, generator, batch.chunk)
    weight = torch.softmax(q / args.temperature, -1)
    k = drawn(weight, generator)
    target = chunks.take_along_dim(k[:, None, None], 1)[:, 0]
    loss = conrft.consistency_loss(agent.actor, batch.feature, target, generator, args.noise_levels).mean()
    conrft.descend(optimizer, loss)
    moved = (target - batch.chunk).abs().mean()
    return {"losses/bc": loss, "pa_rl/recorded_weight": weight[:, -1].mean(), "pa_rl/moved": moved}


# === Training ========================================================================================================
def main(args: Args) -> Path:
    """Run or resume all stages; returns the run's folder."""
    args = stored_args(args, __file__)
    validate(args)
    demos = load_demos(args, conrft.make_env)
    env = conrft.make_env(args, args.num_envs)
    torch.manual_seed(args.seed)
    agent = Agent(args, demos).to(args.device)
    load_sft_weights(agent, args, head="consistency")
    slots = Slots(conrft.WatchedEnv(env, None), agent, args, partial(conrft.decide, agent), training=True)
    demo = conrft.ReplayBuffer(agent, args, expert=True)
    replay = conrft.ReplayBuffer(agent, args, expert=False)
    conrft.add_demonstrations(demo, demos, agent, args)
    cloned = nn.ModuleList([agent.backbone, agent.actor])
    sft_optimizer = conrft.adamw(cloned, args.sft_lr, args.weight_decay)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(cloned, multi_avg_fn=average)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.reinforce_lr, fused=True)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.reinforce_lr, fused=True)

    about = {"method": "PA-RL", "weights": agent.weights, "demonstrations": demos.sha256()}
    evaluator = Evaluator(args, conrft.make_env, conrft.evaluate, agent)
    run = Run(args, __file__, ("sft", "offline", "online"), about, evaluator)
    run.keep(
        agent, demo=demo, replay=replay, critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer,
        sft_optimizer=sft_optimizer, averaged=averaged,
    )  # fmt: skip
    noise = run.rng["update"]
    next_batch = partial(conrft.draw, demo, replay, agent, args, run.rng)
    if args.eval_only:
        print(json.dumps(conrft.evaluate(env, agent, args), indent=2))
        return run.folder

    # Stage 0: behaviour cloning of backbone and head, as in conrft.py
    if run.enter("sft"):
        with threads(args, many="primary" in demos.obs):
            for step in run.updates_until(args.sft_updates, "[0/2] SFT"):
                conrft.set_lr(sft_optimizer, args.sft_lr * conrft.warmup_cosine(step, args.sft_updates))
                rows = demos.draw(per_rank(args.sft_batch_size), run.rng["batch"])
                obs = random_shift(demos.at(rows, agent.window), run.rng["batch"])
                chunk = demo.gather(rows).chunk
                logs = conrft.update_clone(agent, sft_optimizer, agent.feature(obs), chunk, args, noise)
                averaged.update_parameters(cloned)
                run.tick(logs)
            if args.sft_updates:
                cloned.load_state_dict(averaged.module.state_dict())
            conrft.embed_demonstrations(demo, demos, agent)
        run.drop("sft_optimizer", "averaged")
        run.evaluate()

    # Stage I: the critic on demonstrations; the policy stays as it was cloned
    if run.enter("offline"):
        for _ in run.updates_until(args.offline_updates, "[1/2] Cal-QL"):
            _, logs = update_critics(agent, critic_optimizer, next_batch, args, noise)
            run.tick(logs)
        agent.improves.fill_(True)
        run.evaluate(whole=True)

    # Stage II: critic, and distillation into the policy, on demonstrations and rollouts
    if run.enter("online"):
        bar = run.bar("[2/2] PA-RL", args.online_steps, run.stage_env_steps)
        while slots.busy or run.stage_env_steps < args.online_steps:
            if not slots.busy:
                run.evaluate_if_due()
            most = 0 if slots.busy and run.rest_due(args.online_steps) else None
            bar.update(conrft.collect(slots, agent, args, run, demo, replay, Interventions(), most))
            for _ in run.updates_until(int(args.utd_ratio * run.stage_env_steps)):
                batch, logs = update_critics(agent, critic_optimizer, next_batch, args, noise)
                logs |= update_actor(agent, actor_optimizer, batch, args, noise)
                run.tick(logs, may_save=False)
            if not slots.busy:
                run.log(run.recent_episodes() | {"buffer/size": replay.steps.rows})
                run.save_if_due()
        run.evaluate(whole=True)

    run.finish(**demos.summary())
    conrft.film_policy(agent, args, run.folder)
    env.close()
    return run.folder


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, TABLES))
