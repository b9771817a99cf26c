"""Measures what some decisions are worth, as ratios within one process, and writes docs/performance.md.

    python benchmark/speed.py             # a few minutes, on an otherwise idle machine
    python benchmark/speed.py --quick     # seconds, prints only: does it still run?

The variants of a comparison take turns, so that what else the machine does meets all of them; a ratio is the median over
rounds, beside its quartiles. Times are CPU time of this process, with one torch thread.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import force_octo  # noqa: E402
import force_pi0  # noqa: E402
from benchmark.cells import fill, table  # noqa: E402
from benchmark.rows import ROOT, command_line  # noqa: E402
from plumbing.demos import Demos  # noqa: E402
from plumbing.run import provenance  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"


@dataclass
class Comparison:
    """A question, and what is compared: name -> one unit of work. The others are divided by the first."""

    question: str
    unit: str
    variants: dict[str, Callable[[], None]]


def measure(comparison: Comparison, rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """Seconds per unit of each variant in each round. Shapes: name -> [rounds]."""

    def once(work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    repeats = {}
    for name, work in comparison.variants.items():  # the first call is warm-up; short work is repeated
        once(work)
        repeats[name] = max(1, round(seconds / max(once(work), 1e-6)))
    found = {name: [] for name in comparison.variants}
    for _ in tqdm(range(rounds), comparison.question, mininterval=2):
        for name, work in comparison.variants.items():
            found[name].append(np.mean([once(work) for _ in range(repeats[name])]))
    return {name: np.array(values) for name, values in found.items()}


# ---- made-up data of real sizes ----
def demonstrations(camera: bool, episodes: int = 8, steps: int = 50) -> Demos:
    """Random demonstrations with the sizes of StackCube's (proprio: 42 numbers; with a camera 25, and 64 px)."""
    random = np.random.default_rng(0)
    rows = episodes * (steps + 1)
    obs = {"proprio": random.normal(size=(rows, 25 if camera else 42)).astype(np.float32)}
    if camera:
        obs["primary"] = random.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    lengths = np.full(episodes, steps)
    action = random.uniform(-0.3, 0.3, (rows, 4)).astype(np.float32)
    return Demos(obs, action, lengths, lengths, "random", success=np.ones(rows, dtype=bool))


def arguments(script, obs_mode: str, **flags):
    args = script.Args(device="cpu", obs_mode=obs_mode, cameras="primary", **flags)
    script.validate(args)
    return args


class Setting:
    """An agent of force_octo.py with its optimizers, and a batch of half expert, half policy data."""

    def __init__(self, camera: bool = False, **flags):
        self.args = arguments(force_octo, "rgb" if camera else "state", **flags)
        self.demos = demonstrations(camera)
        self.noise = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        agent = self.agent = force_octo.Agent(self.args, self.demos)
        self.buffer = force_octo.ReplayBuffer(agent, self.args, {}, expert=True)
        force_octo.add_demonstrations(self.buffer, self.demos, agent, self.args)
        force_octo.embed(self.buffer, self.seen, len(self.demos.action), agent)
        self.rows = self.buffer.draw(self.args.batch_size, self.noise)
        self.batch = self.gather()
        self.actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=1e-6)
        self.critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=1e-6)

    def seen(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.demos.at(rows, self.agent.window)

    def gather(self) -> force_octo.Batch:
        batch = self.buffer.gather(self.rows)
        batch.expert = torch.arange(len(self.rows)) < len(self.rows) // 2
        return batch

    def vgpd(self) -> None:
        """Stage 3's actor update."""
        args = self.args
        batch = self.batch
        target, _ = force_octo.self_distilled(self.agent, batch, args, self.noise)
        force_octo.update_actor(
            self.agent, self.actor_optimizer, batch, batch.feature, target, args, self.noise,
            bc_weight=args.distill_weight, q_weight=args.q_weight, ema=args.actor_ema,
        )  # fmt: skip

    def calql(self) -> None:
        """Stage 1's critic update."""
        args = self.args
        force_octo.update_critic(self.agent, self.critic_optimizer, self.batch, args, args.cql_alpha, self.noise)


# ---- the comparisons ----
def compare_vgpd() -> Comparison:
    variants = {"K = 1": Setting(K=1).vgpd, "K = 20": Setting(K=20).vgpd}
    return Comparison("VGPD update of the actor, batch 128", "update", variants)


def compare_embedding() -> Comparison:
    setting = Setting(camera=True)

    def stored() -> None:
        setting.batch = setting.gather()
        setting.calql()
        setting.vgpd()

    def encoded() -> None:  # the rows of the buffer are those of the demonstrations
        setting.batch = setting.gather()
        agent = setting.agent
        with torch.no_grad():
            setting.batch.feature = agent.feature(setting.seen(setting.rows))
            following = setting.buffer.steps["next"][setting.rows]
            setting.batch.next_feature = agent.feature(setting.seen(following))
        setting.calql()
        setting.vgpd()

    variants = {"embedded once, kept in the buffer": stored, "images encoded in each update": encoded}
    return Comparison("critic and actor update from a 64 px camera, batch 128", "update pair", variants)


def compare_pi0() -> Comparison:
    args = arguments(force_pi0, "rgb", head="flow", env_id="PickCube-v1")
    demos = demonstrations(camera=True)
    noise = torch.Generator().manual_seed(0)
    agent = force_pi0.Agent(args, demos)
    obs = demos.at(torch.tensor([7]), 1)

    def choose(K: int, passes: int = 1) -> Callable[[], None]:
        few = dataclasses.replace(args, K=K)

        def work() -> None:
            with torch.no_grad():
                for _ in range(passes):
                    agent.candidates(agent.feature(obs), few, noise)

        return work

    variants = {"K = 1": choose(1), "K = 20, prefix shared": choose(20), "K = 20, prefix repeated": choose(1, 20)}
    return Comparison("proposals of pi0-compact's flow head for one state", "decision", variants)


# ---- the page ----
def table_rows(comparison: Comparison, seconds: dict[str, np.ndarray]) -> list[list[str]]:
    rows = []
    base = next(iter(seconds.values()))
    for name, values in seconds.items():
        low, middle, high = np.quantile(values / base, (0.25, 0.5, 0.75))
        ratio = "1" if values is base else f"{middle:.2f} ({low:.2f}–{high:.2f})"
        each = f"{1000 * np.median(values):.3g} per {comparison.unit}"
        rows.append([comparison.question, name, each, ratio])
    return rows


def main(quick: bool = False, rounds: int = 15, out: Path | None = None) -> int:
    """Measure everything and write the page.

    Args:
        quick: a single short round of each; prints the page, and writes it only with --out.
        rounds: rounds of each comparison.
        out: where the page goes; default: docs/performance.md.
    """
    torch.set_num_threads(1)
    rounds = 1 if quick else rounds
    body = []
    for make in (compare_vgpd, compare_embedding, compare_pi0):
        comparison = make()
        body += table_rows(comparison, measure(comparison, rounds, 0.0 if quick else 0.3))
    made = provenance()
    page = fill(
        "performance",
        rounds=rounds,
        table=table(["Work", "Variant", "Milliseconds", "Ratio (quartiles)"], body),
        commit=made["git_commit"],
        python=made["python"],
        versions=", ".join(f"{name} {version}" for name, version in made["packages"].items()),
        cpu=platform.processor() or platform.machine(),
        cores=os.cpu_count(),
    )
    print(page)
    if out or not quick:
        (out or PAGE).write_text(page + "\n")
    return 0


if __name__ == "__main__":
    command_line(main)
