"""Runs that are already there: to go on with, to evaluate, or to start from."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from torch import Tensor, nn

from plumbing.flags import UserError
from plumbing.storage import Checkpoints


def load_weights(agent: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Strict load. Raises: UserError that begins with the misfits (another task, observation mode or network size)."""
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{source} is a checkpoint of another task or network: {str(error)[:300]}") from error


def read_config(folder: Path) -> tuple[str, dict]:
    """Script and flags of a run. Raises: UserError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        script = config["script"]
        flags = dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no run folder (config.json: {error})") from error
    return script, flags


def load_config(cls, folder: Path, script: str, resume: bool):
    """The flags a run was started with; to resume it, all that there are. Raises: UserError."""
    theirs, flags = read_config(folder)
    if theirs != script:
        raise UserError(f"{folder} is a run of {theirs}, not of {script}")
    known = {field.name for field in dataclasses.fields(cls)}
    for here, there, word in ((flags.keys(), known, "with"), (known, flags.keys(), "without")):
        for name in sorted(here - there):
            if word == "with" or resume:
                raise UserError(f"{folder} was begun by a version {word} {name}: go on with that one, see config.json")
    for field in dataclasses.fields(cls):
        if field.name not in flags:
            continue
        plain = (field.default, flags[field.name])
        kinds = [float if type(value) is int else type(value) for value in plain]
        if kinds[0] is not kinds[1] and None not in plain:
            raise UserError(f"{folder}/config.json says {field.name} = {flags[field.name]!r}: put it back as it was")
    return cls(**flags)


def check_new(args) -> None:
    """What can be found before demonstrations are made. Raises: UserError."""
    if args.run_name is not None:
        folder = Path(args.runs) / args.run_name
        if not args.run_name or (folder / "config.json").exists():
            raise UserError(f"{folder} exists: choose another --run-name, or --resume {folder}")
    if args.track:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--track needs `pip install wandb`") from error
        offline = wandb.setup().settings.mode in ("offline", "disabled", "dryrun")
        if not offline and not wandb.api.api_key:
            raise UserError("--track needs an account: call `wandb login`, or set WANDB_MODE=offline")


def stored_args(args, script: str, beside: str = "eval_episodes eval_seed"):
    """The flags of the run that --resume or --eval-only names, with its folder there.

    --resume goes on where the run was begun; --eval-only takes --device, and the flags of `beside` that were given.
    Raises: UserError if it isn't a run of this script, or was begun on another device or by a version with fewer flags.
    """
    if args.resume is None and args.eval_only is None:
        check_new(args)
        return args
    if args.resume is not None and args.eval_only is not None:
        raise UserError("--resume and --eval-only exclude each other")
    if not (args.resume or args.eval_only):
        raise UserError("--resume and --eval-only need a run folder, such as runs/NAME")
    folder = Path(args.resume or args.eval_only)
    stored = load_config(type(args), folder, Path(script).name, resume=bool(args.resume))
    places = dict(resume=args.resume, eval_only=args.eval_only)
    if args.resume and args.device not in ("auto", stored.device):
        raise UserError(f"{folder} was begun with --device {stored.device}: its losses can't go on alike on another")
    if args.eval_only:
        words = {word.split("=")[0] for word in sys.argv}  # a default that was asked for counts too
        asked = [n for n in beside.split() if f"--{n}".replace("_", "-") in words]
        asked += ["device"] + [n for n in beside.split() if getattr(args, n) != getattr(type(args), n)]
        places |= {name: getattr(args, name) for name in asked}
    return dataclasses.replace(stored, **places)


def check_origin(args, folder: Path, script: str, **also) -> None:
    """A run of `script` can only start one on the same task, seen and controlled alike; `also`: its other flags.

    Raises: UserError.
    """
    origin, have = read_config(folder)
    if origin != script:
        raise UserError(f"--sft-checkpoint {folder} is a run of {origin}, not of {script}")
    names = "env_id robot_uids obs_mode cameras image_size backbone control_mode control_freq chunk_len".split()
    for name, want in ({name: getattr(args, name) for name in names} | also).items():
        if have.get(name) != want:
            flag = f"--{name.replace('_', '-')} {have.get(name)}"
            raise UserError(f"--sft-checkpoint {folder} was trained with {flag}, not {want}")


def check_sft(args, script: str = "bc.py", **also) -> None:
    """Before anything is made: can --sft-checkpoint be started from? See `check_origin`. Stage 0 is left out then.

    Raises: UserError.
    """
    if not args.sft_checkpoint:
        return
    args.sft_updates = 0
    if not (args.resume or args.eval_only):
        folder = Path(args.sft_checkpoint)
        check_origin(args, folder, Path(script).name, **also)
        Checkpoints(folder).load(resume=False)


def load_sft_weights(agent: nn.Module, args, script: str = "bc.py", **also) -> None:
    """Backbone, actor and units of --sft-checkpoint, a run of `script` with the flags `also`; not the critics.

    Raises: UserError.
    """
    if args.resume or args.eval_only or not args.sft_checkpoint:
        return
    folder = Path(args.sft_checkpoint)
    check_origin(args, folder, Path(script).name, **also)
    weights, _ = Checkpoints(folder).load(resume=False)
    policy = {name: value for name, value in weights.items() if "critic." not in name}
    load_weights(agent, agent.state_dict() | policy, folder)
    agent.weights = f"run {folder}"
