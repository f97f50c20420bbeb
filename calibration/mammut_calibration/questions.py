"""Questions and names that can be tried on any picture, for data that bring none of their own."""

from __future__ import annotations

from mammut_calibration.notes import Question
from mammut_runtime.manifest import Manifest

DEFAULT_QUESTIONS: tuple[Question, ...] = (
    Question("what is this?", None, ("a person", "an animal", "a plant", "a building", "a vehicle", "a thing")),
    Question("what colour is it?", None, ("red", "green", "blue", "yellow", "brown", "black", "white", "grey")),
    Question("how many are there?", None, ("one", "two", "three", "many", "none")),
    Question("is this inside or outside?", None, ("inside", "outside")),
    Question("is there a person in the picture?", None, ("yes", "no")),
    Question("is this a photograph or a drawing?", None, ("a photograph", "a drawing")),
)
"""Whether the answers are right does not matter here: two models that compute the same give the same."""

SHORT_QUESTION = Question("what?", None, ("yes", "no"))
"""For a model with room for few tokens, where no other question fits."""

DEFAULT_NAMES = (
    "person", "child", "dog", "cat", "bird", "horse", "flower", "tree", "house", "street", "car", "bicycle", "boat",
    "table", "chair", "book", "shirt", "shoe", "plate of food", "cup", "mountain", "river", "map", "drawing",
)  # fmt: skip
"""Things to match pictures with, for data without captions and class names."""

_NAMES_TO_FIND = 24


def names_to_find(manifest: Manifest) -> tuple[str, ...]:
    """What a detector is asked for: names that it was trained with, spread over all of them; else everyday ones."""
    own = manifest.detection.base_names if manifest.detection is not None else ()
    return own[:: max(1, len(own) // _NAMES_TO_FIND)][:_NAMES_TO_FIND] or DEFAULT_NAMES
