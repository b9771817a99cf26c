"""Updates a second of FORCE's online stage, in as many ranks as torchrun starts, on cores that nothing else uses.

  OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 benchmark/ranks.py
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmark/ranks.py

A batch is the same in both, so the ratio of the two is what a second core is worth. Observations are random numbers.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import force_octo  # noqa: E402
from benchmark.rows import command_line  # noqa: E402
from benchmark.speed import CAMERA, Setting  # noqa: E402
from plumbing import per_rank, ranks  # noqa: E402

SETTINGS = {
    "from images, batch 64": dict(CAMERA, batch_size=64),
    "from state, batch 128": dict(device="cpu", obs_mode="state", batch_size=128),
    "from state, batch 1024": dict(device="cpu", obs_mode="state", batch_size=1024),
}


def rate(flags: dict, rounds: int) -> float:
    """Updates a second: the median over `rounds`, all ranks waiting for each other."""
    args = force_octo.Args(**flags)
    torch.manual_seed(0)
    setting = Setting(replace(args, batch_size=per_rank(args.batch_size)))
    for optimizer in (setting.critic_optimizer, setting.online_optimizer):
        ranks.average_gradients(optimizer.param_groups[0]["params"])
    seconds = []
    for _ in range(rounds + 2):
        ranks.wait()
        start = time.perf_counter()
        setting.update_online()
        seconds.append(time.perf_counter() - start)
    return 1 / float(np.median(seconds[2:]))


def main(rounds: int = 15) -> int:
    """Print a line for each setting.

    Args:
        rounds: updates of each setting.
    """
    torch.set_num_threads(1)
    for name, flags in SETTINGS.items():
        found = rate(flags, rounds)
        if ranks.rank() == 0:
            print(f"{ranks.world()} ranks, {name}: {found:.2f} updates a second", flush=True)
    ranks.leave()
    return 0


if __name__ == "__main__":
    command_line(main)
