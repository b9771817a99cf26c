"""Runs a suite's commands for each seed, several at a time.

    python benchmark/run.py force-state --jobs 2            # all rows and seeds that are not finished yet
    python benchmark/run.py force-state --only push --seeds 1 --dry-run

A run with a summary.json is skipped, one with a checkpoint is resumed, anything else is started. Each run writes its
log beside its folder. Run suites from a clean checkout that stays as it is: every run records the commit it saw.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.suites import ROOT, Row, misfit, select, suite_of  # noqa: E402


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
    def making_demos(self) -> bool:
        """Scripts write config.json once they have their demonstrations."""
        return self.process is not None and not (self.folder / "config.json").exists()

    def command(self) -> list[str]:
        """What continues this run, or starts it."""
        if (self.folder / "checkpoints" / "latest").exists():
            return [*shlex.split(self.row.command)[:2], "--resume", str(self.runs / self.name)]
        place = ["--seed", str(self.seed), "--runs", str(self.runs), "--run-name", self.name]
        return [*shlex.split(self.row.command), *place]

    def start(self) -> None:
        """Start the subprocess, in a process group of its own; sets `error` instead if something is in the way."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        config, command = self.folder / "config.json", self.command()
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
            self.error = f"exit code {code}: {self.last_line()}"
        elif not self.done:
            self.error = "ended without a summary.json"
        return True

    def last_line(self) -> str:
        """The end of the log: its last line, or the present state of a progress bar."""
        lines = self.log.read_bytes()[-2000:].decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


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


def run_all(jobs: list[Job], parallel: int, status_seconds: float = 60.0, poll_seconds: float = 0.5) -> list[Job]:
    """Run the jobs, `parallel` at a time; returns the failed ones. Jobs of one task don't make demonstrations twice."""
    waiting, running, failed, shown, total = list(jobs), [], [], time.time(), len(jobs)
    try:
        while waiting or running:
            for job in [job for job in running if job.finished()]:
                running.remove(job)
                failed += [job] if job.error else []
                said = f"FAILED: {job.error}" if job.error else "done"
                print(f"{job.name}: {said} after {(time.time() - job.started) / 60:.1f} min", flush=True)
            busy = {job.row.env_id for job in running if job.making_demos}
            for job in waiting[:]:
                if len(running) < parallel and job.row.env_id not in busy:
                    waiting.remove(job)
                    running.append(job)
                    busy.add(job.row.env_id)
                    print(f"{job.name}: {shlex.join(job.command())}", flush=True)
                    job.start()
            if time.time() - shown > status_seconds:
                shown = time.time()
                print(f"-- {total - len(waiting) - len(running)} of {total} runs ended")
                for job in running:
                    print(f"   {job.name}: {job.last_line()}", flush=True)
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print("interrupted: stopping the runs; the same command goes on with them", file=sys.stderr)
        stop(running)
        raise
    return failed


def main(
    suite: tyro.conf.Positional[str],
    seeds: tuple[int, ...] = (),
    only: str | None = None,
    jobs: int = 1,
    runs: Path = Path("runs/benchmark"),
    dry_run: bool = False,
) -> int:
    """Run a suite of benchmark/suites.py; exit code 1 if a run failed.

    Args:
        suite: name of the suite.
        seeds: seeds to run; default: the suite's.
        only: regular expression; only rows whose name matches.
        jobs: runs at a time, one CPU core each.
        runs: folder of the run folders and logs, from the repository's root.
        dry_run: print the commands, run nothing.
    """
    chosen = suite_of(suite)
    rows = select(chosen.rows, only)
    if not rows or jobs < 1:
        names = ", ".join(row.name for row in chosen.rows)
        print(f"error: --jobs must be at least 1, and --only must match one of: {names}", file=sys.stderr)
        return 2
    # Seed by seed: the first pass over all tasks comes early.
    everything = [Job(row, seed, runs) for seed in seeds or chosen.seeds for row in rows]
    todo = [job for job in everything if not job.done]
    for job in everything:
        if job.done:
            print(f"{job.name}: finished earlier", file=sys.stderr)
    if dry_run:
        for job in todo:
            print(shlex.join(job.command()))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = run_all(todo, jobs)
    except KeyboardInterrupt:
        return 130
    for job in failed:
        print(f"FAILED {job.name}: {job.error}\n  log: {job.log}", file=sys.stderr)
    print(f"{len(everything) - len(failed)} of {len(everything)} runs finished")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
