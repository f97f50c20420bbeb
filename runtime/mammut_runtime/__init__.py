"""Runs MaMMUT bundles on devices: captions, answers, matches and search, without torch.

    from mammut_runtime import Model

    model = Model.load("bundle/")
    print(model.encode("photo.jpg").caption().text)

Names are imported when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mammut_runtime.bundle import Bundle, Manifest
    from mammut_runtime.caption_options import CaptionOptions
    from mammut_runtime.detection.boxes import Box, Detection, Detections
    from mammut_runtime.detection.exemplars import Exemplar
    from mammut_runtime.detection.tracker import Tracked, Tracker, TrackRule
    from mammut_runtime.detection.vocabulary import Vocabulary
    from mammut_runtime.engines import Engine, EngineOptions
    from mammut_runtime.engines.fake import FakeEngine
    from mammut_runtime.errors import (
        BundleError,
        CheckpointError,
        EngineError,
        InputError,
        MammutError,
        VerificationError,
    )
    from mammut_runtime.generation_openmammut import OpenMammutOptions
    from mammut_runtime.model import Model, Seen
    from mammut_runtime.pictures import Picture, read_picture
    from mammut_runtime.results import Answer, Candidate, Caption, Match, Matches
    from mammut_runtime.search import Hit, IndexUpdate, PictureIndex, update_index
    from mammut_runtime.text_tower import Classifier

_HOMES = {
    "bundle": ("Bundle", "Manifest"),
    "caption_options": ("CaptionOptions",),
    "detection.boxes": ("Box", "Detection", "Detections"),
    "detection.exemplars": ("Exemplar",),
    "detection.tracker": ("TrackRule", "Tracked", "Tracker"),
    "detection.vocabulary": ("Vocabulary",),
    "engines": ("Engine", "EngineOptions"),
    "engines.fake": ("FakeEngine",),
    "errors": (
        "BundleError",
        "CheckpointError",
        "EngineError",
        "InputError",
        "MammutError",
        "VerificationError",
    ),
    "generation_openmammut": ("OpenMammutOptions",),
    "model": ("Model", "Seen"),
    "pictures": ("Picture", "read_picture"),
    "results": ("Answer", "Candidate", "Caption", "Match", "Matches"),
    "search": ("Hit", "IndexUpdate", "PictureIndex", "update_index"),
    "text_tower": ("Classifier",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "Box",
    "Bundle",
    "BundleError",
    "Candidate",
    "Caption",
    "CaptionOptions",
    "CheckpointError",
    "Classifier",
    "Detection",
    "Detections",
    "Engine",
    "EngineError",
    "EngineOptions",
    "Exemplar",
    "FakeEngine",
    "Hit",
    "IndexUpdate",
    "InputError",
    "MammutError",
    "Manifest",
    "Match",
    "Matches",
    "Model",
    "OpenMammutOptions",
    "Picture",
    "PictureIndex",
    "Seen",
    "TrackRule",
    "Tracked",
    "Tracker",
    "VerificationError",
    "Vocabulary",
    "read_picture",
    "update_index",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
