"""Episodes side by side: the same for any number of slots, updates that keep up with the steps, and runs that resume."""

import dataclasses
import importlib
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Inline, differences, tiny_args
from fake_envs import FakeEnvs
from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

from backbones.units import gaussian
from plumbing import ObsWrapper, Run, Slots, stop
from plumbing.record import Watched

ONLINE = ("conrft", "force_octo", "force_pi0")
MANY = (1, 8, 64)


class Player:
    """A policy whose rows know nothing of each other: noise, and what it sees."""

    H, window, feature_dim, action_dim = 3, 2, 6, 4
    relative, gripper = True, False

    def feature(self, obs):
        return torch.as_tensor(obs["proprio"])[:, :6].float()

    def act(self, feature, noise, push=0.0):
        drawn = gaussian((len(feature), self.H, 4), feature, noise) + push
        return (0.3 * drawn + 0.1 * feature[:, None, :4]).clamp(-1, 1).numpy()

    def denormalise(self, action):
        return 2 * action

    def normalise(self, action):
        return action / 2

    def hold_action(self, last):
        return 0 * last


def flags(num_envs: int, **changes):
    return SimpleNamespace(num_envs=num_envs, max_episode_steps=11, **changes)


def slots_of(env, num_envs: int, training: bool = True, player=None, **more) -> Slots:
    player = player or Player()
    return Slots(
        env, player, flags(num_envs), lambda obs, noise: player.act(player.feature(obs), noise), training, **more
    )


def played(slots: Slots, seeds: range) -> dict:
    """All episodes of these seeds."""
    coming, found = iter(seeds), []
    while len(found) < len(seeds):
        found += slots.turn(coming)
    assert not slots.busy
    return {episode.seed: episode for episode in found}


def assert_same(one: dict, other: dict) -> None:
    assert sorted(one) == sorted(other)
    for seed, episode in one.items():
        same = other[seed]
        assert torch.equal(episode.obs["proprio"], same.obs["proprio"]), seed
        assert np.array_equal(episode.action, same.action), seed
        assert np.array_equal(episode.success, same.success) and episode.terminated == same.terminated, seed


# --- episodes ---
@pytest.mark.parametrize("tensors", [False, True], ids=["arrays", "tensors"])
@pytest.mark.parametrize("many", [2, 8, 64])
def test_episodes_are_the_same_side_by_side(many, tensors):
    seeds = range(100, 150)
    alone = played(slots_of(FakeEnvs(1), 1), seeds)
    assert_same(alone, played(slots_of(FakeEnvs(many, tensors=tensors), many), seeds))
    ends = [(len(e.success), e.success.any(), e.terminated) for e in alone.values()]
    assert {(11, False, False), (4, False, True)} < set(ends) and len(set(ends)) > 5
    assert len({episode.action.tobytes() for episode in alone.values()}) == 50  # each has noise of its own


def test_episodes_of_the_simulator_are_the_same_side_by_side(place):
    """Partial resets of real environments: nothing of an earlier episode, or of a neighbour, stays."""
    script = importlib.import_module("force_octo")
    args, seeds = tiny_args(place), range(20, 29)
    never = gym.vector.AutoresetMode.DISABLED
    make = [lambda: CPUGymWrapper(script.make_maniskill(args))] * 8
    eight, one = gym.vector.SyncVectorEnv(make, autoreset_mode=never), script.make_env(args, 1)
    player = Player()
    player.denormalise = lambda action: np.sign(action)  # far enough to differ
    alone = played(slots_of(one, 1, player=player), seeds)
    assert_same(alone, played(slots_of(eight, 8, player=player), seeds))
    assert len({episode.obs["proprio"].numpy().tobytes() for episode in alone.values()}) == len(seeds)
    one.close()
    eight.close()


def test_a_free_slot_takes_the_next_seed_while_the_others_go_on():
    env = FakeEnvs(4)
    slots = slots_of(env, 4)
    episodes = played(slots, range(40, 60))
    assert env.resets[0] == [40, 41, 42, 43] and sum(env.resets, []) == list(range(40, 60))
    assert max(map(len, env.resets[1:])) < 4
    steps = sum(len(episode.success) for episode in episodes.values())
    assert env.steps < 11 * 20 / 4 and steps / (4 * env.steps) > 0.6


def test_steps_are_counted_where_episodes_run():
    slots = slots_of(FakeEnvs(8), 8)
    steps, coming, episodes = 0, iter(range(20)), []
    for _ in range(3):
        episodes += slots.turn(coming)
        steps += slots.steps
        assert steps == sum(len(e.success) for e in episodes) + slots.length[slots.running].sum()
    while slots.busy:
        episodes += slots.turn(())  # no new ones
        steps += slots.steps
    assert steps == sum(len(e.success) for e in episodes)
    assert slots.turn(()) == [] and slots.steps == 0


def test_a_single_environment_plays_whole_episodes():
    slots = slots_of(FakeEnvs(1), 1)
    for seed in range(5):
        (episode,) = slots.turn([seed])
        assert episode.seed == seed and not slots.busy and slots.steps == len(episode.success)


def test_what_was_seen_is_what_the_policy_looks_back_at():
    """With a window of two steps: the step before, which isn't real at the start of an episode."""
    looks, player = [], Player()

    def act(obs, noise):
        looks.append(obs)
        return player.act(player.feature(obs), noise)

    env = FakeEnvs(3)
    env.seen = lambda: {"proprio": env.state.copy(), "primary": np.uint8(env.seed * 12 + env.t)[:, None, None, None]}
    slots = Slots(env, player, flags(3), act, training=True)
    for episode in played(slots, range(12)).values():
        (batch,) = episode.batches(2)
        T = len(episode.success)
        assert batch["real"].tolist() == [[False, True]] + [[True, True]] * T
        marks = [episode.seed * 12 + t for t in range(T + 1)]
        assert batch["primary"].flatten(1).tolist() == [[marks[0]] * 2] + [[a, b] for a, b in zip(marks, marks[1:])]
    for obs in looks:
        before, now = obs["primary"].flatten(1).T
        assert torch.equal(obs["real"], torch.stack([now % 12 > 0, now >= 0], 1))
        assert torch.equal(now - before, (now % 12 > 0).to(now.dtype))


@pytest.mark.parametrize("many", [2, 5, 64])
def test_evaluation_does_not_depend_on_how_many_go_on_side_by_side(many):
    seeds = range(7, 30)
    for whole in (True, False):
        alone = slots_of(FakeEnvs(1), 1, training=False, whole=whole).successes(seeds)
        other = slots_of(FakeEnvs(many), many, training=False, whole=whole).successes(seeds)
        assert len(alone) == 23 and all(map(np.array_equal, alone, other))
        assert {len(success) for success in alone} == {11} if whole else len({len(s) for s in alone}) > 4


def test_noise_is_of_an_episode():
    def rows(*seeds):
        return gaussian((len(seeds), 4, 2), torch.zeros(1), [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(rows(1, 2, 3)[1:], rows(2, 3)) and not torch.equal(rows(1), rows(2))
    assert torch.equal(rows(5)[0], torch.randn(4, 2, generator=torch.Generator().manual_seed(5)))


def test_successes_are_recorded_from_where_their_episodes_begin():
    watched, player = Watched(FakeEnvs(3), limit=11), Player()
    slots_of(watched, 3, training=False, whole=False, player=player).successes(range(20))
    wins = [seed for seed in range(20) if seed % 5 < 3]
    assert sorted(watched.found) == wins
    alone = played(slots_of(FakeEnvs(1), 1, player=player), range(20))
    for seed in wins:
        T = 3 + seed % 8
        np.testing.assert_array_equal(watched.found[seed], 2 * alone[seed].action[:T])


# --- a batch on the GPU, as far as that can be seen without one ---
class FakeBatch(gym.Env):
    """What ObsWrapper needs of ManiSkill's batch: observations and flags as tensors, episodes drawn from one seed."""

    device, num_envs, obs_mode, _obs_mode = torch.device("cpu"), 3, "rgb", "rgb"

    def __init__(self):
        self.state = torch.zeros(3, 2)
        self._init_raw_obs = self.raw()
        self.drawn = 0

    def update_obs_space(self, obs):
        pass

    def raw(self):
        if self._obs_mode == "none":
            return {}
        self.drawn += 1
        image = self.state[:, :1, None, None].repeat(1, 2, 2, 3).byte()
        return {"agent": {"qpos": self.state.clone()}, "extra": {}, "sensor_data": {"base": {"rgb": image}}}

    def reset(self, *, seed=None, options=None):
        where = options["env_idx"]
        assert len(seed) == self.num_envs
        self.state[where] = torch.rand((len(where), 2), generator=torch.Generator().manual_seed(seed[0]))
        return self.raw(), {}

    def step(self, action):
        self.state = self.state + torch.as_tensor(action)
        done = self.state[:, 0] > 2
        return self.raw(), None, done, None, {"success": done}

    drawn = 0


def test_a_batch_stays_tensors_and_each_seed_decides_its_episode():
    batch = FakeBatch()
    env = ObsWrapper(batch)
    batch.drawn = 0
    first, _ = env.reset(seed=[5, 6, 7], options={"every": 1})
    assert {name: type(value) for name, value in first.items()} == {"proprio": torch.Tensor, "primary": torch.Tensor}
    assert batch.drawn == 1  # one look at three episodes
    swapped, _ = ObsWrapper(FakeBatch()).reset(seed=[7, 5, 6], options={"every": 1})
    assert torch.equal(first["proprio"][[2, 0, 1]], swapped["proprio"])
    seen, success, _, _, info = env.step(np.array([[3, 0], [0, 0], [0, 0]], np.float32))
    assert success.tolist() == [True, False, False] == info["ended"].tolist() and success.dtype == bool
    again, _ = env.reset(seed=[9, 6, 7], options={"every": 1, "reset_mask": success})
    assert torch.equal(again["proprio"][1:], first["proprio"][1:]) and (again["proprio"][0] < 1).all()


def test_slots_on_a_batch_of_tensors():
    player = Player()
    player.window = 1
    player.act = lambda feature, noise: gaussian((len(feature), 3, 2), feature, noise).numpy()
    player.feature = lambda obs: obs["proprio"]
    episodes = played(slots_of(ObsWrapper(FakeBatch()), 3, player=player), range(10))
    for seed, episode in episodes.items():
        start = torch.rand((1, 2), generator=torch.Generator().manual_seed(seed))[0]
        assert torch.equal(episode.obs["proprio"][0], start) and episode.obs["primary"].dtype == torch.uint8
        assert len(episode.obs["proprio"]) == len(episode.success) + 1
        assert episode.success[:-1].sum() == 0 and episode.success[-1] == episode.terminated


# --- whole runs ---
@pytest.fixture
def fake(monkeypatch, demos):
    """fake(script): the script with quick environments; returns the slots of its runs."""

    def install(script) -> list[Slots]:
        made = []

        class Seen(Slots):
            def __init__(self, *rest, training=False, **more):
                super().__init__(*rest, training=training, **more)
                if training:
                    made.append(self)

        width = demos.obs["proprio"].shape[1]
        monkeypatch.setattr(script, "Slots", Seen)
        monkeypatch.setattr(script, "Evaluator", Inline)
        monkeypatch.setattr(script, "make_env", lambda args, num_envs, render=False: FakeEnvs(num_envs, width))
        monkeypatch.setattr(script, "load_demos", lambda args, make_env: demos)
        return made

    return install


FEW = dict(
    sft_updates=1, sft_head_updates=1, offline_updates=1, warmup_episodes=5, warmup_updates=1, max_episode_steps=11,
    critic_updates=1, log_freq=50, utd_ratio=0.1,
)  # fmt: skip


def few_args(place, script, **changes):
    own = {field.name for field in dataclasses.fields(script.Args)}
    return tiny_args(place, script, **{name: value for name, value in FEW.items() if name in own} | changes)


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("name", ONLINE)
def test_updates_keep_up_with_control_steps(name, many, place, fake, monkeypatch, tmp_path):
    """Before any control step, those of all steps before this turn are done, and not one more."""
    script = importlib.import_module(name)
    made, behind, points = fake(script), [], []
    tick, collect, save = Run.tick, script.collect, Run.save
    utd = FEW["utd_ratio"]

    def watched_collect(slots, agent, args, run, *rest):
        if run.stage == "online":
            points.append((run.stage_env_steps, run.stage_updates))
        before = run.env_steps
        steps = collect(slots, agent, args, run, *rest)
        assert steps == run.env_steps - before and 0 < steps <= (many * agent.H if many > 1 else 11)
        return steps

    def watched_tick(self, *rest, **more):
        tick(self, *rest, **more)
        if self.stage == "online":
            behind.append(utd * self.stage_env_steps - self.stage_updates)

    def watched_save(self):
        assert not made[0].busy
        save(self)

    monkeypatch.setattr(script, "collect", watched_collect)
    monkeypatch.setattr(Run, "tick", watched_tick)
    monkeypatch.setattr(Run, "save", watched_save)
    goal = 300 if many == 1 else 900
    flags = dict(online_steps=goal, eval_freq=250, checkpoint_freq=20, num_envs=many)
    script.main(few_args(place, script, runs=str(tmp_path), **flags))
    assert len(points) > 3 and points[-1][0] > 0.7 * goal
    assert all(updates == int(utd * steps) for steps, updates in points)
    a_turn = many * 3 if many > 1 else 11
    assert -1 < min(behind) and max(behind) <= utd * a_turn + 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("many", [2, 8])
@pytest.mark.parametrize("name", ONLINE)
def test_a_run_with_many_environments_resumes_as_an_undisturbed_one(name, many, place, fake, monkeypatch, tmp_path):
    """Killed twice in stage 3 with episodes under way, then asked to end there."""
    script = importlib.import_module(name)
    made = fake(script)
    flags = dict(online_steps=600, eval_freq=250, checkpoint_freq=15, num_envs=many)
    whole = script.main(few_args(place, script, runs=str(tmp_path), run_name="whole", **flags))
    tick, ends, busy = Run.tick, [20, 41], []

    def deadly_tick(self, *rest, **more):
        tick(self, *rest, **more)
        if self.stage == "online" and self.stage_updates in ends:
            busy.append(made[-1].busy)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "tick", deadly_tick)
        args = few_args(place, script, runs=str(tmp_path), run_name="killed", **flags)
        for end in list(ends):
            with pytest.raises(Killed):
                script.main(args)
            ends.remove(end)
            args = tiny_args(place, script, resume=str(tmp_path / "killed"))

    def asking_tick(self, *rest, **more):
        tick(self, *rest, **more)
        if self.stage == "online" and made[-1].busy and not stop.asked:
            patch.setattr(stop, "asked", 15)

    with monkeypatch.context() as patch, pytest.raises(stop.Stopped):
        patch.setattr(Run, "tick", asking_tick)
        script.main(args)
    assert len(busy) == 2 and min(busy) > 0
    script.main(args)
    assert differences(whole, tmp_path / "killed") == []


def test_rounds_end_past_multiples_of_their_steps(monkeypatch):
    """Episodes overshoot a round. The next one doesn't begin later for that, or the last would be a short one."""
    script = importlib.import_module("force_octo")
    run = SimpleNamespace(stage_env_steps=0, episodes=0)
    slots = SimpleNamespace(busy=0)
    bar = SimpleNamespace(update=lambda steps: None)

    def collect(*_):
        run.stage_env_steps += 70
        run.episodes += 1
        return 70

    monkeypatch.setattr(script, "collect", collect)
    args = script.Args(round_steps=100, online_steps=400)
    ends = []
    while run.stage_env_steps < args.online_steps:
        episodes = script.collect_round(slots, None, args, run, None, None, bar)
        ends.append((run.stage_env_steps, episodes))
    assert ends == [(140, 2), (210, 1), (350, 2), (420, 1)]


def test_a_round_ends_its_episodes_before_its_updates(place, fake, monkeypatch, tmp_path):
    """FORCE's rounds: pi_old collects on and on, then all updates at once."""
    script = importlib.import_module("force_octo")
    made, updates, collect = fake(script), [], script.collect
    turns = []
    tick = Run.tick

    def watched_collect(slots, agent, args, run, *rest):
        begun = slots.env.resets
        before = len(sum(begun, []))
        steps = collect(slots, agent, args, run, *rest)
        turns.append((run.stage, run.stage_env_steps, len(sum(begun, [])) - before))
        return steps

    def watched_tick(self, *rest, **more):
        tick(self, *rest, **more)
        if self.stage == "online":
            updates.append(self.stage_env_steps)
            assert not made[0].busy

    monkeypatch.setattr(script, "collect", watched_collect)
    monkeypatch.setattr(Run, "tick", watched_tick)
    flags = dict(online_steps=600, round_steps=300, num_envs=8)
    script.main(few_args(place, script, runs=str(tmp_path), **flags))
    rounds = sorted(set(updates))
    assert len(rounds) == 2 and 300 <= rounds[0] < 300 + 8 * 11 and 600 <= rounds[1]
    online = [(steps, begun) for stage, steps, begun in turns if stage == "online"]
    of_first = [(steps, begun) for steps, begun in online if steps <= rounds[0]]
    assert sum(begun > 0 for _, begun in of_first) > 3  # again and again within the round
    before_goal = [steps for steps, _ in of_first if steps >= 300]
    assert all(begun == 0 for (steps, begun), (last, _) in zip(of_first[1:], of_first) if last >= 300)
    assert len(updates) == int(0.1 * rounds[1]) and before_goal
