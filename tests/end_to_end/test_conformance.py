"""The conformance kit, reference numbers of the public openMaMMUT code, through PyTorch and through bundles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
KIT = TESTS.parent.parent / "shared" / "conformance" / "check.py"


@pytest.mark.shared
@pytest.mark.skipif(not KIT.exists(), reason="../shared/conformance is not part of a clone")
def test_kit_passes(tmp_path: Path) -> None:
    """Through PyTorch, and through bundles on two engines; the bundles are made once for both."""
    for mode in ("torch", "bundle", "openvino"):
        environment = os.environ | {
            "MAMMUT_ADAPTER": mode, "OMP_NUM_THREADS": "1", "MAMMUT_ADAPTER_BUNDLES": str(tmp_path),
        }  # fmt: skip
        command = [sys.executable, str(KIT), "--adapter", str(TESTS / "conformance_adapter.py")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550, check=False)
        assert done.returncode == 0, f"{mode}: {done.stdout}{done.stderr}"
        summary = re.search(r"(\d+) of (\d+) checks passed, 0 failed, 0 skipped", done.stdout)
        assert summary is not None and summary[1] == summary[2] and int(summary[1]) > 100, f"{mode}: {done.stdout}"
