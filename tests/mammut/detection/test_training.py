"""`mammut-train detect` on a tiny model and a few coloured squares, from COCO and LVIS files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mammut.commands import cli
from mammut.config import MammutConfig
from mammut.demo.scenes import SCENE_NAMES, SCENE_NOVEL
from mammut.detection import judge
from mammut.detection.box_specs import parse_box_spec
from mammut.detection.config import DetectorConfig
from mammut.detection.feeding import Fed, Jitter, SetSource, batches
from mammut.detection.training import STATE_FILE, DetectRun, _Work, train_detector
from mammut.model import Mammut
from mammut.openmammut import to_public
from mammut.presets import openmammut_config, tiny
from mammut.training.run_log import RunLog, read_log
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.preprocess import PreprocessRule

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not part of a clone")
COLOURS = {"red square": (30, 30, 220), "green square": (30, 200, 30), "blue square": (220, 60, 30)}
"""Blue, green, red."""


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    words = train_tokenizer([f"a {name}" for name in COLOURS] * 3, 600)
    rule = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)
    save_checkpoint(tmp_path / "start", Mammut(tiny(600)), words, rule, {"zero_shot": "{}\na {}"})
    return tmp_path / "start"


def write_boxes(folder: Path, form: str, pictures: int = 6) -> str:
    """Squares on grey; returns the spec of the file. In the LVIS file red ones are rare."""
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(1, pictures + 1):
        pixels = np.full((64, 72, 3), 128, np.uint8)
        shown = []
        for column in range(2):
            category = int(rng.integers(3))
            x, y, side = 4 + 36 * column + int(rng.integers(8)), int(rng.integers(5, 30)), int(rng.integers(14, 24))
            pixels[y : y + side, x : x + side] = list(COLOURS.values())[category]
            shown.append(category + 1)
            boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": category + 1,
                          "bbox": [x, y, side, side], "area": side * side, "iscrowd": 0})  # fmt: skip
        cv2.imwrite(str(folder / "pictures" / f"{number}.png"), pixels)
        image = {"id": number, "file_name": f"{number}.png", "width": 72, "height": 64}
        if form == "lvis":
            image |= {"coco_url": f"http://images.example/val/{number}.png", "not_exhaustive_category_ids": [],
                      "neg_category_ids": sorted({1, 2, 3} - set(shown))[:1]}  # fmt: skip
        images.append(image)
    categories = [
        {"id": place, "name": name} | ({"frequency": "rcf"[place - 1], "synset": name} if form == "lvis" else {})
        for place, name in enumerate(COLOURS, 1)
    ]
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return f"{form}:{folder / 'boxes.json'}:{folder / 'pictures'}"


def run(*arguments: object) -> None:
    assert cli.main([str(each) for each in arguments], standalone_mode=False) in (0, None)


def small(checkpoint: Checkpoint, make_config: Any) -> DetectorConfig:
    config: DetectorConfig = make_config(templates=tuple(checkpoint.prompts["zero_shot"].split("\n")))
    return config


@pytest.mark.parametrize("form", ["coco", "lvis"])
def test_command(form: str, start: Path, tmp_path: Path) -> None:
    spec = write_boxes(tmp_path / form, form)
    run("detect", start, tmp_path / "out", "--boxes", spec, "--steps", 3, "--batch-size", 2)
    found = load_checkpoint(tmp_path / "out" / "checkpoint")
    assert found.detector is not None
    names = sorted(COLOURS) if form == "coco" else ["blue square", "green square"]  # rare names get no boxes
    assert list(found.detector.config.base_names) == names
    assert found.detector.config.templates == ("{}", "a {}")
    before = load_checkpoint(start)
    for name, value in before.model.state_dict().items():  # float16 in the file
        torch.testing.assert_close(found.model.state_dict()[name], value.half().float(), rtol=0, atol=0)
    with pytest.raises(InputError, match="already holds a run"):
        run("detect", start, tmp_path / "out", "--boxes", spec, "--steps", 3, "--batch-size", 2)


def test_it_learns_and_resumes(start: Path, tmp_path: Path, make_config: Any) -> None:
    """Stopped and gone on with, a run ends where it would have; and it has learned."""
    checkpoint = load_checkpoint(start)
    parsed = parse_box_spec(write_boxes(tmp_path / "data", "coco"))
    assert parsed.images is not None
    feeds = [Fed(SetSource(parsed.read().boxed_set(parsed.images)), 1.0, Jitter(0.8, 1.2))]
    options = DetectRun(steps=16, minutes=None, batch_size=4, log_every=1)
    config = small(checkpoint, make_config)

    def trained(out: str, options: DetectRun, resume: bool = False) -> dict[str, torch.Tensor]:
        loaded = load_checkpoint(start)
        folder = train_detector(loaded, config, feeds, frozenset(), options, tmp_path / out, resume=resume)
        detector = load_checkpoint(folder).detector
        assert detector is not None
        return detector.own_state()

    whole = trained("whole", options)
    part = train_part(tmp_path / "part", start, config, feeds, options, steps=7)
    assert part == 7
    again = trained("part", options, resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    rows = read_log(tmp_path / "whole")
    assert [row["step"] for row in read_log(tmp_path / "part")] == [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    other = trained("other", replace(options, seed=1))  # the control
    assert any(not torch.equal(other[name], value) for name, value in whole.items())
    with pytest.raises(InputError, match="other run"):
        trained("part", replace(options, learning_rate=1.0), resume=True)


def train_part(out: Path, start: Path, config: DetectorConfig, feeds: list[Fed], options: DetectRun, steps: int) -> int:
    """The first steps of a run, saved as if it had been stopped there."""
    names = tuple(sorted({name for fed in feeds for name in fed.source.names}))
    work = _Work(load_checkpoint(start), replace(config, base_names=names), feeds, options, out, lambda message: None)
    feed = batches(feeds, names, config.image_size, config.fill, work.start.preprocess, batch_size=4, seed=0, start=0)
    with RunLog(out, 0, steps, tensorboard=False) as log:
        for _ in range(steps):
            losses, _, _ = work.train_step(next(feed))
            log.row({"step": work.step, **losses})
    feed.close()
    work.save()
    return work.step


def test_an_encoder_may_learn_slowly(start: Path, tmp_path: Path, make_config: Any) -> None:
    checkpoint = load_checkpoint(start)
    parsed = parse_box_spec(write_boxes(tmp_path / "data", "coco"))
    assert parsed.images is not None
    feeds = [Fed(SetSource(parsed.read().boxed_set(parsed.images)), 1.0, Jitter(0.8, 1.2))]
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    options = DetectRun(steps=2, minutes=None, batch_size=2, trunk_rate=0.1, names_a_step=2)
    train_detector(checkpoint, small(checkpoint, make_config), feeds, frozenset(), options, tmp_path / "out")
    after = checkpoint.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert "vision.blocks.0.qkv.weight" in changed
    assert "vision.positions" not in changed
    assert all(name.startswith("vision.") for name in changed)


def test_a_detector_is_trained_on(start: Path, tmp_path: Path) -> None:
    """Names of an earlier training stay known; with other sizes it begins anew."""
    spec = write_boxes(tmp_path / "data", "coco")
    few = ("--steps", 1, "--batch-size", 2, "--dtype", "float32")
    run("detect", start, tmp_path / "one", "--boxes", spec, *few, "--novel", "red square")
    first = tmp_path / "one" / "checkpoint"
    run("detect", first, tmp_path / "two", "--boxes", spec, *few, "--novel", "blue square", "--learning-rate", 1e-9)
    found, before = load_checkpoint(tmp_path / "two" / "checkpoint").detector, load_checkpoint(first).detector
    assert found is not None
    assert before is not None
    assert before.config.base_names == ("blue square", "green square")
    assert found.config.base_names == ("blue square", "green square", "red square")
    torch.testing.assert_close(found.own_state(), before.own_state(), atol=1e-5, rtol=1e-4)
    run("detect", first, tmp_path / "three", "--boxes", spec, *few, "--novel", "blue square", "--image-size", 224)
    other = load_checkpoint(tmp_path / "three" / "checkpoint").detector
    assert other is not None
    assert other.config.base_names == ("green square", "red square")


@pytest.mark.shared
@needs_data
def test_scenes(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line that trains the demo's detector, in small, and the one that judges it."""
    spec = write_boxes(tmp_path / "data", "coco")
    run("detect", start, tmp_path / "out", "--scenes", DATA, "--scenes-share", 2, "--boxes", spec, "--steps", 1,
        "--batch-size", 2)  # fmt: skip
    detector = load_checkpoint(tmp_path / "out" / "checkpoint").detector
    assert detector is not None
    assert set(detector.config.base_names) == (SCENE_NAMES - SCENE_NOVEL) | set(COLOURS)
    capsys.readouterr()
    run("detect-eval", tmp_path / "out" / "checkpoint", "--scenes", DATA, "--count", 2)
    figures = json.loads(capsys.readouterr().out)["scenes"]
    assert {"seen_ap50", "vendor_ap50", "novel_ap50", "novel_control_ap50"} <= set(figures)
    assert all(0 <= value <= 1 for value in figures.values())


def test_nothing_to_train_on(start: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        run("detect", start, tmp_path / "out", "--steps", 1)
    spec = write_boxes(tmp_path / "data", "coco")
    held = [part for name in COLOURS for part in ("--novel", name)]
    with pytest.raises(InputError, match="every name of the boxes is held out"):
        run("detect", start, tmp_path / "out", "--boxes", spec, "--steps", 1, *held)
    with pytest.raises(InputError, match="a number of steps, or minutes"):
        run("detect", start, tmp_path / "out", "--boxes", spec)


def test_eval_command(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_boxes(tmp_path / "data", "coco")
    run("detect", start, tmp_path / "out", "--boxes", f"{spec}=2.5", "--steps", 1, "--batch-size", 2)
    capsys.readouterr()
    run("detect-eval", tmp_path / "out" / "checkpoint", "--boxes", spec)
    figures = json.loads(capsys.readouterr().out)[spec]
    assert set(figures) == {"ap50", *COLOURS}
    assert 0 <= figures["ap50"] <= 1


def fed(spec: str) -> list[Fed]:
    parsed = parse_box_spec(spec)
    assert parsed.images is not None
    return [Fed(SetSource(parsed.read().boxed_set(parsed.images)), 1.0, Jitter(0.8, 1.2))]


def test_minutes_of_a_run_with_steps_are_of_each_sitting(start: Path, tmp_path: Path, make_config: Any) -> None:
    feeds = fed(write_boxes(tmp_path / "data", "coco"))
    config = small(load_checkpoint(start), make_config)
    options = DetectRun(steps=100_000, minutes=0.3 / 60, batch_size=2, log_every=1)
    done = []
    for resume in (False, True):
        train_detector(load_checkpoint(start), config, feeds, frozenset(), options, tmp_path / "out", resume=resume)
        done.append(read_log(tmp_path / "out")[-1]["step"])
    assert 0 < done[0] < done[1]
    whole = replace(options, steps=None)  # the control: without steps, the minutes are those of the whole run
    for resume in (False, True):
        train_detector(load_checkpoint(start), config, feeds, frozenset(), whole, tmp_path / "whole", resume=resume)
        done.append(read_log(tmp_path / "whole")[-1]["step"])
    assert done[2] == done[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 4128}, "image_size: expected a number from 32 to 4,096, got 4128"),
        ({"image_size": 0}, "image_size: expected a number from 32"),
        ({"templates": ("a {} {x}",)}, "expected {} once, for the name, and no other braces"),
        ({"base_names": ("x" * 319,)}, "base_names"),
        ({"base_names": tuple(f"thing {number}" for number in range(10_001))}, "base_names: expected 0 to 10,000"),
    ],
)
def test_what_could_not_be_loaded_is_not_trained(
    changes: dict[str, Any], message: str, start: Path, tmp_path: Path, make_config: Any
) -> None:
    checkpoint, feeds = load_checkpoint(start), fed(write_boxes(tmp_path / "data", "coco"))
    config = small(checkpoint, make_config)
    if names := changes.pop("base_names", None):
        source = feeds[0].source
        assert isinstance(source, SetSource)
        feeds = [replace(feeds[0], source=SetSource(replace(source.boxed, names=names)))]
    options = DetectRun(steps=1, minutes=None, batch_size=2)
    with pytest.raises(InputError) as caught:
        train_detector(checkpoint, replace(config, **changes), feeds, frozenset(), options, tmp_path / "out")
    assert message in str(caught.value)
    with pytest.raises(InputError, match="learning_rate"):
        train_detector(checkpoint, config, feeds, frozenset(), replace(options, learning_rate=11.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_of_0_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image_size: expected a number from 32"):
        run("detect", start, tmp_path / "out", "--boxes", write_boxes(tmp_path / "d", "coco"), "--image-size", 0)


def test_other_data_of_the_same_name_is_not_gone_on_with(start: Path, tmp_path: Path) -> None:
    spec, other = write_boxes(tmp_path / "one", "coco"), write_boxes(tmp_path / "two", "coco", pictures=5)
    few = ("--steps", 1, "--batch-size", 2)
    run("detect", start, tmp_path / "out", "--boxes", spec, *few)
    run("detect", start, tmp_path / "out", "--boxes", spec, *few, "--resume")  # control
    with pytest.raises(InputError, match="other data"):
        run("detect", start, tmp_path / "out", "--boxes", other, *few, "--resume")


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, **changes}


DAMAGE: list[Callable[[dict[str, Any]], Any]] = [
    lambda state: [1, 2], lambda state: torch.zeros(2), _without("settings"), _without("step"), _without("own"),
    _without("watch"), _without("optimizers"), _with(settings=3), _with(settings={}), _with(step=-1),
    _with(step="3"), _with(elapsed_s=float("nan")), _with(watch=[1.0]), _with(watch=3), _with(own=[]),
    _with(average=[]), _with(average=[3]), _with(optimizers=[]), _with(optimizers=[3]), _with(trunk={"a": 1}),
    _with(code=None), lambda state: {**state, "average": [value[..., None] for value in state["average"]]},
    lambda state: {**state, "optimizers": [{**state["optimizers"][0], "param_groups": []}]},
]  # fmt: skip


def test_a_damaged_state_is_one_error(start: Path, tmp_path: Path, make_config: Any) -> None:
    feeds = fed(write_boxes(tmp_path / "data", "coco"))
    config = small(load_checkpoint(start), make_config)
    options = DetectRun(steps=3, minutes=None, batch_size=4)
    train_part(tmp_path / "out", start, config, feeds, options, steps=2)
    config = replace(config, base_names=tuple(sorted(COLOURS)))
    file = tmp_path / "out" / STATE_FILE
    good = torch.load(file, weights_only=True)

    def load() -> int:
        work = _Work(load_checkpoint(start), config, feeds, options, tmp_path / "out", lambda message: None)
        work.load()
        return work.step

    assert load() == 2  # control
    for damage in DAMAGE:
        torch.save(damage(good), file)
        with pytest.raises(CheckpointError, match=r"state\.pt: damaged .*; remove it to begin again"):
            load()
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load()


def test_an_encoder_that_learns_resumes(start: Path, tmp_path: Path, make_config: Any) -> None:
    feeds = fed(write_boxes(tmp_path / "data", "coco"))
    config = small(load_checkpoint(start), make_config)
    options = DetectRun(steps=6, minutes=None, batch_size=4, trunk_rate=0.1, dtype="float32")

    def trained(out: str, resume: bool = False) -> dict[str, torch.Tensor]:
        folder = train_detector(
            load_checkpoint(start), config, feeds, frozenset(), options, tmp_path / out, resume=resume
        )
        return load_checkpoint(folder).model.state_dict()

    whole = trained("whole")
    train_part(tmp_path / "part", start, config, feeds, options, steps=3)
    again = trained("part", resume=True)
    before = load_checkpoint(start).model.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in whole.items())  # control: it did learn
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def changed_file(spec: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = parse_box_spec(spec).file
    row = json.loads(file.read_text())
    change(row)
    file.write_text(json.dumps(row))


def test_what_is_said_of_boxes(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, few = write_boxes(tmp_path / "data", "coco"), ("--steps", 1, "--batch-size", 2)
    run("detect", start, tmp_path / "one", "--boxes", spec, *few)  # control
    assert "were cut" not in capsys.readouterr().err
    for share in ("nan", "inf", "0", "-1"):
        with pytest.raises(InputError, match="expected a share above 0"):
            run("detect", start, tmp_path / "two", "--boxes", f"{spec}={share}", *few)
    with pytest.raises(InputError, match="--novel zebra: no name of the boxes"):
        run("detect", start, tmp_path / "two", "--boxes", spec, *few, "--novel", "zebra")
    changed_file(spec, lambda row: row["annotations"][0].update(bbox=[-5, 4, 20, 20]))
    run("detect", start, tmp_path / "two", "--boxes", spec, *few)
    assert "1 of 12 boxes were cut at their picture's edge" in capsys.readouterr().err
    changed_file(spec, lambda row: [image.update(width=90) for image in row["images"]])
    with pytest.raises(InputError, match="has 72 x 64 pixels and its record says 90 x 64"):
        run("detect", start, tmp_path / "three", "--boxes", spec, *few)
    changed_file(spec, lambda row: row.update(annotations=[]))
    with pytest.raises(InputError, match="has no boxes"):
        run("detect", start, tmp_path / "three", "--boxes", spec, *few)


def test_judged_pictures_are_read_in_batches(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_boxes(tmp_path / "data", "coco")
    run("detect", start, tmp_path / "out", "--boxes", spec, "--steps", 1, "--batch-size", 2)
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoint")
    whole = judge.box_figures(checkpoint, spec)
    sizes: list[int] = []
    find = judge.find

    def watched(detector: Any, images: Any, *rest: Any) -> Any:
        sizes.append(len(images))
        return find(detector, images, *rest)

    monkeypatch.setattr(judge, "find", watched)
    monkeypatch.setattr(judge, "AT_ONCE", 4)
    assert judge.box_figures(checkpoint, spec) == whole
    assert sizes == [4, 2]


def public_config(folder: Path, config: MammutConfig) -> None:
    vision, text = config.vision, config.text
    model = {
        "custom_text": True,
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": vision.image_size, "layers": vision.layers, "width": vision.width,
            "head_width": vision.width // vision.heads, "patch_size": vision.patch_size, "pool_type": "avg_all",
            "final_ln_after_pool": True,
        },
        "text_cfg": {
            "vocab_size": text.vocab_size, "width": text.width, "heads": text.heads, "layers": text.layers,
            "cross_attn_ratio": 2, "does_full_decoding": True, "has_mlp": text.mlp_in_crossed_blocks,
        },
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))


def test_an_openmammut_checkpoint_gets_a_detector(tmp_path: Path) -> None:
    """From the public form to a detector: two steps, and what was written is loaded."""
    folder = tmp_path / "public"
    folder.mkdir()
    config = openmammut_config(
        name="tiny-public", image_size=32, patch_size=8, vision=(2, 32, 2, 128), text=(4, 24, 2),
        mlp_in_crossed_blocks=False, vocab_size=600, embedding_rows=600,
    )  # fmt: skip
    torch.manual_seed(0)
    words = train_tokenizer([f"a {name}" for name in COLOURS] * 3, 600)
    public_config(folder, config)
    (folder / "tokenizer.json").write_bytes(words)
    state = {name: value.contiguous() for name, value in to_public(Mammut(config).state_dict(), config).items()}
    save_file(state, folder / "open_clip_model.safetensors")
    spec = write_boxes(tmp_path / "data", "coco")
    run("detect", folder, tmp_path / "out", "--boxes", spec, "--steps", 2, "--batch-size", 2)
    assert load_checkpoint(folder).detector is None  # control
    detector = load_checkpoint(tmp_path / "out" / "checkpoint").detector
    assert detector is not None
    assert detector.config.base_names == tuple(sorted(COLOURS))
