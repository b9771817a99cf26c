"""Draws docs/figures/meshes.png: what cameras see of the arm with all of its triangles, and with a tenth of them.

    python benchmark/meshes.py

One reset of StackCube for each, from the same seed. Policies see the same at 64 pixels.
"""

import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.rows import ROOT  # noqa: E402
from force_octo import Args, make_maniskill, validate  # noqa: E402
from plumbing import EVAL_SEED  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "meshes.png"


def look(full: bool) -> np.ndarray:
    """The first frame of the table camera, above that of the hand camera: [512, 256, 3] uint8."""
    args = Args(image_size=256, full_meshes=full)
    validate(args)
    env = make_maniskill(args)
    obs, _ = env.reset(seed=EVAL_SEED)
    env.close()
    hand = obs["wrist"][0].repeat(2, 0).repeat(2, 1)  # it has half as many pixels a side
    return np.concatenate([obs["primary"][0], hand])


def main() -> None:
    full = look(full=True)
    light = look(full=False)
    imageio.imwrite(FIGURE, np.concatenate([full, light], 1))
    gap = np.abs(full.astype(int) - light.astype(int)) > 8
    print(f"table camera: {gap[:256].mean():.2%} of the values differ by more than 8 of 255")
    print(f"hand camera: {gap[256:].mean():.2%}")


if __name__ == "__main__":
    main()
