"""What a run needs beside its algorithm: flags, folder, checkpoints, logs, demonstrations, statistics, films.

Nothing in here knows a network, a loss or a stage. A reader of an algorithm needs the comments where it is called.
"""

from plumbing.demos import Demos, load_demos
from plumbing.evaluation import EVAL_SEED, TRAIN_SEED, film, success_metrics
from plumbing.flags import RunArgs, UserError, check_flags, check_octo, check_pi0, fill, parse_flags, run_script
from plumbing.run import Run, load_sft_weights, stored_args, threads
from plumbing.tasks import TASKS, Task, camera_configs, simulator_errors
from plumbing.wrappers import SPAWN, ObsWrapper, Spawn

__all__ = [
    "EVAL_SEED", "SPAWN", "TASKS", "TRAIN_SEED", "Demos", "ObsWrapper", "Run", "RunArgs", "Spawn", "Task", "UserError",
    "camera_configs", "check_flags", "check_octo", "check_pi0", "fill", "film", "load_demos", "load_sft_weights",
    "parse_flags", "run_script", "simulator_errors", "stored_args", "success_metrics", "threads",
]  # fmt: skip
