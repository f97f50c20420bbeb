"""A camera that says what it sees when the scene changes: the shape of an application on a device.

    python runtime/examples/camera_app.py --source 0 --bundle build/demo-bundle
    python runtime/examples/camera_app.py --source clip.mp4 --watch "a red heart,a sun" --bundle build/demo-bundle

Three things to copy. Looking (`encode`) is the expensive part and happens once per frame; a caption is only written
when the picture's embedding has moved away from the one last described. A live camera is read in a thread that keeps
nothing but the newest frame, so the application never falls behind. OpenCV's frames are BGR, and `encode` is told so.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from mammut_runtime import CaptionOptions, Classifier, EngineOptions, InputError, Model, console

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Event:
    """Something to tell: the scene changed."""

    time_s: float
    """Since the start of the clip or of the program."""
    caption: str
    watched: str | None
    """The best of the watched texts and its probability."""


@click.command("camera-app")
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--source", default="0", help="Number of a camera, or a video file. Default: 0.")
@click.option("--watch", help="Texts to compare every described frame with, separated by commas.")
@click.option("--every", "every_s", default=0.5, help="Seconds between two looks. Default: 0.5.")
@click.option("--change", default=0.15, help="How far (1 - cosine) the picture must move to be new. Default: 0.15.")
@click.option("--threads", default=0, help="Threads for the model; 0: all cores. Default: 0.")
def camera_app(bundle: Path, source: str, watch: str | None, every_s: float, change: float, threads: int) -> None:
    with Model.load(bundle, EngineOptions(threads=threads)) as model:
        watched = model.classifier(watch.split(","), ["{}"]) if watch else None
        for event in describe(model, frames(source, every_s), change, watched):
            suffix = f"   [{event.watched}]" if event.watched else ""
            click.echo(console.printable(f"{event.time_s:7.1f} s  {event.caption}{suffix}"))


def describe(
    model: Model, stream: Iterator[tuple[float, Frame]], change: float, watched: Classifier | None = None
) -> Iterator[Event]:
    """An event for the first frame, and for each that differs from the one described last."""
    last: NDArray[np.float32] | None = None
    for time_s, frame in stream:
        seen = model.encode(frame, color="bgr")
        if last is not None and 1 - float(seen.embedding @ last) < change:
            continue
        last = seen.embedding
        best = seen.match(watched).matches[0] if watched else None
        found = f"{best.text} {best.probability:.2f}" if best else None
        yield Event(time_s, seen.caption(CaptionOptions(beams=1)).text, found)


def frames(source: str, every_s: float) -> Iterator[tuple[float, Frame]]:
    """Frames uint8[H, W, 3] in BGR, with their time in seconds: a file's every `every_s`, a camera's newest."""
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        raise InputError(f"{source}: cannot be opened as a camera or video; give a camera's number or a video file")
    try:
        yield from _camera_frames(capture, every_s) if source.isdecimal() else _file_frames(capture, every_s)
    finally:
        capture.release()


def _file_frames(capture: cv2.VideoCapture, every_s: float) -> Iterator[tuple[float, Frame]]:
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    step = max(1, round(every_s * rate))
    number = 0
    while capture.grab():  # decodes only what is retrieved, as far as the format allows
        if number % step == 0:
            whole, frame = capture.retrieve()
            if whole:
                yield number / rate, frame
        number += 1


def _camera_frames(capture: cv2.VideoCapture, every_s: float) -> Iterator[tuple[float, Frame]]:
    newest: list[Frame | None] = [None]
    arrived, stopped = threading.Event(), threading.Event()

    def keep_newest() -> None:
        while not stopped.is_set():
            whole, frame = capture.read()
            newest[0] = frame if whole else None
            arrived.set()
            if not whole:
                return

    reader = threading.Thread(target=keep_newest, daemon=True)
    reader.start()
    started = time.monotonic()
    try:
        while arrived.wait(timeout=10):
            arrived.clear()
            frame = newest[0]
            if frame is None:
                return
            yield time.monotonic() - started, frame
            time.sleep(every_s)
    finally:
        stopped.set()
        reader.join(timeout=5)


if __name__ == "__main__":
    sys.exit(console.run(camera_app))
