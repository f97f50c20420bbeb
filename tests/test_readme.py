"""README is run: its Python, its mammut-run lines, its option tables and its file tree are held against the code."""

from __future__ import annotations

import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import cv2
import pytest

import mammut.commands
import mammut.evaluation.commands
import mammut_calibration.commands
import mammut_export.commands
from mammut_runtime import commands
from mammut_runtime.canary import canary_picture

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TINY_BUNDLE = ROOT / "tests" / "data" / "tiny-bundle"
COMMANDS: dict[str, click.Command] = {
    "mammut-run": commands.cli,
    "mammut-export": mammut_export.commands.cli,
    "mammut-train": mammut.commands.cli,
    "mammut-eval": mammut.evaluation.commands.cli,
    "mammut-calibrate": mammut_calibration.commands.cli,
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one README's examples are run in: bundle, photo.jpg, photos/."""
    (tmp_path / "bundle").symlink_to(TINY_BUNDLE)
    (tmp_path / "detector-bundle").symlink_to(TINY_BUNDLE.with_name("tiny-detector-bundle"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "my-photos").mkdir()
    for name in ("photo.jpg", "photos/a.png", "photos/b.png"):
        whole, data = cv2.imencode(Path(name).suffix, canary_picture(len(name), (60, 80)))
        assert whole
        (tmp_path / name).write_bytes(data.tobytes())
    (tmp_path / "notes.txt").write_text("no picture")
    clip = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (80, 60))
    for number in range(10):
        clip.write(canary_picture(number // 5, (60, 80)))
    clip.release()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMMUT_BUNDLE", str(tmp_path / "bundle"))
    return tmp_path


def test_the_python_examples_run_in_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks("python")
    assert len(examples) >= 4
    namespace: dict[str, object] = {}
    for number, example in enumerate(examples):
        exec(compile(example, f"README.md, Python block {number}", "exec"), namespace)
    out = capsys.readouterr().out
    assert "expected a PNG, JPEG, WebP or BMP" in out and "Match(" in out


def test_the_mammut_run_lines_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for line in shell_lines() if "mammut-run" in line]
    assert len(lines) >= 8
    for line in lines:
        before, _, arguments = line.rpartition("mammut-run ")
        if before:
            assert before == "find photos -name '*.png' | ", f"this test cannot run {line!r}"
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"photos/a.png\nphotos/b.png\n")))
        detects = arguments.startswith(("detect", "vocabulary"))
        monkeypatch.setenv("MAMMUT_BUNDLE", str(place / ("detector-bundle" if detects else "bundle")))
        assert commands.main(shlex.split(arguments)) == 0, f"{line}: {capsys.readouterr().err}"
        assert capsys.readouterr().out


def test_every_other_shell_line_names_what_exists(place: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line in shell_lines():
        words = shlex.split(line)
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, line
        elif words[:2] == ["pip", "install"]:
            (extras,) = re.findall(r"\.\[(.*)\]", line)
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), line
        elif words[0] in COMMANDS and words[0] != "mammut-run":
            parse(COMMANDS[words[0]], words)
        else:
            assert "mammut-run" in words, f"this test does not know {line!r}"


def parse(command: click.Command, words: list[str]) -> None:
    """Let click read the arguments as it would, without running anything."""
    context = command.make_context(words[0], words[1:])
    if isinstance(command, click.Group):
        name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert sub is not None
        sub.make_context(name, rest, parent=context)


def options_of(command: click.Command) -> set[str]:
    return {each for option in command.params if isinstance(option, click.Option) for each in option.opts}


def leaf_commands(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from leaf_commands(each, f"{name} {each.name}".strip())
    else:
        yield name, command


def test_the_table_of_commands_has_every_command_and_option() -> None:
    rows = re.findall(r"^\| `([a-z -]+?)(?: [A-Z\[][^`]*)?` \| [^|]* \| (.*) \|$", README, re.MULTILINE)
    named = {name: set(re.findall(r"`(--?[a-z-]+)`", options)) for name, options in rows}
    sentence = README[README.index("All but `doctor`, `build`, ") :].split(";")[0].partition("also take")[2]
    common = set(re.findall(r"`(--[a-z-]+)", sentence))
    assert {"--bundle", "--threads", "--provider"} <= common
    for name, command in leaf_commands(commands.cli):
        alone = name in ("doctor", "build", "vocabulary combine", "vocabulary show")
        expected = options_of(command) - (set() if alone else common)
        assert named.pop(name) == expected, f"README's row of {name!r} has other options than the command"
        assert alone or common <= options_of(command)
    assert not named, f"README has commands that do not exist: {named}"


def test_the_table_of_export_options_is_complete() -> None:
    section = README[README.index("## From a checkpoint to a bundle") : README.index("## Training")]
    named = set(re.findall(r"^\| `(--[a-z-]+)` \|", section, re.MULTILINE))
    assert named == {each for each in options_of(COMMANDS["mammut-export"]) if each.startswith("--")}


def test_options_in_running_text_exist() -> None:
    known = {"--help", "--version"}
    for each in COMMANDS.values():
        known |= {option for _, command in leaf_commands(each) for option in options_of(command)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def tree_in(text: str) -> set[str]:
    """Paths that a file tree names; a folder's name ends in /."""
    paths, folders = set(), [""]
    for line in text.splitlines():
        found = re.match(r"^( *)([\w.-]+/?)(  |$)", line)
        if not found:
            continue
        depth = len(found[1]) // 2
        path = "/".join([*filter(None, folders[1 : depth + 1]), found[2].rstrip("/")])
        folders = [*folders[: depth + 1], path.rsplit("/", 1)[-1]]
        paths.add(path + "/" * found[2].endswith("/"))
    return paths


LISTED = ("mammut", "export", "calibration", "runtime", "benchmarks", "docs")
"""Folders whose every file has a line."""


def files_in_repository() -> Iterator[str]:
    for folder in LISTED:
        for path in sorted((ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and path.name not in ("__init__.py", "py.typed"):
                yield relative


def test_the_file_tree_is_that_of_the_repository() -> None:
    tree = tree_in(README.split("<!-- file tree -->")[1].split("<!-- end of file tree -->")[0])
    for path in tree:
        assert (ROOT / path).exists(), f"README's file tree names {path}, which is not there"
    whole = tuple(path for path in tree if path[-1] == "/" and sum(each.startswith(path) for each in tree) == 1)
    missing = [path for path in files_in_repository() if path not in tree and not path.startswith(whole)]
    assert not missing, f"README's file tree lacks {missing}"
    top = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert top <= tree, f"README's file tree lacks {top - tree}"


def test_trees_and_blocks_are_found() -> None:
    text = "```text\nfolder/     what\n  a.py      what\n  inner/\n    b.py    what\nc.md        what\n```\n"
    assert tree_in(text) == {"folder/", "folder/a.py", "folder/inner/", "folder/inner/b.py", "c.md"}
    assert blocks("sh", "x\n```sh\none\ntwo\n```\n```python\nno\n```\n") == ["one\ntwo\n"]


def test_every_benchmark_and_document_that_is_named_exists() -> None:
    for path in re.findall(r"`((?:docs|benchmarks|runtime|mammut|tests)/[\w./-]+\.(?:md|py))`", README):
        assert (ROOT / path).is_file(), path
