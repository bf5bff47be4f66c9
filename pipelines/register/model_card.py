"""The README of a registered model: what it is, its scores, where it comes from and how to load it."""

from collections.abc import Mapping
from typing import Any

from ctmsr.metrics.scoring import METRICS
from ctmsr.model.checkpoint import Manifest

from .promotion import Measured

SAMPLE_FILE = "sample.png"
_LINEAGE = ("step", "samples_seen", "train_version", "commit", "converted_from")


def lineage(manifest: Manifest) -> dict[str, str]:
    """Where a checkpoint comes from, as far as it records it: pictures, hash of the index, commit, step."""
    found = {name: str(manifest.meta[name]) for name in _LINEAGE if manifest.meta.get(name) is not None}
    train_uri = manifest.config.get("data", {}).get("train_uri")
    return found | ({"train_uri": train_uri} if train_uri and "train_version" in found else {})


def model_card(
    model_name: str,
    manifest: Manifest,
    *,
    num_parameters: int,
    measured: Measured | None,
    metrics: Mapping[str, float],
    origin: Mapping[str, str],
    requirements: list[str],
    licence: str,
) -> str:
    """Markdown, for the version's description and, with the sample picture, its README.md.

    Args:
        model_name: In the registry.
        manifest: Of the checkpoint.
        num_parameters: Of the network.
        measured: The gate's scores; None if it did not measure.
        metrics: Other known scores of the checkpoint, by name.
        origin: Further rows for the table of its origin.
        requirements: Pinned packages.
        licence: Of the weights.
    """
    scale = manifest.config["network"].get("scale", 4)
    parts = [
        f"# {model_name}",
        f"Enlarges photographs {scale} times in one network call (CTMSR, arXiv:2503.20349), with "
        f"{num_parameters / 1e6:.1f} M parameters. It invents plausible detail: never use that as evidence.",
        "## Scores",
        _scores(measured, metrics),
        "## Use",
        _usage(model_name, requirements),
        "## Origin",
        _table({**lineage(manifest), **origin, **_libraries(manifest)}),
        "## Licence",
        f"Weights: {licence}. The Python code shipped with them: Apache-2.0, see LICENSE.",
    ]
    return "\n\n".join(parts) + "\n"


def with_sample(card: str) -> str:
    """The card with the sample picture below its first paragraph."""
    head, separator, rest = card.partition("\n\n## ")
    caption = "*LR, bicubic, this model, HR, on pictures it was not trained on.*"
    return f"{head}\n\n![LR, bicubic, this model, HR]({SAMPLE_FILE})\n\n{caption}{separator}{rest}"


def _scores(measured: Measured | None, metrics: Mapping[str, float]) -> str:
    if measured is None:
        return _table({name: f"{value:.4f}" for name, value in metrics.items()}) or "Not measured."
    columns = {"this model": measured.scores, "bicubic": measured.bicubic_scores}
    if measured.champion is not None:
        columns[f"version {measured.champion}, champion at the time"] = measured.champion_scores
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, metric in METRICS.items():
        if name in measured.scores:
            cells = [f"{scores.get(name, float('nan')):.4f}" for scores in columns.values()]
            lines.append(f"| {metric.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{measured.protocol}. Evaluation set {measured.set_version}."


def _usage(model_name: str, requirements: list[str]) -> str:
    return f"""```sh
pip install {" ".join(requirements)}
export MLFLOW_TRACKING_URI=http://...        # the registry
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
```

```python
import mlflow
model = mlflow.pyfunc.load_model("models:/{model_name}@champion")
pixels = model.predict("photo.jpg", params={{"seed": 0}})  # uint8 (height, width, 3), RGB
```

`predict` takes the path of a picture, its bytes, or a uint8 RGB array of any size, (height, width, 3) or
(number, height, width, 3), or a list of these; it works through large pictures in tiles. The seed selects the
invented detail. It runs on a GPU if there is one. Loading runs the Python code of this version: load it only
from a registry that you trust."""


def _libraries(manifest: Manifest) -> dict[str, str]:
    versions = manifest.meta.get("libraries", {})
    return (
        {"trained with": ", ".join(f"{name} {version}" for name, version in versions.items())}
        if versions
        else {}
    )


def _table(rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
