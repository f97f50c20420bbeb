"""`mammut-eval` from end to end on the tiny bundle: tables, JSON, the page, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut.evaluation.commands import cli
from mammut_runtime import console

BUNDLE = str(Path(__file__).parents[1] / "data" / "tiny-bundle")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = console.run(cli, [str(each) for each in (*arguments, "--resamples", 100, "--threads", 1)])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


@pytest.fixture
def tar(tmp_path: Path, coloured_samples: Any, write_tar: Any) -> Path:
    """Twelve coloured pictures with caption, question, label and split."""
    samples = coloured_samples(12)
    for index, sample in enumerate(samples):
        sample["json"] |= {"label": sample["json"]["answer"], "split": "train" if index < 8 else "val"}
        sample["json"]["question"] = "red?"  # what else there is room for in the tiny decoder
    write_tar(tmp_path / "set.tar", samples)
    return tmp_path / "set.tar"


@pytest.mark.parametrize(
    ("task", "more", "figures"),
    [
        ("retrieval", [], ["picture to text R@1", "picture to text R@5", "picture to text R@10", "text to picture R@1",
                           "text to picture R@5", "text to picture R@10"]),
        ("classify", ["--split", "val"], ["top-1", "mean of classes"]),
        ("caption", [], ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]),
        ("vqa", [], ["exact match"]),
        ("few-shot", ["--split", "val", "--shots", "1,2", "--draws", "2"],
         ["linear probe, 1 a class", "nearest neighbours, 1 a class", "linear probe, 2 a class",
          "nearest neighbours, 2 a class"]),
    ],
)  # fmt: skip
def test_every_task(run: Run, tar: Path, tmp_path: Path, task: str, more: list[str], figures: list[str]) -> None:
    code, out, err = run(BUNDLE, "--task", task, "--images", tar, *more, "--json", tmp_path / "r.json",
                         "--html", tmp_path / "r.html")  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert [figure["name"] for figure in report["figures"]] == figures
    assert all(name in out for name in figures)
    for figure in report["figures"]:
        (value,) = figure["values"]
        assert value["low"] <= value["value"] + 1e-9 and figure["difference"] is None
    page = (tmp_path / "r.html").read_text()
    assert "data:image/jpeg;base64," in page and "<script" not in page and "http" not in page


def test_two_models_side_by_side(run: Run, tar: Path, tmp_path: Path) -> None:
    worse, files = ("--corrupt", "blur", "--corrupt", "low light"), (tmp_path / "r.json", tmp_path / "r.html")
    code, out, err = run(BUNDLE, BUNDLE, "--task", "classify", "--images", tar, "--split", "all", *worse,
                         "--json", files[0], "--html", files[1])  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert [figure["difference"] for figure in report["figures"]] == [{"value": 0, "low": 0, "high": 0}] * 2
    wanted = [(kind, severity) for kind in ("blur", "low light") for severity in range(1, 6)]
    assert [(each["kind"], each["severity"]) for each in report["corruptions"]] == [("none", 0), *wanted]
    assert report["corruptions"][0]["figures"] == report["figures"]  # small pictures: severity 0 changes nothing
    assert "second - first" in out and "low light" in out
    page = (tmp_path / "r.html").read_text()
    assert page.count("<polyline") == 4 and "stroke-dasharray" in page


def test_two_different_models(run: Run, tar: Path, tmp_path: Path) -> None:
    """A bundle with random weights and the demo's checkpoint, which knows colours."""
    code, out, err = run(BUNDLE, "demo", "--task", "classify", "--images", tar, "--split", "all",
                         "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")  # fmt: skip
    assert code == 0, err
    assert "tiny-bundle (onnxruntime fp32)" in out and "demo (checkpoint)" in out
    figure = json.loads((tmp_path / "r.json").read_text())["figures"][0]
    first, second = (value["value"] for value in figure["values"])
    assert figure["difference"]["value"] == pytest.approx(second - first) != 0
    assert figure["difference"]["low"] < figure["difference"]["high"]
    assert "<span class='who'>demo (checkpoint):</span>" in (tmp_path / "r.html").read_text()


def test_what_comes_from_data_is_escaped(run: Run, tmp_path: Path, coloured_samples: Any, write_tar: Any) -> None:
    (sample,) = coloured_samples(1)
    sample["json"] = {"captions": ["<script>alert(1)</script>", "<b>&\x1b[31m"]}
    sample["key"] = "<img src=x>"
    write_tar(tmp_path / "<i>.tar", [sample])
    code, out, err = run(BUNDLE, "--task", "retrieval", "--images", tmp_path / "<i>.tar", "--html", tmp_path / "r.html")
    assert code == 0, err
    page = (tmp_path / "r.html").read_text()
    assert "&lt;script&gt;" in page
    assert not any(bad in page for bad in ("<script", "<img src=x", "<b>", "<i>"))
    assert "\x1b" not in out


def test_equal_runs_are_equal(run: Run, tar: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(BUNDLE, "--task", "few-shot", "--images", tar, "--split", "val", "--json", tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    for each in (first, second):
        each["models"][0].pop("seconds")
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "classify", "--images", "SET"], "has the splits train, val; say which to judge with --split"),
        (["--task", "classify", "--images", "SET", "--split", "test"], "no split 'test'; it has train, val"),
        (["--task", "few-shot", "--images", "SET", "--split", "train"], "judged on what it learns from"),
        (["--task", "few-shot", "--images", "SET", "--split", "val", "--shots", "1,x"], "--shots: expected numbers"),
        (["--task", "retrieval", "--images", "gone.tar"], "gone.tar: no such file or folder"),
        (
            ["--task", "retrieval", "--images", "SET", "--annotations", "x.json"],
            "expected the folder with the pictures",
        ),
        (["--task", "classify", "--images", "SET", "--split", "val", "--templates", "gone"], "--templates: expected"),
        (["--task", "vqa", "--images", "SET", "--json", "gone/r.json"], "expected a file in a folder that is there"),
        (["--task", "dance", "--images", "SET"], "'dance' is not one of"),
        (["--task", "caption"], "--images: caption needs pictures"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, tar: Path, arguments: list[str], message: str) -> None:
    code, out, err = run(BUNDLE, *(str(tar) if each == "SET" else each for each in arguments))
    assert code == 2 and out == ""
    assert message in err and len(err.strip().splitlines()) == 1, err


def test_empty_sets_are_one_line(run: Run, tmp_path: Path, coloured_samples: Any, write_tar: Any) -> None:
    (sample,) = coloured_samples(1)
    write_tar(tmp_path / "bare.tar", [{**sample, "json": {}}])
    write_tar(tmp_path / "none.tar", [])
    for name in ("bare.tar", "none.tar"):
        for task in ("retrieval", "caption", "vqa", "classify"):
            code, _, err = run(BUNDLE, "--task", task, "--images", tmp_path / name)
            assert code == 2 and "expected" in err and len(err.strip().splitlines()) == 1, err


def test_damaged_pictures_are_an_error_or_named(
    run: Run, tmp_path: Path, coloured_samples: Any, write_tar: Any
) -> None:
    samples = coloured_samples(6)
    samples[2]["png"] = samples[2]["png"][:60]
    write_tar(tmp_path / "set.tar", samples)
    code, _, err = run(BUNDLE, "--task", "retrieval", "--images", tmp_path / "set.tar")
    assert code == 2 and "set.tar: 00002" in err and "--partial" in err and len(err.strip().splitlines()) == 1
    code, out, _ = run(BUNDLE, "--task", "retrieval", "--images", tmp_path / "set.tar", "--partial", "--json",
                       tmp_path / "r.json", "--html", tmp_path / "r.html")  # fmt: skip
    assert code == 0 and "5 pictures" in out and "PARTIAL: 1 left out" in out and "00002" in out
    assert len(json.loads((tmp_path / "r.json").read_text())["missing"]) == 1
    assert "Partial data: 1 left out" in (tmp_path / "r.html").read_text()


def test_published_files_from_end_to_end(run: Run, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"images": [], "annotations": []}
    for number in range(4):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((30, 30, 3), 50 * number, np.uint8))
        rows["images"].append({"id": number, "file_name": f"{number}.png"})
        rows["annotations"] += [{"image_id": number, "caption": f"{word} {number} dogs"} for word in ("some", "these")]
    (tmp_path / "coco.json").write_text(json.dumps(rows))
    common = ("--images", tmp_path, "--annotations", tmp_path / "coco.json")
    code, out, err = run(BUNDLE, "--task", "retrieval", *common)
    assert code == 0 and "4 pictures, 8 texts" in out, err
    (tmp_path / "3.png").unlink()
    code, _, err = run(BUNDLE, "--task", "caption", *common)
    assert code == 2 and "1 of 4 missing: 3.png" in err
    code, out, _ = run(BUNDLE, "--task", "caption", *common, "--partial")
    assert code == 0 and "3 pictures, 6 captions" in out and "3.png" in out


def test_names_and_limit(run: Run, tar: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"red": "red heart"}')
    (tmp_path / "templates.txt").write_text("a {}\n")
    code, out, err = run(BUNDLE, "--task", "classify", "--images", tar, "--split", "val", "--limit", 2, "--names",
                         tmp_path / "names.json", "--templates", tmp_path / "templates.txt")  # fmt: skip
    assert code == 0 and "2 pictures, 4 classes, 1 templates" in out, err
