"""The documents are true of the code: files, links, names, keys, error lines, and the numbers they quote."""

import ast
import re
from pathlib import Path

import pytest

from ctmsr.config import flatten, to_dict
from pipelines.config.run_config import RunConfig
from tests.support.markdown import blocks, documents, table
from tests.support.repository import ROOT

DOCUMENTS = [*documents(), ROOT / "CHANGELOG.md"]
CODE = [
    path for package in ("ctmsr", "pipelines", "cluster") for path in sorted((ROOT / package).rglob("*.py"))
]
RESULTS = ROOT / "tests/benchmarks/RESULTS.md"
KEYS = flatten(to_dict(RunConfig()))
SUFFIXES = ("py", "json", "yaml", "md", "index")
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_code_blocks_and_their_commands_are_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# Page\n\n- a list\n\n    of two paragraphs\n\nText.\n\n"
        "    one --set a#b=1  # why\n    two \\\n      three\n    'four\n    five'\n\n"
        "```sh\n# needs a bucket\nsix\n```\n\n```python\nseven()\n```\nend\n"
    )
    assert [(block.language, block.line, block.needs, block.commands) for block in blocks(path)] == [
        ("sh", 9, "", ["one --set a#b=1", "two three", "'fourfive'"]),
        ("sh", 16, "a bucket", ["six"]),
        ("python", 21, "", ["seven()"]),
    ]
    for text, message in (("```\nx\n```\n", "names no language"), ("```sh\nx\n", "never closed")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            blocks(path)


# Links and files


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{relative(path)}: {target}"
        if heading:
            anchors = {anchor(line.lstrip("#")) for line in prose(file).splitlines() if line.startswith("#")}
            assert heading in anchors, f"{relative(path)}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:ctmsr|pipelines|cluster|tests|docs)/[\w./-]*)`", prose(path)):
        assert (ROOT / name).exists(), f"{relative(path)}: {name}"


# Names of the code


def names_of(path: Path) -> set[str]:
    """Functions, classes, constants, and methods and fields as `Class.name`."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                found.add(prefix + node.name)
                collect(node.body, f"{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text()).body, "")
    return found


@pytest.mark.parametrize("page", ["method", "architecture"])
def test_functions_that_are_linked_exist(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    links = re.findall(r"\[`([\w./]+)`\]\(\.\./((?:ctmsr|pipelines)/[\w/]+\.py)\)", text)
    assert len(links) == text.count("](../ctmsr/") + text.count("](../pipelines/") > 20
    for name, file in links:
        assert name in names_of(ROOT / file) | {Path(file).name}, f"{name} is not in {file}"


def test_the_published_numbers_are_the_defaults() -> None:
    rows = table(ROOT / "docs/method.md", "The published numbers")
    assert len(rows) > 10
    for row in rows:
        assert row["Value"] == str(KEYS[row["Key"].strip("`")]), row


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_keys_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for key in re.findall(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})\.[a-z]\w*)", text):
        if key.rpartition(".")[2] not in SUFFIXES:
            assert key in KEYS or any(name.startswith(f"{key}.") for name in KEYS), f"{relative(path)}: {key}"


def templates() -> str:
    """Every text of the code, with `…` where a value goes."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted_lines() -> list[str]:
    """What the tables of troubleshooting say that a command says."""
    headings = ("Before anything starts", "While it runs", "Checkpoints, registry and use")
    rows = [row for heading in headings for row in table(ROOT / "docs/operations.md", heading)]
    rows += table(ROOT / "README.md", "When something fails")
    quoted = (re.match(r"`([^`]+)`", next(iter(row.values()))) for row in rows)
    return [line[1] for line in quoted if line]


def test_error_lines_are_those_of_the_code() -> None:
    """A message that holds another, after a colon, is looked for part by part."""
    text, lines = templates(), quoted_lines()
    pieces = [piece for line in lines for piece in ([line] if line in text else line.split(": ", 1))]
    assert len(lines) > 10
    assert [piece for piece in pieces if piece.strip("…").strip() not in text] == []


def test_ratios_of_the_readme_are_those_that_were_printed() -> None:
    results = RESULTS.read_text()
    printed = set(re.findall(r"ratio(?: to DataLoader)? ([\d.]+)$", results, re.MULTILINE))
    rows = table(ROOT / "README.md", "Benchmarks")
    assert len(rows) > 5
    for row in rows:
        assert row["Ratio"] in printed, row
