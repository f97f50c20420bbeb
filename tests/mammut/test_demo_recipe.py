"""How the demo's data is worded and split, and how the demo is judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mammut.data.pairs import Pair
from mammut.demo import recipe
from mammut.demo.evaluate import greedy_batch, on_white, word_overlap
from mammut.generate import greedy
from mammut.model import Mammut
from mammut.presets import tiny
from mammut_runtime.errors import InputError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not part of a clone")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("A photo of Eric Holder holding a press conference.", "Eric Holder holding a press conference"),
        ("This is a photo of a shale drilling platform below a hill.", "a shale drilling platform below a hill"),
        ("An image shows metal shelves. The visible sides are coloured.", "metal shelves"),
        ("Red, yellow, and pink roses.", "Red, yellow, and pink roses"),
        ("President George H. W. Bush shakes hands.", "President George H. W. Bush shakes hands"),
        ("The Moons of Jupiter. The four are shown.", "The Moons of Jupiter"),
    ],
)
def test_plain_caption(given: str, plain: str) -> None:
    assert recipe.plain_caption(given) == plain


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ([("what is the blue shape?", "rectangle")], "blue rectangle"),
        ([("what color is the shape?", "teal"), ("is there a circle?", "yes")], "teal circle"),
        ([("is there not a red shape?", "no"), ("is no triangle present?", "no")], "red triangle"),
        ([("is there a red shape?", "no"), ("is there a circle?", "yes")], None),
        ([("is no gray shape present?", "yes"), ("what shape is shown?", "circle")], None),
    ],
)
def test_shape_name_follows_from_the_questions(asked: list[tuple[str, str]], name: str | None) -> None:
    assert recipe.shape_name(asked) == name


def test_what_is_there_is_asked_as_often_as_what_is_not() -> None:
    asked = (
        ("what shape is shown?", "circle"), ("is there a red shape?", "no"), ("is there a blue shape?", "no"),
        ("is there not a teal shape?", "yes"), ("is no gray shape present?", "yes"), ("is there a circle?", "yes"),
        ("is there not a circle?", "no"),
    )  # fmt: skip
    (even,) = recipe.evenly_asked([Pair("x", b"", (), (), asked)])
    about = [("circle" in q) for q, a in even.questions if a in ("yes", "no")]
    assert sum(about) == 4 and len(about) == 8 and set(even.questions) == set(asked)
    alone = Pair("x", b"", (), (), asked[:2])
    assert recipe.evenly_asked([alone]) == [alone]  # nothing to make more of


def test_one_vendor_of_some_names_is_held_out() -> None:
    names = [f"an emoji of thing {n}" for n in range(600)]
    held = {vendor: [recipe.held_out_drawing(Pair(f"{vendor}/x.png", b"", (name,))) for name in names]
            for vendor in ("noto", "blobmoji")}  # fmt: skip
    assert not any(held["noto"])
    assert 60 < sum(held["blobmoji"]) < 140


def test_a_folder_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the data folder of the demo recipe, but it has no pairs/clothing"):
        recipe.training_pairs(tmp_path)


def test_pairs_are_packed_as_training_reads_them(tmp_path: Path) -> None:
    from mammut.data.pairs import plain_pair
    from mammut.data.shards import Part, Position, stream

    png = bytes(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1])
    forms = ("a photo of a hat", "a hat")
    pairs = [Pair(f"x {n}", png, forms[:1], forms, (("what is this?", "a hat"),), "CC0") for n in range(3)]
    content = recipe.packed(recipe.Training(pairs, 1.0))
    assert content == recipe.packed(recipe.Training(pairs, 1.0))  # resumable: the same bytes again
    recipe.write_whole(tmp_path / "x.tar", content)
    drawn = [next(stream([Part(str(tmp_path / "x.tar"))], Position(), 0, 1)).sample]
    assert drawn[0] is not None and drawn[0].data == png
    read = plain_pair("", b"", drawn[0].row)
    assert (read.captions, read.matches, read.questions) == (pairs[0].captions, forms, pairs[0].questions)


def test_rare_captions_are_evened() -> None:
    pairs = [Pair("x", b"", ("often",))] * 160 + [Pair("x", b"", ("rarely",))] * 40 + [Pair("x", b"", ("once",))]
    shares = recipe.evened(pairs)
    assert (shares[0], shares[160], shares[-1]) == (0.5, 1.0, 1.0)


def test_drawings_are_judged_on_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[1, 1] = (10, 20, 30, 255)
    drawing = Pair("noto/x.png", bytes(cv2.imencode(".png", pixels)[1]), ("x",))
    shown = on_white(drawing)
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[1, 1].tolist() == [30, 20, 10]


def test_batched_greedy_equals_the_slow_reference() -> None:
    torch.manual_seed(1)
    model = Mammut(tiny()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # livelier than the start, so that captions differ
            parameter.add_(0.1 * torch.randn_like(parameter))
        pixels = torch.randn(5, 3, 32, 32)
        tokens, _ = model.encode_image(pixels)
    slow = greedy(model, pixels, [1, 7], end_id=2, max_tokens=12)
    assert greedy_batch(model, tokens, torch.tensor([[1, 7]] * 5), end_id=2, max_tokens=12) == slow
    assert len({tuple(ids) for ids in slow}) > 1  # control


def test_word_overlap_prefers_rare_words() -> None:
    scores = word_overlap(["a red fox"], ["a dog", "the fox", "a cat"])
    assert int(scores.argmax()) == 1


@pytest.mark.shared
@needs_data
def test_nothing_that_is_judged_is_trained_on() -> None:
    for kind in ("clothing", "flowers"):
        trained, judged = ({p.name for p in recipe.labelled_pairs(DATA, kind, split)} for split in ("train", "val"))
        assert judged and not trained & judged
    trained_keys = {p.name for p in recipe.photo_pairs(DATA, "train")}
    judged_keys = {p.name for p in recipe.photo_pairs(DATA, "val")}
    assert 100 < len(judged_keys) < 220 and not trained_keys & judged_keys
    emoji = recipe.emoji_pairs(DATA)
    held = {p.captions[0] for p in emoji if recipe.held_out_drawing(p)}
    seen = [p for p in emoji if not recipe.held_out_drawing(p)]
    assert held <= {
        p.captions[0] for p in seen if p.name.startswith("noto")
    }  # the other vendor's drawing is trained on
    assert not held & {p.captions[0] for p in seen if p.name.startswith("blobmoji")}
    assert all(p.credit for p in emoji)


@pytest.mark.shared
@needs_data
def test_yes_no_questions_are_balanced() -> None:
    asked = [answer for p in recipe.labelled_pairs(DATA, "flowers", "val") for q, answer in p.questions[3:5]]
    assert asked.count("yes") == asked.count("no")


@pytest.mark.shared
@needs_data
def test_the_demo_is_one_command(tmp_path: Path) -> None:
    """A few steps of the committed recipe on two processes: loop, sources and tokenizer are the whole run's."""
    from mammut.checkpoint import DEMO_FOLDER, load_checkpoint
    from mammut.commands import cli
    from mammut.training.run_log import read_log
    from mammut_runtime import console

    out = tmp_path / "out"
    given = ["demo", str(DATA), str(out), "--stage", "pictures", "--steps", "2", "--processes", "2"]
    assert console.run(cli, given) == 0
    rows = read_log(out / "pictures")
    assert [row["step"] for row in rows if "loss" in row] == [2]
    assert {f"held_out/{kind}" for kind in recipe.held_out(DATA)} <= rows[-1].keys()
    assert (out / "tokenizer.json").read_bytes() == (DEMO_FOLDER / "tokenizer.json").read_bytes()
    made, shipped = (load_checkpoint(each).model.config for each in (out / "pictures" / "checkpoint", "demo"))
    assert made == dataclasses.replace(shipped, video=None)
    more = {"scenes": ["scene"], "rehearsal": ["scene"], "everything": ["scene", "moving"]}
    for stage, kinds in more.items():  # the same sources, and more
        made = getattr(recipe, f"{stage}_run")(DATA, out, "demo", 3)
        assert made.data.mixing == "batches" and made.stages[0].steps == 3
        assert [source.kind for source in made.data.sources[5:]] == kinds
    motion = recipe.motion_run(DATA, out, "demo", 3)
    assert [source.kind for source in motion.data.sources] == ["moving"] and motion.stages[0].schedule == "constant"
