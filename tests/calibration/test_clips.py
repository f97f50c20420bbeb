"""Clips in calibration and drift: which frames a picture of a clip stands for, and what the video graph is shown."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest

from mammut_calibration.behaviour import observe
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset, Sample, open_dataset
from mammut_calibration.drift import compare
from mammut_calibration.feeds import record_feeds
from mammut_calibration.table import read_table, save_table
from mammut_runtime.bundle import Bundle, hash_files, write_manifest
from mammut_runtime.canary import moving_crops
from mammut_runtime.engines import EngineOptions

VIDEO = Path(__file__).parent.parent / "data" / "tiny-video-bundle"
ENGINE = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def watching() -> Bundle:
    return Bundle.open(VIDEO)


def counting_clip(path: Path, frames: int, fps: int) -> Path:
    """Frame i is grey of level 2 * i, with a corner that keeps it from being one colour."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (48, 40))
    for index in range(frames):
        frame = np.full((40, 48, 3), 2 * index, np.uint8)
        frame[:20, :24] = 255 - 2 * index
        writer.write(frame)
    writer.release()
    return path


def number(frame: np.ndarray) -> int:
    return round(float(np.median(frame[24:, 26:])) / 2)


def test_a_picture_of_a_clip_stands_for_the_part_until_the_next(tmp_path: Path) -> None:
    data = open_dataset([counting_clip(tmp_path / "a.avi", 50, 8)])
    parts = [[number(each) for each in sample.filmed] for sample in data.samples(0, 4) if isinstance(sample, Sample)]
    assert parts[:3] == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]]
    assert parts[-1] == [49, 49, 49, 49]  # the clip ends after 2 of 8 frames: what there is, the last one again
    assert all(not each.filmed for each in data if isinstance(each, Sample))  # only where asked for
    late = [[number(each) for each in sample.filmed] for sample in data.samples(2, 4) if isinstance(sample, Sample)]
    assert late == parts[2:]
    many = next(iter(data.samples(0, 20)))
    assert (
        isinstance(many, Sample) and len(many.filmed) == 20 and {number(each) for each in many.filmed} == set(range(8))
    )


def test_held_out_parts_have_no_frame_in_common_with_the_others(tmp_path: Path) -> None:
    sides = open_dataset([counting_clip(tmp_path / "a.avi", 64, 8)]).split()
    seen = [{number(f) for s in side.samples(0, 8) if isinstance(s, Sample) for f in s.filmed} for side in sides]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(64))


def test_a_picture_becomes_a_clip_by_moving_over_it(make: Any, tmp_path: Path) -> None:
    (sample,) = (each for each in open_dataset([make.folder(tmp_path, 1)]).samples(0, 4) if isinstance(each, Sample))
    assert sample.filmed == ()
    for got, wanted in zip(sample.clip(4), moving_crops(make.picture(0)[:, :, ::-1], 4), strict=True):
        assert (got == wanted).all()


@pytest.fixture(scope="module")
def mixed(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """16 pictures and 5 seconds of a clip."""
    folder = make.folder(tmp_path_factory.mktemp("mixed") / "data", 16)
    make.clip(folder / "z.avi", frames=20, fps=4)
    return open_dataset([folder])


def test_the_video_graph_is_calibrated(watching: Bundle, mixed: Dataset, tmp_path: Path) -> None:
    table = calibrate(watching, mixed, CalibrateOptions(threads=1, max_tokens=3))
    assert (table.header.clips, table.header.filmed) == (21, 5) and table.header.pictures == 21
    names = table.graphs["video"].keys()
    assert any("tubes.projections.1" in name for name in names) and any("blocks.1.mlp" in name for name in names)
    save_table(tmp_path / "t.npz", table)
    assert read_table(tmp_path / "t.npz").header == table.header


def test_feeds_of_both_kinds(watching: Bundle, tiny: Bundle, mixed: Dataset) -> None:
    feeds = record_feeds(watching, mixed, 2, threads=1)
    assert [each["frames"].shape for each in feeds["video"]] == [(1, 4, 3, 32, 32)] * 2
    assert [each["tokens"].shape[1] for each in feeds["memory"]] == [40, 16] * 2  # the picture's last: it is timed
    assert [each["cross_k.0"].shape[2] for each in feeds["decoder"]] == [40, 16] * 2
    assert record_feeds(tiny, mixed, 2, threads=1).keys() == tiny.manifest.graphs.keys()  # control


@pytest.fixture(scope="module")
def backwards(watching: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle with a video graph that takes the frames in another order."""
    folder = tmp_path_factory.mktemp("backwards") / "bundle"
    shutil.copytree(VIDEO, folder)
    model = onnx.load(str(folder / "video.onnx"), load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3, 2, 1, 0]), "order"))
    for node in model.graph.node:
        node.input[:] = ["backwards" if name == "frames" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["frames", "order"], ["backwards"], axis=1))
    (folder / "video.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, dataclasses.replace(watching.manifest, files=hash_files(folder)))
    return Bundle.open(folder)


def test_drift_of_clips(watching: Bundle, backwards: Bundle, mixed: Dataset) -> None:
    """What the video graph does wrong shows in the measures of clips and nowhere else."""
    data = Dataset(mixed.items[-10:], mixed.digests[-10:])
    before = observe(watching, data, max_tokens=4, options=ENGINE)
    same = compare(before, observe(watching, data, reference=before, options=ENGINE))
    assert all(value == pytest.approx(1.0, abs=1e-6) for value in same.measures.values())
    assert (same.clips, same.filmed) == (10, 5) and not same.failures()
    other = compare(before, observe(backwards, data, reference=before, options=ENGINE))
    changed = {name for name, value in other.measures.items() if value < 1 - 1e-5}
    assert {"clip_cosine_mean", "clip_cosine_min"} <= changed
    assert changed <= {"clip_cosine_mean", "clip_cosine_min", "clip_forced_token_agreement"}
    assert other.where["clip_cosine_min"] in before.pictures
