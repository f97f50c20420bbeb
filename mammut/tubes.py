"""A clip's tokens: sparse tubes and the patches of a few frames, for the picture's own encoder (TubeViT; MaMMUT, 4).

A tube is a box of pixels over several frames that one matrix takes to one token. Here that matrix is a 2-D convolution
whose channels are the tube's frames: it needs nothing but slices, reshapes and Conv, which every engine has.

Two kinds of positions: the picture's learned ones (a patch has its own, a tube what they are at its centre), and fixed
sines of the tube's centre in time and space, through a gate that is 0 before training. So a clip's patches enter the
first block exactly as a picture's do, until training opens the gate.

Legend: B clips, F frames, S picture size, N tokens, W width, G patches along a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.config import TubeConfig, VideoConfig, VisionConfig

TAU = 10_000.0
"""Ratio of the longest to the shortest wavelength of the fixed positions."""


class Tubes(nn.Module):
    """What video adds to the picture encoder.

    Args:
        video: the tubes.
        vision: the encoder that takes their tokens.
    """

    interpolation: Tensor
    """float32[N, G * G]: each token's share of the learned positions of the patches."""
    fixed_positions: Tensor
    """float32[N, W]."""

    def __init__(self, video: VideoConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.video, self.vision = video, vision
        self.projections = nn.ModuleList(
            _projection(tube, vision) for tube in video.tubes if not tube.is_patches(vision.patch_size)
        )
        self.gate = nn.Parameter(torch.zeros(()))
        """alpha: the fixed positions are added times tanh(alpha)."""
        # Made from the config, so not stored. On the CPU also where a model is made without memory, to be filled.
        shares, fixed = position_tables(video, vision)
        self.register_buffer("interpolation", torch.tensor(shares, device="cpu"), persistent=False)
        self.register_buffer("fixed_positions", torch.tensor(fixed, device="cpu"), persistent=False)

    def forward(self, frames: Tensor, patch_embedding: nn.Conv2d) -> Tensor:
        """The tokens without positions and class token.

        Args:
            frames: float32[B, F, 3, S, S], normalised as pictures are.
            patch_embedding: the encoder's.

        Returns:
            float32[B, N, W], tube by tube, each by frames, rows, columns.
        """
        return torch.cat([_cut(frames, *each) for each in self._with_projections(patch_embedding)], dim=1)

    def positions(self, learned: Tensor) -> Tensor:
        """What is added to the tokens.

        Args:
            learned: float32[class_token + G * G, W], the encoder's learned positions, at this config's picture size.

        Returns:
            float32[N, W].
        """
        body, parts, start = learned[int(self.vision.class_token) :], [], 0
        for tube in self.video.tubes:
            frames, rows, columns = tube.counts(self.video.frames, self.vision.image_size)
            # A patch's own position is taken as it is: the product with a matrix of ones and zeros may round.
            patches = tube.is_patches(self.vision.patch_size)
            once = body if patches else self.interpolation[start : start + rows * columns] @ body
            parts.append(once.repeat(frames, 1))
            start += frames * rows * columns
        return torch.cat(parts) + torch.tanh(self.gate) * self.fixed_positions

    @torch.no_grad()
    def inflate(self, patch_embedding: nn.Conv2d) -> None:
        """Begin from the patches: a tube of a still clip gives the token of the patch in its place.

        Exactly so where the tube is as large as a patch. Another tube gives the token of what it sees, enlarged or
        made smaller to a patch's size. With space_to_depth each neighbour has but a share of the channels, and all
        share one matrix: it gets every so manieth row, and the token is no patch's.
        """
        for tube, projection in self._with_projections(patch_embedding):
            if projection is patch_embedding:
                continue
            every = math.prod(tube.space_to_depth)
            kernel = resized_kernel(patch_embedding.weight[::every], (tube.kernel[1], tube.kernel[2]))
            projection.weight.copy_(kernel.repeat(1, tube.kernel[0], 1, 1) / tube.kernel[0])
            if patch_embedding.bias is not None and projection.bias is not None:
                projection.bias.copy_(patch_embedding.bias[::every])
        self.gate.zero_()

    def _with_projections(self, patch_embedding: nn.Conv2d) -> list[tuple[TubeConfig, nn.Conv2d]]:
        """Each kind of tube with what embeds it: a matrix of its own, or the encoder's."""
        own = iter(self.projections)
        patches = [tube.is_patches(self.vision.patch_size) for tube in self.video.tubes]
        found = (patch_embedding if is_patches else next(own) for is_patches in patches)
        return list(zip(self.video.tubes, cast("Iterator[nn.Conv2d]", found), strict=True))


def resized_kernel(kernel: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """A patch's kernel for patches of another size: it gives for such a patch what the old one gives for the patch
    after it was resized (bilinear; antialiased where that makes it smaller).

    Args:
        kernel: float[W, 3, p, p].
        size_hw: rows and columns of the new kernel.

    Returns:
        float[W, 3, *size_hw].
    """
    patch = (kernel.shape[2], kernel.shape[3])
    if patch == size_hw:
        return kernel
    inputs = size_hw[0] * size_hw[1]
    single = torch.eye(inputs).reshape(inputs, 1, *size_hw)
    resized = F.interpolate(single, size=patch, mode="bilinear", align_corners=False, antialias=True)
    matrix = resized.reshape(inputs, -1).to(kernel)
    return (kernel.flatten(2) @ matrix.T).reshape(*kernel.shape[:2], *size_hw)


def centres(tube: TubeConfig, frames: int, image_size: int) -> np.ndarray:
    """The middle of each token's span: float64[N, 3], frame, row, column, from the clip's and picture's first edge
    (the middle of frame 0 is 0.5)."""
    axes = zip(tube.counts(frames, image_size), tube.stride, tube.offset, tube.span, strict=True)
    grid = np.meshgrid(*(o + np.arange(n) * s + span / 2 for n, s, o, span in axes), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, 3)


def fixed_positions(middles: np.ndarray, width: int) -> np.ndarray:
    """TubeViT's sines: float32[N, width] for centres float64[N, 3] (frame, row, column).

    Channels 6 j to 6 j + 5 are sin and cos of time, column and row, each times TAU ** (-j / (width // 6)); what is left
    of the width is 0. The paper prints 1 / TAU ** j, which no number format could hold.
    """
    count = width // 6
    angles = middles[:, None, [0, 2, 1]] * (TAU ** (-np.arange(count) / max(count, 1)))[None, :, None]
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(middles), 6 * count)
    return np.pad(waves, ((0, 0), (0, width - 6 * count))).astype(np.float32)


def position_tables(video: VideoConfig, vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of all tokens: float32[N, G * G], what share of each patch's learned position they have (bilinear between the
    patches' middles; beyond the outermost middle it stays), and float32[N, W], their fixed positions."""
    found = np.concatenate([centres(tube, video.frames, vision.image_size) for tube in video.tubes])
    rows, columns = (_shares(found[:, axis] / vision.patch_size - 0.5, vision.grid) for axis in (1, 2))
    shares = (rows[:, :, None] * columns[:, None, :]).reshape(len(found), -1)
    return shares.astype(np.float32), fixed_positions(found, vision.width)


def _shares(places: np.ndarray, count: int) -> np.ndarray:
    """float64[N, count]: linear interpolation between whole numbers."""
    inside = np.clip(places, 0, count - 1)
    shares: np.ndarray = np.clip(1 - np.abs(inside[:, None] - np.arange(count)), 0, 1)
    return shares


def _projection(tube: TubeConfig, vision: VisionConfig) -> nn.Conv2d:
    frames, height, width = tube.kernel
    channels = vision.width // math.prod(tube.space_to_depth)
    return nn.Conv2d(3 * frames, channels, (height, width), stride=tube.step[1:], bias=vision.patch_bias)


def _cut(frames_BFCSS: Tensor, tube: TubeConfig, projection: nn.Conv2d) -> Tensor:
    """One kind of tube: [B, N, W]."""
    size = frames_BFCSS.shape[-1]
    times, rows, columns = tube.counts(frames_BFCSS.shape[1], size)
    depth_t, depth_h, depth_w = tube.space_to_depth
    starts = [tube.offset[0] + index * tube.step[0] for index in range(times * depth_t)]
    slabs = torch.stack([frames_BFCSS[:, start : start + tube.kernel[0]].flatten(1, 2) for start in starts], dim=1)
    x: Tensor = projection(slabs.flatten(0, 1)[:, :, tube.offset[1] :, tube.offset[2] :])
    x = x[:, :, : rows * depth_h, : columns * depth_w]
    if tube.space_to_depth == (1, 1, 1):
        return x.flatten(2).transpose(1, 2).reshape(-1, times * rows * columns, x.shape[1])
    x = x.reshape(-1, times, depth_t, x.shape[1], rows, depth_h, columns, depth_w)
    # To clip, time, row, column, then neighbours, each with its channels together.
    x = x.permute(0, 1, 4, 6, 2, 5, 7, 3)
    return x.reshape(-1, times * rows * columns, depth_t * depth_h * depth_w * x.shape[-1])
