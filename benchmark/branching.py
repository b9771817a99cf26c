"""How much does the choice of one action chunk matter, and does the critic know? Measured in the simulator itself.

  python benchmark/branching.py measure --run runs/NAME [--label "StackCube, at hand-over"]
  python benchmark/branching.py draw

From a state between two decisions, each of K candidate chunks is executed, and then the policy goes on to the end of the
episode, several times: the mean of those returns is the candidate's true Q. All candidates of a state meet the same noise.
`measure` adds a line per candidate to results/branching.csv, `draw` makes docs/figures/branching.png.
"""

import copy
import csv
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.rows import DOCS, RESULTS, TEMPLATES, read_csv  # noqa: E402
from plumbing.flags import run_script  # noqa: E402
from plumbing.policy import load_policy  # noqa: E402
from plumbing.run import provenance  # noqa: E402
from plumbing.scripts import ROOT, load_script  # noqa: E402

SEED = 2_000_000_000  # of the states: neither training nor evaluation episodes
CSV = RESULTS / "branching.csv"
COLUMNS = (
    "label", "env_id", "run", "git_commit", "state", "step", "candidate", "q", "critic_std",
    "return_a", "return_b", "success_a", "success_b", "steps",
)  # fmt: skip


class Brancher:
    """A policy of force_octo.py or force_pi0.py, and an environment that can go back."""

    def __init__(self, run: Path):
        """Raises: UserError."""
        self.policy = load_policy(run)
        self.agent = self.policy.agent
        self.args = self.policy.args
        script = load_script(ROOT / self.policy.script)
        self.env = script.make_maniskill(self.args)
        self.limit = self.args.max_episode_steps

    def feature(self, obs: dict) -> torch.Tensor:
        return self.agent.feature(self.agent.recent([obs]))

    def play(self, obs: dict, t: int, generator: torch.Generator, chunk: np.ndarray | None = None) -> tuple[int, list]:
        """The policy from step t on, after a first chunk [H, A] if given. Returns the step of success (0: none), states.

        The states are those at decisions: step, seed-independent simulator state, observation.
        """
        states = []
        while t < self.limit:
            if chunk is None:
                states.append((t, copy.deepcopy(self.env.unwrapped.get_state_dict()), obs))
                chunk = self.agent.act(self.feature(obs), generator)[0]
            for action in self.agent.denormalise(chunk):
                obs, success, _, _, _ = self.env.step(action[None])
                t += 1
                if success[0]:
                    return t, states
            chunk = None
        return 0, states

    @torch.inference_mode()
    def branch(self, number: int, rollouts: int) -> list[dict]:
        """A state drawn from an episode of the policy, and the true Q of its candidates: a dict for each."""
        seed = SEED + number
        generator = torch.Generator().manual_seed(seed)
        obs, _ = self.env.reset(seed=seed, options={"every": 1})
        _, states = self.play(obs, 0, generator)
        step, state, obs = states[torch.randint(len(states), (), generator=generator)]
        feature = self.feature(obs)
        candidates = self.agent.candidates(feature, self.args, generator)  # [1, K, H*A]
        q = self.agent.critic(feature, candidates)[:, 0]  # [E, K]
        found = []
        for k, chunk in enumerate(candidates[0].unflatten(1, (self.agent.H, -1)).numpy()):
            ends = np.zeros(rollouts)
            for i in range(rollouts):
                obs, _ = self.env.reset(seed=seed, options={"state": state, "every": 1})
                ends[i], _ = self.play(obs, step, torch.Generator().manual_seed(i), chunk)
            returns = np.where(ends > 0, self.args.gamma ** np.maximum(ends - step - 1, 0), 0.0)
            half = rollouts // 2
            found.append({
                "state": number, "step": step, "candidate": k,
                "q": q[:, k].mean().item(), "critic_std": q[:, k].std(correction=0).item(),
                "return_a": returns[:half].mean(), "return_b": returns[half:].mean(),
                "success_a": (ends[:half] > 0).mean(), "success_b": (ends[half:] > 0).mean(),
                "steps": ends[ends > 0].mean() if ends.any() else "",
            })  # fmt: skip
        return found


def measure(run: Path, label: str = "", states: int = 30, rollouts: int = 8) -> None:
    """Branch so many states of a run's last checkpoint, each candidate so many times (an even number)."""
    torch.set_num_threads(1)
    brancher = Brancher(run)
    env_id = brancher.args.env_id
    about = {"label": label or run.name, "env_id": env_id, "run": run.name, "git_commit": provenance()["git_commit"]}
    lines = [line for line in read_csv(CSV, COLUMNS) if line["label"] != about["label"]] if CSV.exists() else []
    for number in tqdm(range(states), about["label"], mininterval=2):
        for line in brancher.branch(number, rollouts):
            rounded = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in line.items()}
            lines.append(about | rounded)
        write(lines)


def write(lines: list[dict]) -> None:
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def of_states(lines: list[dict]) -> list[dict[str, float]]:
    """Of each state: what a choice among its candidates adds to the return, and how well the critic ranks them.

    A candidate is chosen by one half of the rollouts and judged by the other, so that luck isn't taken for quality.
    """
    found = []
    for state in dict.fromkeys(line["state"] for line in lines):
        of = [line for line in lines if line["state"] == state]
        q, a, b = (np.array([float(line[name]) for line in of]) for name in ("q", "return_a", "return_b"))
        true = (a + b) / 2
        above = q >= q.mean()  # what VGPD lets pass
        found.append({
            "mean return": true.mean(),
            "best candidate": (b[a.argmax()] + a[b.argmax()]) / 2 - true.mean(),
            "critic's best": true[q.argmax()] - true.mean(),
            "above the mean Q": true[above].mean() - true.mean(),
            "rank of Q": rank_correlation(q, true),
            "rank of half the rollouts": rank_correlation(a, b),
            "spread of Q": q.std(),
            "critics' disagreement": np.mean([float(line["critic_std"]) for line in of]),
        })  # fmt: skip
    return found


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; NaN where one of the two says nothing."""
    from scipy.stats import spearmanr

    return spearmanr(x, y).statistic if x.std() and y.std() else np.nan


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over states, and the ends of its 95 % interval by bootstrap."""
    known = np.array(values)[~np.isnan(values)]
    drawn = np.random.default_rng(0).choice(known, (2000, len(known))).mean(1)
    return known.mean(), *np.quantile(drawn, (0.025, 0.975))


PANELS = {
    "what a choice adds\nto the return": ("best candidate", "critic's best", "above the mean Q"),
    "rank correlation\nwith the true Q": ("rank of half the rollouts", "rank of Q"),
    "standard deviation": ("spread of Q", "critics' disagreement"),
}


def draw() -> None:
    """Draw results/branching.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_label = {}
    for line in read_csv(CSV, COLUMNS):
        by_label.setdefault(line["label"], []).append(line)
    states = {label: of_states(lines) for label, lines in by_label.items()}
    with matplotlib.rc_context(fname=TEMPLATES / "figures.mplstyle"):
        height = 0.9 + 0.45 * len(states)
        figure, axes = plt.subplots(1, len(PANELS), figsize=(8, height), sharey=True)
        for ax, (title, names) in zip(axes, PANELS.items()):
            for i, name in enumerate(names):
                for row, label in enumerate(states):
                    mean, low, high = interval([state[name] for state in states[label]])
                    place = row + 0.2 * (i - (len(names) - 1) / 2)
                    ax.plot([low, high], [place, place], color=f"C{i}", lw=1)
                    ax.plot(mean, place, "o", color=f"C{i}", ms=3, label=name if not row else None)
            ax.axvline(0, color="0.7", lw=0.6, zorder=0)
            ax.set(xlabel=title)
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
        axes[0].set(yticks=range(len(states)), yticklabels=list(states))
        axes[0].invert_yaxis()
        figure.savefig(DOCS / "figures" / "branching.png", bbox_inches="tight", metadata={"Software": None})


def main(words: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict({"measure": measure, "draw": draw}, args=words)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
