"""How clips are judged: what each view may see, what counts as right, and what is reached without looking."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut.config import VideoConfig
from mammut.data.clip_scenes import CLIP_QUESTION_KINDS, ClipScene, compose_clip
from mammut.data.scenes import Drawing
from mammut.demo import clip_evaluation
from mammut.demo.clip_evaluation import (
    VIEWS,
    Answers,
    Viewer,
    answered,
    figures,
    normalised,
    table,
    usual_answer,
    usual_answers,
    view_of,
)
from mammut.demo.clips import HeldOutClip, clip_strip, write_sheet
from mammut.demo.evaluate import Judge
from mammut.model import Mammut
from mammut.presets import patches_only, tiny, tiny_video
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "mammut" / "assets" / "demo"
FRAMES, SIZE = 16, 32


def drawing(name: str, shade: int) -> Drawing:
    return Drawing(name, "test", np.full((20, 20, 4), (shade, 0, 255 - shade, 255), np.uint8))


DRAWINGS = [drawing(name, shade) for name, shade in (("red heart", 250), ("heart", 10), ("dog", 80), ("owl", 160))]


def clip_of(seed: int, kind: str | None = None) -> ClipScene:
    photo = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    return compose_clip(np.random.default_rng(seed), DRAWINGS, photo, FRAMES, SIZE, kind)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    tokenizer_json = (DEMO / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_bytes(tokenizer_json)
    config = tiny()
    text = dataclasses.replace(
        config.text, vocab_size=tokenizer.vocab_size, embedding_rows=tokenizer.vocab_size, context_length=32
    )
    video = VideoConfig(FRAMES, tiny_video().tubes)
    model = Mammut(dataclasses.replace(config, text=text, video=video), tokenizer.pad_id).eval()
    assert model.tubes is not None
    with torch.no_grad():
        model.tubes.gate.fill_(0.5)
    rule = PreprocessRule(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", "squash", 0)
    prompts = {"caption": "", "ask": "question: {question} answer:", "zero_shot": "{}"}
    return Checkpoint(model, tokenizer_json, rule, prompts, "test", "")


def seen_frames(checkpoint: Checkpoint, view: str) -> set[int]:
    """Which frames make a difference."""
    see, frames = view_of(checkpoint.model, view), torch.randn(1, FRAMES, 3, SIZE, SIZE)
    before, found = see(frames), set()
    for at in range(FRAMES):
        changed = frames.clone()
        changed[:, at] += 1
        if not torch.equal(see(changed), before):
            found.add(at)
    return found


@torch.no_grad()
def test_each_view_sees_what_it_says(checkpoint: Checkpoint) -> None:
    assert seen_frames(checkpoint, "middle frame") == {FRAMES // 2}
    assert seen_frames(checkpoint, "no tubes") == set(range(0, FRAMES, 2))
    assert seen_frames(checkpoint, "full") == set(range(FRAMES))


@torch.no_grad()
def test_without_tubes_is_a_part_of_the_whole(checkpoint: Checkpoint) -> None:
    frames = torch.randn(2, FRAMES, 3, SIZE, SIZE)
    assert checkpoint.model.config.video is not None
    fewer = clip_evaluation.without_tubes(checkpoint.model, checkpoint.model.config.video)
    assert fewer.config.video == patches_only(16, FRAMES, every=2)
    count = fewer.config.video_tokens
    whole, part = checkpoint.model.video_positions()[:count], fewer.video_positions()
    assert torch.equal(whole, part) and part.abs().sum() > 0
    assert fewer.encode_video(frames)[0].shape[1] == count


def test_a_model_for_pictures_only_is_refused() -> None:
    with pytest.raises(InputError, match="takes no clips; fine-tune it on clips first"):
        view_of(Mammut(tiny()).eval(), "full")


def test_right_is_what_the_judge_is_told(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge who knows everything is always right; one who answers "left" is so where that is the answer."""
    clips = [HeldOutClip(clip_of(seed), seed % 5, "") for seed in range(40)]
    known = {question: answer for each in clips for question, answer in each.scene.asked}
    spell = Judge(checkpoint).spell
    captions = iter([each.scene.captions[0] for each in clips])

    def ask(self: Judge, tokens: Any, questions: list[str]) -> list[str]:
        return ["left"] * len(questions)

    def write(self: Judge, tokens: Any, prompts: list[str]) -> list[str]:
        return [spell(next(captions)) for _ in prompts]

    monkeypatch.setattr(Judge, "ask", ask)
    monkeypatch.setattr(Judge, "write", write)
    answers = answered(clips, {"full": Viewer(checkpoint, view_of(checkpoint.model, "full"))}, {})
    found = figures(answers)
    asked = [answer for each in clips for kind, _, answer in each.scene.questions if kind == "direction"]
    assert found["direction"]["asked"] == len(asked) == answers.kinds.count("direction")
    assert found["direction"]["full"]["right"] == round(asked.count("left") / len(asked), 4)
    assert found["caption"]["full"] == {"right": 1.0, "low": 1.0, "high": 1.0}
    assert found["speed"]["full"]["right"] == 0.0
    assert len(known) > 20  # control: there was something to be asked


def test_intervals_are_over_photographs() -> None:
    """Twenty clips on two photographs, right on one of them only: nothing is known between 0 and 1."""
    answers = Answers(["direction"] * 20, [0] * 10 + [1] * 10, {"full": [True] * 10 + [False] * 10})
    wide = figures(answers)["direction"]["full"]
    assert (wide["right"], wide["low"], wide["high"]) == (0.5, 0.0, 1.0)
    alone = figures(dataclasses.replace(answers, photos=list(range(20))))["direction"]["full"]
    assert 0.2 < alone["low"] < 0.5 < alone["high"] < 0.8


def test_without_looking_takes_the_usual_answer() -> None:
    clips = [clip_of(seed) for seed in range(400)]
    usual = usual_answers(clips)
    assert {kind for kind, _ in usual} == set(CLIP_QUESTION_KINDS)
    assert ("order", "which appears first, the {0} or the {1}?") in usual
    assert usual[("order", "which appears first, the {0} or the {1}?")] in ("{0}", "{1}")
    assert ("direction", "which way does the {0} move?") in usual
    assert not any("heart" in form for _, form in usual)  # names inside of names
    for clip in clips:
        for kind, question, answer in clip.questions:
            said = usual_answer(usual, clip, kind, question)
            assert said in {thing.name for thing in clip.things} if kind in ("order", "which moves") else said, answer
    assert usual_answer({}, clips[0], "direction", "which way does the dog move?") == ""


def test_the_table_has_every_kind(checkpoint: Checkpoint) -> None:
    clips = [HeldOutClip(clip_of(seed), seed, "") for seed in range(6)]
    viewers = {name: Viewer(checkpoint, view_of(checkpoint.model, name)) for name in VIEWS}
    rows = figures(answered(clips, viewers, usual_answers(each.scene for each in clips)))
    lines = list(table({"clips": 6, "frames": FRAMES, "sets": {"trained drawings": rows}}))
    assert lines[0].startswith("trained drawings: 6 clips of 16 frames")
    assert [line.split("  ")[0] for line in lines[2:-1]] == [*CLIP_QUESTION_KINDS, "caption"]
    assert all(view in lines[1] for view in ("asked", "without looking", *VIEWS))


def test_pixels_are_normalised_as_pictures_are(checkpoint: Checkpoint) -> None:
    clip = clip_of(0)
    frames = normalised([clip], checkpoint)
    assert frames.shape == (1, FRAMES, 3, SIZE, SIZE)
    wanted = (clip.frames[3, 5, 7].astype(np.float32) / 255 - 0.5) / 0.25
    assert np.allclose(frames[0, 3, :, 5, 7].numpy(), wanted, atol=1e-6)


def test_sheets_show_right_and_wrong_and_name_whom_to_credit(tmp_path: Path) -> None:
    clip = clip_of(1, "still")
    plain = clip_strip(clip)
    judged = clip_strip(clip, [clip.captions[0].replace(",", " ,"), *["nonsense"] * 3])
    assert judged.shape[1] == plain.shape[1] and len(judged) > len(plain)
    below = judged[SIZE:].reshape(-1, 3).astype(int)
    green, red = ((below[:, own] > 90) & (below[:, other] < 60) for own, other in ((1, 0), (0, 1)))
    assert green.any() and red.any()
    write_sheet(tmp_path / "sheet.png", [plain, judged, plain], ["A. Photographer CC BY 4.0"])
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "- A. Photographer CC BY 4.0" in (tmp_path / "sheet.md").read_text()
    with pytest.raises(InputError, match=r"expected a name that ends in \.png or \.jpg"):
        write_sheet(tmp_path / "sheet.gif", [plain], [])
