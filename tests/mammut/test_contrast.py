"""The contrastive loss over the global batch: against the dense loss, closed forms in float64, two processes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mammut.training.contrast import ABSENT, global_contrastive, text_key
from mammut.training.losses import focal_contrastive, info_nce
from mammut_runtime.errors import InputError

Kind = Literal["focal", "infonce"]
KINDS: tuple[Kind, ...] = ("focal", "infonce")


def unit(rows: int, seed: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def leaves(rows: int) -> list[Tensor]:
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    return [each.requires_grad_() for each in (unit(rows, 1), unit(rows, 2), scale, bias)]


def keys(rows: int) -> Tensor:
    """The last two samples have one and the same text; the rest are distinct."""
    numbers = torch.arange(rows) + 2**61
    numbers[-1] = numbers[-2]
    return numbers


def ours(kind: Kind, given: list[Tensor], k: Tensor, tile: int = 1024, gamma: float = 1.0) -> Tensor:
    images, texts, scale, bias = given
    return global_contrastive(images, texts, scale, bias, k, k, kind=kind, gamma=gamma, tile=tile)


def dense(kind: Kind, given: list[Tensor], k: Tensor, gamma: float = 1.0) -> Tensor:
    images, texts, scale, bias = given
    logits, positives = scale * images @ texts.T + bias, k[:, None] == k[None, :]
    return focal_contrastive(logits, positives, gamma) if kind == "focal" else info_nce(logits, positives)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 3, 1024])
def test_one_process_is_the_dense_loss_and_gradient(kind: Kind, tile: int) -> None:
    mine, plain, k = leaves(7), leaves(7), keys(7)
    loss, expected = ours(kind, mine, k, tile), dense(kind, plain, k)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # the dense form rounds to float32
    loss.backward()
    expected.backward()
    for a, b in zip(mine, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_gradients_are_those_of_finite_differences(kind: Kind, gamma: float) -> None:
    k = keys(5)
    assert torch.autograd.gradcheck(lambda *a: ours(kind, list(a), k, tile=2, gamma=gamma), leaves(5))


def by_hand(kind: Kind, images: np.ndarray, texts: np.ndarray, k: np.ndarray, gamma: float) -> float:
    """Pair by pair in float64, from the formulas; nothing shared with the code under test."""
    n = len(images)
    score = [[5.0 * float(np.dot(images[i], texts[j])) - 1.5 for j in range(n)] for i in range(n)]
    if kind == "focal":
        total = 0.0
        for i in range(n):
            for j in range(n):
                yes = 1.0 / (1.0 + math.exp(-score[i][j]))
                p = yes if k[i] == k[j] else 1.0 - yes
                total -= (1.0 - p) ** gamma * math.log(p)
        return 2.0 * total / n

    def mean_cost(line: list[float], right: list[int]) -> float:
        whole = sum(math.exp(s) for s in line)
        return sum(-math.log(math.exp(line[r]) / whole) for r in right) / len(right)

    right = [[j for j in range(n) if k[j] == k[i]] for i in range(n)]
    rows = sum(mean_cost(score[i], right[i]) for i in range(n)) / n
    columns = sum(mean_cost([score[i][j] for i in range(n)], right[j]) for j in range(n)) / n
    return (rows + columns) / 2


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 999), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from(KINDS))
def test_closed_form_in_float64(rows: int, seed: int, gamma: float, kind: Kind) -> None:
    images, texts = unit(rows, seed), unit(rows, seed + 1000)
    k = torch.randint(0, rows, (rows,), generator=torch.Generator().manual_seed(seed))
    scale, bias = torch.tensor(5.0).double(), torch.tensor(-1.5).double()
    loss = global_contrastive(images, texts, scale, bias, k, k, kind=kind, gamma=gamma, tile=4)
    assert loss.item() == pytest.approx(by_hand(kind, images.numpy(), texts.numpy(), k.numpy(), gamma), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_rows_are_as_if_they_were_not_there(kind: Kind) -> None:
    """Pictures 1 and 6 have no text; texts 3 and 4 are room that was not filled."""
    there, texts_there = [0, 2, 3, 4, 5], [0, 1, 2, 5, 6]
    picture_keys = torch.tensor([10, ABSENT, 11, 12, 13, 14, ABSENT])
    text_keys = torch.tensor([10, 11, 12, ABSENT, ABSENT, 13, 14])
    full = leaves(7)
    less = [full[0].detach()[there], full[1].detach()[texts_there], *(each.detach() for each in full[2:])]
    less = [each.clone().requires_grad_() for each in less]
    for rows, keys_of in ((full, (picture_keys, text_keys)), (less, (picture_keys[there], text_keys[texts_there]))):
        global_contrastive(*rows, *keys_of, kind=kind, tile=2).backward()  # type: ignore[arg-type]
    for a, b, place in zip(full, less, (there, texts_there, ..., ...), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad[place], b.grad)
    assert full[0].grad is not None and full[0].grad[[1, 6]].abs().sum() == 0
    none = torch.full((7,), ABSENT)
    assert global_contrastive(*leaves(7), none, none, kind=kind).item() == 0  # type: ignore[arg-type]


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for kind in KINDS:
        images, texts, scale, bias = leaves(8)
        half, k = slice(rank * 4, rank * 4 + 4), keys(8)
        loss = global_contrastive(images[half], texts[half], scale, bias, k[half], k[half], kind=kind, tile=3)
        loss.backward()
        torch.save([loss.detach(), *(each.grad for each in (images, texts, scale, bias))], f"{folder}/{kind}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one_of_two, (folder,), nprocs=2)
        yield Path(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind: Kind, two_processes: Path) -> None:
    """The mean of both processes' gradients, as DDP takes it, is the gradient of the whole batch on one process."""
    halves: list[list[Any]] = [torch.load(two_processes / f"{kind}.{rank}") for rank in (0, 1)]
    whole, k = leaves(8), keys(8)
    loss = ours(kind, whole, k)
    loss.backward()
    assert float(halves[0][0]) == pytest.approx(loss.item(), rel=1e-12)
    assert float(halves[1][0]) == pytest.approx(loss.item(), rel=1e-12)
    for mine, *parts in zip(whole, *(half[1:] for half in halves), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close((parts[0] + parts[1]) / 2, mine.grad, rtol=1e-10, atol=1e-12)
    # Control: each process for itself would get something else.
    alone = ours(kind, [whole[0][:4], whole[1][:4], *whole[2:]], k[:4])
    assert alone.item() != pytest.approx(loss.item(), rel=1e-3)


def test_no_large_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that an operation returns stays below tile x tile or the embeddings' own size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, Tensor):
                    largest = max(largest, each.numel())
            return out

    given, k = leaves(256), keys(256)
    with Watch():
        ours("infonce", given, k, tile=16).backward()
    assert largest <= 256 * 6 < 256 * 256
    with Watch():
        dense("infonce", given, k)
    assert largest >= 256 * 256  # control


def test_text_key_ignores_case_and_blanks_only() -> None:
    assert text_key("A  cat\n") == text_key("a cat") != text_key("a cap")
    assert 0 <= text_key("a cat") < 2**63


def test_wrong_shapes_are_refused() -> None:
    images, texts, scale, bias = leaves(4)
    with pytest.raises(InputError, match="expected embeddings"):
        global_contrastive(images[0], texts, scale, bias, keys(4), keys(4), kind="focal")
    with pytest.raises(InputError, match="one key for each"):
        global_contrastive(images, texts, scale, bias, keys(3), keys(4), kind="focal")
