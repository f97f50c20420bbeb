"""Box AP: equal to COCOeval, to LVISEval and to published figures; and what weights of pictures do."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut.detection.box_files import BoxFile
from mammut.detection.coco_files import read_coco
from mammut.detection.coco_results import Found, read_results
from mammut.detection.lvis_files import read_lvis
from mammut.evaluation.average_precision import HALF, SIZES, THREE_QUARTERS, Precision, match
from mammut.evaluation.bootstrap import Bootstrap, Statistic, point
from mammut_runtime.errors import EngineError

pytest.importorskip("pycocotools", reason="pycocotools is not installed (the extra `boxes`)")
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "metrics" / "coco-ap"
NAMES, PICTURES = 7, 25
Case = tuple[dict[str, Any], list[dict[str, Any]]]


def made_case(seed: int, lvis: bool) -> Case:
    """A set with its detections, near and far from the truth; `random` gives the same numbers everywhere."""
    draw = random.Random(seed)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number in range(NAMES):
        truth["categories"].append({"id": 3 * number + 1, "name": f"name {number}", "frequency": "rcf"[number % 3]})
    ids = [category["id"] for category in truth["categories"]]
    found: list[dict[str, Any]] = []
    for number in range(PICTURES):
        image = {"id": 100 - number, "file_name": f"{number}.jpg", "width": 400, "height": 300}
        present = draw.sample(ids, draw.randint(0, 4))
        if lvis:
            rest = [each for each in ids if each not in present]
            image["neg_category_ids"] = draw.sample(rest, draw.randint(0, 2))
            image["not_exhaustive_category_ids"] = draw.sample(present, draw.randint(0, len(present) // 2))
        truth["images"].append(image)
        for _ in range(draw.randint(1, 9) if present else 0):
            side = draw.choice([12, 50, 150])
            box = [draw.randint(0, 200), draw.randint(0, 140), side + draw.randint(0, 9), side + draw.randint(0, 9)]
            label = draw.choice(present)
            note = {"id": len(truth["annotations"]) + 1, "image_id": image["id"], "category_id": label, "bbox": box,
                    "area": draw.choice([1.0, 0.6]) * box[2] * box[3], "iscrowd": 0}  # fmt: skip
            if not lvis and draw.random() < 0.1:
                note["iscrowd"] = 1
            truth["annotations"].append(note)
            for _ in range(draw.randint(0, 3)):
                moved = [each + draw.randint(-6, 6) for each in box[:2]]
                moved += [max(1, each + draw.randint(-5, 5)) for each in box[2:]]
                found.append({"image_id": image["id"], "category_id": label, "bbox": moved,
                              "score": draw.randint(1, 40) / 40})  # fmt: skip
        for _ in range(draw.randint(0, 420 if lvis and number < 3 else 12)):
            box = [draw.randint(0, 300), draw.randint(0, 200), draw.randint(1, 120), draw.randint(1, 120)]
            found.append({"image_id": image["id"], "category_id": draw.choice(ids), "bbox": box,
                          "score": draw.randint(1, 40) / 40})  # fmt: skip
    draw.shuffle(found)
    return truth, found


def loaded(case: Case, folder: Path, lvis: bool) -> tuple[BoxFile, list[Found]]:
    truth, found = case
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))
    file = (read_lvis if lvis else read_coco)(folder / "truth.json")
    return file, read_results(folder / "found.json", file)


def figures(file: BoxFile, found: list[Found]) -> list[float]:
    """AP, AP50, AP75, AP of small, medium, large things."""
    precision = Precision(match(file, found))
    statistics: list[Statistic] = [precision.average(), precision.average(HALF), precision.average(THREE_QUARTERS)]
    statistics += [precision.average(size=size) for size in SIZES[1:]]
    return [point(each, len(file.pictures)) for each in statistics]


def recalls(file: BoxFile, found: list[Found], depths: tuple[int, ...]) -> list[float]:
    precision = Precision(match(file, found))
    return [point(precision.recall(depth), len(file.pictures)) for depth in depths]


def official(folder: Path) -> list[float]:
    """The twelve figures of COCOeval, as its own example calls it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(each) for each in evaluator.stats]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED.name}: the shared data folder is not there")
def test_the_golden_figures_to_five_decimals() -> None:
    file = read_coco(SHARED / "instances_val2014_100.json")
    found = read_results(SHARED / "instances_val2014_fakebbox100_results.json", file)
    assert [round(each, 5) for each in figures(file, found)] == [0.50458, 0.69697, 0.57298, 0.58563, 0.51940, 0.50140]
    assert [round(each, 5) for each in recalls(file, found, (1, 10, 100))] == [0.38681, 0.59368, 0.59535]
    # Control: one result less is another figure.
    place = max(range(len(found)), key=lambda each: len(found[each].scores))
    found[place] = found[place].best(len(found[place].scores) - 1)
    assert round(figures(file, found)[0], 5) != 0.50458


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_cocoeval(tmp_path: Path, seed: int) -> None:
    file, found = loaded(made_case(seed, lvis=False), tmp_path, lvis=False)
    expected = official(tmp_path)
    assert figures(file, found) == pytest.approx(expected[:6], abs=1e-12)
    assert recalls(file, found, (1, 10, 100)) == pytest.approx(expected[6:9], abs=1e-12)
    assert file.counts.crowds > 0


def test_more_than_a_hundred_boxes_of_one_name(tmp_path: Path) -> None:
    truth, found = made_case(9, lvis=False)
    label = truth["categories"][0]["id"]
    spare = [{**found[0], "category_id": label, "bbox": [number % 50, number % 30, 60, 50], "score": 1 - number / 500}
             for number in range(300)]  # fmt: skip
    file, given = loaded((truth, found + spare), tmp_path, lvis=False)
    assert figures(file, given) == pytest.approx(official(tmp_path)[:6], abs=1e-12)


# AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300 by lvis 0.5.3 itself, for made_case(seed, lvis=True).
LVIS = {
    0: [0.143328, 0.274402, 0.134093, 0.054462, 0.189701, 0.510738, 0.125943, 0.227408, 0.085325, 0.389189],
    1: [0.18441, 0.343484, 0.187379, 0.095992, 0.27457, 0.381037, 0.162561, 0.114796, 0.2868, 0.42359],
    3: [0.149745, 0.235359, 0.153746, 0.059856, 0.16882, 0.483827, 0.253966, 0.083384, 0.059772, 0.430774],
}


def lvis_figures(file: BoxFile, found: list[Found]) -> list[float]:
    precision = Precision(match(file, found))
    groups = [[place for place, each in enumerate(file.categories) if each.frequency == letter] for letter in "rcf"]
    statistics = [precision.average(names=names) for names in groups] + [precision.recall(300)]
    return figures(file, found) + [point(each, len(file.pictures)) for each in statistics]


@pytest.mark.parametrize("seed", LVIS)
def test_equal_to_lviseval(tmp_path: Path, seed: int) -> None:
    file, found = loaded(made_case(seed, lvis=True), tmp_path, lvis=True)
    assert lvis_figures(file, found) == pytest.approx(LVIS[seed], abs=6e-7)


def test_each_rule_of_lvis_matters(tmp_path: Path) -> None:
    """Controls: without one of the three rules the figures are others."""
    truth, found = made_case(0, lvis=True)
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        without = json.loads(json.dumps(truth))
        for image in without["images"]:
            image[key] = []
        file, given = loaded((without, found), tmp_path, lvis=True)
        assert lvis_figures(file, given) != pytest.approx(LVIS[0], abs=1e-4)
    file, given = loaded((truth, found), tmp_path, lvis=True)
    assert max(len(each.scores) for each in given) > 300
    assert lvis_figures(file, [each.best(30) for each in given]) != pytest.approx(LVIS[0], abs=1e-4)


def test_ids_from_zero_on(tmp_path: Path) -> None:
    """pycocotools takes a match with annotation 0 for none; files from 0 on are common."""
    thing = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40]}
    truth = {"images": [{"id": 1, "file_name": "a", "width": 100, "height": 100}],
             "categories": [{"id": 1, "name": "cat"}],
             "annotations": [{**thing, "id": 0, "area": 1600, "iscrowd": 0}]}  # fmt: skip
    file, found = loaded((truth, [{**thing, "score": 1.0}]), tmp_path, lvis=False)
    assert figures(file, found)[0] == pytest.approx(1)
    assert official(tmp_path)[0] == 0  # control: what this is about is still so


def test_weights_draw_pictures_again(tmp_path: Path) -> None:
    """A picture that counts twice is a picture that is there twice; one that counts 0 is not there."""
    truth, found = made_case(2, lvis=False)
    file, given = loaded((truth, found), tmp_path, lvis=False)
    weights = np.random.default_rng(0).integers(0, 3, (4, len(file.pictures))).astype(np.float64)
    precision = Precision(match(file, given))
    for overlap, size in ((None, "all"), (HALF, "all"), (None, "medium")):
        several = precision.average(overlap, size)(weights)
        for row, expected in zip(weights, several, strict=True):
            assert precision.average(overlap, size)(row[None])[0] == pytest.approx(expected, abs=1e-6)
            kept = [place for place in range(len(row)) if row[place]]
            part = BoxFile(
                file.path, False, file.categories, tuple(file.pictures[place] for place in kept), file.counts
            )
            smaller = Precision(match(part, [given[place] for place in kept]))
            assert smaller.average(overlap, size)(row[kept][None])[0] == pytest.approx(expected, abs=1e-6)


def test_the_interval_holds_the_figure(tmp_path: Path) -> None:
    file, found = loaded(made_case(3, lvis=False), tmp_path, lvis=False)
    statistic = Precision(match(file, found)).average(HALF)
    interval = Bootstrap(resamples=200).interval(statistic, len(file.pictures))
    assert interval.low < point(statistic, len(file.pictures)) < interval.high
    assert Bootstrap(resamples=200).interval(statistic, len(file.pictures)) == interval


def test_nothing_found_and_names_without_things(tmp_path: Path) -> None:
    truth, _ = made_case(4, lvis=False)
    truth["categories"].append({"id": 999, "name": "nowhere"})
    file, found = loaded((truth, []), tmp_path, lvis=False)
    assert figures(file, found)[:3] == [0, 0, 0] and recalls(file, found, (100,)) == [0]
    precision = Precision(match(file, found))
    assert len(file.categories) - 1 not in precision.names_with_things()
    assert np.isnan(precision.average(names=[len(file.categories) - 1])(np.ones((2, len(file.pictures))))).all()


def test_hits_are_matches_at_half(tmp_path: Path) -> None:
    things = [(1, [0, 0, 10, 10], 0), (1, [50, 50, 10, 10], 0), (2, [0, 0, 10, 10], 0), (2, [60, 0, 30, 30], 1)]
    given = [(1, [0, 0, 10, 6], 0.25), (1, [0, 0, 10, 9], 0.75), (2, [0, 0, 10, 4], 0.5)]
    truth = {"images": [{"id": 1, "file_name": "a", "width": 100, "height": 100}],
             "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
             "annotations": [{"id": place, "image_id": 1, "category_id": label, "bbox": box, "iscrowd": crowd}
                             for place, (label, box, crowd) in enumerate(things)]}  # fmt: skip
    found = [{"image_id": 1, "category_id": label, "bbox": box, "score": score} for label, box, score in given]
    assert match(*loaded((truth, found), tmp_path, lvis=False)).hits == {
        (0, 0): 0.75, (0, 1): -np.inf, (0, 2): -np.inf}  # fmt: skip


def test_without_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, found = loaded(made_case(0, lvis=False), tmp_path, lvis=False)
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(EngineError, match=r"pip install mammut-edge\[boxes\]"):
        match(file, found)
