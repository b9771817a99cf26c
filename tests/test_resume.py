"""Killed and gone on with, every script's run ends as an undisturbed one: all logged values, weights and states."""

import functools
import importlib
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, differences, follow_demonstrations, latest, reaching_args, tiny_args
from safetensors.torch import load_file, save_file

from plumbing import Evaluator, Run

FORKS = multiprocessing.get_context("forkserver")  # a process of its own for each life of a run, without new imports
FORKS.set_forkserver_preload(
    ["mani_skill.envs", "torch._dynamo", "torch.utils.tensorboard", "tyro", "scipy.stats", "tqdm"]
)


class Beside(Evaluator):
    """The script's own one, in whose process policies follow the demonstrations too."""

    def __init__(self, args, make_env, evaluate, agent):
        follow = functools.partial(following, evaluate.__module__, Path(args.demo_dir).parent)
        super().__init__(args, make_env, follow, agent)


def following(name: str, place: Path, *about) -> dict[str, float]:
    script = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        follow_demonstrations(patch, script, place)
        return script.evaluate(*about)


def live(name: str, args, place: Path, end: tuple[str, int] | None) -> None:
    """Run the script, and die without a word after the update `end` of (stage, its updates)."""
    torch.set_num_threads(1)
    script, tick = importlib.import_module(name), Run.tick

    def deadly_tick(self, *rest, **more):
        tick(self, *rest, **more)
        if end == (self.stage, self.stage_updates):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        follow_demonstrations(patch, script, place)
        patch.setattr(script, "Evaluator", Beside)
        patch.setattr(multiprocessing, "get_context", lambda kind: FORKS)  # for its process too
        patch.setattr(Run, "tick", deadly_tick)
        script.main(args)


def life(*about) -> int | None:
    """Exit code of a process that lives so; negative: the signal that ended it."""
    process = FORKS.Process(target=live, args=about)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_ends_as_an_undisturbed_one(name, whole, place):
    undisturbed, script = whole(name), importlib.import_module(name)
    args = reaching_args(place, script, run_name=f"killed-{name}")
    folder = Path(args.runs) / args.run_name
    # At odd updates, so mostly off a checkpoint: what was done and logged since has to be done again, alike.
    ends = [(stage, count * 2 // 3 | 1) for stage, count in undisturbed.updates.items()]
    assert ends and set(ends) - set(undisturbed.saves)
    for end in ends:
        assert life(name, args, place, end) == -signal.SIGKILL, end
        args = tiny_args(place, script, resume=str(folder))
    assert life(name, args, place, None) == 0
    assert differences(undisturbed.folder, folder) == []


def test_a_difference_is_found(whole, tmp_path):
    own = whole("force_octo").folder
    other = Path(shutil.copytree(own, tmp_path / "other"))
    assert differences(own, other) == []
    path = latest(other) / "weights.safetensors"
    weights = load_file(path)
    weights["actor.out.bias"] += 1e-6
    save_file(weights, path)
    path = latest(other) / "training.pt"
    state = torch.load(path, weights_only=True)
    state["rng"]["batch"][0] += 1
    state["env_steps"] += 1
    torch.save(state, path)
    text = (other / "metrics.csv").read_text().splitlines(keepends=True)
    line = next(i for i, row in enumerate(text) if ",losses/td," in row)
    del text[line]
    (other / "metrics.csv").write_text("".join(text))
    found = differences(own, other)
    assert found[0].startswith("metrics.csv: ") and "losses/td" in found[0]
    assert found[-3:] == ["checkpoint/env_steps", "checkpoint/rng/batch", "checkpoint/weights/actor.out.bias"]
