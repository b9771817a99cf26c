"""What a run needs beside its algorithm: flags, folder, checkpoints, logs, demonstrations, statistics, films.

Nothing in here knows a network, a loss or a stage. A reader of an algorithm needs the comments where it is called.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait sleep, others get the cores

from plumbing import imports  # first: Ctrl-C is for it from here on

# isort: split

from plumbing.beside import Evaluator
from plumbing.compiling import compiled, drawn, fixed
from plumbing.demos import Demos, load_demos
from plumbing.earlier import check_sft, load_sft_weights, stored_args
from plumbing.evaluation import EVAL_SEED, FILM, TRAIN_SEED, film, success_metrics, training_seeds
from plumbing.flags import RunArgs, UserError, check_flags, fill, parse_flags, run_script
from plumbing.idle import moving
from plumbing.meshes import lighten
from plumbing.ranks import mean_over_ranks, per_rank
from plumbing.robot import or_robot
from plumbing.run import Run, threads
from plumbing.slots import Played, Slots
from plumbing.table import Table, cut, joined, windows
from plumbing.tasks import TASKS, Task, camera_configs, simulator_errors, task_of
from plumbing.wrappers import SPAWN, ObsWrapper, Spawn, prepare_process

imports.end()

__all__ = [
    "EVAL_SEED", "FILM", "SPAWN", "TASKS", "TRAIN_SEED", "Demos", "Evaluator", "ObsWrapper", "Played", "Run", "RunArgs",
    "Slots", "Spawn", "Table", "Task", "UserError", "camera_configs", "check_flags", "check_sft", "compiled", "cut",
    "drawn", "fill", "film", "fixed", "joined", "lighten", "load_demos", "load_sft_weights", "mean_over_ranks",
    "moving", "or_robot", "parse_flags", "per_rank", "prepare_process", "run_script", "simulator_errors", "stored_args",
    "success_metrics", "task_of", "threads", "training_seeds", "windows",
]  # fmt: skip
