"""What a run will need on each device, before anything is trained: `mammut-train ... --dry-run`.

Parameters, gradients and optimizer state are counted. Activations are found by running one micro-batch forward and
backward on fake tensors, which have shapes but no memory: every tensor is counted from its making to its end, so
recomputation, autocast's copies and the vocabulary's logits are all in it. What the communication libraries, the CUDA
context and fragmentation take is not: leave some gigabytes free.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mammut.config import MammutConfig
from mammut.model import Mammut
from mammut.training.lora import LoraOptions, add_lora
from mammut.training.objective import ObjectiveOptions, PairBatch, TwoPass, weighed
from mammut.training.optimizers import freeze
from mammut.training.parallel import ParallelOptions, Place, Prepared, blocks_of
from mammut_runtime.errors import InputError


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device."""

    devices: int
    strategy: str
    local_batch: int
    """Pictures of one micro-batch on one device."""
    parameters: int
    """How many the whole model has."""
    trained: int
    """How many of them learn."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """AdamW's two moments."""
    gathered_bytes: int
    """FSDP: the whole parameters and gradients of the parts that are at work at a time. DDP: 0."""
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.gathered_bytes
            + self.activation_bytes
        )  # fmt: skip


def plan_memory(
    config: MammutConfig,
    objective: ObjectiveOptions,
    parallel: ParallelOptions,
    *,
    devices: int,
    batch_size: int,
    micro_batches: int = 1,
    image_size: int | None = None,
    frozen: tuple[str, ...] = (),
    lora: LoraOptions | None = None,
    clips: bool = False,
) -> MemoryPlan:
    """The plan of a run.

    Args:
        batch_size: of the whole step, over all devices and micro-batches.
        image_size: pixels, the largest of the run; None: the model's own.
        clips: the batch is of clips, of as many frames as the model takes.

    Raises:
        InputError: the batch cannot be split evenly.
    """
    local, rest = divmod(batch_size, devices * micro_batches)
    if rest or not local:
        raise InputError(
            f"a batch of {batch_size} pictures cannot be split evenly over {devices} devices x {micro_batches} "
            f"micro-batches; choose a multiple of {devices * micro_batches}"
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        passes = _passes(config, objective, parallel, frozen, lora)
        parameters = sum(p.numel() for p in passes.parameters())
        trained = sum(p.numel() for p in passes.parameters() if p.requires_grad)
        split = devices if parallel.strategy == "fsdp" else 1
        gathered = _gathered(passes, parallel) if parallel.strategy == "fsdp" else 0
        size = image_size or config.vision.image_size
        frames = [config.video.frames] if clips and config.video else []
        activations = _activations(passes, parallel, (local, *frames, 3, size, size))
    share = [-(-count // split) for count in (parameters, trained)]
    return MemoryPlan(
        devices, parallel.strategy, local, parameters, trained, 4 * share[0], 4 * share[1], 8 * share[1], gathered,
        activations,
    )  # fmt: skip


def _passes(
    config: MammutConfig,
    objective: ObjectiveOptions,
    parallel: ParallelOptions,
    frozen: tuple[str, ...],
    lora: LoraOptions | None,
) -> TwoPass:
    model = Mammut(config)
    if lora is not None:
        add_lora(model, lora)
    if frozen:
        freeze(model, frozen)
    passes = EveryToken(model, objective, parallel.autocast)
    for name in passes.unused_parameters():
        model.get_parameter(name).requires_grad_(False)
    return passes


def _gathered(passes: TwoPass, parallel: ParallelOptions) -> int:
    """FSDP keeps the parts outside blocks whole for the step, and two blocks at a time: one at work, one on its way."""
    width = 2 if parallel.autocast else 4
    blocks = [_numel(block.parameters()) for block in blocks_of(passes)]
    outside = _numel(passes.parameters()) - sum(blocks)
    return (width + 4) * (outside + 2 * max(blocks))  # the gradient before it is split: float32


def _numel(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _activations(passes: TwoPass, parallel: ParallelOptions, shape: tuple[int, ...]) -> int:
    """Peak bytes of everything but parameters and their gradients, in one forward and backward."""
    if parallel.strategy == "fsdp" and parallel.autocast is not None:
        _cast(passes, parallel.autocast)  # it gathers parameters in this type, so autocast makes no copies
    text, local = passes.model.config.text, shape[0]
    ids = torch.ones(local, text.context_length, dtype=torch.int64)
    batch = PairBatch(
        torch.zeros(shape), ids, ids[:, 0], ids[:, :-1], ids[:, 1:],
        torch.ones(local, text.context_length - 1, dtype=torch.bool),
    )  # fmt: skip
    alone = ParallelOptions("ddp", parallel.precision, parallel.recompute_blocks)
    prepared = Prepared(passes, alone, Place(0, 1, torch.device("cpu")))
    for block in blocks_of(passes):
        block.plain_attention = False  # the plan is for devices whose kernels keep no scores
    with LiveBytes(prepared.trained()) as live:
        losses = weighed(prepared(batch), batch.keys, 1, passes.model.config.contrastive, passes.options)
        losses.total.backward()  # type: ignore[no-untyped-call]
        peak: int = live.peak
    return peak


class EveryToken(TwoPass):
    """As if no text had padding: the most there can be, and a number that does not depend on data."""

    def counted_rows(self, hidden: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.flatten(0, 1), targets.flatten()


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As module.to(dtype), which fake parameters do not allow."""
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            setattr(each, name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storage of tensors made inside, until it is freed; a parameter's gradient no longer once stored."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._stored)  # type: ignore[no-untyped-call]
            for p in parameters
        ]

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._seen(each.untyped_storage())
        return out

    def _seen(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _stored(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            key = parameter.grad.untyped_storage()._cdata
            self.live -= self._sizes.get(key, 0)
            self._sizes[key] = 0
