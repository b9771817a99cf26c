"""The benchmark's runner, collector, tables and figures on made-up run folders and a stub script."""

import contextlib
import csv
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import collect, plots, rows, run, speed, stats, tables

STUB = """
import json, os, subprocess, sys, time
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

def parse_args(argv=None):
    return tyro.cli(Args, args=argv)

if __name__ == "__main__":
    args, started = parse_args(), time.time()
    folder = Path(args.resume or f"{args.runs}/{args.run_name}")
    folder.mkdir(parents=True, exist_ok=True)
    if args.mode == "slow":
        time.sleep(0.4)
    threads = os.environ["OMP_NUM_THREADS"]
    config = {"script": "benchmark_stub.py", "args": asdict(args), "threads": threads, "time": [started, time.time()]}
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


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "benchmark_stub.py"
    path.write_text(STUB)
    yield path
    sys.modules.pop("benchmark_stub", None)
    sys.path[:] = [p for p in sys.path if p != str(path.parent)]


@pytest.fixture
def suite(stub, tmp_path, monkeypatch):
    """Writes benchmark/commands/stub.sh with a row per set of flags, named by its first word; returns the file."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("ROWS", "BARS"):
        monkeypatch.setattr(rows, name, tmp_path / f"{name.lower()}.csv")
    monkeypatch.setattr(rows, "COMMANDS", commands)
    monkeypatch.setattr(run.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))

    def register(*flags: str, bars: str = "", seeds: str = "1") -> Path:
        names = [f.split()[0] for f in flags]
        place = "--seed $seed --runs elsewhere --run-name"
        lines = [f"python {stub} {f.partition(' ')[2]} {place} {n}-$seed" for n, f in zip(names, flags, strict=True)]
        (path := commands / "stub.sh").write_text(f"# Stub\nfor seed in {seeds}; do\n" + "\n".join(lines) + "\ndone\n")
        described = "".join(f"{n},method {n},,theirs\n" for n in dict.fromkeys(names))
        (tmp_path / "rows.csv").write_text(f"row,method,ablation,paper\n{described}")
        (tmp_path / "bars.csv").write_text(f"row,bar,value\n{bars}")
        rows.bars.cache_clear()
        return path

    yield register
    rows.bars.cache_clear()


# ---- command files ----
FILES = {path.stem: path for path in sorted(rows.COMMANDS.glob("*.sh"))}


@pytest.mark.parametrize("name", FILES)
def test_dry_run_prints_every_command_and_each_parses(name, tmp_path, capsys):
    assert run.main(FILES[name], runs=tmp_path / "runs", dry_run=True) == 0
    printed, file = capsys.readouterr().out.splitlines(), rows.read_commands(FILES[name])
    for line, (row, seed) in zip(printed, file.runs, strict=True):
        command = row.command.replace("'$runs/", f"{tmp_path}/runs/").replace("$seed'", str(seed))
        assert line == f"{command} --seed {seed} --runs {tmp_path}/runs --run-name {row.name}-{seed}"
        _, script, *words = shlex.split(line)
        args = importlib.import_module(Path(script).stem).parse_args(words)
        assert (args.env_id, args.obs_mode, args.seed) == (row.env_id, row.obs_mode, seed)
        assert args.eval_episodes == 100  # every number in a table rests on that many
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_command_file_is_what_bash_runs(name, tmp_path):
    """A python that writes down its arguments, in the place of the real one."""
    fake = tmp_path / "python"
    fake.write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "python $*" >> "$OUT"\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    subprocess.run([shutil.which("bash"), FILES[name]], env={"PATH": str(tmp_path), "OUT": str(out)}, check=True)
    place = "--seed {1} --runs runs/benchmark --run-name {0.name}-{1}"
    wanted = [
        f"{row.command} {place.format(row, seed)}".replace("'$runs/", "runs/benchmark/").replace("$seed'", str(seed))
        for row, seed in rows.read_commands(FILES[name]).runs
    ]
    assert out.read_text().splitlines() == wanted


def test_the_files_agree_on_rows_and_say_what_they_measure():
    files = rows.all_commands()
    found = {row for file in files for row in file.rows}
    assert len({row.name for row in found}) == len({row.command for row in found}) == len(found)
    assert {line["row"] for line in rows.read_csv(rows.ROWS)} == {row.name for row in found}
    assert set(rows.bars()) <= {row.name for row in found}
    labels = [(row.label, row.env_id, row.obs_mode) for row in found]
    assert len(set(labels)) == len(labels)  # no two rows of one task look alike
    papers = {(line["method"], line["metric"]) for line in rows.read_csv(tables.PAPERS)}
    known = {method for method, _ in papers}
    assert {name for row in found for name in row.paper} <= known


def test_the_main_file_is_the_whole_grid():
    file = rows.read_commands(FILES["main"])
    tasks = {"PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1"}
    methods = {
        "BC",
        "Cal-QL, offline only",
        "ConRFT (no HIL)",
        "FORCE",
        "FORCE, no warm-up",
        "FORCE, no VGPD",
        "CO-RFT",
    }
    assert {(row.env_id, row.label) for row in file.rows} == {(task, method) for task in tasks for method in methods}
    assert all(file.seeds(row) == [1, 2, 3] and row.obs_mode == "state" for row in file.rows)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ls", "only loops and python commands"),
        ("python a.py --seed 1 --runs r", "each command needs --seed, --runs, --run-name once"),
        ("python a.py --seed 1 --runs r --run-name new-2", "--run-name must be ROW-SEED, not new-2 with --seed 1"),
        ("python a.py --seed 1 --runs r --run-name old-1", "rows.csv has no row old"),
        ("python a.py --seed 1 --runs r --run-name new-1\n" * 2, "a run or a row that is there twice"),
        ("# nothing", "no command at all"),
        (
            "python a.py --sft-checkpoint other/old-2 --seed 1 --runs r --run-name new-1",
            "must be RUNS/ROW-1, not other/old-2",
        ),
    ],
)
def test_command_files_that_are_none(suite, tmp_path, capsys, text, message):
    path = suite("new")
    path.write_text(text)
    assert run.main(path, runs=tmp_path) == 2
    assert message in capsys.readouterr().err
    assert run.main(tmp_path / "nowhere.sh", runs=tmp_path) == 2
    assert "nowhere.sh; benchmark/commands has: stub" in capsys.readouterr().err


def test_paper_numbers_have_the_papers_averages():
    """As printed in the papers; a half may have been rounded either way."""
    papers = tables.Papers()

    def means(source: str, metric: str) -> dict[str, float]:
        return {m: float(np.mean(list(found.values()))) for m, found in papers.grid(source, metric).items()}

    force = {"Octo BC": 3.58, "pi0 BC": 42.5, "pi0.5 BC": 44.17, "Cal-QL": 45.2, "CQL": 15.7, "PA-RL": 50.2,
             "ConRFT (no HIL)": 71.1, "FORCE (Octo)": 82.3, "FORCE (pi0)": 86.9}  # fmt: skip
    assert means("FORCE T1", "success_percent") == pytest.approx(force, abs=0.051)
    assert means("FORCE T2", "success_percent") == pytest.approx(
        {"BC": 45.0, "halfway": 48.3, "FORCE": 98.3}, abs=0.051
    )
    assert means("FORCE T2", "steps_to_success") == pytest.approx(
        {"BC": 112.8, "halfway": 115.2, "FORCE": 38.9}, abs=0.051
    )
    conrft = {"SFT": 39.4, "Cal-ConRFT": 39.4, "HG-DAgger": 65, "PA-RL": 71.3, "HIL-ConRFT": 96.3}
    assert means("ConRFT T1", "success_percent") == pytest.approx(conrft, abs=0.051)
    lengths = {"SFT": 59.9, "Cal-ConRFT": 57.5, "HG-DAgger": 56.3, "PA-RL": 51.1, "HIL-ConRFT": 30.7}
    assert means("ConRFT T1", "steps_to_success") == pytest.approx(lengths, abs=0.051)
    averages = {"random_ind": 75, "random_ood": 63.3, "fixed_ind": 78.7, "fixed_ood": 23.3}
    for name, average in averages.items():
        assert means("CO-RFT T1", f"{name}_success_percent")["CO-RFT"] == pytest.approx(average, abs=0.051)
    steps = papers.grid("FORCE T3", "steps_at_80")
    reduction = 1 - sum(steps["FORCE"].values()) / sum(steps["w/o Pre-Cal"].values())
    claim = next(line for line in papers.lines if line["metric"] == "steps_at_80_reduction_percent")
    assert 100 * reduction == pytest.approx(float(claim["value"]))
    assert {line["source"] for line in papers.lines} == set(tables.SOURCES)


# ---- the runner ----
def test_runner_skips_resumes_starts_and_reports_failures(suite, tmp_path, capsys):
    path = suite("done", "half --gamma 0.5", "new", "bad --mode fail", "empty --mode silent")
    (tmp_path / "done-1").mkdir()
    (tmp_path / "done-1" / "summary.json").write_text("untouched")
    (tmp_path / "half-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "half-1" / "checkpoints" / "latest").write_text("update-1")
    config = {"script": "benchmark_stub.py", "args": {"gamma": 0.5, "seed": 1, "env_id": "PushCube-v1"}}
    (tmp_path / "half-1" / "config.json").write_text(json.dumps(config))

    assert run.main(path, runs=tmp_path, workers=2) == 1
    assert (tmp_path / "done-1" / "summary.json").read_text() == "untouched"
    assert json.loads((tmp_path / "half-1" / "summary.json").read_text()) == {"resumed": True}
    assert json.loads((tmp_path / "new-1" / "summary.json").read_text()) == {"resumed": False}
    assert json.loads((tmp_path / "new-1" / "config.json").read_text())["threads"] == "1"
    said, errors = capsys.readouterr()
    assert f"FAILED bad-1: exit code 3: boom\n  log: {tmp_path / 'bad-1.log'}" in errors
    at_once = said[said.index("bad-1: FAILED after") :]
    assert "$ python " in at_once and at_once.index("boom") < len(at_once)  # with the end of its log
    assert "0 of 4 runs" in errors and "4 of 4 runs" in errors and "min left" in errors  # the bar
    assert "FAILED empty-1: ended without a summary.json" in errors
    assert "FAILED half" not in errors and "FAILED new" not in errors
    assert (tmp_path / "bad-1.log").read_text().startswith("$ python ")

    path = suite("done", "half --gamma 0.5", "new")
    before = sorted(tmp_path.rglob("*"))
    assert run.main(path, runs=tmp_path) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_runner_keeps_a_run_without_a_checkpoint_aside(suite, tmp_path):
    path = suite("new")
    (tmp_path / "new-1").mkdir()
    (tmp_path / "new-1" / "config.json").write_text("{}")
    (tmp_path / "new-1" / "metrics.csv").write_text("precious")
    assert run.main(path, runs=tmp_path) == 0
    (aside,) = tmp_path.glob("new-1.unfinished-*")
    assert (aside / "metrics.csv").read_text() == "precious"
    assert (tmp_path / "new-1" / "summary.json").exists()


@pytest.mark.parametrize("name, filled", [("force-pick", {"sft_updates": 0}), ("corft-pick", {"eval_spawn": "random"})])
def test_what_a_script_fills_in_is_no_difference(name, filled):
    (row,) = [row for row in rows.read_commands(FILES["main"]).rows if row.name == f"{name}-state"]
    args = vars(rows.load_script(rows.ROOT / row.script).parse_args(row.words(3, "runs")[2:])) | filled
    assert args["seed"] == 1 and "$" not in str(args)  # the seed is bookkeeping
    config = {"script": row.script, "args": args | {"seed": 3, "runs": "runs"}}
    assert rows.misfit(row, config) == ""
    config["args"] |= {"gamma": 0.5}
    assert rows.misfit(row, config).startswith("gamma=0.5 instead of")


def test_runner_refuses_to_resume_a_run_of_another_command(suite, tmp_path, capsys):
    path = suite("half --gamma 0.5")
    (tmp_path / "half-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "half-1" / "checkpoints" / "latest").write_text("update-1")
    config = {"script": "benchmark_stub.py", "args": {"gamma": 0.9, "limit": 7, "seed": 4, "runs": "elsewhere"}}
    (tmp_path / "half-1" / "config.json").write_text(json.dumps(config))
    assert run.main(path, runs=tmp_path) == 1
    assert "started with other flags (gamma=0.9 instead of 0.5); move" in capsys.readouterr().err
    assert not (tmp_path / "half-1" / "summary.json").exists()


def test_runner_does_not_make_the_same_demonstrations_twice(suite, tmp_path, capsys):
    push = "--env-id PushCube-v1 --mode slow"
    path = suite(f"push {push}", f"again {push} --gamma 0.5", "pull --env-id PullCube-v1")
    assert run.main(path, runs=tmp_path, workers=3) == 0
    started = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": python" in line]
    assert started == ["push-1", "pull-1", "again-1"]  # another task doesn't wait
    first, second = (json.loads((tmp_path / f"{n}-1" / "config.json").read_text())["time"] for n in ("push", "again"))
    assert second[0] > first[1]  # started once the first had its demonstrations


def test_a_run_waits_for_the_run_that_it_starts_from(suite, tmp_path, capsys):
    first = "--env-id PushCube-v1 --mode slow"
    path = suite("late --sft-checkpoint elsewhere/first-$seed", f"first {first}", "other --env-id PullCube-v1")
    assert run.main(path, runs=tmp_path, workers=3) == 0
    started = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": python" in line]
    assert started == ["first-1", "other-1", "late-1"]
    config = json.loads((tmp_path / "late-1" / "config.json").read_text())
    assert config["args"]["sft_checkpoint"] == f"{tmp_path}/first-1"
    assert config["time"][0] >= (tmp_path / "first-1" / "summary.json").stat().st_mtime
    (row,) = [row for row in rows.read_commands(path).rows if row.name == "late"]
    assert not rows.misfit(row, config)
    assert "sft_checkpoint" in rows.misfit(row, config | {"args": config["args"] | {"sft_checkpoint": "first-2"}})

    (tmp_path / "late-1" / "summary.json").unlink()
    (tmp_path / "late-1" / "checkpoints").mkdir()
    (tmp_path / "late-1" / "checkpoints" / "latest").write_text("update-1")
    shutil.rmtree(tmp_path / "first-1")  # a run with a checkpoint of its own doesn't need it any more
    assert run.main(path, runs=tmp_path, only="late") == 0

    path = suite("late --sft-checkpoint elsewhere/bad-$seed", "bad --mode fail")
    shutil.rmtree(tmp_path / "late-1")
    assert run.main(path, runs=tmp_path) == 1
    assert f"FAILED late-1: starts from {tmp_path}/bad-1, which isn't finished" in capsys.readouterr().err


def test_runner_leaves_a_run_that_is_already_running_alone(suite, tmp_path, capsys):
    import fcntl

    path = suite("new")
    with (tmp_path / "new-1.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        assert run.main(path, runs=tmp_path) == 1
    assert "already being run" in capsys.readouterr().err
    assert not (tmp_path / "new-1").exists()


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
        assert run.main(path, runs=tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    stat, deadline = Path(f"/proc/{worker.read_text()}/stat"), time.time() + 5
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone; or Z, dead and not yet reaped
        while stat.read_text().split()[2] != "Z":
            assert time.time() < deadline, "the worker lives on"
            time.sleep(0.02)


def test_runner_rejects_what_it_does_not_know(suite, tmp_path, capsys):
    path = suite("new", "other", seeds="1 2")
    for wrong in (dict(only="nothing"), dict(workers=0), dict(seeds=(7,)), dict(slurm=("partition",))):
        assert run.main(path, runs=tmp_path, **wrong) == 2
    assert "must leave a run of: new, other" in capsys.readouterr().err
    assert run.main(path, runs=tmp_path, only="ot", seeds=(2,), dry_run=True) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("--run-name other-2")


def test_time_left_counts_what_runs_what_waits_and_who_works(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "none.csv")
    file = rows.read_commands(suite("a", "b", "c"))
    a, b, c = (run.Job(row, seed, tmp_path) for row, seed in file.runs)
    progress = run.Progress(3, workers=2)
    assert progress.left([a, b], []) is None
    progress.learn("a", a.row.script, 100.0)
    progress.learn("b", b.row.script, 200.0)
    now = time.time()
    monkeypatch.setattr(run.time, "time", lambda: now)
    a.started = now - 40
    assert progress.left([b, c], [a]) == pytest.approx((60 + 200 + 150) / 2)  # c: the mean of its script
    assert progress.left([b], []) == 200  # one run can't be shared
    progress.bar.close()


class Queue:
    """In the place of the package submitit: jobs run in threads of this process."""

    made: list = []

    class AutoExecutor:
        def __init__(self, folder, cluster):
            self.parameters = {"folder": folder, "cluster": cluster}
            Queue.made.append(self)

        def update_parameters(self, **parameters):
            if "nonsense" in parameters:
                raise NameError("unknown parameter nonsense")
            self.parameters |= parameters

        def submit_array(self, works):
            return [Queue.Entry(work) for work in works]

    class Entry:
        job_id = "7"

        def __init__(self, work):
            import pickle

            self.work, self.answer = pickle.loads(pickle.dumps(work)), None  # it travels to another machine
            self.thread = threading.Thread(target=lambda: setattr(self, "answer", self.work()))
            self.thread.start()

        def done(self):
            return not self.thread.is_alive()

        def exception(self):
            return None

        def result(self):
            return self.answer


def test_a_queue_runs_the_same_file(suite, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", Queue)
    push = "--env-id PushCube-v1 --mode slow"
    path = suite(f"push {push}", f"again {push} --gamma 0.5", "bad --mode fail", "done")
    (tmp_path / "done-1").mkdir()
    (tmp_path / "done-1" / "summary.json").write_text("untouched")
    options = dict(launcher="slurm", workers=3, slurm=("timeout_min=60", "partition=cpu"))
    assert run.main(path, runs=tmp_path, **options) == 1
    said, errors = capsys.readouterr()
    assert "FAILED bad-1: exit code 3: boom" in errors and "3 of 4 runs finished" in said
    wanted = {
        "cluster": "slurm",
        "slurm_array_parallelism": 3,
        "timeout_min": 60,
        "partition": "cpu",
        "cpus_per_task": 1,
    }
    assert wanted.items() <= Queue.made[-1].parameters.items()
    times = sorted(json.loads((tmp_path / f"{n}-1" / "config.json").read_text())["time"] for n in ("push", "again"))
    assert times[1][0] > times[0][1]  # one of them made the demonstrations
    assert run.main(path, runs=tmp_path, launcher="slurm", slurm=("nonsense=1",)) == 2
    assert "unknown parameter nonsense" in capsys.readouterr().err


def test_a_queue_gets_runs_that_start_from_others_later(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", Queue)
    path = suite("late --sft-checkpoint elsewhere/first-$seed", "first --env-id PushCube-v1 --mode slow")
    assert run.main(path, runs=tmp_path, launcher="slurm", workers=2) == 0
    first, late = ((tmp_path / f"{name}-1" / "summary.json").stat().st_mtime for name in ("first", "late"))
    assert late > first


def test_a_queue_needs_its_package(suite, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run.main(suite("new"), runs=tmp_path, launcher="slurm") == 2
    assert "pip install submitit" in capsys.readouterr().err


def test_a_preempted_job_is_queued_again(suite, tmp_path, monkeypatch):
    helpers = types.SimpleNamespace(DelayedSubmission=lambda work: work)
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(helpers=helpers))
    ((row, seed),) = rows.read_commands(suite("hang --mode hang")).runs
    work = run.QueuedJob(run.Job(row, seed, tmp_path))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not (tmp_path / "hang-1" / "worker").exists():
        time.sleep(0.02)
    again = work.checkpoint()
    thread.join()
    assert work.job.process.returncode == -signal.SIGTERM
    assert (again.job.name, again.job.process, again.job.error) == ("hang-1", None, "")


# ---- collecting ----
def evaluation(stage: str, global_step: int, success: float, episodes: int, length: float) -> dict:
    return {"stage": stage, "global_step": global_step, "eval/success_once": success,
            "eval/success_at_end": success / 2, "eval/success_once_low": 0.0, "eval/success_once_high": 1.0,
            "eval/num_episodes": episodes, "eval/episode_len": length}  # fmt: skip


def make_run(runs: Path, name: str, online: list[tuple[int, float]], commit: str = "a" * 40, **args) -> None:
    """A finished run: SFT at 50 %, hand-over after 1,500 steps of warm-up, then `online` evaluations of 100 episodes.

    online: (control steps since the run's start, success), the first at hand-over.
    """
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"env_id": "PushCube-v1", "obs_mode": "state", "seed": int(name[-1]), "runs": "/somewhere",
             "run_name": name, "resume": None, "device": "cpu", "mode": "ok", "gamma": 0.9,
             "limit": 80} | args  # fmt: skip
    made = {"git_commit": commit, "packages": {"torch": "2.0", "mani_skill": "3.0"}, "gpu": None}
    config = {"script": "benchmark_stub.py", "args": flags, "demonstrations": "/somewhere/demos-50"} | made
    (folder / "config.json").write_text(json.dumps(config))
    evaluations = [evaluation("sft-head", 0, 0.5, 100, 40.0), evaluation("offline", 0, 0.52, 50, 40.0)]
    evaluations += [evaluation("online", step, rate, 100, 24.0) for step, rate in online]
    summary = {"success_once": online[-1][1], "steps_to_success": 24.0, "demo_steps_to_success": 60.0, "seconds": 600.0,
               "online_env_steps": online[-1][0] - 1500, "env_steps": online[-1][0],
               "evaluations": evaluations}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | made))
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = [(1500 + 10 * i, 100 * (i + 1), "vgpd/zeta", i / 200) for i in range(200)]
        rows += [(1500 + 10 * i, 100 * (i + 1), "losses/actor", 1.0) for i in range(200)] + [
            (0, 100, "calib/bound_rate", 0.25)
        ]
        csv.writer(file).writerows([("global_step", "update_step", "name", "value"), *rows])


# Falls 15 points; at 80 % after 7,500 steps
DIPS = [(1500, 0.70), (4000, 0.82), (6500, 0.55), (9000, 0.80), (11500, 0.95)]
CLIMBS = [(1500, 0.80), (4000, 0.80), (6500, 0.99)]  # at 80 % from the start
LATE = [(1500, 0.10), (4000, 0.20), (6500, 0.90)]  # at 80 % at the end, which nothing confirms
BARS = "force,success,0.97\nforce,sft,0.5\nforce,above_sft,1\nforce,steps_ratio,0.5\nforce,drop,0.1\nforce,minutes,9\n"


@pytest.fixture
def two_seeds(suite, tmp_path):
    """Runs of two seeds, a row that hasn't run, and a page to be filled."""
    suite("force --gamma 0.9", "other", bars=BARS, seeds="1 2")
    make_run(tmp_path / "runs", "force-1", DIPS)
    make_run(tmp_path / "runs", "force-2", CLIMBS)
    (tmp_path / "docs").mkdir()
    page = "# Mine\n\n<!-- begin: stub -->\nold\n<!-- end: stub -->\n\nwords after\n"
    (tmp_path / "docs" / "stub.md").write_text(page)
    return tmp_path


def collected(root: Path, **options) -> int:
    return collect.main(runs=root / "runs", results=root / "results", **options)


def written(root: Path, **options) -> str:
    assert tables.main(root / "results", root, **options) == 0
    return (root / "docs" / "stub.md").read_text()


def read(root: Path, name: str = "runs") -> stats.Lines:
    return rows.read_csv(root / "results" / f"{name}.csv")


def test_collect_writes_a_line_per_evaluation(two_seeds):
    make_run(two_seeds / "runs", "force-3", [(0, 0.1), (900, 0.9)])
    (two_seeds / "runs" / "force-3" / "summary.json").unlink()  # unfinished: left out
    assert collected(two_seeds) == 0
    lines = read(two_seeds)
    assert list(lines[0]) == list(collect.COLUMNS)
    shown = [(x["seed"], x["stage"], x["global_step"], x["success_once"], x["num_episodes"], x["final"]) for x in lines]
    assert shown[:3] == [("1", "sft-head", "0", "0.5", "100", ""), ("1", "offline", "0", "0.52", "50", ""),
                         ("1", "online", "1500", "0.7", "100", "")]  # fmt: skip
    assert [x["final"] for x in lines if x["seed"] == "1"] == [""] * 6 + ["1"] and len(lines) == 7 + 5
    first = lines[6]
    assert (first["success_at_end"], first["episode_len"], first["seconds"]) == ("0.475", "24", "600")
    assert (first["method"], first["env_id"], first["obs_mode"]) == ("method force", "PushCube-v1", "state")
    assert first["settings"] == "limit=80" and first["demonstrations"] == "demos-50"
    assert first["versions"] == "torch 2.0, mani_skill 3.0" and first["git_commit"] == "a" * 40
    assert first["update_step"] == "" and first["wall_s"] == ""  # the run doesn't tell: not made up
    assert lines[0]["config_hash"] == lines[7]["config_hash"]  # seeds have the same
    assert "/somewhere" not in (two_seeds / "results" / "runs.csv").read_text()

    diagnostics = [line for line in read(two_seeds, "diagnostics") if line["seed"] == "1"]
    zeta = [(c["global_step"], c["update_step"], c["vgpd/zeta"]) for c in diagnostics if c["vgpd/zeta"]]
    assert len(zeta) == collect.KEEP and (zeta[0], zeta[-1]) == (("1500", "100", "0.0"), ("3490", "20000", "0.995"))
    assert [c["calib/bound_rate"] for c in diagnostics if c["calib/bound_rate"]] == ["0.25"]
    assert "losses/actor" not in diagnostics[0]


def test_collect_knows_when_an_evaluation_was_made(suite, tmp_path):
    """From the logs: the update, and the seconds without the pause between a kill and the resumption."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    suite("force --gamma 0.9")
    make_run(tmp_path / "runs", "force-1", [(1500, 0.7), (4000, 0.9)])
    folder = tmp_path / "runs" / "force-1"
    logged = [(0, 6000, 0.5), (0, 6300, 0.52), (1500, 6300, 0.7), (4000, 7000, 0.9)]  # two on one update
    with (folder / "metrics.csv").open("a", newline="") as file:
        csv.writer(file).writerows([g, u, "eval/success_once", x] for g, u, x in logged)
    (folder / "tensorboard").mkdir()
    files = {"100": [(100, None), (160, 6000)], "1000": [(1000, None), (1030, 6300), (1050, 6300), (1090, 7000)]}
    for start, events in files.items():
        with (folder / "tensorboard" / f"events.out.tfevents.{start}.host.1.0").open("wb") as file:
            for wall, update in events:
                event = Event(wall_time=wall, step=update or 0)
                if update:
                    event.summary.value.add(tag="eval/success_once", simple_value=0.5)
                RecordWriter(file).write(event.SerializeToString())
    assert collected(tmp_path) == 0
    assert [(x["update_step"], x["wall_s"]) for x in read(tmp_path)] == [
        ("6000", "60"), ("6300", "90"), ("6300", "110"), ("7000", "150"),
    ]  # fmt: skip


def test_runs_without_stages_and_runs_that_select_a_policy(suite, tmp_path):
    suite("bc", "select")
    base = [{k: v for k, v in evaluation("x", 0, rate, 100, 30.0).items() if "/" in k} for rate in (0.5, 0.9, 0.7)]
    for name, more in (("bc", {}), ("select", {"select": "td-error"})):
        make_run(tmp_path / "runs", f"{name}-1", [(0, 0.7)], gamma=0.9, **more)
        path = tmp_path / "runs" / f"{name}-1" / "summary.json"
        summary = {k: v for k, v in json.loads(path.read_text()).items() if k in ("git_commit", "packages", "seconds")}
        chosen = [{"update": 10 * (i + 1)} | e for i, e in enumerate(base)]
        if more:
            picks = ("last", "td-error", "last")
            chosen = [e | {"stage": "offline", "select": pick} for e, pick in zip(chosen, picks, strict=True)]
        path.write_text(json.dumps(summary | {"evaluations": chosen}))
    assert collected(tmp_path, allow_mixed=True) == 0  # `select` is no flag of the stub
    cloned, selected = stats.by_run(read(tmp_path)).values()
    assert [x["stage"] for x in cloned] == ["bc"] * 3 and [x["update_step"] for x in cloned] == ["10", "20", "30"]
    assert stats.result(cloned)["success_once"] == "0.7" and stats.result(selected)["success_once"] == "0.9"
    for value in (
        stats.after_sft(cloned),
        stats.handover(cloned),
        stats.largest_drop(cloned),
        stats.steps_at_target(cloned),
    ):
        assert value is None


def test_evaluations_where_objects_start_elsewhere(suite, tmp_path):
    """They are lines of their own, never the run's result, and make the right half of CO-RFT's table."""
    suite("chunked")
    where = [(stage, pick, place) for stage, pick in (("sft", "last"), ("offline", "last"), ("offline", "td-error"))
             for place in ("random", "ood")]  # fmt: skip
    for seed, rates in ((1, (0.5, 0.1, 0.6, 0.3, 0.9, 0.8)), (2, (0.5, 0.3, 0.8, 0.3, 0.9, 0.8))):
        make_run(tmp_path / "runs", f"chunked-{seed}", [(0, 0.5)], gamma=0.9, select="last", eval_spawn="random")
        path = tmp_path / "runs" / f"chunked-{seed}" / "summary.json"
        summary = {k: v for k, v in json.loads(path.read_text()).items() if k in ("git_commit", "packages", "seconds")}
        found = [evaluation(stage, 0, rate, 100, 40.0 if stage == "sft" else 30.0) | {"select": pick, "spawn": place}
                 for rate, (stage, pick, place) in zip(rates, where, strict=True)]  # fmt: skip
        path.write_text(json.dumps(summary | {"evaluations": found}))
        names = "", "_ood", "", "_ood", "_selected", "_selected_ood"
        lines = [f"0,{u},eval/success_once{name},{rate}" for u, name, rate in zip((6, 6, 9, 9, 9, 9), names, rates)]
        metrics = ["global_step,update_step,name,value", "0,6,eval/success_once_low_ood,0.01", *lines]
        (path.parent / "metrics.csv").write_text("\n".join(metrics) + "\n")
    assert collected(tmp_path, allow_mixed=True) == 0  # `select` and `eval_spawn` are no flags of the stub
    runs = stats.by_run(read(tmp_path))
    one = runs["chunked", 1]
    assert [(x["spawn"], x["update_step"], x["final"]) for x in one] == [
        ("random", "6", ""), ("ood", "6", ""), ("random", "9", "1"), ("ood", "9", ""), ("random", "9", ""), ("ood", "9", ""),
    ]  # fmt: skip
    assert [x["success_once"] for x in stats.elsewhere(one)] == ["0.1", "0.3"]
    row = rows.Row("chunked", "python stub.py --env-id Toy-v1 --spawn fixed --eval-elsewhere", "CO-RFT")
    file = rows.CommandFile("corft-state", "", ((row, 1), (row, 2), (row, 3)))
    shown = tables.corft_block({"corft-state": file}, runs, tables.Papers())
    cells = next(line for line in shown.splitlines() if line.startswith("| Toy-v1")).split(" | ")
    assert cells[1] == "one place" and [c.split(" (")[0] for c in cells[2:8]] == ["50", "70", "+20", "20", "30", "+10"]
    assert cells[3].endswith("2 of 3 seeds") and cells[8].startswith("25 (25 to 25)")


# ---- statistics ----
def test_difference_of_two_rates_has_the_published_interval():
    """Newcombe, Statistics in Medicine 17 (1998), table II, method 10: 56/70 against 48/80, and 10/10 against 0/10."""
    for (a, m), (b, n), wanted in (
        ((48, 80), (56, 70), (0.2, 0.0524, 0.3339)),
        ((0, 10), (10, 10), (1.0, 0.6075, 1.0)),
    ):
        before, after = ((x / k, *stats.wilson(x, k)) for x, k in ((a, m), (b, n)))
        assert stats.difference(before, after) == pytest.approx(wanted, abs=5e-5)


def test_numbers_of_a_run(two_seeds):
    make_run(two_seeds / "runs", "force-3", LATE)
    assert collected(two_seeds) == 0
    first, second, third = (run for _, run in sorted(stats.by_run(read(two_seeds)).items()))
    assert stats.largest_drop(first) == pytest.approx(0.70 - 0.55) and stats.largest_drop(second) == 0
    assert stats.before_handover(first) == 1500
    # 82 % at 2,500 doesn't hold; 80 % at 7,500 does
    assert stats.steps_at_target(first) == (7500, True)
    assert stats.steps_at_target(second) == (0, True)
    assert stats.steps_at_target(third) == (5000, False)
    # Wilson, 95 of 100: (0.95 + z^2/200 -+ z sqrt(0.95 * 0.05 / 100 + z^2/40000)) / (1 + z^2/100) with z = 1.959964
    assert stats.wilson(95, 100) == pytest.approx((0.888250, 0.978456), abs=2e-6)
    assert stats.pooled([stats.result(first), stats.result(second)]) == pytest.approx((0.97, *stats.wilson(194, 200)))
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
    assert stats.bootstrap_iqm([[0.7, 0.7], [0.7, 0.7]]) == pytest.approx((0.7, 0.7, 0.7))


# ---- tables and figures ----
def test_table_matches_hand_computed_numbers(two_seeds):
    assert collected(two_seeds) == 0
    page = written(two_seeds)
    assert page.startswith("# Mine\n\n<!-- begin: stub -->\n") and page.endswith("<!-- end: stub -->\n\nwords after\n")
    assert "\nold\n" not in page
    # mean of 95 and 99 %; Wilson interval of 194 of 200
    row = next(line for line in page.splitlines() if line.startswith("|") and "method force" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:7] == ["97 (93.6–98.6)", "1: 95, 2: 99", "48.5", "50 (43.1–56.9)", "1: 70, 2: 80"]
    assert cells[7:11] == ["1: 15, 2: 0", "24.0 (60.0)", "1: 7500, 2: 0 (at hand-over)", "1: 10, 2: 10"]
    assert "| not run |" in next(line for line in page.splitlines() if "method other" in line)
    verdicts = [line for line in page.splitlines() if line.endswith("met |") or line.endswith("not met** |")]
    assert [line.split(" | ")[-1] for line in verdicts] == ["met |"] * 4 + ["**not met** |"] * 2
    assert "| success never more than 10 points below hand-over | 15 points | **not met** |" in page
    assert "whole run within 9 minutes | 10.0 minutes | **not met** |" in page
    assert "compact scale (octo-compact), camera observations" in page


def row_and_run(name: str, rate: float, command: str = "", task: str = "A-v1", length: float = 20.0):
    """A row and its finished run: SFT of 50 %, then `rate` of 100 episodes."""
    line = {"row": name, "seed": "1", "num_episodes": "100", "demo_steps_to_success": "40", "global_step": "0"}
    ends = (("sft", 0.5, 40.0, ""), ("online", rate, length, "1"))
    run = [line | {"stage": stage, "success_once": str(x), "success_at_end": "0", "episode_len": str(n), "final": final}
           for stage, x, n, final in ends]  # fmt: skip
    return rows.Row(name, f"python x.py --env-id {task} {command}", name.partition("-")[0]), run


def test_steps_of_too_few_successes_and_cloned_heads_that_were_thrown_away_are_left_out():
    """A mean of nine successes isn't one, and with none at all the recorded length is the time limit."""
    row, rare = row_and_run("a", 0.09, "--fresh-head")
    _, enough = row_and_run("a", 0.10)
    assert tables.steps_cell({("a", 1): rare}) == "–" and tables.steps_cell({("a", 1): enough}) == "20.0 (40.0)"
    assert tables.steps_cell({("a", 1): rare, ("a", 2): enough}) == "20.0 (40.0)"
    assert (
        tables.cloned(row, {("a", 1): rare}) == [] and len(tables.cloned(row_and_run("b", 1)[0], {("b", 1): rare})) == 1
    )


def test_interquartile_means_compare_complete_methods_only():
    made = [row_and_run(f"{method}-{task}", 0.5, task=task) for method in ("one", "two") for task in ("A-v1", "B-v1")]
    file = rows.CommandFile("x", "X", tuple((row, 1) for row, _ in made))
    runs = {(row.name, 1): run for row, run in made}
    assert "| one | 50 (one seed) | 2 |" in tables.aggregate(file, runs) and "| two |" in tables.aggregate(file, runs)
    del runs["two-B-v1", 1]
    assert "| one |" in tables.aggregate(file, runs) and "| two |" not in tables.aggregate(file, runs)
    del runs["one-A-v1", 1]
    assert tables.aggregate(file, runs) == ""


def test_missing_seeds_and_censored_runs_are_shown(two_seeds):
    make_run(two_seeds / "runs", "force-1", LATE)
    for path in (two_seeds / "runs" / "force-2").iterdir():
        path.unlink()
    assert collected(two_seeds) == 0
    page = written(two_seeds)
    assert "| 90 (82.6–94.5), 1 of 2 seeds |" in page and "| 1: more than 5000 |" in page
    assert "**not met**, 1 of 2 seeds |" in page


def test_check_sees_a_stale_page_and_a_stale_figure(two_seeds):
    places = (two_seeds / "results", two_seeds)
    assert collected(two_seeds) == 0
    assert plots.main(*places) == 0
    first = {p: p.read_bytes() for p in (two_seeds / "docs" / "figures").iterdir()}
    assert {p.name for p in first} == {"stub.png", "stub.svg"} and all(
        len(content) < 300_000 for content in first.values()
    )
    assert "[![Stub: success against" in (page := written(two_seeds)) and "](figures/stub.svg)" in page
    assert plots.main(*places) == 0 and written(two_seeds) == page
    assert {p: p.read_bytes() for p in first} == first  # the same bytes again
    assert tables.main(*places, check=True) == plots.main(*places, check=True) == 0
    make_run(two_seeds / "runs", "force-2", [(1500, 0.8), (4000, 0.9)])
    assert collected(two_seeds) == 0
    assert tables.main(*places, check=True) == plots.main(*places, check=True) == 1
    assert (two_seeds / "docs" / "stub.md").read_text() == page
    assert {p: p.read_bytes() for p in first} == first
    (two_seeds / "docs" / "figures" / "stub.png").unlink()
    assert plots.drawn_from(two_seeds / "docs" / "figures" / "stub") is None


def test_all_figures_can_be_drawn_from_few_numbers(two_seeds, monkeypatch):
    monkeypatch.setattr(plots, "OVERVIEW", ("stub",))
    for seed in (1, 2):
        with (two_seeds / "runs" / f"force-{seed}" / "metrics.csv").open("a", newline="") as file:
            lines = [
                (1500 + 10 * i, 300 + i, name, 0.1 * i)
                for i in range(5)
                for name in ("values/q_data", "values/mc_return")
            ]
            lines += [(1500, u, f"calib/{name}", 0.1) for u in (250, 290) for name in ("q_minus_return", "correlation")]
            lines += [(1500 + i, 400 + i, "values/q_std", 0.1) for i in range(3)]
            lines += [(1500 + i, 400 + i, "vgpd/candidate_std", 0.1) for i in range(3)]
            csv.writer(file).writerows(lines)
    assert collected(two_seeds) == 0 and plots.main(two_seeds / "results", two_seeds) == 0
    names = {p.name for p in (two_seeds / "docs" / "figures").iterdir()}
    assert names == {
        f"{n}.{end}" for n in ("stub", "early-drop", "calibration", "distillation") for end in ("png", "svg")
    }


def test_the_operators_figure_needs_an_operator(tmp_path):
    """Runs with an operator beside those without on the same task; none without interventions."""
    (file,) = [file for file in rows.all_commands() if file.name == "conrft-state"]
    names = ["conrft-push-state", "conrft-pick-state", "conrft-pick-state-oracle"]
    used = [row for row in file.rows if row.name in names]
    for rate in (0.0, 0.5):
        with (tmp_path / "runs.csv").open("w") as runs, (tmp_path / "diagnostics.csv").open("w") as more:
            runs.write("row,seed,stage,global_step\n")
            more.write("row,seed,update_step,global_step,train/success_once,train/episode_len,intervention/rate\n")
            for name in names:
                runs.write(f"{name},1,online,100\n")
                share = rate if name.endswith("oracle") else 0.0
                more.writelines(f"{name},1,{i},{100 + 10 * i},0.{i},{30 + i},{share}\n" for i in range(5))
        figure = plots.plot_operator(used, plots.Data(tmp_path))
        assert (figure is None) == (rate == 0.0)
    success, length, share = figure.axes
    assert success.get_title() == "PickCube, state" and len(success.lines) == 2
    assert [line.get_ydata()[-1] for line in share.lines] == [0.0, 0.5]
    assert length.lines[1].get_xdata()[[0, -1]].tolist() == [0.0, 40.0] and length.lines[1].get_ydata()[-1] == 34.0
    plots.plt.close(figure)


def test_documentation_is_up_to_date():
    assert tables.main(check=True) == 0
    assert plots.main(check=True) == 0


def test_every_table_and_figure_has_its_place():
    pages = [rows.ROOT / "README.md", *sorted((rows.ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    comparisons = [f"results-{name}" for name in ("success", "steps", "execution", "corft", "figures")]
    for name in [*FILES, *comparisons]:
        assert text.count(f"<!-- begin: {name} -->") == 1, name
    for picture in (rows.ROOT / "docs" / "figures").iterdir():
        assert f"figures/{picture.name})" in text, picture.name


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gamma=0.8), "not the row's command: gamma=0.8 instead of 0.9"),
        (dict(limit=99), "its runs differ in settings: limit=80 | limit=99"),
        (dict(commit="b" * 40), f"its runs differ in code: {'a' * 40} | {'b' * 40}"),
        (dict(commit="a" * 40 + "-dirty"), "uncommitted code"),
    ],
)
def test_collect_refuses_to_mix_unless_it_is_said(two_seeds, capsys, change, message):
    make_run(two_seeds / "runs", "force-2", CLIMBS, **change)
    assert collected(two_seeds) == 1
    assert message in capsys.readouterr().err
    assert not (two_seeds / "results").exists()
    assert collected(two_seeds, allow_mixed=True) == 0
    assert message in written(two_seeds)


def test_collect_notices_a_summary_that_contradicts_its_evaluations(two_seeds, capsys):
    path = two_seeds / "runs" / "force-1" / "summary.json"
    path.write_text(path.read_text().replace('"success_once": 0.95', '"success_once": 0.99', 1))
    assert collected(two_seeds) == 1
    assert "disagrees with its evaluations: success_once" in capsys.readouterr().err


def test_collect_never_loses_runs_of_other_files_and_machines(two_seeds, suite):
    assert collected(two_seeds) == 0
    old, old_diagnostics = read(two_seeds), read(two_seeds, "diagnostics")
    for path in (two_seeds / "runs" / "force-1").iterdir():
        path.unlink()
    make_run(two_seeds / "runs", "force-2", [(1500, 0.8), (4000, 0.9)])
    make_run(two_seeds / "runs", "other-1", CLIMBS)
    (two_seeds / "runs" / "force-2-old").mkdir()  # no run of the row
    assert collected(two_seeds, commands=(suite("force --gamma 0.9", "other", seeds="1 2"),)) == 0
    runs = stats.by_run(read(two_seeds))
    assert list(runs) == [("force", 1), ("force", 2), ("other", 1)]
    assert runs["force", 1] == [line for line in old if line["seed"] == "1"]
    assert [line["success_once"] for line in runs["force", 2]][-2:] == ["0.8", "0.9"]  # replaced
    kept = [line for line in read(two_seeds, "diagnostics") if (line["row"], line["seed"]) == ("force", "1")]
    assert kept == [line for line in old_diagnostics if line["seed"] == "1"]
    assert not list((two_seeds / "results").glob("*.tmp*"))


def test_same_code_in_two_commits_is_not_a_mix(monkeypatch, tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "backbones").mkdir()
    commits = []
    for name, text in (("s.py", "1"), ("backbones/b.py", "1"), ("README.md", "words"), ("s.py", "2")):
        (tmp_path / name).write_text(text)
        git("add", "-A")
        git("commit", "-qm", name)
        commits.append(git("rev-parse", "HEAD"))
    monkeypatch.setattr(collect, "ROOT", tmp_path)
    collect.code_of.cache_clear()
    codes = [collect.code_of(commit, "s.py") for commit in commits[1:]]
    collect.code_of.cache_clear()
    assert codes[0] == codes[1] != codes[2]


def test_broken_markers_are_refused():
    for text in (
        "<!-- begin: a -->",
        "<!-- end: a -->\n<!-- begin: a -->",
        "<!-- begin: a -->" * 2 + "<!-- end: a -->",
    ):
        with pytest.raises(ValueError, match="markers of a"):
            tables.replace_block(text, "a", "content")
    made = tables.replace_block("x\n<!-- begin: a -->\n<!-- end: a -->\ny", "a", r"back\1slash")
    assert made == "x\n<!-- begin: a -->\nback\\1slash\n<!-- end: a -->\ny"


# ---- speed ----
def test_what_speed_compares_with_is_the_same_network():
    setting = speed.Setting(K=3, hidden_dim=16, num_critics=3, batch_size=8)
    critic = setting.agent.critic
    for i, part in enumerate((*critic.gain, *critic.shift, *critic.bias)):
        torch.nn.init.normal_(part, generator=torch.Generator().manual_seed(i))
    feature, chunk = setting.batch.feature, setting.batch.chunk
    several = torch.stack([chunk, -chunk, 0.5 * chunk], 1)
    for other in (speed.PlainCritic(critic), speed.OneByOneCritic(critic)):
        for chunks in (chunk, several):
            torch.testing.assert_close(other(feature, chunks), critic(feature, chunks), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            speed.PlainCritic(setting.agent.target_critic)(feature, chunk), critic(feature, chunk)
        )
    one_by_one = speed.Setting(speed.OneByOneAgent, K=3, hidden_dim=16, num_critics=3, batch_size=8)
    candidates = one_by_one.agent.candidates(feature, one_by_one.agent.actor, one_by_one.args, one_by_one.generator)
    assert candidates.shape == (8, 3, chunk.shape[1]) and not torch.equal(candidates[:, 0], candidates[:, 1])
    before = [p.clone() for p in one_by_one.agent.actor.parameters()]
    one_by_one.vgpd()
    assert any(not torch.equal(a, b) for a, b in zip(before, one_by_one.agent.actor.parameters(), strict=True))


def test_speed_measures_all_and_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "EPISODE", 4)
    page = tmp_path / "page.md"
    assert speed.main(quick=True, out=page) == 0
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines() if "|" in line
    ]
    ratios = [float(cells[3].split()[0]) for cells in lines if len(cells) == 4 and cells[3][0].isdigit()]
    assert len(ratios) == 14 and ratios.count(1) >= 6 and min(ratios) > 0
    sizes = {cells[0]: int(cells[1].replace(",", "")) for cells in lines if len(cells) == 3 and cells[1][0].isdigit()}
    images = sizes["camera: images of 64 px at both ends, a row per transition"]
    assert images == 2 * (64 * 64 * 3 + 25 * 4) + 4 * (16 + 4)
    assert "torch" in page.read_text() and str(tmp_path) not in page.read_text()
