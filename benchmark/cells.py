"""Cells and captions of the tables: numbers, runs and the papers' numbers as text. "–" stands for what isn't known."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmark import stats
from benchmark.rows import ROOT, Row, read_csv

TEMPLATES = ROOT / "benchmark" / "templates"
PAPERS = ROOT / "benchmark" / "papers.csv"
WORDS = tomllib.loads((TEMPLATES / "words.toml").read_text())
FEW = 10  # successful episodes that a mean number of steps needs
SCALES = {"force_pi0.py": "pi0-compact"}  # the default backbone; of all other scripts octo-compact
SEEN = {"state": "privileged state", "rgb": "camera"}
Runs = dict[int, stats.Lines]  # a row's runs by seed


def fill(template: str, /, **parts) -> str:
    """The template with its parts; paragraphs that stay empty are left out."""
    text = (TEMPLATES / f"{template}.md").read_text()
    paragraphs = [" ".join(paragraph.split()).format(**parts).strip() for paragraph in text.split("\n\n")]
    return "\n\n".join(filter(None, paragraphs))


def caption(name: str, /, **parts) -> str:
    return WORDS["captions"][name].format(**parts)


def table(header: list[str], body: list[list[str]]) -> str:
    """Markdown, without the columns in which nothing stands."""
    columns = enumerate(zip(header, *body))
    kept = [column for i, column in columns if i == 0 or any(cell != "–" for cell in column[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(*kept)]
    lines.insert(1, f"| {' | '.join(['---'] * len(kept))} |")
    return "\n".join(lines)


# ---- numbers ----
def percent(rate: float) -> str:
    return f"{100 * rate:.1f}".removesuffix(".0")


def signed(rate: float) -> str:
    return ("+" if rate > 0 else "") + percent(rate)


def interval(measured: tuple[float, float, float] | None) -> str:
    """Mean and interval in percent."""
    if measured is None:
        return "–"
    mean, low, high = map(percent, measured)
    return f"{mean} ({low}–{high})"


def shown(value: float | None, form: Callable[[float], str] = percent) -> str:
    return "–" if value is None else form(value)


def average(by_task: dict[str, float]) -> str:
    """Over a paper's tasks, halves rounded up as the papers do."""
    return f"{np.mean(list(by_task.values())) + 1e-9:.1f}"


# ---- runs ----
def values_of(own: Runs, value: Callable) -> dict[int, float]:
    """value(run) by seed, without the runs that have none."""
    found = {seed: value(run) for seed, run in own.items()}
    return {seed: x for seed, x in found.items() if x is not None}


def mean_of(own: Runs, value: Callable) -> float | None:
    found = list(values_of(own, value).values())
    return float(np.mean(found)) if found else None


def per_seed(own: Runs, value: Callable, form: Callable = percent) -> str:
    """Each seed's value: "1: x, 2: y"."""
    return ", ".join(f"{seed}: {form(x)}" for seed, x in values_of(own, value).items()) or "–"


def final(name: str) -> Callable[[stats.Lines], float | None]:
    """The function that gives a column of a run's result."""
    return lambda run: stats.result(run)[name]


def missing(count: int, wanted: int) -> str:
    return f", {count} of {wanted} seeds" if count < wanted else ""


def success(own: Runs, wanted: int) -> str:
    """Mean and interval, and how many seeds are missing."""
    if not own:
        return "not run"
    return interval(stats.pooled([stats.result(run) for run in own.values()])) + missing(len(own), wanted)


def reached(time: tuple[float, bool]) -> str:
    """Steps at 80 %; a run that isn't there is shown with how far it was followed."""
    steps, there = time
    if not there:
        return f"more than {steps:.0f}"
    return f"{steps:.0f}" if steps else "0 (at hand-over)"


def steps(evaluation: dict) -> float | None:
    """Mean steps to success; None if fewer than FEW episodes succeeded."""
    successes = evaluation["success_once"] * evaluation["num_episodes"]
    return evaluation["episode_len"] if successes > FEW - 0.5 else None


def final_steps(run: stats.Lines) -> float | None:
    return steps(stats.result(run))


def cloned(row: Row, own: Runs) -> stats.Lines:
    """The evaluations after supervised fine-tuning; none for a row that throws the cloned head away."""
    if "--fresh-head" in row.command:
        return []
    return list(values_of(own, stats.after_sft).values())


def steps_cell(own: Runs) -> str:
    """Mean steps to success and, in brackets, the demonstrations'."""
    mine = mean_of(own, final_steps)
    demos = mean_of(own, final("demo_steps_to_success"))
    if mine is None:
        return "–"
    return f"{mine:.1f}" + (f" ({demos:.1f})" if demos else "")


# ---- captions ----
def setting(rows: list[Row]) -> str:
    """Scale and observations of our rows."""
    models = list(dict.fromkeys(row.flag("--backbone", SCALES.get(row.script, "octo-compact")) for row in rows))
    scales = dict.fromkeys("compact" if model.endswith("-compact") else "paper" for model in models)
    seen = dict.fromkeys(SEEN[row.obs_mode] for row in rows)
    return f"{' and '.join(scales)} scale ({', '.join(models)}), {' and '.join(seen)}"


def made_by(lines: stats.Lines) -> str:
    """Episodes, commits, versions and device of runs."""
    results = [line for line in lines if line["final"]]
    if not results:
        return ""

    def several(name: str) -> list:
        return sorted({line[name] for line in results})

    return caption(
        "made_by",
        episodes=" or ".join(f"{count:.0f}" for count in several("num_episodes")),
        commits=", ".join(commit[:12] for commit in several("git_commit")),
        versions=" | ".join(several("versions")),
        device=" | ".join(several("device")),
    )


class Papers:
    """papers.csv, and which of its sources have been used since `cite` was last called."""

    def __init__(self):
        """Raises: UserError."""
        self.lines = read_csv(PAPERS, ("source", "method", "task", "metric", "value"))
        self.used: set[str] = set()

    def value(self, methods: tuple[str, ...], task: str, metric: str, unit: str = "") -> str:
        """The papers' numbers for a method, each with its source."""
        wanted = [line for line in self.lines if line["task"] == task and line["metric"] == metric]
        found = [line for line in wanted if line["method"] in methods]
        self.used |= {line["source"] for line in found}
        return ", ".join(f"*{line['value']}*{unit} [{line['source']}]" for line in found) or "–"

    def grid(self, source: str, metric: str) -> dict[str, dict[str, float]]:
        """A paper's table: method -> task -> number."""
        self.used.add(source)
        methods: dict[str, dict[str, float]] = {}
        for line in self.lines:
            if line["source"] == source and line["metric"] == metric:
                methods.setdefault(line["method"], {})[line["task"]] = float(line["value"])
        return methods

    def cite(self) -> str:
        """The sources used; empty if there are none."""
        used = sorted(self.used)
        self.used = set()
        if not used:
            return ""
        sources = "; ".join(f"[{tag}] {WORDS['sources'][tag]}" for tag in used)
        copied = any(not tag.startswith("CO-RFT") for tag in used)
        return caption("cited", sources=sources, second_hand=caption("second_hand") if copied else "")


def picture(name: str, alt: str, folder: Path, here: str) -> str:
    """A figure that leads to its vector version; empty if benchmark/plots.py hasn't drawn it."""
    if not (folder / f"{name}.svg").exists():
        return ""
    return f"[![{alt}]({here}/{name}.png)]({here}/{name}.svg)"
