"""Environments, demonstrations, rollouts and evaluation: real ManiSkill on the CPU, and stubs where numbers matter."""

import dataclasses
import importlib
import json
import math
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from conftest import FIXTURES, tiny_args

import bc
import force_octo as script
import plumbing.demos
from backbones.units import ACTION_RANGE
from plumbing import EVAL_SEED, TRAIN_SEED, Slots, UserError, load_demos, moving, success_metrics
from plumbing.wrappers import from_hand

RELEASED = dict(obs_mode="rgb", backbone="octo-small", image_size=256)


# --- environments ---


def first_recording(planned) -> tuple[int, np.ndarray]:
    """Seed and actions of the first converted demonstration."""
    converted = planned.with_suffix(".pd_ee_delta_pos") / "episodes.none.pd_ee_delta_pos.physx_cpu.h5"
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


def test_an_environment_goes_on_after_success(place, demos, planned):
    """Evaluation runs to the time limit, so that success at the end is told from success on the way."""
    seed, actions = first_recording(planned)
    env = script.make_env(tiny_args(place), 1)
    env.reset(seed=[seed])
    found = [env.step(a[None]) for a in [*actions, *actions[-1:].repeat(3, 0)]]
    env.close()
    flags, ended = [bool(step[1][0]) for step in found], [bool(step[4]["ended"][0]) for step in found]
    steps = demos.steps[0] + demos.idle[0]
    assert flags.index(True) + 1 == steps and ended.index(True) + 1 == steps
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


# --- what is left out, who refuses what ---


def test_idle_steps_are_counted_and_none_past_the_success_are_left_out(place, demos, capsys):
    """An episode of six steps that waits twice before its success at the fourth, and stays there."""
    whole = load_demos(tiny_args(place, drop_idle=0.0, max_episode_steps=60), script.make_env)
    assert not capsys.readouterr().err and whole.idle.sum() == 0
    short = load_demos(tiny_args(place, drop_idle=0.03, max_episode_steps=60), script.make_env)
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
    left = plumbing.demos.without_idle(one, tiny_args(place, drop_idle=0.03, max_episode_steps=60))
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


@pytest.mark.parametrize(
    "gripper, kept",
    [([1, 1, -1, -1, -1, -1], [1, 1, 1, 1, 0, 1]), ([-1, -1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1])],
)
def test_a_robot_waits_where_it_lets_go_and_not_where_it_has_grasped(gripper, kept):
    """The arm stands still in the middle."""
    action = np.stack([[0.5, 0.5, 0, 0, 0, 0.5], gripper], 1).astype(np.float32)
    assert moving(action, 0.03, relative=True, gripper=True).tolist() == [bool(keep) for keep in kept]


def test_open_fingers_are_seen_before_they_close(place):
    """PushCube's planner closes them first, while the arm waits; a policy meets them open at every start."""
    action = np.zeros((6, 2), np.float32)
    action[4:, 0] = 0.5
    kept = {}
    for command in (-1, 1):
        action[:, 1] = command
        kept[command] = moving(action, 0.03, relative=True, gripper=True).tolist()
    assert kept == {-1: [True, True, False, False, True, True], 1: [False, False, False, False, True, True]}
    whole = load_demos(tiny_args(place, drop_idle=0.0, max_episode_steps=60), script.make_env)
    left = load_demos(tiny_args(place, drop_idle=0.03, max_episode_steps=60), script.make_env)
    assert (left.steps < whole.steps).all()
    fingers = {name: demos.obs["proprio"][demos.starts(), 0] for name, demos in (("whole", whole), ("left", left))}
    np.testing.assert_array_equal(fingers["left"], fingers["whole"])
    assert (fingers["left"] > 0.03).all() and left.obs["proprio"][left.starts() + 2, 0].max() < 0.005


def test_places_are_seen_from_the_hand():
    """What is moved across the table together with the hand looks the same; only the hand's height tells it apart."""
    g = torch.Generator().manual_seed(0)
    sizes = {"is_grasped": 1, "tcp_pose": 7, "goal_pos": 3, "obj_pose": 7, "tcp_to_obj_pos": 3}
    extra = {name: torch.randn((2, size), generator=g) for name, size in sizes.items()}
    seen = from_hand(extra)
    assert list(seen) == list(extra)  # the order of the numbers
    assert torch.equal(seen["tcp_pose"], extra["tcp_pose"][:, 2:])
    assert torch.equal(seen["goal_pos"], extra["goal_pos"] - extra["tcp_pose"][:, :3])
    assert torch.equal(seen["obj_pose"][:, 3:], extra["obj_pose"][:, 3:])
    for name in ("is_grasped", "tcp_to_obj_pos"):
        assert torch.equal(seen[name], extra[name])
    moved = {name: value.clone() for name, value in extra.items()}
    for name in ("tcp_pose", "goal_pos", "obj_pose"):
        moved[name][:, :2] += torch.tensor([0.3, -0.1])
    for name, value in from_hand(moved).items():
        torch.testing.assert_close(value, seen[name])


def test_a_controller_of_joints_needs_the_joints(place):
    """PickCube in state mode: 9 joint positions and 24 numbers more; by differences of the hand's place 2 and 22."""
    sizes = {}
    for mode in ("pd_joint_pos", "pd_ee_delta_pos"):
        env = script.make_maniskill(tiny_args(place, env_id="PickCube-v1", control_mode=mode))
        sizes[mode] = env.reset(seed=0)[0]["proprio"].shape[1]
        env.close()
    assert sizes == {"pd_joint_pos": 33, "pd_ee_delta_pos": 24}


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
        base = env.unwrapped
        hand = base.agent.tcp_pose.p[0]
        assert holds(obs["proprio"][0], base.goal_site.pose.p[0] - hand)  # hidden in images
        assert holds(obs["proprio"][0], base.agent.robot.qpos[0, 7:])  # fingers
        assert not holds(obs["proprio"][0], base.cube.pose.p[0] - hand)  # this one has to be seen
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
        args.num_envs = 2
        agent = script.Agent(args, demos)
        slots = Slots(pair, agent, args, partial(script.decide, agent, 0.0), training=True)
        ended = [*slots.turn(seeds), *slots.turn(())]
        for played, seed in zip(ended, seeds, strict=True):
            episode = script.embedded(played, agent)
            first, _ = alone.reset(seed=[seed])
            start = agent.feature(agent.recent([first]))
            assert played.seed == seed and len(episode.success) == 4 and episode.feature.shape == (5, agent.feature_dim)
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
    assert "eval/episode_len" not in nothing


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
