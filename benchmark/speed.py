"""Measures what some decisions are worth, as ratios within one process, and writes docs/performance.md.

    python benchmark/speed.py             # a few minutes, on an otherwise idle machine
    python benchmark/speed.py --quick     # seconds, prints only: does it still run?

The variants of a comparison take turns, so that what else the machine does meets all of them; a ratio is the median over
rounds, beside its quartiles. Times are CPU time of this process, with one torch thread.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import force_octo  # noqa: E402
import force_pi0  # noqa: E402

PAGE = Path(force_octo.__file__).parent / "docs" / "performance.md"
EPISODE = 100  # control steps per round of the simulator comparison


@dataclass
class Comparison:
    """A question, what is compared (name -> one unit of work), and which variant the others are divided by."""

    question: str
    unit: str
    variants: dict[str, Callable[[], float | None]]  # may return its own seconds
    base: str


def measure(comparison: Comparison, rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """Seconds per unit of each variant in each round. Shapes: name -> [rounds]."""

    def once(work: Callable[[], float | None]) -> tuple[float, float]:
        """Seconds per unit, and seconds that the call took."""
        start = time.process_time()
        own = work()
        took = time.process_time() - start
        return (took if own is None else own), took

    repeats = {}
    for name, work in comparison.variants.items():  # the first call is warm-up; short work is repeated
        once(work)
        repeats[name] = max(1, round(seconds / max(once(work)[1], 1e-6)))
    found = {name: [] for name in comparison.variants}
    for _ in tqdm(range(rounds), comparison.question, mininterval=2):
        for name, work in comparison.variants.items():
            found[name].append(np.mean([once(work)[0] for _ in range(repeats[name])]))
    return {name: np.array(values) for name, values in found.items()}


# ---- made-up data of real sizes ----
def demonstrations(script, camera: bool, episodes: int = 8, steps: int = 50, proprio: int = 42, actions: int = 4):
    """Random demonstrations with the sizes of StackCube's (state: 42 numbers; camera: 25 and 64 px)."""
    random, rows = np.random.default_rng(0), episodes * (steps + 1)
    obs = {"proprio": random.normal(size=(rows, 25 if camera else proprio)).astype(np.float32)}
    if camera:
        obs["primary"] = random.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    lengths = np.full(episodes, steps)
    action = random.uniform(-0.3, 0.3, (rows, actions)).astype(np.float32)
    return script.Demos(obs, action, lengths, lengths, "random")


def filled_buffer(agent, demos, args) -> force_octo.ReplayBuffer:
    """The demonstrations as successful episodes, embedded."""
    buffer = force_octo.ReplayBuffer(agent.feature_dim, agent.action_dim, args.chunk_len, args.gamma)
    with torch.no_grad():
        features = agent.feature(demos.at(torch.arange(len(demos.action)), agent.window))
    for start, length in zip(demos.starts(), demos.lengths):
        action, reward = agent.normalise(demos.action[start : start + length]), np.zeros(length, np.float32)
        reward[-1] = 1.0
        hold = agent.hold_action(action[-1])
        buffer.add(features[start : start + length + 1], action, reward, True, True, 0.0, hold)
    return buffer


def arguments(script, **flags):
    args = script.Args(device="cpu", **flags)
    script.validate(args)
    return args


class Setting:
    """An agent of force_octo.py with its optimizers, and a batch of half expert, half policy data."""

    def __init__(self, make=force_octo.Agent, camera: bool = False, **flags):
        self.args = arguments(force_octo, obs_mode="rgb" if camera else "state", **flags)
        self.demos, self.generator = demonstrations(force_octo, camera), torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.agent = make(self.args, self.demos)
        self.buffer = filled_buffer(self.agent, self.demos, self.args)
        self.rows = self.buffer.draw(self.args.batch_size, self.generator)
        self.batch = self.buffer.gather(self.rows)
        self.expert = torch.arange(self.args.batch_size) < self.args.batch_size // 2
        self.reset_optimizers()

    def reset_optimizers(self) -> None:
        self.actor_optimizer = torch.optim.Adam(self.agent.actor.parameters(), lr=1e-6)
        self.critic_optimizer = torch.optim.Adam(self.agent.critic.parameters(), lr=1e-6)

    def vgpd(self) -> None:
        """Stage 3's actor update."""
        batch, g = self.batch, self.generator
        force_octo.update_actor(self.agent, self.actor_optimizer, batch, self.expert, self.args, "online", g)

    def calql(self) -> None:
        """Stage 1's critic update."""
        args = self.args
        force_octo.update_critic(self.agent, self.critic_optimizer, self.batch, args, args.cql_alpha, self.generator)


# ---- what is compared with ----
class OneByOneCritic(nn.Module):
    """A critic that is asked about one candidate at a time."""

    def __init__(self, critic: force_octo.EnsembleCritic):
        super().__init__()
        self.critic = critic

    def forward(self, feature: Tensor, chunk: Tensor) -> Tensor:
        """Shapes as `EnsembleCritic`'s."""
        if chunk.dim() == 2:
            return self.critic(feature, chunk)
        return torch.stack([self.critic(feature, one) for one in chunk.unbind(1)], -1)


class OneByOneAgent(force_octo.Agent):
    """Draws and scores the K candidates in a loop."""

    def __init__(self, args, demos):
        super().__init__(args, demos)
        self.critic = OneByOneCritic(self.critic)

    def candidates(self, feature: Tensor, actor, args, generator) -> Tensor:
        one = dataclasses.replace(args, K=1)
        return torch.cat(
            [super(OneByOneAgent, self).candidates(feature, actor, one, generator) for _ in range(args.K)], 1
        )


class PlainCritic(nn.Module):
    """`EnsembleCritic` written plainly: a list of MLPs, one after the other, with the state repeated for each chunk."""

    def __init__(self, source: force_octo.EnsembleCritic):
        super().__init__()
        self.register_buffer("unit", source.unit.clone())
        weights = [torch.cat([source.feature_in, source.chunk_in], 1), *source.hidden]  # [E, in, out] each
        self.critics = nn.ModuleList()
        for e in range(len(weights[0])):
            layers: list[nn.Module] = []
            for i, (weight, bias) in enumerate(zip(weights, source.bias)):
                linear = nn.Linear(*weight.shape[1:])
                linear.weight.data, linear.bias.data = weight[e].T.detach().clone(), bias[e, 0].detach().clone()
                layers.append(linear)
                if i < len(source.gain):
                    norm = nn.LayerNorm(weight.shape[2], eps=1e-6)
                    norm.weight.data, norm.bias.data = (
                        x[i][e, 0].detach().clone() for x in (source.gain, source.shift)
                    )
                    layers += [norm, nn.Tanh()]
            self.critics.append(nn.Sequential(*layers))

    def forward(self, feature: Tensor, chunk: Tensor) -> Tensor:
        """Shapes as `EnsembleCritic`'s."""
        if chunk.dim() == 3:
            feature = feature[:, None].expand(-1, chunk.shape[1], -1)
        x = torch.cat([feature, chunk / self.unit], -1)
        return torch.stack([critic(x)[..., 0] for critic in self.critics])


class NoPolicy:
    """Keeps still, and sees nothing: what is left of `rollout` is the loop itself."""

    H, window = 4, 1

    def feature(self, obs):
        return torch.zeros(len(obs["proprio"]), 1)

    def recent(self, seen):
        return seen[-1]

    def denormalise(self, action):
        return action


# ---- the comparisons ----
def compare_vgpd() -> Comparison:
    variants = {"K = 1": Setting(K=1).vgpd, "K = 20": Setting(K=20).vgpd}
    variants["K = 20, candidates one by one"] = Setting(OneByOneAgent, K=20).vgpd
    return Comparison("VGPD update of the actor, batch 128", "update", variants, "K = 1")


def compare_critic() -> Comparison:
    batched, plain = Setting(), Setting()
    plain.agent.critic, plain.agent.target_critic = (
        PlainCritic(c) for c in (plain.agent.critic, plain.agent.target_critic)
    )
    plain.reset_optimizers()
    variants = {"batched ensemble": batched.calql, "the same networks in a loop": plain.calql}
    return Comparison("Cal-QL update of four critics, batch 128", "update", variants, "batched ensemble")


def compare_embedding() -> Comparison:
    setting = Setting(camera=True)
    agent, demos, buffer = setting.agent, setting.demos, setting.buffer

    def update() -> None:
        setting.calql()
        setting.vgpd()

    def stored() -> None:
        setting.batch = buffer.gather(setting.rows)
        update()

    def encoded() -> None:
        batch = buffer.gather(setting.rows)
        with torch.no_grad():  # the rows of the buffer are those of the demonstrations
            batch.feature = agent.feature(demos.at(setting.rows, agent.window))
            batch.next_feature = agent.feature(demos.at(buffer.data["next"][setting.rows], agent.window))
        setting.batch = batch
        update()

    variants = {"embedded once, kept in the buffer": stored, "images encoded in each update": encoded}
    return Comparison(
        "critic and actor update from a 64 px camera, batch 128", "update pair", variants, next(iter(variants))
    )


def compare_stepping() -> Comparison:
    """Episodes of EPISODE steps without the reset, which is the same in both."""
    import gymnasium as gym
    import mani_skill.envs  # noqa: F401  registers the tasks

    args = arguments(force_octo, env_id="PickCube-v1", obs_mode="state", max_episode_steps=EPISODE)
    ours, still = force_octo.make_env(args, 1), np.zeros((1, 4, 4), np.float32)
    bare = gym.make(
        args.env_id, obs_mode="state", control_mode=args.control_mode, robot_uids=args.robot_uids,
        sim_backend="physx_cpu", render_backend="cpu", reconfiguration_freq=1, reward_mode="none",
        sim_config=dict(control_freq=args.control_freq), max_episode_steps=10 * EPISODE,
    )  # fmt: skip

    def ours_once() -> float:
        reset, spent = ours.reset, []

        def timed(**options):
            start = time.process_time()
            seen = reset(**options)
            spent.append(time.process_time() - start)
            return seen

        ours.reset, start = timed, time.process_time()
        force_octo.rollout(ours, NoPolicy(), args, lambda feature: still, [0], training=False)
        ours.reset = reset
        return (time.process_time() - start - sum(spent)) / EPISODE

    def bare_once() -> float:
        bare.reset(seed=0)
        start = time.process_time()
        for _ in range(EPISODE):
            bare.step(still[0, 0])
        return (time.process_time() - start) / EPISODE

    variants = {"bare ManiSkill": bare_once, "our loop and wrappers": ours_once}
    return Comparison("stepping PickCube, state observations", "control step", variants, "bare ManiSkill")


def compare_reset() -> Comparison:
    """Resets collect garbage: among all objects of the process, or only those newer than a gc.freeze()."""
    env = force_octo.make_env(arguments(force_octo, env_id="PickCube-v1", obs_mode="state"), 1)

    def reset(switch: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            switch()
            env.reset(seed=[0])

        return work

    variants = {"all objects looked through": reset(gc.unfreeze), "those before it left alone": reset(gc.freeze)}
    return Comparison("resetting PickCube, state observations", "episode", variants, "all objects looked through")


def compare_pi0() -> Comparison:
    args = arguments(force_pi0, obs_mode="rgb", head="flow", env_id="PickCube-v1")
    demos, generator = demonstrations(force_pi0, camera=True), torch.Generator().manual_seed(0)
    agent = force_pi0.Agent(args, demos)
    obs = demos.at(torch.tensor([7]), agent.window)

    def choose(K: int, passes: int = 1) -> Callable[[], None]:
        few = dataclasses.replace(args, K=K)

        def work() -> None:
            with torch.no_grad():
                for _ in range(passes):
                    agent.candidates(agent.feature(obs), agent.actor_ema, few, generator)

        return work

    variants = {
        "K = 1": choose(1),
        "K = 20, prefix shared": choose(20),
        "K = 20, prefix repeated": choose(1, passes=20),
    }
    return Comparison("proposals of pi0-compact's flow head for one state", "decision", variants, "K = 1")


def replay_sizes() -> list[tuple[str, int]]:
    """Bytes per transition: what the buffer keeps, and what keeping other things would take."""
    sizes = []
    for camera in (False, True):
        setting = Setting(camera=camera)
        buffer, A, H = setting.buffer, setting.agent.action_dim, setting.args.chunk_len
        kept = sum(v.element_size() * v[0].numel() for v in buffer.data.values()) + buffer.starts.element_size()
        seen = "camera" if camera else "state"
        sizes.append((f"{seen}: embedding and proprio, chunks put together when drawn (ours)", kept))
        plain = 4 * (2 * buffer.data["feature"].shape[1] + H * A + 4)
        sizes.append((f"{seen}: embeddings of both ends and the chunk, a row per transition", plain))
    proprio = 4 * setting.demos.obs["proprio"].shape[1]
    for side, wrist in ((64, 0), (256, 128)):
        images = 3 * (side * side + wrist * wrist)
        cameras = f"{side} px" + (f" and {wrist} px" if wrist else "")
        sizes.append(
            (
                f"camera: images of {cameras} at both ends, a row per transition",
                2 * (images + proprio) + 4 * (H * A + 4),
            )
        )
    return sizes


# ---- the page ----
def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_page(found: list[tuple[Comparison, dict[str, np.ndarray]]], sizes: list[tuple[str, int]], rounds: int) -> str:
    body = ["| Work | Variant | Milliseconds | Ratio (quartiles) |", "| --- | --- | --- | --- |"]
    for comparison, seconds in found:
        for name, values in seconds.items():
            ratios = values / seconds[comparison.base]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            ratio = "1" if name == comparison.base else f"{middle:.2f} ({low:.2f}–{high:.2f})"
            each = f"{1000 * np.median(values):.3g} per {comparison.unit}"
            body.append(f"| {comparison.question} | {name} | {each} | {ratio} |")
    replay = ["| Kept of a transition | Bytes | Ratio |", "| --- | --- | --- |"]
    replay += [f"| {what} | {size:,} | {size / sizes[2 if 'camera' in what else 0][1]:.2f} |" for what, size in sizes]
    made = force_octo.provenance()
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    return "\n".join([
        "# Performance", "",
        "<!-- made by benchmark/speed.py: edits here are lost -->", "",
        "What some decisions are worth, as ratios: the variants of a comparison take turns within one process, and the "
        f"ratio is the median over {rounds} round{'s' * (rounds > 1)}, beside its quartiles. Times are CPU time with one torch thread; "
        "`python benchmark/speed.py` makes this page.", "",
        *body, "",
        "Bytes in a replay buffer, from the arrays' own sizes (ratios within state and within camera):", "",
        *replay, "",
        f"Commit {made['git_commit']}; python {made['python']}, {versions}; {cpu_name()}, {os.cpu_count()} cores.", "",
    ])  # fmt: skip


def main(quick: bool = False, rounds: int = 15, out: Path | None = None) -> int:
    """Measure everything and write the page.

    Args:
        quick: a single short round of each; prints the page, and writes it only with --out.
        rounds: rounds of each comparison.
        out: where the page goes; default: docs/performance.md.
    """
    torch.set_num_threads(1)
    rounds, seconds = (1, 0.0) if quick else (rounds, 0.3)
    comparisons = [compare_vgpd, compare_critic, compare_embedding, compare_stepping, compare_reset, compare_pi0]
    found = [(c := make(), measure(c, rounds, seconds)) for make in comparisons]
    page = write_page(found, replay_sizes(), rounds)
    print(page)
    if out or not quick:
        (out or PAGE).write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
