"""Pre-LN transformer blocks shared by the encoder and the decoder, with an explicit key/value cache.

Shape legend: B batch, L length, N memory tokens, W width, H heads, D head width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "quick_gelu"]
KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each [..., H, L, D]."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., L, W] to [..., H, L, D]: heads are contiguous blocks of channels."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """[..., H, L, D] to [..., L, W]."""
    return x.transpose(-2, -3).flatten(-2)


PLAIN_LENGTH = 256
"""Keys up to which training on a CPU uses the formula. PyTorch's fused kernel has a slow backward there, slowest for
short sequences in bfloat16 (benchmarks/bench_train.py --only attention); beyond, the formula's memory counts: it keeps
the scores."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, plain: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v over [..., H, L, D].

    PyTorch's own kernel takes one batch dimension. An exporter gets the formula instead: what it makes of the kernel is
    three times as many nodes (it guards rows that are masked as a whole, which we have none of).

    plain: the formula also where there are at most PLAIN_LENGTH keys.
    """
    if torch.compiler.is_exporting() or (plain and k.shape[-2] <= PLAIN_LENGTH):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v
    out = F.scaled_dot_product_attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), attn_mask=mask)
    return out.reshape(q.shape)


class Mlp(nn.Module):
    """W to mlp_width to W."""

    def __init__(self, width: int, mlp_width: int, activation: Activation) -> None:
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)
        out: Tensor = self.down(x)
        return out


class SelfBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)) unless the block owns no MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: Activation, has_mlp: bool = True) -> None:
        super().__init__()
        self.heads, self.plain_attention = heads, False
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width) if has_mlp else None
        self.mlp = Mlp(width, mlp_width, activation) if has_mlp else None

    def forward(self, x_BLW: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: float, added to the scores, broadcastable to [B, H, L, L]."""
        return self.cached(x_BLW, None, mask)[0]

    def cached(self, x_BLW: Tensor, past: KeysValues | None, mask: Tensor | None) -> tuple[Tensor, KeysValues]:
        """The same over [past, x]; returns the block's output for x and the keys and values of past and x together."""
        q, k, v = split_heads(self.qkv(self.norm_1(x_BLW)), 3 * self.heads).chunk(3, dim=-3)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        x_BLW = x_BLW + self.out(merge_heads(attention(q, k, v, mask, self.plain_attention)))
        if self.mlp is not None and self.norm_2 is not None:
            x_BLW = x_BLW + self.mlp(self.norm_2(x_BLW))
        return x_BLW, (k, v)


class CrossBlock(nn.Module):
    """x += attention(norm(x), memory); x += mlp(norm(x)). The memory's keys and values are made once per picture."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: Activation, memory_norm: bool) -> None:
        super().__init__()
        self.heads, self.plain_attention = heads, False
        self.norm_1 = nn.LayerNorm(width)
        self.norm_memory = nn.LayerNorm(width) if memory_norm else None
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_width, activation)

    def keys_values(self, memory_BNW: Tensor) -> KeysValues:
        """Keys and values of the image memory, each [B, H, N, D]."""
        if self.norm_memory is not None:
            memory_BNW = self.norm_memory(memory_BNW)
        k, v = self.key_value(memory_BNW).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x_BLW: Tensor, memory: KeysValues) -> Tensor:
        """There is no mask, so sequences of one picture may stand one after another along L."""
        q = split_heads(self.query(self.norm_1(x_BLW)), self.heads)
        x_BLW = x_BLW + self.out(merge_heads(attention(q, *memory, plain=self.plain_attention)))
        out: Tensor = x_BLW + self.mlp(self.norm_2(x_BLW))
        return out
