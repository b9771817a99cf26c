"""Writes the tables of the documentation from benchmark/results/runs.csv, beside the papers' numbers (papers.csv).

    python benchmark/tables.py            # rewrite the blocks between <!-- begin: NAME --> and <!-- end: NAME -->
    python benchmark/tables.py --check    # exit code 1 if a page is out of date

NAME is a command file (its rows, bars and commands), or one of the comparisons of docs/results.md (see COMPARISONS). A
block goes wherever its markers stand in README.md or docs/*.md; its words are in benchmark/templates. Running it twice
changes nothing. Draw the figures first (plots.py).
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import cells, stats  # noqa: E402
from benchmark.cells import CELLS, WORDS, Entry, caption, entry_table, fill, interval, mean, percent, table  # noqa: E402
from benchmark.collect import read_results  # noqa: E402
from benchmark.rows import ORIGIN, RESULTS, ROOT, CommandFile, Row, UserError, all_commands, command_line, flags_of  # noqa: E402

MADE = "<!-- made by benchmark/tables.py from benchmark/results/runs.csv: edits here are lost -->"


@dataclass
class Book:
    """All that the tables are made from."""

    files: dict[str, CommandFile]
    runs: stats.Runs
    root: Path  # holds README.md and docs

    def entries(self, rows: list[Row]) -> list[Entry]:
        seeds = {row: len(file.seeds(row)) for file in self.files.values() for row in file.rows}
        return [Entry(row, self.of(row), seeds[row]) for row in rows]

    def of(self, row: Row) -> dict[int, stats.Lines]:
        """A row's runs by seed."""
        return {seed: run for (name, seed), run in sorted(self.runs.items()) if name == row.name}

    def picture(self, name: str, alt: str) -> str:
        """A figure; empty if benchmark/plots.py hasn't drawn it."""
        drawn = (self.root / "docs" / "figures" / f"{name}.png").exists()
        return f"![{alt}](figures/{name}.png)" if drawn else ""


# ---- what rows must reach ----
@dataclass
class Bar:
    """A bound on what `measure` gives; `show` writes that down."""

    measure: Callable[[Entry], float | None]
    at_most: bool = False
    show: Callable[[float], str] = lambda rate: f"{percent(rate)} %"


def gap(entry: Entry) -> float | None:
    """Between the intervals after SFT and at the end; below 0 if they overlap."""
    before = entry.rate(entry.cloned)
    return before and entry.rate(stats.result)[1] - before[2]


BARS = {
    "success": Bar(lambda entry: mean(entry.final("success_once"))),
    "sft": Bar(lambda entry: (entry.rate(entry.cloned) or [None])[0]),
    "above_sft": Bar(gap),
    "steps_ratio": Bar(lambda entry: entry.steps and entry.steps / entry.demo_steps, at_most=True),
    "drop": Bar(
        lambda entry: max(entry.each(stats.largest_drop).values(), default=None),
        at_most=True,
        show=lambda rate: f"{percent(rate)} points",
    ),
    "minutes": Bar(lambda entry: max(entry.final("seconds").values()) / 60, at_most=True, show="{:.1f} minutes".format),
}


def budget(entry: Entry) -> str:
    """Online control steps of the measured runs, or else of the row's command; empty if it has none."""
    recorded = re.search(r"\bonline_steps=(\d+)", " ".join(entry.final("settings").values()))
    words = entry.row.words(1, "runs")[1:]
    steps = int(recorded[1]) if recorded else flags_of(*words).get("online_steps")
    return f" within {steps:,} online env steps" if steps else ""


def judged(entry: Entry, name: str, value: float) -> tuple[str, str]:
    """What was measured for a bar, and the verdict."""
    measured = BARS[name].measure(entry) if entry.runs else None
    if measured is None:
        return "–", entry.complete("**not met**")
    text = BARS[name].show(measured)
    if name == "above_sft":
        text = f"{CELLS['after_sft'](entry)} to {interval(entry.rate(stats.result))}"
    met = measured <= value + 1e-5 if BARS[name].at_most else measured >= value - 1e-5
    return text, entry.complete("met" if met else "**not met**")


def bar_table(entries: list[Entry]) -> str:
    body = []
    for entry in entries:
        part = "stages 1 to 3" if ORIGIN in entry.row.command else "whole run"
        for name, value in entry.row.bars.items():
            within = budget(entry) if name == "success" else ""
            about = {"rate": percent(value), "value": f"{value:g}", "within": within, "part": part}
            text = WORDS["bars"][name].format(**about)
            body.append([entry.row.env_id, entry.row.label, text, *judged(entry, name, value)])
    return table(["Task", "Method", "Bar", "Measured", "Verdict"], body)


# ---- the tables of a command file ----
def aggregate(entries: list[Entry]) -> str:
    """Interquartile mean over all tasks, of the methods that have all their seeds there: others can't be compared."""
    tasks = dict.fromkeys(entry.row.env_id for entry in entries)
    scores: dict[str, list[list[float]]] = {}  # of a method: for each task, success of each seed
    for entry in entries:
        if len(entry.runs) == entry.wanted:
            found = scores.setdefault(entry.row.label, [])
            found.append(list(entry.final("success_once").values()))
    body = []
    for label, found in scores.items():
        if len(found) == len(tasks) > 1:
            measured = stats.bootstrap_iqm(found)
            single = f"{percent(measured[0])} (one seed)"
            text = single if len(found[0]) == 1 else interval(measured)
            body.append([label, text, str(sum(map(len, found)))])
    made = table(["Method", "Success, % (95 % interval)", "Runs"], body)
    return made and fill("aggregate", tasks=", ".join(tasks), table=made)


def file_block(book: Book, file: CommandFile) -> str:
    entries = book.entries(file.rows)
    return fill(
        "file",
        entries,
        table=entry_table("file", entries),
        online=caption("online") if any(entry.each(stats.handover) for entry in entries) else "",
        bars=bar_table(entries),
        aggregate=aggregate(entries),
        picture=book.picture(file.name, caption("curves", title=file.title)),
        name=file.name,
        count=len(file.runs),
        seeds=", ".join(map(str, sorted({seed for _, seed in file.runs}))),
    )


# ---- the comparisons of docs/results.md ----
def by_task(entries: list[Entry]) -> list[Entry]:
    tasks = [entry.row.env_id for entry in entries]
    return sorted(entries, key=lambda entry: tasks.index(entry.row.env_id))


def success_block(book: Book) -> str:
    """FORCE's Table 1: success by method and task."""
    entries = book.entries(book.files["main"].rows)
    body: dict[str, dict[str, str]] = {}  # method -> task -> cell
    for entry in entries:
        body.setdefault(entry.row.label, {})[entry.row.env_id] = CELLS["success"](entry)
    theirs: dict[str, list[float]] = {}
    for line in cells.papers():
        if line["source"] == "FORCE T1":
            method = f"*{line['method']}* [FORCE T1]"
            theirs.setdefault(method, []).append(float(line["value"]))
            means = {"Mean of theirs": f"*{np.mean(theirs[method]) + 1e-9:.1f}*"}  # halves rounded up as in the paper
            body[method] = body.get(method, {}) | {line["task"]: f"*{line['value']}*"} | means
    columns = dict.fromkeys(column for row in body.values() for column in sorted(row, key="Mean of theirs".__eq__))
    made = [[label, *(row.get(column, "–") for column in columns)] for label, row in body.items()]
    return fill("results-success", entries, table=table(["Success, %", *columns], made), aggregate=aggregate(entries))


def steps_block(book: Book) -> str:
    """FORCE's Table 3: control steps at 80 %."""
    rows = dict.fromkeys(row for name in ("main", "force-ablation") for row in book.files[name].rows)
    online = [row for row in rows if row.script in ("force_octo.py", "conrft.py") and row.flag("--online-steps") != "0"]
    entries = by_task(book.entries(online))
    ends: dict[str, list[float]] = {}
    for entry in entries:
        steps = entry.each(lambda run: stats.curve(run)[0])
        ends.setdefault(entry.row.env_id, []).extend(each[-1] for each in steps.values() if len(each) > 1)
    for entry in entries:
        entry.horizon = min(ends[entry.row.env_id], default=0.0)
    return fill("results-steps", entries, table=entry_table("steps", entries), reduction=reduction(entries))


def reduction(entries: list[Entry]) -> str:
    """What warm-up saves: mean steps at 80 % with and without it, and steps spent on it; empty if that isn't known."""
    known = {(entry.row.label, entry.row.env_id): entry for entry in entries if entry.times}
    pairs = []
    for (label, task), warm in sorted(known.items()):
        cold = known.get(("FORCE, no warm-up", task))
        if label == "FORCE" and cold:
            pairs.append((warm, cold))
    after = sum(stats.restricted_mean(warm.times, warm.horizon) for warm, _ in pairs)
    before = sum(stats.restricted_mean(cold.times, cold.horizon) for _, cold in pairs)
    if not before:
        return ""
    return caption(
        "reduction",
        tasks=", ".join(warm.row.env_id for warm, _ in pairs),
        change=percent(after / before - 1),
        before=f"{before:.0f}",
        after=f"{after:.0f}",
        spent=f"{sum(mean(warm.each(stats.before_handover)) for warm, _ in pairs):.0f}",
    )


def execution_block(book: Book) -> str:
    """FORCE's Table 2 and ConRFT's Table I: success and steps to success."""
    helped = [row for row in book.files["conrft-state"].rows if row.label == "ConRFT, planner as operator"]
    entries = by_task(book.entries([*book.files["main"].rows, *helped]))
    return fill("results-execution", entries, table=entry_table("execution", entries))


def corft_block(book: Book) -> str:
    """CO-RFT's Table 1: in and out of distribution, gain over cloning, cycle time."""
    rows = [row for row in book.files["corft-state"].rows if "--eval-elsewhere" in row.command]
    entries = book.entries(rows)
    return fill("results-corft", entries, table=entry_table("corft", entries))


def figures_block(book: Book) -> str:
    """The figures over all methods, each with what it shows."""
    pictures = {name: book.picture(name, name) for name in WORDS["figures"]}
    drawn = [f"{image}\n\n{WORDS['figures'][name]}" for name, image in pictures.items() if image]
    return "\n\n".join(drawn) or "Nothing has been run yet."


COMPARISONS = {
    "results-success": success_block,
    "results-steps": steps_block,
    "results-execution": execution_block,
    "results-corft": corft_block,
    "results-figures": figures_block,
}


# ---- pages ----
def replace_block(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`. Raises: UserError unless both are there once, in order."""
    begin = f"<!-- begin: {name} -->"
    end = f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"the markers of {name} must be there once each, {begin} before {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def updated(book: Book, page: Path) -> str:
    """The page's text with all its blocks made anew. Raises: UserError."""
    text = page.read_text()
    for name in dict.fromkeys(re.findall(r"<!-- (?:begin|end): ([\w-]+) -->", text)):
        if name in book.files:
            content = file_block(book, book.files[name])
        elif name in COMPARISONS:
            content = COMPARISONS[name](book)
        else:
            raise UserError(f"{page.name}: there is nothing called {name}")
        text = replace_block(text, name, f"{MADE}\n\n{content}")
    return text


def main(results: Path = RESULTS, root: Path = ROOT, check: bool = False) -> int:
    """Bring the documentation in line with the results.

    Args:
        results: folder of runs.csv.
        root: folder that holds README.md and docs.
        check: change nothing; exit code 1 if a page is out of date.
    """
    files = {file.name: file for file in all_commands()}
    book = Book(files, stats.by_run(read_results(results)), root)
    pages = [page for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if page.exists()]
    made = {page: updated(book, page) for page in pages}
    stale = [page for page, text in made.items() if text != page.read_text()]
    if not check:
        for page in stale:
            page.write_text(made[page])
    names = ", ".join(str(page.relative_to(root)) for page in stale) or "nothing"
    print(f"pages {'out of date' if check else 'rewritten'}: {names}")
    return int(check and bool(stale))


if __name__ == "__main__":
    command_line(main)
