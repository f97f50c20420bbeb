"""TensorRT for RTX without a GPU: the fake TensorRT, and what only this one has."""

from __future__ import annotations

import enum
from typing import Any

import tensorrt
from tensorrt import *  # noqa: F403 - another library with the same names

__version__ = "1.7.1.116"
CONTEXTS: list[Any] = []
"""The runtime configuration of every context so far; None for the usual one."""
TARGETS: list[Any] = []


class ComputeCapability(enum.Enum):
    NONE, CURRENT, SM75, SM86 = range(4)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = CudaGraphStrategy.DISABLED

    @property
    def cuda_graph_strategy(self) -> CudaGraphStrategy:
        return self._strategy

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, value: CudaGraphStrategy) -> None:
        self._strategy = value


class ICudaEngine(tensorrt.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> tensorrt.IExecutionContext:
        CONTEXTS.append(runtime_config)
        return tensorrt.IExecutionContext(self)


class Runtime(tensorrt.Runtime):
    ENGINE = ICudaEngine


class IBuilderConfig(tensorrt.IBuilderConfig):
    num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        TARGETS.append(compute_capability)
        return index < self.num_compute_capabilities


class Builder(tensorrt.Builder):
    CONFIG = IBuilderConfig

    def build_serialized_network(
        self, network: tensorrt.INetworkDefinition, config: IBuilderConfig
    ) -> tensorrt.IHostMemory | None:
        if not TARGETS:  # the real one builds for several GPUs then, and takes several times as long
            raise tensorrt.cudart.Misuse("no compute capability was set")
        return super().build_serialized_network(network, config)
