"""Describes the machine of a measurement."""

import os

import torch


def machine(device: torch.device) -> str:
    """Such as "NVIDIA H200, torch 2.11.0+cu130" or "2 CPU cores, torch 2.13.0+cpu"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{name}, torch {torch.__version__}"
