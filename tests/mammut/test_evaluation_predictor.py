"""A checkpoint and its bundle give the same answers to every question a task asks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mammut.checkpoint import Checkpoint
from mammut.evaluation.checkpoint_predictor import CheckpointPredictor
from mammut.evaluation.predictor import BundlePredictor, CorruptedPredictor, PredictorOptions, open_predictor
from mammut.generate import greedy
from mammut_runtime.errors import BundleError, InputError, MammutError
from mammut_runtime.preprocess import Preprocessor

TESTS = Path(__file__).parents[1]
BUNDLE = TESTS / "data" / "tiny-bundle"
OPTIONS = PredictorOptions(batch_size=3, threads=1, max_tokens=10)
QUESTIONS = [["what is this?", "is it red?"], ["is it red?"], [], ["what is this?"], ["how many dogs?"]]


def _tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_bundle", TESTS / "make_tiny_bundle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    found: Checkpoint = _tiny().tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return found


@pytest.fixture(scope="module")
def both(checkpoint: Checkpoint) -> Iterator[tuple[CheckpointPredictor, BundlePredictor]]:
    first = CheckpointPredictor(checkpoint, OPTIONS)
    second = BundlePredictor(str(BUNDLE), ("pictures", "texts", "words"), OPTIONS)
    yield first, second
    first.close()
    second.close()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (30 + 7 * i, 50, 3), np.uint8) for i in range(5)]


def test_embeddings_are_equal(both: tuple[CheckpointPredictor, BundlePredictor], images: list[np.ndarray]) -> None:
    checkpoint, bundle = both
    np.testing.assert_allclose(checkpoint.embed_pictures(images), bundle.embed_pictures(images), atol=2e-5)
    texts = ["a red heart", "two dogs", "a photo of a small house", "sun"]
    np.testing.assert_allclose(checkpoint.embed_texts(texts), bundle.embed_texts(texts), atol=2e-5)
    assert checkpoint.templates == bundle.templates == ("a photo of a {}.", "a drawing of a {}.")


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_and_answers_are_equal(checkpoint: Checkpoint, images: list[np.ndarray], beams: int) -> None:
    options = PredictorOptions(batch_size=3, threads=1, max_tokens=10, beams=beams)
    first, second = CheckpointPredictor(checkpoint, options), BundlePredictor(str(BUNDLE), ("words",), options)
    assert first.caption(images) == second.caption(images)
    answers = first.answer(images, QUESTIONS)
    assert answers == second.answer(images, QUESTIONS)
    assert [len(each) for each in answers] == [2, 1, 0, 1, 1]
    assert len({text for each in answers for text in each}) > 1  # control: not all the same


def test_the_checkpoint_captions_as_the_slow_reference(checkpoint: Checkpoint, images: list[np.ndarray]) -> None:
    preprocess, tokenizer = Preprocessor(checkpoint.preprocess), checkpoint.tokenizer
    pixels = torch.from_numpy(np.stack([preprocess(image) for image in images]))
    ids = greedy(checkpoint.model, pixels, [tokenizer.start_id], tokenizer.end_id, 10)
    assert CheckpointPredictor(checkpoint, OPTIONS).caption(images) == [tokenizer.decode(each) for each in ids]


def test_the_form_of_questions_is_the_models_own(checkpoint: Checkpoint, images: list[np.ndarray]) -> None:
    predictor = BundlePredictor(str(BUNDLE), ("words",), OPTIONS)
    model = predictor._model
    expected = model.encode(images[0]).ask("is it red?", options=OPTIONS.caption()).text
    assert predictor.answer(images[:1], [["is it red?"]]) == [[expected]]


def test_a_corruption_reaches_pictures_and_not_texts(
    both: tuple[CheckpointPredictor, BundlePredictor], images: list[np.ndarray]
) -> None:
    inner, texts = both[1], dict[str, np.ndarray]()
    worse, same = (CorruptedPredictor(inner, "blur", severity, texts) for severity in (5, 0))
    np.testing.assert_array_equal(same.embed_pictures(images), inner.embed_pictures(images))
    assert np.abs(worse.embed_pictures(images) - inner.embed_pictures(images)).max() > 1e-3
    assert worse.embed_texts(["a dog"]) is same.embed_texts(["a dog"])


def test_open_predictor_knows_a_bundle_from_a_checkpoint(tmp_path: Path) -> None:
    bundle = open_predictor(str(BUNDLE), ("pictures",), OPTIONS)
    assert isinstance(bundle, BundlePredictor)
    assert bundle.facts["kind"] == "bundle" and bundle.name == "tiny-bundle (onnxruntime fp32)"
    with pytest.raises(MammutError, match="not-there"):
        open_predictor(str(tmp_path / "not-there"), ("pictures",), OPTIONS)


def test_a_bundle_without_the_tasks_graphs_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["mammut.evaluation.predictor"].GRAPHS, "words", ("memory", "narrator"))
    with pytest.raises(BundleError, match="has no narrator graph, which this task needs"):
        BundlePredictor(str(BUNDLE), ("pictures", "words"), OPTIONS)
    BundlePredictor(str(BUNDLE), ("pictures",), OPTIONS).close()  # control


def test_a_device_that_is_not_there_is_one_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="device moon"):
        CheckpointPredictor(checkpoint, PredictorOptions(device="moon"))


def test_a_prompt_that_fills_the_decoder_is_refused(checkpoint: Checkpoint, images: list[np.ndarray]) -> None:
    for predictor in (CheckpointPredictor(checkpoint, OPTIONS), BundlePredictor(str(BUNDLE), ("words",), OPTIONS)):
        with pytest.raises(InputError, match=r"question 'what what .*tokens, the decoder holds 24"):
            predictor.answer(images[:1], [["what " * 40]])


def test_bundles_are_judged_without_pytorch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "import mammut.evaluation.commands\n"
        "from mammut.evaluation.predictor import open_predictor\n"
        f"print(open_predictor({str(BUNDLE)!r}, ('pictures',)).embed_texts(['a dog']).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == "(1, 24)", done.stderr
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from mammut.evaluation.commands import cli\nfrom mammut_runtime import console\n"
        "sys.exit(console.run(cli, ['demo', '--task', 'vqa', '--images', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TESTS)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and "torch is not there to read it as a checkpoint" in done.stderr
