"""What goes wrong around a run, made to go wrong here: python benchmark/faults.py [--kills N] [--only REGEX]

Each case starts a real program with tiny settings, does something to it (a kill, a power cut, a damaged file, a flag
that can't be), and looks at what comes out: the exit code, one line of error, no traceback, no process left behind,
and results that equal those of an undisturbed run. Cases that are in the CSV are not tried again; delete rows to repeat
them. At the end the table of docs/reliability.md is written anew. Power cuts and full disks need root (they mount
file systems of their own); without it these cases are left out, and the table says how many were tried.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from plumbing.storage import Checkpoints, checksum_of, place_in_order  # noqa: E402
from plumbing.table import Table  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "faults.csv"
COSTS = ROOT / "benchmark" / "results" / "checkpoint_cost.csv"
DOCUMENT = ROOT / "docs" / "reliability.md"
COMMON = (
    "--env-id PushCube-v1 --obs-mode state --seed 3 --torch-threads 1 --num-demos 8 --max-episode-steps 12 --log-freq 1 "
    "--eval-episodes 2 --video-episodes 0 --hidden-dim 16 --device cpu --demo-dir {work}/demos"
)
SCRIPTS = {  # flags of a run of seconds that goes through all of its stages
    "bc.py": "--updates 24 --batch-size 4 --checkpoint-freq 3",
    "force_octo.py": "--sft-updates 6 --sft-batch-size 4 --batch-size 4 --offline-updates 6 --warmup-episodes 2 "
    "--warmup-updates 6 --online-steps 60 --eval-freq 30 --checkpoint-freq 3 --utd-ratio 0.3",
    "force_pi0.py": "--sft-updates 6 --sft-head-updates 4 --sft-batch-size 4 --batch-size 4 --offline-updates 6 "
    "--warmup-episodes 2 --warmup-updates 6 --online-steps 60 --eval-freq 30 --checkpoint-freq 3 --utd-ratio 0.3",
}


# === Programs ========================================================================================================
@dataclasses.dataclass
class Life:
    """A program that was started."""

    pid: int
    log: Path
    code: int | None = None  # exit code; 128 + signal, as a shell says it

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code
        return self.code is not None

    def wait(self, seconds: float = 300) -> int:
        """Exit code; -1 for a program that hangs, which is ended here."""
        end = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > end:
                self.kill()
                self.code = -1
            time.sleep(0.02)
        return self.code

    def kill(self) -> None:
        """As a power cut ends it: all of its processes, without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.code = 137

    def left(self) -> list[int]:
        """Processes of its group that are there after its end, and some seconds."""
        for _ in range(100):
            found = group(self.pid)
            if not found:
                break
            time.sleep(0.1)
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def group(number: int) -> list[int]:
    """Living processes of a process group (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rsplit(")", 1)[1].split()  # state, parent, group
            if int(words[2]) == number and words[0] != "Z":
                found.append(int(path.parent.name))
    return found


def start(work: Path, script: str, flags: str | list[str], out: int | None = None, quick: bool = True) -> Life:
    """The script as a program of its own, forked from this one, which has imported what it needs.

    quick: its evaluation process is forked too, instead of a new one with all imports.
    """
    words = flags.split() if isinstance(flags, str) else flags
    number, log = tempfile.mkstemp(dir=work / "logs", suffix=".txt")
    pid = os.fork()
    if pid:
        os.close(number)
        return Life(pid, Path(log))
    try:
        os.setsid()
        os.dup2(number if out is None else out, 1)
        os.dup2(number if out is None else out, 2)
        os.chdir(work)
        sys.argv = [str(ROOT / script), *words]
        if quick:
            fork_evaluations()
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        import atexit

        with contextlib.suppress(OSError):
            sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(code if isinstance(code, int) else 1)
    finally:
        os._exit(99)


def fork_evaluations() -> None:
    """Evaluations of this program in a process that is forked from it."""
    import multiprocessing

    import plumbing.beside

    fork = multiprocessing.get_context("fork")

    class Forked:
        def Pipe(self):
            self.ends = fork.Pipe()
            return self.ends

        def Process(self, target, args):
            def serve(*args):
                self.ends[0].close()  # the other's
                target(*args)

            return fork.Process(target=serve, args=args)

    plumbing.beside.multiprocessing = argparse.Namespace(get_context=lambda _: Forked())


def flags_of(work: Path, script: str, name: str, more: str = "", runs: Path | None = None) -> list[str]:
    words = f"{COMMON.format(work=work)} {SCRIPTS[script]} {more}".split()
    return [*words, "--runs", str(runs or work / "runs"), "--run-name", name]


def one_line(life: Life, code: int, pattern: str, seconds: float = 300) -> None:
    """The program ends with this code and says why in its last line, with no traceback. Raises: AssertionError."""
    found = life.wait(seconds)
    text = life.text()
    assert found == code, f"exit code {found}: {text[-300:]}"
    assert "Traceback" not in text, text[-600:]
    last = re.split(r"[\r\n]+", text.strip())[-1]
    assert re.search(pattern, last), last[-300:]
    assert not life.left(), "processes are left"


# === Runs ============================================================================================================
def whole(work: Path, script: str) -> Path:
    """An undisturbed run, made once."""
    folder = work / "runs" / f"whole-{script.removesuffix('.py')}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        life = start(work, script, flags_of(work, script, folder.name))
        assert life.wait(900) == 0, life.text()[-600:]
    return folder


def stopped(work: Path, script: str = "force_octo.py") -> Path:
    """A copy of a run that was ended in its last stage, with two checkpoints."""
    folder = work / "runs" / f"stopped-{script.removesuffix('.py')}"
    if not (folder / "ended").exists():
        shutil.rmtree(folder, ignore_errors=True)
        life = start(work, script, flags_of(work, script, folder.name))
        until(life, folder, updates=20)
        life.kill()
        (folder / "ended").touch()
    copy = Path(tempfile.mkdtemp(dir=work / "runs")) / "run"
    return Path(shutil.copytree(folder, copy))


def until(life: Life, folder: Path, updates: int) -> None:
    """Wait until so many updates are logged, or the program's end."""
    while not life.over():
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((folder / "metrics.csv").read_text().splitlines()[-1].split(",")[1]) >= updates:
                return
        time.sleep(0.01)


def differences(one: Path, two: Path) -> list[str]:
    """In what two finished runs differ: logged values, evaluations, weights, optimizers, generators, buffers."""
    found = []
    rows = []
    for folder in (one, two):
        with (folder / "metrics.csv").open(newline="") as file:
            lines = [line for line in list(csv.reader(file))[1:] if not line[2].startswith("time/")]
        rows.append(collections.Counter(map(tuple, lines)))
    found += sorted(map(str, (rows[0] - rows[1]) + (rows[1] - rows[0])))[:3]
    summaries = [json.loads((folder / "summary.json").read_text())["evaluations"] for folder in (one, two)]
    if summaries[0] != summaries[1]:
        found.append("evaluations")
    states = [Checkpoints(folder).load(resume=False) for folder in (one, two)]
    for weights, state in states:
        state["weights"] = weights
        for name in ("seconds", "log_size"):
            del state[name]
    return found + unequal("", states[0][1], states[1][1])[:3]


def unequal(name: str, one, two) -> list[str]:
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys(), key=str)
        return [path for key in keys for path in unequal(f"{name}/{key}", one.get(key), two.get(key))]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return [path for i, pair in enumerate(zip(one, two)) for path in unequal(f"{name}/{i}", *pair)]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if torch.equal(one, two) else [name]
    if isinstance(one, float) and isinstance(two, float) and one != one and two != two:
        return []
    return [] if one == two else [name]


def goes_on(work: Path, script: str, folder: Path) -> str:
    """Resume to the end; results as those of the undisturbed run. Returns what was printed. Raises: AssertionError."""
    life = start(work, script, ["--resume", str(folder)])
    assert life.wait(600) == 0, life.text()[-400:]
    found = differences(whole(work, script), folder)
    assert not found, found
    return life.text()


# === Faults ==========================================================================================================
def killed(work: Path, script: str, seed: int) -> None:
    """SIGKILL at a random time, twice, then to the end: all values as in a run that nobody touched."""
    chance = random.Random(seed)
    name = f"killed-{script.removesuffix('.py')}-{seed}"
    folder = work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    last = last_update(whole(work, script))
    life = start(work, script, flags_of(work, script, name))
    kills = 0
    while kills < 2 and not life.over():
        until(life, folder, chance.randrange(last))
        time.sleep(chance.uniform(0, 0.3))
        life.kill()
        kills += 1
        life.left()
        if not Checkpoints(folder).names():  # it died before its first one, and says so
            if (folder / "config.json").exists():
                one_line(start(work, script, ["--resume", str(folder)]), 2, "no readable checkpoint")
            shutil.rmtree(folder, ignore_errors=True)
            life = start(work, script, flags_of(work, script, name))
        else:
            life = start(work, script, ["--resume", str(folder)])
    assert life.wait(600) == 0, life.text()[-400:]
    found = differences(whole(work, script), folder)
    assert not found, found
    shutil.rmtree(folder)


def last_update(folder: Path) -> int:
    return place_in_order(Checkpoints(folder).names()[0])[0]


@contextlib.contextmanager
def mounted(work: Path, *words: str) -> Iterator[Path]:
    point = Path(tempfile.mkdtemp(dir=work))
    subprocess.run(["mount", *words, str(point)], check=True, capture_output=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, capture_output=True)
        point.rmdir()


def power_cut(work: Path, script: str, seed: int) -> None:
    """The run writes to a file system on a loop device; what is on the device at some moment is what a cut leaves."""
    chance = random.Random(seed)
    image = work / f"disk-{script}-{seed}.img"
    image.unlink(missing_ok=True)
    after = image.with_suffix(".cut")
    last = last_update(whole(work, script))
    with image.open("wb") as file:
        file.truncate(192 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(work, "-o", "loop,commit=300", str(image)) as disk:
        life = start(work, script, flags_of(work, script, "run", runs=disk))
        until(life, disk / "run", chance.randrange(last))
        time.sleep(chance.uniform(0, 0.3))
        os.kill(life.pid, signal.SIGSTOP)  # a copy takes a while, a cut doesn't
        made = bool(Checkpoints(disk / "run").names()) and (disk / "run/checkpoints/latest").exists()
        shutil.copyfile(image, after)
        life.kill()
    image.unlink()
    with mounted(work, "-o", "loop", str(after)) as disk:
        folder = disk / "run"
        if Checkpoints(folder).names():
            goes_on(work, script, folder)
        else:
            assert not made, "a checkpoint that was there is lost"
    after.unlink()


def damaged(work: Path, damage: Callable[[Path], None], falls_back: bool, pattern: str) -> None:
    """Something happens to the newest checkpoint: the run goes on from the one before, alike, and says so."""
    folder = stopped(work)
    names = Checkpoints(folder).names()
    damage(folder / "checkpoints" / names[0])
    if falls_back:
        text = goes_on(work, "force_octo.py", folder)
        assert f"checkpoint {names[0]} is damaged" in text and f"going on from {names[1]}" in text, text[:300]
    else:
        before = sorted(path.name for path in (folder / "checkpoints").iterdir())
        one_line(start(work, "force_octo.py", ["--resume", str(folder)]), 2, pattern)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    shutil.rmtree(folder.parent)


def cut(name: str, share: float, path: Path) -> None:
    file = path / name
    os.truncate(file, int(share * file.stat().st_size))


def flip(name: str, seed: int, path: Path) -> None:
    """One bit of a file."""
    content = bytearray((path / name).read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    (path / name).write_bytes(content)


def both(damage: Callable[[Path], None], path: Path) -> None:
    for name in Checkpoints(path.parents[1]).names():
        damage(path.parent / name)


def rows_beyond(path: Path) -> None:
    """Rows that only the newest checkpoint needs."""
    older = Checkpoints(path.parents[1]).names()[1]
    state, before = (torch.load(p / "training.pt", weights_only=True) for p in (path, path.parent / older))
    for buffer, known in state["buffers"].items():
        for name, column in known["columns"].items():
            file = path.parent / "rows" / column["file"]
            was = before["buffers"][buffer]["columns"][name]
            if was["file"] != column["file"] or was["shape"] != column["shape"]:
                os.truncate(file, file.stat().st_size - 1)


def state_changed(change: Callable[[dict], object], path: Path) -> None:
    """A training state of another make, whole as a file."""
    state = torch.load(path / "training.pt", weights_only=True)
    changed = change(state)
    torch.save(state if changed is None else changed, path / "training.pt")
    sums = json.loads((path / "sums.json").read_text())
    sums["training.pt"] = checksum_of(path / "training.pt")
    (path / "sums.json").write_text(json.dumps(sums))


def wider(state: dict) -> None:
    for parts in state["parts"].values():
        for values in parts.get("state", {}).values():
            for name, value in values.items():
                if value.ndim:
                    values[name] = torch.cat([value, value])


def config_changed(work: Path, change: Callable, pattern: str, flag: str) -> None:
    folder = stopped(work)
    path = folder / "config.json"
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    one_line(start(work, "force_octo.py", [flag, str(folder)]), 2, pattern)
    shutil.rmtree(folder.parent)


def said(work: Path, script: str, words: list[str], pattern: str) -> None:
    """These flags end the program with one line."""
    one_line(start(work, script, words), 2, pattern)


def number(work: Path, script: str, flag: str, value: str) -> None:
    """A number that can't be: the flag is named, code 2, no traceback, no run folder."""
    runs = work / "runs" / "never"
    life = start(work, script, f"{COMMON.format(work=work)} --runs {runs} --{flag} {value}")
    assert life.wait(120) == 2, life.text()[-300:]
    text = life.text()
    assert f"--{flag}" in text and "Traceback" not in text, text[-300:]
    assert not runs.exists(), "a folder was made"


def diverged(work: Path, script: str, more: str, change: Callable | None = None) -> None:
    """One line with the stage and update, and no checkpoint that holds what isn't finite."""
    name = tempfile.mktemp(prefix="diverged-", dir="").strip("/")
    if change:
        more += f" {change(work)}"
    life = start(work, script, [*flags_of(work, script, name), *more.split()])
    one_line(life, 2, r"isn't finite|no longer finite \(stage \w+, update \d+\): try ")
    folder = work / "runs" / name
    for checkpoint in Checkpoints(folder).names():
        weights = load_file(folder / "checkpoints" / checkpoint / "weights.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values()), checkpoint
    shutil.rmtree(folder, ignore_errors=True)


def nan_cache(work: Path, column: str) -> str:
    """Flags for a cache of demonstrations with one NaN."""
    place = Path(tempfile.mkdtemp(dir=work))
    for path in (work / "demos").glob("PushCube-v1-*.npz"):
        arrays = dict(np.load(path))
        arrays[column] = arrays[column].copy()
        arrays[column][3, 0] = np.nan
        np.savez(place / path.name, **arrays)
    return f"--demo-dir {place}"


def nan_weights(work: Path) -> str:
    """Flags for a run of bc.py whose weights hold a NaN."""
    origin = Path(shutil.copytree(whole(work, "bc.py"), Path(tempfile.mkdtemp(dir=work)) / "bc"))
    for name in Checkpoints(origin).names():
        path = origin / "checkpoints" / name / "weights.safetensors"
        weights = load_file(path)
        weights["actor.out.bias"][0] = float("nan")
        save_file(weights, path)
        (path.parent / "sums.json").unlink()
    return f"--sft-checkpoint {origin}"


def two_at_once(work: Path, words: list[str], pattern: str) -> None:
    """One of them runs to its end, the other says why it can't."""
    lives = [start(work, "force_octo.py", words) for _ in range(2)]
    codes = [life.wait(600) for life in lives]
    assert sorted(codes) == [0, 2], [life.text()[-300:] for life in lives]
    one_line(lives[codes.index(2)], 2, pattern)


def two_resumes(work: Path) -> None:
    folder = stopped(work)
    two_at_once(work, ["--resume", str(folder)], "is in use by process")
    found = differences(whole(work, "force_octo.py"), folder)
    assert not found, found


def two_of_one_name(work: Path, seed: int) -> None:
    name = f"twice-{seed}"
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    two_at_once(work, flags_of(work, "force_octo.py", name), "is in use by process|exists: choose another")
    found = differences(whole(work, "force_octo.py"), work / "runs" / name)
    assert not found, found


def two_default_names(work: Path) -> None:
    runs = Path(tempfile.mkdtemp(dir=work))
    words = [*flags_of(work, "bc.py", "")[:-4], "--runs", str(runs)]
    lives = [start(work, "bc.py", words) for _ in range(3)]
    assert [life.wait(600) for life in lives] == [0, 0, 0], [life.text()[-300:] for life in lives]
    assert len(list(runs.iterdir())) == 3


def signalled(work: Path, script: str, number: int, share: float, more: str = "", quick: bool = True) -> None:
    """One line that names --resume, the code that a shell knows, no process left; then it goes on, alike."""
    name = tempfile.mktemp(prefix="signalled-", dir="").strip("/")
    folder = work / "runs" / name
    life = start(work, script, [*flags_of(work, script, name), *more.split()], quick=quick)
    until(life, folder, int(share * last_update(whole(work, script))))
    os.kill(life.pid, number)
    one_line(life, 128 + number, rf"stopped by {signal.Signals(number).name}; go on with --resume {folder}")
    if more:
        again = start(work, script, ["--resume", str(folder)], quick=quick)
        assert again.wait(600) == 0, again.text()[-400:]
    else:
        goes_on(work, script, folder)


def signalled_early(work: Path, number: int) -> None:
    """While nothing is there yet that could be gone on with."""
    life = start(work, "bc.py", flags_of(work, "bc.py", f"early-{number}"))
    time.sleep(0.6)
    os.kill(life.pid, number)
    one_line(life, 128 + number, f"stopped by {signal.Signals(number).name}")


def signalled_twice(work: Path, number: int) -> None:
    name = tempfile.mktemp(prefix="twice-", dir="").strip("/")
    life = start(work, "force_octo.py", flags_of(work, "force_octo.py", name))
    until(life, work / "runs" / name, 15)
    os.kill(life.pid, number)
    os.kill(life.pid, number)
    time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.kill(life.pid, number)
    one_line(life, 128 + number, "stopped by")
    goes_on(work, "force_octo.py", work / "runs" / name)


def worker_died(work: Path, which: int) -> None:
    """One of the worker processes is killed, as the kernel does it where memory runs out: one line."""
    name = tempfile.mktemp(prefix="worker-", dir="").strip("/")
    words = [*flags_of(work, "force_octo.py", name), "--num-envs", "2"]
    life = start(work, "force_octo.py", words, quick=False)
    until(life, work / "runs" / name, 1)
    workers = [pid for pid in sorted(group(life.pid)) if pid != life.pid and parent(pid) == life.pid]
    workers = [pid for pid in workers if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[which], signal.SIGKILL)
    one_line(life, 2, "died|failed")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def evaluation_died(work: Path) -> None:
    name = tempfile.mktemp(prefix="evaluation-", dir="").strip("/")
    life = start(work, "bc.py", [*flags_of(work, "bc.py", name), "--eval-episodes", "3000"])
    while not [pid for pid in group(life.pid) if pid != life.pid] and not life.over():
        time.sleep(0.05)
    time.sleep(1)
    for pid in group(life.pid):
        if pid != life.pid:
            os.kill(pid, signal.SIGKILL)
    one_line(life, 2, "process that evaluates has died.*--resume")


def shorter_log(work: Path, share: float) -> None:
    folder = stopped(work)
    for name in Checkpoints(folder).names():
        size = torch.load(folder / "checkpoints" / name / "training.pt", weights_only=True)["log_size"]
    os.truncate(folder / "metrics.csv", int(share * size))
    one_line(start(work, "force_octo.py", ["--resume", str(folder)]), 2, "metrics.csv is shorter than")
    shutil.rmtree(folder.parent)


def full_disk(work: Path, script: str, kilobytes: int) -> None:
    """A small file system fills up: one line; with more room the run goes on, alike, or says that it must begin anew."""
    with mounted(work, "-t", "tmpfs", "-o", f"size={kilobytes}k", "none") as disk:
        one_line(start(work, script, flags_of(work, script, "run", runs=disk)), 2, "disk is full|no space left")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        if Checkpoints(disk / "run").names():
            goes_on(work, script, disk / "run")
        elif (disk / "run/config.json").exists():
            one_line(start(work, script, ["--resume", str(disk / "run")]), 2, "no readable checkpoint|run folder")


def read_only(work: Path, what: str) -> None:
    with mounted(work, "-t", "tmpfs", "-o", "size=9m", "none") as disk:
        if what == "--resume":
            shutil.copytree(whole(work, "bc.py"), disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        if what == "--resume":
            said(work, "bc.py", ["--resume", str(disk / "run")], "Read-only file system")
        else:
            said(work, "bc.py", [*flags_of(work, "bc.py", "run"), what, str(disk)], "Read-only file system")


def broken_pipe(work: Path, script: str, updates: int) -> None:
    """`python SCRIPT | head`: whoever read has gone."""
    name = tempfile.mktemp(prefix="pipe-", dir="").strip("/")
    ours, theirs = os.pipe()
    life = start(work, script, flags_of(work, script, name), out=theirs)
    os.close(theirs)
    until(life, work / "runs" / name, updates)
    os.close(ours)
    code = life.wait(300)
    assert code == 2 and not life.left(), code
    goes_on(work, script, work / "runs" / name)


def null_steps(work: Path) -> None:
    """No success: null, never NaN, which is no JSON."""
    text = (whole(work, "bc.py") / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda word: f"constant {word}")
    assert summary["success_once"] or summary["steps_to_success"] is None
    assert "NaN" not in text and "Infinity" not in text


def no_key(work: Path) -> None:
    """--track without an account is said before a folder is there."""
    runs = work / "runs" / "untracked"
    before = dict(os.environ)
    os.environ |= {"WANDB_API_KEY": "", "NETRC": str(work / "none"), "HOME": str(work), "WANDB_CONFIG_DIR": str(work)}
    try:
        words = flags_of(work, "bc.py", "run", runs=runs) + ["--track"]
        said(work, "bc.py", words, "--track needs")
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not runs.exists()


# === The list ========================================================================================================
def cases(kills: int, cuts: int) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """(kind, name, what to do) of each."""
    root = os.geteuid() == 0
    yield from damaged_cases()
    yield from foreign_cases()
    yield from flag_cases()
    kind = "diverged"
    force = "force_octo.py"
    for more in ("--reinforce-lr 1e8", "--sft-lr 1e8", "--sft-lr 1e5", "--q-weight 1e9", "--bc-weight 1e9"):
        yield kind, more, partial(diverged, script=force, more=f"{more} --checkpoint-freq 1")
    yield kind, "--lr 1e8", partial(diverged, script="bc.py", more="--lr 1e8 --checkpoint-freq 1")
    for column in ("action", "obs_proprio"):
        yield (
            kind,
            f"NaN in {column} of a cache",
            partial(diverged, script=force, more="", change=partial(nan_cache, column=column)),
        )
    yield kind, "NaN in the run to start from", partial(diverged, script=force, more="", change=nan_weights)
    kind = "two processes"
    yield kind, "two --resume", two_resumes
    for i in range(3):
        yield kind, f"two of one --run-name {i}", partial(two_of_one_name, seed=i)
    yield kind, "three default names in one second", two_default_names
    kind = "signals"
    for number in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(number).name
        for script in SCRIPTS:
            for share in (0.1, 0.5, 0.9):
                yield kind, f"{name} {script} {share}", partial(signalled, script=script, number=number, share=share)
        yield kind, f"{name} early", partial(signalled_early, number=number)
        yield kind, f"{name} twice", partial(signalled_twice, number=number)
        yield (
            kind,
            f"{name} with workers",
            partial(signalled, script=force, number=number, share=0.5, more="--num-envs 2", quick=False),
        )
    kind = "a worker dies"
    for which in (0, 1):
        yield kind, f"environment {which}", partial(worker_died, which=which)
    yield kind, "evaluation", evaluation_died
    kind = "files and folders"
    for kilobytes in (8, 500, 2000, 5000, 9000) if root else ():
        yield kind, f"full disk {kilobytes}", partial(full_disk, script=force, kilobytes=kilobytes)
    for what in ("--runs", "--demo-dir", "--resume") if root else ():
        yield kind, f"read-only {what}", partial(read_only, what=what)
    for updates in (1, 10):
        yield kind, f"broken pipe {updates}", partial(broken_pipe, script="bc.py", updates=updates)
    yield kind, "summary.json without a success", null_steps
    yield kind, "--track without a key", no_key
    for i in range(kills // 2):
        script = list(SCRIPTS)[i % len(SCRIPTS)]
        yield "killed twice at random times", f"{script} {i}", partial(killed, script=script, seed=i)
    for i in range(cuts if root else 0):
        script = list(SCRIPTS)[i % 2]
        yield "power cut", f"{script} {i}", partial(power_cut, script=script, seed=i)


def damaged_cases() -> Iterator[tuple]:
    kind = "damaged newest checkpoint"
    for name in ("weights.safetensors", "training.pt"):
        for share in (0, 0.5, 0.999):
            yield (
                kind,
                f"{name} cut {share}",
                partial(damaged, damage=partial(cut, name, share), falls_back=True, pattern=""),
            )
        for seed in range(4):
            damage = partial(flip, name, seed)
            yield kind, f"{name} bit {seed}", partial(damaged, damage=damage, falls_back=True, pattern="")
    missing = lambda path: (path / "weights.safetensors").unlink()  # noqa: E731
    yield kind, "no weights", partial(damaged, damage=missing, falls_back=True, pattern="")
    yield kind, "rows cut", partial(damaged, damage=rows_beyond, falls_back=True, pattern="")
    yield (
        kind,
        "sums.json is text",
        partial(damaged, damage=lambda path: (path / "sums.json").write_text("hello"), falls_back=True, pattern=""),
    )
    kind = "no checkpoint that can be read"
    for name in ("weights.safetensors", "training.pt"):
        for share in (0, 0.5):
            yield (
                kind,
                f"{name} cut {share}",
                partial(
                    damaged,
                    damage=partial(both, partial(cut, name, share)),
                    falls_back=False,
                    pattern="no readable checkpoint",
                ),
            )
    yield (
        kind,
        "none",
        partial(damaged, damage=partial(both, shutil.rmtree), falls_back=False, pattern="no readable checkpoint"),
    )


def foreign_cases() -> Iterator[tuple]:
    kind = "training state of another make"
    changes = {
        "a list": lambda state: [1, 2],
        "a number": lambda state: 3,
        "empty": lambda state: {},
        "unknown stage": lambda state: state.update(stage="dreaming"),
        "updates is text": lambda state: state.update(updates="many"),
        "no generators": lambda state: state.pop("rng") and None,
        "generator of another size": lambda state: state["rng"].update(batch=torch.zeros(3, dtype=torch.uint8)),
        "no parts": lambda state: state.pop("parts") and None,
        "optimizer of other shapes": wider,
        "optimizer is a list": lambda state: state["parts"].update(actor_optimizer=[1]),
        "no buffers": lambda state: state.pop("buffers") and None,
        "buffer without columns": lambda state: state["buffers"]["expert_steps"].update(columns={}),
        "seconds of other stages": lambda state: state.update(seconds={"a": 1.0}),
    }
    for name, change in changes.items():
        damage = partial(both, partial(state_changed, change))
        pattern = "no readable checkpoint|of another version or make"
        yield kind, name, partial(damaged, damage=damage, falls_back=False, pattern=pattern)
    kind = "config.json of another make"
    with_args = lambda **more: lambda config: config | {"args": config["args"] | more}  # noqa: E731
    changes = {
        "half": (lambda config: json.dumps(config)[:100], "is no run folder"),
        "a list": (lambda config: [1], "is no run folder"),
        "no flags": (lambda config: {"script": config["script"]}, "is no run folder"),
        "another script": (lambda config: config | {"script": "bc.py"}, "is a run of bc.py"),
        "unknown flag": (with_args(speed=9), "by a version with speed"),
        "a flag that is text": (with_args(hidden_dim="wide"), "hidden_dim = 'wide'"),
        "a flag that can't be": (with_args(K=0), "--K must be"),
        "another width": (with_args(hidden_dim=8), "of another task or network"),
        "another chunk": (with_args(chunk_len=2), "of another task or network"),
    }
    for name, (change, pattern) in changes.items():
        for flag in ("--resume", "--eval-only"):
            yield kind, f"{name} {flag}", partial(config_changed, change=change, pattern=pattern, flag=flag)
    for share in (0, 0.3, 0.99):
        yield "metrics.csv is shorter", str(share), partial(shorter_log, share=share)


def flag_cases() -> Iterator[tuple]:
    kind = "numbers that can't be"
    for script in SCRIPTS:
        module = importlib.import_module(script.removesuffix(".py"))
        for field in dataclasses.fields(module.Args):
            values = {int: ["-1", "9" * 15, "inf"], float: ["nan", "inf", "1e30"]}.get(type(field.default), [])
            flag = field.name.replace("_", "-")
            for value in values:
                if (field.name, value) != ("critic_len", "-1"):
                    name = f"{script} --{flag} {value}"
                    yield kind, name, partial(number, script=script, flag=flag, value=value)
    kind = "words that can't be"
    words = {
        "--resume=": "need a run folder",
        "--eval-only=": "need a run folder",
        "--run-name=": "choose another --run-name",
        "--resume=a --eval-only=b": "exclude each other",
        "--resume=/nowhere": "is no run folder",
        "--eval-only=/dev/null": "is no run folder",
        "--env-id Nope-v1": "no ManiSkill task",
        "--robot-uids wall-e --demo-dir /tmp/none": "no ManiSkill robot",
        "--sft-checkpoint /nowhere": "is no run folder",
        "--checkpoint /nowhere": "need each other",
        "--demo-path /nowhere.h5": "doesn't exist",
        "--runs /dev/null": "Not a directory",
        "--runs /proc/none": "No such file|can't be used",
        "--demo-dir /dev/null/demos": "Not a directory",
        f"--run-name {'n' * 300}": "File name too long",
        "--updaets 3": "unknown flag",
    }
    for flags, pattern in words.items():
        for script in ("bc.py", "force_octo.py"):
            if script == "force_octo.py" or "sft" not in flags:
                base = COMMON.split(" --demo-dir")[0].split() + SCRIPTS[script].split()
                place = ["--demo-dir", "demos"] if "demo-dir" not in flags else []
                yield (
                    kind,
                    f"{script} {flags[:40]}",
                    partial(said, script=script, words=[*base, *place, *flags.split(" ")], pattern=pattern),
                )


# === What a checkpoint costs =========================================================================================
def costs(work: Path) -> list[dict]:
    """Bytes and seconds of a checkpoint after 1,000 new rows, append-only and by writing all rows again."""
    found = []
    for rows in (10_000, 100_000, 1_000_000):
        folder = Path(tempfile.mkdtemp(dir=work))
        table = Table(
            {"feature": torch.zeros(0, 154), "action": torch.zeros(0, 4), "next": torch.zeros(0, dtype=torch.int64)}
        )
        noise = torch.randn(rows, 154)
        steps = torch.arange(rows)
        table.append(rows, feature=noise, action=noise[:, :4], next=steps)
        checkpoints = Checkpoints(folder)
        checkpoints.save("update-0", {"w": torch.zeros(9)}, {}, {"expert": table})
        table.append(1000, feature=noise[:1000], action=noise[:1000, :4], next=steps[:1000])
        row = {"rows": rows}
        for way in ("append-only", "writing all"):
            if way == "writing all":
                checkpoints.written = {}
                table.version += 1
            before = written_bytes()
            begin = time.perf_counter()
            checkpoints.save(
                "update-1" if way == "append-only" else "update-2", {"w": torch.zeros(9)}, {}, {"expert": table}
            )
            row |= {
                f"{way}, s": f"{time.perf_counter() - begin:.2f}",
                f"{way}, MB": f"{(written_bytes() - before) / 1e6:.1f}",
            }
        found.append(row)
        shutil.rmtree(folder)
    return found


def written_bytes() -> int:
    """Bytes that this process has handed to write() so far (Linux)."""
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])


# === Program =========================================================================================================
def read_results(path: Path) -> dict[tuple[str, str], str]:
    """{(kind, case): "" if it went right, else what was seen}."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["kind"], row["case"]): row["seen"] for row in csv.DictReader(file)}


def note(path: Path, kind: str, name: str, seen: str) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["kind", "case", "right", "seen"])
        writer.writerow([kind, name, int(not seen), " ".join(seen.split())[:300]])


def tables(results: dict[tuple[str, str], str], measured: list[dict]) -> str:
    """What stands between the markers of docs/reliability.md."""
    tried = collections.Counter(kind for kind, _ in results)
    right = collections.Counter(kind for (kind, _), seen in results.items() if not seen)
    lines = ["| What goes wrong | tried | right |", "|---|---|---|"]
    lines += [f"| {kind} | {count} | {right[kind]} |" for kind, count in tried.items()]
    lines += [f"| in all | {sum(tried.values())} | {sum(right.values())} |"]
    if measured:
        names = list(measured[0])
        lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in measured]
    return "\n".join(lines)


def write_document(path: Path, text: str) -> None:
    begin, end = "<!-- faults -->", "<!-- /faults -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills at random times, two a run")
    parser.add_argument("--cuts", type=int, default=20, help="power cuts")
    parser.add_argument("--only", default="", help="cases whose kind and name match")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "faults", help="folder for runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so long")
    parser.add_argument("--costs", action="store_true", help="measure what a checkpoint costs, too")
    chosen = parser.parse_args()
    end = time.monotonic() + chosen.seconds
    torch.set_num_threads(1)
    for folder in ("logs", "runs"):
        (chosen.work / folder).mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        importlib.import_module(script.removesuffix(".py"))
    import mani_skill.envs  # noqa: F401  forked programs have it then

    known = read_results(chosen.results)
    for kind, name, attempt in cases(chosen.kills, chosen.cuts):
        if (kind, name) in known or not re.search(chosen.only, f"{kind}: {name}") or time.monotonic() > end:
            continue
        seen = ""
        try:
            attempt(chosen.work)
        except Exception as error:  # whatever it is, the case didn't go as it should
            seen = f"{type(error).__name__}: {error}"
        note(chosen.results, kind, name, seen)
        print(f"{'right' if not seen else 'WRONG'}  {kind}: {name} {seen[:700]}", flush=True)
    measured = []
    if chosen.costs:
        measured = costs(chosen.work)
        with COSTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(measured[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(measured)
    elif COSTS.exists():
        with COSTS.open(newline="") as file:
            measured = list(csv.DictReader(file))
    if chosen.results == RESULTS:
        write_document(DOCUMENT, tables(read_results(RESULTS), measured))


if __name__ == "__main__":
    main()
