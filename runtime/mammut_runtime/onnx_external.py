"""Says which outside files an ONNX graph refers to, without an ONNX library and before an engine opens it.

An ONNX file is a protobuf message. A tensor in it may say "my data lie in file LOCATION from OFFSET, LENGTH bytes", and
a tensor may stand in many places: among a graph's initializers, in a node's attribute, in the body of a branch, in a
function. This walks every place where the format allows one and checks what it says. It reads nothing else.

The field numbers are those of onnx.proto3; they never change, for files in the world depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mammut_runtime.errors import BundleError

_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message → number of a field → the message in it. Fields that lead to no tensor are left out."""
_EXTERNAL_DATA = 13
"""Field of a tensor: repeated pairs of texts, key and value."""
_KEYS = frozenset({"location", "offset", "length", "checksum"})
_DEEPEST = 100
"""Messages inside messages; protobuf's own readers stop here too."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types. 3 and 4 (groups) are of the past; ONNX never had them."""


@dataclass(frozen=True)
class ExternalTensor:
    """Where a tensor says that its data are."""

    location: str
    offset_bytes: int
    length_bytes: int | None
    """None: to the end of the file."""


def check_external_data(model: bytes, where: str, sizes_bytes: Mapping[str, int]) -> None:
    """Check that a graph takes data from the files in `sizes_bytes` (name → size) only, and from inside them.

    where: names the graph in messages. Raises BundleError for another file or range, and for bytes that are not ONNX.
    """
    for tensor in external_tensors(model, where):
        size = sizes_bytes.get(tensor.location)
        if size is None:
            expected = " or ".join(map(repr, sizes_bytes)) or "no other file"
            raise BundleError(
                f"{where}: takes data from the file {tensor.location[:80]!r}, expected {expected}; "
                f"do not use this bundle, export it again"
            )
        end = tensor.offset_bytes + (tensor.length_bytes or 0)
        if end > size:
            raise BundleError(
                f"{where}: takes bytes {tensor.offset_bytes:,} to {end:,} from {tensor.location!r}, which has "
                f"{size:,}; the graph and its weights do not belong together, export the bundle again"
            )


def external_tensors(model: bytes, where: str) -> Iterator[ExternalTensor]:
    """Every tensor of an ONNX file that has its data outside. Raises BundleError for bytes that are not ONNX."""
    # One entry per message on the way down: its kind, and its fields that are still to come.
    stack = [("model", message_fields(memoryview(model), where))]
    while stack:
        kind, fields = stack[-1]
        child = next(((_CHILDREN[kind][number], value) for number, value in fields if number in _CHILDREN[kind]), None)
        if child is None:
            stack.pop()
        elif child[0] == "tensor":
            yield from _external_data(child[1], where)
        elif len(stack) == _DEEPEST:
            raise BundleError(f"{where}: messages are nested more than {_DEEPEST} deep; we write no such graphs")
        else:
            stack.append((child[0], message_fields(child[1], where)))


def _external_data(tensor: memoryview, where: str) -> Iterator[ExternalTensor]:
    found: dict[str, str] = {}
    for number, entry in message_fields(tensor, where):
        if number != _EXTERNAL_DATA:
            continue
        pair = {1: "", 2: ""} | {n: _text(value, where) for n, value in message_fields(entry, where) if n in (1, 2)}
        if pair[1] not in _KEYS or pair[1] in found:
            raise BundleError(f"{where}: external data of a tensor: unknown or repeated key {pair[1][:80]!r}")
        found[pair[1]] = pair[2]
    if found:
        length = found.get("length")
        yield ExternalTensor(
            found.get("location", ""),
            _count(found.get("offset", "0"), where),
            None if length is None else _count(length, where),
        )


def _text(value: memoryview, where: str) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"{where}: external data of a tensor: a text that is not UTF-8") from None


def _count(digits: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", digits):
        raise BundleError(f"{where}: external data of a tensor: expected a number of bytes, got {digits[:80]!r}")
    return int(digits)


def message_fields(message: memoryview, where: str) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field of a protobuf message, in order; other fields are stepped over.

    Raises BundleError, which begins with `where`, for bytes that are not such a message.
    """
    for number, content, has_length in all_fields(message, where):
        if has_length and not isinstance(content, int):
            yield number, content


def all_fields(message: memoryview, where: str) -> Iterator[tuple[int, memoryview | int, bool]]:
    """Number and content of every field of a protobuf message, and whether it is length-delimited.

    The content is a number for a varint, else bytes: 4 or 8 of them for a number of fixed size.

    Raises BundleError as message_fields does.
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position, where)
        number, wire = tag >> 3, tag & 7
        if tag >= 2**32 or number == 0:  # readers in C++ cut a tag to 32 bits: it would be another field to them
            raise BundleError(f"{where}: not a readable ONNX file (field number {number})")
        if wire == _VARINT:
            value, position = _varint(message, position, where)
            yield number, value, False
            continue
        if wire == _BYTES:
            length, position = _varint(message, position, where)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise BundleError(f"{where}: not a readable ONNX file (wire type {wire})")
        if length > end - position:
            raise BundleError(f"{where}: not a readable ONNX file (a field of {length:,} bytes is cut off)")
        yield number, message[position : position + length], wire == _BYTES
        position += length


def _varint(message: memoryview, position: int, where: str) -> tuple[int, int]:
    """The number that begins at `position`, and the position after it."""
    if position < len(message) and (byte := message[position]) < 0x80:  # nearly all are this short
        return byte, position + 1
    result = 0
    for index, byte in enumerate(message[position : position + 10]):
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return result, position + index + 1
    raise BundleError(f"{where}: not a readable ONNX file (a number does not end); it is cut off or damaged")
