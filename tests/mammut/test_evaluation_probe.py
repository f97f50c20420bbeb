"""Few-shot classifiers against what is known to be right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mammut.evaluation.probe import PENALTY, linear_probe, minimised, nearest_neighbours


def clouds(each: int, seed: int, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around three directions of eight."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), each)
    rows = np.eye(8)[labels] + spread * generator.normal(size=(3 * each, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("learn", [linear_probe, nearest_neighbours])
def test_clear_classes_are_learned_and_shuffled_ones_are_not(learn: object) -> None:
    assert callable(learn)
    trained, labels = clouds(8, 0)
    judged, truth = clouds(100, 1)
    assert (learn(trained, labels, 3, judged) == truth).mean() > 0.9
    shuffled = np.random.default_rng(0).permutation(labels)
    assert (learn(trained, shuffled, 3, judged) == truth).mean() < 0.7  # control


def test_l_bfgs_finds_the_minimum_that_torch_finds() -> None:
    rows, labels = clouds(20, 0, spread=0.8)
    x = np.hstack([rows.astype(np.float64), np.ones((60, 1))])
    truth = np.eye(3)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(flat.reshape(9, 3), requires_grad=True)
        value = torch.nn.functional.cross_entropy(torch.from_numpy(x) @ weights, torch.from_numpy(truth))
        value = value + PENALTY / 2 * (weights[:-1] ** 2).sum()
        value.backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        return float(value.detach()), weights.grad.numpy().ravel()

    found = minimised(loss, np.zeros(27))
    weights = torch.zeros(27, dtype=torch.float64)
    for _ in range(4000):
        weights -= 0.5 * torch.from_numpy(loss(weights.numpy())[1])
    assert loss(found)[0] == pytest.approx(loss(weights.numpy())[0], abs=1e-8)
    assert loss(found)[0] < loss(np.zeros(27))[0] - 0.05


def test_l_bfgs_follows_a_bent_valley() -> None:
    def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = x
        gradient = np.array([-400 * a * (b - a * a) - 2 * (1 - a), 200 * (b - a * a)])
        return float(100 * (b - a * a) ** 2 + (1 - a) ** 2), gradient

    assert minimised(rosenbrock, np.array([-1.2, 1.0])) == pytest.approx([1, 1], abs=1e-3)


def test_equal_rows_and_a_constant_embedding_do_no_harm() -> None:
    rows = np.ones((3, 4), np.float32) / 2
    rows[:, 1] = [0.1, 0.1, 0.9]
    found = linear_probe(rows, np.array([0, 0, 1]), 2, rows)
    assert found.tolist() == [0, 0, 1]


def test_neighbours_that_are_nearer_weigh_more() -> None:
    trained = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    labels = np.array([0, 1, 1])
    judged = np.array([[1, 0], [0.6, 0.8]], np.float32)
    assert nearest_neighbours(trained, labels, 2, judged, count=3).tolist() == [0, 1]
    assert nearest_neighbours(trained, labels, 2, judged, count=99).tolist() == [0, 1]
