"""A person as operator: keyboard, gamepad or SpaceMouse. What is where on them: docs/conrft.md."""

from __future__ import annotations

import importlib

import numpy as np

from plumbing.flags import UserError

PACKAGES = {"pygame": "pygame-ce", "pyspacemouse": "'pyspacemouse>=2.1'"}  # module: what pip calls it
DEAD_ZONE = 0.1  # smaller deflections are none


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

    modules = ("pygame",)

    def __init__(self, env, args, clip):
        """env: the training environment, of one, that can render. clip: into the policy's box. Raises: UserError."""
        self.env = env
        self.clip = clip
        self.speed = args.device_speed
        self.pace = args.control_freq
        self.pg = optional("pygame")
        self.pg.init()
        self.window = self.pg.display.set_mode((512, 512))
        self.clock = self.pg.time.Clock()
        self.connect()

    def connect(self) -> None:
        """Raises: UserError if the device isn't there."""

    @classmethod
    def check_packages(cls) -> None:
        """Raises: UserError that says what to install."""
        for module in cls.modules:
            optional(module)

    def start(self, seed: int) -> None:
        self.gripper = None
        self.failed = 0
        # Of before: updates and evaluations take minutes.
        self.pg.event.clear([self.pg.KEYDOWN, self.pg.JOYBUTTONDOWN])

    def __call__(self, t: int, action: np.ndarray) -> np.ndarray | None:
        """The person's action at step t, or None to let the policy act. Keeps to the robot's pace.

        Raises: KeyboardInterrupt when the window is closed.
        """
        frame = self.env.call("render")[0].swapaxes(0, 1)
        picture = self.pg.surfarray.make_surface(frame)
        picture = self.pg.transform.scale(picture, (512, 512))
        self.window.blit(picture, (0, 0))
        self.pg.display.flip()
        self.clock.tick(self.pace)
        events = self.pg.event.get()
        if any(event.type == self.pg.QUIT for event in events):
            raise KeyboardInterrupt("window closed")
        motion, toggled, hold = self.read(events)
        if not (motion.any() or toggled or hold):
            self.gripper = None
            return None
        if self.gripper is None:
            self.gripper = 1.0 if action[-1] >= 0 else -1.0
        if toggled:
            self.gripper = -self.gripper
        own = np.zeros_like(action)
        own[:3] = self.speed * motion
        own[-1] = self.gripper
        return self.clip(own)

    def read(self, events: list) -> tuple[np.ndarray, bool, bool]:
        """Motion [3] in [-1, 1] (forward, left, up as the robot sees it), gripper toggled, hold button down."""
        raise NotImplementedError


KEYS = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)}  # axis and sign


class Keyboard(Device):
    def read(self, events):
        pg = self.pg
        pressed = pg.key.get_pressed()
        motion = np.zeros(3)
        for key, (axis, sign) in KEYS.items():
            if pressed[getattr(pg, f"K_{key}")]:
                motion[axis] += sign
        keys = [event.key for event in events if event.type == pg.KEYDOWN]
        return motion, pg.K_SPACE in keys, bool(pressed[pg.K_LSHIFT])


class Gamepad(Device):
    def connect(self):
        if not self.pg.joystick.get_count():
            raise UserError("--intervention gamepad: no gamepad found")
        self.stick = self.pg.joystick.Joystick(0)

    def read(self, events):
        axes = [-self.stick.get_axis(i) for i in (1, 0, 4)]
        buttons = [event.button for event in events if event.type == self.pg.JOYBUTTONDOWN]
        return dead_zone(axes), 0 in buttons, bool(self.stick.get_button(5))


class SpaceMouse(Device):
    modules = ("pygame", "pyspacemouse")

    def connect(self):
        try:
            self.mouse = optional("pyspacemouse").open(axis_convention="ros")  # x forward, y left, z up
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--intervention spacemouse: {error} (on Linux it needs a udev rule)") from error

    def start(self, seed):
        super().start(seed)
        self.down = False  # the gripper's button

    def read(self, events):
        state = self.mouse.read()
        seen = -1.0
        while state.t > seen:  # a report at a time; the last one counts
            seen = state.t
            state = self.mouse.read()
        motion = dead_zone([state.x, state.y, state.z])
        toggle, hold = map(bool, state.buttons[:2])
        toggled = toggle and not self.down
        self.down = toggle
        return motion, toggled, hold


def dead_zone(axes: list[float]) -> np.ndarray:
    motion = np.array(axes, float)
    return np.where(np.abs(motion) < DEAD_ZONE, 0.0, motion)


DEVICES = {"keyboard": Keyboard, "gamepad": Gamepad, "spacemouse": SpaceMouse}
