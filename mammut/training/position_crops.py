"""What training does to the picture's learned position embeddings: crop them, drop them, fit them to another size.

Cropped positional embeddings (MaMMUT section 4, from RO-ViT): in pre-training the positions are taken for those of a
region of a larger picture, so that they suit the regions a detector looks at later. Independent of how the picture
itself was cropped, and another region for each sample. Dropping the positions of a sample altogether is CFM-ViT's
remedy for the same thing. Both are for training only; afterwards the whole embedding is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mammut.vision import resize_positions

SMALLEST_AREA, WIDEST_ASPECT = 0.1, 2.0
"""Regions cover a tenth of the square to all of it, and one side is at most twice the other (the paper)."""

UPSAMPLED = 64
"""The positions are first enlarged to this grid: a detector's, 1024 pixels in patches of 16 (the paper)."""

_TRIES = 10


def draw_regions(number: int, generator: torch.Generator) -> Tensor:
    """float32[number, 4]: x1, y1, x2, y2 from 0 to 1, by the rule of random-resized crops.

    Area and logarithm of the aspect are uniform; of some tries the first that fits the square is taken, and where none
    does the whole square.
    """
    shape = (number, _TRIES)
    area = torch.rand(shape, generator=generator) * (1 - SMALLEST_AREA) + SMALLEST_AREA
    aspect = torch.exp((torch.rand(shape, generator=generator) * 2 - 1) * math.log(WIDEST_ASPECT))
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    width = torch.where(found, width.gather(1, first)[:, 0], 1.0)
    height = torch.where(found, height.gather(1, first)[:, 0], 1.0)
    left, top = (torch.rand(number, generator=generator) * (1 - side) for side in (width, height))
    return torch.stack([left, top, left + width, top + height], dim=1)


def draw_kept(number: int, dropout: float, generator: torch.Generator) -> Tensor:
    """bool[number]: which samples keep their positions. dropout: probability that one does not."""
    return torch.rand(number, generator=generator) >= dropout


def training_positions(
    positions: Tensor, class_token: bool, grid: int, regions: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """The positions of a batch.

    Args:
        positions: float[class_token + g * g, W], the learned ones.
        grid: patches along a side of the pictures of this batch; may differ from g.
        regions: float[B, 4] as draw_regions gives them, or None for the whole embedding.
        kept: bool[B], or None where all are.

    Returns:
        float[class_token + grid * grid, W], or [B, class_token + grid * grid, W] where samples differ.
    """
    if regions is None:
        out = resize_positions(positions, class_token, grid)
    else:
        prefix, body = positions[: int(class_token)], positions[int(class_token) :]
        cropped = crop_positions(body, regions, grid)
        out = torch.cat([prefix.expand(len(regions), -1, -1), cropped], dim=1)
    if kept is None:
        return out
    return out * kept.to(out.dtype)[:, None, None]


def crop_positions(body: Tensor, regions: Tensor, grid: int, upsampled: int = UPSAMPLED) -> Tensor:
    """Enlarge bilinearly, cut the regions out, resample each: float[g * g, W] to float[B, grid * grid, W].

    Enlarging and cutting are linear and separable, so they are one small matrix for rows and one for columns: nothing
    of the size of the enlarged grid is made for each sample.
    """
    side = round(body.shape[0] ** 0.5)
    square = body.reshape(side, side, -1)
    enlarge = F.interpolate(torch.eye(side, device=body.device)[None], size=upsampled, mode="linear")[0].T
    columns = _sampling(regions[:, 0], regions[:, 2], grid, upsampled) @ enlarge
    rows = _sampling(regions[:, 1], regions[:, 3], grid, upsampled) @ enlarge
    by_row = torch.einsum("bik,klw->bilw", rows.to(body.dtype), square)
    return torch.einsum("bjl,bilw->bijw", columns.to(body.dtype), by_row).flatten(1, 2)


def _sampling(start: Tensor, end: Tensor, grid: int, length: int) -> Tensor:
    """float32[B, grid, length]: linear interpolation at the centres of `grid` equal parts of [start, end]."""
    centres = (torch.arange(grid, device=start.device) + 0.5) / grid
    at = (start[:, None] + (end - start)[:, None] * centres) * length - 0.5
    at = at.clamp(0, length - 1)
    return F.relu(1 - (at[:, :, None] - torch.arange(length, device=start.device)).abs())
