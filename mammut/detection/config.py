"""Everything about a detector that is decided before it is trained: the checkpoint's config.json holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mammut.config import MammutConfig, Size
from mammut_runtime.detection.rule import MAX_NAMES, Name, Share
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.strict import Between, Length, from_dict, to_dict

Block = Annotated[int, Between(0, 255)]


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes and rules of a detector on the picture encoder it shares with its model."""

    image_size: Annotated[int, Between(32, 4096)]
    """Side of the square input, pixels: a whole number of patches, and of the coarsest level's steps."""
    window: Annotated[int, Between(0, 256)]
    """Side of the windows that most of the trunk's blocks attend in, patches; 0: every block attends everywhere."""
    global_layers: tuple[Block, ...]
    """Blocks (from 0) that attend everywhere although there are windows."""
    taps: tuple[Block, ...]
    """Blocks whose output the pyramid is built from, ascending. The paper's: only the last."""
    stem_width: Annotated[int, Between(0, 1024)]
    """Channels of a small convolutional stem that sees the pixels and joins the pyramid: it says where edges are, which
    a small frozen trunk forgets. 0: none, as in the paper."""
    strides: Annotated[tuple[Annotated[int, Between(2, 256)], ...], Length(1, 6)]
    """Pixels between places of each pyramid level: the patch size times or divided by powers of two, ascending."""
    width: Size
    """Channels of the pyramid."""
    anchor_scale: Annotated[float, Between(0.5, 64)]
    """Side of the one anchor at each place, in strides: says which level looks for things of which size."""
    proposals: Annotated[int, Between(1, 4096)]
    """Boxes that leave the proposal stage, whatever the picture."""
    roi_size: Annotated[int, Between(1, 32)]
    """Cells along one side of a region."""
    roi_samples: Annotated[int, Between(1, 8)]
    """Points along one side of a cell that are averaged (sampling ratio)."""
    roi_convs: Annotated[int, Between(0, 8)]
    """3 x 3 convolutions over a region."""
    roi_width: Size
    """Channels of a region's vector."""
    residual: bool
    """A region's embedding is the encoder's own of that region and what the head adds to it, so that names without
    boxes keep what the encoder knows of them. The paper's: the head's alone."""
    temperature: Annotated[float, Between(1e-4, 10)]
    """The region's cosines are divided by it; also the scale of the learned factor's start."""
    background_weight: Share
    """Of regions without a thing, in the classifier's loss."""
    base_weight: Share
    """Exponent of the encoder's own score for names that were trained with boxes; the region's gets the rest."""
    novel_weight: Share
    """The same for names that were not."""
    objectness_power: Annotated[float, Between(0, 10)]
    """Of the proposal's centerness in the final score."""
    fill: Annotated[int, Between(0, 255)]
    """Grey around a picture that is not square."""
    nms_iou: Share
    """A box that overlaps a better one of its name by more than this is left out."""
    threshold: Share
    """Lowest score that counts, unless the user says otherwise."""
    templates: Annotated[tuple[Annotated[str, Length(2, 1000)], ...], Length(1, 1000)]
    """Prompts for names, each with {} once; a name's embedding is the mean over them, of unit length."""
    base_names: Annotated[tuple[Name, ...], Length(0, MAX_NAMES)]
    """Names that boxes were trained with, in alphabetical order; before training: none."""

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        return plain

    @classmethod
    def from_dict(cls, data: object, where: str = "detector") -> DetectorConfig:
        """Read strictly; CheckpointError names an unknown, missing or ill-typed key."""
        return from_dict(cls, data, where, CheckpointError)

    @property
    def places(self) -> int:
        """Places over all levels: from each comes one box."""
        return sum((self.image_size // stride) ** 2 for stride in self.strides)


def checked(config: DetectorConfig) -> DetectorConfig:
    """The same, held to what reading it from a checkpoint and a bundle's manifest will ask. Raises InputError."""
    for template in config.templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise InputError(f"template {template[:80]!r}: expected {{}} once, for the name, and no other braces")
    return from_dict(DetectorConfig, config.to_dict(), "detector", InputError)


def detector_for(model: MammutConfig, templates: tuple[str, ...]) -> DetectorConfig:
    """A detector that suits a model: the demo's kind for small encoders, the paper's for those of ViT-B's size and up.

    The exponents are F-VLM's (0.35 and 0.65); the objectness power is 3 in the paper's form and 1 in the small one,
    whose centerness is a probability that something is there at all.
    """
    vision = model.vision
    patch, last = vision.patch_size, vision.layers - 1
    if vision.width < 512:
        even = patch & (patch - 1) == 0
        return DetectorConfig(
            image_size=12 * patch,
            window=0,
            global_layers=(),
            taps=tuple(sorted({last // 2, last})),
            stem_width=64 if even and patch >= 4 else 0,
            strides=(patch // 2, patch, 2 * patch),
            width=96,
            anchor_scale=4.0,
            proposals=64,
            roi_size=5,
            roi_samples=2,
            roi_convs=2,
            roi_width=384,
            residual=True,
            temperature=0.05,
            background_weight=0.9,
            base_weight=0.35,
            novel_weight=0.65,
            objectness_power=1.0,
            fill=127,
            nms_iou=0.5,
            threshold=0.1,
            templates=templates,
            base_names=(),
        )
    quarter, grid = vision.layers // 4, 8 * round(1024 / (8 * patch))
    return DetectorConfig(
        image_size=grid * patch,
        window=grid // 4,
        global_layers=tuple(quarter * k - 1 for k in (1, 2, 3, 4)),
        taps=(last,),
        stem_width=0,
        strides=tuple(patch * k // 4 for k in (1, 2, 4, 8) if patch * k % 4 == 0),
        width=256,
        anchor_scale=8.0,
        proposals=300,
        roi_size=7,
        roi_samples=2,
        roi_convs=4,
        roi_width=1024,
        residual=False,
        temperature=0.01,
        background_weight=0.9,
        base_weight=0.35,
        novel_weight=0.65,
        objectness_power=3.0,
        fill=127,
        nms_iou=0.5,
        threshold=0.05,
        templates=templates,
        base_names=(),
    )
