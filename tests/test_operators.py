"""operators/: the planner on real plans and on a hand that a test moves, devices on simulated events."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import conrft
from operators import devices as devices_module
from operators import planner
from operators.devices import DEVICES, Gone
from operators.planner import Oracle, stalled
from plumbing import UserError

# --- the planner ---


def test_stalled():
    still = np.zeros((6, 2, 3))
    assert stalled(still, 5, 0.02) and not stalled(still, 6, 0.02)
    one = still.copy()
    one[3:, 1, 0] = 0.03  # an object moved, the hand didn't
    assert not stalled(one, 5, 0.02) and stalled(one, 2, 0.02) and stalled(one, 5, 0.04)


@pytest.fixture
def oracle(monkeypatch):
    """An oracle without simulators: a hand that a test moves, a cube, and plans that a test gives."""
    hand, cube, plans = torch.zeros(1, 3), torch.zeros(1, 13), []
    tcp = SimpleNamespace(pose=SimpleNamespace(p=hand))
    agent = SimpleNamespace(tcp=tcp, controller=SimpleNamespace(controllers={"arm": None}))
    base = SimpleNamespace(agent=agent, get_state_dict=lambda: {"actors": {"cube": cube}})
    monkeypatch.setattr(Oracle, "__init__", lambda self: None)
    monkeypatch.setattr(Oracle, "towards", lambda self, arm, target, g: np.append(target - hand[0].numpy(), g))
    monkeypatch.setattr(Oracle, "plan", lambda self, state: plans.pop(0))
    monkeypatch.setattr(planner, "PATIENCE", 3)
    monkeypatch.setattr(planner, "PROGRESS", 0.1)
    operator = Oracle()
    operator.real = SimpleNamespace(envs=[SimpleNamespace(unwrapped=base)])
    operator.clip = lambda a: a.clip(-1, 1).astype(np.float32)
    operator.latest = 100
    operator.start(7)
    return SimpleNamespace(act=lambda t: operator(t, np.zeros(4)), operator=operator, hand=hand, cube=cube, plans=plans)


def test_the_oracle_takes_over_when_nothing_moves(oracle):
    for t in range(6):
        oracle.hand[0, 0] += 0.06  # 0.18 in three steps
        assert oracle.act(t) is None
    oracle.plans.append([(np.array([2.0, 0, 0]), 1.0), (np.array([0.5, 0, 0]), -1.0)])
    assert oracle.act(6) is None  # still 0.12 from where it was
    assert oracle.act(7).tolist() == [1, 0, 0, 1]  # clipped: the hand is 1.6 behind
    oracle.hand[0, 0] = 1.5
    assert oracle.act(8).tolist() == [0.5, 0, 0, 1]  # so the plan has waited
    assert oracle.act(9).tolist() == [-1, 0, 0, -1]
    oracle.operator.start(8)
    assert oracle.act(0) is None  # an episode of its own


def test_the_oracle_takes_over_after_a_time_for_the_rest_of_the_episode(oracle):
    oracle.operator.latest = 2
    oracle.plans.append([(np.zeros(3), 1.0)] * 9)
    own = []
    for t in range(10):
        oracle.cube[0, 1] += 0.06  # it isn't stalled
        own.append(oracle.act(t) is not None)
    assert own == [False] * 2 + [True] * 8


def test_the_oracle_plans_again_where_a_plan_did_not_do(oracle):
    """Ten steps past a plan's end, with the cube moving and the time not up."""
    oracle.plans += [[(np.zeros(3), 1.0)], [(np.zeros(3), -1.0)] * 9]
    own = []
    for t in range(20):
        oracle.cube[0, 1] += 0.06 * (t > 3)  # stalled until step 3, long before the time of `latest`
        own.append(oracle.act(t))
    assert [action is not None for action in own] == [False] * 3 + [True] * 17
    assert [action[3] for action in own[3:]] == [1] * 12 + [-1] * 5


def test_an_oracle_without_a_plan_leaves_the_episode_alone(oracle):
    oracle.operator.latest = 1
    oracle.plans += [None]
    assert [oracle.act(t) for t in range(6)] == [None] * 6 and oracle.operator.failed == 1


@pytest.mark.parametrize(
    "env_id, cube, high, openings", [("PickCube-v1", "cube", 0.06, 0), ("StackCube-v1", "cubeA", 0.1, 1)]
)
def test_the_planner_goes_on_with_what_the_hand_holds(env_id, cube, high, openings):
    """ManiSkill's solution would drop the lifted cube and fetch it again; a plan from here takes it to the goal."""
    args = conrft.Args(
        env_id=env_id, obs_mode="state", device="cpu", num_envs=1, intervention="oracle", takeover_after=0
    )
    conrft.validate(args)
    env = conrft.make_env(args, 1)
    operator, base = Oracle(env, args, lambda a: a.clip(-1, 1), 0), env.envs[0].unwrapped
    env.reset(seed=[0])

    def follow(done) -> tuple[np.ndarray, int]:
        """Gripper commands of a new plan, and the steps it was followed until done(success)."""
        operator.start(0)
        for t in range(90):
            success = env.step(operator(t, None)[None])[1][0] > 0
            if done(success):
                return np.array([gripper for _, gripper in operator.path]), t + 1
        raise AssertionError("it never gets there")

    whole, lifted = follow(lambda success: getattr(base, cube).pose.p[0, 2] > high)
    rest, solved = follow(lambda success: success)
    assert follow(lambda success: success)[1] == 1  # a plan of one step, the cube being where it should
    env.close()
    assert whole[0] == 1 and rest[0] == -1 and (np.diff(rest) > 0).sum() == openings
    assert lifted + solved <= len(whole) + 5 and len(rest) < len(whole) / 2


# --- devices ---


class Keys(dict):
    def __missing__(self, key):
        return 0


class PygameError(RuntimeError):
    pass


NOT_PRESSED = dict(x=0.0, y=0.0, z=0.0, roll=0.0, pitch=0.0, yaw=0.0)


@pytest.fixture
def devices(monkeypatch):
    """Stand-ins for pygame and pyspacemouse whose state a test sets."""
    now = SimpleNamespace(
        keys=Keys(), events=[], axes=[0.0] * 6, buttons=Keys(), hat=(0, 0), hats=1, sticks=1, paces=[], driver="x11",
        opened=True, reports=[], clock=100.0, broken=False,
    )  # fmt: skip

    def axis(i):
        if now.broken:
            raise PygameError("Joystick not initialized")
        return now.axes[i]

    stick = SimpleNamespace(
        get_axis=axis, get_button=lambda i: now.buttons[i], get_hat=lambda i: now.hat, get_numhats=lambda: now.hats,
        get_numaxes=lambda: len(now.axes), get_numbuttons=lambda: 8, get_name=lambda: "Pad", get_instance_id=lambda: 3,
    )  # fmt: skip
    pygame = SimpleNamespace(
        QUIT=1, KEYDOWN=2, JOYBUTTONDOWN=3, JOYDEVICEREMOVED=4, K_SPACE="space", K_LSHIFT="shift", error=PygameError,
        **{f"K_{k}": k for k in [*"wasdrfqe", "UP", "DOWN", "LEFT", "RIGHT"]},
        key=SimpleNamespace(get_pressed=lambda: now.keys),
        event=SimpleNamespace(
            get=lambda: [now.events.pop(0) for _ in range(len(now.events))],
            clear=lambda kinds: now.events.__setitem__(slice(None), [e for e in now.events if e.type not in kinds]),
        ),
        joystick=SimpleNamespace(init=lambda: None, get_count=lambda: now.sticks, Joystick=lambda i: stick),
        display=SimpleNamespace(
            init=lambda: None, quit=lambda: None, get_driver=lambda: now.driver, flip=lambda: None,
            set_mode=lambda size: SimpleNamespace(blit=lambda *_: None),
        ),
        time=SimpleNamespace(Clock=lambda: SimpleNamespace(tick=now.paces.append)),
        surfarray=SimpleNamespace(make_surface=lambda x: x), transform=SimpleNamespace(scale=lambda x, size: x),
    )  # fmt: skip

    def opened(axis_convention):
        if not now.opened:
            raise RuntimeError("No connected or supported devices found.")
        assert axis_convention == "ros"  # x forward, y left, z up
        state = SimpleNamespace(t=-1.0, buttons=[0, 0], **NOT_PRESSED)  # the package's own, which it changes in place

        def read():
            if now.broken:
                raise OSError("read error")
            if now.reports:
                vars(state).update(now.reports.pop(0), t=state.t + 1)
            return state

        return SimpleNamespace(read=read, close=lambda: None)

    monkeypatch.setitem(sys.modules, "pygame", pygame)
    monkeypatch.setitem(sys.modules, "pyspacemouse", SimpleNamespace(open=opened))
    monkeypatch.setattr(devices_module.time, "monotonic", lambda: now.clock)
    return now


def flags(kind):
    return SimpleNamespace(device_speed=0.5, control_freq=10, intervention=kind)


def device(kind, actions=4):
    env = SimpleNamespace(call=lambda name: [np.zeros((8, 8, 3), np.uint8)])
    operator = DEVICES[kind](env, flags(kind), lambda a: a)
    operator.start(0)
    return lambda gripper=1.0: operator(0, np.append(np.full(actions - 1, 0.7), gripper).astype(np.float32))


def test_keys_pressed_before_an_episode_do_not_count(devices):
    """Such as during an evaluation. A window that was closed meanwhile does, and a gamepad that was pulled out."""
    devices.events = [SimpleNamespace(type=2, key="space"), SimpleNamespace(type=3, button=0)]
    assert device("keyboard")() is None and device("gamepad")() is None
    for kind, event in (("keyboard", dict(type=1)), ("gamepad", dict(type=4, instance_id=3))):
        devices.events = [SimpleNamespace(**event)]
        with pytest.raises(Gone):
            device(kind)()


def test_keyboard(devices):
    act = device("keyboard")
    assert act() is None and devices.paces == [10]  # nothing pressed: the policy acts, at the robot's pace
    x, y, z = np.eye(3) / 2
    for key, motion in dict(w=x, s=-x, a=y, d=-y, r=z, f=-z).items():
        devices.keys = Keys({key: 1})
        assert act().tolist() == [*motion, 1.0]
    devices.keys = Keys(q=1)
    assert act() is None  # this controller doesn't turn
    devices.events = [SimpleNamespace(type=2, key="space")]
    assert act()[-1] == -1 and act(-0.8) is None  # toggled, until he lets go
    devices.keys = Keys(shift=1)
    assert act(-0.8).tolist() == [0, 0, 0, -1]  # holds still, with the policy's gripper
    devices.events = [SimpleNamespace(type=1)]
    with pytest.raises(Gone, match="window was closed"):
        act()


def test_gamepad(devices):
    act = device("gamepad", actions=7)
    devices.axes = [0.05, -0.08, 0, 0, 0.02, 0]
    assert act() is None  # within the dead zone
    devices.axes = [0.4, -1.0, 0, 0, 0.6, 0]
    np.testing.assert_allclose(act(), [0.5, -0.2, -0.3, 0, 0, 0, 1], rtol=1e-6)
    devices.axes, devices.events = [0.0] * 6, [SimpleNamespace(type=3, button=0)]
    assert act()[-1] == -1  # a button alone is an intervention too
    devices.buttons = Keys({5: 1})
    assert act().tolist() == [0, 0, 0, 0, 0, 0, -1]  # the same intervention goes on
    devices.events = [SimpleNamespace(type=4, instance_id=2)]
    assert act() is not None  # another one was pulled out
    devices.broken = True
    with pytest.raises(Gone, match="can't be read any more.*not initialized"):
        act()


def test_a_gamepad_that_will_not_do_is_found_at_the_start(devices):
    devices.axes = [0.0, 0.0]
    with pytest.raises(UserError, match="Pad has 2 axes and 8 buttons, and 5 and 6"):
        DEVICES["gamepad"].check(flags("gamepad"))
    devices.sticks = 0
    with pytest.raises(UserError, match="no gamepad found"):
        DEVICES["gamepad"].check(flags("gamepad"))


def report(buttons=(0, 0), **axes):
    return NOT_PRESSED | axes | dict(buttons=list(buttons))


def test_spacemouse(devices):
    act = device("spacemouse")

    def send(**last):  # the last of the reports since the last step
        devices.reports = [report(x=1.0, y=-1.0), report(z=1.0), report(**last)]

    send()
    assert act() is None
    send(x=0.4, y=-0.2, z=-1.0)
    np.testing.assert_allclose(act(), [0.2, -0.1, -0.5, 1], rtol=1e-6)
    send(z=0.5, buttons=(1, 0))
    assert act()[-1] == -1 and act()[-1] == -1  # pressed once, not once a step
    send(buttons=(0, 1))
    assert act().tolist() == [0, 0, 0, -1]
    devices.broken = True
    with pytest.raises(Gone, match="read error"):
        act()
    devices.broken, devices.opened = False, False
    with pytest.raises(UserError, match="No connected.*udev"):
        DEVICES["spacemouse"].check(flags("spacemouse"))


def test_a_spacemouse_whose_reports_stop_counts_as_centred(devices):
    devices.reports = [report(x=1.0)]
    act = device("spacemouse")
    assert act() is None  # it was pushed before the episode
    devices.reports = [report(x=1.0)]
    assert act()[0] == 0.5
    devices.clock += 0.15
    assert act()[0] == 0.5
    devices.clock += 0.1
    assert act() is None
    devices.reports = [report(x=1.0)]
    assert act()[0] == 0.5


TURNS = {
    "keyboard": [dict(keys=Keys({key: 1})) for key in ("RIGHT", "UP", "q")],
    "gamepad": [dict(hat=(1, 0)), dict(hat=(0, 1)), dict(axes=[0, 0, 0, -1.0, 0])],  # the stick to the left
    "spacemouse": [dict(reports=[report(**{axis: 1.0})]) for axis in ("roll", "pitch", "yaw")],
}


def test_the_hand_turns_as_the_person_does(devices):
    """Real ManiSkill: right-handed turns about forward, left and up."""
    args = conrft.Args(
        env_id="PushCube-v1", obs_mode="state", device="cpu", num_envs=1, control_mode="pd_ee_delta_pose"
    )
    conrft.validate(args)
    env = conrft.make_env(args, 1)

    def turned(action) -> np.ndarray:
        env.reset(seed=[0])
        tcp = env.envs[0].unwrapped.agent.tcp
        before = tcp.pose.sp
        for _ in range(3):
            env.step(action[None])
        return Rotation.from_quat(np.roll((tcp.pose.sp * before.inv()).q, -1)).as_rotvec()

    known = []
    for kind, presses in TURNS.items():
        act = device(kind, actions=7)
        for axis, press in enumerate(presses):
            vars(devices).update(press)
            action = act()
            assert np.count_nonzero(action[:6]) == 1 and action[6] == 1
            if kind == "keyboard":
                known.append(action)
                turn = turned(action)
                assert turn[axis] > 0.05 and np.abs(np.delete(turn, axis)).max() < 0.01, axis
            np.testing.assert_array_equal(action, known[axis])  # the others do what the keyboard does
            vars(devices).update(keys=Keys(), hat=(0, 0), axes=[0.0] * 6)
    env.close()


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("driver", ["offscreen", "dummy"])
def test_without_a_display_there_is_no_operator(kind, driver, devices):
    """SDL has drivers that draw for nobody, and takes one of them where it finds no display."""
    devices.driver = driver
    with pytest.raises(UserError, match=f"--intervention {kind} needs a display"):
        DEVICES[kind].check(flags(kind))


def test_a_line_shows_at_the_start_what_the_device_says(devices, capsys):
    devices.axes = [0.0, -0.5, 0, 0, 0, 0]
    DEVICES["gamepad"].check(flags("gamepad"))
    lines = capsys.readouterr().err.split("\r")
    assert len(lines) == 31 and "forward +0.5" in lines[-1] and lines[-1].endswith("\n")
    assert len(devices.paces) == 30  # three seconds
    devices.events = [SimpleNamespace(type=1)]
    with pytest.raises(Gone):
        DEVICES["gamepad"].check(flags("gamepad"))


@pytest.mark.parametrize(
    "kind, package", [("keyboard", "pygame"), ("gamepad", "pygame"), ("spacemouse", "pyspacemouse")]
)
def test_a_missing_package_is_one_clear_line(kind, package, devices, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install '?{package}"):
        DEVICES[kind].check(flags(kind))
