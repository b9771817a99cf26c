"""What is part of several algorithms stands in each script, and behaves alike: equal tensors for equal seeds and inputs.

`force_octo.py` is what the others are compared with. A deliberate difference is in the table OWN_FORM, or the probe
says how the script's own form is called so that it does the same.
"""

import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from test_layout import TREES, definitions
from torch import nn

from plumbing import Demos, Slots, fill

OWN_FORM = {  # (name, script): what differs on purpose
    ("td_target", "co_rft_chunked"): "one target for each prefix of a chunk",
    ("mc_returns", "co_rft_chunked"): "rewards start at 0, so nothing has to stand for what follows a truncation",
    ("Batch", "co_rft_chunked"): "prefixes of chunks",
    ("draw", "co_rft_chunked"): "from one data set, by its rows",
    ("ConsistencyActor__second_step", "conrft"): "one step, as in its paper",
    ("td_target__mixed", "co_rft_chunked"): "one target for each prefix of a chunk",
    ("td_target__mixed", "conrft"): "plain TD, as in its paper",
    ("calql_loss__rate", "conrft"): "of the policy's actions, not of the random ones",
    ("add_demonstrations__stay", "conrft"): "no steps past the success, no column for it",
    ("ReplayBuffer__stay", "conrft"): "no steps past the success",
    ("update_clone", "force_pi0"): "one step on the losses that it is given",
    ("warmup_cosine", "bc"): "the same up to the last bit: rounded in another order",
}
ELSEWHERE = {  # names that scripts share, and what holds their behaviour
    "Args": "test_layout.py: flags",
    "TABLES": "test_layout.py: they fit their flags",
    "LIMITS": "test_cli.py and the scripts' own tests",
    "BY_OBS_MODE": "a script's own defaults",
    "BY_TASK": "a script's own defaults",
    "BY_PRESET": "a script's own defaults",
    "PUSH": "a script's own defaults",
    "validate": "the scripts' own tests",
    "Agent": "its networks are compared; the rest is the script's own",
    "update_critic": "the scripts' own tests",
    "update_actor": "the scripts' own tests",
    "critic_loss": "the scripts' own tests",
    "actor_loss": "the scripts' own tests",
    "main": "test_resume.py and the scripts' own tests",
    "Episode": "through embedded",
    "film_policy": "test_training.py",
    "bc_loss": "chooses a head's loss; those are compared",
    "embed_demonstrations": "test_training.py",
    "update_critics": "the scripts' own tests",
    "update_online": "the scripts' own tests",
    "held_out": "the scripts' own tests",
    "collect": "test_slots.py, test_resume.py",
    "SIGMA_MIN": "through karras_sigmas", "SIGMA_MAX": "through karras_sigmas",
    "RHO": "through karras_sigmas", "NUM_SIGMAS": "through karras_sigmas",
}  # fmt: skip
UNIT = torch.tensor([0.5, 0.2, 1.0, 0.25])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FEATURE = torch.randn(6, 5, generator=rng(1))
CHUNK = torch.rand(6, 4, generator=rng(2)) * 2 - 1
Q = torch.randn(3, 6, generator=rng(3))
SUCCESS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


def seeded(cls, *args, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return cls(*args, **kwargs)


def by_name(function, **known):
    """Call a function with those of the known arguments that it has."""
    own = inspect.signature(function).parameters
    return function(**{name: value for name, value in known.items() if name in own})


OWN_COLUMNS = ("success", "first", "row", "expert")  # of those that need them


def common(columns) -> dict:
    """What every script's batches and buffers hold."""
    columns = columns if isinstance(columns, dict) else vars(columns)
    return {name: value for name, value in columns.items() if name not in OWN_COLUMNS}


def empty_buffer(s, chunk_len: int = 3, feature_dim: int = 1):
    agent = SimpleNamespace(feature_dim=feature_dim, action_dim=1, window=1)
    args = SimpleNamespace(chunk_len=chunk_len, gamma=0.9, device="cpu")
    return by_name(s.ReplayBuffer, agent=agent, args=args, obs={}, expert=True)


def held(buffer) -> list:
    """All that a buffer holds, in the form that all have."""
    return [buffer.starts["row"], common(buffer.steps.state_dict())]


# --- what is compared: functions of a script that give tensors, arrays, or numbers, by the name that they are about ---
PROBES = {}


def probe(function):
    PROBES[function.__name__] = function  # NAME__ASPECT: one more look at NAME
    return function


def about(name: str) -> str:
    return name.split("__")[0]


@probe
def karras_sigmas(s):
    return s.karras_sigmas()


@probe
def ConsistencyActor(s):
    net = seeded(s.ConsistencyActor, 5, UNIT, hidden=8)
    sigma = torch.tensor([[0.002, 0.3, 80.0]])
    noisy = CHUNK[:, None].expand(-1, 3, -1)
    return [net.state_dict(), net.denoise(FEATURE, noisy, sigma), net.sample(FEATURE, 3, rng())]


@probe
def ConsistencyActor__second_step(s):
    return seeded(s.ConsistencyActor, 5, UNIT, hidden=8).sample(FEATURE, 3, rng(), 0.4)


@probe
def QNetwork(s):
    net = seeded(s.QNetwork, 5, len(UNIT), 8)
    return [net.state_dict(), net(FEATURE, CHUNK[:, None].expand(-1, 2, -1))]


@probe
def EnsembleCritic(s):
    net = seeded(s.EnsembleCritic, 3, 5, UNIT, 8)
    return [net.state_dict(), net(FEATURE, CHUNK), net(FEATURE, CHUNK[:, None].expand(-1, 2, -1))]


@probe
def Batch(s):
    names = list(inspect.signature(s.Batch).parameters)
    shared = [name for name in names if name not in OWN_COLUMNS]
    values = dict.fromkeys(names, 0.0) | {name: float(i) for i, name in enumerate(shared)}
    one, two = (s.Batch(**{name: torch.full((2,), value + k) for name, value in values.items()}) for k in (0, 9))
    return [shared, common(one.cat(two))]


@probe
def mc_returns(s):
    reward = np.array([0.1, -0.05, 0.0, 1.0], np.float32)
    return [s.mc_returns(reward, ended, 0.9, -0.05) for ended in (True, False)]


@probe
def ReplayBuffer(s):
    buffer = filled(s)
    copy = empty_buffer(s, feature_dim=2)
    for name, table in copy.tables.items():
        table.load_state_dict(buffer.tables[name].state_dict())
    copied = copy.gather(copy.draw(20, rng()))
    return [held(buffer), common(buffer.gather(buffer.starts["row"])), common(copied)]


@probe
def ReplayBuffer__stay(s):
    return held(filled(s, stay=2))


def filled(s, **more):
    """A buffer with three episodes: recorded past the success, cut off, and of two steps."""
    buffer = empty_buffer(s, feature_dim=2)
    for length, steps, ended in ((8, 6, True), (5, 5, False), (2, 2, True)):
        episode = by_name(
            s.Episode,
            feature=torch.randn(length + 1, 2, generator=rng(length)),
            obs={},
            action=np.arange(length, dtype=np.float32)[:, None],
            success=np.arange(steps) == (steps - 1 if ended else 9),
            terminated=ended,
        )
        buffer.add(episode, s.REWARDS["conrft"], np.array([-7.0], np.float32), **more)
    return buffer


def batch(**more):
    return SimpleNamespace(reward=Q[0], bootstrap=SUCCESS * 0.9, mc_return=Q[1], **more)


@probe
def td_target(s):
    return by_name(s.td_target, batch=batch(), next_q=Q, return_mix=0.0, low=-0.5, high=1.0)


@probe
def td_target__mixed(s):
    return s.td_target(batch(), Q, 0.3, -0.5, 1.0)


@probe
def calql_loss(s):
    """ConRFT's paper bounds the policy's actions only, and its code, as the others, all."""
    sampled = torch.randn(3, 6, 4, generator=rng(5))
    parts = dict(q_sampled=sampled, q_random=sampled[..., :2], q_policy=sampled[..., 2:], bound_random=True)
    return by_name(s.calql_loss, q_data=Q, mc_return=Q[0], **parts)[0]


@probe
def calql_loss__rate(s):
    return s.calql_loss(Q, torch.randn(3, 6, 4, generator=rng(5)), Q[0])[1]


@probe
def consistency_loss(s):
    net = seeded(s.ConsistencyActor, 5, UNIT, hidden=8)
    return [s.consistency_loss(net, FEATURE, CHUNK, rng()), s.consistency_loss(net, FEATURE, CHUNK, rng(), 4)]


@probe
def mse_loss(s):
    """bc.py's is of a head in its own units, and of each sample."""
    in_units = s.mse_loss(FEATURE[:, :4] / UNIT, CHUNK / UNIT) if s.__name__ == "bc" else None
    return s.mse_loss(FEATURE[:, :4], CHUNK, UNIT) if in_units is None else in_units.mean()


@probe
def success_weighted_bc(s):
    return [s.success_weighted_bc(Q[0], SUCCESS), s.success_weighted_bc(Q[0], torch.zeros(6))]


@probe
def q_loss(s):
    plain, normalised = ("raw", "mean-abs") if "scale" in inspect.signature(s.q_loss).parameters else (False, True)
    return [s.q_loss(Q, plain), s.q_loss(Q, normalised)]


@probe
def vgpd_target(s):
    return [s.vgpd_target(Q, torch.zeros(3), 0.7, adaptive) for adaptive in (False, True)]


@probe
def self_distilled(s):
    net, critic = seeded(s.ConsistencyActor, 5, UNIT, hidden=8), seeded(s.EnsembleCritic, 3, 5, UNIT, 8)
    agent = SimpleNamespace(candidates=lambda f, args, g: net.sample(f, args.K, g, 0.4), critic=critic)
    batch = SimpleNamespace(feature=FEATURE, chunk=CHUNK)
    found = []
    for by_chance in (False, True):
        args = SimpleNamespace(K=5, temperature=1.0, temperature_adaptive=True, by_chance=by_chance)
        found.append(s.self_distilled(agent, batch, args, rng()))
    return found


@probe
def update_clone(s):
    actor = seeded(s.ConsistencyActor, 5, UNIT, hidden=8)
    agent = SimpleNamespace(
        actor=actor, perturb=lambda feature, noise, g: feature + noise * torch.randn(5, generator=g)
    )
    args = SimpleNamespace(proprio_noise=0.1, noise_levels=2)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(actor.parameters(), lr=0.1)
        logs = by_name(
            s.update_clone, agent=agent, optimizer=optimizer, feature=FEATURE, chunk=CHUNK, args=args, generator=rng()
        )
    return [{name: torch.as_tensor(value).detach() for name, value in logs.items()}, actor.state_dict()]


@probe
def descend(s):
    found = []
    for max_norm in (None, 0.5):
        net = seeded(nn.Linear, 5, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.enable_grad():
            for _ in range(2):
                norm = s.descend(optimizer, net(FEATURE).square().mean(), max_norm)
        found.append([norm, net.state_dict()])
    return found


@probe
def polyak_update(s):
    one, two = seeded(nn.Linear, 2, 3), nn.Linear(2, 3)
    s.polyak_update(one, two, 0.3)
    return [one.state_dict(), two.state_dict()]


@probe
def warmup_cosine(s):
    return [s.warmup_cosine(step, 60) for step in range(60)]


@probe
def forget(s):
    net = seeded(nn.Linear, 2, 3)
    optimizer = torch.optim.Adam(net.parameters())
    with torch.enable_grad():
        net(torch.ones(2)).sum().backward()
    optimizer.step()
    s.forget(optimizer)
    return optimizer.state_dict()["state"]


@probe
def Reward(s):
    return [s.Reward._fields]


@probe
def REWARDS(s):
    return {name: tuple(reward) for name, reward in s.REWARDS.items()}


class Env:
    """Two environments that end after other numbers of steps; they succeed when what was done sums up to enough."""

    def reset(self, seed, options):
        begun = options.get("reset_mask", np.ones(2, bool))
        if begun.all():
            self.t, self.sums = np.zeros(2, int), np.zeros(2)
        self.t[begun], self.sums[begun] = 0, (np.array(seed) % 7 / 7)[begun]
        return {"proprio": self.sums[:, None].copy()}, {}

    def step(self, action):
        self.t += 1
        self.sums = self.sums + action.sum(-1)
        success = self.sums > 1.2
        return {"proprio": self.sums[:, None].copy()}, success, None, None, {"ended": success | (self.t > 8)}


class Player:
    """A policy that goes on the more the further it is, with noise."""

    H, window, feature_dim, action_dim = 3, 1, 1, 1
    relative, gripper = True, False

    def feature(self, obs):
        return torch.as_tensor(obs["proprio"])

    def act(self, feature, generator=None, push=0.0):
        steps = torch.arange(3)[None, :, None] * 0.01
        return (feature[:, None] * 0.1 + steps + push).numpy()

    def denormalise(self, action):
        return action * 2

    def normalise(self, action):
        return action / 2

    def hold_action(self, last):
        return last * 0


PLAY = SimpleNamespace(
    max_episode_steps=10, eval_episodes=5, num_envs=2, device="cpu", eval_seed=7, reward="binary", gamma=0.9, explore_noise=0.02,
    truncation="bootstrap", eval_elsewhere=False,
)  # fmt: skip


def episodes_of(s, seeds):
    player = Player()
    slots = Slots(Env(), player, PLAY, lambda obs, noise: player.act(player.feature(obs)), training=True)
    found = []
    while len(found) < 2:
        found += slots.turn(seeds if not found else ())
    return [s.embedded(played, player) for played in found]


@probe
def decide(s):
    obs = {"proprio": np.ones((2, 1))}
    return by_name(s.decide, agent=Player(), push=0.0, obs=obs, noise=[rng(), rng()])


@probe
def rollout(s):
    """Success at each step: to the time limit, or to the first success."""
    return [s.rollout(Env(), Player(), PLAY, [3, 5, 4], whole) for whole in (True, False)]


@probe
def evaluate(s):
    return [s.evaluate(Env(), Player(), PLAY, whole) for whole in (True, False)]


@probe
def embedded(s):
    return [[e.feature, e.action, e.success, e.terminated] for e in episodes_of(s, [3, 6])]


@probe
def without_idle(s):
    args = SimpleNamespace(drop_idle=0.1)
    found = [s.without_idle(episode, Player(), args) for episode in episodes_of(s, [1, 6])]
    return [[e.feature, e.action, e.success, e.terminated] for e in found]


@probe
def add_episode(s):
    return held(played(s, [3, 6]))


def played(s, seeds):
    """A replay buffer with what came of these episodes."""
    buffer = empty_buffer(s)
    for episode in episodes_of(s, seeds):
        s.add_episode(buffer, episode, Player(), PLAY)
    return buffer


@probe
def draw(s):
    agent = SimpleNamespace(perturb=lambda feature, noise, g: feature + noise * torch.randn(feature.shape, generator=g))
    args = SimpleNamespace(batch_size=8, device="cpu", proprio_noise=0.1)
    found = []
    for policy in (empty_buffer(s), played(s, [5, 6])):
        generators = {"batch": rng(), "update": rng(1)}
        found.append(common(s.draw(played(s, [3, 4]), policy, agent, args, generators)))
    return found


def demonstrated(s, **flags):
    action = np.linspace(-0.5, 0.5, 9, dtype=np.float32)[:, None]
    success = np.array([0, 1, 1, 0, 0, 0, 1, 0, 0], bool)
    demos = Demos({}, action, np.array([4, 3]), np.array([2, 2]), "toy", success)
    buffer = empty_buffer(s)
    args = SimpleNamespace(reward="conrft", gamma=0.9, truncation="bootstrap", **flags)
    s.add_demonstrations(buffer, demos, Player(), args)
    return held(buffer)


@probe
def add_demonstrations(s):
    return demonstrated(s, stay=False)


@probe
def add_demonstrations__stay(s):
    return [demonstrated(s, stay=True), demonstrated(s, stay=False)]


@probe
def calibration(s):
    agent = SimpleNamespace(critic=seeded(s.EnsembleCritic, 3, 1, torch.ones(3), 8))
    return [s.calibration(agent, policy, PLAY) for policy in (empty_buffer(s), played(s, [3, 5]))]


@probe
def make_env(s):
    """Real ManiSkill, without cameras (they take long; what ManiSkill is asked for is compared below)."""
    flags = dict(env_id="PushCube-v1", obs_mode="state", num_envs=1, torch_threads=1)
    env = s.make_env(fill(s.Args, s.TABLES, **flags), 1)
    seen = [env.reset(seed=[5])[0]["proprio"]]
    for push in (0.5, -0.3):
        obs, success, _, _, info = env.step(np.full((1, 4), push, np.float32))
        seen += [obs["proprio"].copy(), success, info["ended"]]
    env.close()
    return seen


class Asked(Exception):
    pass


@probe
def make_maniskill(s):
    """What ManiSkill is asked for."""

    def asked(*names, **settings):
        raise Asked(names, settings)

    found = []
    for flags in (
        dict(obs_mode="rgb", cameras="both", image_size=128), dict(obs_mode="rgb", cameras="primary"),
        dict(obs_mode="state", control_freq=20), dict(obs_mode="state", sim_backend="physx_cuda", num_envs=7),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked) as caught:
            patch.setattr("gymnasium.make", asked)
            args = fill(s.Args, s.TABLES, env_id="StackCube-v1", torch_threads=1, **flags)
            s.make_maniskill(args, args.num_envs, render=True)
        found.append(repr(caught.value.args))  # poses hold tensors: by their values
    return found


# --- and how ---
def same(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    return np.array_equal(one, two) if isinstance(one, np.ndarray) else type(one) is type(two) and one == two


DEFINED = {name: definitions(tree) for name, tree in TREES.items()}
REFERENCES = {name: next(s for s in ("force_octo", *SCRIPTS) if about(name) in DEFINED[s]) for name in PROBES}
PAIRS = [
    (name, script)
    for name in PROBES
    for script in SCRIPTS
    if about(name) in DEFINED[script] and script != REFERENCES[name]
]


@pytest.fixture(scope="module")
def found():
    """What the script that the others are compared with gives, once for each probe."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = PROBES[name](importlib.import_module(REFERENCES[name]))
        return known[name]

    return of


@pytest.mark.parametrize("name, script", PAIRS)
@torch.no_grad()
def test_equal_seeds_and_inputs_give_equal_tensors(name, script, found):
    own = importlib.import_module(script)
    if (name, script) in OWN_FORM:
        try:
            differs = not same(found(name), PROBES[name](own))
        except (TypeError, AttributeError):  # it takes other arguments
            differs = True
        assert differs, f"{script} has no form of its own any more: take it out of OWN_FORM"
    else:
        assert same(found(name), PROBES[name](own))


def test_everything_that_scripts_share_is_compared():
    shared = {name for own in DEFINED.values() for name in own if sum(name in other for other in DEFINED.values()) > 1}
    assert shared - PROBES.keys() - ELSEWHERE.keys() == set()
    assert {about(name) for name, _ in OWN_FORM} | ELSEWHERE.keys() <= shared


def test_a_difference_is_seen():
    one = {"a": [torch.ones(2), np.ones(2), 1.0], "b": "x"}
    assert same(one, {"a": [torch.ones(2), np.ones(2), 1.0], "b": "x"})
    for other in (
        {"a": [torch.ones(2), np.ones(2), 1.0]}, {"a": [torch.ones(2) + 1e-7, np.ones(2), 1.0], "b": "x"},
        {"a": [torch.ones(2), np.zeros(2), 1.0], "b": "x"}, {"a": [torch.ones(2), np.ones(2), 2.0], "b": "x"},
        {"a": [torch.ones(2), np.ones(2)], "b": "x"},
    ):  # fmt: skip
        assert not same(one, other)
