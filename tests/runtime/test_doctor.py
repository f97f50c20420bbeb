from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_runtime import doctor
from mammut_runtime.engines.fake import FakeEngine


@pytest.fixture
def fakes(toy_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every bundle's graphs are the toy's functions."""
    names = {"vision": "_vision", "text": "_text", "memory": "_memory"}

    def open_engine(path: Path, *_: object) -> FakeEngine:
        owner, name = (toy_bundle, names[path.stem]) if path.stem in names else (toy_bundle.toy, "_run")
        return FakeEngine(lambda feeds: getattr(owner, name)(feeds))

    monkeypatch.setattr("mammut_runtime.model.open_engine", open_engine)
    return toy_bundle


def test_the_machine_is_described() -> None:
    machine = doctor.examine_machine()
    assert 1 <= machine.physical_cores <= machine.logical_cores
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    if sys.platform == "linux":
        assert machine.memory_bytes is not None and machine.memory_bytes > (machine.memory_available_bytes or 0) > 0


def test_versions_are_those_that_are_imported() -> None:
    report = doctor.examine()
    assert {each.name: each.version for each in report.libraries}["numpy"] == np.__version__
    assert report.exit_code == 0 and report.bundles == ()
    assert json.loads(json.dumps(report.to_dict()))["engines"][0]["name"] == "onnxruntime"
    assert "bundle       none found" in doctor.describe(report)


def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)  # importing it raises ImportError
    report = doctor.examine()
    assert [each.name for each in report.libraries if each.problem] == ["ftfy"] and report.exit_code == 2
    assert any("ftfy" in line and "cannot be used" in line for line in doctor.describe(report))


def test_a_missing_engine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    one = doctor.EngineReport("openvino", "1", ("CPU",), None)
    monkeypatch.setattr(doctor, "_openvino", lambda: one)
    monkeypatch.setattr(doctor, "_tensorrt", lambda: doctor.EngineReport("tensorrt", None, (), "not installed"))
    report = doctor.examine()
    assert report.exit_code == 0 and "pip install" in (report.engines[0].problem or "")
    none = doctor.EngineReport("openvino", None, (), "does not load")
    monkeypatch.setattr(doctor, "_openvino", lambda: none)
    assert doctor.examine().exit_code == 2


def test_bundles_are_good_different_or_damaged(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = doctor.examine_bundle(fakes.folder)
    assert good.ok and good.exit_code == 0 and good.name == "toy" and (good.size_bytes or 0) > 0
    text = fakes._text
    monkeypatch.setattr(fakes, "_text", lambda feeds: {"embedding": text(feeds)["embedding"][:, ::-1]})
    different = doctor.examine_bundle(fakes.folder)
    assert not different.ok and different.exit_code == 1 and "canary differs" in (different.canary or "")
    (fakes.folder / "manifest.json").write_text("{}")
    damaged = doctor.examine_bundle(fakes.folder)
    assert not damaged.ok and damaged.exit_code == 2 and damaged.name is None and damaged.problem
    both = doctor.Report("1", doctor.examine_machine(), (), (), (good, different))
    assert both.exit_code == 1
    assert doctor.Report("1", doctor.examine_machine(), (), (), (different, damaged)).exit_code == 2


def test_bundles_are_found_in_folders(fakes: Any, tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "missing"
    found = doctor.find_bundles([fakes.folder, tmp_path, missing])
    assert found == [fakes.folder, missing], "once, without hidden and empty folders; a missing one is for the report"
    assert doctor.examine_bundle(missing).exit_code == 2


def test_peak_memory_grows_with_what_is_held() -> None:
    before = doctor.peak_memory_bytes()
    block = np.ones(80_000_000, np.uint8)
    after = doctor.peak_memory_bytes()
    if before is None or after is None:
        pytest.skip("this system does not say how much memory was held")
    assert 10_000_000 < before <= after < 2**40 and after >= block.nbytes
