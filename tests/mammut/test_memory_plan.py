"""The plan against counting by hand and against a real step on real tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mammut.model import Mammut
from mammut.presets import paper_base, paper_huge, tiny
from mammut.training.lora import LoraOptions
from mammut.training.memory_plan import LiveBytes, plan_memory
from mammut.training.objective import ObjectiveOptions, PairBatch, TwoPass, weighed
from mammut.training.parallel import ParallelOptions, Place, Prepared
from mammut_runtime.errors import InputError

OBJECTIVE = ObjectiveOptions()


def test_counted_parts_by_hand() -> None:
    number = sum(p.numel() for p in Mammut(tiny()).parameters())
    whole = plan_memory(tiny(), OBJECTIVE, ParallelOptions(), devices=1, batch_size=8)
    assert whole.parameters == whole.trained == number
    assert (whole.parameter_bytes, whole.gradient_bytes, whole.optimizer_bytes) == (4 * number, 4 * number, 8 * number)
    split = plan_memory(tiny(), OBJECTIVE, ParallelOptions("fsdp"), devices=2, batch_size=16)
    assert split.parameter_bytes == 4 * -(-number // 2) and split.gathered_bytes > 0 == whole.gathered_bytes
    total = whole.parameter_bytes + whole.gradient_bytes + whole.optimizer_bytes + whole.activation_bytes
    assert whole.total_bytes == total


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_of_a_real_step(recompute: bool) -> None:
    parallel = ParallelOptions(precision="fp32", recompute_blocks=recompute)
    plan = plan_memory(tiny(), OBJECTIVE, parallel, devices=1, batch_size=8)
    prepared = Prepared(TwoPass(Mammut(tiny()), OBJECTIVE, None), parallel, Place(0, 1, torch.device("cpu")))
    ids = torch.ones(8, 24, dtype=torch.int64)
    counted = torch.ones(8, 23, dtype=torch.bool)
    batch = PairBatch(torch.zeros(8, 3, 32, 32), ids, ids[:, 0], ids[:, :-1], ids[:, 1:], counted)
    with LiveBytes(prepared.trained()) as live:
        losses = weighed(prepared(batch), batch.keys, 1, "focal", OBJECTIVE)
        losses.total.backward()
    assert plan.activation_bytes == pytest.approx(live.peak, rel=0.1)


def test_recomputation_and_batch_size_act_as_they_should() -> None:
    def activations(recompute: bool, batch: int) -> int:
        parallel = ParallelOptions("ddp", "bf16", recompute)
        return plan_memory(paper_base(), OBJECTIVE, parallel, devices=1, batch_size=batch).activation_bytes

    assert activations(True, 16) < activations(False, 16) / 2
    # Linear, once the vocabulary's logits come in parts.
    growth = activations(False, 160) - activations(False, 128)
    assert growth == pytest.approx(activations(False, 192) - activations(False, 160), rel=0.05)


def test_both_losses_can_be_planned() -> None:
    """Fake tensors have no values, so nothing may choose rows by them."""
    plans = {
        kind: plan_memory(
            dataclasses.replace(tiny(), contrastive=kind), OBJECTIVE, ParallelOptions(), devices=1, batch_size=8
        )  # type: ignore[arg-type]
        for kind in ("focal", "infonce")
    }
    assert plans["infonce"].activation_bytes == pytest.approx(plans["focal"].activation_bytes, rel=0.1)


def test_the_papers_model() -> None:
    """ViT-H and a 1 B decoder with 420 M of cross attention: 2 B, which one 80 GB device cannot train and 64 can."""
    parallel = ParallelOptions("fsdp", "bf16", True)
    plan = plan_memory(paper_huge(), OBJECTIVE, parallel, devices=64, batch_size=16_384, micro_batches=4)
    assert plan.parameters == pytest.approx(2.0e9, rel=0.02)
    assert plan.local_batch == 64
    assert plan.parameter_bytes == pytest.approx(4 * plan.parameters / 64, rel=1e-3)
    assert plan.total_bytes < 80e9
    alone = plan_memory(paper_huge(), OBJECTIVE, ParallelOptions("ddp"), devices=1, batch_size=256)
    assert alone.total_bytes > 80e9


def test_frozen_and_adapted_models_need_less() -> None:
    whole = plan_memory(tiny(), OBJECTIVE, ParallelOptions(), devices=1, batch_size=8)
    frozen = plan_memory(tiny(), OBJECTIVE, ParallelOptions(), devices=1, batch_size=8, frozen=("vision.*",))
    assert frozen.parameter_bytes == whole.parameter_bytes and frozen.optimizer_bytes < whole.optimizer_bytes
    adapted = plan_memory(tiny(), OBJECTIVE, ParallelOptions(), devices=1, batch_size=8, lora=LoraOptions(rank=1))
    assert adapted.gradient_bytes < whole.gradient_bytes / 5


def test_an_uneven_batch_is_refused() -> None:
    with pytest.raises(InputError, match="choose a multiple of 12"):
        plan_memory(tiny(), OBJECTIVE, ParallelOptions(), devices=4, batch_size=100, micro_batches=3)
