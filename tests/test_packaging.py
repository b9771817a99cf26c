"""The package's metadata, container recipes, versions, and the documentation site."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT, Inline, tiny_args
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bc

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def closure(names: list[str]) -> set[str]:
    """All packages that these need, extras of theirs included, going by what is installed."""
    found, ahead = set(), [Requirement(name) for name in names]
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                ahead.append(needed)
    return {key[0] for key in found}


def test_the_core_brings_no_wandb():
    core = closure(PROJECT["project"]["dependencies"])
    assert {"torch", "mani-skill", "sapien", "scipy", "tensorboard"} <= core
    assert not core & {"wandb", "mkdocs", "pytest", "ruff", "pygame-ce", "pyarrow", "websockets"}
    assert "wandb" in closure(EXTRAS["track"])


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0]]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_lock_fits_the_metadata():
    """Versions of requirements.txt are within the bounds of pyproject.toml, and complete."""
    versions = locked()
    core = PROJECT["project"]["dependencies"]
    for requirement in map(Requirement, core + [line for extra in EXTRAS.values() for line in extra]):
        name = canonicalize_name(requirement.name)
        assert name not in versions or requirement.specifier.contains(versions[name]), requirement
    assert {canonicalize_name(Requirement(line).name) for line in core} <= versions.keys()
    installed = {canonicalize_name(d.name) for d in importlib.metadata.distributions()}
    assert (closure(core + EXTRAS["docs"] + EXTRAS["robot"]) & installed) - {"pip"} <= versions.keys() | {"torch"} | {
        name for name in installed if name.startswith(("nvidia-", "triton", "cuda-"))
    }


def test_the_package_holds_all_modules():
    tool = PROJECT["tool"]["setuptools"]
    assert set(tool["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "examples"}
    assert set(tool["packages"]) == folders


def test_the_version_is_one_everywhere():
    version = PROJECT["project"]["version"]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_containers_copy_what_there_is():
    """Both recipes take setup.sh and requirements.txt, which the build context lets through, and nothing else."""
    docker = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^COPY (.+) \./$", docker, re.M)[1].split() == ["setup.sh", "requirements.txt"]
    assert (ROOT / ".dockerignore").read_text().split() == ["*", "!setup.sh", "!requirements.txt"]
    section = (ROOT / "apptainer.def").read_text().split("%files\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in section.splitlines()] == ["setup.sh", "requirements.txt"]
    bases = re.findall(r"^(?:FROM|From:) (.+)$", docker + (ROOT / "apptainer.def").read_text(), re.M)
    assert len(bases) == 2 and len(set(bases)) == 1


def test_hooks_need_no_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks[0]["hooks"])


# --- a new task ---
def test_the_new_tasks_page_shows_the_example():
    """Its pieces are lines of examples/my_tasks.py."""
    example = re.sub(r"\s+", " ", (ROOT / "examples/my_tasks.py").read_text())
    page = (ROOT / "docs/new-task.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        for line in block.splitlines():
            assert " ".join(line.split()) in example, line


def test_the_examples_task_is_planned_cloned_and_evaluated(tmp_path, inline, monkeypatch):
    """As the page says, with tiny budgets."""
    monkeypatch.setattr(bc, "Evaluator", Inline)
    tiny = dict(env_id="examples.my_tasks:PushAside-v1", num_demos=1, max_episode_steps=None, eval_episodes=1)
    folder = bc.main(tiny_args(tmp_path, bc, updates=4, run_name="aside", **tiny))
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["max_episode_steps"] == 60  # its own entry of TASKS: 6 seconds
    assert json.loads((folder / "summary.json").read_text())["demo_steps_to_success"] < 60


# --- the site ---
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material: bash setup.sh installs it")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_is_whole(site):
    """Every page of docs is there, and every link within the site leads to a file and an anchor of it."""
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.glob("**/*.html")}
    for page in ROOT.glob("docs/**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert f"{name.removesuffix('README')}/index.html".replace("//", "/") in pages, name
    ids = {name: set(re.findall(r'id="([^"]+)"', text)) for name, text in pages.items()}
    wrong = []
    for name, text in pages.items():
        body = text.split("<article")[-1].split("</article>")[0]
        for link in re.findall(r'(?:href|src)="([^"]+)"', body):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            file = (site / name).parent / path if path else site / name
            file = (file / "index.html" if file.is_dir() else file).resolve()
            there = file.exists()
            if there and anchor and file.suffix == ".html":
                there = anchor in ids[file.relative_to(site.resolve()).as_posix()]
            if not there:
                wrong.append((name, link))
    assert wrong == []


def test_equations_lead_to_their_lines(site):
    """Each script has a table; a function's link leads to its definition, a number's to a line that names it."""
    text = (site / "algorithms/index.html").read_text()
    linked = re.findall(r'href="\.\./code/(\w+)\.py/#L-0-(\d+)"><?c?o?d?e?>?([\w.]+)', text)
    assert {script for script, _, _ in linked} == {"force_octo", "force_pi0", "conrft", "co_rft_chunked", "bc"}
    for script, line, label in linked:
        row = (ROOT / f"{script}.py").read_text().splitlines()[int(line) - 1]
        if label.isdigit():
            assert label == line and re.search(r"Eqs?\. \(", row), (script, line, row)
        else:
            assert re.search(rf"(def|class) {label.split('.')[-1]}\b", row), (script, line, row)
    octo = text.split('id="force_octopy"')[1].split("<h2")[0]
    assert octo.count("<tr>") == 9 and not re.search(r"<td>–</td>", octo)
