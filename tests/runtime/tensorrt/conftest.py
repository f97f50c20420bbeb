"""A GPU that is not there, a bundle for it, and engines built on it (fakes/)."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mammut_runtime.bundle import Bundle, hash_files, write_manifest
from mammut_runtime.engine_cache import EngineCache
from mammut_runtime.engines import tensorrt_cuda, tensorrt_library
from mammut_runtime.engines.tensorrt_jobs import BuildOptions, BuiltEngine, build_engines
from mammut_runtime.manifest import InputProfile

FAKES = Path(__file__).parent / "fakes"
TINY = Path(__file__).parents[2] / "data" / "tiny-bundle"


def make_tensorrt_bundle(folder: Path) -> Bundle:
    """The tiny bundle as one for TensorRT, with profiles; typed graphs are the exporter's business."""
    shutil.copytree(TINY, folder)
    manifest = Bundle.open(folder).manifest
    context = manifest.text.context_length
    limits = {"batch": (1, 1, 4), "beams": (1, 1, 4), "length": (2, 8, context)}
    limits |= {"past": (0, 4, context - 1), "new": (1, 1, context)}
    profiles: dict[str, dict[str, InputProfile]] = {}
    for name, graph in manifest.graphs.items():
        for tensor in graph.inputs:
            sizes = [(size,) * 3 if isinstance(size, int) else limits[size] for size in tensor.shape]
            low, usual, high = (tuple(size[i] for size in sizes) for i in range(3))
            profiles.setdefault(name, {})[tensor.name] = InputProfile(low, usual, high)
    length = manifest.text.text_length
    if length:
        profiles["text"]["ids"] = InputProfile((1, length), (1, length), (4, length))
    write_manifest(folder, dataclasses.replace(manifest, target="tensorrt", profiles=profiles))
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def tensorrt_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Do not write to it."""
    return make_tensorrt_bundle(tmp_path_factory.mktemp("tensorrt") / "bundle")


class FakeGpu:
    """The fakes as modules, and where engines go."""

    def __init__(self, folder: Path) -> None:
        self.trt: Any = importlib.import_module("tensorrt")
        self.cuda: Any = importlib.import_module("cuda.bindings.runtime")
        self.machine = self.cuda.MACHINE
        self.cache = EngineCache(folder / "cache" / "mammut-edge" / "engines")

    def build(self, bundle: Bundle, **options: Any) -> list[BuiltEngine]:
        return build_engines(bundle, self.cache, BuildOptions(**options))


def _forget() -> dict[str, Any]:
    """Take the libraries out of sys.modules and our own memory of them; what was there."""
    names = [name for name in sys.modules if name.split(".")[0] in ("cuda", "tensorrt", "tensorrt_rtx")]
    tensorrt_library._load.cache_clear()
    tensorrt_cuda.runtime.cache_clear()
    tensorrt_cuda._devices.clear()
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    """The fakes in place of `tensorrt` and `cuda`, here and in child processes; this user's folders in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(FAKES))
    real = _forget()
    yield FakeGpu(tmp_path)
    _forget()
    sys.modules.update(real)


@pytest.fixture
def fake_rtx(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake of tensorrt_rtx beside that of tensorrt; its module."""
    folder = str(FAKES.with_name("fakes_rtx"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ["PYTHONPATH"]]))
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("tensorrt_rtx")


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle's graphs, typed in float16 by the exporter. Do not write to it."""
    write_typed = pytest.importorskip("mammut_export.typed_bundle", reason="needs the exporter").write_typed
    folder = make_tensorrt_bundle(tmp_path_factory.mktemp("half") / "bundle").path
    manifest = Bundle.open(folder).manifest
    for graph in manifest.graphs.values():
        (folder / graph.file).unlink()
    graphs, _ = write_typed(Bundle.open(TINY), folder, dict.fromkeys(manifest.graphs, "fp16"))
    canary = dataclasses.replace(manifest.canary, tolerance=0.01)
    manifest = dataclasses.replace(manifest, precision="fp16", graphs=graphs, files=hash_files(folder), canary=canary)
    write_manifest(folder, manifest)
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def built_once(tensorrt_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cache and state folders with all engines of the bundle, built by the fake; to be copied."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.syspath_prepend(str(FAKES))
        real = _forget()
        build_engines(tensorrt_bundle)
        _forget()
        sys.modules.update(real)
    return folder / "cache", folder / "state"


@pytest.fixture
def built(fake_gpu: FakeGpu, built_once: tuple[Path, Path], tmp_path: Path) -> FakeGpu:
    """A fake GPU whose cache holds all engines of `tensorrt_bundle`."""
    for each in built_once:
        shutil.copytree(each, tmp_path / each.name)
    return fake_gpu
