"""Robots in the place of the simulator. They are found by name, and plumbing knows nothing of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path

from plumbing.errors import UserError

ROBOTS = {"franka-http": "robots.franka_http"}  # --robot: module with prepare(args) and connect(args)


def module_of(args, part: str = ""):
    """The robot's module, or another one beside it."""
    module = ROBOTS[args.robot]
    if part:
        module = f"{module.rpartition('.')[0]}.{part}"
    return importlib.import_module(module)


def or_robot(make_env: Callable) -> Callable:
    """Decorates a script's make_env: with --robot the arm takes the simulator's place, through the same interface."""

    @functools.wraps(make_env)
    def make(args, num_envs: int, render: bool = False):
        if args.robot == "maniskill":
            return make_env(args, num_envs, render)
        return module_of(args).connect(args)

    return make


def prepare_robot(args) -> None:
    """Fit the flags to the robot, and check them. Raises: UserError."""
    if args.sim_backend != "physx_cpu":
        raise UserError(f"--sim-backend {args.sim_backend} is the simulator's, and --robot {args.robot} is none")
    module_of(args).prepare(args)


def recorded(args, make_env: Callable) -> Path:
    """The file with the demonstrations that --demo-path names, or that the operator gives now. Raises: UserError."""
    if args.demo_path is None:
        names = (args.env_id, args.control_mode, f"{args.control_freq}hz", args.image_size, args.cameras)
        path = Path(args.demo_dir) / ("-".join(map(str, names)) + ".npz")
        module_of(args, "record").for_training(make_env(args, 1), args, path)
        return path
    path = Path(args.demo_path)
    if path.suffix != ".npz" or not path.exists():
        raise UserError(f"--demo-path {path}: with a robot it is a file of python -m robots.record (.npz)")
    return path
