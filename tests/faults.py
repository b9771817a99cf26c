"""What goes wrong around a run, made to go wrong here: python tests/faults.py [--only REGEX] [--kills N] [--cuts N]

Each case starts a real program with tiny settings, does something to it (a kill, a power cut, a damaged file, a flag
that can't be), and looks at what comes out: the exit code, one line that says what to do, no traceback, no process
left behind, files as they were, and results that equal those of an undisturbed run. Cases that are in the CSV are not
tried again; delete rows to repeat them. At the end the tables of docs/reliability.md are written anew. Power cuts and
full disks need root (they mount file systems of their own); without it they are left out.

Inputs that can't be are listed in tests/fault_inputs.py; tests/lives.py starts the programs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import SCRIPTS  # noqa: E402
from fault_inputs import DAMAGES, Case, input_cases, run_copy  # noqa: E402
from lives import (  # noqa: E402
    MODES,
    Life,
    begin,
    goes_on,
    group,
    having,
    last_update,
    logged,
    new_name,
    preload,
    resume,
    same,
    script_flags,
    start,
    until,
    whole,
)
from safetensors.torch import load_file, save_file  # noqa: E402

from plumbing.storage import Checkpoints  # noqa: E402
from plumbing.table import Table  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "faults.csv"
COSTS = ROOT / "benchmark" / "results" / "checkpoint_cost.csv"
DOCUMENT = ROOT / "docs" / "reliability.md"


# === Inputs that can't be ============================================================================================
def content_of(folder: Path) -> dict[Path, str]:
    """Checksums of all files below; locks belong to processes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    return {path: hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


def refused(work: Path, case: Case) -> None:
    """The program says in one line what is wrong, and nothing that was there is changed."""
    here = Path(tempfile.mkdtemp(dir=work / "cases"))
    here.chmod(0o755)
    case.make(here, work)
    before = content_of(here)
    words = [word.replace("{here}", str(here)) for word in case.words]
    life = start(work / "logs", case.program, words, before=case.before, here=here, trains=False)
    life.one_line(case.code, case.says, seconds=120)
    after = content_of(here)
    may_change = set(here.glob(case.remade)) if case.remade else set()
    lost = [str(path) for path, content in before.items() if after.get(path) != content and path not in may_change]
    assert not lost, f"changed: {lost}"
    assert case.code == 0 or not list((here / "runs").glob("*/config.json")), "a run folder was made"
    shutil.rmtree(here)


def falls_back(work: Path, name: str, damage: Callable[[Path], object]) -> None:
    """Something happened to the newest checkpoint: the run goes on from the one before, alike, and says so."""
    here = Path(tempfile.mkdtemp(dir=work / "cases"))
    folder = run_copy(here, work, name)
    newest, older = Checkpoints(folder).names()
    damage(folder / "checkpoints" / newest)
    text = goes_on(work, name, folder)
    assert f"checkpoint {newest} is damaged" in text and f"going on from {older}" in text, text[-300:]
    shutil.rmtree(here)


# === Ends ============================================================================================================
def die_within_checkpoint(step: int) -> None:
    """In a program: SIGKILL to all of its processes at a step of writing a checkpoint, where step counts its calls."""
    steps = itertools.count()

    def deadly(function: Callable) -> Callable:
        def call(*args, **more):
            if next(steps) == step:
                os.killpg(0, signal.SIGKILL)
            return function(*args, **more)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
        setattr(owner, name, deadly(getattr(owner, name)))


def killed(work: Path, name: str, mode: str, seed: int) -> str:
    """SIGKILL, four times, at random times and within checkpoints; then all values are as if nothing had been."""
    chance = random.Random(seed)
    run = f"killed-{name}-{seed}"
    folder = work / "runs" / run
    shutil.rmtree(folder, ignore_errors=True)
    last = last_update(whole(work, name, mode))
    kills = collections.Counter()
    for within in chance.sample([True, True, False, False], 4):
        before = partial(die_within_checkpoint, chance.randrange(4, 40)) if within else None
        done = logged(folder)
        life = go(work, name, folder, mode, before)
        if not within:
            until(life, folder, chance.randint(done + 1, done + 1 + (last - done) // 2))
            time.sleep(chance.uniform(0, 0.1))
            life.kill()
        code = life.wait(300)
        life.left()
        if code == 0:  # it was faster
            break
        assert code == 137, life.errors()[-400:]
        kills[within] += 1
    life = go(work, name, folder, mode)
    assert life.wait(300) == 0, life.errors()[-400:]
    same(work, name, folder, mode)
    shutil.rmtree(folder)
    return f"{kills.total()} kills, {kills[True]} of them within a checkpoint"


def go(work: Path, name: str, folder: Path, mode: str, before: Callable[[], None] | None = None) -> Life:
    """Resume a run; one that died before its first checkpoint says so, and begins anew."""
    if Checkpoints(folder).names():
        return resume(work, name, folder, before)
    if (folder / "config.json").exists():
        resume(work, name, folder).one_line(2, "no readable checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    return begin(work, name, folder.name, mode, before=before)


@contextlib.contextmanager
def mounted(point: Path, *words: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", *words, str(point)], check=True, capture_output=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, capture_output=True)


EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2


def power_cut(work: Path, name: str, seed: int) -> str:
    """An ext4 on a loop device stops at once, without flushing its log: what no fsync has reached is gone."""
    chance = random.Random(seed)
    image = work / f"disk-{name}-{seed}.img"
    point = work / f"disk-{name}-{seed}"
    last = last_update(whole(work, name))
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(point, "-o", f"loop,noauto_da_alloc,commit={chance.choice([1, 300])}", str(image)) as disk:
        life = begin(work, name, "run", runs=disk)
        until(life, disk / "run", chance.randint(1, last))
        time.sleep(chance.uniform(0, 0.2))
        made = (disk / "run/checkpoints/latest").exists()
        root = os.open(disk, os.O_RDONLY)
        fcntl.ioctl(root, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        os.close(root)
        life.kill()
        life.left()
    with mounted(point, "-o", "loop", str(image)) as disk:
        found = Checkpoints(disk / "run").names()
        if found:
            goes_on(work, name, disk / "run")
        else:
            assert not made, "a checkpoint that was there is lost"
            if (disk / "run").exists():
                resume(work, name, disk / "run").one_line(2, "no readable checkpoint|is no run folder")
    image.unlink()
    point.rmdir()
    return f"goes on from {found[0]}" if found else "before the first checkpoint"


def signalled(work: Path, name: str, number: int, share: float, mode: str = "state") -> None:
    """One line that names --resume, the code that a shell knows, no process left; then it goes on, alike."""
    run = new_name("signalled")
    folder = work / "runs" / run
    updates = max(1, int(share * last_update(whole(work, name, mode))))
    life = begin(work, name, run, mode)
    until(life, folder, updates)
    os.kill(life.pid, number)
    life.one_line(128 + number, rf"stopped by {signal.Signals(number).name}; go on with --resume {folder}")
    goes_on(work, name, folder, mode)
    shutil.rmtree(folder)


def signalled_early(work: Path, name: str, number: int) -> None:
    """While nothing is there yet that could be gone on with."""
    life = begin(work, name, new_name("early"))
    time.sleep(0.5)
    os.kill(life.pid, number)
    life.one_line(128 + number, f"stopped by {signal.Signals(number).name}(; go on with --resume .*)?$")


def signalled_twice(work: Path, name: str, number: int) -> None:
    run = new_name("twice")
    life = begin(work, name, run)
    until(life, work / "runs" / run, 15)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.pid, number)
        time.sleep(0.03)
    life.one_line(128 + number, "stopped by")
    goes_on(work, name, work / "runs" / run)


def interrupted_imports(work: Path, name: str, number: int, seconds: float) -> None:
    """`python SCRIPT` as a program of its own, seconds after its start: one line at most, and no traceback."""
    words = [sys.executable, str(ROOT / f"{name}.py"), *script_flags(work, name)]
    program = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(seconds)
    program.send_signal(number)
    _, errors = program.communicate(timeout=120)
    text = errors.decode()
    code = program.returncode if program.returncode >= 0 else 128 - program.returncode
    assert code == 128 + number, f"exit code {code}: {text[-300:]}"
    assert "Traceback" not in text and text.count("\n") <= 1, text[-600:]


def worker_died(work: Path, name: str, which: int) -> None:
    """A process of an environment is killed, as the kernel does it where memory runs out: one line; then it goes on."""
    run = new_name("worker")
    folder = work / "runs" / run
    updates = int(0.3 * last_update(whole(work, name)))
    life = begin(work, name, run, "two environments")
    until(life, folder, updates)
    children = sorted(pid for pid in group(life.pid) if pid != life.pid and parent(pid) == life.pid)
    os.kill(children[which], signal.SIGKILL)  # the first one evaluates
    life.one_line(2, "died|failed")
    if Checkpoints(folder).names():
        goes_on(work, name, folder, "two environments")
    shutil.rmtree(folder, ignore_errors=True)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


# === Divergence ======================================================================================================
def diverged(work: Path, name: str, change: Callable | None = None, **flags) -> None:
    """One line with stage and update, and no checkpoint that holds what isn't finite."""
    run = new_name("diverged")
    if change:
        flags |= change(work)
    life = begin(work, name, run, checkpoint_freq=1, **flags)
    life.one_line(2, r"isn't finite|is no longer finite( \(stage [\w-]+, update \d+\))?: try ")
    folder = work / "runs" / run
    for checkpoint in Checkpoints(folder).names():
        weights = load_file(folder / "checkpoints" / checkpoint / "weights.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values()), checkpoint
    shutil.rmtree(folder, ignore_errors=True)


def nan_weights(work: Path, origin: str) -> dict:
    """Flags for a run whose weights hold a NaN, to start from."""
    here = Path(tempfile.mkdtemp(dir=work / "cases"))
    folder = Path(shutil.copytree(whole(work, origin), here / "run"))
    for name in Checkpoints(folder).names():
        path = folder / "checkpoints" / name / "weights.safetensors"
        weights = load_file(path)
        part = next(key for key, value in weights.items() if key.startswith("actor.") and value.ndim)
        weights[part].view(-1)[0] = float("nan")
        save_file(weights, path)
        (path.parent / "sums.json").unlink()
    return dict(sft_checkpoint=str(folder))


# === Two processes ===================================================================================================
def two_resumes(work: Path, name: str) -> None:
    """One goes on to its end, the other says why it can't."""
    here = Path(tempfile.mkdtemp(dir=work / "cases"))
    folder = run_copy(here, work, name)
    lives = [resume(work, name, folder) for _ in range(2)]
    one_of_two(lives, "is in use by process")
    same(work, name, folder)
    shutil.rmtree(here)


def two_of_one_name(work: Path, name: str) -> None:
    run = new_name("named")
    one_of_two([begin(work, name, run) for _ in range(2)], "is in use by process|exists: choose another")
    same(work, name, work / "runs" / run)


def one_of_two(lives: list[Life], says: str) -> None:
    codes = [life.wait(400) for life in lives]
    assert sorted(codes) == [0, 2], [life.errors()[-300:] for life in lives]
    lives[codes.index(2)].one_line(2, says)


def three_default_names(work: Path, name: str) -> None:
    runs = Path(tempfile.mkdtemp(dir=work / "cases"))
    lives = [begin(work, name, None, runs=runs) for _ in range(3)]
    assert [life.wait(400) for life in lives] == [0, 0, 0], [life.errors()[-300:] for life in lives]
    assert len(list(runs.iterdir())) == 3
    shutil.rmtree(runs)


def three_without_demonstrations(work: Path, name: str) -> None:
    """One makes them, the others wait for it and say so."""
    here = Path(tempfile.mkdtemp(dir=work / "cases"))
    words = [str(ROOT / f"{name}.py"), *script_flags(work, name), "--demo-dir", str(here / "demos")]
    lives = [start(work / "logs", "make_demos", words) for _ in range(3)]
    assert [life.wait(400) for life in lives] == [0, 0, 0], [life.errors()[-300:] for life in lives]
    waited = sum("another process makes demonstrations" in life.errors() for life in lives)
    made = sum("4 demonstrations in" in life.errors() for life in lives)
    assert (waited, made) == (2, 1), [life.errors() for life in lives]
    shutil.rmtree(here)


# === Disks ===========================================================================================================
def full_disk(work: Path, name: str, kilobytes: int) -> None:
    """A small file system fills up: one line; with more room the run goes on, alike, or says that it must begin anew."""
    point = work / f"full-{kilobytes}"
    with mounted(point, "-t", "tmpfs", "-o", f"size={kilobytes}k", "none") as disk:
        begin(work, name, "run", runs=disk).one_line(2, "disk is full|no space left|No space left")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        if Checkpoints(disk / "run").names():
            goes_on(work, name, disk / "run")
        elif (disk / "run/config.json").exists():
            resume(work, name, disk / "run").one_line(2, "no readable checkpoint|run folder")


def read_only(work: Path, name: str, what: str) -> None:
    with mounted(work / "read-only", "-t", "tmpfs", "-o", "size=64m", "none") as disk:
        run_copy(disk, work, name)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        life = resume(work, name, disk / "run") if what == "resume" else begin(work, name, "new", **{what: str(disk)})
        life.one_line(2, "Read-only file system")


def broken_pipe(work: Path, name: str) -> None:
    """`python SCRIPT | head`: whoever read has gone."""
    run = new_name("pipe")
    updates = int(0.4 * last_update(whole(work, name)))
    ours, theirs = os.pipe()
    life = begin(work, name, run, out=theirs, before=partial(os.close, ours))  # it doesn't read what it prints
    os.close(theirs)
    until(life, work / "runs" / run, updates)
    os.close(ours)
    code = life.wait(240)
    assert code == 2 and not life.left(), code
    goes_on(work, name, work / "runs" / run)


def summary_without_success(work: Path, name: str) -> None:
    """No success: null, never NaN, which is no JSON; script and method are named."""
    text = (whole(work, name) / "summary.json").read_text()
    found = json.loads(text, parse_constant=lambda word: f"constant {word}")
    assert found["success_once"] or found["steps_to_success"] is None
    assert "NaN" not in text and "Infinity" not in text and found["script"] == f"{name}.py"


# === The list ========================================================================================================
def cases(work: Path, kills: int, cuts: int) -> Iterator[tuple[str, str, Callable[[Path], str | None]]]:
    """(kind, name, what to do) of each."""
    for case in input_cases(work):
        yield case.kind, case.name, partial(refused, case=case)
    turn = itertools.cycle(SCRIPTS)
    for what, damage in DAMAGES.items():
        name = "force_octo" if what == "rows cut" else next(turn)
        yield from each("damaged newest checkpoint", what, falls_back, [name], damage=damage)
    for flag in RATES:
        yield from each("divergence", f"{flag} 1e8", diverged, having(flag), **{flag: 1e8})
    for name, origin in (("force_octo", "bc"), ("conrft", "bc"), ("force_pi0", "force_pi0")):
        change = partial(nan_weights, origin=origin)
        yield from each("divergence", "NaN in --sft-checkpoint", diverged, [name], change=change)
    yield from each("two processes", "two --resume", two_resumes)
    yield from each("two processes", "two of one --run-name", two_of_one_name)
    yield from each("two processes", "three default names in one second", three_default_names, ["bc"])
    yield from each("two processes", "three without demonstrations", three_without_demonstrations, ["bc"])
    for number in (signal.SIGTERM, signal.SIGINT):
        yield from signal_cases(signal.Signals(number).name, number)
    for which in (0, 1, 2):
        yield from each("a worker dies", f"number {which}", worker_died, having("online_steps"), which=which)
    yield from each("files and pipes", "broken pipe", broken_pipe)
    yield from each("files and pipes", "summary without a success", summary_without_success)
    for seed in range(kills // 4):
        name = SCRIPTS[seed % len(SCRIPTS)]
        mode = list(MODES)[seed // len(SCRIPTS) % len(MODES)]
        yield "killed four times", f"{name} {mode} {seed}", partial(killed, name=name, mode=mode, seed=seed)
    if os.geteuid() == 0:
        yield from disk_cases(cuts)


def each(kind: str, title: str, attempt: Callable, names=SCRIPTS, **flags) -> Iterator[tuple]:
    """The case for each of the scripts."""
    for name in names:
        yield kind, f"{name}: {title}", partial(attempt, name=name, **flags)


RATES = "lr sft_lr reinforce_lr critic_lr actor_lr online_lr".split()


def signal_cases(word: str, number: int) -> Iterator[tuple]:
    kind = "signals"
    for share in (0.1, 0.8, 1.0):
        yield from each(kind, f"{word} after {share}", signalled, number=number, share=share)
    yield from each(kind, f"{word} early", signalled_early, number=number)
    yield from each(kind, f"{word} three times", signalled_twice, ["force_octo"], number=number)
    two = dict(number=number, share=0.5, mode="two environments")
    yield from each(kind, f"{word} with two environments", signalled, ["conrft"], **two)
    for seconds in (0.3, 1.0, 3.0):
        what = f"{word} {seconds} s after the start"
        yield from each(kind, what, interrupted_imports, ["bc"], number=number, seconds=seconds)


def disk_cases(cuts: int) -> Iterator[tuple]:
    """These mount file systems of their own."""
    turn = itertools.cycle(SCRIPTS)
    for kilobytes in (8, 100, 300, 600, 1200):
        yield from each("disks", f"full after {kilobytes} kB", full_disk, [next(turn)], kilobytes=kilobytes)
    for what in ("runs", "demo_dir", "resume"):
        yield from each("disks", f"read-only {what}", read_only, [next(turn)], what=what)
    for seed in range(cuts):
        yield from each("power cut", str(seed), power_cut, [next(turn)], seed=seed)


# === What a checkpoint costs =========================================================================================
def costs(work: Path) -> list[dict]:
    """Bytes and seconds of a checkpoint after 1,000 new rows, append-only and by writing all rows again."""
    found = []
    for rows in (10_000, 100_000, 1_000_000):
        folder = Path(tempfile.mkdtemp(dir=work))
        noise = torch.randn(rows, 154)
        steps = torch.arange(rows)
        none = {"feature": noise[:0], "action": noise[:0, :4], "next": steps[:0]}
        table = Table(none)
        table.append(rows, feature=noise, action=noise[:, :4], next=steps)
        checkpoints = Checkpoints(folder)
        checkpoints.save("update-0", {"w": torch.zeros(9)}, {}, {"expert": table})
        table.append(1000, feature=noise[:1000], action=noise[:1000, :4], next=steps[:1000])
        row = {"rows": rows}
        for update, way in enumerate(("append-only", "writing all"), start=1):
            if way == "writing all":
                table.version += 1
            before = written_bytes()
            begun = time.perf_counter()
            checkpoints.save(f"update-{update}", {"w": torch.zeros(9)}, {}, {"expert": table})
            row[f"{way}, s"] = f"{time.perf_counter() - begun:.2f}"
            row[f"{way}, MB"] = f"{(written_bytes() - before) / 1e6:.1f}"
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


def note(path: Path, kind: str, name: str, seen: str, did: str = "") -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["kind", "case", "right", "seen", "did"])
        writer.writerow([kind, name, int(not seen), " ".join(seen.split())[:300], did])


def kills_in(path: Path) -> str:
    """How many there were, and how many of them within a checkpoint."""
    with path.open(newline="") as file:
        counts = [re.findall(r"\d+", row["did"]) for row in csv.DictReader(file) if "kills" in row["did"]]
    total = sum(int(kills) for kills, _ in counts)
    within = sum(int(within) for _, within in counts)
    return f"{total} kills, {within} of them within a checkpoint"


def tables(results: dict[tuple[str, str], str], measured: list[dict], kills: str = "") -> str:
    """What stands between the markers of docs/reliability.md."""
    tried = collections.Counter(kind for kind, _ in results)
    right = collections.Counter(kind for (kind, _), seen in results.items() if not seen)
    lines = ["| What goes wrong | tried | right |", "|---|---|---|"]
    for kind, count in tried.items():
        title = f"{kind}: {kills}" if "killed" in kind and kills else kind
        lines.append(f"| {title} | {count} | {right[kind]} |")
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


def tried(attempt: Callable[[Path], str | None], work: Path) -> tuple[str, str]:
    """What was seen, if the case didn't go right, and what was done, where that is left to chance."""
    try:
        return "", attempt(work) or ""
    except Exception as error:  # whatever it is, the case didn't go as it should
        return f"{type(error).__name__}: {error}", ""


def prepare(work: Path) -> None:
    """Demonstrations are made first: a program that makes its own has a simulator, and can't fork environments."""
    torch.set_num_threads(1)
    for folder in ("logs", "runs", "cases"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    preload()
    words = [str(ROOT / "bc.py"), *script_flags(work, "bc")]
    assert start(work / "logs", "make_demos", words).wait() == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="kills, four to a run")
    parser.add_argument("--cuts", type=int, default=20, help="power cuts")
    parser.add_argument("--only", default="", help="cases whose kind and name match")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "faults", help="folder for runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so long")
    parser.add_argument("--each", type=int, default=10**9, help="most cases of a kind")
    parser.add_argument("--costs", action="store_true", help="measure what a checkpoint costs, too")
    chosen = parser.parse_args()
    end = time.monotonic() + chosen.seconds
    prepare(chosen.work)
    known = read_results(chosen.results)
    seen_of = collections.Counter()
    for kind, name, attempt in cases(chosen.work, chosen.kills, chosen.cuts):
        if (kind, name) in known or not re.search(chosen.only, f"{kind}: {name}") or time.monotonic() > end:
            continue
        seen_of[kind] += 1
        if seen_of[kind] > chosen.each:
            continue
        begun = time.monotonic()
        seen, did = tried(attempt, chosen.work)
        note(chosen.results, kind, name, seen, did)
        seconds = time.monotonic() - begun
        print(f"{'WRONG' if seen else 'right'} {seconds:5.1f} s  {kind}: {name} {seen[:700]}{did}", flush=True)
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
        write_document(DOCUMENT, tables(read_results(RESULTS), measured, kills_in(RESULTS)))


if __name__ == "__main__":
    main()
