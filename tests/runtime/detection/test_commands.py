"""mammut-run detect and vocabulary, as a user types them, with the detecting toy as the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mammut_runtime.commands import main
from mammut_runtime.commands_inputs import ModelSettings
from mammut_runtime.detection.vocabulary import Vocabulary


@pytest.fixture
def pictures(tmp_path: Path, detecting: Any, make_scene: Any, monkeypatch: Any) -> Path:
    monkeypatch.setattr(ModelSettings, "load", lambda _: detecting.model())
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    scenes = {
        "one.png": make_scene(120, 200, {"cat": (10, 20, 60, 70), "bird": (120, 30, 190, 100)}),
        "more/two.png": make_scene(300, 90, {"dog": (10, 200, 80, 290)}),
    }
    for name, picture in scenes.items():
        cv2.imwrite(str(folder / name), picture[:, :, ::-1])
    return folder


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_names_in_a_folder_of_pictures(pictures: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "detect", pictures, "--names", "cat, dog, bird")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith(f"{pictures / 'more/two.png'}: dog 0.") and second.count("(") == 2
    code, out, _ = run(capsys, "detect", pictures, "--names", "cat,dog,bird", "--json", "--max-per-class", "1")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["path"] for each in found] == [str(pictures / "more/two.png"), str(pictures / "one.png")]
    box = found[0]["detections"][0]["box"]
    np.testing.assert_allclose([box[key] for key in ("x0", "y0", "x1", "y1")], (10, 200, 80, 290), atol=8)
    code, out, _ = run(capsys, "detect", pictures / "one.png", "--names", "dog", "--threshold", "0.9")
    assert (code, out) == (0, f"{pictures / 'one.png'}: nothing\n")


def test_annotated_pictures_and_coco_results(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    out_dir, coco = tmp_path / "drawn", tmp_path / "found.json"
    code, _, err = run(capsys, "detect", pictures, "--names", "cat,dog", "--annotate", out_dir, "--coco", coco)
    assert code == 0 and "found.index.json: which picture and which name each number is" in err
    assert sorted(path.name for path in out_dir.iterdir()) == ["one.png", "two.png"]
    results = json.loads(coco.read_text())
    meaning = json.loads((tmp_path / "found.index.json").read_text())
    names = {each["id"]: each["name"] for each in meaning["categories"]}
    files = {each["id"]: Path(each["file_name"]).name for each in meaning["images"]}
    said = {(files[each["image_id"]], names[each["category_id"]]) for each in results}
    assert said == {("one.png", "cat"), ("two.png", "dog")}


def test_a_clip_among_pictures(pictures: Path, make_scene: Any, tmp_path: Path, capsys: Any) -> None:
    writer = cv2.VideoWriter(str(pictures / "moving.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (160, 96))
    if not writer.isOpened():
        pytest.skip("this OpenCV has no encoder for Motion JPEG")
    for number in range(10):
        picture = make_scene(96, 160, {"cat": (8 + 4 * number, 10, 48 + 4 * number, 50)})
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    writer.release()
    drawn = tmp_path / "drawn"
    code, out, err = run(capsys, "detect", pictures, "--names", "cat", "--fps", "5", "--json", "--annotate", drawn)
    assert (code, err) == (0, "")
    frames = [json.loads(line) for line in out.splitlines() if "moving" in line]
    assert [frame["frame"] for frame in frames] == [0, 2, 4, 6, 8]
    assert {each["number"] for frame in frames for each in frame["detections"]} == {1}
    assert sorted(path.stem for path in drawn.iterdir()) == ["moving", "one", "two"]
    code, out, _ = run(capsys, "detect", pictures / "moving.avi", "--names", "cat")
    assert code == 0 and out.splitlines()[1].startswith(f"{pictures / 'moving.avi'} 0:00.20: #1 cat ")
    code, _, err = run(capsys, "detect", pictures, "--names", "cat", "--coco", tmp_path / "x.json")
    assert code == 2 and "a clip has no place in a COCO results file" in err


def test_a_vocabulary_is_made_combined_shown_and_used(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    words, more, both = (tmp_path / f"{name}.json" for name in ("words", "more", "both"))
    code, out, _ = run(capsys, "vocabulary", "make", words, "--names", "cat, dog", "--negatives", "bird")
    assert (code, out) == (0, f"{words}: 2 names, 1 negatives\n")
    code, _, err = run(capsys, "vocabulary", "make", words, "--names", "cat")
    assert code == 2 and "exists already" in err
    exemplar = f"my thing={pictures / 'one.png'}:10,20,60,70"
    assert run(capsys, "vocabulary", "make", more, "--exemplar", exemplar)[0] == 0
    assert run(capsys, "vocabulary", "combine", both, words, more)[0] == 0
    assert Vocabulary.load(both).names == ("cat", "dog", "my thing")
    _, out, _ = run(capsys, "vocabulary", "show", both)
    assert out.splitlines() == ["cat", "dog", "bird (negative)", "my thing (pictures)"]
    _, out, _ = run(capsys, "vocabulary", "show", both, "--json")
    assert [json.loads(line)["novel"] for line in out.splitlines()] == [False, True, True, True]
    code, out, _ = run(capsys, "detect", pictures / "one.png", "--vocabulary", words)
    assert code == 0 and out.startswith(f"{pictures / 'one.png'}: cat 0.") and "bird" not in out
    code, out, _ = run(capsys, "detect", pictures / "one.png", "--vocabulary", more, "--names", "cat")
    assert code == 0 and "cat" in out


def test_what_cannot_be_used_is_reported_and_the_rest_goes_on(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    code, out, err = run(capsys, "detect", pictures, tmp_path / "missing.mp4", "--names", "cat", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and len(lines) == 4 and [("error" in each) for each in lines] == [True, False, False, True]
    assert "2 of 4 pictures and clips could not be used" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.png"], "nothing to look for; give --names, --exemplar or --vocabulary"),
        (["one.png", "--names", ","], "--names: expected texts"),
        (["one.png", "--names", "cat,CAT"], "the name 'CAT' is given twice"),
        (["one.png", "--names", "cat", "--negatives", "cat"], "the name 'cat' is given twice"),
        (["one.png", "--names", "cat", "--threshold", "2"], "2.0 is not in the range 0<=x<=1"),
        (["one.png", "--names", "cat", "--coco-ids", "x.json"], "--coco-ids numbers what --coco writes"),
        (["one.png", "--names", "cat", "--coco", "a.json", "--coco-ids", "./a.json"], "are one file, a.json"),
        (["one.png", "--vocabulary", "missing.json", "--templates", "a {}"], "--templates go with --names"),
        (["one.png", "--vocabulary", "missing.json", "--no-context"], "--no-context go with --names"),
        (["one.png", "--vocabulary", "missing.json", "--negatives", "dog"], "--negatives go with --names"),
        (["one.png", "--names", "cat", "--fps", "-1"], "--fps: expected frames a second"),
        (["one.png", "--vocabulary", "missing.json"], "missing.json: cannot be read as a vocabulary"),
        (["one.png", "--exemplar", "cat"], "expected NAME=FILE"),
        (["one.png", "--exemplar", "cat=one.png:300,0,400,10"], "is outside the picture of 200x120"),
        (["empty", "--names", "cat"], "no pictures or clips in this folder"),
    ],
)
def test_bad_input_is_one_line(pictures: Path, capsys: Any, monkeypatch: Any, arguments: Any, message: str) -> None:
    monkeypatch.chdir(pictures)
    (pictures / "empty").mkdir()
    code, out, err = run(capsys, "detect", *arguments)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_annotated_copies_replace_nothing(pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    original = (pictures / "one.png").read_bytes()
    for folder in (pictures, tmp_path / "link"):
        if folder != pictures:
            folder.symlink_to(pictures)
        code, out, err = run(capsys, "detect", pictures / "one.png", "--names", "cat", "--annotate", folder)
        assert (code, out) == (2, "") and "one.png exists already, and nothing is replaced" in err
    assert (pictures / "one.png").read_bytes() == original
    drawn = tmp_path / "drawn"
    arguments = ("detect", pictures / "one.png", pictures / "one.png", "--names", "cat", "--annotate", drawn)
    assert run(capsys, *arguments)[0] == 0  # control
    assert sorted(each.name for each in drawn.iterdir()) == ["one-2.png", "one.png"]
    assert run(capsys, *arguments)[0] == 2, "those of an earlier run neither"

    def half(path: Path, _: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mammut_runtime.detection.copies.write_picture", half)
    full = tmp_path / "full"
    code, _, err = run(capsys, "detect", pictures / "one.png", "--names", "cat", "--annotate", full)
    assert code == 2 and "No space left" in err and list(full.iterdir()) == []


def test_boxes_for_annotations_are_those_of_the_stored_picture(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """A picture that viewers turn by a quarter: COCO's boxes are of the pixels as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = pictures / "turned.png"
    Image.open(pictures / "one.png").save(turned, exif=exif)
    ids, coco = tmp_path / "ids.json", tmp_path / "found.json"
    record = {"id": 7, "file_name": "turned.png", "width": 200, "height": 120}
    arguments = ("detect", turned, "--names", "cat", "--coco", coco)

    def box() -> list[float]:
        found: list[float] = json.loads(coco.read_text())[0]["bbox"]
        return found

    ids.write_text(json.dumps({"images": [record], "categories": [{"id": 1, "name": "cat"}]}))
    assert run(capsys, *arguments, "--coco-ids", ids)[0] == 0
    np.testing.assert_allclose(box(), (10, 20, 50, 50), atol=8)
    assert run(capsys, *arguments)[0] == 0  # control: upright, where no annotations say otherwise
    np.testing.assert_allclose(box(), (50, 10, 50, 50), atol=8)
    ids.write_text(json.dumps({"images": [{**record, "width": 120}], "categories": [{"id": 1, "name": "cat"}]}))
    code, _, err = run(capsys, *arguments, "--coco-ids", ids)
    assert code == 2 and "200x120 pixels as it is stored, and the annotation file says 120x120" in err
