"""The public config and tensor names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mammut import openmammut, presets
from mammut.config import MammutConfig
from mammut.model import Mammut
from mammut_runtime.errors import CheckpointError

PUBLIC: dict[str, Any] = {
    "model_cfg": {
        "custom_text": True,
        "embed_dim": 512,
        "vision_cfg": {
            "image_size": 224, "layers": 12, "width": 768, "patch_size": 32,
            "output_tokens": True, "pool_type": "avg_all", "final_ln_after_pool": True,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "output_tokens": True,
            "cross_attn_ratio": 2, "does_full_decoding": True, "has_mlp": False,
        },
    }
}  # fmt: skip


def read(folder: Path, **changes: Any) -> MammutConfig:
    """Write PUBLIC with changes like vision_cfg__width=3 (None removes the key), and read it."""
    data = copy.deepcopy(PUBLIC)
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = data if sections[:1] == ["preprocess_cfg"] else data["model_cfg"]
        for section in sections:
            target = target.setdefault(section, {})
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(data))
    return openmammut.read_config(folder, "openmammut-B-32")[0]


def test_the_public_b32_config_is_the_preset(tmp_path: Path) -> None:
    assert read(tmp_path) == presets.openmammut("B-32")


def test_has_mlp_is_true_when_absent(tmp_path: Path) -> None:
    assert read(tmp_path, text_cfg__has_mlp=None).text.mlp_in_crossed_blocks
    assert not read(tmp_path).text.mlp_in_crossed_blocks


def test_quick_gelu_and_head_width_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, quick_gelu=True, vision_cfg__head_width=96, vision_cfg__mlp_ratio=3.0)
    assert (config.activation, config.vision.heads, config.vision.mlp_width) == ("quick_gelu", 8, 2304)


@pytest.mark.parametrize(
    ("layers", "ratio", "after"),
    [(12, 2, (0, 2, 4, 6, 8, 10)), (4, 2, (0, 2)), (12, 3, (0, 3, 6, 9)), (4, 1, (0, 1, 2, 3)), (5, 3, (0,))],
)
def test_cross_blocks_follow_the_public_rule(tmp_path: Path, layers: int, ratio: int, after: tuple[int, ...]) -> None:
    config = read(tmp_path, text_cfg__layers=layers, text_cfg__cross_attn_ratio=ratio)
    assert config.text.cross_after == after


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_cfg__layers": 5}, "5 layers cannot be crossed at ratio 2"),
        ({"vision_cfg__pool_type": "tok"}, r"vision_cfg\.pool_type is 'tok'; a MaMMUT model has 'avg_all'"),
        ({"text_cfg__does_full_decoding": False}, r"does_full_decoding is False"),
        ({"vision_cfg__widht": 7}, "unknown keys in vision_cfg: widht"),
        ({"text_cfg__width": None}, r"text_cfg\.width is missing"),
        ({"vision_cfg__layers": -1}, r"vision_cfg\.layers: expected a positive whole number, got -1"),
        ({"vision_cfg__layers": 999_999}, r"vision\.layers: expected a number from 1 to 256, got 999999"),
        ({"text_cfg__has_mlp": "false"}, r"text_cfg\.has_mlp: expected true or false, got 'false'"),
        ({"quick_gelu": "no"}, r"model_cfg\.quick_gelu: expected true or false, got 'no'"),
        ({"vision_cfg__image_size": [224, 196]}, "expected a square size"),
        ({"embed_dim": 640}, "embed_dim 640 must equal text.width 512"),
        ({"preprocess_cfg__size": 336}, "preprocess_cfg.size 336 differs from vision_cfg.image_size 224"),
    ],
)
def test_other_architectures_and_typos_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


def test_not_json(tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    with pytest.raises(CheckpointError, match="expected a JSON config"):
        openmammut.read_config(tmp_path, "x")
    for text, message in (("{", "not readable as JSON"), ("[" * 100_000, "nested too deeply")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            openmammut.read_config(tmp_path, "x")


def tiny_public_config(**changes: Any) -> MammutConfig:
    options: dict[str, Any] = {
        "name": "tiny-public", "image_size": 32, "patch_size": 8, "vision": (2, 32, 2, 128), "text": (4, 24, 2),
        "mlp_in_crossed_blocks": False, "vocab_size": 256, "embedding_rows": 256,
    }  # fmt: skip
    return openmammut.openmammut_config(**options | changes)


@pytest.mark.parametrize("config", [tiny_public_config(), tiny_public_config(mlp_in_crossed_blocks=True)])
def test_names_there_and_back(config: MammutConfig) -> None:
    state = Mammut(config).state_dict()
    public = openmammut.to_public(state, config)
    back = openmammut.from_public(public, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert ("text.resblocks.0.mlp.c_fc.weight" in public) == config.text.mlp_in_crossed_blocks
    assert public["text.text_projection"].shape == (24, 256)


def test_training_files_are_unwrapped() -> None:
    state = {"logit_scale": torch.ones(1), "x": torch.zeros(2)}
    training = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "optimizer": {"state": {}}}
    unwrapped = openmammut.unwrap(training, Path("epoch_3.pt"))
    assert unwrapped.keys() == state.keys() and unwrapped["logit_scale"].shape == ()
    with pytest.raises(CheckpointError, match="expected a state dict of tensors"):
        openmammut.unwrap({"state_dict": {"a": 3}}, Path("epoch_3.pt"))
