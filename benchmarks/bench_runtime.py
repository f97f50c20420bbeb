"""The runtime against PyTorch without a cache, and against what memory allows: the figures of README, in one run.

    python benchmarks/bench_runtime.py                       about half an hour; nothing else should run meanwhile
    python benchmarks/bench_runtime.py --models demo --repeats 3 --threads 2     a first look

Models: openMaMMUT B-32 and S-32 in size, with random weights (their captions are nonsense, their cost is not),
and the shipped demo. float32, one picture, medians after warm-up, one process per measurement. Bundles are made by
mammut-export in build/bench and kept there. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
from measuring import ROOT, child, print_surroundings, surroundings

FOLDER = ROOT / "build" / "bench"
MEASURE = str(Path(__file__).parent / "measure_one.py")
MODELS = ("demo", "S-32", "B-32")
EXPECTED_CAPTION, EXPECTED_TEXTS, EXPECTED_SIZE = 4.0, 2.0, 1.05


@click.command(help=__doc__)
@click.option("--models", default=",".join(MODELS), help="Comma-separated, of demo and the openMaMMUT sizes.")
@click.option("--threads", default="1,4", help="Comma-separated.")
@click.option("--repeats", type=click.IntRange(1), default=20)
def main(models: str, threads: str, repeats: int) -> None:
    about = surroundings()
    print_surroundings(about)
    print(f"float32, batch 1, {repeats} repeats after warm-up, medians in ms; files are in the system's cache\n")
    counts = [int(each) for each in threads.split(",")]
    bandwidth = {count: child([MEASURE, "bandwidth", "-", str(count), "9"], count) for count in counts}
    rows = []
    for name in models.split(","):
        checkpoint, bundle = prepared(name)
        size = bundle_size(bundle)
        for count in counts:
            row = {
                "model": name,
                "threads": count,
                "runtime": child([MEASURE, "runtime", str(bundle), str(count), str(repeats)], count),
                "reference": child([MEASURE, "reference", checkpoint, str(count), str(repeats)], count),
                "cold_start_s": cold_start_s(bundle, count, 5),
                **size,
            }
            row |= bound(row, bandwidth[count]["read_gb_per_s"])
            rows.append(row)
            show(row)
    about["read_gb_per_s"] = {str(count): each["read_gb_per_s"] for count, each in bandwidth.items()}
    print(json.dumps({"benchmark": "runtime", **about, "repeats": repeats, "rows": rows}))


def prepared(name: str) -> tuple[str, Path]:
    """The checkpoint and its bundle; both are made where they are missing."""
    bundle = FOLDER / f"{name}-bundle"
    checkpoint = "demo" if name == "demo" else str(FOLDER / f"{name}-checkpoint")
    if name != "demo" and not Path(checkpoint, "config.json").exists():
        write_random_checkpoint(name, Path(checkpoint))
    if not usable(bundle):
        options = ["--target", "onnxruntime", "--overwrite"]
        subprocess.run([tool("mammut-export"), checkpoint, str(bundle), *options], check=True, stdout=sys.stderr)
    return checkpoint, bundle


def usable(bundle: Path) -> bool:
    """Whether it is there, and of this version."""
    from mammut_runtime.bundle import Bundle
    from mammut_runtime.errors import BundleError

    try:
        return "vision" in Bundle.open(bundle).manifest.graphs
    except BundleError:
        return False


def write_random_checkpoint(size: str, folder: Path) -> None:
    """An openMaMMUT of this size as it is before training, except that the head is not all zeros."""
    import torch

    from mammut.checkpoint import OPENMAMMUT_PROMPTS, save_checkpoint
    from mammut.clip_tokenizer import build_clip_tokenizer
    from mammut.model import Mammut
    from mammut.openmammut import CLIP_MEAN, CLIP_STD
    from mammut.presets import openmammut
    from mammut_runtime.preprocess import PreprocessRule

    torch.manual_seed(0)
    model = Mammut(openmammut(size))
    rule = PreprocessRule(224, CLIP_MEAN, CLIP_STD, "bicubic", "shortest", 0)
    save_checkpoint(folder, model, build_clip_tokenizer(), rule, OPENMAMMUT_PROMPTS)


def bundle_size(bundle: Path) -> dict[str, Any]:
    """Bytes of the bundle, of its unique weights, and of the weights that one decoder step reads."""
    import onnx

    from mammut_runtime.bundle import Bundle

    manifest = Bundle.open(bundle, verify=False).manifest
    graph = onnx.load(str(bundle / "decoder.onnx"), load_external_data=False).graph
    sizes = {each.name: _tensor_bytes(each) for each in graph.initializer}
    # An embedding table is looked up, not read: one row a token. If the head is the same table, it is read by a MatMul.
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    read = {name for node in graph.node for name in node.input if not (node.op_type == "Gather" and name in looked_up)}
    total = sum(path.stat().st_size for path in bundle.iterdir())
    unique = manifest.model.parameters * 4
    return {
        "bundle_mb": total / 1e6,
        "unique_weights_mb": unique / 1e6,
        "bundle_over_unique": total / unique,
        "step_reads_mb": sum(size for name, size in sizes.items() if name in read) / 1e6,
    }


def _tensor_bytes(tensor: Any) -> int:
    import onnx

    count = 1
    for size in tensor.dims:
        count *= size
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def cold_start_s(bundle: Path, threads: int, repeats: int) -> float:
    """From starting `mammut-run` to its end with one caption of 20 tokens: every hash checked, files in the cache."""
    import cv2

    from mammut_runtime.canary import canary_picture

    picture = FOLDER / "picture.png"
    cv2.imwrite(str(picture), canary_picture(1, (480, 640)))
    options = ["--bundle", str(bundle), "--threads", str(threads), "--beams", "1", "--min-tokens", "19"]
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(
            [tool("mammut-run"), "caption", str(picture), "--max-tokens", "20", *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def bound(row: dict[str, Any], read_gb_per_s: float) -> dict[str, Any]:
    """How fast a step could be if it did nothing but read its weights, and how the runtime compares with PyTorch."""
    runtime, reference = row["runtime"], row["reference"]
    bound_ms = row["step_reads_mb"] / read_gb_per_s
    reference_caption_ms = reference["encode_and_caption_ms"] - reference["encode_ms"]
    return {
        "step_bound_ms": bound_ms,
        "step_over_bound": runtime["step_ms"] / bound_ms,
        "reference_caption_ms": reference_caption_ms,
        "caption_speedup": reference_caption_ms / runtime["caption_ms"],
        "picture_to_caption_speedup": reference["encode_and_caption_ms"]
        / (runtime["encode_ms"] + runtime["caption_ms"]),
        "texts_speedup": reference["text_64_ms"] / runtime["text_64_ms"],
        "texts_speedup_no_vocabulary": reference["text_64_no_vocabulary_ms"] / runtime["text_64_ms"],
    }


def show(row: dict[str, Any]) -> None:
    runtime, reference = row["runtime"], row["reference"]
    print(f"{row['model']}, {row['threads']} thread(s)              runtime   PyTorch, no cache")
    for label, ours, theirs in (
        ("picture encode", runtime["encode_ms"], reference["encode_ms"]),
        ("text tower, 1 prompt", runtime["text_1_ms"], reference["text_1_ms"]),
        ("text tower, 64 prompts", runtime["text_64_ms"], reference["text_64_ms"]),
        ("caption, 20 tokens", runtime["caption_ms"], row["reference_caption_ms"]),
        ("the same, 3 beams", runtime["caption_beams_3_ms"], None),
        ("peak memory, MB", runtime["peak_memory_mb"], reference["peak_memory_mb"]),
        ("the same after 64 prompts", runtime["peak_memory_with_texts_mb"], reference["peak_memory_with_texts_mb"]),
    ):
        print(f"  {label:<28}{ours:>10.1f}{'' if theirs is None else f'{theirs:>12.1f}'}")
    print(f"  {'tokens per second':<28}{runtime['tokens_per_s']:>10.1f}")
    print(f"  {'cold start to caption, s':<28}{row['cold_start_s']:>10.2f}")
    print(
        f"  a step reads {row['step_reads_mb']:.1f} MB: at least {row['step_bound_ms']:.2f} ms at the memory's speed, "
        f"took {runtime['step_ms']:.2f} ms ({row['step_over_bound']:.2f} x)"
    )
    for label, value, wanted, enough in (
        ("caption against PyTorch", row["caption_speedup"], f">= {EXPECTED_CAPTION}", EXPECTED_CAPTION),
        ("64 prompts against PyTorch", row["texts_speedup"], f">= {EXPECTED_TEXTS}", EXPECTED_TEXTS),
        ("bundle over unique weights", row["bundle_over_unique"], f"<= {EXPECTED_SIZE}", None),
    ):
        passes = value <= EXPECTED_SIZE if enough is None else value >= enough
        print(f"  {label:<28}{value:>10.3f} x   expected {wanted}: {'pass' if passes else 'FALLS SHORT'}")
    print(
        f"  picture to caption with the encoding {row['picture_to_caption_speedup']:.2f} x; 64 prompts against PyTorch "
        f"without vocabulary logits {row['texts_speedup_no_vocabulary']:.2f} x\n",
        flush=True,
    )


def tool(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    main()
