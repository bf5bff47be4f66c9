"""The formats by name, and the packages that each needs; imports none of them."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ctmsr.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """One format."""

    text: str
    """For whom it is."""
    suffix: str
    """Of its file; empty for a folder."""
    packages: tuple[str, ...]
    """What writing and checking it imports, of the extra `export`."""
    module: str
    """Of this folder. Its `write(source, path)` writes and checks it, and returns the largest difference."""

    def check_packages(self, name: str) -> None:
        """Checks, without importing anything, that the packages are installed.

        Raises:
            ConfigError: Some are not.
        """
        if missing := [package for package in self.packages if find_spec(package) is None]:
            raise ConfigError(
                f"--to {name} needs {' and '.join(missing)}, which this environment lacks. Install the extra "
                "`export`: pip install 'ctmsr-ray[export]', or '.[export]' in a clone."
            )

    def imported(self, name: str) -> ModuleType:
        """The module.

        Raises:
            ConfigError: A package is installed, but does not work here.
        """
        try:
            return import_module(f"{__package__}.{self.module}")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another build of torch
            raise ConfigError(
                f"--to {name} needs {' and '.join(self.packages)}, which cannot be imported here "
                f"({str(error).splitlines()[0]}). Install releases that fit each other."
            ) from error


FORMATS = {
    "onnx": Format(
        "a file for ONNX Runtime and whatever else reads ONNX",
        ".onnx",
        ("onnx", "onnxruntime"),
        "onnx_file",
    ),
    "spandrel": Format(
        "a safetensors file for ComfyUI, chaiNNer and other users of spandrel",
        ".safetensors",
        ("spandrel",),
        "spandrel_file",
    ),
    "hf": Format(
        "a folder as on the Hugging Face Hub",
        "",
        ("huggingface_hub",),
        "hugging_face",
    ),
}
