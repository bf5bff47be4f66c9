"""Exports a model for other programs; an export is kept only if it was read back and agrees with torch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctmsr.errors import ConfigError
from ctmsr.model import checkpoint

from ..config.defaults import TRACKING_URI
from ..tracking.released import fetched_checkpoint
from .formats import FORMATS
from .source import Source


def export(
    model: str, form: str, output: Path | None = None, tracking_uri: str = TRACKING_URI
) -> tuple[Path, float]:
    """Exports a model.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `starter` or a checkpoint's URI.
        form: A name in FORMATS.
        output: The new file or folder; None names one in the current folder after the model.
        tracking_uri: The MLflow server with the model.

    Returns:
        Where it is, and its largest difference from torch, in units of the [0, 1] range of pictures.

    Raises:
        ConfigError: `output` exists, or packages are missing.
        UserError: There is no such model, or the export does not agree with torch; then nothing is written.
    """
    chosen = FORMATS[form]
    chosen.check_packages(form)
    writer = chosen.imported(form)
    if output is not None:
        _refuse_existing(output)
    with fetched_source(model, tracking_uri) as source:
        output = output or Path(source.file_stem + chosen.suffix)
        _refuse_existing(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, so that a rename puts it there as a whole.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            staged = Path(scratch, output.name)
            difference: float = writer.write(source, staged)
            staged.rename(output)
    return output, difference


@contextmanager
def fetched_source(model: str, tracking_uri: str = TRACKING_URI) -> Iterator[Source]:
    """A model by name, for the duration of a `with` block.

    Raises:
        UserError: There is no such model, or it does not load.
    """
    with fetched_checkpoint(model, tracking_uri) as (folder, licence):
        network, manifest = checkpoint.load_model(folder)
        yield Source(model, network, manifest, licence)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise ConfigError(
            f"{output} already exists, and an export overwrites nothing. Choose another --output."
        )
