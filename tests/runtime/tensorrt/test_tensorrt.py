"""TensorRT engines on a fake GPU: right captions, a cache that stays on the GPU, and refusals in words."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mammut_runtime.bundle import Bundle
from mammut_runtime.canary import canary_picture
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.device_tensors import DeviceTensor
from mammut_runtime.engines import EngineOptions, open_engine
from mammut_runtime.engines import tensorrt_cuda as cuda
from mammut_runtime.engines.tensorrt import TensorRtEngine
from mammut_runtime.errors import EngineError, InputError
from mammut_runtime.model import Model

PICTURES = [canary_picture(seed, (40, 60)) for seed in range(4)]
ON_CPU = EngineOptions(threads=1, engine="onnxruntime")


@pytest.fixture
def engine(built: Any, tensorrt_bundle: Bundle) -> TensorRtEngine:
    opened = open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")
    assert isinstance(opened, TensorRtEngine)
    return opened


def decoder_feeds(bundle: Bundle, batch: int = 1, beams: int = 1, past: int = 0, new: int = 2) -> dict[str, Any]:
    source, sizes = np.random.default_rng(1), {"batch": batch, "beams": beams, "past": past, "new": new}
    feeds: dict[str, Any] = {}
    for tensor in bundle.manifest.graphs["decoder"].inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        feeds[tensor.name] = source.standard_normal(shape).astype(tensor.dtype)
    feeds["ids"] = source.integers(0, 9, (batch, beams, new))
    return feeds


def on_cpu(bundle: Bundle, feeds: dict[str, Any]) -> dict[str, Any]:
    return open_engine(bundle.graph_path("decoder"), "onnxruntime", EngineOptions(threads=1)).run(feeds)


@pytest.mark.parametrize(
    "options",
    [
        CaptionOptions(beams=1),
        CaptionOptions(beams=3),
        CaptionOptions(beams=4, max_tokens=5, length_penalty=0.5),
        CaptionOptions(seed=3, temperature=1.5),
    ],
)
def test_captions_equal_onnx_runtime(built: Any, tensorrt_bundle: Bundle, options: CaptionOptions) -> None:
    with Model.load(tensorrt_bundle.path) as model, Model.load(tensorrt_bundle.path, ON_CPU) as reference:
        found = model.caption_batch(model.encode_batch(PICTURES), options, batch_size=3)
        expected = reference.caption_batch(reference.encode_batch(PICTURES), options, batch_size=3)
    assert [each.ids for each in found] == [each.ids for each in expected]
    assert len({each.ids for each in found}) > 1, "a control: the pictures have different captions"
    np.testing.assert_allclose([each.score for each in found], [each.score for each in expected], atol=1e-5)


def test_answers_texts_and_pictures_equal_onnx_runtime(built: Any, tensorrt_bundle: Bundle) -> None:
    candidates = ["yes", "no", "two dogs", "three cats", "a red heart", "a blue star"]
    with Model.load(tensorrt_bundle.path) as model, Model.load(tensorrt_bundle.path, ON_CPU) as reference:
        seen, expected = model.encode(PICTURES[0]), reference.encode(PICTURES[0])
        np.testing.assert_allclose(seen.embedding, expected.embedding, atol=1e-6)
        chosen, right = (each.ask("a sun", candidates) for each in (seen, expected))
        assert [each.text for each in chosen.candidates] == [each.text for each in right.candidates]
        texts = ["a photo of a cat", "two dogs"]
        np.testing.assert_allclose(model.embed_texts(texts), reference.embed_texts(texts), atol=1e-6)
        assert list(seen.caption_stream()) == list(expected.caption_stream())
        model.replay_canary()


def test_caches_never_leave_the_gpu(built: Any, tensorrt_bundle: Bundle) -> None:
    logits_bytes = tensorrt_bundle.manifest.model.vocab_size * 4
    with Model.load(tensorrt_bundle.path) as model:
        seen = model.encode_batch(PICTURES[:2])
        model.caption_batch(seen, CaptionOptions(beams=3))  # opens the graphs; the memory is computed here
        for beams in (1, 3):
            built.machine.copies.clear()
            steps = built.trt.CALLS.count("execute_async_v3")
            model.caption_batch(seen, CaptionOptions(beams=beams))
            steps = built.trt.CALLS.count("execute_async_v3") - steps
            down = [size for kind, size in built.machine.copies if kind == "DeviceToHost"]
            up = [size for kind, size in built.machine.copies if kind == "HostToDevice"]
            assert len(down) == len(up) == steps > 2, "one copy each way a step: ids up, logits down"
            assert max(up) <= 2 * beams * 8 * 4 and max(down) <= 2 * beams * logits_bytes
        assert isinstance(seen[0].memory and next(iter(seen[0].memory.values())), DeviceTensor)


def test_a_second_caption_asks_for_no_memory_even_if_it_is_longer(built: Any, tensorrt_bundle: Bundle) -> None:
    """Caches get room for the longest text at once, so a growing one finds blocks to use again."""
    with Model.load(tensorrt_bundle.path, verify=False) as model:
        seen = model.encode(PICTURES[0])
        seen.caption(CaptionOptions(beams=3, max_tokens=4))
        before = built.machine.calls["cudaMalloc"], built.machine.calls["cudaMallocHost"]
        seen.caption(CaptionOptions(beams=3))
        assert before == (built.machine.calls["cudaMalloc"], built.machine.calls["cudaMallocHost"])
        assert before[0] > 0, "a control"


def test_memory_goes_back_when_the_model_and_what_it_saw_are_gone(built: Any, tensorrt_bundle: Bundle) -> None:
    model = Model.load(tensorrt_bundle.path)
    seen = model.encode(PICTURES[0])
    caption = seen.caption().ids
    model.close()
    assert built.machine.used_bytes() > 0, "a control: what was seen holds its memory"
    del seen
    assert built.machine.used_bytes() == 0 and not built.machine.pinned
    with Model.load(tensorrt_bundle.path) as again:
        assert again.encode(PICTURES[0]).caption().ids == caption


def test_numpy_and_device_feeds_give_the_same(engine: TensorRtEngine, tensorrt_bundle: Bundle, built: Any) -> None:
    feeds = decoder_feeds(tensorrt_bundle, batch=2, beams=3)
    first, expected = engine.run(feeds), on_cpu(tensorrt_bundle, feeds)
    assert {name for name, each in first.items() if isinstance(each, DeviceTensor)} == expected.keys() - {"logits"}
    np.testing.assert_allclose(first["logits"], expected["logits"], atol=1e-5)
    past = {f"past_{name[8:]}": each for name, each in first.items() if name != "logits"}
    step = {**feeds, **past, "ids": np.ones((2, 3, 1), np.int64)}
    kept = first["logits"].copy()
    second = engine.run(step)
    np.testing.assert_array_equal(first["logits"], kept, "the next run writes elsewhere")
    reference = on_cpu(tensorrt_bundle, {**step, **{f"past_{n[8:]}": e for n, e in expected.items() if n != "logits"}})
    for name, each in second.items():
        array = each.numpy() if isinstance(each, DeviceTensor) else each
        np.testing.assert_allclose(array, reference[name], atol=1e-5)
    first["logits"][:] = 0  # ours: the next run does not look at it
    np.testing.assert_allclose(engine.run(feeds)["logits"], expected["logits"], atol=1e-5)


def test_calls_come_in_the_order_that_tensorrt_wants(
    engine: TensorRtEngine, tensorrt_bundle: Bundle, built: Any
) -> None:
    built.trt.CALLS.clear()
    engine.run(decoder_feeds(tensorrt_bundle))
    calls = built.trt.CALLS
    last_shape = len(calls) - 1 - calls[::-1].index("set_input_shape")
    first_size = calls.index("get_tensor_shape")
    assert last_shape < first_size, "sizes of outputs are known when all inputs have theirs"
    assert calls[-1] == "execute_async_v3" or "set_tensor_address" not in calls[calls.index("execute_async_v3") :]


@pytest.mark.parametrize(
    ("sizes", "name", "limits"),
    [
        ({"batch": 5}, "ids", r"\[1, 1, 1\] to \[4, 4, 24\]"),
        ({"beams": 5}, "ids", r"\[1, 1, 1\] to \[4, 4, 24\]"),
        ({"past": 24}, "past_k.0", r"\[1, 1, 2, 0, 12\] to \[4, 4, 2, 23, 12\]"),
    ],
)
def test_outside_the_profile_is_refused_with_both(
    engine: TensorRtEngine, tensorrt_bundle: Bundle, sizes: dict[str, int], name: str, limits: str
) -> None:
    feeds = decoder_feeds(tensorrt_bundle, **sizes)
    with pytest.raises(EngineError, match=rf"decoder: input {name} is \[.*, the engine was built for {limits}; lower"):
        engine.run(feeds)
    engine.run(decoder_feeds(tensorrt_bundle, batch=4, beams=4, past=23, new=1))  # a control: the largest


def test_wrong_feeds_are_refused(engine: TensorRtEngine, tensorrt_bundle: Bundle) -> None:
    feeds = decoder_feeds(tensorrt_bundle)
    with pytest.raises(EngineError, match="inputs missing: ids; unknown: none"):
        engine.run({name: each for name, each in feeds.items() if name != "ids"})
    with pytest.raises(EngineError, match=r"input ids must be int64\[\?, \?, \?\], got int32"):
        engine.run({**feeds, "ids": feeds["ids"].astype(np.int32)})
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed; load the model again"):
        engine.run(feeds)


def test_gpu_memory_full_at_run_time_says_what_to_lower(
    engine: TensorRtEngine, tensorrt_bundle: Bundle, built: Any
) -> None:
    built.machine.limit_bytes = built.machine.used_bytes() + 1000
    feeds = decoder_feeds(tensorrt_bundle, batch=4, beams=4)
    with pytest.raises(EngineError, match="the GPU's memory is full; lower the batch size, beams"):
        engine.run(feeds)
    built.machine.limit_bytes = 1 << 40
    np.testing.assert_allclose(engine.run(feeds)["logits"], on_cpu(tensorrt_bundle, feeds)["logits"], atol=1e-5)


@pytest.mark.parametrize("forgotten", ["synchronize", "hold"])
def test_the_fake_notices_what_a_gpu_would_not(built: Any, tensorrt_bundle: Bundle, forgotten: str) -> None:
    """A control for all of the above: mistakes that give garbage on a GPU fail here."""
    take = DeviceTensor.take

    def take_and_lose(self: DeviceTensor, rows: Any, axes: int) -> DeviceTensor:
        new = take(self, rows, axes)
        built.cuda.cudaFree(new.block.address)
        return new

    options = CaptionOptions(beams=3)
    model = Model.load(tensorrt_bundle.path)  # never closed: it is broken afterwards
    seen = model.encode_batch(PICTURES[:2])
    right = [each.ids for each in model.caption_batch(seen, options)]
    with pytest.MonkeyPatch.context() as patch:
        if forgotten == "synchronize":
            patch.setattr(cuda.CudaDevice, "synchronize", lambda self: None)
        else:
            patch.setattr(DeviceTensor, "take", take_and_lose)
        try:
            found = [each.ids for each in model.caption_batch(seen[::-1], options)][::-1]
        except (built.cuda.Misuse, EngineError):
            found = []
    assert found != right


def test_a_part_of_a_batch_is_fed_from_an_aligned_copy(
    engine: TensorRtEngine, tensorrt_bundle: Bundle, built: Any
) -> None:
    """The fake refuses addresses that are not multiples of 256."""
    feeds = decoder_feeds(tensorrt_bundle, batch=2, new=1)
    past = {f"past_{name[8:]}": each for name, each in engine.run(feeds).items() if name != "logits"}
    part = {name: each[1:2] for name, each in {**feeds, **past}.items()}
    assert part["past_k.0"].address % 256, "a control"
    on_host = {name: each.numpy() if isinstance(each, DeviceTensor) else each for name, each in part.items()}
    expected = on_cpu(tensorrt_bundle, on_host)["logits"]
    np.testing.assert_allclose(engine.run(part)["logits"], expected, atol=1e-5)


def test_failures_of_cuda_are_one_clear_error(engine: TensorRtEngine, tensorrt_bundle: Bundle, built: Any) -> None:
    built.machine.failures["cudaStreamSynchronize"] = built.cuda.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"CUDA failed: cudaStreamSynchronize: IllegalAddress \(.*\); restart"):
        engine.run(decoder_feeds(tensorrt_bundle))


def test_several_threads_get_the_right_captions(built: Any, tensorrt_bundle: Bundle) -> None:
    options = CaptionOptions(beams=3)
    with Model.load(tensorrt_bundle.path) as model, ThreadPoolExecutor(4) as pool:
        alone = [model.encode(picture).caption(options).ids for picture in PICTURES]
        together = list(pool.map(lambda picture: model.encode(picture).caption(options).ids, PICTURES * 3))
    assert together == alone * 3


def test_float16_caches(fake_gpu: Any, half_bundle: Bundle) -> None:
    fake_gpu.build(half_bundle)
    with Model.load(half_bundle.path) as model, Model.load(half_bundle.path, ON_CPU) as reference:
        seen, expected = model.encode_batch(PICTURES), reference.encode_batch(PICTURES)
        for beams in (1, 3):
            found = model.caption_batch(seen, CaptionOptions(beams=beams))
            right = reference.caption_batch(expected, CaptionOptions(beams=beams))
            assert [each.ids for each in found] == [each.ids for each in right]
        assert seen[0].memory is not None and {each.dtype.name for each in seen[0].memory.values()} == {"float16"}
        assert isinstance(expected[0].memory and next(iter(expected[0].memory.values())), np.ndarray), "a control"


def test_tensorrt_rtx_from_build_to_caption_and_cuda_graphs(
    fake_rtx: Any, fake_gpu: Any, tensorrt_bundle: Bundle
) -> None:
    fake_gpu.build(tensorrt_bundle, library="tensorrt_rtx")
    options = EngineOptions(library="tensorrt_rtx")
    with Model.load(tensorrt_bundle.path, options) as model:
        caption = model.encode(PICTURES[0]).caption().ids
    assert len(fake_rtx.CONTEXTS) == 4 and not any(fake_rtx.CONTEXTS)
    fake_rtx.CONTEXTS.clear()
    with Model.load(tensorrt_bundle.path, dataclasses.replace(options, cuda_graphs=True)) as model:
        assert model.encode(PICTURES[0]).caption().ids == caption
    strategies = [each.cuda_graph_strategy for each in fake_rtx.CONTEXTS if each]
    assert strategies == [fake_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE], "of the decoder only"
    with pytest.raises(EngineError, match=r"no engine for .* on this device yet"):
        Model.load(tensorrt_bundle.path)  # a control: the engines are tensorrt_rtx's


# ---- starting ----


def test_missing_engines_say_how_to_build_and_what_else_there_is(fake_gpu: Any, tensorrt_bundle: Bundle) -> None:
    message = (
        r"no engine for .*decoder.* on this device yet \(Fake GPU, tensorrt 10.3.0, .*mammut-run build .*--engine onnx"
    )
    with pytest.raises(EngineError, match=message), Model.load(tensorrt_bundle.path) as model:
        model.encode(PICTURES[0]).caption()
    with Model.load(tensorrt_bundle.path, ON_CPU) as model:  # a control: asked for, it is used
        model.replay_canary()
    assert not fake_gpu.trt.OPENED


@pytest.mark.parametrize("damage", ["flip", "cut", "plain", "renamed", "mode", "link"])
def test_an_engine_that_is_not_ours_is_never_opened(
    built: Any, tensorrt_bundle: Bundle, damage: str, tmp_path: Path
) -> None:
    path = next(built.cache.folder.glob("*/decoder-*.engine"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-100] ^= 1
    elif damage == "cut":
        del content[-5000:]
    elif damage == "plain":
        content = bytearray(b"FAKE PLAN\n{}")
    elif damage == "renamed":
        content = bytearray(next(built.cache.folder.glob("*/text-*.engine")).read_bytes())
    path.write_bytes(content)
    if damage == "mode":
        path.chmod(0o666)
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=r"refused, not loaded: .*build again: mammut-run build BUNDLE --force"):
        open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")
    assert not built.trt.OPENED
    open_engine(tensorrt_bundle.graph_path("text"), "tensorrt")  # a control
    assert len(built.trt.OPENED) == 1


def test_another_devices_cache_is_refused(built: Any, tensorrt_bundle: Bundle) -> None:
    key = Path(os.environ["XDG_STATE_HOME"]) / "mammut-edge" / "engine.key"
    key.write_bytes(bytes(32))
    with pytest.raises(EngineError, match="its MAC is not by this device's key"):
        open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")
    key.unlink()
    with pytest.raises(EngineError, match="this device has no key yet"):
        open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")
    assert not built.trt.OPENED


def test_another_version_gpu_or_bundle_needs_another_engine(
    built: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ("uuid", "minor", "version"):
        with pytest.MonkeyPatch.context() as patch:
            if change == "uuid":
                patch.setattr(built.cuda._Uuid, "bytes", b"another-gpu-0000")
            elif change == "minor":
                patch.setattr(built.cuda.cudaDeviceProp, "minor", 9)
            else:
                patch.setattr(built.trt, "__version__", "10.4.0")
            cuda._devices.clear()
            from mammut_runtime.engines import tensorrt_library

            tensorrt_library._load.cache_clear()
            with pytest.raises(EngineError, match="no engine for decoder on this device yet"):
                open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")
    cuda._devices.clear()
    tensorrt_library._load.cache_clear()
    open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")  # a control


def test_no_driver_is_one_clear_error(fake_gpu: Any, tensorrt_bundle: Bundle) -> None:
    fake_gpu.machine.failures["cudaGetDeviceCount"] = fake_gpu.cuda.cudaError_t.cudaErrorInsufficientDriver
    with pytest.raises(EngineError, match=r"no usable GPU or driver: InsufficientDriver .* nvidia-smi.*--engine onnx"):
        open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")
    fake_gpu.machine.failures.clear()
    with pytest.raises(InputError, match="gpu 3: there is 1, numbered from 0"):
        open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt", EngineOptions(gpu=3))


def test_a_driver_older_than_cuda_python_says_which_one_fits(
    fake_gpu: Any, tensorrt_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JetPack 6 with the newest cuda-python."""
    error = fake_gpu.cuda.cudaError_t.cudaErrorInsufficientDriver
    fake_gpu.machine.failures["cudaGetDeviceCount"] = error
    monkeypatch.setattr(fake_gpu.cuda, "cudaRuntimeGetVersion", lambda: (0, 13040))
    message = r"cuda-python is for CUDA 13.4, this driver for CUDA 12.6; .* pip install 'cuda-python==12\.\*'"
    with pytest.raises(EngineError, match=message):
        open_engine(tensorrt_bundle.graph_path("decoder"), "tensorrt")


def test_options_of_other_engines_are_refused(built: Any, tensorrt_bundle: Bundle) -> None:
    path = tensorrt_bundle.graph_path("decoder")
    with pytest.raises(InputError, match=r"spinning .* is an option of onnxruntime"):
        open_engine(path, "tensorrt", EngineOptions(spinning=True))
    with pytest.raises(InputError, match=r"gpu .* is an option of tensorrt"):
        open_engine(path, "onnxruntime", EngineOptions(gpu=1))
    with pytest.raises(InputError, match="engine: expected onnxruntime"):
        EngineOptions(engine="tensorrt")
    with pytest.raises(InputError, match="cuda_graphs is for tensorrt_rtx"):
        open_engine(path, "tensorrt", EngineOptions(cuda_graphs=True))
    open_engine(path, "tensorrt", EngineOptions())  # a control
