"""The documents: links lead somewhere, commands exist, the README's table is that of the results, pages stay short."""

import re
import shlex

import pytest
from conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmark/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PROSE = dict(force=1600, conrft=1700, co_rft=1600, force_pi0=1000, bc=500)  # words outside generated blocks


def name(path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Where links into a page may lead, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page, text: str) -> list[str]:
    """The relative links that lead nowhere."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            wrong.append(target)
    return wrong


def commands(text: str) -> list[str]:
    """The lines of code blocks, without comments; what a backslash continues is one line."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" #")[0].split("&&")]
    return [part.strip() for part in parts if part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert not broken(page, page.read_text())


def test_a_broken_link_is_found():
    page = ROOT / "docs" / "bc.md"
    text = "[a](force.md) [b](nowhere.md) [c](force.md#stages) [d](force.md#nowhere) [e](https://arxiv.org)"
    assert broken(page, text) == ["nowhere.md", "force.md#nowhere"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_run_what_exists(page):
    """Scripts' flags are parsed in test_cli.py; here programs exist, and know the flags of the others."""
    for command in commands(page.read_text()):
        command = re.sub(r"^OMP_NUM_THREADS=1 torchrun --nproc-per-node \d+ ", "python ", command)
        words = shlex.split(command)
        if words[:2] == ["bash", "setup.sh"] or words[0] == "source" or words[1:3] == ["-m", "pytest"]:
            continue
        assert re.fullmatch(r"(\.venv/bin/)?python", words[0]), command
        module = words[1] == "-m"
        program = ROOT / (words[2].replace(".", "/") + ".py" if module else words[1])
        assert program.exists(), command
        if program.parent == ROOT:
            continue
        code = program.read_text()
        assert "__main__" in code, f"{command}: that is no program"
        for other in re.findall(r"\b\w+\.py\b", command) + re.findall(r"from (\w+) import", code):
            script = ROOT / (other.removesuffix(".py") + ".py")
            code += script.read_text() if script.exists() else ""
        code += (ROOT / "plumbing" / "flags.py").read_text()
        for flag in re.findall(r" --([\w-]+)", command):
            assert re.search(rf"\b{flag.replace('-', '_')}: |--{flag}\b", code), f"{command}: --{flag}"


@pytest.mark.parametrize("page", PROSE)
def test_pages_stay_short(page):
    text = re.sub(r"<!-- begin: .*?<!-- end: [\w-]+ -->", "", (ROOT / f"docs/{page}.md").read_text(), flags=re.DOTALL)
    assert len(text.split()) <= PROSE[page]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/log/[a-z]*.md")), ids=name)
def test_a_heading_of_a_log_is_a_question(page):
    headings = re.findall(r"^## (.+)$", without_code(page.read_text()), re.M)
    assert headings and all(heading.endswith("?") for heading in headings)


def test_the_citation_file_has_what_it_must():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The vla-rl authors"}] and citation["license"] == "MIT"
