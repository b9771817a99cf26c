"""Measures what some decisions are worth, as ratios within one process, and writes docs/performance.md.

The variants of a comparison take turns, so that what else the machine does meets all of them; a ratio is the median over
rounds, beside its quartiles. Times are CPU time of this process, with one torch thread.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import force_octo  # noqa: E402
import force_pi0  # noqa: E402
from benchmark.dry_run import toy_observations  # noqa: E402
from benchmark.rows import ROOT, command_line  # noqa: E402
from benchmark.tables import fill, table  # noqa: E402
from plumbing.demos import Demos  # noqa: E402
from plumbing.run import provenance  # noqa: E402

CAMERA = {"device": "cpu", "obs_mode": "rgb", "cameras": "primary"}


Variants = dict[str, Callable[[], None]]  # name -> one unit of work


def measure(question: str, unit: str, variants: Variants, rounds: int) -> list[list[str]]:
    """Rows of the table, after a round to warm up; each variant is divided by the first."""
    seconds = np.zeros((rounds + 1, len(variants)))
    for i in tqdm(range(rounds + 1), question, mininterval=2):
        for k, work in enumerate(variants.values()):
            start = time.process_time()
            work()
            seconds[i, k] = time.process_time() - start
    each = 1000 * np.median(seconds[1:], 0)
    quartiles = np.quantile(seconds[1:] / seconds[1:, :1], (0.5, 0.25, 0.75), 0)
    rows = []
    for name, own, found in zip(variants, each, quartiles.T):
        rows.append([question, name, f"{own:.3g} per {unit}", "{:.2f} ({:.2f}–{:.2f})".format(*found)])
    return rows


def demonstrations(args: force_octo.Args | force_pi0.Args, episodes: int = 8, steps: int = 50) -> Demos:
    """Random demonstrations with the sizes of StackCube's."""
    rows = episodes * (steps + 1)
    lengths = np.full(episodes, steps)
    action = np.random.default_rng(0).uniform(-0.3, 0.3, (rows, 4)).astype(np.float32)
    return Demos(toy_observations(args, rows), action, lengths, lengths, "random", success=np.ones(rows, dtype=bool))


class Setting:
    """An agent of force_octo.py with its optimizers, and a batch of half expert, half policy data."""

    def __init__(self, args: force_octo.Args):
        force_octo.validate(args)
        self.args = args
        self.demos = demonstrations(args)
        self.noise = torch.Generator().manual_seed(0)
        self.agent = force_octo.Agent(args, self.demos)
        self.buffer = force_octo.ReplayBuffer(self.agent, args, {}, expert=True)
        force_octo.add_demonstrations(self.buffer, self.demos, self.agent, args)
        self.seen = lambda rows: self.demos.at(rows, self.agent.window)
        force_octo.embed(self.buffer, self.seen, len(self.demos.action), self.agent)
        self.rows = self.buffer.draw(args.batch_size, self.noise)
        self.batch = self.buffer.gather(self.rows)
        self.batch.expert = torch.arange(args.batch_size) < args.batch_size // 2
        self.actor_optimizer = torch.optim.Adam(self.agent.actor.parameters(), lr=1e-6)
        self.critic_optimizer = torch.optim.Adam(self.agent.critic.parameters(), lr=1e-6)

    def update_actor(self) -> None:
        """Stage 3's: VGPD."""
        args = self.args
        target, _ = force_octo.self_distilled(self.agent, self.batch, args, self.noise)
        force_octo.update_actor(
            self.agent, self.actor_optimizer, self.batch, self.batch.feature, target, args, self.noise,
            bc_weight=args.distill_weight, q_weight=args.q_weight, ema=args.actor_ema,
        )  # fmt: skip

    def update_both(self, encode: bool) -> None:
        """Stage 1's update of the critic and stage 3's of the actor, from stored embeddings or from images."""
        batch = self.buffer.gather(self.rows)
        if encode:  # the rows of the buffer are those of the demonstrations
            with torch.no_grad():
                batch.feature = self.agent.feature(self.seen(self.rows))
                batch.next_feature = self.agent.feature(self.seen(self.buffer.steps["next"][self.rows]))
        force_octo.update_critic(self.agent, self.critic_optimizer, batch, self.args, self.args.cql_alpha, self.noise)
        self.update_actor()


def actor_updates() -> Variants:
    settings = {K: Setting(force_octo.Args(device="cpu", obs_mode="state", K=K)) for K in (1, 20)}
    return {f"K = {K}": setting.update_actor for K, setting in settings.items()}


def embeddings() -> Variants:
    update = Setting(force_octo.Args(**CAMERA)).update_both
    once = partial(update, encode=False)
    return {"embedded once, kept in the buffer": once, "images encoded in each update": partial(update, encode=True)}


def proposals() -> Variants:
    one, twenty = (force_pi0.Args(**CAMERA, head="flow", env_id="PickCube-v1", K=K) for K in (1, 20))
    force_pi0.validate(one)
    demos = demonstrations(one)
    agent = force_pi0.Agent(one, demos)
    obs = demos.at(torch.tensor([7]), 1)
    noise = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def choose(args: force_pi0.Args, passes: int = 1) -> None:
        for _ in range(passes):
            agent.candidates(agent.feature(obs), args, noise)

    return {
        "K = 1": partial(choose, one),
        "K = 20, prefix shared": partial(choose, twenty),
        "K = 20, prefix repeated": partial(choose, one, passes=20),
    }


def main(rounds: int = 45, out: Path = ROOT / "docs" / "performance.md") -> int:
    """Measure everything, in so many rounds of each comparison, and write the page --out."""
    torch.set_num_threads(1)
    body = measure("VGPD update of the actor, batch 128", "update", actor_updates(), rounds)
    body += measure("critic and actor update from a 64 px camera, batch 128", "update pair", embeddings(), rounds)
    body += measure("proposals of pi0-compact's flow head for one state", "decision", proposals(), rounds)
    made = provenance()
    made["packages"] = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    shown = table(["Work", "Variant", "Milliseconds", "Ratio (quartiles)"], body)
    page = fill("performance", rounds=rounds, table=shown, cpu=cpu, **made)
    out.write_text(f"{page}\n")
    return 0


if __name__ == "__main__":
    command_line(main)
