"""Captioning clips: how many times real time, where the time goes, and that memory does not grow with length.

    python benchmarks/bench_video.py                                     about 30 minutes; nothing else should run
    python benchmarks/bench_video.py --bundle build/demo-bundle --clip day.mp4 --threads 1 --skip-memory   a first look

Without --clip the times are those of clips made here: 640x480 at 30 fps, MPEG-4, pictures that move, with a cut every 5
seconds. Memory is taken over clips of 320x240, the same pictures (or those of --clip) over and over, with the first
number of threads. One process for each measurement, files in the system's cache. The last line of stdout is one JSON
object.

    decode    every frame decoded, none converted
    cut       the same, and converted, compared, sampled and cut into scenes
    encode    the video graph, or vision over 3 frames    } of each scene, while the whole runs: the next is decoded
    caption   a caption by 3 beams, and its confidences   } meanwhile, so the parts do not add up to the whole
    whole     all that `mammut-run caption-video` does but the files

The share of decoding is processor time of decoding alone over processor time of the whole, over all threads. "Per core"
is the clip's length over processor time: it hardly moves when other programs run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
import cv2
import numpy as np
from bench_runtime import FOLDER, prepared
from measuring import child, peak_megabytes, print_surroundings, surroundings
from numpy.typing import NDArray

from mammut_runtime.canary import canary_picture
from mammut_runtime.video.decode import Clip, quiet_decoder
from mammut_runtime.video.scenes import scenes

T = TypeVar("T")
EXPECTED_TIMES = 20.0
EXPECTED_GROWTH = 1.1
FPS, SIZE_HW, SCENE_S = 30, (480, 640), 5
SMALL_HW, MOST_LOOPED = (240, 320), 900


@click.command(help=__doc__)
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path, exists=True), help="One or more.")
@click.option("--models", default="demo,B-32", help="Without --bundle: of demo and the openMaMMUT sizes, in float32.")
@click.option("--clip", type=click.Path(path_type=Path, exists=True), help="A clip of your own in place of ours.")
@click.option("--minutes", default="10", help="Lengths of our clips, comma-separated.")
@click.option("--memory-minutes", default="10,60", help="Lengths of the clips that memory is taken over.")
@click.option("--skip-memory", is_flag=True, help="Times only.")
@click.option("--threads", default="1,4", help="Of the engine, the decoder and OpenCV; comma-separated.")
def main(
    bundles: tuple[Path, ...],
    models: str,
    clip: Path | None,
    minutes: str,
    memory_minutes: str,
    skip_memory: bool,
    threads: str,
) -> None:
    about = surroundings()
    print_surroundings(about)
    FOLDER.mkdir(parents=True, exist_ok=True)
    clips = [clip] if clip else [made(FOLDER / f"clip-{each}-min.mp4", float(each)) for each in minutes.split(",")]
    named = [(each.name, each) for each in bundles] or [(name, prepared(name)[1]) for name in models.split(",")]
    small = [] if skip_memory else [looped(clip, float(each)) for each in memory_minutes.split(",")]
    rows, memory = [], []
    counts = [int(each) for each in threads.split(",")]
    for name, bundle in named:
        for count in counts:
            for path in clips:
                row = child([__file__, "one", str(bundle), str(path), str(count)], count)
                rows.append({"model": name, "threads": count, **row})
                show(rows[-1])
        found = [child([__file__, "memory", str(bundle), str(path), str(counts[0])], counts[0]) for path in small]
        memory += [{"model": name, "threads": counts[0], **each} for each in found]
        show_memory(found)
    print(json.dumps({"benchmark": "video", **about, "rows": rows, "memory": memory}))


def looped(clip: Path | None, minutes: float) -> Path:
    """A small clip of this length, the first frames of `clip` (or ours) over and over; it is kept."""
    path = FOLDER / f"looped-{clip.stem if clip else 'made'}-{minutes:g}-min.mp4"
    frames = list(first_frames(clip or made(FOLDER / "clip-1-min.mp4", 1.0)))
    return path if path.exists() else written(path, (frames[i % len(frames)] for i in range(round(minutes * 60 * FPS))))


def first_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    with Clip.open(path) as clip:
        while (tick := clip.advance()) is not None and tick.index < MOST_LOOPED:
            yield np.asarray(cv2.resize(clip.bgr(), SMALL_HW[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def made(path: Path, minutes: float) -> Path:
    """A clip of this length; it is kept."""
    return path if path.exists() else written(path, moving(round(minutes * 60 * FPS)))


def moving(count: int) -> Iterator[NDArray[np.uint8]]:
    picture = canary_picture(0, SIZE_HW)
    for index in range(count):
        if index % (FPS * SCENE_S) == 0:
            number = index // (FPS * SCENE_S)
            base = canary_picture(number % 50, SIZE_HW)
            picture = 255 - base if number % 2 else base
        yield np.roll(picture, index % (FPS * SCENE_S), axis=1)


def written(path: Path, frames: Iterator[NDArray[np.uint8]]) -> Path:
    part = path.with_name(f"part-{path.name}")
    writer = None
    for frame in frames:
        if writer is None:
            writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"mp4v"), FPS, frame.shape[1::-1])
        writer.write(frame)
    if writer is None:
        raise SystemExit("error: a clip needs at least one frame; give more --minutes")
    writer.release()
    part.replace(path)
    return path


class Watch:
    """Wall and processor time (all threads) since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self, name: str) -> dict[str, float]:
        return {
            f"{name}_s": time.perf_counter() - self._wall,
            f"{name}_processor_s": time.process_time() - self._processor,
        }


def measure(bundle: Path, path: Path, threads: int) -> dict[str, Any]:
    """One clip, seconds of each stage and what they mean."""
    from mammut_runtime.engines import EngineOptions
    from mammut_runtime.model import Model
    from mammut_runtime.video import captions

    watch = Watch()
    with Clip.open(path, threads=threads) as clip:
        while clip.advance() is not None:
            pass
        frames, length_s = clip.health.frames, clip.end_s
    times = watch.read("decode")
    watch = Watch()
    with Clip.open(path, threads=threads) as clip:
        found = sum(1 for _ in scenes(clip))
    times |= watch.read("cut")
    with Model.load(bundle, EngineOptions(threads=threads)) as model:
        model.encode(canary_picture(1, SIZE_HW)).caption()  # opens the graphs
        captions.look_at, encoding = summed(captions.look_at)
        captions.describe, describing = summed(captions.describe)
        watch = Watch()
        with Clip.open(path, threads=threads) as clip:
            cues = sum(1 for _ in captions.merged(captions.caption_scenes(model, clip, captions.VideoCaptionOptions())))
        times |= watch.read("whole")
    return {
        "clip": path.name,
        "length_s": length_s,
        "frames": frames,
        "scenes": found,
        "cues": cues,
        **times,
        "encode_s": encoding[0],
        "caption_s": describing[0] - encoding[0],
        "times_real_time": length_s / times["whole_s"],
        "times_real_time_per_core": length_s / times["whole_processor_s"],
        "way": "video" if model.watches else "pictures",
        "decoding_share": times["decode_processor_s"] / times["whole_processor_s"],
        "peak_memory_mb": peak_megabytes(),
    }


def summed(function: Callable[..., T]) -> tuple[Callable[..., T], list[float]]:
    """The function, and a list of one number: the seconds spent in it so far."""
    total = [0.0]

    def each(*given: Any) -> T:
        started = time.perf_counter()
        try:
            return function(*given)
        finally:
            total[0] += time.perf_counter() - started

    return each, total


def measure_memory(bundle: Path, path: Path, threads: int) -> dict[str, Any]:
    """The most memory of a process that captions a clip."""
    from mammut_runtime.engines import EngineOptions
    from mammut_runtime.model import Model

    with Model.load(bundle, EngineOptions(threads=threads)) as model:
        end_ms = 0
        for cue in model.caption_video(path):
            end_ms = cue.end_ms
    return {"clip": path.name, "length_s": end_ms / 1000, "peak_memory_mb": peak_megabytes()}


def show(row: dict[str, Any]) -> None:
    about = f"{row['frames']} frames, {row['scenes']} scenes seen as {row['way']}"
    print(f"{row['model']}, {row['threads']} thread(s), {row['clip']}: {about}")
    for label in ("decode", "cut", "encode", "caption", "whole"):
        seconds = row[f"{label}_s"]
        print(f"  {label:<8}{seconds:>9.2f} s {row['length_s'] / seconds:>8.1f} x real time")
    print(f"  decoding: {row['decoding_share']:.0%} of the processor time; peak memory {row['peak_memory_mb']:.0f} MB")
    verdict = ""
    if "demo" in row["model"]:
        passed = row["times_real_time"] >= EXPECTED_TIMES
        verdict = f"   expected >= {EXPECTED_TIMES}: {'pass' if passed else 'FALLS SHORT'}"
    print(f"  {row['times_real_time']:.1f} x, {row['times_real_time_per_core']:.1f} x per core{verdict}", flush=True)


def show_memory(found: list[dict[str, Any]]) -> None:
    for each in found:
        print(f"  {each['clip']}: {each['length_s'] / 60:.1f} minutes, peak memory {each['peak_memory_mb']:.0f} MB")
    if len(found) > 1:
        growth = found[-1]["peak_memory_mb"] / found[0]["peak_memory_mb"]
        verdict = "pass" if growth <= EXPECTED_GROWTH else "FALLS SHORT"
        print(f"  memory, last over first {growth:.2f} x   expected <= {EXPECTED_GROWTH}: {verdict}\n", flush=True)


if __name__ == "__main__":
    quiet_decoder()
    if sys.argv[1:2] in (["one"], ["memory"]):
        count = int(sys.argv[4])
        cv2.setNumThreads(count)
        function = measure if sys.argv[1] == "one" else measure_memory
        print(json.dumps(function(Path(sys.argv[2]), Path(sys.argv[3]), count)))
    else:
        main()
