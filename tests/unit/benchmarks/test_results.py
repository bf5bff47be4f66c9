"""RESULTS.md agrees with the JSON files beside it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.benchmarks import results


def test_the_gpu_tables_are_those_of_the_json_files() -> None:
    text = results.RESULTS.read_text()
    assert results.filled(text) == text, "run `python -m tests.benchmarks.results`"


def test_a_new_measurement_changes_its_rows_and_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(results.FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    steps = results.read("steps")
    steps["forms"]["+ torch.compile"] = {"ms": 100.0, "losses": steps["forms"]["plain"]["losses"]}
    (tmp_path / "gpu-steps.json").write_text(json.dumps(steps))
    before = results.RESULTS.read_text()
    after = results.filled(before)
    added = set(after.splitlines()) - set(before.splitlines())
    ratio = steps["forms"]["plain"]["ms"] / 100
    row = f"    {'+ torch.compile':36}    100.0     80.00   {ratio:.2f}                   +0.00%"
    assert added == {row, f"    ratio {ratio:.2f}"}
    assert after.count("ratio 3.79") == before.count("ratio 3.79")
    monkeypatch.setattr(results, "HEADING", "## One H300")
    with pytest.raises(ValueError, match=r"no line .*largest error.* under '## One H300'"):
        results.filled(before)
