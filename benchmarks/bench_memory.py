"""What a bundle costs in memory with all its graphs open, beside its unique weights; and what that does to speed.

    python benchmarks/bench_memory.py BUNDLE... [--threads 1] [--repeats 5]
    python benchmarks/bench_memory.py BUNDLE --settings prepack=False --settings memory_arena=True    options compared

Every bundle and setting is measured in a process of its own: memory before a graph is opened (libraries loaded), and
after every graph was opened and used for pictures, texts, greedy captions and beams. "resident" is the growth of the
process (RSS) over that; "anonymous" is the part that is not pages of files, so that the system cannot drop it.
Without BUNDLE: openMaMMUT B-32 in size with random weights, exported to build/bench. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import click
from measuring import child, print_surroundings, surroundings, timed

LIMIT = 1.4
"""Resident bytes with all graphs open, in unique weight bytes; what the project wants."""
TOKENS = 20
TEXTS = tuple(f"a photo of thing number {index}" for index in range(64))


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--repeats", type=click.IntRange(1), default=5)
@click.option("--settings", multiple=True, metavar="NAME=VALUE,...", help="Engine options to compare with the usual.")
@click.option("--inside", is_flag=True, hidden=True)
def main(bundles: tuple[Path, ...], threads: int, repeats: int, settings: tuple[str, ...], inside: bool) -> None:
    if inside:
        print(json.dumps(measure(bundles[0], threads, repeats, settings[0])))
        return
    about = surroundings()
    print_surroundings(about)
    print(f"{threads} thread(s), medians of {repeats} after warm-up; MB are 10^6 bytes\n")
    print(f"{'bundle, settings':<44}{'weights':>8}{'resident':>9}{'ratio':>6}{'anonymous':>10}{'ratio':>6}"
          f"{'open s':>8}{'encode ms':>10}{'texts ms':>9}{'tokens/s':>9}{'3 beams':>8}")  # fmt: skip
    rows = []
    for bundle in bundles or (random_bundle(),):
        for setting in ("", *settings):
            options = [f"--threads={threads}", f"--repeats={repeats}", f"--settings={setting}"]
            row = child([__file__, str(bundle), "--inside", *options], threads)
            rows.append(row)
            show(row)
    worst = max(row["ratio"] for row in rows)
    print(f"\nlargest ratio {worst:.2f}, {'within' if worst <= LIMIT else 'ABOVE'} the {LIMIT} wanted")
    print(json.dumps({"benchmark": "memory", "threads": threads, "repeats": repeats, **about, "rows": rows}))


def random_bundle() -> Path:
    from bench_runtime import prepared

    return prepared("B-32")[1]


def measure(bundle: Path, threads: int, repeats: int, setting: str) -> dict[str, Any]:
    """One bundle in this process."""
    import numpy as np

    from mammut_runtime.canary import canary_picture
    from mammut_runtime.caption_options import CaptionOptions
    from mammut_runtime.commands_bench import unique_weight_bytes
    from mammut_runtime.engines import EngineOptions
    from mammut_runtime.model import Model, Seen

    options = EngineOptions(threads=threads, **parsed(setting))
    model = Model.load(bundle, options, verify=False)
    load_library(model.manifest.target)
    weights = unique_weight_bytes(model)
    tokenizer = model.tokenizer
    tokenizer.encode("a photo")
    gc.collect()
    before = memory()
    opened = timed(lambda: [model._graphs.engine(name) for name in model.manifest.graphs], 1, warm_up=0)
    size = model.manifest.preprocess.size
    picture = canary_picture(1, (size, size))
    greedy = CaptionOptions(beams=1, min_tokens=TOKENS - 1, max_tokens=TOKENS)
    seen: list[Seen] = []

    def look() -> None:  # a Seen keeps what it computed
        seen[:] = [model.encode(picture)]

    def embed() -> None:  # not Model.embed_texts, which remembers
        length = model.manifest.text.text_length or model.manifest.text.context_length
        model._graphs.run("text", {"ids": tokenizer.tokenize(list(TEXTS), length).astype(np.int64)})

    encode = timed(look, repeats)
    texts = timed(embed, max(1, repeats // 4), warm_up=1)
    caption = timed(lambda: seen[0].caption(greedy), repeats, prepare=look)
    beams = timed(lambda: seen[0].caption(dataclasses.replace(greedy, beams=3)), max(1, repeats // 2), prepare=look)
    gc.collect()
    grown = {kind: after - before[kind] for kind, after in memory().items()}
    return {
        "bundle": bundle.name,
        "target": model.manifest.target,
        "precision": model.manifest.precision,
        "settings": setting,
        "unique_weight_bytes": weights,
        "resident_bytes": grown["Rss"],
        "anonymous_bytes": grown["Anonymous"],
        "proportional_bytes": grown["Pss"],
        "ratio": grown["Rss"] / weights,
        "anonymous_ratio": grown["Anonymous"] / weights,
        "open_s": opened.median_ms / 1000,
        "encode_ms": encode.median_ms,
        "text_64_ms": texts.median_ms,
        "caption_ms": caption.median_ms,
        "tokens_per_s": TOKENS / caption.median_ms * 1000,
        "beams_3_ms": beams.median_ms,
        "fastest": {"encode_ms": encode.fastest_ms, "caption_ms": caption.fastest_ms, "beams_3_ms": beams.fastest_ms},
    }


def parsed(setting: str) -> dict[str, Any]:
    """ "prepack=False,memory_arena=True" as EngineOptions takes it; values are JSON, or Python's True and False."""
    pairs = [each.split("=", 1) for each in setting.split(",") if each]
    plain = {"True": "true", "False": "false"}
    return {name: json.loads(plain.get(value, value)) for name, value in pairs}


def load_library(target: str) -> None:
    """The engine's code is the engine's, not the bundle's."""
    if target == "openvino":
        from mammut_runtime.engines.openvino import devices

        devices()
    else:
        from mammut_runtime.engines.onnxruntime import library

        library()


def memory() -> dict[str, int]:
    """Bytes of this process: Rss resident, Pss with its share of what others use too, Anonymous not from files."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()
    wanted = ("Rss:", "Pss:", "Anonymous:")
    return {line.split()[0][:-1]: int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)}


def show(row: dict[str, Any]) -> None:
    name = f"{row['bundle']} ({row['target']}, {row['precision']}) {row['settings']}".rstrip()
    print(
        f"{name:<44}{row['unique_weight_bytes'] / 1e6:8.0f}{row['resident_bytes'] / 1e6:9.0f}{row['ratio']:6.2f}"
        f"{row['anonymous_bytes'] / 1e6:10.0f}{row['anonymous_ratio']:6.2f}{row['open_s']:8.2f}{row['encode_ms']:10.1f}"
        f"{row['text_64_ms']:9.0f}{row['tokens_per_s']:9.1f}{row['beams_3_ms']:8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        raise SystemExit("error: only Linux tells what memory is made of (/proc/self/smaps_rollup)")
    main()
