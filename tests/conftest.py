"""Fixtures: tiny settings, real PushCube demonstrations made once, short runs of whole scripts."""

import csv
import dataclasses
import importlib
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import force_octo
import make_demos
from plumbing import Demos, Run, fill, load_demos

torch.set_num_threads(1)

ROOT = Path(force_octo.__file__).parent
SCRIPT = ROOT / "force_octo.py"
SCRIPTS = ("bc", "co_rft_chunked", "conrft", "force_octo", "force_pi0")
FIXTURES = ROOT / "tests" / "fixtures"
TINY = dict(  # a script takes those that it has
    env_id="PushCube-v1", obs_mode="state", device="cpu", cameras="primary", image_size=64, num_demos=4, K=4,
    max_episode_steps=10, hidden_dim=24, num_critics=3, chunk_len=3, updates=8, sft_updates=6, sft_head_updates=3,
    sft_batch_size=8, batch_size=8, offline_updates=5, warmup_episodes=2, warmup_updates=6, online_steps=40,
    utd_ratio=0.3, q_weight=0.0, explore_noise=0.02, cql_samples=2, eval_episodes=2, eval_freq=20, video_episodes=0,
    log_freq=1, checkpoint_freq=2,
)  # fmt: skip


def tiny_args(folder: Path, script=force_octo, **changes):
    """Flags of a run of seconds, with its demonstrations and its run folder below `folder`."""
    own = {field.name for field in dataclasses.fields(script.Args)}
    places = dict(demo_dir=str(folder / "demos"), runs=str(folder / "runs"))
    return fill(script.Args, script.TABLES, **{k: v for k, v in TINY.items() if k in own} | places | changes)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder whose demos/ holds four real PushCube demonstrations, planned and observed by `load_demos`."""
    folder = tmp_path_factory.mktemp("place")
    args = tiny_args(folder)
    force_octo.validate(args)
    load_demos(args, force_octo.make_env)
    return folder


@pytest.fixture(scope="session")
def demos(place) -> Demos:
    return load_demos(tiny_args(place), force_octo.make_env)


@pytest.fixture(scope="session")
def planned(place) -> Path:
    """ManiSkill's own .h5 of the demonstrations (joint positions), beside its .json."""
    return sorted(place.glob("demos/*/part0of*.h5"))[0]


# --- runs ---


def whole_run(name: str, place: Path):
    """A run of a whole script: its folder, the updates of each stage, and the weights where a stage began."""
    script = importlib.import_module(name)
    updates, starts = {}, {}
    enter, tick = Run.enter, Run.tick

    def watched_enter(self, stage):
        going_in = enter(self, stage)
        starts[stage] = {k: v.clone() for k, v in self.agent.state_dict().items()}
        return going_in

    def watched_tick(self, *rest, **more):
        tick(self, *rest, **more)
        updates[self.stage] = self.stage_updates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "enter", watched_enter)
        patch.setattr(Run, "tick", watched_tick)
        folder = script.main(tiny_args(place, script, run_name=f"whole-{name}"))
    return folder, updates, starts | {"end": weights(folder)}


def rows(folder: Path) -> list[tuple[int, int, str, str]]:
    """metrics.csv without durations, in order: global_step, update_step, name, value as it was written."""
    with (folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))
    assert found[0] == ["global_step", "update_step", "name", "value"]
    return [(int(g), int(u), name, value) for g, u, name, value in found[1:] if not name.startswith("time/")]


def latest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(folder) / "weights.safetensors")


def as_flags(args) -> list[str]:
    """The command line that says the same as `args`."""
    flags = []
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), field.name.replace("_", "-")
        if value is None:
            continue
        flags += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def tool_args(args) -> make_demos.Args:
    """The flags with which a script calls make_demos.py, writing beside its cache."""
    names = {field.name for field in dataclasses.fields(make_demos.Args)} - {"torch_threads"}
    return make_demos.Args(
        **{k: v for k, v in vars(args).items() if k in names}, out=str(Path(args.demo_dir) / "out.npz")
    )


class InlinePool:
    """In the place of ProcessPoolExecutor: demonstration workers run in this process."""

    def __init__(self, workers, context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, parts):
        return map(function, parts)


@pytest.fixture
def inline(monkeypatch):
    """make_demos.py's workers run in this process."""
    monkeypatch.setattr(make_demos, "ProcessPoolExecutor", InlinePool)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script as `python force_octo.py FLAGS` does, but in this process: (exit code, stdout, stderr)."""

    def call(*flags: str, script: Path = SCRIPT) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [str(script), *map(str, flags)])
        capsys.readouterr()
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call
