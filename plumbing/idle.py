"""Steps in which nothing happens: a policy without a clock can't tell waiting from going."""

from __future__ import annotations

import numpy as np


def moving(action: np.ndarray, threshold: float, relative: bool, gripper: bool) -> np.ndarray:
    """Steps to keep of an episode's actions [T, A] in the controller's units: [T] bool.

    A step stays if the arm moves (its largest command, or the largest change of an absolute command, is at least
    `threshold`), or if the gripper's command changed at it or at the step before. So do all steps after the last change
    if that opens the gripper: the robot lets go, and waits for what it left to come to rest. Of an episode that begins by
    closing it the first two steps stay: a policy has to know what to do while the fingers are still open.
    """
    steps = np.arange(len(action))
    arm = action[:, :-1] if gripper else action
    if not relative:
        arm = np.diff(arm, axis=0, prepend=arm[:1])
    keep = np.abs(arm).max(1) >= threshold
    if gripper:
        changed = np.diff(action[:, -1], prepend=action[:1, -1]) != 0
        keep |= changed
        keep[1:] |= changed[:-1]
        if changed.any():
            last = steps[changed][-1]
            if action[last, -1] > 0:
                keep |= steps >= last
        if action[0, -1] < 0:
            keep[:2] = True
    return keep
