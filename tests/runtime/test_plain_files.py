"""Only plain files are opened, also when something is put in their place at the last moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mammut_runtime import plain_files
from mammut_runtime.errors import BundleError


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / ".b").write_bytes(b"")
    assert plain_files.plain_entries(tmp_path) == {"a", ".b"}
    data, status = plain_files.read_regular(tmp_path / "a", 3)
    assert data == b"abc" and status.st_size == 3
    with pytest.raises(BundleError, match="a: 3 bytes, expected at most 2"):
        plain_files.read_regular(tmp_path / "a", 2)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("other"))


def _hard_link(path: Path) -> None:
    path.unlink()
    os.link(path.with_name("other"), path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("exchange", "error"),
    [
        (lambda path: None, None),
        (_link, OSError),  # the system refuses: the file is opened without following links
        (_hard_link, BundleError),
        (_pipe, BundleError),  # and it did not wait for somebody to write into it
    ],
)
def test_what_is_exchanged_between_looking_and_opening(
    tmp_path: Path, exchange: object, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    (tmp_path / "other").write_bytes(b"secret")
    real = os.open

    def late(name: Path, flags: int) -> int:
        exchange(name)  # type: ignore[operator]
        return real(name, flags)

    monkeypatch.setattr(plain_files.os, "open", late)
    if error is None:
        assert plain_files.read_regular(path, 10)[0] == b"abc"
        return
    with pytest.raises(error):
        plain_files.read_regular(path, 10)
