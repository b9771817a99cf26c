"""What is measured: a file of plain commands per table, in benchmark/commands, and what is said about its rows.

A command file is a shell script: a loop over seeds, with lines
    python SCRIPT.py FLAGS --seed $seed --runs FOLDER --run-name ROW-$seed
It is read, never executed. A row is what its seeds share: script and flags. `--sft-checkpoint FOLDER/ROW-$seed` names a
run that has to be finished before. Files that name the same row share its runs.

rows.csv      method and ablation of each row, as tables name them, and the method's names in papers.csv
earlier.csv   commands that gave a row the same flags before its scripts had tables of defaults per task
bars.csv      what a row must reach: success, sft (after stage 0), drop (largest fall below hand-over), steps_ratio
              (steps to success over the demonstrations'), minutes (whole run), above_sft (1: final interval above
              that after SFT)
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.errors import UserError  # noqa: E402
from plumbing.flags import parse_flags, run_script  # noqa: E402

COMMANDS = ROOT / "benchmark" / "commands"
ROWS = ROOT / "benchmark" / "rows.csv"
EARLIER = ROOT / "benchmark" / "earlier.csv"
BARS = ROOT / "benchmark" / "bars.csv"

# Flags that say which run it is and where things lie, not how it learns.
BOOKKEEPING = tuple("seed runs run_name resume eval_only track device torch_threads video_episodes demo_dir".split())
ORIGIN = "--sft-checkpoint"  # names a run that has to be finished before

LOOP = re.compile(r"for seed in (\d+(?: \d+)*); do")
COMMAND = re.compile(r"(python \S+\.py .*?) ?--seed \$seed --runs (\S+) --run-name ([\w-]+)-\$seed")
PLAIN = re.compile(r"(?:[\w./:=,+ -]|\$seed\b)*")  # nothing that a shell would do something with


@dataclass(frozen=True)
class Row:
    """A row of a table: a command without seed and place, and the names of what it measures."""

    name: str
    command: str  # "python SCRIPT FLAGS", with $runs and $seed where it names another run
    method: str
    ablation: str = ""
    paper: tuple[str, ...] = ()  # this method's names in papers.csv

    @property
    def label(self) -> str:
        return f"{self.method}, {self.ablation}" if self.ablation else self.method

    @property
    def script(self) -> str:
        return self.command.split()[1]

    def words(self, seed: int, runs: Path | str) -> list[str]:
        """The command with a seed, and a folder of runs where it names another run."""
        return self.command.replace("$runs/", f"{runs}/").replace("$seed", str(seed)).split()

    def alone(self) -> list[str]:
        """Its flags, but for the run that it starts from."""
        return re.sub(rf"{ORIGIN} \S+", "", self.command).split()[2:]

    def flag(self, name: str, default: str = "") -> str:
        """What the command itself says; `flags_of` knows all flags."""
        words = self.command.split()
        return words[words.index(name) + 1] if name in words else default

    @property
    def env_id(self) -> str:
        return self.flag("--env-id")

    @property
    def obs_mode(self) -> str:
        return self.flag("--obs-mode", "rgb")

    @property
    def task(self) -> tuple[str, str]:
        return self.env_id, self.obs_mode


@dataclass(frozen=True)
class CommandFile:
    """A table: its title (the file's first comment), and a (row, seed) per command, in the order in which bash runs them."""

    name: str
    title: str
    runs: tuple[tuple[Row, int], ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(dict.fromkeys(row for row, _ in self.runs))

    def seeds(self, row: Row) -> list[int]:
        return [seed for other, seed in self.runs if other == row]


# ---- files ----
def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The lines of a CSV. Raises: UserError unless it is there, whole, and has `columns`."""
    try:
        text = path.read_text()
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a CSV: {error}") from error
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path} is torn or another file: it has no column {missing[0]}")
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise UserError(f"{path} is torn: its line {number} hasn't {len(reader.fieldnames)} columns")
    if text and not text.endswith("\n"):
        raise UserError(f"{path} is torn: it ends within a line")
    return lines


def read_json(path: Path) -> dict:
    """Raises: UserError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} isn't a run's: it holds no names")
    return found


def read_commands(path: Path) -> CommandFile:
    """A command file. Raises: UserError if it isn't there, isn't one, or has a row that rows.csv doesn't know."""
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(COMMANDS.glob("*.sh")))
        raise UserError(f"no command file {path}; benchmark/commands has: {known}")
    about = {line["row"]: line for line in read_csv(ROWS, ("row", "method", "ablation", "paper"))}
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    title = next((line[1:].strip() for line in lines if line.startswith("#")), path.stem)
    seeds: list[int] = []
    rows: list[Row] = []
    runs: list[tuple[Row, int]] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if line.startswith("#") or not line:
            continue
        if loop := LOOP.fullmatch(line):
            seeds = [int(seed) for seed in loop[1].split()]
        elif line == "done":
            runs += [(row, seed) for seed in seeds for row in rows]
            seeds = []
            rows = []
        elif seeds:
            rows.append(read_row(line, where, about))
        else:
            raise UserError(f"{where}: only `for seed in 1 2; do`, commands and `done`, please: {line}")
    if rows or not runs:
        raise UserError(f"{path} holds no command, or a loop without its `done`")
    commands = {(row.name, row.command) for row, _ in runs}
    if len({name for name, _ in commands}) < len(commands) or len(set(runs)) < len(runs):
        raise UserError(f"{path}: a run or a row is there twice, or differs")
    return CommandFile(path.stem, title, tuple(runs))


def read_row(line: str, where: str, about: dict[str, dict[str, str]]) -> Row:
    """A command as a row. Raises: UserError."""
    found = COMMAND.fullmatch(line)
    if not found or not PLAIN.fullmatch(line):
        form = "python SCRIPT.py FLAGS --seed $seed --runs FOLDER --run-name ROW-$seed"
        raise UserError(f"{where}: a command is {form}, in plain words: {line}")
    command, runs, name = found.groups()
    if name not in about:
        raise UserError(f"{where}: rows.csv has no row {name}")
    command = command.replace(f"{ORIGIN} {runs}/", f"{ORIGIN} $runs/")
    if ORIGIN in command and not re.search(rf"{ORIGIN} \$runs/[\w-]+-\$seed( |$)", command):
        raise UserError(f"{where}: {ORIGIN} must be {runs}/ROW-$seed")
    papers = tuple(filter(None, about[name]["paper"].split(";")))
    return Row(name, command, about[name]["method"], about[name]["ablation"], papers)


def all_commands() -> list[CommandFile]:
    """Every file of benchmark/commands. Raises: UserError, also if two files give one row different commands."""
    files = [read_commands(path) for path in sorted(COMMANDS.glob("*.sh"))]
    seen: dict[str, Row] = {}
    for file in files:
        for row in file.rows:
            if seen.setdefault(row.name, row) != row:
                raise UserError(f"{file.name}.sh gives {row.name} another command than a file before it")
    return files


@cache
def bars() -> dict[str, dict[str, float]]:
    """What each row must reach, by the row's name. Raises: UserError."""
    found: dict[str, dict[str, float]] = {}
    for line in read_csv(BARS, ("row", "bar", "value")):
        found.setdefault(line["row"], {})[line["bar"]] = float(line["value"])
    return found


# ---- flags ----
@cache
def load_script(path: Path):
    """The script as a module, for its Args, TABLES and validate."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


@cache
def flags_of(script: str, *words: str) -> dict:
    """All flags of a command, as its config.json will hold them. Raises: UserError."""
    module = load_script(ROOT / script)
    args = parse_flags(module.Args, "", getattr(module, "TABLES", {}), list(words))
    module.validate(args)
    return dataclasses.asdict(args)


def misfit(row: Row, config: dict) -> str:
    """How a run (its config.json) differs from the row's command; empty if it doesn't.

    Flags that the run doesn't know are newer than it.
    """
    if config["script"] != Path(row.script).name:
        return f"script {config['script']}"
    _, script, *words = row.words(config["args"]["seed"], config["args"]["runs"])
    wanted = flags_of(script, *words)
    unlike = []
    for name, value in config["args"].items():
        expected = wanted.get(name, "no such flag")
        if name not in BOOKKEEPING and value != expected:
            unlike.append(f"{name}={value} instead of {expected}")
    return ", ".join(unlike)


def command_line(main: Callable[..., int]) -> None:
    """Run a tool of the benchmark; what the user can put right is one line and exit code 2."""
    run_script(lambda tool: sys.exit(tyro.cli(tool)), main)
