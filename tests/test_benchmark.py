"""The benchmark's runner, collector and report on made-up run folders and a stub script."""

import contextlib
import csv
import importlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmark import collect, report, run, suites
from benchmark.suites import SUITES, Bars, Row, Suite

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
def suite(stub, monkeypatch):
    """Registers a suite "stub" with a row per set of flags; the row's name is its first word."""

    def register(*flags: str, bars: Bars | None = None, seeds: tuple[int, ...] = (1,)) -> Suite:
        names = [f.split()[0] for f in flags]
        commands = [f"python {stub} {f.split(maxsplit=1)[1] if ' ' in f else ''}".strip() for f in flags]
        rows = tuple(Row(n, f"method {n}", c, bars or Bars()) for n, c in zip(names, commands, strict=True))
        monkeypatch.setitem(SUITES, "stub", Suite("Stub", "docs/stub.md", rows, seeds))
        return SUITES["stub"]

    monkeypatch.setattr(run.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    return register


# ---- the suites ----
@pytest.mark.parametrize("name", sorted(SUITES))
def test_dry_run_prints_every_command_and_each_parses(name, tmp_path, capsys):
    assert run.main(name, runs=tmp_path / "runs", dry_run=True) == 0
    printed, chosen = capsys.readouterr().out.splitlines(), SUITES[name]
    wanted = [
        f"{row.command} --seed {seed} --runs {tmp_path}/runs --run-name {row.name}-{seed}"
        for seed in chosen.seeds
        for row in chosen.rows
    ]
    assert printed == wanted
    for line, row in zip(printed, chosen.rows * len(chosen.seeds), strict=True):
        _, script, *words = shlex.split(line)
        args = importlib.import_module(Path(script).stem).parse_args(words)
        assert (args.env_id, args.obs_mode) == (row.env_id, row.obs_mode)
    assert not (tmp_path / "runs").exists()


def test_rows_of_one_name_are_one_row():
    rows = [row for chosen in SUITES.values() for row in chosen.rows]
    assert len({row.name for row in rows}) == len(set(rows))
    assert len({row.command for row in rows}) == len(set(rows))


def test_paper_numbers_have_the_papers_averages():
    table = [line for line in collect.read_csv(report.PAPERS) if line["source"] == "T1"]
    means = {m: np.mean([float(x["value"]) for x in table if x["method"] == m]) for m in {x["method"] for x in table}}
    averages = {"Octo BC": 3.58, "pi0 BC": 42.5, "pi0.5 BC": 44.17, "Cal-QL": 45.2, "CQL": 15.7, "PA-RL": 50.2,
                "ConRFT (no HIL)": 71.1, "FORCE (Octo)": 82.3, "FORCE (pi0)": 86.9}  # fmt: skip
    assert means == pytest.approx(averages, abs=0.051)
    assert {line["source"] for line in collect.read_csv(report.PAPERS)} == set(report.SOURCES)


def test_a_run_without_stages_has_a_result_and_nothing_else():
    rows = [{"update": u, "eval/success_once": s, "eval/num_episodes": 50, "eval/success_at_end": 0.5, "eval/episode_len": 30}
            for u, s in ((10, 0.9), (20, 0.8))]  # fmt: skip
    derived = collect.derive(rows)
    assert derived["success_once"] == 0.8 and derived["episodes"] == 50
    for name in ("sft_success_once", "handover_success_once", "largest_drop", "online_env_steps_at_80"):
        assert derived[name] is None


# ---- the runner ----
def test_runner_skips_resumes_starts_and_reports_failures(suite, tmp_path, capsys):
    suite("done", "half --gamma 0.5", "new", "bad --mode fail", "empty --mode silent")
    (tmp_path / "done-1").mkdir()
    (tmp_path / "done-1" / "summary.json").write_text("untouched")
    (tmp_path / "half-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "half-1" / "checkpoints" / "latest").write_text("update-1")
    config = {"script": "benchmark_stub.py", "args": {"gamma": 0.5, "seed": 1, "env_id": "PushCube-v1"}}
    (tmp_path / "half-1" / "config.json").write_text(json.dumps(config))

    assert run.main("stub", runs=tmp_path, jobs=2) == 1
    assert (tmp_path / "done-1" / "summary.json").read_text() == "untouched"
    assert json.loads((tmp_path / "half-1" / "summary.json").read_text()) == {"resumed": True}
    assert json.loads((tmp_path / "new-1" / "summary.json").read_text()) == {"resumed": False}
    assert json.loads((tmp_path / "new-1" / "config.json").read_text())["threads"] == "1"
    errors = capsys.readouterr().err
    assert f"FAILED bad-1: exit code 3: boom\n  log: {tmp_path / 'bad-1.log'}" in errors
    assert "FAILED empty-1: ended without a summary.json" in errors
    assert "FAILED half" not in errors and "FAILED new" not in errors
    assert (tmp_path / "bad-1.log").read_text().startswith("$ python ")

    suite("done", "half --gamma 0.5", "new")
    before = sorted(tmp_path.rglob("*"))
    assert run.main("stub", runs=tmp_path) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_runner_keeps_a_run_without_a_checkpoint_aside(suite, tmp_path):
    suite("new")
    (tmp_path / "new-1").mkdir()
    (tmp_path / "new-1" / "config.json").write_text("{}")
    (tmp_path / "new-1" / "metrics.csv").write_text("precious")
    assert run.main("stub", runs=tmp_path) == 0
    (aside,) = tmp_path.glob("new-1.unfinished-*")
    assert (aside / "metrics.csv").read_text() == "precious"
    assert (tmp_path / "new-1" / "summary.json").exists()


def test_runner_refuses_to_resume_a_run_of_another_command(suite, tmp_path, capsys):
    suite("half --gamma 0.5")
    (tmp_path / "half-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "half-1" / "checkpoints" / "latest").write_text("update-1")
    config = {"script": "benchmark_stub.py", "args": {"gamma": 0.9, "limit": 7, "seed": 4, "runs": "elsewhere"}}
    (tmp_path / "half-1" / "config.json").write_text(json.dumps(config))
    assert run.main("stub", runs=tmp_path) == 1
    assert "started with other flags (gamma=0.9 instead of 0.5); move" in capsys.readouterr().err
    assert not (tmp_path / "half-1" / "summary.json").exists()


def test_runner_does_not_make_the_same_demonstrations_twice(suite, tmp_path, capsys):
    push = "--env-id PushCube-v1 --mode slow"
    suite(f"push {push}", f"again {push} --gamma 0.5", "pull --env-id PullCube-v1")
    assert run.main("stub", runs=tmp_path, jobs=3) == 0
    started = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": python" in line]
    assert started == ["push-1", "pull-1", "again-1"]  # another task doesn't wait
    first, second = (json.loads((tmp_path / f"{n}-1" / "config.json").read_text())["time"] for n in ("push", "again"))
    assert second[0] > first[1]  # started once the first had its demonstrations


def test_runner_leaves_a_run_that_is_already_running_alone(suite, tmp_path, capsys):
    import fcntl

    suite("new")
    with (tmp_path / "new-1.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        assert run.main("stub", runs=tmp_path) == 1
    assert "already being run" in capsys.readouterr().err
    assert not (tmp_path / "new-1").exists()


def test_interrupt_stops_the_runs_and_their_workers(suite, tmp_path):
    suite("hang --mode hang")
    worker = tmp_path / "hang-1" / "worker"

    def interrupt():
        while not worker.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert run.main("stub", runs=tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    stat, deadline = Path(f"/proc/{worker.read_text()}/stat"), time.time() + 5
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone; or Z, dead and not yet reaped
        while stat.read_text().split()[2] != "Z":
            assert time.time() < deadline, "the worker lives on"
            time.sleep(0.02)


def test_runner_rejects_what_it_does_not_know(suite, tmp_path, capsys):
    suite("new")
    assert run.main("stub", runs=tmp_path, only="nothing") == 2
    assert run.main("stub", runs=tmp_path, jobs=0) == 2
    with pytest.raises(SystemExit) as error:
        run.main("force-stat", runs=tmp_path)
    assert error.value.code == 2 and "force-state" in capsys.readouterr().err


# ---- collecting and reporting ----
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


@pytest.fixture
def two_seeds(suite, tmp_path):
    bars = Bars(success=0.97, sft=0.5, above_sft=True, drop=0.1, steps_ratio=0.5, minutes=9)
    suite("force --gamma 0.9", "other", bars=bars, seeds=(1, 2))
    make_run(tmp_path / "runs", "force-1", DIPS)
    make_run(tmp_path / "runs", "force-2", CLIMBS)
    return tmp_path


def collected(root: Path, **options) -> int:
    return collect.main("stub", runs=root / "runs", results=root / "results", **options)


def test_collect_matches_hand_computed_numbers(two_seeds):
    make_run(two_seeds / "runs", "force-3", [(0, 0.1), (900, 0.9)])
    (two_seeds / "runs" / "force-3" / "summary.json").unlink()  # unfinished: left out
    assert collected(two_seeds) == 0
    first, second = collect.read_csv(two_seeds / "results" / "stub.csv")
    # Wilson, 95 of 100: (0.95 + z^2/200 -+ z sqrt(0.95 * 0.05 / 100 + z^2/40000)) / (1 + z^2/100) with z = 1.959964
    assert (float(first["low"]), float(first["high"])) == pytest.approx((0.888250, 0.978456), abs=2e-6)
    assert (float(first["sft_low"]), float(first["sft_high"])) == pytest.approx((0.403832, 0.596168), abs=2e-6)
    assert float(first["largest_drop"]) == pytest.approx(0.70 - 0.55)
    assert float(second["largest_drop"]) == 0.0
    # 82 % at 2,500 doesn't hold; 80 % at 7,500 does
    assert (first["online_env_steps_at_80"], second["online_env_steps_at_80"]) == ("7500", "0")
    assert (first["success_once"], first["success_at_end"], first["episodes"]) == ("0.95", "0.475", "100")
    assert (first["handover_success_once"], first["sft_success_once"], first["seed"]) == ("0.7", "0.5", "1")
    assert first["settings"] == "limit=80" and first["demonstrations"] == "demos-50"
    assert "/somewhere" not in (two_seeds / "results" / "stub.csv").read_text()

    curves = [line for line in collect.read_csv(two_seeds / "results" / "stub-curves.csv") if line["seed"] == "1"]
    shown = [(c["stage"], c["online_env_step"], c["success_once"], c["episode_len"]) for c in curves if c["stage"]]
    assert shown[:3] == [
        ("sft-head", "-1500", "0.5", "40"),
        ("offline", "-1500", "0.52", "40"),
        ("online", "0", "0.7", "24"),
    ]
    zeta = [(c["online_env_step"], c["vgpd/zeta"]) for c in curves if c["vgpd/zeta"]]
    assert len(zeta) == collect.KEEP and (zeta[0], zeta[-1]) == (("0", "0.0"), ("1990", "0.995"))
    assert [c["calib/bound_rate"] for c in curves if c["calib/bound_rate"]] == ["0.25"]
    assert "losses/actor" not in curves[0]


def test_report_matches_hand_computed_numbers(two_seeds):
    assert collected(two_seeds) == 0
    (two_seeds / "docs").mkdir()
    (two_seeds / "docs" / "stub.md").write_text(
        "# Mine\n\n<!-- begin: stub -->\nold\n<!-- end: stub -->\n\nwords after\n"
    )
    assert report.main(two_seeds / "results", two_seeds) == 0
    page = (two_seeds / "docs" / "stub.md").read_text()
    assert page.startswith("# Mine\n\n<!-- begin: stub -->\n") and page.endswith("<!-- end: stub -->\n\nwords after\n")
    assert "\nold\n" not in page
    # mean of 95 and 99 %; Wilson interval of 194 of 200
    row = next(line for line in page.splitlines() if line.startswith("|") and "method force" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:6] == ["97 (93.6–98.6)", "95, 99", "1, 2"]
    assert cells[6:12] == ["50 (43.1–56.9)", "70, 80", "15, 0", "24.0 (60.0)", "7500, 0", "10, 10"]
    assert "| not run |" in next(line for line in page.splitlines() if "method other" in line)
    verdicts = [line for line in page.splitlines() if line.endswith("met |") or line.endswith("not met** |")]
    assert [line.split(" | ")[-1] for line in verdicts] == ["met |"] * 4 + ["**not met** |"] * 2
    assert "| success never more than 10 points below hand-over | 15 points | **not met** |" in page
    assert "whole run within 9 minutes | 10.0 minutes | **not met** |" in page
    assert "![Stub: success" in page and "(figures/stub.png)" in page
    assert (two_seeds / "docs" / "figures" / "stub.png").stat().st_size < 200_000


def test_report_is_reproducible_and_check_sees_a_stale_page(two_seeds):
    assert collected(two_seeds) == 0
    files = ["docs/stub.md", "docs/figures/stub.png", "docs/figures/stub-diagnostics.png"]
    assert report.main(two_seeds / "results", two_seeds) == 0
    first = [(two_seeds / name).read_bytes() for name in files]
    assert report.main(two_seeds / "results", two_seeds) == 0
    assert [(two_seeds / name).read_bytes() for name in files] == first
    assert report.main(two_seeds / "results", two_seeds, check=True) == 0
    make_run(two_seeds / "runs", "force-2", [(1500, 0.8), (4000, 0.9)])
    assert collected(two_seeds) == 0
    assert report.main(two_seeds / "results", two_seeds, check=True) == 1
    assert [(two_seeds / name).read_bytes() for name in files] == first


def test_documentation_is_up_to_date():
    assert report.main(check=True) == 0


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
    report.main(two_seeds / "results", two_seeds)
    assert message in (two_seeds / "docs" / "stub.md").read_text()


def test_collect_notices_a_summary_that_contradicts_its_evaluations(two_seeds, capsys):
    path = two_seeds / "runs" / "force-1" / "summary.json"
    path.write_text(path.read_text().replace('"success_once": 0.95', '"success_once": 0.99', 1))
    assert collected(two_seeds) == 1
    assert "disagrees with its evaluations: success_once" in capsys.readouterr().err


def test_collect_keeps_committed_runs_of_other_machines(two_seeds):
    assert collected(two_seeds) == 0
    old = collect.read_csv(two_seeds / "results" / "stub.csv")
    old_curves = collect.read_csv(two_seeds / "results" / "stub-curves.csv")
    for path in (two_seeds / "runs" / "force-1").iterdir():
        path.unlink()
    make_run(two_seeds / "runs", "other-1", CLIMBS)
    assert collected(two_seeds) == 0
    new = collect.read_csv(two_seeds / "results" / "stub.csv")
    assert new[:2] == old and [(line["row"], line["seed"]) for line in new[2:]] == [("other", "1")]
    assert collect.read_csv(two_seeds / "results" / "stub-curves.csv")[: len(old_curves)] == old_curves


def test_same_code_in_two_commits_is_not_a_mix(monkeypatch, tmp_path):
    import subprocess

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
            report.replace_block(text, "a", "A", "content")
    made = report.replace_block("# Page\n", "a", "A", r"back\1slash")
    assert made == "# Page\n\n## A\n\n<!-- begin: a -->\nback\\1slash\n<!-- end: a -->\n"


def test_interquartile_mean_and_its_bootstrap():
    scores = [[0.0, 0.0], [0.5, 0.5], [0.8, 1.0]]  # of six sorted scores the middle four count
    value, low, high = report.bootstrap_iqm(scores)
    assert value == pytest.approx((0 + 0.5 + 0.5 + 0.8) / 4)
    # Runs are drawn within their task, so only the last task varies: (1, 1) comes up in a quarter of the draws.
    assert (low, high) == pytest.approx((0.45, (0 + 0.5 + 0.5 + 1) / 4))
    assert report.bootstrap_iqm(scores) == (value, low, high)
    assert report.bootstrap_iqm([[0.7, 0.7], [0.7, 0.7]]) == pytest.approx((0.7, 0.7, 0.7))


def test_select_takes_a_regular_expression():
    rows = SUITES["force-state"].rows
    assert [row.env_id for row in suites.select(rows, "pick|stack-")] == ["PickCube-v1", "StackCube-v1"]
    assert suites.select(rows, None) == list(rows)
