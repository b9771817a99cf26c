"""Programs as processes that are forked from one that has imported all they need: seconds in the place of minutes.

What a forked program does differs from `python bc.py ...` in nothing but where its own processes come from: those of
evaluation and of environments are forked too, and demonstrations are made in the program itself.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
from conftest import SCRIPTS, InlinePool, as_flags, differences, tiny_args

import plumbing.replay
from plumbing import beside, make_demos, parse_flags, run_script, stop
from plumbing.storage import Checkpoints, place_in_order

NOTES = (  # lines beside the one that says why a program ends
    r"warning: .*|--drop-idle .* leaves out .*|\d+ demonstrations in .*|checkpoint .* is damaged .*; going on from .*"
    r"|.* is damaged \(.*\); making it again|\d+ actions of .* go beyond .*|ending at the next checkpoint, .*"
    r"|another process makes demonstrations .*|try the device: .*|wandb: .*"
    r"|.*\d+%\|.*|Failed to create .* for shader cache .*"  # progress; Mesa
)


def preload() -> None:
    """Import what programs import on their way."""
    for name in (*SCRIPTS, "mani_skill.envs", "torch._dynamo", "torch.utils.tensorboard", "wandb"):
        importlib.import_module(name)


@dataclass
class Life:
    """A program that was started."""

    pid: int
    log: Path  # folder with out.txt and err.txt
    code: int | None = None  # exit code; 128 + signal, as a shell says it

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code
        return self.code is not None

    def wait(self, seconds: float = 240) -> int:
        """Exit code; -1 for a program that hangs, which is ended here."""
        end = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > end:
                self.kill()
                self.code = -1
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        """As the kernel or a power cut ends it: all of its processes, without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.code = 137

    def left(self) -> list[int]:
        """Processes of its group that are still there some seconds after its end."""
        for _ in range(100):
            found = group(self.pid)
            if not found:
                break
            time.sleep(0.1)
        return found

    def errors(self) -> str:
        return (self.log / "err.txt").read_text(errors="replace")

    def one_line(self, code: int, pattern: str, seconds: float = 240) -> None:
        """It ends with this code, says why in one line, and leaves no process. Raises: AssertionError."""
        found = self.wait(seconds)
        text = self.errors()
        assert found == code, f"exit code {found}, not {code}: {text[-400:]}"
        assert "Traceback" not in text, text[-600:]
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        why = [line for line in lines if not re.fullmatch(NOTES, line.strip())]
        if code:
            assert len(why) == 1, f"{len(why)} lines: {text[-400:]}"
            lines = why
        assert re.search(pattern, "\n".join(lines)), text[-400:] or "nothing is said"
        assert not self.left(), "processes are left"


def group(number: int) -> list[int]:
    """Living processes of a process group (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rsplit(")", 1)[1].split()  # state, parent, group
            if int(words[2]) == number and words[0] != "Z":
                found.append(int(path.parent.name))
    return found


def start(
    logs: Path, name: str, words: list[str], out: int | None = None, before: Callable[[], None] | None = None,
    here: Path | None = None, trains: bool = True,
) -> Life:  # fmt: skip
    """Start `python NAME.py WORDS` in the folder `here`; `before` is called in the new process, `out` is its stdout.

    trains: it is expected to; the process of its evaluations is there from the start.
    """
    log = Path(tempfile.mkdtemp(dir=logs))
    pid = os.fork()
    if pid:
        return Life(pid, log)
    code = 1
    try:
        os.setsid()
        for number, file in ((1, "out.txt"), (2, "err.txt")):
            opened = os.open(log / file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(opened if out is None else out, number)
        os.chdir(here or log)
        if before:
            before()
        plumbing.replay.ProcessPoolExecutor = InlinePool
        if trains and name in SCRIPTS:
            fork_workers()
        code = ended(name, words)
        atexit._run_exitfuncs()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def ended(name: str, words: list[str]) -> int:
    """Exit code of the program, as the interpreter finds it."""
    sys.argv = [f"{name}.py", *words]
    try:
        if name == "make_demos":
            run_script(make_demos.main, words)
        elif name in SCRIPTS:
            script = importlib.import_module(name)
            run_script(script.main, parse_flags(script.Args, script.__doc__, script.TABLES))
        else:
            importlib.import_module(name).main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


EVALUATION_PIPE: list = []  # both ends, in a program that was started here


# === Worker processes ================================================================================================
def fork_workers() -> None:
    """The evaluation's process and those of environments come from this one as it is now, before it has a simulator."""
    gym.vector.AsyncVectorEnv = ForkedEnvs
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    EVALUATION_PIPE[:] = [ours, theirs]

    def serve() -> None:
        ours.close()
        beside.serve(theirs)

    process = fork.Process(target=serve)
    with stop.deaf_children():
        process.start()
    atexit.register(process.terminate)
    started = SimpleNamespace(start=lambda: None, terminate=process.terminate, join=process.join, pid=process.pid)
    context = SimpleNamespace(Pipe=lambda: (ours, theirs), Process=lambda **more: started)
    beside.multiprocessing = SimpleNamespace(get_context=lambda kind: context)


class ForkedEnvs(gym.vector.AsyncVectorEnv):
    """Its processes are forked. This one makes no environment, as its parent does: a simulator doesn't survive a fork."""

    def __init__(self, make, context, **more):
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        process = fork.Process(target=describe, args=(make[0], theirs))
        process.start()
        described = SimpleNamespace(**ours.recv(), close=lambda: None)
        process.join()
        here = os.getpid()

        def there(make_one):
            if os.getpid() == here:
                return described
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the program's handler isn't a new worker's
            for end in EVALUATION_PIPE:  # else neither side sees that the other one has ended
                end.close()
            return make_one()

        super().__init__([lambda one=one: there(one) for one in make], context="fork", **more)


def describe(make, pipe) -> None:
    env = make()
    names = ("metadata", "render_mode", "action_space", "observation_space")
    pipe.send({name: getattr(env, name) for name in names})
    env.close()


# === Runs ============================================================================================================
MODES = {  # what a run sees
    "state": {},
    "two environments": dict(num_envs=2),
    "camera": dict(obs_mode="rgb", num_envs=1),
}


def script_flags(work: Path, name: str, **more) -> list[str]:
    """Flags of a run of seconds."""
    script = importlib.import_module(name)
    own = {field.name for field in dataclasses.fields(script.Args)}
    known = {key: value for key, value in more.items() if key in own}
    return as_flags(tiny_args(work, script, torch_threads=1, **known))


def having(*flags: str) -> list[str]:
    """Scripts with these flags."""
    names = {flag.removeprefix("no-").replace("-", "_") for flag in flags}
    return [
        name
        for name in SCRIPTS
        if names <= {field.name for field in dataclasses.fields(importlib.import_module(name).Args)}
    ]


def begin(
    work: Path, name: str, run: str | None, mode: str = "state", runs: Path | None = None, before=None, out=None, **more
) -> Life:  # fmt: skip
    """A new run of seconds that goes through all stages of a script."""
    words = script_flags(work, name, run_name=run, runs=str(runs or work / "runs"), **MODES[mode] | more)
    return start(work / "logs", name, words, out, before)


def resume(work: Path, name: str, folder: Path, before=None) -> Life:
    return start(work / "logs", name, ["--resume", str(folder)], before=before)


def whole(work: Path, name: str, mode: str = "state") -> Path:
    """An undisturbed run, made once."""
    folder = work / "runs" / f"whole-{name}-{mode.replace(' ', '-')}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        life = begin(work, name, folder.name, mode)
        assert life.wait(600) == 0, life.errors()[-600:]
    return folder


def stopped(work: Path, name: str) -> Path:
    """A run that was ended in its last stage, with two checkpoints; made once."""
    folder = work / "runs" / f"stopped-{name}"
    if not (folder / "ended").exists():
        shutil.rmtree(folder, ignore_errors=True)
        life = begin(work, name, folder.name)
        until(life, folder, updates=int(0.8 * last_update(whole(work, name))))
        life.kill()
        (folder / "ended").touch()
    return folder


def last_update(folder: Path) -> int:
    return place_in_order(Checkpoints(folder).names()[0])[0]


def until(life: Life, folder: Path, updates: int) -> None:
    """Wait until so many updates are logged, or the program's end."""
    while not life.over() and logged(folder) < updates:
        time.sleep(0.005)


def logged(folder: Path) -> int:
    """Updates by metrics.csv."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((folder / "metrics.csv").read_text().splitlines()[-1].split(",")[1])
    return 0


def new_name(kind: str) -> str:
    return f"{kind}-{time.monotonic_ns()}"


def same(work: Path, name: str, folder: Path, mode: str = "state") -> None:
    """All logged values but times, evaluations, weights, optimizers, generators and buffers are the undisturbed run's."""
    found = differences(whole(work, name, mode), folder)
    assert not found, found[:3]


def goes_on(work: Path, name: str, folder: Path, mode: str = "state") -> str:
    """Resume to the end, with the results of the undisturbed run. Returns what was said. Raises: AssertionError."""
    life = resume(work, name, folder)
    assert life.wait(300) == 0, life.errors()[-400:]
    same(work, name, folder, mode)
    return life.errors()
