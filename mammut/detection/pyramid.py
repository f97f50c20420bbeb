"""The simple feature pyramid (ViTDet): every level from the encoder's one map, and edges from a small stem.

Legend: B batch, W trunk width, C pyramid width, H = side of a map.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.detection.config import DetectorConfig


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of float[B, C, H, H]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Stem(nn.Module):
    """Convolutions over the pixels, each halving the side: maps of stride 2, 4, ... up to `last`."""

    def __init__(self, width: int, last: int) -> None:
        super().__init__()
        widths = [3, *(max(8, width * 2**k // last) for k in range(1, int(math.log2(last)) + 1))]
        pairs = itertools.pairwise(widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(ChannelNorm(b) for b in widths[1:])
        self.widths = {2**k: widths[k] for k in range(1, len(widths))}

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        found, x = {}, pixels
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.gelu(norm(convolution(x)))
            found[2 ** (index + 1)] = x
        return found


class Pyramid(nn.Module):
    """From the trunk's maps (all of the patch's stride) to one map a level, all of one width."""

    def __init__(self, config: DetectorConfig, trunk_width: int, patch_size: int) -> None:
        super().__init__()
        width, self.strides, self.patch = config.width, config.strides, patch_size
        self.grid = config.image_size // patch_size
        self.norm = nn.LayerNorm(trunk_width * len(config.taps))
        self.project = nn.Linear(trunk_width * len(config.taps), width)
        finer = max(0, int(math.log2(patch_size / min(config.strides))))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(finer))
        self.enlarge_norms = nn.ModuleList(ChannelNorm(width) for _ in range(finer))
        self.stem = Stem(config.stem_width, 2 * min(config.strides)) if config.stem_width else None
        stem_widths = {} if self.stem is None else self.stem.widths
        self.lateral = nn.ModuleDict(
            {str(s): nn.Conv2d(stem_widths[s], width, 1) for s in config.strides if s in stem_widths}
        )
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in config.strides)
        self.mix_norms = nn.ModuleList(ChannelNorm(width) for _ in config.strides)

    def forward(self, taps: list[Tensor], pixels: Tensor) -> list[Tensor]:
        """taps: each float[B, grid * grid, W]. Returns float[B, C, D / stride, D / stride] for every stride."""
        x = self.project(self.norm(torch.cat(taps, dim=-1)))
        maps = {self.patch: x.transpose(1, 2).unflatten(2, (self.grid, self.grid))}
        stride = self.patch
        for enlarge, norm in zip(self.enlarge, self.enlarge_norms, strict=True):
            maps[stride // 2] = F.gelu(norm(enlarge(maps[stride])))
            stride //= 2
        stride = self.patch
        while stride < max(self.strides):
            maps[stride * 2] = F.max_pool2d(maps[stride], 2)
            stride *= 2
        edges = {} if self.stem is None else self.stem(pixels)
        levels = []
        for stride, mix, norm in zip(self.strides, self.mix, self.mix_norms, strict=True):
            level = maps[stride]
            if str(stride) in self.lateral:
                level = level + self.lateral[str(stride)](edges[stride])
            levels.append(F.gelu(norm(mix(level))))
        return levels
