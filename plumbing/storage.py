"""Files that outlive a kill, a full disk and a power cut: one run to a folder, checkpoints, tables that only grow."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
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
    replace(path, (json.dumps(content, indent=2) + "\n").encode())


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
    rows/BUFFER-VERSION-COLUMN.bin  raw rows; a checkpoint knows how many of them belong to it

    A buffer has `version` and a state_dict of tensors that only grow along their first dimension; it raises its
    version where earlier rows change. Each step of `save` is on the disk before the next one begins, so a crash at any
    time leaves a checkpoint that can be read.
    """

    def __init__(self, folder: Path):
        self.root = folder / "checkpoints"
        self.written: dict[str, int] = {}  # rows in each table
        self.tables: dict[str, set[str]] = {}  # of each checkpoint that this process wrote or read

    def save(self, name: str, weights: dict[str, Tensor], state: dict, buffers: dict) -> None:
        """Raises: OSError, with the last checkpoint as it was."""
        (self.root / "rows").mkdir(parents=True, exist_ok=True)
        while (self.root / name).exists():  # never over one that is good
            name += "+"
        temporary = self.root / f".{name}.tmp"
        try:
            state = state | {"buffers": {key: self.append(key, buffer) for key, buffer in buffers.items()}}
            sync(self.root / "rows")
            temporary.mkdir(exist_ok=True)  # it may be there, left half-written by a kill
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
        write(folder / "weights.safetensors", save({k: v.detach().cpu().contiguous() for k, v in weights.items()}))
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(folder / "training.pt", buffer.getbuffer())
        sync(folder)

    def append(self, key: str, buffer) -> dict:
        """Write what is new of a buffer's columns. Returns what `read` needs to find them."""
        columns = {}
        for name, tensor in buffer.state_dict().items():
            file = f"{key}-{buffer.version}-{name}.bin"
            done = self.written.get(file, 0)
            if not (self.root / "rows" / file).exists():
                done = 0
            new = tensor[done:].cpu().contiguous()
            if len(new) or not done:
                rest = int(np.prod(tensor.shape[1:])) * tensor.element_size()  # bytes of a row
                with (self.root / "rows" / file).open("r+b" if done else "wb") as table:
                    table.seek(done * rest)
                    table.write(new.flatten().view(torch.uint8).numpy().data)
                    table.flush()
                    os.fsync(table.fileno())
            self.written[file] = len(tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            columns[name] = {"file": file, "shape": list(tensor.shape), "dtype": dtype}
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
        found.sort(key=lambda name: (int(name.rstrip("+").removeprefix("update-")), name.count("+")), reverse=True)
        return found

    def load(self, resume: bool) -> tuple[dict[str, Tensor], dict]:
        """Weights and training state, with buffers, of the last checkpoint that can be read.

        With `resume`, damaged ones after it are removed: the run will write these updates again. Raises: UserError.
        """
        damaged = {}
        for name in self.names():
            try:
                state = torch.load(self.root / name / "training.pt", map_location="cpu", weights_only=True)
                tables = {key: self.read(known) for key, known in state["buffers"].items()}
                weights = load_file(self.root / name / "weights.safetensors")
            except Exception as error:  # the readers raise all sorts
                damaged[name] = error
                continue
            self.tables[name] = tables_of(state)
            for bad, error in damaged.items():
                print(f"checkpoint {bad} is damaged ({str(error)[:200]}); going on from {name}", flush=True)
                if resume:
                    shutil.rmtree(self.root / bad)
            return weights, state | {"buffers": tables}
        hint = "a run that died before its first one has to be started again, under another --run-name"
        error = next(iter(damaged.values()), "none is there")
        raise UserError(f"{self.root.parent} holds no readable checkpoint ({str(error)[:200]}); {hint}")

    def read(self, known: dict) -> dict:
        """{"version": ..., "columns": {name: tensor}} of a buffer. Raises: ValueError for a table that is too short."""
        columns = {}
        for name, column in known["columns"].items():
            dtype = getattr(torch, column["dtype"])
            size = int(np.prod(column["shape"])) * dtype.itemsize
            content = np.fromfile(self.root / "rows" / column["file"], np.uint8, size)
            if len(content) < size:
                raise ValueError(f"{column['file']} has {len(content)} bytes of {size}")
            columns[name] = torch.from_numpy(content).view(dtype).reshape(column["shape"])
            self.written[column["file"]] = column["shape"][0]
        return {"version": known["version"], "columns": columns}


def tables_of(state: dict) -> set[str]:
    """Files that a checkpoint's buffers are in."""
    return {column["file"] for buffer in state["buffers"].values() for column in buffer["columns"].values()}
