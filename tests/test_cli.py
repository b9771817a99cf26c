"""The command line: help, bad input, run folders that can't be used, full disks, and the commands in the documents."""

import dataclasses
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import ROOT, SCRIPT, SCRIPTS, as_flags, tiny_args

import force_octo as script
import plumbing.demos
from plumbing import UserError, fill, load_demos, make_demos, parse_flags
from plumbing.storage import Checkpoints

SHORT = dict(
    sft_updates=2, offline_updates=2, warmup_updates=2, warmup_episodes=1, online_steps=10,
    eval_episodes=1,
)  # fmt: skip


def one_error(result, message: str) -> None:
    code, _, errors = result
    errors = re.sub(r"(?m)^warning: .*\n", "", errors)  # of tiny runs' time limit
    assert code == 2, errors
    assert re.fullmatch(r"error: [^\n]+\n", errors), errors
    assert re.search(message, errors), errors


def snapshot(folder: Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


# --- flags ---


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        parse_flags(module.Args, module.__doc__, module.TABLES, ["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert module.__doc__.split(":")[0] in text
    missing = [
        f.name for f in dataclasses.fields(module.Args) if not re.search(rf"--(no-)?{f.name.replace('_', '-')}\b", text)
    ]
    assert missing == []


BAD = {
    "--env-id Nope-v1": "--env-id Nope-v1 is no ManiSkill task",
    "--K 0": "--K must be at least 1",
    "--online-steps -1": "--online-steps must be at least 0",
    "--offline-updates -5": "--offline-updates must",
    "--sft-updates -5": "--sft-updates must",
    "--warmup-updates -5": "--warmup-updates must",
    "--warmup-episodes -1": "--warmup-episodes must",
    "--utd-ratio -0.5": "--utd-ratio must",
    "--num-demos 0": "--num-demos must",
    "--eval-episodes 0": "--eval-episodes must",
    "--num-envs 0": "--num-envs must",
    "--chunk-len 0": "--chunk-len must",
    "--gamma 1.0": "--gamma must",
    "--gamma nan": "--gamma must",
    "--temperature 0.0": "--temperature must",
    "--image-size 50": "--image-size must",
    "--seed -1": "--seed must",
    "--warmup-episodes 0": "--warmup-episodes|--no-warmup",
    "--chunk-len 8 --max-episode-steps 4": "--max-episode-steps 4",
    "--device cuda": "--device cpu",
    "--sim-backend physx_cuda": "--sim-backend physx_cpu",
    "--checkpoint nowhere": "--checkpoint|nowhere",
    "--resume nowhere": "nowhere is no run folder",
    "--eval-only nowhere": "nowhere is no run folder",
    "--resume one --eval-only two": "--resume.*--eval-only|--eval-only.*--resume",
}


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """Flags that should have been refused don't start hours of work."""

    def refuse(*_):
        raise AssertionError("accepted: it began to make demonstrations")

    monkeypatch.setattr(plumbing.demos, "make", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(flags, command, no_work, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_error(command(*flags.split()), BAD[flags])
    assert not list(tmp_path.iterdir())  # neither a run folder nor a cache


BAD_DEMOS = {
    "--env-id Nope-v1": "--env-id Nope-v1 is no ManiSkill task",
    "--env-id RollBall-v1": "no motion planner for RollBall-v1.*--demo-path",
    "--robot-uids panda_bad": "no ManiSkill robot.*made for: .*panda",
    "--robot-uids xarm6_robotiq": "download_asset xarm6",
    "--env-id PickSingleYCB-v1": "download_asset ycb",
    "--demo-path nowhere.h5": "nowhere.*doesn't exist",
    "--out .": r"--out \. can't be written",
    "--out nowhere/demos.npz": r"--out nowhere/demos.npz can't be written",
    "--num-demos 0": "--num-demos",
}


@pytest.mark.parametrize("flags", BAD_DEMOS)
def test_bad_flags_of_the_demonstration_program(flags, inline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=BAD_DEMOS[flags]) as caught:
        make_demos.main([str(SCRIPT), *flags.split()])
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("words", [[], ["--out", "x.npz"], ["nowhere.py"]])
def test_the_demonstration_program_needs_a_script(words):
    with pytest.raises(UserError, match="name a script first"):
        make_demos.main(words)


def test_the_demonstration_program_copies_the_cache(place, tmp_path):
    out = tmp_path / "push.npz"
    make_demos.main([str(SCRIPT), "--out", str(out), *as_flags(tiny_args(place))])
    assert out.read_bytes() == make_demos.cache_of(tiny_args(place)).read_bytes()


def test_a_run_ends_with_one_line_where_demonstrations_can_not_be_made(tmp_path):
    flags = "--env-id PickSingleYCB-v1 --obs-mode state"
    done = subprocess.run([sys.executable, str(SCRIPT), *flags.split()], cwd=tmp_path, capture_output=True, text=True)
    one_error((done.returncode, done.stdout, done.stderr), "download_asset ycb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--K two", "--preset other", "--no-such-flag 1", "--device other"])
def test_flags_that_cannot_be_parsed(flags, command, no_work, tmp_path):
    code, _, errors = command(*flags.split())
    assert code == 2 and flags.split()[0] in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def parsed(*words: str, module=script):
    return parse_flags(module.Args, module.__doc__, module.TABLES, list(words))


def test_tables_fill_in_what_was_not_given():
    paper = parsed("--preset", "paper")
    assert vars(paper).items() >= script.BY_PRESET["paper"].items()
    assert parsed("--preset", "paper", "--chunk-len", "3").chunk_len == 3
    off = dict(vgpd=False, warmup=False)
    assert parsed("--no-vgpd", "--no-warmup") == fill(script.Args, script.TABLES, **off)
    assert vars(parsed()).items() >= script.BY_OBS_MODE["rgb"].items()
    pick = parsed("--obs-mode", "state", "--env-id", "PickCube-v1")
    assert vars(pick).items() >= (script.BY_OBS_MODE["state"] | script.BY_TASK["PickCube-v1", "state"]).items()
    push = parsed("--obs-mode", "state", "--env-id", "PushCube-v1")
    assert push == fill(script.Args, script.TABLES, obs_mode="state", env_id="PushCube-v1")
    assert vars(push).items() >= script.PUSH_STATE.items()
    both = parsed("--obs-mode", "state", "--preset", "paper")
    assert both.q_weight == script.BY_PRESET["paper"]["q_weight"]  # a preset is asked for; later tables win
    assert both.actor_ema == script.BY_PRESET["paper"]["actor_ema"] and both.num_envs == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_explicit_flags_win_over_every_table(name):
    """Each flag that some table sets, given as its plain default, where that table applies."""
    module = importlib.import_module(name)
    plain = module.Args()
    for names, table in module.TABLES.items():
        for key, values in table.items():
            chosen = dict(zip(names.split(), key if isinstance(key, tuple) else (key,), strict=True))
            given = {flag: getattr(plain, flag) for flag in values if flag not in chosen}
            args = fill(module.Args, module.TABLES, **chosen, **given)
            assert vars(args).items() >= (chosen | given).items()
            words = as_flags(args)
            assert parsed(*words, module=module) == args


def test_an_error_of_the_program_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--env-id", "Nope-v1"], cwd=tmp_path, capture_output=True, text=True)
    one_error((done.returncode, done.stdout, done.stderr), "Nope-v1")
    assert not list(tmp_path.iterdir())


# --- simulator ---


@pytest.fixture
def no_vulkan(monkeypatch):
    def make(*args, **kwargs):
        raise RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver")

    monkeypatch.setattr(gym, "make", make)


def test_no_vulkan_with_demonstrations_at_hand(place, no_vulkan, command, tmp_path):
    args = tiny_args(place, runs=str(tmp_path / "runs"))
    one_error(command(*as_flags(args)), r"simulator can't start .*ErrorIncompatibleDriver.*setup\.sh")
    assert not list(tmp_path.rglob("*"))


def test_no_vulkan_while_making_demonstrations(no_vulkan, inline, tmp_path):
    with pytest.raises(UserError, match=r"simulator can't start .*setup\.sh"):
        load_demos(tiny_args(tmp_path), script.make_env)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_robot_that_the_task_has_no_keyframe_for(inline, tmp_path):
    with pytest.raises(UserError, match=r"StackCube-v1 refuses these settings .*NotImplementedError"):
        load_demos(tiny_args(tmp_path, env_id="StackCube-v1", robot_uids="panda_stick"), script.make_env)


# --- run folders ---


@pytest.fixture(scope="module")
def finished(place):
    return script.main(tiny_args(place, run_name="finished", **SHORT))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change_config(run: Path, change) -> None:
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


def cut(path: Path, size: int | None = None) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if size is None else size])


def in_all(run: Path, name: str, damage) -> None:
    """The same in both checkpoints."""
    for path in (run / "checkpoints").glob("update-*"):
        damage(path / name)


DAMAGE = {
    "no config": (lambda r: (r / "config.json").unlink(), "no run folder"),
    "half a config": (lambda r: cut(r / "config.json"), "no run folder"),
    "config of something else": (lambda r: (r / "config.json").write_text("[1]"), "no run folder"),
    "another script": (lambda r: change_config(r, lambda c: c.update(script="bc.py")), r"bc\.py"),
    "unknown flag": (
        lambda r: change_config(r, lambda c: c["args"].update(speed=9)),
        "by a version with speed: go on with that one",
    ),
    "no checkpoint": (lambda r: shutil.rmtree(r / "checkpoints"), "no readable checkpoint"),
    "half the weights": (lambda r: in_all(r, "weights.safetensors", cut), "no readable checkpoint"),
    "no weights": (lambda r: in_all(r, "weights.safetensors", lambda p: cut(p, 0)), "no readable checkpoint"),
    "half the state": (lambda r: in_all(r, "training.pt", cut), "no readable checkpoint"),
    "no state": (lambda r: in_all(r, "training.pt", lambda p: cut(p, 0)), "no readable checkpoint"),
    "foreign state": (lambda r: in_all(r, "training.pt", lambda p: p.write_text("hello")), "no readable checkpoint"),
    "another width": (lambda r: change_config(r, lambda c: c["args"].update(hidden_dim=8)), "another task or network"),
    "another chunk": (lambda r: change_config(r, lambda c: c["args"].update(chunk_len=2)), "another task or network"),
    "a bad flag": (lambda r: change_config(r, lambda c: c["args"].update(K=0)), "--K must be"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_run_folders(case, run, command):
    damage, message = DAMAGE[case]
    damage(run)
    before = snapshot(run)
    for flag in ("--resume", "--eval-only"):
        one_error(command(flag, run), message)
        assert snapshot(run) == before  # as it was found


def test_a_run_goes_on_where_it_was_begun(run):
    before = snapshot(run)
    with pytest.raises(UserError, match="was begun with --device cpu"):
        script.main(script.Args(resume=str(run), device="cuda"))
    config = json.loads((run / "config.json").read_text())
    config["args"]["device"] = "cuda"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="no CUDA device" if not torch.cuda.is_available() else "begun with --device cuda"
    ):
        script.main(script.Args(resume=str(run), device="cpu" if torch.cuda.is_available() else "auto"))
    assert snapshot(run).keys() == before.keys()
    script.main(script.Args(eval_only=str(run), device="cpu", eval_episodes=1))  # weights can be looked at anywhere


def test_a_run_of_a_version_with_fewer_flags_is_not_gone_on_with(run):
    """A new flag's default would change the algorithm half-way; looking at the policy does no harm."""
    change_config(run, lambda config: config["args"].pop("q_growth"))
    before = snapshot(run)
    with pytest.raises(UserError, match="begun by a version without q_growth"):
        script.main(script.Args(resume=str(run)))
    script.main(script.Args(eval_only=str(run), device="cpu", eval_episodes=1))
    assert snapshot(run) == before


def test_eval_only_takes_flags_of_its_own(run, monkeypatch):
    """Those that were given, defaults included; all others are the run's."""
    own = json.loads((run / "config.json").read_text())["args"]
    found = []
    monkeypatch.setattr(script, "evaluate", lambda env, agent, args: (found.append(args), {})[1])
    monkeypatch.setattr("sys.argv", ["force_octo.py", "--eval-only", str(run)])
    script.main(script.Args(eval_only=str(run), device="cpu"))
    script.main(script.Args(eval_only=str(run), device="cpu", eval_episodes=7, gamma=0.5))
    monkeypatch.setattr("sys.argv", ["force_octo.py", "--eval-episodes=100"])
    script.main(script.Args(eval_only=str(run), device="cpu"))
    assert [args.eval_episodes for args in found] == [own["eval_episodes"], 7, 100] and own["eval_episodes"] != 100
    assert {args.gamma for args in found} == {own["gamma"]} != {0.5}


def test_stage_0_from_a_run_of_another_script(place, run, tmp_path):
    with pytest.raises(UserError, match=r"is a run of force_octo\.py, not of bc\.py"):
        script.main(tiny_args(place, sft_checkpoint=str(run), run_name="from-force"))


def test_a_checkpoint_of_another_task(run, demos, monkeypatch):
    wider = torch.cat([torch.as_tensor(demos.obs["proprio"]), torch.zeros(len(demos.action), 3)], 1).numpy()
    monkeypatch.setattr(script, "load_demos", lambda *_: dataclasses.replace(demos, obs={"proprio": wider}))
    before = snapshot(run)
    for flag in ("resume", "eval_only"):
        with pytest.raises(UserError, match="checkpoint of another task or network|begun with other demonstrations"):
            script.main(script.Args(device="cpu", **{flag: str(run)}))
    assert snapshot(run) == before


def test_a_name_is_not_taken_twice(place, finished, command):
    before = snapshot(finished)
    flags = as_flags(tiny_args(place, run_name="finished", **SHORT))
    one_error(command(*flags), "finished exists: .*--run-name.*--resume")
    assert snapshot(finished) == before


def test_a_finished_run_stays_as_it_is(run, command):
    rows, summary = (run / "metrics.csv").read_text(), json.loads((run / "summary.json").read_text())
    code, _, errors = command("--resume", run)
    assert code == 0, errors
    assert (run / "metrics.csv").read_text() == rows
    again = json.loads((run / "summary.json").read_text())
    assert again.keys() == summary.keys()
    assert all(again[k] == summary[k] for k in summary if "seconds" not in k)


# --- full disks and kills ---


class Killed(BaseException):
    pass


def saved(folder: Path, value: float, name: str = "update-1") -> None:
    weights = {"w": torch.full((50_000,), value)}
    Checkpoints(folder).save(name, weights, {"x": torch.full((99_000,), value)}, buffers={})


def loaded(folder: Path) -> float:
    weights, state = Checkpoints(folder).load(resume=False)
    assert weights["w"].unique().tolist() == state["x"].unique().tolist()  # of the same moment
    return weights["w"][0].item()


@pytest.mark.parametrize("name", ["update-1", "update-2"], ids=["same name", "new name"])
@pytest.mark.parametrize("limit", [100, 100_000, 300_000])  # bytes; the last is room for the weights alone
def test_a_disk_that_fills_up_spares_the_last_checkpoint(tmp_path, name, limit):
    """Writes really fail here: files may not grow past a limit."""
    saved(tmp_path, 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError):  # the kind that ends the program with one line, not a library's own
            saved(tmp_path, 2.0, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert loaded(tmp_path) == 1.0
    here = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert here == ["latest", "rows", "update-1"]  # and nothing half-written
    saved(tmp_path, 3.0, name)
    assert loaded(tmp_path) == 3.0


@pytest.mark.parametrize("name", ["update-1", "update-2"], ids=["same name", "new name"])
@pytest.mark.parametrize("step", range(8))
def test_a_kill_at_any_step_of_saving_leaves_a_whole_checkpoint(tmp_path, name, step, monkeypatch):
    saved(tmp_path, 1.0)
    count, replaced = [0], [(os, "replace"), (shutil, "rmtree"), (Path, "write_text"), (torch, "save"), (Path, "mkdir")]

    def dying(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] > step:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, function in replaced:
            patch.setattr(owner, function, dying(getattr(owner, function)))
        try:
            saved(tmp_path, 2.0, name)
        except Killed:
            pass
    assert loaded(tmp_path) in (1.0, 2.0)
    saved(tmp_path, 3.0, name)
    assert loaded(tmp_path) == 3.0
    here = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"latest", "rows"} < here and len(here) <= 4  # the last two, and nothing half-written


def test_a_full_disk_ends_a_run_that_can_go_on(place, command, monkeypatch):
    args = tiny_args(place, run_name="full", **SHORT)
    folder, calls, replace = Path(args.runs) / "full", [0], os.replace

    def full(source, target):
        calls[0] += "checkpoints" in str(target)
        if calls[0] > 4:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, errors = command(*as_flags(args))
    assert code == 2 and errors.splitlines()[-1].startswith("error: the disk is full") and "--resume" in errors
    assert "Traceback" not in errors
    Checkpoints(folder).load(resume=False)
    assert command("--resume", folder)[0] == 0
    assert json.loads((folder / "summary.json").read_text())["online_env_steps"] >= 10


# --- documents ---


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, flags) of each command in a text that runs one of our scripts."""
    found = []
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        for part in re.split(r"&&|;", line.split(" #")[0]):
            if match := re.search(r"python\d?\s+(\w+\.py)\b(.*)", part):
                before, *others = match[2].split(" | ")
                for flags in (before, *[o for o in others if o.lstrip().startswith("--")]):
                    flags = re.sub(r"\$\{?\w+\}?", "1", flags.rstrip("`. "))
                    found.append((match[1], [f for f in shlex.split(flags) if f != "&"]))
    return found


def documents() -> list:
    cases = []
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        if path.exists():
            text = path.read_text()
            blocks = re.findall(r"```[^\n]*\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
            cases += [(path.name, *c) for block in blocks for c in commands(block)]
    for path in sorted(ROOT.glob("*.py")):
        cases += [(path.name, *c) for c in commands(importlib.import_module(path.stem).__doc__ or "")]
    return cases


def test_commands_are_found():
    text = "bash setup.sh && .venv/bin/python a.py --K 2 \\\n  --x 'b c' # why\n"
    text += "python -m pytest\npython b.py --r R | --e R\n"
    assert commands(text) == [("a.py", ["--K", "2", "--x", "b c"]), ("b.py", ["--r", "R"]), ("b.py", ["--e", "R"])]
    assert len([c for c in documents() if c[0] == "force_octo.py"]) >= 4


@pytest.mark.parametrize("where, name, flags", documents(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:40])
def test_documented_commands_parse(where, name, flags):
    assert (ROOT / name).exists(), f"{where} names {name}"
    module = importlib.import_module(Path(name).stem)
    if not hasattr(module, "Args"):  # a program for all scripts' runs; what it doesn't know are flags of bc.py
        own, flags = module.parser().parse_known_args(flags)
        assert not flags or name == "evaluate.py"
        module = importlib.import_module("bc")
    parsed(*flags, module=module)
