"""The documents are true of the code: files, links, names, keys, error lines, and the numbers they quote."""

import ast
import math
import re
from pathlib import Path

import pytest

from ctmsr.config import flatten, to_dict
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig
from pipelines.infra.progress import Progress
from tests.support.markdown import blocks, documents, table
from tests.support.repository import ROOT

DOCUMENTS = [*documents(), ROOT / "CHANGELOG.md"]
CODE = [
    path for package in ("ctmsr", "pipelines", "cluster") for path in sorted((ROOT / package).rglob("*.py"))
]
RESULTS = ROOT / "tests/benchmarks/RESULTS.md"
SIZING = ROOT / "docs/cluster.md"
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


def test_the_method_names_functions_that_exist() -> None:
    text = (ROOT / "docs/method.md").read_text()
    links = re.findall(r"\[`([\w./]+)`\]\(\.\./(ctmsr/[\w/]+\.py)\)", text)
    assert len(links) == text.count("](../ctmsr/")
    for name, file in links:
        assert name in names_of(ROOT / file) | {Path(file).name}, f"{name} is not in {file}"
    explained = {Path(file).stem for _, file in links}
    method = {
        "trajectory",
        "schedule",
        "network",
        "attention",
        "losses",
        "step",
        "inference",
        "recipe",
    }
    assert method <= explained


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


@pytest.mark.parametrize("line", quoted_lines())
def test_error_lines_are_those_of_the_code(line: str) -> None:
    """A message that holds another, after a colon, is looked for part by part."""
    text = templates()
    for piece in [line] if line in text else line.split(": ", 1):
        assert piece.strip("…").strip() in text, piece


def test_there_are_many_error_lines() -> None:
    assert len(quoted_lines()) > 35


def test_the_progress_line_looks_like_the_one_that_is_shown() -> None:
    shown = Progress(
        name="first",
        phase="CT",
        step=120,
        total_steps=240,
        loss=0.123,
        images_per_s=7.4,
        data_wait=0.02,
        data_mb_per_s=0.3,
        eta_s=65,
        num_workers=2,
    )
    assert str(shown) in (ROOT / "docs/operations.md").read_text()


# Numbers

TARGET = 250
"""Images/s of one H100 that docs/cluster.md reckons with: nobody has measured it."""


def measured(pattern: str) -> float:
    """The last number in RESULTS.md that a line begins to match with."""
    found = re.findall(rf"^ *{pattern} +([\d.]+)", RESULTS.read_text(), re.MULTILINE)
    assert found, pattern
    return float(found[-1])


def test_every_preset_is_in_the_tables() -> None:
    for path in (SIZING, ROOT / "docs/training.md", ROOT / "README.md"):
        assert set(PRESETS) <= set(re.findall(r"`(\w+)`", prose(path))), path


def test_the_sizes_follow_from_what_was_measured() -> None:
    text = SIZING.read_text()
    stream, degradation = measured("stream"), measured("ours")
    small = float(re.findall(r"Ray Train, 2 workers .* ([\d.]+)$", RESULTS.read_text(), re.MULTILINE)[-1])
    picture_kb = int(re.findall(r"JPEG \d+x\d+, (\d+) KB", RESULTS.read_text())[-1])
    for sentence in (
        f"{degradation:g} images/s a core for degradation alone",
        f"{stream:g} images/s a core",
        f"{picture_kb} KB. **A target, not measured**: {TARGET} images/s",
        f"{small:g}\nimages/s of two Ray Train workers",
        f"workers \N{MULTIPLICATION SIGN} {TARGET}. Cores for data: images/s / {stream:g}.",
    ):
        assert sentence in text, sentence
    rates = {name: TARGET if make().train.use_gpu else small / 2 for name, make in PRESETS.items()}
    rows = [sized(name, make(), rates[name], stream, picture_kb) for name, make in PRESETS.items()]
    assert "\n".join(rows) in text, "the rows should be:\n" + "\n".join(rows)


def sized(name: str, config: RunConfig, rate: float, stream: float, picture_kb: int) -> str:
    """A row of the table: `rate` is images/s of a worker, `stream` those that a core can make."""
    train = config.train
    part = math.ceil(train.global_batch_size / train.num_workers)
    images_per_s = rate * train.num_workers
    hours = config.optim.total_steps * train.global_batch_size / images_per_s / 3600
    cells = [
        f"`{name}`",
        f"{train.num_workers} {'GPU' if train.use_gpu else 'CPU'}{'s' if train.num_workers > 1 else ''}",
        f"{train.global_batch_size}",
        f"{part}",
        f"{math.ceil(part / train.micro_batch_size)}",
        f"{images_per_s:g}",
        f"{images_per_s / stream:.1f}",
        f"{images_per_s * picture_kb / 1000:.1f}",
        f"{hours:.2f}" if hours < 1 else f"{hours:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_published_recipe_has_the_size_that_the_arithmetic_starts_from() -> None:
    config, text = PRESETS["published"](), SIZING.read_text()
    steps, batch = config.optim.total_steps, config.train.global_batch_size
    assert f"{steps:,} steps of {batch} images, {steps * batch:,} images".replace(",", " ") in text.replace(
        ",", " "
    )
    copy_gb = 171.5e6 * 4 / 1e9
    assert f"{copy_gb * 1000:.0f} MB in fp32" in text
    kept = config.train.num_checkpoints_kept + config.train.num_best_kept
    for size_gb in (4 * copy_gb, 5 * copy_gb, kept * 5 * copy_gb):
        assert re.search(rf"\b{size_gb:.1f}\s+GB", text), size_gb


def test_ratios_of_the_readme_are_those_that_were_printed() -> None:
    results = RESULTS.read_text()
    printed = set(re.findall(r"ratio(?: to DataLoader)? ([\d.]+)$", results, re.MULTILINE))
    rows = table(ROOT / "README.md", "Benchmarks")
    assert len(rows) > 5
    for row in rows:
        assert row["Ratio"] in printed, row
