"""A run's evaluation videos as one picture: a row per episode, evenly spaced frames from start to success.

python benchmark/filmstrip.py runs/NAME docs/figures/rollout.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tyro


@dataclass
class Args:
    run: tyro.conf.Positional[str]  # run folder with videos/
    out: tyro.conf.Positional[str]  # picture to write
    rows: int = 2  # episodes
    frames: int = 6  # frames per episode
    steps: int = 0  # control steps shown (0 = the whole video)


def filmstrip(videos: list[np.ndarray], frames: int) -> np.ndarray:
    """Shapes: videos of [T_i, H, W, 3] uint8 -> [rows * H, frames * W, 3], first and last frame included."""
    rows = [np.concatenate(list(v[np.linspace(0, len(v) - 1, frames).astype(int)]), axis=1) for v in videos]
    return np.concatenate(rows)


def main(args: Args) -> None:
    paths = sorted(Path(args.run, "videos").glob("*.mp4"))[: args.rows]
    if not paths:
        raise SystemExit(f"error: {args.run} has no videos; they are made at the end of a run (--video-episodes)")
    videos = [iio.imread(path)[: args.steps or None] for path in paths]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(args.out, filmstrip(videos, args.frames))


if __name__ == "__main__":
    main(tyro.cli(Args))
