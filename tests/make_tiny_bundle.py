"""Makes tests/data/tiny-bundle, tiny-video-bundle and tiny-detector-bundle: real bundles, by the real exporter,
small enough to be committed.

    python tests/make_tiny_bundle.py

Their weights are random, so captions and boxes are noise; everything else is as in a product. Run it again when the
exporter's graphs or the manifest change (tests/export/test_tiny_bundle.py notices) and commit what it wrote.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from mammut import presets
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mammut.config import TubeConfig, VideoConfig
from mammut.detection.config import detector_for
from mammut.detection.detector import Detector
from mammut.model import Mammut, with_video
from mammut_export.export import export
from mammut_export.options import ExportOptions
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

BUNDLE = Path(__file__).parent / "data" / "tiny-bundle"
VIDEO_BUNDLE = BUNDLE.with_name("tiny-video-bundle")
DETECTOR_BUNDLE = BUNDLE.with_name("tiny-detector-bundle")
VIDEO = VideoConfig(
    frames=4,
    tubes=(
        TubeConfig(kernel=(1, 8, 8), stride=(2, 8, 8)),
        TubeConfig(kernel=(2, 8, 8), stride=(4, 16, 16)),
        TubeConfig(kernel=(4, 4, 4), stride=(4, 16, 16), offset=(0, 2, 2), space_to_depth=(1, 2, 2)),
    ),
)
"""Every kind of tube; 40 tokens, where a picture has 16."""
VOCAB_SIZE = 540
"""512 for the bytes, 3 special ones, and a few words."""
PROMPTS = {
    "caption": "",
    "ask": "question: {question} answer:",
    "zero_shot": "a photo of a {}.\na drawing of a {}.",
}
_WORDS = "a photo of a red heart blue star yellow sun small house two dogs three cats question answer yes no"


def tiny_checkpoint(folder: Path) -> Checkpoint:
    """presets.tiny() with random weights, saved in `folder` and loaded again; the same numbers every time.

    Its patches are smaller than the preset's, because the patch embedding would be a quarter of the bundle.
    """
    words = _WORDS.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    tokenizer_json = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer = Tokenizer.from_bytes(tokenizer_json)
    preset = presets.tiny(tokenizer.vocab_size)
    config = dataclasses.replace(preset, vision=dataclasses.replace(preset.vision, patch_size=8))
    generator = torch.Generator().manual_seed(20_261_123)
    model = Mammut(config, pad_id=tokenizer.pad_id).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() and "bias" not in name:
            # Large enough that pictures and prefixes matter to the captions, which a trained model's would.
            scale = 0.3 if parameter.dim() > 1 else 0.1
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
        elif parameter.dim():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    rule = PreprocessRule(config.vision.image_size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    save_checkpoint(folder / "tiny", model, tokenizer_json, rule, PROMPTS)
    return load_checkpoint(folder / "tiny")


def tiny_video_checkpoint(folder: Path) -> Checkpoint:
    """The same with VIDEO, whose tubes and gate are no longer as inflating made them."""
    base = tiny_checkpoint(folder)
    model = with_video(base.model, VIDEO)
    generator = torch.Generator().manual_seed(20_261_124)
    for name, parameter in model.named_parameters():
        if name.startswith("tubes."):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) if parameter.dim() else 0.7)
    save_checkpoint(folder / "tiny-video", model, base.tokenizer_json, base.preprocess, base.prompts)
    return load_checkpoint(folder / "tiny-video")


def tiny_detector_checkpoint(folder: Path) -> Checkpoint:
    """tiny_checkpoint with a detector for 64 pixels that finds something everywhere."""
    base = tiny_checkpoint(folder)
    config = dataclasses.replace(
        detector_for(base.model.config, tuple(PROMPTS["zero_shot"].split("\n"))),
        image_size=64, width=16, stem_width=16, proposals=20, roi_size=3, roi_convs=1, roi_width=24, anchor_scale=2.0,
        threshold=0.01, base_names=("blue star", "red heart", "three cats", "two dogs", "yellow sun"),
    )  # fmt: skip
    torch.manual_seed(20_261_125)
    detector = Detector(config, base.model).requires_grad_(False)
    for layer in (detector.propose.centerness, detector.propose.distances, detector.regions.refine):
        layer.weight.normal_(std=0.5)
    detector.gain.fill_(0.5)
    save_checkpoint(
        folder / "tiny-detector", base.model, base.tokenizer_json, base.preprocess, base.prompts, detector=detector
    )
    return load_checkpoint(folder / "tiny-detector")


def main() -> None:
    every = (
        (tiny_checkpoint, BUNDLE, None),
        (tiny_video_checkpoint, VIDEO_BUNDLE, None),
        (tiny_detector_checkpoint, DETECTOR_BUNDLE, ("detect",)),
    )
    for make, place, tasks in every:
        with tempfile.TemporaryDirectory() as folder:
            options = ExportOptions(tasks=tasks)
            result = export(make(Path(folder)), place, options, overwrite=place.exists())
        print(f"{result.path}: {result.bundle_bytes:,} bytes")


if __name__ == "__main__":
    main()
