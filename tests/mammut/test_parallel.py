"""DDP and FSDP2 over two processes, recomputation, compilation: losses and gradients are those of one plain process."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import DTensor

from mammut.config import MammutConfig
from mammut.model import Mammut
from mammut.presets import tiny
from mammut.training.accumulate import backward_of_step
from mammut.training.objective import ObjectiveOptions, PairBatch, TwoPass
from mammut.training.parallel import ParallelOptions, Place, Prepared, check_compiler, clip_gradients
from mammut_runtime.errors import InputError

OPTIONS = ObjectiveOptions(weighting="learned")
CPU = torch.device("cpu")


def batch(start: int, end: int) -> PairBatch:
    """Pictures start to end of eight, whose numbers of tokens differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (8, 9), generator=generator)
    pixels = torch.randn(8, 3, 32, 32, generator=generator)
    counted = torch.arange(1, 9) < (torch.arange(8)[:, None] % 5 + 3)
    part = slice(start, end)
    return PairBatch(pixels[part], ids[part], torch.arange(8)[part], ids[part, :-1], ids[part, 1:], counted[part])


def one_step(
    options: ParallelOptions, place: Place, batches: list[PairBatch], config: MammutConfig | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    prepared = Prepared(TwoPass(Mammut(config or tiny()), OPTIONS, options.autocast), options, place)
    losses = backward_of_step(prepared, batches, OPTIONS, "focal", prepared.synchronised)
    prepared.finish_backward()
    norm = clip_gradients(prepared.trained(), 0.5)
    gradients = {}
    for name, parameter in prepared.inner.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    caption = losses.caption.clone()
    if place.size > 1:
        dist.all_reduce(caption)
        caption /= place.size
    return (float(losses.contrastive), float(caption), float(norm)), gradients


WAYS: tuple[tuple[Literal["ddp", "fsdp"], bool, int], ...] = (
    ("ddp", False, 1),
    ("ddp", True, 2),
    ("fsdp", False, 2),
    ("fsdp", True, 1),
)
"""Strategy, recomputation, micro-batches."""


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for index, (strategy, recompute, parts) in enumerate(WAYS):
        size = 4 // parts
        batches = [batch(4 * rank + size * i, 4 * rank + size * (i + 1)) for i in range(parts)]
        result = one_step(ParallelOptions(strategy, "fp32", recompute), Place(rank, 2, CPU), batches)
        torch.save(result, f"{folder}/{index}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Iterator[list[list[Any]]]:
    """For each way, what both processes found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (folder,), nprocs=2)
        yield [[torch.load(Path(folder) / f"{index}-{rank}.pt") for rank in (0, 1)] for index in range(len(WAYS))]


@pytest.mark.parametrize("way", range(len(WAYS)), ids=[f"{s}-{'recompute' if r else 'keep'}-{p}" for s, r, p in WAYS])
def test_two_processes_are_one(way: int, results: list[list[Any]]) -> None:
    expected_numbers, expected = one_step(ParallelOptions(precision="fp32"), Place(0, 1, CPU), [batch(0, 8)])
    for numbers, gradients in results[way]:
        assert numbers == pytest.approx(expected_numbers, rel=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_recomputation_saves_memory_and_changes_nothing() -> None:
    kept: dict[bool, int] = {}
    gradients = {}
    for recompute in (False, True):
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            options = ParallelOptions(precision="fp32", recompute_blocks=recompute)
            _, gradients[recompute] = one_step(options, Place(0, 1, CPU), [batch(0, 8)])
        kept[recompute] = total
    assert kept[True] < kept[False]
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_bfloat16_is_near_float32_and_not_equal() -> None:
    exact = one_step(ParallelOptions(precision="fp32"), Place(0, 1, CPU), [batch(0, 8)])[0]
    rounded = one_step(ParallelOptions(precision="bf16"), Place(0, 1, CPU), [batch(0, 8)])[0]
    assert rounded == pytest.approx(exact, rel=0.05) and rounded != exact


def test_compiled_blocks_compute_the_same() -> None:
    try:
        check_compiler(CPU)
    except InputError as error:
        pytest.skip(str(error))
    config = tiny()
    config = dataclasses.replace(  # one block of each kind: compiling takes seconds a block
        config, vision=dataclasses.replace(config.vision, layers=1), text=dataclasses.replace(config.text, layers=1)
    )
    plain = one_step(ParallelOptions(precision="fp32"), Place(0, 1, CPU), [batch(0, 8)], config)
    fast = one_step(ParallelOptions(precision="fp32", compile=True), Place(0, 1, CPU), [batch(0, 8)], config)
    assert fast[0] == pytest.approx(plain[0], rel=1e-4)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(fast[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=r"no C\+\+ compiler found"):
        check_compiler(CPU)


def test_sharding_without_torchrun_is_refused() -> None:
    with pytest.raises(InputError, match="needs torchrun"):
        Prepared(TwoPass(Mammut(tiny()), OPTIONS, None), ParallelOptions("fsdp"), Place(0, 1, CPU))


def test_clipping() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([parameter], 0.0)) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    clip_gradients([parameter], 1.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    parameter.grad = torch.tensor([float("nan"), 1.0])
    assert not torch.isfinite(clip_gradients([parameter], 1.0))
