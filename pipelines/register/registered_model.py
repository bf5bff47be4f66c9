"""The model as MLflow loads it: this file, the `ctmsr` package and a checkpoint travel together.

MLflow runs this file (models from code) both when a model is registered and when it is loaded, in
environments that lack this repository and distrust pickles. So it imports none of our code by name: it loads
the package stored beside the weights, under a name derived from the package's content. This lets two versions
of the model share a process, each with its own code.

Loading a registered model runs its publisher's Python: load only from a registry you trust.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

ACCEPTED = (
    "a picture is a uint8 RGB array of shape (height, width, 3), the path of a picture file, or the bytes of "
    "one; several are a list of pictures, or one array of shape (number, height, width, 3)"
)


class UpscaleModel(PythonModel):
    """Enlarges pictures `scale` times, on a GPU if there is one, or on `model_config["device"]`.

    The signature declares no inputs: MLflow would enforce them before `predict`, and its schemas can express
    "an array of this shape" but not "or a path, or bytes". `_pictures` is as strict, with clearer errors.
    """

    def load_context(self, context: Any) -> None:
        """Imports the shipped package and loads the verified weights."""
        package = _import_package(Path(context.artifacts["ctmsr"]))
        checkpoint = importlib.import_module(f"{package}.model.checkpoint")
        from_dict = importlib.import_module(f"{package}.config").from_dict
        inference = importlib.import_module(f"{package}.model.inference")
        self._upscale = inference.upscale
        self._decode = importlib.import_module(f"{package}.image").decode
        self._user_error = importlib.import_module(f"{package}.errors").UserError
        choose_device = importlib.import_module(f"{package}.model.device").choose_device
        device = choose_device((context.model_config or {}).get("device") or None)
        self._model, manifest = checkpoint.load_model(Path(context.artifacts["checkpoint"]), device)
        self._sigma_max = manifest.config["schedule"]["sigma_max"]
        self._inference = from_dict(inference.InferenceConfig, manifest.config.get("inference", {}))

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Upscales each picture on its own, with the same noise: the rest of the batch does not affect it.

        The type hint of `model_input` is too narrow on purpose: any other makes MLflow derive a schema, or
        warn.

        Args:
            context: MLflow's; not used.
            model_input: One picture or several, see `ACCEPTED`. Picture files may have an alpha channel, an
                orientation tag or 16 bits per channel. Arrays may be int64, as arrays from JSON are, if every
                value is from 0 to 255.
            params: "seed", which selects the invented detail; 0 by default.

        Returns:
            uint8 RGB arrays: (height, width, 3) for one picture, (number, height, width, 3) for an array of
            several, a list of arrays for a list.

        Raises:
            ValueError: The input is of another kind, or a file is not a readable picture.
            OSError: A file cannot be read.
        """
        seed = int((params or {}).get("seed", 0))
        settings = {"sigma_max": self._sigma_max, "config": self._inference, "seed": seed}
        results: list[np.ndarray] = [
            self._upscale(self._model, lq_u8, **settings) for lq_u8 in self._pictures(model_input)
        ]
        if isinstance(model_input, list):
            return results
        return np.stack(results) if getattr(model_input, "ndim", 3) == 4 else results[0]

    def _pictures(self, model_input: Any) -> list[np.ndarray]:
        if isinstance(model_input, np.ndarray) and model_input.ndim == 4:
            pictures = list(_checked(model_input))
        elif isinstance(model_input, list):
            pictures = [self._picture(one) for one in model_input]
        else:
            pictures = [self._picture(model_input)]
        if not pictures:
            raise ValueError(f"there is no picture in the input: {ACCEPTED}.")
        return pictures

    def _picture(self, one: Any) -> np.ndarray:
        if isinstance(one, np.ndarray) and one.ndim == 3:
            return _checked(one)
        if isinstance(one, (str, os.PathLike)):
            name, data = os.fspath(one), Path(one).read_bytes()
        elif isinstance(one, (bytes, bytearray, memoryview)):
            name, data = f"a picture of {len(one)} bytes", bytes(one)
        else:
            kind = f"{one.dtype} of shape {one.shape}" if isinstance(one, np.ndarray) else type(one).__name__
            raise ValueError(f"{ACCEPTED}; got {kind}.")
        try:
            picture: np.ndarray = self._decode(data, name=name)
        except (
            self._user_error
        ) as error:  # this class belongs to the package loaded above; callers do not know it
            raise ValueError(str(error)) from error
        return picture


def _checked(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels of one picture or several."""
    if pixels.dtype == np.int64 and pixels.size and pixels.min() >= 0 and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"{ACCEPTED}; got {pixels.dtype} of shape {pixels.shape}.")
    return pixels


def _import_package(folder: Path) -> str:
    """Imports the package in `folder` under a name derived from its content; returns the name."""
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
