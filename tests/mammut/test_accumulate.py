"""Micro-batches with the contrastive batch kept whole give the big batch's losses and gradients."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch

from mammut.model import Mammut
from mammut.presets import tiny
from mammut.training.accumulate import backward_of_step
from mammut.training.objective import ObjectiveOptions, PairBatch, TwoPass
from mammut.training.position_crops import draw_kept, draw_regions


def batch(number: int = 8, seed: int = 0, crops: bool = False) -> PairBatch:
    """Texts of different lengths, the last two the same; half of the tokens of each picture count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (number, 9), generator=generator)
    ids[-1] = ids[-2]
    lengths = torch.arange(number) % 5 + 4
    ids = torch.where(torch.arange(9) < lengths[:, None], ids, 0)
    keys = torch.arange(number)
    keys[-1] = keys[-2]
    return PairBatch(
        pixels=torch.randn(number, 3, 32, 32, generator=generator),
        text_ids=ids,
        keys=keys,
        ids=ids[:, :-1],
        targets=ids[:, 1:],
        counted=torch.arange(1, 9) < lengths[:, None],
        regions=draw_regions(number, generator) if crops else None,
        kept=draw_kept(number, 0.3, generator) if crops else None,
    )


def parts_of(whole: PairBatch, number: int) -> list[PairBatch]:
    """Equal consecutive parts."""
    cut = {name: value.chunk(number) for name, value in vars(whole).items() if value is not None}
    return [PairBatch(**{name: chunks[index] for name, chunks in cut.items()}) for index in range(number)]


def two_pass(options: ObjectiveOptions, kind: Literal["focal", "infonce"]) -> TwoPass:
    torch.manual_seed(3)
    passes = TwoPass(Mammut(dataclasses.replace(tiny(), contrastive=kind)), options, autocast=None)
    if passes.log_variances is not None:
        torch.nn.init.constant_(passes.log_variances, 0.7)
    return passes


def gradients(passes: TwoPass) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in passes.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["focal", "infonce"])
@pytest.mark.parametrize("weighting", ["fixed", "learned"])
@pytest.mark.parametrize("crops", [False, True])
def test_micro_batches_equal_the_big_batch(
    kind: Literal["focal", "infonce"], weighting: Literal["fixed", "learned"], crops: bool
) -> None:
    options = ObjectiveOptions(contrastive_weight=0.5, caption_weight=2.0, weighting=weighting)
    whole = batch(crops=crops)
    big, small = two_pass(options, kind), two_pass(options, kind)
    expected = backward_of_step(big, [whole], options, kind)
    found = backward_of_step(small, parts_of(whole, 4), options, kind)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(small), gradients(big)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_plain_accumulation_would_not() -> None:
    """Control: averaging the contrastive gradients of micro-batches is another objective."""
    options, whole = ObjectiveOptions(), batch()
    big, small = two_pass(options, "infonce"), two_pass(options, "infonce")
    backward_of_step(big, [whole], options, "infonce")
    for part in parts_of(whole, 4):
        backward_of_step(small, [part], options, "infonce")
    name = "model.vision.patch_embedding.weight"
    assert not torch.allclose(gradients(big)[name], gradients(small)[name] / 4, rtol=0.05)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_one_loss_alone(weights: tuple[float, float]) -> None:
    options, whole = ObjectiveOptions(*weights), batch()
    big, small = two_pass(options, "focal"), two_pass(options, "focal")
    unused = big.unused_parameters()
    losses = backward_of_step(big, [whole], options, "focal")
    again = backward_of_step(small, parts_of(whole, 2), options, "focal")
    torch.testing.assert_close(losses, again, rtol=1e-5, atol=1e-6)
    assert (float(losses.contrastive) > 0, float(losses.caption) > 0) == (weights[0] > 0, weights[1] > 0)
    without = {name for name, p in big.model.named_parameters() if p.grad is None}
    assert without == unused
    for name, gradient in gradients(big).items():
        torch.testing.assert_close(gradients(small)[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_bfloat16_accumulation_has_gradients_everywhere() -> None:
    """Autocast keeps casts of weights; those of the first, graphless forward must not serve the second."""
    options, whole = ObjectiveOptions(), batch()
    passes = two_pass(options, "infonce")
    passes.autocast = torch.bfloat16
    backward_of_step(passes, parts_of(whole, 2), options, "infonce")
    assert all(p.grad is not None for name, p in passes.model.named_parameters() if name != "bias")
