"""From stored samples to batches: what counts, how questions stand, and that batches come in one order."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mammut.data.augment import AugmentOptions
from mammut.data.pair_loader import ExampleMaker, LoaderState, Reading, open_loader, picture
from mammut.data.pairs import Pair
from mammut.data.shards import Raw, expand
from mammut.training.contrast import ABSENT, text_key
from mammut.training.run_config import Source
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule


@pytest.fixture
def reading(small_run: Any) -> Reading:
    config = small_run.config
    tokenizer = (small_run.folder / "tokenizer.json").read_bytes()
    return Reading(
        (expand(config.data.sources[0].files),),
        tokenizer,
        config.preprocess,
        config.prompts,
        24,
        True,
        config.data,
        4,
        32,
        0,
        0,
        1,
    )


def with_options(reading: Reading, **changes: Any) -> Reading:
    return dataclasses.replace(reading, options=dataclasses.replace(reading.options, **changes))


def test_captions_count_from_their_first_token_to_the_end_token(reading: Reading) -> None:
    batch = next(open_loader(reading, LoaderState.beginning(reading.options)))
    maker = ExampleMaker(reading)
    assert batch.pixels.shape == (4, 3, 32, 32) and batch.pixels.dtype == torch.uint8
    for ids, targets, counted, text in zip(batch.ids, batch.targets, batch.counted, batch.text_ids, strict=True):
        written = targets[counted].tolist()
        assert ids[0] == maker.tokenizer.start_id and written[-1] == maker.tokenizer.end_id
        assert maker.tokenizer.decode(written[:-1]).startswith("a ")
        assert text.tolist()[: len(written) + 1] == [ids[0], *written]
        assert set(targets[~counted].tolist()) <= {maker.tokenizer.pad_id}


def test_a_question_is_the_prefix_and_only_the_answer_counts(reading: Reading) -> None:
    maker = ExampleMaker(with_options(reading, question_share=1.0))
    ids, given = maker.answer("which colour?", "red")
    shown = maker.tokenizer.decode(ids[1:given])
    assert "which" in shown and shown.rstrip().endswith("answer :")
    assert maker.tokenizer.decode(ids[given:-1]).strip() == "red" and ids[-1] == maker.tokenizer.end_id
    batch = next(open_loader(with_options(reading, question_share=1.0), LoaderState.beginning(reading.options)))
    pairs = zip(batch.targets, batch.counted, strict=True)
    answers = {maker.tokenizer.decode(targets[counted].tolist()[:-1]).strip() for targets, counted in pairs}
    assert answers <= {"red", "green", "blue", "grey"}


def test_a_question_that_is_too_long_leaves_room_for_the_answer(reading: Reading) -> None:
    maker = ExampleMaker(with_options(reading, question_share=1.0))
    ids, given = maker.answer("which colour? " * 30, "grey")
    assert len(ids) == 24 and maker.tokenizer.decode(ids[given:-1]).strip() == "grey"
    assert maker.tokenizer.decode(ids[:given]).rstrip().endswith("answer :")


def test_padding_goes_no_further_than_needed(reading: Reading) -> None:
    """To a few lengths only; texts are padded whole where the dialect sees padding, as openMaMMUT's does."""
    long = dataclasses.replace(reading, context_length=77)
    batch = next(open_loader(long, LoaderState.beginning(reading.options)))
    assert batch.ids.shape[1] in (16, 32) and batch.text_ids.shape[1] in (16, 32)
    assert int(batch.counted.sum(dim=1).max()) + 1 <= batch.ids.shape[1]
    whole = next(open_loader(dataclasses.replace(long, trim_texts=False), LoaderState.beginning(reading.options)))
    assert whole.text_ids.shape[1] == 77
    assert torch.equal(whole.text_ids[:, : batch.text_ids.shape[1]], batch.text_ids)  # control: the same otherwise


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_going_on_gives_the_batches_that_would_have_come(reading: Reading, workers: int) -> None:
    own = with_options(reading, workers=workers)
    whole = list(itertools.islice(open_loader(own, LoaderState.beginning(own.options)), 14))
    for stop in (1, 4, 13):
        state = LoaderState.beginning(own.options)
        for batch in whole[:stop]:
            state = state.after(batch)
        rest = list(itertools.islice(open_loader(own, state), 14 - stop))
        for a, b in zip(rest, whole[stop:], strict=True):
            assert torch.equal(a.pixels, b.pixels) and torch.equal(a.ids, b.ids) and a.after == b.after


def test_processes_read_different_samples(reading: Reading) -> None:
    def seen(rank: int) -> set[int]:
        own = dataclasses.replace(reading, rank=rank, ranks=2)
        batches = itertools.islice(open_loader(own, LoaderState.beginning(reading.options)), 6)  # an epoch of its half
        return {key for batch in batches for key in batch.keys.tolist()}

    assert len(seen(0)) == len(seen(1)) == 24 and not seen(0) & seen(1)


def test_another_number_of_workers_is_refused(reading: Reading) -> None:
    with pytest.raises(InputError, match="resume with as many"):
        open_loader(with_options(reading, workers=2), LoaderState.beginning(with_options(reading, workers=3).options))


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
        ({"question": "x", "answer": "y"}, "no caption"),
        ({"caption": 5}, "to be texts"),
        ({"question": "x"}, "need"),
    ],
)
def test_rows_that_cannot_be_used_say_why(reading: Reading, row: dict[str, Any], message: str) -> None:
    from mammut.data.pair_loader import _Growing

    with pytest.raises(InputError, match=message):
        sample, source = Raw("a", b"", row, ""), Source((), "photo", 1.0)
        ExampleMaker(reading).add(_Growing(), sample, np.random.default_rng(0), source)


def test_questions_and_captions_mixed_and_equal_texts_once(
    reading: Reading, tmp_path: Path, write_tar: Any, coloured_samples: Any
) -> None:
    samples = coloured_samples(16)
    for index, sample in enumerate(samples):
        row = {"questions": [["which colour?", sample["json"]["answer"]]]}
        if index % 4:  # the fourth has no caption, so nothing to be matched with
            row |= {"captions": ["a thing"], "matches": [sample["json"]["answer"], "such a thing"]}
        sample["json"] = row
    write_tar(tmp_path / "a.tar", samples)
    own = dataclasses.replace(with_options(reading, question_share=0.5), sources=((str(tmp_path / "a.tar"),),),
                              batch_size=16)  # fmt: skip
    batch, maker = next(open_loader(own, LoaderState.beginning(own.options))), ExampleMaker(own)
    absent = batch.keys == ABSENT
    assert int(absent.sum()) == 4 and int((batch.text_keys == ABSENT).sum()) == 16 - len(batch.text_ids)
    assert len(batch.text_ids) == 3  # green, blue, grey: each once, for four pictures each
    assert set(batch.keys[~absent].tolist()) == set(batch.text_keys[:3].tolist())
    rows = zip(batch.targets, batch.counted, strict=True)
    written = [maker.tokenizer.decode(targets[counted].tolist()[:-1]).strip() for targets, counted in rows]
    captions = [text == "a thing" for text in written]
    assert 0 < sum(captions) < 12 and not any(c for c, none in zip(captions, absent.tolist(), strict=True) if none)


def test_each_kind_is_augmented_its_own_way(small_run: Any, tmp_path: Path, write_tar: Any) -> None:
    """Drawings get a background, which depends on where the sample stands only."""
    clear = np.zeros((20, 20, 4), np.uint8)
    row = {"caption": "nothing"}
    write_tar(tmp_path / "d.tar", [{"key": f"{i}", "png": cv2.imencode(".png", clear)[1].tobytes(), "json": row}
                                   for i in range(8)])  # fmt: skip
    files = (*small_run.config.data.sources, Source((str(tmp_path / "d.tar"),), "drawing", 1.0))
    options = dataclasses.replace(small_run.config.data, sources=files, augment=AugmentOptions(), margin=1.5)
    config = dataclasses.replace(small_run.config, data=options)
    own = Reading(
        tuple(expand(source.files) for source in files), (small_run.folder / "tokenizer.json").read_bytes(),
        config.preprocess, config.prompts, 24, True, options, 16, 32, 0, 0, 1,
    )  # fmt: skip
    first, again = (next(open_loader(own, LoaderState.beginning(options))) for _ in range(2))
    assert first.pixels.shape == (16, 3, 32, 32) and torch.equal(first.pixels, again.pixels)
    drawings = first.pixels[first.keys == text_key("nothing")].float()
    assert 3 <= len(drawings) <= 13 and float(drawings.mean(dim=(1, 2, 3)).std()) > 5  # not all black


@pytest.fixture
def drawings(tmp_path: Path, write_tar: Any) -> Path:
    """A tar of three things, each of one colour."""
    samples = []
    for number, name in enumerate(("owl", "red key", "bus")):
        pixels = np.full((20, 20, 4), 255, np.uint8)
        pixels[:, :, number] = 0
        samples.append({"key": name, "png": cv2.imencode(".png", pixels)[1].tobytes(), "json": {"caption": name}})
    write_tar(tmp_path / "drawings.tar", samples)
    return tmp_path / "drawings.tar"


def test_scenes_are_composed_anew_each_time(reading: Reading, drawings: Path) -> None:
    files = reading.options.sources[0].files
    source = Source(files, "scene", 1.0, question_share=0.0, drawings=(str(drawings),))
    own = with_options(reading, sources=(source,), augment=AugmentOptions(), question_share=1.0)  # the source's counts
    loader, maker = open_loader(own, LoaderState.beginning(own.options)), ExampleMaker(own)
    batches = list(itertools.islice(loader, 20))
    again = next(open_loader(own, LoaderState.beginning(own.options)))
    assert torch.equal(batches[0].pixels, again.pixels) and torch.equal(batches[0].ids, again.ids)
    captions = {
        maker.tokenizer.decode(targets[counted].tolist()[:-1])
        for batch in batches
        for targets, counted in zip(batch.targets, batch.counted, strict=True)
    }
    assert len(captions) > 10 and all("owl" in c or "key" in c or "bus" in c for c in captions)


def test_scenes_need_drawings_and_others_do_not(drawings: Path) -> None:
    with pytest.raises(InputError, match="expected tars of what is placed"):
        Source(("a.tar",), "scene", 1.0)
    with pytest.raises(InputError, match="expected none for kind 'photo'"):
        Source(("a.tar",), "photo", 1.0, drawings=(str(drawings),))


@pytest.mark.parametrize("mixing", ["batches", "samples"])
def test_a_batch_may_be_of_one_source(reading: Reading, small_run: Any, mixing: str) -> None:
    """Also where samples are damaged; and a loader that goes on in the middle gives the same batches."""
    shards = [str(path) for path in small_run.shards]
    sources = tuple(Source((path,), "photo", 1.0) for path in shards[:2])
    own = dataclasses.replace(
        with_options(reading, sources=sources, mixing=mixing), sources=tuple((path,) for path in shards[:2])
    )
    batches = list(itertools.islice(open_loader(own, LoaderState.beginning(own.options)), 30))
    numbers = [
        {int("".join(text.partition("number")[2].split())) // 12 for text in texts_of(own, batch)} for batch in batches
    ]
    assert all(len(each) == 1 for each in numbers) == (mixing == "batches")
    assert set().union(*numbers) == {0, 1}
    state = LoaderState.beginning(own.options)
    for batch in batches[:7]:
        state = state.after(batch)
    assert torch.equal(next(open_loader(own, state)).ids, batches[7].ids)


def texts_of(reading: Reading, batch: Any) -> list[str]:
    tokenizer = ExampleMaker(reading).tokenizer
    rows = zip(batch.targets, batch.counted, strict=True)
    return [tokenizer.decode(targets[counted].tolist()[:-1]) for targets, counted in rows]


def test_pixels_are_normalised_on_the_device(reading: Reading) -> None:
    batch = next(open_loader(reading, LoaderState.beginning(reading.options)))
    on = batch.on(torch.device("cpu"), reading.rule)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (reading.rule.mean, reading.rule.std))
    assert torch.allclose((on.pixels * std + mean) * 255, batch.pixels.float(), atol=1e-3)


_POOL = (
    "import cv2, numpy as np; cv2.setNumThreads(4); cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5)"
)
_THROUGH_US = f"""
{_POOL}
import os
from mammut.data.pair_loader import _without_opencv_threads
with _without_opencv_threads():
    child = os.fork()
if child == 0:
    cv2.GaussianBlur(np.zeros((500, 500, 3), np.uint8), (31, 31), 5)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 and cv2.getNumThreads() == 4
"""
_PLAIN = f"""
{_POOL}
import os
child = os.fork()
if child == 0:
    cv2.setNumThreads(1)
    os._exit(7)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_loading_processes_do_not_wait_for_threads_that_are_not_there() -> None:
    """The control is what the loading processes did before: it hangs where OpenCV has a thread pool of its own."""
    subprocess.run([sys.executable, "-c", _THROUGH_US], check=True, timeout=60)
    with subprocess.Popen([sys.executable, "-c", _PLAIN], start_new_session=True) as plain:
        try:
            plain.wait(timeout=4)
            pytest.skip("this build of OpenCV does not hang after a fork, so there is no control")
        except subprocess.TimeoutExpired:
            os.killpg(plain.pid, signal.SIGKILL)
