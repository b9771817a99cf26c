"""The robot's server, the heartbeat that watches it, and the emergency stop.

The server is that of SERL, HIL-SERL and ConRFT (serl_robot_infra/robot_servers/franka_server.py): Flask on the machine
with the real-time kernel, in front of an impedance controller that holds the last pose it was given. All its routes are
POST. What is used of them here:

  /getstate       -> {"pose": [7], "vel": [6], "force": [3], "torque": [3], "q": [7], "dq": [7], "jacobian", "gripper_pos"}
  /pose           {"arr": [7]}: x y z in metres, quaternion x y z w
  /open_gripper, /close_gripper, /clearerr, /stopimp, /jointreset    no body
  /update_param   {"translational_stiffness": 2000, ...}: the impedance controller's parameters
"""

from __future__ import annotations

import fcntl
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

from operators.devices import Gone
from plumbing.flags import UserError
from robots.config import RobotConfig

SETTLED = 0.5  # seconds after the last command, from which on the arm stands still and silence is no fault
SHAPES = {"pose": (7,), "q": (7,), "gripper_pos": ()}


@dataclass(frozen=True)
class State:
    """What the server last said."""

    pose: np.ndarray  # [7] hand in the robot's base frame: metres, quaternion x y z w
    q: np.ndarray  # [7] joints, radians
    gripper: float  # 0 closed .. 1 open
    time: float  # when it was asked for, by the monotonic clock


def parsed(answer: dict, asked: float) -> State:
    """An answer of /getstate. Raises: ValueError where it isn't one."""
    found = {}
    for name, shape in SHAPES.items():
        value = np.array(answer.get(name), dtype=float)
        if value.size == 1 and shape == ():  # the Robotiq server has an array of one
            value = value.reshape(())
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"/getstate has {name} = {str(answer.get(name))[:60]}, not {shape or 'a number'}")
        found[name] = value
    length = np.linalg.norm(found["pose"][3:])
    if not 0.9 < length < 1.1:
        raise ValueError(f"/getstate has a quaternion of length {length:.2f}")
    found["pose"][3:] /= length
    return State(found["pose"], found["q"], float(found["gripper_pos"]), asked)


class EmergencyStop:
    """Once set it holds, over the end of the program too, until somebody releases it by hand (robots.release).

    It is a file beside the robot's, with the reason. What it means for the arm: see `Server.stop`.
    """

    def __init__(self, config: RobotConfig):
        self.path = config.path.with_suffix(".stopped")
        self.reason = ""

    def set(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self.path.write_text(f"{reason} ({when})\n")

    def check(self) -> None:
        """Raises: Gone while it holds."""
        reason = self.reason
        if not reason and self.path.exists():
            reason = self.path.read_text().strip()
        if reason:
            raise Gone(f"emergency stop: {reason}; look at the robot, then `python -m robots.release` its file")

    def release(self) -> None:
        self.reason = ""
        self.path.unlink(missing_ok=True)


class Server:
    """Talks to the server; a thread asks for the state all the time, and stops the arm when no answer comes."""

    def __init__(self, config: RobotConfig):
        """Raises: UserError if the server isn't there, or another process drives this robot."""
        self.config = config
        self.watch = config.watch
        self.halt = EmergencyStop(config)
        self.session = requests.Session()
        self.lock = alone(config.path)
        self.trouble = ""  # what was wrong with the last request
        self.commanded = 0.0  # when the last command went out
        self.posed = -math.inf  # when it was last told a pose
        self.still_since = 0.0  # when commands to move began that nothing came of
        self.still_at = None  # and where the hand was
        self.closing = threading.Event()
        try:
            self.state = self.ask_state(self.session, seconds=2.0)
        except (requests.RequestException, ValueError) as error:
            self.lock.close()
            raise UserError(f"the robot's server at {config.url} doesn't answer as it should: {error}") from error
        self.thread = threading.Thread(target=self.heartbeat, daemon=True)
        self.thread.start()

    # --- requests ---
    def post(self, route: str, body=None, seconds: float | None = None, session=None) -> requests.Response:
        """Raises: requests.RequestException."""
        answer = (session or self.session).post(
            f"{self.config.url.rstrip('/')}/{route}", json=body, timeout=seconds or self.watch.timeout
        )
        answer.raise_for_status()
        return answer

    def ask_state(self, session, seconds: float | None = None) -> State:
        """Raises: requests.RequestException; ValueError for an answer of a wrong form."""
        asked = time.monotonic()
        answer = self.post("getstate", seconds=seconds, session=session)
        try:
            return parsed(answer.json(), asked)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"/getstate isn't a table of numbers ({error})") from error

    def command(self, route: str, body=None, seconds: float | None = None) -> None:
        """A command. One that gets lost is forgiven as long as the heartbeat goes on. Raises: Gone."""
        self.check()
        self.commanded = time.monotonic()
        try:
            self.post(route, body, seconds)
        except requests.RequestException:
            if seconds:  # it was given time
                self.stop(f"the server didn't do /{route} within {seconds:g} s")
        self.check()

    def move(self, pose: np.ndarray) -> None:
        """Command a pose [7]; `Limits` has made it. Raises: Gone."""
        self.watch_motion(pose)
        self.command("pose", {"arr": pose.tolist()})

    def watch_motion(self, target: np.ndarray) -> None:
        """Stops an arm that is told to move and doesn't: it is blocked, in an error state, or its state is an old one."""
        pose = self.state.pose
        now = time.monotonic()
        asked = apart(target, pose)
        first = now - self.posed > SETTLED  # after a rest
        self.posed = now
        if first or not asked or apart(pose, self.still_at):
            self.still_since = now
            self.still_at = pose
        if self.watch.stuck and now - self.still_since > self.watch.stuck:
            self.stop(f"the arm hasn't moved for {self.watch.stuck:g} s of commands: blocked, or in an error state")

    # --- the heartbeat and the stop ---
    def heartbeat(self) -> None:
        """The thread: new states, and the stop when they stay away."""
        session = requests.Session()
        held = False
        while not self.closing.wait(self.watch.pace):
            left = self.watch.silence - self.age()
            self.renew(session, seconds=min(max(left, 0.01), self.watch.timeout))
            if self.moving() and self.silent():
                self.halt.set(self.silence())
            if self.halt.reason and not held:
                held = self.hold(session)

    def hold(self, session) -> bool:
        """Keep the arm where it is; says whether the server took it."""
        try:
            self.state = self.ask_state(session)
            self.post("pose", {"arr": self.state.pose.tolist()}, session=session)
            if self.watch.controller_too:
                self.post("stopimp", seconds=5.0, session=session)
        except (requests.RequestException, ValueError):
            return False
        return True

    def stop(self, reason: str) -> None:
        """Emergency stop: no command goes out any more, and the heartbeat lets the arm hold where it is. Raises: Gone."""
        self.halt.set(reason)
        self.halt.check()

    def check(self) -> None:
        """Raises: Gone if the arm mustn't be commanded now."""
        known = self.moving() and self.trouble
        if self.age() > self.watch.silence and not known:  # the arm rests, or this process was busy with training
            self.renew(self.session)
        if self.silent():
            self.stop(self.silence())
        self.halt.check()

    def renew(self, session, seconds: float | None = None) -> None:
        try:
            self.state = self.ask_state(session, seconds)
            self.trouble = ""
        except requests.RequestException as error:
            self.trouble = type(error).__name__
        except ValueError as error:
            self.trouble = str(error)

    def age(self) -> float:
        return time.monotonic() - self.state.time

    def moving(self) -> bool:
        return time.monotonic() - self.commanded < SETTLED

    def silent(self) -> bool:
        return bool(self.trouble) and self.age() > self.watch.silence

    def silence(self) -> str:
        return f"no valid answer of the server for {self.watch.silence:g} s ({self.trouble})"

    def close(self) -> None:
        """The arm holds the last pose that it was given, at most a step from where it is."""
        self.closing.set()
        self.thread.join(timeout=2)
        self.lock.close()


def apart(one: np.ndarray, two: np.ndarray, metres: float = 0.002, radians: float = 0.02) -> bool:
    """Is one pose [7] farther from another than this?"""
    cosine = min(1.0, abs(float(one[3:] @ two[3:])))
    turned = 2 * np.arccos(cosine)
    moved = np.linalg.norm(one[:3] - two[:3])
    return bool(moved > metres or turned > radians)


def alone(path: Path):
    """Holds a lock file beside the robot's until it is closed. Raises: UserError while another process has it."""
    try:
        file = path.with_suffix(".lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process drives the robot of {path.name}: one at a time") from error
    return file
