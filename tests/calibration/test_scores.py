"""mammut-calibrate scores from the command line, with a detector that scores a picture by its brightness."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_calibration import commands, commands_scores
from mammut_calibration.alarms import AlarmLimit
from mammut_calibration.platt import fit
from mammut_calibration.scores import Gathered, calibrate_names, calibrated
from mammut_runtime.detection.vocabulary import Entry, Vocabulary

HASH = "ab" * 32


class Brightness:
    """Stands for a model: a "cat" is a bright picture, a "dog" a dark one."""

    detector: Any

    def __init__(self) -> None:
        self.detector = self

    def __enter__(self) -> Brightness:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def vocabulary(self, names: Sequence[str], **_: Any) -> Vocabulary:
        rows = np.eye(len(names), 4, dtype=np.float32)
        return Vocabulary(tuple(Entry(name) for name in names), rows, HASH, "brightness", ("{}",))

    def square(self, image: Any, color: str) -> Any:
        pixels = image if isinstance(image, np.ndarray) else image.rgb()
        return float(pixels.mean()) / 255

    def best_scores(self, squares: list[float], vocabulary: Vocabulary) -> Any:
        columns = {"cat": np.array(squares), "dog": 1 - np.array(squares)}
        return np.stack([columns[name] for name in vocabulary.names], axis=1).astype(np.float32)


def write(folder: Path, levels: Sequence[float], seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number, level in enumerate(levels):
        cv2.imwrite(str(folder / f"{number:04d}.png"), np.full((6, 8, 3), round(level * 255), np.uint8))
    return folder


@pytest.fixture
def run(monkeypatch: Any, capsys: Any, tmp_path: Path) -> Any:
    monkeypatch.setattr(commands_scores.Model, "load", lambda *_, **__: Brightness())

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mammut-calibrate", "scores", "bundle", *map(str, arguments)])
        code = commands.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_thresholds_temperatures_and_the_page(run: Any, tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    write(tmp_path / "empty", np.clip(source.normal(0.3, 0.08, 120), 0, 0.6))
    write(tmp_path / "things" / "Cat", np.clip(source.normal(0.7, 0.1, 40), 0.4, 1))
    out = tmp_path / "words.json"
    # 120 pictures at one a minute are two hours
    code, said, err = run(
        "--names", "cat", "--background", tmp_path / "empty", "--positives", tmp_path / "things",
        "--false-alarms", 2, "--fps", 1 / 60, "--out", out,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert said.startswith("cat: threshold 0.") and "finds" in said
    words = Vocabulary.load(out)
    calibration = words.entries[0].calibration
    assert calibration.threshold is not None and calibration.changes_scores
    assert words.calibrated_for == words.digest and words.bundle == HASH
    assert "at most 2 false alarms an hour" in words.notes["asked"]
    # With the threshold, no more alarms than promised in the same footage, and nearly all cats
    background = np.array([[level] for level in np.clip(source.normal(0.3, 0.08, 5000), 0, 0.6)], np.float32)
    assert np.mean(words.probabilities(background) >= calibration.threshold) <= 2 / 60
    page = (tmp_path / "words.html").read_text("utf-8")
    assert "reliability" in page and "class='threshold'" in page and "calibration error" in page
    assert "<script" not in page and "http" not in page


def test_too_little_footage_says_so_and_what_would_do(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "empty", np.linspace(0.1, 0.5, 60))
    arguments = ("--names", "cat,dog", "--background", tmp_path / "empty", "--out", tmp_path / "w.json")
    code, out, err = run(*arguments, "--false-alarms", 1, "--json")
    assert code == 0
    assert "1 min of footage cannot show 1 false alarms an hour" in err and "180 an hour (at 95%); 3 h without" in err
    found = json.loads(out)
    assert [each["shown"] for each in found["names"]] == [False, False] and found["hours"] == pytest.approx(1 / 60)
    assert [each["alarms"] for each in found["names"]] == [0, 0]
    assert found["names"][1]["threshold"] == pytest.approx(0.91, abs=0.01)
    assert "(not what was asked)" in Vocabulary.load(tmp_path / "w.json").notes["name cat"]
    code, _, err = run(*arguments, "--false-alarms", 200, "--overwrite")  # control: that it can show
    assert (code, err) == (0, "")


def test_pictures_that_do_not_help_are_named(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "empty", np.linspace(0.4, 0.6, 40))
    write(tmp_path / "things" / "cat", [0.1] * 20)
    write(tmp_path / "things" / "dog", [0.1] * 3)
    (tmp_path / "empty" / "broken.png").write_bytes(b"x")
    code, out, err = run(
        "--names", "cat,dog", "--background", tmp_path / "empty", "--positives", tmp_path / "things",
        "--false-alarms", 1000, "--out", tmp_path / "w.json", "--json",
    )  # fmt: skip
    assert code == 0
    assert "'cat': no probabilities could be fitted (its pictures do not score higher" in err
    assert "'dog': no probabilities could be fitted (3 pictures of it, expected at least 8)" in err
    assert "left out" in err and "broken.png" in err
    cat, dog = json.loads(out)["names"]
    assert (cat["found"], dog["found"]) == (0.0, 1.0) and cat["temperature"] == 1.0


def test_clips_are_looked_at_by_their_rate(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    writer = cv2.VideoWriter(str(folder / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (32, 32))
    if not writer.isOpened():
        pytest.skip("this OpenCV has no encoder for Motion JPEG")
    for number in range(40):
        writer.write(np.full((32, 32, 3), 200 if number >= 20 else 50, np.uint8))
    writer.release()
    code, out, _ = run(
        "--names", "cat", "--background", folder, "--fps", 5, "--quiet", 1, "--false-alarms", 100_000,
        "--out", tmp_path / "w.json", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["footage"].startswith("20 frames") and found["hours"] == pytest.approx(4 / 3600)
    (cat,) = found["names"]
    assert cat["shown"] and cat["alarms"] == 4  # four seconds, one alarm in each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--background", "empty", "--false-alarms", "1"], "give either --names (or --exemplar), or --vocabulary"),
        (["--names", "cat", "--background", "empty", "--false-alarms", "0"], "per_hour: expected a number"),
        (["--names", "cat", "--background", "missing.png", "--false-alarms", "1"], "nothing here can be used"),
        (["--names", "cat", "--background", "none", "--false-alarms", "1"], "no pictures or clips in this folder"),
        (["--names", "cat", "--background", "empty", "--false-alarms", "1", "--fps", "0"], "--fps: expected frames"),
        (
            ["--vocabulary", "w.json", "--no-context", "--background", "empty", "--false-alarms", "1"],
            "--no-context go with --names",
        ),
        (["--names", "cat", "--background", "empty"], "Missing option '--false-alarms'"),
        (
            ["--names", "cat", "--background", "empty", "--false-alarms", "1", "--positives", "cows"],
            "is called like no name; the names are cat",
        ),
        (
            ["--names", "cat,dog", "--background", "empty", "--false-alarms", "1", "--positives", "empty"],
            "no folders in it; expected one for each name",
        ),
    ],
)
def test_bad_input_is_one_line(run: Any, tmp_path: Path, monkeypatch: Any, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty", [0.1, 0.2])
    write(tmp_path / "cows" / "cow", [0.1, 0.2])
    (tmp_path / "none").mkdir()
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and message in err
    assert not (tmp_path / "vocabulary.json").exists()


def test_a_vocabulary_that_is_there_is_kept(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "empty", [0.1, 0.2])
    (tmp_path / "w.json").write_text("mine")
    code, _, err = run(
        "--names", "cat", "--background", tmp_path / "empty", "--false-alarms", 1, "--out", tmp_path / "w.json"
    )
    assert code == 2 and "exists already" in err and (tmp_path / "w.json").read_text() == "mine"


def test_a_threshold_that_would_be_one_gets_a_flatter_fit(monkeypatch: Any) -> None:
    """Scores of the two kinds apart, and some alarms among the best: the steepest fit calls all of those certain."""
    without = np.concatenate([np.full(3600, 0.1), [0.99] * 4, [0.999]]).astype(np.float32)[:, None]
    own = np.full(50, 0.6, np.float32)
    words = Brightness().vocabulary(["cat"])
    looked = Gathered(without, tuple((0.0,) for _ in without))
    limit = AlarmLimit(5.0, quiet_s=0)  # one alarm an hour is bearable
    steep = fit(own, without[:, 0])
    assert steep is not None
    after = words.with_calibrations({"cat": steep.calibration}, {}).probabilities(without)
    assert (after == 1).sum() == 5, "control: that nothing of the steepest fit tells them apart"
    (result,), seen = calibrate_names(words, looked, {"cat": own}, limit, 1.0)
    threshold = result.calibration.threshold
    assert threshold is not None and threshold < 1 and result.fit is not None
    kept = calibrated(words, [result], {})
    passing = kept.probabilities(without)[:, 0] >= kept.thresholds(0.5)[0]
    assert passing.sum() == result.chosen.alarms <= limit.most_alarms(seen.hours) and result.chosen.shown


def test_the_page_takes_the_place_of_nothing(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "empty", [0.1, 0.2])
    arguments = ("--names", "cat", "--background", tmp_path / "empty", "--false-alarms", 1, "--out")
    for more in ((tmp_path / "v.html",), (tmp_path / "w.json", "--plot", tmp_path / "." / "w.json", "--overwrite")):
        code, _, err = run(*arguments, *more)
        assert code == 2 and "the vocabulary and the page at once" in err
    page = tmp_path / "w.html"
    page.write_text("mine")
    code, _, err = run(*arguments, tmp_path / "w.json")
    assert code == 2 and "w.html: exists already" in err and page.read_text() == "mine"
    assert not (tmp_path / "w.json").exists()
    assert run(*arguments, tmp_path / "w.json", "--overwrite")[0] == 0 and page.read_text() != "mine"  # control


def test_a_place_that_cannot_be_written_is_told_before_the_footage_is_read(
    run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    write(tmp_path / "empty", [0.1, 0.2])
    (tmp_path / "file").write_text("")
    read: list[object] = []
    gather = commands_scores.gather
    monkeypatch.setattr(commands_scores, "gather", lambda *given: read.append(given) or gather(*given))
    arguments = ("--names", "cat", "--background", tmp_path / "empty", "--false-alarms", 1, "--out")
    code, _, err = run(*arguments, tmp_path / "file" / "w.json")
    assert code == 2 and "cannot be written" in err and read == []
    assert run(*arguments, tmp_path / "new" / "w.json")[0] == 0 and len(read) == 1  # control


def test_folders_are_called_like_names_as_names_are_like_each_other(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "empty", [0.1, 0.2])
    write(tmp_path / "things" / "  CAT ", [0.8] * 9)
    write(tmp_path / "things" / "dog", [0.1] * 9)
    arguments = (
        "--names", "cat,dog", "--background", tmp_path / "empty", "--positives", tmp_path / "things",
        "--false-alarms", 1, "--json", "--overwrite", "--out", tmp_path / "w.json",
    )  # fmt: skip
    code, out, _ = run(*arguments)
    assert code == 0 and [each["positives"] for each in json.loads(out)["names"]] == [9, 9]
    write(tmp_path / "things" / "cat", [0.8])
    code, _, err = run(*arguments)
    assert code == 2 and "another folder is called like this name too" in err
