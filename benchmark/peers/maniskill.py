"""One update of ManiSkill's SAC (examples/baselines/sac/sac.py), with the sizes of timed.py: maniskill.py REPO ACTION_DIM.

The networks are its own, with two hidden layers for its three. Its losses stand in the loop of its program; here they are
written once more: TD with the least of two targets and the entropy, the actor's loss with the mean Q, and the entropy's
coefficient. Targets move at every update (there at every second).
"""

import copy
import importlib
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from timed import BATCH, CRITICS, FEATURES, HIDDEN, serve


def main(repo: str, action_dim: int) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(repo) / "examples/baselines/sac"))
    sac = importlib.import_module("sac")
    spaces = (gym.spaces.Box(-np.inf, np.inf, (FEATURES,)), gym.spaces.Box(-1.0, 1.0, (action_dim,)))
    sizes = dict(hidden_dims=[HIDDEN, HIDDEN])
    actor = sac.Actor(*spaces, **sizes)
    critics = torch.nn.ModuleList(sac.SoftQNetwork(*spaces, **sizes) for _ in range(CRITICS))
    targets = copy.deepcopy(critics)
    log_alpha = torch.zeros(1, requires_grad=True)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=3e-4)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-4)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=3e-4)
    state = torch.randn(2, BATCH, FEATURES)
    action = torch.rand(BATCH, action_dim) * 2 - 1
    reward = torch.rand(BATCH, 1)

    def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update() -> None:
        alpha = log_alpha.exp().item()
        with torch.no_grad():
            following, log_prob, _ = actor.get_action(state[1])
            least = torch.cat([q(state[1], following) for q in targets], 1).min(1, keepdim=True).values
            target = reward + 0.98 * (least - alpha * log_prob)
        values = torch.cat([q(state[0], action) for q in critics], 1)
        step(critic_optimizer, (values - target).square().sum())
        own, log_prob, _ = actor.get_action(state[0])
        values = torch.cat([q(state[0], own) for q in critics], 1)
        step(actor_optimizer, (alpha * log_prob - values.mean(1, keepdim=True)).mean())
        with torch.no_grad():
            log_prob = actor.get_action(state[0])[1]
        step(alpha_optimizer, (-log_alpha.exp() * (log_prob - action_dim)).mean())
        for source, slow in zip(critics.parameters(), targets.parameters()):
            slow.data.copy_(0.005 * source.data + 0.995 * slow.data)

    serve(update)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
