"""Chunked transitions, returns and rewards of the replay buffer, worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import force_octo as script

G = 0.9
HOLD = np.array([-7.0], np.float32)


BINARY = script.REWARDS["binary"]
SEEN = {"proprio": torch.empty(0, 2)}


def buffer(chunk_len: int, seen=SEEN, action_dim=1, window=1) -> script.ReplayBuffer:
    agent = SimpleNamespace(window=window, feature_dim=2, action_dim=action_dim)
    return script.ReplayBuffer(agent, script.Args(chunk_len=chunk_len, gamma=G, device="cpu"), seen)


def episode_of(steps, terminated, base=0, recorded=None, success=True) -> script.Episode:
    """So many steps, the last a success or none; features say (base, step), as proprio does; actions are base + step."""
    length = recorded or steps
    feature = torch.stack([torch.full((steps + 1,), float(base)), torch.arange(steps + 1.0)], 1)
    action = base + np.arange(length, dtype=np.float32)[:, None]
    succeeds = success & (np.arange(1, steps + 1) == steps)
    return script.Episode(feature, {"proprio": feature.numpy()}, action, succeeds, terminated)


def add(replay, steps, terminated, base=0, recorded=None, success=True, reward=BINARY, stay=0):
    replay.add(episode_of(steps, terminated, base, recorded, success), reward, HOLD, stay)


def everything(replay) -> script.Batch:
    return replay.gather(replay.starts["row"])


def test_termination_inside_a_chunk():
    replay = buffer(3)
    add(replay, 4, terminated=True, reward=script.Reward(0.1, 1.0))
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, -7], [3, -7, -7]]  # the rest keeps still
    by_hand = [0.1 + G * 0.1 + G**2 * 0.1, 0.1 + G * 0.1 + G**2 * 1.0, 0.1 + G * 1.0, 1.0]
    assert batch.reward.tolist() == pytest.approx(by_hand)
    # Only the first chunk ends before the episode does; the second ends exactly with it.
    assert batch.bootstrap.tolist() == pytest.approx([G**3, 0, 0, 0])
    assert batch.feature.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert batch.next_feature.tolist() == [[0, 3], [0, 4], [0, 4], [0, 4]]
    returns = [0.1 + G * (0.1 + G * (0.1 + G * 1.0)), 0.1 + G * (0.1 + G * 1.0), 0.1 + G * 1.0, 1.0]
    assert batch.mc_return.tolist() == pytest.approx(returns)
    assert batch.success.tolist() == [1, 1, 1, 1]
    assert batch.row.tolist() == [0, 1, 2, 3]


def test_time_limit():
    replay = buffer(3)
    add(replay, 5, terminated=False, success=False, reward=script.Reward(-0.05, 10.0))
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]  # shorter ones are left out
    assert batch.bootstrap.tolist() == pytest.approx([G**3] * 3)  # the task would have gone on
    assert batch.next_feature.tolist() == [[0, 3], [0, 4], [0, 5]]
    assert batch.reward.tolist() == pytest.approx([-0.05 * (1 + G + G**2)] * 3)
    assert batch.mc_return.tolist() == pytest.approx([-0.05 / (1 - G)] * 3)
    assert batch.success.tolist() == [0, 0, 0]


def test_single_steps():
    """Chunks of one action: plain transitions, also the last one before a time limit."""
    for terminated in (True, False):
        replay = buffer(1)
        add(replay, 3, terminated)
        batch = everything(replay)
        assert batch.chunk.tolist() == [[0], [1], [2]] and batch.reward.tolist() == [0, 0, 1]
        assert batch.bootstrap.tolist() == pytest.approx([G, G, 0 if terminated else G])
        assert batch.next_feature[:, 1].tolist() == [1, 2, 3]


def test_episodes_shorter_than_a_chunk():
    replay = buffer(4)
    add(replay, 2, terminated=False, success=False)
    assert replay.starts.rows == 0
    add(replay, 2, terminated=True, base=10)
    batch = everything(replay)
    assert batch.chunk.tolist() == [[10, 11, -7, -7], [11, -7, -7, -7]]
    assert batch.reward.tolist() == pytest.approx([G, 1]) and batch.bootstrap.tolist() == [0, 0]


def test_what_was_recorded_after_success_fills_the_last_chunks():
    replay = buffer(4)
    add(replay, 3, terminated=True, recorded=5)  # success at step 3 of 5 recorded ones
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, -7]]
    assert batch.reward.tolist() == pytest.approx([G**2, G, 1]) and batch.bootstrap.tolist() == [0, 0, 0]
    assert batch.next_feature.tolist() == [[0, 3]] * 3  # the state of the success, not what came after
    assert batch.mc_return.tolist() == pytest.approx([G**2, G, 1])


def test_chunks_stay_within_their_episode_while_the_buffer_grows():
    replay, lengths = buffer(3), np.random.default_rng(0).integers(1, 60, 120)
    for episode, length in enumerate(lengths):
        add(replay, length, terminated=episode % 3 > 0, base=1000 * episode, success=episode % 2 == 0)
    assert len(replay.steps.columns["reward"]) > replay.steps.rows > 1024  # it did grow
    assert replay.steps.rows == replay.seen.rows == sum(lengths + 1)
    batch = everything(replay)
    expected = sum(n if e % 3 else max(n - 2, 0) for e, n in enumerate(lengths))
    assert len(batch.reward) == replay.starts.rows == expected
    episode = batch.feature[:, 0] / 1000
    assert torch.equal(batch.next_feature[:, 0] / 1000, episode)
    owner = torch.where(batch.chunk == -7, episode[:, None], (batch.chunk / 1000).floor())
    assert torch.equal(owner, episode[:, None].expand(-1, 3))
    assert torch.equal(batch.success, (episode % 2 == 0).float())
    step = batch.feature[:, 1].long()
    for row in range(0, len(step), 97):
        e = int(episode[row])
        left = int(lengths[e]) - int(step[row])
        steps = min(3, left)
        ends = e % 3 > 0 and left <= 3
        earned = e % 2 == 0 and left <= 3
        assert batch.reward[row].item() == pytest.approx(G ** (left - 1) if earned else 0, rel=1e-5)
        assert batch.bootstrap[row].item() == pytest.approx(0 if ends else G**steps)
        assert batch.next_feature[row, 1].item() == step[row] + steps


def test_draws_are_uniform_and_follow_the_generator():
    replay = buffer(2)
    add(replay, 4, terminated=False, success=False)
    add(replay, 3, terminated=True, base=10)
    rows = replay.draw(6000, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows, minlength=replay.steps.rows)
    assert (counts > 0).nonzero()[:, 0].tolist() == replay.starts["row"].tolist() == [0, 1, 2, 5, 6, 7]
    assert (counts[counts > 0] / 6000 - 1 / 6).abs().max() < 0.03
    assert torch.equal(rows, replay.draw(6000, torch.Generator().manual_seed(0)))


def test_tables_round_trip():
    """What a checkpoint holds of a buffer: as it was then, whatever came later."""
    replay, copy = buffer(2), buffer(2)
    add(replay, 3, terminated=True)
    states = {name: {k: v.clone() for k, v in table.state_dict().items()} for name, table in replay.tables.items()}
    add(replay, 5, terminated=False, base=10, success=False)
    for name, state in states.items():
        copy.tables[name].load_state_dict(state)
    assert copy.steps.rows == copy.seen.rows == 4 and copy.starts.rows == 3
    add(copy, 5, terminated=False, base=10, success=False)
    for name, value in vars(everything(replay)).items():
        assert torch.equal(value, getattr(everything(copy), name)), name
    rows = replay.starts["row"]
    assert torch.equal(replay.observations(rows)["proprio"], copy.observations(rows)["proprio"])


def test_two_buffers_are_two_memories():
    """Of one form, as the expert's and the policy's are."""
    expert, policy = buffer(2), buffer(2)
    add(expert, 3, terminated=True)
    add(policy, 5, terminated=True, base=10)
    add(expert, 2, terminated=True, base=20)
    for replay, own in (expert, [0, 0, 0, 20, 20]), (policy, [10] * 5):
        rows = replay.starts["row"]
        assert replay.observations(rows)["proprio"][:, 0].tolist() == everything(replay).feature[:, 0].tolist() == own
    assert SEEN["proprio"].shape == (0, 2)
    both = policy.gather(torch.tensor([0])).cat(expert.gather(torch.tensor([1, 2])))
    assert both.row.tolist() == [0, 1, 2]
    assert both.feature[:, 0].tolist() == [10, 0, 0]


def test_observations_reach_back_within_their_episode():
    replay = buffer(2, seen=SEEN | {"primary": torch.empty(0, 1, dtype=torch.uint8)}, window=3)
    for base in (0, 100):
        episode = episode_of(4, True)
        episode.obs["primary"] = base + np.arange(5, dtype=np.uint8)[:, None]
        replay.add(episode, BINARY, HOLD)
    seen = replay.observations(torch.tensor([3, 5, 6]))
    assert seen["primary"][..., 0].tolist() == [[1, 2, 3], [100, 100, 100], [100, 100, 101]]
    assert seen["real"].tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    assert seen["proprio"][:, 1].tolist() == [3, 0, 1]


def test_features_can_be_written_anew():
    """And a checkpoint then writes all of them: the version of the table says so."""
    replay = buffer(2)
    add(replay, 3, terminated=True)
    version = replay.steps.version
    replay.steps.rewrite("feature", 9 + torch.zeros(4, 2))
    batch = everything(replay)
    assert torch.equal(batch.feature, torch.full((3, 2), 9.0)) and torch.equal(batch.next_feature, batch.feature)
    assert replay.steps.version == version + 1 and replay.seen.version == 0
    assert batch.chunk.tolist() == [[0, 1], [1, 2], [2, -7]]


def test_batches_join_in_order():
    replay = buffer(1)
    add(replay, 2, terminated=True)
    one, two = replay.gather(torch.tensor([0])), replay.gather(torch.tensor([1]))
    both = one.cat(two)
    assert both.feature.tolist() == [[0, 0], [0, 1]] and both.reward.tolist() == [0, 1]


@pytest.mark.parametrize("reward, success, failure", [("binary", 1.0, 0.0), ("conrft", 10.0, -0.05)])
def test_rewards_of_an_episode(reward, success, failure):
    """Success flags become rewards; the chunk after the end keeps still, gripper as it was."""
    agent = SimpleNamespace(hold_action=lambda last: np.array([0.0, last[-1]], np.float32))
    args = script.Args(reward=reward, gamma=G)
    replay = buffer(2, seen={}, action_dim=2)
    action = np.array([[0.1, 1.0], [0.2, 1.0], [0.3, -1.0]], np.float32)
    episode = script.Episode(torch.zeros(4, 2), {}, action, np.array([False, False, True]), True)
    script.add_episode(replay, episode, agent, args)
    batch = everything(replay)
    rewards = [failure + G * failure, failure + G * success, success]
    assert batch.reward.tolist() == pytest.approx(rewards)
    assert batch.chunk[2].tolist() == pytest.approx([0.3, -1.0, 0.0, -1.0])
    assert batch.success.tolist() == [1, 1, 1] and batch.bootstrap.tolist() == pytest.approx([G**2, 0, 0])
    failed = script.Episode(torch.zeros(4, 2), {}, action, np.zeros(3, bool), False)
    replay = buffer(2, seen={}, action_dim=2)
    script.add_episode(replay, failed, agent, args)
    batch = everything(replay)
    assert batch.reward.tolist() == pytest.approx([failure * (1 + G)] * 2) and batch.success.tolist() == [0, 0]
    assert batch.mc_return.tolist() == pytest.approx([failure / (1 - G)] * 2)


def test_steps_past_the_success_are_successes_of_one_step():
    """Two of the three steps recorded past the success: each ends at once, worth the reward of success."""
    replay = buffer(2)
    add(replay, 2, terminated=True, recorded=5, reward=script.Reward(-0.5, 10.0), stay=2)
    add(replay, 2, terminated=True, base=100)  # what follows stays a matter of its own
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [100, 101], [101, -7]]
    assert batch.reward.tolist() == pytest.approx([-0.5 + G * 10, 10, 10, 10, G, 1])
    assert batch.bootstrap.tolist() == [0] * 6
    assert batch.mc_return.tolist() == pytest.approx([-0.5 + G * 10, 10, 10, 10, G, 1])
    assert batch.success.tolist() == [1] * 6
