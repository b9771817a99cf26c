"""Rows in memory that only grow: what a replay buffer keeps of each step."""

from __future__ import annotations

import torch
from torch import Tensor


class Table:
    """Columns of tensors with one row a step. Memory grows by doubling, checkpoints write only rows that are new."""

    def __init__(self, columns: dict[str, Tensor], device: str = "cpu"):
        """Columns by name, as empty tensors [0, ...] of their type; rows will be on the device."""
        self.columns = {name: column.to(device) for name, column in columns.items()}
        self.rows = 0
        self.version = 0  # one more whenever rows change that are there already

    def __getitem__(self, name: str) -> Tensor:
        """The rows of a column: [rows, ...], no copy."""
        return self.columns[name][: self.rows]

    def append(self, count: int, **new) -> None:
        """`count` rows; a shorter column repeats its last one."""
        for name, column in self.columns.items():
            values = torch.as_tensor(new[name]).to(column)
            missing = count - len(values)
            values = torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
            more = self.rows + count - len(column)
            if more > 0:
                room = column.new_zeros(max(more, len(column), 1024), *column.shape[1:])
                column = torch.cat([column, room])
                self.columns[name] = column
            column[self.rows : self.rows + count] = values
        self.rows += count

    def rewrite(self, name: str, values: Tensor) -> None:
        """Other values in the first rows of a column."""
        self.columns[name][: len(values)] = values
        self.version += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self[name] for name in self.columns}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: KeyError, ValueError for other columns than those that are here."""
        for name, column in self.columns.items():
            form = (state[name].shape[1:], state[name].dtype)
            if form != (column.shape[1:], column.dtype):
                raise ValueError(f"{name} has rows of {form}")
        lengths = {len(state[name]) for name in self.columns}
        if len(lengths) > 1:
            raise ValueError(f"columns of {lengths} rows")
        self.columns = {name: state[name].to(column.device) for name, column in self.columns.items()}
        self.rows = max(lengths, default=0)


# --- observations: {"proprio": [., P], cameras: [., H, H, 3]} ---
def cut(obs: dict, *where) -> dict:
    """obs[where] of each."""
    return {name: value[where] for name, value in obs.items()}


def joined(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """One after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def windows(obs: dict[str, Tensor], rows: Tensor, first: Tensor, window: int) -> dict[str, Tensor]:
    """What was seen at rows [B] and in the steps before, as the policies' `feature` wants it; episodes begin at `first`.

    Proprio [B, P], cameras [B, W, H, H, 3], and "real" [B, W]: False for steps before the episode.
    """
    steps = rows[:, None] + torch.arange(1 - window, 1, device=rows.device)  # [B, W]
    shown = steps.maximum(first[:, None])
    seen = {name: value[shown] for name, value in obs.items() if name != "proprio"}
    return seen | {"proprio": obs["proprio"][rows], "real": steps >= first[:, None]}
