"""The benchmark's runner, collector, tables and figures on made-up run folders and a stub script."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmark import collect, plots, rows, run, speed, stats, tables
from benchmark.rows import UserError
from plumbing.storage import lock

STUB = """
import json, os, subprocess, sys
from dataclasses import asdict, dataclass
from pathlib import Path
import tyro

@dataclass
class Args:
    env_id: str = "PushCube-v1"
    obs_mode: str = "state"
    seed: int = 1
    runs: str = "runs"
    run_name: str | None = None
    resume: str | None = None
    device: str = "cpu"
    mode: str = "ok"
    gamma: float = 0.9
    sft_checkpoint: str | None = None
    limit: int | None = None

def validate(args):
    args.limit = args.limit or 80

if __name__ == "__main__":
    args = tyro.cli(Args)
    folder = Path(args.resume or f"{args.runs}/{args.run_name}")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"script": "benchmark_stub.py", "args": asdict(args), "threads": os.environ["OMP_NUM_THREADS"]}
    config["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not args.resume:
        (folder / "config.json").write_text(json.dumps(config))
    if args.mode == "fail":
        print("progress 10 %\\rboom")
        sys.exit(3)
    if args.mode == "hang":
        worker = subprocess.Popen(["sleep", "60"])
        (folder / "worker.tmp").write_text(str(worker.pid))
        (folder / "worker.tmp").rename(folder / "worker")
        worker.wait()
    if args.mode != "silent":
        (folder / "summary.json").write_text(json.dumps({"resumed": args.resume is not None}))
"""
PLACE = "--seed $seed --runs elsewhere --run-name"


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "benchmark_stub.py"
    path.write_text(STUB)
    yield path
    sys.modules.pop("benchmark_stub", None)
    sys.path[:] = [p for p in sys.path if p != str(path.parent)]


@pytest.fixture
def suite(stub, tmp_path, monkeypatch):
    """Writes stub.sh with a row per set of flags, named by its first word; returns the file."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setattr(rows, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(rows, "COMMANDS", commands)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(rows, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(run.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))

    def register(*flags: str, bars: str = ",,,,,", seeds: str = "1") -> Path:
        names = [f.split()[0] for f in flags]
        lines = [f"python {stub} {f.partition(' ')[2]} {PLACE} {f.split()[0]}-$seed".replace("  ", " ") for f in flags]
        path = commands / "stub.sh"
        path.write_text(f"# Stub\nfor seed in {seeds}; do\n" + "\n".join(lines) + "\ndone\n")
        described = "".join(f"{name},method {name},,theirs,{bars},\n" for name in names)
        rows.ROWS.write_text(f"row,method,ablation,paper,{','.join(rows.BARS)},earlier\n{described}")
        return path

    return register


def begun(folder: Path, **args) -> Path:
    """A run with a checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("update-1")
    flags = {"env_id": "PushCube-v1", "seed": 1, "runs": str(folder.parent), "limit": 80} | args
    (folder / "config.json").write_text(json.dumps({"script": "benchmark_stub.py", "args": flags}))
    return folder


# ---- command files ----
FILES = {path.stem: path for path in sorted(rows.COMMANDS.glob("*.sh"))}
GOOD = f"python a.py {PLACE} new-$seed"


@pytest.mark.parametrize("name", FILES)
def test_a_command_file_is_what_bash_runs(name, tmp_path, capsys):
    """A python that writes down its arguments, in the place of the real one; the dry run prints the same."""
    fake = tmp_path / "python"
    fake.write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "python $*" >> "$OUT"\n')
    fake.chmod(0o755)
    environment = {"PATH": str(tmp_path), "OUT": str(tmp_path / "out")}
    subprocess.run([shutil.which("bash"), FILES[name]], env=environment, check=True)
    assert run.main(FILES[name], runs=Path("runs/benchmark"), dry_run=True) == 0
    assert capsys.readouterr().out == (tmp_path / "out").read_text()


@pytest.mark.parametrize("script", ["bc.py", "conrft.py", "co_rft_chunked.py", "force_octo.py", "force_pi0.py"])
def test_every_command_parses(script):
    commands = rows.all_commands().values()
    for row in {row for table in commands for row, _ in table if row.script == script}:
        args = rows.flags_of(script, *row.words(1, "runs")[2:])
        assert (args["env_id"], args["obs_mode"]) == (row.env_id, row.flag("--obs-mode", "rgb"))
        tuning = row.ablation.startswith("tuning")  # on episodes of its own: every other number rests on 100
        assert (args["eval_episodes"], args["eval_seed"]) == ((60, 1_500_000_000) if tuning else (100, 1_000_000_000))


def test_the_files_agree_on_rows_and_say_what_they_measure():
    found = {row for commands in rows.all_commands().values() for row, _ in commands}
    assert len({row.name for row in found}) == len({row.command for row in found}) == len(found)
    assert {line["row"] for line in rows.read_csv(rows.ROWS)} == {row.name for row in found}
    assert len({(row.label, row.env_id, row.flag("--obs-mode")) for row in found}) == len(found)  # none look alike
    assert {name for row in found for name in row.paper if name} <= {line["method"] for line in tables.PAPERS}
    assert {line["source"] for line in tables.PAPERS} <= set(tables.WORDS["sources"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("ls", "only `for seed in 1 2; do`.*: ls"),
        (GOOD, "only `for seed in 1 2; do`"),
        ("for seed in 1; do\nls\ndone", "a command is python SCRIPT.py FLAGS --seed $seed"),
        ("for seed in 1; do\npython a.py --seed 1 --runs r --run-name new-1\ndone", "a command is python SCRIPT.py"),
        ("for seed in 1; do\n" + GOOD.replace("new", "old") + "\ndone", "rows.csv has no row old"),
        ("for seed in 1 1; do\n" + GOOD + "\ndone", "a run twice"),
        ("for seed in 1; do\n" + GOOD, "only `for seed in 1 2; do`"),
        ("# nothing", "holds no command"),
        (f"for seed in 1; do\n{GOOD.replace('a.py', 'a.py --sft-checkpoint x/old-2')}\ndone", "elsewhere/ROW-$seed"),
    ],
)
def test_command_files_that_are_none(suite, tmp_path, text, message):
    path = suite("new")
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("$", r"\$")):
        run.main(path, runs=tmp_path)
    with pytest.raises(UserError, match="nowhere.sh; benchmark/commands has: stub"):
        run.main(tmp_path / "nowhere.sh", runs=tmp_path)


@pytest.mark.parametrize("trick", ["> {0}", "$(touch {0})", "`touch {0}`", "; touch {0}", "| tee {0}", "&& touch {0}"])
def test_a_command_file_is_never_executed(suite, tmp_path, trick):
    path = suite("new")
    made = tmp_path / "made"
    for text in (GOOD.replace("a.py", "a.py " + trick.format(made)), GOOD + " " + trick.format(made), f"touch {made}"):
        path.write_text(f"for seed in 1; do\n{text}\ndone\n")
        with pytest.raises(UserError, match="a command is python"):
            run.main(path, runs=tmp_path, dry_run=True)
    assert not made.exists()


# ---- the runner ----
def test_runner_skips_resumes_starts_and_reports_failures(suite, tmp_path, capsys):
    path = suite("done", "half --gamma 0.5", "new", "bad --mode fail", "empty --mode silent")
    (tmp_path / "done-1").mkdir()
    (tmp_path / "done-1" / "summary.json").write_text("untouched")
    begun(tmp_path / "half-1", gamma=0.5)
    (tmp_path / "new-1").mkdir()  # killed before its first checkpoint: kept aside
    (tmp_path / "new-1" / "metrics.csv").write_text("precious")
    assert run.main(path, runs=tmp_path, workers=2) == 1
    assert (tmp_path / "done-1" / "summary.json").read_text() == "untouched"
    assert json.loads((tmp_path / "half-1" / "summary.json").read_text()) == {"resumed": True}
    assert json.loads((tmp_path / "new-1" / "summary.json").read_text()) == {"resumed": False}
    assert json.loads((tmp_path / "new-1" / "config.json").read_text())["threads"] == "1"
    (aside,) = tmp_path.glob("new-1.unfinished-*")
    assert (aside / "metrics.csv").read_text() == "precious"
    said, errors = capsys.readouterr()
    assert f"FAILED bad-1: exit code 3: boom\n  log: {tmp_path / 'bad-1.log'}" in errors
    assert "$ python " in said[said.index("bad-1: FAILED") :]  # at once, with the end of its log
    assert "FAILED empty-1: ended without a summary.json" in errors
    assert "FAILED half" not in errors and "FAILED new" not in errors

    path = suite("done", "half --gamma 0.5", "new")
    before = sorted(tmp_path.rglob("*"))
    assert run.main(path, runs=tmp_path) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_is_told_by_its_line_not_by_the_frame_around_it(suite, tmp_path):
    ((row, seed),) = rows.read_commands(suite("new"))
    job = run.Job(row, seed, tmp_path)
    box = "╭─ Invalid choice ─╮\n│ invalid choice 'foo'. │\n│ Expected ('rgb',  │\n│ 'state').   │\n│ ──── │\n│ --help │\n╰───╯"
    job.log.write_text(f"$ python x.py\n{box}\n")
    assert job.last_lines() == ["$ python x.py", "error: invalid choice 'foo'. Expected ('rgb', 'state')."]
    assert job.reason() == job.last_lines()[-1]
    job.log.write_text("loading\nerror: --seed must be in 0..899\nbye\n")
    assert job.reason() == "error: --seed must be in 0..899"
    job.log.write_text("Traceback (most recent call last):\n  File x\nValueError: no\na worker ended, too\n")
    assert job.reason() == "ValueError: no"


def test_a_run_fits_its_row_with_all_that_the_script_fills_in():
    """Also when the run that it started from isn't there any more."""
    row = next(row for row, _ in rows.read_commands(FILES["main"]) if row.name == "force-pick-state")
    args = rows.flags_of(*row.words(3, "runs")[1:]) | {"seed": 3, "runs": "runs"}
    assert args["sft_updates"] == 0 and args["sft_checkpoint"] == "runs/bc-pick-state-50-3"
    config = {"script": row.script, "args": args}
    assert rows.misfit(row, config) == ""
    assert rows.misfit(row, config | {"args": args | {"gamma": 0.5}}) == f"gamma=0.5 instead of {args['gamma']}"
    assert rows.misfit(row, config | {"args": args | {"old": 1}}) == "old=1 instead of no such flag"
    assert rows.misfit(row, config | {"script": "bc.py"}) == "script bc.py"


def test_runner_refuses_to_resume_a_run_of_another_command_or_one_that_runs(suite, tmp_path, capsys):
    begun(tmp_path / "half-1", gamma=0.9, seed=4, runs="elsewhere")
    assert run.main(suite("half --gamma 0.5"), runs=tmp_path) == 1
    assert "started with other flags (gamma=0.9 instead of 0.5); move" in capsys.readouterr().err
    with lock(tmp_path / "half-1"):
        assert run.main(suite("half --gamma 0.9"), runs=tmp_path) == 1
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "half-1" / "summary.json").exists()


def test_a_run_waits_for_the_run_that_it_starts_from(suite, tmp_path, capsys):
    path = suite("late --sft-checkpoint elsewhere/first-$seed", "first", "other")
    assert run.main(path, runs=tmp_path, workers=3) == 0
    started = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": python" in line]
    assert started == ["first-1", "other-1", "late-1"]
    config = json.loads((tmp_path / "late-1" / "config.json").read_text())
    assert config["args"]["sft_checkpoint"] == f"{tmp_path}/first-1"

    shutil.rmtree(tmp_path / "first-1")  # a run with a checkpoint of its own doesn't need it any more
    shutil.rmtree(tmp_path / "late-1")
    begun(tmp_path / "late-1", sft_checkpoint=f"{tmp_path}/first-1")
    assert run.main(path, runs=tmp_path, only="late") == 0

    path = suite("late --sft-checkpoint elsewhere/bad-$seed", "bad --mode fail")
    shutil.rmtree(tmp_path / "late-1")
    assert run.main(path, runs=tmp_path) == 1
    assert f"FAILED late-1: starts from {tmp_path}/bad-1, which isn't finished" in capsys.readouterr().err


def test_interrupt_stops_the_runs_and_their_workers(suite, tmp_path):
    path = suite("hang --mode hang")
    worker = tmp_path / "hang-1" / "worker"

    def interrupt():
        while not worker.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run.main(path, runs=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    stat = Path(f"/proc/{worker.read_text()}/stat")
    deadline = time.time() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z":  # Z: dead and not yet reaped
        assert time.time() < deadline, "the worker lives on"
        time.sleep(0.02)


@pytest.mark.parametrize("visible, count, wanted", [
    (None, 0, [None, None, None]), (None, 2, ["0", "1", "0"]), ("5,7", 2, ["5", "7", "5"]), ("", 2, ["", "", ""]),
])  # fmt: skip
def test_gpus_take_turns(visible, count, wanted, suite, tmp_path, monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    path = suite("one", "two", "three")
    assert run.main(path, workers=3, runs=tmp_path) == 0
    found = [
        json.loads((tmp_path / f"{name}-1" / "config.json").read_text())["gpu"] for name in ("one", "two", "three")
    ]
    assert found == wanted


def test_a_free_gpu_is_taken_first(suite, tmp_path, monkeypatch):
    """Of three workers on two GPUs, the one that comes later goes to where nobody is."""
    monkeypatch.setattr(run, "gpus", lambda: ["a", "b"])
    path = suite("hold --mode hang", "short", "next")
    jobs = [run.Job(row, seed, tmp_path) for row, seed in rows.read_commands(path)]
    for job in jobs:
        job.start = lambda: None
    jobs[0].running = iter([True, True, False]).__next__
    jobs[1].running = jobs[2].running = lambda: False
    run.run_here(jobs, workers=2)
    assert [job.gpu for job in jobs] == ["a", "b", "b"]


def test_runner_rejects_what_it_does_not_know(suite, tmp_path, capsys):
    path = suite("new", "other", seeds="1 2")
    for wrong, message in (
        (dict(only="nothing"), "must leave a run of: new, other"),
        (dict(seeds=(7,)), "must leave a run of: new, other"),
        (dict(only="["), r"--only \[ is no regular expression"),
        (dict(workers=0), "--workers must be at least 1"),
        (dict(slurm=("partition",)), "--slurm NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            run.main(path, runs=tmp_path, **wrong)
    assert run.main(path, runs=tmp_path, only="ot", seeds=(2,), dry_run=True) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("--run-name other-2")


def test_a_queue_gets_a_job_per_run(suite, tmp_path, monkeypatch, capsys):
    path = suite("late --sft-checkpoint elsewhere/first-$seed", "first", "done")
    (tmp_path / "done-1").mkdir()
    (tmp_path / "done-1" / "summary.json").write_text("untouched")
    with pytest.raises(FileNotFoundError, match="sbatch"):
        run.main(path, runs=tmp_path, slurm=("partition=cpu",))
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "sbatch"
    fake.write_text(f'#!/bin/sh\nfor word; do echo "$word"; done >> {tmp_path}/asked\necho "7;cluster"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    assert run.main(path, runs=tmp_path, slurm=("partition=cpu", "time=1:00")) == 0
    assert capsys.readouterr().out == "first-1: queued as 7\nlate-1: queued as 7\n"
    asked = (tmp_path / "asked").read_text().splitlines()
    first = [word.split("=")[0] for word in asked[: asked.index("--parsable", 1)]]
    assert first == ["--parsable", "--requeue", "--job-name", "--partition", "--time", "--wrap"]
    assert "--dependency=afterok:7" in asked[len(first) :]
    call = shlex.split(asked[len(first) - 1].removeprefix("--wrap="))  # what the queue starts
    assert call[2:] == [str(path), "--only", "^first$", "--seeds", "1", "--runs", str(tmp_path)]


# ---- collecting ----
def evaluation(stage: str, step: int, success: float, episodes: int, length: float, ending: str = "") -> dict:
    rates = {"success_once": success, "success_at_end": success / 2, "num_episodes": episodes, "episode_len": length}
    return {"stage": stage, "global_step": step} | {f"eval/{name}{ending}": value for name, value in rates.items()}


def write_run(runs: Path, name: str, evaluations: list[dict], commit: str = "a" * 40, summary=(), **args) -> Path:
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"env_id": "PushCube-v1", "obs_mode": "state", "seed": int(name[-1]), "runs": "/somewhere",
             "run_name": name, "resume": None, "device": "cpu", "gamma": 0.9, "limit": 80} | args  # fmt: skip
    made = {"git_commit": commit, "packages": {"torch": "2.0", "mani_skill": "3.0"}, "gpu": None}
    (folder / "config.json").write_text(json.dumps({"script": "benchmark_stub.py", "args": flags} | made))
    last = evaluations[-1]
    found = {"success_once": last["eval/success_once"], "steps_to_success": last["eval/episode_len"],
             "demo_steps_to_success": 60.0, "seconds": 600.0, "demonstrations": "/somewhere/demos-50",
             "evaluations": evaluations}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(found | dict(summary) | made))
    return folder


def make_run(runs: Path, name: str, online: list[tuple[int, float]], **options) -> None:
    """A finished run: SFT at 50 %, hand-over after warm-up, then `online` evaluations of 100 episodes.

    online: (control steps since the run's start, success), the first at hand-over.
    """
    stages = ["warmup"] + ["online"] * (len(online) - 1)
    evaluations = [evaluation("sft", 0, 0.5, 100, 40.0), evaluation("offline", 0, 0.52, 50, 40.0)]
    evaluations += [evaluation(stage, step, rate, 100, 24.0) for stage, (step, rate) in zip(stages, online)]
    summary = {"online_env_steps": online[-1][0] - online[0][0]} | options.pop("summary", {})
    folder = write_run(runs, name, evaluations, summary=summary, **options)
    lines = [(1500 + 10 * i, 100 * (i + 1), "vgpd/zeta", i / 200) for i in range(200)]
    lines += [(1500 + 10 * i, 100 * (i + 1), "losses/actor", 1.0) for i in range(200)]
    lines += [(e["global_step"], 100 + i, "eval/success_once", 0.5) for i, e in enumerate(evaluations)]
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([collect.METRICS, *lines, (0, 100, "calib/bound_rate", 0.25)])


# Falls 15 points; at 80 % after 7,500 steps
DIPS = [(1500, 0.70), (4000, 0.82), (6500, 0.55), (9000, 0.80), (11500, 0.95)]
CLIMBS = [(1500, 0.80), (4000, 0.80), (6500, 0.99)]  # at 80 % from the start
LATE = [(1500, 0.10), (4000, 0.20), (6500, 0.90)]  # at 80 % at the end, which nothing confirms
BARS = "0.97,0.5,0,0.5,0.1,9"  # success, sft, above_sft, steps_ratio, drop, minutes


@pytest.fixture
def two_seeds(suite, tmp_path):
    """Runs of two seeds, a row that hasn't run, and a page to be filled."""
    suite("force --gamma 0.9", "other", bars=BARS, seeds="1 2 3")
    make_run(tmp_path / "runs", "force-1", DIPS)
    make_run(tmp_path / "runs", "force-2", CLIMBS)
    (tmp_path / "docs").mkdir()
    page = "# Mine\n\n<!-- begin: stub -->\nold\n<!-- end: stub -->\n\nwords after\n"
    (tmp_path / "docs" / "stub.md").write_text(page)
    return tmp_path


def collected(root: Path, **options) -> int:
    return collect.main(runs=root / "runs", **options)


def written(root: Path) -> str:
    assert tables.main() == 0
    return (root / "docs" / "stub.md").read_text()


def read(root: Path, name: str = "runs") -> stats.Lines:
    return rows.read_csv(root / "results" / f"{name}.csv")


def test_collect_writes_a_line_per_evaluation(two_seeds):
    make_run(two_seeds / "runs", "force-3", [(0, 0.1), (900, 0.9)])
    (two_seeds / "runs" / "force-3" / "summary.json").unlink()  # unfinished: left out
    assert collected(two_seeds) == 0
    lines = read(two_seeds)
    assert list(lines[0]) == collect.COLUMNS["runs"]
    shown = [(x["seed"], x["stage"], x["global_step"], x["success_once"], x["final"]) for x in lines]
    assert shown[:4] == [("1", "sft", "0", "0.5", ""), ("1", "offline", "0", "0.52", ""),
                         ("1", "online", "1500", "0.7", ""), ("1", "online", "4000", "0.82", "")]  # fmt: skip
    assert [x["final"] for x in lines if x["seed"] == "1"] == [""] * 6 + ["1"] and len(lines) == 7 + 5
    first = lines[6]
    assert (first["success_at_end"], first["episode_len"], first["seconds"]) == ("0.475", "24", "600")
    assert (first["method"], first["env_id"], first["obs_mode"]) == ("method force", "PushCube-v1", "state")
    assert first["settings"] == "limit=80" and first["demonstrations"] == "demos-50"
    assert first["versions"] == "torch 2.0, mani_skill 3.0" and first["git_commit"] == "a" * 40
    assert "/somewhere" not in (two_seeds / "results" / "runs.csv").read_text()

    diagnostics = [line for line in read(two_seeds, "diagnostics") if line["seed"] == "1"]
    zeta = [(c["global_step"], c["update_step"], c["vgpd/zeta"]) for c in diagnostics if c["vgpd/zeta"]]
    assert len(zeta) == collect.KEEP and (zeta[0], zeta[-1]) == (("1500", "100", "0.0"), ("3490", "20000", "0.995"))
    assert [c["calib/bound_rate"] for c in diagnostics if c["calib/bound_rate"]] == ["0.25"]
    assert "losses/actor" not in diagnostics[0]


def test_a_run_without_an_online_stage_has_no_hand_over(suite, tmp_path):
    suite("offline")
    write_run(tmp_path / "runs", "offline-1", [evaluation(stage, 0, 0.5, 100, 30.0) for stage in ("sft", "offline")])
    assert collected(tmp_path) == 0
    found = stats.typed(read(tmp_path))
    assert stats.result(found) is found[1] and stats.after_sft(found) is found[0]
    assert [stats.handover(found), stats.largest_drop(found), stats.steps_at_target(found)] == [None] * 3


def test_evaluations_where_objects_start_elsewhere(suite, tmp_path):
    """They are lines of their own, never the run's result, and make the right half of CO-RFT's table."""
    suite("chunked", seeds="1 2 3")
    for seed, rates in ((1, (0.5, 0.1, 0.6, 0.3)), (2, (0.5, 0.3, 0.8, 0.3))):
        found = []
        for stage, inside, outside, length in (("sft", *rates[:2], 40.0), ("offline", *rates[2:], 30.0)):
            both = evaluation(stage, 0, inside, 100, length) | evaluation(stage, 0, outside, 100, length, "_ood")
            found.append(both)
        write_run(tmp_path / "runs", f"chunked-{seed}", found, spawn="random")
    assert collected(tmp_path, allow_mixed=True) == 0  # `spawn` is no flag of the stub
    runs = {seed: run for (_, seed), run in stats.by_run(stats.typed(read(tmp_path))).items()}
    shown = [(x["spawn"], x["stage"], x["final"]) for x in runs[1]]
    assert shown == [("random", "sft", None), ("ood", "sft", None), ("random", "offline", 1), ("ood", "offline", None)]
    row = rows.Row("chunked", "python stub.py --env-id Toy-v1 --spawn fixed --eval-elsewhere", "CO-RFT")
    made = tables.entry_table("corft", [tables.Entry(row, runs, 3)]).splitlines()[-1].split(" | ")
    wanted = ["one place", "50", "70", "+20", "20", "30", "+10"]
    assert [cell.split(" (")[0] for cell in made[1:8]] == wanted
    assert made[3].endswith("2 of 3 seeds") and made[8].startswith("25 (25 to 25)")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gamma=0.8), "not the row's command: gamma=0.8 instead of 0.9"),
        (dict(limit=99), "its runs differ in settings: limit=80 | limit=99"),
        (dict(commit="b" * 40), f"its runs differ in code: {'a' * 40} | {'b' * 40}"),
        (dict(commit="a" * 40 + "-dirty"), "uncommitted code"),
        (dict(summary={"success_once": 0.5}), "summary.json disagrees with its evaluations"),
    ],
)
def test_collect_refuses_to_mix_unless_it_is_said(two_seeds, capsys, change, message):
    make_run(two_seeds / "runs", "force-2", CLIMBS, **change)
    assert collected(two_seeds) == 1
    assert message in capsys.readouterr().err
    assert not (two_seeds / "results").exists()
    assert collected(two_seeds, allow_mixed=True) == 0
    assert message in written(two_seeds)


def test_collect_never_loses_runs_of_other_files_and_machines(two_seeds):
    assert collected(two_seeds) == 0
    old = {name: read(two_seeds, name) for name in collect.COLUMNS}
    shutil.rmtree(two_seeds / "runs" / "force-1")
    make_run(two_seeds / "runs", "force-2", [(1500, 0.8), (4000, 0.9)])
    make_run(two_seeds / "runs", "other-1", CLIMBS)
    assert collected(two_seeds) == 0
    for name, lines in old.items():
        runs = stats.by_run(read(two_seeds, name))
        assert list(runs) == [("force", 1), ("force", 2), ("other", 1)]
        assert runs["force", 1] == [line for line in lines if line["seed"] == "1"]
    assert [line["success_once"] for line in read(two_seeds) if line["seed"] == "2"][-2:] == ["0.8", "0.9"]  # replaced


def test_same_code_in_two_commits_is_not_a_mix(monkeypatch, tmp_path):
    place = tmp_path / "a user's folder; touch made"
    place.mkdir()

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", place, *identity, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (place / "backbones").mkdir()
    (place / "backbones" / "b.py").write_text("1")
    commits = []
    for name, text in (("s.py", "1"), ("README.md", "x"), ("s.py", "2"), ("plumbing/p.py", "1")):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
        git("add", "-A")
        git("commit", "-qm", name)
        commits.append(git("rev-parse", "HEAD"))
    monkeypatch.setattr(collect, "ROOT", place)
    collect.code_of.cache_clear()
    first, words, script, plumbing = (collect.code_of(commit, "s.py") for commit in commits)
    collect.code_of.cache_clear()
    assert first == words and len({words, script, plumbing}) == 3 and len(first) == 12


# ---- files that are torn, empty or another program's ----
def test_no_results_leave_the_documents_alone(two_seeds):
    assert collected(two_seeds) == 0
    page = written(two_seeds)
    path = two_seeds / "results" / "runs.csv"
    text = path.read_text()
    header, first, second, *_ = text.splitlines()
    broken = {
        "": "it has no column", header + "\n": "holds no runs", "a,b\n1,2\n": "it has no column",
        text[: len(text) // 2].rpartition(",")[0]: "is torn", f"{header}\n{first[:-1]}": "is torn",
        f"{header}\n{second.replace(',0.52,', ',half,')}\n": "line 2, is torn or another file's",
    }  # fmt: skip
    for content, message in broken.items():
        path.write_text(content)
        for tool in (tables, plots):
            with pytest.raises(UserError, match=message):
                tool.main()
    path.unlink()
    with pytest.raises(UserError, match="can't be read as a CSV"):
        tables.main()
    assert (two_seeds / "docs" / "stub.md").read_text() == page


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"script": "bench'), ("config.json", "[1]"), ("config.json", '{"script": "x"}'),
    ("summary.json", "{}"), ("summary.json", '{"evaluations": 3}'), ("metrics.csv", "a,b\n"), ("metrics.csv", "\x00"),
])  # fmt: skip
def test_collect_names_the_file_that_is_no_runs(two_seeds, name, content):
    (two_seeds / "runs" / "force-2" / name).write_text(content)
    with pytest.raises(UserError, match=r"force-2"):
        collected(two_seeds)
    assert not (two_seeds / "results").exists()


def test_tools_end_in_one_line_and_code_2():
    command = [sys.executable, str(rows.ROOT / "benchmark" / "run.py"), str(FILES["main"]), "--only", "["]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --only [ is no") and done.stderr.count("\n") == 1


# ---- statistics ----
def pooled(successes: int, episodes: int) -> stats.Measured:
    return stats.pooled([{"success_once": successes / episodes, "num_episodes": episodes}])


def test_difference_of_two_rates_has_the_published_interval():
    """Newcombe, Statistics in Medicine 17 (1998), table II, method 10: 56/70 against 48/80, and 10/10 against 0/10."""
    for (a, m), (b, n), wanted in (((48, 80), (56, 70), (0.2, 0.0524, 0.3339)), ((0, 10), (10, 10), (1, 0.6075, 1))):
        assert stats.difference(pooled(a, m), pooled(b, n)) == pytest.approx(wanted, abs=5e-5)


def final(rate: float, episodes: int = 100) -> stats.Lines:
    return [{"final": 1.0, "success_once": rate, "num_episodes": float(episodes)}]


def test_a_paired_difference_draws_seeds_and_episodes():
    """Rates of 0 and 1 leave no luck to episodes: of two pairs, +1 and 0, a quarter of the draws has either one twice."""
    none, all_of_them = final(0.0), final(1.0)
    assert stats.paired_difference([(none, all_of_them), (none, none)]) == (0.5, 0, 1)
    assert stats.paired_difference([(none, all_of_them)] * 5) == (1, 1, 1)
    # Equal pairs leave none to seeds: the mean of m differences of two rates from n episodes has the variance
    # (p (1 - p) + q (1 - q)) / (n m).
    value, low, high = stats.paired_difference([(final(0.5), final(0.8))] * 4)
    deviation = ((0.25 + 0.16) / 400) ** 0.5
    assert value == pytest.approx(0.3) and (low, high) == pytest.approx(
        (0.3 - 1.96 * deviation, 0.3 + 1.96 * deviation), abs=3e-3
    )


def test_a_paired_ratio_is_a_geometric_mean_with_students_interval():
    """Ratios of 1/2 and 1/4, in logarithms 1.5 -+ 0.5 times log 1/2: standard error 0.5 log 2, and t = 12.706 of 1 degree."""
    value, low, high = stats.paired_ratio([(40.0, 20.0), (40.0, 10.0)])
    assert value == pytest.approx(0.5**1.5)
    assert (low, high) == pytest.approx((0.5 ** (1.5 + 0.5 * 12.7062), 0.5 ** (1.5 - 0.5 * 12.7062)), rel=1e-4)


def test_numbers_of_a_run(two_seeds):
    make_run(two_seeds / "runs", "force-3", LATE)
    assert collected(two_seeds) == 0
    first, second, third = (run for _, run in sorted(stats.by_run(stats.typed(read(two_seeds))).items()))
    assert stats.largest_drop(first) == pytest.approx(0.70 - 0.55) and stats.largest_drop(second) == 0
    assert stats.before_handover(first) == 1500
    assert stats.steps_at_target(first) == (7500, True)  # 82 % at 2,500 doesn't hold; 80 % at 7,500 does
    assert stats.steps_at_target(second) == (0, True)
    assert stats.steps_at_target(third) == (5000, False)
    # Wilson, 95 of 100: (0.95 + z^2/200 -+ z sqrt(0.95 * 0.05 / 100 + z^2/40000)) / (1 + z^2/100) with z = 1.959964
    assert pooled(95, 100) == pytest.approx((0.95, 0.888250, 0.978456), abs=2e-6)
    assert stats.pooled([stats.result(first), stats.result(second)]) == pytest.approx(pooled(194, 200))
    assert stats.pooled([]) is None


def test_censored_runs_count_in_the_statistics():
    # Kaplan-Meier by hand: at 2 one of four gets there (3/4), one is lost from sight at 3, at 4 one of two (3/8).
    times = [(2.0, True), (3.0, False), (4.0, True), (6.0, False)]
    at, share = stats.survival(times)
    assert share[np.searchsorted(at, 2, "right") - 1] == pytest.approx(3 / 4)
    assert share[np.searchsorted(at, 4, "right") - 1] == pytest.approx(3 / 8)
    assert stats.median_time(times) == 4
    assert stats.restricted_mean(times, 6) == pytest.approx(2 + 2 * 3 / 4 + 2 * 3 / 8)
    assert stats.restricted_mean(times, 3) == pytest.approx(2 + 3 / 4)
    # Dropped instead of censored, the late runs would make the method look faster.
    assert stats.restricted_mean([t for t in times if t[1]], 6) < stats.restricted_mean(times, 6)
    lost = [(5.0, False), (5.0, False), (5.0, True)]
    assert stats.median_time(lost) is None and stats.restricted_mean([(5.0, False)], 4) == 4
    assert stats.median_time([(0.0, True)]) == 0 == stats.restricted_mean([(0.0, True)], 4)


def test_interquartile_mean_and_its_bootstrap():
    scores = [[0.0, 0.0], [0.5, 0.5], [0.8, 1.0]]  # of six sorted scores the middle four count
    value, low, high = stats.bootstrap_iqm(scores)
    assert value == pytest.approx((0 + 0.5 + 0.5 + 0.8) / 4)
    # Runs are drawn within their task, so only the last task varies: (1, 1) comes up in a quarter of the draws.
    assert (low, high) == pytest.approx((0.45, (0 + 0.5 + 0.5 + 1) / 4))
    assert stats.bootstrap_iqm(scores) == (value, low, high)


# ---- tables and figures ----
def test_table_matches_hand_computed_numbers(two_seeds):
    assert collected(two_seeds) == 0
    page = written(two_seeds)
    assert page.startswith("# Mine\n\n<!-- begin: stub -->\n") and page.endswith("<!-- end: stub -->\n\nwords after\n")
    assert "\nold\n" not in page
    # mean of 95 and 99 %; Wilson interval of 194 of 200
    row = next(line for line in page.splitlines() if line.startswith("|") and "method force" in line)
    shown = [cell.strip() for cell in row.strip("|").split("|")]
    assert shown[2:4] == ["97 (93.6–98.6), 2 of 3 seeds", "1: 95, 2: 99"]
    assert shown[4:7] == ["48.5", "50 (43.1–56.9)", "1: 70, 2: 80"]
    assert shown[7:12] == ["1: 15, 2: 0", "60.0", "40.0", "24.0", "60"]
    assert shown[12:14] == ["1: 7500, 2: 0 (at hand-over)", "1: 10, 2: 10"]
    assert [line for line in page.splitlines() if "method other" in line] == ["Note: not run yet: method other ()."]
    verdicts = [line.split(" | ")[-1] for line in page.splitlines() if "met, 2 of" in line or "met**, 2 of" in line]
    assert verdicts == ["met, 2 of 3 seeds |"] * 4 + ["**not met**, 2 of 3 seeds |"] * 2
    assert "| success never more than 10 points below hand-over | 15 points | **not met**" in page
    assert "whole run within 9 minutes | 10.0 minutes | **not met**" in page


def row_and_run(name: str, rate: float, command: str = "", task: str = "A-v1"):
    """A row and its finished run: SFT of 50 %, then `rate` of 100 episodes."""
    line = {"row": name, "seed": 1, "num_episodes": 100.0, "demo_steps_to_success": 40.0, "global_step": 0.0}
    run = [line | {"stage": "sft", "success_once": 0.5, "episode_len": 40.0, "final": None},
           line | {"stage": "online", "success_once": rate, "episode_len": 20.0, "final": 1.0}]  # fmt: skip
    return rows.Row(name, f"python x.py --env-id {task} {command}", name.partition("-")[0]), run


def test_steps_of_too_few_successes_and_cloned_heads_that_were_thrown_away_are_left_out():
    """A mean of nine successes isn't one, and with none at all the recorded length is the time limit."""
    row, rare = row_and_run("a", 0.09, "--fresh-head")
    other, enough = row_and_run("b", 0.10)
    assert tables.Entry(row, {1: rare}, 1).steps is None and tables.Entry(row, {1: enough}, 1).steps == 20.0
    assert tables.Entry(row, {1: rare, 2: enough}, 2).steps == 20.0
    assert tables.CELLS["after_sft"](tables.Entry(row, {1: rare}, 1)) == "–"
    assert tables.CELLS["after_sft"](tables.Entry(other, {1: rare}, 1)).startswith("50 (")


def test_the_readme_has_tasks_that_all_three_methods_have_run_on():
    """Of few demonstrations too; another method, an ablation, and a task without FORCE or a seed stay out."""
    methods = ("BC", "ConRFT (no HIL)", "FORCE")
    main = [row_and_run(f"{method}-a", 0.75, task="A-v1") for method in (*methods, "PA")]
    main += [row_and_run(f"{method}-b", 0.75, task="B-v1") for method in methods[:2]]
    force, run = row_and_run("FORCE-d", 0.5, task="A-v1")
    main.append((replace(force, ablation="no VGPD"), run))
    few = [row_and_run(f"{method}-c", 0.25, "--num-demos 20", "A-v1") for method in methods]
    few = [(replace(row, ablation="20 demonstrations"), run) for row, run in few]
    few += [row_and_run(f"{method}-e", 0.5, "--num-demos 10", "A-v1") for method in methods]
    made = {"main": main, "few-state": few}
    book = {name: [tables.Entry(row, {1: run}, 1) for row, run in found] for name, found in made.items()}
    book["few-state"][-1].wanted = 2
    lines = tables.short_block(book).splitlines()
    assert lines[0] == "| Method | A from 50 | A from 20 |" and len(lines) == 5
    assert lines[4] == "| FORCE | 75 % in 20.0 steps | 25 % in 20.0 steps |"


def test_interquartile_means_compare_complete_methods_only():
    made = [row_and_run(f"{method}-{task}", 0.5, task=task) for method in ("one", "two") for task in ("A-v1", "B-v1")]
    entries = [tables.Entry(row, {1: run}, 1) for row, run in made]
    shown = tables.aggregate(entries)
    assert "| one | 50 (one seed) | 2 |" in shown and "| two |" in shown
    entries[3].runs = {}
    assert "| one |" in tables.aggregate(entries) and "| two |" not in tables.aggregate(entries)
    entries[0].runs = {}
    assert tables.aggregate(entries) == ""


def test_a_bar_names_the_budget_that_was_measured_not_todays_default():
    row, finished = row_and_run("force-x", 0.5)
    finished[1] |= {"settings": "gamma=0.9 online_steps=5000 q_weight=0.1"}
    judged = tables.bar_row(tables.Entry(row, {1: finished}, 1), "success", 0.6)
    assert judged[2:] == ["success at least 60 % within 5,000 online env steps", "50 %", "**not met**"]
    for name in rows.BARS:  # nothing is known of runs that never succeed, or have no SFT
        finished[:] = [finished[-1] | {"success_once": 0.0, "demo_steps_to_success": None, "seconds": 60.0}]
        assert tables.bar_row(tables.Entry(row, {1: finished}, 1), name, 0.5)[4] == "**not met**"


def test_check_sees_a_stale_page_and_a_stale_figure(two_seeds):
    figures = two_seeds / "docs" / "figures"
    assert collected(two_seeds) == 0
    assert plots.main() == 0
    first = {path: path.read_bytes() for path in figures.iterdir()}
    assert {path.name for path in first} == {"stub.png"}
    page = written(two_seeds)
    assert plots.main() == 0 and written(two_seeds) == page
    assert {path: path.read_bytes() for path in first} == first  # the same bytes again
    assert tables.main(check=True) == plots.main(check=True) == 0
    make_run(two_seeds / "runs", "force-2", [(1500, 0.8), (4000, 0.9)])
    assert collected(two_seeds) == 0
    assert tables.main(check=True) == plots.main(check=True) == 1
    assert (two_seeds / "docs" / "stub.md").read_text() == page
    assert {path: path.read_bytes() for path in first} == first


def test_all_figures_can_be_drawn_from_few_numbers(two_seeds, monkeypatch):
    monkeypatch.setattr(plots, "OVERVIEW", ("stub",))
    for seed in (1, 2):
        with (two_seeds / "runs" / f"force-{seed}" / "metrics.csv").open("a", newline="") as file:
            names = ("values/q_data", "values/mc_return", "values/q_std", "vgpd/candidate_std")
            lines = [(1501 + 10 * i, 300 + i, name, 0.1 * i + len(name)) for i in range(5) for name in names]
            lines += [(1500, u, f"calib/{name}", 0.1) for u in (250, 290) for name in ("q_minus_return", "correlation")]
            csv.writer(file).writerows(lines)
    assert collected(two_seeds) == 0 and plots.main() == 0
    names = {path.stem for path in (two_seeds / "docs" / "figures").iterdir()}
    assert names == {"stub", "calibration", "distillation"}


def test_the_operators_figure_needs_an_operator(tmp_path, monkeypatch):
    """Runs with an operator beside those without on the same task; none without interventions."""
    names = ["conrft-pick-state", "conrft-pick-state-oracle"]
    line = {"seed": 1, "stage": "online", "success_once": 0.5, "final": 1.0}
    finished = [line | {"row": name, "global_step": step} for name in names for step in (100.0, 200.0)]
    monkeypatch.setattr(plots, "read_results", lambda: stats.by_run(finished))
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for rate in (0.0, 0.5):
        columns = "train/success_once,train/episode_len,values/q_data,values/mc_return,vgpd/zeta,intervention/rate"
        lines = [f"row,seed,update_step,global_step,{columns}"]
        for name in names:
            share = rate if name.endswith("oracle") else 0.0
            lines += [f"{name},1,{i},{100 + 10 * i},0.{i},{30 + i},,,,{share}" for i in range(5)]
        (tmp_path / "diagnostics.csv").write_text("\n".join(lines) + "\n")
        found = plots.curves(plots.Data())
        assert ("operator" in found) == (rate > 0)
    assert [row.name for row in found["operator"][1]] == names


def test_documentation_is_up_to_date_and_complete():
    assert tables.main(check=True) == 0
    assert plots.main(check=True) == 0
    pages = [rows.ROOT / "README.md", *rows.DOCS.rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    for name in [*FILES, *tables.COMPARISONS]:
        assert text.count(f"<!-- begin: {name} -->") == 1, name
    for picture in (rows.DOCS / "figures").iterdir():
        assert f"figures/{picture.name})" in text, picture.name


def test_broken_markers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(tables.COMPARISONS, "a", lambda book: r"back\1slash")
    page = tmp_path / "page.md"
    begin, end = "<!-- begin: a -->\n", "<!-- end: a -->\n"
    for text in (begin, f"{end}{begin}", begin + begin + end, begin + end.replace("a", "b")):
        page.write_text(text)
        with pytest.raises(UserError, match="page.md: each <!-- begin: NAME --> needs"):
            tables.updated(page, {})
    page.write_text(f"x\n{begin}old\n{end}y")
    assert tables.updated(page, {}) == f"x\n{begin}{tables.MADE}\n\nback\\1slash\n{end}y"
    page.write_text(f"{begin}{end}".replace("a -->", "what -->"))
    with pytest.raises(UserError, match="there is nothing called what"):
        tables.updated(page, {})


# ---- speed ----
def test_speed_measures_all_and_writes_a_page(tmp_path):
    page = tmp_path / "page.md"
    assert speed.main(rounds=1, out=page) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    ratios = [float(shown[3].split()[0]) for shown in lines if len(shown) == 4 and re.match(r"[\d.]+ \(", shown[3])]
    assert len(ratios) == 10 and ratios.count(1) >= 3 and min(ratios) > 0
    bounds = [[float(cell) for cell in shown[1:]] for shown in lines if shown[0].startswith("K = ") and len(shown) == 5]
    assert len(bounds) == 5 and all(flops > 0.1 and ratio > 1 for flops, _, _, ratio in bounds)
    assert [bound[0] for bound in bounds] == sorted(bound[0] for bound in bounds)  # more candidates, more work
    assert "torch" in page.read_text() and str(tmp_path) not in page.read_text()
