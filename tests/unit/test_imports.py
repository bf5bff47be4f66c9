"""The architecture as the import statements tell it: `cluster -> pipelines -> ctmsr`, one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT

PACKAGES = {"cluster", "pipelines", "ctmsr"}
INFRASTRUCTURE = {"ray", "mlflow", "boto3", "botocore", "pyarrow"}
BENCHMARKS_OF_PIPELINES = {
    "fetch",
    "store",
    "stream",
    "shards",
    "executor",
    "memory",
    "scale",
    "scoring",
    "checkpointing",
    "train_rate",
    "upscale",
}
"""These measure Ray itself. The others run where torch is all there is, such as a borrowed GPU machine."""


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, in functions too: `from .image import x` is `ctmsr.image`."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            # `from ctmsr import network` names a module, `from ctmsr.model.network import X` does not.
            folder = ROOT.joinpath(*base.split("."))
            found |= {f"{base}.{alias.name}" for alias in node.names} if folder.is_dir() else {base}
    return found


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def file_of(module: str) -> Path:
    """The file of a module, or the package that a name is imported from."""
    file = ROOT / (module.replace(".", "/") + ".py")
    return file if file.exists() else file.parent / "__init__.py"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(name: str) -> str:
    """The room of a module: its folder of pipelines/ or ctmsr/, or itself where it stands alone."""
    package, *rest = name.split(".")
    return f"{package}/{rest[0]}" if rest and package != "cluster" else package


def rooms() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    arrows: dict[str, set[str]] = {}
    for path in [path for package in PACKAGES for path in modules(package)]:
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        others = {room(name) for name in imports(path) if name.split(".")[0] in PACKAGES}
        arrows[own] = arrows.get(own, set()) | others - {own}
    return arrows


def test_imports_between_rooms_run_one_way() -> None:
    arrows = rooms()
    below: set[str] = set()
    while len(below) < len(arrows):
        ready = {own for own in arrows.keys() - below if arrows[own] <= below}
        assert ready, f"a circle of imports among {sorted(arrows.keys() - below)}"
        below |= ready


@pytest.mark.parametrize("folder", sorted(rooms()))
def test_a_room_holds_few_modules(folder: str) -> None:
    names = [path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    assert len(names) <= 12, names


def test_what_workloads_share_lies_below_them() -> None:
    shared = {"config", "data", "tracking", "infra"}
    arrows = rooms()
    for name in shared:
        assert {other for other in arrows[f"pipelines/{name}"] if other.startswith("pipelines/")} <= {
            f"pipelines/{name}" for name in shared
        }


def test_private_names_of_ray_stand_in_one_file() -> None:
    private = re.compile(r"\bray[\w.]*\._\w+|_execution_idx|ENV_VARS_TO_PROPAGATE")
    users = {relative(path) for path in modules("pipelines") if private.search(path.read_text())}
    assert users == {"pipelines/infra/ray_internals.py"}


def test_the_parser_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "ctmsr" / "sample.py"
    path.parent.mkdir()
    (tmp_path / "pipelines").mkdir()
    path.write_text(
        "import os.path, ray\nfrom .image import decode\nfrom . import rng\n"
        "def f():\n    from pipelines import demo\n    from torch.nn import functional\n"
    )
    assert imports(path) == {"os.path", "ray", "ctmsr.image", "ctmsr.rng", "pipelines.demo", "torch.nn"}


@pytest.mark.parametrize(
    ("package", "unknown"),
    [("ctmsr", INFRASTRUCTURE | {"pipelines", "cluster", "tests"}), ("pipelines", {"cluster", "tests"})],
)
def test_a_package_knows_nothing_around_it(package: str, unknown: set[str]) -> None:
    assert {relative(path): found for path in modules(package) if (found := top_level(path) & unknown)} == {}


def test_ctmsr_imports_its_own_modules_relatively() -> None:
    """A registered model carries the package under another name, where `import ctmsr` finds nothing."""
    absolute = set()
    for path in modules("ctmsr"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            absolute |= {relative(path) for name in names if name.split(".")[0] == "ctmsr"}
    assert absolute == set()


def test_the_lowest_modules_import_no_other_and_the_highest_is_imported_by_none() -> None:
    arrows = rooms()
    for stem in ("config", "rng", "image"):
        assert {name for name in arrows[f"ctmsr/{stem}"] if name.startswith("ctmsr")} <= {"ctmsr/errors"}
    for path in modules("ctmsr"):
        assert "ctmsr.training.step" not in imports(path), path


def test_only_tracking_and_release_import_mlflow() -> None:
    importers = {relative(path) for path in modules("pipelines") if "mlflow" in top_level(path)}
    assert {path.split("/")[1] for path in importers} == {"tracking", "register"}


def test_a_registered_model_needs_few_packages() -> None:
    """What `inference` and `checkpoint` reach is shipped with the model, to where this repository is not."""
    reached: set[str] = set()
    pending = {"ctmsr.model.inference", "ctmsr.model.checkpoint"}
    while pending:
        reached |= pending
        pending = {
            name for own in pending for name in imports(file_of(own)) if name.startswith("ctmsr.")
        } - reached
    allowed = sys.stdlib_module_names | {"numpy", "torch", "safetensors", "PIL", "ctmsr"}
    allowed |= {"pillow_heif"}  # where it is installed
    for own in reached:
        assert top_level(file_of(own)) <= allowed, own


IMPORT_EVERYTHING = """
import importlib, os, sys
import cv2, numpy, torch  # first, because cv2 extends LD_LIBRARY_PATH
before = dict(os.environ), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert before == (dict(os.environ), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
print(*(name for name in sys.modules if "." not in name))
"""


def test_importing_ctmsr_has_no_effect_and_loads_nothing_heavy(tmp_path: Path) -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("ctmsr")]
    command = [sys.executable, "-c", IMPORT_EVERYTHING, *names]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not set(done.stdout.split()) & (INFRASTRUCTURE | {"lpips", "torchvision", "pipelines"})
    assert list(tmp_path.iterdir()) == []


def printed_by(program: str) -> str:
    """What a program prints that is run in the repository, without an error."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_benchmarks_of_ctmsr_need_no_ray() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('ray', 'mlflow'))); "
    stems = {path.stem for path in modules("tests/benchmarks")} - BENCHMARKS_OF_PIPELINES
    names = ", ".join(f"tests.benchmarks.{stem}" for stem in sorted(stems))
    printed_by(f"{blocked}import {names}")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("pipelines.data.stream", {"torch", "mlflow"}), ("pipelines.train.worker", {"mlflow"})],
)
def test_the_processes_of_a_training_load_only_what_they_use(module: str, heavy: set[str]) -> None:
    """Ray starts a dozen of them, each of which would take seconds and hundreds of megabytes more."""
    assert not set(printed_by(f"import {module}, sys; print(*sys.modules)").split()) & heavy
