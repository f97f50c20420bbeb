"""The encoder: patches, pooling dialects, position resizing."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from mammut import presets
from mammut.vision import VisionEncoder, resize_positions


def test_mean_of_normalised_tokens_is_the_pooled_vector_of_the_paper() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(presets.tiny().vision, "gelu")
    tokens, pooled = encoder(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 4, 32)
    torch.testing.assert_close(pooled, tokens.mean(1))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)  # LayerNorm came before


def test_openmammut_tokens_leave_raw_and_the_mean_is_normalised() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        presets.tiny().vision, class_token=True, pre_norm=True, patch_bias=False, final_norm="after_pool"
    )
    encoder = VisionEncoder(config, "gelu")
    tokens, pooled = encoder(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 5, 32)  # the class token takes part
    torch.testing.assert_close(pooled, encoder.final_norm(tokens.mean(1)))
    assert not torch.allclose(tokens.mean(-1), torch.zeros(2, 5), atol=1e-3)


def test_pixels_beyond_a_whole_number_of_patches_are_not_seen() -> None:
    config = dataclasses.replace(presets.tiny().vision, image_size=40)  # 16 px patches: 2 x 2 grid, 8 px left over
    torch.manual_seed(0)
    encoder = VisionEncoder(config, "gelu")
    picture = torch.randn(1, 3, 40, 40)
    changed = picture.clone()
    changed[..., 32:] = 9.0
    torch.testing.assert_close(encoder(picture)[0], encoder(changed)[0])
    changed[..., 31] = 9.0  # control: inside the last patch
    assert not torch.allclose(encoder(picture)[0], encoder(changed)[0])


def keys_cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(old: int, new: int) -> np.ndarray:
    """[new, old]: bicubic a = -0.5, support widened when shrinking, weights cut at the border and normalised."""
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    weights = keys_cubic((np.arange(old)[None] + 0.5 - centres[:, None]) / stretch)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def test_positions_are_resized_by_antialiased_bicubic() -> None:
    positions = torch.randn(1 + 49, 6)
    for grid in (3, 5, 14):
        resized = resize_positions(positions, True, grid)
        matrix = resize_matrix(7, grid)
        square = positions[1:].reshape(7, 7, 6).double().numpy()
        expected = np.einsum("ip,jq,pqw->ijw", matrix, matrix, square).reshape(-1, 6)
        torch.testing.assert_close(resized[0], positions[0])  # the class token keeps its row
        np.testing.assert_allclose(resized[1:].numpy(), expected, atol=2e-6)


def test_positions_of_the_same_grid_are_untouched() -> None:
    positions = torch.randn(49, 6)
    assert resize_positions(positions, False, 7) is positions
    assert F.mse_loss(resize_positions(positions, False, 7), positions) == 0
