"""conrft.py: losses against numbers worked out here, operators on simulated events and real plans, short real runs."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import bc
import conrft as script

TINY = dict(
    env_id="PushCube-v1", obs_mode="state", device="cpu", num_demos=4, max_episode_steps=40, hidden_dim=24,
    num_critics=3, chunk_len=3, noise_levels=2, sft_updates=4, sft_batch_size=8, batch_size=8, offline_updates=4,
    online_steps=60, utd_ratio=0.1, eval_episodes=1, eval_freq=40, video_episodes=0, log_freq=1,
    checkpoint_freq=2,
)  # fmt: skip


def tiny_args(place, folder, **changes):
    return script.Args(**TINY | dict(demo_dir=str(place / "demos"), runs=str(folder)) | changes)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(folder) -> list[str]:
    """Rows of metrics.csv that don't depend on the clock."""
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if ",time/" not in line]


def toy_demos(images=False, T=6, episodes=3):
    """Random observations and actions; episodes of T steps that succeed at the last."""
    g, n = np.random.default_rng(0), (T + 1) * episodes
    obs = {"proprio": g.normal(size=(n, 5)).astype(np.float32)}
    if images:
        obs["primary"] = g.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    action = g.uniform(-0.5, 0.5, (n, 4)).astype(np.float32)
    return script.Demos(obs, action, np.full(episodes, T), np.full(episodes, T), "toy")


def toy_run(tmp_path, demos=None, **changes):
    """A Run without a simulator; its features are proprio alone, which is enough for the losses."""
    args = script.Args(**TINY | dict(num_envs=1, proprio_noise=0.0, torch_threads=1) | changes)
    run = script.Run(args, tmp_path, demos or toy_demos())
    run.demo.data["feature"].normal_(generator=rng())
    run.count["stage"] = "offline"
    run.make_optimizers()
    return run


def weights(module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(module, before) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


# --- losses ---


@pytest.mark.parametrize("bound_random", [False, True])
def test_calql_loss_by_hand(bound_random):
    g = np.random.default_rng(1)
    q_data, q_random, q_policy = g.normal(size=(2, 3)), g.normal(size=(2, 3, 2)), g.normal(size=(2, 3, 4))
    mc, gaps = np.array([0.4, -0.2, 9.0]), []
    for e in range(2):
        for b in range(3):
            random = [max(q, mc[b]) if bound_random else q for q in q_random[e, b]]
            entries = [*random, *(max(q, mc[b]) for q in q_policy[e, b]), q_data[e, b]]
            gaps.append(math.log(sum(map(math.exp, entries))) - math.log(7) - q_data[e, b])
    arrays = (torch.tensor(x) for x in (q_data, q_random, q_policy, mc))
    loss, rate = script.calql_loss(*arrays, bound_random)
    assert loss.item() == pytest.approx(np.mean(gaps)) and rate.item() == pytest.approx((q_policy < mc[:, None]).mean())


def test_calql_pushes_up_what_was_demonstrated():
    q = torch.zeros(1, 1, requires_grad=True)
    random, policy = (torch.full((1, 1, 1), x, requires_grad=True) for x in (0.5, -1.0))
    script.calql_loss(q, random, policy, torch.tensor([0.2]), False)[0].backward()
    total = math.exp(0.5) + math.exp(0.2) + 1  # the policy's -1 counts as its return 0.2
    assert q.grad.item() == pytest.approx(1 / total - 1) and random.grad.item() == pytest.approx(math.exp(0.5) / total)
    assert policy.grad.item() == 0


def test_td_target_and_q_loss_by_hand():
    batch = SimpleNamespace(reward=torch.tensor([0.5, 1.0, -3.0]), bootstrap=torch.tensor([0.9, 0.0, 0.9]))
    y = script.td_target(batch, torch.tensor([[2.0, 9.0, -8.0], [0.3, 8.0, 1.0]]), -5.0, 1.0)
    assert y.tolist() == pytest.approx([0.5 + 0.9 * 0.3, 1.0, -5.0])  # the last is -10.2, lower than any return
    q = torch.tensor([[1.0, -3.0], [4.0, 2.0]])
    assert script.q_loss(q, "raw").item() == -1 and script.q_loss(q, "mean-abs").item() == pytest.approx(-1 / 2.5)


def actor_step(run, demo=None, online=True, **weights_):
    """One step of the actor with these weights; returns the logs and what moved."""
    args = dataclasses.replace(run.args, **weights_)
    batch, maps, own = run.batch()
    before = weights(run.agent)
    logs = script.update_actor(
        run.agent, run.optimizers["actor"], batch, maps, own if demo is None else demo, args, online, rng()
    )
    return batch, logs, moved(run.agent, before)


def test_actor_loss_is_the_weighted_sum_and_moves_the_actor_alone(tmp_path):
    run = toy_run(tmp_path)
    start = weights(run.agent.actor)
    batch, logs, changed = actor_step(run, bc_weight_online=0.5, q_weight_online=3.0, bc_weight_offline=9.0)
    assert changed and all(name.startswith("actor.") for name in changed)
    assert logs["losses/actor"].item() == pytest.approx((0.5 * logs["losses/bc"] + 3 * logs["losses/q"]).item())
    run.agent.actor.load_state_dict(start)  # the terms, from the same noise
    g = rng()
    bc_loss = script.consistency_loss(run.agent.actor, batch.feature, batch.chunk, g, 2)
    q = run.agent.critic(batch.feature, run.agent.actor.sample(batch.feature, 1, g)[:, 0])
    assert logs["losses/bc"].item() == pytest.approx(bc_loss.mean().item(), rel=1e-5)
    assert logs["losses/q"].item() == pytest.approx(-q.mean().item(), rel=1e-4)
    _, logs, _ = actor_step(run, online=False, bc_weight_offline=9.0, q_weight_offline=0.0)
    assert "losses/q" not in logs and logs["losses/actor"].item() == pytest.approx(9 * logs["losses/bc"].item())


def test_the_forks_fixes(tmp_path):
    run = toy_run(tmp_path)
    start = weights(run.agent.actor)
    demo = torch.arange(8) < 3
    batch, logs, _ = actor_step(run, demo, bc_demo_only=True, onestep_mse=2.0, q_weight_online=0.0)
    run.agent.actor.load_state_dict(start)
    g = rng()
    plain = script.consistency_loss(run.agent.actor, batch.feature, batch.chunk, g, 2).detach().numpy()
    sample = run.agent.actor.sample(batch.feature, 1, g)[:, 0].detach().numpy()
    error = (((sample - batch.chunk.numpy()) / run.agent.actor.unit.numpy()) ** 2).mean(1)
    assert logs["losses/bc"].item() == pytest.approx((plain + 2 * error)[:3].mean(), rel=1e-4)
    _, logs, _ = actor_step(run, demo, online=False, bc_demo_only=True, q_weight_offline=0.0)
    assert logs["losses/actor"].item() == pytest.approx(logs["losses/bc"].item())


def test_critic_step_moves_critic_and_targets_alone(tmp_path):
    run = toy_run(tmp_path, cql_samples=3)
    for weight, extra in ((0.5, {"losses/calql", "calib/bound_rate"}), (0.0, set())):
        batch, maps, _ = run.batch()
        before = weights(run.agent)
        logs = script.update_critic(run.agent, run.optimizers["critic"], batch, maps, run.args, weight, rng())
        changed = moved(run.agent, before)
        assert {name.split(".")[0] for name in changed} == {"critic", "target_critic"}
        assert extra == {"losses/calql", "calib/bound_rate"} & logs.keys()
        total = logs["losses/td"] + (weight * logs["losses/calql"] if weight else 0)
        assert logs["losses/critic"].item() == pytest.approx(total.item())


def test_bc_finds_the_demonstrated_action_and_the_q_loss_leaves_it(tmp_path):
    """What the un-normalised Q loss does: the policy goes where the critic says, however little BC has against it."""
    run = toy_run(tmp_path, chunk_len=1, hidden_dim=32)
    feature, shown = torch.zeros(64, run.agent.feature_dim), torch.tensor([[0.1, -0.1, 0.0, 0.1]]).repeat(64, 1)
    empty = torch.zeros(64)
    batch = script.Batch(feature, shown, empty, empty, feature, empty, empty)
    critic = lambda state, chunk: -(chunk - 0.6).square().sum(-1)[None] * 20  # noqa: E731
    run.agent.critic.forward = critic
    ends, demo, run.args.reinforce_lr = {}, torch.ones(64, dtype=bool), 3e-3
    run.make_optimizers()
    for q_weight in (0.0, 1.0):
        args = dataclasses.replace(run.args, bc_weight_online=0.5, q_weight_online=q_weight)
        for _ in range(250):
            script.update_actor(run.agent, run.optimizers["actor"], batch, (None,), demo, args, True, rng(_))
        with torch.no_grad():
            ends[q_weight] = run.agent.actor.sample(feature, 1, rng())[:, 0].mean(0)
    assert (ends[0.0] - shown[0]).abs().max() < 0.08
    assert (ends[1.0] > ends[0.0] + 0.1).all()


# --- buffers ---


def test_time_limits_bootstrap_or_are_terminal(tmp_path):
    feature, action = torch.zeros(6, 1), np.zeros((5, 4), np.float32)
    episode = script.Episode(feature, action, np.zeros(5, bool), False)
    for truncation, bootstrap, value in (("bootstrap", 0.98**3, -2.5), ("terminal", 0.0, -0.05 * (1 + 0.98 + 0.98**2))):
        run = toy_run(tmp_path, truncation=truncation, reward="conrft")
        episode.feature = torch.zeros(6, run.agent.feature_dim)
        run.add_episode(run.replay, episode, None)
        batch = run.replay.gather(torch.tensor([2]))  # the last whole chunk, which ends with the episode
        assert batch.bootstrap.item() == pytest.approx(bootstrap) and batch.mc_return.item() == pytest.approx(value)


class Script:
    """An operator who acts at given steps."""

    failed = 0

    def __init__(self, own: dict):
        self.own = own

    def start(self, seed):
        self.seed = seed

    def __call__(self, t, action):
        return self.own.get(t)


class FakeEnv:
    """Counts steps; succeeds at step 7."""

    def reset(self, seed, options):
        self.t, self.actions = 0, []
        return {"proprio": np.zeros((1, 5), np.float32)}, {}

    def step(self, action):
        self.t += 1
        self.actions.append(action[0])
        done = np.array([self.t == 7])
        return {"proprio": np.full((1, 5), self.t / 10, np.float32)}, done, None, None, {"ended": done}


def test_interventions_go_to_both_buffers(tmp_path):
    run = toy_run(tmp_path, record_demos="x.h5", intervention="oracle")
    own = {t: run.agent.clip(np.full(4, 0.1 * t, np.float32)) for t in (0, 1, 2, 3, 5)}
    env = FakeEnv()
    run.watched = script.WatchedEnv(env, Script(own))
    starts, replayed, demo_rows = len(run.demo.starts), run.replay.rows, run.demo.rows
    assert run.collect() == 7
    assert (run.demo.starts[starts:] - demo_rows).tolist() == [0, 1]  # chunks of three that are all the operator's
    assert (run.replay.starts - replayed).tolist() == list(range(7))  # all of the episode
    for buffer, first in ((run.demo, demo_rows), (run.replay, replayed)):
        for t, action in own.items():
            np.testing.assert_array_equal(env.actions[t], action)
            stored = buffer.data["action"][first + t].numpy()
            np.testing.assert_allclose(run.agent.denormalise(stored), action, atol=1e-6)
    assert run.recent == [(1.0, 7, 5 / 7, 2)]  # two onsets
    assert run.count["interventions"] == 2 and run.count["intervention_steps"] == 5
    ((seed, actions),) = run.recorded
    assert seed == run.watched.operator.seed and np.array_equal(actions.numpy(), np.stack(env.actions))
    run.watched = script.WatchedEnv(FakeEnv(), Script({}))
    starts = len(run.demo.starts)
    run.collect()
    assert len(run.demo.starts) == starts and len(run.recorded) == 1 and run.recent[-1][2:] == (0.0, 0)
    run.watched, run.args.max_episode_steps = script.WatchedEnv(FakeEnv(), Script(own)), 2
    assert run.collect() == 2 and len(run.demo.starts) == starts  # cut off before its first chunk ends
    run.count["stage"] = "online"
    assert run.batch()[2].tolist() == [True] * 4 + [False] * 4


# --- operators ---


def test_stalled():
    still = np.zeros((6, 2, 3))
    assert script.stalled(still, 5, 0.02) and not script.stalled(still, 6, 0.02)
    one = still.copy()
    one[3:, 1, 0] = 0.03  # an object moved, the hand didn't
    assert not script.stalled(one, 5, 0.02) and script.stalled(one, 2, 0.02) and script.stalled(one, 5, 0.04)


@pytest.fixture
def oracle(monkeypatch):
    """An oracle without simulators: a hand that a test moves, a cube, and plans that a test gives."""
    hand, cube, plans = torch.zeros(1, 3), torch.zeros(1, 13), []
    agent = SimpleNamespace(
        tcp=SimpleNamespace(pose=SimpleNamespace(p=hand)), controller=SimpleNamespace(controllers={"arm": None})
    )
    base = SimpleNamespace(agent=agent, get_state_dict=lambda: {"actors": {"cube": cube}})
    monkeypatch.setattr(script.Oracle, "__init__", lambda self: None)
    monkeypatch.setattr(script.Oracle, "towards", lambda self, arm, target, g: np.append(target - hand[0].numpy(), g))
    monkeypatch.setattr(script.Oracle, "plan", lambda self, state: plans.pop(0))
    operator = script.Oracle()
    operator.real = SimpleNamespace(envs=[SimpleNamespace(unwrapped=base)])
    operator.clip = lambda a: a.clip(-1, 1).astype(np.float32)
    operator.args, operator.latest = script.Args(patience=3, progress=0.1, takeover_steps=0), 100
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


def test_the_oracle_takes_over_after_a_time_and_gives_back(oracle):
    oracle.operator.latest = 2
    oracle.operator.args.takeover_steps = 2
    oracle.operator.start(7)
    for _ in range(2):
        oracle.plans.append([(np.zeros(3), 1.0)] * 9)
    own = []
    for t in range(10):
        oracle.cube[0, 1] += 0.06  # it isn't stalled
        own.append(oracle.act(t) is not None)
    assert own == [False, False, True, True, False, False, True, True, False, False]  # patience between the tries


def test_the_oracle_acts_on_when_a_plan_did_not_do(oracle):
    """Ten steps past a plan's end it plans again, with the time and the hand moving as they are."""
    oracle.plans += [[(np.zeros(3), 1.0)], [(np.zeros(3), -1.0)] * 9]
    own = []
    for t in range(20):
        oracle.cube[0, 1] += 0.06 * (t > 3)  # stalled until step 3, long before the time of `latest`
        own.append(oracle.act(t))
    assert [a is not None for a in own] == [False] * 3 + [True] * 17 and own[-1][3] == -1
    oracle.operator.args.takeover_steps = 15  # counted from the take-over, not from the second plan
    oracle.operator.start(7)
    oracle.plans += [[(np.zeros(3), 1.0)], [(np.zeros(3), 1.0)] * 9]
    own = []
    for t in range(20):
        oracle.cube[0, 1] += 0.06 * (t > 3)
        own.append(oracle.act(t) is not None)
    assert own == [False] * 3 + [True] * 15 + [False] * 2


def test_an_oracle_without_a_plan_leaves_the_episode_alone(oracle):
    oracle.operator.latest = 1
    oracle.operator.start(7)
    oracle.plans += [None]
    assert [oracle.act(t) for t in range(6)] == [None] * 6 and oracle.operator.failed == 1


@pytest.mark.parametrize(
    "env_id, cube, high, openings", [("PickCube-v1", "cube", 0.06, 0), ("StackCube-v1", "cubeA", 0.1, 1)]
)
def test_the_planner_goes_on_with_what_the_hand_holds(env_id, cube, high, openings):
    """ManiSkill's solution would drop the lifted cube and fetch it again; a plan from here takes it to the goal."""
    args = script.Args(env_id=env_id, obs_mode="state", device="cpu", intervention="oracle", takeover_after=0)
    script.validate(args)
    env = script.make_env(args, 1)
    operator, base = script.Oracle(env, args, lambda a: a.clip(-1, 1), 0), env.envs[0].unwrapped
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


@pytest.fixture(scope="module")
def helped(place, tmp_path_factory):
    """A real run of a policy that knows nothing, in which the planner takes over at step 5 of every episode."""
    folder = tmp_path_factory.mktemp("helped")
    args = tiny_args(place, folder, intervention="oracle", takeover_after=5, run_name="whole")
    return script.main(dataclasses.replace(args, record_demos=str(folder / "kept.h5")))


def test_the_planner_rescues_a_policy_that_knows_nothing(helped):
    summary = json.loads((helped / "summary.json").read_text())
    assert (
        summary["interventions"] >= 1 and summary["planner_failures"] + summary["interventions"] == summary["episodes"]
    )
    _, state = script.load_checkpoint(helped)
    helped_episodes = [e for e in state["recent"] if e[3]]
    assert sum(e[0] for e in helped_episodes) >= 1  # it solved the task
    assert all(e[2] == pytest.approx((e[1] - 5) / e[1]) for e in helped_episodes)  # to the end of the episode
    names = {line.split(",")[2] for line in rows(helped)}
    assert {
        "intervention/rate", "intervention/count", "intervention/planner_failures", "train/success_once",
        "train/episode_len", "losses/td", "losses/calql", "losses/bc", "losses/q", "values/q_policy",
        "eval/success_once", "buffer/demo_fraction", "buffer/size",
    } <= names  # fmt: skip


def test_recorded_interventions_are_demonstrations(helped, place, tmp_path):
    _, state = script.load_checkpoint(helped)
    path = helped.parent / "kept.h5"
    args = tiny_args(place, tmp_path, demo_path=str(path), num_demos=len(state["recorded"]))
    script.validate(args)
    demos = script.load_demos(dataclasses.replace(args, demo_dir=str(tmp_path)))
    assert len(demos.lengths) == len(state["recorded"]) >= 1
    for start, length, (_, actions) in zip(demos.starts(), demos.lengths, state["recorded"], strict=True):
        np.testing.assert_allclose(demos.action[start : start + length], actions.numpy(), atol=1e-6)
    assert (demos.steps == demos.lengths).all()  # episodes end with the success
    with pytest.raises(script.UserError, match="kept.h5 exists"):
        script.validate(tiny_args(place, tmp_path, intervention="oracle", record_demos=str(path)))


def test_a_run_resumed_after_kills_equals_an_uninterrupted_one(helped, place, tmp_path, monkeypatch):
    kills, tick = [("offline", 3), ("online", 4)], script.Run.tick

    class Killed(BaseException):
        pass

    def killed(self, logs, logger):
        tick(self, logs, logger)
        if kills and kills[0] == (self.count["stage"], self.count["stage_update"]):
            raise Killed

    monkeypatch.setattr(script.Run, "tick", killed)
    args = tiny_args(place, tmp_path, intervention="oracle", takeover_after=5, run_name="killed")
    args = dataclasses.replace(args, record_demos=str(tmp_path / "kept.h5"))
    while kills:
        with pytest.raises(Killed):
            script.main(args)
        kills.pop(0)
        args = script.Args(resume=str(tmp_path / "killed"), device="cpu")
    again = script.main(args)
    assert rows(again) == rows(helped)
    (one, state), (other, own) = script.load_checkpoint(helped), script.load_checkpoint(again)
    assert all(torch.equal(one[k], other[k]) for k in one)
    for name in ("demo", "replay"):
        assert all(torch.equal(state[name][k], own[name][k]) for k in state[name])
    assert state["count"] == own["count"] and (tmp_path / "kept.h5").exists()


class Keys(dict):
    def __missing__(self, key):
        return 0


@pytest.fixture
def devices(monkeypatch):
    """Stand-ins for pygame and pyspacemouse whose state a test sets."""
    now = SimpleNamespace(keys=Keys(), events=[], axes=[0.0] * 6, buttons=Keys(), mouse=None, sticks=1, paces=[])
    stick = SimpleNamespace(get_axis=lambda i: now.axes[i], get_button=lambda i: now.buttons[i])
    pygame = SimpleNamespace(
        init=lambda: None, QUIT=1, KEYDOWN=2, JOYBUTTONDOWN=3, K_SPACE="space", K_LSHIFT="shift",
        **{f"K_{k}": k for k in "wasdrf"}, key=SimpleNamespace(get_pressed=lambda: now.keys),
        event=SimpleNamespace(
            get=lambda: [now.events.pop(0) for _ in range(len(now.events))],
            clear=lambda kinds: now.events.__setitem__(slice(None), [e for e in now.events if e.type not in kinds]),
        ),
        joystick=SimpleNamespace(get_count=lambda: now.sticks, Joystick=lambda i: stick),
        display=SimpleNamespace(set_mode=lambda size: SimpleNamespace(blit=lambda *_: None), flip=lambda: None),
        time=SimpleNamespace(Clock=lambda: SimpleNamespace(tick=now.paces.append)),
        surfarray=SimpleNamespace(make_surface=lambda x: x), transform=SimpleNamespace(scale=lambda x, size: x),
    )  # fmt: skip

    def opened(axis_convention):
        if not now.opened:
            raise RuntimeError("No connected or supported devices found.")
        assert axis_convention == "ros"  # x forward, y left, z up
        return SimpleNamespace(read=lambda: now.mouse[0] if len(now.mouse) == 1 else now.mouse.pop(0))

    monkeypatch.setitem(sys.modules, "pygame", pygame)
    monkeypatch.setitem(sys.modules, "pyspacemouse", SimpleNamespace(open=opened))
    now.opened = True
    return now


def device(kind, actions=4):
    env = SimpleNamespace(call=lambda name: [np.zeros((8, 8, 3), np.uint8)])
    operator = script.Device(env, script.Args(intervention=kind, device_speed=0.5), lambda a: a)
    operator.start(0)
    return lambda gripper=1.0: operator(0, np.append(np.full(actions - 1, 0.7), gripper).astype(np.float32))


def test_keys_pressed_before_an_episode_do_not_count(devices):
    """Such as during an evaluation. A window that was closed meanwhile does."""
    devices.events = [SimpleNamespace(type=2, key="space"), SimpleNamespace(type=3, button=0)]
    assert device("keyboard")() is None and device("gamepad")() is None
    devices.events = [SimpleNamespace(type=1)]
    with pytest.raises(KeyboardInterrupt):
        device("keyboard")()


def test_keyboard(devices):
    act = device("keyboard")
    assert act() is None and devices.paces == [10]  # nothing pressed: the policy acts, at the robot's pace
    moves = {
        "w": [0.5, 0, 0],
        "s": [-0.5, 0, 0],
        "a": [0, 0.5, 0],
        "d": [0, -0.5, 0],
        "r": [0, 0, 0.5],
        "f": [0, 0, -0.5],
    }
    for key, motion in moves.items():
        devices.keys = Keys({key: 1})
        assert act().tolist() == [*motion, 1.0]
    devices.events = [SimpleNamespace(type=2, key="space")]
    assert act()[-1] == -1 and act()[-1] == -1  # toggled, and stays
    devices.keys = Keys()
    assert act(-0.8) is None
    devices.keys = Keys(shift=1)
    assert act(-0.8).tolist() == [0, 0, 0, -1]  # holds still, with the policy's gripper
    devices.events = [SimpleNamespace(type=1)]
    with pytest.raises(KeyboardInterrupt):
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
    devices.sticks = 0
    with pytest.raises(script.UserError, match="no gamepad found"):
        device("gamepad")


def test_spacemouse(devices):
    act = device("spacemouse")

    def state(x=0.0, y=0.0, z=0.0, buttons=(0, 0)):  # the last of the reports since the last step
        old = [SimpleNamespace(x=1.0, y=-1.0, z=1.0, buttons=[0, 0], t=t) for t in (1, 2)]
        devices.mouse = [*old, SimpleNamespace(x=x, y=y, z=z, buttons=list(buttons), t=3)]

    state()
    assert act() is None
    state(x=0.4, y=-0.2, z=-1.0)
    np.testing.assert_allclose(act(), [0.2, -0.1, -0.5, 1], rtol=1e-6)
    state(z=0.5, buttons=(1, 0))
    assert act()[-1] == -1 and act()[-1] == -1  # pressed once, not once a step
    state(buttons=(0, 1))
    assert act().tolist() == [0, 0, 0, -1]
    devices.opened = False
    with pytest.raises(script.UserError, match="No connected.*udev"):
        device("spacemouse")


# --- images ---


def test_a_critic_with_its_own_eyes(tmp_path):
    """Its encoder learns from images that follow their transitions, and no image reaches the actor."""
    demos = toy_demos(images=True)
    run = toy_run(tmp_path, demos, obs_mode="rgb", image_size=32, critic_encoder="cnn")
    t = torch.tensor([0, 4])
    assert torch.equal(run.demo.data["image"][: len(demos.action)], torch.from_numpy(demos.obs["primary"]))
    assert run.demo.data["next"][t].tolist() == [3, 6]
    batch, maps, _ = run.batch()
    assert maps[0].shape == maps[1].shape == (8, 3, 32, 32) and not torch.equal(*maps)
    before = weights(run.agent)
    run.update(0.1)
    changed = moved(run.agent, before)
    for part in ("critic.encoder.layers", "critic.encoder.spatial", "critic.encoder.code", "target_critic.encoder"):
        assert any(name.startswith(part) for name in changed), part
    assert not any(name.startswith("backbone") for name in changed)
    critic = run.agent.critic
    state = critic.state(batch.feature, maps[0])
    proprio = batch.feature[:, -run.agent.proprio_dim :]
    assert state.shape == (8, 256 + 5) and torch.equal(state[:, 256:], proprio)
    other = script.ImageReplay(run.agent.feature_dim, 4, 3, 0.98)
    other.load_state_dict(run.demo.state_dict())
    assert torch.equal(other.data["image"], run.demo.data["image"][: run.demo.rows])


def test_a_frozen_resnet(tmp_path, monkeypatch):
    """Through a stand-in for torchvision, whose ResNet is one convolution."""

    class Net(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Conv2d(3, 512, 32, stride=32), torch.nn.Identity(), torch.nn.Identity())

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=SimpleNamespace(resnet18=Net)))
    net = Net()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    flags = dict(
        obs_mode="rgb", image_size=32, critic_encoder="resnet", critic_weights=str(tmp_path / "net.safetensors")
    )
    run = toy_run(tmp_path, toy_demos(images=True), **flags)
    image = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    by_hand = (net[0].weight.sum((2, 3)) @ torch.tensor(white, dtype=torch.float32) + net[0].bias).detach()
    torch.testing.assert_close(run.agent.maps(image)[0, :, 0, 0], by_hand, rtol=1e-4, atol=1e-4)
    before = weights(run.agent)
    run.update(0.0)
    changed = moved(run.agent, before)
    assert not any("trunk" in name for name in changed) and any(name.startswith("critic.encoder") for name in changed)
    save_file({"x": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(script.UserError, match="no ResNet-18 weights"):
        toy_run(tmp_path, toy_demos(images=True), **flags)
    torch.save(net.state_dict(), tmp_path / "net.safetensors")  # a pickle under that name is not opened
    with pytest.raises(script.UserError, match="no ResNet-18 weights"):
        toy_run(tmp_path, toy_demos(images=True), **flags)
    trunk = run.agent.trunk.state_dict()
    run = toy_run(tmp_path, toy_demos(images=True), eval_only="a run", **flags)  # has them in its checkpoint
    assert run.agent.trunk.state_dict().keys() == trunk.keys()


# --- flags and runs ---


BAD = [
    (dict(intervention="oracle", num_envs=2), "--num-envs 1"),
    (dict(intervention="oracle", control_mode="pd_joint_pos"), "pd_ee_delta"),
    (dict(record_demos="x.h5"), "needs an --intervention"),
    (dict(intervention="oracle", record_demos="x"), "must end with .h5"),
    (dict(critic_encoder="cnn"), "--obs-mode rgb"),
    (dict(critic_encoder="resnet", obs_mode="rgb"), "--critic-weights FILE"),
    (dict(critic_weights="x.safetensors"), "--critic-encoder resnet"),
    (dict(patience=0), "--patience"),
    (dict(intervention="oracle", env_id="RollBall-v1"), "no motion planner for RollBall-v1"),
    (dict(device_speed=2.0), "--device-speed"),
    (dict(cql_weight=-1.0), "--cql-weight"),
    (dict(backbone="octo-small"), "--backbone"),
    (dict(sft_checkpoint="nowhere"), "nowhere is no run folder"),
]


@pytest.mark.parametrize("flags, words", BAD, ids=str)
def test_flags_that_cannot_be(flags, words, tmp_path):
    with pytest.raises(script.UserError, match=words):
        script.main(tiny_args(tmp_path, tmp_path, **flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, package", [("keyboard", "pygame"), ("gamepad", "pygame"), ("spacemouse", "pyspacemouse")]
)
def test_a_missing_package_is_one_clear_line(kind, package, devices, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(script.UserError, match=f"pip install '?{package}"):
        script.main(tiny_args(tmp_path, tmp_path, intervention=kind))
    assert not list(tmp_path.iterdir())


def test_presets_and_the_defaults_that_the_scripts_share():
    paper, code = (script.parse_args(["--preset", name, "--tau", "0.5"]) for name in ("paper", "code"))
    assert (paper.chunk_len, paper.cql_weight, paper.q_weight_offline, paper.truncation) == (1, 0.02, 0.1, "bootstrap")
    assert (code.cql_weight, code.q_weight_offline, code.bc_weight_online) == (0.1, 0.0, 0.1)
    assert code.bound_random and code.truncation == "terminal" and paper.tau == code.tau == 0.5
    import force_octo

    ours, theirs = (s.Args(obs_mode="state", device="cpu") for s in (script, force_octo))
    script.validate(ours), force_octo.validate(theirs)  # which fill in what depends on the observations
    theirs = vars(theirs)
    assert {k: v for k, v in vars(ours).items() if k in theirs and v != theirs[k]} == {}


def test_starting_from_bc_and_with_a_fresh_head(place, tmp_path):
    """--sft-checkpoint gives the same policy, evaluated alike; --fresh-head keeps its backbone alone."""
    few = dict(eval_episodes=1, hidden_dim=24, chunk_len=3, num_demos=4, max_episode_steps=40, video_episodes=0)
    start = bc.main(bc.Args(env_id="PushCube-v1", obs_mode="state", device="cpu", demo_dir=str(place / "demos"),
                            runs=str(tmp_path), run_name="bc", updates=3, batch_size=8, **few))  # fmt: skip
    seen, enter = {}, script.Run.make_optimizers

    def watched(self):
        enter(self)
        seen[self.args.run_name, self.count["stage"]] = weights(self.agent)

    script.Run.make_optimizers = watched
    try:
        args = tiny_args(place, tmp_path, sft_checkpoint=str(start), run_name="kept", online_steps=0, offline_updates=1)
        kept = script.main(args)
        script.main(dataclasses.replace(args, fresh_head=True, run_name="fresh"))
    finally:
        script.Run.make_optimizers = enter
    summaries = [json.loads((f / "summary.json").read_text()) for f in (start, kept)]
    assert summaries[0]["evaluations"][-1]["eval/return"] == summaries[1]["evaluations"][0]["eval/return"]
    trained = script.load_checkpoint(start)[0]
    for name, value in trained.items():
        assert torch.equal(seen["kept", "offline"][name], value), name
        fresh = torch.equal(seen["fresh", "offline"][name], value)
        assert fresh or name.startswith("actor."), name
    assert not torch.equal(seen["fresh", "offline"]["actor.out.weight"], trained["actor.out.weight"])
    with pytest.raises(script.UserError, match="was trained with --chunk-len 3, not 2"):
        script.main(dataclasses.replace(args, run_name="bad", chunk_len=2))
    with pytest.raises(script.UserError, match=r"a run of bc\.py"):
        script.main(script.Args(resume=str(start), device="cpu"))


def test_the_header_names_what_there_is():
    text = (ROOT / "conrft.py").read_text()
    for name in ("td_target", "calql_loss", "q_loss", "update_actor", "update_critic", "WatchedEnv"):
        assert name in script.__doc__ and f" {name}(" in text.replace("class WatchedEnv:", "class WatchedEnv(")
