"""Named configurations: functions with literals.

Two families and our own: the paper's (facts and their sources: arXiv 2303.16839; what it leaves open is said below),
openMaMMUT's public sizes, and the demo that ships with the project.
"""

from __future__ import annotations

from mammut.config import MammutConfig, TextConfig, TubeConfig, VideoConfig, VisionConfig
from mammut_runtime.errors import CheckpointError


def demo(vocab_size: int = 2048) -> MammutConfig:
    """The small model that ships: about 7 M parameters, trained on a CPU in under an hour."""
    return MammutConfig(
        name="demo",
        vision=_paper_vision(image_size=96, patch_size=16, width=256, layers=5, heads=4),
        text=_paper_text(
            vocab_size=vocab_size, context_length=32, width=192, layers=4, heads=3, mlp_width=768, cross_after=(1, 3)
        ),
        embed_dim=192,
        activation="gelu",
        contrastive="infonce",
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
    )


def tiny(vocab_size: int = 64) -> MammutConfig:
    """For tests: built in milliseconds, every part present, random weights."""
    return MammutConfig(
        name="tiny",
        vision=_paper_vision(image_size=32, patch_size=16, width=32, layers=2, heads=2),
        text=_paper_text(
            vocab_size=vocab_size, context_length=24, width=24, layers=2, heads=2, mlp_width=48, cross_after=(0,)
        ),
        embed_dim=24,
        activation="gelu",
        contrastive="focal",
        logit_scale_init=10.0,
        logit_bias_init=-5.0,
    )


def paper_base() -> MammutConfig:
    """The paper's ablation model: ViT-B/16 (86 M), a 128 M decoder of 8 layers, width 1024, and 4 cross blocks.

    Not in the paper, chosen here: patch 16, heads of 64 channels, a tied head, and a vocabulary of 26,624, which is
    what 128 M minus the eight blocks leaves for the embedding.
    """
    return MammutConfig(
        name="paper-base",
        vision=_paper_vision(image_size=224, patch_size=16, width=768, layers=12, heads=12),
        text=_paper_text(
            vocab_size=26_624,
            context_length=64,
            width=1024,
            layers=8,
            heads=16,
            mlp_width=4096,
            cross_after=(1, 3, 5, 7),
        ),
        embed_dim=1024,
        activation="gelu",
        contrastive="focal",
        logit_scale_init=1.0,
        logit_bias_init=None,
    )


def paper_huge() -> MammutConfig:
    """The paper's 2 B model: ViT-H/16 (630 M), an 18-layer decoder of width 1536 and MLP 12288 (1 B with a vocabulary
    of 64,000), and 9 cross blocks with MLPs of their own (420 M)."""
    return MammutConfig(
        name="paper-huge",
        vision=_paper_vision(image_size=224, patch_size=16, width=1280, layers=32, heads=16),
        text=_paper_text(
            vocab_size=64_000,
            context_length=64,
            width=1536,
            layers=18,
            heads=24,
            mlp_width=12_288,
            cross_after=tuple(range(1, 18, 2)),
        ),
        embed_dim=1536,
        activation="gelu",
        contrastive="focal",
        logit_scale_init=1.0,
        logit_bias_init=None,
    )


def published_video(patch_size: int = 16, frames: int = 32) -> VideoConfig:
    """TubeViT's four tubes (its tables 10 to 12), meant for pictures of 224 px and at least 20 frames.

    Four times as many channels are read at half the stride in both directions of space ("4x spatial"). At 224 px and
    with patches of 16: 539 tokens of 32 frames (the paper says 559; its own kernels, strides and offsets give 539),
    1,176 of 64.
    """
    return VideoConfig(
        frames=frames,
        tubes=(
            _patches(patch_size, every=32),
            TubeConfig(kernel=(8, 8, 8), stride=(16, 32, 32), space_to_depth=(2, 1, 1)),
            TubeConfig(kernel=(16, 4, 4), stride=(6, 32, 32), offset=(4, 8, 8), space_to_depth=(1, 2, 2)),
            TubeConfig(kernel=(4, 12, 12), stride=(16, 32, 32), offset=(0, 16, 16)),
        ),
    )


def demo_video() -> VideoConfig:
    """For the demo's pictures of 96 px: 180 tokens of 16 frames.

    The published shapes, brought closer together, because things that move are small here and a clip is short: the
    patches of two frames (what is there, early and late: 72 tokens), short thick tubes in every patch (which way and
    how fast: 72), and one tube through all frames in every patch (when something passes: 36). The published short wide
    tubes are left out: their matrix alone would be 0.9 MB of a checkpoint that must stay small.
    """
    return VideoConfig(
        frames=16,
        tubes=(
            _patches(16, every=8, first=4),
            TubeConfig(kernel=(8, 8, 8), stride=(8, 16, 16), offset=(0, 4, 4)),
            TubeConfig(kernel=(16, 4, 4), stride=(16, 16, 16), offset=(0, 6, 6)),
        ),
    )


def video_for(vision: VisionConfig) -> VideoConfig:
    """Tubes for a model that has seen pictures only: the published ones, or for small pictures the demo's. Raises
    CheckpointError where none of them fit."""
    usual = published_video(vision.patch_size) if vision.image_size >= 160 else demo_video()
    chosen = tiny_video() if vision.image_size < 64 else usual
    if problem := chosen.problem(vision):
        raise CheckpointError(f"no tubes are known for this encoder; set model.video in the config: {problem}")
    return chosen


def tiny_video() -> VideoConfig:
    """For tests, with `tiny`: 14 tokens of 4 frames, every kind of tube."""
    return VideoConfig(
        frames=4,
        tubes=(
            _patches(16, every=2),
            TubeConfig(kernel=(2, 16, 16), stride=(4, 16, 16)),
            TubeConfig(kernel=(3, 8, 8), stride=(1, 32, 32), offset=(0, 4, 4), space_to_depth=(1, 2, 2)),
        ),
    )


def patches_only(patch_size: int, frames: int, every: int, first: int = 0) -> VideoConfig:
    """The picture's patches of every so manieth frame, and no tubes: clips as sets of pictures."""
    return VideoConfig(frames=frames, tubes=(_patches(patch_size, every=every, first=first),))


OPENMAMMUT_SIZES = tuple(f"{size}-{patch}" for size in "SMBLH" for patch in (32, 16, 14))
"""The public openMaMMUT configurations, by name."""


def openmammut(size: str) -> MammutConfig:
    """A public openMaMMUT configuration at 224 px, e.g. "B-32".

    Raises:
        KeyError: size is not one of OPENMAMMUT_SIZES.
    """
    vision_layers, vision_width, vision_heads, text_layers, text_width, text_heads = {
        "S": (12, 384, 6, 12, 384, 6),
        "M": (12, 512, 8, 12, 512, 8),
        "B": (12, 768, 12, 12, 512, 8),
        "L": (24, 1024, 16, 12, 768, 12),
        "H": (32, 1280, 16, 24, 1024, 16),
    }[size[0]]
    if size == "B-16":
        text_width, text_heads = 768, 12
    return openmammut_config(
        name=f"openmammut-{size}",
        image_size=224,
        patch_size={"32": 32, "16": 16, "14": 14}[size[2:]],
        vision=(vision_layers, vision_width, vision_heads, 4 * vision_width),
        text=(text_layers, text_width, text_heads),
        mlp_in_crossed_blocks=size == "B-16" or size[0] in "LH",
    )


def openmammut_config(
    *,
    name: str,
    image_size: int,
    patch_size: int,
    vision: tuple[int, int, int, int],
    text: tuple[int, int, int],
    mlp_in_crossed_blocks: bool,
    cross_ratio: int = 2,
    context_length: int = 77,
    vocab_size: int = 49_408,
    embedding_rows: int = 49_408,
    quick_gelu: bool = False,
) -> MammutConfig:
    """The openMaMMUT dialect. vision: layers, width, heads, MLP width; text: layers, width, heads (MLP is 4 x width).

    A cross block follows the self blocks whose index is a multiple of layers // (layers // cross_ratio).
    """
    layers, width, heads, mlp_width = vision
    text_layers, text_width, text_heads = text
    step = text_layers // (text_layers // cross_ratio)
    return MammutConfig(
        name=name,
        vision=VisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            mlp_width=mlp_width,
            class_token=True,
            pre_norm=True,
            patch_bias=False,
            final_norm="after_pool",
            embedding="own_projection",
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            embedding_rows=embedding_rows,
            context_length=context_length,
            width=text_width,
            layers=text_layers,
            heads=text_heads,
            mlp_width=4 * text_width,
            cross_after=tuple(range(0, text_layers, step)),
            mlp_in_crossed_blocks=mlp_in_crossed_blocks,
            memory_norm=True,
            mask_pads=False,
            tied_head=False,
        ),
        embed_dim=text_width,
        activation="quick_gelu" if quick_gelu else "gelu",
        contrastive="infonce",
        logit_scale_init=1 / 0.07,
        logit_bias_init=None,
    )


def _patches(patch_size: int, *, every: int, first: int = 0) -> TubeConfig:
    patch = (patch_size, patch_size)
    return TubeConfig(kernel=(1, *patch), stride=(every, *patch), offset=(first, 0, 0))


def _paper_vision(*, image_size: int, patch_size: int, width: int, layers: int, heads: int) -> VisionConfig:
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        final_norm="before_pool",
        embedding="memory_projection",
    )


def _paper_text(
    *,
    vocab_size: int,
    context_length: int,
    width: int,
    layers: int,
    heads: int,
    mlp_width: int,
    cross_after: tuple[int, ...],
) -> TextConfig:
    return TextConfig(
        vocab_size=vocab_size,
        embedding_rows=vocab_size,
        context_length=context_length,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=mlp_width,
        cross_after=cross_after,
        mlp_in_crossed_blocks=True,
        memory_norm=False,
        mask_pads=True,
        tied_head=True,
    )
