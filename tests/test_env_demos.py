"""Environments, demonstrations, rollouts and evaluation: real ManiSkill on the CPU, and stubs where numbers matter."""

import dataclasses
import importlib
import json
import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import FIXTURES, tiny_args

import bc
import force_octo as script
import plumbing.demos
from backbones.units import ACTION_RANGE
from plumbing import EVAL_SEED, TRAIN_SEED, UserError, load_demos, moving, success_metrics
from plumbing.demos import cache_of

RELEASED = dict(obs_mode="rgb", backbone="octo-small", image_size=256)


@pytest.fixture
def copy(planned, tmp_path):
    """A copy of ManiSkill's .h5 and .json to damage, and flags to read it with."""
    shutil.copy(planned, tmp_path / "traj.h5")
    shutil.copy(planned.with_suffix(".json"), tmp_path / "traj.json")
    args = tiny_args(tmp_path, demo_path=str(tmp_path / "traj.h5"), control_mode="pd_joint_pos", num_demos=2)
    script.validate(args)
    return args


def change_json(args, change) -> None:
    path = Path(args.demo_path).with_suffix(".json")
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


# --- demonstrations ---


def test_contents(demos):
    assert len(demos.lengths) == len(demos.steps) == 4
    rows = sum(demos.lengths + 1)
    assert demos.obs.keys() == {"proprio"} and len(demos.obs["proprio"]) == len(demos.action) == rows
    assert demos.action.dtype == demos.obs["proprio"].dtype == np.float32
    assert (0 < demos.steps).all() and (demos.steps <= demos.lengths).all()
    assert demos.starts().tolist() == [0, *np.cumsum(demos.lengths + 1)[:-1]]
    for start, length in zip(demos.starts(), demos.lengths, strict=True):
        assert not demos.action[start + length].any() and demos.action[start : start + length].any(1).mean() > 0.5
    assert len(np.unique(demos.obs["proprio"][demos.starts()], axis=0)) == 4  # four different beginnings


def first_recording(planned) -> tuple[int, np.ndarray]:
    """Seed and actions of the first converted demonstration."""
    converted = planned.with_name(f"{planned.stem}.none.pd_ee_delta_pos.physx_cpu.h5")
    episode = json.loads(converted.with_suffix(".json").read_text())["episodes"][0]
    with h5py.File(converted, "r") as file:
        return episode["episode_seed"], file[f"traj_{episode['episode_id']}/actions"][:]


def replay(env, seed: int, actions) -> tuple[np.ndarray, list[bool]]:
    rows, flags = [env.reset(seed=[seed])[0]["proprio"][0]], []
    for a in actions:
        obs, success, _, _, _ = env.step(a[None])
        rows.append(obs["proprio"][0].copy())
        flags.append(bool(success[0]))
    return np.stack(rows), flags


def test_replay_gives_the_same_observations_and_succeeds_at_the_cut(place, demos, planned):
    seed, actions = first_recording(planned)
    length, steps = demos.lengths[0], demos.steps[0]
    assert np.array_equal(demos.action[:length], actions)
    env = script.make_env(tiny_args(place), 1)
    rows, flags = replay(env, seed, actions)
    env.close()
    assert np.array_equal(rows, demos.obs["proprio"][: length + 1])
    assert flags.index(True) + 1 == steps


def test_an_environment_goes_on_after_success(place, demos, planned):
    """Evaluation runs to the time limit, so that success at the end is told from success on the way."""
    seed, actions = first_recording(planned)
    env = script.make_env(tiny_args(place), 1)
    env.reset(seed=[seed])
    found = [env.step(a[None]) for a in [*actions, *actions[-1:].repeat(3, 0)]]
    env.close()
    flags, ended = [bool(step[1][0]) for step in found], [bool(step[4]["ended"][0]) for step in found]
    assert flags.index(True) + 1 == demos.steps[0] and ended.index(True) + 1 == demos.steps[0]
    assert len(found) == len(actions) + 3


def test_an_episode_does_not_depend_on_the_ones_before(place, planned):
    """PhysX keeps contacts from one episode to the next unless the scene is made anew."""
    seed, actions = first_recording(planned)
    env = script.make_env(tiny_args(place), 1)
    rows, _ = replay(env, seed, actions)
    again, _ = replay(env, seed, actions)
    replay(env, seed + 1, actions)
    after_another, _ = replay(env, seed, actions)
    env.close()
    assert np.array_equal(again, rows) and np.array_equal(after_another, rows)


def test_a_cache_is_used_again_and_only_for_the_same_flags(place, demos, monkeypatch):
    asked = []
    monkeypatch.setattr(plumbing.demos, "make", lambda args, make_env, out: asked.append(out))
    again = load_demos(tiny_args(place, seed=7, K=3, hidden_dim=99), script.make_env)
    assert np.array_equal(again.action, demos.action) and not asked
    changes = ({"control_mode": "pd_ee_delta_pose"}, {"num_demos": 3}, {"control_freq": 20}, {"obs_mode": "rgb"})
    for change in changes:
        with pytest.raises(FileNotFoundError):
            load_demos(tiny_args(place, **change), script.make_env)
    assert len({*asked, cache_of(tiny_args(place))}) == len(changes) + 1


def test_idle_first_steps_are_left_out(place, demos):
    """PushCube's planner closes the gripper for seven steps before the arm moves."""
    short = load_demos(tiny_args(place, skip_idle=0.01), script.make_env)
    assert not np.any(demos.idle) and (short.idle >= 7).all()
    for start, own, idle, length in zip(demos.starts(), short.starts(), short.idle, short.lengths, strict=True):
        recorded = demos.action[start:][: idle + length]
        assert (np.abs(recorded[:idle, :-1]) < 0.01).all() and np.abs(recorded[idle, :-1]).max() >= 0.01
        assert np.array_equal(short.action[own : own + length], recorded[idle:])
        assert np.array_equal(short.obs["proprio"][own], demos.obs["proprio"][start])  # replayed without the others
    assert (short.steps + short.idle == demos.steps).mean() >= 0.5 and (short.steps < demos.steps).all()


def test_idle_steps_need_a_controller_of_differences(place, inline):
    with pytest.raises(UserError, match="--skip-idle is for controllers of differences, not pd_joint_pos"):
        load_demos(tiny_args(place, skip_idle=0.01, control_mode="pd_joint_pos"), script.make_env)


def test_an_edited_camera_asks_for_new_demonstrations(place, monkeypatch):
    before = cache_of(tiny_args(place))
    monkeypatch.setitem(script.TASKS, "PushCube-v1", script.Task("push it", 5.0, (0.6, 0.0, 0.5), (0.0, 0.0, 0.0)))
    assert cache_of(tiny_args(place)) != before


def test_demo_path_reads_maniskill_files(copy, tmp_path):
    demos = load_demos(copy, script.make_env)
    assert len(demos.lengths) == 2 and (demos.steps <= demos.lengths).all() and demos.source == copy.demo_path
    assert demos.action.shape[1] == 8  # seven joints and the gripper
    with h5py.File(copy.demo_path, "r") as file:
        assert np.array_equal(demos.action[: demos.lengths[0]], file["traj_0/actions"][:])
    assert [p.suffix for p in (tmp_path / "demos").iterdir()] == [".npz"]


def test_a_full_disk_leaves_no_half_cache(copy, inline, monkeypatch, tmp_path):
    def savez(path, **arrays):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="No space left"):
        load_demos(copy, script.make_env)
    assert not list((tmp_path / "demos").iterdir())


def damage_truncated(args):
    path = Path(args.demo_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_episode(args):
    with h5py.File(args.demo_path, "a") as file:
        del file["traj_1"]


def damage_foreign(args):
    with h5py.File(args.demo_path, "w") as file:
        file["observations"] = np.zeros(3)


BAD_FILES = {
    "missing": (lambda a: Path(a.demo_path).unlink(), "no demonstrations|no complete"),
    "no json": (lambda a: Path(a.demo_path).with_suffix(".json").unlink(), r"traj\.json doesn't exist .*beside"),
    "truncated": (damage_truncated, "no complete ManiSkill trajectory file .*make or copy it again"),
    "empty": (lambda a: Path(a.demo_path).write_bytes(b""), "no complete ManiSkill .*make or copy it again"),
    "no HDF5": (lambda a: Path(a.demo_path).write_text("hello"), "no complete ManiSkill .*make or copy it"),
    "foreign": (damage_foreign, "truncated: .* episodes .*make or copy it again"),
    "foreign json": (lambda a: change_json(a, lambda m: m.clear()), "no complete ManiSkill .*make or copy it again"),
    "json list": (lambda a: Path(a.demo_path).with_suffix(".json").write_text("[]"), "no complete ManiSkill"),
    "json cut": (lambda a: Path(a.demo_path).with_suffix(".json").write_text('{"env'), "no complete ManiSkill"),
    "episode missing": (damage_episode, "truncated: 1 of the listed episodes .*make or copy it again"),
    "other task": (lambda a: setattr(a, "env_id", "PickCube-v1"), "--env-id PushCube-v1, not PickCube-v1"),
    "other rate": (lambda a: setattr(a, "control_freq", 20), "--control-freq 10, not 20"),
    "other robot": (lambda a: setattr(a, "robot_uids", "panda_wristcam"), "--robot-uids panda, not panda_wristcam"),
    "too few": (lambda a: setattr(a, "num_demos", 99), r"holds \d+ episodes; --num-demos asks for 99"),
    "other actions": (
        lambda a: change_json(a, lambda m: m["env_info"]["env_kwargs"].update(control_mode="pd_joint_vel")),
        "actions for pd_joint_vel; only pd_joint_pos can be converted",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_demonstration_files(case, copy, inline, tmp_path):
    damage, message = BAD_FILES[case]
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        load_demos(copy, script.make_env)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*tmp*.*z"))


def test_demonstrations_that_do_not_succeed(copy, inline, tmp_path):
    with h5py.File(copy.demo_path, "a") as file:
        for name in file:
            file[name]["actions"][...] = file[name]["actions"][0]  # stands still
    with pytest.raises(UserError, match="succeed.* when replayed"):
        load_demos(copy, script.make_env)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_changed_file_is_read_again(copy):
    first = load_demos(copy, script.make_env)
    change_json(copy, lambda meta: meta["episodes"].pop(0))
    with h5py.File(copy.demo_path, "a") as file:
        del file["traj_0"]
    second = load_demos(copy, script.make_env)
    assert not np.array_equal(first.action[:5], second.action[:5])


# --- what is left out, who refuses what ---


def test_idle_steps_are_counted_and_none_past_the_success_are_left_out(place, demos, capsys):
    """An episode of six steps that waits twice before its success at the fourth, and stays there."""
    whole = load_demos(tiny_args(place, drop_idle=0.0), script.make_env)
    assert not capsys.readouterr().err and whole.idle.sum() == 0
    short = load_demos(tiny_args(place, drop_idle=0.03), script.make_env)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"leaves out {(whole.lengths - short.lengths).sum()} demonstrated steps" in said
    assert short.lengths.sum() < whole.lengths.sum()
    assert (short.lengths - short.steps == whole.lengths - whole.steps).all()
    for about in (whole.summary(), short.summary()):
        assert about["demo_steps_to_success"] == pytest.approx(whole.steps.mean())
    assert short.summary()["demo_steps_without_idle"] == pytest.approx(short.steps.mean())
    action = np.float32([[0, 1], [0.5, 1], [0, 1], [0.5, 1], [0, 1], [0, 1]])
    action = np.concatenate([action, np.zeros((1, 2), np.float32)])
    success = np.array([False, False, False, True, True, True, False])
    one = plumbing.demos.Demos({"proprio": action}, action, np.array([6]), np.array([4]), "by hand", success)
    left = plumbing.demos.without_idle(one, tiny_args(place, drop_idle=0.03))
    assert left.action[:, 0].tolist() == [0.5, 0.5, 0, 0, 0] and left.idle.tolist() == [2]
    assert left.steps.tolist() == [2] and left.lengths.tolist() == [4] and left.success.tolist() == [0, 1, 1, 1, 0]


def test_a_robot_without_a_gripper_keeps_still(place, demos):
    """Its last number moves the arm."""
    last = np.full(demos.action.shape[1], 0.3, np.float32)
    for gripper in (True, False):
        agent = script.Agent(tiny_args(place), dataclasses.replace(demos, gripper=gripper))
        assert agent.hold_action(last)[-1] == pytest.approx(0.3 * gripper) and not agent.hold_action(last)[:-1].any()
    action = np.zeros((7, 2), np.float32)
    action[:, 1] = [1, 1, 1, -0.01, -0.01, -0.01, 0.9]
    kept = {gripper: moving(action, 0.03, relative=True, gripper=gripper).tolist() for gripper in (True, False)}
    assert kept[True] == [False, False, False, True, True, False, True]  # it closes, and opens at the end
    assert kept[False] == [True, True, True, False, False, False, True]
    hand = np.append(action[:, 1:], np.ones((7, 1), np.float32), 1)
    one = plumbing.demos.Demos({"proprio": hand}, np.append(hand, 0 * hand[:1], 0), np.array([7]), np.array([7]), "",
                               np.zeros(8, bool), gripper=False)  # fmt: skip
    one.obs["proprio"] = one.action
    assert plumbing.demos.without_idle(one, tiny_args(place)).lengths.tolist() == [7]  # ones move an arm


WRONG_STARTS = {
    "no such run": ("force_octo", dict(sft_checkpoint="nowhere"), "is no run folder"),
    "run of another head": ("conrft", dict(sft_checkpoint="BC"), "with --head mse-chunk, not consistency"),
    "run of another task": ("co_rft_chunked", dict(sft_checkpoint="BC", control_freq=20), "--control-freq 10, not 20"),
    "run without a checkpoint": ("co_rft_chunked", dict(sft_checkpoint="BC"), "holds no readable checkpoint"),
    "run of another script": ("force_pi0", dict(sft_checkpoint="BC"), "is a run of bc.py, not of force_pi0.py"),
    "no such weights": ("bc", dict(RELEASED, checkpoint="nowhere"), "no folder nowhere"),
    "weights that aren't there": ("force_octo", dict(RELEASED, checkpoint="BC"), "no weights at"),
    "no such pi0": ("force_pi0", dict(RELEASED, backbone="pi0", checkpoint="nowhere"), "no weights at nowhere"),
    "another pi0": ("force_pi0", dict(RELEASED, backbone="pi0", checkpoint=str(FIXTURES / "pi05_tiny")), "fit pi0"),
}


@pytest.mark.parametrize("case", WRONG_STARTS)
def test_wrong_weights_are_found_before_demonstrations_are_made(case, tmp_path):
    name, changes, words = WRONG_STARTS[case]
    start = tmp_path / "BC"
    start.mkdir()
    begun = tiny_args(tmp_path, bc, head="mse-chunk")
    bc.validate(begun)
    (start / "config.json").write_text(json.dumps({"script": "bc.py", "args": dataclasses.asdict(begun)}))
    changes = {flag: str(start) if value == "BC" else value for flag, value in changes.items()}
    module = importlib.import_module(name)
    with pytest.raises(UserError, match=words) as caught:
        module.main(tiny_args(tmp_path, module, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "demos").exists() and not (tmp_path / "runs").exists()


def test_a_resumed_run_refuses_other_demonstrations(place, demos, tmp_path, monkeypatch):
    folder = bc.main(tiny_args(place, bc, runs=str(tmp_path), run_name="own"))
    config = json.loads((folder / "config.json").read_text())
    assert config["demonstrations"] == load_demos(tiny_args(place), script.make_env).sha256()
    assert bc.main(bc.Args(resume=str(folder), device="cpu")) == folder
    config["packages"]["numpy"] = "0.1"
    (folder / "config.json").write_text(json.dumps(config))
    assert bc.main(bc.Args(resume=str(folder), device="cpu")) == folder  # versions alone don't matter
    other = dataclasses.replace(demos, action=demos.action + 1e-6)
    monkeypatch.setattr(bc, "load_demos", lambda *_: other)
    words = r"other demonstrations \(versions .* differ: numpy 0\.1, now [\d.]+\)"
    with pytest.raises(UserError, match=words) as caught:
        bc.main(bc.Args(resume=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_hash_of_all_that_matters(demos):
    assert dataclasses.replace(demos).sha256() == demos.sha256()
    changed = [dataclasses.replace(demos, steps=demos.steps - 1), dataclasses.replace(demos, success=~demos.success)]
    changed.append(dataclasses.replace(demos, obs={"proprio": demos.obs["proprio"] + 1e-3}))
    assert len({each.sha256() for each in [demos, *changed]}) == 4


# --- units of actions and observations ---


def test_action_units(place, demos):
    args = tiny_args(place)
    agent = script.Agent(args, demos)
    own = np.delete(demos.action, demos.starts() + demos.lengths, axis=0)
    normal = agent.normalise(own)
    assert np.abs(normal).max(0) == pytest.approx(np.full(normal.shape[1], 1 / ACTION_RANGE), rel=1e-3)
    assert agent.denormalise(normal) == pytest.approx(own, abs=1e-5)
    box = np.random.default_rng(0).uniform(-1, 1, (50, normal.shape[1])).astype(np.float32)
    reachable = agent.denormalise(box)
    assert np.abs(reachable).max() <= 1  # the controller's own box
    inside = np.abs(reachable) < 1
    assert agent.normalise(reachable)[inside] == pytest.approx(box[inside], abs=1e-5)
    assert not agent.normalise(np.zeros(normal.shape[1])).any()  # zero keeps still, in both units
    last = np.full(normal.shape[1], 0.3, np.float32)
    assert agent.hold_action(last).tolist() == pytest.approx([0.0] * (len(last) - 1) + [0.3])


def test_joint_position_units(place, demos):
    action = np.random.default_rng(0).uniform(1, 3, demos.action.shape).astype(np.float32)
    args = tiny_args(place, control_mode="pd_joint_pos")
    agent = script.Agent(args, dataclasses.replace(demos, action=action))
    own = np.delete(action, demos.starts() + demos.lengths, axis=0)
    normal = agent.normalise(own)
    assert np.abs(normal).max() == pytest.approx(1 / ACTION_RANGE, abs=1e-4)
    assert agent.denormalise(normal) == pytest.approx(own, abs=1e-4)  # beyond 1: joint angles aren't clipped
    assert agent.hold_action(normal[3]) == pytest.approx(normal[3])


def holds(vector: np.ndarray, part) -> bool:
    part = np.asarray(part, dtype=np.float32).ravel()
    return any(np.allclose(vector[i : i + len(part)], part, atol=1e-5) for i in range(len(vector) - len(part) + 1))


def test_pick_cube_images_and_goal(place):
    args = tiny_args(place, env_id="PickCube-v1", obs_mode="rgb", image_size=32)
    env = script.make_maniskill(args)
    seen = []
    for seed in (0, 1):
        obs = env.reset(seed=seed)[0]
        assert obs["primary"].shape == (1, 32, 32, 3) and obs["primary"].dtype == np.uint8
        assert obs["primary"].std() > 5 and len(np.unique(obs["primary"])) > 20
        assert holds(obs["proprio"][0], env.unwrapped.goal_site.pose.p[0])  # hidden in images
        assert holds(obs["proprio"][0], env.unwrapped.agent.robot.qpos[0])
        assert not holds(obs["proprio"][0], env.unwrapped.cube.pose.p[0])  # this one has to be seen
        seen.append(obs)
    assert not np.array_equal(seen[0]["primary"], seen[1]["primary"])
    env.close()


@pytest.mark.parametrize(("side", "small"), [(32, 32), (96, 64)])
def test_a_camera_on_the_hand(place, side, small):
    """It moves with the hand and sees both fingertips; the other camera and the episode are the same without it."""
    seen = {}
    for cameras in ("both", "primary"):
        env = script.make_maniskill(tiny_args(place, obs_mode="rgb", image_size=side, cameras=cameras))
        seen[cameras] = [env.reset(seed=1)[0], *(env.step(np.float32([0, 0, -0.3, 1]))[0] for _ in range(3))]
        env.close()
    (first, *_, last), (alone, *_, alone_last) = seen["both"], seen["primary"]
    assert list(first) == ["proprio", "primary", "wrist"] and list(alone) == ["proprio", "primary"]
    assert first["wrist"].shape == (1, small, small, 3) and first["wrist"].dtype == np.uint8
    assert np.array_equal(alone["primary"], first["primary"]) and np.array_equal(alone_last["proprio"], last["proprio"])
    assert (np.abs(first["wrist"].astype(float) - last["wrist"]).mean(-1) > 10).mean() > 0.05  # the table comes nearer
    halves = np.split(first["wrist"][0, small // 3 : small * 2 // 3].astype(float).mean(-1), 2, axis=1)
    assert all((half < 70).mean() > 0.01 for half in halves)  # a dark fingertip on either side


def test_steps_that_nobody_looks_at(place):
    """With every=2, odd steps repeat the last observation; physics, success and the other steps are the same."""
    args = tiny_args(place, env_id="PickCube-v1", obs_mode="rgb", image_size=32)
    env, actions = script.make_env(args, 1), np.random.default_rng(0).uniform(-1, 1, (4, 1, 4)).astype(np.float32)
    full = [env.reset(seed=[3])[0]] + [env.step(a)[0] for a in actions]
    some = [env.reset(seed=[3], options={"every": 2})[0]] + [env.step(a)[0] for a in actions]
    for key in ("proprio", "primary"):
        assert not np.array_equal(full[0][key], full[1][key])
        for t, source in enumerate((0, 0, 2, 2, 4)):
            assert np.array_equal(some[t][key], full[source][key])
    env.reset(seed=[3])
    assert np.array_equal(env.step(actions[0])[0]["proprio"], full[1]["proprio"])  # every step again
    env.close()


@torch.no_grad()
def test_worker_processes_equal_this_process(place, demos):
    args, seeds = tiny_args(place), [5, 9]
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4)).astype(np.float32)
    pair, alone = script.make_env(args, 2), script.make_env(args, 1)
    try:
        first = pair.reset(seed=seeds)[0]
        steps = [pair.step(a) for a in actions]
        for i, seed in enumerate(seeds):
            assert np.array_equal(alone.reset(seed=[seed])[0]["proprio"][0], first["proprio"][i])
            for action, (obs, success, _, _, info) in zip(actions, steps, strict=True):
                own, reached, _, _, own_info = alone.step(action[i : i + 1])
                assert np.array_equal(own["proprio"][0], obs["proprio"][i])
                assert (reached[0], own_info["ended"][0]) == (success[i], info["ended"][i])
        assert not np.array_equal(first["proprio"][0], first["proprio"][1])
        args.max_episode_steps = 4
        agent = script.Agent(args, demos)
        episodes = script.rollout(pair, agent, args, seeds, torch.Generator(), training=True)
        for episode, seed in zip(episodes, seeds, strict=True):
            first, _ = alone.reset(seed=[seed])
            with torch.no_grad():
                start = agent.feature(agent.recent([first]))
            assert len(episode.success) == 4 and episode.feature.shape == (5, agent.feature_dim)
            torch.testing.assert_close(episode.feature[:1], start, atol=1e-5, rtol=0)
    finally:
        pair.close()
        alone.close()


# --- evaluation ---


def test_evaluation_numbers():
    limit = 6
    plan = [{3, 6}, {5}, set(), set(), {1, 2, 3, 4, 5, 6}]  # steps at which five episodes succeed
    success = [np.array([t in steps for t in range(1, limit + 1)]) for steps in plan]
    metrics = success_metrics(success, limit, -0.05, 10.0)
    p, n, z = 3 / 5, 5, 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert metrics["eval/success_once"] == pytest.approx(p) and metrics["eval/success_at_end"] == pytest.approx(2 / 5)
    assert metrics["eval/success_once_low"] == pytest.approx((centre - half) / (1 + z * z / n), rel=1e-4)
    assert metrics["eval/success_once_high"] == pytest.approx((centre + half) / (1 + z * z / n), rel=1e-4)
    assert metrics["eval/episode_len"] == pytest.approx((3 + 5 + 1) / 3) and metrics["eval/num_episodes"] == 5
    returns = [10 - 0.05 * 2, 10 - 0.05 * 4, -0.05 * 6, -0.05 * 6, 10]
    assert metrics["eval/return"] == pytest.approx(sum(returns) / 5)
    short = [success[0][:3], *success[1:]]  # one that ended at its success
    ended = success_metrics(short, limit, -0.05, 10.0)
    assert "eval/success_at_end" not in ended and ended["eval/return"] == metrics["eval/return"]
    nothing = success_metrics(success[2:4], limit)
    assert nothing["eval/success_once"] == 0 == nothing["eval/success_once_low"]
    assert math.isnan(nothing["eval/episode_len"])



def test_training_evaluation_and_demonstration_seeds_never_meet(tmp_path):
    ranges = [range(0, 100_000 * 16), range(EVAL_SEED, EVAL_SEED + 10_000)]
    for seed in (0, 1, 2, 100):
        start = TRAIN_SEED + 1_000_000 * seed
        ranges.append(range(start, start + 1_000_000))
    for i, one in enumerate(ranges):
        for other in ranges[:i]:
            assert one.stop <= other.start or other.stop <= one.start
    for seed in (-1, 900):  # the episodes of seed 900 would be those of the evaluation
        with pytest.raises(UserError, match="--seed must be"):
            script.validate(tiny_args(tmp_path, seed=seed))
