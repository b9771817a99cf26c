"""Writes the tables of the documentation from benchmark/results/runs.csv, beside the papers' numbers (papers.csv).

    python benchmark/tables.py            # rewrite the blocks between <!-- begin: NAME --> and <!-- end: NAME -->
    python benchmark/tables.py --check    # exit code 1 if a page is out of date

NAME is a command file (its rows, bars and commands), or one of the comparisons of docs/results.md: results-success,
results-steps, results-execution, results-corft, results-figures. A block goes wherever its markers stand in README.md or docs/*.md.
Running it twice changes nothing. Figures are benchmark/plots.py's; draw them first.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import stats  # noqa: E402
from benchmark.collect import RESULTS, mixed  # noqa: E402
from benchmark.rows import ROOT, CommandError, CommandFile, Row, all_commands, bars, read_csv  # noqa: E402

PAPERS = ROOT / "benchmark" / "papers.csv"
SOURCES = {  # of papers.csv
    "FORCE T1": "FORCE (arXiv:2606.26006), Table 1, ManiSkill",
    "FORCE T2": "FORCE, Table 2, real robot",
    "FORCE T3": 'FORCE, Table 3, steps at 80 %, undefined there; its column "w/o Pre-Cal & VGPD" may mean "w/o VGPD" alone',
    "FORCE text": "FORCE, abstract",
    "ConRFT T1": "ConRFT (arXiv:2502.05450), Table I, real robot",
    "CO-RFT T1": "CO-RFT (arXiv:2508.02219), Table 1, real robot",
    "CO-RFT text": "CO-RFT, abstract and text",
}
SECOND_HAND = (
    " FORCE's and ConRFT's were copied second-hand and not checked against the published tables: check before citing."
)
THEIRS = " Their setting differs from ours: released weights, camera observations, other demonstrations and evaluation."
FEW = 10  # successful episodes that a mean number of steps needs
Runs = dict[tuple[str, int], stats.Lines]


# ---- cells ----
def percent(rate: float) -> str:
    return f"{100 * rate:.1f}".removesuffix(".0")


def interval(measured: tuple[float, float, float] | None, sign: str = "") -> str:
    """Mean and interval in percent; with sign "+", all three with their sign."""
    if measured is None:
        return "–"
    mean, low, high = (("+" if sign and x > 0 else "") + percent(x) for x in measured)
    return f"{mean} ({low} to {high})" if sign else f"{mean} ({low}–{high})"


def table(header: list[str], body: list[list[str]]) -> str:
    """Markdown, without the columns in which nothing stands."""
    keep = [i for i in range(len(header)) if any(cells[i] != "–" for cells in body) or i == 0]
    shown = [[cells[i] for i in keep] for cells in [header, ["---"] * len(header), *body]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def of_row(row: Row, runs: Runs) -> Runs:
    """The row's runs by seed."""
    return {run: lines for run, lines in sorted(runs.items()) if run[0] == row.name}


def success(own: Runs, wanted: int) -> str:
    """Mean and interval, and how many seeds are missing."""
    if not own:
        return "not run"
    missing = f", {len(own)} of {wanted} seeds" if len(own) < wanted else ""
    return interval(stats.pooled([stats.result(run) for run in own.values()])) + missing


def per_seed(own: Runs, value) -> str:
    """value(run) is a text or None: "1: x, 2: y", or just x if there is one seed."""
    found = {seed: text for (_, seed), run in own.items() if (text := value(run)) is not None}
    return ", ".join(f"{seed}: {text}" for seed, text in found.items()) if found else "–"


def rate(value: float | None) -> str | None:
    return None if value is None else percent(value)


def reached(time: tuple[float, bool] | None) -> str | None:
    """Steps at 80 %; a run that isn't there is shown with how far it was followed."""
    if time is None:
        return None
    return (f"{time[0]:.0f}" if time[0] else "0 (at hand-over)") if time[1] else f"more than {time[0]:.0f}"


def mean_of(own: Runs, value) -> float | None:
    found = [float(x) for run in own.values() if (x := value(run)) not in (None, "")]
    return float(np.mean(found)) if found else None


def steps(evaluation: dict[str, str]) -> float | None:
    """Mean steps to success; None if fewer than FEW episodes succeeded."""
    successes = float(evaluation["success_once"]) * int(evaluation["num_episodes"])
    return float(evaluation["episode_len"]) if successes > FEW - 0.5 else None


def cloned(row: Row, own: Runs) -> list[dict[str, str]]:
    """The evaluations after supervised fine-tuning; none for a row that throws the cloned head away."""
    return [e for run in own.values() if (e := stats.after_sft(run)) and "--fresh-head" not in row.command]


def steps_cell(own: Runs) -> str:
    """Mean steps to success and, in brackets, the demonstrations'."""
    mine = mean_of(own, lambda run: steps(stats.result(run)))
    demos = mean_of(own, lambda run: stats.result(run)["demo_steps_to_success"])
    return "–" if mine is None else f"{mine:.1f}" + (f" ({demos:.1f})" if demos else "")


def average(by_task: dict[str, float]) -> str:
    """Over a paper's tasks, halves rounded up as the papers do."""
    return f"{np.mean(list(by_task.values())) + 1e-9:.1f}"


class Papers:
    """papers.csv, and which of its sources have been used since `cite` was last called."""

    def __init__(self):
        self.lines, self.used = read_csv(PAPERS), set()

    def value(self, methods: tuple[str, ...], task: str, metric: str, unit: str = "") -> str:
        """The papers' numbers for a method, each with its source; "–" if there are none."""
        wanted = [line for line in self.lines if (line["task"], line["metric"]) == (task, metric)]
        found = [line for line in wanted if line["method"] in methods]
        self.used |= {line["source"] for line in found}
        return ", ".join(f"*{line['value']}*{unit} [{line['source']}]" for line in found) or "–"

    def grid(self, source: str, metric: str) -> dict[str, dict[str, float]]:
        """A paper's table: method -> task -> number."""
        self.used.add(source)
        methods: dict[str, dict[str, float]] = {}
        for line in self.lines:
            if (line["source"], line["metric"]) == (source, metric):
                methods.setdefault(line["method"], {})[line["task"]] = float(line["value"])
        return methods

    def cite(self) -> str:
        used, self.used = sorted(self.used), set()
        cited = "; ".join(f"[{tag}] {SOURCES[tag]}" for tag in used)
        second_hand = SECOND_HAND if any(not tag.startswith("CO-RFT") for tag in used) else ""
        return f"Numbers in italics are the papers': {cited}.{second_hand}{THEIRS}" if used else ""


# ---- captions ----
def setting(rows: list[Row]) -> str:
    """Scale and observations of our rows."""
    default = {"force_pi0.py": "pi0-compact"}
    models = list(dict.fromkeys(row.flag("--backbone", default.get(row.script, "octo-compact")) for row in rows))
    scale = " and ".join(dict.fromkeys("compact" if m.endswith("-compact") else "paper" for m in models))
    modes = {"state": "privileged state", "rgb": "camera"}
    seen = " and ".join(dict.fromkeys(modes[row.obs_mode] for row in rows))
    return f"Ours: {scale} scale ({', '.join(models)}), {seen} observations"


def made_by(lines: stats.Lines) -> str:
    """Episodes, commits, versions and device of runs."""
    if not lines:
        return ""
    results = [line for line in lines if line["final"]]
    several = {name: sorted({line[name] for line in results}) for name in ("git_commit", "versions", "device")}
    episodes = " or ".join(sorted({line["num_episodes"] for line in results}, key=int))
    commits = ", ".join(commit[:12] for commit in several["git_commit"])
    versions, device = (" | ".join(several[name]) for name in ("versions", "device"))
    return f"{episodes} fixed evaluation episodes a run; commit {commits}; {versions}; on {device}."


def notes_on(rows: list[Row], runs: Runs) -> list[str]:
    """What a reader must know about how the runs of a table were made."""
    notes = []
    for row in rows:
        own = of_row(row, runs)
        notes += [f"{row.name}, seed {seed}: {run[0]['notes']}." for (_, seed), run in own.items() if run[0]["notes"]]
        notes += [f"{row.name}: its runs differ in {differing}."] if (differing := mixed(list(own.values()))) else []
        others = sorted({run[0]["command"] for run in own.values()} - {row.command})
        notes += [f"{row.name} was measured with another command: `{command}`." for command in others]
    return [f"Note: {note}" for note in notes]


# ---- the table of a command file ----
def bar_rows(row: Row, own: Runs, wanted: int) -> list[list[str]]:
    """[task, method, bar, measured, verdict] for each bar of a row."""
    rows, lines = [], list(own.values())

    def add(bar: str, measured: str, met: bool) -> None:
        part = "" if len(own) >= wanted else f", {len(own)} of {wanted} seeds"
        verdict = ("met" if met else "**not met**") + part if own else "not run"
        rows.append([row.env_id, row.label, bar, measured if own else "–", verdict])

    def mean(value) -> float:
        return float("nan") if (found := mean_of(own, value)) is None else found

    def final(name: str) -> float:
        return mean(lambda run: stats.result(run)[name])

    def worst(value) -> float:
        return max((float(x) for run in lines if (x := value(run)) not in (None, "")), default=float("nan"))

    sft = cloned(row, own)
    for bar, value in bars().get(row.name, {}).items():
        if bar == "success":
            budget = row.flag("--online-steps")
            within = f" within {int(budget):,} online env steps" if budget else ""
            got = final("success_once")
            add(f"success at least {percent(value)} %{within}", f"{percent(got)} %", got >= value - 1e-9)
        elif bar == "sft":
            got = float(np.mean([float(e["success_once"]) for e in sft])) if sft else float("nan")
            add(f"success after SFT at least {percent(value)} %", f"{percent(got)} %", got >= value - 1e-9)
        elif bar == "above_sft":
            before, after = stats.pooled(sft), stats.pooled([stats.result(run) for run in lines])
            apart = bool(before and after and after[1] > before[2])
            add("final success above SFT, intervals disjoint", f"{interval(before)} to {interval(after)}", apart)
        elif bar == "steps_ratio":
            got = mean(lambda run: steps(stats.result(run))) / final("demo_steps_to_success")
            text = f"steps to success at most {percent(value)} % of the demonstrations'"
            add(text, f"{percent(got)} %", got <= value + 1e-9)
        elif bar == "drop":
            got = worst(stats.largest_drop)
            text = f"success never more than {percent(value)} points below hand-over"
            add(text, f"{percent(got)} points", got <= value + 1e-5)
        elif bar == "minutes":
            got = worst(lambda run: stats.result(run)["seconds"]) / 60
            part = "stages 1 to 3" if row.flag("--sft-checkpoint") else "whole run"
            add(f"{part} within {value:g} minutes", f"{got:.1f} minutes", got <= value)
        else:
            raise CommandError(f"bars.csv: {row.name} has an unknown bar, {bar}")
    return rows


def result_row(row: Row, own: Runs, wanted: int, papers: Papers) -> list[str]:
    """A row of a command file's table."""
    at_end = mean_of(own, lambda run: stats.result(run)["success_at_end"])
    return [
        row.env_id, row.label, success(own, wanted),
        per_seed(own, lambda run: percent(float(stats.result(run)["success_once"]))), rate(at_end) or "–",
        interval(stats.pooled(cloned(row, own))),
        per_seed(own, lambda run: rate(stats.handover(run))), per_seed(own, lambda run: rate(stats.largest_drop(run))),
        steps_cell(own), per_seed(own, lambda run: reached(stats.steps_at_target(run))),
        per_seed(own, lambda run: f"{float(s) / 60:.0f}" if (s := stats.result(run)["seconds"]) else None),
        papers.value(row.paper, row.env_id, "success_percent"), papers.value(row.paper, row.env_id, "steps_at_80"),
    ]  # fmt: skip


HEADER = [
    "Task", "Method", "Success, % (95 % interval)", "Per seed, %", "At the time limit, %",
    "After SFT, % (95 % interval)", "At hand-over, %", "Largest drop, points", "Steps to success (demonstrations')",
    "Online env steps at 80 %", "Minutes", "Paper: success, %", "Paper: env steps at 80 %",
]  # fmt: skip
EXPLAINED = (
    "Success is `success_once` of the last checkpoint: mean over seeds, Wilson interval over all episodes together (it "
    "leaves out the spread between seeds, see the next column). At the time limit: `success_at_end`, for policies that "
    f"reach the goal and leave it again. Steps to success leave out runs with fewer than {FEW} successful episodes."
)
ONLINE_EXPLAINED = (
    " The drop is success at hand-over to online learning minus the lowest evaluation from there on. Steps at 80 % are "
    "control steps since hand-over, at the first evaluation with at least 80 % that the next one confirms."
)


def aggregate(file: CommandFile, runs: Runs) -> str:
    """Interquartile mean over all tasks, of the methods that have all their seeds there: others can't be compared."""
    tasks, scores = list(dict.fromkeys(row.env_id for row in file.rows)), {}
    for row in file.rows:
        found = [float(stats.result(run)["success_once"]) for run in of_row(row, runs).values()]
        if len(found) == len(file.seeds(row)):
            scores.setdefault(row.label, {})[row.env_id] = found
    scores = {label: list(by_task.values()) for label, by_task in scores.items() if len(by_task) == len(tasks)}
    if len(tasks) < 2 or not scores:
        return ""
    body = []
    for label, found in scores.items():
        measured = stats.bootstrap_iqm(found)
        shown = interval(measured) if min(map(len, found)) > 1 else f"{percent(measured[0])} (one seed)"
        body.append([label, shown, str(sum(map(len, found)))])
    text = f"Interquartile mean over tasks and seeds ({', '.join(tasks)}); intervals by stratified bootstrap."
    return f"{text}\n\n{table(['Method', 'Success, % (95 % interval)', 'Runs'], body)}"


def picture(name: str, alt: str, page: Path, root: Path) -> str:
    """A figure that leads to its vector version; empty if benchmark/plots.py hasn't drawn it."""
    folder = root / "docs" / "figures"
    if not (folder / f"{name}.svg").exists():
        return ""
    here = os.path.relpath(folder, page.parent)
    return f"[![{alt}]({here}/{name}.png)]({here}/{name}.svg)"


def file_block(file: CommandFile, runs: Runs, papers: Papers, page: Path, root: Path) -> str:
    own = {row: of_row(row, runs) for row in file.rows}
    lines = [line for found in own.values() for run in found.values() for line in run]
    body = [result_row(row, own[row], len(file.seeds(row)), papers) for row in file.rows]
    online = ONLINE_EXPLAINED if any(line["stage"] in stats.ONLINE for line in lines) else ""
    parts = [
        table(HEADER, body),
        f"{setting(list(file.rows))}. {EXPLAINED}{online} {made_by(lines)}".strip(),
        papers.cite(),
        *notes_on(list(file.rows), runs),
    ]
    if judged := [bar for row in file.rows for bar in bar_rows(row, own[row], len(file.seeds(row)))]:
        parts.append(table(["Task", "Method", "Bar", "Measured", "Verdict"], judged))
    parts.append(aggregate(file, runs))
    alt = f"{file.title}: success against control steps; thin lines are seeds, the band is their range"
    parts.append(picture(file.name, alt, page, root))
    seeds = ", ".join(map(str, sorted({seed for _, seed in file.runs})))
    run = f"python benchmark/run.py benchmark/commands/{file.name}.sh"
    parts.append(f"`{run}` runs these {len(file.runs)} commands, seed {seeds}.")
    return "\n\n".join(filter(None, parts))


# ---- the comparisons of docs/results.md ----
def success_block(files: dict[str, CommandFile], runs: Runs, papers: Papers) -> str:
    """FORCE's Table 1: success by method and task."""
    file, theirs = files["main"], papers.grid("FORCE T1", "success_percent")
    tasks = list(dict.fromkeys([row.env_id for row in file.rows] + [task for row in theirs.values() for task in row]))
    body = []
    for label in dict.fromkeys(row.label for row in file.rows):
        mine = {row.env_id: row for row in file.rows if row.label == label}
        cells = [success(of_row(mine[t], runs), len(file.seeds(mine[t]))) if t in mine else "–" for t in tasks]
        body.append([label, *cells, "–"])
    for method, by_task in theirs.items():
        cells = [f"*{by_task[t]:g}*" if t in by_task else "–" for t in tasks]
        body.append([f"*{method}* [FORCE T1]", *cells, f"*{average(by_task)}*"])
    lines = [line for row in file.rows for run in of_row(row, runs).values() for line in run]
    parts = [table(["Success, %", *tasks, "Mean of theirs"], body)]
    parts.append(f"{setting(list(file.rows))}; mean over seeds, Wilson 95 % interval. {made_by(lines)}".strip())
    return "\n\n".join(filter(None, [*parts, papers.cite(), *notes_on(list(file.rows), runs), aggregate(file, runs)]))


def steps_block(files: dict[str, CommandFile], runs: Runs, papers: Papers) -> str:
    """FORCE's Table 3: control steps at 80 %."""
    rows = {
        row: len(file.seeds(row)) for name in ("main", "force-ablation") for file in [files[name]] for row in file.rows
    }
    rows = {row: n for row, n in rows.items() if row.script in ("force_octo.py", "conrft.py")}
    rows = {row: n for row, n in rows.items() if row.flag("--online-steps", "1") != "0"}
    body, totals, spent, said = [], {}, {}, []
    for task in dict.fromkeys(row.env_id for row in rows):
        mine = {row: of_row(row, runs) for row in rows if row.env_id == task}
        times = {row: [t for run in own.values() if (t := stats.steps_at_target(run))] for row, own in mine.items()}
        followed = [stats.curve(run)[0][-1] for row, own in mine.items() if times[row] for run in own.values()]
        horizon = min(followed, default=0.0)
        for row, own in mine.items():
            cells, found = ["not run", "–", "–", "–"], times[row]
            if found:
                median, mean = stats.median_time(found), stats.restricted_mean(found, horizon)
                totals.setdefault(row.label, {})[task] = mean
                if row.label == "FORCE":
                    spent[task] = mean_of(own, lambda run: stats.before_handover(run))
                missing = f", {len(own)} of {rows[row]} seeds" if len(own) < rows[row] else ""
                later = f"more than {max(t for t, _ in found):.0f}"
                cells = [
                    per_seed(own, lambda run: reached(stats.steps_at_target(run))) + missing,
                    f"{sum(there for _, there in found)} of {len(found)}",
                    "–" if missing else later if median is None else f"{median:.0f}",
                    f"{mean:.0f} of {horizon:.0f}",
                ]
            body.append([task, row.label, *cells, papers.value(row.paper, task, "steps_at_80")])
    header = ["Task", "Method", "Per seed", "Runs that got there", "Median", "Mean within the common budget", "Theirs"]
    both = sorted(set(totals.get("FORCE", {})) & set(totals.get("FORCE, no warm-up", {})))
    with_, without = (sum(totals.get(label, {}).get(t, 0) for t in both) for label in ("FORCE", "FORCE, no warm-up"))
    claim = papers.value(("FORCE",), "all", "steps_at_80_reduction_percent", " %")
    if without:
        said.append(
            f"Summed over {', '.join(both)}, warm-up changes the mean within the budget by {percent(with_ / without - 1)} % "
            f"({without:.0f} to {with_:.0f} steps). Its own rollouts aren't in this: {sum(spent[t] for t in both):.0f} steps. "
            f"The paper's reduction, over four tasks: {claim}."
        )
    else:
        why = f"both are at 80 % at hand-over on {', '.join(both)}" if both else "no task has runs of both yet"
        said.append(f"Reduction by warm-up: {why}; the paper's, over four tasks: {claim}.")
    text = (
        "Control steps since hand-over at the first evaluation with at least 80 % that the next one confirms; what came "
        "before hand-over (demonstrations, warm-up rollouts) isn't counted, and a run that starts there has 0. A run "
        "that doesn't get there is censored where it ends: medians are Kaplan-Meier's, and the mean is the area under "
        "that curve up to the shortest budget of the task."
    )
    return "\n\n".join([table(header, body), f"{setting(list(rows))}. {text}", *said, papers.cite()])


def execution_block(files: dict[str, CommandFile], runs: Runs, papers: Papers) -> str:
    """FORCE's Table 2 and ConRFT's Table I: success and steps to success."""
    chosen = [files["main"], *(file for file in files.values() if file.name != "main")]
    rows = {row: len(file.seeds(row)) for file in chosen for row in file.rows}
    rows = {r: n for r, n in rows.items() if r in files["main"].rows or "HIL-ConRFT" in r.paper}
    tasks, body = list(dict.fromkeys(row.env_id for row in rows)), []
    for row, wanted in sorted(rows.items(), key=lambda item: tasks.index(item[0].env_id)):
        own = of_row(row, runs)
        sft, demos = cloned(row, own), mean_of(own, lambda run: stats.result(run)["demo_steps_to_success"])
        after, before = mean_of(own, lambda run: steps(stats.result(run))), [x for e in sft if (x := steps(e))]
        body.append([
            row.env_id, row.label, interval(stats.pooled(sft)), success(own, wanted),
            *("–" if v is None else f"{v:.1f}" for v in (demos, np.mean(before) if before else None, after)),
            f"{percent(1 - after / demos)} %" if after and demos else "–",
        ])  # fmt: skip
    header = ["Task", "Method", "Success after SFT, %", "Success, %", "Demonstrations' steps", "Steps after SFT",
              "Steps", "Shorter than demonstrations by"]  # fmt: skip
    text = (
        f"{setting(list(rows))}. Steps are control steps to success at 10 Hz, mean over successful episodes; runs with fewer "
        f"than {FEW} of these are left out."
    )
    parts = [table(header, body), text]
    for source in ("FORCE T2", "ConRFT T1"):
        rates, lengths = papers.grid(source, "success_percent"), papers.grid(source, "steps_to_success")
        tasks, methods = list(next(iter(rates.values()))), list(rates)
        pair = [[task, *(f"*{rates[m][task]:g} / {lengths[m][task]:g}*" for m in methods)] for task in tasks]
        means = ["Mean"]
        for m in methods:
            means.append(f"*{average(rates[m])} / {average(lengths[m])}*")
        parts += [f"Theirs, success in % / steps [{source}]:", table(["Task", *methods], [*pair, means])]
    return "\n\n".join([*parts, papers.cite()])


def corft_block(files: dict[str, CommandFile], runs: Runs, papers: Papers) -> str:
    """CO-RFT's Table 1: in and out of distribution, gain over cloning, cycle time."""
    file, body = files["corft-state"], []
    for row in [row for row in file.rows if "--eval-elsewhere" in row.command]:
        own, seeds, cells = of_row(row, runs), len(file.seeds(row)), []
        inside = [(first, stats.result(run)) for run in own.values() if (first := stats.after_sft(run))]
        outside = [(found[0], found[-1]) for run in own.values() if len(found := stats.elsewhere(run)) > 1]
        for pairs in (inside, outside):
            before, after = (stats.pooled([pair[i] for pair in pairs]) for i in (0, 1))
            gain = "–" if not pairs else interval(stats.difference(before, after), sign="+")
            missing = f", {len(pairs)} of {seeds} seeds" if 0 < len(pairs) < seeds else ""
            cells += [interval(before), interval(after) + missing if after else "not run", gain]
        found = [(steps(first), steps(last)) for first, last in inside]
        shorter = [1 - last / first for first, last in found if first and last]
        time = f"{percent(np.mean(shorter))} ({percent(min(shorter))} to {percent(max(shorter))})" if shorter else "–"
        body.append([row.env_id, "one place" if "--spawn" in row.command else "random", *cells, time])
    places = ("same places", "elsewhere")
    kinds = ("Cloned, %", "CO-RFT, %", "Gain, points")
    header = ["Task", "Start", *(f"{what}, {where}" for where in places for what in kinds)]
    parts = [
        table([*header, "Cycle time shorter by, % (seeds)"], body),
        f"{setting(list(file.rows))}, 50 demonstrations. In brackets: Wilson's 95 % intervals, Newcombe's for gains (all "
        "episodes together, as if independent: the spread between seeds is left out), for cycle time the lowest and highest "
        "seed. Cycle time is over successes, in the same places.",
    ]
    theirs = []
    for start in ("random", "fixed"):
        inside, outside = (
            papers.grid("CO-RFT T1", f"{start}_{where}_success_percent")["CO-RFT"] for where in ("ind", "ood")
        )
        theirs += [[task, start, f"*{inside[task]:g}*", f"*{outside[task]:g}*"] for task in inside]
        theirs.append(["Mean", start, *(f"*{average(found)}*" for found in (inside, outside))])
    claims = {"ind_gain_points": " points", "ood_gain_points": " points", "cycle_time_reduction_percent": " %"}
    gains = [papers.value(("CO-RFT",), "all", metric, unit) for metric, unit in claims.items()]
    parts += [
        "Theirs, success of CO-RFT in % [CO-RFT T1]:",
        table(["Task", "Start", "Same places", "Elsewhere"], theirs),
    ]
    parts.append(
        f"Their gain over cloning: {gains[0]} in the same places, {gains[1]} elsewhere; cycle time: {gains[2]} less."
    )
    return "\n\n".join([*parts, papers.cite()])


def figures_block(page: Path, root: Path) -> str:
    """The figures over all methods, each with what it shows."""
    about = {
        "early-drop": "Does success fall when online learning begins? For each method and seed: success at hand-over, the "
        "lowest evaluation from there on, and the last one.",
        "calibration": "What warm-up does to the critic. Above and in the middle: Q of the decisions of the warm-up "
        "rollouts against the returns that followed, mean difference and correlation. Below: Q of the actions in the "
        "training batches minus their Monte-Carlo returns, from hand-over on, mean over seeds. But for the first point of "
        "each run, the critic has been trained on this data, and half of FORCE's target is that return: this shows that "
        "it fits, not that it predicts.",
        "distillation": "VGPD: the share of states that learn one of the policy's proposals in the place of the recorded "
        "action (zeta), and how far the proposals lie apart, in actions and in Q; mean over seeds, and their range.",
    }
    shown = [f"{image}\n\n{text}" for name, text in about.items() if (image := picture(name, name, page, root))]
    return "\n\n".join(shown) or "Nothing has been run yet."


# ---- pages ----
def replace_block(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`. Raises: ValueError unless both are there once, in order."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the markers of {name} must be there once each, {begin} before {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main(results: Path = RESULTS, root: Path = ROOT, check: bool = False) -> int:
    """Bring the documentation in line with the results.

    Args:
        results: folder of runs.csv.
        root: folder that holds README.md and docs.
        check: change nothing; exit code 1 if a page is out of date.
    """
    lines = read_csv(results / "runs.csv") if (results / "runs.csv").exists() else []
    try:
        files = {file.name: file for file in all_commands()}
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs, papers, stale, done = stats.by_run(lines), Papers(), [], 0
    comparisons = {"results-success": success_block, "results-steps": steps_block, "results-execution": execution_block,
                   "results-corft": corft_block}  # fmt: skip
    for page in [p for p in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if p.exists()]:
        old = new = page.read_text()
        for name in re.findall(r"<!-- (?:begin|end): ([\w-]+) -->", old):
            papers.used = set()
            if name in files:
                content = file_block(files[name], runs, papers, page, root)
            elif name == "results-figures":
                content = figures_block(page, root)
            elif name in comparisons:
                content = comparisons[name](files, runs, papers)
            else:
                raise ValueError(f"{page.name}: there is nothing called {name}")
            made = "<!-- made by benchmark/tables.py from benchmark/results/runs.csv: edits here are lost -->"
            new, done = replace_block(new, name, f"{made}\n\n{content}"), done + 1
        if new != old:
            stale.append(str(page.relative_to(root)))
            if not check:
                page.write_text(new)
    print(f"{done // 2} blocks; {'out of date' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
