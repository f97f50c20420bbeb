from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_calibration.activations import activation_names, read_graph
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import MIN_PICTURES, Dataset, Sample, open_dataset
from mammut_calibration.statistics import TensorStatistics
from mammut_calibration.table import CalibrationTable
from mammut_runtime.bundle import Bundle
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import Preprocessor


def same(one: CalibrationTable, other: CalibrationTable) -> bool:
    def plain(each: TensorStatistics) -> tuple[object, ...]:
        return (*dataclasses.astuple(dataclasses.replace(each, counts=np.zeros(0))), each.counts.tobytes())

    tables = [
        {g: {n: plain(e)[:7] + plain(e)[8:] for n, e in t.items()} for g, t in x.graphs.items()} for x in (one, other)
    ]
    return tables[0] == tables[1] and one.header == other.header


def test_one_pass_feeds_every_graph(tiny: Bundle, data: Dataset, table: CalibrationTable) -> None:
    header = table.header
    assert (header.done, header.pictures, header.repeated, header.constant, header.damaged) == (20, 20, 0, 0, ())
    assert header.complete and header.data_hash == data.content_hash and header.bundle_hash == tiny.content_hash
    assert header.texts >= 20 and header.own_texts == 0 and header.tokens > 20
    for graph in tiny.manifest.graphs:
        assert set(table.graphs[graph]) == set(activation_names(read_graph(tiny.graph_path(graph)), "linear"))
    runs = {graph: {each.runs for each in tensors.values()} for graph, tensors in table.graphs.items()}
    assert runs["vision"] == runs["memory"] == {20}
    (steps,) = runs["decoder"]
    assert steps > 20  # prompts and steps


def test_the_ranges_are_those_of_the_runtimes_own_pixels(tiny: Bundle, data: Dataset, table: CalibrationTable) -> None:
    preprocess = Preprocessor(tiny.manifest.preprocess)
    engine = open_engine(tiny.graph_path("vision"), "onnxruntime", EngineOptions(threads=1))
    pixels = [preprocess(sample.image) for sample in data if isinstance(sample, Sample)]
    tokens = [engine.run({"pixels": each[None]})["tokens"] for each in pixels]
    seen = table.graphs["vision"]["pixels"]
    assert (seen.minimum, seen.maximum) == (np.min(pixels), np.max(pixels))
    seen = table.graphs["memory"]["tokens"]
    assert seen.values == np.size(tokens)
    np.testing.assert_allclose((seen.minimum, seen.maximum), (np.min(tokens), np.max(tokens)), rtol=1e-5)


def test_an_interrupted_calibration_goes_on_and_gives_the_same(
    make: Any, tiny: Bundle, options: CalibrateOptions, tmp_path: Path
) -> None:
    folder = make.folder(tmp_path / "pictures", 18)
    (folder / "a.png").write_bytes(b"damaged")
    cv2.imwrite(str(folder / "b.png"), np.full((30, 30, 3), 99, np.uint8))
    for name, seed in (("c.png", 0), ("zz.png", 1)):  # p00 repeats c before the interruption, zz repeats p01 after it
        (folder / name).write_bytes(make.png(seed))
    data, state = open_dataset([folder]), tmp_path / "state.npz"
    often = dataclasses.replace(options, save_every=4)
    uninterrupted = calibrate(tiny, data, often)
    header = uninterrupted.header
    assert (header.done, header.pictures, header.repeated, header.constant, len(header.damaged)) == (22, 18, 2, 1, 1)

    def stop(done: int, total: int, name: str) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny, data, often, state=state, progress=stop)
    assert state.exists()
    with pytest.raises(InputError, match="the state of a calibration with other data; remove it"):
        calibrate(tiny, data.first(20), often, state=state)
    with pytest.raises(InputError, match="with other scope"):
        calibrate(tiny, data, dataclasses.replace(often, scope="all"), state=state)
    notes: list[str] = []
    done: list[int] = []
    resumed = calibrate(
        tiny, data, often, state=state, note=notes.append, progress=lambda count, total, name: done.append(count)
    )
    assert done[0] == 9 and "going on after 8 of 22 pictures" in notes[0]
    assert same(resumed, uninterrupted)
    assert not state.exists()


def test_captions_of_the_model_stand_in_where_the_data_have_none(
    make: Any, tiny: Bundle, options: CalibrateOptions, tmp_path: Path
) -> None:
    bare = open_dataset([make.folder(tmp_path, 16, captions=False)])
    header = calibrate(tiny, bare, options).header
    assert header.own_texts == header.texts >= 16


def test_too_few_pictures_are_refused_before_and_after_a_look(
    make: Any, tiny: Bundle, options: CalibrateOptions, tmp_path: Path
) -> None:
    few = open_dataset([make.folder(tmp_path / "few", MIN_PICTURES - 1)])
    with pytest.raises(InputError, match=r"the data hold only 15 different pictures of 15 given .*at least 16"):
        calibrate(tiny, few, options)
    folder = make.folder(tmp_path / "repeats", MIN_PICTURES - 1)
    for index in range(5):
        (folder / f"copy{index}.png").write_bytes(make.png(0))
    with pytest.raises(
        InputError, match=r"5 repeated, 0 of one colour, 0 damaged: .* only 15 different pictures of 20"
    ):
        calibrate(tiny, open_dataset([folder]), options)
    (folder / "new.png").write_bytes(make.png(77))
    assert calibrate(tiny, open_dataset([folder]), options).header.pictures == 16  # control


def test_a_camera_that_sees_nothing_move_is_constant_data(
    make: Any, tiny: Bundle, options: CalibrateOptions, tmp_path: Path
) -> None:
    still = make.clip(tmp_path / "still.avi", frames=40, fps=10, still=True)
    with pytest.raises(InputError, match=r"39 repeated, .* only 1 different"):
        calibrate(tiny, open_dataset([still], frame_every_s=0.1), options)
    moving = make.clip(tmp_path / "moving.avi", frames=20, fps=10)
    assert calibrate(tiny, open_dataset([moving], frame_every_s=0.1), options).header.pictures > 16  # control


def test_pictures_of_one_colour_and_damaged_ones_are_left_out_and_named(
    make: Any, tiny: Bundle, options: CalibrateOptions, tmp_path: Path
) -> None:
    make.folder(tmp_path, 18)
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((30, 30, 3), 99, np.uint8))
    (tmp_path / "zz.png").write_bytes(make.png(1)[:60])
    notes: list[str] = []
    header = calibrate(tiny, open_dataset([tmp_path]), options, note=notes.append).header
    assert (header.pictures, header.constant, len(header.damaged)) == (18, 1, 1)
    assert any("grey.png: one colour" in note for note in notes) and any("zz.png" in note for note in notes)
    for index in range(3):
        (tmp_path / f"a{index}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"3 of 23 pictures cannot be read, more than the 10% .*a0\.png"):
        calibrate(tiny, open_dataset([tmp_path]), options)


def test_a_quantized_bundle_is_refused(quantized: Any, data: Dataset) -> None:
    with pytest.raises(InputError, match=r"is quantized \(vision\); expected an fp32 bundle"):
        calibrate(quantized("vision"), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scope": "some"}, "scope: expected one of linear"),
        ({"max_damaged": 1.0}, "max_damaged: expected a share"),
        ({"save_every": 0}, "save_every: expected at least 1"),
        ({"threads": -1}, "threads must be"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrateOptions(**change)


MEASURE = """
import resource, sys
from pathlib import Path
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import open_dataset
from mammut_runtime.bundle import Bundle
data = open_dataset([sys.argv[2]]).first(int(sys.argv[3]))
table = calibrate(Bundle.open(sys.argv[1]), data, CalibrateOptions(threads=1, max_tokens=2, scope="all"))
print(table.header.pictures, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_is_flat_in_the_number_of_pictures(make: Any, tiny: Bundle, tmp_path: Path) -> None:
    folder = make.folder(tmp_path, 160, captions=False)
    peaks = []
    for count in (16, 160):
        command = [sys.executable, "-c", MEASURE, str(tiny.path), str(folder), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        pictures, peak_mib = map(int, done.stdout.split())
        assert pictures > 0.8 * count
        peaks.append(peak_mib)
    assert peaks[1] < peaks[0] + 12, peaks  # holding all activations would take 72 MiB more
