"""Cells of the tables, and the words around them: numbers, runs and the papers' numbers as text.

"–" stands for what isn't known. Words, and which cells a table has, are in benchmark/templates.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmark import stats
from benchmark.collect import mixed
from benchmark.rows import ROOT, TEMPLATES, Row, read_csv

PAPERS = ROOT / "benchmark" / "papers.csv"
WORDS = tomllib.loads((TEMPLATES / "words.toml").read_text())
FEW = 10  # successful episodes that a mean number of steps needs


# ---- numbers ----
def percent(rate: float) -> str:
    return f"{100 * rate:.1f}".removesuffix(".0")


def signed(rate: float) -> str:
    return f"+{percent(rate)}" if rate > 0 else percent(rate)


def shown(value: float | None, form: Callable[[float], str] = percent) -> str:
    return "–" if value is None else form(value)


def interval(measured: stats.Measured | None) -> str:
    """Mean and interval in percent."""
    return "{} ({}–{})".format(*map(percent, measured)) if measured else "–"


def gain(before: stats.Measured | None, after: stats.Measured | None) -> str:
    """The difference of two rates, in points, with its interval."""
    if not before or not after:
        return "–"
    return "{} ({} to {})".format(*map(signed, stats.difference(before, after)))


def mean(values: dict) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def per_seed(values: dict[int, float], form: Callable[..., str] = percent) -> str:
    """Each seed's value: "1: x, 2: y"."""
    return ", ".join(f"{seed}: {form(value)}" for seed, value in values.items()) or "–"


def reached(time: tuple[float, bool]) -> str:
    """Steps at 80 %; a run that isn't there is shown with how far it was followed."""
    steps, there = time
    if not there:
        return f"more than {steps:.0f}"
    return f"{steps:.0f}" if steps else "0 (at hand-over)"


def steps_to_success(evaluations: dict[int, dict]) -> dict[int, float]:
    """Mean steps to success of each seed, but where fewer than FEW episodes succeeded."""
    found = {}
    for seed, line in evaluations.items():
        if line["success_once"] * line["num_episodes"] > FEW - 0.5:
            found[seed] = line["episode_len"]
    return found


# ---- a row of a table ----
@dataclass
class Entry:
    """A row and its runs by seed, of `wanted` seeds."""

    row: Row
    runs: dict[int, stats.Lines]
    wanted: int
    horizon: float = 0.0  # the shortest online budget on its task, in control steps

    def each(self, value: Callable) -> dict:
        """value(run) by seed, without the runs that have none."""
        found = {seed: value(run) for seed, run in self.runs.items()}
        return {seed: x for seed, x in found.items() if x is not None}

    def final(self, column: str) -> dict:
        """A column of the runs' results, by seed."""
        return self.each(lambda run: stats.result(run)[column])

    def rate(self, evaluation: Callable) -> stats.Measured | None:
        """Success over the seeds' evaluations: evaluation(run), or None."""
        return stats.pooled(list(self.each(evaluation).values()))

    def complete(self, text: str) -> str:
        """The text, and how many seeds there are if some aren't."""
        missing = f", {len(self.runs)} of {self.wanted} seeds" if len(self.runs) < self.wanted else ""
        return text + missing if self.runs else "not run"

    @property
    def cloned(self) -> Callable:
        """What finds the evaluation after supervised fine-tuning; nothing if a row throws the cloned head away."""
        return (lambda run: None) if "--fresh-head" in self.row.command else stats.after_sft

    @property
    def steps(self) -> float | None:
        return mean(steps_to_success(self.each(stats.result)))

    @property
    def demo_steps(self) -> float | None:
        return mean(self.final("demo_steps_to_success"))

    @property
    def times(self) -> list[tuple[float, bool]]:
        return list(self.each(stats.steps_at_target).values())

    def paper(self, metric: str) -> str:
        return paper(self.row.paper, self.row.env_id, metric)


def steps_cell(entry: Entry) -> str:
    """Mean steps to success and, in brackets, the demonstrations'."""
    demos = f" ({entry.demo_steps:.1f})" if entry.demo_steps else ""
    return f"{entry.steps:.1f}{demos}" if entry.steps else "–"


def median_cell(entry: Entry) -> str:
    if len(entry.runs) < entry.wanted or not entry.times:
        return "–"
    median = stats.median_time(entry.times)
    return f"more than {max(entry.times)[0]:.0f}" if median is None else f"{median:.0f}"


def cycle_cell(entry: Entry) -> str:
    """How much shorter an episode is than the cloned policy's: mean over seeds, least and most."""
    before = steps_to_success(entry.each(entry.cloned))
    after = steps_to_success(entry.each(stats.result))
    saved = [1 - after[seed] / before[seed] for seed in before.keys() & after.keys()]
    return f"{percent(np.mean(saved))} ({percent(min(saved))} to {percent(max(saved))})" if saved else "–"


CELLS: dict[str, Callable[[Entry], str]] = {
    "task": lambda entry: entry.row.env_id,
    "method": lambda entry: entry.row.label,
    "success": lambda entry: entry.complete(interval(entry.rate(stats.result))),
    "successes": lambda entry: per_seed(entry.final("success_once")),
    "at_limit": lambda entry: shown(mean(entry.final("success_at_end"))),
    "after_sft": lambda entry: interval(entry.rate(entry.cloned)),
    "handover": lambda entry: per_seed(entry.each(stats.handover)),
    "drop": lambda entry: per_seed(entry.each(stats.largest_drop)),
    "steps_and_demos": steps_cell,
    "at_target": lambda entry: per_seed(entry.each(stats.steps_at_target), reached),
    "minutes": lambda entry: per_seed(entry.final("seconds"), lambda seconds: f"{seconds / 60:.0f}"),
    "their_success": lambda entry: entry.paper("success_percent"),
    "their_steps_at_target": lambda entry: entry.paper("steps_at_80"),
    "all_at_target": lambda entry: entry.complete(CELLS["at_target"](entry)) if entry.times else "not run",
    "there": lambda entry: f"{sum(there for _, there in entry.times)} of {len(entry.times)}" if entry.times else "–",
    "median": median_cell,
    "restricted": lambda entry: (
        f"{stats.restricted_mean(entry.times, entry.horizon):.0f} of {entry.horizon:.0f}" if entry.times else "–"
    ),
    "demo_steps": lambda entry: shown(entry.demo_steps, "{:.1f}".format),
    "sft_steps": lambda entry: shown(mean(steps_to_success(entry.each(entry.cloned))), "{:.1f}".format),
    "steps": lambda entry: shown(entry.steps, "{:.1f}".format),
    "shorter": lambda entry: f"{percent(1 - entry.steps / entry.demo_steps)} %" if entry.steps else "–",
    "start": lambda entry: "one place" if "--spawn" in entry.row.command else "random",
    "gain": lambda entry: gain(entry.rate(entry.cloned), entry.rate(stats.result)),
    "sft_elsewhere": lambda entry: interval(entry.rate(stats.first_elsewhere)),
    "elsewhere": lambda entry: entry.complete(interval(entry.rate(stats.last_elsewhere))),
    "gain_elsewhere": lambda entry: gain(entry.rate(stats.first_elsewhere), entry.rate(stats.last_elsewhere)),
    "cycle": cycle_cell,
}


# ---- tables and words ----
def table(header: list[str], body: list[list[str]]) -> str:
    """Markdown, without the columns in which nothing stands; empty without rows."""
    if not body:
        return ""
    first, *others = zip(header, *body)
    kept = [first] + [column for column in others if set(column[1:]) != {"–"}]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(*kept)]
    lines.insert(1, "| --- " * len(kept) + "|")
    return "\n".join(lines)


def entry_table(name: str, entries: list[Entry]) -> str:
    """The table that words.toml declares under this name."""
    columns = WORDS["tables"][name]
    return table(list(columns), [[CELLS[cell](entry) for cell in columns.values()] for entry in entries])


@cache
def papers() -> list[dict[str, str]]:
    """The lines of papers.csv. Raises: UserError."""
    return read_csv(PAPERS, ("source", "method", "task", "metric", "value"))


def paper(methods: tuple[str, ...], task: str, metric: str, unit: str = "") -> str:
    """The papers' numbers for a method, each with its source."""
    wanted = [line for line in papers() if (line["task"], line["metric"]) == (task, metric)]
    found = [f"*{line['value']}*{unit} [{line['source']}]" for line in wanted if line["method"] in methods]
    return ", ".join(found) or "–"


def caption(name: str, /, **parts) -> str:
    return WORDS["captions"][name].format(**parts)


def fill(template: str, entries: list[Entry] = (), **parts) -> str:
    """The template with its parts, and what is to be said of entries and sources; without paragraphs that are empty."""
    text = (TEMPLATES / f"{template}.md").read_text()
    tags = [tag for tag in sorted(WORDS["sources"]) if f"[{tag}]" in " ".join([text, *map(str, parts.values())])]
    sources = "; ".join(f"[{tag}] {WORDS['sources'][tag]}" for tag in tags)
    cited = caption("cited", sources=sources) if tags else ""
    parts |= {"cited": cited, "made_by": made_by(entries), "notes": notes(entries), "few": FEW}
    paragraphs = [re.sub(r"\n(?!\|)", " ", paragraph).format(**parts) for paragraph in text.split("\n\n")]
    return "\n\n".join(paragraph.strip() for paragraph in paragraphs if paragraph.strip())


def made_by(entries: list[Entry]) -> str:
    """Models, observations, episodes, commits, versions and device of our runs."""
    columns = ("backbone", "obs_mode", "num_episodes", "git_commit", "versions", "device")
    values = {column: {str(x) for entry in entries for x in entry.final(column).values()} for column in columns}
    values["git_commit"] = {commit[:12] for commit in values["git_commit"]}
    parts = {column: " | ".join(sorted(found)) for column, found in values.items()}
    return caption("made_by", **parts) if parts["git_commit"] else ""


def notes(entries: list[Entry]) -> str:
    """What a reader must know about how the runs were made."""
    found = []
    for entry in entries:
        name = entry.row.name
        found += [f"{name}, seed {seed}: {note}." for seed, note in entry.final("notes").items() if note]
        if differing := mixed(list(entry.runs.values())):
            found.append(f"{name}: its runs differ in {differing}.")
        others = set(entry.final("command").values()) - {entry.row.command, entry.row.earlier}
        found += [caption("another_command", row=name, command=command) for command in sorted(others)]
    return "\n\n".join(f"Note: {note}" for note in found)
