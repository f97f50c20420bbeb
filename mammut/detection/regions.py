"""RoIAlign in gather form: one lookup for all levels, of standard operators that every engine has.

As He et al. define it with half-pixel centres (aligned): a region is cut into cells, and a cell is the mean of
`samples` x `samples` bilinear samples at fixed places. Beyond the map's edge lie its outermost values, except more than
one pixel outside, where lies zero. ONNX's RoiAlign is not used: engines lack it in one opset or another.

Legend: B batch, T places over all levels, C channels, P regions, R cells along a side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def region_levels(boxes: Tensor, strides: tuple[int, ...], anchor_scale: float) -> Tensor:
    """int64[B, P]: the level whose anchor has the nearest side, by ratio."""
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    level = torch.zeros_like(area)
    for fine, coarse in itertools.pairwise(strides):
        level = level + (area > anchor_scale**2 * fine * coarse).to(area.dtype)
    return level.to(torch.int64)


def align(
    maps: Tensor, boxes: Tensor, levels: Tensor, strides: tuple[int, ...], size: int, cells: int, samples: int
) -> Tensor:
    """RoIAlign of each box on its own level.

    Args:
        maps: float[B, T, C], all levels one after another, each row by row.
        boxes: float[B, P, 4] xyxy in input pixels.
        levels: int64[B, P], indices into strides.
        strides: pixels between places, a level each.
        size: side of the input, pixels.
        cells: R.
        samples: along a side of a cell.

    Returns:
        float[B, P, R * R, C], cells row by row.
    """
    sides = [size // stride for stride in strides]
    starts = [sum(side * side for side in sides[:k]) for k in range(len(sides))]
    scale = _pick([1 / stride for stride in strides], levels, boxes.dtype)
    side, start = _pick(sides, levels, torch.int64), _pick(starts, levels, torch.int64)
    steps = (torch.arange(cells * samples, dtype=boxes.dtype, device=boxes.device) + 0.5) / (cells * samples)

    scaled = boxes * scale[..., None] - 0.5
    y_low, y_high, y_low_share = _corners(scaled[..., 1], scaled[..., 3], steps, side)
    x_low, x_high, x_low_share = _corners(scaled[..., 0], scaled[..., 2], steps, side)
    found: Tensor | None = None
    first = start + torch.arange(maps.shape[0], device=maps.device)[:, None] * maps.shape[1]
    flat = maps.flatten(0, 1)
    for y, y_share in ((y_low, y_low_share[0]), (y_high, y_low_share[1])):
        for x, x_share in ((x_low, x_low_share[0]), (x_high, x_low_share[1])):
            index = first[..., None, None] + y[..., :, None] * side[..., None, None] + x[..., None, :]
            share = (y_share[..., :, None] * x_share[..., None, :]).to(maps.dtype)
            corner = flat.index_select(0, index.flatten()) * share.flatten()[:, None]
            found = corner if found is None else found + corner
    assert found is not None
    shape = (*boxes.shape[:2], cells, samples, cells, samples, maps.shape[2])
    return found.reshape(shape).mean(dim=(3, 5)).flatten(2, 3)


def _pick(values: Sequence[float], levels: Tensor, dtype: torch.dtype) -> Tensor:
    """The value of each level, [B, P]; a plain lookup to an exporter."""
    table = torch.tensor(values, dtype=dtype, device=levels.device)
    return table.index_select(0, levels.flatten()).reshape(levels.shape)


def _corners(low: Tensor, high: Tensor, steps: Tensor, side: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Along one axis: the two map rows each sample lies between, int64[B, P, S], and their shares."""
    at = low[..., None] + (high - low)[..., None] * steps
    limit = side[..., None]
    inside = ((at >= -1.0) & (at <= limit.to(at.dtype))).to(at.dtype)
    at = at.clamp(min=0.0)
    floor = torch.minimum(at.to(torch.int64), limit - 1)
    above = torch.minimum(floor + 1, limit - 1)
    share = torch.where(floor >= limit - 1, torch.zeros_like(at), at - floor.to(at.dtype))
    return floor, above, (inside * (1 - share), inside * share)
