"""Connects the conformance kit (../shared/conformance/check.py) to this project; its docstring says what it wants.

MAMMUT_ADAPTER=torch (the default) runs the PyTorch core; MAMMUT_ADAPTER=bundle exports each model to an fp32 bundle and
runs that with the runtime on ONNX Runtime, MAMMUT_ADAPTER=openvino on OpenVINO. The graphs are the same for both: with
MAMMUT_ADAPTER_BUNDLES=FOLDER, bundles are kept there, and made once.

The kit's models come without a tokenizer; ours needs some 500 ids for the bytes alone. So a checkpoint with fewer gets
rows that nothing uses, and logits are cut back to the kit's ids; with more, the tokenizer gets texts for them.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mammut.bpe_training import MIN_VOCAB_SIZE, train_tokenizer
from mammut.checkpoint import Checkpoint, load_checkpoint
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut.openmammut import CLIP_MEAN, CLIP_STD, unwrap
from mammut_runtime import generation_openmammut
from mammut_runtime.bundle import Bundle
from mammut_runtime.cached_decoder import CachedDecoder, CacheShape
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.generation_openmammut import OpenMammutOptions
from mammut_runtime.pictures import read_picture
from mammut_runtime.preprocess import Preprocessor, PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny models: more threads only wait for one another

MODE = os.environ.get("MAMMUT_ADAPTER", "torch")
TARGETS = {"bundle": "onnxruntime", "openvino": "openvino"}
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Passes(Protocol):
    """The model's passes, as PyTorch or a bundle computes them."""

    def image(self, pixels: Floats) -> tuple[Floats, Floats, Floats]:
        """Tokens [N, T, Wv], unit embedding [N, E], its length before [N]."""

    def text(self, ids: Ids) -> tuple[Floats, Floats]:
        """Unit embedding [N, E], its length before [N]."""

    def logits(self, tokens: Floats, ids: Ids) -> Floats:
        """Picture i goes with the rows i*n ... i*n+n-1 of ids [N*n, L]; logits of every position [N*n, L, V]."""

    def last_logits(self, tokens: Floats, ids: Ids) -> Floats:
        """The same, of the last position only [N*n, V]."""


class TorchPasses:
    """The PyTorch core."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.model
        self.positional_embedding = self.model.vision.positions.numpy()

    def image(self, pixels: Floats) -> tuple[Floats, Floats, Floats]:
        tokens, raw = self.model.encode_image(torch.from_numpy(pixels), normalize=False)
        return tokens.numpy(), *_split(raw)

    def text(self, ids: Ids) -> tuple[Floats, Floats]:
        return _split(self.model.encode_text(torch.from_numpy(ids), normalize=False))

    def logits(self, tokens: Floats, ids: Ids) -> Floats:
        repeated = torch.from_numpy(np.repeat(tokens, len(ids) // len(tokens), axis=0))
        return self.model.caption_logits(repeated, torch.from_numpy(ids)).numpy()

    def last_logits(self, tokens: Floats, ids: Ids) -> Floats:
        return self.logits(tokens, ids)[:, -1]


class BundlePasses:
    """A bundle, made by the exporter from the same checkpoint, run by the runtime."""

    def __init__(self, checkpoint: Checkpoint, tasks: tuple[str, ...]) -> None:
        from mammut_export.export import ExportOptions, export

        kept = os.environ.get("MAMMUT_ADAPTER_BUNDLES")
        described = json.dumps([checkpoint.sha256, checkpoint.model.config.to_dict(), tasks], sort_keys=True)
        folder = Path(kept or _temporary_folder()) / hashlib.sha256(described.encode()).hexdigest()[:16]
        if not folder.exists():
            export(checkpoint, folder, ExportOptions(target="onnxruntime", tasks=tasks))
        bundle = Bundle.open(folder)
        self.info = bundle.manifest.model
        self.engines = {
            name: open_engine(bundle.graph_path(name), TARGETS[MODE], EngineOptions(threads=1))
            for name in bundle.manifest.graphs
        }
        self.positional_embedding = _initializer(bundle.graph_path("vision"), "vision.positions")

    def image(self, pixels: Floats) -> tuple[Floats, Floats, Floats]:
        out = self.engines["vision"].run({"pixels": pixels})
        return out["tokens"], out["embedding"], out["norm"]

    def text(self, ids: Ids) -> tuple[Floats, Floats]:
        out = self.engines["text"].run({"ids": ids})
        return out["embedding"], out["norm"]

    def logits(self, tokens: Floats, ids: Ids) -> Floats:
        decoder, by_picture = self._decoder(tokens, ids)
        steps = [decoder.feed(by_picture[:, :, i : i + 1]) for i in range(ids.shape[1])]
        return np.stack(steps, axis=2).reshape(*ids.shape, -1)

    def last_logits(self, tokens: Floats, ids: Ids) -> Floats:
        decoder, by_picture = self._decoder(tokens, ids)
        return decoder.feed(by_picture).reshape(len(ids), -1)

    def _decoder(self, tokens: Floats, ids: Ids) -> tuple[CachedDecoder, Ids]:
        info = self.info
        shape = CacheShape(info.text_layers, info.heads, info.text_width // info.heads)
        by_picture = ids.reshape(len(tokens), -1, ids.shape[1])
        decoder = CachedDecoder(self.engines["decoder"], self.engines["memory"].run({"tokens": tokens}), shape)
        decoder.select(np.zeros(by_picture.shape[:2], np.int64))
        return decoder, by_picture


class Model:
    """What the kit calls."""

    def __init__(self, passes: Any, vocab_size: int) -> None:
        self.passes: Passes = passes
        self.vocab_size = vocab_size
        self.positional_embedding: Floats = passes.positional_embedding

    def encode_image(self, image: Floats, normalize: bool) -> Floats:
        _, unit, norm = self.passes.image(np.ascontiguousarray(image))
        return unit if normalize else unit * norm[:, None]

    def encode_text(self, tokens: Ids, normalize: bool) -> Floats:
        unit, norm = self.passes.text(np.ascontiguousarray(tokens))
        return unit if normalize else unit * norm[:, None]

    def caption_logits(self, image: Floats, tokens: Ids) -> Floats:
        seen, _, _ = self.passes.image(np.ascontiguousarray(image))
        return self.passes.logits(seen, np.ascontiguousarray(tokens))[:, :, : self.vocab_size]

    def generate(self, image: Floats, text: object = None, **kwargs: Any) -> list[list[int]]:
        seen, _, _ = self.passes.image(np.ascontiguousarray(image))
        ids = generation_openmammut.generate(
            lambda rows: self.passes.last_logits(seen, rows)[:, : self.vocab_size],
            len(image),
            OpenMammutOptions(**kwargs),
            None if text is None else np.asarray(text, np.int64),
        )
        return [list(map(int, row)) for row in ids]

    def sampling_probs(self, logits: Floats, prefix: Ids, **spec: Any) -> Floats:
        return generation_openmammut.sampling_probs(logits, prefix, **spec)


def load(config_path: str, weights_path: str) -> Model:
    return _load(config_path, weights_path, None, ("caption", "search"))


def load_resized(config_path: str, weights_path: str, image_size: int) -> Model:
    return _load(config_path, weights_path, image_size, ("search",))


def tokenize(texts: list[str], context_length: int) -> Ids:
    return _clip_tokenizer().tokenize(texts, context_length)


def encode(text: str) -> list[int]:
    return _clip_tokenizer().encode(text)


def decode(ids: list[int]) -> str:
    return _clip_tokenizer().decode(ids, skip_special=False)


def preprocess(path: str, size: int) -> Floats:
    return _preprocessor(size)(read_picture(Path(path), upright=False))


def preprocess_u8(path: str, size: int) -> NDArray[np.uint8]:
    return _preprocessor(size).pixels_u8(read_picture(Path(path), upright=False))


def _load(config_path: str, weights_path: str, image_size: int | None, tasks: tuple[str, ...]) -> Model:
    if MODE not in ("torch", *TARGETS):
        raise SystemExit(f"MAMMUT_ADAPTER: expected one of torch, {', '.join(TARGETS)}, got {MODE!r}")
    folder = Path(_temporary_folder()) / "kit"
    folder.mkdir()
    vocab_size = _write_checkpoint(folder, Path(config_path), Path(weights_path))
    tokenizer_json = _tokenizer_of(max(vocab_size, MIN_VOCAB_SIZE))
    checkpoint = load_checkpoint(folder, image_size=image_size, tokenizer_json=tokenizer_json)
    passes = TorchPasses(checkpoint) if MODE == "torch" else BundlePasses(checkpoint, tasks)
    return Model(passes, vocab_size)


def _write_checkpoint(folder: Path, config_path: Path, weights_path: Path) -> int:
    """The kit's model as a published checkpoint folder, with ids enough for a tokenizer; how many it had."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    text = config.get("model_cfg", config)["text_cfg"]
    had: int = text.get("vocab_size", 49_408)
    wanted = max(had, MIN_VOCAB_SIZE)
    state = unwrap(load_file(weights_path), weights_path)
    if wanted > had:
        text["vocab_size"] = wanted
        table, head = state["text.token_embedding.weight"], state["text.text_projection"]
        if len(table) == had:
            state["text.token_embedding.weight"] = torch.nn.functional.pad(table, (0, 0, 0, wanted - had))
        state["text.text_projection"] = torch.nn.functional.pad(head, (0, wanted - had))
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(state, folder / "open_clip_model.safetensors")
    return had


def _split(raw: torch.Tensor) -> tuple[Floats, Floats]:
    """Unit vectors and lengths."""
    return torch.nn.functional.normalize(raw, dim=-1).numpy(), raw.norm(dim=-1).numpy()


def _initializer(graph: Path, name: str) -> Floats:
    """A weight as the bundle stores it."""
    import onnx

    model = onnx.load(str(graph))
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    array: Floats = onnx.numpy_helper.to_array(tensor)
    return array


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="mammut-conformance-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _preprocessor(size: int) -> Preprocessor:
    return Preprocessor(PreprocessRule(size, CLIP_MEAN, CLIP_STD, "bicubic", "shortest", 0))


@functools.cache
def _clip_tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(build_clip_tokenizer())


@functools.cache
def _tokenizer_of(vocab_size: int) -> bytes:
    """A tokenizer with a text for every id that the kit's model may write."""
    data = json.loads(train_tokenizer(["one two three"], MIN_VOCAB_SIZE))
    data["model"]["vocab"] |= {f"id{number}": number for number in range(MIN_VOCAB_SIZE, vocab_size)}
    return json.dumps(data).encode()
