"""Reads an ONNX file as far as a check of its operators, types and shapes needs it, without an ONNX library.

What comes out are nodes, the small tensors, and the types and shapes that are written down. Weights stay where they
are. The field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mammut_runtime.errors import BundleError
from mammut_runtime.onnx_external import all_fields

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, DOUBLE, BFLOAT16, UINT4, INT4 = 1, 2, 3, 6, 7, 9, 10, 11, 16, 21, 22
"""ONNX' numbers of the element types that are named here."""
TYPE_NAMES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8", 18: "float8", 19: "float8", 20: "float8", 21: "uint4", 22: "int4", 23: "float4",
}  # fmt: skip
MAX_DATA_BYTES = 1 << 20
"""Of a tensor whose values are asked for; the ones that matter here have a number per channel."""
_Fields = dict[int, list[memoryview | int]]


@dataclass(frozen=True)
class TensorHeader:
    """A constant: its type and shape, and where its values are."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    _fields: _Fields = field(repr=False, compare=False, default_factory=dict)
    _where: str = field(repr=False, compare=False, default="")

    def data(self, folder: Path) -> bytes | None:
        """The values as they are stored, little endian; None for more than MAX_DATA_BYTES, or a form of storing that
        is not read here. folder: where files of outside data are; only plain names are followed."""
        if 13 in self._fields:
            return self._outside(folder)
        for number, code in ((9, ""), (5, "b"), (7, "q")):  # raw_data, int32_data, int64_data
            if number in self._fields:
                return self._inside(number, code)
        return b"" if 0 in self.shape else None

    def _inside(self, number: int, code: str) -> bytes | None:
        values = self._fields[number]
        if not code:
            content = values[0]
            return None if isinstance(content, int) or len(content) > MAX_DATA_BYTES else bytes(content)
        numbers = list(_numbers(values, self._where))
        if len(numbers) > MAX_DATA_BYTES:
            return None
        width = 8 if code == "q" else 4 if self.dtype == INT32 else 1
        return b"".join((each & (256**width - 1)).to_bytes(width, "little") for each in numbers)

    def _outside(self, folder: Path) -> bytes | None:
        pairs = {}
        for entry in self._fields[13]:
            found = _collect(entry, self._where)
            pairs[_text(found, 1)] = _text(found, 2)
        name, offset, length = pairs.get("location", ""), pairs.get("offset", "0"), pairs.get("length", "")
        if "/" in name or "\\" in name or name in ("", ".", "..") or not (offset + length).isdigit() or not length:
            return None
        if int(length) > MAX_DATA_BYTES:
            return None
        with (folder / name).open("rb") as file:
            file.seek(int(offset))
            return file.read(int(length))


@dataclass(frozen=True)
class Node:
    """One operator."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    """Names; "" for one that is left out."""
    outputs: tuple[str, ...]
    attributes: dict[str, int | float | str | tuple[int, ...]]
    """Numbers, texts and lists of whole numbers; others are left out."""
    value: TensorHeader | None
    """The attribute that is a tensor (of Constant, ConstantOfShape)."""

    @property
    def shown(self) -> str:
        """Its name, or the output's where it has none."""
        return self.name or (self.outputs[0] if self.outputs else "?")


@dataclass(frozen=True)
class ValueInfo:
    """A tensor that is described in the file."""

    name: str
    dtype: int
    shape: tuple[int | str, ...] | None
    """A text, perhaps empty, for a size that is open; None where nothing is said."""


@dataclass(frozen=True)
class OnnxGraph:
    """What a file holds. Nodes of branches and loops follow the node they belong to."""

    opset: int
    """Of the standard operators."""
    functions: int
    nodes: tuple[Node, ...]
    constants: dict[str, TensorHeader]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    values: dict[str, ValueInfo]
    """Everything that is described, inputs and outputs included."""


def read_onnx(model: bytes, where: str) -> OnnxGraph:
    """Read an ONNX file's bytes. Raises BundleError, which begins with `where`, for bytes that are none."""
    fields = _collect(memoryview(model), where)
    opset = 0
    for entry in fields[8]:
        each = _collect(entry, where)
        if _text(each, 1) in ("", "ai.onnx"):
            opset = _number(each, 2)
    if not fields[7]:
        raise BundleError(f"{where}: not a readable ONNX file (no graph)")
    nodes: list[Node] = []
    constants: dict[str, TensorHeader] = {}
    graph = _collect(fields[7][0], where)
    _read_graph(graph, where, nodes, constants, 0)
    inputs = tuple(_value(each, where) for each in graph[11])
    outputs = tuple(_value(each, where) for each in graph[12])
    described = [*(_value(each, where) for each in graph[13]), *inputs, *outputs]
    values = {each.name: each for each in described}
    return OnnxGraph(opset, len(fields[25]), tuple(nodes), constants, inputs, outputs, values)


def _read_graph(graph: _Fields, where: str, nodes: list[Node], constants: dict[str, TensorHeader], depth: int) -> None:
    if depth > 20:
        raise BundleError(f"{where}: graphs are nested more than 20 deep; we write no such graphs")
    for entry in graph[5]:
        tensor = _tensor(entry, where)
        constants[tensor.name] = tensor
    for entry in graph[1]:
        fields = _collect(entry, where)
        attributes: dict[str, int | float | str | tuple[int, ...]] = {}
        value = None
        inner = []
        for each in fields[5]:
            attribute = _collect(each, where)
            name = _text(attribute, 1)
            if attribute[5]:
                value = _tensor(attribute[5][0], where)
            elif attribute[6]:
                inner.append(_collect(attribute[6][0], where))
            else:
                attributes[name] = _plain(attribute, where)
        nodes.append(
            Node(
                _text(fields, 3),
                _text(fields, 4),
                _text(fields, 7),
                tuple(_texts(fields, 1)),
                tuple(_texts(fields, 2)),
                attributes,
                value,
            )
        )
        for branch in inner:
            _read_graph(branch, where, nodes, constants, depth + 1)


def _plain(attribute: _Fields, where: str) -> int | float | str | tuple[int, ...]:
    """The attribute's value by its stated type: 1 float, 2 int, 3 text, 7 ints."""
    kind = _number(attribute, 20)
    if kind == 1 and attribute[2] and not isinstance(attribute[2][0], int):
        return float(struct.unpack("<f", attribute[2][0])[0])
    if kind == 3:
        return _text(attribute, 4)
    if kind == 7:
        return tuple(_signed(each) for each in _numbers(attribute[8], where))
    return _signed(_number(attribute, 3))


def _tensor(entry: memoryview | int, where: str) -> TensorHeader:
    fields = _collect(entry, where)
    shape = tuple(_signed(each) for each in _numbers(fields[1], where))
    return TensorHeader(_text(fields, 8), _number(fields, 2), shape, dict(fields), where)


def _value(entry: memoryview | int, where: str) -> ValueInfo:
    fields = _collect(entry, where)
    kind = _collect(fields[2][0], where) if fields[2] else defaultdict(list)
    tensor = _collect(kind[1][0], where) if kind[1] else defaultdict(list)
    shape: tuple[int | str, ...] | None = None
    if tensor[2]:
        sizes = [_collect(each, where) for each in _collect(tensor[2][0], where)[1]]
        shape = tuple(_signed(_number(size, 1)) if size[1] else _text(size, 2) for size in sizes)
    return ValueInfo(_text(fields, 1), _number(tensor, 1), shape)


# --- protobuf ---------------------------------------------------------------------------------------------------------


def _collect(message: memoryview | int, where: str) -> _Fields:
    """Number of a field -> its contents, in order."""
    if isinstance(message, int):
        raise BundleError(f"{where}: not a readable ONNX file (a number where a message belongs)")
    found: _Fields = defaultdict(list)
    for number, content, _ in all_fields(message, where):
        found[number].append(content)
    return found


def _numbers(contents: list[memoryview | int], where: str) -> Iterator[int]:
    """Repeated varints, each on its own or packed into bytes."""
    for content in contents:
        if isinstance(content, int):
            yield content
            continue
        value = shift = 0
        for byte in content:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                yield value & (2**64 - 1)
                value = shift = 0
        if shift:
            raise BundleError(f"{where}: not a readable ONNX file (a number does not end)")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _number(fields: _Fields, number: int) -> int:
    value = fields[number][0] if fields[number] else 0
    return value if isinstance(value, int) else 0


def _texts(fields: _Fields, number: int) -> list[str]:
    return [str(each, "utf-8", "replace") for each in fields[number] if not isinstance(each, int)]


def _text(fields: _Fields, number: int) -> str:
    texts = _texts(fields, number)
    return texts[0] if texts else ""
