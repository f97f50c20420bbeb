"""What a detector learns from a batch: which places and regions belong to which boxes, and the four losses.

Places (FCOS, OLN): a box belongs to the places near its centre on the levels whose anchor is at most `REACH` times
larger or smaller; they learn its four distances (1 - IoU) and their centerness, all others centerness 0, unless the
picture may hold things that nobody boxed. Regions (Fast R-CNN): a proposal that overlaps a box by half learns its name
and how to fit it better, one that overlaps none is background.

Legend: B batch, T places, G boxes, S sampled regions, K names of the step, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mammut.detection.detector import SHORTEST, Detector, refined
from mammut.detection.feeding import Batch
from mammut.detection.proposals import best, peaks

REACH = 2.0
NEAR = 1.5
"""Strides from a box's centre within which places are its own."""
THING_IOU, REFINED_IOU = 0.5, 0.4
"""Overlap from which a region has a box's name, and from which it learns to fit it."""
CROWD_SHARE = 0.5
"""Of a region inside an ignored one that takes it out of the background."""


@dataclass(frozen=True)
class LossOptions:
    """Weights and sample sizes."""

    centerness: float = 1.0
    places: float = 2.0
    names: float = 1.0
    boxes: float = 1.0
    regions: int = 24
    """Regions of a picture that are looked at."""
    things: float = 0.5
    """At most this share of them are things."""


def detection_losses(
    detector: Detector, batch: Batch, classes: Tensor, options: LossOptions, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Scalars: "centerness", "places", "names", "boxes", and "loss", their weighted sum.

    Args:
        classes: float32[K, E], unit length: every name of the batch's vocabulary, in order.
        generator: draws the regions.
    """
    features = detector.features(batch.pixels)
    logits, boxes = detector.proposals(features)
    found = place_losses(detector, batch, logits, boxes)
    with torch.no_grad():
        centerness = peaks(torch.sigmoid(logits), detector.config)
        _, proposed = best(centerness, boxes, detector.config.proposals)
        regions, owner, state = sample_regions(batch, proposed, options, generator)
    pooled = detector.pool(features, regions)
    deltas, embeddings = detector.describe(features, regions, pooled, detector.encoder_embeddings(pooled))
    found |= region_losses(detector, batch, classes, regions, owner, state, deltas, embeddings)
    weights = {"centerness": options.centerness, "places": options.places, "names": options.names,
               "boxes": options.boxes}  # fmt: skip
    found["loss"] = torch.stack([found[name] * weight for name, weight in weights.items()]).sum()
    return found


def place_losses(detector: Detector, batch: Batch, logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Of every place: its centerness, and its box where it has one."""
    owner, target, judged = place_targets(detector, batch)
    own = owner >= 0
    number = own.sum().clamp(min=1)
    wrong = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wanted = batch.boxes.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    overlap = paired_iou(boxes, wanted)
    return {
        "centerness": (wrong * judged).sum() / number,
        "places": ((1 - overlap) * target * own).sum() / (target * own).sum().clamp(min=1),
    }


def place_targets(detector: Detector, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """For each place: its box int64[B, T] (-1: none), its centerness float[B, T], and whether that counts (0 or 1)."""
    centers, sides = detector.places[None, :, None], detector.sides[None, :, None]
    strides = sides / detector.config.anchor_scale
    low, high = batch.boxes[:, None, :, :2], batch.boxes[:, None, :, 2:]
    before, after = centers - low, high - centers  # [B, T, G, 2]
    inside = (torch.minimum(before, after).amin(dim=-1)) > 0
    near = ((before - after).abs().amax(dim=-1) / 2) < NEAR * strides
    area = (high - low).prod(dim=-1)  # [B, 1, G]
    ratio = area.clamp(min=1).sqrt() / sides
    finest, coarsest = detector.sides.min(), detector.sides.max()
    fits = ((ratio > 1 / REACH) | (sides == finest)) & ((ratio < REACH) | (sides == coarsest))
    thing = (batch.labels >= 0)[:, None]
    candidate = torch.where(inside & near & fits & thing, area, torch.full_like(inside, torch.inf, dtype=area.dtype))
    smallest, owner = candidate.min(dim=-1)
    own = torch.isfinite(smallest)
    owner = torch.where(own, owner, torch.full_like(owner, -1))
    index = owner.clamp(min=0)[..., None, None].expand(-1, -1, 1, 2)
    before, after = (each.gather(2, index)[:, :, 0] for each in (before, after))
    share = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    target = torch.where(own, share.clamp(min=0).prod(dim=-1).sqrt(), torch.zeros_like(smallest))
    ignored = (inside & batch.ignore[:, None]).any(dim=-1)
    # In a picture whose boxes are not all of its things, only what surrounds a box is known to be no centre.
    ring = (inside & thing).any(dim=-1)
    judged = own | (~ignored & (batch.complete[:, None] | ring))
    return owner, target, judged.to(target.dtype)


def sample_regions(
    batch: Batch, proposed: Tensor, options: LossOptions, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Regions to learn from: proposals and shaken boxes, things and background.

    Returns:
        regions float[B, S, 4], the box each overlaps most int64[B, S], and what it is int64[B, S]: 1 a thing,
        0 background, -1 not to be looked at.
    """
    shaken = [shaken_boxes(batch.boxes, generator) for _ in range(2)]
    pool = torch.cat([proposed, batch.boxes, *shaken], dim=1)
    overlap = iou(pool, batch.boxes) * (batch.labels >= 0)[:, None]
    most, owner = overlap.max(dim=-1)
    crowded = (share_inside(pool, batch.boxes) * batch.ignore[:, None]).amax(dim=-1) > CROWD_SHARE
    solid = (pool[..., 2:] - pool[..., :2]).amin(dim=-1) > SHORTEST
    thing, ground = (most >= THING_IOU) & solid, (most < THING_IOU) & ~crowded & solid
    luck = torch.rand(most.shape, generator=generator).to(most.device) + 0.01
    things = min(round(options.regions * options.things), pool.shape[1])
    chosen = []
    for kind, number in ((thing, things), (ground, min(options.regions - things, pool.shape[1]))):
        value, place = (luck * kind).topk(number, dim=1)
        chosen.append((place, value > 0))
    place = torch.cat([each for each, _ in chosen], dim=1)
    state = torch.cat([torch.where(real, 1 - k, -1) for k, (_, real) in enumerate(chosen)], dim=1)
    regions = pool.gather(1, place[..., None].expand(-1, -1, 4))
    return regions, owner.gather(1, place), state


def shaken_boxes(boxes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Boxes moved and resized by up to a fifth of their sides."""
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    noise = torch.rand(boxes.shape, generator=generator).to(boxes.device) * 0.4 - 0.2
    return boxes + noise * sides


def region_losses(
    detector: Detector, batch: Batch, classes: Tensor, regions: Tensor, owner: Tensor, state: Tensor,
    deltas: Tensor, embeddings: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Cross-entropy over background and the names that are known in the picture; 1 - IoU of the refined boxes.

    A name of which nothing is known in a picture does not compete there, and one that is labelled in part does not
    compete for its background (the federated rules of LVIS).
    """
    logits = detector.class_logits(embeddings, classes)
    label = batch.labels.gather(1, owner).clamp(min=0)
    ground = (state == 0)[..., None]
    known = batch.known[:, None] & ~(ground & batch.partial[:, None])
    logits = torch.cat([logits[..., :1], logits[..., 1:].masked_fill(~known, -1e4)], dim=-1)
    target = torch.where(state == 1, label + 1, torch.zeros_like(label))
    weight = torch.where(state == 0, detector.config.background_weight, 1.0) * (state >= 0)
    wrong = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()
    wanted = batch.boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    moved = refined(regions, deltas, detector.config.image_size)
    things = (state == 1).to(wrong.dtype)
    return {
        "names": wrong.sum() / weight.sum().clamp(min=1),
        "boxes": ((1 - paired_iou(moved, wanted)) * things).sum() / things.sum().clamp(min=1),
    }


def iou(one: Tensor, other: Tensor) -> Tensor:
    """float[B, N, 4] and float[B, M, 4] to their overlaps float[B, N, M]; 0 with boxes that have no area."""
    common = _common(one[:, :, None], other[:, None])
    union = _area(one)[:, :, None] + _area(other)[:, None] - common
    return common / union.clamp(min=1e-6)


def share_inside(one: Tensor, other: Tensor) -> Tensor:
    """How much of each of the first lies in each of the second, float[B, N, M]."""
    return _common(one[:, :, None], other[:, None]) / _area(one)[:, :, None].clamp(min=1e-6)


def paired_iou(one: Tensor, other: Tensor) -> Tensor:
    """Of boxes [..., 4] side by side."""
    common = _common(one, other)
    return common / (_area(one) + _area(other) - common).clamp(min=1e-6)


def _common(one: Tensor, other: Tensor) -> Tensor:
    sides = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])
    return sides.clamp(min=0).prod(dim=-1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


__all__ = ["LossOptions", "detection_losses", "iou", "paired_iou", "place_targets", "sample_regions"]
