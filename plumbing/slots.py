"""Episodes side by side: a batch of environments, in which a slot takes the next seed once its episode has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plumbing import ranks
from plumbing.table import windows

AT_A_TIME = 64  # states that go through a backbone together: a prefix's cache is large


@dataclass
class Played:
    """An episode of T steps; its L >= T actions are whole chunks."""

    seed: int
    obs: dict[str, Tensor]  # [T+1, ...] what was seen in a training episode, where the environment had it
    action: np.ndarray  # [L, A] normalised
    success: np.ndarray  # [T] at each step
    terminated: bool  # at T, and not by the time limit

    def batches(self, window: int) -> Iterator[dict[str, Tensor]]:
        """All that was seen, some steps at a time, as the policies' `feature` wants it."""
        for rows in torch.arange(len(self.success) + 1).split(AT_A_TIME):
            yield windows(self.obs, rows, torch.zeros_like(rows), window)


class Slots:
    """N running episodes, one in each environment of a batch.

    All slots decide together. One whose episode ends within a chunk waits for the end of the chunk, and then begins
    the next one while the others go on. The seed of an episode decides where it starts and all noise of its decisions,
    so what happens in it doesn't depend on N, but for the rounding of networks that see other batches.
    """

    def __init__(self, env, agent, args, act: Callable, training: bool = False, whole: bool = True, frames=None):
        """N is args.num_envs.

        env        as make_env gives it: reset(seed [N], options {"every", "reset_mask"}) and step(action [N, A])
        agent      says `H`, the actions in a decision, the `window` of its observations, and how to `denormalise`
        act        act(obs, noise) -> [n, H, A] normalised: what n running episodes saw last, as the policies' `feature`
                   wants it, and a generator for each
        training   an episode ends where the task says so (success, or its own failure), and keeps what was seen
        whole      if not training: an episode goes on after a success, to the time limit, to see whether it lasts
        frames     collects the first environment's video
        """
        N = args.num_envs
        self.env = env
        self.agent = agent
        self.act = act
        self.limit = args.max_episode_steps
        self.training = training
        self.whole = whole
        self.frames = frames
        # The steps that are rendered: replay and history need each one.
        self.every = 1 if training or agent.window > 1 else agent.H
        self.running = np.zeros(N, dtype=bool)
        self.terminated = np.zeros(N, dtype=bool)
        self.seed = np.zeros(N, dtype=int)
        self.length = np.zeros(N, dtype=int)  # control steps of its episode
        self.success = np.zeros((N, self.limit), dtype=bool)
        self.planned: list[list[np.ndarray]] = [[] for _ in range(N)]  # chunks [H, A]
        self.noise = [torch.Generator() for _ in range(N)]
        self.seen: dict[str, Tensor] = {}  # [N, limit + 1, ...] observations of its episode
        self.steps = 0  # control steps in the last turn, of all episodes together

    @property
    def busy(self) -> int:
        """Episodes under way."""
        return int(self.running.sum())

    @torch.inference_mode()
    def turn(self, seeds: Iterable[int]) -> list[Played]:
        """Begin the next of `seeds` in all free slots, as far as there are any, then play on for one decision.

        A single environment plays its whole episode: a robot must not wait in the middle of one. So do those of several
        ranks, which count their episodes together.
        Returns: the episodes that have ended.
        """
        self.begin(seeds)
        before = self.running.copy()
        self.steps = 0
        self.play_chunk()
        while self.busy and (len(self.running) == 1 or ranks.world() > 1):
            self.play_chunk()
        return [self.played(slot) for slot in np.flatnonzero(before & ~self.running)]

    def successes(self, seeds: range) -> list[np.ndarray]:
        """Play these episodes: success at each step [T], for each in the order of the seeds."""
        coming = iter(seeds)
        found = {}
        while len(found) < len(seeds):
            for played in self.turn(coming):
                found[played.seed] = played.success
        return [found[seed] for seed in seeds]

    # --- parts of a turn ---
    def begin(self, seeds: Iterable[int]) -> None:
        begun = np.zeros_like(self.running)
        for slot, seed in zip(np.flatnonzero(~self.running), seeds):
            begun[slot] = True
            self.seed[slot] = seed
            self.noise[slot].manual_seed(seed)
            self.planned[slot] = []
        if not begun.any():
            return
        self.running |= begun
        self.terminated &= ~begun
        self.length[begun] = 0
        self.success[begun] = False
        options = {"every": self.every}
        if not self.seen:  # the first time all are reset, needed or not
            self.seed[~begun] = seed
        elif not begun.all():
            options["reset_mask"] = begun
        obs, _ = self.env.reset(seed=self.seed.tolist(), options=options)
        self.keep(obs, begun)

    def play_chunk(self) -> None:
        """One decision of all running episodes; it is over when they are."""
        slots = np.flatnonzero(self.running)
        if not len(slots):
            return
        noise = [self.noise[slot] for slot in slots]
        chunk = self.act(self.recent(slots), noise)  # [n, H, A]
        for slot, plan in zip(slots, chunk):
            self.planned[slot].append(plan)
        action = self.agent.denormalise(chunk)
        actions = np.zeros((len(self.running), *action.shape[1:]), action.dtype)  # [N, H, A]; 0 where nothing runs
        actions[slots] = action
        for k in range(self.agent.H):
            self.step(actions[:, k])
            if not self.busy:
                break

    def step(self, action: np.ndarray) -> None:
        """A control step. Shapes: action [N, A] in controller units."""
        obs, success, _, _, info = self.env.step(action)
        if self.frames is not None:
            self.frames.append(self.env.call("render")[0])
        going = self.running.copy()
        reached = success > 0
        self.success[going, self.length[going]] = reached[going]
        self.length[going] += 1
        self.steps += self.busy
        self.keep(obs, going)
        over = info["ended"] if self.training else reached & (not self.whole)
        self.terminated |= going & over
        self.running = going & ~over & (self.length < self.limit)

    def keep(self, obs: dict, where: np.ndarray) -> None:
        """What the slots `where` [N] bool see now."""
        if not self.seen:
            rooms = (len(self.running), self.limit + 1)
            for name, value in obs.items():
                value = torch.as_tensor(value)
                self.seen[name] = value.new_zeros(*rooms, *value.shape[1:])
        slots = torch.from_numpy(np.flatnonzero(where))
        step = torch.from_numpy(self.length[where])
        for name, value in obs.items():
            self.seen[name][slots, step] = torch.as_tensor(value)[slots]

    def recent(self, slots: np.ndarray) -> dict[str, Tensor]:
        """The last observations of the slots [n], as the policies' `feature` wants them."""
        first = slots * (self.limit + 1)
        rows = first + self.length[slots]
        flat = {name: value.flatten(0, 1) for name, value in self.seen.items()}
        return windows(flat, torch.from_numpy(rows), torch.from_numpy(first), self.agent.window)

    def played(self, slot: int) -> Played:
        T = int(self.length[slot])
        obs = {}
        if self.training:
            obs = {name: value[slot, : T + 1].clone() for name, value in self.seen.items()}
        return Played(
            seed=int(self.seed[slot]),
            obs=obs,
            action=np.concatenate(self.planned[slot]),
            success=self.success[slot, :T].copy(),
            terminated=bool(self.terminated[slot]),
        )
