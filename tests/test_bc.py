"""bc.py: its chunks, heads and losses against numbers worked out here, and short real runs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import as_flags, differences, rows, tiny_args, weights

import bc as script
import force_octo
from backbones.units import adamw, set_lr
from plumbing import Demos, Run, UserError, load_demos, load_sft_weights, parse_flags

HEADS = ("consistency", "diffusion", "mse-chunk")
TINY = dict(noise_levels=2, holdout=0.25, val_freq=4, checkpoint_freq=3)


def args_of(place, folder, **changes):
    return tiny_args(place, script, **TINY | dict(runs=str(folder)) | changes)


def toy_demos(rows=5, episodes=4):
    """Episodes of rows - 1 steps whose actions count up; the unused last action of each is 9."""
    action = np.arange(rows * episodes, dtype=np.float32)[:, None] / 100 * np.array([1, -1, 1], np.float32)
    action[rows - 1 :: rows] = 9
    lengths = np.full(episodes, rows - 1)
    obs = {"proprio": np.random.default_rng(0).normal(size=(rows * episodes, 4)).astype(np.float32)}
    return Demos(obs, action, lengths, lengths, "toy")


def test_chunks_end_with_the_episode_and_keep_still():
    demos = toy_demos()
    agent = script.Agent(script.Args(obs_mode="state", chunk_len=3), demos)
    chunks = script.Chunks(demos, agent, 0.5)
    assert chunks.train.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]  # rows 4 and 9 are observations without an action
    assert chunks.held.tolist() == [10, 11, 12, 13, 15, 16, 17, 18]
    box = agent.normalise(demos.action)
    chunk = chunks.at(torch.tensor([0, 2, 3])).view(3, 3, 3).numpy()
    still = [0, 0, box[3, 2]]  # delta control: no motion, the gripper stays as it was
    np.testing.assert_allclose(chunk[0], box[:3])
    np.testing.assert_allclose(chunk[1], [box[2], box[3], still])
    np.testing.assert_allclose(chunk[2], [box[3], still, still])
    assert len(script.Chunks(demos, agent, 0.0).held) == 0
    assert len(script.Chunks(demos, agent, 0.01).held) == 4
    drawn = chunks.draw(500, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(chunks.train.tolist())


def test_mse_loss_and_action_error():
    predicted, chunk = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert script.mse_loss(predicted, chunk).tolist() == [0.5, 5.0]
    error = script.action_error(predicted[:, None], chunk[:, None], torch.tensor([0.5, 3.0]))
    assert error.tolist() == pytest.approx([(4 + 4) / 2, (0 + 1) / 2])


@pytest.mark.parametrize("head", HEADS)
def test_heads_learn_a_constant_chunk(head):
    """In a moment, and in the box's units: what comes out of `act` is the chunk that went into the loss."""
    torch.manual_seed(0)
    agent = script.Agent(script.Args(obs_mode="state", chunk_len=2, head=head, hidden_dim=32), toy_demos())
    chunk = torch.tensor([[0.3, -0.2, 0.6, 0.1, -0.3, 0.5]]).repeat(64, 1)
    feature, generator = torch.zeros(64, agent.feature_dim), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=3e-3)
    for _ in range(600):
        loss = script.bc_loss(agent, feature, chunk, generator, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        actions = agent.act(feature, generator)
    assert actions.shape == (64, 2, 3) and np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions.mean(0).ravel(), chunk[0], atol=0.06)


@pytest.mark.parametrize("head", HEADS)
def test_a_run_resumed_after_a_kill_equals_an_uninterrupted_one(head, place, tmp_path, monkeypatch):
    whole = script.main(args_of(place, tmp_path, head=head, run_name="whole"))
    tick = Run.tick

    def killed(self, *rest, **more):
        tick(self, *rest, **more)
        if self.updates == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "tick", killed)
        with pytest.raises(KeyboardInterrupt):
            script.main(args_of(place, tmp_path, head=head, run_name="killed"))
    assert (tmp_path / "killed" / "checkpoints" / "latest").read_text() == "update-3"
    again = script.main(script.Args(resume=str(tmp_path / "killed"), device="cpu"))
    assert differences(whole, again) == []
    summary = json.loads((again / "summary.json").read_text())
    assert summary["success_interval"][0] <= summary["success_once"] <= summary["success_interval"][1]
    assert "sft_success_once" not in summary  # there is one stage only
    names = {name for _, _, name, _ in rows(again)}
    assert {"losses/bc", "grad_norm/bc", "lr/bc", "val/loss", "val/action_error", "eval/success_once"} <= names


def test_validation_losses_are_those_of_the_checkpoint_they_are_logged_with(place, tmp_path, monkeypatch):
    """A kill right after a checkpoint at an update that also validates loses no row."""
    whole = script.main(args_of(place, tmp_path, run_name="whole", checkpoint_freq=4))
    save = Run.save

    def killed(self):
        save(self)
        if self.updates == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            script.main(args_of(place, tmp_path, run_name="killed", checkpoint_freq=4))
    again = script.main(script.Args(resume=str(tmp_path / "killed"), device="cpu"))
    assert differences(whole, again) == []
    assert [update for _, update, name, _ in rows(again) if name == "val/loss"] == [4, 8]


@pytest.mark.parametrize("finetune", ["full", "head"])
def test_what_is_trained(finetune, place, tmp_path, monkeypatch):
    """Everything, or the head alone; held-out episodes are never drawn; the averaged weights are those kept."""
    kept, drawn, agents = {}, [], []
    keep, draw = Run.keep, script.Chunks.draw

    def watched_keep(self, acting, raw, **parts):
        kept.update({name: value.clone() for name, value in raw.state_dict().items()})
        agents.append((acting, raw))
        keep(self, acting, raw=raw, **parts)

    def watched_draw(self, *rest):
        drawn.append((draw(self, *rest), self))
        return drawn[-1][0]

    monkeypatch.setattr(Run, "keep", watched_keep)
    monkeypatch.setattr(script.Chunks, "draw", watched_draw)
    folder = script.main(args_of(place, tmp_path, finetune=finetune))
    rows_drawn, chunks = torch.cat([rows for rows, _ in drawn]), drawn[0][1]
    assert torch.isin(rows_drawn, chunks.train).all() and not torch.isin(rows_drawn, chunks.held).any()
    acting, raw = agents[0]
    moved = {name for name, value in raw.state_dict().items() if not torch.equal(value, kept[name])}
    own = {name for name, _ in raw.named_parameters()}
    head = {name for name in own if name.startswith("actor.")}
    expected = head if finetune == "head" else own
    assert moved <= expected and len(moved) >= 0.9 * len(expected), expected - moved
    averaged = acting.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in weights(folder).items())
    assert any(
        not torch.equal(averaged[k], kept[k]) and not torch.equal(averaged[k], raw.state_dict()[k]) for k in head
    )


def test_eval_only_prints_the_last_evaluation(place, tmp_path, capsys):
    folder = script.main(args_of(place, tmp_path, run_name="run"))
    capsys.readouterr()
    script.main(script.Args(eval_only=str(folder), device="cpu"))
    printed = json.loads(capsys.readouterr().out)
    last = json.loads((folder / "summary.json").read_text())["evaluations"][-1]
    assert {name: last[name] for name in printed} == printed
    with pytest.raises(UserError, match="exists"):
        script.main(args_of(place, tmp_path, run_name="run"))


@pytest.mark.parametrize(
    "flags, words",
    [(dict(updates=0), "--updates"), (dict(holdout=1.0), "--holdout"), (dict(lr=0.0), "--lr"),
     (dict(env_id="Nothing-v0"), "--env-id"), (dict(backbone="octo-small"), "--backbone"),
     (dict(chunk_len=20), "--max-episode-steps 10 is shorter than --chunk-len 20")],
    ids=str,
)  # fmt: skip
def test_flags_that_cannot_be(flags, words, place, tmp_path):
    with pytest.raises(UserError, match=words):
        script.main(args_of(place, tmp_path, **flags))
    assert not list(tmp_path.iterdir())


def test_privileged_state_takes_fewer_demonstrations():
    state = parse_flags(script.Args, script.__doc__, script.TABLES, ["--obs-mode", "state"])
    assert (state.num_envs, state.num_demos, state.proprio_noise) == (1, 50, 0.0)
    assert parse_flags(script.Args, script.__doc__, script.TABLES, []) == script.Args()
    assert parse_flags(script.Args, script.__doc__, script.TABLES, as_flags(state)) == state


def test_reinforcement_learning_starts_from_a_run(place, tmp_path):
    """--sft-checkpoint: the same policy, the same evaluation, no stage 0; another head or size is refused."""
    folder = script.main(args_of(place, tmp_path, run_name="bc"))
    args = tiny_args(
        place, runs=str(tmp_path), run_name="rl", sft_checkpoint=str(folder), online_steps=0, warmup=False,
        offline_updates=2,
    )  # fmt: skip
    learned = force_octo.main(dataclasses.replace(args))
    bc_summary, rl_summary = (json.loads((f / "summary.json").read_text()) for f in (folder, learned))
    assert rl_summary["evaluations"][0]["eval/return"] == bc_summary["evaluations"][-1]["eval/return"]
    assert not any(name == "lr/sft" for _, _, name, _ in rows(learned))
    learned_weights, start = weights(learned), weights(folder)
    shared = [k for k in start if not k.startswith("actor.")]
    assert len(shared) > 20 and all(torch.equal(learned_weights[k], start[k]) for k in shared)
    mse = script.main(args_of(place, tmp_path, run_name="mse", head="mse-chunk"))
    bad = {
        "another task or network": dict(hidden_dim=32),
        "was trained with --head mse-chunk, not consistency": dict(sft_checkpoint=str(mse)),
        "is no run folder": dict(sft_checkpoint=str(tmp_path / "no")),
        "is a run of force_octo.py, not of bc.py": dict(sft_checkpoint=str(learned)),
    }
    for words, change in bad.items():
        with pytest.raises(UserError, match=words):
            force_octo.main(dataclasses.replace(args, run_name="bad", **change))
    assert not (tmp_path / "bad").exists()
    faster = dataclasses.replace(args, control_freq=20)  # the same shapes
    with pytest.raises(UserError, match="was trained with --control-freq 10, not 20"):
        load_sft_weights(torch.nn.Linear(1, 1), faster, head="consistency")


def test_the_actor_is_that_of_reinforcement_learning(demos):
    """Same seed, same inputs, equal tensors: names and shapes of the weights, chunks and losses."""
    mine, theirs = (module.ConsistencyActor(5, torch.linspace(0.1, 0.4, 6), 24) for module in (script, force_octo))
    theirs.load_state_dict(mine.state_dict())
    feature = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for module, actor in ((script, mine), (force_octo, theirs)):
        generator = torch.Generator().manual_seed(2)
        chunk = actor.sample(feature, 3, generator, 0.3)
        found.append((chunk, module.consistency_loss(actor, feature, chunk[:, 0], generator, 4)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    mse = script.Agent(script.Args(obs_mode="state", head="mse-chunk"), demos).actor
    assert {"unit", "net.0.weight", "net.1.weight", "net.6.bias"} <= mse.state_dict().keys()  # as co_rft_chunked.py's


def test_demonstrations_are_those_of_the_other_scripts(place, demos, monkeypatch):
    """One cache for all of them."""

    def refuse(*_):
        raise AssertionError("made anew")

    monkeypatch.setattr("subprocess.run", refuse)
    mine = load_demos(tiny_args(place, script), script.make_env)
    np.testing.assert_array_equal(mine.action, demos.action)


def test_weight_decay_is_of_matrices_alone():
    """Without a gradient AdamW multiplies by 1 - lr * decay = 1 - 0.1 * 2; biases and norms stay as they are."""
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    before = {name: value.clone() for name, value in layers.named_parameters()}
    optimizer = adamw(layers, 1.0, 2.0)
    set_lr(optimizer, 0.1)
    for value in layers.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in layers.named_parameters():
        left = 0.8 if name == "0.weight" else 1.0
        torch.testing.assert_close(value, left * before[name])
