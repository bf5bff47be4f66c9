"""A folder as on the Hugging Face Hub, and the class whose `from_pretrained` reads it.

The folder is also a checkpoint of this project, without the addresses in its config: `init_uri`,
`--checkpoint` and `--model` take it as it is.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file

from ctmsr.config import from_dict, to_dict
from ctmsr.model import checkpoint
from ctmsr.model.inference import InferenceConfig, upscale
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.model.portable import PortableModel

from .source import Source, check_agreement

_LICENCES = (
    *("apache-2.0", "bsd-3-clause", "mit", "openrail", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0"),
)
"""The Hub's names of licences; it knows any other as `other`."""
_ADDRESSES = ("init_uri", "storage_uri", "tracking_uri", "experiment")
_META = ("step", "samples_seen", "metrics", "libraries", "commit", "converted_from")
"""What is published of how a model came about: not the names of places and pictures."""


class CTMSR(ConsistencyModel, ModelHubMixin, library_name="ctmsr-ray", pipeline_tag="image-to-image"):
    """The network of a Hugging Face folder or repository: `CTMSR.from_pretrained("starter-x4")`.

    Weights are read from safetensors alone.
    """

    def __init__(self, network: dict[str, Any], sigma_max: float, inference: dict[str, Any]) -> None:
        super().__init__(from_dict(NetworkConfig, network, "network"))
        self.sigma_max = sigma_max
        self.inference = from_dict(InferenceConfig, inference, "inference")

    def upscale(self, lq_u8: np.ndarray, seed: int = 0) -> np.ndarray:
        """uint8 (h, w, 3), RGB, to uint8 (scale·h, scale·w, 3)."""
        return upscale(self, lq_u8, sigma_max=self.sigma_max, seed=seed, config=self.inference)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "CTMSR":
        model = cls(**{name: options.pop(name) for name in ("network", "sigma_max", "inference")})
        file = Path(model_id, checkpoint.MODEL_FILE)
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(model_id, checkpoint.MODEL_FILE, **options))
        model.load_state_dict(load_file(file))
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {
            "network": to_dict(self.config),
            "schedule": {"sigma_max": self.sigma_max},
            "inference": to_dict(self.inference),
        }
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.save(Path(scratch, "new"), model=self.state_dict(), config=config, meta={})
            for path in Path(scratch, "new").iterdir():
                shutil.move(path, save_directory / path.name)


def write(source: Source, folder: Path) -> float:
    """Writes the folder and compares it, as `from_pretrained` reads it, with torch.

    Returns:
        The largest difference.

    Raises:
        UserError: They do not agree.
    """
    meta = {name: source.manifest.meta[name] for name in _META if name in source.manifest.meta}
    config = _without_addresses(source.manifest.config)
    config["register"] = config.get("register", {}) | {"licence": source.licence}
    checkpoint.save(folder, model=source.network.state_dict(), config=config, meta=meta)
    (folder / "config.json").write_text(json.dumps(source.settings(), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(source, folder.name, meta), encoding="utf-8")
    model = CTMSR.from_pretrained(folder)
    portable = PortableModel(model, sigma_max=model.sigma_max, colour_hold_px=model.inference.colour_hold_px)
    return check_agreement(source, portable, "the Hugging Face folder")


def _without_addresses(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without its places: those of a company's bucket are nobody else's business."""
    kept = {name: value for name, value in config.items() if name not in _ADDRESSES}
    if "data" in kept:
        kept["data"] = {name: value for name, value in kept["data"].items() if not name.endswith("_uri")}
    return kept


def _card(source: Source, name: str, meta: Mapping[str, Any]) -> str:
    """README.md, with the header that the Hub reads."""
    network, licence = source.network.config, source.licence.lower()
    licences = [f"license: {licence}"]
    if licence not in _LICENCES:
        licences = ["license: other", f"license_name: {json.dumps(source.licence)}"]
    parameters = sum(parameter.numel() for parameter in source.network.parameters()) / 1e6
    scores = {key: value for key, value in meta.get("metrics", {}).items() if not key.startswith("bicubic_")}
    rows = [f"| {key} | {value:.4f} |" for key, value in scores.items()]
    measured = [
        "## Scores",
        "\n".join(["On held-out pictures of its training:\n", "| | |", "|---|---|", *rows]),
    ]
    parts = [
        "\n".join(
            [
                "---",
                *licences,
                "library_name: ctmsr-ray",
                "pipeline_tag: image-to-image",
                "tags: [super-resolution]",
                "---",
            ]
        ),
        f"# {name}",
        f"Enlarges photographs {network.scale} times in one network call (CTMSR, arXiv:2503.20349), with "
        f"{parameters:.1f} M parameters. It invents plausible detail: never use that as evidence.",
        "## Use",
        f"With `ctmsr-ray` and its extra `export` installed:\n\n{_usage(name)}",
        *(measured if rows else []),
        "## Licence",
        f"Weights: {source.licence}. The code that runs them: Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def _usage(name: str) -> str:
    return f"""```python
import numpy as np
from PIL import Image
from pipelines.export.hugging_face import CTMSR

model = CTMSR.from_pretrained("{name}")  # this folder, or its repository on the Hub
lq_u8 = np.asarray(Image.open("photo.jpg").convert("RGB"))
Image.fromarray(model.upscale(lq_u8, seed=0)).save("photo_larger.png")
```"""
