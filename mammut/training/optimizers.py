"""The optimizers and their schedule: AdamW (and Muon), warm-up then decay, freezing, layer rates, averaged weights.

The defaults are the paper's: weight decay 0.01, learning rate 1e-3, 10,000 steps of warm-up, then linearly to nothing.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mammut.config import MammutConfig
from mammut.training.muon import Muon, is_block_matrix
from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between

UNDECAYED = ("positions", "class_token", "token_embedding.weight")
"""Besides biases, norms and scalars."""
GATE_SHARE = 30.0
"""How many times the learning rate the tubes' gate is trained with. It is one number that starts at 0 and has to come
near 1 before any token knows when it is; AdamW moves it by about the learning rate in a step."""


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, and Muon if `muon` says so. Learning rate and warm-up belong to the stages of a run, see run_config.py."""

    weight_decay: Annotated[float, Between(0, 10)] = 0.01
    """On matrices only."""
    beta1: Annotated[float, Between(0, 0.9999)] = 0.9
    beta2: Annotated[float, Between(0, 0.99999)] = 0.95
    """Not in the paper; 0.95 is what openMaMMUT was trained with."""
    epsilon: Annotated[float, Between(1e-12, 1e-2)] = 1e-8
    clip: Annotated[float, Between(0, 1e9)] = 1.0
    """Largest norm of the gradient; 0: any."""
    layer_decay: Annotated[float, Between(0.01, 1)] = 1.0
    """Each layer learns by this factor slower than the one after it, in both towers; 1: all alike. 0.65 to 0.9 are
    usual in fine-tuning."""
    muon: Annotated[float, Between(0, 1e4)] = 0.0
    """How many times the learning rate Muon trains the matrices of the blocks with (muon.py; 20 suits small sets of
    pictures); 0: AdamW trains them too."""
    average: Annotated[float, Between(0, 0.99999)] = 0.0
    """Decay of the exponential moving average of the weights, which then is what is kept; 0: the last weights are."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, as patterns of their names: "vision.*", "text.token_embedding.*"."""


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Take the parameters that match out of training; returns their names.

    Raises:
        InputError: a pattern that matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise InputError(f"freeze: {pattern!r} matches no parameter; names are like {', '.join(names[:3])}")
        frozen.update(found)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: {', '.join(patterns)} leaves nothing to train")
    return sorted(frozen)


def layer_share(name: str, config: MammutConfig, decay: float) -> float:
    """The factor on a parameter's learning rate: decay ** (layers between it and the end of its tower).

    Embeddings count as layer 0, blocks from 1, a cross block as the self block it follows; what comes after the last
    block learns at full rate.
    """
    for tower, layers in (("vision", config.vision.layers), ("text", config.text.layers)):
        if f"{tower}." not in name:
            continue
        block = re.search(r"\b(blocks|self_blocks|cross_blocks)\.(\d+)\.", name)
        if block:
            index = int(block[2])
            depth = 1 + (config.text.cross_after[index] if block[1] == "cross_blocks" else index)
        else:
            depth = layers + 1 if "final_norm" in name or name.endswith("text.head") else 0
        return float(decay ** (layers + 1 - depth))
    return 1.0


def parameter_groups(module: nn.Module, config: MammutConfig, options: OptimizerOptions) -> list[dict[str, Any]]:
    """What is trained, grouped by weight decay and share of the learning rate ("share").

    Scalars have groups of their own: FSDP keeps them whole, and one fused update takes only tensors of a kind.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or (options.muon and is_block_matrix(name, parameter)):
            continue
        decayed = parameter.ndim > 1 and not any(name.endswith(each) for each in UNDECAYED)
        share = layer_share(name, config, options.layer_decay) * (GATE_SHARE if name.endswith("tubes.gate") else 1.0)
        key = (options.weight_decay if decayed else 0.0, share, parameter.ndim == 0 or "log_variances" in name)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "share": share, "lr": 0.0}
        for (decay, share, _), parameters in groups.items()
    ]


def make_optimizers(
    module: nn.Module, config: MammutConfig, options: OptimizerOptions
) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW over what is trained, and Muon where it is wanted. Set their rate before a step."""
    groups = parameter_groups(module, config, options)
    adamw = torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.epsilon, fused=True)
    if not options.muon:
        return (adamw,)
    muon = Muon({n: p for n, p in module.named_parameters() if p.requires_grad and is_block_matrix(n, p)})
    muon.param_groups[0]["share"] = options.muon
    return adamw, muon


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """The rate of this step, for each group times its share."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]


class Average:
    """The exponential moving average of what is trained. Early weights are poor, so it begins short."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            own, new = ((each.to_local() if isinstance(each, DTensor) else each) for each in (value, parameter))
            own.lerp_(new, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = value.clone()
            value.copy_(parameter)
            parameter.copy_(kept)


def schedule(step: int, steps: int, warmup_steps: int, kind: Literal["linear", "cosine", "constant"]) -> float:
    """Share of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then decay to nothing."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
