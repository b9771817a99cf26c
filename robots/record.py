"""Demonstrations on a real robot: a person does the task with a device, and presses s when it is done.

  python -m robots.record --robot-config franka.toml --intervention spacemouse --num-demos 20

The file is one for --demo-path. It is written after each success, so whoever stops goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from operators.devices import DEVICES
from plumbing.demos import read, write
from plumbing.flags import UserError, run_script
from robots.franka_http import connect, prepare


def record(env, device, args, path: Path, wanted: int) -> None:
    """Episodes until the file holds `wanted` successes. Raises: Gone; UserError for a file of something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    episodes = stored(path)
    limit = round(env.config.seconds * args.control_freq)
    tries = 0
    while len(episodes) < wanted:
        print(f"demonstration {len(episodes) + 1} of {wanted}", file=sys.stderr)
        seed = len(episodes) + 1000 * tries
        episode = demonstrate(env, device, args, limit, seed)
        if episode is None:
            tries += 1
            print("not recorded: no success (press s when the task is done)", file=sys.stderr)
            continue
        episodes.append(episode)
        columns = {name: np.concatenate([e[name] for e in episodes]) for name in episode}
        write(path, source=f"recorded on {env.config.name}", gripper=True, **columns)


def stored(path: Path) -> list[dict[str, np.ndarray]]:
    """The episodes that a file holds by now. Raises: UserError."""
    if not path.exists():
        return []
    demos = read(path)
    if demos is None:
        raise UserError(f"{path} isn't a file of demonstrations: move it away, or choose another --out")
    per_row = {"action": demos.action, "success": demos.success}
    per_row |= {f"obs_{name}": value for name, value in demos.obs.items()}
    episodes = []
    for i, start in enumerate(demos.starts()):
        end = start + demos.lengths[i] + 1
        episode = {name: value[start:end] for name, value in per_row.items()}
        for name in ("lengths", "steps", "idle"):
            episode[name] = getattr(demos, name)[i : i + 1]
        episodes.append(episode)
    return episodes


def demonstrate(env, device, args, limit: int, seed: int) -> dict[str, np.ndarray] | None:
    """An episode up to its success, as arrays with a row per observation; None without one."""
    obs, _ = env.reset(seed=[seed], options={})
    device.start(seed)
    still = np.zeros(7 if args.control_mode == "pd_ee_delta_pose" else 4, dtype=np.float32)
    still[-1] = 1.0 if env.config.home.open_gripper else -1.0
    observations = [obs]
    actions = []
    for t in range(limit):
        action = device(t, still)
        if action is None:
            action = still
        still[-1] = action[-1]
        obs, success, _, _, info = env.step(action[None])
        observations.append(obs)
        actions.append(action.copy())
        if info["ended"][0]:
            break
    if not success[0]:
        return None
    T = len(actions)
    columns = {f"obs_{name}": np.concatenate([obs[name] for obs in observations]) for name in observations[0]}
    return columns | {
        "action": np.stack([*actions, actions[-1]]),  # the last row is unused
        "success": np.arange(T + 1) >= T - 1,
        "lengths": np.array([T]),
        "steps": np.array([T]),
        "idle": np.array([0]),
    }


def for_training(env, args, path: Path) -> None:
    """What a script without --demo-path starts with. Raises: UserError."""
    kind = getattr(args, "intervention", "none")
    if kind not in DEVICES:
        raise UserError("a real robot needs --demo-path FILE.npz; python -m robots.record makes one")
    wanted = min(args.num_demos, env.config.demonstrations)
    if len(stored(path)) < wanted:
        device = DEVICES[kind](env, args, within_one)
        record(env, device, args, path, wanted)
        device.close()


def within_one(action: np.ndarray) -> np.ndarray:
    return action.clip(-1, 1)


def main(args) -> None:
    prepare(args)
    DEVICES[args.intervention].check(args)
    env = connect(args)
    device = DEVICES[args.intervention](env, args, within_one)
    try:
        record(env, device, args, Path(args.out or f"demos/{args.env_id}.npz"), args.num_demos)
    finally:
        env.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot-config", required=True, help="the robot's file")
    parser.add_argument("--intervention", choices=DEVICES, default="spacemouse", help="the person's device")
    parser.add_argument("--num-demos", type=int, default=20, help="successes to record")
    parser.add_argument("--out", help="the file; default: demos/NAME.npz")
    parser.add_argument("--control-mode", default="pd_ee_delta_pos", help="as in training; pd_ee_delta_pose turns too")
    parser.add_argument("--cameras", choices=("primary", "both"), default="both", help="as in training")
    parser.add_argument("--image-size", type=int, default=64, help="as in training")
    parser.add_argument("--control-freq", type=int, default=10, help="as in training")
    parser.add_argument("--device-speed", type=float, default=0.3, help="full deflection, as a share of full speed")
    unused = dict(obs_mode="rgb", checkpoint_freq=1, torch_threads=1)
    run_script(main, parser.parse_args(namespace=argparse.Namespace(**unused)))
