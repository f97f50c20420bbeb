"""Clips over a Ray cluster: the bytes of a single process, also when a worker is killed half-way.

What needs Ray is skipped where it is not installed; what can be shown with a stand-in for it is shown everywhere.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.commands import main
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import BundleError, EngineError, InputError
from mammut_runtime.video import cluster
from mammut_runtime.video.captions import VideoCaptionOptions
from mammut_runtime.video.cluster import Outcome, WorkerModel, caption_clips, connected
from mammut_runtime.video.subtitles import JOURNAL_FOLDER, Job, jobs_of

pytest.importorskip("onnxruntime")
TINY = Path(__file__).parents[2] / "data" / "tiny-bundle"
PLAIN = "import sys; from mammut_runtime.commands import main; sys.exit(main())"
USUAL = ("--threads", "1", "--beams", "1", "--merge-likeness", "2", "--longest-scene", "0.1", "--shortest-scene", "0.1")
"""A scene for every frame, so that a short clip is long work."""


def write_clip(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(frames):
        small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        writer.write(cv2.resize(small, (64, 48), interpolation=cv2.INTER_NEAREST))
    writer.release()
    return path


def written(out: Path) -> dict[str, bytes]:
    """Everything below a folder, journals too."""
    return {each.relative_to(out).as_posix(): each.read_bytes() for each in out.rglob("*") if each.is_file()}


# ---- with Ray ----


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two workers on this machine, as --ray local makes it; others join it by its address."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'mammut-edge[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        with connected("local") as ray:
            assert ray.cluster_resources()["CPU"] == 2
            yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, one of them long work, and one that is none; and what a single process makes of them: the control."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "long.avi", 300)
    write_clip(folder / "short.avi", 20)
    (folder / "none.mp4").write_text("no video")
    arguments = ["caption-video", str(folder), "--out", str(folder / "single"), "--bundle", str(TINY), *USUAL]
    assert main(arguments) == 2
    return folder


def start(clips: Path, out: Path, address: str) -> subprocess.Popen[str]:
    arguments = ["caption-video", str(clips), "--out", str(out), "--bundle", str(TINY), *USUAL, "--ray", address]
    return subprocess.Popen(
        [sys.executable, "-c", PLAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def owner(path: Path) -> int:
    """The process, not this one, that has a file open."""
    for each in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if each.resolve() == path and int(each.parts[2]) != os.getpid():
                return int(each.parts[2])
        except OSError:  # gone meanwhile, or somebody else's
            continue
    raise AssertionError(f"nobody has {path} open")


def test_a_worker_killed_half_way_changes_no_byte(clips: Path, address: str, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("finds the worker through /proc")
    single = written(clips / "single")
    scenes = single[f"{JOURNAL_FOLDER}/long.journal"].count(b"\n") - 2
    assert len(single) == 8 and scenes > 100
    run = start(clips, tmp_path / "killed", address)
    journal = tmp_path / "killed" / JOURNAL_FOLDER / "long.journal"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.01)
    os.kill(owner(journal), signal.SIGKILL)
    shown, notes = run.communicate(timeout=200)
    (kept,) = [line for line in shown.splitlines() if "long.avi" in line]
    assert "scenes from before" in kept, f"it was half done, and went on; {notes}"
    assert run.returncode == 2 and written(tmp_path / "killed") == single
    for line in (f"error: {clips / 'none.mp4'}: not a video", "1 of 3 clips could not be used"):
        assert sum(each.startswith(line) for each in notes.splitlines()) == 1, notes
    (other,) = [line for line in shown.splitlines() if "short.avi" in line]
    assert "scenes from before" not in other, "control: its worker was left alone"


# ---- without ----


def test_without_ray_one_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails
    clip, out = write_clip(tmp_path / "a.avi", 3), tmp_path / "out"
    arguments = ["caption-video", str(clip), "--out", str(out), "--bundle", str(TINY), *USUAL]
    assert main([*arguments, "--ray", "local"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install 'mammut-edge[ray]'" in lines[0], lines
    assert not out.exists()
    assert main(arguments) == 0  # control: without --ray, Ray is not needed


def test_ray_is_not_imported_unless_it_is_asked_for(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.avi", 3)
    code = f"""
import sys
from mammut_runtime.commands import main
import mammut_runtime.video.cluster
assert main(["caption-video", {str(clip)!r}, "--out", "out", "--bundle", {str(TINY)!r}]) == 0
print("ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False", done.stdout


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class StandIn:
    """What of Ray is used, in this process. Results are looked up by the clip's name; others are made."""

    exceptions = SimpleNamespace(RayTaskError=RayTaskError, RayError=RayError)

    def __init__(self, results: dict[str, object]) -> None:
        self.results, self.cancelled, self.options = results, list[object](), dict[str, object]()
        self.waits, self.cards = 0, 1.0
        self.interrupted: BaseException | None = None

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": self.cards} if self.cards else {"CPU": 4.0}

    def remote(self, **options: object) -> Any:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda model, job, *rest: (model, job, *rest))

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        if self.waits % 2:  # nothing is ready yet
            return [], references
        if self.interrupted:
            raise SystemError("returned a result with an exception set") from self.interrupted
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> object:
        result = self.results.get(reference[1].name)
        if isinstance(result, RayError):
            raise result
        return cluster._caption(*reference) if result is None else result

    def cancel(self, reference: object, force: bool) -> None:
        assert force
        self.cancelled.append(reference)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    for name in "abc":
        write_clip(tmp_path / f"{name}.avi", 2)
    return jobs_of([tmp_path])


def outcomes(results: dict[str, object], jobs: list[Job], out: Path, model: WorkerModel | None = None) -> list[Outcome]:
    model = model or WorkerModel.of(TINY, EngineOptions(threads=1))
    return list(caption_clips(StandIn(results), model, jobs, out, VideoCaptionOptions()))


def test_each_worker_loads_the_bundle_once(jobs: list[Job], tmp_path: Path) -> None:
    cluster._loaded.cache_clear()
    found = outcomes({}, jobs, tmp_path / "out")
    assert [each.job for each in found] == jobs and all(each.written and not each.problem for each in found)
    assert cluster._loaded.cache_info().misses == 1 and cluster._loaded.cache_info().hits == 2
    (first, *_) = [each.written for each in found if each.written]
    assert first.clip == jobs[0].clip and first.files[0] == tmp_path / "out" / "a.srt"
    cluster._loaded.cache_clear()


def test_a_clip_that_kills_its_workers_is_reported_and_the_rest_goes_on(jobs: list[Job], tmp_path: Path) -> None:
    found = {each.job.name: each for each in outcomes({"b": RayError("died")}, jobs, tmp_path / "out")}
    assert found["b"].written is None and "4 workers were lost over it" in str(found["b"].problem)
    assert found["a"].written and found["c"].written  # control


def test_what_concerns_all_ends_the_run_and_stops_the_others(jobs: list[Job], tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "x.srt")
    for result, kind in ((full, OSError), (RayTaskError(MemoryError()), MemoryError)):
        ray = StandIn({"b": result})
        running = caption_clips(ray, WorkerModel.of(TINY), jobs, tmp_path / "out")
        assert next(running).written
        with pytest.raises(kind):
            next(running)
        assert [each[1].name for each in ray.cancelled] == ["c"]  # type: ignore[index]
        assert ray.options == {"num_cpus": 1, "num_gpus": 0, "max_retries": cluster.RETRIES}


def test_a_worker_asks_for_what_it_needs(jobs: list[Job], tmp_path: Path) -> None:
    wanted = {}
    for name, engine in {
        "cuda": EngineOptions(threads=2, providers=("CUDAExecutionProvider", "CPUExecutionProvider"), gpu=3),
        "plain": EngineOptions(threads=3),
    }.items():
        ray = StandIn({each.name: InputError("x") for each in jobs})
        model = WorkerModel.of(TINY, engine)
        assert len(list(caption_clips(ray, model, jobs, tmp_path / "out"))) == 3
        wanted[name] = (ray.options["num_cpus"], ray.options["num_gpus"], model.engine.gpu)
    assert wanted == {"cuda": (2, 1, 0), "plain": (3, 0, 0)}
    ray.cards = 0.0
    assert next(caption_clips(ray, model, jobs, tmp_path / "out")).problem  # control: none is needed
    with pytest.raises(EngineError, match="the cluster has none"):
        next(caption_clips(ray, dataclasses.replace(model, nvidia=True), jobs, tmp_path / "out"))


def test_a_signal_ends_the_run_as_itself(jobs: list[Job], tmp_path: Path) -> None:
    ray = StandIn({})
    running = caption_clips(ray, WorkerModel.of(TINY), jobs, tmp_path / "out")
    assert next(running).written  # control
    ray.interrupted = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert [each[1].name for each in ray.cancelled] == ["b", "c"]  # type: ignore[index]


def test_another_bundle_on_a_machine_is_refused(jobs: list[Job], tmp_path: Path) -> None:
    cluster._loaded.cache_clear()
    right = WorkerModel.of(TINY)
    other = WorkerModel(right.bundle, "0" * 64, right.engine, "exact")
    with pytest.raises(BundleError, match=r"another bundle on .* than where the command was started"):
        outcomes({}, jobs, tmp_path / "out", other)
    with pytest.raises(BundleError, match=r"no such bundle on .*every machine needs it there"):
        outcomes({}, jobs, tmp_path / "out", WorkerModel(tmp_path / "none", "0" * 64, right.engine, "exact"))
    assert not (tmp_path / "out").exists()
    assert outcomes({}, jobs, tmp_path / "out", right)[0].written  # control
    assert isinstance(outcomes({"a": InputError("x")}, jobs, tmp_path / "out", right)[0].problem, InputError)
    cluster._loaded.cache_clear()
