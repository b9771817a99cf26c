"""Chunked transitions, returns and rewards of the replay buffer, worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import force_octo as script

G = 0.9
HOLD = np.array([-7.0], np.float32)


def buffer(chunk_len: int) -> script.ReplayBuffer:
    return script.ReplayBuffer(feature_dim=2, action_dim=1, chunk_len=chunk_len, gamma=G)


def add(replay, rewards, terminated, base=0, recorded=None, success=True, failure=0.0, stay=0):
    """One episode whose features say (base, step) and whose actions are base + step."""
    length = recorded or len(rewards)
    feature = torch.stack([torch.full((length + 1,), float(base)), torch.arange(length + 1.0)], 1)
    action = base + np.arange(length, dtype=np.float32)[:, None]
    replay.add(feature, action, np.array(rewards, np.float32), terminated, success, failure, HOLD, stay)


def everything(replay) -> script.Batch:
    return replay.gather(replay.starts)


def test_termination_inside_a_chunk():
    replay = buffer(3)
    add(replay, [0.1, 0.2, 0.4, 1.0], terminated=True)
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, -7], [3, -7, -7]]  # the rest keeps still
    by_hand = [0.1 + G * 0.2 + G**2 * 0.4, 0.2 + G * 0.4 + G**2 * 1.0, 0.4 + G * 1.0, 1.0]
    assert batch.reward.tolist() == pytest.approx(by_hand)
    # Only the first chunk ends before the episode does; the second ends exactly with it.
    assert batch.bootstrap.tolist() == pytest.approx([G**3, 0, 0, 0])
    assert batch.feature.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert batch.next_feature.tolist() == [[0, 3], [0, 4], [0, 4], [0, 4]]
    returns = [0.1 + G * (0.2 + G * (0.4 + G * 1.0)), 0.2 + G * (0.4 + G * 1.0), 0.4 + G * 1.0, 1.0]
    assert batch.mc_return.tolist() == pytest.approx(returns)
    assert batch.success.tolist() == [1, 1, 1, 1]


def test_time_limit():
    replay = buffer(3)
    add(replay, [-0.05] * 5, terminated=False, success=False, failure=-0.05)
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
        add(replay, [0.0, 0.0, 1.0], terminated)
        batch = everything(replay)
        assert batch.chunk.tolist() == [[0], [1], [2]] and batch.reward.tolist() == [0, 0, 1]
        assert batch.bootstrap.tolist() == pytest.approx([G, G, 0 if terminated else G])
        assert batch.next_feature[:, 1].tolist() == [1, 2, 3]


def test_episodes_shorter_than_a_chunk():
    replay = buffer(4)
    add(replay, [0.0, 0.0], terminated=False)
    assert len(replay.starts) == 0
    add(replay, [0.0, 1.0], terminated=True, base=10)
    batch = everything(replay)
    assert batch.chunk.tolist() == [[10, 11, -7, -7], [11, -7, -7, -7]]
    assert batch.reward.tolist() == pytest.approx([G, 1]) and batch.bootstrap.tolist() == [0, 0]


def test_what_was_recorded_after_success_fills_the_last_chunks():
    replay = buffer(4)
    add(replay, [0.0, 0.0, 1.0], terminated=True, recorded=5)  # success at step 3 of 5 recorded ones
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, -7]]
    assert batch.reward.tolist() == pytest.approx([G**2, G, 1]) and batch.bootstrap.tolist() == [0, 0, 0]
    assert batch.next_feature.tolist() == [[0, 3]] * 3  # the state of the success, not what came after
    assert batch.mc_return.tolist() == pytest.approx([G**2, G, 1])


def test_chunks_stay_within_their_episode_while_the_buffer_grows():
    replay, lengths = buffer(3), np.random.default_rng(0).integers(1, 60, 120)
    for episode, length in enumerate(lengths):
        add(replay, [0.0] * (length - 1) + [float(episode)], terminated=episode % 3 > 0, base=1000 * episode,
            success=episode % 2 == 0)  # fmt: skip
    assert len(replay.data["reward"]) > 1024 >= 1  # it did grow
    assert replay.rows == sum(lengths + 1)
    batch = everything(replay)
    expected = sum(n if e % 3 else max(n - 2, 0) for e, n in enumerate(lengths))
    assert len(batch.reward) == len(replay.starts) == expected
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
        assert batch.reward[row].item() == pytest.approx(e * G ** (left - 1) if left <= 3 else 0, rel=1e-5)
        assert batch.bootstrap[row].item() == pytest.approx(0 if ends else G**steps)
        assert batch.next_feature[row, 1].item() == step[row] + steps


def test_draws_are_uniform_and_follow_the_generator():
    replay = buffer(2)
    add(replay, [0.0] * 4, terminated=False)
    add(replay, [0.0] * 3, terminated=True, base=10)
    rows = replay.draw(6000, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows, minlength=replay.rows)
    assert (counts > 0).nonzero()[:, 0].tolist() == replay.starts.tolist() == [0, 1, 2, 5, 6, 7]
    assert (counts[counts > 0] / 6000 - 1 / 6).abs().max() < 0.03
    assert torch.equal(rows, replay.draw(6000, torch.Generator().manual_seed(0)))


def test_state_round_trip():
    replay, copy = buffer(2), buffer(2)
    add(replay, [0.0, 0.0, 1.0], terminated=True)
    state = replay.state_dict()
    add(replay, [0.0] * 5, terminated=False, base=10, success=False)  # a saved state is not a view
    copy.load_state_dict(state)
    assert copy.rows == 4 and len(copy.starts) == 3
    add(copy, [0.0] * 5, terminated=False, base=10, success=False)
    for name, value in everything(replay).__dict__.items():
        assert torch.equal(value, getattr(everything(copy), name)), name
    assert {k: v.shape for k, v in replay.state_dict().items()} == {k: v.shape for k, v in copy.state_dict().items()}


def test_batches_join_in_order():
    replay = buffer(1)
    add(replay, [0.0, 1.0], terminated=True)
    one, two = replay.gather(torch.tensor([0])), replay.gather(torch.tensor([1]))
    both = one.cat(two)
    assert both.feature.tolist() == [[0, 0], [0, 1]] and both.reward.tolist() == [0, 1]


@pytest.mark.parametrize("reward, success, failure", [("binary", 1.0, 0.0), ("conrft", 10.0, -0.05)])
def test_rewards_of_an_episode(reward, success, failure):
    """Success flags become rewards; the chunk after the end keeps still, gripper as it was."""
    agent = SimpleNamespace(hold_action=lambda last: np.array([0.0, last[-1]], np.float32))
    args = script.Args(reward=reward, gamma=G)
    replay = script.ReplayBuffer(1, 2, 2, G)
    action = np.array([[0.1, 1.0], [0.2, 1.0], [0.3, -1.0]], np.float32)
    episode = script.Episode(torch.zeros(4, 1), action, np.array([False, False, True]), True)
    script.add_episode(replay, episode, agent, args)
    batch = everything(replay)
    rewards = [failure + G * failure, failure + G * success, success]
    assert batch.reward.tolist() == pytest.approx(rewards)
    assert batch.chunk[2].tolist() == pytest.approx([0.3, -1.0, 0.0, -1.0])
    assert batch.success.tolist() == [1, 1, 1] and batch.bootstrap.tolist() == pytest.approx([G**2, 0, 0])
    failed = script.Episode(torch.zeros(4, 1), action, np.zeros(3, bool), False)
    replay = script.ReplayBuffer(1, 2, 2, G)
    script.add_episode(replay, failed, agent, args)
    batch = everything(replay)
    assert batch.reward.tolist() == pytest.approx([failure * (1 + G)] * 2) and batch.success.tolist() == [0, 0]
    assert batch.mc_return.tolist() == pytest.approx([failure / (1 - G)] * 2)


def test_steps_past_the_success_are_successes_of_one_step():
    """Two of the three steps recorded past the success: each ends at once, worth the reward of success."""
    replay = buffer(2)
    add(replay, [-0.5, 10.0], terminated=True, recorded=5, failure=-0.5, stay=2)
    add(replay, [0.0, 1.0], terminated=True, base=100)  # what follows stays a matter of its own
    batch = everything(replay)
    assert batch.chunk.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [100, 101], [101, -7]]
    assert batch.reward.tolist() == pytest.approx([-0.5 + G * 10, 10, 10, 10, G, 1])
    assert batch.bootstrap.tolist() == [0] * 6
    assert batch.mc_return.tolist() == pytest.approx([-0.5 + G * 10, 10, 10, 10, G, 1])
    assert batch.success.tolist() == [1] * 6
