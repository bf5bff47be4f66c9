"""Which device is chosen. On a CPU nothing is moved; `test_gpu.py` has the rest."""

from collections.abc import Iterator

import pytest
import torch

from ctmsr.errors import ConfigError
from ctmsr.model.device import DEVICES, choose_device, device_title, prefetch, upload
from ctmsr.training.objective import Batch
from pipelines.config import defaults
from tests.support.tiny import make_batch


def test_on_a_cpu_batches_pass_as_they_are_when_they_are_asked_for() -> None:
    batches, asked = [make_batch([k]) for k in range(3)], []

    def stream() -> Iterator[Batch]:
        for batch in batches:
            asked.append(batch)
            yield batch

    for number, batch in enumerate(prefetch(stream(), torch.device("cpu")), 1):
        assert batch is batches[number - 1]
        assert len(asked) == number


def test_on_a_cpu_a_tensor_stays_where_it_is() -> None:
    tensor = torch.ones(2)
    assert upload(tensor, torch.device("cpu")) is tensor


def test_without_a_gpu_the_cpu_is_chosen_and_another_device_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert choose_device() == choose_device("cpu") == torch.device("cpu")
    assert device_title(torch.device("cpu")) == f"cpu ({torch.get_num_threads()} threads)"
    for name in ("cuda", "rocm", "mps", "tpu"):
        with pytest.raises(ConfigError, match=rf"no device '{name}' here for torch .*, only cpu\."):
            choose_device(name)


def test_the_first_device_that_works_is_chosen_and_the_cpu_can_be_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device() == torch.device("mps")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.hip", None)
    assert choose_device() == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_amd_s_gpus_are_called_rocm_here_and_cuda_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.hip", "6.4")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "AMD Instinct MI300X")
    assert choose_device() == choose_device("rocm") == torch.device("cuda")
    assert device_title(choose_device()) == "rocm (AMD Instinct MI300X)"
    with pytest.raises(ConfigError, match=r"no device 'cuda' here .*, only rocm, .*cpu\."):
        choose_device("cuda")


def test_the_command_line_has_the_same_devices() -> None:
    assert defaults.DEVICES == DEVICES
