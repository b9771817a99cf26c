"""What holds across the scripts: shared blocks are the same bytes, flags are read and typed, none imports another."""

import ast
import dataclasses
import importlib
import re
import types
import typing
from collections import Counter

import pytest
from conftest import ROOT

SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in SCRIPTS}
BEGIN, END = re.compile(r"^# --- shared: (.+) ---$"), "# --- end shared ---"


def shared_blocks(text: str) -> dict[str, str]:
    """Name -> bytes between the marks. Raises: ValueError for marks that don't pair up."""
    blocks, name = {}, None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if begin := BEGIN.match(line.rstrip("\n")):
            if name is not None or begin[1] in blocks:
                raise ValueError(f"line {number}: block {begin[1]!r} begins inside another one, or twice")
            name = begin[1]
            blocks[name] = ""
        elif line.rstrip("\n") == END:
            if name is None:
                raise ValueError(f"line {number}: the end of no block")
            name = None
        elif name is not None:
            blocks[name] += line
    if name is not None:
        raise ValueError(f"block {name!r} has no end")
    return blocks


def odd_ones(texts: dict[str, str]) -> list[str]:
    """'block: file' for each file whose block differs from what most files have."""
    found = {file: shared_blocks(text) for file, text in texts.items()}
    odd = []
    for name in sorted({name for blocks in found.values() for name in blocks}):
        own = {file: blocks[name] for file, blocks in found.items() if name in blocks}
        usual = Counter(own.values()).most_common(1)[0][0]
        odd += [f"{name}: {file}" for file, block in own.items() if block != usual]
    return odd


def test_shared_blocks_are_identical():
    assert odd_ones({path.name: path.read_text() for path in SCRIPTS}) == []


def test_the_odd_file_is_named():
    def text(body):
        return f"a = 1\n# --- shared: x ---\n{body}\n# --- end shared ---\nb = 2\n"

    texts = {"one.py": text("f = 1"), "two.py": text("f = 1 "), "three.py": text("f = 1"), "four.py": "f = 3\n"}
    assert odd_ones(texts) == ["x: two.py"]
    for broken in ("# --- shared: x ---\n", END + "\n", text("f = 1") + text("f = 1"), text("# --- shared: y ---")):
        with pytest.raises(ValueError):
            shared_blocks(broken)


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(ROOT.glob("backbones/*.py"))], ids=lambda path: path.stem)
def test_scripts_stand_alone(path):
    """A script imports no other one; backbones know none."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(node.module.split(".")[0])
    assert not imported & (TREES.keys() | {"benchmark", "tests"})


@pytest.mark.parametrize("name", TREES)
def test_functions_are_short(name):
    long = {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            long[node.name] = node.end_lineno - node.lineno + 1
    assert {function: lines for function, lines in long.items() if lines > 60} == {}


def unread(tree: ast.Module) -> list[str]:
    """Fields of `Args` that no expression like args.NAME reads."""
    (args,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = [n.target.id for n in args.body if isinstance(n, ast.AnnAssign)]
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
            read |= {node.attr} if owner in ("args", "flags") else set()
    return [field for field in fields if field not in read]


@pytest.mark.parametrize("name", [name for name, tree in TREES.items() if "class Args" in ast.unparse(tree)])
def test_flags(name):
    assert unread(TREES[name]) == []
    module = importlib.import_module(name)
    hints = typing.get_type_hints(module.Args)
    for field in dataclasses.fields(module.Args):
        assert fits(field.default, hints[field.name]), f"{field.name} = {field.default!r} is no {hints[field.name]}"
    for field, value in getattr(module, "PAPER", {}).items():
        assert fits(value, hints[field]), f"PAPER: {field} = {value!r} is no {hints[field]}"
    names = [field.name for field in dataclasses.fields(module.Args)]
    assert names[:2] == ["env_id", "out" if name == "make_demos" else "seed"] and len(set(names)) == len(names)


def fits(value, hint) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter: Literal[...] | None
        return any(fits(value, part) for part in typing.get_args(hint))
    return type(value) is hint


def test_the_flag_checks_can_fail():
    source = "class Args:\n    a: int = 1\n    b: int = 2\n\ndef f(args):\n    self.b = args.a\n    return other.b\n"
    assert unread(ast.parse(source)) == ["b"]
    assert not fits(25e3, int) and not fits(1, float) and fits(None, str | None) and not fits("x", typing.Literal["y"])
    assert not fits(True, int)
    assert fits(None, typing.Literal["y"] | None) and not fits("x", typing.Literal["y"] | None)
