"""A torchvision that was built for another build of torch, such as the one without CUDA, made importable."""

import torch


def make_importable() -> None:
    """Declares the two operators that torchvision describes, for where its own library does not load."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
