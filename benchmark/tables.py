"""Writes the tables of the documentation from benchmark/results/runs.csv, beside the papers' numbers (papers.csv).

    python benchmark/tables.py            # rewrite the blocks between <!-- begin: NAME --> and <!-- end: NAME -->
    python benchmark/tables.py --check    # exit code 1 if a page is out of date

NAME is a command file (its rows, bars and commands), or one of the comparisons of docs/results.md: results-success,
results-steps, results-execution, results-corft, results-figures. A block goes wherever its markers stand in README.md or
docs/*.md; its words are in benchmark/templates. Running it twice changes nothing. Draw the figures first (plots.py).
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import cells, stats  # noqa: E402
from benchmark.cells import WORDS, Papers, Runs, caption, fill, interval, percent, shown, signed, table  # noqa: E402
from benchmark.collect import RESULTS, mixed, read_results  # noqa: E402
from benchmark.rows import (  # noqa: E402  # noqa: E402
    EARLIER,
    ROOT,
    CommandFile,
    Row,
    UserError,
    all_commands,
    bars,
    command_line,
    flags_of,
    read_csv,
)

MADE = "<!-- made by benchmark/tables.py from benchmark/results/runs.csv: edits here are lost -->"


@dataclass
class Book:
    """All that the tables are made from, and the page that they go into."""

    files: dict[str, CommandFile]
    runs: dict[tuple[str, int], stats.Lines]
    earlier: dict[str, str]  # a row's command before its script had a table of defaults per task
    root: Path
    page: Path
    papers: Papers

    def of(self, row: Row) -> Runs:
        return {seed: run for (name, seed), run in sorted(self.runs.items()) if name == row.name}

    def made_by(self, rows: list[Row]) -> str:
        return cells.made_by([line for row in rows for run in self.of(row).values() for line in run])

    def picture(self, name: str, alt: str) -> str:
        folder = self.root / "docs" / "figures"
        return cells.picture(name, alt, folder, os.path.relpath(folder, self.page.parent))

    def notes(self, rows: list[Row]) -> str:
        """What a reader must know about how the runs of a table were made."""
        notes = []
        for row in rows:
            own = self.of(row)
            notes += [f"{row.name}, seed {seed}: {run[0]['notes']}." for seed, run in own.items() if run[0]["notes"]]
            if differing := mixed(list(own.values())):
                notes.append(f"{row.name}: its runs differ in {differing}.")
            known = {row.command, self.earlier.get(row.name)}
            others = sorted({run[0]["command"] for run in own.values()} - known)
            notes += [caption("another_command", row=row.name, command=command) for command in others]
        return "\n\n".join(f"Note: {note}" for note in notes)


# ---- what rows must reach ----
def measure(name: str, row: Row, own: Runs) -> float | None:
    """What a bar is about, in its unit; rates as fractions."""
    if name == "success":
        return cells.mean_of(own, cells.final("success_once"))
    if name == "sft":
        found = [line["success_once"] for line in cells.cloned(row, own)]
        return float(np.mean(found)) if found else None
    if name == "drop":
        return max(cells.values_of(own, stats.largest_drop).values(), default=None)
    if name == "minutes":
        return max(cells.values_of(own, cells.final("seconds")).values()) / 60
    mine = cells.mean_of(own, cells.final_steps)
    return mine and mine / cells.mean_of(own, cells.final("demo_steps_to_success"))


def judge(name: str, value: float, row: Row, own: Runs) -> tuple[str, bool]:
    """What was measured for a bar, as text, and whether it is met."""
    if name == "above_sft":
        before = stats.pooled(cells.cloned(row, own))
        after = stats.pooled([stats.result(run) for run in own.values()])
        return f"{interval(before)} to {interval(after)}", before is not None and after[1] > before[2]
    got = measure(name, row, own)
    if got is None:
        return "–", False
    met = got >= value - 1e-9 if name in ("success", "sft") else got <= value + 1e-5
    units = {"drop": "points", "minutes": "minutes"}
    return f"{f'{got:.1f}' if name == 'minutes' else percent(got)} {units.get(name, '%')}", met


def bar_rows(row: Row, own: Runs, wanted: int) -> list[list[str]]:
    """[task, method, bar, measured, verdict] for each bar of a row. Raises: UserError."""
    made = []
    for name, value in bars().get(row.name, {}).items():
        if name not in WORDS["bars"]:
            raise UserError(f"bars.csv: {row.name} has an unknown bar, {name}")
        steps = flags_of(row.script, *row.alone()).get("online_steps") if name == "success" else None
        text = WORDS["bars"][name].format(
            value=f"{value:g}" if name == "minutes" else percent(value),
            within=f" within {steps:,} online env steps" if steps else "",
            part="stages 1 to 3" if row.flag("--sft-checkpoint") else "whole run",
        )
        measured = "–"
        verdict = "not run"
        if own:
            measured, met = judge(name, value, row, own)
            verdict = ("met" if met else "**not met**") + cells.missing(len(own), wanted)
        made.append([row.env_id, row.label, text, measured, verdict])
    return made


# ---- the table of a command file ----
def result_row(row: Row, own: Runs, wanted: int, papers: Papers) -> dict[str, str]:
    """A row of a command file's table, by column."""
    return {
        "Task": row.env_id,
        "Method": row.label,
        "Success, % (95 % interval)": cells.success(own, wanted),
        "Per seed, %": cells.per_seed(own, cells.final("success_once")),
        "At the time limit, %": shown(cells.mean_of(own, cells.final("success_at_end"))),
        "After SFT, % (95 % interval)": interval(stats.pooled(cells.cloned(row, own))),
        "At hand-over, %": cells.per_seed(own, stats.handover),
        "Largest drop, points": cells.per_seed(own, stats.largest_drop),
        "Steps to success (demonstrations')": cells.steps_cell(own),
        "Online env steps at 80 %": cells.per_seed(own, stats.steps_at_target, cells.reached),
        "Minutes": cells.per_seed(own, cells.final("seconds"), lambda seconds: f"{seconds / 60:.0f}"),
        "Paper: success, %": papers.value(row.paper, row.env_id, "success_percent"),
        "Paper: env steps at 80 %": papers.value(row.paper, row.env_id, "steps_at_80"),
    }


def aggregate(file: CommandFile, book: Book) -> str:
    """Interquartile mean over all tasks, of the methods that have all their seeds there: others can't be compared."""
    tasks = list(dict.fromkeys(row.env_id for row in file.rows))
    scores: dict[str, dict[str, list[float]]] = {}
    for row in file.rows:
        found = list(cells.values_of(book.of(row), cells.final("success_once")).values())
        if len(found) == len(file.seeds(row)):
            scores.setdefault(row.label, {})[row.env_id] = found
    body = []
    for label, by_task in scores.items():
        if len(by_task) == len(tasks) > 1:
            found = list(by_task.values())
            measured = stats.bootstrap_iqm(found)
            one_seed = f"{percent(measured[0])} (one seed)"
            text = interval(measured) if min(map(len, found)) > 1 else one_seed
            body.append([label, text, str(sum(map(len, found)))])
    if not body:
        return ""
    return fill("aggregate", tasks=", ".join(tasks), table=table(["Method", "Success, % (95 % interval)", "Runs"], body))


def file_block(book: Book, file: CommandFile) -> str:
    rows = list(file.rows)
    results = [result_row(row, book.of(row), len(file.seeds(row)), book.papers) for row in rows]
    judged = [bar for row in rows for bar in bar_rows(row, book.of(row), len(file.seeds(row)))]
    online = any(stats.handover(run) is not None for row in rows for run in book.of(row).values())
    return fill(
        "file",
        table=table(list(results[0]), [list(result.values()) for result in results]),
        setting=cells.setting(rows),
        few=cells.FEW,
        online=caption("online") if online else "",
        made_by=book.made_by(rows),
        cited=book.papers.cite(),
        notes=book.notes(rows),
        bars=table(["Task", "Method", "Bar", "Measured", "Verdict"], judged) if judged else "",
        aggregate=aggregate(file, book),
        picture=book.picture(file.name, caption("curves", title=file.title)),
        name=file.name,
        count=len(file.runs),
        seeds=", ".join(map(str, sorted({seed for _, seed in file.runs}))),
    )


# ---- the comparisons of docs/results.md ----
def success_block(book: Book) -> str:
    """FORCE's Table 1: success by method and task."""
    file = book.files["main"]
    theirs = book.papers.grid("FORCE T1", "success_percent")
    tasks = dict.fromkeys([row.env_id for row in file.rows] + [task for row in theirs.values() for task in row])
    body = {label: ["–"] * len(tasks) + ["–"] for label in dict.fromkeys(row.label for row in file.rows)}
    for row in file.rows:
        body[row.label][list(tasks).index(row.env_id)] = cells.success(book.of(row), len(file.seeds(row)))
    for method, by_task in theirs.items():
        numbers = [f"*{by_task[task]:g}*" if task in by_task else "–" for task in tasks]
        body[f"*{method}* [FORCE T1]"] = [*numbers, f"*{cells.average(by_task)}*"]
    return fill(
        "results-success",
        table=table(["Success, %", *tasks, "Mean of theirs"], [[label, *row] for label, row in body.items()]),
        setting=cells.setting(list(file.rows)),
        made_by=book.made_by(list(file.rows)),
        cited=book.papers.cite(),
        notes=book.notes(list(file.rows)),
        aggregate=aggregate(file, book),
    )


def steps_row(row: Row, own: Runs, wanted: int, horizon: float) -> list[str]:
    """Per seed, runs that got there, median, mean within the horizon."""
    times = list(cells.values_of(own, stats.steps_at_target).values())
    if not times:
        return ["not run", "–", "–", "–"]
    missing = cells.missing(len(own), wanted)
    median = stats.median_time(times)
    later = f"more than {max(steps for steps, _ in times):.0f}"
    return [
        cells.per_seed(own, stats.steps_at_target, cells.reached) + missing,
        f"{sum(there for _, there in times)} of {len(times)}",
        "–" if missing else shown(median, "{:.0f}".format).replace("–", later),
        f"{stats.restricted_mean(times, horizon):.0f} of {horizon:.0f}",
    ]


def steps_block(book: Book) -> str:
    """FORCE's Table 3: control steps at 80 %."""
    known = {row: len(book.files[name].seeds(row)) for name in ("main", "force-ablation") for row in book.files[name].rows}
    rows = [row for row in known if row.script in ("force_octo.py", "conrft.py") and row.flag("--online-steps") != "0"]
    body = []
    means: dict[str, dict[str, float]] = {"FORCE": {}, "FORCE, no warm-up": {}}  # steps within the horizon, by task
    for task in dict.fromkeys(row.env_id for row in rows):
        mine = {row: book.of(row) for row in rows if row.env_id == task}
        followed = [stats.curve(run)[0] for own in mine.values() for run in own.values()]
        horizon = min((steps[-1] for steps in followed if len(steps) > 1), default=0.0)
        for row, own in mine.items():
            theirs = book.papers.value(row.paper, task, "steps_at_80")
            body.append([task, row.label, *steps_row(row, own, known[row], horizon), theirs])
            times = list(cells.values_of(own, stats.steps_at_target).values())
            if times and row.label in means:
                means[row.label][task] = stats.restricted_mean(times, horizon)
    warm = {row.env_id: book.of(row) for row in rows if row.label == "FORCE"}
    spent = {task: cells.mean_of(own, stats.before_handover) for task, own in warm.items()}
    header = ["Task", "Method", "Per seed", "Runs that got there", "Median", "Mean within the common budget", "Theirs"]
    return fill(
        "results-steps",
        table=table(header, body),
        setting=cells.setting(rows),
        reduction=reduction(*means.values(), spent, book.papers),
        cited=book.papers.cite(),
    )


def reduction(warm: dict[str, float], cold: dict[str, float], spent: dict[str, float | None], papers: Papers) -> str:
    """What warm-up saves: mean steps at 80 % with and without it, and those of its own rollouts, by task."""
    claim = papers.value(("FORCE",), "all", "steps_at_80_reduction_percent", " %")
    both = sorted(warm.keys() & cold.keys())
    tasks = ", ".join(both)
    after = sum(warm[task] for task in both)
    before = sum(cold[task] for task in both)
    if not before:
        why = caption("all_there", tasks=tasks) if both else caption("none_there")
        return caption("no_reduction", why=why, claim=claim)
    return caption(
        "reduction",
        tasks=tasks,
        change=percent(after / before - 1),
        before=f"{before:.0f}",
        after=f"{after:.0f}",
        spent=f"{sum(spent[task] for task in both):.0f}",
        claim=claim,
    )


def paired_table(papers: Papers, source: str) -> str:
    """A paper's success and steps, by task and method."""
    rates = papers.grid(source, "success_percent")
    lengths = papers.grid(source, "steps_to_success")
    body = []
    for task in next(iter(rates.values())):
        body.append([task, *(f"*{rates[method][task]:g} / {lengths[method][task]:g}*" for method in rates)])
    means = [f"*{cells.average(rates[method])} / {cells.average(lengths[method])}*" for method in rates]
    return table(["Task", *rates], [*body, ["Mean", *means]])


def execution_block(book: Book) -> str:
    """FORCE's Table 2 and ConRFT's Table I: success and steps to success."""
    main = book.files["main"]
    known = {row: len(file.seeds(row)) for file in (main, *book.files.values()) for row in file.rows}
    rows = [row for row in known if row in main.rows or "HIL-ConRFT" in row.paper]
    tasks = list(dict.fromkeys(row.env_id for row in rows))
    body = []
    for row in sorted(rows, key=lambda row: tasks.index(row.env_id)):
        own = book.of(row)
        sft = cells.cloned(row, own)
        before = [length for length in map(cells.steps, sft) if length]
        demos = cells.mean_of(own, cells.final("demo_steps_to_success"))
        after = cells.mean_of(own, cells.final_steps)
        lengths = [shown(length, "{:.1f}".format) for length in (demos, np.mean(before) if before else None, after)]
        shorter = f"{percent(1 - after / demos)} %" if after and demos else "–"
        success = cells.success(own, known[row])
        body.append([row.env_id, row.label, interval(stats.pooled(sft)), success, *lengths, shorter])
    header = ["Task", "Method", "Success after SFT, %", "Success, %", "Demonstrations' steps", "Steps after SFT", "Steps"]
    return fill(
        "results-execution",
        table=table([*header, "Shorter than demonstrations by"], body),
        setting=cells.setting(rows),
        few=cells.FEW,
        force=paired_table(book.papers, "FORCE T2"),
        conrft=paired_table(book.papers, "ConRFT T1"),
        cited=book.papers.cite(),
    )


def corft_row(row: Row, own: Runs, wanted: int) -> list[str]:
    """Cloned, CO-RFT and gain in the same places and elsewhere, and how much shorter the cycle is."""
    inside = [(stats.after_sft(run), stats.result(run)) for run in own.values() if stats.after_sft(run)]
    outside = [stats.elsewhere(run) for run in own.values() if len(stats.elsewhere(run)) > 1]
    made = ["one place" if "--spawn" in row.command else "random"]
    for pairs in (inside, outside):
        before = stats.pooled([pair[0] for pair in pairs])
        after = stats.pooled([pair[-1] for pair in pairs])
        if not pairs:
            made += ["–", "not run", "–"]
            continue
        gain, low, high = map(signed, stats.difference(before, after))
        made += [interval(before), interval(after) + cells.missing(len(pairs), wanted), f"{gain} ({low} to {high})"]
    lengths = [(cells.steps(first), cells.steps(last)) for first, last in inside]
    shorter = [1 - last / first for first, last in lengths if first and last]
    if not shorter:
        return [*made, "–"]
    return [*made, f"{percent(np.mean(shorter))} ({percent(min(shorter))} to {percent(max(shorter))})"]


def corft_block(book: Book) -> str:
    """CO-RFT's Table 1: in and out of distribution, gain over cloning, cycle time."""
    file = book.files["corft-state"]
    rows = [row for row in file.rows if "--eval-elsewhere" in row.command]
    kinds = ("Cloned, %", "CO-RFT, %", "Gain, points")
    header = ["Task", "Start", *(f"{kind}, {where}" for where in ("same places", "elsewhere") for kind in kinds)]
    theirs = []
    for start in ("random", "fixed"):
        inside = book.papers.grid("CO-RFT T1", f"{start}_ind_success_percent")["CO-RFT"]
        outside = book.papers.grid("CO-RFT T1", f"{start}_ood_success_percent")["CO-RFT"]
        theirs += [[task, start, f"*{inside[task]:g}*", f"*{outside[task]:g}*"] for task in inside]
        theirs.append(["Mean", start, f"*{cells.average(inside)}*", f"*{cells.average(outside)}*"])
    return fill(
        "results-corft",
        table=table(
            [*header, "Cycle time shorter by, % (seeds)"],
            [[row.env_id, *corft_row(row, book.of(row), len(file.seeds(row)))] for row in rows],
        ),
        setting=cells.setting(list(file.rows)),
        theirs=table(["Task", "Start", "Same places", "Elsewhere"], theirs),
        inside=book.papers.value(("CO-RFT",), "all", "ind_gain_points", " points"),
        outside=book.papers.value(("CO-RFT",), "all", "ood_gain_points", " points"),
        faster=book.papers.value(("CO-RFT",), "all", "cycle_time_reduction_percent", " %"),
        cited=book.papers.cite(),
    )


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


def updated(book: Book) -> str:
    """The page's text with all its blocks made anew. Raises: UserError."""
    text = book.page.read_text()
    for name in dict.fromkeys(re.findall(r"<!-- (?:begin|end): ([\w-]+) -->", text)):
        if name not in book.files | COMPARISONS:
            raise UserError(f"{book.page.name}: there is nothing called {name}")
        book.papers.used = set()
        content = file_block(book, book.files[name]) if name in book.files else COMPARISONS[name](book)
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
    runs = stats.by_run(read_results(results))
    earlier = {line["row"]: line["command"] for line in read_csv(EARLIER, ("row", "command"))}
    pages = [page for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if page.exists()]
    made = {page: updated(Book(files, runs, earlier, root, page, Papers())) for page in pages}
    stale = [page for page, text in made.items() if text != page.read_text()]
    for page in stale:
        if not check:
            page.write_text(made[page])
    names = ", ".join(str(page.relative_to(root)) for page in stale) or "nothing"
    print(f"pages {'out of date' if check else 'rewritten'}: {names}")
    return int(check and bool(stale))


if __name__ == "__main__":
    command_line(main)
