"""What users do with a bundle of the real exporter, through Python and through mammut-run, on every engine.

The expected results are those of ONNX Runtime with the same graphs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime import commands, commands_inputs
from mammut_runtime.canary import canary_picture
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import EngineError
from mammut_runtime.generation_openmammut import OpenMammutOptions
from mammut_runtime.model import Model

ONE = EngineOptions(threads=1)
GREEDY = CaptionOptions(beams=1)
TEXTS = ["a red car", "two dogs on a beach", "a"]
PICTURES = [canary_picture(seed, (48, 64)) for seed in range(3)]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Iterator[Model]:
    with Model.load(tiny_bundle, ONE) as model:
        yield model


@pytest.fixture(scope="module")
def reference(bundle_for: Callable[[str], Path]) -> Iterator[Model]:
    with Model.load(bundle_for("onnxruntime"), ONE) as model:
        yield model


# ---- through Python ----


def test_reproduces_its_canary(tiny: Model) -> None:
    assert tiny.replay_canary().ok


def test_embeddings_captions_and_answers_are_those_of_onnx_runtime(tiny: Model, reference: Model) -> None:
    """Embeddings to float32 rounding, captions to the token, with beams and for several pictures at once."""
    seen, expected = tiny.encode_batch(PICTURES), reference.encode_batch(PICTURES)
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)
    np.testing.assert_allclose(tiny.embed_texts(TEXTS), reference.embed_texts(TEXTS), atol=1e-5)
    for beams in (1, 3):
        options = CaptionOptions(beams=beams, max_tokens=6)
        ours, theirs = tiny.caption_batch(seen, options), reference.caption_batch(expected, options)
        assert [each.ids for each in ours] == [each.ids for each in theirs]
        assert [each.score for each in ours] == pytest.approx([each.score for each in theirs], abs=1e-4)
    answers = [each.ask("what is it?", ["a car", "a dog"]) for each in (seen[0], expected[0])]
    assert answers[0].text == answers[1].text
    assert answers[0].log_probability == pytest.approx(answers[1].log_probability, abs=1e-4)


def test_all_tasks(tiny: Model) -> None:
    seen = tiny.encode(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    assert np.linalg.norm(seen.embedding) == pytest.approx(1, abs=1e-5)
    assert "".join(seen.caption_stream()) == seen.caption(GREEDY).text
    sampled = CaptionOptions(temperature=1.0, seed=5)
    assert seen.caption(sampled).ids == seen.caption(sampled).ids
    assert seen.ask("a", ["b", "c"]).text in ("b", "c") and isinstance(seen.ask("a").text, str)
    assert len(seen.match(["a cat", "a dog"], ["nothing"]).matches) == 2
    assert len(seen.match(tiny.classifier(["cat", "dog"])).matches) == 2


def test_cached_equals_uncached(tiny: Model) -> None:
    """The decoder graph fed step by step, with beams, against the whole prefix at once."""
    pictures = tiny.encode_batch(list(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)))
    ids = np.random.default_rng(2).integers(0, tiny.manifest.model.vocab_size, (3, 2, 6))
    memories = tiny._memories(pictures)
    stepwise, whole = tiny.captioner._decoder(memories), tiny.captioner._decoder(memories)
    start = ids[:, :1, :1].copy()
    ids[:, :, 0] = start[:, :, 0]
    stepwise.feed(start)
    stepwise.select(np.zeros((3, 2), np.int64))
    for position in range(1, 6):
        logits = stepwise.feed(ids[:, :, position : position + 1])
    whole.select(np.zeros((3, 2), np.int64))
    np.testing.assert_allclose(logits, whole.feed(ids), atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_batch_equals_one_by_one(tiny: Model, beams: int) -> None:
    pictures = tiny.encode_batch(list(np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)))
    options = CaptionOptions(beams=beams)
    for together, seen in zip(tiny.caption_batch(pictures, options), pictures, strict=True):
        assert together.ids == seen.caption(options).ids


@pytest.mark.parametrize("generation_type", ["beam_search", "top_k"])
def test_the_public_rules(tiny: Model, reference: Model, generation_type: Any) -> None:
    """They begin with several sequences for each picture on an empty cache, which was made for one."""
    options = OpenMammutOptions(generation_type=generation_type, seq_len=8, max_seq_len=12, min_seq_len=2, top_k=1)
    ours = tiny.generate_openmammut(tiny.encode_batch(PICTURES), options)
    assert ours.tolist() == reference.generate_openmammut(reference.encode_batch(PICTURES), options).tolist()


def test_threads_share_a_model(tiny: Model) -> None:
    expected = [tiny.encode(each).caption().ids for each in PICTURES]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        found[index] = tiny.encode(PICTURES[index % 3]).caption().ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: expected[index % 3] for index in range(6)}


def test_what_was_seen_outlives_its_model(tiny_bundle: Path) -> None:
    with Model.load(tiny_bundle, ONE) as model:
        seen = model.encode(PICTURES[0])
        tokens, embedding = seen.tokens.copy(), seen.embedding.copy()
        model.encode_batch(PICTURES)
    np.testing.assert_array_equal(seen.tokens, tokens)
    np.testing.assert_array_equal(seen.embedding, embedding)
    with pytest.raises(EngineError, match="closed"):
        seen.caption()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("onnxruntime", EngineOptions(threads=2, memory_arena=True, prepack=False, spinning=True)),
        ("openvino", EngineOptions(threads=2, memory_arena=True)),
        ("openvino", EngineOptions(threads=1, engine="onnxruntime")),
    ],
)
def test_engine_options(bundle_for: Callable[[str], Path], target: str, options: EngineOptions) -> None:
    with Model.load(bundle_for(target), options) as model:
        assert model.replay_canary().ok


# ---- through mammut-run ----


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures in photos/."""
    (tmp_path / "photos").mkdir()
    for index, picture in enumerate(PICTURES):
        cv2.imwrite(str(tmp_path / "photos" / f"{index}.png"), picture[:, :, ::-1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_on(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], Run]:
    """run_on(bundle)("caption", "photos") runs mammut-run in this process."""

    def on(bundle: Path) -> Run:
        monkeypatch.setenv(commands_inputs.BUNDLE_VARIABLE, str(bundle))

        def call(*arguments: object) -> Done:
            capsys.readouterr()
            code = commands.main([str(each) for each in arguments])
            return Done(code, *capsys.readouterr())

        return call

    return on


def test_pictures(run_on: Callable[[Path], Run], tiny_bundle: Path, reference: Model) -> None:
    run = run_on(tiny_bundle)
    captions = run("caption", "photos", "--json", "--threads", 1, "--batch-size", 2)
    assert captions.code == 0, captions.err
    expected = [reference.encode(each).caption() for each in PICTURES]
    assert [each["ids"] for each in captions.json] == [list(each.ids) for each in expected]
    for options in (["--stream"], ["--openmammut-rules"], ["--sample", "--seed", 1], ["--prompt", "a photo of"]):
        assert run("caption", "photos/0.png", *options).code == 0
    answer = run("ask", "photos/0.png", "--question", "what is it?", "--candidates", "a car,a dog", "--json")
    assert answer.json[0]["text"] == reference.encode(PICTURES[0]).ask("what is it?", ["a car", "a dog"]).text
    assert run("ask", "photos/0.png", "--question", "what is it?").code == 0
    matches = run("match", "photos/0.png", "--classes", "cat,dog", "--negatives", "house", "--json")
    best = reference.encode(PICTURES[0]).match(["cat", "dog"], ["house"], reference.templates).matches[0]
    assert matches.json[0]["matches"][0]["text"] == best.text
    assert matches.json[0]["matches"][0]["cosine"] == pytest.approx(best.cosine, abs=1e-5)


def test_search(run_on: Callable[[Path], Run], tiny_bundle: Path) -> None:
    run = run_on(tiny_bundle)
    made = run("search", "index", "photos", "photos.index", "--json")
    assert made.code == 0 and made.json[0]["added"] == 3
    hits = run("search", "query", "photos.index", "--picture", "photos/1.png", "--json").json
    assert Path(hits[0]["path"]).name == "1.png" and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    assert run("search", "query", "photos.index", "--text", "a red car").code == 0


def test_checks(run_on: Callable[[Path], Run], tiny_bundle: Path) -> None:
    run = run_on(tiny_bundle)
    verified = run("verify", "--json")
    assert verified.code == 0 and verified.json[0]["worst_error"] < 1e-5
    (bundle,) = run("doctor", tiny_bundle, "--json").json[0]["bundles"]
    assert bundle["ok"] and bundle["target"] == verified.json[0]["target"]


def test_bench(run_on: Callable[[Path], Run], tiny_bundle: Path) -> None:
    done = run_on(tiny_bundle)("bench", "--repeats", 1, "--tokens", 4, "--threads", 1)
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    target = json.loads((tiny_bundle / "manifest.json").read_text())["target"]
    assert result["target"] == target and target in done.out.splitlines()[0].lower().replace(" ", "")
    assert result["encode_ms"] > 0 and 0 < result["unique_weight_bytes"] < result["bundle_bytes"]


# ---- the engine's options on the command line ----


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("onnxruntime", ["--low-memory"]),
        ("onnxruntime", ["--memory-arena", "--spinning", "--threads", "2"]),
        ("onnxruntime", ["--provider", "CPUExecutionProvider"]),
        ("onnxruntime", ["--provider", "cpu", "--provider-option", "key=value"]),
        ("onnxruntime", ["--provider", "cpu", "--provider-option", "cpu:key=value"]),
        ("openvino", ["--memory-arena", "--threads", "2"]),
        ("openvino", ["--device", "CPU"]),
        ("openvino", ["--compile-cache", "cache"]),
        ("openvino", ["--engine", "onnxruntime", "--low-memory"]),
    ],
)
def test_options_reach_the_engine(
    run_on: Callable[[Path], Run], bundle_for: Callable[[str], Path], target: str, options: list[str]
) -> None:
    done = run_on(bundle_for(target))("verify", *options)
    assert done.code == 0, done.err
    assert "--compile-cache" not in options or any(Path("cache").iterdir())


def test_the_devices_own_precision_is_told_from_the_bundles(
    run_on: Callable[[Path], Run], bundle_for: Callable[[str], Path]
) -> None:
    """The canary notices bfloat16, where the processor has it; the control is the run without the option."""
    run = run_on(bundle_for("openvino"))
    from mammut_runtime.engines.openvino import core

    assert run("verify").code == 0
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no precision that it likes better")
    done = run("verify", "--device-precision")
    assert done.code == 1 and "canary differs" in done.err


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("onnxruntime", ["--provider", "nonsense"], "provider nonsense is unknown; ONNX Runtime knows "),
        ("onnxruntime", ["--provider", "migraphx"], "MIGraphXExecutionProvider is not there, only "),
        ("onnxruntime", ["--provider", "QNN"], "install onnxruntime-qnn in place of onnxruntime"),
        ("onnxruntime", ["--provider", "xnnpack"], "install a build of ONNX Runtime with XNNPACK"),
        ("onnxruntime", ["--provider", "cpu", "--provider-option", "key"], "expected [NAME:]KEY=VALUE, got 'key'"),
        ("onnxruntime", ["--provider-option", "cuda:device_id=1"], "CUDAExecutionProvider, which is not among the pro"),
        (
            "onnxruntime",
            ["--provider", "qnn", "--provider", "cpu", "--provider-option", "a=b"],
            "Put its name in front, such as QNNExecutionProvider:a=b",
        ),
        ("onnxruntime", ["--device", "GPU"], "device (--device) is an option of openvino"),
        ("onnxruntime", ["--compile-cache", "cache"], "compile_cache (--compile-cache) is an option of openvino"),
        ("onnxruntime", ["--device-precision"], "(--device-precision) is an option of openvino"),
        ("openvino", ["--device", "GPU.7"], "device GPU.7 is not there, only "),
        ("openvino", ["--device", "AUTO"], "device AUTO chooses by itself where to run"),
        ("openvino", ["--low-memory"], "prepack (--low-memory) is an option of onnxruntime"),
        ("openvino", ["--spinning"], "(--spinning) is an option of onnxruntime"),
        ("openvino", ["--provider", "cuda"], "providers (--provider) is an option of onnxruntime"),
        ("openvino", ["--allow-fallback"], "(--allow-fallback) is an option of onnxruntime"),
        ("openvino", ["--gpu", "1"], "gpu (--gpu) is an option of tensorrt, and this bundle runs on openvino"),
        ("openvino", ["--threads", "-1"], "threads must be a whole number"),
    ],
)
def test_options_that_cannot_be(
    run_on: Callable[[Path], Run],
    bundle_for: Callable[[str], Path],
    target: str,
    options: list[str],
    message: str,
) -> None:
    """One line, exit code 2, and no result."""
    done = run_on(bundle_for(target))("caption", "photos/0.png", *options)
    assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
    assert done.err.startswith("error: ") and message in done.err


@pytest.mark.parametrize(("target", "extra"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_bundle_whose_engine_is_not_installed(
    run_on: Callable[[Path], Run],
    bundle_for: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    extra: str,
) -> None:
    run = run_on(bundle_for(target))
    assert run("caption", "photos/0.png").code == 0  # control
    monkeypatch.setitem(__import__("sys").modules, target, None)
    done = run("caption", "photos/0.png")
    assert done.code == 2 and done.err.count("\n") == 1 and f"pip install mammut-edge[{extra}]" in done.err


def test_which_nodes_a_provider_leaves_to_the_processor(
    run_on: Callable[[Path], Run], bundle_for: Callable[[str], Path]
) -> None:
    """With a provider that is in the usual wheels and takes nothing of ours. The control: with --allow-fallback."""
    from mammut_runtime.engines.onnxruntime import library

    run = run_on(bundle_for("onnxruntime"))
    if "AzureExecutionProvider" not in library().get_available_providers():
        pytest.skip("this build of ONNX Runtime has no second provider to try")
    done = run("caption", "photos/0.png", "--provider", "azure")
    assert done.code == 2 and done.err.count("\n") == 1 and "--allow-fallback" in done.err
    assert run("caption", "photos/0.png", "--provider", "azure", "--allow-fallback").code == 0
