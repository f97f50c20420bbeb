from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut_calibration import table as tables
from mammut_calibration.table import CalibrationTable, load_table, read_table, save_table
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError


@pytest.fixture
def saved(table: CalibrationTable, tmp_path: Path) -> Path:
    path = tmp_path / "t.npz"
    save_table(path, table)
    return path


def rewritten(path: Path, **changes: object) -> Path:
    """The same file with other arrays."""
    with np.load(path) as old:
        arrays = {**old, **changes}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def header_with(whole: bytes, change: dict[str, object]) -> np.ndarray:
    with np.load(io.BytesIO(whole)) as old:
        row = json.loads(old["header"].tobytes())
    row["header"].update(change)
    return np.frombuffer(json.dumps(row).encode(), np.uint8)


def test_a_table_reads_back_as_it_was_and_the_same_table_gives_the_same_bytes(
    saved: Path, table: CalibrationTable, tmp_path: Path
) -> None:
    found = load_table(saved)
    assert found.header == table.header and found.to_dict() == table.to_dict()
    for graph, tensors in table.graphs.items():
        assert list(found.graphs[graph]) == list(tensors)
        assert all((found.graphs[graph][name].counts == each.counts).all() for name, each in tensors.items())
    save_table(tmp_path / "again.npz", found)
    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "t.npz"]
    json.dumps(table.to_dict(), allow_nan=False)


def test_ranges_are_asked_by_graph_and_method(table: CalibrationTable) -> None:
    whole, cut = table.ranges("vision"), table.ranges("vision", "percentile", percentile=90)
    assert whole.keys() == cut.keys() == table.graphs["vision"].keys()
    assert all(cut[name].largest <= whole[name].largest for name in whole)
    assert any(cut[name].largest < 0.8 * whole[name].largest for name in whole)
    with pytest.raises(InputError, match="no graph 'detector', only vision, "):
        table.ranges("detector")


def test_a_table_fits_the_graphs_it_was_made_with(table: CalibrationTable, tiny: Bundle) -> None:
    table.check_fits(tiny)  # control
    hashes = {**table.header.graph_hashes, "text": "0" * 64}
    other = CalibrationTable(dataclasses.replace(table.header, graph_hashes=hashes), table.graphs)
    with pytest.raises(InputError, match="made with another text than"):
        other.check_fits(tiny)


def test_a_state_is_no_finished_table(table: CalibrationTable, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_table(path, CalibrationTable(dataclasses.replace(table.header, complete=False), table.graphs))
    assert not read_table(path).header.complete
    with pytest.raises(InputError, match="is not finished; run the same command again"):
        load_table(path)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_one_error_or_the_same_table(
    saved: Path, table: CalibrationTable, data: st.DataObject
) -> None:
    whole = saved.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
    if place < len(damaged):
        damaged[place] ^= data.draw(st.integers(1, 255))
    path = saved.with_name("damaged.npz")
    path.write_bytes(damaged)
    try:
        assert load_table(path).to_dict() == table.to_dict()
    except InputError as problem:
        assert "damaged.npz" in str(problem)


def test_other_contents_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.read_bytes()
    rewritten(saved)
    assert load_table(saved).header.complete  # control

    def refused(message: str, **changes: object) -> None:
        saved.write_bytes(whole)
        with pytest.raises(InputError, match=message):
            load_table(rewritten(saved, **changes))

    refused("other parts", extra=np.zeros(1))
    refused("Object arrays cannot be loaded", counts=np.array([{"a": 1}], dtype=object))
    refused("histograms float64", counts=np.zeros((3, 4096)))
    refused("thumbnails uint8", thumbnails=np.zeros((1, 5), np.uint8))
    refused("unknown key 'surprise'", header=header_with(whole, {"surprise": 1}))
    refused("scope: expected one of", header=header_with(whole, {"scope": "some"}))
    refused("not readable as JSON", header=np.frombuffer(b"{", np.uint8))
    with np.load(io.BytesIO(whole)) as old:
        counts = old["counts"].copy()
    counts[0, 0] += 1
    refused("do not add up", counts=counts)
    saved.write_bytes(whole)
    monkeypatch.setattr(tables, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(InputError, match="more than 1,000 bytes unpacked"):
        load_table(saved)
    monkeypatch.setattr(tables, "MAX_FILE_BYTES", 1000)
    with pytest.raises(InputError, match=r"damaged one: .* bytes"):
        load_table(saved)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_table(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not a calibration table"):
        load_table(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as file:
        for name in ("header.npy", "counts.npy", "thumbnails.npy"):
            file.writestr(name, b"not an array")
    with pytest.raises(InputError, match="not a calibration table"):
        load_table(tmp_path / "twice.npz")


def test_a_place_that_cannot_be_written_is_one_error(table: CalibrationTable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        save_table(tmp_path / "file" / "t.npz", table)
