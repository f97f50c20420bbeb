"""A PyTorch checkpoint as a predictor: the core computes what a bundle's graphs would, the runtime does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mammut.checkpoint import Checkpoint, load_checkpoint
from mammut.detection.coco_results import Found
from mammut.evaluation.checkpoint_boxes import CheckpointBoxes
from mammut.evaluation.examples import Image
from mammut.evaluation.predictor import F32, PredictorOptions, answers, is_clip
from mammut.model import Mammut
from mammut_runtime import generation
from mammut_runtime.cached_decoder import CachedDecoder, CacheShape
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.generation import StopRule
from mammut_runtime.graphs import Graphs
from mammut_runtime.manifest import TextRule
from mammut_runtime.preprocess import Preprocessor
from mammut_runtime.text_tower import TextTower

Arrays = dict[str, NDArray[Any]]


class TorchGraph:
    """One of the core's methods as an engine: named arrays to named arrays, as a bundle's graph has them."""

    def __init__(self, function: Callable[[dict[str, Tensor]], dict[str, Tensor]], device: torch.device) -> None:
        self._function, self._device = function, device

    @torch.inference_mode()
    def run(self, feeds: dict[str, Any]) -> Arrays:
        given = {name: torch.from_numpy(np.ascontiguousarray(each)).to(self._device) for name, each in feeds.items()}
        return {name: each.cpu().numpy() for name, each in self._function(given).items()}

    def close(self) -> None:
        """Nothing to free."""


def torch_graphs(model: Mammut, device: torch.device) -> Graphs:
    """vision, text, memory and decoder, computed by the core."""

    def vision(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, embedding = model.encode_image(feeds["pixels"])
        return {"tokens": tokens, "embedding": embedding}

    def video(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, embedding = model.encode_video(feeds["frames"])
        return {"tokens": tokens, "embedding": embedding}

    def text(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"embedding": model.encode_text(feeds["ids"])}

    def memory(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for layer, (keys, values) in enumerate(model.memory(feeds["tokens"])):
            found[f"cross_k.{layer}"], found[f"cross_v.{layer}"] = keys, values
        return found

    def decoder(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        text, crossed = model.config.text, len(model.config.text.cross_after)
        past = [(feeds[f"past_k.{layer}"], feeds[f"past_v.{layer}"]) for layer in range(text.layers)]
        cross = [(feeds[f"cross_k.{layer}"], feeds[f"cross_v.{layer}"]) for layer in range(crossed)]
        logits, present = model.decode_step(feeds["ids"], past, cross)
        found = {"logits": logits}
        for layer, (keys, values) in enumerate(present):
            found[f"present_k.{layer}"], found[f"present_v.{layer}"] = keys, values
        return found

    functions = {"vision": vision, "text": text, "memory": memory, "decoder": decoder}
    if model.tubes is not None:
        functions["video"] = video
    return Graphs(tuple(functions), lambda name: TorchGraph(functions[name], device))


class CheckpointPredictor:
    """A checkpoint, by the core in float32."""

    def __init__(self, spec: str | Checkpoint, options: PredictorOptions) -> None:
        """options.threads sets PyTorch's threads for the whole process, as PyTorch has no other way."""
        if options.threads:
            torch.set_num_threads(options.threads)
        self._checkpoint = spec if isinstance(spec, Checkpoint) else load_checkpoint(spec)
        self._options = options
        try:
            device = torch.device(options.device)
            model = self._checkpoint.model.to(device)
        except (RuntimeError, AssertionError) as problem:
            reason = str(problem).split("\n")[0]
            raise InputError(f"device {options.device}: cannot be used ({reason}); expected cpu or cuda") from problem
        config = model.config.text
        self._tokenizer = self._checkpoint.tokenizer
        self._graphs = torch_graphs(model, device)
        self._preprocess = Preprocessor(self._checkpoint.preprocess)
        self._shape = CacheShape(config.layers, config.heads, config.width // config.heads)
        self._rule = _text_rule(self._checkpoint)
        self._text = TextTower(self._graphs, self._tokenizer, self._rule)
        self._device = device
        self._boxes: CheckpointBoxes | None = None

    @property
    def name(self) -> str:
        return f"{Path(self._checkpoint.source).name or self._checkpoint.source} (checkpoint)"

    @property
    def templates(self) -> tuple[str, ...]:
        return self._text.templates

    @property
    def facts(self) -> dict[str, str]:
        return {
            "kind": "checkpoint", "spec": self._checkpoint.source, "model": self._checkpoint.model.config.name,
            "precision": "float32", "weights": self._checkpoint.sha256, "torch": torch.__version__,
        }  # fmt: skip

    @property
    def frames(self) -> int:
        video = self._checkpoint.model.config.video
        return video.frames if video is not None else 0

    def embed_pictures(self, images: Sequence[Image]) -> F32:
        return self._see(images)["embedding"]

    def embed_texts(self, texts: Sequence[str]) -> F32:
        return self._text.embed(texts)

    def caption(self, images: Sequence[Image]) -> list[str]:
        tokens = self._see(images)["tokens"]
        return self._write(self._memory(tokens), self._rule.prompts.get("caption", ""))

    def answer(self, images: Sequence[Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        memory = self._memory(self._see(images)["tokens"])

        def write(rows: list[int], prompt: str) -> list[str]:
            return self._write({name: each[rows] for name, each in memory.items()}, prompt)

        return answers(write, questions, self._rule.prompts.get("ask", "{question}"))

    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        """Raises CheckpointError for a checkpoint without a detector."""
        if self._boxes is None:
            self._boxes = CheckpointBoxes(self._checkpoint, self._text, self._device)
        size = self._options.batch_size
        parts = (images[at : at + size] for at in range(0, len(images), size))
        return [found for part in parts for found in self._boxes.detect(part, names, most)]

    def close(self) -> None:
        self._graphs.close()

    def _see(self, images: Sequence[Image]) -> Arrays:
        size, parts = self._options.batch_size, []
        clips = any(is_clip(each) for each in images)
        for at in range(0, len(images), size):
            some = images[at : at + size]
            if clips:
                frames = np.stack([self._clip(each) for each in some])
                parts.append(self._graphs.run("video", {"frames": frames}))
            else:
                pixels = np.stack([self._preprocess(each) for each in some])
                parts.append(self._graphs.run("vision", {"pixels": pixels}))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _clip(self, image: Image) -> F32:
        """float32[F, 3, S, S]. Among clips, a picture is a clip that stands still."""
        if is_clip(image):
            return np.stack([self._preprocess(each) for each in image])
        return np.stack([self._preprocess(image)] * self.frames)

    def _memory(self, tokens: F32) -> Arrays:
        return self._graphs.run("memory", {"tokens": tokens})

    def _write(self, memory: Arrays, prompt: str) -> list[str]:
        """One text for each picture. Raises InputError for a prompt that fills the decoder."""
        ids = [self._rule.start_id, *self._tokenizer.encode(prompt)]
        room = self._rule.context_length - len(ids)
        if room < 1:
            raise InputError(
                f"the prompt {prompt[:60]!r} has {len(ids)} tokens, the decoder holds {self._rule.context_length} with "
                f"the text to come; shorten it"
            )
        stop = StopRule(self._rule.end_id, min(self._options.max_tokens, room))
        size, texts = self._options.batch_size, []
        pictures = len(next(iter(memory.values())))
        for at in range(0, pictures, size):
            cross = {name: each[at : at + size] for name, each in memory.items()}
            decoder = CachedDecoder(self._graphs.engine("decoder"), cross, self._shape)
            written = generation.generate(decoder, ids, self._options.caption(), stop)
            texts += [self._tokenizer.decode(each.ids) for each in written]
        return texts


def _text_rule(checkpoint: Checkpoint) -> TextRule:
    """How a bundle of this checkpoint would treat texts. Raises CheckpointError for prompts of no known form."""
    config, tokenizer = checkpoint.model.config.text, checkpoint.tokenizer
    try:
        return TextRule(
            context_length=config.context_length,
            max_tokens=config.context_length - 1,
            text_length=config.text_length,
            pad_id=tokenizer.pad_id,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            mask_pads=config.mask_pads,
            prompts=checkpoint.prompts,
        )
    except ValueError as problem:
        raise CheckpointError(f"{checkpoint.source}: its config cannot be used: {problem}") from problem
