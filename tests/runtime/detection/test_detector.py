"""Pictures and names in, boxes in the picture's own pixels out."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut_runtime.detection.exemplars import MOST_SIDE, Exemplar, exemplar_crop, parse_exemplar
from mammut_runtime.detection.letterbox import Letterbox
from mammut_runtime.detection.vocabulary import Vocabulary
from mammut_runtime.errors import BundleError, InputError
from mammut_runtime.manifest import InputProfile
from mammut_runtime.pictures import read_picture

NAMES = ["cat", "dog", "bird"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), height=st.integers(40, 900), width=st.integers(40, 900))
def test_boxes_are_in_the_pixels_of_any_picture(
    detecting: Any, make_scene: Any, data: Any, height: int, width: int
) -> None:
    least = max(height, width) // 6  # a thing of 10 pixels in the square
    if min(height, width) <= least:
        return
    x0 = data.draw(st.integers(0, width - least - 1))
    y0 = data.draw(st.integers(0, height - least - 1))
    x1 = data.draw(st.integers(x0 + least, width))
    y1 = data.draw(st.integers(y0 + least, height))
    with detecting.model() as model:
        found = model.detect(make_scene(height, width, {"dog": (x0, y0, x1, y1)}), NAMES)
    assert [each.name for each in found] == ["dog"]
    assert (found.width, found.height) == (width, height)
    margin = 1.6 / Letterbox.fit(height, width, 64).scale  # the colour's edge pixels are mixed with grey
    np.testing.assert_allclose(found.detections[0].box.xyxy, (x0, y0, x1, y1), atol=margin)


def test_seen_and_model_find_the_same_and_a_batch_is_the_same_as_one_by_one(detecting: Any, make_scene: Any) -> None:
    pictures = [
        make_scene(120, 200, {"cat": (10, 20, 60, 70), "bird": (120, 30, 190, 100)}),
        make_scene(300, 90, {"dog": (10, 200, 80, 290)}),
        make_scene(50, 50, {}),
    ]
    with detecting.model() as model:
        batch = model.detect_batch(pictures, NAMES)
        assert batch == [model.detect(each, NAMES) for each in pictures]
        assert batch == [seen.detect(NAMES) for seen in model.encode_batch(pictures)]
        assert batch == model.detect_batch(pictures, NAMES, batch_size=2)
        swapped = [picture[:, :, ::-1] for picture in pictures]
        assert batch == model.detect_batch(swapped, NAMES, color="bgr")
        assert batch != model.detect_batch(swapped, NAMES)  # control: the channels matter
    assert [sorted(each.name for each in one) for one in batch] == [["bird", "cat"], ["dog"], []]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_and_boxes_are_upright_too(
    detecting: Any, make_scene: Any, tmp_path: Path, orientation: int
) -> None:
    image = pytest.importorskip("PIL.Image")
    turned: Any = make_scene(120, 80, {"cat": (8, 10, 40, 60)})
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation >= 5:
        turned = turned.swapaxes(0, 1)
    exif = image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture.jpg"
    image.fromarray(np.ascontiguousarray(turned)).save(path, "JPEG", quality=95, subsampling=0, exif=exif)
    with detecting.model() as model:
        found = model.detect(path, NAMES)
        stored = model.detect(read_picture(path, upright=False), NAMES)
    assert (found.width, found.height) == (80, 120)
    np.testing.assert_allclose(found.detections[0].box.xyxy, (8, 10, 40, 60), atol=4)
    if orientation == 6:  # control: in the pixels as they are stored, it is elsewhere
        assert (stored.width, stored.height) == (120, 80)
        np.testing.assert_allclose(stored.detections[0].box.xyxy, (10, 40, 60, 72), atol=4)


@pytest.mark.parametrize("count", [1, 20, 365, 1203])
def test_any_number_of_names_goes_in_one_call(detecting: Any, make_scene: Any, count: int) -> None:
    names = ["cat", *(f"a {number}" for number in range(count - 1))]
    picture = make_scene(100, 100, {"cat": (20, 20, 70, 70)})
    with detecting.model() as model:
        found = model.detect(picture, names, threshold=0.0, max_per_class=1)
    feeds = detecting.engine.calls[-1]
    assert feeds["classes"].shape == (count, 6) and feeds["novel"].shape == (count,)
    assert found.detections[0].name == "cat" and len({each.name for each in found}) == len(found) <= count


def test_names_are_told_apart_by_having_had_boxes_in_training(
    detecting: Any, make_detecting: Any, make_bundle: Any, make_scene: Any, tmp_path: Path
) -> None:
    rule = dataclasses.replace(detecting.rule, base_names=("cat", "two  Birds"))
    detecting = make_detecting(tmp_path / "other", make_bundle, rule)
    with detecting.model() as model:
        words = model.vocabulary(["CAT", "two birds", "dog"])
        model.detect(make_scene(64, 64, {}), words)
    assert [each.novel for each in words.entries] == [False, False, True]
    assert detecting.engine.calls[-1]["novel"].tolist() == [0.0, 0.0, 1.0]


def test_a_changed_vocabulary_costs_the_text_tower_for_new_names_only(detecting: Any, make_scene: Any) -> None:
    picture = make_scene(64, 64, {"cat": (10, 10, 50, 50)})
    with detecting.model() as model:
        model.detect(picture, ["cat", "dog"])
        assert detecting.texts == 4  # two names, two prompts
        model.detect(picture, ["dog", "cat"])
        assert detecting.texts == 4
        model.detect(picture, ["cat", "dog", "bird"])
        assert detecting.texts == 6
        model.vocabulary(["cat"], templates=["one {}"])  # control: another prompt is another embedding
        assert detecting.texts == 7


def test_thresholds_of_the_call_of_the_name_and_of_the_bundle(detecting: Any, make_scene: Any) -> None:
    picture = make_scene(100, 100, {"cat": (10, 10, 50, 50), "dog": (55, 55, 95, 95)})
    with detecting.model() as model:
        words = model.vocabulary(["cat", "dog"])
        everything = model.detect(picture, words)
        assert {each.name for each in everything} == {"cat", "dog"}
        assert all(each.score >= detecting.rule.threshold for each in everything)
        strict = words.with_thresholds({"cat": 1.0})
        assert {each.name for each in model.detect(picture, strict)} == {"dog"}
        assert {each.name for each in model.detect(picture, strict, threshold=0.3)} == {"cat", "dog"}
        assert len(model.detect(picture, words, threshold=1.0)) == 0
        with pytest.raises(InputError, match=r"threshold: expected a number from 0 to 1, got 1\.5"):
            model.detect(picture, words, threshold=1.5)


def test_a_negative_is_not_reported_and_takes_what_fits_it_better(detecting: Any, make_scene: Any) -> None:
    picture = make_scene(100, 100, {"dog": (10, 10, 60, 60)})
    with detecting.model() as model:
        low = 1e-30
        assert [each.name for each in model.detect(picture, ["cat"], threshold=low)] == [
            "cat"
        ]  # control: alone it wins
        words = model.vocabulary(["cat"], negatives=["dog"])
        assert (words.names, words.negatives, len(words)) == (("cat",), ("dog",), 1)
        assert len(model.detect(picture, words, threshold=low)) == 0
        cat = make_scene(100, 100, {"cat": (10, 10, 60, 60)})
        assert [each.name for each in model.detect(cat, words)] == ["cat"]


def test_most_boxes_of_one_name(detecting: Any, make_scene: Any) -> None:
    with detecting.model() as model:
        picture = make_scene(100, 100, {"cat": (0, 0, 40, 40), "bird": (50, 50, 90, 90)})
        words = model.vocabulary(["cat"])
        assert len(model.detect(picture, words, threshold=1e-30)) == 2
        assert len(model.detect(picture, words, threshold=1e-30, max_per_class=1)) == 1


def test_boxes_are_cut_at_the_edge_of_the_picture(detecting: Any, make_scene: Any, monkeypatch: Any) -> None:
    def whole(feeds: Any) -> Any:
        boxes = np.tile(np.array([[-9, -9, 80, 80]], np.float32), (1, 9, 1))
        boxes[0, 1] = (0, 0, 64, 3)  # in the padding above a flat picture
        return {"boxes": boxes, "scores": np.full((1, 9, 1), 0.9, np.float32)}

    monkeypatch.setattr(detecting.base.engines["detector"], "_function", whole)
    with detecting.model() as model:
        found = model.detect(make_scene(50, 200, {}), ["cat"])
    assert [each.box.xyxy for each in found] == [(0, 0, 200, 50)]


def test_exemplars_stand_for_names(detecting: Any, make_scene: Any) -> None:
    picture = make_scene(60, 90, {"cat": (10, 10, 40, 30)})
    with detecting.model() as model:
        words = model.vocabulary(["dog"], exemplars=[Exemplar("my thing", picture, (10, 10, 40, 30))])
        assert words.names == ("dog", "my thing") and words.entries[1].kind == "pictures"
        crop = model.encode(exemplar_crop(picture, (10, 10, 40, 30), "x")[0])
        np.testing.assert_allclose(words.embeddings[1], crop.embedding, atol=1e-6)
        twice = [Exemplar("a", picture, (10, 10, 40, 30)), Exemplar("a", make_scene(20, 20, {"dog": (0, 0, 20, 20)}))]
        mean = model.vocabulary(exemplars=twice)
        assert len(mean) == 1 and np.linalg.norm(mean.embeddings[0]) == pytest.approx(1, abs=1e-6)
        assert not np.allclose(mean.embeddings[0], crop.embedding)
        cut = model.vocabulary(exemplars=[Exemplar("a", picture, (-5, 10, 40, 30))])
        assert cut.notices == ("1 of 1 exemplar boxes reach out of their pictures and were cut",)
        assert model.detect(picture, cut).notices == cut.notices
        assert words.notices == ()  # control
        with pytest.raises(InputError, match="the name 'my thing' is given twice"):
            model.vocabulary(["My  Thing"], exemplars=[Exemplar("my thing", picture)])


def test_the_crop_is_a_square_with_the_whole_thing_in_it() -> None:
    pixels = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    crop, cut = exemplar_crop(pixels, (10, 20, 30, 26), "x")
    assert crop.shape == (20, 20, 3) and not cut
    assert (crop == pixels[13:33, 10:30]).all()
    high, cut = exemplar_crop(pixels, (50, -10, 70, 90), "x")
    assert high.shape == (40, 40, 3) and cut
    assert (high[:, :25] == pixels[:, 35:60]).all() and (high[:, 25:] == 127).all()
    for box in ((5, 5, 5, 9), (9, 5, 5, 9), (float("nan"), 0, 1, 1)):
        with pytest.raises(InputError, match="expected a box"):
            exemplar_crop(pixels, box, "x")
    with pytest.raises(InputError, match="outside the picture of 60x40"):
        exemplar_crop(pixels, (60, 0, 70, 10), "x")


def test_exemplars_from_the_command_line() -> None:
    whole = parse_exemplar("my cup=a:b.jpg")
    assert (whole.name, whole.image, whole.box) == ("my cup", Path("a:b.jpg"), None)
    part = parse_exemplar("cup=c:/x.jpg:1,2,30.5,40")
    assert (part.image, part.box) == (Path("c:/x.jpg"), (1, 2, 30.5, 40))
    for wrong in ("cup", "=x.jpg", "cup=", "cup=x.jpg:1,2,3,b"):
        with pytest.raises(InputError, match="expected NAME=FILE or NAME=FILE:x0,y0,x1,y1"):
            parse_exemplar(wrong)


def test_a_bundle_without_a_detector_says_so(toy_bundle: Any, make_scene: Any) -> None:
    with toy_bundle.model() as model:
        assert not model.detects
        for ask in (lambda: model.detect(make_scene(9, 9, {}), ["cat"]), lambda: model.vocabulary(["cat"])):
            with pytest.raises(BundleError, match="has no 'detector' graph, which detections need"):
                ask()
        assert model.encode(make_scene(9, 9, {})).square is None


def test_what_is_not_one_picture_is_refused(detecting: Any, make_scene: Any) -> None:
    with detecting.model() as model:
        seen = model.encode(make_scene(30, 40, {}))
        again = model.see(seen.tokens, seen.embedding)
        with pytest.raises(InputError, match="this is not one picture"):
            again.detect(NAMES)
        for wrong in (np.zeros((3, 4)), np.zeros((3, 4, 4), np.uint8), [1]):
            with pytest.raises(InputError, match="expected uint8"):
                model.detect(wrong, NAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected a list of one or more names"),
        ("cat", "expected a list of one or more names, got 'cat'"),
        (["cat", " "], "a name is empty: ' '"),
        (["cat", "dog", "Cat"], r"the name 'Cat' is given twice \(also as 'cat'\)"),
        (["x" * 301], "a name is at most 300 printable characters"),
        (["a\nb"], "a name is at most 300 printable characters"),
        ([str(number) for number in range(10_001)], "expected at most 10,000 names, got 10,001"),
    ],
)
def test_names_that_cannot_be_used(detecting: Any, make_scene: Any, names: Any, message: str) -> None:
    with detecting.model() as model, pytest.raises(InputError, match=message):
        model.detect(make_scene(30, 40, {}), names)
    assert detecting.texts == 0, "refused before any work"


def test_a_vocabulary_of_another_model_is_refused_by_hash(
    detecting: Any, make_scene: Any, tmp_path: Path, make_bundle: Any, make_detecting: Any
) -> None:
    other = make_detecting(tmp_path / "other", make_bundle, dataclasses.replace(detecting.rule, threshold=0.4))
    with detecting.model() as model, other.model() as second:
        words = model.vocabulary(["cat"])
        words.save(tmp_path / "words.json")
        loaded = Vocabulary.load(tmp_path / "words.json")
        model.detect(make_scene(30, 40, {}), loaded)  # control: its own is taken
        with pytest.raises(InputError, match="was made with another bundle"):
            second.detect(make_scene(30, 40, {}), loaded)
        with pytest.raises(InputError, match="these vocabularies are of two bundles"):
            words | second.vocabulary(["dog"])


def test_a_few_names_are_joined_by_names_of_the_bundle(
    detecting: Any, make_detecting: Any, make_bundle: Any, make_scene: Any, tmp_path: Path
) -> None:
    others = tuple(f"{first} {second}" for first in ("red", "two", "the") for second in "abcdefghijklmnopqrst")
    rule = dataclasses.replace(detecting.rule, base_names=("dog", *others))
    toy = make_detecting(tmp_path / "other", make_bundle, rule)
    picture = make_scene(100, 100, {"dog": (10, 10, 60, 60)})
    with toy.model() as model:
        one = model.vocabulary(["cat"])
        assert (one.names, one.negatives, len(one), len(one.context)) == (("cat",), (), 1, 31)
        assert all(each.negative and not each.novel for each in one.entries[1:])
        assert one.digest == model.vocabulary(["cat"]).digest
        alone = model.vocabulary(["cat"], context=False)  # control
        assert alone.context == () and len(alone.entries) == 1
        # The share of the others is taken off, but one that fits better does not take the place away.
        scores = [model.detect(picture, words, threshold=1e-30).detections[0].score for words in (alone, one)]
        assert scores[1] <= scores[0]
        assert toy.engine.calls[-1]["classes"].shape == (32, 6)
        # What is like a name is left out, and so is what was asked for.
        likest = model.classifier(one.context, rule.templates).embeddings @ one.embeddings[0]
        every = model.classifier(rule.base_names, rule.templates).embeddings @ one.embeddings[0]
        assert likest.max() < np.quantile(every, 0.9)
        assert "dog" not in model.vocabulary(["cat"], negatives=["Dog"]).context
        assert len(model.vocabulary([f"cat {number}" for number in range(28)]).context) == 4
        assert model.vocabulary([f"cat {number}" for number in range(32)]).context == ()
        asked = one.context[0]
        for both in (one | model.vocabulary([asked]), model.vocabulary([asked]) | one):
            assert set(both.names) == {"cat", asked} and asked not in both.context


def test_more_names_than_the_engine_was_built_for(detecting: Any, make_scene: Any) -> None:
    with detecting.model() as model:
        words = model.vocabulary(NAMES)
        profile = InputProfile((1, 6), (2, 6), (2, 6))
        object.__setattr__(model.manifest, "profiles", {"detector": {"classes": profile}})
        with pytest.raises(InputError, match="3 names, and the engines of this bundle take at most 2"):
            model.detect(make_scene(30, 40, {}), words)
        model.detect(make_scene(30, 40, {}), words.only(["cat", "bird"]))  # control


def test_the_square_of_a_long_picture_is_shrunk_before_it_is_made() -> None:
    """As it is, it would be 65,000 x 65,000 x 3 bytes."""
    long = np.full((1, 65_000, 3), 200, np.uint8)
    tracemalloc.start()
    try:
        crop, _ = exemplar_crop(long, None, "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert crop.shape == (MOST_SIDE, MOST_SIDE, 3) and peak < 50e6
    assert (crop == 200).all(axis=(1, 2)).sum() == 1 and (crop[0] == 127).all()
    large = np.zeros((30, 2 * MOST_SIDE, 3), np.uint8)
    large[:, MOST_SIDE:] = 250
    crop, _ = exemplar_crop(large, None, "x")
    assert (crop == 127).all(axis=(1, 2)).sum() == MOST_SIDE - 15 and crop[MOST_SIDE // 2, -9, 0] == 250
    exact, _ = exemplar_crop(large[:, :MOST_SIDE], None, "x")  # control: nothing is shrunk that has not to be
    assert (exact == 0).all(axis=(1, 2)).sum() == 30
