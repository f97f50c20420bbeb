"""Evaluation of models that see clips: captions and questions about all their frames, not the middle one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import save_checkpoint
from mammut.evaluation.checkpoint_predictor import CheckpointPredictor
from mammut.evaluation.commands import cli
from mammut.evaluation.examples import PictureRef, Problems
from mammut.evaluation.predictor import BundlePredictor, CorruptedPredictor, PredictorOptions
from mammut.evaluation.read_captions import read_captions
from mammut.model import Mammut, with_video
from mammut.presets import tiny, tiny_video
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule

TOKENIZER = train_tokenizer(["a red cat", "two dogs on a green field"], 520)
MSRVTT = {
    "videos": [{"video_id": "video1", "split": "train"}, {"video_id": "video2", "split": "test"}],
    "sentences": [{"video_id": "video1", "caption": "a cat"}, {"video_id": "video2", "caption": "two dogs"}],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = with_video(Mammut(tiny(520)), tiny_video()).eval()
    rule = PreprocessRule(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", "shortest", 0)
    folder = tmp_path_factory.mktemp("model") / "clips"
    save_checkpoint(folder, model, TOKENIZER, rule, {"caption": "", "ask": "{question}", "zero_shot": "a {}"})
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """video1.avi grows lighter, video2.avi darker."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, levels in (("video1", range(0, 200, 20)), ("video2", range(180, -1, -20))):
        writer = cv2.VideoWriter(str(folder / f"{name}.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (40, 32))
        for level in levels:
            writer.write(np.full((32, 40, 3), level, np.uint8))
        writer.release()
    return folder


def test_frames_are_spread_over_the_clip(clips: Path) -> None:
    frames = PictureRef("video1", clips / "video1.avi").frames(4)
    assert frames.shape == (4, 32, 40, 3)
    assert [round(float(each.mean()) / 20) for each in frames] == [1, 3, 6, 8]


def test_a_checkpoint_sees_all_frames(checkpoint: Path, clips: Path) -> None:
    predictor = CheckpointPredictor(str(checkpoint), PredictorOptions(batch_size=1))
    assert predictor.frames == 4
    refs = [PictureRef(name, clips / f"{name}.avi") for name in ("video1", "video2")]
    whole = [ref.frames(4) for ref in refs]
    found = predictor.embed_pictures(whole)
    wanted = torch.stack([torch.from_numpy(np.stack([predictor._preprocess(f) for f in each])) for each in whole])
    direct = predictor._checkpoint.model.encode_video(wanted)[1]
    np.testing.assert_allclose(found, direct, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert np.abs(predictor.embed_pictures([whole[0][::-1]])[0] - found[0]).max() > 1e-3  # control: the order counts
    assert len(predictor.caption(whole)) == 2 and len(predictor.answer(whole, [["a cat?"], []])[0]) == 1
    still = predictor.embed_pictures([whole[0][0], whole[1]])  # a picture among clips stands still
    alone = predictor.embed_pictures([np.stack([whole[0][0]] * 4)])
    np.testing.assert_allclose(still[0], alone[0], atol=1e-6)
    worse = CorruptedPredictor(predictor, "noise", 3, {})
    assert worse.frames == 4 and np.abs(worse.embed_pictures(whole) - found).max() > 1e-4


def test_a_bundle_sees_clips_and_pictures() -> None:
    def seen(*frames: Any) -> Any:
        return SimpleNamespace(embedding=np.full(2, len(frames), np.float32))

    model = SimpleNamespace(
        watches=True,
        manifest=SimpleNamespace(model=SimpleNamespace(video_frames=4)),
        encode_frames=lambda frames: seen(*frames),
        encode_batch=lambda images, batch_size: [seen(each) for each in images],
    )
    predictor = object.__new__(BundlePredictor)
    predictor._model, predictor._options = model, PredictorOptions()  # type: ignore[assignment]
    assert predictor.frames == 4
    clip, picture = np.zeros((4, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    assert predictor.embed_pictures([picture, clip, picture])[:, 0].tolist() == [1, 4, 1]
    model.watches = False
    assert predictor.frames == 0


def test_captions_of_clips_are_read(clips: Path, tmp_path: Path) -> None:
    path = tmp_path / "videodatainfo.json"
    path.write_text(json.dumps(MSRVTT))
    (example,) = read_captions(path, clips, None, Problems())  # the test split
    assert example.captions == ("two dogs",) and example.picture.path.name == "video2.avi" and example.picture.is_clip
    assert len(list(read_captions(path, clips, "train", Problems()))) == 1
    lines = tmp_path / "AllVideoDescriptions.txt"
    lines.write_text("abc_1_2 a cat\nabc_1_2 one cat\nxyz_3_4 a dog\n")
    (tmp_path / "youtube_mapping.txt").write_text("abc_1_2 vid1\nxyz_3_4 vid2\n")
    for number in (1, 2):
        (clips / f"video{number}.avi").rename(clips / f"vid{number}.avi")
    first, second = read_captions(lines, clips, None, Problems())
    assert first.captions == ("a cat", "one cat") and second.picture.path.name == "vid2.avi"
    with pytest.raises(InputError, match="MSVD's captions have no splits"):
        read_captions(lines, clips, "test", Problems())


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_the_command_says_how_clips_were_seen(checkpoint: Path, clips: Path, tmp_path: Path, task: str) -> None:
    asked = [{"video_id": n, "question": "a cat?", "answer": "a cat"} for n in (1, 2)]
    captions = MSRVTT | {"videos": [video | {"split": "test"} for video in MSRVTT["videos"]]}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(captions if task == "caption" else asked))
    given = ["--task", task, "--images", str(clips), "--annotations", str(path), "--threads", "1", "--resamples", "100"]
    found = CliRunner().invoke(cli, [str(checkpoint), *given])
    assert found.exit_code == 0, found.output
    assert "2 clips: 4 frames of each" in found.output
