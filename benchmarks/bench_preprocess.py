"""A camera frame to the model's 224 x 224 numbers: our exact and fast modes against Pillow, in one run.

    python benchmarks/bench_preprocess.py [--threads 1] [--repeats 40]

Medians after warm-up; the three take turns, so that a busy machine slows all of them. "exact" and "fast" are the
whole preprocess, frame to float32[3, 224, 224]; "Pillow" is its resize and crop alone, which exact equals byte for byte
(checked here). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
from measuring import child, print_surroundings, surroundings

SIZE = 224
FRAMES = ((480, 640), (720, 1280), (1080, 1920), (2160, 3840))
LIMIT_MS = 12.0
"""What a 1080p frame may cost on one core, exactly."""


@click.command(help=__doc__)
@click.option("--threads", type=click.IntRange(1), default=1, help="Of every thread pool; the figures are for 1.")
@click.option("--repeats", type=click.IntRange(1), default=40)
@click.option("--inside", is_flag=True, hidden=True)
def main(threads: int, repeats: int, inside: bool) -> None:
    if inside:
        print(json.dumps(measure(threads, repeats)))
        return
    about = surroundings()
    print_surroundings(about)
    print(f"{threads} threads, {repeats} repeats after warm-up, medians in ms, to {SIZE} x {SIZE}, bicubic\n")
    # a process of its own: the matrix library reads its thread count when it is imported
    rows = child([__file__, "--inside", f"--threads={threads}", f"--repeats={repeats}"], threads)["rows"]
    print(f"{'frame':>12} {'exact':>7} (fastest) {'fast':>7} {'Pillow':>7}   Pillow / exact   Pillow / fast")
    for row in rows:
        print(
            f"{row['frame']:>12} {row['exact_ms']:7.2f} {row['exact_fastest_ms']:9.2f} {row['fast_ms']:7.2f}"
            f" {row['pillow_ms']:7.2f} {row['pillow_over_exact']:15.2f}x {row['pillow_over_fast']:14.2f}x"
        )
    full_hd = next(row for row in rows if row["frame"] == "1920x1080")["exact_ms"]
    verdict = "within" if full_hd <= LIMIT_MS else "ABOVE"
    print(f"\n1920x1080 exact: {full_hd:.1f} ms, {verdict} the {LIMIT_MS:.0f} ms wanted")
    print(json.dumps({"benchmark": "preprocess", "threads": threads, "repeats": repeats, **about, "rows": rows}))


def measure(threads: int, repeats: int) -> dict[str, Any]:
    """The rows of the table."""
    import cv2
    import numpy as np

    from mammut_runtime.preprocess import Preprocessor, PreprocessRule, place

    cv2.setNumThreads(threads)
    rule = PreprocessRule(SIZE, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    exact, fast = Preprocessor(rule), Preprocessor(rule, "fast")
    rows = []
    for height, width in FRAMES:
        frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        placed = place(width, height, SIZE, "shortest")
        with_pillow = pillow_resize(frame, placed.columns, placed.rows)
        if not np.array_equal(exact.pixels_u8(frame), with_pillow()):
            raise SystemExit(f"error: {width} x {height}: the exact mode differs from Pillow")
        ours = (lambda frame=frame: exact(frame)), (lambda frame=frame: fast(frame))
        (exact_ms, exact_fastest_ms), (fast_ms, _), (pillow_ms, _) = taking_turns((*ours, with_pillow), repeats)
        rows.append(
            {
                "frame": f"{width}x{height}",
                "exact_ms": exact_ms,
                "exact_fastest_ms": exact_fastest_ms,
                "fast_ms": fast_ms,
                "pillow_ms": pillow_ms,
                "pillow_over_exact": pillow_ms / exact_ms,
                "pillow_over_fast": pillow_ms / fast_ms,
            }
        )
    return {"rows": rows}


def pillow_resize(frame: Any, columns: Any, rows: Any) -> Callable[[], Any]:
    """Pillow's resize and crop of one frame, as uint8[224, 224, 3]."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(frame)
    box = (columns.start, rows.start, columns.start + columns.count, rows.start + rows.count)
    return lambda: np.asarray(picture.resize((columns.size, rows.size), Image.Resampling.BICUBIC).crop(box))


def taking_turns(functions: tuple[Callable[[], object], ...], repeats: int) -> list[tuple[float, float]]:
    """The median and the least milliseconds of each function."""
    taken: list[list[float]] = [[] for _ in functions]
    for index in range(3 + repeats):
        for function, times in zip(functions, taken, strict=True):
            started = time.perf_counter()
            function()
            if index >= 3:
                times.append((time.perf_counter() - started) * 1000)
    return [(statistics.median(times), min(times)) for times in taken]


if __name__ == "__main__":
    main()
