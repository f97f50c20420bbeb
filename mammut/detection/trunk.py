"""The model's own picture encoder at the detector's size: weights shared, positions resized, windows where they pay.

A block that attends in windows costs in proportion to the picture's area, one that attends everywhere in proportion to
its square. A few blocks that attend everywhere carry what is far apart (paper.md's source: ViTDet).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mammut.detection.config import DetectorConfig
from mammut.vision import VisionEncoder, resize_positions


def resized_positions(learned: Tensor, vision: VisionEncoder, config: DetectorConfig) -> Tensor:
    """float[class token + grid * grid, W]: learned positions of any grid for the detector's."""
    return resize_positions(learned, vision.config.class_token, config.image_size // vision.config.patch_size)


def trunk_maps(vision: VisionEncoder, config: DetectorConfig, positions: Tensor, pixels: Tensor) -> list[Tensor]:
    """What the blocks named in `taps` give, and last what leaves the encoder, each float32[B, grid * grid, W].

    Args:
        positions: see resized_positions.
        pixels: float32[B, 3, D, D], normalised by the preprocess rule.

    The class token, where there is one, takes part and is left out of the result. It stands in every window: after a
    windowed block its copies are averaged.
    """
    x = vision.patch_embedding(pixels).flatten(2).transpose(1, 2)
    if vision.class_token is not None:
        x = torch.cat([vision.class_token.expand(x.shape[0], 1, -1), x], dim=1)
    x = x + positions
    if vision.pre_norm is not None:
        x = vision.pre_norm(x)
    first, grid, found = int(vision.config.class_token), config.image_size // vision.config.patch_size, []
    for index, block in enumerate(vision.blocks):
        if config.window == 0 or index in config.global_layers:
            x = block(x)
        else:
            x = _joined(block(_windows(x, first, grid, config.window)), first, grid, config.window)
        if index in config.taps:
            found.append(x[:, first:])
    if vision.config.final_norm == "before_pool":
        x = vision.final_norm(x)
    return [*found, x[:, first:]]


def _windows(x: Tensor, first: int, grid: int, window: int) -> Tensor:
    """[B, first + grid * grid, W] to [B * windows, first + window * window, W]."""
    side = grid // window
    body = x[:, first:].reshape(-1, side, window, side, window, x.shape[-1]).transpose(2, 3)
    body = body.reshape(-1, window * window, x.shape[-1])
    if not first:
        return body
    token = x[:, None, :1].expand(-1, side * side, -1, -1).reshape(-1, 1, x.shape[-1])
    return torch.cat([token, body], dim=1)


def _joined(x: Tensor, first: int, grid: int, window: int) -> Tensor:
    """The reverse."""
    side = grid // window
    body = x[:, first:].reshape(-1, side, side, window, window, x.shape[-1]).transpose(2, 3)
    body = body.reshape(-1, grid * grid, x.shape[-1])
    if not first:
        return body
    token = x[:, :1].reshape(-1, side * side, x.shape[-1]).mean(dim=1, keepdim=True)
    return torch.cat([token, body], dim=1)
