"""The model's config: strict reading, consistency."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mammut import presets
from mammut.config import MammutConfig
from mammut_runtime.errors import CheckpointError


def test_every_preset_survives_json() -> None:
    for config in (presets.demo(), presets.tiny(), presets.paper_base(), presets.openmammut("L-14")):
        assert MammutConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_is_refused_by_name() -> None:
    data = presets.tiny().to_dict()
    MammutConfig.from_dict(data)  # control
    data["vision"]["patch_sise"] = 16
    with pytest.raises(CheckpointError, match=r"config: vision: unknown key 'patch_sise'"):
        MammutConfig.from_dict(data)


def test_missing_key_is_refused_by_name() -> None:
    data = presets.tiny().to_dict()
    del data["text"]["tied_head"]
    with pytest.raises(CheckpointError, match=r"config: text: missing key 'tied_head'"):
        MammutConfig.from_dict(data)


def test_absurd_size_is_refused_before_anything_is_allocated() -> None:
    data = presets.tiny().to_dict()
    data["text"]["width"] = 10**9
    with pytest.raises(CheckpointError, match=r"text\.width: expected a number from 1 to"):
        MammutConfig.from_dict(data)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"cross_after": (1, 0)}, "must be ascending block indices"),
        ("text", {"cross_after": (0, 2)}, "must be ascending block indices"),
        ("text", {"heads": 5}, "text.width 24 is not divisible by text.heads 5"),
        ("text", {"embedding_rows": 65}, "a tied head needs embedding_rows == vocab_size"),
        ("vision", {"heads": 3}, "vision.width 32 is not divisible by vision.heads 3"),
        ("vision", {"image_size": 8}, "smaller than one patch"),
    ],
)
def test_inconsistent_sizes_are_refused(part: str, change: dict[str, object], message: str) -> None:
    config = presets.tiny()
    changed = dataclasses.replace(getattr(config, part), **change)
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(config, **{part: changed})


def test_embed_dim_must_be_the_text_width() -> None:
    with pytest.raises(CheckpointError, match=r"embed_dim 25 must equal text\.width 24"):
        dataclasses.replace(presets.tiny(), embed_dim=25)
