"""Pre-training as the paper says; fine-tuning from our checkpoints and from openMaMMUT's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mammut import openmammut
from mammut.checkpoint import load_checkpoint
from mammut.model import Mammut
from mammut.training.loop import train
from mammut.training.parallel import Place
from mammut.training.recipes import Recipe, finetune, model_preset, pretrain
from mammut.training.run_config import RunConfig, changed
from mammut.training.run_log import read_log
from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict

ALONE = Place(0, 1, torch.device("cpu"))


def test_the_papers_numbers() -> None:
    config = pretrain(model_preset("paper-huge"), ["{0..9}.tar"], "tokenizer.json")
    first, second = config.stages
    assert (config.batch_size, first.steps, first.learning_rate, first.warmup_steps) == (16_384, 500_000, 1e-3, 10_000)
    assert (first.schedule, config.optimizer.weight_decay, first.image_size) == ("linear", 0.01, 224)
    assert not first.crop_positions and second.crop_positions and second.steps == 100_000
    assert (config.objective.contrastive_weight, config.objective.caption_weight) == (1.0, 1.0)
    assert round(224 * config.data.margin) == 272 and config.model.text.context_length == 64
    assert config.parallel.strategy == "fsdp"
    assert pretrain(model_preset("paper-base"), ["a.tar"], "t").batch_size == 4096


@pytest.fixture
def starts(small_run: Any, tmp_path: Path) -> dict[str, Path]:
    """A checkpoint of ours and one in openMaMMUT's published form, with the small run's tokenizer."""
    ours = train(small_run.with_("stages.0.steps=2"), tmp_path / "ours", ALONE)
    vocabulary = small_run.config.model.text.vocab_size
    config = openmammut.openmammut_config(
        name="public", image_size=32, patch_size=8, vision=(2, 32, 2, 128), text=(4, 24, 2),
        mlp_in_crossed_blocks=False, vocab_size=vocabulary, embedding_rows=vocabulary,
    )  # fmt: skip
    folder = tmp_path / "public"
    folder.mkdir()
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "avg_all"}
    text = {"vocab_size": vocabulary, "width": 24, "heads": 2, "layers": 4, "cross_attn_ratio": 2, "has_mlp": False}
    model = {
        "custom_text": True, "embed_dim": 24, "vision_cfg": {**vision, "final_ln_after_pool": True},
        "text_cfg": {**text, "does_full_decoding": True},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    (folder / "tokenizer.json").write_bytes((small_run.folder / "tokenizer.json").read_bytes())
    state = openmammut.to_public(Mammut(config).state_dict(), config)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return {"ours": ours, "openmammut": folder}


def small(config: RunConfig, *changes: str) -> RunConfig:
    own = ["stages.0.steps=12", "stages.0.warmup_steps=2", "stages.0.learning_rate=0.01", "batch_size=8",
           "data.workers=0", "save.log_every=1", "data.shuffle=12"]  # fmt: skip
    return RunConfig.from_dict(changed(to_dict(config), [*own, *changes]), "config")


@pytest.mark.parametrize("start", ["ours", "openmammut"])
@pytest.mark.parametrize("recipe", ["caption", "ask", "retrieval"])
@pytest.mark.parametrize("lora", [False, True])
def test_every_recipe_from_either_start(
    starts: dict[str, Path], small_run: Any, tmp_path: Path, start: str, recipe: Recipe, lora: bool
) -> None:
    config = small(finetune(recipe, str(starts[start]), small_run.config.data.sources[0].files, lora=lora))
    folder = train(config, tmp_path / "out", ALONE)
    rows = read_log(tmp_path / "out")
    name = "loss_contrastive" if recipe == "retrieval" else "loss_caption"
    assert sum(r[name] for r in rows[-3:]) < sum(r[name] for r in rows[:3])
    assert (rows[0]["loss_contrastive"] > 0) == (recipe != "ask")
    assert (rows[0]["loss_caption"] > 0) == (recipe != "retrieval")
    before, after = load_checkpoint(starts[start]).model, load_checkpoint(folder).model
    both = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = {name for (name, old), new in both if not torch.equal(old, new)}
    assert "text.self_blocks.0.qkv.weight" in moved
    assert ("text.positions" in moved) != lora
    assert ("text.cross_blocks.0.query.weight" in moved) == (recipe != "retrieval")


def test_freezing_layer_rates_and_another_picture_size(starts: dict[str, Path], small_run: Any, tmp_path: Path) -> None:
    config = finetune("caption", str(starts["openmammut"]), small_run.config.data.sources[0].files, image_size=48)
    config = small(config, 'optimizer.freeze=["vision.*"]', "optimizer.layer_decay=0.5")
    assert config.model.vision.grid == 6 and config.stages[0].image_size == 48
    after = load_checkpoint(train(config, tmp_path / "out", ALONE)).model
    before = load_checkpoint(starts["openmammut"], image_size=48).model
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b) == name.startswith("vision."), name


def test_an_adapted_run_is_resumed_with_its_products(starts: dict[str, Path], small_run: Any, tmp_path: Path) -> None:
    config = small(finetune("caption", str(starts["ours"]), small_run.config.data.sources[0].files, lora=True))
    config = dataclasses.replace(config, save=dataclasses.replace(config.save, every_steps=6))
    whole = load_checkpoint(train(config, tmp_path / "out", ALONE)).model
    last = tmp_path / "out" / "step-00000012"
    for path in [*last.iterdir(), last]:
        path.rmdir() if path.is_dir() else path.unlink()
    again = load_checkpoint(train(config, tmp_path / "out", ALONE, resume=True)).model
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(InputError, match="unknown model 'paper-hgue'; expected tiny, demo"):
        model_preset("paper-hgue")
    assert model_preset("openmammut-L-14").vision.layers == 24
