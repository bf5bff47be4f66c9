"""Defaults that RunConfig shares with command lines that must not wait for its imports."""

TRACKING_URI = "sqlite:///runs/mlflow.db"
MODEL_NAME = "ctmsr-x4"
DEVICES = ("cuda", "rocm", "mps", "cpu")
"""As in `ctmsr.model.device`."""
