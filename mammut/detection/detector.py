"""The open-vocabulary detector: a class-agnostic head on the model's encoder, scored against embeddings of names.

One forward is one picture's whole way (paper section on detection; F-VLM, DITO): encoder, pyramid, proposals, RoIAlign,
region vectors, and two scores for each name, one of the head's embedding of the region and one of the encoder's own,
joined by a geometric mean. Names are an input. What overlaps is thinned out afterwards, by the runtime.

Legend: B batch, D input side, T places, P proposals, C pyramid width, E embedding, K names, W trunk width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.detection.config import DetectorConfig
from mammut.detection.proposals import ProposalHead, best, decode, peaks, place_centers, place_sides
from mammut.detection.pyramid import Pyramid
from mammut.detection.regions import align, region_levels
from mammut.detection.trunk import resized_positions, trunk_maps
from mammut.model import Mammut
from mammut_runtime.errors import CheckpointError

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""The refinement's raw numbers are divided by these: shifts of the centre, logarithms of the sides."""
FIRST_GAIN = 0.5
"""Of what the head adds to the encoder's embedding, whose length is 1, before training; its own is about 1."""
SHORTEST = 1.0
"""Pixels a box is at least wide and high before its refinement."""


@dataclass(frozen=True)
class Features:
    """What a picture is to the heads."""

    levels: list[Tensor]
    """float[B, C, H, H], one a stride."""
    last: Tensor
    """float[B, grid * grid, W]: what leaves the encoder."""


class NormalizedLinear(nn.Linear):
    """Cosines: rows of the matrix and the input are brought to unit length first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class RegionHead(nn.Module):
    """From a region's cells to the refinement of its box and its embedding in the space of the texts.

    The pyramid is narrow, so the head also gets the mean of the encoder's own map in the region.
    """

    def __init__(self, config: DetectorConfig, trunk_width: int, embed_dim: int) -> None:
        super().__init__()
        self.cells = config.roi_size
        self.convolutions = nn.ModuleList(
            nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(config.roi_convs)
        )
        self.flatten = nn.Linear(config.width * config.roi_size**2, config.roi_width)
        self.context_norm = nn.LayerNorm(trunk_width)
        self.context = nn.Linear(trunk_width, config.roi_width)
        self.norm = nn.LayerNorm(config.roi_width)
        self.refine = nn.Linear(config.roi_width, 4)
        self.embed = NormalizedLinear(config.roi_width, embed_dim, bias=False)
        nn.init.zeros_(self.refine.weight)
        nn.init.zeros_(self.refine.bias)

    def forward(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Cells float[N, R * R, C] and means float[N, W] to deltas float[N, 4] and embeddings float[N, E], their length
        not 1."""
        x = x.transpose(1, 2).reshape(-1, x.shape[2], self.cells, self.cells)
        for convolution in self.convolutions:
            x = x + F.gelu(convolution(x))
        x = F.gelu(self.norm(self.flatten(x.flatten(1)) + self.context(self.context_norm(pooled))))
        return self.refine(x), self.embed(x)


class Detector(nn.Module):
    """A detector and the model whose encoder and embedding space it uses.

    Args:
        config: its sizes and rules.
        model: shared, not copied; parameters named "model." are the model's, see own_state.
        trained_positions: those of the encoder, where the model's were resized to another picture size since.

    Raises:
        CheckpointError: the config does not fit the model (says how).
    """

    places: Tensor
    sides: Tensor
    positions: Tensor

    def __init__(self, config: DetectorConfig, model: Mammut, trained_positions: Tensor | None = None) -> None:
        super().__init__()
        _check_fits(config, model)
        self.config, self.model = config, model
        vision = model.config.vision
        self.pyramid = Pyramid(config, vision.width, vision.patch_size)
        self.propose = ProposalHead(config)
        self.regions = RegionHead(config, vision.width, model.config.embed_dim)
        self.background = nn.Parameter(torch.randn(model.config.embed_dim) * model.config.embed_dim**-0.5)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.gain = nn.Parameter(torch.tensor(FIRST_GAIN)) if config.residual else None
        self.register_buffer("places", place_centers(config), persistent=False)
        self.register_buffer("sides", place_sides(config), persistent=False)
        learned = model.vision.positions.detach() if trained_positions is None else trained_positions
        self.register_buffer("positions", resized_positions(learned, model.vision, config), persistent=False)

    def own_state(self) -> dict[str, Tensor]:
        """The detector's own parameters by name, without the model's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_own(self, state: dict[str, Tensor]) -> None:
        """Take over what own_state gave. RuntimeError where it does not fit."""
        missing, unknown = self.load_state_dict(state, strict=False)
        own = [name for name in missing if not name.startswith("model.")]
        if own or unknown:
            raise RuntimeError(f"missing {own}, unknown {list(unknown)}")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The same, to be trained."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("model.")}

    def forward(self, pixels: Tensor, classes: Tensor, novel: Tensor) -> tuple[Tensor, Tensor]:
        """Detect.

        Args:
            pixels: float32[B, 3, D, D], normalised by the preprocess rule.
            classes: float32[K, E], the names' embeddings, unit length.
            novel: float32[K], 1 for names that no box was trained with, else 0.

        Returns:
            boxes float32[B, P, 4], xyxy in input pixels, and scores float32[B, P, K] in [0, 1], best places first.
        """
        features = self.features(pixels)
        logits, boxes = self.proposals(features)
        centerness, boxes = best(peaks(torch.sigmoid(logits), self.config), boxes, self.config.proposals)
        pooled = self.pool(features, boxes)
        seen = self.encoder_embeddings(pooled)
        deltas, embeddings = self.describe(features, boxes, pooled, seen)
        scores = fused(
            self.class_logits(embeddings, classes), self.encoder_logits(seen, classes), novel, centerness, self.config
        )
        return refined(boxes, deltas, self.config.image_size), scores

    def features(self, pixels: Tensor) -> Features:
        """Encoder and pyramid."""
        *taps, last = trunk_maps(self.model.vision, self.config, self.positions, pixels)
        return Features(self.pyramid(taps, pixels), last)

    def proposals(self, features: Features) -> tuple[Tensor, Tensor]:
        """Centerness logits float[B, T] and boxes float[B, T, 4] of all places."""
        logits, distances = self.propose(features.levels)
        return logits, decode(distances, self.places, self.sides, self.config.image_size)

    def describe(self, features: Features, boxes: Tensor, pooled: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Deltas float[B, P, 4] and unit embeddings float[B, P, E] of boxes float[B, P, 4].

        pooled, seen: what `pool` and encoder_embeddings give for them.
        """
        config = self.config
        maps = torch.cat([level.flatten(2).transpose(1, 2) for level in features.levels], dim=1)
        levels = region_levels(boxes, config.strides, config.anchor_scale)
        cells = align(maps, boxes, levels, config.strides, config.image_size, config.roi_size, config.roi_samples)
        deltas, embeddings = self.regions(cells.flatten(0, 1), pooled.flatten(0, 1))
        deltas, embeddings = deltas.float(), embeddings.float().reshape(seen.shape)
        if self.gain is not None:
            embeddings = seen + self.gain * embeddings
        return deltas.reshape(boxes.shape), F.normalize(embeddings, dim=-1)

    def pool(self, features: Features, boxes: Tensor) -> Tensor:
        """float[B, P, W]: the mean of the encoder's last map in each box."""
        strides, levels = (self.model.config.vision.patch_size,), torch.zeros_like(boxes[..., 0], dtype=torch.int64)
        size, cells = self.config.image_size, self.config.roi_size
        return align(features.last, boxes, levels, strides, size, cells, 1).mean(dim=2)

    def encoder_embeddings(self, pooled: Tensor) -> Tensor:
        """float[B, P, E], unit length: projected as the mean of a whole picture is."""
        model = self.model
        if model.config.vision.final_norm == "after_pool":
            pooled = model.vision.final_norm(pooled)
        projected: Tensor = (model.image_projection or model.memory_projection)(pooled)
        return F.normalize(projected.float(), dim=-1)

    def class_logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """float[B, P, 1 + K], the background first."""
        rows = torch.cat([F.normalize(self.background, dim=0)[None], classes])
        return embeddings @ rows.T * (torch.exp(self.log_scale) / self.config.temperature)

    def encoder_logits(self, seen: Tensor, classes: Tensor) -> Tensor:
        """float[B, P, K]: cosines times the model's own scale."""
        return seen @ classes.T * self.model.logit_scale


def refined(boxes: Tensor, deltas: Tensor, size: int) -> Tensor:
    """Boxes [..., 4] moved by deltas [..., 4], inside the input."""
    low, high = boxes[..., :2], boxes[..., 2:]
    sides, centers = (high - low).clamp(min=SHORTEST), (low + high) / 2
    weights = torch.tensor(BOX_WEIGHTS, dtype=deltas.dtype, device=deltas.device)
    deltas = deltas / weights
    centers = centers + deltas[..., :2] * sides
    half = sides * torch.exp(deltas[..., 2:].clamp(-2, 2)) / 2
    return torch.cat([centers - half, centers + half], dim=-1).clamp(0, size)


def fused(logits: Tensor, seen: Tensor, novel: Tensor, centerness: Tensor, config: DetectorConfig) -> Tensor:
    """The final scores float[B, P, K].

    p = softmax over background and names, z = softmax over names of the encoder's logits; p^(1 - w) z^w with w by
    whether the name is novel; the background keeps its p; together they are made to sum to 1; times centerness to the
    objectness power.
    """
    p = torch.log_softmax(logits, dim=-1)
    z = torch.log_softmax(seen, dim=-1)
    weight = config.base_weight + (config.novel_weight - config.base_weight) * novel
    joined = torch.exp((1 - weight) * p[..., 1:] + weight * z)
    total = joined.sum(dim=-1, keepdim=True) + torch.exp(p[..., :1])
    return joined / total * (centerness**config.objectness_power)[..., None]


def _check_fits(config: DetectorConfig, model: Mammut) -> None:
    vision = model.config.vision
    grid, layers = config.image_size // vision.patch_size, vision.layers
    ratios = [max(s, vision.patch_size) / min(s, vision.patch_size) for s in config.strides]
    problems = {
        f"image_size {config.image_size} is not a whole number of patches of {vision.patch_size} pixels": (
            config.image_size % vision.patch_size != 0
        ),
        f"strides {config.strides} must ascend by powers of two from, to or through the patch size "
        f"{vision.patch_size}": (
            list(config.strides) != sorted(set(config.strides)) or any(r not in (1, 2, 4, 8, 16) for r in ratios)
        ),
        f"image_size {config.image_size} is not a whole number of the coarsest stride {max(config.strides)}": (
            config.image_size % max(config.strides) != 0
        ),
        f"window {config.window} does not divide the grid of {grid} patches": (
            config.window > 0 and grid % config.window != 0
        ),
        f"stem_width {config.stem_width}: strides {config.strides} are no powers of two; set it to 0": (
            config.stem_width > 0 and any(stride & (stride - 1) for stride in config.strides)
        ),
        f"taps {config.taps} must be ascending blocks below {layers}, at least one": (
            not config.taps or list(config.taps) != sorted(set(config.taps) & set(range(layers)))
        ),
        f"global_layers {config.global_layers} must be blocks below {layers}": (
            not set(config.global_layers) <= set(range(layers))
        ),
        f"proposals {config.proposals} are more than the {config.places} places": config.proposals > config.places,
    }
    for problem, present in problems.items():
        if present:
            raise CheckpointError(f"detector config for model {model.config.name!r}: {problem}")
