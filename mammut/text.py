"""The one text decoder. Two passes over one set of weights (paper section 2) are two methods, never one with a flag.

contrastive pass: bidirectional (causal for comparison), cross-attention blocks skipped whole, mean over the sequence.
caption pass: causal, a cross-attention block after some self blocks, vocabulary projection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.config import TextConfig
from mammut.transformer import Activation, CrossBlock, KeysValues, SelfBlock


class TextDecoder(nn.Module):
    """Legend: B batch, K sequences of one picture, L length, P past, W width, V vocabulary, H heads, D head width."""

    def __init__(self, config: TextConfig, pad_id: int, activation: Activation) -> None:
        super().__init__()
        self.config, self.pad_id = config, pad_id
        self.token_embedding = nn.Embedding(config.embedding_rows, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.self_blocks = nn.ModuleList(
            SelfBlock(
                config.width,
                config.heads,
                config.mlp_width,
                activation,
                has_mlp=config.mlp_in_crossed_blocks or index not in config.cross_after,
            )
            for index in range(config.layers)
        )
        self.cross_blocks = nn.ModuleList(
            CrossBlock(config.width, config.heads, config.mlp_width, activation, config.memory_norm)
            for _ in config.cross_after
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.head = None if config.tied_head else nn.Parameter(torch.zeros(config.vocab_size, config.width))

    def contrastive(self, ids: Tensor) -> Tensor:
        """The text tower: ids int64[B, L] to the mean of the sequence float32[B, W], not normalised. No vocabulary."""
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        order = causal_mask(ids.shape[1], 0, x) if self.config.contrastive_mask == "causal" else None
        if not self.config.mask_pads:
            return self._alone(x, order).mean(dim=1)
        real = ids != self.pad_id
        hidden = torch.zeros(real.shape, dtype=x.dtype, device=x.device).masked_fill(~real, -math.inf)
        mask = hidden[:, None, None, :]
        x = self._alone(x, mask if order is None else mask + order)
        weight = real.to(x.dtype)[:, :, None]
        return (x * weight).sum(dim=1) / weight.sum(dim=1)

    def _alone(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Without the picture."""
        for block in self.self_blocks:
            x = block(x, mask)
        out: Tensor = self.final_norm(x)
        return out

    def caption(self, ids: Tensor, memory: list[KeysValues]) -> Tensor:
        """Teacher forcing: ids int64[B, L] and each cross block's keys and values to hidden states float32[B, L, W]."""
        hidden, _ = self._causal(ids[:, None, :], None, memory)
        return hidden[:, 0]

    def step(self, ids: Tensor, past: list[KeysValues], memory: list[KeysValues]) -> tuple[Tensor, list[KeysValues]]:
        """New tokens after a cached past: prefill (P = 0) and single steps alike.

        Args:
            ids: int64[B, K, L], the new tokens of K sequences for each of B pictures.
            past: per self block, keys and values [B, K, H, P, D].
            memory: per cross block, keys and values of the picture [B, H, N, D], shared by its K sequences.

        Returns:
            logits float32[B, K, V] of the last position, and the present: keys and values [B, K, H, P + L, D].
        """
        hidden, present = self._causal(ids, past, memory)
        return self.vocabulary_logits(hidden[:, :, -1]), present

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """[..., W] to [..., V]. Flattened to two dimensions: an exporter then keeps the matrix as it is stored."""
        head = self.token_embedding.weight if self.head is None else self.head
        return F.linear(hidden.reshape(-1, hidden.shape[-1]), head).reshape(*hidden.shape[:-1], head.shape[0])

    def _causal(
        self, ids: Tensor, past: list[KeysValues] | None, memory: list[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        length = ids.shape[-1]
        start = 0 if past is None else past[0][0].shape[-2]
        x = self.token_embedding(ids) + self.positions[start : start + length]
        mask = causal_mask(length, start, x)
        present, crossed = [], 0
        for index, block in enumerate(self.self_blocks):
            assert isinstance(block, SelfBlock)
            x, keys_values = block.cached(x, None if past is None else past[index], mask)
            present.append(keys_values)
            if index in self.config.cross_after:
                # Sequences of one picture one after another: its memory is read once for all of them.
                x = self.cross_blocks[crossed](x.flatten(1, 2), memory[crossed]).reshape(x.shape)
                crossed += 1
        return self.final_norm(x), present


def causal_mask(length: int, start: int, like: Tensor) -> Tensor:
    """float[length, start + length]: 0 where a position may look, -inf where that would be ahead of it."""
    rows = torch.arange(length, device=like.device)[:, None] + start
    columns = torch.arange(start + length, device=like.device)[None, :]
    allowed = torch.zeros((length, start + length), dtype=like.dtype, device=like.device)
    return allowed.masked_fill(columns > rows, -math.inf)
