"""Groups, rates and schedules against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mammut.model import Mammut
from mammut.presets import tiny, tiny_video
from mammut.training.optimizers import (
    GATE_SHARE,
    OptimizerOptions,
    freeze,
    layer_share,
    make_optimizers,
    parameter_groups,
    schedule,
    set_learning_rate,
)
from mammut_runtime.errors import InputError


def test_the_papers_schedule() -> None:
    """10,000 steps of warm-up to the peak, then linearly to the end of 500,000."""
    at = {step: schedule(step, 500_000, 10_000, "linear") for step in (0, 4_999, 9_999, 10_000, 255_000, 499_999)}
    assert at[0] == pytest.approx(1e-4)
    assert at[4_999] == pytest.approx(0.5)
    assert at[9_999] == at[10_000] == 1.0
    assert at[255_000] == pytest.approx(0.5)
    assert at[499_999] == pytest.approx(1 / 490_000)


def test_cosine_and_constant() -> None:
    assert schedule(60, 110, 10, "cosine") == pytest.approx(0.5)
    assert schedule(35, 110, 10, "cosine") == pytest.approx(0.5 * (1 + 2**-0.5))
    assert schedule(109, 110, 10, "constant") == 1.0


def test_layer_shares() -> None:
    config = tiny()  # two layers in each tower, a cross block after text block 0
    share = {
        name: layer_share(name, config, 0.5)
        for name in (
            "vision.positions", "vision.blocks.0.qkv.weight", "vision.blocks.1.qkv.weight", "vision.final_norm.weight",
            "text.token_embedding.weight", "text.cross_blocks.0.out.bias", "text.self_blocks.0.out.bias",
            "memory_projection.weight", "model.vision.blocks.0.out.weight",
        )
    }  # fmt: skip
    assert share == {
        "vision.positions": 0.125, "vision.blocks.0.qkv.weight": 0.25, "vision.blocks.1.qkv.weight": 0.5,
        "vision.final_norm.weight": 1.0, "text.token_embedding.weight": 0.125, "text.cross_blocks.0.out.bias": 0.25,
        "text.self_blocks.0.out.bias": 0.25, "memory_projection.weight": 1.0, "model.vision.blocks.0.out.weight": 0.25,
    }  # fmt: skip


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = Mammut(tiny())
    groups = parameter_groups(model, model.config, OptimizerOptions(weight_decay=0.01, layer_decay=0.9))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert "vision.blocks.0.qkv.weight" in decayed
    assert not decayed & {"vision.positions", "text.token_embedding.weight", "log_logit_scale", "vision.norm.bias"}


def test_the_gate_of_the_tubes_opens_faster_than_weights_move() -> None:
    model = Mammut(dataclasses.replace(tiny(), video=tiny_video()))
    assert model.tubes is not None
    shares = {
        id(parameter): group["share"]
        for group in parameter_groups(model, model.config, OptimizerOptions())
        for parameter in group["params"]
    }
    assert shares[id(model.tubes.gate)] == GATE_SHARE > 1
    assert shares[id(model.tubes.projections[0].weight)] == shares[id(model.log_logit_scale)] == 1  # control


def test_rates_are_set_by_share() -> None:
    model = Mammut(tiny())
    optimizers = make_optimizers(model, model.config, OptimizerOptions(layer_decay=0.5))
    set_learning_rate(optimizers, 1e-3)
    assert sorted({group["lr"] for group in optimizers[0].param_groups}) == pytest.approx([1.25e-4, 2.5e-4, 5e-4, 1e-3])


def test_frozen_parameters_stay_and_others_move() -> None:
    model = Mammut(tiny())
    frozen = freeze(model, ("vision.*",))
    assert frozen and all(name.startswith("vision.") for name in frozen)
    optimizers = make_optimizers(model, model.config, OptimizerOptions())
    set_learning_rate(optimizers, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, images = model.encode_image(torch.randn(2, 3, 32, 32))
    (images.sum() + model.encode_text(torch.ones(2, 5, dtype=torch.int64)).square().sum()).backward()
    optimizers[0].step()
    for name, parameter in model.named_parameters():
        if name.startswith("vision."):
            assert torch.equal(parameter, before[name])
    assert not torch.equal(model.memory_projection.weight, before["memory_projection.weight"])  # control


def test_freezing_nothing_or_everything_is_refused() -> None:
    with pytest.raises(InputError, match="'visoin.*' matches no parameter".replace("*", r"\*")):
        freeze(Mammut(tiny()), ("visoin.*",))
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze(Mammut(tiny()), ("*",))
