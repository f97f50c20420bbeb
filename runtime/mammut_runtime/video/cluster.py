"""Clips shared over a Ray cluster: `mammut-run caption-video ... --ray ADDRESS`, or `--ray local`.

Ray hands out the clips, starts the workers, and gives a clip to another worker when one is lost. A worker loads the
bundle once, and captions a clip as a single process does: `write_subtitles`, through the clip's journal. So a clip
whose worker was killed goes on where it was, and the bytes are those of a single process.

Every machine must see clips, outputs and bundle under the same paths (a shared file system), and have the same versions
installed; a bundle that differs, or settings that do, are an error and not other captions. This module opens no
connection of its own: all that goes over the network is Ray's. Ray is imported here, and only when it is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2

from mammut_runtime.bundle import Bundle
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import BundleError, EngineError, InputError, MammutError
from mammut_runtime.model import Model
from mammut_runtime.video.captions import VideoCaptionOptions
from mammut_runtime.video.decode import quiet_decoder
from mammut_runtime.video.subtitles import Job, Subtitles, write_subtitles

LOCAL = "local"
"""The address that means a cluster on this machine, for as long as the command runs."""
RETRIES = 3
"""Workers that a clip may lose before it is given up: it may be the clip that kills them."""
_SURROUNDINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a local cluster tells nobody that it runs
    "RAY_NUM_REDIS_GET_RETRIES": "1",  # an address where nothing answers is an error after some 20 s,
    "RAY_py_gcs_connect_timeout_s": "5",  # not after a quarter of an hour
}
"""Variables that Ray reads when it is imported. What the user has set stays."""
_SIGNALS_EVERY_S = 1.0
"""Ray holds SIGTERM back while it waits."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a local cluster: next to nothing is kept there, and Ray would take a third of the memory."""


@dataclass(frozen=True)
class WorkerModel:
    """What each worker loads."""

    bundle: Path
    """Absolute."""
    content_hash: str
    """Of the bundle where the command was started; another one under the same path is refused."""
    engine: EngineOptions
    preprocess: Literal["exact", "fast"]
    nvidia: bool = False
    """Whether a worker needs a graphics card of NVIDIA: Ray shows it those that it was given, and no others."""

    @classmethod
    def of(
        cls, bundle: Path, engine: EngineOptions | None = None, preprocess: Literal["exact", "fast"] = "exact"
    ) -> WorkerModel:
        """A worker takes as many processors as `engine` has threads; 0 becomes 1: more workers beat more threads.

        Raises BundleError for what is no whole bundle.
        """
        engine = engine or EngineOptions()
        opened = Bundle.open(bundle)
        nvidia = opened.manifest.target == "tensorrt" or any(
            name in each.casefold() for each in engine.providers for name in ("cuda", "tensorrt")
        )
        gpu = 0 if nvidia else engine.gpu  # the first of the one that it is shown
        engine = dataclasses.replace(engine, threads=engine.threads or 1, gpu=gpu)
        return cls(bundle.absolute(), opened.content_hash, engine, preprocess, nvidia)


@dataclass(frozen=True)
class Outcome:
    """What came of a clip: one of the two is None."""

    job: Job
    written: Subtitles | None
    problem: InputError | None


@contextlib.contextmanager
def connected(address: str, workers_threads: int = 1, tell: Callable[[str], None] = lambda _: None) -> Iterator[Any]:
    """Ray, connected to the cluster at an address (as Ray writes it), or to one of its own for "local".

    It is disconnected afterwards, and one of its own has ended then. For one use at a time in a process.

    workers_threads: the processors that one worker takes. tell: is told what does not look right.
    Raises EngineError if Ray is not installed, or the cluster cannot be reached.
    """
    ray = _library()
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        settings |= {
            "num_cpus": max(os.cpu_count() or 1, workers_threads),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    with _own_signal_handler():
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as problem:
            reason = str(problem).strip().splitlines() or [type(problem).__name__]
            raise EngineError(
                f"--ray {address}: no cluster that can be used ({reason[0]}); give the address that `ray start --head` "
                f"showed, or local"
            ) from None
    try:
        most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if most < workers_threads:
            tell(f"no machine of the cluster has {workers_threads} processors now (--threads); waiting for one")
        yield ray
    finally:
        ray.shutdown()


def caption_clips(
    ray: Any,
    model: WorkerModel,
    jobs: Sequence[Job],
    out: Path,
    options: VideoCaptionOptions | None = None,
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """Write the subtitles of all clips (see `write_subtitles`), and give what came of each as soon as it is known.

    ray: from `connected`. Raises EngineError where the cluster lacks what a worker needs, and what concerns all clips,
    such as OSError for a full disk or BundleError for another bundle on one of the machines; what was done is kept.
    Clips that are at work when this ends early are stopped.
    """
    if model.nvidia and not ray.cluster_resources().get("GPU"):
        raise EngineError("this bundle, or --provider, needs a graphics card; the cluster has none that Ray knows of")
    work = ray.remote(num_cpus=model.engine.threads, num_gpus=int(model.nvidia), max_retries=RETRIES)(_caption)
    arguments = (out.absolute(), options or VideoCaptionOptions(), overwrite)
    waiting = {work.remote(model, Job(job.clip.absolute(), job.name), *arguments): job for job in jobs}
    try:
        while waiting:
            ready = _first_ready(ray, list(waiting))
            yield _outcome(ray, waiting.pop(ready), ready, out)
    finally:
        for each in waiting:
            ray.cancel(each, force=True)


def _library() -> Any:
    for name, value in _SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as problem:
        raise EngineError(f"--ray needs Ray, which does not load ({problem}); pip install 'mammut-edge[ray]'") from None
    return ray


def _first_ready(ray: Any, references: Sequence[Any]) -> Any:
    ready: list[Any] = []
    try:
        while not ready:
            ready, _ = ray.wait(references, num_returns=1, timeout=_SIGNALS_EVERY_S)
    except SystemError as problem:  # Ray's C code makes this of what a signal's handler raises
        raise problem.__cause__ or problem from None
    return ready[0]


def _outcome(ray: Any, job: Job, reference: Any, out: Path) -> Outcome:
    try:
        found: Subtitles | Exception = ray.get(reference)
    except ray.exceptions.RayTaskError as problem:  # not foreseen: a bug, or no memory left
        raise problem.cause from None
    except ray.exceptions.RayError as problem:
        kind = type(problem).__name__
        found = InputError(
            f"{job.clip}: {1 + RETRIES} workers were lost over it ({kind}); run the same command again: it goes on "
            f"where it was"
        )
    if isinstance(found, Subtitles):
        files = tuple(out / each.relative_to(out.absolute()) for each in found.files)  # as they were given
        return Outcome(job, dataclasses.replace(found, clip=job.clip, files=files), None)
    if isinstance(found, InputError):
        return Outcome(job, None, found)
    raise found


def _caption(
    model: WorkerModel, job: Job, out: Path, options: VideoCaptionOptions, overwrite: bool
) -> Subtitles | MammutError | OSError:
    """In a worker. Errors that are foreseen are given back, not raised: Ray would wrap them."""
    quiet_decoder()
    cv2.setNumThreads(model.engine.threads)
    try:
        return write_subtitles(
            _loaded(model), job, out, options, overwrite=overwrite, decoder_threads=model.engine.threads
        )
    except (MammutError, OSError) as problem:
        return problem


@functools.lru_cache(maxsize=1)
def _loaded(model: WorkerModel) -> Model:
    """Once for each worker process, which lives as long as the command."""
    if not model.bundle.exists():
        raise BundleError(f"{model.bundle}: no such bundle on {platform.node()}; every machine needs it there")
    loaded = Model.load(model.bundle, model.engine, preprocess=model.preprocess)
    if loaded.bundle.content_hash != model.content_hash:
        loaded.close()
        raise BundleError(f"{model.bundle}: another bundle on {platform.node()} than where the command was started")
    return loaded


@contextlib.contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Ray replaces what happens at SIGTERM; put it back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["LOCAL", "Outcome", "WorkerModel", "caption_clips", "connected"]
