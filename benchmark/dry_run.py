"""Parameters, memory and work of a run of force_pi0.py, from shapes alone: nothing is loaded, nothing computed.

    python benchmark/dry_run.py --backbone pi0 --image-size 224 --finetune expert --bf16

It takes the flags of force_pi0.py; released weights need not be there. It counts the longest prompt. The GPU's memory is
that of stage 0: weights, gradients, Adam, averaged weights, and what the backward pass keeps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from backbones.pi0_policy import check_sizes  # noqa: E402
from force_pi0 import LIMITS, TABLES, Agent, Args, Batch, clone_losses, update_actor, update_critic  # noqa: E402
from plumbing import Demos, check_flags, parse_flags, run_script  # noqa: E402

PROPRIO = 25  # about what the tasks have
ACTION_DIMS = {"pd_ee_delta_pos": 4, "pd_ee_delta_pose": 7}  # other controllers: about 8


def main(args: Args) -> None:
    print(json.dumps(dry_run(args), indent=2))


def dry_run(args: Args) -> dict:
    """What a run with these flags takes. Raises: UserError."""
    args.checkpoint = None
    check_flags(args, LIMITS)
    check_sizes(args)
    A = ACTION_DIMS.get(args.control_mode, 8)
    obs = toy_observations(args)
    with torch.device("meta"):
        one_step = np.array([1])
        agent = Agent(args, Demos(obs, np.eye(2, A, dtype=np.float32), one_step, one_step, "none"))
        agent.backbone.prompt = longest_prompt(agent.backbone.config.max_tokens)
        flops, row = count_flops(agent, args, obs)
        kept = {}  # storages that the backward pass keeps: their bytes
        flops["flops_sft_update"] = count_cloning(agent, args, obs, kept)

    actor = trainable(agent.actor)
    learned = actor + [weight for part in agent.trained_parts() for weight in trainable(part)]
    parts = [agent.actor, *agent.trained_parts()]
    averaged = sum(bytes_of(part) for part in parts)
    own = {weight.untyped_storage()._cdata for weight in agent.parameters()}
    activations = sum(size for storage, size in kept.items() if storage not in own)
    trained = count(learned)
    in_training = 12 * trained + averaged  # gradient and Adam's two averages; the averaged weights
    return {
        "backbone": args.backbone,
        "head": args.head,
        "finetune": args.finetune,
        "parameters": count(agent.parameters()),
        "parameters_pi0": count(agent.backbone.parameters()) + count(agent.flow_policy.parameters()),
        "trained_in_stage_0": trained,
        "trained_online": count(actor),
        "replay_bytes_per_step": 4 * row.shape[1] + 4 * A + 40,
        **flops,
        "gpu_bytes_weights": bytes_of(agent),
        "gpu_bytes_training": in_training,
        "gpu_bytes_activations": activations,
        "gpu_gib_stage_0": round((bytes_of(agent) + in_training + activations) / 2**30, 2),
    }


def toy_observations(args: Args) -> dict[str, np.ndarray]:
    """Two observations of the right shapes."""
    obs = {"proprio": np.random.default_rng(0).normal(size=(2, PROPRIO)).astype(np.float32)}
    if args.obs_mode == "rgb":
        names = ("primary", "wrist") if args.cameras == "both" else ("primary",)
        side = args.image_size
        obs |= {name: np.zeros((2, side, side, 3), np.uint8) for name in names}
    return obs


def longest_prompt(tokens: int):
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return lambda *_: (ids, torch.ones(1, tokens, dtype=torch.bool))


def count_flops(agent: Agent, args: Args, obs: dict) -> tuple[dict[str, int], Tensor]:
    """Operations per action and per update of stage 3, and a row of the replay buffer."""
    one = {name: value[:1] for name, value in obs.items()}
    with torch.no_grad():
        row = agent.feature(one)
        embed = flops(lambda: agent.feature(one))
        draw_one = flops(lambda: agent.actor.sample(row, 1, None, args.candidate_sigma))
        draw_K = flops(lambda: agent.actor.sample(row, args.K, None, args.candidate_sigma))
    B = args.batch_size
    rows = row.expand(B, -1)
    chunk = torch.zeros(B, len(agent.chunk_unit))
    zeros = torch.zeros(B)
    expert = torch.arange(B) < B // 2
    batch = Batch(rows, chunk, zeros, zeros, rows, zeros, zeros, expert)
    still = SimpleNamespace(zero_grad=int, step=int, param_groups=[{"params": []}])
    critic = flops(lambda: update_critic(agent, still, batch, args, 0.0, None))
    weights = (args.distill_weight, args.q_weight)
    actor = flops(lambda: update_actor(agent, still, batch, chunk, args, None, *weights))
    candidates = B // 2 * draw_K if args.vgpd else 0
    found = {
        "flops_action_K1": embed + draw_one,
        "flops_action_K": embed + draw_K,
        "flops_online_update": args.critic_updates * critic + actor + candidates,
    }
    return found, row


def count_cloning(agent: Agent, args: Args, obs: dict, kept: dict[int, int]) -> int:
    """Operations of an update of stage 0; fills `kept`."""

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    many = {name: np.repeat(value[:1], args.sft_batch_size, 0) for name, value in obs.items()}
    chunk = torch.zeros(args.sft_batch_size, len(agent.chunk_unit))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        return flops(lambda: sum(clone_losses(agent, many, chunk, args, None).values()).backward())


def flops(function) -> int:
    """Operations that a call does; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if weight.requires_grad]


def count(weights) -> int:
    return sum(weight.numel() for weight in weights)


def bytes_of(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, TABLES))
