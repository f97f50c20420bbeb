from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_calibration.behaviour import MIN_HELD_OUT, Behaviour, observe
from mammut_calibration.data import Dataset, Question, open_dataset
from mammut_calibration.drift import MEASURES, Drift, DriftLimits, compare, measure_drift
from mammut_calibration.feeds import record_feeds
from mammut_runtime.bundle import Bundle
from mammut_runtime.detection.boxes import Box, Detection
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.errors import InputError

ENGINE = EngineOptions(threads=1)


@pytest.fixture(scope="module")
def held_out(data: Dataset) -> Dataset:
    return data.first(10)


@pytest.fixture(scope="module")
def reference(tiny: Bundle, held_out: Dataset) -> Behaviour:
    return observe(tiny, held_out, max_tokens=6, options=ENGINE)


def test_a_bundle_does_not_drift_from_itself(tiny: Bundle, held_out: Dataset, reference: Behaviour) -> None:
    drift = compare(reference, observe(tiny, held_out, reference=reference, options=ENGINE))
    of_pictures = [
        name for name in MEASURES if not name.startswith(("clip_", "detection_"))
    ]  # there are no such graphs
    assert drift.measures == {name: pytest.approx(1.0, abs=1e-6) for name in of_pictures}
    assert drift.clips == 0
    assert drift.failures() == ()
    assert (drift.pictures, drift.texts, drift.questions) == (10, 10, 10)
    assert drift.tokens == sum(map(len, reference.captions)) and all(pair.same for pair in drift.captions)
    json.dumps(drift.to_dict(), allow_nan=False)


def test_a_quantized_bundle_drifts_a_little_and_a_broken_one_fails(
    make: Any, tiny: Bundle, quantized: Any, held_out: Dataset, reference: Behaviour
) -> None:
    good = compare(reference, observe(quantized("vision"), held_out, reference=reference, options=ENGINE))
    assert good.embedding_cosine_mean is not None and 0.99 < good.embedding_cosine_mean < 0.9999999
    assert good.text_cosine_mean == pytest.approx(1.0, abs=1e-6)  # that graph is the same
    assert not [each for each in good.failures() if "cosine" in each.measure]
    broken_bundle = quantized("vision", make.scaled("vision.blocks.1.mlp.down.weight", 4))
    broken = measure_drift(tiny, broken_bundle, held_out, options=ENGINE)
    failures = {each.measure: each for each in broken.failures()}
    assert {"embedding_cosine_mean", "embedding_cosine_min"} <= failures.keys()
    worst = failures["embedding_cosine_min"]
    assert worst.where in reference.pictures
    assert str(worst).startswith(f"embedding_cosine_min is {worst.measured:.4f}, expected at least 0.9700 (worst: ")


def test_agreement_is_counted_by_hand(reference: Behaviour) -> None:
    """Three captions: one the same, one with its second token of three other, one that ends early."""
    pictures = ("a", "b", "c")
    ends = dict(
        pictures=pictures, questions=((), (), ()), caption_texts=pictures, embeddings=np.eye(3, dtype=np.float32)
    )
    texts = dict(texts=("x", "y"), text_embeddings=np.eye(2, 3, dtype=np.float32))
    one = dataclasses.replace(
        reference, **ends, **texts, captions=((1, 2, 9), (1, 2, 9), (1, 2, 9)), forced=((), (), ()),
        answers=(("yes", "no"), ("red",), ()),
    )  # fmt: skip
    other = dataclasses.replace(
        one, captions=((1, 2, 9), (1, 3, 9), (1, 9)), forced=((1, 2, 9), (1, 3, 9), (1, 9, 9)),
        answers=(("yes", "yes"), ("red",), ()),
        embeddings=np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0]], np.float32),
    )  # fmt: skip
    drift = compare(one, other)
    assert drift.token_agreement == pytest.approx((3 + 2 + 1) / 9)
    assert drift.forced_token_agreement == pytest.approx((3 + 2 + 2) / 9)
    assert drift.caption_agreement == pytest.approx(1 / 3)
    assert drift.answer_agreement == pytest.approx(2 / 3)
    assert drift.embedding_cosine_mean == pytest.approx((1 + 0.8 + 0) / 3)
    assert drift.retrieval_agreement == 1.0  # a: x, b: y as before; to c both fitted equally well
    assert drift.where["embedding_cosine_min"] == "c" and drift.where["token_agreement"] == "c"
    assert [pair.picture for pair in drift.captions] == ["b", "c", "a"]


def test_detections_agree_where_both_find_a_thing(reference: Behaviour) -> None:
    """Of six that count, five have a counterpart: what is just below the threshold in one was found by it too."""

    def thing(name: str, score: float, x: float) -> Detection:
        return Detection(name, score, Box(x, 0, x + 10, 10))

    empty: tuple[tuple[Detection, ...], ...] = ((),) * (len(reference.pictures) - 2)
    before = ((thing("cat", 0.9, 0), thing("dog", 0.31, 50)), (thing("cat", 0.5, 0), thing("cat", 0.25, 60)))
    after = ((thing("cat", 0.8, 3), thing("dog", 0.29, 50)), (thing("dog", 0.5, 0), thing("cat", 0.4, 1)))
    one = dataclasses.replace(reference, detections=(*before, *empty), detection_threshold=0.3)
    other = dataclasses.replace(one, detections=(*after, *empty))
    assert compare(one, other).detection_agreement == pytest.approx(5 / 6)
    assert compare(one, one).detection_agreement == 1.0
    moved = dataclasses.replace(one, detections=((thing("cat", 0.9, 4),), (), *empty))  # overlap 6 of 14
    assert compare(dataclasses.replace(moved, detections=(before[0][:1], (), *empty)), moved).detection_agreement == 0.0
    nothing = dataclasses.replace(one, detections=((),) * len(reference.pictures))
    assert compare(nothing, nothing).detection_agreement is None
    failures = compare(one, other).failures(DriftLimits(detection_agreement=0.9))
    assert [str(each).split(" is ")[0] for each in failures] == ["detection_agreement"]


def test_a_candidate_is_led_through_the_references_caption(
    tiny: Bundle, held_out: Dataset, reference: Behaviour
) -> None:
    """Checked against the decoder run on each whole beginning, without a cache."""
    wanted = tuple((7, 300, 301, 5 + index, 2) for index in range(10))  # not what the model would say
    strange = dataclasses.replace(reference, captions=wanted)
    found = observe(tiny, held_out, reference=strange, options=ENGINE)
    rule, tokens = tiny.manifest.text, record_feeds(tiny, held_out, 10, threads=1)["memory"]
    memory = open_engine(tiny.graph_path("memory"), "onnxruntime", ENGINE)
    decoder = open_engine(tiny.graph_path("decoder"), "onnxruntime", ENGINE)
    model = tiny.manifest.model
    shape = (1, 1, model.heads, 0, model.text_width // model.heads)
    past = {f"past_{kind}.{layer}": np.zeros(shape, np.float32) for layer in range(model.text_layers) for kind in "kv"}
    for feed, ids, forced in zip(tokens, wanted, found.forced, strict=True):
        cross = memory.run(feed)
        for place, token in enumerate(forced):
            begin = np.array([[[rule.start_id, *ids[:place]]]], np.int64)
            assert decoder.run({"ids": begin, **past, **cross})["logits"][0, 0].argmax() == token
    assert found.forced != wanted


def test_texts_that_fit_equally_well_may_swap_and_others_may_not(reference: Behaviour) -> None:
    def with_texts(first: float, second: float) -> Behaviour:
        """One picture, two texts with these cosines."""
        vectors = [[cosine, np.sqrt(1 - cosine**2)] for cosine in (first, second)]
        alike = dict(pictures=("a",), texts=("x", "y"), questions=((),), captions=(), forced=(), caption_texts=())
        return dataclasses.replace(
            reference, **alike, answers=(), logit_scale=100.0,
            embeddings=np.array([[1, 0]], np.float32), text_embeddings=np.array(vectors, np.float32),
        )  # fmt: skip

    swapped = with_texts(0.5, 0.6)
    assert compare(with_texts(0.5004, 0.5), swapped).retrieval_agreement == 1.0  # e ** 0.04: 4 % apart
    assert compare(with_texts(0.5006, 0.5), swapped).retrieval_agreement == 0.0
    assert compare(with_texts(0.5, 0.5006), swapped).retrieval_agreement == 1.0


def test_numbers_that_are_none_fail(reference: Behaviour) -> None:
    lost = dataclasses.replace(reference, embeddings=np.full_like(reference.embeddings, np.nan))
    assert {each.measure for each in compare(reference, lost).failures()} >= {
        "embedding_cosine_mean",
        "embedding_cosine_min",
    }
    drift = compare(reference, reference)
    unmeasured = dataclasses.replace(drift, text_cosine_mean=float("nan"))
    assert [each.measure for each in unmeasured.failures()] == ["text_cosine_mean"]


def test_limits_are_checked_and_decide(reference: Behaviour) -> None:
    drift: Drift = dataclasses.replace(compare(reference, reference), token_agreement=0.5)
    assert [each.measure for each in drift.failures()] == ["token_agreement"]
    assert drift.failures(DriftLimits(token_agreement=0.5)) == ()
    assert set(DriftLimits().to_dict()) == set(MEASURES)
    with pytest.raises(InputError, match="token_agreement: expected a limit from -1 to 1, got 98"):
        DriftLimits(token_agreement=98)


def test_questions_are_the_given_ones_the_datas_or_ours(
    make: Any, tiny: Bundle, held_out: Dataset, reference: Behaviour, tmp_path: Path
) -> None:
    # this model has room for few tokens: ours do not fit, and are named
    assert {question.text for each in reference.questions for question in each} == {"what?"}
    assert len(reference.unasked) == 6 and "'what colour is it?': the prompt has" in "".join(reference.unasked)
    given = (Question("a?", None, ("yes", "no")), Question("b?"), Question("why " * 400))
    mine = observe(tiny, held_out, questions=given, max_tokens=6, options=ENGINE)
    assert {question.text for each in mine.questions for question in each} == {"a?", "b?"}
    with pytest.raises(InputError, match="none of the questions could be asked: the prompt has"):
        observe(tiny, held_out, questions=given[2:], options=ENGINE)
    make.folder(tmp_path, MIN_HELD_OUT, captions=False)
    for index in range(MIN_HELD_OUT):
        row = {"question": "c?", "answer": ["one", "two"][index % 2], "label": f"thing {index}"}
        (tmp_path / f"p{index:02d}.json").write_text(json.dumps(row))
    of_data = observe(tiny, open_dataset([tmp_path]), max_tokens=6, options=ENGINE)
    assert of_data.questions[1] == (Question("c?", "two", ("one", "two")),)
    assert "a photo of a thing 3." in of_data.texts


def test_what_cannot_be_compared_is_refused(
    tiny: Bundle, data: Dataset, held_out: Dataset, reference: Behaviour
) -> None:
    with pytest.raises(InputError, match="7 usable pictures of 7 to judge with, expected at least 8"):
        observe(tiny, data.first(7), options=ENGINE)
    with pytest.raises(InputError, match="observed on other data"):
        observe(tiny, data.first(9), reference=reference, options=ENGINE)
    with pytest.raises(InputError, match="not observed alike"):
        compare(reference, observe(tiny, data.first(9), max_tokens=6, options=ENGINE))
    with pytest.raises(InputError, match="has no 'detector' graph, the reference has"):
        observe(tiny, held_out, reference=dataclasses.replace(reference, graphs=("detector",)), options=ENGINE)


def test_recorded_feeds_are_real_runs_of_every_graph(tiny: Bundle, data: Dataset) -> None:
    feeds = record_feeds(tiny, data, 2, threads=1)
    assert {name: len(each) for name, each in feeds.items()} == {"vision": 2, "text": 2, "memory": 2, "decoder": 4}
    prompt, step = feeds["decoder"][:2]
    assert prompt["past_k.0"].shape[3] == 0 < step["past_k.0"].shape[3]
    with pytest.raises(InputError, match="no usable picture"):
        record_feeds(tiny, data, 0, threads=1)
