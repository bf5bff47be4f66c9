"""The conditioned U-Net F(x, c_noise, y) of CTMSR and the consistency function f around it.

Module names follow the authors' checkpoint (`model.enc.64x64_block0.conv0.weight`, ...), so that the
published weights load entry by entry. The blocks are DDPM++ (EDM) residual blocks with window attention.
"""

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import check
from .attention import WindowAttentionLayer
from .trajectory import expand, preconditioning

SQRT_HALF = math.sqrt(0.5)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes of the network. Defaults are the published 171.5 M parameters."""

    scale: Literal[2, 3, 4] = 4
    """HR/LQ ratio."""
    lq_size: int = 64
    """Side of the LQ crop in training, in pixels; it also names the levels of the U-Net."""
    model_channels: int = 192
    """Channels of the first level; a multiple of 16."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level as a multiple of model_channels; each level halves the side."""
    num_blocks: int = 4
    """Residual blocks per level of the encoder; the decoder has one more."""
    embed_dim: int = 192
    """Width of the window attention; a multiple of 32."""
    num_heads: int = 6
    """Heads of the window attention; must divide embed_dim."""
    window_size: int = 8
    """Side of an attention window, in pixels of the level."""
    dropout: float = 0.13
    """Dropout probability in residual blocks."""

    def __post_init__(self) -> None:
        for name in ("lq_size", "model_channels", "num_blocks", "embed_dim", "num_heads", "window_size"):
            check(getattr(self, name) >= 1, f"network.{name} must be at least 1, got {getattr(self, name)}.")
        check(
            bool(self.channel_mult) and min(self.channel_mult) >= 1,
            f"network.channel_mult must be whole numbers of at least 1, got {self.channel_mult}.",
        )
        check(
            self.model_channels % 16 == 0,
            f"network.model_channels must be a multiple of 16 (norm groups), got {self.model_channels}.",
        )
        check(
            self.embed_dim % 32 == 0,
            f"network.embed_dim must be a multiple of 32 (its norms have 32 groups), got {self.embed_dim}.",
        )
        check(
            self.embed_dim % self.num_heads == 0,
            f"network.num_heads must divide embed_dim ({self.embed_dim}), got {self.num_heads}.",
        )
        check(0 <= self.dropout < 1, f"network.dropout must be in [0, 1), got {self.dropout}.")
        check(
            self.lq_size % self.multiple == 0,
            f"network.lq_size must be a multiple of {self.multiple} (window_size x 2^(levels - 1)), "
            f"got {self.lq_size}. Change lq_size, window_size or the number of levels.",
        )

    @property
    def multiple(self) -> int:
        """LQ sides must be a multiple of this: whole windows at the lowest level."""
        return self.window_size * 2 ** (len(self.channel_mult) - 1)

    @property
    def hr_size(self) -> int:
        """Side of the HR crop in training, in pixels."""
        return self.lq_size * self.scale


class ConsistencyModel(nn.Module):
    """f(x, sigma, y) = c_skip(sigma) x + c_out(sigma) F(x, c_noise(sigma), y), arXiv:2503.20349."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.model = UNet(config)

    def forward(self, x: Tensor, sigma: Tensor, lq: Tensor) -> Tensor:
        """One network call from a point of the trajectory to the HR image.

        Args:
            x: Trajectory points, float (N, 3, scale·h, scale·w).
            sigma: Their noise levels, a scalar or (N,), at least 0.
            lq: LR images in [-1, 1], (N, 3, h, w); h and w multiples of `config.multiple`.

        Returns:
            float32 images of x's shape. At sigma = 0 exactly x.
        """
        c_skip, c_out, c_noise = preconditioning(sigma.to(x.device, torch.float32).reshape(-1).expand(len(x)))
        raw = self.model(x, c_noise, lq)
        return expand(c_skip, x) * x.float() + expand(c_out, x) * raw.float()


@lru_cache(maxsize=4)
def described(config: NetworkConfig) -> ConsistencyModel:
    """The network without memory for its weights: their names and shapes. Shared, so do not change it."""
    with torch.device("meta"):
        return ConsistencyModel(config)


def bf16_copy(model: ConsistencyModel) -> ConsistencyModel:
    """A copy whose parameters are bfloat16 and which computes F in bfloat16, without casts.

    Norms compute their statistics in float32. Inputs and outputs are float32, like the model's.
    """
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        parameter.data = parameter.data.bfloat16()
    return result


class UNet(nn.Module):
    """F: a U-Net at LR resolution; x enters by pixel-unshuffle, and nearest upsampling restores its size."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        c = config
        width = c.model_channels
        emb_channels = 4 * width
        self.scale = c.scale
        self.recompute = False
        """Whether the backward pass recomputes blocks instead of keeping their activations."""
        self.map_layer0 = nn.Linear(width, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.up_factors = {2: (2,), 3: (3,), 4: (2, 2)}[c.scale]
        for i in range(len(self.up_factors)):
            self.add_module(f"conv_up{i + 1}", nn.Conv2d(width, width, 3, padding=1))
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)
        self.enc, skips = self._encoder(c, emb_channels)
        self.dec = self._decoder(c, emb_channels, skips)
        self.apply(_init_xavier)
        for module in [*self.modules()]:
            if isinstance(module, ResidualBlock):
                _shrink(module.conv1)
        _shrink(self.dec[f"{c.lq_size}x{c.lq_size}_aux_conv"])

    @staticmethod
    def _encoder(c: NetworkConfig, emb_channels: int) -> tuple[nn.ModuleDict, list[int]]:
        layers = nn.ModuleDict()
        channels = c.model_channels
        skips = [channels]
        for level, mult in enumerate(c.channel_mult):
            name = _level_name(c, level)
            if level == 0:
                layers[f"{name}_conv"] = nn.Conv2d(3 * c.scale**2 + 3, channels, 3, padding=1)
            else:
                layers[f"{name}_down"] = ResidualBlock(c, channels, channels, emb_channels, resample="down")
                skips.append(channels)
            for i in range(c.num_blocks):
                width = c.model_channels * mult
                layers[f"{name}_block{i}"] = ResidualBlock(c, channels, width, emb_channels, attention=True)
                channels = width
                skips.append(channels)
        return layers, skips

    @staticmethod
    def _decoder(c: NetworkConfig, emb_channels: int, skips: list[int]) -> nn.ModuleDict:
        layers = nn.ModuleDict()
        channels = skips[-1]
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            name = _level_name(c, level)
            if level == len(c.channel_mult) - 1:
                layers[f"{name}_in0"] = ResidualBlock(c, channels, channels, emb_channels, attention=True)
                layers[f"{name}_in1"] = ResidualBlock(c, channels, channels, emb_channels)
            else:
                layers[f"{name}_up"] = ResidualBlock(c, channels, channels, emb_channels, resample="up")
            for i in range(c.num_blocks + 1):
                width = c.model_channels * mult
                layers[f"{name}_block{i}"] = ResidualBlock(
                    c, channels + skips.pop(), width, emb_channels, attention=i == c.num_blocks
                )
                channels = width
        layers[f"{name}_aux_norm"] = _group_norm(channels)
        layers[f"{name}_aux_conv"] = nn.Conv2d(channels, channels, 3, padding=1)
        return layers

    def forward(self, x: Tensor, c_noise: Tensor, lq: Tensor) -> Tensor:
        """(N, 3, scale·h, scale·w), (N,), (N, 3, h, w) -> (N, 3, scale·h, scale·w), in the weights' type."""
        dtype = self.conv_last.weight.dtype
        emb = _sinusoidal(c_noise, self.map_layer0.in_features).to(dtype)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        h = torch.cat([F.pixel_unshuffle(x, self.scale), lq], dim=1).to(dtype)
        skips = []
        for layer in self.enc.values():
            h = self._block(layer, h, emb) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for name, layer in self.dec.items():
            if not isinstance(layer, ResidualBlock):
                h = layer(F.silu(h)) if name.endswith("_conv") else layer(h)
                continue
            if "_block" in name:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._block(layer, h, emb)
        for i, factor in enumerate(self.up_factors):
            h = F.interpolate(h, scale_factor=factor, mode="nearest")
            h = F.leaky_relu(self.get_submodule(f"conv_up{i + 1}")(h), 0.2)
        return self.conv_last(h)

    def _block(self, block: "ResidualBlock", h: Tensor, emb: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)


class ResidualBlock(nn.Module):
    """DDPM++ block: twice [norm, SiLU, conv] with the embedding between; + skip, x sqrt(1/2), attention."""

    def __init__(
        self,
        c: NetworkConfig,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.norm0 = _group_norm(in_channels)
        self.conv0 = ResampledConv(in_channels, out_channels, 3, resample)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = _group_norm(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            ResampledConv(in_channels, out_channels, 1, resample)
            if resample or in_channels != out_channels
            else nn.Identity()
        )
        self.swin_layer = (
            WindowAttentionLayer(out_channels, c.embed_dim, c.num_heads, c.window_size) if attention else None
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, in, h, w), (N, emb) -> (N, out, h', w'); h' is h/2, h or 2h by `resample`."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = h + self.affine(emb)[:, :, None, None].to(h.dtype)
        h = F.dropout(F.silu(self.norm1(h)), self.dropout, self.training)
        x = (self.conv1(h) + self.skip(x)) * SQRT_HALF
        return self.swin_layer(x) * SQRT_HALF if self.swin_layer else x


class ResampledConv(nn.Conv2d):
    """A convolution after optional 2x resampling: up by nearest, down by the mean of 2x2."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, resample: Literal["up", "down"] | None
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.resample = resample
        if resample:  # part of the published layout; `forward` pools instead
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> (N, out, h', w')."""
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.resample == "down":
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


def _group_norm(channels: int) -> nn.GroupNorm:
    """The published min(32, C/4) groups or, if they do not divide C, the most that divide both."""
    return nn.GroupNorm(math.gcd(min(32, channels // 4), channels), channels, eps=1e-6)


def _level_name(c: NetworkConfig, level: int) -> str:
    side = c.lq_size >> level
    return f"{side}x{side}"


def _sinusoidal(values: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): [sin, cos] of `values` at frequencies 1 ... 1/10000, the end point included."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / (half - 1)
    angles = values.outer((1 / 10_000) ** exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _init_xavier(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _shrink(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.mul_(1e-5)
