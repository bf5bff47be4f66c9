"""The model as MLflow loads it: this file, the `ctmsr` package and a checkpoint travel together.

MLflow runs this file (models from code) both when a model is registered and when one is loaded, in
environments that hold neither this repository nor trust in pickles. So it imports nothing of ours by name: it
loads the package that lies beside the weights, under a name made of the package's content. Two versions of
the model thus live in one process, each with its own code.

Loading a registered model runs its publisher's Python: load only from a registry you trust.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class UpscaleModel(PythonModel):
    """uint8 (N, h, w, 3) RGB to uint8 (N, scale·h, scale·w, 3), on a GPU if there is one."""

    def load_context(self, context: Any) -> None:
        """Imports the shipped package and loads the verified weights."""
        package = _import_package(Path(context.artifacts["ctmsr"]))
        checkpoint = importlib.import_module(f"{package}.checkpoint")
        from_dict = importlib.import_module(f"{package}.config").from_dict
        inference = importlib.import_module(f"{package}.inference")
        self._upscale = inference.upscale
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model, manifest = checkpoint.load_model(Path(context.artifacts["checkpoint"]), device)
        self._sigma_max = manifest.config["schedule"]["sigma_max"]
        self._inference = from_dict(inference.InferenceConfig, manifest.config.get("inference", {}))

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Upscales each picture by itself, with the same noise: what else is in the batch changes nothing."""
        seed = int((params or {}).get("seed", 0))
        settings = {"sigma_max": self._sigma_max, "config": self._inference, "seed": seed}
        return np.stack([self._upscale(self._model, lq_u8, **settings) for lq_u8 in model_input])


def _import_package(folder: Path) -> str:
    """Imports the package in `folder` under a name made of its content; returns the name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(
            f"{path.relative_to(folder).as_posix()}\n{path.stat().st_size}\n".encode() + path.read_bytes()
        )
    name = f"ctmsr_{digest.hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return name


set_model(UpscaleModel())
