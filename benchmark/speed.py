"""Measures what some decisions are worth, as ratios within one process, and writes docs/performance.md.

    python benchmark/speed.py             # a few minutes, on an otherwise idle machine

The variants of a comparison take turns, so that what else the machine does meets all of them; a ratio is the median over
rounds, beside its quartiles. Times are CPU time of this process, with one torch thread.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


@dataclass
class Comparison:
    """A question, and what is compared: name -> one unit of work. The others are divided by the first."""

    question: str
    unit: str
    variants: dict[str, Callable[[], None]]


def cpu_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(comparison: Comparison, rounds: int) -> np.ndarray:
    """Seconds of each variant in each round, after one to warm up: [variants, rounds]."""
    works = list(comparison.variants.values())
    found = [list(map(cpu_seconds, works)) for _ in tqdm(range(rounds + 1), comparison.question, mininterval=2)]
    return np.array(found[1:]).T


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

    def __init__(self, obs_mode: str = "state", **flags):
        self.args = arguments(force_octo, obs_mode, **flags)
        self.demos = demonstrations(camera=obs_mode == "rgb")
        self.noise = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.agent = force_octo.Agent(self.args, self.demos)
        self.buffer = force_octo.ReplayBuffer(self.agent, self.args, {}, expert=True)
        force_octo.add_demonstrations(self.buffer, self.demos, self.agent, self.args)
        force_octo.embed(self.buffer, self.seen, len(self.demos.action), self.agent)
        self.rows = self.buffer.draw(self.args.batch_size, self.noise)
        self.actor_optimizer = torch.optim.Adam(self.agent.actor.parameters(), lr=1e-6)
        self.critic_optimizer = torch.optim.Adam(self.agent.critic.parameters(), lr=1e-6)

    def seen(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.demos.at(rows, self.agent.window)

    def gather(self, encode: bool = False) -> force_octo.Batch:
        """The batch; its images are encoded, or their embeddings taken from the buffer."""
        batch = self.buffer.gather(self.rows)
        batch.expert = torch.arange(len(self.rows)) < len(self.rows) // 2
        if encode:  # the rows of the buffer are those of the demonstrations
            with torch.no_grad():
                batch.feature = self.agent.feature(self.seen(self.rows))
                batch.next_feature = self.agent.feature(self.seen(self.buffer.steps["next"][self.rows]))
        return batch

    def update_actor(self, batch: force_octo.Batch) -> None:
        """Stage 3's: VGPD."""
        args = self.args
        target, _ = force_octo.self_distilled(self.agent, batch, args, self.noise)
        force_octo.update_actor(
            self.agent, self.actor_optimizer, batch, batch.feature, target, args, self.noise,
            bc_weight=args.distill_weight, q_weight=args.q_weight, ema=args.actor_ema,
        )  # fmt: skip

    def update_both(self, encode: bool) -> None:
        """Stage 1's update of the critic, stage 3's of the actor."""
        batch = self.gather(encode)
        force_octo.update_critic(self.agent, self.critic_optimizer, batch, self.args, self.args.cql_alpha, self.noise)
        self.update_actor(batch)


# ---- the comparisons ----
def compare_vgpd() -> Comparison:
    settings = {f"K = {K}": Setting(K=K) for K in (1, 20)}
    variants = {name: partial(setting.update_actor, setting.gather()) for name, setting in settings.items()}
    return Comparison("VGPD update of the actor, batch 128", "update", variants)


def compare_embedding() -> Comparison:
    setting = Setting("rgb")
    variants = {
        "embedded once, kept in the buffer": partial(setting.update_both, encode=False),
        "images encoded in each update": partial(setting.update_both, encode=True),
    }
    return Comparison("critic and actor update from a 64 px camera, batch 128", "update pair", variants)


def compare_pi0() -> Comparison:
    demos = demonstrations(camera=True)
    obs = demos.at(torch.tensor([7]), 1)
    noise = torch.Generator().manual_seed(0)
    one, twenty = (arguments(force_pi0, "rgb", head="flow", env_id="PickCube-v1", K=K) for K in (1, 20))
    agent = force_pi0.Agent(one, demos)

    @torch.no_grad()
    def choose(args: force_pi0.Args, passes: int = 1) -> None:
        for _ in range(passes):
            agent.candidates(agent.feature(obs), args, noise)

    variants = {
        "K = 1": partial(choose, one),
        "K = 20, prefix shared": partial(choose, twenty),
        "K = 20, prefix repeated": partial(choose, one, passes=20),
    }
    return Comparison("proposals of pi0-compact's flow head for one state", "decision", variants)


# ---- the page ----
def table_rows(comparison: Comparison, seconds: np.ndarray) -> list[list[str]]:
    rows = []
    for name, own in zip(comparison.variants, seconds):
        low, middle, high = np.quantile(own / seconds[0], (0.25, 0.5, 0.75))
        ratio = "1" if low == high == 1 else f"{middle:.2f} ({low:.2f}–{high:.2f})"
        rows.append([comparison.question, name, f"{1000 * np.median(own):.3g} per {comparison.unit}", ratio])
    return rows


def main(rounds: int = 45, out: Path = ROOT / "docs" / "performance.md") -> int:
    """Measure everything and write the page.

    Args:
        rounds: rounds of each comparison.
        out: where the page goes.
    """
    torch.set_num_threads(1)
    comparisons = [make() for make in (compare_vgpd, compare_embedding, compare_pi0)]
    body = [row for comparison in comparisons for row in table_rows(comparison, measure(comparison, rounds))]
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
    out.write_text(f"{page}\n")
    return 0


if __name__ == "__main__":
    command_line(main)
