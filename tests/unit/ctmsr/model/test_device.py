"""On a CPU nothing is moved; `test_gpu.py` has the rest."""

from collections.abc import Iterator

import torch

from ctmsr.model.device import prefetch, upload
from ctmsr.training.objective import Batch
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
