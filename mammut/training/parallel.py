"""Many processes, one model: torchrun's processes, DDP or FSDP2 around the two passes, recomputed and compiled blocks.

The engines are PyTorch's own; this file says which parts of the model they get. The decoder enters its blocks by more
than one method (transformer.py), and both engines watch only a module's call, so `_one_entry` leads every way in
through it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mammut.training.objective import Outputs, TwoPass
from mammut.transformer import CrossBlock, SelfBlock
from mammut_runtime.errors import InputError


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is laid out over processes and memory."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model. fsdp: parameters, gradients and optimizer state are split."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bfloat16, weights and optimizer in float32."""
    recompute_blocks: bool = False
    """Activation checkpointing: a block's inner activations are made again in the backward."""
    compile: bool = False
    """torch.compile each block. Takes minutes at the start; needs a C++ compiler (CPU) or Triton (CUDA)."""

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None


@dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether it is the one that reports."""
        return self.rank == 0


@contextmanager
def joined(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[Place]:
    """Meet the other processes that torchrun started; alone where it started none."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no GPU; use --device cpu")
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if local.index >= torch.cuda.device_count():
            raise InputError(f"{torch.cuda.device_count()} GPUs are too few for as many processes as torchrun started")
        torch.cuda.set_device(local)
    if "RANK" not in os.environ:
        yield Place(0, 1, local)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


class Prepared:
    """The two passes as they run on this process."""

    def __init__(self, passes: TwoPass, options: ParallelOptions, place: Place) -> None:
        """Moves the module to the device and changes its blocks in place.

        Raises:
            InputError: compilation is asked for where it cannot be had.
        """
        self.inner, self.options, self.place = passes, options, place
        if options.compile:
            check_compiler(place.device)
        for block in blocks_of(passes):
            block.plain_attention = place.device.type == "cpu"
            _one_entry(block, options.recompute_blocks)
            if options.compile:
                block.compile()
        if any(parameter.device != place.device for parameter in passes.parameters()):
            passes.to(place.device)
        self.whole = [p for p in passes.parameters() if p.ndim == 0 or p is passes.log_variances]
        self.run: nn.Module = passes
        if options.strategy == "fsdp":
            self.run = _sharded(passes, options, place, set(self.whole))
        elif place.size > 1:
            ids = [place.device.index] if place.device.type == "cuda" else None
            self.run = DistributedDataParallel(passes, device_ids=ids, gradient_as_bucket_view=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Outputs:
        out: Outputs = self.run(*args, **kwargs)
        return out

    def synchronised(self, last: bool) -> AbstractContextManager[None]:
        """A context for one micro-batch: gradients are exchanged in the last one only."""
        if isinstance(self.run, FSDPModule):
            self.run.set_requires_gradient_sync(last)
        if isinstance(self.run, DistributedDataParallel) and not last:
            context: AbstractContextManager[None] = self.run.no_sync()
            return context
        return contextlib.nullcontext()

    def finish_backward(self) -> None:
        """FSDP leaves parameters it does not split alone: average their gradients."""
        if self.options.strategy == "fsdp" and self.place.size > 1:
            for parameter in self.whole:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.place.size

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.inner.parameters() if p.requires_grad]

    def finite(self) -> bool:
        """Whether all weights of all processes are numbers."""
        own = (p.to_local() if isinstance(p, DTensor) else p for p in self.trained())
        bad = torch.tensor(int(not all(bool(torch.isfinite(p).all()) for p in own)), device=self.place.device)
        if self.place.size > 1:
            dist.all_reduce(bad)
        return not int(bad)


def blocks_of(passes: nn.Module) -> list[SelfBlock | CrossBlock]:
    """Every transformer block of both towers."""
    return [module for module in passes.modules() if isinstance(module, SelfBlock | CrossBlock)]


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile has nothing to compile with."""
    if device.type == "cpu" and not any(shutil.which(each) for each in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        raise InputError("compile: no C++ compiler found (g++, clang++); install one, or set parallel.compile to false")
    if device.type == "cuda":
        try:
            import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
        except ImportError as error:
            raise InputError("compile: Triton is not installed; set parallel.compile to false") from error


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients, split ones too, to a norm of at most `limit` (0: leave them); returns the norm before, a scalar.

    Where the norm is not finite nothing is changed.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    split = [g for g in found if isinstance(g, DTensor)]
    whole = [g for g in found if not isinstance(g, DTensor)]
    norms = []
    for grads in (split, whole):
        if grads:
            norm = nn.utils.get_total_norm(grads)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if limit > 0 and bool(torch.isfinite(total)):
        share = torch.clamp(limit / (total + 1e-6), max=1.0)
        for gradient in found:
            gradient.mul_(share)
    return total


def _sharded(passes: TwoPass, options: ParallelOptions, place: Place, whole: set[nn.Parameter]) -> nn.Module:
    if not dist.is_initialized():
        raise InputError("strategy fsdp needs torchrun: torchrun --nproc-per-node N -m mammut.commands run ...")
    mesh = init_device_mesh(place.device.type, (place.size,))
    dtype = options.autocast
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(passes):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if isinstance(block, CrossBlock):
            register_fsdp_forward_method(block, "keys_values")
    fully_shard(passes, mesh=mesh, mp_policy=policy, ignored_params=whole)
    return passes


def _one_entry(block: SelfBlock | CrossBlock, recompute: bool) -> None:
    """Let every way into the block that training uses be its call, where engines and compilers have their hooks."""
    if isinstance(block, CrossBlock):
        if recompute:
            block.forward = _recomputed(block.forward)  # type: ignore[method-assign]
        return
    run = _recomputed(block.cached) if recompute else block.cached

    def forward(x: Tensor, *rest: Any) -> Any:
        if len(rest) == 2:
            return run(x, *rest)
        return run(x, None, rest[0] if rest else None)[0]

    block.forward = forward  # type: ignore[method-assign,assignment]
    block.cached = lambda x, past, mask: block(x, past, mask)  # type: ignore[method-assign,assignment]


def _recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
    def again(*args: Any) -> Any:
        # There is no randomness inside a block, so no generator state needs to be kept.
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    return again
