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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import force_octo  # noqa: E402
import force_pi0  # noqa: E402
from benchmark.dry_run import toy_observations  # noqa: E402
from benchmark.rows import RESULTS, ROOT, command_line, read_csv, read_json  # noqa: E402
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
        self.buffer = force_octo.ReplayBuffer(self.agent, args, self.demos.empty_obs())
        force_octo.add_demonstrations(self.buffer, self.demos, self.agent, args)
        force_octo.embed(self.buffer, self.buffer.observations, len(self.demos.action), self.agent)
        self.rows = self.buffer.draw(args.batch_size, self.noise)
        actor = self.agent.actor.parameters()
        self.actor_optimizer = torch.optim.Adam(actor, lr=1e-6, fused=True)
        learns = torch.nn.ModuleList([self.agent.actor, self.agent.backbone]).parameters()
        self.online_optimizer = torch.optim.AdamW(learns, lr=1e-6, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.agent.critic.parameters(), lr=1e-6, fused=True)

    def batch(self) -> force_octo.Batch:
        return self.buffer.gather(self.rows)

    def update_online(self) -> None:
        """All of one update in stage 3: critics, VGPD, actor and backbone."""
        args = self.args
        batch, _ = force_octo.update_critics(self.agent, self.critic_optimizer, self.batch, args, self.noise, 0.0)
        force_octo.update_online(
            self.agent, self.online_optimizer, batch, self.seen, args, self.noise, q_weight=args.q_weight
        )

    def seen(self, batch: force_octo.Batch) -> dict:
        return self.buffer.observations(batch.row)

    def update_offline(self, encode: bool) -> None:
        """One update in stage 1, from stored embeddings or from images."""
        args = self.args

        def batch() -> force_octo.Batch:
            found = self.batch()
            if encode:
                with torch.no_grad():
                    found.feature = self.agent.feature(self.buffer.observations(self.rows))
                    following = self.buffer.steps["next"][self.rows]
                    found.next_feature = self.agent.feature(self.buffer.observations(following))
            return found

        last, _ = force_octo.update_critics(self.agent, self.critic_optimizer, batch, args, self.noise, args.cql_alpha)
        force_octo.update_actor(
            self.agent, self.actor_optimizer, last, last.feature, last.chunk, args, self.noise,
            bc_weight=args.bc_weight, q_weight=args.offline_q_weight, ema=args.actor_ema,
        )  # fmt: skip


def online_updates() -> Variants:
    settings = {K: Setting(force_octo.Args(device="cpu", obs_mode="state", K=K)) for K in (1, 5, 10, 20, 40)}
    return {f"K = {K}": setting.update_online for K, setting in settings.items()}


def embeddings() -> Variants:
    update = Setting(force_octo.Args(**CAMERA)).update_offline
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


# === What isn't a race ===============================================================================================
def bounds(updates: Variants) -> list[list[str]]:
    """Rows of a table: what matrix products alone would take, at this machine's best rate for them."""
    side = 1024
    square = torch.randn(side, side)
    seconds = []
    for _ in range(10):
        start = time.process_time()
        torch.mm(square, square)
        seconds.append(time.process_time() - start)
    rate = 2 * side**3 / min(seconds)
    rows = []
    for name, update in updates.items():
        with FlopCounterMode(display=False) as counter:
            update()
        flops = counter.get_total_flops()
        bound = 1000 * flops / rate
        start = time.process_time()
        for _ in range(5):
            update()
        own = 1000 * (time.process_time() - start) / 5
        rows.append([name, f"{flops / 1e9:.2f}", f"{bound:.1f}", f"{own:.1f}", f"{own / bound:.1f}"])
    return rows


def bytes_kept() -> list[list[str]]:
    """Rows of a table: bytes of a control step in the replay buffer, and of a transition that is kept ready-made."""
    rows = []
    for name, flags in (("state", {"obs_mode": "state"}), ("two 64 px cameras", {"obs_mode": "rgb"})):
        setting = Setting(force_octo.Args(device="cpu", **flags))
        steps = sum(column[0].nbytes for column in setting.buffer.steps.columns.values())
        seen = sum(column[0].nbytes for column in setting.buffer.seen.columns.values())
        batch = setting.batch()
        ready = sum(values[0].nbytes for values in vars(batch).values()) + 2 * seen
        rows.append([name, f"{steps:,}", f"{seen:,}", f"{ready:,}"])
    return rows


def stages(runs: list[Path]) -> list[list[str]]:
    """Rows of a table: minutes of each stage of finished runs. Raises: UserError."""
    rows = []
    for run in runs:
        summary = read_json(run / "summary.json")
        flags = read_json(run / "config.json")["args"]
        minutes = {stage: f"{seconds / 60:.1f}" for stage, seconds in summary["seconds_per_stage"].items()}
        names = ("sft", "offline", "warmup", "online")
        what = f"{summary['script']}, {flags['env_id']}, {flags['obs_mode']}, {flags['online_steps']:,} control steps"
        rows.append([what, *(minutes.get(name, "–") for name in names), f"{summary['seconds'] / 60:.1f}"])
    return rows


def peers() -> list[list[str]]:
    rows = []
    for line in read_csv(RESULTS / "peers.csv"):
        ratio = f"{line['ratio']} ({line['low']}–{line['high']})"
        rows.append([line["work"], f"{line['peer']} {line['commit'][:8]}", line["ours_ms"], line["theirs_ms"], ratio])
    return rows


def main(rounds: int = 30, out: Path = ROOT / "docs" / "performance.md", runs: tuple[Path, ...] = ()) -> int:
    """Measure everything, in so many rounds of each comparison, and write the page --out; --runs: those to be dissected."""
    torch.set_num_threads(1)
    updates = online_updates()
    body = measure("a whole online update of FORCE, batch 128", "update", updates, rounds)
    body += measure("an offline update from 64 px cameras, batch 128", "update", embeddings(), rounds)
    body += measure("proposals of pi0-compact's flow head for one state", "decision", proposals(), rounds)
    made = provenance()
    made["packages"] = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    page = fill(
        "performance",
        rounds=rounds,
        cpu=cpu,
        table=table(["Work", "Variant", "Milliseconds", "Ratio (quartiles)"], body),
        bounds=table(["Online update", "GFLOP", "Bound, ms", "Measured, ms", "Ratio"], bounds(updates)),
        bytes=table(
            ["Observations", "Step: features and actions", "Step: observation", "Ready transition"], bytes_kept()
        ),
        stages=table(["Run", "SFT", "Offline", "Warm-up", "Online", "In all"], stages(list(runs))),
        peers=table(["Update", "Beside", "Ours, ms", "Theirs, ms", "Ratio (quartiles)"], peers()),
        **made,
    )
    out.write_text(f"{page}\n")
    return 0


if __name__ == "__main__":
    command_line(main)
