"""The yardstick: a plain implementation of the method, like the authors' code, on our network's weights.

fp32, eager, NCHW; attention as two products and a softmax with a mask rebuilt in every layer; the target
network always called; AdamW and EMA as loops over the parameters; the loss read by the host at every step.
"""

import copy

import torch
from torch import Tensor, nn

from ctmsr.image.ranges import to_tensor, upsample
from ctmsr.model.attention import WindowAttention
from ctmsr.model.network import ConsistencyModel
from ctmsr.model.schedule import curriculum_steps, trajectory_levels
from ctmsr.model.trajectory import trajectory_point
from ctmsr.rng import sample_seed
from ctmsr.training.losses import Distance, charbonnier
from ctmsr.training.objective import Batch, Recipe, sample_noise


class PlainAttention(WindowAttention):
    """WindowAttention without a fused kernel: assign it to a layer's `__class__`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same."""
        n, c, h, w = x.shape
        win, heads = self.window_size, self.num_heads
        rows, columns, tokens = h // win, w // win, win * win
        windows = x.view(n, c, rows, win, columns, win).permute(0, 2, 4, 3, 5, 1).reshape(-1, tokens, c)
        q, k, v = self.qkv(windows).view(-1, tokens, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        scores = (q * (c // heads) ** -0.5) @ k.transpose(-2, -1)
        index = self.relative_position_index.view(-1)
        bias = (
            self.relative_position_bias_table[index].view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
        )
        scores = scores + bias[None] + self._mask(n, rows, columns, x.device)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, tokens, c)
        out = self.proj(out).view(n, rows, columns, win, win, c).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(n, c, h, w)

    def _mask(self, n: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """The mask of windows that are not shifted: all zeros, rebuilt every time like the authors'."""
        regions = torch.zeros(rows * columns, self.window_size**2, device=device)
        mask = regions[:, None, :] - regions[:, :, None]
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        return mask.repeat(n, 1, 1)[:, None]


def plain_network(model: ConsistencyModel) -> ConsistencyModel:
    """The same network, with plain attention."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, WindowAttention):
            module.__class__ = PlainAttention
    return plain


class PlainTraining:
    """CT steps, plain except for the options given."""

    def __init__(
        self,
        model: ConsistencyModel,
        recipe: Recipe,
        lpips: Distance,
        *,
        fused_attention: bool = False,
        skip_known_target: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model) if fused_attention else plain_network(model)
        self.recipe, self.lpips, self.skip_known_target = recipe, lpips, skip_known_target
        self.ema = copy.deepcopy(self.model)
        optim = recipe.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=0.0,
            foreach=False,
            fused=False,
        )
        self.global_step = 0

    def step(self, batch: Batch) -> float:
        """One update; returns the loss."""
        recipe, step = self.recipe, self.global_step
        self.model.train()
        hr, lq = to_tensor(batch.hr_u8), to_tensor(batch.lq_u8)
        lq_up = upsample(lq, self.model.config.scale)
        num_steps = curriculum_steps(recipe.schedule, step, recipe.optim.total_steps)
        alphas, sigmas = (levels.to(hr.device) for levels in trajectory_levels(recipe.schedule, num_steps))
        n = sample_seed(recipe.seed, "n", step) % num_steps
        noise = sample_noise(batch, recipe.seed, "ct")
        mask_seed = sample_seed(recipe.seed, "dropout", step, batch.samples[0])
        if n == 0 and self.skip_known_target:
            target = hr
        else:
            with torch.no_grad():
                torch.manual_seed(mask_seed)
                x_n = trajectory_point(hr, lq_up, noise, alphas[n], sigmas[n])
                target = self.model(x_n, sigmas[n], lq)
        torch.manual_seed(mask_seed)
        pred = self.model(trajectory_point(hr, lq_up, noise, alphas[n + 1], sigmas[n + 1]), sigmas[n + 1], lq)
        loss = recipe.loss.lpips_weight * self.lpips(pred, target).mean()
        loss = loss + recipe.loss.charbonnier_weight * charbonnier(pred, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._average()
        self.global_step += 1
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.recipe.optim.ema_decay
        now = dict(self.model.named_parameters())
        for name, averaged in self.ema.named_parameters():
            averaged.mul_(decay).add_(now[name], alpha=1 - decay)


def count_flops(network: nn.Module, *inputs: Tensor) -> int:
    """Multiplications and additions of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()
