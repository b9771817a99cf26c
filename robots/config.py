"""The file that describes a robot's workplace (TOML), checked to the last entry before anything moves."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np

from plumbing.flags import UserError


@dataclass(frozen=True)
class Workspace:
    """Where the hand may be commanded to, and how fast. Metres and radians in the frame of the robot's base."""

    low: list[float]  # [3] corner of the box, x y z of the hand (the server's pose: Franka's end effector frame)
    high: list[float]  # [3] the opposite one
    tilt: float = 0.1  # most that the hand's axis may lean from that of `home`
    yaw: float = 0.3  # most that it may turn about the base's z from `home`
    speed: float = 0.1  # metres a second: what an action of length 1 moves
    turn_speed: float = 0.5  # radians a second: what a rotation action of length 1 turns
    margin: float = 0.02  # a hand that is farther outside than this (or 5 times as many radians) isn't commanded at all


@dataclass(frozen=True)
class Home:
    """Where an episode starts."""

    position: list[float]  # [3] metres
    rotation: list[float] = field(default_factory=lambda: [np.pi, 0.0, 0.0])  # [3] Euler angles xyz, radians
    random_xy: float = 0.0  # drawn anew for each episode, to either side, metres; the episode's seed decides
    random_yaw: float = 0.0  # the same, radians
    open_gripper: bool = True  # at the start of each episode
    ask: bool = True  # wait for a key before each episode: somebody has to lay out the objects


@dataclass(frozen=True)
class Camera:
    """A camera that OpenCV can read."""

    source: str  # "0" is /dev/video0; otherwise an address or a file
    crop: list[int] = field(default_factory=list)  # x, y, width, height in the camera's pixels; default: centre square
    width: int = 640  # asked of the camera; what it delivers may differ
    height: int = 480


@dataclass(frozen=True)
class RewardSource:
    """What says that an episode has succeeded."""

    kind: str = "key"  # a person's key (s), or "classifier"
    file: str = ""  # a classifier's weights, of robots.classifier; beside the TOML file, or absolute
    threshold: float = 0.9  # probability from which on it counts as success


@dataclass(frozen=True)
class Watch:
    """What stops the arm. Seconds, as long as nothing else is said."""

    silence: float = 0.25  # without a valid answer of the server
    timeout: float = 0.1  # for one request
    pace: float = 0.05  # between two requests for the robot's state
    frozen: float = 0.3  # without a new picture of a camera
    stuck: float = 2.0  # of commands to move, while the hand moves less than 2 mm and 0.02 rad (0: never)
    controller_too: bool = False  # an emergency stop also ends the impedance controller (the server's /stopimp)


@dataclass(frozen=True)
class RobotConfig:
    name: str  # of task and place, such as "pick-banana": names the runs
    instruction: str  # what a policy is told
    workspace: Workspace
    home: Home
    cameras: dict[str, Camera]  # "primary" looks at the table, "wrist" is on the hand
    url: str = "http://127.0.0.1:5000"  # of the robot's server
    seconds: float = 10.0  # time limit of an episode
    demonstrations: int = 20  # successful episodes that an operator is asked for, where --demo-path gives none
    gripper_pause: float = 0.6  # seconds between two commands to the gripper
    parameters: dict[str, float] = field(default_factory=dict)  # of the impedance controller, sent at each reset
    reward: RewardSource = field(default_factory=RewardSource)
    watch: Watch = field(default_factory=Watch)
    path: Path = Path()  # the file; beside it lie FILE.stopped and FILE.lock


def load_config(path: str | None) -> RobotConfig:
    """Read and check a robot's file. Raises: UserError that names the file and the entry."""
    if not path:
        raise UserError("--robot franka-http needs --robot-config FILE.toml (docs/franka.md has one to start from)")
    file = Path(path)
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--robot-config {path} can't be read: {error}") from error
    config = build(RobotConfig, table | {"path": file.resolve()}, path, "")
    check_numbers(config)
    return config


def build(cls, table: dict, path: str, where: str):
    """A dataclass of a TOML table. Raises: UserError for entries that are unknown, missing or of another kind."""
    hints = get_type_hints(cls)
    for name in table.keys() - hints.keys():
        near = difflib.get_close_matches(name, hints, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{path}: {where}{name} is no entry{hint}")
    values = {}
    for entry in fields(cls):
        name = where + entry.name
        if entry.name in table:
            values[entry.name] = converted(table[entry.name], hints[entry.name], path, name)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{path}: {name} is missing")
    return cls(**values)


def converted(value, hint, path: str, name: str):
    """A TOML value as its dataclass wants it: integers may stand for floats. Raises: UserError."""
    if get_origin(hint) is dict and isinstance(value, dict):
        kind = get_args(hint)[1]
        return {key: converted(part, kind, path, f"{name}.{key}") for key, part in value.items()}
    if get_origin(hint) is list and isinstance(value, list):
        kind = get_args(hint)[0]
        return [converted(part, kind, path, name) for part in value]
    if hasattr(hint, "__dataclass_fields__") and isinstance(value, dict):
        return build(hint, value, path, f"{name}.")
    if hint is float and type(value) is int:
        value = float(value)
    if hint is float and type(value) is float and not np.isfinite(value):
        raise UserError(f"{path}: {name} isn't finite")
    if hint is Path or type(value) is hint:
        return value
    raise UserError(f"{path}: {name} = {value!r} should be of type {getattr(hint, '__name__', hint)}")


def check_numbers(config: RobotConfig) -> None:
    """Raises: UserError where sizes, signs or orders make no sense."""
    for wrong in (wrong_shapes, wrong_numbers, wrong_places):
        for is_wrong, what in wrong(config):
            if is_wrong:
                raise UserError(f"{config.path}: {what}")


def wrong_shapes(config: RobotConfig) -> list[tuple[bool, str]]:
    box = config.workspace
    home = config.home
    crops = [camera.crop for camera in config.cameras.values()]
    plain = config.name.replace("-", "").replace("_", "")
    return [
        (not plain.isalnum(), "name may have letters, digits, - and _"),
        (len(box.low) != 3 or len(box.high) != 3, "workspace.low and workspace.high are three numbers each"),
        (len(home.position) != 3 or len(home.rotation) != 3, "home.position and home.rotation are three numbers each"),
        (not config.cameras.keys() <= {"primary", "wrist"}, "cameras are called primary and wrist"),
        ("primary" not in config.cameras, "cameras.primary is missing"),
        (any(len(crop) not in (0, 4) for crop in crops), "a crop is x, y, width, height"),
        (any(min(crop, default=0) < 0 for crop in crops), "a crop has no negative numbers"),
        (config.reward.kind not in ("key", "classifier"), "reward.kind is key or classifier"),
    ]


def wrong_numbers(config: RobotConfig) -> list[tuple[bool, str]]:
    box = config.workspace
    watch = config.watch
    return [
        (not 0 < box.speed <= 0.5, "workspace.speed must be within 0..0.5 m/s"),
        (not 0 < box.turn_speed <= 2, "workspace.turn_speed must be within 0..2 rad/s"),
        (not 0 <= box.tilt <= 1, "workspace.tilt must be within 0..1 rad"),
        (not 0 <= box.yaw <= 3, "workspace.yaw must be within 0..3 rad"),
        (not 0 <= box.margin <= 0.05, "workspace.margin must be within 0..0.05 m"),
        (not 0.01 <= watch.pace <= 0.1, "watch.pace must be within 0.01..0.1 s"),
        (not 0.02 <= watch.timeout <= 0.2, "watch.timeout must be within 0.02..0.2 s"),
        (not 0.05 <= watch.silence <= 0.5, "watch.silence must be within 0.05..0.5 s"),
        (not 0.1 <= watch.frozen <= 2, "watch.frozen must be within 0.1..2 s"),
        (config.seconds <= 0, "seconds must be positive"),
        (config.demonstrations < 1, "demonstrations must be at least 1"),
    ]


def wrong_places(config: RobotConfig) -> list[tuple[bool, str]]:
    home = config.home
    low = np.array(config.workspace.low)
    high = np.array(config.workspace.high)
    around = np.array([home.random_xy, home.random_xy, 0])
    lowest = home.position - around
    highest = home.position + around
    inside = np.all(low <= lowest) and np.all(highest <= high)
    return [
        (not np.all(low < high), "workspace.low must be below workspace.high"),
        (not inside, "home, with its random part, must be within the workspace"),
        (home.random_yaw > config.workspace.yaw, "home.random_yaw must be at most workspace.yaw"),
    ]
