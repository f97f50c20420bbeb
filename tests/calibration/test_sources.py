from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import cv2
import pytest

from mammut_calibration.sources import Frame, Item, Stored, find_items
from mammut_runtime.errors import InputError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def content(item: Item) -> bytes:
    assert isinstance(item.picture, Stored)
    return item.picture.read(10**6)


def test_a_folder_is_searched_in_a_fixed_order_with_what_stands_beside(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path / "b", 2)
    make.folder(tmp_path / "a", 1, captions=False)
    (tmp_path / "a" / "p00.txt").write_text("a plain caption")
    make.folder(tmp_path / ".hidden", 1)
    (tmp_path / "readme.md").write_text("not a picture")
    found = find_items(tmp_path, 1.0)
    assert [Path(item.name).relative_to(tmp_path).as_posix() for item in found] == [
        "a/p00.png",
        "b/p00.png",
        "b/p01.png",
    ]
    assert [item.notes().captions for item in found] == [
        ("a plain caption",),
        ("picture number 0",),
        ("picture number 1",),
    ]


def test_a_pairs_file_is_matched_with_its_pictures(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path, 2, captions=False)
    lines = [{"file": "p01.png", "caption": "one"}, {"file": "p01.png", "question": "how many?", "answer": "one"}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)))
    first, second = find_items(tmp_path, 1.0)
    assert first.notes().captions == () and second.notes().captions == ("one",)
    assert second.notes().questions[0].answer == "one"
    pairs.write_text('{"file": "missing.png", "caption": "x"}')
    with pytest.raises(InputError, match=r"names 'missing\.png', which is not a picture"):
        find_items(tmp_path, 1.0)
    pairs.write_text("[1]")
    with pytest.raises(InputError, match=r'pairs\.jsonl:1: expected a JSON object with the key "file"'):
        find_items(tmp_path, 1.0)


def test_a_tar_is_read_by_position(make: Any, tmp_path: Path) -> None:
    members = {"x/1.png": make.png(1), "x/1.json": b'{"caption": "one"}', "2.png": make.png(2), "2.txt": b"two"}
    path = write_tar(tmp_path / "shard.tar", {**members, "notes.md": b"-", "3.txt": b"no picture"})
    found = find_items(path, 1.0)
    assert [item.name for item in found] == [f"{path}: x/1", f"{path}: 2"]
    assert [content(item) for item in found] == [make.png(1), make.png(2)]
    assert [item.notes().captions for item in found] == [("one",), ("two",)]


def test_a_clip_gives_frames_at_even_times(make: Any, tmp_path: Path) -> None:
    clip = make.clip(tmp_path / "clip.avi", frames=25, fps=10)
    found = find_items(clip, 0.5)
    frames = [item.picture for item in found]
    assert all(isinstance(each, Frame) for each in frames)
    assert [(each.index, each.time_s) for each in frames if isinstance(each, Frame)] == [
        (0, 0.0),
        (5, 0.5),
        (10, 1.0),
        (15, 1.5),
        (20, 2.0),
    ]


def test_the_digest_is_of_the_content_not_of_the_name(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path / "one", 2)
    make.folder(tmp_path / "two", 2)
    digests = [item.digest({}) for folder in ("one", "two") for item in find_items(tmp_path / folder, 1.0)]
    assert digests[:2] == digests[2:] and digests[0] != digests[1]
    (tmp_path / "one" / "p00.json").write_text('{"caption": "another"}')
    assert find_items(tmp_path / "one", 1.0)[0].digest({}) != digests[0]


def test_places_that_hold_nothing_usable_are_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_items(tmp_path / "nothing", 1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no pictures; expected \.png"):
        find_items(tmp_path / "empty", 1.0)
    text = tmp_path / "list.csv"
    text.write_text("a,b")
    with pytest.raises(InputError, match=r"list\.csv: expected a folder or a file that ends in one of"):
        find_items(text, 1.0)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"this is not a tar" * 100)
    with pytest.raises(InputError, match="cannot be read as a tar"):
        find_items(broken, 1.0)
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="a compressed tar"):
        find_items(tmp_path / "x.tar.gz", 1.0)
    whole = write_tar(tmp_path / "whole.tar", {"1.png": make.png(1)})
    assert len(find_items(whole, 1.0)) == 1  # control
    data = whole.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:600])
    with pytest.raises(InputError):
        find_items(tmp_path / "cut.tar", 1.0)[0].picture.read(10**6)  # type: ignore[union-attr]


def test_the_tests_can_write_clips(make: Any, tmp_path: Path) -> None:
    capture = cv2.VideoCapture(str(make.clip(tmp_path / "clip.avi", frames=3, fps=10)))
    assert capture.read()[0]
    capture.release()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path, 1)
    os.mkfifo(tmp_path / "a.png")
    assert [Path(item.name).name for item in find_items(tmp_path, 1.0)] == ["p00.png"]
    with pytest.raises(InputError, match="expected a folder or a file that ends in"):
        find_items(tmp_path / "a.png", 1.0)


def test_lines_that_are_not_utf8_are_one_error_or_left_as_they_are(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path, 1, captions=False)
    (tmp_path / "pairs.jsonl").write_bytes(b'{"file": "\xff.png"}')
    with pytest.raises(InputError, match="which is not a picture"):
        find_items(tmp_path, 1.0)
