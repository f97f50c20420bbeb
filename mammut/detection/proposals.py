"""Where something is, whatever it is: from every place of every level one box and its centerness (OLN, FCOS).

Legend: B batch, C width, T places over all levels, P proposals. Boxes are xyxy in input pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.detection.config import DetectorConfig

LOWERED = 0.1
LARGEST = 4.0
"""A side's distance is the anchor's half side times at most e to this power."""


class ProposalHead(nn.Module):
    """Shared by all levels: two convolutions, then centerness and the distances to the box's four sides."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width = config.width
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.centerness = nn.Conv2d(width, 1, 1)
        self.distances = nn.Conv2d(width, 4, 1)
        self.levels = nn.Parameter(torch.zeros(len(config.strides), 4))
        for layer in (self.centerness, self.distances):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.centerness.bias, -3.0)  # type: ignore[arg-type]

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [B, C, H, H] to centerness logits float[B, T] and raw distances float[B, T, 4]."""
        logits, distances = [], []
        for number, x in enumerate(levels):
            for convolution in self.convolutions:
                x = F.gelu(convolution(x))
            logits.append(self.centerness(x).flatten(1))
            distances.append(self.distances(x).flatten(2).transpose(1, 2) + self.levels[number])
        return torch.cat(logits, dim=1).float(), torch.cat(distances, dim=1).float()  # also under autocast


def place_centers(config: DetectorConfig) -> Tensor:
    """float32[T, 2]: x and y of each place, level by level, row by row."""
    rows = []
    for stride in config.strides:
        along = (torch.arange(config.image_size // stride) + 0.5) * stride
        y, x = torch.meshgrid(along, along, indexing="ij")
        rows.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(rows)


def place_sides(config: DetectorConfig) -> Tensor:
    """float32[T]: the side of each place's anchor, pixels."""
    sides = [torch.full(((config.image_size // s) ** 2,), s * config.anchor_scale) for s in config.strides]
    return torch.cat(sides)


def decode(distances: Tensor, centers: Tensor, sides: Tensor, size: int) -> Tensor:
    """Raw distances [..., T, 4] (left, top, right, bottom) to boxes inside the input; zeros give the anchor itself."""
    out = torch.exp(distances.clamp(-LARGEST, LARGEST)) * (sides[:, None] / 2)
    boxes = torch.cat([centers - out[..., :2], centers + out[..., 2:]], dim=-1)
    return boxes.clamp(0, size)


def peaks(centerness: Tensor, config: DetectorConfig) -> Tensor:
    """float[B, T], lowered to a tenth where one of the eight places around has more: the best are then about one a
    thing and level.

    In the place of NMS before the best are taken, which has no fixed size. Not 0, so that there is an order among them.
    """
    kept, start = [], 0
    for stride in config.strides:
        side = config.image_size // stride
        level = centerness[:, start : start + side * side].reshape(-1, 1, side, side)
        highest = F.max_pool2d(level, 3, stride=1, padding=1)
        kept.append(torch.where(level >= highest, level, level * LOWERED).flatten(1))
        start += side * side
    return torch.cat(kept, dim=1)


def best(centerness: Tensor, boxes: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` places of highest centerness: their centerness [B, P] and boxes [B, P, 4]."""
    values, index = torch.topk(centerness, number, dim=1)
    return values, boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
