"""Size on disk and import time of what a device installs, measured in a fresh environment.

    python benchmarks/bench_install.py

Installs `.[onnxruntime]` into a temporary virtual environment with the pinned versions, fails if torch came along, and
measures the import of the runtime with its engine in new processes. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
REPEATS = 9
IMPORT = "import mammut_runtime.model, onnxruntime"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        python = next(environment.glob("bin/python")) if sys.platform != "win32" else environment / "Scripts/python.exe"
        packages = next(environment.rglob("site-packages"))
        there_before = set(packages.iterdir())
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt"),
             f"{ROOT}[onnxruntime]"],
            check=True,
        )  # fmt: skip
        new = [each for each in packages.iterdir() if each not in there_before]
        installed = sum(map(size_bytes, new))
        if (packages / "torch").exists():
            raise SystemExit("error: torch was installed; the runtime must not need it")
        largest = sorted(((size_bytes(each), each.name) for each in new), reverse=True)
        subprocess.run([python, "-c", IMPORT], check=True)  # compiles
        bare = median(seconds([str(python), "-c", "pass"]) for _ in range(REPEATS))
        whole = median(seconds([str(python), "-c", IMPORT]) for _ in range(REPEATS))
    print(f"installed: {installed / 1e6:.0f} MB, without pip and compiled files; no torch")
    print("largest:   " + ", ".join(f"{name} {size / 1e6:.0f} MB" for size, name in largest[:6]))
    print(f"import:    {(whole - bare) * 1000:.0f} ms ({IMPORT}), Python itself {bare * 1000:.0f} ms, files in cache")
    result = {"installed_mb": installed / 1e6, "import_ms": (whole - bare) * 1000, "python_ms": bare * 1000}
    print(json.dumps({"benchmark": "install", **result, "repeats": REPEATS}))


def size_bytes(folder: Path) -> int:
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(each.stat().st_size for each in files if each.is_file() and not each.is_symlink())


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
