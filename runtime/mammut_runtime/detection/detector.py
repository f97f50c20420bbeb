"""The `detector` graph with what surrounds it: pictures into squares, names into embeddings, proposals into boxes.

Used through Model.detect and Seen.detect. Changing the vocabulary costs the text tower for names that were not asked
before, and nothing else: embeddings are kept by (name, prompts) as long as the model is loaded.

Legend: B pictures, D side of the square, P proposals, C names, E embedding.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.bundle import Bundle
from mammut_runtime.detection.boxes import Box, Detection, Detections, Floats, areas, clipped
from mammut_runtime.detection.letterbox import Letterbox
from mammut_runtime.detection.nms import class_wise_nms
from mammut_runtime.detection.rule import MAX_NAMES, DetectionRule
from mammut_runtime.detection.vocabulary import Entry, Vocabulary, check_names
from mammut_runtime.errors import BundleError, InputError
from mammut_runtime.graphs import Graphs
from mammut_runtime.pictures import Picture
from mammut_runtime.preprocess import ChannelOrder, Preprocessor, PreprocessRule
from mammut_runtime.text_tower import TextTower, check_templates

REMEMBERED = 2 * MAX_NAMES
"""Embeddings of names kept: 20,000 with 512 components are 40 MB."""
CONTEXT = 32
"""Names, with those of the bundle that join in, below which there are too few to tell things apart. An early detector
of the demo, on 40 pictures with red blood cells and 40 without: asked for "RBC" alone, a picture with them scored
higher than one without in 41 of 100 pairs; with 11, 23, 31 and 47 others that joined in, in 68, 93, 98 and 63."""
_POOL = 48
"""Base names that are embedded to choose from: once, as long as the model is loaded."""
_NAMES_AT_ONCE = 64
"""Names whose prompts are in memory together: with 80 templates each, 5120 prompts."""
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Takes how many names are done, and of how many."""


@dataclass(frozen=True, eq=False)
class Square:
    """A picture as the detector sees it."""

    letterbox: Letterbox
    pixels: NDArray[np.uint8]
    """uint8[D, D, 3], RGB."""


class PictureDetector:
    """Finds named things. Safe to use from several threads."""

    def __init__(self, graphs: Graphs, bundle: Bundle, text: Callable[[], TextTower]) -> None:
        """text: gives the text tower when names are first embedded. Raises BundleError if there is no detector."""
        rule = bundle.manifest.detection
        if rule is None:
            raise BundleError(
                f"{bundle.path} has no 'detector' graph, which detections need; it has "
                f"{', '.join(bundle.manifest.graphs)}; export a checkpoint with a detector"
            )
        self.rule: DetectionRule = rule
        self._graphs, self._bundle, self._text = graphs, bundle, text
        self._preprocessor = Preprocessor(PreprocessRule(rule.size, rule.mean, rule.std))
        self._base = {_folded(name) for name in rule.base_names}
        self._known: OrderedDict[tuple[str, tuple[str, ...]], Floats] = OrderedDict()
        self._lock = threading.Lock()

    def square(self, image: NDArray[np.uint8] | Picture, color: ChannelOrder) -> Square:
        """The picture in its square; 0.3 MB for D = 320, whatever the picture's size. Raises InputError."""
        pixels = image.rgb() if isinstance(image, Picture) else image
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            found = f"{pixels.dtype}{list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise InputError(f"expected uint8[height, width, 3], or a Picture from read_picture, got {found}")
        letterbox = Letterbox.fit(pixels.shape[0], pixels.shape[1], self.rule.size)
        square = letterbox.apply(pixels, self.rule.fill)
        if color == "bgr" and not isinstance(image, Picture):
            square = np.ascontiguousarray(square[:, :, ::-1])
        return Square(letterbox, square)

    def vocabulary(
        self,
        names: Sequence[str],
        negatives: Sequence[str],
        pictures: Sequence[tuple[str, Floats]],
        templates: Sequence[str] | None = None,
        progress: Progress | None = None,
        notices: tuple[str, ...] = (),
        context: bool = True,
    ) -> Vocabulary:
        """names and negatives as words, then pictures as (name, float32[E]). notices: of these pictures. context:
        whether names of the bundle join in where these are few."""
        for given in (names, negatives):
            if isinstance(given, str):
                raise InputError(f"expected a list of one or more names, got {given!r}")
        words = [*names, *negatives]
        check_names([*words, *(name for name, _ in pictures)])
        forms = self.rule.templates if templates is None else check_templates(templates)
        rows, cut = self._embedded(words, forms, progress) if words else (np.empty((0, 0), np.float32), ())
        entries = [Entry(name, novel=self._is_novel(name)) for name in names]
        entries += [Entry(name, negative=True, novel=self._is_novel(name)) for name in negatives]
        entries += [Entry(name, "pictures") for name, _ in pictures]
        every = [*rows, *(row for _, row in pictures)]
        if context:
            others = self._context([*words, *(name for name, _ in pictures)], np.stack(every))
            entries += [Entry(name, "context", negative=True, novel=False) for name, _ in others]
            every += [row for _, row in others]
        return Vocabulary(
            tuple(entries),
            np.stack(every).astype(np.float32),
            self._bundle.content_hash,
            self._bundle.manifest.model.name,
            forms,
            notices=(*cut, *notices),
        )

    def detect(
        self,
        squares: Sequence[Square],
        vocabulary: Vocabulary,
        threshold: float | None = None,
        max_per_class: int | None = None,
    ) -> list[Detections]:
        """What is in the pictures, computed together."""
        if not squares:
            return []
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold: expected a number from 0 to 1, got {threshold}")
        self._check(vocabulary)
        boxes, scores = self.proposals(squares, vocabulary)
        triples = zip(squares, boxes, scores, strict=True)
        return [self.found(*each, vocabulary, threshold, max_per_class) for each in triples]

    def proposals(self, squares: Sequence[Square], vocabulary: Vocabulary) -> tuple[Floats, Floats]:
        """What the graph gives: boxes float32[B, P, 4] xyxy in pixels of the square, scores float32[B, P, C]."""
        novel = np.array([each.novel for each in vocabulary.entries], np.float32)
        return self.run(squares, np.ascontiguousarray(vocabulary.embeddings, np.float32), novel)

    def run(self, squares: Sequence[Square], classes: Floats, novel: Floats) -> tuple[Floats, Floats]:
        """The graph itself: classes float32[C, E] of unit length, novel float32[C], outputs as of `proposals`."""
        pixels = np.stack([self._preprocessor(each.pixels) for each in squares])
        outputs = self._graphs.run("detector", {"pixels": pixels, "classes": classes, "novel": novel})
        return outputs["boxes"], outputs["scores"]

    def best_scores(self, squares: Sequence[Square], vocabulary: Vocabulary) -> Floats:
        """The best score of each name in each picture, before any calibration: float32[B, names]; 0 for none.

        What a threshold is compared with: with one at or below it, `detect` reports the name.
        """
        self._check(vocabulary)
        wanted, rivals = _roles(vocabulary)
        best = np.zeros((len(squares), len(vocabulary)), np.float32)
        found = zip(squares, *self.proposals(squares, vocabulary), strict=True)
        for index, (square, boxes, scores) in enumerate(found):
            solid = areas(_places(square.letterbox, boxes)) > 0
            usable = solid[:, None] & ~_beaten(scores, rivals) & (scores > 0)
            best[index] = np.where(usable, scores, 0)[:, wanted].max(axis=0)
        return best

    def _check(self, vocabulary: Vocabulary) -> None:
        manifest = self._bundle.manifest
        vocabulary.check_model(self._bundle.content_hash, manifest.model.name)
        if vocabulary.embeddings.shape[1] != manifest.model.embed_dim:
            raise InputError(
                f"expected embeddings of {manifest.model.embed_dim} components, got {vocabulary.embeddings.shape[1]}"
            )
        most = self._most_names
        if most is not None and len(vocabulary.entries) > most:
            raise InputError(
                f"{len(vocabulary.entries):,} names, and the engines of this bundle take at most {most:,}; divide "
                f"them, or export with room for more"
            )

    @property
    def _most_names(self) -> int | None:
        """How many the engine takes, where it was built for a range of them."""
        profile = self._bundle.manifest.profiles.get("detector", {}).get("classes")
        return None if profile is None else profile.maximum[0]

    def found(
        self,
        square: Square,
        boxes: Floats,
        scores: Floats,
        vocabulary: Vocabulary,
        threshold: float | None = None,
        max_per_class: int | None = None,
    ) -> Detections:
        """What the graph's outputs for one picture mean: float32[P, 4] in the square, float32[P, C] -> detections."""
        letterbox = square.letterbox
        place = _places(letterbox, boxes)
        wanted, rivals = _roles(vocabulary)
        lowest = vocabulary.thresholds(self.rule.threshold)
        if threshold is not None:
            lowest = np.full_like(lowest, threshold)
        probabilities = np.where(_beaten(scores, rivals), np.float32(np.nan), vocabulary.probabilities(scores))
        kept = class_wise_nms(place, probabilities[:, wanted], lowest[wanted], self.rule.nms_iou, max_per_class)
        names, shared = vocabulary.names, [Box(*each) for each in place.tolist()]
        triples = zip(kept.proposals.tolist(), kept.names.tolist(), kept.scores.tolist(), strict=True)
        found = tuple(Detection(names[name], score, shared[row]) for row, name, score in triples)
        return Detections(found, letterbox.width, letterbox.height, _notices(vocabulary))

    def _context(self, names: Sequence[str], rows: Floats) -> list[tuple[str, Floats]]:
        """Base names that stand for other things, with their embeddings: as many as bring the vocabulary to CONTEXT.

        The quarter that is most like one of the names is left out: it may mean the same.
        """
        room = min(CONTEXT, self._most_names or CONTEXT) - len(names)
        asked = {_folded(name) for name in names}
        pool = [name for name in _spread(self.rule.base_names, _POOL) if _folded(name) not in asked]
        if room <= 0 or not pool:
            return []
        embedded, _ = self._embedded(pool, self.rule.templates, None)
        likest = (embedded @ rows.T).max(axis=1)
        other = sorted(np.argsort(likest, kind="stable")[: len(pool) - len(pool) // 4].tolist())
        return [(pool[i], embedded[i]) for i in _spread(other, room)]

    def _embedded(
        self, names: Sequence[str], templates: tuple[str, ...], progress: Progress | None
    ) -> tuple[Floats, tuple[str, ...]]:
        """float32[C, E], of unit length, and what was cut. Only names that are not known yet are computed."""
        with self._lock:
            known = {name: self._known[name, templates] for name in names if (name, templates) in self._known}
        missing = [name for name in names if name not in known]
        notices: list[str] = []
        for start in range(0, len(missing), _NAMES_AT_ONCE):
            chosen = missing[start : start + _NAMES_AT_ONCE]
            made = self._text().classifier(chosen, templates)
            known.update(zip(made.names, made.embeddings, strict=True))
            notices += made.notices
            if progress is not None:
                progress(len(names) - len(missing) + start + len(chosen), len(names))
        with self._lock:
            for name in names:
                self._known[name, templates] = known[name]
                self._known.move_to_end((name, templates))
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return np.stack([known[name] for name in names]), tuple(notices)

    def _is_novel(self, name: str) -> bool:
        return _folded(name) not in self._base


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spread, in their order."""
    count = min(most, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _places(letterbox: Letterbox, boxes: Floats) -> Floats:
    """Boxes of the square in the picture, cut at its edges."""
    return clipped(letterbox.to_picture(boxes), letterbox.height, letterbox.width)


def _roles(vocabulary: Vocabulary) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """bool[C] of the names that are looked for, and of the negatives, which take what fits them better."""
    entries = vocabulary.entries
    rivals = [each.negative and each.kind != "context" for each in entries]
    return np.array([not each.negative for each in entries]), np.array(rivals)


def _beaten(scores: Floats, rivals: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a negative fits better than the name: float32[P, C], bool[C] -> bool[P, C]."""
    if not rivals.any():
        return np.zeros(scores.shape, bool)
    beaten: NDArray[np.bool_] = scores < scores[:, rivals].max(axis=1, keepdims=True)
    return beaten


def _notices(vocabulary: Vocabulary) -> tuple[str, ...]:
    """What was cut; and calibrations that were measured among other names, where they may not hold."""
    if vocabulary.calibrated_for is None or vocabulary.calibrated_for == vocabulary.digest:
        return vocabulary.notices
    changed = "names were calibrated together with others; their thresholds may not hold in this vocabulary"
    return (*vocabulary.notices, changed)
