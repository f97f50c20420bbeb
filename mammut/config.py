"""The model's configuration: every difference between dialects of MaMMUT is a field, so one code path serves all.

Two dialects exist (see presets.py): the paper's (arXiv 2303.16839) and openMaMMUT's (LAION's public weights).
Reading is strict: an unknown or missing key is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mammut_runtime.errors import CheckpointError
from mammut_runtime.strict import Between, from_dict, to_dict

Size = Annotated[int, Between(1, 65_536)]
"""A positive size, bounded so that an edited config cannot ask for absurd memory."""
Depth = Annotated[int, Between(1, 256)]
Rows = Annotated[int, Between(2, 2_000_000)]


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

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain

    @classmethod
    def from_dict(cls, data: object, where: str = "config") -> MammutConfig:
        """Read strictly; CheckpointError names an unknown, missing or ill-typed key."""
        return from_dict(cls, data, where, CheckpointError)
