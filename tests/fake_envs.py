"""Environments that need no simulator: as quick as they are many, and each by its seed and actions alone."""

import numpy as np
import torch


class FakeEnvs:
    """N of them in one batch, as make_env gives it. Observations are numpy, or tensors as of a simulator on a GPU.

    By its seed, an episode succeeds after 3 to 10 steps, fails after 4, or goes on for ever.
    """

    def __init__(self, num_envs: int, proprio_dim: int = 6, tensors: bool = False):
        self.state = np.zeros((num_envs, proprio_dim), np.float32)
        self.seed = np.zeros(num_envs, int)
        self.t = np.zeros(num_envs, int)
        self.tensors = tensors
        self.resets = []  # seeds of each call of `reset` that began an episode
        self.steps = 0

    def seen(self) -> dict:
        proprio = self.state.copy()
        return {"proprio": torch.from_numpy(proprio) if self.tensors else proprio}

    def reset(self, *, seed, options=None):
        assert len(seed) == len(self.seed)
        begun = (options or {}).get("reset_mask", np.ones(len(seed), bool))
        assert begun.dtype == bool and begun.shape == self.seed.shape and begun.any()
        for i in np.flatnonzero(begun):
            self.state[i] = np.random.default_rng(seed[i]).normal(size=self.state.shape[1])
        self.seed = np.where(begun, seed, self.seed)
        self.t[begun] = 0
        self.resets.append(self.seed[begun].tolist())
        return self.seen(), {}

    def step(self, action):
        self.steps += 1
        self.t += 1
        width = min(action.shape[1], self.state.shape[1])
        self.state[:, :width] += 0.1 * action[:, :width]
        self.state[:, -1] = self.t / 10
        kind = self.seed % 5
        success = (kind < 3) & (self.t >= 3 + self.seed % 8)
        failure = (kind == 3) & (self.t >= 4)
        never = np.zeros_like(success)
        return self.seen(), success, never, never, {"ended": success | failure}

    def close(self):
        pass
