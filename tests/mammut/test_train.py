"""The loop on a tiny model: it learns, resumes exactly, refuses NaN, and works with several workers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint
from mammut.data import Corpus, Pair, decode
from mammut.presets import tiny
from mammut.train import Job, Stage, Trainer, TrainOptions, schedule, train
from mammut_runtime.errors import InputError, MammutError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

RULE = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)
PROMPTS = {"caption": "", "ask": "question: {question} answer:", "zero_shot": "{}"}
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230), "white": (240, 240, 240)}
OPTIONS = TrainOptions(steps=6, batch_size=8, warmup_steps=2, learning_rate=2e-3, log_every=2)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    pairs = []
    for name, colour in COLOURS.items():
        pixels = np.full((36, 36, 3), colour[::-1], np.uint8)
        data = bytes(cv2.imencode(".png", pixels)[1])
        pairs.append(Pair(name, data, (f"a {name} square",), (), (("what color is it?", name),)))
    return decode("squares", pairs, 36, kind="plain")


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    return train_tokenizer([f"a {name} square question: what color is it? answer: {name}" for name in COLOURS] * 3, 560)


def trainer(corpus: Corpus, tokenizer_json: bytes, options: TrainOptions) -> Trainer:
    return train_job_trainer(job(corpus, tokenizer_json, options, Path()))


def job(corpus: Corpus, tokenizer_json: bytes, options: TrainOptions, folder: Path) -> Job:
    config = tiny(Tokenizer.from_bytes(tokenizer_json).vocab_size)
    return Job(config, tokenizer_json, RULE, PROMPTS, (corpus,), options, folder)


def train_job_trainer(given: Job) -> Trainer:
    from mammut.model import Mammut

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_bytes(given.tokenizer_json)
    model = Mammut(given.config, pad_id=tokenizer.pad_id)
    return Trainer(model, tokenizer, given.rule, given.corpora, given.prompts["ask"], given.options)


def test_it_learns_four_colours(corpus: Corpus, tokenizer_json: bytes, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=120, batch_size=16, stages=(Stage(0.3, 16), Stage(1.0, 32)))
    rows: list[dict[str, float]] = []
    folder = train(dataclasses.replace(job(corpus, tokenizer_json, options, tmp_path), report=rows.append))
    assert rows[-1]["loss_contrastive"] < rows[0]["loss_contrastive"] / 2
    assert rows[-1]["loss_caption"] < rows[0]["loss_caption"] / 2
    assert [rows[0]["image_size"], rows[-1]["image_size"]] == [16, 32]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows
    checkpoint = load_checkpoint(folder)
    pixels = (corpus.pictures[:, :, 2:34, 2:34].float() / 255 - 0.5) / 0.5
    ids = torch.from_numpy(checkpoint.tokenizer.tokenize([f"a {name} square" for name in COLOURS], 24))
    scores = checkpoint.model.encode_image(pixels)[1] @ checkpoint.model.encode_text(ids).T
    assert scores.argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("precision", "muon"), [("fp32", None), ("bf16", None), ("bf16", 0.02)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    corpus: Corpus, tokenizer_json: bytes, tmp_path: Path, precision: str, muon: float | None
) -> None:
    options = dataclasses.replace(OPTIONS, precision=precision, muon_learning_rate=muon)
    whole = trainer(corpus, tokenizer_json, options)
    whole.run(tmp_path / "whole")
    first = trainer(corpus, tokenizer_json, options)
    first.model.train()
    for _ in range(3):
        first.train_step()
    (tmp_path / "parts").mkdir()
    first.save(tmp_path / "parts")
    second = trainer(corpus, tokenizer_json, options)
    second.resume(tmp_path / "parts")
    assert second.step == 3
    second.run(tmp_path / "parts")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name
    other = trainer(corpus, tokenizer_json, dataclasses.replace(options, seed=1))
    other.run(tmp_path / "other")
    assert not torch.equal(other.average["vision.positions"], whole.average["vision.positions"])  # control


def test_several_workers_train_one_model(corpus: Corpus, tokenizer_json: bytes, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=3, workers=2, muon_learning_rate=0.02)
    given = job(corpus, tokenizer_json, options, tmp_path)
    folder = train(given)
    assert load_checkpoint(folder).model.config.name == "tiny"
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["step"] == 3 and len(state["generators"]) == 2
    train(dataclasses.replace(given, resume=True, options=dataclasses.replace(options, steps=4)))
    assert torch.load(tmp_path / "training.pt", weights_only=True)["step"] == 4
    alone = dataclasses.replace(given, resume=True, options=dataclasses.replace(options, workers=1))
    with pytest.raises(InputError, match="saved by 2 workers"):
        train(alone)


def test_nan_stops_with_a_clear_error(corpus: Corpus, tokenizer_json: bytes) -> None:
    broken = trainer(corpus, tokenizer_json, OPTIONS)
    broken.train_step()  # control: fine before
    with torch.no_grad():
        broken.model.memory_projection.weight[0, 0] = float("nan")
    before = broken.model.vision.positions.clone()
    with pytest.raises(MammutError, match=r"step 1: the loss is not finite.*lower learning rate"):
        broken.train_step()
    assert torch.equal(before, broken.model.vision.positions)  # nothing was updated


def test_resume_errors(corpus: Corpus, tokenizer_json: bytes, tmp_path: Path) -> None:
    fresh = trainer(corpus, tokenizer_json, OPTIONS)
    with pytest.raises(InputError, match="nothing to resume"):
        fresh.resume(tmp_path)
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "training.pt")
    with pytest.raises(InputError, match="does not fit this run's model"):
        fresh.resume(tmp_path)


@pytest.mark.parametrize(
    "given", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": float("nan")}, {"steps": 1, "batch_size": 0}]
)
def test_options_are_checked(given: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        TrainOptions(**given)  # type: ignore[arg-type]
    TrainOptions(steps=1)  # control


def test_schedule_warms_up_and_decays() -> None:
    assert schedule(0, 10, 0.0) == pytest.approx(0.1)
    assert schedule(9, 10, 0.0) == pytest.approx(1.0)
    assert schedule(500, 10, 0.5) == pytest.approx(0.505)
    assert schedule(500, 10, 1.0) == pytest.approx(0.01)
