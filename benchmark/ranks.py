"""Updates a second of FORCE's online stage, in as many ranks as torchrun starts, on cores that nothing else uses.

  OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 benchmark/ranks.py
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmark/ranks.py
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmark/ranks.py --apart

A batch is the same in both, so the ratio of the two is what a second core is worth. With --apart the ranks neither average
gradients nor wait for each other: no way of averaging is faster than that. Observations are random numbers.
On cores that others use too, the ratio of a rank's CPU times is nearer to that than the ratio of rates.
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


def measure(flags: dict, rounds: int, apart: bool) -> tuple[float, float]:
    """Updates a second, all ranks waiting for each other, and milliseconds of an update on this rank's CPU: medians."""
    args = force_octo.Args(**flags)
    torch.manual_seed(0)
    setting = Setting(replace(args, batch_size=per_rank(args.batch_size)))
    for optimizer in () if apart else (setting.critic_optimizer, setting.online_optimizer):
        ranks.average_gradients(optimizer.param_groups[0]["params"])
    clocks = []
    for _ in range(rounds + 2):
        if not apart:
            ranks.wait()
        start = np.array([time.perf_counter(), time.process_time()])
        setting.update_online()
        clocks.append([time.perf_counter(), time.process_time()] - start)
    wall, cpu = np.median(clocks[2:], 0)
    return 1 / wall, 1000 * cpu


def main(rounds: int = 15, apart: bool = False) -> int:
    """Print a line for each setting.

    Args:
        rounds: updates of each setting.
        apart: without averaging.
    """
    torch.set_num_threads(1)
    for name, flags in SETTINGS.items():
        rate, cpu = measure(flags, rounds, apart)
        if ranks.rank() == 0:
            print(f"{ranks.world()} ranks, {name}: {rate:.2f} updates a second, {cpu:.0f} ms of CPU each", flush=True)
    ranks.leave()
    return 0


if __name__ == "__main__":
    command_line(main)
