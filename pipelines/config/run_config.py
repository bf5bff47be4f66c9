"""RunConfig: every setting of a run in one place, and the checks that span its parts."""

from dataclasses import dataclass, field
from typing import Literal

from ctmsr.config import check
from ctmsr.degradation.config import DegradationConfig
from ctmsr.model.inference import InferenceConfig, tile_spans
from ctmsr.model.network import NetworkConfig, described
from ctmsr.model.schedule import ScheduleConfig, curriculum_steps
from ctmsr.rng import Order, OrderVersion
from ctmsr.training.losses import LossConfig, dtm_range
from ctmsr.training.resized_crop import lpips_size
from ctmsr.training.state import OptimConfig, frozen_names
from ctmsr.training.step import Recipe

from .defaults import MODEL_NAME, TRACKING_URI


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures are: folders, searched recursively, as s3:// or gs:// URIs or local paths.

    A name ending in .index is an index of such a folder, written by `python -m pipelines.index`.
    """

    train_uri: str = "data/train"
    """Clean pictures to train on, in random crops."""
    val_uri: str = "data/val"
    """Held-out pictures to compare checkpoints, trials and registered models on."""
    test_uri: str = "data/test"
    """Held-out pictures for the final evaluation, never used to choose anything; empty for no references."""
    test_lq_uri: str = ""
    """LR pictures to evaluate on, uncropped, instead of degrading data.test_uri; pairs share a key."""
    order: Order = "global"
    """sharded visits neighbours in shards together: few requests to the store, a coarser shuffle."""
    order_version: OrderVersion = 2
    """Version of the global order; 1 is that of runs begun before there was a choice."""
    random_flip: bool = False
    """Mirror half of the training crops left to right; the published run does not."""
    crops_per_picture: int = 1
    """Consecutive samples from one picture, fetched and decoded once; more make batches less diverse."""
    eval_crop_size: int = 256
    """Side of the central crop of a held-out picture to evaluate, in HR pixels; a multiple of the scale."""
    eval_draws: int = 1
    """Degradations of each held-out picture; more give steadier scores and take longer."""
    eval_crop_border: int = 0
    """Pixels cropped from every side before PSNR, SSIM and NIQE; papers crop the scale, or nothing."""
    max_unreadable: float = 0.001
    """Fraction of the training pictures that may become unreadable after listing; more end the run."""

    def __post_init__(self) -> None:
        check(
            0 <= self.eval_crop_border < self.eval_crop_size // 4,
            f"data.eval_crop_border must be at least 0 and below a quarter of data.eval_crop_size, "
            f"got {self.eval_crop_border}.",
        )
        check(
            self.order == "global" or self.order_version == 2,
            "data.order=sharded has no version 1. Leave data.order_version at 2.",
        )
        check(
            0 <= self.max_unreadable < 1,
            f"data.max_unreadable must be at least 0 and below 1, got {self.max_unreadable}.",
        )
        for name in ("crops_per_picture", "eval_draws"):
            check(getattr(self, name) >= 1, f"data.{name} must be at least 1, got {getattr(self, name)}.")
        check(
            self.eval_crop_size >= 32, f"data.eval_crop_size must be at least 32, got {self.eval_crop_size}."
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run uses the cluster, and how often it reports."""

    REMOVED = ("num_best_kept",)  # since 0.1: num_checkpoints_kept counts the best

    global_batch_size: int = 32
    """Images per update, over all workers."""
    num_workers: int = 4
    """Ray Train workers, each a process with a copy of the network."""
    min_workers: int = 0
    """Fewest workers to train with while nodes are missing; more join later, up to num_workers. 0: all."""
    micro_batch_size: int = 8
    """Most images per forward pass on a worker; a larger share of the batch accumulates gradients."""
    use_gpu: bool = True
    """One GPU per worker; false trains on CPUs."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves per worker; the data tasks get the rest, so leave at least one."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the network and of LPIPS's backbone; weights, sums of losses and updates stay in fp32."""
    compile: bool = False
    """torch.compile the blocks of the network: takes minutes at the start and makes steps faster."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, a fraction of the memory."""
    log_every_steps: int = 50
    """Steps between progress lines and between points in MLflow."""
    checkpoint_every_steps: int = 5_000
    """Steps between checkpoints, each of which a task beside the training scores on data.val_uri."""
    num_checkpoints_kept: int = 3
    """Checkpoints to keep in storage besides the newest: those with the lowest LPIPS on data.val_uri."""
    max_failures: int = 3
    """Consecutive failures, without a new checkpoint in between, that a run recovers from."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size",
            "num_workers",
            "micro_batch_size",
            "log_every_steps",
            "checkpoint_every_steps",
            "num_checkpoints_kept",
        ):
            check(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}.")
        check(self.cpus_per_worker > 0, f"train.cpus_per_worker must be above 0, got {self.cpus_per_worker}.")
        check(self.max_failures >= 0, f"train.max_failures must be at least 0, got {self.max_failures}.")
        check(
            self.num_workers <= self.global_batch_size,
            f"train.num_workers ({self.num_workers}) must be at most train.global_batch_size "
            f"({self.global_batch_size}): every worker needs at least one image.",
        )
        check(
            0 <= self.min_workers <= self.num_workers,
            f"train.min_workers must be from 0 to train.num_workers ({self.num_workers}), "
            f"got {self.min_workers}.",
        )
        check(
            not self.min_workers or self.cpus_per_worker.is_integer(),
            f"train.cpus_per_worker must be a whole number with train.min_workers, got "
            f"{self.cpus_per_worker}: Ray sizes an elastic run in whole CPUs.",
        )


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The search over noise schedules and DTM: its method, budget and space.

    The space has one field for each key that a search can vary: a range or a list of choices. If it is empty,
    the key keeps the run's own value.
    """

    method: Literal["asha", "tpe", "pbt"] = "asha"
    """asha stops the worse half early; tpe learns from earlier trials; pbt copies the best as they train."""
    num_trials: int = 12
    """Trials, or pbt's population; the first always trains the run's own schedule, to the end."""
    max_concurrent: int = 2
    """Trials at a time; each takes train.num_workers workers."""
    ct_steps: int = 5_000
    """CT updates per trial."""
    dtm_steps: int = 200
    """DTM updates per trial."""
    max_psnr_loss_db: float = 0.5
    """PSNR-Y that a trial may lose to the first one at the same step; each dB beyond it costs 1 LPIPS."""
    sigma_max: tuple[float, ...] = (0.4, 1.6)
    """Range of schedule.sigma_max."""
    noise_rho: tuple[float, ...] = (0.5, 3.0)
    """Range of schedule.noise_rho."""
    res_rho: tuple[float, ...] = (0.5, 3.0)
    """Range of schedule.res_rho."""
    s0: tuple[int, ...] = (3, 4, 5, 6)
    """Choices of schedule.s0."""
    s1: tuple[int, ...] = (3, 4)
    """Choices of schedule.s1."""
    dtm_weight: tuple[float, ...] = (0.8, 3.2)
    """Range of loss.dtm_weight."""
    dtm_t_min: tuple[float, ...] = (0.0, 0.3)
    """Range of loss.dtm_t_min."""
    dtm_t_max: tuple[float, ...] = (0.5, 1.0)
    """Range of loss.dtm_t_max."""

    def __post_init__(self) -> None:
        for name in ("num_trials", "max_concurrent", "ct_steps"):
            check(getattr(self, name) >= 1, f"tune.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("dtm_steps", "max_psnr_loss_db"):
            check(getattr(self, name) >= 0, f"tune.{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("sigma_max", "noise_rho", "res_rho", "dtm_weight", "dtm_t_min", "dtm_t_max"):
            values = getattr(self, name)
            check(
                not values or (len(values) == 2 and values[0] < values[1]),
                f"tune.{name} must be an increasing range [low, high], or [] for the run's own value, "
                f"got {list(values)}.",
            )
        idle = [name for name in ("dtm_weight", "dtm_t_min", "dtm_t_max") if getattr(self, name)]
        check(
            bool(self.dtm_steps) or not idle,
            f"with tune.dtm_steps=0, {', '.join(f'tune.{name}' for name in idle)} have no effect. "
            "Set them to [], or raise tune.dtm_steps.",
        )


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """When a new version becomes champion; it, the champion and bicubic are scored on data.val_uri.

    With or without a champion, it must not be worse than bicubic: no loss in `metric`, and a loss of at most
    `guard_margin` in `guard`.
    """

    metric: Literal["lpips", "psnr_y", "ssim_y"] = "lpips"
    """Score that must improve, as a mean over the pictures; lower is better for lpips."""
    margin: float = 0.002
    """Minimum gain in register.metric over the champion; a larger one ignores noise, 0 accepts any gain."""
    guard: Literal["lpips", "psnr_y", "ssim_y"] = "psnr_y"
    """Score that must not get much worse."""
    guard_margin: float = 0.5
    """Maximum loss in register.guard against the champion and bicubic, in its unit, such as dB for psnr_y."""
    licence: str = "Apache-2.0"
    """Licence of the released weights, for the model card; their Python code is under Apache-2.0."""

    def __post_init__(self) -> None:
        for name in ("margin", "guard_margin"):
            check(getattr(self, name) >= 0, f"register.{name} must be at least 0, got {getattr(self, name)}.")
        check(
            self.guard != self.metric,
            f"register.guard must differ from register.metric, got {self.guard!r} for both.",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run. Presets return one; `--config`, `--set` and a Tune trial rebuild one."""

    name: str = "ctmsr"
    """Name of the run: its folder under storage_uri, and its name in MLflow."""
    seed: int = 0
    """Seed of weights, noise, sample order, crops and degradation."""
    init_uri: str = ""
    """Checkpoint to start from, of this network or of one that shares most weights; empty for random ones."""
    storage_uri: str = "runs"
    """Folder for checkpoints: a local path, s3://bucket/folder or gs://bucket/folder."""
    tracking_uri: str = TRACKING_URI
    """MLflow: a sqlite file, or the address of a server such as http://mlflow:5000."""
    experiment: str = "ctmsr"
    """MLflow experiment that the runs appear in."""
    model_name: str = MODEL_NAME
    """Name in the MLflow model registry."""
    data: DataConfig = field(default_factory=DataConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    register: RegisterConfig = field(default_factory=RegisterConfig)

    def __post_init__(self) -> None:
        allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
        check(
            bool(self.name.strip(".")) and set(self.name) <= allowed,
            f"name may have only letters, digits, '-', '_' and '.', as it names a folder; got {self.name!r}.",
        )
        check(
            self.data.eval_crop_size % self.network.scale == 0,
            f"data.eval_crop_size ({self.data.eval_crop_size}) must be a multiple of network.scale "
            f"({self.network.scale}).",
        )
        check(
            self.data.order == "global" or self.train.global_batch_size % self.data.crops_per_picture == 0,
            f"with data.order=sharded, data.crops_per_picture ({self.data.crops_per_picture}) must divide "
            f"train.global_batch_size ({self.train.global_batch_size}).",
        )
        tile_spans(
            self.network.multiple,
            tile=self.inference.tile,
            overlap=self.inference.overlap,
            multiple=self.network.multiple,
        )
        lpips_size(self.loss, self.network.hr_size)
        if self.optim.freeze:
            frozen_names(described(self.network), self.optim.freeze)
        if self.optim.dtm_steps:
            ends = (self.optim.ct_steps, self.optim.total_steps - 1)
            lengths = [curriculum_steps(self.schedule, step, self.optim.total_steps) for step in ends]
            for num_steps in range(min(lengths), max(lengths) + 1):
                dtm_range(self.loss, num_steps)

    @property
    def recipe(self) -> Recipe:
        """The part of the config that the training step needs."""
        return Recipe(
            seed=self.seed,
            optim=self.optim,
            schedule=self.schedule,
            loss=self.loss,
            noise_version=self.inference.noise_version,
        )

    @property
    def run_uri(self) -> str:
        """The folder of the run's checkpoints."""
        return f"{self.storage_uri.rstrip('/')}/{self.name}"
