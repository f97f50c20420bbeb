"""The names to look for, as an object: made once, kept in a file, combined, and changed without another export.

    words = model.vocabulary(["red car", "bicycle"], negatives=["motorcycle"])
    words.save("street.json")
    both = words | Vocabulary.load("animals.json")
    seen.detect(both)

A name stands for an embedding: of its words in the bundle's prompts, or of a picture of the thing. Embeddings of one
model mean nothing to another, so a vocabulary knows its bundle by hash, and another model refuses it.

Names compete: each takes its share of a proposal's score. So does a negative ("not a motorcycle"), which is never
reported; where it fits better than a name, that name is not reported either. Where there are few names, some of the
bundle's own join in ("context"), because a single name would get everything that is there.

What a name has besides its embedding is its calibration (mammut-calibrate scores), because scores of different names
do not mean the same: a temperature and a bias that make a probability of a score, and a threshold.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.detection.boxes import Floats
from mammut_runtime.detection.rule import MAX_NAMES, Name
from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between

_MOST_CHARACTERS = 300
_LEAST_SCORE = 1e-9
"""Scores are moved this far from 0 and 1 before their logarithm is taken."""


@dataclass(frozen=True)
class Calibration:
    """What makes a score of one name comparable: probability = sigmoid(logit(score) / temperature + bias)."""

    temperature: Annotated[float, Between(1e-3, 1e3)] = 1.0
    bias: Annotated[float, Between(-1e3, 1e3)] = 0.0
    threshold: Annotated[float, Between(0, 1)] | None = None
    """Lowest probability that counts; None: the bundle's own threshold."""

    @property
    def changes_scores(self) -> bool:
        """Whether probabilities are not simply the scores."""
        return (self.temperature, self.bias) != (1.0, 0.0)


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class Entry:
    """A name of a vocabulary."""

    name: Name
    kind: Literal["words", "pictures", "context"] = "words"
    """What its embedding was made of. context: of words that nobody asked about; see Vocabulary.context."""
    negative: bool = False
    """Competes with the others, and is not reported."""
    novel: bool = True
    """Whether the detector had no boxes of this name in training."""
    calibration: Calibration = UNCALIBRATED


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Names with their embeddings, for one model. Made by Model.vocabulary or Vocabulary.load."""

    entries: tuple[Entry, ...]
    embeddings: Floats
    """float32[C, E], unit length, a row for each entry."""
    bundle: str
    """Bundle.content_hash of the model that made them."""
    model: str
    """Its name, for messages."""
    templates: tuple[str, ...]
    """Prompts that the words were put into."""
    calibrated_for: str | None = None
    """`digest` of the names the calibrations were measured with; None if there are none."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """For people: how it was calibrated."""
    notices: tuple[str, ...] = ()
    """What was done otherwise than asked when it was made. Not kept in files."""

    def __post_init__(self) -> None:
        check_names([each.name for each in self.entries])
        if all(each.negative for each in self.entries):
            raise InputError("a vocabulary of negatives only; expected at least one name to look for")
        if self.embeddings.shape[:1] != (len(self.entries),) or self.embeddings.ndim != 2:
            found = list(self.embeddings.shape)
            raise InputError(f"expected embeddings float32[{len(self.entries)}, E], one row a name, got {found}")

    def __len__(self) -> int:
        """Names that are looked for, negatives left out."""
        return len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are looked for."""
        return tuple(each.name for each in self.entries if not each.negative)

    @property
    def negatives(self) -> tuple[str, ...]:
        """The names that only compete, as the user said."""
        return tuple(each.name for each in self.entries if each.negative and each.kind != "context")

    @property
    def context(self) -> tuple[str, ...]:
        """Names of the bundle that stand for "something else" where few names were given. They take their share of the
        score; but unlike a negative, one that fits better does not take the place of a name, which it may mean too."""
        return tuple(each.name for each in self.entries if each.kind == "context")

    @property
    def digest(self) -> str:
        """sha256 of what competes with what: the names in their order, and all embeddings."""
        what = "\n".join(f"{each.kind} {each.negative} {each.novel} {each.name}" for each in self.entries)
        return hashlib.sha256(
            what.encode() + b"\0" + np.ascontiguousarray(self.embeddings, "<f4").tobytes()
        ).hexdigest()

    @property
    def calibrated(self) -> bool:
        """Whether some name has a calibration."""
        return any(each.calibration != UNCALIBRATED for each in self.entries)

    def __or__(self, other: Vocabulary) -> Vocabulary:
        """Both together; for a name in both, the other's entry. Raises InputError for another model's vocabulary, and
        for a name that one looks for and the other has as a negative."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        if other.bundle != self.bundle:
            raise InputError(
                f"these vocabularies are of two bundles ({self.model} {self.bundle[:12]}, {other.model} "
                f"{other.bundle[:12]}); make both with the same one"
            )
        kept = {name_key(each.name): (each, row) for each, row in zip(self.entries, self.embeddings, strict=True)}
        for each, row in zip(other.entries, other.embeddings, strict=True):
            before = kept.get(name_key(each.name), (each, row))[0]
            if each.kind == "context" != before.kind:
                continue  # something that was asked about stays so
            if before.kind != "context" and before.negative != each.negative:
                raise InputError(
                    f"{each.name!r} is a name of one vocabulary and a negative of the other; remove it from one"
                )
            kept[name_key(each.name)] = (each, row)
        entries, rows = zip(*kept.values(), strict=True)
        return dataclasses.replace(
            self,
            entries=entries,
            embeddings=np.stack(rows),
            templates=tuple(dict.fromkeys((*self.templates, *other.templates))),
            calibrated_for=self.calibrated_for or other.calibrated_for,
            notes={**self.notes, **other.notes},
            notices=(*self.notices, *other.notices),
        )

    def only(self, names: Sequence[str]) -> Vocabulary:
        """Some of its names, in this order, and all negatives. Raises InputError for one that it does not have."""
        at = {name_key(each.name): index for index, each in enumerate(self.entries) if each.kind != "context"}
        for name in names:
            if name_key(name) not in at:
                raise InputError(f"this vocabulary has no {name!r}; it has {_listed(self.names)}")
        chosen = [at[name_key(name)] for name in names]
        chosen += [i for i, each in enumerate(self.entries) if each.negative and i not in chosen]
        return dataclasses.replace(
            self, entries=tuple(self.entries[i] for i in chosen), embeddings=self.embeddings[chosen]
        )

    def with_thresholds(self, thresholds: Mapping[str, float]) -> Vocabulary:
        """The same names with these lowest scores, for some or all of them. Raises InputError for a name that is not
        one of its, and for thresholds outside 0 to 1."""
        by_key = {name_key(name): threshold for name, threshold in thresholds.items()}
        for name, threshold in thresholds.items():
            if name_key(name) not in {name_key(each) for each in self.names}:
                raise InputError(f"this vocabulary has no {name!r}; it has {_listed(self.names)}")
            if not 0 <= threshold <= 1:
                raise InputError(f"threshold of {name!r}: expected a number from 0 to 1, got {threshold}")

        def changed(entry: Entry) -> Entry:
            found = by_key.get(name_key(entry.name), entry.calibration.threshold)
            return dataclasses.replace(entry, calibration=dataclasses.replace(entry.calibration, threshold=found))

        return dataclasses.replace(self, entries=tuple(changed(each) for each in self.entries))

    def with_calibrations(self, calibrations: Mapping[str, Calibration], notes: Mapping[str, str]) -> Vocabulary:
        """The same names with what was measured for them. notes: how, for people."""
        entries = tuple(
            dataclasses.replace(each, calibration=calibrations.get(each.name, each.calibration))
            for each in self.entries
        )
        return dataclasses.replace(self, entries=entries, calibrated_for=self.digest, notes=dict(notes))

    def check_model(self, bundle: str, model: str) -> None:
        """Raises InputError if it was made with another bundle."""
        if self.bundle != bundle:
            raise InputError(
                f"this vocabulary was made with another bundle ({self.model}, {self.bundle[:12]}); this one is "
                f"{model}, {bundle[:12]}: make it again with this one (mammut-run vocabulary make)"
            )

    def probabilities(self, scores: Floats) -> Floats:
        """Scores float32[..., C] of the detector as each name's calibration has them; order within a name stays."""
        changed = [i for i, each in enumerate(self.entries) if each.calibration.changes_scores]
        if not changed:
            return scores
        rows = [self.entries[i].calibration for i in changed]
        temperature, bias = (np.array([getattr(each, key) for each in rows]) for key in ("temperature", "bias"))
        found = scores.copy()
        found[..., changed] = sigmoid(logit(scores[..., changed]) / temperature + bias)
        return found

    def thresholds(self, default: float) -> Floats:
        """float32[C], of every entry."""
        own = (each.calibration.threshold for each in self.entries)
        return np.array([default if each is None else each for each in own], np.float32)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it to one file, whole or not at all. Raises InputError if there is one and not `overwrite`, or it
        cannot be written."""
        from mammut_runtime.detection.vocabulary_file import write_vocabulary

        write_vocabulary(self, Path(path), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote. Raises InputError for a file that is damaged or something else."""
        from mammut_runtime.detection.vocabulary_file import read_vocabulary

        return read_vocabulary(Path(path))


def check_names(names: Sequence[str], what: str = "name") -> None:
    """Raises InputError for no names, too many, empty or endless ones, and the same one twice."""
    if isinstance(names, str) or not names:
        raise InputError(f"expected a list of one or more {what}s, got {names!r}")
    if len(names) > MAX_NAMES:
        raise InputError(f"expected at most {MAX_NAMES:,} names, got {len(names):,}; divide them into vocabularies")
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"a {what} is empty: {name!r}; give words, or leave it out")
        if len(name) > _MOST_CHARACTERS or not all(each.isprintable() for each in name):
            raise InputError(f"a {what} is at most {_MOST_CHARACTERS} printable characters, got {name[:40]!r}...")
        if name_key(name) in seen:
            raise InputError(f"the {what} {name!r} is given twice (also as {seen[name_key(name)]!r}); leave one out")
        seen[name_key(name)] = name


def logit(scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Logarithm of the odds, float64; scores of 0 and 1 become very small and very large, not infinite."""
    inside = np.clip(np.asarray(scores, np.float64), _LEAST_SCORE, 1 - _LEAST_SCORE)
    odds: NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return odds


def sigmoid(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The inverse of `logit`, float64."""
    share: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * np.asarray(values, np.float64)))
    return share


def name_key(name: str) -> str:
    """What two names have in common that are the same: case and spaces do not tell them apart."""
    return " ".join(name.casefold().split())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
