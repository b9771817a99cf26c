"""Looks at a robot's workplace without moving anything: server, pose, emergency stop, cameras.

  python -m robots.check franka.toml

The last line is "ready", or says what is wrong (exit code 2).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from scipy.spatial.transform import Rotation

from operators.devices import Gone, optional
from plumbing.flags import UserError, run_script
from robots.cameras import LiveCamera
from robots.classifier import load_classifier
from robots.config import load_config
from robots.limits import Limits
from robots.server import Server


def main(args) -> None:
    config = load_config(args.config)
    load_classifier(config)
    print(f"{args.config}: all entries are known and make sense")
    server = Server(config)
    times = []
    for _ in range(40):
        start = time.monotonic()
        server.ask_state(server.session, seconds=1.0)
        times.append(time.monotonic() - start)
    usual, slowest = 1000 * np.median(times), 1000 * max(times)
    print(f"{config.url}: answers within {usual:.0f} ms, the slowest of 40 took {slowest:.0f}")
    state = server.state
    position = state.pose[:3].round(3).tolist()
    angles = Rotation.from_quat(state.pose[3:]).as_euler("xyz").round(3).tolist()
    print(f"hand at {position} m, {angles} rad; gripper {state.gripper:.2f}")
    faults = []
    try:
        Limits(config.workspace, config.home, 10).check(state.pose)
        server.halt.check()
        print("it is inside the workspace, and no emergency stop holds")
    except Gone as reason:
        faults.append(str(reason))
    server.close()
    for name, settings in config.cameras.items():
        try:
            faults += look(name, settings)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))
    print("ready")


def look(name: str, settings) -> list[str]:
    """Writes what a camera shows; returns what is wrong with it. Raises: UserError."""
    camera = LiveCamera(name, settings, frozen=1.0)
    moments = set()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        moments.add(camera.time)
        time.sleep(0.005)
    picture = camera.read(256)
    height, width = camera.picture.shape[:2]
    camera.close()
    file = f"check-{name}.png"
    optional("cv2").imwrite(file, picture[..., ::-1])
    rate = len(moments)
    print(f"camera {name}: {width} x {height}, {rate} pictures a second; what policies see is in {file}")
    if rate < 10:
        return [f"camera {name} is slower than the control loop"]
    return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the robot's file")
    run_script(main, parser.parse_args())
