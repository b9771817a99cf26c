"""Runs a command file, several runs at a time: here, or in a slurm queue.

    python benchmark/run.py benchmark/commands/force-state.sh --workers 2        # what isn't finished yet
    python benchmark/run.py benchmark/commands/main.sh --only push --seeds 1 --dry-run
    python benchmark/run.py benchmark/commands/main.sh --launcher slurm --workers 20 --slurm partition=cpu timeout_min=600

A run with a summary.json is skipped, one with a checkpoint is resumed, anything else is started, but not before the run
that its --sft-checkpoint names is finished. Each run writes its log beside its folder. Start from a clean checkout that
stays as it is: every run records the commit it saw.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.rows import ORIGIN, ROOT, CommandError, Row, misfit, read_commands, read_csv  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "runs.csv"  # how long runs took before, for the time left
TAIL = 15  # lines of a failed run's log that are shown


@dataclass
class Job:
    """One run: a row and a seed. `error` says why it failed; empty while all is well."""

    row: Row
    seed: int
    runs: Path
    process: subprocess.Popen | None = None
    started: float = field(default_factory=time.time)
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.row.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        return ROOT / self.runs / self.name

    @property
    def log(self) -> Path:
        return ROOT / self.runs / f"{self.name}.log"

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def needs(self) -> Path | None:
        """The folder of the run that this one starts from."""
        words = self.row.words(self.seed, self.runs)
        return ROOT / words[words.index(ORIGIN) + 1] if ORIGIN in words else None

    @property
    def making_demos(self) -> bool:
        """Scripts write config.json once they have their demonstrations."""
        return self.process is not None and not (self.folder / "config.json").exists()

    def command(self) -> list[str]:
        """What continues this run, or starts it."""
        if (self.folder / "checkpoints" / "latest").exists():
            return [*self.row.words(self.seed, self.runs)[:2], "--resume", str(self.runs / self.name)]
        place = ["--seed", str(self.seed), "--runs", str(self.runs), "--run-name", self.name]
        return [*self.row.words(self.seed, self.runs), *place]

    def start(self) -> None:
        """Start the subprocess, in a process group of its own; sets `error` instead if something is in the way."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        config, command = self.folder / "config.json", self.command()
        if self.needs and "--resume" not in command and not (self.needs / "summary.json").exists():
            self.error = f"starts from {self.needs}, which isn't finished: run that first"
            return
        with self.log.open("a") as log:
            try:  # the child inherits the lock, so it holds for as long as the run lives
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.error = "is already being run by another process"
                return
            if config.exists() and "--resume" in command:
                if difference := misfit(self.row, json.loads(config.read_text())):
                    self.error = f"started with other flags ({difference}); move {self.folder} away to start afresh"
                    return
            elif config.exists():  # killed before its first checkpoint; scripts don't write over a run
                self.folder.rename(self.folder.with_name(f"{self.name}.unfinished-{time.time_ns()}"))
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            self.started = time.time()
            self.process = subprocess.Popen(
                [sys.executable, *command[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def finished(self) -> bool:
        """True once the subprocess has ended; fills in `error`."""
        if self.process is None or (code := self.process.poll()) is None:
            return self.process is None
        if code:
            self.error = f"exit code {code}: {self.last_lines(1)}"
        elif not self.done:
            self.error = "ended without a summary.json"
        return True

    def last_lines(self, count: int) -> str:
        """The end of the log, a progress bar in its last state."""
        lines = self.log.read_bytes()[-20_000:].decode(errors="replace").split("\n") if self.log.exists() else []
        shown = [line.rstrip("\r").split("\r")[-1].rstrip() for line in lines]
        return "\n".join([line for line in shown if line.strip()][-count:])


def stop(jobs: list[Job], patience: float = 10.0) -> None:
    """End the jobs' process groups: SIGTERM, then SIGKILL after `patience` seconds. Checkpoints are atomic."""
    running = [job.process for job in jobs if job.process and job.process.poll() is None]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, number)
        deadline = time.time() + patience
        while any(p.poll() is None for p in running) and time.time() < deadline:
            time.sleep(0.05)


class Progress:
    """A bar over runs with the time left, from what runs of the row, else of the script, else any runs have taken."""

    def __init__(self, total: int, workers: int):
        self.workers, self.seconds = workers, {}
        for line in read_csv(RESULTS) if RESULTS.exists() else []:
            if line["final"] and line["seconds"]:
                self.learn(line["row"], line["command"].split()[1], float(line["seconds"]))
        shape = "{desc}: {n_fmt} of {total_fmt} runs |{bar:20}| {elapsed}{postfix}"
        refresh = dict(mininterval=0.1 if sys.stderr.isatty() else 60)
        self.bar = tqdm(total=total, desc="benchmark", bar_format=shape, file=sys.stderr, **refresh)

    def learn(self, row: str, script: str, seconds: float) -> None:
        for key in (row, script, ""):
            self.seconds.setdefault(key, []).append(seconds)

    def left(self, waiting: list[Job], running: list[Job]) -> float | None:
        """Seconds until the last run ends; None before anything is known."""
        if not self.seconds:
            return None
        jobs = [(job, time.time() - job.started if job in running else 0.0) for job in (*waiting, *running)]
        known = [
            (self.seconds.get(j.row.name) or self.seconds.get(j.row.script) or self.seconds[""], t) for j, t in jobs
        ]
        due = [max(float(np.mean(seconds)) - passed, 0.0) for seconds, passed in known]
        return max(sum(due) / self.workers, max(due, default=0.0))

    def show(self, waiting: list[Job], running: list[Job]) -> None:
        left = self.left(waiting, running)
        text = (
            "time left not known yet"
            if left is None
            else f"about {left // 3600:.0f} h {left % 3600 // 60:.0f} min left"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(0)

    def say(self, text: str) -> None:
        self.bar.clear()
        print(text, flush=True)

    def ended(self, job: Job, measured: bool = True) -> None:
        """Say how a run ended; a failure with the end of its log, at once. `measured`: it began when it was started."""
        seconds = time.time() - job.started
        if job.error:
            self.say(
                f"{job.name}: FAILED after {seconds / 60:.1f} min: {job.error}\n{job.log}:\n{job.last_lines(TAIL)}"
            )
        else:
            if measured:
                self.learn(job.row.name, job.row.script, seconds)
            self.say(f"{job.name}: done after {seconds / 60:.1f} min")
        self.bar.update(1)


def run_here(jobs: list[Job], workers: int, poll_seconds: float = 0.5) -> list[Job]:
    """Run the jobs, `workers` at a time; returns the failed ones. Jobs of one task don't make demonstrations twice."""
    waiting, running, failed, progress = list(jobs), [], [], Progress(len(jobs), workers)
    try:
        while waiting or running:
            for job in [job for job in running if job.finished()]:
                running.remove(job)
                failed += [job] if job.error else []
                progress.ended(job)
            busy = {job.row.env_id for job in running if job.making_demos}
            for job in waiting[:]:
                early = job.needs in {other.folder for other in (*waiting, *running)}
                if len(running) < workers and job.row.env_id not in busy and not early:
                    waiting.remove(job)
                    running.append(job)
                    busy.add(job.row.env_id)
                    progress.say(f"{job.name}: {shlex.join(job.command())}")
                    job.start()
            progress.show(waiting, running)
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print("interrupted: stopping the runs; the same command goes on with them", file=sys.stderr)
        stop(running)
        raise
    finally:
        progress.bar.close()
    return failed


@dataclass
class QueuedJob:
    """What one slurm job does: call() runs a job to its end and returns its error; preempted, it is queued again."""

    job: Job

    def __call__(self) -> str:
        job = self.job
        (ROOT / job.runs).mkdir(parents=True, exist_ok=True)
        with (ROOT / job.runs / f".demos-{job.row.env_id}.lock").open("a") as lock:  # one job of a task makes them
            fcntl.flock(lock, fcntl.LOCK_EX)
            job.start()
            while job.making_demos and not job.finished():
                time.sleep(0.5)
        while not job.finished():
            time.sleep(0.5)
        return job.error

    def checkpoint(self, *_):
        from submitit.helpers import DelayedSubmission

        stop([self.job])
        return DelayedSubmission(QueuedJob(Job(self.job.row, self.job.seed, self.job.runs)))


def run_in_queue(jobs: list[Job], workers: int, options: dict, cluster: str = "slurm", poll_seconds: float = 10.0):
    """Submit the jobs as one array, `workers` of them at a time; waits for all and returns the failed ones.

    The queue's own logs go to RUNS/slurm. `options` are submitit's. Raises: CommandError without submitit or a queue.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        import submitit

        executor = submitit.AutoExecutor(ROOT / jobs[0].runs / "slurm", cluster=cluster)
        parallel = {"slurm_array_parallelism": workers} if cluster == "slurm" else {}
        executor.update_parameters(**dict(name="benchmark", cpus_per_task=1, timeout_min=24 * 60) | parallel | options)
    except ImportError as error:
        raise CommandError(f"--launcher slurm needs a package: pip install submitit ({error})") from error
    except (RuntimeError, NameError, ValueError) as error:  # no slurm here, or a parameter that it doesn't know
        raise CommandError(f"--launcher slurm: {error}") from error
    entries = executor.submit_array([QueuedJob(job) for job in jobs])
    queued, failed, progress = list(zip(jobs, entries, strict=True)), [], Progress(len(jobs), workers)
    for job, entry in queued:
        progress.say(f"{job.name}: queued as {entry.job_id}")
    try:
        while queued:
            for job, entry in [pair for pair in queued if pair[1].done()]:
                queued.remove((job, entry))
                job.error = f"the queue lost it: {lost}" if (lost := entry.exception()) else entry.result()
                failed += [job] if job.error else []
                progress.ended(job, measured=False)
            progress.show([job for job, _ in queued], [])
            time.sleep(poll_seconds if queued else 0)
    except KeyboardInterrupt:
        print("interrupted: cancelling the jobs; the same command goes on with them", file=sys.stderr)
        for _, entry in queued:
            entry.cancel()
        raise
    finally:
        progress.bar.close()
    return failed


def main(
    commands: tyro.conf.Positional[Path],
    workers: int = 1,
    launcher: Literal["local", "slurm"] = "local",
    only: str | None = None,
    seeds: tuple[int, ...] = (),
    runs: Path = Path("runs/benchmark"),
    slurm: tuple[str, ...] = (),
    dry_run: bool = False,
) -> int:
    """Run a command file; exit code 1 if a run failed.

    Args:
        commands: command file, see benchmark/commands.
        workers: runs at a time, one CPU core each.
        launcher: local: processes of this machine. slurm: jobs of a queue, by the package submitit.
        only: regular expression; only rows whose name matches.
        seeds: only these seeds of the file.
        runs: folder of the run folders and logs, from the repository's root.
        slurm: parameters of submitit as NAME=VALUE, for example partition=cpu.
        dry_run: print the commands, run nothing.
    """
    try:
        everything = [Job(row, seed, runs) for row, seed in read_commands(commands).runs]
        chosen = [
            job for job in everything if re.search(only or "", job.row.name) and job.seed in (seeds or {job.seed})
        ]
        if not chosen or workers < 1 or not all("=" in word for word in slurm):
            names = ", ".join(dict.fromkeys(job.row.name for job in everything))
            raise CommandError(
                f"--workers must be at least 1, --slurm NAME=VALUE, and --only and --seeds must leave a run of: {names}"
            )
        todo = [job for job in chosen if not job.done]
        for job in chosen:
            if job.done:
                print(f"{job.name}: finished earlier", file=sys.stderr)
        if dry_run:
            for job in todo:
                print(shlex.join(job.command()))
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if launcher == "slurm" and todo:
            options = {name: int(v) if v.isdigit() else v for name, _, v in (word.partition("=") for word in slurm)}
            failed = []
            for part in ([job for job in todo if not job.needs], [job for job in todo if job.needs]):
                failed += run_in_queue(part, workers, options) if part else []
        else:
            failed = run_here(todo, workers)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for job in failed:
        print(f"FAILED {job.name}: {job.error}\n  log: {job.log}", file=sys.stderr)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} runs finished")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
