"""Scripts as modules: their Args, TABLES, validate, make_env, Agent and evaluate, for programs that work with any."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

from plumbing.earlier import load_config, read_config
from plumbing.flags import UserError, parse_flags
from plumbing.tasks import TASKS, Task

ROOT = Path(__file__).resolve().parent.parent


def load_script(path: Path):
    """The module of a script's file. Worker processes find its functions by the same name. Raises: UserError."""
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{path} is no script: name one of this repository, such as bc.py")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.import_module(path.stem)
    if not hasattr(module, "Agent"):
        raise UserError(f"{path} is no script with an Agent: name one of this repository, such as bc.py")
    return module


def with_flags(path: Path, doc: str, words: list[str]):
    """A script's module, and its flags from a command line, checked. Raises: UserError."""
    module = load_script(path)
    args = parse_flags(module.Args, doc, module.TABLES, words)
    module.validate(args)
    return module, args


def restore_task(folder: Path, env_id: str) -> None:
    """The instruction, time limit and camera that a run was started with: its task's own module may not be here.

    Raises: UserError.
    """
    stored = json.loads((folder / "config.json").read_text()).get("task", {})  # earlier versions stored none
    if not stored:
        return
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        TASKS[env_id] = Task(**values)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder}/config.json has another make of task: put it back as it was ({error})") from error


def of_run(folder: Path, device: str = "cpu"):
    """The module of a run's script, and the flags that it was started with, to look at it. Raises: UserError."""
    script, _ = read_config(folder)
    module = load_script(ROOT / Path(script).name)
    args = load_config(module.Args, folder, script, resume=False)
    restore_task(folder, args.env_id)
    return module, dataclasses.replace(args, resume=None, eval_only=str(folder), device=device)
