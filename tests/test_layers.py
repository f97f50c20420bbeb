"""The arrows between the packages, and what the runtime may need: read from the source, and tried in a bare process.

    mammut_export → mammut, mammut_calibration, mammut_runtime
    mammut → mammut_runtime     mammut_calibration → mammut_runtime     mammut_runtime → none of ours, no torch

Each check is also shown to fail on a package that breaks the rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "mammut": ROOT / "mammut",
    "mammut_calibration": ROOT / "calibration" / "mammut_calibration",
    "mammut_export": ROOT / "export" / "mammut_export",
    "mammut_runtime": ROOT / "runtime" / "mammut_runtime",
}
ARROWS: dict[str, set[str]] = {
    "mammut_runtime": set(),
    "mammut_calibration": {"mammut_runtime"},
    "mammut": {"mammut_runtime"},
    "mammut_export": {"mammut", "mammut_calibration", "mammut_runtime"},
}
RUNTIME_MAY_IMPORT = {"numpy", "cv2", "tokenizers", "ftfy", "click"}
"""Import names of the base dependencies in pyproject.toml."""
ENGINES = {
    "engines/onnxruntime.py": "onnxruntime",
    "engines/openvino.py": "openvino",
    "video/cluster.py": "ray",
}
"""The only files that may name an engine's library, or a cluster's."""


def imported(source: str) -> Iterator[str]:
    """First names of everything a source file imports: statements, and importlib or __import__ with a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value.split(".")[0]


def broken_arrows(package: str, folder: Path) -> list[str]:
    """Imports of our own packages that the arrows do not allow."""
    allowed = ARROWS[package] | {package}
    return [
        f"{path.relative_to(folder)} imports {name}"
        for path in sorted(folder.rglob("*.py"))
        for name in sorted(set(imported(path.read_text("utf-8"))))
        if name in ARROWS and name not in allowed
    ]


def foreign_imports(folder: Path) -> list[str]:
    """Imports of the runtime that are not the standard library, a base dependency or, in its file, an engine."""
    problems = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        allowed = {*sys.stdlib_module_names, *RUNTIME_MAY_IMPORT, "mammut_runtime", ENGINES.get(name, "")}
        problems += [f"{name} imports {each}" for each in sorted(set(imported(path.read_text("utf-8"))) - allowed)]
    return problems


IMPORT_ALL = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name not in {without!r}:
        importlib.import_module(module.name)
print(*sorted(sys.modules))
"""


def import_all(
    package: str, blocked: set[str], without: set[str], path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Import every module of a package in a new process where `blocked` cannot be imported."""
    code = IMPORT_ALL.format(package=package, blocked=blocked, without=without)
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}" if path else code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def a_package(folder: Path, source: str) -> Path:
    package = folder / "mammut_runtime"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").touch()
    (package / "inner" / "module.py").write_text(source)
    return package


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_the_arrows_hold(package: str) -> None:
    assert list(FOLDERS[package].rglob("*.py")), f"{FOLDERS[package]} holds no Python files"
    assert broken_arrows(package, FOLDERS[package]) == []


@pytest.mark.parametrize(
    "line",
    [
        "import mammut",
        "import mammut.model as m",
        "def f():\n    from mammut.config import MammutConfig",
        "if False:\n    import os, mammut_export.parity",
        "import importlib\nimportlib.import_module('mammut.model')",
        "__import__('mammut')",
    ],
)
def test_a_broken_arrow_is_found(tmp_path: Path, line: str) -> None:
    folder = a_package(tmp_path, line)
    assert len(broken_arrows("mammut_runtime", folder)) == 1
    (folder / "inner" / "module.py").write_text("from mammut_runtime.errors import InputError")  # control
    assert broken_arrows("mammut_runtime", folder) == []


def test_the_runtime_needs_only_its_dependencies(tmp_path: Path) -> None:
    assert foreign_imports(FOLDERS["mammut_runtime"]) == []
    broken = a_package(tmp_path, "import torch\nimport onnxruntime\nimport numpy, json")
    assert foreign_imports(broken) == ["inner/module.py imports onnxruntime", "inner/module.py imports torch"]


def test_the_list_of_dependencies_is_the_one_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {line.split(">")[0].split("=")[0].strip() for line in project["dependencies"]}
    assert {"opencv-python-headless" if name == "cv2" else name for name in RUNTIME_MAY_IMPORT} == names


BLOCKED = {
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "ray",
    "safetensors",
    "PIL",
    "mammut",
    "mammut_export",
    "mammut_calibration",
}
ENGINE_MODULES = {"mammut_runtime." + name.removesuffix(".py").replace("/", ".") for name in ENGINES}


def test_the_runtime_is_imported_without_torch_and_without_an_engine() -> None:
    done = import_all("mammut_runtime", BLOCKED, ENGINE_MODULES)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "mammut_runtime.errors" in loaded and not BLOCKED & {name.split(".")[0] for name in loaded}


def test_importing_torch_in_the_runtime_is_found(tmp_path: Path) -> None:
    a_package(tmp_path, "import torch")
    done = import_all("mammut_runtime", BLOCKED, set(), tmp_path)
    assert done.returncode != 0 and "blocked: torch" in done.stderr
    control = import_all("mammut_runtime", {"onnx"}, {"mammut_runtime.inner.module"}, tmp_path)
    assert control.returncode == 0, control.stderr
