"""The objective against separately written losses, and its options."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from mammut.model import Mammut
from mammut.presets import openmammut_config, tiny
from mammut.training.contrast import ABSENT
from mammut.training.losses import focal_contrastive
from mammut.training.objective import (
    ObjectiveOptions,
    PairBatch,
    TwoPass,
    count_tokens,
    share,
    uncertainty_optimum,
    weighed,
)
from mammut_runtime.errors import InputError


@pytest.fixture
def batch() -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (4, 7), generator=generator)
    counted = torch.rand(4, 6, generator=generator) < 0.7
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    return PairBatch(pixels, ids, torch.arange(4), ids[:, :-1], ids[:, 1:], counted)


def two_pass(options: ObjectiveOptions, **changes: object) -> TwoPass:
    torch.manual_seed(1)
    return TwoPass(Mammut(dataclasses.replace(tiny(), **changes)), options, autocast=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_both_losses_are_those_of_the_plain_model(batch: PairBatch, smoothing: float) -> None:
    options = ObjectiveOptions(contrastive_weight=2.0, caption_weight=3.0, label_smoothing=smoothing)
    passes = two_pass(options)
    with torch.no_grad():
        losses = weighed(passes(batch), batch.keys, count_tokens(batch.counted), "focal", options)
        tokens, images = passes.model.encode_image(batch.pixels)
        texts = passes.model.encode_text(batch.text_ids)
        bias = passes.model.logit_bias
        assert bias is not None
        logits = passes.model.logit_scale * images @ texts.T + bias
        vocabulary = passes.model.caption_logits(tokens, batch.ids).double().numpy()
    assert float(losses.contrastive) == pytest.approx(float(focal_contrastive(logits, torch.eye(4).bool())), rel=1e-5)
    costs = []  # float64, token by token
    for row, position in np.argwhere(batch.counted.numpy()):
        line = vocabulary[row, position]
        whole = math.log(np.exp(line - line.max()).sum()) + line.max()
        # Smoothed: a share of the target is spread evenly over all words.
        costs.append(whole - (1 - smoothing) * line[batch.targets[row, position]] - smoothing * line.mean())
    assert float(losses.caption) == pytest.approx(float(np.mean(costs)), rel=1e-5)
    assert float(losses.total) == pytest.approx(2 * float(losses.contrastive) + 3 * float(losses.caption), rel=1e-6)


def test_padding_does_not_count_but_a_real_token_with_its_id_does(batch: PairBatch) -> None:
    passes = two_pass(ObjectiveOptions())
    ids = batch.ids.clone()
    targets = batch.targets.clone()
    targets[0, 1] = 0  # the padding's id, as a real token
    counted = torch.zeros_like(batch.counted)
    counted[0, :3] = True
    with torch.no_grad():
        one = passes(dataclasses.replace(batch, ids=ids, targets=targets, counted=counted)).caption_sum
        ignored = targets.clone()
        ignored[1:] = 7  # not counted, so nothing changes
        same = passes(dataclasses.replace(batch, ids=ids, targets=ignored, counted=counted)).caption_sum
        counted[0, 1] = False
        fewer = passes(dataclasses.replace(batch, ids=ids, targets=targets, counted=counted)).caption_sum
    assert one is not None and float(one) == float(same)
    assert float(fewer) < float(one)


def test_one_backward_reaches_everything_once(batch: PairBatch) -> None:
    options = ObjectiveOptions()
    passes = two_pass(options)
    calls: list[int] = []
    passes.model.vision.register_forward_hook(lambda *_: calls.append(1))
    weighed(passes(batch), batch.keys, count_tokens(batch.counted), "focal", options).total.backward()
    assert len(calls) == 1  # one picture encoding for both passes
    assert all(p.grad is not None for p in passes.parameters())


def test_learned_weights_settle_where_theory_says() -> None:
    """The s that makes w exp(-s) L + s / 2 least is log(2 w L)."""
    s = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        (share(torch.tensor(6.0), 1.0, s, 0) + share(torch.tensor(0.2), 2.0, s, 1)).backward()
        optimizer.step()
    assert float(s[0].detach()) == pytest.approx(uncertainty_optimum(6.0), abs=1e-3)
    assert float(s[1].detach()) == pytest.approx(uncertainty_optimum(0.2, 2.0), abs=1e-3)
    # Control: fixed weights are as given.
    assert float(share(torch.tensor(6.0), 0.5, None, 0)) == 3.0


def test_recomputed_logits_give_the_same_gradient(batch: PairBatch) -> None:
    kept, again = two_pass(ObjectiveOptions()), two_pass(ObjectiveOptions())
    again.most_logits = 5 * 64  # five tokens at a time
    for passes in (kept, again):
        out = passes(batch).caption_sum
        assert out is not None
        out.backward()
    weight = "token_embedding.weight"
    a, b = (p.model.text.get_parameter(weight).grad for p in (kept, again))
    assert a is not None and b is not None
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("long_rows", [0, 1, 3, 4])
def test_short_and_long_rows_apart_are_the_same(long_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 3, 5, 4])
    lengths[:long_rows] = 12
    ids = torch.randint(3, 60, (4, 13), generator=generator)
    ids = torch.where(torch.arange(13) < lengths[:, None], ids, 0)
    counted = torch.arange(1, 13) < lengths[:, None]
    counted[:, 0] = False  # a prompt
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    keys = torch.arange(4)
    given = PairBatch(
        pixels, ids[:3], keys, ids[:, :-1], ids[:, 1:], counted, text_keys=torch.tensor([0, 1, 2, ABSENT])
    )
    given = dataclasses.replace(given, keys=torch.tensor([0, 1, 2, ABSENT]))
    options, found, widths = ObjectiveOptions(), {}, {}
    for apart in (False, True):
        passes = two_pass(options)
        passes.sort_lengths, widths[apart] = apart, []
        passes.model.text.final_norm.register_forward_hook(lambda *a, to=widths[apart]: to.append(a[2].shape[-2]))
        losses = weighed(passes(given), given.keys, count_tokens(counted), "focal", options, given.text_keys)
        losses.total.backward()
        found[apart] = [losses.contrastive, losses.caption, passes.model.text.positions.grad]
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6)
    assert widths[False] == [13, 12]
    if 0 < long_rows < 3:
        assert sorted(widths[True]) == [6, 6, 12, 13]  # control: they do go apart


def test_another_picture_size_than_the_models(batch: PairBatch) -> None:
    passes = two_pass(ObjectiveOptions())
    large = dataclasses.replace(batch, pixels=torch.randn(4, 3, 64, 64))
    assert passes(large).images.shape == (4, 24)


def test_unused_parameters_of_openmammut() -> None:
    config = openmammut_config(
        name="x", image_size=32, patch_size=16, vision=(2, 32, 2, 64), text=(2, 24, 2), mlp_in_crossed_blocks=False,
        context_length=8, vocab_size=64, embedding_rows=64,
    )  # fmt: skip
    batch = PairBatch(
        torch.randn(2, 3, 32, 32), torch.ones(2, 8, dtype=torch.int64), torch.arange(2),
        torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.bool),
    )  # fmt: skip
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        options = ObjectiveOptions(*weights)
        passes = TwoPass(Mammut(config), options, None)
        weighed(passes(batch), batch.keys, 14, "infonce", options).total.backward()
        assert {n for n, p in passes.model.named_parameters() if p.grad is None} == passes.unused_parameters()


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="both 0"):
        ObjectiveOptions(contrastive_weight=0, caption_weight=0)
