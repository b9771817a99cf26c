"""Draws docs/figures/meshes.png: what cameras see of the arm with all of its triangles, and with a tenth of them.

    python benchmark/meshes.py

One reset of StackCube for each, from the same seed. Policies see the same at 64 pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.rows import ROOT  # noqa: E402
from force_octo import Args, make_maniskill, validate  # noqa: E402
from plumbing import EVAL_SEED  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURE = ROOT / "docs" / "figures" / "meshes.png"
CAMERAS = {"primary": "table camera", "wrist": "hand camera"}


def look(full: bool) -> dict[str, np.ndarray]:
    """The first frame of each camera: [H, H, 3] uint8, 256 pixels a side for both."""
    args = Args(image_size=256, full_meshes=full)
    validate(args)
    env = make_maniskill(args)
    obs, _ = env.reset(seed=EVAL_SEED)
    env.close()
    frames = {name: obs[name][0] for name in CAMERAS}
    frames["wrist"] = frames["wrist"].repeat(2, 0).repeat(2, 1)  # it has half as many pixels a side
    return frames


def main() -> None:
    columns = {"full meshes": look(full=True), "light meshes (default)": look(full=False)}
    figure, panels = plt.subplots(2, 2, figsize=(5.6, 6.0), layout="constrained")
    for column, (meshes, frames) in enumerate(columns.items()):
        for row, (camera, title) in enumerate(CAMERAS.items()):
            panel = panels[row, column]
            panel.imshow(frames[camera], interpolation="nearest")
            panel.set_title(f"{title}, {meshes}", fontsize=9)
            panel.set_axis_off()
    figure.savefig(FIGURE, dpi=100, metadata={"Software": None})
    full, light = columns.values()
    for camera, title in CAMERAS.items():
        gap = np.abs(full[camera].astype(int) - light[camera].astype(int))
        print(f"{title}: {(gap > 8).mean():.2%} of the values differ by more than 8 of 255")


if __name__ == "__main__":
    main()
