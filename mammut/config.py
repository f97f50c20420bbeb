"""The model's configuration: every difference between dialects of MaMMUT is a field, so one code path serves all.

Two dialects exist (see presets.py): the paper's (arXiv 2303.16839) and openMaMMUT's (LAION's public weights).
Reading is strict: an unknown or missing key is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mammut_runtime.errors import CheckpointError
from mammut_runtime.strict import Between, Length, Omissible, from_dict, to_dict

Size = Annotated[int, Between(1, 65_536)]
"""A positive size, bounded so that an edited config cannot ask for absurd memory."""
Depth = Annotated[int, Between(1, 256)]
Rows = Annotated[int, Between(2, 2_000_000)]
Start = Annotated[int, Between(0, 65_536)]
Pixels = tuple[Size, Size, Size]
"""Frames, rows, columns."""

MOST_VIDEO_TOKENS = 1_600
"""Tokens of a clip that a config may ask for: attention costs their square, and TubeViT lost accuracy beyond 1,500."""


@dataclass(frozen=True)
class VisionConfig:
    """The ViT encoder."""

    image_size: Size
    """Side of the square input picture, pixels. Rows and columns beyond a whole number of patches are not seen."""
    patch_size: Size
    """Side of a patch, pixels."""
    width: Size
    """Channels of a token."""
    layers: Depth
    heads: Size
    mlp_width: Size
    """Hidden channels of a block's MLP."""
    class_token: bool
    """A learned token in front of the patches (openMaMMUT: yes, paper: no). It takes part in pooling."""
    pre_norm: bool
    """A LayerNorm on the embedded patches before the first block (openMaMMUT: yes)."""
    patch_bias: bool
    """Whether the patch embedding has a bias (openMaMMUT: no)."""
    final_norm: Literal["before_pool", "after_pool"]
    """Where the last LayerNorm stands. before_pool: the tokens that leave the encoder are normalised, and their mean is
    the pooled vector (paper). after_pool: tokens leave raw; the mean is normalised (openMaMMUT)."""
    embedding: Literal["own_projection", "memory_projection"]
    """Which matrix takes the pooled vector to the shared space: one of its own (openMaMMUT), or the one that also makes
    the decoder's memory (paper: the mean of the linearly projected tokens)."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that leave the encoder."""
        return self.grid**2 + int(self.class_token)


@dataclass(frozen=True)
class TubeConfig:
    """One kind of tube: a box of pixels that becomes one token, cut out of the clip at regular places.

    All sizes are frames, rows, columns, in frames and input pixels. Tubes that would reach over the clip's end or the
    picture's edge are left out.
    """

    kernel: Pixels
    """Size of the box."""
    stride: Pixels
    """From one token's box to the next one's."""
    offset: tuple[Start, Start, Start] = (0, 0, 0)
    """Where the first box begins."""
    space_to_depth: Pixels = (1, 1, 1)
    """Boxes per token along each axis: a token is made from this many neighbours, `stride / space_to_depth` apart, each
    giving its share of the channels. (1, 1, 1): one box."""

    def __post_init__(self) -> None:
        for axis, stride, depth in zip(("frames", "rows", "columns"), self.stride, self.space_to_depth, strict=True):
            if stride % depth:
                raise ValueError(f"stride {stride} ({axis}) is not divisible by space_to_depth {depth}")

    @property
    def step(self) -> tuple[int, int, int]:
        """From one box to the next, also between the neighbours of one token."""
        t, h, w = (stride // depth for stride, depth in zip(self.stride, self.space_to_depth, strict=True))
        return t, h, w

    @property
    def span(self) -> tuple[int, int, int]:
        """What one token sees: its box, or its neighbours with all between them."""
        parts = zip(self.kernel, self.step, self.space_to_depth, strict=True)
        t, h, w = (kernel + (depth - 1) * step for kernel, step, depth in parts)
        return t, h, w

    def counts(self, frames: int, image_size: int) -> tuple[int, int, int]:
        """Tokens along each axis of a clip; 0 where not even one fits."""
        axes = zip((frames, image_size, image_size), self.offset, self.span, self.stride, strict=True)
        t, h, w = (max(0, (size - offset - span) // stride + 1) for size, offset, span, stride in axes)
        return t, h, w

    def is_patches(self, patch_size: int) -> bool:
        """Whether these are the picture's own patches, of some of the frames."""
        patch = (patch_size, patch_size)
        single = self.kernel[0] == 1 and self.space_to_depth == (1, 1, 1) and self.offset[1:] == (0, 0)
        return single and self.kernel[1:] == patch and self.stride[1:] == patch


@dataclass(frozen=True)
class VideoConfig:
    """How a clip becomes tokens: sparse tubes (TubeViT, arXiv 2212.03229) through the picture's own encoder."""

    frames: Annotated[int, Between(1, 1_024)]
    """Of every clip."""
    tubes: Annotated[tuple[TubeConfig, ...], Length(1, 16)]
    """In the order of their tokens. One of them is the picture's patches: kernel (1, patch, patch), stride (any, patch,
    patch), offset (any, 0, 0). It has the picture's own embedding and learned positions."""

    def tokens(self, image_size: int) -> int:
        """Tokens of a clip at this picture size, without the class token."""
        return sum(math.prod(tube.counts(self.frames, image_size)) for tube in self.tubes)

    def problem(self, vision: VisionConfig) -> str | None:
        """Why this encoder cannot have these tubes, or None."""
        size, patch = vision.image_size, vision.patch_size
        for index, tube in enumerate(self.tubes):
            if not all(tube.counts(self.frames, size)):
                return (
                    f"tubes[{index}]: not one box of {_sized(tube.span)} from {_sized(tube.offset)} on fits into "
                    f"{self.frames} frames of {size} x {size} pixels; make it smaller or leave it out"
                )
            if vision.width % math.prod(tube.space_to_depth):
                return f"tubes[{index}]: space_to_depth {tube.space_to_depth} does not divide the width {vision.width}"
        if sum(tube.is_patches(patch) for tube in self.tubes) != 1:
            return (
                f"expected exactly one tube that is the picture's patches, kernel [1, {patch}, {patch}], stride "
                f"[any, {patch}, {patch}], offset [any, 0, 0] and no space_to_depth"
            )
        if (tokens := self.tokens(size)) > MOST_VIDEO_TOKENS:
            return (
                f"{tokens:,} tokens of {self.frames} frames of {size} x {size} pixels; expected at most "
                f"{MOST_VIDEO_TOKENS:,}: use larger strides, fewer frames or a smaller picture"
            )
        return None


def _sized(sizes: tuple[int, int, int]) -> str:
    return " x ".join(map(str, sizes))


@dataclass(frozen=True)
class TextConfig:
    """The one text decoder with its two passes."""

    vocab_size: Rows
    """Columns of the vocabulary projection."""
    embedding_rows: Rows
    """Rows of the token embedding. openMaMMUT always has 49408 or `vocab_size`; equal to vocab_size when tied."""
    context_length: Size
    """Learned positions, so the longest sequence, in tokens."""
    width: Size
    layers: Depth
    heads: Size
    mlp_width: Size
    cross_after: tuple[int, ...]
    """Indices of the self blocks that a cross-attention block follows, ascending."""
    mlp_in_crossed_blocks: bool
    """Whether the self blocks named in cross_after own an MLP (openMaMMUT `has_mlp`; S, M, B-32, B-14: no)."""
    memory_norm: bool
    """Whether each cross block normalises the image memory before its keys and values (openMaMMUT: yes)."""
    mask_pads: bool
    """Contrastive pass: padding is hidden from attention and left out of the mean (paper, open question), or takes part
    in both (openMaMMUT: weights were trained so, always padded to context_length)."""
    tied_head: bool
    """The vocabulary projection is the token embedding transposed."""
    contrastive_mask: Annotated[Literal["bidirectional", "causal"], Omissible()] = "bidirectional"
    """What a token sees in the contrastive pass: all of the text (both dialects), or itself and those before it, which
    the paper found worse (see docs/ablations.md)."""

    @property
    def text_length(self) -> int | None:
        """The length texts must be padded to for the contrastive pass; None where padding has no effect."""
        return None if self.mask_pads else self.context_length


@dataclass(frozen=True)
class MammutConfig:
    """A whole model."""

    name: str
    vision: VisionConfig
    text: TextConfig
    embed_dim: Size
    """Size of the shared embedding space. Equals text.width: the text side has no projection."""
    activation: Literal["gelu", "quick_gelu"]
    """gelu: exact (erf). quick_gelu: x * sigmoid(1.702 x)."""
    contrastive: Literal["focal", "infonce"]
    """The loss the embeddings were (or will be) trained with; says how similarities become probabilities:
    focal: sigmoid of each pair, infonce: softmax over the candidates."""
    logit_scale_init: Annotated[float, Between(1e-6, 1e6)]
    """Initial factor on the cosine (1 / temperature). Paper: 1.0; openMaMMUT: 1 / 0.07."""
    logit_bias_init: float | None
    """Initial bias added to the scaled cosine, or None where the model has no bias."""
    video: Annotated[VideoConfig | None, Omissible()] = None
    """How clips are read, or None: pictures only."""

    @property
    def video_tokens(self) -> int:
        """Tokens of a clip that leave the encoder, the class token among them; 0 without video."""
        clips = self.video.tokens(self.vision.image_size) if self.video else 0
        return clips + int(self.vision.class_token) if clips else 0

    def __post_init__(self) -> None:
        text, vision = self.text, self.vision
        problems = {
            f"embed_dim {self.embed_dim} must equal text.width {text.width}": self.embed_dim != text.width,
            f"vision.width {vision.width} is not divisible by vision.heads {vision.heads}": vision.width % vision.heads,
            f"text.width {text.width} is not divisible by text.heads {text.heads}": text.width % text.heads,
            f"vision.image_size {vision.image_size} is smaller than one patch": vision.grid < 1,
            f"text.cross_after {text.cross_after} must be ascending block indices below {text.layers}": (
                list(text.cross_after) != sorted(set(text.cross_after) & set(range(text.layers)))
            ),
            "a tied head needs embedding_rows == vocab_size": (
                text.tied_head and text.embedding_rows != text.vocab_size
            ),
        }
        for problem, present in problems.items():
            if present:
                raise CheckpointError(f"model config {self.name!r}: {problem}")
        if self.video is not None and (found := self.video.problem(vision)):
            raise CheckpointError(f"model config {self.name!r}: video: {found}")

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain

    @classmethod
    def from_dict(cls, data: object, where: str = "config") -> MammutConfig:
        """Read strictly; CheckpointError names an unknown, missing or ill-typed key."""
        return from_dict(cls, data, where, CheckpointError)
