"""A real arm behind make_env, against a stand-in for its server on loopback: limits, faults, stops, whole runs."""

import json
import multiprocessing
import os
import pty
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, tiny_args
from fake_franka import START, FakeFranka
from scipy.spatial.transform import Rotation

import bc
import conrft
import robots.check
import robots.classifier
import robots.release
from operators import devices
from operators.devices import Gone
from plumbing import EVAL_SEED, UserError, stop
from robots import record
from robots.config import load_config
from robots.franka_http import OPEN, FrankaEnv, connect
from robots.limits import Limits, home_pose
from robots.server import alone

pytestmark = pytest.mark.flaky(reruns=3, reruns_delay=1)  # in real time: other programs may hold a test up

TOML = """
name = "reach"
instruction = "go there"
seconds = 0.6
url = "{url}"
demonstrations = 3
[workspace]
low = [0.35, -0.10, 0.15]
high = [0.55, 0.10, 0.30]
tilt = 0.1
yaw = 0.3
speed = 0.1
[home]
position = [0.45, 0.0, 0.25]
{home}
[cameras.primary]
source = "{url}/camera"
[watch]
{watch}
"""


BEAR = "stuck = 0.0\nsilence = 0.5\ntimeout = 0.2\nfrozen = 1.0"  # a machine that others keep busy


@pytest.fixture
def fake():
    robot = FakeFranka()
    yield robot
    for env in list(OPEN.values()):
        env.close()
    robot.close()


@pytest.fixture
def place(fake, tmp_path):
    """Writes the robot's file: place(entries of [home], of [watch]) -> its path."""

    def write(home="ask = false", watch=BEAR, url=None):
        path = tmp_path / "arm.toml"
        path.write_text(TOML.format(url=url or fake.url, home=home, watch=watch))
        return path

    return write


@pytest.fixture
def keyboard(monkeypatch):
    """The terminal: keyboard("s") presses keys."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, "r"))
    yield lambda keys: os.write(ours, keys.encode())
    os.close(ours)


def flags(path, folder, script=conrft, **changes):
    own = dict(robot="franka-http", robot_config=str(path), obs_mode="rgb", control_freq=20, max_episode_steps=None)
    return tiny_args(folder, script, **own | changes)


def started(path, folder):
    """The environment, of a script's make_env, at the begin of an episode."""
    args = flags(path, folder)
    conrft.validate(args)
    env = conrft.make_env(args, args.num_envs)
    env.reset(seed=[0], options={"every": 1})
    return env


@pytest.fixture
def arm(fake, place, keyboard, tmp_path):
    return started(place(), tmp_path)


def act(x=0.0, y=0.0, z=0.0, gripper=1.0):
    return np.array([[x, y, z, gripper]], dtype=np.float32)


# --- limits ---
def test_no_action_leaves_the_workspace(place):
    """100,000 random ones, some fifty times as long as they should be, from poses that are up to the margin outside."""
    config = load_config(place())
    limits = Limits(config.workspace, config.home, 10)
    generator = np.random.default_rng(0)
    n = 50_000
    position = generator.uniform(limits.low - 0.0199, limits.high + 0.0199, (n, 3))
    lean = generator.normal(size=(n, 3)) * [1, 1, 0]
    lean *= generator.uniform(0, 0.199, (n, 1)) / np.linalg.norm(lean, axis=1, keepdims=True)
    yaw = Rotation.from_rotvec(generator.uniform(-0.3, 0.3, (n, 1)) * [0, 0, 1])
    pose = np.concatenate([position, (Rotation.from_rotvec(lean) * yaw * limits.home).as_quat()], 1)
    for size in (3, 6):
        action = generator.normal(size=(n, size)) * generator.choice([0.1, 1.0, 50.0], (n, 1))
        target = limits.target(pose, action)
        assert np.all((limits.low <= target[:, :3]) & (target[:, :3] <= limits.high)) and limits.allows(target)
        inside = np.all((limits.low <= position) & (position <= limits.high), 1)
        assert np.linalg.norm(target[inside, :3] - position[inside], axis=1).max() <= limits.step * 1.0001
        turned = (Rotation.from_quat(target[:, 3:]) * Rotation.from_quat(pose[:, 3:]).inv()).magnitude()
        assert turned[np.linalg.norm(lean, axis=1) < 0.1].max() <= limits.turn * (size == 6) * 1.01 + 1e-9
    leans, yaws = limits.angles(Rotation.from_quat(target[:, 3:]))
    assert leans.magnitude().max() > 0.0999 and np.abs(yaws).max() > 0.2999  # the edges were reached
    for i in range(20):  # one by one it is the same
        np.testing.assert_allclose(limits.target(pose[i], action[i]), target[i], atol=1e-12)


def test_a_hand_far_outside_and_an_action_that_is_no_number_are_not_commanded(place):
    config = load_config(place())
    limits = Limits(config.workspace, config.home, 10)
    home = home_pose(config.home, np.random.default_rng(0))
    for away in ([0.2, 0, 0, 0, 0, 0, 0], [0, 0, -0.13, 0, 0, 0, 0]):
        with pytest.raises(Gone, match="outside the workspace, at .* bring it inside by hand"):
            limits.target(home + away, np.zeros(3))
    leaning = np.concatenate([home[:3], (Rotation.from_rotvec([0.5, 0, 0]) * limits.home).as_quat()])
    with pytest.raises(Gone, match="0.40 rad too far"):
        limits.towards(leaning, home)
    with pytest.raises(Gone, match="isn't finite"):
        limits.target(home, np.array([0, np.nan, 0]))


def test_turns_are_maniskills(place):
    """A device's right-handed turn has the opposite sign in ManiSkill's delta poses, so it comes out right-handed."""
    config = load_config(place())
    limits = Limits(config.workspace, config.home, 10)
    home = home_pose(config.home, np.random.default_rng(0))
    target = limits.target(home, np.array([0, 0, 0, 0, 0, -1.0]))
    turn = (Rotation.from_quat(target[3:]) * Rotation.from_quat(home[3:]).inv()).as_rotvec()
    np.testing.assert_allclose(turn, [0, 0, 0.05], atol=1e-9)


# --- the interface ---
def test_the_environment_is_like_the_simulators(fake, arm):
    obs, info = arm.reset(seed=[1], options={"every": 3})
    assert info == {} and {name: (x.shape, x.dtype) for name, x in obs.items()} == {
        "proprio": ((1, 15), np.float32), "primary": ((1, 64, 64, 3), np.uint8),
    }  # fmt: skip
    np.testing.assert_allclose(obs["proprio"][0, 8:11], START[:3], atol=0.011)
    assert obs["primary"][0, 32, 32].argmax() == 0  # red, where the hand is: not blue
    before = fake.pose[:3].copy()
    for _ in range(5):
        obs, success, _, _, info = arm.step(act(x=1.0))
    assert success.shape == (1,) and not success[0] and not info["ended"][0]
    assert (
        0.012 < fake.pose[0] - before[0] < 0.026 and abs(fake.pose[1] - before[1]) < 0.002
    )  # 5 steps of 5 mm, lagging
    arm.step(act(gripper=-0.3))
    assert fake.gripper == 1.0  # too little to mean anything
    time.sleep(0.6)
    arm.step(act(gripper=-1.0))
    assert fake.gripper == 0.0
    assert arm.call("render")[0].shape == (256, 256, 3)
    assert (
        conrft.make_env(SimpleNamespace(robot="franka-http", robot_config=arm.config.path, torch_threads=1), 1) is arm
    )


def test_commands_keep_the_beat_and_late_ones_are_told(fake, arm, capsys):
    fake.calls.clear()
    for _ in range(20):
        arm.step(act(y=0.1))
        time.sleep(0.015)  # the policy thinks
    gaps = np.diff([when for when, route, _ in fake.calls if route == "pose"])
    assert np.median(gaps) == pytest.approx(0.05, abs=0.004)
    time.sleep(0.1)
    arm.step(act())
    arm.reset(seed=[0])
    told = re.search(r"warning: .* that came late: (\d+), by up to 0\.(\d+) s", capsys.readouterr().err)
    assert told and int(told[2]) >= 5


def test_keys_end_an_episode(arm, keyboard):
    keyboard("s")
    _, success, _, _, info = arm.step(act())
    assert success[0] and info["ended"][0]
    assert arm.step(act())[1][0]  # it stays one, to the episode's end
    arm.reset(seed=[0])
    keyboard("f")
    _, success, _, _, info = arm.step(act())
    assert not success[0] and info["ended"][0]


def test_an_episode_waits_for_whoever_lays_out_the_scene(fake, place, keyboard, tmp_path, capsys):
    env = connect(flags(place(home="random_xy = 0.05\nask = true"), tmp_path))
    reached = []
    for early in ("\n", ""):  # Enter before the question is no answer to it
        keyboard(early)
        later = threading.Timer(1.0, keyboard, "\n")
        later.start()
        start = time.monotonic()
        env.reset(seed=[7])
        assert time.monotonic() - start > 0.9
        reached.append(fake.pose[:2].copy())
    assert capsys.readouterr().err.count("then press Enter") == 2
    np.testing.assert_allclose(*reached, atol=0.012)  # the seed decides where home is
    assert np.abs(reached[0] - [0.45, 0.0]).max() > 0.012


# --- stops ---
def still_after(fake, moment: float) -> bool:
    time.sleep(0.2)
    positions = np.array([position for when, position in fake.path if when > moment])
    return bool(np.ptp(positions, axis=0).max() < 0.001)


def test_a_silent_server_stops_the_arm_within_three_tenths_of_a_second(fake, place, keyboard, tmp_path):
    arm = started(place(watch="stuck = 0.0"), tmp_path)
    for _ in range(4):
        arm.step(act(x=1.0))
    fake.open.clear()
    silent = time.monotonic()
    with pytest.raises(Gone, match="emergency stop: no valid answer of the server for 0.25 s"):
        for _ in range(20):
            arm.step(act(x=1.0))
    assert time.monotonic() - silent < 0.4
    assert still_after(fake, silent + 0.3)
    told = len(fake.poses())
    fake.open.set()  # what lay in the server's queue comes through now: a step at most
    time.sleep(0.4)
    late = fake.poses()[told:]
    assert len(late) and np.all(np.linalg.norm(late[:, :3] - fake.pose[:3], axis=1) < 0.006)
    assert still_after(fake, time.monotonic())
    for call in (lambda: arm.step(act()), lambda: arm.reset(seed=[0])):
        with pytest.raises(Gone, match="python -m robots.release"):
            call()


def test_the_emergency_stop_holds_until_it_is_released_by_hand(fake, arm, keyboard, tmp_path, monkeypatch, capsys):
    arm.step(act(x=1.0))
    keyboard(" ")
    with pytest.raises(Gone, match="emergency stop: the space bar"):
        arm.step(act(x=1.0))
    assert still_after(fake, time.monotonic())
    path = arm.config.path
    arm.close()
    with pytest.raises(Gone, match="the space bar"):  # as in the next program
        connect(flags(path, tmp_path))
    for word in ("yes", "release"):
        monkeypatch.setattr("builtins.input", lambda text, word=word: word)
        if word == "yes":
            with pytest.raises(UserError, match="goes on"):
                robots.release.main(SimpleNamespace(config=str(path)))
        else:
            robots.release.main(SimpleNamespace(config=str(path)))
    assert "space bar" in capsys.readouterr().out and not path.with_suffix(".stopped").exists()
    connect(flags(path, tmp_path)).close()


def test_an_arm_that_rested_for_long_is_not_stuck(place, keyboard, tmp_path):
    env = started(place(watch=BEAR.replace("stuck = 0.0", "stuck = 0.5")), tmp_path)
    for _ in range(8):
        env.step(act(y=-1.0))
    time.sleep(0.8)  # updates
    env.reset(seed=[0])
    env.step(act(y=1.0))


def test_a_stuck_arm_is_stopped(fake, place, keyboard, tmp_path):
    env = connect(flags(place(watch=BEAR.replace("stuck = 0.0", "stuck = 0.5")), tmp_path))
    env.reset(seed=[0])
    for _ in range(15):
        env.step(act())  # told to stay: that is no fault
    fake.stuck = True
    with pytest.raises(Gone, match="hasn't moved for 0.5 s of commands"):
        for _ in range(20):
            env.step(act(y=1.0))


def test_delays_and_lost_answers_are_borne(fake, arm):
    fake.delay, fake.drop = 0.02, 0.15
    for i in range(30):
        arm.step(act(x=(-1.0) ** i))
    assert not arm.server.halt.reason


@pytest.mark.parametrize("wrong", [
    {}, {"pose": [1, 2, 3], "q": [0] * 7, "gripper_pos": 0}, {"pose": [0.4, 0, 0.2, 0, 0, 0, 0], "q": [0] * 7, "gripper_pos": 0},
    {"pose": [float("nan")] * 7, "q": [0] * 7, "gripper_pos": 0}, "no table",
])  # fmt: skip
def test_answers_of_a_wrong_form_count_as_none(fake, arm, wrong):
    fake.wrong = wrong
    with pytest.raises(Gone, match=r"no valid answer .* for 0.5 s \((/getstate|JSON)"):
        for _ in range(20):
            arm.step(act(x=1.0))


def test_a_camera_that_freezes_stops_the_arm(fake, arm):
    fake.shutter.clear()
    with pytest.raises(Gone, match="emergency stop: camera primary has delivered no picture for 1.0"):
        for _ in range(40):
            arm.step(act())


def test_no_command_leaves_the_box_on_the_wire(fake, arm):
    generator = np.random.default_rng(0)
    arm.period = 0.0  # as fast as it goes
    fake.calls.clear()
    for _ in range(500):
        arm.step(generator.normal(size=(1, 4)) * 3)
    poses = fake.poses()
    assert len(poses) >= 495 and all(arm.limits.allows(pose) for pose in poses)


def test_a_signal_ends_the_episode_at_once(arm, monkeypatch):
    monkeypatch.setattr(stop, "asked", 15)
    with pytest.raises(Gone, match="the arm holds where it is"):
        arm.step(act())


def test_one_process_drives_the_arm(arm):
    with pytest.raises(UserError, match="another process drives the robot of arm.toml"):
        alone(arm.config.path)


def test_between_episodes_silence_is_no_fault(fake, arm):
    """Updates take minutes, and the arm stands still; but the next episode begins with an answer."""
    time.sleep(0.6)
    fake.open.clear()
    time.sleep(0.8)
    assert not arm.server.halt.reason
    fake.open.set()
    arm.reset(seed=[0])
    time.sleep(0.6)
    fake.open.clear()
    time.sleep(0.6)
    with pytest.raises(Gone, match="no valid answer"):
        arm.reset(seed=[0])


# --- what is wrong is told before anything moves ---
@pytest.mark.parametrize("old, new, message", [
    ("instruction", "instructoin", "instructoin is no entry; did you mean instruction"),
    ("[0.35, -0.10, 0.15]", "[0.35, -0.10]", "three numbers"), ("[0.35, -0.10, 0.15]", "[0.65, -0.1, 0.1]", "must be below"),
    ("[0.35, -0.10, 0.15]", '"low"', "should be of type"), ("speed = 0.1", "speed = 5", "within 0..0.5"),
    ("[0.45, 0.0, 0.25]", "[0.45, 0.0, 0.5]", "home, .* within the workspace"), ("seconds = 0.6", "seconds = nan", "finite"),
    ("[cameras.primary]", "[cameras.side]", "called primary and wrist"), ("[watch]", "[watch", "can't be read"),
    ('name = "reach"', "", "name is missing"), ("[watch]", "[reward]\nkind='classifier'\n[watch]", "reward.file"),
])  # fmt: skip
def test_a_bad_file_is_one_line(place, tmp_path, keyboard, old, new, message):
    path = place()
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        connect(flags(path, tmp_path))


@pytest.mark.parametrize("change, message", [
    (dict(robot_config=None), "needs --robot-config"), (dict(obs_mode="state"), "has cameras"),
    (dict(cameras="both"), "cameras.wrist"), (dict(control_mode="pd_joint_pos"), "takes --control-mode"),
    (dict(intervention="oracle"), "no motion planner for reach"), (dict(control_freq=50), "1 to 20 commands"),
    (dict(sim_backend="physx_cuda"), "simulator's"), (dict(record_demos="x.h5"), "python -m robots.record"),
])  # fmt: skip
def test_flags_that_do_not_fit_a_robot(place, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        conrft.validate(flags(place(), tmp_path, **change))


def test_without_a_server_a_camera_or_a_terminal_there_is_no_robot(fake, place, keyboard, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="server at .* doesn't answer"):
        connect(flags(place(url="http://127.0.0.1:1"), tmp_path))
    path = place()
    text = path.read_text()
    path.write_text(text.replace(f'"{fake.url}/camera"', '"nowhere.mp4"'))
    with pytest.raises(UserError, match="nowhere.mp4 can't be opened"):
        connect(flags(path, tmp_path))
    path.write_text(text)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(UserError, match="needs a terminal"):
        connect(flags(path, tmp_path))
    monkeypatch.chdir(tmp_path)  # where pictures go
    robots.check.main(SimpleNamespace(config=str(path)))  # it let go of all of them


def test_the_check_tells_what_is_wrong(fake, place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    robots.check.main(SimpleNamespace(config=str(place())))
    out = capsys.readouterr().out
    assert "ready" in out and "160 x 120" in out and (tmp_path / "check-primary.png").exists()
    fake.pose[0] = fake.goal[0] = 0.7
    with pytest.raises(UserError, match="outside the workspace"):
        robots.check.main(SimpleNamespace(config=str(place())))
    assert len(fake.poses()) == 0


def test_the_example_file_is_a_good_one():
    assert load_config(str(ROOT / "robots/example.toml")).name == "pick-banana"


# --- whole runs ---
class Person:
    """In the place of a device: pushes the hand forward, and presses s at the fourth step."""

    press = None

    def __init__(self, env, args, clip):
        self.clip = clip

    @classmethod
    def check(cls, args):
        pass

    def start(self, seed):
        self.failed = 0

    def __call__(self, t, action):
        if t == 3:
            Person.press("s")
        return None if t > 3 else self.clip(np.array([0.5, 0.1 * t, 0, 1], np.float32))

    def close(self):
        pass


RUN = dict(
    sft_updates=4, offline_updates=2, online_steps=10, eval_freq=5, eval_episodes=1, video_episodes=1, batch_size=4
)


@pytest.fixture
def person(monkeypatch, keyboard):
    monkeypatch.setattr(Person, "press", keyboard)
    monkeypatch.setitem(devices.DEVICES, "keyboard", Person)


@pytest.fixture
def apart():
    """The stand-in as a process of its own: training keeps this one busy. Its address."""
    words = [sys.executable, str(ROOT / "tests/fake_franka.py"), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    yield re.search(r"http://[\d.:]+", process.stdout.readline())[0]
    process.terminate()
    process.wait()


def test_conrft_trains_on_the_arm_with_an_operator(apart, fake, place, person, tmp_path, monkeypatch):
    """Without --demo-path the operator gives demonstrations first; evaluation and films are on the one arm, too."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: pytest.fail("a second process"))
    seeds = []
    args = flags(place(url=apart), tmp_path, intervention="keyboard", run_name="arm", **RUN)
    reset = FrankaEnv.reset

    def watched(self, seed, options=None):
        seeds.extend(seed)
        return reset(self, seed=seed)

    monkeypatch.setattr(FrankaEnv, "reset", watched)
    folder = conrft.main(args)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["env_id"] == "reach" and summary["interventions"] >= 2
    assert summary["demonstrations"] == "recorded on reach"
    assert seeds[:3] == [0, 1, 2] and EVAL_SEED in seeds
    assert len(list((folder / "videos").iterdir())) == 1 and not OPEN  # it is let go of
    told = np.array(requests.post(f"{apart}/told").json()["poses"])
    assert len(told) > 40 and Limits(*workspace(args)).allows(told, 1e-4)
    (path,) = (tmp_path / "demos").glob("reach-*.npz")
    demos = record.stored(path)
    assert len(demos) == 3 and all(len(demo["action"]) == demo["lengths"][0] + 1 <= 6 for demo in demos)


def workspace(args):
    config = load_config(args.robot_config)
    return config.workspace, config.home, args.control_freq


def test_other_scripts_take_recorded_demonstrations(fake, place, person, tmp_path, keyboard):
    short = dict(script=bc, updates=4, eval_episodes=1, num_demos=2)
    args = flags(place(), tmp_path, run_name="clone", **short)
    with pytest.raises(UserError, match="needs --demo-path"):
        bc.main(args)
    path = tmp_path / "own.npz"
    env = connect(args)
    recording = SimpleNamespace(control_freq=20, control_mode="pd_ee_delta_pos")
    record.record(env, Person(env, args, record.within_one), recording, path, wanted=1)
    record.record(env, Person(env, args, record.within_one), recording, path, wanted=3)  # goes on
    for wrong in (dict(image_size=32), dict(control_mode="pd_ee_delta_pose")):
        with pytest.raises(UserError, match="must be those of its recording"):
            bc.load_demos(flags(place(), tmp_path, script=bc, demo_path=str(path), **wrong), bc.make_env)
    folder = bc.main(flags(place(), tmp_path, run_name="clone2", demo_path=str(path), **short))
    assert json.loads((folder / "config.json").read_text())["args"]["env_id"] == "reach"
    with pytest.raises(UserError, match="of python -m robots.record"):
        bc.main(flags(place(), tmp_path, script=bc, demo_path="x.h5"))


def test_a_classifier_says_what_success_is(fake, place, keyboard, tmp_path):
    """Trained to see the hand to the left in the picture; then it is the reward."""
    pictures = []
    for y in np.linspace(-0.09, 0.09, 60):
        fake.goal[1] = fake.pose[1] = y
        pictures.append(fake.picture()[:, 20:140, ::-1][::2, ::2])
    pictures = np.stack(pictures)
    demos = tmp_path / "demos.npz"
    np.savez(demos, obs_primary=pictures, lengths=np.array([59]))
    torch.set_num_threads(1)
    out = tmp_path / "left.safetensors"
    robots.classifier.main(SimpleNamespace(demos=[str(demos)], last=15, apart=20, updates=30, out=str(out)))
    fake.goal[:] = fake.pose[:] = START
    reward = '[reward]\nkind = "classifier"\nfile = "left.safetensors"\nthreshold = 0.5\n'
    path = place()
    path.write_text(path.read_text() + reward)
    env = connect(flags(path, tmp_path))
    env.reset(seed=[0])
    assert not env.step(act())[1][0]
    fake.goal[1] = fake.pose[1] = 0.09
    time.sleep(0.15)
    _, success, _, _, info = env.step(act())
    assert success[0] and info["ended"][0]
