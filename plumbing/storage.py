"""Files that outlive a kill, a full disk and a power cut: one run to a folder, checkpoints, tables that only grow."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from plumbing.flags import UserError


# --- single files ---
def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes | memoryview) -> None:
    """A file with its content on the disk; its entry in the folder may not be."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Atomic and durable: after a crash the file is the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary, content)
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, content: dict) -> None:
    """JSON has no NaN: null stands for numbers that don't exist, such as the steps to a success that never was."""
    replace(path, (json.dumps(finite(content), indent=2) + "\n").encode())


def finite(content):
    """None in the place of each number that is NaN or infinite."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not np.isfinite(content):
        return None
    return content


def checksum_of(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def lock(folder: Path) -> IO[str]:
    """Holds the folder until the file is closed, or this process ends however it ends. Raises: UserError."""
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        raise UserError(f"{folder} is in use by process {owner}: wait for it, or choose another --run-name") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


# --- checkpoints ---
class Checkpoints:
    """folder/checkpoints: the last two, and the rows of buffers, which are written once.

    latest                          name of the newest
    NAME/weights.safetensors        the agent
    NAME/training.pt                optimizers, generators, counters
    NAME/sums.json                  checksums of these two
    rows/BUFFER-VERSION-COLUMN.bin  raw rows; a checkpoint knows how many of them belong to it

    Each rank writes the rows of its buffers, as "rank1-BUFFER-..." from rank 1 on. Rank 0 writes everything else.

    A buffer has `version` and a state_dict of tensors that only grow along their first dimension; it raises its
    version where earlier rows change. Each step of `save` is on the disk before the next one begins, so a crash at any
    time leaves a checkpoint that can be read.
    """

    def __init__(self, folder: Path):
        self.root = folder / "checkpoints"
        self.written: dict[str, tuple[int, int]] = {}  # rows in each table, and their checksum
        self.tables: dict[str, set[str]] = {}  # of each checkpoint that this process wrote or read
        self.loaded = ""  # the checkpoint that `load` has read

    def save(self, name: str, weights: dict[str, Tensor], state: dict, buffers: dict) -> None:
        """Raises: OSError, with the last checkpoint as it was."""
        self.root.mkdir(parents=True, exist_ok=True)
        same = [place_in_order(known)[1] for known in self.names() if known.rstrip("+") == name]
        if same:  # never over one that is good
            name += "+" * (max(same) + 1)
        temporary = self.root / f".{name}.tmp"
        try:
            state = state | {"buffers": self.write_rows(buffers)}
            shutil.rmtree(temporary, ignore_errors=True)  # left half-written by a kill
            temporary.mkdir()
            self.fill(temporary, weights, state)
            os.replace(temporary, self.root / name)
            sync(self.root)
            replace(self.root / "latest", name.encode())
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.tables[name] = tables_of(state)
        self.clean()

    @staticmethod
    def fill(folder: Path, weights: dict[str, Tensor], state: dict) -> None:
        # Through memory: the libraries' own writers hide that a disk is full.
        stored = save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()})
        buffer = io.BytesIO()
        torch.save(state, buffer)
        sums = {}
        for name, content in {"weights.safetensors": stored, "training.pt": buffer.getbuffer()}.items():
            write(folder / name, content)
            sums[name] = zlib.crc32(content)
        write(folder / "sums.json", json.dumps(sums).encode())
        sync(folder)

    def write_rows(self, buffers: dict, prefix: str = "") -> dict:
        """Onto the disk, what is new of all buffers. Returns what `read` needs to find each."""
        (self.root / "rows").mkdir(parents=True, exist_ok=True)
        known = {key: self.append(prefix + key, buffer) for key, buffer in buffers.items()}
        sync(self.root / "rows")
        return known

    def append(self, key: str, buffer) -> dict:
        """Write what is new of a buffer's columns. Returns what `read` needs to find them."""
        columns = {}
        for name, tensor in buffer.state_dict().items():
            file = f"{key}-{buffer.version}-{name}.bin"
            done, checksum = self.written.get(file, (0, 0))
            if not (self.root / "rows" / file).exists():
                done, checksum = 0, 0
            new = tensor[done:].cpu().contiguous()
            if len(new) or not done:
                width = int(np.prod(tensor.shape[1:])) * tensor.element_size()  # bytes of a row
                content = new.flatten().view(torch.uint8).numpy().data
                checksum = zlib.crc32(content, checksum)
                with (self.root / "rows" / file).open("r+b" if done else "wb") as table:
                    table.seek(done * width)
                    table.write(content)
                    table.flush()
                    os.fsync(table.fileno())
            self.written[file] = (len(tensor), checksum)
            dtype = str(tensor.dtype).removeprefix("torch.")
            columns[name] = {"file": file, "shape": list(tensor.shape), "dtype": dtype, "sum": checksum}
        return {"version": buffer.version, "columns": columns}

    def clean(self) -> None:
        """Keep the last two checkpoints, and the tables that they need."""
        kept = self.names()[:2]
        for old in self.root.iterdir():
            if old.is_dir() and old.name not in (*kept, "rows"):
                shutil.rmtree(old, ignore_errors=True)
        if all(name in self.tables for name in kept):
            needed = set().union(*(self.tables[name] for name in kept))
            for table in (self.root / "rows").iterdir():
                if table.name not in needed:
                    table.unlink()

    def names(self) -> list[str]:
        """Complete checkpoints, the latest first."""
        found = [path.name for path in self.root.glob("update-*") if (path / "training.pt").exists()]
        known = [name for name in found if re.fullmatch(r"update-\d+\+*", name)]
        return sorted(known, key=place_in_order, reverse=True)

    def load(self, resume: bool) -> tuple[dict[str, Tensor], dict]:
        """Weights and training state, with buffers, of the last checkpoint that can be read: `loaded`.

        With `resume`, damaged ones after it are put aside until the next is written: the run will write these updates
        again. Raises: UserError.
        """
        damaged = {}
        for name in self.names():
            try:
                weights, state, tables = self.load_one(name)
            except MemoryError:
                raise
            except Exception as error:  # the readers raise all sorts
                damaged[name] = error
                continue
            self.tables[name] = tables_of(state)
            self.loaded = name
            for bad, error in damaged.items():
                reason = " ".join(str(error).split())[:200]
                print(f"checkpoint {bad} is damaged ({reason}); going on from {name}", file=sys.stderr, flush=True)
                if resume:
                    os.replace(self.root / bad, self.root / f"damaged-{bad}")
            return weights, state | {"buffers": tables}
        hint = "a run that died before its first one has to be started again, under another --run-name"
        error = next(iter(damaged.values()), "none is there")
        raise UserError(f"{self.root.parent} holds no readable checkpoint ({str(error)[:200]}); {hint}")

    def load_one(self, name: str, rank: int = 0) -> tuple[dict[str, Tensor], dict, dict]:
        """Weights, training state and a rank's buffers. Raises: all sorts, if something is wrong with any of them."""
        folder = self.root / name
        self.written = {}  # what a damaged one after it said of the tables is not to be relied on
        if (folder / "sums.json").exists():
            for file, checksum in json.loads((folder / "sums.json").read_text()).items():
                if checksum_of(folder / file) != checksum:
                    raise ValueError(f"{file} isn't as it was written")
        state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        for number, owner in enumerate(owners(state)):
            read = {key: self.read(known) for key, known in owner["buffers"].items()}
            if number == rank:
                tables = read
        return load_file(folder / "weights.safetensors"), state, tables

    def read(self, known: dict) -> dict:
        """{"version": ..., "columns": {name: tensor}} of a buffer. Raises: ValueError for a table that is damaged."""
        columns = {}
        for name, column in known["columns"].items():
            columns[name] = torch.empty(column["shape"], dtype=getattr(torch, column["dtype"]))
            content = columns[name].flatten().view(torch.uint8).numpy()  # the same memory
            with (self.root / "rows" / column["file"]).open("rb") as table:
                size = table.readinto(content)
            if size < len(content):
                raise ValueError(f"{column['file']} has {size} bytes of {len(content)}")
            checksum = zlib.crc32(content)
            if column.get("sum", checksum) != checksum:
                raise ValueError(f"{column['file']} isn't as it was written")
            self.written[column["file"]] = (column["shape"][0], checksum)
        return {"version": known["version"], "columns": columns}


def place_in_order(name: str) -> tuple[int, int]:
    """What a checkpoint is sorted by: updates, then which one of those with as many."""
    return int(name.rstrip("+").removeprefix("update-")), name.count("+")


def owners(state: dict) -> list[dict]:
    """What each rank has of its own: "buffers", "rng" and some of the "parts"."""
    return [state, *state.get("others", [])]


def tables_of(state: dict) -> set[str]:
    """Files that a checkpoint's buffers are in."""
    buffers = [buffer for owner in owners(state) for buffer in owner["buffers"].values()]
    return {column["file"] for buffer in buffers for column in buffer["columns"].values()}
