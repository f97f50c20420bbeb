"""The manifest: what it takes, and that everything else is refused by name with a BundleError."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import BundleError
from mammut_runtime.manifest import Manifest, graph_contract, read_manifest
from mammut_runtime.strict import to_dict, to_json

MODEL = {
    "name": "tiny", "image_tokens": 4, "vision_width": 6, "embed_dim": 3, "text_width": 8, "text_layers": 2,
    "cross_layers": 1, "heads": 2, "vocab_size": 64, "parameters": 1234, "logit_scale": 10.0, "logit_bias": -5,
    "similarity": "sigmoid",
}  # fmt: skip


def _tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def valid() -> dict[str, Any]:
    """A manifest as it stands in the file, written out so that the tests do not take it from the code they test."""
    cross = [_tensor(f"cross_{kind}.0", "float32", "batch", 2, 4, 4) for kind in "kv"]
    past, present = (
        [
            _tensor(f"{name}_{kind}.{layer}", "float32", "batch", "beams", 2, size, 4)
            for layer in (0, 1)
            for kind in "kv"
        ]
        for name, size in (("past", "past"), ("present", "past+new"))
    )
    embedding = _tensor("embedding", "float32", "batch", 3)
    norm = _tensor("norm", "float32", "batch")
    tokens = _tensor("tokens", "float32", "batch", 4, 6)
    graphs = {
        "vision": ([_tensor("pixels", "float32", "batch", 3, 32, 32)], [tokens, embedding, norm]),
        "text": ([_tensor("ids", "int64", "batch", "length")], [embedding, norm]),
        "memory": ([tokens], cross),
        "decoder": (
            [_tensor("ids", "int64", "batch", "beams", "new"), *past, *cross],
            [_tensor("logits", "float32", "batch", "beams", 64), *present],
        ),
    }
    names = [*(f"{graph}.onnx" for graph in graphs), "weights.bin", "tokenizer.json"]
    return {
        "format": 1,
        "target": "onnxruntime",
        "precision": "fp32",
        "opset": 21,
        "made_by": {"checkpoint": "demo", "torch": "2.13.0"},
        "model": dict(MODEL),
        "preprocess": {
            "size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic",
            "resize_mode": "shortest", "fill": 0,
        },
        "text": {
            "context_length": 24, "max_tokens": 20, "text_length": 24, "pad_id": 0, "start_id": 62, "end_id": 63,
            "mask_pads": False,
            "prompts": {"caption": "", "ask": "question: {question} answer:", "zero_shot": "a {}.\na photo of a {}."},
            "cleaning": "clip",
        },
        "graphs": {
            name: {"file": f"{name}.onnx", "inputs": copy.deepcopy(inputs), "outputs": copy.deepcopy(outputs)}
            for name, (inputs, outputs) in graphs.items()
        },
        "parity": {"vision.embedding": {"max_abs_error": 1e-6, "tolerance": 1e-4}},
        "quantization": {"decoder": {"weights": "float32", "activations": "float32", "drift": {}, "kept": []}},
        "drift": None,
        "profiles": {},
        "files": {name: {"sha256": "0" * 64, "size_bytes": 10} for name in names},
        "canary": {
            "seed": 7, "ids": [62, 5, 63, *[0] * 21], "embedding": [1.0, 0.0, 0.0], "text_embedding": [0.6, -0.8, 0],
            "caption_ids": [5, 6], "tolerance": 1e-3, "picture_hw": [192, 256],
        },
    }  # fmt: skip


def read(data: object) -> Manifest:
    return read_manifest(json.dumps(data).encode())


def test_a_valid_manifest_survives_the_round_trip() -> None:
    manifest = read(valid())
    assert read_manifest(to_json(manifest)) == manifest
    assert to_dict(manifest) == json.loads(to_json(manifest)) == valid()
    assert manifest.model.logit_bias == -5.0 and isinstance(manifest.model.logit_bias, float)


def test_graphs_written_by_hand_equal_the_contract() -> None:
    manifest = read(valid())
    assert manifest.graphs == graph_contract(manifest.model, manifest.preprocess.size)


@pytest.mark.parametrize(
    "kept", [["vision"], ["text"], ["vision", "text"], ["vision", "memory"], ["vision", "memory", "decoder"]]
)
def test_a_bundle_may_have_some_of_the_graphs(kept: list[str]) -> None:
    data = valid()
    data["graphs"] = {name: data["graphs"][name] for name in kept}
    data["quantization"] = {}
    for graph, keys in {"vision": ["embedding"], "text": ["ids", "text_embedding"], "decoder": ["caption_ids"]}.items():
        if graph not in kept:
            data["canary"].update({key: [] for key in keys})
    assert list(read(data).graphs) == kept


def test_batch_may_be_fixed() -> None:
    data = valid()
    data["graphs"]["vision"]["inputs"][0]["shape"][0] = 1
    assert read(data).graphs["vision"].inputs[0].shape == (1, 3, 32, 32)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Change the value at a path; the last item is the value. A key that is not there yet is added."""

    def change(data: Any) -> None:
        *way, key, value = path
        for step in way:
            data = data[step]
        data[key] = value

    return change


def _drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    return change


REFUSED = [
    (_set("format", 2), r"the bundle has format 2; this runtime reads format 1; export the bundle again or update"),
    (_set("format", "1"), r"format: expected one of 1, got '1'"),
    (_set("format", True), r"format: expected one of 1, got true"),
    (_set("formt", 1), r"manifest.json: unknown key 'formt'; this runtime reads format 1"),
    (_drop("canary"), r"manifest.json: missing key 'canary'"),
    (_set("graphs", "vision", "foo", 1), r"manifest.json: graphs.vision: unknown key 'foo'; this runtime reads"),
    (_drop("graphs", "vision", "file"), r"graphs.vision: missing key 'file'"),
    (_drop("text", "cleaning"), r"text: missing key 'cleaning'"),
    (_set("preprocess", "colour", "bgr"), r"preprocess: unknown key 'colour'"),
    (_drop("preprocess", "mean"), r"preprocess: missing key 'mean'"),
    (_set("preprocess", "size", 0), r"manifest.json: preprocess.*size.* from 1 to 4,096"),
    (_set("preprocess", "std", [1, 1, 0]), r"preprocess.*std.* above 0"),
    (_set("preprocess", "interpolation", "box"), r"preprocess.*interpolation.*expected one of"),
    (_set("model", "heads", "2"), r"model.heads: expected a whole number, got '2'"),
    (_set("model", "heads", True), r"model.heads: expected a whole number, got true"),
    (_set("model", "heads", 2.0), r"model.heads: expected a whole number, got 2.0"),
    (_set("model", "heads", 3), r"model: text_width 8 is not a multiple of heads 3"),
    (_set("model", "embed_dim", 0), r"model.embed_dim: expected a number from 1 to 16,384, got 0"),
    (_set("model", "embed_dim", 10**30), r"whole number of 31 digits"),
    (_set("model", "image_tokens", -1), r"model.image_tokens: expected a number from 1"),
    (_set("model", "logit_scale", 0), r"model.logit_scale: expected a number from"),
    (_set("model", "similarity", "cosine"), r"model.similarity: expected one of 'softmax', 'sigmoid', got 'cosine'"),
    (_set("model", "name", "a\x1b[2Jb"), r"model.name: expected a text without control characters"),
    (_set("model", "name", "\ud800"), r"model.name: expected a text, got half of a character"),
    (_set("model", []), r"model: expected an object, got a list"),
    (_set("made_by", "torch", 2), r"made_by.torch: expected a text, got 2"),
    (_set("target", "coreml"), r"target: expected one of 'onnxruntime'"),
    (_set("text", "max_tokens", 25), r"text: max_tokens 25 is above context_length 24"),
    (_set("text", "text_length", 25), r"text: text_length 25 is above context_length 24"),
    (_set("text", "text_length", None), r"text: text_length: expected a number, because mask_pads is false"),
    (_set("text", "end_id", 62), r"start_id and end_id are both 62"),
    (_set("text", "end_id", 64), r"text.end_id: expected ids below model.vocab_size 64, got 64"),
    (_set("text", "pad_id", -1), r"text.pad_id: expected a number from 0"),
    (_set("text", "prompts", "sing", "la"), r"prompts: unknown key 'sing', expected some of caption, ask, zero_shot"),
    (_set("text", "prompts", "ask", "answer:"), r"prompts.ask: expected \{question\} once"),
    (_set("text", "prompts", "ask", "{question.__class__}"), r"prompts.ask: expected \{question\} once"),
    (_set("text", "prompts", "ask", "{question} {question}"), r"prompts.ask: expected \{question\} once"),
    (_set("text", "prompts", "caption", "{}"), r"prompts.caption: expected no braces"),
    (_set("text", "prompts", "zero_shot", "a {}\n"), r"prompts.zero_shot: expected \{\} once"),
    (_set("text", "prompts", "zero_shot", "a {} {0}"), r"prompts.zero_shot: expected \{\} once"),
    (_set("graphs", "vision", "file", "../vision.onnx"), r"graphs.vision.file: expected a plain file name"),
    (_set("graphs", "vision", "file", "weights.bin"), r"graphs.vision.file: expected a file name that ends in .onnx"),
    (_set("graphs", "vision", "file", "other.onnx"), r"graphs.vision.file: 'other.onnx' is not in files"),
    (_set("graphs", {}), r"graphs: expected 1 to 16 keys, got 0"),
    (_drop("graphs", "memory"), r"graphs: missing key 'memory', which 'decoder' needs"),
    (_set("graphs", "vision", "inputs", 0, "dtype", "float64"), r"graphs.vision.inputs\[0\].dtype: expected one of"),
    (_set("graphs", "vision", "inputs", 0, "dtype", "uint8"), r"pixels: expected float32\[.*\], got uint8"),
    (_set("graphs", "vision", "inputs", 0, "name", "Pixels"), r"vision.inputs\[0\].name: expected a tensor name"),
    (_set("graphs", "vision", "inputs", 0, "name", "picture"), r"graphs.vision.inputs: missing tensor 'pixels'"),
    (_set("graphs", "vision", "inputs", 0, "shape", 2, 64), r"vision.inputs: pixels: expected float32\[batch, 3, 32,"),
    (_set("graphs", "vision", "inputs", 0, "shape", 0, 0), r"inputs\[0\]: shape: expected sizes from 1"),
    (_set("graphs", "vision", "inputs", 0, "shape", 0, 10**9), r"inputs\[0\]: shape: expected sizes from 1"),
    (_set("graphs", "vision", "inputs", 0, "shape", 0, 1.5), r"shape\[0\]: expected a whole number or a text, got 1.5"),
    (_set("graphs", "vision", "inputs", 0, "shape", 0, "a b"), r"expected a name such as 'batch'"),
    (_set("graphs", "vision", "outputs", []), r"graphs.vision.outputs: expected 1 to 1,200 items, got 0"),
    (_drop("graphs", "decoder", "outputs", 3), r"graphs.decoder.outputs: missing tensor 'present_k.1'"),
    (
        _set("quantization", "x", {"weights": "int8", "activations": "int8", "drift": {}, "kept": []}),
        r"quantization: unknown key",
    ),
    (_set("parity", "vision.embedding", "max_abs_error", 1.0), r"max_abs_error 1.0 is above tolerance 0.0001"),
    (_set("parity", "Vision!", {"max_abs_error": 0, "tolerance": 0}), r"parity: expected a name such as"),
    (_drop("files", "tokenizer.json"), r"files: missing key 'tokenizer.json', which the graphs for texts need"),
    (_set("files", "weights.bin", "sha256", "0" * 63), r"files.'weights.bin'.sha256: expected 64 hexadecimal digits"),
    (_set("files", "weights.bin", "sha256", "G" * 64), r"sha256: expected 64 hexadecimal digits"),
    (_set("files", "weights.bin", "size_bytes", -1), r"size_bytes: expected a number from 0"),
    (_set("files", "manifest.json", {"sha256": "0" * 64, "size_bytes": 1}), r"'manifest.json' cannot hold its own"),
    (_set("canary", "embedding", [1.0, 0.0]), r"canary.embedding: expected 3 components .*, got 2"),
    (_set("canary", "embedding", 0, 7.0), r"canary.embedding\[0\]: expected a number from -1.001 to 1.001"),
    (_set("canary", "text_embedding", []), r"canary.text_embedding: expected 3 components .*, got 0"),
    (_set("canary", "ids", [62, 63]), r"canary.ids: expected 24 to 24 ids, got 2"),
    (_set("canary", "ids", [64] * 24), r"canary.ids: expected ids below model.vocab_size 64, got 64"),
    (_set("canary", "caption_ids", [1] * 21), r"canary.caption_ids: expected at most 20 ids, got 21"),
    (_set("canary", "seed", 2**32), r"canary.seed: expected a number from 0"),
    (_set("canary", "tolerance", 0), r"canary.tolerance: expected a number from"),
    (_set("canary", "picture_hw", [192]), r"canary.picture_hw: expected a list of 2 items, got 1"),
    (_set("canary", "picture_hw", [192, 10**6]), r"canary.picture_hw\[1\]: expected a number from 1 to 4,096"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_refused_by_name(change: Callable[[dict[str, Any]], None], message: str) -> None:
    data = valid()
    read(data)  # control: without the change it is taken
    change(data)
    with pytest.raises(BundleError, match=message):
        read(data)


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "a\\b", "/etc/passwd", "c:x", "c:", ".hidden", "a..b", "a.", "", "Upper", "con", "nul.txt", "é",
     "a b", "a\n", "a" * 101, "..", "."],
)  # fmt: skip
def test_file_names_that_are_not_plain(name: str) -> None:
    data = valid()
    data["files"]["a-b_c.1.bin"] = {"sha256": "0" * 64, "size_bytes": 1}
    read(data)  # control
    data["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
    with pytest.raises(BundleError, match=r"files: expected (a plain file name|1 to 100 characters)"):
        read(data)


def test_one_tensor_twice() -> None:
    data = valid()
    outputs = data["graphs"]["vision"]["outputs"]
    outputs.append(outputs[0])
    with pytest.raises(BundleError, match=r"graphs.vision.outputs: two tensors have the same name"):
        read(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[]", "expected an object, got a list"),
        (b"null", "expected an object, got null"),
        (b'{"format": 1, "format": 1}', "the key 'format' is given twice"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": -Infinity}', "-Infinity is not a JSON number"),
        (json.dumps(valid()).replace("10.0", "1e999").encode(), "model.logit_scale: expected a finite number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * 4_000_001, "4,000,001 bytes, expected at most 4,000,000"),
    ],
)
def test_text_that_is_no_manifest(text: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_manifest(text)


# --- fuzz: whatever is changed, nothing but a BundleError comes out ---------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["../x", "{}"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in _places(item, (*path, key))]


PLACES = _places(valid())


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PLACES),
    st.sampled_from(["set", "drop", "add", "copy"]),
    JSON_VALUES,
    st.text(max_size=8),
    st.sampled_from(PLACES),
)
def test_fuzz_of_values(place: tuple[Any, ...], kind: str, value: Any, key: str, other: tuple[Any, ...]) -> None:
    data = valid()
    holder: Any = data
    for step in place[:-1]:
        holder = holder[step]
    if kind == "drop":
        del holder[place[-1]]
    elif kind == "add" and isinstance(holder, dict):
        holder[key] = value
    elif kind == "copy":
        holder[place[-1]] = copy.deepcopy(_at(data, other))
    else:
        holder[place[-1]] = value
    _read_or_refuse(json.dumps(data).encode("utf-8", "surrogatepass"))


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        data = data[step]
    return data


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzz_of_bytes(data: st.DataObject) -> None:
    text = bytearray(json.dumps(valid()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 6))
        text[start : start + length] = data.draw(st.binary(max_size=6))
    _read_or_refuse(bytes(text))


def _read_or_refuse(text: bytes) -> None:
    try:
        manifest = read_manifest(text)
    except BundleError as error:
        message = str(error)
        assert message.startswith("manifest.json: ")
        assert len(message) < 1000 and message.encode() and "\n" not in message.replace("\\n", "")
    else:
        assert read_manifest(to_json(manifest)) == manifest


# --- docs/bundle.md --------------------------------------------------------------------------------------------------


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()

    def keys(data: Any) -> Iterator[str]:
        for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
            if isinstance(key, str):
                yield key
            yield from keys(value)

    free = {"made_by", "files"}  # their own keys are for the exporter to choose
    named = {key for key in keys({k: v if k not in free else list(v.values()) for k, v in valid().items()})}
    missing = {key for key in named if not re.search(rf"`([^`]*[^`a-z_])?{re.escape(key)}`", page)}
    assert missing == {"vision.embedding"}  # control: a key of parity is free as well, and not on the page
