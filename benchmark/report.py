"""Writes the tables and figures of the documentation from the CSVs in benchmark/results, and from nothing else.

    python benchmark/report.py            # rewrite the blocks between <!-- begin: SUITE --> and <!-- end: SUITE -->
    python benchmark/report.py --check    # exit code 1 if a block is out of date

A block goes wherever its markers stand in README.md or docs/*.md; without markers, to the end of the suite's page.
Running it twice changes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from PIL import Image
from scipy.stats import binomtest, trim_mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.collect import DIAGNOSTICS, RESULTS, mixed, read_csv  # noqa: E402
from benchmark.suites import ROOT, SUITES, Row, Suite  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PAPERS = ROOT / "benchmark" / "papers.csv"
SOURCES = {
    "T1": "FORCE (arXiv:2606.26006), Table 1",
    "T3": "FORCE (arXiv:2606.26006), Table 3, steps at 80 %, undefined there (one note reads its column "
    '"w/o Pre-Cal & VGPD" as "w/o VGPD")',
}  # of papers.csv
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
STYLE = {"figure.dpi": 130, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
Lines = list[dict[str, str]]


# ---- statistics ----
def values(lines: Lines, name: str) -> list[float]:
    return [float(line[name]) for line in lines if line.get(name)]


def pooled(lines: Lines, prefix: str = "") -> tuple[float, float, float] | None:
    """Mean over seeds, and the Wilson 95 % interval over all their episodes; None if not measured."""
    rates, counts = values(lines, f"{prefix}success_once"), values(lines, f"{prefix}episodes")
    if not rates:
        return None
    k, n = sum(round(r * c) for r, c in zip(rates, counts, strict=True)), int(sum(counts))
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(np.mean(rates)), float(interval.low), float(interval.high)


def bootstrap_iqm(scores: list[list[float]], samples: int = 20_000, seed: int = 0) -> tuple[float, float, float]:
    """Interquartile mean over the runs of several tasks, with a 95 % stratified bootstrap interval.

    scores: one list of per-seed scores for each task; runs are drawn with replacement within their task.
    Source: Agarwal et al., arXiv:2108.13264; with the generator seeded, so that the interval is reproducible.
    """
    generator = np.random.default_rng(seed)
    drawn = [np.asarray(task)[generator.integers(len(task), size=(samples, len(task)))] for task in scores]
    low, high = np.quantile(trim_mean(np.concatenate(drawn, 1), 0.25, axis=1), [0.025, 0.975])
    return float(trim_mean(np.concatenate(scores), 0.25)), float(low), float(high)


# ---- tables ----
HEADER = (
    "Task", "Observations", "Method", "Success, % (95 % interval)", "Per seed, %", "Seeds",
    "After SFT, % (95 % interval)", "At hand-over, %", "Largest drop, points", "Steps to success (demonstrations')",
    "Online env steps at 80 %", "Minutes", "Paper: success, %", "Paper: env steps at 80 %",
)  # fmt: skip


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}".removesuffix(".0")


def interval(measured: tuple[float, float, float] | None) -> str:
    return "–" if measured is None else f"{percent(measured[0])} ({percent(measured[1])}–{percent(measured[2])})"


def table(header: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *body])


def paper_values(row: Row, metric: str) -> tuple[str, set[str]]:
    """The papers' numbers for a row, each with its source tag, and the tags used."""
    wanted = [p for p in read_csv(PAPERS) if (p["env_id"], p["metric"]) == (row.env_id, metric)]
    found = [p for p in wanted if p["method"] in row.paper]
    return ", ".join(f"{p['value']} [{p['source']}]" for p in found) or "–", {p["source"] for p in found}


def result_cells(row: Row, lines: Lines, suite: Suite) -> list[str]:
    if not lines:
        return ["not run"] + ["–"] * 8
    steps = [line["online_env_steps_at_80"] or "–" for line in lines]
    demo, success = values(lines, "demo_steps_to_success"), values(lines, "steps_to_success")
    missing = "" if len(lines) >= len(suite.seeds) else f" ({len(lines)} of {len(suite.seeds)} seeds)"
    return [
        f"{interval(pooled(lines))}{missing}",
        ", ".join(percent(v) for v in values(lines, "success_once")),
        ", ".join(line["seed"] for line in lines),
        interval(pooled(lines, "sft_")),
        ", ".join(percent(v) for v in values(lines, "handover_success_once")) or "–",
        ", ".join(percent(v) for v in values(lines, "largest_drop")) or "–",
        f"{np.mean(success):.1f}" + (f" ({np.mean(demo):.1f})" if demo else ""),
        ", ".join(steps),
        ", ".join(f"{v / 60:.0f}" for v in values(lines, "seconds")) or "–",
    ]


def bar_rows(row: Row, lines: Lines, suite: Suite) -> list[list[str]]:
    """[task, bar, measured, verdict] for each bar of a row."""
    bars, rows = row.bars, []

    def add(bar: str, measured: str, met: bool) -> None:
        part = "" if len(lines) >= len(suite.seeds) else f", {len(lines)} of {len(suite.seeds)} seeds"
        verdict = ("met" if met else "**not met**") + part if lines else "not run"
        rows.append([f"{row.env_id}, {row.obs_mode}", bar, measured if lines else "–", verdict])

    def mean(name: str) -> float:
        return float(np.mean(found)) if (found := values(lines, name)) else float("nan")

    def worst(name: str) -> float:
        return max(values(lines, name), default=float("nan"))

    if bars.success is not None:
        budget = f" within {int(row.flag('--online-steps')):,} online env steps" if row.flag("--online-steps") else ""
        add(f"success at least {percent(bars.success)} %{budget}", f"{percent(mean('success_once'))} %",
            mean("success_once") >= bars.success - 1e-9)  # fmt: skip
    if bars.sft is not None:
        add(f"success after SFT at least {percent(bars.sft)} %", f"{percent(mean('sft_success_once'))} %",
            mean("sft_success_once") >= bars.sft - 1e-9)  # fmt: skip
    if bars.above_sft:
        before, after = pooled(lines, "sft_"), pooled(lines)
        add("final success above SFT, intervals disjoint", f"{interval(before)} to {interval(after)}",
            bool(before and after and after[1] > before[2]))  # fmt: skip
    if bars.steps_ratio is not None:
        ratio = mean("steps_to_success") / mean("demo_steps_to_success")
        add(f"steps to success at most {percent(bars.steps_ratio)} % of the demonstrations'", f"{percent(ratio)} %",
            ratio <= bars.steps_ratio + 1e-9)  # fmt: skip
    if bars.drop is not None:
        drop = worst("largest_drop")
        add(
            f"success never more than {percent(bars.drop)} points below hand-over",
            f"{percent(drop)} points",
            drop <= bars.drop + 1e-5,
        )
    if bars.minutes is not None:
        minutes = worst("seconds") / 60
        add(f"whole run within {bars.minutes:g} minutes", f"{minutes:.1f} minutes", minutes <= bars.minutes)
    return rows


def notes_on(suite: Suite, lines: Lines) -> list[str]:
    """What a reader must know about how the runs of a table were made."""
    notes = [f"{line['row']}, seed {line['seed']}: {line['notes']}." for line in lines if line["notes"]]
    for row in suite.rows:
        own = [line for line in lines if line["row"] == row.name]
        notes += [f"{row.name}: its runs differ in {differing}."] if (differing := mixed(own)) else []
        others = sorted({line["command"] for line in own} - {row.command})
        notes += [f"{row.name} was measured with another command: `{command}`." for command in others]
    return notes


def aggregate(suite: Suite, lines: Lines) -> str:
    """Interquartile mean for each method over the tasks that every method of the table has been run on."""
    scores: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        task = f"{line['env_id']}, {line['obs_mode']}"
        scores.setdefault(line["method"], {}).setdefault(task, []).append(float(line["success_once"]))
    tasks = sorted(set.intersection(*(set(s) for s in scores.values())))
    if len(tasks) < 2:
        return ""
    body = []
    for method in dict.fromkeys(row.method for row in suite.rows if row.method in scores):
        runs = [scores[method][task] for task in tasks]
        measured = bootstrap_iqm(runs)
        shown = interval(measured) if min(map(len, runs)) > 1 else percent(measured[0])
        body.append([method, shown, str(sum(map(len, runs)))])
    text = f"Over {'; '.join(tasks)}: interquartile mean of the runs' success; stratified bootstrap."
    return f"{text}\n\n{table(['Method', 'Success, % (95 % interval)', 'Runs'], body)}"


def block(name: str, suite: Suite, lines: Lines, figures: list[str]) -> str:
    """The Markdown of a suite, without its markers."""
    by_row = {row.name: [line for line in lines if line["row"] == row.name] for row in suite.rows}
    body, tags = [], set()
    for row in suite.rows:
        success, used = paper_values(row, "success_once_percent")
        at_80, more = paper_values(row, "env_steps_at_80")
        tags |= used | more
        body.append([row.env_id, row.obs_mode, row.method, *result_cells(row, by_row[row.name], suite), success, at_80])
    episodes = " or ".join(f"{n:g}" for n in sorted(set(values(lines, "episodes"))))
    made = {
        key: " | ".join(sorted({line[key] for line in lines}))
        for key in ("torch", "mani_skill", "device", "git_commit")
    }
    parts = [
        f"<!-- made by benchmark/report.py from benchmark/results/{name}.csv: edits here are lost -->",
        table(list(HEADER), body),
        f"Success is `success_once` of the last checkpoint over {episodes} fixed episodes a run: mean over seeds, "
        "Wilson interval over all episodes together (it leaves out the spread between seeds, see the next column). "
        "The drop is success at hand-over to online learning minus the lowest evaluation from there on. Steps at 80 % "
        "are control steps since hand-over, at the first evaluation with at least 80 % that also holds at the next. "
        f"Commit {made['git_commit']}; torch {made['torch']}, mani_skill {made['mani_skill']}, on {made['device']}.",
    ]
    if tags:
        cited = "; ".join(f"[{tag}] {SOURCES[tag]}" for tag in sorted(tags))
        parts.append(
            f"The paper's numbers: {cited}. They come from reading notes of the paper, not from the paper itself, and "
            "its setting differs: released Octo weights, camera observations, its own demonstrations and evaluation."
        )
    parts += [f"Note: {note}" for note in notes_on(suite, lines)]
    if bars := [bar for row in suite.rows for bar in bar_rows(row, by_row[row.name], suite)]:
        parts.append(table(["Task", "Bar", "Measured", "Verdict"], bars))
    parts += filter(None, [aggregate(suite, lines), *figures])
    seeds, commands = ", ".join(map(str, suite.seeds)), "\n".join(row.command for row in suite.rows)
    parts.append(f"`python benchmark/run.py {name}` runs these, with `--seed` {seeds}:\n\n```bash\n{commands}\n```")
    return "\n\n".join(parts)


# ---- figures ----
def panels(lines: Lines) -> list[tuple[str, str]]:
    return list(dict.fromkeys((line["env_id"], line["obs_mode"]) for line in lines))


def of_panel(lines: Lines, panel: tuple[str, str]) -> dict[str, dict[str, Lines]]:
    """Lines of a task by method, then by seed."""
    chosen: dict[str, dict[str, Lines]] = {}
    for line in lines:
        if (line["env_id"], line["obs_mode"]) == panel:
            chosen.setdefault(line["method"], {}).setdefault(line["seed"], []).append(line)
    return chosen


def plot_success(curves: Lines, path: Path) -> None:
    """Success against online env steps, a panel per task: thin lines are seeds, the band is their range."""
    evaluations = [line for line in curves if line["stage"]]
    tasks, methods = panels(evaluations), list(dict.fromkeys(line["method"] for line in evaluations))
    shape = dict(figsize=(3.4 * len(tasks), 2.7), squeeze=False, sharey=True, layout="constrained")
    figure, axes = plt.subplots(1, len(tasks), **shape)
    for ax, task in zip(axes[0], tasks, strict=True):
        for method, seeds in of_panel(evaluations, task).items():
            colour, runs = COLOURS[methods.index(method) % len(COLOURS)], []
            for lines in seeds.values():
                online = [line for line in lines if line["stage"] in ("online", "done")]
                sft = [line for line in lines if line["stage"].startswith("sft")][:1]
                (x, y), (x_sft, y_sft) = (
                    (values(e, "online_env_step"), [100 * v for v in values(e, "success_once")]) for e in (online, sft)
                )
                ax.plot(x_sft, y_sft, "D", ms=4, mfc="white", mec=colour)
                ax.plot(x[:1], y[:1], "o", ms=4, color=colour)
                ax.plot(x, y, lw=0.6, alpha=0.6, color=colour)
                runs += [(x, y)] if x else []
            if runs:
                grid = np.linspace(0, min(x[-1] for x, _ in runs), 201)
                stacked = np.stack([np.interp(grid, x, y) for x, y in runs])
                ax.fill_between(grid, stacked.min(0), stacked.max(0), color=colour, alpha=0.15, lw=0)
                ax.plot(grid, stacked.mean(0), lw=1.8, color=colour)
            ax.plot([], [], lw=1.8, color=colour, label=method)
        ax.plot([], [], "D", ms=4, mfc="white", mec="black", label="after SFT")
        ax.plot([], [], "o", ms=4, color="black", label="hand-over")
        ax.axvline(0, color="grey", lw=0.6, ls=":")
        ax.set(title=f"{task[0]}, {task[1]}", xlabel="env steps since hand-over", ylim=(-3, 103))
        ax.xaxis.set_major_locator(plt.MaxNLocator(5))
    axes[0][0].set_ylabel("success, %")
    axes[0][-1].legend(fontsize=6, frameon=False, loc="lower right")
    save(figure, path)


def plot_diagnostics(curves: Lines, path: Path) -> bool:
    """Each logged diagnostic against updates, a column per task, a line per seed; a tick marks the hand-over."""
    logged = [line for line in curves if not line["stage"]]
    columns = [name for name in (logged[0] if logged else {}) if DIAGNOSTICS.fullmatch(name)]
    names = [
        name for name in columns if len(values(logged, name)) > 2 * len({(li["row"], li["seed"]) for li in logged})
    ]
    if not names:
        return False
    tasks, methods = panels(logged), list(dict.fromkeys(line["method"] for line in logged))
    size = (2.8 * len(tasks), 1.3 * len(names) + 0.4)
    figure, axes = plt.subplots(len(names), len(tasks), figsize=size, squeeze=False, sharex="col", layout="constrained")
    for column, task in enumerate(tasks):
        axes[0][column].set_title(f"{task[0]}, {task[1]}")
        axes[-1][column].set_xlabel("updates")
        for name, ax in zip(names, axes[:, column], strict=True):
            for method, seeds in of_panel(logged, task).items():
                colour = COLOURS[methods.index(method) % len(COLOURS)]
                for i, lines in enumerate(seeds.values()):
                    here = [line for line in lines if line[name]]
                    label = method if not i else None
                    x, y = values(here, "update_step"), values(here, name)
                    ax.plot(x, y, lw=0.8, alpha=0.8, color=colour, label=label)
                    before = [int(line["update_step"]) for line in lines if float(line["online_env_step"]) <= 0]
                    if before:
                        ax.axvline(max(before), ymax=0.08, color=colour, lw=1)
            if not column:
                ax.set_ylabel(name, fontsize=7)
    if len(methods) > 1:
        axes[0][-1].legend(fontsize=6, frameon=False)
    save(figure, path)
    return True


def save(figure, path: Path) -> None:
    """As a PNG of 256 colours without version or date: small, and the same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)
    image.quantize(256, dither=Image.Dither.NONE).save(temporary, format="png", optimize=True)
    os.replace(temporary, path)


# ---- pages ----
def pages_for(name: str, suite: Suite, root: Path) -> list[Path]:
    """Pages with the suite's markers; if there are none, the suite's own page."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    marked = [page for page in pages if page.exists() and f"<!-- begin: {name} -->" in page.read_text()]
    return marked or [root / suite.doc]


def replace_block(text: str, name: str, title: str, content: str) -> str:
    """`text` with `content` between the markers of `name`, which are appended under a heading if they are missing.

    Raises: ValueError if only one of the two markers is there, or one is there twice.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n".lstrip("\n")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the markers of {name} must be there once each, {begin} before {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main(results: Path = RESULTS, root: Path = ROOT, check: bool = False) -> int:
    """Bring the documentation in line with the committed results.

    Args:
        results: folder of the CSVs.
        root: folder that holds README.md and docs.
        check: change nothing; exit code 1 if a page is out of date.
    """
    stale, done = [], 0
    for name, suite in SUITES.items():
        if not (path := results / f"{name}.csv").exists():
            continue
        lines, curves = read_csv(path), read_csv(results / f"{name}-curves.csv")
        done += 1
        has_diagnostics = (root / "docs" / "figures" / f"{name}-diagnostics.png").exists()
        if not check:
            with matplotlib.rc_context(STYLE):
                plot_success(curves, root / "docs" / "figures" / f"{name}.png")
                has_diagnostics = plot_diagnostics(curves, root / "docs" / "figures" / f"{name}-diagnostics.png")
        for page in pages_for(name, suite, root):
            figures = os.path.relpath(root / "docs" / "figures", page.parent)
            alt = "success against online env steps; thin lines are seeds, the band is their range"
            images = [f"![{suite.title}: {alt}]({figures}/{name}.png)"]
            images += [f"![{suite.title}: diagnostics]({figures}/{name}-diagnostics.png)"] if has_diagnostics else []
            old = page.read_text() if page.exists() else f"# {page.stem}\n"
            new = replace_block(old, name, suite.title, block(name, suite, lines, images))
            if new != old:
                stale.append(f"{page.relative_to(root)} ({name})")
                if not check:
                    page.parent.mkdir(parents=True, exist_ok=True)
                    page.write_text(new)
    print(f"{done} suites; {'out of date' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
