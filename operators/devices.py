"""A person as operator: keyboard, gamepad or SpaceMouse. What is where on them: docs/operators.md."""

from __future__ import annotations

import importlib
import math
import sys
import time

import numpy as np

from plumbing.flags import UserError

PACKAGES = {"pygame": "pygame-ce", "pyspacemouse": "'pyspacemouse>=2.1'"}  # module: what pip calls it
AXES = "forward left up roll pitch yaw".split()  # as the robot sees it; right-handed turns about the first three
DEAD_ZONE = 0.1  # smaller deflections are none
STALE = 0.2  # seconds after which a SpaceMouse's last report no longer counts: deflected, it sends 60 a second
TRY_SECONDS = 3  # at the start, in which the person sees what the device reports


class Gone(UserError):
    """The person, or what he needs, is no longer there."""


def optional(module: str):
    """Import a package that only some flags need. Raises: UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library behind the package may be missing, too
        raise UserError(f"these flags need {module}: pip install {PACKAGES[module]} ({error})") from error


class Device:
    """A person who sees the camera in a window, and acts as long as something is deflected or the hold button is down.

    The gripper begins as the policy has it and is toggled by a button.
    """

    def __init__(self, env, args, clip):
        """env: the training environment, of one, that can render. clip: into the policy's box. Raises: UserError."""
        self.env = env
        self.clip = clip
        self.speed = args.device_speed
        self.pace = args.control_freq
        self.pg = optional("pygame")
        self.open_window(args.intervention)
        self.clock = self.pg.time.Clock()
        self.connect()

    @classmethod
    def check(cls, args) -> None:
        """Before anything takes time: all is there, and a line shows what the device says. Raises: UserError."""
        device = cls(None, args, None)
        device.show_values()
        device.close()

    def open_window(self, kind: str) -> None:
        display = self.pg.display
        try:
            display.init()
            self.window = display.set_mode((512, 512))
            driver = display.get_driver()
        except self.pg.error as error:
            raise UserError(f"--intervention {kind} needs a display: {error}") from error
        if driver in ("offscreen", "dummy"):  # SDL's, which show nothing to anybody
            raise UserError(
                f"--intervention {kind} needs a display, and there is none (see DISPLAY; SDL took {driver})"
            )

    def connect(self) -> None:
        """Raises: UserError if the device isn't there, or hasn't all that is needed."""

    def close(self) -> None:
        self.pg.display.quit()

    def show_values(self) -> None:
        """A line of live values, to see at the start that the device works and where it moves to. Raises: Gone."""
        for _ in range(TRY_SECONDS * self.pace):
            self.clock.tick(self.pace)
            motion, toggled, hold = self.poll()
            parts = [f"{name} {value:+.1f}" for name, value in zip(AXES, motion)]
            parts.append("GRIPPER" if toggled else "gripper")
            parts.append("HOLD" if hold else "hold")
            print("\rtry the device: " + "  ".join(parts), end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def start(self, seed: int) -> None:
        self.gripper = None
        self.failed = 0
        # Of before: updates and evaluations take minutes.
        self.pg.event.clear([self.pg.KEYDOWN, self.pg.JOYBUTTONDOWN])

    def __call__(self, t: int, action: np.ndarray) -> np.ndarray | None:
        """The person's action at step t, or None to let the policy act. Keeps to the robot's pace. Raises: Gone."""
        self.show_camera()
        self.clock.tick(self.pace)
        motion, toggled, hold = self.poll()
        motion = motion[: len(action) - 1]  # the controller's axes; the gripper is the last
        if not (motion.any() or toggled or hold):
            self.gripper = None
            return None
        if self.gripper is None:
            self.gripper = 1.0 if action[-1] >= 0 else -1.0
        if toggled:
            self.gripper = -self.gripper
        own = np.zeros_like(action)
        own[: len(motion)] = self.speed * motion
        own[3:-1] *= -1  # ManiSkill's delta poses turn the other way round
        own[-1] = self.gripper
        return self.clip(own)

    def show_camera(self) -> None:
        frame = self.env.call("render")[0].swapaxes(0, 1)
        try:
            picture = self.pg.surfarray.make_surface(frame)
            picture = self.pg.transform.scale(picture, (512, 512))
            self.window.blit(picture, (0, 0))
            self.pg.display.flip()
        except self.pg.error as error:
            raise Gone(f"the operator's window can't be drawn any more ({error})") from error

    def poll(self) -> tuple[np.ndarray, bool, bool]:
        """What the person does now: see `read`. Raises: Gone."""
        try:
            events = self.pg.event.get()
            found = self.read(events)
        except Gone:
            raise
        except Exception as error:  # the packages raise all sorts where a device is pulled out
            raise Gone(f"the operator's device can't be read any more ({error!r})") from error
        if any(event.type == self.pg.QUIT for event in events):
            raise Gone("the operator's window was closed")
        return found

    def read(self, events: list) -> tuple[np.ndarray, bool, bool]:
        """Motion [6] in [-1, 1] along AXES, gripper toggled, hold button down."""
        raise NotImplementedError


KEYS = {  # axis and sign
    "w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1),
    "RIGHT": (3, 1), "LEFT": (3, -1), "UP": (4, 1), "DOWN": (4, -1), "q": (5, 1), "e": (5, -1),
}  # fmt: skip


class Keyboard(Device):
    def read(self, events):
        pg = self.pg
        pressed = pg.key.get_pressed()
        motion = np.zeros(6)
        for key, (axis, sign) in KEYS.items():
            if pressed[getattr(pg, f"K_{key}")]:
                motion[axis] += sign
        keys = [event.key for event in events if event.type == pg.KEYDOWN]
        return motion, pg.K_SPACE in keys, bool(pressed[pg.K_LSHIFT])


class Gamepad(Device):
    def connect(self):
        self.pg.joystick.init()
        if not self.pg.joystick.get_count():
            raise UserError("--intervention gamepad: no gamepad found")
        self.stick = self.pg.joystick.Joystick(0)
        axes = self.stick.get_numaxes()
        buttons = self.stick.get_numbuttons()
        if axes < 5 or buttons < 6:
            name = self.stick.get_name()
            raise UserError(
                f"--intervention gamepad: {name} has {axes} axes and {buttons} buttons, and 5 and 6 are needed"
            )

    def read(self, events):
        removed = [event.instance_id for event in events if event.type == self.pg.JOYDEVICEREMOVED]
        if self.stick.get_instance_id() in removed:
            raise Gone("the operator's gamepad was pulled out")
        forward, left, up, yaw = [-self.stick.get_axis(i) for i in (1, 0, 4, 3)]
        roll, pitch = self.stick.get_hat(0) if self.stick.get_numhats() else (0, 0)
        motion = dead_zone([forward, left, up, roll, pitch, yaw])
        buttons = [event.button for event in events if event.type == self.pg.JOYBUTTONDOWN]
        return motion, 0 in buttons, bool(self.stick.get_button(5))


class SpaceMouse(Device):
    def connect(self):
        try:
            self.mouse = optional("pyspacemouse").open(axis_convention="ros")  # x forward, y left, z up
            buttons = len(self.mouse.read().buttons)
        except UserError:
            raise
        except Exception as error:  # of several libraries
            raise UserError(f"--intervention spacemouse: {error} (on Linux it needs a udev rule)") from error
        if buttons < 2:
            raise UserError(f"--intervention spacemouse: it has {buttons} buttons, and 2 are needed")
        self.down = False  # the gripper's button
        self.report = None  # time of the last report by the device's clock
        self.came = -math.inf  # and by ours

    def close(self):
        self.mouse.close()
        super().close()

    def start(self, seed):
        super().start(seed)
        self.down = False
        self.latest()
        self.came = -math.inf  # what was reported before the episode doesn't count

    def latest(self):
        """The state after all reports that have come."""
        state = self.mouse.read()
        while state.t != self.report:  # a report at a time
            self.report = state.t
            self.came = time.monotonic()
            state = self.mouse.read()
        return state

    def read(self, events):
        state = self.latest()
        motion = dead_zone([state.x, state.y, state.z, state.roll, state.pitch, state.yaw])
        if time.monotonic() - self.came > STALE:
            motion[:] = 0
        toggle, hold = map(bool, state.buttons[:2])
        toggled = toggle and not self.down
        self.down = toggle
        return motion, toggled, hold


def dead_zone(axes: list[float]) -> np.ndarray:
    motion = np.array(axes, float)
    return np.where(np.abs(motion) < DEAD_ZONE, 0.0, motion)


DEVICES = {"keyboard": Keyboard, "gamepad": Gamepad, "spacemouse": SpaceMouse}
