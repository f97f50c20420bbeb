"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): fine-tune a small product beside frozen matrices.

A matrix W becomes W + scale * B A, formed where it is used, as a parametrization of the layer. So merging is exact: the
merged weight is the very tensor that the adapted model computed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between

TARGETS = {"attention": ("qkv", "out", "query", "key_value"), "mlp": ("up", "down")}
"""Names of the linear layers of a block (transformer.py)."""


@dataclass(frozen=True)
class LoraOptions:
    """What is adapted, and how."""

    rank: Annotated[int, Between(1, 4096)] = 8
    alpha: Annotated[float, Between(1e-3, 1e6)] = 16.0
    """The product is multiplied by alpha / rank."""
    targets: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    towers: tuple[Literal["vision", "text"], ...] = ("vision", "text")


class LowRank(nn.Module):
    """W to W + scale * B A."""

    def __init__(self, weight: Tensor, options: LoraOptions) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(weight.new_zeros(options.rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, options.rank))
        nn.init.normal_(self.down, std=columns**-0.5)
        self.scale = options.alpha / options.rank

    def forward(self, weight: Tensor) -> Tensor:
        # Not under autocast: the merged weight is made without it and must be the same.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).to(weight.dtype)


def add_lora(model: nn.Module, options: LoraOptions) -> list[str]:
    """Freeze every parameter and put trainable products beside the targeted matrices; returns the layers' names. Tubes
    are small and may be new: they learn as they are.

    At the start B is zero, so the model computes what it did.

    Raises:
        InputError: no layer is targeted.
    """
    wanted = {name for target in options.targets for name in TARGETS[target]}
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in wanted and name.split(".")[0] in options.towers
    ]
    if not layers:
        raise InputError(f"lora: no layer is targeted by targets {options.targets} in towers {options.towers}")
    model.requires_grad_(False)
    if isinstance(tubes := getattr(model, "tubes", None), nn.Module):
        tubes.requires_grad_(True)
    for _, layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, options))
    return [name for name, _ in layers]


def merge_lora(model: nn.Module) -> int:
    """Replace every adapted matrix by its sum, in place; returns how many. The model has its plain names again."""
    adapted = [m for m in model.modules() if isinstance(m, nn.Linear) and parametrize.is_parametrized(m, "weight")]
    for layer in adapted:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return len(adapted)


def plain_state(state: dict[str, Tensor], options: LoraOptions) -> dict[str, Tensor]:
    """The state dict of the merged model from that of an adapted one."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".parametrizations.weight." not in name:
            out[name] = value
        elif name.endswith(".original"):
            stem = name.removesuffix("original")
            low = LowRank(value.detach(), options)
            low.load_state_dict({"down": state[f"{stem}0.down"], "up": state[f"{stem}0.up"]})
            with torch.no_grad():
                out[name.replace(".parametrizations.weight.original", ".weight")] = low(value)
    return out
