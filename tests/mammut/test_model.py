"""The whole model: embeddings, their two projections, no vocabulary work in the contrastive pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from mammut import presets
from mammut.model import Mammut

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])


def model(**changes: object) -> Mammut:
    torch.manual_seed(0)
    return Mammut(dataclasses.replace(presets.tiny(), **changes)).eval()


def test_embeddings_have_unit_length() -> None:
    m = model()
    for embedding in (m.encode_image(PIXELS)[1], m.encode_text(IDS)):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))


def test_paper_embedding_is_the_mean_of_the_projected_tokens() -> None:
    m = model()
    tokens, embedding = m.encode_image(PIXELS)
    torch.testing.assert_close(embedding, F.normalize(m.memory_projection(tokens).mean(1), dim=-1))
    assert m.image_projection is None


def test_openmammut_embedding_has_its_own_projection() -> None:
    vision = dataclasses.replace(presets.tiny().vision, embedding="own_projection")
    m = model(vision=vision)
    assert m.image_projection is not None
    tokens, embedding = m.encode_image(PIXELS, normalize=False)
    torch.testing.assert_close(embedding, m.image_projection(tokens.mean(1)))


def test_contrastive_pass_never_makes_vocabulary_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()

    def refuse(hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("vocabulary logits were computed")

    monkeypatch.setattr(m.text, "vocabulary_logits", refuse)
    m.encode_text(IDS)
    with pytest.raises(AssertionError, match="vocabulary logits"):  # control: the caption pass does
        m.caption_logits(m.encode_image(PIXELS)[0], IDS)


def test_cached_decoding_equals_teacher_forcing() -> None:
    m = model()
    tokens, _ = m.encode_image(PIXELS)
    expected = m.caption_logits(tokens, IDS)
    past, memory = m.empty_past(2), m.memory(tokens)
    for at in range(IDS.shape[1]):
        logits, past = m.decode_step(IDS[:, None, at : at + 1], past, memory)
        torch.testing.assert_close(logits[:, 0], expected[:, at], atol=1e-5, rtol=1e-5)


def test_scale_and_bias_start_where_the_config_says() -> None:
    m = model()
    assert m.logit_scale.item() == pytest.approx(10)
    assert m.logit_bias is not None and m.logit_bias.item() == -5
    assert model(logit_bias_init=None).logit_bias is None
