"""Evaluate anybody's policy on the tasks here: the scripts' environments, evaluation episodes and statistics.

  python evaluate.py --policy my_policy:act --env-id PickCube-v1 --obs-mode state   # a function of yours
  python evaluate.py --server ws://127.0.0.1:8000 --env-id PickCube-v1              # who speaks openpi's protocol
  python evaluate.py --run runs/NAME --eval-episodes 200                            # a run, as its script does it
  python evaluate.py --policy my_policy:act --env-id PickCube-v1 --row mine --csv benchmark/results/runs.csv

A function takes an observation {"proprio": [P] float32, cameras: [H, H, 3] uint8} and the instruction, and returns
actions [H, A], or one [A], in the controller's units. They are all taken before it is asked again; --execute N takes
the first N. If it has a `reset`, that is called before each episode. A server gets the same names and "prompt";
--names gives it others. The environment's flags and defaults are those of bc.py, whose --help lists them.
"""

from __future__ import annotations

import plumbing  # noqa: F401  first: it sets how OpenMP's threads wait, which torch reads once

# isort: split
import argparse
import csv
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.evaluation import success_metrics
from plumbing.flags import UserError, run_script
from plumbing.openpi import Client
from plumbing.policy import load_policy
from plumbing.run import provenance
from plumbing.scripts import ROOT, load_script, with_flags
from plumbing.tasks import task_of

ENVIRONMENT = ROOT / "bc.py"  # whose environment and flags foreign policies get
COLUMNS = (  # of a file that isn't there yet
    "row", "method", "env_id", "obs_mode", "seed", "stage", "final", "num_episodes", "success_once", "success_at_end",
    "episode_len", "seconds", "git_commit", "versions", "device", "command",
)  # fmt: skip


# === Policies ========================================================================================================
def function_of(name: str) -> Callable:
    """The function module:function, from the working directory or PYTHONPATH. Raises: UserError."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # it is the user's
        what = f"--policy {name} can't be imported ({type(error).__name__}: {error})"
        raise UserError(f"{what}; it is module:function, from here or from PYTHONPATH") from error
    if not callable(found):
        raise UserError(f"--policy {name} is no function")
    return found


def ask_server(client: Client, names: str) -> Callable:
    """A function that asks a server; names: words OURS=THEIRS for what it calls otherwise. Raises: UserError."""
    theirs = {}
    for word in names.replace(",", " ").split():
        own, _, other = word.partition("=")
        if not other:
            raise UserError(f"--names {word}: it takes words OURS=THEIRS, as in primary=observation/image")
        theirs[own] = other

    def act(obs: dict, instruction: str) -> np.ndarray:
        own = obs | {"prompt": instruction}
        message = {theirs.get(name, name): own[name] for name in own}
        answer = client.infer(message)
        if "actions" not in answer:
            raise UserError(f"the policy at {client.address} answers without 'actions': {', '.join(map(str, answer))}")
        return answer["actions"]

    return act


def checked(actions, width: int, execute: int) -> np.ndarray:
    """A policy's answer as [H, A] float32; with execute, its first ones. Raises: UserError."""
    try:
        found = np.atleast_2d(np.asarray(actions, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise UserError(f"the policy's actions are no array of numbers ({error})") from error
    if found.shape[1:] != (width,) or not found.size:
        raise UserError(f"the policy's actions are {list(found.shape)}; this controller takes [H, {width}]")
    if not np.isfinite(found).all():
        raise UserError("the policy's actions aren't finite")
    if len(found) < execute:
        raise UserError(f"--execute {execute} is more than the {len(found)} actions that the policy gives")
    return found[: execute or None]


# === Episodes ========================================================================================================
def play(env, act: Callable, instruction: str, seed: int, limit: int, execute: int) -> np.ndarray:
    """One episode up to the time limit: success [T] at each step."""
    width = env.single_action_space.shape[0]
    obs, _ = env.reset(seed=[seed], options={"every": 1})
    getattr(act, "reset", lambda: None)()
    successes = []
    while len(successes) < limit:
        one = {name: value[0] for name, value in obs.items()}
        actions = checked(act(one, instruction), width, execute)
        for action in actions[: limit - len(successes)]:
            obs, success, _, _, _ = env.step(action[None])
            successes.append(success[0] > 0)
    return np.array(successes)


def evaluate_function(act: Callable, module, args, execute: int) -> dict[str, float]:
    """Metrics over the scripts' evaluation episodes, one at a time."""
    instruction = task_of(args.env_id).instruction
    env = module.make_env(replace(args, sim_backend="physx_cpu"), 1)
    success = []
    bar = tqdm(range(args.eval_seed, args.eval_seed + args.eval_episodes), mininterval=2)
    for seed in bar:
        success.append(play(env, act, instruction, seed, args.max_episode_steps, execute))
        rate = np.mean([episode.any() for episode in success])
        bar.set_description(f"success {rate:.2f}")
    env.close()
    return success_metrics(success, args.max_episode_steps)


def evaluate_run(folder: str, episodes: int, device: str) -> tuple[dict, object]:
    """A run by its script's own `evaluate`: the metrics, and its flags; episodes: 0 for as many as it had."""
    policy = load_policy(folder, device)
    args = policy.args
    if episodes:
        args = replace(args, eval_episodes=episodes)
    module = load_script(ROOT / policy.script)
    env = module.make_env(args, args.num_envs)
    metrics = module.evaluate(env, policy.agent, args)
    env.close()
    return metrics, args


# === Results =========================================================================================================
def append_row(path: Path, row: dict) -> None:
    """Put a line into a CSV, in the place of one with the same row and seed; other columns stay empty. Atomic.

    Raises: UserError for a file with other columns.
    """
    columns = list(COLUMNS)
    lines = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
            columns = reader.fieldnames or []
    if not {"row", "seed", "success_once", "num_episodes"} <= set(columns):
        raise UserError(f"--csv {path} has other columns than benchmark/results/runs.csv: name another file")
    own = (row["row"], str(row["seed"]))
    others = []
    for line in lines:
        if (line["row"], line["seed"]) != own:
            others.append(line)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*others, row])
    os.replace(temporary, path)


def row_of(name: str, metrics: dict[str, float], args, seconds: float, command: str) -> dict:
    """An evaluation as a line of the benchmark's runs.csv."""
    numbers = {}
    for key, value in metrics.items():
        if np.isfinite(value):
            numbers[key.removeprefix("eval/")] = f"{value:.6g}"
    about = provenance()
    versions = {"python": about["python"]} | about["packages"]
    named = [" ".join(pair) for pair in versions.items()]
    said = {
        "row": name,
        "method": name,
        "env_id": args.env_id,
        "obs_mode": args.obs_mode,
        "seed": args.seed,
        "stage": "evaluation",
        "final": 1,
        "seconds": f"{seconds:.6g}",
        "git_commit": about["git_commit"],
        "versions": ", ".join(named),
        "device": args.device,
        "command": command,
    }
    return numbers | said


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    what = found.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy", help="module:function")
    what.add_argument("--server", help="ws://host:port of a policy that speaks openpi's protocol")
    what.add_argument("--run", help="run folder, exported folder, or hf://owner/name")
    found.add_argument("--execute", type=int, default=0, help="actions to take of each answer (0: all)")
    found.add_argument("--names", default="", help='for a server: "primary=observation/image proprio=..."')
    found.add_argument("--row", help="name of the line in --csv")
    found.add_argument("--csv", type=Path, help="add the result there, such as benchmark/results/runs.csv")
    return found


def main(words: list[str]) -> None:
    """Raises: UserError."""
    own, rest = parser().parse_known_args(words)
    if bool(own.csv) != bool(own.row):
        raise UserError("--csv FILE and --row NAME need each other")
    if own.execute < 0:
        raise UserError(f"--execute must be at least 0, got {own.execute}")
    began = time.monotonic()
    if own.run:
        run_parser = argparse.ArgumentParser(prog="evaluate.py --run", allow_abbrev=False)
        run_parser.add_argument("--eval-episodes", type=int, default=0)
        run_parser.add_argument("--device", default="cpu")
        flags = run_parser.parse_args(rest)
        metrics, args = evaluate_run(own.run, flags.eval_episodes, flags.device)
    else:
        module, args = with_flags(ENVIRONMENT, __doc__, rest)
        if own.server:
            act = ask_server(Client(own.server), own.names)
        else:
            act = function_of(own.policy)
        metrics = evaluate_function(act, module, args, own.execute)
    print(json.dumps(metrics, indent=2))
    if own.csv:
        command = " ".join(["python evaluate.py", *words])
        seconds = time.monotonic() - began
        row = row_of(own.row, metrics, args, seconds, command)
        append_row(own.csv, row)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
