"""What is measured: one exact command per table row, and the bars that it must clear.

`run.py` runs a suite, `collect.py` turns its run folders into results/SUITE.csv, `report.py` into tables and figures.
A row's name is the name of its run folders (NAME-SEED); rows of the same name in two suites share their runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bars:
    """What a row must reach (None = no bar). Fractions, except where a unit is given."""

    success: float | None = None  # success_once of the last checkpoint, mean over seeds, at least
    sft: float | None = None  # the same after stage 0
    above_sft: bool = False  # final interval entirely above the interval after stage 0
    drop: float | None = None  # largest fall of success below its value at hand-over, worst seed, at most
    steps_ratio: float | None = None  # mean steps to success over the demonstrations', at most
    minutes: float | None = None  # whole run, slowest seed, at most


@dataclass(frozen=True)
class Row:
    """A row of a table. The runner appends --seed, --runs and --run-name to `command`."""

    name: str
    method: str
    command: str
    bars: Bars = Bars()
    paper: tuple[str, ...] = ()  # this method's names in papers.csv

    def flag(self, name: str, default: str = "") -> str:
        words = shlex.split(self.command)
        return words[words.index(name) + 1] if name in words else default

    @property
    def env_id(self) -> str:
        return self.flag("--env-id")

    @property
    def obs_mode(self) -> str:
        return self.flag("--obs-mode", "rgb")


@dataclass(frozen=True)
class Suite:
    title: str
    doc: str  # page that gets the tables, if no page has the suite's markers yet
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (1, 2, 3)


FORCE = ("FORCE (Octo)", "FORCE")
NO_WARMUP = ("w/o Pre-Cal",)
NEITHER = ("w/o Pre-Cal & VGPD",)

PUSH = (
    "python force_octo.py --env-id PushCube-v1 --obs-mode state --online-steps 8000 --gamma 0.95 --q-weight 0.05 "
    "--explore-noise 0.1 --candidate-noise 0.1"
)
PICK = "python force_octo.py --env-id PickCube-v1 --obs-mode state --online-steps 5000"
STACK = "python force_octo.py --env-id StackCube-v1 --obs-mode state --online-steps 8000"

PUSH_STATE = Row("force-push-state", "FORCE", PUSH, Bars(success=0.95, steps_ratio=0.5, minutes=15, drop=0.1), FORCE)
PICK_STATE = Row("force-pick-state", "FORCE", PICK, Bars(success=0.90, drop=0.1), FORCE)
STACK_STATE = Row("force-stack-state", "FORCE", STACK, Bars(success=0.80, drop=0.1), FORCE)

BC = "python bc.py --obs-mode state --env-id"


def bc_rows(env_id: str, success: float) -> tuple[Row, ...]:
    """Each head with chunks of four, and the default head with single steps."""
    name = env_id.removesuffix("Cube-v1").lower()
    return (
        Row(f"bc-{name}-state", "BC, consistency head", f"{BC} {env_id}", Bars(success=success)),
        Row(f"bc-{name}-state-diffusion", "BC, diffusion head", f"{BC} {env_id} --head diffusion"),
        Row(f"bc-{name}-state-mse", "BC, plain chunk head", f"{BC} {env_id} --head mse-chunk"),
        Row(f"bc-{name}-state-single", "BC, consistency head, single steps", f"{BC} {env_id} --chunk-len 1"),
        Row(
            f"bc-{name}-state-mse-single",
            "BC, plain head, single steps",
            f"{BC} {env_id} --head mse-chunk --chunk-len 1",
        ),
    )


SUITES = {
    "bc-state": Suite(
        "Behaviour cloning, privileged state",
        "docs/bc.md",
        (*bc_rows("PickCube-v1", 0.75), *bc_rows("StackCube-v1", 0.50)),
    ),
    "force-state": Suite("FORCE, privileged state", "docs/force.md", (PUSH_STATE, PICK_STATE, STACK_STATE)),
    "force-rgb": Suite(
        "FORCE, camera",
        "docs/force.md",
        (
            Row("force-pick-rgb", "FORCE", "python force_octo.py --env-id PickCube-v1",
                Bars(success=0.85, sft=0.60, drop=0.1), FORCE),
            Row("force-stack-rgb", "FORCE", "python force_octo.py --env-id StackCube-v1 --K 20",
                Bars(success=0.80, above_sft=True, drop=0.1, minutes=60), FORCE),
        ),
        seeds=(1,),
    ),
    "force-ablation": Suite(
        "FORCE, ablations",
        "docs/force.md",
        (
            PICK_STATE,
            Row("force-pick-state-no-warmup", "no warm-up", f"{PICK} --no-warmup", paper=NO_WARMUP),
            Row("force-pick-state-no-vgpd", "no VGPD", f"{PICK} --no-vgpd"),
            Row("force-pick-state-neither", "neither", f"{PICK} --no-warmup --no-vgpd", paper=NEITHER),
            STACK_STATE,
            Row("force-stack-state-no-warmup", "no warm-up", f"{STACK} --no-warmup", paper=NO_WARMUP),
            Row("force-stack-state-no-vgpd", "no VGPD", f"{STACK} --no-vgpd"),
            Row("force-stack-state-neither", "neither", f"{STACK} --no-warmup --no-vgpd", paper=NEITHER),
        ),
    ),
}  # fmt: skip


@cache
def load_script(path: Path):
    """The script as a module, for its Args and parse_args."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


# Flags that say which run it is and where things lie, not how it learns.
BOOKKEEPING = ("seed", "runs", "run_name", "resume", "eval_only", "track", "device", "demo_dir")


def misfit(row: Row, config: dict) -> str:
    """How a run (its config.json) differs from the row's command; empty if it doesn't.

    Flags that the run doesn't know are newer than it, and flags whose default is None are filled in by the script.
    """
    script, *words = shlex.split(row.command)[1:]
    if config["script"] != Path(script).name:
        return f"script {config['script']}"
    wanted = dataclasses.asdict(load_script(ROOT / script).parse_args(words))
    return ", ".join(
        f"{name}={value} instead of {wanted.get(name, 'no such flag')}"
        for name, value in config["args"].items()
        if name not in BOOKKEEPING and value != wanted.get(name, "no such flag") and wanted.get(name, "") is not None
    )


def select(rows: tuple[Row, ...], only: str | None) -> list[Row]:
    """Rows whose name matches the regular expression `only`."""
    return [row for row in rows if only is None or re.search(only, row.name)]


def suite_of(name: str) -> Suite:
    """Raises: SystemExit(2) naming the suites there are."""
    if name not in SUITES:
        print(f"error: no suite named {name}; there are: {', '.join(SUITES)}", file=sys.stderr)
        sys.exit(2)
    return SUITES[name]
