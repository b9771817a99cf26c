"""What is measured: a file of plain commands per table, in benchmark/commands, and what is said about its rows.

A command file is a shell script of `python SCRIPT.py FLAGS --seed S --runs FOLDER --run-name ROW-S`, in a loop over
seeds; the shell itself expands it, so what runs is what `bash FILE.sh` would run. A row is what its seeds share: the
command without these three flags, and with --sft-checkpoint as "$runs/ROW-$seed": a run that has to be finished before.
Files that name the same row share its runs.

rows.csv   method and ablation of each row, as tables name them, and the method's names in papers.csv
bars.csv   what a row must reach: success, sft (after stage 0), drop (largest fall below hand-over), steps_ratio (steps
           to success over the demonstrations'), minutes (whole run), above_sft (1: final interval above that after SFT)
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS, ROWS, BARS = (ROOT / "benchmark" / name for name in ("commands", "rows.csv", "bars.csv"))

# Flags that say which run it is and where things lie, not how it learns.
BOOKKEEPING = tuple("seed runs run_name resume eval_only track device torch_threads video_episodes demo_dir".split())
PLACE = ("--seed", "--runs", "--run-name")  # those of them that a command file gives to each run
ORIGIN = "--sft-checkpoint"  # names a run that has to be finished before


@dataclass(frozen=True)
class Row:
    """A row of a table: a command without seed and place, and the names of what it measures."""

    name: str
    command: str
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
        """The command with a seed and a folder of runs where it names another run."""
        return [w.replace("$runs/", f"{runs}/").replace("-$seed", f"-{seed}") for w in shlex.split(self.command)]

    def flag(self, name: str, default: str = "") -> str:
        words = shlex.split(self.command)
        return words[words.index(name) + 1] if name in words else default

    @property
    def env_id(self) -> str:
        return self.flag("--env-id")

    @property
    def obs_mode(self) -> str:
        return self.flag("--obs-mode", "rgb")


@dataclass(frozen=True)
class CommandFile:
    """A table: its title (the file's first comment), and a (row, seed) per command, in the file's order."""

    name: str
    title: str
    runs: tuple[tuple[Row, int], ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(dict.fromkeys(row for row, _ in self.runs))

    def seeds(self, row: Row) -> list[int]:
        return [seed for other, seed in self.runs if other == row]


class CommandError(Exception):
    """A command file that can't be used; the message names the file and what is wrong."""


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def expand(path: Path) -> list[list[str]]:
    """The words of every command that `bash PATH` would run. Nothing is run: `python` prints, and no other program is
    found. Raises: CommandError."""
    script = 'python() { printf "%q " python "$@"; echo; }; source "$1"'
    words = [shutil.which("bash"), "-euc", script, "bash", str(path.resolve())]
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": "/nonexistent"})
    if done.returncode or done.stderr:
        raise CommandError(f"{path}: only loops and python commands, please ({' '.join(done.stderr.split())})")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def read_commands(path: Path) -> CommandFile:
    """A command file. Raises: CommandError if it isn't there, isn't one, or has a row that rows.csv doesn't know."""
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(COMMANDS.glob("*.sh")))
        raise CommandError(f"no command file {path}; benchmark/commands has: {known}")
    about, runs = {line["row"]: line for line in read_csv(ROWS)}, []
    for words in expand(path):
        at = {flag: words.index(flag) for flag in PLACE if words.count(flag) == 1 and words[-1] != flag}
        if len(at) < len(PLACE):
            raise CommandError(f"{path}: each command needs {', '.join(PLACE)} once: {shlex.join(words)}")
        seed, name = words[at["--seed"] + 1], words[at["--run-name"] + 1]
        row = name.removesuffix(f"-{seed}")
        if not seed.isdigit() or row == name:
            raise CommandError(f"{path}: --run-name must be ROW-SEED, not {name} with --seed {seed}")
        if row not in about:
            raise CommandError(f"{path}: rows.csv has no row {row}")
        if ORIGIN in words[:-1]:
            origin, folder = words.index(ORIGIN) + 1, f"{words[words.index('--runs') + 1]}/"
            if not words[origin].startswith(folder) or not words[origin].endswith(f"-{seed}"):
                raise CommandError(f"{path}: {ORIGIN} must be RUNS/ROW-{seed}, not {words[origin]}")
            words[origin] = f"$runs/{words[origin].removeprefix(folder).removesuffix(seed)}$seed"
        left_out = {i + k for i in at.values() for k in (0, 1)}
        command = shlex.join(word for i, word in enumerate(words) if i not in left_out)
        names = tuple(filter(None, about[row]["paper"].split(";")))
        runs.append((Row(row, command, about[row]["method"], about[row]["ablation"], names), int(seed)))
    commands = dict.fromkeys((row.name, row.command) for row, _ in runs)
    if len({name for name, _ in commands}) < len(commands) or len(set(runs)) < len(runs) or not runs:
        raise CommandError(f"{path}: no command at all, or a run or a row that is there twice and differs")
    title = next((line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")), path.stem)
    return CommandFile(path.stem, title, tuple(runs))


def all_commands() -> list[CommandFile]:
    """Every file of benchmark/commands. Raises: CommandError, also if two files give one row different commands."""
    files, seen = [read_commands(path) for path in sorted(COMMANDS.glob("*.sh"))], {}
    for file in files:
        for row in file.rows:
            if seen.setdefault(row.name, row) != row:
                raise CommandError(f"{file.name}.sh gives {row.name} another command than a file before it")
    return files


@cache
def bars() -> dict[str, dict[str, float]]:
    """What each row must reach, by the row's name."""
    found: dict[str, dict[str, float]] = {}
    for line in read_csv(BARS):
        found.setdefault(line["row"], {})[line["bar"]] = float(line["value"])
    return found


@cache
def load_script(path: Path):
    """The script as a module, for its Args and parse_args."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def misfit(row: Row, config: dict) -> str:
    """How a run (its config.json) differs from the row's command; empty if it doesn't.

    Flags that the run doesn't know are newer than it. Flags whose default is None are filled in by the script, and so are
    --sft-updates (0 with --sft-checkpoint) and --eval-spawn data.
    """
    if config["script"] != Path(row.script).name:
        return f"script {config['script']}"
    args = {"seed": 0, "runs": ""} | config["args"]
    wanted = dataclasses.asdict(load_script(ROOT / row.script).parse_args(row.words(args["seed"], args["runs"])[2:]))
    filled = {"sft_updates": wanted.get("sft_checkpoint"), "eval_spawn": wanted.get("eval_spawn") == "data"}
    wanted |= {name: None for name, by_script in filled.items() if by_script}
    return ", ".join(
        f"{name}={value} instead of {wanted.get(name, 'no such flag')}"
        for name, value in config["args"].items()
        if name not in BOOKKEEPING and value != wanted.get(name, "no such flag") and wanted.get(name, "") is not None
    )
