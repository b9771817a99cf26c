"""Parameters, memory and work of a run of force_pi0.py with these flags, from shapes alone: nothing is loaded.

It counts the longest prompt. The GPU's memory is that of stage 0, with all that the backward pass keeps.
"""

import json
import sys
from collections.abc import Callable, Iterable
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
    with torch.device("meta"):
        return estimate(args)


def estimate(args: Args) -> dict:
    obs = toy_observations(args, 2)
    actions = np.eye(2, ACTION_DIMS.get(args.control_mode, 8), dtype=np.float32)
    agent = Agent(args, Demos(obs, actions, np.array([1]), np.array([1]), "none"))
    ids = torch.zeros(1, agent.backbone.config.max_tokens, dtype=torch.long)
    agent.backbone.prompt = lambda *_: (ids, ids == 0)
    cloning, activations = count_cloning(agent, args)
    learners = [agent.actor, *agent.trained_parts()]
    trained = count(weight for part in learners for weight in part.parameters() if weight.requires_grad)
    memory = {
        "gpu_bytes_weights": bytes_of(agent),
        "gpu_bytes_training": 12 * trained + sum(map(bytes_of, learners)),  # gradient and Adam's two; the averages
        "gpu_bytes_activations": activations,
    }
    return {
        "parameters": count(agent.parameters()),
        "parameters_pi0": count(agent.backbone.parameters()) + count(agent.flow_policy.parameters()),
        "trained_in_stage_0": trained,
        "trained_online": count(weight for weight in agent.actor.parameters() if weight.requires_grad),
        **count_online(agent, args),
        "flops_sft_update": cloning,
        **memory,
        "gpu_gib_stage_0": round(sum(memory.values()) / 2**30, 2),
    }


def toy_observations(args: Args, rows: int) -> dict[str, np.ndarray]:
    """Random proprio, and black images: name -> [rows, ...]."""
    obs = {"proprio": np.random.default_rng(0).normal(size=(rows, PROPRIO)).astype(np.float32)}
    if args.obs_mode == "rgb":
        names = ("primary", "wrist") if args.cameras == "both" else ("primary",)
        obs |= {name: np.zeros((rows, args.image_size, args.image_size, 3), np.uint8) for name in names}
    return obs


def count_online(agent: Agent, args: Args) -> dict[str, int]:
    """Bytes of a step in the buffer; operations per action, and per update of stage 3 with the candidates that it draws."""
    obs = toy_observations(args, 1)
    B = args.batch_size
    with torch.no_grad():
        row = agent.feature(obs)
        embed = flops(lambda: agent.feature(obs))
        draw_one = flops(lambda: agent.actor.sample(row, 1, None, args.candidate_sigma))
        draw_K = flops(lambda: agent.actor.sample(row, args.K, None, args.candidate_sigma))
    rows = row.expand(B, -1)
    chunk = torch.zeros(B, len(agent.chunk_unit))
    zeros = torch.zeros(B)
    batch = Batch(rows, chunk, zeros, zeros, rows, zeros, zeros, torch.arange(B) < B // 2)
    still = SimpleNamespace(zero_grad=int, step=int, param_groups=[{"params": []}])
    weights = (args.distill_weight, args.q_weight)
    critic = flops(lambda: update_critic(agent, still, batch, args, 0.0, None))
    actor = flops(lambda: update_actor(agent, still, batch, chunk, args, None, *weights))
    candidates = B // 2 * draw_K if args.vgpd else 0
    return {
        "replay_bytes_per_step": 4 * row.shape[1] + 4 * agent.action_dim + 40,
        "flops_action_K1": embed + draw_one,
        "flops_action_K": embed + draw_K,
        "flops_online_update": args.critic_updates * critic + actor + candidates,
    }


def count_cloning(agent: Agent, args: Args) -> tuple[int, int]:
    """Operations of an update of stage 0, and bytes that its backward pass keeps beside the weights."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    obs = toy_observations(args, args.sft_batch_size)
    chunk = torch.zeros(args.sft_batch_size, len(agent.chunk_unit))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = flops(lambda: sum(clone_losses(agent, obs, chunk, args, None).values()).backward())
    for weight in agent.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)
    return found, sum(kept.values())


def flops(function: Callable) -> int:
    """Operations that a call does; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def bytes_of(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, TABLES))
