"""The losses against closed forms in float64 numpy, pair by pair, written from the paper's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mammut.training.losses import focal_contrastive, info_nce, same


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def focal_by_hand(logits: np.ndarray, positives: np.ndarray, gamma: float) -> float:
    total = 0.0
    for i in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            p = sigmoid(logits[i, j]) if positives[i, j] else 1.0 - sigmoid(logits[i, j])
            total += -((1.0 - p) ** gamma) * math.log(p)
    return 2.0 * total / logits.shape[0]  # image-to-text and text-to-image see the same pairs


def info_nce_by_hand(logits: np.ndarray, positives: np.ndarray) -> float:
    def one_way(scores: np.ndarray, right: np.ndarray) -> float:
        rows = []
        for row, good in zip(scores, right, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            rows.append(np.mean([-math.log(probabilities[j]) for j in np.flatnonzero(good)]))
        return float(np.mean(rows))

    return (one_way(logits, positives) + one_way(logits.T, positives.T)) / 2


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(7).normal(0, 4, (5, 5))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_is_the_papers_sum(scores: np.ndarray, gamma: float) -> None:
    positives = np.eye(5, dtype=bool)
    ours = focal_contrastive(torch.tensor(scores), torch.tensor(positives), gamma)
    assert float(ours) == pytest.approx(focal_by_hand(scores, positives, gamma), rel=1e-5)


def test_focal_with_gamma_zero_is_binary_cross_entropy(scores: np.ndarray) -> None:
    logits, positives = torch.tensor(scores), torch.eye(5, dtype=torch.bool)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, positives.double(), reduction="sum") / 5
    assert float(focal_contrastive(logits, positives, 0.0)) == pytest.approx(2 * float(plain), rel=1e-5)
    assert float(focal_contrastive(logits, positives, 1.0)) < 2 * float(plain)  # control: gamma does something


def test_focal_is_finite_where_the_naive_form_is_not() -> None:
    logits = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = focal_contrastive(logits, torch.tensor([[True, False]]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(800.0)
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


def test_info_nce_matches_its_formula(scores: np.ndarray) -> None:
    positives = np.eye(5, dtype=bool)
    ours = info_nce(torch.tensor(scores), torch.tensor(positives))
    assert float(ours) == pytest.approx(info_nce_by_hand(scores, positives), rel=1e-5)


def test_repeated_texts_are_positives(scores: np.ndarray) -> None:
    keys = ["a rose", "a hat", "a rose", "a tulip", "a hat"]
    positives = same(keys, keys)
    assert positives.tolist() == [[a == b for b in keys] for a in keys]
    ours = info_nce(torch.tensor(scores), positives)
    assert float(ours) == pytest.approx(info_nce_by_hand(scores, positives.numpy()), rel=1e-5)
    assert float(ours) != pytest.approx(info_nce_by_hand(scores, np.eye(5, dtype=bool)), rel=1e-3)  # control


def test_pictures_against_fewer_distinct_texts(scores: np.ndarray) -> None:
    positives = same(["x", "y", "x", "z", "y"], ["x", "y", "z"])
    assert positives.shape == (5, 3)
    assert float(info_nce(torch.tensor(scores[:, :3]), positives)) == pytest.approx(
        info_nce_by_hand(scores[:, :3], positives.numpy()), rel=1e-5
    )
