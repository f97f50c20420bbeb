from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut_calibration.data import Damaged, Dataset, Sample, open_dataset
from mammut_calibration.sources import Frame, Item, Stored
from mammut_runtime.errors import InputError


def stills(digests: list[str]) -> Dataset:
    items = tuple(Item(f"p{index}", Stored(Path("p"))) for index in range(len(digests)))
    return Dataset(items, tuple(digests))


@given(st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_a_split_has_nothing_in_common_and_loses_nothing(digests: list[str], share: float) -> None:
    data = stills(digests)
    try:
        one, other = data.split(share)
    except InputError as problem:
        assert round(share * len(set(digests))) in (0, len(set(digests)))
        assert "cannot be divided" in str(problem)
        return
    assert not set(one.digests) & set(other.digests)
    assert sorted(one.digests + other.digests) == sorted(digests)
    assert len(set(other.digests)) == round(share * len(set(digests)))
    again = stills(digests[::-1]).split(share)[1]
    assert set(again.digests) == set(other.digests)  # of the content alone


def test_the_end_of_a_clip_is_held_out() -> None:
    frames = tuple(Item(f"{index}", Frame(Path("a.mp4"), index, index / 1.0)) for index in range(12))
    data = Dataset(frames, tuple(f"{index:04d}" for index in range(12)))
    calibration, held_out = data.split(0.25)
    assert [item.name for item in held_out.items] == ["9", "10", "11"]
    assert [item.name for item in calibration.items] == [str(index) for index in range(9)]


def test_samples_come_in_order_from_anywhere_and_damaged_ones_are_named(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path, 4)
    (tmp_path / "p01.png").write_bytes(make.png(1)[:80])
    (tmp_path / "p02.json").write_text('{"caption": 5}')
    data = open_dataset([tmp_path])
    found = list(data)
    assert [type(each) for each in found] == [Sample, Damaged, Damaged, Sample]
    assert "p01.png" in found[1].reason and "p02.png (json): caption" in found[2].reason  # type: ignore[union-attr]
    assert [each.name for each in data.samples(2)] == [each.name for each in found[2:]]
    assert found[3].captions == ("picture number 3",)  # type: ignore[union-attr]


def test_frames_of_a_clip_are_decoded_the_same_from_any_start(make: Any, tmp_path: Path) -> None:
    data = open_dataset([make.clip(tmp_path / "clip.avi", frames=20, fps=10)], frame_every_s=0.5)
    whole = list(data)
    late = list(data.samples(2))
    backwards = list(Dataset(data.items[::-1], data.digests[::-1]))[::-1]
    assert len(whole) == 4 and len(late) == 2
    for one, other in zip([*whole[2:], *whole], [*late, *backwards], strict=True):
        assert isinstance(one, Sample) and isinstance(other, Sample)
        assert (one.image == other.image).all() and one.image.shape == (40, 48, 3)  # type: ignore[union-attr]


def test_a_clip_that_is_none_is_one_damaged_picture(
    make: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no clip" * 100)
    (only,) = open_dataset([tmp_path / "broken.mp4"])
    assert isinstance(only, Damaged) and "broken.mp4" in only.reason


def test_a_limit_takes_pictures_at_even_distances(make: Any, tmp_path: Path) -> None:
    make.folder(tmp_path, 9)
    data = open_dataset([tmp_path], limit=3)
    assert [Path(item.name).name for item in data.items] == ["p00.png", "p03.png", "p06.png"]
    assert open_dataset([tmp_path], limit=9).content_hash == open_dataset([tmp_path]).content_hash != data.content_hash


def test_the_hash_is_of_the_content(make: Any, tmp_path: Path) -> None:
    one, other = open_dataset([make.folder(tmp_path / "x", 3)]), open_dataset([make.folder(tmp_path / "y", 3)])
    assert one.content_hash == other.content_hash
    (tmp_path / "y" / "p02.png").write_bytes(make.png(99))
    assert open_dataset([tmp_path / "y"]).content_hash != one.content_hash


def test_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a list"):
        open_dataset("photos")
    with pytest.raises(InputError, match="expected limit >= 1"):
        open_dataset([tmp_path], limit=0)
    with pytest.raises(InputError, match="held_out: expected a share between 0 and 1, got 1"):
        stills(["a", "b"]).split(1)
