"""Engines are stored whole, for one user, and given out only if this device made them."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut_runtime.engine_cache import EngineCache, EngineKey, RefusedEngine
from mammut_runtime.errors import EngineError

KEY = EngineKey("b" * 64, "decoder", "GPU", "u" * 32, "8.7", "CUDA 12060", "tensorrt", "10.3.0")
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache", tmp_path / "state" / "engine.key")


def store(cache: EngineCache, content: bytes, key: EngineKey = KEY) -> Path:
    with cache.building(key) as folder:
        part = folder / "new.part"
        part.write_bytes(content)
        path = cache.store(key, part, {"workspace_mib": 1024})
        assert not part.exists()
        return path


def test_what_was_stored_comes_back(cache: EngineCache) -> None:
    assert cache.load(KEY) is None
    path = store(cache, b"engine" * 1000)
    found = cache.load(KEY)
    assert found is not None and bytes(found.engine) == b"engine" * 1000
    assert found.path == path == cache.path(KEY) and found.build == {"workspace_mib": 1024}
    store(cache, b"newer")
    again = cache.load(KEY)
    assert again is not None and bytes(again.engine) == b"newer", "replaced"
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(EngineKey)])
def test_every_part_of_the_key_counts(cache: EngineCache, field: str) -> None:
    store(cache, b"engine")
    assert cache.load(dataclasses.replace(KEY, **{field: "other"})) is None
    assert cache.load(KEY) is not None


def test_an_engine_under_anothers_name_is_refused(cache: EngineCache) -> None:
    other = dataclasses.replace(KEY, library_version="10.4.0")
    store(cache, b"engine").rename(cache.path(other))
    with pytest.raises(RefusedEngine, match="it is another engine, renamed"):
        cache.load(other)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused(cache: EngineCache, data: st.DataObject) -> None:
    path = store(cache, b"engine" * 20)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    with pytest.raises(RefusedEngine, match=r"refused, not loaded: .*mammut-run build BUNDLE --force"):
        cache.load(KEY)


def test_another_devices_key_or_none_is_refused(cache: EngineCache) -> None:
    store(cache, b"engine")
    kept = cache.key_file.read_bytes()
    cache.key_file.write_bytes(bytes(32))
    with pytest.raises(RefusedEngine, match="its MAC is not by this device's key, or the file was changed"):
        cache.load(KEY)
    cache.key_file.write_bytes(b"short")
    with pytest.raises(EngineError, match=r"engine.key: expected 32 bytes, got 5; remove it and build"):
        cache.load(KEY)
    cache.key_file.unlink()
    with pytest.raises(RefusedEngine, match="this device has no key yet"):
        cache.load(KEY)
    cache.key_file.write_bytes(kept)
    cache.key_file.chmod(0o600)
    assert cache.load(KEY) is not None, "a control"


@posix
def test_modes(cache: EngineCache) -> None:
    path = store(cache, b"engine")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(cache.key_file.stat().st_mode) == 0o600
    for folder in (cache.folder, path.parent, cache.key_file.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(cache.key_file.read_bytes()) == 32


@posix
@pytest.mark.parametrize(("which", "mode"), [("engine", 0o640), ("engine", 0o602), ("key", 0o644)])
def test_what_others_can_use_is_refused(cache: EngineCache, which: str, mode: int) -> None:
    path = store(cache, b"engine")
    target = {"engine": path, "key": cache.key_file}[which]
    before = stat.S_IMODE(target.stat().st_mode)
    target.chmod(mode)
    with pytest.raises(RefusedEngine, match=rf"others may use it \(mode {mode:o}, expected {before:o}\)"):
        cache.load(KEY)
    target.chmod(before)
    assert cache.load(KEY) is not None, "a control"


@posix
@pytest.mark.parametrize("mode", [0o770, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_trusted(cache: EngineCache, mode: int) -> None:
    folder = store(cache, b"engine").parent
    folder.chmod(mode)
    message = rf"others can write to this folder \(mode {mode:o}, expected 700\).*; chmod 700 it, or give another"
    with pytest.raises(EngineError, match=message):
        cache.load(KEY)
    with pytest.raises(EngineError, match=message), cache.building(KEY):
        pass
    folder.chmod(0o755)
    assert cache.load(KEY) is not None, "a control: others may read"


def test_a_place_for_the_key_that_cannot_be_written_is_found_before_the_build(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "link", refuse)
    message = r"engine\.key: cannot be written: Read-only file system; have XDG_STATE_HOME name"
    with pytest.raises(EngineError, match=message), cache.building(KEY):
        pass
    monkeypatch.undo()
    store(cache, b"engine")  # a control


@posix
def test_another_users_files_are_refused(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    store(cache, b"engine")
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(RefusedEngine, match=f"it belongs to user {own}, expected {own + 1}, who runs this"):
        cache.load(KEY)


@posix
def test_links_and_pipes_are_refused(cache: EngineCache, tmp_path: Path) -> None:
    path = store(cache, b"engine")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedEngine, match="it is a symbolic link"):
        cache.load(KEY)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(RefusedEngine, match="it is not a plain file"):
        cache.load(KEY)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "cannot be written: Read-only file system; give another folder with --engine-cache"),
        (errno.EACCES, "cannot be written: Permission denied; give another folder with --engine-cache"),
        (errno.ENOSPC, "the disk is full; make room and build again, done engines are kept"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_clear_error(
    cache: EngineCache, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(cache, b"engine")
    really = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number), str(path))
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(EngineError, match=message), cache.building(KEY):
        pass
    found = cache.load(KEY)
    assert found is not None and bytes(found.engine) == b"engine", "reading still works, and nothing is lost"


def test_a_disk_that_fills_up_keeps_the_old_engine(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(cache, b"engine")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match="the disk is full"):
        store(cache, b"newer")
    found = cache.load(KEY)
    assert found is not None and bytes(found.engine) == b"engine"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_unfinished_files_are_removed_by_the_next_build(cache: EngineCache) -> None:
    path = store(cache, b"engine")
    for folder in (cache.folder, path.parent):
        (folder / ".half.part").write_bytes(b"half")
    with cache.building(KEY) as folder, pytest.raises(EngineError, match="another build is at work here"):
        assert folder == path.parent and not list(cache.folder.rglob("*.part"))
        with cache.building(KEY):
            pass
    assert not list(cache.folder.rglob("*.part")) and cache.load(KEY) is not None


def test_timing_is_used_again_only_if_it_is_ours(cache: EngineCache) -> None:
    assert cache.load_timing(KEY) == b""
    with cache.building(KEY) as folder:
        (folder / "timing.part").write_bytes(b"measured")
        cache.store_timing(KEY, folder / "timing.part")
    assert cache.load_timing(KEY) == cache.load_timing(dataclasses.replace(KEY, graph="text")) == b"measured"
    path = cache.folder / KEY.timing_name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cache.load_timing(KEY) == b""


@pytest.mark.parametrize("given_folder", ["", "relative"])
def test_the_usual_places(given_folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given_folder)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    cache = EngineCache()
    assert cache.folder == tmp_path / ".cache" / "mammut-edge" / "engines"
    assert cache.key_file == tmp_path / ".local" / "state" / "mammut-edge" / "engine.key"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert EngineCache().folder == tmp_path / "elsewhere" / "mammut-edge" / "engines"


def test_no_home_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(EngineError, match="no home folder; set XDG_CACHE_HOME, or give --engine-cache"):
        EngineCache()
