"""The slow, obvious way to caption: no cache, one picture after another. The fast path is held against it."""

from __future__ import annotations

import torch
from torch import Tensor

from mammut.model import Mammut


@torch.no_grad()
def greedy(model: Mammut, pixels: Tensor, prompt: list[int], end_id: int, max_tokens: int) -> list[list[int]]:
    """Caption pictures by always taking the most probable next token.

    Args:
        pixels: float32[B, 3, S, S].
        prompt: ids every caption begins with, at least the start token.
        end_id: stops a caption; it is not returned.
        max_tokens: new tokens at most.

    Returns:
        For each picture the new ids, without prompt and end.
    """
    tokens, _ = model.encode_image(pixels)
    return [greedy_from_tokens(model, tokens[i : i + 1], prompt, end_id, max_tokens) for i in range(len(pixels))]


@torch.no_grad()
def greedy_from_tokens(model: Mammut, tokens: Tensor, prompt: list[int], end_id: int, max_tokens: int) -> list[int]:
    """The same of one picture or clip that was encoded: tokens float32[1, N, Wv]."""
    ids = list(prompt)
    room = min(max_tokens, model.config.text.context_length - len(prompt))
    for _ in range(room):
        logits = model.caption_logits(tokens, torch.tensor([ids]))
        best = int(logits[0, -1].argmax())
        if best == end_id:
            break
        ids.append(best)
    return ids[len(prompt) :]
