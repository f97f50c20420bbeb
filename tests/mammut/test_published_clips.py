"""Published files of clips to training rows: every form, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.commands import cli
from mammut.data.clips import ClipPart
from mammut.data.pairs import plain_pair
from mammut.data.published_clips import PublishedSet, published_rows, write_rows
from mammut.evaluation.examples import Problems
from mammut_runtime.errors import InputError

MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {"video_id": "video0", "category": 9, "url": "u", "start time": 137.7, "end time": 149.4, "split": "train"},
        {"video_id": "video7010", "category": 1, "url": "u", "start time": 1.0, "end time": 9.4, "split": "test"},
    ],
    "sentences": [
        {"caption": "a car drives", "video_id": "video0", "sen_id": 0},
        {"caption": " a man talks ", "video_id": "video7010", "sen_id": 1},
        {"caption": "someone speaks", "video_id": "video7010", "sen_id": 2},
    ],
}  # fmt: skip
LINES = "# remarks\nmv89psg6zh4_33_46 a bird bathes\nmv89psg6zh4_33_46 a bird in a sink\nabc_1_5 a cat\n\n"
TABLE = (
    "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
    "mv89psg6zh4,33,46,588702,unverified,55,Slovene,Papagaj\n"
    'mv89psg6zh4,33,46,362812,clean,21,English,"A bird, bathing"\n'
    "abc,1,5,1,clean,2,English,\nabc,1,5,1,clean,2,English,a cat\n"
)
ASKED = [
    {"answer": "bird", "id": 1, "question": "what bathes?", "video_id": 1},
    {"answer": "sink", "id": 2, "question": "where?", "video_id": 1},
    {"answer": "cat", "id": 3, "question": "what is it?", "video_id": 2},
]
NAMES = {"msrvtt": "videodatainfo.json", "msvd": "AllVideoDescriptions.txt", "questions": "train_qa.json"}


def written(folder: Path, kind: str, content: Any, *clips: str) -> tuple[Path, Path]:
    """The annotations and the folder of clips."""
    path = folder / NAMES[kind]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "clips").mkdir(exist_ok=True)
    for name in clips:
        (folder / "clips" / name).write_bytes(b"clip")
    return path, folder / "clips"


def test_msrvtt(tmp_path: Path) -> None:
    path, clips = written(tmp_path, "msrvtt", MSRVTT, "video0.mp4", "video7010.mp4")
    assert published_rows("msrvtt", path, clips, Problems()) == [
        {"clip": "video0.mp4", "captions": ["a car drives"]},
        {"clip": "video7010.mp4", "captions": ["a man talks", "someone speaks"]},
    ]
    (row,) = published_rows("msrvtt", path, clips, Problems(), split="test")
    assert row["clip"] == "video7010.mp4"
    with pytest.raises(InputError, match="no split 'val'; it has test, train"):
        published_rows("msrvtt", path, clips, Problems(), split="val")


@pytest.mark.parametrize("content", [LINES, TABLE], ids=["lines", "table"])
def test_msvd(tmp_path: Path, content: str) -> None:
    path, clips = written(tmp_path, "msvd", content, "mv89psg6zh4_33_46.avi", "abc_1_5.avi")
    first, second = published_rows("msvd", path, clips, Problems())
    assert first["clip"] == "mv89psg6zh4_33_46.avi" and second == {"clip": "abc_1_5.avi", "captions": ["a cat"]}
    assert first["captions"] == (["a bird bathes", "a bird in a sink"] if content is LINES else ["A bird, bathing"])
    (tmp_path / "train_list.txt").write_text("abc_1_5.avi\n")
    assert published_rows("msvd", path, clips, Problems(), names=tmp_path / "train_list.txt") == [second]
    with pytest.raises(InputError, match="only MSRVTT's file has splits"):
        published_rows("msvd", path, clips, Problems(), split="train")


def test_msvd_by_the_other_names_of_its_clips(tmp_path: Path) -> None:
    path, clips = written(tmp_path, "msvd", LINES, "vid1.avi", "vid2.avi")
    (tmp_path / "youtube_mapping.txt").write_text("mv89psg6zh4_33_46 vid1\nabc_1_5 vid2\n")
    assert [row["clip"] for row in published_rows("msvd", path, clips, Problems())] == ["vid1.avi", "vid2.avi"]


@pytest.mark.parametrize("clips_are", [("vid1.avi", "vid2.avi"), ("video1.mp4", "video2.mp4")])
def test_questions(tmp_path: Path, clips_are: tuple[str, str]) -> None:
    path, clips = written(tmp_path, "questions", ASKED, *clips_are)
    assert published_rows("questions", path, clips, Problems()) == [
        {"clip": clips_are[0], "questions": [["what bathes?", "bird"], ["where?", "sink"]]},
        {"clip": clips_are[1], "questions": [["what is it?", "cat"]]},
    ]


def test_missing_clips_are_named_or_left_out(tmp_path: Path) -> None:
    path, clips = written(tmp_path, "msrvtt", MSRVTT, "video0.mp4")
    with pytest.raises(InputError, match=r"clips of videodatainfo.json: 1 of 2 missing: video7010"):
        published_rows("msrvtt", path, clips, Problems())
    problems = Problems(partial=True)
    assert len(published_rows("msrvtt", path, clips, problems)) == 1 and list(problems.missing) == ["video7010"]
    (clips / "video0.mp4").unlink()
    with pytest.raises(InputError, match="no clips are left"):
        published_rows("msrvtt", path, clips, Problems(partial=True))


def changed(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(MSRVTT)) | changes  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("msrvtt", "[]", r"expected an object with 'videos'"),
        ("msrvtt", changed(videos=[{"video_id": 7, "split": "x"}]), r"videos\[0\]: video_id: expected a text, got '7'"),
        ("msrvtt", changed(videos=[{"video_id": "video0"}]), r"videos\[0\]: no field 'split'; it has video_id"),
        ("msrvtt", changed(sentences=[{"video_id": "video0", "caption": " "}]), r"sentences\[0\]: caption: expected a"),
        (
            "msrvtt",
            changed(sentences=[{"video_id": "v", "caption": "x"}]),
            r"sentences\[0\]: video_id 'v' is not among",
        ),
        ("msrvtt", changed(sentences=[]), r"2 clips without a caption, such as video0"),
        ("msrvtt", "{", r"not JSON, or cut off"),
        ("msvd", "onlyaname\n", r'txt:1: expected "NAME caption", got \'onlyaname\''),
        ("msvd", "# nothing\n", r"no captions; expected MSVD's"),
        ("msvd", "VideoID,Start,End\n", r"no column 'Language'; it has VideoID, Start, End"),
        ("msvd", TABLE + "abc,1\n", r"txt:6: too few columns; expected 8"),
        ("questions", [{"video_id": 1, "question": "what?"}], r"record 0: no field 'answer'"),
        ("questions", [["what?", "that", 1]], r"pictures or clips of train_qa.json: 1 of 1 missing"),
    ],
)
def test_damaged_files_are_refused_by_record_and_field(
    tmp_path: Path, kind: PublishedSet, content: Any, message: str
) -> None:
    path, clips = written(tmp_path, kind, content, "video0.mp4", "vid1.avi", "abc_1_5.avi", "mv89psg6zh4_33_46.avi")
    with pytest.raises(InputError, match=message):
        published_rows(kind, path, clips, Problems())


@settings(deadline=None, max_examples=40)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.text(), i)))
def test_any_json_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    for content in (data, changed(videos=data), changed(sentences=data), changed(sentences=[data])):
        path, clips = written(folder, "msrvtt", content, "video0.mp4")
        with pytest.raises(InputError):
            published_rows("msrvtt", path, clips, Problems())


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, clips = written(tmp_path, "questions", ASKED, "vid1.avi", "vid2.avi")
    out = tmp_path / "train.jsonl"
    found = CliRunner().invoke(cli, ["list-clips", "questions", str(path), str(clips), str(out)])
    assert found.exit_code == 0 and "2 clips, 3 questions" in found.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [ClipPart.of_row(tmp_path, row).path.name for row in rows] == ["vid1.avi", "vid2.avi"]
    assert plain_pair("", b"", rows[0]).questions == (("what bathes?", "bird"), ("where?", "sink"))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=r"must lie in .* or a folder above it"):
        write_rows(rows, clips, tmp_path / "elsewhere" / "train.jsonl")
