"""Reads the public openMaMMUT checkpoints: their config, their tensor names, their training files.

Two things only: `read_config` (open_clip_config.json to our config) and the table between their tensor names and ours.
Files, downloads and tokenizers are checkpoint.py's. Facts: LAION-AI/open_clip_mammut @ ed2d1f6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mammut.config import MammutConfig
from mammut.presets import openmammut_config
from mammut_runtime.errors import CheckpointError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.strict import parse_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Keys the public code accepts and that change nothing in a MaMMUT model.
_IGNORED = {
    "model_cfg": {"init_logit_scale", "multimodal_cfg"},
    "vision_cfg": {"output_tokens"},
    "text_cfg": {
        "output_tokens", "mlp_ratio", "pad_id", "pool_type", "embed_cls", "proj", "proj_type", "proj_bias",
        "no_causal_mask", "act_kwargs", "norm_kwargs", "final_ln_after_pool",
    },
    "preprocess_cfg": {"mode"},
}  # fmt: skip
# Keys whose other values would be another architecture.
_FIXED: dict[str, dict[str, Any]] = {
    "model_cfg": {"custom_text": True, "init_logit_bias": None},
    "vision_cfg": {
        "pool_type": "avg_all", "final_ln_after_pool": True, "ls_init_value": None, "attentional_pool": False,
        "attn_pooler_queries": None, "no_ln_pre": False, "timm_model_name": None, "patch_dropout": 0.0,
    },
    "text_cfg": {"does_full_decoding": True, "ls_init_value": None, "hf_model_name": None},
}  # fmt: skip


def read_config(folder: Path, name: str) -> tuple[MammutConfig, PreprocessRule]:
    """Read open_clip_config.json. The number of embedding rows is taken from the weights later (see fit_rows).

    Raises:
        CheckpointError: not JSON, an unknown key, or a value that would be another architecture; named.
    """
    path = folder / "open_clip_config.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a JSON config, but it cannot be read: {error}") from error
    whole = parse_json(text, str(path), CheckpointError)
    if not isinstance(whole, dict) or not isinstance(whole.get("model_cfg", whole), dict):
        raise CheckpointError(f'{path}: expected {{"model_cfg": {{...}}}}, got another structure')
    model = Section(whole.get("model_cfg", whole), "model_cfg", path)
    # Read once more as our own, which checks every range before a model is built.
    config = MammutConfig.from_dict(_model_config(model, name).to_dict(), str(path))
    preprocess = _preprocess(Section(whole.get("preprocess_cfg") or {}, "preprocess_cfg", path), config)
    return config, preprocess


class Section:
    """One object of the public config: hands out its keys, and knows which were never asked for."""

    def __init__(self, data: Any, name: str, path: Path) -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: {name}: expected an object, got {data!r}")
        self.where, self.path = name, path
        self.data = {k: v for k, v in data.items() if k not in _IGNORED.get(name, set())}
        for key, value in _FIXED.get(name, {}).items():
            got = self.data.pop(key, value)
            if got != value:
                raise CheckpointError(f"{path}: {name}.{key} is {got!r}; a MaMMUT model has {value!r}")

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, once; CheckpointError if it is missing and has no default."""
        value = self.data.pop(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {self.where}.{key} is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number below a million."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1_000_000:
            raise CheckpointError(f"{self.path}: {self.where}.{key}: expected a positive whole number, got {value!r}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false, as JSON spells them."""
        value = self.data.pop(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {self.where}.{key}: expected true or false, got {value!r}")
        return value

    def finish(self) -> None:
        """Refuse keys nobody asked for, by name."""
        if self.data:
            keys = ", ".join(sorted(self.data))
            raise CheckpointError(
                f"{self.path}: unknown keys in {self.where}: {keys}. Remove them, or this is another architecture"
            )


def _model_config(model: Section, name: str) -> MammutConfig:
    vision = Section(model.take("vision_cfg"), "vision_cfg", model.path)
    text = Section(model.take("text_cfg"), "text_cfg", model.path)
    embed_dim = model.integer("embed_dim")
    width, head_width = vision.integer("width"), vision.integer("head_width", 64)
    ratio = vision.take("mlp_ratio", 4.0)
    if not isinstance(ratio, int | float) or not 0 < ratio <= 64:
        raise CheckpointError(f"{model.path}: vision_cfg.mlp_ratio: expected a number in (0, 64], got {ratio!r}")
    image_size = vision.take("image_size", 224)
    if isinstance(image_size, list) and len(image_size) == 2 and image_size[0] == image_size[1]:
        image_size = image_size[0]
    if not isinstance(image_size, int) or not 0 < image_size <= 8192:
        raise CheckpointError(f"{model.path}: vision_cfg.image_size: expected a square size, got {image_size!r}")
    layers, cross_ratio = text.integer("layers"), text.integer("cross_attn_ratio", 1)
    _check_crossing(layers, cross_ratio, model.path)
    vocab_size = text.integer("vocab_size", 49_408)
    config = openmammut_config(
        name=name,
        image_size=image_size,
        patch_size=vision.integer("patch_size"),
        vision=(vision.integer("layers"), width, max(width // head_width, 1), int(width * ratio)),
        text=(layers, text.integer("width"), text.integer("heads")),
        mlp_in_crossed_blocks=text.boolean("has_mlp", True),
        cross_ratio=cross_ratio,
        context_length=text.integer("context_length", 77),
        vocab_size=vocab_size,
        embedding_rows=vocab_size,
        quick_gelu=model.boolean("quick_gelu", False),
    )
    for section in (vision, text, model):
        section.finish()
    return dataclasses.replace(config, embed_dim=embed_dim)


def _check_crossing(layers: int, ratio: int, path: Path) -> None:
    crossed = layers // ratio
    if crossed == 0 or -(-layers // (layers // crossed)) != crossed:
        raise CheckpointError(f"{path}: text_cfg: {layers} layers cannot be crossed at ratio {ratio}")


def _preprocess(section: Section, config: MammutConfig) -> PreprocessRule:
    size = section.take("size", config.vision.image_size)
    size = size[0] if isinstance(size, list) and size and size == [size[0]] * len(size) else size
    interpolation = section.take("interpolation", "bicubic")
    rule = {
        "size": size,
        "mean": section.take("mean", list(CLIP_MEAN)),
        "std": section.take("std", list(CLIP_STD)),
        # "random" is a training augmentation; the public inference transform reads it as bicubic.
        "interpolation": "bicubic" if interpolation == "random" else interpolation,
        "resize_mode": section.take("resize_mode", "shortest"),
        "fill": section.take("fill_color", 0),
    }
    section.finish()
    if size != config.vision.image_size:
        raise CheckpointError(
            f"{section.path}: preprocess_cfg.size {size!r} differs from vision_cfg.image_size "
            f"{config.vision.image_size}"
        )
    try:
        return PreprocessRule.from_dict(rule)
    except Exception as error:
        raise CheckpointError(f"{section.path}: preprocess_cfg: {error}") from error


# --- tensor names --------------------------------------------------------------------------------------------


def _block_names(ours: str, theirs: str, has_mlp: bool) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{ours}.norm_1.{kind}", f"{theirs}.ln_1.{kind}"
        yield f"{ours}.out.{kind}", f"{theirs}.attn.out_proj.{kind}"
        if has_mlp:
            yield f"{ours}.norm_2.{kind}", f"{theirs}.ln_2.{kind}"
            yield f"{ours}.mlp.up.{kind}", f"{theirs}.mlp.c_fc.{kind}"
            yield f"{ours}.mlp.down.{kind}", f"{theirs}.mlp.c_proj.{kind}"


def _plain_names(config: MammutConfig) -> Iterator[tuple[str, str]]:
    """(our name, their name) of tensors that are stored alike."""
    yield "log_logit_scale", "logit_scale"
    yield "vision.class_token", "visual.class_embedding"
    yield "vision.positions", "visual.positional_embedding"
    yield "vision.patch_embedding.weight", "visual.conv1.weight"
    yield "text.token_embedding.weight", "text.token_embedding.weight"
    yield "text.positions", "text.positional_embedding"
    for kind in ("weight", "bias"):
        yield f"vision.pre_norm.{kind}", f"visual.ln_pre.{kind}"
        yield f"vision.final_norm.{kind}", f"visual.ln_post.{kind}"
        yield f"text.final_norm.{kind}", f"text.ln_final.{kind}"
    for i in range(config.vision.layers):
        yield from _block_names(f"vision.blocks.{i}", f"visual.transformer.resblocks.{i}", True)
    for i in range(config.text.layers):
        has_mlp = config.text.mlp_in_crossed_blocks or i not in config.text.cross_after
        yield from _block_names(f"text.self_blocks.{i}", f"text.resblocks.{i}", has_mlp)
    for j in range(len(config.text.cross_after)):
        yield from _block_names(f"text.cross_blocks.{j}", f"text.cross_attn.{j}", True)
        for kind in ("weight", "bias"):
            yield f"text.cross_blocks.{j}.norm_memory.{kind}", f"text.cross_attn.{j}.ln_1_kv.{kind}"


# Bare projections are stored [in, out] there and [out, in] here.
_TRANSPOSED = {
    "memory_projection.weight": "map_viz2txt_kv",
    "image_projection.weight": "visual.proj",
    "text.head": "text.text_projection",
}


def _self_attention_names(config: MammutConfig) -> Iterator[tuple[str, str]]:
    for ours, theirs, count in (
        ("vision.blocks", "visual.transformer.resblocks", config.vision.layers),
        ("text.self_blocks", "text.resblocks", config.text.layers),
    ):
        for i in range(count):
            for kind in ("weight", "bias"):
                yield f"{ours}.{i}.qkv.{kind}", f"{theirs}.{i}.attn.in_proj_{kind}"


def from_public(public: dict[str, Tensor], config: MammutConfig) -> dict[str, Tensor]:
    """Their state dict (already checked by check_shapes) to ours. Cross blocks split q from k and v."""
    ours = {name: public[theirs] for name, theirs in (*_plain_names(config), *_self_attention_names(config))}
    ours |= {name: public[theirs].T for name, theirs in _TRANSPOSED.items()}
    width = config.text.width
    for j in range(len(config.text.cross_after)):
        for kind in ("weight", "bias"):
            fused = public[f"text.cross_attn.{j}.attn.in_proj_{kind}"]
            ours[f"text.cross_blocks.{j}.query.{kind}"] = fused[:width]
            ours[f"text.cross_blocks.{j}.key_value.{kind}"] = fused[width:]
    return ours


def to_public(ours: dict[str, Tensor], config: MammutConfig) -> dict[str, Tensor]:
    """Our state dict to their names and layouts; the inverse of from_public."""
    public = {theirs: ours[name] for name, theirs in (*_plain_names(config), *_self_attention_names(config))}
    public |= {theirs: ours[name].T for name, theirs in _TRANSPOSED.items()}
    for j in range(len(config.text.cross_after)):
        for kind in ("weight", "bias"):
            parts = [ours[f"text.cross_blocks.{j}.{part}.{kind}"] for part in ("query", "key_value")]
            public[f"text.cross_attn.{j}.attn.in_proj_{kind}"] = torch.cat(parts)
    return public


def unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a file: a training checkpoint's `state_dict`, without DistributedDataParallel's prefix."""
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, or a training checkpoint with `state_dict`")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    scale = state.get("logit_scale")
    if isinstance(scale, Tensor) and scale.shape == (1,):
        state = state | {"logit_scale": scale.reshape(())}
    return state
