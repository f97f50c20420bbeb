"""Captioning clips: how many times real time, where the time goes, and that memory does not grow with length.

    python benchmarks/bench_video.py                                     about half an hour; nothing else should run
    python benchmarks/bench_video.py --models demo --minutes 1 --threads 1      a first look

Clips are 640x480 at 30 fps, MPEG-4, made here: pictures that move, with a cut every 5 seconds. float32, one process for
each measurement, files in the system's cache. The last line of stdout is one JSON object.

    decode    every frame decoded, none converted
    cut       the same, and converted, compared and cut into scenes
    whole     all that `mammut-run caption-video` does but the files: 3 frames a scene encoded, a caption by 3 beams
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from bench_runtime import FOLDER, prepared
from measuring import child, peak_megabytes, print_surroundings, surroundings

from mammut_runtime.canary import canary_picture
from mammut_runtime.video.decode import Clip, quiet_decoder
from mammut_runtime.video.scenes import scenes

EXPECTED_TIMES = 20.0
EXPECTED_GROWTH = 1.1
FPS, SIZE_HW, SCENE_S = 30, (480, 640), 5


@click.command(help=__doc__)
@click.option("--models", default="demo,B-32", help="Comma-separated, of demo and the openMaMMUT sizes; or a bundle.")
@click.option("--minutes", default="10,60", help="Lengths of the clips, comma-separated.")
@click.option("--threads", default="4", help="Comma-separated.")
@click.option("--clip", type=click.Path(path_type=Path, exists=True), help="A clip of your own in place of ours.")
def main(models: str, minutes: str, threads: str, clip: Path | None) -> None:
    about = surroundings()
    print_surroundings(about)
    FOLDER.mkdir(parents=True, exist_ok=True)
    clips = [clip] if clip else [made(FOLDER / f"clip-{each}-min.mp4", float(each)) for each in minutes.split(",")]
    rows = []
    for name in models.split(","):
        bundle = Path(name) if Path(name, "manifest.json").exists() else prepared(name)[1]
        for count in map(int, threads.split(",")):
            mine = [child([__file__, "one", str(bundle), str(path), str(count)], count) for path in clips]
            rows += [{"model": name, "threads": count, **row} for row in mine]
            for row in mine:
                show(name, count, row)
            growth = mine[-1]["peak_memory_mb"] / mine[0]["peak_memory_mb"]
            if len(mine) > 1:
                verdict = "pass" if growth <= EXPECTED_GROWTH else "FALLS SHORT"
                print(f"  memory, longest over shortest {growth:.2f} x   expected <= {EXPECTED_GROWTH}: {verdict}\n")
    print(json.dumps({"benchmark": "video", **about, "rows": rows}))


def made(path: Path, minutes: float) -> Path:
    """A clip of this length; it is kept."""
    if path.exists():
        return path
    part = path.with_name(f"part-{path.name}")
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"mp4v"), FPS, SIZE_HW[::-1])
    for index in range(round(minutes * 60 * FPS)):
        if index % (FPS * SCENE_S) == 0:
            number = index // (FPS * SCENE_S)
            base = canary_picture(number % 50, SIZE_HW)
            picture = 255 - base if number % 2 else base
        writer.write(np.roll(picture, index % (FPS * SCENE_S), axis=1))
    writer.release()
    part.replace(path)
    return path


def measure(bundle: Path, path: Path, threads: int) -> dict[str, Any]:
    """One clip, seconds of each stage and what they mean."""
    from mammut_runtime.engines import EngineOptions
    from mammut_runtime.model import Model

    quiet_decoder()
    cv2.setNumThreads(threads)
    started = time.perf_counter()
    with Clip.open(path, threads=threads) as clip:
        while clip.advance() is not None:
            pass
        frames, length_s = clip.health.frames, clip.end_s
    decode_s = time.perf_counter() - started
    started = time.perf_counter()
    with Clip.open(path, threads=threads) as clip:
        found = sum(1 for _ in scenes(clip))
    cut_s = time.perf_counter() - started
    with Model.load(bundle, EngineOptions(threads=threads)) as model:
        model.encode(canary_picture(1, SIZE_HW)).caption()  # opens the graphs
        started = time.perf_counter()
        cues = sum(1 for _ in model.caption_video(path))
        whole_s = time.perf_counter() - started
    return {
        "clip": path.name,
        "length_s": length_s,
        "frames": frames,
        "scenes": found,
        "cues": cues,
        "decode_s": decode_s,
        "cut_s": cut_s,
        "whole_s": whole_s,
        "times_real_time": length_s / whole_s,
        "decoding_share": decode_s / whole_s,
        "peak_memory_mb": peak_megabytes(),
    }


def show(name: str, threads: int, row: dict[str, Any]) -> None:
    print(f"{name}, {threads} thread(s), {row['clip']}: {row['frames']} frames, {row['scenes']} scenes")
    for label in ("decode", "cut", "whole"):
        seconds = row[f"{label}_s"]
        print(f"  {label:<8}{seconds:>9.1f} s {row['length_s'] / seconds:>8.1f} x real time")
    print(
        f"  decoding alone would take {row['decoding_share']:.0%} of that; peak memory {row['peak_memory_mb']:.0f} MB"
    )
    verdict = "pass" if row["times_real_time"] >= EXPECTED_TIMES else "FALLS SHORT"
    print(f"  {row['times_real_time']:.1f} x   expected >= {EXPECTED_TIMES} with the demo: {verdict}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
