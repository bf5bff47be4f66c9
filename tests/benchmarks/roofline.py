"""What a training step should take on a GPU: `python -m tests.benchmarks.roofline --help`.

Needs no GPU, and two minutes. The real training step runs on fake tensors, and `kernels.Trace` records what
it would launch. A kernel takes as long as its product at the card's peak, or as its bytes at the bandwidth if
that is longer, and begins when the one before has ended and the host has launched it. These are lower
bounds: kernels reach neither peak, and `--launch-us` is what the driver takes, without Python and torch.

The rows are those of tests.benchmarks.train_step, with what was measured there. All have the published
objective, and a target that the network computes.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ctmsr.metrics.perceptual import Lpips
from ctmsr.model.device import use_fast_math
from ctmsr.model.network import ConsistencyModel, NetworkConfig
from ctmsr.rng import sample_seed
from ctmsr.training.losses import LossConfig
from ctmsr.training.objective import Batch
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig

from .kernels import Kernel, Trace, fused
from .machine import CARDS, Card
from .plain import PlainTraining
from .train_step import GPU, OURS, PLAIN, Variant, as_torch_does, our_state, step_of

HOST_BANDWIDTH = 25e9
"""Bytes/s from pinned memory to a GPU, over PCIe 4."""
MEASURED = Path(__file__).parent / "results/gpu-steps.json"

INPUTS, TARGET, FORWARD = "batch, noise, trajectory", "target network", "network forward"
LOSSES, LOSSES_BACKWARD, BACKWARD = "LPIPS forward", "LPIPS backward", "network backward"
OPTIMIZER, AVERAGE = "optimizer", "EMA, bf16 copy"
PARTS = (INPUTS, TARGET, FORWARD, LOSSES, LOSSES_BACKWARD, BACKWARD, OPTIMIZER, AVERAGE)
"""In the order in which they run. LPIPS includes the other loss, and the optimizer the gradients' norm."""
NETWORK = (TARGET, FORWARD, BACKWARD)
"""What `compile_step` compiles, but for a few operations between the blocks."""


@dataclass(frozen=True)
class Time:
    """A prediction for some kernels, in seconds."""

    products: float
    """At the peak of their arithmetic."""
    memory: float
    """All bytes at the bandwidth."""
    device: float
    """The kernels one after the other, each the longer of the two."""
    elapsed: float
    """With the waits for the host."""


class Clock:
    """Which part of a training step runs now."""

    def __init__(self) -> None:
        self.trace = Trace(self.part)
        self._part, self._was_backward, self._is_below_prediction = INPUTS, False, False

    def part(self) -> str:
        """One of `PARTS`."""
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            self._was_backward = True
            return BACKWARD if self._is_below_prediction else LOSSES_BACKWARD
        return OPTIMIZER if self._was_backward and self._part != AVERAGE else self._part

    @contextmanager
    def running(self) -> Iterator[Trace]:
        """Records the step that runs inside."""
        hooks = (
            register_module_forward_pre_hook(self._enter_network),
            register_module_forward_hook(self._leave_network),
            register_optimizer_step_pre_hook(self._enter_optimizer),
            register_optimizer_step_post_hook(self._leave_optimizer),
        )
        try:
            with self.trace:
                yield self.trace
        finally:
            for hook in hooks:
                hook.remove()

    def _enter_network(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, ConsistencyModel):
            self._part = FORWARD if torch.is_grad_enabled() else TARGET

    def _leave_network(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, ConsistencyModel):
            self._part = LOSSES if output.requires_grad else INPUTS
        if isinstance(module, ConsistencyModel) and output.requires_grad:
            output.register_hook(self._pass_prediction)

    def _pass_prediction(self, gradient: Tensor) -> None:
        self._is_below_prediction = True

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for state in optimizer.state.values():
            if not optimizer.defaults["fused"]:
                self.trace.stays_on_the_host(state["step"])

    def _leave_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._part = AVERAGE


# The networks and a batch as fake tensors


def fake_networks(
    config: NetworkConfig, variant: Variant, mode: FakeTensorMode
) -> tuple[ConsistencyModel, Lpips]:
    """The network and LPIPS-vgg in the variant's layout and precision, without memory."""
    with torch.device("meta"), Trace():  # initialisation reads numbers, which a trace invents
        model = ConsistencyModel(config)
        lpips = Lpips(vgg_tensors(), "bf16" if variant.bf16_lpips else "fp32")
    for module in (model, lpips):
        if variant.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                made = FakeTensor(mode, parameter.detach(), torch.device("cpu"))
                setattr(owner, name, nn.Parameter(made, parameter.requires_grad))
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, FakeTensor(mode, buffer.to("meta"), torch.device("cpu")))
    return model, lpips


def vgg_tensors() -> dict[str, Tensor]:
    """Tensors of the shapes of `lpips_tensors("vgg")`."""
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, *6 * (512,))
    tensors = {
        f"lins.{i}.weight": torch.empty(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))
    }
    for number, inner, outer in zip(numbers, widths, widths[1:], strict=False):
        tensors[f"features.{number}.weight"] = torch.empty(outer, inner, 3, 3)
        tensors[f"features.{number}.bias"] = torch.empty(outer)
    return tensors


def fake_batch(config: NetworkConfig, size: int) -> Batch:
    """A batch; call this inside a FakeTensorMode."""
    hr_u8, lq_u8 = (
        torch.empty(size, side, side, 3, dtype=torch.uint8) for side in (config.hr_size, config.lq_size)
    )
    return Batch(hr_u8=hr_u8, lq_u8=lq_u8, samples=list(range(size)), keys=size * ["fake"])


def traces(config: RunConfig, size: int) -> Iterator[tuple[str, Trace]]:
    """The forms of tests.benchmarks.train_step, by name."""
    for name in PLAIN:
        yield name, trace_of(Variant(name), config, size)
    for variant in (OURS, *GPU):
        yield variant.name, trace_of(variant, config, size)


def trace_of(variant: Variant, config: RunConfig, size: int, num_before: int = 1) -> Trace:
    """The kernels of a form's step, which calls the network for its target.

    Args:
        variant: The form, a plain one if its name is in `PLAIN`.
        config: The run.
        size: Images a step.
        num_before: Steps before; the first one makes the optimizer's state.
    """
    num_steps = config.schedule.s0
    with_target = (seed for seed in count() if sample_seed(seed, "n", num_before) % num_steps)
    config = replace(config, seed=next(with_target))
    mode, clock = FakeTensorMode(allow_non_fake_inputs=True), Clock()
    model, lpips = fake_networks(config.network, variant, mode)
    with mode:
        if variant.name in PLAIN:
            step = as_torch_does(PlainTraining(model, config.recipe, lpips, **PLAIN[variant.name]).step)
        else:
            state = our_state(variant, model, config)
            state.check_every = 16  # as on a GPU
            step = step_of(variant, state, lpips, config)
        batch = fake_batch(config.network, size)
        for _ in range(num_before):
            with Trace():
                step(batch)
        with clock.running() as trace:
            step(batch)
    return trace


# Predictions


def predict(kernels: list[Kernel], card: Card, launch_s: float) -> dict[str, Time]:
    """Times by part, and of all as "all".

    Args:
        kernels: In their order.
        card: The GPU.
        launch_s: Seconds of the host for each launch.
    """
    times = dict.fromkeys((*PARTS, "all"), Time(0, 0, 0, 0))
    launched = finished = 0.0
    for kernel in kernels:
        products = kernel.flops / getattr(card, kernel.arithmetic)
        memory = kernel.bytes / card.bandwidth
        launched += launch_s * kernel.num_launches
        before, finished = finished, max(launched, finished) + max(products, memory)
        for name in (kernel.part, "all"):
            one = times[name]
            times[name] = Time(
                one.products + products,
                one.memory + memory,
                one.device + max(products, memory),
                one.elapsed + finished - before,
            )
    return times


def measured_ms(preset: str, size: int, gpu: str) -> dict[str, float]:
    """What tests.benchmarks.train_step measured in this setting, by form; empty if it was another."""
    found = json.loads(MEASURED.read_text())
    same = (found["preset"], found["batch"]) == (preset, size) and gpu in found["machine"].lower()
    return {name: form["ms"] for name, form in found["forms"].items()} if same else {}


def report(forms: dict[str, list[Kernel]], card: Card, launch_s: float, measured: dict[str, float]) -> None:
    """Prints the table of forms, then the parts of some."""
    print(
        f"{'':36}{'TFLOP':>7}{'GB':>7}{'launches':>10}{'casts':>7}{'device ms':>11}{'step ms':>9}{'ratio':>7}"
        f"{'MFU':>6}{'all':>6}{'measured ms':>13}{'us a launch':>13}"
    )
    times = {name: predict(kernels, card, launch_s) for name, kernels in forms.items()}
    for name, kernels in forms.items():
        one, launches = times[name]["all"], sum(kernel.num_launches for kernel in kernels)
        # As in tests.benchmarks.train_step: of the prediction's passes, not of target and LPIPS.
        own = sum(kernel.flops for kernel in kernels if kernel.part in (FORWARD, BACKWARD))
        flops = sum(kernel.flops for kernel in kernels)
        line = (
            f"{name:36}{flops / 1e12:>7.2f}{sum(k.bytes for k in kernels) / 1e9:>7.1f}{launches:>10}"
            f"{sum(k.is_cast for k in kernels):>7}{1e3 * one.device:>11.1f}{1e3 * one.elapsed:>9.1f}"
            f"{times['plain']['all'].elapsed / one.elapsed:>7.2f}"
            f"{own / one.elapsed / card.bf16:>6.0%}{flops / one.elapsed / card.bf16:>6.0%}"
        )
        if name in measured:
            line += f"{measured[name]:>13.1f}{1e3 * measured[name] / launches:>13.0f}"
        print(line)
    for name in ("plain", *list(forms)[-3:]):
        print(
            f"\n{name.strip():36}{'TFLOP':>7}{'GB':>7}{'launches':>10}{'products ms':>13}{'memory ms':>11}"
            f"{'device ms':>11}{'step ms':>9}"
        )
        for part in PARTS:
            some, one = [kernel for kernel in forms[name] if kernel.part == part], times[name][part]
            print(
                f"{part:36}{sum(k.flops for k in some) / 1e12:>7.2f}{sum(k.bytes for k in some) / 1e9:>7.1f}"
                f"{sum(k.num_launches for k in some):>10}{1e3 * one.products:>13.1f}{1e3 * one.memory:>11.1f}"
                f"{1e3 * one.device:>11.1f}{1e3 * one.elapsed:>9.1f}"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="published", choices=list(PRESETS))
    parser.add_argument("--gpu", default="h100", choices=list(CARDS))
    parser.add_argument("--batch", type=int, default=8, help="images a step; default %(default)s")
    parser.add_argument(
        "--launch-us", type=float, default=4.5, help="of the host for each kernel; default %(default)s"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    use_fast_math()
    config = replace(PRESETS[arguments.preset](), loss=LossConfig())
    forms = {name: trace.kernels for name, trace in traces(config, arguments.batch)}
    eager = list(forms.values())[-1]
    forms["+ torch.compile"] = fused(eager, NETWORK)
    forms["+ torch.compile of LPIPS"] = fused(eager, (*NETWORK, LOSSES, LOSSES_BACKWARD))
    network, size = config.network, arguments.batch
    num_bytes = 3 * size * (network.hr_size**2 + network.lq_size**2)
    print(
        f"{arguments.gpu}, preset {arguments.preset}, batch {size}, {arguments.launch_us:g} us a launch; "
        f"feed: {num_bytes / 1e6:.1f} MB a step, {1e3 * num_bytes / HOST_BANDWIDTH:.2f} ms beside it"
    )
    measured = measured_ms(arguments.preset, size, arguments.gpu)
    report(forms, CARDS[arguments.gpu], 1e-6 * arguments.launch_us, measured)


if __name__ == "__main__":
    main()
