"""Short runs of the whole script on real ManiSkill: what learns, what is logged, and what nothing may disturb."""

import contextlib
import csv
import importlib
import json
import re
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_args

import force_octo as script

# Long enough to reach and push the cube, so that an episode depends on all that the simulator remembers.
REACHING = dict(max_episode_steps=40, online_steps=150, eval_freq=60, q_weight_end=0.2)
NAMES = {
    "losses/bc", "losses/td", "losses/calql", "losses/critic", "losses/actor", "losses/distill", "values/q_data",
    "values/td_target", "values/mc_return", "values/q_std", "calib/bound_rate", "vgpd/zeta", "vgpd/pass_rate",
    "vgpd/candidate_std", "vgpd/ess", "buffer/policy_ratio", "buffer/size", "train/success_once", "train/episode_len",
    "eval/success_once", "eval/success_once_low", "eval/success_once_high", "eval/success_at_end", "eval/episode_len",
    "eval/return", "eval/num_episodes", "grad_norm/sft", "lr/sft", "time/eval_s", "time/env_steps_per_s",
}  # fmt: skip


class Killed(BaseException):
    """What a kill looks like from the inside: nothing catches it."""


def follow_demonstrations(monkeypatch, demos):
    """Make policies do what the nearest demonstrated state did, and a little of what they learned."""
    stored = demos.action.copy()

    def act(self, feature, actor, args, generator, explore=0.0):
        own = actor.sample(feature, 1, generator)[:, 0].unflatten(1, (self.H, -1)).numpy()
        known = (torch.as_tensor(demos.obs["proprio"]) - self.proprio_mean) / self.proprio_std
        near = torch.cdist(feature[:, -known.shape[1] :], known.clamp(-5, 5)).argmin(1)
        rows = (near[:, None] + torch.arange(self.H)).clamp_max(len(stored) - 1)
        push = explore * torch.randn(own.shape, generator=generator).numpy()
        return (0.9 * self.normalise(stored[rows.numpy()]) + 0.1 * own + push).clip(-1, 1).astype(np.float32)

    monkeypatch.setattr(script.Agent, "act", act)


@pytest.fixture
def reaching(monkeypatch, demos):
    follow_demonstrations(monkeypatch, demos)


@pytest.fixture(scope="module")
def whole(place, demos):
    """An undisturbed run: its folder, the weights at the start of each stage and at the end, evaluation actions, and
    the exploration noise in training and in evaluation."""
    starts, evaluations, enter, evaluate = {}, [], script.Run.enter, script.evaluate
    explored, evaluating = {True: [], False: []}, []

    def watched_enter(self, stage):
        if self.count["stage"] != stage or stage == "sft":
            starts[stage] = {k: v.clone() for k, v in self.agent.state_dict().items()}
        return enter(self, stage)

    def watched_evaluate(env, agent, *rest):
        inside, step = [], env.step
        evaluating.append(True)
        env.step = lambda action: (inside.append(action.copy()), step(action))[1]
        try:
            return evaluate(env, agent, *rest)
        finally:
            del env.step
            evaluating.pop()
            evaluations.append(np.stack(inside))

    with pytest.MonkeyPatch.context() as monkeypatch:
        follow_demonstrations(monkeypatch, demos)
        act = script.Agent.act

        def watched_act(self, feature, actor, args, generator, explore=0.0):
            explored[bool(evaluating)].append(explore)
            return act(self, feature, actor, args, generator, explore)

        monkeypatch.setattr(script.Agent, "act", watched_act)
        monkeypatch.setattr(script.Run, "enter", watched_enter)
        monkeypatch.setattr(script, "evaluate", watched_evaluate)
        folder = script.main(tiny_args(place, run_name="whole", **REACHING))
    starts["end"] = script.load_checkpoint(folder)[0]
    return SimpleNamespace(folder=folder, starts=starts, evaluations=evaluations, explored=explored)


def rows(folder, prefixes=("losses/", "values/", "vgpd/", "calib/", "grad_norm/", "lr/", "train/", "eval/", "buffer/")):
    """metrics.csv without durations, in order: (global_step, update_step, name, value)."""
    with (folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))
    assert found[0] == ["global_step", "update_step", "name", "value"]
    return [(int(g), int(u), name, value) for g, u, name, value in found[1:] if name.startswith(prefixes)]


def undefined(folder) -> list:
    """Rows without a value; only a correlation may lack one, where all returns are equal."""
    with (folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))[1:]
    return [r for r in found if not np.isfinite(float(r[3])) and r[2] != "calib/correlation"]


def same_result(one, other):
    """Weights, buffers and random generators of two runs' last checkpoints are bit-equal."""
    (weights, state), (own_weights, own_state) = script.load_checkpoint(one), script.load_checkpoint(other)
    for name, value in weights.items():
        assert torch.equal(value, own_weights[name]), name
    for key in ("expert", "policy", "generators"):
        for name, value in state[key].items():
            assert torch.equal(value, own_state[key][name]), (key, name)
    assert state["count"] == own_state["count"]


# --- what a run does ---


def changed(whole, before, after, part):
    names = [k for k in whole.starts[before] if k.startswith(part + ".")]
    assert names, part
    return [k for k in names if not torch.equal(whole.starts[before][k], whole.starts[after][k])], names


STAGES = ["sft", "offline", "warmup", "online", "end"]
LEARN = {
    "sft": {"backbone", "actor"},
    "offline": {"actor", "critic", "target_critic"},
    "warmup": {"actor", "critic", "target_critic"},
    "online": {"actor", "critic", "target_critic"},
}


@pytest.mark.parametrize("stage", LEARN)
def test_every_network_learns_in_its_stages_only(whole, stage):
    after = STAGES[STAGES.index(stage) + 1]
    for part in ("backbone", "actor", "critic", "target_critic"):
        moved, names = changed(whole, stage, after, part)
        if part not in LEARN[stage]:
            assert not moved, (part, moved)
        else:  # a bias of all keys of an attention shifts its scores alike, so it has no gradient
            # The instruction never changes, so most words are never read.
            still = {n for n in names if n.endswith((".k.bias", ".unit")) or ".text." in n}  # units are no parameters
            assert set(names) - set(moved) <= still, part
    moved, names = changed(whole, stage, after, "actor_ema")
    assert moved, "actor_ema"
    assert not changed(whole, stage, after, "backbone")[0] or stage == "sft"


def test_the_units_stay(whole):
    for name in ("proprio_mean", "proprio_std", "action_centre", "action_scale"):
        assert torch.equal(whole.starts["sft"][name], whole.starts["end"][name])


def test_only_training_episodes_are_pushed(whole, place):
    assert set(whole.explored[True]) == {0.0} and set(whole.explored[False]) == {tiny_args(place).explore_noise}
    assert tiny_args(place).explore_noise > 0


def test_metrics(whole):
    with (whole.folder / "metrics.csv").open() as file:
        found = list(csv.reader(file))[1:]
    assert {r[2] for r in found} >= NAMES
    assert undefined(whole.folder) == []
    repeated = [key for key, n in Counter((r[0], r[1], r[2]) for r in found if "time/" not in r[2]).items() if n > 1]
    # Stages without updates between two evaluations share their counters.
    assert [key for key in repeated if not key[2].startswith("eval/")] == []
    steps = [(int(r[0]), int(r[1])) for r in found]
    assert steps == sorted(steps)
    assert len(list((whole.folder / "tensorboard").iterdir())) == 1


def test_stages_log_what_they_do(whole):
    args, found = tiny_args(whole.folder), rows(whole.folder)
    ends = np.cumsum([args.sft_updates, args.offline_updates, args.warmup_updates])

    def logged(name):
        return {u for _, u, n, _ in found if n == name}

    half = ends[1] + args.warmup_updates // 2
    assert logged("grad_norm/sft") == set(range(1, ends[0] + 1))
    assert logged("losses/calql") == set(range(ends[0] + 1, ends[2] + 1))  # not online: Eq. (8)
    critic_alone = set(range(ends[1] + 1, half + 1))
    assert logged("losses/bc") == set(range(1, ends[2] + 1)) - critic_alone
    last = max(logged("losses/td"))
    assert logged("vgpd/zeta") == logged("losses/distill") == logged("losses/q") == set(range(ends[2] + 1, last + 1))
    ratio = {u: float(v) for _, u, n, v in found if n == "buffer/policy_ratio"}
    assert {ratio[u] for u in range(ends[0] + 1, ends[1] + 1)} == {0.0}
    assert {ratio[u] for u in range(ends[1] + 1, last + 1)} == {0.5}
    before = max(g for g, u, _, _ in found if u == ends[2])  # env steps when stage 3 began
    assert last - ends[2] == int(args.utd_ratio * (found[-1][0] - before) + 1e-6)
    values = [float(v) for _, _, n, v in found if n in ("values/td_target", "values/mc_return")]
    assert min(values) >= 0 and max(values) <= 1  # the range of returns with rewards 0 and 1


def test_config_and_summary(whole, place):
    config = json.loads((whole.folder / "config.json").read_text())
    assert config["script"] == "force_octo.py"
    assert config["args"]["K"] == 4 and config["args"]["env_id"] == "PushCube-v1"
    assert config["demonstrations"] and config["weights"] == "random"
    assert config["packages"]["torch"] == torch.__version__ and config["packages"]["mani_skill"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", config["git_commit"])
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert summary["env_id"] == "PushCube-v1" and summary["seed"] == 1
    last = summary["evaluations"][-1]
    for name in ("success_once", "success_at_end"):
        assert summary[name] == last[f"eval/{name}"]
    low, high = summary["success_interval"]
    assert 0 <= low <= summary["success_once"] <= high <= 1
    assert summary["steps_to_success"] == last["eval/episode_len"] and 0 < summary["steps_to_success"] <= 40
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

    values = [(0, 0.7), (10, 0.85), (20, 0.6), (30, 0.8), (40, 0.9)]
    run = SimpleNamespace(
        evals=[evaluation("sft", 0, 0.5), evaluation("offline", 0, 0.1)]
        + [evaluation("online", 100 + step, success) for step, success in values],
        count={"online_start": 100, "global_step": 145}, seconds={"a": 1.0, "b": 2.0},
        demos=SimpleNamespace(steps=np.array([10, 20]), idle=np.array([0, 7]), source="here"),
    )  # fmt: skip
    summary = script.summarise(run)
    assert summary["online_env_steps_at_80"] == 30  # 85 % at 10 didn't hold
    assert summary["largest_drop"] == pytest.approx(0.7 - 0.6) and summary["handover_success_once"] == 0.7
    assert summary["sft_success_once"] == 0.5 and summary["success_once"] == 0.9
    assert (summary["online_env_steps"], summary["env_steps"]) == (45, 145) and summary["seconds"] == 3
    assert summary["demo_steps_to_success"] == 18.5  # with the idle steps that were left out
    run.evals = run.evals[:4]
    assert script.summarise(run)["online_env_steps_at_80"] is None  # nothing after it confirms 85 %
    run.evals = run.evals[:3]
    assert script.summarise(run)["online_env_steps_at_80"] is None and script.summarise(run)["largest_drop"] == 0


@pytest.mark.parametrize("name", ["force_octo", "force_pi0", "conrft"])
def test_online_checkpoints_do_not_wait_for_an_evaluation(name):
    """Nine episodes of six steps and three updates each; a checkpoint at the end of one that passes a fourth update."""
    script, saved = importlib.import_module(name), []
    count = dict(stage_update=0, update_step=0, global_step=0, online_start=0, due=0.0, planner_failures=0)
    bar = SimpleNamespace(update=lambda n: None, set_postfix=lambda **_: None)

    def collect():
        count["global_step"] += 6
        time.sleep(1e-3)
        return 6

    run = SimpleNamespace(
        args=script.Args(online_steps=50, utd_ratio=0.5, eval_freq=1000, checkpoint_freq=4), count=count,
        bar=lambda *_: contextlib.nullcontext(bar), collect=collect, update=lambda *_: {},
        tick=lambda *_: count.update(stage_update=count["stage_update"] + 1), recent=[(0.0,) * (4 if name == "conrft" else 2)],
        policy=SimpleNamespace(rows=0), replay=SimpleNamespace(rows=0), save=lambda: saved.append(count["stage_update"]),
    )  # fmt: skip
    script.train_online(run, SimpleNamespace(log=lambda *_: None))
    assert count["stage_update"] == 27 and saved == [6, 9, 12, 18, 21, 24]


# --- what must not change a run ---


def test_resume_equals_an_undisturbed_run(whole, place, reaching, monkeypatch):
    """Killed once in every stage, off a checkpoint, and gone on with: all that follows is the same."""
    kills, tick = [("sft", 5), ("offline", 3), ("warmup", 5), ("online", 25)], script.Run.tick

    def killed_tick(self, logs, logger):
        tick(self, logs, logger)
        if kills and kills[0] == (self.count["stage"], self.count["stage_update"]):
            raise Killed

    monkeypatch.setattr(script.Run, "tick", killed_tick)
    folder = whole.folder.with_name("killed")
    args = tiny_args(place, run_name="killed", **REACHING)
    while kills:
        with pytest.raises(Killed):
            script.main(args)
        kills.pop(0)
        args = tiny_args(place, resume=str(folder))
    assert script.main(args) == folder
    expected, own = ({(u, n): v for _, u, n, v in rows(f)} for f in (whole.folder, folder))
    different = [(key, expected[key], own.get(key)) for key in expected if own.get(key) != expected[key]]
    assert not different, f"first of {len(different)}: {different[0]}"
    same_result(whole.folder, folder)
    assert Counter(rows(folder)) == Counter(rows(whole.folder))  # nothing twice, nothing lost
    evaluations = [json.loads((f / "summary.json").read_text())["evaluations"] for f in (whole.folder, folder)]
    for one, other in zip(*evaluations, strict=True):
        assert all(one[k] == other[k] for k in one if not k.startswith("time/"))


def test_evaluation_does_not_change_training(whole, place, reaching):
    args = tiny_args(place, run_name="unwatched", **REACHING | dict(eval_freq=10**6, eval_episodes=1))
    folder = script.main(args)
    prefixes = ("losses/", "values/", "vgpd/", "calib/", "train/", "buffer/")
    assert rows(folder, prefixes) == rows(whole.folder, prefixes)
    same_result(whole.folder, folder)


def test_evaluation_is_the_same_every_time(whole, place, reaching, monkeypatch, capsys):
    """`--eval-only` does, step by step, what the run's last evaluation did."""
    actions, step = [], script.ObsWrapper.step
    monkeypatch.setattr(script.ObsWrapper, "step", lambda self, a: (actions.append(np.array(a)), step(self, a))[1])
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.folder.rglob("*"))
    script.main(tiny_args(place, eval_only=str(whole.folder)))
    printed = capsys.readouterr().out
    metrics = json.loads(printed[printed.index("{") :])
    last = json.loads((whole.folder / "summary.json").read_text())["evaluations"][-1]
    assert metrics.keys() < last.keys() and all(metrics[k] == last[k] for k in metrics if k.startswith("eval/"))
    assert np.array_equal(np.stack(actions).reshape(-1), whole.evaluations[-1].reshape(-1))
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.folder.rglob("*")) == before  # only looks


def short(place, name, **flags):
    few = dict(sft_updates=2, offline_updates=2, warmup_episodes=1, warmup_updates=2)
    folder = script.main(tiny_args(place, run_name=name, **few | dict(online_steps=10, eval_episodes=1) | flags))
    return folder, {n for _, _, n, _ in rows(folder)}


@pytest.fixture(scope="module")
def plain(place):
    return short(place, "plain")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(place, plain):
    again, _ = short(place, "again")
    assert rows(again) == rows(plain[0])
    same_result(again, plain[0])
    other, _ = short(place, "other", seed=2, offline_updates=0, warmup=False, online_steps=0)
    losses = [[r for r in rows(f) if r[2] == "losses/bc"][0] for f in (again, other)]
    assert losses[0] != losses[1]


# --- ablations ---


def test_no_vgpd(place):
    folder, names = short(place, "no-vgpd", vgpd=False)
    assert not [n for n in names if n.startswith("vgpd/")] and "values/q_std" not in names
    assert "losses/distill" in names and "losses/td" in names


def test_finetune_head_trains_the_head_alone(place):
    args = tiny_args(place, run_name="head", finetune="head")
    run = script.begin(args)
    before = {name: value.clone() for name, value in run.agent.state_dict().items()}
    assert run.enter("sft")
    script.train_sft(run, script.Logger(run.folder, args, 0))
    moved = {
        name.split(".")[0] for name, value in run.agent.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"actor", "actor_ema"}
    with torch.no_grad():
        feature = run.agent.feature(run.demos.at(torch.tensor([3]), run.agent.window))[0]
    torch.testing.assert_close(run.expert.data["feature"][3], feature)  # what the head was trained on


@pytest.mark.parametrize("obs_mode, push", [("rgb", 0.0), ("state", 0.02)])
def test_episodes_are_pushed_without_a_camera_only(place, obs_mode, push):
    args = tiny_args(place, obs_mode=obs_mode, explore_noise=None)
    script.validate(args)
    assert args.explore_noise == push


def test_no_warmup(place, plain):
    folder, names = short(place, "no-warmup", warmup=False, online_cql_alpha=0.1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds_per_stage"].get("warmup", 0) == 0 and summary["env_steps"] == summary["online_env_steps"]
    assert "calib/q_minus_return" not in names and "calib/q_minus_return" in plain[1]
    first = min(u for _, u, n, _ in rows(folder) if n == "vgpd/zeta")
    assert first == 2 + 2 + 1  # right after stage 1
    assert "losses/calql" in {n for _, u, n, _ in rows(folder) if u >= first}  # kept online if asked for


def test_q_weight_expert_filter_and_a_warmup_of_the_critic_alone(place, plain):
    folder, names = short(place, "all", q_weight=1.0, expert_filter="filter", warmup_train_actor=False)
    added = {"losses/q", "values/q_policy", "vgpd/zeta_expert"}
    assert added <= names and not added & plain[1]
    assert {u for _, u, n, _ in rows(folder) if n == "losses/bc"} == {1, 2, 3, 4}


def test_the_weight_of_the_q_loss_moves_evenly_to_its_end(place, monkeypatch):
    used, update_actor = [], script.update_actor
    monkeypatch.setattr(script, "update_actor", lambda *x: (used.append((x[5], x[4].q_weight)), update_actor(*x))[1])
    folder, _ = short(place, "ramp", q_weight=0.5, q_weight_end=0.1, online_steps=40)
    summary = json.loads((folder / "summary.json").read_text())
    start = summary["env_steps"] - summary["online_env_steps"]
    share = [min((g - start) / 40, 1.0) for g, _, n, _ in rows(folder) if n == "losses/distill"]
    assert 0 < share[0] < share[-1] == 1 and len(set(share)) > 2
    assert [w for stage, w in used if stage == "online"] == pytest.approx([0.5 - 0.4 * x for x in share])
    used.clear()
    short(place, "level", q_weight=0.5)
    assert {w for _, w in used} == {0.5}


@pytest.mark.parametrize("select", ["sample", "best-of-k"])
def test_select(place, select, monkeypatch):
    """Best of K once there is a critic; the evaluation after stage 0 is of plain samples in both."""
    acting, numbers, act, sample = [False], set(), script.Agent.act, script.ConsistencyActor.sample
    cloned, enter = set(), script.Run.enter

    def watched_enter(self, stage):
        if stage == "offline":
            cloned.update(numbers)
            numbers.clear()
        return enter(self, stage)

    def watched_act(self, *rest):
        acting[0] = True
        try:
            return act(self, *rest)
        finally:
            acting[0] = False

    def watched_sample(self, feature, n, *rest):
        numbers.update([n] if acting[0] else [])
        return sample(self, feature, n, *rest)

    monkeypatch.setattr(script.Agent, "act", watched_act)
    monkeypatch.setattr(script.ConsistencyActor, "sample", watched_sample)
    monkeypatch.setattr(script.Run, "enter", watched_enter)
    short(place, select, select=select, warmup=False, online_steps=5)
    assert numbers == ({4} if select == "best-of-k" else {1}) and cloned == {1}


@pytest.mark.parametrize("flags", [
    dict(chunk_len=1, K=1, reward="conrft", critic_updates=1, num_critics=1, num_layers=1),
    dict(actor_ema=0.0, candidate_sigma=0.0, candidate_noise=0.0, utd_ratio=0.0),
    dict(warmup_episodes=0, warmup_updates=0, offline_updates=0, sft_updates=0, online_steps=0),
], ids=["least sizes", "extras off", "nothing to do"])  # fmt: skip
def test_settings_at_the_edge_run(place, flags):
    folder, _ = short(place, f"edge-{next(iter(flags))}", **flags)
    assert undefined(folder) == []
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
