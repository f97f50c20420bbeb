from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut.generate import greedy
from mammut_export import canary as module
from mammut_export.canary import make_canary
from mammut_export.contents import text_rule
from mammut_export.graphs import PICTURE_GRAPHS as GRAPHS
from mammut_export.weights import half_rounded
from mammut_runtime.canary import canary_picture
from mammut_runtime.preprocess import Preprocessor


def test_canary_is_what_the_core_computes(tiny: Checkpoint) -> None:
    rule = text_rule(tiny, 8)
    canary = make_canary(tiny, GRAPHS, rule, "fp32")
    pixels = torch.from_numpy(Preprocessor(tiny.preprocess)(canary_picture(canary.seed, canary.picture_hw)))[None]
    with torch.no_grad():
        embedding = tiny.model.encode_image(pixels)[1][0].numpy()
    np.testing.assert_array_equal(np.float32(canary.embedding), embedding)
    (ids,) = greedy(tiny.model, pixels, [rule.start_id], rule.end_id, 8)
    assert list(canary.caption_ids) == ids
    assert canary.ids[0] == rule.start_id and canary.ids[-1] == rule.end_id


def test_the_most_certain_seed_is_taken(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    leads = {0: 1e-4, 1: 1e-3, 2: 5e-4, 3: 1.0}
    asked = []

    def fake(*_: object) -> module._Greedy:
        asked.append(len(asked))
        return module._Greedy((asked[-1],), leads.get(asked[-1], 0.0))

    monkeypatch.setattr(module, "_greedy", fake)
    assert make_canary(tiny, GRAPHS, text_rule(tiny, 8), "fp32").seed == 3
    assert asked == [0, 1, 2, 3]  # and no further: that one is certain enough
    leads[3] = 0.0
    asked.clear()
    canary = make_canary(tiny, GRAPHS, text_rule(tiny, 8), "fp32")
    assert (canary.seed, canary.caption_ids, len(asked)) == (1, (1,), module.SEEDS)


def test_graphs_that_are_not_there_have_no_answers(tiny: Checkpoint) -> None:
    search = make_canary(tiny, ("vision", "text"), text_rule(tiny, 8), "fp32")
    assert search.embedding and search.text_embedding and not search.caption_ids
    caption = make_canary(tiny, ("vision", "memory", "decoder"), text_rule(tiny, 8), "fp32")
    assert caption.caption_ids and not caption.ids and not caption.text_embedding


def test_fp16_answers_are_those_of_the_stored_weights(tiny: Checkpoint) -> None:
    whole, halved = (make_canary(tiny, GRAPHS, text_rule(tiny, 8), precision) for precision in ("fp32", "fp16"))
    difference = np.abs(np.subtract(whole.embedding, halved.embedding)).max()
    assert 1e-6 < difference < halved.tolerance
    before = tiny.model.text.positions.numpy()
    assert not np.array_equal(before, half_rounded(before))  # the checkpoint itself is untouched


def test_a_text_is_filled_where_pads_count(tiny: Checkpoint) -> None:
    rule = dataclasses.replace(text_rule(tiny, 8), text_length=24, mask_pads=False)
    assert len(make_canary(tiny, ("vision", "text"), rule, "fp32").ids) == 24
