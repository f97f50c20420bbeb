"""Streams of samples: dealt out without overlap, repeatable, resumable at any sample, damage reported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.data.shards import Drawn, Mixed, Mixture, Part, Position, Standing, deal, expand, file_sizes, stream
from mammut_runtime.errors import InputError


@pytest.fixture
def parts(small_run: object) -> list[Part]:
    return [Part(str(path)) for path in small_run.shards]  # type: ignore[attr-defined]


def take(parts: list[Part], number: int, start: Position | None = None, shuffle: int = 5) -> list[Drawn]:
    return list(itertools.islice(stream(parts, start or Position(), 7, shuffle), number))


def names(drawn: list[Drawn]) -> list[str]:
    return [each.sample.name for each in drawn if each.sample]


def test_an_epoch_has_every_sample_once_and_the_next_another_order(parts: list[Part]) -> None:
    drawn = names(take(parts, 96))
    assert len(set(drawn[:48])) == 48 and set(drawn[:48]) == set(drawn[48:])
    assert drawn[:48] != drawn[48:]
    assert names(take(parts, 96)) == drawn  # repeatable


def test_mixed_inside_a_shard_unless_the_buffer_is_one(parts: list[Part]) -> None:
    assert names(take(parts[:1], 12, shuffle=1)) == sorted(names(take(parts[:1], 12)))
    assert names(take(parts[:1], 12)) != sorted(names(take(parts[:1], 12)))


def test_going_on_from_any_position_is_as_if_never_stopped(parts: list[Part]) -> None:
    whole = take(parts, 110)
    for stop in (1, 11, 12, 13, 47, 48, 49, 96):
        rest = take(parts, 110 - stop, whole[stop - 1].after)
        assert rest == whole[stop:]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_every_shard_goes_to_exactly_one_worker(number: int, ranks: int, workers: int, lines: bool) -> None:
    paths = [f"{i}.tar" for i in range(number)] + (["rows.jsonl"] if lines else [])
    places = itertools.product(range(ranks), range(workers))
    each = [deal(paths, rank, ranks, worker, workers) for rank, worker in places]
    assert all(each)
    dealt = [part for parts in each for part in parts]
    assert len(dealt) == len(set(dealt))
    for path in paths:  # whole, or every part of it once
        pieces = [part for part in dealt if part.path == path]
        assert sorted(part.part for part in pieces) == list(range(pieces[0].parts))
    rows = [part for part in dealt if part.path == "rows.jsonl"]
    assert len(rows) == (ranks * workers if lines else 0)
    if number >= ranks * workers:
        assert all(part.parts == 1 for part in dealt if part.path != "rows.jsonl")


def test_webdatasets_own_split_is_the_same() -> None:
    """Against the library's splitters, which ask torch and the environment who they are."""
    paths = [f"{i}.tar" for i in range(13)]
    for rank, worker in itertools.product(range(2), range(3)):
        by_node = list(itertools.islice(paths, rank, None, 2))
        assert [part.path for part in deal(paths, rank, 2, worker, 3)] == by_node[worker::3]


def test_a_list_of_pictures_is_cut_into_rows(small_run: object, tmp_path: Path) -> None:
    rows = [{"file": f"{i}.png", "caption": f"number {i}"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    for i in (0, 1, 2, 4):
        (tmp_path / f"{i}.png").write_bytes(b"picture")
    path = str(tmp_path / "pairs.jsonl")
    both = [take([Part(path, part, 2)], size, shuffle=1) for part, size in ((0, 3), (1, 2))]
    numbers = [[name.removeprefix("pairs.jsonl:") for name in names(each)] for each in both]
    assert numbers == [["1", "3", "5"], ["2", "4"]]
    assert [bool(d.sample and d.sample.problem) for d in both[1]] == [False, True]  # 3.png is missing
    assert both[0][0].sample and both[0][0].sample.data == b"picture"
    shuffled = names(take([Part(path)], 10, shuffle=2))
    assert len(set(shuffled[:5])) == 5 and shuffled[:5] != sorted(shuffled[:5])


def test_one_tar_for_several_workers_is_cut(parts: list[Part]) -> None:
    own = [deal([parts[0].path], 0, 1, worker, 3) for worker in range(3)]
    seen = [set(names(take(each, 4))) for each in own]
    assert [len(each) for each in seen] == [4, 4, 4] and len(set.union(*seen)) == 12


def test_sources_are_mixed_by_weight_and_resumed_anywhere(parts: list[Part]) -> None:
    def draw(number: int, start: Standing, chance: str = "a") -> list[Mixed]:
        mixture = Mixture([parts[:2], parts[2:]], [3.0, 1.0], start, 7, 5, chance)
        return [mixture.draw() for _ in range(number)]

    begin = Standing((Position(), Position()))
    whole = draw(400, begin)
    share = sum(each.source == 0 for each in whole) / 400
    assert 0.68 < share < 0.82
    for stop in (1, 37, 399):
        assert draw(400 - stop, whole[stop - 1].after) == whole[stop:]
    assert [each.source for each in draw(40, begin, "b")] != [each.source for each in whole[:40]]


def test_batches_of_one_source_are_chosen_alike(parts: list[Part]) -> None:
    """By processes that read other shards, and whatever is damaged: a choice is counted once, not by its samples."""

    def chosen(own: list[Part], samples: int) -> list[int]:
        mixture = Mixture([own, parts[2:]], [1.0, 1.0], Standing((Position(), Position())), 7, 5, "worker 0")
        found = []
        for _ in range(30):
            first = mixture.draw()
            found.append(first.source)
            for _ in range(samples):
                assert mixture.draw(first.source).source == first.source
        return found

    assert chosen(parts[:1], 2) == chosen(parts[1:2], 5) and len(set(chosen(parts[:1], 2))) == 2


def test_frequent_rows_can_be_made_rarer(tmp_path: Path, write_tar: Any, coloured_samples: Any) -> None:
    samples = coloured_samples(12)
    for sample in samples[:6]:
        sample["json"]["share"] = 0.25
    write_tar(tmp_path / "a.tar", samples)
    drawn = names(take([Part(str(tmp_path / "a.tar"))], 600))
    rare = sum(int(name.split()[-1]) < 6 for name in drawn) / 600
    assert 0.14 < rare < 0.26  # 0.2 expected, 0.5 without


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:15_000])


def garbage(path: Path) -> None:
    path.write_bytes(b"this is not a tar" * 100)


@pytest.mark.parametrize(("damage", "left"), [(cut, 4), (garbage, 0), (Path.unlink, 0)])
def test_broken_shards_are_reported_and_the_stream_goes_on(
    small_run: object, damage: Callable[[Path], None], left: int
) -> None:
    shards: list[Path] = small_run.shards  # type: ignore[attr-defined]
    damage(shards[2])
    drawn = take([Part(str(path)) for path in shards], 50)
    broken = [each.broken_shard for each in drawn if each.sample is None]
    assert broken and all(str(shards[2]) in each for each in broken)
    first = drawn[: next(i for i, each in enumerate(drawn) if each.after.epoch == 1)]
    assert len([each for each in first if each.sample and each.sample.name.startswith("2.tar")]) <= max(left, 12)
    assert len([each for each in first if each.sample and not each.sample.name.startswith("2.tar")]) == 36
    again = take([Part(str(path)) for path in shards], 20, drawn[29].after)
    assert again == drawn[30:50]


def test_nothing_readable_is_an_error_not_a_hang(small_run: object) -> None:
    shards: list[Path] = small_run.shards  # type: ignore[attr-defined]
    for path in shards:
        path.unlink()
    with pytest.raises(InputError, match="nothing in them could be read"):
        take([Part(str(path)) for path in shards], 20)


@pytest.mark.parametrize("source", ["pipe:cat a.tar", "https://host/a.tar", "s3://bucket/a.tar", "a.tar::b:c.tar"])
def test_only_local_files(source: str) -> None:
    with pytest.raises(InputError, match="expected a local"):
        expand([source])


def test_expansion_and_sizes(tmp_path: Path) -> None:
    assert expand(["a/{08..10}.tar", "b.jsonl"]) == ("a/08.tar", "a/09.tar", "a/10.tar", "b.jsonl")
    with pytest.raises(InputError, match=r"expected a \.tar"):
        expand(["a.zip"])
    with pytest.raises(InputError, match="at least one"):
        expand([])
    (tmp_path / "a.tar").write_bytes(b"123")
    assert file_sizes([str(tmp_path / "a.tar"), "missing.tar"]) == {str(tmp_path / "a.tar"): 3, "missing.tar": -1}
