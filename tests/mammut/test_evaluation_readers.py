"""Each data set's published form, as it is and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut.evaluation.examples import EvalSet, Example, PictureRef, Problems
from mammut.evaluation.read_captions import find_picture, read_captions
from mammut.evaluation.read_folders import read_places
from mammut.evaluation.read_questions import read_questions
from mammut_runtime.errors import InputError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in (1, 2, 3):
        cv2.imwrite(str(folder / f"{number}.jpg"), np.full((20, 30, 3), 60 * number, np.uint8))
    return folder


def write(path: Path, row: Any) -> Path:
    path.write_text(row if isinstance(row, str) else json.dumps(row), encoding="utf-8")
    return path


def captions_of(data: EvalSet) -> dict[str, tuple[str, ...]]:
    return {example.picture.name: example.captions for example in data}


COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"}],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "a dog"},
        {"image_id": 9, "id": 2, "caption": "two cats "},
        {"image_id": 7, "id": 3, "caption": "one dog"},
    ],
}
KARPATHY: dict[str, Any] = {
    "dataset": "coco",
    "images": [
        {"filename": "1.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "a dog"}]},
        {"filename": "2.jpg", "split": "train", "sentences": [{"raw": "two cats"}, {"raw": "cats"}]},
    ],
}


def test_coco_captions(pictures: Path, tmp_path: Path) -> None:
    data = read_captions(write(tmp_path / "coco.json", COCO), pictures, None, Problems())
    assert captions_of(data) == {"1.jpg": ("a dog", "one dog"), "2.jpg": ("two cats",)}
    assert [example.picture.read().rgb().shape for example in data] == [(20, 30, 3)] * 2  # type: ignore[union-attr]


def test_karpathys_splits(pictures: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    assert captions_of(read_captions(path, pictures, None, Problems())) == {"val2014/1.jpg": ("a dog",)}
    assert captions_of(read_captions(path, pictures, "train", Problems())) == {"2.jpg": ("two cats", "cats")}
    with pytest.raises(InputError, match="no pictures of split 'restval'; it has test, train"):
        read_captions(path, pictures, "restval", Problems())


@pytest.mark.parametrize(
    "text",
    [
        "1.jpg#0\ta dog\n1.jpg#1\tone, dog\n2.jpg#0\tcats\n",
        "image_name| comment_number| comment\n1.jpg| 0| a dog\n1.jpg| 1| one, dog\n2.jpg| 4   cats\n",
        'image,caption\n1.jpg,a dog\n1.jpg,"one, dog"\n2.jpg,cats\n',
    ],
)
def test_flickr30k(pictures: Path, tmp_path: Path, text: str) -> None:
    data = read_captions(write(tmp_path / "flickr.txt", text), pictures, None, Problems())
    assert captions_of(data) == {"1.jpg": ("a dog", "one, dog"), "2.jpg": ("cats",)}


def changed(change: Callable[[Any], object], row: Any = COCO) -> Any:
    copy = json.loads(json.dumps(row))
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON, or cut off"),
        ([], "expected an object with 'images'"),
        ({"info": {}}, "no field 'images'; it has info"),
        ({"images": {}}, "images: expected a list"),
        (changed(lambda r: r.pop("annotations")), "no field 'annotations'"),
        (changed(lambda r: r["images"][1].pop("id")), r"images\[1\]: no field 'id'; it has file_name"),
        (changed(lambda r: r["annotations"][1].update(caption=3)), r"annotations\[1\]: caption: expected a text, got"),
        (changed(lambda r: r["annotations"][2].update(image_id=8)), r"annotations\[2\]: image_id 8 is not among"),
        (changed(lambda r: r["annotations"][0].update(caption=" ")), r"annotations\[0\]: an empty caption"),
        (changed(lambda r: r["annotations"].pop(1)), "1 pictures without a caption, such as 2.jpg"),
        (changed(lambda r: r["images"].append({"id": 1, "file_name": "4.jpg"}) or r["annotations"].append(
            {"image_id": 1, "caption": "x"})), "1 of 3 missing: 4.jpg; complete the data, or --partial"),
        (changed(lambda r: r["images"][0].update(file_name="../pictures/1.jpg")), "1 of 2 missing: ../pictures/1.jpg"),
        (changed(lambda r: r["images"][0].pop("split"), KARPATHY), r"images\[0\]: no field 'split'"),
        (changed(lambda r: r["images"][0].update(sentences=[{}]), KARPATHY), r"sentences\[0\]: no field 'raw'"),
        ({"images": [], "annotations": []}, "no captions with a picture"),
    ],
)  # fmt: skip
def test_wrong_captions_name_record_and_field(pictures: Path, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write(tmp_path / "captions.json", row), pictures, None, Problems())


def test_wrong_flickr_lines_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"flickr.txt:2: expected picture#N<TAB>caption, got 'no tab here'"):
        read_captions(write(tmp_path / "flickr.txt", "1.jpg#0\ta\nno tab here\n"), pictures, None, Problems())
    with pytest.raises(InputError, match="no captions"):
        read_captions(write(tmp_path / "flickr.txt", "\n"), pictures, None, Problems())
    with pytest.raises(InputError, match="--split"):
        read_captions(write(tmp_path / "flickr.txt", "1.jpg#0\ta\n"), pictures, "test", Problems())


def test_partial_data_is_listed_and_the_rest_used(pictures: Path, tmp_path: Path) -> None:
    (pictures / "2.jpg").unlink()
    problems = Problems(partial=True)
    data = read_captions(write(tmp_path / "coco.json", COCO), pictures, None, problems)
    assert list(captions_of(data)) == ["1.jpg"]
    assert list(problems.missing) == ["2.jpg"]


@given(st.text(max_size=40))
def test_pictures_are_never_looked_for_elsewhere(name: str) -> None:
    folder = Path(__file__).parent
    found = find_picture(folder, name)
    assert found is None or found.resolve().is_relative_to(folder)


@pytest.mark.parametrize(
    "name", ["../make_tiny_bundle.py", "/etc/hostname", "a/../../make_tiny_bundle.py", "", "x" * 5000, "a\0b"]
)
def test_names_that_lead_out_find_nothing(name: str) -> None:
    assert find_picture(Path(__file__).parent, name) is None
    assert find_picture(Path(__file__).parent, "any/conftest.py") is not None  # control: by its last part


# ---- questions ----


def vqa_files(folder: Path, change: Callable[[Any, Any], object] = lambda q, a: None) -> list[Path]:
    questions: Any = {"data_subtype": "val2014", "questions": [
        {"question_id": 10, "image_id": 42, "question": "is it red?"},
        {"question_id": 11, "image_id": 42, "question": "how many?"},
    ]}  # fmt: skip
    annotations: Any = {"annotations": [
        {"question_id": 11, "image_id": 42, "answer_type": "number", "answers": [{"answer": "2"}] * 10},
        {"question_id": 10, "image_id": 42, "answer_type": "yes/no", "answers": [{"answer": "no"}] * 10},
    ]}  # fmt: skip
    change(questions, annotations)
    return [write(folder / "questions.json", questions), write(folder / "annotations.json", annotations)]


@pytest.mark.parametrize("name", ["000000000042.jpg", "COCO_val2014_000000000042.jpg"])
def test_vqav2(pictures: Path, tmp_path: Path, name: str) -> None:
    (pictures / "1.jpg").rename(pictures / name)
    (example,) = read_questions(vqa_files(tmp_path)[::-1], pictures, Problems())
    assert [(each.text, each.answers, each.kind) for each in example.questions] == [
        ("is it red?", ("no",) * 10, "yes/no"), ("how many?", ("2",) * 10, "number")]  # fmt: skip
    assert example.picture.path.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: a["annotations"].pop(), "1 of 2 missing: question_id 10"),
        (lambda q, a: q["questions"].pop(), "question_id 11"),
        (lambda q, a: a["annotations"][0]["answers"].pop(), r"annotations\[0\]: answers: expected 10, got 9"),
        (lambda q, a: a["annotations"][0]["answers"].append({}), "expected 10, got 11"),
        (lambda q, a: q["questions"][1].update(image_id="42"), r"questions\[1\]: image_id: expected a whole number"),
        (lambda q, a: q["questions"][1].update(image_id=43), "1 of 2 missing: COCO_val2014_000000000043.jpg"),
        (lambda q, a: q.pop("questions"), "VQAv2 comes in two files"),
    ],
)
def test_wrong_vqav2_names_record_and_field(pictures: Path, tmp_path: Path, change: Any, message: str) -> None:
    (pictures / "1.jpg").rename(pictures / "000000000042.jpg")
    with pytest.raises(InputError, match=message):
        read_questions(vqa_files(tmp_path, change), pictures, Problems())


def write_clip(path: Path) -> None:
    """Ten frames that grow lighter."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (32, 24))
    for frame in range(10):
        writer.write(np.full((24, 32, 3), 20 * frame, np.uint8))
    writer.release()


def test_msrvtt_qa_takes_the_middle_frame(tmp_path: Path) -> None:
    write_clip(tmp_path / "video7010.avi")
    rows = [{"id": 1, "video_id": 7010, "category_id": 14, "question": "who is it?", "answer": "man"}]
    (example,) = read_questions([write(tmp_path / "test_qa.json", rows)], tmp_path, Problems())
    assert example.picture.is_clip and example.questions[0].answers == ("man",)
    assert example.questions[0].kind == "who"
    frame = example.picture.read()
    assert isinstance(frame, np.ndarray) and abs(float(frame.mean()) - 100) < 5


def test_msvd_qa_through_its_mapping(tmp_path: Path) -> None:
    write_clip(tmp_path / "-4wsuPCjDBc_5_15.avi")
    write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1\nother_1_2 vid2\n")
    rows = [{"id": 1, "video_id": 1, "question": "what runs?", "answer": "dog"}]
    (example,) = read_questions([write(tmp_path / "test_qa.json", rows)], tmp_path, Problems())
    assert example.picture.path.name == "-4wsuPCjDBc_5_15.avi"
    write(tmp_path / "youtube_mapping.txt", "no number\n")
    with pytest.raises(InputError, match=r"youtube_mapping.txt:1: expected NAME vidN"):
        read_questions([tmp_path / "test_qa.json"], tmp_path, Problems())


def test_a_damaged_clip_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "video1.mp4").write_bytes(b"no clip")
    rows = [{"video_id": 1, "question": "what?", "answer": "dog"}]
    (example,) = read_questions([write(tmp_path / "qa.json", rows)], tmp_path, Problems())
    with pytest.raises(InputError, match=r"video1\.mp4: cannot be decoded"):
        example.picture.read()


def test_easy_vqa(pictures: Path, tmp_path: Path) -> None:
    (pictures / "images").mkdir()
    cv2.imwrite(str(pictures / "images" / "0.png"), np.zeros((4, 4, 3), np.uint8))
    path = write(tmp_path / "questions.json", [["what colour?", "red", 0], ["is it red?", "yes", 0]])
    (example,) = read_questions([path], pictures, Problems())
    assert [(each.answers, each.kind) for each in example.questions] == [(("red",), "other"), (("yes",), "yes/no")]
    with pytest.raises(InputError, match="record 1: expected"):
        read_questions([write(path, [["q", "a", 0], ["q", "a"]])], pictures, Problems())
    with pytest.raises(InputError, match=r"1 of 2 missing: 5.png"):
        read_questions([write(path, [["q", "a", 0], ["q", "a", 5]])], pictures, Problems())
    with pytest.raises(InputError, match="expected one list of questions"):
        read_questions([write(path, [])], pictures, Problems())


# ---- tars and folders ----


def test_tars(tmp_path: Path, coloured_samples: Any, write_tar: Any) -> None:
    write_tar(tmp_path / "a.tar", coloured_samples(3))
    data = read_places([tmp_path / "a.tar"], Problems())
    examples = list(data)
    assert [example.captions[0] for example in examples] == [f"a {c} thing number {i}" for i, c in
                                                             enumerate(("red", "green", "blue"))]  # fmt: skip
    assert examples[1].questions[0].answers == ("green",)
    assert examples[2].picture.read().rgb().shape == (40, 44, 3)  # type: ignore[union-attr]
    assert [each.picture for each in data] == [each.picture for each in read_places([tmp_path], Problems())]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": 3}, "a.tar: 00000: captions: expected a text, got '3'"),
        ({"caption": " "}, "captions: expected a text, got ' '"),
        ({"captions": "x"}, "captions: expected a list"),
        ({"label": 4}, "label: expected a text"),
        ({"questions": [["q"]]}, r"questions: expected \[question, answer\]"),
        ([], "its json: expected an object"),
    ],
)
def test_wrong_notes_in_tars_are_named(
    tmp_path: Path, coloured_samples: Any, write_tar: Any, row: Any, message: str
) -> None:
    (sample,) = coloured_samples(1)
    write_tar(tmp_path / "a.tar", [{**sample, "json": row}])
    with pytest.raises(InputError, match=message):
        list(read_places([tmp_path / "a.tar"], Problems()))


def test_damaged_tars_are_one_error(tmp_path: Path, coloured_samples: Any, write_tar: Any) -> None:
    write_tar(tmp_path / "a.tar", coloured_samples(3))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"a\.tar"):
        [example.picture.read() for example in read_places([tmp_path / "a.tar"], Problems())]
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"}") // 512 * 512 + 512])  # cut between two members
    with pytest.raises(InputError, match="without a tar's end mark"):
        list(read_places([tmp_path / "a.tar"], Problems()))
    assert len(list(read_places([tmp_path / "a.tar"], Problems(partial=True)))) == 3
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"b\.tar: cannot be read as a tar"):
        list(read_places([tmp_path / "b.tar"], Problems()))
    with pytest.raises(InputError, match="no such file or folder"):
        read_places([tmp_path / "c.tar"], Problems())
    with pytest.raises(InputError, match="unpack it first"):
        read_places([write(tmp_path / "a.tar.gz", "x")], Problems())


def test_a_folder_for_each_class(tmp_path: Path, pictures: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "set" / label / "more").mkdir(parents=True)
        (tmp_path / "set" / label / "more" / "x.jpg").write_bytes((pictures / "1.jpg").read_bytes())
    (tmp_path / "set" / "loose.jpg").write_bytes(b"")  # of no class
    found = [(each.label, each.picture.name) for each in read_places([tmp_path / "set"], Problems())]
    assert found == [("cat", "cat/more/x.jpg"), ("dog", "dog/more/x.jpg")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures; expected tars, or a folder for each class"):
        list(read_places([tmp_path / "empty"], Problems()))


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 5))
def test_a_drawn_part_is_a_part(size: int, count: int, seed: int) -> None:
    data = EvalSet.of("set", [Example(PictureRef(str(i), Path(str(i)))) for i in range(size)])
    drawn = [int(each.picture.name) for each in data.drawn(count, seed)]
    assert len(drawn) == min(size, count) and drawn == sorted(set(drawn))
    assert drawn == [int(each.picture.name) for each in data.drawn(count, seed)]
