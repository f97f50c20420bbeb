"""Opening a bundle: everything that was changed in the folder is refused. Publishing one: whole, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mammut_runtime import bundle as bundle_module
from mammut_runtime.bundle import (
    Bundle,
    Canary,
    Manifest,
    ModelInfo,
    ParityInfo,
    TextRule,
    graph_contract,
    hash_files,
    publish,
    write_manifest,
)
from mammut_runtime.errors import BundleError, InputError, MammutError
from mammut_runtime.preprocess import PreprocessRule

WEIGHTS = bytes(range(256)) * 16


def graph_bytes(location: str = "weights.bin", length: int = 400) -> bytes:
    """The smallest ONNX file that takes a tensor from another file."""

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    pairs = (("location", location), ("offset", "0"), ("length", str(length)))
    entries = b"".join(field(13, field(1, key.encode()) + field(2, value.encode())) for key, value in pairs)
    return field(7, field(5, entries))


def fill(folder: Path, name: str = "tiny", graph: bytes | None = None) -> Manifest:
    """Write a small bundle with all four graphs into an empty folder."""
    model = ModelInfo(name, 4, 6, 3, 8, 2, 1, 2, 64, 1234, 10.0, -5.0, "sigmoid")
    rule = PreprocessRule(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", "shortest", 0)
    graphs = graph_contract(model, rule.size)
    for info in graphs.values():
        (folder / info.file).write_bytes(graph or graph_bytes())
    (folder / "weights.bin").write_bytes(WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")
    manifest = Manifest(
        target="onnxruntime",
        precision="fp32",
        opset=21,
        made_by={"checkpoint": "tiny"},
        model=model,
        preprocess=rule,
        text=TextRule(24, 20, 24, 0, 62, 63, False, {"caption": "", "ask": "{question}", "zero_shot": "{}"}),
        graphs=graphs,
        parity={"vision.embedding": ParityInfo(1e-6, 1e-4)},
        quantization={},
        files=hash_files(folder),
        canary=Canary(7, (62, 63, *[0] * 22), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (5,), 1e-3),
    )
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "bundle"
    result.mkdir()
    fill(result)
    return result


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_open(folder: Path, verify: bool) -> None:
    bundle = Bundle.open(folder, verify)
    assert bundle.path == folder.resolve() and bundle.verified == verify
    assert bundle.graph_path("decoder") == folder.resolve() / "decoder.onnx"
    assert bundle.read("tokenizer.json") == b"{}"
    assert bundle.content_hash == Bundle.open(str(folder)).content_hash
    assert len(bundle.content_hash) == 64


def test_another_manifest_has_another_hash(folder: Path) -> None:
    before = Bundle.open(folder)
    write_manifest(folder, dataclasses.replace(before.manifest, made_by={"checkpoint": "other"}))
    assert Bundle.open(folder).content_hash != before.content_hash


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    """`current -> version-3` is how devices are updated."""
    (tmp_path / "current").symlink_to(folder, target_is_directory=True)
    assert Bundle.open(tmp_path / "current").path == folder.resolve()


def _flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1  # in a graph: 400 bytes of weights become 401, still a graph
    (folder / name).write_bytes(data)


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def _symlink(folder: Path, name: str) -> None:
    real = shutil.move(folder / name, folder.parent / f"real-{name}")
    (folder / name).symlink_to(real)


def _hard_link(folder: Path, name: str) -> None:
    os.link(folder / name, folder.parent / f"second-{name}")


def _as_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def _as_pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


ALL = ("weights.bin", "vision.onnx", "tokenizer.json", "manifest.json")
DAMAGE: list[tuple[Callable[[Path, str], None], tuple[str, ...], str]] = [
    (_flip, ALL[:3], r"{name}: sha256 [0-9a-f]{{12}}\.\.\., expected [0-9a-f]{{12}}\.\.\.; the file was changed"),
    (_cut, ALL[:3], r"{name}: [\d,]+ bytes, expected [\d,]+; the file is cut off or was changed"),
    (_empty, ALL[:3], r"{name}: 0 bytes, expected"),
    (lambda folder, name: (folder / name).unlink(), ALL[:3], "the file '{name}' is missing; copy or export"),
    (_symlink, ALL, "{name}: is a symbolic link; a bundle holds plain files only"),
    (_hard_link, ALL, r"{name}: is a hard link \(the file has 2 names\)"),
    (_as_folder, ALL, "{name}: is not a plain file"),
    (_as_pipe, ALL, "{name}: is not a plain file"),
    (lambda folder, name: (folder / name).unlink(), ALL[3:], "no manifest.json; expected a bundle's folder"),
    (_empty, ALL[3:], "manifest.json: not readable as JSON"),
]


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [(damage, name, message.format(name=name)) for damage, names, message in DAMAGE for name in names],
)
def test_damage(folder: Path, damage: Callable[[Path, str], None], name: str, message: str) -> None:
    Bundle.open(folder)  # control
    damage(folder, name)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)
    if damage is _flip:
        Bundle.open(folder, verify=False)  # hashes, and nothing else, are left out
    else:
        with pytest.raises(BundleError, match=message):
            Bundle.open(folder, verify=False)


@pytest.mark.parametrize("extra", ["extra.bin", ".hidden", "weights.bin.bak", "Manifest.json", "model.onnx"])
def test_extra_files(folder: Path, extra: str) -> None:
    (folder / extra).write_text("x")
    with pytest.raises(BundleError, match=f"'{extra}' is not in manifest.json, expected no other file; remove it"):
        Bundle.open(folder, verify=False)


def test_extra_folder(folder: Path) -> None:
    (folder / "cache").mkdir()
    with pytest.raises(BundleError, match="cache: is not a plain file"):
        Bundle.open(folder)


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=7), r"manifest.json: the bundle has format 7; this runtime reads format 1"),
        (lambda d: d["graphs"]["vision"].update(foo=1), r"manifest.json: graphs.vision: unknown key 'foo'"),
        (lambda d: d["files"].update({"../a.bin": d["files"]["weights.bin"]}), "files: expected a plain file name"),
        (lambda d: d["files"].update({"/etc/passwd": d["files"]["weights.bin"]}), "files: expected a plain file name"),
        (lambda d: d["files"].pop("weights.bin"), "'weights.bin' is not in manifest.json"),
        (lambda d: d["files"]["weights.bin"].update(sha256="0" * 64), "weights.bin: sha256 .*, expected 000000000000"),
    ],
)
def test_an_edited_manifest(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    _edit(folder, lambda data: None)
    Bundle.open(folder)  # control: written again without a change
    _edit(folder, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (graph_bytes("../../etc/passwd"), "text.onnx: takes data from the file '../../etc/passwd'"),
        (graph_bytes("tokenizer.json", 1), "takes data from the file 'tokenizer.json', expected 'weights.bin'"),
        (graph_bytes(length=5000), "takes bytes 0 to 5,000 from 'weights.bin', which has 4,096"),
        (b"not onnx", "text.onnx: not a readable ONNX file"),
    ],
)
def test_a_bundle_made_to_read_other_files(tmp_path: Path, graph: bytes, message: str, verify: bool) -> None:
    """Names, hashes and manifest are all in order; only what the graph says is not."""
    fill(tmp_path, graph=graph_bytes(length=4096))
    Bundle.open(tmp_path, verify)  # control
    (tmp_path / "text.onnx").write_bytes(graph)
    _edit(tmp_path, lambda data: data["files"].update(
        {name: dataclasses.asdict(info) for name, info in hash_files(tmp_path).items()}))  # fmt: skip
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path, verify)


@pytest.mark.parametrize(("path", "message"), [
    ("missing", "missing: cannot be opened as a bundle: No such file"),
    ("bundle/manifest.json", "expected a folder, the bundle"),
    ("loop", "loop: cannot be opened as a bundle"),
    ("nul\0", "cannot be opened as a bundle"),
    (".", "bundle: is not a plain file"),
])  # fmt: skip
def test_paths_that_are_no_bundle(folder: Path, path: str, message: str) -> None:
    (folder.parent / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder.parent / path)


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(10**9)
    with pytest.raises(BundleError, match=r"manifest.json: 1,000,000,000 bytes, expected at most 4,000,000"):
        Bundle.open(folder)


def test_a_huge_graph_is_not_read(folder: Path) -> None:
    os.truncate(folder / "text.onnx", 10**9)
    _edit(folder, lambda data: data["files"]["text.onnx"].update(size_bytes=10**9))
    with pytest.raises(BundleError, match=r"text.onnx: 1,000,000,000 bytes, expected at most 64,000,000"):
        Bundle.open(folder)


def test_names_that_are_not_there(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match="no graph 'detector', only vision, text, memory, decoder"):
        bundle.graph_path("detector")
    for name in ("../secret", "manifest.json", "report.html"):
        with pytest.raises(BundleError, match=f"no file '{name}' in manifest.json"):
            bundle.read(name)


@pytest.mark.parametrize("name", ["vision.onnx", "weights.bin"])
def test_a_file_exchanged_after_opening(folder: Path, name: str) -> None:
    bundle = Bundle.open(folder)
    bundle.graph_path("vision")  # control
    copy = folder.parent / "copy"
    shutil.copy2(folder / name, copy)
    copy.replace(folder / name)  # same bytes, same times, another file
    with pytest.raises(BundleError, match=f"{name}: changed or replaced since the bundle was opened; open the bundle"):
        bundle.graph_path("vision")


def test_a_read_is_checked_again(folder: Path) -> None:
    verified, trusting = Bundle.open(folder), Bundle.open(folder, verify=False)
    (folder / "tokenizer.json").write_text("[]")
    assert trusting.read("tokenizer.json") == b"[]"
    with pytest.raises(BundleError, match=r"tokenizer.json: sha256 .* the file was changed"):
        verified.read("tokenizer.json")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer.json: cannot be read: No such file"):
        trusting.read("tokenizer.json")


def test_what_a_reader_refuses_is_not_written(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=r"manifest.json: opset: expected a number from 18"):
        write_manifest(folder, dataclasses.replace(manifest, opset=3))
    assert (folder / "manifest.json").read_bytes() == before


# --- publishing -------------------------------------------------------------------------------------------------------


def _snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def _model_name(path: Path) -> str:
    return Bundle.open(path).manifest.model.name


def test_publish_makes_parents_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "bundle"
    with publish(out) as folder:
        assert folder.parent == out.parent and not out.exists()
        fill(folder)
    assert Bundle.open(out).manifest.model.name == "tiny"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777  # not the 0700 of a temporary folder


def test_publish_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with publish(out) as folder:
        fill(folder, "old")
    with pytest.raises(InputError, match="bundle: exists already; give another name, or --overwrite"), publish(out):
        raise AssertionError("must not begin")
    with publish(out, overwrite=True) as folder:
        fill(folder, "new")
        assert _model_name(out) == "old"
    assert _model_name(out) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_empty_folder_and_an_old_format_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    with publish(out, overwrite=True) as folder:
        fill(folder)
    _edit(out, lambda data: data.update(format=0, more=1))
    with publish(out, overwrite=True) as folder:
        fill(folder, "new")
    assert _model_name(out) == "new"


def _home(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")


def _note_inside(out: Path) -> None:
    _whole(out)
    (out / "notes.txt").write_text("mine")


def _folder_inside(out: Path) -> None:
    _whole(out)
    (out / "photos").mkdir()


def _web_extension(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"manifest_version": 3, "name": "x"}')


def _whole(out: Path) -> None:
    out.mkdir()
    fill(out)


def _link(out: Path) -> None:
    _whole(out.with_name("real"))
    out.symlink_to(out.with_name("real"), target_is_directory=True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_home, r"is not a bundle \(it has no manifest.json\), so --overwrite leaves it"),
        (_note_inside, "holds 'notes.txt', which is not part of the bundle, so --overwrite leaves it"),
        (_folder_inside, r"is not a bundle \(.*photos: is not a plain file"),
        (_web_extension, r"is not a bundle \(its manifest.json has no format and files\)"),
        (_link, "is not a folder of its own"),
        (lambda out: out.write_text("a file"), "is not a folder of its own"),
    ],
)
def test_overwrite_never_deletes_what_is_not_a_bundle(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(tmp_path / "out")
    before = _snapshot(tmp_path)
    with pytest.raises(InputError, match=message), publish(tmp_path / "out", overwrite=True):
        raise AssertionError("must not begin")
    assert _snapshot(tmp_path) == before


def test_what_came_in_between_is_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists already"), publish(out) as folder:
        fill(folder)
        _home(out)
    assert (out / "thesis.txt").read_text() == "all of it"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(1), BundleError("no parity")])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, old: bool, error: BaseException) -> None:
    out = tmp_path / "deep" / "bundle"
    if old:
        with publish(out) as folder:
            fill(folder, "old")
    before = _snapshot(tmp_path)
    assert bool(before) == old  # so without an old bundle its parent folder goes away again too
    with pytest.raises(type(error)), publish(out, overwrite=True) as folder:
        fill(folder, "new")
        (folder / "sub").mkdir()
        raise error
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize(("step", "left"), [(0, "old"), (1, "new"), (2, "new"), (3, "new")])
def test_an_interruption_between_the_renames(
    tmp_path: Path, step: int, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged in one step: Ctrl-C after the old bundle went aside (0), after the new one took
    its place (1), after the old one was made ready to be removed (2), and never (3, control)."""
    out = tmp_path / "bundle"
    with publish(out) as folder:
        fill(folder, "old")
    real, calls = Path.rename, iter(range(99))

    def rename(self: Path, target: Path) -> Path:
        result = real(self, target)
        if next(calls) == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(bundle_module, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    expected = pytest.raises(KeyboardInterrupt) if step < 3 else contextlib.nullcontext()
    with expected, publish(out, overwrite=True) as folder:
        fill(folder, "new")
    assert _model_name(out) == left
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_around_the_exchange(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    with publish(out) as folder:
        fill(folder, "old")
    real = bundle_module._exchanged

    def exchanged(one: Path, other: Path) -> bool:
        if moment == "after" and not real(one, other):
            pytest.skip("this file system cannot exchange names")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "_exchanged", exchanged)
    with pytest.raises(KeyboardInterrupt), publish(out, overwrite=True) as folder:
        fill(folder, "new")
    assert _model_name(out) == {"before": "old", "after": "new"}[moment]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(InputError, match="nothing was published, make room first"), publish(tmp_path / "x"):
        full()
    monkeypatch.setattr(bundle_module.os, "fsync", full)
    with pytest.raises(InputError, match="nothing was published, make room first"), publish(tmp_path / "x") as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_block_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish(tmp_path / "x"):
        (tmp_path / "nothing").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No space left on device; nothing was published"), publish(tmp_path / "x"):
        Path("/dev/full").write_bytes(b"x")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = r"file/bundle: cannot be written: .*; give another place"
    with pytest.raises(InputError, match=message), publish(tmp_path / "file" / "bundle"):
        raise AssertionError("must not begin")
    for nowhere in ("/", str(tmp_path)):
        with pytest.raises(InputError, match="exists already"), publish(nowhere):
            raise AssertionError("must not begin")


def test_a_bundle_that_is_not_whole_is_not_published(tmp_path: Path) -> None:
    for spoil, message in ((_cut, "cut off"), (_flip, "sha256"), (_symlink, "symbolic link")):
        with pytest.raises(BundleError, match=message), publish(tmp_path / "inner" / "x") as folder:
            fill(folder)
            spoil(folder, "weights.bin")
        assert not (tmp_path / "inner" / "x").exists()
        shutil.rmtree(tmp_path / "inner", ignore_errors=True)
    with pytest.raises(BundleError, match=r"no manifest.json"), publish(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_old_bundle_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    with publish(out) as folder:
        fill(folder, "old")

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(bundle_module.shutil, "rmtree", refuse)
    message = r"the new bundle is published, but .* remove .*\.bundle\..*\.new yourself"
    with pytest.raises(InputError, match=message), publish(out, overwrite=True) as folder:
        fill(folder, "new")
    assert _model_name(out) == "new"


# --- while others read ------------------------------------------------------------------------------------------------


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[tuple[Path, list[BaseException]]]:
    """A thread that publishes over one bundle again and again, and what went wrong in it."""
    out, stop, errors = tmp_path / "bundle", threading.Event(), []
    with publish(out) as folder:
        fill(folder, "model-0")

    def run() -> None:
        number = 1
        try:
            while not stop.is_set():
                with publish(out, overwrite=True) as folder:
                    fill(folder, f"model-{number}")
                number += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield out, errors
    stop.set()
    thread.join()
    assert not errors


def test_reading_while_another_publishes(publisher: tuple[Path, list[BaseException]]) -> None:
    """Each opening gives one whole bundle; afterwards a file is either that bundle's or refused."""
    out, _ = publisher
    seen, refused = set(), 0
    for _ in range(60):
        opened = Bundle.open(out)
        seen.add(opened.manifest.model.name)
        try:
            opened.graph_path("text")
            opened.read("tokenizer.json")
        except MammutError as error:
            refused += 1
            assert "open the bundle again" in str(error) or "cannot be read" in str(error)
    assert len(seen) > 1  # control: bundles were indeed exchanged meanwhile


def test_a_killed_process_leaves_the_old_bundle_whole(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with publish(out) as folder:
        fill(folder, "old")
    code = (
        "import sys, time\nfrom mammut_runtime.bundle import publish\n"
        f"with publish({str(out)!r}, overwrite=True) as folder:\n"
        "    (folder / 'weights.bin').write_bytes(b'half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert _model_name(out) == "old"
    with publish(out, overwrite=True) as folder:  # what the killed one left is in nobody's way
        fill(folder, "new")
    assert _model_name(out) == "new"
