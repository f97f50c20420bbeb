"""RoIAlign in gather form against the definition, sample by sample."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.detection.regions import align, region_levels

STRIDES, SIZE = (4, 8, 16), 32


def bilinear(grid: np.ndarray, y: float, x: float) -> np.ndarray:
    """float[H, W, C] at one point, as He et al. (2017) and torchvision define it."""
    side = grid.shape[0]
    if y < -1 or y > side or x < -1 or x > side:
        return np.zeros(grid.shape[2])
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = int(y), int(x)
    if y0 >= side - 1:
        y0, y = side - 1, float(side - 1)
    if x0 >= side - 1:
        x0, x = side - 1, float(side - 1)
    y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
    dy, dx = y - y0, x - x0
    low = grid[y0, x0] * (1 - dx) + grid[y0, x1] * dx
    high = grid[y1, x0] * (1 - dx) + grid[y1, x1] * dx
    result: np.ndarray = low * (1 - dy) + high * dy
    return result


def slow_align(grids: list[np.ndarray], box: np.ndarray, level: int, cells: int, samples: int) -> np.ndarray:
    """float[cells * cells, C]."""
    low_x, low_y, high_x, high_y = box / STRIDES[level] - 0.5
    cell_y, cell_x = (high_y - low_y) / cells, (high_x - low_x) / cells
    found = []
    for row in range(cells):
        for column in range(cells):
            points = [
                bilinear(
                    grids[level],
                    low_y + cell_y * (row + (i + 0.5) / samples),
                    low_x + cell_x * (column + (j + 0.5) / samples),
                )
                for i in range(samples)
                for j in range(samples)
            ]
            found.append(np.mean(points, axis=0))
    return np.stack(found)


coordinate = st.floats(-20, SIZE + 20, allow_nan=False, width=32)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate, st.integers(0, 2)), min_size=1, max_size=6),
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000),
)  # fmt: skip
def test_align_is_the_slow_reference(
    given_boxes: list[tuple[float, float, float, float, int]], cells: int, samples: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    grids = [[rng.normal(size=(SIZE // s, SIZE // s, 3)) for s in STRIDES] for _ in range(2)]
    corners = np.array([each[:4] for each in given_boxes])
    boxes = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    levels = np.array([each[4] for each in given_boxes])
    maps = np.stack([np.concatenate([g.reshape(-1, 3) for g in each]) for each in grids])
    both = [torch.from_numpy(np.stack([each, each])) for each in (boxes, levels)]
    found = align(torch.from_numpy(maps), both[0], both[1], STRIDES, SIZE, cells, samples)
    for picture in range(2):
        for number, (box, level) in enumerate(zip(boxes, levels, strict=True)):
            wanted = slow_align(grids[picture], box, int(level), cells, samples)
            np.testing.assert_allclose(found[picture, number].numpy(), wanted, atol=1e-5)


def test_a_shifted_map_differs() -> None:
    """The control: half a pixel, which an unaligned RoIAlign would be off by, is seen."""
    grid = np.random.default_rng(0).normal(size=(8, 8, 2))
    maps = torch.from_numpy(grid.reshape(1, 64, 2))
    box, level = torch.tensor([[[4.0, 4.0, 20.0, 20.0]]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
    right = align(maps, box, level, (4,), SIZE, 2, 2)
    shifted = align(maps, box + 2, level, (4,), SIZE, 2, 2)
    assert float((right - shifted).abs().max()) > 0.05


def test_a_straight_ramp_is_kept() -> None:
    """On a plane every cell is its middle: no sampling can be wrong there."""
    y, x = np.mgrid[0:8, 0:8] + 0.5
    maps = torch.from_numpy(np.stack([x, y], -1).reshape(1, 64, 2) * 4)
    box = torch.tensor([[[6.0, 8.0, 26.0, 20.0]]], dtype=torch.float64)
    found = align(maps, box, torch.zeros(1, 1, dtype=torch.int64), (4,), SIZE, 2, 3)[0, 0]
    np.testing.assert_allclose(found.numpy(), [[11, 11], [21, 11], [11, 17], [21, 17]])


def test_levels_by_the_nearest_anchor() -> None:
    sides = torch.tensor([10.0, 16.0, 22.0, 23.0, 32.0, 45.0, 46.0, 200.0])
    boxes = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], dim=-1)[None]
    levels = region_levels(boxes, STRIDES, 4.0)[0].tolist()
    nearest = [min(range(3), key=lambda k: abs(math.log(side / (4 * STRIDES[k])))) for side in sides.tolist()]
    assert levels == nearest == [0, 0, 0, 1, 1, 1, 2, 2]
