"""What --help says: a script's docstring, then its flags in groups, taken from the comments of its dataclass."""

from __future__ import annotations

import inspect
import itertools
import re
import shutil
import textwrap
import types
from typing import Literal, get_args, get_origin, get_type_hints

# Groups come in this order; those of stages and of what else a script has stand where None is.
GROUPS = ("experiment", "environment", "demonstrations", "model", None, "evaluation and logging")


def flags_help(defaults) -> str:
    """All flags with their defaults, in groups: the comments `# --- name ---` among the fields of a class."""
    groups: dict[str, list[str]] = {}
    for name, (group, text) in explained(type(defaults)).items():
        groups.setdefault(group, []).append(flag_help(name, text, defaults))
    place = {group: GROUPS.index(group if group in GROUPS else None) for group in groups}
    ordered = sorted(groups, key=place.get)  # stable
    return "\n".join(f"{group}\n{''.join(groups[group])}" for group in ordered)


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def explained(cls) -> dict[str, tuple[str, str]]:
    """{field: (its group, the comment behind it)}, from the sources of a dataclass and its bases."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        group = "flags"
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r" +# --- (.+) ---", line):
                group = heading[1]
            elif field := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
                found[field[1]] = (group, field[2])
    return found


def flag_help(name: str, text: str, defaults) -> str:
    """Flag, what it takes, what it means and its default, in lines of at most the terminal's width."""
    kind = get_type_hints(type(defaults))[name]
    default = getattr(defaults, name)
    if isinstance(kind, types.UnionType):  # with None, which is said by leaving the flag out
        kind = get_args(kind)[0]
    if kind is bool:
        title = f"{as_flag(name)}, {as_flag('no-' + name)}"
        default = "on" if default else "off"
    elif get_origin(kind) is Literal:
        title = f"{as_flag(name)} {{{','.join(map(str, get_args(kind)))}}}"
    else:
        title = f"{as_flag(name)} {kind.__name__.upper()}"
    if default is not None:
        text += f" (default: {default})"
    indent = " " * 24
    lines = textwrap.fill(text, width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(title) <= 21:
        return f"  {title:22}{lines.lstrip()}\n"
    return f"  {title}\n{lines}\n"


def wrapped(doc: str) -> str:
    """A docstring for the terminal's width: prose flows anew, and the last column of a row too long comes below it."""
    lines = []
    for is_prose, group in itertools.groupby(doc.strip().splitlines(), lambda line: bool(line) and "  " not in line):
        if is_prose:
            lines += textwrap.wrap(" ".join(group), width(), break_on_hyphens=False)
            continue
        for row in group:
            columns = re.fullmatch(r"(\s*\S.*\S)\s{2,}(\S.*)", row)
            if len(row) <= width():
                lines.append(row)
            elif columns:
                lines += textwrap.wrap(columns[1], width(), subsequent_indent=" " * 6, break_on_hyphens=False)
                lines += textwrap.wrap(columns[2], width(), initial_indent=" " * 8, subsequent_indent=" " * 8)
            else:
                lines += textwrap.wrap(row, width(), subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def width() -> int:
    """Columns of the terminal; 80 for a pipe or a file."""
    return shutil.get_terminal_size().columns
