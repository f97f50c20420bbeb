"""How much a candidate bundle differs from its reference on held-out data, per task, and whether that is acceptable.

    reference = observe(fp32, held_out)                      # once
    drift = compare(reference, observe(int8, held_out, reference=reference))
    for failure in drift.failures(DriftLimits()): print(failure)

Agreement is with the reference, not with the truth: the question is what quantization changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.behaviour import Behaviour, Progress, observe
from mammut_calibration.data import Dataset, Question
from mammut_runtime.bundle import Bundle
from mammut_runtime.detection.boxes import Box, iou_matrix
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import ROUNDING
from mammut_runtime.strict import to_dict

MEASURES = (
    "embedding_cosine_mean",
    "embedding_cosine_min",
    "text_cosine_mean",
    "text_cosine_min",
    "retrieval_agreement",
    "token_agreement",
    "forced_token_agreement",
    "caption_agreement",
    "answer_agreement",
    "clip_cosine_mean",
    "clip_cosine_min",
    "clip_forced_token_agreement",
    "detection_agreement",
)
"""Names of what is measured: fields of Drift, and of DriftLimits."""
_EXAMPLES = 12
SAME_FIT = 1.05
"""Texts whose probabilities, by the reference, differ by less than this factor fit a picture equally well."""


@dataclass(frozen=True)
class DriftLimits:
    """The least of each measure that is acceptable. All are from 0 to 1, and 1 is no drift. Raises InputError."""

    embedding_cosine_mean: float = 0.995
    """Of pictures. 8-bit weights and activations give 0.999 and more where nothing is wrong."""
    embedding_cosine_min: float = 0.97
    """Of the worst picture."""
    text_cosine_mean: float = 0.995
    text_cosine_min: float = 0.97
    retrieval_agreement: float = 0.93
    """Pictures whose best text stays the same, or becomes one that the reference finds as good (see SAME_FIT): texts of
    a class, or of a model that is not sure, are often that close, and any rounding swaps them."""
    token_agreement: float = 0.90
    """Tokens of greedy captions that are the same at the same place; after a first difference few are."""
    forced_token_agreement: float = 0.96
    """Tokens that are chosen alike after the same beginning: the fairest measure of a decoder."""
    caption_agreement: float = 0.75
    """Greedy captions that are the same in every token."""
    answer_agreement: float = 0.90
    """Questions that get the same answer."""
    clip_cosine_mean: float = 0.995
    """Of embeddings of clips, in a bundle with a video graph."""
    clip_cosine_min: float = 0.97
    clip_forced_token_agreement: float = 0.96
    """As forced_token_agreement, of captions of clips."""
    detection_agreement: float = 0.90
    """Of things that either finds, those that both find: the same name, and boxes that overlap by half or more."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not -1 <= value <= 1:
                raise InputError(f"{each.name}: expected a limit from -1 to 1, got {value!r}")

    def to_dict(self) -> dict[str, float]:
        plain: dict[str, float] = to_dict(self)
        return plain


@dataclass(frozen=True)
class DriftFailure:
    """A measure that is below its limit."""

    measure: str
    measured: float
    limit: float
    where: str
    """The worst picture or text, where there is one; else empty."""

    def __str__(self) -> str:
        worst = f" (worst: {self.where})" if self.where else ""
        return f"{self.measure} is {self.measured:.4f}, expected at least {self.limit:.4f}{worst}"


@dataclass(frozen=True)
class CaptionPair:
    """A picture's greedy caption by the reference and by the candidate."""

    picture: str
    before: str
    after: str
    same: bool
    """In every token."""


@dataclass(frozen=True)
class Drift:
    """The comparison. A measure is None where the bundles have no graph for it."""

    data_hash: str
    reference_hash: str
    """Content hash of the reference bundle."""
    candidate_hash: str
    pictures: int
    texts: int
    tokens: int
    """Tokens of the reference's captions, ends counted."""
    questions: int
    embedding_cosine_mean: float | None
    embedding_cosine_min: float | None
    text_cosine_mean: float | None
    text_cosine_min: float | None
    retrieval_agreement: float | None
    token_agreement: float | None
    forced_token_agreement: float | None
    caption_agreement: float | None
    answer_agreement: float | None
    clip_cosine_mean: float | None
    clip_cosine_min: float | None
    clip_forced_token_agreement: float | None
    detection_agreement: float | None
    """None also where nothing was found at all."""
    clips: int
    """That were shown to both; 0 without a video graph."""
    filmed: int
    """Of these: parts of the data's own clips. The others were made of its pictures, by a crop that moves."""
    where: dict[str, str]
    """Measure -> the picture or text that was worst in it."""
    captions: tuple[CaptionPair, ...]
    """Some, those that differ first."""
    unasked: tuple[str, ...]
    """Questions that could not be asked, and why."""

    @property
    def measures(self) -> dict[str, float]:
        """Measure -> value, of those that were measured."""
        found = {name: getattr(self, name) for name in MEASURES}
        return {name: value for name, value in found.items() if value is not None}

    def failures(self, limits: DriftLimits | None = None) -> tuple[DriftFailure, ...]:
        """The measures below their limits; empty if the candidate is acceptable."""
        limits = limits or DriftLimits()
        return tuple(
            DriftFailure(name, value, getattr(limits, name), self.where.get(name, ""))
            for name, value in self.measures.items()
            if not value >= getattr(limits, name) - ROUNDING
        )

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain


def measure_drift(
    reference: Bundle | Path,
    candidate: Bundle | Path,
    data: Dataset,
    *,
    questions: Sequence[Question] = (),
    options: EngineOptions | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Drift:
    """Observe both bundles, one after the other, and compare. See `observe`."""

    def part(offset: int) -> Progress:
        return lambda done, total, name: progress(offset * total + done, 2 * total, name)

    before = observe(reference, data, questions=questions, options=options, progress=part(0))
    return compare(before, observe(candidate, data, reference=before, options=options, progress=part(1)))


def compare(reference: Behaviour, candidate: Behaviour) -> Drift:
    """Raises InputError unless the candidate was observed with this reference."""
    if (reference.pictures, reference.texts, reference.questions) != (
        candidate.pictures,
        candidate.texts,
        candidate.questions,
    ):
        raise InputError("the two were not observed alike; observe the candidate with reference=")
    where: dict[str, str] = {}
    cosines = _cosines(reference.embeddings, candidate.embeddings)
    where["embedding_cosine_mean"] = where["embedding_cosine_min"] = reference.pictures[int(cosines.argmin())]
    text_cosines = _cosines(reference.text_embeddings, candidate.text_embeddings)
    if reference.texts:
        where["text_cosine_mean"] = where["text_cosine_min"] = repr(reference.texts[int(text_cosines.argmin())])
    clip_cosines = _cosines(reference.clip_embeddings, candidate.clip_embeddings)
    if clip_cosines.size:
        where["clip_cosine_mean"] = where["clip_cosine_min"] = reference.pictures[int(clip_cosines.argmin())]
    pairs = list(zip(reference.captions, candidate.captions, strict=True))
    forced = zip(reference.captions, candidate.forced, strict=True)
    answers = [
        (before, after)
        for each in zip(reference.answers, candidate.answers, strict=True)
        for before, after in zip(*each, strict=True)
    ]
    if pairs:
        worst = min(range(len(pairs)), key=lambda i: _token_share([pairs[i]]) or 0.0)
        where["token_agreement"] = where["caption_agreement"] = reference.pictures[worst]
    return Drift(
        data_hash=reference.data_hash,
        reference_hash=reference.bundle_hash,
        candidate_hash=candidate.bundle_hash,
        pictures=len(reference.pictures),
        texts=len(reference.texts),
        tokens=sum(map(len, reference.captions)),
        questions=len(answers),
        embedding_cosine_mean=_share(cosines),
        embedding_cosine_min=float(cosines.min()),
        text_cosine_mean=_share(text_cosines),
        text_cosine_min=float(text_cosines.min()) if reference.texts else None,
        retrieval_agreement=_retrieval_agreement(reference, candidate),
        token_agreement=_token_share(pairs),
        forced_token_agreement=_token_share(list(forced)),
        caption_agreement=_share([before == after for before, after in pairs]),
        answer_agreement=_share([before == after for before, after in answers]),
        clip_cosine_mean=_share(clip_cosines),
        clip_cosine_min=float(clip_cosines.min()) if clip_cosines.size else None,
        clip_forced_token_agreement=_token_share(
            list(zip(reference.clip_captions, candidate.clip_forced, strict=True))
        ),
        detection_agreement=_detection_agreement(reference, candidate),
        clips=len(clip_cosines),
        filmed=reference.filmed,
        where=where,
        captions=_examples(reference, candidate),
        unasked=reference.unasked,
    )


def _cosines(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row with its counterpart, -1 to 1. A row with NaN has 0: whatever it means, it does not agree."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    clipped: NDArray[np.float64] = np.clip(np.nan_to_num(found, nan=0.0), -1.0, 1.0)
    return clipped


def _retrieval_agreement(reference: Behaviour, candidate: Behaviour) -> float | None:
    if not reference.texts:
        return None
    scores = _scores(reference)
    chosen = _scores(candidate).argmax(axis=1)
    lost = scores.max(axis=1) - scores[np.arange(len(scores)), chosen]
    return _share(lost <= np.log(SAME_FIT))


def _scores(behaviour: Behaviour) -> NDArray[np.float64]:
    """Scaled cosines of pictures with texts, float64[P, T]: differences are logarithms of ratios of probabilities."""
    cosines = behaviour.embeddings.astype(np.float64) @ behaviour.text_embeddings.T.astype(np.float64)
    return np.asarray(np.nan_to_num(cosines, nan=-2.0) * behaviour.logit_scale)


def _token_share(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float | None:
    """Share of places where two token sequences are the same; a place that only one has counts as different."""
    same = sum(a == b for before, after in pairs for a, b in zip(before, after, strict=False))
    places = sum(max(len(before), len(after)) for before, after in pairs)
    if not pairs:
        return None
    return same / places if places else 1.0


def _detection_agreement(reference: Behaviour, candidate: Behaviour) -> float | None:
    least = reference.detection_threshold
    found = [
        any(each.name == other.name and _overlap(each.box, other.box) >= 0.5 for other in others)
        for pair in zip(reference.detections, candidate.detections, strict=True)
        for own, others in (pair, pair[::-1])
        for each in own
        if each.score >= least
    ]
    return _share(found)


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    return float(iou_matrix(np.array([one.xyxy], np.float32), np.array([other.xyxy], np.float32))[0, 0])


def _share(values: Any) -> float | None:
    """Mean, None of nothing."""
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else None


def _examples(reference: Behaviour, candidate: Behaviour) -> tuple[CaptionPair, ...]:
    found = [
        CaptionPair(name, before, after, ids == other)
        for name, before, after, ids, other in zip(
            reference.pictures,
            reference.caption_texts,
            candidate.caption_texts,
            reference.captions,
            candidate.captions,
            strict=False,  # both captions are () in bundles without a decoder
        )
    ]
    return tuple(sorted(found, key=lambda pair: pair.same)[:_EXAMPLES])
