"""The slow reference for captions."""

from __future__ import annotations

import torch

from mammut import presets
from mammut.generate import greedy
from mammut.model import Mammut


def test_greedy_takes_the_best_next_token_until_the_end() -> None:
    torch.manual_seed(0)
    model = Mammut(presets.tiny()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 32, 32)
    captions = greedy(model, pixels, [1], end_id=2, max_tokens=6)
    tokens, _ = model.encode_image(pixels)
    for row, ids in enumerate(captions):
        logits = model.caption_logits(tokens[row : row + 1], torch.tensor([[1, *ids]]))[0]
        best = logits.argmax(-1).tolist()
        assert best[: len(ids)] == ids and 2 not in ids
        assert len(ids) == 6 or best[len(ids)] == 2


def test_an_end_token_stops_and_the_context_is_never_passed() -> None:
    torch.manual_seed(0)
    model = Mammut(presets.tiny()).eval()
    pixels = torch.randn(1, 3, 32, 32)
    first = greedy(model, pixels, [1], end_id=-1, max_tokens=1)[0][0]
    assert greedy(model, pixels, [1], end_id=first, max_tokens=5) == [[]]
    assert len(greedy(model, pixels, [1], end_id=-1, max_tokens=999)[0]) == 24 - 1
