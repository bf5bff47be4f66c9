"""CUDA graphs for training: a trial that `train_step` measures. No GPU has run it yet; runs do not use it.

A step of the published network launches six thousand kernels, nine of ten in the network's calls. So far it
is for CT in one pass over a batch. Graphs write gradients to the same memory every time, so that a second
micro-batch would overwrite those of the first (pytorch issue 181723); and a copy of the network, like DTM's,
would replay the original.
"""

import torch

from ctmsr.training.state import TrainState


def replay_network(state: TrainState, size: int) -> None:
    """Makes the network's calls, and their backward passes, replay graphs.

    Args:
        state: Its network is recorded, in train mode; keep the weights where they are.
        size: Images a step.
    """
    network, config = state.network.train(), state.network.config
    device = next(network.parameters()).device
    hr, lq = (torch.zeros(size, 3, side, side, device=device) for side in (config.hr_size, config.lq_size))
    torch.cuda.make_graphed_callables(network, (hr, torch.ones(size, device=device), lq))
    # The target's call comes before the prediction's, which overwrites its output.
    network.register_forward_hook(lambda _, inputs, out: out if out.requires_grad else out.clone())
