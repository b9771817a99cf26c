"""What is measured: a file of plain commands per table, in benchmark/commands, and rows.csv, which describes its rows.

A command file is a loop over seeds, with lines
    python SCRIPT.py FLAGS --seed $seed --runs FOLDER --run-name ROW-$seed
It is read, never executed. A row is what its seeds share: script and flags. Files that name the same row share its runs.
"""

import csv
import dataclasses
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.errors import UserError  # noqa: E402
from plumbing.flags import parse_flags, run_script  # noqa: E402

COMMANDS = ROOT / "benchmark" / "commands"
ROWS = ROOT / "benchmark" / "rows.csv"
RESULTS = ROOT / "benchmark" / "results"
DOCS = ROOT / "docs"
TEMPLATES = ROOT / "benchmark" / "templates"

BARS = ("success", "sft", "above_sft", "steps_ratio", "drop", "minutes")  # columns of rows.csv: see README.md
# Flags that say which run it is and where things lie, not how it learns.
BOOKKEEPING = tuple("seed runs run_name resume eval_only track device torch_threads video_episodes demo_dir".split())
ORIGIN = "--sft-checkpoint"  # names a run that has to be finished before

LOOP = re.compile(r"for seed in (\d+(?: \d+)*); do\n(.+?)\ndone", re.DOTALL)
WORD = r"(?:[\w./:=,+-]|\$seed\b)+"  # nothing that a shell would do something with
COMMAND = re.compile(rf"(python [\w./-]+\.py(?: {WORD})*) --seed \$seed --runs ({WORD}) --run-name ([\w-]+)-\$seed")


@dataclass(frozen=True)
class Row:
    """A row of a table: a command without seed and place, and the names of what it measures."""

    name: str
    command: str  # "python SCRIPT FLAGS", with $runs and $seed where it names another run
    method: str
    ablation: str = ""
    paper: list[str] = field(default_factory=list, compare=False)  # this method's names in papers.csv
    earlier: str = ""  # the command that gave the same flags before its script had tables of defaults per task
    bars: dict[str, float] = field(default_factory=dict, compare=False)  # what it must reach

    @property
    def label(self) -> str:
        return f"{self.method}, {self.ablation}" if self.ablation else self.method

    def words(self, seed: int | str, runs: Path | str) -> list[str]:
        """The command with a seed, and a folder of runs where it names another run."""
        return self.command.replace("$runs/", f"{runs}/").replace("$seed", str(seed)).split()

    def flag(self, name: str, default: str = "") -> str:
        """What the command itself says; `flags_of` knows all flags."""
        words = self.command.split()
        return words[words.index(name) + 1] if name in words else default

    @property
    def script(self) -> str:
        return self.flag("python")

    @property
    def env_id(self) -> str:
        return self.flag("--env-id")


Commands = list[tuple[Row, int]]  # the row and seed of each command, in the order in which bash runs them


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """The lines of a CSV. Raises: UserError unless it is there, whole, and has `columns`."""
    try:
        text = path.read_text()
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a CSV: {error}") from error
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path} is torn or another file: it has no column {min(missing)}")
    if any(None in line or None in line.values() for line in lines) or not f"\n{text}".endswith("\n"):
        raise UserError(f"{path} is torn: its lines haven't all {len(reader.fieldnames)} columns")
    return lines


def read_json(path: Path) -> dict:
    """Raises: UserError."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read as a run's JSON: {error}") from error


def read_commands(path: Path) -> Commands:
    """A command file is one table. Raises: UserError if it isn't there, isn't one, or has a row that rows.csv doesn't know."""
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in COMMANDS.glob("*.sh")))
        raise UserError(f"no command file {path}; benchmark/commands has: {known}")
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    code = "\n".join(line for line in lines if line and not line.startswith("#"))
    if stray := LOOP.sub("", code).strip():
        raise UserError(f"{path}: only `for seed in 1 2; do`, commands and `done`, please: {stray.splitlines()[0]}")
    about = {line["row"]: line for line in read_csv(ROWS, ("row", "method", "ablation", "paper", "earlier", *BARS))}
    runs = []
    for seeds, body in LOOP.findall(code):
        rows = [read_row(line, path, about) for line in body.splitlines()]
        runs += [(row, int(seed)) for seed in seeds.split() for row in rows]
    if len({(row.name, seed) for row, seed in runs}) < max(len(runs), 1):
        raise UserError(f"{path} holds no command, or a run twice")
    return runs


def read_row(line: str, path: Path, about: dict[str, dict[str, str]]) -> Row:
    """A command as a row. Raises: UserError."""
    found = COMMAND.fullmatch(line)
    if not found:
        form = "python SCRIPT.py FLAGS --seed $seed --runs FOLDER --run-name ROW-$seed"
        raise UserError(f"{path}: a command is {form}, in plain words: {line}")
    command, runs, name = found.groups()
    if name not in about:
        raise UserError(f"{path}: rows.csv has no row {name}")
    command = command.replace(f"{ORIGIN} {runs}/", f"{ORIGIN} $runs/")
    if ORIGIN in command and not re.search(rf"{ORIGIN} \$runs/[\w-]+-\$seed( |$)", command):
        raise UserError(f"{path}: {ORIGIN} must be {runs}/ROW-$seed: {line}")
    known = about[name]
    bars = {bar: float(known[bar]) for bar in BARS if known[bar]}
    return Row(name, command, known["method"], known["ablation"], known["paper"].split(";"), known["earlier"], bars)


def all_commands() -> dict[str, Commands]:
    """By the name of the file. Raises: UserError."""
    return {path.stem: read_commands(path) for path in sorted(COMMANDS.glob("*.sh"))}


@cache
def load_script(path: Path) -> ModuleType:
    """The script as a module, for its Args, TABLES and validate."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


@cache
def flags_of(script: str, *words: str) -> dict:
    """All flags of a command, as its config.json will hold them. Raises: UserError.

    They are those of a run that is resumed: the run that it started from need not be there any more.
    """
    module = load_script(ROOT / script)
    args = parse_flags(module.Args, "", getattr(module, "TABLES", {}), [*words, "--resume", "."])
    module.validate(args)
    return dataclasses.asdict(args)


def misfit(row: Row, config: dict) -> str:
    """How a run (its config.json) differs from the row's command; empty if it doesn't."""
    if config["script"] != Path(row.script).name:
        return f"script {config['script']}"
    given = config["args"]
    wanted = flags_of(*row.words(given["seed"], given["runs"])[1:])
    unlike = []
    for name, value in given.items():  # a flag that the run doesn't know is newer than it
        expected = wanted.get(name, "no such flag")
        if name not in BOOKKEEPING and value != expected:
            unlike.append(f"{name}={value} instead of {expected}")
    return ", ".join(unlike)


def command_line(main: Callable[..., int]) -> None:
    """Run a tool of the benchmark; what the user can put right is one line and exit code 2."""
    run_script(lambda tool: sys.exit(tyro.cli(tool)), main)
