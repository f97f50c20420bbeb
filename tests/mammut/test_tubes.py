"""Tubes: their arithmetic, where they begin (inflated, gate closed), their positions, and models that have them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mammut import presets
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import OPENMAMMUT_PROMPTS, load_checkpoint, save_checkpoint
from mammut.config import MammutConfig, TubeConfig, VideoConfig, VisionConfig
from mammut.model import Mammut, with_video
from mammut.tubes import Tubes, centres, fixed_positions, position_tables, resized_kernel
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.preprocess import PreprocessRule

TINY = presets.tiny().vision
PATCHES = TubeConfig((1, 16, 16), (2, 16, 16))
RULE = PreprocessRule(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", "shortest", 0)


def seeded(config: MammutConfig, seed: int = 0) -> Mammut:
    torch.manual_seed(seed)
    return Mammut(config).eval()


def public_tiny() -> MammutConfig:
    """openMaMMUT's dialect in small: a class token, a norm before the blocks, no bias."""
    return presets.openmammut_config(
        name="public", image_size=32, patch_size=8, vision=(2, 32, 2, 128), text=(4, 24, 2),
        mlp_in_crossed_blocks=False, vocab_size=520, embedding_rows=520,
    )  # fmt: skip


def clip(frames: int, size: int = 32, seed: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_published_tubes_give_what_their_arithmetic_says() -> None:
    video = presets.published_video()
    assert [math.prod(t.counts(32, 224)) for t in video.tubes] == [196, 98, 147, 98]
    assert video.tokens(224) == 539
    assert presets.published_video(frames=64).tokens(224) == 1176
    plain = [dataclasses.replace(t, space_to_depth=(1, 1, 1)) for t in video.tubes]
    for frames in (32, 64):  # depth changes no count, as published
        assert dataclasses.replace(video, frames=frames, tubes=tuple(plain)).tokens(224) == (539, 1176)[frames // 64]


def test_the_demos_tubes_are_in_the_budget() -> None:
    assert 150 <= presets.demo_video().tokens(96) == 180 <= 200
    assert presets.demo_video().problem(presets.demo().vision) is None
    assert any(t.kernel[0] == 16 and t.kernel[1] <= 4 for t in presets.demo_video().tubes)


@given(
    st.integers(1, 9), st.integers(1, 20), st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(0, 4)] * 3), st.tuples(*[st.integers(1, 2)] * 3),
)  # fmt: skip
def test_counts_are_the_boxes_that_fit(frames: int, size: int, kernel: Any, step: Any, offset: Any, depth: Any) -> None:
    stride = tuple(a * b for a, b in zip(step, depth, strict=True))
    tube = TubeConfig(kernel, stride, offset, depth)
    for axis, count in enumerate(tube.counts(frames, size)):
        total = (frames, size, size)[axis]
        ends = [offset[axis] + i * stride[axis] + tube.span[axis] for i in range(total + 1)]
        assert count == sum(end <= total for end in ends)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (presets.published_video(frames=16), r"tubes\[2\]: not one box of 16 x 20 x 20 from 4 x 8 x 8 on fits into"),
        (presets.published_video(frames=320), "6,419 tokens of 320 frames of 224 x 224 pixels; expected at most 1,600"),
        (presets.published_video(patch_size=14), r"exactly one tube that is the picture's patches, kernel \[1, 16"),
        (VideoConfig(64, (PATCHES, PATCHES)), "expected exactly one tube"),
        (VideoConfig(64, (PATCHES, TubeConfig((1, 8, 8), (8, 35, 35), (0, 0, 0), (1, 5, 5)))), "does not divide"),
    ],
)  # fmt: skip
def test_tubes_that_do_not_fit_are_refused_by_name(video: VideoConfig, message: str) -> None:
    config = presets.paper_base()
    dataclasses.replace(config, video=presets.published_video())  # control
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(config, video=video)


def test_a_stride_must_hold_its_neighbours() -> None:
    TubeConfig((1, 2, 2), (4, 4, 4), space_to_depth=(2, 1, 4))  # control
    with pytest.raises(ValueError, match=r"stride 4 \(rows\) is not divisible by space_to_depth 3"):
        TubeConfig((1, 2, 2), (4, 4, 4), space_to_depth=(2, 3, 1))


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_config_may_leave_video_out() -> None:
    plain = presets.tiny().to_dict()
    assert "video" not in plain  # and files without clips stay what they were
    assert MammutConfig.from_dict(plain) == presets.tiny()
    assert MammutConfig.from_dict(plain | {"video": None}) == presets.tiny()
    with_clips = dataclasses.replace(presets.tiny(), video=presets.tiny_video())
    assert MammutConfig.from_dict(json.loads(json.dumps(with_clips.to_dict()))) == with_clips


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "config: video.frames: expected a number from 1 to 1,024, got 0"),
        ({"fps": 3}, "config: video: unknown key 'fps'"),
        ({"tubes": []}, r"config: video.tubes: expected 1 to 16 items, got 0"),
    ],
)
def test_video_is_read_strictly(change: dict[str, Any], message: str) -> None:
    data = dataclasses.replace(presets.tiny(), video=presets.tiny_video()).to_dict()
    MammutConfig.from_dict(data)  # control
    with pytest.raises(CheckpointError, match=message):
        MammutConfig.from_dict(data | {"video": data["video"] | change})


def test_a_tube_is_read_strictly() -> None:
    data = dataclasses.replace(presets.tiny(), video=presets.tiny_video()).to_dict()
    data["video"]["tubes"][1]["stride"] = [4, 16]
    with pytest.raises(CheckpointError, match=r"video.tubes\[1\].stride: expected a list of 3 items, got 2"):
        MammutConfig.from_dict(data)


# --- the same path as a picture's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [presets.tiny(520), public_tiny()], ids=["paper", "openmammut"])
def test_one_frame_of_patches_is_the_picture_to_the_bit(config: MammutConfig) -> None:
    model = seeded(config)
    video = presets.patches_only(config.vision.patch_size, frames=1, every=1)
    clips = with_video(model, video)
    frames = clip(1)
    for got, want in zip(clips.encode_video(frames), model.encode_image(frames[:, 0]), strict=True):
        assert torch.equal(got, want)
    torch.nn.init.constant_(clips.tubes.gate, 0.1)  # type: ignore[union-attr]  # control: an open gate
    assert not torch.equal(clips.encode_video(frames)[0], model.encode_image(frames[:, 0])[0])


@pytest.mark.parametrize(
    ("config", "video"),
    [
        (presets.tiny(520), presets.tiny_video()),
        (public_tiny(), VideoConfig(4, (TubeConfig((1, 8, 8), (2, 8, 8)), TubeConfig((4, 4, 4), (4, 8, 8))))),
    ],
    ids=["paper", "openmammut"],
)
def test_untrained_patches_enter_the_first_block_as_a_pictures(config: MammutConfig, video: VideoConfig) -> None:
    model = seeded(config)
    clips = with_video(model, video)
    entering: list[torch.Tensor] = []
    for each in (model, clips):
        each.vision.blocks[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    frames = clip(4)
    clips.encode_video(frames)
    for frame in (0, 2):
        model.encode_image(frames[:, frame])
    seen, *pictures = entering
    head, body = int(config.vision.class_token), config.vision.grid**2
    for index, picture in enumerate(pictures):
        assert torch.equal(seen[:, head + index * body : head + (index + 1) * body], picture[:, head:])
        assert torch.equal(seen[:, :head], picture[:, :head])
    entering.clear()
    torch.nn.init.constant_(clips.tubes.gate, 0.1)  # type: ignore[union-attr]  # control: an open gate
    clips.encode_video(frames)
    assert not torch.equal(entering[0][:, head : head + body], pictures[0][:, head:])


def test_the_gate_learns_from_closed() -> None:
    model = with_video(seeded(presets.tiny()).requires_grad_(True), presets.tiny_video())
    model.encode_video(clip(4), normalize=False)[1].square().sum().backward()  # type: ignore[no-untyped-call]
    assert model.tubes is not None and model.tubes.gate.item() == 0.0
    for name, parameter in model.tubes.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- inflation ------------------------------------------------------------------------------------------------------


def tubes_of(tube: TubeConfig, frames: int, vision: VisionConfig = TINY) -> tuple[Tubes, torch.nn.Conv2d]:
    """Patches of frame 0 and one more kind of tube, inflated."""
    torch.manual_seed(2)
    patch = vision.patch_size
    embedding = torch.nn.Conv2d(3, vision.width, patch, stride=patch)
    first = TubeConfig((1, patch, patch), (frames, patch, patch))
    tubes = Tubes(VideoConfig(frames, (first, tube)), vision)
    tubes.inflate(embedding)
    return tubes, embedding


@torch.no_grad()
def test_a_still_clip_gives_the_patches() -> None:
    tubes, embedding = tubes_of(TubeConfig((3, 16, 16), (4, 16, 16)), 4)
    still = clip(1).expand(-1, 4, -1, -1, -1)
    tokens = tubes(still, embedding)
    torch.testing.assert_close(tokens[:, 4:], tokens[:, :4], atol=2e-5, rtol=0)
    moving = tubes(clip(4), embedding)  # control
    assert (moving[:, 4:] - moving[:, :4]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (24, 24)])
def test_another_size_gives_the_patch_of_what_it_sees_resized(size: tuple[int, int]) -> None:
    tubes, embedding = tubes_of(TubeConfig((2, *size), (2, 32, 32), (0, 5, 3)), 2)
    still = clip(1).expand(-1, 2, -1, -1, -1)
    seen = still[:, 0, :, 5 : 5 + size[0], 3 : 3 + size[1]]
    resized = F.interpolate(seen, (16, 16), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(tubes(still, embedding)[:, 4], embedding(resized)[..., 0, 0], atol=2e-6, rtol=1e-5)
    plain = F.interpolate(embedding.weight, size, mode="bilinear")  # control: the kernel itself resized is not that
    assert not torch.allclose(resized_kernel(embedding.weight, size), plain, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "tube",
    [
        TubeConfig((2, 5, 3), (1, 7, 9), (1, 2, 4)),
        TubeConfig((3, 4, 4), (4, 8, 8), (0, 3, 1), (2, 1, 1)),
        TubeConfig((2, 3, 3), (2, 12, 8), (1, 0, 2), (1, 2, 2)),
        TubeConfig((1, 2, 2), (4, 8, 16), (0, 0, 0), (2, 2, 4)),
    ],
)
def test_a_tube_is_a_convolution_in_space_and_time(tube: TubeConfig) -> None:
    """Against PyTorch's own 3-D convolution at the denser stride, and neighbours put together one by one."""
    tubes, embedding = tubes_of(tube, 7)
    kernel = tubes.projections[0]
    torch.nn.init.normal_(kernel.weight)  # type: ignore[arg-type]
    frames = clip(7)
    weight = kernel.weight.reshape(-1, tube.kernel[0], 3, *tube.kernel[1:]).transpose(1, 2)  # type: ignore[operator]
    t, h, w = tube.offset
    dense = F.conv3d(frames.transpose(1, 2)[:, :, t:, h:, w:], weight, kernel.bias, tube.step)  # type: ignore[arg-type]
    expected = []
    for place in np.ndindex(tube.counts(7, 32)):
        near = np.ndindex(tube.space_to_depth)
        at = [tuple(p * d + i for p, d, i in zip(place, tube.space_to_depth, n, strict=True)) for n in near]
        expected.append(torch.cat([dense[:, :, x, y, z] for x, y, z in at], dim=1))
    torch.testing.assert_close(tubes(frames, embedding)[:, 4:], torch.stack(expected, dim=1), atol=1e-4, rtol=1e-4)


# --- positions ------------------------------------------------------------------------------------------------------


def test_centres_count_from_the_first_edge() -> None:
    tube = TubeConfig((4, 12, 12), (16, 32, 32), (0, 16, 16))
    found = centres(tube, 32, 224)
    assert found.shape == (98, 3)
    assert found[0].tolist() == [2, 22, 22] and found[-1].tolist() == [18, 214, 214]
    assert centres(TubeConfig((1, 16, 16), (2, 16, 16), (1, 0, 0)), 3, 16).tolist() == [[1.5, 8, 8]]
    neighbours = TubeConfig((8, 8, 8), (16, 32, 32), space_to_depth=(2, 1, 1))
    assert centres(neighbours, 32, 224)[0].tolist() == [8, 4, 4]  # of all it sees


def test_fixed_positions_are_the_papers_formula() -> None:
    width, (t, y, x) = 32, (3.5, 20.0, 8.0)
    found = fixed_positions(np.array([[t, y, x]]), width)[0]
    for j in range(width // 6):
        omega = 1 / 10_000 ** (j / (width // 6))
        waves = [f(value * omega) for value in (t, x, y) for f in (math.sin, math.cos)]
        np.testing.assert_allclose(found[6 * j : 6 * j + 6], waves, atol=1e-6)
    assert not found[30:].any()


def test_no_two_tubes_of_one_kind_have_one_position() -> None:
    vision = presets.demo().vision
    for tube in presets.demo_video().tubes:
        found = fixed_positions(centres(tube, 16, 96), vision.width)
        assert np.linalg.norm(found[:, None] - found[None], axis=-1)[~np.eye(len(found), dtype=bool)].min() > 0.5


def test_learned_positions_are_taken_at_the_centre() -> None:
    """A picture of positions that rise along rows and columns is read off exactly; at the edge it goes no further."""
    vision = dataclasses.replace(presets.demo().vision, width=2)
    video = VideoConfig(8, (TubeConfig((1, 16, 16), (4, 16, 16)), TubeConfig((8, 10, 6), (8, 31, 27), (0, 1, 2))))
    shares, fixed = position_tables(video, vision)
    rows, columns = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
    read = shares @ np.stack([rows.ravel(), columns.ravel()], axis=1).astype(np.float32)
    assert np.array_equal(read[:36], read[36:72]) and read[7].tolist() == [1, 1]
    middles = np.clip(centres(video.tubes[1], 8, 96)[:, 1:] / 16 - 0.5, 0, 5)
    np.testing.assert_allclose(read[72:], middles, atol=1e-6)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert fixed.shape == (72 + 12, 2)


def test_both_kinds_of_positions_are_added() -> None:
    model = with_video(seeded(public_tiny()), presets.patches_only(8, frames=4, every=2))
    assert model.tubes is not None
    with torch.no_grad():
        model.tubes.gate.fill_(0.5)
        found = model.video_positions()
    learned = model.vision.positions
    assert found.shape == (33, 32) and model.config.video_tokens == 33
    assert torch.equal(found[0], learned[0])  # the class token has no place in the clip
    expected = learned[1:].repeat(2, 1) + math.tanh(0.5) * model.tubes.fixed_positions
    torch.testing.assert_close(found[1:], expected)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [presets.tiny(520), public_tiny()], ids=["paper", "openmammut"])
def test_with_video_leaves_pictures_alone(config: MammutConfig) -> None:
    model = seeded(config).requires_grad_(False)
    video = presets.patches_only(config.vision.patch_size, frames=3, every=1)
    clips = with_video(model, video)
    assert model.config.video is None and clips.config.video == video and not clips.training
    assert not any(each.requires_grad for each in clips.parameters())
    pixels = clip(1)[:, 0]
    for got, want in zip(clips.encode_image(pixels), model.encode_image(pixels), strict=True):
        assert torch.equal(got, want)
    assert clips.text.head is model.text.head  # shared, not copied
    tokens, embedding = clips.encode_video(clip(3))
    assert tokens.shape == (2, clips.config.video_tokens, config.vision.width)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))
    assert with_video(clips, video) is clips
    other = with_video(clips, presets.patches_only(config.vision.patch_size, frames=2, every=1))
    assert other.encode_video(clip(2))[0].shape[0] == 2


def test_with_video_keeps_what_learns() -> None:
    model = seeded(presets.tiny()).train()
    model.text.requires_grad_(False)
    clips = with_video(model, presets.tiny_video())
    assert clips.training
    for name, parameter in clips.named_parameters():
        assert parameter.requires_grad != name.startswith("text."), name


def test_clips_need_tubes_and_their_number_of_frames() -> None:
    model = seeded(presets.tiny())
    with pytest.raises(InputError, match="the model 'tiny' has no tubes, so it takes no clips"):
        model.encode_video(clip(4))
    clips = with_video(model, presets.tiny_video())
    assert clips.encode_video(clip(4))[0].shape == (2, 14, 32)  # control
    with pytest.raises(InputError, match="expected clips of 4 frames, got 5"):
        clips.encode_video(clip(5))


TOKENIZER = train_tokenizer(["a red cat", "two dogs on a green field"], 520)


def save(folder: Path, model: Mammut) -> Path:
    size = model.config.vision.image_size
    save_checkpoint(folder, model, TOKENIZER, dataclasses.replace(RULE, size=size), OPENMAMMUT_PROMPTS)
    return folder


@pytest.mark.parametrize(
    ("config", "video"),
    [(presets.tiny(520), presets.tiny_video()), (public_tiny(), presets.patches_only(8, frames=4, every=2))],
    ids=["paper", "openmammut"],
)
def test_saved_and_loaded_clips_give_the_same(tmp_path: Path, config: MammutConfig, video: VideoConfig) -> None:
    model = with_video(seeded(config), video)
    assert model.tubes is not None
    with torch.no_grad():
        model.tubes.gate.fill_(0.7)
    loaded = load_checkpoint(save(tmp_path / "clips", model)).model
    assert loaded.config == model.config
    for got, want in zip(loaded.encode_video(clip(4)), model.encode_video(clip(4)), strict=True):
        assert torch.equal(got, want)
    stored = load_file(tmp_path / "clips" / "model.safetensors")
    assert sum(value.numel() for value in stored.values()) == sum(p.numel() for p in model.parameters())


def test_a_checkpoint_without_clips_is_what_it_was(tmp_path: Path) -> None:
    folder = save(tmp_path / "own", seeded(presets.tiny(520)))
    config = json.loads((folder / "config.json").read_text())
    assert "video" not in config["model"]
    assert not any("tubes" in name for name in load_file(folder / "model.safetensors"))
    assert load_checkpoint(folder).model.tubes is None
    config["model"]["video"] = dataclasses.asdict(presets.tiny_video())  # control: it says so, and has none
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tubes.gate: missing"):
        load_checkpoint(folder)


def test_tubes_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "clips", with_video(seeded(presets.tiny(520)), presets.tiny_video()))
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"tubes.projections.0.weight": torch.zeros(32, 6, 8, 8)}, path)
    with pytest.raises(CheckpointError, match=r"tubes.projections.0.weight: expected \[32, 6, 16, 16\], found"):
        load_checkpoint(folder)


def test_another_picture_size_for_clips(tmp_path: Path) -> None:
    folder = save(tmp_path / "clips", with_video(seeded(presets.tiny(520)), presets.tiny_video()))
    larger = load_checkpoint(folder, image_size=64).model
    assert larger.encode_video(clip(4, size=64))[0].shape[1] == larger.config.video_tokens == 2 * 16 + 16 + 2 * 4
    with pytest.raises(CheckpointError, match=r"video: tubes\[2\]: not one box of 3 x 24 x 24 .* 4 frames of 16 x 16"):
        load_checkpoint(folder, image_size=16)
