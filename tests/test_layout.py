"""The design of the house: who imports whom, what stands where, how long and how dense, and flags that mean the same."""

import ast
import dataclasses
import importlib
import re
import types
import typing
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

from plumbing import RunArgs

COMMANDS = ("evaluate", "export", "serve")  # programs for all scripts' runs
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
PACKAGES = {name: sorted(ROOT.glob(f"{name}/*.py")) for name in ("backbones", "operators", "plumbing", "robots")}


def walk(tree: ast.AST, kind) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


# --- who imports whom ---
MAY_IMPORT = {
    "script": ("backbones", "operators", "plumbing"),
    "command": ("backbones", "plumbing"),
    "backbones": ("backbones", "plumbing.flags", "plumbing.hub"),
    "operators": ("operators", "plumbing.flags"),
    "robots": ("robots", "operators.devices", "plumbing.flags", "plumbing.demos", "plumbing.stop", "plumbing.tasks"),
    "plumbing": ("plumbing",),
}


def imported(source: str, package: str = "") -> set[str]:
    """Dotted names of the modules that a source imports, anywhere in it; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def forbidden(kind: str, source: str) -> set[str]:
    """Modules of ours that a script, or a module of a package, must not import."""
    ours = {*SCRIPTS, *PACKAGES, "benchmark", "tests", "conftest"} | {path.stem for path in ROOT.glob("*.py")}
    package = "" if kind in ("script", "command") else kind
    mine = {name for name in imported(source, package) if name.split(".")[0] in ours}
    return {name for name in mine if not any(f"{name}.".startswith(f"{may}.") for may in MAY_IMPORT[kind])} - {
        name for name in mine if any(f"{may}.".startswith(f"{name}.") and "." in may for may in MAY_IMPORT[kind])
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_no_other_script(name):
    assert forbidden("script", SOURCES[name]) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_know_no_script(name):
    source = (ROOT / f"{name}.py").read_text()
    assert forbidden("command", source) == set() and algorithmic(source) == []


@pytest.mark.parametrize("path", sum(PACKAGES.values(), []), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_packages_know_no_script(path):
    assert forbidden(path.parent.name, path.read_text()) == set()


def test_a_forbidden_import_is_found():
    assert forbidden("script", "import torch\nfrom plumbing import Run\nimport backbones.octo") == set()
    assert forbidden("script", "def f():\n    from bc import main") == {"bc", "bc.main"}
    assert forbidden("script", "import benchmark.run as r") == {"benchmark.run"}
    assert forbidden("backbones", "from plumbing.flags import UserError\nfrom . import octo") == set()
    assert forbidden("backbones", "from plumbing.run import Run") == {"plumbing.run", "plumbing.run.Run"}
    assert forbidden("backbones", "from plumbing import Run") == {"plumbing.Run"}
    assert forbidden("operators", "import backbones.octo") == {"backbones.octo"}
    assert forbidden("robots", "from operators.planner import Oracle") == {
        "operators.planner",
        "operators.planner.Oracle",
    }
    assert forbidden("operators", "import robots.server") == {"robots.server"}
    assert forbidden("plumbing", "from robots import franka_http") == {"robots", "robots.franka_http"}
    assert forbidden("plumbing", "import conrft") == {"conrft"}
    assert forbidden("plumbing", "from backbones import octo") == {"backbones", "backbones.octo"}


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle: the first one found, or none."""
    edges = {name: imported(text, name.split(".")[0]) & sources.keys() - {name} for name, text in sources.items()}

    def search(path: list[str]) -> list[str]:
        for following in sorted(edges[path[-1]]):
            if following in path:
                return path[path.index(following) :]
            if found := search([*path, following]):
                return found
        return []

    return next(filter(None, (search([name]) for name in sorted(edges))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_needs_itself(package):
    assert circle({f"{package}.{path.stem}": path.read_text() for path in PACKAGES[package]}) == []


def test_a_circle_is_found():
    open_chain = {"a.x": "from a.y import f", "a.y": "from a import z", "a.z": "import torch"}
    assert circle(open_chain) == []
    assert circle(open_chain | {"a.z": "def late():\n    import a.x"}) == ["a.x", "a.y", "a.z"]


# --- plumbing holds nothing that an algorithm's author would look for ---
def algorithmic(source: str) -> list[str]:
    """What belongs into a script: networks, gradients, optimizers."""
    tree, found = ast.parse(source), []
    for node in walk(tree, ast.ClassDef):
        found += [f"class {node.name}" for base in node.bases if ast.unparse(base).split(".")[-1] == "Module"]
    for node in walk(tree, ast.Attribute):
        found += [f".{node.attr}" for word in ("backward", "zero_grad", "optim") if node.attr == word]
    for name in imported(source):
        found += [f"import {name}"] if re.search(r"\boptim\b", name) else []
    return found


@pytest.mark.parametrize("path", PACKAGES["plumbing"], ids=lambda path: path.stem)
def test_plumbing_learns_nothing(path):
    assert algorithmic(path.read_text()) == []


@pytest.mark.parametrize("source", [
    "class A(nn.Module):\n    pass", "class A(Module):\n    pass", "def f(loss):\n    loss.backward()",
    "x = torch.optim.Adam", "from torch.optim import Adam", "def f(o):\n    o.zero_grad()",
])  # fmt: skip
def test_what_learns_is_found(source):
    assert algorithmic(source)
    assert not algorithmic("class A:\n    def f(self, net: nn.Module):\n        return net.state_dict()")


# --- every script is whole, and in one order ---
SECTIONS = {  # title: what stands there in every script, as patterns of names
    "Arguments": ("Args", "TABLES", "LIMITS", "validate"),
    "Environment": ("make_env",),
    "Replay|Demonstrations": ("ReplayBuffer|ChunkData|Chunks",),
    "Networks": (r"\w*(Actor|Head)", r"\w*Critic", "Agent"),
    "Losses: pure functions": (r"\w*_loss",),
    "Updates": (r"update_critic", "update_actor"),
    "Episodes( and buffers)?": ("rollout", "evaluate"),
    "Training": ("main",),
}
WITHOUT = {"bc": ("Updates", r"\w*Critic")}  # what a script has no use for: a section, or what stands in it


def definitions(tree: ast.Module) -> dict[str, int]:
    """Module-level names and the lines where they are first defined; imports are none."""
    found = {}
    for node in tree.body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in walk(target, ast.Name)]
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def sections(source: str) -> dict[str, dict[str, int]]:
    """Title of each section: what is defined there, in order."""
    marks = [(n, m[1]) for n, line in enumerate(source.splitlines(), 1) if (m := re.match(r"# === (.+?) =+$", line))]
    found = {title: {} for _, title in marks}
    for name, line in definitions(ast.parse(source)).items():
        before = [title for n, title in marks if n < line]
        found.setdefault(before[-1] if before else "", {})[name] = line
    return found


def missing(name: str, source: str) -> list[str]:
    """What a script lacks or has in the wrong place."""
    found = sections(source)
    without = WITHOUT.get(name, ())
    wanted = [title for title in SECTIONS if title not in without]
    titles = [title for title in found if title]  # "": what stands before the first
    if len(titles) != len(wanted) or not all(map(re.fullmatch, wanted, titles)):
        return [f"sections {titles}, not {wanted}"]
    return [
        f"{pattern} in {title}"
        for title, own in zip(wanted, titles)
        for pattern in SECTIONS[title]
        if pattern not in without and not any(re.fullmatch(pattern, defined) for defined in found[own])
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_whole_and_in_order(name):
    assert missing(name, SOURCES[name]) == []
    assert SOURCES[name].splitlines()[-2] == 'if __name__ == "__main__":'
    (args,) = [node for node in TREES[name].body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    assert [ast.unparse(base) for base in args.bases] == ["RunArgs"]


def test_what_is_missing_is_found():
    own = SOURCES["force_octo"]
    assert missing("force_octo", own) == []
    assert missing("force_octo", own.replace("def make_env(", "def build(")) == ["make_env in Environment"]
    assert missing("force_octo", own.replace("class EnsembleCritic(", "class Judge(")) == [r"\w*Critic in Networks"]
    one, two = "# === Losses: pure functions ===", "# === Updates ==="
    swapped = own.replace(one, "# here").replace(two, one).replace("# here", two)
    assert missing("force_octo", swapped)[0].startswith("sections")
    late = own.replace("def rollout(", "def play(") + "\ndef rollout():\n    pass\n"
    assert missing("force_octo", late) == ["rollout in Episodes( and buffers)?"]
    assert missing("bc", own)[0].startswith("sections")


class Names(ast.NodeVisitor):
    """Names that a definition reads, annotations aside (they say what comes, and need nothing)."""

    def __init__(self):
        self.read = set()

    def visit_Name(self, node):
        self.read |= {node.id} if isinstance(node.ctx, ast.Load) else set()

    def visit_arg(self, node):
        pass

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_FunctionDef(self, node):
        for part in (*node.decorator_list, node.args, *node.body):
            self.visit(part)


def used_too_early(source: str) -> list[str]:
    """Definitions that use what a later section defines."""
    tree, order = ast.parse(source), sections(source)
    rank = {name: place for place, names in enumerate(order.values()) for name in names}
    found = []
    for node in tree.body:
        own = getattr(node, "name", None)
        if own in rank:
            names = Names()
            names.visit(node)
            found += [f"{own} uses {name}" for name in sorted(names.read & rank.keys()) if rank[name] > rank[own]]
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_section_uses_only_what_stands_in_it_or_above(name):
    assert used_too_early(SOURCES[name]) == []


def test_early_use_is_found():
    source = "# === A ===\ndef f(x: Late) -> Late:\n    return g(x)\n\ndef e():\n    pass\n"
    later = "# === B ===\nclass Late:\n    a: int = h\n    b = e\n\ndef g(x):\n    pass\n# === C ===\nh = 1\n"
    assert used_too_early(source + later) == ["f uses g", "Late uses h"]
    assert used_too_early(later + source) == ["Late uses e", "Late uses h"]


# --- length and density ---
NODES = dict(force_octo=9500, force_pi0=9500, conrft=9500, co_rft_chunked=7500, bc=4500)
PER_LINE, MOST_ON_A_LINE, MAIN, FUNCTION, TUPLES = 11.6, 25, 130, 60, 9


def dense_lines(tree: ast.Module) -> dict[int, int]:
    """Lines with too many syntax nodes, and how many; tables of data at module level may be dense."""
    tables = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.Call):
            tables |= set(range(node.lineno, node.end_lineno + 1))
    nodes = Counter()

    def count(node, line):
        line = getattr(node, "lineno", line)
        nodes[line] += 1
        for child in ast.iter_child_nodes(node):
            count(child, line)

    count(tree, 0)
    return {line: n for line, n in sorted(nodes.items()) if line and n > MOST_ON_A_LINE and line not in tables}


def too_much(source: str, most_nodes: int) -> dict:
    """What of a source is over its budget."""
    tree = ast.parse(source)
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    nodes = sum(1 for _ in ast.walk(tree))
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in walk(tree, ast.FunctionDef)}
    long = {name: n for name, n in lengths.items() if n > (MAIN if name == "main" else FUNCTION)}
    tuples = [
        node.lineno
        for node in walk(tree, ast.Assign)
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    over = {
        "nodes": nodes if nodes > most_nodes else 0,
        "nodes a line": nodes / len(code) if nodes / len(code) > PER_LINE else 0,
        "long functions": long,
        "dense lines": dense_lines(tree),
        "tuple assignments": tuples if len(tuples) > TUPLES else 0,
    }
    return {name: value for name, value in over.items() if value}


@pytest.mark.parametrize("name", SCRIPTS)
def test_budgets(name):
    assert too_much(SOURCES[name], NODES[name]) == {}


def test_what_is_over_a_budget_is_found():
    assert too_much("a = 1\n", 5) == {} and too_much("a = 1\n", 4) == {"nodes": 5}
    call = "f(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22)"
    assert too_much(f"{call}\n" + "pass\n" * 99, 999) == {"dense lines": {1: 26}}
    assert dense_lines(ast.parse(f"table = {call}")) == {} and dense_lines(ast.parse("f(1, 2)")) == {}
    assert "nodes a line" in too_much(f"{call}\n", 999)
    body = "".join(f"    a{i}\n" for i in range(60))
    assert too_much("def f():\n" + body, 999) == {"long functions": {"f": 61}}
    assert too_much("def main():\n" + body, 999) == {}
    assert "tuple assignments" in too_much("a, b = c, d\n" * 10 + "pass\n" * 50, 999)
    assert too_much("a, b = c, d\n" * 9 + "a, b = f()\n" * 9 + "pass\n" * 50, 999) == {}


# --- flags ---
OWN_MEANING = {  # flags whose type or help differs on purpose, and why
    "backbone": "Octo or pi0",
    "bc_weight": "FORCE weighs a stage's imitation, CO-RFT adds some",
    "checkpoint": "Octo's or pi0's weights",
    "cql_alpha": "of FORCE's, or of CO-RFT's Eq. (8)",
    "cql_samples": "of each kind, or in all",
    "eval_freq": "FORCE on Octo evaluates between rounds",
    "finetune": "pi0 has more parts",
    "head": "what a method can have",
    "hidden_dim": "of a head, or of the critic too",
    "offline_updates": "CO-RFT's have no stage's name",
    "preset": "ConRFT has a paper and a code",
    "reinforce_lr": "CO-RFT's actor has one of its own",
    "sft_checkpoint": "the run and the head that a script can start from",
    "sft_updates": "stage 0, or CO-RFT's stage 1",
    "tau": "CO-RFT has a target actor too",
}


def flags(source: str, cls: str = "Args") -> dict[str, tuple[str, str]]:
    """Flag: its type and its help, the comment at the end of its line."""
    lines = source.splitlines()
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == cls]
    found = {}
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            found[node.target.id] = (ast.unparse(node.annotation), comment.strip().removeprefix("# "))
    return found


COMMON = flags((ROOT / "plumbing/flags.py").read_text(), "RunArgs")
FLAGS = {name: flags(source) for name, source in SOURCES.items() if "class Args" in source}


def gist(meaning: tuple[str, str]) -> tuple[str, str]:
    """Type and help without what is a paper's own: which stage it is, remarks in brackets or after a semicolon."""
    kind, text = meaning
    return kind, re.split(r"; | \(", re.sub(r"^stage \w+: ", "", text))[0]


def disagreements(scripts: dict[str, dict]) -> dict[str, list]:
    """Flags that have more than one type or gist, and which."""
    found = {}
    for flag in sorted({flag for own in scripts.values() for flag in own}):
        meanings = {gist(own[flag]) for own in scripts.values() if flag in own}
        if len(meanings) > 1:
            found[flag] = sorted(meanings)
    return found


def test_flags_mean_the_same_everywhere():
    found = disagreements(FLAGS | {"RunArgs": COMMON})
    assert {flag: found[flag] for flag in found if flag not in OWN_MEANING} == {}
    assert set(OWN_MEANING) <= found.keys()  # no exception outlives its reason


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_explained(name):
    assert [flag for flag, (_, text) in (COMMON | FLAGS[name]).items() if len(text.split()) < 2] == []


def test_disagreeing_flags_are_found():
    one = flags("class Args:\n    a: int = 1  # number of a\n    b: int = 2  # of b\n")
    assert one == {"a": ("int", "number of a"), "b": ("int", "of b")}
    two = flags("class Args:\n    a: float = 1.0  # number of a\n    b: int = 3  # of b\n")
    three = flags("class Args:\n    a: int = 1  # number of a\n    b: int = 2  # of the b\n")
    assert disagreements({"one": one, "two": two}).keys() == {"a"}
    assert disagreements({"one": one, "three": three}).keys() == {"b"}
    assert gist(("int", "stage II: updates (ours; more); rest")) == ("int", "updates") != gist(("float", "updates"))


def read(tree: ast.AST) -> set[str]:
    """Names that some expression reads from args, or from what is like it."""
    found = set()
    for node in walk(tree, ast.Attribute):
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
        if isinstance(node.ctx, ast.Load) and owner in ("args", "flags"):
            found.add(node.attr)
    return found | {flag for names in walk(tree, ast.Assign) for flag in chosen_by(names)}


def chosen_by(node: ast.Assign) -> list[str]:
    """Flags that a table of defaults is looked up by, in TABLES = {"flag flag": table}."""
    if ast.unparse(node.targets[0]) != "TABLES":
        return []
    return " ".join(key.value for key in node.value.keys).split()


BY_PACKAGES = set().union(*(read(ast.parse(path.read_text())) for paths in PACKAGES.values() for path in paths))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    assert FLAGS[name].keys() - read(TREES[name]) - BY_PACKAGES == set()


def test_every_common_flag_is_read():
    assert COMMON.keys() - set.intersection(*map(read, TREES.values())) - BY_PACKAGES == set()


def test_an_unread_flag_is_found():
    assert read(ast.parse("args.b = args.a\nself.args.c\nother.d\nflags.e\n")) == {"a", "c", "e"}
    assert read(ast.parse("TABLES = {'e f': X, 'g': Y}\nOTHER = {'h': X}")) == {"e", "f", "g"}


def fits(value, hint) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter: Literal[...] | None
        return any(fits(value, part) for part in typing.get_args(hint))
    return type(value) is hint


def misfits(cls, tables: dict) -> list[str]:
    """Defaults and values in tables that aren't what their flags take, and keys that no flag can have."""
    hints = typing.get_type_hints(cls)
    found = [f"{f.name} = {f.default!r}" for f in dataclasses.fields(cls) if not fits(f.default, hints[f.name])]
    for names, table in tables.items():
        for key, values in table.items():
            keys = zip(names.split(), key if isinstance(key, tuple) else (key,), strict=True)
            for flag, value in [*keys, *values.items()]:
                if flag not in hints or not fits(value, hints[flag]):
                    found.append(f"{names} {key}: {flag} = {value!r}")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_and_tables_fit_their_flags(name):
    script = importlib.import_module(name)
    assert misfits(script.Args, script.TABLES) == []
    assert issubclass(script.Args, RunArgs)


def test_misfits_are_found():
    @dataclasses.dataclass
    class Args:
        mode: typing.Literal["rgb", "state"] = "rgb"
        a: int = 1
        b: float = 2  # a float's default written as an integer
        c: str | None = None

    table = {"mode": {"state": dict(a=2, c="x"), "depth": dict(a=True)}, "mode a": {("rgb", 1): dict(z=3)}}
    Args.__annotations__ = {"mode": typing.Literal["rgb", "state"], "a": int, "b": float, "c": str | None}
    assert misfits(Args, table) == ["b = 2", "mode depth: mode = 'depth'", "mode depth: a = True", "mode a ('rgb', 1): z = 3"]  # fmt: skip
    assert fits(None, typing.Literal["y"] | None) and not fits("x", typing.Literal["y"] | None)


def test_tasks_of_the_tables_exist():
    import mani_skill.envs  # noqa: F401
    from mani_skill.utils.registration import REGISTERED_ENVS

    for name in SCRIPTS:
        for names, table in importlib.import_module(name).TABLES.items():
            if names.split()[0] == "env_id":
                assert {key[0] if isinstance(key, tuple) else key for key in table} <= REGISTERED_ENVS.keys()


# --- files ---
def test_there_are_no_other_scripts():
    assert {path.stem for path in Path(ROOT).glob("*.py")} == {*SCRIPTS, *COMMANDS}
