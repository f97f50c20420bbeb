"""The engine's options on the command line, one place for all commands: they become an EngineOptions.

Which engine runs is the bundle's business (its target), so an option of another engine is refused when the bundle is
opened, not ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import InputError

Function = Callable[..., Any]
USUAL = EngineOptions()
_OPTIONS: tuple[Function, ...] = (
    click.option("--threads", type=int, default=0, help="Threads per graph; 0 takes the physical cores. Default: 0."),
    click.option("--memory-arena", is_flag=True, help="Keep freed memory for the next call; it never shrinks."),
    click.option("--low-memory", is_flag=True, help="ONNX Runtime: no second, faster copy of the weights."),
    click.option("--spinning", is_flag=True, help="ONNX Runtime: idle threads wait in a busy loop; costs cores."),
    click.option(
        "--spin-us",
        type=int,
        default=USUAL.spin_us,
        help=f"ONNX Runtime: microseconds in a busy loop before a thread sleeps. Default: {USUAL.spin_us}.",
    ),
    click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="NAME",
        help="ONNX Runtime: execution provider, such as CUDAExecutionProvider, or cuda for short; repeat in order of "
        "preference. Default: CPUExecutionProvider.",
    ),
    click.option(
        "--provider-option",
        "provider_options",
        multiple=True,
        metavar="[NAME:]KEY=VALUE",
        help="ONNX Runtime: an option of a provider, such as backend_path=libQnnHtp.so; repeat for more. NAME can be "
        "left out where one provider is given.",
    ),
    click.option(
        "--allow-fallback",
        is_flag=True,
        help="ONNX Runtime: the processor may compute what the providers do not take. Without it that is an error.",
    ),
    click.option(
        "--device", default=USUAL.device, metavar="NAME", help="OpenVINO: CPU, GPU, NPU or GPU.1. Default: CPU."
    ),
    click.option(
        "--device-precision",
        is_flag=True,
        help="OpenVINO: compute in the device's favourite precision: faster, further from what was tested.",
    ),
    click.option(
        "--compile-cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="OpenVINO: folder for compiled graphs, so that the next start is faster; only for this user's use.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["onnxruntime"]),
        help="Run a bundle for another target with ONNX Runtime. Default: the target's own engine.",
    ),
    click.option(
        "--library",
        type=click.Choice(["tensorrt", "tensorrt_rtx"]),
        help="TensorRT: which of the two. Default: the first that is installed.",
    ),
    click.option("--gpu", type=click.IntRange(0), default=USUAL.gpu, help="TensorRT: number of the GPU. Default: 0."),
    click.option(
        "--engine-cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="TensorRT: folder of the engines that `mammut-run build` made. Default: the user's cache folder.",
    ),
    click.option("--cuda-graphs", is_flag=True, help="TensorRT for RTX: launch the decoder's kernels as CUDA graphs."),
)
_PLAIN = (
    "threads", "memory_arena", "spinning", "spin_us", "allow_fallback", "device", "device_precision", "compile_cache",
    "engine", "library", "gpu", "engine_cache", "cuda_graphs",
)  # fmt: skip
"""Options that are called the same and mean the same in EngineOptions."""


def engine_options(command: Function) -> Function:
    """Add the engine's options; the command gets an EngineOptions as its first argument."""

    @functools.wraps(command)
    def with_engine(
        *args: Any,
        low_memory: bool,
        providers: tuple[str, ...],
        provider_options: tuple[str, ...],
        **rest: Any,
    ) -> Any:
        names = tuple(provider_name(each) for each in providers) or USUAL.providers
        options = EngineOptions(
            prepack=not low_memory,
            providers=names,
            provider_options=tuple(provider_option(each, names) for each in provider_options),
            **{name: rest.pop(name) for name in _PLAIN},
        )
        return command(options, *args, **rest)

    decorated: Function = with_engine
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


_PROVIDERS = (
    "ACL", "Azure", "CANN", "CoreML", "CPU", "CUDA", "Dml", "MIGraphX", "Nnapi", "OpenVINO", "QNN", "Tensorrt",
    "Xnnpack",
)  # fmt: skip
_SHORT = {each.lower(): f"{each}ExecutionProvider" for each in _PROVIDERS} | {"directml": "DmlExecutionProvider"}
"""Short name, lower case → ONNX Runtime's. Others are given in full."""


def provider_name(given: str) -> str:
    """ "cuda" -> "CUDAExecutionProvider"; any other name as it is: the engine knows which exist."""
    return _SHORT.get(given.lower(), given)


def provider_option(given: str, providers: Sequence[str]) -> tuple[str, str, str]:
    """ "qnn:key=value", or "key=value" for the only provider -> provider, key, value. Raises InputError."""
    key, equals, value = given.partition("=")
    name, colon, rest = key.rpartition(":")
    if not equals or not rest or (colon and not name):
        raise InputError(f"--provider-option: expected [NAME:]KEY=VALUE, got {given!r}")
    if name:
        return provider_name(name), rest, value
    if len(providers) > 1:
        raise InputError(
            f"--provider-option {given!r}: for which provider? Put its name in front, such as {providers[0]}:{given}"
        )
    return providers[0], rest, value
