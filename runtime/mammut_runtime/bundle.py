"""A bundle is a folder that holds all a device needs. Here it is opened, with suspicion, and published.

`Bundle.open` checks names, links, sizes, hashes, and where the graphs take their weights from, before any engine sees a
file. That guards against damage, half a download and edited files. It cannot guard against somebody who can write into
the folder WHILE it is in use: a file may change between our check and the engine's own opening of it. `graph_path`
notices a file that was exchanged, as happens when a new bundle is published over one in use; whoever needs more makes
the folder read-only. The manifest is not signed: a bundle is as trustworthy as the place it came from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mammut_runtime.errors import BundleError, InputError
from mammut_runtime.manifest import (
    FORMAT,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Canary,
    FileInfo,
    GraphInfo,
    Manifest,
    ModelInfo,
    ParityInfo,
    QuantizationInfo,
    TensorInfo,
    TextRule,
    graph_contract,
    read_manifest,
)
from mammut_runtime.onnx_external import check_external_data
from mammut_runtime.plain_files import check_regular, open_regular, plain_entries, read_regular
from mammut_runtime.strict import parse_json, to_json

__all__ = [
    "FORMAT",
    "MANIFEST_FILE",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "Bundle",
    "Canary",
    "FileInfo",
    "GraphInfo",
    "Manifest",
    "ModelInfo",
    "ParityInfo",
    "QuantizationInfo",
    "TensorInfo",
    "TextRule",
    "graph_contract",
    "hash_files",
    "publish",
    "read_manifest",
    "write_manifest",
]

MAX_MANIFEST_BYTES = 4_000_000
MAX_GRAPH_BYTES = 64_000_000
"""Of one .onnx file, which is read whole to check it. Weights do not belong there but into weights.bin."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OPEN_ATTEMPTS = 5
_OPEN_PAUSE_S = 0.02

_Stamp = tuple[int, int, int, int]
"""Device, inode, size, modification time in ns: another file, or one written to, has another stamp."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Made by `Bundle.open`."""

    path: Path
    """Its folder, absolute, symbolic links on the way resolved."""
    manifest: Manifest
    content_hash: str
    """sha256 of manifest.json, and so, by the hashes in it, of everything: the bundle's name in caches."""
    verified: bool
    """Whether the hashes were checked."""
    _stamps: Mapping[str, _Stamp] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Open and check the bundle in the folder `path`.

        verify: check every file's sha256 too. Names, links, sizes and the graphs' references are always checked.
        A bundle that is being replaced at this moment is looked at again, a few times.

        Raises BundleError.
        """
        for attempt in range(_OPEN_ATTEMPTS):
            before = _identity(path)
            problem: BundleError | None = None
            try:
                bundle = cls._open_once(path, verify)
            except BundleError as error:
                problem = error
                time.sleep(_OPEN_PAUSE_S)
            if _identity(path) == before or attempt == _OPEN_ATTEMPTS - 1:
                break
        if problem:
            raise problem
        return bundle

    @classmethod
    def _open_once(cls, path: str | Path, verify: bool) -> Bundle:
        try:
            folder = Path(path).resolve(strict=True)
            names = plain_entries(folder)
            if MANIFEST_FILE not in names:
                raise BundleError(f"{path}: no {MANIFEST_FILE}; expected a bundle's folder, as mammut-export makes it")
            text, _ = read_regular(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
            manifest = read_manifest(text, str(folder / MANIFEST_FILE))
            _check_names(folder, names, manifest)
            # All sizes before any hash: a file that is cut off is found without reading gigabytes.
            for name, info in manifest.files.items():
                _check_size(folder / name, check_regular(folder / name).st_size, info)
            stamps = {name: _check_file(folder / name, manifest, verify) for name in manifest.files}
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; links that lead in a circle
            raise BundleError(f"{path}: cannot be opened as a bundle: {_reason(error)}") from error
        return cls(folder, manifest, hashlib.sha256(text).hexdigest(), verify, stamps)

    def graph_path(self, name: str) -> Path:
        """The ONNX file of a graph, for an engine. Raises BundleError if it is missing or not the opened one."""
        if name not in self.manifest.graphs:
            present = ", ".join(self.manifest.graphs)
            raise BundleError(f"{self.path}: no graph {name!r}, only {present}; export it with the tasks that you need")
        file = self.manifest.graphs[name].file
        for each in (file, WEIGHTS_FILE):
            if each in self._stamps:
                self._check_unchanged(each)
        return self.path / file

    def read(self, name: str) -> bytes:
        """The content of a file of the bundle, for example "tokenizer.json"; checked again unless opened unverified."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: no file {name!r} in {MANIFEST_FILE}; expected one of its files")
        info = self.manifest.files[name]
        path = self.path / name
        try:
            data, _ = read_regular(path, info.size_bytes)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {_reason(error)}") from error
        _check_size(path, len(data), info)
        if self.verified:
            _check_hash(path, hashlib.sha256(data).hexdigest(), info)
        return data

    def _check_unchanged(self, name: str) -> None:
        try:
            stamp = _stamp((self.path / name).lstat())
        except OSError:
            stamp = None
        if stamp != self._stamps[name]:
            raise BundleError(
                f"{self.path / name}: changed or replaced since the bundle was opened; open the bundle again"
            )


def hash_files(folder: Path) -> dict[str, FileInfo]:
    """Size and sha256 of every file in `folder` but manifest.json. Raises BundleError for links and subfolders."""
    found = {}
    for name in sorted(plain_entries(folder) - {MANIFEST_FILE}):
        with open_regular(folder / name) as (file, status):
            found[name] = FileInfo(hashlib.file_digest(file, "sha256").hexdigest(), status.st_size)
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, if it reads back as the same. Raises BundleError for what a reader would refuse."""
    text = to_json(manifest)
    if read_manifest(text) != manifest:
        raise BundleError(f"{MANIFEST_FILE}: does not read back as it was; use plain int, float, str and tuples in it")
    (folder / MANIFEST_FILE).write_bytes(text)


@contextlib.contextmanager
def publish(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a new, hidden folder beside `out` to write a bundle into; when the block ends, check it, move it to `out`.

    out: is made together with its parent folders. It must not exist; with `overwrite` it may be a bundle, which is
    replaced, or an empty folder. On any exception, Ctrl-C included, nothing stays behind and an old bundle is whole,
    except that an interruption in the very last moment finds the new one in place. The new bundle is on the disk
    (fsync) before it gets its name. If the process is killed outright, a hidden folder `.NAME.*.new` may stay. Where
    names cannot be exchanged in one step (not Linux), being killed between two renames may leave the old bundle as
    `.NAME.*.old`.

    Raises InputError if `out` cannot be written or replaced or the disk is full, BundleError if the block did not leave
    a whole bundle.
    """
    target = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at `out` itself
    _check_replaceable(target, overwrite)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    parents = [parent for parent in target.parents if not parent.exists()]
    try:
        with _reported(target):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        yield folder
        Bundle.open(folder)
        with _reported(target):
            _sync(folder)
            _move_into_place(folder, target, overwrite)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in parents:
            with contextlib.suppress(OSError):  # somebody else may have put something there by now
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise InputError(f"{target}: {_reason(error)}; nothing was published, make room first") from error
        raise


# --- reading ----------------------------------------------------------------------------------------------------------


def _check_names(folder: Path, names: set[str], manifest: Manifest) -> None:
    if missing := sorted(manifest.files.keys() - names):
        raise BundleError(f"{folder}: the file {missing[0]!r} is missing; copy or export the bundle again")
    if extra := sorted(names - manifest.files.keys() - {MANIFEST_FILE}):
        raise BundleError(f"{folder}: {extra[0][:80]!r} is not in {MANIFEST_FILE}, expected no other file; remove it")


def _check_file(path: Path, manifest: Manifest, verify: bool) -> _Stamp:
    """Check one file's content as far as asked; the stamp of what was checked."""
    info = manifest.files[path.name]
    if path.suffix == ".onnx":
        data, status = read_regular(path, MAX_GRAPH_BYTES)
        digest = hashlib.sha256(data).hexdigest() if verify else info.sha256
        _check_hash(path, digest, info)
        weights = manifest.files.get(WEIGHTS_FILE)
        check_external_data(data, str(path), {WEIGHTS_FILE: weights.size_bytes} if weights else {})
    else:
        with open_regular(path) as (file, status):
            digest = hashlib.file_digest(file, "sha256").hexdigest() if verify else info.sha256
        _check_hash(path, digest, info)
    return _stamp(status)


def _check_size(path: Path, size_bytes: int, info: FileInfo) -> None:
    if size_bytes != info.size_bytes:
        raise BundleError(
            f"{path}: {size_bytes:,} bytes, expected {info.size_bytes:,}; the file is cut off or was changed, "
            f"copy or export the bundle again"
        )


def _check_hash(path: Path, digest: str, info: FileInfo) -> None:
    if digest != info.sha256:
        raise BundleError(
            f"{path}: sha256 {digest[:12]}..., expected {info.sha256[:12]}...; the file was changed or damaged, "
            f"copy or export the bundle again"
        )


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _identity(path: str | Path) -> _Stamp | None:
    """Which folder a path leads to now; another one after a publication."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return _stamp(status)  # the inode alone may be used again for a new folder


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


# --- publishing -------------------------------------------------------------------------------------------------------


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InputError(f"{target}: exists already; give another name, or --overwrite to replace the bundle there")
    if problem := _not_a_bundle(target):
        raise InputError(f"{target}: {problem}, so --overwrite leaves it; give another name or remove it yourself")


def _not_a_bundle(target: Path) -> str | None:
    """Why a folder is not ours to delete: only what a manifest lists, and an empty folder, is."""
    if target.is_symlink() or not target.is_dir():
        return "is not a folder of its own"
    try:
        names = plain_entries(target)
        if not names:
            return None
        if MANIFEST_FILE not in names:
            return f"is not a bundle (it has no {MANIFEST_FILE})"
        text, _ = read_regular(target / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        # Also a bundle of another format may be replaced, so this looks at two keys only.
        data = parse_json(text, MANIFEST_FILE, BundleError)
    except (BundleError, OSError) as error:
        return f"is not a bundle ({error})"
    if not isinstance(data, dict) or type(data.get("format")) is not int or not isinstance(data.get("files"), dict):
        return f"is not a bundle (its {MANIFEST_FILE} has no format and files)"
    extra = sorted(names - data["files"].keys() - {MANIFEST_FILE})
    return f"holds {extra[0]!r}, which is not part of the bundle" if extra else None


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Turn an OSError of our own steps into an InputError; a full disk is `publish`'s to report."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise InputError(f"{target}: cannot be written: {_reason(error)}; give another place") from error


def _sync(folder: Path) -> None:
    """Have the folder and its files on the disk before it gets its name."""
    for path in folder.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_into_place(folder: Path, target: Path, overwrite: bool) -> None:
    """Give `folder` the name `target`; an old bundle there is removed once the new one is in its place."""
    _check_replaceable(target, overwrite)  # again: an export takes minutes
    if not target.exists():
        folder.rename(target)
        _sync_folder(target.parent)
        return
    if not _exchanged(folder, target):
        _exchange_in_two_steps(folder, target)
    _sync_folder(target.parent)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise InputError(
            f"{target}: the new bundle is published, but the old one could not be removed ({_reason(error)}); "
            f"remove {folder} yourself"
        ) from error


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders' names in one step, so that there is a bundle at any moment; False where that is not to be had.

    Only Linux has it (renameat2), for most file systems; Python has no function for it.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes  # for those who publish; it is no small import for a device

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_working_folder, exchange = -100, 2
    paths = (os.fsencode(one), at_working_folder, os.fsencode(other))
    return renameat2 is not None and renameat2(at_working_folder, *paths, exchange) == 0


def _exchange_in_two_steps(folder: Path, target: Path) -> None:
    """The same by renaming; for a moment there is nothing at `target`."""
    aside = folder.with_suffix(".old")
    try:
        target.rename(aside)
        folder.rename(target)
        aside.rename(folder)
    except BaseException:
        if target.exists():  # whichever bundle it is: nothing was done yet, or all that matters
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
        raise
