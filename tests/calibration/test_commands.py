from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mammut_calibration import commands
from mammut_calibration.data import open_dataset
from mammut_calibration.table import load_table
from mammut_runtime import console
from mammut_runtime.bundle import Bundle

QUICK = ["--threads", "1", "--max-tokens", "2"]


@pytest.fixture
def pictures(make: Any, tmp_path: Path) -> Path:
    folder: Path = make.folder(tmp_path / "pictures", 24)
    return folder


def run(*arguments: object) -> int:
    return console.run(commands.cli, [str(each) for each in arguments])


def test_a_calibration_leaves_a_table_and_a_page(
    tiny: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.npz"
    assert run(tiny.path, pictures, "--out", out, *QUICK) == 0
    shown = capsys.readouterr().out
    assert "18 different pictures (0 repeated, 0 of one colour and 0 damaged left out)" in shown
    table = load_table(out)
    table.check_fits(tiny)
    assert table.header.data_hash == open_dataset([pictures]).split()[0].content_hash
    assert "<svg" in (tmp_path / "t.html").read_text() and not (tmp_path / "t.npz.part").exists()
    assert run(tiny.path, pictures, "--out", out, *QUICK) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(tiny.path, pictures, "--out", out, "--overwrite", "--held-out", 0, "--json", *QUICK) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["pictures"] == 24 and row["graphs"]["vision"]["pixels"]["ranges"]["minmax"]["high"] > 0


def test_what_cannot_be_used_ends_with_one_line(
    tiny: Bundle, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no pictures here")
    out = tmp_path / "t.npz"
    for arguments, message in (
        ((tiny.path, tmp_path / "notes.txt"), "expected a folder or a file that ends in"),
        ((tiny.path, tmp_path / "nothing"), "no such file or folder"),
        ((tiny.path, pictures, "--held-out", "0.9"), "the data hold only 2 different pictures"),
        ((tiny.path, pictures, "--held-out", "1.5"), "held_out: expected a share"),
        ((tiny.path,), "Missing argument"),
        ((tiny.path, pictures, "--scope", "some"), "Invalid value for '--scope'"),
    ):
        assert run(*arguments, "--out", out, *QUICK) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_checkpoint_is_exported_first_by_the_exporters_own_command(
    tiny: Bundle, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exporter itself is stood in for: it takes half a minute, and has its own tests."""
    program = tmp_path / "bin" / "mammut-export"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1" = "good" ] || exit 2\ncp -r "{tiny.path}" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setattr(commands.sys, "executable", str(program.parent / "python"))
    out = tmp_path / "t.npz"
    assert run("good", pictures, "--out", out, *QUICK) == 0
    assert "good: is no bundle; exporting it in fp32 first" in capsys.readouterr().err
    load_table(out).check_fits(tiny)
    assert run("bad", pictures, "--out", tmp_path / "u.npz", *QUICK) == 2
    assert "bad: mammut-export failed with exit code 2; expected a bundle or a checkpoint" in capsys.readouterr().err
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("good", pictures, "--out", tmp_path / "u.npz", *QUICK) == 2
    assert "pip install mammut-edge[export]" in capsys.readouterr().err


IMPORTS = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "mammut", "mammut_export", "onnx", "onnxruntime"):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
import mammut_calibration
for module in pkgutil.iter_modules(mammut_calibration.__path__):
    importlib.import_module("mammut_calibration." + module.name)
from pathlib import Path
from mammut_calibration.activations import read_graph
try:
    read_graph(Path("x.onnx"))
except Exception as problem:
    print(type(problem).__name__, problem)
"""


def test_a_missing_library_names_its_extra_and_nothing_is_imported_before_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("EngineError this needs the onnx library") and "mammut-edge[calibrate]" in done.stdout
