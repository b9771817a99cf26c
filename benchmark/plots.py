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
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import stats  # noqa: E402
from benchmark.collect import KEEP, RESULTS  # noqa: E402
from benchmark.rows import ROOT, CommandError, CommandFile, Row, all_commands, read_csv  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Rows keep their colour (Okabe and Ito's and Tol's, which colour-blind readers tell apart), marker and dashes in all
# figures; ablations that aren't listed take their method's colour.
LOOKS = {
    "FORCE": ("#0072B2", "o", "-"), "FORCE, no warm-up": ("#56B4E9", "^", (0, (4, 1.5))),
    "FORCE, no VGPD": ("#009E73", "v", (0, (1.5, 1))), "FORCE, no warm-up, no VGPD": ("#999999", "X", (0, (5, 1, 1, 1))),
    "ConRFT (no HIL)": ("#D55E00", "s", "-"), "ConRFT": ("#882255", "P", "-"), "Cal-QL": ("#CC79A7", "D", "-"),
    "Cal-ConRFT": ("#AA4499", "d", "-"), "CO-RFT": ("#E69F00", "h", "-"), "BC": ("#000000", "*", "-"),
    "FORCE on pi0": ("#332288", "p", "-"),
}  # fmt: skip
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
OVERVIEW = ("main", "force-ablation", "force-rgb", "pi0-state")  # files in the figures over all methods
STYLE = {
    "figure.dpi": 160, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 8,
    "svg.hashsalt": "benchmark", "svg.fonttype": "path", "legend.frameon": False, "legend.fontsize": 7,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip
TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1", "PlaceSphere-v1", "PullCubeTool-v1")


class Data:
    """Both CSVs, by run."""

    def __init__(self, results: Path):
        lines, more = (
            read_csv(p) if (p := results / name).exists() else [] for name in ("runs.csv", "diagnostics.csv")
        )
        self.runs, self.diagnostics = stats.by_run(lines), stats.by_run(more)

    def of(self, row: Row) -> dict[int, stats.Lines]:
        """The row's runs by seed."""
        return {seed: run for (name, seed), run in sorted(self.runs.items()) if name == row.name}

    def series(self, row: Row, seed: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A diagnostic: update steps, control steps since hand-over, and values."""
        lines = [line for line in self.diagnostics.get((row.name, seed), []) if line[name]]
        online = [line for line in self.runs[row.name, seed] if line["stage"] in stats.ONLINE]
        start = float(online[0]["global_step"]) if online else 0.0
        columns = ([float(line[key]) for line in lines] for key in ("update_step", "global_step", name))
        updates, steps, values = map(np.asarray, columns)
        return updates, steps - start, values


def tasks_of(rows: list[Row]) -> list[tuple[str, str]]:
    """(task, observations) of rows, in the usual order."""
    found = {(row.env_id, row.obs_mode) for row in rows}
    return sorted(found, key=lambda t: (TASKS.index(t[0]) if t[0] in TASKS else len(TASKS), t))


def named(task: tuple[str, str]) -> str:
    return f"{task[0].removesuffix('-v1')}, {'camera' if task[1] == 'rgb' else task[1]}"


def styles(rows: list[Row]) -> dict[str, dict]:
    """Colour, marker and dashes of each label among rows."""
    count, chosen = {}, {}
    for row in rows:
        if row.label not in chosen:
            colour, marker, dashes = LOOKS.get(row.label) or LOOKS.get(row.method, ("#666666", "o", "-"))
            if row.label not in LOOKS:
                i = count[row.method] = count.get(row.method, 0) + 1
                marker, dashes = "^vXpP*"[i % 6], DASHES[i % len(DASHES)]
            chosen[row.label] = dict(color=colour, marker=marker, ls=dashes)
    return chosen


def draw_mean(ax, runs: list[tuple[np.ndarray, np.ndarray]], band: bool = True, **look) -> None:
    """Mean over runs (x, y) of different x, within the range that all have; `band` is from the least to the greatest."""
    runs = [(x, y) for x, y in runs if len(x)]
    if runs:
        grid = np.linspace(max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs), 2 * KEEP)
        stacked = np.stack([np.interp(grid, x, y) for x, y in runs])
        ax.plot(grid, stacked.mean(0), **look)
        if band:
            ax.fill_between(grid, stacked.min(0), stacked.max(0), color=look["color"], alpha=0.15, lw=0)


def panels(tasks: list, width: float, height: float, rows: int = 1, **options):
    """A row (or rows) of panels, one column per task."""
    shape = dict(figsize=(max(width * len(tasks), 3.2), height), squeeze=False, layout="constrained") | options
    return plt.subplots(rows, len(tasks), **shape)


def legend(figure, handles: list) -> None:
    """Below the panels, in as many columns as fit."""
    each = 0.65 + 0.062 * max(len(handle.get_label()) for handle in handles)  # inches
    columns = max(1, min(len(handles), int(figure.get_figwidth() / each)))
    figure.set_figheight(figure.get_figheight() + 0.17 * max(-(-len(handles) // columns) - 2, 0))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


# ---- figures: each returns one, or None if there is nothing to draw ----
def plot_curves(file: CommandFile, data: Data):
    """Success against control steps since hand-over. Thin lines: seeds; band: their range; marks on the left: after SFT."""
    rows = [row for row in file.rows if data.of(row)]
    if not any(len(stats.curve(run)[0]) > 1 for row in rows for run in data.of(row).values()):
        return None
    tasks, style, handles = tasks_of(rows), styles(rows), {}
    figure, axes = panels(tasks, 2.5, 2.6, sharey=True)
    for ax, task in zip(axes[0], tasks):
        ends = [
            stats.curve(run)[0][-1:]
            for row in rows
            for run in data.of(row).values()
            if (row.env_id, row.obs_mode) == task
        ]
        right = max((end[0] for end in ends if end), default=1.0) or 1.0
        left = -0.09 * right
        for row in [row for row in rows if (row.env_id, row.obs_mode) == task]:
            look, runs = style[row.label], []
            colour = look["color"]
            for run in data.of(row).values():
                x, y = stats.curve(run)
                start = stats.after_sft(run)
                if start:
                    ax.plot(
                        left,
                        100 * float(start["success_once"]),
                        "D",
                        ms=3.5,
                        mfc="white",
                        mec=colour,
                        mew=0.9,
                        clip_on=False,
                    )
                if len(x) > 1:
                    runs.append((x, 100 * np.asarray(y)))
                    ax.plot(x, runs[-1][1], lw=0.6, alpha=0.6, color=colour, ls=look["ls"])
                else:  # without online steps: the final success as a level
                    runs.append(([0.0, right], np.full(2, 100 * float(stats.result(run)["success_once"]))))
            grid = np.linspace(0, min(x[-1] for x, _ in runs), 201)
            stacked = np.stack([np.interp(grid, x, y) for x, y in runs])
            ax.fill_between(grid, stacked.min(0), stacked.max(0), color=colour, alpha=0.15, lw=0)
            level = not any(len(stats.curve(run)[0]) > 1 for run in data.of(row).values())
            look = look | (dict(marker=None, lw=1.0) if level else dict(lw=1.6, ms=4))
            every = [int(i) for i in np.searchsorted(grid, runs[0][0]).clip(0, 200)]
            ax.plot(grid, stacked.mean(0), **look, markevery=every, clip_on=False)
            handles.setdefault(row.label, plt.Line2D([], [], **look, label=row.label))
        ax.set(
            title=named(task), ylim=(-3, 103), xlim=(1.9 * left, 1.02 * right), xlabel="control steps since hand-over"
        )
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
        ax.axvline(0, color="#999999", lw=0.6, ls=":", zorder=0)
    axes[0][0].set_ylabel("success, %")
    cloned = plt.Line2D([], [], color="#444444", marker="D", ms=3.5, mfc="white", ls="", label="after SFT")
    legend(figure, [*handles.values(), cloned])
    return figure


def plot_drop(rows: list[Row], data: Data):
    """For each method and seed: success at hand-over, its lowest online value, its last.

    A task that only one method has runs of compares nothing: it is left out beside others.
    """
    rows = [row for row in rows if any(stats.largest_drop(run) is not None for run in data.of(row).values())]
    methods = {t: {row.method for row in rows if (row.env_id, row.obs_mode) == t} for t in tasks_of(rows)}
    rows = [row for row in rows if len(methods[row.env_id, row.obs_mode]) > 1] or rows
    if not rows:
        return None
    tasks, style = tasks_of(rows), styles(rows)
    labels = list(dict.fromkeys(row.label for row in rows))
    figure, axes = panels(tasks, 2.2, max(0.95 + 0.38 * len(labels), 1.8), sharey=True, sharex=True)
    for ax, task in zip(axes[0], tasks):
        for row in [row for row in rows if (row.env_id, row.obs_mode) == task]:
            runs = [run for run in data.of(row).values() if stats.largest_drop(run) is not None]
            for i, run in enumerate(runs):
                rates = 100 * np.asarray(stats.curve(run)[1])
                y, colour = labels.index(row.label) + 0.25 * (i - (len(runs) - 1) / 2), style[row.label]["color"]
                ax.plot([rates.min(), rates[0]], [y, y], color=colour, lw=2.5, alpha=0.35, solid_capstyle="butt")
                ax.plot(rates[-1], y, "s", ms=3.5, color=colour)
                ax.plot(rates.min(), y, marker="<", ms=4, color=colour, mew=0)
                ax.plot(rates[0], y, "o", ms=4.5, mfc="none", mec=colour, mew=1)
        ax.set(title=named(task), xlim=(-4, 106), xlabel="success, %", ylim=(len(labels) - 0.45, -0.55))
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", lw=0.3, color="#cccccc")
        ax.hlines(np.arange(1, len(labels)) - 0.5, -4, 106, lw=0.3, color="#cccccc")
    marks = [("o", "none", "at hand-over"), ("<", "#444444", "lowest online"), ("s", "#444444", "at the end")]
    lines = [plt.Line2D([], [], color="#444444", marker=m, mfc=f, ls="", ms=4.5, label=label) for m, f, label in marks]
    legend(figure, lines)
    return figure


def plot_calibration(rows: list[Row], data: Data):
    """Top and middle: Q against the warm-up rollouts' returns, before and after warm-up. Bottom: Q minus return online, mean over seeds."""
    names = {
        "calib/q_minus_return": "Q minus return,\nwarm-up rollouts",
        "calib/correlation": "correlation of\nQ and return",
    }
    rows = [row for row in rows if any(len(stats.curve(run)[0]) > 1 for run in data.of(row).values())]
    rows = [row for row in rows if any(len(data.series(row, seed, "values/q_data")[0]) for seed in data.of(row))]
    if not rows:
        return None
    tasks, style = tasks_of(rows), styles(rows)
    figure, axes = panels(tasks, 2.4, 5.0, rows=3, sharey="row")
    for column, task in enumerate(tasks):
        mine = [row for row in rows if (row.env_id, row.obs_mode) == task]
        warm = [row for row in mine if not row.ablation]  # up to hand-over, ablations of what follows are the same
        for row in mine:
            marker, look = style[row.label]["marker"], dict(color=style[row.label]["color"], ls=style[row.label]["ls"])
            online = []
            for i, seed in enumerate(seeds := list(data.of(row))):
                for name, ax in zip(names, axes[:, column]):
                    _, _, value = data.series(row, seed, name)
                    if len(value) > 1 and row in warm:
                        aside = 0.2 * (warm.index(row) - (len(warm) - 1) / 2) + 0.04 * (i - (len(seeds) - 1) / 2)
                        ax.plot(np.arange(2) + aside, value[[0, -1]], **look, marker=marker, ms=3.5, lw=1)
                _, steps, q = data.series(row, seed, "values/q_data")
                _, _, returned = data.series(row, seed, "values/mc_return")
                online.append((steps[steps > 0], (q - returned)[steps > 0]))
            draw_mean(axes[2, column], online, band=False, **look, lw=1.2)
        for ax in axes[:2, column]:
            ax.set_xticks([0, 1], ["before", "after warm-up"])
            ax.set_xlim(-0.5, 1.5)
        axes[2, column].set_xlabel("control steps since hand-over")
        axes[2, column].xaxis.set_major_locator(plt.MaxNLocator(4))
        for ax in axes[:, column]:
            ax.axhline(0, color="#999999", lw=0.6, ls=":", zorder=0)
        axes[0, column].set_title(named(task))
    axes[1, 0].set_ylim(top=1.03)
    for ax, title in zip(axes[:, 0], [*names.values(), "Q minus return,\ntraining batches"]):
        ax.set_ylabel(title)
    legend(figure, [plt.Line2D([], [], **look, ms=3.5, lw=1, label=label) for label, look in style.items()])
    return figure


def plot_distillation(rows: list[Row], data: Data):
    """VGPD's gate, and the spread of its candidates in actions and in Q: mean over seeds, and their range."""
    names = {
        "vgpd/zeta": "states that learn a\nproposal (zeta)", "vgpd/candidate_std": "spread of proposals,\naction box",
        "values/q_std": "their spread in Q",
    }  # fmt: skip
    rows = [row for row in rows if any(len(data.series(row, seed, "vgpd/zeta")[0]) for seed in data.of(row))]
    if not rows:
        return None
    tasks, style = tasks_of(rows), styles(rows)
    figure, axes = panels(tasks, 2.5, 4.2, rows=3, sharex="col", sharey="row")
    for column, task in enumerate(tasks):
        for (name, title), ax in zip(names.items(), axes[:, column]):
            for row in [row for row in rows if (row.env_id, row.obs_mode) == task]:
                look = dict(color=style[row.label]["color"], ls=style[row.label]["ls"], lw=1.2)
                draw_mean(ax, [data.series(row, seed, name)[1:] for seed in data.of(row)], **look)
            ax.set_ylim(0, 1 if name == "vgpd/zeta" else None)
            if not column:
                ax.set_ylabel(title)
        axes[0][column].set_title(named(task))
        axes[-1][column].set_xlabel("control steps since hand-over")
        axes[-1][column].xaxis.set_major_locator(plt.MaxNLocator(4))
    for row_of_axes in axes[1:]:
        top = max(line.get_ydata().max() for ax in row_of_axes for line in ax.lines)
        row_of_axes[0].set_ylim(0, 1.08 * top)
    if len(style) > 1:
        legend(figure, [plt.Line2D([], [], color=s["color"], ls=s["ls"], label=label) for label, s in style.items()])
    return figure


def plot_operator(rows: list[Row], data: Data):
    """ConRFT's figure 3: running means over 20 training episodes, mean over seeds and their range."""
    names = {
        "train/success_once": "training success", "train/episode_len": "episode length,\ncontrol steps",
        "intervention/rate": "steps of the operator",
    }  # fmt: skip
    helped = [row for row in rows if any(data.series(row, seed, "intervention/rate")[2].any() for seed in data.of(row))]
    same = {re.sub(r" --(intervention|takeover-\w+) \S+", "", row.command) for row in helped}  # but for the operator
    alone = [row for row in rows if row.command in same]
    if not helped:
        return None
    tasks, style = tasks_of(helped), styles([*alone, *helped])
    figure, axes = panels(tasks, 4.4, 4.2, rows=3, sharex="col")
    for column, task in enumerate(tasks):
        for (name, title), ax in zip(names.items(), axes[:, column]):
            for row in [row for row in (*alone, *helped) if (row.env_id, row.obs_mode) == task]:
                look = dict(color=style[row.label]["color"], ls=style[row.label]["ls"], lw=1.2)
                draw_mean(ax, [data.series(row, seed, name)[1:] for seed in data.of(row)], **look)
            ax.set_ylim(0, None if name == "train/episode_len" else 1)
            ax.set_ylabel("" if column else title)
        axes[0][column].set_title(named(task))
        axes[-1][column].set_xlabel("control steps since hand-over")
    legend(figure, [plt.Line2D([], [], color=s["color"], ls=s["ls"], label=label) for label, s in style.items()])
    return figure


# ---- files ----
def digest(data: Data, rows: list[Row]) -> str:
    """Of all that is known about rows: a figure drawn from other numbers has another one."""
    names = {row.name: row.label for row in rows}
    known = [{str(run): lines for run, lines in sorted(source.items()) if run[0] in names}
             for source in (data.runs, data.diagnostics)]  # fmt: skip
    return hashlib.sha1(json.dumps([names, *known], sort_keys=True).encode()).hexdigest()[:12]


def save(figure, path: Path, made_from: str) -> None:
    """path.svg, and path.png in 256 colours; without dates, so that the same numbers give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(vector := io.StringIO(), format="svg", metadata={"Date": None, "Description": made_from})
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(256, dither=Image.Dither.NONE)
    plt.close(figure)
    info = PngInfo()
    info.add_text("Description", made_from)
    image.save(pixels := io.BytesIO(), format="png", optimize=True, pnginfo=info)
    for suffix, content in ((".svg", vector.getvalue().encode()), (".png", pixels.getvalue())):
        temporary = path.with_suffix(f"{suffix}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path.with_suffix(suffix))


def drawn_from(path: Path) -> str | None:
    """The digest in both files of a figure; None if one is missing or they differ."""
    try:
        vector = re.search(r"<dc:description>(\w+)</dc:description>", path.with_suffix(".svg").read_text())
        pixels = Image.open(path.with_suffix(".png")).text.get("Description")
    except (FileNotFoundError, AttributeError):
        return None
    return pixels if vector and vector[1] == pixels else None


def main(results: Path = RESULTS, root: Path = ROOT, check: bool = False) -> int:
    """Bring the figures in line with the results.

    Args:
        results: folder of the CSVs.
        root: folder that holds docs/figures.
        check: draw nothing; exit code 1 if a figure is missing or was drawn from other numbers.
    """
    try:
        files = all_commands()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data, drawn = Data(results), []
    known = {file.name: [row for row in file.rows if data.of(row)] for file in files}
    rows = list(dict.fromkeys(row for name in OVERVIEW for row in known.get(name, [])))
    wanted = {file.name: (known[file.name], lambda _, file=file: plot_curves(file, data)) for file in files}
    everything = list(dict.fromkeys(row for used in known.values() for row in used))
    for name, used, plot in (
        ("early-drop", rows, plot_drop),
        ("calibration", rows, plot_calibration),
        ("distillation", rows, plot_distillation),
        ("operator", [row for row in everything if row.script == "conrft.py"], plot_operator),
    ):
        wanted[name] = used, lambda rows, plot=plot: plot(rows, data)
    for name, (used, plot) in wanted.items():
        made_from, path = digest(data, used), root / "docs" / "figures" / name
        if not used or (check and drawn_from(path) == made_from):
            continue
        with matplotlib.rc_context(STYLE):
            if (figure := plot(used)) is None:
                continue
            drawn.append(name)
            if check:
                plt.close(figure)
            else:
                save(figure, path, made_from)
    print(f"figures {'out of date' if check else 'drawn'}: {', '.join(drawn) or 'none'}")
    return int(check and bool(drawn))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
