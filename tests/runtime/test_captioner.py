"""Captions and answers through a bundle: prompts, lengths, words, candidates, the public rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.errors import InputError
from mammut_runtime.generation_openmammut import OpenMammutOptions

GREEDY = CaptionOptions(beams=1)


def greedy_ids(bundle: Any, number: float, prompt: list[int], max_tokens: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < max_tokens:
        token = int(bundle.toy.logits([*prompt, *ids], number).argmax())
        if token == bundle.end_id:
            break
        ids.append(token)
    return ids


def number_of(seen: Any) -> float:
    return float(seen.tokens[0, 0])


def test_caption_begins_with_start_and_prompt(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(1))
    for prompt, ids in ((None, []), ("a photo of", model.tokenizer.encode("a photo of"))):
        caption = seen.caption(dataclasses.replace(GREEDY, prompt=prompt))
        assert list(caption.ids) == greedy_ids(toy_bundle, number_of(seen), [toy_bundle.start_id, *ids], 12)
        assert caption.text == model.tokenizer.decode(caption.ids)
        assert caption.notices == () and caption.score <= 0


def test_length_is_the_bundles_unless_given(toy_bundle: Any) -> None:
    """12 tokens by the manifest, 24 positions in all."""
    seen = toy_bundle.model().encode(toy_bundle.picture(2))
    endless = CaptionOptions(beams=1, min_tokens=99)
    assert len(seen.caption(endless).ids) == 12
    assert len(seen.caption(dataclasses.replace(endless, min_tokens=3, max_tokens=5)).ids) <= 5
    lowered = seen.caption(dataclasses.replace(endless, max_tokens=100))
    assert len(lowered.ids) == 12
    assert lowered.notices == ("max_tokens 100 lowered to 12: this bundle writes 12 and holds 24, the prompt takes 1",)
    crowded = seen.caption(CaptionOptions(beams=1, min_tokens=99, max_tokens=100, prompt=" ".join(["cat"] * 20)))
    assert len(crowded.ids) == 3 and "lowered to 3" in crowded.notices[0]


def test_prompts_that_cannot_be(toy_bundle: Any) -> None:
    seen = toy_bundle.model().encode(toy_bundle.picture(2))
    for empty in ("", "  ", "&nbsp;"):
        with pytest.raises(InputError, match="the prompt is empty; give words, or leave it out"):
            seen.caption(CaptionOptions(prompt=empty))
    full = CaptionOptions(prompt=" ".join(["cat"] * 25))
    with pytest.raises(InputError, match=r"the prompt has 26 tokens, the decoder holds 24 .* by 3 tokens or more"):
        seen.caption(full)
    with pytest.raises(InputError, match="the prompt has 26 tokens"):
        seen.caption_stream(full)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 50), st.sampled_from([{}, {"temperature": 3.0, "seed": 1}]))
def test_stream_joins_to_the_caption(toy_bundle: Any, picture: int, choice: dict[str, Any]) -> None:
    """The toy speaks in loose bytes, so many of its captions hold broken characters."""
    seen = toy_bundle.model().encode(toy_bundle.picture(picture))
    pieces = list(seen.caption_stream(CaptionOptions(**choice)))
    assert "".join(pieces) == seen.caption(CaptionOptions(**{"beams": 1} | choice)).text
    assert all(pieces)


def test_stream_waits_for_whole_characters(toy_bundle: Any) -> None:
    """The two bytes of é come as two tokens; no half of it is ever shown."""
    model = toy_bundle.model()
    ids = [*model.tokenizer.encode("red"), *model.tokenizer.encode("é"), *model.tokenizer.encode("cat")]
    assert len(ids) == 4
    assert list(model.captioner._pieces(iter(ids))) == ["red", " é", " cat"]
    assert list(model.captioner._pieces(iter(ids[:2]))) == ["red", " \ufffd"], "what stays broken is shown at the end"


def test_free_answer_uses_the_bundles_form(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(3))
    answer = seen.ask("a red {bird}?", options=GREEDY)
    prompt = [toy_bundle.start_id, *model.tokenizer.encode("question: a red {bird}? answer:")]
    assert list(answer.ids) == greedy_ids(toy_bundle, number_of(seen), prompt, min(12, 24 - len(prompt)))
    assert answer.question == "a red {bird}?" and answer.candidates == ()


def test_candidates_by_likelihood(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(3))
    texts = ["cat", "a red bird", "two"]
    answer = seen.ask("a?", candidates=texts)
    prompt = [toy_bundle.start_id, *model.tokenizer.encode("question: a? answer:")]
    expected = {}
    for text in texts:
        ids = [*model.tokenizer.encode(text), toy_bundle.end_id]
        expected[text] = sum(
            toy_bundle.toy.log_probabilities([*prompt, *ids[:i]], number_of(seen))[token] for i, token in enumerate(ids)
        )
    ranked = sorted(texts, key=lambda text: -expected[text])
    assert [each.text for each in answer.candidates] == ranked and answer.text == ranked[0]
    assert [each.log_likelihood for each in answer.candidates] == pytest.approx([expected[t] for t in ranked], abs=1e-3)
    assert sum(each.probability for each in answer.candidates) == pytest.approx(1)
    assert answer.log_probability == pytest.approx(expected[ranked[0]], abs=1e-3) and answer.finished
    assert answer.score == pytest.approx(answer.log_probability / (len(answer.ids) + 1))
    means = seen.ask("a?", candidates=texts, normalise=True)
    by_mean = sorted(texts, key=lambda text: -expected[text] / (len(model.tokenizer.encode(text)) + 1))
    assert [each.text for each in means.candidates] == by_mean


@pytest.mark.parametrize(
    ("question", "more", "message"),
    [
        ("", {}, "the question is empty: ''; ask something"),
        (" ", {"candidates": ["cat"]}, "the question is empty"),
        ("a?", {"candidates": []}, "one or more candidates"),
        ("a?", {"candidates": "cat"}, "one or more candidates, got 'cat'"),
        ("a?", {"candidates": ["cat", " "]}, "a candidate is empty: ' '; give words"),
        ("a?", {"candidates": ["cat", "dog", "cat"]}, "a candidate is given twice"),
        ("a?", {"candidates": ["cat " * 30]}, "has 30 tokens, with the question 17 fit"),
        ("cat " * 30, {}, "the prompt has .* tokens, the decoder holds 24"),
        ("a?", {"options": CaptionOptions(prompt="cat")}, "a question brings its own prompt"),
        ("a?", {"candidates": ["cat"], "options": GREEDY}, "leave them out when candidates are given"),
    ],
)
def test_questions_that_cannot_be(toy_bundle: Any, question: str, more: dict[str, Any], message: str) -> None:
    seen = toy_bundle.model().encode(toy_bundle.picture(3))
    with pytest.raises(InputError, match=message):
        seen.ask(question, **more)


# ---- the public rules over a bundle ----


def test_openmammut_greedy(toy_bundle: Any) -> None:
    """With no forced end in the way, it says what our greedy says, and keeps start and end."""
    model = toy_bundle.model()
    pictures = [model.encode(toy_bundle.picture(seed)) for seed in range(4)]
    options = OpenMammutOptions(generation_type="top_k", seq_len=13, min_seq_len=0, pad_token_id=9999)
    rows = model.generate_openmammut(pictures, options)
    for row, seen in zip(rows.tolist(), pictures, strict=True):
        expected = greedy_ids(toy_bundle, number_of(seen), [toy_bundle.start_id], 11)
        assert row[: len(expected) + 2] == [toy_bundle.start_id, *expected, toy_bundle.end_id]


def test_openmammut_beams_of_a_batch_equal_one_by_one(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    pictures = [model.encode(toy_bundle.picture(seed)) for seed in range(3)]
    options = OpenMammutOptions(seq_len=10, min_seq_len=2, fixed_output_length=True)
    together = model.generate_openmammut(pictures, options)
    for row, seen in zip(together, pictures, strict=True):
        assert row.tolist() == model.generate_openmammut([seen], options)[0].tolist()
    caption = pictures[0].caption(options)
    assert list(caption.ids) == [each for each in together[0, 1:].tolist() if each not in (toy_bundle.end_id, 0)]
    assert caption.text == model.tokenizer.decode(caption.ids) and caption.log_probability < 0


def test_openmammut_text_and_context(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(1))
    text = np.array([[toy_bundle.start_id, 5, 6]])
    greedy = OpenMammutOptions(generation_type="top_k", seq_len=8, min_seq_len=0)
    assert model.generate_openmammut([seen], greedy, text)[0, :3].tolist() == text[0].tolist()
    with pytest.raises(InputError, match="25 ids do not fit a decoder of 24; lower seq_len"):
        model.generate_openmammut([seen], OpenMammutOptions(seq_len=40, min_seq_len=39))
