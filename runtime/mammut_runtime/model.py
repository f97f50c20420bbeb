"""The front door: a bundle as a model that sees pictures and talks about them.

    model = Model.load("bundle/")
    seen = model.encode("photo.jpg")            # the expensive part, once
    seen.caption().text
    seen.ask("what is this?").text
    seen.match(["a cat", "a dog"]).best

The work is done elsewhere: preprocess.py (pixels), graphs.py (engines), text_tower.py (embeddings of texts),
captioner.py (captions and answers). search.py finds pictures in folders.

Legend: B pictures, N image tokens, Wv their width, E embedding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.bundle import TOKENIZER_FILE, Bundle, Canary, Manifest
from mammut_runtime.canary import CanaryResult, canary_picture, compare
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.captioner import Captioner, Memory
from mammut_runtime.engines import Engine, EngineOptions, check_ready, open_engine
from mammut_runtime.errors import BundleError, InputError, VerificationError
from mammut_runtime.generation_openmammut import OpenMammutOptions
from mammut_runtime.graphs import Graphs
from mammut_runtime.pictures import Picture, read_picture
from mammut_runtime.preprocess import Preprocessor
from mammut_runtime.probabilities import softmax
from mammut_runtime.results import Answer, Caption, Match, Matches
from mammut_runtime.text_tower import Classifier, TextTower, check_templates
from mammut_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mammut_runtime.video.captions import VideoCaptionOptions
    from mammut_runtime.video.cues import Cue
    from mammut_runtime.video.encode import SeenClip
    from mammut_runtime.video.sampler import Budget

Floats = NDArray[np.float32]
Image = NDArray[np.uint8] | Picture | str | Path | bytes
"""uint8[H, W, 3] from a camera, a picture that was read, a picture file's path, or a picture file's bytes."""
ChannelOrder = Literal["rgb", "bgr"]

BATCH = 8
"""Pictures computed together unless said otherwise: enough to share the reading of weights, bounded in memory."""


class Model:
    """A loaded bundle. One instance may be used from several threads at once, and so may what it returns.

    Graphs are opened when they are first needed, so the first call of each kind takes longer.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions | None = None,
        *,
        preprocess: Literal["exact", "fast"] = "exact",
        open_graph: Callable[[str], Engine] | None = None,
    ) -> None:
        """open_graph: name -> Engine in place of the bundle's target, for tests (engines.fake)."""
        manifest = bundle.manifest
        self.bundle = bundle
        self._preprocessor = Preprocessor(manifest.preprocess, preprocess)

        def open_default(name: str) -> Engine:
            return open_engine(bundle.graph_path(name), manifest.target, options)

        self._graphs = Graphs(tuple(manifest.graphs), open_graph or open_default)
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._text: TextTower | None = None
        self._captioner: Captioner | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        options: EngineOptions | None = None,
        *,
        verify: bool = True,
        preprocess: Literal["exact", "fast"] = "exact",
    ) -> Model:
        """Open the bundle in the folder `path`.

        verify: check every file's hash first (reads the whole bundle; sizes and names are always checked), and, where
        the engines were built on this device, replay the canary.
        preprocess: "exact" is what the model was trained with; "fast" is for large camera frames (see preprocess.py).
        Raises BundleError for what is not a whole, unedited bundle; EngineError, at first use, for an engine that is
        missing, and now for engines that must be built first; VerificationError for a canary that differs.
        """
        model = cls(Bundle.open(path, verify), options, preprocess=preprocess)
        if check_ready(model.bundle.path, model.manifest.target, options) and verify:
            try:
                model.replay_canary()
            except BaseException:
                model.close()
                raise
        return model

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    @property
    def templates(self) -> tuple[str, ...]:
        """The bundle's own prompt templates for class names, each with one {}."""
        return self.text.templates

    def encode(self, image: Image, color: ChannelOrder = "rgb") -> Seen:
        """Look at a picture. This is the expensive part; everything is asked of the result.

        color: order of the channels of an array (OpenCV's cameras give "bgr"); files and Pictures know theirs. Picture
        files are turned upright by their EXIF orientation. Raises InputError for what is not a usable picture.
        """
        return self.encode_batch([image], color)[0]

    def encode_batch(self, images: Sequence[Image], color: ChannelOrder = "rgb", batch_size: int = BATCH) -> list[Seen]:
        """Look at several pictures, `batch_size` at once. Raises InputError if one of them cannot be used."""
        _check_batch_size(batch_size)
        seen: list[Seen] = []
        for start in range(0, len(images), batch_size):
            pixels = np.stack([self._pixels(each, color) for each in images[start : start + batch_size]])
            outputs = self._graphs.run("vision", {"pixels": pixels})
            pairs = zip(outputs["tokens"], outputs["embedding"], strict=True)
            seen += [Seen(self, tokens, embedding) for tokens, embedding in pairs]
        return seen

    def encode_video(
        self,
        source: str | Path | Sequence[NDArray[np.uint8]],
        start_s: float = 0.0,
        end_s: float | None = None,
        budget: Budget | None = None,
        *,
        color: ChannelOrder = "rgb",
        fps: float | None = None,
    ) -> SeenClip:
        """Look at a clip, or the part of it from start_s to end_s; then caption, ask and match as for a picture.

        source: a file, or frames uint8[H, W, 3] (then color says their channels, and fps, 25 by default, their times).
        budget: what it may cost; None is 8 frames. What was used is in the result's `sampling`. How frames become one
        is in video/encode.py. Raises InputError for what is no clip, and for a part without frames.
        """
        from mammut_runtime.video.encode import encode_video

        return encode_video(self, source, start_s, end_s, budget, color, fps)

    def caption_video(
        self,
        path: str | Path,
        options: VideoCaptionOptions | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
    ) -> Iterator[Cue]:
        """Timed cues of a clip, each as soon as it is known, in order and without overlap. Memory does not grow.

        Raises InputError, at the first cue, for what is no clip.
        """
        from mammut_runtime.video.captions import caption_video

        return caption_video(self, path, options, start_s, end_s)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """float32[N, E], unit length; comparable with Seen.embedding by dot product.

        Too long texts lose their tail, as in training (`cut_tokens` says how much). Raises InputError for empty ones.
        """
        return self.text.embed(texts)

    def cut_tokens(self, text: str) -> int:
        """How many tokens of a text do not fit into the text tower; 0 for most texts."""
        return self.text.cut_tokens(text)

    def classifier(self, names: Sequence[str], templates: Sequence[str] | None = None) -> Classifier:
        """Class names as embeddings, for `Seen.match` with many pictures: the mean over prompt templates.

        templates: each holds {} once; None takes the bundle's own. Raises InputError.
        """
        return self.text.classifier(names, templates)

    def caption_batch(
        self,
        seen: Sequence[Seen],
        options: CaptionOptions | OpenMammutOptions | None = None,
        batch_size: int = BATCH,
    ) -> list[Caption]:
        """A caption for each picture, `batch_size` computed together; the same captions as one by one.

        Raises InputError for a prompt that is empty or too long, and for pictures that another model has seen.
        """
        _check_batch_size(batch_size)
        captions: list[Caption] = []
        for start in range(0, len(seen), batch_size):
            memories = self._memories(seen[start : start + batch_size])
            if isinstance(options, OpenMammutOptions):
                captions += self.captioner.caption_openmammut(memories, options)
            else:
                captions += self.captioner.caption(memories, options or CaptionOptions())
        return captions

    def generate_openmammut(
        self, seen: Sequence[Seen], options: OpenMammutOptions | None = None, text: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The public openMaMMUT `generate()`, ids int64[B, width] with start, end and pads."""
        return self.captioner.openmammut(self._memories(seen), options or OpenMammutOptions(), text)

    def see(self, tokens: Floats, embedding: Floats) -> Seen:
        """A Seen from what the vision graph gave before (kept, or computed elsewhere).

        tokens: float32[N, Wv], or float16 in a bundle that passes these between its graphs; embedding: float32[E].
        Raises InputError for other shapes.
        """
        model = self.manifest.model
        (dtype,) = (each.dtype for each in self.manifest.graphs["vision"].outputs if each.name == "tokens")
        if tokens.shape != (model.image_tokens, model.vision_width) or embedding.shape != (model.embed_dim,):
            raise InputError(
                f"expected tokens [{model.image_tokens}, {model.vision_width}] and an embedding [{model.embed_dim}], "
                f"got {list(tokens.shape)} and {list(embedding.shape)}; they must come from this bundle"
            )
        return Seen(self, np.asarray(tokens, dtype), np.asarray(embedding, np.float32))

    def canary_answers(self, canary: Canary) -> tuple[Floats | None, Floats | None, tuple[int, ...] | None]:
        """What this model makes of the canary's inputs: picture embedding, text embedding, greedy caption's ids.

        None where the bundle has no graph for it. The exporter records it, `replay_canary` compares with it.
        """
        embedding = text_embedding = caption_ids = None
        if "vision" in self.manifest.graphs:
            seen = self.encode(canary_picture(canary.seed, canary.picture_hw))
            embedding = seen.embedding
            if "decoder" in self.manifest.graphs:
                caption_ids = seen.caption(CaptionOptions(beams=1)).ids
        if "text" in self.manifest.graphs:
            text_embedding = self._graphs.run("text", {"ids": np.array([canary.ids], np.int64)})["embedding"][0]
        return embedding, text_embedding, caption_ids

    def replay_canary(self) -> CanaryResult:
        """Compute what the bundle recorded where it was exported. Raises VerificationError if it differs here."""
        result = compare(self.manifest.canary, *self.canary_answers(self.manifest.canary))
        if not result.ok:
            raise VerificationError(f"{self.bundle.path}: {result.message}")
        return result

    def open_graphs(self, *names: str) -> None:
        """Open these graphs now, not at first use: an application that must answer quickly does so when it starts.

        Raises BundleError for a graph that the bundle does not have, EngineError, InputError for options that the
        engine cannot honour.
        """
        for name in names:
            self._graphs.engine(name)

    def close(self) -> None:
        """Frees the graphs. What was seen keeps its embedding, everything else raises EngineError afterwards."""
        self._graphs.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises BundleError for a bundle without one."""
        with self._lock:
            if self._tokenizer is None:
                if TOKENIZER_FILE not in self.manifest.files:
                    raise BundleError(f"{self.bundle.path} has no {TOKENIZER_FILE}; export it with a task for texts")
                self._tokenizer = Tokenizer.from_bytes(self.bundle.read(TOKENIZER_FILE), TOKENIZER_FILE)
            return self._tokenizer

    @property
    def text(self) -> TextTower:
        """Texts to embeddings."""
        tokenizer = self.tokenizer
        with self._lock:
            if self._text is None:
                self._text = TextTower(self._graphs, tokenizer, self.manifest.text)
            return self._text

    @property
    def captioner(self) -> Captioner:
        """Captions and answers."""
        tokenizer = self.tokenizer
        with self._lock:
            if self._captioner is None:
                self._captioner = Captioner(self._graphs, tokenizer, self.manifest)
            return self._captioner

    def probabilities(self, cosines: Floats) -> Floats:
        """Cosines of candidates with one picture to probabilities, float32[C] -> float32[C], by the bundle's rule."""
        model = self.manifest.model
        scaled = cosines.astype(np.float64) * model.logit_scale + model.logit_bias
        if model.similarity == "softmax":
            return softmax(scaled).astype(np.float32)
        return (1 / (1 + np.exp(-scaled))).astype(np.float32)

    def _pixels(self, image: Image, color: ChannelOrder) -> Floats:
        if isinstance(image, str | Path | bytes):
            image = read_picture(image)
        return self._preprocessor(image, color=color)

    def _memories(self, seen: Sequence[Seen]) -> list[Memory]:
        """What the decoder looks at, computed together for the pictures that do not have it yet."""
        for each in seen:
            if each.model is not self:
                raise InputError("a picture was seen by another model; encode it with this one")
        new = [each for each in seen if each.memory is None]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            for each, memory in zip(batch, self.captioner.memories(np.stack([s.tokens for s in batch])), strict=True):
                each.memory = memory  # two threads may both compute it; they compute the same
        return [each.memory for each in seen if each.memory is not None]


class Seen:
    """A picture the model has looked at. Ask as often as you like: nothing is computed twice that need not be."""

    def __init__(self, model: Model, tokens: Floats, embedding: Floats) -> None:
        """Made by Model.encode."""
        self.model = model
        self.tokens = tokens
        """float32[N, Wv], what the decoder reads."""
        self.embedding = embedding
        """float32[E], unit length; its dot product with Model.embed_texts is the similarity."""
        self.memory: Memory | None = None
        """The decoder's keys and values of this picture; computed at the first caption or question."""

    def caption(self, options: CaptionOptions | OpenMammutOptions | None = None) -> Caption:
        """Describe the picture. Raises InputError for a prompt that is empty or too long."""
        return self.model.caption_batch([self], options)[0]

    def caption_stream(self, options: CaptionOptions | None = None) -> Iterator[str]:
        """The caption in pieces, as they are chosen: greedy, or sampled if the options say so. Joined: its text.

        Raises InputError for options.beams above 1.
        """
        (memory,) = self.model._memories([self])
        return self.model.captioner.stream(memory, options or CaptionOptions())

    def ask(
        self,
        question: str,
        candidates: Sequence[str] | None = None,
        options: CaptionOptions | None = None,
        *,
        normalise: bool = False,
    ) -> Answer:
        """Answer a question about the picture: freely, or with the most likely of the given candidates.

        options: how a free answer is generated. normalise: compare candidates by their mean log-likelihood per token,
        where their lengths differ without meaning. Raises InputError for an empty question or candidate.
        """
        (memory,) = self.model._memories([self])
        if candidates is None:
            return self.model.captioner.answer(memory, question, options or CaptionOptions())
        if options is not None:
            raise InputError("options say how a free answer is generated; leave them out when candidates are given")
        return self.model.captioner.choose(memory, question, candidates, normalise)

    def match(
        self,
        texts: Sequence[str] | Classifier,
        negatives: Sequence[str] = (),
        templates: Sequence[str] | None = None,
    ) -> Matches:
        """How well texts fit the picture, best first.

        texts: texts, or what Model.classifier made of class names. negatives: texts that stand for "none of these";
        they take their share of the probability, and win when they fit better. templates: make prompts of `texts` and
        `negatives` first (Model.templates are the bundle's own). Raises InputError for empty texts.
        """
        if isinstance(texts, Classifier):
            if templates is not None:
                raise InputError("a classifier has its templates inside; leave templates out")
            positive = texts
        else:
            positive = self._classes(texts, templates)
        every = [positive, self._classes(negatives, templates)] if negatives else [positive]
        names = [name for each in every for name in each.names]
        cosines = np.concatenate([each.embeddings for each in every]) @ self.embedding
        probabilities = self.model.probabilities(cosines)
        found = [Match(*each) for each in zip(names, cosines.tolist(), probabilities.tolist(), strict=True)]
        count = len(positive.names)
        return Matches(
            _best_first(found[:count]),
            _best_first(found[count:]),
            tuple(notice for each in every for notice in each.notices),
        )

    def _classes(self, texts: Sequence[str], templates: Sequence[str] | None) -> Classifier:
        """Texts as they are, or in templates."""
        tower = self.model.text
        if templates is not None:
            return tower.classifier(texts, check_templates(templates))
        return Classifier(tuple(texts), tower.embed(texts), tower.notices(texts))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")


def _best_first(matches: list[Match]) -> tuple[Match, ...]:
    return tuple(sorted(matches, key=lambda each: -each.cosine))
