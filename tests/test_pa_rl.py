"""benchmark/pa_rl.py: what the improvement of actions does, and a short real run that is killed and resumed."""

import json

import numpy as np
import pytest
import torch
from conftest import differences, rows, tiny_args

from benchmark import pa_rl as script
from plumbing import Demos, Run, UserError, fixed

TOY = dict(device="cpu", obs_mode="state", num_envs=1, proprio_noise=0.0, hidden_dim=24, num_critics=3, chunk_len=2,
           proposals=7, kept=3, batch_size=8)  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def agent() -> script.Agent:
    """With demonstrations of random numbers, without a simulator."""
    g = np.random.default_rng(0)
    obs = {"proprio": g.normal(size=(21, 5)).astype(np.float32)}
    length = np.full(3, 6)
    demos = Demos(obs, g.uniform(-0.5, 0.5, (21, 4)).astype(np.float32), length, length, "toy")
    torch.manual_seed(0)
    return script.Agent(script.Args(**TOY), demos)


def of(agent, count=4):
    return torch.randn(count, agent.feature_dim, generator=rng(1))


def linear(feature, chunk):
    """Two critics, whose mean has the gradient (2, -1, 0) times the feature."""
    slope = torch.tensor([2.0, -1.0, 0.0]) * feature
    q = (slope[:, None] * chunk).sum(-1)
    return torch.stack([q + 1, q - 1])


# --- climbing ---
def test_chunks_climb_a_plane_by_steps_of_the_gradient():
    """The official code's own test: after n steps a = a + n * size * gradient."""
    feature = torch.tensor([[1.0, 1.0, 1.0], [0.5, -0.5, 3.0]])
    start = torch.zeros(2, 2, 3)
    start[:, 1, 2] = 0.3
    chunk, q = script.climb(linear, feature, start, 5, 0.02)
    slope = torch.tensor([[2.0, -1.0, 0.0], [1.0, 0.5, 0.0]])
    torch.testing.assert_close(chunk, start + 0.1 * slope[:, None])
    torch.testing.assert_close(q, linear(feature, chunk).mean(0))


def test_chunks_stay_in_the_box():
    chunk, _ = script.climb(linear, torch.ones(1, 3), torch.zeros(1, 1, 3), 5, 10.0)
    assert chunk.tolist() == [[[1.0, -1.0, 0.0]]]


def test_a_chunk_stops_at_the_best_point_of_its_way():
    """Steps as long as this jump over the summit, and back and forth ever farther from it."""

    def summit(feature, chunk):
        return -chunk.square().sum(-1)[None]

    chunk, q = script.climb(summit, torch.ones(1, 3), torch.tensor([[[0.2], [-0.1]]]), 4, 1.05)
    assert chunk.flatten().tolist() == pytest.approx([0.2, -0.1])
    assert q.flatten().tolist() == pytest.approx([-0.04, -0.01])


def test_the_best_proposals_are_kept_and_the_recorded_chunk_takes_the_place_of_the_worst(agent):
    args = script.Args(**TOY | dict(climb_steps=0))
    feature = of(agent)
    proposals = script.proposed(agent, feature, args, rng())
    q = agent.critic(feature, proposals).mean(0)
    chunks, height = script.improved(agent, feature, args, rng())
    torch.testing.assert_close(height, q.sort(descending=True).values[:, :3])
    torch.testing.assert_close(agent.critic(feature, chunks).mean(0), height)

    recorded = torch.full((4, agent.actor.chunk_dim), 0.25)
    others, _ = script.improved(agent, feature, args, rng(), recorded)
    assert torch.equal(others[:, :2], chunks[:, :2]) and torch.equal(others[:, 2], recorded)


def test_climbing_never_lowers_q_and_leaves_the_critic_alone(agent):
    feature = of(agent)
    low = script.improved(agent, feature, script.Args(**TOY | dict(climb_steps=0)), rng())[1]
    high = script.improved(agent, feature, script.Args(**TOY), rng())[1]
    assert (high >= low).all() and (high > low).any()
    assert all(weight.grad is None for weight in agent.parameters())


# --- what it is for ---
def test_it_acts_as_it_was_cloned_until_a_critic_has_learned(agent):
    feature = of(agent, 2)
    with torch.inference_mode():  # as `decide` calls it
        plain = agent.act(feature, [rng(3), rng(4)])
        cloned = agent.actor.sample(feature, 1, [rng(3), rng(4)])[:, 0]
        agent.improves.fill_(True)
        chunk = agent.act(feature, [rng(3), rng(4)])
        proposals = script.proposed(agent, feature, agent.args, [rng(3), rng(4)])
    np.testing.assert_array_equal(plain, cloned.unflatten(1, (2, -1)).numpy())
    q = agent.critic(feature, torch.as_tensor(chunk).flatten(1)).mean(0)
    assert (q >= agent.critic(feature, proposals).mean(0).amax(1) - 1e-6).all()


def test_distillation_raises_the_q_of_what_the_policy_proposes(agent):
    args = script.Args(**TOY | dict(climb_rate=1.0))
    feature = of(agent, 8)
    batch = script.conrft.Batch(
        feature, torch.zeros(8, agent.actor.chunk_dim), *torch.zeros(2, 8), feature, *torch.zeros(2, 8)
    )
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=3e-3)
    height = fixed(agent.critic)

    def proposed():
        return height(feature, script.proposed(agent, feature, args, rng(9))).mean().item()

    before = proposed()
    for step in range(60):
        logs = script.update_actor(agent, optimizer, batch, args, rng(step))
    assert proposed() > before + 0.1
    assert 0 <= logs["pa_rl/recorded_weight"] <= 1


def test_the_target_is_of_the_best_chunk_at_the_next_state(agent, monkeypatch):
    """Every critic of the target says 1.2 there, and reward and discount are 0.25 and 0.5."""
    feature = of(agent, 3)
    one = torch.ones(3)
    batch = script.conrft.Batch(
        feature, torch.zeros(3, agent.actor.chunk_dim), 0.25 * one, 0.5 * one, feature + 1, 0.0 * one, one
    )
    asked = []

    def target(at, chunk):
        asked.append((at, chunk))
        return torch.full((3, 3), 1.2)

    monkeypatch.setattr(agent.target_critic, "forward", target)
    _, logs = script.critic_loss(agent, batch, agent.args, rng())
    assert logs["values/td_target"].item() == pytest.approx(0.25 + 0.5 * 1.2)
    ((at, chunk),) = asked
    assert torch.equal(at, batch.next_feature)
    torch.testing.assert_close(chunk, script.best(*script.improved(agent, batch.next_feature, agent.args, rng())))


# --- bad input, and a real run ---
@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(kept=8), "--kept 8 must be at least 1 and at most --proposals 7"),
        (dict(kept=0), "--kept 0 must be"),
        (dict(temperature=0.0), "--temperature 0.0 must be positive"),
        (dict(preset="paper"), "--preset is conrft.py's own"),
        (dict(calibrate=False), "--calibrate is conrft.py's own"),
        (dict(climb_steps=-1), "--climb-steps must be at least 0"),
    ],
)
def test_impossible_flags_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        script.validate(script.Args(env_id="PushCube-v1", **TOY | flags))


def test_a_run_resumed_after_a_kill_equals_an_undisturbed_one(place, tmp_path, monkeypatch, capsys):
    """And --eval-only evaluates it as the run did at its end, and trains nothing."""

    def args(name, **changes):
        return tiny_args(place, script, runs=str(tmp_path), run_name=name, proposals=5, kept=2, **changes)

    whole = script.main(args("whole"))
    assert {"losses/td", "losses/calql", "losses/bc", "pa_rl/moved"} <= {name for _, _, name, _ in rows(whole)}
    tick = Run.tick

    class Killed(BaseException):
        pass

    def killed(self, *rest, **more):
        tick(self, *rest, **more)
        if (self.stage, self.stage_updates) == ("online", 4):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "tick", killed)
        script.main(args("cut"))
    script.main(script.Args(resume=str(tmp_path / "cut"), device="cpu"))
    assert differences(whole, tmp_path / "cut") == []
    metrics = (whole / "metrics.csv").read_bytes()
    capsys.readouterr()
    script.main(script.Args(eval_only=str(whole), device="cpu"))
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((whole / "summary.json").read_text())
    assert found["eval/success_once"] == summary["success_once"] and found["eval/num_episodes"] == 2
    assert (whole / "metrics.csv").read_bytes() == metrics
