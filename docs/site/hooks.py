"""What MkDocs needs to make a site of the pages as the repository has them.

Links of the pages are those of a code host: relative to the page's file, to other pages, sources and folders. Here they
become links of the site. README, CONTRIBUTING, CHANGELOG and benchmark/README become pages; sources become pages with
numbered lines, to which the tables of equations link. Tables are made anew at every build, from the scripts.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {  # in the repository: on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmark/README.md": "benchmark.md",
}
FOLDERS = ("", "plumbing", "backbones", "operators", "robots", "benchmark", "examples")
OTHERS = ("setup.sh", "Dockerfile", "apptainer.def", "pyproject.toml", "robots/example.toml", "CITATION.cff", "LICENSE")
SCRIPTS = ("force_octo", "force_pi0", "conrft", "co_rft_chunked", "bc")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".cff": "yaml"}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files, config):
    """Adds the pages that don't lie in docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for source in sources():
        files.append(File.generated(config, code_page(source), content=code(source)))
    files.append(File.generated(config, "code/index.md", content=contents()))
    return files


def on_page_markdown(markdown, page, config, files):
    """The site's links, and the tables that are made from the scripts."""
    place = page.file.src_uri
    if place.startswith("code/") and place != "code/index.md":
        return markdown
    origin = {site: source for source, site in PAGES.items()}.get(place, f"docs/{place}")
    if place == "algorithms.md":
        markdown = markdown.replace("<!-- equations -->", "\n".join(map(equations, SCRIPTS)))
    if place == "tasks.md":
        markdown = markdown.replace("<!-- tasks -->", tasks())
    if place == "code/index.md":
        origin = "README.md"
    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    for i in range(0, len(blocks), 2):  # the others are code
        blocks[i] = LINK.sub(lambda m: m[1] + site_link(m[2], origin, place) + m[3], blocks[i])
    return "".join(blocks)


def site_link(link: str, origin: str, place: str) -> str:
    """A link of the repository's file `origin`, as the site's page `place` has to write it."""
    if re.match(r"[a-z]+:|#", link):
        return link
    path, hash_mark, anchor = link.partition("#")
    target = normpath(f"{dirname(origin)}/{path}").lstrip("/")
    if target in PAGES:
        target = PAGES[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    elif target in sources():
        anchor = re.sub("^L", "L-0-", anchor)  # as mkdocs.yml has numbered lines named
        target = code_page(target)
    elif target in FOLDERS:
        return relpath("code/index.md", dirname(place) or ".") + f"#{target}"
    return relpath(target, dirname(place) or ".") + hash_mark + anchor


# --- sources as pages ---
def sources() -> list[str]:
    """Paths of the files that have a page, and of what else the pages link to."""
    python = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return sorted({*python, *OTHERS, *linked()})


def linked() -> list[str]:
    """Sources and tables to which pages link."""
    found = set()
    for page in [*(ROOT / source for source in PAGES), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            target = (page.parent / link).resolve()
            if target.suffix in (".csv", ".sh", ".py") and target.exists() and target.is_relative_to(ROOT):
                found.add(str(target.relative_to(ROOT)))
    return sorted(found)


def code_page(source: str) -> str:
    return f"code/{source}.md"


def code(source: str) -> str:
    text = (ROOT / source).read_text()
    rows = text.splitlines()
    if len(rows) > 2000:
        text = "\n".join([*rows[:2000], f"... and {len(rows) - 2000} lines more"])
    fence = "````" if "```" in text else "```"
    language = LANGUAGES.get(Path(source).suffix, "text")
    head = f"---\ntitle: {source}\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# {source}\n\n"
    return f'{head}{fence}{language} linenums="1"\n{text}\n{fence}\n'


def contents() -> str:
    """The page that lists all sources, with the first line of their docstrings."""
    parts = ["# Code\n"]
    for folder in FOLDERS:
        parts.append(f"## {folder or 'scripts'}\n\n| File | What it holds |\n|---|---|")
        for path in sorted((ROOT / folder).glob("*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            first = doc.split("\n\n")[0].replace("\n", " ").replace("|", r"\|")
            parts.append(f"| [{path.name}]({path.relative_to(ROOT)}) | {first} |")
        parts.append("")
    return "\n".join(parts)


# --- tables of equations ---
def equations(script: str) -> str:
    """A script's table: number, what the docstring says, where its functions are, and the lines that name the number."""
    text = (ROOT / f"{script}.py").read_text()
    defined = definitions(text)
    tagged = tags(text)
    page = f"../{script}.py"
    rows = [f"\n## {script}.py\n\n| Equation | What | Functions | Lines |\n|---|---|---|---|"]
    for number, what, where in docstring_table(text):
        names = []
        for name in where.split(", "):
            line = defined.get(name)
            names.append(f"[`{name}`]({page}#L{line})" if line else f"`{name}`")
        wanted = numbers(number)
        lines = sorted({line for n, found in tagged.items() if n in wanted for line in found})
        marks = ", ".join(f"[{line}]({page}#L{line})" for line in lines) or "–"
        rows.append(f"| {number} | {what.replace('|', chr(92) + '|')} | {', '.join(names)} | {marks} |")
    return "\n".join(rows) + "\n"


def docstring_table(text: str) -> list[tuple[str, str, str]]:
    """The rows of a script's docstring below "Equations" or "Losses": number or name, what it says, functions."""
    doc = ast.get_docstring(ast.parse(text))
    table = re.search(r"^(?:Equations|Losses) .*where\n(.*?)^(?=\S|$)", doc + "\n", re.M | re.S)[1]
    rows = re.findall(r"^  (\S+) +(\S.*?) {2,}(\S.*)$", table, re.M)
    return [(name.removesuffix(":"), what, where) for name, what, where in rows]


def definitions(text: str) -> dict[str, int]:
    """Functions, classes and methods of a source, and where they begin."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{part.name}": part.lineno for part in methods}
    return found


def tags(text: str) -> dict[int, list[int]]:
    """Number of an equation: the lines below the docstring that name it, as "Eq. (8)" or "Eqs. (5-7), (9)"."""
    begin = ast.parse(text).body[0].end_lineno
    found = {}
    for line, row in enumerate(text.splitlines(), 1):
        for mark in re.findall(r"Eqs?\. (\(\d[^A-Za-z:]*(?:(?:and|or) \(\d[^A-Za-z:]*)*)", row):
            for number in numbers(mark) if line > begin else ():
                found.setdefault(number, []).append(line)
    return found


def numbers(mark: str) -> set[int]:
    """(5-7) is 5, 6 and 7."""
    found = set()
    for first, last in re.findall(r"\((\d+)(?:-(\d+))?\)", mark):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def tasks() -> str:
    """The table of tasks, read from plumbing/tasks.py without importing it."""
    rows = ["| Task | Instruction | Seconds |", "|---|---|---|"]
    for node in ast.parse((ROOT / "plumbing/tasks.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TASKS":
            for key, call in zip(node.value.keys, node.value.values):
                instruction, seconds = (argument.value for argument in call.args[:2])
                rows.append(f"| {key.value} | {instruction} | {seconds:g} |")
    return "\n".join(rows)
