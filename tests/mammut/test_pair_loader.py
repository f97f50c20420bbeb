"""From stored samples to batches: what counts, how questions stand, and that batches come in one order."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mammut.data import Pair
from mammut.pair_loader import ExampleMaker, LoaderState, Reading, open_loader, picture
from mammut.shards import Raw, expand
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule


@pytest.fixture
def reading(small_run: Any) -> Reading:
    config = small_run.config
    tokenizer = (small_run.folder / "tokenizer.json").read_bytes()
    return Reading(
        expand(config.data.sources), tokenizer, config.preprocess, config.prompts, 24, True, config.data, 4, 32, 0, 0, 1
    )


def with_options(reading: Reading, **changes: Any) -> Reading:
    return dataclasses.replace(reading, options=dataclasses.replace(reading.options, **changes))


def test_captions_count_from_their_first_token_to_the_end_token(reading: Reading) -> None:
    batch = next(open_loader(reading, LoaderState.beginning(1)))
    maker = ExampleMaker(reading)
    assert batch.pixels.shape == (4, 3, 32, 32) and batch.pixels.dtype == torch.uint8
    for ids, targets, counted, text in zip(batch.ids, batch.targets, batch.counted, batch.text_ids, strict=True):
        written = targets[counted].tolist()
        assert ids[0] == maker.tokenizer.start_id and written[-1] == maker.tokenizer.end_id
        assert maker.tokenizer.decode(written[:-1]).startswith("a ")
        assert text.tolist()[: len(written) + 1] == [ids[0], *written]
        assert set(targets[~counted].tolist()) <= {maker.tokenizer.pad_id}


def test_a_question_is_the_prefix_and_only_the_answer_counts(reading: Reading) -> None:
    maker = ExampleMaker(with_options(reading, task="ask"))
    ids, given = maker.answer("which colour?", "red")
    shown = maker.tokenizer.decode(ids[1:given])
    assert "which" in shown and shown.rstrip().endswith("answer :")
    assert maker.tokenizer.decode(ids[given:-1]).strip() == "red" and ids[-1] == maker.tokenizer.end_id
    batch = next(open_loader(with_options(reading, task="ask"), LoaderState.beginning(1)))
    pairs = zip(batch.targets, batch.counted, strict=True)
    answers = {maker.tokenizer.decode(targets[counted].tolist()[:-1]).strip() for targets, counted in pairs}
    assert answers <= {"red", "green", "blue", "grey"}


def test_a_question_that_is_too_long_leaves_room_for_the_answer(reading: Reading) -> None:
    maker = ExampleMaker(with_options(reading, task="ask"))
    ids, given = maker.answer("which colour? " * 30, "grey")
    assert len(ids) == 24 and maker.tokenizer.decode(ids[given:-1]).strip() == "grey"
    assert maker.tokenizer.decode(ids[:given]).rstrip().endswith("answer :")


def test_padding_goes_no_further_than_needed(reading: Reading) -> None:
    """To a few lengths only; texts are padded whole where the dialect sees padding, as openMaMMUT's does."""
    long = dataclasses.replace(reading, context_length=77)
    batch = next(open_loader(long, LoaderState.beginning(1)))
    assert batch.ids.shape[1] in (16, 32) and batch.text_ids.shape[1] in (16, 32)
    assert int(batch.counted.sum(dim=1).max()) + 1 <= batch.ids.shape[1]
    whole = next(open_loader(dataclasses.replace(long, trim_texts=False), LoaderState.beginning(1)))
    assert whole.text_ids.shape[1] == 77
    assert torch.equal(whole.text_ids[:, : batch.text_ids.shape[1]], batch.text_ids)  # control: the same otherwise


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_going_on_gives_the_batches_that_would_have_come(reading: Reading, workers: int) -> None:
    own = with_options(reading, workers=workers)
    whole = list(itertools.islice(open_loader(own, LoaderState.beginning(own.workers)), 14))
    for stop in (1, 4, 13):
        state = LoaderState.beginning(own.workers)
        for batch in whole[:stop]:
            state = state.after(batch)
        rest = list(itertools.islice(open_loader(own, state), 14 - stop))
        for a, b in zip(rest, whole[stop:], strict=True):
            assert torch.equal(a.pixels, b.pixels) and torch.equal(a.ids, b.ids) and a.after == b.after


def test_processes_read_different_samples(reading: Reading) -> None:
    def seen(rank: int) -> set[int]:
        own = dataclasses.replace(reading, rank=rank, ranks=2)
        batches = itertools.islice(open_loader(own, LoaderState.beginning(1)), 6)  # an epoch of its half
        return {key for batch in batches for key in batch.keys.tolist()}

    assert len(seen(0)) == len(seen(1)) == 24 and not seen(0) & seen(1)


def test_another_number_of_workers_is_refused(reading: Reading) -> None:
    with pytest.raises(InputError, match="resume with as many"):
        open_loader(with_options(reading, workers=2), LoaderState.beginning(3))


def test_crops_are_of_the_resized_picture(reading: Reading, coloured_samples: Any) -> None:
    pair = Pair("x", coloured_samples(1)[0]["png"], ("a",))
    rng = np.random.default_rng(0)
    for mode in ("squash", "shortest"):
        rule = PreprocessRule(32, (0.5,) * 3, (0.5,) * 3, "bilinear", mode, 0)  # type: ignore[arg-type]
        out = picture(pair, 32, rule, reading.options, rng)
        assert out.shape == (32, 32, 3) and out[-1, -1].tolist() == [200, 40, 40]  # red, as RGB
    several = [picture(pair, 32, rule, reading.options, rng) for _ in range(8)]
    assert any(not np.array_equal(several[0], each) for each in several)
    still = dataclasses.replace(reading.options, margin=1.0)
    squashed = dataclasses.replace(rule, resize_mode="squash")
    assert np.array_equal(picture(pair, 32, squashed, still, rng), picture(pair, 32, squashed, still, rng))  # control


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "expected a caption"),
        ({"captions": 5}, "expected a list"),
        ({"caption": 5}, "to be texts"),
        ({"question": "x"}, "need"),
    ],
)
def test_rows_that_cannot_be_used_say_why(reading: Reading, row: dict[str, Any], message: str) -> None:
    from mammut.pair_loader import _Growing

    with pytest.raises(InputError, match=message):
        ExampleMaker(reading).add(_Growing(), Raw("a", b"", row, ""), np.random.default_rng(0))


def test_pixels_are_normalised_on_the_device(reading: Reading) -> None:
    batch = next(open_loader(reading, LoaderState.beginning(1)))
    on = batch.on(torch.device("cpu"), reading.rule)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (reading.rule.mean, reading.rule.std))
    assert torch.allclose((on.pixels * std + mean) * 255, batch.pixels.float(), atol=1e-3)
