"""RunConfig: every setting of a run in one place, and the checks that span its parts."""

from dataclasses import dataclass, field
from typing import Literal

from ctmsr.config import check
from ctmsr.degradation import DegradationConfig
from ctmsr.inference import InferenceConfig, tile_spans
from ctmsr.losses import LossConfig, dtm_range
from ctmsr.network import NetworkConfig
from ctmsr.schedule import ScheduleConfig, curriculum_steps
from ctmsr.train_state import OptimConfig
from ctmsr.train_step import Recipe


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures are: folders, searched at any depth, as s3:// or gs:// URIs or local paths.

    A name that ends in .index is an index of such a folder, made by `python -m pipelines.index`.
    """

    train_uri: str = "data/train"
    """Clean pictures to train on; crops are drawn from them."""
    val_uri: str = "data/val"
    """Held-out pictures that checkpoints and trials are compared on."""
    test_uri: str = "data/test"
    """Held-out pictures for the final evaluation, never used to choose anything; empty where none are."""
    test_lq_uri: str = ""
    """LR pictures to evaluate on, whole and as they are, instead of degraded crops; a pair has one key."""
    eval_crop_size: int = 256
    """Side of the middle of a held-out picture that is evaluated, in HR pixels; a multiple of the scale."""
    eval_draws: int = 1
    """Ways in which every held-out picture is degraded; more make scores steadier and take longer."""
    eval_crop_border: int = 0
    """Pixels cut from every side before PSNR, SSIM and NIQE; papers cut the scale, or none."""
    max_unreadable: float = 0.001
    """Share of training pictures that may have become unreadable since they were listed; more end the run."""

    def __post_init__(self) -> None:
        check(
            0 <= self.eval_crop_border < self.eval_crop_size // 4,
            f"data.eval_crop_border must be at least 0 and below a quarter of data.eval_crop_size, "
            f"got {self.eval_crop_border}.",
        )
        check(
            0 <= self.max_unreadable < 1,
            f"data.max_unreadable must be at least 0 and below 1, got {self.max_unreadable}.",
        )
        check(self.eval_draws >= 1, f"data.eval_draws must be at least 1, got {self.eval_draws}.")
        check(
            self.eval_crop_size >= 32, f"data.eval_crop_size must be at least 32, got {self.eval_crop_size}."
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run spreads over the cluster, and how often it reports."""

    global_batch_size: int = 32
    """Images an update, over all workers."""
    num_workers: int = 4
    """Ray Train workers: processes that hold the network."""
    min_workers: int = 0
    """Workers to go on with while nodes are missing; more join up to num_workers. 0 waits for num_workers."""
    micro_batch_size: int = 8
    """Images that a worker's network takes at once; of a larger part of a batch it adds up the gradients."""
    use_gpu: bool = True
    """One GPU a worker; false trains on CPUs."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside a worker; what is left makes the data, so leave one CPU or more."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the network's arithmetic: bf16 is autocast, several times as fast on GPUs; losses stay in fp32."""
    compile: bool = False
    """torch.compile the network: minutes at the start, faster steps."""
    activation_checkpointing: bool = False
    """Compute blocks again in the backward pass: about a third slower, a fraction of the memory."""
    log_every_steps: int = 50
    """Steps between two progress lines and two points in MLflow."""
    checkpoint_every_steps: int = 5_000
    """Steps between two checkpoints, each with an evaluation of the EMA weights on data.val_uri."""
    num_checkpoints_kept: int = 3
    """Newest checkpoints that stay in storage."""
    num_best_kept: int = 1
    """Checkpoints with the lowest LPIPS on data.val_uri that stay besides."""
    max_failures: int = 3
    """Failures in a row, without a new checkpoint in between, after which workers are not started again."""

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
        for name in ("num_best_kept", "max_failures"):
            check(getattr(self, name) >= 0, f"train.{name} must be at least 0, got {getattr(self, name)}.")
        check(
            self.num_workers <= self.global_batch_size,
            f"train.num_workers ({self.num_workers}) must be at most train.global_batch_size "
            f"({self.global_batch_size}): a worker without an image has nothing to do.",
        )
        check(
            0 <= self.min_workers <= self.num_workers,
            f"train.min_workers must be from 0 to train.num_workers ({self.num_workers}), "
            f"got {self.min_workers}.",
        )
        check(
            not self.min_workers or self.cpus_per_worker.is_integer(),
            f"train.cpus_per_worker must be a whole number with train.min_workers, got "
            f"{self.cpus_per_worker}: Ray counts free places in whole CPUs.",
        )


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The search over noise schedules and DTM: how, on what budget, and in which space.

    The space is one field for each key that a search may vary: a range, or choices; empty, the key keeps the
    run's own value.
    """

    method: Literal["asha", "tpe", "pbt"] = "asha"
    """asha stops the worse half early; tpe aims by what it has seen; pbt copies the best while they train."""
    num_trials: int = 12
    """Trials, or pbt's population; the first is always the run's own schedule, to its end."""
    max_concurrent: int = 2
    """Trials at a time; each takes train.num_workers workers."""
    ct_steps: int = 5_000
    """CT updates of a trial."""
    dtm_steps: int = 200
    """DTM updates of a trial."""
    max_psnr_loss_db: float = 0.5
    """PSNR-Y that may be lost to the first trial at the same step; each dB more costs a trial 1 LPIPS."""
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
                f"tune.{name} must be a rising range [low, high], or [] for the run's own value, "
                f"got {list(values)}.",
            )
        idle = [name for name in ("dtm_weight", "dtm_t_min", "dtm_t_max") if getattr(self, name)]
        check(
            bool(self.dtm_steps) or not idle,
            f"tune.dtm_steps=0 gives {', '.join(f'tune.{name}' for name in idle)} no effect. "
            "Set them to [], or raise tune.dtm_steps.",
        )


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """When a new version takes the champion's place: both are scored on data.val_uri."""

    metric: Literal["lpips", "psnr_y", "ssim_y"] = "lpips"
    """What must get better, as a mean over the pictures; of lpips, less is better."""
    margin: float = 0.002
    """Least gain in register.metric; more keeps chance from promoting. At 0 any gain will do."""
    guard: Literal["lpips", "psnr_y", "ssim_y"] = "psnr_y"
    """What must not get much worse."""
    guard_margin: float = 0.2
    """Largest loss in register.guard, in its unit: dB of psnr_y."""
    licence: str = "Apache-2.0"
    """Licence of the released weights, for the model card; their Python code is under Apache-2.0."""

    def __post_init__(self) -> None:
        for name in ("margin", "guard_margin"):
            check(getattr(self, name) >= 0, f"register.{name} must be at least 0, got {getattr(self, name)}.")
        check(
            self.guard != self.metric,
            f"register.guard must be another score than register.metric, got {self.guard!r} for both.",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, whole. Presets return one; `--config`, `--set` and a Tune trial rebuild one."""

    name: str = "ctmsr"
    """Name of the run: its folder under storage_uri, and its name in MLflow."""
    seed: int = 0
    """Seed of weights, noise, order, crops and degradation."""
    init_uri: str = ""
    """Checkpoint whose weights, EMA and optimizer state a run starts from; empty: random weights."""
    storage_uri: str = "runs"
    """Folder for checkpoints: a local path, s3://bucket/folder or gs://bucket/folder."""
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    """MLflow: a sqlite file, or the address of a server such as http://mlflow:5000."""
    experiment: str = "ctmsr"
    """MLflow experiment that the runs appear in."""
    model_name: str = "ctmsr-x4"
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
            f"name must be letters, digits, '-', '_' or '.', got {self.name!r}: it names a folder.",
        )
        check(
            self.data.eval_crop_size % self.network.scale == 0,
            f"data.eval_crop_size ({self.data.eval_crop_size}) must be a multiple of network.scale "
            f"({self.network.scale}).",
        )
        tile_spans(
            self.network.multiple,
            tile=self.inference.tile,
            overlap=self.inference.overlap,
            multiple=self.network.multiple,
        )
        if self.optim.dtm_steps:
            ends = (self.optim.ct_steps, self.optim.total_steps - 1)
            lengths = [curriculum_steps(self.schedule, step, self.optim.total_steps) for step in ends]
            for num_steps in range(min(lengths), max(lengths) + 1):
                dtm_range(self.loss, num_steps)

    @property
    def recipe(self) -> Recipe:
        """The part that the training step needs."""
        return Recipe(seed=self.seed, optim=self.optim, schedule=self.schedule, loss=self.loss)

    @property
    def run_uri(self) -> str:
        """Where the run's checkpoints are."""
        return f"{self.storage_uri.rstrip('/')}/{self.name}"
