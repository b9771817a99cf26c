"""Demonstrations: planned, read, converted, replayed, cached; what is said about files that won't do."""

import ctypes
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, SCRIPT, as_flags, tiny_args

import force_octo as script
import plumbing.demos
import plumbing.replay
from plumbing import UserError, load_demos
from plumbing.demos import DemoFlags, cache_of
from plumbing.planning import Episode, read_episodes, read_recording
from plumbing.replay import has_gripper, replay
from plumbing.tasks import TASKS, Task, source_of


@pytest.fixture(scope="module")
def whole(place):
    """The demonstrations with all their steps."""
    return load_demos(tiny_args(place, drop_idle=0.0), script.make_env)


@pytest.fixture
def copy(planned, tmp_path):
    """A copy of ManiSkill's .h5 and .json to damage, and flags to read it with."""
    shutil.copy(planned, tmp_path / "traj.h5")
    shutil.copy(planned.with_suffix(".json"), tmp_path / "traj.json")
    args = tiny_args(
        tmp_path, demo_path=str(tmp_path / "traj.h5"), control_mode="pd_joint_pos", num_demos=2, drop_idle=0.0
    )
    script.validate(args)
    return args


def change_json(args, change) -> None:
    path = Path(args.demo_path).with_suffix(".json")
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_contents(whole):
    assert len(whole.lengths) == len(whole.steps) == 4
    rows = sum(whole.lengths + 1)
    assert whole.obs.keys() == {"proprio"} and len(whole.obs["proprio"]) == len(whole.action) == rows
    assert whole.action.dtype == whole.obs["proprio"].dtype == np.float32
    assert (0 < whole.steps).all() and (whole.steps <= whole.lengths).all()
    assert whole.starts().tolist() == [0, *np.cumsum(whole.lengths + 1)[:-1]]
    for start, length in zip(whole.starts(), whole.lengths, strict=True):
        assert not whole.action[start + length].any() and whole.action[start : start + length].any(1).mean() > 0.5
    assert len(np.unique(whole.obs["proprio"][whole.starts()], axis=0)) == 4  # four different beginnings


def test_replay_gives_the_same_observations_and_succeeds_at_the_cut(place, whole):
    """From the seed alone, though the recording has states too: they are the same."""
    env = script.make_env(tiny_args(place), 1)
    first, _ = env.reset(seed=[0])
    seen = [first]
    success = []
    for action in whole.action[: whole.lengths[0]]:
        obs, reached, _, _, _ = env.step(action[None])
        seen.append(obs)
        success.append(bool(reached[0]))
    env.close()
    rows = np.concatenate([obs["proprio"] for obs in seen])
    assert np.array_equal(rows, whole.obs["proprio"][: whole.lengths[0] + 1])
    assert success.index(True) + 1 == whole.steps[0]


def test_a_cache_is_used_again_and_only_for_the_same_flags(place, demos, monkeypatch):
    asked = []

    def make(args, make_env, out):
        asked.append(out)
        raise InterruptedError

    monkeypatch.setattr(plumbing.demos, "make", make)
    again = load_demos(tiny_args(place, seed=7, K=3, hidden_dim=99), script.make_env)
    assert np.array_equal(again.action, demos.action) and not asked
    changes = ({"control_mode": "pd_ee_delta_pose"}, {"num_demos": 3}, {"control_freq": 20}, {"obs_mode": "rgb"})
    for change in changes:
        with pytest.raises(InterruptedError):
            load_demos(tiny_args(place, **change), script.make_env)
    assert len({*asked, cache_of(tiny_args(place))}) == len(changes) + 1


def test_meshes_matter_where_they_are_seen(place):
    """Demonstrations of light and of full meshes are never taken for each other; without a camera they are the same."""
    light = tiny_args(place, obs_mode="rgb")
    full = dataclasses.replace(light, full_meshes=True)
    assert cache_of(light) != cache_of(full)
    for same in ({"obs_mode": "state"}, {"sim_backend": "physx_cuda"}):
        assert cache_of(dataclasses.replace(light, **same)) == cache_of(dataclasses.replace(full, **same))


def test_an_edited_camera_asks_for_new_demonstrations(place, monkeypatch):
    before = cache_of(tiny_args(place))
    monkeypatch.setitem(TASKS, "PushCube-v1", Task("push it", 5.0, (0.6, 0.0, 0.5), (0.0, 0.0, 0.0)))
    assert cache_of(tiny_args(place)) != before


def test_demo_path_reads_maniskill_files(copy, tmp_path):
    demos = load_demos(copy, script.make_env)
    assert len(demos.lengths) == 2 and (demos.steps <= demos.lengths).all() and demos.source == copy.demo_path
    assert demos.action.shape[1] == 8  # seven joints and the gripper
    with h5py.File(copy.demo_path, "r") as file:
        assert np.array_equal(demos.action[: demos.lengths[0]], file["traj_0/actions"][:])
    assert [p.name for p in (tmp_path / "demos").iterdir() if p.suffix != ".lock"] == [cache_of(copy).name]


def test_a_full_disk_leaves_no_half_cache(copy, inline, monkeypatch, tmp_path):
    def savez(path, **arrays):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="No space left"):
        load_demos(copy, script.make_env)
    assert not list((tmp_path / "demos").glob("*.npz"))


def damage_truncated(args):
    path = Path(args.demo_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_episode(args):
    with h5py.File(args.demo_path, "a") as file:
        del file["traj_1"]


def damage_foreign(args):
    with h5py.File(args.demo_path, "w") as file:
        file["observations"] = np.zeros(3)


def change_actions(change):
    def damage(args):
        with h5py.File(args.demo_path, "a") as file:
            for name in file:
                actions = change(file[name]["actions"][:])
                del file[name]["actions"]
                file[name]["actions"] = actions

    return damage


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
    "nothing in it": (lambda a: change_json(a, lambda m: m.update(episodes=[])), "holds 0 episodes"),
    "not finite": (change_actions(lambda x: x * np.nan), r"traj_0 of .* aren't finite"),
    "no steps": (change_actions(lambda x: x[:0]), r"traj_0 of .* shape \(0, 8\)"),
    "flat": (change_actions(lambda x: x[:, 0]), r"traj_0 of .* not steps x numbers"),
    "too narrow": (change_actions(lambda x: x[:, :5]), "actions of 5 numbers; pd_joint_pos takes 8"),
    "words": (change_actions(lambda x: np.full(3, b"up")), "traj_0 of .* can't be read"),
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


# --- where episodes start ---


def first_states(args) -> list[dict]:
    flags = DemoFlags.of(args)
    return [episode.state for episode in read_episodes(read_recording(flags, Path(args.demo_path)))]


def forget_seeds(meta) -> None:
    for episode in meta["episodes"]:
        episode["reset_kwargs"] = {}
        episode["episode_seed"] = 2022  # as ManiSkill writes it after resets without a seed


def delete_states(args) -> None:
    with h5py.File(args.demo_path, "a") as file:
        for name in file:
            del file[name]["env_states"]


@pytest.mark.parametrize("control_mode", ["pd_joint_pos", "pd_ee_delta_pos"])
@pytest.mark.parametrize("lost", ["seeds", "states"])
def test_episodes_start_from_states_or_seeds(control_mode, lost, copy, inline):
    copy.control_mode = control_mode
    asked = load_demos(copy, script.make_env)
    if lost == "seeds":
        change_json(copy, forget_seeds)
    else:
        delete_states(copy)
    found = load_demos(copy, script.make_env)
    assert np.array_equal(found.steps, asked.steps)
    assert found.action == pytest.approx(asked.action, abs=0.05)  # a state that is put back differs in the last digits
    assert found.obs["proprio"][found.starts()] == pytest.approx(asked.obs["proprio"][asked.starts()], abs=1e-5)
    assert not np.array_equal(found.obs["proprio"][0], found.obs["proprio"][found.starts()[1]])


def test_a_recording_with_neither_states_nor_seeds(copy):
    change_json(copy, forget_seeds)
    delete_states(copy)
    with pytest.raises(UserError, match="traj_0 of .* neither a seed nor a stored state"):
        load_demos(copy, script.make_env)


def test_a_stored_state_is_where_the_episode_starts(place, copy):
    state = first_states(copy)[0]
    cube = state["actors"]["cube"]
    cube[:, :2] = [[0.05, -0.07]]
    env = script.make_env(tiny_args(place), 1)
    plain, _ = env.reset(seed=[0])
    moved, _ = env.reset(seed=[0], options={"state": state})
    assert env.envs[0].unwrapped.obj.pose.p[0].tolist() == pytest.approx(cube[0, :3].tolist())
    changed = np.flatnonzero(plain["proprio"] != moved["proprio"])
    env.close()
    assert 2 <= len(changed) <= 7  # the cube's place, and the hand's distance to it


# --- actions ---


def test_actions_beyond_the_controllers_box_are_kept_within_it(copy, inline, capsys, tmp_path):
    """The controller cuts them off: what they do is the same, and a policy's box isn't made for them."""
    copy.control_mode = "pd_ee_delta_pos"
    good = load_demos(copy, script.make_env)
    converted = next((tmp_path / "demos").glob("traj-*/*/episodes.none*.h5"))
    wild = tmp_path / "wild.h5"
    shutil.copy(converted, wild)
    shutil.copy(converted.with_suffix(".json"), wild.with_suffix(".json"))
    with h5py.File(wild, "a") as file:
        for name in file:
            actions = file[name]["actions"][:]
            actions[:, -1] *= 7  # the gripper's command
            file[name]["actions"][...] = actions
    args = dataclasses.replace(copy, demo_path=str(wild))
    found = load_demos(args, script.make_env)
    said = capsys.readouterr().err
    assert f"{good.lengths.sum()} actions of {wild} go beyond [-1, 1]" in said
    assert np.array_equal(found.action, good.action) and np.abs(script.Agent(args, found).action_scale).max() <= 1.5


def test_a_robot_without_a_gripper(place):
    """DrawTriangle is for one that holds a stick, and lists no reward mode but its own."""
    args = tiny_args(place, env_id="DrawTriangle-v1", robot_uids="panda_stick")
    env = script.make_env(args, 1)
    base = env.envs[0].unwrapped
    still = np.zeros((1, base.single_action_space.shape[0]), np.float32)
    assert not has_gripper(base)
    before, _ = env.reset(seed=[0])
    for _ in range(3):
        after, *_ = env.step(still)
    env.close()
    assert after["proprio"][0, :7] == pytest.approx(before["proprio"][0, :7], abs=0.01)  # joint angles
    hand = script.make_env(tiny_args(place), 1)
    assert has_gripper(hand.envs[0].unwrapped)
    hand.close()


class StickEnv:
    """A controller of three numbers, all of them the arm's; succeeds at the second step."""

    class Base:
        class agent:
            class controller:
                action_mapping = {"arm": (0, 3)}

        class single_action_space:
            shape = (3,)
            low = -np.ones(3)
            high = np.ones(3)

    unwrapped = Base

    def reset(self, seed, options):
        self.actions = []
        return {"proprio": np.zeros((1, 2), np.float32)}, {}

    def step(self, action):
        self.actions.append(action[0])
        return {"proprio": np.zeros((1, 2), np.float32)}, np.array([len(self.actions) == 2]), None, None, {}


def test_keeping_still_without_a_gripper_moves_nothing(place):
    flags = dataclasses.replace(DemoFlags.of(tiny_args(place)), upsample_steps=2)
    env = StickEnv()
    seen = replay(env, flags, Episode(np.full((2, 3), 0.5, np.float32), 0, None))
    assert np.array_equal(env.actions, [[0.5] * 3] * 2 + [[0] * 3] * 2) and seen["lengths"] == [4]
    assert not seen["gripper"]


# --- a task of one's own ---


def test_a_task_in_a_module_of_ones_own(copy, tmp_path):
    """`module:id`, as gymnasium spells it: in the script, in its workers, and in ManiSkill's tool."""
    source = """
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.utils.registration import register_env

@register_env("MyPush-v1", max_episode_steps=50)
class MyPush(PushCubeEnv):
    goal_radius = 0.12

@register_env("MyPushNoLimit-v1")
class MyPushNoLimit(PushCubeEnv):
    pass
"""
    (tmp_path / "own_tasks.py").write_text(source)
    change_json(copy, lambda meta: meta["env_info"].update(env_id="MyPush-v1"))
    flags = as_flags(dataclasses.replace(copy, env_id="own_tasks:MyPush-v1", control_mode="pd_ee_delta_pos"))
    program = [sys.executable, "-m", "plumbing.make_demos", str(SCRIPT), "--out", "own.npz"]
    there = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run([*program, *flags], **there)
    assert done.returncode == 0, done.stderr
    assert len(np.load(tmp_path / "own.npz")["lengths"]) == 2
    for env_id, words in (
        ("own_tasks:MyPush-v2", "is no ManiSkill task"),
        ("no_tasks:MyPush-v1", "the module no_tasks can't be imported .*PYTHONPATH"),
        ("own_tasks:MyPushNoLimit-v1", "without a time limit: give --max-episode-steps"),
    ):
        done = subprocess.run([*program, "--env-id", env_id], **there)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert re.search(words, done.stderr)


def test_an_edited_task_asks_for_new_demonstrations(tmp_path, monkeypatch):
    file = tmp_path / "edited_tasks.py"
    file.write_text(
        "from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv\n"
        "from mani_skill.utils.registration import register_env\n"
        'register_env("Edited-v1", max_episode_steps=50)(type("Edited", (PushCubeEnv,), {}))\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = dataclasses.replace(tiny_args(tmp_path), env_id="edited_tasks:Edited-v1")
    before, recordings = cache_of(args), source_of(args.env_id)
    assert cache_of(args) == before and source_of("PushCube-v1") == ""
    file.write_text(f"{file.read_text()}# the goal lies elsewhere\n")
    assert cache_of(args) != before and source_of(args.env_id) != recordings


# --- processes ---


def test_demonstrations_do_not_depend_on_the_number_of_processes(place, monkeypatch, tmp_path):
    """Seven are in two blocks: one process makes them one after the other, two at the same time."""
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda n=processes: n)
        args = tiny_args(tmp_path / str(processes), num_demos=7, drop_idle=0.0)
        found.append(load_demos(args, script.make_env))
    assert found[0].sha256() == found[1].sha256() and len(found[0].lengths) == 7
    first = load_demos(tiny_args(place, drop_idle=0.0), script.make_env)  # four of the same
    assert np.array_equal(found[0].action[: len(first.action)], first.action)


LATER = """
import sys, time
import force_octo, plumbing.replay
from plumbing import load_demos
from conftest import tiny_args

real = plumbing.replay.make_episodes

def slowly(args, make_env, flags):
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    return real(args, make_env, flags)

if __name__ == "__main__":
    plumbing.demos.make_episodes = slowly
    args = tiny_args(force_octo.Path(sys.argv[1]), num_demos=1)
    print(load_demos(args, force_octo.make_env).sha256(), flush=True)
"""


def start(folder: Path, seconds: float, source: str = LATER) -> subprocess.Popen:
    path = folder / "later.py"
    path.write_text(source)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, str(path), str(folder), str(seconds)]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_process_makes_them_and_others_wait(tmp_path):
    first = start(tmp_path, 60.0)
    assert first.stdout.readline() == "making\n"
    second = start(tmp_path, 0.0)
    words = second.stderr.readline()
    assert words.startswith("another process makes demonstrations in ") and "waiting" in words
    first.kill()  # the system lets go of its lock
    out, errors = second.communicate()
    first.communicate()
    assert second.returncode == 0 and out.splitlines()[0] == "making", errors
    third = start(tmp_path, 0.0)
    assert third.communicate()[0] == out.splitlines()[1] + "\n"  # made once


def children(pid: int) -> set[int]:
    """Processes below `pid`, but for Python's own that counts semaphores."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            helper = "resource_tracker" in (path / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == pid and not helper:
            found |= {int(path.name)} | children(int(path.name))
    return found


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.1)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_program(ending, tmp_path):
    flags = as_flags(tiny_args(tmp_path, num_demos=200))
    program = subprocess.Popen([sys.executable, str(SCRIPT), *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    done = tmp_path / "demos/PushCube-v1-panda-10hz"
    wait_until(lambda: list(done.glob("*.h5")))
    workers = children(program.pid)
    assert workers
    program.send_signal(ending)
    _, errors = program.communicate()
    wait_until(lambda: all(map(gone, workers)))
    assert program.returncode == (-9 if ending == signal.SIGKILL else 128 + ending)
    assert "Traceback" not in errors


def test_a_dead_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing.replay, "plan_and_observe", die)
    with pytest.raises(UserError, match="process that makes demonstrations has died") as caught:
        load_demos(tiny_args(tmp_path), script.make_env)
    assert "\n" not in str(caught.value) and not multiprocessing.active_children()


def die(*_):
    ctypes.string_at(0)


def test_a_planner_that_fails_is_said_with_what_it_raised(place, inline, monkeypatch, tmp_path):
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    tried = []

    def solve(env, seed, debug, vis):
        tried.append(seed)
        raise RuntimeError(f"no way from {seed}")

    monkeypatch.setitem(MP_SOLUTIONS, "PushCube-v1", solve)
    monkeypatch.setattr(plumbing.replay, "BLOCK", 30)
    monkeypatch.setattr(plumbing.replay, "HOPELESS", 31)
    with pytest.raises(
        UserError,
        match=r"solution fails on PushCube-v1.*--control-mode pd_ee_delta_pose.*0 of 10 succeed.*RuntimeError: no way from 29 \(test_demos.py, line \d+\)",
    ):
        load_demos(tiny_args(tmp_path, num_demos=10), script.make_env)
    assert max(tried) == 59  # and not 80: nothing has come of the first 31


# --- the cache ---


def rewrite(**changes):
    def damage(path):
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files}
        for name, change in changes.items():
            arrays[name] = change(arrays[name])
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})

    return damage


def with_nan(array):
    array = array.copy()
    array.flat[3] = np.nan
    return array


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a flipped byte": lambda path: path.write_bytes(path.read_bytes()[:900] + b"!" + path.read_bytes()[901:]),
    "no zip's end": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "a pickle": lambda path: np.save(path.open("wb"), np.array([{}], dtype=object)),
    "one array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "array missing": rewrite(steps=lambda array: None),
    "observations missing": rewrite(obs_proprio=lambda array: None),
    "fewer rows": rewrite(action=lambda array: array[:-1]),
    "other lengths": rewrite(lengths=lambda array: array + 1),
    "fewer episodes": rewrite(steps=lambda array: array[:-1]),
    "success outside": rewrite(steps=lambda array: array + 999),
    "not a number": rewrite(action=with_nan),
    "observation that isn't": rewrite(obs_proprio=with_nan),
    "words": rewrite(lengths=lambda array: array.astype(str)),
    "flat": rewrite(action=lambda array: array[:, 0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(damage, place, whole, inline, capsys, tmp_path):
    shutil.copytree(place / "demos", tmp_path / "demos")
    args = tiny_args(tmp_path, drop_idle=0.0, max_episode_steps=60)
    cache = cache_of(args)
    DAMAGES[damage](cache)

    def from_the_good_one(args, make_env, out):
        assert not out.exists()
        shutil.copy(cache_of(tiny_args(place)), out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plumbing.demos, "make", from_the_good_one)
        again = load_demos(args, script.make_env)
    said = capsys.readouterr().err
    assert again.sha256() == whole.sha256()
    assert said.startswith(f"{cache} is damaged (") and "making it again" in said and "\n" not in said.strip()


def test_a_time_limit_below_the_demonstrations_is_a_warning(place, whole, capsys):
    longest = int(whole.steps.max())
    load_demos(tiny_args(place, drop_idle=0.0, max_episode_steps=longest), script.make_env)
    assert "warning" not in capsys.readouterr().err
    load_demos(tiny_args(place, drop_idle=0.0, max_episode_steps=longest - 1), script.make_env)
    assert f"warning: --max-episode-steps {longest - 1} is short: " in capsys.readouterr().err
