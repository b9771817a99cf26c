"""Fixtures: tiny settings, real PushCube demonstrations made once, short runs of the whole script."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch

import force_octo
import make_demos

torch.set_num_threads(1)

ROOT = Path(force_octo.__file__).parent
SCRIPT = ROOT / "force_octo.py"
FIXTURES = ROOT / "tests" / "fixtures"
TINY = dict(
    env_id="PushCube-v1", obs_mode="state", device="cpu", cameras="primary", image_size=64, num_demos=4, K=4, max_episode_steps=10, hidden_dim=24,
    num_layers=2, num_critics=3, chunk_len=3, sft_updates=6, sft_batch_size=8, batch_size=8,
    offline_updates=5, warmup_episodes=2, warmup_updates=6, online_steps=40, utd_ratio=0.3, q_weight=0.0, explore_noise=0.02,
    cql_samples=2, eval_episodes=2, eval_freq=20, video_episodes=0, log_freq=1,
    checkpoint_freq=2,
)  # fmt: skip


def tiny_args(folder: Path, **changes) -> force_octo.Args:
    """Flags of a run of seconds, with its demonstrations and its run folder below `folder`."""
    places = dict(demo_dir=str(folder / "demos"), runs=str(folder / "runs"))
    return force_octo.Args(**TINY | places | changes)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder whose demos/ holds four real PushCube demonstrations, planned and observed by `load_demos`."""
    folder = tmp_path_factory.mktemp("place")
    args = tiny_args(folder)
    force_octo.validate(args)
    force_octo.load_demos(args)
    return folder


@pytest.fixture(scope="session")
def demos(place) -> force_octo.Demos:
    return force_octo.load_demos(tiny_args(place))


@pytest.fixture(scope="session")
def planned(place) -> Path:
    """ManiSkill's own .h5 of the demonstrations (joint positions), beside its .json."""
    return sorted(place.glob("demos/*/part0of*.h5"))[0]


def as_flags(args: force_octo.Args) -> list[str]:
    """The command line that says the same as `args`."""
    flags = []
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), field.name.replace("_", "-")
        if value == field.default:
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
    """Run the script as `python force_octo.py FLAGS` does, but in this process: (exit code, stdout, stderr)."""

    def call(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, flags)])
        capsys.readouterr()
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call
