"""Parses and builds graphs with tensorrt-rtx, which needs no GPU for that: the nearest to TensorRT on a workstation.

An engine built here is thrown away. tensorrt-rtx builds for named compute capabilities; SM 8.7 (Orin) and 11.0 (Thor)
are not among them, 8.6 and 12.0 are their nearest.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mammut_runtime.errors import EngineError
from mammut_runtime.manifest import InputProfile, Scheme

CAPABILITIES: dict[Scheme, tuple[str, ...]] = {
    "fp32": ("SM80", "SM86", "SM89", "SM120"),
    "fp16": ("SM75", "SM80", "SM86", "SM89", "SM120"),
    "int8": ("SM75", "SM80", "SM86", "SM89", "SM120"),
    "int4": ("SM80", "SM86", "SM89", "SM120"),
}
"""Scheme -> what tensorrt-rtx 1.7 builds it for. On Turing (SM75) it has no float32 matrix products and no int4."""
_SHOWN = 400


@dataclass(frozen=True)
class Built:
    """What came of one graph."""

    engine_bytes: int
    """0 if it was refused."""
    problems: tuple[str, ...]
    """The parser's or builder's own words; empty if it was built."""

    @property
    def ok(self) -> bool:
        return not self.problems


def library() -> Any:
    """The tensorrt_rtx module. Raises EngineError that says how to get it."""
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError as problem:
        raise EngineError(
            f"this needs tensorrt-rtx, which does not load ({problem}); pip install tensorrt-rtx"
        ) from None


def build(path: Path, profiles: Mapping[str, InputProfile], capabilities: Sequence[str]) -> Built:
    """Parse a graph's file and build an engine of it, strongly typed. profiles: input -> sizes to build for."""
    trt = library()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = (parser.get_error(index) for index in range(parser.num_errors))
        return Built(0, tuple(f"{error.node_name()}: {error.desc()}"[:_SHOWN] for error in errors) or ("not parsed",))
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if profiles:
        profile = builder.create_optimization_profile()
        for name, each in profiles.items():
            profile.set_shape(name, each.minimum, each.optimum, each.maximum)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return Built(0, tuple(logger.errors[:3]) or ("not built, and not said why",))
    return Built(int(engine.nbytes), ())


def refusals(path: Path, profiles: Mapping[str, InputProfile], scheme: Scheme) -> Iterator[str]:
    """One line for each compute capability of CAPABILITIES that a graph is not built for."""
    for name in CAPABILITIES[scheme]:
        built = build(path, profiles, (name,))
        if not built.ok:
            yield f"{path.name} for {name}: {built.problems[0]}"


def _logger(trt: Any) -> Any:
    """A logger that keeps errors to itself; the library prints them otherwise."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split())[:_SHOWN])

    return Logger()
