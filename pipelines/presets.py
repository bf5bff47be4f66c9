"""Named, complete runs. A preset is a function without arguments that returns a RunConfig."""

from collections.abc import Callable

from ctmsr.losses import LossConfig
from ctmsr.network import NetworkConfig
from ctmsr.schedule import ScheduleConfig
from ctmsr.train_state import OptimConfig

from .config import RunConfig, TrainConfig, TuneConfig
from .data import DataConfig


def published() -> RunConfig:
    """The authors' run: 171.5 M parameters, 64 -> 256, 4 GPUs x 8 images, 500 000 CT + 2 000 DTM steps."""
    return RunConfig()


def small() -> RunConfig:
    """The same method for two CPU cores and minutes: 1.0 M parameters, 16 -> 64, two workers."""
    return RunConfig(
        data=DataConfig(eval_draws=4),
        network=NetworkConfig(
            lq_size=16,
            model_channels=32,
            channel_mult=(1, 2),
            num_blocks=1,
            embed_dim=32,
            num_heads=2,
            dropout=0.0,
        ),
        # Minutes are too short to follow a long trajectory from unit noise: little noise, and 1 step, then 2.
        schedule=ScheduleConfig(sigma_max=0.015, noise_rho=0.3, res_rho=0.3, s0=1, s1=2),
        loss=LossConfig(lpips_weight=0.05, dtm_weight=0.2, dtm_t_max=0.7),
        optim=OptimConfig(
            ct_steps=220,
            dtm_steps=20,
            lr=1.5e-3,
            lr_halve_at=170,
            betas=(0.9, 0.99),
            ema_decay=0.97,
            dtm_refresh_steps=10,
        ),
        train=TrainConfig(
            global_batch_size=16,
            num_workers=2,
            use_gpu=False,
            cpus_per_worker=0.5,
            log_every_steps=5,
            checkpoint_every_steps=120,
        ),
        tune=TuneConfig(
            num_trials=3,
            max_concurrent=2,
            ct_steps=24,
            dtm_steps=0,
            sigma_max=(0.01, 0.02),
            noise_rho=(0.2, 1.0),
            res_rho=(0.2, 1.0),
            s0=(1, 2),
            s1=(2,),
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"published": published, "small": small}
