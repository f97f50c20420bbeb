"""Bundles that watch clips: what their manifest must say, and the runtime's two ways with frames."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut_runtime.bundle import Bundle, graph_contract, write_manifest
from mammut_runtime.canary import canary_picture, moving_crops
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import BundleError, InputError, VerificationError
from mammut_runtime.generation_openmammut import OpenMammutOptions
from mammut_runtime.manifest import Manifest, read_manifest
from mammut_runtime.model import Model
from mammut_runtime.strict import to_dict, to_json
from mammut_runtime.video.encode import evenly
from mammut_runtime.video.sampler import Budget

VIDEO = Path(__file__).parents[1] / "data" / "tiny-video-bundle"
GREEDY = CaptionOptions(beams=1, max_tokens=6)
FRAMES = 4


@pytest.fixture
def watching(make_bundle: Any, tmp_path: Path) -> Any:
    """A toy bundle whose clips have 4 frames and 5 tokens, its pictures 3."""
    return make_bundle(tmp_path / "watching", frames=FRAMES)


@pytest.fixture
def frames(watching: Any) -> list[np.ndarray]:
    return [watching.picture(seed) for seed in range(FRAMES)]


# ---- the manifest ----


def test_what_a_bundle_with_video_says(watching: Any) -> None:
    manifest: Manifest = watching.manifest
    contract = graph_contract(manifest.model, manifest.preprocess.size)
    assert list(contract) == ["vision", "video", "text", "memory", "decoder"]
    video = {each.name: each.shape for each in (*contract["video"].inputs, *contract["video"].outputs)}
    assert video == {
        "frames": ("batch", 4, 3, 16, 16),
        "tokens": ("batch", 5, 5),
        "embedding": ("batch", 6),
        "norm": ("batch",),
    }
    assert contract["vision"].outputs[0].shape == ("batch", 3, 5)
    assert contract["memory"].inputs[0].shape == ("batch", "seen", 5)
    assert contract["decoder"].inputs[-1].shape == ("batch", 2, "seen", 4)
    assert read_manifest(to_json(manifest)) == manifest


def test_without_video_nothing_is_new(toy_bundle: Any) -> None:
    """So bundles of before are read, and the same bytes are written."""
    contract = graph_contract(toy_bundle.manifest.model, 16)
    assert list(contract) == ["vision", "text", "memory", "decoder"]
    assert contract["memory"].inputs[0].shape == ("batch", 3, 5)
    written = to_json(toy_bundle.manifest)
    assert b"video" not in written and b"clip_embedding" not in written


def _without_graph(data: dict[str, Any]) -> None:
    del data["graphs"]["video"], data["canary"]["clip_embedding"]


def _fixed_size(data: dict[str, Any]) -> None:
    data["graphs"]["memory"]["inputs"][0]["shape"][1] = 3


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (_without_graph, "model.video_frames: expected 0 in a bundle without 'video', got 4"),
    (lambda data: data["model"].pop("video_tokens"), "video_frames 4 and video_tokens 0: expected both above 0, or 0"),
    (lambda data: data["model"].update(video_frames=5), "graphs.video.inputs: frames: expected .*batch, 5, 3, 16, 16"),
    (lambda data: data["model"].update(video_frames=5000), "model.video_frames: expected a number from 0 to 1,024"),
    (lambda data: data["model"].update(video_tokens=6), "graphs.video.outputs: tokens: expected .*batch, 6, 5"),
    (_fixed_size, r"graphs.memory.inputs: tokens: expected float32\[batch, seen, 5\], got float32\[batch, 3, 5\]"),
    (lambda data: data["graphs"].pop("vision"), "graphs: missing key 'vision', which 'video' needs"),
    (lambda data: data["canary"].pop("clip_embedding"), "canary.clip_embedding: expected 6 components"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_contradictions_are_refused(watching: Any, change: Callable[[dict[str, Any]], object], message: str) -> None:
    data = json.loads(to_json(watching.manifest))
    change(data)
    with pytest.raises(BundleError, match=message):
        read_manifest(json.dumps(data).encode())


def test_a_video_graph_needs_its_sizes(watching: Any) -> None:
    data = to_dict(watching.manifest)
    del data["model"]["video_frames"], data["model"]["video_tokens"]
    with pytest.raises(BundleError, match="video_frames: expected 1 or more in a bundle with the graph 'video', got 0"):
        read_manifest(json.dumps(data).encode())


# ---- frames ----


def test_frames_are_seen_together_and_in_order(watching: Any, frames: list[np.ndarray]) -> None:
    watching.opened.clear()
    with watching.model() as model:
        seen, backwards = model.encode_frames(frames), model.encode_frames(frames[::-1])
        assert model.watches and seen.tokens.shape == (5, 5)
        assert abs(float(seen.embedding @ backwards.embedding)) < 0.999
        swapped = model.encode_frames([each[:, :, ::-1] for each in frames], "bgr")
        assert (swapped.embedding == seen.embedding).all()
        with pytest.raises(InputError, match="takes 4 frames, got 3; encode_video takes any number"):
            model.encode_frames(frames[:3])
    assert watching.opened == ["video"]


def test_without_the_graph_a_clip_is_seen_as_pictures(toy_bundle: Any) -> None:
    pictures = [toy_bundle.picture(seed) for seed in range(12)]
    with toy_bundle.model() as model:
        assert not model.watches
        with pytest.raises(BundleError, match="no 'video' graph, which clips need"):
            model.encode_frames(pictures[:4])
        seen = model.encode_video(pictures)
        assert seen.way == "pictures" and len(seen.sampling.frames) == 8 and seen.sampling.tokens == 8 * 3


@pytest.mark.parametrize(("count", "used"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (40, [5, 15, 25, 35])])
def test_any_number_of_frames(watching: Any, count: int, used: list[int]) -> None:
    pictures = [watching.picture(seed) for seed in range(count)]
    with watching.model() as model:
        seen = model.encode_video(pictures, fps=10.0)
        indices = [each.index for each in seen.sampling.frames]
        assert indices == used
        wanted = model.encode_frames(evenly([pictures[index] for index in indices], 4))
        assert (seen.embedding == wanted.embedding).all() and seen.way == "video"
        assert seen.sampling.tokens == 5 and seen.tokens.shape == (5, 5)
        assert seen.sampling.central == len(indices) // 2


def test_budgets(watching: Any) -> None:
    pictures = [watching.picture(seed) for seed in range(12)]
    with watching.model() as model:
        assert len(model.encode_video(pictures, budget=Budget(2)).sampling.frames) == 2
        assert len(model.encode_video(pictures, budget=Budget(30)).sampling.frames) == 4  # more would not be looked at
        assert len(model.encode_video(pictures, budget=Budget(4, tokens=5)).sampling.frames) == 4
        with pytest.raises(InputError, match="a budget of 4 tokens; a clip has 5 with this bundle"):
            model.encode_video(pictures, budget=Budget(tokens=4))


@given(st.integers(1, 60), st.integers(1, 40))
def test_evenly(given_frames: int, count: int) -> None:
    found = evenly(range(given_frames), count)
    assert len(found) == count and found == sorted(found) and set(found) <= set(range(given_frames))
    if count >= given_frames:  # all are used, each about as often
        times = [found.count(each) for each in range(given_frames)]
        assert max(times) - min(times) <= 1
    else:
        assert len(set(found)) == count
    backwards = [given_frames - 1 - each for each in reversed(found)]
    assert max(abs(a - b) for a, b in zip(found, backwards, strict=True)) <= 1  # neither end is preferred


# ---- pictures and clips together ----


def test_captions_of_both_kinds_in_one_call(watching: Any, frames: list[np.ndarray]) -> None:
    with watching.model() as model:
        pictures, clip, other = model.encode_batch(frames[:2]), model.encode_frames(frames), model.encode_frames(frames)
        mixed = [pictures[0], clip, pictures[1], other]
        together = model.caption_batch(mixed, GREEDY)
        fresh = [model.see(each.tokens, each.embedding) for each in mixed]
        assert together == [each.caption(GREEDY) for each in fresh]
        public = OpenMammutOptions(seq_len=8)
        assert model.caption_batch(mixed, public) == [model.caption_batch([each], public)[0] for each in mixed]
        assert clip.ask("what?", ["cat", "dog"]).candidates and "".join(clip.caption_stream(GREEDY)) == together[1].text
        with pytest.raises(InputError, match="pictures and clips cannot be in one call"):
            model.generate_openmammut(mixed, public)
        assert len(model.generate_openmammut([clip, other], public)) == 2


def test_see_takes_tokens_of_either_kind(watching: Any, frames: list[np.ndarray]) -> None:
    with watching.model() as model:
        clip = model.encode_frames(frames)
        assert model.see(clip.tokens, clip.embedding).caption(GREEDY) == clip.caption(GREEDY)
        with pytest.raises(
            InputError, match=r"expected tokens \[3, 5\] or \[5, 5\] and an embedding \[6\], got \[4, 5\]"
        ):
            model.see(clip.tokens[:4], clip.embedding)


# ---- the canary ----


def test_moving_crops() -> None:
    picture = canary_picture(2, (8, 12))
    frames = moving_crops(picture, 5)
    assert [each.shape for each in frames] == [(6, 9, 3)] * 5
    assert (frames[0] == picture[:6, :9]).all() and (frames[4] == picture[2:, 3:]).all()
    assert (frames[2] == picture[1:7, 1:10]).all()
    assert (moving_crops(picture, 1)[0] == picture[:6, :9]).all()
    assert moving_crops(picture[:1, :1], 3)[2].shape == (1, 1, 3)


def test_the_canary_has_a_clip(watching: Any) -> None:
    assert watching.model().replay_canary().ok
    canary = watching.manifest.canary
    spoilt = dataclasses.replace(canary, clip_embedding=tuple(-each for each in canary.clip_embedding))
    write_manifest(watching.folder, dataclasses.replace(watching.manifest, canary=spoilt))
    with pytest.raises(VerificationError, match="clip_embedding differs by"):
        watching.model().replay_canary()


# ---- a real bundle ----


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_real_bundle_on_every_engine(target: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    folder = tmp_path / "bundle"
    shutil.copytree(VIDEO, folder)
    write_manifest(folder, dataclasses.replace(Bundle.open(VIDEO).manifest, target=target))  # type: ignore[arg-type]
    with Model.load(folder, EngineOptions(threads=1)) as model:
        assert model.replay_canary().ok
        picture = canary_picture(4, (50, 60))
        clip, still = (model.encode_frames(each) for each in (moving_crops(picture, 4), [picture] * 4))
        assert clip.tokens.shape == (40, 32) and float(clip.embedding @ still.embedding) < 0.9999
        seen = [model.encode(picture), clip]
        assert model.caption_batch(seen, GREEDY) == [each.caption(GREEDY) for each in seen]
