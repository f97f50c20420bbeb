"""The demo's clips: what is held out, and that every wording fits the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mammut.checkpoint import DEMO_FOLDER
from mammut.demo import recipe
from mammut.demo.clips import CLIP_KINDS, compose_clip, held_out_clips, training_questions
from mammut.demo.scenes import scene_drawings
from mammut_runtime.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not part of a clone"),
]


def test_held_out_clips_are_the_same_each_time_and_of_all_kinds() -> None:
    one, same = (list(held_out_clips(DATA, 12)) for _ in range(2))
    assert [each.scene.kind for each in one] == [*CLIP_KINDS, *CLIP_KINDS]
    assert all(np.array_equal(a.scene.frames, b.scene.frames) for a, b in zip(one, same, strict=True))
    assert len({each.photo for each in one}) == 12
    assert all("CC BY 4.0" in each.credit for each in one)
    other = list(held_out_clips(DATA, 12, seed=1))
    assert not np.array_equal(one[0].scene.frames, other[0].scene.frames)  # control


def test_new_drawings_are_one_vendors_and_never_trained_on() -> None:
    known = {drawing.name for drawing in scene_drawings(DATA) if drawing.vendor == "blobmoji"}
    trained, new = (
        {
            (thing.name, thing.vendor)
            for each in held_out_clips(DATA, 60, new_drawings=own)
            for thing in each.scene.things
        }
        for own in (False, True)
    )
    assert len(new) > 10 and {vendor for _, vendor in new} == {"blobmoji"}
    assert not {name for name, _ in new} & known
    assert {name for name, vendor in trained if vendor == "blobmoji"} <= known  # control


def test_every_wording_fits_the_context() -> None:
    """The longest names in every sentence: nothing of a question, an answer or a text to match is cut."""
    tokenizer = Tokenizer.from_file(DEMO_FOLDER / "tokenizer.json")
    drawings = sorted(scene_drawings(DATA), key=lambda drawing: -len(tokenizer.encode(drawing.name)))
    longest = [drawing for drawing in drawings if drawing.name.count(" ") < 3][:24]
    rng, ask = np.random.default_rng(0), recipe.PROMPTS["ask"]
    for _ in range(600):
        clip = compose_clip(rng, longest, np.zeros((40, 40, 3), np.uint8), 12, 32)
        for text in (*clip.captions, *clip.matches):
            assert tokenizer.count_cut(text, 32) == 0, text
        for question, answer in clip.asked:
            assert tokenizer.count_cut(f"{ask.format(question=question)} {answer}", 32) == 0, question


def test_names_are_singular() -> None:
    named = {thing.name for clip in training_questions(DATA, 500) for thing in clip.things}
    assert len(named) > 150 and not named & {"glasses", "jeans", "scissors"}
    assert {drawing.name for drawing in scene_drawings(DATA)} >= {"glasses", "jeans", "scissors"}  # control
