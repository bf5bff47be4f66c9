"""Describes the machine of a measurement, and what a GPU can do at most."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A GPU's peaks from its data sheet: dense products, without sparsity."""

    bf16: float
    """FLOP/s."""
    tf32: float
    fp32: float
    bandwidth: float
    """Bytes/s of its memory."""


CARDS = {
    "h100": Card(bf16=989e12, tf32=494.5e12, fp32=67e12, bandwidth=3.35e12),  # SXM5, 80 GB HBM3
    "h200": Card(bf16=989e12, tf32=494.5e12, fp32=67e12, bandwidth=4.8e12),  # SXM5, 141 GB HBM3e
    "a100": Card(bf16=312e12, tf32=156e12, fp32=19.5e12, bandwidth=2.039e12),  # SXM4, 80 GB HBM2e
}


def machine(device: torch.device) -> str:
    """Such as "NVIDIA H200, torch 2.11.0+cu130" or "2 CPU cores, torch 2.13.0+cpu"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{name}, torch {torch.__version__}"


def card_of(place: str) -> Card | None:
    """The card that a text of `machine` names, if it is a known one."""
    return next((card for name, card in CARDS.items() if name in place.lower()), None)
