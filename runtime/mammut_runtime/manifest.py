"""manifest.json, the one description of a bundle, as frozen dataclasses.

The exporter builds a `Manifest` and writes it with `bundle.write_manifest`; a device reads it with `read_manifest`.
Each field is a key of the file. docs/bundle.md says the same for readers in other languages, and more about how the
parts are used. Files, hashes and links are bundle.py's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from mammut_runtime.detection.rule import DetectionRule
from mammut_runtime.errors import BundleError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.strict import Between, Length, Matching, Omissible, from_dict, parse_json

FORMAT: Final = 1
"""The manifest format this runtime reads and writes."""
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.bin"
TOKENIZER_FILE = "tokenizer.json"

Width = Annotated[int, Between(1, 16_384)]
Layers = Annotated[int, Between(1, 256)]
TokenId = Annotated[int, Between(0, 1_999_999)]
Scheme = Literal["fp32", "fp16", "int8", "int8-dynamic", "int4"]
"""Precision of one graph. int8: weights and activations, ranges from calibration. int8-dynamic: the same, ranges found
at run time. int4: weights only, in blocks."""
FileName = Annotated[
    str,
    Matching(
        r"(?!(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$))[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*",
        "a plain file name (a-z, 0-9, '_', '-', single dots inside; no folder)",
    ),
    Length(1, 100),
]
"""Lower case only, so that two names never meet on a file system that ignores case; no name that Windows reserves."""
Line = Annotated[
    str, Matching(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*", "a text without control characters"), Length(1, 300)
]
"""One line for people. Without control characters, because it ends up on terminals."""
Prompt = Annotated[
    str, Matching(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f]*", "a text without control characters"), Length(0, 20_000)
]
Component = Annotated[float, Between(-1.001, 1.001)]
"""Of a unit vector; the margin is for rounding."""
_Share = Annotated[float, Between(0, 1)]

_TENSOR_NAME = Matching(r"[a-z_][a-z0-9_]*(\.[0-9]+)?", "a tensor name such as 'pixels' or 'past_k.0'")
_OUTPUT_NAME = Matching(r"[a-z][a-z0-9_.]*", "a name such as 'vision.embedding'")
_DIMENSION = re.compile(r"[a-z_][a-z0-9_]*( ?\+ ?[a-z_][a-z0-9_]*)?")
_GRAPHS_NEEDED: dict[str, tuple[str, ...]] = {
    "vision": (),
    "video": ("vision",),
    "text": (),
    "memory": ("vision",),
    "decoder": ("vision", "memory"),
    "detector": (),
}
_PLACEHOLDERS = {"caption": None, "ask": "{question}", "zero_shot": "{}"}
"""Task → the placeholder that its prompt, or each line of it, holds exactly once."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph."""

    name: Annotated[str, _TENSOR_NAME, Length(1, 80)]
    dtype: Literal["float32", "float16", "int64", "int32", "bool", "uint8", "int8"]
    shape: Annotated[tuple[int | str, ...], Length(0, 8)]
    """Sizes; a name stands for a size that the caller chooses ("batch"), "past+new" for a sum."""

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, int) and not 1 <= size <= 2_000_000:
                raise ValueError(f"shape: expected sizes from 1 to 2,000,000, got {size}")
            if isinstance(size, str) and (len(size) > 40 or not _DIMENSION.fullmatch(size)):
                raise ValueError(f"shape: expected a name such as 'batch' or 'past+new', got {size[:40]!r}")


@dataclass(frozen=True)
class GraphInfo:
    """A graph: its ONNX file, and what goes in and out, in the graph's own order."""

    file: Annotated[FileName, Matching(r".*\.onnx", "a file name that ends in .onnx")]
    inputs: Annotated[tuple[TensorInfo, ...], Length(1, 1200)]
    outputs: Annotated[tuple[TensorInfo, ...], Length(1, 1200)]


@dataclass(frozen=True)
class FileInfo:
    """What a file of the bundle must be."""

    sha256: Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits, lower case")]
    size_bytes: Annotated[int, Between(0, 2**40)]


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of the model, and how its embeddings are compared."""

    name: Line
    image_tokens: Annotated[int, Between(1, 65_536)]
    """N: tokens that leave the picture encoder, a class token counted."""
    vision_width: Width
    """Wv: channels of an image token."""
    embed_dim: Width
    """E: components of an embedding, picture's and text's."""
    text_width: Width
    """Wt: channels of the decoder; a multiple of `heads`."""
    text_layers: Layers
    """Self-attention blocks, each with a cache."""
    cross_layers: Layers
    """Cross-attention blocks, each with keys and values of the picture."""
    heads: Annotated[int, Between(1, 1024)]
    """H: attention heads of the decoder. A head has d = text_width / heads channels."""
    vocab_size: Annotated[int, Between(2, 2_000_000)]
    """V: logits per step. Every id of the bundle is below it."""
    parameters: Annotated[int, Between(1, 10**13)]
    """Of the whole model, for people."""
    logit_scale: Annotated[float, Between(1e-9, 1e9)]
    """Factor on the cosine of two embeddings (1 / temperature, already out of its logarithm)."""
    logit_bias: Annotated[float, Between(-1e9, 1e9)]
    """Added to the scaled cosine; 0.0 where the model has none."""
    similarity: Literal["softmax", "sigmoid"]
    """How scaled cosines become probabilities: over the candidates together, or each on its own."""
    video_frames: Annotated[int, Between(0, 1_024), Omissible()] = 0
    """F: frames that the `video` graph takes, neither more nor fewer; 0 in a bundle without that graph."""
    video_tokens: Annotated[int, Between(0, 65_536), Omissible()] = 0
    """Nv: tokens that leave the `video` graph, a class token counted; 0 in a bundle without it."""

    def __post_init__(self) -> None:
        if self.text_width % self.heads:
            raise ValueError(f"text_width {self.text_width} is not a multiple of heads {self.heads}")
        if (self.video_frames > 0) != (self.video_tokens > 0):
            raise ValueError(
                f"video_frames {self.video_frames} and video_tokens {self.video_tokens}: expected both above 0, or 0"
            )

    @property
    def token_counts(self) -> tuple[int, ...]:
        """How many tokens `memory` and `decoder` are given: a picture's N and, where there is one, a clip's Nv."""
        return (self.image_tokens, *([self.video_tokens] if self.video_tokens else []))


@dataclass(frozen=True)
class TextRule:
    """How texts become ids, beyond what tokenizer.json says."""

    context_length: Annotated[int, Between(2, 8192)]
    """Longest sequence the model has positions for, tokens, start and end counted."""
    max_tokens: Annotated[int, Between(1, 8192)]
    """Longest caption this bundle was made and checked for, new tokens, the end counted; at most context_length."""
    text_length: Annotated[int, Between(2, 8192)] | None
    """Texts for the `text` graph are padded to this length; null: any length will do."""
    pad_id: TokenId
    start_id: TokenId
    end_id: TokenId
    mask_pads: bool
    """Whether the `text` graph leaves pads out (ids equal to pad_id). If not, text_length is a number."""
    prompts: Annotated[dict[str, Prompt], Length(0, 16)]
    """Task → form. caption: what a caption begins with. ask: holds {question} once. zero_shot: templates, one a line,
    each holding {} once. A task that is left out has "", "{question}", "{}"."""
    cleaning: Literal["clip"] = "clip"
    """What is done to a text before the tokenizer. clip: ftfy, HTML entities, white space, lower case."""

    def __post_init__(self) -> None:
        if self.max_tokens > self.context_length:
            raise ValueError(f"max_tokens {self.max_tokens} is above context_length {self.context_length}")
        if self.text_length is not None and self.text_length > self.context_length:
            raise ValueError(f"text_length {self.text_length} is above context_length {self.context_length}")
        if self.text_length is None and not self.mask_pads:
            raise ValueError("text_length: expected a number, because mask_pads is false and so pads change the result")
        if self.start_id == self.end_id:
            raise ValueError(f"start_id and end_id are both {self.start_id}; expected two different ids")
        for task, form in self.prompts.items():
            _check_prompt(task, form)


@dataclass(frozen=True)
class ParityInfo:
    """Largest difference between this bundle, run by the runtime, and the PyTorch core, over the checked pictures."""

    max_abs_error: Annotated[float, Between(0, 1e6)]
    tolerance: Annotated[float, Between(0, 1e6)]

    def __post_init__(self) -> None:
        if self.max_abs_error > self.tolerance:
            raise ValueError(f"max_abs_error {self.max_abs_error} is above tolerance {self.tolerance}")


@dataclass(frozen=True)
class QuantizationInfo:
    """How a graph's numbers are stored and computed where that is not float32."""

    weights: Literal["float32", "float16", "int8", "int4"]
    activations: Literal["float32", "float16", "int8", "uint8"]
    drift: Annotated[dict[str, Annotated[float, Between(0, 1e6)]], Length(0, 64)]
    """Output → mean of 1 - cosine against float32 on the data the user gave; empty if not measured."""
    kept: Annotated[tuple[Line, ...], Length(0, 4096)] = ()
    """Layers of this graph that are in a higher precision than `weights` says: in 8 bits or in floating point."""


@dataclass(frozen=True)
class InputProfile:
    """Shapes that an engine built ahead of time is to take at one input: the smallest, the usual, the largest."""

    minimum: Annotated[tuple[Annotated[int, Between(0, 2_000_000)], ...], Length(0, 8)]
    optimum: Annotated[tuple[Annotated[int, Between(0, 2_000_000)], ...], Length(0, 8)]
    maximum: Annotated[tuple[Annotated[int, Between(0, 2_000_000)], ...], Length(0, 8)]


ROUNDING = 1e-9
"""A cosine of equal vectors may be this much below 1."""


@dataclass(frozen=True)
class DriftInfo:
    """What the whole bundle does differently from the same checkpoint in float32, on held-out data of the user."""

    data_sha256: Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits, lower case")]
    pictures: Annotated[int, Between(1, 10**9)]
    measures: Annotated[dict[str, Annotated[float, Between(-1, 1)]], Length(1, 64)]
    """Measure → value; 1 is no drift."""
    limits: Annotated[dict[str, Annotated[float, Between(-1, 1)]], Length(0, 64)]
    """Measure → the least that was acceptable."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Measures below their limits, in words. Not empty: the bundle was published with --accept-drift."""
        return tuple(
            f"{name} is {value:.4f}, expected at least {self.limits[name]:.4f}"
            for name, value in self.measures.items()
            if name in self.limits and not value >= self.limits[name] - ROUNDING
        )


@dataclass(frozen=True)
class CanaryBox:
    """Something that the detector proposes in the canary picture."""

    box: tuple[_Share, _Share, _Share, _Share]
    """Left, top, right, bottom in the square input, as parts of its side."""
    score: _Share
    """The highest of the canary's classes."""


@dataclass(frozen=True)
class Canary:
    """Small inputs and what the bundle made of them where it was exported. The device replays them (canary.py)."""

    seed: Annotated[int, Between(0, 2**32 - 1)]
    """Of the canary picture."""
    ids: Annotated[tuple[TokenId, ...], Length(0, 8192)]
    """A text as the row that goes into the `text` graph: start, ids, end, and pads up to text_length where that is a
    number. Empty in a bundle without that graph."""
    embedding: Annotated[tuple[Component, ...], Length(0, 16_384)]
    """Expected embedding of the picture, E components; empty in a bundle without `vision`."""
    text_embedding: Annotated[tuple[Component, ...], Length(0, 16_384)]
    """Expected embedding of `ids`, E components; empty in a bundle without `text`."""
    caption_ids: Annotated[tuple[TokenId, ...], Length(0, 8192)]
    """Expected greedy caption of the picture, ids without start and end; empty in a bundle without `decoder`."""
    tolerance: Annotated[float, Between(1e-9, 1)]
    """Largest difference of a component of an embedding, of a score, and of an edge of a box as a part of the side."""
    picture_hw: tuple[Annotated[int, Between(1, 4096)], Annotated[int, Between(1, 4096)]] = (192, 256)
    """Height and width of the canary picture, pixels. Not the model's: resizing and cropping are replayed too."""
    clip_embedding: Annotated[tuple[Component, ...], Length(0, 16_384), Omissible()] = ()
    """Expected embedding of the canary clip, E components; empty in a bundle without `video`."""
    boxes: Annotated[tuple[CanaryBox, ...], Length(0, 64), Omissible()] = ()
    """Expected among the proposals of `detector`, each with its score; empty in a bundle without that graph, and where
    none is far enough from a tie."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json."""

    format: Literal[1] = FORMAT
    target: Literal["onnxruntime", "openvino", "tensorrt"]
    precision: Literal["fp32", "fp16", "int8", "int8-dynamic", "int4", "mixed"]
    """Of every graph, or mixed; `quantization` has each graph's own."""
    opset: Annotated[int, Between(18, 30)]
    """ONNX operator set of the graphs."""
    made_by: Annotated[dict[str, Line], Length(0, 64)]
    """What made the bundle, for people: the checkpoint and its hash, versions of the tools."""
    model: ModelInfo
    preprocess: PreprocessRule
    text: TextRule
    graphs: Annotated[dict[str, GraphInfo], Length(1, 16)]
    """Graph → its file and tensors; the graphs that the bundle has, of those in `graph_contract`."""
    parity: Annotated[dict[Annotated[str, _OUTPUT_NAME], ParityInfo], Length(0, 256)]
    """"graph.output" → measured error and its tolerance."""
    quantization: Annotated[dict[str, QuantizationInfo], Length(0, 16)]
    """Graph → how it is quantized; graphs in float32 may be left out."""
    detection: Annotated[DetectionRule | None, Omissible()] = None
    """How the `detector` graph is used; null in a bundle without it."""
    drift: DriftInfo | None = None
    """Null where nothing was quantized, or nothing measured."""
    profiles: Annotated[dict[str, dict[str, InputProfile]], Length(0, 16)] = field(default_factory=dict)
    """Graph → input → shapes to build for; only in bundles for tensorrt."""
    files: Annotated[dict[FileName, FileInfo], Length(1, 256)]
    """Every file of the folder except manifest.json."""
    canary: Canary = field(repr=False)

    def __post_init__(self) -> None:
        checks = (
            self._file_problems(),
            self._graph_problems(),
            self._profile_problems(),
            self._id_problems(),
            self._canary_problems(),
        )
        for problem in itertools.chain(*checks):
            raise ValueError(problem)

    def _file_problems(self) -> Iterator[str]:
        if MANIFEST_FILE in self.files:
            yield f"files: {MANIFEST_FILE!r} cannot hold its own hash; leave it out"
        for graph, info in self.graphs.items():
            if info.file not in self.files:
                yield f"graphs.{graph}.file: {info.file!r} is not in files"
        if {"text", "decoder"} & self.graphs.keys() and TOKENIZER_FILE not in self.files:
            yield f"files: missing key {TOKENIZER_FILE!r}, which the graphs for texts need"

    def _graph_problems(self) -> Iterator[str]:
        half = self.target == "tensorrt" and halves_between(self.graphs)
        between: Literal["float32", "float16"] = "float16" if half else "float32"
        contract = graph_contract(self.model, self.preprocess.size, between, self.detection)
        for name, graph in self.graphs.items():
            if name == "video" and name not in contract:
                yield "model.video_frames: expected 1 or more in a bundle with the graph 'video', got 0"
                continue
            if name == "detector" and name not in contract:
                continue  # the missing rule is named below
            if name not in contract:
                yield f"graphs: unknown key {name[:80]!r}, expected some of {', '.join(contract)}"
                continue
            for needed in _GRAPHS_NEEDED[name]:
                if needed not in self.graphs:
                    yield f"graphs: missing key {needed!r}, which {name!r} needs"
            yield from _tensor_problems(f"graphs.{name}.inputs", graph.inputs, contract[name].inputs)
            yield from _tensor_problems(f"graphs.{name}.outputs", graph.outputs, contract[name].outputs)
        if (self.detection is None) != ("detector" not in self.graphs):
            yield "detection: expected an object in a bundle with the graph 'detector', and null in any other"
        if self.model.video_frames and "video" not in self.graphs:
            yield f"model.video_frames: expected 0 in a bundle without 'video', got {self.model.video_frames}"
        for name in self.quantization.keys() - self.graphs.keys():
            yield f"quantization: unknown key {name[:80]!r}, expected one of this bundle's graphs"

    def _profile_problems(self) -> Iterator[str]:
        if self.profiles and self.target != "tensorrt":
            yield f"profiles: expected none in a bundle for {self.target}, got {', '.join(self.profiles)}"
        for name, inputs in self.profiles.items():
            if name not in self.graphs:
                yield f"profiles: unknown key {name[:80]!r}, expected one of this bundle's graphs"
                continue
            tensors = {tensor.name: tensor for tensor in self.graphs[name].inputs}
            for tensor in tensors.values():
                if tensor.name not in inputs and any(isinstance(size, str) for size in tensor.shape):
                    yield f"profiles.{name}: missing key {tensor.name!r}, an input with free sizes"
            for key, profile in inputs.items():
                if key not in tensors:
                    yield f"profiles.{name}: unknown key {key[:80]!r}, expected inputs of the graph"
                else:
                    yield from _misfits(f"profiles.{name}.{key}", tensors[key], profile)
            yield from _contradictions(f"profiles.{name}", tensors, inputs)

    def _id_problems(self) -> Iterator[str]:
        text = self.text
        ids = {"text.pad_id": text.pad_id, "text.start_id": text.start_id, "text.end_id": text.end_id}
        ids["canary.ids"] = max(self.canary.ids, default=0)
        ids["canary.caption_ids"] = max(self.canary.caption_ids, default=0)
        for path, token in ids.items():
            if token >= self.model.vocab_size:
                yield f"{path}: expected ids below model.vocab_size {self.model.vocab_size}, got {token}"

    def _canary_problems(self) -> Iterator[str]:
        canary, size = self.canary, self.model.embed_dim
        for key, graph, found in (
            ("embedding", "vision", len(canary.embedding)),
            ("text_embedding", "text", len(canary.text_embedding)),
            ("clip_embedding", "video", len(canary.clip_embedding)),
        ):
            expected = size if graph in self.graphs else 0
            if found != expected:
                yield f"canary.{key}: expected {expected} components (graphs and model.embed_dim say so), got {found}"
        if canary.boxes and "detector" not in self.graphs:
            yield f"canary.boxes: expected none in a bundle without 'detector', got {len(canary.boxes)}"
        lengths = (self.text.text_length or 1, self.text.text_length or self.text.context_length)
        shortest, longest = lengths if "text" in self.graphs else (0, 0)
        if not shortest <= len(canary.ids) <= longest:
            yield f"canary.ids: expected {shortest} to {longest} ids, got {len(canary.ids)}"
        longest = self.text.max_tokens if "decoder" in self.graphs else 0
        if len(canary.caption_ids) > longest:
            yield f"canary.caption_ids: expected at most {longest} ids, got {len(canary.caption_ids)}"


def read_manifest(text: bytes, where: str = MANIFEST_FILE) -> Manifest:
    """The bytes of a manifest.json, checked. Raises BundleError, which names the first key that does not fit."""
    hint = f"this runtime reads format {FORMAT}; export the bundle again or update"
    data = parse_json(text, where, BundleError)
    if isinstance(data, dict) and type(data.get("format")) is int and data["format"] != FORMAT:
        raise BundleError(f"{where}: the bundle has format {data['format']}; {hint}")
    return from_dict(Manifest, data, where, BundleError, hint)


def graph_contract(
    model: ModelInfo,
    image_size: int,
    between: Literal["float32", "float16"] = "float32",
    detection: DetectionRule | None = None,
) -> dict[str, GraphInfo]:
    """Every graph of format 1 as its ONNX file must be: names, dtypes and sizes. A bundle may have some of them.

    Where the model has a video graph, `memory` and `decoder` look at pictures as well as at clips: the number of tokens
    they are given is then a free size, "seen", one of `model.token_counts`.

    image_size: side of the model's square input, pixels (S). between: dtype of what goes from graph to graph or from
    step to step (tokens, cross_*, past_*, present_*); float16 only in bundles for tensorrt, where it halves the caches.
    detection: the rule of a bundle that has the `detector` graph; its names ("classes") are any number.
    """
    heads, width = model.heads, model.text_width // model.heads

    def floats(name: str, *shape: int | str) -> TensorInfo:
        return TensorInfo(name, between if is_between(name) else "float32", shape)

    def caches(prefix: str, count: int, *shape: int | str) -> list[TensorInfo]:
        """k and v of each layer, in the order k.0, v.0, k.1, v.1."""
        return [floats(f"{prefix}_{kind}.{layer}", *shape) for layer in range(count) for kind in "kv"]

    seen = "seen" if model.video_frames else model.image_tokens
    seen = "seen" if model.video_frames else model.image_tokens
    embedding = floats("embedding", "batch", model.embed_dim)
    norm = floats("norm", "batch")
    cross = caches("cross", model.cross_layers, "batch", heads, seen, width)
    past = caches("past", model.text_layers, "batch", "beams", heads, "past", width)
    present = caches("present", model.text_layers, "batch", "beams", heads, "past+new", width)
    new_ids = TensorInfo("ids", "int64", ("batch", "beams", "new"))
    logits = floats("logits", "batch", "beams", model.vocab_size)

    def encoder(name: str, given: TensorInfo, tokens: int) -> GraphInfo:
        leaving = floats("tokens", "batch", tokens, model.vision_width)
        return GraphInfo(f"{name}.onnx", (given,), (leaving, embedding, norm))

    picture = (3, image_size, image_size)
    contract = {"vision": encoder("vision", floats("pixels", "batch", *picture), model.image_tokens)}
    if model.video_frames:
        frames = floats("frames", "batch", model.video_frames, *picture)
        contract["video"] = encoder("video", frames, model.video_tokens)
    if detection is not None:
        contract["detector"] = _detector_contract(model.embed_dim, detection)
    tokens = floats("tokens", "batch", seen, model.vision_width)
    return contract | {
        "text": GraphInfo("text.onnx", (TensorInfo("ids", "int64", ("batch", "length")),), (embedding, norm)),
        "memory": GraphInfo("memory.onnx", (tokens,), tuple(cross)),
        "decoder": GraphInfo("decoder.onnx", (new_ids, *past, *cross), (logits, *present)),
    }


def _detector_contract(embed_dim: int, rule: DetectionRule) -> GraphInfo:
    """novel: 1.0 for names that had no boxes in training, else 0.0. boxes: xyxy in pixels of the square input. scores:
    0 to 1, of every name for every proposal; boxes that overlap are not left out yet."""
    given: dict[str, tuple[int | str, ...]] = {
        "pixels": ("batch", 3, rule.size, rule.size),
        "classes": ("classes", embed_dim),
        "novel": ("classes",),
    }
    found: dict[str, tuple[int | str, ...]] = {
        "boxes": ("batch", rule.proposals, 4),
        "scores": ("batch", rule.proposals, "classes"),
    }

    def tensors(shapes: Mapping[str, tuple[int | str, ...]]) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(name, "float32", shape) for name, shape in shapes.items())

    return GraphInfo("detector.onnx", tensors(given), tensors(found))


def is_between(name: str) -> bool:
    """Whether a tensor goes from graph to graph, or from one step of the decoder to the next."""
    return name == "tokens" or name.startswith(("cross_", "past_", "present_"))


def halves_between(graphs: Mapping[str, GraphInfo]) -> bool:
    """Whether some tensor between graphs is float16; then all of them must be."""
    tensors = (tensor for graph in graphs.values() for tensor in (*graph.inputs, *graph.outputs))
    return any(tensor.dtype == "float16" and is_between(tensor.name) for tensor in tensors)


def _misfits(path: str, tensor: TensorInfo, profile: InputProfile) -> Iterator[str]:
    """Where a profile is not of the tensor's shape, or its sizes do not rise from minimum to maximum."""
    sizes = (profile.minimum, profile.optimum, profile.maximum)
    if any(len(each) != len(tensor.shape) for each in sizes):
        ranks = ", ".join(str(len(each)) for each in sizes)
        yield f"{path}: expected {len(tensor.shape)} sizes each, as {_described(tensor)} has, got {ranks}"
        return
    for size, low, usual, high in zip(tensor.shape, *sizes, strict=True):
        if not low <= usual <= high or high == 0:
            yield f"{path}: expected minimum <= optimum <= maximum, and a maximum above 0, got {low}, {usual}, {high}"
        if isinstance(size, int) and not low == usual == high == size:
            yield f"{path}: expected {size} throughout, as {_described(tensor)} has, got {low}, {usual}, {high}"


def _contradictions(
    path: str, tensors: Mapping[str, TensorInfo], profiles: Mapping[str, InputProfile]
) -> Iterator[str]:
    """Where two inputs give one free size, such as "batch", different limits."""
    seen: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for name, profile in profiles.items():
        sizes = zip(profile.minimum, profile.optimum, profile.maximum, strict=False)
        for size, limits in zip(tensors[name].shape if name in tensors else (), sizes, strict=False):
            if isinstance(size, str):
                first, wanted = seen.setdefault(size, (name, limits))
                if limits != wanted:
                    yield f"{path}.{name}: {size} is {limits}, but {wanted} in {first}; expected the same"


def _tensor_problems(path: str, found: tuple[TensorInfo, ...], expected: tuple[TensorInfo, ...]) -> Iterator[str]:
    """Order does not matter; a size that the contract leaves open may be fixed, except "seen", which has two values."""
    by_name = {tensor.name: tensor for tensor in found}
    if len(by_name) != len(found):
        yield f"{path}: two tensors have the same name"
    for want in expected:
        tensor = by_name.pop(want.name, None)
        if tensor is None:
            yield f"{path}: missing tensor {want.name!r}"
            continue
        fits = len(tensor.shape) == len(want.shape) and all(
            _may_be(size, got) for size, got in zip(want.shape, tensor.shape, strict=True)
        )
        if tensor.dtype != want.dtype or not fits:
            yield f"{path}: {want.name}: expected {_described(want)}, got {_described(tensor)}"
    for name in by_name:
        yield f"{path}: unknown tensor {name!r}"


def _may_be(size: int | str, got: int | str) -> bool:
    if size == "seen":
        return isinstance(got, str)
    return isinstance(size, str) or size == got


def _described(tensor: TensorInfo) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


def _check_prompt(task: str, form: str) -> None:
    if task not in _PLACEHOLDERS:
        raise ValueError(f"prompts: unknown key {task[:80]!r}, expected some of {', '.join(_PLACEHOLDERS)}")
    placeholder = _PLACEHOLDERS[task]
    for line in form.split("\n") if task == "zero_shot" else [form]:
        rest = line if placeholder is None else line.replace(placeholder, "", 1)
        if (placeholder is not None and rest == line) or "{" in rest or "}" in rest:
            wanted = f"{placeholder} once and no other braces" if placeholder else "no braces"
            raise ValueError(f"prompts.{task}: expected {wanted}, got {line[:80]!r}")
