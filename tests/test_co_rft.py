"""co_rft_chunked.py: its data, critic and losses against numbers worked out here, and short real runs."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bc
import co_rft_chunked as script
from plumbing import SPAWN, Demos, Run, Spawn, UserError, check_flags, fill, load_demos, parse_flags

TINY = dict(
    env_id="PushCube-v1", obs_mode="state", device="cpu", cameras="primary", num_demos=4, max_episode_steps=10,
    hidden_dim=24, chunk_len=3, critic_dim=16, critic_layers=1, sft_updates=5, critic_first=1, offline_updates=4,
    batch_size=8, sft_batch_size=8, holdout=0.25, val_freq=2, eval_episodes=2, video_episodes=0, log_freq=1,
    checkpoint_freq=3, actor_until="rest", drop_idle=0.0,
)  # fmt: skip
TOY = dict(obs_mode="state", proprio_noise=0.0, device="cpu", critic_dim=16, hidden_dim=24, lasting=False)


def tiny_args(place, folder, **changes):
    return fill(script.Args, script.TABLES, **TINY | dict(demo_dir=str(place / "demos"), runs=str(folder)) | changes)


def toy(chunk_len=3, critic_len=None, action=None, **flags):
    """Two episodes: A succeeds at steps 3, 4 and 5 of 5, B at step 2 of 4 only; no two actions are alike."""
    args = script.Args(**TOY | dict(chunk_len=chunk_len, critic_len=critic_len or chunk_len, gamma=0.5) | flags)
    moving = np.arange(11, dtype=np.float32)[:, None] / 100 * np.array([1, -1, 1], np.float32)
    action = moving if action is None else action
    success = np.array([0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0], bool)
    obs = {"proprio": np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)}
    demos = Demos(obs, action, np.array([5, 4]), np.array([3, 2]), "toy", success)
    torch.manual_seed(0)
    agent = script.Agent(args, demos)
    data = script.ChunkData(demos, agent, args)
    data.feature = torch.arange(11.0)[:, None].repeat(1, agent.feature_dim)
    return args, demos, agent, data


def rows_of(data) -> dict[str, list[int]]:
    """Rows from which each kind of chunk is drawn."""
    kinds = {"clone": data.cloned_rows, "actor": data.actor_rows, "critic": data.critic_rows, "held": data.held_rows}
    return {name: rows.tolist() for name, rows in kinds.items()}


def weights(folder) -> dict[str, torch.Tensor]:
    root = folder / "checkpoints"
    return load_file(root / (root / "latest").read_text() / "weights.safetensors")


def metrics(folder) -> list[str]:
    """Rows of metrics.csv that don't depend on the clock."""
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if ",time/" not in line]


# --- data ---


def test_prefixes_with_reward_upsampling():
    """One step more than the success counts: A ends in success after 4 steps, B without it after 3 (a truncation)."""
    _, demos, agent, data = toy(upsample_steps=1, holdout=0.5)
    rows = torch.tensor([0, 2, 3, 6, 8])
    batch = data.gather(rows)
    assert batch.reward.tolist() == [[0, 0, 0.25], [1, 1.5, 1.5], [1, 1, 1], [0, 0.5, 0.5], [0, 0, 0]]
    terminal, alive = [0.5, 0, 0], [0.5, 0.25, 0.125]
    assert batch.bootstrap.tolist() == [alive, terminal, [0, 0, 0], alive, [0.5, 0.5, 0.5]]
    assert batch.next_feature[..., 0].tolist() == [[1, 2, 3], [3, 4, 4], [4, 4, 4], [7, 8, 9], [9, 9, 9]]
    assert batch.valid.tolist() == [[1, 1, 1]] * 4 + [[1, 0, 0]]
    assert batch.mc_return.tolist() == [0.375, 1.5, 1, 0.5, 0]
    assert batch.terminated.tolist() == [True, True, True, False, False]
    assert batch.feature[:, 0].tolist() == rows.tolist()
    box = agent.normalise(demos.action)
    still = [0, 0, box[4, 2]]  # what was recorded after the episode's end fills its last chunks, then stillness
    np.testing.assert_allclose(batch.chunk[2].view(3, 3), [box[3], box[4], still])
    assert rows_of(data) == {
        "clone": [0, 1, 2, 3, 4], "actor": [0, 1, 2, 3], "critic": [0, 1, 2, 3], "held": [6, 7, 8],
    }  # fmt: skip


def test_standing_still_after_the_success_is_for_the_critics():
    """A keeps still from step 3 to 5, its first success being step 3; B from its start, and succeeds at step 2 of 4."""
    action = np.arange(11, dtype=np.float32)[:, None] / 100 * np.array([1, -1, 1], np.float32)
    action[2:5] = [0, 0, action[1, 2]]
    action[6:10] = [0, 0, 0.06]
    data = toy(upsample_steps=2, holdout=0.0, action=action)[3]
    assert rows_of(data) == {
        "clone": [0, 1, 2, 6, 7], "actor": [0, 1, 2, 6, 7], "critic": [0, 1, 2, 3, 4, 6, 7, 8, 9], "held": [],
    }  # fmt: skip
    data = toy(upsample_steps=2, holdout=0.0, action=action, actor_until="end")[3]
    assert data.cloned_rows.tolist() == data.actor_rows.tolist() == data.critic_rows.tolist()
    data = toy(upsample_steps=2, holdout=0.0, action=action, actor_until="success")[3]
    assert data.cloned_rows.tolist() == data.actor_rows.tolist() == [0, 1, 2, 6, 7]
    assert data.critic_rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    action[8] = [0, 0, 0.02]  # the gripper moves
    for until, rows in {"rest": [0, 1, 2, 6, 7, 8, 9], "success": [0, 1, 2, 6, 7]}.items():
        data = toy(upsample_steps=2, holdout=0.0, action=action, actor_until=until)[3]
        assert data.cloned_rows.tolist() == data.actor_rows.tolist() == rows


def test_success_that_lasts_is_worth_the_same_all_along():
    """Discount 0.5: a successful step earns 0.5, and the last one 1 = 0.5 + 0.5 * 1, what standing still would go on to."""
    _, _, agent, data = toy(upsample_steps=1, holdout=0.0, lasting=True)
    batch = data.gather(torch.tensor([0, 1, 2, 3, 6, 7, 8]))
    assert batch.mc_return.tolist() == [0.25, 0.5, 1, 1, 0.25, 0.5, 0]  # B ends without success: nothing lasts
    assert batch.reward.tolist() == [
        [0, 0, 0.125], [0, 0.25, 0.5], [0.5, 1, 1], [1, 1, 1], [0, 0.25, 0.25], [0.5, 0.5, 0.5], [0, 0, 0],
    ]  # fmt: skip
    assert batch.bootstrap[2].tolist() == [0.5, 0, 0] and batch.bootstrap[3].tolist() == [0, 0, 0]
    plain = toy(upsample_steps=0, holdout=0.0, lasting=True)[3].gather(torch.tensor([0, 2]))
    assert plain.mc_return.tolist() == [0.25, 1]  # without upsampling there is one success to count, worth the same


def test_prefixes_without_upsampling():
    data = toy(upsample_steps=0, holdout=0.0)[3]
    batch = data.gather(torch.tensor([0, 2, 6, 7]))
    assert batch.reward.tolist() == [[0, 0, 0.25], [1, 1, 1], [0, 0.5, 0.5], [1, 1, 1]]
    assert batch.bootstrap.tolist() == [[0.5, 0.25, 0], [0, 0, 0], [0.5, 0, 0], [0, 0, 0]]
    assert batch.mc_return.tolist() == [0.25, 1, 0.5, 1] and batch.valid.all()
    assert data.critic_rows.tolist() == [0, 1, 2, 6, 7] and len(data.held_rows) == 0
    single = toy(critic_len=1, upsample_steps=0, holdout=0.0)[3].gather(torch.tensor([1]))
    assert single.reward.tolist() == [[0]] and single.bootstrap.tolist() == [[0.5]] and single.chunk.shape == (1, 9)


# --- networks ---


def by_hand(critic, k, feature, action):
    """Critic k on one state [F] and K actions [K, A], token by token in numpy: [K]."""
    weights = {name: w.detach().double().numpy() for name, w in critic.named_parameters()}

    def dense(name, x):
        return x @ weights[f"{name}.weight"][k] + weights[f"{name}.bias"][k, 0]

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    x = np.stack([dense("state_in", feature), *(dense("action_in", a) for a in action / critic.unit.numpy())])
    x, d = x + weights["position"][k, 0], x.shape[1] // critic.blocks[0].heads
    for b in range(len(critic.blocks)):
        q, key, value = np.split(dense(f"blocks.{b}.qkv", norm(x)), 3, axis=1)
        mixed = np.zeros_like(x)
        for i in range(len(x)):
            for h in range(0, x.shape[1], d):
                score = np.array([q[i, h : h + d] @ key[j, h : h + d] / math.sqrt(d) for j in range(i + 1)])
                share = np.exp(score) / np.exp(score).sum()
                mixed[i, h : h + d] = sum(s * value[j, h : h + d] for j, s in enumerate(share))
        x = x + dense(f"blocks.{b}.mix", mixed)
        up = dense(f"blocks.{b}.up", norm(x))
        x = x + dense(f"blocks.{b}.down", up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2))))
    return dense("out", norm(x))[1:, 0]


def test_the_critic_is_two_causal_transformers():
    torch.manual_seed(0)
    unit = torch.rand(4, 3) + 0.5
    critic = script.ChunkCritic(7, unit, 16, 2, 4)
    for p in critic.parameters():
        torch.nn.init.normal_(p, std=0.3)  # so that all of it counts
    feature, chunk = torch.randn(5, 7), torch.randn(5, 2, 15)  # the actor's chunk has one action more than is scored
    q = critic(feature, chunk)
    assert q.shape == (2, 5, 2, 4)
    for k, b, n in [(0, 0, 0), (1, 3, 1), (1, 4, 0)]:
        action = chunk[b, n, :12].view(4, 3).double().numpy()
        np.testing.assert_allclose(
            q[k, b, n].detach(), by_hand(critic, k, feature[b].double().numpy(), action), atol=1e-4
        )
    torch.testing.assert_close(critic(feature, chunk, num=1), q[:1])
    changed = chunk.clone()
    changed[..., 6:9] += 1  # the third action
    same = (critic(feature, changed) == q).all((0, 1, 2))
    assert same.tolist() == [True, True, False, False]


def test_noise_on_actions():
    """In standard deviations of the demonstrations, clipped, within the box."""
    agent = toy()[2]
    agent.actor.unit[:] = torch.tensor([0.2, 0.1, 0.4] * 3)  # standard deviations 0.1, 0.05, 0.2
    chunk, g = torch.zeros(20_000, 9), torch.Generator().manual_seed(0)
    moved = agent.actor.noisy(chunk, 0.2, g)
    np.testing.assert_allclose(moved.std(0)[:3], [0.0197, 0.0098, 0.0394], rtol=0.03)
    np.testing.assert_allclose(moved.abs().amax(0)[:3], [0.05, 0.025, 0.1], rtol=1e-5)
    assert agent.actor.noisy(chunk + 0.99, 0.2, g).max() == 1


# --- losses ---


def test_losses():
    assert script.mse_loss(torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 3]]), torch.tensor([2.0, 1])) == (0.25 + 9) / 2
    reward, bootstrap, terminated = torch.tensor([[0.0, 1]]), torch.tensor([[0.5, 0.25]]), torch.tensor([True])
    batch = script.Batch(*[None] * 3, reward, bootstrap, None, torch.tensor([3.0]), terminated)
    next_q = torch.tensor([[[4.0, 8]], [[6.0, -2]]])
    assert script.td_target(batch, next_q, 0.0, 9).tolist() == [[2, 0.5]]  # 0 + 0.5 * 4, 1 + 0.25 * -2
    assert script.td_target(batch, next_q, 0.5, 2.0).tolist() == [[2, 1.75]]  # (2 + 3) / 2 is cut, (0.5 + 3) / 2
    batch.terminated = torch.tensor([False])  # what came after a truncation isn't known: 3 isn't its return
    assert script.td_target(batch, next_q, 0.5, 9).tolist() == [[2, 0.5]]
    q, valid = torch.tensor([[[1.0, 2]], [[3.0, 4]]]), torch.tensor([[1.0, 0]])
    assert script.td_loss(q, torch.tensor([[0.0, 9]]), valid) == (1 + 9) / 2
    assert script.td_loss(q, torch.tensor([[1.0, 1]]), torch.ones(1, 2)) == (0 + 1 + 4 + 9) / 4
    policy = torch.tensor([[[[0.0, 5], [2, 1]]], [[[1.0, 1], [1, 7]]]])  # [2, 1, 2, 2]
    gap = script.calql_gap(q, policy, torch.tensor([2.0]), valid, True)
    assert gap.item() == (2 + 5 + 2 + 2 + 2 + 2 + 2 + 7) / 8 - (1 + 3) / 2
    assert script.calql_gap(q, policy, torch.tensor([2.0]), valid, False).item() == 18 / 8 - 2
    assert script.q_loss(torch.tensor([[1.0, 3]]), False) == -2
    assert script.q_loss(torch.tensor([[1.0, -3]]), True).item() == pytest.approx(0.5)


def test_the_critic_learns_returns_and_the_actor_follows_it():
    """Stage 2's two steps in isolation: held to Monte-Carlo returns, Q finds them; the actor then climbs Q."""
    args, _, agent, data = toy(upsample_steps=1, holdout=0.0, cql_alpha=0.0, return_mix=1.0, bc_weight=0.0)
    data.feature = torch.randn(11, agent.feature_dim, generator=torch.Generator().manual_seed(1))
    optimizer, g = torch.optim.Adam(agent.critic.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    rows = torch.cat([data.critic_rows] * 2)
    for _ in range(150):
        logs = script.update_critic(agent, optimizer, data.gather(rows), args, g)
    batch = data.gather(rows)
    q = agent.critic(batch.feature, batch.chunk[:, None])[:, :, 0]
    known = batch.valid * batch.terminated[:, None]  # a truncated episode has no return to be held to
    assert ((q - batch.mc_return[:, None]).abs() * known).max() < 0.1 and logs["losses/td"] < 0.01
    distance = [(a - b).abs().max().item() for a, b in zip(agent.critic.parameters(), agent.target_critic.parameters())]
    assert 0 < max(distance)
    before, critic = agent.critic(batch.feature, agent.actor(batch.feature)[:, None], num=1).mean().item(), q.clone()
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=1e-3)
    for _ in range(20):
        script.update_actor(agent, optimizer, batch, args)
    assert agent.critic(batch.feature, agent.actor(batch.feature)[:, None], num=1).mean().item() > before
    torch.testing.assert_close(agent.critic(batch.feature, batch.chunk[:, None])[:, :, 0], critic)  # only the actor


def test_imitation_holds_the_actor_to_the_data():
    args, _, agent, data = toy(upsample_steps=1, holdout=0.0, q_weight=0.0)
    data.feature = torch.randn(11, agent.feature_dim, generator=torch.Generator().manual_seed(1))
    optimizer, batch = torch.optim.Adam(agent.actor.parameters(), lr=3e-3), data.gather(data.critic_rows)
    for _ in range(150):
        logs = script.update_actor(agent, optimizer, batch, args)
    assert logs["losses/bc"] < 0.01 and logs["losses/actor"] == logs["losses/bc"]


# --- object positions and demonstrations ---


@pytest.mark.parametrize("env_id", ["PushCube-v1", "PickCube-v1", "StackCube-v1"])
def test_where_objects_start(env_id):
    seen = {}
    for spawn in ("random", "fixed", "ood"):
        args = script.Args(env_id=env_id, obs_mode="state", spawn=spawn, device="cpu")
        script.validate(args)
        env, found = script.make_maniskill(args), []
        for seed in (3, 4, 3):
            obs = env.reset(seed=seed)[0]["proprio"]
            bodies = list(SPAWN[env_id]) + (["goal_region"] if env_id == "PushCube-v1" else [])
            found.append(np.concatenate([getattr(env.unwrapped, b).pose.p[0].numpy() for b in bodies]))
            hand = env.unwrapped.agent.tcp_pose.p[0].numpy()
            from_hand = found[-1] - np.resize(hand, len(found[-1]))
            assert np.isclose(obs[..., None], from_hand, atol=1e-6).any(1).all()  # what is seen is where it is
        env.close()
        assert np.array_equal(found[0], found[2])
        seen[spawn] = np.stack(found[:2])
    (half, fixed, _, _), picked = next(iter(SPAWN[env_id].values())), {k: v[:, :2] for k, v in seen.items()}
    assert (np.abs(picked["random"]) <= half).all() and np.ptp(picked["random"], axis=0).max() > 0.005
    assert np.abs(picked["fixed"] - fixed).max() < 1e-6
    assert (np.abs(picked["ood"]) > np.array(half) + 0.005).any(1).all() and np.ptp(picked["ood"], axis=0).max() > 1e-3
    if env_id == "PushCube-v1":  # the target stays where it was, seen from the cube
        for found in seen.values():
            np.testing.assert_allclose(found[:, 3:5] - found[:, :2], [[0.2, 0]] * 2, atol=1e-6)
    if env_id == "StackCube-v1":
        np.testing.assert_allclose(seen["ood"][:, 3:], seen["random"][:, 3:], atol=1e-6)
        assert np.abs(seen["fixed"][:, 3:5] - [0, -0.1]).max() < 1e-6


@pytest.fixture(scope="module")
def upsampled(place):
    """The session's demonstrations, replayed and recorded on after their success."""
    args = tiny_args(place, place)
    script.validate(args)
    return load_demos(args, script.make_env)


def test_demonstrations_go_on_after_success(place, demos, upsampled):
    """Reward upsampling: at least 8 steps are recorded after the first success; before it nothing changes."""
    assert (upsampled.lengths >= upsampled.steps + 8).all() and (demos.lengths < demos.steps + 8).all()
    assert np.array_equal(upsampled.steps, demos.steps)
    for a, b, n, steps in zip(upsampled.starts(), demos.starts(), demos.lengths, demos.steps):
        assert np.array_equal(upsampled.action[a : a + n], demos.action[b : b + n])
        assert np.array_equal(upsampled.obs["proprio"][a : a + n + 1], demos.obs["proprio"][b : b + n + 1])
        assert not upsampled.success[a : a + steps - 1].any() and upsampled.success[a + steps - 1 : a + steps + 8].all()
        held = upsampled.action[a + n : a + steps + 8]
        assert not held[:, :-1].any() and (held[:, -1] == upsampled.action[a + n - 1, -1]).all() and len(held)
        moved = np.diff(upsampled.obs["proprio"][a + steps + 5 : a + steps + 9], axis=0)
        assert np.abs(moved).max() < 0.02  # the hand stands still


def test_demonstrations_from_another_start(tmp_path):
    args = tiny_args(tmp_path, tmp_path, spawn="ood", num_demos=1, holdout=0.0, upsample_steps=2)
    check_flags(args, script.LIMITS)
    demos = load_demos(args, script.make_env)
    assert demos.source.endswith("-ood") and demos.success.sum() >= 3
    env = script.make_maniskill(args)
    env.reset(seed=0)
    y = env.unwrapped.obj.pose.p[0, 1].item()
    hand = env.unwrapped.agent.tcp_pose.p[0, 1].item()
    env.close()
    assert np.isclose(demos.obs["proprio"][0], y - hand, atol=1e-6).any() and y > 0.105


# --- runs ---


@pytest.fixture(scope="module")
def own_run(place, upsampled, tmp_path_factory):
    """An undisturbed run: its folder, and the weights at the start, after stage 1 and at the end."""
    starts, enter = {}, Run.enter

    def watched(self, stage):
        going_in = enter(self, stage)
        starts[stage] = {k: v.clone() for k, v in self.agent.state_dict().items()}
        return going_in

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Run, "enter", watched)
        folder = script.main(tiny_args(place, tmp_path_factory.mktemp("runs"), run_name="whole"))
    return folder, starts | {"end": weights(folder)}


def test_what_learns_in_which_stage(own_run):
    seen = own_run[1]
    for stage, after, learn in [("sft", "offline", {"backbone", "actor"}),
                                ("offline", "end", {"actor", "target_actor", "critic", "target_critic"})]:  # fmt: skip
        for part in ("backbone", "actor", "target_actor", "critic", "target_critic"):
            names = [k for k in seen[stage] if k.startswith(part + ".") and not k.endswith((".k.bias", "unit"))]
            names = [k for k in names if ".text." not in k]
            moved = [k for k in names if not torch.equal(seen[stage][k], seen[after][k])]
            if part == "target_actor" and stage == "sft":  # becomes a copy of the cloned policy
                assert all(torch.equal(seen[after][k], seen[after][k.removeprefix("target_")]) for k in names)
            else:
                assert bool(moved) == (part in learn) and (not moved or len(moved) > 0.9 * len(names)), (stage, part)


def test_the_critics_may_start_before_the_actor(place, upsampled, tmp_path):
    """The same draws of batches, so after two updates the critics are the same, and only the actors differ."""
    runs = [
        script.main(tiny_args(place, tmp_path, run_name=str(first), critic_first=first, offline_updates=2 - first,
                              sft_updates=2, eval_episodes=1, actor_lr=1e-3, cql_alpha=0.0, return_mix=1.0))
        for first in (0, 2)
    ]  # fmt: skip
    both, late = (weights(folder) for folder in runs)
    for name, value in late.items():
        if name.startswith("critic."):
            assert torch.equal(value, both[name]), name
    for k in (k for k in late if k.startswith("actor.")):  # the target still is the cloned policy
        assert torch.equal(late[k], late[f"target_{k}"]), k
    size = [(both[k] - late[k]).abs().max().item() for k in both if k.startswith("actor.net")]
    assert size and all(1e-3 < x <= 2.1e-3 for x in size)  # two steps of Adam, at the actor's own rate


def test_metrics_and_summary(own_run):
    names = {line.split(",")[2] for line in metrics(own_run[0])}
    assert names >= {
        "losses/bc", "losses/td", "losses/calql", "losses/critic", "losses/q", "losses/actor", "values/q_data",
        "values/q_policy", "values/td_target", "values/mc_return", "calib/bound_rate", "val/td_error", "val/q_data",
        "val/q_policy", "val/mc_return", "val/bc", "eval/success_once", "grad_norm/sft", "lr/sft",
    }  # fmt: skip
    assert not [line for line in metrics(own_run[0])[1:] if not math.isfinite(float(line.split(",")[3]))]
    summary = json.loads((own_run[0] / "summary.json").read_text())
    assert [e["stage"] for e in summary["evaluations"]] == ["sft", "offline"]
    assert summary["success_interval"][0] <= summary["success_once"] <= summary["success_interval"][1]
    assert summary["spawn"] == "random" and summary["demo_steps_to_success"] > 0
    assert json.loads((own_run[0] / "config.json").read_text())["script"] == "co_rft_chunked.py"


@pytest.fixture
def asked(monkeypatch):
    """Where the objects of each environment were asked to start."""
    spawns, init = [], Spawn.__init__

    def watched(self, env, env_id, spawn):
        spawns.append(spawn)
        init(self, env, env_id, spawn)

    monkeypatch.setattr(Spawn, "__init__", watched)
    return spawns


def test_eval_only_can_look_elsewhere_too(own_run, capsys, asked):
    summary = json.loads((own_run[0] / "summary.json").read_text())
    for flags in (dict(), dict(eval_elsewhere=True, eval_episodes=1)):
        asked.clear()
        capsys.readouterr()
        script.main(script.Args(eval_only=str(own_run[0]), device="cpu", **flags))
        printed = json.loads(capsys.readouterr().out)
        assert set(asked) == ({"random", "ood"} if flags else {"random"})
        assert printed["eval/num_episodes"] == (1 if flags else 2)
        assert ("eval/success_once_ood" in printed) == bool(flags)
        assert flags or printed["eval/success_once"] == summary["success_once"]


def test_evaluation_elsewhere_changes_nothing_else(own_run, place, upsampled, tmp_path):
    folder = script.main(tiny_args(place, tmp_path, run_name="whole", eval_elsewhere=True))
    summary, other = (json.loads((f / "summary.json").read_text()) for f in (folder, own_run[0]))
    assert summary["success_once"] == other["success_once"]
    assert all("eval/success_once_ood" in e for e in summary["evaluations"])
    own, elsewhere = [], []
    for line in metrics(folder):
        (elsewhere if line.split(",")[2].endswith("_ood") else own).append(line)
    assert own == metrics(own_run[0])
    assert sum(",eval/success_once_ood," in line for line in elsewhere) == 2


@pytest.mark.parametrize("flags", [
    dict(critic_len=1, calibrate=False, cql_samples=1, critic_updates=1),
    dict(holdout=0.0, bc_weight=0.0, q_normalize=False, return_mix=0.0, chunk_len=1),
], ids=["ablations", "the paper's actor, single steps"])  # fmt: skip
def test_settings_at_the_edge_run(flags, place, upsampled, tmp_path):
    folder = script.main(tiny_args(place, tmp_path, sft_updates=2, offline_updates=2, eval_episodes=1, **flags))
    assert all(value.isfinite().all() for value in weights(folder).values())
    assert len(json.loads((folder / "summary.json").read_text())["evaluations"]) == 2


def test_from_a_run_of_bc(place, upsampled, tmp_path, monkeypatch):
    """--sft-checkpoint: the same policy in the place of stage 1; another head, task or size is refused."""
    small = dict(env_id="PushCube-v1", obs_mode="state", cameras="primary", device="cpu", num_demos=4, updates=3,
                 max_episode_steps=10, hidden_dim=24, chunk_len=3, batch_size=8, eval_episodes=1, video_episodes=0,
                 runs=str(tmp_path), demo_dir=str(place / "demos"), holdout=0.25, num_envs=1, proprio_noise=0.0,
                 image_size=64)  # fmt: skip
    start = bc.main(bc.Args(**small, head="mse-chunk", run_name="bc"))
    args = tiny_args(place, tmp_path, run_name="rl", sft_checkpoint=str(start), critic_first=4, offline_updates=0,
                     eval_episodes=1)  # fmt: skip
    folder = script.main(dataclasses.replace(args))
    one, other = weights(start), weights(folder)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name  # the actor never moved
    first = json.loads((folder / "summary.json").read_text())["evaluations"][0]
    assert first["eval/return"] == json.loads((start / "summary.json").read_text())["evaluations"][-1]["eval/return"]
    assert not any(",lr/sft," in line for line in metrics(folder))
    config = json.loads((start / "config.json").read_text())
    config["args"]["head"] = "consistency"
    (start / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained with --head consistency, not mse-chunk"):
        script.main(dataclasses.replace(args, run_name="bad"))
    with pytest.raises(UserError, match="--control-freq 10, not 20"):
        script.main(dataclasses.replace(args, run_name="bad", control_freq=20))
    config["args"]["head"] = "mse-chunk"
    (start / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--holdout 0.25, not 0.5"):  # it has seen what would be held out here
        script.main(dataclasses.replace(args, run_name="bad", holdout=0.5))
    assert not (tmp_path / "bad").exists()


def test_a_resumed_run_keeps_the_action_box_of_its_start(place, upsampled, tmp_path, monkeypatch):
    """Chunks are in the units of the policy that is loaded, not of the demonstrations."""
    boxes, init = [], script.ChunkData.__init__

    def watched(self, demos, agent, args):
        init(self, demos, agent, args)
        boxes.append(self.action)

    monkeypatch.setattr(script.ChunkData, "__init__", watched)

    def wider(agent, args, **flags):
        if not args.resume:
            agent.action_scale.mul_(1.5)

    monkeypatch.setattr(script, "load_sft_weights", wider)
    monkeypatch.setattr(script, "check_sft", lambda *_, **flags: None)
    args = tiny_args(place, tmp_path, run_name="rl", sft_checkpoint="somewhere", offline_updates=0, eval_episodes=1)
    folder = script.main(args)
    script.main(script.Args(resume=str(folder), device="cpu"))
    assert torch.equal(boxes[0], boxes[1])


@pytest.mark.parametrize("flags, words", [
    (dict(critic_len=4), "--critic-len"), (dict(critic_dim=30), "--critic-dim"), (dict(holdout=0.9), "--holdout"),
    (dict(spawn="ood", env_id="PlaceSphere-v1"), "--spawn"),
    (dict(spawn="fixed", demo_path="a.h5"), "--demo-path"), (dict(eval_elsewhere=True, env_id="PlaceSphere-v1"), "--spawn"),
    (dict(tau=1.5), "--tau"), (dict(gamma=1.0), "--gamma"), (dict(cql_samples=0), "--cql-samples"), (dict(backbone="octo-small"), "--backbone"),
    (dict(sft_checkpoint="nowhere"), "nowhere is no run folder"), (dict(env_id="Nothing-v0"), "--env-id"),
], ids=str)  # fmt: skip
def test_flags_that_cannot_be(flags, words, place, tmp_path):
    with pytest.raises(UserError, match=words):
        script.main(tiny_args(place, tmp_path, **flags))
    assert not list(tmp_path.iterdir())


def test_flags_by_mode_task_and_preset():
    def parsed(*flags):
        return parse_flags(script.Args, script.__doc__, script.TABLES, list(flags))

    state = ["--obs-mode", "state"]
    push = parsed("--env-id", "PushCube-v1", *state)
    assert (push.num_demos, push.num_envs, push.proprio_noise, push.actor_until) == (50, 1, 0.0, "success")
    assert parsed("--env-id", "PickCube-v1", *state).actor_until == "rest"
    assert parsed("--env-id", "PushCube-v1", *state, "--actor-until", "rest").actor_until == "rest"
    paper = parsed("--preset", "paper", "--num-demos", "60")
    table = script.BY_PRESET["paper"]
    assert paper.num_demos == 60 and all(getattr(paper, k) == v for k, v in table.items() if k != "num_demos")
