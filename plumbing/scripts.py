"""Scripts as modules: their Args, TABLES, validate, make_env, Agent and evaluate, for programs that work with any."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

from plumbing.earlier import load_config, read_config
from plumbing.flags import UserError, parse_flags

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


def of_run(folder: Path, device: str = "cpu"):
    """The module of a run's script, and the flags that it was started with, to look at it. Raises: UserError."""
    script, _ = read_config(folder)
    module = load_script(ROOT / Path(script).name)
    args = load_config(module.Args, folder, script, resume=False)
    return module, dataclasses.replace(args, resume=None, eval_only=str(folder), device=device)
