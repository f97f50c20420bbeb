"""mammut-run build: in child processes, resumed, watched, refused in words; with the fake TensorRT and the real RTX."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mammut_runtime import commands, console
from mammut_runtime.bundle import Bundle
from mammut_runtime.engine_cache import EngineCache
from mammut_runtime.engines import tensorrt_jobs as jobs
from mammut_runtime.engines import tensorrt_library
from mammut_runtime.engines.tensorrt_build import BuildTask
from mammut_runtime.errors import EngineError, InputError

TINY = Path(__file__).parents[2] / "data" / "tiny-bundle"
GRAPHS = ["vision", "text", "memory", "decoder"]


def run(*arguments: object) -> int:
    return console.run(commands.cli, ["build", *map(str, arguments)])


def test_the_command_builds_replays_and_does_not_build_again(
    fake_gpu: Any, tensorrt_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tensorrt_bundle.path, "--dry-run") == 0
    assert "to build: vision, text, memory, decoder" in capsys.readouterr().out
    assert not fake_gpu.cache.folder.exists(), "a dry run writes nothing"
    assert run(tensorrt_bundle.path) == 0
    shown, notes = capsys.readouterr()
    assert "building vision (1 of 4)" in notes and "building decoder (4 of 4)" in notes
    assert "tensorrt 10.3.0, Fake GPU, 8.7" in shown and "canary reproduced" in shown and shown.count("built in") == 4
    before = {each: each.stat().st_mtime_ns for each in fake_gpu.cache.folder.rglob("*.engine")}
    assert run(tensorrt_bundle.path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["graph"] for each in result["engines"]] == GRAPHS and "reproduced" in result["canary"]
    assert {each["seconds"] for each in result["engines"]} == {0}
    assert before == {each: each.stat().st_mtime_ns for each in fake_gpu.cache.folder.rglob("*.engine")}
    assert len(before) == 4
    assert run(tensorrt_bundle.path, "--workspace-mib", "64") == 0, "a control: other options are another engine"
    assert capsys.readouterr().out.count("built in") == 4


def test_files_are_for_this_user_only(built: Any) -> None:
    files = list(built.cache.folder.rglob("*"))
    assert {stat.S_IMODE(each.stat().st_mode) for each in files if each.is_file()} == {0o600}
    assert {stat.S_IMODE(each.stat().st_mode) for each in files if each.is_dir()} == {0o700}
    assert stat.S_IMODE(built.cache.key_file.stat().st_mode) == 0o600
    assert sum(each.suffix == ".engine" for each in files) == 4
    assert [each.name[:7] for each in built.cache.folder.iterdir() if each.suffix == ".cache"] == ["timing-"]


def test_measurements_are_kept_from_graph_to_graph(built: Any, tensorrt_bundle: Bundle) -> None:
    plan = jobs.plan_build(tensorrt_bundle, built.cache, jobs.BuildOptions())
    assert built.cache.load_timing(plan.keys["text"]) == b"timingvisiontextmemorydecoder"


@pytest.mark.parametrize("version", ["10.16.1", "11.4.0"])
def test_other_versions_of_tensorrt(
    fake_gpu: Any, tensorrt_bundle: Bundle, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
    monkeypatch.delitem(sys.modules, "tensorrt")
    tensorrt_library._load.cache_clear()
    assert run(tensorrt_bundle.path) == 0
    assert tensorrt_library.load().version == version


def test_too_old_is_refused_and_absent_names_the_packages(
    fake_gpu: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_gpu.trt, "__version__", "10.2.0")
    tensorrt_library._load.cache_clear()
    with pytest.raises(EngineError, match=r"tensorrt 10.2.0 is too old, expected 10.3 or newer: on a Jetson"):
        tensorrt_library.load("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    tensorrt_library._load.cache_clear()
    message = r"python3-libnvinfer.*pip install mammut-edge\[tensorrt\]; tensorrt_rtx does not load .*tensorrt-rtx"
    with pytest.raises(EngineError, match=message):
        tensorrt_library.load()
    with pytest.raises(InputError, match="library: expected tensorrt or tensorrt_rtx, got 'trt'"):
        tensorrt_library.load("trt")


def test_cuda_python_absent_names_the_extra(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mammut_runtime.engines import tensorrt_cuda

    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    tensorrt_cuda.runtime.cache_clear()
    with pytest.raises(EngineError, match=r"cuda-python does not load .* pip install mammut-edge\[tensorrt\]"):
        tensorrt_cuda.describe(0)


# ---- builds that do not end well ----


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("memory", r"decoder: memory ran out while building \(.*OutOfMemory.*\); close other .*lower --workspace-mib"),
        ("kill", r"decoder: the system ended the build, most likely because memory ran out; .*--workspace-mib"),
        ("crash", r"decoder: the building process ended with code 134: terminate called: something odd"),
        ("refuse", r"decoder: tensorrt 10.3.0 does not take the graph: node blocks.0/Odd: Odd-1: no such operator"),
    ],
)
def test_a_failed_build_says_why_keeps_what_is_done_and_goes_on(
    fake_gpu: Any, tensorrt_bundle: Bundle, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", f"{what}:decoder")
    with pytest.raises(EngineError, match=message + r".*done engines are kept"):
        fake_gpu.build(tensorrt_bundle)
    assert sorted(each.name.split("-")[0] for each in fake_gpu.cache.folder.rglob("*.engine")) == sorted(GRAPHS[:3])
    assert not list(fake_gpu.cache.folder.rglob("*.part"))
    monkeypatch.delenv("FAKE_TENSORRT_FAIL")
    assert [each.graph for each in fake_gpu.build(tensorrt_bundle) if each.seconds] == ["decoder"]


def test_a_build_that_holds_too_much_is_ended(
    fake_gpu: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu.build(tensorrt_bundle, memory_mib=400)  # a control: without the hog it fits
    monkeypatch.setenv("FAKE_TENSORRT_FAIL", "hog:vision")
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"vision: the build held \d+ MiB, the limit is 400 MiB; raise --memory-mib"):
        fake_gpu.build(tensorrt_bundle, memory_mib=400, force=True)
    assert time.monotonic() - started < 15, "it would wait for 20 s"
    assert len(fake_gpu.build(tensorrt_bundle)) == 4, "the engines from before are there"


def test_a_machine_that_runs_short_ends_the_build(
    fake_gpu: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(EngineError, match=r"vision: the machine has \d+ MiB of memory left; the build held \d+ MiB"):
        fake_gpu.build(tensorrt_bundle)


def test_an_interrupted_build_goes_on(fake_gpu: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(graph: str, phase: str, seconds: float) -> None:
        if graph == "memory":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.build_engines(tensorrt_bundle, fake_gpu.cache, progress=interrupt)
    assert not list(fake_gpu.cache.folder.rglob("*.part"))
    half = fake_gpu.cache.folder / "half.part"  # what a power cut leaves
    half.write_bytes(b"half")
    assert [each.graph for each in fake_gpu.build(tensorrt_bundle) if each.seconds] == ["memory", "decoder"]
    assert not half.exists()


def test_two_builds_at_once_do_not_share_the_gpu(fake_gpu: Any, tensorrt_bundle: Bundle) -> None:
    plan = jobs.plan_build(tensorrt_bundle, fake_gpu.cache, jobs.BuildOptions())
    with (
        fake_gpu.cache.building(plan.keys["text"]),
        pytest.raises(EngineError, match="another build is at work here; wait for it"),
    ):
        fake_gpu.build(tensorrt_bundle)
    assert len(fake_gpu.build(tensorrt_bundle)) == 4


def test_a_tampered_engine_is_built_again(
    built: Any, tensorrt_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(built.cache.folder.glob("*/text-*.engine"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(tensorrt_bundle.path) == 0
    shown = capsys.readouterr()
    assert "refused: its MAC is not by this device's key" in shown.err and shown.out.count("built in") == 1


def test_a_child_ends_with_its_parent(fake_gpu: Any, tensorrt_bundle: Bundle, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.touch()
    profiles = jobs._shapes(tensorrt_bundle.manifest.profiles["vision"])
    task = BuildTask("tensorrt", str(tensorrt_bundle.graph_path("vision")), str(engine), profiles, 1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_TENSORRT_FAIL", "wait:vision")
        child = subprocess.Popen(jobs.child_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    child.stdin.write(task.to_line().encode() + b"\n")
    child.stdin.flush()
    assert b"phase" in child.stdout.readline()
    child.stdin.close()
    assert child.wait(10) == 1
    child.stdout.close()


def test_other_bundles_and_numbers_are_refused(fake_gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(TINY) == 2
    assert "is for onnxruntime, which needs no build; export it with --target tensorrt" in capsys.readouterr().err
    with pytest.raises(InputError, match="workspace_mib: expected 16 to"):
        jobs.BuildOptions(workspace_mib=1)


def test_no_gpu_is_one_clear_error(fake_gpu: Any, tensorrt_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    fake_gpu.machine.failures["cudaGetDeviceCount"] = fake_gpu.cuda.cudaError_t.cudaErrorNoDevice
    assert run(tensorrt_bundle.path) == 2
    assert "error: no usable GPU or driver" in capsys.readouterr().err


def test_canary_that_differs_is_exit_code_1(
    fake_gpu: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_engine = fake_gpu.trt._run

    def wrong(engine: Any, addresses: Any, shapes: Any, outputs: Any) -> None:
        run_engine(engine, addresses, shapes, outputs)
        if "embedding" in outputs:
            fake_gpu.machine.view(addresses["embedding"], 4)[:] = 0

    monkeypatch.setattr(fake_gpu.trt, "_run", wrong)
    assert run(tensorrt_bundle.path) == 1
    assert "canary differs" in capsys.readouterr().err


# ---- the real thing, as far as it goes without a GPU ----


@pytest.mark.parametrize(("capability", "kind"), [("8.6", "tensorrt_bundle"), ("7.5", "half_bundle")])
def test_real_tensorrt_rtx_builds_every_graph(
    request: pytest.FixtureRequest, tmp_path: Path, capability: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """7.5 has no float32 matrix products: the library says so, and takes the half graphs."""
    pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")
    tensorrt_bundle: Bundle = request.getfixturevalue(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        options = (
            "--compute-capability",
            capability,
            "--library",
            "tensorrt_rtx",
            "--engine-cache",
            tmp_path / "cache",
        )
        assert run(tensorrt_bundle.path, *options, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert [each["graph"] for each in result["engines"]] == GRAPHS
        assert all(each["size_bytes"] > 50_000 for each in result["engines"]) and result["canary"] is None
        cache = EngineCache(tmp_path / "cache")
        chosen = jobs.BuildOptions(library="tensorrt_rtx", compute_capability=capability)
        assert jobs.plan_build(tensorrt_bundle, cache, chosen).graphs == []


def test_real_tensorrt_rtx_names_what_it_can_build_for(tensorrt_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")
    options = jobs.BuildOptions(library="tensorrt_rtx", compute_capability="8.7")
    with pytest.raises(InputError, match=r"compute capability '8.7': tensorrt_rtx .* offers .*8\.6.*12\.0"):
        jobs.plan_build(tensorrt_bundle, EngineCache(tmp_path / "cache"), options)
