"""Texts: padding and length by the manifest, templates, the memory of known texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_runtime import text_tower
from mammut_runtime.errors import InputError


def text_calls(bundle: Any) -> list[tuple[int, ...]]:
    return [call["ids"].shape for call in bundle.engines["text"].calls[1:]]  # the first is the canary's


def test_rows_are_as_long_as_the_longest_of_their_batch(toy_bundle: Any) -> None:
    vectors = toy_bundle.model().embed_texts(["a cat", "bird"])
    assert vectors.shape == (2, 6) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert text_calls(toy_bundle) == [(2, 4)]  # start a cat end


def test_fixed_length_where_the_manifest_says_so(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "fixed", text_length=20)
    bundle.model().embed_texts(["a cat", "bird"])
    assert text_calls(bundle) == [(2, 20)]


def test_order_and_batches_do_not_matter(toy_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a red bird", "cat", "two dog photo of the cat", "dog", "cat", "a"]
    expected = np.concatenate([toy_bundle.model().embed_texts([text]) for text in texts])
    monkeypatch.setattr(text_tower, "BATCH", 2)
    np.testing.assert_allclose(toy_bundle.model().embed_texts(texts), expected, atol=1e-6)


def test_known_texts_are_not_computed_again(toy_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tower, "REMEMBERED", 2)
    model = toy_bundle.model()
    first = model.embed_texts(["cat", "dog"])
    np.testing.assert_array_equal(model.embed_texts(["dog", "cat"]), first[::-1])
    assert text_calls(toy_bundle) == [(2, 3)]
    model.embed_texts(["bird"])  # pushes the oldest out, "dog" is more recent than that
    model.embed_texts(["dog"] if list(model.text._known) == ["cat", "bird"] else ["cat"])
    assert len(text_calls(toy_bundle)) == 3 and len(model.text._known) == 2


def test_the_memory_cannot_be_changed_from_outside(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    model.embed_texts(["cat"])[:] = 7
    assert np.abs(model.embed_texts(["cat"])).max() <= 1


def test_too_long_texts_lose_their_tail_and_say_so(toy_bundle: Any) -> None:
    """24 positions: start, end and 22 words."""
    model = toy_bundle.model()
    long, fits = " ".join(["cat"] * 30), " ".join(["cat"] * 22)
    assert model.cut_tokens(long) == 8 and model.cut_tokens(fits) == 0
    np.testing.assert_array_equal(model.embed_texts([long]), model.embed_texts([fits]))
    assert text_calls(toy_bundle)[0] == (1, 24)
    assert model.text.notices([fits, long]) == (f"8 tokens cut from '{long[:40]}...', 24 fit",)


@pytest.mark.parametrize("texts", [[""], ["cat", "  \n"], ["&nbsp;"]])
def test_empty_texts(toy_bundle: Any, texts: list[str]) -> None:
    with pytest.raises(InputError, match="a text is empty"):
        toy_bundle.model().embed_texts(texts)


@pytest.mark.parametrize("texts", [[], "cat"])
def test_not_a_list_of_texts(toy_bundle: Any, texts: Any) -> None:
    with pytest.raises(InputError, match="expected a list of one or more texts, got"):
        toy_bundle.model().embed_texts(texts)


def test_classifier_is_the_mean_over_templates(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    assert model.templates == ("a photo of a {}.", "the {}")
    found = model.classifier(["cat", "dog"])
    mean = model.embed_texts(["a photo of a dog.", "the dog"]).mean(axis=0)
    np.testing.assert_allclose(found.embeddings[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert found.names == ("cat", "dog") and found.embeddings.shape == (2, 6) and found.notices == ()
    own = model.classifier(["cat"], ["red {}"])
    np.testing.assert_allclose(own.embeddings, model.embed_texts(["red cat"]), atol=1e-6)


def test_classifier_of_braces(toy_bundle: Any) -> None:
    """A class name may look like a template; it is filled in as it is."""
    model = toy_bundle.model()
    np.testing.assert_allclose(
        model.classifier(["{} {0}"], ["the {}"]).embeddings, model.embed_texts(["the {} {0}"]), atol=1e-6
    )


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], None, "one or more class names"),
        ("cat", None, "one or more class names, got 'cat'"),
        (["cat", " "], None, "a class name is empty"),
        (["cat"], [], "one or more templates"),
        (["cat"], "a {}", "one or more templates"),
        (["cat"], ["no place"], r"a template must hold \{\} once, for the name, got 'no place'"),
        (["cat"], ["{} and {}"], r"a template must hold \{\} once"),
    ],
)
def test_classifier_refuses(toy_bundle: Any, names: Any, templates: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy_bundle.model().classifier(names, templates)
