"""Named, complete runs: a preset is a function that takes no arguments and returns a RunConfig."""

from collections.abc import Callable
from dataclasses import replace

from ctmsr.degradation.config import DegradationConfig
from ctmsr.model.inference import InferenceConfig
from ctmsr.model.network import NetworkConfig
from ctmsr.training.losses import LossConfig
from ctmsr.training.state import OptimConfig

from .run_config import DataConfig, RunConfig, TrainConfig, TuneConfig


def published() -> RunConfig:
    """The authors' run, in bf16: 171.5 M parameters, 64 -> 256, 4 GPUs x 8 images, 500 000 CT + 2 000 DTM."""
    return RunConfig()


def one_gpu() -> RunConfig:
    """`published` on one GPU: the same updates, each in 4 micro-batches of 8 images."""
    return RunConfig(train=TrainConfig(num_workers=1))


def node() -> RunConfig:
    """`published` on a node of 8 GPUs: the same updates, 4 images per GPU."""
    return RunConfig(train=TrainConfig(num_workers=8))


def nodes() -> RunConfig:
    """`published` on 16 GPUs across several nodes, 2 images per GPU; keeps running on as few as 4."""
    return RunConfig(train=TrainConfig(num_workers=16, min_workers=4))


def small() -> RunConfig:
    """Minutes on two CPU cores: the network of the starter model, 2.2 M parameters, 32 -> 128.

    HR pictures are the targets throughout. At this budget consistency training undoes what they teach: see
    the ablation in tests/benchmarks/RESULTS.md.
    """
    return RunConfig(
        data=DataConfig(random_flip=True, eval_draws=4),
        degradation=_photo_degradation(),
        network=NetworkConfig(
            lq_size=32,
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_blocks=2,
            embed_dim=32,
            num_heads=2,
            dropout=0.0,
        ),
        # Coarse structures keep the input's colour: only detail is invented.
        inference=InferenceConfig(tile=288, colour_hold_px=3.0),
        # LPIPS-vgg takes four fifths of a step on a CPU, so it sees only a quarter of each picture.
        loss=LossConfig(hr_target_until=1.0, lpips_crop=0.5),
        optim=OptimConfig(
            ct_steps=200,
            dtm_steps=0,
            lr=1e-3,
            lr_halve_at=140,
            betas=(0.9, 0.99),
            ema_decay=0.97,
        ),
        train=TrainConfig(
            global_batch_size=4,
            num_workers=2,
            use_gpu=False,
            precision="fp32",
            cpus_per_worker=0.5,
            log_every_steps=5,
            checkpoint_every_steps=100,
        ),
        tune=TuneConfig(
            num_trials=3,
            max_concurrent=2,
            ct_steps=16,
            dtm_steps=0,
            sigma_max=(0.7, 1.3),
            noise_rho=(0.5, 2.0),
            res_rho=(0.5, 2.0),
            s0=(2, 4),
            s1=(3,),
            dtm_weight=(),
            dtm_t_min=(),
            dtm_t_max=(),
        ),
    )


def _photo_degradation() -> DegradationConfig:
    """The degradation typical of photographs on the web: a soft lens, some noise, a resize or two, JPEG.

    Milder than the published recipe: little of it is left where a picture is clean.
    """
    published = DegradationConfig()
    return DegradationConfig(
        stage1=replace(
            published.stage1,
            blur_sigma_px=(0.8, 3.2),
            sinc_prob=0.05,
            resize_up_prob=0.1,
            resize_down_prob=0.3,
            resize_range=(0.5, 1.2),
            noise_std=(0.0, 12 / 255),
            poisson_scale=(0.01, 0.8),
            jpeg_prob=0.3,
            jpeg_quality=(50.0, 95.0),
        ),
        stage2=replace(
            published.stage2,
            prob=0.15,
            blur_sigma_px=(0.2, 0.8),
            resize_range=(0.7, 1.2),
            noise_std=(0.0, 6 / 255),
            poisson_scale=(0.01, 0.3),
        ),
        final_sinc_prob=0.1,
        final_jpeg_quality=(55.0, 100.0),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    preset.__name__: preset for preset in (small, one_gpu, published, node, nodes)
}
