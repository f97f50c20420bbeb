"""Who learns what: targets of places, samples of regions, and the rules for names of which nothing is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from mammut.detection.detector import Detector
from mammut.detection.feeding import Batch
from mammut.detection.losses import (
    LossOptions,
    detection_losses,
    iou,
    place_targets,
    region_losses,
    sample_regions,
)

Made = Callable[..., Detector]


def batch_of(
    boxes: list[list[float]], labels: list[int], ignore: list[bool] | None = None, complete: bool = True
) -> Batch:
    count = 3
    return Batch(
        torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([boxes]),
        torch.tensor([labels]),
        torch.tensor([ignore or [False] * len(boxes)]),
        torch.ones(1, count, dtype=torch.bool),
        torch.zeros(1, count, dtype=torch.bool),
        torch.tensor([complete]),
    )


def classes() -> torch.Tensor:
    return F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(1)), dim=-1)


def test_the_centre_of_a_box_is_its_place(make_detector: Made) -> None:
    detector = make_detector("paper")
    batch = batch_of([[8.0, 8.0, 24.0, 24.0], [0.0, 0.0, 0.0, 0.0]], [1, -1])
    owner, target, judged = place_targets(detector, batch)
    best = int(target[0].argmax())
    assert owner[0, best] == 0
    assert detector.places[best].tolist() in ([12, 12], [20, 20], [12, 20], [20, 12], [24, 24], [8, 8])
    for place in torch.nonzero(owner[0] >= 0).flatten().tolist():
        x, y = detector.places[place].tolist()
        assert 8 < x < 24
        assert 8 < y < 24
        sides = np.array([x - 8, 24 - x, y - 8, 24 - y])
        wanted = np.sqrt(min(sides[:2]) / max(sides[:2]) * min(sides[2:]) / max(sides[2:]))
        np.testing.assert_allclose(float(target[0, place]), wanted, rtol=1e-5)
    assert bool((judged == 1).all())
    assert bool((target[0][owner[0] < 0] == 0).all())


def test_small_things_are_the_fine_levels(make_detector: Made) -> None:
    detector = make_detector("paper")
    levels = {}
    for side in (10.0, 60.0):
        owner, _, _ = place_targets(detector, batch_of([[2.0, 2.0, 2 + side, 2 + side]], [0]))
        levels[side] = set(detector.sides[owner[0] >= 0].tolist())
    assert levels[10.0] == {16.0}
    assert levels[60.0] == {32.0, 64.0}


def test_what_is_not_complete_or_ignored_is_not_background(make_detector: Made) -> None:
    detector = make_detector("paper")
    boxes = [[8.0, 8.0, 24.0, 24.0], [40.0, 40.0, 60.0, 60.0]]
    far = int(((detector.places - torch.tensor([52.0, 12.0])).abs().sum(dim=-1)).argmin())
    crowd = int(((detector.places - torch.tensor([52.0, 52.0])).abs().sum(dim=-1)).argmin())
    for complete in (True, False):
        _, _, judged = place_targets(detector, batch_of(boxes, [1, -1], [False, True], complete))
        assert float(judged[0, far]) == float(complete)
        assert float(judged[0, crowd]) == 0.0


def test_regions_are_things_and_background(make_detector: Made) -> None:
    batch = batch_of([[8.0, 8.0, 24.0, 24.0], [40.0, 40.0, 60.0, 60.0]], [1, -1], [False, True])
    proposed = torch.tensor([[[9.0, 9.0, 24, 24], [0, 0, 6, 6], [42, 42, 58, 58], [30, 30, 30, 30], [20, 20, 40, 40]]])
    regions, owner, state = sample_regions(batch, proposed, LossOptions(regions=16), torch.Generator().manual_seed(0))
    for region, whose, kind in zip(regions[0], owner[0], state[0], strict=True):
        overlap = float(iou(region[None, None], batch.boxes[:, :1])[0, 0, 0])
        if kind == 1:
            assert overlap >= 0.5
            assert whose == 0
        elif kind == 0:
            assert overlap < 0.5
            assert region.tolist() != [42, 42, 58, 58]  # inside the ignored region
            assert region.tolist() != [30, 30, 30, 30]
    assert {0, 1} <= set(state[0].tolist())


def test_unknown_names_do_not_compete(make_detector: Made) -> None:
    """Gradients say who took part: pushing a name's row only matters where the name is known."""
    detector = make_detector("paper")
    batch = batch_of([[8.0, 8.0, 24.0, 24.0]], [0])
    regions = torch.tensor([[[8.0, 8.0, 24.0, 24.0], [40.0, 40.0, 60.0, 60.0]]])
    owner, state = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1, 0]])
    embeddings = F.normalize(torch.randn(1, 2, 24), dim=-1)

    def gradient(known: list[bool], partial: list[bool], rows: slice) -> list[bool]:
        given = classes().requires_grad_(True)
        batch.known[0], batch.partial[0] = torch.tensor(known), torch.tensor(partial)
        boxes, whose, kind = (each[:, rows] for each in (regions, owner, state))
        deltas = torch.zeros(1, boxes.shape[1], 4)
        losses = region_losses(detector, batch, given, boxes, whose, kind, deltas, embeddings[:, rows])
        losses["names"].backward()  # type: ignore[no-untyped-call]
        assert given.grad is not None
        return (given.grad.abs().sum(dim=-1) > 1e-9).tolist()

    thing, ground, nothing = slice(0, 1), slice(1, 2), [False] * 3
    assert gradient([True] * 3, nothing, thing) == [True, True, True]  # the control
    assert gradient([True, True, False], nothing, thing) == [True, True, False]
    assert gradient([True, True, False], [False, True, False], ground) == [True, False, False]
    assert gradient([True, True, False], [True, False, False], thing) == [True, True, False]


def test_a_few_steps_lower_every_loss(make_detector: Made) -> None:
    detector = make_detector("paper").train()
    for parameter in detector.own_parameters().values():
        parameter.requires_grad_(True)
    batch = batch_of([[8.0, 8.0, 24.0, 24.0], [30.0, 34.0, 60.0, 62.0]], [0, 2])
    optimizer = torch.optim.AdamW(detector.own_parameters().values(), lr=3e-3)
    history = []
    for step in range(60):
        losses = detection_losses(detector, batch, classes(), LossOptions(), torch.Generator().manual_seed(step))
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    for name in ("centerness", "places", "names", "loss"):
        assert history[-1][name] < 0.7 * history[0][name], name
    assert all(value.grad is None for value in detector.model.parameters())
