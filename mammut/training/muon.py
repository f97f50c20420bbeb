"""Muon for the matrices of transformer blocks: each step's momentum is made orthogonal before it is applied.

For small models on few pictures it needs far fewer steps than AdamW: on the demo's data the contrastive loss reached
2.28 after 200 steps of 96 pictures instead of 700 (one run each). The orthogonalisation is the published quintic
Newton-Schulz iteration (Jordan et al. 2024, "Muon"). PyTorch's own Muon is not used: it takes queries, keys and values,
which lie in one matrix, for one, and every process would do all the work. Here each does some of the matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Weight matrices inside the blocks of both towers. Embeddings, norms and biases are not Muon's."""
    return parameter.ndim == 2 and "blocks." in name


class Muon(torch.optim.Optimizer):
    """All processes hold the same matrices whole, with the same gradients; `step` must be called by all of them."""

    def __init__(self, named: dict[str, nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        group = {"params": list(named.values()), "lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([group], {})
        self.parts = [_parts(name) for name in named]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        group = self.param_groups[0]
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        directions = []
        for number, (parameter, parts) in enumerate(zip(group["params"], self.parts, strict=True)):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            buffer = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            if number % size != rank:
                directions.append(torch.zeros_like(parameter))
                continue
            ahead = gradient.lerp(buffer, group["momentum"])
            directions.append(torch.cat([orthogonal(part) for part in ahead.chunk(parts)]))
        if size > 1:
            flat = torch.cat([direction.flatten() for direction in directions])
            dist.all_reduce(flat)  # what others did is zero here
            pieces = torch.split(flat, [direction.numel() for direction in directions])
            directions = [piece.view_as(d) for piece, d in zip(pieces, directions, strict=True)]
        for parameter, direction in zip(group["params"], directions, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(direction, alpha=group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Float[m, n] with the same singular vectors and singular values near sqrt(max(1, m / n))."""
    x: Tensor = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)
    scale: float = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    return x * scale


def _parts(name: str) -> int:
    """Queries, keys and values lie in one matrix and are orthogonalised each by itself."""
    return 3 if name.endswith("qkv.weight") else 2 if name.endswith("key_value.weight") else 1
