from __future__ import annotations

import time

import pytest
import torch

from mammut import presets
from mammut.config import MammutConfig
from mammut.model import Mammut
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.plan import (
    describe,
    make_plan,
    megabytes,
    memory_operations,
    step_operations,
    text_operations,
    uses,
    vision_operations,
)


@pytest.mark.parametrize(
    ("size", "parameters_m", "image_gf", "text_gf", "decode20_gf"),
    [
        # as published with the public weights: parameters, and operations of a 224 px picture, a text of 77 tokens
        # without vocabulary logits, and 20 cached caption steps
        ("S-32", 85.62, 2.29, 2.29, 1.9),
        ("B-32", 183.02, 8.82, 4.02, 3.0),
        ("B-16", 290.52, 35.13, 13.30, 9.4),
        ("L-14", 508.29, 162.03, 13.30, 10.5),
        ("H-14", 1188.14, 334.59, 47.09, 33.0),
    ],
)
def test_figures_of_public_models(
    size: str, parameters_m: float, image_gf: float, text_gf: float, decode20_gf: float
) -> None:
    start = time.monotonic()
    config = presets.openmammut(size)
    plan = make_plan(config, dict.fromkeys(GRAPHS, "fp32"), 20)
    assert time.monotonic() - start < 5
    assert plan.parameters / 1e6 == pytest.approx(parameters_m, abs=0.01)
    assert vision_operations(config) / 1e9 == pytest.approx(image_gf, abs=0.01)
    assert text_operations(config.text, 77) / 1e9 == pytest.approx(text_gf, abs=0.01)
    decode = memory_operations(config) + sum(step_operations(config, past) for past in range(20))
    assert decode / 1e9 == pytest.approx(decode20_gf, abs=0.1)


@pytest.mark.parametrize("config", [presets.tiny(), presets.openmammut("S-32")], ids=["paper", "openmammut"])
def test_every_parameter_is_somewhere(config: MammutConfig) -> None:
    with torch.device("meta"):
        names = set(Mammut(config).state_dict())
    used = {name for name in names if any(uses(graph, name, config) for graph in GRAPHS)}
    assert names - used == names & {"log_logit_scale", "bias"}  # in the manifest, not in a graph


def test_bytes_of_the_tiny_model() -> None:
    config = presets.tiny()
    plan = make_plan(config, dict.fromkeys(GRAPHS, "fp32"), 8)
    parameters = sum(p.numel() for n, p in Mammut(config).named_parameters() if n not in ("log_logit_scale", "bias"))
    assert plan.parameters == parameters and plan.unique_weight_bytes == 4 * parameters
    halved = make_plan(config, dict.fromkeys(GRAPHS, "fp16"), 8)
    assert 0.5 < halved.unique_weight_bytes / plan.unique_weight_bytes < 0.55
    # 2 layers of keys and values, width 24; 4 image tokens, 1 cross block
    assert plan.cache_bytes_per_token == 2 * 2 * 24 * 4 and plan.cache_bytes == 8 * plan.cache_bytes_per_token
    assert plan.cross_bytes == 2 * 4 * 24 * 4
    assert plan.separate_weight_bytes > plan.unique_weight_bytes
    assert plan.graph("text").parameters < plan.graph("decoder").parameters


def test_description_says_what_matters() -> None:
    text = "\n".join(describe(make_plan(presets.openmammut("B-32"), dict.fromkeys(GRAPHS, "fp32"), 20)))
    for part in (
        "183.02 M",
        "8.82 G for a picture",
        "732 MB",
        "memory",
        "a text of 77 tokens",
        "per beam of 20 tokens",
    ):
        assert part in text, part
    search = "\n".join(describe(make_plan(presets.openmammut("B-32"), {"vision": "fp16", "text": "fp16"}, 20)))
    assert "decoder" not in search and "fp16" in search


@pytest.mark.parametrize(("size", "text"), [(1_234_567, "1.2 MB"), (99_940_000, "99.9 MB"), (732_000_000, "732 MB")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert megabytes(size) == text
