"""The command line as it is read: --help, misspelt flags, tables of defaults and explicit flags."""

import dataclasses
import re
import subprocess
import sys
from typing import Literal

import pytest
from conftest import ROOT

import bc
import force_octo
from plumbing import RunArgs, fill, parse_flags


@dataclasses.dataclass
class Args(RunArgs):
    # --- model ---
    preset: Literal["default", "paper"] = "default"  # what a paper sets
    head: Literal["one", "two"] = "one"  # kind of the head

    # --- stage 1 ---
    weight: float = 0.5  # weight of the loss
    gate: bool = True  # --no-gate: without the gate
    limit: int | None = None  # a limit; default: none

    # --- evaluation and logging ---
    val_freq: int = 7  # updates between validation losses


TABLES = {
    "head": {"two": dict(weight=0.1, gate=False)},
    "env_id head": {("PushCube-v1", "two"): dict(weight=0.2)},
    "preset": {"paper": dict(weight=0.3, limit=4)},
}
DOC = """Title of the algorithm: what it does, in a sentence that is longer than eighty columns of a terminal, by far.

Equations                                                                              where
  (1)     a row whose second column doesn't fit beside the first, which is long     a_function, another_function

Commands
  python script.py --head two
  python script.py --env-id PushCube-v1 --head two --preset paper                   # a comment at the end of it
"""


def parsed(*words):
    return parse_flags(Args, DOC, TABLES, list(words))


def shown(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        parsed("--help", *words)
    assert not end.value.code
    return capsys.readouterr().out


def test_help_has_groups(capsys):
    text = shown(capsys)
    titles = re.findall(r"^(\w[^\n]*)\n  --", text, re.M)
    assert titles == ["experiment", "demonstrations", "model", "stage 1", "evaluation and logging"]
    last = text[text.index("evaluation and logging\n") :]
    assert "--eval-episodes INT" in last and "--val-freq INT" in last  # of base and subclass: one group
    assert re.search(r"--weight FLOAT +weight of the loss \(default: 0.5\)", text)
    assert re.search(r"--gate, --no-gate +--no-gate: without the gate \(default: on\)", text)
    assert re.search(r"--head \{one,two\} +kind of the head \(default: one\)", text)
    assert re.search(r"--limit INT +a limit; default: none\n", text)


def test_help_shows_the_defaults_of_what_is_given_beside_it(capsys):
    assert "weight of the loss (default: 0.1)" in shown(capsys, "--head", "two")
    text = shown(capsys, "--head", "two", "--env-id", "PushCube-v1")
    assert "weight of the loss (default: 0.2)" in text and "without the gate (default: off)" in text
    assert "a limit; default: none (default: 4)" in shown(capsys, "--preset", "paper")


@pytest.mark.parametrize("columns", [80, 60, 130])
def test_help_is_as_wide_as_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys).splitlines()
    assert max(map(len, lines)) <= columns
    if columns == 130:  # the docstring as it was written
        assert set(DOC.splitlines()) <= set(lines)
    else:
        assert "        a_function, another_function" in lines
        assert "        # a comment at the end of it" in lines
        assert "  python script.py --head two" in lines


@pytest.mark.parametrize("script", [bc, force_octo], ids=lambda script: script.__name__)
def test_help_of_a_script_through_a_pipe(script, tmp_path):
    command = [sys.executable, script.__file__, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for field in dataclasses.fields(script.Args):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", done.stdout, re.M), field.name
    groups = re.findall(r"^(\w[^\n]*)\n  --", done.stdout, re.M)
    assert groups[:4] == ["experiment", "environment", "demonstrations", "model"]
    assert groups[-1] == "evaluation and logging" and len(groups) == len(set(groups))


@pytest.mark.parametrize("words, line", [
    ("--weigt 1", "error: unknown flag --weigt; did you mean --weight?"),
    ("--weigt=1", "error: unknown flag --weigt; did you mean --weight?"),
    ("--no-gat", "error: unknown flag --no-gat; did you mean --no-gate?"),
    ("--evalepisodes 2", "error: unknown flag --evalepisodes; did you mean --eval-episodes?"),
    ("--run 3", "error: unknown flag --run; did you mean --runs?"),
    ("--qqqqqq 3", "error: unknown flag --qqqqqq; --help names them all"),
    ("--no-weight", "error: unknown flag --no-weight; did you mean --weight?"),
])  # fmt: skip
def test_a_misspelt_flag(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("words", ["--weight two", "--head three", "--limit", "word"])
def test_values_that_cannot_be(words, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*words.split())
    assert end.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_a_script_names_the_flag_that_was_meant(tmp_path):
    command = [sys.executable, ROOT / "bc.py", "--update", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --update; did you mean --updates?\n"


def test_tables_and_explicit_flags():
    assert parsed() == Args()
    assert parsed("--head", "two") == Args(head="two", weight=0.1, gate=False)
    assert parsed("--head", "two", "--env-id", "PushCube-v1").weight == 0.2
    assert parsed("--head", "two", "--preset", "paper") == Args(
        head="two", preset="paper", weight=0.3, limit=4, gate=False
    )
    # An explicit value wins, also where it equals the class's default.
    assert parsed("--head", "two", "--weight", "0.5", "--gate") == Args(head="two")
    assert parsed("--preset", "paper", "--weight=0.5").weight == 0.5
    assert parsed("--weight", "0.9", "--head", "two").weight == 0.9
    assert fill(Args, TABLES, head="two", weight=0.5) == Args(head="two", gate=False)


def test_a_table_may_choose_for_later_tables_unless_the_user_has():
    tables = {"preset": {"paper": dict(head="two", limit=3)}, "head": {"two": dict(weight=0.1)}}
    assert parse_flags(Args, DOC, tables, ["--preset", "paper"]) == fill(Args, tables, preset="paper")
    assert fill(Args, tables, preset="paper") == Args(preset="paper", head="two", limit=3, weight=0.1)
    asked = parse_flags(Args, DOC, tables, ["--preset", "paper", "--head", "one"])
    assert asked == Args(preset="paper", head="one", limit=3)


def test_underscores_will_do():
    assert parsed("--eval_episodes", "3").eval_episodes == 3
