"""Releases the emergency stop, after a person has looked at the robot.

  python -m robots.release franka.toml

It doesn't move the arm; the next program that drives it does.
"""

from __future__ import annotations

import argparse

from plumbing.flags import UserError, run_script
from robots.config import load_config
from robots.server import EmergencyStop


def main(args) -> None:
    config = load_config(args.config)
    halt = EmergencyStop(config)
    if not halt.path.exists():
        print("no emergency stop holds")
        return
    print(f"the emergency stop holds: {halt.path.read_text().strip()}")
    try:
        word = input("look at the robot: is it free, and everybody out of its reach? Then type release: ")
    except EOFError:
        word = ""
    if word.strip() != "release":
        raise UserError("the emergency stop goes on")
    halt.release()
    print("released")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the robot's file")
    run_script(main, parser.parse_args())
