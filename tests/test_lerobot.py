"""LeRobotDataset v3: a folder that lerobot wrote is read, ours go out and come back, bad ones are refused in one line."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import FIXTURES, tiny_args
from pyarrow import parquet

import bc as script
from plumbing import UserError, lerobot, lerobot_read, load_demos
from plumbing.lerobot_write import About, write_dataset
from plumbing.storage import write_json

sys.path.insert(0, str(FIXTURES))
from make_lerobot_fixture import TASK, action, picture, state  # noqa: E402

TINY = FIXTURES / "lerobot_tiny"
ABOUT = About(TASK, "panda", "pd_ee_delta_pos", 10)


@pytest.fixture
def known(monkeypatch):
    """The environment's form without the environment: PushCube from images."""
    shapes = {"proprio": (16,), "primary": (64, 64, 3), "wrist": (64, 64, 3)}
    box = np.ones(4, np.float32)
    form = lerobot_read.Form(shapes, -box, box, gripper=True)
    monkeypatch.setattr(lerobot_read, "form_of", lambda args, make_env: form)


def args_of(folder: Path, path: Path, **changes):
    own = dict(obs_mode="rgb", cameras="both", demo_path=str(path), num_demos=2)
    args = tiny_args(folder, script, **own | changes)
    script.validate(args)
    return args


def test_what_lerobot_wrote_is_read(tmp_path, known, inline):
    """The episode without a success is left out."""
    demos = load_demos(args_of(tmp_path, TINY), None)
    assert demos.lengths.tolist() == [6, 7] and demos.steps.tolist() == [5, 6] and demos.gripper
    frames = [*range(6), 5, *range(11, 18), 17]  # the last observation of an episode stands in for the one after it
    assert np.array_equal(demos.obs["proprio"], [state(i) for i in frames])
    assert np.array_equal(demos.taken(), [action(i) for i in (*range(6), *range(11, 18))])
    assert not demos.action[[6, 14]].any()
    for row, i in enumerate(frames):
        middle = picture(i, 48, 64)[:, 8:56]
        for corner in (0, 63):
            source = middle[corner * 47 // 63, corner * 47 // 63]
            assert np.abs(demos.obs["primary"][row, corner, corner].astype(int) - source).max() <= 8
        assert np.abs(demos.obs["wrist"][row, ::63, ::63].mean() - picture(i, 32, 32)[::31, ::31].mean()) < 4


def test_state_mode_needs_no_camera(tmp_path, known, inline, monkeypatch):
    form = lerobot_read.form_of(None, None)
    form = dataclasses.replace(form, shapes={"proprio": (16,)})
    monkeypatch.setattr(lerobot_read, "form_of", lambda args, make_env: form)
    demos = load_demos(args_of(tmp_path, TINY, obs_mode="state"), None)
    assert demos.obs.keys() == {"proprio"}


@pytest.mark.parametrize("lossless", [False, True])
def test_round_trip(lossless, tmp_path, known, inline):
    """Numbers exactly; pictures exactly as images, and nearly as video. Files of one episode each."""
    rng = np.random.default_rng(0)
    first = load_demos(args_of(tmp_path, TINY), None)
    noise = rng.integers(0, 20, first.obs["primary"].shape)
    first.obs["primary"] = (first.obs["primary"] // 2 + noise).astype(np.uint8)
    for start, length in zip(first.starts(), first.lengths):  # what is seen last isn't stored
        first.obs["primary"][start + length] = first.obs["primary"][start + length - 1]
    first.action[:] = rng.uniform(-1, 1, first.action.shape)
    first.action[first.starts() + first.lengths] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plumbing.lerobot_write.PER_FILE", 1)
        write_dataset(first, tmp_path / "out", dataclasses.replace(ABOUT, lossless=lossless))
    assert len(list((tmp_path / "out").rglob("data/**/*.parquet"))) == 2
    again = load_demos(args_of(tmp_path, tmp_path / "out"), None)
    for name in ("action", "lengths", "steps", "success"):
        assert np.array_equal(getattr(again, name), getattr(first, name)), name
    assert np.array_equal(again.obs["proprio"], first.obs["proprio"])
    for camera in ("primary", "wrist"):
        error = np.abs(again.obs[camera].astype(int) - first.obs[camera])
        assert error.mean() < 4 and (not lossless or not error.any()), camera


def test_the_meta_is_what_lerobot_writes(tmp_path, known, inline):
    """The same files, columns and types, but for names of the user's own."""
    demos = load_demos(args_of(tmp_path, TINY), None)
    write_dataset(demos, tmp_path / "out", ABOUT)
    theirs, ours = (json.loads((path / "meta/info.json").read_text()) for path in (TINY, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and ours["total_frames"] == 13
    counted = ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.success")
    assert {name: ours["features"][name] for name in counted} == {name: theirs["features"][name] for name in counted}
    for name in ("meta/tasks.parquet", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        one, two = (parquet.read_schema(path / name) for path in (TINY, tmp_path / "out"))
        columns = [c for c in one.names if not c.startswith(("stats/", "observation.images", "videos/"))]
        kinds = [
            [str(schema.field(c).type).replace("large_", "").replace("item:", "element:") for c in columns]
            for schema in (one, two)
        ]
        assert kinds[0] == kinds[1], name
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    assert stats["action"]["mean"] == pytest.approx(demos.taken().mean(0), abs=1e-6)
    assert np.shape(stats["observation.images.primary"]["q50"]) == (3, 1, 1)


# --- what is refused ---
def change_info(path, **changes):
    file = path / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(path, name):
    file = path / "data/chunk-000/file-000.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns([name]), file)


def change_episodes(path, name, value):
    file = path / "meta/episodes/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    table = table.set_column(table.column_names.index(name), name, pyarrow.array([value] * len(table)))
    parquet.write_table(table, file)


def cut(path, name):
    file = next(path.rglob(name))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_state(path):
    file = path / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    values = pyarrow.array([[float("nan")] * 16] * len(table), pyarrow.list_(pyarrow.float32(), 16))
    parquet.write_table(table.set_column(0, "observation.state", values), file)


@pytest.mark.parametrize("damage, flags, words", [
    (lambda p: change_info(p, codebase_version="v2.1"), {}, "is LeRobotDataset v2.1, and v3 is read: convert it with lerobot"),
    (lambda p: (p / "meta/info.json").unlink(), {}, "is no LeRobotDataset: it has no meta/info.json"),
    (lambda p: (p / "meta/info.json").write_text("{"), {}, "info.json can't be read"),
    (lambda p: change_info(p, features={}), {}, "names no features"),
    (lambda p: shutil.rmtree(p / "meta/episodes"), {}, "holds no episodes"),
    (lambda p: change_info(p, fps=30), {}, "has 30 frames a second: give --control-freq 30"),
    (lambda p: change_info(p, data_path="../{chunk_index}"), {}, "leads out of the folder"),
    (lambda p: change_info(p, data_path="{nothing}"), {}, "data_path that can't be used"),
    (lambda p: without(p, "action"), {}, "has no column action, which meta/info.json names"),
    (spoil_state, {}, "observation.state of episode 0 of .* aren't finite"),
    (lambda p: cut(p, "file-000.mp4"), {}, "the video observation.images.front of episode 0"),
    (lambda p: cut(p, "data/chunk-000/file-000.parquet"), {}, "can't be read"),
    (lambda p: change_episodes(p, "length", 99), {}, "has 6 rows, and 99 in meta/episodes"),
    (lambda p: change_episodes(p, "tasks", ["a", "b"]), {}, "has 2 tasks .'a', 'b'., none of which is PushCube-v1's"),
    (None, dict(num_demos=9), "holds 3 episodes of the task; --num-demos asks for 9"),
    (None, dict(demo_columns="state=nothing"), "has no column nothing: give --demo-columns state=NAME, with one of"),
    (None, dict(demo_columns="eye=x"), "--demo-columns eye=x: it takes words ROLE=NAME"),
    (None, dict(demo_columns="primary=action"), "action holds no pictures; its cameras are"),
    (None, dict(demo_columns="action=observation.state"), "has 16 numbers, and PushCube-v1 with --control-mode pd_ee_delta_pos has 4"),
    (None, dict(demo_columns="state=action"), "action of .* has 4 numbers, and PushCube-v1 with --obs-mode rgb has 16"),
])  # fmt: skip
def test_what_will_not_do_is_one_line(damage, flags, words, tmp_path, known, inline):
    shutil.copytree(TINY, tmp_path / "data")
    if damage:
        damage(tmp_path / "data")
    with pytest.raises(UserError, match=words) as caught:
        load_demos(args_of(tmp_path, tmp_path / "data", **flags), None)
    assert "\n" not in str(caught.value)


def test_cameras_are_told_apart_by_their_names():
    def found(*names, role="primary"):
        features = {f"observation.images.{name}": {"dtype": "video"} for name in names}
        return lerobot_read.camera_for(lerobot_read.Dataset(Path("d"), {"features": features}, []), role).split(".")[-1]

    assert found("top") == "top" and found("top", "left_wrist") == "top" and found("top", "primary") == "primary"
    assert found("top", "left_wrist", role="wrist") == "left_wrist"
    with pytest.raises(UserError, match="which camera of d is primary. It has .*top, .*side: give --demo-columns"):
        found("top", "side")
    with pytest.raises(UserError, match="is wrist. .*--cameras primary does without it"):
        found("top", role="wrist")


def test_the_task_chooses_the_episodes(capsys):
    def chosen(*tasks):
        episodes = [{"episode_index": i, "tasks": [task]} for i, task in enumerate(tasks)]
        data = lerobot_read.Dataset(Path("d"), {}, episodes)
        return [episode["episode_index"] for episode in lerobot_read.for_task(data, "PushCube-v1")]

    assert chosen("other", TASK, TASK) == [1, 2] and capsys.readouterr().err == ""
    assert chosen("push it", "push it") == [0, 1]
    assert capsys.readouterr().err == f"d says 'push it'; the policy is told {TASK!r}\n"


def test_actions_for_another_controller_are_refused(tmp_path, known, inline):
    demos = load_demos(args_of(tmp_path, TINY), None)
    write_dataset(demos, tmp_path / "out", ABOUT)
    with pytest.raises(UserError, match="has actions for pd_ee_delta_pos, not pd_ee_delta_pose: give --control-mode"):
        load_demos(args_of(tmp_path, tmp_path / "out", control_mode="pd_ee_delta_pose"), None)


def test_columns_go_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="--demo-columns names columns of a LeRobotDataset: give its folder"):
        load_demos(tiny_args(tmp_path, script, demo_columns="state=x"), None)


def test_a_changed_folder_is_read_anew(tmp_path, known, inline):
    shutil.copytree(TINY, tmp_path / "data")
    args = args_of(tmp_path, tmp_path / "data")
    before = load_demos(args, None)
    change_info(tmp_path / "data", robot_type="another one")
    without(tmp_path / "data", "next.success")
    info = json.loads((tmp_path / "data/meta/info.json").read_text())
    del info["features"]["next.success"]
    (tmp_path / "data/meta/info.json").write_text(json.dumps(info))
    after = load_demos(args, None)  # without the column each episode ends with a success
    assert before.lengths.tolist() == [6, 7] and after.lengths.tolist() == after.steps.tolist() == [6, 5]


# --- the command ---
def test_demonstrations_go_out_and_come_back(place, demos, tmp_path, inline, capsys):
    """From a script's cache; what comes back trains a policy as the demonstrations themselves would."""
    flags = ["--env-id", "PushCube-v1", "--obs-mode", "state", "--num-demos", "4", "--cameras", "primary"]
    flags += ["--max-episode-steps", "10", "--drop-idle", "0", "--chunk-len", "3"]
    program = str(Path(script.__file__))
    out = tmp_path / "out"
    lerobot.main(["export", program, *flags, "--demo-dir", str(place / "demos"), "--out", str(out)])
    assert capsys.readouterr().out.startswith(f"4 episodes, {demos.lengths.sum()} frames, ")
    again = load_demos(tiny_args(tmp_path, script, demo_path=str(out)), script.make_env)
    assert np.array_equal(again.taken(), demos.taken()) and np.array_equal(again.steps, demos.steps)
    assert np.array_equal(again.success, demos.success)
    stored = np.delete(np.arange(len(demos.action)), demos.starts() + demos.lengths)
    assert np.array_equal(again.obs["proprio"][stored], demos.obs["proprio"][stored])
    run = tmp_path / "run"
    run.mkdir()
    args = tiny_args(place, script)
    script.validate(args)
    write_json(run / "config.json", {"script": "bc.py", "args": dataclasses.asdict(args)})
    lerobot.main(["export", str(run), "--out", str(tmp_path / "same")])
    name = "data/chunk-000/file-000.parquet"
    assert parquet.read_table(tmp_path / "same" / name) == parquet.read_table(out / name)
    with pytest.raises(UserError, match="exists: choose another --out"):
        lerobot.main(["export", program, "--out", str(out)])


@pytest.mark.parametrize("words, message", [
    ([], None), (["import"], "usage: "), (["export", "nothing.py", "--out", "x"], "is no script"),
    (["export", "nothing", "--out", "x"], "is no run folder"), (["export", "a.h5", "--out", "x"], "isn't by plumbing.record"),
    (["export", "runs/x", "--out", "x", "--seed", "1"], "--seed goes with a script"),
])  # fmt: skip
def test_bad_words(words, message, capsys):
    if message is None:
        lerobot.main(words)
        assert "plumbing.lerobot export" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match=message):
        lerobot.main(words)
