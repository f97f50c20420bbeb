"""Engines that were built on this device: kept outside the bundle, and never loaded unless this device made them.

A serialized engine is a program: loading it runs its code. So every file carries a MAC by a key that only this user has
on this device, and is refused, before anything loads it, when the MAC is missing or wrong, or when others could have
written to it. That guards against files that came with a bundle, a disk or a backup of another device, and against
damage. It cannot guard against programs that run as this user: they can read the key.

    <folder>/<bundle hash>/<graph>-<key>.engine     magic, header (JSON), engine, MAC (HMAC-SHA256)
    <folder>/timing-<key>.cache                     the builder's measurements, in the same form

folder: $XDG_CACHE_HOME/mammut-edge/engines, or ~/.cache/...; key: $XDG_STATE_HOME/mammut-edge/engine.key, or
~/.local/state/.... They are apart so that a copied cache folder does not bring its key along.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mammut_runtime.errors import EngineError

MAGIC = b"MAMMUT-ENGINE-1\n"
KEY_BYTES = MAC_BYTES = 32
MAX_HEADER_BYTES = 65_536
PART_SUFFIX = ".part"
_CHUNK_BYTES = 1 << 20
_LENGTH_BYTES = 4


@dataclass(frozen=True)
class EngineKey:
    """What an engine is for. One that differs in any of it is another engine."""

    bundle: str
    """Bundle.content_hash."""
    graph: str
    gpu: str
    """Name."""
    gpu_uuid: str
    compute_capability: str
    """Such as 8.7."""
    driver: str
    library: str
    """tensorrt or tensorrt_rtx."""
    library_version: str

    @property
    def file_name(self) -> str:
        """Of the engine, in the bundle's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.graph}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.engine"

    @property
    def timing_name(self) -> str:
        """Of the builder's timing cache, which all bundles share."""
        shared = [self.gpu, self.gpu_uuid, self.compute_capability, self.driver, self.library, self.library_version]
        return f"timing-{hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:16]}.cache"


class RefusedEngine(EngineError):
    """A file that is there and is not to be trusted."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path}: refused, not loaded: {why}. Loading an engine runs its code, so only engines that this user "
            f"built on this device are; remove the file and build again: mammut-run build BUNDLE --force"
        )
        self.path, self.why = path, why


@dataclass(frozen=True)
class StoredEngine:
    """An engine file whose MAC was right."""

    path: Path
    build: dict[str, Any]
    """The options it was built with, as they were given to `store`."""
    engine: memoryview


class EngineCache:
    """The engines of this user on this device."""

    def __init__(self, folder: Path | None = None, key_file: Path | None = None) -> None:
        """None: the user's own places (see above). Nothing is made before it is needed."""
        self.folder = folder or _user_folder("XDG_CACHE_HOME", ".cache") / "engines"
        self.key_file = key_file or _user_folder("XDG_STATE_HOME", ".local/state") / "engine.key"

    def path(self, key: EngineKey) -> Path:
        """Where this engine is, or would be."""
        return self.folder / key.bundle[:32] / key.file_name

    def load(self, key: EngineKey) -> StoredEngine | None:
        """The engine; None if there is none.

        Raises EngineError for one that this device did not make, or that others can write to.
        """
        path = self.path(key)
        content = self._read(path)
        if content is None:
            return None
        header, engine = content
        if header.get("key") != asdict(key):
            raise RefusedEngine(path, "it is another engine, renamed")
        return StoredEngine(path, header.get("build", {}), engine)

    def store(self, key: EngineKey, engine: Path, build: Mapping[str, Any]) -> Path:
        """Keep the engine in the file `engine`, which is removed; the file that others will load, written at once.

        Raises EngineError if the folder cannot be written or is full.
        """
        path = self.path(key)
        self._write(path, {"key": asdict(key), "build": dict(build)}, engine)
        return path

    def load_timing(self, key: EngineKey) -> bytes:
        """The builder's measurements so far; empty if there are none that can be trusted."""
        try:
            content = self._read(self.folder / key.timing_name)
        except EngineError:
            return b""  # a help, not a need: it is made again
        return bytes(content[1]) if content else b""

    def store_timing(self, key: EngineKey, measurements: Path) -> None:
        """Keep the builder's measurements in the file `measurements`, which is removed."""
        self._write(self.folder / key.timing_name, {}, measurements)

    @contextlib.contextmanager
    def building(self, key: EngineKey) -> Iterator[Path]:
        """For the time of a build: a folder for unfinished files, and no other build: two would share the GPU's memory.

        What an interrupted build left is removed. Raises EngineError if the folder cannot be written, and if another
        build is at work.
        """
        folder = self.path(key).parent
        with _reported(folder):
            for each in (self.folder, folder):
                _make_folder(each)
            self._device_key(make=True)  # now rather than after minutes of building
            lock = os.open(self.folder / "build.lock", os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o600)
        try:
            _lock(lock, self.folder)
            _remove_parts(self.folder, folder)
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    _remove_parts(self.folder, folder)
        finally:
            os.close(lock)

    def _read(self, path: Path) -> tuple[dict[str, Any], memoryview] | None:
        """Header and content of a file, its MAC checked."""
        try:
            with _open_own(path) as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise EngineError(f"{path.parent}: is not a folder; give another one with --engine-cache") from error
        except OSError as error:
            raise EngineError(f"{path}: cannot be read: {error.strerror}; build it again: mammut-run build") from error
        key = self._device_key(make=False)
        if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _LENGTH_BYTES + MAC_BYTES:
            raise RefusedEngine(path, "it has no MAC")
        if key is None:
            raise RefusedEngine(path, f"this device has no key yet ({self.key_file})")
        content = memoryview(data)
        if not hmac.compare_digest(hmac.digest(key, content[:-MAC_BYTES], "sha256"), data[-MAC_BYTES:]):
            raise RefusedEngine(path, "its MAC is not by this device's key, or the file was changed")
        start = len(MAGIC) + _LENGTH_BYTES
        end = start + int.from_bytes(content[len(MAGIC) : start], "little")
        header = json.loads(bytes(content[start:end]))
        return header, content[end:-MAC_BYTES]

    def _write(self, path: Path, header: dict[str, Any], source: Path) -> None:
        """magic + header + the content of source + MAC, under its name at once."""
        text = json.dumps(header, sort_keys=True).encode()
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
        with _reported(path):
            key = self._device_key(make=True)
            if key is None:
                raise EngineError(f"{self.key_file}: cannot be made")
            try:
                with _create(part) as file, source.open("rb") as content:
                    mac = hmac.new(key, digestmod="sha256")
                    for chunk in _chunks(MAGIC + len(text).to_bytes(_LENGTH_BYTES, "little") + text, content):
                        mac.update(chunk)
                        file.write(chunk)
                    file.write(mac.digest())
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            source.unlink()

    def _device_key(self, make: bool) -> bytes | None:
        """The key; None where there is none and it is not to be made."""
        try:
            with _open_own(self.key_file) as file:
                key = file.read(KEY_BYTES + 1)
        except FileNotFoundError:
            if not make:
                return None
            self._make_key()
            return self._device_key(make=False)
        except OSError as error:
            raise EngineError(f"{self.key_file}: cannot be read: {error.strerror}; expected this user's key") from error
        if len(key) != KEY_BYTES:
            raise EngineError(
                f"{self.key_file}: expected {KEY_BYTES} bytes, got {len(key)}; remove it and build the engines again"
            )
        return key

    def _make_key(self) -> None:
        """Made whole under another name, then linked: two builds at once end up with one key."""
        with _reported(self.key_file, "have XDG_STATE_HOME name a folder of this user"):
            _make_folder(self.key_file.parent)
            part = self.key_file.with_name(f".{self.key_file.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
            try:
                with _create(part) as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(part, self.key_file)
            finally:
                part.unlink(missing_ok=True)


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def _user_folder(variable: str, usual: str) -> Path:
    """As the XDG base directory specification has it: relative paths in the variable do not count."""
    given = os.environ.get(variable, "")
    if given and Path(given).is_absolute():
        return Path(given) / "mammut-edge"
    try:
        return Path.home() / usual / "mammut-edge"
    except RuntimeError as error:
        raise EngineError(f"this user has no home folder; set {variable}, or give --engine-cache") from error


@contextlib.contextmanager
def _open_own(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that only this user can have written. OSError if it cannot be opened, EngineError if it is not so."""
    _check_own(path.parent, path.parent.stat())
    flags = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedEngine(path, "it is a symbolic link") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RefusedEngine(path, "it is not a plain file")
        _check_own(path, status)
        yield file


def _check_own(path: Path, status: os.stat_result) -> None:
    if os.name != "posix":  # elsewhere owners and modes are not what they are here; the MAC is
        return
    if status.st_uid != os.geteuid():
        raise RefusedEngine(path, f"it belongs to user {status.st_uid}, expected {os.geteuid()}, who runs this")
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode) and mode & 0o022:
        raise EngineError(
            f"{path}: others can write to this folder (mode {mode:o}, expected 700), so engines in it are not to be "
            f"trusted; chmod 700 it, or give another with --engine-cache"
        )
    if not stat.S_ISDIR(status.st_mode) and mode & 0o077:
        raise RefusedEngine(path, f"others may use it (mode {mode:o}, expected 600)")


def _make_folder(folder: Path) -> None:
    """With its parents; new ones are for this user only."""
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(0o700, exist_ok=True)
    _check_own(folder, folder.stat())


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600), "wb")


def _chunks(head: bytes, content: IO[bytes]) -> Iterator[bytes]:
    yield head
    while chunk := content.read(_CHUNK_BYTES):
        yield chunk


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows; two builds at once do double work there, and both end well
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise EngineError(f"{folder}: another build is at work here; wait for it") from error


def _remove_parts(*folders: Path) -> None:
    for each in (entry for folder in folders for entry in folder.iterdir()):
        if each.name.endswith(PART_SUFFIX):
            each.unlink(missing_ok=True)


@contextlib.contextmanager
def _reported(path: Path, advice: str = "give another folder with --engine-cache") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EngineError(f"{path}: the disk is full; make room and build again, done engines are kept") from error
        raise EngineError(f"{path}: cannot be written: {error.strerror or error}; {advice}") from error
