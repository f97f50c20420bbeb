"""`mammut-train detect` and `detect-eval`: a thin shell over mammut/detection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mammut_runtime import console
from mammut_runtime.errors import InputError

if TYPE_CHECKING:
    from mammut.checkpoint import Checkpoint
    from mammut.detection.config import DetectorConfig
    from mammut.detection.feeding import Fed
    from mammut.detection.samples import BoxedSet
    from mammut.detection.training import Evaluate

BOXES = "coco:FILE.json:IMAGES or lvis:FILE.json:IMAGES, with =SHARE behind it for other than equal shares. Repeatable."
MOST_SHARE = 1e6


@click.command("detect")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--boxes", multiple=True, metavar="FORM:FILE:IMAGES", help=BOXES)
@click.option("--scenes", type=click.Path(path_type=Path), help="Also compose scenes from the DATA folder of the demo.")
@click.option("--scenes-share", type=click.FloatRange(0, MOST_SHARE, min_open=True), default=1.0, show_default=True)
@click.option("--novel", multiple=True, metavar="NAME", help="Train no boxes of this name. Repeatable.")
@click.option("--templates", multiple=True, metavar="TEXT", help="A prompt with {}. Default: the checkpoint's.")
@click.option("--image-size", type=int, help="Side of the detector's input, pixels. Default: by the model's size.")
@click.option("--steps", type=click.IntRange(1), help="Length of the run.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop then; without --steps: train so long.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True)
@click.option("--trunk-rate", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="The encoder learns at this share of the rate; 0: it is frozen.")  # fmt: skip
@click.option("--muon", type=click.FloatRange(0), default=0.0, help="Muon for an encoder that learns, times the rate.")
@click.option("--bfloat16", is_flag=True, help="Compute in bfloat16 where that is safe.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
              help="Of the weights in the checkpoint.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--evaluate", is_flag=True, help="With --scenes: also log AP50 on held-out scenes whenever it is saved.")
@click.option("--resume", is_flag=True, help="Go on from OUT, if there is something.")
def detect(checkpoint: str, out: Path, **given: Any) -> int:
    """Train a detector on CHECKPOINT's encoder; OUT/checkpoint gets the model with it.

    Names that are --novel, rare in LVIS, or kept for judging among the scenes, are trained without boxes: they are
    then found by what the model knows of words alone.
    """
    from mammut.checkpoint import load_checkpoint
    from mammut.detection.training import DetectRun, train_detector
    from mammut.training.optimizers import OptimizerOptions

    start = load_checkpoint(checkpoint)
    config = _config(start, given["templates"], given["image_size"])
    feeds, novel = _feeds(config, **{key: given[key] for key in ("boxes", "scenes", "scenes_share", "novel")})
    optimizer = OptimizerOptions(weight_decay=0.02, beta2=0.98, average=0.998, muon=given["muon"])
    run = DetectRun(
        steps=given["steps"], minutes=given["minutes"], batch_size=given["batch_size"],
        learning_rate=given["learning_rate"], optimizer=optimizer, trunk_rate=given["trunk_rate"],
        autocast="bfloat16" if given["bfloat16"] else "none", device=_device(given["device"]), dtype=given["dtype"],
        seed=given["seed"],
    )  # fmt: skip
    evaluate = _scene_figures(given["scenes"], config) if given["evaluate"] else None
    folder = train_detector(
        start, config, feeds, novel, run, out, resume=given["resume"], note=lambda m: click.echo(m, err=True),
        evaluate=evaluate,
    )  # fmt: skip
    click.echo(str(folder))
    return 0


@click.command("detect-eval")
@click.argument("checkpoint")
@click.option("--boxes", multiple=True, metavar="FORM:FILE:IMAGES", help="coco:FILE:FOLDER or lvis:... Repeatable.")
@click.option("--scenes", type=click.Path(path_type=Path), help="Held-out scenes from the DATA folder of the demo.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Scenes of each kind.")
def detect_eval(checkpoint: str, boxes: tuple[str, ...], scenes: Path | None, count: int) -> None:
    """Print the detection figures of a checkpoint's model card, as JSON."""
    from mammut.checkpoint import load_checkpoint
    from mammut.detection.judge import SceneJudge, box_figures

    if not boxes and scenes is None:
        raise InputError("detect-eval: expected --boxes or --scenes, or both")
    loaded = load_checkpoint(checkpoint)
    found: dict[str, Any] = {"checkpoint_sha256": loaded.sha256}
    if scenes is not None:
        size = loaded.detector.config.image_size if loaded.detector else 192
        found["scenes"] = SceneJudge(scenes, count, size).figures(loaded)
    for spec in boxes:
        found[spec] = box_figures(loaded, spec)
    console.echo_json(found)


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise InputError("--device cuda: PyTorch finds none here; use cpu")
    return "cuda" if there and wanted != "cpu" else "cpu"


def _config(start: Checkpoint, templates: tuple[str, ...], image_size: int | None) -> DetectorConfig:
    from mammut.detection.config import checked, detector_for

    if start.detector is not None:
        config = start.detector.config
    else:
        config = detector_for(start.model.config, tuple(start.prompts["zero_shot"].split("\n")))
    config = replace(config, templates=templates) if templates else config
    return checked(config if image_size is None else replace(config, image_size=image_size))


def _feeds(
    config: DetectorConfig, boxes: tuple[str, ...], scenes: Path | None, scenes_share: float, novel: tuple[str, ...]
) -> tuple[list[Fed], frozenset[str]]:
    """What is trained on, and the names that are held out."""
    from mammut.detection.feeding import Fed, Jitter, SetSource

    sets = [_boxed(spec) for spec in boxes]
    held = set(novel)
    for boxed, _ in sets:
        held |= {name for name, frequency in boxed.frequency.items() if frequency == "r"}
    feeds = [Fed(SetSource(boxed), share, Jitter(0.5, 1.6)) for boxed, share in sets]
    if scenes is not None:
        from mammut.demo.scenes import SCENE_NOVEL
        from mammut.detection.scene_source import training_scenes

        others = tuple(name for boxed, _ in sets for name in boxed.names)
        feeds.append(
            Fed(training_scenes(scenes, config.image_size, others), scenes_share, Jitter(0.7, 1.4, mosaic=0.4))
        )
        held |= SCENE_NOVEL
    if not feeds:
        raise InputError("detect: nothing to train on; expected --boxes or --scenes, or both")
    unknown = sorted(set(novel) - {name for fed in feeds for name in fed.source.names} - (held - set(novel)))
    if unknown:
        raise InputError(f"--novel {unknown[0]}: no name of the boxes; write it as the file of boxes does")
    return feeds, frozenset(held)


def _boxed(spec: str) -> tuple[BoxedSet, float]:
    from mammut.detection.box_specs import parse_box_spec

    plain, equals, share = spec.rpartition("=")
    try:
        weight = float(share) if equals else 1.0
    except ValueError:
        plain, equals, weight = spec, "", 1.0
    if not 0 < weight <= MOST_SHARE:
        raise InputError(f"{spec}: expected a share above 0, up to {MOST_SHARE:,.0f}")
    parsed = parse_box_spec(plain if equals else spec)
    file = parsed.read()
    for line in file.counts.lines():
        click.echo(f"{file.path}: {line}", err=True)
    if not any(len(picture.boxes) for picture in file.pictures):
        raise InputError(f"{file.path}: has no boxes; expected pictures with boxes to train on")
    return file.boxed_set(parsed.images or parsed.file.parent), weight


def _scene_figures(data: Path | None, config: DetectorConfig) -> Evaluate:
    from mammut.detection.judge import SceneJudge

    if data is None:
        raise InputError("--evaluate: needs --scenes")
    judge = SceneJudge(data, 60, config.image_size)
    sets = judge.sets()
    return lambda checkpoint: judge.figures(checkpoint, sets)
