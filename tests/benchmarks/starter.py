"""Candidate networks for a model that anyone can run on a CPU: `python -m tests.benchmarks.starter`.

The command prints their parameters and arithmetic. 512x512 -> 2048x2048 should take less than ten seconds on
two cores, including the start of the interpreter: about 0.4 TFLOP. The full resolution is what costs (the
head alone takes 0.2 M multiply-adds per LR pixel at 32 channels); parameters at lower levels are cheap.
"""

import argparse
from dataclasses import replace

import torch

from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.training.losses import LossConfig
from ctmsr.training.state import OptimConfig
from pipelines.config.presets import small
from pipelines.config.run_config import RunConfig, TrainConfig

from .plain import count_flops

PICTURE_PX = 512 * 512
"""LR pixels of the picture that the time limit refers to."""


def network(
    channel_mult: tuple[int, ...], num_blocks: int, *, width: int = 32, embed_dim: int = 32, lq_size: int = 32
) -> NetworkConfig:
    """A small network with heads of 16 channels and no dropout."""
    return NetworkConfig(
        lq_size=lq_size,
        model_channels=width,
        channel_mult=channel_mult,
        num_blocks=num_blocks,
        embed_dim=embed_dim,
        num_heads=embed_dim // 16,
        dropout=0.0,
    )


CANDIDATES: dict[str, NetworkConfig] = {
    "small": network((1, 2), 1),
    "deep": network((1, 2, 4), 1),
    "even": network((1, 2, 2), 2),
    "attentive": network((1, 2), 2, embed_dim=64),
    "four-levels": network((1, 1, 2, 4), 1, lq_size=64),
    "tiny": replace(network((1,), 1, width=16, lq_size=16), window_size=4),  # for trying out the programs
}


def starter(name: str = "even") -> RunConfig:
    """A run that trains a candidate for photographs, with the HR picture as target."""
    return RunConfig(
        name=f"starter-{name}",
        network=CANDIDATES[name],
        degradation=small().degradation,
        loss=LossConfig(hr_target_until=1.0),
        optim=OptimConfig(ct_steps=10_000, dtm_steps=0, lr=1e-3, lr_halve_at=5_000, betas=(0.9, 0.99)),
        train=TrainConfig(global_batch_size=64, num_workers=1, micro_batch_size=64, precision="bf16"),
    )


def multiply_adds(config: NetworkConfig) -> float:
    """Multiply-adds of a forward pass per LR pixel; counted on the meta device, without computing."""
    with torch.device("meta"):
        model = ConsistencyModel(config).eval()
        x, lq = (torch.zeros(1, 3, side, side) for side in (config.hr_size, config.lq_size))
        noise = torch.zeros(1)
    return count_flops(model.model, x, noise, lq) / 2 / config.lq_size**2


def num_parameters(config: NetworkConfig) -> int:
    """Number of trained parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ConsistencyModel(config).parameters())


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.starter").parse_args()
    print(f"{'':14}{'parameters':>12}{'fp16 MB':>9}{'M mult-adds an LR pixel':>25}{'TFLOP of 512x512':>18}")
    for name, config in CANDIDATES.items():
        count, cost = num_parameters(config), multiply_adds(config)
        print(
            f"{name:14}{count / 1e6:>10.2f} M{2 * count / 1e6:>9.1f}{cost / 1e6:>25.3f}"
            f"{2 * cost * PICTURE_PX / 1e12:>18.2f}"
        )


if __name__ == "__main__":
    main()
