"""conrft.py: losses against numbers worked out here, what an operator changes, short real runs with the planner's help."""

import dataclasses
import errno
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, differences, latest, rows, tiny_args, weights

import bc
import conrft as script
from operators.devices import Gone
from operators.interventions import Interventions
from plumbing import Demos, Run, Slots, UserError, fill, load_demos

TOY = dict(device="cpu", obs_mode="state", num_envs=1, proprio_noise=0.0, hidden_dim=24, num_critics=3, chunk_len=3,
           noise_levels=2, batch_size=8, max_episode_steps=40)  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(**changes):
    """An agent with demonstrations of random numbers, without a simulator."""
    args, g = script.Args(**TOY | changes), np.random.default_rng(0)
    obs = {"proprio": g.normal(size=(21, 5)).astype(np.float32)}
    action, length = g.uniform(-0.5, 0.5, (21, 4)).astype(np.float32), np.full(3, 6)
    demos = Demos(obs, action, length, length, "toy")
    torch.manual_seed(0)
    agent = script.Agent(args, demos)
    demo, replay = (script.ReplayBuffer(agent, args, expert=expert) for expert in (True, False))
    script.add_demonstrations(demo, demos, agent, args)
    demo.steps["feature"].normal_(generator=rng())
    return SimpleNamespace(args=args, agent=agent, demo=demo, replay=replay, rng={"batch": rng(), "update": rng()})


def draw(t):
    return script.draw(t.demo, t.replay, t.agent, t.args, t.rng)


def snapshot(module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


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


def test_cql_has_no_bound():
    """--no-calibrate: the conservative term doesn't see the returns, and no action lies below a bound."""
    losses = {}
    for calibrate in (True, False):
        for returns in (-9.0, 9.0):
            t = toy(calibrate=calibrate)
            batch = draw(t)
            batch.mc_return = torch.full((8,), returns)
            _, logs = script.critic_loss(t.agent, batch, t.args, 0.5, rng())
            losses[calibrate, returns] = logs["losses/calql"].item()
            rate = logs["calib/bound_rate"].item()
            assert rate == (returns > 0 and calibrate)
    assert losses[False, -9.0] == losses[False, 9.0] == losses[True, -9.0] < losses[True, 9.0]


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


# --- updates ---


def actor_step(t, bc_weight, q_weight, expert=None, **flags):
    """One step of the actor: the batch, the logs, and what moved; the actor is then as before."""
    batch = draw(t)
    batch.expert = batch.expert if expert is None else expert
    before, args = snapshot(t.agent), dataclasses.replace(t.args, **flags)
    optimizer = torch.optim.Adam(t.agent.actor.parameters(), lr=3e-4)
    logs = script.update_actor(t.agent, optimizer, batch, args, rng(), bc_weight, q_weight)
    changed = moved(t.agent, before)
    t.agent.load_state_dict(before)
    return batch, logs, changed


def test_actor_loss_is_the_weighted_sum_and_moves_the_actor_alone():
    t = toy()
    batch, logs, changed = actor_step(t, bc_weight=0.5, q_weight=3.0)
    assert changed and all(name.startswith("actor.") for name in changed)
    assert logs["losses/actor"].item() == pytest.approx((0.5 * logs["losses/bc"] + 3 * logs["losses/q"]).item())
    g = rng()  # the terms, from the same noise
    bc_loss = script.consistency_loss(t.agent.actor, batch.feature, batch.chunk, g, 2)
    q = t.agent.critic(batch.feature, t.agent.actor.sample(batch.feature, 1, g)[:, 0])
    assert logs["losses/bc"].item() == pytest.approx(bc_loss.mean().item(), rel=1e-5)
    assert logs["losses/q"].item() == pytest.approx(-q.mean().item(), rel=1e-4)
    _, logs, _ = actor_step(t, bc_weight=9.0, q_weight=0.0)
    assert "losses/q" not in logs and logs["losses/actor"].item() == pytest.approx(9 * logs["losses/bc"].item())


def test_bc_on_some_samples_and_with_the_one_step_error():
    t = toy()
    demo_half = dict(expert=torch.arange(8) < 3, onestep_mse=2.0)
    batch, logs, _ = actor_step(t, 1.0, 0.0, bc_demo_only=True, **demo_half)
    g = rng()
    plain = script.consistency_loss(t.agent.actor, batch.feature, batch.chunk, g, 2).detach().numpy()
    sample = t.agent.actor.sample(batch.feature, 1, g)[:, 0].detach().numpy()
    error = (((sample - batch.chunk.numpy()) / t.agent.actor.unit.numpy()) ** 2).mean(1)
    assert logs["losses/bc"].item() == pytest.approx((plain + 2 * error)[:3].mean(), rel=1e-4)
    assert logs["losses/onestep"].item() == pytest.approx(error.mean(), rel=1e-4)
    _, logs, _ = actor_step(toy(), 1.0, 0.0, **demo_half)  # the same batch, all of it imitated
    assert logs["losses/bc"].item() == pytest.approx((plain + 2 * error).mean(), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_critic_step_moves_critic_and_targets_alone(weight):
    t = toy(cql_samples=3)
    batch = draw(t)
    before = snapshot(t.agent)
    optimizer = torch.optim.Adam(t.agent.critic.parameters(), lr=3e-4)
    logs = script.update_critic(t.agent, optimizer, batch, t.args, weight, rng())
    assert {name.split(".")[0] for name in moved(t.agent, before)} == {"critic", "target_critic"}
    conservative = {"losses/calql", "calib/bound_rate"} & logs.keys()
    assert len(conservative) == (2 if weight else 0)
    total = logs["losses/td"] + (weight * logs["losses/calql"] if weight else 0)
    assert logs["losses/critic"].item() == pytest.approx(total.item())


def test_random_and_the_policy_s_actions_keep_apart(monkeypatch):
    """Which Q are bounded depends on it: n random ones, then n of pi(s) and n of pi(s')."""
    t = toy(cql_samples=3, bound_random=True)
    batch = draw(t)
    seen = []

    def judged(self, feature, chunk):
        seen.append(chunk)
        return chunk.sum(-1)[None].expand(3, *chunk.shape[:-1]) * self.critics[0].first.weight.mean()

    def calql(q_data, q_random, q_policy, mc_return, bound_random):
        assert bound_random and torch.equal(mc_return, batch.mc_return)
        scale = t.agent.critic.critics[0].first.weight.mean()
        random, policy = seen[-1][:, :3], seen[-1][:, 3:]
        assert torch.equal(q_random[0], random.sum(-1) * scale) and torch.equal(q_policy[0], policy.sum(-1) * scale)
        assert random.std() > 5 * policy.std(1).mean()  # uniform in the box; a new policy's samples lie together
        return q_data.mean(), q_data.mean()

    monkeypatch.setattr(script.EnsembleCritic, "forward", judged)
    monkeypatch.setattr(script, "calql_loss", calql)
    script.update_critic(t.agent, torch.optim.SGD(t.agent.critic.parameters(), lr=0.0), batch, t.args, 0.5, rng())
    assert seen[-1].shape == (8, 9, 12)


def test_bc_finds_the_demonstrated_action_and_the_q_loss_leaves_it():
    """What the un-normalised Q loss does: the policy goes where the critic says, however little BC has against it."""
    t = toy(chunk_len=1, hidden_dim=32)
    feature, shown = torch.zeros(64, t.agent.feature_dim), torch.tensor([[0.1, -0.1, 0.0, 0.1]]).repeat(64, 1)
    empty = torch.zeros(64)
    batch = script.Batch(feature, shown, empty, empty, feature, empty, expert=empty == 0)
    t.agent.critic.forward = lambda state, chunk: -(chunk - 0.6).square().sum(-1)[None] * 20
    optimizer = torch.optim.Adam(t.agent.actor.parameters(), lr=3e-3)
    ends = {}
    for q_weight in (0.0, 1.0):
        for i in range(250):
            script.update_actor(t.agent, optimizer, batch, t.args, rng(i), 0.5, q_weight)
        with torch.no_grad():
            ends[q_weight] = t.agent.actor.sample(feature, 1, rng())[:, 0].mean(0)
    assert (ends[0.0] - shown[0]).abs().max() < 0.08
    assert (ends[1.0] > ends[0.0] + 0.1).all()


# --- buffers ---


@pytest.mark.parametrize(
    "truncation, bootstrap, value", [("bootstrap", 0.98**3, -2.5), ("terminal", 0.0, -0.05 * (1 + 0.98 + 0.98**2))]
)
def test_time_limits_bootstrap_or_are_terminal(truncation, bootstrap, value):
    t = toy(truncation=truncation, reward="conrft")
    feature, action = torch.zeros(6, t.agent.feature_dim), np.zeros((5, 4), np.float32)
    script.add_episode(t.replay, script.Episode(feature, action, np.zeros(5, bool), False), t.agent, t.args)
    batch = t.replay.gather(torch.tensor([2]))  # the last whole chunk, which ends with the episode
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


class Leaving(Script):
    def __call__(self, t, action):
        if t == 4:
            raise Gone("the operator's gamepad was pulled out")


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


def slots_of(watched, t) -> Slots:
    return Slots(watched, t.agent, t.args, partial(script.decide, t.agent), training=True)


class FakeRun:
    """Counts episodes and steps."""

    folder = "runs/NAME"

    def __init__(self):
        self.ends = []  # a success or not, and steps

    def next_seeds(self, slots, most):
        return [len(self.ends)]

    def played(self, slots, ended):
        self.ends += [(played.success.any(), len(played.success)) for played in ended]
        return slots.steps


def test_interventions_go_to_both_buffers():
    t = toy(record_demos="x.h5", intervention="oracle")
    run, helped = FakeRun(), Interventions()

    def collect(own: dict) -> script.WatchedEnv:
        watched = script.WatchedEnv(FakeEnv(), Script(own))
        script.collect(slots_of(watched, t), t.agent, t.args, run, t.demo, t.replay, helped, most=None)
        return watched

    own = {i: t.agent.clip(np.full(4, 0.1 * i, np.float32)) for i in (0, 1, 2, 3, 5)}
    starts, demo_rows = t.demo.starts.rows, t.demo.steps.rows
    watched = collect(own)
    assert run.ends == [(True, 7)]
    assert (t.demo.starts["row"][starts:] - demo_rows).tolist() == [0, 1]  # chunks of three that are all the operator's
    assert t.replay.starts["row"].tolist() == list(range(7))  # all of the episode
    for buffer, first in ((t.demo, demo_rows), (t.replay, 0)):
        for i, action in own.items():
            np.testing.assert_array_equal(watched.env.actions[i], action)
            stored = buffer.steps["action"][first + i].numpy()
            np.testing.assert_allclose(t.agent.denormalise(stored), action, atol=1e-6)
    assert (helped.number, helped.steps, helped.recent) == (2, 5, [(5 / 7, 2)])  # two onsets
    ((seed, actions),) = helped.recorded.items()
    assert seed == watched.operator.seed and np.array_equal(actions.numpy(), np.stack(watched.env.actions))
    assert draw(t).expert.tolist() == [True] * 4 + [False] * 4

    starts = t.demo.starts.rows
    collect({})
    assert t.demo.starts.rows == starts and len(helped.recorded) == 1 and helped.recent[-1] == (0.0, 0)
    t.args.max_episode_steps = 2
    collect(own)  # cut off before its first chunk ends
    assert t.demo.starts.rows == starts and run.ends[-1] == (False, 2)


def test_a_run_without_its_operator_ends_with_a_checkpoint():
    """In the second episode, of which nothing is kept."""
    t = toy(intervention="gamepad")
    saves, helped, run = [], Interventions(), FakeRun()
    run.save = lambda: saves.append((run.ends, t.replay.starts.rows))
    watched = script.WatchedEnv(FakeEnv(), Script({}))
    slots = slots_of(watched, t)
    script.collect(slots, t.agent, t.args, run, t.demo, t.replay, helped, most=None)

    watched.operator = Leaving({})
    with pytest.raises(UserError, match="pulled out; go on with --resume runs/NAME"):
        script.collect(slots, t.agent, t.args, run, t.demo, t.replay, helped, most=None)
    assert saves == [([(True, 7)], 7)] and len(helped.recent) == 1


@pytest.mark.parametrize("own, planned", [((), True), ((0, 5), True), ((6,), False)])
def test_a_plan_past_the_end_holds_until_the_operator_acts(own, planned):
    """An episode of seven steps ends one step into a chunk of three: what was planned beyond fills the chunk up."""
    t = toy()
    watched = script.WatchedEnv(FakeEnv(), Script({i: t.agent.clip(np.full(4, 0.1, np.float32)) for i in own}))
    (played,) = slots_of(watched, t).turn([1])
    episode = script.embedded(played, t.agent)
    assert len(episode.action) == 9 and len(episode.success) == 7
    executed = np.stack(watched.executed)
    found = script.as_executed(episode, np.array(watched.taken), executed, t.agent)
    np.testing.assert_allclose(t.agent.denormalise(found.action[:7]), executed, atol=1e-6)
    np.testing.assert_array_equal(found.action[7:], episode.action[7:] if planned else episode.action[:0])
    script.add_episode(t.replay, found, t.agent, t.args)
    (last,) = t.replay.gather(torch.tensor([6])).chunk.unflatten(1, (3, 4)).numpy()
    hold = t.agent.hold_action(found.action[-1])
    np.testing.assert_array_equal(last[1:], episode.action[7:] if planned else [hold, hold])


# --- real runs ---
HELPED = dict(
    intervention="oracle", takeover_after=5, max_episode_steps=40, sft_updates=4, offline_updates=4, online_steps=60,
    utd_ratio=0.1, eval_episodes=1, eval_freq=40, run_name="helped",
)  # fmt: skip


def helped_args(place, folder, **changes):
    places = dict(runs=str(folder), record_demos=str(folder / "kept.h5"))
    return tiny_args(place, script, **HELPED | places | changes)


def interventions(folder) -> Interventions:
    return Interventions(**torch.load(latest(folder) / "training.pt", weights_only=True)["parts"]["helped"])


@pytest.fixture(scope="module")
def helped(place, tmp_path_factory):
    """A run of a policy that knows nothing, in which the planner takes over at step 5 of every episode."""
    return script.main(helped_args(place, tmp_path_factory.mktemp("helped")))


def test_the_planner_rescues_a_policy_that_knows_nothing(helped):
    summary = json.loads((helped / "summary.json").read_text())
    assert summary["interventions"] >= 1
    assert summary["planner_failures"] + summary["interventions"] == summary["episodes"]
    found = interventions(helped)
    assert len(found.recorded) >= 1  # it solved the task
    for (rate, number), actions in zip((r for r in found.recent if r[1]), found.recorded.values(), strict=False):
        assert number == 1 and rate == pytest.approx((len(actions) - 5) / len(actions))  # to the end of the episode
    names = {name for _, _, name, _ in rows(helped)}
    assert {
        "intervention/rate", "intervention/count", "intervention/planner_failures", "train/success_once",
        "train/episode_len", "losses/td", "losses/calql", "losses/bc", "losses/q", "values/q_policy",
        "eval/success_once", "buffer/size",
    } <= names  # fmt: skip


def test_recorded_interventions_are_demonstrations(helped, place, tmp_path):
    recorded = interventions(helped).recorded
    path = helped.parent / "kept.h5"
    places = dict(demo_path=str(path), num_demos=len(recorded))
    args = tiny_args(tmp_path, script, max_episode_steps=40, drop_idle=0.0, **places)
    script.validate(args)
    demos = load_demos(args, script.make_env)
    assert len(demos.lengths) == len(recorded) >= 1
    for start, length, actions in zip(demos.starts(), demos.lengths, recorded.values(), strict=True):
        np.testing.assert_allclose(demos.action[start : start + length], actions.numpy(), atol=1e-6)
    assert (demos.steps == demos.lengths).all()  # episodes end with the success
    with pytest.raises(UserError, match="kept.h5 exists"):
        script.validate(helped_args(place, helped.parent))


def test_a_run_with_help_resumed_after_a_kill_equals_an_undisturbed_one(helped, place, tmp_path, monkeypatch):
    tick, ends = Run.tick, [("online", 4)]

    class Killed(BaseException):
        pass

    def killed(self, *rest, **more):
        tick(self, *rest, **more)
        if (self.stage, self.stage_updates) in ends:
            raise Killed

    monkeypatch.setattr(Run, "tick", killed)
    with pytest.raises(Killed):
        script.main(helped_args(place, tmp_path))
    ends.clear()
    resumed = script.Args(resume=str(tmp_path / "helped"), device="cpu")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(script, "write_demonstrations", full_disk)
        script.main(resumed)
    assert differences(helped, tmp_path / "helped") == []  # the summary is there already
    assert not (tmp_path / "kept.h5").exists()
    script.main(resumed)
    assert differences(helped, tmp_path / "helped") == [] and (tmp_path / "kept.h5").exists()


def full_disk(args, episodes):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["file/x.h5", "/proc/x.h5", "n" * 300 + ".h5"])
def test_recordings_that_cannot_be_written_are_found_at_the_start(place, tmp_path):
    (tmp_path / "file").touch()
    flags = dict(intervention="oracle", record_demos=str(tmp_path / place))
    with pytest.raises(UserError, match="h5 can't be written"):
        script.main(tiny_args(tmp_path, script, **flags))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- flags ---
BAD = [
    (dict(intervention="oracle", num_envs=2), "--num-envs 1"),
    (dict(intervention="oracle", control_mode="pd_joint_pos"), "pd_ee_delta"),
    (dict(record_demos="x.h5"), "needs an --intervention"),
    (dict(intervention="oracle", record_demos="x"), "must end with .h5"),
    (dict(intervention="oracle", env_id="RollBall-v1"), "no motion planner for RollBall-v1"),
    (dict(device_speed=2.0), "--device-speed"),
    (dict(cql_weight=-1.0), "--cql-weight"),
    (dict(backbone="octo-small"), "--backbone"),
]


@pytest.mark.parametrize("flags, words", BAD, ids=str)
def test_flags_that_cannot_be(flags, words, tmp_path):
    with pytest.raises(UserError, match=words):
        script.main(tiny_args(tmp_path, script, **flags))
    assert not list(tmp_path.iterdir())


def test_defaults_by_preset_task_and_operator():
    paper, code = (fill(script.Args, script.TABLES, preset=name, tau=0.5) for name in ("paper", "code"))
    assert (paper.chunk_len, paper.cql_weight, paper.q_weight_offline, paper.truncation) == (1, 0.02, 0.1, "bootstrap")
    assert (code.cql_weight, code.q_weight_offline, code.bc_weight_online) == (0.1, 0.0, 0.1)
    assert code.bound_random and code.truncation == "terminal" and paper.tau == code.tau == 0.5
    stack = fill(script.Args, script.TABLES, env_id="StackCube-v1", obs_mode="state")
    assert (stack.online_steps, stack.num_demos, stack.num_envs, stack.proprio_noise) == (25_000, 50, 1, 0.0)
    assert fill(script.Args, script.TABLES).num_envs == 2
    assert all(fill(script.Args, script.TABLES, intervention=who).num_envs == 1 for who in ("oracle", "gamepad"))


def test_starting_from_bc_and_with_a_fresh_head(place, tmp_path, monkeypatch):
    """--sft-checkpoint gives the same policy, evaluated alike; --fresh-head keeps its backbone alone."""
    start = bc.main(tiny_args(place, bc, runs=str(tmp_path), run_name="bc"))
    seen, enter = {}, Run.enter

    def watched(self, stage):
        seen[self.args.run_name, stage] = snapshot(self.agent)
        return enter(self, stage)

    monkeypatch.setattr(Run, "enter", watched)
    places = dict(runs=str(tmp_path), sft_checkpoint=str(start))
    args = tiny_args(place, script, **places, run_name="kept", online_steps=0, offline_updates=1)
    kept = script.main(args)
    script.main(dataclasses.replace(args, fresh_head=True, run_name="fresh"))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (start, kept)]
    assert summaries[0]["evaluations"][-1]["eval/return"] == summaries[1]["evaluations"][0]["eval/return"]
    trained = weights(start)
    for name, value in trained.items():
        assert torch.equal(seen["kept", "offline"][name], value), name
        same = torch.equal(seen["fresh", "offline"][name], value)
        assert same or name.startswith("actor."), name
    assert not torch.equal(seen["fresh", "offline"]["actor.out.weight"], trained["actor.out.weight"])
    with pytest.raises(UserError, match="was trained with --chunk-len 3, not 2"):
        script.main(dataclasses.replace(args, run_name="bad", chunk_len=2))
    with pytest.raises(UserError, match=r"a run of bc\.py"):
        script.main(script.Args(resume=str(start), device="cpu"))


def test_the_header_names_what_there_is():
    text = (ROOT / "conrft.py").read_text()
    for name in ("td_target", "calql_loss", "q_loss", "critic_loss", "actor_loss", "draw", "add_intervention"):
        assert name in script.__doc__ and f"\ndef {name}(" in text
