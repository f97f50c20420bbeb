"""The fakes have the names, parameters and values of the real tensorrt_rtx and cuda-python, and no others."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from mammut_runtime.bundle import Bundle
from mammut_runtime.engine_cache import EngineCache
from mammut_runtime.engines import tensorrt as module
from mammut_runtime.engines import tensorrt_cuda, tensorrt_jobs, tensorrt_library
from mammut_runtime.errors import EngineError

real_trt: Any = pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")
real_cuda: Any = pytest.importorskip("cuda.bindings.runtime", reason="needs pip install mammut-edge[tensorrt]")


def public_classes(fake: Any) -> list[type]:
    found = [each for name, each in vars(fake).items() if inspect.isclass(each) and not name.startswith("_")]
    return [each for each in found if each.__module__ == fake.__name__]


def parameters(docstring: str, name: str) -> list[list[str]]:
    """The parameter names of every overload in a docstring of a C++ binding."""
    lines = [line for line in docstring.splitlines() if re.match(rf"(\d+\. )?{name}\(", line) and "*args" not in line]
    found = []
    for line in lines:
        inside = line[line.index("(") + 1 : line.rindex(")")]
        found.append([each for each in re.findall(r"(?:^|, )(\w+): ", inside) if each != "self"])
    return found


def own(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_every_class_method_and_parameter_of_the_fake_is_real(fake_gpu: Any) -> None:
    checked = 0
    for fake in public_classes(fake_gpu.trt):
        real = getattr(real_trt, fake.__name__)
        if issubclass(fake, enum.Enum):
            assert set(fake.__members__) <= set(real.__members__), fake.__name__
            continue
        for name, member in vars(fake).items():
            if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
                continue
            found = getattr(real, name)
            if isinstance(member, property):
                assert isinstance(found, property), f"{fake.__name__}.{name} is no property"
            else:
                overloads = parameters(found.__doc__, name)
                assert any(each[: len(own(member))] == own(member) for each in overloads), (fake, name, overloads)
            checked += 1
        if "__init__" in vars(fake) and fake.__name__ in ("Builder", "OnnxParser", "Runtime"):
            assert own(fake.__init__) in parameters(real.__init__.__doc__, "__init__")
    assert checked > 30


def test_what_only_rtx_has_is_real_too(fake_rtx: Any) -> None:
    assert set(fake_rtx.ComputeCapability.__members__) <= set(real_trt.ComputeCapability.__members__)
    assert set(fake_rtx.CudaGraphStrategy.__members__) == set(real_trt.CudaGraphStrategy.__members__)
    assert isinstance(real_trt.IRuntimeConfig.cuda_graph_strategy, property)
    for fake, name in (
        (fake_rtx.ICudaEngine, "create_runtime_config"),
        (fake_rtx.ICudaEngine, "create_execution_context"),
        (fake_rtx.IBuilderConfig, "set_compute_capability"),
    ):
        found = getattr(getattr(real_trt, fake.__name__), name).__doc__
        assert own(getattr(fake, name)) in parameters(found, name)
    assert isinstance(real_trt.IBuilderConfig.num_compute_capabilities, property)


def test_the_check_would_notice(fake_gpu: Any) -> None:
    """A control: old and invented names are not there."""
    assert not hasattr(real_trt.IExecutionContext, "execute_async_v2")
    assert parameters(real_trt.IExecutionContext.set_tensor_address.__doc__, "set_tensor_address") == [
        ["name", "memory"]
    ]
    assert parameters(real_trt.ICudaEngine.create_execution_context.__doc__, "create_execution_context") == [
        ["strategy"],
        ["runtime_config"],
    ]


def test_every_cuda_function_of_the_fake_is_real(fake_gpu: Any) -> None:
    functions = [
        each for name, each in vars(fake_gpu.cuda).items() if name.startswith("cuda") and inspect.isfunction(each)
    ]
    assert len(functions) >= 12
    for function in functions:
        real = getattr(real_cuda, function.__name__)
        first = real.__doc__.splitlines()[0]
        inside = first[first.index("(") + 1 : first.rindex(")")]
        names = [re.sub(r":.*", "", each).split()[-1] for each in inside.split(",") if each.strip()]
        assert own(function) == names, function.__name__


def test_every_cuda_value_of_the_fake_is_real(fake_gpu: Any) -> None:
    for kind in ("cudaError_t", "cudaMemcpyKind"):
        for name, value in getattr(fake_gpu.cuda, kind).__members__.items():
            assert int(getattr(getattr(real_cuda, kind), name)) == int(value)
    assert fake_gpu.cuda.cudaStreamNonBlocking == real_cuda.cudaStreamNonBlocking
    properties = real_cuda.cudaDeviceProp()
    for name in ("name", "uuid", "major", "minor"):
        assert type(getattr(properties, name)).__name__ in (
            type(getattr(fake_gpu.cuda.cudaDeviceProp, name)).__name__,
            "cudaUUID_t",
        )
    assert isinstance(properties.uuid.bytes, bytes) and int(real_cuda.cudaStream_t(5)) == 5


def test_our_code_uses_no_name_that_only_the_fake_has() -> None:
    """Every `trt.X`, `call("cudaX")` and `cudart.X` in our sources is in the real libraries."""
    folder = Path(module.__file__).parent
    source = "".join((folder / f"tensorrt{part}.py").read_text() for part in ("", "_build", "_cuda", "_library"))
    names = set(re.findall(r"\b(?:trt|module|library\.module)\.([A-Z]\w+)", source))
    assert {"Runtime", "Builder", "OnnxParser", "CudaGraphStrategy"} <= names
    assert not [name for name in names if not hasattr(real_trt, name)]
    functions = set(re.findall(r"\"(cuda[A-Z]\w+)\"", source)) - {"cudaErrorMemoryAllocation"}
    functions = {name for name in functions if not name.startswith("cudaError")}
    assert "cudaMemcpyAsync" in functions and not [name for name in functions if not hasattr(real_cuda, name)]
    assert all(name in real_cuda.cudaError_t.__members__ for name in re.findall(r"\"(cudaError\w+)\"", source))
    assert hasattr(real_trt.IRuntimeConfig, "cuda_graph_strategy") and hasattr(
        real_trt.ICudaEngine, "create_runtime_config"
    )


def test_the_real_cuda_says_that_there_is_no_gpu() -> None:
    if real_cuda.cudaGetDeviceCount()[0] == real_cuda.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    tensorrt_cuda.runtime.cache_clear()
    with pytest.raises(EngineError, match=r"no usable GPU or driver: .* \(cudaError\w+\); see nvidia-smi"):
        tensorrt_cuda.describe(0)


def test_an_engine_of_the_real_tensorrt_rtx_as_far_as_it_opens_without_a_gpu(
    fake_gpu: Any, tensorrt_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built by the real library under the key of the fake GPU; then the real runtime is asked to open it."""
    if real_cuda.cudaGetDeviceCount()[0] == real_cuda.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    library = tensorrt_library.load("tensorrt_rtx")
    assert library.module is importlib.import_module("tensorrt_rtx")
    options = tensorrt_jobs.BuildOptions(library="tensorrt_rtx", compute_capability="8.6")
    plan = tensorrt_jobs.plan_build(tensorrt_bundle, fake_gpu.cache, options)
    key = module.engine_key(tensorrt_bundle.content_hash, "memory", library, tensorrt_cuda.device(0).gpu)
    plan.keys.clear()
    plan.keys["memory"] = key
    tensorrt_jobs.run_plan(plan, options, lambda graph, phase, seconds: None)
    stored = EngineCache().load(key)
    assert stored is not None and len(stored.engine) > 50_000
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* cannot open it: .*build it again"):
        module.TensorRtEngine(tensorrt_bundle.graph_path("memory"), module.EngineOptions(library="tensorrt_rtx"))
