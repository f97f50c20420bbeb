"""Blocks against the formula written out, and the cache against no cache."""

from __future__ import annotations

import math

import pytest
import torch

from mammut.transformer import CrossBlock, SelfBlock, attention, merge_heads, split_heads


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention head by head with loops, float64."""
    width = q.shape[-1] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(width)
        out[..., part] = scores.softmax(-1) @ v[..., part]
    return out


def test_heads_split_and_merge_exactly() -> None:
    x = torch.randn(2, 5, 12)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


def test_self_block_equals_the_formula() -> None:
    torch.manual_seed(0)
    block = SelfBlock(12, 3, 24, "gelu").double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = block.qkv(block.norm_1(x)).split(12, dim=-1)
    expected = x + block.out(by_hand(q, k, v, 3))
    assert block.mlp is not None and block.norm_2 is not None
    h = block.mlp.up(block.norm_2(expected))
    expected = expected + block.mlp.down(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    torch.testing.assert_close(block(x), expected)


def test_the_plain_formula_is_the_kernel() -> None:
    q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for length in (5, 7, 7))
    mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(torch.ones(5, 7).triu(3) > 0, -math.inf)
    for given in (None, mask):
        torch.testing.assert_close(attention(q, k, v, given, plain=True), attention(q, k, v, given))
    assert not torch.allclose(attention(q, k, v, mask), attention(q, k, v))  # control


def test_quick_gelu_is_another_function() -> None:
    torch.manual_seed(0)
    exact, quick = SelfBlock(12, 3, 24, "gelu"), SelfBlock(12, 3, 24, "quick_gelu")
    quick.load_state_dict(exact.state_dict())
    x = torch.randn(1, 4, 12)
    assert quick.mlp is not None
    h = torch.randn(3, 12)
    inner = quick.mlp.up(h)
    torch.testing.assert_close(quick.mlp(h), quick.mlp.down(inner * torch.sigmoid(1.702 * inner)))
    assert not torch.allclose(exact(x), quick(x), atol=1e-5)


def test_block_without_mlp_owns_no_mlp_weights() -> None:
    names = set(SelfBlock(12, 3, 24, "gelu", has_mlp=False).state_dict())
    assert names == {f"{m}.{k}" for m in ("norm_1", "qkv", "out") for k in ("weight", "bias")}


def test_cross_block_equals_the_formula() -> None:
    torch.manual_seed(0)
    block = CrossBlock(12, 3, 24, "gelu", memory_norm=True).double()
    x, memory = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    assert block.norm_memory is not None
    k, v = block.key_value(block.norm_memory(memory)).split(12, dim=-1)
    expected = x + block.out(by_hand(block.query(block.norm_1(x)), k, v, 3))
    expected = expected + block.mlp(block.norm_2(expected))
    torch.testing.assert_close(block(x, block.keys_values(memory)), expected)


@pytest.mark.parametrize("past", [0, 1, 4])
def test_cached_block_equals_the_whole_sequence(past: int) -> None:
    torch.manual_seed(0)
    block = SelfBlock(12, 3, 24, "gelu")
    x = torch.randn(2, 6, 12)
    mask = torch.full((6, 6), -math.inf).triu(1)
    whole = block(x, mask)
    _, cache = block.cached(x[:, :past], None, mask[:past, :past])
    rest, (keys, _) = block.cached(x[:, past:], cache, mask[past:])
    torch.testing.assert_close(rest, whole[:, past:], atol=1e-6, rtol=1e-5)
    assert keys.shape == (2, 3, 6, 4)
