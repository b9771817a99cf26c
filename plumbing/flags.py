"""Flags that every script has, checks of flags, and the end of a program that the user can put right."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import math
import os
import re
import select
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from plumbing import ranks, stop
from plumbing.errors import UserError
from plumbing.evaluation import EVAL_SEED
from plumbing.help import as_flag, flags_help, wrapped
from plumbing.robot import prepare_robot
from plumbing.tasks import TASKS, Task, registered, task_of

THREADS = min(torch.get_num_threads(), 8)  # torch's own choice: OMP_NUM_THREADS, or the cores


@dataclass
class RunArgs:
    """The flags of a run that have nothing to do with its algorithm."""

    # --- experiment ---
    env_id: str = "StackCube-v1"  # ManiSkill task
    robot: Literal["maniskill", "franka-http"] = "maniskill"  # the simulator, or a real arm (docs/franka.md)
    robot_config: str | None = None  # file that describes a real robot's workplace (TOML)
    seed: int = 1  # seed of networks, batches, exploration and training episodes
    runs: str = "runs"  # folder for runs
    run_name: str | None = None  # name of the run's folder; default: task, script, observation mode, seed and time
    resume: str | None = None  # run folder to go on with; all other flags are taken from its config.json
    eval_only: str | None = None  # run folder to evaluate, without training; takes --eval-episodes too
    track: bool = False  # log to Weights & Biases too (works offline)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks live
    compile: Literal["off", "on", "graphs"] = "off"  # losses by torch.compile: slow at first; graphs: CUDA graphs too
    torch_threads: int = 0  # CPU threads; 0: one, and OMP_NUM_THREADS or all cores (at most 8) to train on images

    # --- demonstrations ---
    demo_path: str | None = None  # ManiSkill .h5 (with its .json), or a LeRobotDataset v3 folder; default: planned
    demo_columns: str | None = None  # of that folder, where names differ: "primary=observation.images.top state=..."
    demo_dir: str = "demos"  # cache for demonstrations
    num_demos: int = 50  # demonstrations to make or to use
    drop_idle: float = 0.03  # leave out steps in which nothing moves: the arm less than this (actions reach 1); 0: none

    # --- evaluation and logging ---
    eval_episodes: int = 100  # episodes of an evaluation
    eval_seed: int = EVAL_SEED  # of the first of them; whoever tunes flags takes other episodes for that
    video_episodes: int = 4  # episodes filmed after training (0 = none)
    log_freq: int = 100  # updates between logged rows
    checkpoint_freq: int = 1000  # updates between checkpoints (also written at the end of each stage and evaluation)


COMMON_LIMITS = {
    "at least 1": (lambda x: x >= 1, "num_envs num_demos eval_episodes log_freq checkpoint_freq"),
    "in 0..899 (training and evaluation episodes stay apart)": (lambda x: 0 <= x < 900, "seed"),
    f"at least {EVAL_SEED} (training and evaluation episodes stay apart)": (lambda x: x >= EVAL_SEED, "eval_seed"),
}

MOST = {  # of sizes; of all other numbers 1e9
    "num_envs": 10_000, "torch_threads": 1000, "hidden_dim": 100_000, "chunk_len": 1000, "image_size": 4096,
    "batch_size": 1_000_000, "sft_batch_size": 1_000_000, "noise_levels": 10_000, "K": 100_000, "num_critics": 1000,
    "num_demos": 1_000_000, "max_episode_steps": 1_000_000, "eval_episodes": 1_000_000, "eval_seed": 4_000_000_000,
}  # fmt: skip


def check_flags(args, limits: dict) -> None:
    """Check all numbers, and fill in what depends on the task or the machine. Raises: UserError.

    `limits` holds {what a number must be: (test, flags)} beside COMMON_LIMITS; other numbers must be at least 0.
    """
    limit = 0
    if args.robot == "maniskill":
        limit = registered(args.env_id).max_episode_steps or 0
    else:
        prepare_robot(args)
    rules = {}
    for table in (COMMON_LIMITS, limits):
        for meaning, (test, names) in table.items():
            rules.update((name, (meaning, test)) for name in names.split())
    for name, value in vars(args).items():
        most = MOST.get(name, 1e9)
        if value == "":
            raise UserError(f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
        if isinstance(value, int | float) and value > most:  # infinite ones too
            raise UserError(f"--{name.replace('_', '-')} must be at most {most:.0f}, got {value}")
        meaning, test = rules.get(name, ("at least 0", lambda x: x >= 0))
        if isinstance(value, int | float) and not (abs(value) <= most and test(value)):
            raise UserError(f"--{name.replace('_', '-')} must be {meaning}, got {value}")
    if args.max_episode_steps is None:
        seconds = task_of(args.env_id).seconds or limit / 10
        if not seconds:
            raise UserError(f"{args.env_id} is registered without a time limit: give --max-episode-steps")
        args.max_episode_steps = round(seconds * args.control_freq)
    if ":" in args.env_id and args.env_id not in TASKS:
        what = f"TASKS has no {args.env_id!r}: its instruction is {Task().instruction!r}, and its camera the usual one"
        ranks.say(f"warning: {what} (docs/new-task.md)")
    if args.max_episode_steps < args.chunk_len:
        raise UserError(f"--max-episode-steps {args.max_episode_steps} is shorter than --chunk-len {args.chunk_len}")
    share = getattr(args, "holdout", 0.0)
    if math.ceil(share * args.num_demos) >= args.num_demos:
        raise UserError(f"--holdout {share} leaves none of --num-demos {args.num_demos} to train on")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.compile == "graphs" and args.device == "cpu":
        raise UserError("--compile graphs is for CUDA: give --compile on")
    if "cuda" in args.device + args.sim_backend and not torch.cuda.is_available():
        raise UserError("no CUDA device found: use --device cpu --sim-backend physx_cpu")
    ranks.check(args)


def fill(cls, tables: dict[str, dict], **explicit):
    """cls with its defaults, what the tables say for the values chosen, and explicit flags, which always win.

    tables   {"flag": {its value: {other flag: default}}}, or {"flag flag": {(value, value): ...}}; later ones win
    """
    args = cls(**explicit)
    for flags, table in tables.items():
        values = tuple(getattr(args, flag) for flag in flags.split())
        found = table.get(values if len(values) > 1 else values[0], {})
        args = replace(args, **found | explicit)
    return args


def parse_flags(cls, doc: str, tables: dict[str, dict], argv: list[str] | None = None):
    """The command line over the defaults that `fill` finds for the task, observation mode and preset given there.

    --help shows `doc` and all flags, with those defaults. Ends the program, with code 0 or, for bad flags, 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    names = given_names(cls, words)
    given = parsed(cls, words)
    args = fill(cls, tables, **{name: getattr(given, name) for name in names})
    if len(words) < len(argv):
        print(f"usage: {Path(sys.argv[0]).name} [flags]\n\n{wrapped(doc)}\n{flags_help(args)}")
        sys.exit()
    return args


def parsed(cls, words: list[str]):
    """The command line as tyro reads it. Bad values end the program with one line, in the place of tyro's box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=words)
    except SystemExit:
        parts = re.split(r"\n\s*-{9,}\s*\n", box.getvalue())  # title, message, help
        message = parts[1] if len(parts) > 1 else parts[0]
        print(f"error: {' '.join(message.split())} See --help", file=sys.stderr)
        sys.exit(2)


def given_names(cls, words: list[str]) -> set[str]:
    """Fields whose flags are among `words`. An unknown one ends the program with one line that suggests near misses."""
    known = {as_flag(field.name): field.name for field in fields(cls)}
    known |= {as_flag(f"no-{field.name}"): field.name for field in fields(cls) if isinstance(field.default, bool)}
    found = set()
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if flag in known:
            found.add(known[flag])
        elif flag.startswith("--"):
            near = difflib.get_close_matches(flag, known, cutoff=0.75)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help names them all"
            print(f"error: unknown flag {flag}; {hint}", file=sys.stderr)
            sys.exit(2)
    return found


def run_script(main, args) -> None:
    """Call main(args); what the user can put right ends the program with one line and exit code 2."""
    stop.listen()
    try:
        ranks.join()
        main(args)
        ranks.leave()
    except stop.Stopped as end:
        finish_stopped(end)
    except UserError as error:
        finish(f"error: {error}", 2)
    except (EOFError, BrokenPipeError, ConnectionError, BrokenProcessPool) as error:
        if unheard():
            finish("error: nobody reads what this prints any more (broken pipe); go on with --resume", 2)
        finish(f"error: a worker process died (out of memory? numpy 2?); start again or --resume ({error!r})", 2)
    except (MemoryError, RuntimeError) as error:
        if ranks.lost(error):
            finish_lost()
        if "either `inf`, `nan`" in str(error):  # torch can't draw from such probabilities
            finish("error: a probability is no longer finite: try a lower learning rate or Q weight", 2)
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory|overflow", str(error)):
            raise
        finish(f"error: out of memory; smaller sizes or batches need less ({str(error)[:200]})", 2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "a file or folder can't be used"
        if full:
            what = "the disk is full; free space, then start again or --resume RUN_DIR"
        finish(f"error: {what} ({error})", 2)


def finish_stopped(end: stop.Stopped) -> None:
    resume = f"; go on with --resume {end.folder}" if end.folder else ""
    finish(f"{end}{resume}", 128 + end.number)


def finish_lost() -> None:
    """Another rank has ended: of the same signal as this one, or nobody here knows why."""
    if stop.asked:
        finish_stopped(stop.Stopped(stop.asked))
    resume = f"--resume {stop.folder}" if stop.folder else "the same command"
    finish(f"error: another rank has ended (killed? out of memory?); go on with {resume}, as many ranks", 2)


def unheard() -> bool:
    """Has the reader of standard output or of errors gone away?"""
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, 0)
    return any(event & select.POLLERR for _, event in streams.poll(0))


def finish(line: str, code: int) -> None:
    stop.over()
    with contextlib.suppress(OSError):
        for bar in list(getattr(tqdm, "_instances", ())):  # the line isn't one more word of a progress bar
            bar.close()
        if ranks.speaks_for_all():
            print(" ".join(line.split()), file=sys.stderr)
    if unheard():  # what is left to print would be one more error, at the very end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    ranks.exit_now(code)
    sys.exit(code)
