"""Short runs of the whole script on real ManiSkill: what learns, what is logged, and what nothing may disturb."""

import csv
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import REACHING, differences, follow_demonstrations, reaching_args, rows, tiny_args, unequal, weights

import force_octo as script
from benchmark import branching
from plumbing import ObsWrapper, Run
from plumbing.evaluation import summary

NAMES = {
    "losses/bc", "losses/td", "losses/calql", "losses/critic", "losses/actor", "losses/q", "values/q_data",
    "values/td_target", "values/mc_return", "values/q_std", "values/q_policy", "values/critic_std", "calib/bound_rate",
    "calib/q_minus_return", "calib/abs_error", "calib/correlation", "vgpd/zeta", "vgpd/pass_rate",
    "vgpd/candidate_std", "vgpd/ess", "buffer/size", "train/success_once", "train/episode_len", "eval/success_once",
    "eval/success_once_low", "eval/success_once_high", "eval/success_at_end", "eval/return",
    "eval/num_episodes", "grad_norm/sft", "grad_norm/actor", "lr/sft",
}  # fmt: skip


@pytest.fixture
def reaching(monkeypatch, place):
    follow_demonstrations(monkeypatch, script, place)


@pytest.fixture(scope="module")
def force(whole):
    return whole("force_octo")


def undefined(folder) -> list:
    """Rows without a value; only a correlation may lack one, where all returns are equal."""
    with (folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))[1:]
    return [r for r in found if not np.isfinite(float(r[3])) and r[2] != "calib/correlation"]


# --- what a run does ---


def changed(force, before, after, part):
    names = [k for k in force.starts[before] if k.startswith(part + ".")]
    assert names, part
    return [k for k in names if not torch.equal(force.starts[before][k], force.starts[after][k])], names


STAGES = ["sft", "offline", "warmup", "online", "end"]
LEARN = {
    "sft": {"backbone", "actor"},
    "offline": {"actor", "critic", "target_critic"},
    "warmup": {"actor", "critic", "target_critic"},
    "online": {"actor", "critic", "target_critic"},
}


@pytest.mark.parametrize("stage", LEARN)
def test_every_network_learns_in_its_stages_only(force, stage):
    after = STAGES[STAGES.index(stage) + 1]
    for part in ("backbone", "actor", "critic", "target_critic"):
        moved, names = changed(force, stage, after, part)
        if part not in LEARN[stage]:
            assert not moved, (part, moved)
        else:  # a bias of all keys of an attention shifts its scores alike, so it has no gradient
            # The instruction never changes, so most words are never read.
            still = {n for n in names if n.endswith((".k.bias", ".unit")) or ".text." in n}  # units are no parameters
            assert set(names) - set(moved) <= still, part
    moved, names = changed(force, stage, after, "actor_ema")
    assert moved, "actor_ema"
    assert not changed(force, stage, after, "backbone")[0] or stage == "sft"


def test_the_units_stay(force):
    for name in ("proprio_mean", "proprio_std", "action_centre", "action_scale"):
        assert torch.equal(force.starts["sft"][name], force.starts["end"][name])


def test_only_training_episodes_are_pushed(force, place):
    pushes = {evaluating: {rest[1] for own, rest in force.asked if own == evaluating} for evaluating in (True, False)}
    assert pushes == {True: {0.0}, False: {tiny_args(place).explore_noise}}
    assert tiny_args(place).explore_noise > 0


def test_metrics(force):
    with (force.folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))[1:]
    assert {r[2] for r in found} - {"eval/episode_len"} == NAMES  # which needs a success
    assert undefined(force.folder) == []
    repeated = [key for key, n in Counter((r[0], r[1], r[2]) for r in found).items() if n > 1]
    assert repeated == []
    steps = [(int(r[0]), int(r[1])) for r in found if not r[2].startswith("eval/")]  # those may come later
    assert steps == sorted(steps)
    assert len(list((force.folder / "tensorboard").iterdir())) == 1


def test_stages_log_what_they_do(force, place):
    args, found = tiny_args(place), rows(force.folder)
    ends = np.cumsum([args.sft_updates, args.offline_updates, args.warmup_updates])

    def logged(name):
        return {u for _, u, n, _ in found if n == name}

    half = ends[1] + args.warmup_updates // 2
    assert logged("grad_norm/sft") == set(range(1, ends[0] + 1))
    assert logged("losses/calql") == set(range(ends[0] + 1, ends[2] + 1))  # not online: Eq. (8)
    last = max(logged("losses/td"))
    critic_alone = set(range(ends[1] + 1, half + 1))
    assert logged("losses/bc") == set(range(1, last + 1)) - critic_alone
    assert logged("vgpd/zeta") == logged("losses/q") == set(range(ends[2] + 1, last + 1))
    assert logged("calib/q_minus_return") == {ends[1], ends[2]}  # before and after stage 2
    before = max(g for g, u, n, _ in found if u == ends[2] and n == "eval/return")  # env steps when stage 3 began
    assert last - ends[2] == int(args.utd_ratio * (found[-1][0] - before))
    values = [float(v) for _, _, n, v in found if n in ("values/td_target", "values/mc_return")]
    assert min(values) >= 0 and max(values) <= 1  # the range of returns with rewards 0 and 1


def test_config_and_summary(force):
    config = json.loads((force.folder / "config.json").read_text())
    assert config["script"] == "force_octo.py"
    assert config["args"]["K"] == 4 and config["args"]["env_id"] == "PushCube-v1"
    assert config["weights"] == "random"
    assert config["packages"]["torch"] == torch.__version__ and config["packages"]["mani_skill"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", config["git_commit"])
    summary = json.loads((force.folder / "summary.json").read_text())
    assert summary["env_id"] == "PushCube-v1" and summary["seed"] == 1 and summary["demonstrations"]
    last = summary["evaluations"][-1]
    for name in ("success_once", "success_at_end"):
        assert summary[name] == last[f"eval/{name}"]
    low, high = summary["success_interval"]
    assert 0 <= low <= summary["success_once"] <= high <= 1
    assert summary["steps_to_success"] == last.get("eval/episode_len")
    assert summary["online_env_steps"] >= 150 and summary["env_steps"] > summary["online_env_steps"]
    assert {"sft", "offline", "warmup", "online"} <= summary["seconds_per_stage"].keys()
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_per_stage"].values()))
    assert {"largest_drop", "online_env_steps_at_80", "handover_success_once", "sft_success_once"} <= summary.keys()
    stages = [e["stage"] for e in summary["evaluations"]]
    assert stages[:2] == ["sft", "offline"] and stages.count("online") >= 3  # hand-over, between, last


def test_summary_numbers():
    def evaluation(stage, step, success):
        return {"stage": stage, "global_step": step, "eval/success_once": success, "eval/success_once_low": 0,
                "eval/success_once_high": 1, "eval/success_at_end": 0, "eval/episode_len": 9}  # fmt: skip

    values = [(0, 0.85), (20, 0.6), (30, 0.8), (40, 0.9)]
    evaluations = [evaluation("sft", 0, 0.5), evaluation("offline", 0, 0.1), evaluation("warmup", 100, 0.7)]
    evaluations += [evaluation("online", 110 + step, success) for step, success in values]
    found = summary(evaluations, "online", online_start=100, env_steps=145)
    assert found["online_env_steps_at_80"] == 40  # 85 % at 10 didn't hold
    assert found["largest_drop"] == pytest.approx(0.7 - 0.6) and found["handover_success_once"] == 0.7
    assert found["sft_success_once"] == 0.5 and found["success_once"] == 0.9
    assert found["steps_to_success"] == 9
    assert (found["online_env_steps"], found["env_steps"]) == (45, 145) and found["success_interval"] == [0, 1]
    unconfirmed = summary(evaluations[:4], "online", online_start=100, env_steps=145)
    del evaluations[3]["eval/episode_len"]
    assert summary(evaluations[:4], "online", online_start=100, env_steps=145)["steps_to_success"] is None
    assert unconfirmed["online_env_steps_at_80"] is None and unconfirmed["largest_drop"] == 0


def test_online_checkpoints_do_not_wait_for_an_evaluation(force):
    saves = [updates for stage, updates in force.saves if stage == "online"]
    assert len(saves) > 2 + REACHING["online_steps"] // REACHING["eval_freq"]


# --- what must not change a run ---


def test_evaluation_does_not_change_training(force, place, reaching):
    folder = script.main(reaching_args(place, script, run_name="unwatched", eval_freq=10**6, eval_episodes=1))
    assert [row for row in rows(folder) if not row[2].startswith("eval/")] == [
        row for row in rows(force.folder) if not row[2].startswith("eval/")
    ]
    assert unequal("", weights(force.folder), weights(folder)) == []


def test_evaluation_is_the_same_every_time(force, place, reaching, monkeypatch, capsys):
    """`--eval-only` does, step by step, what the run's last evaluation did."""
    actions, step = [], ObsWrapper.step
    monkeypatch.setattr(ObsWrapper, "step", lambda self, a: (actions.append(np.array(a)), step(self, a))[1])
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in force.folder.rglob("*"))
    script.main(tiny_args(place, eval_only=str(force.folder)))
    printed = capsys.readouterr().out
    metrics = json.loads(printed[printed.index("{") :])
    last = json.loads((force.folder / "summary.json").read_text())["evaluations"][-1]
    assert metrics and metrics.items() <= last.items()
    assert np.array_equal(np.stack(actions).reshape(-1), force.evaluations[-1].reshape(-1))
    assert sorted((p, p.stat().st_mtime_ns) for p in force.folder.rglob("*")) == before  # only looks


def short(place, name, **flags):
    few = dict(sft_updates=2, offline_updates=2, warmup_episodes=1, warmup_updates=2)
    folder = script.main(tiny_args(place, run_name=name, **few | dict(online_steps=10, eval_episodes=1) | flags))
    return folder, {n for _, _, n, _ in rows(folder)}


@pytest.fixture(scope="module")
def plain(place):
    return short(place, "plain")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(place, plain):
    again, _ = short(place, "again")
    assert differences(again, plain[0]) == []
    other, _ = short(place, "other", seed=2, offline_updates=0, warmup=False, online_steps=0)
    losses = [[r for r in rows(f) if r[2] == "losses/bc"][0] for f in (again, other)]
    assert losses[0] != losses[1]


# --- ablations ---


def test_no_vgpd(place, plain):
    _, names = short(place, "no-vgpd", vgpd=False)
    assert {name for name in plain[1] - names if name != "calib/correlation"} == {
        "vgpd/zeta", "vgpd/pass_rate", "vgpd/candidate_std", "vgpd/ess", "values/q_std",
    }  # fmt: skip
    assert names <= plain[1]


def test_finetune_head_trains_the_head_alone(place, monkeypatch):
    starts, enter = {}, Run.enter

    def watched(self, stage):
        going_in = enter(self, stage)
        starts[stage] = {k: v.clone() for k, v in self.agent.state_dict().items()}
        return going_in

    monkeypatch.setattr(Run, "enter", watched)
    short(place, "head", finetune="head", online_steps=0, warmup=False)
    moved = {path.split("/")[1].split(".")[0] for path in unequal("", starts["sft"], starts["offline"])}
    assert moved == {"actor", "actor_ema"}


def test_no_warmup(place, plain):
    folder, names = short(place, "no-warmup", warmup=False)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds_per_stage"]["warmup"] == 0 and summary["env_steps"] == summary["online_env_steps"]
    assert "calib/q_minus_return" not in names and "calib/q_minus_return" in plain[1]
    first = min(u for _, u, n, _ in rows(folder) if n == "vgpd/zeta")
    assert first == 2 + 2 + 1  # right after stage 1


def test_weights_of_the_actor_s_losses(place, monkeypatch):
    """Each stage's own weights; the one of the Q loss moves evenly to its end online."""
    used, update_actor = [], script.update_actor

    def watched(*inputs, bc_weight, q_weight, successes_only=False, **others):
        used.append((bc_weight, q_weight, successes_only))
        return update_actor(*inputs, bc_weight=bc_weight, q_weight=q_weight, successes_only=successes_only, **others)

    monkeypatch.setattr(script, "update_actor", watched)
    weights = dict(bc_weight=0.9, offline_q_weight=0.2, distill_weight=0.7, q_weight=0.5, q_growth=0.2)
    folder, _ = short(place, "weights", online_steps=40, success_filter=True, **weights)
    result = json.loads((folder / "summary.json").read_text())
    start = result["env_steps"] - result["online_env_steps"]
    share = [min((g - start) / 40, 1.0) for g, _, n, _ in rows(folder) if n == "vgpd/zeta"]
    assert 0 < share[0] < share[-1] == 1 and len(set(share)) > 2
    assert used[:2] == [(0.9, 0.2, False)] * 2  # stage 1
    assert used[2:3] == [(0.9, 0.2, True)]  # the second half of stage 2 imitates successes only
    assert [q for _, q, _ in used[3:]] == pytest.approx([0.5 - 0.4 * x for x in share])
    assert {(bc, only) for bc, _, only in used[3:]} == {(0.7, True)}


@pytest.mark.parametrize("flags", [
    dict(chunk_len=1, K=1, reward="conrft", critic_updates=1, num_critics=1),
    dict(actor_ema=0.0, candidate_sigma=0.0, candidate_noise=0.0, utd_ratio=0.0),
    dict(warmup_episodes=0, warmup_updates=0, offline_updates=0, sft_updates=0, online_steps=0),
], ids=["least sizes", "extras off", "nothing to do"])  # fmt: skip
def test_settings_at_the_edge_run(place, flags):
    folder, _ = short(place, f"edge-{next(iter(flags))}", **flags)
    assert {name for _, _, name, _ in undefined(folder)} <= {"eval/episode_len"}  # which needs a success
    assert (folder / "summary.json").exists()


def test_videos(place, monkeypatch):
    """Films are of the first evaluation episodes and named by what happened."""
    import imageio

    shot = []
    monkeypatch.setattr(imageio, "mimsave", lambda path, frames, **kwargs: shot.append((path, frames, kwargs)))
    folder, _ = short(place, "video", video_episodes=1, online_steps=0, warmup=False, max_episode_steps=4)
    ((path, frames, kwargs),) = shot
    assert path.parent == folder / "videos" and re.fullmatch(r"episode-0-(success|failure)\.mp4", path.name)
    assert len(frames) == 4 and frames[0].shape == (256, 256, 3) and frames[0].dtype == np.uint8
    assert kwargs["fps"] == 10 and np.std(frames[0]) > 5


# --- what a choice among candidates is worth ---


def test_branches_from_one_state_differ_by_the_candidate_alone(force):
    """Equal candidates have equal true Q, whatever was executed from that state before; others differ."""
    brancher = branching.Brancher(force.folder)
    brancher.limit = 40
    candidates = brancher.agent.candidates

    def twice(feature, args, generator):
        found = candidates(feature, args, generator)
        return torch.cat([found[:, :2], found[:, :2]], 1)

    brancher.agent.candidates = twice
    ends = []
    play = brancher.play

    def watched(obs, t, generator, chunk=None):
        end, states = play(obs, t, generator, chunk)
        if chunk is not None:
            ends.append(brancher.env.unwrapped.get_state_dict()["actors"]["cube"].clone())
        return end, states

    brancher.play = watched
    found = brancher.branch(0, rollouts=2)
    assert [line["candidate"] for line in found] == [0, 1, 2, 3]
    assert found[0]["q"] == pytest.approx(found[2]["q"]) and found[0]["q"] != pytest.approx(found[1]["q"], abs=1e-9)
    for one, other in ((0, 4), (1, 5), (2, 6), (3, 7)):  # candidate by candidate, two rollouts each
        assert torch.equal(ends[one], ends[other])


def test_what_a_choice_is_worth():
    def line(state, q, a, b):
        return {"state": state, "q": q, "return_a": a, "return_b": b, "critic_std": 0.5}

    lines = [
        line(0, 1, 0.0, 0.2),
        line(0, 2, 0.4, 0.4),
        line(0, 3, 0.8, 0.6),
        line(1, 1, 0.5, 0.5),
        line(1, 2, 0.5, 0.5),
    ]
    first, second = branching.of_states(lines)
    assert first["mean return"] == pytest.approx(0.4)
    assert first["best candidate"] == pytest.approx((0.6 + 0.8) / 2 - 0.4)  # chosen by one half, judged by the other
    assert first["critic's best"] == pytest.approx(0.7 - 0.4)
    assert first["above the mean Q"] == pytest.approx((0.4 + 0.7) / 2 - 0.4)
    assert first["rank of Q"] == first["rank of half the rollouts"] == pytest.approx(1)
    assert second["best candidate"] == second["critic's best"] == 0 and np.isnan(second["rank of Q"])
    mean, low, high = branching.interval([0.0, 1.0, np.nan])
    assert (mean, low, high) == (0.5, 0.0, 1.0)
