"""A toy language in place of a decoder graph, and a whole bundle around it, for tests that need no engine.

The toy keeps what it was fed in the caches it returns, so a cache that is reordered wrongly, repeated, or lost shows in
its logits: they depend on every token, its position, and the picture.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mammut_runtime.bundle import (
    Bundle,
    Canary,
    Manifest,
    ModelInfo,
    TextRule,
    graph_contract,
    hash_files,
    write_manifest,
)
from mammut_runtime.cached_decoder import CachedDecoder, CacheShape
from mammut_runtime.canary import canary_picture
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.model import Model
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import END, START, WORD_END, byte_alphabet, pack_tokenizer

Arrays = dict[str, NDArray[Any]]
TINY = Path(__file__).parents[1] / "data" / "tiny-bundle"
TARGETS = ("onnxruntime", "openvino")
"""Engines that run on any processor."""
LAYERS, HEADS, WIDTH, TOKENS, CLIP_TOKENS = 2, 2, 4, 3, 5


@dataclass
class Toy:
    """Next-token logits over a small vocabulary, by a formula that looks at everything."""

    vocabulary: int = 8
    seed: int = 0
    scale: float = 2.0
    end_bonus: float = 0.0
    """Added to the logit of id 1, which the tests of generation take as the end."""
    engine: FakeEngine = field(init=False)

    def __post_init__(self) -> None:
        source = np.random.default_rng(self.seed)
        self._embedding = source.standard_normal((self.vocabulary, 12))
        self._length = source.standard_normal((128, 12))
        self._picture = source.standard_normal(12)
        self._head = source.standard_normal((12, self.vocabulary)) * self.scale
        self.engine = FakeEngine(self._run)

    def logits(self, ids: Sequence[int], picture: float) -> NDArray[np.float32]:
        """float32[V] after the ids, for the picture of that number."""
        positions = np.cos(np.arange(len(ids)) + 1.0)[:, None]
        hidden = (self._embedding[list(ids)] * positions).sum(axis=0) + self._length[len(ids)] + picture * self._picture
        logits = np.tanh(hidden) @ self._head
        logits[1] += self.end_bonus
        return logits.astype(np.float32)

    def log_probabilities(self, ids: Sequence[int], picture: float) -> NDArray[np.float64]:
        """float64[V], by the textbook."""
        logits = self.logits(ids, picture).astype(np.float64)
        return logits - np.log(np.exp(logits).sum())

    def decoder(self, pictures: Sequence[float]) -> CachedDecoder:
        """A fresh decoder for pictures of these numbers."""
        return CachedDecoder(self.engine, self.cross(pictures), CacheShape(LAYERS, HEADS, WIDTH))

    def cross(self, pictures: Sequence[float], tokens: int = TOKENS) -> Arrays:
        numbers = np.array(pictures, np.float32)[:, None, None, None]
        whole = np.broadcast_to(numbers, (len(pictures), HEADS, tokens, WIDTH)).astype(np.float32)
        return {"cross_k.0": whole, "cross_v.0": -whole}

    def _run(self, feeds: Arrays) -> Arrays:
        ids, numbers = feeds["ids"], feeds["cross_k.0"][:, 0, 0, 0]
        batch, beams, new = ids.shape
        assert ids.dtype == np.int64 and len(numbers) == batch and (feeds["cross_v.0"][:, 0, 0, 0] == -numbers).all()
        outputs: Arrays = {}
        fresh = np.broadcast_to(ids[:, :, None, :, None], (batch, beams, HEADS, new, WIDTH)).astype(np.float32)
        for layer in range(LAYERS):
            for kind, sign in (("k", 1), ("v", -1)):
                past = feeds[f"past_{kind}.{layer}"]
                assert past.shape[:3] == (batch, beams, HEADS) and past.shape[4] == WIDTH
                outputs[f"present_{kind}.{layer}"] = np.concatenate([past, sign * (layer + 1) * fresh], axis=3)
        whole = outputs["present_k.0"][:, :, 0, :, 0].astype(int)
        assert (outputs["present_v.1"][:, :, 1, :, 3] == -2 * whole).all(), "the caches of the layers differ"
        rows = [self.logits(ids, float(numbers[b])) for b in range(batch) for ids in whole[b]]
        outputs["logits"] = np.array(rows, np.float32).reshape(batch, beams, self.vocabulary)
        return outputs


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    """The class: `toy(vocabulary=8, seed=0)`."""
    return Toy


# ---- a bundle whose graphs are functions ----

WORDS = ("cat", "dog", "bird", "red", "two", "a", "photo", "of", "question", "answer", "the")
SIZE, EMBED, IMAGE_WIDTH = 16, 6, 5


def _vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Bytes, bytes that end a word, and the words built up letter by letter."""
    tokens = [*byte_alphabet(), *(each + WORD_END for each in byte_alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for letter in [*word[1:-1], word[-1] + WORD_END] if len(word) > 1 else []:
            if (left, letter) not in merges:
                merges.append((left, letter))
                tokens.append(left + letter)
            left += letter
    return [*tokens, START, END], merges


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class ToyBundle:
    """A folder that opens as a bundle, and functions for its graphs."""

    def __init__(
        self, folder: Path, similarity: str = "softmax", text_length: int | None = None, frames: int = 0
    ) -> None:
        """frames: that its video graph takes; 0: it has none."""
        self.folder, self.opened = folder, list[str]()
        tokens, merges = _vocabulary()
        self.toy = Toy(len(tokens), seed=1, scale=3.0)
        source = np.random.default_rng(5)
        self._image = source.standard_normal((3, EMBED))
        self._words = source.standard_normal((len(tokens), EMBED))
        self.engines = {
            "vision": FakeEngine(self._vision),
            "video": FakeEngine(self._video),
            "text": FakeEngine(self._text),
            "memory": FakeEngine(self._memory),
            "decoder": self.toy.engine,
        }
        folder.mkdir()
        model = ModelInfo(
            "toy", TOKENS, IMAGE_WIDTH, EMBED, WIDTH * HEADS, LAYERS, 1, HEADS, len(tokens), 99, 10.0, -2.0, similarity,
            frames, CLIP_TOKENS if frames else 0,
        )  # type: ignore[arg-type]  # fmt: skip
        self.start_id, self.end_id = len(tokens) - 2, len(tokens) - 1
        text = TextRule(
            24, 12, text_length, 0, self.start_id, self.end_id, text_length is None,
            {"caption": "", "ask": "question: {question} answer:", "zero_shot": "a photo of a {}.\nthe {}"},
        )  # fmt: skip
        rule = PreprocessRule(SIZE, (0.5,) * 3, (0.25,) * 3, "bicubic", "shortest", 0)
        graphs = graph_contract(model, SIZE)
        for graph in graphs.values():
            (folder / graph.file).write_bytes(b"")
        (folder / "weights.bin").write_bytes(b"w")
        (folder / "tokenizer.json").write_bytes(pack_tokenizer(tokens, merges))
        row = [self.start_id, 97, self.end_id]
        row += [0] * ((text_length or len(row)) - len(row))
        nothing = (0.0,) * EMBED
        canary = Canary(3, tuple(row), nothing, nothing, (), 1e-5, clip_embedding=nothing if frames else ())
        self._write(model, text, rule, graphs, canary)
        answers = self.model().canary_answers(canary)
        assert answers.embedding is not None and answers.text_embedding is not None
        assert answers.caption_ids is not None
        canary = dataclasses.replace(
            canary,
            embedding=tuple(answers.embedding.tolist()),
            text_embedding=tuple(answers.text_embedding.tolist()),
            caption_ids=answers.caption_ids,
            clip_embedding=() if answers.clip_embedding is None else tuple(answers.clip_embedding.tolist()),
        )
        self._write(model, text, rule, graphs, canary)

    def _write(self, model: ModelInfo, text: TextRule, rule: PreprocessRule, graphs: Any, canary: Canary) -> None:
        self.manifest = Manifest(
            target="onnxruntime",
            precision="fp32",
            opset=21,
            made_by={},
            model=model,
            preprocess=rule,
            text=text,
            graphs=graphs,
            parity={},
            quantization={},
            files=hash_files(self.folder),
            canary=canary,
        )
        write_manifest(self.folder, self.manifest)

    def model(self) -> Model:
        """A model of it; `opened` tells which graphs were opened."""

        def open_graph(name: str) -> FakeEngine:
            self.opened.append(name)
            return self.engines[name]

        return Model(Bundle.open(self.folder), open_graph=open_graph)

    @staticmethod
    def picture(seed: int, size_hw: tuple[int, int] = (20, 30)) -> NDArray[np.uint8]:
        return canary_picture(seed, size_hw)

    def _vision(self, feeds: Arrays) -> Arrays:
        pixels = feeds["pixels"]
        assert pixels.dtype == np.float32 and pixels.shape[1:] == (3, SIZE, SIZE)
        mean = pixels.mean(axis=(2, 3)).astype(np.float64)
        number = np.round(mean.sum(axis=1) * 4) / 8
        tokens = np.broadcast_to(number[:, None, None], (len(pixels), TOKENS, IMAGE_WIDTH)).astype(np.float32)
        return {"tokens": tokens, "embedding": unit(mean @ self._image)}

    def _memory(self, feeds: Arrays) -> Arrays:
        return self.toy.cross([float(each) for each in feeds["tokens"][:, 0, 0]], feeds["tokens"].shape[1])

    def _video(self, feeds: Arrays) -> Arrays:
        """Frames count the more the later they come."""
        frames = feeds["frames"]
        assert frames.dtype == np.float32 and frames.shape[2:] == (3, SIZE, SIZE)
        weights = np.arange(1, frames.shape[1] + 1, dtype=np.float32)
        mixed = np.tensordot(frames, weights / weights.sum(), axes=([1], [0])).astype(np.float32)
        found = self._vision({"pixels": mixed})
        return found | {"tokens": np.repeat(found["tokens"][:, :1], CLIP_TOKENS, axis=1)}

    def _text(self, feeds: Arrays) -> Arrays:
        ids = feeds["ids"]
        real = (ids != 0)[:, :, None] if self.manifest.text.mask_pads else np.ones((*ids.shape, 1))
        return {"embedding": unit((self._words[ids] * real).sum(axis=1))}


@pytest.fixture
def toy_bundle(tmp_path: Path) -> ToyBundle:
    """similarity softmax, texts of any length."""
    return ToyBundle(tmp_path / "toy-bundle")


@pytest.fixture(scope="session")
def make_bundle() -> type[ToyBundle]:
    """The class: `make_bundle(folder, similarity="sigmoid")`."""
    return ToyBundle


# ---- a bundle made by the real exporter ----


@pytest.fixture(scope="session")
def bundle_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny bundle for a target. In float32 the graphs are the same for all; skips where the engine is missing."""

    def make(target: str) -> Path:
        pytest.importorskip(target)
        bundle = Bundle.open(TINY)
        if bundle.manifest.target == target:
            return TINY
        folder = tmp_path_factory.mktemp("bundles") / target
        shutil.copytree(TINY, folder)
        write_manifest(folder, dataclasses.replace(bundle.manifest, target=target))
        return folder

    return make


@pytest.fixture(scope="session", params=TARGETS)
def tiny_bundle(request: pytest.FixtureRequest, bundle_for: Callable[[str], Path]) -> Path:
    """The tiny bundle, once for every target."""
    return bundle_for(request.param)
