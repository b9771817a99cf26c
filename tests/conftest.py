"""Fixtures: tiny settings, real PushCube demonstrations made once, short runs of whole scripts."""

import copy
import csv
import dataclasses
import functools
import importlib
import itertools
import json
import runpy
import signal
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import force_octo
import plumbing.replay
from plumbing import Demos, Run, fill, load_demos
from plumbing.storage import Checkpoints, owners

torch.set_num_threads(1)

LONGEST = "test_resume test_demos test_force_pi0 test_released test_reliability test_cli test_ranks".split()


def pytest_configure(config):
    """`-n 2 --dist loadfile` hands files out in our order, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them in the end."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


ROOT = Path(force_octo.__file__).parent
SCRIPT = ROOT / "force_octo.py"
SCRIPTS = ("bc", "co_rft_chunked", "conrft", "force_octo", "force_pi0")
FIXTURES = ROOT / "tests" / "fixtures"
TINY = dict(  # a script takes those that it has
    env_id="PushCube-v1", obs_mode="state", device="cpu", cameras="primary", image_size=64, num_demos=4, K=4,
    max_episode_steps=10, hidden_dim=24, num_critics=3, chunk_len=3, updates=8, sft_updates=6, sft_head_updates=3,
    sft_batch_size=8, batch_size=8, offline_updates=5, warmup_episodes=2, warmup_updates=6, online_steps=40,
    utd_ratio=0.3, q_weight=0.0, explore_noise=0.02, cql_samples=2, eval_episodes=2, eval_freq=20, video_episodes=0,
    critic_first=3, val_freq=4, log_freq=1, checkpoint_freq=2, online_finetune="head", round_steps=1, online_lr=3e-4,
    success_filter=False, drop_idle=0.0,
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
    return place / "demos/PushCube-v1-panda-10hz/seeds-000000.h5"


# --- runs ---
# Long enough to reach and push the cube, so that an episode depends on all that the simulator remembers.
REACHING = dict(max_episode_steps=40, online_steps=150, eval_freq=60, q_weight=0.05, q_growth=4.0)


def reaching_args(place: Path, script, **changes):
    own = {field.name for field in dataclasses.fields(script.Args)}
    return tiny_args(place, script, **{k: v for k, v in REACHING.items() if k in own} | changes)


class Inline:
    """In the place of `Evaluator`: evaluates in this process, at once, so that what a test has patched holds there too."""

    def __init__(self, args, make_env, evaluate, agent):
        self.args = args
        self.make_env = make_env
        self.evaluate = evaluate
        self.agent = copy.deepcopy(agent)
        self.env = None

    def submit(self, weights, whole):
        if self.env is None:
            self.env = self.make_env(self.args, self.args.num_envs)
        self.agent.load_state_dict(weights)
        self.metrics = self.evaluate(self.env, self.agent, self.args, whole)

    def ready(self, seconds=0.0):
        return True

    def result(self):
        return self.metrics

    def close(self):
        if self.env is not None:
            self.env.close()


def follow_demonstrations(patch: pytest.MonkeyPatch, script, place: Path) -> None:
    """Make policies of this process do what the nearest demonstrated state did, and a little of what they learned."""
    real, demos = script.Agent.act, load_demos(tiny_args(place, script), script.make_env)

    def act(self, feature, *rest, **more):
        own = real(self, feature, *rest, **more)
        known = self.normalise_proprio(torch.as_tensor(demos.obs["proprio"]))
        near = torch.cdist(feature[:, -known.shape[1] :], known).argmin(1)
        steps = (near[:, None] + torch.arange(own.shape[1])).clamp_max(len(known) - 1)
        return (0.9 * self.normalise(demos.action[steps.numpy()]) + 0.1 * own).clip(-1, 1).astype(np.float32)

    patch.setattr(script.Agent, "act", act)
    patch.setattr(script, "Evaluator", Inline)


@dataclasses.dataclass
class Whole:
    """An undisturbed run, and what was seen of it."""

    folder: Path
    updates: dict  # stage: how many
    starts: dict  # stage, or "end": the weights then
    saves: list  # (stage, its updates) of each checkpoint
    evaluations: list  # actions of each evaluation, in controller units
    asked: list  # (during an evaluation?, arguments) of each call of `act`


def whole_run(script, place: Path) -> Whole:
    seen = Whole(None, {}, {}, [], [], [])
    enter, tick, save, evaluate = Run.enter, Run.tick, Run.save, script.evaluate
    evaluating = []

    def watched_enter(self, stage):
        going_in = enter(self, stage)
        seen.starts[stage] = {k: v.clone() for k, v in self.agent.state_dict().items()}
        return going_in

    def watched_tick(self, *rest, **more):
        tick(self, *rest, **more)
        seen.updates[self.stage] = self.stage_updates

    def watched_save(self):
        seen.saves.append((self.stage, self.stage_updates))
        save(self)

    def watched_evaluate(env, *rest, **more):
        step, actions = env.step, []
        env.step = lambda action: (actions.append(np.array(action)), step(action))[1]
        evaluating.append(True)
        try:
            return evaluate(env, *rest, **more)
        finally:
            evaluating.pop()
            del env.step
            seen.evaluations.append(np.stack(actions))

    with pytest.MonkeyPatch.context() as patch:
        follow_demonstrations(patch, script, place)
        act = script.Agent.act

        def watched_act(self, feature, *rest, **more):
            seen.asked.append((bool(evaluating), rest))
            return act(self, feature, *rest, **more)

        patch.setattr(script.Agent, "act", watched_act)
        patch.setattr(Run, "enter", watched_enter)
        patch.setattr(Run, "tick", watched_tick)
        patch.setattr(Run, "save", watched_save)
        patch.setattr(script, "evaluate", watched_evaluate)
        seen.folder = script.main(reaching_args(place, script, run_name=f"whole-{script.__name__}"))
    seen.starts["end"] = weights(seen.folder)
    return seen


@pytest.fixture(scope="session")
def whole(place):
    """whole(script name): its undisturbed run, made once."""
    return functools.cache(lambda name: whole_run(importlib.import_module(name), place))


def rows(folder: Path) -> list[tuple[int, int, str, str]]:
    """metrics.csv without durations, in order: global_step, update_step, name, value as it was written."""
    with (folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))
    assert found[0] == ["global_step", "update_step", "name", "value"]
    return [(int(g), int(u), name, value) for g, u, name, value in found[1:] if not name.startswith("time/")]


def differences(one: Path, two: Path) -> list[str]:
    """In what two runs' results differ: logged values, evaluations, weights, and what a run would go on with.

    The row of an evaluation comes when it is done, under the step that it belongs to.
    """
    logged = [sorted(rows(folder)) for folder in (one, two)]
    found = [f"metrics.csv: {a} {b}" for a, b in itertools.zip_longest(*logged) if a != b]
    results = [json.loads((folder / "summary.json").read_text())["evaluations"] for folder in (one, two)]
    found += ["evaluations"] if results[0] != results[1] else []
    states = []
    for folder in (one, two):
        state = torch.load(latest(folder) / "training.pt", weights_only=True)
        del state["seconds"], state["log_size"]
        for owner in owners(state):
            owner["buffers"] = {name: Checkpoints(folder).read(known) for name, known in owner["buffers"].items()}
        states.append(state | {"weights": weights(folder)})
    return found + unequal("checkpoint", *states)


def unequal(name: str, one, two) -> list[str]:
    """Paths of the leaves in which two nested states differ."""
    if isinstance(one, list) and isinstance(two, list):
        return unequal(name, dict(enumerate(one)), dict(enumerate(two)))
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys(), key=str)
        return [path for key in keys for path in unequal(f"{name}/{key}", one.get(key), two.get(key))]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if torch.equal(one, two) else [name]
    equal = one == two or repr(one) == repr(two)  # by repr: NaN, the steps to success without one
    return [] if type(one) is type(two) and equal else [name]


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


class InlinePool:
    """In the place of ProcessPoolExecutor: demonstration workers run in this process."""

    def __init__(self, workers, context, initializer):
        pass

    def submit(self, job) -> Future:
        future = Future()
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        pass


@pytest.fixture
def inline(monkeypatch):
    """Demonstration workers run in this process."""
    monkeypatch.setattr(plumbing.replay, "ProcessPoolExecutor", InlinePool)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script as `python force_octo.py FLAGS` does, but in this process: (exit code, stdout, stderr)."""

    def call(*flags: str, script: Path = SCRIPT) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [str(script), *map(str, flags)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        capsys.readouterr()
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return code, *capsys.readouterr()

    return call
