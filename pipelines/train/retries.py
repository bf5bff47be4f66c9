"""Runs a training to its end: which failures are retried, and how they are reported."""

from collections.abc import Callable

import ray.train
from ray.train.torch import TorchTrainer
from ray.util.metrics import Gauge
from ray.util.queue import Queue

from ctmsr.errors import StoreError, UserError

from ..config.run_config import RunConfig
from ..infra.checkpoints import newest
from ..infra.exit_status import first_cause, one_line
from ..infra.ray_internals import forget_lost_checkpoints, keyboard_interrupt, train_helpers_find_cluster


def fit(
    config: RunConfig, make_trainer: Callable[[], TorchTrainer], progress: Queue, *, is_trial: bool = False
) -> None:
    """Runs a training to its end; when workers are lost, restarts them from the newest checkpoint.

    Ray Train's own retries count all failures of a run and repeat even those that are bound to recur. Here
    only consecutive failures without a new checkpoint count, and an error that the user must fix ends the run
    at once. So does the loss of a trial's controller: a search stops a trial by killing its controller, and
    workers restarted then would never release their resources.

    Raises:
        UserError: The run failed and is not retried; the message contains the workers' errors alone.
    """
    num_failures = 0
    not_finite = Gauge("ctmsr_not_finite", "1 once a gradient was not finite", tag_keys=("run",))
    not_finite.set(0, {"run": config.name})
    while True:
        before = steps_done(config)
        forget_lost_checkpoints(config.run_uri)
        try:
            with keyboard_interrupt(), train_helpers_find_cluster():
                make_trainer().fit()
            return
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            after = steps_done(config)
            num_failures = 1 if after > before else num_failures + 1
            text = _failure(error)
            if any(isinstance(cause, FloatingPointError) for cause in _causes(error).values()):
                not_finite.set(1, {"run": config.name})  # a driver that ends sends its last values
            is_stopped = is_trial and isinstance(error, ray.exceptions.RayActorError)
            if is_stopped or _is_final(error) or num_failures > config.train.max_failures:
                raise UserError(f"training failed. {text}") from error
        limit = f"failure {num_failures} of {config.train.max_failures}"
        progress.put_nowait(f"warning: {text} Resuming from step {after} ({limit} without a new checkpoint).")


def _causes(error: BaseException) -> dict[str, BaseException]:
    """The original errors, by rank."""
    if isinstance(error, ray.train.WorkerGroupError):
        return {f"rank {rank}": first_cause(failure) for rank, failure in error.worker_failures.items()}
    return {"Ray Train": first_cause(getattr(error, "controller_failure", error))}


def _failure(error: BaseException) -> str:
    """One line; if some ranks report a permanent error, only theirs, as the others fail for lack of them."""
    causes = _causes(error)
    own = {where: cause for where, cause in causes.items() if _is_mistake(cause)}
    return " ".join(f"{where}: {one_line(cause)}" for where, cause in sorted((own or causes).items()))


def _is_final(error: BaseException) -> bool:
    return any(_is_mistake(cause) for cause in _causes(error).values())


def _is_mistake(cause: BaseException) -> bool:
    """Whether a retry would fail in the same way; a store may respond the next time."""
    return isinstance(cause, (UserError, FloatingPointError)) and not isinstance(cause, StoreError)


def steps_done(config: RunConfig) -> int:
    """Optimizer steps in the newest checkpoint of the run, from which it resumes."""
    found = newest(config.run_uri)
    return found.step if found else 0
