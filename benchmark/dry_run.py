"""Parameters, memory and work of a run of force_pi0.py with these flags, from shapes alone: nothing is loaded.

It counts the longest prompt. The GPU's memory is the most that stage 0 needs: updates of it are gone through with
tensors that have a shape and no numbers, and all that are alive are added up after each operation. What an operation
needs inside, the allocator's gaps and CUDA's own memory come on top.
"""

import json
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import force_pi0 as script  # noqa: E402
from backbones.pi0_policy import accumulate, check_sizes  # noqa: E402
from force_pi0 import Agent, Args  # noqa: E402
from plumbing import Demos, check_flags, parse_flags, run_script  # noqa: E402

PROPRIO = 25  # about what the tasks have
ACTION_DIMS = {"pd_ee_delta_pos": 4, "pd_ee_delta_pose": 7}  # other controllers: about 8
ATTENTION = {  # operations that FlopCounterMode doesn't know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def main(args: Args) -> None:
    print(json.dumps(dry_run(args), indent=2))


def dry_run(args: Args) -> dict:
    """What a run with these flags takes. Raises: UserError."""
    args.checkpoint = None
    check_flags(args, script.LIMITS)
    check_sizes(args)
    obs = toy_observations(args, 2)
    actions = np.eye(2, ACTION_DIMS.get(args.control_mode, 8), dtype=np.float32)
    with torch.device("meta"):
        agent = Agent(args, Demos(obs, actions, np.array([1]), np.array([1]), "none"))
    ids = torch.zeros(1, agent.backbone.config.max_tokens, dtype=torch.long)
    agent.backbone.prompt = lambda *_: (ids, ids == 0)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a module is copied
    with FakeTensorMode(allow_non_fake_inputs=True):
        return estimate(agent, args)


def estimate(agent: Agent, args: Args) -> dict:
    """The same, for an agent whose weights are on no device yet."""
    return {
        "parameters": count(agent.parameters()),
        "parameters_pi0": count(agent.backbone.parameters()) + count(agent.flow_policy.parameters()),
        "trained_in_stage_0": count(agent.cloned_weights()),
        "trained_online": count(weight for weight in agent.actor.parameters() if weight.requires_grad),
        **measure_cloning(agent, args),
        **count_online(agent, args),
    }


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive now, and at most, among those that operations within this mode returned.

    A storage counts once, until nothing refers to it: views add nothing.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.most = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name not in self.known:
            self.known.add(name)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, name, storage.nbytes())

    def remove(self, name: int, size: int) -> None:
        self.known.remove(name)
        self.now -= size


def measure_cloning(agent: Agent, args: Args) -> dict[str, int | float]:
    """Operations of an update of stage 0, and bytes on the GPU: what stays between updates, and the most there are."""
    B = args.sft_batch_size
    size = min(args.micro_batch or B, B)
    with LiveBytes() as memory:
        agent.to_empty(device="cpu")
        weights = memory.now
        sft = script.cloning(agent.cloned_weights(), args)
        averages = memory.now - weights
        losses = script.clone_losses(agent, *toy_batch(agent, args, 1), args, None)
        work = flops(lambda: script.update_clone(sft, losses, args.sft_lr))
        stays = memory.now  # with gradients and Adam's moments
        memory.most = stays  # a step works in place, but fake tensors are copied for it, and `flops` keeps some
        if size == B:
            sft.optimizer.zero_grad()  # otherwise a micro-batch before this one has left gradients
        accumulate(script.clone_losses(agent, *toy_batch(agent, args, size), args, None))
        with torch.no_grad():  # as the demonstrations are embedded, at the end
            agent.feature(toy_batch(agent, args, args.micro_batch or 256)[0])
    of_head = sum(weight.nbytes for weight in script.trained(agent.actor))  # which has an average of its own
    return {
        "flops_sft_update": work * B,
        "gpu_bytes_weights": weights,
        "gpu_bytes_gradients_and_adam": stays - weights - averages,
        "gpu_bytes_averages": averages + of_head,
        "gpu_bytes_activations": memory.most - stays,
        "gpu_gib_stage_0": round((memory.most + of_head) / 2**30, 2),
    }


def toy_batch(agent: Agent, args: Args, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Observations and chunks [rows, D]."""
    obs = {name: torch.from_numpy(value) for name, value in toy_observations(args, rows).items()}
    return obs, torch.zeros(rows, len(agent.chunk_unit))


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
    batch = script.Batch(rows, chunk, zeros, zeros, rows, zeros, zeros)
    still = SimpleNamespace(zero_grad=int, step=int, param_groups=[{"params": []}])
    weights = (args.distill_weight, args.q_weight)
    critic = flops(lambda: script.update_critic(agent, still, batch, args, 0.0, None))
    actor = flops(lambda: script.update_actor(agent, still, batch, chunk, args, None, *weights))
    candidates = B // 2 * draw_K if args.vgpd else 0
    return {
        "replay_bytes_per_step": 4 * row.shape[1] + 4 * agent.action_dim + 40,
        "flops_action_K1": embed + draw_one,
        "flops_action_K": embed + draw_K,
        "flops_online_update": args.critic_updates * critic + actor + candidates,
    }


def flops(function: Callable) -> int:
    """Operations that a call does; a multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


if __name__ == "__main__":
    run_script(main, parse_flags(Args, __doc__, script.TABLES))
