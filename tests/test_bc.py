"""bc.py: its data, heads and losses against numbers worked out here, and short real runs."""

import dataclasses
import json
import shutil

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT

import bc as script
import force_octo

TINY = dict(
    env_id="PushCube-v1", obs_mode="state", device="cpu", num_demos=4, max_episode_steps=10, hidden_dim=24,
    chunk_len=3, updates=8, batch_size=8, noise_levels=2, holdout=0.25, val_freq=4, eval_episodes=2, video_episodes=0,
    log_freq=1, checkpoint_freq=3,
)  # fmt: skip
HEADS = ("consistency", "diffusion", "mse-chunk")


def tiny_args(place, folder, **changes):
    return script.Args(**TINY | dict(demo_dir=str(place / "demos"), runs=str(folder)) | changes)


def toy_demos(rows=5, episodes=4):
    """Episodes of rows - 1 steps whose actions count up; the unused last action of each is 9."""
    action = np.arange(rows * episodes, dtype=np.float32)[:, None] / 100 * np.array([1, -1, 1], np.float32)
    action[rows - 1 :: rows] = 9
    lengths = np.full(episodes, rows - 1)
    obs = {"proprio": np.random.default_rng(0).normal(size=(rows * episodes, 4)).astype(np.float32)}
    return script.Demos(obs, action, lengths, lengths, "toy")


def metrics(folder) -> list[str]:
    """Rows of metrics.csv that don't depend on the clock."""
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if ",time/" not in line]


def test_chunks_end_with_the_episode_and_keep_still():
    demos = toy_demos()
    policy = script.Policy(script.Args(obs_mode="state", chunk_len=3), demos)
    chunks = script.Chunks(demos, policy, 0.5)
    assert chunks.train.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and chunks.held.tolist() == [
        10,
        11,
        12,
        13,
        15,
        16,
        17,
        18,
    ]
    box = policy.normalise(demos.action)
    chunk = chunks.chunk(torch.tensor([0, 2, 3])).view(3, 3, 3).numpy()
    still = [0, 0, box[3, 2]]  # delta control: no motion, the gripper stays as it was
    np.testing.assert_allclose(chunk[0], box[:3])
    np.testing.assert_allclose(chunk[1], [box[2], box[3], still])
    np.testing.assert_allclose(chunk[2], [box[3], still, still])
    assert len(script.Chunks(demos, policy, 0.0).held) == 0 and len(script.Chunks(demos, policy, 0.01).held) == 4


def test_mse_loss_and_action_error():
    predicted, chunk = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert script.mse_loss(predicted, chunk).tolist() == [0.5, 5.0]
    error = script.action_error(predicted[:, None], chunk[:, None], torch.tensor([0.5, 3.0]))
    assert error.tolist() == pytest.approx([(4 + 4) / 2, (0 + 1) / 2])


@pytest.mark.parametrize("head", HEADS)
def test_heads_learn_a_constant_chunk(head):
    """In a moment, and in the box's units: what comes out of `act` is the chunk that went into the loss."""
    torch.manual_seed(0)
    demos = toy_demos()
    policy = script.Policy(script.Args(obs_mode="state", chunk_len=2, head=head, hidden_dim=32), demos)
    chunk = torch.tensor([[0.3, -0.2, 0.6, 0.1, -0.3, 0.5]]).repeat(64, 1)
    feature, g = torch.zeros(64, policy.feature_dim), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.actor.parameters(), lr=3e-3)
    for _ in range(600):
        loss = policy.loss(feature, chunk, g, 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        actions = policy.act(feature, g)
    assert actions.shape == (64, 2, 3) and np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions.mean(0).ravel(), chunk[0], atol=0.06)


@pytest.mark.parametrize("head", HEADS)
def test_a_run_resumed_after_a_kill_equals_an_uninterrupted_one(head, place, tmp_path, monkeypatch):
    whole = script.main(tiny_args(place, tmp_path, head=head, run_name="whole"))
    before = script.Policy(
        script.Args(**json.loads((whole / "config.json").read_text())["args"]),
        script.load_demos(tiny_args(place, tmp_path)),
    )
    weights = script.load_checkpoint(whole)[0]
    assert weights.keys() == before.state_dict().keys()
    args, real, done = tiny_args(place, tmp_path, head=head, run_name="killed"), script.Logger.log, []

    def killed(self, values, step, update):
        if update == 5 and not done:
            done.append(update)
            raise KeyboardInterrupt
        real(self, values, step, update)

    monkeypatch.setattr(script.Logger, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main(args)
    assert (tmp_path / "killed" / "checkpoints" / "latest").read_text() == "update-3"
    again = script.main(script.Args(resume=str(tmp_path / "killed"), device="cpu"))
    assert metrics(again) == metrics(whole)
    for key, value in script.load_checkpoint(again)[0].items():
        assert torch.equal(value, weights[key]), key
    summary = json.loads((again / "summary.json").read_text())
    assert summary["success_interval"][0] <= summary["success_once"] <= summary["success_interval"][1]
    names = {line.split(",")[2] for line in metrics(again)}
    assert {"losses/bc", "grad_norm/bc", "val/loss", "val/action_error", "eval/success_once"} <= names


def test_what_is_trained(place, tmp_path, monkeypatch):
    """Everything, or the head alone; held-out episodes are never drawn."""
    args = tiny_args(place, tmp_path, checkpoint_freq=100)
    script.validate(args)
    demos = script.load_demos(args)
    for finetune in ("full", "head"):
        run = script.Run(dataclasses.replace(args, finetune=finetune), tmp_path, demos)
        start = {k: v.clone() for k, v in run.policy.state_dict().items()}
        drawn, chunk = [], run.chunks.chunk
        monkeypatch.setattr(
            run.chunks, "chunk", lambda rows, chunk=chunk, drawn=drawn: (drawn.append(rows), chunk(rows))[1]
        )
        monkeypatch.setattr(run, "validate", lambda: {"val/action_error": torch.tensor(0.0)})
        script.train(run, type("Quiet", (), {"log": lambda *_: None}))
        drawn = torch.cat(drawn)
        assert torch.isin(drawn, run.chunks.train).all() and not torch.isin(drawn, run.chunks.held).any()
        moved = {k for k, v in run.policy.state_dict().items() if not torch.equal(v, start[k])}
        own = {name for name, _ in run.policy.named_parameters()}
        head = {name for name in own if name.startswith("actor.")}
        expected = head if finetune == "head" else own
        assert moved <= expected and len(moved) >= 0.9 * len(expected), expected - moved
        averaged = run.acting.state_dict()
        assert any(
            not torch.equal(averaged[k], start[k]) and not torch.equal(averaged[k], run.policy.state_dict()[k])
            for k in head
        )


def test_evaluating_on_the_way_changes_nothing(place, tmp_path):
    plain = script.main(tiny_args(place, tmp_path, run_name="plain"))
    often = script.main(tiny_args(place, tmp_path, run_name="often", eval_freq=3))
    losses = [[line for line in metrics(f) if ",losses/" in line] for f in (plain, often)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert len(json.loads((often / "summary.json").read_text())["evaluations"]) == 3


def test_eval_only_and_foreign_runs(place, tmp_path, capsys):
    folder = script.main(tiny_args(place, tmp_path, run_name="run"))
    capsys.readouterr()
    script.main(script.Args(eval_only=str(folder), device="cpu"))
    printed = json.loads(capsys.readouterr().out)
    assert printed["eval/success_once"] == json.loads((folder / "summary.json").read_text())["success_once"]
    with pytest.raises(script.UserError, match="exists"):
        script.main(tiny_args(place, tmp_path, run_name="run"))
    config = json.loads((folder / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text(json.dumps(config | {"script": "force_octo.py"}))
    with pytest.raises(script.UserError, match=r"a run of force_octo\.py"):
        script.main(script.Args(resume=str(other), device="cpu"))
    config["args"]["hidden_dim"] = 32
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(script.UserError, match="another task or network"):
        script.main(script.Args(resume=str(other), device="cpu"))


@pytest.mark.parametrize(
    "flags, words",
    [(dict(updates=0), "--updates"), (dict(holdout=1.0), "--holdout"), (dict(ema=1.0), "--ema"),
     (dict(lr=0.0), "--lr"), (dict(env_id="Nothing-v0"), "--env-id"), (dict(backbone="octo-small"), "--backbone")],
    ids=str,
)  # fmt: skip
def test_flags_that_cannot_be(flags, words, place, tmp_path):
    with pytest.raises(script.UserError, match=words):
        script.main(tiny_args(place, tmp_path, **flags))
    assert not list(tmp_path.iterdir())


def test_no_more_than_the_limit_of_its_own_lines():
    """What isn't in a shared block is meant to be read in one sitting."""
    text, shared, own = (ROOT / "bc.py").read_text().splitlines(), False, 0
    for line in text:
        shared = shared or line.startswith("# --- shared:")
        own += not shared
        shared = shared and line != "# --- end shared ---"
    assert own <= 450


def test_reinforcement_learning_starts_from_a_run(place, tmp_path):
    """--sft-checkpoint: the same policy, the same evaluation, no stage 0; another head or size is refused."""
    folder = script.main(tiny_args(place, tmp_path, run_name="bc", hidden_dim=24, eval_episodes=2))
    args = conftest.tiny_args(
        place, runs=str(tmp_path), run_name="rl", sft_checkpoint=str(folder), online_steps=0, warmup=False
    )
    learned = force_octo.main(dataclasses.replace(args, offline_updates=2))
    bc, rl_summary = (json.loads((f / "summary.json").read_text()) for f in (folder, learned))
    assert rl_summary["evaluations"][0]["eval/return"] == bc["evaluations"][-1]["eval/return"]
    assert not any(",lr/sft," in line for line in metrics(learned))
    weights, start = script.load_checkpoint(learned)[0], script.load_checkpoint(folder)[0]
    shared = [k for k in start if not k.startswith("actor.")]
    assert len(shared) > 20 and all(torch.equal(weights[k], start[k]) for k in shared)
    assert json.loads((learned / "config.json").read_text())["weights"] == str(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["args"]["cameras"]  # a run from before there was a choice: one camera
    (folder / "config.json").write_text(json.dumps(config))
    script.main(script.Args(eval_only=str(folder), device="cpu"))
    force_octo.validate(dataclasses.replace(args))
    with pytest.raises(force_octo.UserError, match="was trained with --cameras primary, not both"):
        force_octo.validate(dataclasses.replace(args, cameras="both"))
    mse = script.main(tiny_args(place, tmp_path, run_name="mse", head="mse-chunk"))
    bad = {
        "another task or network": [dict(hidden_dim=32)],
        "was trained with --head mse-chunk, not consistency": [dict(sft_checkpoint=str(mse))],
        "is no run folder": [dict(sft_checkpoint=str(tmp_path / "no"))],
        "was trained with --control-freq 10, not 20": [dict(control_freq=20)],  # the same shapes
        "was trained with --env-id PushCube-v1, not PullCube-v1": [dict(env_id="PullCube-v1")],
    }
    for words, changes in bad.items():
        for change in changes:
            with pytest.raises(force_octo.UserError, match=words):
                force_octo.main(dataclasses.replace(args, run_name="bad", **change))
    assert not (tmp_path / "bad").exists()
