"""One measurement in a process of its own, so that memory and thread pools are this measurement's alone.

    python benchmarks/measure_one.py runtime BUNDLE THREADS REPEATS      our runtime
    python benchmarks/measure_one.py reference CHECKPOINT THREADS REPEATS   PyTorch, no cache, as the public code does
    python benchmarks/measure_one.py bandwidth - THREADS REPEATS         reading memory

Run by bench_runtime.py. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Timing, peak_megabytes, timed
from numpy.typing import NDArray

TOKENS = 20
"""New tokens of the caption, whatever the model would say: the end is forbidden before the last one."""
PROMPTS = 64


class Texts:
    """Prompts that were never asked before: the runtime remembers the embeddings of texts."""

    def __init__(self) -> None:
        self._given = 0

    def new(self, count: int) -> list[str]:
        self._given += count
        return [f"a photo of a red car number {self._given + each:05d}" for each in range(count)]


def main() -> None:
    kind, subject, threads, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    measure = {"runtime": measure_runtime, "reference": measure_reference, "bandwidth": measure_bandwidth}[kind]
    print(json.dumps(measure(subject, threads, repeats)))


def measure_runtime(bundle: str, threads: int, repeats: int) -> dict[str, Any]:
    """Through the public API, from uint8 pixels and texts. The picture has the model's size: no resizing in it."""
    from mammut_runtime.canary import canary_picture
    from mammut_runtime.caption_options import CaptionOptions
    from mammut_runtime.engines import EngineOptions
    from mammut_runtime.model import Model, Seen

    model = Model.load(bundle, EngineOptions(threads=threads))
    size = model.manifest.preprocess.size
    picture = canary_picture(1, (size, size))
    whole = CaptionOptions(beams=1, min_tokens=TOKENS - 1, max_tokens=TOKENS)
    one = CaptionOptions(beams=1, max_tokens=1)
    seen: list[Seen] = []

    def look() -> None:  # a Seen may keep what it computed, so each measurement gets a new one
        seen[:] = [model.encode(picture)]

    look()
    tokens = len(seen[0].caption(whole).ids)
    results = {
        "encode": timed(look, repeats),
        "caption": timed(lambda: seen[0].caption(whole), repeats, prepare=look),
        "first_token": timed(lambda: seen[0].caption(one), repeats, prepare=look),
        "caption_beams_3": timed(
            lambda: seen[0].caption(dataclasses.replace(whole, beams=3)), max(1, repeats // 2), prepare=look
        ),
    }
    caption_peak = peak_megabytes()
    texts = Texts()
    results["text_1"] = timed(lambda: model.embed_texts(texts.new(1)), repeats)
    results["text_64"] = timed(lambda: model.embed_texts(texts.new(PROMPTS)), max(1, repeats // 4), warm_up=1)
    steps = TOKENS - 1
    step_ms = (results["caption"].median_ms - results["first_token"].median_ms) / steps
    return {
        **_plain(results),
        "tokens": tokens,
        "step_ms": step_ms,
        "tokens_per_s": 1000 / step_ms,
        "peak_memory_mb": caption_peak,
        "peak_memory_with_texts_mb": peak_megabytes(),
    }


def measure_reference(checkpoint: str, threads: int, repeats: int) -> dict[str, Any]:
    """The PyTorch core used as the public code uses its own: the whole prefix again for every token, the picture's keys
    and values again for every token, vocabulary logits for every position, also for texts that are only embedded."""
    import torch

    from mammut.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    loaded = load_checkpoint(checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    size, length = loaded.preprocess.size, model.config.text.context_length
    pixels = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, size, size), np.float32))
    start = [tokenizer.start_id]

    @torch.inference_mode()
    def caption() -> None:
        tokens, _ = model.encode_image(pixels)
        ids = list(start)
        for _ in range(TOKENS):
            logits = model.caption_logits(tokens, torch.tensor([ids]))[0, -1]
            logits[tokenizer.end_id] = -torch.inf  # so that every caption is equally long
            ids.append(int(logits.argmax()))

    @torch.inference_mode()
    def encode() -> None:
        model.encode_image(pixels)

    @torch.inference_mode()
    def embed(texts: list[str], vocabulary: bool) -> None:
        ids = torch.from_numpy(tokenizer.tokenize(texts, length))
        if not vocabulary:
            model.encode_text(ids)
            return
        x = model.text.token_embedding(ids) + model.text.positions[:length]
        for block in model.text.self_blocks:
            x = block(x, None)
        hidden = model.text.final_norm(x)
        model.text.vocabulary_logits(hidden)
        torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)

    few = max(1, repeats // 4)
    results = {
        "encode": timed(encode, repeats),
        "encode_and_caption": timed(caption, max(2, repeats // 2), warm_up=1),
    }
    caption_peak = peak_megabytes()
    texts = Texts()
    results["text_1"] = timed(lambda: embed(texts.new(1), True), repeats)
    results["text_64"] = timed(lambda: embed(texts.new(PROMPTS), True), few, warm_up=1)
    results["text_64_no_vocabulary"] = timed(lambda: embed(texts.new(PROMPTS), False), few, warm_up=1)
    return {**_plain(results), "peak_memory_mb": caption_peak, "peak_memory_with_texts_mb": peak_megabytes()}


def measure_bandwidth(_: str, threads: int, repeats: int) -> dict[str, Any]:
    """Bytes per second that this many threads read from memory: a matrix far larger than any cache times a vector."""
    matrix: NDArray[np.float32] = np.ones((16_384, 8_192), np.float32)  # 0.5 GB
    vector: NDArray[np.float32] = np.ones(8_192, np.float32)
    timing = timed(lambda: matrix @ vector, max(5, repeats))
    return {"read_gb_per_s": matrix.nbytes / timing.median_ms / 1e6, "threads": threads}


def _plain(results: dict[str, Timing]) -> dict[str, Any]:
    return {f"{name}_ms": timing.median_ms for name, timing in results.items()} | {
        "spread_ms": {name: [timing.fastest_ms, timing.slowest_ms] for name, timing in results.items()}
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
