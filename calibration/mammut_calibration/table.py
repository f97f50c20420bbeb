"""The calibration table: what was seen of every tensor, from which data, with which graphs. One file, also the state
of a calibration that is not finished.

The file is an .npz with three arrays: the description as JSON, the histograms, and thumbnails of the pictures so far
(they tell repeated pictures). It is read without pickle, and with a look at all sizes before anything is unpacked.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mammut_calibration.activations import Scope
from mammut_calibration.statistics import BINS, DEFAULT_PERCENTILE, METHODS, Method, Range, TensorStatistics, check
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import WEIGHTS_FILE
from mammut_runtime.strict import Between, Length, Matching, Omissible, from_dict, parse_json, to_dict, to_json

FORMAT: Final = 1
SUFFIX = ".npz"
THUMBNAIL = 16
"""Side of a thumbnail, pixels."""
MAX_FILE_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30
"""Of all arrays together: 50,000 tensors."""
MAX_HEADER_BYTES = 64 * 2**20
_MEMBERS = {"header.npy", "counts.npy", "thumbnails.npy"}

Count = Annotated[int, Between(0, 2**62)]
Hash = Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]
Name = Annotated[str, Length(1, 1000)]


@dataclass(frozen=True)
class TensorEntry:
    """Numbers of one tensor as the file has them; its histogram is a row of another array."""

    graph: Name
    tensor: Name
    minimum: float
    maximum: float
    sum_abs: float
    values: Count
    not_finite: Count
    runs: Count
    limit: float


@dataclass(frozen=True, kw_only=True)
class TableHeader:
    """Where a table comes from."""

    format: Literal[1] = FORMAT
    complete: bool
    """False: the state of a calibration that can be resumed."""
    model: Name
    bundle_hash: Hash
    """The bundle that was run."""
    graph_hashes: dict[Name, Hash]
    """Graph -> sha256 of its file; and the weights' file. What a table fits is decided by these."""
    data_hash: Hash
    """Of the calibration data, see Dataset.content_hash."""
    data_pictures: Count
    """In the data."""
    scope: Scope
    max_tokens: Count
    """Longest generated caption."""
    done: Count
    """Pictures of the data that were looked at."""
    pictures: Count
    """Of these: different ones, which the statistics are from."""
    repeated: Count
    """Of these: the same as an earlier one, or nearly; left out."""
    constant: Count
    """Of these: one colour all over; left out."""
    damaged: tuple[Name, ...]
    """Of these: what could not be read, with the reason."""
    texts: Count
    """Texts that were embedded."""
    own_texts: Count
    """Of these: written by the model, because the data had none."""
    tokens: Count
    """Tokens that the decoder generated."""
    clips: Annotated[int, Between(0, 2**62), Omissible()] = 0
    """Clips that the video graph was shown; none in a bundle without it."""
    filmed: Annotated[int, Between(0, 2**62), Omissible()] = 0
    """Of these: parts of the data's clips. The others were made of its pictures, by a crop that moves."""
    versions: dict[Name, Name]
    """Tool -> version."""


@dataclass(frozen=True)
class _File:
    header: TableHeader
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, eq=False)
class CalibrationTable:
    """What was seen of every tensor."""

    header: TableHeader
    graphs: dict[str, dict[str, TensorStatistics]]
    """Graph -> tensor -> statistics, in the order of the graph."""
    thumbnails: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, THUMBNAIL * THUMBNAIL * 3), np.uint8))
    """uint8[pictures, 768]; empty in a finished table."""

    def ranges(
        self,
        graph: str,
        method: Method = "minmax",
        *,
        percentile: float = DEFAULT_PERCENTILE,
        symmetric: bool = False,
    ) -> dict[str, Range]:
        """Tensor -> the range to quantize (see TensorStatistics.range). Raises InputError for a graph without any."""
        if graph not in self.graphs:
            raise InputError(f"the calibration has no graph {graph!r}, only {', '.join(self.graphs)}")
        found = self.graphs[graph].items()
        return {name: each.range(method, percentile=percentile, symmetric=symmetric) for name, each in found}

    def check_fits(self, bundle: Bundle) -> None:
        """Raises InputError unless the bundle has the graphs and weights that the table was made with."""
        for name, digest in graph_hashes(bundle).items():
            if self.header.graph_hashes.get(name) != digest:
                raise InputError(
                    f"the calibration was made with another {name} than {bundle.path} has (model "
                    f"{self.header.model!r}, this is {bundle.manifest.model.name!r}); calibrate this bundle"
                )

    def to_dict(self) -> dict[str, Any]:
        """The description, and each tensor's numbers with its ranges by every method. Without the histograms."""
        graphs = {
            graph: {
                name: {
                    "minimum": each.minimum,
                    "maximum": each.maximum,
                    "mean_abs": each.mean_abs,
                    "values": each.values,
                    "not_finite": each.not_finite,
                    "runs": each.runs,
                    "ranges": {method: to_dict(each.range(method)) for method in METHODS},
                }
                for name, each in tensors.items()
            }
            for graph, tensors in self.graphs.items()
        }
        return {**to_dict(self.header), "graphs": graphs}


def graph_hashes(bundle: Bundle) -> dict[str, str]:
    """Graph -> sha256 of its file, and the same of the weights' file."""
    files = bundle.manifest.files
    found = {name: files[graph.file].sha256 for name, graph in bundle.manifest.graphs.items()}
    if WEIGHTS_FILE in files:
        found[WEIGHTS_FILE] = files[WEIGHTS_FILE].sha256
    return found


def save_table(path: Path, table: CalibrationTable) -> None:
    """Write the file; it appears whole or not at all, and an old one stays until then. Raises InputError."""
    entries, rows = [], []
    for graph, tensors in table.graphs.items():
        for name, each in tensors.items():
            numbers = (each.minimum, each.maximum, each.sum_abs, each.values, each.not_finite, each.runs, each.limit)
            entries.append(TensorEntry(graph, name, *numbers))
            rows.append(each.counts)
    header = np.frombuffer(to_json(_File(table.header, tuple(entries))), np.uint8)
    counts = np.stack(rows) if rows else np.zeros((0, BINS), np.int64)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            np.savez_compressed(file, header=header, counts=counts, thumbnails=table.thumbnails)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_table(path: Path) -> CalibrationTable:
    """Read a finished table. Raises InputError for anything else."""
    table = read_table(path)
    if not table.header.complete:
        raise InputError(f"{path}: this calibration is not finished; run the same command again to go on with it")
    return table


def read_table(path: Path) -> CalibrationTable:
    """Read a table, finished or not. Raises InputError for a file that save_table did not write."""
    arrays = _arrays(path)
    text = arrays["header"].tobytes()
    file = from_dict(_File, parse_json(text, str(path), InputError, MAX_HEADER_BYTES), str(path), InputError)
    counts, thumbnails = arrays["counts"], arrays["thumbnails"]
    if counts.dtype != np.int64 or counts.shape != (len(file.tensors), BINS):
        raise _damaged(path, f"histograms {counts.dtype}{list(counts.shape)} for {len(file.tensors)} tensors")
    if thumbnails.dtype != np.uint8 or thumbnails.ndim != 2 or thumbnails.shape[1] != THUMBNAIL * THUMBNAIL * 3:
        raise _damaged(path, f"thumbnails {thumbnails.dtype}{list(thumbnails.shape)}")
    graphs: dict[str, dict[str, TensorStatistics]] = {}
    for entry, row in zip(file.tensors, counts, strict=True):
        statistics = TensorStatistics(
            entry.minimum, entry.maximum, entry.sum_abs, entry.values, entry.not_finite, entry.runs, entry.limit, row
        )
        if problem := check(statistics):
            raise _damaged(path, f"{entry.graph}, {entry.tensor[:80]!r}: {problem}")
        if entry.tensor in graphs.setdefault(entry.graph, {}):
            raise _damaged(path, f"{entry.graph}: {entry.tensor[:80]!r} is there twice")
        graphs[entry.graph][entry.tensor] = statistics
    return CalibrationTable(file.header, graphs, thumbnails)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise _damaged(path, f"{size:,} bytes")
        data = path.read_bytes()
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror}); expected a calibration table") from problem
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            if set(members.namelist()) != _MEMBERS or len(members.namelist()) != len(_MEMBERS):
                raise _damaged(path, "other parts than it should have")
            if sum(each.file_size for each in members.infolist()) > MAX_UNPACKED_BYTES:
                raise _damaged(path, f"more than {MAX_UNPACKED_BYTES:,} bytes unpacked")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("header", "counts", "thumbnails")}
    except InputError:
        raise
    except Exception as problem:  # zipfile's, zlib's and numpy's: they share no class
        raise _damaged(path, str(problem)) from problem
    if not all(isinstance(each, np.ndarray) for each in found.values()):  # a member that is no array comes as bytes
        raise _damaged(path, "a part is not an array")
    return found


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: not a calibration table of mammut-calibrate, or a damaged one: {what}; calibrate again")
