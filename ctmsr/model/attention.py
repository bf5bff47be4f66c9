"""Window attention as used in CTMSR: one Swin block between two 1x1 projections, at every U-Net level.

Module names follow the authors' checkpoint (`swin_layer.blocks.0.attn.qkv.weight`, ...).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WindowAttentionLayer(nn.Module):
    """The published `swin_layer`: project in, one window-attention block, project out, conv, residual."""

    def __init__(self, channels: int, embed_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.patch_embed = _Projection(channels, embed_dim)
        self.patch_unembed = _Projection(embed_dim, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList([WindowBlock(embed_dim, num_heads, window_size)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same; h and w multiples of the window."""
        h = self.patch_embed(x)
        for block in self.blocks:
            h = block(h)
        return x + self.conv(self.patch_unembed(h))


class _Projection(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class WindowBlock(nn.Module):
    """Pre-norm window attention and a 1x1-convolution MLP, each with a residual."""

    def __init__(self, embed_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, embed_dim)
        self.attn = WindowAttention(embed_dim, num_heads, window_size)
        self.norm2 = nn.GroupNorm(32, embed_dim)
        self.mlp = Mlp(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, embed_dim, h, w) -> the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mlp(nn.Module):
    """1x1 convolution to four times the width, GELU, 1x1 convolution back."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(embed_dim, 4 * embed_dim, 1)
        self.fc2 = nn.Conv2d(4 * embed_dim, embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, embed_dim, h, w) -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned relative position bias (Swin, arXiv:2103.14030)."""

    relative_position_index: Tensor

    def __init__(self, embed_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        side = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(side * side, num_heads))
        self.register_buffer("relative_position_index", _relative_positions(window_size))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same."""
        n, c, h, w = x.shape
        win, heads = self.window_size, self.num_heads
        rows, columns = h // win, w // win
        # (n, c, rows, win, columns, win) -> (n·windows, tokens, c)
        tokens = x.reshape(n, c, rows, win, columns, win).permute(0, 2, 4, 3, 5, 1).reshape(-1, win * win, c)
        # (n·windows, tokens, 3, heads, c/heads) -> 3 x (n·windows, heads, tokens, c/heads)
        q, k, v = self.qkv(tokens).reshape(-1, win * win, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).unsqueeze(0))
        out = self.proj(out.transpose(1, 2).reshape(-1, win * win, c))
        # (n, rows, win, columns, win, c) -> (n, c, h, w), channels last in memory, which is faster on GPUs
        out = out.reshape(n, rows, columns, win, win, c).transpose(2, 3)
        return out.reshape(n, h, w, c).permute(0, 3, 1, 2)


def _relative_positions(window: int) -> Tensor:
    """(tokens, tokens) int64: index into the bias table for each pair of positions in a window."""
    grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    offset = grid[:, :, None] - grid[:, None, :] + window - 1  # (2, tokens, tokens), each at least 0
    return offset[0] * (2 * window - 1) + offset[1]
