"""The decoder's two passes: what each may see."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mammut import presets
from mammut.config import TextConfig
from mammut.text import TextDecoder, causal_mask


def decoder(**changes: object) -> TextDecoder:
    torch.manual_seed(0)
    config: TextConfig = dataclasses.replace(presets.tiny().text, **changes)
    made = TextDecoder(config, pad_id=0, activation="gelu").eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


IDS = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])


def test_contrastive_pass_sees_both_directions_and_no_picture() -> None:
    text = decoder()
    changed = IDS.clone()
    changed[:, -1] = 11
    assert not torch.allclose(text.contrastive(IDS), text.contrastive(changed))
    for parameter in text.cross_blocks.parameters():
        torch.nn.init.constant_(parameter, math.nan)  # never touched, so never seen
    assert torch.isfinite(text.contrastive(IDS)).all()


def test_masked_dialect_ignores_padding_and_unmasked_does_not() -> None:
    padded = torch.nn.functional.pad(IDS, (0, 5))
    masked, unmasked = decoder(), decoder(mask_pads=False)
    torch.testing.assert_close(masked.contrastive(IDS), masked.contrastive(padded), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(unmasked.contrastive(IDS), unmasked.contrastive(padded), atol=1e-2)


def memory_of(text: TextDecoder, batch: int = 2, tokens: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    heads, width = text.config.heads, text.config.width // text.config.heads
    generator = torch.Generator().manual_seed(1)
    shape = (batch, heads, tokens, width)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in text.config.cross_after
    ]


def test_caption_pass_is_causal_and_sees_the_picture() -> None:
    text = decoder()
    memory = memory_of(text)
    hidden = text.caption(IDS, memory)
    later = IDS.clone()
    later[:, -1] = 11
    torch.testing.assert_close(text.caption(later, memory)[:, :-1], hidden[:, :-1])
    other = [(k, v + 1) for k, v in memory]
    assert not torch.allclose(text.caption(IDS, other), hidden)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_prefill_and_steps_equal_teacher_forcing(cut: int) -> None:
    text = decoder()
    memory = memory_of(text)
    expected = text.vocabulary_logits(text.caption(IDS, memory))
    empty = torch.zeros(2, 1, 2, 0, 12)
    past = [(empty, empty)] * text.config.layers
    logits, past = text.step(IDS[:, None, :cut], past, memory)
    torch.testing.assert_close(logits[:, 0], expected[:, cut - 1], atol=1e-5, rtol=1e-5)
    for at in range(cut, 4):
        logits, past = text.step(IDS[:, None, at : at + 1], past, memory)
        torch.testing.assert_close(logits[:, 0], expected[:, at], atol=1e-5, rtol=1e-5)
    assert past[0][0].shape == (2, 1, 2, 4, 12)


def test_beams_share_the_picture_and_nothing_else() -> None:
    text = decoder()
    memory = memory_of(text, batch=1)
    empty = torch.zeros(1, 2, 2, 0, 12)
    together, _ = text.step(IDS[None], [(empty, empty)] * 2, memory)
    for beam in range(2):
        one = torch.zeros(1, 1, 2, 0, 12)
        alone, _ = text.step(IDS[None, beam : beam + 1], [(one, one)] * 2, memory)
        torch.testing.assert_close(together[:, beam], alone[:, 0], atol=1e-5, rtol=1e-5)


def test_cross_blocks_stand_where_the_config_says() -> None:
    first, last = decoder(cross_after=(0,)), decoder(cross_after=(1,))
    last.load_state_dict(first.state_dict())
    memory = memory_of(first)
    assert not torch.allclose(first.caption(IDS, memory), last.caption(IDS, memory))


def test_mlps_are_left_out_of_crossed_blocks_only() -> None:
    text = decoder(mlp_in_crossed_blocks=False)
    assert [block.mlp is None for block in text.self_blocks] == [True, False]
    assert all(block.mlp is not None for block in text.cross_blocks)


def test_causal_mask() -> None:
    x = torch.zeros(1)
    assert causal_mask(2, 1, x).tolist() == [[0, 0, -math.inf], [0, 0, 0]]
