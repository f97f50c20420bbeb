"""Augmentation of whole batches in torch: a few milliseconds a batch, in the loading processes.

Photographs are cropped, tilted, mirrored and recoloured. Drawings with transparency are scaled and placed on a new
background each time: a plain colour, a gradient, or a piece of a photograph, so that the background says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from mammut_runtime.strict import Between


@dataclass(frozen=True)
class AugmentOptions:
    """How far training pictures may stray from the originals."""

    min_area: Annotated[float, Between(0.01, 1)] = 0.3
    """Smallest crop, as a share of the picture's area."""
    tilt: Annotated[float, Between(0, 1)] = 0.12
    """Standard deviation of the rotation, radians."""
    colour: Annotated[float, Between(0, 1)] = 0.4
    """Brightness, contrast and saturation are multiplied by 1 - colour to 1 + colour."""
    erase: Annotated[float, Between(0, 1)] = 0.25
    """Probability that a rectangle of a photograph is blanked."""


class Augmenter:
    """Draws from one generator only, so that a run can be repeated and resumed exactly."""

    def __init__(self, options: AugmentOptions, mirror: bool, generator: torch.Generator) -> None:
        """mirror: half of the photographs. Not for pictures of writing, or texts that say left and right."""
        self.options, self.mirror, self.generator = options, mirror, generator

    def photos(self, pictures: Tensor, size: int) -> Tensor:
        """uint8[N, 3, S, S] to float32[N, 3, size, size] from 0 to 1: crop, mirror, tilt, recolour, blank."""
        n, o = len(pictures), self.options
        area, ratio = self._uniform(n, o.min_area, 1.0), torch.exp(self._uniform(n, math.log(0.75), math.log(4 / 3)))
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        x, y = self._uniform(n, -1, 1) * (1 - width), self._uniform(n, -1, 1) * (1 - height)
        mirror = (self._uniform(n, 0, 1) < (0.5 if self.mirror else 2.0)).float() * 2 - 1
        out = self._warp(pictures.float() / 255, (width, height), (x, y), mirror, "reflection", size)
        out = self._recolour(out, o.colour)
        return self._erase(out, o.erase)

    def clips(self, frames: Tensor, size: int) -> Tensor:
        """uint8[N, F, 3, S, S] to float32[N, F, 3, size, size] from 0 to 1: crop and recolour, all frames of a clip
        alike. Neither mirrored nor tilted: texts may say which way something moves."""
        n, count = frames.shape[:2]
        area = self._uniform(n, self.options.min_area, 1.0).sqrt()
        x, y = self._uniform(n, -1, 1) * (1 - area), self._uniform(n, -1, 1) * (1 - area)
        out = self._warp(
            frames.flatten(1, 2).float() / 255, (area, area), (x, y), torch.ones(n), "reflection", size, tilt=0.0
        )
        out = self._recolour(out.reshape(n * count, 3, size, size), self.options.colour, count)
        return out.reshape(n, count, 3, size, size)

    def plain(self, pictures: Tensor, size: int) -> Tensor:
        """uint8[N, 3, S, S] to float32[N, 3, size, size] from 0 to 1: small shifts and brightness only."""
        n = len(pictures)
        zoom = self._uniform(n, 0.85, 1.1)
        x, y = self._uniform(n, -0.1, 0.1), self._uniform(n, -0.1, 0.1)
        out = self._warp(pictures.float() / 255, (zoom, zoom), (x, y), torch.ones(n), "border", size, tilt=0.03)
        return (out * self._uniform(n, 0.9, 1.1).view(n, 1, 1, 1)).clamp(0, 1)

    def drawings(self, pictures: Tensor, photos: Tensor | None, size: int) -> Tensor:
        """uint8[N, 4, S, S] RGBA to float32[N, 3, size, size] from 0 to 1, each on a background.

        photos: uint8[M, 3, S, S] to take backgrounds from, or None.
        """
        n = len(pictures)
        zoom = self._uniform(n, 0.85, 1.6)
        stretch = torch.exp(self._uniform(n, -0.12, 0.12))
        x, y = self._uniform(n, -0.35, 0.35), self._uniform(n, -0.35, 0.35)
        rgba = pictures.float() / 255
        rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)  # premultiplied: edges do not bleed
        warped = self._warp(rgba, (zoom * stretch, zoom / stretch), (x, y), torch.ones(n), "zeros", size)
        alpha = warped[:, 3:].clamp(0, 1)
        ink = self._recolour(warped[:, :3] / alpha.clamp(min=1e-3), self.options.colour / 2)
        return ink * alpha + self._backgrounds(n, photos, size) * (1 - alpha)

    def _backgrounds(self, n: int, photos: Tensor | None, size: int) -> Tensor:
        """float32[N, 3, size, size]: white (a third), plain colours, gradients, and pieces of photographs."""
        corners = torch.rand(n, 3, 2, 2, generator=self.generator)
        kind = torch.rand(n, generator=self.generator)
        corners[kind < 0.6] = corners[kind < 0.6][:, :, :1, :1].expand(-1, -1, 2, 2)
        corners[kind < 0.35] = 1.0
        out = F.interpolate(corners, size=(size, size), mode="bilinear", align_corners=True)
        scenes = torch.nonzero(kind > 0.75)[:, 0]
        if photos is not None and len(scenes):
            pick = torch.randint(len(photos), (len(scenes),), generator=self.generator)
            half = self._uniform(len(scenes), 0.3, 0.9)
            shift = (1 - half) * self._uniform(len(scenes), -1, 1)
            pieces = photos[pick].float() / 255
            out[scenes] = self._warp(pieces, (half, half), (shift, -shift), torch.ones(len(scenes)), "reflection", size)
        return out

    def _warp(
        self,
        pictures: Tensor,
        extent: tuple[Tensor, Tensor],
        centre: tuple[Tensor, Tensor],
        mirror: Tensor,
        padding: str,
        size: int,
        tilt: float | None = None,
    ) -> Tensor:
        """Resample a tilted rectangle: extent and centre as shares of the half width and height, x before y."""
        n = len(pictures)
        angle = torch.randn(n, generator=self.generator) * (self.options.tilt if tilt is None else tilt)
        cos, sin, (width, height), (x, y) = angle.cos(), angle.sin(), extent, centre
        across = torch.stack([width * mirror * cos, -width * sin, x], 1)
        down = torch.stack([height * mirror * sin, height * cos, y], 1)
        grid = F.affine_grid(torch.stack([across, down], 1), [n, 1, size, size], align_corners=False)
        return F.grid_sample(pictures, grid, mode="bilinear", padding_mode=padding, align_corners=False)

    def _recolour(self, pictures: Tensor, strength: float, alike: int = 1) -> Tensor:
        """alike: so many pictures in a row are changed in the same way."""
        n = len(pictures) // alike
        factor = [self._uniform(n, 1 - strength, 1 + strength).view(n, 1, 1, 1) for _ in range(3)]
        tint = 1 + (torch.rand(n, 3, 1, 1, generator=self.generator) - 0.5) * strength / 2
        factor, tint = [each.repeat_interleave(alike, 0) for each in factor], tint.repeat_interleave(alike, 0)
        out = pictures * factor[0] * tint
        grey = out.mean(dim=1, keepdim=True)
        out = grey + (out - grey) * factor[1]
        level = out.mean(dim=(1, 2, 3), keepdim=True)
        return (level + (out - level) * factor[2]).clamp(0, 1)

    def _erase(self, pictures: Tensor, probability: float) -> Tensor:
        n, size = len(pictures), pictures.shape[-1]
        side = self._uniform(n, 0.15, 0.45) * size
        left, top = (torch.rand(n, generator=self.generator) * (size - side) for _ in range(2))
        at = torch.arange(size)
        across = (at >= left[:, None]) & (at < (left + side)[:, None])
        down = (at >= top[:, None]) & (at < (top + side)[:, None])
        chosen = torch.rand(n, generator=self.generator) < probability
        blank = (down[:, :, None] & across[:, None, :] & chosen[:, None, None])[:, None]
        colour = torch.rand(n, 3, 1, 1, generator=self.generator)
        return torch.where(blank, colour, pictures)

    def _uniform(self, n: int, low: float, high: float) -> Tensor:
        return torch.rand(n, generator=self.generator) * (high - low) + low
