"""A starting point that suits small sets of pictures: attention layers that already look where trained ones look.

Trained transformers' query-key products lean towards the identity (a token attends to its like) and their value-output
products towards its negative. Starting there, and from sinusoidal positions, lets a vision transformer learn from
thousands instead of millions of pictures ("Mimetic Initialization of Self-Attention Layers", Trockman and Kolter 2023,
arXiv 2305.09828, whose strengths 0.7 and 0.4 are used).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mammut.model import Mammut
from mammut.transformer import SelfBlock

QUERY_KEY, VALUE_OUT = 0.7, 0.4
POSITION_SCALE = 0.5
"""Size of the sinusoids beside patch embeddings, whose entries start at about this size as well."""


@torch.no_grad()
def structured_start(model: Mammut, seed: int) -> None:
    """Change the vision tower's attention and positions in place. The text side keeps its plain start."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision
    model.vision.positions[int(vision.class_token) :] = POSITION_SCALE * sinusoids(vision.grid, vision.width)
    for block in model.vision.blocks:
        assert isinstance(block, SelfBlock)
        _attention(block, vision.width, vision.heads, generator)


def sinusoids(grid: int, width: int) -> Tensor:
    """float32[grid * grid, width]: sines and cosines of row and column; columns beyond a multiple of four stay 0."""
    quarter = width // 4
    frequency = 100.0 ** (-torch.arange(quarter) / quarter)
    angle = torch.arange(grid)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = line[:, None, :].expand(grid, grid, -1)
    columns = line[None, :, :].expand(grid, grid, -1)
    out = torch.zeros(grid * grid, width)
    out[:, : 4 * quarter] = torch.cat([rows, columns], dim=2).reshape(grid * grid, -1)
    return out


def _attention(block: SelfBlock, width: int, heads: int, generator: torch.Generator) -> None:
    """Factor the wanted products into the block's matrices."""
    head_width = width // heads
    queries, keys, values = block.qkv.weight.chunk(3)
    for head in range(heads):
        rows = slice(head * head_width, (head + 1) * head_width)
        left, right = _factors(QUERY_KEY, QUERY_KEY, width, head_width, generator)
        queries[rows], keys[rows] = left.T, right.T
    left, right = _factors(VALUE_OUT, -VALUE_OUT, width, width, generator)
    values.copy_(right.T)
    block.out.weight.copy_(left)


def _factors(noise: float, identity: float, width: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two float32[width, rank] whose product left @ right.T is the best of its rank for noise + identity."""
    wanted = noise * torch.randn(width, width, generator=generator) / width**0.5 + identity * torch.eye(width)
    u, s, vt = torch.linalg.svd(wanted)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vt[:rank].T * root
