"""Indexing a folder: only what is new, interrupted at any time, damage named; and finding what is closest."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime import index_rows
from mammut_runtime.bundle import write_manifest
from mammut_runtime.errors import InputError
from mammut_runtime.search import Hit, IndexUpdate, PictureIndex, update_index


@pytest.fixture
def photos(toy_bundle: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(12):
        save(toy_bundle, folder / ("more" if number % 3 else "") / f"{number}.png", number)
    return folder


def save(bundle: Any, path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), bundle.picture(seed)[:, :, ::-1])


def encoded(bundle: Any) -> int:
    """Pictures that went through the vision graph since the last call."""
    calls = bundle.engines["vision"].calls
    count = sum(call["pixels"].shape[0] for call in calls)
    calls.clear()
    return count


def test_finds_the_closest_by_picture_and_words(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    done = update_index(model, photos, tmp_path / "i")
    assert done == IndexUpdate(12, 12, 0, 0, ())
    index = PictureIndex.open(tmp_path / "i", model)
    assert len(index) == 12 and index.folder == photos.resolve()
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    embeddings = np.stack([model.encode(photos / name).embedding for name in names])
    seen = model.encode(photos / "more" / "7.png")
    assert index.search(seen, 1)[0].path == "more/7.png" and index.search(seen, 1)[0].score == pytest.approx(1)
    for query, vector in (("a red cat", model.embed_texts(["a red cat"])[0]), (seen, seen.embedding)):
        scores = embeddings @ vector
        expected = [names[i] for i in np.argsort(-scores, kind="stable")[:5]]
        assert [hit.path for hit in index.search(query, 5)] == expected
    assert len(index.search("cat", 100)) == 12


def test_large_indexes_are_searched_in_blocks(
    toy_bundle: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_bundle.model()
    update_index(model, photos, tmp_path / "i")
    index = PictureIndex.open(tmp_path / "i", model)
    expected = index.search("a bird", 4)
    monkeypatch.setattr(index_rows, "_ROWS_AT_ONCE", 5)
    found = index.search("a bird", 4)
    assert [hit.path for hit in found] == [hit.path for hit in expected]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_only_new_and_changed_pictures_are_looked_at(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    update_index(model, photos, tmp_path / "i")
    encoded(toy_bundle)
    before = (tmp_path / "i").stat()
    assert update_index(model, photos, tmp_path / "i") == IndexUpdate(12, 0, 0, 0, ())
    assert encoded(toy_bundle) == 0 and (tmp_path / "i").stat().st_mtime_ns == before.st_mtime_ns, "nothing written"
    save(toy_bundle, photos / "new.png", 50)
    save(toy_bundle, photos / "0.png", 51)
    os.utime(photos / "0.png", ns=(1, 1))
    (photos / "3.png").unlink()
    assert update_index(model, photos, tmp_path / "i") == IndexUpdate(12, 1, 1, 1, ())
    assert encoded(toy_bundle) == 2
    index = PictureIndex.open(tmp_path / "i", model)
    for name in ("new.png", "0.png", "9.png", "more/4.png"):
        (hit,) = index.search(model.encode(photos / name), 1)
        assert hit == Hit(name, pytest.approx(1))  # type: ignore[arg-type]
    assert "3.png" not in {hit.path for hit in index.search("cat", 100)}


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_interrupted_updates_keep_what_was_done(toy_bundle: Any, photos: Path, tmp_path: Path, stop_after: int) -> None:
    model, batches = toy_bundle.model(), []

    def progress(done: int, total: int) -> None:
        assert total == 12
        batches.append(done)
        if len(batches) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_index(model, photos, tmp_path / "i", progress=progress, batch_size=4)
    assert len(PictureIndex.open(tmp_path / "i", model)) == 4 * stop_after == batches[-1]
    encoded(toy_bundle)
    assert update_index(model, photos, tmp_path / "i").pictures == 12
    assert encoded(toy_bundle) == 12 - 4 * stop_after
    update_index(model, photos, tmp_path / "whole")
    one, other = (PictureIndex.open(tmp_path / name, model).search("a cat", 12) for name in ("i", "whole"))
    assert one == other


def test_checkpoints(toy_bundle: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file on the disk grows while the update runs."""
    model, sizes = toy_bundle.model(), []

    def progress(done: int, total: int) -> None:
        sizes.append(len(PictureIndex.open(tmp_path / "i", model)) if (tmp_path / "i").exists() else 0)

    update_index(model, photos, tmp_path / "i", progress=progress, batch_size=2, checkpoint_every=4)
    assert sizes == [0, 4, 4, 8, 8, 12]


def test_pictures_that_cannot_be_used_are_named(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:100])
    (photos / "empty.jpg").touch()
    (photos / "link.png").symlink_to(photos / "nowhere.png")
    (photos / "notes.txt").write_text("not a picture")
    (photos / ".hidden.png").write_bytes(b"")
    shutil.copytree(photos / "more", photos / ".trash")
    done = update_index(model, photos, tmp_path / "i")
    assert (done.pictures, done.added) == (12, 12)
    assert sorted(each.path for each in done.skipped) == ["broken.png", "empty.jpg", "link.png"]
    assert all(each.reason for each in done.skipped)
    save(toy_bundle, photos / "broken.png", 3)
    assert update_index(model, photos, tmp_path / "i").added == 1, "mended pictures come in"


def test_one_unusable_picture_does_not_spoil_its_batch(
    toy_bundle: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be read, but the preprocessor refuses it."""
    model = toy_bundle.model()
    real = model._preprocessor

    def preprocessor(image: Any, color: Any) -> Any:
        if image.name.endswith("6.png"):
            raise InputError("too odd")
        return real(image, color=color)

    monkeypatch.setattr(model, "_preprocessor", preprocessor)
    done = update_index(model, photos, tmp_path / "i")
    assert done.pictures == 11 and [(each.path, each.reason) for each in done.skipped] == [("6.png", "too odd")]


def test_an_index_of_another_model_is_refused(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    update_index(toy_bundle.model(), photos, tmp_path / "i")
    write_manifest(toy_bundle.folder, dataclasses.replace(toy_bundle.manifest, made_by={"checkpoint": "other"}))
    other = toy_bundle.model()
    for use in (lambda: PictureIndex.open(tmp_path / "i", other), lambda: update_index(other, photos, tmp_path / "i")):
        with pytest.raises(InputError, match=r"was made with another model .* rebuild the index"):
            use()
    encoded(toy_bundle)
    assert update_index(other, photos, tmp_path / "i", rebuild=True).added == 12
    assert encoded(toy_bundle) == 12 and len(PictureIndex.open(tmp_path / "i", other)) == 12


def test_an_index_of_another_folder_is_refused(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    update_index(model, photos, tmp_path / "i")
    with pytest.raises(InputError, match="is an index of photos, not of photos/more"):
        update_index(model, photos / "more", tmp_path / "i")
    assert update_index(model, photos / "more", tmp_path / "i", rebuild=True).pictures == 8


def test_index_and_pictures_move_together(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    update_index(model, photos, photos / "photos.index")
    moved = tmp_path / "elsewhere" / "pictures"
    moved.parent.mkdir()
    shutil.move(photos, moved)
    encoded(toy_bundle)
    assert PictureIndex.open(moved / "photos.index", model).folder == moved
    assert update_index(model, moved, moved / "photos.index") == IndexUpdate(12, 0, 0, 0, ())


def test_other_files_are_left_alone(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear all")
    for rebuild in (False, True):
        with pytest.raises(InputError, match="is not a picture index"):
            update_index(toy_bundle.model(), photos, tmp_path / "letter.txt", rebuild=rebuild)
    assert (tmp_path / "letter.txt").read_text() == "dear all"


def test_folders_without_pictures(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"no pictures in this folder; expected files named \.png"):
        update_index(model, tmp_path / "bare", tmp_path / "i")
    with pytest.raises(InputError, match="expected a folder with pictures, there is none"):
        update_index(model, tmp_path / "none", tmp_path / "i")
    with pytest.raises(InputError, match="expected a file in a folder that is there"):
        update_index(model, photos, tmp_path / "none" / "i")
    assert not (tmp_path / "i").exists()
    update_index(model, photos, tmp_path / "i")
    for path in photos.rglob("*.png"):
        path.unlink()
    assert update_index(model, photos, tmp_path / "i") == IndexUpdate(0, 0, 0, 12, ())
    assert PictureIndex.open(tmp_path / "i", model).search("cat") == []


def test_queries_that_cannot_be(toy_bundle: Any, photos: Path, tmp_path: Path) -> None:
    model = toy_bundle.model()
    update_index(model, photos, tmp_path / "i")
    index = PictureIndex.open(tmp_path / "i", model)
    for query, count, message in (
        ("", 3, "a text is empty"),
        ("cat", 0, "from 1 to 10000, got 0"),
        (np.zeros(3, np.float32), 3, r"expected an embedding of shape \[6\], got \[3\]"),
    ):
        with pytest.raises(InputError, match=message):
            index.search(query, count)
    assert IndexUpdate(1, 0, 0, 0, ()).to_dict()["pictures"] == 1 and Hit("a", 0.5).to_dict() == {
        "path": "a",
        "score": 0.5,
    }
