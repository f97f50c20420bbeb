"""Cropped positional embeddings: against enlarging and cropping step by step; regions within the paper's limits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mammut.training.position_crops import crop_positions, draw_kept, draw_regions, training_positions


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_regions_are_within_the_papers_limits(seed: int) -> None:
    regions = draw_regions(200, torch.Generator().manual_seed(seed))
    width, height = regions[:, 2] - regions[:, 0], regions[:, 3] - regions[:, 1]
    assert bool((regions >= 0).all()) and bool((regions <= 1 + 1e-6).all())
    assert bool((width * height >= 0.1 - 1e-5).all()) and bool((width * height <= 1 + 1e-5).all())
    aspect = width / height
    assert bool((aspect >= 0.5 - 1e-4).all()) and bool((aspect <= 2 + 1e-4).all())


def test_regions_fill_the_limits() -> None:
    regions = draw_regions(5000, torch.Generator().manual_seed(0))
    area = (regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])
    assert float(area.min()) < 0.12 and float(area.max()) > 0.9
    assert len(torch.unique(regions, dim=0)) == 5000


def test_cropping_is_enlarging_then_sampling() -> None:
    """Against torch's own interpolate and grid_sample, which make the enlarged grid for each sample."""
    body = torch.randn(7 * 7, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    regions = draw_regions(6, torch.Generator().manual_seed(2))
    large = F.interpolate(body.reshape(1, 7, 7, 5).permute(0, 3, 1, 2), size=(64, 64), mode="bilinear")
    centre, half = (regions[:, :2] + regions[:, 2:]) - 1, regions[:, 2:] - regions[:, :2]
    zeros = torch.zeros(6)
    theta = torch.stack(
        [torch.stack([half[:, 0], zeros, centre[:, 0]], 1), torch.stack([zeros, half[:, 1], centre[:, 1]], 1)], 1
    )
    at = F.affine_grid(theta, [6, 5, 9, 9], align_corners=False)
    expected = F.grid_sample(large.expand(6, -1, -1, -1), at, padding_mode="border", align_corners=False)
    ours = crop_positions(body, regions, 9)
    torch.testing.assert_close(ours, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_the_whole_region_is_nearly_the_whole_embedding() -> None:
    smooth = torch.linspace(-1, 1, 8)[:, None].expand(8, 8).reshape(64, 1)
    whole = crop_positions(smooth, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 8)[0]
    assert float((whole - smooth).abs().max()) < 0.02
    part = crop_positions(smooth, torch.tensor([[0.0, 0.0, 1.0, 0.5]]), 8)[0]  # control: the upper half
    assert float(part.max()) < 0.2


def test_class_token_is_kept_and_samples_differ() -> None:
    positions = torch.randn(1 + 16, 3)
    regions = draw_regions(4, torch.Generator().manual_seed(0))
    out = training_positions(positions, True, 4, regions)
    assert out.shape == (4, 17, 3)
    assert torch.equal(out[:, 0], positions[:1].expand(4, -1))
    assert not torch.allclose(out[0], out[1])


def test_dropped_positions_are_zero_for_the_whole_sample() -> None:
    positions = torch.randn(16, 3)
    kept = torch.tensor([True, False, True])
    out = training_positions(positions, False, 4, None, kept)
    assert torch.equal(out[0], positions) and torch.equal(out[2], positions) and not out[1].any()
    share = draw_kept(10_000, 0.3, torch.Generator().manual_seed(0)).float().mean()
    assert abs(float(share) - 0.7) < 0.02


def test_another_picture_size_and_its_gradient() -> None:
    positions = torch.randn(16, 3, requires_grad=True)
    out = training_positions(positions, False, 6)
    assert out.shape == (36, 3)
    out.sum().backward()
    assert positions.grad is not None and bool(positions.grad.abs().sum() > 0)
    assert training_positions(positions, False, 4) is positions  # control: the own size is left alone
