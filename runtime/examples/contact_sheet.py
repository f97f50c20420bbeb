"""A contact sheet of a clip: a row of frames for each cue, with its times and words below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime import InputError
from mammut_runtime.annotate import annotate
from mammut_runtime.video.cues import Cue
from mammut_runtime.video.decode import Clip

Canvas = NDArray[np.uint8]
FRAMES, FRAME_HEIGHT, MOST_CUES = 4, 150, 12
_GAP = 4
"""Pixels between two frames."""


def contact_sheet(path: Path, cues: Sequence[Cue]) -> Canvas:
    """uint8[H, W, 3], RGB: some of the frames that each cue was made from. Of more than 12 cues, 12 spread evenly.

    Raises InputError if the clip cannot be read, or there are no cues.
    """
    if not cues:
        raise InputError(f"{path}: a contact sheet needs at least one cue, got none")
    shown = [cues[at] for at in _spread(len(cues), MOST_CUES)]
    wanted = {cue: [cue.frames[at].index for at in _spread(len(cue.frames), FRAMES)] for cue in shown}
    small = _frames(path, {index for indices in wanted.values() for index in indices})
    rows = [_row([small[index] for index in wanted[cue] if index in small], cue) for cue in shown]
    return np.concatenate([np.pad(row, ((0, _GAP), (0, 0), (0, 0))) for row in rows])


def _spread(count: int, most: int) -> list[int]:
    """At most so many of count places, evenly."""
    chosen = min(count, most)
    return [(2 * part + 1) * count // (2 * chosen) for part in range(chosen)]


def _frames(path: Path, indices: set[int]) -> dict[int, Canvas]:
    found: dict[int, Canvas] = {}
    with Clip.open(path) as clip:
        while len(found) < len(indices) and (tick := clip.advance()) is not None:
            if tick.index in indices:
                pixels = clip.bgr()
                width = max(1, round(pixels.shape[1] * FRAME_HEIGHT / pixels.shape[0]))
                small = cv2.resize(pixels, (width, FRAME_HEIGHT), interpolation=cv2.INTER_AREA)
                found[tick.index] = np.asarray(small[:, :, ::-1], np.uint8)
    return found


def _row(frames: Sequence[Canvas], cue: Cue) -> Canvas:
    blank = [np.zeros_like(frames[0])] * (FRAMES - len(frames))
    picture = np.concatenate([np.pad(each, ((0, 0), (0, _GAP), (0, 0))) for each in [*frames, *blank]], axis=1)
    text = f"{cue.start_ms / 1000:.1f} - {cue.end_ms / 1000:.1f} s: {cue.text} ({cue.confidence:.2f})"
    return annotate(picture, [text])
