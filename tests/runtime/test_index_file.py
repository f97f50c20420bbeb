"""The index file: what was written comes back; anything else is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import InputError
from mammut_runtime.index_file import Entry, IndexHeader, paths_size, read_index_file, write_index_file

names = st.text(st.characters(blacklist_characters="/\0\\", blacklist_categories=("Cs",)), min_size=1, max_size=8)
paths = st.lists(names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3).map("/".join)
entries = st.lists(st.builds(Entry, paths, st.integers(-(2**62), 2**62), st.integers(0, 2**62)), max_size=9)


def write(path: Path, content: list[Entry], seed: int = 0) -> np.ndarray:
    embeddings = np.random.default_rng(seed).standard_normal((len(content), 4)).astype(np.float32)
    header = IndexHeader(1, "a" * 64, "toy", "../photos", 4, len(content), paths_size(content))
    write_index_file(path, header, content, [embeddings[:2], embeddings[2:]])
    return embeddings


@settings(max_examples=60, deadline=None)
@given(content=entries)
def test_round_trip(content: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("index") / "photos.index"
    embeddings = write(path, content)
    found = read_index_file(path)
    assert list(found.entries) == content and found.header.folder == "../photos"
    np.testing.assert_array_equal(found.embeddings(), embeddings)
    rows = list(range(len(content)))[::-1]
    if rows:
        np.testing.assert_array_equal(np.concatenate(list(found.rows(rows))), embeddings[::-1])
    assert [each.name for each in path.parent.iterdir()] == ["photos.index"], "no temporary file stays"


CONTENT = [Entry("a.png", 1, 2), Entry("b/c.png", 3, 4)]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes changed, cut off or added anywhere: one InputError, or an index whose paths are still plain."""
    path = tmp_path_factory.mktemp("index") / "photos.index"
    write(path, CONTENT)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    else:
        whole = whole[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary(max_size=40))
    path.write_bytes(whole)
    try:
        found = read_index_file(path)
    except InputError as problem:
        assert "\n" not in str(problem) and str(path) in str(problem)
    else:
        assert found.embeddings().shape == (found.header.count, found.header.embed_dim)
        for entry in found.entries:
            assert not entry.path.startswith("/") and ".." not in entry.path.split("/")


@pytest.mark.parametrize("bad", ["../x.png", "/etc/x.png", "a//b.png", "a/./b.png", "a/../../b.png"])
def test_paths_that_lead_out_are_refused(bad: str, tmp_path: Path) -> None:
    write(tmp_path / "i", [Entry(bad, 1, 2)])
    with pytest.raises(InputError, match="damaged index: its paths do not fit"):
        read_index_file(tmp_path / "i")


def test_not_an_index(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(b"hello world, this is something else")
    with pytest.raises(InputError, match="is not a picture index; give another file name"):
        read_index_file(tmp_path / "i")
    with pytest.raises(InputError, match="cannot be read as an index: No such file"):
        read_index_file(tmp_path / "none")


def test_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "i"
    write(path, CONTENT)
    before = path.read_bytes()

    def blocks() -> object:
        yield np.zeros((1, 4), np.float32)
        raise KeyboardInterrupt

    header = IndexHeader(1, "b" * 64, "toy", ".", 4, 2, paths_size(CONTENT))
    with pytest.raises(KeyboardInterrupt):
        write_index_file(path, header, CONTENT, blocks())  # type: ignore[arg-type]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_rows_of_a_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "i"
    write(path, CONTENT)
    found = read_index_file(path)
    write(path, CONTENT, seed=1)
    with pytest.raises(InputError, match="changed by another program"):
        list(found.rows([0]))
