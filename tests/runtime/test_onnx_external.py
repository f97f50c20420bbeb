"""External data of ONNX files is found wherever the format allows a tensor; a damaged file is only ever refused.

The onnx package is the reference: whatever place it puts a tensor, our walk must see it.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import BundleError
from mammut_runtime.onnx_external import ExternalTensor, check_external_data, external_tensors

onnx = pytest.importorskip("onnx")

SIZES = {"weights.bin": 1000}
PLACES = ("initializer", "attribute", "attributes", "branch", "branches", "function", "function_default",
          "sparse_value", "sparse_index", "sparse_attribute", "training")  # fmt: skip


def tensor(location: str, offset: str | None = "0", length: str | None = "400") -> onnx.TensorProto:
    result = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[10, 10])
    result.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            result.external_data.add(key=key, value=value)
    return result


def model_with(weights: onnx.TensorProto, place: str) -> onnx.ModelProto:
    """A model that has a tensor in one place of the format, among much that has nothing to do with it."""
    model = onnx.ModelProto(ir_version=10, producer_name="weights.bin", doc_string="location ../../etc/passwd")
    graph = model.graph
    graph.name = "g"
    graph.input.add(name="location")
    graph.initializer.add(name="small", data_type=1, dims=[2], float_data=[1.0, 2.0], raw_data=b"\x6a\x00")
    node = graph.node.add(op_type="Constant", name="n", input=["location"])
    node.attribute.add(name="axis", type=onnx.AttributeProto.INT, i=-1, f=1.5, ints=[1, 2])
    attribute = node.attribute.add(name="value")
    inner = onnx.GraphProto(name="inner")
    inner.initializer.add().CopyFrom(weights)
    sparse = onnx.SparseTensorProto(dims=[2])
    if place == "initializer":
        graph.initializer.add().CopyFrom(weights)
    elif place == "attribute":
        attribute.t.CopyFrom(weights)
    elif place == "attributes":
        attribute.tensors.add().CopyFrom(weights)
    elif place == "branch":
        attribute.g.CopyFrom(inner)
    elif place == "branches":
        attribute.graphs.add().node.add(op_type="If").attribute.add(name="then").g.CopyFrom(inner)
    elif place == "function":
        model.functions.add(name="f").node.add(op_type="Constant").attribute.add(name="value").t.CopyFrom(weights)
    elif place == "function_default":
        model.functions.add(name="f").attribute_proto.add(name="value").t.CopyFrom(weights)
    elif place == "sparse_value":
        sparse.values.CopyFrom(weights)
        graph.sparse_initializer.add().CopyFrom(sparse)
    elif place == "sparse_index":
        sparse.indices.CopyFrom(weights)
        graph.sparse_initializer.add().CopyFrom(sparse)
    elif place == "sparse_attribute":
        sparse.values.CopyFrom(weights)
        attribute.sparse_tensors.add().CopyFrom(sparse)
    else:
        model.training_info.add().initialization.CopyFrom(inner)
    return model


@pytest.mark.parametrize("place", PLACES)
def test_found_in_every_place(place: str) -> None:
    data = model_with(tensor("weights.bin", "8", "400"), place).SerializeToString()
    assert list(external_tensors(data, "g.onnx")) == [ExternalTensor("weights.bin", 8, 400)]
    check_external_data(data, "g.onnx", SIZES)  # control: the same place with a good file is taken
    bad = model_with(tensor("../../etc/passwd"), place).SerializeToString()
    with pytest.raises(BundleError, match=r"g.onnx: takes data from the file '../../etc/passwd', expected 'weights"):
        check_external_data(bad, "g.onnx", SIZES)


@pytest.mark.parametrize(
    "location",
    ["", "/etc/passwd", "./weights.bin", "weights.bin/", "WEIGHTS.BIN", "weights.bin\0", "*/_ORT_MEM_ADDR_/*", "a" * 9],
)
def test_other_locations(location: str) -> None:
    data = model_with(tensor(location), "initializer").SerializeToString()
    with pytest.raises(BundleError, match=r"g.onnx: takes data from the file .*, expected 'weights.bin'; do not use"):
        check_external_data(data, "g.onnx", SIZES)


def test_no_weights_file_at_all() -> None:
    data = model_with(tensor("weights.bin"), "initializer").SerializeToString()
    with pytest.raises(BundleError, match=r"the file 'weights.bin', expected no other file"):
        check_external_data(data, "g.onnx", {})


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        ("600", "400", None),
        ("1000", None, None),
        (None, None, None),
        ("601", "400", "takes bytes 601 to 1,001 from 'weights.bin', which has 1,000"),
        ("1001", None, "takes bytes 1,001 to 1,001"),
        ("-1", "4", "expected a number of bytes, got '-1'"),
        ("1e3", "4", "expected a number of bytes, got '1e3'"),
        ("", "4", "expected a number of bytes, got ''"),
        ("9" * 19, "4", "expected a number of bytes"),
        ("\u0661", "4", "expected a number of bytes"),
    ],
)
def test_ranges(offset: str | None, length: str | None, message: str | None) -> None:
    data = model_with(tensor("weights.bin", offset, length), "initializer").SerializeToString()
    if message is None:
        check_external_data(data, "g.onnx", SIZES)
        return
    with pytest.raises(BundleError, match=message):
        check_external_data(data, "g.onnx", SIZES)


@pytest.mark.parametrize(("key", "value"), [("location", "weights.bin"), ("basepath", "/etc")])
def test_unknown_or_repeated_keys(key: str, value: str) -> None:
    weights = tensor("weights.bin")
    weights.external_data.add(key=key, value=value)
    with pytest.raises(BundleError, match=f"external data of a tensor: unknown or repeated key '{key}'"):
        check_external_data(model_with(weights, "initializer").SerializeToString(), "g.onnx", SIZES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x3a\x05ab", "a field of 5 bytes is cut off"),
        (b"\x3a", "a number does not end"),
        (b"\x3a" + b"\xff" * 11, "a number does not end"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        # 5 bytes whose low 32 bits say "graph": readers in C++ would take it for one, so it is not stepped over
        (b"\xba\x80\x80\x80\x10\x00", "field number 536870919"),
        (b"\x3d\x01", "a field of 4 bytes is cut off"),
    ],
)
def test_bytes_that_are_no_onnx(data: bytes, message: str) -> None:
    check_external_data(b"", "g.onnx", SIZES)  # control: an empty message is a message
    with pytest.raises(BundleError, match=f"g.onnx: not a readable ONNX file .*{message}"):
        check_external_data(data, "g.onnx", SIZES)


def test_deep_nesting_is_refused_and_not_recursed_into() -> None:
    def nested(depth: int) -> bytes:
        graph = b""
        for _ in range(depth):  # graph → node (1) → attribute (5) → graph (6)
            for number in (6, 5, 1):
                graph = bytes([number << 3 | 2]) + _length(len(graph)) + graph
        return b"\x3a" + _length(len(graph)) + graph

    check_external_data(nested(20), "g.onnx", SIZES)
    with pytest.raises(BundleError, match="nested more than 100 deep"):
        check_external_data(nested(2000), "g.onnx", SIZES)


def _length(value: int) -> bytes:
    head = bytearray()
    while value >= 0x80:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*head, value])


BASE = model_with(tensor("weights.bin", "8", "400"), "branches")
BASE.MergeFrom(model_with(tensor("weights.bin"), "function"))
BASE.MergeFrom(model_with(tensor("weights.bin"), "sparse_attribute"))
BASE_BYTES = BASE.SerializeToString()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_onnx_reads_from_damaged_bytes_we_see_too(data: st.DataObject) -> None:
    """If the real reader takes the bytes, each location it knows of is one that we found, or we refused the file."""
    damaged = bytearray(BASE_BYTES)
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        cut = data.draw(st.integers(0, 3))
        damaged[start : start + cut] = data.draw(st.binary(max_size=3))
    try:
        ours = {found.location for found in external_tensors(bytes(damaged), "g.onnx")}
    except BundleError as error:
        assert str(error).startswith("g.onnx: ")
        return
    try:
        model = onnx.ModelProto.FromString(bytes(damaged))
    except Exception:  # the reference refuses: nothing to compare
        return
    assert _locations(model) <= ours


def _locations(message: object) -> set[str]:
    """Every external location anywhere in a protobuf message, by reflection."""
    found = set()
    if isinstance(message, onnx.TensorProto):
        found |= {entry.value for entry in message.external_data if entry.key == "location"}
    for descriptor, value in message.ListFields():  # type: ignore[attr-defined]
        if descriptor.message_type is None:
            continue
        for child in value if hasattr(value, "__len__") else [value]:
            found |= _locations(child)
    return found


def test_the_reference_of_the_fuzz_finds_what_is_there() -> None:
    assert _locations(BASE) == {"weights.bin"}
    assert len(list(external_tensors(BASE_BYTES, "g.onnx"))) == 3


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        check_external_data(data, "g.onnx", SIZES)
    except BundleError as error:
        assert str(error).startswith("g.onnx: ")
