"""Draws the figures of the documentation from the CSVs in benchmark/results: a PNG and an SVG each, in docs/figures.

    python benchmark/plots.py            # draw them
    python benchmark/plots.py --check    # exit code 1 if a figure wasn't drawn from today's CSVs

NAME             learning curves of a command file, for each that has runs: success against control steps
early-drop       success at hand-over, at its lowest and at the end, for each method
calibration      Q against the returns that followed, before and after warm-up, and during online training
distillation     VGPD: how often the policy's own proposals are taken (zeta), and how far apart they are
operator         ConRFT: training success, episode length and intervention rate, with an operator and without
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import stats  # noqa: E402
from benchmark.collect import KEEP, RESULTS, read_results  # noqa: E402
from benchmark.rows import ROOT, CommandFile, Row, all_commands, command_line, read_csv  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TEMPLATES = ROOT / "benchmark" / "templates"
# Rows keep their colour (Okabe and Ito's and Tol's, which colour-blind readers tell apart), marker and dashes in all
# figures; ablations that aren't listed take their method's colour, and the next of these dashes.
LOOKS = {line["label"]: line for line in read_csv(TEMPLATES / "looks.csv", ("label", "colour", "marker", "dashes"))}
DASHES = ("", "4 1.5", "1.5 1", "5 1 1 1", "3 1 1 1 1 1", "8 2")
OVERVIEW = ("main", "force-ablation", "force-rgb", "pi0-state")  # files in the figures over all methods
TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1", "PlaceSphere-v1", "PullCubeTool-v1")
STEPS = "control steps since hand-over"
Series = tuple[np.ndarray, np.ndarray]


class Data:
    """Both CSVs, by run."""

    def __init__(self, results: Path):
        """Raises: UserError."""
        path = results / "diagnostics.csv"
        self.runs = stats.by_run(read_results(results))
        self.texts = stats.by_run(read_csv(results / "runs.csv"))
        self.diagnostics = stats.by_run(read_csv(path, ("row", "seed")) if path.exists() else [])

    def of(self, row: Row) -> dict[int, stats.Lines]:
        """The row's runs by seed."""
        return {seed: run for (name, seed), run in sorted(self.runs.items()) if name == row.name}

    def curves(self, row: Row) -> list[Series]:
        """Online steps and success in percent of each run that learned online."""
        found = [stats.curve(run) for run in self.of(row).values()]
        return [(steps, 100 * rates) for steps, rates in found if len(steps) > 1]

    def series(self, row: Row, seed: int, name: str) -> Series:
        """A diagnostic: control steps since hand-over, and values."""
        lines = [line for line in self.diagnostics.get((row.name, seed), []) if line[name]]
        start = stats.before_handover(self.runs[row.name, seed]) or 0.0
        steps = np.array([float(line["global_step"]) for line in lines])
        return steps - start, np.array([float(line[name]) for line in lines])

    def has(self, row: Row, name: str) -> bool:
        """Whether a diagnostic is ever anything but 0."""
        return any(self.series(row, seed, name)[1].any() for seed in self.of(row))


def tasks_of(rows: list[Row]) -> list[tuple[str, str]]:
    """(task, observations) of rows, in the usual order."""
    return sorted({row.task for row in rows}, key=lambda task: ([*TASKS, task[0]].index(task[0]), task))


def title(task: tuple[str, str]) -> str:
    return f"{task[0].removesuffix('-v1')}, {'camera' if task[1] == 'rgb' else task[1]}"


def linestyle(dashes: str):
    return (0, tuple(map(float, dashes.split()))) if dashes else "-"


def styles(rows: list[Row]) -> dict[str, dict]:
    """Colour, marker and dashes of each label among rows."""
    other = {"colour": "#666666", "marker": "o", "dashes": ""}
    count: dict[str, int] = {}
    chosen = {}
    for row in rows:
        if row.label in chosen:
            continue
        look = LOOKS.get(row.label) or LOOKS.get(row.method, other)
        if row.label not in LOOKS:
            i = count[row.method] = count.get(row.method, 0) + 1
            look = look | {"marker": "^vXpP*"[i % 6], "dashes": DASHES[i % len(DASHES)]}
        chosen[row.label] = {"color": look["colour"], "marker": look["marker"], "ls": linestyle(look["dashes"])}
    return chosen


def panels(tasks: list, width: float, height: float, rows: int = 1, **options):
    """A row (or rows) of panels, one column per task."""
    size = (max(width * len(tasks), 3.2), height)
    return plt.subplots(rows, len(tasks), figsize=size, squeeze=False, layout="constrained", **options)


def legend(figure, looks: dict[str, dict]) -> None:
    """Below the panels, in as many columns as fit: label -> how its line looks."""
    handles = [plt.Line2D([], [], **look, label=label) for label, look in looks.items()]
    each = 0.65 + 0.062 * max(map(len, looks))  # inches
    columns = max(1, min(len(handles), int(figure.get_figwidth() / each)))
    more = max(-(-len(handles) // columns) - 2, 0)
    figure.set_figheight(figure.get_figheight() + 0.17 * more)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


def draw_mean(ax, runs: list[Series], points: int = 2 * KEEP, band: bool = True, **look):
    """The line of the mean over runs (x, y) of different x, where all have one; `band`: from the least to the greatest."""
    runs = [(x, y) for x, y in runs if len(x)]
    if not runs:
        return None
    grid = np.linspace(max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs), points)
    stacked = np.stack([np.interp(grid, x, y) for x, y in runs])
    if band:
        ax.fill_between(grid, stacked.min(0), stacked.max(0), color=look["color"], alpha=0.15, lw=0)
    return ax.plot(grid, stacked.mean(0), **look)[0]


# ---- figures: each returns one, or None if there is nothing to draw ----
def draw_curves(ax, row: Row, look: dict, data: Data, right: float) -> dict:
    """A row's learning curves in one panel; returns how their mean looks."""
    colour = look["color"]
    runs = []
    for run in data.of(row).values():
        start = stats.after_sft(run)
        if start:
            rate = 100 * start["success_once"]
            ax.plot(-0.09 * right, rate, "D", ms=3.5, mfc="white", mec=colour, mew=0.9, clip_on=False)
        x, y = stats.curve(run)
        if len(x) > 1:
            ax.plot(x, 100 * y, lw=0.6, alpha=0.6, color=colour, ls=look["ls"])
        else:  # without online steps: the final success as a level
            x = np.array([0.0, right])
            y = np.full(2, stats.result(run)["success_once"])
        runs.append((x, 100 * y))
    look = look | (dict(lw=1.6, ms=4) if data.curves(row) else dict(marker=None, lw=1.0))
    line = draw_mean(ax, runs, points=201, **look, clip_on=False)
    line.set_markevery([int(i) for i in np.searchsorted(line.get_xdata(), runs[0][0]).clip(0, 200)])
    return look


def plot_curves(file: CommandFile, data: Data):
    """Success against control steps since hand-over. Thin lines: seeds; band: their range; marks on the left: after SFT."""
    rows = [row for row in file.rows if data.of(row)]
    if not any(data.curves(row) for row in rows):
        return None
    tasks = tasks_of(rows)
    style = styles(rows)
    looks: dict[str, dict] = {}
    figure, axes = panels(tasks, 2.5, 2.6, sharey=True)
    for ax, task in zip(axes[0], tasks):
        mine = [row for row in rows if row.task == task]
        ends = [stats.curve(run)[0][-1:].sum() for row in mine for run in data.of(row).values()]
        right = max(ends) or 1.0
        for row in mine:
            look = draw_curves(ax, row, style[row.label], data, right)
            looks.setdefault(row.label, look)
        ax.set(title=title(task), ylim=(-3, 103), xlim=(1.9 * -0.09 * right, 1.02 * right), xlabel=STEPS)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
        ax.axvline(0, color="#999999", lw=0.6, ls=":", zorder=0)
    axes[0][0].set_ylabel("success, %")
    legend(figure, looks | {"after SFT": dict(color="#444444", marker="D", ms=3.5, mfc="white", ls="")})
    return figure


def plot_drop(rows: list[Row], data: Data):
    """For each method and seed: success at hand-over, its lowest online value, its last.

    A task that only one method has runs of compares nothing: it is left out beside others.
    """
    rows = [row for row in rows if data.curves(row)]
    methods = {task: {row.method for row in rows if row.task == task} for task in tasks_of(rows)}
    rows = [row for row in rows if len(methods[row.task]) > 1] or rows
    if not rows:
        return None
    tasks = tasks_of(rows)
    style = styles(rows)
    labels = list(style)
    figure, axes = panels(tasks, 2.2, max(0.95 + 0.38 * len(labels), 1.8), sharey=True, sharex=True)
    for ax, task in zip(axes[0], tasks):
        for row in [row for row in rows if row.task == task]:
            colour = style[row.label]["color"]
            curves = data.curves(row)
            for i, (_, rates) in enumerate(curves):
                y = labels.index(row.label) + 0.25 * (i - (len(curves) - 1) / 2)
                ax.plot([rates.min(), rates[0]], [y, y], color=colour, lw=2.5, alpha=0.35, solid_capstyle="butt")
                ax.plot(rates[-1], y, "s", ms=3.5, color=colour)
                ax.plot(rates.min(), y, marker="<", ms=4, color=colour, mew=0)
                ax.plot(rates[0], y, "o", ms=4.5, mfc="none", mec=colour, mew=1)
        ax.set(title=title(task), xlim=(-4, 106), xlabel="success, %", ylim=(len(labels) - 0.45, -0.55))
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", lw=0.3, color="#cccccc")
        ax.hlines(np.arange(1, len(labels)) - 0.5, -4, 106, lw=0.3, color="#cccccc")
    mark = dict(color="#444444", ls="", ms=4.5)
    shapes = {"at hand-over": ("o", "none"), "lowest online": ("<", "#444444"), "at the end": ("s", "#444444")}
    legend(figure, {label: mark | dict(marker=marker, mfc=fill) for label, (marker, fill) in shapes.items()})
    return figure


def plot_calibration(rows: list[Row], data: Data):
    """Top and middle: Q against the warm-up rollouts' returns, before and after warm-up. Bottom: Q minus return online, mean over seeds."""
    names = {
        "calib/q_minus_return": "Q minus return,\nwarm-up rollouts",
        "calib/correlation": "correlation of\nQ and return",
    }
    rows = [row for row in rows if data.curves(row) and data.has(row, "values/q_data")]
    if not rows:
        return None
    tasks = tasks_of(rows)
    style = styles(rows)
    figure, axes = panels(tasks, 2.4, 5.0, rows=3, sharey="row")
    for column, task in zip(axes.T, tasks):
        mine = [row for row in rows if row.task == task]
        warm = [row for row in mine if not row.ablation]  # up to hand-over, ablations of what follows are the same
        for row in mine:
            marker = style[row.label]["marker"]
            look = {name: style[row.label][name] for name in ("color", "ls")}
            online = []
            for i, seed in enumerate(data.of(row)):
                for name, ax in zip(names, column):
                    _, value = data.series(row, seed, name)
                    if len(value) > 1 and row in warm:
                        aside = 0.2 * (warm.index(row) - (len(warm) - 1) / 2) + 0.04 * (i - (len(data.of(row)) - 1) / 2)
                        ax.plot(np.arange(2) + aside, value[[0, -1]], **look, marker=marker, ms=3.5, lw=1)
                steps, q = data.series(row, seed, "values/q_data")
                _, returned = data.series(row, seed, "values/mc_return")
                online.append((steps[steps > 0], (q - returned)[steps > 0]))
            draw_mean(column[2], online, band=False, **look, lw=1.2)
        for ax in column[:2]:
            ax.set_xticks([0, 1], ["before", "after warm-up"])
            ax.set_xlim(-0.5, 1.5)
        column[2].set_xlabel(STEPS)
        column[2].xaxis.set_major_locator(plt.MaxNLocator(4))
        for ax in column:
            ax.axhline(0, color="#999999", lw=0.6, ls=":", zorder=0)
        column[0].set_title(title(task))
    axes[1, 0].set_ylim(top=1.03)
    for ax, label in zip(axes[:, 0], [*names.values(), "Q minus return,\ntraining batches"]):
        ax.set_ylabel(label)
    legend(figure, {label: look | dict(ms=3.5, lw=1) for label, look in style.items()})
    return figure


def draw_series(names: dict[str, str], rows: list[Row], data: Data, width: float, **options):
    """A figure with a row of panels per diagnostic (name: label): mean over seeds and their range."""
    tasks = tasks_of(rows)
    looks = {label: {name: look[name] for name in ("color", "ls")} for label, look in styles(rows).items()}
    figure, axes = panels(tasks, width, 4.2, rows=len(names), sharex="col", **options)
    for column, task in zip(axes.T, tasks):
        for name, ax in zip(names, column):
            for row in [row for row in rows if row.task == task]:
                runs = [data.series(row, seed, name) for seed in data.of(row)]
                draw_mean(ax, runs, **looks[row.label], lw=1.2)
        column[0].set_title(title(task))
        column[-1].set_xlabel(STEPS)
    for ax, label in zip(axes[:, 0], names.values()):
        ax.set_ylabel(label)
    if len(looks) > 1:
        legend(figure, looks)
    return figure, axes


def plot_distillation(rows: list[Row], data: Data):
    """VGPD's gate, and the spread of its candidates in actions and in Q."""
    names = {
        "vgpd/zeta": "states that learn a\nproposal (zeta)",
        "vgpd/candidate_std": "spread of proposals,\naction box",
        "values/q_std": "their spread in Q",
    }
    rows = [row for row in rows if data.has(row, "vgpd/zeta")]
    if not rows:
        return None
    figure, axes = draw_series(names, rows, data, 2.5, sharey="row")
    axes[0, 0].set_ylim(0, 1)
    for ax in axes[-1]:
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
    for row in axes[1:]:
        top = max(line.get_ydata().max() for ax in row for line in ax.lines)
        row[0].set_ylim(0, 1.08 * top)
    return figure


def plot_operator(rows: list[Row], data: Data):
    """ConRFT's figure 3: running means over 20 training episodes."""
    names = {
        "train/success_once": "training success",
        "train/episode_len": "episode length,\ncontrol steps",
        "intervention/rate": "steps of the operator",
    }
    helped = [row for row in rows if data.has(row, "intervention/rate")]
    same = {re.sub(r" --(intervention|takeover-\w+) \S+", "", row.command) for row in helped}  # but for the operator
    alone = [row for row in rows if row.command in same]
    if not helped:
        return None
    figure, axes = draw_series(names, [*alone, *helped], data, 4.4)
    for ax in [*axes[0], *axes[2]]:
        ax.set_ylim(0, 1)
    for ax in axes[1]:
        ax.set_ylim(0, None)
    return figure


# ---- files ----
def digest(data: Data, rows: list[Row]) -> str:
    """Of all that is known about rows: a figure drawn from other numbers has another one."""
    names = {row.name: row.label for row in rows}
    known = []
    for source in (data.texts, data.diagnostics):
        known.append({str(run): lines for run, lines in sorted(source.items()) if run[0] in names})
    return hashlib.sha1(json.dumps([names, *known], sort_keys=True).encode()).hexdigest()[:12]


def save(figure, path: Path, made_from: str) -> None:
    """path.svg, and path.png in 256 colours; without dates, so that the same numbers give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vector = io.StringIO()
    figure.savefig(vector, format="svg", metadata={"Date": None, "Description": made_from})
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(256, dither=Image.Dither.NONE)
    info = PngInfo()
    info.add_text("Description", made_from)
    pixels = io.BytesIO()
    image.save(pixels, format="png", optimize=True, pnginfo=info)
    for suffix, content in ((".svg", vector.getvalue().encode()), (".png", pixels.getvalue())):
        temporary = path.with_suffix(f"{suffix}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path.with_suffix(suffix))


def drawn_from(path: Path) -> str | None:
    """The digest in both files of a figure; None if one is missing or they differ."""
    try:
        vector = re.search(r"<dc:description>(\w+)</dc:description>", path.with_suffix(".svg").read_text())
        pixels = Image.open(path.with_suffix(".png")).text.get("Description")
    except (OSError, AttributeError):
        return None
    return pixels if vector and vector[1] == pixels else None


def main(results: Path = RESULTS, root: Path = ROOT, check: bool = False) -> int:
    """Bring the figures in line with the results.

    Args:
        results: folder of the CSVs.
        root: folder that holds docs/figures.
        check: draw nothing; exit code 1 if a figure is missing or was drawn from other numbers.
    """
    data = Data(results)
    files = all_commands()
    known = {file.name: [row for row in file.rows if data.of(row)] for file in files}
    overview = list(dict.fromkeys(row for name in OVERVIEW for row in known.get(name, [])))
    conrft = dict.fromkeys(row for rows in known.values() for row in rows if row.script == "conrft.py")
    wanted = [(file.name, known[file.name], plot_curves, file) for file in files]
    wanted += [("early-drop", overview, plot_drop, overview), ("calibration", overview, plot_calibration, overview)]
    wanted += [("distillation", overview, plot_distillation, overview), ("operator", list(conrft), plot_operator, list(conrft))]
    drawn = []
    for name, rows, plot, what in wanted:
        made_from = digest(data, rows)
        path = root / "docs" / "figures" / name
        if not rows or (check and drawn_from(path) == made_from):
            continue
        with matplotlib.rc_context(fname=TEMPLATES / "figures.mplstyle"):
            figure = plot(what, data)
            if figure:
                drawn.append(name)
                if not check:
                    save(figure, path, made_from)
                plt.close(figure)
    print(f"figures {'out of date' if check else 'drawn'}: {', '.join(drawn) or 'none'}")
    return int(check and bool(drawn))


if __name__ == "__main__":
    command_line(main)
