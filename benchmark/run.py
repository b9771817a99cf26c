"""Runs a command file, several runs at a time: here, or in a slurm queue.

    python benchmark/run.py benchmark/commands/force-state.sh --workers 2        # what isn't finished yet
    python benchmark/run.py benchmark/commands/main.sh --only push --seeds 1 --dry-run
    python benchmark/run.py benchmark/commands/main.sh --slurm partition=cpu time=10:00:00    # a job per run

A run with a summary.json is skipped, one with a checkpoint is resumed, anything else is started, but not before the run
that its --sft-checkpoint names is finished. Each run writes its log beside its folder. Start from a clean checkout that
stays as it is: every run records the commit it saw.
"""

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.rows import ORIGIN, ROOT, Row, UserError, command_line, misfit, read_commands, read_json  # noqa: E402

TAIL = 15  # lines of a failed run's log that are shown
BOX = re.compile(
    r"╭[^\n]*╮\n(.*?)(│ ─.*?)?╰[^\n]*╯", re.DOTALL
)  # a message of tyro's up to its first rule, and the rest
RAISED = re.compile(r"(error:|[\w.]+(Error|Exception|Interrupt)\b)")


def locked(path: Path) -> TextIO | None:
    """The file, open and locked for as long as it, or a process that inherits it, lives; None if another has the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@dataclass
class Job:
    """One run: a row and a seed. `error` says why it failed; empty while all is well."""

    row: Row
    seed: int
    runs: Path
    process: subprocess.Popen | None = None
    started: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.row.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return ROOT / self.runs / self.name

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.name}.log")

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def needs(self) -> Path | None:
        """The folder of the run that this one starts from."""
        words = self.row.words(self.seed, self.runs)
        return ROOT / words[words.index(ORIGIN) + 1] if ORIGIN in words else None

    @property
    def resumed(self) -> bool:
        return (self.folder / "checkpoints" / "latest").exists()

    def command(self) -> list[str]:
        """What continues this run, or starts it."""
        words = self.row.words(self.seed, self.runs)
        if self.resumed:
            return [*words[:2], "--resume", str(self.runs / self.name)]
        return [*words, "--seed", str(self.seed), "--runs", str(self.runs), "--run-name", self.name]

    def obstacle(self) -> str:
        """Why the run can't start or go on; empty if it can. Raises: UserError if its config.json is torn."""
        if self.resumed:
            difference = misfit(self.row, read_json(self.folder / "config.json"))
            return difference and f"started with other flags ({difference}); move {self.folder} away to start afresh"
        if self.needs and not (self.needs / "summary.json").exists():
            return f"starts from {self.needs}, which isn't finished: run that first"
        return ""

    def start(self) -> None:
        """Start the subprocess, in a process group of its own; sets `error` instead if something is in the way."""
        self.started = time.time()
        log = locked(self.log)  # the child inherits it
        self.error = self.obstacle() if log else "is already being run by another process"
        if self.error:
            return
        if (
            self.folder.exists() and not self.resumed
        ):  # killed before its first checkpoint; scripts don't write over a run
            self.folder.rename(self.folder.with_name(f"{self.name}.unfinished-{time.time_ns()}"))
        command = self.command()
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        self.process = subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

    def finished(self) -> bool:
        """True once the subprocess has ended, or couldn't be started; fills in `error`."""
        code = self.process.poll() if self.process else 0
        if code:
            self.error = f"exit code {code}: {self.reason()}"
        elif code == 0 and not self.error and not self.done:
            self.error = "ended without a summary.json"
        return code is not None

    def last_lines(self) -> list[str]:
        """The end of the log: a progress bar in its last state, a message without the frame around it."""
        text = self.log.read_bytes()[-20_000:].decode(errors="replace") if self.log.exists() else ""
        text = BOX.sub(lambda box: "error: " + " ".join(box[1].replace("│", " ").split()), text)
        lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in text.split("\n")]
        return [line for line in lines if line.strip()][-TAIL:]

    def reason(self) -> str:
        """The line of the log that says what went wrong."""
        lines = self.last_lines() or ["its log is empty"]
        return next((line for line in reversed(lines) if RAISED.match(line)), lines[-1])


def stop(jobs: list[Job], patience: float = 20.0) -> None:
    """End the jobs' process groups: SIGTERM, then SIGKILL after `patience` seconds. Runs write a checkpoint within 15."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [job.process for job in jobs if job.process and job.process.poll() is None]
        for process in running:
            os.killpg(process.pid, number)
        deadline = time.time() + patience
        while any(process.poll() is None for process in running) and time.time() < deadline:
            time.sleep(0.05)


def report(job: Job) -> None:
    """Say how a run ended, at once; a failure with the end of its log."""
    minutes = (time.time() - job.started) / 60
    if not job.error:
        tqdm.write(f"{job.name}: done after {minutes:.1f} min")
        return
    told = [f"{job.name}: FAILED after {minutes:.1f} min: {job.error}", str(job.log), *job.last_lines()]
    tqdm.write("\n".join(told))


def run_here(jobs: list[Job], workers: int, poll_seconds: float = 0.5) -> list[Job]:
    """Run the jobs, `workers` at a time; returns the failed ones."""
    waiting = list(jobs)
    running: list[Job] = []
    bar = tqdm(total=len(jobs), desc="benchmark", unit="run", mininterval=0.1 if sys.stderr.isatty() else 60)
    try:
        while waiting or running:
            for job in [job for job in running if job.finished()]:
                running.remove(job)
                report(job)
                bar.update(1)
            unfinished = {job.folder for job in [*waiting, *running]}
            for job in [job for job in waiting if job.needs not in unfinished][: workers - len(running)]:
                waiting.remove(job)
                running.append(job)
                tqdm.write(f"{job.name}: {shlex.join(job.command())}")
                job.start()
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print("interrupted: stopping the runs; the same command goes on with them", file=sys.stderr)
        stop(running)
        raise
    finally:
        bar.close()
    return [job for job in jobs if job.error]


def submit(jobs: list[Job], commands: Path, options: tuple[str, ...]) -> None:
    """A slurm job for each run, after the run that it starts from; one that is preempted goes on. Raises: UserError."""
    numbers: dict[Path, str] = {}
    for job in sorted(jobs, key=lambda job: job.needs is not None):
        alone = ["--only", f"^{job.row.name}$", "--seeds", str(job.seed), "--runs", str(job.runs)]
        words = [sys.executable, str(Path(__file__).resolve()), str(commands.resolve()), *alone]
        call = ["sbatch", "--parsable", "--requeue", f"--job-name={job.name}", *(f"--{option}" for option in options)]
        if job.needs in numbers:
            call.append(f"--dependency=afterok:{numbers[job.needs]}")
        try:
            done = subprocess.run([*call, f"--wrap={shlex.join(words)}"], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("--slurm needs the program sbatch: start it where jobs are submitted") from error
        if done.returncode:
            raise UserError(f"{job.name}: sbatch refuses it: {done.stderr}")
        numbers[job.folder] = done.stdout.strip().split(";")[0]
        print(f"{job.name}: queued as {numbers[job.folder]}")


def chosen(commands: Path, only: str, seeds: tuple[int, ...], runs: Path) -> list[Job]:
    """The jobs of a command file that --only and --seeds leave. Raises: UserError if there are none."""
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UserError(f"--only {only} is no regular expression: {error}") from error
    jobs = [Job(row, seed, runs) for row, seed in read_commands(commands).runs]
    kept = [job for job in jobs if pattern.search(job.row.name) and (not seeds or job.seed in seeds)]
    if not kept:
        names = ", ".join(dict.fromkeys(job.row.name for job in jobs))
        raise UserError(f"--only and --seeds must leave a run of: {names}")
    return kept


def main(
    commands: tyro.conf.Positional[Path],
    workers: int = 1,
    only: str = "",
    seeds: tuple[int, ...] = (),
    runs: Path = Path("runs/benchmark"),
    slurm: tuple[str, ...] = (),
    dry_run: bool = False,
) -> int:
    """Run a command file; exit code 1 if a run failed.

    Args:
        commands: command file, see benchmark/commands.
        workers: runs at a time, one CPU core each.
        only: regular expression; only rows whose name matches.
        seeds: only these seeds of the file.
        runs: folder of the run folders and logs, from the repository's root.
        slurm: submit a job for each run, with these options of sbatch, for example partition=cpu time=10:00:00.
        dry_run: print the commands, run nothing.
    """
    if workers < 1 or not all("=" in option for option in slurm):
        raise UserError("--workers must be at least 1, and --slurm NAME=VALUE ...")
    jobs = chosen(commands, only, seeds, runs)
    todo = [job for job in jobs if not job.done]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs were finished earlier", file=sys.stderr)
    if dry_run:
        for job in todo:
            print(shlex.join(job.command()))
        return 0
    if slurm:
        submit(todo, commands, slurm)
        return 0
    failed = run_here(todo, workers)
    for job in failed:
        print(f"FAILED {job.name}: {job.error}\n  log: {job.log}", file=sys.stderr)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs finished")
    return int(bool(failed))


if __name__ == "__main__":
    command_line(main)
