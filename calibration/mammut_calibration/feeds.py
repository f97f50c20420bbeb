"""Real inputs of every graph: what the runtime feeds them while it looks at a few of the user's pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from mammut_calibration.data import Damaged, Dataset, Sample
from mammut_calibration.questions import names_to_find
from mammut_runtime.bundle import Bundle
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.engines import Engine, EngineOptions, open_engine
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model

Feeds = dict[str, NDArray[Any]]
"""Inputs of one run of a graph, by name."""
_MAX_TOKENS = 16


class _Recorder:
    """An Engine that keeps what it was fed."""

    def __init__(self, engine: Engine, kept: list[Feeds]) -> None:
        self._engine, self._kept = engine, kept

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        self._kept.append(feeds)
        return self._engine.run(feeds)

    def close(self) -> None:
        self._engine.close()


def record_feeds(
    bundle: Bundle, data: Dataset | Iterable[Sample], pictures: int, *, threads: int = 0
) -> dict[str, list[Feeds]]:
    """Graph -> its inputs for the first usable pictures of the data.

    Each picture gives one entry for `vision` and `memory`, one for `text` (its caption, or the model's own), and two
    for `decoder`: the prompt without a past, and the last step with the longest. In a bundle with a `video` graph it
    gives one for that too, the clip it is from or one made of it; `memory` gets the clip's tokens before the
    picture's, and the first entry of `decoder` is about the clip. `detector` gets the picture and names_to_find, which
    are also the first texts. Raises InputError if no picture is usable.
    """
    frames = bundle.manifest.model.video_frames
    calls: dict[str, list[Feeds]] = {name: [] for name in bundle.manifest.graphs}
    found: dict[str, list[Feeds]] = {name: [] for name in bundle.manifest.graphs}

    def open_graph(name: str) -> Engine:
        engine = open_engine(bundle.graph_path(name), bundle.manifest.target, EngineOptions(threads=threads))
        return _Recorder(engine, calls[name])

    with Model(bundle, open_graph=open_graph) as model:
        used = 0
        for sample in data.samples(clip_frames=frames) if isinstance(data, Dataset) else data:
            if used == pictures:
                break
            if isinstance(sample, Damaged):
                continue
            used += 1
            if frames:
                clip = model.encode_frames(sample.clip(frames))
                if "decoder" in calls:
                    clip.caption(CaptionOptions(beams=1, max_tokens=_MAX_TOKENS))
            seen = model.encode(sample.image)
            text = sample.captions[0] if sample.captions else sample.label or "a picture"
            if "decoder" in calls:
                caption = seen.caption(CaptionOptions(beams=1, max_tokens=_MAX_TOKENS))
                text = text if sample.captions or not model.tokenizer.clean(caption.text) else caption.text
            if "text" in calls and model.tokenizer.clean(text):
                model.embed_texts([text])
            if "detector" in calls:
                seen.detect(names_to_find(bundle.manifest))
            for name, each in calls.items():
                found[name] += [each[0], each[-1]] if len(each) > 1 else each
                each.clear()
    if not used:
        raise InputError("no usable picture in the data; expected at least one")
    return found
