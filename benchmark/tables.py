"""Writes the tables of the documentation from benchmark/results/runs.csv, beside the papers' numbers (papers.csv).

A block between <!-- begin: NAME --> and <!-- end: NAME --> in README.md and docs/*.md is made anew. NAME is a command file or
one of COMPARISONS. Words, and which columns a table has, are in benchmark/templates. "–" stands for what isn't known.
"""

import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import rows, stats  # noqa: E402
from benchmark.collect import mixed, number, read_results  # noqa: E402
from benchmark.rows import ORIGIN, ROOT, TEMPLATES, Commands, Row, UserError, command_line, read_csv  # noqa: E402

PAPERS = read_csv(ROOT / "benchmark" / "papers.csv", ("source", "method", "task", "metric", "value"))
WORDS = tomllib.loads((TEMPLATES / "words.toml").read_text())
CAPTIONS = WORDS["captions"]
MADE = "<!-- made by benchmark/tables.py from benchmark/results/runs.csv: edits here are lost -->"
BLOCK = re.compile(r"(<!-- begin: ([\w-]+) -->\n)(?:(?!<!-- begin: ).)*?(<!-- end: \2 -->)", re.DOTALL)
FEW = 10  # successful episodes that a mean number of steps needs


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}".removesuffix(".0")


def one_digit(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def interval(measured: stats.Measured | None) -> str:
    """Mean and interval in percent."""
    return "{} ({}–{})".format(*map(percent, measured)) if measured else "–"


def gain(before: stats.Measured | None, after: stats.Measured | None) -> str:
    """The difference of two rates, in points, with its interval."""
    if not before or not after:
        return "–"
    return in_points(stats.difference(before, after))


def in_points(difference: stats.Measured) -> str:
    """A difference of two rates, in points, with its interval."""
    return "{} ({} to {})".format(*(f"+{percent(x)}" if x > 0 else percent(x) for x in difference))


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
    enough = {}
    for seed, line in evaluations.items():
        if line["success_once"] * line["num_episodes"] > FEW - 0.5:
            enough[seed] = line["episode_len"]
    return enough


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
        return text + missing

    def after_sft(self, run: stats.Lines) -> dict | None:
        """The evaluation after supervised fine-tuning; none for a row that throws the cloned head away."""
        return None if "--fresh-head" in self.row.command else stats.after_sft(run)

    @property
    def steps(self) -> float | None:
        return mean(steps_to_success(self.each(stats.result)))

    @property
    def demo_steps(self) -> float | None:
        return mean(self.final("demo_steps_to_success"))

    @property
    def times(self) -> list[tuple[float, bool]]:
        return list(self.each(stats.steps_at_target).values())

    def restricted(self) -> float:
        return stats.restricted_mean(self.times, self.horizon)

    def paper(self, metric: str) -> str:
        """The papers' numbers for its method and task, each with its source."""
        found = []
        for line in PAPERS:
            if line["method"] in self.row.paper and (line["task"], line["metric"]) == (self.row.env_id, metric):
                found.append(f"*{line['value']}* [{line['source']}]")
        return ", ".join(found) or "–"


def median_cell(entry: Entry) -> str:
    if len(entry.runs) < entry.wanted or not entry.times:
        return "–"
    median = stats.median_time(entry.times)
    return f"more than {max(entry.times)[0]:.0f}" if median is None else f"{median:.0f}"


def cycle_cell(entry: Entry) -> str:
    """How much shorter an episode is than the cloned policy's: mean over seeds, least and most."""
    before = steps_to_success(entry.each(entry.after_sft))
    after = steps_to_success(entry.each(stats.result))
    saved = [1 - after[seed] / before[seed] for seed in before.keys() & after.keys()]
    return "{} ({} to {})".format(*map(percent, (np.mean(saved), min(saved), max(saved)))) if saved else "–"


CELLS: dict[str, Callable[[Entry], str]] = {
    "task": lambda entry: entry.row.env_id,
    "method": lambda entry: entry.row.label,
    "success": lambda entry: entry.complete(interval(entry.rate(stats.result))),
    "successes": lambda entry: per_seed(entry.final("success_once")),
    "at_limit": lambda entry: percent(mean(entry.final("success_at_end"))) if entry.final("success_at_end") else "–",
    "after_sft": lambda entry: interval(entry.rate(entry.after_sft)),
    "handover": lambda entry: per_seed(entry.each(stats.handover)),
    "drop": lambda entry: per_seed(entry.each(stats.largest_drop)),
    "at_target": lambda entry: per_seed(entry.each(stats.steps_at_target), reached),
    "minutes": lambda entry: per_seed(entry.final("seconds"), lambda seconds: f"{seconds / 60:.0f}"),
    "their_success": lambda entry: entry.paper("success_percent"),
    "their_steps_at_target": lambda entry: entry.paper("steps_at_80"),
    "all_at_target": lambda entry: entry.complete(per_seed(entry.each(stats.steps_at_target), reached)),
    "there": lambda entry: f"{sum(there for _, there in entry.times)} of {len(entry.times)}" if entry.times else "–",
    "median": median_cell,
    "restricted": lambda entry: f"{entry.restricted():.0f} of {entry.horizon:.0f}" if entry.times else "–",
    "demo_steps": lambda entry: one_digit(entry.demo_steps),
    "sft_steps": lambda entry: one_digit(mean(steps_to_success(entry.each(entry.after_sft)))),
    "steps": lambda entry: one_digit(entry.steps),
    "shorter": lambda entry: percent(1 - entry.steps / entry.demo_steps) if entry.steps and entry.demo_steps else "–",
    "start": lambda entry: "one place" if "--spawn" in entry.row.command else "random",
    "gain": lambda entry: gain(entry.rate(entry.after_sft), entry.rate(stats.result)),
    "sft_elsewhere": lambda entry: interval(entry.rate(stats.first_elsewhere)),
    "elsewhere": lambda entry: entry.complete(interval(entry.rate(stats.last_elsewhere))),
    "gain_elsewhere": lambda entry: gain(entry.rate(stats.first_elsewhere), entry.rate(stats.last_elsewhere)),
    "cycle": cycle_cell,
}


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
    return table(list(columns), [[CELLS[cell](entry) for cell in columns.values()] for entry in entries if entry.runs])


def fill(template: str, entries: list[Entry] = (), **parts) -> str:
    """The template with its parts, and what is to be said of entries and sources; without paragraphs that are empty."""
    text = (TEMPLATES / f"{template}.md").read_text()
    named = " ".join([text, *map(str, parts.values())])
    sources = [f"[{tag}] {meaning}" for tag, meaning in WORDS["sources"].items() if f"[{tag}]" in named]
    cited = CAPTIONS["cited"].format(sources="; ".join(sources)) if sources else ""
    parts |= {"cited": cited, "made_by": made_by(entries), "notes": notes(entries), "few": FEW}
    paragraphs = [re.sub(r"\n(?!\|)", " ", paragraph).format(**parts) for paragraph in text.split("\n\n")]
    return "\n\n".join(paragraph.strip() for paragraph in paragraphs if paragraph.strip())


def made_by(entries: list[Entry]) -> str:
    """Models, observations, episodes, commits, versions and device of our runs."""
    parts = {}
    for column in ("backbone", "obs_mode", "num_episodes", "git_commit", "versions", "device"):
        values = {number(value) for entry in entries for value in entry.final(column).values()}
        width = 12 if column == "git_commit" else None
        parts[column] = " | ".join(sorted(value[:width] for value in values))
    return CAPTIONS["made_by"].format(**parts) if parts["git_commit"] else ""


def notes(entries: list[Entry]) -> str:
    """What a reader must know about how the runs were made."""
    found = []
    for entry in entries:
        name = entry.row.name
        found += [f"{name}, seed {seed}: {note}." for seed, note in entry.final("notes").items() if note]
        if differing := mixed(list(entry.runs.values())):
            found.append(f"{name}: its runs differ in {differing}.")
        others = set(entry.final("command").values()) - {entry.row.command, entry.row.earlier}
        found += [CAPTIONS["another_command"].format(row=name, command=command) for command in sorted(others)]
    missing: dict[str, list[str]] = {}
    for entry in entries:
        if not entry.runs:
            missing.setdefault(entry.row.label, []).append(entry.row.env_id)
    if missing:
        rows_of = [f"{label} ({', '.join(tasks)})" for label, tasks in missing.items()]
        found.append(CAPTIONS["not_run"].format(rows="; ".join(rows_of)))
    return "\n\n".join(f"Note: {note}" for note in found)


BARS: dict[str, Callable[[Entry], float | None]] = {
    "success": lambda entry: mean(entry.final("success_once")),
    "sft": lambda entry: mean({seed: line["success_once"] for seed, line in entry.each(entry.after_sft).items()}),
    "above_sft": lambda entry: entry.rate(stats.result)[1] - (entry.rate(entry.after_sft) or [np.inf] * 3)[2],
    "steps_ratio": lambda entry: entry.steps and entry.demo_steps and entry.steps / entry.demo_steps,
    "drop": lambda entry: max(entry.each(stats.largest_drop).values(), default=None),
    "minutes": lambda entry: max(entry.final("seconds").values()) / 60,
}
AT_MOST = ("steps_ratio", "drop", "minutes")  # the others are at least


def bar_row(entry: Entry, name: str, bound: float) -> list[str]:
    """Task, method, bar, what was measured, verdict."""
    words = WORDS["bars"][name]
    part = "stages 1 to 3" if ORIGIN in entry.row.command else "whole run"
    recorded = re.search(r"online[_-]steps[= ](\d+)", " ".join([*entry.final("settings").values(), entry.row.command]))
    within = f" within {int(recorded[1]):,} online env steps" if recorded else ""
    text = words["bar"].format(rate=percent(bound), value=bound, within=within, part=part)
    value = BARS[name](entry) if entry.runs else None
    if value is None:
        return [entry.row.env_id, entry.row.label, text, "–", entry.complete("**not met**")]
    rates = {"before": interval(entry.rate(entry.after_sft)), "after": interval(entry.rate(stats.result))}
    measured = words["measured"].format(rate=percent(value), value=value, **rates)
    met = value <= bound + 1e-5 if name in AT_MOST else value >= bound - 1e-5
    return [entry.row.env_id, entry.row.label, text, measured, entry.complete("met" if met else "**not met**")]


Book = dict[str, list[Entry]]  # the rows of each command file


def entries_of(commands: Commands, runs: stats.Runs) -> list[Entry]:
    found = []
    for row in dict.fromkeys(row for row, _ in commands):
        seeds = [seed for other, seed in commands if other == row]
        own = {seed: runs[row.name, seed] for seed in seeds if (row.name, seed) in runs}
        found.append(Entry(row, own, len(seeds)))
    return found


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
            seeds = len(found[0])
            text = interval(stats.bootstrap_iqm(found)) if seeds > 1 else f"{percent(np.mean(found))} (one seed)"
            body.append([label, text, str(seeds * len(tasks))])
    made = table(["Method", "Success, % (95 % interval)", "Runs"], body)
    return made and fill("aggregate", tasks=", ".join(tasks), table=made)


def file_block(name: str, entries: list[Entry]) -> str:
    bars = [bar_row(entry, *bar) for entry in entries if entry.runs for bar in entry.row.bars.items()]
    judged = table(["Task", "Method", "Bar", "Measured", "Verdict"], bars)
    made = entry_table("file", entries)
    return fill("file", entries, table=made, bars=judged, aggregate=aggregate(entries), name=name)


def success_block(book: Book) -> str:
    """FORCE's Table 1: success by method and task. Rows of other files stand in it if the paper has them."""
    entries = list(book["main"])
    rows_of_main = {entry.row for entry in entries}
    for name in ("force-ablation", "conrft-state", "pi0-state"):
        entries += [entry for entry in book[name] if entry.row not in rows_of_main and entry.row.paper != [""]]
    body: dict[str, dict[str, str]] = {}  # method -> task -> cell
    for entry in entries:
        if entry.runs:
            body.setdefault(entry.row.label, {})[entry.row.env_id] = CELLS["success"](entry)
    for line in PAPERS:
        if line["source"] == "FORCE T1":
            body.setdefault(f"*{line['method']}* [FORCE T1]", {})[line["task"]] = f"*{line['value']}*"
    known = [task for row in body.values() for task in row]
    tasks = dict.fromkeys([entry.row.env_id for entry in entries] + known)
    cells = [[method, *(row.get(task, "–") for task in tasks)] for method, row in body.items()]
    made = table(["Success, %", *tasks], cells)
    return fill("results-success", entries, table=made, aggregate=aggregate(entries))


def steps_block(book: Book) -> str:
    """FORCE's Table 3: control steps at 80 %."""
    known = {entry.row: entry for entry in [*book["main"], *book["force-ablation"]]}
    entries = [entry for entry in known.values() if entry.row.script in ("force_octo.py", "conrft.py")]
    entries = [entry for entry in entries if entry.row.flag("--online-steps") != "0"]
    for entry in entries:
        same = [other for other in entries if other.row.env_id == entry.row.env_id]
        curves = [steps for other in same for steps, _ in other.each(stats.curve).values()]
        entry.horizon = min((steps[-1] for steps in curves if len(steps) > 1), default=0.0)
    known = {(entry.row.label, entry.row.env_id): entry for entry in entries if entry.times}
    tasks = [task for label, task in sorted(known) if label == "FORCE" and ("FORCE, no warm-up", task) in known]
    warm = [known["FORCE", task] for task in tasks]
    after = sum(entry.restricted() for entry in warm)
    before = sum(known["FORCE, no warm-up", task].restricted() for task in tasks)
    spent = sum(mean(entry.each(stats.before_handover)) for entry in warm)
    reduction = ""
    if before:  # what warm-up saves
        change = percent(after / before - 1)
        shown = {"change": change, "before": before, "after": after, "spent": spent}
        reduction = CAPTIONS["reduction"].format(tasks=", ".join(tasks), **shown)
    return fill("results-steps", entries, table=entry_table("steps", entries), reduction=reduction)


WHOLE = r"FORCE(, \d+ demonstrations)?"  # labels of FORCE without a change


@dataclass
class Pairs:
    """FORCE beside another row of its task, by pairs of runs that start from the same clone."""

    other: Row
    seeds: list[int]
    points: stats.Measured  # success of FORCE minus the other's
    ratio: stats.Measured | None  # steps to success of FORCE over the other's; None where one hardly succeeds


def pairs_of(entries: list[Entry]) -> list[Pairs]:
    ours = {entry.row.flag(ORIGIN): entry for entry in entries if re.fullmatch(WHOLE, entry.row.label)}
    found = []
    for entry in entries:
        force = ours.get(entry.row.flag(ORIGIN), entry)
        seeds = sorted(force.runs.keys() & entry.runs.keys())
        if entry is force or "--fresh-head" in entry.row.command or len(seeds) < 2:
            continue
        points = stats.paired_difference([(entry.runs[seed], force.runs[seed]) for seed in seeds])
        its_steps = steps_to_success(entry.each(stats.result))
        our_steps = steps_to_success(force.each(stats.result))
        steps = [(its_steps[seed], our_steps[seed]) for seed in seeds if seed in its_steps and seed in our_steps]
        ratio = stats.paired_ratio(steps) if len(steps) == len(seeds) else None
        found.append(Pairs(entry.row, seeds, points, ratio))
    return sorted(found, key=lambda pair: list(ours).index(pair.other.flag(ORIGIN)))


def compared(book: Book) -> list[Entry]:
    """Rows of FORCE, its ablations and its rivals; those of the ablations' file have more seeds."""
    entries = [*book["main"], *book["force-ablation"], *book["few-state"]]
    return list({entry.row: entry for entry in entries}.values())


def pairs_block(book: Book) -> str:
    """FORCE beside each of the others, seed by seed."""
    entries = compared(book)
    body = []
    for pair in pairs_of(entries):
        place = [pair.other.env_id, pair.other.label, str(len(pair.seeds))]
        body.append([*place, in_points(pair.points), interval(pair.ratio)])
    header = ["Task", "FORCE beside", "Pairs", "Success, points", "Steps to success, %"]
    return fill("results-pairs", entries, table=table(header, body))


def corft_block(book: Book) -> str:
    """CO-RFT's Table 1: in and out of distribution, gain over cloning, cycle time."""
    entries = [entry for entry in book["corft-state"] if "--eval-elsewhere" in entry.row.command]
    return fill("results-corft", entries, table=entry_table("corft", entries))


def short_block(book: Book) -> str:
    """The README's table: success and steps of the three methods that start from the same clone, where all seeds are there."""
    methods = ("BC", "ConRFT (no HIL)", "FORCE")
    columns: dict[str, dict[str, str]] = {}  # task and demonstrations -> method -> cell
    whole_grid = [entry for entry in book["main"] if not entry.row.ablation]
    for entry in [*whole_grid, *book["few-state"]]:
        if entry.row.method in methods and len(entry.runs) == entry.wanted:
            rate = entry.rate(stats.result)
            cell = f"{100 * rate[0]:.0f} % in {one_digit(entry.steps)} steps"
            column = f"{entry.row.env_id[:-3]} from {entry.row.flag('--num-demos', '50')}"
            columns.setdefault(column, {})[entry.row.method] = cell
    whole = {name: cells for name, cells in columns.items() if len(cells) == len(methods)}
    body = [[method, *(cells[method] for cells in whole.values())] for method in methods]
    return fill("results-short", table=table(["Method", *whole], body))


COMPARISONS = {
    "results-short": short_block,
    "results-success": success_block,
    "results-steps": steps_block,
    "results-pairs": pairs_block,
    "results-corft": corft_block,
}


def updated(page: Path, book: Book) -> str:
    """The page's text with all its blocks made anew. Raises: UserError if markers are missing or unknown."""

    def block(found: re.Match) -> str:
        name = found[2]
        if name not in book | COMPARISONS:
            raise UserError(f"{page.name}: there is nothing called {name}")
        content = COMPARISONS[name](book) if name in COMPARISONS else file_block(name, book[name])
        return f"{found[1]}{MADE}\n\n{content}\n{found[3]}"

    text, count = BLOCK.subn(block, page.read_text())
    if len(re.findall("<!-- (?:begin|end): ", text)) != 2 * count:
        raise UserError(f"{page.name}: each <!-- begin: NAME --> needs an <!-- end: NAME --> after it")
    return text


def read_book() -> Book:
    runs = read_results()
    return {name: entries_of(commands, runs) for name, commands in rows.all_commands().items()}


def main(check: bool = False) -> int:
    """Bring the documentation in line with the results. --check: change nothing; exit code 1 if a page is out of date."""
    book = read_book()
    pages = [*rows.DOCS.parent.glob("README.md"), *sorted(rows.DOCS.glob("*.md"))]
    made = {page: updated(page, book) for page in pages}
    stale = {page: text for page, text in made.items() if text != page.read_text()}
    if not check:
        for page, text in stale.items():
            page.write_text(text)
    names = ", ".join(page.name for page in stale) or "nothing"
    print(f"pages {'out of date' if check else 'rewritten'}: {names}")
    return int(check and bool(stale))


if __name__ == "__main__":
    command_line(main)
