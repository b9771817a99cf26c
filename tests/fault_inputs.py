"""Inputs that can't be: flags, folders and files, a line each, and what the program has to say. See tests/faults.py."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import msgpack
import numpy as np
import torch
from conftest import FIXTURES, ROOT, SCRIPTS, tiny_args
from lives import having, script_flags, stopped
from safetensors.torch import load_file, save_file

from plumbing.storage import Checkpoints, checksum_of


class Case(NamedTuple):
    """A program that is given something it can't use."""

    kind: str
    name: str
    program: str  # a script, "make_demos" or another module with a `main`
    words: list[str]  # flags; {here}: a folder of the case's own, in which the program starts
    says: str  # what its line says
    make: Callable[[Path, Path], object] = lambda here, work: None  # puts files into `here`; `work` holds good ones
    before: Callable[[], object] | None = None  # called within the program
    code: int = 2
    remade: str = ""  # files of `here` that may change


# === Flags ===========================================================================================================
FLAGS = {  # tried with one script after the other
    "--updaets 3": "unknown flag --updaets; did you mean --",
    "--colour red": "unknown flag --colour; --help names them all",
    "--no-seed": "unknown flag --no-seed",
    "--seed x": "--seed: invalid literal",
    "--seed 1.5": "--seed: invalid literal",
    "--seed": "Missing value for argument '--seed'",
    "push": "Unrecognized options: push",
    "--full-meshes yes": "Unrecognized options: yes",
    "--obs-mode depth": "invalid choice 'depth'",
    "--device tpu": "invalid choice 'tpu'",
    "--cameras left": "invalid choice 'left'",
    "--sim-backend gpu": "invalid choice 'gpu'",
    "--seed 900": r"--seed must be in 0\.\.899",
    "--seed -1": r"--seed must be in 0\.\.899",
    "--num-demos 0": "--num-demos must be at least 1",
    "--eval-episodes 0": "--eval-episodes must be at least 1",
    "--log-freq 0": "--log-freq must be at least 1",
    "--checkpoint-freq 0": "--checkpoint-freq must be at least 1",
    "--num-envs 0": "--num-envs must be at least 1",
    "--num-envs 20000": "--num-envs must be at most 10000",
    "--control-freq 0": "--control-freq must be at least 1",
    "--hidden-dim 0": "--hidden-dim must be at least 1",
    "--image-size 50": "--image-size must be a multiple of 32",
    "--video-episodes -1": "--video-episodes must be at least 0",
    "--torch-threads -1": "--torch-threads must be at least 0",
    "--drop-idle nan": "--drop-idle must be",
    "--chunk-len 20": "--max-episode-steps 10 is shorter than --chunk-len 20",
    "--device cuda": "no CUDA device found",
    "--sim-backend physx_cuda": "no CUDA device found",
    "--env-id Nope-v1": "--env-id Nope-v1 is no ManiSkill task",
    "--env-id=": "is no ManiSkill task",
    "--env-id PushCube": "--env-id PushCube is no ManiSkill task",
    "--robot-uids wall-e": "--robot-uids wall-e is no ManiSkill robot",
    "--control-mode pd_nothing": "refuses these settings",
    "--robot-uids=": "is no ManiSkill robot|--robot-uids is empty",
    "--control-mode=": "refuses these settings|--control-mode is empty",
    "--demo-path=": "--demo-path is empty",
    "--demo-dir=": "--demo-dir is empty",
    "--runs=": "--runs is empty",
    "--resume=": "need a run folder",
    "--eval-only=": "need a run folder",
    "--run-name=": "choose another --run-name",
    "--resume=a --eval-only=b": "exclude each other",
    "--resume nowhere": "nowhere is no run folder",
    "--eval-only nowhere": "nowhere is no run folder",
    "--eval-only /dev/null": "is no run folder",
    "--demo-path nowhere.h5": r"nowhere.* doesn't exist \(a .h5 has a .json beside it\)",
    "--env-id RollBall-v1": "no motion planner for RollBall-v1: give demonstrations by --demo-path",
    "--env-id PickSingleYCB-v1": "download_asset ycb",
    "--robot-uids xarm6_robotiq": "download_asset xarm6",
}  # fmt: skip
OWN_FLAGS = {  # of scripts that have them
    "--backbone octo-small": "need each other",
    "--backbone octo-small --checkpoint nowhere": "need --obs-mode rgb",
    "--backbone octo-small --checkpoint nowhere --obs-mode rgb": "see 256 pixels",
    "--backbone octo-small --checkpoint nowhere --obs-mode rgb --image-size 256": "no folder nowhere",
    "--checkpoint=": "--checkpoint is empty|need each other|released weights",
    "--sft-checkpoint=": "--sft-checkpoint is empty",
    "--sft-checkpoint nowhere": "nowhere is no run folder",
    "--batch-size 0": "--batch-size must be at least",
    "--warmup-episodes 0 --warmup-updates 5": "--warmup-updates needs rollouts",
    "--online-finetune full --round-steps 1": "give more than --round-steps 1",
    "--critic-len 9": "--critic-len must be at most --chunk-len 3",
    "--spawn fixed --env-id LiftPegUpright-v1": "--spawn and --eval-elsewhere know",
    "--holdout 1.0": "--holdout must be at least 0 and below 1",
    "--holdout 0.99": "--holdout 0.99 leaves none",
    "--record-demos x.h5": "needs an --intervention",
    "--intervention oracle --record-demos x.txt": "must end with .h5",
    "--intervention oracle --record-demos /dev/null/x.h5": "can't be written",
    "--intervention oracle --env-id RollBall-v1": "no motion planner for RollBall-v1",
    "--intervention oracle --num-envs 2": "--intervention needs --num-envs 1",
    "--intervention oracle --control-mode pd_joint_pos": "a pd_ee_delta controller",
    "--intervention robot": "invalid choice 'robot'",
    "--gamma 1.0": "--gamma must be at least 0 and below 1",
    "--gamma nan": "--gamma must be",
    "--temperature 0": "--temperature must be positive",
    "--tau 2": r"--tau must be within \[0, 1\]",
    "--utd-ratio -0.5": "--utd-ratio must be at least 0",
    "--num-critics 0": "--num-critics must be at least 1",
    "--K 0": "--K must be at least 1",
    "--K": "Missing value for argument '--K'",
    "--finetune none": "invalid choice 'none'",
    "--bf16": "--bf16 needs a released model",
    "--lr 0": "--lr must be positive",
}  # fmt: skip
PI0_FLAGS = {
    "--backbone pi0": "needs --obs-mode rgb",
    "--backbone pi0 --obs-mode rgb": "sees 224 pixels",
    "--backbone pi0 --obs-mode rgb --image-size 224": "needs its weights: --checkpoint hf://lerobot/pi0_base",
    "--backbone pi0 --obs-mode rgb --image-size 224 --checkpoint nowhere": "no weights at nowhere",
    "--checkpoint nowhere": "give --backbone pi0 or pi05",
    "--backbone octo-small": "invalid choice 'octo-small'",
}  # fmt: skip


def flag_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle(SCRIPTS)
    for words, says in FLAGS.items():
        name = next(turn)
        yield Case("flags", f"{name} {words}", name, [*script_flags(work, name), *words.split(" ")], says)
    for words, says in OWN_FLAGS.items():
        names = having(*(word[2:].rstrip("=") for word in words.split() if word.startswith("--")))
        for name in names[:2]:
            if name != "force_pi0" or "--backbone" not in words:
                yield Case("flags", f"{name} {words}", name, [*script_flags(work, name), *words.split(" ")], says)
    for words, says in PI0_FLAGS.items():
        flags = script_flags(work, "force_pi0")
        yield Case("flags", f"force_pi0 {words}", "force_pi0", [*flags, *words.split(" ")], says)


def number_cases(work: Path) -> Iterator[Case]:
    """Each number of each script, one of what it can't be."""
    for name in SCRIPTS:
        values = {int: itertools.cycle(["-1", "9" * 15, "inf"]), float: itertools.cycle(["nan", "inf", "1e30"])}
        for field in dataclasses.fields(importlib.import_module(name).Args):
            flag = f"--{field.name.replace('_', '-')}"
            if type(field.default) in values and field.name != "critic_len":
                value = next(values[type(field.default)])
                words = [*script_flags(work, name), flag, value]
                yield Case("numbers that can't be", f"{name} {flag} {value}", name, words, f"{flag}(:| must)")


# === Run folders =====================================================================================================
def run_copy(here: Path, work: Path, name: str) -> Path:
    """A run that was ended in its last stage, with two checkpoints."""
    return Path(shutil.copytree(stopped(work, name), here / "run"))


def config_changed(here: Path, work: Path, name: str, change: Callable) -> None:
    path = run_copy(here, work, name) / "config.json"
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def flags_changed(**flags) -> Callable:
    return lambda config: config | {"args": config["args"] | flags}


CONFIGS = {
    "cut": (lambda config: json.dumps(config)[:100], "is no run folder"),
    "empty": (lambda config: "", "is no run folder"),
    "a list": (lambda config: [1], "is no run folder"),
    "a number": (lambda config: 3, "is no run folder"),
    "no flags": (lambda config: {"script": config["script"]}, "is no run folder"),
    "flags are a list": (lambda config: config | {"args": [1, 2]}, "is no run folder"),
    "no script": (lambda config: {"args": config["args"]}, "is no run folder"),
    "another script": (lambda config: config | {"script": "sac.py"}, "is a run of sac.py, not of"),
    "an unknown flag": (flags_changed(speed=9), "by a version with speed"),
    "a number that is text": (flags_changed(hidden_dim="wide"), "hidden_dim = 'wide'"),
    "a word that is a number": (flags_changed(env_id=3), "env_id = 3"),
    "a seed that can't be": (flags_changed(seed=-4), "--seed must be"),
    "an unknown task": (flags_changed(env_id="Nope-v1"), "is no ManiSkill task"),
    "another width": (flags_changed(hidden_dim=8), "of another task or network"),
    "another chunk": (flags_changed(chunk_len=2), "of another task or network"),
}


def run_folder_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle(SCRIPTS)
    kind = "run folders"
    for what, (change, says) in CONFIGS.items():
        for flag in ("--resume", "--eval-only"):
            name = next(turn)
            make = partial(config_changed, name=name, change=change)
            yield Case(kind, f"config.json: {what} {flag}", name, [flag, "{here}/run"], says, make)
    for share in (0, 0.3, 0.99):
        name = next(turn)
        make = partial(log_cut, name=name, share=share)
        says = "metrics.csv is shorter than"
        yield Case(kind, f"metrics.csv cut to {share}", name, ["--resume", "{here}/run"], says, make)
    changes = {
        "no metrics.csv": (lambda run: (run / "metrics.csv").unlink(), "metrics.csv is shorter than"),
        "metrics.csv is a folder": (
            lambda run: as_folder(run / "metrics.csv"),
            "Is a directory|metrics.csv is shorter",
        ),
        "config.json is a folder": (lambda run: as_folder(run / "config.json"), "is no run folder"),
        "no config.json": (lambda run: (run / "config.json").unlink(), "is no run folder"),
        "lock is a folder": (lambda run: as_folder(run / "lock"), "Is a directory"),
        "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "no readable checkpoint"),
        "checkpoints is a file": (lambda run: as_file(run / "checkpoints"), "no readable checkpoint"),
        "tensorboard is a file": (lambda run: as_file(run / "tensorboard"), "a file or folder can't be used"),
        "other demonstrations": (other_demonstrations, "was begun with other demonstrations"),
    }
    for what, (change, says) in changes.items():
        name = next(turn)
        make = partial(run_changed, name=name, change=change)
        # Rows that were logged after the checkpoint go first: the run will log them again.
        yield Case(kind, what, name, ["--resume", "{here}/run"], says, make, remade="run/metrics.csv")
    yield Case(kind, "on another device", "bc", ["--resume", "{here}/run", "--device", "cuda"], "was begun with --device",
               partial(run_changed, name="bc", change=lambda run: None))  # fmt: skip
    for name in ("force_octo", "conrft"):
        for what, flag, says in (
            ("another chunk", "--chunk-len 2", "was trained with --chunk-len 3, not 2"),
            ("another task", "--env-id PickCube-v1", "was trained with --env-id PushCube-v1"),
            ("cameras", "--obs-mode rgb", "was trained with --obs-mode state, not rgb"),
        ):
            words = [*script_flags(work, name), "--sft-checkpoint", "{here}/run", *flag.split()]
            yield Case(kind, f"{name} --sft-checkpoint of {what}", name, words, says, partial(run_copy, name="bc"))
        words = [*script_flags(work, name), "--sft-checkpoint", "{here}/run"]
        make = partial(run_copy, name="force_pi0")
        yield Case(
            kind, f"{name} --sft-checkpoint of force_pi0", name, words, "is a run of force_pi0.py, not of bc", make
        )


def run_changed(here: Path, work: Path, name: str, change: Callable[[Path], object]) -> None:
    change(run_copy(here, work, name))


def other_demonstrations(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"demonstrations": "0" * 64}))


def log_cut(here: Path, work: Path, name: str, share: float) -> None:
    run = run_copy(here, work, name)
    sizes = [torch.load(run / "checkpoints" / known / "training.pt", weights_only=True)["log_size"]
             for known in Checkpoints(run).names()]  # fmt: skip
    os.truncate(run / "metrics.csv", int(share * min(sizes)))


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("hello")


# === Checkpoints =====================================================================================================
def cut(name: str, share: float, path: Path) -> None:
    file = path / name
    os.truncate(file, int(share * file.stat().st_size))


def flip(name: str, seed: int, path: Path) -> None:
    """One bit of a file."""
    content = bytearray((path / name).read_bytes())
    content[seed * 7919 % len(content)] ^= 1 << seed % 8
    (path / name).write_bytes(content)


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


def weights_changed(change: Callable[[dict], dict], path: Path) -> None:
    save_file(change(load_file(path / "weights.safetensors")), path / "weights.safetensors")
    new_sums(path)


def state_changed(change: Callable[[dict], object], path: Path) -> None:
    """A training state of another make, whole as a file."""
    state = torch.load(path / "training.pt", weights_only=True)
    changed = change(state)
    torch.save(state if changed is None else changed, path / "training.pt")
    new_sums(path)


def new_sums(path: Path) -> None:
    sums = json.loads((path / "sums.json").read_text())
    (path / "sums.json").write_text(json.dumps({name: checksum_of(path / name) for name in sums}))


DAMAGES = {  # of the newest checkpoint: the run goes on from the one before
    **{f"{name} cut to {share}": partial(cut, name, share)
       for name in ("weights.safetensors", "training.pt") for share in (0, 0.5, 0.999)},
    **{f"{name} bit {seed}": partial(flip, name, seed)
       for name in ("weights.safetensors", "training.pt") for seed in (1, 2, 3)},
    "no weights": lambda path: (path / "weights.safetensors").unlink(),
    "weights are a folder": lambda path: as_folder(path / "weights.safetensors"),
    "rows cut": rows_beyond,
    "sums.json is text": lambda path: (path / "sums.json").write_text("hello"),
    "sums.json of others": lambda path: (path / "sums.json").write_text('{"a": 1}'),
    "a list": lambda path: state_changed(lambda state: [1], path),
}  # fmt: skip


def all_checkpoints(here: Path, work: Path, name: str, damage: Callable[[Path], object]) -> None:
    run = run_copy(here, work, name)
    for known in Checkpoints(run).names():
        damage(run / "checkpoints" / known)


def wider(state: dict) -> None:
    for parts in state["parts"].values():
        for values in parts.get("state", {}).values():
            for name, value in values.items():
                if value.ndim:
                    values[name] = torch.cat([value, value])


STATES = {
    "a list": lambda state: [1, 2],
    "a number": lambda state: 3,
    "text": lambda state: "hello",
    "empty": lambda state: {},
    "unknown stage": lambda state: state.update(stage="dreaming"),
    "stage is a number": lambda state: state.update(stage=2),
    "updates is text": lambda state: state.update(updates="many"),
    "updates is missing": lambda state: state.pop("updates") and None,
    "updates below zero": lambda state: state.update(updates=-5, stage_updates=-5),
    "no generators": lambda state: state.pop("rng") and None,
    "generator of another size": lambda state: state["rng"].update(batch=torch.zeros(3, dtype=torch.uint8)),
    "generator is text": lambda state: state["rng"].update(batch="hello"),
    "no parts": lambda state: state.pop("parts") and None,
    "parts are a list": lambda state: state.update(parts=[1]),
    "optimizer of other shapes": wider,
    "optimizer is a list": lambda state: state["parts"].update(dict.fromkeys(state["parts"], [1])),
    "optimizer is empty": lambda state: state["parts"].update(dict.fromkeys(state["parts"], {})),
    "no buffers": lambda state: state.pop("buffers") and None,
    "seconds of other stages": lambda state: state.update(seconds={"a": 1.0}),
    "seconds are text": lambda state: state.update(seconds=dict.fromkeys(state["seconds"], "long")),
    "evaluations are numbers": lambda state: state.update(evaluations=[1, 2]),
    "evaluation under way is text": lambda state: state.update(pending="soon"),
    "size of the log is text": lambda state: state.update(log_size="long"),
    "no size of the log": lambda state: state.pop("log_size") and None,
}
BUFFERS = {
    "buffer without columns": lambda known: known.update(columns={}),
    "buffer without its version": lambda known: known.pop("version"),
    "buffer is a list": lambda known: known.update(columns=[1]),
    "rows of another type": lambda known: [c.update(dtype="uint8") for c in known["columns"].values()],
    "rows of no type": lambda known: [c.update(dtype="colour") for c in known["columns"].values()],
    "rows of another shape": lambda known: [c.update(shape=[*c["shape"], 1]) for c in known["columns"].values()],
    "fewer rows than none": lambda known: [c.update(shape=[-1]) for c in known["columns"].values()],
}  # fmt: skip
WEIGHTS = {
    "other names": lambda weights: {f"x.{name}": value for name, value in weights.items()},
    "one is missing": lambda weights: dict(list(weights.items())[1:]),
    "other shapes": lambda weights: {name: torch.zeros(3) for name in weights},
    "none": lambda weights: {},
}


def buffers_changed(change: Callable[[dict], object], state: dict) -> None:
    for known in state["buffers"].values():
        change(known)


def checkpoint_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle(SCRIPTS)
    kind = "no checkpoint that can be read"
    damages = {name: damage for name, damage in DAMAGES.items() if "rows" not in name and "0.999" not in name}
    damages["gone"] = shutil.rmtree
    for what, damage in damages.items():
        for flag in ("--resume", "--eval-only"):
            name = next(turn)
            make = partial(all_checkpoints, name=name, damage=damage)
            yield Case(kind, f"{what} {flag}", name, [flag, "{here}/run"], "no readable checkpoint", make)
    kind = "training.pt of another make"
    with_buffers = itertools.cycle(["conrft", "force_octo", "force_pi0"])
    changes = [(what, change, turn) for what, change in STATES.items()]
    changes += [(what, partial(buffers_changed, change), with_buffers) for what, change in BUFFERS.items()]
    for what, change, names in changes:
        name = next(names)
        make = partial(all_checkpoints, name=name, damage=partial(state_changed, change))
        says = "no readable checkpoint|of another version or make"
        yield Case(kind, what, name, ["--resume", "{here}/run"], says, make)
    for what, change in WEIGHTS.items():
        name = next(turn)
        make = partial(all_checkpoints, name=name, damage=partial(weights_changed, change))
        yield Case(
            "weights of another make", what, name, ["--resume", "{here}/run"], "of another task or network", make
        )


# === Demonstrations ==================================================================================================
def without(name: str) -> Callable[[dict], object]:
    return lambda arrays: arrays.pop(name)


def changed(name: str, change: Callable) -> Callable[[dict], object]:
    return lambda arrays: arrays.update({name: change(arrays[name])})


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = np.nan
    return array


CACHE_BYTES = {
    "empty": lambda content: b"",
    "text": lambda content: b"hello",
    "half": lambda content: content[: len(content) // 2],
    "a flipped byte": lambda content: content[:900] + b"!" + content[901:],
    "no zip's end": lambda content: content[:-30],
}
CACHE_ARRAYS = {
    "no steps": without("steps"),
    "no success": without("success"),
    "no proprio": without("obs_proprio"),
    "no source": without("source"),
    "fewer rows": changed("action", lambda x: x[:-1]),
    "fewer observations": changed("obs_proprio", lambda x: x[:-1]),
    "other lengths": changed("lengths", lambda x: x + 1),
    "fewer episodes": changed("steps", lambda x: x[:-1]),
    "no episodes": changed("lengths", lambda x: x[:0]),
    "success outside": changed("steps", lambda x: x + 999),
    "success before the start": changed("steps", lambda x: 0 * x),
    "NaN in actions": changed("action", with_nan),
    "NaN in observations": changed("obs_proprio", with_nan),
    "infinite observations": changed("obs_proprio", lambda x: x / 0 * 1),
    "words": changed("lengths", lambda x: x.astype(str)),
    "flat": changed("action", lambda x: x[:, 0]),
    "other numbers": changed("action", lambda x: x.astype(np.float64)),
    "objects": changed("source", lambda x: np.array([{}], dtype=object)),
}


def cache_changed(here: Path, work: Path, name: str, change: Callable, arrays: bool) -> None:
    shutil.copytree(work / "demos", here / "demos")
    script = importlib.import_module(name)
    args = tiny_args(here, script)
    path = importlib.import_module("plumbing.demos").cache_of(args)
    if arrays:
        with np.load(path) as data:
            found = {key: data[key] for key in data.files}
        with np.errstate(all="ignore"):
            change(found)
        np.savez(path, **found)
    else:
        path.write_bytes(change(path.read_bytes()))


def cache_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle(SCRIPTS)
    for table in (CACHE_BYTES, CACHE_ARRAYS):
        for what, change in table.items():
            name = next(turn)
            make = partial(cache_changed, name=name, change=change, arrays=table is CACHE_ARRAYS)
            words = [str(ROOT / f"{name}.py"), *script_flags(work, name), "--demo-dir", "{here}/demos"]
            yield Case("damaged demonstration caches", what, "make_demos", words, r"is damaged \(.*making it again", make,
                       code=0, remade="demos/PushCube-v1-*.npz")  # fmt: skip


def actions_changed(change: Callable) -> Callable:
    def apply(file: h5py.File, meta: dict) -> None:
        for name in file:
            actions = change(file[name]["actions"][:])
            del file[name]["actions"]
            file[name]["actions"] = actions

    return apply


def episodes_changed(**entries) -> Callable:
    return lambda file, meta: [episode.update(entries) for episode in meta["episodes"]]


def env_changed(**entries) -> Callable:
    return lambda file, meta: meta["env_info"]["env_kwargs"].update(entries)


def states_changed(change: Callable) -> Callable:
    def apply(file: h5py.File, meta: dict) -> None:
        for name in file:
            change(file[name]["env_states"])
        for episode in meta["episodes"]:
            episode["reset_kwargs"] = {}

    return apply


def new_rows(group: h5py.Group, change: Callable) -> None:
    for name in list(group):
        rows = change(group[name][:])
        del group[name]
        group[name] = rows


NO_FILE = "no complete ManiSkill trajectory file"
RECORDINGS = {
    "episode missing": (lambda file, meta: file.__delitem__("traj_1"), "is truncated: 1 of the listed episodes"),
    "no episodes listed": (lambda file, meta: meta.update(episodes=[]), "holds 0 episodes"),
    "no env_info": (lambda file, meta: meta.pop("env_info"), NO_FILE),
    "no episodes key": (lambda file, meta: meta.pop("episodes"), NO_FILE),
    "episodes are numbers": (lambda file, meta: meta.update(episodes=[1, 2]), NO_FILE),
    "env_kwargs is text": (lambda file, meta: meta["env_info"].update(env_kwargs="x"), NO_FILE),
    "sim_config is text": (env_changed(sim_config="fast"), NO_FILE),
    "episode number is text": (episodes_changed(episode_id="first"), NO_FILE),
    "two seeds": (episodes_changed(reset_kwargs={"seed": [1, 2]}), NO_FILE),
    "seed is text": (episodes_changed(reset_kwargs={"seed": "one"}), NO_FILE),
    "seed below zero": (episodes_changed(reset_kwargs={"seed": -1}), NO_FILE),
    "seed is a fraction": (episodes_changed(reset_kwargs={"seed": 0.5}), NO_FILE),
    "reset_kwargs is a number": (episodes_changed(reset_kwargs=7), NO_FILE),
    "no seed and no state": (states_changed(lambda states: states.parent.__delitem__("env_states")),
                             "neither a seed nor a stored state"),
    "states of another task": (states_changed(lambda states: states["actors"].move("cube", "sphere")),
                               "a stored state of another version"),
    "states of another width": (states_changed(lambda states: new_rows(states["actors"], lambda x: x[:, :5])),
                                "a stored state of another version"),
    "states that aren't finite": (states_changed(lambda states: new_rows(states["actors"], lambda x: x * np.nan)),
                                  "stored state.* finite"),
    "states without rows": (states_changed(lambda states: new_rows(states["actors"], lambda x: x[:0])),
                            "a stored state of another version|has no stored state"),
    "states are numbers": (states_changed(lambda states: new_rows(states.parent, lambda x: x) if 0 else
                           states.parent.__delitem__("env_states")), "neither a seed nor a stored state"),
    "another task": (lambda file, meta: meta["env_info"].update(env_id="PickCube-v1"), "recorded with --env-id PickCube-v1"),
    "another rate": (env_changed(sim_config={"control_freq": 50}), "recorded with --control-freq 50, not 10"),
    "another robot": (env_changed(robot_uids="fetch"), "recorded with --robot-uids fetch, not panda"),
    "another controller": (env_changed(control_mode="pd_joint_vel"), "actions for pd_joint_vel; only pd_joint_pos"),
    "no controller": (env_changed(control_mode=None), "actions for None; only pd_joint_pos"),
    "not finite": (actions_changed(lambda x: x * np.nan), "traj_0 of .* aren't finite"),
    "infinite": (actions_changed(lambda x: np.where(x > 0, np.inf, x)), "traj_0 of .* aren't finite"),
    "no steps": (actions_changed(lambda x: x[:0]), r"traj_0 of .* shape \(0, 8\)"),
    "flat": (actions_changed(lambda x: x[:, 0]), "not steps x numbers"),
    "three dimensions": (actions_changed(lambda x: x[:, None]), "not steps x numbers"),
    "words": (actions_changed(lambda x: np.full(3, b"up")), "traj_0 of .* can't be read"),
    "too narrow": (actions_changed(lambda x: x[:, :5]), "actions of 5 numbers; pd_joint_pos takes 8"),
    "too wide": (actions_changed(lambda x: np.tile(x, 2)), "actions of 16 numbers; pd_joint_pos takes 8"),
    "nothing succeeds": (actions_changed(lambda x: 0 * x + x[:1]), "no demonstration of .* succeeds when replayed"),
    "actions is a group": (lambda file, meta: [file[f"{name}/actions"].parent.move("actions", "a") or
                           file[name].create_group("actions") for name in list(file)], "can't be read"),
}  # fmt: skip
RECORDING_FILES = {
    "no .h5": (lambda path: path.unlink(), "no demonstrations|" + NO_FILE),
    "no .json": (lambda path: path.with_suffix(".json").unlink(), r"traj.json doesn't exist"),
    "empty .h5": (lambda path: path.write_bytes(b""), NO_FILE),
    "text .h5": (lambda path: path.write_text("hello"), NO_FILE),
    "half .h5": (lambda path: os.truncate(path, path.stat().st_size // 2), NO_FILE),
    ".h5 is a folder": (as_folder, NO_FILE + "|is no LeRobotDataset"),
    "empty .json": (lambda path: path.with_suffix(".json").write_text(""), NO_FILE),
    "half .json": (lambda path: path.with_suffix(".json").write_text('{"env_info": {'), NO_FILE),
    ".json is a list": (lambda path: path.with_suffix(".json").write_text("[]"), NO_FILE),
    ".json is no text": (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"), NO_FILE),
    "an .npz": (lambda path: np.savez(path.open("wb"), x=np.zeros(3)), NO_FILE),
}  # fmt: skip


def recording_copy(here: Path, work: Path) -> Path:
    source = work / "demos/PushCube-v1-panda-10hz/seeds-000000.h5"
    shutil.copy(source, here / "traj.h5")
    shutil.copy(source.with_suffix(".json"), here / "traj.json")
    return here / "traj.h5"


def recording_changed(here: Path, work: Path, change: Callable) -> None:
    path = recording_copy(here, work)
    meta = json.loads(path.with_suffix(".json").read_text())
    with h5py.File(path, "a") as file:
        change(file, meta)
    path.with_suffix(".json").write_text(json.dumps(meta))


def recording_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle(SCRIPTS)
    tables = (
        (RECORDINGS, recording_changed),
        (RECORDING_FILES, lambda here, work, change: change(recording_copy(here, work))),
    )
    for table, make in tables:
        for what, (change, says) in table.items():
            name = next(turn)
            words = script_flags(work, name, control_mode="pd_joint_pos", num_demos=2)
            words += ["--demo-path", "{here}/traj.h5", "--demo-dir", "{here}/demos"]
            yield Case(".h5 recordings", what, name, words, says, partial(make, change=change))


# === Released weights ================================================================================================
def pack(tree: dict) -> bytes:
    """The byte layout of flax's msgpack serialisation."""

    def default(x):
        return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes())))

    return msgpack.packb(tree, default=default, strict_types=True)


def tiny_octo() -> None:
    """In a program: octo-small is as small as the fixture."""
    import test_octo

    from backbones import octo, octo_policy, octo_weights, t5

    t5.T5_SIZES["t5-tiny"] = dict(vocabulary=64, layers=2, heads=4, head_dim=8, mlp_dim=48)
    for module in (octo, octo_policy, octo_weights):
        module.PRESETS["octo-small"] = test_octo.TINY_CONFIG


def octo_tree(here: Path) -> dict:
    from backbones.octo_weights import read_flax

    tree = {}
    for path, leaf in read_flax(here / "octo/7/default/checkpoint").items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def octo_changed(here: Path, work: Path, change: Callable[[Path], object]) -> None:
    shutil.copytree(FIXTURES / "octo_tiny", here / "octo")
    change(here / "octo")


def tree_changed(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tree = octo_tree(folder.parent)
        change(tree)
        (folder / "7/default/checkpoint").write_bytes(pack(tree))

    return apply


def bytes_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "7/default/checkpoint"
        path.write_bytes(change(path.read_bytes()))

    return apply


def json_changed(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def head_size(**sizes) -> Callable[[Path], object]:
    return json_changed("config.json", lambda config: config["model"]["heads"]["action"]["kwargs"].update(sizes))


READOUT = ("octo_transformer", "readout_action_pos_embedding")


def leaf(value) -> Callable[[Path], object]:
    return tree_changed(lambda tree: tree[READOUT[0]].update({READOUT[1]: value}))


OCTO = {
    "cut": (bytes_changed(lambda content: content[:-1000]), "no complete flax-msgpack file"),
    "a byte more": (bytes_changed(lambda content: content + b"\x00"), "but its data ends after"),
    "empty": (bytes_changed(lambda content: b""), "no complete flax-msgpack file"),
    "text": (bytes_changed(lambda content: b"not a checkpoint"), "no complete flax-msgpack|data ends after"),
    "doubles": (leaf(np.zeros((1, 3, 1, 32))), "float64"),
    "text in it": (leaf("PLACEHOLDER"), "readout_action_pos_embedding is str"),
    "other shape": (leaf(np.zeros((1, 3, 1, 16), np.float32)), "has shape"),
    "NaN": (leaf(np.full((1, 3, 1, 32), np.nan, np.float32)), "isn't finite"),
    "infinite": (leaf(np.full((1, 3, 1, 32), np.inf, np.float32)), "isn't finite"),
    "a name is missing": (tree_changed(lambda tree: tree[READOUT[0]].pop(READOUT[1])), "missing 1"),
    "a name too many": (tree_changed(lambda tree: tree[READOUT[0]].update(x=np.zeros(3, np.float32))), "unused 1"),
    "no weights": (lambda folder: shutil.rmtree(folder / "7"), "no weights at"),
    "newer format": (lambda folder: ((folder / "7/default/checkpoint").unlink(),
                                     (folder / "7/default/manifest.ocdbt").touch()), "newer orbax"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json can't be read"),
    "config.json cut": (lambda folder: (folder / "config.json").write_text('{"mo'), "config.json can't be read"),
    "config.json is a list": (lambda folder: (folder / "config.json").write_text("[]"), "doesn't describe an Octo"),
    "config.json of another": (lambda folder: (folder / "config.json").write_text("{}"), "doesn't describe an Octo"),
    "Octo 1.0": (json_changed("config.json", lambda c: c["model"].pop("repeat_task_tokens")), "is Octo 1.0"),
    "another head": (json_changed("config.json", lambda c: c["model"]["heads"]["action"].update(name="L1ActionHead")),
                     "only DiffusionActionHead"),
    "kwargs is a list": (json_changed("config.json", lambda c: c["model"]["heads"]["action"].update(kwargs=[1])),
                         "doesn't describe an Octo"),
    "no statistics": (lambda folder: (folder / "dataset_statistics.json").unlink(), "statistics.json can't be read"),
    "statistics are text": (lambda folder: (folder / "dataset_statistics.json").write_text("x"), "can't be read"),
    "size below zero": (head_size(action_dim=-4), "says action_dim = -4"),
    "size zero": (head_size(action_dim=0), "says action_dim = 0"),
    "size is text": (head_size(action_horizon="four"), "says action_horizon = 'four'"),
    "size is null": (head_size(hidden_dim=None), "says hidden = None"),
    "size is absurd": (head_size(num_blocks=1e9), "says num_blocks = 1000000000.0"),
    "size is a fraction": (head_size(action_dim=2.5), "says action_dim = 2.5"),
    "window is text": (json_changed("config.json", lambda c: c.update(window_size="two")), "says window_size = .two"),
    "window below zero": (json_changed("config.json", lambda c: c.update(window_size=-1)), "says window_size = -1"),
    "tokenizer is empty": (lambda folder: (folder / "spiece.model").write_bytes(b""), "no SentencePiece model"),
    "tokenizer is text": (lambda folder: (folder / "spiece.model").write_text("hello"), "no SentencePiece model"),
    "ours cut": (lambda folder: ((folder / "octo.safetensors").write_bytes(b"x" * 9),
                                 (folder / "octo.json").write_text("{}")), "don't fit together"),
    "ours without octo.json": (lambda folder: (folder / "octo.safetensors").write_bytes(b"x" * 9), "octo.json can't be read"),
    "ours with a list": (lambda folder: ((folder / "octo.safetensors").write_bytes(b"x" * 9),
                                         (folder / "octo.json").write_text("[]")), "don't fit together"),
}  # fmt: skip


def octo_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle([name for name in SCRIPTS if name != "force_pi0"])
    for what, (change, says) in OCTO.items():
        name = next(turn)
        words = script_flags(work, name, backbone="octo-small", obs_mode="rgb", image_size=256, cameras="primary")
        words += ["--checkpoint", "{here}/octo"]
        yield Case("Octo weights", what, name, words, says, partial(octo_changed, change=change), tiny_octo)


def tiny_pi0() -> None:
    """In a program: pi0 is as small as the fixture."""
    import test_pi0

    from backbones import pi0, pi0_policy, pi0_weights

    for module in (pi0, pi0_policy, pi0_weights):
        module.PRESETS["pi0"] = test_pi0.TINY["pi0"]


def pi0_changed(here: Path, work: Path, change: Callable[[Path], object]) -> None:
    shutil.copytree(FIXTURES / "pi0_tiny", here / "pi0")
    change(here / "pi0")


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
TWIN = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
IN = "action_in_proj.weight"
PI0 = {
    "empty": (lambda folder: os.truncate(folder / "model.safetensors", 0), "no complete safetensors file"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "no complete safetensors file"),
    "text": (lambda folder: (folder / "model.safetensors").write_text("hello"), "no complete safetensors file"),
    "a folder": (lambda folder: as_folder(folder / "model.safetensors"), "no weights at"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights at .* converted first"),
    "twins that differ": (tensors(lambda w: w | {TWIN: w[HEAD] + 1}), "to be the same and differ"),
    "a name is missing": (tensors(lambda w: {n: x for n, x in w.items() if n != IN}), "missing 1"),
    "a name too many": (tensors(lambda w: w | {"x": torch.zeros(3)}), "unused 1"),
    "lerobot of mid 2025": (tensors(lambda w: w | {"normalize_inputs.mean": torch.zeros(3)}), "lerobot of mid 2025"),
    "lerobot of early 2025": (tensors(lambda w: w | {"paligemma_with_expert.paligemma.vision_tower.x": torch.zeros(3)}),
                              "lerobot of early 2025"),
    "other shape": (tensors(lambda w: w | {IN: torch.zeros(24, 6)}), r"has shape \(24, 6\)"),
    "statistics are text": (lambda folder: statistics(folder, "hello"), "holds no normalisation statistics"),
    "statistics are a list": (lambda folder: statistics(folder, "[1]"), "holds no normalisation statistics"),
    "statistics are empty": (lambda folder: statistics(folder, "{}"), "holds no normalisation statistics"),
    "tokenizer is text": (lambda folder: (folder / "paligemma_tokenizer.model").write_text("hello"), "no SentencePiece"),
    "tokenizer is empty": (lambda folder: (folder / "paligemma_tokenizer.model").write_bytes(b""), "no SentencePiece"),
}  # fmt: skip


PI0_NUMBERS = {
    "NaN": (tensors(lambda w: w | {IN: torch.full_like(w[IN], torch.nan)}), "isn't finite"),
    "infinite": (tensors(lambda w: w | {IN: torch.full_like(w[IN], torch.inf)}), "isn't finite"),
    "whole numbers": (tensors(lambda w: w | {IN: w[IN].int()}), "int32|doesn't fit|of type"),
}  # fmt: skip


def statistics(folder: Path, text: str) -> None:
    path = folder / "assets/own/norm_stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def pi0_cases(work: Path) -> Iterator[Case]:
    words = script_flags(work, "force_pi0", backbone="pi0", obs_mode="rgb", image_size=224, cameras="primary")
    words += ["--checkpoint", "{here}/pi0"]
    for what, (change, says) in PI0.items():
        yield Case("pi0 weights", what, "force_pi0", words, says, partial(pi0_changed, change=change), tiny_pi0)
    words = ["--check-weights", "{here}/pi0"]
    for what, (change, says) in PI0_NUMBERS.items():
        make = partial(pi0_changed, change=change)
        yield Case("pi0 weights", what, "backbones.pi0_weights", words, says, make, tiny_pi0)


# === The system ======================================================================================================
def limited(what: int, most: int) -> None:
    resource.setrlimit(what, (most, most))


def gone() -> None:
    """The working directory is removed."""
    folder = Path.cwd() / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()


def no_account() -> None:
    os.environ |= {"WANDB_API_KEY": "", "NETRC": "/nowhere", "HOME": "/nowhere", "WANDB_CONFIG_DIR": str(Path.cwd())}
    os.environ.pop("WANDB_MODE", None)


SYSTEM = {  # flags, what is there before, what happens within the program, what it says
    "--runs is a file": ("--runs {here}/x", lambda here, work: (here / "x").touch(), None, "Not a directory|File exists"),
    "--runs below a device": ("--runs /dev/null", None, None, "Not a directory|File exists"),
    "--runs where nothing can be": ("--runs /proc/none", None, None, "No such file"),
    "--runs is a dangling link": ("--runs {here}/x", lambda here, work: (here / "x").symlink_to("no"), None, "File exists"),
    "--runs is a loop of links": ("--runs {here}/x/y", lambda here, work: (here / "x").symlink_to("x"), None, "symbolic links"),
    "--run-name too long": (f"--run-name {'n' * 300}", None, None, "File name too long"),
    "--run-name is a file": ("--runs {here} --run-name x", lambda here, work: (here / "x").touch(), None, "Not a directory|File exists"),
    "--run-name is there": ("--runs {here} --run-name run", partial(run_copy, name="bc"), None, "exists: choose another --run-name"),
    "--demo-dir is a file": ("--demo-dir {here}/x", lambda here, work: (here / "x").touch(), None, "Not a directory|File exists"),
    "--demo-dir below a device": ("--demo-dir /dev/null/x", None, None, "Not a directory"),
    "--demo-dir is a loop of links": ("--demo-dir {here}/x", lambda here, work: (here / "x").symlink_to("x"), None, "symbolic links|File exists"),
    "--demo-dir too long": (f"--demo-dir {'n' * 300}", None, None, "File name too long"),
    "the cache is a folder": ("--demo-dir {here}", lambda here, work: as_folder(cache_in(here)), None, "Is a directory"),
    "--resume too long": (f"--resume {'n' * 300}", None, None, "is no run folder"),
    "--demo-path too long": (f"--demo-path {'n' * 300}.h5", None, None, "File name too long"),
    "nobody may write there": ("--runs {here}/x", None, lambda: os.setuid(65534), "Permission denied"),
    "nobody may make demonstrations": ("--demo-dir {here}/x", None, lambda: os.setuid(65534), "Permission denied"),
    "working directory is gone": ("--runs runs", None, gone, "No such file"),
    "too few open files": ("--runs {here}/x", None, lambda: limited(resource.RLIMIT_NOFILE, 12), "Too many open files"),
    "files may not grow": ("--runs {here}/x", None, lambda: limited(resource.RLIMIT_FSIZE, 3000), "File too large"),
    "--track without an account": ("--track --runs {here}/x", None, no_account, "--track needs an account"),
}  # fmt: skip


def cache_in(here: Path) -> Path:
    return importlib.import_module("plumbing.demos").cache_of(tiny_args(here, demo_dir=str(here)))


def system_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle([name for name in SCRIPTS if name != "co_rft_chunked"])
    for what, (words, make, before, says) in SYSTEM.items():
        name = "bc" if "cache" in what else next(turn)
        flags = script_flags(work, name)
        if "--runs" not in words:
            flags += ["--runs", "{here}/runs"]
        yield Case(
            "files and folders", what, name, [*flags, *words.split()], says, make or (lambda here, work: None), before
        )


# === Operators =======================================================================================================
def with_devices(**now) -> Callable[[], None]:
    """In a program: stand-ins for pygame and pyspacemouse, whose state is `now`."""

    def before() -> None:
        import test_operators
        from pytest import MonkeyPatch

        state = (
            test_operators.devices.__wrapped__(MonkeyPatch())
            if hasattr(test_operators.devices, "__wrapped__")
            else (test_operators.devices.__pytest_wrapped__.obj(MonkeyPatch()))
        )
        vars(state).update(now)
        sys.modules["operators.devices"].TRY_SECONDS = 1

    return before


def event(**fields):
    from types import SimpleNamespace

    return SimpleNamespace(**fields)


DEVICES = {
    "keyboard without pygame": ("keyboard", None, "need pygame: pip install pygame-ce"),
    "gamepad without pygame": ("gamepad", None, "need pygame: pip install pygame-ce"),
    "spacemouse without pygame": ("spacemouse", None, "need pygame: pip install pygame-ce"),
    "keyboard without a display": ("keyboard", dict(driver="offscreen"), "needs a display, and there is none"),
    "gamepad without a display": ("gamepad", dict(driver="dummy"), "needs a display, and there is none"),
    "no gamepad": ("gamepad", dict(sticks=0), "no gamepad found"),
    "a gamepad with two axes": ("gamepad", dict(axes=[0.0, 0.0]), "has 2 axes and 8 buttons, and 5 and 6 are needed"),
    "no SpaceMouse": ("spacemouse", dict(opened=False), "No connected or supported devices"),
    "gamepad read error": ("gamepad", dict(broken=True), "can't be read any more"),
    "SpaceMouse read error": ("spacemouse", dict(broken=True), "read error"),
    "window closed": ("keyboard", dict(events=[event(type=1)]), "window was closed"),
    "gamepad pulled out": ("gamepad", dict(events=[event(type=4, instance_id=3)]), "was pulled out"),
}  # fmt: skip


def operator_cases(work: Path) -> Iterator[Case]:
    for what, (kind, now, says) in DEVICES.items():
        words = [*script_flags(work, "conrft"), "--intervention", kind, "--runs", "{here}/runs"]
        before = None if now is None else with_devices(**now)
        yield Case("operators", what, "conrft", words, says, before=before)
    words = [*script_flags(work, "conrft"), "--intervention", "oracle", "--record-demos", "{here}/x.h5"]
    make = lambda here, work: (here / "x.h5").touch()  # noqa: E731
    yield Case("operators", "--record-demos is there", "conrft", words, "x.h5 exists: choose another name", make)


# === A task of one's own =============================================================================================
TASK = """
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.utils.registration import register_env

@register_env("MyPush-v1", max_episode_steps=50)
class MyPush(PushCubeEnv):
    goal_radius = 0.12

@register_env("MyPushNoLimit-v1")
class MyPushNoLimit(PushCubeEnv):
    pass
"""
TASKS = {
    "no such module": ("nowhere:MyPush-v1", TASK, "the module nowhere can't be imported"),
    "no such task": ("mine:Other-v1", TASK, "is no ManiSkill task"),
    "no name": ("mine:", TASK, "is no ManiSkill task"),
    "no module": (":MyPush-v1", TASK, "is no ManiSkill task"),
    "no time limit": ("mine:MyPushNoLimit-v1 --max-episode-steps None", TASK, "registered without a time limit"),
    "no planner": ("mine:MyPush-v1", TASK, "MP_SOLUTIONS has no 'mine:MyPush-v1'"),
    "no Python": ("mine:MyPush-v1", "def (", "the module mine can't be imported .SyntaxError"),
    "an error": ("mine:MyPush-v1", "1 / 0", "the module mine can't be imported .ZeroDivisionError"),
    "a missing package": ("mine:MyPush-v1", "import nowhere_to_be_found", "the module mine can't be imported .ModuleNotFound"),
    "ends the program": ("mine:MyPush-v1", "raise SystemExit(0)", "the module mine can't be imported .SystemExit"),
    "other files": ("mine:MyPush-v1 --demo-path {here}/traj.h5", TASK, "recorded with --env-id PushCube-v1, not MyPush-v1"),
}  # fmt: skip


def task_made(here: Path, work: Path, text: str) -> None:
    (here / "mine.py").write_text(text)
    recording_copy(here, work)


def task_cases(work: Path) -> Iterator[Case]:
    turn = itertools.cycle([name for name in SCRIPTS if name != "co_rft_chunked"])
    for what, (words, text, says) in TASKS.items():
        name = next(turn)
        flags = script_flags(work, name, num_demos=2, max_episode_steps=None if "limit" in what else 10)
        flags += [
            "--demo-dir",
            "{here}/demos",
            "--runs",
            "{here}/runs",
            "--env-id",
            *words.replace(" --max-episode-steps None", "").split(),
        ]
        yield Case("tasks of one's own", what, name, flags, says, partial(task_made, text=text))


def input_cases(work: Path) -> Iterator[Case]:
    yield from flag_cases(work)
    yield from run_folder_cases(work)
    yield from checkpoint_cases(work)
    yield from cache_cases(work)
    yield from recording_cases(work)
    yield from octo_cases(work)
    yield from pi0_cases(work)
    yield from system_cases(work)
    yield from operator_cases(work)
    yield from task_cases(work)
    yield from number_cases(work)
