"""Demonstrations as a LeRobotDataset v3 folder, which lerobot and plumbing/lerobot_read.py read.

The last observation of an episode has no action, and LeRobot's frames are pairs of both: it is left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from plumbing.flags import UserError
from plumbing.lerobot_read import DATA, VIDEO, Columns, Rows

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
PER_FILE = 100  # episodes in a file of data, and in one of video
PER_CHUNK = 1000  # files in a folder
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
COUNTED = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class About:
    """What a data set says beside its numbers."""

    instruction: str
    robot: str
    control_mode: str
    control_freq: int
    lossless: bool = False  # pictures as PNG in the tables, and not as H.264 video


def write_dataset(demos, folder: Path, about: About) -> None:
    """Write a folder that isn't there yet; demos: `plumbing.Demos`. Raises: UserError, OSError."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError("LeRobot data sets need `pip install pyarrow av`") from error
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --out, or move it away")
    cameras = {name: f"observation.images.{name}" for name in demos.obs if name != "proprio"}
    features = features_of(demos, cameras, about)
    episodes = []
    frames = 0
    for first in range(0, len(demos.lengths), PER_FILE):
        numbers = range(first, min(first + PER_FILE, len(demos.lengths)))
        chunk, file = divmod(first // PER_FILE, PER_CHUNK)
        place = {"chunk_index": chunk, "file_index": file}
        parts = [frames_of(demos, number, about) for number in numbers]
        rows = write_part(folder, parts, place, cameras, about, frames)
        for row, number in zip(rows, numbers):
            row["episode_index"] = number
            episodes.append(row)
        frames += sum(row["length"] for row in rows)
    write_meta(folder, demos, episodes, features, about, cameras)


def features_of(demos, cameras: Columns, about: About) -> dict[str, dict]:
    """The columns, as meta/info.json describes them."""
    width = demos.obs["proprio"].shape[1]
    actions = demos.action.shape[1]
    found = {
        "observation.state": feature("float32", [width], numbered("proprio", width)),
        "action": feature("float32", [actions], numbered(about.control_mode, actions)),
        "next.success": feature("bool", [1], None),
    }
    for name, column in cameras.items():
        shape = list(demos.obs[name].shape[1:])
        found[column] = feature("image" if about.lossless else "video", shape, ["height", "width", "channels"])
        if not about.lossless:
            sizes = {"video.height": shape[0], "video.width": shape[1], "video.channels": 3}
            coded = {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.is_depth_map": False}
            timed = {"video.fps": about.control_freq, "has_audio": False}
            found[column]["info"] = sizes | coded | timed
    for name in COUNTED:
        found[name] = feature("float32" if name == "timestamp" else "int64", [1], None)
    return found


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{i}" for i in range(count)]


def feature(dtype: str, shape: list[int], names: list[str] | None) -> dict:
    return {"dtype": dtype, "shape": shape, "names": names}


def frames_of(demos, number: int, about: About) -> Rows:
    """The columns of an episode of T frames: [T] or [T, ...] each; cameras under their own names."""
    start = demos.starts()[number]
    length = int(demos.lengths[number])
    rows = slice(start, start + length)
    counted = np.arange(length)
    found = {name: demos.obs[name][rows] for name in demos.obs}
    found["observation.state"] = found.pop("proprio")
    found["action"] = demos.action[rows]
    found["next.success"] = demos.success[rows]
    found["timestamp"] = (counted / about.control_freq).astype(np.float32)
    found["frame_index"] = counted
    found["episode_index"] = np.full(length, number)
    found["index"] = start - number + counted  # each episode before has one row more here
    found["task_index"] = np.zeros(length, int)
    return found


# === Files ===========================================================================================================
def write_part(folder: Path, parts: list, place: dict, cameras: Columns, about: About, frames: int) -> list:
    """A file of data and one of each video, with some episodes: their rows for meta/episodes.

    frames: how many there are in the files before.
    """
    import pyarrow

    columns = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        if name not in cameras:
            columns[name] = as_column(values)
        elif about.lossless:
            stored = [{"bytes": png(picture), "path": None} for picture in values]
            columns[cameras[name]] = pyarrow.array(stored)
        else:
            path = folder / VIDEO.format(video_key=cameras[name], **place)
            write_video(path, values, about.control_freq)
    write_table(folder / DATA.format(**place), pyarrow.table(columns))
    rows = []
    before = 0  # frames in this file
    for part in parts:
        length = len(part["action"])
        row = {"tasks": [about.instruction], "length": length}
        row |= under("data", place)
        row["dataset_from_index"] = frames + before
        row["dataset_to_index"] = frames + before + length
        for column in [] if about.lossless else cameras.values():
            row |= under(f"videos/{column}", place)
            row[f"videos/{column}/from_timestamp"] = before / about.control_freq
            row[f"videos/{column}/to_timestamp"] = (before + length) / about.control_freq
        row |= under("meta/episodes", {"chunk_index": 0, "file_index": 0})
        for name, numbers in stats_of(part, cameras).items():
            row |= under(f"stats/{name}", numbers)
        rows.append(row)
        before += length
    return rows


def under(name: str, content: dict) -> dict:
    """Columns of a nested table, as lerobot names them."""
    return {f"{name}/{key}": value for key, value in content.items()}


def as_column(values: np.ndarray):
    """[T] or [T, n] as a pyarrow column."""
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def write_table(path: Path, table) -> None:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def png(picture: np.ndarray) -> bytes:
    from PIL import Image

    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "PNG")
    return stored.getvalue()


def write_video(path: Path, pictures: np.ndarray, frequency: int) -> None:
    """H.264; every second frame is a key frame, so that any one is found quickly. Shape: [T, h, w, 3] uint8."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": "12", "g": "2", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", frequency, options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, frequency)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_meta(folder: Path, demos, episodes: list[dict], features: dict, about: About, cameras: Columns) -> None:
    """meta/: info.json, stats.json, tasks.parquet and the episodes."""
    import pyarrow

    write_table(folder / EPISODES, pyarrow.Table.from_pylist(episodes))
    write_table(folder / "meta" / "tasks.parquet", tasks_table(about.instruction))
    info = {
        "codebase_version": "v3.0",
        "robot_type": about.robot,
        "total_episodes": len(episodes),
        "total_frames": sum(episode["length"] for episode in episodes),
        "total_tasks": 1,
        "chunks_size": PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": about.control_freq,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": DATA,
        "video_path": None if about.lossless or not cameras else VIDEO,
        "features": features,
    }
    parts = [frames_of(demos, number, about) for number in range(len(episodes))]
    whole = {}
    for name in parts[0]:
        whole[name] = np.concatenate([part[name] for part in parts])
    stats = stats_of(whole, cameras)
    (folder / "meta" / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    (folder / "meta" / "info.json").write_text(json.dumps(info, indent=2) + "\n")  # last: without it there is no data


def tasks_table(instruction: str):
    """The instruction as the index of a pandas table, as lerobot wants it."""
    import pyarrow

    index = "__index_level_0__"
    kinds = {"task_index": "int64", index: "unicode"}
    described = []
    for name, kind in kinds.items():
        numpy_type = "object" if name == index else kind
        own = None if name == index else name
        described.append(dict(name=own, field_name=name, pandas_type=kind, numpy_type=numpy_type, metadata=None))
    pandas = dict(index_columns=[index], column_indexes=[], columns=described, pandas_version="2.2.0")
    table = pyarrow.table({"task_index": [0], index: [instruction]})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def stats_of(rows: Rows, cameras: Columns) -> dict[str, dict]:
    """What lerobot normalises by, of each column; of pictures by colour, from 0 to 1."""
    found = {}
    for name, values in rows.items():
        if name in cameras:
            some = values[:: max(len(values) // 100, 1)] / 255
            colours = some.reshape(-1, 3)
            nested = {"count": [len(some)]}
            for key, values in numbers_of(colours).items():
                nested[key] = [[[value]] for value in values]  # [3, 1, 1]
            found[cameras[name]] = nested
        else:
            flat = values.reshape(len(values), -1).astype(float)
            found[name] = numbers_of(flat) | {"count": [len(values)]}
    return found


def numbers_of(values: np.ndarray) -> dict[str, list[float]]:
    """Statistics over the rows of [N, n]."""
    found = {}
    for name in ("min", "max", "mean", "std"):
        found[name] = getattr(values, name)(0).tolist()
    for name, share in QUANTILES.items():
        found[name] = np.quantile(values, share, axis=0).tolist()
    return found


def files(folder: Path) -> Iterator[Path]:
    """All files of a data set."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
