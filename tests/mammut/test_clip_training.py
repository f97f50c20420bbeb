"""Training on clips: how their frames are read, batches of them, and runs that begin from a model for pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

from mammut.checkpoint import load_checkpoint
from mammut.config import TubeConfig, VideoConfig
from mammut.data.augment import Augmenter, AugmentOptions
from mammut.data.clips import ClipPart, cropped, read_frames
from mammut.data.pair_loader import LoadedBatch, LoaderState, Reading, open_loader
from mammut.model import Mammut, with_video
from mammut.presets import demo, demo_video, paper_base, published_video, tiny, tiny_video, video_for
from mammut.training.loop import Run, starting_point, train
from mammut.training.lora import LoraOptions
from mammut.training.memory_plan import plan_memory
from mammut.training.objective import ObjectiveOptions, PairBatch, TwoPass
from mammut.training.optimizers import layer_share
from mammut.training.parallel import ParallelOptions, Place
from mammut.training.recipes import finetune
from mammut.training.run_config import RunConfig, Source
from mammut.training.run_log import read_log
from mammut_runtime.errors import CheckpointError, InputError

ALONE = Place(0, 1, torch.device("cpu"))
VIDEO = VideoConfig(
    12, (TubeConfig((1, 16, 16), (6, 16, 16), (3, 0, 0)), TubeConfig((12, 8, 8), (12, 16, 16), (0, 4, 4)))
)
WAYS = ("left", "right", "up", "down")
REAL = Path(__file__).parents[3] / "shared" / "data" / "videos"


def write_clip(path: Path, frames: np.ndarray, fps: float = 10.0) -> Path:
    """frames: uint8[F, H, W, 3] BGR."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, frames.shape[2:0:-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def counted(number: int, size_wh: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Frames of plain grey, 10 brighter each."""
    return np.stack([np.full((size_wh[1], size_wh[0], 3), 10 * index, np.uint8) for index in range(number)])


def levels(frames: Any) -> list[int]:
    """Which frames of `counted` these are."""
    return [round(float(np.mean(frame)) / 10) for frame in frames]


def moving(way: str) -> np.ndarray:
    """A white square that goes one way in 12 frames."""
    frames = np.zeros((12, 48, 48, 3), np.uint8)
    step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[way]
    for index, frame in enumerate(frames):
        y, x = (18 + round(2.8 * (index - 5.5) * each) for each in step)
        frame[y : y + 12, x : x + 12] = 255
    return frames


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A list of four clips."""
    folder = tmp_path / "clips"
    (folder / "avi").mkdir(parents=True)
    rows = []
    for way in WAYS:
        write_clip(folder / "avi" / f"{way}.avi", moving(way))
        asked = [["which colour?", {"left": "red", "right": "green", "up": "blue", "down": "grey"}[way]]]
        rows.append({"clip": f"avi/{way}.avi", "captions": [f"a {asked[0][1]} thing"], "questions": asked})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl"


@pytest.fixture
def run(small_run: Any, clips: Path) -> RunConfig:
    """Clips alone, from random weights."""
    config: RunConfig = small_run.config
    data = dataclasses.replace(config.data, sources=(Source((str(clips),), "clip", 1.0),), margin=1.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, video=VIDEO), data=data)


def batches(config: RunConfig, state: LoaderState | None = None, **changes: Any) -> Iterator[LoadedBatch]:
    run_of = Run(config, Path("unused"), ALONE, lambda message: None)
    reading = Reading(
        run_of.sources, run_of.tokenizer_json, config.preprocess, config.prompts, 24, True, config.data, 4, 32,
        0, 0, 1, 12,
    )  # fmt: skip
    reading = dataclasses.replace(reading, **changes)
    return open_loader(reading, state or LoaderState.beginning(reading.options))


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file": "a.png"}, 'expected the key "clip"'),
        ({"clip": "/a.avi"}, "leaves the folder of the list"),
        ({"clip": "../a.avi"}, "leaves the folder of the list"),
        ({"clip": "b.avi"}, "b.avi: no such file"),
        ({"clip": "b" * 300}, "bbb: no such file"),
        ({"clip": "a.avi", "start_s": "now"}, "start_s: expected seconds, got 'now'"),
        ({"clip": "a.avi", "end_s": True}, "end_s: expected seconds, got 'True'"),
        ({"clip": "a.avi", "start_s": float("nan")}, "start_s: expected seconds"),
        ({"clip": "a.avi", "start_s": 3, "end_s": 2.5}, "expected start_s before end_s, got 3 and 2.5"),
    ],
)
def test_rows_that_name_no_part_of_a_clip_say_why(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "a.avi").write_bytes(b"x")
    assert ClipPart.of_row(tmp_path, {"clip": "a.avi"}) == ClipPart(tmp_path / "a.avi")  # control
    assert ClipPart.of_row(tmp_path, {"clip": "a.avi", "start_s": 1, "end_s": 2.5}).end_s == 2.5
    with pytest.raises(InputError, match=message):
        ClipPart.of_row(tmp_path, row)


def test_frames_are_spread_over_the_part(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "grey.avi", counted(20))
    assert levels(read_frames(ClipPart(path), 4, 16, squash=True)) == [2, 6, 12, 16]  # of every second one
    assert levels(read_frames(ClipPart(path, 1.0, 1.45), 4, 16, squash=True)) == [10, 11, 12, 13]
    assert levels(read_frames(ClipPart(path, 1.75), 6, 16, squash=True)) == [18, 18, 18, 19, 19, 19]
    assert levels(read_frames(ClipPart(path), 20, 16, squash=True)) == list(range(20))


def test_drawn_frames_are_one_of_each_share(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "grey.avi", counted(24))
    found = {
        tuple(levels(read_frames(ClipPart(path), 4, 16, squash=True, rng=np.random.default_rng(seed))))
        for seed in range(12)
    }
    assert len(found) > 6  # control: without a generator it is always the same
    for frames in found:
        assert all(6 * share <= frame < 6 * (share + 1) for share, frame in enumerate(frames))


def test_frames_have_the_wanted_size_and_colours(tmp_path: Path) -> None:
    blue = np.zeros((3, 48, 64, 3), np.uint8)
    blue[..., 0] = 200
    path = write_clip(tmp_path / "blue.avi", blue)
    whole = read_frames(ClipPart(path), 2, 24, squash=False)
    assert [frame.shape for frame in whole] == [(24, 32, 3)] * 2
    assert abs(int(whole[0][5, 5, 2]) - 200) < 12 and whole[0][5, 5, 0] < 12  # RGB
    assert read_frames(ClipPart(path), 2, 24, squash=True)[0].shape == (24, 24, 3)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.avi").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"text.avi: not a video"):
        read_frames(ClipPart(tmp_path / "text.avi"), 2, 16, squash=True)
    path = write_clip(tmp_path / "grey.avi", counted(5))
    with pytest.raises(InputError, match=r"grey.avi: no frames from 9 s on; the clip ends at 0.5 s"):
        read_frames(ClipPart(path, 9.0), 2, 16, squash=True)


def test_all_frames_of_a_clip_are_cut_and_coloured_alike() -> None:
    rng = np.random.default_rng(0)
    still = [rng.integers(0, 255, (40, 50, 3), np.uint8)] * 3
    out = cropped(still, 32, rng)
    assert out.shape == (3, 32, 32, 3) and (out == out[:1]).all()
    clips = torch.from_numpy(np.stack([[still[0]] * 3, [still[0]] * 3])[:, :, :, :40]).movedim(-1, -3)
    augmenter = Augmenter(AugmentOptions(), True, torch.Generator().manual_seed(1))
    changed = augmenter.clips(clips, 32)
    assert changed.shape == (2, 3, 3, 32, 32)
    torch.testing.assert_close(changed, changed[:, :1].expand_as(changed))
    assert not torch.allclose(changed[0], changed[1], atol=0.05)  # control: each clip its own way


def test_clips_are_not_mirrored() -> None:
    ramp = torch.arange(40.0).mul(6).byte().expand(16, 2, 3, 40, 40)  # brighter to the right
    out = Augmenter(AugmentOptions(), True, torch.Generator().manual_seed(1)).clips(ramp, 32)
    assert (out[..., -1] > out[..., 0]).all()
    photos = Augmenter(AugmentOptions(tilt=0), True, torch.Generator().manual_seed(1)).photos(ramp[:, 0], 32)
    assert not (photos[..., -1] > photos[..., 0]).all()  # control


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [None, AugmentOptions()])
def test_batches_of_clips(run: RunConfig, augment: AugmentOptions | None) -> None:
    config = dataclasses.replace(run, data=dataclasses.replace(run.data, augment=augment, margin=1.5))
    found = list(itertools.islice(batches(config), 6))
    for batch in found:
        assert batch.pixels.shape == (4, 12, 3, 32, 32) and batch.pixels.dtype == torch.uint8
        assert not batch.damaged
    on = found[0].on(torch.device("cpu"), config.preprocess)
    assert on.pixels.shape == (4, 12, 3, 32, 32) and on.pixels.dtype == torch.float32
    state = LoaderState.beginning(config.data)
    for batch in found[:3]:
        state = state.after(batch)
    again = next(batches(config, state))
    assert torch.equal(again.pixels, found[3].pixels) and torch.equal(again.ids, found[3].ids)


def test_bad_rows_are_named_and_left_out(run: RunConfig, clips: Path, coloured_samples: Any) -> None:
    (clips.parent / "no.avi").write_bytes(b"nothing")
    (clips.parent / "a.png").write_bytes(coloured_samples(1)[0]["png"])
    more = [{"clip": "no.avi", "caption": "a"}, {"file": "a.png", "caption": "a"}, {"clip": "gone.avi", "caption": "a"}]
    clips.write_text(clips.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    damaged = {line for batch in itertools.islice(batches(run), 6) for line in batch.damaged}
    assert any("clips.jsonl:5: " in line and "not a video" in line for line in damaged)
    assert "clips.jsonl:6: has 'file'; a source of kind 'clip' expects 'clip'" in damaged
    assert "clips.jsonl:7: gone.avi: no such file" in damaged and len(damaged) == 3
    photos = dataclasses.replace(
        run, data=dataclasses.replace(run.data, sources=(Source((str(clips),), "photo", 1.0),))
    )
    named = {line for batch in itertools.islice(batches(photos, batch_size=1), 3) for line in batch.damaged}
    assert any("has 'clip'; a source of kind 'photo' expects 'file'" in line for line in named)


@pytest.fixture
def both(run: RunConfig, small_run: Any, tmp_path: Path, write_tar: Any) -> RunConfig:
    """Pictures, clips and composed clips in one run."""
    samples = []
    for number, name in enumerate(("owl", "key", "bus", "cat", "hat")):
        pixels = np.full((20, 20, 4), 255, np.uint8)
        pixels[:, :, number % 3] = 40 * number
        samples.append({"key": name, "png": cv2.imencode(".png", pixels)[1].tobytes(), "json": {"caption": name}})
    write_tar(tmp_path / "drawings.tar", samples)
    photos = (str(small_run.folder / "0.tar"),)
    composed = Source(photos, "moving", 1.0, 0.5, (str(tmp_path / "drawings.tar"),))
    sources = (Source(photos, "photo", 1.0), *run.data.sources, composed)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, sources=sources, mixing="batches"))


def test_batches_are_of_one_kind(both: RunConfig) -> None:
    shapes = [batch.pixels.shape for batch in itertools.islice(batches(both), 24)]
    assert {len(shape) for shape in shapes} == {4, 5}
    composed = dataclasses.replace(both, data=dataclasses.replace(both.data, sources=both.data.sources[2:]))
    first, second = itertools.islice(batches(composed), 2)
    assert first.pixels.shape == (4, 12, 3, 32, 32) and not torch.equal(first.pixels, second.pixels)
    assert (first.pixels[:, 0] != first.pixels[:, -1]).any()  # something moves


# --- what a run is refused for --------------------------------------------------------------------------------------


def test_runs_that_cannot_have_clips_say_why(run: RunConfig, both: RunConfig) -> None:
    with pytest.raises(InputError, match=r"clips are for a model with tubes, and model.video is null"):
        dataclasses.replace(run, model=dataclasses.replace(run.model, video=None))
    with pytest.raises(InputError, match=r"data.mixing: pictures and clips go into batches of their own"):
        dataclasses.replace(both, data=dataclasses.replace(both.data, mixing="samples"))
    with pytest.raises(InputError, match="stages: expected image_size 32, the model's own"):
        dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], image_size=64),))
    with pytest.raises(InputError, match=r"clips are listed in .jsonl files, got \['a.tar'\]"):
        Source(("a.tar",), "clip", 1.0)
    with pytest.raises(InputError, match="expected tars of what is placed"):
        Source(("a.tar",), "moving", 1.0)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_on_pictures_and_clips(both: RunConfig, tmp_path: Path) -> None:
    """Two steps and more; stopped in the middle it goes on as it would have."""
    config = dataclasses.replace(both, micro_batches=2)
    folder = train(config, tmp_path / "out", ALONE)
    rows = read_log(tmp_path / "out")
    assert len(rows) == 6 and all(np.isfinite(row["loss"]) for row in rows)
    loaded = load_checkpoint(folder).model
    assert loaded.config.video == VIDEO and loaded.tubes is not None and loaded.tubes.gate.item() != 0
    half = dataclasses.replace(config, save=dataclasses.replace(config.save, every_steps=3))
    train(half, tmp_path / "again", ALONE)
    for extra in sorted((tmp_path / "again").glob("step-*"))[1:]:
        extra.rename(tmp_path / extra.name)
    train(half, tmp_path / "again", ALONE, resume=True)
    again = load_checkpoint(tmp_path / "again" / "checkpoint").model
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))


def test_movement_is_learned(run: RunConfig, tmp_path: Path) -> None:
    """What is said about each clip follows from its movement. Control: a clip shown backwards is taken for another."""
    config = dataclasses.replace(
        run,
        batch_size=4,
        stages=(dataclasses.replace(run.stages[0], steps=130, learning_rate=0.003, schedule="constant"),),
        objective=ObjectiveOptions(contrastive_weight=0.0),
        save=dataclasses.replace(run.save, every_steps=1000),
    )
    folder = train(config, tmp_path / "out", ALONE)
    passes = TwoPass(load_checkpoint(folder).model, config.objective, None)
    clip = next(batches(config)).on(torch.device("cpu"), config.preprocess)
    forwards, backwards = passes(clip), passes(dataclasses.replace(clip, pixels=clip.pixels.flip(1)))
    assert forwards.caption_sum < 1 and backwards.caption_sum > 4 * forwards.caption_sum


def test_a_run_begins_from_a_model_for_pictures(small_run: Any, clips: Path, tmp_path: Path) -> None:
    pictures = train(small_run.with_("stages.0.steps=1"), tmp_path / "pictures", ALONE)
    config = finetune("video-ask", str(pictures), [str(clips)])
    assert config.model.video == tiny_video() and config.of_clips and config.data.question_share == 1
    assert RunConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config))), "config") == config
    before, (_, model) = load_checkpoint(pictures).model, starting_point(config)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(pixels)[0], before.encode_image(pixels)[0])
    assert all(p.requires_grad for p in model.parameters()) and model.training
    short = dataclasses.replace(
        config, batch_size=4, stages=(dataclasses.replace(config.stages[0], steps=2, warmup_steps=1),)
    )
    trained = train(short, tmp_path / "clips", ALONE)
    assert load_checkpoint(trained).model.config.video == tiny_video()
    further = finetune("video-caption", str(trained), [str(clips)])  # tubes that are there are kept
    assert starting_point(further)[1].tubes is not None
    other = dataclasses.replace(further, model=dataclasses.replace(further.model, video=VIDEO))
    with pytest.raises(InputError, match="holds another model than this run describes"):
        starting_point(other)


def test_tubes_learn_beside_low_rank_products_and_rest_without_clips(both: RunConfig, tmp_path: Path) -> None:
    lora = Run(dataclasses.replace(both, lora=LoraOptions(rank=2)), tmp_path, ALONE, lambda message: None)
    assert lora.model.tubes is not None and all(p.requires_grad for p in lora.model.tubes.parameters())
    assert not lora.model.vision.patch_embedding.weight.requires_grad
    data = dataclasses.replace(both.data, sources=both.data.sources[:1])
    pictures = Run(dataclasses.replace(both, data=data), tmp_path, ALONE, lambda message: None)
    assert pictures.model.tubes is not None and not any(p.requires_grad for p in pictures.model.tubes.parameters())


def test_new_parts_learn_at_the_full_rate() -> None:
    config = dataclasses.replace(tiny(), video=VIDEO)
    assert (
        layer_share("model.tubes.projections.0.weight", config, 0.5)
        == layer_share("model.tubes.gate", config, 0.5)
        == 1
    )
    assert layer_share("model.vision.patch_embedding.weight", config, 0.5) == 0.5**3  # control


def clip_batch(pixels: torch.Tensor) -> PairBatch:
    ids = torch.randint(3, 60, (len(pixels), 9), generator=torch.Generator().manual_seed(0))
    return PairBatch(pixels, ids, torch.arange(len(pixels)), ids[:, :-1], ids[:, 1:], torch.ones(len(pixels), 8).bool())


def test_both_passes_are_over_the_whole_clip() -> None:
    torch.manual_seed(0)
    model = with_video(Mammut(tiny()), VIDEO)
    frames = torch.randn(3, 12, 3, 32, 32)
    out = TwoPass(model, ObjectiveOptions(), None)(clip_batch(frames))
    assert out.images is not None and torch.allclose(out.images, model.encode_video(frames)[1], atol=1e-6)
    backwards = TwoPass(model, ObjectiveOptions(), None)(clip_batch(frames.flip(1)))  # control
    assert not torch.allclose(out.images, backwards.images, atol=1e-3)


def test_pictures_of_one_process_do_not_keep_clips_of_another_waiting(tmp_path: Path) -> None:
    torch.manual_seed(0)
    passes = TwoPass(with_video(Mammut(tiny()), VIDEO), ObjectiveOptions(), None)

    def gradients() -> list[torch.Tensor | None]:
        passes.zero_grad()
        out = passes(clip_batch(torch.randn(3, 3, 32, 32)))
        (out.images.sum() + out.caption_sum).backward()
        assert passes.model.tubes is not None
        return [p.grad for p in passes.model.tubes.parameters()]

    assert all(each is None for each in gradients())  # control: alone
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert all(each is not None and not each.any() for each in gradients())
    finally:
        dist.destroy_process_group()


def test_a_plan_counts_frames() -> None:
    def activations(clips: bool) -> int:
        config = dataclasses.replace(tiny(), video=VIDEO)
        return plan_memory(
            config, ObjectiveOptions(), ParallelOptions("ddp", "bf16"), devices=1, batch_size=4, clips=clips
        ).activation_bytes

    assert activations(True) > 2 * activations(False)


def test_tubes_are_known_for_the_presets() -> None:
    assert video_for(demo().vision) == demo_video() and video_for(paper_base().vision) == published_video()
    with pytest.raises(CheckpointError, match=r"no tubes are known for this encoder; set model.video in the config"):
        video_for(dataclasses.replace(paper_base().vision, image_size=896))


@pytest.mark.shared
def test_two_steps_on_real_clips(small_run: Any, tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip("needs ../shared/data/videos")
    (tmp_path / "videos").symlink_to(REAL)
    rows = [
        {"clip": f"videos/{path.relative_to(REAL)}", "caption": "a red thing", "start_s": start}
        for path, start in (
            (REAL / "asl" / "yes.mkv", 0),
            (REAL / "edge" / "video_90.mov", 0),
            (REAL / "bikes.mp4", 1.5),
        )
    ]
    (tmp_path / "real.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_run.with_("stages.0.steps=2", "batch_size=3", "data.max_damaged_pictures=0")
    source = Source((str(tmp_path / "real.jsonl"),), "clip", 1.0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, video=VIDEO),
        data=dataclasses.replace(config.data, sources=(source,), augment=AugmentOptions()),
    )
    train(config, tmp_path / "out", ALONE)
    rows_of_log = read_log(tmp_path / "out")
    assert len(rows_of_log) == 2 and rows_of_log[-1]["damaged_pictures"] == 0
