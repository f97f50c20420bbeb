"""The ViT encoder: a picture in, its tokens and their pooled vector out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.config import VisionConfig
from mammut.transformer import Activation, SelfBlock


class VisionEncoder(nn.Module):
    """A pre-LN ViT. Legend: B batch, N tokens, W width."""

    def __init__(self, config: VisionConfig, activation: Activation) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.positions = nn.Parameter(torch.zeros(config.tokens, width))
        self.pre_norm = nn.LayerNorm(width) if config.pre_norm else None
        self.blocks = nn.ModuleList(
            SelfBlock(width, config.heads, config.mlp_width, activation) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            pixels: float32[B, 3, S, S], normalised by the preprocess rule.

        Returns:
            tokens float32[B, N, W] as the decoder's memory is made from, and their pooled vector float32[B, W].
        """
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return self.encode(x, self.positions)

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder behind the embedding.

        Args:
            x: float32[B, n, W], embedded patches (or tubes), without positions and class token.
            positions: float32[class_token + n, W], added to them; the class token's first.

        Returns:
            as `forward`.
        """
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        x = x + positions
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        if self.config.final_norm == "before_pool":
            x = self.final_norm(x)
            return x, x.mean(dim=1)
        pooled: Tensor = self.final_norm(x.mean(dim=1))
        return x, pooled


def resize_positions(positions: Tensor, class_token: bool, grid: int) -> Tensor:
    """Learned positions for another grid of patches: bicubic, antialiased; the class token's row is kept.

    Args:
        positions: float[class_token + g * g, W].
        grid: patches along one side of the new grid.

    Returns:
        float[class_token + grid * grid, W].
    """
    prefix, body = positions[: int(class_token)], positions[int(class_token) :]
    old = round(body.shape[0] ** 0.5)
    if old == grid:
        return positions
    square = body.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square.float(), size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, square.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(body.dtype)])
