"""Runs a command file, several runs at a time: here, or in a slurm queue.

A run with a summary.json is skipped, one with a checkpoint is resumed, anything else is started, but not before the run
that its --sft-checkpoint names is finished. Each run writes its log beside its folder.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.rows import ORIGIN, ROOT, Row, UserError, command_line, misfit, read_commands, read_json  # noqa: E402
from plumbing.storage import lock  # noqa: E402

BOX = re.compile(r"╭[^\n]*╮\n(.*?)(│ ─.*?)?╰[^\n]*╯", re.DOTALL)  # tyro's message up to its first rule, and the rest
RAISED = re.compile(r"(error:|[\w.]+(Error|Exception|Interrupt)\b)")


@dataclass
class Job:
    """One run: a row and a seed. `error` says why it failed; empty while all is well."""

    row: Row
    seed: int
    runs: Path
    process: subprocess.Popen | None = None
    error: str = ""
    gpu: str = ""  # the one that it has for itself, or shares with as few others as can be

    def __post_init__(self):
        self.name = f"{self.row.name}-{self.seed}"
        self.folder = ROOT / self.runs / self.name
        self.log = ROOT / self.runs / f"{self.name}.log"
        self.words = self.row.words(self.seed, self.runs)
        # The folder of the run that this one starts from.
        self.needs = ROOT / self.words[self.words.index(ORIGIN) + 1] if ORIGIN in self.words else None

    def has(self, file: str) -> bool:
        return (self.folder / file).exists()

    def command(self) -> list[str]:
        """What continues this run, or starts it."""
        if self.has("checkpoints/latest"):
            return [*self.words[:2], "--resume", str(self.runs / self.name)]
        return [*self.words, "--seed", str(self.seed), "--runs", str(self.runs), "--run-name", self.name]

    def check(self) -> None:
        """Raises: UserError if something is in the way of this run."""
        if self.folder.exists():
            lock(self.folder).close()  # nobody else runs it
        if self.has("checkpoints/latest"):
            difference = misfit(self.row, read_json(self.folder / "config.json"))
            if difference:
                raise UserError(f"started with other flags ({difference}); move {self.folder} away to start afresh")
        elif self.needs and not (self.needs / "summary.json").exists():
            raise UserError(f"starts from {self.needs}, which isn't finished: run that first")

    def start(self) -> None:
        """Start the subprocess, in a process group of its own; sets `error` instead if something is in the way."""
        try:
            self.check()
        except UserError as error:
            self.error = str(error)
            return
        command = self.command()
        if "--resume" not in command and self.folder.exists():  # killed before its first checkpoint
            self.folder.rename(self.folder.with_name(f"{self.name}.unfinished-{time.time_ns()}"))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with self.log.open("a") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, *command[1:]], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        """Once it isn't running: fill in `error`, and say how it ended; a failure with the end of its log."""
        if self.process and self.process.returncode:
            self.error = f"exit code {self.process.returncode}: {self.reason()}"
        elif not self.error and not self.has("summary.json"):
            self.error = "ended without a summary.json"
        lines = [f"{self.name}: FAILED: {self.error}", str(self.log), *self.last_lines()]
        tqdm.write("\n".join(lines) if self.error else f"{self.name}: done")

    def last_lines(self) -> list[str]:
        """The end of the log: a progress bar in its last state, a message without the frame around it."""
        text = self.log.read_bytes()[-20_000:].decode(errors="replace") if self.log.exists() else ""
        text = BOX.sub(lambda box: "error: " + " ".join(box[1].replace("│", " ").split()), text)
        lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in text.split("\n")]
        return [line for line in lines if line.strip()][-15:]

    def reason(self) -> str:
        """The line of the log that says what went wrong."""
        lines = self.last_lines() or ["its log is empty"]
        return next((line for line in reversed(lines) if RAISED.match(line)), lines[-1])


def stop(jobs: list[Job], patience: float = 20.0) -> None:
    """End the jobs' process groups: SIGTERM, then SIGKILL after `patience` seconds. Runs write a checkpoint within 15."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for job in jobs:
            if job.running():
                os.killpg(job.process.pid, number)
        deadline = time.time() + patience
        while any(job.running() for job in jobs) and time.time() < deadline:
            time.sleep(0.05)


def gpus() -> list[str]:
    """Names of the GPUs here, or of those that CUDA_VISIBLE_DEVICES leaves."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def run_here(jobs: list[Job], workers: int) -> list[Job]:
    """Run the jobs, `workers` at a time, GPUs taking turns; returns the failed ones."""
    waiting = list(jobs)
    cards = gpus()
    started: list[Job] = []
    bar = tqdm(total=len(jobs), desc="benchmark", unit="run", mininterval=0.1 if sys.stderr.isatty() else 60)
    try:
        while waiting or started:
            for job in [job for job in started if not job.running()]:
                started.remove(job)
                job.end()
                bar.update(1)
            unfinished = {job.folder for job in [*waiting, *started]}
            for job in [job for job in waiting if job.needs not in unfinished][: workers - len(started)]:
                waiting.remove(job)
                busy = [other.gpu for other in started]
                job.gpu = min(cards, key=busy.count, default="")
                started.append(job)
                tqdm.write(f"{job.name}: {shlex.join(job.command())}")
                job.start()
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("interrupted: stopping the runs; the same command goes on with them", file=sys.stderr)
        stop(started)
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
        done = subprocess.run([*call, f"--wrap={shlex.join(words)}"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{job.name}: sbatch refuses it: {done.stderr}")
        numbers[job.folder] = done.stdout.strip().split(";")[0]
        print(f"{job.name}: queued as {numbers[job.folder]}")


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
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise UserError(f"--only {only} is no regular expression: {error}") from error
    every = [Job(row, seed, runs) for row, seed in read_commands(commands)]
    jobs = [job for job in every if pattern.search(job.row.name) and (not seeds or job.seed in seeds)]
    if not jobs:
        names = ", ".join(dict.fromkeys(job.row.name for job in every))
        raise UserError(f"--only and --seeds must leave a run of: {names}")
    todo = [job for job in jobs if not job.has("summary.json")]
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
