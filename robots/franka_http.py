"""A Franka arm as a script's environment: the same calls, observations and actions as make_env's simulators."""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque

import numpy as np
import torch

from operators.devices import Gone
from plumbing import stop
from plumbing.flags import UserError
from plumbing.tasks import TASKS, Task
from robots.cameras import LiveCamera
from robots.classifier import load_classifier
from robots.config import RobotConfig, load_config
from robots.keys import FAILURE, READY, STOP, SUCCESS, Keys
from robots.limits import Limits, home_pose
from robots.server import Server, apart

OPEN: dict[str, FrankaEnv] = {}  # by file: there is one arm, and training, evaluation and films share it
NEAR = (0.01, 0.09)  # metres and radians from home that will do
MOST_UPDATES = 100  # between checkpoints: steps of a real robot are dear


def prepare(args) -> None:
    """Before anything is made: fit the flags to the robot, and check that the arm may move. Raises: UserError."""
    config = load_config(args.robot_config)
    if args.obs_mode != "rgb":
        raise UserError("--robot franka-http has cameras: --obs-mode rgb (nothing else sees the objects)")
    if args.control_mode not in ("pd_ee_delta_pos", "pd_ee_delta_pose"):
        raise UserError("--robot franka-http takes --control-mode pd_ee_delta_pos or pd_ee_delta_pose")
    if args.cameras == "both" and "wrist" not in config.cameras:
        raise UserError(f"--cameras both, and {args.robot_config} has no cameras.wrist: --cameras primary")
    if getattr(args, "record_demos", None):
        raise UserError("--record-demos repeats episodes in the simulator; on a robot use python -m robots.record")
    if not 1 <= args.control_freq <= 20:
        raise UserError(f"--control-freq {args.control_freq}: a robot takes 1 to 20 commands a second")
    TASKS[config.name] = Task(config.instruction, config.seconds)
    args.env_id = config.name
    args.num_envs = 1
    args.checkpoint_freq = min(args.checkpoint_freq, MOST_UPDATES)


def connect(args, render: bool = False) -> FrankaEnv:
    """The environment of the one arm; a second call in this process finds the first one's. Raises: UserError."""
    torch.set_num_threads(args.torch_threads or 1)
    config = load_config(args.robot_config)
    place = str(config.path)
    if place not in OPEN:
        OPEN[place] = FrankaEnv(args, config)
    return OPEN[place]


class FrankaEnv:
    """A batch of one. Actions are [1, A] in [-1, 1], A = 4 or 7: shift, turn, gripper (above 0.5 open, below -0.5 closed).

    Observations: "proprio" [1, 15] float32 (joints 7, gripper, hand's pose 7), "primary" [1, H, H, 3] and "wrist"
    [1, W, W, 3] uint8. Every step of an episode is observed, whatever `every` says.
    """

    def __init__(self, args, config: RobotConfig):
        """Raises: UserError."""
        self.config = config
        self.period = 1 / args.control_freq
        self.limits = Limits(config.workspace, config.home, args.control_freq)
        self.sides = {"primary": args.image_size}
        if args.cameras == "both":
            self.sides["wrist"] = min(args.image_size, max(args.image_size // 2, 64))
        self.classifier = load_classifier(config)
        self.cameras: dict[str, LiveCamera] = {}
        self.keys = None
        self.late: list[float] = []  # seconds by which commands of this episode came late
        self.server = Server(config)
        atexit.register(self.close)  # threads that read a camera must have ended by then
        try:
            self.server.halt.check()
            for name in self.sides:
                self.cameras[name] = LiveCamera(name, config.cameras[name], config.watch.frozen)
            self.keys = Keys()
        except BaseException:
            self.close()
            raise
        self.gripper = 0  # the last command: 1 open, -1 closed
        self.gripper_time = 0.0
        self.due = None  # when the next command should go out
        self.returned = None  # when the last step gave back what it saw
        self.thinking = deque([0.0], maxlen=8)  # seconds until the next call then came
        self.marked = False  # a success, by the person's key
        self.failed = False  # a failure, likewise

    # --- the interface of make_env ---
    def reset(self, *, seed: list[int], options=None):
        """Go home, let the person lay out the scene. seed [1] decides where home is. Raises: Gone."""
        self.tell_late()
        self.server.command("clearerr")
        if self.config.parameters:
            self.server.command("update_param", self.config.parameters, seconds=2.0)
        if self.config.home.open_gripper:
            self.sleep_until(self.gripper_time + self.config.gripper_pause)
            self.move_gripper(1)
        self.go_home(home_pose(self.config.home, np.random.default_rng(seed[0])))
        if self.config.home.ask:
            self.wait_until_ready()
        self.marked = False
        self.failed = False
        self.due = None
        self.returned = None
        self.look_at_keys()
        return self.observe(), {}

    def step(self, action: np.ndarray):
        """A command, on the beat of the control frequency, and what is seen just before the next one. Raises: Gone."""
        self.keep_time()
        self.look_at_keys()
        target = self.limits.target(self.server.state.pose, action[0, :-1])
        self.server.move(target)
        if abs(action[0, -1]) >= 0.5:
            self.move_gripper(int(np.sign(action[0, -1])))
        self.due += self.period
        beforehand = min(max(self.thinking), self.period / 2)  # what the policy will need, going by its last calls
        self.sleep_until(self.due - beforehand)
        self.look_at_keys()
        obs = self.observe()
        success = np.array([self.marked])
        if self.classifier:
            success |= self.classifier(obs["primary"][0]) >= self.config.reward.threshold
        never = np.zeros(1, dtype=bool)
        self.returned = time.monotonic()
        return obs, success, never, never, {"ended": success | self.failed}

    def keep_time(self) -> None:
        """Wait until the command is due; one that is late moves the beat."""
        now = time.monotonic()
        if self.due is None:
            self.due = now
        else:
            self.thinking.append(now - self.returned)
        if now > self.due + 0.2 * self.period:
            self.late.append(now - self.due)
            self.due = now
        self.sleep_until(self.due)

    @staticmethod
    def sleep_until(moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))

    def call(self, name: str) -> list[np.ndarray]:
        """The camera's picture for "render", as gymnasium's vector environments call it."""
        return [self.cameras["primary"].read(256)]

    def close(self) -> None:
        atexit.unregister(self.close)
        OPEN.pop(str(self.config.path), None)
        self.tell_late()
        for camera in self.cameras.values():
            camera.close()
        if self.keys:
            self.keys.close()
        self.keys = None
        self.cameras = {}
        self.server.close()

    # --- parts of it ---
    def observe(self) -> dict[str, np.ndarray]:
        state = self.server.state
        pose = state.pose.copy()
        if pose[3:] @ self.limits.home.as_quat() < 0:  # two quaternions mean the same turn
            pose[3:] *= -1
        proprio = np.concatenate([state.q, [state.gripper], pose])
        obs = {"proprio": proprio[None].astype(np.float32)}
        try:
            for name, side in self.sides.items():
                obs[name] = self.cameras[name].read(side)[None]
        except Gone as reason:
            self.server.stop(str(reason))
        return obs

    def move_gripper(self, wanted: int) -> None:
        """Open (1) or close (-1), if that is news; not more often than the gripper can."""
        now = time.monotonic()
        if wanted == self.gripper or now - self.gripper_time < self.config.gripper_pause:
            return
        self.gripper = wanted
        self.gripper_time = now
        self.server.command("open_gripper" if wanted > 0 else "close_gripper")

    def go_home(self, goal: np.ndarray) -> None:
        """In a straight line, at the workspace's speed, a command each period. Raises: Gone."""
        pose = self.server.state.pose
        commands = np.linalg.norm(goal[:3] - pose[:3]) / self.limits.step + np.pi / self.limits.turn
        for _ in range(int(3 * commands) + 20):  # an arm lags behind
            self.look_at_keys()
            pose = self.server.state.pose
            if not apart(goal, pose, *NEAR):
                self.server.move(goal)
                time.sleep(self.period)
                return
            self.server.move(self.limits.towards(pose, goal))
            time.sleep(self.period)
        self.server.stop("the hand doesn't get home")

    def wait_until_ready(self) -> None:
        print("lay out the scene, then press Enter", file=sys.stderr)
        while READY not in self.look_at_keys():
            time.sleep(0.05)

    def look_at_keys(self) -> str:
        """What the person has pressed. Raises: Gone for the emergency stop."""
        if stop.asked:
            raise Gone("stopped by a signal: the arm holds where it is")
        try:
            pressed = self.keys.pressed()
        except UserError as error:
            self.server.stop(str(error))
        if STOP in pressed:
            self.server.stop("the space bar")
        self.marked |= SUCCESS in pressed
        self.failed |= FAILURE in pressed
        self.server.check()
        return pressed

    def tell_late(self) -> None:
        """Says so if steps of the last episode took longer than their time."""
        if self.late:
            what = f"commands of the last episode that came late: {len(self.late)}, by up to {max(self.late):.2f} s"
            print(f"warning: {what} (a smaller policy or --control-freq, a larger --chunk-len)", file=sys.stderr)
        self.late = []
