"""Detection: where the time goes, what more names cost, and what a changed vocabulary costs.

    python benchmarks/bench_detect.py                                    about 20 minutes; nothing else should run
    python benchmarks/bench_detect.py --bundle build/demo-bundle --threads 1 --repeats 3   a first look

Models: the shipped demo, and openMaMMUT B-32 in size with random weights and the detector that suits it (its boxes are
nonsense, their cost is not); a demo without a detector gets a random one too. float32, one picture of 640x480, medians
after warm-up, one process for each measurement. Bundles are made by mammut-export in build/bench and kept there.

    square     the picture into the detector's square
    encode     the picture encoder at the detector's size        } parts of the one graph, with one name: each is timed
    proposals  the pyramid and where things may be               } by running the graph up to its end, so that the sum
    heads      what is there: boxes, embeddings, scores          } is a little more than the whole
    graph      all of it, for 1, 20, 365 and 1203 names
    boxes      scores to boxes: suppression of overlaps, at the bundle's threshold, and for everything (threshold 0)
    detect     all that model.detect does
    change     a vocabulary with one new name among known ones; and all names new, per name

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_runtime import FOLDER, tool, write_random_checkpoint
from measuring import Timing, child, peak_megabytes, print_surroundings, surroundings, timed

NAMES = (1, 20, 365, 1203)
STAGES = ("encode", "proposals", "heads")
EXPECTED_PICTURES_PER_S, EXPECTED_NAMES = 10.0, 1.3
_MARKS = {"pyramid": 1, "propose": 1, "places": 1, "sides": 1} | {"regions": 2, "background": 2, "log_scale": 2}
"""What names of weights have in them -> number of their stage; all others are the encoder's."""
_FIRST = """red green blue black white old new small large wooden round open broken wet""".split()  # noqa: SIM905
_THINGS = """
car dog cat bird cup chair table tree house boat train bag hat shoe book lamp clock phone bottle plate fork spoon knife
bowl apple pear banana cake bed sofa door window wheel bicycle truck bus horse cow sheep fish ball kite bear elephant
zebra giraffe bench sign light hydrant meter backpack umbrella tie suitcase frisbee ski board glove racket glass pizza
sandwich orange carrot plant screen mouse remote keyboard oven sink fridge vase scissors toy brush drum flute guitar
piano ladder rope bucket hammer
""".split()  # noqa: SIM905


@click.command(help=__doc__)
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path, exists=True), help="One or more.")
@click.option("--models", default="demo,B-32", help="Without --bundle: of demo and the openMaMMUT sizes.")
@click.option("--threads", default="1,4", help="Comma-separated.")
@click.option("--repeats", type=click.IntRange(1), default=20)
@click.option("--one", type=int, hidden=True, help="Measure one bundle, with so many threads, in this process.")
def main(bundles: tuple[Path, ...], models: str, threads: str, repeats: int, one: int | None) -> None:
    if one is not None:
        print(json.dumps(measured(bundles[0], one, repeats)))
        return
    about = surroundings()
    print_surroundings(about)
    print(f"float32, one picture of 640x480, {repeats} repeats after warm-up, medians in ms\n")
    named = {each.name: each for each in bundles} or {name: prepared(name) for name in models.split(",")}
    rows = []
    for name, bundle in named.items():
        for count in map(int, threads.split(",")):
            own = ["--bundle", str(bundle), "--one", str(count), "--repeats", str(repeats)]
            rows.append({"model": name, **child([__file__, *own], count)})
            show(rows[-1])
    print(json.dumps({"benchmark": "detect", **about, "repeats": repeats, "rows": rows}))


def prepared(name: str) -> Path:
    """The bundle, with a detector; made where it is missing."""
    from mammut_runtime.bundle import Bundle
    from mammut_runtime.errors import BundleError

    bundle = FOLDER / f"{name}-detector-bundle"
    try:
        if "detector" in Bundle.open(bundle).manifest.graphs:
            return bundle
    except BundleError:
        pass
    checkpoint = _with_detector(name)
    options = ["--target", "onnxruntime", "--overwrite"]
    subprocess.run([tool("mammut-export"), checkpoint, str(bundle), *options], check=True, stdout=sys.stderr)
    return bundle


def _with_detector(name: str) -> str:
    """A checkpoint with a detector: the demo's own, or a random one on it."""
    from mammut.checkpoint import load_checkpoint, save_checkpoint
    from mammut.detection.config import detector_for
    from mammut.detection.detector import Detector

    source = "demo"
    if name != "demo":
        source = str(FOLDER / f"{name}-checkpoint")
        if not Path(source, "config.json").exists():
            write_random_checkpoint(name, Path(source))
    found = load_checkpoint(source)
    if found.detector is not None:
        return source
    templates = tuple(found.prompts.get("zero_shot", "{}").split("\n"))
    detector = Detector(detector_for(found.model.config, templates), found.model)
    folder = FOLDER / f"{name}-detector-checkpoint"
    save_checkpoint(folder, found.model, found.tokenizer_json, found.preprocess, found.prompts, detector=detector)
    return str(folder)


def measured(path: Path, threads: int, repeats: int) -> dict[str, Any]:
    """All figures of one bundle, in this process."""
    import cv2

    from mammut_runtime.canary import canary_picture
    from mammut_runtime.engines import EngineOptions
    from mammut_runtime.model import Model

    cv2.setNumThreads(threads)
    picture = canary_picture(1, (480, 640))
    with Model.load(path, EngineOptions(threads=threads)) as model:
        detector = model.detector
        row: dict[str, Any] = {
            "threads": threads,
            "size": detector.rule.size,
            "proposals": detector.rule.proposals,
            "square_ms": timed(lambda: detector.square(picture, "rgb"), repeats).median_ms,
            "stages_ms": stages_ms(path, detector.rule.size, threads, repeats),
            "change_ms": {},
            "names": {},
        }
        square = detector.square(picture, "rgb")
        names = all_names()
        model.detect(picture, model.vocabulary(names[:1], context=False))
        row["memory_mb"] = {"1": peak_megabytes()}
        for count in NAMES:
            embedded = timed(lambda n=count: model.vocabulary(names[:n], context=False), 1, warm_up=0)  # type: ignore[misc]
            words = model.vocabulary(names[:count], context=False)
            boxes, scores = detector.proposals([square], words)
            wanted = (square, boxes[0], scores[0], words)
            row["names"][str(count)] = {
                "graph_ms": _ms(timed(lambda w=words: detector.proposals([square], w), repeats)),  # type: ignore[misc]
                "boxes_ms": _ms(timed(lambda w=wanted: detector.found(*w), repeats)),  # type: ignore[misc]
                "boxes_all_ms": _ms(timed(lambda w=wanted: detector.found(*w, threshold=0.0), repeats)),  # type: ignore[misc]
                "detect_ms": _ms(timed(lambda w=words: model.detect(picture, w), repeats)),  # type: ignore[misc]
                "detections": len(model.detect(picture, words)),
            }
            if count == NAMES[-1]:
                row["change_ms"]["all_new_per_name"] = embedded.median_ms / (NAMES[-1] - NAMES[-2])
        fresh = itertools.count()
        changed = timed(lambda: model.vocabulary([*names[:19], f"new thing {next(fresh)}"], context=False), repeats)
        row["change_ms"]["one_of_20"] = changed.median_ms
        row["change_ms"]["none_new_of_1203"] = timed(lambda: model.vocabulary(names), repeats).median_ms
        row["memory_mb"]["1203"] = peak_megabytes()
    return row


def all_names() -> list[str]:
    """1203 different names of one and two words."""
    pairs = (f"{colour} {thing}" for thing in _THINGS for colour in _FIRST)
    return list(dict.fromkeys([*_THINGS, *pairs]))[: NAMES[-1]]


def stages_ms(bundle: Path, size: int, threads: int, repeats: int) -> dict[str, float]:
    """What the parts of the graph take, with one name: differences of the graph cut off after each of them.

    Empty where the weights' names do not tell the parts, or onnx is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return {}
    model = onnx.load(str(bundle / "detector.onnx"), load_external_data=False)
    stages, last = _stage_of_nodes(model.graph), {}
    if set(stages) != {0, 1, 2}:
        return {}
    for value, used in _crossings(model.graph, stages):
        last.setdefault(used, []).append(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    width = next(each for each in model.graph.input if each.name == "classes").type.tensor_type.shape.dim[1].dim_value
    feeds = {
        "pixels": np.zeros((1, 3, size, size), np.float32),
        "classes": np.full((1, width), width**-0.5, np.float32),
        "novel": np.ones(1, np.float32),
    }
    ends: list[float] = []
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        for stage in range(len(STAGES)):
            cut = Path(folder) / "cut.onnx"
            _cut(bundle, model, last.get(stage), cut)
            session = onnxruntime.InferenceSession(str(cut), options, providers=["CPUExecutionProvider"])
            given = {each.name: feeds[each.name] for each in session.get_inputs()}
            ends.append(timed(lambda s=session, g=given: s.run(None, g), repeats).fastest_ms)  # type: ignore[misc]
    return dict(zip(STAGES, np.diff([0.0, *ends]).tolist(), strict=True))


def _stage_of_nodes(graph: Any) -> list[int]:
    """For each node the latest stage that something it needs belongs to."""
    stage_of = {
        each.name: next((stage for mark, stage in _MARKS.items() if mark in each.name), 0) for each in graph.initializer
    }
    stages = []
    for node in graph.node:
        stages.append(max((stage_of.get(name, 0) for name in node.input), default=0))
        stage_of |= dict.fromkeys(node.output, stages[-1])
    return stages


def _crossings(graph: Any, stages: list[int]) -> list[tuple[str, int]]:
    """Values that a later stage takes from an earlier one, with the stage that makes them."""
    made = {name: stage for node, stage in zip(graph.node, stages, strict=True) for name in node.output}
    found = {
        (name, made[name])
        for node, stage in zip(graph.node, stages, strict=True)
        for name in node.input
        if name in made and made[name] < stage
    }
    return sorted(found)


def _cut(bundle: Path, model: Any, outputs: list[str] | None, target: Path) -> None:
    """The graph up to `outputs` (None: all of it), with its weights inside."""
    import onnx

    whole = onnx.load(str(bundle / "detector.onnx"))
    if outputs is not None:
        inferred = onnx.shape_inference.infer_shapes(whole)
        kept = onnx.utils.Extractor(inferred).extract_model([each.name for each in model.graph.input], outputs)
        whole = kept
    onnx.save(whole, str(target))


def _ms(timing: Timing) -> float:
    return timing.median_ms


def show(row: dict[str, Any]) -> None:
    """The figures for people, with what is expected of them."""
    print(f"{row['model']}, {row['threads']} thread(s), {row['size']} pixels, {row['proposals']} proposals")
    print(f"  {'square':<28}{row['square_ms']:>10.2f}")
    for stage, ms in row["stages_ms"].items():
        print(f"  {stage:<28}{ms:>10.2f}")
    print(f"  {'names':<28}{''.join(f'{count:>10}' for count in row['names'])}")
    for key, label in (
        ("graph_ms", "graph"),
        ("boxes_ms", "boxes"),
        ("boxes_all_ms", "boxes, threshold 0"),
        ("detect_ms", "detect"),
    ):
        print(f"  {label:<28}{''.join(f'{each[key]:>10.2f}' for each in row['names'].values())}")
    change = row["change_ms"]
    print(f"  {'change: one new of 20':<28}{change['one_of_20']:>10.2f}")
    print(f"  {'change: none new of 1203':<28}{change['none_new_of_1203']:>10.2f}")
    print(f"  {'all new, per name':<28}{change['all_new_per_name']:>10.2f}")
    print(f"  {'peak memory, MB':<28}{row['memory_mb']['1']:>10.0f} with 1203 names {row['memory_mb']['1203']:.0f}")
    detect = {count: each["detect_ms"] for count, each in row["names"].items()}
    lines = [
        (
            "1203 names over 1",
            detect["1203"] / detect["1"],
            f"<= {EXPECTED_NAMES}",
            detect["1203"] / detect["1"] <= 1.3,
        ),
        ("one new name over a frame", change["one_of_20"] / detect["20"], "<= 1", change["one_of_20"] <= detect["20"]),
    ]
    if row["model"].startswith("demo") and row["threads"] == 4:
        rate = 1000 / detect["20"]
        lines.append(("pictures a second", rate, f">= {EXPECTED_PICTURES_PER_S}", rate >= EXPECTED_PICTURES_PER_S))
    for label, value, wanted, passes in lines:
        print(f"  {label:<28}{value:>10.2f}     expected {wanted}: {'pass' if passes else 'FALLS SHORT'}")
    print(flush=True)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    main()
