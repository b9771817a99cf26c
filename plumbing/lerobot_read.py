"""LeRobotDataset v3 folders as demonstrations, without lerobot: parquet through pyarrow, video through av.

  meta/info.json                     version, frames a second, features
  meta/episodes/chunk-*/file-*.parquet   a row an episode: its length, its tasks, and which files it is in
  data/chunk-*/file-*.parquet        a row a frame: state, action, success, and pictures of features kept as images
  videos/CAMERA/chunk-*/file-*.mp4   the other pictures

Frame t has what was seen before action t. What was seen after the last action isn't stored: the last frame stands in
for it. Nothing is replayed, so states have to be what the task's environment gives, number for number.
"""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import compress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.flags import UserError
from plumbing.replay import has_gripper, worker_processes
from plumbing.tasks import cameras_of, check_robot, task_of

ROLES = ("state", "action", "success", "primary", "wrist")  # what --demo-columns can name
ON_HAND = "wrist|hand|gripper"  # in the name of a camera
Columns = dict[str, str]  # role: the data set's name for it
Rows = dict[str, np.ndarray]  # of one episode
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
PLACE = ("chunk_index", "file_index")
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass
class Dataset:
    """A folder, and what its meta says."""

    path: Path
    info: dict
    episodes: list[dict]  # rows of meta/episodes, in order
    opened: dict = field(default_factory=dict)  # the data file that was read last

    @cached_property
    def features(self) -> dict[str, dict]:
        return self.info["features"]

    @property
    def cameras(self) -> list[str]:
        kinds = {name: about["dtype"] for name, about in self.features.items()}
        return [name for name in kinds if kinds[name] in ("image", "video")]

    def file(self, pattern: str, fallback: str, **place) -> Path:
        """A file of the data set. Raises: UserError unless its name is one within the folder."""
        try:
            name = self.info.get(pattern) or fallback
            path = self.path / name.format(**place)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.path}/meta/info.json has a {pattern} that can't be used: {error!r}") from error
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path}/meta/info.json has a {pattern} that leads out of the folder")
        return path


# === Meta ============================================================================================================
def open_dataset(path: Path) -> Dataset:
    """Raises: UserError if it isn't a LeRobotDataset v3 that is complete."""
    file = path / "meta" / "info.json"
    if not file.exists():
        raise UserError(f"{path} is no LeRobotDataset: it has no meta/info.json (a recording is named by its .h5)")
    try:
        info = json.loads(file.read_text())
        version = str(info["codebase_version"])
        features = info["features"].values()
        forms = [(about["dtype"], size_of(about)) for about in features]
        frequency = float(info["fps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({error!r}); make or copy it again") from error
    if not version.startswith("v3."):
        tool = "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30"
        raise UserError(f"{path} is LeRobotDataset {version}, and v3 is read: convert it with lerobot ({tool})")
    if not forms or not frequency > 0:
        raise UserError(f"{file} names no features or no fps; make or copy it again")
    episodes = []
    for part in sorted(path.glob("meta/episodes/*/*.parquet")):
        table = read_table(part)
        wanted = [name for name in table.column_names if not name.startswith("stats/")]
        episodes += table.select(wanted).to_pylist()
    for number, episode in enumerate(episodes):
        missing = {"episode_index", "length", "data/chunk_index", "data/file_index"} - episode.keys()
        if missing:
            raise UserError(f"{path}/meta/episodes: episode {number} has no {min(missing)}; make or copy it again")
    if not episodes:
        raise UserError(f"{path} holds no episodes: meta/episodes has no .parquet with rows")
    return Dataset(path, info, sorted(episodes, key=lambda episode: episode["episode_index"]))


def size_of(about: dict) -> int:
    """Numbers in a row of a feature."""
    return int(np.prod(about["shape"]))


def read_table(path: Path, columns: list[str] | None = None):
    """A parquet file as a pyarrow table. Raises: UserError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("LeRobot data sets need `pip install pyarrow av`") from error
    try:
        return parquet.ParquetFile(path).read(columns)
    except (OSError, ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} can't be read ({reason}); make or copy it again") from error


def check_source(flags) -> None:
    """Can demonstrations be had from the folder --demo-path? Raises: UserError."""
    if flags.spawn != "random":
        raise UserError("--spawn moves objects where demonstrations are made, not read")
    check_robot(flags.env_id, flags.robot_uids)
    data = open_dataset(Path(flags.demo_path))
    frequency = float(data.info["fps"])
    if frequency != flags.control_freq:
        raise UserError(f"{data.path} has {frequency:g} frames a second: give --control-freq {frequency:g}")
    names = data.features.get("action", {}).get("names") or []
    controllers = {str(name).rpartition(".")[0] for name in names}
    others = {name for name in controllers if name.startswith("pd_")} - {flags.control_mode}
    if others:
        raise UserError(f"{data.path} has actions for {min(others)}, not {flags.control_mode}: give --control-mode")
    columns_of(data, flags.demo_columns, list(cameras_of(flags)))
    stored = len(for_task(data, flags.env_id))
    if stored < flags.num_demos:
        raise UserError(f"{data.path} holds {stored} episodes of the task; --num-demos asks for {flags.num_demos}")


def for_task(data: Dataset, env_id: str) -> list[dict]:
    """The episodes with the task's instruction; all, where the data set has one instruction. Raises: UserError."""
    wanted = task_of(env_id).instruction
    told = [episode.get("tasks") or [] for episode in data.episodes]
    tasks = set().union(*told)
    if wanted in tasks:
        fitting = [wanted in own for own in told]
        return list(compress(data.episodes, fitting))
    if len(tasks) > 1:
        known = ", ".join(map(repr, sorted(tasks)[:5]))
        what = f"has {len(tasks)} tasks ({known}), none of which is {env_id}'s: {wanted!r}"
        raise UserError(f"{data.path} {what}; TASKS in plumbing/tasks.py has the instructions")
    if tasks:
        (said,) = tasks
        print(f"{data.path} says {said!r}; the policy is told {wanted!r}", file=sys.stderr)
    return data.episodes


def columns_of(data: Dataset, given: str | None, cameras: list[str]) -> Columns:
    """The data set's name for state, action, success (if it has that) and each of the cameras.

    given   words ROLE=NAME, which go before the usual names. Raises: UserError.
    """
    found = {}
    for word in (given or "").replace(",", " ").split():
        role, _, name = word.partition("=")
        if role not in ROLES or not name:
            raise UserError(f"--demo-columns {word}: it takes words ROLE=NAME, with the roles {', '.join(ROLES)}")
        found[role] = name
    found = {"state": "observation.state", "action": "action"} | found
    if "success" not in found and "next.success" in data.features:
        found["success"] = "next.success"
    for role in cameras:
        if role not in found:
            found[role] = camera_for(data, role)
    known = ", ".join(data.features)
    for role, name in found.items():
        if name not in data.features:
            raise UserError(f"{data.path} has no column {name}: give --demo-columns {role}=NAME, with one of {known}")
        if role in ("primary", "wrist") and name not in data.cameras:
            raise UserError(f"{data.path}: {name} holds no pictures; its cameras are {', '.join(data.cameras)}")
    unseen = {"primary", "wrist"} - set(cameras)
    return {role: name for role, name in found.items() if role not in unseen}


def camera_for(data: Dataset, role: str) -> str:
    """The camera that a role's name tells from the others. Raises: UserError."""
    ends = {name: name.split(".")[-1] for name in data.cameras}
    named = [name for name, end in ends.items() if end == role]
    on_hand = [name for name in ends if re.search(ON_HAND, ends[name])]
    others = [name for name in data.cameras if name not in on_hand]
    usual = on_hand if role == "wrist" else others
    fitting = named or usual
    if len(fitting) != 1:
        known = ", ".join(data.cameras) or "none"
        less = "; --cameras primary does without it" if role == "wrist" else ""
        what = f"which camera of {data.path} is {role}? It has {known}"
        raise UserError(f"{what}: give --demo-columns {role}=NAME{less}")
    return fitting[0]


# === Episodes ========================================================================================================
@dataclass(frozen=True)
class Form:
    """What the environment gives and takes."""

    shapes: dict[str, tuple[int, ...]]  # of an observation's parts
    low: np.ndarray  # [A] of actions
    high: np.ndarray  # [A]
    gripper: bool  # the last number of an action is a gripper's command


def form_of(args, make_env) -> Form:
    """In a worker process: one environment, looked at."""
    env = make_env(args, 1)
    obs, _ = env.reset(seed=[0])
    base = getattr(env, "envs", [env])[0].unwrapped
    space = base.single_action_space
    shapes = {name: obs[name].shape[1:] for name in obs}
    form = Form(shapes, space.low, space.high, has_gripper(base))
    env.close()
    return form


def make_episodes(args, make_env, flags) -> tuple[str, list[Rows]]:
    """Where they are from, and the first --num-demos episodes with a success (fewer, where there aren't as many).

    Their arrays are those of `plumbing.replay.replay`. Raises: UserError.
    """
    data = open_dataset(Path(flags.demo_path))
    with worker_processes(1) as pool:
        form = pool.submit(partial(form_of, args, make_env)).result()
    cameras = [name for name in form.shapes if name != "proprio"]
    columns = columns_of(data, flags.demo_columns, cameras)
    check_sizes(data, columns, form, flags)
    found = []
    failed = 0
    bar = tqdm(total=flags.num_demos, desc=f"episodes of {data.path}", mininterval=2)
    with bar:
        for episode in for_task(data, flags.env_id):
            if len(found) == flags.num_demos:
                break
            rows = read_episode(data, episode, columns, form)
            if rows["success"].any():
                found.append(as_demonstration(rows, form, flags))
                bar.update()
            else:
                failed += 1
    if failed:
        without = f"{failed} episodes of {data.path} have no success"
        print(f"{without} ({columns['success']}): left out", file=sys.stderr)
    if not found:
        raise UserError(f"no episode of {data.path} has a success: {columns.get('success')} is never true")
    return str(data.path), found


def check_sizes(data: Dataset, columns: Columns, form: Form, flags) -> None:
    """Raises: UserError where states or actions have other numbers than the environment's."""
    needed = {"state": form.shapes["proprio"][0], "action": len(form.low)}
    settings = {"state": f"--obs-mode {flags.obs_mode}", "action": f"--control-mode {flags.control_mode}"}
    for role, want in needed.items():
        name = columns[role]
        have = size_of(data.features[name])
        if have != want:
            other = f"{flags.env_id} with {settings[role]} has {want}"
            what = f"{name} of {data.path} has {have} numbers"
            raise UserError(f"{what}, and {other}: give --demo-columns {role}=NAME")


def read_episode(data: Dataset, episode: dict, columns: Columns, form: Form) -> Rows:
    """A frame's parts for all T frames: "state" [T, P], "action" [T, A], "success" [T], cameras [T, H, H, 3] uint8.

    Raises: UserError, which names the episode.
    """
    number = episode["episode_index"]
    length = episode["length"]
    where = f"episode {number} of {data.path}"
    table = rows_of(data, episode, columns)
    if len(table) != length or length < 1:
        raise UserError(f"{where} has {len(table)} rows, and {length} in meta/episodes; make or copy it again")
    found = {}
    for role, name in columns.items():
        if role in ("primary", "wrist"):
            side = form.shapes[role][0]
            if is_video(data, name):
                pictures = video_frames(data, episode, name, side)
            else:
                pictures = stored_images(table[name], where, side)
            found[role] = np.stack(pictures)
        else:
            found[role] = numbers(table[name], f"{name} of {where}")
    for role in ("state", "action"):
        flat = found[role].reshape(length, -1)
        found[role] = flat.astype(np.float32)
        if not np.isfinite(found[role]).all():
            raise UserError(f"{columns[role]} of {where} has numbers that aren't finite")
    succeeded = found.get("success", np.arange(1, length + 1) == length)  # without it, a demonstration ends with one
    found["success"] = succeeded.reshape(length) > 0
    return found


def is_video(data: Dataset, name: str) -> bool:
    return data.features[name]["dtype"] == "video"


def rows_of(data: Dataset, episode: dict, columns: Columns):
    """An episode's rows of its data file, as a pyarrow table. Raises: UserError."""
    from pyarrow import compute

    place = dict(chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"])
    path = data.file("data_path", DATA, **place)
    if path not in data.opened:
        wanted = [name for name in columns.values() if not is_video(data, name)]
        table = read_table(path, ["episode_index", "frame_index", *wanted])
        for name in ("episode_index", "frame_index", *wanted):
            if name not in table.column_names:
                raise UserError(f"{path} has no column {name}, which meta/info.json names; make or copy it again")
        data.opened = {path: table}  # one at a time
    table = data.opened[path]
    own = table.filter(compute.equal(table["episode_index"], episode["episode_index"]))
    return own.sort_by("frame_index")


def numbers(column, where: str) -> np.ndarray:
    """A column of numbers or of lists of them. Raises: UserError."""
    try:
        found = np.array(column.to_pylist(), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} isn't numbers, as many in each row ({error})") from error
    return found


def stored_images(column, where: str, side: int) -> list[np.ndarray]:
    """Pictures that lie in the table as files: [side, side, 3] uint8 each. Raises: UserError."""
    from PIL import Image

    found = []
    for value in column.to_pylist():
        try:
            picture = Image.open(io.BytesIO(value["bytes"])).convert("RGB")
        except (OSError, TypeError, KeyError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"a picture of {where} can't be read ({error}); make or copy it again") from error
        found.append(fit(np.asarray(picture), side))
    return found


def video_frames(data: Dataset, episode: dict, name: str, side: int) -> list[np.ndarray]:
    """An episode's frames of a video, [side, side, 3] uint8 each. Raises: UserError."""
    try:
        import av
    except ImportError as error:
        raise UserError("videos of LeRobot data sets need `pip install pyarrow av`") from error

    where = f"the video {name} of episode {episode['episode_index']} of {data.path}"
    try:
        place = {part: episode[f"videos/{name}/{part}"] for part in PLACE}
        start = float(episode[f"videos/{name}/from_timestamp"])
    except (KeyError, TypeError) as error:
        raise UserError(f"meta/episodes doesn't say where {where} is ({error}); make or copy it again") from error
    path = data.file("video_path", VIDEO, video_key=name, **place)
    frequency = float(data.info["fps"])
    length = episode["length"]
    found = {}
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                index = round((frame.time - start) * frequency)
                if index >= length:
                    break
                if index >= 0:
                    found[index] = fit(frame.to_ndarray(format="rgb24"), side)
    except (OSError, ValueError, IndexError, TypeError, av.error.FFmpegError) as error:
        raise UserError(f"{where} can't be read ({error}); make or copy it again") from error
    if len(found) < length:
        raise UserError(f"{where} has {len(found)} of {length} frames at their times; make or copy it again")
    return [found[index] for index in range(length)]


def fit(picture: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of a picture [h, w, 3], in other pixels: [side, side, 3]."""
    import cv2

    height, width = picture.shape[:2]
    short = min(height, width)
    top = (height - short) // 2
    left = (width - short) // 2
    rows = slice(top, top + short)
    square = picture[rows, left : left + short]
    if short == side:
        return np.ascontiguousarray(square)
    return cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)


def as_demonstration(rows: Rows, form: Form, flags) -> Rows:
    """Frames of an episode with a success, as `plumbing.replay.replay` returns one."""
    action = rows["action"]
    limited = (form.low == -1) & (form.high == 1)  # where the controller cuts actions off
    beyond = (limited & (np.abs(action) > 1.001)).any(1)
    action = np.where(limited, action.clip(-1, 1), action)
    success = rows["success"]
    absolute = np.full(action.shape[1], "delta" not in flags.control_mode)
    absolute[-1] |= form.gripper
    still = action[-1] * absolute
    first = int(success.argmax()) + 1
    more = max(first + flags.upsample_steps - len(success), 0)  # the robot keeps still, and sees the same
    unused = 0 * still
    found = {}
    for name in form.shapes:
        seen = rows["state" if name == "proprio" else name]
        again = np.repeat(seen[-1:], more + 1, axis=0)
        found[f"obs_{name}"] = np.concatenate([seen, again])
    waiting = [still] * more
    found["action"] = np.stack([*action, *waiting, unused])
    after = [success[-1]] * more
    found["success"] = np.array([*success, *after, False])
    found["lengths"] = np.array([len(success) + more])
    found["steps"] = np.array([first])
    found["beyond"] = np.array([beyond.sum()])
    found["gripper"] = np.array([form.gripper])
    return found
