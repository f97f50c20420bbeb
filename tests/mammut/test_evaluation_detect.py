"""`mammut-eval --task detect`: the task, its page, and results files in a model's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

from mammut.detection.coco_files import read_coco
from mammut.detection.coco_results import Found
from mammut.evaluation.bootstrap import point
from mammut.evaluation.commands import cli
from mammut.evaluation.draw_boxes import draw_boxes
from mammut.evaluation.examples import Image, Problems
from mammut.evaluation.outcome import DrawnBox, Outcome, TaskOptions
from mammut.evaluation.predictor import CorruptedPredictor, found_of
from mammut.evaluation.results_predictor import ResultsPredictor
from mammut.evaluation.sets import DataChoice, task_of
from mammut.evaluation.task_detect import verdicts
from mammut_runtime import console
from mammut_runtime.detection.boxes import Box, Detection, Detections
from mammut_runtime.detection.coco import CocoNumbers, CocoResults
from mammut_runtime.errors import InputError

pytest.importorskip("pycocotools", reason="pycocotools is not installed (the extra `boxes`)")
BUNDLE = str(Path(__file__).parents[1] / "data" / "tiny-bundle")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NOTHING = Found.of_corners(np.empty((0, 4)), np.empty(0), np.empty(0))
Run = Callable[..., tuple[int, str, str]]


class ColourFinder(ResultsPredictor):
    """Stands for a model: finds the rectangle of each named colour by its pixels, and nothing by other names."""

    def __init__(self) -> None:
        """Not a file."""

    name = "colours"  # type: ignore[assignment]
    facts: ClassVar[dict[str, str]] = {}  # type: ignore[assignment]

    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        found = []
        for image in images:
            rows = []
            for label, name in enumerate(names):
                own = (np.asarray(image)[:, :, ["red", "green", "blue"].index(name)] > 128) if name in COLOURS else None
                if own is not None and own.any():
                    y, x = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
                    rows.append([x[0], y[0], x[-1] + 1, y[-1] + 1, 0.9 - 0.1 * label, label])
            table = np.array(rows, np.float64).reshape(-1, 6)
            found.append(Found.of_corners(table[:, :4], table[:, 4], table[:, 5]))
        return found


class Finder:
    """ColourFinder that is no ResultsPredictor, so that it sees pictures."""

    def __init__(self) -> None:
        self._inner = ColourFinder()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def boxes(tmp_path: Path) -> str:
    """Eight pictures of 300 x 200 with a rectangle of two colours each; the sixth's third box is not in the picture."""
    generator = np.random.default_rng(0)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(COLOURS):
        truth["categories"].append({"id": 10 + number, "name": name})
    for number in range(8):
        pixels = np.zeros((200, 300, 3), np.uint8)
        for place in range(2):
            label = (number + place) % 3
            left, top = int(generator.integers(0, 90)) + 150 * place, int(generator.integers(0, 120))
            width, height = int(generator.integers(12, 60)), int(generator.integers(12, 80))
            pixels[top : top + height, left : left + width] = COLOURS[list(COLOURS)[label]]
            truth["annotations"].append({"id": 2 * number + place, "image_id": number, "category_id": 10 + label,
                                         "bbox": [left, top, width, height]})  # fmt: skip
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.ascontiguousarray(pixels[:, :, ::-1]))
        truth["images"].append({"id": number, "file_name": f"{number}.png", "width": 300, "height": 200})
    truth["annotations"].append({"id": 99, "image_id": 5, "category_id": 10, "bbox": [400, 0, 9, 9]})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return f"coco:{tmp_path / 'truth.json'}:{tmp_path}"


def results(boxes: str, folder: Path, keep: int = 99, score: float = 0.5) -> Path:
    """The truth itself as results, the first `keep` of it that are in their pictures."""
    truth = json.loads(Path(boxes.split(":")[1]).read_text())
    rows = [{key: note[key] for key in ("image_id", "category_id", "bbox")} | {"score": score}
            for note in truth["annotations"][:keep] if note["id"] != 99]  # fmt: skip
    (folder / f"results{keep}.json").write_text(json.dumps(rows))
    return folder / f"results{keep}.json"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = console.run(cli, [str(each) for each in (*arguments, "--task", "detect", "--resamples", 100)])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def figures(outcome: Outcome) -> dict[str, float]:
    return {each.name: point(each.statistic, each.items) for each in outcome.measures}


def judged(boxes: str, tmp_path: Path, **options: Any) -> Outcome:
    _, task = task_of("detect", DataChoice((), boxes=boxes), Problems())
    return task(Finder(), TaskOptions(tmp_path, batch_size=3, **options))  # type: ignore[arg-type]


def test_a_model_that_finds_all(boxes: str, tmp_path: Path) -> None:
    outcome = judged(boxes, tmp_path)
    found = figures(outcome)
    assert found["AP"] == found["AP50"] == found["AP50 of red"] == found["AR 100"] == pytest.approx(1)
    assert set(found) >= {"AP75", "AP small", "AP medium", "AR 1", "AR 10", "AP50 of green", "AP50 of blue"}
    assert "AP large" not in found  # no such thing there
    assert outcome.facts == {"pictures": 8, "boxes": 16, "names": 3}
    assert any("1 of 17 boxes have no area" in note for note in outcome.notes)
    shown = outcome.show(0)
    assert shown.score == 1 and shown.given == ("found with 0.90",) and shown.truth == ("red",)
    assert [box.kind for box in shown.boxes] == ["right", "right", "truth"]


def test_names_in_other_words_and_the_control(boxes: str, tmp_path: Path) -> None:
    """--names puts other words to the model: the right ones for a good figure, shuffled ones for the control."""
    shuffled = judged(boxes, tmp_path, names={"red": "green", "green": "blue", "blue": "red"})
    assert figures(shuffled)["AP50"] < 0.2
    assert judged(boxes, tmp_path, names={"red": "nothing"}).scores.mean() == pytest.approx(11 / 16, abs=0.07)
    with pytest.raises(InputError, match="--names: green: stands for several names"):
        judged(boxes, tmp_path, names={"red": "green"})


def test_novel_names_apart(boxes: str, tmp_path: Path) -> None:
    found = figures(judged(boxes, tmp_path, names={"red": "crimson"}, novel=frozenset({"red"})))
    assert found["AP novel (1 name)"] == found["AP50 novel"] == found["AP50 of red"] == 0
    assert found["AP base (2 names)"] == found["AP50 base"] == pytest.approx(1)
    assert found["AP"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match=r"--novel: pink: not among the names of truth\.json"):
        judged(boxes, tmp_path, novel=frozenset({"pink"}))


def test_rare_names_of_lvis(boxes: str, tmp_path: Path) -> None:
    path = Path(boxes.split(":")[1])
    truth = json.loads(path.read_text())
    for image in truth["images"]:
        image["neg_category_ids"] = image["not_exhaustive_category_ids"] = []
    for category, letter in zip(truth["categories"], "rcf", strict=True):
        category["frequency"] = letter
    path.write_text(json.dumps(truth))
    found = figures(judged("lvis" + boxes.removeprefix("coco"), tmp_path, names={"red": "crimson"}))
    assert found["AP rare (1 name)"] == 0
    assert (
        found["AP common (1 name)"] == found["AP frequent (1 name)"] == found["AP base (2 names)"] == pytest.approx(1)
    )
    assert "AP novel (1 name)" not in found and "AR 300" in found and "AR 100" not in found


def test_corrupted_pictures_may_be_smaller(boxes: str, tmp_path: Path) -> None:
    """Corruptions shrink to 256 pixels: boxes come back in the picture's own."""
    image = cv2.cvtColor(cv2.imread(boxes.split(":")[2] + "/0.png"), cv2.COLOR_BGR2RGB)
    large = np.ascontiguousarray(np.repeat(np.repeat(image, 3, axis=0), 3, axis=1))
    (plain,) = Finder().detect([large], list(COLOURS), 100)
    (worse,) = CorruptedPredictor(Finder(), "blur", 0, {}).detect([large], list(COLOURS), 100)  # type: ignore[arg-type]
    assert len(plain.boxes) == len(worse.boxes) == 2
    assert np.abs(plain.boxes - worse.boxes).max() < 6
    (small,) = Finder().detect([large[::3, ::3]], list(COLOURS), 100)
    assert np.abs(plain.boxes - small.boxes).max() > 60  # control


def test_pictures_of_another_size_are_named(boxes: str, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((200, 150, 3), np.uint8))
    with pytest.raises(InputError, match=r"3.png: 150x200 pixels, and its boxes are for 300x200; .*--partial"):
        judged(boxes, tmp_path)
    problems = Problems(partial=True)
    _, task = task_of("detect", DataChoice((), boxes=boxes), problems)
    outcome = task(Finder(), TaskOptions(tmp_path, problems=problems))  # type: ignore[arg-type]
    assert outcome.facts["pictures"] == 7 and len(problems.missing) == 1 and figures(outcome)["AP"] == pytest.approx(1)


def test_results_from_end_to_end(run: Run, boxes: str, tmp_path: Path) -> None:
    few = results(boxes, tmp_path, keep=6)
    code, out, err = run("--results", results(boxes, tmp_path), "--results", few, "--boxes", boxes,
                         "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    values = {figure["name"]: [each["value"] for each in figure["values"]] for figure in report["figures"]}
    assert values["AP50"][0] == pytest.approx(1) and 0 < values["AP50"][1] < 0.6
    assert report["counts"] == {"pictures": 8, "boxes": 16, "names": 3}
    assert report["settings"]["boxes"] == boxes and report["models"][0]["kind"] == "results"
    assert "results99.json (results)" in out and "second - first" in out and "1 of 17 boxes have no area" in out
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * len(report["exhibits"]) > 20  # both models' boxes
    assert "found with 0.50" in page and "not found" in page


def test_results_need_no_pictures_and_a_limit_takes_a_part(run: Run, boxes: str, tmp_path: Path) -> None:
    code, out, err = run("--results", results(boxes, tmp_path), "--boxes", boxes.rpartition(":")[0], "--limit", 3,
                         "--html", tmp_path / "r.html")  # fmt: skip
    assert code == 0 and "3 pictures" in out, err
    assert "data:image" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--boxes", "BOXES"], "Missing argument 'MODEL'"),
        ([BUNDLE, "--boxes", "BOXES"], "has no detector"),
        (["--results", "RESULTS"], "--boxes: detect needs a file of boxes; expected coco:FILE.json"),
        (["--results", "RESULTS", "--boxes", "voc:x:y"], "voc:x:y: expected coco:FILE"),
        (["--results", "RESULTS", "--boxes", "BOXES", "--images", "x"], "detect takes its data by --boxes"),
        (["--results", "gone.json", "--boxes", "BOXES"], "--results gone.json: no such file"),
        (["--results", "RESULTS", "--boxes", "BOXES", "--corrupt", "blur"], "--results: judged by --task detect"),
        ([BUNDLE, BUNDLE, "--results", "RESULTS", "--boxes", "BOXES"], "at most two to compare"),
        (["--results", "RESULTS", "--boxes", "BOXES", "--novel", "gone"], "--novel: expected a text file"),
        (["--results", "RESULTS", "--boxes", "coco:gone.json"], "gone.json: no such file"),
        ([BUNDLE, "--boxes", "BARE"], "a model needs the pictures|has no detector"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, boxes: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = {"BOXES": boxes, "RESULTS": str(results(boxes, tmp_path)), "BARE": boxes.rpartition(":")[0]}
    code, out, err = run(*(words.get(each, each) for each in arguments))
    assert code == 2 and out == ""
    assert any(part in err for part in message.split("|")) and len(err.strip().splitlines()) == 1, err


def test_other_tasks_take_no_boxes(boxes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(cli, [BUNDLE, "--task", "caption", "--boxes", boxes, "--images", "x"]) == 2
    assert "only --task detect takes it" in capsys.readouterr().err


def test_detections_of_the_runtime() -> None:
    detections = Detections((Detection("b", 0.5, Box(1, 2, 4, 8)), Detection("a", 0.25, Box(0, 0, 1, 1))), 10, 10)
    found = found_of(detections, ["a", "b"], 100)
    assert found.boxes.tolist() == [[1, 2, 3, 6], [0, 0, 1, 1]] and found.labels.tolist() == [1, 0]
    assert found_of(detections, ["a", "b"], 1).scores.tolist() == [0.5]
    assert found_of(Detections((), 10, 10), ["a"], 9).boxes.shape == (0, 4)


def test_one_thing_is_found_once() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    labels, truth = np.array([0, 0, 1, 1]), np.array([[0, 0, 10, 10], [50, 50, 60, 56]], np.float32)
    assert verdicts(boxes, labels, truth, np.array([0, 1])).tolist() == [True, False, False, True]
    assert verdicts(boxes, labels, truth[:0], np.empty(0, np.int64)).tolist() == [False] * 4


def test_boxes_are_drawn_where_they_are() -> None:
    pixels = np.full((50, 80, 3), 90, np.uint8)
    boxes = [DrawnBox((20, 40, 100, 80), "wrong"), DrawnBox((0, 0, 1e6, 1e6), "right", "ä: 0.5")]
    drawn = draw_boxes(pixels, boxes, 0.5)
    assert (pixels == 90).all()
    assert drawn[20, 20, 0] > 200 > drawn[20, 20, 1]  # red, at half the size
    assert (drawn[30, 30] == 90).all()


def test_what_a_model_finds_can_be_judged_again(boxes: str, tmp_path: Path) -> None:
    outcome = judged(boxes, tmp_path, write_results=tmp_path / "written.json")
    _, task = task_of("detect", DataChoice((), boxes=boxes), Problems())
    again = task(ResultsPredictor(tmp_path / "written.json"), TaskOptions(tmp_path))
    assert figures(again) == figures(outcome)


def test_what_the_runtime_writes_can_be_judged(boxes: str, tmp_path: Path) -> None:
    """`mammut-run detect` writes results with the numbers of an annotation file."""
    path = Path(boxes.split(":")[1])
    file = read_coco(path)
    results = CocoResults(file.names, CocoNumbers.read(path))
    for picture in file.pictures:
        found = [Detection(file.names[label], 0.9, Box(*map(float, corner)))
                 for label, corner in zip(picture.categories, picture.xyxy, strict=True)]  # fmt: skip
        results.add(tmp_path / picture.file_name, Detections(tuple(found), picture.width, picture.height))
    results.write(tmp_path / "found.json")
    _, task = task_of("detect", DataChoice((), boxes=boxes), Problems())
    assert figures(task(ResultsPredictor(tmp_path / "found.json"), TaskOptions(tmp_path)))["AP"] == pytest.approx(1)


def test_scores_of_others_may_be_any_numbers(boxes: str, tmp_path: Path) -> None:
    """Logits, say: only their order counts, for figures and for hits and misses."""
    _, task = task_of("detect", DataChoice((), boxes=boxes), Problems())
    outcomes = [
        task(ResultsPredictor(results(boxes, tmp_path, 9, score)), TaskOptions(tmp_path)) for score in (0.5, -3.0)
    ]
    assert figures(outcomes[0]) == figures(outcomes[1])
    assert outcomes[0].scores.tolist() == outcomes[1].scores.tolist() and outcomes[0].scores.sum() == 9
    nothing = task(ResultsPredictor(results(boxes, tmp_path, 0)), TaskOptions(tmp_path))
    assert figures(nothing)["AP"] == nothing.scores.sum() == 0 and nothing.show(0).given == ("not found",)
