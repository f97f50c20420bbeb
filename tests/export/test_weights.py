from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mammut_export import onnx_graphs
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.weights import (
    INLINE_BYTES,
    LARGE_BYTES,
    PAGE_BYTES,
    SMALL_ALIGNMENT_BYTES,
    WeightStore,
    half_rounded,
    halve_matrices,
    move_to_store,
)
from mammut_runtime.engines import open_engine

any_array = arrays.arrays(
    st.sampled_from([np.float32, np.float16, np.int64, np.int8]),
    arrays.array_shapes(min_dims=1, max_dims=3, max_side=7),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(any_array, max_size=8))
def test_what_is_stored_reads_back(tmp_path_factory: pytest.TempPathFactory, given_arrays: list[np.ndarray]) -> None:
    path = tmp_path_factory.mktemp("store") / "weights.bin"
    with WeightStore(path) as store:
        places = [store.add(array) for array in given_arrays]
    data = path.read_bytes()
    for array, (offset, length) in zip(given_arrays, places, strict=True):
        assert offset % SMALL_ALIGNMENT_BYTES == 0
        assert data[offset : offset + length] == array.tobytes()
    distinct = {array.tobytes() for array in given_arrays}
    assert store.stored_bytes == sum(map(len, distinct))
    assert len(data) < store.stored_bytes + SMALL_ALIGNMENT_BYTES * max(1, len(distinct))


def test_large_tensors_begin_on_a_page(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "weights.bin") as store:
        store.add(np.ones(3, np.float32))
        offset, length = store.add(np.zeros(LARGE_BYTES // 4, np.float32))
        again, _ = store.add(np.zeros((4, LARGE_BYTES // 16), np.float32))
    assert (offset, length) == (PAGE_BYTES, LARGE_BYTES) and again == offset
    assert store.given_bytes == store.stored_bytes + LARGE_BYTES


def test_views_are_stored_as_they_read(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with WeightStore(tmp_path / "weights.bin") as store:
        offset, length = store.add(array.T)
    assert (tmp_path / "weights.bin").read_bytes()[offset : offset + length] == array.T.copy().tobytes()


def test_graphs_share_one_copy(models: dict[str, ir.Model], tmp_path: Path) -> None:
    places: dict[str, tuple[int | None, int | None]] = {}
    shared = 0
    with WeightStore(tmp_path / "weights.bin") as store:
        for name in GRAPHS:
            move_to_store(models[name], store)
            for key, value in models[name].graph.initializers.items():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    shared += key in places
                    assert places.setdefault(key, (tensor.offset, tensor.length)) == (tensor.offset, tensor.length)
                else:
                    assert tensor.nbytes < INLINE_BYTES
    assert shared > 5  # the blocks of the text tower and the decoder, the projection
    assert store.stored_bytes == (tmp_path / "weights.bin").stat().st_size - _gaps(places)


@pytest.mark.parametrize("name", ["text", "decoder"])
def test_halved_graphs_compute_with_rounded_weights(models: dict[str, ir.Model], tmp_path: Path, name: str) -> None:
    """The halved graph equals the whole one with its weights rounded: so it computes in float32 throughout."""
    model = models[name]
    sizes = {"batch": 1, "beams": 2, "new": 3, "past": 2, "length": 5}
    generator = np.random.default_rng(0)
    feeds = {}
    for tensor in onnx_graphs.graph_info(model, "x.onnx").inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        integers = tensor.dtype == "int64"
        feeds[tensor.name] = generator.integers(3, 60, shape) if integers else generator.normal(size=shape).astype("f4")
    for value in model.graph.initializers.values():
        if value.const_value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.Tensor(half_rounded(value.const_value.numpy().copy()), name=value.name)
    whole = _run(model, tmp_path / "whole.onnx", feeds)
    halve_matrices(model)
    halved = _run(model, tmp_path / "halved.onnx", feeds)
    assert (tmp_path / "halved.onnx").stat().st_size < 0.75 * (tmp_path / "whole.onnx").stat().st_size
    for key, value in whole.items():
        assert halved[key].dtype == np.float32
        np.testing.assert_allclose(halved[key], value, atol=1e-5)


def test_rows_are_cast_after_they_are_taken(models: dict[str, ir.Model]) -> None:
    halve_matrices(models["text"])
    (gather,) = (node for node in models["text"].graph if node.op_type == "Gather")
    assert gather.inputs[0].name == "text.token_embedding.weight"
    assert [use.node.op_type for use in gather.outputs[0].uses()] == ["Cast"]


def test_values_beyond_float16_stay(models: dict[str, ir.Model]) -> None:
    initializers = models["memory"].graph.initializers
    name = "memory_projection.weight.T"
    large = initializers[name].const_value.numpy().copy()
    large[0, 0] = 1e5
    initializers[name].const_value = ir.Tensor(large, name=name)
    halve_matrices(models["memory"])
    kept, halved = (initializers[key].const_value.dtype for key in (name, "text.cross_blocks.0.key_value.weight.T"))
    assert (kept, halved) == (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    assert half_rounded(large) is large
    assert half_rounded(np.array([[0.1]], np.float32))[0, 0] == np.float32(np.float16(0.1))
    vector = np.array([0.1], np.float32)
    assert half_rounded(vector) is vector


def _run(model: ir.Model, path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnx_graphs.save(model, path)
    onnx_graphs.check_file(path)
    return open_engine(path, "onnxruntime").run(feeds)


def _gaps(places: dict[str, tuple[int | None, int | None]]) -> int:
    spans = sorted({(offset or 0, length or 0) for offset, length in places.values()})
    ends = [0, *(offset + length for offset, length in spans)]
    return sum(offset - end for (offset, _), end in zip(spans, ends, strict=False))
