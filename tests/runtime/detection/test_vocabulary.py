"""Vocabularies: kept, combined, calibrated, and refused where they do not fit."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.detection import vocabulary_file
from mammut_runtime.detection.vocabulary import Calibration, Entry, Vocabulary, check_names, logit, sigmoid
from mammut_runtime.errors import InputError

HASH = "ab" * 32


def made(*entries: Entry | str, bundle: str = HASH, seed: int = 0) -> Vocabulary:
    """A vocabulary with random embeddings; a name's depends on the name and the seed."""
    full = tuple(Entry(each) if isinstance(each, str) else each for each in entries)
    rows = [np.random.default_rng([seed, *each.name.encode()]).standard_normal(6) for each in full]
    unit = np.array([row / np.linalg.norm(row) for row in rows], np.float32)
    return Vocabulary(full, unit, bundle, "toy", ("a {}",))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    words = made(
        Entry("car", novel=False, calibration=Calibration(1.5, -0.25, 0.4)),
        Entry("my cup", "pictures"),
        Entry("小さい車", negative=True),
    ).with_calibrations({"my cup": Calibration(threshold=0.75)}, {"false alarms": "1 an hour"})
    path = tmp_path / "words.json"
    words.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.entries == words.entries and (loaded.embeddings == words.embeddings).all()
    assert loaded.embeddings.dtype == np.float32
    for key in ("bundle", "model", "templates", "calibrated_for", "notes", "digest"):
        assert getattr(loaded, key) == getattr(words, key), key
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        words.save(path)
    loaded.save(path, overwrite=True)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["words.json"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "words.json"
    made("car").save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vocabulary_file.os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written"):
        made("dog").save(path, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    made("dog").save(path, overwrite=True)  # control
    assert Vocabulary.load(path).names == ("dog",)


def _changed(**values: Any) -> Any:
    return lambda data: {**data, **values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(extra=1), "unknown key 'extra'"),
        (lambda data: {key: value for key, value in data.items() if key != "model"}, "missing key 'model'"),
        (_changed(format=2), "format: expected one of 1, got 2"),
        (_changed(kind="picture index"), "not a vocabulary"),
        (_changed(bundle="xyz"), "bundle: expected 64 hexadecimal digits"),
        (_changed(embeddings="!!"), "embeddings: not base64"),
        (_changed(embeddings=base64.b64encode(b"12345678").decode()), "embeddings: 8 bytes, expected 48"),
        (_changed(embeddings=base64.b64encode(np.ones(12, "<f4")).decode()), "that of 'car' is not of length 1"),
        (_changed(embeddings=base64.b64encode(np.full(12, np.nan, "<f4")).decode()), "that of 'car' is not of length"),
        (_changed(entries=[]), "entries: expected 1 to 10,000 items"),
        (lambda data: {**data, "entries": [data["entries"][0]] * 2}, "the name 'car' is given twice"),
        (lambda data: {**data, "entries": [{**each, "negative": True} for each in data["entries"]]}, "negatives only"),
        (
            lambda data: {**data, "entries": [{**each, "name": "a\x1b[2J"} for each in data["entries"]]},
            "expected a text without control characters",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "words.json"
    made("car", "dog").save(path)
    Vocabulary.load(path)  # control
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")
    with pytest.raises(InputError, match=message) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    for content, message in (
        (b"", "not readable as JSON"),
        (b"\xff\xfe", "not readable"),
        (b"[1]", "not a vocabulary"),
    ):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(InputError, match=message):
            Vocabulary.load(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read as a vocabulary"):
        Vocabulary.load(tmp_path / "missing.json")
    with pytest.raises(InputError, match="cannot be read as a vocabulary"):
        Vocabulary.load(tmp_path)
    monkeypatch.setattr(vocabulary_file, "MAX_FILE_BYTES", 2)
    with pytest.raises(InputError, match="expected at most 2"):
        Vocabulary.load(tmp_path / "x.json")


def test_both_together() -> None:
    first, second = made("car", Entry("dog", negative=True)), made("Car", "bird", seed=1)
    both = first | second
    assert both.names == ("Car", "bird") and both.negatives == ("dog",)
    assert (both.embeddings[0] == second.embeddings[0]).all() and (both.embeddings[1] == first.embeddings[1]).all()
    assert (first | first).digest == first.digest
    with pytest.raises(InputError, match="'Dog' is a name of one vocabulary and a negative of the other"):
        first | made("Dog")
    with pytest.raises(InputError, match="these vocabularies are of two bundles"):
        first | made("bird", bundle="cd" * 32)
    with pytest.raises(InputError, match="negatives only"):
        made(Entry("dog", negative=True))


def test_a_part_of_the_names_keeps_the_negatives() -> None:
    words = made("car", "dog", Entry("cup", negative=True), "bird")
    part = words.only(["bird", "CAR"])
    assert part.names == ("bird", "car") and part.negatives == ("cup",)
    assert (part.embeddings == words.embeddings[[3, 0, 2]]).all()
    with pytest.raises(InputError, match="this vocabulary has no 'cow'; it has car, dog, bird"):
        words.only(["cow"])


def test_thresholds_by_name() -> None:
    words = made("car", "dog").with_thresholds({"DOG": 0.7})
    np.testing.assert_allclose(words.thresholds(0.25), [0.25, 0.7])
    with pytest.raises(InputError, match="this vocabulary has no 'cow'"):
        words.with_thresholds({"cow": 0.5})
    with pytest.raises(InputError, match="threshold of 'dog': expected a number from 0 to 1, got 7"):
        words.with_thresholds({"dog": 7})


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0.2, 5), st.floats(-4, 4))
def test_a_calibration_keeps_the_order_and_gives_probabilities(score: float, temperature: float, bias: float) -> None:
    words = made("car", Entry("dog", calibration=Calibration(temperature, bias)))
    scores = np.array([[score, score], [score / 2, score / 2]], np.float32)
    found = words.probabilities(scores)
    assert (found[:, 0] == scores[:, 0]).all(), "a name without calibration keeps its scores"
    assert ((found >= 0) & (found <= 1)).all() and found[0, 1] >= found[1, 1]
    assert (scores[0] == np.float32(score)).all(), "what was given is not changed"
    expected = sigmoid(logit(scores[:, 1]) / temperature + bias)
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-6)


def test_logit_and_sigmoid_are_inverse() -> None:
    values = np.linspace(0.001, 0.999, 50)
    np.testing.assert_allclose(sigmoid(logit(values)), values, atol=1e-12)
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()


def test_a_calibration_that_was_measured_among_other_names_is_noticed(detecting: Any, make_scene: Any) -> None:
    picture = make_scene(60, 60, {"cat": (5, 5, 50, 50)})
    with detecting.model() as model:
        words = model.vocabulary(["cat", "dog"])
        measured = words.with_calibrations({"cat": Calibration(threshold=0.5)}, {})
        assert measured.calibrated and not words.calibrated
        assert model.detect(picture, measured).notices == ()  # control
        (notice,) = model.detect(picture, measured | model.vocabulary(["bird"])).notices
        assert "calibrated together with others" in notice


def test_negatives_and_names_are_checked_together() -> None:
    with pytest.raises(InputError, match="'dog' is given twice"):
        made("dog", Entry("dog", negative=True))
    with pytest.raises(InputError, match="a name is empty"):
        check_names(["car", ""])
    check_names(["car"])  # control


@pytest.mark.parametrize("bias", [1000.5, -2000.0, float("nan")])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, bias: float) -> None:
    def words(value: float) -> Vocabulary:
        entry = Entry("cat", calibration=Calibration(1.0, value, 0.5))
        return Vocabulary((entry,), np.ones((1, 1), np.float32), "0" * 64, "m", ())

    path = tmp_path / "w.json"
    words(1000.0).save(path)
    assert Vocabulary.load(path).entries[0].calibration.bias == 1000  # control
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"entries\[0\]\.calibration\.bias: expected .*; nothing was written"):
        words(bias).save(path, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
