"""Low-rank adaptation: starts as the model it adapts, trains little, merges exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mammut.checkpoint import load_checkpoint, save_checkpoint
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut.model import Mammut
from mammut.presets import tiny
from mammut.training.lora import LoraOptions, add_lora, merge_lora, plain_state
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule


def outputs(model: Mammut) -> tuple[torch.Tensor, ...]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(10).reshape(2, 5) + 3
    with torch.no_grad():
        tokens, images = model.encode_image(pixels)
        return images, model.encode_text(ids), model.caption_logits(tokens, ids)


def trained(model: Mammut) -> None:
    """Some steps on whatever is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        tokens, images = model.encode_image(torch.randn(2, 3, 32, 32))
        ids = torch.arange(10).reshape(2, 5)
        loss = model.caption_logits(tokens, ids).square().mean() + (images @ model.encode_text(ids).T).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_merged_is_adapted() -> None:
    torch.manual_seed(0)
    model, options = Mammut(tiny()), LoraOptions(rank=4)
    names = [name for name, _ in model.named_parameters()]
    before = outputs(model)
    layers = add_lora(model, options)
    assert {name.split(".")[-1] for name in layers} == {"qkv", "out", "query", "key_value", "up", "down"}
    for a, b in zip(outputs(model), before, strict=True):
        assert torch.equal(a, b)  # B is zero at the start
    trained(model)
    adapted = outputs(model)
    assert not torch.allclose(adapted[2], before[2], atol=1e-3)  # control: it learned something
    state = plain_state(model.state_dict(), options)
    assert merge_lora(model) == len(layers)
    for a, b in zip(outputs(model), adapted, strict=True):
        assert torch.equal(a, b)
    assert [name for name, _ in model.named_parameters()] != []
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_only_the_products_are_trained() -> None:
    model = Mammut(tiny())
    whole = sum(p.numel() for p in model.parameters())
    add_lora(model, LoraOptions(rank=1, targets=("attention",), towers=("text",)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".parametrizations.weight.0." in name for name in trainable)
    assert all(name.startswith("text.") for name in trainable)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < whole / 20


def test_a_merged_model_is_a_plain_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mammut(tiny(vocab_size=49_408))
    add_lora(model, LoraOptions(rank=2))
    trained(model)
    adapted = outputs(model)
    merge_lora(model)
    rule = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)
    prompts = {"caption": "", "ask": "{question}", "zero_shot": "{}"}
    save_checkpoint(tmp_path / "merged", model, build_clip_tokenizer(), rule, prompts)
    for a, b in zip(outputs(load_checkpoint(tmp_path / "merged").model), adapted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_no_target_is_refused() -> None:
    with pytest.raises(InputError, match="no layer is targeted"):
        add_lora(Mammut(tiny()), LoraOptions(targets=()))
