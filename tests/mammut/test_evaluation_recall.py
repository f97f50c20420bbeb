"""Ranks block by block are those of one big table, in a fraction of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammut.evaluation.recall import EmbeddingFile, nearest, ranks


def unit(rows: int, width: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def brute(pictures: np.ndarray, texts: np.ndarray, picture_of: np.ndarray) -> tuple[list[int], list[int]]:
    scores = pictures.astype(np.float64) @ texts.astype(np.float64).T
    of_pictures = []
    for row, values in enumerate(scores):
        own = picture_of == row
        of_pictures.append(int((values[~own] > values[own].max() - 1e-6).sum()) if own.any() else len(texts))
    of_texts = [int((np.delete(scores[:, t], p) > scores[p, t] - 1e-6).sum()) for t, p in enumerate(picture_of)]
    return of_pictures, of_texts


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_any_block_gives_the_ranks_of_one_table(count: int, most: int, block: int, seed: int) -> None:
    picture_of = np.repeat(np.arange(count), np.random.default_rng(seed).integers(1, most + 1, count))
    pictures, texts = unit(count, 6, seed), unit(len(picture_of), 6, seed + 1)
    of_pictures, of_texts = ranks(pictures, texts, picture_of, block)
    expected = brute(pictures, texts, picture_of)
    assert (of_pictures.tolist(), of_texts.tolist()) == expected


def test_a_model_that_says_the_same_of_everything_finds_nothing() -> None:
    same, picture_of = np.repeat(unit(1, 8, 0), 50, axis=0), np.arange(50)
    of_pictures, of_texts = ranks(same, same, picture_of, 7)
    assert of_pictures.min() == of_texts.min() == 49
    perfect = unit(50, 8, 1)
    of_pictures, of_texts = ranks(perfect, perfect, picture_of, 7)  # control
    assert of_pictures.max() == of_texts.max() == 0


def test_embeddings_that_are_not_numbers_find_nothing() -> None:
    broken = np.full((20, 8), np.nan, np.float32)
    of_pictures, of_texts = ranks(broken, broken, np.arange(20), 7)
    assert of_pictures.min() == of_texts.min() == 20


def test_a_picture_without_a_text_is_not_found() -> None:
    pictures = unit(3, 8, 0)
    of_pictures, _ = ranks(pictures, pictures[[0, 2]], np.array([0, 2]))
    assert of_pictures.tolist() == [0, 2, 0]


def test_files_hold_what_was_appended(tmp_path: Path) -> None:
    rows = unit(100, 16, 0)
    with EmbeddingFile(tmp_path / "rows") as file:
        for start in range(0, 100, 7):
            file.append(rows[start : start + 7])
            assert len(file) == min(start + 7, 100)
        np.testing.assert_array_equal(file[0:100], rows)
        np.testing.assert_array_equal(file[31:64], rows[31:64])
        assert file[90:1000].shape == (10, 16)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """Twice 16 MB are ranked in a third of that; the table of all scores alone would be 256 MB."""
    count, width = 8000, 512
    with EmbeddingFile(tmp_path / "pictures") as pictures, EmbeddingFile(tmp_path / "texts") as texts:
        tracemalloc.start()
        for start in range(0, count, 250):  # as a model would, batch after batch
            pictures.append(unit(250, width, start))
            texts.append(unit(250, width, start))
        of_pictures, of_texts = ranks(pictures, texts, np.arange(count), 400)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert of_pictures.max() == of_texts.max() == 0
    assert peak < count * width * 4 * 2 / 3


def test_the_measurement_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mammut.evaluation.measure_retrieval", "--pictures", "9000", "--width", "8",
         "--blocks", "1"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["ranked_pictures"] == 4096 and found["peak_mb"] > found["peak_before_mb"]


def test_nearest_are_the_best_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mammut.evaluation.recall._GATHER", 7)
    rows = unit(50, 8, 0)
    found = nearest(rows[33], rows, 5)
    assert found[0] == 33
    assert found.tolist() == np.argsort(-(rows @ rows[33]), kind="stable")[:5].tolist()
