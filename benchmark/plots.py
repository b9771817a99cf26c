"""Draws the figures of the documentation from the CSVs in benchmark/results: docs/figures/NAME.png.

NAME is a command file (success against control steps), "calibration" (Q against the returns that followed), "distillation"
(VGPD's gate and proposals) or "operator" (ConRFT with an operator and without). Lines are means over seeds, bands their
range.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import rows, stats  # noqa: E402
from benchmark.collect import KEEP, read_results  # noqa: E402
from benchmark.rows import Row, command_line, read_csv  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# These labels keep their colour (Okabe and Ito's and Tol's, which colour-blind readers tell apart) in all figures.
LOOKS = {}
for line in read_csv(rows.TEMPLATES / "looks.csv", ("label", "colour", "dashes")):
    LOOKS[line["label"]] = {"color": line["colour"], "ls": line["dashes"]}
OVERVIEW = ("main", "force-ablation", "force-rgb", "pi0-state")  # files in the figures over all methods
WARM_UP = "before (0) and after (1) warm-up"
STEPS = "control steps since hand-over"
Series = tuple[np.ndarray, np.ndarray]  # x and y of a run; of one length
NOTHING = (np.array([]), np.array([]))


@dataclass
class Panel:
    """What is drawn of each run: series(row, seed), and its axes."""

    label: str
    series: Callable[[Row, int], Series]
    limits: tuple[float | None, float | None] = (None, None)
    steps: str = STEPS


class Data:
    """Both CSVs, by run."""

    def __init__(self):
        """Raises: UserError."""
        path = rows.RESULTS / "diagnostics.csv"
        self.runs = read_results()
        self.diagnostics = stats.by_run(read_csv(path, ("row", "seed")))
        known = json.dumps([list(self.runs.items()), list(self.diagnostics.items())])
        self.digest = hashlib.sha1(known.encode()).hexdigest()  # figures drawn from other numbers have another one

    def seeds(self, row: Row) -> list[int]:
        return sorted(seed for name, seed in self.runs if name == row.name)

    def curve(self, row: Row, seed: int) -> Series:
        """Online steps and success in percent; one point for a run without online steps."""
        run = self.runs[row.name, seed]
        steps, rates = stats.curve(run)
        if len(steps) < 2:
            return np.zeros(1), np.array([100 * stats.result(run)["success_once"]])
        return steps, 100 * rates

    def online(self, row: Row) -> bool:
        """Whether it has a run that learned online."""
        return any(len(self.curve(row, seed)[0]) > 1 for seed in self.seeds(row))

    def diagnostic(self, name: str, row: Row, seed: int) -> Series:
        """Control steps since hand-over, and values."""
        lines = [line for line in self.diagnostics.get((row.name, seed), []) if line[name]]
        start = stats.before_handover(self.runs[row.name, seed]) or 0.0
        steps = np.array([float(line["global_step"]) for line in lines])
        return steps - start, np.array([float(line[name]) for line in lines])

    def change(self, name: str, row: Row, seed: int) -> Series:
        """A diagnostic's first and last value, at 0 and 1; nothing for ablations of what follows."""
        _, values = self.diagnostic(name, row, seed)
        return (np.arange(2), values[[0, -1]]) if len(values) > 1 and not row.ablation else NOTHING

    def overestimate(self, row: Row, seed: int) -> Series:
        """Q minus return in the training batches, from hand-over on."""
        steps, q = self.diagnostic("values/q_data", row, seed)
        _, returned = self.diagnostic("values/mc_return", row, seed)
        return steps[steps > 0], (q - returned)[steps > 0]

    def has(self, name: str, row: Row) -> bool:
        """Whether a diagnostic is ever anything but 0."""
        return any(self.diagnostic(name, row, seed)[1].any() for seed in self.seeds(row))


def draw_mean(ax: plt.Axes, runs: list[Series], look: dict) -> None:
    """Mean and range over runs of different x, where all have one; a level if they have a single point."""
    runs = [(x, y) for x, y in runs if len(x)]
    if not runs:
        return
    start = max(x[0] for x, _ in runs)
    end = min(x[-1] for x, _ in runs)
    grid = np.linspace(start, end, 2 * KEEP)
    values = np.stack([np.interp(grid, x, y) for x, y in runs])
    band = {"color": look["color"], "alpha": 0.15, "lw": 0}
    if start == end:
        ax.axhline(values.mean(), **look, lw=1)
        ax.axhspan(values.min(), values.max(), **band)
    else:
        ax.plot(grid, values.mean(0), **look, lw=1.4)
        ax.fill_between(grid, values.min(0), values.max(0), **band)


def draw(panels: list[Panel], used: list[Row], data: Data) -> plt.Figure:
    """A column per task, a row per panel."""
    tasks: dict[str, list[Row]] = {}
    for row in used:
        seen = row.flag("--obs-mode", "camera")
        tasks.setdefault(f"{row.env_id.removesuffix('-v1')}, {seen}", []).append(row)
    labels = dict.fromkeys(row.label for row in used)
    others = {label: {"color": f"C{i % 10}", "ls": "--"} for i, label in enumerate(labels)}
    looks = {label: LOOKS.get(label, others[label]) for label in labels}
    size = (max(2.5 * len(tasks), 3.2), 1.2 + 1.4 * len(panels))
    figure, axes = plt.subplots(
        len(panels), len(tasks), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for column, (title, mine) in zip(axes.T, tasks.items()):
        column[0].set_title(title)
        for ax, panel in zip(column, panels):
            for row in mine:
                draw_mean(ax, [panel.series(row, seed) for seed in data.seeds(row)], looks[row.label])
            ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
            ax.set_xlabel(panel.steps)
    for ax, panel in zip(axes[:, 0], panels):
        ax.set(ylabel=panel.label, ylim=panel.limits)
    handles = [plt.Line2D([], [], **look, label=label) for label, look in looks.items()]
    each = 0.65 + 0.062 * max(map(len, looks))  # inches
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=max(1, int(size[0] / each)))
    return figure


def figures(data: Data) -> dict[str, tuple[list[Row], Callable[..., plt.Figure]]]:
    """The rows of each figure that has any, and what draws it."""
    files = {file.name: [row for row in file.rows if data.seeds(row)] for file in rows.all_commands()}
    success = [Panel("success, %", data.curve, (-3, 103))]
    found = {name: (used, partial(draw, success)) for name, used in files.items() if any(map(data.online, used))}
    overview = dict.fromkeys(row for name in OVERVIEW for row in files.get(name, []))
    calibration = [
        Panel("Q minus return,\nwarm-up rollouts", partial(data.change, "calib/q_minus_return"), steps=WARM_UP),
        Panel("correlation of\nQ and return", partial(data.change, "calib/correlation"), (None, 1.03), WARM_UP),
        Panel("Q minus return,\ntraining batches", data.overestimate),
    ]
    learned = [row for row in overview if data.online(row) and data.has("values/q_data", row)]
    found["calibration"] = (learned, partial(draw, calibration))
    distillation = [
        Panel("states that learn a\nproposal (zeta)", partial(data.diagnostic, "vgpd/zeta"), (0, 1)),
        Panel("spread of proposals,\naction box", partial(data.diagnostic, "vgpd/candidate_std"), (0, None)),
        Panel("their spread in Q", partial(data.diagnostic, "values/q_std"), (0, None)),
    ]
    found["distillation"] = ([row for row in overview if data.has("vgpd/zeta", row)], partial(draw, distillation))
    operator = [
        Panel("training success", partial(data.diagnostic, "train/success_once"), (0, 1)),
        Panel("episode length,\ncontrol steps", partial(data.diagnostic, "train/episode_len"), (0, None)),
        Panel("steps of the operator", partial(data.diagnostic, "intervention/rate"), (0, 1)),
    ]
    helped = [row for row in files.get("conrft-state", []) if data.has("intervention/rate", row)]
    alone = {re.sub(r" --(intervention|takeover-\w+) \S+", "", row.command) for row in helped}  # but for the operator
    compared = [row for row in files.get("conrft-state", []) if row.command in alone] + helped
    found["operator"] = (compared, partial(draw, operator))
    return {name: (used, plot) for name, (used, plot) in found.items() if used}


def main(check: bool = False) -> int:
    """Bring the figures in line with the results.

    Args:
        check: draw nothing; exit code 1 if a figure is missing or was drawn from other numbers.
    """
    data = Data()
    folder = rows.DOCS / "figures"
    folder.mkdir(exist_ok=True)
    stale = []
    for name, (drawn, plot) in figures(data).items():
        path = folder / f"{name}.png"
        if check and path.exists() and Image.open(path).info.get("Description") == data.digest:
            continue
        stale.append(name)
        if not check:
            with matplotlib.rc_context(fname=rows.TEMPLATES / "figures.mplstyle"):
                figure = plot(drawn, data)
                figure.savefig(path, bbox_inches="tight", metadata={"Software": None, "Description": data.digest})
            plt.close(figure)
    print(f"figures {'out of date' if check else 'drawn'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    command_line(main)
