"""Defaults that RunConfig shares with command lines that must not wait for its imports."""

TRACKING_URI = "sqlite:///runs/mlflow.db"
MODEL_NAME = "ctmsr-x4"
