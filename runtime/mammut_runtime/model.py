"""The front door: a bundle as a model that sees pictures and talks about them.

    model = Model.load("bundle/")
    seen = model.encode("photo.jpg")            # the expensive part, once
    seen.caption().text
    seen.ask("what is this?").text
    seen.match(["a cat", "a dog"]).best

The work is done elsewhere: preprocess.py (pixels), graphs.py (engines), text_tower.py (embeddings of texts),
captioner.py (captions and answers). search.py finds pictures in folders.

Legend: B pictures, N image tokens, Wv their width, E embedding; F frames, Nv tokens of a clip.
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
from mammut_runtime.canary import (
    CanaryAnswers,
    CanaryResult,
    canary_classes,
    canary_picture,
    compare,
    moving_crops,
    proposed,
)
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.captioner import Captioner, Memory
from mammut_runtime.detection.boxes import Detections
from mammut_runtime.detection.detector import PictureDetector, Square
from mammut_runtime.detection.exemplars import Exemplar, embed_exemplars
from mammut_runtime.detection.vocabulary import Vocabulary
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
    from mammut_runtime.detection.clips import FrameDetections
    from mammut_runtime.detection.tracker import TrackRule
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
        self._detector: PictureDetector | None = None

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
            opened = [_opened(each) for each in images[start : start + batch_size]]
            pixels = np.stack([self._preprocessor(each, color=color) for each in opened])
            outputs = self._graphs.run("vision", {"pixels": pixels})
            squares = [self.detector.square(each, color) if self.detects else None for each in opened]
            triples = zip(outputs["tokens"], outputs["embedding"], squares, strict=True)
            seen += [Seen(self, *each) for each in triples]
        return seen

    @property
    def detects(self) -> bool:
        """Whether the bundle has a `detector` graph, which finds named things."""
        return "detector" in self.manifest.graphs

    def detect(
        self,
        image: Image,
        names: Sequence[str] | Vocabulary,
        threshold: float | None = None,
        max_per_class: int | None = None,
        *,
        color: ChannelOrder = "rgb",
    ) -> Detections:
        """Find named things in a picture, without encoding it for anything else. See `detect_batch`."""
        return self.detect_batch([image], names, threshold, max_per_class, color=color)[0]

    def detect_batch(
        self,
        images: Sequence[Image],
        names: Sequence[str] | Vocabulary,
        threshold: float | None = None,
        max_per_class: int | None = None,
        *,
        color: ChannelOrder = "rgb",
        batch_size: int = BATCH,
    ) -> list[Detections]:
        """Find named things in pictures, `batch_size` computed together.

        names: words, embedded now if they are new, or a vocabulary. threshold: lowest score that counts; None takes
        each name's own, or the bundle's. max_per_class: most boxes of one name. Boxes are in pixels of the picture
        that was given; a file is turned upright by its EXIF orientation first. Raises BundleError for a bundle
        without a detector; InputError for pictures and names that cannot be used, and for another model's vocabulary.
        """
        _check_batch_size(batch_size)
        vocabulary = names if isinstance(names, Vocabulary) else self.vocabulary(names)
        found: list[Detections] = []
        for start in range(0, len(images), batch_size):
            squares = [self.detector.square(_opened(each), color) for each in images[start : start + batch_size]]
            found += self.detector.detect(squares, vocabulary, threshold, max_per_class)
        return found

    def detect_video(
        self,
        path: str | Path,
        names: Sequence[str] | Vocabulary,
        fps: float | None = 5.0,
        threshold: float | None = None,
        max_per_class: int | None = None,
        rule: TrackRule | None = None,
    ) -> Iterator[FrameDetections]:
        """Find named things in a clip, frame by frame; each thing has a number that it keeps. Memory does not grow.

        fps: frames looked at in a second of the clip; None looks at all. rule: what counts as the same thing.
        Raises, at the first frame, InputError for what is no clip, and what `detect_batch` raises.
        """
        from mammut_runtime.detection.clips import detect_clip
        from mammut_runtime.video.decode import Clip

        vocabulary = names if isinstance(names, Vocabulary) else self.vocabulary(names)
        with Clip.open(path) as clip:
            yield from detect_clip(self, clip, vocabulary, fps, threshold, max_per_class, rule)

    def vocabulary(
        self,
        names: Sequence[str] = (),
        *,
        negatives: Sequence[str] = (),
        exemplars: Sequence[Exemplar] = (),
        templates: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        context: bool = True,
    ) -> Vocabulary:
        """Names to detect, made once: at most 10,000 together.

        negatives: names that compete and are not reported. exemplars: pictures of things in place of their names.
        templates: prompts for the words; None takes the bundle's own. progress: called with (done, of how many).
        context: where there are few names, some that the detector was trained with join in, unreported: a single name
        would get everything that is there.
        Raises BundleError for a bundle without a detector, InputError for names that are empty or given twice.
        """
        pictures, notices = embed_exemplars(self, exemplars) if exemplars else ([], ())
        return self.detector.vocabulary(names, negatives, pictures, templates, progress, notices, context)

    @property
    def watches(self) -> bool:
        """Whether the bundle has a `video` graph, which sees movement. Without it a clip is seen as still pictures."""
        return "video" in self.manifest.graphs

    def encode_frames(self, frames: Sequence[Image], color: ChannelOrder = "rgb") -> Seen:
        """Look at a clip with the `video` graph: the frames in their order, `model.video_frames` of them exactly.

        `encode_video` takes files and any number of frames, and works with every bundle. color: as for `encode`.
        Raises BundleError for a bundle without that graph, InputError for another number of frames, and for a frame
        that cannot be used.
        """
        graph = self._graphs.engine("video")
        expected = self.manifest.model.video_frames
        if len(frames) != expected:
            raise InputError(
                f"the video graph of this bundle takes {expected} frames, got {len(frames)}; encode_video takes any "
                f"number of them"
            )
        clip = np.stack([self._pixels(each, color) for each in frames])
        outputs = graph.run({"frames": clip[None]})
        return Seen(self, outputs["tokens"][0], outputs["embedding"][0])

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
        budget: what it may cost; None is 8 frames, or as many as the bundle's `video` graph takes. What was used is in
        the result's `sampling`, and in `way` whether it was that graph. How frames become one is in video/encode.py.
        Raises InputError for what is no clip, and for a part without frames.
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
        """A caption for each picture or clip, `batch_size` computed together; the same captions as one by one.

        Pictures are computed with pictures and clips with clips. Raises InputError for a prompt that is empty or too
        long, and for pictures that another model has seen.
        """
        _check_batch_size(batch_size)
        captions: dict[int, Caption] = {}
        for together in _of_one_kind(seen, batch_size):
            memories = self._memories([seen[index] for index in together])
            if isinstance(options, OpenMammutOptions):
                found = self.captioner.caption_openmammut(memories, options)
            else:
                found = self.captioner.caption(memories, options or CaptionOptions())
            captions |= zip(together, found, strict=True)
        return [captions[index] for index in range(len(seen))]

    def generate_openmammut(
        self, seen: Sequence[Seen], options: OpenMammutOptions | None = None, text: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The public openMaMMUT `generate()`, ids int64[B, width] with start, end and pads.

        Raises InputError for pictures together with clips of the `video` graph.
        """
        if len(_of_one_kind(seen, len(seen) or 1)) > 1:
            raise InputError("pictures and clips cannot be in one call; generate for them one after the other")
        return self.captioner.openmammut(self._memories(seen), options or OpenMammutOptions(), text)

    def see(self, tokens: Floats, embedding: Floats) -> Seen:
        """A Seen from what the vision or the video graph gave before (kept, or computed elsewhere).

        tokens: float32[N or Nv, Wv], or float16 in a bundle that passes these between its graphs; embedding:
        float32[E]. Raises InputError for other shapes.
        """
        model = self.manifest.model
        counts = model.token_counts
        (dtype,) = (each.dtype for each in self.manifest.graphs["vision"].outputs if each.name == "tokens")
        shapes = [(count, model.vision_width) for count in counts]
        if tokens.shape not in shapes or embedding.shape != (model.embed_dim,):
            raise InputError(
                f"expected tokens {' or '.join(str(list(shape)) for shape in shapes)} and an embedding "
                f"[{model.embed_dim}], "
                f"got {list(tokens.shape)} and {list(embedding.shape)}; they must come from this bundle"
            )
        return Seen(self, np.asarray(tokens, dtype), np.asarray(embedding, np.float32))

    def canary_answers(self, canary: Canary) -> CanaryAnswers:
        """What this model makes of the canary's inputs. The exporter records it, `replay_canary` compares with it."""
        embedding = text_embedding = caption_ids = clip_embedding = boxes = None
        picture = canary_picture(canary.seed, canary.picture_hw)
        if "vision" in self.manifest.graphs:
            seen = self.encode(picture)
            embedding = seen.embedding
            if "decoder" in self.manifest.graphs:
                caption_ids = seen.caption(CaptionOptions(beams=1)).ids
        if "text" in self.manifest.graphs:
            text_embedding = self._graphs.run("text", {"ids": np.array([canary.ids], np.int64)})["embedding"][0]
        if self.watches:
            clip_embedding = self.encode_frames(moving_crops(picture, self.manifest.model.video_frames)).embedding
        if self.detects:
            classes = canary_classes(canary, self.manifest.model.embed_dim)
            square = self.detector.square(picture, "rgb")
            found, scores = self.detector.run([square], classes, np.zeros(len(classes), np.float32))
            boxes = proposed(found[0], scores[0], self.detector.rule.size)
        return CanaryAnswers(embedding, text_embedding, caption_ids, clip_embedding, boxes)

    def replay_canary(self) -> CanaryResult:
        """Compute what the bundle recorded where it was exported. Raises VerificationError if it differs here."""
        result = compare(self.manifest.canary, self.canary_answers(self.manifest.canary))
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

    @property
    def detector(self) -> PictureDetector:
        """Pictures and vocabularies to boxes. Raises BundleError for a bundle without a detector."""
        with self._lock:
            if self._detector is None:
                self._detector = PictureDetector(self._graphs, self.bundle, lambda: self.text)
            return self._detector

    def probabilities(self, cosines: Floats) -> Floats:
        """Cosines of candidates with one picture to probabilities, float32[C] -> float32[C], by the bundle's rule."""
        model = self.manifest.model
        scaled = cosines.astype(np.float64) * model.logit_scale + model.logit_bias
        if model.similarity == "softmax":
            return softmax(scaled).astype(np.float32)
        return (1 / (1 + np.exp(-scaled))).astype(np.float32)

    def _pixels(self, image: Image, color: ChannelOrder) -> Floats:
        return self._preprocessor(_opened(image), color=color)

    def _memories(self, seen: Sequence[Seen]) -> list[Memory]:
        """What the decoder looks at, computed together for the pictures that do not have it yet."""
        for each in seen:
            if each.model is not self:
                raise InputError("a picture was seen by another model; encode it with this one")
        new = [each for each in seen if each.memory is None]
        for together in _of_one_kind(new, BATCH):
            batch = [new[index] for index in together]
            for each, memory in zip(batch, self.captioner.memories(np.stack([s.tokens for s in batch])), strict=True):
                each.memory = memory  # two threads may both compute it; they compute the same
        return [each.memory for each in seen if each.memory is not None]


class Seen:
    """A picture the model has looked at. Ask as often as you like: nothing is computed twice that need not be."""

    def __init__(self, model: Model, tokens: Floats, embedding: Floats, square: Square | None = None) -> None:
        """Made by Model.encode."""
        self.model = model
        self.tokens = tokens
        """float32[N, Wv], what the decoder reads; [Nv, Wv] of a clip that the `video` graph has seen."""
        self.embedding = embedding
        """float32[E], unit length; its dot product with Model.embed_texts is the similarity."""
        self.square = square
        """The picture at the detector's size; None where the bundle has no detector, or this is not one picture."""
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

    def detect(
        self, names: Sequence[str] | Vocabulary, threshold: float | None = None, max_per_class: int | None = None
    ) -> Detections:
        """Find named things in the picture: boxes in its pixels, best first. See Model.detect_batch.

        Raises also InputError for what is not one picture (a clip, or what Model.see made).
        """
        vocabulary = names if isinstance(names, Vocabulary) else self.model.vocabulary(names)
        if self.square is None:
            raise InputError("this is not one picture; give a picture, or the frames of a clip, to Model.detect")
        return self.model.detector.detect([self.square], vocabulary, threshold, max_per_class)[0]

    def _classes(self, texts: Sequence[str], templates: Sequence[str] | None) -> Classifier:
        """Texts as they are, or in templates."""
        tower = self.model.text
        if templates is not None:
            return tower.classifier(texts, check_templates(templates))
        return Classifier(tuple(texts), tower.embed(texts), tower.notices(texts))


def _of_one_kind(seen: Sequence[Seen], size: int) -> list[list[int]]:
    """Indices in groups of at most `size` that can be computed together: with as many tokens each."""
    kinds: dict[int, list[int]] = {}
    for index, each in enumerate(seen):
        kinds.setdefault(len(each.tokens), []).append(index)
    return [kind[start : start + size] for kind in kinds.values() for start in range(0, len(kind), size)]


def _opened(image: Image) -> NDArray[np.uint8] | Picture:
    """The picture of a path or of a file's bytes; others as they are."""
    return read_picture(image) if isinstance(image, str | Path | bytes) else image


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")


def _best_first(matches: list[Match]) -> tuple[Match, ...]:
    return tuple(sorted(matches, key=lambda each: -each.cosine))
