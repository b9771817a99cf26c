"""Draws the figures of the documentation from the CSVs in benchmark/results: docs/figures/NAME.png.

NAME is a command file (success against control steps) or one of FIGURES. Lines are means over seeds, bands their range.
"""

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imageio
import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import rows, stats, tables  # noqa: E402
from benchmark.collect import KEEP, read_results  # noqa: E402
from benchmark.rows import Row, command_line, read_csv  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# These labels keep their colour (Okabe and Ito's and Tol's, which colour-blind readers tell apart) in all figures.
LOOKS = {}
for line in read_csv(rows.TEMPLATES / "looks.csv", ("label", "colour", "dashes")):
    LOOKS[line["label"]] = {"color": line["colour"], "ls": line["dashes"]}
WARM_UP = "before (0) and after (1) warm-up"
Series = tuple[np.ndarray, np.ndarray]  # x and y of a run; of one length


@dataclass
class Panel:
    """A diagnostic that is drawn (without a name: success), minus another one, and its axes."""

    label: str
    name: str = ""
    minus: str = ""
    bottom: float | None = None
    top: float | None = None
    x: str = "control steps since hand-over"


SUCCESS = Panel("success, %", bottom=-3, top=103)
FIGURES = {  # drawn of rows in which their last diagnostic is ever anything but 0
    "calibration": [
        Panel("Q minus return,\nwarm-up rollouts", "calib/q_minus_return", x=WARM_UP),
        Panel("correlation of\nQ and return", "calib/correlation", x=WARM_UP),
        Panel("Q minus return,\ntraining batches", "values/q_data", minus="values/mc_return"),
    ],
    "distillation": [
        Panel("spread of proposals,\naction box", "vgpd/candidate_std", bottom=0),
        Panel("their spread in Q", "values/q_std", bottom=0),
        Panel("states that learn a\nproposal (zeta)", "vgpd/zeta", bottom=-0.03, top=1.03),
    ],
    "operator": [
        Panel("training success", "train/success_once", bottom=-0.03, top=1.03),
        Panel("episode length,\ncontrol steps", "train/episode_len", bottom=0),
        Panel("steps of the operator", "intervention/rate", bottom=-0.03, top=1.03),
    ],
}
PER_COLUMN = 7  # rows that are told apart in one pair of axes
PER_BAND = 3  # columns of a page's width
DASHES = ("--", ":", "-.")
OVERVIEW = ("main", "force-ablation", "force-rgb", "pi0-state")  # files in these figures; of "operator" conrft-state


class Data:
    """Both CSVs, by run."""

    def __init__(self):
        """Raises: UserError."""
        self.runs = read_results()
        self.diagnostics = stats.by_run(read_csv(rows.RESULTS / "diagnostics.csv", ("row", "seed")))
        known = json.dumps([list(self.runs.items()), list(self.diagnostics.items())])
        self.digest = hashlib.sha1(known.encode()).hexdigest()  # figures drawn from other numbers have another one

    def of(self, row: Row, panel: Panel) -> list[Series]:
        """What is drawn of each seed."""
        runs = [run for run in sorted(self.runs) if run[0] == row.name]
        return [self.series(run, panel) if panel.name else self.success(run) for run in runs]

    def success(self, run: tuple[str, int]) -> Series:
        """Online steps and success in percent; one point for a run without online steps."""
        steps, rates = stats.curve(self.runs[run])
        if len(steps) < 2:
            return np.zeros(1), np.array([100 * stats.result(self.runs[run])["success_once"]])
        return steps, 100 * rates

    def series(self, run: tuple[str, int], panel: Panel) -> Series:
        """A diagnostic from hand-over on; in warm-up its first and last value, at 0 and 1. Empty if there is none."""
        lines = [line for line in self.diagnostics.get(run, []) if line[panel.name]]
        values = np.array([float(line[panel.name]) for line in lines])
        if panel.minus:
            values = values - [float(line[panel.minus]) for line in lines]
        if panel.x == WARM_UP:
            return np.arange(2 * (len(values) > 1)), values[[0, -1]] if len(values) > 1 else values[:0]
        start = stats.before_handover(self.runs[run]) or 0.0
        steps = np.array([float(line["global_step"]) for line in lines]) - start
        return steps[steps > 0], values[steps > 0]


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


def columns(drawn: list[Row]) -> list[tuple[str, list[Row]]]:
    """Title and rows of each column: a task, or a part of one with many rows, beside its first two for comparison."""
    by_task = {}
    for row in drawn:
        title = f"{row.env_id.removesuffix('-v1')}, {row.flag('--obs-mode', 'camera')}"
        by_task.setdefault(title, []).append(row)
    found = []
    for title, of in by_task.items():
        base = of[:2]
        parts = [of[i : i + PER_COLUMN - 2] for i in range(2, len(of), PER_COLUMN - 2)] or [[]]
        for number, part in enumerate(parts, 1):
            which = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
            found.append((title + which, base + part))
    return found


def draw(panels: list[Panel], drawn: list[Row], data: Data) -> plt.Figure:
    """A column per task, a row per panel; what is more than PER_BAND columns goes on below, so that all stay readable."""
    shown = columns(drawn)
    bands = -(-len(shown) // PER_BAND)
    across = -(-len(shown) // bands)
    labels = dict.fromkeys(row.label for row in drawn)
    own = itertools.product(DASHES, (f"C{i}" for i in range(10)))
    others = {label: {"color": colour, "ls": dashes} for label, (dashes, colour) in zip(labels, own)}
    looks = {label: LOOKS.get(label, others[label]) for label in labels}
    size = (max(2.5 * across, 3.2), 0.6 + bands * (0.6 + 1.4 * len(panels)))
    figure, axes = plt.subplots(bands * len(panels), across, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for i, (title, of) in enumerate(shown):
        top = i // across * len(panels)
        for ax, panel in zip(axes[top : top + len(panels), i % across], panels):
            ax.set_visible(True)
            for row in of:
                draw_mean(ax, data.of(row, panel), looks[row.label])
            ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
            ax.set(title=title if panel is panels[0] else "", xlabel=panel.x, ylim=(panel.bottom, panel.top))
            if i % across == 0:
                ax.set(ylabel=panel.label)
    handles = [plt.Line2D([], [], **look, label=label) for label, look in looks.items()]
    each = 0.65 + 0.062 * max(map(len, looks))  # inches
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=max(1, int(size[0] / each)))
    return figure


def curves(data: Data) -> dict[str, tuple[list[Panel], list[Row]]]:
    """Panels and rows of each figure of curves for which there are runs that learned online."""
    files = {}
    for name, commands in rows.all_commands().items():
        files[name] = [row for row in dict.fromkeys(row for row, _ in commands) if data.of(row, SUCCESS)]
    online = {row for used in files.values() for row in used if max(len(x) for x, _ in data.of(row, SUCCESS)) > 1}
    found = {}
    for name, used in files.items():
        tasks = {(row.env_id, row.flag("--obs-mode")) for row in used if row in online}
        shown = [row for row in used if (row.env_id, row.flag("--obs-mode")) in tasks]
        if shown:
            found[name] = ([SUCCESS], shown)
    overview = dict.fromkeys(row for name in OVERVIEW for row in files.get(name, []))
    for name, panels in FIGURES.items():
        wanted = files.get("conrft-state", []) if name == "operator" else overview
        shown = [row for row in wanted if row in online and any(y.any() for _, y in data.of(row, panels[-1]))]
        if name == "operator":  # beside the same without one
            alone = {re.sub(r" --(intervention|takeover-\w+) \S+", "", row.command) for row in shown}
            shown = [row for row in wanted if row.command in alone] + shown
        if shown:
            found[name] = (panels, shown)
    return found


def figures(data: Data) -> dict[str, Callable[[], plt.Figure]]:
    """What draws each figure for which there are runs."""
    found = {name: partial(draw, panels, shown, data) for name, (panels, shown) in curves(data).items()}
    book = tables.read_book()
    if {"main", "force-ablation", "few-state"} <= book.keys() and (pairs := tables.pairs_of(tables.compared(book))):
        found["pairs"] = partial(draw_pairs, pairs)
    return found


def draw_pairs(pairs: list[tables.Pairs]) -> plt.Figure:
    """FORCE minus each of the others, with intervals: success in points, and steps to success in percent."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 0.7 + 0.17 * len(pairs)), sharey=True)
    names = [f"{pair.other.env_id.removesuffix('-v1')}: {pair.other.label.removeprefix('FORCE, ')}" for pair in pairs]
    for height, pair in enumerate(pairs):
        saved = pair.ratio and [share - 1 for share in pair.ratio]
        for ax, measured in zip(axes, (pair.points, saved)):
            if measured:
                value, low, high = 100 * np.array(measured)
                ax.errorbar(value, height, xerr=[[value - low], [high - value]], fmt="o", ms=3, lw=1, color="#0072B2")
    axes[0].set(yticks=range(len(pairs)), yticklabels=names, xlabel="success, FORCE minus the other, points")
    axes[1].set(xlabel="steps to success, FORCE against the other, %")
    axes[0].invert_yaxis()
    for ax in axes:
        ax.axvline(0, color="grey", lw=0.6)
    return figure


def draw_meshes(path: Path) -> None:
    """StackCube's cameras, the hand's below: the arm with all of its triangles, and on the right with a tenth of them."""
    from force_octo import Args, make_maniskill, validate

    seen = []
    for full in (True, False):
        args = Args(image_size=256, full_meshes=full)
        validate(args)
        env = make_maniskill(args)
        obs, _ = env.reset(seed=args.eval_seed)
        env.close()
        hand = obs["wrist"][0].repeat(2, 0).repeat(2, 1)  # it has half as many pixels a side
        seen.append(np.concatenate([obs["primary"][0], hand]))
    Image.fromarray(np.concatenate(seen, 1)).save(path)


def draw_films(runs: tuple[Path, ...], path: Path, episodes: int = 3, side: int = 160) -> None:
    """The films of the same evaluation episodes, a row for each run, until the last one ends."""
    strips = []
    for run in runs:
        for episode in range(episodes):
            (film,) = (run / "videos").glob(f"episode-{episode}-*.mp4")
            frames = [
                Image.fromarray(frame[:256, :256]).resize((side, side))
                for frame in imageio.mimread(film, memtest=False)
            ]
            strips.append([np.asarray(frame) for frame in frames])
    longest = max(map(len, strips))
    frames = []
    for t in range(0, longest, 2):
        shown = [strip[min(t, len(strip) - 1)] for strip in strips]
        rows_shown = [np.concatenate(shown[i : i + episodes], 1) for i in range(0, len(shown), episodes)]
        frames.append(Image.fromarray(np.concatenate(rows_shown)).quantize(192, Image.Quantize.MAXCOVERAGE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=160, loop=0, optimize=True)


def main(check: bool = False, meshes: bool = False, films: tuple[Path, ...] = ()) -> int:
    """Bring the figures in line with the results; or draw with --meshes the cameras' views of the arm, with --films RUN RUN
    films of runs, a row each.

    --check: draw nothing; exit code 1 if a figure is missing or was drawn from other numbers.
    """
    folder = rows.DOCS / "figures"
    folder.mkdir(exist_ok=True)
    if meshes:
        draw_meshes(folder / "meshes.png")
        return 0
    if films:
        draw_films(films, folder / "rollout.gif")
        return 0
    data = Data()
    stale = []
    for name, make in figures(data).items():
        path = folder / f"{name}.png"
        if check and path.exists() and Image.open(path).info.get("Description") == data.digest:
            continue
        stale.append(name)
        if not check:
            with matplotlib.rc_context(fname=rows.TEMPLATES / "figures.mplstyle"):
                figure = make()
                figure.savefig(path, bbox_inches="tight", metadata={"Software": None, "Description": data.digest})
            plt.close(figure)
    print(f"figures {'out of date' if check else 'drawn'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    command_line(main)
