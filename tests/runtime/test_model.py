"""The front door: encode once, ask often; matches; threads; the canary; what is missing says so."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime.bundle import write_manifest
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.errors import BundleError, EngineError, InputError, VerificationError
from mammut_runtime.model import Model
from mammut_runtime.pictures import read_picture

GREEDY = CaptionOptions(beams=1)


# ---- encoding ----


def test_all_forms_of_a_picture(toy_bundle: Any, tmp_path: Path) -> None:
    """RGB and BGR arrays, a file, its bytes, a Picture: the same embedding."""
    model, pixels = toy_bundle.model(), toy_bundle.picture(1)
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), pixels[:, :, ::-1])
    expected = model.encode(pixels).embedding
    for image in (path, str(path), path.read_bytes(), read_picture(path)):
        np.testing.assert_array_equal(model.encode(image).embedding, expected)
    np.testing.assert_array_equal(model.encode(pixels[:, :, ::-1], color="bgr").embedding, expected)
    assert not np.allclose(model.encode(pixels[:, :, ::-1]).embedding, expected), "control: the order matters"


def test_batches_equal_one_by_one(toy_bundle: Any) -> None:
    model, pictures = toy_bundle.model(), [toy_bundle.picture(seed) for seed in range(5)]
    together = model.encode_batch(pictures, batch_size=2)
    assert [call["pixels"].shape[0] for call in toy_bundle.engines["vision"].calls] == [1, 2, 2, 1]
    for seen, picture in zip(together, pictures, strict=True):
        np.testing.assert_allclose(seen.embedding, model.encode(picture).embedding, atol=1e-6)
    assert model.encode_batch([]) == []
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        model.encode_batch(pictures, batch_size=0)


@pytest.mark.parametrize(
    "image", [b"", b"no picture", "no/such/file.png", np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
)
def test_pictures_that_are_none(toy_bundle: Any, image: Any) -> None:
    with pytest.raises(InputError):
        toy_bundle.model().encode(image)


# ---- laziness and memory ----


def test_graphs_are_opened_when_needed(toy_bundle: Any) -> None:
    toy_bundle.opened.clear()
    model = toy_bundle.model()
    assert toy_bundle.opened == []
    seen = model.encode(toy_bundle.picture(1))
    assert toy_bundle.opened == ["vision"]
    seen.match(["cat"])
    assert toy_bundle.opened == ["vision", "text"], "matching needs no decoder"
    seen.caption(GREEDY)
    assert toy_bundle.opened == ["vision", "text", "memory", "decoder"]


def test_a_picture_is_looked_at_once(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    calls = toy_bundle.engines["memory"].calls
    calls.clear()
    seen = model.encode(toy_bundle.picture(1))
    seen.caption(GREEDY)
    seen.ask("a?", ["cat", "dog"])
    list(seen.caption_stream())
    model.caption_batch([seen, seen])
    assert len(calls) == 1


def test_caption_batch_equals_one_by_one(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    pictures = [toy_bundle.picture(seed) for seed in range(11)]
    for options in (None, GREEDY, CaptionOptions(temperature=2.0, seed=4)):
        together = model.caption_batch(model.encode_batch(pictures), options)
        for caption, picture in zip(together, pictures, strict=True):
            alone = model.encode(picture).caption(options)
            assert (caption.text, caption.ids, caption.finished) == (alone.text, alone.ids, alone.finished)
            assert caption.log_probability == pytest.approx(alone.log_probability, abs=1e-4)
    sizes = [call["ids"].shape[0] for call in toy_bundle.engines["decoder"].calls if call["past_k.0"].shape[3] == 0]
    assert {8, 3} <= set(sizes) and max(sizes) == 8, "eleven pictures go in two batches"
    assert model.caption_batch([]) == []


def test_a_picture_of_another_model_is_refused(toy_bundle: Any) -> None:
    one, other = toy_bundle.model(), toy_bundle.model()
    with pytest.raises(InputError, match="seen by another model; encode it with this one"):
        one.caption_batch([other.encode(toy_bundle.picture(1))])


def test_kept_tokens_can_be_seen_again(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(1))
    again = model.see(seen.tokens, seen.embedding)
    assert again.caption(GREEDY) == seen.caption(GREEDY)
    with pytest.raises(InputError, match=r"expected tokens \[3, 5\] and an embedding \[6\], got \[2, 5\] and \[6\]"):
        model.see(seen.tokens[:2], seen.embedding)


# ---- matching ----


def test_match_softmax_in_closed_form(toy_bundle: Any) -> None:
    """logit_scale 10, over texts and negatives together."""
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(1))
    texts, negatives = ["cat", "a red bird"], ["dog"]
    cosines = model.embed_texts(texts + negatives) @ seen.embedding
    expected = np.exp(10 * cosines) / np.exp(10 * cosines).sum()
    found = seen.match(texts, negatives)
    by_text = {each.text: each for each in (*found.matches, *found.negatives)}
    for text, cosine, probability in zip(texts + negatives, cosines, expected, strict=True):
        assert by_text[text].cosine == pytest.approx(cosine, abs=1e-6)
        assert by_text[text].probability == pytest.approx(probability, abs=1e-5)
    assert [each.text for each in found.negatives] == negatives
    assert found.matches[0].cosine >= found.matches[1].cosine


def test_match_sigmoid_in_closed_form(make_bundle: Any, tmp_path: Path) -> None:
    """logit_scale 10, logit_bias -2, each text on its own."""
    bundle = make_bundle(tmp_path / "sigmoid", similarity="sigmoid")
    model = bundle.model()
    seen = model.encode(bundle.picture(1))
    cosines = model.embed_texts(["cat", "dog"]) @ seen.embedding
    found = {each.text: each.probability for each in seen.match(["cat"], ["dog"]).matches}
    assert found == pytest.approx({"cat": 1 / (1 + np.exp(2 - 10 * cosines[0]))}, abs=1e-5)


def test_a_negative_that_fits_better_wins(toy_bundle: Any) -> None:
    seen = toy_bundle.model().encode(toy_bundle.picture(1))
    ranked = seen.match(["cat", "dog", "bird", "red"]).matches
    best, worst = ranked[0].text, ranked[-1].text
    assert seen.match([worst], negatives=[best]).best is None
    assert seen.match([best], negatives=[worst]).best is not None
    assert seen.match([worst]).best is not None


def test_classes_by_template_and_classifier(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(1))
    by_template = seen.match(["cat", "dog"], templates=model.templates)
    by_classifier = seen.match(model.classifier(["cat", "dog"]))
    assert [m.text for m in by_template.matches] == [m.text for m in by_classifier.matches]
    assert by_template.matches[0].cosine == pytest.approx(by_classifier.matches[0].cosine)
    assert by_template.matches[0].cosine != pytest.approx(seen.match(["cat", "dog"]).matches[0].cosine, abs=1e-3)
    with pytest.raises(InputError, match="a classifier has its templates inside"):
        seen.match(model.classifier(["cat"]), templates=["the {}"])


def test_match_says_what_was_cut(toy_bundle: Any) -> None:
    seen = toy_bundle.model().encode(toy_bundle.picture(1))
    long = "cat " * 30
    assert seen.match(["cat"]).notices == ()
    assert "8 tokens cut" in seen.match(["cat"], negatives=[long]).notices[0]
    assert "tokens cut" in seen.match([long], templates=["the {}"]).notices[0]


@pytest.mark.parametrize("texts", [[], [""], "cat"])
def test_match_refuses(toy_bundle: Any, texts: Any) -> None:
    with pytest.raises(InputError):
        toy_bundle.model().encode(toy_bundle.picture(1)).match(texts)


def test_results_are_plain(toy_bundle: Any) -> None:
    """Everything a program prints as JSON."""
    seen = toy_bundle.model().encode(toy_bundle.picture(1))
    for result in (seen.caption(), seen.ask("a?"), seen.ask("a?", ["cat", "dog"]), seen.match(["cat"], ["dog"])):
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert set(plain) >= {field.name for field in dataclasses.fields(result)}
    assert plain["matches"][0]["text"] == "cat" and "best" in plain


# ---- canary, threads, closing, bundles without a graph ----


def test_canary(toy_bundle: Any) -> None:
    result = toy_bundle.model().replay_canary()
    assert result.ok and result.worst_error < 1e-6


@pytest.mark.parametrize("part", ["embedding", "text_embedding", "caption_ids"])
def test_canary_that_differs(toy_bundle: Any, part: str) -> None:
    canary = toy_bundle.manifest.canary
    wrong = (5,) if part == "caption_ids" else tuple(-each for each in getattr(canary, part))
    changed = dataclasses.replace(toy_bundle.manifest, canary=dataclasses.replace(canary, **{part: wrong}))
    write_manifest(toy_bundle.folder, changed)
    with pytest.raises(VerificationError, match=f"canary differs: {part.split('_ids')[0]}"):
        toy_bundle.model().replay_canary()


def test_threads_share_a_model(toy_bundle: Any) -> None:
    model = toy_bundle.model()
    pictures = [toy_bundle.picture(seed) for seed in range(6)]
    expected = [model.encode(each).caption(GREEDY).ids for each in pictures]
    shared, wrong = model.encode(pictures[0]), list[Any]()
    fresh = toy_bundle.model()

    def work(number: int) -> None:
        for seed in range(6):
            try:
                picture = (seed + number) % 6
                if fresh.encode(pictures[picture]).caption(GREEDY).ids != expected[picture]:
                    wrong.append(picture)
                if shared.caption(GREEDY).ids != expected[0]:
                    wrong.append("shared")
                fresh.embed_texts(["cat", f"{'dog ' * seed} red"])
            except Exception as problem:
                wrong.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closed(toy_bundle: Any) -> None:
    with toy_bundle.model() as model:
        seen = model.encode(toy_bundle.picture(1))
    assert seen.embedding.shape == (6,)
    for use in (lambda: model.encode(toy_bundle.picture(1)), seen.caption, lambda: seen.match(["cat"])):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_bundle_without_captions(toy_bundle: Any) -> None:
    manifest = toy_bundle.manifest
    graphs = {name: manifest.graphs[name] for name in ("vision", "text")}
    files = {name: info for name, info in manifest.files.items() if name not in ("memory.onnx", "decoder.onnx")}
    canary = dataclasses.replace(manifest.canary, caption_ids=())
    for name in ("memory.onnx", "decoder.onnx"):
        (toy_bundle.folder / name).unlink()
    write_manifest(toy_bundle.folder, dataclasses.replace(manifest, graphs=graphs, files=files, canary=canary))
    model = toy_bundle.model()
    seen = model.encode(toy_bundle.picture(1))
    assert seen.match(["cat"]).best
    assert model.replay_canary().ok
    for use in (seen.caption, lambda: seen.ask("a?"), lambda: seen.ask("a?", ["cat"]), seen.caption_stream):
        with pytest.raises(BundleError, match="no 'memory' graph, which captions need; it has vision, text"):
            use()


def test_load_refuses_what_is_no_bundle(toy_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Model.load(tmp_path / "nothing")
    (toy_bundle.folder / "weights.bin").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"weights\.bin: sha256"):
        Model.load(toy_bundle.folder)
    Model.load(toy_bundle.folder, verify=False)
