"""What the arm may be told: the next pose of the hand, within the box, the angles and the speeds of the workspace."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from operators.devices import Gone
from robots.config import Home, Workspace


class Limits:
    """Poses are [..., 7]: x y z in metres, a quaternion x y z w, as the server has them (hand in the base's frame)."""

    def __init__(self, workspace: Workspace, home: Home, control_freq: int):
        self.low = np.array(workspace.low)
        self.high = np.array(workspace.high)
        self.step = workspace.speed / control_freq  # metres a command
        self.turn = workspace.turn_speed / control_freq  # radians a command
        self.tilt = workspace.tilt
        self.yaw = workspace.yaw
        self.margin = workspace.margin
        self.home = Rotation.from_euler("xyz", home.rotation)

    def target(self, pose: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The pose to command: from where the hand is, moved by an action, and brought back within all limits.

        pose     [..., 7] where the hand is, as measured
        action   [..., 3] or [..., 6] in [-1, 1]: a shift, and a turn as ManiSkill's delta poses have it (the negative
                 of the right-handed rotation vector); either is shortened to a length of 1
        Raises: Gone where the action isn't finite, or the hand is too far outside to be commanded without a jump.
        """
        if not np.isfinite(action).all():
            raise Gone("the policy's action isn't finite, and wasn't sent")
        self.check(pose)
        shift = self.step * shortened(action[..., :3])
        rotation = Rotation.from_quat(pose[..., 3:])
        if action.shape[-1] == 6:
            turn = -self.turn * shortened(action[..., 3:])
            rotation = Rotation.from_rotvec(turn) * rotation
        return self.within(pose[..., :3] + shift, rotation)

    def towards(self, pose: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The pose to command on the straight way to `goal`, a step of full speed ahead of where the hand is."""
        self.check(pose)
        now = Rotation.from_quat(pose[..., 3:])
        whole_turn = Rotation.from_quat(goal[..., 3:]) * now.inv()
        shift = shortened(goal[..., :3] - pose[..., :3], self.step)
        turn = shortened(whole_turn.as_rotvec(), self.turn)
        return self.within(pose[..., :3] + shift, Rotation.from_rotvec(turn) * now)

    def within(self, position: np.ndarray, rotation: Rotation) -> np.ndarray:
        """The nearest pose of the workspace."""
        lean, yaw = self.angles(rotation)
        little_lean = shortened(lean.as_rotvec(), self.tilt)
        little_yaw = np.clip(yaw, -self.yaw, self.yaw)
        turned = about_z(little_yaw) * self.home
        leant = Rotation.from_rotvec(little_lean) * turned
        inside = np.clip(position, self.low, self.high)
        return np.concatenate([inside, leant.as_quat()], axis=-1)

    def angles(self, rotation: Rotation) -> tuple[Rotation, np.ndarray]:
        """How the hand is turned from home: first about the base's z by an angle, then by a rotation that only leans."""
        away = rotation * self.home.inv()
        quaternion = away.as_quat()
        double = 2 * np.arctan2(quaternion[..., 2], quaternion[..., 3])
        yaw = (double + np.pi) % (2 * np.pi) - np.pi
        lean = away * about_z(-yaw)
        return lean, yaw

    def check(self, pose: np.ndarray) -> None:
        """Raises: Gone where the hand is so far outside that the way back would be a jump."""
        now = Rotation.from_quat(pose[..., 3:])
        nearest = self.within(pose[..., :3], now)
        back = Rotation.from_quat(nearest[..., 3:]) * now.inv()
        turned = np.max(back.magnitude())
        away = np.abs(nearest[..., :3] - pose[..., :3]).max()
        if away > self.margin or turned > 5 * self.margin:
            where = " ".join(f"{x:.3f}" for x in pose[..., :3].reshape(-1))
            raise Gone(
                f"the hand is outside the workspace, at {where} m ({away:.3f} m and {turned:.2f} rad too far): "
                "bring it inside by hand"
            )

    def allows(self, pose: np.ndarray, slack: float = 1e-6) -> bool:
        """Are all of these poses within the box and the angles?"""
        lean, yaw = self.angles(Rotation.from_quat(pose[..., 3:]))
        above = np.all(pose[..., :3] >= self.low - slack)
        below = np.all(pose[..., :3] <= self.high + slack)
        leans = np.all(lean.magnitude() <= self.tilt + slack)
        turns = np.all(np.abs(yaw) <= self.yaw + slack)
        return bool(above and below and leans and turns)


def shortened(vector: np.ndarray, most: float = 1.0) -> np.ndarray:
    """Vectors [..., 3] of at most this length, in the same directions."""
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return vector * most / np.maximum(length, max(most, 1e-9))


def about_z(angle: np.ndarray) -> Rotation:
    vector = np.zeros((*np.shape(angle), 3))
    vector[..., 2] = angle
    return Rotation.from_rotvec(vector)


def home_pose(home: Home, generator: np.random.Generator) -> np.ndarray:
    """Where an episode starts, [7]."""
    position = np.array(home.position)
    position[:2] += generator.uniform(-home.random_xy, home.random_xy, 2)
    angle = generator.uniform(-home.random_yaw, home.random_yaw)
    usual = Rotation.from_euler("xyz", home.rotation)
    rotation = Rotation.from_rotvec([0, 0, angle]) * usual
    return np.concatenate([position, rotation.as_quat()])
